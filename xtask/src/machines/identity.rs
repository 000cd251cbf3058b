//! What makes one machine differ from the others, and what a site has set up before slurm-vm comes: names, addresses, keys, Slurm, NFS
//! (of a fresh machine: its name, its address, and root's key). It is a tar file on the machine's second disk, unpacked before systemd starts
//! for the first time. Nothing of slurm-vm is in it.

use super::options::{Options, address, number};
use crate::{
    Result,
    error::At,
    lab::{CTL, Places, USERS},
    paths, proc,
};
use std::{
    fmt::Write,
    fs,
    path::{Path, PathBuf},
};

/// Slurm's and NFS's units that a machine does not run, by its part in the cluster.
const NOT_ON_CTL: &str = "slurmd.service libvirtd.service libvirtd.socket libvirtd-ro.socket libvirtd-admin.socket";
const NOT_ON_NODES: &str = "slurmctld.service nfs-server.service";

/// Writes a machine's tar file.
pub fn write(options: &Options, places: &Places, host: &str) -> Result<PathBuf> {
    let tree = places.disk().join("identity").join(host);
    let etc = tree.join("etc");
    paths::file(etc.join("hostname"), 0o644, format!("{host}\n"))?;
    let mut hosts = String::from("127.0.0.1 localhost\n");
    if options.fresh {
        // As Debian's installer leaves it.
        let _ = writeln!(hosts, "127.0.1.1 {host}");
    }
    for name in options.hosts().iter().filter(|_| !options.fresh) {
        let _ = writeln!(hosts, "{} {name}", address(name)?);
    }
    paths::file(etc.join("hosts"), 0o644, hosts)?;
    network(&etc, host)?;
    if !options.fresh {
        slurm(options, &etc)?;
        files(options, &etc, host)?;
        let key = fs::read(places.munge_key()).at("read", places.munge_key())?;
        paths::file(etc.join("munge/munge.key"), 0o400, key)?;
    }
    let key = fs::read(key_file(places).with_extension("pub")).at("read", key_file(places))?;
    paths::dir(tree.join("root"), 0o700)?;
    paths::dir(tree.join("root/.ssh"), 0o700)?;
    paths::file(tree.join("root/.ssh/authorized_keys"), 0o600, key)?;
    if host == CTL {
        // An administrator gets from there to the nodes.
        let key = fs::read(key_file(places)).at("read", key_file(places))?;
        paths::file(tree.join("root/.ssh/id_ed25519"), 0o600, key)?;
    }
    let first_boot = if options.fresh { fresh_boot(host) } else { first_boot(host) };
    paths::file(etc.join("machine/first-boot"), 0o755, first_boot)?;
    let tar = places.disk().join(format!("{host}.tar"));
    let (tar_text, tree_text) = (tar.to_string_lossy(), tree.to_string_lossy());
    proc::run(
        "tar",
        &[
            "-c",
            "-f",
            &tar_text,
            "-C",
            &tree_text,
            "--owner=0",
            "--group=0",
            "--numeric-owner",
            ".",
        ],
    )?;
    Ok(tar)
}

/// The private key of root's door into the machines.
pub fn key_file(places: &Places) -> PathBuf {
    places.state().join("key")
}

/// Makes the keys of a cluster.
pub fn keys(places: &Places) -> Result<()> {
    let key = key_file(places);
    proc::run(
        "ssh-keygen",
        &["-q", "-t", "ed25519", "-N", "", "-C", "machines", "-f", &key.to_string_lossy()],
    )?;
    let mut key = [0u8; 128];
    let random = "/dev/urandom";
    let mut source = fs::File::open(random).at("open", random)?;
    std::io::Read::read_exact(&mut source, &mut key).at("read", random)?;
    paths::file(places.munge_key(), 0o600, key)
}

/// Hardware address of a machine's card on the cluster's network.
pub fn mac(host: &str) -> Result<String> {
    Ok(format!("52:54:00:78:00:{:02x}", number(host)?))
}

/// The same of the card that leads to this machine only.
pub fn door_mac(host: &str) -> Result<String> {
    Ok(format!("52:54:00:78:01:{:02x}", number(host)?))
}

fn network(etc: &Path, host: &str) -> Result<()> {
    let lan = format!(
        "[Match]\nMACAddress={}\n[Network]\nAddress={}/24\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n",
        mac(host)?,
        address(host)?
    );
    paths::file(etc.join("systemd/network/lan.network"), 0o644, lan)?;
    let door = format!(
        "[Match]\nMACAddress={}\n[Link]\nRequiredForOnline=no\n[Network]\nAddress=10.0.2.15/24\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n",
        door_mac(host)?
    );
    paths::file(etc.join("systemd/network/door.network"), 0o644, door)
}

fn slurm(options: &Options, etc: &Path) -> Result<()> {
    let (nodes, grace) = (options.node_names().join(","), options.grace_s);
    // A node keeps some of its memory for itself, and of several processors all but one: two guests of one emulated machine in guest mode at
    // once reset each other within minutes, one never does (docs/machines.md).
    let (cpus, memory) = (options.cpus, options.mem_mib - 600);
    let mut text = format!(
        "ClusterName=example
SlurmctldHost={CTL}({})
SlurmUser=slurm
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation=/var/lib/slurm/slurmctld
SlurmdSpoolDir=/var/lib/slurm/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
ProctrackType=proctrack/cgroup
TaskPlugin=task/cgroup,task/affinity
JobAcctGatherType=jobacct_gather/cgroup
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=512
ReturnToService=2
MailProg=/bin/true
SlurmdTimeout=60
MessageTimeout=60
JobRequeue=1
PrologFlags=Alloc,DeferBatch
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5
",
        address(CTL)?
    );
    for node in options.node_names() {
        let address = address(&node)?;
        let _ = writeln!(
            text,
            "NodeName={node} NodeAddr={address} CPUs={cpus} CoreSpecCount={} RealMemory={memory} Feature=vm State=UNKNOWN",
            cpus.saturating_sub(1)
        );
    }
    let _ = writeln!(
        text,
        "PartitionName=low Nodes={nodes} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} MaxTime=INFINITE DefaultTime=60 State=UP
PartitionName=high Nodes={nodes} PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE DefaultTime=60 State=UP"
    );
    paths::file(etc.join("slurm/slurm.conf"), 0o644, text)?;
    paths::file(
        etc.join("slurm/cgroup.conf"),
        0o644,
        "CgroupPlugin=cgroup/v2\nConstrainCores=yes\nConstrainRAMSpace=yes\n",
    )
}

/// `/home` and `/shared` are the controller's; the nodes have them by NFS.
fn files(options: &Options, etc: &Path, host: &str) -> Result<()> {
    if host == CTL {
        let squash = if options.root_squash { "root_squash" } else { "no_root_squash" };
        let exports =
            format!("/home 10.77.0.0/24(rw,sync,no_subtree_check,root_squash)\n/shared 10.77.0.0/24(rw,sync,no_subtree_check,{squash})\n");
        return paths::file(etc.join("exports"), 0o644, exports);
    }
    let table = "/dev/vda / ext4 errors=remount-ro 0 1
ctl:/home /home nfs4 hard,_netdev 0 0
ctl:/shared /shared nfs4 hard,_netdev 0 0
";
    paths::file(etc.join("fstab"), 0o644, table)
}

/// All machines have all packages; a unit that has nothing to do on one is off, as if its package were not there.
fn fresh_boot(host: &str) -> String {
    let off = if host == CTL { NOT_ON_CTL } else { NOT_ON_NODES };
    format!("systemctl disable {off}\nmungekey --force --create\nchown munge:munge /etc/munge/munge.key\n")
}

fn first_boot(host: &str) -> String {
    let (off, home) = if host == CTL {
        (NOT_ON_CTL, "--create-home")
    } else {
        (NOT_ON_NODES, "--no-create-home")
    };
    let users = USERS.iter().fold(String::new(), |text, u| {
        format!("{text}useradd {home} --uid {} --user-group --shell /bin/bash {}\n", u.id, u.name)
    });
    format!(
        "systemctl disable {off}
chown munge:munge /etc/munge /etc/munge/munge.key
for dir in /var/lib/slurm/slurmctld /var/log/slurm; do mkdir -p $dir; chown slurm:slurm $dir; done
mkdir -p /var/lib/slurm/slurmd /shared
{users}"
    )
}
