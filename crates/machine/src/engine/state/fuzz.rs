//! Saved states as a snapshot's file or a migration's peer may send them.

use super::{LOCAL_APIC_PAGE, MAX_MSRS, MAX_XSAVE, PlatformState, STATE_VERSION, VcpuState};
use crate::device::SavedState;

/// Reads `data` as the body of either state.
///
/// What is accepted keeps the promises that engines rely on, and survives being saved again.
#[doc(hidden)]
pub fn fuzz_machine_state(data: &[u8]) {
    let saved = SavedState {
        version: STATE_VERSION,
        body: data.to_vec(),
    };
    if let Ok(state) = VcpuState::from_saved(&saved) {
        assert_eq!(state.local_apic.len(), LOCAL_APIC_PAGE);
        assert!((576..=MAX_XSAVE).contains(&state.xsave.len()));
        assert!(state.msrs.len() <= MAX_MSRS);
        let again = VcpuState::from_saved(&state.to_saved());
        assert_eq!(again.ok(), Some(state));
    }
    if let Ok(state) = PlatformState::from_saved(&saved) {
        let again = PlatformState::from_saved(&state.to_saved());
        assert_eq!(again.ok(), Some(state));
    }
}
