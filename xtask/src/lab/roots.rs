//! The trees below the hosts' overlays: the machine itself, or another Debian release made once by mmdebstrap and kept.

use super::options::Slurm;
use crate::{Result, apt, error::At, paths, proc, setup};
use nix::fcntl::{Flock, FlockArg};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

const PACKAGES: &str = "slurmctld,slurmd,slurm-client,slurm-wlm-basic-plugins,munge,libvirt-daemon-system,libvirt-daemon-driver-qemu,\
    libvirt-clients,qemu-system-x86,qemu-utils,iproute2,procps,passwd,kmod";
/// Daemons that a host starts from its root.
const DAEMONS: [&str; 4] = ["slurmctld", "slurmd", "munged", "libvirtd"];

/// The Debian release that has a Slurm release.
fn suite(slurm: Slurm) -> Option<&'static str> {
    match slurm {
        Slurm::Native => None,
        Slurm::V2205 => Some("bookworm"),
        Slurm::V2411 => Some("trixie"),
        Slurm::V2605 => Some("sid"),
    }
}

/// The tree for a Slurm release: the machine's own if it has that release.
pub fn lower(slurm: Slurm) -> PathBuf {
    match suite(slurm) {
        Some(suite) if !native(slurm) => paths::lab_roots().join(suite),
        _ => PathBuf::from("/"),
    }
}

fn native(slurm: Slurm) -> bool {
    proc::run("slurmd", &["-V"]).is_ok_and(|version| version.contains(&format!(" {slurm}")))
}

/// Makes that tree if it is not there.
pub fn make(slurm: Slurm) -> Result<()> {
    let root = lower(slurm);
    let Some(suite) = suite(slurm).filter(|_| root != Path::new("/")) else {
        return DAEMONS.iter().chain(&["ip"]).try_for_each(|program| setup::check(program));
    };
    setup::check("ip")?;
    setup::check("mmdebstrap")?;
    let roots = paths::lab_roots();
    paths::dir(&roots, 0o755)?;
    let lock = roots.join("lock");
    let file = fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&lock)
        .at("open", &lock)?;
    let _lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| e).at("lock", &lock)?;
    if root.exists() {
        return Ok(());
    }
    let sources = apt::Sources::read()?;
    let mirror = sources
        .debian()
        .ok_or("apt knows no mirror of Debian on this machine: add one to its sources")?;
    let fresh = root.with_extension("new");
    if fresh.exists() {
        fs::remove_dir_all(&fresh).at("remove", &fresh)?;
    }
    let log = root.with_extension("log");
    println!(
        "makes a root of Debian {suite} for Slurm {slurm} in {}, once; this takes minutes, see {}",
        root.display(),
        log.display()
    );
    let out = fs::File::create(&log).at("create", &log)?;
    let err = out.try_clone().at("open", &log)?;
    let status = Command::new("mmdebstrap")
        .args(["--mode=root", "--variant=minbase", "--include", PACKAGES])
        .args(["--aptopt=APT::Install-Recommends \"false\""])
        .arg(format!("--aptopt=Acquire::Check-Valid-Until \"{}\"", apt::check_dates()))
        .args(["doc", "man", "locale"].map(|part| format!("--dpkgopt=path-exclude=/usr/share/{part}/*")))
        .arg(suite)
        .arg(&fresh)
        .arg(mirror)
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .status()
        .at("run", "mmdebstrap")?;
    if !status.success() {
        return Err(format!("mmdebstrap failed ({status}): {}", super::tail(&log, 6)).into());
    }
    fs::rename(&fresh, &root).at("move into place", &root)
}
