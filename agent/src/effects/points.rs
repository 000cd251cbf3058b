//! A fault point before and one after every effect: a layer around each trait of [`World`].
//!
//! A point is named `TRAIT.METHOD.before` or `.after` (`hypervisor.start.after`). What is armed at it ([`faults`](super::faults)) ends the
//! process there, or makes the effect report a failure: before it, nothing was done; after it, it was done and nobody believes it. An effect
//! that cannot fail only knows the end. The daemon works with the layer always; unarmed, a point costs one look at an empty list.
use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use crossbeam_channel::Receiver;

use super::{
    AsUser, AsUserError, Base, Directory, DirectoryServer, DiskError, Disks, Faults, Files, Identity, NetworkServer, Store, StoreError,
    World, trusted::Distrust,
};
use crate::{
    core::{directories::Mark, record::Record},
    hypervisor::{
        DomainEvent, DomainInfo, DomainMetadata, DomainSpec, DomainType, HostInfo, Hypervisor, HypervisorError, JobProgress,
        MigrateOutcome, MigrateParams, SaveFormat, SavedDomain,
    },
    slurm::{
        JobBrief, JobId, JobInfo, JobRequest, JobUpdate, NodeInfo, PartitionInfo, QosInfo, ReservationInfo, ReservationSpec, Slurm,
        SlurmConfig, SlurmError,
    },
};

/// An implementation with fault points around each of its methods.
pub struct Pointed<T: ?Sized> {
    inner: Arc<T>,
    faults: Faults,
}

impl<T: ?Sized + fmt::Debug> fmt::Debug for Pointed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl<T: ?Sized> Pointed<T> {
    /// The layer around `inner`.
    pub fn new(inner: Arc<T>, faults: &Faults) -> Self {
        Self {
            inner,
            faults: faults.clone(),
        }
    }

    pub(crate) fn inner(&self) -> &T {
        &self.inner
    }

    pub(crate) fn faults(&self) -> &Faults {
        &self.faults
    }
}

/// An error that a fault point can report as the effect's own.
trait Injected {
    fn injected(why: String) -> Self;
}

impl Injected for io::Error {
    fn injected(why: String) -> Self {
        Self::other(why)
    }
}

impl Injected for HypervisorError {
    fn injected(why: String) -> Self {
        // libvirt's VIR_ERR_INTERNAL_ERROR, of no domain in particular.
        Self::Libvirt {
            call: "fault",
            domain: 0,
            message: why,
            code: 1,
        }
    }
}

impl Injected for SlurmError {
    fn injected(message: String) -> Self {
        Self::Unreachable { message }
    }
}

impl Injected for DiskError {
    fn injected(why: String) -> Self {
        Self::Node {
            act: "use",
            path: PathBuf::new(),
            why,
        }
    }
}

impl Injected for StoreError {
    fn injected(why: String) -> Self {
        Self::Io {
            act: "write",
            path: PathBuf::new(),
            source: io::Error::other(why),
        }
    }
}

impl Injected for Distrust {
    fn injected(why: String) -> Self {
        Self::Io {
            path: PathBuf::new(),
            source: io::Error::other(why),
        }
    }
}

impl Injected for AsUserError {
    fn injected(why: String) -> Self {
        Self::Node {
            what: "as a user".into(),
            why,
        }
    }
}

/// Implements a trait for the layer, and lists its points.
macro_rules! points {
    ($layer:literal, $list:ident, $effects:path;
     $(fn $name:ident($($arg:ident: $type:ty),*) -> Result<$ok:ty, $error:ty>;)*
     $(endless fn $sure:ident($($its:ident: $kind:ty),*) -> $answer:ty;)*) => {
        const $list: &[&str] = &[
            $(concat!($layer, ".", stringify!($name)),)*
            $(concat!($layer, ".", stringify!($sure)),)*
        ];

        impl $effects for Pointed<dyn $effects> {
            $(fn $name(&self, $($arg: $type),*) -> Result<$ok, $error> {
                let at = |point: &str| self.faults.pass(point).map_err(<$error as Injected>::injected);
                at(concat!($layer, ".", stringify!($name), ".before"))?;
                let done = self.inner.$name($($arg),*)?;
                at(concat!($layer, ".", stringify!($name), ".after"))?;
                Ok(done)
            })*

            $(fn $sure(&self, $($its: $kind),*) -> $answer {
                let _ = self.faults.pass(concat!($layer, ".", stringify!($sure), ".before"));
                let done = self.inner.$sure($($its),*);
                let _ = self.faults.pass(concat!($layer, ".", stringify!($sure), ".after"));
                done
            })*
        }
    };
}

points! { "hypervisor", HYPERVISOR, Hypervisor;
    fn ping(deadline: Duration) -> Result<(), HypervisorError>;
    fn host(domain_type: DomainType) -> Result<HostInfo, HypervisorError>;
    fn start(spec: &DomainSpec, paused: bool) -> Result<(), HypervisorError>;
    fn suspend(name: &str) -> Result<(), HypervisorError>;
    fn resume(name: &str) -> Result<(), HypervisorError>;
    fn shutdown(name: &str) -> Result<(), HypervisorError>;
    fn destroy(name: &str) -> Result<bool, HypervisorError>;
    fn list() -> Result<Vec<DomainInfo>, HypervisorError>;
    fn info(name: &str) -> Result<Option<DomainInfo>, HypervisorError>;
    fn pin(name: &str, cpuset: &[u32]) -> Result<(), HypervisorError>;
    fn set_metadata(name: &str, metadata: &DomainMetadata) -> Result<(), HypervisorError>;
    fn migrate(name: &str, params: &MigrateParams) -> Result<MigrateOutcome, HypervisorError>;
    fn job_progress(name: &str) -> Result<Option<JobProgress>, HypervisorError>;
    fn migrate_tune(name: &str, max_downtime_ms: Option<u64>, bandwidth_mib_s: Option<u64>) -> Result<(), HypervisorError>;
    fn abort_job(name: &str) -> Result<(), HypervisorError>;
    fn save(name: &str, path: &Path, format: SaveFormat) -> Result<SaveFormat, HypervisorError>;
    fn saved(path: &Path) -> Result<SavedDomain, HypervisorError>;
    fn restore(path: &Path, xml: Option<&str>, paused: bool) -> Result<(), HypervisorError>;
    fn live_xml(name: &str) -> Result<String, HypervisorError>;
    fn dirty_rate_start(name: &str, seconds: u32) -> Result<(), HypervisorError>;
    fn dirty_rate(name: &str) -> Result<Option<u64>, HypervisorError>;
    fn memory_in_use(name: &str) -> Result<u64, HypervisorError>;
    fn xml_for(spec: &DomainSpec) -> Result<String, HypervisorError>;
    endless fn events() -> Receiver<DomainEvent>;
}

points! { "slurm", SLURM, Slurm;
    fn job(id: JobId) -> Result<Option<JobInfo>, SlurmError>;
    fn jobs(ids: &[JobId]) -> Result<Vec<JobInfo>, SlurmError>;
    fn jobs_poll() -> Result<Vec<JobBrief>, SlurmError>;
    fn requests() -> Result<Vec<JobRequest>, SlurmError>;
    fn qos() -> Result<Vec<QosInfo>, SlurmError>;
    fn nodes() -> Result<Vec<NodeInfo>, SlurmError>;
    fn node(name: &str) -> Result<NodeInfo, SlurmError>;
    fn set_active_features(nodes: &[String], features: &[String]) -> Result<(), SlurmError>;
    fn requeue(jobs: &[JobId]) -> Result<(), SlurmError>;
    fn requeuehold(jobs: &[JobId]) -> Result<(), SlurmError>;
    fn requeue_special(job: JobId) -> Result<(), SlurmError>;
    fn hold(jobs: &[JobId]) -> Result<(), SlurmError>;
    fn release(jobs: &[JobId]) -> Result<(), SlurmError>;
    fn update_jobs(jobs: &[JobId], update: &JobUpdate) -> Result<(), SlurmError>;
    fn create_reservation(spec: &ReservationSpec) -> Result<(), SlurmError>;
    fn set_reservation_users(name: &str, users: &[String]) -> Result<(), SlurmError>;
    fn reservation(name: &str) -> Result<Option<ReservationInfo>, SlurmError>;
    fn reservations() -> Result<Vec<ReservationInfo>, SlurmError>;
    fn delete_reservation(name: &str) -> Result<bool, SlurmError>;
    fn cancel(job: JobId, signal: Option<u8>) -> Result<(), SlurmError>;
    fn config() -> Result<SlurmConfig, SlurmError>;
    fn partitions() -> Result<Vec<PartitionInfo>, SlurmError>;
    fn ping() -> Result<(), SlurmError>;
}

points! { "disks", DISKS, Disks;
    fn base(path: &Path, format: &str) -> Result<Base, DiskError>;
    fn make_overlay(overlay: &Path, base: &Path, base_format: &str, mib: Option<u64>) -> Result<(), DiskError>;
    fn seed(helper: &Path, dir: &Path) -> Result<PathBuf, DiskError>;
    fn remove(path: &Path) -> Result<(), DiskError>;
    fn free_bytes(path: &Path) -> Result<u64, DiskError>;
    fn readable(path: &Path) -> Result<(), DiskError>;
    endless fn used_bytes(path: &Path) -> u64;
}

points! { "store", STORE, Store;
    fn load() -> Result<Vec<Result<Record, StoreError>>, StoreError>;
    fn put(record: &Record) -> Result<(), StoreError>;
    fn remove(domain: &str) -> Result<(), StoreError>;
    endless fn journal(domain: &str, now_ms: u64, line: &str) -> ();
    endless fn vm_dir(domain: &str) -> PathBuf;
}

points! { "files", FILES, Files;
    fn read(path: &Path) -> Result<Vec<u8>, io::Error>;
    fn read_trusted(path: &Path) -> Result<Vec<u8>, Distrust>;
    fn trusted(dir: &Path) -> Result<(), Distrust>;
    fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), io::Error>;
    fn touch(path: &Path) -> Result<(), io::Error>;
    fn remove(path: &Path) -> Result<(), io::Error>;
    fn list(dir: &Path) -> Result<Vec<PathBuf>, io::Error>;
    fn rename(from: &Path, to: &Path) -> Result<(), io::Error>;
    fn sync(file: &Path) -> Result<(), io::Error>;
    fn remove_all(dir: &Path) -> Result<(), io::Error>;
    fn make_directory(dir: &Path, whose: Directory<'_>) -> Result<(), io::Error>;
    fn give(file: &Path, qemu_user: &str) -> Result<(), io::Error>;
    endless fn is_there(path: &Path) -> bool;
}

points! { "as_user", AS_USER, AsUser;
    fn serve(server: &DirectoryServer) -> Result<(), AsUserError>;
    fn serve_network(server: &NetworkServer) -> Result<(), AsUserError>;
    fn end_servers(dir: &Path) -> Result<(), AsUserError>;
    fn ended_servers(dir: &Path) -> Result<Vec<String>, AsUserError>;
    fn complaints(dir: &Path) -> Result<Vec<(String, String)>, AsUserError>;
    fn look(who: &Identity, dir: &Path) -> Result<(), AsUserError>;
    fn mark(who: &Identity, dir: &Path, name: &str, nonce: &str) -> Result<Mark, AsUserError>;
    fn is_marked(who: &Identity, dir: &Path, name: &str, mark: &Mark) -> Result<bool, AsUserError>;
    fn unmark(who: &Identity, dir: &Path, name: &str) -> Result<(), AsUserError>;
}

/// All points of this layer, sorted: `TRAIT.METHOD.before` and `.after`.
#[must_use]
pub fn points() -> Vec<String> {
    let methods = [HYPERVISOR, SLURM, DISKS, STORE, FILES, AS_USER].concat();
    let mut points: Vec<String> = methods.iter().flat_map(|m| [format!("{m}.before"), format!("{m}.after")]).collect();
    points.sort();
    points
}

impl World {
    /// This world with a fault point before and after each of its effects.
    #[must_use]
    pub fn with_fault_points(self, faults: &Faults) -> Self {
        Self {
            store: Arc::new(Pointed::<dyn Store>::new(self.store, faults)),
            files: Arc::new(Pointed::<dyn Files>::new(self.files, faults)),
            disks: Arc::new(Pointed::<dyn Disks>::new(self.disks, faults)),
            hypervisor: Arc::new(Pointed::<dyn Hypervisor>::new(self.hypervisor, faults)),
            slurm: Arc::new(Pointed::<dyn Slurm>::new(self.slurm, faults)),
            as_user: Arc::new(Pointed::<dyn AsUser>::new(self.as_user, faults)),
            clock: self.clock,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::effects::MemoryFiles;

    #[test]
    fn an_effect_that_fails_before_is_not_done_and_one_that_fails_after_is() {
        for (point, done) in [("files.touch.before", false), ("files.touch.after", true)] {
            let inner: Arc<dyn Files> = Arc::new(MemoryFiles::default());
            let pointed = Pointed::<dyn Files>::new(Arc::clone(&inner), &Faults::parse(&format!("{point}=fail")).unwrap());
            let said = pointed.touch(Path::new("/a")).unwrap_err();
            assert!(said.to_string().contains(point), "{said}");
            assert_eq!(inner.is_there(Path::new("/a")), done, "{point}");
            pointed.touch(Path::new("/a")).unwrap();
        }
    }

    #[test]
    fn the_error_of_an_effect_is_its_own() {
        let pointed = Pointed::<dyn Files>::new(Arc::new(MemoryFiles::default()), &Faults::default());
        assert_eq!(pointed.read(Path::new("/none")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
