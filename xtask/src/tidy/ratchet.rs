//! Long files and long functions: the limits, and the exceptions in `xtask/ratchet.txt`, which may
//! become shorter and never longer.

use std::collections::BTreeMap;
use std::fs;

use super::Tree;
use crate::error::{Error, Result};

const FILE_LINES: usize = 500;
const FUNCTION_LINES: usize = 60;
const RATCHET: &str = "xtask/ratchet.txt";
const HEAD: &str = "\
# Files over 500 lines and functions over 60, with their length. A number may only shrink, a line
# may only go: `cargo xtask tidy --shrink` writes today's lengths where they are shorter.
";

pub(super) fn check(tree: &mut Tree, shrink: bool) -> Result<()> {
    let allowed = parse(&tree.read(RATCHET).unwrap_or_default());
    let mut long: BTreeMap<String, (String, usize, usize)> = BTreeMap::new();
    for source in &tree.sources {
        let lines = source.text.lines().count();
        if lines > FILE_LINES {
            long.insert(source.path.clone(), (source.path.clone(), 0, lines));
        }
        for function in source
            .functions()
            .into_iter()
            .filter(|f| f.lines > FUNCTION_LINES)
        {
            let key = format!("{} {}", source.path, function.name);
            // Methods of one name in one file share an entry: the longest counts.
            let longest = long.get(&key).map_or(0, |(_, _, lines)| *lines);
            if function.lines > longest {
                long.insert(key, (source.path.clone(), function.line, function.lines));
            }
        }
    }
    for (key, (path, line, lines)) in &long {
        let limit = if *line == 0 {
            FILE_LINES
        } else {
            FUNCTION_LINES
        };
        match allowed.get(key) {
            Some(allowed) if lines <= allowed => {}
            Some(allowed) => tree.report(
                path,
                *line,
                format!("{key} has grown from {allowed} to {lines} lines: split it"),
            ),
            None => tree.report(
                path,
                *line,
                format!("{key} has {lines} lines, more than {limit}: split it"),
            ),
        }
    }
    let kept = allowed.iter().filter_map(|(key, &allowed)| {
        let (_, _, lines) = long.get(key)?;
        Some((key.clone(), allowed.min(*lines)))
    });
    let kept: BTreeMap<String, usize> = kept.collect();
    if shrink {
        let path = tree.root.join(RATCHET);
        fs::write(&path, print(&kept)).map_err(Error::file("write", &path))?;
    } else if kept != allowed {
        tree.report(RATCHET, 0, "can shrink: run `cargo xtask tidy --shrink`");
    }
    Ok(())
}

fn parse(text: &str) -> BTreeMap<String, usize> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| {
            let (key, lines) = line.rsplit_once(' ')?;
            Some((key.to_owned(), lines.parse().ok()?))
        })
        .collect()
}

fn print(entries: &BTreeMap<String, usize>) -> String {
    let lines: String = entries
        .iter()
        .map(|(key, lines)| format!("{key} {lines}\n"))
        .collect();
    format!("{HEAD}{lines}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::source::Source;

    #[test]
    fn lengths_only_shrink() {
        let function = |lines: usize| format!("fn f() {{\n{}}}\n", "g();\n".repeat(lines - 2));
        let cases = [
            (function(60), "", 0, ""),
            (function(61), "", 1, ""),
            (function(61), "a.rs f 61\n", 0, "a.rs f 61\n"),
            (function(61), "a.rs f 70\n", 1, "a.rs f 61\n"),
            (function(71), "a.rs f 70\n", 1, "a.rs f 70\n"),
            (function(60), "a.rs f 70\n", 1, ""),
            ("\n".repeat(501), "", 1, ""),
            ("\n".repeat(501), "a.rs 501\n", 0, "a.rs 501\n"),
        ];
        for (text, ratchet, findings, shrunk) in cases {
            let directory = tempfile::tempdir().unwrap();
            let file = directory.path().join(RATCHET);
            fs::create_dir(directory.path().join("xtask")).unwrap();
            fs::write(&file, format!("{HEAD}{ratchet}")).unwrap();
            let mut tree = Tree {
                root: directory.path().into(),
                files: Vec::new(),
                sources: vec![Source::new("a.rs", text.clone())],
                metadata: serde_json::Value::Null,
                findings: Vec::new(),
            };
            check(&mut tree, false).unwrap();
            assert_eq!(
                tree.findings.len(),
                findings,
                "{text} {ratchet}: {:?}",
                tree.findings
            );
            check(&mut tree, true).unwrap();
            assert_eq!(
                fs::read_to_string(&file).unwrap(),
                format!("{HEAD}{shrunk}")
            );
        }
    }
}
