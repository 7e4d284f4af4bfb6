//! Tests of what a kernel sees.
