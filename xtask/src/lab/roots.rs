//! The trees below the hosts' overlays: the machine itself, or another Debian release made once by mmdebstrap and kept.

use super::options::Slurm;
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
    let fresh = root.with_extension("new");
    println!(
        "makes a root of Debian {suite} for Slurm {slurm} in {}, once; this takes minutes, see {}",
        root.display(),
        fresh.with_extension("log").display()
    );
    let what = Tree {
        suite,
        packages: PACKAGES,
        options: Vec::new(),
        more_suites: Vec::new(),
    };
    debian::make(&what, &fresh)?;
    fs::rename(&fresh, &root).at("move into place", &root)
}
