//! What Slurm says of a job beyond the poll. Many ask at once when many jobs are preempted: those who come while a question is under way
//! are answered together by the next one, so that nobody waits for company and Slurm is not asked once for each job.
use std::{collections::BTreeSet, sync::Mutex};

use crossbeam_channel::{Sender, bounded};

use super::{Controller, locked};
use crate::slurm::{JobInfo, SlurmError};

type Answer = Result<Option<JobInfo>, SlurmError>;

#[derive(Debug, Default)]
pub(super) struct Details {
    asked: Mutex<Vec<(u32, Sender<Answer>)>>,
    /// Held while Slurm is asked.
    asking: Mutex<()>,
}

impl Controller {
    /// A job as Slurm has it now; `None`: Slurm does not know it. Waits for Slurm.
    ///
    /// # Errors
    /// Those of Slurm.
    pub(super) fn job_details(&self, job: u32) -> Answer {
        let (tell, told) = bounded(1);
        locked(&self.details.asked).push((job, tell));
        let asking = locked(&self.details.asking);
        if let Ok(answer) = told.try_recv() {
            return answer;
        }
        let asked = std::mem::take(&mut *locked(&self.details.asked));
        let ids: Vec<u32> = BTreeSet::from_iter(asked.iter().map(|(job, _)| *job)).into_iter().collect();
        self.orders.wait_turn(2);
        let found = self.world.slurm.jobs(&ids);
        for (job, tell) in asked {
            let _ = tell.send(self.answer_of(job, &ids, &found));
        }
        drop(asking);
        told.try_recv().unwrap_or(Ok(None))
    }

    fn answer_of(&self, job: u32, ids: &[u32], found: &Result<Vec<JobInfo>, SlurmError>) -> Answer {
        let jobs = found.as_ref().map_err(Clone::clone)?;
        match jobs.iter().find(|j| j.brief.id == job) {
            None if ids.len() > 1 => {
                self.orders.wait_turn(2);
                self.world.slurm.job(job)
            }
            one => Ok(one.cloned()),
        }
    }
}
