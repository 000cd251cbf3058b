//! The data that goes in and out of the hypervisor. Plain values, no behaviour; units are in the names.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use uuid::Uuid;

/// Who runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DomainType {
    /// The host's processor (`/dev/kvm`).
    Kvm,
    /// QEMU's own emulation (TCG).
    Qemu,
}

/// The processor that a guest sees. A guest can only move to a host that offers the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CpuModel {
    /// A named model of libvirt (`Nehalem`, `qemu64`): the same on all hosts that can run it.
    Named(String),
    /// The nearest description of this host's processor: moves between equal hosts.
    HostModel,
    /// All that the hypervisor can offer: moves between equal hosts with equal QEMU only.
    Maximum,
    /// What QEMU takes if nothing is said (`qemu64`).
    Default,
}

/// What the guest boots from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Boot {
    /// A kernel file of the host, without a boot loader.
    Kernel {
        /// The kernel. libvirt gives kernel and initramfs to the QEMU user while the domain runs: name copies, or files of a read-only mount.
        kernel: PathBuf,
        /// The initramfs.
        initrd: Option<PathBuf>,
        /// The kernel command line.
        cmdline: String,
    },
    /// The first disk, through the firmware.
    Disk,
}

/// The format of a disk image. Always said, never probed: a guest could write a header of another format into its own disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFormat {
    /// The bytes of the disk.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

/// How the host's page cache is used for a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskCache {
    /// O_DIRECT: the host caches nothing. Safe for moves on any shared storage, and the default.
    #[default]
    None,
    /// The host caches; the guest's flushes are obeyed. For file systems without O_DIRECT (tmpfs before Linux 6.6, some FUSE). QEMU drops the
    /// cache at a move, so libvirt lets it move where both ends see the same bytes.
    Writeback,
}

/// A disk of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The image.
    pub path: PathBuf,
    /// Its format.
    pub format: DiskFormat,
    /// What the image is a copy-on-write layer over: the whole chain, nearest first. The QEMU user must be able to read these as they are; unlike the
    /// image itself they are not given to it.
    pub backing: Vec<(PathBuf, DiskFormat)>,
    /// The name on the virtio bus: `vda`, `vdb`, …
    pub target: String,
    /// Whether the guest may only read it.
    pub readonly: bool,
    /// The serial number that the guest sees (`/dev/disk/by-id/virtio-…`, 20 characters).
    pub serial: Option<String>,
    /// How the host's page cache is used.
    pub cache: DiskCache,
}

/// A virtio-serial port whose other end is a UNIX socket on the host.
///
/// QEMU listens on the socket and takes one client at a time; a stale file is replaced, and the socket is removed when the domain ends. The directory must
/// be there beforehand. libvirt (root) binds the socket and gives it to the QEMU user and group with mode 0775: who connects is root, that user, or a
/// member of that group (`libvirt-qemu` on Debian, `qemu` in the RHEL family). After a migration the socket appears at the destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Channel {
    /// The port's name in the guest (`/dev/virtio-ports/NAME`).
    pub name: String,
    /// The socket's path, at most 107 bytes.
    pub socket: PathBuf,
}

/// What we write into a domain so that we know it again: a reader must cope with missing and unknown attributes of other versions.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DomainMetadata {
    /// The Slurm job.
    pub job: u32,
    /// Which VM of the job.
    pub k: u32,
    /// The job's owner, by name.
    pub user: String,
    /// The job's owner.
    pub uid: u32,
    /// The request that the VM was made from, as JSON.
    pub spec: String,
    /// The Slurm node that owns the VM.
    pub node: String,
    /// The run number of the job on that node.
    pub run: u64,
    /// How often the VM has changed hands.
    pub generation: u64,
}

/// A domain to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainSpec {
    /// Its name: letters, digits, `-`, `_`, `.`.
    pub name: String,
    /// Its identity across hosts.
    pub uuid: Uuid,
    /// Who runs its instructions.
    pub domain_type: DomainType,
    /// The machine type; `None` is `q35`, which libvirt pins to the newest version this QEMU has. Name an older version (`pc-q35-7.2`) where
    /// nodes have different QEMUs.
    pub machine: Option<String>,
    /// Virtual processors.
    pub vcpus: u32,
    /// Host cores: virtual processor k runs on `cpuset[k % len]`, QEMU's other threads on all of them. Empty: no pinning.
    pub cpuset: Vec<u32>,
    /// The guest's memory in MiB.
    pub mem_mib: u64,
    /// What QEMU as a whole may use in MiB. `None` where there are no cgroups.
    pub hard_limit_mib: Option<u64>,
    /// The processor it sees.
    pub cpu: CpuModel,
    /// What it boots from.
    pub boot: Boot,
    /// Its disks, in order.
    pub disks: Vec<Disk>,
    /// Its virtio-serial ports.
    pub channels: Vec<Channel>,
    /// Where its first serial port goes; appended to. libvirt makes it with mode 0600, gives it to the QEMU user, and at the end to root: who wants to
    /// read it later makes the file beforehand and keeps it open (a mode of 0660 is kept, too).
    pub serial_log: PathBuf,
    /// Directories of the host that the guest mounts.
    pub directories: Vec<SharedDirectory>,
    /// Networks of the job's user.
    pub interfaces: Vec<UserInterface>,
    /// Our own notes in it.
    pub metadata: DomainMetadata,
}

/// A directory of the host for a guest, by virtiofs. The process that serves it is not libvirt's: it listens already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedDirectory {
    /// What the guest mounts it by.
    pub tag: String,
    /// Where virtiofsd listens; the same path on every node, for a move does not change it.
    pub socket: PathBuf,
}

/// A network interface whose other end is a process of the job's user (vhost-user). That process listens already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserInterface {
    /// The guest's hardware address.
    pub mac: String,
    /// Where the process listens; the same path on every node.
    pub socket: PathBuf,
}

impl DomainSpec {
    /// Other processes take part in the guest's devices; they read and write its memory.
    #[must_use]
    pub fn has_companions(&self) -> bool {
        !self.directories.is_empty() || !self.interfaces.is_empty()
    }
}

/// Whether a domain runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DomainState {
    /// Its processors run.
    Running,
    /// Its processors stand still.
    Paused,
    /// It is powering off.
    ShuttingDown,
    /// It is off; a transient domain is seen so only for a moment.
    Shutoff,
    /// Its guest has panicked or its QEMU has died.
    Crashed,
    /// A state that libvirt has added since, or has not told.
    Other,
}

/// Why a domain is in its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StateReason {
    /// Running: it was booted.
    Booted,
    /// Running: it came by migration.
    Migrated,
    /// Running: it came from a saved image.
    Restored,
    /// Running: it was resumed.
    Unpaused,
    /// Running: a migration of it failed or was aborted.
    MigrationCanceled,
    /// Running: a save of it failed or was aborted.
    SaveCanceled,
    /// Paused: somebody asked for it.
    User,
    /// Paused: it is coming in, or is at the end of going out; also restored and not yet resumed, which libvirt does not tell apart.
    Migration,
    /// Paused: it is being saved.
    Save,
    /// Paused: a disk gave an error (no space, for instance).
    IoError,
    /// Paused: QEMU is starting.
    StartingUp,
    /// Paused or crashed: the guest's kernel panicked.
    Panicked,
    /// Anything else: libvirt's number for it.
    Other(i32),
}

/// A domain of ours as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainInfo {
    /// Its name.
    pub name: String,
    /// Its identity across hosts.
    pub uuid: Uuid,
    /// Whether it runs.
    pub state: DomainState,
    /// Why.
    pub reason: StateReason,
    /// Our own notes in it.
    pub metadata: DomainMetadata,
    /// Processor time used so far, in nanoseconds.
    pub cpu_time_ns: u64,
    /// The guest's memory in MiB.
    pub mem_mib: u64,
    /// Virtual processors.
    pub vcpus: u32,
}

/// Why a domain has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StopReason {
    /// The guest powered off, or wanted to reboot: QEMU does not tell which.
    Shutdown,
    /// It was destroyed.
    Destroyed,
    /// The guest panicked ([`DomainEvent::Panicked`] came first).
    Crashed,
    /// It has moved away.
    Migrated,
    /// It was saved.
    Saved,
    /// QEMU died, could not be started, or did not arrive.
    Failed,
    /// Anything else.
    Other,
}

/// Something has happened. A hint: look at [`super::Hypervisor::info`] before acting on it.
///
/// Events come for every domain of the host, ours or not, because a domain that is gone cannot be asked whose it was: compare the uuid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DomainEvent {
    /// It exists now: booted, arriving or restored.
    Started {
        /// The domain.
        name: String,
        /// The domain.
        uuid: Uuid,
        /// [`StateReason::Booted`], [`StateReason::Migrated`] or [`StateReason::Restored`].
        reason: StateReason,
    },
    /// Its processors stand still.
    Suspended {
        /// The domain.
        name: String,
        /// The domain.
        uuid: Uuid,
        /// Why.
        reason: StateReason,
    },
    /// Its processors run.
    Resumed {
        /// The domain.
        name: String,
        /// The domain.
        uuid: Uuid,
        /// Why.
        reason: StateReason,
    },
    /// It is gone from this host.
    Stopped {
        /// The domain.
        name: String,
        /// The domain.
        uuid: Uuid,
        /// Why.
        reason: StopReason,
    },
    /// The guest's kernel has panicked; the domain is destroyed next.
    Panicked {
        /// The domain.
        name: String,
        /// The domain.
        uuid: Uuid,
    },
    /// An outgoing migration has begun its next pass over the memory.
    MigrationIteration {
        /// The domain.
        name: String,
        /// The domain.
        uuid: Uuid,
        /// The pass, from 1.
        iteration: u32,
    },
    /// The hypervisor is not reachable: events are being lost.
    ConnectionLost,
    /// It is reachable again: list the domains.
    ConnectionBack,
}

/// How a domain is moved. Always peer to peer and live, never post-copy (a failure would lose the guest), never made persistent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MigrateParams {
    /// The destination's libvirt as the source's libvirtd reaches it: `qemu+unix:///system?socket=/…`.
    pub libvirt_uri: String,
    /// Where the memory goes: `unix:///…/mig.sock`. Both ends use this path, each on its own host.
    pub migrate_uri: String,
    /// Where copied disks go: `unix:///…/nbd.sock`. Needed with `copy_disks` over UNIX sockets.
    pub disks_uri: Option<String>,
    /// Targets (`vda`) whose top layer is copied along; their backing files must be at the destination already. Empty: all storage is shared.
    pub copy_disks: Vec<String>,
    /// The XML to start from at the destination, if paths or pinning differ there: made from [`super::Hypervisor::live_xml`].
    pub dest_xml: Option<String>,
    /// At most so much, in MiB a second.
    pub bandwidth_mib_s: Option<u64>,
    /// The guest may stand still for so long at the end, in milliseconds. QEMU's own default is 300.
    pub max_downtime_ms: Option<u64>,
    /// Slow the guest down if it writes faster than the line carries.
    pub auto_converge: bool,
    /// That many parallel streams. More than one does not go through one UNIX socket relay that accepts once.
    pub parallel_connections: Option<u32>,
    /// Leave it paused at the destination.
    pub paused: bool,
}

/// What a completed migration took, by libvirt's own account. Zero where it did not say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MigrateOutcome {
    /// From the call to its return, measured here.
    pub wall_ms: u64,
    /// The migration by libvirt's clock.
    pub total_ms: u64,
    /// What QEMU says the guest stood still; the guest feels more.
    pub downtime_ms: u64,
    /// Memory sent.
    pub memory_bytes: u64,
    /// Disk contents sent.
    pub disk_bytes: u64,
    /// Passes over the memory.
    pub iterations: u32,
}

/// How far a running migration or save is. Zero where libvirt does not say (yet).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct JobProgress {
    /// Since it began.
    pub elapsed_ms: u64,
    /// Memory and disks sent so far.
    pub bytes_done: u64,
    /// Memory and disks that are left in this pass.
    pub bytes_left: u64,
    /// The guest's memory in all.
    pub memory_total_bytes: u64,
    /// How fast memory is sent.
    pub bandwidth_bytes_s: u64,
    /// How fast the guest writes.
    pub dirty_rate_bytes_s: u64,
    /// The current pass over the memory.
    pub iteration: u32,
    /// Disk contents sent so far.
    pub disk_bytes_done: u64,
    /// Disk contents that are left.
    pub disk_bytes_left: u64,
    /// How much the guest is slowed down by auto-converge, in percent.
    pub throttle_percent: u32,
}

/// How memory is laid out in a saved image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SaveFormat {
    /// One stream. Every libvirt.
    Raw,
    /// Each page at its own offset, holes for what was never touched: restores several times faster. libvirt 11.2 with QEMU 9.0.
    #[default]
    Sparse,
}

/// What a saved image holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedDomain {
    /// The domain's name; a restore keeps it.
    pub name: String,
    /// The domain's identity; a restore keeps it.
    pub uuid: Uuid,
    /// Our own notes.
    pub metadata: DomainMetadata,
    /// The whole XML, to be changed and given to [`super::Hypervisor::restore`].
    pub xml: String,
}

/// A host as the hypervisor sees it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostInfo {
    /// libvirt's version, as `11.3.0`.
    pub libvirt_version: String,
    /// The hypervisor's version (QEMU), as `10.0.2`.
    pub hypervisor_version: String,
    /// The host name that libvirt uses.
    pub hostname: String,
    /// Named processor models that this host can run for the domain type, without caveats.
    pub cpu_models: Vec<String>,
    /// What `host-model` is here: the `<cpu>` element, for a baseline over several hosts. Empty where there is none.
    pub host_model_xml: String,
    /// Whether libvirt here knows [`SaveFormat::Sparse`]; QEMU may still refuse, then raw is written.
    pub sparse_save: bool,
    /// Whether [`DomainSpec::hard_limit_mib`] can work: whether the memory controller is there for libvirt. Known only from a domain that
    /// runs: `None` until one of ours was seen.
    pub hard_limit: Option<bool>,
    /// What libvirt confines QEMU with: `apparmor`, `selinux`, or `none`.
    pub security_model: String,
}
