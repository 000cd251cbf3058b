//! Everything outside the process goes through the traits gathered in [`World`]: time, the ledger, disks, libvirt,
//! Slurm. Fault points stand around them ([`points`]), and here is where the simulation plugs in its fakes; a test
//! (`tests/effects.rs`) fails on a direct call elsewhere.
pub mod as_user;
pub mod disks;
pub mod faults;
pub mod files;
pub mod points;
pub mod private;
mod seed;
pub mod store;
pub mod trusted;

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

pub use as_user::{AsUser, AsUserError, DirectoryServer, Identity, MemoryAsUser, NetworkServer, SystemAsUser};
pub use disks::{Base, DiskError, Disks, MemoryDisks};
pub use faults::Faults;
pub use files::{Directory, Files, Killed, MemoryFiles, Storage, SystemFiles};
pub use store::{Store, StoreError};

use crate::{hypervisor::Hypervisor, slurm::Slurm};

/// Time.
pub trait Clock: Send + Sync + fmt::Debug {
    /// The wall clock: Unix time in milliseconds.
    fn now_ms(&self) -> u64;
    /// The monotonic clock, for lengths and bounds: setting the wall clock does not change it.
    fn instant(&self) -> Instant;
    /// How long ago a moment of the monotonic clock was.
    fn since(&self, moment: Instant) -> Duration {
        self.instant().duration_since(moment)
    }
    /// Blocks this thread.
    fn sleep(&self, for_: Duration);
}

/// The machine's own clock.
#[derive(Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now_ms(&self) -> u64 {
        let since = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    }

    fn instant(&self) -> Instant {
        Instant::now()
    }

    fn sleep(&self, for_: Duration) {
        std::thread::sleep(for_);
    }
}

/// All effects of one agent.
#[derive(Debug, Clone)]
pub struct World {
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// The ledger and logs.
    pub store: Arc<dyn Store>,
    /// Markers, records and directories beside the ledger, and saves.
    pub files: Arc<dyn Files>,
    /// Images and overlays.
    pub disks: Arc<dyn Disks>,
    /// libvirt.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Slurm's commands.
    pub slurm: Arc<dyn Slurm>,
    /// What is done with a job's user's rights.
    pub as_user: Arc<dyn AsUser>,
}
