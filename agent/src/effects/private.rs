//! Who may reach what the agent keeps for a VM, beside root.
//!
//! | what | owner, mode | why |
//! |---|---|---|
//! | directory of a VM's sockets | QEMU's user, 0700 | QEMU makes the guest's socket there; whoever reaches it speaks for the agent |
//! | overlays, saved or not | QEMU's user, 0600 | a user's data |
//! | directories above overlays and saves | root, group of QEMU's user, 0710 | to pass by name, not to list, never to write: the ledger is there, too |
//! | ledger, journals, kept output, `done/` | root, 0600 in 0711 and 0700 | |
//!
//! QEMU's user may be in groups that sites put people into (`kvm`), so a group never gets more than a passage.
use std::{
    fs::{self, DirBuilder, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt, chown},
    path::Path,
};

use nix::unistd::User;

/// QEMU's user.
///
/// # Errors
/// When the host does not know it: then nothing can be kept for it alone.
pub fn qemu(name: &str) -> io::Result<User> {
    User::from_name(name)?.ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            format!("there is no user {name} on this host: peer.qemu_user is to be whom libvirt runs QEMU as"),
        )
    })
}

/// Makes a directory with this mode, whatever the umask; one that is there gets it.
///
/// # Errors
/// Those of the file system.
pub fn directory(dir: &Path, mode: u32) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(mode).create(dir)?;
    fs::set_permissions(dir, Permissions::from_mode(mode))
}

/// Makes the directory of a VM's sockets: QEMU's alone.
///
/// # Errors
/// Those of the file system; no such user.
pub fn sockets(dir: &Path, qemu_user: &str) -> io::Result<()> {
    directory(dir, 0o700)?;
    let user = qemu(qemu_user)?;
    chown(dir, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
}

/// Makes a directory that only root may list and write, and QEMU's user may pass.
///
/// # Errors
/// Those of the file system; no such user.
pub fn passage(dir: &Path, qemu_user: &str) -> io::Result<()> {
    // Nobody's before it is the right group's.
    directory(dir, 0o700)?;
    chown(dir, None, Some(qemu(qemu_user)?.gid.as_raw()))?;
    fs::set_permissions(dir, Permissions::from_mode(0o710))
}

/// Gives a file to QEMU's user alone. Its directory must be root's.
///
/// # Errors
/// Those of the file system; no such user.
pub fn give(file: &Path, qemu_user: &str) -> io::Result<()> {
    fs::set_permissions(file, Permissions::from_mode(0o600))?;
    let user = qemu(qemu_user)?;
    chown(file, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn nobody_but_root_and_qemus_user_reaches_sockets_and_overlays() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let daemon = qemu("daemon").unwrap();
        let (uid, gid) = (daemon.uid.as_raw(), daemon.gid.as_raw());
        let of = |path: &Path| fs::metadata(path).map(|m| (m.uid(), m.gid(), m.mode() & 0o7777)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (run, saves, overlay) = (
            dir.path().join("vm/slurm-7-0"),
            dir.path().join("saves"),
            dir.path().join("overlay"),
        );
        // What an earlier version made.
        fs::create_dir_all(&run).unwrap();
        fs::set_permissions(&run, Permissions::from_mode(0o755)).unwrap();
        fs::write(&overlay, "").unwrap();
        fs::set_permissions(&overlay, Permissions::from_mode(0o644)).unwrap();
        for _ in 0..2 {
            sockets(&run, "daemon").unwrap();
            assert_eq!(of(&run), (uid, gid, 0o700));
            passage(&saves, "daemon").unwrap();
            assert_eq!(of(&saves), (0, gid, 0o710));
            give(&overlay, "daemon").unwrap();
            assert_eq!(of(&overlay), (uid, gid, 0o600));
        }
        let why = sockets(&run, "no-such-user").unwrap_err().to_string();
        assert!(why.contains("no-such-user") && why.contains("qemu_user"), "{why}");
    }
}
