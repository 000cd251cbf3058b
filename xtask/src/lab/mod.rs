//! The development lab: a real cluster on one machine, in namespaces that vanish with their first process.
//!
//! ```text
//! machine
//!  └ xtask lab-init            PID 1 of the lab's own pid, mount, net, uts and ipc namespaces; holds bridge br0
//!     ├ xtask lab-host ctl     ... of the host's own, nested in them: munged, slurmctld, slurm-vmd; the login host
//!     ├ xtask lab-host n1      munged, slurmd, libvirtd (QEMU), slurm-vmd
//!     └ xtask lab-host n2      ...
//! ```
//!
//! [`Lab`] is what tests use; the command line is made of the same functions. `docs/lab.md` has the commands.

mod conf;
mod enter;
pub(crate) mod host;
mod options;
pub(crate) mod root;
mod roots;
mod service;
pub(crate) mod state;
pub(crate) mod supervisor;
pub(crate) mod wire;

pub use enter::run as run_inside;
pub use host::{inner as host_inner, outer as host_outer};
pub(crate) use options::USERS;
pub use options::{CTL, Options, Places, Slurm, address};
pub use supervisor::{inner as supervisor_inner, outer as supervisor_outer};
pub use wire::StatusLine;

use crate::{
    Result,
    error::At,
    image::{self, debian::Release},
    paths, proc, stage, tools,
};
use std::{
    fs,
    path::PathBuf,
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};
use wire::{Request, ask};

/// PATH on every host: nothing of the caller's.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How long `lab up` waits for slurmctld to call all nodes idle.
const UP_DEADLINE: Duration = Duration::from_secs(60);

/// A running lab. Dropping it takes the lab down; [`Lab::keep`] does not.
#[derive(Debug)]
pub struct Lab {
    places: Places,
    name: String,
    down_on_drop: AtomicBool,
}

/// What [`up`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Was {
    /// There was none.
    Started,
    /// It ran and was well.
    Up,
    /// It ran and something had to be started again.
    Repaired,
}

/// Brings a lab up: builds and stages what is out of date, starts what does not run, waits until Slurm calls all nodes idle.
pub fn up(options: &Options) -> Result<Was> {
    options.check()?;
    need_root()?;
    let places = Places::of(&options.name)?;
    let lock = state::lock(&places)?;
    if state::alive(&places).is_some() {
        let running: Options = state::read_options(&places)?;
        if running != *options {
            let name = &options.name;
            return Err(format!(
                "lab {name} is up with other options: `cargo xtask lab down --name {name}` first, or give it another --name"
            )
            .into());
        }
        return repair(&places, options);
    }
    // What a killed lab or a reboot has left is of no use to a new one.
    state::remove(&places)?;
    let result = roots::make(options.slurm).and_then(|()| start(&places, options));
    if result.is_err() && std::env::var_os("SLURM_VM_LAB_KEEP").is_none() {
        state::remove(&places)?;
        state::forget(&places, lock);
    }
    result.map(|()| Was::Started)
}

fn start(places: &Places, options: &Options) -> Result<()> {
    state::make_directories(places)?;
    state::write_options(places, options)?;
    stage::stage_into(&places.stage(), options.release)?;
    if options.companions {
        tools::into(&places.stage())?;
    }
    image::install_into(&places.images())?;
    for name in &options.images {
        let release = Release::named(name).ok_or_else(|| format!("there is no image {name}: debian12 or debian13"))?;
        image::debian::install_into(release, &places.images())?;
    }
    conf::shared_places(places)?;
    let log = places.disk().join("logs/lab.log");
    paths::dir(places.disk().join("logs"), 0o755)?;
    let out = fs::File::create(&log).at("create", &log)?;
    let err = out.try_clone().at("open", &log)?;
    let mut init = Command::new(paths::xtask()?);
    init.args(["lab-init", "--name", &options.name])
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .current_dir("/");
    let status = init.status().at("run", paths::xtask()?)?;
    if !status.success() {
        return Err(format!("the lab did not start: {}", tail(&log, 5)).into());
    }
    wait_ready(places, options)
}

fn repair(places: &Places, options: &Options) -> Result<Was> {
    let mut was = Was::Up;
    for host in ask(&places.control(), &Request::Status)? {
        if !host.up {
            power_on(places, &host.name)?;
            was = Was::Repaired;
        }
        for service in ask(&places.host_socket(&host.name), &Request::Status)? {
            if !service.up && service.note == "stopped" {
                ask(&places.host_socket(&host.name), &Request::Start(service.name))?;
                was = Was::Repaired;
            }
        }
    }
    wait_ready(places, options)?;
    Ok(was)
}

/// Switches a host on and waits until its init serves requests: it has to make its socket first.
fn power_on(places: &Places, host: &str) -> Result<()> {
    ask(&places.control(), &Request::PowerOn(host.into()))?;
    let mut last = None;
    let serves = || match ask(&places.host_socket(host), &Request::Status) {
        Ok(_) => Some(()),
        Err(e) => {
            last = Some(e);
            None
        }
    };
    match (proc::wait_for(Duration::from_secs(20), serves), last) {
        (None, Some(e)) => Err(format!("{host} does not start: {e}; see `cargo xtask lab logs {host} init`").into()),
        _ => Ok(()),
    }
}

fn wait_ready(places: &Places, options: &Options) -> Result<()> {
    let end = Instant::now() + UP_DEADLINE;
    let mut missing = String::from("the lab's first process");
    loop {
        if state::alive(places).is_none() {
            return Err(format!(
                "the lab died while {missing} was missing: {}",
                tail(&places.disk().join("logs/lab.log"), 5)
            )
            .into());
        }
        match missing_part(places, options) {
            Ok(None) => return Ok(()),
            Ok(Some(what)) => missing = what,
            Err(e) => missing = e.to_string(),
        }
        if Instant::now() > end {
            let logs = places.disk().join("logs");
            let mut text = format!("the lab is not ready after {} s; still missing: {missing}", UP_DEADLINE.as_secs());
            for host in options.hosts() {
                for file in [
                    "init.log",
                    "slurm/slurmctld.log",
                    "slurm/slurmd.log",
                    "slurm/slurmd.err",
                    "libvirt/libvirtd.log",
                ] {
                    let log = logs.join(&host).join(file);
                    let last = tail(&log, 4);
                    if !last.is_empty() {
                        text += &format!("\n{host} {file}:\n{last}");
                    }
                }
            }
            return Err(text.into());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn missing_part(places: &Places, options: &Options) -> Result<Option<String>> {
    for host in ask(&places.control(), &Request::Status)? {
        if !host.up {
            return Ok(Some(format!("host {} ({})", host.name, host.note)));
        }
        if let Some(s) = ask(&places.host_socket(&host.name), &Request::Status)?
            .into_iter()
            .find(|s| !s.up && !s.excused)
        {
            return Ok(Some(format!("{} on {} ({})", s.name, host.name, s.note)));
        }
    }
    let output = inside(places, CTL, None, &["sinfo", "-h", "-N", "-p", "low", "-o", "%N %T"])?;
    let text = String::from_utf8_lossy(&output.stdout);
    let idle = text.lines().filter(|line| line.ends_with(" idle")).count();
    // A lab with jobs on it is ready too.
    let fine = text
        .lines()
        .filter(|line| [" idle", " mixed", " allocated", " reserved"].iter().any(|s| line.ends_with(s)))
        .count();
    if fine == usize::from(options.nodes) {
        return Ok(None);
    }
    Ok(Some(format!(
        "{idle} of {} nodes are idle; sinfo says: {}",
        options.nodes,
        proc::text_of(&output).replace('\n', ", ")
    )))
}

/// Takes a lab down, whatever state it is in. Says whether there was one.
pub fn down(name: &str) -> Result<bool> {
    need_root()?;
    let places = Places::of(name)?;
    let lock = state::lock(&places)?;
    let was = state::alive(&places).is_some() || places.disk().exists();
    state::remove(&places)?;
    state::forget(&places, lock);
    Ok(was)
}

/// The names of labs with a trace on this machine, and whether they run.
pub fn list() -> Vec<(String, bool)> {
    let mut names: Vec<String> = [paths::LAB_STATE, paths::LAB_DISKS]
        .iter()
        .filter_map(|dir| fs::read_dir(dir).ok())
        .flatten()
        .filter_map(|entry| entry.ok().filter(|e| e.path().is_dir())?.file_name().into_string().ok())
        .collect();
    names.sort();
    names.dedup();
    names
        .into_iter()
        .map(|name| (name.clone(), Places::of(&name).is_ok_and(|p| state::alive(&p).is_some())))
        .collect()
}

pub(crate) fn need_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        Ok(())
    } else {
        Err("the lab needs root: run it with sudo".into())
    }
}

pub(crate) fn tail(path: &std::path::Path, lines: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Runs a command on a host through the xtask program and gives its output.
fn inside(places: &Places, host: &str, user: Option<&str>, argv: &[&str]) -> Result<Output> {
    command(places, host, user, argv)?.stdin(Stdio::null()).output().at("run", "xtask")
}

fn command(places: &Places, host: &str, user: Option<&str>, argv: &[&str]) -> Result<Command> {
    let mut command = Command::new(paths::xtask()?);
    let name = places
        .state()
        .file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    command
        .args(["lab", "node", "--name", &name, "--user", user.unwrap_or("root"), host, "--"])
        .args(argv);
    Ok(command)
}

impl Lab {
    /// Brings a lab up, as `lab up` does. It goes down when the value is dropped.
    pub fn up(options: &Options) -> Result<Self> {
        up(options)?;
        let lab = Self::attach(&options.name)?;
        lab.down_on_drop.store(true, Ordering::Relaxed);
        Ok(lab)
    }

    /// Takes hold of a lab that is up, without owning it.
    pub fn attach(name: &str) -> Result<Self> {
        let places = Places::of(name)?;
        if state::alive(&places).is_none() {
            return Err(format!("lab {name} is not up: `cargo xtask lab up --name {name}`").into());
        }
        Ok(Self {
            places,
            name: name.into(),
            down_on_drop: AtomicBool::new(false),
        })
    }

    /// Leaves the lab up when this value goes.
    pub fn keep(&self) {
        self.down_on_drop.store(false, Ordering::Relaxed);
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory on the machine that all hosts see as /shared.
    pub fn shared(&self) -> PathBuf {
        self.places.shared()
    }

    /// The directory on the machine that a host sees as /var/log.
    pub fn logs(&self, host: &str) -> PathBuf {
        self.places.logs(host)
    }

    /// Runs a command on the controller host, which is the login host, as `user` (`root`, `alice`, `bob`); prints command, output and status.
    pub fn exec(&self, user: &str, argv: &[&str]) -> Output {
        self.run(CTL, user, argv)
    }

    /// The same as root on any host.
    pub fn node(&self, host: &str, argv: &[&str]) -> Output {
        self.run(host, "root", argv)
    }

    /// The same as any user on any host.
    ///
    /// # Panics
    /// If xtask itself cannot be run: a test can do nothing about that.
    pub fn run(&self, host: &str, user: &str, argv: &[&str]) -> Output {
        let output = inside(&self.places, host, Some(user), argv).unwrap_or_else(|e| panic!("cannot run {argv:?} on {host}: {e}"));
        println!(
            "[{} {user}@{host}] $ {}\n{}[{}]",
            self.name,
            argv.join(" "),
            spoken(&output),
            output.status
        );
        output
    }

    /// A command ready to be spawned with streams of the caller's choice.
    pub fn command(&self, host: &str, user: &str, argv: &[&str]) -> Result<Command> {
        command(&self.places, host, Some(user), argv)
    }

    fn host(&self, host: &str, request: &Request) -> Result<Vec<StatusLine>> {
        options::address(host)?;
        println!("[{}] {host}: {request:?}", self.name);
        ask(&self.places.host_socket(host), request)
    }

    /// Ends a service and keeps it down. Its host is up again after [`Lab::start`].
    pub fn stop(&self, host: &str, service: &str) -> Result<()> {
        self.host(host, &Request::Stop(service.into())).map(drop)
    }

    /// Starts a service that is down.
    pub fn start(&self, host: &str, service: &str) -> Result<()> {
        self.host(host, &Request::Start(service.into())).map(drop)
    }

    /// Kills a service; it is restarted a second later, as systemd does.
    pub fn kill(&self, host: &str, service: &str) -> Result<()> {
        self.host(host, &Request::Kill(service.into())).map(drop)
    }

    /// The services of a host.
    pub fn services(&self, host: &str) -> Result<Vec<StatusLine>> {
        ask(&self.places.host_socket(host), &Request::Status)
    }

    /// The hosts, on or off.
    pub fn hosts(&self) -> Result<Vec<StatusLine>> {
        ask(&self.places.control(), &Request::Status)
    }

    /// Switches a host off (everything on it dies at once, its network first) or on (its disk is as it was left).
    pub fn power(&self, host: &str, on: bool) -> Result<()> {
        println!("[{}] {host}: power {}", self.name, if on { "on" } else { "off" });
        let request = if on {
            Request::PowerOn(host.into())
        } else {
            Request::PowerOff(host.into())
        };
        ask(&self.places.control(), &request)?;
        if on {
            self.services(host)?;
        }
        Ok(())
    }

    /// Loses all packets between two hosts until [`Lab::heal`], also across power cycles.
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
        let hosts = self.hosts()?;
        if let Some(unknown) = [a, b].into_iter().find(|h| !hosts.iter().any(|line| line.name == **h)) {
            return Err(format!("unknown host {unknown}").into());
        }
        let (first, second) = if a < b { (a, b) } else { (b, a) };
        let mark = self.places.cuts().join(format!("{first}--{second}"));
        if cut {
            paths::file(&mark, 0o600, "")?;
        } else {
            let _ = fs::remove_file(&mark);
        }
        for (host, peer) in [(a, b), (b, a)] {
            // A host that is off learns of it when it starts.
            if hosts.iter().any(|line| line.name == host && line.up) {
                self.host(
                    host,
                    &if cut {
                        Request::Block(peer.into())
                    } else {
                        Request::Unblock(peer.into())
                    },
                )?;
            }
        }
        Ok(())
    }

    /// Leaves no free block on a node's file system for VM state, or gives the room back.
    pub fn fill(&self, host: &str, full: bool) -> Result<()> {
        self.host(host, &Request::Fill(full)).map(drop)
    }

    /// The end of a service's log.
    pub fn log_tail(&self, host: &str, service: &str, lines: usize) -> Result<String> {
        let files = service::logs(service)
            .ok_or_else(|| format!("unknown service {service}: munged, slurmctld, slurmd, libvirtd, slurm-vmd, init"))?;
        Ok(files
            .iter()
            .map(|file| tail(&self.places.logs(host).join(file), lines))
            .filter(|t| !t.is_empty())
            .collect::<Vec<_>>()
            .join("\n"))
    }

    /// Takes the lab down now and says how that went; whoever still holds a part of it finds it down.
    pub fn down(&self) -> Result<()> {
        self.keep();
        down(&self.name).map(drop)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.down_on_drop.load(Ordering::Relaxed)
            && let Err(e) = down(&self.name)
        {
            eprintln!("cannot take lab {} down: {e}", self.name);
        }
    }
}

fn spoken(output: &Output) -> String {
    let text = proc::text_of(output);
    if text.is_empty() { text } else { text + "\n" }
}
