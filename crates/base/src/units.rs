//! Byte counts and page sizes, and how people write them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The size of the smallest page of an x86-64 guest and of every host Mica runs on, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// A number of bytes, written by people as `512M`, `2G` or `4096`.
///
/// The suffixes `K`, `M`, `G` and `T` are powers of 1024, as everywhere in virtualization; an
/// optional `iB` or `B` behind them changes nothing. In JSON it is the plain number.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// `n` mebibytes.
    #[must_use]
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// `n` gibibytes.
    #[must_use]
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }
}

/// Why a text is no number of bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ParseBytesError {
    /// There is no whole number at the start.
    NoNumber(String),
    /// The suffix is none of K, M, G, T.
    UnknownSuffix(String),
    /// The count does not fit 64 bits.
    TooLarge(String),
}

impl fmt::Display for ParseBytesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoNumber(text) => write!(f, "'{text}' is no size; write it like 512M or 2G"),
            Self::UnknownSuffix(text) => {
                write!(
                    f,
                    "'{text}' has an unknown unit; the units are K, M, G and T"
                )
            }
            Self::TooLarge(text) => write!(f, "'{text}' is more than 2^64 bytes"),
        }
    }
}

impl std::error::Error for ParseBytesError {}

impl FromStr for Bytes {
    type Err = ParseBytesError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, suffix) = text.split_at(digits);
        if number.is_empty() {
            return Err(ParseBytesError::NoNumber(text.to_owned()));
        }
        let number: u64 = number
            .parse()
            .map_err(|_| ParseBytesError::TooLarge(text.to_owned()))?;
        let suffix = suffix.to_ascii_uppercase();
        let unit = suffix
            .strip_suffix("IB")
            .or(suffix.strip_suffix('B'))
            .unwrap_or(&suffix);
        let shift = match unit {
            "" => 0,
            "K" => 10,
            "M" => 20,
            "G" => 30,
            "T" => 40,
            _ => return Err(ParseBytesError::UnknownSuffix(text.to_owned())),
        };
        number
            .checked_mul(1 << shift)
            .map(Self)
            .ok_or_else(|| ParseBytesError::TooLarge(text.to_owned()))
    }
}

impl fmt::Display for Bytes {
    /// Writes the largest unit that divides the count, so that parsing gives the same count back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1k", 1024),
            ("512M", 512 << 20),
            ("2G", 2 << 30),
            ("2GiB", 2 << 30),
            ("1tb", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused_with_the_text_in_the_error() {
        for text in [
            "",
            "G",
            "-1",
            "1X",
            "1.5G",
            "99999999999999999999",
            "99999999T",
        ] {
            let error = text.parse::<Bytes>().expect_err(text);
            assert!(error.to_string().contains(text), "{error}");
        }
    }

    #[test]
    fn what_is_displayed_parses_back() {
        for bytes in [0, 1, 1023, 1024, 1536, 3 << 20, 5 << 30, u64::MAX] {
            assert_eq!(Bytes(bytes).to_string().parse(), Ok(Bytes(bytes)));
        }
    }
}
