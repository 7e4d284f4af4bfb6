//! The repository's chores, and the two places where its tests meet real guests.
//!
//! - [`lab`] runs a command of ours inside a Debian kernel with a real `kvm-amd`, on any machine:
//!   QEMU's software CPU offers SVM.
//! - [`guest`] boots a guest in plain QEMU, as the peer of our vhost-user backends.
//! - [`session`] is what both hand out: a running QEMU whose serial line a test reads and writes.
//!
//! The rest serves `cargo xtask`. Integration tests use this crate as a dev-dependency; it knows
//! no other crate of the workspace.
#![forbid(unsafe_code)]

pub mod error;
pub mod guest;
pub mod lab;
pub mod session;
pub mod steps;
pub mod tidy;
pub mod workspace;
