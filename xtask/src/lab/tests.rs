use super::*;

/// One lab proves the channels, the status, files of both kinds, disks and KVM itself.
#[test]
fn runs_a_command_with_kvm() {
    let directory = tempfile::tempdir().unwrap();
    let small = directory.path().join("small");
    fs::write(&small, "a small file\n").unwrap();
    let folder = directory.path().join("folder");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("inner"), "in a folder\n").unwrap();
    let disk = directory.path().join("disk");
    fs::write(&disk, [b'D'; 1024]).unwrap();
    let mut session = Lab::new()
        .memory_mib(512)
        .file(&small, "/opt/some where/small")
        .file(&folder, "/opt/folder")
        .disk(&disk)
        .start(
            "read line; echo got $line; cat '/opt/some where/small' /opt/folder/inner; \
             head -c 3 /dev/vdb; echo; test -c /dev/kvm && echo to-error >&2; exit 7",
        )
        .unwrap();
    let second = Duration::from_secs(1);
    session.send("hello lab\n").unwrap();
    session.expect("got hello lab\n", 120 * second).unwrap();
    let outcome = session.finish().unwrap();
    assert_eq!(outcome.status, 7, "{}", outcome.output);
    assert_eq!(
        outcome.stdout,
        "got hello lab\na small file\nin a folder\nDDD\n"
    );
    assert_eq!(outcome.stderr, "to-error\n");
}

/// A lab that is past its deadline is killed, and the error shows what it had printed.
#[test]
fn gives_up_at_its_deadline() {
    let error = Lab::new()
        .memory_mib(512)
        .timeout(Duration::from_secs(20))
        .run("echo before; sleep 1000")
        .unwrap_err()
        .to_string();
    assert!(error.contains("KVM lab did not finish"), "{error}");
    assert!(error.contains("| before"), "{error}");
}

#[test]
fn quoting_survives_the_shell() {
    for word in ["", "plain", "two words", "it's", "$HOME `x` \"q\" \\"] {
        let script = format!("printf %s {}", quoted(word));
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert_eq!(output.stdout, word.as_bytes());
    }
}
