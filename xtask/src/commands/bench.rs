//! `cargo xtask bench NAME`: Mica and its peer in turn, in one run, and the ratio of their medians.
//!
//! Only ratios are compared between machines and days; the figures beside them say what one
//! machine took. Both sides run in the same lab, from the same files, alternating, after one
//! warm-up each.

mod boot;
mod cpu;
mod footprint;
mod peers;
mod process;
mod trace;
mod workloads;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use xtask::error::{Error, Result};

/// A bench's name, what it measures, its host side and its lab side.
struct Bench {
    name: &'static str,
    about: &'static str,
    run: fn(&Arguments) -> Result<Vec<Row>>,
}

const BENCHES: &[Bench] = &[
    Bench {
        name: "boot",
        about: "from exec to the first guest instruction and to the guest's user space",
        run: boot::run,
    },
    Bench {
        name: "cpu",
        about: "the processor in software at eight kinds of work",
        run: cpu::run,
    },
    Bench {
        name: "footprint",
        about: "memory of the VM process beyond that of its idle guest",
        run: footprint::run,
    },
];

/// Options of `bench`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// A bench, `all`, or `list`.
    name: String,
    /// Runs of each side.
    #[arg(long, default_value_t = 5)]
    runs: u32,
    /// How the result is printed.
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    /// A folder with `kernel`, `vmlinux` and `initrd` in place of Mica's tiny image. Its guest must
    /// print `mica: user space` from its first process.
    #[arg(long, value_name = "FOLDER")]
    guest: Option<PathBuf>,
    /// Measure the peers alone.
    #[arg(long)]
    peers_only: bool,
}

#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum Output {
    #[default]
    Text,
    Json,
}

/// Options of the part that runs inside the lab.
#[derive(clap::Args)]
pub(crate) struct LabSide {
    /// The bench.
    name: String,
    /// The plan, as JSON.
    plan: PathBuf,
}

/// One figure of the result.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Row {
    /// What was measured.
    metric: String,
    /// Whose it is.
    subject: String,
    unit: &'static str,
    median: f64,
    smallest: f64,
    largest: f64,
    samples: usize,
    /// This median by that of the fastest peer; absent for peers.
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<f64>,
    /// What the ratio should be at most.
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<f64>,
}

/// One measurement, as the lab reports it.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Sample {
    metric: String,
    subject: String,
    value: f64,
}

/// Runs what was asked for and prints it.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.name == "list" {
        BENCHES
            .iter()
            .for_each(|bench| println!("{:<10} {}", bench.name, bench.about));
        return Ok(());
    }
    let chosen: Vec<&Bench> = BENCHES
        .iter()
        .filter(|bench| arguments.name == "all" || arguments.name == bench.name)
        .collect();
    if chosen.is_empty() {
        let known: Vec<&str> = BENCHES.iter().map(|bench| bench.name).collect();
        return Err(Error::Other(format!(
            "no bench {}; there are: {}",
            arguments.name,
            known.join(" ")
        )));
    }
    for bench in chosen {
        eprintln!("bench {}: {}", bench.name, bench.about);
        let rows = (bench.run)(arguments)?;
        match arguments.output {
            Output::Text => print_text(&rows),
            Output::Json => {
                let rows = serde_json::json!({"bench": bench.name, "rows": rows});
                println!("{rows}");
            }
        }
    }
    Ok(())
}

/// All benches with their defaults.
pub(crate) fn all() -> Result<()> {
    run(&Arguments {
        name: "all".into(),
        runs: 5,
        output: Output::Text,
        guest: None,
        peers_only: false,
    })
}

pub(crate) use workloads::guest_side;

/// The part inside the lab: measures by the plan and prints one sample a line.
pub(crate) fn lab_side(arguments: &LabSide) -> Result<()> {
    let text = std::fs::read(&arguments.plan).map_err(Error::file("read", &arguments.plan))?;
    let plan = serde_json::from_slice(&text)
        .map_err(|error| Error::Other(format!("{}: {error}", arguments.plan.display())))?;
    let mut emit = |sample: Sample| match serde_json::to_string(&sample) {
        Ok(line) => println!("{line}"),
        Err(error) => eprintln!("{error}"),
    };
    match arguments.name.as_str() {
        "boot" => boot::measure(&plan, &mut emit),
        "footprint" => footprint::measure(&plan, &mut emit),
        name => Err(Error::Other(format!("no bench {name}"))),
    }
}

/// Medians by metric and subject, in the order of first appearance. A subject whose name starts
/// with `mica` is compared with the smallest median of the others.
fn summarise(
    samples: &[Sample],
    unit: &'static str,
    target: impl Fn(&str) -> Option<f64>,
) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for sample in samples {
        if rows
            .iter()
            .any(|row| row.metric == sample.metric && row.subject == sample.subject)
        {
            continue;
        }
        let mut values: Vec<f64> = samples
            .iter()
            .filter(|other| other.metric == sample.metric && other.subject == sample.subject)
            .map(|other| other.value)
            .collect();
        values.sort_by(f64::total_cmp);
        rows.push(Row {
            metric: sample.metric.clone(),
            subject: sample.subject.clone(),
            unit,
            median: median(&values),
            smallest: values[0],
            largest: values[values.len() - 1],
            samples: values.len(),
            ratio: None,
            target: None,
        });
    }
    let peers = rows.clone();
    for row in rows
        .iter_mut()
        .filter(|row| row.subject.starts_with("mica"))
    {
        let best = peers
            .iter()
            .filter(|peer| peer.metric == row.metric && !peer.subject.starts_with("mica"))
            .map(|peer| peer.median)
            .min_by(f64::total_cmp);
        row.ratio = best.map(|best| row.median / best);
        row.target = target(&row.metric);
    }
    rows
}

fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        (sorted[middle - 1] + sorted[middle]) / 2.0
    }
}

fn print_text(rows: &[Row]) {
    println!(
        "{:<28} {:<18} {:>10} {:>10} {:>10} {:>3}  {:>6}  target",
        "metric", "subject", "median", "smallest", "largest", "n", "ratio"
    );
    for row in rows {
        let optional = |value: Option<f64>| value.map_or(String::new(), |v| format!("{v:.2}"));
        println!(
            "{:<28} {:<18} {:>10.2} {:>10.2} {:>10.2} {:>3}  {:>6}  {}",
            format!("{} ({})", row.metric, row.unit),
            row.subject,
            row.median,
            row.smallest,
            row.largest,
            row.samples,
            optional(row.ratio),
            optional(row.target),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_to_the_best_peer() {
        let sample = |metric: &str, subject: &str, value: f64| Sample {
            metric: metric.into(),
            subject: subject.into(),
            value,
        };
        let samples = [
            sample("time", "mica", 3.0),
            sample("time", "slow peer", 40.0),
            sample("time", "peer", 9.0),
            sample("time", "mica", 5.0),
            sample("time", "peer", 7.0),
            sample("time", "mica", 4.0),
            sample("other", "mica", 1.0),
        ];
        let rows = summarise(&samples, "ms", |metric| (metric == "time").then_some(0.5));
        let shown: Vec<_> = rows
            .iter()
            .map(|r| (r.metric.as_str(), r.median, r.ratio, r.target))
            .collect();
        assert_eq!(
            shown,
            [
                ("time", 4.0, Some(0.5), Some(0.5)),
                ("time", 40.0, None, None),
                ("time", 8.0, None, None),
                ("other", 1.0, None, None),
            ]
        );
    }
}
