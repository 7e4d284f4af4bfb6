//! The subcommands.

pub(crate) mod kvm_lab;
