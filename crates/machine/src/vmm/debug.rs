//! What a debugger may do with a machine. The event loop does it, as everything that stops or starts
//! the machine, on calls that the debugger's thread posts and waits for.

use std::sync::mpsc::Sender;

use vm_memory::{Bytes, GuestAddress};

use super::machine::Machine;
use crate::engine::state::VcpuState;
use crate::engine::{DebugRequest, EngineError};

/// Bytes of a page, within which a linear address has one physical address.
const PAGE: u64 = 4096;

/// A debugger's wish, and where the answer goes.
#[derive(Debug)]
pub(super) struct DebugCall {
    pub(super) command: DebugCommand,
    pub(super) reply: Sender<DebugReply>,
}

#[derive(Debug)]
pub(super) enum DebugCommand {
    /// Stop the machine, and from now on tell here which vCPU stops by itself.
    Attach(Sender<usize>),
    /// No breakpoints, no telling; the machine runs.
    Detach,
    /// Stop the machine.
    Stop,
    /// Let it run with these breakpoints, one vCPU perhaps for a single instruction, or `only` that one.
    Resume {
        step: Option<usize>,
        only: Option<usize>,
        breakpoints: Vec<u64>,
    },
    Registers(usize),
    /// Those that [`crate::engine::Vcpu::set_registers`] sets.
    SetRegisters(usize, Box<VcpuState>),
    /// Bytes at a linear address, as far as they are mapped to RAM.
    Read {
        vcpu: usize,
        address: u64,
        len: usize,
    },
    Write {
        vcpu: usize,
        address: u64,
        data: Vec<u8>,
    },
}

#[derive(Debug)]
pub(super) enum DebugReply {
    Done,
    Registers(Box<VcpuState>),
    Bytes(Vec<u8>),
    Failed,
}

/// Who hears of stops.
#[derive(Default)]
pub(super) struct Debugger {
    stops: Option<Sender<usize>>,
    /// It has stopped the machine, or was told of a stop, and has not let it go on since.
    holds: bool,
}

impl Debugger {
    /// Whether it is the debugger that says when the machine goes on.
    pub(super) fn holds(&self) -> bool {
        self.holds
    }

    /// A vCPU has stopped at a breakpoint or after a step: the others stop, too. Without a debugger all
    /// go on.
    pub(super) fn stopped(
        &mut self,
        machine: &mut Machine,
        vcpu: usize,
    ) -> Result<(), super::machine::MachineError> {
        machine.pause()?;
        match &self.stops {
            Some(stops) if stops.send(vcpu).is_ok() => {
                self.holds = true;
                Ok(())
            }
            _ => machine.resume(),
        }
    }

    /// Does what a debugger asks.
    ///
    /// # Errors
    ///
    /// Why it could not be done, for the log: the protocol has no words for it.
    pub(super) fn execute(&mut self, machine: &mut Machine, call: DebugCall) -> Result<(), String> {
        let (reply, done) = match self.command(machine, call.command) {
            Ok(reply) => (reply, Ok(())),
            Err(reason) => (DebugReply::Failed, Err(reason)),
        };
        // A debugger that is gone needs no answer.
        let _ = call.reply.send(reply);
        done
    }

    fn command(
        &mut self,
        machine: &mut Machine,
        command: DebugCommand,
    ) -> Result<DebugReply, String> {
        let text = |error: super::machine::MachineError| error.to_string();
        match command {
            DebugCommand::Attach(stops) => {
                self.stops = Some(stops);
                machine.pause().map_err(text)?;
                self.holds = true;
            }
            DebugCommand::Detach => {
                self.stops = None;
                self.holds = false;
                machine.pause().map_err(text)?;
                set_debug(machine, None, &[])?;
                machine.resume().map_err(text)?;
            }
            DebugCommand::Stop => {
                machine.pause().map_err(text)?;
                self.holds = true;
            }
            DebugCommand::Resume {
                step,
                only,
                breakpoints,
            } => {
                machine.pause().map_err(text)?;
                set_debug(machine, step, &breakpoints)?;
                machine.resume_some(only).map_err(text)?;
                self.holds = false;
            }
            DebugCommand::Registers(vcpu) => {
                let mut state = None;
                with_vcpu(machine, vcpu, |vcpu| {
                    state = Some(vcpu.save()?);
                    Ok(())
                })?;
                let state = state.ok_or("there is no such vCPU")?;
                return Ok(DebugReply::Registers(Box::new(state)));
            }
            DebugCommand::SetRegisters(vcpu, state) => {
                with_vcpu(machine, vcpu, |vcpu| {
                    vcpu.set_registers(&state.general, &state.xsave)
                })?;
            }
            DebugCommand::Read { vcpu, address, len } => {
                return read(machine, vcpu, address, len).map(DebugReply::Bytes);
            }
            DebugCommand::Write {
                vcpu,
                address,
                data,
            } => write(machine, vcpu, address, &data)?,
        }
        Ok(DebugReply::Done)
    }
}

/// Calls `action` with one vCPU of a machine that stands still.
fn with_vcpu(
    machine: &Machine,
    wanted: usize,
    mut action: impl FnMut(&mut dyn crate::engine::Vcpu) -> Result<(), EngineError>,
) -> Result<(), String> {
    if machine.is_running() {
        return Err("the machine runs".into());
    }
    let visit = |index, vcpu: &mut dyn crate::engine::Vcpu| {
        if index == wanted {
            action(vcpu)
        } else {
            Ok(())
        }
    };
    machine
        .vcpus
        .for_each(visit)
        .map_err(|error| error.to_string())
}

fn set_debug(machine: &Machine, step: Option<usize>, breakpoints: &[u64]) -> Result<(), String> {
    let set = |index, vcpu: &mut dyn crate::engine::Vcpu| {
        vcpu.set_debug(&DebugRequest {
            single_step: step == Some(index),
            breakpoints: breakpoints.to_vec(),
        })
    };
    machine
        .vcpus
        .for_each(set)
        .map_err(|error| error.to_string())
}

/// Where a linear address is, and how many of `len` bytes are on its page.
fn locate(
    machine: &Machine,
    vcpu: usize,
    address: u64,
    len: usize,
) -> Result<Option<(GuestAddress, usize)>, String> {
    let mut physical = None;
    with_vcpu(machine, vcpu, |vcpu| {
        physical = vcpu.translate(address)?;
        Ok(())
    })?;
    let on_page = (PAGE - address % PAGE) as usize;
    Ok(physical.map(|at| (GuestAddress(at), on_page.min(len))))
}

fn read(machine: &Machine, vcpu: usize, address: u64, len: usize) -> Result<Vec<u8>, String> {
    let mut data = Vec::new();
    while data.len() < len {
        let at = address.wrapping_add(data.len() as u64);
        let Some((physical, count)) = locate(machine, vcpu, at, len - data.len())? else {
            break;
        };
        let mut bytes = vec![0; count];
        if machine.memory.read_slice(&mut bytes, physical).is_err() {
            break;
        }
        data.extend(bytes);
    }
    Ok(data)
}

fn write(machine: &Machine, vcpu: usize, address: u64, data: &[u8]) -> Result<(), String> {
    let mut done = 0;
    while done < data.len() {
        let at = address.wrapping_add(done as u64);
        let place = locate(machine, vcpu, at, data.len() - done)?;
        let (physical, count) = place.ok_or_else(|| format!("{at:#x} is not mapped"))?;
        machine
            .memory
            .write_slice(&data[done..done + count], physical)
            .map_err(|error| format!("{at:#x}: {error}"))?;
        done += count;
    }
    Ok(())
}
