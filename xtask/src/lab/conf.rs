//! The files a host of the lab needs in its private /etc. Written at the first boot of a host; a power cycle finds them as they were left.

use super::options::{CTL, Options, Places, USERS, address};
use crate::{Result, error::At, paths, proc};
use nix::unistd::{Gid, Uid, chown};
use std::{fmt::Write, fs, os::unix::fs::MetadataExt, path::Path};

const WRITTEN: &str = "/etc/slurm-vm/.lab";
/// The symbol that makes a shared object a Slurm plugin.
const PLUGIN_MARK: &[u8] = b"plugin_version\0";

/// Writes everything, once per host. Runs in the host's own root.
pub fn write(options: &Options, host: &str) -> Result<()> {
    accounts()?;
    private_directories()?;
    if Path::new(WRITTEN).exists() {
        return Ok(());
    }
    let mut hosts = String::from("127.0.0.1 localhost\n");
    for name in options.hosts() {
        let _ = writeln!(hosts, "{} {name}", address(&name)?);
    }
    paths::file("/etc/hosts", 0o644, hosts)?;
    paths::file("/etc/hostname", 0o644, format!("{host}\n"))?;
    // Without a name server every other source of names means a time-out.
    paths::file(
        "/etc/nsswitch.conf",
        0o644,
        "passwd: files\ngroup: files\nshadow: files\nhosts: files\nservices: files\nprotocols: files\n",
    )?;
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").at("read", "/proc/sys/kernel/random/uuid")?;
    let uuid = uuid.trim();
    paths::file("/etc/machine-id", 0o444, format!("{}\n", uuid.replace('-', "")))?;
    slurm(options)?;
    if host != CTL {
        libvirt(host, uuid)?;
    }
    agent(options, host)?;
    paths::file(WRITTEN, 0o644, "written by the lab\n")
}

/// Adds the lab's users to the accounts the root came with.
fn accounts() -> Result<()> {
    kvm_group()?;
    // Without an entry here `su` refuses them, and with it Slurm's `--export=NONE`.
    let shadow = "/etc/shadow";
    let old = fs::read_to_string(shadow).at("read", shadow)?;
    let missing = USERS.iter().filter(|u| !old.lines().any(|l| l.split(':').next() == Some(u.name)));
    let new = missing.fold(old.clone(), |text, u| format!("{text}{}:*:20000:0:99999:7:::\n", u.name));
    if new != old {
        paths::file(shadow, 0o640, new)?;
    }
    for (path, line) in [("/etc/passwd", true), ("/etc/group", false)] {
        let old = fs::read_to_string(path).at("read", path)?;
        let ours = |entry: &str| {
            let mut fields = entry.split(':');
            let (name, id) = (fields.next().unwrap_or(""), fields.nth(1).and_then(|id| id.parse().ok()));
            USERS.iter().any(|u| u.name == name || Some(u.id) == id)
        };
        let mut text: String = old
            .lines()
            .filter(|entry| !ours(entry))
            .fold(String::new(), |text, entry| text + entry + "\n");
        for user in &USERS {
            let (name, id) = (user.name, user.id);
            let _ = if line {
                writeln!(text, "{name}:x:{id}:{id}::/home/{name}:/bin/bash")
            } else {
                writeln!(text, "{name}:x:{id}:")
            };
        }
        paths::file(path, 0o644, text)?;
    }
    for user in &USERS {
        owned(&format!("/home/{}", user.name), 0o755, user.id, user.id)?;
    }
    Ok(())
}

/// /dev/kvm is the machine's, the groups are the root's. Where the two do not agree on the group `kvm`, libvirt's own check
/// of the device fails after its probe succeeded, and it probes QEMU anew for every question: 25 s for each domain.
fn kvm_group() -> Result<()> {
    let Ok(device) = fs::metadata("/dev/kvm") else { return Ok(()) };
    let path = "/etc/group";
    let old = fs::read_to_string(path).at("read", path)?;
    let new = old.lines().fold(String::new(), |text, entry| {
        let fields: Vec<&str> = entry.split(':').collect();
        match fields.as_slice() {
            ["kvm", secret, _, members] => format!("{text}kvm:{secret}:{}:{members}\n", device.gid()),
            _ => format!("{text}{entry}\n"),
        }
    });
    if new == old { Ok(()) } else { paths::file(path, 0o644, new) }
}

fn private_directories() -> Result<()> {
    let (munge, munge_group) = account("munge")?;
    for (path, mode) in [
        ("/etc/munge", 0o700),
        ("/var/lib/munge", 0o711),
        ("/var/log/munge", 0o755),
        ("/run/munge", 0o755),
    ] {
        owned(path, mode, munge, munge_group)?;
    }
    let key = "/etc/munge/munge.key";
    fs::copy(super::root::MUNGE_KEY, key).at("copy the munge key to", key)?;
    chown(key, Some(Uid::from_raw(munge)), Some(Gid::from_raw(munge_group))).at("give away", key)?;
    for path in [
        "/var/log/slurm",
        "/var/log/slurm-vm",
        "/var/spool/slurmd",
        "/var/spool/slurmctld",
        "/run/slurm-vm",
    ] {
        paths::dir(path, 0o755)?;
    }
    Ok(())
}

fn owned(path: &str, mode: u32, uid: u32, gid: u32) -> Result<()> {
    paths::dir(path, mode)?;
    chown(path, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).at("give away", path)
}

/// Uid and gid of an account, read from the file: this process was linked against another root's C library and its name service modules.
pub fn account(name: &str) -> Result<(u32, u32)> {
    let text = fs::read_to_string("/etc/passwd").at("read", "/etc/passwd")?;
    let entry = text
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.first() == Some(&name));
    entry
        .and_then(|fields| Some((fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?)))
        .ok_or_else(|| {
            format!("there is no account {name}: is its package installed? `cargo xtask setup` installs what the lab needs").into()
        })
}

fn slurm(options: &Options) -> Result<()> {
    let release = proc::run("slurmd", &["-V"])?;
    let (nodes, grace, exempt) = (options.node_names().join(","), options.grace_s, options.exempt_s);
    let exempt = format!("{:02}:{:02}:{:02}", exempt / 3600, exempt / 60 % 60, exempt % 60);
    let address_of_ctl = address(CTL)?;
    let mut text = format!(
        "ClusterName=lab
SlurmctldHost={CTL}({address_of_ctl})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=10
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/var/log/slurm/slurmctld.log
SlurmdLogFile=/var/log/slurm/slurmd.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=256
SlurmdParameters=config_overrides
ReturnToService=2
MailProg=/bin/true
KillWait=5
SlurmdTimeout=60
MessageTimeout=20
JobRequeue=1
PrologFlags=Alloc,DeferBatch
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PreemptExemptTime={exempt}
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=10000,bf_interval=2,bf_max_job_test=1000
"
    );
    for node in options.node_names() {
        let address = address(&node)?;
        let _ = writeln!(
            text,
            "NodeName={node} NodeHostname={node} NodeAddr={address} CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=4096 Feature=vm State=UNKNOWN"
        );
    }
    let _ = writeln!(
        text,
        "PartitionName=low Nodes={nodes} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} MaxTime=INFINITE DefaultTime=60 State=UP
PartitionName=high Nodes={nodes} PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE DefaultTime=60 State=UP"
    );
    text.push_str(&options.slurm_conf);
    paths::file("/etc/slurm/slurm.conf", 0o644, text)?;
    // 22.05 knows no "disabled" and its slurmd does not start with it.
    let cgroup = if release.contains(" 22.05") { "cgroup/v1" } else { "disabled" };
    paths::file("/etc/slurm/cgroup.conf", 0o644, format!("CgroupPlugin={cgroup}\n"))?;
    let plugin = "/usr/libexec/slurm-vm/spank_vm.so";
    // A broken `required` plugin stops slurmd and all submissions: before there is a real one the lab runs without.
    let there = fs::read(plugin).is_ok_and(|bytes| bytes.windows(PLUGIN_MARK.len()).any(|w| w == PLUGIN_MARK));
    let line = if options.plugin && there {
        format!("required {plugin}\n")
    } else {
        String::new()
    };
    paths::file("/etc/slurm/plugstack.conf", 0o644, line)
}

fn libvirt(host: &str, uuid: &str) -> Result<()> {
    // What the host's owner has configured or started there is none of the lab's business.
    for path in ["/etc/libvirt/qemu", "/etc/libvirt/storage", "/etc/libvirt/hooks"] {
        if Path::new(path).exists() {
            fs::remove_dir_all(path).at("empty", path)?;
        }
    }
    paths::dir("/etc/libvirt/qemu", 0o700)?;
    paths::file(
        "/etc/libvirt/libvirtd.conf",
        0o644,
        format!(
            "unix_sock_group = \"libvirt\"\nunix_sock_rw_perms = \"0770\"\nauth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\nhost_uuid = \"{uuid}\"\nlog_outputs = \"2:stderr\"\n"
        ),
    )?;
    // User and group stay the distribution's, so that a missing permission shows here as it would on a real node.
    // libvirt takes /shared for a local disk, which it is, and would call every migration unsafe.
    paths::file(
        "/etc/libvirt/qemu.conf",
        0o600,
        format!(
            "security_driver = \"none\"\ncgroup_controllers = []\nnamespaces = []\nstdio_handler = \"file\"\nmigration_host = \"{host}\"\n\
             shared_filesystems = [ \"/shared\" ]\n"
        ),
    )
}

fn agent(options: &Options, host: &str) -> Result<()> {
    let is_node = host != CTL;
    let shared = if options.shared {
        "shared_dir = \"/shared/slurm-vm\"\n"
    } else {
        ""
    };
    let controller = if is_node { "" } else { "[controller]\nenabled = true\n" };
    let domain_type = &options.domain_type;
    let mut text = format!(
        "cluster = \"lab\"
node_name = \"{host}\"
state_dir = \"/var/lib/slurm-vm\"
{shared}[hypervisor]
uri = \"qemu:///system\"
domain_type = \"{domain_type}\"
memory_limit = false
[peer]
listen = \"0.0.0.0:6822\"
{controller}[node]
enabled = {is_node}
boot_timeout_s = 100
"
    );
    if options.companions {
        text.push_str("[files]\nvirtiofsd = \"/usr/libexec/slurm-vm/virtiofsd\"\nhome = true\nworkdir = true\n[network]\npasst = \"/usr/libexec/slurm-vm/passt\"\n");
    }
    let images = "/var/lib/slurm-vm-images";
    let mut names = String::new();
    let mut found: Vec<String> = fs::read_dir(images)
        .at("read", images)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| Path::new(images).join(name).join("disk.qcow2").exists())
        .collect();
    found.sort();
    for name in found {
        let how = if Path::new(images).join(&name).join("vmlinuz").exists() {
            format!("kernel = \"{images}/{name}/vmlinuz\"\ninitrd = \"{images}/{name}/initrd\"\ncmdline = \"console=ttyS0 quiet\"")
        } else {
            "helper = \"seed\"\nmin_mem_mib = 512".to_owned()
        };
        let _ = writeln!(
            text,
            "[images.{name}]\ndisk = \"{images}/{name}/disk.qcow2\"\ndisk_format = \"qcow2\"\n{how}"
        );
        let _ = writeln!(names, "{name}");
    }
    text.push_str(&options.agent_conf);
    paths::file("/etc/slurm-vm/slurm-vm.toml", 0o644, text)?;
    paths::file("/etc/slurm-vm/images.list", 0o644, names)
}

/// The places that all hosts share, made once per lab by the command line, before the lab's first process.
pub fn shared_places(places: &Places) -> Result<()> {
    paths::dir(places.shared(), 0o755)?;
    paths::dir(places.shared().join("home"), 0o755)?;
    paths::dir(places.shared().join("slurm-vm"), 0o755)?;
    for user in &USERS {
        let home = places.shared().join("home").join(user.name);
        paths::dir(&home, 0o755)?;
        chown(&home, Some(Uid::from_raw(user.id)), Some(Gid::from_raw(user.id))).at("give away", &home)?;
    }
    let mut key = [0u8; 128];
    let random = "/dev/urandom";
    let mut source = fs::File::open(random).at("open", random)?;
    std::io::Read::read_exact(&mut source, &mut key).at("read", random)?;
    paths::file(places.munge_key(), 0o600, key)
}
