//! `cargo xtask image debian12|debian13`: a disk as a distribution's own cloud image is, with its boot loader, cloud-init and nothing of ours.
//!
//! ```text
//!  LBA 0        protective MBR with GRUB's boot.img      2048     BIOS boot partition: GRUB's core.img
//!  4096         EFI system partition (empty)             36864    root, ext4 with the label root
//! ```
//! No loop device and no mount: the file system is made from a directory, GRUB is written where grub-install would put it.
use crate::{
    Result,
    debian::{self, Tree},
    error::At,
    paths, proc,
    say::Phase,
    setup, stage,
};
use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

const PACKAGES: &str = "linux-image-cloud-amd64,systemd-sysv,udev,dbus,cloud-init,netplan.io,systemd-resolved,openssh-server,python3,\
    iproute2,procps,ca-certificates,less,e2fsprogs,cloud-guest-utils,fdisk";
/// What building needs beside the lab's packages.
const NEEDS: [&str; 2] = ["grub-pc-bin", "fdisk"];
const DISK_BYTES: u64 = 4 << 30;
const SECTOR: u64 = 512;
const CORE_AT: u64 = 2048;
const ROOT_AT: u64 = 36864;
/// Counts changes to this file.
const RECIPE: u32 = 3;
const GRUB_EARLY: &str = "search --no-floppy --label root --set=root\nset prefix=($root)/boot/grub\n";
const GRUB: &str = "set timeout=0\nlinux /vmlinuz root=LABEL=root ro console=tty0 console=ttyS0 quiet\ninitrd /initrd.img\nboot\n";

/// A release that there is an image of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// bookworm
    Debian12,
    /// trixie
    Debian13,
}

impl Release {
    /// The one that an image's name says.
    pub fn named(name: &str) -> Option<Self> {
        [Self::Debian12, Self::Debian13].into_iter().find(|r| r.name() == name)
    }

    /// The image's name in the catalogue.
    pub fn name(self) -> &'static str {
        match self {
            Self::Debian12 => "debian12",
            Self::Debian13 => "debian13",
        }
    }

    fn suite(self) -> &'static str {
        match self {
            Self::Debian12 => "bookworm",
            Self::Debian13 => "trixie",
        }
    }
}

/// Builds the image, once; gives its disk.
pub fn build(release: Release) -> Result<PathBuf> {
    setup::phase_with(&NEEDS)?;
    let _lock = stage::build_lock()?;
    let dir = paths::target().join("images").join(release.name());
    let disk = dir.join("disk.qcow2");
    let mark = dir.join("stamp");
    let stamp = format!("{RECIPE} {PACKAGES}\n");
    if disk.exists() && fs::read_to_string(&mark).is_ok_and(|old| old == stamp) {
        return Ok(disk);
    }
    let mut phase = Phase::begin("image", release.name());
    paths::dir(&dir, 0o755)?;
    let tree = dir.join("tree");
    phase.now("Debian's packages, some minutes");
    let what = Tree {
        suite: release.suite(),
        packages: PACKAGES,
        options: Vec::new(),
        more_suites: Vec::new(),
    };
    debian::make(&what, &tree)?;
    settle(&tree)?;
    phase.now("the disk");
    pack(&tree, &disk)?;
    fs::remove_dir_all(&tree).at("remove", &tree)?;
    paths::file(&mark, 0o644, stamp)?;
    phase.done(&disk.display().to_string());
    Ok(disk)
}

/// Copies it to a lab's images.
pub fn install_into(release: Release, dir: &Path) -> Result<()> {
    let built = build(release)?;
    let place = dir.join(release.name());
    paths::dir(&place, 0o755)?;
    let to = place.join("disk.qcow2");
    fs::copy(&built, &to).at("copy", &built)?;
    Ok(())
}

fn settle(tree: &Path) -> Result<()> {
    paths::file(tree.join("etc/machine-id"), 0o444, "uninitialized\n")?;
    paths::file(tree.join("etc/fstab"), 0o644, "LABEL=root / ext4 errors=remount-ro 0 1\n")?;
    paths::file(
        tree.join("etc/cloud/cloud.cfg.d/90-datasources.cfg"),
        0o644,
        "datasource_list: [NoCloud, None]\n",
    )?;
    paths::dir(tree.join("boot/grub"), 0o755)?;
    paths::file(tree.join("boot/grub/grub.cfg"), 0o644, GRUB)?;
    // Nothing of a guest that lives for one job waits for it.
    debian::mask(tree, &["systemd-networkd-wait-online.service"])?;
    let tree = tree.to_string_lossy();
    proc::run("chroot", &[&tree, "systemctl", "enable", "systemd-networkd.service"]).map(drop)
}

fn pack(tree: &Path, disk: &Path) -> Result<()> {
    let raw = disk.with_extension("raw");
    let file = fs::File::options()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(&raw)
        .at("create", &raw)?;
    file.set_len(DISK_BYTES).at("size", &raw)?;
    let raw_text = raw.to_string_lossy();
    let table = format!(
        "label: gpt\nstart={CORE_AT}, size={}, type=21686148-6449-6E6F-744E-656564454649\nstart=4096, size={}, type=uefi\nstart={ROOT_AT}, type=linux\n",
        4096 - CORE_AT,
        ROOT_AT - 4096
    );
    let script = disk.with_extension("sfdisk");
    paths::file(&script, 0o644, table)?;
    proc::run(
        "sh",
        &["-c", "sfdisk --quiet \"$0\" < \"$1\"", &raw_text, &script.to_string_lossy()],
    )?;
    fs::remove_file(&script).at("remove", &script)?;
    // The second table of a GPT takes the last 33 sectors, and sfdisk ends the partition at a whole MiB.
    let kib = (DISK_BYTES - ROOT_AT * SECTOR) / 1024 - 2048;
    let offset = format!("offset={}", ROOT_AT * SECTOR);
    let (tree, size) = (tree.to_string_lossy(), format!("{kib}k"));
    proc::run(
        "mke2fs",
        &["-q", "-F", "-t", "ext4", "-L", "root", "-d", &tree, "-E", &offset, &raw_text, &size],
    )?;
    grub(&file, disk)?;
    drop(file);
    let fresh = disk.with_extension("new");
    proc::run(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "qcow2", &raw_text, &fresh.to_string_lossy()],
    )?;
    fs::rename(&fresh, disk).at("write", disk)?;
    fs::remove_file(&raw).at("remove", &raw)
}

/// GRUB for a BIOS, as grub-bios-setup writes it: boot.img says where the first sector of core.img is, and that where its second is.
fn grub(raw: &fs::File, disk: &Path) -> Result<()> {
    let modules = "/usr/lib/grub/i386-pc";
    let (early, core) = (disk.with_extension("cfg"), disk.with_extension("core"));
    paths::file(&early, 0o644, GRUB_EARLY)?;
    let (early_text, core_text) = (early.to_string_lossy(), core.to_string_lossy());
    let mut args = vec![
        "-O",
        "i386-pc",
        "-d",
        modules,
        "-p",
        "/boot/grub",
        "-c",
        &early_text,
        "-o",
        &core_text,
    ];
    args.extend([
        "biosdisk",
        "part_gpt",
        "ext2",
        "normal",
        "linux",
        "search",
        "search_label",
        "configfile",
    ]);
    proc::run("grub-mkimage", &args)?;
    let mut boot = fs::read(format!("{modules}/boot.img")).at("read", modules)?;
    let mut image = fs::read(&core).at("read", &core)?;
    boot.truncate(440);
    boot[0x5c..0x64].copy_from_slice(&CORE_AT.to_le_bytes());
    boot[0x66..0x68].copy_from_slice(&[0x90, 0x90]);
    image[0x1f4..0x1fc].copy_from_slice(&(CORE_AT + 1).to_le_bytes());
    raw.write_all_at(&boot, 0).at("write", disk)?;
    raw.write_all_at(&image, CORE_AT * SECTOR).at("write", disk)?;
    for file in [early, core] {
        fs::remove_file(&file).at("remove", &file)?;
    }
    Ok(())
}
