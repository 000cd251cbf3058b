//! The agent's configuration, `/etc/slurm-vm/slurm-vm.toml`: one documented structure; unknown keys are refused.
//!
//! The shipped sample `packaging/slurm-vm.toml` lists every key with its default, and a test holds the two together.
use std::{collections::BTreeMap, fs, path::PathBuf};

use serde::Deserialize;
use slurm_vm_api::spec::Network;
use thiserror::Error;

/// Where the configuration is looked for when `--config` is not given.
pub const DEFAULT_PATH: &str = "/etc/slurm-vm/slurm-vm.toml";

/// What went wrong with the configuration.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not what is documented.
    #[error("{path}: {text}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// toml's own message: line, column, the unknown key and the known ones.
        text: String,
    },
    /// A value cannot be used.
    #[error("{path}: {key}: {text}")]
    Value {
        /// The file.
        path: PathBuf,
        /// Key, dotted.
        key: String,
        /// What is wrong and what is allowed.
        text: String,
    },
}

/// The whole configuration of a `slurm-vmd`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Slurm's ClusterName; part of every domain's uuid.
    #[serde(default = "default_cluster")]
    pub cluster: String,
    /// This host's NodeName in slurm.conf; the host name when absent.
    #[serde(default)]
    pub node_name: Option<String>,
    /// Where shim, plugin and `svm` find the agent.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// Node-local state: ledger, overlays, logs. Kept over restarts.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// Shared by all nodes, when there is such storage: overlays and saved VMs live there.
    #[serde(default)]
    pub shared_dir: Option<PathBuf>,
    /// Where sockets and per-VM run-time files live; gone after a reboot.
    #[serde(default = "default_run_dir")]
    pub run_dir: PathBuf,
    /// slurm.conf for Slurm's commands, when not the default one.
    #[serde(default)]
    pub slurm_conf: Option<PathBuf>,
    /// libvirt and QEMU.
    #[serde(default)]
    pub hypervisor: HypervisorConfig,
    /// Node-to-node channel.
    #[serde(default)]
    pub peer: PeerConfig,
    /// Node role.
    #[serde(default)]
    pub node: NodeConfig,
    /// Controller role; absent on compute nodes.
    #[serde(default)]
    pub controller: ControllerConfig,
    /// Directories of the host in guests.
    #[serde(default)]
    pub files: FilesConfig,
    /// The guests' network.
    #[serde(default)]
    pub network: NetworkConfig,
    /// The catalogue, by name.
    #[serde(default)]
    pub images: BTreeMap<String, ImageConfig>,
}

/// `[hypervisor]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HypervisorConfig {
    /// libvirt's connection URI; `test:///default` serves tests.
    pub uri: String,
    /// `auto` (KVM once a probe guest has really booted with it, else emulation), `kvm` or `qemu`.
    pub domain_type: DomainTypeChoice,
    /// CPU model that all nodes of a partition can give; empty chooses QEMU's own baseline, which moves anywhere.
    pub cpu_model: String,
    /// Seconds that the probe guest gets to come up.
    pub probe_timeout_s: u32,
    /// Hold each QEMU to its job's allocation (libvirt's hard limit). `false` where libvirt has no cgroups.
    pub memory_limit: bool,
}

/// How the domain type is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DomainTypeChoice {
    /// Probe.
    Auto,
    /// Hardware virtualization, unconditionally.
    Kvm,
    /// Emulation (TCG), unconditionally.
    Qemu,
}

/// `[peer]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PeerConfig {
    /// Address and port to listen on.
    pub listen: String,
    /// Port on which the other nodes' agents listen.
    pub port: u16,
    /// `false` lets the bulk of a migration go unencrypted on fabrics that are trusted; authentication stays.
    pub encrypt_migration: bool,
    /// User that QEMU runs as; owns the directory of a move's sockets.
    pub qemu_user: String,
}

/// `[node]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NodeConfig {
    /// Run the node role.
    pub enabled: bool,
    /// Seconds a guest gets to come up when the user names none.
    pub boot_timeout_s: u32,
    /// Seconds a moved VM waits for its job to start on the node before it is saved or stopped.
    pub await_job_s: u32,
    /// Moves that may leave at the same time.
    pub moves_out: u32,
    /// Moves that may arrive at the same time.
    pub moves_in: u32,
    /// Megabytes of output kept per stream while no shim is attached.
    pub spool_mib: u32,
    /// Highest bandwidth of a move in MiB/s; 0 is no limit.
    pub move_bandwidth_mib_s: u64,
    /// Milliseconds the guest may stand still at the end of a live move, at most; a move begins with 50. 0: QEMU's own.
    pub move_downtime_ms: u64,
    /// Days for which records and logs of ended VMs are kept.
    pub keep_days: u32,
    /// The helper that is brought into images with `helper = "seed"`.
    pub guest_helper: PathBuf,
}

/// `[controller]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ControllerConfig {
    /// Run the controller role: once per cluster, on the slurmctld host.
    pub enabled: bool,
    /// Milliseconds between two polls of Slurm and of the nodes.
    pub poll_ms: u64,
    /// Feature that marks VM nodes in slurm.conf.
    pub feature: String,
    /// How often a job that met a broken node is tried on another one.
    pub attempts: u32,
    /// Ways of preemption, first that fits wins, when the user names none.
    pub preempt: Vec<String>,
}

/// `[files]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FilesConfig {
    /// The program that serves a directory to a guest; VMs with directories move live from virtiofsd 1.11 on.
    pub virtiofsd: PathBuf,
    /// Every job finds its user's home in the guest.
    pub home: bool,
    /// Every job finds its working directory in the guest.
    pub workdir: bool,
    /// What users name must be below one of these; empty: whatever the user can enter.
    pub allow: Vec<PathBuf>,
}

/// `[network]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetworkConfig {
    /// The program that is the other end of a guest's network; it must know `--vhost-user`.
    pub passt: PathBuf,
    /// What a VM gets if its user has not said (`--vm-net`): `none` or `user`.
    pub default: Network,
}

/// `[images.NAME]`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageConfig {
    /// Kernel for a direct boot.
    #[serde(default)]
    pub kernel: Option<PathBuf>,
    /// Its initramfs.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// Its command line.
    #[serde(default)]
    pub cmdline: String,
    /// Base disk, read-only: every VM gets an overlay over it.
    #[serde(default)]
    pub disk: Option<PathBuf>,
    /// Format of the base disk, never probed: `qcow2` or `raw`.
    #[serde(default = "default_format")]
    pub disk_format: String,
    /// SHA-256 of the base disk in hex; when given, a file that differs is refused.
    #[serde(default)]
    pub sha256: Option<String>,
    /// How the guest helper gets into the guest.
    #[serde(default)]
    pub helper: HelperBy,
    /// Smallest guest memory in MiB that the image boots with.
    #[serde(default = "default_min_mem")]
    pub min_mem_mib: u64,
}

/// How the guest helper gets into a guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HelperBy {
    /// The image has it, and starts it.
    #[default]
    Image,
    /// cloud-init finds it on a disk of ours (NoCloud): for images as distributions publish them.
    Seed,
}

fn default_cluster() -> String {
    "cluster".into()
}
fn default_socket() -> PathBuf {
    "/run/slurm-vm/agent.sock".into()
}
fn default_state_dir() -> PathBuf {
    "/var/lib/slurm-vm".into()
}
fn default_run_dir() -> PathBuf {
    "/run/slurm-vm".into()
}
fn default_format() -> String {
    "qcow2".into()
}
fn default_min_mem() -> u64 {
    64
}

impl Default for HypervisorConfig {
    fn default() -> Self {
        Self {
            uri: "qemu:///system".into(),
            domain_type: DomainTypeChoice::Auto,
            cpu_model: String::new(),
            probe_timeout_s: 60,
            memory_limit: true,
        }
    }
}

impl Default for PeerConfig {
    fn default() -> Self {
        Self {
            listen: "0.0.0.0:6822".into(),
            port: 6822,
            encrypt_migration: true,
            qemu_user: "libvirt-qemu".into(),
        }
    }
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            boot_timeout_s: 120,
            await_job_s: 300,
            moves_out: 2,
            moves_in: 2,
            spool_mib: 64,
            move_bandwidth_mib_s: 0,
            move_downtime_ms: 300,
            keep_days: 7,
            guest_helper: "/usr/libexec/slurm-vm/slurm-vm-guest".into(),
        }
    }
}

impl Default for FilesConfig {
    fn default() -> Self {
        Self {
            virtiofsd: "/usr/libexec/virtiofsd".into(),
            home: false,
            workdir: false,
            allow: vec![],
        }
    }
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            passt: "/usr/bin/passt".into(),
            default: Network::None,
        }
    }
}

impl Default for ControllerConfig {
    fn default() -> Self {
        Self {
            enabled: false,
            poll_ms: 1000,
            feature: "vm".into(),
            attempts: 3,
            preempt: vec!["live".into(), "save".into(), "requeue".into()],
        }
    }
}

impl Config {
    /// Reads and checks a configuration file.
    ///
    /// # Errors
    /// [`ConfigError`], which names the file, the key and what is allowed.
    pub fn load(path: &std::path::Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
        Self::parse(&text, path)
    }

    /// Checks a configuration text; `path` is for messages only.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, path: &std::path::Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|e| ConfigError::Parse {
            path: path.into(),
            text: e.to_string().trim_end().to_owned(),
        })?;
        let value = |key: &str, text: String| ConfigError::Value {
            path: path.into(),
            key: key.into(),
            text,
        };
        for (name, image) in &config.images {
            let key = |k: &str| format!("images.{name}.{k}");
            if !["qcow2", "raw"].contains(&image.disk_format.as_str()) {
                return Err(value(
                    &key("disk_format"),
                    format!("`{}` is not known; qcow2 and raw are", image.disk_format),
                ));
            }
            if image.kernel.is_none() && image.disk.is_none() {
                return Err(value(&key("kernel"), "an image needs a kernel, a disk or both".into()));
            }
            if image
                .sha256
                .as_ref()
                .is_some_and(|s| s.len() != 64 || !s.bytes().all(|b| b.is_ascii_hexdigit()))
            {
                return Err(value(&key("sha256"), "64 hexadecimal digits are needed".into()));
            }
        }
        if let Some(dir) = config.files.allow.iter().find(|dir| !dir.is_absolute()) {
            return Err(value("files.allow", format!("`{}` is not an absolute path", dir.display())));
        }
        if config.controller.poll_ms < 100 {
            return Err(value("controller.poll_ms", "at least 100 milliseconds".into()));
        }
        Ok(config)
    }

    /// Name of this node: the configured one, else the host name up to its first dot.
    #[must_use]
    pub fn node(&self) -> String {
        self.node_name.clone().unwrap_or_else(|| {
            let name = nix::unistd::gethostname()
                .map(|n| n.to_string_lossy().into_owned())
                .unwrap_or_default();
            name.split('.').next().unwrap_or_default().to_owned()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn an_empty_file_gives_the_defaults() {
        let c = Config::parse("", Path::new("x.toml")).unwrap();
        assert_eq!(c.peer.port, 6822);
        assert!(c.node.enabled && !c.controller.enabled);
    }

    #[test]
    fn an_unknown_key_is_refused_and_the_known_ones_are_listed() {
        let e = Config::parse("[node]\nboot_timout_s = 3\n", Path::new("x.toml"))
            .unwrap_err()
            .to_string();
        assert!(
            e.contains("boot_timout_s") && e.contains("boot_timeout_s") && e.contains("x.toml"),
            "{e}"
        );
    }

    #[test]
    fn an_image_with_an_unknown_format_is_refused() {
        let e = Config::parse("[images.a]\ndisk='/d'\ndisk_format='vmdk'\n", Path::new("x.toml"))
            .unwrap_err()
            .to_string();
        assert!(e.contains("images.a.disk_format") && e.contains("qcow2"), "{e}");
    }
}
