//! (stub) executing micro-operations.
