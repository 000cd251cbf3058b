//! Files and directories beside the ledger: markers, records of ended scripts, saves, directories of sockets. Behind a trait like everything
//! outside the process; [`MemoryFiles`] is the fake.
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{
    private,
    trusted::{self, Distrust},
};

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
    /// Whether there is a file or directory of that name. Not being able to look counts as none.
    fn is_there(&self, path: &Path) -> bool;
    /// Gives a file another name on the same file system, in the place of whatever had it; a power cut does not undo it. Of two who rename
    /// the same file one succeeds.
    ///
    /// # Errors
    /// Those of the file system. `NotFound`: nothing was renamed. After others it may have been.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// What others have written into a file outlasts a power cut from now on.
    ///
    /// # Errors
    /// Those of the file system.
    fn sync(&self, file: &Path) -> io::Result<()>;
    /// Removes a directory with all that is in it; none there is no error.
    ///
    /// # Errors
    /// Those of the file system.
    fn remove_all(&self, dir: &Path) -> io::Result<()>;
    /// Makes a directory for somebody; one that is there is given the owner and mode that it is to have.
    ///
    /// # Errors
    /// Those of the file system; no such user.
    fn make_directory(&self, dir: &Path, whose: Directory<'_>) -> io::Result<()>;
    /// Gives a file to QEMU's user alone.
    ///
    /// # Errors
    /// Those of the file system; no such user.
    fn give(&self, file: &Path, qemu_user: &str) -> io::Result<()>;
}

/// Who may reach what is in a directory ([`super::private`] has the whole table).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Directory<'a> {
    /// Root's, of this mode.
    Root(u32),
    /// QEMU's user's alone: a VM's sockets.
    Sockets(&'a str),
    /// Only root lists and writes it, and QEMU's user may pass.
    Passage(&'a str),
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

    fn is_there(&self, path: &Path) -> bool {
        path.exists()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)?;
        let (old, new) = (from.parent(), to.parent());
        for dir in new.into_iter().chain(old.filter(|o| Some(*o) != new)) {
            self.sync(dir)?;
        }
        Ok(())
    }

    fn sync(&self, file: &Path) -> io::Result<()> {
        fs::File::open(file)?.sync_all()
    }

    fn remove_all(&self, dir: &Path) -> io::Result<()> {
        unless_absent(fs::remove_dir_all(dir))
    }

    fn make_directory(&self, dir: &Path, whose: Directory<'_>) -> io::Result<()> {
        match whose {
            Directory::Root(mode) => private::directory(dir, mode),
            Directory::Sockets(user) => private::sockets(dir, user),
            Directory::Passage(user) => private::passage(dir, user),
        }
    }

    fn give(&self, file: &Path, qemu_user: &str) -> io::Result<()> {
        private::give(file, qemu_user)
    }
}

/// What a power cut of one node would undo: these files get back what they had.
#[derive(Debug)]
struct Undo {
    node: String,
    before: Vec<(PathBuf, Option<Vec<u8>>)>,
}

#[derive(Debug, Default)]
struct Held {
    files: BTreeMap<PathBuf, Vec<u8>>,
    directories: BTreeSet<PathBuf>,
    /// Nodes whose agent is to be killed after so many more calls.
    killed_after: BTreeMap<String, u32>,
    /// Oldest first.
    unsynced: Vec<Undo>,
}

impl Held {
    /// What the file holds now outlasts a power cut.
    fn synced(&mut self, file: &Path) {
        self.unsynced.iter_mut().for_each(|u| u.before.retain(|(path, _)| path != file));
        self.unsynced.retain(|u| !u.before.is_empty());
    }
}

/// With what a thread unwinds whose agent was killed by [`Storage::kill_after`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Killed;

/// Storage in memory, which several nodes may share. Clones are the same storage.
#[derive(Debug, Clone, Default)]
pub struct Storage(Arc<Mutex<Held>>);

impl Storage {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The storage as a node has it.
    #[must_use]
    pub fn on(&self, node: &str) -> MemoryFiles {
        MemoryFiles {
            storage: self.clone(),
            node: node.into(),
        }
    }

    /// The node loses power: what it wrote and did not sync is as it was before.
    pub fn power_off(&self, node: &str) {
        let mut held = self.lock();
        let unsynced = std::mem::take(&mut held.unsynced);
        let (lost, kept) = unsynced.into_iter().partition(|u: &Undo| u.node == node);
        held.unsynced = kept;
        let lost: Vec<Undo> = lost;
        for (path, before) in lost.into_iter().rev().flat_map(|u| u.before) {
            match before {
                Some(bytes) => held.files.insert(path, bytes),
                None => held.files.remove(&path),
            };
        }
    }

    /// The node's agent is killed before the call after so many more: the calling thread unwinds with [`Killed`], and the call is not made.
    pub fn kill_after(&self, node: &str, calls: u32) {
        self.lock().killed_after.insert(node.into(), calls);
    }

    /// The node's agent is not to be killed after all.
    pub fn spare(&self, node: &str) {
        self.lock().killed_after.remove(node);
    }

    /// Whether there is a file of that name.
    #[must_use]
    pub fn has(&self, path: &Path) -> bool {
        self.lock().files.contains_key(path)
    }

    /// All files, for the test's own eyes.
    #[must_use]
    pub fn paths(&self) -> Vec<PathBuf> {
        self.lock().files.keys().cloned().collect()
    }
}

/// Files in memory, for tests: a node's view of a [`Storage`].
#[derive(Debug, Clone, Default)]
pub struct MemoryFiles {
    storage: Storage,
    node: String,
}

impl MemoryFiles {
    /// The storage for one call.
    fn held(&self) -> MutexGuard<'_, Held> {
        let mut held = self.storage.lock();
        if let Some(calls) = held.killed_after.get_mut(&self.node) {
            let Some(left) = calls.checked_sub(1) else {
                held.killed_after.remove(&self.node);
                drop(held);
                // No panic: nothing is wrong, and nothing is said.
                std::panic::resume_unwind(Box::new(Killed));
            };
            *calls = left;
        }
        held
    }

    /// Writes a file as others do, QEMU and libvirt: nothing is synced.
    pub fn write(&self, path: &Path, bytes: &[u8]) {
        let mut held = self.storage.lock();
        let before = held.files.insert(path.into(), bytes.into());
        held.unsynced.push(Undo {
            node: self.node.clone(),
            before: vec![(path.into(), before)],
        });
    }
}

impl Files for MemoryFiles {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.held().files.get(path).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn read_trusted(&self, path: &Path) -> Result<Vec<u8>, Distrust> {
        self.read(path).map_err(|source| Distrust::Io { path: path.into(), source })
    }

    fn trusted(&self, _: &Path) -> Result<(), Distrust> {
        Ok(())
    }

    fn write_durably(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut held = self.held();
        held.files.insert(path.into(), bytes.into());
        held.synced(path);
        Ok(())
    }

    fn touch(&self, path: &Path) -> io::Result<()> {
        self.write(path, b"");
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut held = self.held();
        held.files.remove(path);
        held.synced(path);
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let held = self.held();
        let below = held.files.keys().chain(&held.directories);
        let entry = |path: &PathBuf| Some(dir.join(path.strip_prefix(dir).ok()?.components().next()?));
        let entries: BTreeSet<PathBuf> = below.filter_map(entry).collect();
        Ok(entries.into_iter().collect())
    }

    fn is_there(&self, path: &Path) -> bool {
        let held = self.held();
        let mut all = held.files.keys().chain(&held.directories);
        all.any(|p| p.starts_with(path))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut held = self.held();
        let bytes = held.files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        held.files.insert(to.into(), bytes);
        // What is unsynced of the file stays so under its new name.
        for undo in &mut held.unsynced {
            undo.before.retain(|(path, _)| path != to);
            for (path, before) in &mut undo.before {
                if path == from {
                    (*path, *before) = (to.into(), None);
                }
            }
        }
        Ok(())
    }

    fn sync(&self, file: &Path) -> io::Result<()> {
        self.held().synced(file);
        Ok(())
    }

    fn remove_all(&self, dir: &Path) -> io::Result<()> {
        let mut held = self.held();
        held.files.retain(|path, _| !path.starts_with(dir));
        held.directories.retain(|path| !path.starts_with(dir));
        held.unsynced
            .iter_mut()
            .for_each(|u| u.before.retain(|(path, _)| !path.starts_with(dir)));
        Ok(())
    }

    fn make_directory(&self, dir: &Path, _: Directory<'_>) -> io::Result<()> {
        self.held().directories.insert(dir.into());
        Ok(())
    }

    fn give(&self, file: &Path, _: &str) -> io::Result<()> {
        self.read(file).map(drop)
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

    fn a_directory_is_listed_and_removed_with_what_is_in_it(files: &dyn Files, dir: &Path) {
        let (saves, save) = (dir.join("saves"), dir.join("saves/a"));
        assert!(!files.is_there(&saves));
        files.make_directory(&save, Directory::Root(0o700)).unwrap();
        assert!(files.is_there(&save) && files.is_there(&saves));
        files.write_durably(&save.join("x"), b"1").unwrap();
        assert_eq!(files.list(&saves).unwrap(), std::slice::from_ref(&save));
        assert_eq!(files.list(&save).unwrap(), [save.join("x")]);
        files.sync(&save.join("x")).unwrap();
        files.rename(&save.join("x"), &save.join("y")).unwrap();
        assert!(!files.is_there(&save.join("x")));
        assert_eq!(files.read(&save.join("y")).unwrap(), b"1");
        let again = files.rename(&save.join("x"), &save.join("z")).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::NotFound);
        files.remove_all(&save).unwrap();
        files.remove_all(&save).unwrap();
        assert!(!files.is_there(&save) && files.list(&save).unwrap().is_empty());
    }

    #[test]
    fn real_files_and_the_fake_behave_alike() {
        let dir = tempfile::tempdir().unwrap();
        a_file_is_there_until_it_is_removed(&SystemFiles, dir.path());
        a_file_is_there_until_it_is_removed(&MemoryFiles::default(), dir.path());
        a_directory_is_listed_and_removed_with_what_is_in_it(&SystemFiles, dir.path());
        a_directory_is_listed_and_removed_with_what_is_in_it(&MemoryFiles::default(), dir.path());
    }

    #[test]
    fn an_agent_is_killed_between_two_calls() {
        let storage = Storage::default();
        let files = storage.on("n1");
        storage.kill_after("n1", 1);
        let killed = std::panic::catch_unwind(|| {
            files.write_durably(Path::new("/a"), b"1").unwrap();
            files.write_durably(Path::new("/b"), b"2").unwrap();
        });
        assert_eq!(killed.unwrap_err().downcast_ref(), Some(&Killed));
        assert_eq!(storage.paths(), [PathBuf::from("/a")]);
        files.write_durably(Path::new("/b"), b"2").unwrap();
    }

    #[test]
    fn a_power_cut_of_a_node_undoes_what_it_has_not_synced_and_nothing_else() {
        let storage = Storage::default();
        let [n1, n2] = ["n1", "n2"].map(|n| storage.on(n));
        let path = |name: &str| PathBuf::from("/shared").join(name);
        n1.write_durably(&path("a"), b"old").unwrap();
        n1.write(&path("a"), b"new");
        n1.write(&path("b"), b"lost");
        n1.write(&path("c"), b"kept");
        n1.sync(&path("c")).unwrap();
        n1.rename(&path("c"), &path("d")).unwrap();
        n1.write(&path("e"), b"lost under another name");
        n1.rename(&path("e"), &path("f")).unwrap();
        n2.write(&path("g"), b"another node's");
        storage.power_off("n1");
        assert_eq!(n2.read(&path("a")).unwrap(), b"old");
        assert_eq!(n2.read(&path("d")).unwrap(), b"kept");
        assert_eq!(storage.paths(), ["a", "d", "g"].map(path));
        storage.power_off("n2");
        assert_eq!(storage.paths(), ["a", "d"].map(path));
    }
}
