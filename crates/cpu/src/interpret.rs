//! Executing micro-operations.
//!
//! One `match` over [`Op`], whose arms are functions specialised by operand size and inlined. RIP is
//! written only when a block is left; until then it follows from the operation's instruction.

mod arithmetic;
mod control;
mod memory;
mod vector;
mod wide;

use crate::error::Exception;
use crate::flags::mask;
use crate::microop::{Block, MicroOp, Op};
use crate::mmu::Rights;
use crate::processor::{Environment, Processor};
use crate::state::{Mode, SLOTS, slot};

/// How the execution of a block ended. RIP and the rest of the state are whole again.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ended {
    /// Instructions that were executed to their end.
    pub(crate) retired: u64,
    /// What the next one raised.
    pub(crate) fault: Option<Exception>,
    /// A repeated instruction has iterations left.
    pub(crate) again: bool,
    /// Interrupts may be deliverable that were not before.
    pub(crate) look: bool,
    /// The last instruction is one after which no single-step trap comes.
    pub(crate) no_trap: bool,
}

impl Ended {
    /// The first instruction could not be fetched.
    pub(crate) fn fault(exception: Exception) -> Self {
        Self {
            fault: Some(exception),
            ..Self::default()
        }
    }
}

/// The block is left; [`Frame`] knows the rest.
struct Exit;

/// What a micro-operation that may leave the block gives.
type Step = Result<(), Exit>;

/// A block in execution.
struct Frame<'a> {
    cpu: &'a mut Processor,
    env: &'a dyn Environment,
    block: &'a Block,
    /// Whose rights its accesses have.
    rights: Rights,
    /// [`crate::memory::Ram::code_epoch`] when the block was known to be up to date.
    epoch: u64,
    /// The instruction before which the block has to end.
    stop: Option<u16>,
    /// RIP is set and the rest of the state whole: nothing more of the block is executed.
    left: bool,
    ended: Ended,
}

impl Frame<'_> {
    #[inline(always)]
    fn get(&self, slot: u8) -> u64 {
        self.cpu.state.file[usize::from(slot) & (SLOTS - 1)]
    }

    #[inline(always)]
    fn set(&mut self, slot: u8, value: u64) {
        self.cpu.state.file[usize::from(slot) & (SLOTS - 1)] = value;
    }

    /// Writes a register of `S` bytes: 4 clear the upper half, 1 and 2 keep the rest.
    #[inline(always)]
    fn put<const S: u8>(&mut self, slot: u8, value: u64) {
        let value = match S {
            8 => value,
            4 => value & mask(4),
            _ => self.get(slot) & !mask(S) | value & mask(S),
        };
        self.set(slot, value);
    }

    /// The left operand, zero-extended.
    #[inline(always)]
    fn left<const S: u8>(&self, op: &MicroOp) -> u64 {
        self.get(op.b) & mask(S)
    }

    /// The right operand, zero-extended.
    #[inline(always)]
    fn right<const S: u8>(&self, op: &MicroOp) -> u64 {
        self.get(op.c).wrapping_add(op.imm as u64) & mask(S)
    }

    /// RIP of the `index`th instruction.
    fn rip_of(&self, index: u16) -> u64 {
        let offset = self.block.offsets.get(usize::from(index)).copied();
        let rip = self
            .get(slot::START)
            .wrapping_add(offset.unwrap_or_default().into());
        match self.cpu.state.mode() {
            Mode::Bits64 => rip,
            _ => rip & 0xffff_ffff,
        }
    }

    /// Ends the block before instruction `index`: the operations up to there are still executed.
    #[cold]
    fn stop_before(&mut self, index: u16) {
        self.stop = Some(self.stop.map_or(index, |stop| stop.min(index)));
    }

    #[cold]
    fn fault<T>(&mut self, op: &MicroOp, exception: Exception) -> Result<T, Exit> {
        self.cpu.state.rip = self.rip_of(op.at);
        self.ended.retired = op.at.into();
        self.ended.fault = Some(exception);
        self.left = true;
        Err(Exit)
    }

    /// The last operation was executed, and the block goes on elsewhere.
    #[inline(always)]
    fn leave(&mut self, op: &MicroOp, rip: u64) -> Step {
        self.cpu.state.rip = rip;
        self.ended.retired = u64::from(op.at) + 1;
        self.left = true;
        Err(Exit)
    }

    fn run(&mut self) {
        let mut ops = self.block.ops.iter();
        for op in ops.by_ref() {
            if self.dispatch(op).is_err() {
                // What has left the block may have asked for its end before that: a store that met code
                // on its first page and a fault on its second.
                match self.stop {
                    Some(stop) if !self.left => self.run_up_to(ops.as_slice(), stop),
                    _ => {}
                }
                return;
            }
        }
        self.end_before(self.block.count() as u16);
    }

    /// Executes what belongs to the instructions before `stop`.
    #[cold]
    fn run_up_to(&mut self, ops: &[MicroOp], stop: u16) {
        for op in ops.iter().take_while(|op| op.at < stop) {
            if self.dispatch(op).is_err() && self.left {
                return;
            }
        }
        if !self.left {
            self.end_before(stop);
        }
    }

    /// The block was executed up to an instruction.
    fn end_before(&mut self, index: u16) {
        self.cpu.state.rip = self.rip_of(index);
        self.ended.retired = index.into();
    }
}

impl Processor {
    /// Executes a block from its first instruction, where RIP is.
    pub(crate) fn run_block(&mut self, env: &dyn Environment, block: &Block, epoch: u64) -> Ended {
        self.state.file[slot::START as usize] = self.state.rip;
        let rights = self.rights();
        let mut frame = Frame {
            cpu: self,
            env,
            block,
            rights,
            epoch,
            stop: None,
            left: false,
            ended: Ended::default(),
        };
        frame.run();
        let ended = frame.ended;
        self.spend(ended.retired);
        ended
    }
}

/// Makes the `match` of a table: `plain` operations just go on, `may_leave` ones give a [`Step`] and may
/// have asked for the block's end.
macro_rules! dispatch {
    ($f:ident, $op:ident; plain { $($plain:ident: $do:expr;)* } may_leave { $($leaver:ident: $step:expr;)* }) => {
        impl Frame<'_> {
            #[inline(always)]
            fn dispatch(&mut self, $op: &MicroOp) -> Step {
                let $f = self;
                match $op.op {
                    $(Op::$plain => $do,)*
                    $(Op::$leaver => {
                        $step?;
                        return if $f.stop.is_none() { Ok(()) } else { Err(Exit) };
                    })*
                }
                Ok(())
            }
        }
    };
}

dispatch! {
    f, op;
    plain {
        Add8: f.add::<1, false>(op);
        Add16: f.add::<2, false>(op);
        Add32: f.add::<4, false>(op);
        Add64: f.add::<8, false>(op);
        Add8F: f.add::<1, true>(op);
        Add16F: f.add::<2, true>(op);
        Add32F: f.add::<4, true>(op);
        Add64F: f.add::<8, true>(op);
        Sub8: f.sub::<1, false>(op);
        Sub16: f.sub::<2, false>(op);
        Sub32: f.sub::<4, false>(op);
        Sub64: f.sub::<8, false>(op);
        Sub8F: f.sub::<1, true>(op);
        Sub16F: f.sub::<2, true>(op);
        Sub32F: f.sub::<4, true>(op);
        Sub64F: f.sub::<8, true>(op);
        And8: f.and::<1, false>(op);
        And16: f.and::<2, false>(op);
        And32: f.and::<4, false>(op);
        And64: f.and::<8, false>(op);
        And8F: f.and::<1, true>(op);
        And16F: f.and::<2, true>(op);
        And32F: f.and::<4, true>(op);
        And64F: f.and::<8, true>(op);
        Or8: f.or::<1, false>(op);
        Or16: f.or::<2, false>(op);
        Or32: f.or::<4, false>(op);
        Or64: f.or::<8, false>(op);
        Or8F: f.or::<1, true>(op);
        Or16F: f.or::<2, true>(op);
        Or32F: f.or::<4, true>(op);
        Or64F: f.or::<8, true>(op);
        Xor8: f.xor::<1, false>(op);
        Xor16: f.xor::<2, false>(op);
        Xor32: f.xor::<4, false>(op);
        Xor64: f.xor::<8, false>(op);
        Xor8F: f.xor::<1, true>(op);
        Xor16F: f.xor::<2, true>(op);
        Xor32F: f.xor::<4, true>(op);
        Xor64F: f.xor::<8, true>(op);
        Shl8: f.shl::<1, false>(op);
        Shl16: f.shl::<2, false>(op);
        Shl32: f.shl::<4, false>(op);
        Shl64: f.shl::<8, false>(op);
        Shl8F: f.shl::<1, true>(op);
        Shl16F: f.shl::<2, true>(op);
        Shl32F: f.shl::<4, true>(op);
        Shl64F: f.shl::<8, true>(op);
        Shr8: f.shr::<1, false>(op);
        Shr16: f.shr::<2, false>(op);
        Shr32: f.shr::<4, false>(op);
        Shr64: f.shr::<8, false>(op);
        Shr8F: f.shr::<1, true>(op);
        Shr16F: f.shr::<2, true>(op);
        Shr32F: f.shr::<4, true>(op);
        Shr64F: f.shr::<8, true>(op);
        Sar8: f.sar::<1, false>(op);
        Sar16: f.sar::<2, false>(op);
        Sar32: f.sar::<4, false>(op);
        Sar64: f.sar::<8, false>(op);
        Sar8F: f.sar::<1, true>(op);
        Sar16F: f.sar::<2, true>(op);
        Sar32F: f.sar::<4, true>(op);
        Sar64F: f.sar::<8, true>(op);
        Adc8F: f.adc::<1>(op);
        Adc16F: f.adc::<2>(op);
        Adc32F: f.adc::<4>(op);
        Adc64F: f.adc::<8>(op);
        Sbb8F: f.sbb::<1>(op);
        Sbb16F: f.sbb::<2>(op);
        Sbb32F: f.sbb::<4>(op);
        Sbb64F: f.sbb::<8>(op);
        Inc8F: f.inc::<1>(op);
        Inc16F: f.inc::<2>(op);
        Inc32F: f.inc::<4>(op);
        Inc64F: f.inc::<8>(op);
        Dec8F: f.dec::<1>(op);
        Dec16F: f.dec::<2>(op);
        Dec32F: f.dec::<4>(op);
        Dec64F: f.dec::<8>(op);
        Rol8F: f.rol::<1>(op);
        Rol16F: f.rol::<2>(op);
        Rol32F: f.rol::<4>(op);
        Rol64F: f.rol::<8>(op);
        Ror8F: f.ror::<1>(op);
        Ror16F: f.ror::<2>(op);
        Ror32F: f.ror::<4>(op);
        Ror64F: f.ror::<8>(op);
        Imul16F: f.imul::<2>(op);
        Imul32F: f.imul::<4>(op);
        Imul64F: f.imul::<8>(op);
        MulWide32F: f.mul_wide::<4>(op);
        ImulWide32F: f.imul_wide::<4>(op);
        BitTest32F: f.bit_test::<4>(op);
        Lea32: f.lea::<4>(op);
        Swap32: f.swap::<4>(op);
        MulWide64F: f.mul_wide::<8>(op);
        ImulWide64F: f.imul_wide::<8>(op);
        BitTest64F: f.bit_test::<8>(op);
        Lea64: f.lea::<8>(op);
        Swap64: f.swap::<8>(op);
        Move8: f.put::<1>(op.a, f.get(op.b));
        Move16: f.put::<2>(op.a, f.get(op.b));
        Move32: f.put::<4>(op.a, f.get(op.b));
        Move64: f.put::<8>(op.a, f.get(op.b));
        Const: f.set(op.a, op.imm as u64);
        Extend8To16: f.put::<2>(op.a, f.get(op.b) as i8 as u64);
        Extend8To32: f.put::<4>(op.a, f.get(op.b) as i8 as u64);
        Extend8To64: f.put::<8>(op.a, f.get(op.b) as i8 as u64);
        Extend16To32: f.put::<4>(op.a, f.get(op.b) as i16 as u64);
        Extend16To64: f.put::<8>(op.a, f.get(op.b) as i16 as u64);
        Extend32To64: f.put::<8>(op.a, f.get(op.b) as i32 as u64);
        Zero8: f.set(op.a, f.get(op.b) & 0xff);
        Zero16: f.set(op.a, f.get(op.b) & 0xffff);
        ExtractHigh: f.set(op.a, f.get(op.b) >> 8 & 0xff);
        InsertHigh: f.set(op.a, f.get(op.a) & !0xff00 | (f.get(op.b) & 0xff) << 8);
        SetIf: f.set_if(op);
        MoveIf16: f.move_if::<2>(op);
        MoveIf32: f.move_if::<4>(op);
        MoveIf64: f.move_if::<8>(op);
        VectorMove: f.vector_move(op);
        VectorMoveLow8: f.vector_move_low::<8>(op);
        VectorMoveLow4: f.vector_move_low::<4>(op);
        VectorMoveZero8: f.vector_move_zero(op);
        VectorFrom4: f.vector_from::<4>(op);
        VectorFrom8: f.vector_from::<8>(op);
        VectorTo4: f.vector_to::<4>(op);
        VectorTo8: f.vector_to::<8>(op);
        VectorConst: f.vector_const(op);
        VectorInteger: f.vector_integer(op);
        VectorMask: f.vector_mask(op);
    }
    may_leave {
        Complex: f.complex(op);
        Load8: f.load::<1>(op);
        LoadForWrite8: f.load_for_write::<1>(op);
        Store8: f.store::<1>(op);
        Load16: f.load::<2>(op);
        LoadForWrite16: f.load_for_write::<2>(op);
        Store16: f.store::<2>(op);
        Load32: f.load::<4>(op);
        LoadForWrite32: f.load_for_write::<4>(op);
        Store32: f.store::<4>(op);
        Load64: f.load::<8>(op);
        LoadForWrite64: f.load_for_write::<8>(op);
        Store64: f.store::<8>(op);
        LoadSigned8To32: f.load_signed::<1, 4>(op);
        LoadSigned8To64: f.load_signed::<1, 8>(op);
        LoadSigned16To32: f.load_signed::<2, 4>(op);
        LoadSigned16To64: f.load_signed::<2, 8>(op);
        LoadSigned32To64: f.load_signed::<4, 8>(op);
        VectorLoad16: f.vector_load::<false>(op);
        VectorLoad16A: f.vector_load::<true>(op);
        VectorLoad8: f.vector_load_part::<8>(op);
        VectorLoad4: f.vector_load_part::<4>(op);
        VectorLoad2: f.vector_load_part::<2>(op);
        VectorStore16: f.vector_store::<false>(op);
        VectorStore16A: f.vector_store::<true>(op);
        VectorStore8: f.vector_store_part::<8>(op);
        VectorStore4: f.vector_store_part::<4>(op);
        VectorFloat: f.vector_float(op);
        VectorImmediate: f.vector_immediate(op);
        VectorCompareF: f.vector_compare(op);
        VectorConvertFrom: f.vector_convert_from(op);
        VectorConvertTo: f.vector_convert_to(op);
        Push: f.push(op);
        Pop: f.pop(op);
        Jump: f.jump(op);
        JumpTo: f.jump_to(op);
        Call: f.call(op);
        CallTo: f.call_to(op);
        Return: f.return_to(op);
        JumpIf: f.jump_if(op);
        Divide32: f.divide::<4>(op);
        DivideSigned32: f.divide_signed::<4>(op);
        Divide64: f.divide::<8>(op);
        DivideSigned64: f.divide_signed::<8>(op);
        CmpJumpE32: f.compare_jump::<4>(op, |l, r| l == r);
        CmpJumpNe32: f.compare_jump::<4>(op, |l, r| l != r);
        CmpJumpB32: f.compare_jump::<4>(op, |l, r| l < r);
        CmpJumpAe32: f.compare_jump::<4>(op, |l, r| l >= r);
        CmpJumpBe32: f.compare_jump::<4>(op, |l, r| l <= r);
        CmpJumpA32: f.compare_jump::<4>(op, |l, r| l > r);
        CmpJumpL32: f.compare_jump::<4>(op, |l, r| (l as i32) < r as i32);
        CmpJumpGe32: f.compare_jump::<4>(op, |l, r| (l as i32) >= r as i32);
        CmpJumpLe32: f.compare_jump::<4>(op, |l, r| (l as i32) <= r as i32);
        CmpJumpG32: f.compare_jump::<4>(op, |l, r| (l as i32) > r as i32);
        TestJumpE32: f.test_jump::<4>(op, |v| v == 0);
        TestJumpNe32: f.test_jump::<4>(op, |v| v != 0);
        TestJumpS32: f.test_jump::<4>(op, |v| (v as i32) < 0);
        TestJumpNs32: f.test_jump::<4>(op, |v| v as i32 >= 0);
        CmpJumpE64: f.compare_jump::<8>(op, |l, r| l == r);
        CmpJumpNe64: f.compare_jump::<8>(op, |l, r| l != r);
        CmpJumpB64: f.compare_jump::<8>(op, |l, r| l < r);
        CmpJumpAe64: f.compare_jump::<8>(op, |l, r| l >= r);
        CmpJumpBe64: f.compare_jump::<8>(op, |l, r| l <= r);
        CmpJumpA64: f.compare_jump::<8>(op, |l, r| l > r);
        CmpJumpL64: f.compare_jump::<8>(op, |l, r| (l as i64) < r as i64);
        CmpJumpGe64: f.compare_jump::<8>(op, |l, r| (l as i64) >= r as i64);
        CmpJumpLe64: f.compare_jump::<8>(op, |l, r| (l as i64) <= r as i64);
        CmpJumpG64: f.compare_jump::<8>(op, |l, r| (l as i64) > r as i64);
        TestJumpE64: f.test_jump::<8>(op, |v| v == 0);
        TestJumpNe64: f.test_jump::<8>(op, |v| v != 0);
        TestJumpS64: f.test_jump::<8>(op, |v| (v as i64) < 0);
        TestJumpNs64: f.test_jump::<8>(op, |v| v as i64 >= 0);
    }
}
