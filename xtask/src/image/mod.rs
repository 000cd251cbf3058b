//! `cargo xtask image tiny`: a guest that boots in seconds without KVM, for the lab.
//!
//! Debian's cloud kernel, an initramfs of busybox, the few modules and the guest helper, and a small ext4 disk mounted on /scratch.
//! Built below the target directory when something it is made of has changed.

mod cpio;
pub mod debian;

use crate::{Result, error::At, paths, proc, setup, stage};
pub(crate) use cpio::Archive;
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const INIT: &str = include_str!("../../../packaging/tiny-init");
const BUSYBOX: &str = "/bin/busybox";
/// Modules by name; what they need comes with them.
const MODULES: [&str; 9] = [
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "virtio_net",
    "virtio_balloon",
    "virtio-rng",
    "virtio_scsi",
    "isofs",
    "virtiofs",
];
/// Counts changes to this file that inputs do not show.
const RECIPE: u32 = 1;
const FILES: [&str; 3] = ["vmlinuz", "initrd", "disk.qcow2"];
const DISK_BYTES: u64 = 1 << 30;

/// Builds the image if something it is made of has changed; gives its directory.
pub fn build() -> Result<PathBuf> {
    let _lock = stage::build_lock()?;
    build_locked()
}

/// The same for one who holds the build lock.
pub(crate) fn build_locked() -> Result<PathBuf> {
    for program in ["busybox", "mke2fs", "qemu-img"] {
        setup::check(program)?;
    }
    let guest = stage::build_guest()?;
    let dir = paths::target().join("images/tiny");
    let kernel = newest_kernel()?;
    let stamp = stamp(&kernel, &guest)?;
    let mark = dir.join("stamp");
    if fs::read_to_string(&mark).is_ok_and(|old| old == stamp) && FILES.iter().all(|file| dir.join(file).exists()) {
        return Ok(dir);
    }
    let _ = fs::remove_file(&mark);
    paths::dir(&dir, 0o755)?;
    copy(&kernel.image, &dir.join("vmlinuz"))?;
    paths::file(dir.join("initrd"), 0o644, initramfs(&kernel, &guest)?)?;
    disk(&dir)?;
    paths::file(&mark, 0o644, stamp)?;
    Ok(dir)
}

/// Builds the image if needed and copies it to a lab's image directory, where QEMU's user can read it.
pub fn install_into(dir: &Path) -> Result<()> {
    let _lock = stage::build_lock()?;
    let built = build_locked()?;
    let tiny = dir.join("tiny");
    paths::dir(dir, 0o755)?;
    paths::dir(&tiny, 0o755)?;
    FILES.iter().try_for_each(|file| copy(&built.join(file), &tiny.join(file)))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let data = fs::read(from).at("read", from)?;
    paths::file(to, 0o644, data)
}

struct Kernel {
    image: PathBuf,
    modules: PathBuf,
}

/// The newest cloud kernel, with its modules, that the machine has installed or setup has unpacked.
fn newest_kernel() -> Result<Kernel> {
    let mut found: Vec<(Vec<u64>, Kernel)> = [Path::new("/"), Path::new(paths::KERNEL)]
        .into_iter()
        .flat_map(kernels_below)
        .collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
        .pop()
        .map(|(_, kernel)| kernel)
        .ok_or_else(|| "there is no cloud kernel: `cargo xtask setup` fetches one".into())
}

/// Whether there is a kernel for the image.
pub(crate) fn has_kernel() -> bool {
    newest_kernel().is_ok()
}

fn kernels_below(root: &Path) -> Vec<(Vec<u64>, Kernel)> {
    let boot = root.join("boot");
    let names = fs::read_dir(&boot)
        .into_iter()
        .flatten()
        .filter_map(|e| e.ok()?.file_name().into_string().ok());
    names
        .filter_map(|name| {
            let release = name.strip_prefix("vmlinuz-")?;
            release.contains("-cloud-").then_some(())?;
            let numbers = release
                .split(|c: char| !c.is_ascii_digit())
                .filter_map(|n| n.parse().ok())
                .collect();
            let modules = root.join("lib/modules").join(release);
            modules.join("modules.dep").exists().then(|| {
                (
                    numbers,
                    Kernel {
                        image: boot.join(&name),
                        modules,
                    },
                )
            })
        })
        .collect()
}

fn stamp(kernel: &Kernel, guest: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(format!("{RECIPE} {MODULES:?} {DISK_BYTES}\n{INIT}"));
    // Packages' files change with their times; the helper is rebuilt by us, often to the same bytes.
    for path in [&kernel.image, &kernel.modules.join("modules.dep"), Path::new(BUSYBOX)] {
        let meta = fs::metadata(path).at("look at", path)?;
        hash.update(format!("{} {} {:?}\n", path.display(), meta.len(), meta.modified().ok()));
    }
    hash.update(fs::read(guest).at("read", guest)?);
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn initramfs(kernel: &Kernel, guest: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for (dir, mode) in [
        ("proc", 0o755),
        ("sys", 0o755),
        ("dev", 0o755),
        ("run", 0o755),
        ("tmp", 0o1777),
        ("scratch", 0o1777),
        ("root", 0o700),
    ] {
        archive.directory(dir, mode);
    }
    archive.device("dev/console", 0o600, (5, 1));
    archive.device("dev/null", 0o666, (1, 3));
    archive.file("init", 0o755, INIT.as_bytes());
    archive.file("bin/busybox", 0o755, &fs::read(BUSYBOX).at("read", BUSYBOX)?);
    let applets = proc::run(BUSYBOX, &["--list-full"])?;
    for applet in applets
        .lines()
        .filter(|applet| !matches!(*applet, "bin/busybox" | "init" | "linuxrc"))
    {
        archive.link(applet, "/bin/busybox");
    }
    // Users' scripts begin with #!/bin/bash; what they do with it in tests, ash can do as well.
    for bash in ["bin/bash", "usr/bin/bash"] {
        archive.file(bash, 0o755, b"#!/bin/sh\nexec /bin/sh \"$@\"\n");
    }
    archive.link("usr/bin/sh", "/bin/sh");
    archive.file(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n",
    );
    archive.file("etc/group", 0o644, b"root:x:0:\ntty:x:5:\nnogroup:x:65534:\n");
    archive.file("etc/hosts", 0o644, b"127.0.0.1 localhost\n");
    let program = fs::read(guest).at("read", guest)?;
    archive.file("usr/libexec/slurm-vm/slurm-vm-guest", 0o755, &program);
    let mut order = String::new();
    for module in in_order(kernel)? {
        let name = module.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let plain = format!("{}.ko", name.split('.').next().unwrap_or(&name));
        archive.file(&format!("lib/modules/{plain}"), 0o644, &unpacked(&module)?);
        order += &format!("{plain}\n");
    }
    archive.file("lib/modules/order", 0o644, order.as_bytes());
    Ok(archive.finish())
}

/// The module files, each after those it needs. A module that this kernel has built in is in no list.
fn in_order(kernel: &Kernel) -> Result<Vec<PathBuf>> {
    let table = kernel.modules.join("modules.dep");
    let text = fs::read_to_string(&table).at("read", &table)?;
    let mut by_name = BTreeMap::new();
    for line in text.lines() {
        if let Some((path, needs)) = line.split_once(':') {
            let file = path.rsplit('/').next().unwrap_or(path);
            by_name.insert(file.split('.').next().unwrap_or(file), (path, needs));
        }
    }
    let mut order: Vec<&str> = Vec::new();
    for name in MODULES {
        // modules.dep lists all needs, the outermost first.
        let Some((path, needs)) = by_name.get(name) else { continue };
        for part in needs.split_whitespace().rev().chain([*path]) {
            if !order.contains(&part) {
                order.push(part);
            }
        }
    }
    if order.is_empty() {
        return Err(format!("{} has none of the modules of the image", table.display()).into());
    }
    Ok(order.into_iter().map(|path| kernel.modules.join(path)).collect())
}

fn unpacked(module: &Path) -> Result<Vec<u8>> {
    let tool = match module.extension().and_then(|e| e.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(module).at("read", module),
    };
    let output = Command::new(tool).arg("-dc").arg(module).output().at("run", tool)?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(format!("{tool} cannot unpack {}", module.display()).into())
    }
}

fn disk(dir: &Path) -> Result<()> {
    let (raw, fresh) = (dir.join("disk.raw"), dir.join("disk.new"));
    let file = fs::File::create(&raw).at("create", &raw)?;
    file.set_len(DISK_BYTES).at("size", &raw)?;
    drop(file);
    let (raw_text, fresh_text) = (raw.to_string_lossy(), fresh.to_string_lossy());
    let uuid = "5c0a7d1e-0000-4000-8000-736c75726d76";
    let features = format!("hash_seed={uuid},lazy_itable_init=1,lazy_journal_init=1,nodiscard");
    proc::run(
        "mke2fs",
        &["-q", "-F", "-t", "ext4", "-L", "scratch", "-U", uuid, "-E", &features, &raw_text],
    )?;
    proc::run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &raw_text, &fresh_text])?;
    fs::remove_file(&raw).at("remove", &raw)?;
    let disk = dir.join("disk.qcow2");
    fs::rename(&fresh, &disk).at("write", &disk)
}

#[cfg(test)]
mod tests {
    use super::MODULES;

    #[test]
    fn the_script_for_admins_takes_the_same_modules() {
        let script = include_str!("../../../packaging/slurm-vm-make-tiny-image");
        assert!(script.contains(&format!("\nmodules=\"{}\"\n", MODULES.join(" "))));
    }
}
