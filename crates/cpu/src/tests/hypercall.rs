//! Hypercalls reach the environment from everywhere, with the registers of KVM's convention.

use std::cell::RefCell;

use iced_x86::code_asm::*;

use crate::processor::{Environment, Stop};
use crate::state::SegmentName;
use crate::system::Hypercall;
use crate::testing::{CODE, Guest, Nothing};

/// Answers every hypercall with the same value and remembers them.
struct Hypervisor {
    answer: u64,
    calls: RefCell<Vec<Hypercall>>,
}

impl Hypervisor {
    fn new(answer: u64) -> Self {
        Self {
            answer,
            calls: RefCell::default(),
        }
    }
}

impl Environment for Hypervisor {
    fn memory_read(&self, _: u64, _: u8) -> u64 {
        u64::MAX
    }
    fn memory_write(&self, _: u64, _: u8, _: u64) {}
    fn hypercall(&self, call: &Hypercall) -> Option<u64> {
        self.calls.borrow_mut().push(*call);
        Some(self.answer)
    }
}

/// Values whose upper halves count only in 64-bit code.
const VALUES: [(usize, u64); 5] = [
    (0, 0x1_0000_0005),
    (3, 0x2_0000_0006),
    (1, 0x3_0000_0007),
    (2, 0x4_0000_0008),
    (6, 0x5_0000_0009),
];

fn guest(program: fn(&mut CodeAssembler)) -> Guest {
    let mut guest = Guest::new(program);
    for (register, value) in VALUES {
        guest.cpu.state.set_register(register, value);
    }
    guest
}

#[test]
fn both_instructions_call_with_whole_registers() {
    for program in [(|a| a.vmcall().unwrap()) as fn(&mut CodeAssembler), |a| {
        a.vmmcall().unwrap()
    }] {
        let mut guest = guest(program);
        let hypervisor = Hypervisor::new(-1000_i64 as u64);
        assert_eq!(guest.cpu.run(&hypervisor, 1), Stop::Attention);
        let expected = Hypercall {
            number: 0x1_0000_0005,
            arguments: [0x2_0000_0006, 0x3_0000_0007, 0x4_0000_0008, 0x5_0000_0009],
            wide: true,
            cpl: 0,
        };
        assert_eq!(*hypervisor.calls.borrow(), [expected]);
        assert_eq!(guest.cpu.state.register(0), -1000_i64 as u64);
        assert_eq!(guest.cpu.state.rip, CODE + 3);
    }
}

#[test]
fn code_of_32_bits_calls_with_halves_and_its_level_is_told() {
    let mut guest = guest(|a| a.vmcall().unwrap());
    for (name, attributes) in [(SegmentName::Cs, 0xc0fb), (SegmentName::Ss, 0xc0f3)] {
        let mut segment = *guest.cpu.state.segment(name);
        segment.attributes = attributes;
        segment.selector = 0x13;
        guest.cpu.state.set_segment(name, segment);
    }
    // The tables have no page for users; without paging there is no need of one.
    (guest.cpu.state.cr0, guest.cpu.state.efer) = (0x11, 0);
    let hypervisor = Hypervisor::new(-1_i64 as u64);
    assert_eq!(guest.cpu.run(&hypervisor, 1), Stop::Attention);
    let expected = Hypercall {
        number: 5,
        arguments: [6, 7, 8, 9],
        wide: false,
        cpl: 3,
    };
    assert_eq!(*hypervisor.calls.borrow(), [expected]);
    assert_eq!(guest.cpu.state.register(0), 0xffff_ffff);
}

/// Without a hypervisor it is #UD, for which this guest has no handler.
#[test]
fn nobody_to_call_is_an_undefined_opcode() {
    let mut guest = guest(|a| a.vmcall().unwrap());
    assert_eq!(guest.cpu.run(&Nothing, 1), Stop::TripleFault);
    let exception = guest.cpu.step(&Nothing).unwrap_err();
    assert_eq!(exception, crate::error::Exception::ud());
}
