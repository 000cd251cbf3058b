//! The owner thread: turns requests, guest events and time into core events, and carries out effects.
use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender, never, select, unbounded};
use slurm_vm_api::{
    guest::{Action, Scope},
    query::MoveView,
    session::{Cause, Frame, Stream, ToAgent, ToShim},
};

use super::{
    Request, cause,
    explain::Explain,
    moving::{self, MoveOrder},
    place::Place,
    prepare,
    programs::{self, Attach, Programs, ToGuest},
    saving, start, supersede, view,
};
use crate::{
    core::{
        Allocation, Effect, Event, Failure, Gate, HandOverError, Life, Record, RunState, SessionNews, Vm,
        registry::{Meeting, is_for_a_later_run, is_on_its_way_out, meets},
    },
    guest::{GuestLink, LinkConfig, LinkEvent, LinkRequest, UnixTransport},
    hypervisor::DomainState,
    limits::ORDERS_PER_VM,
    node::Node,
};

/// How a VM comes into this agent.
#[derive(Debug)]
pub enum Birth {
    /// Its job begins here, and no save waits for it.
    New(Record),
    /// Its job begins here, and cannot: why, as a fragment.
    Failed(Record, String),
    /// It is expected from another node, or from a save.
    Expected(Record),
    /// It is in the ledger of an agent that was restarted.
    Recovered {
        /// The ledger's record.
        record: Record,
        /// libvirt has its domain; `None` when libvirt did not say.
        domain_here: Option<bool>,
        /// Slurm runs its job here; `None` when Slurm did not say.
        job_here: Option<bool>,
    },
}

/// How often the core is told that time has passed.
const TICK: Duration = Duration::from_millis(500);
/// A wall clock that is off by so many milliseconds since the last look was set.
const CLOCK_STEP_MS: u64 = 1_000;
/// How long shims get to sync their output when the VM leaves.
const HAND_OVER: Duration = Duration::from_secs(5);

struct Owner {
    node: Arc<Node>,
    vm: Vm,
    domain: String,
    tx: Sender<Request>,
    link: Option<(GuestLink, Receiver<LinkEvent>)>,
    programs: Programs,
    waiting_attach: Vec<Attach>,
    releases: Vec<Sender<Result<(), String>>>,
    order: Option<MoveOrder>,
    move_reply: Option<Sender<Result<MoveView, String>>>,
    /// Who waits for an answer to what the source of a move hands over; it comes with the same event.
    source: Option<Sender<Result<(), HandOverError>>>,
    /// Who waits for an answer to what the other end of a move asks; likewise.
    asked: Option<Sender<Result<bool, String>>>,
    hand_over: Option<HandOver>,
    /// Effects, and what waits while the record cannot be written.
    gate: Gate<Effect, Event>,
    /// Programs whose start waits for that.
    unstarted: Vec<ToGuest>,
    next_request: u64,
    /// What set the save off that is under way.
    save_cause: String,
    /// Who waits to be told what a SIGTERM means.
    explain: Explain,
    /// Orders that the guest has not carried out.
    orders: usize,
    started_at: Instant,
    /// The wall clock in Unix milliseconds, and when it showed that.
    clock: (u64, Instant),
}

/// Shims that still have to report that their output is safe.
struct HandOver {
    waiting: Vec<u64>,
    deadline: Instant,
    save: bool,
}

/// Starts the owner thread of a job's VM and returns the way to it. `birth` is called on that thread, and may take its time; if there is to
/// be no VM it says nothing.
#[must_use]
pub fn spawn(node: Arc<Node>, job: u32, birth: impl FnOnce(&Node) -> Option<Birth> + Send + 'static) -> Sender<Request> {
    let (tx, rx) = unbounded();
    let mine = tx.clone();
    let spawned = thread::Builder::new().name(format!("vm-{job}")).spawn(move || {
        let Some(birth) = birth(&node) else { return };
        let (vm, effects) = match birth {
            Birth::New(mut record) => {
                record.k = node.place_in(job);
                Vm::new(record)
            }
            Birth::Failed(record, why) => Vm::failed(record, why),
            Birth::Expected(record) => Vm::expected(record),
            Birth::Recovered {
                record,
                domain_here,
                job_here,
            } => Vm::recovered(record, domain_here, job_here),
        };
        let domain = vm.record.domain();
        let dir = node.world.store.vm_dir(&domain);
        let programs = Programs::new(&vm.record.programs, dir, u64::from(node.config.node.spool_mib) << 20);
        let clock = (node.world.clock.now_ms(), node.world.clock.instant());
        let mut owner = Owner {
            node,
            domain,
            vm,
            tx: mine,
            link: None,
            programs,
            waiting_attach: Vec::new(),
            releases: Vec::new(),
            order: None,
            move_reply: None,
            source: None,
            asked: None,
            hand_over: None,
            gate: Gate::default(),
            unstarted: Vec::new(),
            next_request: 1,
            explain: Explain::default(),
            orders: 0,
            save_cause: String::new(),
            started_at: clock.1,
            clock,
        };
        owner.carry_out(effects);
        owner.run(&rx);
    });
    if let Err(e) = spawned {
        log::error!("job {job}: cannot start its thread: {e}");
    }
    tx
}

impl Owner {
    fn run(&mut self, rx: &Receiver<Request>) {
        let nothing = never();
        let mut next_tick = self.node.world.clock.instant() + TICK;
        loop {
            let link = self.link.as_ref().map_or(&nothing, |(_, events)| events).clone();
            select! {
                recv(rx) -> request => match request {
                    Ok(request) => self.on_request(request),
                    Err(_) => return,
                },
                recv(link) -> event => match event {
                    Ok(event) => self.on_link(event),
                    Err(_) => self.close_guest(),
                },
                default(next_tick.saturating_duration_since(self.node.world.clock.instant())) => {}
            }
            if self.node.world.clock.instant() >= next_tick {
                next_tick = self.node.world.clock.instant() + TICK;
                if self
                    .hand_over
                    .as_ref()
                    .is_some_and(|h| self.node.world.clock.instant() >= h.deadline)
                {
                    self.end_hand_over();
                }
                self.write_again();
                self.watch_clock();
                self.core(Event::Tick);
                self.ask_cause();
                for line in self.programs.take_complaints() {
                    self.journal(&line);
                }
            }
            let idle = !self.gate.is_behind() && self.releases.is_empty() && !self.programs.attached();
            if self.vm.record.life.is_over_here() && idle {
                self.programs.forget_spools();
                if self.node.retire(&self.vm.record, rx) {
                    return;
                }
            }
        }
    }

    /// Deadlines are kept as times of the wall clock, which others set.
    fn watch_clock(&mut self) {
        let (wall_ms, at) = self.clock;
        self.clock = (self.node.world.clock.now_ms(), self.node.world.clock.instant());
        let passed_ms = u64::try_from(self.clock.1.duration_since(at).as_millis()).unwrap_or(u64::MAX);
        let by_ms = i128::from(self.clock.0) - i128::from(wall_ms) - i128::from(passed_ms);
        if by_ms.unsigned_abs() >= u128::from(CLOCK_STEP_MS) {
            self.core(Event::ClockStepped {
                by_ms: i64::try_from(by_ms).unwrap_or(i64::MAX),
            });
        }
    }

    fn core(&mut self, event: Event) {
        if let Some(event) = self.gate.let_in(event) {
            self.decide(event);
        }
    }

    fn decide(&mut self, event: Event) {
        if !matches!(event, Event::Tick) {
            log::debug!("job {}: {} <- {event:?}", self.vm.record.job, self.vm.record.life.name());
        }
        let (before, was_leaving) = (self.vm.record.life.name(), is_on_its_way_out(&self.vm.record.life));
        let effects = self.vm.on_event(self.node.world.clock.now_ms(), self.await_job_ms(), event);
        let after = self.vm.record.life.name();
        if before != after {
            log::info!("job {}: {before} -> {after}", self.vm.record.job);
        }
        self.carry_out(effects);
        let stays = was_leaving && !is_on_its_way_out(&self.vm.record.life);
        if stays && self.node.stays(&self.vm.record) {
            let run = self.vm.record.run + 1;
            self.core(Event::JobHere { run });
        }
        if stays {
            // Shims of that run may have waited.
            self.tell_sessions(SessionNews::Ready);
        }
    }

    fn await_job_ms(&self) -> u64 {
        u64::from(self.node.config.node.await_job_s) * 1000
    }

    fn on_request(&mut self, request: Request) {
        match request {
            Request::JobHere { uid, reply } => {
                let meeting = meets(&self.vm.record, uid);
                if let Meeting::Goes { run } = meeting {
                    self.core(Event::JobHere { run });
                }
                let _ = reply.send(meeting);
            }
            Request::Release(reply) => {
                self.releases.push(reply);
                self.core(Event::Release);
            }
            Request::Attach(a) => self.attach(*a),
            Request::FromShim { session, frame, pass: _ } => self.on_shim(session, frame),
            Request::Explained(cause) => {
                self.vm.record.run_state.term_unexplained |= cause.is_none();
                let cause = cause.unwrap_or(Cause::Unknown);
                for session in self.explain.answered() {
                    self.tell_cause(session, cause);
                }
                self.ask_cause();
            }
            Request::Detach { session } => {
                self.programs.detach(session);
                self.explain.forget(session);
                self.waiting_attach.retain(|a| a.session != session);
                self.vm.record.programs = self.programs.records();
                self.hand_over_done(session);
            }
            Request::View(reply) => {
                self.vm.record.programs = self.programs.records();
                let _ = reply.send(view::of(&self.node, &self.vm.record));
            }
            Request::Record(reply) => {
                self.vm.record.programs = self.programs.records();
                let _ = reply.send(self.vm.record.clone());
            }
            Request::Core(event) => self.core(event),
            Request::MoveOut { order, reply } => {
                if let Some(why) = self.unrecorded() {
                    let _ = reply.send(Err(why));
                    return;
                }
                if self.move_reply.is_some() {
                    let _ = reply.send(Err("another move of this VM is under way".into()));
                    return;
                }
                let event = Event::MoveOut {
                    move_id: order.move_id.clone(),
                    to: order.to.clone(),
                    cause: order.cause.clone(),
                };
                self.order = Some(order);
                self.move_reply = Some(reply);
                self.core(event);
            }
            Request::Save { cause, reply } => {
                if let Some(why) = self.unrecorded() {
                    let _ = reply.send(Err(why));
                    return;
                }
                if self.move_reply.is_some() {
                    let _ = reply.send(Err("another move of this VM is under way".into()));
                    return;
                }
                match saving::fits(&self.node, &self.vm.record) {
                    Ok(at) => {
                        self.save_cause.clone_from(&cause);
                        self.move_reply = Some(reply);
                        self.core(Event::Save { at, cause });
                    }
                    Err(why) => {
                        let _ = reply.send(Err(why.to_string()));
                    }
                }
            }
            Request::Saved(output) => self.effect(Effect::Keep(output)),
            Request::Kept { reply, .. } | Request::TookOver { reply, .. } if self.gate.is_shut().is_some() => {
                let _ = reply.send(Err(HandOverError::NotNow(self.unrecorded().unwrap_or_default())));
            }
            Request::Asked { reply, .. } if self.gate.is_shut().is_some() => {
                let _ = reply.send(Err(self.unrecorded().unwrap_or_default()));
            }
            Request::Recorded(reply) => {
                let _ = reply.send(self.unrecorded().map_or(Ok(()), Err));
            }
            Request::Kept { by, output, reply } => {
                self.source = Some(reply);
                self.core(Event::Kept { by, output });
            }
            Request::TookOver {
                by,
                programs,
                moves,
                reply,
            } => {
                self.source = Some(reply);
                self.core(Event::TookOver { by, programs, moves });
            }
            Request::Asked { by, question, runs, reply } => {
                self.asked = Some(reply);
                self.core(Event::Asked { by, question, runs });
            }
            Request::Progress(reply) => {
                let text = matches!(self.vm.record.life, Life::Leaving { .. } | Life::Saving { .. })
                    .then(|| moving::progress_line(&self.node.world, &self.domain, &self.vm.record.life));
                let _ = reply.send(text);
            }
            Request::Grace => self.run_state(|s| s.in_grace = true),
            Request::Part => {
                let left = matches!(self.vm.record.life, Life::Gone { .. } | Life::Saved { .. });
                self.run_state(|s| s.parted = !left);
                self.programs
                    .tell_all(&ToShim::Cause(if left { Cause::Moved } else { Cause::Requeued }));
            }
        }
    }

    fn attach(&mut self, a: Attach) {
        let restart = a.open.restart;
        if is_for_a_later_run(&self.vm.record, restart) {
            // When this VM has left, its connection is closed, and it comes again.
            a.to.send(Frame::Control(ToShim::Progress(
                "the VM of the job's last run is still on its way out".into(),
            )));
            self.waiting_attach.push(a);
            return;
        }
        self.run_state(|s| s.restart = s.restart.max(restart));
        match &self.vm.record.life {
            Life::Stopping { why } | Life::Stopped { why } => {
                if let Some(ended) = self
                    .programs
                    .batch_ended()
                    .filter(|_| a.open.step == slurm_vm_api::session::BATCH_STEP)
                {
                    // Slurm >= 24.05 requeues a job that ended within its grace time: it is not run again.
                    a.to.send(Frame::Control(ToShim::Started {
                        from: vec![],
                        resumed: true,
                    }));
                    a.to.send(Frame::Control(ToShim::Exited(ended)));
                    return;
                }
                let (outcome, why) = why
                    .verdict()
                    .unwrap_or((slurm_vm_api::outcome::NODE_FAULT.into(), "the VM of this job was stopped".into()));
                a.to.send(Frame::Control(ToShim::Failed { outcome, why }));
            }
            Life::Running | Life::AwaitingJob { .. } | Life::Leaving { .. } if self.gate.is_shut().is_none() => {
                let session = a.session;
                let (persist, requests) = self.programs.attach(a, self.vm.record.run);
                if persist {
                    self.vm.record.programs = self.programs.records();
                    self.carry_out(vec![Effect::Persist]);
                }
                log::debug!("job {}: session {session} attached", self.vm.record.job);
                self.send_guest(requests);
            }
            _ => {
                let line = self
                    .unrecorded()
                    .unwrap_or_else(|| format!("the VM is {}", self.vm.record.life.name()));
                a.to.send(Frame::Control(ToShim::Progress(line)));
                self.waiting_attach.push(a);
            }
        }
    }

    fn on_shim(&mut self, session: u64, frame: Frame<ToAgent>) {
        let Some((program, batch)) = self.programs.of_session(session) else {
            // The program has not been started yet: only signals matter, and TERM needs an answer. A stranger gets none.
            let waits = self.waiting_attach.iter().any(|a| a.session == session);
            if waits && matches!(frame, Frame::Control(ToAgent::WhyTerm)) {
                self.explain_term(session);
            }
            return;
        };
        let requests = match frame {
            Frame::Data {
                stream: Stream::Stdin,
                offset,
                bytes,
            } => vec![ToGuest::Stdin { program, offset, bytes }],
            Frame::Control(ToAgent::StdinEof { offset }) => vec![ToGuest::StdinEof { program, offset }],
            Frame::Control(ToAgent::Wrote { stream, offset }) => self.programs.wrote(session, stream, offset),
            Frame::Control(ToAgent::Signal { signo }) => {
                let all = !batch || matches!(signo, libc::SIGTERM | libc::SIGKILL | libc::SIGCONT);
                vec![ToGuest::Signal {
                    program,
                    signo,
                    scope: if all { Scope::All } else { Scope::Leader },
                }]
            }
            Frame::Control(ToAgent::Resize(t)) => vec![ToGuest::Resize {
                program,
                rows: t.rows,
                cols: t.cols,
            }],
            Frame::Control(ToAgent::WhyTerm) => {
                self.explain_term(session);
                vec![]
            }
            Frame::Control(ToAgent::Notice) if self.vm.record.run_state.in_grace => vec![],
            Frame::Control(ToAgent::Notice) => {
                self.run_state(|s| s.in_grace = true);
                self.journal("Slurm's preemption notice arrived");
                self.node.notice(self.vm.record.job);
                vec![]
            }
            Frame::Control(ToAgent::HandedOver { wrote, sinks }) => {
                let mut requests = Vec::new();
                self.programs.sealed(session, &sinks);
                for (stream, offset) in wrote {
                    requests.extend(self.programs.wrote(session, stream, offset));
                }
                self.send_guest(requests);
                self.hand_over_done(session);
                return;
            }
            _ => vec![],
        };
        self.send_guest(requests);
    }

    /// Finds out from Slurm what a SIGTERM means, without blocking this thread.
    fn explain_term(&mut self, session: u64) {
        let record = &self.vm.record;
        let left = matches!(record.life, Life::Gone { .. } | Life::Saved { .. });
        let stopped_for_requeue = matches!(
            &record.life,
            Life::Stopping {
                why: crate::core::End::Requeued
            } | Life::Stopped {
                why: crate::core::End::Requeued
            }
        );
        if left || stopped_for_requeue {
            self.tell_cause(session, if left { Cause::Moved } else { Cause::Requeued });
            return;
        }
        self.explain.wanted_by(session);
        self.ask_cause();
    }

    fn tell_cause(&self, session: u64, cause: Cause) {
        let waiting = self.waiting_attach.iter().find(|a| a.session == session).map(|a| a.to.clone());
        if let Some(to) = waiting.or_else(|| self.programs.sender(session)) {
            to.send(Frame::Control(ToShim::Cause(cause)));
        }
    }

    /// Asks Slurm on a thread of its own, if somebody waits for it and it is time.
    fn ask_cause(&mut self) {
        if !self.explain.due(self.node.world.clock.instant()) {
            return;
        }
        let (node, job) = (self.node.clone(), self.vm.record.job);
        let (restarts, domain, tx) = (self.vm.record.run_state.restart, self.domain.clone(), self.tx.clone());
        worker(job, "cause", move || {
            let cause = cause::of_term(&*node.world.slurm, job, restarts);
            log::info!("job {job}: SIGTERM because of {cause:?}");
            node.world
                .store
                .journal(&domain, node.world.clock.now_ms(), &format!("SIGTERM: {cause:?}"));
            let _ = tx.send(Request::Explained(cause));
        });
    }

    fn on_link(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Up { hello } => {
                self.programs.run_in(Place::of_record(&self.vm.record));
                let requests = self.programs.guest_up(&hello.programs);
                self.core(Event::GuestUp {
                    boot_id: hello.boot_id.clone(),
                });
                if self.vm.record.plan.as_ref().is_some_and(|plan| plan.seed.is_some()) {
                    self.tell_guest(Action::SetHostname { name: self.domain.clone() });
                }
                // A guest that was moved or restored has lost time.
                self.effect(Effect::SetClock);
                self.send_guest(requests);
                self.sync_programs();
            }
            LinkEvent::Down { reason } => {
                log::debug!("job {}: guest link down: {reason}", self.vm.record.job);
                self.programs.guest_down();
            }
            LinkEvent::Data {
                program,
                stream,
                offset,
                bytes,
            } => {
                let requests = self.programs.data(program, stream, offset, &bytes);
                self.send_guest(requests);
            }
            LinkEvent::Started { program, report } => {
                let requests = self.programs.started(program, &report);
                if let Some(note) = self.programs.take_note(program) {
                    self.journal(&note);
                }
                self.send_guest(requests);
            }
            LinkEvent::Refused { program, message, .. } => {
                self.journal(&format!("program {program} was refused by the guest: {message}"));
                self.programs.refused(program, &message);
                self.sync_programs();
            }
            LinkEvent::Exited { program, status, streams } => {
                self.journal(&format!("program {program} ended: {status:?}"));
                let ends: Vec<_> = streams.iter().map(|s| (s.stream, s.end)).collect();
                let ended = programs::ended(status, "");
                if self.vm.record.run_state.counts_for_the_next_run(&ended) && self.programs.is_batch(program) {
                    self.node.keep_completion(&self.vm.record, ended);
                }
                let requests = self.programs.exited(program, status, &ends);
                self.send_guest(requests);
                self.sync_programs();
            }
            LinkEvent::Lost {
                program, stream, start, ..
            } => {
                let requests = self.programs.lost_before(program, stream, start);
                self.send_guest(requests);
            }
            LinkEvent::ProgramLost { program } => {
                self.programs.lost(program);
                self.sync_programs();
            }
            LinkEvent::ClockWas { behind_ns } => self.clock_was(behind_ns),
            LinkEvent::Done { .. } => self.orders = self.orders.saturating_sub(1),
            LinkEvent::StdinAck { program, offset } => self.programs.stdin_taken(program, offset),
            other => log::debug!("job {}: guest link: {other:?}", self.vm.record.job),
        }
    }

    /// The first setting of the clock after a live move tells how long the guest stood still: its clock was set right
    /// before the copying began, and stands still with it. That is good to some ten milliseconds; less than QEMU's own
    /// downtime it cannot have been.
    fn clock_was(&mut self, behind_ns: i64) {
        let here = self.node.name.clone();
        if let Some(m) = self
            .vm
            .record
            .moves
            .last_mut()
            .filter(|m| m.way == "live" && m.to == here && m.gap_ms.is_none())
        {
            let behind_ms = u64::try_from(behind_ns / 1_000_000).unwrap_or(0);
            let gap_ms = behind_ms.max(m.downtime_ms.unwrap_or(0));
            m.gap_ms = Some(gap_ms);
            let line = format!("the guest stood still for {gap_ms} ms");
            self.journal(&line);
            self.carry_out(vec![Effect::Persist]);
        }
    }

    fn close_guest(&mut self) {
        if let Some((link, _)) = self.link.take() {
            link.stop();
        }
        self.orders = 0;
        self.programs.link_gone();
    }

    /// What is learned of the job's run outlasts this agent.
    fn run_state(&mut self, learn: impl FnOnce(&mut RunState)) {
        let before = self.vm.record.run_state;
        learn(&mut self.vm.record.run_state);
        if self.vm.record.run_state != before {
            self.carry_out(vec![Effect::Persist]);
        }
    }

    /// Ends and offsets of programs go to the ledger.
    fn sync_programs(&mut self) {
        self.vm.record.programs = self.programs.records();
        self.carry_out(vec![Effect::Persist]);
    }

    fn send_guest(&mut self, requests: Vec<ToGuest>) {
        if self.link.is_none() {
            return;
        }
        for r in requests {
            // An agent that was restarted would not know a program that is in no record.
            if matches!(r, ToGuest::Start { .. }) && self.gate.is_shut().is_some() {
                self.unstarted.push(r);
                continue;
            }
            let order = matches!(r, ToGuest::Signal { .. } | ToGuest::Resize { .. });
            if order && self.orders >= ORDERS_PER_VM {
                log::debug!(
                    "job {}: {} orders wait for the guest: {r:?} is dropped",
                    self.vm.record.job,
                    self.orders
                );
                continue;
            }
            let request = match r {
                ToGuest::Start { program, spec, script } => LinkRequest::Start { program, spec, script },
                ToGuest::Resume { program, stream, from } => LinkRequest::Resume { program, stream, from },
                ToGuest::Ack { program, stream, offset } => LinkRequest::Ack { program, stream, offset },
                ToGuest::Stdin { program, offset, bytes } => LinkRequest::Stdin { program, offset, bytes },
                ToGuest::StdinEof { program, offset } => LinkRequest::StdinEof { program, offset },
                ToGuest::Signal { program, signo, scope } => self.action(Action::Signal { program, signo, scope }),
                ToGuest::Resize { program, rows, cols } => self.action(Action::Resize { program, rows, cols }),
            };
            if let Some((link, _)) = &self.link {
                link.send(request);
            }
            self.next_request += 1;
        }
    }

    fn action(&mut self, action: Action) -> LinkRequest {
        self.orders += 1;
        LinkRequest::Do {
            token: self.next_request,
            action,
        }
    }

    /// Has the guest do something that needs no program; nothing without a link.
    fn tell_guest(&mut self, action: Action) {
        if self.link.is_none() {
            return;
        }
        let request = self.action(action);
        if let Some((link, _)) = &self.link {
            link.send(request);
        }
        self.next_request += 1;
    }

    fn journal(&self, line: &str) {
        self.node.world.store.journal(&self.domain, self.node.world.clock.now_ms(), line);
    }

    fn carry_out(&mut self, effects: Vec<Effect>) {
        self.gate.push(effects);
        while let Some(effect) = self.gate.next_effect() {
            if effect == Effect::Persist {
                self.persist();
            } else {
                self.effect(effect);
            }
        }
    }

    /// Writes the record. If that fails, nothing behind it is done until it can be written.
    fn persist(&mut self) {
        self.vm.record.programs = self.programs.records();
        self.node.mark(&self.vm.record);
        match self.node.world.store.put(&self.vm.record).map_err(|e| crate::text::chain(&e)) {
            Ok(()) => {
                if self.gate.written() {
                    log::info!("job {}: its record is written again", self.vm.record.job);
                }
            }
            Err(why) => {
                let now_ms = self.node.world.clock.now_ms();
                if self.gate.not_written(&self.vm, now_ms, why.clone()) {
                    let waits = self
                        .gate
                        .is_shut()
                        .map_or("", |_| ": its VM does nothing new until that can be written");
                    log::error!("job {}: {why}{waits}", self.vm.record.job);
                }
            }
        }
    }

    /// Tries a write that failed again, and goes on with what waits.
    fn write_again(&mut self) {
        if self.gate.is_shut().is_none() {
            if self.gate.is_behind() {
                self.persist();
            }
            return;
        }
        self.gate.open();
        self.carry_out(vec![]);
        let (now_ms, await_ms) = (self.node.world.clock.now_ms(), self.await_job_ms());
        if self.gate.give_up(&mut self.vm, now_ms, await_ms) {
            self.carry_out(vec![]);
        }
        while let Some(event) = self.gate.next_event() {
            self.decide(event);
        }
        if self.gate.is_shut().is_none() {
            let starts = std::mem::take(&mut self.unstarted);
            self.send_guest(starts);
            self.tell_sessions(SessionNews::Ready);
        }
    }

    /// Why nothing new can be begun with the VM now.
    fn unrecorded(&self) -> Option<String> {
        self.gate
            .is_shut()
            .map(|why| format!("its record cannot be written on {}: {why}", self.node.name))
    }

    fn effect(&mut self, effect: Effect) {
        let node = self.node.clone();
        let record = self.vm.record.clone();
        let tx = self.tx.clone();
        let job = record.job;
        let domain = self.domain.clone();
        match effect {
            Effect::Persist => self.persist(),
            Effect::Journal(line) => {
                log::info!("job {job}: {line}");
                self.journal(&line);
            }
            Effect::Prepare => worker(job, "prepare", move || {
                let done = prepare::allotted(&node.world, &record.node, job).and_then(|given| {
                    if let Some(restarts) = given.allocation.restarts.filter(|n| *n > 0) {
                        supersede::end_elsewhere(&node, job, restarts).map_err(Failure::Node)?;
                    }
                    prepare::prepare(&node.world, &node.config, node.domain_type(), &record, given)
                });
                let _ = tx.send(Request::Core(Event::Prepared(done)));
            }),
            Effect::StartDomain => worker(job, "start", move || {
                let _ = tx.send(Request::Core(Event::DomainStarted(start::domain(&node, &record))));
            }),
            Effect::OpenGuest => {
                let socket = prepare::run_dir(&node.config, &domain).join("guest.sock");
                self.close_guest();
                // Another seed for each link keeps the answers to this one apart from those to an earlier one.
                let seed = node.world.clock.now_ms();
                match GuestLink::start(LinkConfig::new(job.to_string(), seed), Box::new(UnixTransport::new(socket))) {
                    Ok(link) => self.link = Some(link),
                    Err(e) => log::error!("job {job}: cannot talk to the guest: {e}"),
                }
            }
            Effect::CloseGuest => self.close_guest(),
            Effect::Destroy => worker(job, "destroy", move || {
                let _ = tx.send(Request::Core(Event::Destroyed(moving::destroy(&node, &record))));
            }),
            Effect::Clear => {
                // Not on a thread of its own: who is answered next may send the VM back here.
                // libvirt leaves a paused copy where it could not tell how a migration ended.
                if let Err(e) = node.world.hypervisor.destroy(&domain) {
                    log::error!("job {job}: cannot end what is left of {domain}: {e}");
                }
                moving::clear_here(&node, &record);
            }
            Effect::Sessions(news) => self.tell_sessions(news),
            Effect::AnswerRelease(outcome) => {
                for reply in self.releases.drain(..) {
                    let _ = reply.send(outcome.clone());
                }
            }
            Effect::AnswerMove(outcome) => {
                self.order = None;
                if let Some(reply) = self.move_reply.take() {
                    let _ = reply.send(outcome.map(|m| *m));
                }
            }
            Effect::AskDestination => {
                let Some(order) = self.order.clone() else {
                    self.core(Event::DestinationReady(Err("the order of the move was lost".into())));
                    return;
                };
                self.effect(Effect::SetClock);
                worker(job, "ask", move || {
                    let done = moving::ask_destination(&node, &record, &order);
                    let _ = tx.send(Request::Core(Event::DestinationReady(done)));
                });
            }
            Effect::Migrate => {
                let Some(order) = self.order.clone() else {
                    self.core(Event::Migrated(Err("the order of the move was lost".into())));
                    return;
                };
                worker(job, "migrate", move || {
                    let done = moving::migrate(&node, &record, &order);
                    let _ = tx.send(Request::Core(Event::Migrated(done.map(Box::new))));
                });
            }
            Effect::AbortMigration => worker(job, "abort", move || {
                if let Err(e) = node.world.hypervisor.abort_job(&domain) {
                    log::info!("job {job}: cannot abort the move: {e}");
                }
            }),
            Effect::AskOwner => {
                let order = self.order.clone();
                worker(job, "owner", move || {
                    let owner = moving::find_guest(&node, &record, order.as_ref());
                    log::info!("job {job}: the guest is {owner:?}");
                    let _ = tx.send(Request::Core(Event::OwnerIs(owner)));
                });
            }
            Effect::AskDomain => worker(job, "domain", move || {
                // A transient domain that has ended is seen for a moment still.
                let ended = |s| matches!(s, DomainState::Shutoff | DomainState::Crashed);
                let here = node
                    .world
                    .hypervisor
                    .info(&domain)
                    .map(|d| d.is_some_and(|d| d.uuid == record.uuid() && !ended(d.state)));
                let _ = tx.send(Request::Core(Event::DomainIs(here.ok())));
            }),
            Effect::AskJob => worker(job, "job", move || {
                let _ = tx.send(Request::Core(Event::JobIs(node.job_here(job))));
            }),
            Effect::AbandonDestination { to, by } => {
                let order = self.order.clone();
                worker(job, "abandon", move || moving::abandon(&node, job, &to, by, order.as_ref()));
            }
            Effect::Adopt(programs) => programs.iter().for_each(|p| self.programs.adopt(p)),
            Effect::Keep(o) => self.programs.take_spool(o.program, o.stream, o.offset, &o.bytes),
            Effect::AnswerSource(answer) => {
                if let Some(reply) = self.source.take() {
                    let _ = reply.send(answer);
                }
            }
            Effect::AnswerAsked(answer) => {
                if let Some(reply) = self.asked.take() {
                    let _ = reply.send(answer);
                }
            }
            Effect::HandOver => self.begin_hand_over(false),
            Effect::WriteSave => {
                // The guest stands still first, so that what shims then report is final.
                if let Err(e) = node.world.hypervisor.suspend(&domain) {
                    self.core(Event::SaveWritten(Err(format!("cannot pause the guest: {e}"))));
                    return;
                }
                self.begin_hand_over(true);
            }
            Effect::ResumeDomain => worker(job, "resume", move || {
                let done = node.world.hypervisor.resume(&domain);
                let event = match done {
                    Err(_) if matches!(node.world.hypervisor.info(&domain), Ok(None)) => Event::DomainEnded {
                        how: "its domain is gone".into(),
                    },
                    done => Event::Resumed(done.map_err(|e| e.to_string())),
                };
                let _ = tx.send(Request::Core(event));
            }),
            Effect::Restore => worker(job, "restore", move || {
                let restored = saving::restore(&node, &record);
                if restored.as_ref().is_err_and(|e| e.job_left) {
                    let _ = tx.send(Request::Core(Event::GiveUp));
                }
                let done = restored.map(|(done, kept)| {
                    for output in kept {
                        let _ = tx.send(Request::Saved(output.into()));
                    }
                    Box::new(done)
                });
                let done = done.map_err(|e| e.why);
                let _ = tx.send(Request::Core(Event::Restored(done)));
            }),
            Effect::Pin => worker(job, "pin", move || {
                let pin = |given: Allocation| {
                    // libvirt would make the call wait for the end of a move or a save.
                    if matches!(node.world.hypervisor.job_progress(&domain), Ok(Some(_))) {
                        return Err("it is on its way".to_owned());
                    }
                    let done = node.world.hypervisor.pin(&domain, &given.pinned);
                    done.map(|()| given).map_err(|e| e.to_string())
                };
                let done = match prepare::allotted(&node.world, &record.node, job) {
                    Ok(given) => pin(given.allocation),
                    Err(e) => Err(e.why()),
                };
                let _ = tx.send(Request::Core(Event::Pinned(done)));
            }),
            Effect::SetClock => {
                let unix_ns = node.world.clock.now_ms() * 1_000_000;
                self.tell_guest(Action::SetClock { unix_ns });
            }
        }
    }

    fn tell_sessions(&mut self, news: SessionNews) {
        match news {
            SessionNews::Progress(line) => {
                for a in &self.waiting_attach {
                    a.to.send(Frame::Control(ToShim::Progress(line.clone())));
                }
            }
            SessionNews::Ready => {
                for a in std::mem::take(&mut self.waiting_attach) {
                    self.attach(a);
                }
            }
            SessionNews::Lost(why) => {
                if let Some((outcome, why)) = why.verdict() {
                    let message = ToShim::Failed { outcome, why };
                    self.programs.fail_unfinished(&message);
                    for a in self.waiting_attach.drain(..) {
                        a.to.send(Frame::Control(message.clone()));
                    }
                }
            }
            SessionNews::Left => self.programs.tell_all(&ToShim::HandOver),
            SessionNews::TakeBack => self.programs.tell_all(&ToShim::TakeBack),
        }
    }

    fn begin_hand_over(&mut self, save: bool) {
        self.hand_over = Some(HandOver {
            waiting: self.programs.session_ids(),
            deadline: self.node.world.clock.instant() + HAND_OVER,
            save,
        });
        if self.hand_over.as_ref().is_some_and(|h| h.waiting.is_empty()) {
            self.end_hand_over();
        }
    }

    fn hand_over_done(&mut self, session: u64) {
        if let Some(h) = &mut self.hand_over {
            h.waiting.retain(|s| *s != session);
            if h.waiting.is_empty() {
                self.end_hand_over();
            }
        }
    }

    fn end_hand_over(&mut self) {
        let Some(h) = self.hand_over.take() else { return };
        if !h.waiting.is_empty() {
            self.journal(&format!("{} shim(s) did not report their output in time", h.waiting.len()));
        }
        self.vm.record.programs = self.programs.records();
        let (node, record, tx, order, job) = (
            self.node.clone(),
            self.vm.record.clone(),
            self.tx.clone(),
            self.order.clone(),
            self.vm.record.job,
        );
        let spools = self.programs.spools();
        let domain = self.domain.clone();
        if h.save {
            let cause = self.save_cause.clone();
            worker(job, "save", move || {
                let done = saving::save(&node, &record, &spools, &cause).map_err(|e| e.to_string());
                let _ = tx.send(Request::Core(Event::SaveWritten(done.map(Box::new))));
            });
        } else {
            worker(job, "hand-over", move || {
                let done = moving::hand_over(&node, &record, order.as_ref(), &spools);
                let bytes: usize = spools.iter().map(|(_, _, _, bytes)| bytes.len()).sum();
                if done.is_err() && bytes > 0 {
                    let line = format!("{bytes} bytes of output that were kept for a shim could not be handed over");
                    node.world.store.journal(&domain, node.world.clock.now_ms(), &line);
                }
                let _ = tx.send(Request::Core(Event::HandedOver(done)));
            });
        }
    }
}

impl std::fmt::Debug for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Owner")
            .field("domain", &self.domain)
            .field("age", &self.node.world.clock.since(self.started_at))
            .finish_non_exhaustive()
    }
}

/// Runs a slow effect on a thread of its own.
fn worker(job: u32, what: &str, run: impl FnOnce() + Send + 'static) {
    if let Err(e) = thread::Builder::new().name(format!("{what}-{job}")).spawn(run) {
        log::error!("job {job}: cannot start a thread for {what}: {e}");
    }
}
