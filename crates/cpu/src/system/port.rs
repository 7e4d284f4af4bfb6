//! IN, OUT, INS and OUTS (SDM volume 1, 19.5).

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use crate::error::Exception;
use crate::execute::operand::segment_name;
use crate::flags::mask;
use crate::mmu::Access;
use crate::processor::{Environment, Executed, Flow, Processor};
use crate::state::{SegmentName, rflags};

/// Iterations of a repeated form before interrupts may come in.
const BUDGET: u32 = 256;
/// Where a TSS says where its I/O permission bitmap begins.
const BITMAP_OFFSET: u64 = 0x66;

/// INS or OUTS, decoded.
#[derive(Clone, Copy)]
struct PortString {
    input: bool,
    size: u8,
    /// Bytes of the address register and the counter.
    address: u8,
    segment: SegmentName,
}

impl Processor {
    /// Executes the instruction if it is one of this module's.
    pub(super) fn port_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        match instruction.mnemonic() {
            Mnemonic::In => Some(self.input(env, instruction)),
            Mnemonic::Out => Some(self.output(env, instruction)),
            Mnemonic::Insb
            | Mnemonic::Insw
            | Mnemonic::Insd
            | Mnemonic::Outsb
            | Mnemonic::Outsw
            | Mnemonic::Outsd => Some(self.port_string(env, instruction)),
            _ => None,
        }
    }

    /// The port that an operand names.
    fn port(&self, instruction: &Instruction, index: u32) -> u16 {
        match instruction.op_kind(index) {
            OpKind::Register => self.read_register(Register::DX) as u16,
            _ => instruction.immediate8().into(),
        }
    }

    fn input(&mut self, env: &dyn Environment, instruction: &Instruction) -> Executed {
        let accumulator = instruction.op_register(0);
        let size = accumulator.size() as u8;
        let port = self.port(instruction, 1);
        self.require_port(env, port, size)?;
        let value = u64::from(env.port_read(port, size)) & mask(size);
        self.write_register(accumulator, value);
        Ok(Flow::Next)
    }

    fn output(&mut self, env: &dyn Environment, instruction: &Instruction) -> Executed {
        let accumulator = instruction.op_register(1);
        let size = accumulator.size() as u8;
        let port = self.port(instruction, 0);
        self.require_port(env, port, size)?;
        env.port_write(port, size, self.read_register(accumulator) as u32);
        Ok(Flow::Next)
    }

    /// #GP unless IOPL or the task's bitmap allows the ports from `port` on.
    fn require_port(
        &mut self,
        env: &dyn Environment,
        port: u16,
        size: u8,
    ) -> Result<(), Exception> {
        if !self.protected() || !self.virtual_8086() && self.state.cpl() <= self.iopl() {
            return Ok(());
        }
        let refuse = Exception::gp(0);
        let task = self.state.tr;
        let limit = u64::from(task.limit);
        let is_32 = task.attributes & 0xd == 9;
        if !is_32 || limit < BITMAP_OFFSET + 1 {
            return Err(refuse);
        }
        let field = self.wrap_linear(task.base.wrapping_add(BITMAP_OFFSET));
        let bitmap = self.load_as(env, field, 2, false)?;
        let offset = bitmap + u64::from(port >> 3);
        if offset + 1 > limit {
            return Err(refuse);
        }
        let word = self.wrap_linear(task.base.wrapping_add(offset));
        let bits = self.load_as(env, word, 2, false)? >> (port & 7);
        if bits & ((1 << size) - 1) == 0 {
            Ok(())
        } else {
            Err(refuse)
        }
    }

    fn port_string(&mut self, env: &dyn Environment, instruction: &Instruction) -> Executed {
        let operation = self.decode_port_string(instruction);
        let port = self.read_register(Register::DX) as u16;
        self.require_port(env, port, operation.size)?;
        if !instruction.has_rep_prefix() && !instruction.has_repne_prefix() {
            self.port_element(env, &operation, port)?;
            return Ok(Flow::Next);
        }
        let counter = match operation.address {
            2 => Register::CX,
            4 => Register::ECX,
            _ => Register::RCX,
        };
        let stepping = self.state.flags & rflags::TF != 0;
        for _ in 0..if stepping { 1 } else { BUDGET } {
            let left = self.read_register(counter);
            if left == 0 {
                return Ok(Flow::Next);
            }
            self.port_element(env, &operation, port)?;
            self.write_register(counter, left - 1);
        }
        Ok(if self.read_register(counter) == 0 {
            Flow::Next
        } else {
            Flow::Again
        })
    }

    fn decode_port_string(&self, instruction: &Instruction) -> PortString {
        let (input, size) = match instruction.code() {
            Code::Insb_m8_DX => (true, 1),
            Code::Insw_m16_DX => (true, 2),
            Code::Insd_m32_DX => (true, 4),
            Code::Outsb_DX_m8 => (false, 1),
            Code::Outsw_DX_m16 => (false, 2),
            _ => (false, 4),
        };
        let address = match instruction.op_kind(if input { 0 } else { 1 }) {
            OpKind::MemorySegSI | OpKind::MemoryESDI => 2,
            OpKind::MemorySegESI | OpKind::MemoryESEDI => 4,
            _ => 8,
        };
        let source = segment_name(instruction.memory_segment()).unwrap_or(SegmentName::Ds);
        PortString {
            input,
            size,
            address,
            segment: if input { SegmentName::Es } else { source },
        }
    }

    /// One element. The memory is checked before the port is read, which may have an effect.
    fn port_element(
        &mut self,
        env: &dyn Environment,
        operation: &PortString,
        port: u16,
    ) -> Result<(), Exception> {
        let register = match (operation.input, operation.address) {
            (true, 2) => Register::DI,
            (true, 4) => Register::EDI,
            (true, _) => Register::RDI,
            (false, 2) => Register::SI,
            (false, 4) => Register::ESI,
            (false, _) => Register::RSI,
        };
        let size = operation.size;
        let offset = self.read_register(register);
        let access = if operation.input {
            Access::Write
        } else {
            Access::Read
        };
        let linear = self.linear(operation.segment, offset, size.into(), access)?;
        if operation.input {
            self.check_write(linear, size)?;
            let value = env.port_read(port, size);
            self.store(env, linear, size, value.into())?;
        } else {
            let value = self.load(env, linear, size)?;
            env.port_write(port, size, value as u32);
        }
        let step = if self.state.flags & rflags::DF != 0 {
            u64::from(size).wrapping_neg()
        } else {
            size.into()
        };
        self.write_register(register, offset.wrapping_add(step));
        Ok(())
    }
}
