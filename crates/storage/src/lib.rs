//! The storage array: stores of raw capacity and the exports that serve them.
//!
//! ```text
//!   vhost_user   exports: a virtio-blk device behind a vhost-user socket
//!        │
//!      store     the seam `Store`, and its first implementation, a file or a block device
//!        │
//!      uring     how transfers reach the kernel: io_uring or, where it is refused, threads
//! ```
//!
//! Arrows point down: an export knows the seam, never the kind of store behind it, and a store knows
//! nothing of guests. The crate knows no HTTP, no API type, no async runtime and no virtual machine;
//! whoever speaks vhost-user may be its client.
//!
//! Unsafe code is confined to [`uring`] and to the guest memory mapping of [`vhost_user`].

#[doc(hidden)]
pub mod fuzz;
pub mod store;
pub mod uring;
pub mod vhost_user;
