//! A Rust file as the rules see it: its text, and the same text with comments and literals blanked,
//! so that braces and keywords in it are code.
//!
//! A lexer of these few tokens is enough for the rules and, unlike a parser, does not have to be
//! updated with the language.

/// One Rust file.
pub(super) struct Source {
    /// Relative to the root.
    pub(super) path: String,
    pub(super) text: String,
    /// As long as `text`, line for line; comments, strings and characters are spaces.
    pub(super) code: String,
}

/// A function's place.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Function {
    pub(super) name: String,
    /// Counted from one.
    pub(super) line: usize,
    /// From the line of `fn` to that of the closing brace.
    pub(super) lines: usize,
}

impl Source {
    pub(super) fn new(path: &str, text: String) -> Source {
        let code = blank(&text);
        Source {
            path: path.into(),
            text,
            code,
        }
    }

    /// Where `word` stands in the code: byte offset and line.
    pub(super) fn words(&self, word: &str) -> Vec<(usize, usize)> {
        let bytes = self.code.as_bytes();
        self.code
            .match_indices(word)
            .filter(|(start, _)| {
                let before = start.checked_sub(1).map(|at| bytes[at]);
                let after = bytes.get(start + word.len()).copied();
                !before.is_some_and(is_word) && !after.is_some_and(is_word)
            })
            .map(|(start, _)| (start, line_of(&self.code, start)))
            .collect()
    }

    /// Every function with a body.
    pub(super) fn functions(&self) -> Vec<Function> {
        self.words("fn")
            .into_iter()
            .filter_map(|(start, line)| {
                let rest = &self.code[start + 2..];
                let name: String = rest
                    .trim_start()
                    .chars()
                    .take_while(|&c| c == '_' || c.is_alphanumeric())
                    .collect();
                // A function pointer type has no name.
                let end = start
                    + 2
                    + if name.is_empty() {
                        None
                    } else {
                        body_end(rest)
                    }?;
                Some(Function {
                    name,
                    line,
                    lines: line_of(&self.code, end) - line + 1,
                })
            })
            .collect()
    }
}

fn is_word(byte: u8) -> bool {
    byte == b'_' || byte.is_ascii_alphanumeric()
}

fn line_of(text: &str, offset: usize) -> usize {
    text.as_bytes()[..offset]
        .iter()
        .filter(|&&byte| byte == b'\n')
        .count()
        + 1
}

/// The offset of the brace that closes the first block of `code`, unless a `;` comes first.
fn body_end(code: &str) -> Option<usize> {
    let (mut nesting, mut braces) = (0_usize, 0_usize);
    for (offset, byte) in code.bytes().enumerate() {
        match byte {
            b'(' | b'[' => nesting += 1,
            b')' | b']' => nesting = nesting.saturating_sub(1),
            b';' if nesting == 0 && braces == 0 => return None,
            b'{' => braces += 1,
            b'}' => {
                braces = braces.checked_sub(1)?;
                if braces == 0 && nesting == 0 {
                    return Some(offset);
                }
            }
            _ => {}
        }
    }
    None
}

/// Replaces comments and literals by spaces; lines stay.
fn blank(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut code = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let end = at + token_length(text, at);
        if end == at + 1 {
            code.push(bytes[at]);
        } else {
            code.extend(
                bytes[at..end]
                    .iter()
                    .map(|&b| if b == b'\n' { b'\n' } else { b' ' }),
            );
        }
        at = end;
    }
    String::from_utf8_lossy(&code).into_owned()
}

/// The length of the comment or literal at `at`, or one.
fn token_length(text: &str, at: usize) -> usize {
    let bytes = text.as_bytes();
    let rest = &bytes[at..];
    let after_word = at > 0 && is_word(bytes[at - 1]);
    match rest {
        [b'/', b'/', ..] => rest.iter().position(|&b| b == b'\n').unwrap_or(rest.len()),
        [b'/', b'*', ..] => block_comment(rest),
        [b'"', ..] => string(rest, 1),
        [b'b' | b'c', b'"', ..] if !after_word => string(rest, 2),
        [b'b', b'\'', ..] if !after_word => 1 + character(&text[at + 1..]).max(1),
        [b'r', b'"' | b'#', ..] if !after_word => raw_string(rest, 1),
        [b'b' | b'c', b'r', b'"' | b'#', ..] if !after_word => raw_string(rest, 2),
        [b'\'', ..] => character(&text[at..]),
        _ => 1,
    }
}

fn block_comment(rest: &[u8]) -> usize {
    let (mut depth, mut at) = (0_usize, 0);
    while at < rest.len() {
        match rest[at..] {
            [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
            [b'*', b'/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    rest.len()
}

fn string(rest: &[u8], open: usize) -> usize {
    let mut at = open;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

/// `r#name` is no string: one.
fn raw_string(rest: &[u8], prefix: usize) -> usize {
    let hashes = rest[prefix..].iter().take_while(|&&b| b == b'#').count();
    let open = prefix + hashes;
    if rest.get(open) != Some(&b'"') {
        return 1;
    }
    let mut close = vec![b'"'];
    close.resize(1 + hashes, b'#');
    rest[open + 1..]
        .windows(close.len())
        .position(|window| window == close)
        .map_or(rest.len(), |at| open + 1 + at + close.len())
}

/// A character literal; a lifetime has the length one.
fn character(rest: &str) -> usize {
    let mut characters = rest.char_indices().skip(1);
    match characters.next() {
        Some((_, '\\')) => rest[3..].find('\'').map_or(1, |at| at + 4),
        Some(_) => match characters.next() {
            Some((at, '\'')) => at + 1,
            _ => 1,
        },
        None => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanked() {
        let cases = [
            ("a // b {\nc", "a       \nc"),
            ("a /* b /* } */ c */ d", "a                   d"),
            (
                r#"f("}\"{", '{', '\'', b'{')"#,
                "f(      ,    ,     ,     )",
            ),
            ("r#\"a\"b\"# x", "         x"),
            ("fn f<'a>(x: &'a str) {}", "fn f<'a>(x: &'a str) {}"),
            ("r#type { br\"{\" }", "r#type {       }"),
            ("'é' }", "     }"),
        ];
        for (text, expected) in cases {
            assert_eq!(blank(text), expected, "{text}");
        }
    }

    #[test]
    fn functions_are_measured() {
        let text = "trait T {\n fn none(&self) -> [u8; 4];\n fn one() { a(|x| { x }) }\n}\n\
                    fn three(\n) {\n}\nstruct S(fn(u8) -> u8);\n";
        let found: Vec<(String, usize, usize)> = Source::new("x.rs", text.into())
            .functions()
            .into_iter()
            .map(|f| (f.name, f.line, f.lines))
            .collect();
        assert_eq!(found, [("one".into(), 3, 1), ("three".into(), 5, 3)]);
    }
}
