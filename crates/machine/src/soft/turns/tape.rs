//! The recording under the head: what is added to it, or what it says.

use std::io;

use mica_cpu::Meter;
use minicbor::bytes::ByteVec;

use super::course::write_memory;
use super::{TurnError, Turns};
use crate::bus::lock;
use crate::device::SavedState;
use crate::engine::state::VcpuState;
use crate::recording::{Entry, Place, Reader, Record, ReplayError, Writer};

/// A recording that is written or read.
pub(super) enum Tape {
    Record(Writer),
    Replay(Reader),
}

/// What is done to a machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// It was reset.
    Reset {
        /// Why, by number.
        cause: u8,
    },
    /// It ended.
    End {
        /// Why, by number.
        reason: u8,
        /// Checksum of all vCPUs' states.
        vcpus: u32,
        /// Checksum of RAM.
        memory: u32,
    },
    /// Nothing more was recorded: the recording was not closed.
    Cut,
}

/// What was loaded into a machine before it ran.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// The boot protocol.
    pub protocol: String,
    /// The boot entry's title.
    pub entry: Option<String>,
    /// The kernel's command line.
    pub cmdline: String,
}

impl Tape {
    /// Records.
    pub(super) fn add(&mut self, position: u64, record: &Record) -> io::Result<()> {
        match self {
            Self::Record(writer) => writer.add(position, record),
            Self::Replay(_) => Ok(()),
        }
    }

    pub(super) fn flush_in_time(&mut self) -> io::Result<()> {
        match self {
            Self::Record(writer) => writer.flush_in_time(),
            Self::Replay(_) => Ok(()),
        }
    }

    fn reader(&mut self) -> Result<&mut Reader, ReplayError> {
        match self {
            Self::Replay(reader) => Ok(reader),
            Self::Record(_) => Err(ReplayError::NoRecording),
        }
    }

    /// Records the registers, or compares them.
    pub(super) fn check(&mut self, position: u64, registers: u32) -> Result<(), TurnError> {
        let reader = match self {
            Self::Record(writer) => {
                return Ok(writer.add(position, &Record::Check { registers })?);
            }
            Self::Replay(reader) => reader,
        };
        match reader.take()? {
            // What is not there any more cannot be compared.
            None => Ok(()),
            Some(Entry {
                position: at,
                record: Record::Check { registers: before },
            }) if at == position && before == registers => Ok(()),
            Some(Entry {
                record: Record::Check { .. },
                ..
            }) => Err(diverged(position, "the registers are others").into()),
            Some(entry) => Err(unexpected(position, "a check is due", &entry).into()),
        }
    }

    /// The recorded answer to a read.
    pub(super) fn replay_read(&mut self, position: u64, place: Place) -> Result<u64, ReplayError> {
        let Some(entry) = self.reader()?.take()? else {
            // Cut off: the run ends here in any case.
            return Ok(u64::MAX);
        };
        match &entry.record {
            Record::Read { value, .. }
                if entry.position == position && entry.record == Record::read(place, *value) =>
            {
                Ok(*value)
            }
            _ => Err(unexpected(
                position,
                &format!("the guest reads {place:x?}"),
                &entry,
            )),
        }
    }

    /// For how long everybody has slept.
    pub(super) fn replay_idle(&mut self, position: u64) -> Result<u64, ReplayError> {
        match self.reader()?.take()? {
            Some(Entry {
                position: at,
                record: Record::Idle { ns },
            }) if at == position => Ok(ns),
            Some(entry) => Err(unexpected(position, "all processors sleep", &entry)),
            None => Err(diverged(position, "all processors sleep at its end")),
        }
    }

    /// What comes from outside at this position, if something does.
    pub(super) fn replay_input(&mut self, position: u64) -> Result<Option<Record>, ReplayError> {
        let reader = self.reader()?;
        let Some(next) = reader.peek()? else {
            return Ok(None);
        };
        if next.position < position {
            return Err(unexpected(position, "it is missed", next));
        }
        let is_input = matches!(
            next.record,
            Record::Line { .. }
                | Record::Message { .. }
                | Record::Memory { .. }
                | Record::Zeros { .. }
        );
        if next.position > position || !is_input {
            return Ok(None);
        }
        Ok(reader.take()?.map(|entry| entry.record))
    }

    /// Whether the machine as a whole is concerned now.
    pub(super) fn is_over(&mut self, position: u64) -> Result<bool, ReplayError> {
        Ok(match self.reader()?.peek()? {
            None => true,
            Some(next) => {
                next.position == position
                    && matches!(next.record, Record::Reset { .. } | Record::End { .. })
            }
        })
    }

    /// Has the run come back where the next record is due. The guest itself comes to reads and to sleep.
    pub(super) fn pause_at_next(&mut self, position: u64, meter: &Meter) {
        let next = match self.reader().and_then(Reader::peek) {
            Ok(Some(next)) => match next.record {
                Record::Read { .. } | Record::Check { .. } => u64::MAX,
                Record::Idle { .. } if next.position == position => u64::MAX,
                _ => next.position,
            },
            // The end, or an error that the next one to look sees, too.
            Ok(None) | Err(_) => position,
        };
        meter.pause_at(next);
    }
}

fn diverged(position: u64, what: &str) -> ReplayError {
    ReplayError::Diverged {
        position,
        what: what.to_owned(),
    }
}

fn unexpected(position: u64, what: &str, entry: &Entry) -> ReplayError {
    let Entry {
        position: at,
        record,
    } = entry;
    let name = record.name();
    diverged(
        position,
        &format!("{what}, the recording has {name} at position {at}"),
    )
}

/// What the machine does with its recording. No vCPU runs meanwhile.
impl Turns {
    /// Records what is in memory and in the vCPUs before they run.
    ///
    /// # Errors
    ///
    /// It cannot be recorded.
    pub fn record_boot(&self, loaded: Loaded, vcpus: &[VcpuState]) -> Result<(), TurnError> {
        let (mut tape, position) = (lock(&self.tape), self.position());
        self.record_written(&mut tape)?;
        let Loaded {
            protocol,
            entry,
            cmdline,
        } = loaded;
        let booted = Record::Booted {
            protocol,
            entry,
            cmdline,
        };
        tape.add(position, &booted)?;
        for (index, state) in (0..).zip(vcpus) {
            let SavedState { version, body } = state.to_saved();
            let state = Record::Vcpu {
                index,
                version,
                state: ByteVec::from(body),
            };
            tape.add(position, &state)?;
        }
        tape.add(position, &Record::Run)?;
        Ok(())
    }

    /// Loads what the recorded machine had before it ran: memory here, and a state for each vCPU.
    ///
    /// # Errors
    ///
    /// The recording says something else, or what cannot be.
    pub fn replay_boot(&self, vcpus: usize) -> Result<(Loaded, Vec<VcpuState>), TurnError> {
        let mut tape = lock(&self.tape);
        let (mut loaded, mut states) = (None, Vec::new());
        let position = self.position();
        loop {
            let entry = tape.reader()?.take()?;
            let Some(entry) = entry.filter(|entry| entry.position == position) else {
                return Err(ReplayError::damaged("it has no boot").into());
            };
            match entry.record {
                record @ (Record::Memory { .. } | Record::Zeros { .. }) => {
                    write_memory(&self.memory, &record)?;
                }
                Record::Booted {
                    protocol,
                    entry,
                    cmdline,
                } => {
                    loaded = Some(Loaded {
                        protocol,
                        entry,
                        cmdline,
                    });
                }
                Record::Vcpu {
                    index,
                    version,
                    state,
                } if index as usize == states.len() && states.len() < vcpus => {
                    let body = state.into();
                    let saved = SavedState { version, body };
                    let state = VcpuState::from_saved(&saved).map_err(ReplayError::damaged)?;
                    states.push(state);
                }
                Record::Run if states.len() == vcpus => break,
                other => {
                    let what = format!("it has {} in a boot", other.name());
                    return Err(ReplayError::damaged(what).into());
                }
            }
        }
        let loaded = loaded.ok_or_else(|| ReplayError::damaged("a boot without a kernel"))?;
        Ok((loaded, states))
    }

    /// Records that the machine was reset; memory is zero now.
    ///
    /// # Errors
    ///
    /// It cannot be recorded.
    pub fn record_reset(&self, cause: u8) -> Result<(), TurnError> {
        self.forget_written()?;
        let record = Record::Reset { cause };
        Ok(lock(&self.tape).add(self.position(), &record)?)
    }

    /// Records what devices have written last, before [`Turns::record_end`].
    ///
    /// # Errors
    ///
    /// It cannot be recorded.
    pub fn record_rest(&self) -> Result<(), TurnError> {
        self.record_written(&mut lock(&self.tape))
    }

    /// Records how the machine ended, and closes the recording.
    ///
    /// # Errors
    ///
    /// It cannot be recorded.
    pub fn record_end(&self, reason: u8, vcpus: u32, memory: u32) -> Result<(), TurnError> {
        let mut tape = lock(&self.tape);
        let end = Record::End {
            reason,
            vcpus,
            memory,
        };
        tape.add(self.position(), &end)?;
        if let Tape::Record(writer) = &mut *tape {
            writer.flush()?;
        }
        Ok(())
    }

    /// What the recording does to the machine as a whole now, which is what a vCPU has stopped for.
    ///
    /// # Errors
    ///
    /// Nothing, or the recording is damaged.
    pub fn replay_mark(&self) -> Result<Mark, TurnError> {
        match lock(&self.tape).reader()?.take()?.map(|entry| entry.record) {
            None => Ok(Mark::Cut),
            Some(Record::Reset { cause }) => Ok(Mark::Reset { cause }),
            Some(Record::End {
                reason,
                vcpus,
                memory,
            }) => Ok(Mark::End {
                reason,
                vcpus,
                memory,
            }),
            Some(other) => {
                let what = format!("it has {} where the machine stops", other.name());
                Err(ReplayError::damaged(what).into())
            }
        }
    }
}
