//! The controller role: one per cluster, on the slurmctld host. It schedules nothing; Slurm picks. It keeps the feature
//! `vm` true to the health of each node ([`health`]), sends jobs that met a broken node elsewhere ([`faulty`]), and
//! answers `svm` for the whole cluster ([`asks`]).
//!
//! One thread polls Slurm every `poll_ms`; one thread per VM node keeps asking that node's agent for its status. Both
//! write into [`Cluster`] behind one lock that is never held over a call to the outside. Everything that must survive a
//! restart is in Slurm (features, reservations, job fields), in the ledger of the moves or in the [`notes`] on jobs.
mod admission;
mod asks;
mod check;
mod details;
mod faulty;
mod health;
mod jobs;
mod notes;
mod orders;
pub mod placement;
mod places;
pub mod relocate;
mod verdict;
mod watch;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
    thread,
    time::{Duration, Instant},
};

pub use jobs::Jobs;
use notes::Notes;
use slurm_vm_api::query::{MoveView, NodeHealth, Totals, VmView};

use crate::{
    cluster::{PeerReply, PeerRequest, Peers},
    config::Config,
    core::relocation::JobMove,
    effects::World,
    slurm::{JobState, NodeInfo},
};

/// A node's last word, and when it came.
#[derive(Debug, Clone)]
pub struct NodeStatus {
    /// Health as the node's agent sees it.
    pub health: NodeHealth,
    /// VMs, alive and over.
    pub vms: Vec<VmView>,
    /// Totals.
    pub totals: Totals,
    /// When the agent last answered.
    pub heard: Instant,
}

/// What is known of the cluster.
#[derive(Debug, Default)]
pub struct Cluster {
    /// VM nodes by name, with what their agents said last.
    pub nodes: BTreeMap<String, Option<NodeStatus>>,
    /// The storage that the nodes share ([`health::usual_storage`]).
    pub storage: Option<String>,
    /// Slurm's view of these nodes.
    pub slurm_nodes: BTreeMap<String, NodeInfo>,
    /// Jobs of the last poll.
    pub jobs: Arc<Jobs>,
    /// Node on which a job was last seen running and its restart count then, for jobs that met a broken node.
    pub last_run: BTreeMap<u32, (String, u32)>,
    /// When a job was first seen in the state SPECIAL_EXIT.
    pub special: BTreeMap<u32, Instant>,
    /// Moves under way.
    pub moves: BTreeMap<u32, JobMove>,
    /// How a job's last move ended, and what the agents reported of it.
    pub results: BTreeMap<u32, (Result<String, String>, Option<MoveView>)>,
    /// When a job could last not be moved off a node that is drained.
    pub failed: BTreeMap<u32, Instant>,
    /// Preemptions that have been acted on: job and its restart count.
    pub handled: BTreeMap<u32, u32>,
    /// Jobs whose nodes are being asked for their ways.
    pub planning: BTreeSet<u32>,
    /// Jobs that cannot move, with the restart count of the run in which that was said.
    pub stays: BTreeMap<u32, u32>,
}

/// The controller role.
#[derive(Debug)]
pub struct Controller {
    /// Settings.
    pub config: Arc<Config>,
    /// Effects; Slurm and time are used.
    pub world: World,
    /// Agents of the nodes.
    pub peers: Arc<dyn Peers>,
    started: Instant,
    cluster: Mutex<Cluster>,
    notes: Mutex<Notes>,
    places: places::Places,
    orders: orders::Orders,
    details: details::Details,
    relocations: relocate::Relocations,
}

/// What another thread left when it panicked is taken as it is.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// An agent that has not answered for so long is sick.
const STALE: Duration = Duration::from_secs(6);
/// How often reservations are looked through for those that belong to no move.
const SWEEP: Duration = Duration::from_secs(60);
/// How long an agent may take for a status.
const STATUS_WITHIN: Duration = Duration::from_secs(5);

impl Controller {
    /// A controller that knows nothing yet.
    #[must_use]
    pub fn new(config: Arc<Config>, world: World, peers: Arc<dyn Peers>) -> Arc<Self> {
        let notes = Notes::load(world.files.clone(), config.state_dir.join("jobs.json"));
        let started = world.clock.instant();
        let orders = orders::Orders::start(world.clock.clone(), world.slurm.clone());
        Arc::new(Self {
            config,
            world,
            peers,
            started,
            cluster: Mutex::new(Cluster::default()),
            notes: Mutex::new(notes),
            places: places::Places::default(),
            orders,
            details: details::Details::default(),
            relocations: relocate::Relocations::default(),
        })
    }

    /// What is known of the cluster; hold it shortly.
    pub fn cluster(&self) -> MutexGuard<'_, Cluster> {
        locked(&self.cluster)
    }

    /// What is remembered of jobs; never taken before [`Controller::cluster`] is let go.
    fn notes(&self) -> MutexGuard<'_, Notes> {
        locked(&self.notes)
    }

    /// Polls until the process ends.
    pub fn run(self: &Arc<Self>) {
        let poll = Duration::from_millis(self.config.controller.poll_ms);
        let mut failing = false;
        let mut swept: Option<Instant> = None;
        self.load_claims();
        self.refresh_facts();
        self.start_relocations();
        self.recover_moves();
        let controller = self.clone();
        if let Err(e) = thread::Builder::new().name("places".into()).spawn(move || controller.run_places()) {
            log::error!("cannot start the thread that gives out places: {e}");
        }
        loop {
            let begun = self.world.clock.instant();
            match self.poll() {
                Ok(()) => {
                    failing = false;
                    if swept.is_none_or(|at| begun.duration_since(at) > SWEEP) {
                        swept = Some(begun);
                        self.sweep_reservations();
                    }
                }
                Err(e) if !failing => {
                    log::warn!("Slurm does not answer: {e}");
                    failing = true;
                }
                Err(_) => {}
            }
            // Moves that wait for Slurm look a little oftener, by one command for all of them.
            while let Some(left) = poll.checked_sub(self.world.clock.since(begun)).filter(|left| !left.is_zero()) {
                self.world.clock.sleep(left.min(poll / 3 + Duration::from_millis(1)));
                if self.world.clock.since(begun) < poll
                    && self.relocations.wait_for_slurm()
                    && let Ok(jobs) = self.world.slurm.jobs_poll()
                {
                    self.relocations.poll(Arc::new(Jobs::new(jobs)));
                }
            }
        }
    }

    fn poll(self: &Arc<Self>) -> Result<(), String> {
        let feature = &self.config.controller.feature;
        let nodes = self.world.slurm.nodes().map_err(|e| e.to_string())?;
        let jobs = Arc::new(Jobs::new(self.world.slurm.jobs_poll().map_err(|e| e.to_string())?));
        let vm_nodes: Vec<NodeInfo> = nodes.into_iter().filter(|n| n.available_features.contains(feature)).collect();
        let mut new = Vec::new();
        {
            let mut cluster = self.cluster();
            for n in &vm_nodes {
                if !cluster.nodes.contains_key(&n.name) {
                    cluster.nodes.insert(n.name.clone(), None);
                    new.push((n.name.clone(), n.address.clone()));
                }
            }
            for j in jobs.iter().filter(|j| j.state.is_on_nodes()) {
                if let Some(host) = j.batch_host.clone().or_else(|| j.nodes.first().cloned()) {
                    cluster.last_run.insert(j.id, (host, j.restarts));
                }
            }
            cluster.last_run.retain(|job, _| jobs.has(*job));
            let is_special = |job: u32| jobs.by_id(job).is_some_and(|j| j.state == JobState::SpecialExit);
            cluster.special.retain(|job, _| is_special(*job));
            let now = self.world.clock.instant();
            for j in jobs.iter().filter(|j| j.state == JobState::SpecialExit) {
                cluster.special.entry(j.id).or_insert(now);
            }
            cluster.results.retain(|job, _| jobs.has(*job));
            cluster.failed.retain(|job, _| jobs.has(*job));
            cluster.handled.retain(|job, _| jobs.has(*job));
            cluster.stays.retain(|job, _| jobs.has(*job));
            let told = cluster.nodes.values().flatten().filter_map(|s| s.health.storage.as_deref());
            cluster.storage = health::usual_storage(told);
            cluster.slurm_nodes = vm_nodes.iter().map(|n| (n.name.clone(), n.clone())).collect();
            cluster.jobs = jobs.clone();
            drop(cluster);
            self.note_claims(&jobs);
            self.relocations.poll(jobs.clone());
            self.notes().retain(|job| jobs.has(job));
        }
        for (name, address) in new {
            self.watch(name, address);
        }
        self.refresh_facts();
        self.keep_features(&vm_nodes);
        self.retry_faulty();
        self.settle_faulty();
        self.start_moves();
        Ok(())
    }

    /// So that nobody else has to wait for Slurm to know them.
    fn refresh_facts(&self) {
        if let Err(e) = self.facts() {
            log::debug!("Slurm's configuration is not known: {e}");
        }
    }

    /// Keeps asking one node's agent, on a thread of its own.
    fn watch(self: &Arc<Self>, name: String, address: String) {
        let controller = self.clone();
        let spawned = thread::Builder::new().name(format!("watch-{name}")).spawn(move || {
            let poll = Duration::from_millis(controller.config.controller.poll_ms);
            loop {
                let begun = controller.world.clock.instant();
                if let Ok(PeerReply::Status { health, vms, totals }) =
                    controller.peers.request(&name, &address, &PeerRequest::Status, STATUS_WITHIN)
                {
                    let status = NodeStatus {
                        health,
                        vms,
                        totals,
                        heard: controller.world.clock.instant(),
                    };
                    controller.cluster().nodes.insert(name.clone(), Some(status));
                }
                let taken = controller.world.clock.since(begun);
                controller.world.clock.sleep(poll.saturating_sub(taken));
            }
        });
        if let Err(e) = spawned {
            log::error!("cannot start a thread: {e}");
        }
    }

    /// Address of a node's agent.
    #[must_use]
    pub fn address(&self, node: &str) -> String {
        self.cluster()
            .slurm_nodes
            .get(node)
            .map_or_else(|| node.to_owned(), |n| n.address.clone())
    }
}
