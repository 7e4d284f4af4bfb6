use std::path::Path;
use std::process::Command;

use vm_memory::Address;

use super::*;

fn full(vcpus: u32, ram: u64) -> AcpiConfig {
    AcpiConfig {
        vcpus,
        ram,
        serial: true,
        keyboard: true,
        mouse: true,
        rtc: true,
        pm_timer: true,
        pvpanic: true,
    }
}

fn lean(vcpus: u32) -> AcpiConfig {
    AcpiConfig {
        keyboard: false,
        mouse: false,
        rtc: false,
        pm_timer: false,
        ..full(vcpus, 128 << 20)
    }
}

fn cases() -> [AcpiConfig; 4] {
    [
        lean(1),
        lean(2),
        full(2, 64 << 30),
        full(MAX_VCPUS, layout::MAX_RAM),
    ]
}

fn table<'a>(tables: &'a Tables, signature: &[u8]) -> &'a [u8] {
    let found = tables
        .iter()
        .find(|(_, bytes)| bytes.starts_with(signature));
    found.expect("the table is there").1
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

#[test]
fn tables_lie_in_their_place_and_do_not_overlap() {
    for config in cases() {
        let tables = build(&config).unwrap();
        let mut end = layout::ACPI_TABLES.start;
        for (address, bytes) in tables.iter() {
            assert!(address >= end, "{config:?}");
            end = address + bytes.len() as u64;
        }
        assert!(end <= layout::ACPI_TABLES.end, "{config:?}: {end:#x}");
    }
}

#[test]
fn every_table_is_found_from_the_rsdp_and_sums_to_zero() {
    for config in cases() {
        let tables = build(&config).unwrap();
        let at = |address: u64| tables.iter().find(|(a, _)| *a == address).unwrap().1;
        let rsdp = at(layout::ACPI_TABLES.start);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((rsdp[15], rsdp.len()), (2, 36));
        assert_eq!((sum(&rsdp[..20]), sum(rsdp)), (0, 0));

        let xsdt = at(u64_at(rsdp, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let mut reached = vec![xsdt];
        for entry in xsdt[36..].chunks(8) {
            reached.push(at(u64::from_le_bytes(entry.try_into().unwrap())));
        }
        let fadt = table(&tables, b"FACP");
        let dsdt = at(u64_at(fadt, 140));
        assert_eq!(u64::from(u32_at(fadt, 40)), u64_at(fadt, 140));
        reached.push(dsdt);
        for table in &reached {
            assert_eq!(u32_at(table, 4) as usize, table.len());
            assert_eq!(sum(table), 0, "{:?}", &table[..4]);
        }
        let facs = u64::from(u32_at(fadt, 36));
        assert_eq!(facs % 64, 0);
        assert_eq!(&at(facs)[..4], b"FACS");
        assert_eq!(reached.len() + 2, tables.iter().count());
    }
}

#[test]
fn the_madt_lists_every_processor_by_its_index() {
    let tables = build(&full(254, 1 << 30)).unwrap();
    let madt = table(&tables, b"APIC");
    let (mut at, mut processors, mut others) = (44, vec![], vec![]);
    while at < madt.len() {
        let entry = &madt[at..at + usize::from(madt[at + 1])];
        at += entry.len();
        match entry[0] {
            0 => processors.push((entry[2], entry[3], entry[4])),
            kind => others.push(kind),
        }
    }
    let expected: Vec<_> = (0..254).map(|index| (index, index, 1)).collect();
    assert_eq!(processors, expected);
    assert_eq!(others, [1, 2, 4]);
}

#[test]
fn absent_devices_are_declared_absent() {
    const BOOT_FLAGS: usize = 109;
    let tables = build(&lean(1)).unwrap();
    let fadt = table(&tables, b"FACP");
    assert_eq!(fadt[BOOT_FLAGS], 0b11_0100);
    assert_eq!(u32_at(fadt, 76), 0, "no timer");
    assert_eq!(u32_at(fadt, 48), 0, "no SMI command port");

    let tables = build(&full(1, 1 << 30)).unwrap();
    let fadt = table(&tables, b"FACP");
    assert_eq!(fadt[BOOT_FLAGS], 0b01_0110);
    assert_eq!(u32_at(fadt, 76), u32::from(layout::port::PM_TIMER));
}

#[test]
fn vcpus_out_of_range_are_refused() {
    for vcpus in [0, MAX_VCPUS + 1, u32::MAX] {
        assert!(matches!(
            build(&full(vcpus, 1 << 30)),
            Err(AcpiError::Vcpus(refused)) if refused == vcpus
        ));
    }
}

#[test]
fn tables_are_written_where_the_guest_looks_for_them() {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
    let rsdp = write(&full(2, 2 << 20), &memory).unwrap();
    assert_eq!(rsdp.raw_value(), layout::ACPI_TABLES.start);
    let mut signature = [0; 8];
    memory.read_slice(&mut signature, rsdp).unwrap();
    assert_eq!(&signature, b"RSD PTR ");

    let tiny = GuestMemory::from_ranges(&[(GuestAddress(0), 64 << 10)]).unwrap();
    assert!(matches!(
        write(&full(2, 2 << 20), &tiny),
        Err(AcpiError::Memory { .. })
    ));
}

/// Runs one of ACPICA's tools in `directory`, successfully, and gives what it printed.
fn acpica(directory: &Path, tool: &str, arguments: &[&str]) -> String {
    let output = Command::new(tool)
        .args(arguments)
        .current_dir(directory)
        .output()
        .expect("the tools of Debian's acpica-tools run");
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} {arguments:?}:\n{text}");
    text
}

/// ACPICA, which is also the guest's interpreter, reads every table and finds no fault: what it
/// disassembles compiles again, without errors or warnings, to the same bytes.
#[test]
fn acpica_disassembles_and_recompiles_every_table() {
    for config in cases() {
        let directory = tempfile::tempdir().unwrap();
        let tables = build(&config).unwrap();
        for signature in ["FACP", "APIC", "MCFG", "FACS", "XSDT", "DSDT"] {
            let bytes = table(&tables, signature.as_bytes());
            let binary = format!("{signature}.dat");
            let source = format!("{signature}.dsl");
            std::fs::write(directory.path().join(&binary), bytes).unwrap();
            let text = acpica(directory.path(), "iasl", &["-d", &binary]);
            for fault in ["Warning", "Error", "Incorrect"] {
                assert!(!text.contains(fault), "{config:?} {signature}:\n{text}");
            }
            let again = format!("{signature}-again");
            let text = acpica(directory.path(), "iasl", &["-oa", "-p", &again, &source]);
            if signature == "DSDT" {
                assert!(text.contains("0 Errors, 0 Warnings"), "{config:?}:\n{text}");
            }
            for fault in ["Warning  ", "Error  "] {
                assert!(!text.contains(fault), "{config:?} {signature}:\n{text}");
            }
            let compiled = std::fs::read(directory.path().join(again + ".aml")).unwrap();
            assert_eq!(compiled.len(), bytes.len(), "{config:?} {signature}");
            // The compiler signs the header with its own name and version.
            if bytes.len() > 36 && signature != "FACS" {
                assert_eq!(compiled[36..], bytes[36..], "{config:?} {signature}");
            }
        }
    }
}

/// ACPICA's interpreter loads the namespace and runs the one method.
#[test]
fn osc_grants_pci_control_and_refuses_other_interfaces() {
    let directory = tempfile::tempdir().unwrap();
    let tables = build(&full(2, 4 << 30)).unwrap();
    std::fs::write(directory.path().join("dsdt.aml"), table(&tables, b"DSDT")).unwrap();
    const REQUEST: &str = "01 00 00 00 1F 00 00 00 1F 01 00 00";
    for (uuid, answer) in [
        ("5B 4D DB 33 F7 1F 1C 40 96 57 74 41 C0 3D D7 66", REQUEST),
        (
            "00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00",
            "05 00 00 00 1F 00 00 00 1F 01 00 00",
        ),
    ] {
        let command = format!("evaluate \\_SB.PCI0._OSC ({uuid}) 1 3 ({REQUEST})");
        let text = acpica(directory.path(), "acpiexec", &["-b", &command, "dsdt.aml"]);
        assert!(text.contains(answer), "{uuid}:\n{text}");
        for fault in ["Warning", "Error", "AE_"] {
            assert!(!text.contains(fault), "{uuid}:\n{text}");
        }
    }
}
