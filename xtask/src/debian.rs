//! A tree of a Debian release, made by mmdebstrap from the machine's own mirror.

use crate::{Result, apt, error::At, lab::tail, setup};
use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    process::{Command, Stdio},
};

/// Units that wake up at a bad moment, in any guest or machine of a test.
pub const TIMERS: [&str; 6] = [
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
];

/// Keeps these units, and [`TIMERS`], from ever starting in a tree.
pub fn mask(tree: &Path, units: &[&str]) -> Result<()> {
    for unit in TIMERS.iter().chain(units) {
        let link = tree.join("etc/systemd/system").join(unit);
        let _ = fs::remove_file(&link);
        symlink("/dev/null", &link).at("link", &link)?;
    }
    Ok(())
}

/// A tree to be made.
#[derive(Debug)]
pub struct Tree<'a> {
    /// The release by its name: `bookworm`.
    pub suite: &'a str,
    /// Packages beside the smallest system, separated by commas.
    pub packages: &'a str,
    /// More of mmdebstrap's options.
    pub options: Vec<String>,
    /// Suites of the mirror beside the release: `bookworm-backports`.
    pub more_suites: Vec<String>,
}

/// Makes the tree; what mmdebstrap says goes to the file of its name with `.log`.
pub fn make(what: &Tree<'_>, tree: &Path) -> Result<()> {
    setup::check("mmdebstrap")?;
    let mirror = apt::debian_mirror()?;
    if tree.exists() {
        fs::remove_dir_all(tree).at("remove", tree)?;
    }
    let log = tree.with_extension("log");
    let out = fs::File::create(&log).at("create", &log)?;
    let err = out.try_clone().at("open", &log)?;
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--mode=root", "--variant=minbase", "--include", what.packages])
        .args(["--aptopt=APT::Install-Recommends \"false\""])
        .arg(format!("--aptopt=Acquire::Check-Valid-Until \"{}\"", apt::check_dates()))
        .args(["doc", "man", "locale"].map(|part| format!("--dpkgopt=path-exclude=/usr/share/{part}/*")))
        .args(&what.options)
        .arg(what.suite)
        .arg(tree);
    if what.more_suites.is_empty() {
        command.arg(&mirror);
    } else {
        let suites = std::iter::once(what.suite).chain(what.more_suites.iter().map(String::as_str));
        command.args(suites.map(|suite| format!("deb {mirror} {suite} main")));
    }
    let status = command
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .status()
        .at("run", "mmdebstrap")?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("mmdebstrap failed ({status}): {}", tail(&log, 6)).into())
    }
}
