//! What is known of a VM: the ledger's record, which is also what travels with a move or a save.
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use slurm_vm_api::{
    outcome,
    query::MoveView,
    session::{Ended, Sink, UserEntry},
    spec::{Network, VmSpec},
};

use super::{
    directories::Directory,
    identity::{ArrivedBy, MoveIdentity},
};

/// Version of the record's format; a reader takes its own and the one before ([`Record::parse`]).
///
/// Records outlive an update of the agent, travel to other nodes and lie in saves, so each change is asked twice:
/// * *New reader, old data*: a field that is added has a serde default, and the default means "as before".
/// * *Old reader, new data*: a field that an older agent may lose (it drops what it does not know when it writes the record
///   again) is added within the version. A field that it must not lose, and any new state or end, raises the version: the
///   older agent then refuses the record as a whole, says so, and leaves its domain alone.
///
/// `tests/record.rs` holds golden files of each version against this.
pub const RECORD_VERSION: u32 = 1;

/// All that is known of one VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// [`RECORD_VERSION`].
    pub v: u32,
    /// Slurm's ClusterName.
    pub cluster: String,
    /// Node that this record speaks for.
    pub node: String,
    /// Slurm's job id.
    pub job: u32,
    /// Which VM of the job on this node; 0 until jobs have several.
    pub k: u32,
    /// The job's user.
    pub user: UserEntry,
    /// What the user asked for.
    pub spec: VmSpec,
    /// Minted at the prolog: tells runs of one job apart (Slurm's restart count cannot, design 10).
    pub run: u64,
    /// Goes up with every change of owner, so that an older record never wins.
    pub generation: u64,
    /// Where the VM is in its life.
    pub life: Life,
    /// What Slurm gave the job on this node.
    pub allocation: Option<Allocation>,
    /// What the domain is made of, once that is known.
    pub plan: Option<Plan>,
    /// Programs that were started in the guest.
    pub programs: Vec<ProgramRecord>,
    /// Moves so far, oldest first.
    pub moves: Vec<MoveView>,
    /// Unix milliseconds of the request.
    pub created_ms: u64,
    /// Unix milliseconds when the guest came up.
    pub up_ms: Option<u64>,
    /// Unix milliseconds when the VM ended here.
    pub ended_ms: Option<u64>,
    /// The guest's boot id: the same before and after a move.
    pub boot_id: Option<String>,
    /// While the VM is on its way out again before its job has come here: by when the job must have come if it stays.
    #[serde(default)]
    pub await_until_ms: Option<u64>,
    /// The live move by which the VM came to this node; none where it began, or was restored. An agent that does not know the
    /// field may lose it: then what the source still has to hand over is refused, and the output goes on at what is on record.
    #[serde(default)]
    pub arrived_by: Option<ArrivedBy>,
    /// What is known of the job's present run here. An agent that does not know the field may lose it: then a script that ends in its grace
    /// time may be run a second time, as before there was this field.
    #[serde(default, skip_serializing_if = "RunState::is_plain")]
    pub run_state: RunState,
    /// How many boots of this VM here ended before the guest was up: after [`super::machine::BOOTS`] of them the VM is given up. An agent
    /// that does not know the field may lose it: then one boot more is tried.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub failed_boots: u32,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// The number is the same on all of Linux's platforms that have KVM.
const SIGTERM: i32 = 15;

/// What is known of the job's present run on this node; it ends with the run, and does not travel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunState {
    /// The job is being preempted. Slurm (24.05 and later) requeues it when its script ends from here on.
    pub in_grace: bool,
    /// Its shims were told to end so that the job starts over: what the program does now is for nobody.
    pub parted: bool,
    /// Slurm's restart count as the shims report it.
    pub restart: u32,
    /// The programs got a SIGTERM and Slurm did not say why: it may have been because of a requeue.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub term_unexplained: bool,
}

impl RunState {
    /// Nothing is known.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        *self == Self::default()
    }

    /// Slurm puts the job back into the queue when its script ends now, so that the end must be on record. A job that was requeued in its
    /// grace time is requeued once more when it ends: Slurm has not forgotten.
    #[must_use]
    pub fn is_run_again_at_its_end(&self) -> bool {
        (self.in_grace || self.restart > 0) && !self.parted
    }

    /// The end of the script counts for the next run, too. One that a SIGTERM of unknown cause may have ended does not: if that came with a
    /// requeue, the job is to run again.
    #[must_use]
    pub fn counts_for_the_next_run(&self, ended: &Ended) -> bool {
        self.is_run_again_at_its_end() && !(self.term_unexplained && *ended == Ended::Signal(SIGTERM))
    }
}

/// What Slurm gave the job on one node. Of a VM that has come to a node before its job nothing is given there yet: only the
/// run that it comes from is known.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allocation {
    /// CPUs by Slurm's (abstract) numbering.
    pub cores: Vec<u32>,
    /// The same by the kernel's, which the domain is pinned to; empty where nothing is pinned, because Slurm gave CPUs that
    /// the host does not have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pinned: Vec<u32>,
    /// Slurm's count of the job's restarts in the run that this was given to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restarts: Option<u32>,
    /// Memory in MiB; `None` where Slurm does not track memory.
    pub mem_mib: Option<u64>,
}

/// What a domain is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub mem_mib: u64,
    /// `kvm` or `qemu`.
    pub domain_type: String,
    /// The VM's overlay, when the image has a disk.
    pub overlay: Option<PathBuf>,
    /// The overlay is on storage that every node sees.
    pub overlay_shared: bool,
    /// Overlays of earlier saves that this one stands on, nearest first; empty for a VM that was never restored.
    #[serde(default)]
    pub layers: Vec<PathBuf>,
    /// SHA-256 of the base disk (hex), by which another node finds the same base.
    pub base_sha256: Option<String>,
    /// Size of the VM's disk in MiB, where it is larger than the image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mib: Option<u64>,
    /// The disk that brought the guest helper in: every node has it under the same name. An agent that does not know the field may lose it:
    /// as with the directories.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<PathBuf>,
    /// Directories of the host that the guest sees. An agent that does not know the field may lose it: then the guest, which still has
    /// the devices, is not restored or taken in there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub directories: Vec<Directory>,
    /// The guest's network. An agent that does not know the field may lose it: as with the directories.
    #[serde(default, skip_serializing_if = "Network::is_none")]
    pub network: Network,
}

/// One program of the job in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramRecord {
    /// Number of the program in the guest protocol.
    pub id: u32,
    /// [`program_key`].
    pub key: String,
    /// stdout and stderr are one stream.
    pub merged: bool,
    /// It has a terminal.
    pub terminal: bool,
    /// Where stdout went, when that was a regular file.
    pub stdout: Option<Sink>,
    /// Where stderr went, when that was a regular file.
    pub stderr: Option<Sink>,
    /// Bytes of stdout and stderr that a shim has reported written.
    pub wrote: [u64; 2],
    /// How it ended.
    pub ended: Option<Ended>,
    /// The guest has started it, as far as was known when this was written. One that was not, and that the guest does not know, may be
    /// started. An agent that does not know the field may lose it: then such a program counts as lost, as before there was the field.
    #[serde(default = "yes", skip_serializing_if = "is_so")]
    pub started: bool,
}

fn yes() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_so(so: &bool) -> bool {
    *so
}

/// Where a VM is in its life.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Life {
    /// Allocation is read, image checked, overlay made.
    Preparing,
    /// The domain was or is being created; the guest has not answered yet.
    Booting {
        /// Unix milliseconds by which the guest must have answered.
        deadline_ms: u64,
    },
    /// The guest runs here and this node owns it.
    Running,
    /// On its way to another node; this node owns it until the destination runs it.
    Leaving {
        /// Destination node.
        to: String,
        /// The move.
        #[serde(flatten)]
        by: MoveIdentity,
        /// How far it is.
        stage: LeavingStage,
    },
    /// Runs on another node now; never to be resumed here.
    Gone {
        /// The node that has it.
        to: String,
    },
    /// Expected from another node; that one owns it.
    Arriving {
        /// Source node.
        from: String,
        /// The move.
        #[serde(flatten)]
        by: MoveIdentity,
    },
    /// Runs here, while its job is not yet running here.
    AwaitingJob {
        /// Unix milliseconds by which the job must have started here.
        deadline_ms: u64,
    },
    /// Paused, its memory is being written to storage.
    Saving {
        /// Directory of the save.
        at: PathBuf,
    },
    /// In a save; whoever starts the job next restores it.
    Saved {
        /// Directory of the save.
        at: PathBuf,
    },
    /// Being restored from a save.
    Restoring {
        /// Directory of the save.
        from: PathBuf,
    },
    /// The domain is being ended and its files removed.
    Stopping {
        /// Why.
        why: End,
    },
    /// Nothing is left but this record.
    Stopped {
        /// Why.
        why: End,
    },
}

/// How far a leaving VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeavingStage {
    /// The destination has been asked to prepare.
    Preparing,
    /// Memory (and disk) is being copied, the guest runs here.
    Copying,
    /// The guest runs there; output offsets are being handed over.
    Finishing,
}

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// The job ended.
    Released,
    /// The guest did not answer in time.
    BootTimeout {
        /// Seconds it was given.
        seconds: u64,
    },
    /// The guest ended before it was up: the image cannot boot.
    BootFailed {
        /// What happened, as a fragment.
        how: String,
    },
    /// The guest crashed, powered off or was destroyed from outside.
    GuestLost {
        /// What happened, as a fragment.
        how: String,
    },
    /// Node, libvirt or agent are at fault: the job may try elsewhere.
    NodeFault {
        /// What happened, as a fragment.
        how: String,
    },
    /// The request or the image cannot be used.
    Refused {
        /// Why, as a fragment.
        why: String,
    },
    /// An arriving VM that never came.
    NotArrived,
    /// The job did not start here in time after a move.
    NotReadmitted,
    /// Given up for a requeue from the start.
    Requeued,
}

impl End {
    /// Exit code and line for a shim whose program cannot run on; `None` where the shim needs neither.
    #[must_use]
    pub fn verdict(&self) -> Option<(i32, String)> {
        match self {
            Self::Released | Self::NotArrived | Self::Requeued => None,
            Self::BootTimeout { seconds } => Some((
                outcome::BOOT_TIMEOUT.into(),
                format!("the guest did not come up within {seconds} s (see `svm log`)"),
            )),
            Self::BootFailed { how } => Some((
                outcome::BOOT_TIMEOUT.into(),
                format!("the guest did not come up: {how} (see `svm log`)"),
            )),
            Self::GuestLost { how } => Some((outcome::GUEST_LOST.into(), format!("the guest was lost: {how}"))),
            Self::NodeFault { how } => Some((outcome::NODE_FAULT.into(), how.clone())),
            Self::Refused { why } => Some((outcome::REFUSED.into(), why.clone())),
            Self::NotReadmitted => Some((
                outcome::GUEST_LOST.into(),
                "the job was not started again in time after its VM had moved".into(),
            )),
        }
    }
}

impl Life {
    /// One word for tables and logs.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Booting { .. } => "booting",
            Self::Running => "running",
            Self::Leaving { .. } => "leaving",
            Self::Gone { .. } => "gone",
            Self::Arriving { .. } => "arriving",
            Self::AwaitingJob { .. } => "awaiting-job",
            Self::Saving { .. } => "saving",
            Self::Saved { .. } => "saved",
            Self::Restoring { .. } => "restoring",
            Self::Stopping { .. } => "stopping",
            Self::Stopped { .. } => "stopped",
        }
    }

    /// Nothing of the VM is on this node any more but its record.
    #[must_use]
    pub fn is_over_here(&self) -> bool {
        matches!(self, Self::Gone { .. } | Self::Saved { .. } | Self::Stopped { .. })
    }

    /// This node may let the guest run.
    #[must_use]
    pub fn may_run_here(&self) -> bool {
        match self {
            Self::Booting { .. } | Self::Running | Self::AwaitingJob { .. } | Self::Restoring { .. } | Self::Saving { .. } => true,
            Self::Leaving { stage, .. } => *stage != LeavingStage::Finishing,
            _ => false,
        }
    }
}

impl Record {
    /// The VM comes to another node, or out of a save. What its job has there is known when it runs there; the run that the
    /// VM comes from stays known. Words of the move by which it came to the node before are not for it any more.
    pub fn come_to(&mut self, node: &str) {
        node.clone_into(&mut self.node);
        self.arrived_by = None;
        self.run_state = RunState::default();
        self.allocation = self.allocation.take().map(|given| Allocation {
            restarts: given.restarts,
            ..Allocation::default()
        });
    }

    /// Saves of this VM may be on shared storage. What a save that failed has left there the sweep finds.
    #[must_use]
    pub fn has_been_saved(&self) -> bool {
        let layers = self.plan.as_ref().is_some_and(|p| !p.layers.is_empty());
        layers || self.moves.iter().any(|m| matches!(m.way.as_str(), "save" | "restore"))
    }

    /// The job begins a run here.
    pub fn begin_run(&mut self, run: u64) {
        if self.run != run {
            self.run_state = RunState::default();
        }
        self.run = run;
    }

    /// A VM's record at its beginning: the first run, nothing prepared yet, made at time 0.
    #[must_use]
    pub fn new(cluster: String, node: String, job: u32, user: UserEntry, spec: VmSpec) -> Self {
        Self {
            v: RECORD_VERSION,
            cluster,
            node,
            job,
            k: 0,
            user,
            spec,
            run: 1,
            generation: 1,
            life: Life::Preparing,
            allocation: None,
            plan: None,
            programs: vec![],
            moves: vec![],
            created_ms: 0,
            up_ms: None,
            ended_ms: None,
            boot_id: None,
            await_until_ms: None,
            arrived_by: None,
            run_state: RunState::default(),
            failed_boots: 0,
        }
    }

    /// Reads a record of this version or the one before.
    ///
    /// # Errors
    /// A fragment that says what is not understood.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Version {
            v: u32,
        }
        // The version first: what else is in a newer record is not to be guessed at.
        let Version { v } = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        if v == 0 || v > RECORD_VERSION || v + 1 < RECORD_VERSION {
            return Err(format!("version {v}, this agent reads {RECORD_VERSION}"));
        }
        let record: Self = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
        Ok(Self {
            v: RECORD_VERSION,
            ..record
        })
    }

    /// libvirt's name of the domain, the same on every node.
    #[must_use]
    pub fn domain(&self) -> String {
        domain_name(self.job, self.k)
    }

    /// libvirt's uuid of the domain: version 5 of cluster, job and k, so that every node derives the same.
    #[must_use]
    pub fn uuid(&self) -> uuid::Uuid {
        domain_uuid(&self.cluster, self.job, self.k)
    }

    /// How names of the VM's files on shared storage begin: another cluster's VM of the same job number has others.
    #[must_use]
    pub fn file_stem(&self) -> String {
        file_stem(&self.cluster, self.job, self.k)
    }

    /// The program of a step's task, if it was ever started.
    #[must_use]
    pub fn program(&self, key: &str) -> Option<&ProgramRecord> {
        self.programs.iter().find(|p| p.key == key)
    }

    /// As [`Record::program`], to change it.
    pub fn program_mut(&mut self, id: u32) -> Option<&mut ProgramRecord> {
        self.programs.iter_mut().find(|p| p.id == id)
    }
}

fn domain_uuid(cluster: &str, job: u32, k: u32) -> uuid::Uuid {
    let name = format!("{cluster}/{job}/{k}");
    uuid::Uuid::new_v5(
        &uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_URL, b"https://slurm-vm.org/"),
        name.as_bytes(),
    )
}

/// As [`Record::file_stem`]: the domain's name, and the first part of its uuid, which tells clusters apart.
#[must_use]
pub fn file_stem(cluster: &str, job: u32, k: u32) -> String {
    let uuid = domain_uuid(cluster, job, k).simple().to_string();
    format!("{}.{}", domain_name(job, k), &uuid[..8])
}

/// libvirt's name of a job's domain.
#[must_use]
pub fn domain_name(job: u32, k: u32) -> String {
    format!("slurm-{job}-{k}")
}

/// Name of a program within its job: `batch.0`, or `3.1/2` for task 1 of step 3 in run 2 ([`Record::run`]). The batch script goes on in the
/// next run of a job that moves; its steps end with theirs, and Slurm counts steps from 0 again. A step's own word on its run is not asked
/// for: srun does not know of restarts.
#[must_use]
pub fn program_key(step: u32, task: u32, run: u64) -> String {
    if step == slurm_vm_api::session::BATCH_STEP {
        format!("batch.{task}")
    } else {
        format!("{step}.{task}/{run}")
    }
}

/// Whether a program belongs to a step of another run than this one.
#[must_use]
pub fn is_of_another_run(key: &str, run: u64) -> bool {
    key.split_once('/').is_some_and(|(_, of)| of.parse() != Ok(run))
}
