//! A model of Slurm for the simulation: deterministic, without threads, clock or randomness of its own.
//!
//! It does what was seen of the real one where it matters to us: `PreemptTime` is set at the start of grace and the job goes on; a requeued job waits out a delay
//! that `StartTime=now` lifts only once it is PENDING; a node is given away when the epilog has returned; reservations keep others off, and jobs in them sort
//! first; a reconfigure wipes active features; an order may be carried out although its answer is lost.
//!
//! The test drives it: [`FakeSlurm::tick`] moves time and schedules, [`FakeSlurm::events`] says what slurmd would do now on the nodes (run the prolog and the batch
//! script, send TERM, run the epilog), and the test answers with [`FakeSlurm::exited`] and [`FakeSlurm::epilog_done`].

mod model;

use super::types::{
    JobBrief, JobId, JobInfo, JobRequest, JobState, JobUpdate, NodeInfo, PartitionInfo, QosInfo, ReservationInfo, ReservationSpec,
    SlurmConfig,
};
use super::{Slurm, SlurmError};
use model::Model;
use std::sync::{Mutex, MutexGuard};

/// A node of the model.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "the names say it")]
pub struct FakeNode {
    pub name: String,
    pub cpus: u32,
    pub mem_mib: u64,
    pub features: Vec<String>,
}

/// A partition of the model. All nodes are in all partitions.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "the names say it")]
pub struct FakePartition {
    pub name: String,
    pub priority_tier: u32,
    pub grace_s: u64,
    /// `REQUEUE` or `OFF`.
    pub preempt_mode: String,
}

/// A job to submit.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "the names say it")]
pub struct FakeJob {
    pub user: String,
    pub uid: u32,
    pub partition: String,
    pub nodes: u32,
    pub cpus_per_node: u32,
    pub mem_mib_per_node: u64,
    pub features: Option<String>,
    pub time_limit_min: Option<u32>,
    pub batch: bool,
    pub req_nodes: Vec<String>,
    pub exclude_nodes: Vec<String>,
    /// Wants its nodes for itself alone.
    pub exclusive: bool,
    pub qos: Option<String>,
    /// May be requeued (batch jobs only).
    pub requeue: bool,
}

impl Default for FakeJob {
    fn default() -> Self {
        Self {
            user: "alice".into(),
            uid: 2001,
            partition: "low".into(),
            nodes: 1,
            cpus_per_node: 1,
            mem_mib_per_node: 512,
            features: Some("vm".into()),
            time_limit_min: Some(60),
            batch: true,
            req_nodes: Vec::new(),
            exclude_nodes: Vec::new(),
            exclusive: false,
            qos: None,
            requeue: true,
        }
    }
}

/// What slurmd and slurmstepd would do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FakeEvent {
    /// Prolog on all nodes, then the batch script on the first.
    Started {
        /// The job.
        job: JobId,
        /// Its nodes.
        nodes: Vec<String>,
        /// 0 in the first run.
        restarts: u32,
    },
    /// Chosen as a victim. The batch script is told only where the site allows it.
    Grace {
        /// The job.
        job: JobId,
        /// Its nodes.
        nodes: Vec<String>,
    },
    /// TERM to all that is left of the job, then the epilog on each node.
    Ending {
        /// The job.
        job: JobId,
        /// Its nodes.
        nodes: Vec<String>,
        /// What it is going to be after that.
        next: JobState,
    },
}

/// One kind of order or question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "one for each method of the trait")]
pub enum FakeOp {
    Job,
    Poll,
    Nodes,
    SetFeatures,
    Requeue,
    RequeueHold,
    Hold,
    Release,
    Update,
    CreateReservation,
    Reservations,
    DeleteReservation,
    Cancel,
    Config,
}

impl FakeOp {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Job,
        Self::Poll,
        Self::Nodes,
        Self::SetFeatures,
        Self::Requeue,
        Self::RequeueHold,
        Self::Hold,
        Self::Release,
        Self::Update,
        Self::CreateReservation,
        Self::Reservations,
        Self::DeleteReservation,
        Self::Cancel,
        Self::Config,
    ];
}

/// A failure to inject.
#[derive(Debug, Clone)]
pub struct Fault {
    /// What fails.
    pub op: FakeOp,
    /// With what.
    pub error: SlurmError,
    /// True: it is carried out all the same and only the answer is lost.
    pub carried_out: bool,
    /// How many times.
    pub times: u32,
}

/// The model behind the [`Slurm`] trait.
#[derive(Debug)]
pub struct FakeSlurm {
    model: Mutex<Model>,
}

impl FakeSlurm {
    /// A cluster with nothing in it but nodes.
    #[must_use]
    pub fn new(nodes: Vec<FakeNode>, partitions: Vec<FakePartition>) -> Self {
        Self {
            model: Mutex::new(Model::new(nodes, partitions)),
        }
    }

    /// `n1..n` with 4 CPUs, 4000 MiB and feature `vm`; partition `low` (tier 1, REQUEUE, 60 s of grace) and `high` (tier 10).
    #[must_use]
    pub fn with_nodes(count: u32) -> Self {
        let node = |i| FakeNode {
            name: format!("n{i}"),
            cpus: 4,
            mem_mib: 4000,
            features: vec!["vm".into()],
        };
        let part = |name: &str, tier, grace, mode: &str| FakePartition {
            name: name.into(),
            priority_tier: tier,
            grace_s: grace,
            preempt_mode: mode.into(),
        };
        Self::new(
            (1..=count).map(node).collect(),
            vec![part("low", 1, 60, "REQUEUE"), part("high", 10, 0, "OFF")],
        )
    }

    fn model(&self) -> MutexGuard<'_, Model> {
        self.model.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Puts a job into the queue; [`tick`](FakeSlurm::tick) starts it.
    pub fn submit(&self, job: FakeJob) -> JobId {
        self.model().submit(job)
    }

    /// Moves time on to `now` (unix seconds, never back), ends what is due, and schedules once.
    pub fn tick(&self, now: i64) {
        self.model().tick(now);
    }

    /// What happened since the last call, in order.
    #[must_use]
    pub fn events(&self) -> Vec<FakeEvent> {
        std::mem::take(&mut self.model().events)
    }

    /// The batch script ended by itself.
    pub fn exited(&self, job: JobId, code: i32) {
        self.model().exited(job, code);
    }

    /// The epilog returned on this node.
    pub fn epilog_done(&self, job: JobId, node: &str) {
        self.model().epilog_done(job, node);
    }

    /// Takes a node down or up. Jobs on a node that goes down are requeued, as slurmctld does after SlurmdTimeout.
    pub fn set_up(&self, node: &str, up: bool) {
        self.model().set_up(node, up);
    }

    /// Drains a node or ends that.
    pub fn set_drain(&self, node: &str, reason: Option<&str>) {
        self.model().set_drain(node, reason);
    }

    /// `scontrol reconfigure`, or a restart of slurmctld: active features are as in slurm.conf again.
    pub fn reconfigure(&self) {
        self.model().reconfigure();
    }

    /// Fails a kind of call so many times.
    pub fn inject(&self, fault: Fault) {
        self.model().faults.push(fault);
    }

    /// Ends the failures of a kind of call.
    pub fn heal(&self, op: FakeOp) {
        self.model().faults.retain(|f| f.op != op);
    }

    /// While true, every call says [`SlurmError::Unreachable`] and nothing is scheduled; running jobs run on.
    pub fn set_unreachable(&self, unreachable: bool) {
        self.model().unreachable = unreachable;
    }

    /// Slurm < 24.05: a script that exits within grace is COMPLETED; true (the default): it is requeued.
    pub fn set_requeues_early_exit(&self, yes: bool) {
        self.model().requeues_early_exit = yes;
    }

    /// Seconds for which a started job is not preempted.
    pub fn set_preempt_exempt(&self, seconds: i64) {
        self.model().exempt_s = seconds;
    }

    /// `preempt/qos` in place of `preempt/partition_prio`: which QOS may preempt which.
    pub fn set_preempt_qos(&self, qos: Vec<QosInfo>) {
        self.model().qos = Some(qos);
    }

    /// Checks what must hold at any time: no node is overcommitted, no job in two states at once. Returns the first breach.
    #[must_use]
    pub fn breach(&self) -> Option<String> {
        self.model().breach()
    }

    /// How often something was asked or ordered so far.
    #[must_use]
    pub fn calls(&self, op: FakeOp) -> u64 {
        self.model().calls.get(&op).copied().unwrap_or(0)
    }

    fn call<T>(&self, op: FakeOp, act: impl FnOnce(&mut Model) -> Result<T, SlurmError>) -> Result<T, SlurmError> {
        let mut model = self.model();
        *model.calls.entry(op).or_default() += 1;
        if model.unreachable {
            return Err(SlurmError::Unreachable {
                message: "Unable to contact slurm controller (connect failure)".into(),
            });
        }
        if let Some(fault) = model.faults.iter_mut().find(|f| f.op == op && f.times > 0) {
            fault.times -= 1;
            let (error, carried_out) = (fault.error.clone(), fault.carried_out);
            if carried_out {
                let _ = act(&mut model);
            }
            return Err(error);
        }
        act(&mut model)
    }
}

/// As scontrol does it: all are tried, and the first error is told.
fn each(jobs: &[JobId], mut act: impl FnMut(JobId) -> Result<(), SlurmError>) -> Result<(), SlurmError> {
    let done: Vec<Result<(), SlurmError>> = jobs.iter().map(|job| act(*job)).collect();
    done.into_iter().collect()
}

impl Slurm for FakeSlurm {
    fn job(&self, id: JobId) -> Result<Option<JobInfo>, SlurmError> {
        self.call(FakeOp::Job, |m| Ok(m.info(id)))
    }

    fn jobs(&self, ids: &[JobId]) -> Result<Vec<JobInfo>, SlurmError> {
        self.call(FakeOp::Job, |m| Ok(ids.iter().filter_map(|id| m.info(*id)).collect()))
    }

    fn jobs_poll(&self) -> Result<Vec<JobBrief>, SlurmError> {
        self.call(FakeOp::Poll, |m| Ok(m.briefs()))
    }

    fn requests(&self) -> Result<Vec<JobRequest>, SlurmError> {
        self.call(FakeOp::Poll, |m| Ok(m.requests()))
    }

    fn qos(&self) -> Result<Vec<QosInfo>, SlurmError> {
        self.call(FakeOp::Config, |m| {
            m.qos.clone().ok_or_else(|| SlurmError::Refused {
                message: "You are not running a supported accounting_storage plugin".into(),
            })
        })
    }

    fn nodes(&self) -> Result<Vec<NodeInfo>, SlurmError> {
        self.call(FakeOp::Nodes, |m| Ok(m.node_infos()))
    }

    fn node(&self, name: &str) -> Result<NodeInfo, SlurmError> {
        self.call(FakeOp::Nodes, |m| {
            m.node_infos()
                .into_iter()
                .find(|n| n.name == name)
                .ok_or_else(|| SlurmError::Refused {
                    message: format!("Node {name} not found"),
                })
        })
    }

    fn set_active_features(&self, nodes: &[String], features: &[String]) -> Result<(), SlurmError> {
        self.call(FakeOp::SetFeatures, |m| {
            nodes.iter().try_for_each(|n| m.set_active_features(n, features))
        })
    }

    fn requeue(&self, jobs: &[JobId]) -> Result<(), SlurmError> {
        self.call(FakeOp::Requeue, |m| each(jobs, |job| m.requeue(job, false)))
    }

    fn requeuehold(&self, jobs: &[JobId]) -> Result<(), SlurmError> {
        self.call(FakeOp::RequeueHold, |m| each(jobs, |job| m.requeue(job, true)))
    }

    fn requeue_special(&self, job: JobId) -> Result<(), SlurmError> {
        self.call(FakeOp::RequeueHold, |m| m.requeue_special(job))
    }

    fn hold(&self, jobs: &[JobId]) -> Result<(), SlurmError> {
        self.call(FakeOp::Hold, |m| each(jobs, |job| m.set_held(job, true)))
    }

    fn release(&self, jobs: &[JobId]) -> Result<(), SlurmError> {
        self.call(FakeOp::Release, |m| each(jobs, |job| m.set_held(job, false)))
    }

    fn update_jobs(&self, jobs: &[JobId], update: &JobUpdate) -> Result<(), SlurmError> {
        self.call(FakeOp::Update, |m| each(jobs, |job| m.update(job, update)))
    }

    fn create_reservation(&self, spec: &ReservationSpec) -> Result<(), SlurmError> {
        self.call(FakeOp::CreateReservation, |m| m.reserve(spec).map(drop))
    }

    fn set_reservation_users(&self, name: &str, users: &[String]) -> Result<(), SlurmError> {
        self.call(FakeOp::CreateReservation, |m| m.set_reservation_users(name, users))
    }

    fn reservation(&self, name: &str) -> Result<Option<ReservationInfo>, SlurmError> {
        self.call(FakeOp::Reservations, |m| Ok(m.reservations.get(name).cloned()))
    }

    fn reservations(&self) -> Result<Vec<ReservationInfo>, SlurmError> {
        self.call(FakeOp::Reservations, |m| Ok(m.reservations.values().cloned().collect()))
    }

    fn delete_reservation(&self, name: &str) -> Result<bool, SlurmError> {
        self.call(FakeOp::DeleteReservation, |m| m.unreserve(name))
    }

    fn cancel(&self, job: JobId, signal: Option<u8>) -> Result<(), SlurmError> {
        self.call(FakeOp::Cancel, |m| {
            if signal.is_none() {
                m.cancel(job);
            }
            Ok(())
        })
    }

    fn config(&self) -> Result<SlurmConfig, SlurmError> {
        self.call(FakeOp::Config, |m| Ok(m.config()))
    }

    fn partitions(&self) -> Result<Vec<PartitionInfo>, SlurmError> {
        self.call(FakeOp::Config, |m| Ok(m.partition_infos()))
    }

    fn ping(&self) -> Result<(), SlurmError> {
        self.call(FakeOp::Config, |_| Ok(()))
    }
}

#[cfg(test)]
mod tests;
