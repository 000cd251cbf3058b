//! The disk that machines start from: a Debian made once by mmdebstrap and kept, with Slurm, MUNGE, libvirt, QEMU and NFS from Debian's
//! packages and their own units. Each machine writes to an overlay of its own. No loop device and no mount is needed.

use super::options::{Debian, images};
use crate::{
    Result,
    debian::{self, Tree},
    error::At,
    paths, proc, setup,
};
use nix::fcntl::{Flock, FlockArg};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Counts changes to this file, so that a disk made by an older one is made again.
const RECIPE: u32 = 3;
const PACKAGES: &str = "systemd-sysv,udev,dbus,linux-image-cloud-amd64,initramfs-tools,slurmctld,slurmd,slurm-client,slurm-wlm-basic-plugins,\
    munge,libvirt-daemon-system,libvirt-daemon-driver-qemu,libvirt-clients,qemu-system-x86,qemu-utils,nfs-kernel-server,nfs-common,\
    openssh-server,apparmor,iproute2,iputils-ping,nftables,busybox-static,cpio,procps,kmod,passwd,less,e2fsprogs,zstd,xz-utils,ca-certificates,quota";
/// What the root of a machine can hold; the file is sparse.
const DISK_BYTES: u64 = 8 << 30;
/// Sockets that keep libvirtd from starting, and what waits for hardware that is not there.
const MASKED: [&str; 5] = [
    "libvirtd-tls.socket",
    "libvirtd-tcp.socket",
    "nfs-blkmap.service",
    "getty@tty1.service",
    "systemd-pstore.service",
];
/// Puts a machine's own files in place before its first boot goes on: the second disk is a tar file.
const FIRST_BOOT: &str = "#!/bin/sh
case \"$1\" in prereqs) exit 0 ;; esac
if [ -b /dev/vdb ] && [ ! -e \"$rootmnt/etc/machine/first-boot\" ]; then
    chroot \"$rootmnt\" tar -x --no-same-owner -C / < /dev/vdb
    chroot \"$rootmnt\" /bin/sh -x /etc/machine/first-boot
fi
";
const SSHD: &str = "PermitRootLogin prohibit-password\nUsePAM no\nUseDNS no\nMaxSessions 200\nMaxStartups 200\nPrintMotd no\n";

/// A disk with its kernel.
#[derive(Debug)]
pub struct Image {
    /// The root file system, never written to.
    pub disk: PathBuf,
    /// Its kernel.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initrd: PathBuf,
}

/// Makes the disk of a release if it is not there.
pub fn make(debian: Debian) -> Result<Image> {
    for program in ["mmdebstrap", "mke2fs", "qemu-img", "qemu-system-x86_64", "ssh", "ip"] {
        setup::check(program)?;
    }
    let all = images();
    paths::dir(&all, 0o755)?;
    let lock = all.join("lock");
    let file = fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&lock)
        .at("open", &lock)?;
    let _lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| e).at("lock", &lock)?;
    let dir = all.join(debian.suite());
    let image = Image {
        disk: dir.join("disk.qcow2"),
        kernel: dir.join("vmlinuz"),
        initrd: dir.join("initrd"),
    };
    let stamp = dir.join("stamp");
    let recipe = format!("{RECIPE} {PACKAGES} {:?} {MASKED:?}\n{FIRST_BOOT}{SSHD}", debian::TIMERS);
    if fs::read_to_string(&stamp).is_ok_and(|old| old == recipe) {
        return Ok(image);
    }
    // Machines that run keep the files they have opened, also when those are made anew.
    let tree = dir.join("tree");
    for old in [&tree, &dir] {
        if old.exists() {
            fs::remove_dir_all(old).at("remove", old)?;
        }
    }
    paths::dir(&dir, 0o755)?;
    bootstrap(debian, &tree)?;
    settle(&tree)?;
    pack(&tree, &image)?;
    fs::remove_dir_all(&tree).at("remove", &tree)?;
    paths::file(stamp, 0o644, recipe)?;
    Ok(image)
}

fn bootstrap(debian: Debian, tree: &Path) -> Result<()> {
    let suite = debian.suite();
    println!(
        "makes the disk of a machine with Debian {suite}, once; this takes some minutes, see {}",
        tree.with_extension("log").display()
    );
    let mut what = Tree {
        suite,
        packages: PACKAGES,
        options: ["doc/slurm-vm/*", "man/*svm*"]
            .map(|part| format!("--dpkgopt=path-include=/usr/share/{part}"))
            .into(),
        more_suites: vec![format!("{suite}-updates")],
    };
    if debian == Debian::V12 {
        what.more_suites.push(format!("{suite}-backports"));
        let pin = format!("Package: qemu* libvirt* seabios ipxe-qemu*\\nPin: release n={suite}-backports\\nPin-Priority: 900\\n");
        what.options.push(format!(
            "--setup-hook=mkdir -p \"$1/etc/apt/preferences.d\"; printf '{pin}' > \"$1/etc/apt/preferences.d/backports\""
        ));
    }
    debian::make(&what, tree)
}

/// What all machines have in common beyond their packages.
fn settle(tree: &Path) -> Result<()> {
    // Empty: each machine gets one of its own at its first boot.
    paths::file(tree.join("etc/machine-id"), 0o444, "")?;
    paths::file(tree.join("etc/resolv.conf"), 0o644, "")?;
    paths::file(tree.join("etc/fstab"), 0o644, "/dev/vda / ext4 errors=remount-ro 0 1\n")?;
    // Without a name server every other source of names means a time-out.
    proc::run("sed", &["-i", "s/^hosts:.*/hosts: files/", &text(&tree.join("etc/nsswitch.conf"))])?;
    paths::file(tree.join("etc/ssh/sshd_config.d/machine.conf"), 0o644, SSHD)?;
    paths::dir(tree.join("var/log/journal"), 0o2755)?;
    // The same rules, made into larger tables in a sixth of the time: libvirt has a guest's profile made several times at its start.
    let parser = tree.join("etc/apparmor/parser.conf");
    let text = fs::read_to_string(&parser).unwrap_or_default();
    paths::file(&parser, 0o644, format!("{text}Optimize=no-expr-simplify\nOptimize=no-minimize\n"))?;
    debian::mask(tree, &MASKED)?;
    // There is no network to get packages from: all that a machine may be asked to install is there already.
    for sources in [
        "etc/apt/sources.list",
        "etc/apt/sources.list.d/0000bookworm.list",
        "etc/apt/preferences.d/backports",
    ] {
        let _ = fs::remove_file(tree.join(sources));
    }
    inside(tree, &["systemctl", "enable", "systemd-networkd.service"])?;
    paths::file(tree.join("etc/initramfs-tools/scripts/local-bottom/machine"), 0o755, FIRST_BOOT)?;
    inside(tree, &["update-initramfs", "-u"]).map(drop)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn inside(tree: &Path, argv: &[&str]) -> Result<String> {
    let tree = text(tree);
    let args: Vec<&str> = std::iter::once(tree.as_str()).chain(argv.iter().copied()).collect();
    proc::run("chroot", &args)
}

fn pack(tree: &Path, image: &Image) -> Result<()> {
    for (prefix, to) in [("vmlinuz-", &image.kernel), ("initrd.img-", &image.initrd)] {
        let boot = tree.join("boot");
        let found = fs::read_dir(&boot)
            .at("read", &boot)?
            .filter_map(|e| e.ok().map(|e| e.path()))
            .find(|p| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with(prefix)))
            .ok_or_else(|| format!("{} has no {prefix}*", boot.display()))?;
        fs::copy(&found, to).at("copy", &found)?;
    }
    let raw = image.disk.with_extension("raw");
    let file = fs::File::create(&raw).at("create", &raw)?;
    file.set_len(DISK_BYTES).at("size", &raw)?;
    drop(file);
    let (tree, raw_text) = (text(tree), text(&raw));
    proc::run("mke2fs", &["-q", "-F", "-t", "ext4", "-L", "root", "-d", &tree, &raw_text])?;
    proc::run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &raw_text, &text(&image.disk)])?;
    fs::remove_file(&raw).at("remove", &raw)
}
