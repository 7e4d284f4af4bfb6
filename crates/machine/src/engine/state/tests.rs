use super::fuzz::fuzz_machine_state;
use super::*;
use crate::device::{RestoreError, SavedState};

fn vcpu() -> VcpuState {
    VcpuState {
        general: GeneralRegisters {
            rax: 1,
            rflags: 2,
            ..GeneralRegisters::default()
        },
        special: SpecialRegisters::default(),
        debug: DebugRegisters::default(),
        xcr0: 1,
        xsave: vec![0; 576],
        msrs: vec![Msr {
            index: 0x277,
            value: u64::MAX,
        }],
        local_apic: vec![0; LOCAL_APIC_PAGE],
        events: PendingEvents {
            exception: Some(PendingException {
                vector: 14,
                error_code: Some(2),
                payload: Some(0x1000),
                injected: false,
            }),
            ..PendingEvents::default()
        },
        run_state: RunState::Halted,
        tsc_khz: 2_000_000,
        tsc: 5,
    }
}

fn platform() -> PlatformState {
    PlatformState {
        pic_master: PicState::default(),
        pic_slave: PicState::default(),
        io_apic: IoApicState {
            redirection: [u64::MAX; IO_APIC_PINS],
            ..IoApicState::default()
        },
        pit: PitState::default(),
        clock: ClockState {
            guest_ns: 7,
            realtime_ns: None,
        },
    }
}

#[test]
fn the_bytes_are_as_specified() {
    let body = vcpu().to_saved().body;
    // An array of eleven; in it general registers, an array of eighteen that begins with RAX.
    assert_eq!(body[..3], [0x8b, 0x92, 0x01]);
    // At its end: the run state 3, the frequency, the counter.
    assert_eq!(
        body[body.len() - 7..],
        [0x03, 0x1a, 0x00, 0x1e, 0x84, 0x80, 0x05]
    );
    let body = platform().to_saved().body;
    assert_eq!(body[..2], [0x85, 0x8f]);
    // Its end: no speaker, and a clock whose optional last field is absent.
    assert_eq!(body[body.len() - 3..], [0xf4, 0x81, 0x07]);
}

#[test]
fn states_come_back_from_their_bytes() {
    let vcpu = vcpu();
    assert_eq!(VcpuState::from_saved(&vcpu.to_saved()).unwrap(), vcpu);
    let platform = platform();
    let again = PlatformState::from_saved(&platform.to_saved()).unwrap();
    assert_eq!(again, platform);
}

#[test]
fn events_from_before_kicks_are_read() {
    let events = PendingEvents {
        nmi_masked: true,
        kicked: true,
        ..PendingEvents::default()
    };
    let mut bytes = minicbor::to_vec(events).unwrap();
    assert_eq!(minicbor::decode::<PendingEvents>(&bytes).unwrap(), events);
    // An array of twelve becomes one of eleven.
    assert_eq!((bytes[0], bytes.pop()), (0x8c, Some(0xf5)));
    bytes[0] = 0x8b;
    let old = minicbor::decode::<PendingEvents>(&bytes).unwrap();
    assert!(old.nmi_masked && !old.kicked);
}

#[test]
fn an_impossible_vcpu_is_refused() {
    type Spoil = fn(&mut VcpuState);
    let spoils: [(&str, Spoil); 5] = [
        ("1023 bytes of local APIC", |state| {
            state.local_apic.truncate(1023);
        }),
        ("575 bytes of XSAVE", |state| state.xsave.truncate(575)),
        ("65540 bytes of XSAVE", |state| {
            state.xsave.resize(MAX_XSAVE + 4, 0);
        }),
        ("4097 MSRs", |state| {
            state.msrs = vec![state.msrs[0]; MAX_MSRS + 1];
        }),
        ("exception 32", |state| {
            state.events.exception = Some(PendingException {
                vector: 32,
                ..PendingException::default()
            });
        }),
    ];
    for (reason, spoil) in spoils {
        let mut state = vcpu();
        spoil(&mut state);
        let error = VcpuState::from_saved(&state.to_saved()).unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
    }
    let newer = SavedState {
        version: STATE_VERSION + 1,
        ..vcpu().to_saved()
    };
    let error = VcpuState::from_saved(&newer).unwrap_err();
    assert!(matches!(error, RestoreError::Version { .. }), "{error}");
}

#[test]
fn arbitrary_bytes_are_taken_whole_or_refused() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    println!("seed {seed:#x}");
    let mut random = || {
        // xorshift64
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for good in [vcpu().to_saved().body, platform().to_saved().body] {
        fuzz_machine_state(&good);
        for _ in 0..500 {
            let mut bytes = good.clone();
            for _ in 0..=random() % 3 {
                let at = random() as usize % bytes.len();
                bytes[at] = random() as u8;
            }
            bytes.truncate(random() as usize % (2 * bytes.len()));
            fuzz_machine_state(&bytes);
        }
    }
}

#[test]
fn linux_s_protocol_sets_what_it_prescribes() {
    let mut state = vcpu();
    state.enter(&crate::boot::Entry::Linux64 {
        rip: 0x100_0200,
        boot_params: 0x1000,
        cr3: 0x2000,
        gdt: 0x500,
        gdt_limit: 0x1f,
        code_selector: 0x10,
        data_selector: 0x18,
    });
    let special = &state.special;
    assert_eq!(state.general.rip, 0x100_0200);
    assert_eq!(state.general.rsi, 0x1000);
    assert_eq!(state.general.rflags, 2, "interrupts are off");
    assert_eq!((special.cs.selector, special.ds.selector), (0x10, 0x18));
    assert_eq!(special.cs.attributes, 0xa09b, "64-bit code");
    assert_eq!((special.gdt.base, special.gdt.limit), (0x500, 0x1f));
    // Paging, protection; PAE; long mode enabled and active.
    assert_eq!(special.cr0 & (1 << 31 | 1), 1 << 31 | 1);
    assert_eq!((special.cr3, special.cr4), (0x2000, 1 << 5));
    assert_eq!(special.efer, 1 << 8 | 1 << 10);
}
