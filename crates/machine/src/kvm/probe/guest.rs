//! The probe's guest: 64-bit code in ring 0, hand-assembled.

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use mica_base::units::Bytes;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::ProbeError;
use crate::engine::EngineError;
use crate::memory::{self, GuestMemory, MemoryOptions};

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const CODE: u64 = 0x4000;
const GDT: u64 = 0x5000;
const GDT_POINTER: u64 = 0x5100;
const STACK: u64 = 0x7000;
/// What the code reads and writes.
const DATA: u64 = 0x8000;
/// The port by which guest and host take turns.
const PORT: u16 = 0x10;

const CODE_SELECTOR: u16 = 0x8;
const DATA_SELECTOR: u16 = 0x10;

/// Instructions that every kernel executes in ring 0. RDI is [`DATA`], RSP [`STACK`].
const STEPS: &[(&str, &[u8])] = &[
    (
        "a write of CR3",
        &[
            0x0f, 0x20, 0xd8, // mov rax, cr3
            0x0f, 0x22, 0xd8, // mov cr3, rax
        ],
    ),
    ("INVLPG", &[0x0f, 0x01, 0x3f]), // invlpg [rdi]
    (
        "LGDT",
        &[
            0x0f, 0x01, 0x14, 0x25, 0x00, 0x51, 0x00, 0x00, // lgdt [GDT_POINTER]
        ],
    ),
    (
        "WRMSR",
        &[
            0xb9, 0x02, 0x01, 0x00, 0xc0, // mov ecx, 0xc0000102: the kernel's GS base
            0x31, 0xc0, // xor eax, eax
            0x31, 0xd2, // xor edx, edx
            0x0f, 0x30, // wrmsr
        ],
    ),
    (
        "SWAPGS",
        &[
            0x0f, 0x01, 0xf8, // swapgs
            0x0f, 0x01, 0xf8, // swapgs
        ],
    ),
    ("LOCK XADD", &[0xf0, 0x48, 0x0f, 0xc1, 0x07]), // lock xadd [rdi], rax
    ("CMPXCHG16B", &[0xf0, 0x48, 0x0f, 0xc7, 0x0f]), // lock cmpxchg16b [rdi]
    (
        "MOVDQA",
        &[
            0x66, 0x0f, 0x6f, 0x07, // movdqa xmm0, [rdi]
            0x66, 0x0f, 0x7f, 0x07, // movdqa [rdi], xmm0
        ],
    ),
    (
        "IRETQ",
        &[
            0x48, 0x89, 0xe0, // mov rax, rsp
            0x6a, 0x10, // push DATA_SELECTOR
            0x50, // push rax
            0x9c, // pushfq
            0x6a, 0x08, // push CODE_SELECTOR
            0x48, 0x8d, 0x05, 0x03, 0x00, 0x00, 0x00, // lea rax, [rip + 3]
            0x50, // push rax
            0x48, 0xcf, // iretq
        ],
    ),
];

/// Between the steps: counts them in memory, which outlives a triple fault.
const COUNT_STEP: &[u8] = &[0xff, 0x47, 0x20]; // inc dword [rdi + 32]
const STEP_COUNTER: u64 = DATA + 32;

/// Asks the host how often, computes, tells the host, and again; goes on to the steps when the
/// answer is zero.
const LOOP: &[u8] = &[
    0xe5, 0x10, // again: in eax, PORT
    0x85, 0xc0, // test eax, eax
    0x74, 0x23, // jz steps
    0x0f, 0x20, 0xd9, // mov rcx, cr3
    0x0f, 0x22, 0xd9, // mov cr3, rcx
    0x48, 0x01, 0xc3, // next: add rbx, rax
    0x48, 0x89, 0x5f, 0x10, // mov [rdi + 16], rbx
    0x48, 0x8b, 0x57, 0x10, // mov rdx, [rdi + 16]
    0x48, 0x31, 0xd6, // xor rsi, rdx
    0x48, 0xc1, 0xce, 0x07, // ror rsi, 7
    0x56, // push rsi
    0x41, 0x58, // pop r8
    0xff, 0xc8, // dec eax
    0x75, 0xe7, // jnz next
    0xe7, 0x10, // out PORT, eax
    0xeb, 0xd7, // jmp again; steps:
];
const INSTRUCTIONS_PER_ITERATION: u64 = 9;
/// After the steps.
const TELL: &[u8] = &[0xe7, 0x10]; // out PORT, eax

/// A VM without interrupt controllers, at the start of its code. The order of the fields is that of
/// their end: the memory goes last.
pub(super) struct ProbeGuest {
    vcpu: VcpuFd,
    _vm: VmFd,
    memory: GuestMemory,
}

impl ProbeGuest {
    pub(super) fn new(kvm: &Kvm) -> Result<Self, EngineError> {
        let memory = memory::allocate(Bytes::mib(2), &MemoryOptions::default())
            .map_err(|error| EngineError::new("probe's memory", std::io::Error::other(error)))?;
        load(&memory)
            .map_err(|error| EngineError::new("probe's memory", std::io::Error::other(error)))?;
        let vm = kvm
            .create_vm()
            .map_err(|error| EngineError::new("KVM_CREATE_VM", error))?;
        for (slot, region) in (0..).zip(memory.iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the region is a mapping of exactly this size, and the guest keeps it alive
            // longer than VM and vCPU.
            unsafe { vm.set_user_memory_region(slot) }
                .map_err(|error| EngineError::new("KVM_SET_USER_MEMORY_REGION", error))?;
        }
        let vcpu = vm
            .create_vcpu(0)
            .map_err(|error| EngineError::new("KVM_CREATE_VCPU", error))?;
        let cpuid = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(|error| EngineError::new("KVM_GET_SUPPORTED_CPUID", error))?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(|error| EngineError::new("KVM_SET_CPUID2", error))?;
        set_registers(&vcpu)?;
        Ok(Self {
            vcpu,
            _vm: vm,
            memory,
        })
    }

    /// Executes the loop `iterations` times and says how many instructions that was.
    pub(super) fn run_loop(&mut self, iterations: u32) -> Result<u64, ProbeError> {
        self.run(iterations)?;
        Ok(u64::from(iterations) * INSTRUCTIONS_PER_ITERATION)
    }

    /// Executes the steps; the guest has no further use then.
    pub(super) fn run_steps(mut self) -> Result<(), ProbeError> {
        self.run(0)
    }

    /// Runs until the guest tells, answering its question with `iterations`.
    fn run(&mut self, iterations: u32) -> Result<(), ProbeError> {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoIn(PORT, data)) => data.copy_from_slice(&iterations.to_le_bytes()),
                Ok(VcpuExit::IoOut(PORT, _)) => return Ok(()),
                Ok(VcpuExit::Shutdown) => return Err(self.fault("it faults")),
                Ok(VcpuExit::InternalError) => return Err(self.fault("KVM cannot emulate it")),
                Ok(exit) => {
                    let exit = format!("{exit:?}");
                    return Err(self.fault(&exit));
                }
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(EngineError::new("KVM_RUN", error).into()),
            }
        }
    }

    fn fault(&self, reason: &str) -> ProbeError {
        ProbeError::Fault {
            instruction: self.instruction(),
            reason: reason.to_owned(),
        }
    }

    /// The step that the guest is at.
    fn instruction(&self) -> &'static str {
        let begun: u32 = self
            .memory
            .read_obj(GuestAddress(STEP_COUNTER))
            .unwrap_or(0);
        (begun as usize)
            .checked_sub(1)
            .and_then(|index| STEPS.get(index))
            .map_or("ordinary code", |(name, _)| name)
    }
}

/// Writes code and tables.
fn load(memory: &GuestMemory) -> Result<(), vm_memory::GuestMemoryError> {
    let steps = STEPS.iter().flat_map(|(_, code)| [COUNT_STEP, code]);
    let code: Vec<&[u8]> = [LOOP].into_iter().chain(steps).chain([TELL]).collect();
    let code = code.concat();
    memory.write_slice(&code, GuestAddress(CODE))?;
    // Present and writable; the directory's entry is one page of 2 MiB.
    memory.write_obj(PDPT | 3, GuestAddress(PML4))?;
    memory.write_obj(PAGE_DIRECTORY | 3, GuestAddress(PDPT))?;
    memory.write_obj(0x83_u64, GuestAddress(PAGE_DIRECTORY))?;
    // Flat 64-bit code and flat data, accessed.
    memory.write_obj(0x00af_9b00_0000_ffff_u64, GuestAddress(GDT + 8))?;
    memory.write_obj(0x00cf_9300_0000_ffff_u64, GuestAddress(GDT + 16))?;
    memory.write_obj(0x17_u16, GuestAddress(GDT_POINTER))?;
    memory.write_obj(GDT, GuestAddress(GDT_POINTER + 2))
}

/// Long mode, at the loop.
fn set_registers(vcpu: &VcpuFd) -> Result<(), EngineError> {
    let mut sregs = vcpu
        .get_sregs()
        .map_err(|error| EngineError::new("KVM_GET_SREGS", error))?;
    let data = kvm_segment {
        limit: u32::MAX,
        selector: DATA_SELECTOR,
        type_: 3,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: CODE_SELECTOR,
        type_: 0xb,
        db: 0,
        l: 1,
        ..data
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 0x17;
    sregs.cr0 = 1 << 31 | 1 << 4 | 1; // PG, ET, PE
    sregs.cr3 = PML4;
    sregs.cr4 = 1 << 9 | 1 << 5; // OSFXSR, PAE
    sregs.efer = 1 << 10 | 1 << 8; // LMA, LME
    vcpu.set_sregs(&sregs)
        .map_err(|error| EngineError::new("KVM_SET_SREGS", error))?;
    let mut regs = vcpu
        .get_regs()
        .map_err(|error| EngineError::new("KVM_GET_REGS", error))?;
    regs.rip = CODE;
    regs.rsp = STACK;
    regs.rdi = DATA;
    regs.rflags = 2;
    vcpu.set_regs(&regs)
        .map_err(|error| EngineError::new("KVM_SET_REGS", error))
}
