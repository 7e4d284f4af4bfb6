//! What of a front-end goes into the machine's saved state.

use minicbor::{Decode, Encode};

use super::inflight::{Inflight, SavedInflight};
use super::rings::Active;
use crate::device::RestoreError;

/// The most rings that a saved state may describe.
const MAX_RINGS: usize = 1024;

/// Rings that no backend works on, between one activation and the next.
#[derive(Clone)]
pub(super) struct Suspended {
    /// By index: where to go on in the available ring; `None` where only the used index tells.
    pub(super) bases: Vec<Option<u16>>,
    pub(super) inflight: Option<Inflight>,
}

impl From<&Active> for Suspended {
    fn from(active: &Active) -> Self {
        let base = |ring: &Option<_>| {
            ring.as_ref()
                .and_then(|ring: &super::rings::Ring| ring.base)
        };
        Self {
            bases: active.rings.iter().map(base).collect(),
            inflight: active.inflight.clone(),
        }
    }
}

/// Version 1 of a front-end's part of the state.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) struct SavedFrontend {
    /// The feature bits that the guest has been offered.
    #[n(0)]
    pub(super) offered: u64,
    /// The backend's configuration space.
    #[cbor(n(1), with = "minicbor::bytes")]
    pub(super) config: Vec<u8>,
    /// The rings, if the driver had set the device up.
    #[n(2)]
    pub(super) suspended: Option<SavedSuspended>,
}

/// [`Suspended`] in its saved form.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) struct SavedSuspended {
    #[n(0)]
    bases: Vec<Option<u16>>,
    #[n(1)]
    inflight: Option<SavedInflight>,
}

impl From<&Suspended> for SavedSuspended {
    fn from(suspended: &Suspended) -> Self {
        Self {
            bases: suspended.bases.clone(),
            inflight: suspended.inflight.as_ref().map(Inflight::save),
        }
    }
}

impl TryFrom<&SavedSuspended> for Suspended {
    type Error = RestoreError;

    fn try_from(saved: &SavedSuspended) -> Result<Self, RestoreError> {
        if saved.bases.len() > MAX_RINGS {
            return Err(RestoreError::Impossible("too many rings".into()));
        }
        let inflight = saved.inflight.as_ref().map(Inflight::restore).transpose();
        Ok(Self {
            bases: saved.bases.clone(),
            inflight: inflight.map_err(RestoreError::Impossible)?,
        })
    }
}
