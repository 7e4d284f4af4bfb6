//! How transfers reach the kernel: an io_uring for each queue or, where the system refuses that, a few
//! threads with the classic system calls. Both execute the steps of the same plan
//! ([`crate::store`]'s `Job`), so short transfers and fallbacks behave alike.
//!
//! This is the module that hands raw addresses to the kernel. Its argument: an address enters only
//! inside [`Buffers`], which own a reference to the mapping; a job owns its buffers; a queue owns its
//! jobs until the kernel has reported them, also while the queue is dropped.
#![allow(unsafe_code)] // raw addresses to the kernel, and system calls that rustix does not have

mod buffers;
mod calls;
mod ring;
mod threads;

pub use buffers::Buffers;
pub(crate) use buffers::{PIECES_MAX, Piece};
pub(crate) use calls::{lock_byte, locked_by_other};
pub(crate) use ring::Ring;
pub(crate) use threads::Threads;
