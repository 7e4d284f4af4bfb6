//! The registers with which a vCPU enters a kernel.
//!
//! Each function changes what the boot protocol prescribes in a state that [`super::Vcpu::save`]
//! has given, and leaves the rest as it is after power-on.

use crate::boot::Entry;

use super::state::{DescriptorTable, GeneralRegisters, Segment, VcpuState};

/// CR0: protection enable, and the extension type that reads as one.
const CR0_PE_ET: u64 = 1 | 1 << 4;
/// CR0: paging.
const CR0_PG: u64 = 1 << 31;
/// CR4: physical address extension.
const CR4_PAE: u64 = 1 << 5;
/// EFER: long mode enabled and active.
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
/// The bit of RFLAGS that is always one.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// IA32_MISC_ENABLE, and in it the bit without which Linux distrusts `rep movsb` on Intel
/// processors.
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
/// IA32_MTRR_DEF_TYPE: MTRRs enabled, everything write-back. Older Linux kernels leave the page
/// attribute table alone if firmware has not enabled MTRRs.
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Attributes of [`Segment`]: present, and code or data rather than a system segment.
const PRESENT_USER: u32 = 1 << 7 | 1 << 4;
/// Executable, readable, accessed.
const CODE: u32 = 0xb;
/// Writable, accessed.
const DATA: u32 = 0x3;
/// A busy task state segment.
const BUSY_TSS: u32 = 0xb;
const LONG: u32 = 1 << 13;
const BIG: u32 = 1 << 14;
const GRANULAR: u32 = 1 << 15;

fn flat(selector: u16, attributes: u32) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        attributes: attributes | PRESENT_USER | GRANULAR,
    }
}

impl VcpuState {
    /// Sets what firmware sets on every processor alike before a kernel starts on the first. Kernels
    /// complain of processors that differ.
    pub fn set_up_as_firmware(&mut self) {
        if let Some(value) = self.msr(MSR_MISC_ENABLE) {
            self.set_msr(MSR_MISC_ENABLE, value | MISC_ENABLE_FAST_STRINGS);
        }
        self.set_msr(MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK);
    }

    /// Enters the kernel that [`crate::boot`] has loaded.
    pub fn enter(&mut self, entry: &Entry) {
        match *entry {
            Entry::Pvh { rip, start_info } => self.pvh_start(rip, start_info),
            Entry::Linux64 {
                rip,
                boot_params,
                cr3,
                gdt,
                gdt_limit,
                code_selector,
                data_selector,
            } => self.linux64_start(
                GeneralRegisters {
                    rip,
                    rsi: boot_params,
                    ..GeneralRegisters::default()
                },
                cr3,
                DescriptorTable {
                    base: gdt,
                    limit: gdt_limit,
                },
                [code_selector, data_selector],
            ),
        }
    }

    /// Enters a kernel by the PVH protocol (Xen's "x86/HVM direct boot ABI"): 32-bit protected mode
    /// at `rip` with flat segments and no paging, `start_info` in EBX.
    pub fn pvh_start(&mut self, rip: u64, start_info: u64) {
        self.start_common(GeneralRegisters {
            rip,
            rbx: start_info,
            ..GeneralRegisters::default()
        });
        self.special.cs = flat(0x8, CODE | BIG);
        self.set_data_segments(flat(0x10, DATA | BIG));
        self.special.cr0 = CR0_PE_ET;
        self.special.cr3 = 0;
        self.special.cr4 = 0;
        self.special.efer = 0;
    }

    /// Enters a Linux kernel by its 64-bit boot protocol (the kernel's
    /// `Documentation/arch/x86/boot.rst`, "64-bit Boot Protocol"): long mode at `rip` under the page
    /// tables at `cr3`, which map the kernel and its parameters to themselves, `boot_params` in RSI,
    /// the selectors of flat segments in `gdt` loaded.
    fn linux64_start(
        &mut self,
        general: GeneralRegisters,
        cr3: u64,
        gdt: DescriptorTable,
        [code, data]: [u16; 2],
    ) {
        self.start_common(general);
        self.special.cs = flat(code, CODE | LONG);
        self.special.gdt = gdt;
        self.set_data_segments(flat(data, DATA | BIG));
        self.special.cr0 = CR0_PE_ET | CR0_PG;
        self.special.cr3 = cr3;
        self.special.cr4 = CR4_PAE;
        self.special.efer = EFER_LME_LMA;
    }

    fn start_common(&mut self, general: GeneralRegisters) {
        self.general = GeneralRegisters {
            rflags: RFLAGS_RESERVED,
            ..general
        };
        self.special.idt = DescriptorTable::default();
        self.special.tr = Segment {
            selector: 0,
            base: 0,
            limit: 0x67,
            attributes: BUSY_TSS | 1 << 7,
        };
    }

    fn set_data_segments(&mut self, segment: Segment) {
        let special = &mut self.special;
        for data in [
            &mut special.ds,
            &mut special.es,
            &mut special.fs,
            &mut special.gs,
            &mut special.ss,
        ] {
            *data = segment;
        }
    }
}
