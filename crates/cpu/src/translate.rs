//! (stub) decoding and the block cache.

/// Translated blocks.
#[derive(Default)]
pub(crate) struct BlockCache;
