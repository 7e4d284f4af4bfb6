//! Chores made of steps: each announced, timed, and summed up at the end.

use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// How a step that did not fail ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Done {
    /// It passed.
    Passed,
    /// It could not run here, for this reason; that is no failure.
    Skipped(String),
}

/// Runs named steps and remembers how each went.
#[derive(Default)]
pub struct Steps {
    results: Vec<(String, Duration, std::result::Result<Done, String>)>,
}

impl Steps {
    /// Runs one step; a failure is remembered and the next step still runs.
    pub fn run(&mut self, name: &str, step: impl FnOnce() -> Result<Done>) {
        eprintln!("\n==> {name}");
        let started = Instant::now();
        let result = step().map_err(|error| error.to_string());
        match &result {
            Ok(Done::Passed) => {}
            Ok(Done::Skipped(why)) => eprintln!("{name}: skipped: {why}"),
            Err(error) => eprintln!("{name}: {error}"),
        }
        self.results.push((name.into(), started.elapsed(), result));
    }

    /// Prints the table of all steps.
    ///
    /// # Errors
    ///
    /// Names the steps that failed.
    pub fn finish(self) -> Result<()> {
        eprintln!();
        let mut failed = Vec::new();
        for (name, time, result) in &self.results {
            let word = match result {
                Ok(Done::Passed) => "ok",
                Ok(Done::Skipped(_)) => "skipped",
                Err(_) => {
                    failed.push(name.as_str());
                    "FAILED"
                }
            };
            eprintln!("{:>8.1} s  {word:<8} {name}", time.as_secs_f64());
        }
        if failed.is_empty() {
            Ok(())
        } else {
            Err(Error::Other(format!("failed: {}", failed.join(", "))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_does_not_hide_the_next() {
        let mut steps = Steps::default();
        let mut ran = 0;
        steps.run("one", || Err(Error::Other("broken".into())));
        steps.run("two", || Ok(Done::Skipped("not here".into())));
        steps.run("three", || {
            ran += 1;
            Ok(Done::Passed)
        });
        steps.run("four", || Err(Error::Other("broken".into())));
        assert_eq!(ran, 1);
        assert_eq!(steps.finish().unwrap_err().to_string(), "failed: one, four");
    }
}
