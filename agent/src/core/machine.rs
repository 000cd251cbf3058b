//! One VM, and the steps that transitions are made of.
use slurm_vm_api::query::MoveView;

use super::{
    event::{Effect, SessionNews},
    identity::{ArrivedBy, HandOverError, MoveIdentity},
    life::ms_to_s,
    record::{Allocation, End, LeavingStage, Life, ProgramRecord, Record},
    recovery::Unclear,
};

/// One VM.
#[derive(Debug, Clone)]
pub struct Vm {
    /// What the ledger holds.
    pub record: Record,
    /// The long effect that is under way.
    pub(super) busy: Option<Busy>,
    /// A question is under way ([`Effect::AskOwner`], [`Effect::AskDomain`], [`Effect::AskJob`]).
    pub(super) asking: bool,
    /// What is to become of the VM as soon as the effect under way has ended: the job left, or the guest was lost.
    pub(super) then: Option<End>,
    /// It is said that the guest was lost; libvirt is asked whether it is so.
    pub(super) lost: Option<String>,
    /// Slurm has not said since the agent's restart whether the job is still here: its epilog may have been missed.
    pub(super) job_unsure: bool,
    /// When libvirt is asked for the domain next.
    pub(super) look_at_ms: u64,
    /// The move is to be given up.
    pub(super) cancelled: bool,
    /// How often an effect that is tried again has failed in this state.
    pub(super) failures: u32,
    /// When it is tried again.
    pub(super) retry_at_ms: u64,
    /// Letting the guest run on has failed.
    pub(super) resume_failed: bool,
    /// Since when it is not known who has the guest.
    pub(super) unknown_since_ms: Option<u64>,
    /// By when an arriving VM must have come, before the source is asked.
    pub(super) arrive_by_ms: Option<u64>,
    /// Why the copying failed, until it is known where the guest goes on.
    pub(super) move_failed: Option<String>,
    /// Slurm has started the job here, before its VM has come.
    pub(super) job_here: bool,
    /// Arrived by a live move, and the source has not handed over the output offsets yet: until it has (or the job is
    /// here), the guest's output is left in its rings.
    pub(super) offsets_pending: bool,
    /// A deadline from before a restart of the agent counts anew.
    pub(super) deadline_is_old: bool,
    /// Whether the domain is pinned to what Slurm gave its job here.
    pub(super) pinning: Pinning,
    /// What has to be known before a recovered VM may go on.
    pub(super) unclear: Option<Unclear>,
}

/// Whether a domain is pinned to the CPUs that Slurm gave its job on this node. One that begins here is from its start. Another node's CPUs mean nothing here,
/// and which ones the job has here is known only once it runs here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pinning {
    Done,
    /// `told`: the log has why it failed.
    Due {
        at_ms: u64,
        told: bool,
    },
    UnderWay {
        told: bool,
    },
}

impl Pinning {
    pub(super) const NOW: Self = Self::Due { at_ms: 0, told: false };
}

/// The effects that take long and end in an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Busy {
    /// [`Effect::Prepare`]
    Prepare,
    /// [`Effect::StartDomain`]
    Start,
    /// [`Effect::AskDestination`]
    AskDestination,
    /// [`Effect::Migrate`]
    Migrate,
    /// [`Effect::HandOver`]
    HandOver,
    /// [`Effect::WriteSave`]
    Save,
    /// [`Effect::Restore`]
    Restore,
    /// [`Effect::Destroy`]
    Destroy,
}

impl Busy {
    /// The long effect that this is, if it is one.
    #[must_use]
    pub fn of(effect: &Effect) -> Option<Self> {
        Some(match effect {
            Effect::Prepare => Self::Prepare,
            Effect::StartDomain => Self::Start,
            Effect::AskDestination => Self::AskDestination,
            Effect::Migrate => Self::Migrate,
            Effect::HandOver => Self::HandOver,
            Effect::WriteSave => Self::Save,
            Effect::Restore => Self::Restore,
            Effect::Destroy => Self::Destroy,
            _ => return None,
        })
    }
}

/// Boots that are tried before a VM whose guest was never up is given up.
pub const BOOTS: u32 = 2;

/// How often ending a domain is tried before the epilog is told.
pub(super) const DESTROY_ATTEMPTS: u32 = 3;
/// How often the output offsets are offered to the destination.
pub(super) const HAND_OVER_ATTEMPTS: u32 = 2;
/// Milliseconds between two looks at a domain that should run: an event of its end may have been lost.
const LOOK_MS: u64 = 30_000;
/// Milliseconds between two tries of the same.
pub(super) const RETRY_MS: u64 = 2_000;
/// The longest pause between two tries of ending a domain.
pub(super) const RETRY_MOST_MS: u64 = 60_000;
/// How long a job that has left waits for word from a destination that does not answer.
pub(super) const UNKNOWN_MS: u64 = 30_000;

impl Vm {
    pub(super) fn of(record: Record) -> Self {
        Self {
            record,
            busy: None,
            asking: false,
            then: None,
            lost: None,
            job_unsure: false,
            look_at_ms: 0,
            cancelled: false,
            failures: 0,
            retry_at_ms: 0,
            resume_failed: false,
            unknown_since_ms: None,
            arrive_by_ms: None,
            move_failed: None,
            job_here: false,
            offsets_pending: false,
            deadline_is_old: false,
            pinning: Pinning::NOW,
            unclear: None,
        }
    }

    /// A VM that begins here because its job does.
    #[must_use]
    pub fn new(record: Record) -> (Self, Vec<Effect>) {
        let line = format!(
            "run {} of job {} for {}: preparing image {}",
            record.run, record.job, record.user.name, record.spec.image
        );
        let mut vm = Self::of(record);
        let work = vm.begin(Busy::Prepare);
        (vm, vec![Effect::Persist, Effect::Journal(line), work])
    }

    /// A VM that cannot begin here, although its job does: the job may try elsewhere.
    #[must_use]
    pub fn failed(record: Record, how: String) -> (Self, Vec<Effect>) {
        let mut vm = Self::of(record);
        let effects = vm.stop(End::NodeFault { how });
        (vm, effects)
    }

    /// A VM that is expected from another node, or comes from a save: `record.life` says which.
    #[must_use]
    pub fn expected(record: Record) -> (Self, Vec<Effect>) {
        let mut vm = Self::of(record);
        vm.record.await_until_ms = None;
        let mut effects = vec![Effect::Persist];
        match &vm.record.life {
            Life::Restoring { from } => {
                effects.push(Effect::Journal(format!("restoring from {}", from.display())));
                effects.push(vm.begin(Busy::Restore));
            }
            Life::Arriving { from, .. } => effects.push(Effect::Journal(format!("expecting the VM from {from}"))),
            _ => {}
        }
        (vm, effects)
    }

    /// The long effect that is under way.
    #[must_use]
    pub fn busy(&self) -> Option<Busy> {
        self.busy
    }

    pub(super) fn begin(&mut self, work: Busy) -> Effect {
        self.busy = Some(work);
        match work {
            Busy::Prepare => Effect::Prepare,
            Busy::Start => Effect::StartDomain,
            Busy::AskDestination => Effect::AskDestination,
            Busy::Migrate => Effect::Migrate,
            Busy::HandOver => Effect::HandOver,
            Busy::Save => Effect::WriteSave,
            Busy::Restore => Effect::Restore,
            Busy::Destroy => Effect::Destroy,
        }
    }

    /// The effect under way has ended; `false` if it was not under way, so that its event is an old one.
    pub(super) fn ended(&mut self, work: Busy) -> bool {
        let was = self.busy == Some(work);
        if was {
            self.busy = None;
        }
        was
    }

    pub(super) fn ask(&mut self, question: Effect) -> Effect {
        self.asking = true;
        question
    }

    pub(super) fn enter(&mut self, life: Life) {
        self.record.life = life;
        self.asking = false;
        self.look_at_ms = 0;
        self.failures = 0;
        self.retry_at_ms = 0;
        self.resume_failed = false;
        self.unknown_since_ms = None;
        self.move_failed = None;
        self.deadline_is_old = false;
    }

    pub(super) fn stop(&mut self, why: End) -> Vec<Effect> {
        let line = why
            .verdict()
            .map_or_else(|| "stopping: the job has left".to_owned(), |(_, line)| format!("stopping: {line}"));
        self.enter(Life::Stopping { why: why.clone() });
        (self.then, self.lost, self.cancelled, self.unclear) = (None, None, false, None);
        let mut effects = vec![
            Effect::Persist,
            Effect::Journal(line),
            Effect::CloseGuest,
            Effect::Sessions(SessionNews::Lost(why)),
        ];
        // What is being made is ended once it has been made: ended before, it would come up afterwards with no owner.
        if self.busy.is_none() {
            effects.push(self.begin(Busy::Destroy));
        }
        effects
    }

    /// The guest was never up, so nothing of the job has begun: it is booted once more, from a new disk, before the job is given up. A boot
    /// that hangs or resets is rarely the image's fault.
    pub(super) fn boot_failed(&mut self, why: End) -> Vec<Effect> {
        self.record.failed_boots += 1;
        if self.record.failed_boots >= BOOTS {
            return self.stop(why);
        }
        let line = match &why {
            End::BootTimeout { seconds } => format!("the guest did not come up within {seconds} s: booting it once more, from a new disk"),
            End::BootFailed { how } => format!("the guest did not come up: {how}: booting it once more, from a new disk"),
            _ => return self.stop(why),
        };
        self.enter(Life::Preparing);
        self.lost = None;
        vec![
            Effect::Persist,
            Effect::Journal(line.clone()),
            Effect::CloseGuest,
            Effect::Sessions(SessionNews::Progress(line)),
            self.begin(Busy::Destroy),
        ]
    }

    /// The guest goes on here: its job runs here, or is still awaited.
    pub(super) fn go_on(&mut self, line: String) -> Vec<Effect> {
        let life = self
            .record
            .await_until_ms
            .take()
            .map_or(Life::Running, |deadline_ms| Life::AwaitingJob { deadline_ms });
        self.enter(life);
        (self.then, self.cancelled) = (None, false);
        let mut effects = vec![Effect::Persist, Effect::Journal(line)];
        if self.lost.is_some() {
            effects.push(self.ask(Effect::AskDomain));
        }
        effects
    }

    /// Pinning, if it is time.
    pub(super) fn pin(&mut self, now_ms: u64) -> Option<Effect> {
        match self.pinning {
            Pinning::Due { at_ms, told } if self.record.life == Life::Running && now_ms >= at_ms => {
                self.pinning = Pinning::UnderWay { told };
                Some(Effect::Pin)
            }
            _ => None,
        }
    }

    /// What pinning came to. The guest goes on when it failed: a guest on the wrong CPUs is slower, and none is worse.
    pub(super) fn pinned(&mut self, now_ms: u64, done: Result<Allocation, String>) -> Vec<Effect> {
        let Pinning::UnderWay { told } = self.pinning else { return vec![] };
        match done {
            Ok(allocation) => {
                self.pinning = Pinning::Done;
                if self.record.allocation.as_ref() == Some(&allocation) {
                    return vec![];
                }
                let line = if allocation.pinned.is_empty() {
                    "not pinned: this host has other CPUs than Slurm allocates".to_owned()
                } else {
                    let cpus: Vec<String> = allocation.pinned.iter().map(u32::to_string).collect();
                    format!("pinned to CPU {}", cpus.join(","))
                };
                self.record.allocation = Some(allocation);
                vec![Effect::Persist, Effect::Journal(line)]
            }
            Err(why) => {
                self.pinning = Pinning::Due {
                    at_ms: now_ms + LOOK_MS,
                    told: true,
                };
                if told {
                    vec![]
                } else {
                    vec![Effect::Journal(format!("cannot pin the guest to its CPUs, trying again: {why}"))]
                }
            }
        }
    }

    /// What is to be asked of libvirt or Slurm about a VM that should run, if it is time.
    pub(super) fn look(&mut self, now_ms: u64) -> Option<Effect> {
        let pause = if self.lost.is_some() || self.job_unsure {
            RETRY_MS
        } else {
            LOOK_MS
        };
        if self.look_at_ms == 0 {
            self.look_at_ms = now_ms + pause;
        }
        if self.asking || self.busy.is_some() || now_ms < self.look_at_ms {
            return None;
        }
        self.look_at_ms = now_ms + pause;
        let slurm = self.job_unsure && self.lost.is_none();
        Some(self.ask(if slurm { Effect::AskJob } else { Effect::AskDomain }))
    }

    /// If the guest is said to be lost, libvirt is asked.
    pub(super) fn check_lost(&mut self, now_ms: u64) -> Vec<Effect> {
        if self.lost.is_none() {
            return vec![];
        }
        self.look_at_ms = now_ms + RETRY_MS;
        if self.asking { vec![] } else { vec![self.ask(Effect::AskDomain)] }
    }

    pub(super) fn boot_timeout_s(&self) -> u64 {
        u64::from(self.record.spec.boot_timeout_s.unwrap_or(120))
    }

    /// A VM that leaves before its job has come goes on waiting for it should the move fail.
    pub(super) fn leave_with(&mut self, life: &Life) {
        self.record.await_until_ms = match life {
            Life::AwaitingJob { deadline_ms } => Some(*deadline_ms),
            _ => None,
        };
    }

    /// Before the copying has begun there is nothing to stop yet.
    pub(super) fn abort(&mut self, now_ms: u64, stage: LeavingStage) -> Vec<Effect> {
        if stage != LeavingStage::Copying || self.busy.is_none() {
            return vec![];
        }
        self.retry_at_ms = now_ms + RETRY_MS;
        vec![Effect::AbortMigration]
    }

    /// The guest runs at the destination: never again here.
    pub(super) fn finish(&mut self, to: String, by: MoveIdentity, line: String) -> Vec<Effect> {
        self.enter(Life::Leaving {
            to,
            by,
            stage: LeavingStage::Finishing,
        });
        vec![
            Effect::Persist,
            Effect::Journal(line),
            Effect::CloseGuest,
            Effect::Sessions(SessionNews::Left),
            self.begin(Busy::HandOver),
        ]
    }

    pub(super) fn gone(&mut self, now_ms: u64, to: &str, handed_over: Result<(), String>) -> Vec<Effect> {
        let done = self.record.moves.last().cloned().unwrap_or_default();
        self.enter(Life::Gone { to: to.to_owned() });
        self.record.ended_ms = Some(now_ms);
        (self.then, self.cancelled) = (None, false);
        self.record.generation += 1;
        let mut effects = vec![Effect::Persist];
        if let Err(why) = handed_over {
            effects.push(Effect::Journal(format!("{to} did not confirm the output offsets: {why}")));
        }
        effects.extend([Effect::Clear, Effect::AnswerMove(Ok(Box::new(done))), Effect::AnswerRelease(Ok(()))]);
        effects
    }

    /// The guest has not moved: it goes on here, or ends if that was wanted meanwhile. `resume`: the copying had begun.
    pub(super) fn stay(&mut self, to: String, by: MoveIdentity, why: String, resume: bool) -> Vec<Effect> {
        let mut effects = vec![Effect::AbandonDestination { to, by }];
        if let Some(end) = self.then.take() {
            effects.extend(self.stop(end));
        } else {
            effects.extend(self.go_on(why.clone()));
            if resume {
                effects.extend([Effect::ResumeDomain, Effect::OpenGuest]);
            }
        }
        effects.push(Effect::AnswerMove(Err(why)));
        effects
    }

    /// All that is to be done at a time is to be done that much later, or earlier.
    pub(super) fn clock_stepped(&mut self, by_ms: i64) -> Vec<Effect> {
        let before = (self.record.life.clone(), self.record.await_until_ms);
        let shift = |at: &mut u64| *at = at.saturating_add_signed(by_ms);
        match &mut self.record.life {
            Life::Booting { deadline_ms } | Life::AwaitingJob { deadline_ms } => shift(deadline_ms),
            _ => {}
        }
        self.record.await_until_ms.iter_mut().for_each(shift);
        self.unknown_since_ms.iter_mut().for_each(shift);
        self.arrive_by_ms.iter_mut().for_each(shift);
        // 0 says that it is time.
        for at in [&mut self.look_at_ms, &mut self.retry_at_ms] {
            if *at > 0 {
                shift(at);
            }
        }
        if let Pinning::Due { at_ms, .. } = &mut self.pinning
            && *at_ms > 0
        {
            shift(at_ms);
        }
        if before == (self.record.life.clone(), self.record.await_until_ms) {
            return vec![];
        }
        let back = if by_ms < 0 { "-" } else { "" };
        let line = format!(
            "the node's clock was set by {back}{:.1} s, and deadlines with it",
            ms_to_s(by_ms.unsigned_abs())
        );
        vec![Effect::Persist, Effect::Journal(line)]
    }

    /// The record cannot be written, and what waits behind it has not begun: it is given up, and the ledger's word is true again.
    pub(super) fn not_recorded(&mut self, why: &str, waits: Busy) -> Vec<Effect> {
        let why = format!("its record cannot be written on {}: {why}", self.record.node);
        match self.record.life.clone() {
            Life::Preparing | Life::Booting { .. } | Life::Restoring { .. } if self.ended(waits) => self.stop(End::NodeFault { how: why }),
            Life::Leaving {
                stage: LeavingStage::Finishing,
                ..
            } => vec![],
            life @ (Life::Leaving { .. } | Life::Saving { .. }) if self.ended(waits) => {
                // Who asked hears of it although nothing can be written.
                let mut effects = vec![Effect::AnswerMove(Err(why.clone()))];
                if let Life::Leaving {
                    to,
                    by,
                    stage: LeavingStage::Copying,
                } = life
                {
                    effects.push(Effect::AbandonDestination { to, by });
                }
                effects.extend(match self.then.take() {
                    Some(end) => self.stop(end),
                    None => self.go_on(format!("{why}; the guest goes on here")),
                });
                effects
            }
            _ => vec![],
        }
    }

    /// What may be done although the record cannot be written: all that is left is the VM's end, or it is elsewhere, and an agent that is
    /// restarted with an older record comes to the same.
    #[must_use]
    pub fn goes_on_unrecorded(&self) -> bool {
        self.record.life.is_over_here() || matches!(self.record.life, Life::Stopping { .. })
    }

    /// Whether what the source of a move hands over is for this VM, which came or comes by that very move; `Ok(false)` when
    /// it was taken before.
    pub(super) fn is_of_our_arrival(&self, by: &MoveIdentity) -> Result<bool, HandOverError> {
        let refused = |why: &str| Err(HandOverError::NotThisMove(why.to_owned()));
        match (&self.record.life, &self.record.arrived_by) {
            (Life::Arriving { by: mine, .. }, _) if mine == by => Ok(true),
            (Life::AwaitingJob { .. } | Life::Running | Life::Leaving { .. } | Life::Saving { .. }, Some(a)) if a.by == *by => {
                Ok(!a.handed_over)
            }
            (life, Some(a)) if a.by == *by => refused(&format!("the VM that came by this move is {}", life.name())),
            _ => refused("this is not the move by which the VM here came"),
        }
    }

    pub(super) fn arrive(&mut self, now_ms: u64, await_job_ms: u64) -> Vec<Effect> {
        if let Life::Arriving { by, .. } = &self.record.life {
            self.record.arrived_by = Some(ArrivedBy {
                by: by.clone(),
                handed_over: false,
            });
        }
        if let Some(end) = self.then.take() {
            self.record.generation += 1;
            return self.stop(end);
        }
        self.offsets_pending = true;
        let life = if self.job_here {
            Life::Running
        } else {
            Life::AwaitingJob {
                deadline_ms: now_ms + await_job_ms,
            }
        };
        self.enter(life);
        self.record.generation += 1;
        let line = if self.job_here {
            "the guest runs here, and so does its job"
        } else {
            "the guest runs here; waiting for its job"
        };
        let mut effects = vec![Effect::Persist, Effect::Journal(line.into())];
        if self.job_here {
            effects.extend(self.open_guest());
        }
        effects
    }

    pub(super) fn open_guest(&mut self) -> Vec<Effect> {
        if std::mem::take(&mut self.offsets_pending) {
            vec![Effect::OpenGuest, Effect::SetClock]
        } else {
            vec![]
        }
    }

    pub(super) fn take_over(&mut self, programs: Vec<ProgramRecord>, moves: Vec<MoveView>) -> Vec<Effect> {
        for p in programs {
            match self.record.programs.iter_mut().find(|mine| mine.id == p.id) {
                Some(mine) => {
                    mine.wrote = [mine.wrote[0].max(p.wrote[0]), mine.wrote[1].max(p.wrote[1])];
                    mine.ended = mine.ended.take().or(p.ended);
                }
                None => self.record.programs.push(p),
            }
        }
        if let Some(arrived) = &mut self.record.arrived_by {
            arrived.handed_over = true;
        }
        // It may come after moves that only this node knows of.
        if moves.len() >= self.record.moves.len() {
            self.record.moves = moves;
        }
        vec![Effect::Persist]
    }
}
