//! What goes into the core and what comes out of it.
use std::{fmt, path::PathBuf};

use slurm_vm_api::query::MoveView;

use super::{
    identity::{HandOverError, MoveIdentity, MoveQuestion},
    record::{Allocation, End, Plan, ProgramRecord},
};

/// Why an effect failed, by whose fault it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The request or the image is at fault: trying elsewhere would not help.
    Request(String),
    /// Node, libvirt or agent.
    Node(String),
}

impl Failure {
    /// The reason, whosever the fault is.
    #[must_use]
    pub fn why(self) -> String {
        match self {
            Self::Request(why) | Self::Node(why) => why,
        }
    }
}

impl From<Failure> for End {
    fn from(f: Failure) -> Self {
        match f {
            Failure::Request(why) => Self::Refused { why },
            Failure::Node(how) => Self::NodeFault { how },
        }
    }
}

/// Which end of a move has the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whereabouts {
    /// The source has it: its domain is there, and nothing of it runs at the destination.
    AtSource,
    /// The destination runs it.
    AtDestination,
    /// Neither has it.
    Nowhere,
    /// It cannot be told now. Nobody resumes; it is asked again.
    Unknown,
}

/// Asked by the source, whose own libvirt has no domain any more: whether the destination runs it.
impl From<Result<bool, String>> for Whereabouts {
    fn from(there: Result<bool, String>) -> Self {
        match there {
            Ok(true) => Self::AtDestination,
            Ok(false) => Self::Nowhere,
            Err(_) => Self::Unknown,
        }
    }
}

/// As above, where "no" and "no answer" are not told apart.
impl From<bool> for Whereabouts {
    fn from(there: bool) -> Self {
        if there { Self::AtDestination } else { Self::Unknown }
    }
}

/// A piece of output that was kept for a shim.
#[derive(Clone, PartialEq, Eq)]
pub struct KeptOutput {
    /// Program.
    pub program: u32,
    /// 0 stdout, 1 stderr.
    pub stream: usize,
    /// Offset of the first byte.
    pub offset: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl fmt::Debug for KeptOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            program,
            stream,
            offset,
            bytes,
        } = self;
        write!(f, "{} bytes of program {program}, stream {stream}, from {offset} on", bytes.len())
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// [`Effect::Prepare`] ended.
    Prepared(Result<(Allocation, Plan), Failure>),
    /// [`Effect::StartDomain`] ended.
    DomainStarted(Result<(), Failure>),
    /// The guest's helper answered.
    GuestUp {
        /// The kernel's boot id.
        boot_id: String,
    },
    /// The domain is no longer there, or no longer runs, without our doing.
    DomainEnded {
        /// What happened, as a fragment.
        how: String,
    },
    /// The process that serves a directory of the host to the guest has ended by itself: the guest waits for it for ever.
    DirectoryLost {
        /// The directory on the host.
        dir: PathBuf,
    },
    /// Slurm starts (or started) the job on this node.
    JobHere {
        /// Run number minted for it.
        run: u64,
    },
    /// The job has left this node (epilog), or is known to be over.
    Release,
    /// Time passed.
    Tick,
    /// [`Effect::Destroy`] ended.
    Destroyed(Result<(), String>),
    /// Somebody wants the VM on another node.
    MoveOut {
        /// The move.
        move_id: String,
        /// Destination node.
        to: String,
        /// `preemption`, `drain` or `asked`.
        cause: String,
    },
    /// The destination has prepared, or cannot.
    DestinationReady(Result<(), String>),
    /// [`Effect::Migrate`] ended: libvirt has the guest running there, or it says that it failed.
    Migrated(Result<Box<MoveView>, String>),
    /// [`Effect::AskOwner`] ended.
    OwnerIs(Whereabouts),
    /// [`Effect::AskDomain`] ended: libvirt here has the domain, or not; `None` when libvirt did not say.
    DomainIs(Option<bool>),
    /// [`Effect::AskJob`] ended: Slurm runs the job here, or not; `None` when Slurm did not say.
    JobIs(Option<bool>),
    /// The destination has taken over the output offsets, or not.
    HandedOver(Result<(), HandOverError>),
    /// Give the move up; the VM goes on here.
    CancelMove,
    /// Destination: the guest runs here now.
    Arrived,
    /// Destination: the source hands over a piece of output that it had kept; before `TookOver`. Answered by
    /// [`Effect::AnswerSource`].
    Kept {
        /// The move.
        by: MoveIdentity,
        /// The output.
        output: KeptOutput,
    },
    /// Destination: the source hands over the output offsets and the history. Answered by [`Effect::AnswerSource`].
    TookOver {
        /// The move.
        by: MoveIdentity,
        /// Programs with what was written of their output.
        programs: Vec<ProgramRecord>,
        /// Moves so far, this one included.
        moves: Vec<MoveView>,
    },
    /// Destination: the source gave the move up.
    Abandoned {
        /// The move.
        by: MoveIdentity,
    },
    /// The other end of a move asks who has the guest. Answered by [`Effect::AnswerAsked`].
    Asked {
        /// The move.
        by: MoveIdentity,
        /// What is asked.
        question: MoveQuestion,
        /// libvirt here has the domain, and it runs.
        runs: bool,
    },
    /// Save the VM and let the job be requeued.
    Save {
        /// Directory of the save.
        at: PathBuf,
        /// `preemption`, `drain` or `asked`.
        cause: String,
    },
    /// [`Effect::WriteSave`] ended.
    SaveWritten(Result<Box<MoveView>, String>),
    /// [`Effect::Restore`] ended.
    Restored(Result<Box<MoveView>, String>),
    /// [`Effect::ResumeDomain`] ended. A domain that is no longer there is [`Event::DomainEnded`] instead.
    Resumed(Result<(), String>),
    /// [`Effect::Pin`] ended, with what Slurm has allocated.
    Pinned(Result<Allocation, String>),
    /// Stop the VM so that the job can start over elsewhere.
    GiveUp,
    /// The wall clock was set by so many milliseconds (negative: back). Deadlines are spans of time, and move along.
    ClockStepped {
        /// Milliseconds.
        by_ms: i64,
    },
    /// The record, as it is now, has not been written for a while ([`super::gate`]). Effects in answer to it replace those that wait behind
    /// the write; without any they go on waiting.
    NotRecorded {
        /// What the file system says, as a fragment.
        why: String,
        /// The long effect that waits behind the write: it has not begun.
        waits: Option<super::Busy>,
    },
}

/// What is to be done; each ends in the event named. Of those that take long only one is under way at a time
/// ([`super::Vm::busy`]), questions apart.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Write the record to the ledger before anything that follows.
    Persist,
    /// Read the allocation, check the image, make the overlay: [`Event::Prepared`].
    Prepare,
    /// Create the domain, or find it created by an agent that was restarted since: [`Event::DomainStarted`].
    StartDomain,
    /// Connect to the guest's helper and keep the connection: [`Event::GuestUp`].
    OpenGuest,
    /// Drop the connection.
    CloseGuest,
    /// End the domain if there is one, and remove what belongs to it here: [`Event::Destroyed`].
    Destroy,
    /// Remove what belongs to the VM here while the domain lives elsewhere or in a save. A paused copy that libvirt has
    /// left here is ended: it must never run again.
    Clear,
    /// Tell the sessions.
    Sessions(SessionNews),
    /// A line for `svm log`.
    Journal(String),
    /// Answer who waits for the VM to have left this node.
    AnswerRelease(Result<(), String>),
    /// Ask the destination to prepare: [`Event::DestinationReady`].
    AskDestination,
    /// Copy the VM to the destination: [`Event::Migrated`].
    Migrate,
    /// Stop the copying (or the save): the pending [`Event::Migrated`] then fails. Repeated as long as that does not come.
    AbortMigration,
    /// Find out from libvirt here and the other end where the guest is, once no job runs on the domain here any more:
    /// [`Event::OwnerIs`].
    AskOwner,
    /// Ask libvirt here whether it has the domain: [`Event::DomainIs`].
    AskDomain,
    /// Ask Slurm whether it runs the job on this node: [`Event::JobIs`].
    AskJob,
    /// Let shims sync their output, then pass the offsets on: [`Event::HandedOver`]. Repeated when it failed.
    HandOver,
    /// Tell the destination to forget the move.
    AbandonDestination {
        /// The destination.
        to: String,
        /// The move.
        by: MoveIdentity,
    },
    /// Destination: take in the source's output offsets, before anything of the guest's output is asked for.
    Adopt(Vec<ProgramRecord>),
    /// Destination: take in output that the source had kept.
    Keep(KeptOutput),
    /// Destination: answer the source's word.
    AnswerSource(Result<(), HandOverError>),
    /// Answer the other end's question; `Err` says why it is to ask again.
    AnswerAsked(Result<bool, String>),
    /// Answer who asked for the move or the save.
    AnswerMove(Result<Box<MoveView>, String>),
    /// Pause the guest, let shims sync, write memory, overlay and manifest: [`Event::SaveWritten`].
    WriteSave,
    /// Let a paused guest run on: [`Event::Resumed`].
    ResumeDomain,
    /// Bring the VM back from a save and let it run: [`Event::Restored`]. A domain that is here already was restored by
    /// an agent that was restarted since. A save is restored once: from then on no node may find it.
    Restore,
    /// Set the guest's clock.
    SetClock,
    /// Read the allocation and pin the domain to it: [`Event::Pinned`].
    Pin,
}

/// What sessions (shims) are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionNews {
    /// For a terminal.
    Progress(String),
    /// The guest answers: programs may be started.
    Ready,
    /// The VM is no more.
    Lost(End),
    /// Nothing more is to be written: the VM is elsewhere or saved.
    Left,
    /// A save failed and the VM goes on.
    TakeBack,
}
