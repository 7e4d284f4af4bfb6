//! Configuration space of a type 0 function (PCI Local Bus 3.0, clause 6).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bits of the command register that do something here.
pub mod command {
    /// The function answers in its memory BARs.
    pub const MEMORY: u16 = 1 << 1;
    /// The function may read and write memory, and send messages.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// The function keeps its INTx line low.
    pub const INTX_DISABLE: u16 = 1 << 10;
}

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CACHE_LINE_SIZE: usize = 0x0c;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const FIRST_CAPABILITY: usize = 0x40;
const BAR_64BIT: u8 = 0b100;

/// What a function says it is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor identifier.
    pub vendor: u16,
    /// Device identifier.
    pub device: u16,
    /// Revision identifier.
    pub revision: u8,
    /// Base class, subclass and programming interface: `0xbb_ss_pp`.
    pub class: u32,
    /// Subsystem vendor identifier.
    pub subsystem_vendor: u16,
    /// Subsystem identifier.
    pub subsystem: u16,
}

/// A memory BAR that a function has.
#[derive(Clone, Copy, Debug)]
pub struct BarSpec {
    /// Which of the six registers; a 64-bit BAR takes the next one too.
    pub index: usize,
    /// In bytes; a power of two, 4096 or more so that no two BARs share a page.
    pub size: u64,
    /// Whether the BAR holds a 64-bit address.
    pub wide: bool,
}

/// Where the BARs of a function answer, readable without the function's lock.
pub struct BarDecode {
    bars: Vec<Bar>,
}

struct Bar {
    spec: BarSpec,
    /// The base address, or [`NOT_DECODED`].
    base: AtomicU64,
}

/// No BAR is at the last byte of the address space: they are aligned.
const NOT_DECODED: u64 = u64::MAX;

impl BarDecode {
    /// The BAR that answers at `address`, and the offset in it.
    #[must_use]
    pub fn find(&self, address: u64) -> Option<(usize, u64)> {
        self.bars.iter().find_map(|bar| {
            let offset = address.checked_sub(bar.base.load(Ordering::Acquire))?;
            (offset < bar.spec.size).then_some((bar.spec.index, offset))
        })
    }

    /// Where BAR `index` answers now, if memory decoding is on.
    #[must_use]
    pub fn base(&self, index: usize) -> Option<u64> {
        let bar = self.bars.iter().find(|bar| bar.spec.index == index)?;
        let base = bar.base.load(Ordering::Acquire);
        (base != NOT_DECODED).then_some(base)
    }
}

/// The 256 bytes that every function has, which of their bits the guest may change, and the BARs
/// they place.
pub struct ConfigSpace {
    bytes: [u8; 256],
    writable: [u8; 256],
    /// The bytes after reset.
    initial: [u8; 256],
    decode: Arc<BarDecode>,
    next_capability: usize,
    /// The byte that will point to the next capability.
    capability_link: usize,
}

impl ConfigSpace {
    /// The header of a function with these BARs, none of them placed yet.
    ///
    /// # Panics
    ///
    /// A BAR's size is no power of two or below 4096, which is a fault in the device's code.
    #[must_use]
    pub fn new(identity: Identity, bars: &[BarSpec]) -> Self {
        let mut space = Self {
            bytes: [0; 256],
            writable: [0; 256],
            initial: [0; 256],
            decode: Arc::new(BarDecode {
                bars: bars
                    .iter()
                    .map(|&spec| Bar {
                        spec,
                        base: AtomicU64::new(NOT_DECODED),
                    })
                    .collect(),
            }),
            next_capability: FIRST_CAPABILITY,
            capability_link: CAPABILITIES,
        };
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(0x08, &(identity.class << 8).to_le_bytes());
        space.set(0x08, &[identity.revision]);
        space.set(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.set(0x2e, &identity.subsystem.to_le_bytes());
        let commands = command::MEMORY | command::BUS_MASTER | command::INTX_DISABLE;
        space.make_writable(COMMAND, &commands.to_le_bytes());
        space.make_writable(CACHE_LINE_SIZE, &[0xff]);
        space.make_writable(INTERRUPT_LINE, &[0xff]);
        for bar in bars {
            assert!(bar.size.is_power_of_two() && bar.size >= 4096);
            let mask = !(bar.size - 1);
            let register = BAR0 + 4 * bar.index;
            if bar.wide {
                space.make_writable(register, &mask.to_le_bytes());
                space.set(register, &[BAR_64BIT]);
            } else {
                space.make_writable(register, &(mask as u32).to_le_bytes());
            }
        }
        space
    }

    /// The BARs' positions, shared with whoever routes accesses.
    #[must_use]
    pub fn decode(&self) -> Arc<BarDecode> {
        self.decode.clone()
    }

    /// The BARs that the function has.
    pub fn bars(&self) -> impl Iterator<Item = BarSpec> + '_ {
        self.decode.bars.iter().map(|bar| bar.spec)
    }

    /// Sets what is read at `offset` after reset. The guest cannot change it unless it is writable.
    fn set(&mut self, offset: usize, value: &[u8]) {
        self.bytes[offset..offset + value.len()].copy_from_slice(value);
        self.initial[offset..offset + value.len()].copy_from_slice(value);
    }

    /// Lets the guest change the bits of `mask` at `offset`.
    pub fn make_writable(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// Appends a capability (clause 6.7) of that identifier, whose bytes behind the two of its
    /// header are `body`, and returns its offset.
    ///
    /// # Panics
    ///
    /// The configuration space is full, which is a fault in the device's code.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let offset = self.next_capability;
        self.next_capability = (offset + 2 + body.len()).next_multiple_of(4);
        assert!(self.next_capability <= 256, "too many capabilities");
        self.set(self.capability_link, &[offset as u8]);
        self.set(offset, &[id, 0]);
        self.set(offset + 2, body);
        self.set(STATUS, &[STATUS_CAPABILITIES]);
        self.capability_link = offset + 1;
        offset
    }

    /// Places BAR `index` at `address` for every reset from now on.
    pub fn place_bar(&mut self, bar: BarSpec, address: u64) {
        let register = BAR0 + 4 * bar.index;
        let kind = if bar.wide { BAR_64BIT } else { 0 };
        self.set(register, &(address as u32 | u32::from(kind)).to_le_bytes());
        if bar.wide {
            self.set(register + 4, &((address >> 32) as u32).to_le_bytes());
        }
        self.refresh_decode();
    }

    /// Says that the function uses INTA, and which interrupt line that is.
    pub fn set_interrupt(&mut self, line: u8) {
        self.set(INTERRUPT_LINE, &[line]);
        self.set(INTERRUPT_PIN, &[1]);
    }

    /// The command register.
    #[must_use]
    pub fn command(&self) -> u16 {
        self.u16_at(COMMAND)
    }

    /// The 16-bit register at `offset`.
    #[must_use]
    pub fn u16_at(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    /// The 32-bit register at `offset`.
    #[must_use]
    pub fn u32_at(&self, offset: usize) -> u32 {
        u32::from(self.u16_at(offset)) | u32::from(self.u16_at(offset + 2)) << 16
    }

    /// Reads at `offset`; what lies beyond reads as ones.
    pub fn read(&self, offset: u8, data: &mut [u8]) {
        let start = usize::from(offset);
        match self.bytes.get(start..start + data.len()) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0xff),
        }
    }

    /// Writes the writable bits at `offset`.
    pub fn write(&mut self, offset: u8, data: &[u8]) {
        let start = usize::from(offset);
        if start + data.len() > self.bytes.len() {
            return;
        }
        for (at, &value) in (start..).zip(data) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | value & mask;
        }
        self.refresh_decode();
    }

    /// Back to what it was when the machine was assembled.
    pub fn reset(&mut self) {
        self.bytes = self.initial;
        self.refresh_decode();
    }

    /// The bytes, to be saved.
    #[must_use]
    pub fn save(&self) -> Vec<u8> {
        self.bytes.to_vec()
    }

    /// Whether `bytes` differ from ours only where a guest may have changed them.
    #[must_use]
    pub fn accepts(&self, bytes: &[u8]) -> bool {
        bytes.len() == self.bytes.len()
            && (0..self.bytes.len())
                .all(|at| (bytes[at] ^ self.bytes[at]) & !self.writable[at] == 0)
    }

    /// Takes saved bytes, if [`ConfigSpace::accepts`] does.
    pub fn restore(&mut self, bytes: &[u8]) {
        if self.accepts(bytes) {
            self.bytes.copy_from_slice(bytes);
            self.refresh_decode();
        }
    }

    fn refresh_decode(&self) {
        let on = self.command() & command::MEMORY != 0;
        for bar in &self.decode.bars {
            let register = BAR0 + 4 * bar.spec.index;
            let low = u64::from(self.u32_at(register) & !0xf);
            let high = if bar.spec.wide {
                u64::from(self.u32_at(register + 4)) << 32
            } else {
                0
            };
            let base = if on { high | low } else { NOT_DECODED };
            bar.base.store(base, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WIDE: BarSpec = BarSpec {
        index: 0,
        size: 0x8000,
        wide: true,
    };
    const NARROW: BarSpec = BarSpec {
        index: 2,
        size: 0x1000,
        wide: false,
    };

    fn space() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1044,
            revision: 1,
            class: 0x00ff00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        ConfigSpace::new(identity, &[WIDE, NARROW])
    }

    fn read_u32(space: &ConfigSpace, offset: u8) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_header_says_what_the_function_is_and_cannot_be_changed() {
        let mut space = space();
        for offset in (0..=252).step_by(4) {
            space.write(offset, &[0xff; 4]);
        }
        assert_eq!(read_u32(&space, 0x00), 0x1044_1af4);
        assert_eq!(read_u32(&space, 0x08), 0x00ff_0001);
        assert_eq!(read_u32(&space, 0x2c), 0x1100_1af4);
        assert_eq!(read_u32(&space, 0x04), 0x0406);
    }

    #[test]
    fn a_bar_shows_its_size_and_keeps_its_kind() {
        let mut space = space();
        for (register, sized) in [
            (0x10, 0xffff_8004),
            (0x14, 0xffff_ffff),
            (0x18, 0xffff_f000),
            (0x1c, 0),
        ] {
            space.write(register, &[0xff; 4]);
            assert_eq!(read_u32(&space, register), sized, "{register:#x}");
        }
    }

    #[test]
    fn a_bar_answers_where_the_guest_put_it_once_decoding_is_on() {
        let mut space = space();
        space.place_bar(WIDE, 0x4_0000_0000);
        space.place_bar(NARROW, 0xc000_0000);
        let decode = space.decode();
        assert_eq!(decode.find(0xc000_0010), None);
        space.write(0x04, &command::MEMORY.to_le_bytes());
        assert_eq!(decode.find(0xc000_0010), Some((2, 0x10)));
        assert_eq!(decode.find(0x4_0000_7fff), Some((0, 0x7fff)));
        assert_eq!(decode.find(0x4_0000_8000), None);
        space.write(0x18, &0xc123_4000_u32.to_le_bytes());
        assert_eq!(decode.find(0xc000_0010), None);
        assert_eq!(decode.base(2), Some(0xc123_4000));
        space.reset();
        assert_eq!(decode.base(2), None);
        assert_eq!(read_u32(&space, 0x18), 0xc000_0000);
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        assert_eq!(space.u16_at(STATUS), 0);
        let first = space.add_capability(9, &[1, 2, 3]);
        let second = space.add_capability(0x11, &[]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(read_u32(&space, 0x34), 0x40);
        assert_eq!(read_u32(&space, 0x40), 0x0201_4809);
        assert_eq!(space.u16_at(second), 0x11);
        assert_eq!(space.u16_at(STATUS), 1 << 4);
    }

    #[test]
    fn saved_bytes_may_differ_only_where_the_guest_may_write() {
        let mut space = space();
        space.write(0x18, &0xc123_4000_u32.to_le_bytes());
        let mut saved = space.save();
        space.reset();
        assert!(space.accepts(&saved));
        saved[0] ^= 1;
        assert!(!space.accepts(&saved));
        assert!(!space.accepts(&saved[..255]));
    }
}
