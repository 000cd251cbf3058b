//! The daemons of a lab host and their little life: started when what they need is there, restarted after a crash, kept down when a test wants that.

use super::{conf::account, options::CTL, wire::StatusLine};
use crate::{Result, error::At, paths};
use nix::{
    sys::{
        signal::{Signal, kill},
        wait::WaitStatus,
    },
    unistd::Pid,
};
use std::{
    fs,
    os::unix::{net::UnixStream, process::CommandExt},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// What systemd calls RestartSec.
const RESTART_DELAY: Duration = Duration::from_secs(1);
/// How long a start waits for a file that another daemon makes; then it starts all the same and may fail by itself.
const NEED_DEADLINE: Duration = Duration::from_secs(15);
const AGENT: &str = "/usr/libexec/slurm-vm/slurm-vmd";
/// Lines `NAME=VALUE` on a host, read at each start of its agent as systemd's EnvironmentFile is: where tests arm fault points.
const AGENT_ENVIRONMENT: &str = "/etc/default/slurm-vm";
const MUNGE_SOCKET: &str = "/run/munge/munge.socket.2";
const LIBVIRT_SOCKET: &str = "/run/libvirt/libvirt-sock";

#[derive(Debug)]
enum State {
    /// Until the needed file is there or the deadline has come.
    Waiting(Instant),
    Running(Pid),
    /// Down, to be started then.
    Restart(Instant),
    /// Down because somebody said so.
    Stopped,
    /// Ended by itself without failure.
    Ended,
    /// Cannot run here, and that is fine.
    Skipped(String),
}

/// One daemon.
#[derive(Debug)]
pub struct Service {
    /// The name that commands use.
    pub name: &'static str,
    argv: &'static [&'static str],
    user: Option<&'static str>,
    needs: Option<&'static str>,
    log: &'static str,
    state: State,
    starts: u32,
}

impl Service {
    fn new(
        name: &'static str,
        argv: &'static [&'static str],
        user: Option<&'static str>,
        needs: Option<&'static str>,
        log: &'static str,
    ) -> Self {
        Self {
            name,
            argv,
            user,
            needs,
            log,
            state: State::Waiting(Instant::now() + NEED_DEADLINE),
            starts: 0,
        }
    }

    /// The daemons of a host.
    pub fn all_of(host: &str) -> Vec<Self> {
        let mut all = vec![Self::new(
            "munged",
            &["munged", "--foreground"],
            Some("munge"),
            None,
            "munge/munged.log",
        )];
        if host == CTL {
            all.push(Self::new(
                "slurmctld",
                &["slurmctld", "-D"],
                None,
                Some(MUNGE_SOCKET),
                "slurm/slurmctld.err",
            ));
        } else {
            all.push(Self::new("libvirtd", &["libvirtd"], None, None, "libvirt/libvirtd.log"));
            all.push(Self::new("slurmd", &["slurmd", "-D"], None, Some(MUNGE_SOCKET), "slurm/slurmd.err"));
        }
        let needs = if host == CTL { MUNGE_SOCKET } else { LIBVIRT_SOCKET };
        let argv = &[AGENT, "--config", "/etc/slurm-vm/slurm-vm.toml"];
        let mut agent = Self::new("slurm-vmd", argv, None, Some(needs), "slurm-vm/agent.log");
        if !agent_answers() {
            agent.state = State::Skipped("the staged slurm-vmd does not answer --version".into());
        }
        all.push(agent);
        all
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Instant) {
        let due = match self.state {
            State::Waiting(deadline) => now >= deadline || self.needs.is_none_or(|file| Path::new(file).exists()),
            State::Restart(at) => now >= at,
            _ => false,
        };
        if due && let Err(e) = self.spawn() {
            eprintln!("{}: {e}", self.name);
            self.state = State::Restart(now + RESTART_DELAY);
        }
    }

    fn spawn(&mut self) -> Result<()> {
        let log = Path::new("/var/log").join(self.log);
        let out = fs::File::options().create(true).append(true).open(&log).at("open", &log)?;
        let err = out.try_clone().at("open", &log)?;
        let (program, args) = self.argv.split_first().ok_or("a service without a program")?;
        let mut command = Command::new(program);
        command
            .args(args)
            .env_clear()
            .env("PATH", super::PATH)
            .env("LANG", "C.UTF-8")
            .env("HOME", "/root");
        command
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .process_group(0);
        if *program == AGENT {
            let text = fs::read_to_string(AGENT_ENVIRONMENT).unwrap_or_default();
            command.envs(text.lines().filter_map(|line| line.split_once('=')));
        }
        if let Some(user) = self.user {
            let (uid, gid) = account(user)?;
            command.uid(uid).gid(gid);
        }
        let child = command.spawn().at("run", *program)?;
        self.starts += 1;
        let pid = i32::try_from(child.id()).map_err(|e| e.to_string())?;
        eprintln!("{}: started as {pid}", self.name);
        self.state = State::Running(Pid::from_raw(pid));
        Ok(())
    }

    /// Takes note of an end if it is this one's.
    pub fn ended(&mut self, status: WaitStatus) {
        let State::Running(pid) = self.state else { return };
        if status.pid() != Some(pid) {
            return;
        }
        eprintln!("{}: {status:?}", self.name);
        self.state = match status {
            WaitStatus::Exited(_, 0) => State::Ended,
            _ => State::Restart(Instant::now() + RESTART_DELAY),
        };
    }

    /// The pid, while it runs.
    pub fn pid(&self) -> Option<Pid> {
        match self.state {
            State::Running(pid) => Some(pid),
            _ => None,
        }
    }

    /// Lets it run, now.
    pub fn start(&mut self) -> Result<()> {
        match self.state {
            State::Running(_) => Ok(()),
            State::Skipped(_) if !agent_answers() => {
                Err(format!("{} cannot run here: {AGENT} does not answer --version", self.name).into())
            }
            _ => self.spawn(),
        }
    }

    /// Sends a signal, if it runs.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = self.pid() {
            // A process that has just ended is reaped by the caller.
            let _ = kill(pid, signal);
        }
    }

    /// Keeps it down. The caller has ended it.
    pub fn keep_down(&mut self) {
        if !matches!(self.state, State::Skipped(_)) {
            self.state = State::Stopped;
        }
    }

    /// Whether the socket that others need takes connections.
    fn answers(&self) -> bool {
        let socket = match self.name {
            "munged" => MUNGE_SOCKET,
            "libvirtd" => LIBVIRT_SOCKET,
            _ => return true,
        };
        UnixStream::connect(socket).is_ok()
    }

    /// For `lab status`.
    pub fn line(&self) -> StatusLine {
        let (up, excused, note) = match &self.state {
            State::Running(pid) if !self.answers() => (false, false, format!("pid {pid}, does not listen yet")),
            State::Running(pid) if self.starts > 1 => (true, false, format!("pid {pid}, start {}", self.starts)),
            State::Running(pid) => (true, false, format!("pid {pid}")),
            State::Waiting(_) => (false, false, format!("waits for {}", self.needs.unwrap_or("its turn"))),
            State::Restart(_) => (false, false, format!("failed, is restarted; see /var/log/{}", self.log)),
            State::Ended => (false, false, "ended by itself".into()),
            State::Stopped => (false, true, "stopped".into()),
            State::Skipped(why) => (false, true, why.clone()),
        };
        StatusLine {
            name: self.name.into(),
            up,
            excused,
            note,
        }
    }
}

/// A build without the real agent has a program that says nothing.
fn agent_answers() -> bool {
    let output = Command::new(AGENT).arg("--version").env_clear().stdin(Stdio::null()).output();
    output.is_ok_and(|o| o.stdout.starts_with(b"slurm-vm"))
}

/// The log files of a service, relative to a host's /var/log.
pub fn logs(service: &str) -> Option<&'static [&'static str]> {
    Some(match service {
        "munged" => &["munge/munged.log"],
        "slurmctld" => &["slurm/slurmctld.log", "slurm/slurmctld.err"],
        "slurmd" => &["slurm/slurmd.log", "slurm/slurmd.err"],
        "libvirtd" => &["libvirt/libvirtd.log"],
        "slurm-vmd" => &["slurm-vm/agent.log"],
        "init" => &["init.log"],
        _ => return None,
    })
}

/// The directories those files are in, made before the first start.
pub fn log_directories(logs: &Path) -> Result<()> {
    for name in ["munge", "slurm", "libvirt", "libvirt/qemu", "slurm-vm"] {
        paths::dir(logs.join(name), 0o755)?;
    }
    Ok(())
}
