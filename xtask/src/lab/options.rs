//! What a lab is made of: the options of `lab up`, kept in its state directory.

use crate::{Result, paths};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Which Slurm a lab runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Slurm {
    /// The host's own packages.
    Native,
    /// Debian 12's.
    V2205,
    /// Debian 13's.
    V2411,
    /// Debian sid's.
    V2605,
}

impl std::str::FromStr for Slurm {
    type Err = String;
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "native" => Ok(Self::Native),
            "22.05" => Ok(Self::V2205),
            "24.11" => Ok(Self::V2411),
            "26.05" => Ok(Self::V2605),
            other => Err(format!("unknown Slurm {other}: native, 22.05, 24.11 or 26.05")),
        }
    }
}

impl std::fmt::Display for Slurm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::V2205 => "22.05",
            Self::V2411 => "24.11",
            Self::V2605 => "26.05",
        })
    }
}

/// The options of `lab up`. Fields not named take the defaults of the command line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// The lab's name: labs with different names do not see each other.
    pub name: String,
    /// Compute nodes, called n1, n2, ...
    pub nodes: u8,
    /// GraceTime of the partition `low`, in seconds.
    pub grace_s: u32,
    /// PreemptExemptTime, in seconds.
    pub exempt_s: u32,
    /// Whether the agents are told of storage shared by all nodes.
    pub shared: bool,
    /// Which Slurm runs.
    pub slurm: Slurm,
    /// Whether Slurm loads the plugin.
    pub plugin: bool,
    /// What the agents take as domain type: `qemu`, `kvm` or `auto`.
    pub domain_type: String,
    /// Size of each node's file system for VM state, in MiB.
    pub vm_disk_mib: u32,
    /// Whether the programs under test are built in the release profile, as a site has them.
    #[serde(default)]
    pub release: bool,
    /// Whether guests find the user's home and the job's working directory, and may have a network: virtiofsd and passt are there, and
    /// /home is the same on all hosts.
    #[serde(default)]
    pub companions: bool,
    /// Images of distributions beside `tiny`: `debian12`, `debian13`.
    #[serde(default)]
    pub images: Vec<String>,
    /// Lines added to the end of slurm.conf.
    #[serde(default)]
    pub slurm_conf: String,
    /// Tables added to the end of slurm-vm.toml on every host; TOML does not let them be those that the lab writes.
    #[serde(default)]
    pub agent_conf: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: "main".into(),
            nodes: 2,
            grace_s: 60,
            exempt_s: 0,
            shared: true,
            slurm: Slurm::Native,
            plugin: true,
            domain_type: "qemu".into(),
            vm_disk_mib: 3072,
            release: false,
            companions: false,
            images: Vec::new(),
            slurm_conf: String::new(),
            agent_conf: String::new(),
        }
    }
}

impl Options {
    /// The defaults, under a name.
    pub fn named(name: &str) -> Self {
        Self {
            name: name.into(),
            ..Self::default()
        }
    }

    /// Refuses what cannot work, before anything is made.
    pub fn check(&self) -> Result<()> {
        check_name(&self.name)?;
        if self.nodes == 0 || self.nodes > 100 {
            return Err(format!("a lab has 1 to 100 nodes, not {}", self.nodes).into());
        }
        if !matches!(self.domain_type.as_str(), "qemu" | "kvm" | "auto") {
            return Err(format!("unknown domain type {}: qemu, kvm or auto", self.domain_type).into());
        }
        Ok(())
    }

    /// The hosts of the lab, the controller first.
    pub fn hosts(&self) -> Vec<String> {
        std::iter::once(CTL.to_owned()).chain(self.node_names()).collect()
    }

    /// The compute nodes.
    pub fn node_names(&self) -> Vec<String> {
        (1..=self.nodes).map(|k| format!("n{k}")).collect()
    }
}

/// Name of the controller host.
pub const CTL: &str = "ctl";

/// A lab's name becomes part of paths and of nothing else.
pub fn check_name(name: &str) -> Result<()> {
    let fine = !name.is_empty() && name.len() <= 32 && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if fine {
        Ok(())
    } else {
        Err(format!("`{name}` is no name for a lab: up to 32 letters, digits, - and _").into())
    }
}

/// Address of a host on the lab's network. Every lab has the same network: they are in namespaces of their own.
pub fn address(host: &str) -> Result<String> {
    if host == CTL {
        return Ok("10.77.0.1".into());
    }
    match host.strip_prefix('n').and_then(|k| k.parse::<u8>().ok()) {
        Some(k) if (1..=100).contains(&k) => Ok(format!("10.77.0.{}", 10 + u16::from(k))),
        _ => Err(format!("unknown host {host}: ctl, n1, n2, ...").into()),
    }
}

/// The places of one lab, or of one cluster of machines, on the host.
#[derive(Debug, Clone)]
pub struct Places {
    name: String,
    states: &'static str,
    disks: &'static str,
}

impl Places {
    /// Those of the lab with this name.
    pub fn of(name: &str) -> Result<Self> {
        Self::below(name, paths::LAB_STATE, paths::LAB_DISKS)
    }
    /// The same below other directories than the labs'.
    pub(crate) fn below(name: &str, states: &'static str, disks: &'static str) -> Result<Self> {
        check_name(name)?;
        let name = name.into();
        Ok(Self { name, states, disks })
    }
    /// The directory of the states of all of its kind.
    pub(crate) fn states(&self) -> &'static str {
        self.states
    }
    /// The directory of the disks of all of its kind.
    pub(crate) fn disks(&self) -> &'static str {
        self.disks
    }
    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }
    /// Control sockets, status and options.
    pub fn state(&self) -> PathBuf {
        PathBuf::from(self.states).join(&self.name)
    }
    /// Logs, disks, staged programs, shared directory.
    pub fn disk(&self) -> PathBuf {
        PathBuf::from(self.disks).join(&self.name)
    }
    /// What names the lab's first process.
    pub fn status(&self) -> PathBuf {
        self.state().join("status.json")
    }
    /// The options it was started with.
    pub fn options(&self) -> PathBuf {
        self.state().join("options.json")
    }
    /// Where the supervisor listens.
    pub fn control(&self) -> PathBuf {
        self.state().join("control.sock")
    }
    /// Where the init of a host listens.
    pub fn host_socket(&self, host: &str) -> PathBuf {
        self.state().join(format!("{host}.sock"))
    }
    /// Directory whose entries are the cuts, as `n1--n2`.
    pub fn cuts(&self) -> PathBuf {
        self.state().join("cuts")
    }
    /// Mount point of the memory file system with the hosts' own files; only the lab sees what is mounted there.
    pub fn ram(&self) -> PathBuf {
        self.state().join("ram")
    }
    /// Logs of a host.
    pub fn logs(&self, host: &str) -> PathBuf {
        self.disk().join("logs").join(host)
    }
    /// Programs under test.
    pub fn stage(&self) -> PathBuf {
        self.disk().join("stage")
    }
    /// VM images.
    pub fn images(&self) -> PathBuf {
        self.disk().join("images")
    }
    /// The directory that all hosts share.
    pub fn shared(&self) -> PathBuf {
        self.disk().join("shared")
    }
    /// A key for munge, the same on all hosts.
    pub fn munge_key(&self) -> PathBuf {
        self.disk().join("munge.key")
    }
}

/// A person with an account on every host.
#[derive(Debug)]
pub struct User {
    /// Login name.
    pub name: &'static str,
    /// User and group id.
    pub id: u32,
}

/// The lab's users.
pub const USERS: [User; 2] = [User { name: "alice", id: 2001 }, User { name: "bob", id: 2002 }];
