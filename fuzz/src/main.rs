//! All fuzz targets in one program, so that they are built once.
//!
//! The environment variable `MICA_FUZZ_TARGET` chooses one; `list` prints their names. Started by
//! `cargo xtask fuzz`.
#![no_main]

use std::process;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use mica_machine::{boot, engine, legacy, pci, recording, virtio, vmm};

type Target = fn(&[u8]);

/// Every `fuzz_*` function of the crates; `cargo xtask tidy` holds it complete.
const TARGETS: &[(&str, Target)] = &[
    ("partitions", boot::disk::fuzz::fuzz_partitions),
    ("fat", boot::disk::fuzz::fuzz_fat),
    ("ext4", boot::disk::fuzz::fuzz_ext4),
    ("grub", boot::disk::fuzz::fuzz_grub),
    ("bls", boot::disk::fuzz::fuzz_bls),
    ("kernel", boot::fuzz::fuzz_kernel),
    ("machine-state", engine::state::fuzz::fuzz_machine_state),
    ("recording", recording::fuzz::fuzz_recording),
    ("legacy", legacy::fuzz::fuzz_legacy),
    ("pci", pci::fuzz::fuzz_pci),
    ("virtqueue", virtio::fuzz::fuzz_virtqueue),
    ("vsock", virtio::vsock::fuzz::fuzz_vsock),
    (
        "vhost-user-backend",
        virtio::vhost_user::fuzz::fuzz_vhost_user_backend,
    ),
    (
        "net-control",
        virtio::vhost_user::fuzz::fuzz_vhost_user_net_control,
    ),
    ("control", vmm::control::fuzz_control),
    ("cpu-instructions", mica_cpu::fuzz::fuzz_cpu_instructions),
    ("cpu-tables", mica_cpu::fuzz::fuzz_cpu_tables),
    ("block-requests", mica_storage::fuzz::fuzz_block_requests),
];

static TARGET: OnceLock<Target> = OnceLock::new();

fn choose() -> Target {
    let name = std::env::var("MICA_FUZZ_TARGET").unwrap_or_default();
    if let Some((_, target)) = TARGETS.iter().find(|(known, _)| *known == name) {
        return *target;
    }
    for (known, _) in TARGETS {
        println!("{known}");
    }
    if name != "list" {
        eprintln!("MICA_FUZZ_TARGET is {name:?}; it must be one of the above");
    }
    process::exit(i32::from(name != "list"));
}

fuzz_target!(
    init: {
        TARGET.get_or_init(choose);
    },
    |data: &[u8]| TARGET.get_or_init(choose)(data)
);
