//! GDB's remote protocol on a Unix socket: one debugger at a time, each vCPU a thread of it.
//!
//! The protocol is the `gdbstub` crate's. This thread has no access to the machine; it posts calls to
//! the event loop and waits for their answers. A debugger that leaves or is lost leaves a running guest.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread;

use gdbstub::common::{Signal, Tid};
use gdbstub::conn::ConnectionExt;
use gdbstub::stub::{GdbStub, MultiThreadStopReason, run_blocking};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, SwBreakpoint, SwBreakpointOps,
};
use gdbstub::target::{Target, TargetError, TargetResult};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::X86_64CoreRegs;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::debug::{DebugCall, DebugCommand, DebugReply};
use super::notice::{Mailbox, Notice};
use crate::engine::state::VcpuState;

/// How long the socket and the machine are looked at in turn.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};
/// Where x87 registers and XMM registers are in an XSAVE area.
const ST: usize = 32;
const XMM: usize = 160;
/// Where its header says which components are not in their initial state, and which bit SSE has there
/// (SDM volume 1, 13.4.2).
const XSTATE_BV: usize = 512;
const SSE: u8 = 1 << 1;

/// Starts the thread that serves debuggers, which is up when this returns and serves when the returned
/// sender is dropped or used.
pub(super) fn start(
    listener: UnixListener,
    vcpus: u32,
    mailbox: Arc<Mailbox>,
) -> io::Result<mpsc::Sender<()>> {
    let (open, wait) = mpsc::channel();
    let (started, up) = mpsc::channel();
    thread::Builder::new().name("gdb".into()).spawn(move || {
        let _ = started.send(());
        let _ = wait.recv();
        for stream in listener.incoming() {
            // A debugger that cannot be accepted may try again.
            let Ok(stream) = stream else { return };
            let served = serve(stream, vcpus, &mailbox);
            if served.is_err() {
                return; // the event loop has ended
            }
        }
    })?;
    let _ = up.recv();
    Ok(open)
}

/// Serves one debugger to its end.
fn serve(stream: UnixStream, vcpus: u32, mailbox: &Arc<Mailbox>) -> Result<(), Gone> {
    let (sender, stops) = mpsc::channel();
    let mut guest = Debuggee {
        mailbox: Arc::clone(mailbox),
        vcpus,
        stops,
        breakpoints: BTreeSet::new(),
        step: None,
        chosen: None,
        others_wait: false,
    };
    guest.call(DebugCommand::Attach(sender))?;
    // However it ends, by the debugger's wish, a broken connection or bytes that are no protocol.
    let _ = GdbStub::new(stream).run_blocking::<EventLoop>(&mut guest);
    guest.call(DebugCommand::Detach).map(|_| ())
}

/// The event loop does not answer any more.
#[derive(Debug)]
struct Gone;

/// The guest as the protocol sees it.
struct Debuggee {
    mailbox: Arc<Mailbox>,
    vcpus: u32,
    stops: Receiver<usize>,
    breakpoints: BTreeSet<u64>,
    step: Option<usize>,
    /// The vCPU that the debugger lets go on, and whether the others stay where they are.
    chosen: Option<usize>,
    others_wait: bool,
}

impl Debuggee {
    fn call(&self, command: DebugCommand) -> Result<DebugReply, Gone> {
        let (reply, answer) = mpsc::channel();
        self.mailbox
            .post(Notice::Debug(DebugCall { command, reply }));
        answer.recv().map_err(|_| Gone)
    }

    /// A call for which a refusal is the debugger's to show.
    fn ask(&self, command: DebugCommand) -> TargetResult<DebugReply, Self> {
        match self.call(command) {
            Ok(DebugReply::Failed) => Err(TargetError::NonFatal),
            Ok(reply) => Ok(reply),
            Err(gone) => Err(TargetError::Fatal(gone)),
        }
    }

    fn registers(&self, tid: Tid) -> TargetResult<Box<VcpuState>, Self> {
        match self.ask(DebugCommand::Registers(tid.get() - 1))? {
            DebugReply::Registers(state) => Ok(state),
            _ => Err(TargetError::NonFatal),
        }
    }
}

/// The thread of a vCPU, counted from one.
fn thread_of(vcpu: usize) -> Tid {
    Tid::MIN.saturating_add(vcpu)
}

impl Target for Debuggee {
    type Arch = X86_64_SSE;
    type Error = Gone;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Debuggee {
    fn read_registers(&mut self, regs: &mut X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        to_gdb(&*self.registers(tid)?, regs);
        Ok(())
    }

    fn write_registers(&mut self, regs: &X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        let mut state = self.registers(tid)?;
        from_gdb(regs, &mut state);
        self.ask(DebugCommand::SetRegisters(tid.get() - 1, state))
            .map(|_| ())
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let command = DebugCommand::Read {
            vcpu: tid.get() - 1,
            address: start,
            len: data.len(),
        };
        match self.ask(command)? {
            DebugReply::Bytes(bytes) if !bytes.is_empty() => {
                let len = bytes.len().min(data.len());
                data[..len].copy_from_slice(&bytes[..len]);
                Ok(len)
            }
            _ => Err(TargetError::NonFatal),
        }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let command = DebugCommand::Write {
            vcpu: tid.get() - 1,
            address: start,
            data: data.to_vec(),
        };
        self.ask(command).map(|_| ())
    }

    fn list_active_threads(&mut self, thread_is_active: &mut dyn FnMut(Tid)) -> Result<(), Gone> {
        (0..self.vcpus as usize).for_each(|vcpu| thread_is_active(thread_of(vcpu)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadResume for Debuggee {
    fn resume(&mut self) -> Result<(), Gone> {
        // What stopped while the debugger was not listening is told of again, if it still is so.
        while self.stops.try_recv().is_ok() {}
        let command = DebugCommand::Resume {
            step: self.step,
            only: self.chosen.filter(|_| self.others_wait),
            breakpoints: self.breakpoints.iter().copied().collect(),
        };
        match self.call(command)? {
            // A guest that does not run would be waited for in vain.
            DebugReply::Failed => Err(Gone),
            _ => Ok(()),
        }
    }

    fn clear_resume_actions(&mut self) -> Result<(), Gone> {
        self.step = None;
        self.chosen = None;
        self.others_wait = false;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Gone> {
        self.chosen.get_or_insert(tid.get() - 1);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSchedulerLocking for Debuggee {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Gone> {
        self.others_wait = true;
        Ok(())
    }
}

impl MultiThreadSingleStep for Debuggee {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), Gone> {
        self.step = Some(tid.get() - 1);
        self.chosen = self.step;
        Ok(())
    }
}

impl Breakpoints for Debuggee {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }
}

/// Neither kind changes the guest's memory: the engine compares addresses.
impl SwBreakpoint for Debuggee {
    fn add_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.breakpoints.insert(address))
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.breakpoints.remove(&address))
    }
}

impl HwBreakpoint for Debuggee {
    fn add_hw_breakpoint(&mut self, address: u64, kind: usize) -> TargetResult<bool, Self> {
        self.add_sw_breakpoint(address, kind)
    }

    fn remove_hw_breakpoint(&mut self, address: u64, kind: usize) -> TargetResult<bool, Self> {
        self.remove_sw_breakpoint(address, kind)
    }
}

/// Waits for the debugger and the guest at once.
enum EventLoop {}

impl run_blocking::BlockingEventLoop for EventLoop {
    type Target = Debuggee;
    type Connection = UnixStream;
    type StopReason = MultiThreadStopReason<u64>;

    fn wait_for_stop_reason(
        guest: &mut Debuggee,
        stream: &mut UnixStream,
    ) -> Result<
        run_blocking::Event<Self::StopReason>,
        run_blocking::WaitForStopReasonError<Gone, io::Error>,
    > {
        use run_blocking::{Event, WaitForStopReasonError};
        loop {
            if let Ok(vcpu) = guest.stops.try_recv() {
                let tid = thread_of(vcpu);
                let reason = if guest.step == Some(vcpu) {
                    MultiThreadStopReason::SignalWithThread {
                        tid,
                        signal: Signal::SIGTRAP,
                    }
                } else {
                    MultiThreadStopReason::SwBreak(tid)
                };
                return Ok(Event::TargetStopped(reason));
            }
            let mut polled = [PollFd::new(stream, PollFlags::IN)];
            let ready = rustix::event::poll(&mut polled, Some(&LOOK));
            if ready.is_ok_and(|ready| ready > 0) {
                let byte =
                    ConnectionExt::read(stream).map_err(WaitForStopReasonError::Connection)?;
                return Ok(Event::IncomingData(byte));
            }
        }
    }

    fn on_interrupt(guest: &mut Debuggee) -> Result<Option<Self::StopReason>, Gone> {
        guest.call(DebugCommand::Stop)?;
        Ok(Some(MultiThreadStopReason::Signal(Signal::SIGINT)))
    }
}

fn to_gdb(state: &VcpuState, regs: &mut X86_64CoreRegs) {
    let general = &state.general;
    let g = general;
    regs.regs = [
        g.rax, g.rbx, g.rcx, g.rdx, g.rsi, g.rdi, g.rbp, g.rsp, g.r8, g.r9, g.r10, g.r11, g.r12,
        g.r13, g.r14, g.r15,
    ];
    regs.rip = g.rip;
    regs.eflags = g.rflags as u32;
    let special = &state.special;
    regs.segments.cs = special.cs.selector.into();
    regs.segments.ss = special.ss.selector.into();
    regs.segments.ds = special.ds.selector.into();
    regs.segments.es = special.es.selector.into();
    regs.segments.fs = special.fs.selector.into();
    regs.segments.gs = special.gs.selector.into();
    let area = &state.xsave;
    let slot = |at: usize| {
        let bytes = area.get(at..at + 16).unwrap_or(&[0; 16]);
        bytes
            .iter()
            .rev()
            .fold(0u128, |value, byte| value << 8 | u128::from(*byte))
    };
    for (index, register) in regs.st.iter_mut().enumerate() {
        register.copy_from_slice(&slot(ST + 16 * index).to_le_bytes()[..10]);
    }
    for (index, register) in regs.xmm.iter_mut().enumerate() {
        *register = slot(XMM + 16 * index);
    }
    let first = slot(0);
    regs.fpu.fctrl = (first & 0xffff) as u32;
    regs.fpu.fstat = (first >> 16 & 0xffff) as u32;
    regs.mxcsr = (slot(16) >> 64) as u32;
}

/// The general registers, RIP and RFLAGS, and the XMM registers; the others are not the debugger's to
/// change.
fn from_gdb(regs: &X86_64CoreRegs, state: &mut VcpuState) {
    let g = &mut state.general;
    let places = [
        &mut g.rax, &mut g.rbx, &mut g.rcx, &mut g.rdx, &mut g.rsi, &mut g.rdi, &mut g.rbp,
        &mut g.rsp, &mut g.r8, &mut g.r9, &mut g.r10, &mut g.r11, &mut g.r12, &mut g.r13,
        &mut g.r14, &mut g.r15,
    ];
    for (place, value) in places.into_iter().zip(regs.regs) {
        *place = value;
    }
    g.rip = regs.rip;
    g.rflags = regs.eflags.into();
    // Registers in their initial state are not looked at otherwise.
    if let Some(components) = state.xsave.get_mut(XSTATE_BV) {
        *components |= SSE;
    }
    for (index, register) in regs.xmm.iter().enumerate() {
        let at = XMM + 16 * index;
        if let Some(bytes) = state.xsave.get_mut(at..at + 16) {
            bytes.copy_from_slice(&register.to_le_bytes());
        }
    }
}
