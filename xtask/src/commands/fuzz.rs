//! `cargo xtask fuzz [NAME|all]`: libFuzzer over the targets of `fuzz/`.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use xtask::error::{self, Error, Result, output_of};
use xtask::workspace;

const CHOICE: &str = "MICA_FUZZ_TARGET";
/// What libFuzzer may hold before it calls an input a memory hog, in MiB.
const MEMORY_LIMIT_MIB: u32 = 2048;
/// How long one input may take, in seconds.
const INPUT_TIMEOUT_S: u32 = 10;

/// libFuzzer's coverage on a stable compiler: LLVM's own pass, asked for by name. In place of the
/// repository's flags, because the C++ runtime does not work in a static program.
const COVERAGE: [&str; 5] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// Options of `fuzz`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// A target, `all`, or `list`.
    #[arg(default_value = "all")]
    name: String,
    /// How long each target runs.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// libFuzzer's seed; by default a new one, which is printed.
    #[arg(long)]
    seed: Option<u32>,
    /// How many targets run at a time.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Run the target once on this file instead.
    #[arg(long, value_name = "FILE")]
    replay: Option<PathBuf>,
}

/// Fuzzes.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let program = build()?;
    let known = targets(&program)?;
    let chosen: Vec<String> = match arguments.name.as_str() {
        "list" => {
            known.iter().for_each(|name| println!("{name}"));
            return Ok(());
        }
        "all" => known,
        name if known.iter().any(|known| known == name) => vec![name.to_owned()],
        name => {
            return Err(Error::Other(format!(
                "no target {name}; there are: {}",
                known.join(" ")
            )));
        }
    };
    if let Some(file) = &arguments.replay {
        let [name] = chosen.as_slice() else {
            return Err(Error::Other("--replay needs the target's name".into()));
        };
        return error::run(Command::new(program).env(CHOICE, name).arg(file), "cargo");
    }
    let seed = arguments.seed.unwrap_or_else(fresh_seed);
    eprintln!(
        "fuzzing {} targets for {} s each, seed {seed}",
        chosen.len(),
        arguments.seconds
    );
    fuzz(&program, chosen, seed, arguments)
}

/// Runs every target for `seconds` each.
pub(crate) fn all(seconds: u64) -> Result<()> {
    run(&Arguments {
        name: "all".into(),
        seconds,
        seed: None,
        jobs: 2,
        replay: None,
    })
}

fn build() -> Result<PathBuf> {
    let directory = workspace::root().join("fuzz");
    let mut command = Command::new(env!("CARGO"));
    command
        .current_dir(&directory)
        .args(["build", "--release", "--quiet", "--locked"])
        .env("CARGO_ENCODED_RUSTFLAGS", COVERAGE.join("\x1f"))
        .env_remove("CARGO_TARGET_DIR");
    error::run(&mut command, "cargo")?;
    Ok(directory
        .join("target")
        .join(workspace::TARGET)
        .join("release/mica-fuzz"))
}

fn targets(program: &Path) -> Result<Vec<String>> {
    let listed = output_of(Command::new(program).env(CHOICE, "list"), "cargo")?;
    Ok(listed.lines().map(str::to_owned).collect())
}

fn fuzz(program: &Path, chosen: Vec<String>, seed: u32, arguments: &Arguments) -> Result<()> {
    let queue = Mutex::new(VecDeque::from(chosen));
    let failures = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..arguments.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    // A statement of its own: the lock must not be held while the target runs.
                    let next = queue
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .pop_front();
                    let Some(name) = next else { break };
                    if let Err(error) = fuzz_one(program, &name, seed, arguments.seconds) {
                        eprintln!("{error}");
                        failures
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .push(name);
                    }
                }
            });
        }
    });
    let failures = failures
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    if failures.is_empty() {
        Ok(())
    } else {
        Err(Error::Other(format!(
            "fuzzing found faults in: {}",
            failures.join(", ")
        )))
    }
}

fn fuzz_one(program: &Path, name: &str, seed: u32, seconds: u64) -> Result<()> {
    let directory = workspace::root().join("fuzz");
    let grown = directory.join("target/corpus").join(name);
    let artifacts = directory.join("artifacts");
    for wanted in [&grown, &artifacts] {
        fs::create_dir_all(wanted).map_err(Error::file("create", wanted))?;
    }
    let log_path = directory.join("target").join(format!("{name}.log"));
    let log = fs::File::create(&log_path).map_err(Error::file("create", &log_path))?;
    let mut command = Command::new(program);
    command
        .env(CHOICE, name)
        .arg(format!("-seed={seed}"))
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-timeout={INPUT_TIMEOUT_S}"))
        .arg(format!("-rss_limit_mb={MEMORY_LIMIT_MIB}"))
        .arg(format!("-artifact_prefix={}/{name}-", artifacts.display()))
        .args(["-use_value_profile=1", "-print_final_stats=1"])
        // What is found goes to the first folder; the second holds the seeds of the repository.
        .arg(&grown);
    let seeds = directory.join("corpus").join(name);
    if seeds.is_dir() {
        command.arg(&seeds);
    }
    let status = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .status()
        .map_err(Error::file("start", program))?;
    let log = fs::read(&log_path).map_err(Error::file("read", &log_path))?;
    let log = String::from_utf8_lossy(&log);
    if status.success() {
        eprintln!("  {name}: {}", summary(&log));
        return Ok(());
    }
    let from = log
        .find("panicked at")
        .or_else(|| log.find("=="))
        .unwrap_or(0);
    let shown: Vec<&str> = log[from..].lines().take(20).collect();
    let artifact = log
        .lines()
        .find_map(|line| line.split("Test unit written to ").nth(1));
    Err(Error::Other(format!(
        "  {name}: FAULT, seed {seed}; all of it in {}\n{}\n  replay: cargo xtask fuzz {name} --replay {}",
        log_path.display(),
        shown.join("\n"),
        artifact.unwrap_or("FILE"),
    )))
}

/// Runs, coverage and corpus size out of libFuzzer's last status line.
fn summary(log: &str) -> String {
    let runs = log
        .lines()
        .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))
        .map_or("?", str::trim);
    let last = log
        .lines()
        .rev()
        .find(|line| line.contains(" cov: "))
        .unwrap_or_default();
    let field = |name: &str| {
        last.split_whitespace()
            .skip_while(|word| *word != name)
            .nth(1)
            .unwrap_or("?")
    };
    format!(
        "{runs} runs, {} edges, corpus {}",
        field("cov:"),
        field("corp:")
    )
}

fn fresh_seed() -> u32 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    // libFuzzer takes zero for "choose one".
    now.subsec_nanos().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_reads_libfuzzer() {
        let log = "INFO: x\n#2\tINITED cov: 3 ft: 3 corp: 1/1b exec/s: 0 rss: 30Mb\n\
                   #99\tDONE   cov: 41 ft: 77 corp: 12/300b lim: 4 exec/s: 9 rss: 31Mb\n\
                   stat::number_of_executed_units: 99\n";
        assert_eq!(summary(log), "99 runs, 41 edges, corpus 12/300b");
        assert_eq!(summary(""), "? runs, ? edges, corpus ?");
    }
}
