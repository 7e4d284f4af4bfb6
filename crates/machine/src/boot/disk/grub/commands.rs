//! The commands that find volumes and files, and those that name what is booted.

use std::collections::BTreeSet;

use super::super::volume::Node;
use super::super::{MAX_CONFIG, Place, bls};
use super::condition;
use super::interpreter::{Body, Boot, Interpreter, Item, Status};

impl Interpreter<'_> {
    pub(super) fn test(&self, arguments: &[String]) -> bool {
        condition::test(arguments, &|operator, path| {
            let place = self.place(path);
            // GRUB, too, takes a path that cannot be read for a missing one.
            let node = self.volumes.node(place.volume, &place.path);
            match (operator, node.ok().flatten()) {
                (_, None) => false,
                ('e', _) => true,
                ('d', Some(node)) => node == Node::Directory,
                ('s', Some(node)) => matches!(node, Node::File(len) if len > 0),
                (_, Some(node)) => matches!(node, Node::File(_)),
            }
        })
    }

    pub(super) fn include(&mut self, arguments: &[String]) -> Status {
        match arguments.first() {
            Some(path) => match self.file(path)? {
                Some(file) => self.run_file(&file),
                None => Ok(false),
            },
            None => Ok(false),
        }
    }

    /// `load_env [--file FILE] [NAME…]`: lines of `name=value`, padded with `#`.
    pub(super) fn load_env(&mut self, arguments: &[String]) -> Status {
        let mut path = format!("{}/grubenv", self.variable("prefix"));
        let mut wanted = BTreeSet::new();
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match argument.as_str() {
                "--file" | "-f" => path = rest.next().cloned().unwrap_or_default(),
                option if option.starts_with("--file=") => path = option[7..].to_owned(),
                option if option.starts_with('-') => {}
                name => {
                    wanted.insert(name.to_owned());
                }
            }
        }
        let Some(file) = self.file(&path)? else {
            return Ok(false);
        };
        let mut text = Vec::new();
        self.volumes.read(&file, MAX_CONFIG, &mut text)?;
        for line in String::from_utf8_lossy(&text).lines() {
            if let Some((name, value)) = line.split_once('=')
                && !line.starts_with('#')
                && (wanted.is_empty() || wanted.contains(name))
            {
                self.set(name, value)?;
            }
        }
        Ok(true)
    }

    /// `search --fs-uuid --set=root HINTS UUID`, or `search.fs_uuid UUID root HINTS`.
    pub(super) fn search(&mut self, command: &str, arguments: &[String]) -> Status {
        let mut kind = command.strip_prefix("search.").unwrap_or("file");
        let mut variable = None;
        let mut names = Vec::new();
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match argument.as_str() {
                "--fs-uuid" | "-u" => kind = "fs_uuid",
                "--label" | "-l" | "--fs-label" => kind = "fs_label",
                "--file" | "-f" => kind = "file",
                "--set" | "-s" => variable = rest.next().cloned(),
                "--hint" | "-h" => {
                    rest.next();
                }
                option if option.starts_with("--set=") => variable = Some(option[6..].to_owned()),
                option if option.starts_with('-') => {}
                _ => names.push(argument),
            }
        }
        let Some(name) = names.first() else {
            return Ok(false);
        };
        let short = command
            .starts_with("search.")
            .then(|| names.get(1))
            .flatten();
        let variable = variable.or(short.map(|name| (*name).clone()));
        let found = match kind {
            "fs_uuid" => self.volumes.find(|fs| fs.uuid().eq_ignore_ascii_case(name)),
            "fs_label" | "label" => self.volumes.find(|fs| fs.label() == **name),
            _ => (0..self.volumes.len())
                .find(|index| matches!(self.volumes.node(*index, name), Ok(Some(_)))),
        };
        match found {
            Some(volume) => {
                let device = self.volumes.get(volume).device.clone();
                self.set(variable.as_deref().unwrap_or("root"), &device)
            }
            None => Ok(false),
        }
    }

    pub(super) fn linux(&mut self, arguments: &[String]) -> Status {
        let Some((path, options)) = arguments.split_first() else {
            return Ok(false);
        };
        // As GRUB does, so that the kernel keeps a value with spaces in one piece.
        let quoted = |option: &String| match option.contains(char::is_whitespace) {
            true => format!("\"{option}\""),
            false => option.clone(),
        };
        let options: Vec<_> = options.iter().map(quoted).collect();
        self.boot = Some(Boot {
            kernel: self.place(path),
            initrds: Vec::new(),
            command_line: options.join(" "),
        });
        Ok(true)
    }

    pub(super) fn initrd(&mut self, arguments: &[String]) -> Status {
        let initrds: Vec<_> = arguments
            .iter()
            .filter(|argument| !argument.starts_with("--"))
            .map(|path| self.place(path))
            .collect();
        match &mut self.boot {
            Some(boot) => {
                boot.initrds.extend(initrds);
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// Fedora's command: loader entries become menu entries.
    pub(super) fn blscfg(&mut self) -> Status {
        let volume = self.place("/").volume;
        for directory in ["/loader/entries", "/boot/loader/entries"] {
            let entries = bls::entries(self.volumes, volume, directory)?;
            if entries.is_empty() {
                continue;
            }
            for entry in entries {
                let place = |path: &str| Place {
                    volume,
                    path: self.expand_text(path),
                };
                let initrds = entry.initrds.iter().map(|path| self.expand_text(path));
                let boot = Boot {
                    kernel: place(&entry.linux),
                    initrds: initrds
                        .flat_map(|paths| {
                            let paths: Vec<_> = paths.split_whitespace().map(place).collect();
                            paths
                        })
                        .collect(),
                    command_line: self.expand_text(&entry.options).trim().to_owned(),
                };
                self.item(Item {
                    title: entry.title,
                    id: entry.id,
                    body: Body::Boot(boot),
                })?;
            }
            return Ok(true);
        }
        Ok(false)
    }
}
