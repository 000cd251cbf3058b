//! Small files and directories beside the ledger: markers, records of ended scripts. Behind a trait like everything
//! outside the process; [`MemoryFiles`] is the fake.
use std::{
    collections::BTreeMap,
    fmt, fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::trusted::{self, Distrust};

/// Small files. Calls block for as long as the file system does.
pub trait Files: Send + Sync + fmt::Debug {
    /// A whole file.
    ///
    /// # Errors
    /// Those of the file system, `NotFound` among them.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;
    /// A whole file that is believed because only root can have written it.
    ///
    /// # Errors
    /// [`Distrust`]; none there is one of them.
    fn read_trusted(&self, path: &Path) -> Result<Vec<u8>, Distrust>;
    /// Whether what stands in a directory can be believed.
    ///
    /// # Errors
    /// [`Distrust`]
    fn trusted(&self, dir: &Path) -> Result<(), Distrust>;
    /// Writes a file so that a reader sees the old or the new one, also after a power cut; makes the directories above it, for root
    /// alone.
    ///
    /// # Errors
    /// Those of the file system.
    fn write_durably(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;
    /// Makes a file that says all by being there.
    ///
    /// # Errors
    /// Those of the file system.
    fn touch(&self, path: &Path) -> io::Result<()>;
    /// Removes a file; none there is no error.
    ///
    /// # Errors
    /// Those of the file system.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// What is in a directory, in no order; nothing when there is none.
    ///
    /// # Errors
    /// Those of the file system.
    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>>;
}

/// The real ones.
#[derive(Debug, Default)]
pub struct SystemFiles;

fn unless_absent<T: Default>(done: io::Result<T>) -> io::Result<T> {
    done.or_else(|e| {
        if e.kind() == io::ErrorKind::NotFound {
            Ok(T::default())
        } else {
            Err(e)
        }
    })
}

impl Files for SystemFiles {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        fs::read(path)
    }

    fn read_trusted(&self, path: &Path) -> Result<Vec<u8>, Distrust> {
        trusted::read(path)
    }

    fn trusted(&self, dir: &Path) -> Result<(), Distrust> {
        trusted::directory(dir)
    }

    fn write_durably(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        if let Some(dir) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        super::store::write_durably(path, bytes)
    }

    fn touch(&self, path: &Path) -> io::Result<()> {
        fs::write(path, b"")
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        unless_absent(fs::remove_file(path))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        unless_absent(fs::read_dir(dir).and_then(|entries| entries.map(|e| Ok(e?.path())).collect()))
    }
}

/// Files in memory, for tests.
#[derive(Debug, Default)]
pub struct MemoryFiles {
    files: Mutex<BTreeMap<PathBuf, Vec<u8>>>,
}

impl MemoryFiles {
    fn files(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Vec<u8>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Files for MemoryFiles {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.files().get(path).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn read_trusted(&self, path: &Path) -> Result<Vec<u8>, Distrust> {
        self.read(path).map_err(|source| Distrust::Io { path: path.into(), source })
    }

    fn trusted(&self, _: &Path) -> Result<(), Distrust> {
        Ok(())
    }

    fn write_durably(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.files().insert(path.into(), bytes.into());
        Ok(())
    }

    fn touch(&self, path: &Path) -> io::Result<()> {
        self.write_durably(path, b"")
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.files().remove(path);
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        Ok(self.files().keys().filter(|p| p.parent() == Some(dir)).cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn a_file_is_there_until_it_is_removed(files: &dyn Files, dir: &Path) {
        let (done, marker) = (dir.join("done/7.json"), dir.join("7"));
        assert_eq!(files.read(&done).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(files.list(&dir.join("done")).unwrap(), Vec::<PathBuf>::new());
        files.remove(&done).unwrap();
        files.write_durably(&done, b"old").unwrap();
        files.write_durably(&done, b"new").unwrap();
        files.touch(&marker).unwrap();
        assert_eq!(files.read(&done).unwrap(), b"new");
        assert_eq!(files.read(&marker).unwrap(), b"");
        assert_eq!(files.list(&dir.join("done")).unwrap(), std::slice::from_ref(&done));
        files.remove(&done).unwrap();
        assert!(files.read(&done).is_err());
    }

    #[test]
    fn real_files_and_the_fake_behave_alike() {
        let dir = tempfile::tempdir().unwrap();
        a_file_is_there_until_it_is_removed(&SystemFiles, dir.path());
        a_file_is_there_until_it_is_removed(&MemoryFiles::default(), dir.path());
    }
}
