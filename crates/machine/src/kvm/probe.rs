//! Is this `/dev/kvm` fit to run a guest?
//!
//! A `/dev/kvm` may be absent, forbidden or old, and it may be worse: some nested hosts run the
//! guest's user mode on the processor but emulate its kernel mode instruction by instruction, a
//! hundred times slower than an engine in software and with instructions missing. So the probe runs
//! guest code in ring 0: first a loop of ordinary instructions against the clock, then each of those
//! that kernels cannot do without. On hardware that takes less than a millisecond; a host that
//! has not proved itself after [`TIME_LIMIT`] is refused.

mod guest;

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use kvm_ioctls::Kvm;

use super::{from_descriptor, supported_cpuid};
use crate::cpu_profile::CpuProfile;
use crate::engine::EngineError;
use guest::ProbeGuest;

const DEVICE: &str = "/dev/kvm";

/// The least speed of ring 0, in million instructions per second. Hardware does thousands, QEMU's
/// emulation of a processor with SVM a hundred or more, KVM's instruction emulator one.
pub const LEAST_MIPS: u64 = 20;
/// Beyond this speed there is nothing more to learn.
const PLENTY_MIPS: u64 = 10 * LEAST_MIPS;
/// How long a host is given to show [`PLENTY_MIPS`].
const TIME_LIMIT: Duration = Duration::from_millis(25);
/// And how often, at the least: on a busy host most measurements are disturbed.
const LEAST_ROUNDS: u32 = 8;
/// The shortest measurement that counts: below it, entering and leaving the guest dominates.
const LEAST_MEASURED: Duration = Duration::from_micros(100);
/// Iterations of the loop in the first measurement, and by how much the next is longer.
const FIRST_ITERATIONS: u32 = 500;
const GROWTH: u32 = 8;

/// Numbers with their names.
macro_rules! capabilities {
    ($($name:ident),* $(,)?) => { [$((kvm_bindings::$name, stringify!($name))),*] };
}

/// What the engine cannot do without (`Documentation/virt/kvm/api.rst`).
const CAPABILITIES: [(u32, &str); 15] = capabilities![
    KVM_CAP_USER_MEMORY,
    KVM_CAP_SET_TSS_ADDR,
    KVM_CAP_SET_IDENTITY_MAP_ADDR,
    KVM_CAP_IRQCHIP,
    KVM_CAP_IRQ_ROUTING,
    KVM_CAP_IRQFD,
    KVM_CAP_IOEVENTFD,
    KVM_CAP_IOEVENTFD_ANY_LENGTH,
    KVM_CAP_PIT_STATE2,
    KVM_CAP_ADJUST_CLOCK,
    KVM_CAP_MP_STATE,
    KVM_CAP_VCPU_EVENTS,
    KVM_CAP_DEBUGREGS,
    KVM_CAP_XCRS,
    KVM_CAP_IMMEDIATE_EXIT,
];

/// A host that passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeReport {
    /// Speed of the guest's ring 0, in million instructions per second. Measured no longer than it
    /// takes to be sure, so a lower bound on fast hosts.
    pub mips: u64,
    /// How long the probe took.
    pub elapsed: Duration,
    /// The CPU profiles that the host can give.
    pub profiles: Vec<CpuProfile>,
}

/// Why KVM is not used on a host.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// There is no such device.
    #[error(
        "there is no {DEVICE}: the kernel module kvm_intel or kvm_amd is not loaded, or \
         virtualization is off in the firmware or not offered to this virtual machine"
    )]
    Absent,
    /// The device is closed to this user.
    #[error(
        "no permission to open {DEVICE}: it belongs to group '{group}'; add your user with \
         `usermod -aG {group} USER` and log in again"
    )]
    Permission {
        /// The device's group.
        group: String,
    },
    /// Another failure at opening.
    #[error("cannot open {DEVICE}: {0}")]
    Open(io::Error),
    /// It is not KVM, or not its stable interface.
    #[error("{DEVICE} speaks version {0} of KVM's interface, Mica version 12")]
    Version(i32),
    /// A kernel too old, or built without.
    #[error("the kernel's KVM lacks {}", missing.join(", "))]
    Capabilities {
        /// Their names.
        missing: Vec<&'static str>,
    },
    /// An instruction does not work in ring 0.
    #[error("{DEVICE} does not run a kernel: {instruction} fails in ring 0 ({reason})")]
    Fault {
        /// The instruction's name.
        instruction: &'static str,
        /// What KVM said instead of executing it.
        reason: String,
    },
    /// Ring 0 is emulated.
    #[error(
        "{DEVICE} runs ring 0 at {mips}.{tenths} million instructions per second, the least is \
         {LEAST_MIPS}: the host emulates it",
        mips = kips / 1000,
        tenths = kips % 1000 / 100
    )]
    TooSlow {
        /// Thousand instructions per second.
        kips: u64,
    },
    /// KVM refuses to make or run the probe's guest.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Opens `/dev/kvm`.
///
/// # Errors
///
/// [`ProbeError::Absent`], [`ProbeError::Permission`] or [`ProbeError::Open`].
pub fn open() -> Result<OwnedFd, ProbeError> {
    let opened = OpenOptions::new().read(true).write(true).open(DEVICE);
    opened
        .map(OwnedFd::from)
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => ProbeError::Absent,
            io::ErrorKind::PermissionDenied => ProbeError::Permission {
                group: device_group(),
            },
            // The node is there, the module behind it is not.
            _ if error.raw_os_error() == Some(libc::ENXIO)
                || error.raw_os_error() == Some(libc::ENODEV) =>
            {
                ProbeError::Absent
            }
            _ => ProbeError::Open(error),
        })
}

/// The name of the group that may open the device.
fn device_group() -> String {
    let Ok(metadata) = std::fs::metadata(DEVICE) else {
        return "kvm".to_owned();
    };
    let gid = metadata.gid().to_string();
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    // NAME:PASSWORD:GID:MEMBERS
    groups
        .lines()
        .find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)? == gid).then(|| name.to_owned())
        })
        .unwrap_or(gid)
}

/// Runs guest code on `kvm`, a descriptor of `/dev/kvm`, and measures it.
///
/// # Errors
///
/// The reason not to use it; see [`ProbeError`].
pub fn probe(kvm: impl AsFd) -> Result<ProbeReport, ProbeError> {
    let start = Instant::now();
    let descriptor = kvm.as_fd().try_clone_to_owned().map_err(ProbeError::Open)?;
    let kvm = from_descriptor(descriptor);
    check_interface(&kvm)?;
    let mut guest = ProbeGuest::new(&kvm)?;
    let kips = measure(&mut guest)?;
    if kips < LEAST_MIPS * 1000 {
        return Err(ProbeError::TooSlow { kips });
    }
    guest.run_steps()?;
    let supported = supported_cpuid(&kvm)?;
    let given = |profile: &CpuProfile| profile.resolve(&supported, 1).is_ok();
    Ok(ProbeReport {
        mips: kips / 1000,
        elapsed: start.elapsed(),
        profiles: CpuProfile::ALL.into_iter().filter(given).collect(),
    })
}

fn check_interface(kvm: &Kvm) -> Result<(), ProbeError> {
    let version = kvm.get_api_version();
    if version != 12 {
        return Err(ProbeError::Version(version));
    }
    let missing: Vec<_> = CAPABILITIES
        .into_iter()
        .filter(|(capability, _)| kvm.check_extension_raw((*capability).into()) <= 0)
        .map(|(_, name)| name)
        .collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(ProbeError::Capabilities { missing })
    }
}

/// The best speed seen, in thousand instructions per second.
fn measure(guest: &mut ProbeGuest) -> Result<u64, ProbeError> {
    // Brings in the guest's pages and, on a host that translates, its code.
    guest.run_loop(1)?;
    let start = Instant::now();
    let mut best = 0;
    let mut iterations = FIRST_ITERATIONS;
    let mut rounds = 0;
    while rounds < LEAST_ROUNDS || start.elapsed() < TIME_LIMIT {
        rounds += 1;
        let begin = Instant::now();
        let instructions = guest.run_loop(iterations)?;
        let elapsed = begin.elapsed();
        let nanoseconds = u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX).max(1);
        best = best.max(instructions * 1_000_000 / nanoseconds);
        if elapsed >= LEAST_MEASURED && best >= PLENTY_MIPS * 1000 {
            break;
        }
        // Where there is no time for a longer measurement, another of the same length may be the
        // one that nothing disturbs.
        if start.elapsed() + elapsed * GROWTH < TIME_LIMIT {
            iterations = iterations.saturating_mul(GROWTH);
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn something_else_is_not_kvm() {
        let null = File::open("/dev/null").unwrap();
        let error = probe(&null).unwrap_err();
        assert!(matches!(error, ProbeError::Version(_)), "{error}");
    }

    #[test]
    fn the_figure_is_readable() {
        let error = ProbeError::TooSlow { kips: 1_234 };
        assert!(error.to_string().contains("at 1.2 million"), "{error}");
    }

    #[test]
    fn this_host_is_judged_quickly() {
        let Ok(kvm) = open() else {
            println!("skipped: no usable /dev/kvm");
            return;
        };
        let start = Instant::now();
        let result = probe(&kvm);
        println!("{result:?} after {:?}", start.elapsed());
        // Generous for a loaded machine: the budget itself is TIME_LIMIT.
        assert!(start.elapsed() < Duration::from_secs(5));
        match result {
            Ok(report) => {
                assert!(report.mips >= LEAST_MIPS);
                assert!(report.profiles.contains(&CpuProfile::Host));
            }
            Err(error) => assert!(
                matches!(error, ProbeError::TooSlow { .. } | ProbeError::Fault { .. }),
                "{error}"
            ),
        }
    }
}
