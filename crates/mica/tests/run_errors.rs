//! What `mica run` and `mica vm` say on this machine, whatever its KVM is worth.

#![allow(clippy::unwrap_used)] // a failed unwrap is the test's failure

use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Runs mica with directories of its own.
fn mica(home: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mica"))
        .args(arguments)
        .env("MICA_HOME", home)
        .env("MICA_RUNTIME_DIR", home.join("runtime"))
        .current_dir(home)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn wrong_usage_is_told_from_failure() {
    let home = tempfile::tempdir().unwrap();
    for (arguments, status, says) in [
        (&["run"][..], 2, "required"),
        (
            &["run", "tiny", "-m", "5x"],
            2,
            "the units are K, M, G and T",
        ),
        (&["run", "tiny", "-c", "0"], 2, "1..=254"),
        (&["run", "tiny", "-c", "255"], 2, "1..=254"),
        (&["run", "tiny", "--vsock", "2"], 2, "--vsock"),
        (
            &["run", "tiny", "--disk", ",ro"],
            2,
            "a disk needs a file's path",
        ),
        (&["run", "tiny", "--net", "tap0"], 2, "vhost-user:SOCKET"),
        (&["run", "tiny", "--cpu-profile", "z80"], 2, "x86-64-v2"),
        (&["run", "--initrd", "initrd"], 2, "--kernel"),
        (
            &["run", "tiny"],
            1,
            "there is no image and no file called 'tiny'",
        ),
        (&["run", "./none.img"], 1, "no file called './none.img'"),
        (&["run", "..", "--kernel", "k"], 1, "not both"),
        (&["vm", "state", "tiny"], 1, "no VM answers at"),
        (&["vm", "fly", "tiny"], 2, "unrecognized subcommand"),
    ] {
        let output = mica(home.path(), arguments);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            output.status.code(),
            Some(status),
            "{arguments:?}: {message}"
        );
        assert!(message.contains(says), "{arguments:?}: {message}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
    }
    let list = mica(home.path(), &["-o", "json", "vm", "list"]);
    assert!(list.status.success());
    assert_eq!(list.stdout, b"[]\n");
}

/// A KVM that is not fit is refused with what was measured; a fit one gets as far as the kernel.
#[test]
fn kvm_is_used_if_it_is_fit() {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("kernel"), "no kernel").unwrap();
    let output = mica(home.path(), &["run", "--kernel", "kernel"]);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{message}");
    let refused = message.contains("no engine can run a guest on this host: ")
        && (message.contains("million instructions per second") || message.contains("/dev/kvm"));
    let ran = message.contains("kernel: the kernel is neither a bzImage nor an x86-64 ELF file");
    assert!(refused != ran, "{message}");
    // Nothing stays behind, unless it is the verdict on a fit KVM.
    let left = std::fs::read_dir(home.path().join("runtime")).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name == "kvm-probe.json"), "{left:?}");
}
