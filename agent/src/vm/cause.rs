//! What a SIGTERM means. slurmstepd sends the same signal for a cancel, a time limit, a requeue and the start of grace
//! (steps); Slurm itself knows which it is.
use slurm_vm_api::session::Cause;

use crate::slurm::{JobState, Slurm};

/// Asks Slurm. `restarts`: Slurm's restart count in this run; it goes up as soon as the job is requeued, while the job is
/// still shown as COMPLETING.
#[must_use]
pub fn of_term(slurm: &dyn Slurm, job: u32, restarts: u32) -> Cause {
    let info = match slurm.job(job) {
        Ok(Some(info)) => info.brief,
        Ok(None) => return Cause::Cancel,
        Err(e) => {
            log::warn!("job {job}: cannot ask Slurm what a SIGTERM means: {e}");
            return Cause::Unknown;
        }
    };
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
