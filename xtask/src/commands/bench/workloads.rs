//! `bench cpu`'s guest side: the guest's first process, which runs a fixed amount of each kind of work
//! and says on the console when it begins and ends. The host takes the time, so that nothing depends
//! on a guest's clock.

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use rustix::system::{RebootCommand, reboot};
use xtask::error::{Error, Result};

/// What the host waits for first.
const USER_SPACE: &str = "mica: user space";
/// The input of what reads a file.
const DATA: &str = "/data";
const DATA_BYTES: usize = 4 << 20;

/// A kind of work.
pub(super) struct Workload {
    pub(super) name: &'static str,
    work: fn() -> Result<()>,
}

/// All of them, in the order in which they run.
pub(super) const WORKLOADS: &[Workload] = &[
    Workload {
        name: "integer loop",
        work: integers,
    },
    Workload {
        name: "calls",
        work: calls,
    },
    Workload {
        name: "memory streaming",
        work: memory,
    },
    Workload {
        name: "floating point",
        work: floats,
    },
    Workload {
        name: "sha256",
        work: sha256,
    },
    Workload {
        name: "gzip",
        work: gzip,
    },
    Workload {
        name: "system calls",
        work: system_calls,
    },
    Workload {
        name: "context switches",
        work: context_switches,
    },
];

/// Runs everything and powers the guest off.
pub(crate) fn guest_side() -> Result<()> {
    println!("{USER_SPACE}");
    write_data()?;
    for workload in WORKLOADS {
        println!("begin {}", workload.name);
        match (workload.work)() {
            Ok(()) => println!("end {}", workload.name),
            Err(error) => println!("failed {}: {error}", workload.name),
        }
    }
    println!("all done");
    reboot(RebootCommand::PowerOff).map_err(|error| Error::Other(format!("power off: {error}")))
}

/// Text of sorts: words of a small vocabulary, which neither repeats exactly nor is noise.
fn write_data() -> Result<()> {
    const WORDS: [&str; 8] = [
        "packet", "segment", "of", "the", "virtual", "machine", "memory", "\n",
    ];
    let mut state = 1u64;
    let mut text = String::with_capacity(DATA_BYTES + 16);
    while text.len() < DATA_BYTES {
        state = step(state);
        text.push_str(WORDS[(state >> 40) as usize % WORDS.len()]);
        text.push(' ');
    }
    fs::write(DATA, text).map_err(Error::file("write", Path::new(DATA)))
}

/// One step of xorshift.
const fn step(state: u64) -> u64 {
    let state = state ^ state << 13;
    let state = state ^ state >> 7;
    state ^ state << 17
}

fn integers() -> Result<()> {
    let mut state = black_box(1u64);
    let mut sum = 0u64;
    for _ in 0..300_000_000u32 {
        state = step(state);
        sum = sum.wrapping_add(state.wrapping_mul(31));
    }
    black_box(sum);
    Ok(())
}

#[inline(never)]
fn fibonacci(n: u32) -> u64 {
    if n < 2 {
        n.into()
    } else {
        fibonacci(black_box(n - 1)) + fibonacci(black_box(n - 2))
    }
}

fn calls() -> Result<()> {
    black_box(fibonacci(black_box(36)));
    Ok(())
}

fn memory() -> Result<()> {
    let mut words = vec![1u64; 2 << 20];
    let mut sum = 0u64;
    for round in 0..10u64 {
        for word in &mut words {
            *word = word.wrapping_add(black_box(round));
        }
        sum = words
            .iter()
            .fold(sum, |sum, word| sum.wrapping_add(*black_box(word)));
    }
    black_box(sum);
    Ok(())
}

fn floats() -> Result<()> {
    let mut inside = 0u32;
    for row in 0..400u32 {
        for column in 0..400u32 {
            let (cx, cy) = (
                f64::from(column) / 160.0 - 2.0,
                f64::from(row) / 160.0 - 1.25,
            );
            let (mut x, mut y, mut count) = (0.0f64, 0.0f64, 0u32);
            while x * x + y * y < 4.0 && count < 200 {
                (x, y) = (x * x - y * y + cx, 2.0 * x * y + cy);
                count += 1;
            }
            inside += count;
        }
    }
    black_box(inside);
    Ok(())
}

fn busybox(applet: &str, arguments: &[&str]) -> Result<()> {
    let mut child = Command::new("/bin/busybox")
        .arg(applet)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(Error::io(format!("start busybox {applet}")))?;
    let mut output = Vec::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout
            .read_to_end(&mut output)
            .map_err(Error::io(format!("read from busybox {applet}")))?;
    }
    let status = child
        .wait()
        .map_err(Error::io(format!("wait for busybox {applet}")))?;
    if status.success() {
        Ok(())
    } else {
        Err(Error::Other(format!("busybox {applet}: {status}")))
    }
}

fn sha256() -> Result<()> {
    busybox("sha256sum", &[DATA; 4])
}

fn gzip() -> Result<()> {
    busybox("gzip", &["-c", DATA])
}

fn system_calls() -> Result<()> {
    for _ in 0..100_000u32 {
        black_box(rustix::process::getppid());
    }
    Ok(())
}

/// A byte goes to and fro between two threads through pipes.
fn context_switches() -> Result<()> {
    const ROUNDS: u32 = 5_000;
    let pipe = || std::io::pipe().map_err(Error::io("make a pipe"));
    let (mut there, mut from_here) = pipe()?;
    let (mut back, mut from_there) = pipe()?;
    let echo = thread::spawn(move || -> std::io::Result<()> {
        let mut byte = [0];
        for _ in 0..ROUNDS {
            there.read_exact(&mut byte)?;
            from_there.write_all(&byte)?;
        }
        Ok(())
    });
    let mut byte = [0];
    for _ in 0..ROUNDS {
        from_here
            .write_all(&byte)
            .and_then(|()| back.read_exact(&mut byte))
            .map_err(Error::io("send a byte round"))?;
    }
    match echo.join() {
        Ok(result) => result.map_err(Error::io("send a byte back")),
        Err(_) => Err(Error::Other("the echoing thread panicked".into())),
    }
}

/// Whether the file can be opened, for a clear error when the image lacks it.
pub(super) fn is_there(path: &Path) -> Result<()> {
    File::open(path)
        .map(drop)
        .map_err(Error::file("open", path))
}
