//! The jobs of one poll. Shared, never copied: a busy cluster has ten thousand of them, and they are looked at each second.
use std::{collections::HashMap, ops::Deref};

use crate::slurm::JobBrief;

/// Jobs in Slurm's order, found by id at the same cost however many there are.
#[derive(Debug, Default)]
pub struct Jobs {
    all: Vec<JobBrief>,
    at: HashMap<u32, usize>,
}

impl Jobs {
    /// Of one poll.
    #[must_use]
    pub fn new(all: Vec<JobBrief>) -> Self {
        let at = all.iter().enumerate().map(|(k, j)| (j.id, k)).collect();
        Self { all, at }
    }

    /// A job by its id.
    #[must_use]
    pub fn by_id(&self, job: u32) -> Option<&JobBrief> {
        self.at.get(&job).and_then(|k| self.all.get(*k))
    }

    /// Slurm knows the job.
    #[must_use]
    pub fn has(&self, job: u32) -> bool {
        self.at.contains_key(&job)
    }
}

impl Deref for Jobs {
    type Target = [JobBrief];

    fn deref(&self) -> &[JobBrief] {
        &self.all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::placement::tests::brief;

    #[test]
    fn a_job_is_found_by_its_id_and_they_keep_their_order() {
        let jobs = Jobs::new(vec![brief(9, "low"), brief(3, "high"), brief(7, "low")]);
        assert_eq!(jobs.iter().map(|j| j.id).collect::<Vec<_>>(), [9, 3, 7]);
        assert_eq!(jobs.by_id(3).map(|j| j.partition.as_str()), Some("high"));
        assert!(jobs.has(7) && !jobs.has(8) && jobs.by_id(8).is_none());
    }
}
