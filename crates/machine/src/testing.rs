//! A machine of one virtio device without an engine, for unit tests and fuzz functions: a real PCI
//! root, transport and event loop, with the engine's side of the seam recorded and the driver's side
//! played by hand.

mod interrupts;
mod machine;

pub(crate) use interrupts::TestInterrupts;
pub(crate) use machine::{Buffer, RAM, TestMachine};
