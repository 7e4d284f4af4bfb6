//! How an operation becomes system calls: a core without I/O.
//!
//! A [`Job`] says which [`Step`] comes next and takes that step's result, until it is done:
//!
//! ```text
//!            ┌── short: the rest ──┐
//!            ▼                     │
//!  Read,   Transfer ───────────────┴──────────▶ done
//!  Write
//!  Flush                        ┌────▶ Sync ──▶ done
//!  Discard        Punch ────────┤       ▲
//!                  │ unsupported│       │ durable
//!  WriteZeroes     ▼            │       │
//!                 Zero ─────────┼───────┤
//!                  │ unsupported        │
//!                  ▼                    │
//!                 Fill (writes zeroes) ─┘
//! ```

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Operation, Request};
use crate::uring::{Buffers, PIECES_MAX, Piece};

/// The most bytes of one step that goes through a bounce buffer.
const BOUNCE_BYTES: u64 = 1 << 20;

/// How often one step is repeated after `EINTR` or `EAGAIN`.
const RETRIES_MAX: u8 = 32;

/// What the queues of one open file know of it together.
#[derive(Debug, Default)]
pub(crate) struct Health {
    /// A sync has failed. The kernel may have dropped dirty pages and will not say so again, so that no
    /// later flush can be acknowledged.
    sync_failed: AtomicBool,
    no_punch: AtomicBool,
    no_zero: AtomicBool,
}

/// One system call.
pub(crate) enum Step<'a> {
    Read {
        offset: u64,
        pieces: &'a [Piece],
    },
    Write {
        offset: u64,
        pieces: &'a [Piece],
        durable: bool,
    },
    Sync,
    Allocate {
        mode: i32,
        offset: u64,
        len: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Transfer,
    Punch,
    Zero,
    Fill,
    Sync,
}

/// One request on its way through the kernel.
pub(crate) struct Job {
    pub(crate) tag: u64,
    operation: Operation,
    phase: Phase,
    /// Bytes of the range that are done.
    done: u64,
    pieces: Vec<Piece>,
    alignment: usize,
    bounce: Option<Buffers>,
    retries: u8,
}

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

impl Job {
    /// A job for a file whose transfers need memory aligned to `alignment`, a power of two.
    pub(crate) fn new(request: Request, alignment: usize, health: &Health) -> Self {
        let supported = |flag: &AtomicBool| !flag.load(Ordering::Relaxed);
        let phase = match &request.operation {
            Operation::Read { .. } | Operation::Write { .. } => Phase::Transfer,
            Operation::Flush => Phase::Sync,
            Operation::Discard { .. } => Phase::Punch,
            Operation::WriteZeroes { unmap: true, .. } if supported(&health.no_punch) => {
                Phase::Punch
            }
            Operation::WriteZeroes { .. } if supported(&health.no_zero) => Phase::Zero,
            Operation::WriteZeroes { .. } => Phase::Fill,
        };
        Self {
            tag: request.tag,
            operation: request.operation,
            phase,
            done: 0,
            pieces: Vec::new(),
            alignment,
            bounce: None,
            retries: 0,
        }
    }

    /// Whether the job copies through a buffer of its own, at most [`BOUNCE_BYTES`] long.
    pub(crate) fn needs_bounce(&self) -> bool {
        match &self.operation {
            Operation::Read { buffers, .. } | Operation::Write { buffers, .. } => {
                !buffers.is_aligned(self.alignment)
            }
            _ => false,
        }
    }

    fn range(&self) -> (u64, u64) {
        match &self.operation {
            Operation::Read { offset, buffers }
            | Operation::Write {
                offset, buffers, ..
            } => (*offset, buffers.len()),
            Operation::Discard { offset, len, .. } | Operation::WriteZeroes { offset, len, .. } => {
                (*offset, *len)
            }
            Operation::Flush => (0, 0),
        }
    }

    fn durable(&self) -> bool {
        match self.operation {
            Operation::Write { durable, .. }
            | Operation::Discard { durable, .. }
            | Operation::WriteZeroes { durable, .. } => durable,
            Operation::Read { .. } | Operation::Flush => false,
        }
    }

    /// The next system call. Its memory is valid until [`Job::advance`] or the job's end.
    ///
    /// # Errors
    ///
    /// No memory for a bounce buffer.
    pub(crate) fn step(&mut self) -> io::Result<Step<'_>> {
        let (start, len) = self.range();
        let (offset, rest) = (start + self.done, len - self.done);
        match self.phase {
            Phase::Sync => return Ok(Step::Sync),
            Phase::Punch => {
                return Ok(Step::Allocate {
                    mode: PUNCH,
                    offset,
                    len: rest,
                });
            }
            Phase::Zero => {
                return Ok(Step::Allocate {
                    mode: ZERO,
                    offset,
                    len: rest,
                });
            }
            Phase::Transfer | Phase::Fill => {}
        }
        if self.needs_bounce() || self.phase == Phase::Fill {
            self.fill_bounce(rest.min(BOUNCE_BYTES))?;
        } else if let Operation::Read { buffers, .. } | Operation::Write { buffers, .. } =
            &self.operation
        {
            self.pieces.clear();
            buffers.pieces_from(self.done, rest, PIECES_MAX, &mut self.pieces);
        }
        let pieces = self.pieces.as_slice();
        Ok(match &self.operation {
            Operation::Read { .. } => Step::Read { offset, pieces },
            _ => Step::Write {
                offset,
                pieces,
                durable: self.phase == Phase::Transfer && self.durable(),
            },
        })
    }

    /// Points the pieces at `len` bytes of the bounce buffer, with the data there if it is to be written.
    fn fill_bounce(&mut self, len: u64) -> io::Result<()> {
        let bounce = match self.bounce.take() {
            Some(bounce) => bounce,
            // At most `BOUNCE_BYTES`, which a usize holds.
            None => Buffers::zeroed(len as usize)?,
        };
        if let Operation::Write { buffers, .. } = &self.operation {
            Buffers::copy_within((buffers, self.done), (&bounce, 0), len);
        }
        self.pieces.clear();
        bounce.pieces_from(0, len, PIECES_MAX, &mut self.pieces);
        self.bounce = Some(bounce);
        Ok(())
    }

    /// Takes the result of the last step: the bytes moved, or an error. `None` while there is more to do.
    pub(crate) fn advance(
        &mut self,
        result: io::Result<u32>,
        health: &Health,
    ) -> Option<io::Result<()>> {
        let moved = match result {
            Ok(moved) => u64::from(moved),
            Err(error) => return self.recover(error, health),
        };
        self.retries = 0;
        let (_, len) = self.range();
        match self.phase {
            Phase::Sync => {
                if health.sync_failed.load(Ordering::SeqCst) {
                    return Some(Err(lost_writes()));
                }
                return Some(Ok(()));
            }
            Phase::Punch | Phase::Zero => self.done = len,
            Phase::Transfer | Phase::Fill => {
                if moved == 0 && self.done < len {
                    // The file has become shorter than its capacity was when it was opened.
                    return Some(Err(io::ErrorKind::UnexpectedEof.into()));
                }
                if let (Operation::Read { buffers, .. }, Some(bounce)) =
                    (&self.operation, &self.bounce)
                {
                    Buffers::copy_within((bounce, 0), (buffers, self.done), moved);
                }
                self.done = (self.done + moved).min(len);
            }
        }
        if self.done < len {
            return None;
        }
        // A durable write carries its own sync; the other operations need one behind them.
        if self.phase != Phase::Transfer && self.durable() {
            self.phase = Phase::Sync;
            return None;
        }
        Some(Ok(()))
    }

    fn recover(&mut self, error: io::Error, health: &Health) -> Option<io::Result<()>> {
        let code = error.raw_os_error();
        if matches!(code, Some(libc::EINTR | libc::EAGAIN)) && self.retries < RETRIES_MAX {
            self.retries += 1;
            return None;
        }
        let unsupported = matches!(code, Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV));
        match (self.phase, unsupported) {
            (Phase::Punch, true) => {
                health.no_punch.store(true, Ordering::Relaxed);
                if matches!(self.operation, Operation::Discard { .. }) {
                    // A discard is a hint.
                    return Some(Ok(()));
                }
                self.phase = Phase::Zero;
                None
            }
            (Phase::Zero, true) => {
                health.no_zero.store(true, Ordering::Relaxed);
                self.phase = Phase::Fill;
                None
            }
            (Phase::Sync, _) => {
                health.sync_failed.store(true, Ordering::SeqCst);
                Some(Err(error))
            }
            (Phase::Transfer, _) if self.durable() => {
                // The write may have reached the page cache and its sync may be what failed.
                health.sync_failed.store(true, Ordering::SeqCst);
                Some(Err(error))
            }
            _ => Some(Err(error)),
        }
    }
}

fn lost_writes() -> io::Error {
    io::Error::other("an earlier sync failed, so writes before it may be lost")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a step asks for, in a form that can be compared.
    fn describe(step: &Step<'_>) -> String {
        let total = |pieces: &[Piece]| pieces.iter().map(Piece::len).sum::<usize>();
        match step {
            Step::Read { offset, pieces } => format!("read {}@{offset}", total(pieces)),
            Step::Write {
                offset,
                pieces,
                durable,
            } => format!(
                "write {}@{offset}{}",
                total(pieces),
                if *durable { " durable" } else { "" }
            ),
            Step::Sync => "sync".into(),
            Step::Allocate { mode, offset, len } => {
                let name = if *mode == PUNCH { "punch" } else { "zero" };
                format!("{name} {len}@{offset}")
            }
        }
    }

    /// Runs a job with the given results and checks the steps it takes and how it ends.
    fn check(
        operation: Operation,
        alignment: usize,
        script: &[(&str, Result<u32, i32>)],
        ok: bool,
    ) {
        let health = Health::default();
        let mut job = Job::new(Request { tag: 1, operation }, alignment, &health);
        let mut end = None;
        for (expected, result) in script {
            assert!(end.is_none(), "the job ended before {expected}");
            assert_eq!(describe(&job.step().unwrap()), *expected);
            let result = result.map_err(io::Error::from_raw_os_error);
            end = job.advance(result, &health);
        }
        let end = end.expect("the script covers the whole job");
        assert_eq!(end.is_ok(), ok, "{end:?}");
    }

    fn read(len: usize) -> Operation {
        Operation::Read {
            offset: 512,
            buffers: Buffers::zeroed(len).unwrap(),
        }
    }

    fn write(len: usize, durable: bool) -> Operation {
        Operation::Write {
            offset: 512,
            buffers: Buffers::zeroed(len).unwrap(),
            durable,
        }
    }

    fn zeroes(unmap: bool, durable: bool) -> Operation {
        Operation::WriteZeroes {
            offset: 0,
            len: 4096,
            unmap,
            durable,
        }
    }

    #[test]
    fn a_short_transfer_is_continued_where_it_stopped() {
        let script = [("read 4096@512", Ok(1000)), ("read 3096@1512", Ok(3096))];
        check(read(4096), 1, &script, true);
        let script = [
            ("write 4096@512 durable", Ok(512)),
            ("write 3584@1024 durable", Ok(3584)),
        ];
        check(write(4096, true), 1, &script, true);
    }

    #[test]
    fn the_end_of_the_file_is_an_error() {
        check(read(4096), 1, &[("read 4096@512", Ok(0))], false);
    }

    #[test]
    fn an_interrupted_step_is_repeated_but_not_for_ever() {
        let script = [
            ("write 512@512", Err(libc::EINTR)),
            ("write 512@512", Err(libc::EAGAIN)),
            ("write 512@512", Ok(512)),
        ];
        check(write(512, false), 1, &script, true);
        let script = vec![("write 512@512", Err(libc::EAGAIN)); 33];
        check(write(512, false), 1, &script, false);
    }

    #[test]
    fn misaligned_memory_bounces_in_bounded_chunks() {
        let operation = Operation::Read {
            offset: 0,
            buffers: Buffers::zeroed(4 << 20).unwrap().slice(1, 3 << 20).unwrap(),
        };
        let script = [
            ("read 1048576@0", Ok(1 << 20)),
            ("read 1048576@1048576", Ok(4096)),
            ("read 1048576@1052672", Ok(1 << 20)),
            ("read 1044480@2101248", Ok(1044480)),
        ];
        check(operation, 512, &script, true);
    }

    #[test]
    fn zeroes_fall_back_step_by_step() {
        let none = Err(libc::EOPNOTSUPP);
        check(zeroes(true, false), 1, &[("punch 4096@0", Ok(0))], true);
        check(zeroes(false, false), 1, &[("zero 4096@0", Ok(0))], true);
        let script = [("zero 4096@0", Ok(0)), ("sync", Ok(0))];
        check(zeroes(false, true), 1, &script, true);
        let script = [
            ("punch 4096@0", none),
            ("zero 4096@0", none),
            ("write 4096@0", Ok(4096)),
            ("sync", Ok(0)),
        ];
        check(zeroes(true, true), 1, &script, true);
        check(
            zeroes(true, true),
            1,
            &[("punch 4096@0", Err(libc::EIO))],
            false,
        );
    }

    #[test]
    fn an_unsupported_discard_is_no_error() {
        let discard = Operation::Discard {
            offset: 0,
            len: 512,
            durable: true,
        };
        check(discard, 1, &[("punch 512@0", Err(libc::EOPNOTSUPP))], true);
    }

    #[test]
    fn no_flush_succeeds_after_one_has_failed() {
        let health = Health::default();
        let flush = || {
            let request = Request {
                tag: 0,
                operation: Operation::Flush,
            };
            Job::new(request, 1, &health)
        };
        let failed = flush().advance(Err(io::Error::from_raw_os_error(libc::EIO)), &health);
        assert!(failed.is_some_and(|result| result.is_err()));
        assert!(
            flush()
                .advance(Ok(0), &health)
                .is_some_and(|result| result.is_err())
        );
    }
}
