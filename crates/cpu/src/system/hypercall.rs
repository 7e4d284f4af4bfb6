//! Hypercalls: VMCALL and VMMCALL, which leave the guest at every privilege level and in every mode
//! (SDM volume 3, 26.1.2; AMD APM volume 2, 15.9).

use iced_x86::{Instruction, Mnemonic};

use crate::error::Exception;
use crate::processor::{Environment, Executed, Flow, Processor};
use crate::state::Mode;

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RSI: usize = 6;

/// What a guest asks of its hypervisor, in the registers that KVM's convention has. Outside 64-bit code
/// all of them have 32 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hypercall {
    /// RAX.
    pub number: u64,
    /// RBX, RCX, RDX and RSI.
    pub arguments: [u64; 4],
    /// Whether it comes from 64-bit code.
    pub wide: bool,
    /// The privilege level that it comes from, which the hypervisor has to look at.
    pub cpl: u8,
}

impl Processor {
    /// Executes the instruction if it is one of this module's.
    pub(super) fn hypercall_instruction(
        &mut self,
        env: &dyn Environment,
        instruction: &Instruction,
    ) -> Option<Executed> {
        matches!(instruction.mnemonic(), Mnemonic::Vmcall | Mnemonic::Vmmcall)
            .then(|| self.call_hypervisor(env).map(|()| Flow::Next))
    }

    fn call_hypervisor(&mut self, env: &dyn Environment) -> Result<(), Exception> {
        let wide = self.state.mode() == Mode::Bits64;
        let mask = if wide { u64::MAX } else { u32::MAX.into() };
        let register = |index| self.state.register(index) & mask;
        let call = Hypercall {
            number: register(RAX),
            arguments: [RBX, RCX, RDX, RSI].map(register),
            wide,
            cpl: self.state.cpl(),
        };
        let result = env.hypercall(&call).ok_or(Exception::ud())?;
        self.state.set_register(RAX, result & mask);
        Ok(())
    }
}
