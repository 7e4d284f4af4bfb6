//! Registers between KVM's structures and ours.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use crate::engine::state::{DescriptorTable, GeneralRegisters, Segment, SpecialRegisters};

pub(super) fn general(regs: &kvm_regs) -> GeneralRegisters {
    GeneralRegisters {
        rax: regs.rax,
        rbx: regs.rbx,
        rcx: regs.rcx,
        rdx: regs.rdx,
        rsi: regs.rsi,
        rdi: regs.rdi,
        rsp: regs.rsp,
        rbp: regs.rbp,
        r8: regs.r8,
        r9: regs.r9,
        r10: regs.r10,
        r11: regs.r11,
        r12: regs.r12,
        r13: regs.r13,
        r14: regs.r14,
        r15: regs.r15,
        rip: regs.rip,
        rflags: regs.rflags,
    }
}

pub(super) fn kvm_regs(state: &GeneralRegisters) -> kvm_regs {
    kvm_regs {
        rax: state.rax,
        rbx: state.rbx,
        rcx: state.rcx,
        rdx: state.rdx,
        rsi: state.rsi,
        rdi: state.rdi,
        rsp: state.rsp,
        rbp: state.rbp,
        r8: state.r8,
        r9: state.r9,
        r10: state.r10,
        r11: state.r11,
        r12: state.r12,
        r13: state.r13,
        r14: state.r14,
        r15: state.r15,
        rip: state.rip,
        rflags: state.rflags,
    }
}

pub(super) fn special(sregs: &kvm_sregs) -> SpecialRegisters {
    SpecialRegisters {
        cs: segment(&sregs.cs),
        ds: segment(&sregs.ds),
        es: segment(&sregs.es),
        fs: segment(&sregs.fs),
        gs: segment(&sregs.gs),
        ss: segment(&sregs.ss),
        tr: segment(&sregs.tr),
        ldt: segment(&sregs.ldt),
        gdt: table(&sregs.gdt),
        idt: table(&sregs.idt),
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        efer: sregs.efer,
        apic_base: sregs.apic_base,
    }
}

pub(super) fn kvm_sregs(state: &SpecialRegisters) -> kvm_sregs {
    kvm_sregs {
        cs: kvm_segment(&state.cs),
        ds: kvm_segment(&state.ds),
        es: kvm_segment(&state.es),
        fs: kvm_segment(&state.fs),
        gs: kvm_segment(&state.gs),
        ss: kvm_segment(&state.ss),
        tr: kvm_segment(&state.tr),
        ldt: kvm_segment(&state.ldt),
        gdt: kvm_table(&state.gdt),
        idt: kvm_table(&state.idt),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        cr8: state.cr8,
        efer: state.efer,
        apic_base: state.apic_base,
        // An acknowledged interrupt is among the events.
        interrupt_bitmap: [0; 4],
    }
}

fn segment(segment: &kvm_segment) -> Segment {
    let fields = [
        (segment.type_, 0),
        (segment.s, 4),
        (segment.dpl, 5),
        (segment.present, 7),
        (segment.avl, 12),
        (segment.l, 13),
        (segment.db, 14),
        (segment.g, 15),
        (segment.unusable, 16),
    ];
    Segment {
        selector: segment.selector,
        base: segment.base,
        limit: segment.limit,
        attributes: fields
            .into_iter()
            .fold(0, |all, (value, shift)| all | u32::from(value) << shift),
    }
}

fn kvm_segment(state: &Segment) -> kvm_segment {
    let field = |shift: u32, mask: u32| (state.attributes >> shift & mask) as u8;
    kvm_segment {
        base: state.base,
        limit: state.limit,
        selector: state.selector,
        type_: field(0, 0xf),
        s: field(4, 1),
        dpl: field(5, 3),
        present: field(7, 1),
        avl: field(12, 1),
        l: field(13, 1),
        db: field(14, 1),
        g: field(15, 1),
        unusable: field(16, 1),
        padding: 0,
    }
}

fn table(table: &kvm_dtable) -> DescriptorTable {
    DescriptorTable {
        base: table.base,
        limit: table.limit,
    }
}

fn kvm_table(state: &DescriptorTable) -> kvm_dtable {
    kvm_dtable {
        base: state.base,
        limit: state.limit,
        padding: [0; 3],
    }
}
