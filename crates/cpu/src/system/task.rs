//! Task state: the stacks in a TSS, and task switches (SDM volume 3, 7.2 and 7.3).

use super::cr0;
use super::descriptor::{Descriptor, index_of, is_null, kind, rpl};
use super::stack::Stack;
use crate::error::{Exception, Vector};
use crate::processor::{Environment, Processor};
use crate::state::{Segment, SegmentName, rflags};

/// How a task is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    /// By JMP: the old task ends.
    Jump,
    /// By CALL, an exception or an interrupt: the old task waits for IRET.
    Nested,
    /// By IRET, back to a task that waits.
    Return,
}

/// Offsets of a TSS's fields.
struct Layout {
    /// Bytes of a register.
    size: u8,
    rip: u64,
    registers: u64,
    segments: u64,
    count: usize,
    ldt: u64,
    last: u64,
}

const TSS_32: Layout = Layout {
    size: 4,
    rip: 0x20,
    registers: 0x28,
    segments: 0x48,
    count: 6,
    ldt: 0x60,
    last: 0x67,
};
const TSS_16: Layout = Layout {
    size: 2,
    rip: 0x0e,
    registers: 0x12,
    segments: 0x22,
    count: 4,
    ldt: 0x2a,
    last: 0x2b,
};
/// Where a TSS holds CR3.
const CR3: u64 = 0x1c;
/// The segment registers in a TSS's order, which is the encoding's.
const SEGMENTS: [SegmentName; 6] = [
    SegmentName::Es,
    SegmentName::Cs,
    SegmentName::Ss,
    SegmentName::Ds,
    SegmentName::Fs,
    SegmentName::Gs,
];

/// What a TSS says of a task that begins.
struct Incoming {
    cr3: Option<u64>,
    rip: u64,
    flags: u64,
    registers: [u64; 8],
    selectors: [u16; 6],
    ldt: u16,
}

impl Processor {
    fn task_is_32(&self) -> bool {
        self.state.tr.attributes & 8 != 0
    }

    /// A field of the current TSS; #TS if it is beyond its limit.
    fn task_field(
        &mut self,
        env: &dyn Environment,
        offset: u64,
        size: u8,
    ) -> Result<u64, Exception> {
        let task = self.state.tr;
        if offset + u64::from(size) - 1 > task.limit.into() {
            return Err(Exception::with_code(
                Vector::InvalidTss,
                index_of(task.selector),
            ));
        }
        let linear = self.wrap_linear(task.base.wrapping_add(offset));
        self.load_as(env, linear, size, false)
    }

    /// A stack pointer of a 64-bit TSS.
    pub(super) fn task_stack_64(
        &mut self,
        env: &dyn Environment,
        offset: u64,
    ) -> Result<u64, Exception> {
        self.task_field(env, offset, 8)
    }

    /// The stack for a privilege level of a 16- or 32-bit TSS.
    pub(super) fn task_stack(
        &mut self,
        env: &dyn Environment,
        cpl: u8,
    ) -> Result<(Segment, u64), Exception> {
        let level = u64::from(cpl);
        let (pointer, selector) = if self.task_is_32() {
            let at = 4 + 8 * level;
            (
                self.task_field(env, at, 4)?,
                self.task_field(env, at + 4, 2)?,
            )
        } else {
            let at = 2 + 4 * level;
            (
                self.task_field(env, at, 2)?,
                self.task_field(env, at + 2, 2)?,
            )
        };
        let segment = self.stack_segment(env, selector as u16, cpl, Vector::InvalidTss)?;
        Ok((segment, pointer))
    }

    /// Enters the task of a gate in the interrupt table.
    pub(super) fn task_by_gate(
        &mut self,
        env: &dyn Environment,
        selector: u16,
        error_code: Option<u32>,
    ) -> Result<(), Exception> {
        let rip = self.state.rip;
        let descriptor = self.task_descriptor(env, selector, false)?;
        self.switch_task(env, selector, descriptor, Entry::Nested, rip)?;
        match error_code {
            Some(code) => {
                let size = if self.task_is_32() { 4 } else { 2 };
                let mut stack: Stack = self.current_stack();
                self.push_on(env, &mut stack, size, code.into())?;
                self.set_stack_pointer(&stack);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// The TSS descriptor of a selector, which must be busy or not.
    pub(super) fn task_descriptor(
        &mut self,
        env: &dyn Environment,
        selector: u16,
        busy: bool,
    ) -> Result<Descriptor, Exception> {
        let vector = if busy {
            Vector::InvalidTss
        } else {
            Vector::GeneralProtection
        };
        let refuse = Exception::with_code(vector, index_of(selector));
        if is_null(selector) || selector & 4 != 0 {
            return Err(refuse);
        }
        let descriptor = self.descriptor_or(env, selector, vector)?;
        let wanted = if busy { kind::BUSY } else { 0 };
        let matches = descriptor.is_system()
            && matches!(descriptor.kind() & !kind::BUSY, kind::TSS | kind::TSS_16)
            && descriptor.kind() & kind::BUSY == wanted;
        if !matches {
            return Err(refuse);
        }
        if !descriptor.present() {
            let absent = Vector::SegmentNotPresent;
            return Err(Exception::with_code(absent, index_of(selector)));
        }
        Ok(descriptor)
    }

    /// IRET with NT set: back to the task that the current one's link names.
    pub(super) fn task_return(
        &mut self,
        env: &dyn Environment,
        next_rip: u64,
    ) -> Result<(), Exception> {
        let selector = self.task_field(env, 0, 2)? as u16;
        let descriptor = self.task_descriptor(env, selector, true)?;
        self.switch_task(env, selector, descriptor, Entry::Return, next_rip)
    }

    /// Switches to a task; the one that ends would go on at `next_rip`.
    pub(super) fn switch_task(
        &mut self,
        env: &dyn Environment,
        selector: u16,
        mut descriptor: Descriptor,
        entry: Entry,
        next_rip: u64,
    ) -> Result<(), Exception> {
        let wide = descriptor.kind() & 8 != 0;
        let layout = if wide { &TSS_32 } else { &TSS_16 };
        if u64::from(descriptor.limit()) < layout.last {
            return Err(Exception::with_code(Vector::InvalidTss, index_of(selector)));
        }
        let incoming = self.read_task(env, layout, descriptor.base())?;
        let outgoing_flags = match entry {
            Entry::Return => self.state.rflags() & !rflags::NT,
            _ => self.state.rflags(),
        };
        self.write_task(env, next_rip, outgoing_flags)?;
        if entry != Entry::Nested {
            self.mark_old_task_idle(env)?;
        }
        if entry != Entry::Return {
            let busy = descriptor.kind() | kind::BUSY;
            self.set_kind(env, &mut descriptor, busy)?;
        }
        if entry == Entry::Nested {
            let link = self.state.tr.selector.into();
            let base = self.wrap_linear(descriptor.base());
            self.store_as(env, base, 2, link, false)?;
        }
        let nested = if entry == Entry::Nested {
            rflags::NT
        } else {
            0
        };
        self.state.tr = descriptor.segment(selector);
        self.take_task(env, &incoming, wide, nested)
    }

    fn mark_old_task_idle(&mut self, env: &dyn Environment) -> Result<(), Exception> {
        let old = self.state.tr.selector;
        let mut descriptor = self.descriptor_or(env, old, Vector::InvalidTss)?;
        let idle = descriptor.kind() & !kind::BUSY;
        self.set_kind(env, &mut descriptor, idle)
    }

    fn read_task(
        &mut self,
        env: &dyn Environment,
        layout: &Layout,
        base: u64,
    ) -> Result<Incoming, Exception> {
        let size = layout.size;
        let field = |cpu: &mut Self, offset: u64, size: u8| {
            let linear = cpu.wrap_linear(base.wrapping_add(offset));
            cpu.load_as(env, linear, size, false)
        };
        let mut incoming = Incoming {
            cr3: None,
            rip: field(self, layout.rip, size)?,
            flags: field(self, layout.rip + u64::from(size), size)?,
            registers: [0; 8],
            selectors: [0; 6],
            ldt: field(self, layout.ldt, 2)? as u16,
        };
        if size == 4 && self.state.cr0 & cr0::PG != 0 {
            incoming.cr3 = Some(field(self, CR3, 4)?);
        }
        for (index, value) in (0u64..).zip(&mut incoming.registers) {
            *value = field(self, layout.registers + index * u64::from(size), size)?;
        }
        let selectors = incoming.selectors.iter_mut().take(layout.count);
        for (index, selector) in (0u64..).zip(selectors) {
            *selector = field(self, layout.segments + index * u64::from(size), 2)? as u16;
        }
        Ok(incoming)
    }

    /// Saves the current task in its TSS.
    fn write_task(&mut self, env: &dyn Environment, rip: u64, flags: u64) -> Result<(), Exception> {
        let layout = if self.task_is_32() { &TSS_32 } else { &TSS_16 };
        let size = u64::from(layout.size);
        let base = self.state.tr.base;
        let write = |cpu: &mut Self, offset: u64, bytes: u8, value: u64| {
            let linear = cpu.wrap_linear(base.wrapping_add(offset));
            cpu.store_as(env, linear, bytes, value, false)
        };
        write(self, layout.rip, layout.size, rip)?;
        write(self, layout.rip + size, layout.size, flags)?;
        for index in 0..8 {
            let value = self.state.register(index);
            write(
                self,
                layout.registers + index as u64 * size,
                layout.size,
                value,
            )?;
        }
        for (index, name) in (0u64..).zip(SEGMENTS).take(layout.count) {
            let selector = self.state.segment(name).selector;
            write(self, layout.segments + index * size, 2, selector.into())?;
        }
        Ok(())
    }

    /// Loads the registers of a task that begins. Faults from here on are the new task's.
    fn take_task(
        &mut self,
        env: &dyn Environment,
        incoming: &Incoming,
        wide: bool,
        nested: u64,
    ) -> Result<(), Exception> {
        if let Some(root) = incoming.cr3 {
            self.state.cr3 = root;
            self.tlb.flush_non_global();
        }
        self.state.cr0 |= cr0::TS;
        for (index, value) in incoming.registers.into_iter().enumerate() {
            let old = self.state.register(index);
            let value = if wide { value } else { old & !0xffff | value };
            self.state.set_register(index, value);
        }
        self.state.rip = incoming.rip;
        self.state.set_rflags(incoming.flags | nested);
        for (name, selector) in SEGMENTS.into_iter().zip(incoming.selectors) {
            let null = self.null_segment(name, selector);
            self.state.set_segment(name, null);
        }
        self.load_ldt(env, incoming.ldt, Vector::InvalidTss)?;
        if self.virtual_8086() {
            for (name, selector) in SEGMENTS.into_iter().zip(incoming.selectors) {
                let segment = self.real_segment(name, selector);
                self.state.set_segment(name, segment);
            }
            return Ok(());
        }
        self.load_task_segments(env, &incoming.selectors)
    }

    fn load_task_segments(
        &mut self,
        env: &dyn Environment,
        selectors: &[u16; 6],
    ) -> Result<(), Exception> {
        let [es, cs, ss, ds, fs, gs] = *selectors;
        let cpl = rpl(cs);
        self.set_cpl(cpl);
        let stack = self.stack_segment(env, ss, cpl, Vector::InvalidTss)?;
        self.state.set_segment(SegmentName::Ss, stack);
        let as_tss = |mut exception: Exception| {
            if exception.vector == Vector::GeneralProtection {
                exception.vector = Vector::InvalidTss;
            }
            exception
        };
        let rip = self.state.rip;
        let code = self.return_code_segment(env, cs, 0).map_err(as_tss)?;
        self.state.set_segment(SegmentName::Cs, code);
        for (name, selector) in [
            (SegmentName::Es, es),
            (SegmentName::Ds, ds),
            (SegmentName::Fs, fs),
            (SegmentName::Gs, gs),
        ] {
            self.load_segment(env, name, selector).map_err(as_tss)?;
        }
        if rip > code.limit.into() {
            return Err(Exception::gp(0));
        }
        Ok(())
    }
}
