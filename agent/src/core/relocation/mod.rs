//! One move of one job as pure data: [`Relocation::on_event`] takes what happened and when, changes the ledger's record, and
//! says what is to be done. Slurm, agents and files are outside (`crate::controller::relocate`).
//!
//! ```text
//!  Planned ── place, MoveOut ──> Moved{to} ── requeue and hold ──> Requeued ── steer by the reservation,
//!     |  └─── Save ────────────> Moved{} ──── requeue ───────────────^  |       StartTime, TimeLimit; release
//!     |                             |                                   v
//!     └── requeue | cancel ──> (end)└── kept out: save at `to` ──> Released ── running at `to` ──> Landed ──> (end)
//! ```
//! Within `Planned` the preempt actions are tried in their order:
//!
//! ```text
//!  Choosing ─┬─ live ──> Placing ──> Queued ──> Copying ─┬─ done ──> Moved
//!            ├─ save ──> Saving ─────────────────────────┤
//!            ├─ requeue, cancel ──> order ──> (end)      ├─ refused ──> Choosing, the next action
//!            └─ none left ──> (end)                      └─ no word ──> Settling ── the source's word ──> any of these
//! ```
//! What can fail, and what then holds:
//!
//! * *No word from the source.* It is asked until it says where the VM is. As long as it says leaving or saving, or says nothing
//!   while the job is there, nothing else begins; past its time the copy is cancelled, and its end awaited.
//! * *Slurm does not answer.* Orders are repeated with the next poll, without an end: a held job is never left behind.
//! * *Slurm refuses.* A requeue: the job is made requeueable, and the order repeated. The steering: the VM is saved, and the job
//!   released without it. A release: repeated until the job runs or is over.
//! * *The job does not come to its VM*, whatever the step, by the time that the destination waits: the VM is saved there; if it
//!   cannot be, it is ended and the job gets its whole time limit back.
//! * *The job ends, is cancelled, or starts over elsewhere.* Its VM is ended where it waits, the place is given back.
//! * *A write to the ledger fails.* What stands behind it waits until it is written (see [`Effect::Persist`]).
//! * *The controller dies.* The ledger says at which step it was; each step may be made again.
mod planned;
mod record;
mod under_way;

#[cfg(test)]
mod tests;

pub use record::{JobMove, MOVE_VERSION, Resources, Step, TimeAccount};
use slurm_vm_api::query::MoveView;

/// What the cluster's poll shows of the job.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct JobSeen {
    /// Where it stands.
    pub standing: Standing,
    /// Slurm's count of its restarts.
    pub restarts: u32,
    /// Its nodes, where it has some.
    pub nodes: Vec<String>,
    /// It is being preempted, and its grace time runs.
    pub in_grace: bool,
    /// Slurm requeues the job by itself when its script ends in its grace time (24.05 and later).
    pub ends_by_itself: bool,
    /// Why it must not begin to move, as a fragment: Slurm would refuse to put it back into the queue.
    pub never: Option<String>,
    /// Why it cannot begin to move in its present state, as a fragment.
    pub not_now: Option<String>,
    /// A reservation of its user's that it runs in: a live move would take it out of that.
    pub reservation: Option<String>,
    /// Unix seconds at which this run began.
    pub start_s: Option<u64>,
    /// Its time limit in minutes; `None`: no limit.
    pub limit_min: Option<u32>,
    /// Nodes that its user demanded by name.
    pub req_nodes: Vec<String>,
}

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Standing {
    /// In the queue, held or not.
    #[default]
    Waiting,
    /// It has its nodes.
    OnNodes,
    /// It is leaving its nodes.
    Completing,
}

/// What the source says of its VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// It is being copied away or saved.
    UnderWay,
    /// It is at the destination.
    Gone,
    /// It is in a save.
    Saved,
    /// It has ended there, or is ending.
    Over,
    /// It runs there, or was never there.
    Stays,
    /// No answer.
    Silence,
}

impl Word {
    /// From the state's name in a view; `None`: the source knows no VM of the job.
    #[must_use]
    pub fn of(state: Option<&str>) -> Self {
        match state {
            Some("leaving" | "saving") => Self::UnderWay,
            Some("gone") => Self::Gone,
            Some("saved") => Self::Saved,
            Some("stopping" | "stopped") => Self::Over,
            _ => Self::Stays,
        }
    }
}

/// An agent's answer to a request that takes long.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// Done; what it reports.
    Done(Box<MoveView>),
    /// Not done, and why.
    Refused(String),
    /// The line broke, or the agent died: it may have been done.
    NoWord(String),
}

/// Why Slurm did not carry out an order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OrderError {
    /// It did not answer: it may have been carried out.
    NoAnswer(String),
    /// It refused.
    Refused(String),
}

/// An order to Slurm about the job. Each may be given twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// Back into the queue.
    Requeue {
        /// And held there.
        hold: bool,
    },
    /// Hold it in the queue.
    Hold,
    /// May be put back into the queue from now on.
    AllowRequeue,
    /// Send it where its VM is, or wherever it can be restored.
    Steer {
        /// The node whose reservation of ours it is to start in.
        reserved: Option<String>,
        /// The time limit in minutes, where it changes.
        limit_min: Option<u32>,
        /// Take away the node list of its user, to be put back later.
        req_nodes: Vec<String>,
    },
    /// Let it go.
    Release,
    /// The place in the queue that it had.
    Priority(u64),
    /// Its whole time limit in minutes, once its VM is lost.
    Limit(u32),
    /// End it.
    Cancel,
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The poll of the cluster; `None`: Slurm no longer has the job, or it has ended.
    Poll(Option<JobSeen>),
    /// A place was found and is held, or why there is none.
    Placed(Result<String, String>),
    /// Fewer moves than allowed are under way at both ends.
    Slot,
    /// The answer to [`Effect::MoveOut`] or [`Effect::Save`].
    Answered(Reply),
    /// The answer to [`Effect::AskSource`] or [`Effect::AskWaiting`].
    Source(Word),
    /// What came of the last [`Effect::Order`].
    Ordered(Result<(), OrderError>),
    /// The shim was told to end ([`Effect::Part`]), or could not be.
    Parted(bool),
    /// The place is held (again), or why not.
    PlaceKept(Result<(), String>),
    /// It is to be given up, if it still can be: the job has been preempted in the middle of a move without a deadline, or
    /// somebody cancels it. Why, as a fragment.
    GiveUp(String),
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Write the record durably. If that fails, nothing behind it may be done before it has been written.
    Persist,
    /// Find and hold a place, until `give_up_ms` at the latest; answered with [`Event::Placed`].
    FindPlace {
        /// Unix milliseconds; `None`: no limit.
        give_up_ms: Option<u64>,
    },
    /// Give the place back: take the job out of the reservation, and remove that with the last one in it.
    LeavePlace,
    /// Make the reservation again if Slurm has lost it; answered with [`Event::PlaceKept`].
    KeepPlace,
    /// Order the source to move the VM; answered with [`Event::Answered`].
    MoveOut {
        /// Destination.
        to: String,
    },
    /// Order a node to save the VM; answered with [`Event::Answered`].
    Save {
        /// The node that has it.
        at: String,
    },
    /// Order the source to cancel what is under way.
    CancelMove,
    /// Ask the source for its VM; answered with [`Event::Source`].
    AskSource,
    /// Ask the node where the VM waits for its job; answered with [`Event::Source`].
    AskWaiting {
        /// The node.
        node: String,
    },
    /// Tell the job's shim at the source to end; answered with [`Event::Parted`].
    Part,
    /// Order something of Slurm; answered with [`Event::Ordered`].
    Order(Order),
    /// End the VM that waits on this node.
    ReleaseVm {
        /// The node.
        node: String,
    },
    /// A line for the job's user, in the VM's journal.
    TellJob(String),
    /// A line for the controller's log.
    Log(String),
    /// The move is over, well or not.
    End(Result<String, String>),
}

/// What the machine waits for within a step. Not in the ledger: a restart begins each step anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Phase {
    /// The next poll.
    Look,
    /// A place.
    Placing,
    /// Fewer moves under way.
    Queued,
    /// The source's answer to `MoveOut`.
    Copying,
    /// The source's answer to `Save`.
    Saving,
    /// The source's word, since its answer was lost. `why`: what the answer's loss looked like.
    Settling {
        why: String,
        /// A question is out.
        asked: bool,
        /// When the copy is cancelled next.
        cancel_at_ms: u64,
    },
    /// Whether the script has ended already, before the job is requeued or cancelled.
    AskingEnd(Order),
    /// Slurm's answer to an order, and what was ordered.
    Ordering(Order),
    /// The order did not get through: repeat it with the next poll.
    OrderAgain(Order),
    /// The shim's end, by which Slurm requeues the job, until then.
    Parting { until_ms: u64 },
    /// The reservation, before the steering.
    Keeping,
    /// The destination's answer to `Save`: the job is kept out.
    KeptOut,
    /// The destination's word of what became of that, since it refused, or its answer was lost.
    KeptOutUnclear {
        why: String,
        /// If the VM just stays there, the save is ordered again.
        again: bool,
        /// A question is out.
        asked: bool,
    },
}

/// One move.
#[derive(Debug, Clone)]
pub struct Relocation {
    /// What the ledger holds.
    pub record: JobMove,
    pub(super) phase: Phase,
    /// It was read from the ledger: where the VM is has to be asked.
    pub(super) resumed: bool,
    /// What the last poll showed.
    pub(super) seen: Option<JobSeen>,
    /// Milliseconds that a destination waits for a job.
    pub(super) await_job_ms: u64,
    /// Priorities are the users' order of submission only, so that one can be set.
    pub(super) sets_priority: bool,
}

/// Milliseconds after which a copy without a deadline is cancelled.
pub(super) const MOST_MS: u64 = 3_600_000;
/// Milliseconds between two orders to cancel.
pub(super) const CANCEL_AGAIN_MS: u64 = 5_000;
/// Why the source is asked after a restart of the controller.
pub(super) const RESTARTED: &str = "the controller was restarted";
/// Milliseconds that a shim gets to end.
pub(super) const PART_MS: u64 = 15_000;

impl Relocation {
    /// A move that begins now. `await_job_ms`: how long a destination waits for a job; `sets_priority`: PriorityType is
    /// `priority/basic`.
    #[must_use]
    pub fn new(record: JobMove, await_job_ms: u64, sets_priority: bool) -> (Self, Vec<Effect>) {
        (Self::of(record, await_job_ms, sets_priority, false), vec![Effect::Persist])
    }

    /// A move of an earlier life of the controller.
    #[must_use]
    pub fn resumed(record: JobMove, await_job_ms: u64, sets_priority: bool) -> (Self, Vec<Effect>) {
        (Self::of(record, await_job_ms, sets_priority, true), vec![Effect::Persist])
    }

    /// What is to be remembered of the job's time when the move has ended well.
    #[must_use]
    pub fn time_after(&self) -> Option<TimeAccount> {
        self.record.time_after(self.seen.as_ref().map_or(0, |s| s.restarts))
    }

    fn of(record: JobMove, await_job_ms: u64, sets_priority: bool, resumed: bool) -> Self {
        Self {
            record,
            phase: Phase::Look,
            resumed,
            seen: None,
            await_job_ms,
            sets_priority,
        }
    }

    /// It waits for its turn among the moves of its two nodes.
    #[must_use]
    pub fn is_queued(&self) -> bool {
        self.phase == Phase::Queued
    }

    /// Memory is being copied.
    #[must_use]
    pub fn is_copying(&self) -> bool {
        self.phase == Phase::Copying || (self.record.step == Step::Planned && matches!(self.phase, Phase::Settling { .. }))
    }

    /// It waits for Slurm, so that the next poll is worth while sooner.
    #[must_use]
    pub fn waits_for_slurm(&self) -> bool {
        self.record.step != Step::Planned || matches!(self.phase, Phase::OrderAgain(_) | Phase::Parting { .. })
    }

    /// Takes in what happened at `now_ms` (Unix milliseconds) and says what is to be done, in this order.
    #[must_use]
    pub fn on_event(&mut self, now_ms: u64, event: Event) -> Vec<Effect> {
        if let Event::Poll(seen) = &event {
            self.seen.clone_from(seen);
        }
        match self.record.step {
            Step::Planned => self.planned(now_ms, event),
            Step::Moved => self.moved(now_ms, event),
            Step::Requeued => self.requeued(now_ms, event),
            Step::Released => self.released(now_ms, event),
            Step::Landed => self.landed(event),
        }
    }

    /// The next step, which begins with the next poll, or at once where it can.
    pub(super) fn enter(&mut self, step: Step) -> Vec<Effect> {
        let line = format!("move: {:?} -> {step:?}", self.record.step);
        self.record.step = step;
        self.record.moving = false;
        self.phase = Phase::Look;
        vec![Effect::Persist, Effect::Log(line)]
    }

    /// Something went wrong on the way; said once.
    pub(super) fn note(&mut self, why: String) -> Vec<Effect> {
        if self.record.notes.last() == Some(&why) {
            return vec![];
        }
        self.record.notes.push(why.clone());
        vec![Effect::Persist, Effect::Log(why)]
    }

    pub(super) fn because(&self) -> String {
        if self.record.notes.is_empty() {
            String::new()
        } else {
            format!(" ({})", self.record.notes.join("; "))
        }
    }

    pub(super) fn order(&mut self, order: Order) -> Vec<Effect> {
        self.phase = Phase::Ordering(order.clone());
        vec![Effect::Order(order)]
    }

    /// It runs again, after it was put back into the queue.
    pub(super) fn runs_again(&self, seen: &JobSeen) -> bool {
        seen.standing == Standing::OnNodes && seen.restarts > self.record.restarts
    }

    /// The place is no longer wanted.
    pub(super) fn leave_place(&mut self) -> Vec<Effect> {
        if self.record.held.take().is_some() {
            vec![Effect::LeavePlace, Effect::Persist]
        } else {
            vec![]
        }
    }

    pub(super) fn end(&mut self, outcome: Result<String, String>) -> Vec<Effect> {
        let mut effects = self.leave_place();
        effects.push(Effect::End(outcome));
        effects
    }
}
