//! A move in the controller's ledger.
use serde::{Deserialize, Serialize};
use slurm_vm_api::{query::MoveView, spec::PreemptWay};

/// Version of the format.
pub const MOVE_VERSION: u32 = 1;

/// CPUs and memory of, or on, one node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resources {
    /// CPUs.
    pub cpus: u32,
    /// MiB of memory.
    pub mem_mib: u64,
}

impl Resources {
    /// At least as much of both.
    #[must_use]
    pub fn has(self, other: Self) -> bool {
        self.cpus >= other.cpus && self.mem_mib >= other.mem_mib
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            cpus: self.cpus.saturating_add(other.cpus),
            mem_mib: self.mem_mib.saturating_add(other.mem_mib),
        }
    }

    /// What is left of it; nothing, where the other is more.
    #[must_use]
    pub fn less(self, other: Self) -> Self {
        Self {
            cpus: self.cpus.saturating_sub(other.cpus),
            mem_mib: self.mem_mib.saturating_sub(other.mem_mib),
        }
    }
}

/// A job's time limit over several moves: each run of a moved job is given only what is left, and Slurm keeps whole minutes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TimeAccount {
    /// The whole limit in minutes.
    pub full_min: u32,
    /// Seconds that runs before the last move have used.
    pub used_s: u64,
    /// The limit in minutes that the job was given at its last move.
    pub set_min: u32,
    /// Slurm's restart count of the run that was given it. A later run that no move led to starts over, with the whole limit.
    pub restarts: u32,
}

/// A move in the controller's ledger.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobMove {
    /// Format, [`MOVE_VERSION`].
    pub v: u32,
    /// Job id.
    pub job: u32,
    /// The job's user by name: reservations are made for it.
    pub user: String,
    /// `preemption`, `drain` or `asked`.
    pub cause: String,
    /// How far it is.
    pub step: Step,
    /// Source node.
    pub from: String,
    /// Destination, once chosen; or the node that was asked for.
    pub to: Option<String>,
    /// The destination was asked for by name.
    pub to_asked: bool,
    /// The node in whose reservation of ours the move is.
    #[serde(default)]
    pub held: Option<String>,
    /// What the VM takes on a node.
    #[serde(default)]
    pub needs: Resources,
    /// How many nodes the job has.
    #[serde(default = "one")]
    pub nodes: u32,
    /// Actions that are left, first first.
    pub ways: Vec<PreemptWay>,
    /// Unix milliseconds by which the job must have left.
    pub deadline_ms: Option<u64>,
    /// Milliseconds of that which a live move leaves for the actions after it.
    #[serde(default)]
    pub reserve_ms: u64,
    /// What earlier moves have used up of the job's time.
    #[serde(default)]
    pub time_before: Option<TimeAccount>,
    /// The job's whole time limit in minutes, once it is known.
    pub limit_min: Option<u32>,
    /// What is left of it.
    pub left_min: Option<u32>,
    /// Seconds of it that are used, by this run and by those before earlier moves.
    #[serde(default)]
    pub used_s: u64,
    /// Its priority before; `None` where it is not to be put back (a nice value, priorities that are computed).
    #[serde(default)]
    pub priority: Option<u64>,
    /// Slurm's restart count before.
    pub restarts: u32,
    /// Unix milliseconds at which the VM was known to be elsewhere.
    #[serde(default)]
    pub moved_ms: Option<u64>,
    /// Unix milliseconds since which the source has been asked what became of a copy whose answer was lost.
    #[serde(default)]
    pub settling_ms: Option<u64>,
    /// The VM was lost on the way: the job starts over.
    #[serde(default)]
    pub lost: bool,
    /// The constraint of the job: its destination must satisfy it.
    #[serde(default)]
    pub constraint: Option<String>,
    /// Nodes that the job must not have.
    #[serde(default)]
    pub exclude: Vec<String>,
    /// The job's partition.
    #[serde(default)]
    pub partition: String,
    /// What went wrong on the way.
    pub notes: Vec<String>,
    /// What the agents reported.
    pub done: Option<MoveView>,
    /// Its memory is being copied.
    pub moving: bool,
}

impl JobMove {
    /// What is to be remembered of the job's time when the move has ended well. `restarts`: Slurm's count now, which may have
    /// gone up by more than one on the way.
    #[must_use]
    pub fn time_after(&self, restarts: u32) -> Option<TimeAccount> {
        Some(TimeAccount {
            full_min: self.limit_min.filter(|_| !self.lost)?,
            used_s: self.used_s,
            set_min: self.left_min?,
            restarts: restarts.max(self.restarts + 1),
        })
    }
}

fn one() -> u32 {
    1
}

/// How far a move is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// The VM is at its source.
    Planned,
    /// The VM is at the destination or in a save, the job is not.
    Moved,
    /// The job is back in the queue.
    Requeued,
    /// It was released.
    Released,
    /// It runs again; the place is to be given back.
    Landed,
}
