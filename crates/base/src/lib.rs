//! What every part of Mica shares: units and the seams for clock and randomness.
//!
//! The crate depends on nothing of ours and on nothing heavy, so that a simulation can replace time
//! and chance everywhere without dragging a machine along.
#![forbid(unsafe_code)]

pub mod clock;
pub mod units;
