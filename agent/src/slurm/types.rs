//! What Slurm knows, in our words. Times are unix seconds, memory is MiB.

/// A job's number. For one task of an array it is the task's own number (`squeue`'s `%A`), not `12_3`.
pub type JobId = u32;

/// Where a job stands. Slurm shows a job that ended on its nodes and goes back to the queue as `Completing`, then `Pending`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are Slurm's own, see squeue(1)")]
pub enum JobState {
    Pending,
    Configuring,
    Running,
    Suspended,
    Completing,
    Completed,
    Cancelled,
    Failed,
    Timeout,
    NodeFail,
    Preempted,
    BootFail,
    Deadline,
    OutOfMemory,
    /// Requeued and held with `scontrol requeuehold State=SpecialExit`: how a shim marks a job that met a broken node.
    SpecialExit,
    /// Requeued and held (`REQUEUE_HOLD`): waits for a release.
    RequeueHold,
    /// Requeued and still on its way back to the queue.
    Requeued,
    /// A state of a release newer than this program.
    Other(String),
}

impl JobState {
    /// Reads `squeue`'s long name. A flag behind the base state (`COMPLETING,…`) is dropped.
    #[must_use]
    pub fn read(text: &str) -> Self {
        match text.split([',', '+', ' ']).next().unwrap_or_default() {
            "PENDING" => Self::Pending,
            "CONFIGURING" => Self::Configuring,
            "RUNNING" | "RESIZING" | "SIGNALING" | "STAGE_OUT" => Self::Running,
            "SUSPENDED" | "STOPPED" => Self::Suspended,
            "COMPLETING" => Self::Completing,
            "COMPLETED" => Self::Completed,
            "CANCELLED" | "REVOKED" => Self::Cancelled,
            "FAILED" | "LAUNCH_FAILED" | "RECONFIG_FAIL" => Self::Failed,
            "TIMEOUT" => Self::Timeout,
            "NODE_FAIL" => Self::NodeFail,
            "PREEMPTED" => Self::Preempted,
            "BOOT_FAIL" => Self::BootFail,
            "DEADLINE" => Self::Deadline,
            "OUT_OF_MEMORY" => Self::OutOfMemory,
            "SPECIAL_EXIT" => Self::SpecialExit,
            "REQUEUE_HOLD" | "RESV_DEL_HOLD" => Self::RequeueHold,
            "REQUEUED" | "REQUEUE_FED" => Self::Requeued,
            _ => Self::Other(text.to_owned()),
        }
    }

    /// True if the job will never run again unless somebody requeues it.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        use JobState::*;
        matches!(
            self,
            Completed | Cancelled | Failed | Timeout | NodeFail | Preempted | BootFail | Deadline | OutOfMemory
        )
    }

    /// True if the job waits in the queue, held or not.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        matches!(self, Self::Pending | Self::SpecialExit | Self::RequeueHold | Self::Requeued)
    }

    /// True if the job has its nodes and its program may be running on them.
    #[must_use]
    pub fn is_on_nodes(&self) -> bool {
        matches!(self, Self::Running | Self::Configuring | Self::Suspended)
    }
}

/// What one node gives to a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeAlloc {
    /// The node's name.
    pub node: String,
    /// Slurm's numbers of the CPUs (abstract numbers: cores in Slurm's order, not the kernel's).
    pub cpus: Vec<u32>,
    /// Memory of the job on this node; 0 if Slurm does not hand out memory.
    pub mem_mib: u64,
}

/// One line of the cluster-wide poll.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobBrief {
    /// Its number.
    pub id: JobId,
    /// Who submitted it.
    pub uid: u32,
    /// The same by name.
    pub user: String,
    /// Where it stands.
    pub state: JobState,
    /// When Slurm chose it as a victim: grace began then. Never cleared until the job is requeued.
    pub preempt_time: Option<i64>,
    /// When this run began, or when it may begin at the earliest.
    pub start_time: Option<i64>,
    /// When this run will end at the latest; shortened at the start of grace.
    pub end_time: Option<i64>,
    /// 0 = held.
    pub priority: u64,
    /// How often it was requeued.
    pub restarts: u32,
    /// False for `srun` and `salloc`: these cannot be requeued.
    pub batch: bool,
    /// Its nodes, expanded; empty while it waits.
    pub nodes: Vec<String>,
    /// Where the batch script runs.
    pub batch_host: Option<String>,
    /// The partition, or a list of them while it waits.
    pub partition: String,
    /// The reservation it asks for or runs in.
    pub reservation: Option<String>,
    /// Why it waits, in Slurm's word.
    pub reason: String,
    /// Number of the array it belongs to and its index text (`3`, or `4-9` for tasks not yet split off).
    pub array: Option<(JobId, String)>,
    /// Leader and offset, if it is part of a heterogeneous job.
    pub het: Option<(JobId, u32)>,
    /// May be requeued.
    pub requeue: bool,
    /// Minutes; `None` = no limit.
    pub time_limit_min: Option<u32>,
    /// Nodes the user demanded by name.
    pub req_nodes: Vec<String>,
    /// The constraint.
    pub features: Option<String>,
}

impl JobBrief {
    /// True if it waits and is held.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.state.is_waiting() && self.priority == 0
    }

    /// True if it was chosen for preemption and still stands on its nodes.
    #[must_use]
    pub fn in_grace(&self) -> bool {
        self.preempt_time.is_some() && self.state.is_on_nodes()
    }
}

/// All that is asked about one job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobInfo {
    /// What the poll shows too.
    pub brief: JobBrief,
    /// The submitter's group.
    pub gid: u32,
    /// The same by name.
    pub group: String,
    /// Exit code and signal of the last run.
    pub exit: Option<(i32, i32)>,
    /// Number of nodes it has or wants.
    pub num_nodes: u32,
    /// Number of CPUs it has or wants.
    pub num_cpus: u32,
    /// Nodes it must not run on.
    pub exclude_nodes: Vec<String>,
    /// What the user took from its priority; `None` where Slurm did not say.
    pub nice: Option<i64>,
    /// What each node gives, in the order of the nodes; empty while it waits.
    pub allocs: Vec<NodeAlloc>,
    /// Free texts that the user chose. Never decide anything by them and never open a path found in them: a job can make them say anything.
    pub user_text: UserText,
    /// Generic resources that it has been given on its nodes: `gpu:1(IDX:0)`.
    pub gres: Vec<String>,
}

/// What a job asks for, or has: asked of Slurm only where places are given out.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct JobRequest {
    /// The job's number.
    pub id: JobId,
    /// Nodes that it has or wants, at least.
    pub nodes: u32,
    /// Nodes that it wants at most; `None` where Slurm says nothing.
    pub most_nodes: Option<u32>,
    /// CPUs on all of its nodes together.
    pub cpus: u32,
    /// MiB of memory on all of its nodes together; 0 if Slurm does not hand out memory.
    pub mem_mib: u64,
    /// Its CPUs may be spread over any number of nodes; `nodes` is Slurm's estimate then.
    pub any_nodes: bool,
    /// Wants its nodes for itself alone (`--exclusive`).
    pub exclusive: bool,
    /// Nodes that the user demanded by name.
    pub req_nodes: Vec<String>,
    /// Its QOS, where accounting has such.
    pub qos: Option<String>,
}

/// A quality of service of Slurm's accounting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QosInfo {
    /// Its name.
    pub name: String,
    /// Those whose jobs its own may preempt (`preempt/qos`).
    pub preempts: Vec<String>,
}

/// Texts under the user's control.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the names say it")]
pub struct UserText {
    pub comment: Option<String>,
    pub work_dir: Option<String>,
    pub std_out: Option<String>,
    pub std_err: Option<String>,
}

/// One node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeInfo {
    /// NodeName.
    pub name: String,
    /// `IDLE`, `MIXED`, `ALLOCATED`, `DOWN`, then flags such as `DRAIN`, `COMPLETING`, `NOT_RESPONDING`.
    pub state: Vec<String>,
    /// Why it is drained or down.
    pub reason: Option<String>,
    /// What slurm.conf gives it.
    pub available_features: Vec<String>,
    /// What counts for scheduling now.
    pub active_features: Vec<String>,
    /// CPUs in use.
    pub cpus_alloc: u32,
    /// CPUs that jobs can have.
    pub cpus_total: u32,
    /// Sockets times CoresPerSocket.
    pub cores: u32,
    /// ThreadsPerCore.
    pub threads_per_core: u32,
    /// Memory promised to jobs.
    pub mem_alloc_mib: u64,
    /// Memory of the node.
    pub mem_total_mib: u64,
    /// Its partitions.
    pub partitions: Vec<String>,
    /// slurmd's address.
    pub address: String,
}

impl NodeInfo {
    /// True if Slurm could start a job there, room apart.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.state
            .first()
            .is_some_and(|s| matches!(s.as_str(), "IDLE" | "MIXED" | "ALLOCATED"))
            && !self.state.iter().any(|s| {
                matches!(
                    s.as_str(),
                    "DRAIN"
                        | "DRAINED"
                        | "DRAINING"
                        | "FAIL"
                        | "DOWN"
                        | "NOT_RESPONDING"
                        | "MAINTENANCE"
                        | "POWERED_DOWN"
                        | "POWERING_DOWN"
                        | "POWER_DOWN"
                        | "INVALID"
                        | "INVALID_REG"
                        | "REBOOT_ISSUED"
                )
            })
    }

    /// True if an administrator asked for the node to be emptied.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.state.iter().any(|s| s == "DRAIN")
    }
}

/// What to change of a job; `None` and `false` leave things alone. An update is refused as a whole or carried out as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct JobUpdate {
    /// `Some(None)` takes it out of its reservation.
    pub reservation: Option<Option<String>>,
    /// Lifts the delay that a requeue brings (not while COMPLETING: then it is without effect).
    pub start_now: bool,
    /// Slurm keeps whole minutes. Refused once grace has begun.
    pub time_limit_min: Option<u32>,
    /// `Some(empty)` clears. Cannot be cleared while the job runs.
    pub req_nodes: Option<Vec<String>>,
    /// `Some(empty)` clears.
    pub exclude_nodes: Option<Vec<String>>,
    /// The constraint; only while it waits.
    pub features: Option<String>,
    /// The comment.
    pub comment: Option<String>,
    /// Its place in the queue. Refused while it is held.
    pub priority: Option<u64>,
    /// Whether it may be requeued.
    pub requeue: Option<bool>,
}

/// Which nodes a reservation holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReservationNodes {
    /// These; jobs that run there do not matter (`IGNORE_JOBS`). Keeps new jobs off the whole node.
    Named(Vec<String>),
    /// So many, which Slurm picks among the wholly idle ones, or refuses.
    Count(u32),
}

/// A reservation to make: from now on, without an end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReservationSpec {
    /// Its name; ours follow the job's number, so that making it twice is seen.
    pub name: String,
    /// Which nodes.
    pub nodes: ReservationNodes,
    /// Pick in this partition.
    pub partition: Option<String>,
    /// Pick nodes with these features (`a&b`).
    pub features: Option<String>,
    /// Whose jobs may use it.
    pub users: Vec<String>,
}

/// A reservation that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReservationInfo {
    /// Its name.
    pub name: String,
    /// Its nodes, expanded.
    pub nodes: Vec<String>,
    /// Whose jobs may use it.
    pub users: Vec<String>,
    /// Its partition.
    pub partition: Option<String>,
    /// Its features.
    pub features: Option<String>,
    /// Such as `IGNORE_JOBS`, `SPEC_NODES`.
    pub flags: Vec<String>,
    /// From when.
    pub start_time: Option<i64>,
    /// Until when.
    pub end_time: Option<i64>,
    /// True if it is in force.
    pub active: bool,
}

/// What of slurm.conf matters to us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlurmConfig {
    /// Such as `24.11.5`.
    pub version: String,
    /// ClusterName.
    pub cluster: String,
    /// SlurmUser by name.
    pub slurm_user: String,
    /// And by number.
    pub slurm_uid: u32,
    /// Such as `REQUEUE` or `GANG,SUSPEND`.
    pub preempt_mode: String,
    /// Such as `preempt/partition_prio`.
    pub preempt_type: String,
    /// Such as `priority/basic`.
    pub priority_type: String,
    /// Seconds for which a started job is safe from preemption.
    pub preempt_exempt_s: u64,
    /// Jobs may be requeued unless they say otherwise.
    pub job_requeue: bool,
    /// PrologFlags, split.
    pub prolog_flags: Vec<String>,
    /// Exit codes of a batch script for which Slurm runs its job again by itself: RequeueExit and RequeueExitHold.
    pub requeue_exit: Vec<i32>,
    /// Seconds between TERM and KILL.
    pub kill_wait_s: u64,
    /// AuthInfo, e.g. `cred_expire=10`.
    pub auth_info: Option<String>,
    /// Built with `--enable-multiple-slurmd`.
    pub multiple_slurmd: bool,
}

impl SlurmConfig {
    /// The release as (22, 5), (24, 11), ...
    #[must_use]
    pub fn release(&self) -> Option<(u32, u32)> {
        let mut parts = self.version.split('.').map(|p| p.parse().ok());
        Some((parts.next()??, parts.next()??))
    }
}

/// One partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionInfo {
    /// Its name.
    pub name: String,
    /// What happens to its jobs when they are preempted; `OFF` = never.
    pub preempt_mode: String,
    /// Seconds between the choice of a victim and its end.
    pub grace_s: u64,
    /// Higher ones preempt lower ones.
    pub priority_tier: u32,
    /// Its nodes, expanded.
    pub nodes: Vec<String>,
    /// True if it is `UP`.
    pub up: bool,
    /// True if jobs go here by default.
    pub is_default: bool,
}
