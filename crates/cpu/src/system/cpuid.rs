//! CPUID, with the bits that follow the processor's own state.

use crate::processor::{Environment, Processor};

impl Processor {
    /// Executes CPUID.
    pub(super) fn identify(&mut self, env: &dyn Environment) {
        const OSXSAVE: u32 = 27;
        const CR4_OSXSAVE: u32 = 18;
        let leaf = self.state.register(0) as u32;
        let subleaf = self.state.register(1) as u32;
        let [eax, ebx, mut ecx, edx] = env.cpuid(leaf, subleaf);
        if leaf == 1 {
            let on = self.state.cr4 >> CR4_OSXSAVE & 1;
            ecx = ecx & !(1 << OSXSAVE) | (on as u32) << OSXSAVE;
        }
        for (register, value) in [(0, eax), (3, ebx), (1, ecx), (2, edx)] {
            self.state.set_register(register, value.into());
        }
    }
}
