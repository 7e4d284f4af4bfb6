//! The processor in software against the one it runs on: generated instructions are executed by
//! both, and everything that the manual defines is compared.
//!
//! A run is a seed; each of its cases depends on the seed and the case's number only.
//!
//! | variable | what |
//! |---|---|
//! | `MICA_SEED` | the seed, else a fixed one |
//! | `MICA_CASES` | how many cases, else 200,000 |
//! | `MICA_CASE` | only this one |
//! | `MICA_ONLY` | only instructions whose name in iced starts so: `Add_`, `F`, `Pshufb` |

mod case;
mod cases;
mod catalogue;
mod compare;
mod engine;
mod generate;
mod host;
mod random;
mod report;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use case::{Case, DATA, DATA_LEN, Outcome, PAGE_FAULT, Planned, background};
use engine::{Engine, Way};
use generate::Generator;
use host::{BATCH, Host};

const SEED: u64 = 0x4d49_4341;
const CASES: u64 = 200_000;
/// So many kinds of difference are shown in full.
const SHOWN: usize = 12;

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    Some(parsed.unwrap_or_else(|_| panic!("{variable}={text} is not a number")))
}

/// Both sides, and what they disagreed on.
struct Comparison {
    background: Vec<u8>,
    host: Host,
    engine: Engine,
    /// How many by kind, with the first one's report.
    differences: BTreeMap<String, (u64, String)>,
    compared: u64,
}

impl Comparison {
    fn new() -> Self {
        let background = background();
        Self {
            host: Host::start(&background),
            engine: Engine::new(&background),
            background,
            differences: BTreeMap::new(),
            compared: 0,
        }
    }

    fn batch(&mut self, planned: &[Planned]) {
        let cases: Vec<&Case> = planned.iter().map(|planned| &planned.case).collect();
        let outcomes = match self.host.run(&cases) {
            Ok(outcomes) => outcomes,
            Err((at, why)) => {
                let nothing = Outcome::default();
                let text = || report::report(&planned[at], &nothing, &nothing, &why);
                self.note(&planned[at], "host", text);
                self.host = Host::start(&self.background);
                return;
            }
        };
        for (planned, host) in planned.iter().zip(&outcomes) {
            self.compared += 1;
            Way::ALL
                .into_iter()
                .for_each(|way| self.compare(planned, host, way));
        }
    }

    fn compare(&mut self, planned: &Planned, host: &Outcome, way: Way) {
        let run = AssertUnwindSafe(|| self.engine.run(&planned.case, way));
        let Ok(engine) = catch_unwind(run) else {
            let nothing = Outcome::default();
            let text = || report::report(planned, host, &nothing, "the engine panics");
            self.note(planned, &format!("{way:?} panic"), text);
            self.engine = Engine::new(&self.background);
            return;
        };
        if let Some(found) = compare::difference(planned, host, &engine) {
            let what = found.split(':').next().unwrap_or_default();
            let what = what.split_whitespace().next().unwrap_or_default();
            let text = || report::report(planned, host, &engine, &found);
            self.note(planned, &format!("{way:?} {what}"), text);
        }
    }

    fn note(&mut self, planned: &Planned, what: &str, report: impl FnOnce() -> String) {
        let codes: Vec<String> = report::disassembly(&planned.case)
            .into_iter()
            .map(|(code, _)| code)
            .collect();
        let key = format!("{} {what}", codes.join(" + "));
        self.differences
            .entry(key)
            .or_insert_with(|| (0, report()))
            .0 += 1;
    }

    fn finish(self, how: &str) {
        if self.differences.is_empty() {
            return;
        }
        let total: u64 = self.differences.values().map(|(count, _)| count).sum();
        // Single instructions first: a stream differs because one of its instructions does.
        let mut kinds: Vec<_> = self.differences.iter().collect();
        kinds.sort_by_key(|(key, (count, _))| (key.contains('+'), u64::MAX - count));
        for (key, (count, _)) in kinds.iter().take(60) {
            eprintln!("{count:>7}  {key}");
        }
        for (_, (_, report)) in kinds.iter().take(SHOWN) {
            eprintln!("{report}");
        }
        panic!(
            "{total} of {} cases differ, in {} kinds; {how}",
            self.compared,
            kinds.len()
        );
    }
}

#[test]
fn the_processor_does_what_the_hosts_does() {
    let (mut entries, missing) = catalogue::catalogue();
    if missing > 0 {
        eprintln!("{missing} instructions are left out, because this host does not have them");
    }
    if let Ok(only) = std::env::var("MICA_ONLY") {
        entries.retain(|entry| format!("{:?}", entry.code).starts_with(&only));
        assert!(!entries.is_empty(), "MICA_ONLY={only} leaves nothing");
    }
    let seed = number("MICA_SEED").unwrap_or(SEED);
    let generator = Generator { entries, seed };
    let mut comparison = Comparison::new();
    let numbers = match number("MICA_CASE") {
        Some(one) => one..one + 1,
        None => 0..number("MICA_CASES").unwrap_or(CASES),
    };
    for start in numbers.clone().step_by(BATCH) {
        let end = numbers.end.min(start + BATCH as u64);
        let planned: Vec<Planned> = (start..end).map(|index| generator.case(index)).collect();
        comparison.batch(&planned);
    }
    comparison.finish(&format!(
        "again: MICA_SEED={seed:#x} cargo test -p mica-cpu --test differential, one: MICA_CASE=n"
    ));
}

#[test]
fn named_cases_are_as_on_the_host() {
    let mut comparison = Comparison::new();
    let planned: Vec<Planned> = cases::NAMED.iter().map(cases::Named::planned).collect();
    for batch in planned.chunks(BATCH) {
        comparison.batch(batch);
    }
    comparison.finish("see cases.rs");
}

/// The host's side by itself: results that are known without a second processor.
#[test]
fn the_hosts_side_says_what_happens() {
    let planned: Vec<Planned> = cases::NAMED.iter().map(cases::Named::planned).collect();
    let cases: Vec<&Case> = planned.iter().map(|planned| &planned.case).collect();
    let outcomes = Host::start(&background())
        .run(&cases)
        .expect("the host runs");
    let of = |name: &str| {
        let at = planned.iter().position(|planned| planned.name == name);
        &outcomes[at.unwrap_or_else(|| panic!("no case {name}"))]
    };
    let end = DATA + DATA_LEN as u64;
    let add = of("add rax, rcx");
    assert_eq!(
        (add.trap, add.registers[0], add.rflags & 0x8d5),
        (3, u64::MAX >> 1, 0x805)
    );
    assert_eq!(of("div by zero").trap, 0);
    let load = of("load behind the data");
    assert_eq!((load.trap, load.address, load.error), (PAGE_FAULT, end, 4));
    let store = of("store across the data's end");
    assert_eq!(
        (store.trap, store.address, store.error),
        (PAGE_FAULT, end, 6)
    );
    let store = of("store to the read-only page");
    assert_eq!((store.trap, store.error), (PAGE_FAULT, 7));
    assert_eq!(of("ud2").trap, 6);
    assert_eq!(of("load from a non-canonical address").trap, 13);
    assert_eq!(of("the same by the stack").trap, 12);
    let repeated = of("rep movsb into a hole");
    assert_eq!(
        (repeated.registers[1], repeated.registers[7]),
        (64 - 9, end)
    );
}

/// Without a comparison: the generator's cases run, and most of them to their end.
#[test]
fn the_generator_makes_cases_that_run() {
    let (entries, _) = catalogue::catalogue();
    assert!(entries.len() > 1000, "only {} instructions", entries.len());
    let unseen = entries
        .iter()
        .filter(|entry| {
            let generator = Generator {
                entries: vec![(*entry).clone()],
                seed: SEED,
            };
            !generator.can_make(200)
        })
        .map(|entry| format!("{:?}", entry.code))
        .collect::<Vec<_>>();
    assert!(unseen.is_empty(), "never encoded: {unseen:?}");
    let generator = Generator {
        entries,
        seed: SEED,
    };
    let mut host = Host::start(&background());
    let mut traps: BTreeMap<u64, u64> = BTreeMap::new();
    let count = 200 * BATCH as u64;
    for start in (0..count).step_by(BATCH) {
        let planned: Vec<Planned> = (start..start + BATCH as u64)
            .map(|index| generator.case(index))
            .collect();
        let cases: Vec<&Case> = planned.iter().map(|planned| &planned.case).collect();
        match host.run(&cases) {
            Ok(outcomes) => outcomes
                .iter()
                .for_each(|o| *traps.entry(o.trap).or_default() += 1),
            Err((at, why)) => {
                panic!(
                    "{why}: {} {:?}",
                    planned[at].name,
                    report::disassembly(&planned[at].case)
                )
            }
        }
    }
    assert!(
        traps.get(&3).copied().unwrap_or(0) > count / 2,
        "vectors: {traps:?}"
    );
    for vector in [0, 13, PAGE_FAULT, 16, 19] {
        assert!(
            traps.contains_key(&vector),
            "no exception {vector}: {traps:?}"
        );
    }
}

/// The comparison against itself: no outcome depends on the case before it, on the process, or on
/// chance, and a difference is seen.
#[test]
fn the_host_agrees_with_itself() {
    let (entries, _) = catalogue::catalogue();
    let generator = Generator {
        entries,
        seed: SEED + 1,
    };
    let (mut one, mut other) = (Host::start(&background()), Host::start(&background()));
    for start in (0..100 * BATCH as u64).step_by(BATCH) {
        let planned: Vec<Planned> = (start..start + BATCH as u64)
            .map(|index| generator.case(index))
            .collect();
        let forwards: Vec<&Case> = planned.iter().map(|planned| &planned.case).collect();
        let backwards: Vec<&Case> = forwards.iter().rev().copied().collect();
        let first = one.run(&forwards).expect("the host runs");
        let second = other.run(&backwards).expect("the host runs");
        for ((planned, first), second) in planned.iter().zip(&first).zip(second.iter().rev()) {
            if let Some(found) = compare::difference(planned, first, second) {
                panic!("{}", report::report(planned, first, second, &found));
            }
        }
        let mut changed = first[0];
        changed.memory[77] ^= 1;
        assert!(compare::difference(&planned[0], &first[0], &changed).is_some());
    }
}
