//! The node role: which VMs there are, and the way to each one's owner thread. Shared by the socket server, the peer
//! server and the health watch; holds no VM state itself but the last record of those that are over.
mod attach;
mod completion;
mod controllers;
mod ended;
mod events;
pub mod health;
mod hooks;
mod host;
pub mod probe;
mod recovery;
pub mod shared;
pub mod sweep;
mod views;

pub use attach::Admission;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock,
        atomic::{AtomicBool, AtomicU64},
    },
    time::Duration,
};

use crossbeam_channel::{Receiver, Sender, bounded};
use slurm_vm_api::query::VmView;

use crate::{
    cluster::Peers,
    config::Config,
    core::{
        Record,
        registry::{self, Entry},
    },
    effects::World,
    hypervisor::{DomainInfo, DomainType, HostInfo},
    vm::{self, Request},
};

/// How long the owner of a VM may take to answer a question that needs no effect.
const ANSWER: Duration = Duration::from_secs(10);

/// The VMs of this node, with the ways to their owners.
type Registry = registry::Registry<Sender<Request>>;

/// What is known of a job's VM, as it was a moment ago.
#[derive(Debug)]
pub enum Known {
    /// Its owner.
    Live(Sender<Request>),
    /// The record of its end here.
    Over(Box<Record>),
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
    vms: Mutex<Registry>,
    domain_type: OnceLock<(DomainType, String)>,
    /// What libvirt says of the host, asked once: it may probe QEMU for seconds to tell it.
    host: OnceLock<HostInfo>,
    /// The last look at `shared_dir`.
    shared: Mutex<shared::Look>,
    /// A start with a hard limit has failed here: there are no cgroups for libvirt.
    hard_limit_fails: AtomicBool,
    /// Bytes per second of the last save made here; 0 before the first.
    save_speed: AtomicU64,
    /// What live VMs said of themselves last.
    last_views: Mutex<HashMap<u32, VmView>>,
    controllers: Mutex<controllers::Controllers>,
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
            vms: Mutex::default(),
            domain_type: OnceLock::new(),
            host: OnceLock::new(),
            shared: Mutex::default(),
            hard_limit_fails: AtomicBool::new(false),
            save_speed: AtomicU64::new(0),
            last_views: Mutex::default(),
            controllers: Mutex::default(),
        })
    }

    fn vms(&self) -> MutexGuard<'_, Registry> {
        self.vms.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// How long the record of a VM that is over is kept, in milliseconds.
    fn keep_ms(&self) -> u64 {
        u64::from(self.config.node.keep_days) * 86_400_000
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

    /// The way to a live VM's owner.
    #[must_use]
    pub fn owner(&self, job: u32) -> Option<Sender<Request>> {
        self.vms().live(job).map(|live| live.way.clone())
    }

    /// The way to the owner of a VM of this user's job; root has the way to all.
    #[must_use]
    pub fn owner_for(&self, job: u32, peer_uid: u32) -> Option<Sender<Request>> {
        let vms = self.vms();
        let live = vms.live(job).filter(|live| live.user.uid == peer_uid || peer_uid == 0)?;
        Some(live.way.clone())
    }

    /// Asks an owner something that needs no effect.
    pub fn ask<T>(&self, owner: &Sender<Request>, question: impl FnOnce(Sender<T>) -> Request) -> Option<T> {
        let (reply, answer) = bounded(1);
        owner.send(question(reply)).ok()?;
        answer.recv_timeout(ANSWER).ok()
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
    #[must_use]
    pub fn known(&self, job: u32) -> Option<Known> {
        Some(match self.vms().get(job)? {
            Entry::Live(live) => Known::Live(live.way.clone()),
            Entry::Over(record) => Known::Over(record.clone()),
        })
    }

    /// Called by an owner whose VM is over here and that has nobody to answer: `true` lets it end. A run that has waited for that begins.
    #[must_use]
    pub fn retire(self: &Arc<Self>, record: &Record, rx: &Receiver<Request>) -> bool {
        let mut vms = self.vms();
        if !rx.is_empty() {
            return false;
        }
        if let Some((number, run)) = vms.retired(record.clone()) {
            self.begin(&mut vms, record.job, number, run);
        }
        true
    }

    /// A VM that was on its way out stays: `true` if a run of its job has waited for its end, and gets it now.
    #[must_use]
    pub fn stays(&self, record: &Record) -> bool {
        self.vms().stays(record.job, record.user.uid)
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
}

/// libvirt's domains as the registry looks at them.
#[must_use]
pub fn domains_of(all: &[DomainInfo]) -> Vec<registry::Domain> {
    let domain = |d: &DomainInfo| registry::Domain {
        name: d.name.clone(),
        uuid: d.uuid,
        run: d.metadata.run,
    };
    all.iter().map(domain).collect()
}

/// libvirt's name of a domain type.
#[must_use]
pub fn type_name(t: DomainType) -> &'static str {
    match t {
        DomainType::Kvm => "kvm",
        DomainType::Qemu => "qemu",
    }
}
