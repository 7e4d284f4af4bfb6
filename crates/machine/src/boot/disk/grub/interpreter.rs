//! Runs a parsed grub.cfg as far as it decides what is booted.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use super::super::volume::{FileAt, Volumes};
use super::super::{DiskError, MAX_CONFIG, Place};
use super::syntax::{self, Command, Piece, Word};

/// Commands that one configuration may run, menus included.
const MAX_STEPS: u32 = 200_000;
/// Bytes in all variables together.
const MAX_ENVIRONMENT: usize = 256 << 10;
const MAX_ITEMS: usize = 1024;
/// Files that include each other.
const MAX_FILES: u32 = 8;

/// One line of a menu.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub title: String,
    pub id: String,
    pub body: Body,
}

/// What choosing an item does.
#[derive(Clone, Debug)]
pub(super) enum Body {
    Entry(Rc<Vec<Command>>),
    Submenu(Rc<Vec<Command>>),
    /// An entry that `blscfg` found.
    Boot(Boot),
}

/// What the commands `linux` and `initrd` have named.
#[derive(Clone, Debug)]
pub(super) struct Boot {
    pub kernel: Place,
    pub initrds: Vec<Place>,
    pub command_line: String,
}

/// The state that commands change.
pub(super) struct Interpreter<'a> {
    pub volumes: &'a Volumes,
    /// The volume of the configuration file, where paths without a device lead if `root` is
    /// unknown.
    home: usize,
    variables: BTreeMap<String, String>,
    functions: BTreeSet<String>,
    pub menu: Vec<Item>,
    pub boot: Option<Boot>,
    steps: u32,
    files: u32,
}

/// Whether a command succeeded, as GRUB's conditions see it.
pub(super) type Status = Result<bool, DiskError>;

impl<'a> Interpreter<'a> {
    /// GRUB as it starts from the directory of `config`.
    pub(super) fn new(volumes: &'a Volumes, config: &FileAt) -> Self {
        let device = &volumes.get(config.volume).device;
        let directory = config.path.rsplit_once('/').map_or("", |(path, _)| path);
        let variables = [
            ("root", device.clone()),
            ("prefix", format!("({device}){directory}")),
            ("grub_platform", "pc".into()),
            ("grub_cpu", "i386".into()),
            ("feature_menuentry_id", "y".into()),
            ("feature_platform_search_hint", "y".into()),
            ("feature_default_font_path", "y".into()),
            ("feature_timeout_style", "y".into()),
        ];
        Self {
            volumes,
            home: config.volume,
            variables: variables
                .into_iter()
                .map(|(name, value)| (name.into(), value))
                .collect(),
            functions: BTreeSet::new(),
            menu: Vec::new(),
            boot: None,
            steps: 0,
            files: 0,
        }
    }

    /// Runs what choosing an item runs, from this state.
    pub(super) fn choose(&mut self, commands: &[Command]) -> Result<Interpreter<'a>, DiskError> {
        let mut chosen = Interpreter {
            volumes: self.volumes,
            home: self.home,
            variables: self.variables.clone(),
            functions: self.functions.clone(),
            menu: Vec::new(),
            boot: None,
            // Cloning the variables is paid for like running commands.
            steps: self.steps + 20,
            files: self.files,
        };
        chosen.run(commands)?;
        self.steps = chosen.steps;
        Ok(chosen)
    }

    /// Counts the commands that a chosen item has run since.
    pub(super) fn charge(&mut self, chosen: &Self) {
        self.steps = chosen.steps;
    }

    /// A variable's value; empty if it is not set.
    pub(super) fn variable(&self, name: &str) -> &str {
        self.variables.get(name).map_or("", String::as_str)
    }

    /// Runs a configuration file.
    pub(super) fn run_file(&mut self, file: &FileAt) -> Status {
        let broken = |reason: String| DiskError::Config {
            path: format!("{} on {}", file.path, self.volumes.get(file.volume).name),
            reason,
        };
        if self.files >= MAX_FILES {
            return Err(broken("too many files include each other".into()));
        }
        let mut text = Vec::new();
        self.volumes.read(file, MAX_CONFIG, &mut text)?;
        let commands = syntax::parse(&String::from_utf8_lossy(&text)).map_err(broken)?;
        self.files += 1;
        let status = self.run(&commands);
        self.files -= 1;
        status
    }

    fn run(&mut self, commands: &[Command]) -> Status {
        let mut status = true;
        for command in commands {
            self.steps += 1;
            if self.steps > MAX_STEPS {
                return Err(self.refused("it runs too many commands"));
            }
            status = match command {
                Command::Simple(words) => self.simple(words)?,
                Command::Block(words, body) => self.block(words, body)?,
                Command::If(arms, otherwise) => self.conditional(arms, otherwise)?,
                Command::Skipped(name) => {
                    self.functions.extend(name.clone());
                    true
                }
            };
        }
        Ok(status)
    }

    fn refused(&self, reason: &str) -> DiskError {
        DiskError::Config {
            path: format!(
                "GRUB's configuration on {}",
                self.volumes.get(self.home).name
            ),
            reason: reason.into(),
        }
    }

    fn conditional(&mut self, arms: &[(Vec<Command>, Vec<Command>)], rest: &[Command]) -> Status {
        for (condition, consequence) in arms {
            if self.run(condition)? {
                return self.run(consequence);
            }
        }
        self.run(rest)
    }

    fn block(&mut self, words: &[Word], body: &Rc<Vec<Command>>) -> Status {
        let arguments = self.expand_all(words)?;
        let body = match arguments.first().map(String::as_str) {
            None => return self.run(body),
            Some("menuentry") => Body::Entry(Rc::clone(body)),
            Some("submenu") => Body::Submenu(Rc::clone(body)),
            Some(_) => return Ok(true),
        };
        let mut title = None;
        let mut id = String::new();
        let mut rest = arguments.into_iter().skip(1);
        while let Some(argument) = rest.next() {
            match argument.as_str() {
                "--id" => id = rest.next().unwrap_or_default(),
                "--class" | "--users" | "--hotkey" | "--source" => {
                    rest.next();
                }
                option if option.starts_with("--id=") => id = option[5..].to_owned(),
                option if option.starts_with("--") => {}
                _ => title = title.or(Some(argument)),
            }
        }
        let title = title.unwrap_or_default();
        self.item(Item { title, id, body })
    }

    pub(super) fn item(&mut self, item: Item) -> Status {
        if self.menu.len() >= MAX_ITEMS {
            return Err(self.refused("its menu is too long"));
        }
        self.menu.push(item);
        Ok(true)
    }

    fn simple(&mut self, words: &[Word]) -> Status {
        let arguments = self.expand_all(words)?;
        let Some((command, arguments)) = arguments.split_first() else {
            return Ok(true);
        };
        match command.as_str() {
            "set" => self.set_all(arguments),
            "unset" => {
                for name in arguments {
                    self.variables.remove(name);
                }
                Ok(true)
            }
            "false" | "loadfont" => Ok(false),
            "[" => Ok(match arguments.split_last() {
                Some((last, arguments)) if last == "]" => self.test(arguments),
                _ => false,
            }),
            "test" => Ok(self.test(arguments)),
            "load_env" => self.load_env(arguments),
            "source" | "." => self.include(arguments),
            "configfile" => {
                self.menu.clear();
                self.include(arguments)
            }
            "blscfg" => self.blscfg(),
            "linux" | "linux16" | "linuxefi" => self.linux(arguments),
            "initrd" | "initrd16" | "initrdefi" => self.initrd(arguments),
            search if search == "search" || search.starts_with("search.") => {
                self.search(search, arguments)
            }
            name if self.functions.contains(name) => Ok(true),
            name => match name.split_once('=') {
                Some(_) => self.set_all(std::slice::from_ref(command)),
                None => Ok(true),
            },
        }
    }

    fn set_all(&mut self, assignments: &[String]) -> Status {
        for assignment in assignments {
            if let Some((name, value)) = assignment.split_once('=') {
                self.set(name, value)?;
            }
        }
        Ok(true)
    }

    pub(super) fn set(&mut self, name: &str, value: &str) -> Status {
        self.variables.insert(name.into(), value.into());
        let bytes = |(name, value): (&String, &String)| name.len() + value.len() + 64;
        let total: usize = self.variables.iter().map(bytes).sum();
        if total > MAX_ENVIRONMENT {
            return Err(self.refused("its variables hold too much"));
        }
        Ok(true)
    }

    fn expand_all(&self, words: &[Word]) -> Result<Vec<String>, DiskError> {
        let mut arguments = Vec::new();
        let mut total = 0;
        for word in words {
            let start = arguments.len();
            self.expand(word, &mut arguments);
            total += arguments[start..].iter().map(String::len).sum::<usize>();
            if total > 4 * MAX_ENVIRONMENT {
                return Err(self.refused("a command's arguments are too long"));
            }
        }
        Ok(arguments)
    }

    /// Appends the arguments that a word becomes.
    fn expand(&self, word: &Word, arguments: &mut Vec<String>) {
        let mut open: Option<String> = None;
        for piece in word {
            match piece {
                Piece::Text { text, .. } => open.get_or_insert_default().push_str(text),
                Piece::Variable { name, quoted: true } => {
                    open.get_or_insert_default().push_str(self.variable(name));
                }
                Piece::Variable { name, .. } => {
                    let value = self.variable(name);
                    for (index, field) in value.split(char::is_whitespace).enumerate() {
                        if index > 0 {
                            arguments.extend(open.take());
                        }
                        if !field.is_empty() {
                            open.get_or_insert_default().push_str(field);
                        }
                    }
                }
            }
        }
        arguments.extend(open);
    }

    /// Replaces the variables in a text that was no word of the configuration.
    pub(super) fn expand_text(&self, text: &str) -> String {
        let Ok(commands) = syntax::parse(&format!("x \"{}\"", text.replace('"', "\\\""))) else {
            return text.to_owned();
        };
        let mut arguments = Vec::new();
        if let [Command::Simple(words)] = commands.as_slice()
            && let Some(word) = words.get(1)
        {
            self.expand(word, &mut arguments);
        }
        arguments.concat()
    }

    /// The volume and path that GRUB's `(device)/path` means.
    pub(super) fn place(&self, path: &str) -> Place {
        let (device, path) = match path.strip_prefix('(').and_then(|rest| rest.split_once(')')) {
            Some((device, path)) => (device, path),
            None => (self.variable("root"), path),
        };
        let device = device.trim_matches(['(', ')']);
        Place {
            volume: self.volumes.by_device(device).unwrap_or(self.home),
            path: path.to_owned(),
        }
    }

    pub(super) fn file(&self, path: &str) -> Result<Option<FileAt>, DiskError> {
        let place = self.place(path);
        self.volumes.file(place.volume, &place.path)
    }
}
