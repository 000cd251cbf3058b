//! Slurm as the agent sees it: one narrow trait, the real thing behind it, and a model of it for the simulation.
//!
//! Only this module knows Slurm's commands. They are run with a fixed argument vector, no shell, a cleared environment and a deadline, and what they print is
//! read strictly: an answer that is not understood is an error, never a guess. libslurm is not used, because its structs change with every release.
//!
//! **What a user can make Slurm print.** A job's name, comment and paths may hold spaces, `=` and even line breaks, and `scontrol show job` prints them unescaped in
//! the middle of the record: a job named `x UserId=root(0) ...` shows a forged record. So everything that decides anything comes from `squeue` with a list of
//! fields that users cannot choose freely; `scontrol show job` serves for the CPUs per node only (cross-checked against `squeue`'s node list, and refused if it is
//! ambiguous) and for free texts that are marked as such ([`UserText`]).
//!
//! Callers: the controller role's main loop and the agent's prolog handler, on their own threads; every call blocks for at most the deadline.

mod commands;
mod constraint;
mod cpus;
mod error;
mod fake;
mod hostlist;
mod parse;
mod parse_admin;
mod parse_requests;
mod run;
mod types;

#[cfg(test)]
mod tests;

pub use commands::{SlurmCommands, SlurmSettings};
pub use constraint::satisfies;
pub use cpus::{HostCpus, SYSFS};
pub use error::SlurmError;
pub use fake::{FakeEvent, FakeJob, FakeNode, FakeOp, FakePartition, FakeSlurm, Fault};
pub use hostlist::{expand_hosts, expand_numbers};
pub use types::*;

/// What is asked of Slurm and what is ordered.
///
/// Orders are safe to repeat: the second time they do nothing, or answer with an error that says so ([`SlurmError::is_already_finished`] and its like).
pub trait Slurm: Send + Sync + std::fmt::Debug {
    /// Everything about one job; `None` if Slurm does not know it (any more).
    ///
    /// # Errors
    /// See [`SlurmError`]; this holds for every method here.
    fn job(&self, id: JobId) -> Result<Option<JobInfo>, SlurmError>;

    /// The same of several jobs, by two commands however many they are. One that is missing in the answer is not known, or could not be
    /// told for sure: [`job`](Slurm::job) says which.
    fn jobs(&self, ids: &[JobId]) -> Result<Vec<JobInfo>, SlurmError>;

    /// All jobs of the cluster that wait, run, or are leaving their nodes. A job that is not in it has ended.
    fn jobs_poll(&self) -> Result<Vec<JobBrief>, SlurmError>;

    /// What the jobs of [`jobs_poll`](Slurm::jobs_poll) ask for or have.
    fn requests(&self) -> Result<Vec<JobRequest>, SlurmError>;

    /// The QOS's of accounting and which of them may preempt which. Without accounting this is an error.
    fn qos(&self) -> Result<Vec<QosInfo>, SlurmError>;

    /// All nodes.
    fn nodes(&self) -> Result<Vec<NodeInfo>, SlurmError>;

    /// One node. That Slurm does not know it is an error.
    fn node(&self, name: &str) -> Result<NodeInfo, SlurmError>;

    /// Sets what features a node offers now. Must be a part of its available features. Running jobs are left alone; the list is lost at a reconfigure.
    fn set_active_features(&self, nodes: &[String], features: &[String]) -> Result<(), SlurmError>;

    /// Ends this run of some jobs and puts them back into the queue. After an error it is unknown which of several it was carried out
    /// for. A job that does not run (any more) is left as it is, without an
    /// error: Slurm would otherwise bring back to life what has just been cancelled (scontrol(1), `Incomplete`).
    fn requeue(&self, jobs: &[JobId]) -> Result<(), SlurmError>;

    /// The same, and held there until [`release`](Slurm::release).
    fn requeuehold(&self, jobs: &[JobId]) -> Result<(), SlurmError>;

    /// Ends this run and puts the job into the queue, held, in the state `SPECIAL_EXIT`: nothing else makes that state by
    /// itself, so it says that the job met a broken node. Its owner may do that.
    fn requeue_special(&self, job: JobId) -> Result<(), SlurmError>;

    /// Holds waiting jobs. After an error it is unknown which of several it was carried out for.
    fn hold(&self, jobs: &[JobId]) -> Result<(), SlurmError>;

    /// Lets held jobs go. After an error it is unknown which of several it was carried out for.
    fn release(&self, jobs: &[JobId]) -> Result<(), SlurmError>;

    /// Changes a job, all or nothing.
    fn update_job(&self, job: JobId, update: &JobUpdate) -> Result<(), SlurmError> {
        self.update_jobs(&[job], update)
    }

    /// Changes several jobs alike, each of them all or nothing. After an error it is unknown which of several it was carried out for.
    fn update_jobs(&self, jobs: &[JobId], update: &JobUpdate) -> Result<(), SlurmError>;

    /// Makes a reservation. If one of this name is there already with the same users, it is left as it is.
    fn create_reservation(&self, spec: &ReservationSpec) -> Result<(), SlurmError>;

    /// Makes these the users of a reservation that exists.
    fn set_reservation_users(&self, name: &str, users: &[String]) -> Result<(), SlurmError>;

    /// One reservation.
    fn reservation(&self, name: &str) -> Result<Option<ReservationInfo>, SlurmError>;

    /// All reservations.
    fn reservations(&self) -> Result<Vec<ReservationInfo>, SlurmError>;

    /// Removes a reservation; `Ok(false)` if there was none.
    fn delete_reservation(&self, name: &str) -> Result<bool, SlurmError>;

    /// Cancels a job, or with a signal's number sends it to the job's batch script and steps. A job that has ended is not an error.
    fn cancel(&self, job: JobId, signal: Option<u8>) -> Result<(), SlurmError>;

    /// The configuration as slurmctld has it.
    fn config(&self) -> Result<SlurmConfig, SlurmError>;

    /// The partitions.
    fn partitions(&self) -> Result<Vec<PartitionInfo>, SlurmError>;

    /// Does slurmctld answer?
    fn ping(&self) -> Result<(), SlurmError>;
}
