//! One virtual machine: guest memory, engines, interrupt controllers, devices, boot, and the VM
//! process around them.
//!
//! ```text
//!            vmm          the VM process: assembly, jail, control socket, event loop
//!   ┌────────┼─────────┐
//!  boot    engine    device life, bus
//!   │      kvm │        ├── legacy   serial, i8042, RTC, power management, pvpanic
//!   │          │        ├── pci      configuration space, BARs, MSI-X
//!   │          │        └── virtio   transport, in-process devices, vhost-user frontends
//!   └────── memory ─────┘
//! ```
//!
//! Arrows point down: a device knows the memory, the bus traits and the interrupt traits of
//! [`engine`], never an engine or the VM process. The crate knows no HTTP, no API type and no
//! async runtime; block and network data leave it by vhost-user only.
//!
//! Unsafe code is confined to the modules that say so at their head and that `cargo xtask tidy`
//! lists.

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod console;
pub mod cpu_profile;
pub mod device;
pub mod engine;
pub mod kvm;
pub mod layout;
pub mod legacy;
pub mod memory;
pub mod pci;
pub mod recording;
pub mod soft;
pub(crate) mod testing;
pub mod virtio;
pub mod vmm;
