//! What vCPUs share: interrupt controllers, the interval timer and the paravirtual clock.

use minicbor::{Decode, Encode};

use crate::device::{RestoreError, SavedState};

/// The input pins of the I/O APIC.
pub const IO_APIC_PINS: usize = 24;

/// The chips that belong to the engine because interrupts pass through them.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct PlatformState {
    /// The 8259 at port 0x20.
    #[n(0)]
    pub pic_master: PicState,
    /// The 8259 at port 0xa0.
    #[n(1)]
    pub pic_slave: PicState,
    /// The I/O APIC.
    #[n(2)]
    pub io_apic: IoApicState,
    /// The 8254.
    #[n(3)]
    pub pit: PitState,
    /// The paravirtual clock.
    #[n(4)]
    pub clock: ClockState,
}

/// One 8259A interrupt controller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct PicState {
    /// Input levels at the last edge detection.
    #[n(0)]
    pub last_irr: u8,
    /// Interrupt request register.
    #[n(1)]
    pub irr: u8,
    /// Interrupt mask register.
    #[n(2)]
    pub imr: u8,
    /// In-service register.
    #[n(3)]
    pub isr: u8,
    /// The input of highest priority (rotation).
    #[n(4)]
    pub priority_add: u8,
    /// The vector of input 0.
    #[n(5)]
    pub irq_base: u8,
    /// OCW3: a read gives ISR rather than IRR.
    #[n(6)]
    pub read_isr: bool,
    /// OCW3: poll command given.
    #[n(7)]
    pub poll: bool,
    /// OCW3: special mask mode.
    #[n(8)]
    pub special_mask: bool,
    /// The initialization command word that comes next; 0 when initialized.
    #[n(9)]
    pub init_state: u8,
    /// ICW4: automatic end of interrupt.
    #[n(10)]
    pub auto_eoi: bool,
    /// OCW2: rotate at automatic end of interrupt.
    #[n(11)]
    pub rotate_on_auto_eoi: bool,
    /// ICW4: special fully nested mode.
    #[n(12)]
    pub special_fully_nested_mode: bool,
    /// ICW1: four initialization words.
    #[n(13)]
    pub four_byte_init: bool,
    /// Edge/level control register (port 0x4d0 or 0x4d1).
    #[n(14)]
    pub elcr: u8,
}

/// An 82093AA I/O APIC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct IoApicState {
    /// The register that IOWIN shows.
    #[n(0)]
    pub register_select: u8,
    /// The identification register's ID field.
    #[n(1)]
    pub id: u8,
    /// Pending inputs, one bit each.
    #[n(2)]
    pub irr: u32,
    /// The redirection table.
    #[n(3)]
    pub redirection: [u64; IO_APIC_PINS],
}

/// One counter of the 8254.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct PitChannelState {
    /// The count that was loaded, 1 to 0x10000.
    #[n(0)]
    pub count: u32,
    /// The latched count.
    #[n(1)]
    pub latched_count: u16,
    /// Bytes of the latched count still to be read, in the manner of `access`.
    #[n(2)]
    pub count_latched: u8,
    /// A latched status waits to be read.
    #[n(3)]
    pub status_latched: bool,
    /// The latched status.
    #[n(4)]
    pub status: u8,
    /// The byte that the next read gives (1 low, 2 high, 3 low then high, 4 high of those).
    #[n(5)]
    pub read_state: u8,
    /// The same of the next write.
    #[n(6)]
    pub write_state: u8,
    /// The low byte of a count whose high byte is still to come.
    #[n(7)]
    pub write_latch: u8,
    /// Access mode of the control word (1 low, 2 high, 3 both).
    #[n(8)]
    pub access: u8,
    /// Counting mode, 0 to 5.
    #[n(9)]
    pub mode: u8,
    /// Binary-coded decimal.
    #[n(10)]
    pub bcd: bool,
    /// The gate input.
    #[n(11)]
    pub gate: bool,
}

/// The 8254 and the speaker's gate at port 0x61. Its counters start again from their loaded count
/// when the state is restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct PitState {
    /// Counter 0 is IRQ 0, 1 was memory refresh, 2 the speaker.
    #[n(0)]
    pub channels: [PitChannelState; 3],
    /// Output of counter 0 is off because the HPET took IRQ 0.
    #[n(1)]
    pub hpet_legacy: bool,
    /// Port 0x61 bit 1: speaker data.
    #[n(2)]
    pub speaker_on: bool,
}

/// The clock that kvmclock shows the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct ClockState {
    /// Nanoseconds since the machine was made, without the time it was saved.
    #[n(0)]
    pub guest_ns: u64,
    /// The host's CLOCK_REALTIME at the same instant, in nanoseconds since 1970, if the engine could
    /// read both at once.
    #[n(1)]
    pub realtime_ns: Option<u64>,
}

impl PlatformState {
    /// In the form of a device's state.
    #[must_use]
    pub fn to_saved(&self) -> SavedState {
        SavedState::new(super::STATE_VERSION, self)
    }

    /// Reads what [`Self::to_saved`] has made, here or elsewhere.
    ///
    /// # Errors
    ///
    /// See [`RestoreError`].
    pub fn from_saved(saved: &SavedState) -> Result<Self, RestoreError> {
        saved.read(super::STATE_VERSION)
    }
}
