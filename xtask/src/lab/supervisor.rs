//! The first process of a lab: `xtask lab-init`.
//!
//! The outer process makes the namespaces, records the pid of the inner one and goes. The inner process is PID 1 of the lab: it holds the
//! bridge and the hosts' files in memory, starts and kills hosts. When it dies, however it dies, the kernel ends every process of the lab,
//! and with them go their mounts and network: that is the whole clean-up.

use super::{
    host,
    options::{Options, Places},
    root, state,
    wire::{self, Request, StatusLine},
};
use crate::{Error, Result, error::At, proc};
use nix::{
    sched::{CloneFlags, unshare},
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, sethostname, setsid},
};
use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// The outer process: returns when the lab's first process runs.
pub fn outer(name: &str) -> Result<()> {
    first_process(&Places::of(name)?, "lab-init")
}

/// Starts the first process of new namespaces, which is this program with `command --inner`, and records it.
pub(crate) fn first_process(places: &Places, command: &str) -> Result<()> {
    let name = places.name();
    // Away from the terminal: a Ctrl-C there is not for the lab.
    setsid().at("leave the session of", name)?;
    unshare(host::NAMESPACES).at("make namespaces (root is needed) for", name)?;
    let mut child = Command::new("/proc/self/exe")
        .args([command, "--inner", "--name", name])
        .stdin(Stdio::null())
        .spawn()
        .at("run", "/proc/self/exe")?;
    let recorded = state::write_status(places, i32::try_from(child.id()).map_err(|e| e.to_string())?);
    if recorded.is_err() {
        // A lab that nobody can find must not live.
        let _ = child.kill();
    }
    recorded
}

/// PID 1 of the lab: returns only if it could not start.
pub fn inner(name: &str) -> Result<()> {
    let places = Places::of(name)?;
    let options: Options = state::read_options(&places)?;
    unshare(CloneFlags::CLONE_NEWNS).at("make a mount namespace for", name)?;
    root::make_private()?;
    root::mount_kind("proc", Path::new("/proc"), "")?;
    fs::create_dir_all(places.ram()).at("create", places.ram())?;
    root::mount_kind("tmpfs", &places.ram(), "mode=0755")?;
    sethostname(format!("lab-{name}")).at("set the host name", name)?;
    proc::run("ip", &["link", "set", "lo", "up"])?;
    proc::run("ip", &["link", "add", "br0", "type", "bridge"])?;
    proc::run("ip", &["link", "set", "br0", "up"])?;
    // What goes from host to host passes a switch, not a firewall, and costs what a switch costs.
    for hook in ["arptables", "iptables", "ip6tables"] {
        let path = PathBuf::from(format!("/proc/sys/net/bridge/bridge-nf-call-{hook}"));
        if path.exists() {
            fs::write(&path, "0").at("write to", &path)?;
        }
    }
    let listener = UnixListener::bind(places.control()).at("listen on", places.control())?;
    listener.set_nonblocking(true).at("set up", places.control())?;
    let mut lab = Lab {
        options,
        places,
        hosts: Vec::new(),
    };
    for host in lab.options.hosts() {
        let started = lab.start(&host)?;
        lab.hosts.push(started);
    }
    let mut children = host::child_signal()?;
    loop {
        lab.reap();
        host::wait(&listener, &mut children, Duration::from_secs(1));
        while let Ok((stream, _)) = listener.accept() {
            wire::serve(stream, |request| lab.answer(request));
        }
    }
}

struct Host {
    name: String,
    /// The process that made the namespaces and waits for the host's init; nothing while the host is off.
    outer: Option<Pid>,
    init: Pid,
    wanted_off: bool,
}

struct Lab {
    options: Options,
    places: Places,
    hosts: Vec<Host>,
}

impl Lab {
    fn start(&self, name: &str) -> Result<Host> {
        root::prepare(&self.options, &self.places, name)?;
        let log = self.places.logs(name).join("init.log");
        fs::create_dir_all(self.places.logs(name)).at("create", self.places.logs(name))?;
        let err = fs::File::options().create(true).append(true).open(&log).at("open", &log)?;
        let mut child = Command::new("/proc/self/exe")
            .args(["lab-host", "--name", &self.options.name, "--host", name])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(err)
            .spawn()
            .at("run", "/proc/self/exe")?;
        let mut line = String::new();
        let out = child.stdout.take().ok_or("a child without output")?;
        BufReader::new(out).read_line(&mut line).at("read from", name)?;
        let init: i32 = line
            .trim()
            .parse()
            .map_err(|_| format!("{name} did not start; see {}", log.display()))?;
        let outer = i32::try_from(child.id()).map_err(|e| e.to_string())?;
        // The kernel takes interfaces of dead namespaces away in its own time.
        let _ = proc::run("ip", &["link", "del", name]);
        proc::run(
            "ip",
            &[
                "link",
                "add",
                name,
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                &init.to_string(),
            ],
        )?;
        proc::run("ip", &["link", "set", name, "master", "br0", "up"])?;
        Ok(Host {
            name: name.into(),
            outer: Some(Pid::from_raw(outer)),
            init: Pid::from_raw(init),
            wanted_off: false,
        })
    }

    fn reap(&mut self) {
        while let Ok(status) = waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
            for host in &mut self.hosts {
                if host.outer.is_some() && status.pid() == host.outer {
                    host.outer = None;
                    // If the outer process was killed, its host would live on unseen.
                    let _ = kill(host.init, Signal::SIGKILL);
                }
            }
        }
    }

    fn find(&self, name: &str) -> Result<usize> {
        let known = self.options.hosts().join(", ");
        self.hosts
            .iter()
            .position(|h| h.name == name)
            .ok_or_else(|| format!("unknown host {name}: this lab has {known}").into())
    }

    fn answer(&mut self, request: Request) -> Result<Vec<StatusLine>> {
        match request {
            Request::Status => {}
            Request::PowerOn(name) => {
                let at = self.find(&name)?;
                if self.hosts[at].outer.is_none() {
                    self.hosts[at] = self.start(&name)?;
                }
            }
            Request::PowerOff(name) => self.power_off(&name)?,
            _ => return Err(Error::Other("only a host can do that".into())),
        }
        Ok(self.hosts.iter().map(line).collect())
    }

    fn power_off(&mut self, name: &str) -> Result<()> {
        let at = self.find(name)?;
        self.hosts[at].wanted_off = true;
        // The network first: a dead machine sends no FIN, and its peers must find out by themselves.
        let _ = proc::run("ip", &["link", "del", name]);
        if self.hosts[at].outer.is_some() {
            // It may have died by itself just now.
            let _ = kill(self.hosts[at].init, Signal::SIGKILL);
        }
        let end = Instant::now() + Duration::from_secs(20);
        while self.hosts[at].outer.is_some() {
            if Instant::now() > end {
                return Err(format!("{name} does not die; see `lab logs {name} init`").into());
            }
            std::thread::sleep(Duration::from_millis(2));
            self.reap();
        }
        let _ = fs::remove_file(self.places.host_socket(name));
        Ok(())
    }
}

fn line(host: &Host) -> StatusLine {
    let up = host.outer.is_some();
    let note = match (up, host.wanted_off) {
        (true, _) => "on",
        (false, true) => "off",
        (false, false) => "died",
    };
    StatusLine {
        name: host.name.clone(),
        up,
        excused: !up && host.wanted_off,
        note: note.into(),
    }
}
