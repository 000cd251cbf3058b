//! What a cluster of machines is made of: the options of `machines up`, its places and its addresses.

use crate::{
    Result,
    lab::{CTL, Places},
    paths,
};
use serde::{Deserialize, Serialize};

/// State of running clusters: one directory each, gone with it.
const STATES: &str = "/run/slurm-vm-machines";
/// Disks and consoles of running clusters: one directory each, gone with it.
const DISKS: &str = "/var/tmp/slurm-vm-machines";

/// Which Debian the machines are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum Debian {
    /// Debian 12 with QEMU and libvirt from backports
    #[value(name = "12")]
    V12,
    /// Debian 13 as it is
    #[value(name = "13")]
    V13,
}

impl Debian {
    /// Its code name.
    pub fn suite(self) -> &'static str {
        match self {
            Self::V12 => "bookworm",
            Self::V13 => "trixie",
        }
    }
}

/// The options of `machines up`. Fields not named take the defaults of the command line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Options {
    /// The cluster's name: clusters with different names do not see each other.
    pub name: String,
    /// Compute nodes, called n1, n2, ...
    pub nodes: u8,
    /// Which Debian.
    pub debian: Debian,
    /// Debian as it comes, without Slurm set up: for those who follow docs/install.md.
    pub fresh: bool,
    /// Whether the NFS server takes root on a node for nobody.
    pub root_squash: bool,
    /// GraceTime of the partition `low`, in seconds.
    pub grace_s: u32,
    /// Memory of a compute node, in MiB.
    pub mem_mib: u32,
    /// Processors of a compute node.
    pub cpus: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: "main".into(),
            nodes: 2,
            debian: Debian::V12,
            fresh: false,
            root_squash: false,
            grace_s: 300,
            mem_mib: 2560,
            cpus: 2,
        }
    }
}

impl Options {
    /// Refuses what cannot work, before anything is made.
    pub fn check(&self) -> Result<()> {
        places(&self.name)?;
        if self.nodes == 0 || self.nodes > 9 {
            return Err(format!("a cluster of machines has 1 to 9 nodes, not {}", self.nodes).into());
        }
        if self.mem_mib < 1024 {
            return Err(format!("{} MiB are too few for a machine with QEMU in it", self.mem_mib).into());
        }
        Ok(())
    }

    /// The machines, the controller first.
    pub fn hosts(&self) -> Vec<String> {
        std::iter::once(CTL.to_owned()).chain(self.node_names()).collect()
    }

    /// The compute nodes.
    pub fn node_names(&self) -> Vec<String> {
        (1..=self.nodes).map(|k| format!("n{k}")).collect()
    }
}

/// The places of a cluster.
pub fn places(name: &str) -> Result<Places> {
    Places::below(name, STATES, DISKS)
}

/// Where the disks that machines start from are kept.
pub fn images() -> std::path::PathBuf {
    std::env::var_os("SLURM_VM_MACHINES").map_or_else(|| std::path::Path::new(paths::LAB_CACHE).join("machines"), std::path::PathBuf::from)
}

/// Last part of a machine's address, and of all else that must differ from machine to machine.
pub fn number(host: &str) -> Result<u8> {
    if host == CTL {
        return Ok(1);
    }
    match host.strip_prefix('n').and_then(|k| k.parse::<u8>().ok()) {
        Some(k) if (1..=9).contains(&k) => Ok(10 + k),
        _ => Err(format!("unknown machine {host}: ctl, n1, n2, ...").into()),
    }
}

/// Address of a machine. Every cluster has the same network: they are in namespaces of their own.
pub fn address(host: &str) -> Result<String> {
    Ok(format!("10.77.0.{}", number(host)?))
}

/// The port on the loopback of the cluster's namespace that leads to a machine's SSH daemon.
pub fn door(host: &str) -> Result<u16> {
    Ok(2200 + u16::from(number(host)?))
}
