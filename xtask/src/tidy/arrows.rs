//! Which crate may know which: the table of the architecture, held against `cargo metadata`, and
//! the form of the manifests.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::Tree;
use crate::error::Result;

/// Each crate's allowed crates of ours, in builds; tests may also use `xtask`.
const ARROWS: &[(&str, &[&str])] = &[
    ("mica-base", &[]),
    ("mica-cpu", &["mica-base"]),
    ("mica-machine", &["mica-base", "mica-cpu"]),
    ("mica-storage", &["mica-base"]),
    ("mica-switch", &["mica-base"]),
    ("mica-api", &["mica-base"]),
    (
        "mica-host",
        &[
            "mica-base",
            "mica-api",
            "mica-machine",
            "mica-storage",
            "mica-switch",
        ],
    ),
    ("mica-center", &["mica-base", "mica-api"]),
    ("mica-desktop", &["mica-base", "mica-api"]),
    ("mica-guest", &["mica-base"]),
    ("mica-cli", &["mica-api"]),
    (
        "mica",
        &[
            "mica-base",
            "mica-cpu",
            "mica-machine",
            "mica-storage",
            "mica-switch",
            "mica-api",
            "mica-host",
            "mica-center",
            "mica-desktop",
            "mica-guest",
            "mica-cli",
        ],
    ),
    ("xtask", &[]),
];

/// Engines block, poll and use threads: a runtime or a web stack below them would own their loops.
const ENGINES: &[&str] = &[
    "mica-base",
    "mica-cpu",
    "mica-machine",
    "mica-storage",
    "mica-switch",
];
const NOT_IN_ENGINES: &[&str] = &[
    "tokio",
    "async-std",
    "smol",
    "async-executor",
    "futures",
    "futures-executor",
    "mio",
    "http",
    "httparse",
    "hyper",
    "h2",
    "axum",
    "actix-web",
    "warp",
    "tower",
    "tonic",
    "reqwest",
    "ureq",
    "tungstenite",
    "utoipa",
];

pub(super) fn check(tree: &mut Tree) -> Result<()> {
    let packages = packages(&tree.metadata);
    let table: BTreeMap<&str, &[&str]> = ARROWS.iter().copied().collect();
    for (name, package) in packages.iter().filter(|(_, package)| package.member) {
        let Some(allowed) = table.get(name.as_str()) else {
            tree.report(
                &package.manifest,
                0,
                format!(
                    "{name} is not in the table of ARCHITECTURE.md and xtask/src/tidy/arrows.rs"
                ),
            );
            continue;
        };
        for (used, kind) in &package.uses {
            let ours = packages.get(used).is_some_and(|used| used.member);
            let in_tests = kind == "dev" && used == "xtask";
            if ours && !allowed.contains(&used.as_str()) && !in_tests {
                tree.report(&package.manifest, 0, format!("{name} may not use {used}"));
            }
        }
        if ENGINES.contains(&name.as_str()) {
            for foreign in reachable(name, &packages) {
                if NOT_IN_ENGINES.contains(&foreign.as_str()) {
                    tree.report(
                        &package.manifest,
                        0,
                        format!("{name} is an engine and pulls in {foreign}"),
                    );
                }
            }
        }
    }
    check_manifests(tree)
}

struct Package {
    member: bool,
    manifest: String,
    /// Name and kind: `normal`, `build` or `dev`.
    uses: Vec<(String, String)>,
}

fn packages(metadata: &Value) -> BTreeMap<String, Package> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let root = format!("{}/", text(&metadata["workspace_root"]));
    let members: BTreeSet<String> = list(&metadata["workspace_members"])
        .iter()
        .map(text)
        .collect();
    let mut packages: BTreeMap<String, Package> = BTreeMap::new();
    for package in list(&metadata["packages"]) {
        let dependencies = list(&package["dependencies"]);
        let uses = dependencies.iter().map(|dependency| {
            let kind = dependency["kind"].as_str().unwrap_or("normal").to_owned();
            (text(&dependency["name"]), kind)
        });
        // Two versions of one crate count as one with the uses of both.
        let entry = packages
            .entry(text(&package["name"]))
            .or_insert_with(|| Package {
                member: members.contains(&text(&package["id"])),
                manifest: text(&package["manifest_path"])
                    .trim_start_matches(&root)
                    .to_owned(),
                uses: Vec::new(),
            });
        entry.uses.extend(uses);
    }
    // A declared dependency that is optional and off, or for another system, is not in the list of
    // resolved edges.
    let resolved = resolved_edges(metadata);
    for (name, package) in &mut packages {
        package
            .uses
            .retain(|(used, _)| resolved.get(name).is_some_and(|edges| edges.contains(used)));
    }
    packages
}

fn resolved_edges(metadata: &Value) -> BTreeMap<String, BTreeSet<String>> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let names: BTreeMap<String, String> = list(&metadata["packages"])
        .iter()
        .filter_map(|p| Some((p["id"].as_str()?.to_owned(), p["name"].as_str()?.to_owned())))
        .collect();
    let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for node in list(&metadata["resolve"]["nodes"]) {
        let Some(name) = node["id"].as_str().and_then(|id| names.get(id)) else {
            continue;
        };
        let used = list(&node["dependencies"]);
        let used = used
            .iter()
            .filter_map(|id| names.get(id.as_str()?).cloned());
        edges.entry(name.clone()).or_default().extend(used);
    }
    edges
}

/// Everything that is linked into builds of `name`.
fn reachable(name: &str, packages: &BTreeMap<String, Package>) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut open = vec![name.to_owned()];
    while let Some(next) = open.pop() {
        let Some(package) = packages.get(&next) else {
            continue;
        };
        for (used, kind) in &package.uses {
            if kind == "normal" && found.insert(used.clone()) {
                open.push(used.clone());
            }
        }
    }
    found
}

/// Dependencies are named once, in the workspace, each with its reason; lints are the workspace's.
fn check_manifests(tree: &mut Tree) -> Result<()> {
    let manifests: Vec<String> = tree
        .files
        .iter()
        .filter(|file| file.ends_with("Cargo.toml") && !file.starts_with("fuzz/"))
        .cloned()
        .collect();
    for path in manifests {
        let text = tree.read(&path)?;
        if path != "Cargo.toml" && !text.contains("[lints]\nworkspace = true") {
            tree.report(&path, 0, "does not take the workspace's lints");
        }
        for (line, message) in manifest_findings(&text) {
            tree.report(&path, line, message);
        }
    }
    Ok(())
}

fn manifest_findings(text: &str) -> Vec<(usize, String)> {
    let mut section = "";
    let mut findings = Vec::new();
    for (index, line) in text.lines().enumerate() {
        if line.starts_with('[') {
            section = line.trim_matches(['[', ']']);
            continue;
        }
        let Some((name, value)) = line.split_once('=') else {
            continue;
        };
        let name = name.trim();
        if section == "workspace.dependencies" {
            if !value.contains("path =") && !value.contains(" # ") {
                findings.push((
                    index + 1,
                    format!("{name} has no reason: add `# why` to its line"),
                ));
            }
        } else if section.ends_with("dependencies")
            && !name.ends_with(".workspace")
            && !value.contains("workspace = true")
        {
            findings.push((
                index + 1,
                format!("{name} is not named in the workspace's manifest"),
            ));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manifests_are_held_to_their_form() {
        let cases = [
            (
                "[workspace.dependencies]\na = \"1\" # why\nb = { path = \"b\" }\n",
                0,
            ),
            ("[workspace.dependencies]\na = \"1\"\n", 1),
            (
                "[dependencies]\na.workspace = true\nb = { workspace = true }\n",
                0,
            ),
            ("[dev-dependencies]\na = \"1\" # why\n", 1),
            ("[package]\nname = \"a\"\n", 0),
        ];
        for (text, expected) in cases {
            assert_eq!(manifest_findings(text).len(), expected, "{text}");
        }
    }

    fn metadata(engine_uses: &str) -> Value {
        serde_json::json!({
            "workspace_root": "/r",
            "workspace_members": ["e", "h"],
            "packages": [
                {"id": "e", "name": "mica-storage", "manifest_path": "/r/e/Cargo.toml",
                 "dependencies": [{"name": engine_uses, "kind": null}]},
                {"id": "h", "name": "mica-host", "manifest_path": "/r/h/Cargo.toml",
                 "dependencies": [{"name": "mica-storage", "kind": null}, {"name": "tokio", "kind": null}]},
                {"id": "x", "name": "x", "manifest_path": "/x",
                 "dependencies": [{"name": "tokio", "kind": null}]},
                {"id": "t", "name": "tokio", "manifest_path": "/t", "dependencies": []},
                {"id": "o", "name": "ok", "manifest_path": "/o", "dependencies": []},
            ],
            "resolve": {"nodes": [
                {"id": "e", "dependencies": ["x", "h", "o"]},
                {"id": "h", "dependencies": ["e", "t"]},
                {"id": "x", "dependencies": ["t"]},
            ]},
        })
    }

    #[test]
    fn arrows_are_followed_through_others() {
        let cases = [
            ("ok", ""),
            (
                "x",
                "e/Cargo.toml: mica-storage is an engine and pulls in tokio",
            ),
            (
                "mica-host",
                "e/Cargo.toml: mica-storage may not use mica-host",
            ),
        ];
        for (used, expected) in cases {
            let mut tree = Tree {
                root: "/nowhere".into(),
                files: Vec::new(),
                sources: Vec::new(),
                metadata: metadata(used),
                findings: Vec::new(),
            };
            check(&mut tree).unwrap();
            let first = tree
                .findings
                .first()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert_eq!(first, expected, "{used}");
        }
    }
}
