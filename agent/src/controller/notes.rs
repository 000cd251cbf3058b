//! What the controller remembers of jobs from one process to the next, beside their moves: one small file,
//! `STATE_DIR/jobs.json`, written whenever it changes. `cat` shows it.
use std::{collections::BTreeMap, io::ErrorKind, path::PathBuf, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{core::relocation::TimeAccount, effects::Files};

/// What is remembered of one job.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JobNotes {
    /// Broken nodes that it met one after the other.
    pub faults: u32,
    /// It was made not requeueable: its next broken node is its end.
    pub last_try: bool,
    /// Nodes that it is kept away from for that, beside those its user excluded.
    pub excluded: Vec<String>,
    /// The node list of its user, to be put back when it waits again.
    pub req_nodes: Vec<String>,
    /// What its moves have used of its time limit.
    pub time: Option<TimeAccount>,
    /// The job is in the state SPECIAL_EXIT after this many restarts, and no node was at fault: it waits for whoever holds it so.
    #[serde(default)]
    pub not_a_fault: Option<u32>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Ledger {
    v: u32,
    jobs: BTreeMap<u32, JobNotes>,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Notes {
    files: Arc<dyn Files>,
    path: PathBuf,
    ledger: Ledger,
}

impl Notes {
    /// Those of an earlier process. A file that cannot be read is kept aside: by it a job can be made requeueable again.
    pub(super) fn load(files: Arc<dyn Files>, path: PathBuf) -> Self {
        let read = files.read(&path).and_then(|bytes| Ok(serde_json::from_slice(&bytes)?));
        let ledger = read.unwrap_or_else(|e| {
            if e.kind() != ErrorKind::NotFound {
                let aside = path.with_extension("json.unreadable");
                log::error!("{}: {e}: begun anew, the old one is {}", path.display(), aside.display());
                if let Err(e) = files.read(&path).and_then(|bytes| files.write_durably(&aside, &bytes)) {
                    log::error!("{}: {e}", aside.display());
                }
            }
            Ledger::default()
        });
        Self { files, path, ledger }
    }

    pub(super) fn of(&self, job: u32) -> JobNotes {
        self.ledger.jobs.get(&job).cloned().unwrap_or_default()
    }

    /// Jobs and their notes.
    pub(super) fn all(&self) -> Vec<(u32, JobNotes)> {
        self.ledger.jobs.iter().map(|(job, n)| (*job, n.clone())).collect()
    }

    /// Changes one job's and writes the file if that made a difference.
    pub(super) fn change(&mut self, job: u32, change: impl FnOnce(&mut JobNotes)) {
        let before = self.of(job);
        let mut after = before.clone();
        change(&mut after);
        if after == before {
            return;
        }
        if after == JobNotes::default() {
            self.ledger.jobs.remove(&job);
        } else {
            self.ledger.jobs.insert(job, after);
        }
        self.write();
    }

    /// Forgets jobs that Slurm no longer has.
    pub(super) fn retain(&mut self, known: impl Fn(u32) -> bool) {
        let before = self.ledger.jobs.len();
        self.ledger.jobs.retain(|job, _| known(*job));
        if self.ledger.jobs.len() != before {
            self.write();
        }
    }

    fn write(&mut self) {
        self.ledger.v = 1;
        let written = serde_json::to_vec_pretty(&self.ledger)
            .map_err(std::io::Error::from)
            .and_then(|json| self.files.write_durably(&self.path, &json));
        if let Err(e) = written {
            log::error!("{}: {e}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::effects::MemoryFiles;

    #[test]
    fn notes_outlive_the_process_and_go_with_the_job() {
        let files: Arc<dyn Files> = Arc::new(MemoryFiles::default());
        let path = PathBuf::from("/state/jobs.json");
        let load = || Notes::load(files.clone(), path.clone());
        let mut notes = load();
        notes.change(7, |n| n.req_nodes = vec!["n1".into()]);
        notes.change(8, |n| n.faults = 2);
        notes.change(8, |n| n.faults = 0);
        assert_eq!(load().all(), [(7, notes.of(7))]);
        notes.retain(|job| job != 7);
        assert_eq!(load().all(), []);
        files.write_durably(&path, b"{").unwrap();
        assert_eq!(load().all(), []);
    }
}
