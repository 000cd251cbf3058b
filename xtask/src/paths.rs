//! Where things are: the project, the build, and the places a lab uses on the host.

use crate::{Result, error::At};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// State of running labs: one directory per lab, gone with it.
pub const LAB_STATE: &str = "/run/slurm-vm-lab";
/// Disks and logs of running labs: one directory per lab, gone with it.
pub const LAB_DISKS: &str = "/var/tmp/slurm-vm-lab";
/// What is made once and kept.
pub const LAB_CACHE: &str = "/var/cache/slurm-vm-lab";
/// Root trees of other Debian releases, kept between labs. `SLURM_VM_LAB_ROOTS` names another directory.
const LAB_ROOTS: &str = "/var/cache/slurm-vm-lab/roots";

/// Where the root trees of other Debian releases are.
pub fn lab_roots() -> PathBuf {
    std::env::var_os("SLURM_VM_LAB_ROOTS").map_or_else(|| PathBuf::from(LAB_ROOTS), PathBuf::from)
}

/// A kernel for the image, unpacked and not installed: the machine is not to boot it.
pub const KERNEL: &str = "/var/cache/slurm-vm-lab/kernel";

/// The top of the source tree this xtask was built from.
pub fn project() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// Cargo's target directory.
pub fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => project().join(dir),
        None => project().join("target"),
    }
}

/// The xtask program: this process if it is one, else the one the build left in the target directory (a test process is not xtask).
pub fn xtask() -> Result<PathBuf> {
    let me = std::env::current_exe().at("find", "/proc/self/exe")?;
    if me.file_name().is_some_and(|name| name == "xtask") {
        return Ok(me);
    }
    let built = target().join("debug/xtask");
    if built.exists() {
        return Ok(built);
    }
    Err(format!("{} is not there: run `cargo build -p xtask` first", built.display()).into())
}

/// `mkdir -p` with a mode for the last component, whatever the umask is.
pub fn dir(path: impl AsRef<Path>, mode: u32) -> Result<()> {
    let path = path.as_ref();
    fs::create_dir_all(path).at("create", path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).at("set the mode of", path)
}

/// Writes a file with a mode, making its directory when it is missing.
pub fn file(path: impl AsRef<Path>, mode: u32, text: impl AsRef<[u8]>) -> Result<()> {
    let path = path.as_ref();
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).at("create", parent)?;
    }
    fs::write(path, text).at("write", path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).at("set the mode of", path)
}
