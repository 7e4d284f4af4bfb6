//! What travels between APICs: an interrupt message with its destination.

use super::Refused;

/// How a message is to be delivered (SDM volume 3, 11.6.1 and 11.11.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    /// The vector, to every destination.
    Fixed,
    /// The vector, to one of the destinations.
    LowestPriority,
    /// A system management interrupt.
    Smi,
    /// A non-maskable interrupt.
    Nmi,
    /// The processor waits for its start-up message.
    Init,
    /// Start-up; the vector is the page where real mode begins.
    StartUp,
    /// The vector comes from the 8259s.
    ExtInt,
    /// Reserved (3).
    Reserved,
}

impl DeliveryMode {
    /// From bits 10:8 of an ICR, a redirection entry, an LVT entry or an MSI's data.
    #[must_use]
    pub fn from_bits(register: u32) -> Self {
        match register >> 8 & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            3 => Self::Reserved,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            _ => Self::ExtInt,
        }
    }
}

/// Which processors a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// By APIC ID; all ones means all.
    Physical(u32),
    /// By logical destination register.
    Logical(u32),
    /// The sender.
    Myself,
    /// All, with the sender.
    All,
    /// All but the sender.
    Others,
}

/// One interrupt on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// The vector, or the start-up page.
    pub vector: u8,
    /// How.
    pub mode: DeliveryMode,
    /// To whom.
    pub destination: Destination,
    /// The index of the local APIC that sends it, if one does.
    pub sender: Option<usize>,
    /// Level-triggered: the end of interrupt is broadcast.
    pub level_triggered: bool,
    /// Assert rather than de-assert.
    pub assert: bool,
    /// An MSI's redirection hint: one of the destinations is enough.
    pub redirection_hint: bool,
}

impl Message {
    /// An MSI (SDM volume 3, 11.11).
    ///
    /// # Errors
    ///
    /// The address is not in the local APICs' megabyte.
    pub fn from_msi(address: u64, data: u32) -> Result<Self, Refused> {
        const BASE: u64 = 0xfee0_0000;
        if address & !0xf_ffff != BASE {
            return Err(Refused);
        }
        let id = (address >> 12) as u32 & 0xff;
        Ok(Self {
            vector: data as u8,
            mode: DeliveryMode::from_bits(data),
            destination: if address & 1 << 2 != 0 {
                Destination::Logical(id)
            } else {
                Destination::Physical(id)
            },
            sender: None,
            level_triggered: data & 1 << 15 != 0,
            assert: true,
            redirection_hint: address & 1 << 3 != 0,
        })
    }

    /// What a write of an interrupt command register sends (SDM volume 3, 11.6.1). `destination` is
    /// the number from its upper half.
    #[must_use]
    pub fn from_icr(sender: usize, low: u32, destination: u32) -> Self {
        let destination = match low >> 18 & 3 {
            0 if low & 1 << 11 != 0 => Destination::Logical(destination),
            0 => Destination::Physical(destination),
            1 => Destination::Myself,
            2 => Destination::All,
            _ => Destination::Others,
        };
        Self {
            vector: low as u8,
            mode: DeliveryMode::from_bits(low),
            destination,
            sender: Some(sender),
            level_triggered: low & 1 << 15 != 0,
            assert: low & 1 << 14 != 0,
            redirection_hint: false,
        }
    }

    /// Whether one of several destinations is chosen.
    ///
    /// As on KVM a physical broadcast reaches all even so.
    #[must_use]
    pub fn is_for_one(&self) -> bool {
        (self.mode == DeliveryMode::LowestPriority || self.redirection_hint)
            && self.destination != Destination::Physical(0xff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_msi_is_decoded() {
        let message = Message::from_msi(0xfee0_300c, 0xc1a5).unwrap();
        assert_eq!(message.vector, 0xa5);
        assert_eq!(message.mode, DeliveryMode::LowestPriority);
        assert_eq!(message.destination, Destination::Logical(3));
        assert!(message.level_triggered && message.redirection_hint && message.is_for_one());
        assert_eq!(Message::from_msi(0xfed0_0000, 0), Err(Refused));
    }

    #[test]
    fn an_icr_is_decoded() {
        let cases = [
            (0x0000_0045, Destination::Physical(7)),
            (0x0000_0845, Destination::Logical(7)),
            (0x0004_0045, Destination::Myself),
            (0x0008_0045, Destination::All),
            (0x000c_4645, Destination::Others),
        ];
        for (low, destination) in cases {
            let message = Message::from_icr(1, low, 7);
            assert_eq!(message.destination, destination, "{low:#x}");
            assert_eq!(message.vector, 0x45);
        }
        let start_up = Message::from_icr(1, 0x000c_4608, 0);
        assert_eq!(start_up.mode, DeliveryMode::StartUp);
        assert!(start_up.assert);
    }
}
