//! What agents say to each other, over the authenticated channel of [`crate::peer`]: one request, one reply. The handshake settles the version
//! ([`crate::peer::VERSIONS`]); `tests/words.rs` has each word of a version as it was recorded.
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use slurm_vm_api::query::{MoveView, NodeHealth, Totals, VmView};

use crate::core::{MoveIdentity, MoveQuestion, ProgramRecord, Record, directories::Mark};

/// A request to another agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PeerRequest {
    /// Health, VMs and totals; the controller's poll.
    Status,
    /// One job.
    Show {
        /// Job id.
        job: u32,
    },
    /// Logs of a job from these offsets on.
    Log {
        /// Job id.
        job: u32,
        /// Offset in the journal.
        journal: u64,
        /// Offset in the serial log.
        serial: u64,
    },
    /// Controller: move a VM out; answered when it has moved or stays.
    MoveOut {
        /// Job id.
        job: u32,
        /// Destination node.
        to: String,
        /// Its address.
        address: String,
        /// `preemption`, `drain` or `asked`.
        cause: String,
        /// Unix milliseconds by which it must have left, where there is such a time.
        deadline_ms: Option<u64>,
    },
    /// Controller: save a VM to shared storage; answered when it is saved or goes on.
    Save {
        /// Job id.
        job: u32,
        /// `preemption`, `drain` or `asked`.
        cause: String,
    },
    /// Controller: stop the move that is under way.
    CancelMove {
        /// Job id.
        job: u32,
    },
    /// Controller: how a move is going, as a line.
    Progress {
        /// Job id.
        job: u32,
    },
    /// Controller: the job is to move (`preempted`: its grace time has begun); answered with the ways that it allows.
    Grace {
        /// Job id.
        job: u32,
        /// It is being preempted: should it end now, that must be remembered, Slurm requeues it all the same.
        preempted: bool,
    },
    /// Controller: the VM has left, or is given up for a run from the start; the batch shim is to end, so that Slurm
    /// requeues the job by itself.
    Part {
        /// Job id.
        job: u32,
    },
    /// Controller: a line for the journal of the job's VM.
    Note {
        /// Job id.
        job: u32,
        /// The line.
        line: String,
    },
    /// Controller: the job is over and no epilog will come for a VM that waits for it.
    Release {
        /// Job id.
        job: u32,
    },
    /// Source: prepare for a VM; answered when it may come.
    Import {
        /// The record, still in the source's words: leaving, and by which move.
        record: Box<Record>,
        /// Token that the relay's connections must show.
        token: String,
        /// Size in bytes of an overlay that is copied along; `None` when storage is shared.
        copy_overlay: Option<u64>,
        /// CPU model, QEMU and libvirt of the source, for the compatibility check.
        host: HostFacts,
        /// By which the destination knows the directories of the host that the guest sees, in the record's order.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        marks: Vec<Mark>,
    },
    /// Source: the guest runs at the destination; here is what was written of its output.
    TakeOver {
        /// Job id.
        job: u32,
        /// The move.
        by: MoveIdentity,
        /// Programs.
        programs: Vec<ProgramRecord>,
        /// History.
        moves: Vec<MoveView>,
    },
    /// Source, before `TakeOver`: output that was kept for a shim, a piece at a time.
    Kept {
        /// Job id.
        job: u32,
        /// The move.
        by: MoveIdentity,
        /// Program.
        program: u32,
        /// 0 stdout, 1 stderr.
        stream: usize,
        /// Offset of the first byte.
        offset: u64,
        /// The bytes in hexadecimal.
        hex: String,
    },
    /// Source: the move was given up.
    Abandon {
        /// Job id.
        job: u32,
        /// The move.
        by: MoveIdentity,
    },
    /// The job has started over on the asking node: a VM that waits for it here is ended. `Ok` when none is here (any
    /// more), `Refused` while it could not be ended.
    Supersede {
        /// Job id.
        job: u32,
        /// Slurm's count of its restarts in the run on the asking node: VMs of earlier runs are meant.
        restarts: u32,
    },
    /// One end of a move asks the other who has its guest.
    RunsHere {
        /// Job id.
        job: u32,
        /// The move.
        by: MoveIdentity,
        /// What is asked; by which end follows from it.
        question: MoveQuestion,
    },
}

impl PeerRequest {
    /// What is asked, as it is named in messages: all there are.
    pub const KINDS: [&str; 17] = [
        "status",
        "show",
        "log",
        "move_out",
        "save",
        "cancel_move",
        "progress",
        "grace",
        "part",
        "note",
        "release",
        "import",
        "take_over",
        "kept",
        "abandon",
        "supersede",
        "runs_here",
    ];

    /// What is asked: one of [`PeerRequest::KINDS`].
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Show { .. } => "show",
            Self::Log { .. } => "log",
            Self::MoveOut { .. } => "move_out",
            Self::Save { .. } => "save",
            Self::CancelMove { .. } => "cancel_move",
            Self::Progress { .. } => "progress",
            Self::Grace { .. } => "grace",
            Self::Part { .. } => "part",
            Self::Note { .. } => "note",
            Self::Release { .. } => "release",
            Self::Import { .. } => "import",
            Self::TakeOver { .. } => "take_over",
            Self::Kept { .. } => "kept",
            Self::Abandon { .. } => "abandon",
            Self::Supersede { .. } => "supersede",
            Self::RunsHere { .. } => "runs_here",
        }
    }
}

/// What the destination must match.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct HostFacts {
    /// Version of the agent.
    pub agent: String,
    /// `kvm` or `qemu`.
    pub domain_type: String,
    /// Configured CPU model.
    pub cpu_model: String,
    /// QEMU's version.
    pub qemu: String,
    /// Which storage its `shared_dir` is.
    #[serde(default)]
    pub storage: Option<String>,
}

/// The reply.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PeerReply {
    /// To `Status`.
    Status {
        /// Health.
        health: NodeHealth,
        /// VMs, alive and over.
        vms: Vec<VmView>,
        /// Totals.
        totals: Totals,
    },
    /// To `Show`.
    Vm(Option<Box<VmView>>),
    /// To `Log`: what has come since, and whether the VM is over.
    Log {
        /// Journal.
        journal: String,
        /// Bytes of the journal read.
        journal_bytes: u64,
        /// Serial log.
        serial: String,
        /// Bytes of the serial log read.
        serial_bytes: u64,
        /// Nothing more will come.
        over: bool,
    },
    /// To `MoveOut` and `Save`.
    Moved(Box<MoveView>),
    /// To `Import`: what the domain's disk is made of at the destination.
    Ready {
        /// Overlay, base and the base's format; `None` without a disk.
        disk: Option<(PathBuf, PathBuf, String)>,
    },
    /// To `Grace`.
    Ways {
        /// The job's ways, first first.
        ways: Vec<slurm_vm_api::spec::PreemptWay>,
        /// Milliseconds that the ways after `live` need before the grace time ends.
        reserve_ms: u64,
    },
    /// To `Progress`.
    Progress(Option<String>),
    /// To `RunsHere`; while it cannot be told, `Refused`.
    RunsHere(bool),
    /// To `Kept` and `TakeOver`, for good: the VM here did not come by this move, or is over. Why, as a fragment.
    NotThisMove(String),
    /// Done.
    Ok,
    /// Not done, and why.
    Refused(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_between_the_ends_of_a_move_that_does_not_name_the_move_is_not_understood() {
        let by = r#""by": {"move_id": "7-n1-1", "run": 1, "generation": 1}"#;
        for word in [
            r#"{"take_over": {BY "job": 7, "programs": [], "moves": []}}"#,
            r#"{"kept": {BY "job": 7, "program": 1, "stream": 0, "offset": 0, "hex": ""}}"#,
            r#"{"runs_here": {BY "job": 7, "question": "has_come"}}"#,
            r#"{"abandon": {BY "job": 7}}"#,
        ] {
            let named: Result<PeerRequest, _> = serde_json::from_str(&word.replace("BY", &format!("{by},")));
            assert!(named.is_ok(), "{named:?}");
            let unnamed: Result<PeerRequest, _> = serde_json::from_str(&word.replace("BY", r#""move_id": "7-n1-1","#));
            assert!(unnamed.is_err(), "{unnamed:?}");
        }
    }
}
