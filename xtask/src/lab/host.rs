//! One host of the lab: `xtask lab-host`, started by the supervisor.
//!
//! The outer process makes the namespaces, says the pid of the inner one and waits for it. The inner process is PID 1 of the host: it enters
//! the host's root, sets up its network, starts its daemons, reaps orphans (QEMU is one: a libvirtd without a reaping init hangs) and
//! serves requests, on one thread. When it dies the kernel ends everything on the host.

use super::{
    conf,
    options::{CTL, Places, address},
    root,
    service::{Service, log_directories},
    wire::{self, Request, StatusLine},
};
use crate::{Error, Result, error::At, paths, proc};
use nix::{
    mount::{MsFlags, mount},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, unshare},
    sys::{
        signal::Signal,
        statvfs::statvfs,
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, chown, sethostname},
};
use std::{
    fs,
    io::{Read, Write},
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// All that a host or a lab does not share with its parent, but for the mounts: those the inner process leaves behind by itself,
/// for the outer one still needs its own.
pub const NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWNET
    .union(CloneFlags::CLONE_NEWUTS)
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWPID);

/// The outer process: returns when the host is off.
pub fn outer(name: &str, host: &str) -> Result<()> {
    unshare(NAMESPACES).at("make namespaces for", host)?;
    let mut child = Command::new("/proc/self/exe")
        .args(["lab-host", "--inner", "--name", name, "--host", host])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .at("run", "/proc/self/exe")?;
    println!("{}", child.id());
    std::io::stdout().flush().at("write to", "the supervisor")?;
    child.wait().at("wait for", host)?;
    Ok(())
}

/// PID 1 of the host: returns only if it could not start.
pub fn inner(name: &str, host: &str) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).at("make a mount namespace for", host)?;
    let places = Places::of(name)?;
    let options: super::Options = super::state::read_options(&places)?;
    let socket = places.host_socket(host);
    let _ = fs::remove_file(&socket);
    // Listens from the start, so that a request made early waits instead of failing.
    let listener = UnixListener::bind(&socket).at("listen on", &socket)?;
    listener.set_nonblocking(true).at("set up", &socket)?;
    let cuts = super::state::cuts_of(&places, host)?;
    let disk = places.disk().join("hosts").join(host).join("libvirt");
    paths::dir(&disk, 0o711)?;
    paths::dir(places.logs(host), 0o755)?;
    log_directories(&places.logs(host))?;
    root::enter(&places, host, &super::roots::lower(options.slurm), options.companions)?;
    sethostname(host).at("set the host name", host)?;
    network(host)?;
    conf::write(&options, host)?;
    if host != CTL {
        let (uid, gid) = conf::account("libvirt-qemu")?;
        let qemu = "/var/lib/libvirt/qemu";
        paths::dir(qemu, 0o751)?;
        chown(qemu, Some(uid.into()), Some(gid.into())).at("give away", qemu)?;
    }
    for peer in cuts {
        block(&peer, true)?;
    }
    Init {
        services: Service::all_of(host),
        vm_disk_mib: options.vm_disk_mib,
    }
    .serve(&listener)
}

fn network(host: &str) -> Result<()> {
    proc::run("ip", &["link", "set", "lo", "up"])?;
    // The supervisor gives us eth0 after we were started.
    let there = || {
        fs::read_to_string("/proc/self/net/dev")
            .ok()
            .filter(|table| table.contains("eth0:"))
    };
    proc::wait_for(Duration::from_secs(10), there).ok_or("the supervisor has made no eth0")?;
    let _ = fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1");
    // Linux's default, as nodes have it. A machine in a cloud may have chosen bbr, which paces each connection with timers.
    let _ = fs::write("/proc/sys/net/ipv4/tcp_congestion_control", "cubic");
    proc::run("ip", &["addr", "add", &format!("{}/24", address(host)?), "dev", "eth0"])?;
    proc::run("ip", &["link", "set", "eth0", "up"])?;
    Ok(())
}

/// Loses packets to a peer as a pulled cable does: they go to a hardware address that nobody has. Nothing is refused, nothing is answered.
fn block(peer: &str, on: bool) -> Result<()> {
    let ip = address(peer)?;
    if on {
        proc::run(
            "ip",
            &[
                "neigh",
                "replace",
                &ip,
                "lladdr",
                "02:00:00:00:00:01",
                "nud",
                "permanent",
                "dev",
                "eth0",
            ],
        )?;
    } else if !proc::run("ip", &["neigh", "show", &ip, "nud", "permanent"])?.is_empty() {
        proc::run("ip", &["neigh", "del", &ip, "dev", "eth0"])?;
    }
    Ok(())
}

struct Init {
    services: Vec<Service>,
    vm_disk_mib: u32,
}

impl Init {
    fn serve(mut self, listener: &UnixListener) -> Result<()> {
        let mut children = child_signal()?;
        loop {
            self.reap();
            let now = Instant::now();
            self.services.iter_mut().for_each(|s| s.tick(now));
            wait(listener, &mut children, Duration::from_millis(100));
            while let Ok((stream, _)) = listener.accept() {
                wire::serve(stream, |request| self.answer(request));
            }
        }
    }

    fn reap(&mut self) {
        while let Ok(status) = waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
            self.services.iter_mut().for_each(|s| s.ended(status));
        }
    }

    fn find(&mut self, name: &str) -> Result<&mut Service> {
        let known = self.services.iter().map(|s| s.name).collect::<Vec<_>>().join(", ");
        self.services
            .iter_mut()
            .find(|s| s.name == name)
            .ok_or_else(|| format!("unknown service {name}: this host has {known}").into())
    }

    /// Ends a service by a signal and waits for it; a daemon that does not go is killed.
    fn end(&mut self, name: &str, signal: Signal) -> Result<()> {
        self.find(name)?.signal(signal);
        let end = Instant::now() + Duration::from_secs(10);
        while self.find(name)?.pid().is_some() {
            if Instant::now() > end {
                self.find(name)?.signal(Signal::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(5));
            self.reap();
        }
        Ok(())
    }

    fn answer(&mut self, request: Request) -> Result<Vec<StatusLine>> {
        match request {
            Request::Status => {}
            Request::Start(name) => self.find(&name)?.start()?,
            Request::Stop(name) => {
                self.end(&name, Signal::SIGTERM)?;
                self.find(&name)?.keep_down();
            }
            Request::Kill(name) => {
                if self.find(&name)?.pid().is_none() {
                    return Err(format!("{name} does not run").into());
                }
                self.end(&name, Signal::SIGKILL)?;
            }
            Request::Block(peer) => block(&peer, true)?,
            Request::Unblock(peer) => block(&peer, false)?,
            Request::Fill(_) if self.services.iter().any(|s| s.name == "slurmctld") => {
                return Err(Error::Other("the controller host has no file system for VM state".into()));
            }
            Request::Fill(on) => self.fill(on)?,
            Request::PowerOn(_) | Request::PowerOff(_) => return Err(Error::Other("a host cannot switch hosts".into())),
        }
        Ok(self.services.iter().map(Service::line).collect())
    }

    /// A full disk without writing one: the file system shrinks to what is in it. New blocks fail with ENOSPC, old ones can be written again.
    fn fill(&self, on: bool) -> Result<()> {
        let filler = Path::new(root::VM_STATE).join(".lab-fill");
        if !on {
            let _ = fs::remove_file(&filler);
            return resize(u64::from(self.vm_disk_mib) << 20);
        }
        let now = statvfs(root::VM_STATE).at("look at", root::VM_STATE)?;
        // A size of 0 would mean "no limit", so an empty one keeps a block, and a file takes it.
        resize(((now.blocks() - now.blocks_free()) * now.fragment_size()).max(now.fragment_size()))?;
        let free = statvfs(root::VM_STATE).at("look at", root::VM_STATE)?;
        let rest = usize::try_from(free.blocks_free() * free.fragment_size()).map_err(|e| e.to_string())?;
        if rest > 0 {
            paths::file(&filler, 0o600, vec![0; rest])
        } else {
            Ok(())
        }
    }
}

fn resize(size: u64) -> Result<()> {
    let none: Option<&str> = None;
    mount(
        none,
        root::VM_STATE,
        none,
        MsFlags::MS_REMOUNT,
        Some(format!("size={size}").as_str()),
    )
    .at("resize", root::VM_STATE)
}

/// A stream that becomes readable when a child has ended.
pub fn child_signal() -> Result<UnixStream> {
    let (read, write) = UnixStream::pair().at("make", "a pair of sockets")?;
    read.set_nonblocking(true).at("set up", "a pair of sockets")?;
    signal_hook::low_level::pipe::register(signal_hook::consts::SIGCHLD, write).at("catch", "SIGCHLD")?;
    Ok(read)
}

/// Sleeps until somebody connects, a child has ended, or the time is over.
pub fn wait(listener: &UnixListener, children: &mut UnixStream, time: Duration) {
    let mut fds = [
        PollFd::new(listener.as_fd(), PollFlags::POLLIN),
        PollFd::new(children.as_fd(), PollFlags::POLLIN),
    ];
    let timeout = PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX);
    // EINTR is as good as any reason to look.
    let _ = poll(&mut fds, timeout);
    let mut bytes = [0u8; 64];
    while children.read(&mut bytes).is_ok_and(|n| n > 0) {}
}
