//! What a VM process gives up before its guest's first instruction.
//!
//! The process enters the jail in two steps, because threads inherit one part and share the other:
//!
//! 1. [`close_doors`], while there is one thread: no new privileges, and a Landlock rule set without
//!    a single rule, so no path can be opened, no TCP port bound or connected, no process outside
//!    signalled. Threads started later inherit it.
//! 2. [`drop_system_calls`], when every thread exists: a seccomp filter on all of them that leaves
//!    what running a guest takes. No `open`, no `socket`, no `execve`, no `fork`, no executable
//!    mapping; `ioctl` only with the requests the engine names. Anything else kills the process.
//!
//! A kernel, an initial RAM disk and a boot disk are read inside the jail: their bytes are the
//! guest's, and a parser's fault must gain nothing. What the guest's own user account adds (a
//! supervisor started as root gives each VM a user identifier of its own) happens at `execve`, in
//! the supervisor.

use std::collections::BTreeMap;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus,
    Scope,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Why a process could not be jailed. It must not run a guest then.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The kernel refuses the no-new-privileges bit.
    #[error("cannot give up new privileges: {0}")]
    NoNewPrivileges(#[source] std::io::Error),
    /// The kernel has Landlock but refuses the rule set.
    #[error("cannot enforce Landlock: {0}")]
    Landlock(#[from] landlock::RulesetError),
    /// The filter cannot be made or installed.
    #[error("cannot install the seccomp filter: {0}")]
    Seccomp(String),
}

/// How much of the Landlock rule set the running kernel enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enforcement {
    /// All of it.
    Full,
    /// What this kernel's Landlock version knows.
    Partial,
    /// Nothing: the kernel has no Landlock, or it is switched off.
    None,
}

impl Enforcement {
    /// The word that events use.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Partial => "partial",
            Self::None => "none",
        }
    }
}

/// Closes the file system, the network and new privileges for this thread and those it starts.
///
/// # Errors
///
/// See [`JailError`]. A kernel without Landlock is no error but [`Enforcement::None`].
pub fn close_doors() -> Result<Enforcement, JailError> {
    rustix::thread::set_no_new_privs(true)
        .map_err(|errno| JailError::NoNewPrivileges(errno.into()))?;
    let abi = ABI::V6;
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .restrict_self()?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => Enforcement::Full,
        RulesetStatus::PartiallyEnforced => Enforcement::Partial,
        RulesetStatus::NotEnforced => Enforcement::None,
    })
}

/// Leaves all threads of the process with what running a guest takes; `ioctls` are the requests that
/// the engine makes at run time. Returns how many system calls are left.
///
/// # Errors
///
/// See [`JailError`].
pub fn drop_system_calls(ioctls: &[u64]) -> Result<usize, JailError> {
    // rustix finds the vDSO the first time, by a call that is not allowed later.
    let _ = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let rules = rules(ioctls).map_err(seccomp)?;
    let left = rules.len();
    let filter: BpfProgram = SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )
    .map_err(seccomp)?
    .try_into()
    .map_err(seccomp)?;
    seccompiler::apply_filter_all_threads(&filter).map_err(seccomp)?;
    Ok(left)
}

fn seccomp(error: impl ToString) -> JailError {
    JailError::Seccomp(error.to_string())
}

/// Calls that are allowed whatever their arguments: they act on descriptors and memory the process
/// has already, or on nothing.
const ALLOWED: &[libc::c_long] = &[
    // Bytes in and out of open descriptors.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_statx, // std asks an open file for its length with it; Landlock keeps paths closed
    libc::SYS_close,
    libc::SYS_dup,          // an eventfd, handed to a vhost-user backend
    libc::SYS_fallocate,    // gives pages of guest memory back
    libc::SYS_memfd_create, // a vhost-user in-flight region that is restored…
    libc::SYS_ftruncate,    // …gets its size
    // Sockets that came over the channel.
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_accept4,
    libc::SYS_socketpair, // a vhost-user backend's way to call back
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    // Waiting.
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_ctl,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_futex,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    // The heap and the end of a thread.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_sched_getaffinity, // glibc sizes the heap's arenas by it
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigaction,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getrandom,
];

fn rules(ioctls: &[u64]) -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().map(|&call| (call, Vec::new())).collect();
    let any_of = |argument: u8, values: &[u64]| -> Result<Vec<SeccompRule>, _> {
        values
            .iter()
            .map(|&value| {
                SeccompRule::new(vec![SeccompCondition::new(
                    argument,
                    SeccompCmpArgLen::Dword,
                    SeccompCmpOp::Eq,
                    value,
                )?])
            })
            .collect()
    };
    let without_bits = |argument: u8, bits: u64| {
        SeccompRule::new(vec![SeccompCondition::new(
            argument,
            SeccompCmpArgLen::Dword,
            SeccompCmpOp::MaskedEq(bits),
            0,
        )?])
    };
    let executable = libc::PROT_EXEC as u64;
    rules.insert(libc::SYS_mmap, vec![without_bits(2, executable)?]);
    rules.insert(libc::SYS_mprotect, vec![without_bits(2, executable)?]);
    let fcntl = [
        libc::F_GETFL,
        libc::F_SETFL,
        libc::F_DUPFD_CLOEXEC,
        libc::F_GETFD,
        libc::F_ADD_SEALS,
        libc::F_GET_SEALS,
    ];
    rules.insert(
        libc::SYS_fcntl,
        any_of(1, &fcntl.map(|command| command as u64))?,
    );
    let general = [libc::FIONBIO];
    rules.insert(libc::SYS_ioctl, any_of(1, &[ioctls, &general].concat())?);
    // A kick: signals go to threads of this process only.
    let own_pid = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, any_of(0, &[own_pid])?);
    Ok(rules)
}
