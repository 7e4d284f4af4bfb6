//! The probe's verdict on this host.

use mica_machine::cpu_profile::CpuProfile;
use mica_machine::kvm;

/// Whether the processor itself has hardware virtualization, as opposed to a `/dev/kvm` that does
/// without.
pub(crate) fn has_hardware_virtualization() -> bool {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let flags = text.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|flags| {
        flags
            .split_whitespace()
            .any(|flag| flag == "vmx" || flag == "svm")
    })
}

#[test]
fn a_host_with_hardware_virtualization_is_accepted_and_another_refused() {
    let descriptor = match kvm::open() {
        Ok(descriptor) => descriptor,
        Err(error) => {
            println!("skipped: {error}");
            return;
        }
    };
    let verdict = kvm::probe(&descriptor);
    println!("{verdict:?}");
    if has_hardware_virtualization() {
        let report = verdict.unwrap();
        assert!(report.mips >= kvm::LEAST_MIPS);
        assert!(report.profiles.contains(&CpuProfile::X86_64V2));
        return;
    }
    let error = verdict.unwrap_err();
    assert!(
        error.to_string().contains("instructions per second"),
        "{error}"
    );
}
