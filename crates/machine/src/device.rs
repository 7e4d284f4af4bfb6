//! The life that every device shares, and the form of its saved state.
//!
//! ```text
//!            start            pause
//!  ┌────────┐ ──▶ ┌─────────┐ ──▶ ┌────────┐
//!  │ at rest│     │ running │     │ paused │ ── save, restore
//!  └────────┘     └─────────┘ ◀── └────────┘
//!                   ▲   │ reset      resume
//!                   └───┘
//! ```
//!
//! `save` and `restore` are called at rest or paused only. After `pause` has returned the device
//! neither touches guest memory nor raises an interrupt until `resume`; requests that a backend has
//! in flight are finished or recorded before that.

use minicbor::{Decode, Encode};

/// One device of the machine.
pub trait Device: Send {
    /// Unique in the machine and stable over versions: `serial0`, `disk0`.
    fn name(&self) -> &str;

    /// Called once, when the machine is complete and before the first guest instruction.
    ///
    /// # Errors
    ///
    /// What keeps the device from working; the machine does not start then.
    fn start(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Stops all activity and returns when it has stopped.
    ///
    /// # Errors
    ///
    /// The backend does not come to rest; the caller resumes the machine.
    fn pause(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Goes on after [`Device::pause`] or [`Device::restore`].
    ///
    /// # Errors
    ///
    /// What keeps the device from going on; the machine stays paused.
    fn resume(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Back to the state after power-on, as the machine's reset line does.
    fn reset(&mut self);

    /// All that a guest can observe of the device, apart from memory.
    fn save(&self) -> SavedState;

    /// Takes the state of a device of the same kind and configuration.
    ///
    /// # Errors
    ///
    /// The state is of an unknown version or is not valid for this device, which is unchanged then.
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError>;
}

/// A device's backend fails it.
#[derive(Debug, thiserror::Error)]
#[error("device {device}: {reason}")]
pub struct DeviceError {
    /// The device's name.
    pub device: String,
    /// What failed, on what.
    pub reason: String,
}

/// A device's state in its saved form: a version, and a CBOR body that the version describes.
///
/// The byte form is specified in `docs/formats/machine-state.md`. Bodies have numbered fields;
/// a field may be added under the same version if its absence means what the device did before.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct SavedState {
    /// Raised when an older Mica could misread the body.
    #[n(0)]
    pub version: u16,
    /// CBOR (RFC 8949), by the device's own structure of that version.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub body: Vec<u8>,
}

/// Why a saved state was refused.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Written by a newer Mica, or not at all by Mica.
    #[error("state version {found} is unknown, this build reads up to {newest}")]
    Version {
        /// What the state says of itself.
        found: u16,
        /// The newest version this build reads.
        newest: u16,
    },
    /// The body is not the CBOR that its version promises.
    #[error("state is malformed: {0}")]
    Malformed(#[from] minicbor::decode::Error),
    /// Well-formed, but impossible for this device.
    #[error("state is impossible: {0}")]
    Impossible(String),
}

impl SavedState {
    /// Encodes `body` under `version`.
    #[must_use]
    pub fn new<T: Encode<()>>(version: u16, body: &T) -> Self {
        let body = minicbor::to_vec(body).expect("a Vec takes every byte, so encoding cannot fail");
        Self { version, body }
    }

    /// Decodes the body if it is of `version`, the only one that exists so far for its device.
    ///
    /// # Errors
    ///
    /// Another version, or a body that is not what `T` describes.
    pub fn read<'b, T: Decode<'b, ()>>(&'b self, version: u16) -> Result<T, RestoreError> {
        if self.version != version {
            return Err(RestoreError::Version {
                found: self.version,
                newest: version,
            });
        }
        Ok(minicbor::decode(&self.body)?)
    }
}
