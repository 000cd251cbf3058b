//! What a SIGTERM means. slurmstepd sends the same signal for a cancel, a time limit, a requeue and the start of grace
//! (steps); Slurm itself knows which it is.
use slurm_vm_api::session::Cause;

use crate::slurm::{JobBrief, JobState, Slurm};

/// Asks Slurm. `restarts`: Slurm's restart count in this run; it goes up as soon as the job is requeued, while the job is
/// still shown as COMPLETING. `None`: Slurm does not answer.
#[must_use]
pub fn of_term(slurm: &dyn Slurm, job: u32, restarts: u32) -> Option<Cause> {
    match slurm.job(job) {
        Ok(info) => Some(info.map_or(Cause::Cancel, |info| of_job(&info.brief, restarts))),
        Err(e) => {
            log::warn!("job {job}: cannot ask Slurm what a SIGTERM means: {e}");
            None
        }
    }
}

fn of_job(info: &JobBrief, restarts: u32) -> Cause {
    if info.restarts > restarts || info.state.is_waiting() {
        return Cause::Requeued;
    }
    if info.reason == "TimeLimit" || info.state == JobState::Timeout {
        return Cause::TimeLimit;
    }
    match info.state {
        JobState::Running | JobState::Configuring | JobState::Suspended if info.preempt_time.is_some() => Cause::Preemption,
        // A user's own `scancel --signal=TERM`.
        JobState::Running | JobState::Configuring | JobState::Suspended => Cause::Unknown,
        _ => Cause::Cancel,
    }
}

#[cfg(test)]
mod tests {
    use slurm_vm_api::session::Ended;

    use super::*;
    use crate::{core::RunState, slurm::FakeSlurm};

    #[test]
    fn what_slurm_does_not_explain_is_no_cause_and_an_end_by_it_does_not_count_for_the_next_run() {
        let slurm = FakeSlurm::new(vec![], vec![]);
        assert_eq!(of_term(&slurm, 7, 0), Some(Cause::Cancel), "Slurm knows no such job any more");
        slurm.set_unreachable(true);
        assert_eq!(of_term(&slurm, 7, 0), None);
        let mut run = RunState {
            restart: 1,
            ..RunState::default()
        };
        assert!(run.counts_for_the_next_run(&Ended::Signal(15)));
        run.term_unexplained = true;
        assert!(!run.counts_for_the_next_run(&Ended::Signal(15)), "it may have been a requeue");
        assert!(run.counts_for_the_next_run(&Ended::Code(0)), "the program has done its work");
    }
}
