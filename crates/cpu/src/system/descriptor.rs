//! Segment and gate descriptors, and the tables that hold them (SDM volume 3, 3.4.5, 3.5 and 7.2).

use crate::error::{Exception, Vector};
use crate::processor::{Environment, Processor};
use crate::state::{DescriptorTable, Segment};

/// The index and the table of a selector: what error codes name.
pub(super) const fn index_of(selector: u16) -> u32 {
    selector as u32 & 0xfffc
}

/// The privilege level that a selector asks for.
pub(super) const fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

/// Whether it is a null selector.
pub(super) const fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// Types of system descriptors (SDM volume 3, table 3-2).
pub(super) mod kind {
    pub(in crate::system) const TSS_16: u8 = 1;
    pub(in crate::system) const LDT: u8 = 2;
    pub(in crate::system) const CALL_GATE_16: u8 = 4;
    pub(in crate::system) const TASK_GATE: u8 = 5;
    pub(in crate::system) const INTERRUPT_GATE_16: u8 = 6;
    pub(in crate::system) const TRAP_GATE_16: u8 = 7;
    pub(in crate::system) const TSS: u8 = 9;
    pub(in crate::system) const CALL_GATE: u8 = 12;
    pub(in crate::system) const INTERRUPT_GATE: u8 = 14;
    pub(in crate::system) const TRAP_GATE: u8 = 15;
    /// Set in a TSS's type while its task is busy.
    pub(in crate::system) const BUSY: u8 = 2;
}

/// Eight bytes of a descriptor table, and where they are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    pub(super) raw: u64,
    /// Linear address.
    pub(super) address: u64,
}

impl Descriptor {
    const fn bits(&self, shift: u32, count: u32) -> u64 {
        self.raw >> shift & ((1 << count) - 1)
    }

    /// The four type bits.
    pub(super) const fn kind(&self) -> u8 {
        self.bits(40, 4) as u8
    }

    /// Neither code nor data.
    pub(super) const fn is_system(&self) -> bool {
        self.bits(44, 1) == 0
    }

    pub(super) const fn is_code(&self) -> bool {
        !self.is_system() && self.kind() & 8 != 0
    }

    pub(super) const fn is_conforming(&self) -> bool {
        self.is_code() && self.kind() & 4 != 0
    }

    pub(super) const fn is_writable_data(&self) -> bool {
        !self.is_system() && self.kind() & 0xa == 2
    }

    /// Data, or code that may be read.
    pub(super) const fn is_readable(&self) -> bool {
        !self.is_system() && self.kind() & 0xa != 8
    }

    pub(super) const fn dpl(&self) -> u8 {
        self.bits(45, 2) as u8
    }

    pub(super) const fn present(&self) -> bool {
        self.bits(47, 1) != 0
    }

    /// 64-bit code.
    pub(super) const fn is_long(&self) -> bool {
        self.bits(53, 1) != 0
    }

    pub(super) const fn is_big(&self) -> bool {
        self.bits(54, 1) != 0
    }

    pub(super) const fn base(&self) -> u64 {
        self.bits(16, 24) | self.bits(56, 8) << 24
    }

    /// The last offset in bytes.
    pub(super) const fn limit(&self) -> u32 {
        let limit = (self.bits(0, 16) | self.bits(48, 4) << 16) as u32;
        if self.bits(55, 1) != 0 {
            limit << 12 | 0xfff
        } else {
            limit
        }
    }

    /// A gate's target selector.
    pub(super) const fn gate_selector(&self) -> u16 {
        self.bits(16, 16) as u16
    }

    /// A gate's target offset, but for the upper half of those of 16 bytes.
    pub(super) const fn gate_offset(&self) -> u64 {
        self.bits(0, 16) | self.bits(48, 16) << 16
    }

    /// What the hidden part of a segment register takes.
    pub(super) const fn segment(&self, selector: u16) -> Segment {
        Segment {
            selector,
            base: self.base(),
            limit: self.limit(),
            attributes: (self.raw >> 40 & 0xf0ff) as u32,
        }
    }
}

impl Processor {
    /// The table that a selector names, as far as it goes.
    fn descriptor_table(&self, selector: u16) -> Option<DescriptorTable> {
        if selector & 4 == 0 {
            return Some(self.state.gdt);
        }
        let ldt = &self.state.ldt;
        let usable = ldt.attributes & Segment::UNUSABLE == 0 && !is_null(ldt.selector);
        usable.then(|| DescriptorTable {
            base: ldt.base,
            limit: ldt.limit.min(0xffff) as u16,
        })
    }

    /// The linear address of `len` bytes of the descriptor of a selector, if its table has them.
    fn descriptor_address(&self, selector: u16, len: u32) -> Option<u64> {
        let table = self.descriptor_table(selector)?;
        let offset = u32::from(selector & !7);
        let inside = offset + len - 1 <= table.limit.into();
        inside.then(|| self.wrap_linear(table.base.wrapping_add(offset.into())))
    }

    /// Outside 64-bit mode linear addresses have 32 bits.
    pub(super) fn wrap_linear(&self, linear: u64) -> u64 {
        if self.state.long_mode() {
            linear
        } else {
            linear & 0xffff_ffff
        }
    }

    /// The descriptor of a selector; nothing if it is outside its table.
    pub(super) fn find_descriptor(
        &mut self,
        env: &dyn Environment,
        selector: u16,
    ) -> Result<Option<Descriptor>, Exception> {
        let Some(address) = self.descriptor_address(selector, 8) else {
            return Ok(None);
        };
        let raw = self.load_as(env, address, 8, false)?;
        Ok(Some(Descriptor { raw, address }))
    }

    /// The same, where the descriptor must exist: `vector` names the exception that says that it does
    /// not, with the selector as its error code.
    pub(super) fn descriptor_or(
        &mut self,
        env: &dyn Environment,
        selector: u16,
        vector: Vector,
    ) -> Result<Descriptor, Exception> {
        self.find_descriptor(env, selector)?
            .ok_or(Exception::with_code(vector, index_of(selector)))
    }

    /// The base of a system descriptor, which has 16 bytes in IA-32e mode.
    pub(super) fn system_base(
        &mut self,
        env: &dyn Environment,
        selector: u16,
        descriptor: &Descriptor,
    ) -> Result<u64, Exception> {
        if !self.state.long_mode() {
            return Ok(descriptor.base());
        }
        let high = self.upper_half(env, selector)?;
        Ok(descriptor.base() | high << 32)
    }

    /// The third four bytes of a descriptor of 16 bytes; the fourth have to be of type 0.
    pub(super) fn upper_half(
        &mut self,
        env: &dyn Environment,
        selector: u16,
    ) -> Result<u64, Exception> {
        let refuse = Exception::gp(index_of(selector));
        let address = self.descriptor_address(selector, 16).ok_or(refuse)?;
        let upper = self.load_as(env, address.wrapping_add(8), 8, false)?;
        if upper >> 40 & 0x1f != 0 {
            return Err(refuse);
        }
        Ok(upper & 0xffff_ffff)
    }

    /// Sets the accessed bit of a code or data descriptor in memory.
    pub(super) fn mark_accessed(
        &mut self,
        env: &dyn Environment,
        descriptor: &mut Descriptor,
    ) -> Result<(), Exception> {
        if descriptor.kind() & 1 == 0 {
            self.set_kind(env, descriptor, descriptor.kind() | 1)?;
        }
        Ok(())
    }

    /// Writes the type bits of a descriptor in memory: accessed, or busy.
    pub(super) fn set_kind(
        &mut self,
        env: &dyn Environment,
        descriptor: &mut Descriptor,
        kind: u8,
    ) -> Result<(), Exception> {
        descriptor.raw = descriptor.raw & !(0xf << 40) | u64::from(kind) << 40;
        let byte = descriptor.raw >> 40 & 0xff;
        self.store_as(env, descriptor.address.wrapping_add(5), 1, byte, false)
    }
}
