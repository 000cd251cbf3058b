//! The root of a lab host: the machine's own tree (or another Debian release's) under an overlay whose writable layer is in memory,
//! with private /proc, /dev/pts, /run and /tmp. Made inside the host's own mount namespace: the machine never sees any of it.

use super::options::{CTL, Options, Places};
use crate::{Result, error::At, paths};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// The lab's munge key, inside a host.
pub const MUNGE_KEY: &str = "/run/lab-munge.key";
/// The file system for VM state, inside a host.
pub const VM_STATE: &str = "/var/lib/slurm-vm";

const NONE: Option<&str> = None;

/// Mounts a file system of a kind that needs no device.
pub fn mount_kind(kind: &str, on: &Path, options: &str) -> Result<()> {
    mount(Some(kind), on, Some(kind), MsFlags::empty(), Some(options)).at("mount over", on)
}

fn bind(from: &Path, on: &Path, read_only: bool) -> Result<()> {
    fs::create_dir_all(on).at("create", on)?;
    mount(Some(from), on, NONE, MsFlags::MS_BIND, NONE).at("bind over", on)?;
    if read_only {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(NONE, on, NONE, flags, NONE).at("make read-only", on)?;
    }
    Ok(())
}

/// Keeps mounts of this namespace to itself, in both directions.
pub fn make_private() -> Result<()> {
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).at("make private", "/")
}

/// The directory of a host below the lab's memory file system. It outlives a power cycle of the host, as a disk does.
fn own(places: &Places, host: &str) -> PathBuf {
    places.ram().join(host)
}

/// Makes what outlives a power cycle. Called by the supervisor, whose mount namespace is the parent of all hosts'.
pub fn prepare(options: &Options, places: &Places, host: &str) -> Result<()> {
    let own = own(places, host);
    if own.exists() {
        return Ok(());
    }
    for part in ["up", "work", "root", "vm-state"] {
        paths::dir(own.join(part), 0o755)?;
    }
    if host != CTL {
        mount_kind("tmpfs", &own.join("vm-state"), &format!("size={}m,mode=0755", options.vm_disk_mib))?;
    }
    Ok(())
}

/// Enters the host's root. Called by the host's init, alone in new namespaces.
pub fn enter(places: &Places, host: &str, lower: &Path, shared_home: bool) -> Result<()> {
    let own = own(places, host);
    let root = own.join("root");
    let layers = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        own.join("up").display(),
        own.join("work").display()
    );
    mount(Some("overlay"), &root, Some("overlay"), MsFlags::empty(), Some(layers.as_str())).at("mount an overlay over", &root)?;
    if lower == Path::new("/") {
        other_file_systems(&own, &root)?;
    }
    for name in ["proc", "sys", "dev", "run", "tmp", "shared"] {
        fs::create_dir_all(root.join(name)).at("create", root.join(name))?;
    }
    mount_kind("proc", &root.join("proc"), "")?;
    // A /sys of our own shows our network devices, libvirtd looks there; slurmd wants to see control groups below it.
    mount_kind("sysfs", &root.join("sys"), "")?;
    for name in ["sys/fs/cgroup", "dev"] {
        let (from, on) = (Path::new("/").join(name), root.join(name));
        if !from.exists() {
            continue;
        }
        mount(Some(&from), &on, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE).at("bind over", &on)?;
        mount(NONE, &on, NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).at("make private", &on)?;
    }
    mount_kind("devpts", &root.join("dev/pts"), "newinstance,ptmxmode=0666,gid=5,mode=620")?;
    mount_kind("tmpfs", &root.join("dev/shm"), "mode=1777")?;
    mount_kind("tmpfs", &root.join("run"), "mode=0755")?;
    mount_kind("tmpfs", &root.join("tmp"), "mode=1777")?;
    paths::dir(root.join("run/lock"), 0o1777)?;
    bind(&places.logs(host), &root.join("var/log"), false)?;
    bind(
        &places.disk().join("hosts").join(host).join("libvirt"),
        &root.join("var/lib/libvirt"),
        false,
    )?;
    bind(&own.join("vm-state"), &root.join(VM_STATE.trim_start_matches('/')), false)?;
    bind(&places.shared(), &root.join("shared"), false)?;
    if shared_home {
        let home = root.join("home");
        fs::create_dir_all(&home).at("create", &home)?;
        bind(&places.shared().join("home"), &home, false)?;
    }
    bind(&places.images(), &root.join("var/lib/slurm-vm-images"), true)?;
    bind(&places.stage(), &root.join("usr/libexec/slurm-vm"), true)?;
    let key = root.join(MUNGE_KEY.trim_start_matches('/'));
    fs::copy(places.munge_key(), &key).at("copy the munge key to", &key)?;
    let svm = root.join("usr/bin/svm");
    if fs::symlink_metadata(&svm).is_err() {
        std::os::unix::fs::symlink("../libexec/slurm-vm/svm", &svm).at("link", &svm)?;
    }
    // pivot_root(".", ".") stacks the old root over the new one, from where it is let go: no directory is needed for it.
    std::env::set_current_dir(&root).at("enter", &root)?;
    nix::unistd::pivot_root(".", ".").at("make the root of", &root)?;
    umount2(".", MntFlags::MNT_DETACH).at("let go of", "the old root")?;
    std::env::set_current_dir("/").at("enter", "/")
}

/// An overlay over `/` shows that one file system only. What the machine keeps on others (a separate /usr or /var) gets an overlay each.
fn other_file_systems(own: &Path, root: &Path) -> Result<()> {
    let table = fs::read_to_string("/proc/self/mountinfo").at("read", "/proc/self/mountinfo")?;
    let mut mounts: Vec<&str> = table.lines().filter_map(separate_tree).collect();
    mounts.sort_unstable();
    mounts.dedup();
    for (number, point) in mounts.into_iter().enumerate() {
        let (up, work) = (own.join(format!("up{number}")), own.join(format!("work{number}")));
        fs::create_dir_all(&up).at("create", &up)?;
        fs::create_dir_all(&work).at("create", &work)?;
        let on = root.join(point.trim_start_matches('/'));
        let layers = format!("lowerdir={point},upperdir={},workdir={}", up.display(), work.display());
        mount(Some("overlay"), &on, Some("overlay"), MsFlags::empty(), Some(layers.as_str())).at("mount an overlay over", &on)?;
    }
    Ok(())
}

/// The mount point in a line of mountinfo, if the host's programs may live there.
fn separate_tree(line: &str) -> Option<&str> {
    let (left, right) = line.split_once(" - ")?;
    let point = left.split(' ').nth(4)?;
    let kind = right.split(' ').next()?;
    let wanted = ["/usr", "/var", "/etc", "/opt", "/lib", "/home"];
    let on_disk = matches!(kind, "ext2" | "ext3" | "ext4" | "xfs" | "btrfs" | "zfs" | "f2fs" | "overlay");
    let ours = point.starts_with(paths::LAB_STATE) || point.starts_with(paths::LAB_DISKS);
    (on_disk && !ours && wanted.iter().any(|w| point == *w || point.starts_with(&format!("{w}/"))) && !point.contains(['\\', ':', ',']))
        .then_some(point)
}

#[cfg(test)]
mod tests {
    use super::separate_tree;

    #[test]
    fn a_separate_usr_gets_an_overlay_and_pseudo_file_systems_do_not() {
        assert_eq!(
            separate_tree("31 25 8:3 / /usr rw,relatime shared:1 - ext4 /dev/sda3 rw"),
            Some("/usr")
        );
        assert_eq!(
            separate_tree("31 25 8:3 / /var/lib/docker rw - xfs /dev/sdb rw"),
            Some("/var/lib/docker")
        );
        assert_eq!(separate_tree("31 25 0:5 / /dev/shm rw - tmpfs tmpfs rw"), None);
        assert_eq!(separate_tree("31 25 8:1 / / rw - ext4 /dev/sda1 rw"), None);
        assert_eq!(
            separate_tree("31 25 0:9 / /run/slurm-vm-lab/x/ram/n1/root rw - overlay overlay rw"),
            None
        );
    }
}
