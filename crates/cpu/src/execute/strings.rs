//! MOVS, CMPS, SCAS, LODS and STOS, single and repeated. INS and OUTS are the system's.
//!
//! A repeated one does a bounded number of iterations and then says [`Flow::Again`], so that
//! interrupts come in. Registers are as the completed iterations leave them at any time, also when one
//! faults. Runs of MOVS and STOS inside a page of RAM are done by the host's own instruction.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::operand::segment_name;
use crate::error::Exception;
use crate::flags::{Condition, Kind, mask};
use crate::memory::PAGE;
use crate::mmu::Access;
use crate::processor::{Environment, Executed, Flow, Processor};
use crate::state::{SegmentName, rflags};

/// What is spent before interrupts may come in: one for an iteration, [`RUN_COST`] for a run.
const BUDGET: u64 = 256;
/// The cost of up to a page by the host's instruction.
const RUN_COST: u64 = 64;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Action {
    Move,
    Compare,
    Scan,
    Load,
    Store,
}

/// A decoded string instruction.
#[derive(Clone, Copy)]
struct StringOperation {
    action: Action,
    /// Bytes of an element.
    size: u8,
    /// Bytes of the address registers and the counter.
    address: u8,
    /// The source's segment; the destination's is ES.
    segment: SegmentName,
    source: Register,
    destination: Register,
    counter: Register,
    accumulator: Register,
}

fn action(code: Code) -> Option<(Action, u8)> {
    Some(match code {
        Code::Movsb_m8_m8 => (Action::Move, 1),
        Code::Movsw_m16_m16 => (Action::Move, 2),
        Code::Movsd_m32_m32 => (Action::Move, 4),
        Code::Movsq_m64_m64 => (Action::Move, 8),
        Code::Cmpsb_m8_m8 => (Action::Compare, 1),
        Code::Cmpsw_m16_m16 => (Action::Compare, 2),
        Code::Cmpsd_m32_m32 => (Action::Compare, 4),
        Code::Cmpsq_m64_m64 => (Action::Compare, 8),
        Code::Scasb_AL_m8 => (Action::Scan, 1),
        Code::Scasw_AX_m16 => (Action::Scan, 2),
        Code::Scasd_EAX_m32 => (Action::Scan, 4),
        Code::Scasq_RAX_m64 => (Action::Scan, 8),
        Code::Lodsb_AL_m8 => (Action::Load, 1),
        Code::Lodsw_AX_m16 => (Action::Load, 2),
        Code::Lodsd_EAX_m32 => (Action::Load, 4),
        Code::Lodsq_RAX_m64 => (Action::Load, 8),
        Code::Stosb_m8_AL => (Action::Store, 1),
        Code::Stosw_m16_AX => (Action::Store, 2),
        Code::Stosd_m32_EAX => (Action::Store, 4),
        Code::Stosq_m64_RAX => (Action::Store, 8),
        _ => return None,
    })
}

fn decode(instruction: &Instruction) -> Option<StringOperation> {
    let (action, size) = action(instruction.code())?;
    let kinds = [instruction.op_kind(0), instruction.op_kind(1)];
    let any = |wanted: [OpKind; 2]| kinds.iter().any(|kind| wanted.contains(kind));
    let (address, [source, destination, counter]) =
        if any([OpKind::MemorySegSI, OpKind::MemoryESDI]) {
            (2, [Register::SI, Register::DI, Register::CX])
        } else if any([OpKind::MemorySegESI, OpKind::MemoryESEDI]) {
            (4, [Register::ESI, Register::EDI, Register::ECX])
        } else {
            (8, [Register::RSI, Register::RDI, Register::RCX])
        };
    let accumulator = match size {
        1 => Register::AL,
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    Some(StringOperation {
        action,
        size,
        address,
        segment: segment_name(instruction.memory_segment()).unwrap_or(SegmentName::Ds),
        source,
        destination,
        counter,
        accumulator,
    })
}

impl Processor {
    pub(crate) fn string_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        let operation = decode(instruction)?;
        if !instruction.has_rep_prefix() && !instruction.has_repne_prefix() {
            return Some(self.iterate(env, &operation).map(|()| Flow::Next));
        }
        Some(self.repeat(env, &operation, instruction.has_repne_prefix()))
    }

    fn repeat(
        &mut self,
        env: &dyn Environment,
        operation: &StringOperation,
        while_different: bool,
    ) -> Executed {
        let mut left = self.read_register(operation.counter);
        let compares = matches!(operation.action, Action::Compare | Action::Scan);
        let stop = if while_different {
            Condition::E
        } else {
            Condition::Ne
        };
        // A single step's trap comes after each iteration.
        let stepping = self.state.flags & rflags::TF != 0;
        let mut budget = if stepping { 1 } else { BUDGET };
        while left != 0 {
            if budget == 0 {
                return Ok(Flow::Again);
            }
            let run = if stepping {
                0
            } else {
                self.run_of_elements(operation, left)
            };
            if run != 0 {
                self.advance(operation, run);
                left -= run;
                budget = budget.saturating_sub(RUN_COST);
            } else {
                self.iterate(env, operation)?;
                left -= 1;
                budget -= 1;
            }
            self.write_register(operation.counter, left);
            if compares && self.state.condition(stop) {
                break;
            }
        }
        Ok(Flow::Next)
    }

    /// Moves the address registers over `elements`.
    fn advance(&mut self, operation: &StringOperation, elements: u64) {
        let mut by = elements.wrapping_mul(operation.size.into());
        if self.state.flags & rflags::DF != 0 {
            by = by.wrapping_neg();
        }
        let mut step = |register: Register| {
            let value = self.read_register(register).wrapping_add(by);
            self.write_register(register, value);
        };
        match operation.action {
            Action::Move | Action::Compare => {
                step(operation.source);
                step(operation.destination);
            }
            Action::Load => step(operation.source),
            Action::Scan | Action::Store => step(operation.destination),
        }
    }

    fn load_source(
        &mut self,
        env: &dyn Environment,
        operation: &StringOperation,
    ) -> Result<u64, Exception> {
        let offset = self.read_register(operation.source);
        let size = operation.size;
        let linear = self.linear(operation.segment, offset, size.into(), Access::Read)?;
        self.load(env, linear, size)
    }

    fn destination(&self, operation: &StringOperation, access: Access) -> Result<u64, Exception> {
        let offset = self.read_register(operation.destination);
        self.linear(SegmentName::Es, offset, operation.size.into(), access)
    }

    fn iterate(
        &mut self,
        env: &dyn Environment,
        operation: &StringOperation,
    ) -> Result<(), Exception> {
        let size = operation.size;
        match operation.action {
            Action::Move | Action::Store => {
                let value = if operation.action == Action::Move {
                    self.load_source(env, operation)?
                } else {
                    self.read_register(operation.accumulator)
                };
                let linear = self.destination(operation, Access::Write)?;
                self.store(env, linear, size, value)?;
            }
            Action::Compare | Action::Scan => {
                let left = if operation.action == Action::Compare {
                    self.load_source(env, operation)?
                } else {
                    self.read_register(operation.accumulator)
                };
                let linear = self.destination(operation, Access::Read)?;
                let right = self.load(env, linear, size)?;
                let result = left.wrapping_sub(right) & mask(size);
                self.state.set_lazy(Kind::Sub, size, left, right, result);
            }
            Action::Load => {
                let value = self.load_source(env, operation)?;
                self.write_register(operation.accumulator, value);
            }
        }
        self.advance(operation, 1);
        Ok(())
    }

    /// Does as many of `left` iterations as lie in one page of RAM, if the instruction is one that the
    /// host can do. None for everything else: faults, devices, an element across pages.
    fn run_of_elements(&mut self, operation: &StringOperation, left: u64) -> u64 {
        let runs = matches!(operation.action, Action::Move | Action::Store);
        if !runs || self.state.flags & rflags::DF != 0 {
            return 0;
        }
        let size = u64::from(operation.size);
        let (to, room) = self.run_room(operation, SegmentName::Es, operation.destination);
        match operation.action {
            Action::Store => {
                let elements = left.min(room / size);
                let allowed = self.run_allowed(
                    SegmentName::Es,
                    operation.destination,
                    elements * size,
                    Access::Write,
                );
                let value = self.read_register(operation.accumulator);
                let done = allowed && self.store_run(to, operation.size, elements, value);
                if done { elements } else { 0 }
            }
            Action::Move => {
                let (from, source_room) =
                    self.run_room(operation, operation.segment, operation.source);
                let elements = left.min(room.min(source_room) / size);
                let bytes = elements * size;
                let allowed =
                    self.run_allowed(operation.segment, operation.source, bytes, Access::Read)
                        && self.run_allowed(
                            SegmentName::Es,
                            operation.destination,
                            bytes,
                            Access::Write,
                        );
                let done = allowed && self.move_run(from, to, operation.size, elements);
                if done { elements } else { 0 }
            }
            _ => 0,
        }
    }

    /// The linear address that a register names and the bytes up to the end of its page, or until the
    /// register wraps; no bytes where the segment does not allow it.
    fn run_room(
        &self,
        operation: &StringOperation,
        segment: SegmentName,
        register: Register,
    ) -> (u64, u64) {
        let offset = self.read_register(register);
        match self.linear(segment, offset, 1, Access::Read) {
            Ok(linear) => {
                let wraps = (mask(operation.address) - offset).saturating_add(1);
                (linear, (PAGE - linear % PAGE).min(wraps))
            }
            Err(_) => (0, 0),
        }
    }

    /// Whether the segment allows all of a run.
    fn run_allowed(
        &self,
        segment: SegmentName,
        register: Register,
        bytes: u64,
        access: Access,
    ) -> bool {
        let offset = self.read_register(register);
        bytes != 0 && self.linear(segment, offset, bytes, access).is_ok()
    }
}
