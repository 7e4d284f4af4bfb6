//! Boot Loader Specification, type 1 entries (UAPI Group, version 1).

use std::cmp::Ordering;

use super::volume::Volumes;
use super::{DiskError, Found, MAX_CONFIG, Place, version};

/// Loader entries are a few hundred bytes.
const MAX_ENTRY: u64 = 64 << 10;
const MAX_ENTRIES: usize = 256;

/// One `loader/entries/*.conf`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    /// The file's name without `.conf` and boot counter.
    pub id: String,
    pub title: String,
    pub linux: String,
    pub initrds: Vec<String>,
    pub options: String,
    version: String,
    machine_id: String,
    sort_key: String,
    architecture: String,
    /// Boot counting has used up all tries.
    bad: bool,
}

impl Entry {
    /// Parses the text of the file `name`, which ends with `.conf`.
    pub(super) fn parse(name: &str, text: &str) -> Self {
        let stem = name.strip_suffix(".conf").unwrap_or(name);
        let (id, bad) = boot_counter(stem);
        let mut entry = Self {
            id: id.to_owned(),
            bad,
            ..Self::default()
        };
        for line in text.lines().map(str::trim) {
            let Some((key, value)) = line.split_once(char::is_whitespace) else {
                continue;
            };
            let value = value.trim().to_owned();
            match key {
                "title" => entry.title = value,
                "version" => entry.version = value,
                "machine-id" => entry.machine_id = value,
                "sort-key" => entry.sort_key = value,
                "architecture" => entry.architecture = value.to_lowercase(),
                "linux" => entry.linux = value,
                // Fedora's GRUB takes several in one line.
                "initrd" => entry
                    .initrds
                    .extend(value.split_whitespace().map(str::to_owned)),
                "options" if entry.options.is_empty() => entry.options = value,
                "options" => entry.options = format!("{} {value}", entry.options),
                _ => {}
            }
        }
        if entry.title.is_empty() {
            entry.title.clone_from(&entry.id);
        }
        entry
    }

    fn boots_here(&self) -> bool {
        !self.linux.is_empty() && matches!(self.architecture.as_str(), "" | "x64")
    }

    /// The order of the menu: the entry to prefer first.
    fn order(&self, other: &Self) -> Ordering {
        let by_key = match (self.sort_key.is_empty(), other.sort_key.is_empty()) {
            (false, false) => self
                .sort_key
                .cmp(&other.sort_key)
                .then_with(|| self.machine_id.cmp(&other.machine_id))
                .then_with(|| version::compare(&other.version, &self.version)),
            (without, other_without) => without.cmp(&other_without),
        };
        self.bad
            .cmp(&other.bad)
            .then(by_key)
            .then_with(|| version::compare(&other.id, &self.id))
    }
}

/// Splits `name+LEFT-DONE` and says whether no tries are left.
fn boot_counter(stem: &str) -> (&str, bool) {
    let Some((name, counter)) = stem.rsplit_once('+') else {
        return (stem, false);
    };
    let (left, done) = counter.split_once('-').unwrap_or((counter, "0"));
    match (left.parse::<u32>(), done.parse::<u32>()) {
        (Ok(left), Ok(_)) => (name, left == 0),
        _ => (stem, false),
    }
}

/// The entries in the directory `path`, in the order of the menu.
pub(super) fn entries(
    volumes: &Volumes,
    volume: usize,
    path: &str,
) -> Result<Vec<Entry>, DiskError> {
    let mut names = volumes.list(volume, path)?;
    names.retain(|name| name.ends_with(".conf"));
    names.truncate(MAX_ENTRIES);
    let mut entries = Vec::new();
    for name in names {
        let Some(file) = volumes.file(volume, &format!("{path}/{name}"))? else {
            continue;
        };
        let mut text = Vec::new();
        volumes.read(&file, MAX_ENTRY, &mut text)?;
        let entry = Entry::parse(&name, &String::from_utf8_lossy(&text));
        if entry.boots_here() {
            entries.push(entry);
        }
    }
    entries.sort_by(Entry::order);
    Ok(entries)
}

/// What systemd-boot would show of the loader directory `path`, and the index of its default.
/// `loader.conf` need not exist.
pub(super) fn menu(
    volumes: &Volumes,
    volume: usize,
    path: &str,
) -> Result<(Vec<Found>, usize), DiskError> {
    let directory = format!("{path}/entries");
    let entries = entries(volumes, volume, &directory)?;
    let default = match volumes.file(volume, &format!("{path}/loader.conf"))? {
        Some(file) => {
            let mut text = Vec::new();
            volumes.read(&file, MAX_CONFIG, &mut text)?;
            default_index(&entries, &String::from_utf8_lossy(&text))
        }
        None => 0,
    };
    let place = |path: &String| Place {
        volume,
        path: path.clone(),
    };
    let found = entries.iter().map(|entry| Found {
        title: entry.title.clone(),
        id: entry.id.clone(),
        kernel: place(&entry.linux),
        initrds: entry.initrds.iter().map(place).collect(),
        command_line: entry.options.clone(),
        source: format!(
            "{directory}/{}.conf on {}",
            entry.id,
            volumes.get(volume).name
        ),
    });
    Ok((found.collect(), default))
}

/// The first entry that `default` of loader.conf matches; the first of all if none does.
pub(super) fn default_index(entries: &[Entry], config: &str) -> usize {
    let pattern = config
        .lines()
        .filter_map(|line| line.trim().split_once(char::is_whitespace))
        .filter(|(key, _)| *key == "default")
        .map(|(_, value)| value.trim().to_lowercase())
        .next_back();
    let Some(pattern) = pattern else {
        return 0;
    };
    let matches = |entry: &Entry| {
        let id = entry.id.to_lowercase();
        glob(&pattern, &id) || glob(&pattern, &format!("{id}.conf"))
    };
    entries.iter().position(matches).unwrap_or(0)
}

/// Shell patterns of `*`, `?` and `[…]`.
fn glob(pattern: &str, text: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let text: Vec<char> = text.chars().collect();
    let (mut p, mut t) = (0, 0);
    // Where to go on when a star has to take one character more.
    let mut star = None;
    while t < text.len() {
        match one(&pattern[p..], text[t]) {
            Some(len) => {
                p += len;
                t += 1;
            }
            None if pattern.get(p) == Some(&'*') => {
                star = Some((p, t));
                p += 1;
            }
            None => match &mut star {
                Some((at, taken)) => {
                    *taken += 1;
                    (p, t) = (*at + 1, *taken);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

/// The length of the pattern's first element, if it is no star and matches `c`.
fn one(pattern: &[char], c: char) -> Option<usize> {
    match pattern.first()? {
        '*' => None,
        '?' => Some(1),
        '[' => {
            let end = 2 + pattern.get(2..)?.iter().position(|c| *c == ']')?;
            let mut set = &pattern[1..end];
            let negated = set[0] == '!';
            if negated {
                set = &set[1..];
            }
            let mut inside = false;
            while let [low, rest @ ..] = set {
                set = match rest {
                    ['-', high, rest @ ..] => {
                        inside |= (low..=high).contains(&&c);
                        rest
                    }
                    _ => {
                        inside |= *low == c;
                        rest
                    }
                };
            }
            (inside != negated).then_some(end + 1)
        }
        literal => (*literal == c).then_some(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_in_a_shell() {
        for (pattern, text, expected) in [
            ("debian-*", "debian-6.1.conf", true),
            ("debian-?.1*", "debian-6.1.conf", true),
            ("debian-[5-7].*", "debian-6.1", true),
            ("debian-[!5-7].*", "debian-6.1", false),
            ("*a*b*c", "xaxbxbxc", true),
            ("*a*b*c", "xaxbxbx", false),
            ("[", "[", true),
            ("", "", true),
            ("**", "", true),
            ("a", "", false),
        ] {
            // An unclosed bracket matches itself in a shell, but nothing of ours is named so.
            let expected = expected && pattern != "[";
            assert_eq!(glob(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn entries_sort_newest_first_and_exhausted_ones_last() {
        let entry = |name: &str, text: &str| Entry::parse(name, text);
        let mut entries = vec![
            entry("a-6.1.0-9.conf", "linux /a"),
            entry(
                "keyed-old.conf",
                "linux /a\nsort-key debian\nversion 6.1.0-9",
            ),
            entry("a-6.1.0-10.conf", "linux /a"),
            entry(
                "keyed-new.conf",
                "linux /a\nsort-key debian\nversion 6.1.0-10",
            ),
            entry("keyed-bad+0-3.conf", "linux /a\nsort-key debian\nversion 7"),
            entry("keyed-try+2-1.conf", "linux /a\nsort-key arch\nversion 1"),
        ];
        entries.sort_by(Entry::order);
        let ids: Vec<_> = entries.iter().map(|entry| entry.id.as_str()).collect();
        let expected = [
            "keyed-try",
            "keyed-new",
            "keyed-old",
            "a-6.1.0-10",
            "a-6.1.0-9",
            "keyed-bad",
        ];
        assert_eq!(ids, expected);
        assert_eq!(default_index(&entries, "timeout 3\ndefault A-*-9*\n"), 4);
        assert_eq!(default_index(&entries, "default nothing"), 0);
    }

    #[test]
    fn keys_repeat_as_specified() {
        let entry = Entry::parse(
            "x.conf",
            "# comment\ntitle  Debian 12 \nlinux /v\ninitrd /a\ninitrd /b /c\noptions root=/dev/vda1\noptions ro  quiet\n",
        );
        assert_eq!(entry.title, "Debian 12");
        assert_eq!(entry.initrds, ["/a", "/b", "/c"]);
        assert_eq!(entry.options, "root=/dev/vda1 ro  quiet");
    }
}
