//! One request's way: from a head to the store, and from its completion to the used ring.

use std::sync::atomic::Ordering;

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::{Broken, Kind, Slot, Worker};
use crate::store::{Completion, Operation, Request};
use crate::vhost_user::chain::walk;
use crate::vhost_user::memory::{Span, buffers};
use crate::vhost_user::request::{Command, ID_BYTES, Status, parse, total};
use crate::vhost_user::stats::{add, count};

/// What a command asks of the store.
struct Plan {
    kind: Kind,
    bytes: u64,
    /// What a read writes into.
    spans: Vec<Span>,
    operations: Vec<Operation>,
}

impl Worker {
    /// Starts the request at `head`, which the tracker knows already.
    pub(super) fn begin(&mut self, head: u16) -> Result<(), Broken> {
        match self.slots.get(usize::from(head)) {
            Some(None) => {}
            _ => return Err(Broken::Head(head)),
        }
        let parts = &self.parts;
        let table = GuestAddress(parts.queue.desc_table());
        let size = parts.queue.size();
        let parsed = walk(&parts.memory, table, size, head, self.indirect)
            .ok()
            .and_then(|chain| parse(&parts.memory, chain, &parts.device.geometry));
        let Some(parsed) = parsed else {
            count(&parts.device.counters.malformed);
            return self.give_back(head, 0);
        };
        match parsed.command {
            Ok(Command::GetId { data }) => {
                let (status, written) = match self.write_id(&data) {
                    true => (Status::Ok, ID_BYTES as u64),
                    false => (Status::IoError, 0),
                };
                self.answer(head, parsed.status, status, written)
            }
            Ok(command) => match self.plan(command) {
                Some(plan) => self.start(head, parsed.status, plan),
                None => self.answer(head, parsed.status, Status::IoError, 0),
            },
            Err(status) => self.answer(head, parsed.status, status, 0),
        }
    }

    /// The store's share of a command. `None` if its data is not in guest memory.
    fn plan(&self, command: Command) -> Option<Plan> {
        let durable = self.parts.device.write_through(self.parts.acked);
        let plan = |kind, operations| Plan {
            kind,
            bytes: 0,
            spans: Vec::new(),
            operations,
        };
        Some(match command {
            Command::Read { offset, data } => {
                let buffers = buffers(&self.parts.memory, &data)?;
                Plan {
                    kind: Kind::Read,
                    bytes: total(&data),
                    spans: data,
                    operations: vec![Operation::Read { offset, buffers }],
                }
            }
            Command::Write { offset, data } => Plan {
                bytes: total(&data),
                ..plan(
                    Kind::Write,
                    vec![Operation::Write {
                        offset,
                        buffers: buffers(&self.parts.memory, &data)?,
                        durable,
                    }],
                )
            },
            Command::Flush => plan(Kind::Flush, vec![Operation::Flush]),
            Command::Discard(ranges) => {
                let operations = ranges.iter().map(|range| Operation::Discard {
                    offset: range.offset,
                    len: range.len,
                    durable,
                });
                plan(Kind::Discard, operations.collect())
            }
            Command::WriteZeroes(ranges) => {
                let operations = ranges.iter().map(|range| Operation::WriteZeroes {
                    offset: range.offset,
                    len: range.len,
                    unmap: range.unmap,
                    durable,
                });
                plan(Kind::WriteZeroes, operations.collect())
            }
            Command::GetId { .. } => return None,
        })
    }

    fn start(&mut self, head: u16, status: GuestAddress, plan: Plan) -> Result<(), Broken> {
        self.in_flight += 1;
        count(&self.parts.device.counters.in_flight);
        self.slots[usize::from(head)] = Some(Slot {
            kind: plan.kind,
            status,
            spans: plan.spans,
            bytes: plan.bytes,
            pending: plan.operations.len() as u32,
            failed: false,
        });
        if plan.operations.is_empty() {
            return self.end(head);
        }
        for operation in plan.operations {
            self.store.push(Request {
                tag: u64::from(head),
                operation,
            });
        }
        Ok(())
    }

    /// Takes the end of one operation.
    pub(super) fn complete(&mut self, completion: Completion) -> Result<(), Broken> {
        let head = completion.tag as u16; // As it was pushed.
        let Some(slot) = self
            .slots
            .get_mut(usize::from(head))
            .and_then(Option::as_mut)
        else {
            return Ok(());
        };
        slot.failed |= completion.result.is_err();
        slot.pending -= 1;
        match slot.pending {
            0 => self.end(head),
            _ => Ok(()),
        }
    }

    fn end(&mut self, head: u16) -> Result<(), Broken> {
        let Some(slot) = self.slots[usize::from(head)].take() else {
            return Ok(());
        };
        self.in_flight -= 1;
        let device = self.parts.device.clone();
        let counters = &device.counters;
        counters.in_flight.fetch_sub(1, Ordering::Relaxed);
        // The kernel wrote there behind the mapping's back, on failure perhaps in part.
        for span in &slot.spans {
            self.parts.log.mark(span.address.0, u64::from(span.len));
        }
        if slot.failed {
            return self.answer(head, slot.status, Status::IoError, 0);
        }
        let written = match slot.kind {
            Kind::Read => {
                count(&counters.reads);
                add(&counters.bytes_read, slot.bytes);
                slot.bytes
            }
            Kind::Write => {
                count(&counters.writes);
                add(&counters.bytes_written, slot.bytes);
                0
            }
            Kind::Flush => {
                count(&counters.flushes);
                0
            }
            Kind::Discard => {
                count(&counters.discards);
                0
            }
            Kind::WriteZeroes => {
                count(&counters.write_zeroes);
                0
            }
        };
        self.answer(head, slot.status, Status::Ok, written)
    }

    /// Writes the status and gives the buffers back, into which `written` bytes of data went.
    fn answer(
        &mut self,
        head: u16,
        address: GuestAddress,
        status: Status,
        written: u64,
    ) -> Result<(), Broken> {
        let counters = &self.parts.device.counters;
        match status {
            Status::Ok => {}
            Status::IoError => count(&counters.errors),
            Status::Unsupported => count(&counters.unsupported),
        }
        let len = match self.parts.memory.write_obj(status as u8, address) {
            Ok(()) => u32::try_from(written + 1).unwrap_or(u32::MAX),
            Err(_) => 0,
        };
        self.give_back(head, len)
    }

    fn give_back(&mut self, head: u16, len: u32) -> Result<(), Broken> {
        let parts = &mut self.parts;
        if let Some(tracker) = &parts.tracker {
            tracker.publishing(head);
        }
        parts.queue.add_used(&*parts.memory, head, len)?;
        if let Some(tracker) = &parts.tracker {
            tracker.published(head, parts.queue.next_used());
        }
        self.used = true;
        Ok(())
    }

    /// Writes the serial number, padded with zeroes (virtio 1.2, clause 5.2.6). `false` if the data is
    /// not in guest memory.
    fn write_id(&self, spans: &[Span]) -> bool {
        let mut id = [0; ID_BYTES];
        let serial = self.parts.device.options.serial.as_bytes();
        let len = serial.len().min(ID_BYTES);
        id[..len].copy_from_slice(&serial[..len]);
        let mut rest = id.as_slice();
        for span in spans {
            let (now, later) = rest.split_at(rest.len().min(span.len as usize));
            if self.parts.memory.write_slice(now, span.address).is_err() {
                return false;
            }
            rest = later;
        }
        true
    }
}
