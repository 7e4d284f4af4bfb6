//! The DSDT: the namespace of devices that no bus enumerates.
//!
//! It is the one table a guest interprets, so it has no methods save `_OSC`, and no object that a
//! guest would only look at.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO,
    If, Interrupt, Memory32Fixed, Method, Name, Or, Package, PackageBuilder, Path,
    ResourceTemplate, Return, Scope, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::AcpiConfig;
use super::tables::{HEADER_LEN, OEM, OEM_REVISION, OEM_TABLE, bytes_of};
use crate::layout::{self, gsi, port};
use crate::legacy::SLEEP_TYPE_S5;

/// Devices on bus 0.
const PCI_SLOTS: u32 = 32;

/// AML already encoded.
struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

pub(super) fn dsdt(config: &AcpiConfig) -> Vec<u8> {
    let mut devices = processors(config.vcpus);
    devices.extend(pci_host_bridge(config.ram));
    devices.extend(reserved_memory());
    devices.extend(isa_devices(config));
    let sleep = Package::new(vec![&SLEEP_TYPE_S5, &SLEEP_TYPE_S5, &ZERO, &ZERO]);

    let mut aml = bytes_of(&Name::new(Path::new("_S5_"), &sleep));
    aml.extend(bytes_of(&Scope::new(
        Path::new("\\_SB_"),
        vec![&Encoded(devices)],
    )));
    let mut table = Sdt::new(*b"DSDT", HEADER_LEN as u32, 2, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&aml);
    table.as_slice().to_vec()
}

/// A device with a hardware identifier, a unique one among its kind, and resources.
fn device(name: &str, hardware_id: &dyn Aml, uid: u32, resources: Vec<&dyn Aml>) -> Vec<u8> {
    bytes_of(&Device::new(
        Path::new(name),
        vec![
            &Name::new(Path::new("_HID"), hardware_id),
            &Name::new(Path::new("_UID"), &uid),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(resources)),
        ],
    ))
}

fn processors(vcpus: u32) -> Vec<u8> {
    (0..vcpus)
        .flat_map(|index| {
            bytes_of(&Device::new(
                Path::new(&format!("C{index:03X}")),
                vec![
                    &Name::new(Path::new("_HID"), &"ACPI0007"),
                    &Name::new(Path::new("_UID"), &index),
                ],
            ))
        })
        .collect()
}

fn pci_host_bridge(ram: u64) -> Vec<u8> {
    bytes_of(&Device::new(
        Path::new("PCI0"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
            &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Encoded(pci_windows(ram)),
            &Name::new(Path::new("_PRT"), &interrupt_routing()),
            &Encoded(operating_system_capabilities()),
        ],
    ))
}

/// `_CRS` of the host bridge: its one bus, its own ports, and what it passes on.
fn pci_windows(ram: u64) -> Vec<u8> {
    let below = port::PCI_CONFIG_ADDRESS;
    let above = port::PCI_CONFIG_DATA + 4;
    let memory64 = layout::pci_window_64(ram);
    let uncached = AddressSpaceCacheable::NotCacheable;
    bytes_of(&Name::new(
        Path::new("_CRS"),
        &ResourceTemplate::new(vec![
            &AddressSpace::new_bus_number(0_u16, 0),
            &IO::new(below, below, 1, 8),
            &AddressSpace::new_io(0_u16, below - 1, None),
            &AddressSpace::new_io(above, u16::MAX, None),
            &AddressSpace::new_memory(
                uncached,
                true,
                layout::PCI_WINDOW_32.start as u32,
                (layout::PCI_WINDOW_32.end - 1) as u32,
                None,
            ),
            &AddressSpace::new_memory(uncached, true, memory64.start, memory64.end - 1, None),
        ]),
    ))
}

/// INTA of every slot goes to the I/O APIC pin of its number modulo eight (ACPI 6.5, 6.2.13).
fn interrupt_routing() -> PackageBuilder {
    let mut routing = PackageBuilder::new();
    let pins = gsi::PCI_INTX.end - gsi::PCI_INTX.start;
    for slot in 0..PCI_SLOTS {
        let any_function: u32 = slot << 16 | 0xffff;
        let pin = gsi::PCI_INTX.start + slot % pins;
        routing.add_element(&Package::new(vec![&any_function, &ZERO, &ZERO, &pin]));
    }
    routing
}

/// `_OSC` leaves the guest in control of everything it asks for: there is no firmware to share with.
/// A request for another interface than PCI's is told so (ACPI 6.5, 6.2.11.3).
fn operating_system_capabilities() -> Vec<u8> {
    const PCI_HOST_BRIDGE: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
    const UNRECOGNIZED_UUID: u8 = 1 << 2;
    bytes_of(&Method::new(
        Path::new("_OSC"),
        4,
        true,
        vec![
            &If::new(
                &Equal::new(&Arg(0), &Uuid::new(PCI_HOST_BRIDGE)),
                vec![&Return::new(&Arg(3))],
            ),
            &Else::new(vec![
                &CreateDWordField::new(&Path::new("STAT"), &Arg(3), &ZERO),
                &Or::new(&Path::new("STAT"), &Path::new("STAT"), &UNRECOGNIZED_UUID),
                &Return::new(&Arg(3)),
            ]),
        ],
    ))
}

/// ECAM and the power-management ports are nobody's to give away. Guests use ECAM only if it is
/// reserved like this (PCI Firmware Specification 3.3, 4.1.2).
fn reserved_memory() -> Vec<u8> {
    let ecam = layout::PCI_ECAM;
    device(
        "MBRD",
        &EISAName::new("PNP0C02"),
        0,
        vec![
            &Memory32Fixed::new(true, ecam.start as u32, (ecam.end - ecam.start) as u32),
            &IO::new(port::PM1_EVENT, port::PM1_EVENT, 1, 0x40),
        ],
    )
}

fn isa_devices(config: &AcpiConfig) -> Vec<u8> {
    // ISA interrupts are edge-triggered, active high and not shared.
    let interrupt = |number| Interrupt::new(true, true, false, false, number);
    let ports = |first, count| IO::new(first, first, 1, count);
    let pnp = EISAName::new;
    let mut devices = Vec::new();
    if config.serial {
        devices.extend(device(
            "COM1",
            &pnp("PNP0501"),
            0,
            vec![&ports(port::SERIAL0, 8), &interrupt(gsi::SERIAL0)],
        ));
    }
    if config.keyboard {
        devices.extend(device(
            "KBD_",
            &pnp("PNP0303"),
            0,
            vec![
                &ports(port::I8042_DATA, 1),
                &ports(port::I8042_COMMAND, 1),
                &interrupt(gsi::KEYBOARD),
            ],
        ));
    }
    if config.keyboard && config.mouse {
        devices.extend(device(
            "MOU_",
            &pnp("PNP0F13"),
            0,
            vec![&interrupt(gsi::MOUSE)],
        ));
    }
    if config.rtc {
        devices.extend(device(
            "RTC_",
            &pnp("PNP0B00"),
            0,
            vec![&ports(port::RTC, 2), &interrupt(gsi::RTC)],
        ));
    }
    if config.pvpanic {
        devices.extend(device(
            "PEVT",
            &"QEMU0001",
            0,
            vec![&ports(port::PVPANIC, 1)],
        ));
    }
    devices
}
