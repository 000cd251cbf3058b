//! Who may restore a save: said by the name of its manifest, which changes by rename(2) only.
//!
//! ```text
//!  manifest.json ── take ──> manifest.claimed-NODE.json ── mark_used ──> manifest.used.json
//!        ^ <──── give_back ────────┘  ^                                        │
//!        │                            └── take, by another node                │
//!        └──────────────────── give_back: the guest never ran ─────────────────┘
//! ```
//! Of two nodes that rename the same file one succeeds: no save is taken twice. A claim says that the guest is being loaded, and has
//! not run yet: the save is marked as used first, and then the guest is let run. So a claim whose node is gone can be taken over by the
//! node that Slurm runs the job on, without asking anybody: should the first one still be there, it can no longer mark the save as used,
//! and ends what it has loaded. A power cut between the mark and the first instruction costs the save, never a second guest.
use std::{
    io,
    path::{Path, PathBuf},
};

use crate::effects::Files;

/// The manifest of a save that waits for its job.
pub(super) const MANIFEST: &str = "manifest.json";
/// The manifest of a save that a VM was restored from and now stands on.
const USED: &str = "manifest.used.json";
const CLAIMED: &str = "manifest.claimed-";

/// What [`take`] found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// The save is this node's to restore.
    Claim(Claim),
    /// A guest was let run from it, by whichever node.
    Used,
}

/// A node's claim on a save.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Claim {
    dir: PathBuf,
    node: String,
    /// It was this claim that marked the save as used.
    marked: bool,
}

/// A save as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stand {
    /// It waits for its job.
    Waits,
    /// A node is loading it.
    Claimed(String),
    /// A guest was let run from it.
    Used,
    /// There is no manifest: it was never whole, or is gone.
    None,
}

fn claimed_by(dir: &Path, node: &str) -> PathBuf {
    dir.join(format!("{CLAIMED}{node}.json"))
}

/// How a save stands, and its manifest's path where it has one.
///
/// # Errors
/// When its directory cannot be read: nothing is known of it then. One that is not there is [`Stand::None`].
pub(super) fn stand(files: &dyn Files, dir: &Path) -> io::Result<(Stand, PathBuf)> {
    let mut claimed = None;
    let mut used = false;
    for entry in files.list(dir)? {
        let name = entry.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match name.as_str() {
            MANIFEST => return Ok((Stand::Waits, dir.join(MANIFEST))),
            USED => used = true,
            _ => {
                let node = name.strip_prefix(CLAIMED).and_then(|n| n.strip_suffix(".json"));
                claimed = node.map(str::to_owned).or(claimed);
            }
        }
    }
    Ok(match claimed {
        Some(node) => (Stand::Claimed(node.clone()), claimed_by(dir, &node)),
        None if used => (Stand::Used, dir.join(USED)),
        None => (Stand::None, dir.join(MANIFEST)),
    })
}

/// Claims a save for a node, also from a node that had claimed it before.
///
/// # Errors
/// When it is not there, or another node is quicker.
pub(super) fn take(files: &dyn Files, dir: &Path, node: &str) -> io::Result<Taken> {
    let claim = Claim {
        dir: dir.to_path_buf(),
        node: node.to_owned(),
        marked: false,
    };
    let (stand, path) = stand(files, dir)?;
    match stand {
        Stand::Claimed(mine) if mine == node => Ok(Taken::Claim(claim)),
        Stand::Waits | Stand::Claimed(_) => {
            files.rename(&path, &claimed_by(dir, node))?;
            Ok(Taken::Claim(claim))
        }
        Stand::Used => Ok(Taken::Used),
        Stand::None => Err(io::Error::new(io::ErrorKind::NotFound, "the save has no manifest")),
    }
}

impl Claim {
    /// From now on the save is only a backing file: the guest may be let run.
    ///
    /// # Errors
    /// When the claim was taken over, or cannot be written: the guest must not run then.
    pub(super) fn mark_used(&mut self, files: &dyn Files) -> io::Result<()> {
        let done = files.rename(&claimed_by(&self.dir, &self.node), &self.dir.join(USED));
        // After another error the name may have been changed, and not be on the disk yet.
        let taken_over = done.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
        self.marked = done.is_ok() || (!taken_over && matches!(stand(files, &self.dir), Ok((Stand::Used, _))));
        done
    }

    /// It has marked the save as used.
    pub(super) fn is_marked(&self) -> bool {
        self.marked
    }

    /// The guest has not run and will not: the save waits for its job again. Nothing happens if another node has taken it over.
    ///
    /// # Errors
    /// When that cannot be written.
    pub(super) fn give_back(&self, files: &dyn Files) -> io::Result<()> {
        let from = if self.marked {
            self.dir.join(USED)
        } else {
            claimed_by(&self.dir, &self.node)
        };
        match files.rename(&from, &self.dir.join(MANIFEST)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::effects::SystemFiles;

    const FILES: SystemFiles = SystemFiles;

    fn save() -> (tempfile::TempDir, PathBuf) {
        let shared = tempfile::tempdir().unwrap();
        let dir = shared.path().join("slurm-7-0.1");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join(MANIFEST), "{}").unwrap();
        (shared, dir)
    }

    fn claim(dir: &Path, node: &str) -> Claim {
        match take(&FILES, dir, node).unwrap() {
            Taken::Claim(claim) => claim,
            Taken::Used => panic!("used"),
        }
    }

    #[test]
    fn a_save_is_used_once_whoever_claims_it() {
        let (_shared, dir) = save();
        let mut first = claim(&dir, "n1");
        assert_eq!(stand(&FILES, &dir).unwrap().0, Stand::Claimed("n1".into()));
        // Slurm has started the job on n2 meanwhile.
        let mut second = claim(&dir, "n2");
        assert!(first.mark_used(&FILES).is_err(), "n1 must not let it run");
        first.give_back(&FILES).unwrap();
        assert_eq!(
            stand(&FILES, &dir).unwrap().0,
            Stand::Claimed("n2".into()),
            "n2's claim is not n1's to give back"
        );
        second.mark_used(&FILES).unwrap();
        first.give_back(&FILES).unwrap();
        assert_eq!(take(&FILES, &dir, "n1").unwrap(), Taken::Used, "what n2 used stays used");
        assert!(second.mark_used(&FILES).is_err(), "once");
    }

    #[test]
    fn a_restore_that_failed_leaves_the_save_to_the_next_one() {
        let (_shared, dir) = save();
        claim(&dir, "n1").give_back(&FILES).unwrap();
        assert_eq!(stand(&FILES, &dir).unwrap().0, Stand::Waits);
        let mut marked = claim(&dir, "n1");
        marked.mark_used(&FILES).unwrap();
        marked.give_back(&FILES).unwrap();
        assert_eq!(
            stand(&FILES, &dir).unwrap().0,
            Stand::Waits,
            "it was marked, and the guest did not run"
        );
        claim(&dir, "n2").mark_used(&FILES).unwrap();
    }

    #[test]
    fn an_agent_that_was_restarted_in_a_restore_finds_its_claim() {
        let (_shared, dir) = save();
        let _died = claim(&dir, "n1");
        claim(&dir, "n1").mark_used(&FILES).unwrap();
        assert_eq!(stand(&FILES, &dir).unwrap(), (Stand::Used, dir.join(USED)));
    }

    #[test]
    fn without_a_manifest_there_is_no_save() {
        let (_shared, dir) = save();
        fs::remove_file(dir.join(MANIFEST)).unwrap();
        assert_eq!(take(&FILES, &dir, "n1").unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(stand(&FILES, &dir.join("nowhere")).unwrap().0, Stand::None);
    }
}
