//! The cluster: time, messages, nodes with their agents and ledgers, Slurm's side of a job, and what must hold.
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    path::PathBuf,
    sync::Arc,
    time::Instant,
};

use crossbeam_channel::Receiver;
use slurm_vm::{
    core::{
        Effect, Event, Gate, HandOverError, MoveIdentity, ProgramRecord, Record, Vm,
        registry::{self, Found, Registry},
        relocation::Event as MoveEvent,
    },
    effects::{Faults, MemoryAsUser, Storage},
    hypervisor::{
        DomainEvent, Hypervisor, HypervisorError, StopReason,
        fake::{FakeHypervisor, Fault, Op, World},
    },
    node::{Node as AgentNode, domains_of, sweep},
    slurm::{FakeJob, FakeSlurm, NodeInfo, Slurm},
    vm::{
        moving,
        programs::{Kept, Programs, ToGuest},
    },
};
use slurm_vm_api::query::MoveView;

use crate::{
    check::kind,
    controller::{Controller, Later},
    output::{File, Guest, Link, Shim},
    random::Random,
    rooms::{self, Time},
};

/// Where time begins.
const BEGIN_MS: u64 = 1_000_000;
/// How long a VM waits for its job.
pub const AWAIT_JOB_MS: u64 = 40_000;
/// What an agent keeps of one stream of output.
const SPOOL_BYTES: u64 = 400;
/// Half seconds between two sweeps of an agent.
const SWEEP: u64 = 60;
/// How long a record is kept after its VM's end.
const KEEP_MS: u64 = 86_400_000;
/// How long an epilog waits.
pub const EPILOG_MS: u64 = 30_000;
/// A seed's time in which things go wrong.
const ROUGH_MS: u64 = 420_000;
/// And the time in which all must have come to rest.
const DRAIN_MS: u64 = 2_400_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mood {
    /// Jobs are preempted, moved and cancelled; nothing fails.
    Calm,
    /// Everything.
    Rough,
}

/// What is under way.
#[derive(Debug, Clone)]
pub enum Message {
    /// An event for a VM's core; dropped if that agent was killed since.
    Core {
        node: String,
        epoch: u64,
        job: u32,
        event: Event,
    },
    /// The second half of an effect.
    Act {
        node: String,
        epoch: u64,
        job: u32,
        act: Act,
    },
    /// A migration's or save's end in libvirt, agent or no agent.
    LibvirtJobEnds {
        node: String,
        job: u32,
        id: u64,
    },
    /// Prolog, or an ensure that waits for the last run to leave.
    Ensure {
        node: String,
        epoch: u64,
        job: u32,
    },
    Epilog {
        node: String,
        job: u32,
        /// When it was called.
        since: u64,
    },
    EpilogOver {
        id: u64,
    },
    Shim {
        job: u32,
        restarts: u32,
    },
    HighEnds {
        job: u32,
        restarts: u32,
    },
    Restart {
        node: String,
    },
    PowerOn {
        node: String,
    },
    RestartController,
    Libvirt {
        node: String,
        up: bool,
    },
    Slurmctld {
        up: bool,
    },
    /// The destination is asked to prepare.
    Import {
        from: String,
        epoch: u64,
        to: String,
        record: Box<Record>,
    },
    Abandon {
        to: String,
        job: u32,
        by: MoveIdentity,
    },
    TakeOver {
        from: String,
        epoch: u64,
        to: String,
        record: Box<Record>,
        kept: Vec<Kept>,
    },
    /// An order of the controller, with the id of the request.
    Order {
        node: String,
        job: u32,
        id: u64,
        order: Order,
    },
    /// Something for the controller.
    Controller {
        epoch: u64,
        job: u32,
        what: Later,
    },
    Answer {
        id: u64,
        epoch: u64,
        outcome: Result<(), String>,
    },
}

impl Message {
    /// The job that it may do something to.
    pub fn job(&self) -> Option<u32> {
        match self {
            Self::Core { job, .. }
            | Self::Act { job, .. }
            | Self::LibvirtJobEnds { job, .. }
            | Self::Ensure { job, .. }
            | Self::Order { job, .. } => Some(*job),
            Self::Import { record, .. } | Self::TakeOver { record, .. } => Some(record.job),
            _ => None,
        }
    }
}

#[derive(Debug, Clone)]
pub enum Act {
    Prepare,
    Start,
    Destroy,
    Migrate { to: String, to_epoch: Option<u64> },
    Save { at: PathBuf, record: Box<Record>, kept: Vec<Kept> },
    Restore,
    Resume,
    Pin,
    AskOwner,
    AskDomain,
    AskJob,
    OpenGuest { link: u64 },
}

#[derive(Debug, Clone)]
pub enum Order {
    MoveOut { to: String },
    Save,
    Cancel,
    Release,
}

/// A live VM of an agent.
#[derive(Debug)]
pub struct Owner {
    pub vm: Vm,
    /// Effects, and what waits while the ledger cannot be written.
    pub gate: Gate<Effect, Event>,
    pub releases: Vec<u64>,
    pub move_reply: Option<u64>,
    pub link: u64,
    /// Who has got which byte of the output.
    pub programs: Programs,
    pub guest: Link,
    /// Programs whose start waits until their record is written.
    pub unstarted: Vec<ToGuest>,
}

#[derive(Debug)]
pub struct Node {
    pub alive: bool,
    /// What carries out its agent's effects.
    pub rooms: Arc<AgentNode>,
    /// Those around all effects of its rooms.
    pub faults: Faults,
    pub epoch: u64,
    pub vms: BTreeMap<u32, Owner>,
    /// Which VMs there are, as the agent has it.
    pub registry: Registry<u32>,
    /// What survives the agent.
    pub ledger: BTreeMap<u32, Record>,
    /// Until then the ledger's file system is full.
    pub full_until: u64,
    /// Destinations that have said yes, by job: their agent's epoch. Forgotten when this agent dies.
    pub departures: BTreeMap<u32, u64>,
}

/// A migration or save in libvirt.
#[derive(Debug, Clone)]
pub struct LibvirtJob {
    pub id: u64,
    pub epoch: u64,
    pub act: Act,
}

pub struct Cluster {
    pub mood: Mood,
    /// Effects of the rooms fail, too: in every other seed, since a VM that ends of that meets nothing else.
    pub effects_fail: bool,
    pub random: Random,
    pub now: u64,
    half_seconds: u64,
    next: u64,
    queue: BTreeMap<(u64, u64), Message>,
    pub world: World,
    pub hypervisors: BTreeMap<String, FakeHypervisor>,
    events: BTreeMap<String, Receiver<DomainEvent>>,
    pub slurm: Arc<FakeSlurm>,
    pub guests: BTreeMap<u32, Guest>,
    pub shims: BTreeMap<u32, Shim>,
    /// The jobs' output.
    pub files: BTreeMap<u32, File>,
    /// Where agents keep output that no shim takes.
    spools: tempfile::TempDir,
    /// The monotonic clock's zero.
    pub begun: Instant,
    /// What all nodes share.
    pub storage: Storage,
    pub as_user: MemoryAsUser,
    time: Time,
    pub nodes: BTreeMap<String, Node>,
    pub libvirt_jobs: BTreeMap<(String, u32), LibvirtJob>,
    pub epilogs: BTreeMap<u64, (String, u32)>,
    pub vm_jobs: BTreeMap<u32, u64>,
    pub faults: BTreeMap<u32, u32>,
    pub controller: Controller,
    quiet: bool,
    /// What has happened in the agents that must not.
    pub wrong: Vec<String>,
    /// What the last event was answered with: to what a source hands over, and to the other end's question.
    pub taken: Option<Result<(), HandOverError>>,
    pub answered: Option<Result<bool, String>>,
    /// The last event had output offsets taken in.
    pub adopted: bool,
    /// Starts that wait for what an earlier run has left elsewhere: since when, and the nodes that are still to be asked.
    pub superseding: BTreeMap<(String, u32), (u64, Vec<NodeInfo>)>,
    pub slurm_away: bool,
    /// Milliseconds that each copying takes.
    pub copies_take: Option<u64>,
    /// Keeps what happens in `trace`.
    pub tracing: bool,
    pub trace: VecDeque<String>,
    pub reached: BTreeSet<(&'static str, &'static str)>,
    pub counts: BTreeMap<&'static str, u64>,
}

pub fn domain(job: u32) -> String {
    format!("slurm-{job}-0")
}

impl Cluster {
    /// A cluster in which nothing happens by itself: jobs, moves and faults are the test's.
    pub fn scripted(nodes: u64) -> Self {
        Self {
            quiet: true,
            ..Self::of(Random::new(1), nodes, Mood::Calm)
        }
    }

    pub fn new(seed: u64, mood: Mood) -> Self {
        let mut random = Random::new(seed);
        let count = random.between(2, 6);
        Self {
            effects_fail: seed % 2 == 1,
            ..Self::of(random, count, mood)
        }
    }

    fn of(mut random: Random, count: u64, mood: Mood) -> Self {
        let (storage, as_user, time) = (Storage::default(), MemoryAsUser::default(), Time::default());
        let world = World::on(storage.clone());
        let names: Vec<String> = (1..=count).map(|i| format!("n{i}")).collect();
        let hypervisors: BTreeMap<_, _> = names.iter().map(|n| (n.clone(), world.node(n))).collect();
        let events = hypervisors.iter().map(|(n, h)| (n.clone(), h.events())).collect();
        let slurm = Arc::new(FakeSlurm::with_nodes(u32::try_from(count).unwrap()));
        slurm.set_requeues_early_exit(random.permille(500));
        Self {
            mood,
            effects_fail: false,
            random,
            now: BEGIN_MS,
            half_seconds: 0,
            next: 0,
            queue: BTreeMap::new(),
            world,
            events,
            nodes: names
                .iter()
                .map(|n| {
                    let faults = Faults::default();
                    let node = Node {
                        alive: true,
                        rooms: rooms::of(n, &time, &storage, &hypervisors[n], &slurm, &faults, &as_user),
                        faults,
                        epoch: 1,
                        vms: BTreeMap::new(),
                        registry: empty_registry(),
                        ledger: BTreeMap::new(),
                        full_until: 0,
                        departures: BTreeMap::new(),
                    };
                    (n.clone(), node)
                })
                .collect(),
            hypervisors,
            slurm,
            guests: BTreeMap::new(),
            shims: BTreeMap::new(),
            files: BTreeMap::new(),
            spools: tempfile::tempdir().unwrap(),
            begun: Instant::now(),
            storage,
            as_user,
            time,
            libvirt_jobs: BTreeMap::new(),
            epilogs: BTreeMap::new(),
            vm_jobs: BTreeMap::new(),
            faults: BTreeMap::new(),
            controller: Controller::default(),
            quiet: false,
            wrong: Vec::new(),
            taken: None,
            answered: None,
            adopted: false,
            superseding: BTreeMap::new(),
            slurm_away: false,
            copies_take: None,
            tracing: false,
            trace: VecDeque::new(),
            reached: BTreeSet::new(),
            counts: BTreeMap::new(),
        }
    }

    pub fn say(&mut self, line: &str) {
        if !self.tracing {
            return;
        }
        if self.trace.len() > 20_000 {
            self.trace.pop_front();
        }
        self.trace
            .push_back(format!("{:>8.3} {line}", (self.now - BEGIN_MS) as f64 / 1000.0));
    }

    pub fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    /// Something of the rough kind happens now, in so many of a thousand cases.
    pub fn rough(&mut self, permille: u64) -> bool {
        self.mood == Mood::Rough && !self.quiet && self.random.permille(permille)
    }

    pub fn at(&mut self, delay_ms: u64, message: Message) {
        self.next += 1;
        self.queue.insert((self.now + delay_ms, self.next), message);
    }

    /// A delay as threads and networks have it: mostly short, sometimes long.
    pub fn delay(&mut self) -> u64 {
        if self.rough(50) {
            self.random.between(500, 8_000)
        } else {
            self.random.between(1, 120)
        }
    }

    pub fn id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Runs a seed to its end.
    pub fn run(&mut self) -> Result<(), String> {
        let mut last = String::new();
        loop {
            if self.now - BEGIN_MS > ROUGH_MS + DRAIN_MS {
                return Err(format!("not at rest {} s after the last trouble: {last}", DRAIN_MS / 1000));
            }
            self.half_second()?;
            if self.now - BEGIN_MS < ROUGH_MS {
                self.trouble();
            } else if !self.quiet {
                self.leave_alone();
            }
            if self.quiet && self.half_seconds.is_multiple_of(20) {
                match self.left() {
                    None => return Ok(()),
                    Some(what) => last = what,
                }
            }
        }
    }

    /// Lets time pass until something is so.
    ///
    /// # Panics
    /// When it is not within so many seconds, or when something happens that must not.
    pub fn until(&mut self, what: &str, seconds: u64, so: impl Fn(&Self) -> bool) {
        let deadline = self.now + seconds * 1000;
        while !so(self) {
            let fail = |c: &Self, why: &str| {
                c.trace.iter().for_each(|line| println!("{line}"));
                panic!("{why}");
            };
            if self.now > deadline {
                fail(self, &format!("{what}: not within {seconds} s"));
            }
            if let Err(why) = self.half_second() {
                fail(self, &why);
            }
        }
    }

    /// Messages of the next half second in their order, then the clockwork.
    fn half_second(&mut self) -> Result<(), String> {
        let until = BEGIN_MS + (self.half_seconds + 1) * 500;
        while let Some(entry) = self.queue.first_entry() {
            let (at, _) = *entry.key();
            if at > until {
                break;
            }
            let message = entry.remove();
            self.now = self.now.max(at);
            self.time.set(self.now);
            let about = message.job();
            self.deliver(message);
            self.libvirt_events();
            if about.is_some() {
                self.check(about)?;
            }
        }
        self.now = until;
        self.time.set(self.now);
        self.half_seconds += 1;
        self.clockwork();
        self.libvirt_events();
        self.check(None)
    }

    fn clockwork(&mut self) {
        for (node, jobs) in self
            .nodes
            .iter()
            .map(|(n, s)| (n.clone(), s.vms.keys().copied().collect::<Vec<_>>()))
            .collect::<Vec<_>>()
        {
            for job in jobs {
                self.write_again(&node, job);
                self.core(&node, job, Event::Tick);
            }
        }
        self.guests_write();
        if self.half_seconds.is_multiple_of(SWEEP) {
            for node in self.nodes.keys().cloned().collect::<Vec<_>>() {
                if self.nodes[&node].alive {
                    let alive: BTreeSet<u32> = self.nodes[&node].vms.keys().copied().collect();
                    self.reach(&node, |rooms| {
                        sweep::saves(rooms);
                        sweep::overlays(rooms, |job| alive.contains(&job));
                    });
                }
            }
        }
        if self.half_seconds.is_multiple_of(2) {
            self.world.tick(1000);
            self.slurm.tick(i64::try_from(self.now / 1000).unwrap());
            self.slurm_events();
            self.controller_tick();
        }
    }

    fn leave_alone(&mut self) {
        self.say("-- left alone from here on");
        self.quiet = true;
        for h in self.hypervisors.values() {
            h.clear_faults();
            h.connect(true);
        }
        for node in self.nodes.values_mut() {
            node.full_until = 0;
        }
        self.slurm_away = false;
        self.slurm.set_unreachable(false);
    }

    /// A node loses power: its guests and its agent end at once, and Slurm starts its jobs over.
    pub fn power_off(&mut self, name: &str) {
        self.say(&format!("{name}: no power"));
        self.end_migrations_of(name);
        self.kill(name);
        self.hypervisors[name].power_off();
        self.storage.power_off(name);
        self.as_user.power_off(name);
        self.slurm.set_up(name, false);
        self.slurm_events();
    }

    /// It comes back with the ledger that it had.
    pub fn power_on(&mut self, name: &str) {
        self.slurm.set_up(name, true);
        self.restart(name);
    }

    pub fn trouble(&mut self) {
        let names: Vec<String> = self.nodes.keys().cloned().collect();
        let waiting = self.vm_jobs.keys().filter(|j| !self.job_is_over(**j)).count();
        if waiting < self.nodes.len() && self.vm_jobs.len() < 12 && self.random.permille(40) {
            let cpus = if self.random.permille(600) { 4 } else { 2 };
            let job = self.slurm.submit(FakeJob {
                cpus_per_node: cpus,
                time_limit_min: Some(600),
                ..FakeJob::default()
            });
            let work = self.random.between(20_000, 150_000);
            self.say(&format!("job {job} submitted, {work} ms of work"));
            self.vm_jobs.insert(job, work);
        }
        if self.random.permille(20) {
            let req_nodes = if self.random.permille(700) {
                self.random.pick(&names).cloned().into_iter().collect()
            } else {
                vec![]
            };
            let job = self.slurm.submit(FakeJob {
                user: "bob".into(),
                uid: 2002,
                partition: "high".into(),
                cpus_per_node: 4,
                features: None,
                time_limit_min: Some(600),
                req_nodes,
                ..FakeJob::default()
            });
            self.say(&format!("high job {job} submitted"));
        }
        let jobs: Vec<u32> = self.vm_jobs.keys().copied().collect();
        if self.random.permille(6)
            && let Some(job) = self.random.pick(&jobs).copied()
        {
            self.say(&format!("scancel {job}"));
            self.slurm.cancel(job, None).ok();
            self.slurm_events();
        }
        if self.random.permille(25)
            && let Some(job) = self.random.pick(&jobs).copied()
        {
            self.ask_move(job, "asked");
        }
        if self.random.permille(8)
            && let (Some(job), Some(node)) = (self.random.pick(&jobs).copied(), self.random.pick(&names).cloned())
        {
            let _ = node;
            self.say(&format!("svm migrate --cancel {job}"));
            self.move_event(job, MoveEvent::GiveUp("it was cancelled".into()));
        }
        if self.mood == Mood::Calm {
            return;
        }
        let Some(node) = self.random.pick(&names).cloned() else { return };
        if self.random.permille(14) && self.nodes[&node].alive {
            self.kill(&node);
            let after = self.random.between(200, 25_000);
            self.at(after, Message::Restart { node: node.clone() });
        }
        if self.random.permille(3) && self.nodes[&node].alive {
            self.count("power cuts");
            self.power_off(&node);
            let after = self.random.between(5_000, 90_000);
            self.at(after, Message::PowerOn { node: node.clone() });
        }
        if self.random.permille(6) && self.controller.alive {
            self.say("controller killed");
            self.controller.kill();
            let after = self.random.between(500, 15_000);
            self.at(after, Message::RestartController);
        }
        let fail = |op: Op, times| (op, Fault::Refuse(refusal(op)), times);
        let lose = |op: Op, times| (op, Fault::LoseAnswer, times);
        let fault = match self.random.next() % 600 {
            0..3 => Some(fail(Op::Import, 1)),
            3..6 => Some(lose(Op::Import, 1)),
            6..8 => Some(fail(Op::Start, 1)),
            8..10 => Some(fail(Op::Save, 1)),
            10..12 => Some(fail(Op::Restore, 1)),
            12..14 => Some(fail(Op::Destroy, 2)),
            14..16 => Some(fail(Op::Resume, 1)),
            16..18 => Some(fail(Op::Migrate, 1)),
            18..20 => Some(lose(Op::Migrate, 1)),
            20..22 => Some(lose(Op::Start, 1)),
            22..24 => Some(lose(Op::Destroy, 1)),
            _ => None,
        };
        if let Some((op, fault, times)) = fault {
            self.say(&format!("{node}: the next {op:?}: {fault:?}"));
            self.hypervisors[&node].fail_next(op, fault, times);
        }
        if self.random.permille(3)
            && let Some(job) = self.random.pick(&jobs).copied()
        {
            let panics = self.random.permille(500);
            if self.hypervisors[&node].info(&domain(job)).ok().flatten().is_some() {
                self.say(&format!("{node}: guest of {job} dies"));
            }
            self.hypervisors[&node].end_guest(&domain(job), panics);
        }
        if self.random.permille(4) {
            self.say(&format!("{node}: libvirt away"));
            self.hypervisors[&node].connect(false);
            let after = self.random.between(500, 20_000);
            self.at(
                after,
                Message::Libvirt {
                    node: node.clone(),
                    up: true,
                },
            );
        }
        if self.random.permille(5) {
            let until = self.now + self.random.between(200, 15_000);
            self.say(&format!("{node}: no space for the ledger until {until}"));
            self.count("full ledgers");
            if let Some(n) = self.nodes.get_mut(&node) {
                n.full_until = until;
            }
        }
        if self.random.permille(3) {
            self.say("slurmctld away");
            self.slurm_away = true;
            self.slurm.set_unreachable(true);
            let after = self.random.between(500, 20_000);
            self.at(after, Message::Slurmctld { up: true });
        }
    }

    pub fn kill(&mut self, name: &str) {
        self.say(&format!("{name}: agent killed"));
        self.count("agents killed");
        self.break_relays(name);
        let Some(node) = self.nodes.get_mut(name) else { return };
        node.alive = false;
        node.epoch += 1;
        node.departures.clear();
        let lost: Vec<Owner> = std::mem::take(&mut node.vms).into_values().collect();
        node.registry = Registry::default();
        for owner in lost {
            // Who waits sees the connection break.
            for epilog in owner.releases {
                self.epilog_returns(epilog);
            }
            if let Some(id) = owner.move_reply {
                self.answer(id, Err("connection lost".into()));
            }
        }
    }

    pub fn restart(&mut self, name: &str) {
        self.say(&format!("{name}: agent started"));
        let faults = &self.nodes[name].faults;
        let fresh = rooms::of(
            name,
            &self.time,
            &self.storage,
            &self.hypervisors[name],
            &self.slurm,
            faults,
            &self.as_user,
        );
        let Some(node) = self.nodes.get_mut(name) else { return };
        (node.alive, node.rooms) = (true, fresh);
        let records: Vec<Record> = node.ledger.values().cloned().collect();
        let hypervisor = self.hypervisors[name].clone();
        let there = hypervisor.list().ok().map(|all| domains_of(&all));
        let mut lives = BTreeMap::new();
        for record in records {
            match Registry::<()>::found(record, there.as_deref(), self.now, KEEP_MS) {
                Found::Old(record) => {
                    self.nodes.get_mut(name).map(|n| n.ledger.remove(&record.job));
                }
                Found::Over { record, left } => {
                    if left {
                        let _ = hypervisor.destroy(&record.domain());
                        if self.reach(name, |rooms| moving::clear_here(rooms, &record)).is_none() {
                            return;
                        }
                    }
                    if let Some(n) = self.nodes.get_mut(name) {
                        n.registry.over(record);
                    }
                }
                Found::Goes { record, domain_here } => {
                    let job = record.job;
                    lives.insert(job, record.clone());
                    self.say(&format!("{name}: job {job} found {} (domain {domain_here:?})", record.life.name()));
                    let (vm, effects) = Vm::recovered(record, domain_here, self.job_here(name, job));
                    self.adopt(name, job, vm, effects);
                }
            }
        }
        for stray in there
            .map(|there| self.nodes[name].registry.strays(&there, &lives))
            .unwrap_or_default()
        {
            self.say(&format!("{name}: {stray} is in no record"));
            let _ = hypervisor.destroy(&stray);
        }
    }

    pub fn adopt(&mut self, node: &str, job: u32, vm: Vm, effects: Vec<Effect>) {
        let link = self.id();
        let programs = self.programs(node, job, &vm.record.programs);
        let owner = Owner {
            vm,
            gate: Gate::default(),
            releases: vec![],
            move_reply: None,
            link,
            programs,
            guest: Link::default(),
            unstarted: vec![],
        };
        if let Some(n) = self.nodes.get_mut(node) {
            n.registry.begun(job, job, owner.vm.record.user.clone());
            n.vms.insert(job, owner);
        }
        self.carry_out(node, job, effects);
    }

    /// The programs of a VM on a node, with what is kept there of their output.
    pub fn programs(&self, node: &str, job: u32, records: &[ProgramRecord]) -> Programs {
        let dir = self.spools.path().join(node).join(job.to_string());
        std::fs::create_dir_all(&dir).unwrap();
        Programs::new(records, dir, SPOOL_BYTES)
    }

    pub fn job_here(&self, node: &str, job: u32) -> Option<bool> {
        match self.slurm.job(job) {
            Ok(Some(info)) => Some(info.brief.state.is_on_nodes() && info.brief.nodes.iter().any(|n| n == node)),
            Ok(None) => Some(false),
            Err(_) => None,
        }
    }

    /// Slurm's count of a job's restarts.
    pub fn restarts(&self, job: u32) -> u32 {
        self.slurm.job(job).ok().flatten().map_or(0, |info| info.brief.restarts)
    }

    pub fn job_is_over(&self, job: u32) -> bool {
        self.slurm
            .job(job)
            .is_ok_and(|info| info.is_none_or(|i| i.brief.state.is_finished()))
    }

    /// Feeds a core and carries out what it says.
    pub fn core(&mut self, node: &str, job: u32, event: Event) {
        let now = self.now;
        let Some(owner) = self.nodes.get_mut(node).and_then(|n| n.vms.get_mut(&job)) else {
            return;
        };
        let Some(event) = owner.gate.let_in(event) else { return };
        let before = owner.vm.record.life.name();
        let kind = kind(&event);
        let was_leaving = registry::is_on_its_way_out(&owner.vm.record.life);
        let effects = owner.vm.on_event(now, AWAIT_JOB_MS, event);
        let after = owner.vm.record.life.name();
        let stays = was_leaving && !registry::is_on_its_way_out(&owner.vm.record.life);
        self.reached.insert((before, kind));
        if self.tracing && (before != after || !matches!(kind, "tick")) {
            let named: Vec<String> = effects.iter().map(|e| format!("{e:?}").chars().take(60).collect()).collect();
            self.say(&format!("{node}: job {job} {before} <- {kind} -> {after}: {}", named.join(", ")));
        }
        self.carry_out(node, job, effects);
        if stays
            && let Some(n) = self.nodes.get_mut(node)
            && let Some(record) = n.vms.get(&job).map(|o| &o.vm.record)
            && n.registry.stays(job, record.user.uid)
        {
            let run = record.run + 1;
            self.count("runs that got the last one's VM");
            self.core(node, job, Event::JobHere { run });
        }
        self.retire(node, job);
    }

    pub fn retire(&mut self, node: &str, job: u32) {
        let Some(n) = self.nodes.get_mut(node) else { return };
        let idle = |o: &Owner| o.releases.is_empty() && !o.gate.is_behind() && !o.programs.attached();
        let is_over = |o: &Owner| o.vm.record.life.is_over_here() && idle(o);
        if !n.vms.get(&job).is_some_and(is_over) {
            return;
        }
        let Some(mut owner) = n.vms.remove(&job) else { return };
        owner.programs.forget_spools();
        if let Some((number, run)) = n.registry.retired(owner.vm.record) {
            self.say(&format!("{node}: job {job}: the run that has waited begins"));
            self.count("runs that waited for the last one's end");
            self.begin(node, job, number, &run);
        }
    }

    pub fn deliver(&mut self, message: Message) {
        match message {
            Message::Core { node, epoch, job, event } => {
                if self.is(&node, epoch) {
                    self.core(&node, job, event);
                }
            }
            Message::Act { node, epoch, job, act } => {
                if self.is(&node, epoch) {
                    self.act(&node, epoch, job, act);
                }
            }
            Message::LibvirtJobEnds { node, job, id } => self.libvirt_job_ends(&node, job, id),
            Message::Ensure { node, epoch, job } => {
                if self.is(&node, epoch) {
                    self.ensure(&node, job);
                }
            }
            Message::Epilog { node, job, since } => self.epilog(&node, job, since),
            Message::EpilogOver { id } => self.epilog_over(id),
            Message::Shim { job, restarts } => self.shim(job, restarts),
            Message::HighEnds { job, restarts } => {
                if self.runs_on(job, restarts).is_some() {
                    self.slurm.exited(job, 0);
                    self.slurm_events();
                }
            }
            Message::Restart { node } => self.restart(&node),
            Message::PowerOn { node } => self.power_on(&node),
            Message::RestartController => {
                self.say("controller started");
                self.controller.restart();
            }
            Message::Libvirt { node, up } => {
                self.say(&format!("{node}: libvirt back"));
                self.hypervisors[&node].connect(up);
                self.recheck(&node);
            }
            Message::Slurmctld { up } => {
                self.say("slurmctld back");
                self.slurm_away = !up;
                self.slurm.set_unreachable(!up);
            }
            Message::Import { from, epoch, to, record } => self.import(&from, epoch, &to, *record),
            Message::Abandon { to, job, by } => self.core(&to, job, Event::Abandoned { by }),
            Message::TakeOver {
                from,
                epoch,
                to,
                record,
                kept,
            } => {
                let job = record.job;
                let outcome = self.take_over(&to, &record, &kept);
                let outcome = if self.rough(80) {
                    Err(HandOverError::NotNow("no answer".into()))
                } else {
                    outcome
                };
                let delay = self.delay();
                self.at(
                    delay,
                    Message::Core {
                        node: from,
                        epoch,
                        job,
                        event: Event::HandedOver(outcome),
                    },
                );
            }
            Message::Order { node, job, id, order } => self.order(&node, job, id, order),
            Message::Controller { epoch, job, what } => self.controller_hears(epoch, job, what),
            Message::Answer { id, epoch, outcome } => self.controller.answered(id, epoch, outcome),
        }
    }

    pub fn is(&self, node: &str, epoch: u64) -> bool {
        self.nodes.get(node).is_some_and(|n| n.alive && n.epoch == epoch)
    }

    pub fn answer(&mut self, id: u64, outcome: Result<(), String>) {
        let (delay, epoch) = (self.delay(), self.controller.epoch);
        let outcome = if self.rough(60) { Err("connection lost".into()) } else { outcome };
        self.at(delay, Message::Answer { id, epoch, outcome });
    }

    // What libvirt tells.

    pub fn libvirt_events(&mut self) {
        for node in self.nodes.keys().cloned().collect::<Vec<_>>() {
            while let Ok(event) = self.events[&node].try_recv() {
                let (name, event) = match event {
                    DomainEvent::Stopped {
                        reason: StopReason::Migrated | StopReason::Saved,
                        ..
                    } => continue,
                    DomainEvent::Stopped { name, reason, .. } => (
                        name,
                        Event::DomainEnded {
                            how: format!("{reason:?}"),
                        },
                    ),
                    DomainEvent::Resumed {
                        name,
                        reason: slurm_vm::hypervisor::StateReason::Migrated,
                        ..
                    } => (name, Event::Arrived),
                    _ => continue,
                };
                let Some(job) = name.split('-').nth(1).and_then(|j| j.parse().ok()) else {
                    continue;
                };
                let (delay, epoch) = (self.delay(), self.nodes[&node].epoch);
                if self.rough(60) {
                    continue;
                }
                if self.rough(50) {
                    self.at(
                        delay + 20,
                        Message::Core {
                            node: node.clone(),
                            epoch,
                            job,
                            event: event.clone(),
                        },
                    );
                }
                self.at(
                    delay,
                    Message::Core {
                        node: node.clone(),
                        epoch,
                        job,
                        event,
                    },
                );
            }
        }
    }

    /// Events were lost while libvirt was away.
    pub fn recheck(&mut self, node: &str) {
        if !self.nodes[node].alive {
            return;
        }
        let Ok(domains) = self.hypervisors[node].list() else { return };
        let n = &self.nodes[node];
        let lives = n.vms.iter().map(|(job, o)| (*job, o.vm.record.clone())).collect();
        let registry::Recheck { ended, left } = n.registry.recheck(&domains_of(&domains), &lives);
        for job in ended {
            let how = "it ended while libvirt was away".into();
            self.core(node, job, Event::DomainEnded { how });
        }
        for name in left {
            self.say(&format!("{node}: {name} is there and nobody has it"));
            self.count("domains that came through late");
            let _ = self.hypervisors[node].destroy(&name);
        }
    }
}

/// Of an agent that was started with an empty ledger.
fn empty_registry() -> Registry<u32> {
    let mut registry = Registry::default();
    registry.all_found();
    registry
}

fn refusal(op: Op) -> HypervisorError {
    HypervisorError::Libvirt {
        call: "ordered",
        domain: 10,
        message: format!("{op:?} fails as ordered"),
        code: 9,
    }
}

pub fn view(from: &str, to: &str) -> MoveView {
    MoveView {
        from: from.into(),
        to: to.into(),
        outcome: "done".into(),
        ..MoveView::default()
    }
}
