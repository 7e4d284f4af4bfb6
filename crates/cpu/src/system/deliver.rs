//! Delivery of exceptions and interrupts (SDM volume 3, 6.10 to 6.14 and 21.3).

use iced_x86::{Instruction, Mnemonic};

use super::DATA_SEGMENTS;
use super::descriptor::{Descriptor, index_of, is_null, kind};
use super::stack::Stack;
use crate::error::{Exception, Vector};
use crate::mmu::access::is_canonical;
use crate::processor::{Environment, Executed, Flow, Processor};
use crate::state::{Segment, SegmentName, rflags};

/// An event could not be delivered, nor the double fault for that: the processor shuts down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TripleFault;

/// What is delivered.
#[derive(Clone, Copy, Debug)]
struct Event {
    vector: u8,
    error_code: Option<u32>,
    /// By INT n, INT3 or INTO, for which the gate's DPL counts.
    software: bool,
}

impl Event {
    /// The error code that names this event's gate.
    fn gate_code(&self) -> u32 {
        u32::from(self.vector) * 8 + 2
    }

    /// The bit that says that a fault during delivery is not the program's own doing.
    fn external(&self) -> u32 {
        (!self.software).into()
    }
}

/// How exceptions combine to a double fault (SDM volume 3, table 6-5).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
}

const fn class(vector: Vector) -> Class {
    match vector {
        Vector::DivideError
        | Vector::InvalidTss
        | Vector::SegmentNotPresent
        | Vector::StackFault
        | Vector::GeneralProtection => Class::Contributory,
        Vector::PageFault => Class::PageFault,
        _ => Class::Benign,
    }
}

/// Whether RIP is that of the instruction that raised it, which runs again when the handler returns.
const fn is_fault(vector: Vector) -> bool {
    !matches!(
        vector,
        Vector::Debug | Vector::Breakpoint | Vector::Overflow | Vector::DoubleFault
    )
}

/// What a delivery through a gate goes to.
struct Target {
    code: Segment,
    cpl: u8,
    offset: u64,
    /// Bytes of each pushed value.
    size: u8,
    masks_interrupts: bool,
}

impl Processor {
    /// Takes the guest to its handler of an exception.
    pub(crate) fn deliver_exception(
        &mut self,
        env: &dyn Environment,
        exception: Exception,
    ) -> Result<(), TripleFault> {
        let mut exception = exception;
        let (mut rip, flags) = (self.state.rip, self.state.flags);
        loop {
            let second = match self.deliver_one(env, exception) {
                Ok(()) => return Ok(()),
                Err(second) => second,
            };
            if exception.vector == Vector::DoubleFault {
                return Err(TripleFault);
            }
            if second.vector == Vector::PageFault {
                self.state.cr2 = second.address;
            }
            if matches!(exception.vector, Vector::Breakpoint | Vector::Overflow) {
                // It is INT3 or INTO that faults, an instruction of one byte.
                rip = rip.wrapping_sub(1);
            }
            self.state.rip = rip;
            self.state.flags = flags;
            let doubles = match class(exception.vector) {
                Class::Benign => false,
                Class::Contributory => class(second.vector) == Class::Contributory,
                Class::PageFault => class(second.vector) != Class::Benign,
            };
            exception = if doubles {
                Exception::with_code(Vector::DoubleFault, 0)
            } else {
                second
            };
        }
    }

    fn deliver_one(
        &mut self,
        env: &dyn Environment,
        exception: Exception,
    ) -> Result<(), Exception> {
        match exception.vector {
            Vector::PageFault => self.state.cr2 = exception.address,
            Vector::Debug => self.debug_exception_begins(),
            _ => {}
        }
        if is_fault(exception.vector) {
            self.state.flags |= rflags::RF;
        }
        let event = Event {
            vector: exception.vector as u8,
            error_code: exception.error_code,
            software: matches!(exception.vector, Vector::Breakpoint | Vector::Overflow),
        };
        self.deliver(env, event)
    }

    /// Takes the guest to its handler of an interrupt.
    pub(crate) fn deliver_interrupt(
        &mut self,
        env: &dyn Environment,
        vector: u8,
    ) -> Result<(), TripleFault> {
        let event = Event {
            vector,
            error_code: None,
            software: false,
        };
        match self.deliver(env, event) {
            Ok(()) => Ok(()),
            Err(exception) => self.deliver_exception(env, exception),
        }
    }

    /// Executes INT n.
    pub(super) fn interrupt_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        match instruction.mnemonic() {
            Mnemonic::Int => Some(self.software_interrupt(env, instruction)),
            Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => {
                Some(self.interrupt_return(env, instruction))
            }
            _ => None,
        }
    }

    fn software_interrupt(&mut self, env: &dyn Environment, instruction: &Instruction) -> Executed {
        if self.virtual_8086() && self.iopl() < 3 {
            return Err(Exception::gp(0));
        }
        let rip = self.state.rip;
        self.state.rip = self.next_rip(instruction);
        let event = Event {
            vector: instruction.immediate8(),
            error_code: None,
            software: true,
        };
        self.deliver(env, event)
            .inspect_err(|_| self.state.rip = rip)?;
        Ok(Flow::Jump)
    }

    fn deliver(&mut self, env: &dyn Environment, event: Event) -> Result<(), Exception> {
        let delivered = if self.protected() {
            self.deliver_protected(env, event)
        } else {
            self.deliver_real(env, event.vector)
        };
        delivered.map_err(|mut exception| {
            let has_bit = matches!(
                exception.vector,
                Vector::InvalidTss
                    | Vector::SegmentNotPresent
                    | Vector::StackFault
                    | Vector::GeneralProtection
            );
            if let Some(code) = exception.error_code.as_mut().filter(|_| has_bit) {
                *code |= event.external();
            }
            exception
        })
    }

    fn deliver_protected(&mut self, env: &dyn Environment, event: Event) -> Result<(), Exception> {
        let refuse = Exception::gp(event.gate_code());
        let long = self.state.long_mode();
        let entry = if long { 16 } else { 8 };
        let offset = u64::from(event.vector) * entry;
        if offset + entry - 1 > self.state.idt.limit.into() {
            return Err(refuse);
        }
        let address = self.wrap_linear(self.state.idt.base.wrapping_add(offset));
        let raw = self.load_as(env, address, 8, false)?;
        let gate = Descriptor { raw, address };
        let known = match gate.kind() {
            kind::INTERRUPT_GATE | kind::TRAP_GATE => true,
            kind::TASK_GATE | kind::INTERRUPT_GATE_16 | kind::TRAP_GATE_16 => !long,
            _ => false,
        };
        if !gate.is_system() || !known || event.software && gate.dpl() < self.state.cpl() {
            return Err(refuse);
        }
        if !gate.present() {
            let absent = Vector::SegmentNotPresent;
            return Err(Exception::with_code(absent, event.gate_code()));
        }
        if gate.kind() == kind::TASK_GATE {
            return self.task_by_gate(env, gate.gate_selector(), event.error_code);
        }
        let upper = if long {
            self.load_as(env, address.wrapping_add(8), 4, false)?
        } else {
            0
        };
        let target = self.gate_target(env, &gate, upper)?;
        if long {
            let table = (gate.raw >> 32 & 7) as u8;
            self.enter_long(env, event, &target, table)
        } else {
            self.enter_short(env, event, &target)
        }
    }

    /// The code segment that a gate of the interrupt table names, and what else its type says.
    fn gate_target(
        &mut self,
        env: &dyn Environment,
        gate: &Descriptor,
        upper: u64,
    ) -> Result<Target, Exception> {
        let selector = gate.gate_selector();
        if is_null(selector) {
            return Err(Exception::gp(0));
        }
        let refuse = Exception::gp(index_of(selector));
        let mut code = self.descriptor_or(env, selector, Vector::GeneralProtection)?;
        let cpl = self.state.cpl();
        let long = self.state.long_mode();
        if !code.is_code()
            || code.dpl() > cpl
            || long && (!code.is_long() || code.is_big())
            || self.virtual_8086() && (code.is_conforming() || code.dpl() != 0)
        {
            return Err(refuse);
        }
        if !code.present() {
            let absent = Vector::SegmentNotPresent;
            return Err(Exception::with_code(absent, index_of(selector)));
        }
        let new_cpl = if code.is_conforming() {
            cpl
        } else {
            code.dpl()
        };
        let offset = gate.gate_offset() | upper << 32;
        let wide = matches!(gate.kind(), kind::INTERRUPT_GATE | kind::TRAP_GATE);
        let offset = if wide { offset } else { offset & 0xffff };
        let inside = if long {
            is_canonical(offset)
        } else {
            offset <= code.limit().into()
        };
        if !inside {
            return Err(Exception::gp(0));
        }
        self.mark_accessed(env, &mut code)?;
        Ok(Target {
            code: code.segment(selector & !3 | u16::from(new_cpl)),
            cpl: new_cpl,
            offset,
            size: match (long, wide) {
                (true, _) => 8,
                (false, true) => 4,
                (false, false) => 2,
            },
            masks_interrupts: matches!(gate.kind(), kind::INTERRUPT_GATE | kind::INTERRUPT_GATE_16),
        })
    }

    /// Delivery in IA-32e mode: always to 64-bit code, always with SS and RSP on the stack.
    fn enter_long(
        &mut self,
        env: &dyn Environment,
        event: Event,
        target: &Target,
        table: u8,
    ) -> Result<(), Exception> {
        let cpl = self.state.cpl();
        let old_stack = *self.state.segment(SegmentName::Ss);
        let pointer = if table != 0 {
            self.task_stack_64(env, 0x24 + 8 * (u64::from(table) - 1))?
        } else if target.cpl < cpl {
            self.task_stack_64(env, 4 + 8 * u64::from(target.cpl))?
        } else {
            self.state.register(4)
        };
        let segment = if target.cpl < cpl {
            self.null_stack(target.cpl.into(), target.cpl)
        } else {
            old_stack
        };
        let mut stack = Stack::long(segment, pointer & !15, target.cpl);
        let values = [
            old_stack.selector.into(),
            self.state.register(4),
            self.state.rflags(),
            self.state.segment(SegmentName::Cs).selector.into(),
            self.state.rip,
        ];
        self.push_frame(env, &mut stack, 8, &values, event.error_code)?;
        self.commit(target, &stack);
        Ok(())
    }

    /// Delivery in protected mode; out of virtual-8086 mode with the data segments on the stack.
    fn enter_short(
        &mut self,
        env: &dyn Environment,
        event: Event,
        target: &Target,
    ) -> Result<(), Exception> {
        let from_8086 = self.virtual_8086();
        let selector = |cpu: &Self, name| u64::from(cpu.state.segment(name).selector);
        let switches = target.cpl < self.state.cpl();
        let mut stack = if switches {
            let (segment, pointer) = self.task_stack(env, target.cpl)?;
            Stack::short(segment, pointer, target.cpl)
        } else {
            self.current_stack()
        };
        let mut values = [0; 9];
        let mut count = 0;
        let mut add = |value| {
            values[count] = value;
            count += 1;
        };
        if from_8086 {
            for name in DATA_SEGMENTS.into_iter().rev() {
                add(selector(self, name));
            }
        }
        if switches {
            add(selector(self, SegmentName::Ss));
            add(self.state.register(4));
        }
        add(self.state.rflags());
        add(selector(self, SegmentName::Cs));
        add(self.state.rip);
        let frame = &values[..count];
        self.push_frame(env, &mut stack, target.size, frame, event.error_code)?;
        if from_8086 {
            for name in DATA_SEGMENTS {
                let segment = self.null_segment(name, 0);
                self.state.set_segment(name, segment);
            }
        }
        self.commit(target, &stack);
        Ok(())
    }

    fn push_frame(
        &mut self,
        env: &dyn Environment,
        stack: &mut Stack,
        size: u8,
        values: &[u64],
        error_code: Option<u32>,
    ) -> Result<(), Exception> {
        for &value in values {
            self.push_on(env, stack, size, value)?;
        }
        match error_code {
            Some(code) => self.push_on(env, stack, size, code.into()),
            None => Ok(()),
        }
    }

    /// Everything is on the stack: goes to the handler.
    fn commit(&mut self, target: &Target, stack: &Stack) {
        self.state.set_segment(SegmentName::Ss, stack.segment);
        self.set_stack_pointer(stack);
        self.state.set_segment(SegmentName::Cs, target.code);
        self.state.rip = target.offset;
        let mut cleared = rflags::TF | rflags::NT | rflags::RF | rflags::VM;
        if target.masks_interrupts {
            cleared |= rflags::IF;
        }
        self.state.flags &= !cleared;
    }
}
