//! A vCPU: the run loop, and what its exits mean.

use std::os::fd::AsRawFd;
use std::sync::{Arc, OnceLock};

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO,
    KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR, KVM_INTERNAL_ERROR_EMULATION,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::kick::{self, KickHandle};
use super::run_page::RunPage;
use super::vm::Vm;
use super::{cpuid, debug, runtime, vcpu_state};
use crate::cpu_profile::CpuidTable;
use crate::engine::state::{GeneralRegisters, VcpuState};
use crate::engine::{BusAccess, DebugRequest, EngineError, Exit, Kick, UnknownMsrs, Vcpu, invalid};

/// What all vCPUs of a VM share.
pub(super) struct VcpuContext {
    pub(super) vm: Arc<Vm>,
    pub(super) unknown_msrs: UnknownMsrs,
    /// What `KVM_GET_MSR_INDEX_LIST` gives.
    pub(super) listed_msrs: Vec<u32>,
    /// The MSRs of a state, in the order in which they are restored: the same for all vCPUs, so the
    /// first finds them.
    state_msrs: OnceLock<Vec<u32>>,
    /// The size of the XSAVE area in bytes.
    pub(super) xsave_len: usize,
    run_pages_len: usize,
}

impl VcpuContext {
    pub(super) fn new(kvm: &Kvm, vm: Arc<Vm>) -> Result<Self, EngineError> {
        let listed_msrs = kvm
            .get_msr_index_list()
            .map_err(|error| EngineError::new("KVM_GET_MSR_INDEX_LIST", error))?
            .as_slice()
            .to_vec();
        let xsave2 = usize::try_from(vm.fd.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(Self {
            unknown_msrs: UnknownMsrs::default(),
            listed_msrs,
            state_msrs: OnceLock::new(),
            xsave_len: xsave2.max(size_of::<kvm_bindings::kvm_xsave>()),
            run_pages_len: vm.fd.run_size(),
            vm,
        })
    }
}

/// One vCPU on KVM.
pub(super) struct KvmVcpu {
    pub(super) index: u32,
    pub(super) fd: VcpuFd,
    page: RunPage,
    kick: Arc<KickHandle>,
    pub(super) context: Arc<VcpuContext>,
    /// What [`Vcpu::reset`] goes back to.
    power_on: Option<Box<VcpuState>>,
    /// The thread that runs it, once one does.
    thread: Option<i32>,
}

impl KvmVcpu {
    /// Makes vCPU `index` as it is after power-on.
    pub(super) fn new(
        context: Arc<VcpuContext>,
        index: u32,
        cpuid: &CpuidTable,
    ) -> Result<Self, EngineError> {
        let error = |operation: &str, source| {
            EngineError::new(format!("{operation} of vCPU {index}"), source)
        };
        let mut fd = context
            .vm
            .fd
            .create_vcpu(u64::from(index))
            .map_err(|source| error("KVM_CREATE_VCPU", source))?;
        fd.set_cpuid2(&cpuid::to_kvm(cpuid)?)
            .map_err(|source| error("KVM_SET_CPUID2", source))?;
        let page = RunPage::new(&mut fd, context.run_pages_len);
        let mut vcpu = Self {
            index,
            fd,
            page,
            kick: Arc::new(KickHandle::new(page)),
            context,
            power_on: None,
            thread: None,
        };
        if vcpu.context.state_msrs.get().is_none() {
            let found = vcpu.readable_msrs()?;
            vcpu.context.state_msrs.get_or_init(|| found);
        }
        vcpu.power_on = Some(Box::new(vcpu_state::save(&vcpu)?));
        Ok(vcpu)
    }

    /// The MSRs of its state.
    pub(super) fn state_msrs(&self) -> &[u32] {
        self.context
            .state_msrs
            .get()
            .expect("invariant: a vCPU's creation has filled it")
    }

    /// An error of this vCPU.
    pub(super) fn error(&self, operation: &str, source: impl Into<std::io::Error>) -> EngineError {
        EngineError::new(format!("{operation} of vCPU {}", self.index), source)
    }

    /// Makes the calling thread the vCPU's own.
    fn enter(&mut self) -> Result<(), EngineError> {
        let current = rustix::thread::gettid().as_raw_nonzero().get();
        if self.thread == Some(current) {
            // It was stopped, for who knows how long: the guest's watchdogs must not mistake that
            // for a lock-up. Fails if the guest does not use kvmclock, and then nobody needs it.
            let _ = self.fd.kvmclock_ctrl();
        } else {
            self.thread = Some(kick::prepare_thread()?);
        }
        self.kick.enter(current);
        Ok(())
    }

    fn run_until_exit(&mut self, bus: &dyn BusAccess) -> Result<Exit, EngineError> {
        loop {
            // SAFETY: KVM_RUN wants zero for an argument. It executes the guest, which reaches our memory
            // only through the slots, and writes to the shared pages, to which no reference exists
            // now, save the atomic byte.
            let failed = unsafe { libc::ioctl(self.fd.as_raw_fd(), runtime::KVM_RUN, 0) } < 0;
            if failed {
                let source = std::io::Error::last_os_error();
                match source.raw_os_error() {
                    Some(libc::EINTR) if self.kick.take(self.page) => return Ok(Exit::Kicked),
                    // A stray signal; or an application processor that was woken without a cause.
                    Some(libc::EINTR | libc::EAGAIN) => continue,
                    _ => return Err(self.error("KVM_RUN", source)),
                }
            }
            if let Some(exit) = self.handle_exit(bus) {
                return Ok(exit);
            }
        }
    }

    /// Serves the guest's request, or says why it cannot go on.
    fn handle_exit(&mut self, bus: &dyn BusAccess) -> Option<Exit> {
        match self.page.exit_reason() {
            KVM_EXIT_IO => {
                let Some((port, reads, units)) = self.page.port_access() else {
                    return Some(self.fatal("malformed port access"));
                };
                for unit in units {
                    if reads {
                        bus.port_read(port, unit);
                    } else {
                        bus.port_write(port, unit);
                    }
                }
                None
            }
            KVM_EXIT_MMIO => {
                let (address, writes, data) = self.page.memory_access();
                if writes {
                    bus.memory_write(address, data);
                } else {
                    bus.memory_read(address, data);
                }
                None
            }
            KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR => {
                let index = self.page.refuse_msr();
                self.context.unknown_msrs.note(index);
                None
            }
            KVM_EXIT_INTR => None,
            KVM_EXIT_DEBUG => Some(Exit::Debug),
            KVM_EXIT_SHUTDOWN => Some(Exit::TripleFault),
            KVM_EXIT_INTERNAL_ERROR => {
                let (suberror, data) = self.page.internal_error();
                Some(self.fatal(&describe_internal_error(suberror, &data)))
            }
            KVM_EXIT_FAIL_ENTRY => {
                let reason = self.page.fail_entry();
                Some(self.fatal(&format!("the processor refuses to enter it ({reason:#x})")))
            }
            KVM_EXIT_SYSTEM_EVENT => {
                let event = self.page.system_event();
                Some(self.fatal(&format!("system event {event}")))
            }
            reason => Some(self.fatal(&format!("unexpected exit {reason}"))),
        }
    }

    fn fatal(&self, reason: &str) -> Exit {
        let at = self
            .fd
            .get_regs()
            .map_or_else(|error| error.to_string(), |regs| format!("{:#x}", regs.rip));
        Exit::Fatal(format!("vCPU {} at RIP {at}: {reason}", self.index))
    }
}

/// In words (`Documentation/virt/kvm/api.rst`, `KVM_EXIT_INTERNAL_ERROR`).
fn describe_internal_error(suberror: u32, data: &[u64]) -> String {
    if suberror != KVM_INTERNAL_ERROR_EMULATION {
        return format!("KVM internal error {suberror}, data {data:x?}");
    }
    // data[0]: flags, bit 0 says that the instruction's bytes follow: their number, then 15 of them.
    let bytes = match data {
        [flags, first, second, ..] if flags & 1 == 1 => {
            let all = [first.to_le_bytes(), second.to_le_bytes()].concat();
            let len = usize::from(all[0]).min(15);
            format!(", bytes {:02x?}", &all[1..=len])
        }
        _ => String::new(),
    };
    format!("KVM cannot emulate the instruction{bytes}")
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, bus: &dyn BusAccess) -> Result<Exit, EngineError> {
        self.enter()?;
        let exit = self.run_until_exit(bus);
        self.kick.leave();
        exit
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.kick) as Arc<dyn Kick>
    }

    fn save(&mut self) -> Result<VcpuState, EngineError> {
        vcpu_state::save(self)
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        vcpu_state::restore(self, state, true)
    }

    fn set_registers(
        &mut self,
        general: &GeneralRegisters,
        xsave: &[u8],
    ) -> Result<(), EngineError> {
        vcpu_state::set_registers(self, general, xsave)
    }

    fn set_debug(&mut self, request: &DebugRequest) -> Result<(), EngineError> {
        let setting = debug::setting(request)
            .map_err(|reason| self.error("KVM_SET_GUEST_DEBUG", invalid(reason)))?;
        self.fd
            .set_guest_debug(&setting)
            .map_err(|error| self.error("KVM_SET_GUEST_DEBUG", error))
    }

    fn translate(&mut self, linear: u64) -> Result<Option<u64>, EngineError> {
        let found = self
            .fd
            .translate_gva(linear)
            .map_err(|error| self.error("KVM_TRANSLATE", error))?;
        Ok((found.valid != 0).then_some(found.physical_address))
    }

    fn reset(&mut self) -> Result<(), EngineError> {
        let power_on = self
            .power_on
            .take()
            .expect("invariant: filled at creation and put back below");
        let result = vcpu_state::restore(self, &power_on, false);
        self.power_on = Some(power_on);
        result
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.kick.disconnect();
    }
}
