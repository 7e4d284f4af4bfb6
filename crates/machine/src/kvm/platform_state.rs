//! Interrupt controllers, interval timer and clock: out of KVM and in again.

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_PIT_FLAGS_HPET_LEGACY, KVM_PIT_FLAGS_SPEAKER_DATA_ON, kvm_clock_data, kvm_ioapic_state,
    kvm_irqchip, kvm_pic_state, kvm_pit_channel_state, kvm_pit_state2,
};

use super::vm::Vm;
use crate::engine::EngineError;
use crate::engine::state::{
    ClockState, IoApicState, PicState, PitChannelState, PitState, PlatformState,
};
use crate::layout;

/// Which inputs may be level-triggered: not the timer, the keyboard, the cascade, the RTC and the
/// FPU's (the chip sets that had ELCR ports).
const ELCR_MASK_MASTER: u8 = 0xf8;
const ELCR_MASK_SLAVE: u8 = 0xde;

pub(super) fn save(vm: &Vm) -> Result<PlatformState, EngineError> {
    let pit = vm
        .fd
        .get_pit2()
        .map_err(|error| EngineError::new("KVM_GET_PIT2", error))?;
    let clock = vm
        .fd
        .get_clock()
        .map_err(|error| EngineError::new("KVM_GET_CLOCK", error))?;
    Ok(PlatformState {
        pic_master: pic_state(&get_chip(vm, KVM_IRQCHIP_PIC_MASTER)?),
        pic_slave: pic_state(&get_chip(vm, KVM_IRQCHIP_PIC_SLAVE)?),
        io_apic: io_apic_state(&get_chip(vm, KVM_IRQCHIP_IOAPIC)?),
        pit: PitState {
            channels: pit.channels.map(|channel| pit_channel(&channel)),
            hpet_legacy: pit.flags & KVM_PIT_FLAGS_HPET_LEGACY != 0,
            speaker_on: pit.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON != 0,
        },
        clock: ClockState {
            guest_ns: clock.clock,
            realtime_ns: (clock.flags & KVM_CLOCK_REALTIME != 0).then_some(clock.realtime),
        },
    })
}

/// Sets everything but the clock.
pub(super) fn restore_chips(vm: &Vm, state: &PlatformState) -> Result<(), EngineError> {
    let mut chip = kvm_irqchip {
        chip_id: KVM_IRQCHIP_PIC_MASTER,
        ..Default::default()
    };
    chip.chip.pic = kvm_pic(&state.pic_master, ELCR_MASK_MASTER);
    set_chip(vm, &chip)?;
    chip.chip_id = KVM_IRQCHIP_PIC_SLAVE;
    chip.chip.pic = kvm_pic(&state.pic_slave, ELCR_MASK_SLAVE);
    set_chip(vm, &chip)?;
    chip.chip_id = KVM_IRQCHIP_IOAPIC;
    chip.chip.ioapic = kvm_io_apic(&state.io_apic);
    set_chip(vm, &chip)?;

    let flag = |on: bool, flag: u32| if on { flag } else { 0 };
    let pit = kvm_pit_state2 {
        channels: state.pit.channels.map(|channel| kvm_pit_channel(&channel)),
        flags: flag(state.pit.hpet_legacy, KVM_PIT_FLAGS_HPET_LEGACY)
            | flag(state.pit.speaker_on, KVM_PIT_FLAGS_SPEAKER_DATA_ON),
        ..Default::default()
    };
    vm.fd
        .set_pit2(&pit)
        .map_err(|error| EngineError::new("KVM_SET_PIT2", error))
}

/// The clock goes on from where it was saved: the time between is not part of the machine's life.
pub(super) fn restore_clock(vm: &Vm, state: &ClockState) -> Result<(), EngineError> {
    let clock = kvm_clock_data {
        clock: state.guest_ns,
        ..Default::default()
    };
    vm.fd
        .set_clock(&clock)
        .map_err(|error| EngineError::new("KVM_SET_CLOCK", error))
}

fn get_chip(vm: &Vm, chip_id: u32) -> Result<kvm_irqchip, EngineError> {
    let mut chip = kvm_irqchip {
        chip_id,
        ..Default::default()
    };
    vm.fd
        .get_irqchip(&mut chip)
        .map_err(|error| EngineError::new(format!("KVM_GET_IRQCHIP {chip_id}"), error))?;
    Ok(chip)
}

fn set_chip(vm: &Vm, chip: &kvm_irqchip) -> Result<(), EngineError> {
    vm.fd
        .set_irqchip(chip)
        .map_err(|error| EngineError::new(format!("KVM_SET_IRQCHIP {}", chip.chip_id), error))
}

fn pic_state(chip: &kvm_irqchip) -> PicState {
    // SAFETY: every member of the union is plain integers, valid for any content.
    let pic = unsafe { chip.chip.pic };
    PicState {
        last_irr: pic.last_irr,
        irr: pic.irr,
        imr: pic.imr,
        isr: pic.isr,
        priority_add: pic.priority_add,
        irq_base: pic.irq_base,
        read_isr: pic.read_reg_select != 0,
        poll: pic.poll != 0,
        special_mask: pic.special_mask != 0,
        init_state: pic.init_state,
        auto_eoi: pic.auto_eoi != 0,
        rotate_on_auto_eoi: pic.rotate_on_auto_eoi != 0,
        special_fully_nested_mode: pic.special_fully_nested_mode != 0,
        four_byte_init: pic.init4 != 0,
        elcr: pic.elcr,
    }
}

fn kvm_pic(state: &PicState, elcr_mask: u8) -> kvm_pic_state {
    kvm_pic_state {
        last_irr: state.last_irr,
        irr: state.irr,
        imr: state.imr,
        isr: state.isr,
        // The kernel shifts by it.
        priority_add: state.priority_add & 7,
        irq_base: state.irq_base,
        read_reg_select: state.read_isr.into(),
        poll: state.poll.into(),
        special_mask: state.special_mask.into(),
        init_state: state.init_state,
        auto_eoi: state.auto_eoi.into(),
        rotate_on_auto_eoi: state.rotate_on_auto_eoi.into(),
        special_fully_nested_mode: state.special_fully_nested_mode.into(),
        init4: state.four_byte_init.into(),
        elcr: state.elcr & elcr_mask,
        elcr_mask,
    }
}

fn io_apic_state(chip: &kvm_irqchip) -> IoApicState {
    // SAFETY: as in `pic_state`.
    let io_apic = unsafe { chip.chip.ioapic };
    IoApicState {
        register_select: io_apic.ioregsel as u8,
        id: io_apic.id as u8,
        irr: io_apic.irr,
        // SAFETY: as above; both members are the entry's eight bytes.
        redirection: io_apic.redirtbl.map(|entry| unsafe { entry.bits }),
    }
}

fn kvm_io_apic(state: &IoApicState) -> kvm_ioapic_state {
    let mut io_apic = kvm_ioapic_state {
        base_address: layout::IO_APIC,
        ioregsel: state.register_select.into(),
        id: state.id.into(),
        irr: state.irr,
        ..Default::default()
    };
    for (entry, bits) in io_apic.redirtbl.iter_mut().zip(state.redirection) {
        entry.bits = bits;
    }
    io_apic
}

fn pit_channel(channel: &kvm_pit_channel_state) -> PitChannelState {
    PitChannelState {
        count: channel.count,
        latched_count: channel.latched_count,
        count_latched: channel.count_latched,
        status_latched: channel.status_latched != 0,
        status: channel.status,
        read_state: channel.read_state,
        write_state: channel.write_state,
        write_latch: channel.write_latch,
        access: channel.rw_mode,
        mode: channel.mode,
        bcd: channel.bcd != 0,
        gate: channel.gate != 0,
    }
}

fn kvm_pit_channel(state: &PitChannelState) -> kvm_pit_channel_state {
    kvm_pit_channel_state {
        count: state.count,
        latched_count: state.latched_count,
        count_latched: state.count_latched,
        status_latched: state.status_latched.into(),
        status: state.status,
        read_state: state.read_state,
        write_state: state.write_state,
        write_latch: state.write_latch,
        rw_mode: state.access,
        mode: state.mode,
        bcd: state.bcd.into(),
        gate: state.gate.into(),
        // The kernel takes the host's clock at setting.
        count_load_time: 0,
    }
}
