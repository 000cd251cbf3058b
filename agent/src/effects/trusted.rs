//! Files that are believed because only root can have written them: what a node left on shared storage for the others.
//!
//! The whole way to such a file must be root's (or the agent's own) and writable by nobody else, from `/` on. Each step is opened
//! once, without following links, and looked at through its descriptor; the file is read from the descriptor that was looked at. A
//! directory that all may write but in which nobody can replace another's entry (the sticky bit, `/tmp`) is good enough on the way.
use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open, openat},
    sys::stat::{FileStat, Mode, fstat},
};
use thiserror::Error;

/// Why a file or directory is not believed.
#[derive(Debug, Error)]
pub enum Distrust {
    /// It is somebody else's. Behind `root_squash` everything is.
    #[error(
        "{path} belongs to uid {uid}, not to root: nothing there is believed; export it to the nodes with no_root_squash, or name another shared_dir"
    )]
    Owner {
        /// What.
        path: PathBuf,
        /// Whose.
        uid: u32,
    },
    /// Others can write it.
    #[error("{path} has mode {mode:04o}, others than root can write it: nothing there is believed; chmod go-w {path}")]
    Mode {
        /// What.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// It is a link, a pipe or a device where none should be.
    #[error("{path} is no regular file")]
    Kind {
        /// What.
        path: PathBuf,
    },
    /// It could not be looked at.
    #[error("{path}: {source}")]
    Io {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Distrust {
    fn io(path: &Path, error: impl Into<io::Error>) -> Self {
        Self::Io {
            path: path.into(),
            source: error.into(),
        }
    }

    /// There is no such file or directory: nothing wrong with it.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// Into the log, once for each text: these are found again every half minute.
    pub fn complain(&self) {
        static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
        let text = self.to_string();
        let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
        // Names of entries may be of others' choice, as many as they like.
        if !self.is_absent() && said.len() < 64 && said.insert(text.clone()) {
            log::error!("{text}");
        }
    }
}

/// What of a file decides: pure.
fn judge(path: &Path, found: &FileStat, me: u32, on_the_way: bool) -> Result<(), Distrust> {
    if found.st_uid != 0 && found.st_uid != me {
        return Err(Distrust::Owner {
            path: path.into(),
            uid: found.st_uid,
        });
    }
    let sticky = on_the_way && found.st_mode & 0o1000 != 0;
    if found.st_mode & 0o022 != 0 && !sticky {
        return Err(Distrust::Mode {
            path: path.into(),
            mode: found.st_mode & 0o7777,
        });
    }
    Ok(())
}

/// Opens a directory, step by step from `/`.
fn walk(dir: &Path) -> Result<OwnedFd, Distrust> {
    let me = nix::unistd::geteuid().as_raw();
    // Links on the way are an administrator's if what they stand in is; all of that is on the real way, too, or they lead elsewhere.
    let real = std::fs::canonicalize(dir).map_err(|e| Distrust::io(dir, e))?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut path = PathBuf::from("/");
    let mut at = open("/", flags, Mode::empty()).map_err(|e| Distrust::io(&path, e))?;
    let look = |at: &OwnedFd, path: &Path, last: bool| {
        let found = fstat(at).map_err(|e| Distrust::io(path, e))?;
        judge(path, &found, me, !last)
    };
    let steps: Vec<_> = real.components().filter(|c| matches!(c, Component::Normal(_))).collect();
    look(&at, &path, steps.is_empty())?;
    for (i, step) in steps.iter().enumerate() {
        path.push(step);
        at = openat(&at, step.as_os_str(), flags, Mode::empty()).map_err(|e| Distrust::io(&path, e))?;
        look(&at, &path, i + 1 == steps.len())?;
    }
    Ok(at)
}

/// Whether what stands in a directory can be believed.
///
/// # Errors
/// [`Distrust`], which names what is wrong and what helps.
pub fn directory(dir: &Path) -> Result<(), Distrust> {
    walk(dir).map(drop)
}

/// Reads a file that only root can have written.
///
/// # Errors
/// [`Distrust`]
pub fn read(path: &Path) -> Result<Vec<u8>, Distrust> {
    let name = path.file_name().ok_or_else(|| Distrust::Kind { path: path.into() })?;
    let dir = walk(path.parent().unwrap_or(Path::new("/")))?;
    // A pipe must not make us wait.
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let fd = openat(&dir, name, flags, Mode::empty()).map_err(|e| match e {
        Errno::ELOOP => Distrust::Kind { path: path.into() },
        e => Distrust::io(path, e),
    })?;
    let found = fstat(&fd).map_err(|e| Distrust::io(path, e))?;
    if found.st_mode & libc::S_IFMT != libc::S_IFREG {
        return Err(Distrust::Kind { path: path.into() });
    }
    judge(path, &found, nix::unistd::geteuid().as_raw(), false)?;
    let mut bytes = Vec::new();
    File::from(fd).read_to_end(&mut bytes).map_err(|e| Distrust::io(path, e))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt, chown, symlink},
    };

    use super::*;

    fn place() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let saves = dir.path().join("saves");
        fs::create_dir(&saves).unwrap();
        fs::write(saves.join("manifest"), "root's").unwrap();
        chmod(&saves.join("manifest"), 0o600);
        chmod(&saves, 0o710);
        (dir, saves)
    }

    fn chmod(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn why(path: &Path) -> String {
        read(path).unwrap_err().to_string()
    }

    #[test]
    fn a_file_that_only_root_can_have_written_is_read() {
        let (_dir, saves) = place();
        assert_eq!(read(&saves.join("manifest")).unwrap(), b"root's");
        assert!(directory(&saves).is_ok());
        assert!(read(&saves.join("other")).unwrap_err().is_absent());
    }

    #[test]
    fn what_another_user_owns_or_could_have_put_there_is_not_believed() {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let (dir, saves) = place();
        let manifest = saves.join("manifest");
        chown(&manifest, Some(2001), None).unwrap();
        assert!(why(&manifest).contains("belongs to uid 2001"), "{}", why(&manifest));
        chown(&manifest, Some(0), None).unwrap();
        chmod(&manifest, 0o620);
        assert!(why(&manifest).contains("mode 0620"), "{}", why(&manifest));
        chmod(&manifest, 0o600);
        // Anywhere on the way; a sticky directory only above the last.
        for (dir, mode) in [(&saves, 0o730), (&saves, 0o1777), (&dir.path().to_owned(), 0o757)] {
            chmod(dir, mode);
            assert!(why(&manifest).contains("others than root can write it"), "{}", why(&manifest));
            assert!(directory(&saves).is_err());
            chmod(dir, 0o755);
        }
        chmod(dir.path(), 0o1777);
        assert!(read(&manifest).is_ok());
        // As root_squash shows everything that root writes.
        chown(&saves, Some(65534), Some(65534)).unwrap();
        assert!(why(&manifest).contains("no_root_squash") && why(&manifest).contains(&saves.display().to_string()));
        chown(&saves, Some(0), Some(0)).unwrap();
        fs::rename(&manifest, saves.join("real")).unwrap();
        symlink(saves.join("real"), &manifest).unwrap();
        assert!(why(&manifest).contains("no regular file"), "{}", why(&manifest));
        fs::remove_file(&manifest).unwrap();
        nix::unistd::mkfifo(&manifest, Mode::from_bits_truncate(0o600)).unwrap();
        assert!(why(&manifest).contains("no regular file"), "{}", why(&manifest));
    }
}
