//! GRUB's `test` and `[`.

/// Parentheses and negations within each other.
const MAX_DEPTH: u32 = 32;

/// What a condition asks of the disk: the operator's letter (`d`, `e`, `f`, `s`) and the path.
pub(super) type Probe<'a> = &'a dyn Fn(char, &str) -> bool;

/// Evaluates the arguments of `test`. What is malformed is false.
pub(super) fn test(arguments: &[String], probe: Probe<'_>) -> bool {
    let mut parser = Parser {
        rest: arguments,
        probe,
        depth: 0,
    };
    parser.any() && parser.rest.is_empty()
}

struct Parser<'a> {
    rest: &'a [String],
    probe: Probe<'a>,
    depth: u32,
}

impl Parser<'_> {
    fn take(&mut self, text: &str) -> bool {
        match self.rest.split_first() {
            Some((first, rest)) if first == text => {
                self.rest = rest;
                true
            }
            _ => false,
        }
    }

    fn any(&mut self) -> bool {
        let mut value = self.all();
        while self.take("-o") {
            value |= self.all();
        }
        value
    }

    fn all(&mut self) -> bool {
        let mut value = self.one();
        while self.take("-a") {
            value &= self.one();
        }
        value
    }

    fn one(&mut self) -> bool {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            self.rest = &[];
            return false;
        }
        let value = if let Some(value) = self.binary() {
            value
        } else if self.rest.len() > 1 && self.take("!") {
            !self.one()
        } else if self.take("(") {
            let value = self.any();
            self.take(")") && value
        } else {
            self.unary()
        };
        self.depth -= 1;
        value
    }

    fn binary(&mut self) -> Option<bool> {
        let [left, operator, right, rest @ ..] = self.rest else {
            return None;
        };
        let number = |text: &str| text.trim().parse::<i64>().unwrap_or(0);
        let order = number(left).cmp(&number(right));
        let value = match operator.as_str() {
            "=" | "==" => left == right,
            "!=" => left != right,
            "<" => left < right,
            ">" => left > right,
            "-eq" => order.is_eq(),
            "-ne" => order.is_ne(),
            "-lt" => order.is_lt(),
            "-le" => order.is_le(),
            "-gt" => order.is_gt(),
            "-ge" => order.is_ge(),
            _ => return None,
        };
        self.rest = rest;
        Some(value)
    }

    fn unary(&mut self) -> bool {
        let (operator, operand) = match self.rest {
            [] => return false,
            [only] => {
                self.rest = &[];
                return !only.is_empty();
            }
            [operator, operand, rest @ ..] => {
                let known = ["-z", "-n", "-d", "-e", "-f", "-s"].contains(&operator.as_str());
                if !known {
                    self.rest = &self.rest[1..];
                    return !operator.is_empty();
                }
                self.rest = rest;
                (operator.as_str(), operand)
            }
        };
        match operator {
            "-z" => operand.is_empty(),
            "-n" => !operand.is_empty(),
            operator => (self.probe)(operator.chars().nth(1).unwrap_or_default(), operand),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_hold_as_in_grub() {
        for (text, expected) in [
            ("xy = xy", true),
            ("a != a", false),
            ("10 -gt 9", true),
            ("-s /there", true),
            ("-s /missing", false),
            ("! -s /missing", true),
            ("-z @", true),
            ("-n @", false),
            ("@", false),
            ("word", true),
            ("a = a -a b = c", false),
            ("a = b -o c = c", true),
            ("( a = a ) -a ! ( b = c )", true),
            ("", false),
            ("( a = a", false),
            ("a = a b", false),
        ] {
            // @ stands for an empty argument.
            let arguments: Vec<_> = text
                .split_whitespace()
                .map(|word| word.replace('@', ""))
                .collect();
            let probe = |_: char, path: &str| path == "/there";
            assert_eq!(test(&arguments, &probe), expected, "{text}");
        }
        let deep = vec!["!".to_owned(); 100_000];
        assert!(!test(&deep, &|_, _| true));
    }
}
