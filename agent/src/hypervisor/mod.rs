//! The hypervisor effect: everything that the agent does with virtual machines goes through [`Hypervisor`].
//!
//! Two implementations: [`libvirt::LibvirtHypervisor`] for nodes (and for libvirt's in-process `test:///default`), and [`fake::FakeHypervisor`]
//! for the seeded simulation. Callers are the agent's worker threads, several at a time; every call blocks until it is done or has failed.
//!
//! What an implementation promises:
//! * A domain without our metadata ([`DomainMetadata`]) is never listed, described or acted on. By name it reads as "no such domain".
//! * A domain survives the process that started it: nothing is destroyed when the agent ends.
//! * Events are hints ([`DomainEvent`]): they may be lost while the connection is down, so after [`DomainEvent::ConnectionBack`] a caller looks at
//!   [`Hypervisor::list`].
//! * A failed [`Hypervisor::migrate`] may have succeeded all the same (the connection broke after the hand-over): ask both ends with
//!   [`Hypervisor::info`] before anything is resumed.
#![deny(unsafe_code)]

pub mod fake;
pub mod libvirt;
mod types;

pub use libvirt::xml::repoint;
pub use types::*;

use crossbeam_channel::Receiver;
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

/// Why a call on the hypervisor failed. The texts are fragments that read after "failed to …".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HypervisorError {
    /// There is no connection to libvirt, or it broke during the call: whether the act was done is unknown.
    #[error("no connection to {uri}: {message}")]
    Connect {
        /// The libvirt URI of the connection.
        uri: String,
        /// libvirt's own words.
        message: String,
    },
    /// No domain of that name with our metadata.
    #[error("no domain {name}")]
    NoDomain {
        /// The name that was asked for.
        name: String,
    },
    /// A domain of that name or uuid is there already (ours or not).
    #[error("domain {name} already exists")]
    AlreadyExists {
        /// The name that was asked for.
        name: String,
    },
    /// libvirt, or a security module behind it, refuses this process the call.
    #[error("{call}: access denied: {message}")]
    Denied {
        /// The libvirt function.
        call: &'static str,
        /// libvirt's own words.
        message: String,
    },
    /// The job (migration, save) was aborted by [`Hypervisor::abort_job`], or by libvirt at a broken connection to the peer.
    #[error("{call}: aborted: {message}")]
    Aborted {
        /// The libvirt function.
        call: &'static str,
        /// libvirt's own words.
        message: String,
    },
    /// The domain is in a state in which this cannot be done (it is shut off, or another job runs on it).
    #[error("{call}: not in this state: {message}")]
    WrongState {
        /// The libvirt function.
        call: &'static str,
        /// libvirt's own words.
        message: String,
    },
    /// This libvirt, or this driver of it, cannot do that at all.
    #[error("{call}: not supported: {message}")]
    Unsupported {
        /// The libvirt function.
        call: &'static str,
        /// libvirt's own words.
        message: String,
    },
    /// No answer in time. The call may still be under way.
    #[error("{call}: no answer within {after:?}")]
    Timeout {
        /// The libvirt function.
        call: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// Any other failure, in libvirt's terms.
    #[error("{call}: {message} (libvirt error {code} of {domain})")]
    Libvirt {
        /// The libvirt function.
        call: &'static str,
        /// The part of libvirt that failed (`virErrorDomain`).
        domain: i32,
        /// libvirt's own words.
        message: String,
        /// The number of the error (`virErrorNumber`).
        code: i32,
    },
    /// What came in (a name, a path, XML, metadata) cannot be used.
    #[error("{what}")]
    Invalid {
        /// What is wrong.
        what: String,
    },
}

impl HypervisorError {
    /// Whether a domain did not start because this host has no control groups that hold its memory. Any other reason says nothing about them.
    #[must_use]
    pub fn is_lack_of_cgroups(&self) -> bool {
        matches!(self, Self::Unsupported { message, .. } if message.contains("cgroup"))
    }
}

/// What calls return.
pub type Result<T> = std::result::Result<T, HypervisorError>;

/// All that the agent does with virtual machines. See the module's text for what holds for every call.
pub trait Hypervisor: Send + Sync + std::fmt::Debug {
    /// Whether the hypervisor answers, within `deadline`.
    fn ping(&self, deadline: Duration) -> Result<()>;

    /// What this host is and can, for domains of one type.
    fn host(&self, domain_type: DomainType) -> Result<HostInfo>;

    /// Starts a transient domain; with `paused` its processors do not run until [`Hypervisor::resume`].
    ///
    /// Returns when QEMU runs, not when the guest is up. A hard limit on a host without cgroups is an error: see [`HostInfo`].
    fn start(&self, spec: &DomainSpec, paused: bool) -> Result<()>;

    /// Stops the guest's processors. No error if they stand still already.
    fn suspend(&self, name: &str) -> Result<()>;

    /// Lets the guest's processors run. No error if they do already.
    fn resume(&self, name: &str) -> Result<()>;

    /// Asks the guest to power off (ACPI). Returns at once; the end shows as [`DomainEvent::Stopped`].
    fn shutdown(&self, name: &str) -> Result<()>;

    /// Ends the domain now. `false`: there was none. When it returns, QEMU is gone. About 0.2 s; 10 s if QEMU itself hangs and must be killed.
    fn destroy(&self, name: &str) -> Result<bool>;

    /// All domains with our metadata, in no order.
    fn list(&self) -> Result<Vec<DomainInfo>>;

    /// One domain; `None` when there is none with our metadata.
    fn info(&self, name: &str) -> Result<Option<DomainInfo>>;

    /// Pins a running domain as [`DomainSpec::cpuset`] says. Where there is nothing to pin to, nothing is done.
    fn pin(&self, name: &str, cpuset: &[u32]) -> Result<()>;

    /// Replaces our metadata of a domain.
    fn set_metadata(&self, name: &str, metadata: &DomainMetadata) -> Result<()>;

    /// Moves a running (or paused) domain to another host; blocks until it runs there or runs here again.
    ///
    /// After success the domain does not exist here. After [`HypervisorError::Aborted`] or another error of the move itself libvirt has resumed
    /// it here; after [`HypervisorError::Connect`] or [`HypervisorError::Timeout`] it may be on either side. A migration goes on without the process that
    /// asked for it: after a restart look at [`Hypervisor::job_progress`], and wait or [`Hypervisor::abort_job`].
    fn migrate(&self, name: &str, params: &MigrateParams) -> Result<MigrateOutcome>;

    /// How far the migration or save of a domain is; `None` when no such job runs, or no such domain.
    fn job_progress(&self, name: &str) -> Result<Option<JobProgress>>;

    /// Changes limits of a running migration; `None` leaves a limit as it is.
    fn migrate_tune(&self, name: &str, max_downtime_ms: Option<u64>, bandwidth_mib_s: Option<u64>) -> Result<()>;

    /// Aborts the migration or save that runs on a domain. The blocked call returns [`HypervisorError::Aborted`].
    fn abort_job(&self, name: &str) -> Result<()>;

    /// Stops the guest and writes its memory and XML to `path` on the hypervisor's host; then the domain is gone.
    ///
    /// Returns the format that was written: [`SaveFormat::Raw`] where sparse is not to be had. The file belongs to root, mode 0600.
    fn save(&self, name: &str, path: &Path, format: SaveFormat) -> Result<SaveFormat>;

    /// What is in a saved image: its XML and our metadata.
    fn saved(&self, path: &Path) -> Result<SavedDomain>;

    /// Starts a domain from a saved image, which is only read. `xml` replaces the image's XML: same name and uuid, same devices; other paths and
    /// metadata are free (see [`libvirt::xml::repoint`]).
    fn restore(&self, path: &Path, xml: Option<&str>, paused: bool) -> Result<()>;

    /// The XML of a running domain in the form that a migration's `dest_xml` wants.
    fn live_xml(&self, name: &str) -> Result<String>;

    /// Starts to measure the guest's dirty rate over so many seconds (1 to 60). A measurement that runs already is left alone.
    fn dirty_rate_start(&self, name: &str, seconds: u32) -> Result<()>;

    /// The last measured dirty rate in bytes a second; `None` while it is being measured or was never asked for.
    fn dirty_rate(&self, name: &str) -> Result<Option<u64>>;

    /// Host memory in use for the domain (resident set of its QEMU), in bytes: an upper bound of what a move or a save has to carry.
    fn memory_in_use(&self, name: &str) -> Result<u64>;

    /// The XML that [`Hypervisor::start`] would give to libvirt.
    fn xml_for(&self, spec: &DomainSpec) -> Result<String>;

    /// A new subscription to events: unbounded, ends when the receiver is dropped.
    fn events(&self) -> Receiver<DomainEvent>;
}

/// What fits into a `sockaddr_un`, without the zero byte at its end.
const SOCKET_PATH_MAX: usize = 107;

/// Refuses names and paths that XML or libvirt cannot carry, before anything is built from them.
fn check_spec(spec: &DomainSpec) -> Result<()> {
    let invalid = |what: String| Err(HypervisorError::Invalid { what });
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if spec.name.is_empty() || spec.name.len() > 200 || !spec.name.chars().all(plain) {
        return invalid(format!(
            "domain name {:?} is not made of letters, digits, '-', '_' and '.'",
            spec.name
        ));
    }
    if spec.vcpus == 0 || spec.mem_mib == 0 {
        return invalid(format!("domain {} has no processors or no memory", spec.name));
    }
    let mut paths: Vec<&PathBuf> = vec![&spec.serial_log];
    paths.extend(spec.channels.iter().map(|c| &c.socket));
    for disk in &spec.disks {
        paths.push(&disk.path);
        paths.extend(disk.backing.iter().map(|(p, _)| p));
    }
    if let Boot::Kernel { kernel, initrd, .. } = &spec.boot {
        paths.push(kernel);
        paths.extend(initrd.iter());
    }
    for path in paths {
        if !path.is_absolute() || path.to_str().is_none_or(|p| p.contains(char::is_control)) {
            return invalid(format!("{path:?} is not an absolute path in plain UTF-8"));
        }
    }
    if let Some(channel) = spec.channels.iter().find(|c| c.socket.as_os_str().len() > SOCKET_PATH_MAX) {
        return invalid(format!(
            "{} is too long for a socket ({SOCKET_PATH_MAX} bytes)",
            channel.socket.display()
        ));
    }
    let texts = [&spec.metadata.user, &spec.metadata.spec, &spec.metadata.node];
    let control = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if texts.iter().any(|t| t.contains(control)) || matches!(&spec.boot, Boot::Kernel { cmdline, .. } if cmdline.contains(control)) {
        return invalid(format!(
            "domain {} has control characters in its metadata or kernel command line",
            spec.name
        ));
    }
    Ok(())
}
