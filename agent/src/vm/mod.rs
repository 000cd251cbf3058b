//! One owner thread per VM (`vm-JOB`): it alone has the [`crate::core::Vm`], its programs and its connection to the
//! guest. Everyone else sends a [`Request`] with a reply sender. Slow effects (libvirt, qemu-img, Slurm, peers) run on
//! threads of their own and come back as [`Request::Core`] events, so that the owner always answers.
//!
//! What can fail: an effect fails (the core decides), the agent dies (the ledger and libvirt say on restart where
//! to go on), the guest link breaks (it reconnects and resumes by offset), a shim dies (the next one resumes).
mod cause;
pub mod companions;
pub mod converge;
pub mod directories;
mod explain;
pub mod moving;
pub mod network;
pub mod outbox;
mod owner;
pub mod place;
pub mod prepare;
pub mod programs;
pub mod saving;
mod spool;
pub mod start;
pub mod supersede;
pub mod view;

use crossbeam_channel::Sender;
use slurm_vm_api::{
    query::{MoveView, VmView},
    session::{Cause, Frame, ToAgent},
};

use outbox::Pass;
pub use owner::{Birth, spawn};
pub use programs::Attach;

use crate::core::{Event, HandOverError, KeptOutput, MoveIdentity, MoveQuestion, ProgramRecord, Record, registry::Meeting};

/// What others ask of a VM's owner.
#[derive(Debug)]
pub enum Request {
    /// A run of the user's job begins on this node (prolog). A VM that is not for it learns nothing.
    JobHere {
        /// The job's user.
        uid: u32,
        /// Whether the VM is for this run.
        reply: Sender<Meeting>,
    },
    /// The job leaves this node; answered when the VM has left it, or could not be ended.
    Release(Sender<Result<(), String>>),
    /// A shim opens its session.
    Attach(Box<Attach>),
    /// A frame of a session.
    FromShim {
        /// The session.
        session: u64,
        /// The frame.
        frame: Frame<ToAgent>,
        /// The session's reader goes on when it is dropped.
        pass: Pass,
    },
    /// A session's connection ended.
    Detach {
        /// The session.
        session: u64,
    },
    /// Slurm has said what a SIGTERM means.
    Explained(Option<Cause>),
    /// What `svm` shows.
    View(Sender<VmView>),
    /// The record as it is, for moves and recovery.
    Record(Sender<Record>),
    /// Is the record written? Why it cannot be is the error.
    Recorded(Sender<Result<(), String>>),
    /// Something happened.
    Core(Event),
    /// Move the VM; answered when it has moved or stays.
    MoveOut {
        /// Where and how.
        order: moving::MoveOrder,
        /// What became of it.
        reply: Sender<Result<MoveView, String>>,
    },
    /// Save the VM; answered when it is saved or goes on.
    Save {
        /// `preemption`, `drain` or `asked`.
        cause: String,
        /// What became of it.
        reply: Sender<Result<MoveView, String>>,
    },
    /// Output that was kept in the save from which the VM is being restored.
    Saved(KeptOutput),
    /// Destination of a live move: output that the source had kept for a shim; comes before `TookOver`.
    Kept {
        /// The move.
        by: MoveIdentity,
        /// The output.
        output: KeptOutput,
        /// Taken or refused.
        reply: Sender<Result<(), HandOverError>>,
    },
    /// Destination of a live move: output offsets and history from the source.
    TookOver {
        /// The move.
        by: MoveIdentity,
        /// Programs with offsets.
        programs: Vec<ProgramRecord>,
        /// History.
        moves: Vec<MoveView>,
        /// Taken or refused.
        reply: Sender<Result<(), HandOverError>>,
    },
    /// The other end of a move asks who has the guest.
    Asked {
        /// The move.
        by: MoveIdentity,
        /// What is asked.
        question: MoveQuestion,
        /// libvirt here has the domain, and it runs.
        runs: bool,
        /// The answer, or why it is to ask again.
        reply: Sender<Result<bool, String>>,
    },
    /// Progress of the move that is under way, as one line; `None` when there is none.
    Progress(Sender<Option<String>>),
    /// The job is being preempted: should its script end now, that is put on record before Slurm learns of it.
    Grace,
    /// The job goes back into the queue: its shims end, quietly. A VM that is still here is of no more use.
    Part,
}
