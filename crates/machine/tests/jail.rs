//! What a jailed process can no longer do, tried in a real one: this test binary starts itself again,
//! jails the child, and looks at how the child ends.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

use mica_machine::vmm::jail::{self, Enforcement};

/// Names the deed that the child shall try; unset in the parent.
const DEED: &str = "MICA_TEST_JAIL_DEED";

/// What a child says that has come through alive.
const SURVIVED: &str = "survived";

/// Runs `deed` in a jailed child.
fn jailed(deed: &str) -> Output {
    Command::new(std::env::current_exe().expect("a running program has a path"))
        .args(["--exact", "child", "--nocapture", "--test-threads=1"])
        .env(DEED, deed)
        .output()
        .expect("the test binary starts again")
}

/// The child's side; a test that does nothing when it is run as one.
#[test]
fn child() {
    let Ok(deed) = std::env::var(DEED) else {
        return;
    };
    if deed == "open without seccomp" {
        // Landlock alone: the call is allowed and refused.
        let enforcement = jail::close_doors().unwrap();
        let opened = std::fs::File::open("/etc/passwd").is_ok();
        println!("{SURVIVED} {} {opened}", enforcement.as_str());
        return;
    }
    // A thread from before the jail is inside it too.
    let (start, wait) = std::sync::mpsc::channel::<()>();
    let (started, wait_started) = std::sync::mpsc::channel::<()>();
    let thread_deed = deed.clone();
    let thread = std::thread::spawn(move || {
        started.send(()).unwrap();
        wait.recv().unwrap();
        if thread_deed == "open on another thread" {
            let _ = std::fs::File::open("/etc/passwd");
        }
    });
    wait_started.recv().unwrap();
    jail::close_doors().unwrap();
    let left = jail::drop_system_calls(&[]).unwrap();
    start.send(()).unwrap();
    thread.join().unwrap();
    match deed.as_str() {
        "nothing" => {
            // What a VM process does all day still works.
            let memory = vec![1u8; 8 << 20];
            let event = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
            event.write(u64::from(memory[4096])).unwrap();
            assert_eq!(event.read().unwrap(), 1);
            assert!(left < 70, "{left} system calls are left");
        }
        "open" => drop(std::fs::File::open("/etc/passwd")),
        "socket" => drop(std::net::UdpSocket::bind("127.0.0.1:0")),
        "execute" => drop(Command::new("/bin/true").status()),
        "ioctl" => drop(rustix::termios::tcgetwinsize(rustix::stdio::stdout())),
        "signal" => {
            let parent = rustix::process::getppid().unwrap();
            let _ = rustix::process::kill_process(parent, rustix::process::Signal::CONT);
        }
        _ => {}
    }
    println!("{SURVIVED}");
}

#[test]
fn ordinary_work_goes_on() {
    let output = jailed("nothing");
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains(SURVIVED));
}

#[test]
fn forbidden_deeds_kill_the_process() {
    for deed in [
        "open",
        "open on another thread",
        "socket",
        "execute",
        "ioctl",
        "signal",
    ] {
        let output = jailed(deed);
        assert_eq!(
            output.status.signal(),
            Some(libc::SIGSYS),
            "{deed}: {output:?}"
        );
        assert!(
            !String::from_utf8_lossy(&output.stdout).contains(SURVIVED),
            "{deed}"
        );
    }
}

#[test]
fn landlock_alone_closes_the_file_system() {
    let output = jailed("open without seccomp");
    let text = String::from_utf8_lossy(&output.stdout);
    if text.contains(Enforcement::None.as_str()) {
        println!("skipped: this kernel has no Landlock");
        return;
    }
    assert!(
        text.contains(&format!("{SURVIVED} {} false", Enforcement::Full.as_str()))
            || text.contains(&format!(
                "{SURVIVED} {} false",
                Enforcement::Partial.as_str()
            )),
        "{text}"
    );
}
