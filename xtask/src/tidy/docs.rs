//! The documents: every link leads somewhere, decisions are numbered and found, and the files that
//! a reader looks for are there.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use super::Tree;
use crate::error::Result;

/// What a newcomer looks for at the root.
const REQUIRED: [&str; 6] = [
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "LICENSE",
    "Makefile",
    "deny.toml",
];

pub(super) fn check(tree: &mut Tree) -> Result<()> {
    for file in REQUIRED {
        if !tree.files.iter().any(|present| present == file) {
            tree.report(file, 0, "is missing");
        }
    }
    let pages: Vec<String> = tree
        .files
        .iter()
        .filter(|file| file.ends_with(".md"))
        .cloned()
        .collect();
    let mut texts = BTreeMap::new();
    for page in pages {
        let text = tree.read(&page)?;
        texts.insert(page, text);
    }
    let mut linked = Vec::new();
    for (page, text) in &texts {
        for (line, link) in links(text) {
            let (file, anchor) = link.split_once('#').unwrap_or((link.as_str(), ""));
            let target = if file.is_empty() {
                page.clone()
            } else {
                resolve(page, file)
            };
            if !tree.root.join(&target).exists() && !texts.contains_key(&target) {
                tree.report(page, line, format!("links to {link}, which does not exist"));
            } else if let Some(target_text) = texts.get(&target)
                && !anchor.is_empty()
                && !anchors(target_text).iter().any(|known| known == anchor)
            {
                tree.report(
                    page,
                    line,
                    format!("links to {link}, a heading that does not exist"),
                );
            }
            linked.push(target);
        }
    }
    check_decisions(tree, &texts, &linked);
    Ok(())
}

fn check_decisions(tree: &mut Tree, texts: &BTreeMap<String, String>, linked: &[String]) {
    let mut numbers: BTreeMap<&str, &str> = BTreeMap::new();
    for page in texts.keys() {
        let Some(name) = page.strip_prefix("docs/decisions/") else {
            continue;
        };
        if name == "README.md" {
            continue;
        }
        match name.split_once('-') {
            Some((number, _))
                if number.len() == 3 && number.bytes().all(|b| b.is_ascii_digit()) =>
            {
                if let Some(other) = numbers.insert(number, page) {
                    tree.report(page, 0, format!("has the number of {other}"));
                }
            }
            _ => tree.report(page, 0, "is not named NNN-title.md"),
        }
        if !linked.contains(page) {
            tree.report(page, 0, "is linked from no page");
        }
    }
}

/// The relative links of a page, outside code blocks, with their lines.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut in_code = false;
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code {
            continue;
        }
        // Odd pieces are code spans.
        for prose in line.split('`').step_by(2) {
            for piece in prose.split("](").skip(1) {
                let link = piece.split([')', ' ']).next().unwrap_or_default();
                if !link.contains("://") && !link.starts_with("mailto:") {
                    found.push((index + 1, link.to_owned()));
                }
            }
        }
        // A link whose text is a code span is cut by the split above.
        for piece in line.split("`](").skip(1) {
            let link = piece.split([')', ' ']).next().unwrap_or_default();
            if !link.contains("://") && !found.contains(&(index + 1, link.to_owned())) {
                found.push((index + 1, link.to_owned()));
            }
        }
    }
    found
}

/// The path from the root of what `page` calls `link`.
pub(super) fn resolve(page: &str, link: &str) -> String {
    let base = Path::new(page).parent().unwrap_or(Path::new(""));
    let mut path = PathBuf::new();
    for part in base.join(link).components() {
        match part {
            Component::ParentDir => {
                path.pop();
            }
            Component::Normal(part) => path.push(part),
            _ => {}
        }
    }
    path.to_string_lossy().into_owned()
}

/// The anchors that forges derive from headings.
fn anchors(text: &str) -> Vec<String> {
    text.lines()
        .filter(|line| line.starts_with('#'))
        .map(|line| {
            line.trim_start_matches('#')
                .trim()
                .to_lowercase()
                .chars()
                .filter(|&c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
                .map(|c| if c == ' ' { '-' } else { c })
                .collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(pages: &[(&str, &str)]) -> Vec<String> {
        let directory = tempfile::tempdir().unwrap();
        let all = REQUIRED
            .iter()
            .map(|&file| (file, ""))
            .chain(pages.iter().copied());
        let mut files = Vec::new();
        for (path, text) in all {
            let file = directory.path().join(path);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, text).unwrap();
            files.push(path.to_owned());
        }
        let mut tree = Tree {
            root: directory.path().into(),
            files,
            sources: Vec::new(),
            metadata: serde_json::Value::Null,
            findings: Vec::new(),
        };
        check(&mut tree).unwrap();
        tree.findings.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn broken_links_and_lost_decisions_are_found() {
        let decision = ("docs/decisions/001-a.md", "# A b: c\n");
        let cases: [(&str, usize); 7] = [
            ("[x](docs/decisions/001-a.md)", 0),
            ("[x](docs/decisions/001-a.md#a-b-c)", 0),
            ("[x](docs/decisions/001-a.md#other)", 1),
            (
                "[`x`](docs/decisions/001-a.md) [y](https://nowhere.example)",
                0,
            ),
            ("[x](docs/decisions/001-a.md) [`y`](none.md)", 1),
            ("nothing", 1),
            ("`[x](none.md)` [x](docs/decisions/001-a.md)", 0),
        ];
        for (text, expected) in cases {
            let found = findings(&[decision, ("page.md", text)]);
            assert_eq!(found.len(), expected, "{text}: {found:?}");
        }
        let twice = findings(&[
            decision,
            ("docs/decisions/001-b.md", ""),
            ("docs/decisions/README.md", "[a](001-a.md) [b](001-b.md)"),
        ]);
        assert_eq!(twice.len(), 1, "{twice:?}");
    }
}
