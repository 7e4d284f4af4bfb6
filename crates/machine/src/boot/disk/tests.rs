//! Disks made by the tools that make them everywhere: mke2fs, mkfs.vfat and mcopy, sfdisk.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use super::super::tests::{corrupt, noise};
use super::*;

const ROOT_UUID: &str = "9f0c1d3a-0000-4000-8000-000000000001";
const BOOT_UUID: &str = "9f0c1d3a-0000-4000-8000-000000000002";
const GRUB: &str = include_str!("testdata/grub.cfg");
const MIB: u64 = 1 << 20;

/// Runs a tool of Debian's `package` with `input` on its standard input.
fn tool(package: &str, command: &mut Command, input: &str) {
    use std::io::Write;
    let mut child = command
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; install {package}"));
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    assert!(child.wait().unwrap().success(), "{command:?}");
}

/// Something a test puts into a file system.
enum Item<'a> {
    File(&'a str, &'a [u8]),
    Link(&'a str, &'a str),
}
use Item::{File, Link};

struct Lab(TempDir);

impl Lab {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn tree(&self, name: &str, items: &[Item<'_>]) -> PathBuf {
        let root = self.path(name);
        fs::create_dir(&root).unwrap();
        for item in items {
            let (File(path, _) | Link(path, _)) = item;
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            match item {
                File(_, content) => fs::write(path, content).unwrap(),
                Link(_, target) => symlink(target, path).unwrap(),
            }
        }
        root
    }

    fn ext4(&self, name: &str, uuid: &str, items: &[Item<'_>]) -> Vec<u8> {
        let tree = self.tree(name, items);
        let image = self.path(&format!("{name}.ext4"));
        let mut mke2fs = Command::new("mke2fs");
        mke2fs.args(["-q", "-t", "ext4", "-L", name, "-U", uuid, "-d"]);
        tool("e2fsprogs", mke2fs.arg(tree).arg(&image).arg("16M"), "");
        fs::read(image).unwrap()
    }

    /// A FAT file system; `size` in KiB and `width` in bits have to suit each other.
    fn fat(&self, name: &str, size: u32, width: u32, items: &[Item<'_>]) -> Vec<u8> {
        let tree = self.tree(name, items);
        let image = self.path(&format!("{name}.fat"));
        let mut mkfs = Command::new("mkfs.vfat");
        mkfs.args([
            "-C",
            "-i",
            "ABCD1234",
            "-n",
            "ESP",
            "-F",
            &width.to_string(),
        ]);
        tool("dosfstools", mkfs.arg(&image).arg(size.to_string()), "");
        let mut mcopy = Command::new("mcopy");
        mcopy.arg("-s").arg("-i").arg(&image);
        for entry in fs::read_dir(&tree).unwrap() {
            mcopy.arg(entry.unwrap().path());
        }
        tool("mtools", mcopy.arg("::/"), "");
        fs::read(image).unwrap()
    }

    /// A disk with `partitions` at the offsets in MiB that the sfdisk `script` says.
    fn disk(&self, mib: u64, script: &str, partitions: &[(u64, &[u8])]) -> Vec<u8> {
        let image = self.path("disk");
        let file = fs::File::create(&image).unwrap();
        file.set_len(mib * MIB).unwrap();
        tool(
            "fdisk",
            Command::new("sfdisk").arg("-q").arg(&image),
            script,
        );
        let mut bytes = fs::read(image).unwrap();
        for (at, content) in partitions {
            let at = (at * MIB) as usize;
            bytes[at..at + content.len()].copy_from_slice(content);
        }
        bytes
    }
}

fn disk(bytes: Vec<u8>) -> Rc<dyn BlockRead> {
    Rc::new(bytes)
}

fn titles(bytes: &[u8]) -> Vec<String> {
    let entries = entries(&disk(bytes.to_vec())).unwrap();
    entries.into_iter().map(|entry| entry.title).collect()
}

fn environment(saved: &str) -> String {
    let text = format!("# GRUB Environment Block\nsaved_entry={saved}\n");
    format!("{text:#<1024}")
}

/// A root file system as Debian's installer leaves it.
fn debian_root(lab: &Lab, saved: &str, kernel: &[u8], initrd: &[u8]) -> Vec<u8> {
    let environment = environment(saved);
    let items = [
        File("boot/grub/grub.cfg", GRUB.as_bytes()),
        File("boot/grub/grubenv", environment.as_bytes()),
        File("boot/vmlinuz-6.1.0-2", kernel),
        File("boot/vmlinuz-6.1.0-1", b"older kernel"),
        File("boot/initrd.img-6.1.0-2", initrd),
        File("boot/initrd.img-6.1.0-1", b"older initrd"),
        File("boot/early.cpio", b"early"),
        Link("vmlinuz", "boot/vmlinuz-6.1.0-2"),
        Link("initrd.img", "/boot/./grub/../initrd.img-6.1.0-2"),
    ];
    lab.ext4("root", ROOT_UUID, &items)
}

const GPT: &str = "label: gpt\nstart=2048, size=8192, type=U\nstart=10240, size=32768, type=L\n";

#[test]
fn debian_disk_boots_the_default_of_its_grub() {
    let (kernel, initrd) = (noise(3_000_000, 1), noise(2_000_001, 2));
    let simple = (
        "Debian GNU/Linux",
        &kernel[..],
        "quiet \"opt=two words\" console=ttyS0",
    );
    let advanced = "Advanced options for Debian GNU/Linux>";
    let newest = format!("{advanced}Debian GNU/Linux, with Linux 6.1.0-2");
    let older = format!("{advanced}Debian's Linux 6.1.0-1 (recovery mode)");
    for (saved, (title, expected, options)) in [
        ("", simple),
        ("0", simple),
        ("no such entry", simple),
        ("uefi-firmware", simple),
        ("1", (&newest, &kernel, "ro")),
        ("1>1", (&older, b"older kernel", "single")),
        (
            "gnulinux-advanced-9f0c>gnulinux-6.1.0-1-recovery-9f0c",
            (&older, b"older kernel", "single"),
        ),
        (
            "Advanced options for Debian GNU/Linux>0",
            (&newest, &kernel, "ro"),
        ),
    ] {
        let lab = Lab::new();
        let root = debian_root(&lab, saved, &kernel, &initrd);
        let image = disk(lab.disk(24, GPT, &[(5, &root)]));
        let entry = read(&image, Choice::Default).unwrap();
        assert_eq!(entry.title, title, "{saved}");
        assert!(entry.kernel == expected, "{saved}");
        assert!(
            entry.command_line.ends_with(options),
            "{}",
            entry.command_line
        );
        assert_eq!(entry.source, "/boot/grub/grub.cfg on partition 2 (ext4)");
        if saved.is_empty() {
            let both = [b"early\0\0\0", &initrd[..]].concat();
            assert!(entry.initrd == Some(both));
            let list = entries(&image).unwrap();
            assert_eq!(list.len(), 4);
            assert_eq!(list.iter().filter(|entry| entry.default).count(), 1);
            assert_eq!(list[2].kernel, "/boot/vmlinuz-6.1.0-1");
            let chosen = read(&image, Choice::Index(2)).unwrap();
            assert_eq!(chosen.kernel, b"older kernel");
            let chosen = read(&image, Choice::Title(&older)).unwrap();
            assert_eq!(chosen.initrd.unwrap(), b"older initrd");
            let error = read(&image, Choice::Title("Plan 9")).unwrap_err();
            assert!(error.to_string().contains("'Plan 9'"), "{error}");
            let error = read(&image, Choice::Title("Memory test (memtest86+)")).unwrap_err();
            assert!(
                error.to_string().contains("memtest86+x64.bin is not on"),
                "{error}"
            );
        }
    }
}

#[test]
fn tables_of_every_kind_lead_to_the_file_system() {
    let lab = Lab::new();
    let root = debian_root(&lab, "", b"kernel", b"initrd");
    assert_eq!(titles(&root).len(), 4);
    let mbr = "label: dos\nstart=2048, size=2048, type=83\nstart=10240, size=32768, type=83\n";
    let logical = "label: dos\nstart=2048, size=47104, type=5\nstart=4096, size=2048\nstart=10240, size=32768\n";
    for script in [GPT, mbr, logical] {
        let lab = Lab::new();
        let image = lab.disk(24, script, &[(5, &root)]);
        assert_eq!(titles(&image).len(), 4, "{script}");
    }
}

#[test]
fn gpt_backup_serves_when_the_primary_is_corrupt() {
    let lab = Lab::new();
    let root = debian_root(&lab, "", b"kernel", b"initrd");
    let good = lab.disk(24, GPT, &[(5, &root)]);
    let backup = good.len() - 512;
    for (flips, readable) in [
        (vec![512 + 20], true),
        (vec![512 + 40], true),
        (vec![1024 + 32], true),
        (vec![backup + 40], true),
        (vec![512 + 40, backup + 40], false),
        (vec![1024 + 32, backup - 128 * 128 + 32], false),
    ] {
        let mut image = good.clone();
        for at in &flips {
            image[*at] ^= 1;
        }
        let result = entries(&disk(image));
        assert_eq!(result.is_ok(), readable, "{flips:?} {result:?}");
    }
}

#[test]
fn separate_boot_partition_and_efi_stub_are_followed() {
    let lab = Lab::new();
    // /boot of its own: paths in its configuration start there.
    let config = format!(
        "search --fs-uuid --set=root {BOOT_UUID}\nmenuentry 'Linux' {{\nlinux /vmlinuz-1 root=UUID={ROOT_UUID}\ninitrd /initrd-1\n}}\nmenuentry 'By link' {{\nsearch --no-floppy --fs-uuid --set=root {ROOT_UUID}\nlinux /vmlinuz\n}}\n"
    );
    let boot = lab.ext4(
        "boot",
        BOOT_UUID,
        &[
            File("grub/custom/grub.cfg", config.as_bytes()),
            File("vmlinuz-1", b"kernel"),
            File("initrd-1", b"initrd"),
        ],
    );
    let root = lab.ext4(
        "root",
        ROOT_UUID,
        &[Link("vmlinuz", "boot/vmlinuz-1"), Link("loop", "loop")],
    );
    let stub = format!(
        "search.fs_uuid {BOOT_UUID} root hd0,gpt9 \nset prefix=($root)'/grub/custom'\nconfigfile $prefix/grub.cfg\n"
    );
    let esp = lab.fat(
        "esp",
        4096,
        12,
        &[File("EFI/debian/grub.cfg", stub.as_bytes())],
    );
    let script = "label: gpt\nstart=2048, size=8192, type=U\nstart=10240, size=32768\nstart=43008, size=32768\n";
    let image = disk(lab.disk(40, script, &[(1, &esp), (5, &boot), (21, &root)]));
    let entry = read(&image, Choice::Default).unwrap();
    assert_eq!(entry.kernel, b"kernel");
    assert_eq!(entry.initrd.unwrap(), b"initrd");
    assert_eq!(entry.command_line, format!("root=UUID={ROOT_UUID}"));
    assert_eq!(entry.source, "/EFI/debian/grub.cfg on partition 1 (FAT)");
    let linked = read(&image, Choice::Title("By link")).unwrap();
    assert_eq!(linked.kernel, b"kernel");
    assert!(linked.initrd.is_none());
}

#[test]
fn fat_of_every_width_holds_loader_entries_with_long_names() {
    let kernel = noise(700_000, 3);
    let entry = |version: &str| {
        format!(
            "title Debian {version}\nversion {version}\nsort-key debian\nmachine-id 0123\nlinux /0123456789abcdef/{version}/linux\ninitrd /0123456789abcdef/{version}/initrd\noptions root=/dev/vda2 rw\n"
        )
    };
    for (width, size) in [(12, 4096), (16, 16384), (32, 40960)] {
        let lab = Lab::new();
        let esp = lab.fat(
            "esp",
            size,
            width,
            &[
                File(
                    "loader/loader.conf",
                    b"timeout 3\ndefault 0123456789abcdef-6.1.0-9*\n",
                ),
                File(
                    "loader/entries/0123456789abcdef-6.1.0-9.conf",
                    entry("6.1.0-9").as_bytes(),
                ),
                File(
                    "loader/entries/0123456789abcdef-6.1.0-10.conf",
                    entry("6.1.0-10").as_bytes(),
                ),
                File(
                    "loader/entries/arm.conf",
                    b"linux /arm\narchitecture aa64\n",
                ),
                File("0123456789abcdef/6.1.0-9/linux", &kernel),
                File("0123456789abcdef/6.1.0-9/initrd", b"initrd 9"),
                File("0123456789abcdef/6.1.0-10/linux", b"kernel 10"),
            ],
        );
        assert_eq!(titles(&esp), ["Debian 6.1.0-10", "Debian 6.1.0-9"]);
        let image = disk(esp);
        let chosen = read(&image, Choice::Default).unwrap();
        assert!(chosen.kernel == kernel, "FAT{width}");
        assert_eq!(chosen.initrd.unwrap(), b"initrd 9");
        assert_eq!(chosen.command_line, "root=/dev/vda2 rw");
        let error = read(&image, Choice::Index(0)).unwrap_err();
        assert!(error.to_string().contains("6.1.0-10/initrd"), "{error}");
    }
}

#[test]
fn blscfg_takes_loader_entries_with_variables() {
    let lab = Lab::new();
    let config = "load_env\nset default=\"${saved_entry}\"\ninsmod blscfg\nblscfg\n";
    let env = "# GRUB Environment Block\nsaved_entry=0123-5.14\nkernelopts=root=/dev/vda1 ro \n";
    let entry = |version: &str| {
        format!(
            "title Fedora {version}\nversion {version}\nlinux /boot/vmlinuz-{version}\ninitrd /boot/initrd-{version} $tuned_initrd\noptions $kernelopts $tuned_params quiet\n"
        )
    };
    let root = lab.ext4(
        "root",
        ROOT_UUID,
        &[
            File("boot/grub2/grub.cfg", config.as_bytes()),
            File("boot/grub2/grubenv", env.as_bytes()),
            File(
                "boot/loader/entries/0123-5.14.conf",
                entry("5.14").as_bytes(),
            ),
            File("boot/loader/entries/0123-5.2.conf", entry("5.2").as_bytes()),
            File("boot/vmlinuz-5.14", b"kernel"),
            File("boot/initrd-5.14", b"initrd"),
        ],
    );
    let entry = read(&disk(root), Choice::Default).unwrap();
    assert_eq!(entry.title, "Fedora 5.14");
    assert_eq!(entry.command_line, "root=/dev/vda1 ro   quiet");
    assert_eq!(entry.initrd.unwrap(), b"initrd");
}

#[test]
fn what_cannot_boot_says_what_was_seen() {
    let lab = Lab::new();
    let empty = lab.ext4("empty", ROOT_UUID, &[]);
    for (bytes, expected) in [
        (Vec::new(), "no boot entry"),
        (vec![0; 1 << 20], "the bare disk (no ext4 or FAT)"),
        (
            lab.disk(24, GPT, &[(5, &empty)]),
            "partition 2 (ext4), partition 1 (no ext4",
        ),
        (empty, "the bare disk (ext4)"),
    ] {
        let error = entries(&disk(bytes)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn hostile_configurations_end_with_an_error() {
    for (config, expected) in [
        ("source /boot/grub/grub.cfg", "include each other"),
        ("set a=xxxxxxxxxxxxxxxx\n", "no boot entry"),
        ("menuentry 'x' {", "not closed"),
        ("menuentry 'x", "quote is not closed"),
        ("fi", "no boot entry"),
        ("if true; then", "ends where"),
        ("}", "unexpected '}'"),
        (&"{ ".repeat(1000), "too deeply"),
        (
            &format!("a=xxxxxxxx\n{}", "a=$a$a$a$a\n".repeat(40)),
            "hold too much",
        ),
        (
            &format!("a={}\necho {}\n", "x".repeat(9000), "$a".repeat(9000)),
            "too long",
        ),
        (
            &format!("{}menuentry x {{ linux /a\n }}", "submenu s {\n".repeat(20)),
            "not closed",
        ),
        (&"menuentry x { true\n }\n".repeat(2000), "too long"),
    ] {
        let lab = Lab::new();
        let root = lab.ext4(
            "root",
            ROOT_UUID,
            &[File("boot/grub/grub.cfg", config.as_bytes())],
        );
        let error = entries(&disk(root)).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn corrupt_disks_never_panic() {
    let lab = Lab::new();
    let items = [
        File("boot/grub/grub.cfg", GRUB.as_bytes()),
        File("a long name.txt", b"text"),
    ];
    let table = lab.disk(2, "label: dos\nstart=2048, size=2047, type=5\n", &[]);
    corrupt(&table[..4096], 21, 300, fuzz::fuzz_partitions);
    let gpt = lab.disk(24, GPT, &[]);
    corrupt(&gpt[..65536], 22, 300, fuzz::fuzz_partitions);
    corrupt(&lab.fat("fat", 512, 12, &items), 23, 300, fuzz::fuzz_fat);
    let links = [File("file", &noise(5_000, 1)), Link("link", "file")];
    let mut ext4 = lab.ext4("ext4", ROOT_UUID, &links);
    ext4.truncate(4 << 20);
    corrupt(&ext4, 24, 100, fuzz::fuzz_ext4);
    corrupt(GRUB.as_bytes(), 25, 500, fuzz::fuzz_grub);
    let entry = b"title a\nlinux /a\ninitrd /b\noptions c\ndefault a-[0-9]*\n";
    corrupt(entry, 26, 300, fuzz::fuzz_bls);
}

#[test]
fn a_file_system_that_was_not_unmounted_is_read_through_its_journal() {
    let lab = Lab::new();
    debian_root(&lab, "", b"kernel", b"initrd");
    let path = lab.path("root.ext4");
    // A committed transaction that nobody has written back: the kernel's new content.
    let blocks = Command::new("/usr/sbin/debugfs")
        .args(["-R", "blocks /boot/vmlinuz-6.1.0-2"])
        .arg(&path)
        .output()
        .unwrap();
    let block = String::from_utf8(blocks.stdout).unwrap();
    let content = lab.path("content");
    fs::write(&content, [b"KERNEL", &[0; 1018][..]].concat()).unwrap();
    let script = format!(
        "jo -c -v 3\njw -b {} {}\njc\n",
        block.trim(),
        content.display()
    );
    let mut debugfs = Command::new("debugfs");
    tool("e2fsprogs", debugfs.arg("-w").arg(&path), &script);
    let good = fs::read(path).unwrap();
    assert_ne!(good[1024 + 0x60] & 1 << 2, 0);
    let entry = read(&disk(good.clone()), Choice::Default).unwrap();
    assert_eq!(entry.kernel, b"KERNEL");
    // The journal's inode: beyond the inode table.
    let mut bad = good;
    bad[1024 + 0xe0..][..4].copy_from_slice(&[0xff; 4]);
    let error = entries(&disk(bad)).unwrap_err().to_string();
    assert!(error.contains("journal's inode"), "{error}");
}

#[test]
fn an_image_file_is_read_like_bytes() {
    let lab = Lab::new();
    let root = debian_root(&lab, "", b"kernel", b"initrd");
    let path: &Path = &lab.path("image");
    fs::write(path, root).unwrap();
    let image: Rc<dyn BlockRead> = Rc::new(fs::File::open(path).unwrap());
    assert_eq!(read(&image, Choice::Default).unwrap().kernel, b"kernel");
}
