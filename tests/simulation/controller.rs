//! The controller as it is: the moves' machines ([`slurm_vm::core::relocation`]), placement and slots are production code. What is
//! played here is the driver around them: messages that take their time or are lost, writes that fail, kills and restarts.
use std::collections::{BTreeMap, BTreeSet};

use slurm_vm::{
    controller::{
        placement::{self, Arrival, Claims, Picture, PreemptRule, Want, by_node, is_ours, reservation_of},
        relocate::next_slots,
    },
    core::{
        Gate, Life,
        relocation::{
            Effect, Event, JobMove, JobSeen, MOVE_VERSION, Order as SlurmOrder, OrderError, Relocation, Reply, Resources, Standing, Step,
            Word,
        },
    },
    slurm::{JobBrief, JobUpdate, ReservationNodes, ReservationSpec, Slurm, SlurmError},
};
use slurm_vm_api::spec::PreemptWay;

use crate::cluster::{AWAIT_JOB_MS, Cluster, Message, Order};

/// What comes to the controller later.
#[derive(Debug, Clone)]
pub enum Later {
    /// An event for a job's move.
    Event(Event),
    /// The source is asked for its VM.
    AskSource { node: String },
    /// The shim of the job at the source is told to end.
    Part { node: String },
    /// Slurm is to carry out an order.
    Order(SlurmOrder),
    /// The reservation is to be made again if it is gone.
    KeepPlace { node: String },
}

#[derive(Debug)]
struct Active {
    r: Relocation,
    /// Effects, and what waits while the ledger cannot be written.
    gate: Gate<Effect, Event>,
    /// The request that is out: its id, the node, the agent's epoch, since when.
    asked: Option<(u64, String, u64, u64)>,
}

#[derive(Debug)]
pub struct Controller {
    pub alive: bool,
    pub epoch: u64,
    /// On record: what a restart finds.
    ledger: BTreeMap<u32, JobMove>,
    claims: Claims,
    active: BTreeMap<u32, Active>,
    /// Who wants a place, and until when.
    wants: BTreeMap<u32, Option<u64>>,
    holds: BTreeMap<u32, (String, Resources)>,
    answers: BTreeMap<u64, Result<(), String>>,
}

impl Default for Controller {
    fn default() -> Self {
        Self {
            alive: true,
            epoch: 1,
            ledger: BTreeMap::new(),
            claims: Claims::default(),
            active: BTreeMap::new(),
            wants: BTreeMap::new(),
            holds: BTreeMap::new(),
            answers: BTreeMap::new(),
        }
    }
}

impl Controller {
    pub fn kill(&mut self) {
        self.alive = false;
        self.epoch += 1;
        self.answers.clear();
        self.active.clear();
        self.wants.clear();
        self.holds.clear();
    }

    pub fn restart(&mut self) {
        self.alive = true;
        for (job, record) in self.ledger.clone() {
            if let Some(node) = &record.held {
                self.holds.insert(job, (node.clone(), record.needs));
            }
            let (r, _) = Relocation::resumed(record, AWAIT_JOB_MS, true);
            self.active.insert(job, active(r));
        }
    }

    pub fn answered(&mut self, id: u64, epoch: u64, outcome: Result<(), String>) {
        if self.alive && self.epoch == epoch {
            self.answers.insert(id, outcome);
        }
    }

    /// Moves under way or on record.
    pub fn moves(&self) -> usize {
        self.active.len().max(self.ledger.len())
    }

    /// A move of the job is under way.
    pub fn has(&self, job: u32) -> bool {
        self.active.contains_key(&job) || self.ledger.contains_key(&job)
    }
}

fn active(r: Relocation) -> Active {
    Active {
        r,
        gate: Gate::default(),
        asked: None,
    }
}

fn standing(brief: &JobBrief) -> Standing {
    if brief.state.is_waiting() {
        Standing::Waiting
    } else if brief.state.is_on_nodes() {
        Standing::OnNodes
    } else {
        Standing::Completing
    }
}

impl Cluster {
    /// Begins a move of a job's VM unless one is under way.
    pub fn ask_move(&mut self, job: u32, cause: &str) {
        let info = self.slurm.job(job).ok().flatten();
        let Some(info) = info.filter(|i| i.brief.state.is_on_nodes() && self.controller.alive) else {
            return;
        };
        let brief = info.brief;
        let Some(from) = brief.nodes.first().cloned() else { return };
        if self.controller.has(job) {
            return;
        }
        let ways = if cause == "asked" {
            vec![PreemptWay::Live]
        } else {
            match self.random.next() % 4 {
                0 => vec![PreemptWay::Save, PreemptWay::Requeue],
                1 => vec![PreemptWay::Live, PreemptWay::Requeue],
                _ => PreemptWay::DEFAULT.to_vec(),
            }
        };
        self.say(&format!("controller: job {job} is to leave {from} ({cause}): {ways:?}"));
        let deadline_ms = brief.end_time.and_then(|t| u64::try_from(t).ok()).map(|t| t * 1000);
        let record = JobMove {
            v: MOVE_VERSION,
            job,
            user: brief.user.clone(),
            cause: cause.into(),
            step: Step::Planned,
            from,
            to: None,
            to_asked: false,
            held: None,
            needs: Resources {
                cpus: info.num_cpus,
                mem_mib: info.allocs.first().map_or(0, |a| a.mem_mib),
            },
            nodes: 1,
            ways,
            deadline_ms: deadline_ms.filter(|_| cause == "preemption"),
            reserve_ms: 2_000,
            time_before: None,
            limit_min: None,
            left_min: None,
            used_s: 0,
            priority: Some(brief.priority),
            restarts: brief.restarts,
            moved_ms: None,
            settling_ms: None,
            lost: false,
            constraint: brief.features.clone(),
            exclude: info.exclude_nodes.clone(),
            partition: brief.partition.clone(),
            notes: vec![],
            done: None,
            moving: false,
        };
        let (r, effects) = Relocation::new(record, AWAIT_JOB_MS, true);
        self.controller.active.insert(job, active(r));
        self.carry_out_move(job, effects);
    }

    /// Something happened to a job's move.
    pub fn move_event(&mut self, job: u32, event: Event) {
        let now = self.now;
        let Some(a) = self.controller.active.get_mut(&job) else {
            if let Event::Placed(Ok(_)) = event {
                self.leave_place(job);
            }
            return;
        };
        if a.gate.is_shut().is_some() {
            if !matches!(event, Event::Poll(_)) {
                a.gate.hold(event);
            }
            return;
        }
        let before = a.r.record.step;
        let effects = a.r.on_event(now, event.clone());
        let after = a.r.record.step;
        if self.tracing && (before != after || !effects.is_empty()) {
            self.say(&format!("controller: job {job} {before:?} <- {event:?} -> {after:?}: {effects:?}"));
        }
        self.carry_out_move(job, effects);
    }

    fn carry_out_move(&mut self, job: u32, effects: Vec<Effect>) {
        let now = self.now;
        if let Some(a) = self.controller.active.get_mut(&job) {
            a.gate.push(effects);
        }
        while let Some(effect) = self.controller.active.get_mut(&job).and_then(|a| a.gate.next_effect()) {
            if effect != Effect::Persist {
                self.move_effect(job, effect);
                continue;
            }
            let fails = self.rough(20);
            let Some(a) = self.controller.active.get_mut(&job) else { return };
            if fails {
                a.gate.shut(now, effect, "no space".into());
                self.count("writes of a move that failed");
            } else {
                a.gate.written();
                self.controller.ledger.insert(job, a.r.record.clone());
            }
        }
    }

    fn move_effect(&mut self, job: u32, effect: Effect) {
        let Some(a) = self.controller.active.get(&job) else { return };
        let from = a.r.record.from.clone();
        let later = |what| (job, what);
        match effect {
            Effect::Persist | Effect::Log(_) | Effect::TellJob(_) => {}
            Effect::FindPlace { give_up_ms } => {
                self.controller.wants.insert(job, give_up_ms);
            }
            Effect::LeavePlace => self.leave_place(job),
            Effect::KeepPlace => {
                let node = self.controller.holds.get(&job).map(|(n, _)| n.clone()).unwrap_or_default();
                self.for_controller(later(Later::KeepPlace { node }));
            }
            Effect::MoveOut { to } => self.ask_long(job, from, Order::MoveOut { to }),
            Effect::Save { at } => self.ask_long(job, at, Order::Save),
            Effect::CancelMove => {
                self.order_out(&from, job, Order::Cancel);
            }
            Effect::AskSource => self.for_controller(later(Later::AskSource { node: from })),
            Effect::AskWaiting { node } => self.for_controller(later(Later::AskSource { node })),
            Effect::Part => self.for_controller(later(Later::Part { node: from })),
            Effect::Order(order) => self.for_controller(later(Later::Order(order))),
            Effect::ReleaseVm { node } => {
                self.order_out(&node, job, Order::Release);
            }
            Effect::End(outcome) => {
                self.say(&format!("controller: job {job}: {outcome:?}"));
                self.controller.active.remove(&job);
                self.controller.ledger.remove(&job);
                self.controller.wants.remove(&job);
            }
        }
    }

    fn for_controller(&mut self, (job, what): (u32, Later)) {
        let (delay, epoch) = (self.delay(), self.controller.epoch);
        self.at(delay, Message::Controller { epoch, job, what });
    }

    fn order_out(&mut self, node: &str, job: u32, order: Order) -> u64 {
        let id = self.id();
        let delay = self.delay();
        self.at(
            delay,
            Message::Order {
                node: node.into(),
                job,
                id,
                order,
            },
        );
        id
    }

    fn ask_long(&mut self, job: u32, node: String, order: Order) {
        let id = self.order_out(&node, job, order);
        let (epoch, now) = (self.nodes[&node].epoch, self.now);
        if let Some(a) = self.controller.active.get_mut(&job) {
            a.asked = Some((id, node, epoch, now));
        }
    }

    /// A message to the controller arrives, or what it asked for is looked up.
    pub fn controller_hears(&mut self, epoch: u64, job: u32, what: Later) {
        if !self.controller.alive || self.controller.epoch != epoch {
            // An order is carried out although who gave it is gone.
            if let Later::Order(order) = what {
                let _ = self.slurm_order(job, &order);
            }
            return;
        }
        let event = match what {
            Later::Event(event) => event,
            Later::AskSource { node } => {
                let lost = self.rough(60);
                let n = &self.nodes[&node];
                let word = if n.alive && !lost {
                    let life = n
                        .vms
                        .get(&job)
                        .map(|o| &o.vm.record.life)
                        .or_else(|| n.ledger.get(&job).map(|r| &r.life));
                    Word::of(life.map(Life::name))
                } else {
                    Word::Silence
                };
                Event::Source(word)
            }
            Later::Part { node } => {
                let alive = self.nodes[&node].alive;
                if alive && self.job_here(&node, job) == Some(true) {
                    self.say(&format!("job {job}: its shim ends"));
                    self.slurm.exited(job, 0);
                    self.slurm_events();
                }
                Event::Parted(alive)
            }
            Later::Order(order) => {
                let done = self.slurm_order(job, &order);
                self.slurm_events();
                let done = match done {
                    Ok(()) | Err(SlurmError::NoSuchJob) if self.rough(60) => Err(OrderError::NoAnswer("lost".into())),
                    Ok(()) => Ok(()),
                    Err(e) if e.is_transient() => Err(OrderError::NoAnswer(e.to_string())),
                    Err(e) => Err(OrderError::Refused(e.to_string())),
                };
                Event::Ordered(done)
            }
            Later::KeepPlace { node } => {
                let there = self.slurm.reservation(&reservation_of(&node));
                Event::PlaceKept(match there {
                    Ok(Some(_)) => Ok(()),
                    Ok(None) => self.reserve(&node).map_err(|e| e.to_string()),
                    Err(e) => Err(e.to_string()),
                })
            }
        };
        self.move_event(job, event);
    }

    fn slurm_order(&mut self, job: u32, order: &SlurmOrder) -> Result<(), SlurmError> {
        self.say(&format!("controller: {order:?} for {job}"));
        let slurm = &self.slurm;
        let update = |update: JobUpdate| slurm.update_job(job, &update);
        match order {
            SlurmOrder::Requeue { hold: true } => slurm.requeuehold(&[job]),
            SlurmOrder::Requeue { hold: false } => slurm.requeue(&[job]),
            SlurmOrder::Hold => slurm.hold(&[job]),
            SlurmOrder::AllowRequeue => update(JobUpdate {
                requeue: Some(true),
                ..JobUpdate::default()
            }),
            SlurmOrder::Steer {
                reserved,
                limit_min,
                req_nodes,
            } => update(JobUpdate {
                reservation: reserved.as_deref().map(|n| Some(reservation_of(n))),
                start_now: true,
                time_limit_min: *limit_min,
                req_nodes: (!req_nodes.is_empty()).then(Vec::new),
                ..JobUpdate::default()
            }),
            SlurmOrder::Release => slurm.release(&[job]),
            SlurmOrder::Priority(_) => Ok(()),
            SlurmOrder::Limit(minutes) => update(JobUpdate {
                time_limit_min: Some(*minutes),
                ..JobUpdate::default()
            }),
            SlurmOrder::Cancel => slurm.cancel(job, None),
        }
    }

    pub fn controller_tick(&mut self) {
        if !self.controller.alive {
            return;
        }
        let Ok(poll) = self.slurm.jobs_poll() else { return };
        self.controller.claims.follow(&poll, |_| None);
        let victims: Vec<u32> = poll
            .iter()
            .filter(|j| j.in_grace() && self.vm_jobs.contains_key(&j.id))
            .map(|j| j.id)
            .collect();
        for job in victims {
            let without_deadline = self
                .controller
                .active
                .get(&job)
                .is_some_and(|a| a.r.record.step == Step::Planned && a.r.record.deadline_ms.is_none());
            if without_deadline {
                self.move_event(job, Event::GiveUp("its job is being preempted".into()));
            }
            self.ask_move(job, "preemption");
        }
        for job in self.controller.active.keys().copied().collect::<Vec<_>>() {
            self.unblock_move(job);
            self.hear_answer(job);
            let seen = poll.iter().find(|j| j.id == job).map(|j| JobSeen {
                standing: standing(j),
                restarts: j.restarts,
                nodes: j.nodes.clone(),
                in_grace: j.in_grace(),
                ends_by_itself: self.slurm.config().is_ok_and(|c| c.release() >= Some((24, 5))),
                never: None,
                not_now: None,
                start_s: j.start_time.and_then(|s| u64::try_from(s).ok()),
                reservation: j.reservation.clone().filter(|r| !is_ours(r)),
                limit_min: j.time_limit_min,
                req_nodes: j.req_nodes.clone(),
            });
            self.move_event(job, Event::Poll(seen));
        }
        let slots = next_slots(self.controller.active.values().map(|a| &a.r), (2, 2));
        for job in slots {
            self.move_event(job, Event::Slot);
        }
        self.give_places(&poll);
        self.sweep(&poll);
        self.slurm_events();
    }

    fn unblock_move(&mut self, job: u32) {
        let Some(a) = self.controller.active.get_mut(&job) else { return };
        if a.gate.is_shut().is_none() {
            return;
        }
        a.gate.open();
        self.carry_out_move(job, vec![]);
        while let Some(event) = self.controller.active.get_mut(&job).and_then(|a| a.gate.next_event()) {
            self.move_event(job, event);
        }
    }

    /// The answer to a request that takes long; a line that broke is noticed sooner or later.
    fn hear_answer(&mut self, job: u32) {
        let Some((id, node, epoch, since)) = self.controller.active.get(&job).and_then(|a| a.asked.clone()) else {
            return;
        };
        let reply = match self.controller.answers.remove(&id) {
            Some(Ok(())) => Reply::Done(Box::default()),
            Some(Err(why)) if why == "connection lost" || why == "nobody there" => Reply::NoWord(why),
            Some(Err(why)) => Reply::Refused(why),
            None if !self.is(&node, epoch) => Reply::NoWord("the agent died".into()),
            None => {
                let waits = self.nodes[&node].vms.get(&job).is_some_and(|o| o.move_reply == Some(id));
                if waits || self.now < since + 30_000 {
                    return;
                }
                Reply::NoWord("no answer".into())
            }
        };
        if let Some(a) = self.controller.active.get_mut(&job) {
            a.asked = None;
        }
        self.move_event(job, Event::Answered(reply));
    }

    fn give_places(&mut self, poll: &[JobBrief]) {
        let late: Vec<u32> = self
            .controller
            .wants
            .iter()
            .filter(|(_, until)| until.is_some_and(|t| self.now >= t))
            .map(|(job, _)| *job)
            .collect();
        for job in late {
            self.controller.wants.remove(&job);
            self.move_event(job, Event::Placed(Err("not in time".into())));
        }
        if self.controller.wants.is_empty() {
            return;
        }
        let (Ok(nodes), Ok(requests), Ok(reservations), Ok(partitions)) = (
            self.slurm.nodes(),
            self.slurm.requests(),
            self.slurm.reservations(),
            self.slurm.partitions(),
        ) else {
            return;
        };
        let requests: BTreeMap<_, _> = requests.into_iter().map(|r| (r.id, r)).collect();
        let well: BTreeSet<String> = self.nodes.iter().filter(|(_, n)| n.alive).map(|(n, _)| n.clone()).collect();
        let rule = PreemptRule::of("preempt/partition_prio", &partitions, None);
        let wants: Vec<Want> = self
            .controller
            .wants
            .keys()
            .filter_map(|job| self.controller.active.get(job))
            .map(|a| &a.r.record)
            .map(|m| Want {
                job: m.job,
                user: m.user.clone(),
                from: m.from.clone(),
                partition: m.partition.clone(),
                qos: None,
                constraint: m.constraint.clone(),
                exclude: m.exclude.clone(),
                needs: m.needs,
                wanted: None,
                deadline_ms: m.deadline_ms,
            })
            .collect();
        let arrival = |(job, (node, needs)): (&u32, &(String, Resources))| Arrival {
            job: *job,
            node: node.clone(),
            needs: *needs,
        };
        let exclude = BTreeMap::new();
        let now_s = i64::try_from(self.now / 1000).unwrap();
        let mut claims = self.controller.claims.clone();
        let decided = {
            let mut picture = Picture {
                now_s,
                feature: "vm",
                nodes: &nodes,
                well: &well,
                jobs: poll,
                requests: &requests,
                exclude: &exclude,
                reservations: &reservations,
                claims: &Claims::default(),
                arrivals: self.controller.holds.iter().map(arrival).collect(),
                rule: &rule,
                moves_in: 2,
                refused: BTreeSet::new(),
                on: by_node(poll),
            };
            claims.release(poll, |node, claim| picture.is_waited_for(node, claim));
            picture.claims = &claims;
            placement::place(picture, &wants)
        };
        self.controller.claims = claims;
        for (job, choice) in decided {
            self.controller.wants.remove(&job);
            let placed = choice.and_then(|node| {
                let needs = self.controller.active.get(&job).map(|a| a.r.record.needs).unwrap_or_default();
                self.controller.holds.insert(job, (node.clone(), needs));
                match self.reserve(&node) {
                    Ok(()) => Ok(node),
                    Err(e) => {
                        self.controller.holds.remove(&job);
                        Err(e.to_string())
                    }
                }
            });
            self.for_controller((job, Later::Event(Event::Placed(placed))));
        }
    }

    fn reserve(&self, node: &str) -> Result<(), SlurmError> {
        let spec = ReservationSpec {
            name: reservation_of(node),
            nodes: ReservationNodes::Named(vec![node.to_owned()]),
            partition: None,
            features: None,
            users: vec!["alice".into()],
        };
        self.slurm.create_reservation(&spec)
    }

    fn leave_place(&mut self, job: u32) {
        let Some((node, _)) = self.controller.holds.remove(&job) else {
            return;
        };
        self.unreserve(job, &reservation_of(&node));
        if !self.controller.holds.values().any(|(n, _)| *n == node) {
            let _ = self.slurm.delete_reservation(&reservation_of(&node));
        }
    }

    fn unreserve(&self, job: u32, name: &str) {
        if let Ok(Some(info)) = self.slurm.job(job)
            && info.brief.reservation.as_deref() == Some(name)
        {
            let update = JobUpdate {
                reservation: Some(None),
                ..JobUpdate::default()
            };
            let _ = self.slurm.update_job(job, &update);
        }
    }

    /// Reservations that belong to no move.
    fn sweep(&mut self, poll: &[JobBrief]) {
        let names: Vec<String> = match self.slurm.reservations() {
            Ok(all) => all.into_iter().map(|r| r.name).filter(|n| is_ours(n)).collect(),
            Err(_) => return,
        };
        for name in names {
            if self.controller.holds.values().any(|(n, _)| reservation_of(n) == name) {
                continue;
            }
            for j in poll.iter().filter(|j| j.reservation.as_deref() == Some(name.as_str())) {
                self.unreserve(j.id, &name);
            }
            let _ = self.slurm.delete_reservation(&name);
        }
    }
}
