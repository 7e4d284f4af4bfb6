//! No dead files, no unfinished work, and every fuzz target in the table of `fuzz/`.

use std::collections::BTreeSet;

use super::Tree;
use super::docs::resolve;
use super::source::Source;
use crate::error::Result;

/// Marks of unfinished work, split so that this file does not contain them.
const MARKS: [&str; 4] = [
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("XX", "X"),
    concat!("dbg", "!("),
];

pub(super) fn check(tree: &mut Tree) -> Result<()> {
    check_reachable(tree);
    check_marks(tree)?;
    check_fuzz_table(tree);
    Ok(())
}

/// Every Rust file is a root that Cargo knows or is reached from one by `mod`.
fn check_reachable(tree: &mut Tree) {
    let root = format!("{}/", tree.root.display());
    let mut open: Vec<String> = vec!["fuzz/src/main.rs".into()];
    for package in tree.metadata["packages"].as_array().into_iter().flatten() {
        for target in package["targets"].as_array().into_iter().flatten() {
            if let Some(path) = target["src_path"]
                .as_str()
                .and_then(|p| p.strip_prefix(&root))
            {
                open.push(path.to_owned());
            }
        }
    }
    let roots: BTreeSet<String> = open.iter().cloned().collect();
    let mut reached = BTreeSet::new();
    while let Some(path) = open.pop() {
        if !reached.insert(path.clone()) {
            continue;
        }
        if let Some(source) = tree.sources.iter().find(|source| source.path == path) {
            open.extend(children(source, roots.contains(&path)));
        }
    }
    let dead: Vec<String> = tree
        .sources
        .iter()
        .map(|source| source.path.clone())
        .filter(|path| !reached.contains(path))
        .collect();
    for path in dead {
        tree.report(&path, 0, "is no module of any crate");
    }
}

/// Where the modules that `source` declares may be; `tests/x.rs` keeps its own beside it.
fn children(source: &Source, is_root: bool) -> Vec<String> {
    let stem = source.path.strip_suffix(".rs").unwrap_or(&source.path);
    let (parent, name) = stem.rsplit_once('/').unwrap_or(("", stem));
    let directory = if is_root || name == "mod" {
        parent
    } else {
        stem
    };
    let mut files = Vec::new();
    for (offset, _) in source.words("mod") {
        if let Some(path) = path_attribute(&source.text[..offset]) {
            files.push(resolve(&source.path, path));
        } else if let Some((name, _)) = source.code[offset + 3..].split_once([';', '{']) {
            let name = name.trim();
            files.extend([
                format!("{directory}/{name}.rs"),
                format!("{directory}/{name}/mod.rs"),
            ]);
        }
    }
    files
}

/// The file that the `#[path = "…"]` at the end of `text` names.
fn path_attribute(text: &str) -> Option<&str> {
    let (before, path) = text.trim_end().strip_suffix("\"]")?.rsplit_once('"')?;
    before.ends_with("#[path = ").then_some(path)
}

fn check_marks(tree: &mut Tree) -> Result<()> {
    let files: Vec<String> = tree
        .files
        .iter()
        .filter(|file| {
            [".rs", ".md", ".toml", ".sh", ".yml", "Makefile", ".ci/run"]
                .iter()
                .any(|end| file.ends_with(end))
        })
        .cloned()
        .collect();
    for file in files {
        let text = tree.read(&file)?;
        for (index, line) in text.lines().enumerate() {
            for mark in MARKS {
                if contains_word(line, mark) {
                    tree.report(&file, index + 1, format!("unfinished work ({mark})"));
                }
            }
        }
    }
    Ok(())
}

fn contains_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(start, _)| {
        let outside = |c: Option<char>| !c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        outside(line[..start].chars().next_back())
            && (word.ends_with('(') || outside(line[start + word.len()..].chars().next()))
    })
}

fn check_fuzz_table(tree: &mut Tree) {
    let tables: String = tree
        .sources
        .iter()
        .filter(|source| source.path.starts_with("fuzz/"))
        .map(|source| source.code.as_str())
        .collect();
    let mut missing = Vec::new();
    for source in tree
        .sources
        .iter()
        .filter(|source| source.path.starts_with("crates/"))
    {
        for function in source.functions() {
            let declaration = source
                .code
                .lines()
                .nth(function.line - 1)
                .unwrap_or_default();
            if function.name.starts_with("fuzz_")
                && declaration.trim_start().starts_with("pub fn")
                && !contains_word(&tables, &function.name)
            {
                missing.push((source.path.clone(), function));
            }
        }
    }
    for (path, function) in missing {
        let message = format!("{} is not in the table of fuzz/src/main.rs", function.name);
        tree.report(&path, function.line, message);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(files: &[(&str, &str)]) -> Vec<String> {
        let mut tree = Tree {
            root: "/nowhere".into(),
            files: Vec::new(),
            sources: files
                .iter()
                .map(|(p, t)| Source::new(p, (*t).into()))
                .collect(),
            metadata: serde_json::json!({"packages": [
                {"targets": [{"src_path": "/nowhere/crates/a/src/lib.rs"}]},
            ]}),
            findings: Vec::new(),
        };
        check(&mut tree).unwrap();
        tree.findings.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn dead_files_are_found() {
        let root = (
            "crates/a/src/lib.rs",
            "pub mod one;\nmod tests { fn f() {} }",
        );
        assert!(
            findings(&[
                root,
                ("crates/a/src/one.rs", "mod two;"),
                ("crates/a/src/one/two.rs", "")
            ])
            .is_empty()
        );
        let elsewhere = (
            "crates/a/src/one.rs",
            "#[path = \"../two/three.rs\"]\nmod two;",
        );
        assert!(findings(&[root, elsewhere, ("crates/a/two/three.rs", "")]).is_empty());
        assert_eq!(
            findings(&[root, ("crates/a/src/two.rs", "")]),
            ["crates/a/src/two.rs: is no module of any crate"]
        );
    }

    #[test]
    fn fuzz_functions_must_be_in_the_table() {
        let target = ("crates/a/src/lib.rs", "pub fn fuzz_disk(data: &[u8]) {}");
        assert_eq!(findings(&[target]).len(), 1);
        assert!(findings(&[target, ("fuzz/src/main.rs", "T = [(n, a::fuzz_disk)]")]).is_empty());
        assert_eq!(
            findings(&[target, ("fuzz/src/main.rs", "a::fuzz_disk_two")]).len(),
            1
        );
    }

    #[test]
    fn marks_are_whole_words() {
        let cases = [
            ("// a TO", "DO: b", true),
            ("TO", "DONE", false),
            ("/mnt/XX", "XX", false),
        ];
        for (one, two, expected) in cases {
            let line = format!("{one}{two}");
            assert_eq!(
                MARKS.iter().any(|mark| contains_word(&line, mark)),
                expected,
                "{line}"
            );
        }
    }
}
