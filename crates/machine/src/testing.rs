//! A machine of one virtio device without an engine, for unit tests and fuzz functions: a real PCI
//! root, transport and event loop, with the engine's side of the seam recorded and the driver's side
//! played by hand.

#[cfg(test)]
mod driver;
mod input;
mod interrupts;
mod machine;

#[cfg(test)]
pub(crate) use driver::Buffer;
pub(crate) use input::Input;
#[cfg(test)]
pub(crate) use input::check_random;
pub(crate) use interrupts::TestInterrupts;
pub(crate) use machine::{RAM, RINGS, TestMachine};
