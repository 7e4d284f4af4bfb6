//! Exceptions, as values: every part of the processor that can fault returns one, and only the run
//! loop delivers it.

/// Exception vectors (SDM volume 3, table 6-1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
#[allow(missing_docs)] // the names are the manual's
pub enum Vector {
    DivideError = 0,
    Debug = 1,
    Breakpoint = 3,
    Overflow = 4,
    BoundRange = 5,
    InvalidOpcode = 6,
    DeviceNotAvailable = 7,
    DoubleFault = 8,
    InvalidTss = 10,
    SegmentNotPresent = 11,
    StackFault = 12,
    GeneralProtection = 13,
    PageFault = 14,
    FloatingPoint = 16,
    AlignmentCheck = 17,
    SimdFloatingPoint = 19,
}

/// A fault or trap that an instruction raised. Faults leave the state as before the instruction;
/// traps (`Breakpoint`, `Overflow`, and `Debug` after a step) leave it as after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Which.
    pub vector: Vector,
    /// The error code, where the vector has one.
    pub error_code: Option<u32>,
    /// What goes to CR2: a page fault's linear address.
    pub address: u64,
}

impl Exception {
    /// An exception without an error code.
    #[must_use]
    pub const fn new(vector: Vector) -> Self {
        Self {
            vector,
            error_code: None,
            address: 0,
        }
    }

    /// An exception with one.
    #[must_use]
    pub const fn with_code(vector: Vector, code: u32) -> Self {
        Self {
            vector,
            error_code: Some(code),
            address: 0,
        }
    }

    /// #GP(code).
    #[must_use]
    pub const fn gp(code: u32) -> Self {
        Self::with_code(Vector::GeneralProtection, code)
    }

    /// #UD.
    #[must_use]
    pub const fn ud() -> Self {
        Self::new(Vector::InvalidOpcode)
    }

    /// #PF at a linear address.
    #[must_use]
    pub const fn page_fault(address: u64, code: u32) -> Self {
        Self {
            vector: Vector::PageFault,
            error_code: Some(code),
            address,
        }
    }
}
