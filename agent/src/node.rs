//! The node role: which VMs there are, and the way to each one's owner thread. Shared by the socket server, the peer
//! server and the health watch; holds no VM state itself but the last record of those that are over.
use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use crossbeam_channel::{Receiver, Sender, bounded};
use slurm_vm_api::{
    query::{Totals, VmView},
    session::{Frame, ToShim, UserEntry},
    spec::VmSpec,
};

use crate::{
    cluster::Peers,
    config::{Config, DomainTypeChoice},
    core::{End, Life, Record, record::domain_name},
    effects::{World, trusted::Distrust},
    hypervisor::{DomainEvent, DomainType, HostInfo, StateReason, StopReason},
    vm::{self, Attach, Birth, Request, view},
};

/// How long the owner of a VM may take to answer a question that needs no effect.
const ANSWER: Duration = Duration::from_secs(10);
/// How long the VMs of a node together may take to say how they are.
const VIEWS_WITHIN: Duration = Duration::from_secs(1);
/// Ended VMs in a status: some 500 bytes each, so that it stays below 64 KiB whatever has ended.
pub const MOST_ENDED: usize = 80;

/// A VM as the registry knows it.
#[derive(Debug)]
enum Entry {
    Live(Live),
    Over(Box<Record>),
}

/// An entry as it was a moment ago.
enum Known {
    Live(Sender<Request>),
    Over(Box<Record>),
}

/// A VM with an owner. Whose it is stands beside the way to him, so that nobody has to wait for him to learn it.
#[derive(Debug, Clone)]
struct Live {
    tx: Sender<Request>,
    user: UserEntry,
}

/// What becomes of a session that was asked for.
#[derive(Debug)]
pub enum Admission {
    /// The VM's owner has it.
    Attached,
    /// All there is to say to it was said.
    Answered,
    /// The VM has left and its job follows; the shim is ended with it.
    Left,
}

/// Why a session is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Exit code of the shim.
    pub outcome: u8,
    /// One line for the user.
    pub why: String,
}

impl Refused {
    /// The user may not, or asks for what cannot be.
    #[must_use]
    pub fn request(why: impl Into<String>) -> Self {
        Self {
            outcome: slurm_vm_api::outcome::REFUSED,
            why: why.into(),
        }
    }

    /// It may go better elsewhere.
    #[must_use]
    pub fn node(why: impl Into<String>) -> Self {
        Self {
            outcome: slurm_vm_api::outcome::NODE_FAULT,
            why: why.into(),
        }
    }
}

/// A script that ended within its grace time.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Completion {
    v: u32,
    uid: u32,
    ended: slurm_vm_api::session::Ended,
}

/// The node role of an agent.
#[derive(Debug)]
pub struct Node {
    /// Settings.
    pub config: Arc<Config>,
    /// NodeName.
    pub name: String,
    /// Effects.
    pub world: World,
    /// Other nodes' agents.
    pub peers: Arc<dyn Peers>,
    /// Moves of which this node is an end.
    pub moves: vm::moving::Moves,
    vms: Mutex<HashMap<u32, Entry>>,
    domain_type: OnceLock<(DomainType, String)>,
    /// What libvirt says of the host, asked once: it may probe QEMU for seconds to tell it.
    host: OnceLock<HostInfo>,
    /// What is wrong with `shared_dir`.
    shared_trouble: Mutex<Option<String>>,
    /// A start with a hard limit has failed here: there are no cgroups for libvirt.
    hard_limit_fails: AtomicBool,
    /// Bytes per second of the last save made here; 0 before the first.
    save_speed: AtomicU64,
    /// What live VMs said of themselves last.
    last_views: Mutex<HashMap<u32, VmView>>,
}

impl Node {
    /// A node role without VMs yet; call [`Node::recover`] before serving.
    #[must_use]
    pub fn new(config: Arc<Config>, world: World, peers: Arc<dyn Peers>) -> Arc<Self> {
        let name = config.node();
        Arc::new(Self {
            config,
            name,
            world,
            peers,
            moves: vm::moving::Moves::default(),
            vms: Mutex::new(HashMap::new()),
            domain_type: OnceLock::new(),
            host: OnceLock::new(),
            shared_trouble: Mutex::new(None),
            hard_limit_fails: AtomicBool::new(false),
            save_speed: AtomicU64::new(0),
            last_views: Mutex::default(),
        })
    }

    /// Bytes per second of the last save made here.
    #[must_use]
    pub fn save_speed(&self) -> Option<u64> {
        Some(self.save_speed.load(Ordering::Relaxed)).filter(|s| *s > 0)
    }

    /// A save of so many bytes of memory was made. Of a small one the fixed costs are most.
    pub fn saved_at(&self, bytes: u64, took: Duration) {
        if bytes < 64 << 20 {
            return;
        }
        let ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX).max(1);
        self.save_speed.store(bytes.saturating_mul(1000) / ms, Ordering::Relaxed);
    }

    fn vms(&self) -> MutexGuard<'_, HashMap<u32, Entry>> {
        self.vms.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Domain type of new VMs: chosen once, by the configuration or the probe.
    #[must_use]
    pub fn domain_type(&self) -> DomainType {
        self.domain_type_and_reason().0
    }

    /// QEMU's version (`10.0.2`), empty while libvirt does not tell it.
    #[must_use]
    pub fn qemu_version(&self) -> String {
        if let Some(known) = self.host.get() {
            return known.hypervisor_version.clone();
        }
        match self.world.hypervisor.host(self.domain_type()) {
            Ok(host) => self.host.get_or_init(|| host).hypervisor_version.clone(),
            Err(e) => {
                log::warn!("libvirt does not tell QEMU's version: {e}");
                String::new()
            }
        }
    }

    /// What confines QEMU here (`apparmor`, `selinux`, `none`); nothing as long as libvirt has not said it.
    #[must_use]
    pub fn security_model(&self) -> Option<&str> {
        self.host.get().map(|h| h.security_model.as_str())
    }

    /// Looks whether `shared_dir` is of use to VMs. May last as long as a file server is away.
    pub fn look_at_shared_dir(&self) {
        let now = crate::shared::trouble(&self.config);
        let mut known = self.shared_trouble.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(why) = now.as_ref().filter(|_| *known != now) {
            log::error!("{why}");
        }
        *known = now;
    }

    /// What the last look at `shared_dir` has found wrong.
    #[must_use]
    pub fn shared_trouble(&self) -> Option<String> {
        self.shared_trouble
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }

    /// What QEMU as a whole may use: the job's allocation, where cgroups let libvirt enforce it.
    #[must_use]
    pub fn hard_limit_mib(&self, record: &Record) -> Option<u64> {
        let given = record.allocation.as_ref().and_then(|a| a.mem_mib);
        given.filter(|_| self.config.hypervisor.memory_limit && !self.hard_limit_fails.load(Ordering::Relaxed))
    }

    /// Remembers, and says once, that hard limits do not work on this host.
    pub fn no_hard_limit(&self, why: &str) {
        if !self.hard_limit_fails.swap(true, Ordering::Relaxed) {
            log::warn!("QEMU's memory is not held to the job's allocation on this node: {why}");
        }
    }

    /// As [`Node::domain_type`], with the reason for people.
    #[must_use]
    pub fn domain_type_and_reason(&self) -> (DomainType, String) {
        self.domain_type
            .get_or_init(|| {
                let chosen = match self.config.hypervisor.domain_type {
                    DomainTypeChoice::Kvm => (DomainType::Kvm, "set in the configuration".to_owned()),
                    DomainTypeChoice::Qemu => (DomainType::Qemu, "set in the configuration".to_owned()),
                    DomainTypeChoice::Auto => crate::probe::choose(&self.config, &self.world),
                };
                log::info!("domain type {}: {}", type_name(chosen.0), chosen.1);
                chosen
            })
            .clone()
    }

    /// The same without waiting: nothing while a guest tries KVM.
    #[must_use]
    pub fn domain_type_if_known(&self) -> Option<(DomainType, String)> {
        match self.config.hypervisor.domain_type {
            DomainTypeChoice::Auto => self.domain_type.get().cloned(),
            _ => Some(self.domain_type_and_reason()),
        }
    }

    /// Brings ledger, libvirt and Slurm together after a start: each VM goes on where it was, or is ended.
    pub fn recover(self: &Arc<Self>) {
        let records = match self.world.store.load() {
            Ok(records) => records,
            Err(e) => {
                log::error!("the ledger cannot be read: {}", crate::text::chain(&e));
                return;
            }
        };
        // No answer is not "none": a VM must not be taken for lost because libvirt is away.
        let domains = self
            .world
            .hypervisor
            .list()
            .inspect_err(|e| log::error!("libvirt cannot be asked for its domains: {e}"))
            .ok();
        let keep_ms = u64::from(self.config.node.keep_days) * 86_400_000;
        let now = self.world.clock.now_ms();
        let mut known = Vec::new();
        for record in records {
            let record = match record {
                Ok(record) => record,
                Err(e) => {
                    log::error!("{}", crate::text::chain(&e));
                    // Another version's record, perhaps: its domain is not ours to end.
                    known.extend(e.domain());
                    continue;
                }
            };
            known.push(record.domain());
            let job = record.job;
            if record.life.is_over_here() {
                self.clear_after(&record, domains.as_deref().unwrap_or_default());
                if record.ended_ms.is_some_and(|ended| ended + keep_ms < now) {
                    let _ = self.world.store.remove(&record.domain());
                } else {
                    self.vms().insert(job, Entry::Over(Box::new(record)));
                }
                continue;
            }
            let domain_here = domains
                .as_ref()
                .map(|all| all.iter().any(|d| d.name == record.domain() && d.uuid == record.uuid()));
            let job_here = self.job_here(job);
            log::info!(
                "job {job}: found {} in the ledger (domain here: {domain_here:?}, job here: {job_here:?})",
                record.life.name()
            );
            let user = record.user.clone();
            let tx = vm::spawn(
                self.clone(),
                Birth::Recovered {
                    record,
                    domain_here,
                    job_here,
                },
            );
            self.vms().insert(job, Entry::Live(Live { tx, user }));
        }
        for d in domains.iter().flatten().filter(|d| !known.contains(&d.name)) {
            log::warn!("domain {} is ours and in no record: ending it", d.name);
            if let Err(e) = self.world.hypervisor.destroy(&d.name) {
                log::error!("cannot end {}: {e}", d.name);
            }
        }
        vm::moving::clear_left_sockets(&self.config, &known);
    }

    /// An agent that died right after it had recorded a VM's end may have left something of it here.
    fn clear_after(&self, record: &Record, domains: &[crate::hypervisor::DomainInfo]) {
        let domain = record.domain();
        if !domains.iter().any(|d| d.name == domain) {
            return;
        }
        log::warn!("job {}: {domain} is {} and still here: ending it", record.job, record.life.name());
        if let Err(e) = self.world.hypervisor.destroy(&domain) {
            log::error!("cannot end {domain}: {e}");
        }
        vm::moving::clear_here(self, record);
    }

    /// Whether Slurm runs the job on this node; `None` when it does not say.
    #[must_use]
    pub fn job_here(&self, job: u32) -> Option<bool> {
        match self.world.slurm.job(job) {
            Ok(Some(info)) => Some(info.brief.state.is_on_nodes() && info.brief.nodes.contains(&self.name)),
            Ok(None) => Some(false),
            Err(_) => None,
        }
    }

    /// Slurm says that the job will never run again.
    #[must_use]
    pub fn job_is_over(&self, job: u32) -> bool {
        self.world
            .slurm
            .job(job)
            .is_ok_and(|info| info.is_none_or(|i| i.brief.state.is_finished()))
    }

    /// Prolog: the job may run here soon; `restart` is Slurm's count of its restarts. Returns the run number at once; everything else happens on the VM's thread.
    ///
    /// # Errors
    /// A fragment for the log.
    pub fn ensure(self: &Arc<Self>, job: u32, restart: u32, user: UserEntry, spec: VmSpec) -> Result<u64, String> {
        for _ in 0..2 {
            let mut vms = self.vms();
            let run = match vms.get(&job) {
                Some(Entry::Live(live)) => {
                    let (tx, owned_by) = (live.tx.clone(), live.user.uid);
                    // Nobody else waits for this owner.
                    drop(vms);
                    let (reply, answer) = bounded(1);
                    let record = self.ask(&tx, Request::Record);
                    if let Some(record) = record.filter(|r| is_on_its_way_out(&r.life)) {
                        // The last run is still on its way out: begin anew as soon as it is over.
                        let node = self.clone();
                        let run = record.run + 1;
                        std::thread::spawn(move || node.ensure_after(job, restart, user, spec));
                        return Ok(run);
                    }
                    if owned_by != user.uid {
                        return Err(format!(
                            "job {job} of uid {} meets a VM of uid {owned_by}'s job of that number",
                            user.uid
                        ));
                    }
                    if tx.send(Request::JobHere(reply)).is_ok()
                        && let Ok(run) = answer.recv_timeout(ANSWER)
                    {
                        return Ok(run);
                    }
                    continue;
                }
                Some(Entry::Over(last)) => last.run + 1,
                None => 1,
            };
            let begin = Birth::Begin {
                job,
                restart,
                run,
                user: user.clone(),
                spec,
            };
            let tx = vm::spawn(self.clone(), begin);
            vms.insert(job, Entry::Live(Live { tx, user }));
            return Ok(run);
        }
        Err(format!("the owner of job {job}'s VM does not answer"))
    }

    /// As [`Node::ensure`], once the VM of the job's last run is over here.
    fn ensure_after(self: &Arc<Self>, job: u32, restart: u32, user: UserEntry, spec: VmSpec) {
        let deadline = std::time::Instant::now() + Duration::from_secs(120);
        loop {
            let over = match self.vms().get(&job) {
                Some(Entry::Live(_)) => false,
                Some(Entry::Over(_)) | None => true,
            };
            if over || std::time::Instant::now() > deadline {
                break;
            }
            self.world.clock.sleep(Duration::from_millis(50));
        }
        if let Err(e) = self.ensure(job, restart, user, spec) {
            log::error!("job {job}: {e}");
        }
    }

    /// Which of its job's VMs the one on this node is: the node's place in the job's node list. Domains and overlays of a
    /// job on several nodes are told apart by it.
    #[must_use]
    pub fn place_in(&self, job: u32) -> u32 {
        let nodes = match self.world.slurm.job(job) {
            Ok(Some(info)) => info.brief.nodes,
            Ok(None) => Vec::new(),
            Err(e) => {
                log::warn!("job {job}: cannot ask Slurm for its nodes: {e}");
                Vec::new()
            }
        };
        nodes
            .iter()
            .position(|n| *n == self.name)
            .and_then(|k| u32::try_from(k).ok())
            .unwrap_or(0)
    }

    /// A record for a new VM, or the one of a save that waits on shared storage; nothing if the job's script has ended in its grace time and
    /// is not to run again. May last as long as a file server is away: called on the VM's own thread.
    #[must_use]
    pub fn birth(&self, job: u32, restart: u32, run: u64, user: UserEntry, spec: VmSpec) -> Option<Birth> {
        if restart == 0 {
            // Of another job that had this number.
            self.forget_completion(job);
        } else if self.completion(job, user.uid).is_some() {
            log::info!("job {job}: its script ended within its grace time: it is not run again");
            self.vms().remove(&job);
            return None;
        }
        let now = self.world.clock.now_ms();
        if let Some(saved) = vm::saving::find(self, job, user.uid) {
            let mut record = saved;
            record.run = run.max(record.run + 1);
            record.come_to(&self.name);
            record.generation += 1;
            let (overlay, shared) = vm::prepare::overlay_path(&self.config, &self.world.store.vm_dir(&record.domain()), &record);
            if let (Life::Restoring { from }, Some(plan)) = (&record.life, record.plan.as_mut()) {
                plan.layers.insert(0, from.join("overlay.qcow2"));
                if plan.overlay.is_some() {
                    (plan.overlay, plan.overlay_shared) = (Some(overlay), shared);
                }
            }
            return Some(Birth::Expected(record));
        }
        Some(Birth::New(Record {
            run,
            created_ms: now,
            ..Record::new(
                self.config.cluster.clone(),
                self.name.clone(),
                job,
                user,
                VmSpec {
                    boot_timeout_s: spec.boot_timeout_s.or(Some(self.config.node.boot_timeout_s)),
                    ..spec
                },
            )
        }))
    }

    /// Takes in a VM that is to arrive from another node.
    ///
    /// # Errors
    /// When this node has a live VM of the job already.
    pub fn expect(self: &Arc<Self>, record: Record) -> Result<(), String> {
        let mut vms = self.vms();
        if let Some(Entry::Live(_)) = vms.get(&record.job) {
            return Err(format!("job {} has a VM here already", record.job));
        }
        let (job, user) = (record.job, record.user.clone());
        let tx = vm::spawn(self.clone(), Birth::Expected(record));
        vms.insert(job, Entry::Live(Live { tx, user }));
        Ok(())
    }

    /// Epilog: returns when the VM has left this node or `wait` has passed and it was ended.
    ///
    /// # Errors
    /// Names the domain that could not be ended.
    pub fn release(&self, job: u32, wait: Duration) -> Result<(), String> {
        let tx = match self.vms().get(&job) {
            Some(Entry::Live(Live { tx, .. })) => tx.clone(),
            _ => return Ok(()),
        };
        let (reply, answer) = bounded(1);
        if tx.send(Request::Release(reply)).is_err() {
            return Ok(());
        }
        if let Ok(outcome) = answer.recv_timeout(wait) {
            return outcome;
        }
        let domain = self.record(job).map_or_else(|| domain_name(job, 0), |r| r.domain());
        log::warn!("job {job}: its VM did not leave within {} s: ending {domain}", wait.as_secs());
        let (reply, answer) = bounded(1);
        let _ = tx.send(Request::Release(reply));
        match self.world.hypervisor.destroy(&domain) {
            Ok(_) => {
                let _ = answer.recv_timeout(ANSWER);
                Ok(())
            }
            Err(e) => Err(format!("domain {domain} cannot be ended: {e}")),
        }
    }

    /// A shim wants its program run. Who it is, is `peer_uid`, which the kernel attests; whose the job is, is in the registry, or
    /// Slurm says it. The shim's own word on its user and groups counts for nothing. `turn` is called before Slurm is asked.
    ///
    /// # Errors
    /// Why the session is refused; the VM's owner never hears of it then.
    pub fn attach<T>(
        self: &Arc<Self>,
        mut attach: Attach,
        peer_uid: u32,
        turn: impl FnOnce() -> Result<T, Refused>,
    ) -> Result<Admission, Refused> {
        let job = attach.open.job;
        if attach.open.step == slurm_vm_api::session::BATCH_STEP
            && attach.open.restart > 0
            && let Some(ended) = self.completion(job, peer_uid)
        {
            attach.to.send(Frame::Control(ToShim::Started {
                from: vec![],
                resumed: true,
            }));
            attach.to.send(Frame::Control(ToShim::Exited(ended)));
            self.forget_completion(job);
            return Ok(Admission::Answered);
        }
        let mut over = None;
        let known = match self.vms().get(&job) {
            Some(Entry::Live(live)) if live.user.uid != peer_uid && peer_uid != 0 => {
                return Err(Refused::request(format!("job {job} is not yours")));
            }
            Some(Entry::Live(live)) => Some(live.clone()),
            Some(Entry::Over(last)) if last.user.uid == peer_uid || peer_uid == 0 => {
                over = Some(last.clone());
                None
            }
            _ => None,
        };
        let live = if let Some(live) = known {
            live
        } else {
            let _turn = turn()?;
            // Of an earlier run nothing is told any more.
            if let Some(last) = over.filter(|last| !self.is_of_an_earlier_run(last)) {
                if let Some((outcome, why)) = over_verdict(&last) {
                    return Err(Refused { outcome, why });
                }
                if matches!(last.life, Life::Gone { .. } | Life::Saved { .. }) {
                    // The VM is elsewhere and its job follows: another one here would be a second.
                    let line = format!("the VM is {}, its job follows", last.life.name());
                    attach.to.send(Frame::Control(ToShim::Progress(line)));
                    return Ok(Admission::Left);
                }
            }
            self.ensure_from_slurm(job, peer_uid, &attach)?
        };
        attach.open.groups = crate::accounts::groups(&live.user);
        attach.open.user = live.user;
        live.tx
            .send(Request::Attach(Box::new(attach)))
            .map(|()| Admission::Attached)
            .map_err(|_| Refused::node("the VM's owner has ended"))
    }

    /// The VM ended before the job's present run began.
    fn is_of_an_earlier_run(&self, last: &Record) -> bool {
        let start = self.world.slurm.job(last.job).ok().flatten().and_then(|info| info.brief.start_time);
        let start_ms = start.and_then(|s| u64::try_from(s).ok()).map(|s| s * 1000);
        matches!((last.ended_ms, start_ms), (Some(ended), Some(start)) if ended < start)
    }

    /// A job that the prolog did not announce (the agent was down then) is looked up in Slurm: the shim's word alone is not believed.
    fn ensure_from_slurm(self: &Arc<Self>, job: u32, uid: u32, attach: &Attach) -> Result<Live, Refused> {
        let info = self
            .world
            .slurm
            .job(job)
            .map_err(|e| Refused::node(format!("cannot ask Slurm about job {job}: {e}")))?;
        let info = info.ok_or_else(|| Refused::node(format!("Slurm knows no job {job}")))?;
        if info.brief.uid != uid && uid != 0 {
            return Err(Refused::request(format!("job {job} is not yours")));
        }
        // A job that is over keeps its node list for a while, and no epilog would end what is made for it now.
        if !info.brief.state.is_on_nodes() || !info.brief.nodes.contains(&self.name) {
            return Err(Refused::node(format!("job {job} does not run on {}", self.name)));
        }
        log::info!("job {job}: not announced by the prolog, taken from Slurm");
        let user = crate::accounts::entry(info.brief.uid, info.gid);
        self.ensure(job, info.brief.restarts, user, attach.open.spec.clone())
            .map_err(Refused::node)?;
        match self.vms().get(&job) {
            Some(Entry::Live(live)) if live.user.uid == info.brief.uid => Ok(live.clone()),
            Some(Entry::Live(_)) => Err(Refused::request(format!("job {job} is not yours"))),
            _ => Err(Refused::node(format!("the VM of job {job} ended at once"))),
        }
    }

    /// The way to a live VM's owner.
    #[must_use]
    pub fn owner(&self, job: u32) -> Option<Sender<Request>> {
        match self.vms().get(&job) {
            Some(Entry::Live(Live { tx, .. })) => Some(tx.clone()),
            _ => None,
        }
    }

    /// The way to the owner of a VM of this user's job; root has the way to all.
    #[must_use]
    pub fn owner_for(&self, job: u32, peer_uid: u32) -> Option<Sender<Request>> {
        match self.vms().get(&job) {
            Some(Entry::Live(Live { tx, user })) if user.uid == peer_uid || peer_uid == 0 => Some(tx.clone()),
            _ => None,
        }
    }

    /// Asks an owner something that needs no effect.
    pub fn ask<T>(&self, owner: &Sender<Request>, question: impl FnOnce(Sender<T>) -> Request) -> Option<T> {
        let (reply, answer) = bounded(1);
        owner.send(question(reply)).ok()?;
        answer.recv_timeout(ANSWER).ok()
    }

    /// What there is of a job here, alive or over.
    #[must_use]
    pub fn view(self: &Arc<Self>, job: u32) -> Option<VmView> {
        match self.known(job)? {
            Known::Live(tx) => self.ask(&tx, Request::View),
            Known::Over(record) => Some(view::of(self, &record)),
        }
    }

    /// The record of a job here, alive or over.
    #[must_use]
    pub fn record(&self, job: u32) -> Option<Record> {
        match self.known(job)? {
            Known::Live(tx) => self.ask(&tx, Request::Record),
            Known::Over(record) => Some(*record),
        }
    }

    /// What the registry has of a job, taken out of it: nothing is asked or looked at while it is locked.
    fn known(&self, job: u32) -> Option<Known> {
        Some(match self.vms().get(&job)? {
            Entry::Live(Live { tx, .. }) => Known::Live(tx.clone()),
            Entry::Over(record) => Known::Over(record.clone()),
        })
    }

    /// VMs for a status that is sent every second: all that are alive, and of those that are over the [`MOST_ENDED`] that ended last. The
    /// others are asked for by their job.
    #[must_use]
    pub fn recent(views: Vec<VmView>) -> Vec<VmView> {
        let (mut ended, alive): (Vec<VmView>, Vec<VmView>) = views.into_iter().partition(VmView::is_over);
        ended.sort_by_key(|v| std::cmp::Reverse(v.ended_at));
        ended.truncate(MOST_ENDED);
        alive.into_iter().chain(ended).collect()
    }

    /// All VMs of this node, those that are over last.
    #[must_use]
    pub fn views(self: &Arc<Self>) -> Vec<VmView> {
        let mut views = Vec::new();
        let mut asked = Vec::new();
        let mut over = Vec::new();
        for (job, entry) in self.vms().iter() {
            match entry {
                Entry::Live(live) => asked.push((*job, live.tx.clone())),
                Entry::Over(record) => over.push(record.clone()),
            }
        }
        views.extend(over.iter().map(|record| view::of(self, record)));
        // All at once: one that looks at a file server which is away keeps nobody waiting for the others.
        let answers: Vec<(u32, Receiver<VmView>)> = asked
            .into_iter()
            .filter_map(|(job, tx)| {
                let (reply, answer) = bounded(1);
                tx.send(Request::View(reply)).ok().map(|()| (job, answer))
            })
            .collect();
        let until = std::time::Instant::now() + VIEWS_WITHIN;
        let mut last = self.last_views.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let known = std::mem::take(&mut *last);
        for (job, answer) in answers {
            let told = answer.recv_deadline(until).ok().or_else(|| known.get(&job).cloned());
            if let Some(told) = told {
                last.insert(job, told.clone());
                views.push(told);
            }
        }
        drop(last);
        views.sort_by_key(|v| (v.is_over() || v.state == "saved", v.job));
        views
    }

    /// What this node's VMs have been given.
    #[must_use]
    pub fn totals(&self, views: &[VmView]) -> Totals {
        let mut t = Totals {
            scope: self.name.clone(),
            ..Totals::default()
        };
        for v in views {
            // A VM that has left is counted where it is now, with all the time it has run.
            let left = matches!(v.state.as_str(), "gone" | "saved");
            if v.state == "stopped" {
                t.ended += 1;
            } else if !left {
                t.vms += 1;
                t.vcpus += v.vcpus;
                t.mem_mib += v.mem_mib;
                t.disk_bytes += v.disk_bytes;
            }
            if !left {
                t.run_seconds += v.run_seconds;
                t.vcpu_seconds += v.run_seconds * u64::from(v.vcpus);
            }
            for m in v.moves.iter().filter(|m| m.from == self.name && m.outcome == "done") {
                t.moves += 1;
                t.moved_bytes += m.bytes;
            }
        }
        t
    }

    /// Called by an owner whose VM is over here and that has nobody to answer: `true` lets it end.
    #[must_use]
    pub fn retire(&self, record: &Record, rx: &Receiver<Request>) -> bool {
        let mut vms = self.vms();
        if rx.is_empty() {
            vms.insert(record.job, Entry::Over(Box::new(record.clone())));
            true
        } else {
            false
        }
    }

    /// Keeps the marker by which the epilog hook knows a job whose VM was asked for by a step only.
    pub fn mark(&self, record: &Record) {
        let marker = self.marker(record.job);
        let done = if record.life.is_over_here() {
            self.world.files.remove(&marker)
        } else {
            self.world.files.touch(&marker)
        };
        if let Err(e) = done {
            log::warn!("job {}: marker {}: {e}", record.job, marker.display());
        }
    }

    fn marker(&self, job: u32) -> PathBuf {
        self.config.run_dir.join("jobs").join(job.to_string())
    }

    /// Puts on record that a job's script ended within its grace time: Slurm >= 24.05 requeues such a job, and it is not
    /// to run again. On shared storage where there is some, so that every node knows.
    pub fn keep_completion(self: &Arc<Self>, record: &Record, status: &slurm_vm_api::guest::ExitStatus) {
        let path = self.completion_path(record.job);
        let done = Completion {
            v: 1,
            uid: record.user.uid,
            ended: vm::programs::ended(*status, ""),
        };
        let written = serde_json::to_vec(&done)
            .map_err(Into::into)
            .and_then(|bytes| self.world.files.write_durably(&path, &bytes));
        if let Err(e) = written {
            log::error!("job {}: {}: {e}", record.job, path.display());
        }
        let (node, job) = (self.clone(), record.job);
        let watch = std::thread::Builder::new().name(format!("done-{job}"));
        if let Err(e) = watch.spawn(move || node.drop_completion_in_time(job)) {
            log::warn!("job {job}: {e}");
        }
    }

    /// Removes that record as soon as Slurm calls the job finished: who requeues it then wants it to run again.
    fn drop_completion_in_time(&self, job: u32) {
        let path = self.completion_path(job);
        while self.world.files.read(&path).is_ok() {
            if self.job_is_over(job) {
                self.forget_completion(job);
                return;
            }
            self.world.clock.sleep(Duration::from_secs(2));
        }
    }

    /// Removes that record.
    pub fn forget_completion(&self, job: u32) {
        let path = self.completion_path(job);
        if let Err(e) = self.world.files.remove(&path) {
            log::warn!("job {job}: {}: {e}", path.display());
        }
    }

    /// Where it is put on record that a job's script ended within its grace time.
    #[must_use]
    pub fn completion_path(&self, job: u32) -> PathBuf {
        self.config
            .shared_dir
            .as_ref()
            .unwrap_or(&self.config.state_dir)
            .join("done")
            .join(format!("{job}.json"))
    }

    /// How a job's script ended within the grace time of an earlier run.
    fn completion(&self, job: u32, uid: u32) -> Option<slurm_vm_api::session::Ended> {
        let bytes = self.world.files.read_trusted(&self.completion_path(job));
        let bytes = bytes.inspect_err(Distrust::complain).ok()?;
        let done: Completion = serde_json::from_slice(&bytes).ok()?;
        (done.uid == uid).then_some(done.ended)
    }

    /// Removes records and logs of VMs that ended longer ago than they are kept.
    pub fn forget_old(&self) {
        let keep_ms = u64::from(self.config.node.keep_days) * 86_400_000;
        let now = self.world.clock.now_ms();
        let mut old = Vec::new();
        self.vms().retain(|job, entry| match entry {
            Entry::Over(record) if record.ended_ms.unwrap_or(record.created_ms) + keep_ms < now => {
                old.push((*job, record.domain()));
                false
            }
            _ => true,
        });
        for (job, domain) in old {
            // The job may have begun anew meanwhile.
            if self.vms().contains_key(&job) {
                continue;
            }
            if let Err(e) = self.world.store.remove(&domain) {
                log::warn!("job {job}: {}", crate::text::chain(&e));
            }
        }
    }

    /// Jobs whose VM was saved here, as their records have it, with the directories of their saves.
    pub fn saved(&self) -> Vec<(u32, PathBuf)> {
        let saved = |(job, entry): (&u32, &Entry)| match entry {
            Entry::Over(record) => match &record.life {
                Life::Saved { at } => Some((*job, at.clone())),
                _ => None,
            },
            Entry::Live(_) => None,
        };
        self.vms().iter().filter_map(saved).collect()
    }

    /// The save of a VM waits for nobody any more: it was restored, here or elsewhere, or its job has ended.
    pub fn saved_for_nobody(&self, job: u32) {
        let changed = {
            let mut vms = self.vms();
            let Some(Entry::Over(record)) = vms.get_mut(&job) else { return };
            if !matches!(record.life, Life::Saved { .. }) {
                return;
            }
            record.life = Life::Stopped { why: End::Released };
            record.clone()
        };
        if let Err(e) = self.world.store.put(&changed) {
            log::warn!("job {job}: {}", crate::text::chain(&e));
        }
    }

    /// Slurm's notice reached a shim. What moves the VM is the controller's own poll.
    pub fn notice(&self, job: u32) {
        log::info!("job {job}: preemption notice");
        // Also where no controller says so: a script that ends from here on is not to run again.
        if let Some(owner) = self.owner(job) {
            let _ = owner.send(Request::Grace);
        }
    }

    /// Passes libvirt's events on to the owners; runs on its own thread until the hypervisor goes away.
    pub fn watch_domains(self: &Arc<Self>, events: &Receiver<DomainEvent>) {
        let mut panicked: HashMap<String, &'static str> = HashMap::new();
        for event in events {
            match event {
                DomainEvent::Panicked { name, .. } => {
                    panicked.insert(name, "its kernel panicked");
                }
                DomainEvent::Stopped { name, reason, .. } => {
                    let how = panicked.remove(&name).unwrap_or(match reason {
                        StopReason::Shutdown => "it powered off or rebooted",
                        StopReason::Destroyed => "its domain was destroyed",
                        StopReason::Crashed => "QEMU died",
                        StopReason::Failed => "QEMU was ended",
                        StopReason::Migrated | StopReason::Saved => continue,
                        StopReason::Other => "its domain ended",
                    });
                    self.tell(&name, crate::core::Event::DomainEnded { how: how.into() });
                }
                DomainEvent::Resumed {
                    name,
                    reason: StateReason::Migrated,
                    ..
                } => self.tell(&name, crate::core::Event::Arrived),
                DomainEvent::ConnectionBack => self.recheck(),
                DomainEvent::ConnectionLost => log::warn!("the connection to libvirt is lost"),
                other => log::debug!("{other:?}"),
            }
        }
    }

    fn tell(&self, domain: &str, event: crate::core::Event) {
        let job = domain
            .strip_prefix("slurm-")
            .and_then(|r| r.split('-').next())
            .and_then(|j| j.parse::<u32>().ok());
        if let Some(tx) = job.and_then(|j| self.owner(j)) {
            let _ = tx.send(Request::Core(event));
        }
    }

    /// Events may have been lost while libvirt was away: compare.
    fn recheck(self: &Arc<Self>) {
        let Ok(domains) = self.world.hypervisor.list() else { return };
        let owners: Vec<Sender<Request>> = self
            .vms()
            .values()
            .filter_map(|e| if let Entry::Live(live) = e { Some(live.tx.clone()) } else { None })
            .collect();
        for tx in owners {
            let Some(record) = self.ask(&tx, Request::Record) else { continue };
            if matches!(record.life, Life::Running | Life::AwaitingJob { .. }) && !domains.iter().any(|d| d.name == record.domain()) {
                let _ = tx.send(Request::Core(crate::core::Event::DomainEnded {
                    how: "it ended while libvirt was away".into(),
                }));
            }
        }
        log::info!("libvirt is back, {} domains", domains.len());
        // A start that libvirt was busy with when it went away may have come through after its VM was given up.
        let given_up: Vec<String> = self
            .vms()
            .values()
            .filter_map(|e| match e {
                Entry::Over(r) if matches!(r.life, Life::Stopped { .. }) => Some(r.domain()),
                _ => None,
            })
            .filter(|name| domains.iter().any(|d| d.name == *name))
            .collect();
        for name in given_up {
            log::warn!("domain {name} runs though its VM was given up: ending it");
            if let Err(e) = self.world.hypervisor.destroy(&name) {
                log::error!("cannot end {name}: {e}");
            }
        }
    }
}

/// The VM's run ends here: a job that begins here meanwhile gets another VM, or this one back, once it is over.
fn is_on_its_way_out(life: &Life) -> bool {
    life.is_over_here() || matches!(life, Life::Stopping { .. } | Life::Leaving { .. } | Life::Saving { .. })
}

/// libvirt's name of a domain type.
#[must_use]
pub fn type_name(t: DomainType) -> &'static str {
    match t {
        DomainType::Kvm => "kvm",
        DomainType::Qemu => "qemu",
    }
}

/// What a shim that comes after the end is told; `None` where the job may begin anew.
fn over_verdict(last: &Record) -> Option<(u8, String)> {
    match &last.life {
        Life::Stopped {
            why: End::Released | End::Requeued | End::NotArrived,
        }
        | Life::Gone { .. }
        | Life::Saved { .. } => None,
        Life::Stopped { why } => why
            .verdict()
            .map(|(outcome, line)| (u8::try_from(outcome).unwrap_or(slurm_vm_api::outcome::NODE_FAULT), line)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use slurm_vm_api::query::MoveView;

    /// As long as views get in practice.
    fn view(job: u32, state: &str) -> VmView {
        let moved = MoveView {
            way: "live".into(),
            from: "node-with-a-name-1".into(),
            to: "node-with-a-name-2".into(),
            cause: "preemption".into(),
            outcome: "done".into(),
            ..MoveView::default()
        };
        VmView {
            job,
            user: "a-user-with-a-name".into(),
            node: "node-with-a-name-1".into(),
            domain: format!("slurm-{job}-0"),
            state: state.into(),
            image: "debian12".into(),
            domain_type: "kvm".into(),
            domain_type_why: "a guest has booted with it".into(),
            ended_at: Some(1_700_000_000 + u64::from(job)),
            moves: vec![moved],
            ..VmView::default()
        }
    }

    #[test]
    fn a_status_is_small_whatever_has_ended_and_tells_all_that_lives() {
        let mut all: Vec<VmView> = (1..=10_000).map(|job| view(job, "stopped")).collect();
        all.extend([view(20_001, "running"), view(20_002, "saved")]);
        let told = Node::recent(all);
        let bytes = serde_json::to_vec(&told).unwrap().len();
        assert!(bytes <= 64 << 10, "{bytes} bytes");
        let jobs: Vec<u32> = told.iter().map(|v| v.job).collect();
        assert!(jobs.contains(&20_001) && jobs.contains(&20_002), "{jobs:?}");
        let last = u32::try_from(MOST_ENDED).unwrap();
        assert!(
            (10_001 - last..=10_000).all(|job| jobs.contains(&job)),
            "those that ended last: {jobs:?}"
        );
    }
}
