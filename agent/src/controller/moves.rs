//! One move of one job, as Slurm and the agents must be led through it (design: "Preemption").
//!
//! ```text
//!  Planned ── find a place, MoveOut ──> Moved{live} ── requeuehold ──> Requeued ── steer by the reservation,
//!     |  └─── Save ─────────────────────> Moved{save}                       |         StartTime, TimeLimit; release
//!     |                                                                     v
//!     └── requeue | cancel ──> (ended)              Landed <── running ── Released
//! ```
//! Each move has a thread (`move-JOB`) and a ledger file, written before each step; every step may be repeated. After
//! a restart of the controller the thread goes on where the file says. A restart of slurmctld is waited for. While the
//! VM is at the destination and its job is not, the destination's own deadline is the last guard.
use std::{
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use slurm_vm_api::{query::MoveView, spec::PreemptWay};

use super::{
    Controller,
    admission::{self, Admission},
    placement::{Resources, reservation_of},
    places,
    settle::{Settled, Settling, Word},
};
use crate::{
    cluster::{PeerReply, PeerRequest},
    slurm::{JobInfo, JobState, JobUpdate, SlurmError},
};

/// A move in the controller's ledger.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobMove {
    /// Format, 1.
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
    /// The node in whose reservation of ours the move is ([`super::placement::reservation_of`]).
    #[serde(default)]
    pub held: Option<String>,
    /// What the VM takes on a node.
    #[serde(default)]
    pub needs: Resources,
    /// Ways that are left, first first.
    pub ways: Vec<PreemptWay>,
    /// Unix milliseconds by which the job must have left.
    pub deadline_ms: Option<u64>,
    /// Milliseconds of that which a live move leaves for the ways after it.
    #[serde(default)]
    pub reserve_ms: u64,
    /// The job's time limit in minutes before the move.
    pub limit_min: Option<u32>,
    /// What is left of it.
    pub left_min: Option<u32>,
    /// Its priority before.
    #[serde(default)]
    pub priority: Option<u64>,
    /// Slurm's restart count before.
    pub restarts: u32,
    /// What went wrong on the way.
    pub notes: Vec<String>,
    /// What the agents reported.
    pub done: Option<MoveView>,
    /// Its memory is being copied; counts against `moves_out`.
    pub moving: bool,
}

/// How far a move is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// The VM is at its source.
    Planned,
    /// The VM is at the destination or in a save, the job is not.
    Moved,
    /// The job was put back into the queue, held.
    Requeued,
    /// It was released.
    Released,
    /// It runs again; the reservation is to be removed.
    Landed,
}

/// How long Slurm may take to bring a requeued job back into the queue (epilog, KillWait).
const REQUEUE_WITHIN: Duration = Duration::from_secs(180);
/// How often Slurm is asked while something is awaited.
const LOOK: Duration = Duration::from_millis(250);
/// Longest time for one move, after which its source is asked what became of it.
const MOVE_WITHIN: Duration = Duration::from_secs(3600);
/// Milliseconds after which a move without a deadline is cancelled.
const MOST_MS: u64 = 3_600_000;

impl Controller {
    fn ledger(&self, job: u32) -> PathBuf {
        self.config.state_dir.join("moves").join(format!("{job}.json"))
    }

    /// Goes on with the moves of an earlier controller process.
    pub(super) fn recover_moves(self: &Arc<Self>) {
        let dir = self.config.state_dir.join("moves");
        let files = &self.world.files;
        let found = files.list(&dir).unwrap_or_else(|e| {
            log::error!("{}: {e}: moves of an earlier process are not gone on with", dir.display());
            Vec::new()
        });
        for path in found {
            match files.read(&path).and_then(|bytes| Ok(serde_json::from_slice::<JobMove>(&bytes)?)) {
                Ok(mut m) => {
                    log::info!("job {}: going on with its move ({:?})", m.job, m.step);
                    if m.step != Step::Planned && m.held.is_none() {
                        m.held.clone_from(&m.to);
                    }
                    self.start(m, true);
                }
                Err(e) => log::error!("{}: {e}", path.display()),
            }
        }
    }

    /// Starts a move unless one of this job is under way. Returns whether it did.
    pub(super) fn start(self: &Arc<Self>, m: JobMove, resumed: bool) -> bool {
        let job = m.job;
        {
            let mut cluster = self.cluster();
            if cluster.moves.contains_key(&job) {
                return false;
            }
            cluster.moves.insert(job, m.clone());
        }
        let controller = self.clone();
        let cause = m.cause.clone();
        let spawned = thread::Builder::new().name(format!("move-{job}")).spawn(move || {
            let outcome = Driver {
                c: &controller,
                m,
                resumed,
            }
            .run();
            let mut cluster = controller.cluster();
            let last = cluster.moves.remove(&job);
            match &outcome {
                Ok(line) => log::info!("job {job}: {line}"),
                Err(line) => {
                    log::warn!("job {job}: {line}");
                    if cause == "drain" {
                        cluster.failed.insert(job, Instant::now());
                    }
                }
            }
            cluster.results.insert(job, (outcome, last.and_then(|l| l.done)));
            drop(cluster);
            if let Err(e) = controller.world.files.remove(&controller.ledger(job)) {
                log::warn!("job {job}: {e}");
            }
        });
        if let Err(e) = spawned {
            log::error!("job {job}: no thread for its move: {e}");
        }
        true
    }
}

/// Why a VM did not move live.
enum NotLive {
    /// It is at its source.
    Stays(String),
    /// It was saved: an earlier life of the controller had ordered that.
    Saved,
}

struct Driver<'a> {
    c: &'a Arc<Controller>,
    m: JobMove,
    resumed: bool,
}

impl Driver<'_> {
    fn run(&mut self) -> Result<String, String> {
        self.save();
        loop {
            self.c.world.faults.pass(&format!("move.{:?}", self.m.step).to_lowercase())?;
            match self.m.step {
                Step::Planned => {
                    if let Some(end) = self.planned()? {
                        return Ok(end);
                    }
                }
                Step::Moved => {
                    if let Some(end) = self.moved()? {
                        return Ok(end);
                    }
                }
                Step::Requeued => {
                    if let Some(end) = self.requeued()? {
                        return Ok(end);
                    }
                }
                Step::Released => {
                    if let Some(end) = self.released()? {
                        return Ok(end);
                    }
                }
                Step::Landed => return self.landed(),
            }
        }
    }

    fn save(&self) {
        let path = self.c.ledger(self.m.job);
        let write = || self.c.world.files.write_durably(&path, &serde_json::to_vec_pretty(&self.m)?);
        if let Err(e) = write() {
            log::error!("job {}: {}: {e}", self.m.job, path.display());
        }
        self.c.cluster().moves.insert(self.m.job, self.m.clone());
    }

    fn step(&mut self, step: Step) {
        log::info!("job {}: move: {:?} -> {step:?}", self.m.job, self.m.step);
        self.m.step = step;
        self.save();
    }

    fn note(&mut self, why: String) {
        log::warn!("job {}: {why}", self.m.job);
        self.m.notes.push(why);
        self.save();
    }

    fn now_ms(&self) -> u64 {
        self.c.world.clock.now_ms()
    }

    fn sleep(&self) {
        self.c.world.clock.sleep(LOOK);
    }

    /// Asks Slurm until it answers; a restart of slurmctld only takes time.
    fn job(&self) -> Option<JobInfo> {
        loop {
            match self.c.world.slurm.job(self.m.job) {
                Ok(info) => return info.filter(|i| !i.brief.state.is_finished()),
                Err(e) => {
                    log::debug!("job {}: {e}", self.m.job);
                    self.sleep();
                }
            }
        }
    }

    /// Orders something of Slurm until it is done or refused for good.
    fn order(&self, what: &str, order: impl Fn() -> Result<(), SlurmError>) -> Result<(), String> {
        let until = Instant::now() + REQUEUE_WITHIN;
        loop {
            match order() {
                Ok(()) => return Ok(()),
                Err(e) if e.is_already_pending() => return Ok(()),
                Err(e) if e.is_transient() && Instant::now() < until => self.sleep(),
                Err(e) => return Err(format!("{what}: {e}")),
            }
        }
    }

    fn ask(&self, node: &str, request: &PeerRequest, within: Duration) -> Result<PeerReply, String> {
        self.c.peers.request(node, &self.c.address(node), request, within)
    }

    /// Where the VM is, from its source's word: asked until that is clear. As long as the source says that the VM is leaving or
    /// being saved nothing else is begun; a copy that takes longer than it may is cancelled, and its end awaited.
    fn settled(&self) -> Settled {
        let limit_ms = self.m.deadline_ms.unwrap_or_else(|| self.now_ms() + MOST_MS);
        let mut settling = Settling::new(limit_ms);
        loop {
            let show = PeerRequest::Show { job: self.m.job };
            let word = match self.ask(&self.m.from, &show, Duration::from_secs(5)) {
                Ok(PeerReply::Vm(view)) => Word::of(view.map(|v| v.state).as_deref()),
                _ => Word::Silence {
                    job_is_there: self
                        .job()
                        .is_some_and(|i| i.brief.state.is_on_nodes() && i.brief.restarts == self.m.restarts),
                },
            };
            let step = settling.on_word(self.now_ms(), word);
            if step.cancel {
                log::warn!("job {}: its copy takes longer than it may: it is cancelled", self.m.job);
                let cancel = PeerRequest::CancelMove { job: self.m.job };
                if let Err(e) = self.ask(&self.m.from, &cancel, Duration::from_secs(5)) {
                    log::warn!("job {}: {}: {e}", self.m.job, self.m.from);
                }
            }
            match step.settled {
                Some(settled) => return settled,
                None => self.sleep(),
            }
        }
    }

    fn planned(&mut self) -> Result<Option<String>, String> {
        if std::mem::take(&mut self.resumed) {
            match self.settled() {
                Settled::Moved => {
                    self.step(Step::Moved);
                    return Ok(None);
                }
                Settled::Saved => {
                    self.saved_instead();
                    return Ok(None);
                }
                Settled::Stays | Settled::JobLeft => {}
            }
        }
        while let Some(way) = self.m.ways.first().copied() {
            let Some(info) = self.job().filter(|j| j.brief.state.is_on_nodes()) else {
                self.drop_reservation();
                return Ok(Some("the job ended before its VM moved".into()));
            };
            if info.brief.restarts != self.m.restarts {
                // While the controller was away. The agent that makes the new run's VM has ended what waited for it elsewhere.
                self.drop_reservation();
                return Ok(Some("Slurm started the job over before its VM moved".into()));
            }
            match admission::of(&info, self.c.notes().of(self.m.job).last_try) {
                // Its requeue would be refused when its VM is elsewhere already.
                Admission::Never(why) if way != PreemptWay::Cancel => {
                    self.drop_reservation();
                    self.c
                        .tell_job(&self.m.from, self.m.job, &format!("the VM stays on {}: {why}", self.m.from));
                    return Err(format!("its VM stays on {}: {why}", self.m.from));
                }
                Admission::NotNow(why) if matches!(way, PreemptWay::Live | PreemptWay::Save) => {
                    self.note(format!("not {}: {why}", if way == PreemptWay::Live { "live" } else { "saved" }));
                    self.m.ways.remove(0);
                    self.save();
                    continue;
                }
                _ => {}
            }
            match way {
                // Each of its nodes would restore the same guest.
                PreemptWay::Save if info.brief.nodes.len() > 1 => self.note(format!(
                    "not saved: the job has {} nodes, only jobs of one node can move",
                    info.brief.nodes.len()
                )),
                PreemptWay::Live => match self.live(&info) {
                    Ok(done) => {
                        self.m.done = Some(done);
                        self.step(Step::Moved);
                        return Ok(None);
                    }
                    Err(NotLive::Saved) => {
                        self.saved_instead();
                        return Ok(None);
                    }
                    Err(NotLive::Stays(why)) => {
                        self.drop_reservation();
                        if !self.m.to_asked {
                            self.m.to = None;
                        }
                        self.note(format!("not live: {why}"));
                    }
                },
                PreemptWay::Save => {
                    let request = PeerRequest::Save {
                        job: self.m.job,
                        cause: self.m.cause.clone(),
                    };
                    match self.ask(&self.m.from, &request, MOVE_WITHIN) {
                        Ok(PeerReply::Moved(done)) => {
                            self.m.done = Some(*done);
                            self.m.to = None;
                            self.step(Step::Moved);
                            return Ok(None);
                        }
                        Ok(PeerReply::Refused(why)) => self.note(format!("not saved: {why}")),
                        Ok(other) => self.note(format!("not saved: {other:?}")),
                        Err(why) => {
                            if self.settled() == Settled::Saved {
                                self.saved_instead();
                                return Ok(None);
                            }
                            self.note(format!("not saved: {why}"));
                        }
                    }
                }
                PreemptWay::Requeue => {
                    // Not a job that has just finished: a requeue would run it again.
                    if self.vm_is_over() {
                        return Ok(Some("the job finished within its grace time".into()));
                    }
                    let Some(info) = self.job() else {
                        return Ok(Some("the job ended in its grace time".into()));
                    };
                    if !self.ends_by_itself(&info)? {
                        self.order("requeue", || self.c.world.slurm.requeue(self.m.job))?;
                    }
                    return Ok(Some(format!("requeued to start over{}", self.because())));
                }
                PreemptWay::Cancel => {
                    if self.vm_is_over() {
                        return Ok(Some("the job finished within its grace time".into()));
                    }
                    self.order("cancel", || self.c.world.slurm.cancel(self.m.job, None))?;
                    return Ok(Some(format!("cancelled, as its --vm-preempt says{}", self.because())));
                }
            }
            self.m.ways.remove(0);
            self.save();
        }
        Err(format!("its VM stays on {}{}", self.m.from, self.because()))
    }

    /// The VM is in a save, and not at a destination.
    fn saved_instead(&mut self) {
        self.drop_reservation();
        self.m.to = None;
        self.step(Step::Moved);
    }

    fn because(&self) -> String {
        if self.m.notes.is_empty() {
            String::new()
        } else {
            format!(" ({})", self.m.notes.join("; "))
        }
    }

    fn vm_is_over(&self) -> bool {
        match self.ask(&self.m.from, &PeerRequest::Show { job: self.m.job }, Duration::from_secs(5)) {
            Ok(PeerReply::Vm(Some(v))) => matches!(v.state.as_str(), "stopping" | "stopped"),
            _ => false,
        }
    }

    /// Finds a place, then moves; both as long as there is time.
    fn live(&mut self, info: &JobInfo) -> Result<MoveView, NotLive> {
        if info.brief.nodes.len() > 1 {
            let nodes = info.brief.nodes.len();
            return Err(NotLive::Stays(format!("the job has {nodes} nodes, only jobs of one node can move")));
        }
        let give_up = self
            .m
            .deadline_ms
            .map(|d| d.saturating_sub(self.m.reserve_ms.min(d.saturating_sub(self.now_ms()) / 2)));
        self.m.needs = places::needs(info);
        let to = self.c.find_place(&self.m, info, give_up).map_err(NotLive::Stays)?;
        self.m.to = Some(to.clone());
        self.m.held = Some(to.clone());
        self.save();
        while self.has_to_wait(&to) {
            if give_up.is_some_and(|t| self.now_ms() >= t) {
                return Err(NotLive::Stays("other moves took the time".into()));
            }
            self.sleep();
        }
        let request = PeerRequest::MoveOut {
            job: self.m.job,
            to: to.clone(),
            address: self.c.address(&to),
            cause: self.m.cause.clone(),
            deadline_ms: self.m.deadline_ms,
        };
        let reply = self.ask(&self.m.from, &request, MOVE_WITHIN);
        self.m.moving = false;
        match reply {
            Ok(PeerReply::Moved(done)) => Ok(*done),
            Ok(PeerReply::Refused(why)) => Err(NotLive::Stays(why)),
            Ok(other) => Err(NotLive::Stays(format!("{other:?}"))),
            Err(why) => match self.settled() {
                Settled::Moved => Ok(MoveView {
                    way: "live".into(),
                    from: self.m.from.clone(),
                    to,
                    outcome: "done".into(),
                    ..MoveView::default()
                }),
                Settled::Saved => Err(NotLive::Saved),
                Settled::Stays | Settled::JobLeft => Err(NotLive::Stays(why)),
            },
        }
    }

    /// As many moves as a node takes at the same time are under way, at either end. If not, this one is counted from now on.
    fn has_to_wait(&mut self, to: &str) -> bool {
        let limits = &self.c.config.node;
        {
            let mut cluster = self.c.cluster();
            let moving = |at: &dyn Fn(&JobMove) -> bool| {
                let others = cluster
                    .moves
                    .values()
                    .filter(|o| o.job != self.m.job && o.step == Step::Planned && o.moving);
                others.filter(|o| at(o)).count()
            };
            let out = moving(&|o| o.from == self.m.from);
            let coming = moving(&|o| o.held.as_deref() == Some(to));
            if out >= limits.moves_out as usize || coming >= limits.moves_in as usize {
                return true;
            }
            self.m.moving = true;
            cluster.moves.insert(self.m.job, self.m.clone());
        }
        self.save();
        false
    }

    /// The VM is elsewhere: put the job back into the queue; the source is free for the preemptor as soon as the shim is gone.
    fn moved(&mut self) -> Result<Option<String>, String> {
        let Some(mut info) = self.job() else {
            return Ok(Some(self.job_is_over()));
        };
        // Nobody has put it back into the queue yet: it was cancelled, and Slurm would requeue it all the same.
        while info.brief.state == JobState::Completing && info.brief.restarts == self.m.restarts {
            self.sleep();
            let Some(now) = self.job() else {
                return Ok(Some(self.job_is_over()));
            };
            info = now;
        }
        if let Some(limit) = info.time_limit_min
            && self.m.limit_min.is_none()
        {
            let started = info.brief.start_time.and_then(|s| u64::try_from(s).ok()).unwrap_or(0);
            let elapsed = self.now_ms() / 1000 - started.min(self.now_ms() / 1000);
            // Slurm keeps whole minutes: a started minute is not taken away.
            let used = u32::try_from(elapsed / 60).unwrap_or(u32::MAX);
            self.m.limit_min = Some(limit);
            self.m.left_min = Some(limit.saturating_sub(used).max(1));
            self.save();
        }
        if info.brief.restarts == self.m.restarts && !info.brief.state.is_waiting() && !self.ends_by_itself(&info)? {
            if self.m.to.is_some() {
                // Held, so that it cannot start anywhere before it is steered.
                self.order("requeue and hold", || self.c.world.slurm.requeuehold(self.m.job))?;
            } else {
                // A saved VM is restored wherever its job starts; a hold would only cost the job its priority.
                self.order("requeue", || self.c.world.slurm.requeue(self.m.job))?;
            }
        }
        let until = Instant::now() + REQUEUE_WITHIN;
        loop {
            let Some(info) = self.job() else {
                return Ok(Some(self.job_is_over()));
            };
            if info.brief.state.is_waiting() {
                break;
            }
            if info.brief.restarts > self.m.restarts && info.brief.state.is_on_nodes() {
                // It was released before this controller was restarted.
                break;
            }
            if Instant::now() > until {
                return Err("Slurm did not bring the job back into the queue in time".into());
            }
            self.sleep();
        }
        self.step(Step::Requeued);
        Ok(None)
    }

    /// A slurmctld that was killed may have forgotten the reservation.
    fn keep_reservation(&mut self) {
        let Some(to) = self.m.held.clone() else { return };
        if !matches!(self.c.world.slurm.reservation(&reservation_of(&to)), Ok(None)) {
            return;
        }
        match self.c.take_place(self.m.job, &to) {
            Ok(()) => self.note("its reservation was lost, and made again".into()),
            Err(e) => self.note(format!("its reservation was lost: {e}")),
        }
    }

    /// The release gave the job a place behind those that came after it. Where priorities are computed anew all the time, none is set.
    /// Setting a priority sets the user's nice value to 0: a job that has one keeps that instead.
    fn keep_place(&self, info: &JobInfo) {
        let slurm = &self.c.world.slurm;
        if self.m.priority.is_none() || info.nice != Some(0) || !slurm.config().is_ok_and(|c| c.priority_type == "priority/basic") {
            return;
        }
        let update = JobUpdate {
            priority: self.m.priority,
            ..JobUpdate::default()
        };
        if let Err(e) = slurm.update_job(self.m.job, &update) {
            log::info!("job {}: its priority is not what it was: {e}", self.m.job);
        }
    }

    /// From 24.05 on Slurm itself requeues a batch job whose script ends within its grace time, and only then forgets that
    /// the job was in it. A job that was requeued by order instead is requeued once more at its end, long after it landed.
    /// So there the shim just ends. Earlier releases would take that for the end of the job.
    fn ends_by_itself(&self, info: &JobInfo) -> Result<bool, String> {
        let slurm = &self.c.world.slurm;
        let requeues = info.requeue
            && info.brief.in_grace()
            && slurm
                .config()
                .is_ok_and(|c| c.release() >= Some((24, 5)) && c.preempt_type == "preempt/partition_prio")
            && slurm
                .partitions()
                .is_ok_and(|all| all.iter().any(|p| p.name == info.brief.partition && p.preempt_mode == "REQUEUE"));
        if !requeues || self.ask(&self.m.from, &PeerRequest::Part { job: self.m.job }, Duration::from_secs(5)) != Ok(PeerReply::Ok) {
            return Ok(false);
        }
        let until = Instant::now() + Duration::from_secs(15);
        while Instant::now() < until {
            match self.job() {
                Some(i) if i.brief.state.is_waiting() => {
                    if self.m.to.is_some() {
                        // Slurm's delay of requeued jobs keeps it from starting elsewhere until now, the hold from now on.
                        self.order("hold", || slurm.hold(self.m.job))?;
                    }
                    return Ok(true);
                }
                Some(_) => self.sleep(),
                None => return Ok(true),
            }
        }
        log::warn!("job {}: its shim did not end", self.m.job);
        Ok(false)
    }

    fn requeued(&mut self) -> Result<Option<String>, String> {
        let Some(info) = self.job() else {
            return Ok(Some(self.job_is_over()));
        };
        if info.brief.state.is_waiting() {
            self.keep_reservation();
            let live = self.m.to.is_some();
            let clear = live && !info.req_nodes.is_empty();
            if clear {
                let nodes = info.req_nodes.clone();
                self.c.notes().change(self.m.job, |n| n.req_nodes = nodes);
            }
            let update = JobUpdate {
                reservation: self.m.held.as_deref().filter(|_| live).map(|node| Some(reservation_of(node))),
                start_now: true,
                time_limit_min: self.m.left_min.filter(|left| Some(*left) != self.m.limit_min),
                req_nodes: clear.then(Vec::new),
                ..JobUpdate::default()
            };
            if let Err(why) = self.order("steer", || self.c.world.slurm.update_job(self.m.job, &update)) {
                // Held for ever is worse than anywhere: it goes on from a save, or starts over.
                self.note(why);
                if let Some(to) = self.m.to.take() {
                    let line = self.kept_out(&to);
                    self.note(line);
                }
            }
            self.order("release", || self.c.world.slurm.release(self.m.job))?;
            self.keep_place(&info);
        }
        self.step(Step::Released);
        Ok(None)
    }

    fn released(&mut self) -> Result<Option<String>, String> {
        let Some(to) = self.m.to.clone() else {
            // Saved: wherever Slurm starts it, the prolog finds the save. Nothing is left to do here.
            return Ok(Some(format!("saved and back in the queue{}", self.because())));
        };
        let until = Instant::now() + Duration::from_secs(self.c.config.node.await_job_s.saturating_sub(5).max(5).into());
        loop {
            let Some(info) = self.job() else {
                return Ok(Some(self.job_is_over()));
            };
            if info.brief.state.is_on_nodes() {
                if info.brief.nodes.contains(&to) {
                    self.step(Step::Landed);
                    return Ok(None);
                }
                let _ = self.ask(&to, &PeerRequest::Release { job: self.m.job }, Duration::from_secs(5));
                self.drop_reservation();
                return Err(format!(
                    "Slurm started the job on {} and not on {to}: its VM there was ended",
                    info.brief.nodes.join(",")
                ));
            }
            if Instant::now() > until {
                return Ok(Some(self.kept_out(&to)));
            }
            self.sleep();
        }
    }

    /// The job does not come to its VM (a hold, a QOS, a licence): save the VM, else let its deadline end it.
    fn kept_out(&mut self, to: &str) -> String {
        let saved = self.ask(
            to,
            &PeerRequest::Save {
                job: self.m.job,
                cause: self.m.cause.clone(),
            },
            MOVE_WITHIN,
        );
        self.drop_reservation();
        if matches!(saved, Ok(PeerReply::Moved(_))) {
            return format!("Slurm kept the job out of {to}: its VM was saved and waits for the job");
        }
        // The VM is lost: the full limit is put back.
        let _ = self.ask(to, &PeerRequest::Release { job: self.m.job }, Duration::from_secs(5));
        let update = JobUpdate {
            time_limit_min: self.m.limit_min,
            ..JobUpdate::default()
        };
        if let Err(e) = self.c.world.slurm.update_job(self.m.job, &update) {
            log::warn!("job {}: its time limit was not put back: {e}", self.m.job);
        }
        format!("Slurm kept the job out of {to} and its VM could not be saved: the job will start over")
    }

    fn landed(&mut self) -> Result<String, String> {
        self.drop_reservation();
        let to = self.m.to.clone().unwrap_or_default();
        Ok(format!("moved from {} to {to}, and runs there", self.m.from))
    }

    /// The job was cancelled or has ended while its VM was under way: no epilog comes for a VM that waits for it.
    fn job_is_over(&mut self) -> String {
        for node in [self.m.to.clone(), Some(self.m.from.clone())].into_iter().flatten() {
            let _ = self.ask(&node, &PeerRequest::Release { job: self.m.job }, Duration::from_secs(5));
        }
        self.drop_reservation();
        "the job ended in the middle of its move; its VM was ended".into()
    }

    fn drop_reservation(&mut self) {
        self.c.leave_place(self.m.job);
        self.m.held = None;
        self.save();
    }
}
