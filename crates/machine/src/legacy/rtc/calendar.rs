//! Dates and times as the clock's registers hold them.

use super::register;

const SECONDS_PER_DAY: i64 = 86_400;

/// No date that registers can hold is further from 1970 than this many seconds.
pub(super) const MAX_SECONDS: i64 = 26_000 * 366 * SECONDS_PER_DAY;

/// Whether fields are BCD or binary, hours to 12 or 24.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Format {
    pub(super) binary: bool,
    pub(super) hours24: bool,
}

/// The top bit of the hours in 12-hour form.
const PM: u8 = 0x80;

impl Format {
    fn encode(self, value: u8) -> u8 {
        if self.binary {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(self, raw: u8) -> u8 {
        if self.binary {
            raw
        } else {
            (raw >> 4) * 10 + (raw & 0x0f)
        }
    }

    fn encode_hour(self, hour: u8) -> u8 {
        if self.hours24 {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { PM } else { 0 };
        let hour = if hour.is_multiple_of(12) {
            12
        } else {
            hour % 12
        };
        self.encode(hour) | pm
    }

    fn decode_hour(self, raw: u8) -> u8 {
        if self.hours24 {
            return self.decode(raw);
        }
        let hour = self.decode(raw & !PM) % 12;
        if raw & PM != 0 { hour + 12 } else { hour }
    }
}

/// A date and time of day in the proleptic Gregorian calendar, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Date {
    year: i64,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
    /// Sunday is 1.
    weekday: u8,
}

impl Date {
    /// The date `seconds` after 1970-01-01 00:00:00.
    pub(super) fn of(seconds: i64) -> Self {
        let days = seconds.div_euclid(SECONDS_PER_DAY);
        let time = seconds.rem_euclid(SECONDS_PER_DAY);
        // Years begin in March here, so that the leap day is the last of its year; 400 of them have
        // 146097 days.
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = (march_month + 2) % 12 + 1;
        Self {
            year: era * 400 + year_of_era + i64::from(month <= 2),
            month: month as u8,
            day: (day_of_year - (153 * march_month + 2) / 5 + 1) as u8,
            hour: (time / 3600) as u8,
            minute: (time / 60 % 60) as u8,
            second: (time % 60) as u8,
            weekday: ((days + 4).rem_euclid(7) + 1) as u8,
        }
    }

    /// Seconds since 1970-01-01 00:00:00. A field beyond its range counts on into the next larger.
    pub(super) fn seconds(&self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let year = self.year - i64::from(month <= 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + i64::from(self.day) - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        days * SECONDS_PER_DAY
            + i64::from(self.hour) * 3600
            + i64::from(self.minute) * 60
            + i64::from(self.second)
    }

    /// What the time register `index` shows of this date.
    pub(super) fn register(&self, index: u8, format: Format) -> u8 {
        let century = self.year.div_euclid(100).rem_euclid(100) as u8;
        let year = self.year.rem_euclid(100) as u8;
        match index {
            register::SECONDS => format.encode(self.second),
            register::MINUTES => format.encode(self.minute),
            register::HOURS => format.encode_hour(self.hour),
            register::WEEKDAY => format.encode(self.weekday),
            register::DAY => format.encode(self.day),
            register::MONTH => format.encode(self.month),
            register::YEAR => format.encode(year),
            // Systems expect BCD of the century's byte in either format.
            register::CENTURY => ((century / 10) << 4) | (century % 10),
            _ => 0,
        }
    }

    /// The date that the time registers hold.
    pub(super) fn decode(format: Format, register: impl Fn(u8) -> u8) -> Self {
        let bcd = Format {
            binary: false,
            hours24: true,
        };
        let field = |index| format.decode(register(index));
        let century = bcd.decode(register(register::CENTURY));
        Self {
            year: i64::from(century) * 100 + i64::from(field(register::YEAR)),
            month: field(register::MONTH),
            day: field(register::DAY),
            hour: format.decode_hour(register(register::HOURS)),
            minute: field(register::MINUTES),
            second: field(register::SECONDS),
            weekday: 1,
        }
    }
}

/// A time of day at which the alarm goes off; a field without value matches any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alarm {
    hour: Option<u8>,
    minute: Option<u8>,
    second: Option<u8>,
}

impl Alarm {
    pub(super) fn decode(format: Format, hour: u8, minute: u8, second: u8) -> Self {
        // The two top bits set mean "don't care".
        let field = |raw: u8, decoded: u8| (raw < 0xc0).then_some(decoded);
        Self {
            hour: field(hour, format.decode_hour(hour)),
            minute: field(minute, format.decode(minute)),
            second: field(second, format.decode(second)),
        }
    }

    /// The first match after `after`, both in seconds since 1970; none if a field is out of range.
    pub(super) fn next_after(&self, after: i64) -> Option<i64> {
        let from = after + 1;
        let day = from.div_euclid(SECONDS_PER_DAY) * SECONDS_PER_DAY;
        self.first_from(from - day)
            .map(|time| day + time)
            .or_else(|| Some(day + SECONDS_PER_DAY + self.first_from(0)?))
    }

    /// The first match in a day at or after `from`, in seconds of the day.
    fn first_from(&self, from: i64) -> Option<i64> {
        let candidates = |field: Option<u8>, count: i64| match field {
            Some(value) => i64::from(value)..(i64::from(value) + 1).min(count),
            None => 0..count,
        };
        // An empty range of seconds would make the outer loops run in vain.
        let seconds = candidates(self.second, 60);
        let last_second = seconds.clone().last()?;
        for hour in candidates(self.hour, 24) {
            for minute in candidates(self.minute, 60) {
                let start = hour * 3600 + minute * 60;
                if start + last_second < from {
                    continue;
                }
                if let Some(second) = seconds.clone().find(|second| start + second >= from) {
                    return Some(start + second);
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY: Alarm = Alarm {
        hour: None,
        minute: None,
        second: None,
    };

    #[test]
    fn dates_agree_with_the_calendar() {
        for (seconds, year, month, day, weekday) in [
            (0, 1970, 1, 1, 5),
            (951_782_400, 2000, 2, 29, 3),
            (1_795_478_400, 2026, 11, 24, 3),
            (4_107_542_400, 2100, 3, 1, 2),
            (-86_400, 1969, 12, 31, 4),
        ] {
            let date = Date::of(seconds);
            let found = (date.year, date.month, date.day, date.weekday);
            assert_eq!(found, (year, month, day, weekday), "{seconds}");
        }
    }

    #[test]
    fn every_day_of_eight_centuries_converts_back() {
        for day in -146_097..146_097 {
            let seconds = day * SECONDS_PER_DAY + 12_345;
            assert_eq!(Date::of(seconds).seconds(), seconds);
        }
    }

    #[test]
    fn registers_hold_every_hour_in_every_format() {
        for binary in [false, true] {
            for hours24 in [false, true] {
                let format = Format { binary, hours24 };
                for hour in 0..24 {
                    assert_eq!(format.decode_hour(format.encode_hour(hour)), hour);
                }
            }
        }
        let format = Format {
            binary: false,
            hours24: false,
        };
        assert_eq!(
            [0, 11, 12, 23].map(|hour| format.encode_hour(hour)),
            [0x12, 0x11, 0x92, 0x91]
        );
    }

    #[test]
    fn no_register_content_is_out_of_bounds() {
        for byte in 0..=u8::MAX {
            for binary in [false, true] {
                let format = Format {
                    binary,
                    hours24: true,
                };
                let seconds = Date::decode(format, |_| byte).seconds();
                assert!(seconds.abs() < MAX_SECONDS, "{byte:#x}");
            }
        }
    }

    #[test]
    fn alarms_come_at_their_next_match() {
        let at = |hour, minute, second| Alarm {
            hour,
            minute,
            second,
        };
        for (alarm, after, expected) in [
            (ANY, 10, Some(11)),
            (at(None, None, Some(5)), 5, Some(65)),
            (at(None, Some(0), Some(0)), 0, Some(3600)),
            (at(Some(1), Some(2), Some(3)), 0, Some(3723)),
            (at(Some(1), Some(2), Some(3)), 3723, Some(3723 + 86_400)),
            (at(Some(23), None, None), 86_399, Some(86_400 + 82_800)),
            (at(Some(24), None, None), 0, None),
            (at(None, Some(60), None), 0, None),
            (at(None, None, Some(60)), 0, None),
        ] {
            assert_eq!(alarm.next_after(after), expected, "{alarm:?} after {after}");
        }
    }
}
