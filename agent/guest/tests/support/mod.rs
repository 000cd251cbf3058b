//! A real helper process on a UNIX socket, and a real link to it.

#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::BTreeMap;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use slurm_vm::guest::{GuestLink, LinkConfig, LinkEvent, LinkRequest, UnixTransport};
use slurm_vm_api::guest::{Action, ExitStatus, Failure, GuestHello, StartReport, StartSpec, Stdio, Stream};

/// Every wait ends.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A helper with a directory of its own.
pub struct Guest {
    pub dir: tempfile::TempDir,
    pub child: Child,
}

impl Guest {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let child = Self::spawn(dir.path());
        Self { dir, child }
    }

    fn spawn(dir: &Path) -> Child {
        // Users other than root have to reach their scripts.
        std::fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        Command::new(env!("CARGO_BIN_EXE_slurm-vm-guest"))
            .args([
                "--socket".as_ref(),
                dir.join("port").as_os_str(),
                "--run-dir".as_ref(),
                dir.join("run").as_os_str(),
            ])
            .args(["--passwd".as_ref(), dir.join("passwd").as_os_str()])
            .spawn()
            .unwrap()
    }

    /// As after a reset of the guest.
    pub fn replace(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::fs::remove_file(self.port()).unwrap();
        self.child = Self::spawn(self.dir.path());
    }

    pub fn port(&self) -> PathBuf {
        self.dir.path().join("port")
    }

    /// Peak resident memory of the helper in KiB.
    pub fn peak_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a program did.
#[derive(Debug, Default, Clone)]
pub struct Outcome {
    pub started: Option<StartReport>,
    pub streams: BTreeMap<Stream, Vec<u8>>,
    pub status: Option<ExitStatus>,
}

impl Outcome {
    pub fn stdout(&self) -> &[u8] {
        self.streams.get(&Stream::Stdout).map_or(&[], Vec::as_slice)
    }
    pub fn stderr(&self) -> &[u8] {
        self.streams.get(&Stream::Stderr).map_or(&[], Vec::as_slice)
    }
    pub fn text(&self) -> String {
        String::from_utf8_lossy(self.stdout()).into_owned()
    }
    pub fn code(&self) -> Option<i32> {
        if let Some(ExitStatus::Code { code }) = self.status {
            Some(code)
        } else {
            None
        }
    }
}

/// A link that keeps all it is told, and acknowledges data at once unless told not to.
pub struct Host {
    pub link: GuestLink,
    pub events: Receiver<LinkEvent>,
    pub programs: BTreeMap<u32, Outcome>,
    pub hello: Option<GuestHello>,
    pub ups: u32,
    pub done: BTreeMap<u64, Option<Failure>>,
    pub lost: Vec<u32>,
    pub others: Vec<LinkEvent>,
    pub stdin_acked: u64,
    pub acknowledge: bool,
}

impl Host {
    pub fn new(port: &Path, seed: u64) -> Self {
        let config = LinkConfig {
            retry_min: Duration::from_millis(2),
            retry_max: Duration::from_millis(20),
            ..LinkConfig::new("test", seed)
        };
        let (link, events) = GuestLink::start(config, Box::new(UnixTransport::new(port))).unwrap();
        Self {
            link,
            events,
            programs: BTreeMap::new(),
            hello: None,
            ups: 0,
            done: BTreeMap::new(),
            lost: Vec::new(),
            others: Vec::new(),
            stdin_acked: 0,
            acknowledge: true,
        }
    }

    /// Takes events until `enough` says so.
    pub fn until(&mut self, what: &str, mut enough: impl FnMut(&Self) -> bool) {
        let end = Instant::now() + DEADLINE;
        while !enough(self) {
            let event = self.events.recv_deadline(end);
            let event = event.unwrap_or_else(|error| panic!("waiting for {what}: {error}; others {:?}, up {}", self.others, self.ups));
            self.take(event);
        }
    }

    pub fn take(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Up { hello } => {
                self.ups += 1;
                self.hello = Some(*hello);
            }
            LinkEvent::Down { .. } => {}
            LinkEvent::Started { program, report } => self.programs.entry(program).or_default().started = Some(report),
            LinkEvent::Data {
                program,
                stream,
                offset,
                bytes,
            } => {
                let held = self.programs.entry(program).or_default().streams.entry(stream).or_default();
                assert_eq!(held.len() as u64, offset, "a gap or a repetition");
                held.extend_from_slice(&bytes);
                if self.acknowledge {
                    let offset = held.len() as u64;
                    self.link.send(LinkRequest::Ack { program, stream, offset });
                }
            }
            LinkEvent::Exited { program, status, streams } => {
                let outcome = self.programs.entry(program).or_default();
                for report in streams {
                    assert_eq!(
                        outcome.streams.get(&report.stream).map_or(0, Vec::len) as u64,
                        report.end,
                        "told of the end before all output"
                    );
                }
                assert!(outcome.status.replace(status).is_none(), "told of the end twice");
            }
            LinkEvent::Eof { program, stream, offset } => {
                assert_eq!(
                    self.programs.entry(program).or_default().streams.entry(stream).or_default().len() as u64,
                    offset
                );
            }
            LinkEvent::Done { token, failed } => {
                assert!(self.done.insert(token, failed).is_none(), "done twice");
            }
            LinkEvent::StdinAck { offset, .. } => self.stdin_acked = offset,
            LinkEvent::ProgramLost { program } => self.lost.push(program),
            other => self.others.push(other),
        }
    }

    pub fn start(&self, program: u32, spec: StartSpec) {
        self.link.send(LinkRequest::Start {
            program,
            spec: Box::new(spec),
            script: None,
        });
    }

    /// Runs a program to its end.
    pub fn run(&mut self, program: u32, spec: StartSpec) -> Outcome {
        self.start(program, spec);
        self.finish(program)
    }

    pub fn finish(&mut self, program: u32) -> Outcome {
        self.until("the program's end", |host| {
            host.programs.get(&program).is_some_and(|outcome| outcome.status.is_some())
        });
        self.programs[&program].clone()
    }

    /// Does something and returns why it failed.
    pub fn act(&mut self, token: u64, action: Action) -> Option<Failure> {
        self.link.send(LinkRequest::Do { token, action });
        self.until("an action", |host| host.done.contains_key(&token));
        self.done[&token].clone()
    }
}

/// A shell command as this process's user, on separate pipes.
pub fn sh(command: &str) -> StartSpec {
    spec(&["/bin/sh", "-c", command])
}

pub fn spec(argv: &[&str]) -> StartSpec {
    StartSpec {
        argv: argv.iter().map(|arg| (*arg).into()).collect(),
        env: vec!["PATH=/usr/bin:/bin".into(), "LC_ALL=C".into()],
        cwd: "/".into(),
        uid: nix::unistd::getuid().as_raw(),
        gid: nix::unistd::getgid().as_raw(),
        groups: vec![],
        umask: 0o022,
        limits: vec![],
        stdio: Stdio::Pipes {
            merge_stderr: false,
            stdin: false,
        },
        ring_bytes: None,
        user: None,
        mounts: vec![],
        cwd_required: false,
        wait_network: false,
    }
}

/// A small generator: the tests that use it print the seed they ran with.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = std::iter::repeat_with(|| self.next().to_le_bytes())
            .take(len.div_ceil(8))
            .flatten()
            .collect();
        bytes.truncate(len);
        bytes
    }
}

/// Stands between link and helper and breaks the connection at random bytes, in two ways: both sides are closed, or, as QEMU does, only the
/// host's, while the guest's bytes of that time are lost or come late.
pub fn cutting_proxy(listen: &Path, port: PathBuf, seed: u64, cuts: u32) -> std::thread::JoinHandle<u32> {
    let listener = UnixListener::bind(listen).unwrap();
    std::thread::spawn(move || {
        let mut random = Random(seed | 1);
        let mut guest: Option<UnixStream> = None;
        let mut made = 0;
        while let Ok((host, _)) = listener.accept() {
            let inner = match guest.take() {
                Some(inner) => inner,
                None => match UnixStream::connect(&port) {
                    Ok(inner) => inner,
                    Err(_) => return made,
                },
            };
            let budget = if made < cuts { 1 + random.below(400_000) } else { u64::MAX };
            let finished = relay(&host, &inner, budget, &mut random);
            if finished {
                return made;
            }
            made += 1;
            if random.below(2) == 0 {
                if random.below(2) == 0 {
                    // The guest goes on for a while with nobody there.
                    discard(&inner, &mut random);
                }
                guest = Some(inner);
            }
        }
        made
    })
}

fn discard(stream: &UnixStream, random: &mut Random) {
    use std::io::Read;
    stream.set_nonblocking(true).unwrap();
    let mut buf = vec![0; 1 + usize::try_from(random.below(60_000)).unwrap()];
    let mut stream = stream;
    let _ = stream.read(&mut buf);
}

/// Relays until `budget` bytes have passed. True when the host has closed.
fn relay(host: &UnixStream, guest: &UnixStream, mut budget: u64, random: &mut Random) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    host.set_nonblocking(false).unwrap();
    guest.set_nonblocking(false).unwrap();
    let mut buf = vec![0; 16 * 1024];
    loop {
        let mut fds = [
            PollFd::new(host.as_fd(), PollFlags::POLLIN),
            PollFd::new(guest.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut fds, PollTimeout::NONE).unwrap();
        let ready = fds.map(|fd| fd.revents().is_some_and(|flags| !flags.is_empty()));
        for (index, (mut from, mut to)) in [(host, guest), (guest, host)].into_iter().enumerate() {
            if !ready[index] {
                continue;
            }
            let max = 1 + usize::try_from(random.below(buf.len() as u64)).unwrap();
            match from.read(&mut buf[..max]) {
                Ok(0) | Err(_) if index == 0 => return true,
                Ok(0) | Err(_) => return false,
                Ok(read) => {
                    let pass = usize::try_from(budget.min(read as u64)).unwrap();
                    if to.write_all(&buf[..pass]).is_err() {
                        return index == 1;
                    }
                    budget -= pass as u64;
                    if budget == 0 {
                        return false;
                    }
                }
            }
        }
    }
}
