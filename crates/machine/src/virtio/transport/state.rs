//! The transport's saved state.

use minicbor::{Decode, Encode};

use super::VirtioPci;
use super::common::{QueueSetup, status};
use super::interrupt::NO_VECTOR;
use crate::bus::lock;
use crate::device::{RestoreError, SavedState};
use crate::pci::{MsixState, command};

pub(super) const VERSION: u16 = 1;

/// Version 1.
#[derive(Encode, Decode)]
struct State {
    /// The configuration space's 256 bytes.
    #[cbor(n(0), with = "minicbor::bytes")]
    config: Vec<u8>,
    #[n(1)]
    msix: MsixState,
    #[n(2)]
    device_feature_select: u32,
    #[n(3)]
    driver_feature_select: u32,
    #[n(4)]
    driver_features: u64,
    #[n(5)]
    status: u8,
    #[n(6)]
    queue_select: u16,
    #[n(7)]
    queues: Vec<QueueSetup>,
    /// Of the configuration, then of each queue.
    #[n(8)]
    vectors: Vec<u16>,
    #[n(9)]
    isr: u8,
    #[n(10)]
    generation: u8,
    /// The device's own state.
    #[n(11)]
    device: SavedState,
}

pub(super) fn save(transport: &VirtioPci) -> SavedState {
    let common = &transport.common;
    let interrupt = &transport.interrupt;
    SavedState::new(
        VERSION,
        &State {
            config: transport.config.save(),
            msix: interrupt.msix.save(),
            device_feature_select: common.device_feature_select,
            driver_feature_select: common.driver_feature_select,
            driver_features: common.driver_features,
            status: common.status,
            queue_select: common.queue_select,
            queues: common.queues.clone(),
            vectors: interrupt.vectors(),
            isr: interrupt.isr(),
            generation: interrupt.generation(),
            device: lock(&transport.device).save(),
        },
    )
}

/// Checks all of the state, then takes it.
pub(super) fn restore(transport: &mut VirtioPci, state: &SavedState) -> Result<(), RestoreError> {
    let state: State = state.read(VERSION)?;
    check(transport, &state)?;
    lock(&transport.device).restore(&state.device)?;

    let common = &mut transport.common;
    common.device_feature_select = state.device_feature_select;
    common.driver_feature_select = state.driver_feature_select;
    common.driver_features = state.driver_features;
    common.status = state.status;
    common.queue_select = state.queue_select;
    common.queues = state.queues;

    transport.config.restore(&state.config);
    let interrupt = &transport.interrupt;
    interrupt.set_generation(state.generation);
    let (config, queues) = state
        .vectors
        .split_first()
        .expect("invariant: check has counted the vectors");
    interrupt.set_vector(None, *config);
    for (queue, vector) in (0..).zip(queues) {
        interrupt.set_vector(Some(queue), *vector);
    }
    interrupt
        .msix
        .restore(&state.msix, transport.msix_control());
    interrupt.set_pin_disabled(transport.config.command() & command::INTX_DISABLE != 0);
    interrupt.set_isr(state.isr);
    transport.update_doorbells();
    Ok(())
}

fn check(transport: &VirtioPci, state: &State) -> Result<(), RestoreError> {
    let impossible = |what: &str| Err(RestoreError::Impossible(what.into()));
    if !transport.config.accepts(&state.config) {
        return impossible("the configuration space is another function's");
    }
    if !transport.interrupt.msix.accepts(&state.msix) {
        return impossible("the MSI-X table is another function's");
    }
    let ours = &transport.common.queues;
    let same = state.queues.len() == ours.len()
        && state
            .queues
            .iter()
            .zip(ours)
            .all(|(queue, ours)| queue.max_size == ours.max_size && queue.is_consistent());
    if !same || state.vectors.len() != ours.len() + 1 {
        return impossible("the queues are another device's");
    }
    let count = transport.interrupt.msix.count();
    if state.vectors.iter().any(|&v| v >= count && v != NO_VECTOR) {
        return impossible("a queue has a vector that does not exist");
    }
    let accepted = state.status & status::FEATURES_OK != 0;
    if accepted && !transport.common.offers(state.driver_features)
        || !accepted && state.status & status::DRIVER_OK != 0
    {
        return impossible("the features agreed on are not on offer here");
    }
    Ok(())
}
