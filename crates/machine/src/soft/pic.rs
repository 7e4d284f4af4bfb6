//! The pair of 8259A interrupt controllers.
//!
//! The commands are those of the data sheet (Intel 231468); the master's input 2 is the cascade.
//! Like KVM's it knows neither single mode nor ICW1's level-triggered mode (LTIM), because the
//! edge/level control registers say it for each input, and takes interrupts while its
//! initialization is under way.

use crate::engine::state::PicState;

/// Which inputs may be level-triggered: not the timer, the keyboard, the cascade, the RTC and the
/// FPU's.
const ELCR_MASKS: [u8; 2] = [0xf8, 0xde];
const CASCADE: u8 = 2;
/// The vector offset of a request that went away (data sheet, "interrupt sequence").
const SPURIOUS: u8 = 7;

/// Both controllers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pic {
    chips: [PicState; 2],
    output: bool,
}

impl Default for Pic {
    fn default() -> Self {
        Self::new()
    }
}

impl Pic {
    /// As after power-on: uninitialized, nothing masked, no request.
    #[must_use]
    pub fn new() -> Self {
        Self {
            chips: [PicState::default(); 2],
            output: false,
        }
    }

    /// The state of master and slave.
    #[must_use]
    pub fn save(&self) -> (PicState, PicState) {
        (self.chips[0], self.chips[1])
    }

    /// Takes what [`Self::save`] has given.
    pub fn restore(&mut self, master: &PicState, slave: &PicState) {
        self.chips = [*master, *slave];
        for (chip, mask) in self.chips.iter_mut().zip(ELCR_MASKS) {
            chip.priority_add &= 7;
            chip.elcr &= mask;
        }
        self.output = self.request(0).is_some();
    }

    /// The INT output, which goes to the processors' LINT0.
    #[must_use]
    pub fn output(&self) -> bool {
        self.output
    }

    /// Drives input `irq` (0 to 15).
    pub fn set_line(&mut self, irq: u8, level: bool) {
        let Some(chip) = self.chips.get_mut(usize::from(irq >> 3)) else {
            return;
        };
        drive(chip, irq & 7, level);
        self.update();
    }

    /// The processor acknowledges: the vector. Without a request it is the spurious one.
    pub fn acknowledge(&mut self) -> u8 {
        let vector = match self.request(0) {
            Some(CASCADE) => {
                self.take(0, CASCADE);
                let input = self.request(1);
                if let Some(input) = input {
                    self.take(1, input);
                }
                self.chips[1]
                    .irq_base
                    .wrapping_add(input.unwrap_or(SPURIOUS))
            }
            Some(input) => {
                self.take(0, input);
                self.chips[0].irq_base.wrapping_add(input)
            }
            None => self.chips[0].irq_base.wrapping_add(SPURIOUS),
        };
        self.update();
        vector
    }

    /// Reads port 0x20, 0x21, 0xa0, 0xa1, 0x4d0 or 0x4d1.
    pub fn read(&mut self, port: u16) -> u8 {
        let Some((index, register)) = decode(port) else {
            return 0xff;
        };
        if register == Register::Elcr {
            return self.chips[index].elcr;
        }
        if self.chips[index].poll {
            self.chips[index].poll = false;
            return self.poll(index);
        }
        let chip = &self.chips[index];
        match register {
            Register::Data => chip.imr,
            _ if chip.read_isr => chip.isr,
            _ => chip.irr,
        }
    }

    /// Writes one of the ports of [`Self::read`].
    pub fn write(&mut self, port: u16, value: u8) {
        let Some((index, register)) = decode(port) else {
            return;
        };
        let chip = &mut self.chips[index];
        match register {
            Register::Elcr => chip.elcr = value & ELCR_MASKS[index],
            Register::Data => write_data(chip, value),
            Register::Command if value & 0x10 != 0 => start_initialization(chip, value),
            Register::Command if value & 0x08 != 0 => write_ocw3(chip, value),
            Register::Command => write_ocw2(chip, value),
        }
        self.update();
    }

    /// The input of chip `index` that would be acknowledged.
    fn request(&self, index: usize) -> Option<u8> {
        let chip = &self.chips[index];
        let wanted = highest(chip, chip.irr & !chip.imr)?;
        let mut in_service = chip.isr;
        if chip.special_fully_nested_mode && index == 0 {
            in_service &= !(1 << CASCADE);
        }
        if chip.special_mask {
            // Data sheet, "special mask mode": a masked level does not hold up the lower ones.
            in_service &= !chip.imr;
        }
        let serving = highest(chip, in_service).unwrap_or(8);
        (wanted < serving).then_some(wanted.wrapping_add(chip.priority_add) & 7)
    }

    /// Passes the slave's request on and computes the output.
    fn update(&mut self) {
        if self.request(1).is_some() {
            // A pulse: each update is an edge for the master, as in KVM.
            drive(&mut self.chips[0], CASCADE, true);
            drive(&mut self.chips[0], CASCADE, false);
        }
        self.output = self.request(0).is_some();
    }

    fn take(&mut self, index: usize, input: u8) {
        let chip = &mut self.chips[index];
        let bit = 1 << input;
        chip.isr |= bit;
        // A level-triggered request lasts as long as its line is high.
        if chip.elcr & bit == 0 {
            chip.irr &= !bit;
        }
        if chip.auto_eoi {
            if chip.rotate_on_auto_eoi {
                chip.priority_add = (input + 1) & 7;
            }
            chip.isr &= !bit;
        }
    }

    /// The poll command's answer: the request, which is thereby taken (data sheet, "poll command").
    fn poll(&mut self, index: usize) -> u8 {
        let answer = match self.request(index) {
            Some(input) => {
                if index == 1 {
                    self.chips[0].isr &= !(1 << CASCADE);
                    self.chips[0].irr &= !(1 << CASCADE);
                }
                self.chips[index].irr &= !(1 << input);
                self.chips[index].isr &= !(1 << input);
                input | 0x80
            }
            None => SPURIOUS,
        };
        self.update();
        answer
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Command,
    Data,
    Elcr,
}

fn decode(port: u16) -> Option<(usize, Register)> {
    Some(match port {
        0x20 => (0, Register::Command),
        0x21 => (0, Register::Data),
        0xa0 => (1, Register::Command),
        0xa1 => (1, Register::Data),
        0x4d0 => (0, Register::Elcr),
        0x4d1 => (1, Register::Elcr),
        _ => return None,
    })
}

fn drive(chip: &mut PicState, input: u8, level: bool) {
    let bit = 1 << input;
    let rises = chip.last_irr & bit == 0;
    if level {
        if rises || chip.elcr & bit != 0 {
            chip.irr |= bit;
        }
        chip.last_irr |= bit;
    } else {
        if chip.elcr & bit != 0 {
            chip.irr &= !bit;
        }
        chip.last_irr &= !bit;
    }
}

/// The rank of the highest of `inputs` in the present rotation, 0 to 7.
fn highest(chip: &PicState, inputs: u8) -> Option<u8> {
    let turned = inputs.rotate_right(u32::from(chip.priority_add & 7));
    (turned != 0).then(|| turned.trailing_zeros() as u8)
}

/// ICW1.
fn start_initialization(chip: &mut PicState, value: u8) {
    chip.four_byte_init = value & 1 != 0;
    chip.last_irr = 0;
    chip.irr &= chip.elcr;
    chip.imr = 0;
    chip.priority_add = 0;
    chip.special_mask = false;
    chip.read_isr = false;
    if !chip.four_byte_init {
        chip.special_fully_nested_mode = false;
        chip.auto_eoi = false;
    }
    chip.init_state = 1;
}

/// ICW2 to ICW4, or the mask (OCW1).
fn write_data(chip: &mut PicState, value: u8) {
    match chip.init_state {
        1 => {
            chip.irq_base = value & 0xf8;
            chip.init_state = 2;
        }
        // ICW3, the cascade's wiring, is fixed.
        2 => chip.init_state = if chip.four_byte_init { 3 } else { 0 },
        3 => {
            chip.special_fully_nested_mode = value & 0x10 != 0;
            chip.auto_eoi = value & 0x02 != 0;
            chip.init_state = 0;
        }
        _ => chip.imr = value,
    }
}

/// End of interrupt and rotation.
fn write_ocw2(chip: &mut PicState, value: u8) {
    let input = value & 7;
    match value >> 5 {
        command @ (0 | 4) => chip.rotate_on_auto_eoi = command == 4,
        command @ (1 | 5) => {
            if let Some(rank) = highest(chip, chip.isr) {
                let input = rank.wrapping_add(chip.priority_add) & 7;
                chip.isr &= !(1 << input);
                if command == 5 {
                    chip.priority_add = (input + 1) & 7;
                }
            }
        }
        3 => chip.isr &= !(1 << input),
        6 => chip.priority_add = (input + 1) & 7,
        7 => {
            chip.isr &= !(1 << input);
            chip.priority_add = (input + 1) & 7;
        }
        // 2 is no operation.
        _ => {}
    }
}

/// Poll, register to read, special mask.
fn write_ocw3(chip: &mut PicState, value: u8) {
    chip.poll |= value & 0x04 != 0;
    if value & 0x02 != 0 {
        chip.read_isr = value & 1 != 0;
    }
    if value & 0x40 != 0 {
        chip.special_mask = value & 0x20 != 0;
    }
}

#[cfg(test)]
mod tests;
