//! A cluster of real machines under emulation: each a whole Debian with its own kernel, systemd, AppArmor, control groups and NFS, and with a
//! /dev/kvm that works, for QEMU's emulation includes AMD's SVM.
//!
//! ```text
//! machine
//!  └ xtask machines-init       PID 1 of the cluster's own pid, mount, net, uts and ipc namespaces; holds bridge br0
//!     ├ QEMU ctl               10.77.0.1   slurmctld, NFS server; the login host
//!     ├ QEMU n1                10.77.0.11  slurmd, libvirtd; guests run in QEMU with KVM in there
//!     └ QEMU n2                10.77.0.12  ...
//! ```
//!
//! [`Machines`] is what tests use; the command line is made of the same functions. `docs/machines.md` has the commands.

mod cli;
mod door;
mod guide;
mod identity;
mod image;
mod options;
mod scenarios;
mod supervisor;

pub use cli::{MachinesCommand, run};
pub use options::{Debian, Options, address};
pub use scenarios::run as run_scenarios;
pub use supervisor::{inner as supervisor_inner, outer as supervisor_outer};

use crate::{
    Result,
    error::At,
    lab::{
        CTL, Places, StatusLine, Was, need_root, state, tail,
        wire::{Request, ask},
    },
    paths, proc,
};
use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

/// How long a cluster may take until slurmctld calls all nodes idle.
const UP_DEADLINE: Duration = Duration::from_secs(900);
/// A hardware address that nobody has.
const NOBODY: &str = "02:00:00:00:00:01";

/// A running cluster of machines.
#[derive(Debug, Clone)]
pub struct Machines {
    places: Places,
    options: Options,
}

/// Brings a cluster up: makes the disk if there is none, starts what does not run, waits until Slurm calls all nodes idle.
pub fn up(options: &Options) -> Result<Was> {
    options.check()?;
    need_root()?;
    let places = options::places(&options.name)?;
    let lock = state::lock(&places)?;
    if state::alive(&places).is_some() {
        let running: Options = state::read_options(&places)?;
        if running != *options {
            let name = &options.name;
            return Err(format!("machines {name} are up with other options: `cargo xtask machines down --name {name}` first").into());
        }
        return repair(&places, options);
    }
    // What a killed cluster or a reboot has left is of no use to a new one.
    state::remove(&places)?;
    let result = image::make(options.debian).and_then(|image| start(&places, options, &image));
    if result.is_err() && std::env::var_os("SLURM_VM_LAB_KEEP").is_none() {
        state::remove(&places)?;
        state::forget(&places, lock);
    }
    result.map(|()| Was::Started)
}

fn start(places: &Places, options: &Options, image: &image::Image) -> Result<()> {
    state::make_directories(places)?;
    state::write_options(places, options)?;
    identity::keys(places)?;
    let disk = places.disk();
    for (from, to) in [(&image.disk, "base.qcow2"), (&image.kernel, "vmlinuz"), (&image.initrd, "initrd")] {
        // A link, where it is the same file system: the disk may be made anew while the cluster runs.
        let to = disk.join(to);
        if fs::hard_link(from, &to).is_err() {
            fs::copy(from, &to).at("copy", from)?;
        }
    }
    let base = disk.join("base.qcow2");
    for host in options.hosts() {
        paths::dir(places.logs(&host), 0o755)?;
        identity::write(options, places, &host)?;
        let overlay = disk.join(format!("{host}.qcow2"));
        proc::run(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-F",
                "qcow2",
                "-b",
                &base.to_string_lossy(),
                &overlay.to_string_lossy(),
            ],
        )?;
    }
    let log = disk.join("machines.log");
    let out = fs::File::create(&log).at("create", &log)?;
    let err = out.try_clone().at("open", &log)?;
    let status = Command::new(paths::xtask()?)
        .args(["machines-init", "--name", &options.name])
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .current_dir("/")
        .status()
        .at("run", paths::xtask()?)?;
    if !status.success() {
        return Err(format!("the machines did not start: {}", tail(&log, 5)).into());
    }
    Machines::of(places, options).wait_ready()
}

fn repair(places: &Places, options: &Options) -> Result<Was> {
    let cluster = Machines::of(places, options);
    let mut was = Was::Up;
    for machine in cluster.hosts()?.iter().filter(|m| !m.up) {
        ask(&places.control(), &Request::PowerOn(machine.name.clone()))?;
        was = Was::Repaired;
    }
    cluster.wait_ready()?;
    Ok(was)
}

/// Takes a cluster down, whatever state it is in. Says whether there was one.
pub fn down(name: &str) -> Result<bool> {
    need_root()?;
    let places = options::places(name)?;
    let lock = state::lock(&places)?;
    let was = state::alive(&places).is_some() || places.disk().exists();
    state::remove(&places)?;
    state::forget(&places, lock);
    Ok(was)
}

impl Machines {
    fn of(places: &Places, options: &Options) -> Self {
        Self {
            places: places.clone(),
            options: options.clone(),
        }
    }

    /// Takes hold of a cluster that is up.
    pub fn attach(name: &str) -> Result<Self> {
        let places = options::places(name)?;
        if state::alive(&places).is_none() {
            return Err(format!("there are no machines {name}: `cargo xtask machines up --name {name}`").into());
        }
        let options = state::read_options(&places)?;
        Ok(Self { places, options })
    }

    /// What it was made of.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The machines, on or off.
    pub fn hosts(&self) -> Result<Vec<StatusLine>> {
        ask(&self.places.control(), &Request::Status)
    }

    /// A command ready to be spawned with streams of the caller's choice; its standard streams and its exit code are the program's there.
    pub fn command(&self, host: &str, user: &str, argv: &[&str]) -> Result<Command> {
        door::command(&self.places, host, user, argv, false)
    }

    /// Runs a command and gives what it said; prints all of it.
    ///
    /// # Panics
    /// If SSH itself cannot be run: a test can do nothing about that.
    pub fn run(&self, host: &str, user: &str, argv: &[&str]) -> Output {
        let begun = Instant::now();
        let output = self
            .command(host, user, argv)
            .and_then(|mut c| c.stdin(Stdio::null()).output().at("run", "ssh"));
        let output = output.unwrap_or_else(|e| panic!("cannot run {argv:?} on {host}: {e}"));
        let said = proc::text_of(&output);
        println!(
            "[{user}@{host}] $ {}\n{said}{}[{}, {:.1} s]",
            argv.join(" "),
            if said.is_empty() { "" } else { "\n" },
            output.status,
            begun.elapsed().as_secs_f32()
        );
        output
    }

    /// Puts a file of this machine on another one.
    pub fn put(&self, host: &str, from: &Path, to: &str) -> Result<()> {
        let file = fs::File::open(from).at("open", from)?;
        let line = format!("mkdir -p \"$(dirname '{to}')\" && cat > '{to}'");
        let output = self
            .command(host, "root", &["sh", "-c", &line])?
            .stdin(file)
            .output()
            .at("run", "ssh")?;
        if output.status.success() {
            return Ok(());
        }
        Err(format!("cannot write {to} on {host}: {}", proc::text_of(&output)).into())
    }

    /// Pulls a machine's plug, or switches it on again: its disk is as it was left. Returns when it answers, if it was switched on.
    pub fn power(&self, host: &str, on: bool) -> Result<()> {
        println!("[{host}] power {}", if on { "on" } else { "off" });
        if !on {
            return ask(&self.places.control(), &Request::PowerOff(host.into())).map(drop);
        }
        ask(&self.places.control(), &Request::PowerOn(host.into()))?;
        self.wait_answers(host)
    }

    /// Waits until a machine takes commands, and cuts it off again from those it was cut off from.
    pub fn wait_answers(&self, host: &str) -> Result<()> {
        let answers = || door::run(&self.places, host, &["true"]).ok();
        proc::wait_for(UP_DEADLINE, answers).ok_or_else(|| format!("{host} does not answer; see `cargo xtask machines logs {host}`"))?;
        for peer in state::cuts_of(&self.places, host)? {
            self.neighbour(host, &peer, true)?;
        }
        Ok(())
    }

    /// Loses all packets between two machines until [`Machines::heal`].
    pub fn cut(&self, a: &str, b: &str) -> Result<()> {
        self.cable(a, b, true)
    }

    /// Ends a cut.
    pub fn heal(&self, a: &str, b: &str) -> Result<()> {
        self.cable(a, b, false)
    }

    fn cable(&self, a: &str, b: &str, cut: bool) -> Result<()> {
        options::address(a)?;
        options::address(b)?;
        if a == b {
            return Err(format!("{a} cannot be cut off from itself").into());
        }
        let (first, second) = if a < b { (a, b) } else { (b, a) };
        let mark = self.places.cuts().join(format!("{first}--{second}"));
        if cut {
            paths::file(&mark, 0o600, "")?;
        } else {
            let _ = fs::remove_file(&mark);
        }
        for (host, peer) in [(a, b), (b, a)] {
            // One that is off learns of it when it is switched on.
            if self.hosts()?.iter().any(|m| m.name == host && m.up) {
                self.neighbour(host, peer, cut)?;
            }
        }
        Ok(())
    }

    /// Packets to a hardware address that nobody has are lost in silence, as with a pulled cable.
    fn neighbour(&self, host: &str, peer: &str, lost: bool) -> Result<()> {
        let ip = options::address(peer)?;
        if lost {
            door::run(
                &self.places,
                host,
                &["ip", "neigh", "replace", &ip, "lladdr", NOBODY, "nud", "permanent", "dev", "eth0"],
            )?;
        } else if door::run(&self.places, host, &["ip", "neigh", "show", &ip, "nud", "permanent"])?.contains(NOBODY) {
            door::run(&self.places, host, &["ip", "neigh", "del", &ip, "dev", "eth0"])?;
        }
        Ok(())
    }

    /// What a machine has written to its console.
    pub fn console(&self, host: &str) -> Result<String> {
        let file = self.places.logs(host).join("console.log");
        Ok(String::from_utf8_lossy(&fs::read(&file).at("read", &file)?).into_owned())
    }

    /// Waits until slurmctld calls all nodes idle or busy.
    pub fn wait_ready(&self) -> Result<()> {
        for host in self.options.hosts() {
            self.wait_answers(&host)?;
        }
        if self.options.fresh {
            return Ok(());
        }
        let mut last = String::new();
        let ready = || {
            last = door::run(&self.places, CTL, &["sinfo", "-h", "-N", "-p", "low", "-o", "%N %T"]).unwrap_or_else(|e| e.to_string());
            let fine = |line: &&str| ["idle", "mixed", "allocated"].iter().any(|s| line.ends_with(s));
            (last.lines().filter(fine).count() == usize::from(self.options.nodes)).then_some(())
        };
        let ready = proc::wait_for(UP_DEADLINE, ready);
        ready.ok_or_else(|| format!("the nodes are not idle after {} s: {last}", UP_DEADLINE.as_secs()).into())
    }
}
