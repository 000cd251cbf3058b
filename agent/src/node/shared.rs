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

/// What the last look at `shared_dir` has found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Look {
    /// Why it is of no use to this node's VMs, if it is not.
    pub trouble: Option<String>,
    /// Which storage it is: the same on all nodes that have the same one, whatever its path is ([`ID`]).
    pub storage: Option<String>,
}

/// File in `shared_dir` that tells one storage from another: a mount point without its mount is a directory as well, and a save or an overlay
/// that is made there is found by no other node.
const ID: &str = ".storage-id";

/// Looks at `shared_dir`. May last as long as a file server is away.
#[must_use]
pub fn look(config: &Config) -> Look {
    let trouble = trouble(config);
    let storage = match (&trouble, &config.shared_dir) {
        (None, Some(shared)) => identity(shared, &config.node()),
        _ => return Look { trouble, storage: None },
    };
    match storage {
        Ok(id) => Look {
            trouble,
            storage: Some(id),
        },
        Err(e) => Look {
            trouble: Some(format!("shared_dir: {ID}: {e}")),
            storage: None,
        },
    }
}

/// The storage's id: Unix milliseconds at which it was first used, and the node that did so. Of several nodes that come first one gives it.
fn identity(shared: &Path, node: &str) -> Result<String> {
    let (id, mine) = (shared.join(ID), shared.join(format!("{ID}-{node}")));
    match fs::read_to_string(&id) {
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        read => return read.map(|text| text.trim().to_owned()),
    }
    let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_millis();
    fs::write(&mine, format!("{now}-{node}\n"))?;
    // Unlike a rename it fails where there is one already.
    let given = fs::hard_link(&mine, &id);
    let _ = fs::remove_file(&mine);
    match given {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => Err(e),
        _ => fs::read_to_string(&id).map(|text| text.trim().to_owned()),
    }
}

/// Makes the directories in `shared_dir`, and says why they are of no use to this node's VMs if they are not.
#[must_use]
fn trouble(config: &Config) -> Option<String> {
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
    use super::{identity, passable};
    use std::{fs, os::unix::fs::PermissionsExt};

    #[test]
    fn a_storage_has_one_id_whoever_looks_and_another_storage_another() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let first = identity(one.path(), "n1").unwrap();
        assert!(first.ends_with("-n1"), "{first}");
        assert_eq!(identity(one.path(), "n2").unwrap(), first);
        assert_ne!(identity(other.path(), "n2").unwrap(), first);
        assert_eq!(fs::read_dir(one.path()).unwrap().count(), 1, "nothing else stays behind");
    }

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
