//! GRUB's generated configuration: which entries its menu has and which is the default.
//!
//! A small interpreter for what `grub-mkconfig` writes. Functions and loops are skipped, commands
//! that concern the screen do nothing, and the number of commands and the size of all variables
//! are bounded.

mod commands;
mod condition;
mod interpreter;
mod syntax;

use self::interpreter::{Body, Interpreter, Item};
use super::volume::{FileAt, Volumes};
use super::{DiskError, Found};

/// Submenus within submenus.
const MAX_DEPTH: u32 = 8;
const MAX_ENTRIES: usize = 1024;

/// Where `grub-mkconfig` puts its result, as its partition sees it.
const CONFIGS: [&str; 4] = [
    "/boot/grub/grub.cfg",
    "/boot/grub2/grub.cfg",
    "/grub/grub.cfg",
    "/grub2/grub.cfg",
];

/// All configuration files of GRUB; the stubs that point on from an EFI system partition only if
/// there is nothing else.
pub(super) fn configs(volumes: &Volumes) -> Result<Vec<FileAt>, DiskError> {
    let mut configs = Vec::new();
    for volume in 0..volumes.len() {
        for path in CONFIGS {
            if let Some(file) = volumes.file(volume, path)?
                && !configs.contains(&file)
            {
                configs.push(file);
            }
        }
    }
    if !configs.is_empty() {
        return Ok(configs);
    }
    for volume in 0..volumes.len() {
        for vendor in volumes.list(volume, "/EFI")? {
            configs.extend(volumes.file(volume, &format!("/EFI/{vendor}/grub.cfg"))?);
        }
    }
    Ok(configs)
}

/// The Linux entries of a configuration, and the index of the default.
pub(super) fn menu(volumes: &Volumes, config: &FileAt) -> Result<(Vec<Found>, usize), DiskError> {
    let mut grub = Interpreter::new(volumes, config);
    grub.run_file(config)?;
    let mut tree = Tree {
        found: Vec::new(),
        source: format!("{} on {}", config.path, volumes.get(config.volume).name),
    };
    let items = std::mem::take(&mut grub.menu);
    let nodes = tree.nodes(&mut grub, items, "", 0)?;
    let path = default_path(grub.variable("default"));
    let chosen = select(&nodes, &path).unwrap_or(0);
    Ok((tree.found, chosen))
}

/// A menu whose entries have been run.
struct Node {
    title: String,
    id: String,
    target: Target,
}

enum Target {
    /// An index of the found entries; nothing for what boots no Linux.
    Entry(Option<usize>),
    Menu(Vec<Node>),
}

struct Tree {
    found: Vec<Found>,
    source: String,
}

impl Tree {
    fn nodes(
        &mut self,
        grub: &mut Interpreter<'_>,
        items: Vec<Item>,
        parent: &str,
        depth: u32,
    ) -> Result<Vec<Node>, DiskError> {
        let mut nodes = Vec::new();
        for Item { title, id, body } in items {
            let full_title = format!("{parent}{title}");
            let boot = match body {
                Body::Submenu(_) if depth >= MAX_DEPTH => continue,
                Body::Submenu(commands) => {
                    let mut chosen = grub.choose(&commands)?;
                    let items = std::mem::take(&mut chosen.menu);
                    let parent = format!("{full_title}>");
                    let menu = self.nodes(&mut chosen, items, &parent, depth + 1)?;
                    grub.charge(&chosen);
                    nodes.push(Node {
                        title,
                        id,
                        target: Target::Menu(menu),
                    });
                    continue;
                }
                Body::Entry(commands) => grub.choose(&commands)?.boot,
                Body::Boot(boot) => Some(boot),
            };
            let index = self.found.len();
            let boot = boot.filter(|_| index < MAX_ENTRIES);
            nodes.push(Node {
                title,
                id: id.clone(),
                target: Target::Entry(boot.is_some().then_some(index)),
            });
            self.found.extend(boot.map(|boot| Found {
                title: full_title,
                id,
                kernel: boot.kernel,
                initrds: boot.initrds,
                command_line: boot.command_line,
                source: self.source.clone(),
            }));
        }
        Ok(nodes)
    }
}

/// The components of `default`: `1>2`, with `>>` for a `>` inside a title.
fn default_path(default: &str) -> Vec<String> {
    let mut path = vec![String::new()];
    let mut rest = default.chars().peekable();
    while let Some(c) = rest.next() {
        if c == '>' && rest.next_if_eq(&'>').is_none() {
            path.push(String::new());
        } else if let Some(last) = path.last_mut() {
            last.push(c);
        }
    }
    path
}

/// The entry that a path leads to: at each level by number, identifier or title, else the first.
fn select(nodes: &[Node], path: &[String]) -> Option<usize> {
    let (wanted, rest) = match path.split_first() {
        Some((wanted, rest)) => (wanted.clone(), rest),
        None => (String::new(), path),
    };
    let named = |node: &&Node| !wanted.is_empty() && [&node.id, &node.title].contains(&&wanted);
    let numbered = wanted
        .parse::<usize>()
        .ok()
        .and_then(|index| nodes.get(index));
    let node = numbered
        .or_else(|| nodes.iter().find(named))
        .or_else(|| nodes.first())?;
    match &node.target {
        Target::Entry(index) => *index,
        Target::Menu(nodes) => select(nodes, rest),
    }
}
