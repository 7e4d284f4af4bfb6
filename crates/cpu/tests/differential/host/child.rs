//! Inside the child: no allocation, no locks, and once FS is the cases', no thread-local storage,
//! which is why its last system calls are made by hand.

use std::arch::asm;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use super::{IDLE, RUN, Shared};
use crate::case::{CODE, CODE_LEN, DATA, DATA_LEN, FS_BASE, GS_BASE, MAX_CODE, PAGE, RODATA};

static SHARED: AtomicPtr<Shared> = AtomicPtr::new(null_mut());
/// The data pages' bytes before a case.
static BACKGROUND: AtomicPtr<u8> = AtomicPtr::new(null_mut());
/// The code pages once more, writable.
static CODE_ALIAS: AtomicPtr<u8> = AtomicPtr::new(null_mut());
/// The case that was started last; none before the first signal.
static CURRENT: AtomicU32 = AtomicU32::new(NONE);
const NONE: u32 = u32::MAX;

const STACK: usize = 1 << 17;
const INT3: u8 = 0xcc;

/// The registers' places in a signal frame, in the encoding's order.
const REGISTERS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Becomes the host's side of the comparison.
///
/// # Safety
///
/// Only in a forked child, with the mappings that [`super::Host::start`] makes.
pub(super) unsafe fn run(shared: *mut Shared, ground: *mut u8) -> ! {
    SHARED.store(shared, Ordering::SeqCst);
    // SAFETY: the background is three pages.
    BACKGROUND.store(unsafe { ground.add(PAGE as usize) }, Ordering::SeqCst);
    // SAFETY: the process is ours alone; nothing of the parent's is used again but these mappings.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if !pages(ground) || !handlers() {
            libc::_exit(1);
        }
        libc::syscall(libc::SYS_close_range, 0u32, u32::MAX, 0u32);
        for resource in [libc::RLIMIT_CORE, libc::RLIMIT_NOFILE, libc::RLIMIT_FSIZE] {
            let none = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            libc::setrlimit(resource, &none);
        }
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        confine();
        asm!("int3");
        exit(2)
    }
}

/// Maps the pages of a case.
///
/// # Safety
///
/// `ground` is three pages.
unsafe fn pages(ground: *const u8) -> bool {
    let fixed = |at: u64, len: u64, protection, more, descriptor| {
        // SAFETY: refuses to replace what is there.
        let got = unsafe {
            libc::mmap(
                at as *mut libc::c_void,
                len as usize,
                protection,
                libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE | more,
                descriptor,
                0,
            )
        };
        got.addr() as u64 == at
    };
    const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: new mappings, filled in their sizes.
    unsafe {
        let file = libc::memfd_create(c"code".as_ptr(), 0);
        if file < 0 || libc::ftruncate(file, CODE_LEN as i64) != 0 {
            return false;
        }
        let alias = libc::mmap(
            null_mut(),
            CODE_LEN as usize,
            READ_WRITE,
            libc::MAP_SHARED,
            file,
            0,
        );
        if alias == libc::MAP_FAILED {
            return false;
        }
        alias.cast::<u8>().write_bytes(INT3, CODE_LEN as usize);
        CODE_ALIAS.store(alias.cast(), Ordering::SeqCst);
        let executable = libc::PROT_READ | libc::PROT_EXEC;
        if !fixed(CODE, CODE_LEN, executable, libc::MAP_SHARED, file)
            || !fixed(RODATA, PAGE + DATA_LEN as u64, READ_WRITE, anonymous, -1)
        {
            return false;
        }
        std::ptr::copy_nonoverlapping(ground, RODATA as *mut u8, PAGE as usize + DATA_LEN);
        libc::mprotect(RODATA as *mut libc::c_void, PAGE as usize, libc::PROT_READ) == 0
    }
}

fn handlers() -> bool {
    let stack = super::memory::map_shared(STACK);
    let stack = libc::stack_t {
        ss_sp: stack.cast(),
        ss_flags: 0,
        ss_size: STACK,
    };
    // SAFETY: plain structures for the kernel; the handler is what SA_SIGINFO wants.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::ucontext_t) = on_signal;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigfillset(&mut action.sa_mask);
        libc::sigaltstack(&stack, null_mut()) == 0
            && [
                libc::SIGTRAP,
                libc::SIGSEGV,
                libc::SIGILL,
                libc::SIGFPE,
                libc::SIGBUS,
            ]
            .iter()
            .all(|&signal| libc::sigaction(signal, &action, null_mut()) == 0)
    }
}

/// The last steps: FS and GS are the cases', and the kernel takes no more orders.
///
/// # Safety
///
/// The caller does not use thread-local storage afterwards.
unsafe fn confine() {
    const ARCH_SET_GS: u64 = 0x1001;
    const ARCH_SET_FS: u64 = 0x1002;
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let filter = [
        op(LOAD, 0, 0, 4),
        op(EQUAL, 0, 5, AUDIT_ARCH_X86_64),
        op(LOAD, 0, 0, 0),
        op(EQUAL, 4, 0, libc::SYS_rt_sigreturn as u32),
        op(EQUAL, 3, 0, libc::SYS_futex as u32),
        op(EQUAL, 2, 0, libc::SYS_exit as u32),
        op(EQUAL, 1, 0, libc::SYS_exit_group as u32),
        op(RETURN, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
        op(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: arguments as the manual pages have them.
    unsafe {
        call(libc::SYS_arch_prctl, [ARCH_SET_GS, GS_BASE, 0, 0]);
        call(libc::SYS_arch_prctl, [ARCH_SET_FS, FS_BASE, 0, 0]);
        let mode = libc::SECCOMP_SET_MODE_FILTER.into();
        if call(libc::SYS_seccomp, [mode, 0, (&raw const program) as u64, 0]) != 0 {
            exit(3);
        }
    }
}

/// # Safety
///
/// The system call's own.
unsafe fn call(number: libc::c_long, arguments: [u64; 4]) -> i64 {
    let mut result = number;
    // SAFETY: the caller's; the kernel clobbers RCX and R11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") arguments[0],
            in("rsi") arguments[1],
            in("rdx") arguments[2],
            in("r10") arguments[3],
            out("rcx") _,
            out("r11") _,
        );
    }
    result
}

fn exit(status: u64) -> ! {
    loop {
        // SAFETY: does not return.
        unsafe { call(libc::SYS_exit_group, [status, 0, 0, 0]) };
    }
}

extern "C" fn on_signal(_: i32, _: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    let shared = SHARED.load(Ordering::Relaxed);
    let current = CURRENT.load(Ordering::Relaxed);
    // SAFETY: the kernel's frame, and memory that is this process's until it says IDLE.
    unsafe {
        let next = if current == NONE {
            next_batch(shared)
        } else {
            store(&mut *context, shared, current as usize);
            if current + 1 < (*shared).count.load(Ordering::SeqCst) {
                current + 1
            } else {
                next_batch(shared)
            }
        };
        CURRENT.store(next, Ordering::Relaxed);
        (*shared).at.store(next, Ordering::Relaxed);
        load(&mut *context, shared, next as usize);
    }
}

/// # Safety
///
/// `shared` is mapped.
unsafe fn next_batch(shared: *mut Shared) -> u32 {
    // SAFETY: an atomic, and a futex on it.
    unsafe {
        let state = &(*shared).state;
        let word = state.as_ptr() as u64;
        state.store(IDLE, Ordering::SeqCst);
        call(libc::SYS_futex, [word, libc::FUTEX_WAKE as u64, 1, 0]);
        while state.load(Ordering::SeqCst) != RUN {
            call(
                libc::SYS_futex,
                [word, libc::FUTEX_WAIT as u64, IDLE.into(), 0],
            );
        }
    }
    0
}

/// Stores the outcome of case `index`, and removes its code.
///
/// # Safety
///
/// As in [`on_signal`].
unsafe fn store(context: &mut libc::ucontext_t, shared: *mut Shared, index: usize) {
    // SAFETY: the caller's; an FXSAVE image is 512 bytes.
    unsafe {
        let outcome = &mut (*shared).outcomes[index];
        let machine = &context.uc_mcontext;
        for (value, place) in outcome.registers.iter_mut().zip(REGISTERS) {
            *value = machine.gregs[place as usize] as u64;
        }
        outcome.rip = machine.gregs[libc::REG_RIP as usize] as u64;
        outcome.rflags = machine.gregs[libc::REG_EFL as usize] as u64;
        outcome.trap = machine.gregs[libc::REG_TRAPNO as usize] as u64;
        outcome.error = machine.gregs[libc::REG_ERR as usize] as u64;
        outcome.address = machine.gregs[libc::REG_CR2 as usize] as u64;
        let fx = (&raw mut outcome.fx).cast::<u8>();
        std::ptr::copy_nonoverlapping(machine.fpregs.cast::<u8>(), fx, 512);
        std::ptr::copy_nonoverlapping(DATA as *const u8, outcome.memory.as_mut_ptr(), DATA_LEN);
        let code = CODE_ALIAS.load(Ordering::Relaxed);
        let offset = ((*shared).cases[index].rip.wrapping_sub(CODE)).min(CODE_LEN) as usize;
        let len = (CODE_LEN as usize - offset).min(MAX_CODE);
        code.add(offset).write_bytes(INT3, len);
    }
}

/// Makes the signal return into case `index`.
///
/// # Safety
///
/// As in [`on_signal`].
unsafe fn load(context: &mut libc::ucontext_t, shared: *mut Shared, index: usize) {
    /// Where the kernel says that the frame is an XSAVE area, and how.
    const MAGIC_AT: usize = 464;
    const MAGIC: u32 = 0x4650_5853;
    /// XSTATE_BV: a component whose bit is clear is taken as initial.
    const PRESENT_AT: usize = 512;
    const KERNELS: core::ops::Range<usize> = MAGIC_AT..512;
    // SAFETY: the caller's; offsets inside the areas they name.
    unsafe {
        let case = &(*shared).cases[index];
        let data = DATA as *mut u8;
        std::ptr::copy_nonoverlapping(BACKGROUND.load(Ordering::Relaxed), data, DATA_LEN);
        for patch in case.patches() {
            let (offset, len) = (patch.offset as usize, patch.len as usize);
            std::ptr::copy_nonoverlapping(patch.bytes.as_ptr(), data.add(offset), len);
        }
        let code = CODE_ALIAS.load(Ordering::Relaxed);
        let offset = (case.rip.wrapping_sub(CODE)).min(CODE_LEN) as usize;
        let len = (CODE_LEN as usize - offset).min(case.code().len());
        std::ptr::copy_nonoverlapping(case.code.as_ptr(), code.add(offset), len);
        let machine = &mut context.uc_mcontext;
        for (value, place) in case.registers.iter().zip(REGISTERS) {
            machine.gregs[place as usize] = *value as i64;
        }
        machine.gregs[libc::REG_RIP as usize] = case.rip as i64;
        machine.gregs[libc::REG_EFL as usize] = case.rflags as i64;
        let area = machine.fpregs.cast::<u8>();
        let fx = (&raw const case.fx).cast::<u8>();
        std::ptr::copy_nonoverlapping(fx, area, KERNELS.start);
        if area.add(MAGIC_AT).cast::<u32>().read_unaligned() == MAGIC {
            let present = area.add(PRESENT_AT).cast::<u64>();
            present.write_unaligned(present.read_unaligned() | 3);
        }
    }
}
