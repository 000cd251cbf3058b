//! Carries out what the moves' machines decide ([`crate::core::relocation`]): one thread, `moves`, has them all.
//!
//! ```text
//!  poll ──────────┐                                  ┌─> ledger (moves/JOB.json), before everything that stands behind it
//!  answers ───────┼─> moves: on_event -> effects ────┼─> orders: one queue, one thread
//!  places, orders ┘                                  ├─> places
//!                                                    └─> asks: short ones by a few threads, copies by one each
//! ```
//! Nothing waits here: whatever takes time is done elsewhere and comes back as an event. If the ledger cannot be written, what
//! stands behind the write waits with all later events of that move, and the write is tried again with each poll.
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::{
    Controller, Jobs, admission,
    orders::{Bulk, Tried},
    placement::{is_ours, reservation_of},
};
use crate::{
    cluster::{PeerReply, PeerRequest},
    core::{
        Gate,
        relocation::{Effect, Event, JobMove, JobSeen, Order, OrderError, Relocation, Reply, Standing, Word},
    },
    slurm::{JobState, JobUpdate, SlurmError},
};

/// Longest time for one move, after which its source is asked what became of it.
const MOVE_WITHIN: Duration = Duration::from_secs(3600);
/// How long an agent may take for a short answer.
const ASK_WITHIN: Duration = Duration::from_secs(5);
/// Threads for short questions to agents.
const ASKERS: usize = 8;

type Ask = Box<dyn FnOnce() + Send>;

/// What comes to the thread.
enum Inbox {
    Begin { record: Box<JobMove>, resumed: bool },
    Poll(Arc<Jobs>),
    Event { job: u32, event: Event },
    PlaceLeft { job: u32 },
}

/// The way to the thread.
#[derive(Debug)]
pub(super) struct Relocations {
    inbox: Sender<Inbox>,
    /// Taken by the thread when it starts.
    received: Receiver<Inbox>,
    asks: Sender<Ask>,
    asked: Receiver<Ask>,
    waits_for_slurm: AtomicBool,
}

impl std::fmt::Debug for Inbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Begin { .. } => "Begin",
            Self::Poll(_) => "Poll",
            Self::Event { .. } => "Event",
            Self::PlaceLeft { .. } => "PlaceLeft",
        })
    }
}

impl Default for Relocations {
    fn default() -> Self {
        let (inbox, received) = unbounded();
        let (asks, asked) = unbounded();
        Self {
            inbox,
            received,
            asks,
            asked,
            waits_for_slurm: AtomicBool::new(false),
        }
    }
}

impl Relocations {
    /// Jobs as Slurm has them.
    pub(super) fn poll(&self, jobs: Arc<Jobs>) {
        let _ = self.inbox.send(Inbox::Poll(jobs));
    }

    /// Something happened to a job's move.
    pub(super) fn tell(&self, job: u32, event: Event) {
        let _ = self.inbox.send(Inbox::Event { job, event });
    }

    /// Slurm has heard that a move left its place.
    pub(super) fn place_left(&self, job: u32) {
        let _ = self.inbox.send(Inbox::PlaceLeft { job });
    }

    /// A move waits for what the next poll shows.
    pub(super) fn wait_for_slurm(&self) -> bool {
        self.waits_for_slurm.load(Ordering::Relaxed)
    }
}

/// A move and what of it has to wait.
struct Active {
    r: Relocation,
    /// Effects, and what waits while the ledger cannot be written.
    gate: Gate<Effect, Event>,
    /// The place is being given back; then it ends.
    leaving: bool,
    end: Option<Result<String, String>>,
}

impl Controller {
    fn ledger(&self, job: u32) -> PathBuf {
        self.config.state_dir.join("moves").join(format!("{job}.json"))
    }

    /// Goes on with the moves of an earlier controller process.
    pub(super) fn recover_moves(&self) {
        let dir = self.config.state_dir.join("moves");
        let files = &self.world.files;
        let found = files.list(&dir).unwrap_or_else(|e| {
            log::error!("{}: {e}: moves of an earlier process are not gone on with", dir.display());
            Vec::new()
        });
        for path in found {
            match files.read(&path).and_then(|bytes| Ok(serde_json::from_slice::<JobMove>(&bytes)?)) {
                Ok(m) => {
                    log::info!("job {}: going on with its move ({:?})", m.job, m.step);
                    if let Some(node) = &m.held {
                        self.hold_again(&m, node);
                    }
                    self.start(m, true);
                }
                Err(e) => log::error!("{}: {e}", path.display()),
            }
        }
    }

    /// Starts a move unless one of this job is under way. Returns whether it did.
    pub(super) fn start(&self, m: JobMove, resumed: bool) -> bool {
        {
            let mut cluster = self.cluster();
            if cluster.moves.contains_key(&m.job) {
                return false;
            }
            cluster.moves.insert(m.job, m.clone());
        }
        let _ = self.relocations.inbox.send(Inbox::Begin {
            record: Box::new(m),
            resumed,
        });
        true
    }

    /// Starts the threads.
    pub(super) fn start_relocations(self: &Arc<Self>) {
        for k in 1..=ASKERS {
            let asked = self.relocations.asked.clone();
            let spawned = thread::Builder::new().name(format!("ask-{k}")).spawn(move || {
                for ask in asked {
                    ask();
                }
            });
            if let Err(e) = spawned {
                log::error!("cannot start a thread: {e}");
            }
        }
        let controller = self.clone();
        let run = move || {
            Driver {
                c: controller,
                active: BTreeMap::new(),
                jobs: Arc::default(),
            }
            .run();
        };
        if let Err(e) = thread::Builder::new().name("moves".into()).spawn(run) {
            log::error!("cannot start the thread of the moves: {e}");
        }
    }

    /// Slurm requeues jobs of that partition by itself when their script ends in their grace time (24.05 and later). A job that
    /// was requeued by order instead is requeued once more at its end, long after it landed. So there the shim just ends.
    fn ends_by_itself(&self, partition: &str) -> bool {
        self.slurm_facts()
            .is_some_and(|facts| facts.requeues_early_exit && facts.requeue_partitions.iter().any(|p| p == partition))
    }
}

struct Driver {
    c: Arc<Controller>,
    active: BTreeMap<u32, Active>,
    /// Of the last poll.
    jobs: Arc<Jobs>,
}

impl Driver {
    fn run(mut self) {
        let received = self.c.relocations.received.clone();
        while let Ok(first) = received.recv() {
            self.take(first);
            // What is there already is of the same moment.
            while let Ok(next) = received.try_recv() {
                self.take(next);
            }
            self.give_slots();
            let waits = self.active.values().any(|a| a.r.waits_for_slurm());
            self.c.relocations.waits_for_slurm.store(waits, Ordering::Relaxed);
        }
    }

    fn take(&mut self, inbox: Inbox) {
        match inbox {
            Inbox::Begin { record, resumed } => self.begin(*record, resumed),
            Inbox::Poll(jobs) => {
                self.jobs = jobs;
                for job in self.active.keys().copied().collect::<Vec<_>>() {
                    self.unblock(job);
                    let seen = self.seen(job);
                    self.event(job, Event::Poll(seen));
                }
            }
            Inbox::Event { job, event } => {
                let given = if let Event::Placed(Ok(node)) = &event {
                    Some(node.clone())
                } else {
                    None
                };
                self.event(job, event);
                // Its move has ended meanwhile, or wants none any more.
                let has = |a: &Active| a.end.is_none() && (a.r.record.held == given || a.gate.is_shut().is_some());
                if given.is_some() && !self.active.get(&job).is_some_and(has) {
                    self.leave_place(job, false);
                }
            }
            Inbox::PlaceLeft { job } => {
                let end = self.active.get_mut(&job).and_then(|a| {
                    a.leaving = false;
                    a.end.take()
                });
                if let Some(outcome) = end {
                    self.end(job, outcome);
                }
            }
        }
    }

    fn begin(&mut self, record: JobMove, resumed: bool) {
        let job = record.job;
        let await_job_ms = u64::from(self.c.config.node.await_job_s) * 1000;
        let sets_priority = self.c.slurm_facts().is_some_and(|f| f.sets_priority);
        let (r, effects) = if resumed {
            Relocation::resumed(record, await_job_ms, sets_priority)
        } else {
            Relocation::new(record, await_job_ms, sets_priority)
        };
        let active = Active {
            r,
            gate: Gate::default(),
            leaving: false,
            end: None,
        };
        self.active.insert(job, active);
        self.carry_out(job, effects);
        // At once, by what is known already; a move of an earlier life waits for the first poll.
        let seen = self.seen(job);
        if seen.is_some() {
            self.event(job, Event::Poll(seen));
        }
    }

    /// The poll's view of a job.
    fn seen(&self, job: u32) -> Option<JobSeen> {
        let brief = self.jobs.by_id(job)?;
        let standing = if brief.state.is_waiting() {
            Standing::Waiting
        } else if brief.state.is_on_nodes() {
            Standing::OnNodes
        } else if brief.state == JobState::Completing || !brief.state.is_finished() {
            Standing::Completing
        } else {
            return None;
        };
        let (never, not_now) = match admission::of(brief, self.c.notes().of(job).last_try) {
            admission::Admission::May => (None, None),
            admission::Admission::NotNow(why) => (None, Some(why)),
            admission::Admission::Never(why) => (Some(why), None),
        };
        Some(JobSeen {
            standing,
            restarts: brief.restarts,
            nodes: brief.nodes.clone(),
            in_grace: brief.in_grace(),
            ends_by_itself: brief.requeue && self.c.ends_by_itself(&brief.partition),
            never,
            not_now,
            start_s: brief.start_time.and_then(|s| u64::try_from(s).ok()),
            reservation: brief.reservation.clone().filter(|r| !is_ours(r)),
            limit_min: brief.time_limit_min,
            req_nodes: brief.req_nodes.clone(),
        })
    }

    fn event(&mut self, job: u32, event: Event) {
        let Some(active) = self.active.get_mut(&job) else { return };
        if active.end.is_some() {
            return;
        }
        if active.gate.is_shut().is_some() {
            // Polls come again.
            if !matches!(event, Event::Poll(_)) {
                active.gate.hold(event);
            }
            return;
        }
        log::debug!("job {job}: move: {:?} <- {event:?}", active.r.record.step);
        let effects = active.r.on_event(self.c.world.clock.now_ms(), event);
        self.carry_out(job, effects);
    }

    /// Tries again what could not be written.
    fn unblock(&mut self, job: u32) {
        let Some(active) = self.active.get_mut(&job) else { return };
        if active.gate.is_shut().is_none() {
            return;
        }
        active.gate.open();
        self.carry_out(job, vec![]);
        while let Some(event) = self.active.get_mut(&job).and_then(|a| a.gate.next_event()) {
            self.event(job, event);
        }
    }

    fn carry_out(&mut self, job: u32, effects: Vec<Effect>) {
        if let Some(active) = self.active.get_mut(&job) {
            active.gate.push(effects);
        }
        while let Some(effect) = self.active.get_mut(&job).and_then(|a| a.gate.next_effect()) {
            if effect != Effect::Persist {
                self.effect(job, effect);
                continue;
            }
            let written = self.persist(job);
            let now_ms = self.c.world.clock.now_ms();
            let Some(active) = self.active.get_mut(&job) else { return };
            match written {
                Ok(()) => {
                    active.gate.written();
                }
                Err(e) => {
                    log::error!(
                        "job {job}: {}: {e}: its move waits until it can be written",
                        self.c.ledger(job).display()
                    );
                    active.gate.shut(now_ms, effect, e.to_string());
                }
            }
        }
    }

    /// Writes the record.
    fn persist(&mut self, job: u32) -> std::io::Result<()> {
        let Some(active) = self.active.get(&job) else { return Ok(()) };
        let record = active.r.record.clone();
        self.c
            .world
            .files
            .write_durably(&self.c.ledger(job), &serde_json::to_vec_pretty(&record)?)?;
        self.c.cluster().moves.insert(job, record);
        Ok(())
    }

    fn effect(&mut self, job: u32, effect: Effect) {
        let Some(active) = self.active.get(&job) else { return };
        let record = active.r.record.clone();
        let from = record.from.clone();
        match effect {
            Effect::Persist => {}
            Effect::Log(line) => log::info!("job {job}: {line}"),
            Effect::FindPlace { give_up_ms } => self.c.ask_place(&record, give_up_ms),
            Effect::LeavePlace => {
                if let Some(active) = self.active.get_mut(&job) {
                    active.leaving = true;
                }
                self.leave_place(job, true);
            }
            Effect::KeepPlace => {
                let node = record.held.clone().unwrap_or_default();
                if self.c.keep_later(job, node) {
                    let c = self.c.clone();
                    self.c.orders.give(1, move || {
                        c.keep_places();
                        Tried::Done
                    });
                }
            }
            Effect::MoveOut { to } => {
                let request = PeerRequest::MoveOut {
                    job,
                    address: self.c.address(&to),
                    to,
                    cause: record.cause.clone(),
                    deadline_ms: record.deadline_ms,
                };
                self.long_ask(job, from, request);
            }
            Effect::Save { at } => {
                let cause = record.cause.clone();
                self.long_ask(job, at, PeerRequest::Save { job, cause });
            }
            Effect::CancelMove => self.ask(from, PeerRequest::CancelMove { job }, move |c, reply| {
                if !matches!(reply, Ok(PeerReply::Ok)) {
                    log::warn!("job {job}: its move cannot be cancelled: {reply:?}");
                }
                drop(c);
            }),
            Effect::AskSource => self.ask_word(job, from),
            Effect::AskWaiting { node } => self.ask_word(job, node),
            Effect::Part => self.ask(from, PeerRequest::Part { job }, move |c, reply| {
                c.relocations.tell(job, Event::Parted(reply == Ok(PeerReply::Ok)));
            }),
            Effect::ReleaseVm { node } => self.ask(node, PeerRequest::Release { job }, |_, _| {}),
            Effect::TellJob(line) => {
                log::info!("job {job}: {line}");
                self.ask(from, PeerRequest::Note { job, line }, |_, _| {});
            }
            Effect::Order(order) => self.order(job, &order),
            Effect::End(outcome) => {
                let leaving = self.active.get(&job).is_some_and(|a| a.leaving);
                if leaving && let Some(active) = self.active.get_mut(&job) {
                    active.end = Some(outcome);
                } else {
                    self.end(job, outcome);
                }
            }
        }
    }

    fn end(&mut self, job: u32, outcome: Result<String, String>) {
        let Some(active) = self.active.remove(&job) else { return };
        if active.gate.held().any(|e| matches!(e, Event::Placed(Ok(_)))) {
            self.leave_place(job, false);
        }
        if outcome.is_ok() && active.r.record.moved_ms.is_some() {
            let time = active.r.time_after();
            self.c.notes().change(job, |n| n.time = time);
        }
        match &outcome {
            Ok(line) => log::info!("job {job}: {line}"),
            Err(line) => log::warn!("job {job}: {line}"),
        }
        {
            let mut cluster = self.c.cluster();
            cluster.moves.remove(&job);
            if outcome.is_err() && active.r.record.cause == "drain" {
                cluster.failed.insert(job, self.c.world.clock.instant());
            }
            cluster.results.insert(job, (outcome, active.r.record.done));
        }
        if let Err(e) = self.c.world.files.remove(&self.c.ledger(job)) {
            log::warn!("job {job}: {e}");
        }
    }

    /// The place is the move's no longer at once, so that a later one is not mistaken for it; Slurm hears of it in its turn.
    /// `tell`: the move waits for that.
    fn leave_place(&self, job: u32, tell: bool) {
        if self.c.leave_later(job, tell) {
            let c = self.c.clone();
            self.c.orders.give(0, move || c.leave_places());
        }
    }

    /// A short question to an agent, by one of the askers.
    fn ask(&self, node: String, request: PeerRequest, then: impl FnOnce(Arc<Controller>, Result<PeerReply, String>) + Send + 'static) {
        let c = self.c.clone();
        let ask = move || {
            let reply = c.peers.request(&node, &c.address(&node), &request, ASK_WITHIN);
            then(c, reply);
        };
        let _ = self.c.relocations.asks.send(Box::new(ask));
    }

    /// Where a node has a job's VM.
    fn ask_word(&self, job: u32, node: String) {
        self.ask(node, PeerRequest::Show { job }, move |c, reply| {
            let word = match reply {
                Ok(PeerReply::Vm(view)) => Word::of(view.map(|v| v.state).as_deref()),
                _ => Word::Silence,
            };
            c.relocations.tell(job, Event::Source(word));
        });
    }

    /// A request that takes as long as a copy or a save does, on a thread of its own.
    fn long_ask(&self, job: u32, node: String, request: PeerRequest) {
        let c = self.c.clone();
        let ask = move || {
            let reply = match c.peers.request(&node, &c.address(&node), &request, MOVE_WITHIN) {
                Ok(PeerReply::Moved(done)) => Reply::Done(done),
                Ok(PeerReply::Refused(why)) => Reply::Refused(why),
                Ok(other) => Reply::Refused(format!("{node} gave another answer than asked for: {other:?}")),
                Err(why) => Reply::NoWord(why),
            };
            c.relocations.tell(job, Event::Answered(reply));
        };
        if let Err(e) = thread::Builder::new().name(format!("copy-{job}")).spawn(ask) {
            let reply = Reply::Refused(format!("no thread for it: {e}"));
            self.c.relocations.tell(job, Event::Answered(reply));
        }
    }

    fn order(&self, job: u32, order: &Order) {
        if let Order::Steer { req_nodes, .. } = order
            && !req_nodes.is_empty()
        {
            let nodes = req_nodes.clone();
            self.c.notes().change(job, |n| n.req_nodes = nodes);
        }
        let c = self.c.clone();
        let answered = move |done: Result<(), SlurmError>| {
            let done = done.or_else(|e| if e.is_already_pending() { Ok(()) } else { Err(e) });
            let done = done.map_err(|e| {
                if e.is_transient() {
                    OrderError::NoAnswer(e.to_string())
                } else {
                    OrderError::Refused(e.to_string())
                }
            });
            c.relocations.tell(job, Event::Ordered(done));
        };
        if let Some(bulk) = bulk_of(order) {
            self.c.orders.give_bulk(bulk, job, answered);
        } else {
            // Cancelling frees a node too.
            let c = self.c.clone();
            self.c.orders.give_first(1, move || {
                answered(c.world.slurm.cancel(job, None));
                Tried::Done
            });
        }
    }

    /// Lets moves begin to copy, as many at the same time as their nodes take; who has least time goes first.
    fn give_slots(&mut self) {
        let limits = (self.c.config.node.moves_out as usize, self.c.config.node.moves_in as usize);
        let moves = self.active.values().map(|a| &a.r);
        for job in next_slots(moves, limits) {
            self.event(job, Event::Slot);
        }
    }
}

/// The command for an order, which goes with its like of other jobs; `None`: the job is cancelled.
fn bulk_of(order: &Order) -> Option<Bulk> {
    let update = |update: JobUpdate| Some(Bulk::Update(update));
    match order {
        Order::Requeue { hold: true } => Some(Bulk::RequeueHold),
        Order::Requeue { hold: false } => Some(Bulk::Requeue),
        Order::Hold => Some(Bulk::Hold),
        Order::Release => Some(Bulk::Release),
        Order::AllowRequeue => update(JobUpdate {
            requeue: Some(true),
            ..JobUpdate::default()
        }),
        Order::Steer {
            reserved,
            limit_min,
            req_nodes,
        } => update(JobUpdate {
            reservation: reserved.as_deref().map(|node| Some(reservation_of(node))),
            start_now: true,
            time_limit_min: *limit_min,
            req_nodes: (!req_nodes.is_empty()).then(Vec::new),
            ..JobUpdate::default()
        }),
        Order::Priority(priority) => update(JobUpdate {
            priority: Some(*priority),
            ..JobUpdate::default()
        }),
        Order::Limit(minutes) => update(JobUpdate {
            time_limit_min: Some(*minutes),
            ..JobUpdate::default()
        }),
        Order::Cancel => None,
    }
}

/// Which of the queued moves may begin now; `limits`: moves at the same time away from and to one node.
#[must_use]
pub fn next_slots<'a>(moves: impl Iterator<Item = &'a Relocation> + Clone, limits: (usize, usize)) -> Vec<u32> {
    let mut out: BTreeMap<&str, usize> = BTreeMap::new();
    let mut coming: BTreeMap<&str, usize> = BTreeMap::new();
    for r in moves.clone().filter(|r| r.is_copying()) {
        *out.entry(&r.record.from).or_default() += 1;
        if let Some(to) = &r.record.held {
            *coming.entry(to).or_default() += 1;
        }
    }
    let mut queued: Vec<&Relocation> = moves.filter(|r| r.is_queued()).collect();
    queued.sort_by_key(|r| (r.record.deadline_ms.unwrap_or(u64::MAX), r.record.job));
    let mut slots = Vec::new();
    for r in queued {
        let Some(to) = &r.record.held else { continue };
        let out = out.entry(&r.record.from).or_default();
        let coming = coming.entry(to).or_default();
        if *out < limits.0 && *coming < limits.1 {
            *out += 1;
            *coming += 1;
            slots.push(r.record.job);
        }
    }
    slots
}
