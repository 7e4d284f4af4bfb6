//! What the core is connected to.

use crate::system::Hypercall;

/// What is around the processor's core. Called from inside [`super::Processor::run`]. What is not implemented
/// is an empty board: no devices at ports, no MSRs, no interrupts, a clock that stands still.
pub trait Environment {
    /// An `in` instruction of 1, 2 or 4 bytes.
    fn port_read(&self, port: u16, size: u8) -> u32 {
        let _ = (port, size);
        u32::MAX
    }
    /// An `out` instruction of 1, 2 or 4 bytes.
    fn port_write(&self, port: u16, size: u8, value: u32) {
        let _ = (port, size, value);
    }
    /// A load of 1, 2, 4 or 8 bytes from a physical address outside RAM.
    fn memory_read(&self, address: u64, size: u8) -> u64;
    /// A store of 1, 2, 4 or 8 bytes to a physical address outside RAM.
    fn memory_write(&self, address: u64, size: u8, value: u64);
    /// CPUID's EAX, EBX, ECX and EDX. The bit that mirrors CR4.OSXSAVE is the processor's.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let _ = (leaf, subleaf);
        [0; 4]
    }
    /// The time-stamp counter.
    fn tsc(&self) -> u64 {
        0
    }
    /// The guest writes the time-stamp counter.
    fn set_tsc(&self, value: u64) {
        let _ = value;
    }
    /// Reads an MSR that is not of the core; nothing means #GP.
    fn read_msr(&self, index: u32) -> Option<u64> {
        let _ = index;
        None
    }
    /// Writes an MSR that is not of the core; `false` means #GP.
    fn write_msr(&self, index: u32, value: u64) -> bool {
        let _ = (index, value);
        false
    }
    /// The task-priority register as CR8 shows it.
    fn task_priority(&self) -> u8 {
        0
    }
    /// CR8 is written.
    fn set_task_priority(&self, value: u8) {
        let _ = value;
    }
    /// The vector of the interrupt to deliver now, which it acknowledges. Asked only when the guest
    /// takes interrupts.
    fn acknowledge_interrupt(&self) -> Option<u8> {
        None
    }
    /// Whether an NMI waits; it is taken.
    fn take_nmi(&self) -> bool {
        false
    }
    /// VMCALL or VMMCALL: what the guest finds in RAX. Nothing means #UD, as where no hypervisor is.
    fn hypercall(&self, call: &Hypercall) -> Option<u64> {
        let _ = call;
        None
    }
}
