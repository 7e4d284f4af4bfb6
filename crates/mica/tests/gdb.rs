//! Debian's own gdb on a guest of the processor in software.

#![allow(clippy::unwrap_used)] // a failed unwrap is the test's failure

#[path = "support/console.rs"]
mod console;
#[path = "support/images.rs"]
mod images;
#[path = "support/place.rs"]
mod place;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use console::Vm;
use place::Place;

const BOOT: Duration = Duration::from_secs(240);
const STEP: Duration = Duration::from_secs(60);
const TINY: &str = "tiny# ";

/// The machine with its socket, as soon as that is there.
fn start(place: &Place, options: &str) -> Vm {
    place.add(&images::tiny());
    let vm = place.start(&format!("run tiny --engine soft --gdb gdb.sock {options}"));
    let socket = place.path().join("run/gdb.sock");
    let deadline = Instant::now() + STEP;
    while !socket.exists() {
        assert!(Instant::now() < deadline, "{}", vm.transcript());
        std::thread::sleep(Duration::from_millis(50));
    }
    vm
}

/// Runs gdb with these commands and returns what it prints.
fn gdb(place: &Place, commands: &[&str]) -> String {
    let mut command = Command::new("timeout");
    command.args(["120", "gdb", "--nx", "--batch"]);
    for line in [
        "set pagination off",
        "set confirm off",
        "set architecture i386:x86-64",
        "target remote gdb.sock",
    ]
    .iter()
    .chain(commands)
    {
        command.args(["-ex", line]);
    }
    let output = command
        .current_dir(place.path().join("run"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    text
}

/// The address of a symbol of the guest's kernel, from its own list.
fn symbol(vm: &mut Vm, name: &str) -> String {
    let line = vm.shell(TINY, &format!("grep ' {name}$' /proc/kallsyms"), STEP);
    let address = line
        .lines()
        .find_map(|line| line.strip_suffix(name)?.split_whitespace().next())
        .unwrap_or_else(|| panic!("{line}"));
    format!("0x{address}")
}

#[test]
fn a_waiting_guest_starts_when_the_debugger_says_so() {
    let place = Place::new();
    let mut vm = start(&place, "--gdb-wait");
    let text = gdb(
        &place,
        &[
            "info registers rip",
            "stepi",
            "info registers rip",
            "detach",
        ],
    );
    let addresses: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("rip")?.split_whitespace().next())
        .collect();
    let [first, second] = addresses[..] else {
        panic!("{text}");
    };
    assert_ne!(first, second, "{text}");
    vm.expect(TINY, BOOT);
    vm.send("poweroff\n");
    assert_eq!(vm.wait(STEP).code(), Some(0), "{}", vm.transcript());
}

#[test]
fn breakpoints_registers_and_memory_of_a_running_kernel() {
    let place = Place::new();
    let mut vm = start(&place, "-c 2 --append nokaslr");
    vm.expect(TINY, BOOT);
    // Every getppid comes by here; the shell calls it for $PPID at its start.
    let entry = symbol(&mut vm, "__x64_sys_getppid");
    let banner = symbol(&mut vm, "linux_banner");
    vm.send("(while :; do sh -c 'echo $PPID >/dev/null'; done) &\n");
    vm.expect(TINY, STEP);
    let text = gdb(
        &place,
        &[
            "info threads",
            &format!("break *{entry}"),
            "continue",
            "printf \"at %lx\\n\", $rip",
            &format!("x/s {banner}"),
            "x/2xb 0x10",
            "stepi",
            "printf \"then %lx\\n\", $rip",
            "set $rbx_before = $rbx",
            "set $rbx = 0x1234",
            "printf \"rbx %lx\\n\", $rbx",
            "set $rbx = $rbx_before",
            "delete",
            "detach",
        ],
    );
    let at = format!("at {}", entry.trim_start_matches("0x"));
    assert!(text.contains("Thread 1.2") && text.contains(&at), "{text}");
    assert!(text.contains("Linux version "), "{text}");
    assert!(
        text.contains("Cannot access memory at address 0x10"),
        "{text}"
    );
    assert!(
        text.contains("then ") && !text.contains(&at.replace("at", "then")),
        "{text}"
    );
    assert!(text.contains("rbx 1234"), "{text}");
    // The guest runs on, and nothing of the debugger is left in it.
    vm.send("kill %1; echo still $((6 * 7))\n");
    vm.expect("still 42", STEP);
    vm.send("poweroff\n");
    assert_eq!(vm.wait(STEP).code(), Some(0), "{}", vm.transcript());
}

/// A file that is no socket is somebody's, and stays.
#[test]
fn no_file_is_replaced_by_the_socket() {
    let place = Place::new();
    place.add(&images::tiny());
    let precious = place.path().join("run/precious");
    std::fs::write(&precious, "kept").unwrap();
    let output = place
        .command("run tiny --engine soft --gdb precious")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && text.contains("precious"),
        "{text}"
    );
    assert_eq!(std::fs::read_to_string(&precious).unwrap(), "kept");
}

/// Runs `mica` with these arguments; says whether it succeeded, and what it printed.
fn mica(place: &Place, arguments: &str) -> (bool, String) {
    let output = place.command(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

/// Waits until the machine is `running` or `paused`.
fn wait_until(place: &Place, wanted: &str) {
    let deadline = Instant::now() + STEP;
    loop {
        let (_, state) = mica(place, "-o json vm state tiny");
        if state.contains(&format!("\"{wanted}\"")) {
            return;
        }
        assert!(Instant::now() < deadline, "not {wanted}: {state}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Whoever controls the machine otherwise does not start what a debugger has stopped.
#[test]
fn a_debugger_keeps_what_it_holds() {
    let place = Place::new();
    let mut vm = start(&place, "");
    vm.expect(TINY, BOOT);
    let socket = place.path().join("run/gdb.sock");
    let debugger = UnixStream::connect(&socket).unwrap();
    wait_until(&place, "paused");
    let (resumed, text) = mica(&place, "vm resume tiny");
    assert!(!resumed && text.contains("a debugger holds"), "{text}");
    assert!(mica(&place, "vm reset tiny").0);
    wait_until(&place, "paused");
    drop(debugger);
    wait_until(&place, "running");
    vm.expect(TINY, BOOT);
    // Now it is the user's again.
    assert!(mica(&place, "vm pause tiny").0);
    wait_until(&place, "paused");
    let (resumed, text) = mica(&place, "vm resume tiny");
    assert!(resumed, "{text}");
    wait_until(&place, "running");
    vm.send("\x1dq");
    assert_eq!(vm.wait(STEP).code(), Some(3));
}

/// Bytes that are no protocol, and a debugger that vanishes, leave a running guest.
#[test]
fn a_bad_debugger_does_no_harm() {
    let place = Place::new();
    let mut vm = start(&place, "");
    vm.expect(TINY, BOOT);
    let socket: &Path = &place.path().join("run/gdb.sock");
    let garbage: Vec<u8> = (0..50_000u32)
        .map(|byte| (byte * 7 + byte / 251) as u8)
        .collect();
    for bytes in [
        &b"$m0,ffffffffffffffff#zz$g#67"[..],
        &garbage,
        b"\x03\x03$vCont;c#a8",
    ] {
        let mut stream = UnixStream::connect(socket).unwrap();
        // The other end may hang up first.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Shutdown::Write);
        stream.set_read_timeout(Some(STEP)).unwrap();
        match stream.read_to_end(&mut Vec::new()) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
        }
    }
    let text = gdb(&place, &["info registers rip", "detach"]);
    assert!(text.contains("rip "), "{text}");
    vm.send("echo still $((6 * 7))\n");
    vm.expect("still 42", STEP);
    vm.send("\x1dq");
    assert_eq!(vm.wait(STEP).code(), Some(3));
}
