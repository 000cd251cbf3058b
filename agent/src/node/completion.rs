//! Scripts that ended within their grace time: Slurm requeues their jobs, and they are not to run again.
use std::{path::PathBuf, sync::Arc, time::Duration};

use slurm_vm_api::session::Ended;

use super::Node;
use crate::{core::Record, effects::trusted::Distrust};

/// A script that ended within its grace time.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Completion {
    v: u32,
    uid: u32,
    ended: Ended,
}

impl Node {
    /// Puts on record that a job's script ended within its grace time: Slurm >= 24.05 requeues such a job, and it is not
    /// to run again. On shared storage where there is some, so that every node knows.
    pub fn keep_completion(self: &Arc<Self>, record: &Record, ended: Ended) {
        let path = self.completion_path(record.job);
        let done = Completion {
            v: 1,
            uid: record.user.uid,
            ended,
        };
        let written = serde_json::to_vec(&done)
            .map_err(Into::into)
            .and_then(|bytes| self.world.files.write_durably(&path, &bytes));
        if let Err(e) = written {
            log::error!("job {}: {}: {e}", record.job, path.display());
        }
        let (node, job) = (self.clone(), record.job);
        let watch = std::thread::Builder::new().name(format!("done-{job}"));
        if let Err(e) = watch.spawn(move || node.drop_completion_in_time(job)) {
            log::warn!("job {job}: {e}");
        }
    }

    /// Removes that record as soon as Slurm calls the job finished: who requeues it then wants it to run again.
    fn drop_completion_in_time(&self, job: u32) {
        let path = self.completion_path(job);
        while self.world.files.read(&path).is_ok() {
            if self.job_is_over(job) {
                self.forget_completion(job);
                return;
            }
            self.world.clock.sleep(Duration::from_secs(2));
        }
    }

    /// Removes that record.
    pub fn forget_completion(&self, job: u32) {
        let path = self.completion_path(job);
        if let Err(e) = self.world.files.remove(&path) {
            log::warn!("job {job}: {}: {e}", path.display());
        }
    }

    /// Where it is put on record that a job's script ended within its grace time.
    #[must_use]
    pub fn completion_path(&self, job: u32) -> PathBuf {
        self.config
            .shared_dir
            .as_ref()
            .unwrap_or(&self.config.state_dir)
            .join("done")
            .join(format!("{job}.json"))
    }

    /// How a job's script ended within the grace time of an earlier run, if it is not to run again. Where the site has Slurm run jobs again
    /// for their exit code, the script runs again.
    pub(super) fn completion(&self, job: u32, uid: u32) -> Option<Ended> {
        let bytes = self.world.files.read_trusted(&self.completion_path(job));
        let bytes = bytes.inspect_err(Distrust::complain).ok()?;
        let done: Completion = serde_json::from_slice(&bytes).ok()?;
        if let Ended::Code(code) = done.ended
            && self.world.slurm.config().is_ok_and(|c| c.requeue_exit.contains(&code))
        {
            log::info!("job {job}: Slurm runs it again for its exit code {code}");
            self.forget_completion(job);
            return None;
        }
        (done.uid == uid).then_some(done.ended)
    }
}
