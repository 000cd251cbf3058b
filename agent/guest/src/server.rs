//! The helper's one loop: port, programs, signals.
//!
//! Nothing is queued for the host except answers to requests: everything else (starts, ends, acknowledgements, data) is generated from the
//! programs' state when there is room to send, so that memory is bounded by the rings whatever the host does, and a new session has nothing
//! stale to send.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use slurm_vm_api::frame::{Decoder, Frame, Kind};
use slurm_vm_api::guest::{
    self, Action, ExitStatus, FREEZE_LIMIT_S, Failure, GuestHello, MAX_DATA_BYTES, MAX_PROGRAMS, MAX_SCRIPT_BYTES, MAX_SPEC_BYTES,
    PROTOCOL, Refusal, Scope, StartSpec, Stream, ToGuest, ToHost, Upload,
};

use crate::port::{Moved, Port};
use crate::program::Program;
use crate::start::{self, Places};
use crate::uploads::Uploads;
use crate::{admin, spawn};

/// Enough to send that the port is kept busy while the next bytes are encoded.
const OUTBOX_BYTES: usize = 64 * 1024;
/// Answers waiting to be sent; with so many the host is not read until it has taken some.
const MAX_ANSWERS: usize = 512;
/// Requests whose answer is remembered, should the host ask again.
const REMEMBERED: usize = 512;
/// Reads from the port in one turn of the loop, so that programs get theirs.
const READS_PER_TURN: usize = 8;

/// How the helper was started.
#[derive(Debug)]
pub struct Options {
    /// Where things are.
    pub places: Places,
    /// A stand-in for the guest: no power off.
    pub pretend: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Port,
    Listener,
    Signals,
    Notes(u32),
    Output(u32, Stream),
    Input(u32),
}

/// A child that does something slow for a request.
#[derive(Debug)]
struct Worker {
    pid: i32,
    // None: the helper's own doing.
    request: Option<u64>,
}

/// The helper.
#[derive(Debug)]
pub struct Server {
    options: Options,
    port: Port,
    signals: SignalFd,
    decoder: Decoder,
    bad_frames: u64,
    bad_frames_told: u64,
    inbuf: Box<[u8]>,
    outbox: Vec<u8>,
    sent: usize,
    session: bool,
    answers: VecDeque<ToHost>,
    done: VecDeque<(u64, Option<Failure>)>,
    programs: BTreeMap<u32, Program>,
    // Where the round of the streams goes on.
    turn: u32,
    uploads: Uploads,
    workers: Vec<Worker>,
    thaw_at: Option<Instant>,
    instance: String,
    stopping: bool,
}

fn read_line(path: &str) -> String {
    std::fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

impl Server {
    /// A helper on this port.
    pub fn new(options: Options, port: Port) -> io::Result<Self> {
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT] {
            mask.add(signal);
        }
        mask.thread_block()?;
        Ok(Self {
            options,
            port,
            signals: SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?,
            decoder: Decoder::new(),
            bad_frames: 0,
            bad_frames_told: 0,
            inbuf: vec![0; 64 * 1024].into_boxed_slice(),
            outbox: Vec::with_capacity(OUTBOX_BYTES + 40 * 1024),
            sent: 0,
            session: false,
            answers: VecDeque::new(),
            done: VecDeque::new(),
            programs: BTreeMap::new(),
            turn: 0,
            uploads: Uploads::default(),
            workers: Vec::new(),
            thaw_at: None,
            instance: read_line("/proc/sys/kernel/random/uuid"),
            stopping: false,
        })
    }

    /// Runs until told to stop by a signal.
    pub fn run(&mut self) -> io::Result<()> {
        let mut logged = false;
        while !self.stopping {
            let now = Instant::now();
            match self.port.open(now) {
                Err(error) if !logged => {
                    eprintln!("slurm-vm-guest: failed to open the port, trying on: {error}");
                    logged = true;
                }
                Err(_) => {}
                Ok(()) => logged = false,
            }
            self.send(now);
            self.turn(now)?;
        }
        for program in self.programs.values() {
            let _ = program.signal(libc::SIGKILL, true);
        }
        Ok(())
    }

    fn turn(&mut self, now: Instant) -> io::Result<()> {
        let ready = self.wait(now)?;
        let now = Instant::now();
        for (token, flags) in ready {
            match token {
                Token::Port => {
                    if !self.port.polled(flags, now) {
                        self.end_session();
                    }
                    if flags.intersects(PollFlags::POLLIN | PollFlags::POLLHUP) {
                        self.receive(now);
                    }
                }
                Token::Listener => {}
                Token::Signals => self.take_signals(now)?,
                Token::Notes(id) => self.with(id, Program::read_notes),
                Token::Output(id, stream) => self.with(id, |program| {
                    if let Some(output) = program.output(stream) {
                        output.read(now);
                    }
                }),
                Token::Input(id) => self.with(id, |program| program.input.write()),
            }
        }
        for program in self.programs.values_mut() {
            program.settle(now);
        }
        if self.thaw_at.is_some_and(|at| now >= at) {
            self.thaw_at = None;
            eprintln!("slurm-vm-guest: nobody thawed the file systems within {FREEZE_LIMIT_S} s, thawing");
            self.work(None, || admin::freeze(true));
        }
        Ok(())
    }

    fn with(&mut self, id: u32, act: impl FnOnce(&mut Program)) {
        if let Some(program) = self.programs.get_mut(&id) {
            act(program);
        }
    }

    /// Waits for anything to do.
    fn wait(&self, now: Instant) -> io::Result<Vec<(Token, PollFlags)>> {
        let mut wanted: Vec<(Token, BorrowedFd<'_>, PollFlags)> = Vec::with_capacity(16);
        wanted.push((Token::Signals, self.signals.as_fd(), PollFlags::POLLIN));
        if let Some((fd, channel)) = self.port.poll_fd(now) {
            let mut flags = PollFlags::empty();
            if self.answers.len() < MAX_ANSWERS {
                flags |= PollFlags::POLLIN;
            }
            if self.sent < self.outbox.len() {
                flags |= PollFlags::POLLOUT;
            }
            wanted.push((if channel { Token::Port } else { Token::Listener }, fd, flags));
        }
        for (id, program) in &self.programs {
            wanted.extend(program.wants_notes().map(|fd| (Token::Notes(*id), fd, PollFlags::POLLIN)));
            wanted.extend(program.input.wants_output().map(|fd| (Token::Input(*id), fd, PollFlags::POLLOUT)));
            for output in &program.outputs {
                wanted.extend(
                    output
                        .wants_input()
                        .map(|fd| (Token::Output(*id, output.stream), fd, PollFlags::POLLIN)),
                );
            }
        }
        let deadline = self
            .programs
            .values()
            .filter_map(Program::deadline)
            .chain(self.port.deadline())
            .chain(self.thaw_at)
            .min();
        let timeout = deadline.map_or(PollTimeout::NONE, |at| {
            // Rounded up: a wait that ends just before its deadline would be followed by a spin.
            let left = at.saturating_duration_since(now) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let mut poll_fds: Vec<PollFd<'_>> = wanted.iter().map(|(_, fd, flags)| PollFd::new(*fd, *flags)).collect();
        match poll(&mut poll_fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let flags = poll_fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        Ok(wanted
            .iter()
            .map(|(token, ..)| *token)
            .zip(flags)
            .filter(|(_, flags)| !flags.is_empty())
            .collect())
    }

    fn take_signals(&mut self, now: Instant) -> io::Result<()> {
        while let Some(info) = self.signals.read_signal()? {
            if i32::try_from(info.ssi_signo).is_ok_and(|signo| signo != libc::SIGCHLD) {
                self.stopping = true;
            }
        }
        for program in self.programs.values_mut() {
            program.check_leader(now);
        }
        for worker in std::mem::take(&mut self.workers) {
            match spawn::peek_exit(worker.pid) {
                None => self.workers.push(worker),
                Some(status) => {
                    spawn::reap(worker.pid);
                    if let Some(id) = worker.request {
                        let errno = if let ExitStatus::Code { code } = status {
                            code
                        } else {
                            libc::EINTR
                        };
                        self.answer(id, if errno == 0 { Ok(()) } else { Err(Errno::from_raw(errno)) });
                    }
                }
            }
        }
        Ok(())
    }

    // ---- from the host ----

    fn receive(&mut self, now: Instant) {
        let mut buf = std::mem::take(&mut self.inbuf);
        let mut decoder = std::mem::take(&mut self.decoder);
        for _ in 0..READS_PER_TURN {
            let Moved::Bytes(read) = self.moved(|port, buf| port.read(buf, now), &mut buf) else {
                break;
            };
            let mut input = &buf[..read];
            while let Some(frame) = decoder.next(&mut input) {
                self.bad_frames = frame.bad_before;
                self.take(frame, now);
            }
            self.bad_frames = decoder.bad_frames();
            if read < buf.len() || self.answers.len() >= MAX_ANSWERS {
                break;
            }
        }
        if self.session && self.bad_frames > self.bad_frames_told {
            self.bad_frames_told = self.bad_frames;
            self.answers.push_back(ToHost::Resync {
                bad_frames: self.bad_frames_told,
            });
        }
        self.inbuf = buf;
        self.decoder = decoder;
    }

    fn moved(&mut self, act: impl FnOnce(&mut Port, &mut [u8]) -> Moved, buf: &mut [u8]) -> Moved {
        let moved = act(&mut self.port, buf);
        if moved == Moved::Gone {
            self.end_session();
        }
        moved
    }

    fn end_session(&mut self) {
        self.session = false;
        self.outbox.clear();
        self.sent = 0;
        self.answers.clear();
        self.uploads.ack_due.clear();
        for program in self.programs.values_mut() {
            program.quiet();
        }
    }

    fn take(&mut self, frame: Frame<'_>, now: Instant) {
        if frame.kind == Kind::Control {
            match serde_json::from_slice::<ToGuest>(frame.body) {
                Ok(ToGuest::Hello { protocol, nonce, .. }) => self.hello(protocol, nonce),
                Ok(message) if self.session => self.control(message),
                Ok(_) | Err(_) => {}
            }
            return;
        }
        if !self.session {
            return;
        }
        match (frame.kind, guest::split_stream(frame.body)) {
            (Kind::Data, Some((Stream::Stdin, offset, bytes))) => self.with(frame.channel, |program| program.input.put(offset, bytes)),
            (Kind::Eof, Some((Stream::Stdin, offset, _))) => self.with(frame.channel, |program| program.input.put_end(offset)),
            (Kind::Ack, Some((stream, offset, _))) => self.with(frame.channel, |program| {
                if let Some(output) = program.output(stream) {
                    output.ring.release(offset);
                    output.read(now);
                }
            }),
            (Kind::Put, _) => {
                if let Some((offset, bytes)) = guest::split_offset(frame.body) {
                    self.uploads.put(frame.channel, offset, bytes);
                }
            }
            _ => {}
        }
    }

    fn hello(&mut self, protocol: u32, nonce: u64) {
        self.end_session();
        self.session = true;
        self.bad_frames_told = self.bad_frames;
        // What was cut off in the outbox is ended here, so that the answer begins on a frame's boundary.
        self.outbox.push(slurm_vm_api::frame::DELIMITER);
        self.answers.push_back(ToHost::Hello(GuestHello {
            protocol: protocol.min(PROTOCOL),
            nonce,
            boot_id: read_line("/proc/sys/kernel/random/boot_id"),
            instance: self.instance.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: read_line("/proc/sys/kernel/osrelease"),
            hostname: read_line("/proc/sys/kernel/hostname"),
            bad_frames: self.bad_frames_told,
            programs: self.programs.iter().map(|(id, program)| program.describe(*id)).collect(),
        }));
    }

    fn control(&mut self, message: ToGuest) {
        match message {
            ToGuest::Hello { .. } => {}
            ToGuest::Start { program, spec, script } => self.start(program, spec, script),
            ToGuest::Resume { program, stream, from } => {
                let Some(output) = self.programs.get_mut(&program).and_then(|found| found.output(stream)) else {
                    return;
                };
                let start = from.clamp(output.ring.start(), output.ring.end());
                output.next = Some(start);
                output.eof_sent = false;
                if start != from {
                    self.answers.push_back(ToHost::Lost { program, stream, start });
                }
            }
            ToGuest::Request { id, action } => self.request(id, action),
        }
    }

    fn start(&mut self, program: u32, spec: Upload, script: Option<Upload>) {
        if let Some(known) = self.programs.get_mut(&program) {
            known.started_due = true;
            known.exited_due = known.exited().is_some();
            return;
        }
        match self.try_start(program, spec, script) {
            Ok(started) => {
                self.programs.insert(program, started);
            }
            Err(refused) => {
                start::clean(&self.options.places, program);
                let message = refused.message.chars().take(2000).collect();
                self.answers.push_back(ToHost::Refused {
                    program,
                    reason: refused.reason,
                    message,
                });
            }
        }
    }

    fn try_start(&mut self, program: u32, spec: Upload, script: Option<Upload>) -> Result<Program, start::Refused> {
        let missing = || start::Refused {
            reason: Refusal::Upload,
            message: "an upload is missing or damaged".to_owned(),
        };
        if self.programs.len() >= MAX_PROGRAMS {
            return Err(start::Refused {
                reason: Refusal::TooMany,
                message: format!("{MAX_PROGRAMS} programs are kept already"),
            });
        }
        let text = self.uploads.take(spec, MAX_SPEC_BYTES).ok_or_else(missing)?;
        let script = script
            .map(|upload| self.uploads.take(upload, MAX_SCRIPT_BYTES).ok_or_else(missing))
            .transpose()?;
        let spec: StartSpec = serde_json::from_slice(&text).map_err(|error| start::Refused {
            reason: Refusal::Spec,
            message: error.to_string(),
        })?;
        start::start(&self.options.places, program, spec, script.as_deref())
    }

    fn request(&mut self, id: u64, action: Action) {
        if let Some((_, failed)) = self.done.iter().find(|(done, _)| *done == id) {
            self.answers.push_back(ToHost::Done {
                id,
                failed: failed.clone(),
            });
            return;
        }
        if self.workers.iter().any(|worker| worker.request == Some(id)) {
            return;
        }
        let program = |id| self.programs.get(&id).ok_or(Errno::ESRCH);
        let result = match action {
            Action::Signal {
                program: target,
                signo,
                scope,
            } => program(target).and_then(|found| found.signal(signo, scope == Scope::All)),
            Action::Resize {
                program: target,
                rows,
                cols,
            } => program(target).and_then(|found| found.resize(rows, cols)),
            Action::SetClock { unix_ns } => {
                if let Ok(behind_ns) = admin::clock_behind(unix_ns) {
                    self.answers.push_back(ToHost::ClockWas { behind_ns });
                }
                admin::set_clock(unix_ns)
            }
            Action::SetHostname { name } => admin::set_hostname(&name),
            Action::Ping => Ok(()),
            Action::Forget { program } => {
                self.forget(program);
                Ok(())
            }
            Action::Sync => return self.work(Some(id), admin::sync),
            Action::Freeze => {
                self.thaw_at = Some(Instant::now() + Duration::from_secs(FREEZE_LIMIT_S));
                return self.work(Some(id), || admin::freeze(false));
            }
            Action::Thaw => {
                self.thaw_at = None;
                return self.work(Some(id), || admin::freeze(true));
            }
            Action::Shutdown if self.options.pretend => {
                self.stopping = true;
                Ok(())
            }
            Action::Shutdown => return self.work(Some(id), admin::power_off),
            Action::Unknown => Err(Errno::EOPNOTSUPP),
        };
        self.answer(id, result);
    }

    fn answer(&mut self, id: u64, result: nix::Result<()>) {
        let failed = result.err().map(|errno| Failure {
            errno: errno as i32,
            message: errno.desc().to_owned(),
        });
        if self.done.len() == REMEMBERED {
            self.done.pop_front();
        }
        self.done.push_back((id, failed.clone()));
        if self.session {
            self.answers.push_back(ToHost::Done { id, failed });
        }
    }

    fn work(&mut self, request: Option<u64>, work: impl FnOnce() -> nix::Result<()>) {
        match spawn::worker(work) {
            Ok(pid) => self.workers.push(Worker { pid, request }),
            Err(error) => {
                if let Some(id) = request {
                    self.answer(id, Err(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EAGAIN))));
                }
            }
        }
    }

    fn forget(&mut self, id: u32) {
        if let Some(mut program) = self.programs.remove(&id) {
            let _ = program.signal(libc::SIGKILL, true);
            program.check_leader(Instant::now());
            if !program.leader_ended() {
                // It dies in a moment: reaped like a worker whose result nobody wants.
                self.workers.push(Worker {
                    pid: program.pid,
                    request: None,
                });
            }
        }
        start::clean(&self.options.places, id);
    }

    // ---- to the host ----

    fn send(&mut self, now: Instant) {
        while self.session {
            self.refill();
            if self.sent == self.outbox.len() {
                break;
            }
            let bytes = std::mem::take(&mut self.outbox);
            let moved = self.port.write(&bytes[self.sent..], now);
            self.outbox = bytes;
            match moved {
                Moved::Bytes(written) => self.sent += written,
                Moved::Nothing => break,
                Moved::Gone => self.end_session(),
            }
        }
    }

    fn refill(&mut self) {
        if self.sent == self.outbox.len() {
            self.outbox.clear();
            self.sent = 0;
        }
        if self.outbox.len() >= OUTBOX_BYTES {
            return;
        }
        let out = &mut self.outbox;
        while out.len() < OUTBOX_BYTES
            && let Some(answer) = self.answers.pop_front()
        {
            put_control(out, &answer);
        }
        for id in std::mem::take(&mut self.uploads.ack_due) {
            let _ = guest::put_upload_ack(out, id, self.uploads.len(id));
        }
        for (id, program) in &mut self.programs {
            refill_marks(out, *id, program);
        }
        // The streams in turns, a frame each, beginning behind the one that came last.
        let mut idle = false;
        while out.len() < OUTBOX_BYTES && !idle {
            idle = true;
            let from = self.turn;
            let (before, behind): (Vec<_>, Vec<_>) = self.programs.iter_mut().partition(|(id, _)| **id <= from);
            for (id, program) in behind.into_iter().chain(before) {
                for output in &mut program.outputs {
                    if out.len() >= OUTBOX_BYTES {
                        return;
                    }
                    let Some(next) = output.next else { continue };
                    // An acknowledgement may have overtaken what is being sent again.
                    let next = next.max(output.ring.start());
                    let parts = output.ring.peek(next, MAX_DATA_BYTES);
                    let len = (parts[0].len() + parts[1].len()) as u64;
                    if len > 0 && guest::put_data(out, *id, output.stream, next, parts).is_ok() {
                        idle = false;
                        self.turn = *id;
                    }
                    output.next = Some(next + len);
                    if output.ended() && next + len == output.ring.end() && !output.eof_sent {
                        output.eof_sent = guest::put_mark(out, Kind::Eof, *id, output.stream, next + len).is_ok();
                    }
                }
            }
        }
    }
}

fn refill_marks(out: &mut Vec<u8>, id: u32, program: &mut Program) {
    if program.started_due && program.started() {
        program.started_due = false;
        put_control(
            out,
            &ToHost::Started {
                program: id,
                report: program.report.clone(),
            },
        );
    }
    if program.input.ack_due {
        program.input.ack_due = false;
        let _ = guest::put_mark(out, Kind::Ack, id, Stream::Stdin, program.input.consumed());
    }
    if let (true, Some(status)) = (program.exited_due, program.exited()) {
        program.exited_due = false;
        put_control(
            out,
            &ToHost::Exited {
                program: id,
                status,
                streams: program.streams(),
            },
        );
    }
}

fn put_control(out: &mut Vec<u8>, message: &ToHost) {
    if let Err(error) = guest::put_control(out, message) {
        eprintln!("slurm-vm-guest: failed to send: {error}");
    }
}
