//! The terminal of `mica run`: raw mode, the escape key, the size.

use std::io;
use std::os::fd::AsFd;

use rustix::stdio;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

/// Ctrl-]: what comes behind it is for Mica, not for the guest.
pub(crate) const ESCAPE: u8 = 0x1d;

/// What the escape key offers.
pub(crate) const ESCAPE_HELP: &str = "\r\n\
    [mica] Ctrl-] then  p  press the power button   r  reset\r\n\
    [mica]              q  stop the VM now          Ctrl-]  send Ctrl-] to the guest\r\n";

/// Puts the terminal into raw mode for as long as it lives.
///
/// Nothing happens where standard input is no terminal.
pub(crate) struct RawMode {
    saved: Option<Termios>,
}

impl RawMode {
    /// Enters raw mode.
    ///
    /// # Errors
    ///
    /// The terminal refuses.
    pub(crate) fn enter() -> io::Result<Self> {
        let stdin = stdio::stdin();
        if !isatty(stdin) {
            return Ok(Self { saved: None });
        }
        let saved = tcgetattr(stdin)?;
        let mut raw = saved.clone();
        raw.make_raw();
        tcsetattr(stdin, OptionalActions::Now, &raw)?;
        Ok(Self { saved: Some(saved) })
    }

    /// Whether keys go to the guest one by one, Ctrl-C among them.
    pub(crate) fn is_raw(&self) -> bool {
        self.saved.is_some()
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Some(saved) = &self.saved {
            // The terminal may be gone; there is nobody left to tell then.
            let _ = tcsetattr(stdio::stdin(), OptionalActions::Drain, saved);
        }
    }
}

/// The terminal's size in columns and rows, if standard output is a terminal.
pub(crate) fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(stdio::stdout().as_fd()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// What a key behind the escape key asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EscapeCommand {
    /// Press the power button.
    PowerButton,
    /// Reset the machine.
    Reset,
    /// Stop the VM now.
    Stop,
    /// Show the help.
    Help,
}

/// Separates keys for the guest from keys for Mica.
#[derive(Debug, Default)]
pub(crate) struct EscapeFilter {
    escaped: bool,
}

impl EscapeFilter {
    /// Takes typed bytes; gives back the guest's share and what Mica is asked to do, in order.
    pub(crate) fn filter(&mut self, typed: &[u8]) -> (Vec<u8>, Vec<EscapeCommand>) {
        let mut guest = Vec::with_capacity(typed.len());
        let mut commands = Vec::new();
        for &byte in typed {
            if !std::mem::take(&mut self.escaped) {
                match byte {
                    ESCAPE => self.escaped = true,
                    _ => guest.push(byte),
                }
                continue;
            }
            match byte {
                ESCAPE => guest.push(ESCAPE),
                b'p' => commands.push(EscapeCommand::PowerButton),
                b'r' => commands.push(EscapeCommand::Reset),
                b'q' => commands.push(EscapeCommand::Stop),
                _ => commands.push(EscapeCommand::Help),
            }
        }
        (guest, commands)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_reach_the_guest_unless_escaped() {
        use EscapeCommand::{Help, PowerButton, Stop};
        for (typed, guest, commands) in [
            (&b"ls\n"[..], &b"ls\n"[..], &[][..]),
            (b"\x03\x04", b"\x03\x04", &[]),
            (b"a\x1dpb", b"ab", &[PowerButton]),
            (b"\x1d\x1d", b"\x1d", &[]),
            (b"\x1dx\x1dq", b"", &[Help, Stop]),
        ] {
            // The same keys in one read and one by one.
            let mut filter = EscapeFilter::default();
            assert_eq!(filter.filter(typed), (guest.to_vec(), commands.to_vec()));
            let mut filter = EscapeFilter::default();
            let mut all = (Vec::new(), Vec::new());
            for &byte in typed {
                let (guest, commands) = filter.filter(&[byte]);
                all.0.extend(guest);
                all.1.extend(commands);
            }
            assert_eq!(all, (guest.to_vec(), commands.to_vec()));
        }
    }
}
