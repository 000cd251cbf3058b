//! What `svm` and administrators ask of an agent: one JSON line `{"v":1,"ask":…}` on the agent's socket, answered by
//! JSON lines of [`Answer`], the last of which is [`Answer::Done`] or [`Answer::Refused`].
//!
//! A node's agent knows its own VMs; the controller role knows the cluster's and passes a question on to the node
//! that has the VM. Users see their own jobs, root and SlurmUser all.
use serde::{Deserialize, Serialize};

/// The version of these questions.
pub const ASK_VERSION: u32 = 1;

/// A question as it stands on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AskLine {
    /// [`ASK_VERSION`]
    pub v: u32,
    /// The question.
    pub ask: Ask,
}

/// A question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// All VMs that the asker may see.
    List,
    /// All of one job.
    Show {
        /// Job id.
        job: u32,
    },
    /// Provisioning steps and the guest's serial log.
    Log {
        /// Job id.
        job: u32,
        /// Go on printing until the VM is gone.
        follow: bool,
    },
    /// Move a job's VM, to a node of Slurm's choice or a named one.
    Migrate {
        /// Job id.
        job: u32,
        /// Node name.
        to: Option<String>,
    },
    /// Stop a move that is under way; the VM goes on where it is.
    CancelMigration {
        /// Job id.
        job: u32,
    },
    /// Health of this agent (and of all nodes, from the controller).
    Health,
    /// Settings of slurm.conf that are missing or unwise.
    Check,
}

/// An answer, one JSON line each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// A VM, in reply to `List` and `Show`.
    Vm(Box<VmView>),
    /// Totals, after the VMs of a `List`.
    Totals(Box<Totals>),
    /// Text of a log, or progress of a move.
    Text(String),
    /// Health of one node.
    Node(NodeHealth),
    /// A finding of `Check`.
    Finding(Finding),
    /// The end, all well.
    Done,
    /// The end: the question was not carried out, and why.
    Refused(String),
}

/// One VM as its users see it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
pub struct VmView {
    /// Slurm's job id.
    pub job: u32,
    /// Owner's name.
    pub user: String,
    /// Owner's id.
    pub uid: u32,
    /// Node that has (or last had) the VM.
    pub node: String,
    /// libvirt's name of the domain.
    pub domain: String,
    /// State of the VM's life, as in the documentation.
    pub state: String,
    /// Image of the catalogue.
    pub image: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub mem_mib: u64,
    /// Memory of the job's allocation on the node in MiB.
    pub allocated_mib: u64,
    /// Host cores that the vCPUs are pinned to.
    pub cores: Vec<u32>,
    /// Bytes that the overlay takes on its storage.
    pub disk_bytes: u64,
    /// `kvm` or `qemu` (emulation).
    pub domain_type: String,
    /// Why that: set in the configuration, or what the probe guest found.
    #[serde(default)]
    pub domain_type_why: String,
    /// When the guest came up, Unix seconds.
    pub started_at: Option<u64>,
    /// Unix seconds at which the VM ended on this node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<u64>,
    /// Seconds the guest has been given so far.
    pub run_seconds: u64,
    /// Run number of the job on this node.
    pub run: u64,
    /// Slurm's count of the job's restarts, of the run that this is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restarts: Option<u32>,
    /// The batch script has ended in it by itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub script_ended: bool,
    /// Directories of the host that the guest sees, as `--vm-mount` has them: `SRC[:DST][:ro]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<String>,
    /// The guest's network, as `--vm-net` has it; empty where there is none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub network: String,
    /// What a preemption would do, and why.
    pub verdict: Option<String>,
    /// Why it is in this state, where that is not plain.
    pub why: Option<String>,
    /// Moves so far, oldest first.
    pub moves: Vec<MoveView>,
}

impl VmView {
    /// Nothing more is to come of it on its node.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.state.as_str(), "gone" | "stopped")
    }
}

/// One move of a VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
pub struct MoveView {
    /// `live`, `save` or `requeue`.
    pub way: String,
    /// From this node.
    pub from: String,
    /// To this node (empty while saved).
    pub to: String,
    /// When it ended, Unix seconds.
    pub at: u64,
    /// Bytes of memory and disk that were moved.
    pub bytes: u64,
    /// Seconds from start to end.
    pub seconds: f64,
    /// Milliseconds for which QEMU reports the guest stood still.
    pub downtime_ms: Option<u64>,
    /// Milliseconds for which the guest itself says it stood still.
    pub gap_ms: Option<u64>,
    /// What set it off: `preemption`, `drain` or `asked`.
    pub cause: String,
    /// `done`, or why it failed.
    pub outcome: String,
}

/// What VMs have been given.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
pub struct Totals {
    /// `cluster` or the node's name.
    pub scope: String,
    /// VMs alive now.
    pub vms: u32,
    /// Their virtual CPUs.
    pub vcpus: u32,
    /// Their guest memory in MiB.
    pub mem_mib: u64,
    /// Bytes of their overlays.
    pub disk_bytes: u64,
    /// Seconds that guests have run, those that have ended included.
    pub run_seconds: u64,
    /// vCPU seconds that guests were given, those that have ended included.
    pub vcpu_seconds: u64,
    /// VMs that have ended.
    pub ended: u64,
    /// Moves that were done.
    pub moves: u64,
    /// Bytes of memory and disk that moves carried.
    pub moved_bytes: u64,
}

/// Health of a node as its agent and the controller see it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
pub struct NodeHealth {
    /// Which storage its `shared_dir` is; the same on all nodes that have the same one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<String>,
    /// Node name.
    pub node: String,
    /// VMs may be started here.
    pub healthy: bool,
    /// Why not.
    pub why: Option<String>,
    /// Version of the agent.
    pub version: String,
    /// `kvm` or `qemu` and how that was found out.
    pub domain_type: String,
}

/// One thing of the site's Slurm configuration that costs something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// `error` (VM jobs cannot work) or `advice`.
    pub level: String,
    /// The setting.
    pub setting: String,
    /// What it is, what it should be, and what the difference costs.
    pub text: String,
}
