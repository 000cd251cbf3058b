//! `shared_dir`: the directories in it, and what a site gets wrong about it (its owner, an export that takes root for nobody). That is said by
//! `svm health`, instead of by each job that fails.
use std::{
    fs,
    io::{Error, ErrorKind, Result},
    os::unix::fs::MetadataExt,
    path::Path,
};

use nix::unistd::User;

use crate::{config::Config, effects::private};

/// Makes the directories in `shared_dir`, and says why they are of no use to this node's VMs if they are not.
#[must_use]
pub fn trouble(config: &Config) -> Option<String> {
    let shared = config.shared_dir.as_ref()?;
    let user = &config.peer.qemu_user;
    // What is there already is the administrator's.
    let made = if shared.is_dir() {
        Ok(())
    } else {
        private::directory(shared, 0o711)
    };
    let done = made
        .map_err(|e| (shared.clone(), e))
        .and_then(|()| ours(&shared.join("done"), 0o700, user))
        .and_then(|()| ours(&shared.join("overlays"), 0o710, user))
        .and_then(|()| ours(&shared.join("saves"), 0o710, user));
    if let Err((dir, e)) = done {
        return Some(match e.kind() {
            ErrorKind::PermissionDenied => format!(
                "shared_dir: root may not write to {} ({e}); is it exported with root_squash? slurm-vm needs no_root_squash there",
                dir.display()
            ),
            _ => format!("shared_dir: {}: {e}", dir.display()),
        });
    }
    let passed = ["overlays", "saves"].iter().try_for_each(|part| passable(&shared.join(part), user));
    passed.err().map(|e| format!("shared_dir: {e}"))
}

/// Makes a directory with its mode, unless it is there as it should be, for VMs may be using it; and sees whether root can write to it.
fn ours(dir: &Path, mode: u32, user: &str) -> std::result::Result<(), (std::path::PathBuf, Error)> {
    let there = fs::metadata(dir).is_ok_and(|m| m.is_dir() && m.uid() == 0 && m.mode() & 0o7777 == mode);
    let made = match (there, mode) {
        (true, _) => Ok(()),
        (false, 0o710) => private::passage(dir, user),
        (false, _) => private::directory(dir, mode),
    };
    // Each node has a name of its own for it, and a file that stays behind is used again.
    let host = nix::unistd::gethostname().unwrap_or_default();
    let trial = dir.join(format!(".trial-{}", host.to_string_lossy()));
    made.and_then(|()| fs::write(&trial, ""))
        .and_then(|()| fs::remove_file(&trial))
        .map_err(|e| (dir.to_owned(), e))
}

/// Whether a user gets to what is in a directory, by the modes on the way there.
fn passable(dir: &Path, name: &str) -> Result<()> {
    let Some(user) = User::from_name(name)? else { return Ok(()) };
    for part in dir.ancestors() {
        let meta = fs::metadata(part)?;
        let shift = if meta.uid() == user.uid.as_raw() {
            6
        } else if meta.gid() == user.gid.as_raw() {
            3
        } else {
            0
        };
        if !user.uid.is_root() && meta.mode() >> shift & 1 == 0 {
            let mode = meta.mode() & 0o7777;
            return Err(Error::other(format!(
                "QEMU's user {name} cannot pass {} (owner {}, group {}, mode {mode:o})",
                part.display(),
                meta.uid(),
                meta.gid()
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::passable;
    use std::{fs, os::unix::fs::PermissionsExt};

    #[test]
    fn a_directory_that_is_closed_on_the_way_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (closed, inner) = (dir.path().join("closed"), dir.path().join("closed/inner"));
        fs::create_dir_all(&inner).unwrap();
        let mode = |dir: &std::path::Path, mode| fs::set_permissions(dir, fs::Permissions::from_mode(mode)).unwrap();
        mode(dir.path(), 0o755);
        mode(&closed, 0o750);
        // Whoever runs the tests owns what they make: a user that owns nothing of it is `nobody`.
        let said = passable(&inner, "nobody").unwrap_err().to_string();
        assert!(said.contains("closed (owner") && said.contains("mode 750"), "{said}");
        mode(&closed, 0o751);
        assert!(passable(&inner, "nobody").is_ok());
    }
}
