//! `cargo xtask setup`: installs what the build and the lab need and the machine lacks, with apt.
//!
//! No daemon starts on the machine: the packages' daemons run in the lab only.

use crate::{
    Error, Result, apt,
    error::At,
    image, paths, proc,
    say::{self, Phase},
};
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

/// These come from one place: if one of them is from backports, so must the others be.
const VIRTUAL: [&str; 6] = [
    "qemu-system-x86",
    "qemu-utils",
    "libvirt-daemon-system",
    "libvirt-daemon-driver-qemu",
    "libvirt-clients",
    "libvirt-dev",
];
const OTHERS: [&str; 23] = [
    "slurmctld",
    "slurmd",
    "slurm-client",
    "slurm-wlm-basic-plugins",
    "libslurm-dev",
    "munge",
    "libmunge-dev",
    "busybox-static",
    "libclang-dev",
    "libseccomp-dev",
    "libcap-ng-dev",
    "gcc",
    "make",
    "libc6-dev",
    "mmdebstrap",
    "cpio",
    "iproute2",
    "e2fsprogs",
    "xz-utils",
    "zstd",
    "kmod",
    "procps",
    "ca-certificates",
];
/// Depends on the release's cloud kernel, which boots fast and has drivers for VMs only.
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";
const DPKG_STATUS: &str = "/var/lib/dpkg/status";
const BACKPORTS_FILE: &str = "/etc/apt/sources.list.d/slurm-vm-backports.list";

/// Installs what is missing and says what it did; quick when there is nothing to do.
pub fn setup() -> Result<()> {
    match install_missing(&[], &mut |line| println!("{line}"))? {
        0 => println!("nothing is missing"),
        _ => println!("done"),
    }
    Ok(())
}

/// The same as a phase of a newcomer's command: what apt says goes to a log.
pub fn phase() -> Result<()> {
    phase_with(&[])
}

/// The same, with packages that only one command needs.
pub fn phase_with(more: &[&'static str]) -> Result<()> {
    let mut phase = Phase::begin("packages", "looks what is missing");
    let result = install_missing(more, &mut |line| phase.now(line));
    if result.is_err() {
        phase.pause();
    }
    phase.done(&match result? {
        0 => "all there".to_owned(),
        n => format!("{n} installed, and what they need"),
    });
    Ok(())
}

/// Says what it does, line by line; gives the number of packages that were missing.
fn install_missing(more: &[&'static str], say: &mut dyn FnMut(&str)) -> Result<usize> {
    let policy = Policy::default();
    policy.put_back()?;
    let installed = installed()?;
    let missing = |names: &[&'static str]| {
        names
            .iter()
            .copied()
            .filter(|name| !installed.contains_key(*name))
            .collect::<Vec<_>>()
    };
    let (virtual_part, others) = (missing(&VIRTUAL), [missing(&OTHERS), missing(more)].concat());
    let kernel = !image::has_kernel();
    let count = virtual_part.len() + others.len() + usize::from(kernel);
    if count == 0 {
        return Ok(0);
    }
    let mut wanted = [others.as_slice(), virtual_part.as_slice()].concat().join(" ");
    if kernel {
        wanted += &format!(" {KERNEL_PACKAGE} (unpacked in {}, not installed)", paths::KERNEL);
    }
    let codename =
        codename().ok_or_else(|| format!("this is neither Debian 12 nor 13: install what these Debian packages hold: {wanted}"))?;
    if !nix::unistd::geteuid().is_root() {
        return Err(format!("root is needed to install {wanted}: run `cargo xtask setup` with sudo").into());
    }
    say(&format!("installs {wanted}"));
    let from_backports = installed.iter().any(|(name, version)| is_virtual(name) && version.contains("~bpo"));
    if from_backports && !virtual_part.is_empty() {
        add_backports(&codename, say)?;
    }
    policy.put_in_place()?;
    let done = install(&codename, from_backports, &virtual_part, &others, say);
    policy.put_back()?;
    done?;
    if kernel {
        fetch_kernel(say)?;
    }
    Ok(count)
}

fn is_virtual(name: &str) -> bool {
    VIRTUAL.contains(&name) || name.starts_with("libvirt") || name.starts_with("qemu-system")
}

fn install(codename: &str, from_backports: bool, virtual_part: &[&str], others: &[&str], say: &mut dyn FnMut(&str)) -> Result<()> {
    apt_get(&["update"], say)?;
    if !others.is_empty() {
        apt_get(&[&["install", "-y", "--no-install-recommends"], others].concat(), say)?;
    }
    if !virtual_part.is_empty() {
        let suite = format!("{codename}-backports");
        let from: &[&str] = if from_backports { &["-t", &suite] } else { &[] };
        apt_get(&[&["install", "-y", "--no-install-recommends"], from, virtual_part].concat(), say)?;
    }
    Ok(())
}

fn apt_get(args: &[&str], say: &mut dyn FnMut(&str)) -> Result<()> {
    let mut command = Command::new("apt-get");
    // Another apt may be at work for a while: a fresh machine updates itself.
    command.args(["-q", "-o", "DPkg::Lock::Timeout=300"]).args(args);
    command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C.UTF-8");
    say::run(&mut command, &paths::target().join("apt.log"), 12, |line| {
        if ["Get:", "Unpacking ", "Setting up ", "Reading "]
            .iter()
            .any(|start| line.starts_with(start))
        {
            say(line);
        }
    })
}

/// Fetches the kernel of the image and unpacks it beside the system: an installed one would be a new entry in the machine's boot menu.
fn fetch_kernel(say: &mut dyn FnMut(&str)) -> Result<()> {
    let needs = proc::run("apt-cache", &["depends", "--important", KERNEL_PACKAGE])?;
    let package = needs
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .ok_or_else(|| format!("apt does not say which kernel {KERNEL_PACKAGE} is: {needs}"))?
        .to_owned();
    let root = Path::new(paths::KERNEL);
    let fresh = root.with_extension("new");
    if fresh.exists() {
        fs::remove_dir_all(&fresh).at("remove", &fresh)?;
    }
    paths::dir(&fresh, 0o755)?;
    let mut get = Command::new("apt-get");
    // As root, for the directory is root's.
    get.args(["-q", "-o", "APT::Sandbox::User=root", "download", &package])
        .current_dir(&fresh);
    say(&format!("downloads {package}"));
    say::run(&mut get, &paths::target().join("apt.log"), 12, |_| {})?;
    let deb = fs::read_dir(&fresh)
        .at("read", &fresh)?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .find(|path| path.extension().is_some_and(|e| e == "deb"))
        .ok_or_else(|| format!("apt-get download has left no package in {}", fresh.display()))?;
    proc::run("dpkg-deb", &["-x", &deb.to_string_lossy(), &fresh.to_string_lossy()])?;
    fs::remove_file(&deb).at("remove", &deb)?;
    // From Debian 13 on the modules are below usr, as they are once /lib is a link.
    if !fresh.join("lib").exists() {
        std::os::unix::fs::symlink("usr/lib", fresh.join("lib")).at("link", fresh.join("lib"))?;
    }
    let release = package.trim_start_matches("linux-image-");
    proc::run("depmod", &["-b", &fresh.to_string_lossy(), release])?;
    if root.exists() {
        fs::remove_dir_all(root).at("remove", root)?;
    }
    fs::rename(&fresh, root).at("move into place", root)
}

/// Installed packages and their versions, from dpkg's own file: asking dpkg takes longer than all the rest.
fn installed() -> Result<BTreeMap<String, String>> {
    let text = fs::read_to_string(DPKG_STATUS).map_err(|e| format!("cannot read {DPKG_STATUS}: {e}; setup knows Debian 12 and 13 only"))?;
    Ok(parse_status(&text))
}

fn parse_status(text: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let (mut name, mut fine) = ("", false);
    for line in text.lines() {
        if let Some(value) = line.strip_prefix("Package: ") {
            (name, fine) = (value, false);
        } else if let Some(value) = line.strip_prefix("Status: ") {
            fine = value.ends_with(" ok installed");
        } else if let Some(version) = line.strip_prefix("Version: ")
            && fine
        {
            found.insert(name.to_owned(), version.to_owned());
        }
    }
    found
}

fn codename() -> Option<String> {
    let text = fs::read_to_string("/etc/os-release").ok()?;
    let field = |name: &str| {
        text.lines()
            .find_map(|l| l.strip_prefix(name))
            .map(|v| v.trim_matches('"').to_owned())
    };
    (field("ID=")? == "debian").then_some(())?;
    field("VERSION_CODENAME=").filter(|name| matches!(name.as_str(), "bookworm" | "trixie"))
}

fn add_backports(codename: &str, say: &mut dyn FnMut(&str)) -> Result<()> {
    let sources = apt::Sources::read()?;
    let suite = format!("{codename}-backports");
    if sources.mirror_of(&suite).is_some() {
        return Ok(());
    }
    let mirror = sources
        .mirror_of(codename)
        .ok_or_else(|| format!("apt knows no mirror of {codename}"))?;
    say(&format!(
        "adds {suite} to apt's sources in {BACKPORTS_FILE}, because QEMU or libvirt is from there"
    ));
    paths::file(BACKPORTS_FILE, 0o644, format!("deb {mirror} {suite} main\n"))
}

/// Debian's way to keep packages from starting daemons. What was there is put back, also by the next run if this one dies.
struct Policy {
    file: PathBuf,
    saved: PathBuf,
}

const POLICY_TEXT: &str = "#!/bin/sh\n# put here by cargo xtask setup for the time of an installation\nexit 101\n";

impl Default for Policy {
    fn default() -> Self {
        Self {
            file: "/usr/sbin/policy-rc.d".into(),
            saved: "/usr/sbin/policy-rc.d.before-slurm-vm".into(),
        }
    }
}

impl Policy {
    fn put_in_place(&self) -> Result<()> {
        if self.file.exists() {
            fs::rename(&self.file, &self.saved).at("move away", &self.file)?;
        }
        fs::write(&self.file, POLICY_TEXT).at("write", &self.file)?;
        fs::set_permissions(&self.file, fs::Permissions::from_mode(0o755)).at("set the mode of", &self.file)
    }

    fn put_back(&self) -> Result<()> {
        let ours = fs::read_to_string(&self.file).is_ok_and(|text| text == POLICY_TEXT);
        if ours {
            fs::remove_file(&self.file).at("remove", &self.file)?;
        }
        if self.saved.exists() && !self.file.exists() {
            fs::rename(&self.saved, &self.file).at("put back", &self.file)?;
        }
        Ok(())
    }
}

/// For commands that would fail later with a less helpful message.
pub fn check(program: &str) -> Result<()> {
    let found = super::lab::PATH.split(':').any(|dir| Path::new(dir).join(program).exists());
    if found {
        Ok(())
    } else {
        Err(Error::Other(format!(
            "{program} is not installed: `cargo xtask setup` installs what is missing"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::{Policy, parse_status};
    use std::fs;

    #[test]
    fn a_removed_package_with_left_configuration_counts_as_missing() {
        let text = "Package: a\nStatus: install ok installed\nVersion: 1\n\nPackage: b\nStatus: deinstall ok config-files\nVersion: 2\n";
        let found = parse_status(text);
        assert_eq!(found.get("a").map(String::as_str), Some("1"));
        assert!(!found.contains_key("b"));
    }

    #[test]
    fn the_policy_that_was_there_comes_back_even_after_a_crash() {
        let dir = std::env::temp_dir().join(format!("xtask-policy-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a directory");
        let policy = Policy {
            file: dir.join("policy"),
            saved: dir.join("saved"),
        };
        fs::write(&policy.file, "theirs").expect("write");
        policy.put_in_place().expect("in place");
        assert_ne!(fs::read_to_string(&policy.file).expect("read"), "theirs");
        // A second run that found the first one's leavings.
        policy.put_back().expect("back");
        policy.put_back().expect("back again");
        assert_eq!(fs::read_to_string(&policy.file).expect("read"), "theirs");
        fs::remove_dir_all(&dir).expect("clean");
    }
}
