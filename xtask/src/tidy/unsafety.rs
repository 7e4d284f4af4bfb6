//! Where unsafe code may be, and in which form. That every block argues its safety is clippy's
//! `undocumented_unsafe_blocks`, which the workspace denies; unsafe functions are checked here.

use super::Tree;

/// A module (its file and the folder beside it) and why it cannot do without.
const ALLOWED: &[(&str, &str)] = &[
    (
        "crates/machine/src/memory",
        "guest memory is mapped and shared with other processes",
    ),
    (
        "crates/machine/src/kvm",
        "KVM's ioctls take guest memory and descriptors by number",
    ),
    (
        "crates/storage/src/uring",
        "the kernel writes into buffers behind the borrow checker",
    ),
    (
        "crates/storage/src/vhost_user/memory",
        "the frontend's memory is mapped from its descriptors",
    ),
    (
        "crates/cpu/src/memory",
        "guest RAM is shared memory, reached by host address",
    ),
    ("crates/cpu/src/mmu", "TLB entries hold host addresses"),
    (
        "crates/cpu/src/execute/tests",
        "tests compare with the host's instructions, on memory of their own",
    ),
    (
        "crates/cpu/src/vector/native",
        "SSE arithmetic by the host's own instructions",
    ),
    (
        "crates/cpu/src/x87/native",
        "x87 arithmetic by the host's own instructions",
    ),
    (
        "crates/cpu/tests/differential/host",
        "runs generated code in a child process, in pages at fixed addresses",
    ),
];

pub(super) fn check(tree: &mut Tree) {
    let mut findings = Vec::new();
    for source in &tree.sources {
        // Calls into libFuzzer are what fuzz/ is.
        if source.path.starts_with("fuzz/") {
            continue;
        }
        let allowed = ALLOWED
            .iter()
            .any(|(module, _)| covers(module, &source.path));
        for (offset, line) in source.words("unsafe") {
            if !allowed {
                findings.push((
                    source.path.clone(),
                    line,
                    "unsafe outside the modules named in xtask/src/tidy/unsafety.rs",
                ));
            } else if source.code[offset..].starts_with("unsafe fn")
                && !documented(&source.text, line)
            {
                findings.push((source.path.clone(), line, "unsafe fn without `# Safety`"));
            }
        }
        for (_, line) in source.words("unsafe_code") {
            let text = source.text.lines().nth(line - 1).unwrap_or_default();
            if text.contains("allow") && !allowed {
                findings.push((source.path.clone(), line, "unsafe code is not allowed here"));
            }
        }
    }
    for (root, has_unsafe) in crate_roots(tree) {
        let source = tree.sources.iter().find(|source| source.path == root);
        if !has_unsafe && !source.is_some_and(|s| s.code.contains("#![forbid(unsafe_code)]")) {
            findings.push((
                root,
                0,
                "has no unsafe module and does not forbid unsafe code",
            ));
        }
    }
    for (module, _) in ALLOWED {
        let mut own = tree
            .sources
            .iter()
            .filter(|source| covers(module, &source.path))
            .peekable();
        if own.peek().is_some() && !own.any(|source| !source.words("unsafe").is_empty()) {
            findings.push((
                (*module).into(),
                0,
                "has no unsafe code: take it off the list",
            ));
        }
    }
    for (path, line, message) in findings {
        tree.report(&path, line, message);
    }
}

fn covers(module: &str, path: &str) -> bool {
    path.strip_prefix(module)
        .is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
}

/// Library and program roots, and whether an unsafe module belongs to their crate.
fn crate_roots(tree: &Tree) -> Vec<(String, bool)> {
    tree.files
        .iter()
        .filter_map(|file| {
            let folder = file
                .strip_suffix("src/lib.rs")
                .or_else(|| file.strip_suffix("src/main.rs"))?;
            let own = ALLOWED.iter().any(|(module, _)| module.starts_with(folder));
            (!folder.starts_with("fuzz/")).then(|| (file.clone(), own))
        })
        .collect()
}

/// Whether the comment above the function on `line` has a `# Safety` section.
fn documented(text: &str, line: usize) -> bool {
    let lines: Vec<&str> = text.lines().collect();
    lines[..line - 1]
        .iter()
        .rev()
        .map(|line| line.trim_start())
        .take_while(|line| line.starts_with("//") || line.starts_with('#'))
        .any(|line| line.contains("# Safety"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::source::Source;

    fn findings(path: &str, text: &str) -> Vec<String> {
        let mut tree = Tree {
            root: "/nowhere".into(),
            files: vec![path.into()],
            sources: vec![Source::new(path, text.into())],
            metadata: serde_json::Value::Null,
            findings: Vec::new(),
        };
        check(&mut tree);
        tree.findings.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn unsafe_code_is_found() {
        let cases = [
            (
                "crates/machine/src/kvm/vcpu.rs",
                "fn f() { unsafe { g() } }",
                0,
            ),
            ("crates/machine/src/kvm.rs", "unsafe fn f() {}", 1),
            (
                "crates/machine/src/kvm.rs",
                "/// # Safety\n/// Never.\n#[inline]\nunsafe fn f() {}",
                0,
            ),
            ("crates/machine/src/kvmx.rs", "fn f() { unsafe { g() } }", 1),
            ("crates/machine/src/pci.rs", "#![allow(unsafe_code)]", 1),
            (
                "crates/machine/src/pci.rs",
                "// unsafe\nfn f() { g(\"unsafe\") }",
                0,
            ),
            ("crates/base/src/lib.rs", "", 1),
            ("crates/base/src/lib.rs", "#![forbid(unsafe_code)]", 0),
            ("crates/machine/src/lib.rs", "", 0),
        ];
        for (path, text, expected) in cases {
            let found = findings(path, text);
            assert_eq!(found.len(), expected, "{path}: {text}: {found:?}");
        }
    }
}
