//! The kernel modules of an initramfs: what they depend on, and which device wants which.
//!
//! A module says both itself, in its ELF section `.modinfo`, a list of NUL-terminated `key=value`.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Why a module is of no use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModuleError {
    #[error("the kernel has no module '{0}'")]
    Missing(String),
    #[error("the module {} cannot be read: {source}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
}

/// One module, unpacked.
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) content: Vec<u8>,
    depends: Vec<String>,
    aliases: Vec<String>,
}

/// Reads the named modules and all that they need from a kernel's module tree. A name that the
/// kernel has built in needs no module; its line in `modules.builtin` says so.
pub(crate) fn with_dependencies(tree: &Path, names: &[&str]) -> Result<Vec<Module>, ModuleError> {
    let mut paths = BTreeMap::new();
    index(tree, &mut paths).map_err(|source| ModuleError::Unreadable {
        path: tree.to_owned(),
        source,
    })?;
    let builtin = fs::read_to_string(tree.join("modules.builtin")).unwrap_or_default();
    let is_builtin = |name: &str| {
        builtin
            .lines()
            .any(|line| module_name(Path::new(line)).as_deref() == Some(name))
    };

    let mut modules: Vec<Module> = Vec::new();
    let mut wanted: Vec<String> = names.iter().rev().map(|name| normal(name)).collect();
    while let Some(name) = wanted.pop() {
        if modules.iter().any(|module| module.name == name) || is_builtin(&name) {
            continue;
        }
        let path = paths
            .get(&name)
            .ok_or_else(|| ModuleError::Missing(name.clone()))?;
        let module = read(&name, path).map_err(|source| ModuleError::Unreadable {
            path: path.clone(),
            source,
        })?;
        wanted.extend(module.depends.iter().cloned());
        modules.push(module);
    }
    Ok(modules)
}

/// `modules.dep`: each module's file with all that it needs, the nearest first (depmod(8)).
pub(crate) fn dependency_file(modules: &[Module]) -> String {
    let lines = modules.iter().map(|module| {
        let mut needed = Vec::new();
        gather(modules, module, &mut needed);
        let needed: String = needed.iter().map(|name| format!(" {name}.ko")).collect();
        format!("{}.ko:{needed}\n", module.name)
    });
    lines.collect()
}

/// `modules.alias`: the patterns of device identities, each with the module that drives them.
///
/// A virtio driver's own alias names a virtio device, which appears only when the PCI driver below
/// it is there. We add the identity of the PCI function (virtio 1.2, 4.1.2.1), so that one call of
/// modprobe loads both.
pub(crate) fn alias_file(modules: &[Module]) -> String {
    let mut lines = String::new();
    for module in modules {
        for alias in &module.aliases {
            lines += &format!("alias {alias} {}\n", module.name);
            for device in pci_devices(alias) {
                lines += &format!("alias pci:v00001AF4d{device:08X}sv* {}\n", module.name);
            }
        }
    }
    lines
}

/// The PCI device identifiers under which a virtio device may appear: the modern one is its type
/// plus 0x1040, some have a transitional one too.
fn pci_devices(alias: &str) -> impl Iterator<Item = u32> {
    let kind = alias
        .strip_prefix("virtio:d")
        .and_then(|rest| u32::from_str_radix(rest.get(..8)?, 16).ok());
    let transitional = kind.and_then(|kind| {
        Some(match kind {
            1 => 0x1000, // network
            2 => 0x1001, // block
            5 => 0x1002, // traditional balloon
            3 => 0x1003, // console
            8 => 0x1004, // SCSI
            4 => 0x1005, // entropy
            9 => 0x1009, // 9P
            _ => return None,
        })
    });
    kind.map(|kind| 0x1040 + kind)
        .into_iter()
        .chain(transitional)
}

/// Puts the modules that `module` needs behind one another so that each stands before what it
/// needs itself; a module that several need comes last.
fn gather<'a>(modules: &'a [Module], module: &'a Module, needed: &mut Vec<&'a str>) {
    for name in &module.depends {
        if let Some(dependency) = modules.iter().find(|other| other.name == *name) {
            needed.retain(|other| other != name);
            needed.push(name);
            gather(modules, dependency, needed);
        }
    }
}

fn index(directory: &Path, paths: &mut BTreeMap<String, PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            index(&path, paths)?;
        } else if let Some(name) = module_name(&path) {
            paths.insert(name, path);
        }
    }
    Ok(())
}

/// A module's name from its file's: `virtio-rng.ko.xz` is `virtio_rng`.
fn module_name(path: &Path) -> Option<String> {
    let (stem, _) = path.file_name()?.to_str()?.split_once(".ko")?;
    Some(normal(stem))
}

/// The kernel makes no difference between a dash and an underscore in a module's name.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

fn read(name: &str, path: &Path) -> io::Result<Module> {
    let raw = fs::read(path)?;
    let mut content = Vec::new();
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => {
            lzma_rust2::XzReader::new(raw.as_slice(), true).read_to_end(&mut content)?;
        }
        Some("zst") => {
            ruzstd::decoding::StreamingDecoder::new(raw.as_slice())
                .map_err(io::Error::other)?
                .read_to_end(&mut content)?;
        }
        _ => content = raw,
    }
    let info = section(&content, b".modinfo")
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it has no .modinfo"))?;
    let values = |key: &str| -> Vec<String> {
        info.split(|byte| *byte == 0)
            .filter_map(|entry| str::from_utf8(entry).ok()?.split_once('='))
            .filter(|(k, _)| *k == key)
            .map(|(_, value)| value.to_owned())
            .collect()
    };
    Ok(Module {
        name: name.to_owned(),
        depends: values("depends")
            .iter()
            .flat_map(|list| list.split(','))
            .filter(|name| !name.is_empty())
            .map(normal)
            .collect(),
        aliases: values("alias"),
        content,
    })
}

/// The content of a section of a 64-bit little-endian ELF file (System V ABI, chapter 4).
fn section<'a>(elf: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    let u16_at = |at: usize| {
        let bytes = elf.get(at..at.checked_add(2)?)?;
        Some(usize::from(u16::from_le_bytes(bytes.try_into().ok()?)))
    };
    let u32_at = |at: usize| {
        let bytes = elf.get(at..at.checked_add(4)?)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    let u64_at = |at: usize| {
        let bytes = elf.get(at..at.checked_add(8)?)?;
        usize::try_from(u64::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (table, size, count, names) = (u64_at(0x28)?, u16_at(0x3a)?, u16_at(0x3c)?, u16_at(0x3e)?);
    let header = |index: usize| table.checked_add(index.checked_mul(size)?);
    let body = |header: usize| {
        let offset = u64_at(header.checked_add(0x18)?)?;
        elf.get(offset..offset.checked_add(u64_at(header.checked_add(0x20)?)?)?)
    };
    let names = body(header(names)?)?;
    (0..count).find_map(|index| {
        let header = header(index)?;
        let name = names.get(u32_at(header)?..)?;
        let name = name.split(|byte| *byte == 0).next()?;
        (name == wanted).then(|| body(header))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(name: &str, depends: &[&str], aliases: &[&str]) -> Module {
        Module {
            name: name.to_owned(),
            content: Vec::new(),
            depends: depends.iter().map(|&name| name.to_owned()).collect(),
            aliases: aliases.iter().map(|&alias| alias.to_owned()).collect(),
        }
    }

    #[test]
    fn what_is_needed_by_several_comes_last() {
        let modules = [
            module("virtio_pci", &["virtio_ring", "modern", "virtio"], &[]),
            module("virtio_ring", &["virtio"], &[]),
            module("modern", &[], &[]),
            module("virtio", &[], &[]),
        ];
        assert_eq!(
            dependency_file(&modules),
            "virtio_pci.ko: virtio_ring.ko modern.ko virtio.ko\nvirtio_ring.ko: virtio.ko\n\
             modern.ko:\nvirtio.ko:\n"
        );
    }

    #[test]
    fn a_virtio_driver_answers_to_its_pci_function() {
        for (alias, devices) in [
            ("virtio:d00000001v*", vec![0x1041, 0x1000]),
            ("virtio:d00000013v*", vec![0x1053]),
            ("acpi*:QEMU0001:*", vec![]),
            ("virtio:dxyz", vec![]),
        ] {
            assert_eq!(pci_devices(alias).collect::<Vec<_>>(), devices, "{alias}");
        }
    }

    #[test]
    fn a_file_that_is_no_elf_has_no_sections() {
        let mut elf = b"\x7fELF\x02\x01".to_vec();
        assert_eq!(section(&elf, b".modinfo"), None);
        elf.resize(64, 0xff);
        assert_eq!(section(&elf, b".modinfo"), None);
    }
}
