//! Where a guest's consoles lead: the seam between a serial line or virtio console and whoever
//! shows it (a terminal, a log, the control socket).

/// Takes what a guest prints.
///
/// A sink is called from a vCPU's exit, so it never blocks for long: it hands the bytes to the
/// kernel or to a buffer of its own and returns. It loses nothing unless its reader is gone; a
/// reader that is merely slow gets everything, if late.
pub trait ConsoleSink: Send {
    /// Takes all of `bytes`, in the order the guest wrote them.
    fn write(&mut self, bytes: &[u8]);
}
