//! Whether a job's VM may begin to move at all: what Slurm would refuse at the last step is asked first. Pure.
//!
//! A move ends with Slurm putting the job back into the queue. A job that it would not put back stays where it is: its VM
//! elsewhere and the job still here would tear it in two.
use crate::slurm::{JobBrief, JobState};

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Admission {
    /// Slurm would put it back into the queue.
    May,
    /// Not as long as it is in its present state, and why, as a fragment.
    NotNow(String),
    /// Slurm would never put it back into the queue as it is, and why, as a fragment.
    Never(String),
}

/// Of a job as Slurm has it now. `last_try`: the controller itself has made it not requeueable for the time being, after it
/// had met broken nodes.
pub(super) fn of(brief: &JobBrief, last_try: bool) -> Admission {
    let never = |why: &str| Admission::Never(why.to_owned());
    let not_now = |why: &str| Admission::NotNow(why.to_owned());
    if !brief.batch {
        return never("it is not a batch job, and Slurm puts only those back into the queue");
    }
    if brief.het.is_some() {
        return never("it is a part of a heterogeneous job, of which Slurm puts all parts back into the queue or none");
    }
    if !brief.requeue && last_try {
        return never("it has met broken nodes, and Slurm may not put it back into the queue before its program runs");
    }
    if !brief.requeue {
        return never("it is not requeueable (--no-requeue), so that Slurm could not start it anywhere else");
    }
    match &brief.state {
        JobState::Running => Admission::May,
        JobState::Suspended => not_now("it is suspended"),
        JobState::Configuring => not_now("it is just being started"),
        _ => not_now("it does not run"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::placement::tests::running;
    use super::*;

    #[test]
    fn only_a_running_requeueable_batch_job_may_move() {
        let fine = running(7, "low");
        assert_eq!(of(&fine, false), Admission::May);
        let with = |change: &dyn Fn(&mut JobBrief)| {
            let mut job = running(7, "low");
            change(&mut job);
            job
        };
        for (job, last_try, expected) in [
            (with(&|j| j.batch = false), false, "not a batch job"),
            (with(&|j| j.requeue = false), false, "--no-requeue"),
            (with(&|j| j.requeue = false), true, "met broken nodes"),
            (with(&|j| j.het = Some((6, 1))), false, "heterogeneous"),
            (with(&|j| j.state = JobState::Suspended), false, "suspended"),
            (with(&|j| j.state = JobState::Configuring), false, "being started"),
            (with(&|j| j.state = JobState::Completing), false, "does not run"),
        ] {
            let why = match of(&job, last_try) {
                Admission::May => panic!("{expected}: it may"),
                Admission::NotNow(why) => {
                    assert!(job.requeue && job.batch, "{why}");
                    why
                }
                Admission::Never(why) => {
                    assert_eq!(job.state, JobState::Running, "{why}");
                    why
                }
            };
            assert!(why.contains(expected), "{why}");
        }
        // What a requeue of ours has taken from it does not matter once it was given back.
        assert_eq!(of(&fine, true), Admission::May);
    }
}
