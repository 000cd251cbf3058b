//! The rooms of an agent that carry out effects, as they are in production: preparing, starting, saving, restoring, ending and the sweep run over
//! libvirt, Slurm, files and disks in memory. Time is the simulation's. An agent may be killed before any call of its files.
use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use slurm_vm::{
    cluster::Alone,
    config::Config,
    core::Record,
    effects::{Clock, Faults, Killed, MemoryAsUser, MemoryDisks, Store, StoreError, World},
    hypervisor::fake::FakeHypervisor,
    node::Node,
    slurm::FakeSlurm,
};

use crate::cluster::{Cluster, Message};

/// Image of all VMs.
pub const IMAGE: &str = "tiny";
const SHARED: &str = "/shared";

/// The simulation's time.
#[derive(Debug, Clone)]
pub struct Time(Arc<AtomicU64>, Instant);

impl Default for Time {
    fn default() -> Self {
        Self(Arc::default(), Instant::now())
    }
}

impl Time {
    pub fn set(&self, now_ms: u64) {
        self.0.store(now_ms, Ordering::Relaxed);
    }
}

impl Clock for Time {
    fn now_ms(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    fn instant(&self) -> Instant {
        self.1 + Duration::from_millis(self.0.load(Ordering::Relaxed))
    }

    fn sleep(&self, _: Duration) {}
}

/// The rooms write no ledger: that is their owner's part.
#[derive(Debug)]
struct NoLedger;

impl Store for NoLedger {
    fn load(&self) -> Result<Vec<Result<Record, StoreError>>, StoreError> {
        Ok(vec![])
    }

    fn put(&self, _: &Record) -> Result<(), StoreError> {
        Ok(())
    }

    fn remove(&self, _: &str) -> Result<(), StoreError> {
        Ok(())
    }

    fn journal(&self, _: &str, _: u64, _: &str) {}

    fn vm_dir(&self, domain: &str) -> PathBuf {
        Path::new("/state/vms").join(domain)
    }
}

/// The rooms of an agent that has just been started.
pub fn of(
    name: &str,
    time: &Time,
    storage: &slurm_vm::effects::Storage,
    libvirt: &FakeHypervisor,
    slurm: &Arc<FakeSlurm>,
    faults: &Faults,
    as_user: &MemoryAsUser,
) -> Arc<Node> {
    let text = format!("[hypervisor]\ndomain_type = \"qemu\"\n[images.{IMAGE}]\ndisk = \"/images/{IMAGE}.qcow2\"\n");
    let mut config = Config::parse(&text, Path::new("slurm-vm.toml")).unwrap();
    config.node_name = Some(name.into());
    config.shared_dir = Some(SHARED.into());
    let files = storage.on(name);
    let world = World {
        clock: Arc::new(time.clone()),
        store: Arc::new(NoLedger),
        disks: Arc::new(MemoryDisks(files.clone())),
        files: Arc::new(files),
        hypervisor: Arc::new(libvirt.clone()),
        slurm: slurm.clone(),
        as_user: Arc::new(as_user.on(name)),
    };
    Node::new(Arc::new(config), world.with_fault_points(faults), Arc::new(Alone))
}

impl Cluster {
    /// Has an agent's rooms do something; nothing comes back when the agent is killed over it. One of its effects may fail, before or after it is done.
    pub fn reach<T>(&mut self, node: &str, act: impl FnOnce(&Arc<Node>) -> T) -> Option<T> {
        let rooms = self.nodes[node].rooms.clone();
        if self.rough(10) {
            let calls = u32::try_from(self.random.between(0, 8)).unwrap_or(0);
            self.storage.kill_after(node, calls);
        }
        let fails = self.effects_fail && self.rough(30);
        if fails {
            let points = u32::try_from(self.random.between(1, 12)).unwrap_or(1);
            self.nodes[node].faults.fail_nth(points);
        }
        let done = catch_unwind(AssertUnwindSafe(|| act(&rooms)));
        self.storage.spare(node);
        if self.nodes[node].faults.fail_nth(0) == 0 && fails {
            self.count("effects that failed, or were done and nobody believed it");
        }
        match done {
            Ok(done) => Some(done),
            Err(why) if why.is::<Killed>() => {
                self.say(&format!("{node}: killed over it"));
                self.count("agents killed between two calls");
                self.kill(node);
                let (node, after) = (node.to_owned(), self.random.between(200, 25_000));
                self.at(after, Message::Restart { node });
                None
            }
            Err(panic) => resume_unwind(panic),
        }
    }

    /// Whether a VM's disk is there.
    pub fn has_disk(&self, record: &Record) -> bool {
        let disk = record.plan.as_ref().and_then(|p| p.overlay.as_ref());
        disk.is_some_and(|disk| self.storage.has(disk))
    }

    /// What is on shared storage and should not be once all jobs have ended.
    pub fn left_on_storage(&self) -> Vec<PathBuf> {
        self.storage.paths().into_iter().filter(|p| p.starts_with(SHARED)).collect()
    }

    /// Servers of directories and marks in them that should not be there once all jobs have ended.
    pub fn left_with_users(&self) -> Vec<String> {
        let servers = self
            .as_user
            .running()
            .into_iter()
            .map(|(node, notes)| format!("{node}: {}", notes.display()));
        let marks = self
            .as_user
            .marks()
            .into_iter()
            .map(|(dir, name)| format!("{name} in {}", dir.display()));
        servers.chain(marks).collect()
    }

    /// Saves that wait for their job and have lost their memory: after their manifest a power cut takes nothing away.
    pub fn torn_saves(&self) -> Vec<PathBuf> {
        let is_waiting = |p: &PathBuf| p.file_name().is_some_and(|n| n == "manifest.json");
        let dirs = self.storage.paths().into_iter().filter(is_waiting);
        let dirs = dirs.filter_map(|p| p.parent().map(Path::to_path_buf));
        dirs.filter(|dir| !self.storage.has(&dir.join("memory"))).collect()
    }
}
