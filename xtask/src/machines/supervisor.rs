//! The first process of a cluster of machines: `xtask machines-init`. As a lab's first process it is PID 1 of namespaces of its own: it holds
//! the bridge and owns the QEMUs. When it dies, however it dies, the kernel ends them all, and the network goes with them.

use super::{
    identity,
    options::{self, Options, door},
};
use crate::{
    Error, Result,
    error::At,
    lab::{
        CTL, Places, host as lab_host, root, state, supervisor,
        wire::{self, Request, StatusLine},
    },
    proc,
};
use nix::{
    sched::{CloneFlags, unshare},
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{Pid, sethostname},
};
use std::{
    fs,
    os::unix::net::UnixListener,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Memory of the controller, in MiB.
const CTL_MIB: u32 = 1024;
/// MiB that a QEMU may keep translated code in.
const CODE_MIB: u32 = 256;

/// The outer process: returns when the first process runs.
pub fn outer(name: &str) -> Result<()> {
    supervisor::first_process(&options::places(name)?, "machines-init")
}

/// PID 1 of the cluster: returns only if it could not start.
pub fn inner(name: &str) -> Result<()> {
    let places = options::places(name)?;
    let options: Options = state::read_options(&places)?;
    unshare(CloneFlags::CLONE_NEWNS).at("make a mount namespace for", name)?;
    root::make_private()?;
    root::mount_kind("proc", Path::new("/proc"), "")?;
    sethostname(format!("machines-{name}")).at("set the host name", name)?;
    proc::run("ip", &["link", "set", "lo", "up"])?;
    proc::run("ip", &["link", "add", "br0", "type", "bridge"])?;
    proc::run("ip", &["link", "set", "br0", "up"])?;
    let listener = UnixListener::bind(places.control()).at("listen on", places.control())?;
    listener.set_nonblocking(true).at("set up", places.control())?;
    let mut cluster = Cluster {
        machines: options.hosts().into_iter().map(Machine::off).collect(),
        options,
        places,
    };
    for at in 0..cluster.machines.len() {
        cluster.start(at)?;
    }
    let mut children = lab_host::child_signal()?;
    loop {
        cluster.reap();
        lab_host::wait(&listener, &mut children, Duration::from_secs(1));
        while let Ok((stream, _)) = listener.accept() {
            wire::serve(stream, |request| cluster.answer(request));
        }
    }
}

struct Machine {
    name: String,
    qemu: Option<Pid>,
    note: String,
}

impl Machine {
    fn off(name: String) -> Self {
        Self {
            name,
            qemu: None,
            note: "off".into(),
        }
    }
}

struct Cluster {
    options: Options,
    places: Places,
    machines: Vec<Machine>,
}

impl Cluster {
    fn start(&mut self, at: usize) -> Result<()> {
        let name = self.machines[at].name.clone();
        let tap = format!("tap-{name}");
        // A tap goes with the QEMU that had it open only if it was not made to last, and QEMU does not make it join the bridge.
        let _ = proc::run("ip", &["link", "del", &tap]);
        proc::run("ip", &["tuntap", "add", "dev", &tap, "mode", "tap"])?;
        proc::run("ip", &["link", "set", &tap, "master", "br0", "up"])?;
        let log = self.places.logs(&name).join("qemu.log");
        let out = fs::File::options().create(true).append(true).open(&log).at("open", &log)?;
        let err = out.try_clone().at("open", &log)?;
        let child = Command::new("nice")
            .args(["-n", "5", "qemu-system-x86_64"])
            .args(self.arguments(&name, &tap)?)
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .spawn()
            .at("run", "qemu-system-x86_64")?;
        let pid = i32::try_from(child.id()).map_err(|e| e.to_string())?;
        self.machines[at].qemu = Some(Pid::from_raw(pid));
        self.machines[at].note = format!("QEMU {pid}");
        Ok(())
    }

    fn arguments(&self, name: &str, tap: &str) -> Result<Vec<String>> {
        let disk = self.places.disk();
        let (cpus, memory) = if name == CTL {
            (1, CTL_MIB)
        } else {
            (self.options.cpus, self.options.mem_mib)
        };
        let path = |file: String| disk.join(file).display().to_string();
        let console = self.places.logs(name).join("console.log").display().to_string();
        let text = format!(
            "-name {name}
-nodefaults
-no-user-config
-display none
-accel tcg,thread=multi,tb-size={CODE_MIB}
-cpu EPYC,+svm,+npt
-smp {cpus}
-m {memory}
-kernel {}
-initrd {}
-drive file={},if=virtio,format=qcow2,discard=unmap
-drive file={},if=virtio,format=raw,readonly=on
-netdev tap,id=lan,ifname={tap},script=no,downscript=no
-device virtio-net-pci,netdev=lan,mac={}
-netdev user,id=door,restrict=on,hostfwd=tcp:127.0.0.1:{}-:22
-device virtio-net-pci,netdev=door,mac={}
-device virtio-rng-pci
-chardev file,id=console,path={console},append=on
-serial chardev:console",
            path("vmlinuz".into()),
            path("initrd".into()),
            path(format!("{name}.qcow2")),
            path(format!("{name}.tar")),
            identity::mac(name)?,
            door(name)?,
            identity::door_mac(name)?,
        );
        // No name in it holds a blank: names of clusters and machines are checked, the directories are ours.
        let mut arguments: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        arguments.push("-append".into());
        arguments.push("root=/dev/vda rw console=ttyS0 quiet net.ifnames=0 systemd.show_status=0".into());
        Ok(arguments)
    }

    fn reap(&mut self) {
        while let Ok(status) = waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
            for machine in &mut self.machines {
                if machine.qemu.is_some() && status.pid() == machine.qemu {
                    machine.qemu = None;
                    machine.note = match status {
                        WaitStatus::Exited(_, 0) => "off, shut down by itself".into(),
                        other => format!("off: {other:?}"),
                    };
                }
            }
        }
    }

    fn find(&self, name: &str) -> Result<usize> {
        let known = self.options.hosts().join(", ");
        self.machines
            .iter()
            .position(|m| m.name == name)
            .ok_or_else(|| format!("unknown machine {name}: this cluster has {known}").into())
    }

    fn answer(&mut self, request: Request) -> Result<Vec<StatusLine>> {
        self.reap();
        match request {
            Request::Status => {}
            Request::PowerOn(name) => {
                let at = self.find(&name)?;
                if self.machines[at].qemu.is_none() {
                    self.start(at)?;
                }
            }
            Request::PowerOff(name) => self.power_off(&name)?,
            _ => return Err(Error::Other("only a host of a lab can do that".into())),
        }
        Ok(self.machines.iter().map(line).collect())
    }

    fn power_off(&mut self, name: &str) -> Result<()> {
        let at = self.find(name)?;
        // The network first: a dead machine sends no FIN, and its peers must find out by themselves.
        let _ = proc::run("ip", &["link", "del", &format!("tap-{name}")]);
        if let Some(pid) = self.machines[at].qemu {
            // It may have died by itself just now.
            let _ = kill(pid, Signal::SIGKILL);
        }
        let end = Instant::now() + Duration::from_secs(20);
        while self.machines[at].qemu.is_some() {
            if Instant::now() > end {
                return Err(format!("{name} does not die").into());
            }
            std::thread::sleep(Duration::from_millis(5));
            self.reap();
        }
        self.machines[at].note = "off".into();
        Ok(())
    }
}

fn line(machine: &Machine) -> StatusLine {
    StatusLine {
        name: machine.name.clone(),
        up: machine.qemu.is_some(),
        excused: false,
        note: machine.note.clone(),
    }
}
