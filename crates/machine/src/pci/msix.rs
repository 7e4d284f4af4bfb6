//! MSI-X (PCI Local Bus 3.0, clause 6.8.2): the vector table, the pending bits and the masks.
//!
//! A vector is masked towards the engine while any of its own mask bit, the function's mask bit and
//! a missing enable bit says so. The engine keeps a signal that arrives meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use minicbor::{Decode, Encode};

use crate::bus::lock;
use crate::engine::{EngineError, InterruptSource, MsiVector};

/// The capability's identifier.
pub(crate) const CAPABILITY_ID: u8 = 0x11;
/// Bytes of a table entry.
pub(crate) const ENTRY_LEN: u64 = 16;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
/// The bits of message control that a guest may write.
pub(crate) const CONTROL_WRITABLE: u16 = CONTROL_ENABLE | CONTROL_FUNCTION_MASK;
const ENTRY_MASKED: u32 = 1;

/// The MSI-X side of one function.
pub struct Msix {
    vectors: Vec<Arc<dyn MsiVector>>,
    enabled: AtomicBool,
    table: Mutex<Table>,
}

struct Table {
    control: u16,
    entries: Vec<Entry>,
    /// What the engine was told last, by vector.
    told: Vec<Told>,
}

/// One vector as the guest programmed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
struct Entry {
    #[n(0)]
    address: u64,
    #[n(1)]
    data: u32,
    #[n(2)]
    control: u32,
}

impl Entry {
    const AFTER_RESET: Self = Self {
        address: 0,
        data: 0,
        control: ENTRY_MASKED,
    };
}

#[derive(Clone, Copy)]
struct Told {
    route: Option<(u64, u32)>,
    masked: bool,
}

/// The saved form of the table; message control is part of the configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct MsixState {
    #[n(0)]
    entries: Vec<Entry>,
    #[n(1)]
    pending: Vec<bool>,
}

impl Msix {
    /// `count` vectors, all masked.
    ///
    /// # Errors
    ///
    /// The engine has no more vectors.
    pub fn new(count: u16, source: &dyn InterruptSource) -> Result<Self, EngineError> {
        let vectors: Vec<_> = (0..count)
            .map(|_| source.msi_vector())
            .collect::<Result<_, _>>()?;
        let told = Told {
            route: None,
            masked: true,
        };
        Ok(Self {
            enabled: AtomicBool::new(false),
            table: Mutex::new(Table {
                control: 0,
                entries: vec![Entry::AFTER_RESET; vectors.len()],
                told: vec![told; vectors.len()],
            }),
            vectors,
        })
    }

    /// Whether the guest has switched from INTx to MSI-X.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    /// How many vectors there are.
    #[must_use]
    pub fn count(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// The vector of that index.
    #[must_use]
    pub fn vector(&self, index: u16) -> Option<&Arc<dyn MsiVector>> {
        self.vectors.get(usize::from(index))
    }

    /// Raises a vector; one that does not exist raises nothing.
    pub fn signal(&self, index: u16) {
        if let Some(vector) = self.vector(index) {
            // The counter of an eventfd is full only if 2^64 signals wait, which are one.
            let _ = vector.eventfd().write(1);
        }
    }

    /// Takes the message control register.
    pub fn set_control(&self, control: u16) {
        let mut table = lock(&self.table);
        if table.control == control {
            return;
        }
        table.control = control;
        self.enabled
            .store(control & CONTROL_ENABLE != 0, Ordering::Release);
        for index in 0..self.vectors.len() {
            self.tell_engine(&mut table, index);
        }
    }

    /// Reads the table at a byte offset; 4 or 8 bytes, aligned.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let table = lock(&self.table);
        for (offset, word) in (offset..).step_by(4).zip(data.chunks_mut(4)) {
            let value = locate(offset).and_then(|(index, register)| {
                let entry = table.entries.get(index)?;
                Some(match register {
                    0 => entry.address as u32,
                    1 => (entry.address >> 32) as u32,
                    2 => entry.data,
                    _ => entry.control,
                })
            });
            match value {
                Some(value) if word.len() == 4 => word.copy_from_slice(&value.to_le_bytes()),
                _ => word.fill(0xff),
            }
        }
    }

    /// Writes the table at a byte offset; 4 or 8 bytes, aligned.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let mut table = lock(&self.table);
        for (offset, word) in (offset..).step_by(4).zip(data.chunks(4)) {
            let (Some((index, register)), Ok(word)) = (locate(offset), word.try_into()) else {
                return;
            };
            let value = u32::from_le_bytes(word);
            let Some(entry) = table.entries.get_mut(index) else {
                return;
            };
            match register {
                // The two low bits of the address are zero by definition.
                0 => entry.address = entry.address & !0xffff_ffff | u64::from(value & !3),
                1 => entry.address = entry.address & 0xffff_ffff | u64::from(value) << 32,
                2 => entry.data = value,
                _ => entry.control = value & ENTRY_MASKED,
            }
            self.tell_engine(&mut table, index);
        }
    }

    /// Reads the pending bits at a byte offset.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (offset, byte) in (offset..).zip(data) {
            *byte = (0..8).fold(0, |bits, bit| {
                let index = offset.saturating_mul(8).saturating_add(bit);
                let vector = usize::try_from(index)
                    .ok()
                    .and_then(|i| self.vectors.get(i));
                bits | u8::from(vector.is_some_and(|vector| vector.pending())) << bit
            });
        }
    }

    /// Back to all vectors masked.
    pub fn reset(&self) {
        lock(&self.table).entries.fill(Entry::AFTER_RESET);
        self.set_control(0);
    }

    /// The table and the pending bits.
    #[must_use]
    pub fn save(&self) -> MsixState {
        MsixState {
            entries: lock(&self.table).entries.clone(),
            pending: self.vectors.iter().map(|v| v.pending()).collect(),
        }
    }

    /// Whether `state` is of a table like this one.
    #[must_use]
    pub fn accepts(&self, state: &MsixState) -> bool {
        state.entries.len() == self.vectors.len()
            && state.pending.len() == self.vectors.len()
            && state
                .entries
                .iter()
                .all(|entry| entry.control & !ENTRY_MASKED == 0 && entry.address & 3 == 0)
    }

    /// Takes a state that [`Msix::accepts`], with the message control register that goes with it.
    pub fn restore(&self, state: &MsixState, control: u16) {
        let mut table = lock(&self.table);
        table.entries.clone_from(&state.entries);
        table.control = control;
        self.enabled
            .store(control & CONTROL_ENABLE != 0, Ordering::Release);
        for index in 0..self.vectors.len() {
            self.tell_engine(&mut table, index);
        }
        drop(table);
        for (index, _) in (0..).zip(&state.pending).filter(|(_, pending)| **pending) {
            self.signal(index);
        }
    }

    /// Brings the engine's view of a vector up to date. A message that the engine cannot route
    /// leaves the vector masked: what the guest has asked for goes nowhere, as on a board.
    fn tell_engine(&self, table: &mut Table, index: usize) {
        let entry = table.entries[index];
        let masked =
            table.control & CONTROL_WRITABLE != CONTROL_ENABLE || entry.control & ENTRY_MASKED != 0;
        let told = &mut table.told[index];
        let vector = &self.vectors[index];
        if masked {
            if !told.masked && vector.set_masked(true).is_ok() {
                told.masked = true;
            }
            return;
        }
        let route = (entry.address, entry.data);
        if told.route != Some(route) {
            if vector.route(route.0, route.1).is_err() {
                return;
            }
            told.route = Some(route);
        }
        if told.masked && vector.set_masked(false).is_ok() {
            told.masked = false;
        }
    }
}

/// The entry and the 32-bit register in it at a byte offset of the table.
fn locate(offset: u64) -> Option<(usize, u64)> {
    let index = usize::try_from(offset / ENTRY_LEN).ok()?;
    offset
        .is_multiple_of(4)
        .then_some((index, offset % ENTRY_LEN / 4))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestInterrupts;

    fn program(msix: &Msix, index: u64, address: u64, data: u32) {
        msix.write_table(index * 16, &address.to_le_bytes());
        msix.write_table(index * 16 + 8, &data.to_le_bytes());
        msix.write_table(index * 16 + 12, &0_u32.to_le_bytes());
    }

    #[test]
    fn a_vector_delivers_only_when_every_mask_is_off() {
        let interrupts = TestInterrupts::default();
        let msix = Msix::new(2, &interrupts).unwrap();
        program(&msix, 1, 0xfee0_1000, 0x41);
        msix.signal(1);
        assert!(interrupts.take_messages().is_empty());
        let mut pending = [0];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [0b10]);

        msix.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        assert!(interrupts.take_messages().is_empty());
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(interrupts.take_messages(), [(0xfee0_1000, 0x41)]);
        msix.signal(0);
        msix.signal(7);
        assert!(interrupts.take_messages().is_empty());

        msix.write_table(16 + 12, &1_u32.to_le_bytes());
        msix.signal(1);
        assert!(interrupts.take_messages().is_empty());
        program(&msix, 1, 0xfee0_2000, 0x42);
        assert_eq!(interrupts.take_messages(), [(0xfee0_2000, 0x42)]);
    }

    #[test]
    fn the_table_reads_back_and_ends_in_ones() {
        let msix = Msix::new(1, &TestInterrupts::default()).unwrap();
        program(&msix, 0, 0x1_fee0_1003, 7);
        let mut data = [0; 8];
        msix.read_table(0, &mut data);
        assert_eq!(u64::from_le_bytes(data), 0x1_fee0_1000);
        msix.read_table(8, &mut data);
        assert_eq!(u64::from_le_bytes(data), 7);
        msix.read_table(16, &mut data);
        assert_eq!(data, [0xff; 8]);
        msix.read_table(2, &mut data);
        assert_eq!(data, [0xff; 8]);
        msix.write_table(u64::MAX - 3, &[0; 8]);
    }

    #[test]
    fn a_pending_message_survives_save_and_restore() {
        let msix = Msix::new(1, &TestInterrupts::default()).unwrap();
        msix.set_control(CONTROL_ENABLE);
        msix.write_table(0, &0xfee0_0000_u64.to_le_bytes());
        msix.signal(0);
        let state = msix.save();

        let interrupts = TestInterrupts::default();
        let copy = Msix::new(1, &interrupts).unwrap();
        assert!(copy.accepts(&state));
        copy.restore(&state, CONTROL_ENABLE);
        assert_eq!(copy.save(), state);
        copy.write_table(12, &[0; 4]);
        assert_eq!(interrupts.take_messages(), [(0xfee0_0000, 0)]);
        assert!(!Msix::new(2, &interrupts).unwrap().accepts(&state));
    }
}
