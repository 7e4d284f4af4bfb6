//! The order of versions (UAPI Group's Version Format Specification, "Version Comparison").

use std::cmp::Ordering;

/// Compares two versions; the newer is the greater.
pub(super) fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        a = skip_ignored(a);
        b = skip_ignored(b);
        if let Some(order) = marker(&mut a, &mut b, b'~') {
            return order;
        }
        if a.is_empty() || b.is_empty() {
            return a.len().cmp(&b.len());
        }
        for separator in [b'-', b'^', b'.'] {
            if let Some(order) = marker(&mut a, &mut b, separator) {
                return order;
            }
        }
        let digits = |text: &[u8]| text.first().is_some_and(u8::is_ascii_digit);
        let order = if digits(a) || digits(b) {
            numeric(
                take(&mut a, u8::is_ascii_digit),
                take(&mut b, u8::is_ascii_digit),
            )
        } else {
            take(&mut a, u8::is_ascii_alphabetic).cmp(take(&mut b, u8::is_ascii_alphabetic))
        };
        if order != Ordering::Equal {
            return order;
        }
    }
}

fn skip_ignored(text: &[u8]) -> &[u8] {
    let counts = |byte: &u8| byte.is_ascii_alphanumeric() || b"~-^.".contains(byte);
    let start = text.iter().position(counts).unwrap_or(text.len());
    &text[start..]
}

/// A text that starts with `byte` is older than one that does not; if both do, it is skipped.
fn marker(a: &mut &[u8], b: &mut &[u8], byte: u8) -> Option<Ordering> {
    match (a.split_first(), b.split_first()) {
        (Some((first, a_rest)), Some((second, b_rest))) if *first == byte && *second == byte => {
            (*a, *b) = (a_rest, b_rest);
            None
        }
        (Some((first, _)), _) if *first == byte => Some(Ordering::Less),
        (_, Some((second, _))) if *second == byte => Some(Ordering::Greater),
        _ => None,
    }
}

fn take<'a>(text: &mut &'a [u8], belongs: impl Fn(&u8) -> bool) -> &'a [u8] {
    let len = text.iter().position(|byte| !belongs(byte));
    let (taken, rest) = text.split_at(len.unwrap_or(text.len()));
    *text = rest;
    taken
}

fn numeric(a: &[u8], b: &[u8]) -> Ordering {
    // No digits at all are older than any number.
    if a.is_empty() || b.is_empty() {
        return a.len().cmp(&b.len());
    }
    let significant = |digits: &'_ [u8]| {
        let start = digits.iter().position(|digit| *digit != b'0');
        digits[start.unwrap_or(digits.len())..].to_vec()
    };
    let (a, b) = (significant(a), significant(b));
    a.len().cmp(&b.len()).then(a.cmp(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_order_as_specified() {
        for (older, newer) in [
            ("5.9", "5.10"),
            ("6.1.0-9-amd64", "6.1.0-10-amd64"),
            ("6.1.0", "6.1.0-1"),
            ("6.1~rc1", "6.1"),
            ("6.1", "6.1^post"),
            ("6.1^post", "6.1.1"),
            ("6.1-1", "6.1^1"),
            ("6.1-1", "6.1.1"),
            ("1.a", "1.1"),
            ("abc", "abd"),
            ("ab", "abc"),
            ("Abc", "abc"),
            ("", "1"),
            ("~1", ""),
            ("123456789012345678901", "123456789012345678902"),
        ] {
            assert_eq!(compare(older, newer), Ordering::Less, "{older} {newer}");
            assert_eq!(compare(newer, older), Ordering::Greater, "{newer} {older}");
        }
        for (a, b) in [("1.0", "1.0"), ("1.01", "1.1"), ("1_2", "12"), ("", "")] {
            // What separates digits ends a number; all else is skipped.
            let expected = if a == "1_2" {
                Ordering::Less
            } else {
                Ordering::Equal
            };
            assert_eq!(compare(a, b), expected, "{a} {b}");
        }
    }
}
