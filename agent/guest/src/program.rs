//! One program: its process, its streams, and what is known of its end.
//!
//! ```text
//! starting (notes' pipe open) -> running -> leader ended -> output drained -> exited, kept until forgotten
//! ```
//!
//! The end of the leader is the end of the program: what lies in its pipes at that moment still counts, but a grandchild that keeps them
//! open delays nothing. The leader stays a zombie until the program is forgotten, so that its pid names nobody else meanwhile.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use slurm_vm_api::guest::{ExitStatus, ProgramReport, ProgramState, RING_BYTES, StartReport, Stream, StreamReport};

use crate::ring::{Filled, Ring};
use crate::spawn::{self, NOTE_BYTES, Note};

/// A terminal passes bytes on by a kernel worker: after the leader's end it must have been silent for so long to count as empty.
const TERMINAL_SILENCE: Duration = Duration::from_millis(100);
/// And no more than this is taken from it then, whatever still writes there.
const TERMINAL_REST: usize = 256 * 1024;

/// How the rest of a stream is drained after the leader's end.
#[derive(Debug, Clone, Copy)]
struct Drain {
    left: usize,
    // For a terminal: when silence has lasted long enough.
    quiet_at: Option<Instant>,
}

/// An output stream.
#[derive(Debug)]
pub struct Output {
    /// Which.
    pub stream: Stream,
    fd: Option<OwnedFd>,
    /// What was written and not acknowledged.
    pub ring: Ring,
    /// Next offset to send; `None` until the host of this session asks.
    pub next: Option<u64>,
    /// The end has been sent in this session.
    pub eof_sent: bool,
    terminal: bool,
    drain: Option<Drain>,
}

impl Output {
    /// An output stream read from `fd`.
    pub fn new(stream: Stream, fd: OwnedFd, ring_bytes: u32, terminal: bool) -> Self {
        Self {
            stream,
            fd: Some(fd),
            ring: Ring::new(ring_bytes as usize),
            next: None,
            eof_sent: false,
            terminal,
            drain: None,
        }
    }

    /// The descriptor to wait on, when there is room for what it has.
    pub fn wants_input(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().filter(|_| self.ring.room() > 0).map(AsFd::as_fd)
    }

    /// No more will come.
    pub fn ended(&self) -> bool {
        self.fd.is_none()
    }

    /// Takes what is there.
    pub fn read(&mut self, now: Instant) {
        // Two reads, because the room in a ring may lie in two parts.
        for _ in 0..2 {
            let Some(fd) = &self.fd else { return };
            let limit = self.drain.map_or(usize::MAX, |drain| drain.left);
            if self.ring.room() == 0 && limit > 0 {
                return;
            }
            let filled = if limit == 0 { Ok(Filled::End) } else { self.ring.fill(fd, limit) };
            match (filled, &mut self.drain) {
                (Ok(Filled::End) | Err(_), _) => self.fd = None,
                (Ok(Filled::Bytes(read)), Some(drain)) => {
                    drain.left -= read;
                    drain.quiet_at = self.terminal.then(|| now + TERMINAL_SILENCE);
                }
                (Ok(Filled::Nothing), Some(drain)) => {
                    if drain.quiet_at.is_none_or(|at| now >= at) {
                        self.fd = None;
                    }
                    return;
                }
                (Ok(Filled::Bytes(_)), None) => {}
                (Ok(Filled::Nothing), None) => return,
            }
        }
    }

    fn begin_drain(&mut self, now: Instant) {
        if let (Some(fd), None) = (&self.fd, self.drain) {
            self.drain = Some(if self.terminal {
                Drain {
                    left: TERMINAL_REST,
                    quiet_at: Some(now + TERMINAL_SILENCE),
                }
            } else {
                Drain {
                    left: spawn::readable_bytes(fd),
                    quiet_at: None,
                }
            });
        }
    }

    fn report(&self) -> StreamReport {
        StreamReport {
            stream: self.stream,
            start: self.ring.start(),
            end: self.ring.end(),
            eof: self.ended(),
            ring_bytes: u32::try_from(self.ring.size()).unwrap_or(u32::MAX),
        }
    }
}

/// Standard input: what the host has sent and the program has not taken.
#[derive(Debug, Default)]
pub struct Input {
    fd: Option<OwnedFd>,
    held: VecDeque<u8>,
    consumed: u64,
    end: Option<u64>,
    terminal: bool,
    /// The host does not know yet what was consumed.
    pub ack_due: bool,
}

impl Input {
    /// Standard input written to `fd`.
    pub fn new(fd: OwnedFd, terminal: bool) -> Self {
        Self {
            fd: Some(fd),
            terminal,
            ..Self::default()
        }
    }

    /// What the program has taken.
    pub fn consumed(&self) -> u64 {
        self.consumed
    }

    /// The descriptor to wait on, when there is something for it.
    pub fn wants_output(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().filter(|_| !self.held.is_empty()).map(AsFd::as_fd)
    }

    /// Bytes from the host. What is here already is skipped, what lies beyond a gap or the window is dropped: the host sends it again from
    /// what was consumed.
    pub fn put(&mut self, offset: u64, bytes: &[u8]) {
        let received = self.consumed + self.held.len() as u64;
        let Some(skip) = received.checked_sub(offset).and_then(|skip| usize::try_from(skip).ok()) else {
            return;
        };
        let Some(new) = bytes.get(skip..) else { return };
        if self.fd.is_none() {
            // Nobody reads any more. As with a shell's pipe, that is the writer's business only when it would block: it never does here.
            self.consumed += new.len() as u64;
            self.ack_due = true;
            return;
        }
        let room = (RING_BYTES as usize).saturating_sub(self.held.len());
        self.held.extend(&new[..new.len().min(room)]);
        self.write();
    }

    /// The host will send nothing from `offset` on.
    pub fn put_end(&mut self, offset: u64) {
        self.end = Some(offset);
        self.write();
    }

    /// Gives the program what it takes.
    pub fn write(&mut self) {
        while let (Some(fd), false) = (&self.fd, self.held.is_empty()) {
            match nix::unistd::write(fd, self.held.as_slices().0) {
                Ok(written) => {
                    self.held.drain(..written);
                    self.consumed += written as u64;
                    self.ack_due = true;
                }
                Err(Errno::EAGAIN | Errno::EINTR) => return,
                Err(_) => self.close(),
            }
        }
        if self.end == Some(self.consumed) && self.fd.is_some() {
            if self.terminal {
                // A terminal has no end of file, only the character for it. Should the line discipline be full the program is not reading.
                let _ = self.fd.as_ref().map(|fd| nix::unistd::write(fd, b"\x04"));
                self.end = None;
            } else {
                self.close();
            }
        }
    }

    fn close(&mut self) {
        self.fd = None;
        self.consumed += self.held.len() as u64;
        self.held = VecDeque::new();
        self.ack_due = true;
    }
}

/// A program that was started.
#[derive(Debug)]
pub struct Program {
    /// Its first process and the id of its session.
    pub pid: i32,
    /// How its start went.
    pub report: StartReport,
    /// Its output streams.
    pub outputs: Vec<Output>,
    /// Its standard input.
    pub input: Input,
    /// A terminal to set the size of.
    pub terminal: Option<OwnedFd>,
    /// Names of the limits asked for, by their place in the child's list.
    pub limit_names: Vec<String>,
    /// The host of this session is owed a word on the start.
    pub started_due: bool,
    /// The host of this session is owed a word on the end.
    pub exited_due: bool,
    notes: Option<OwnedFd>,
    note_bytes: Vec<u8>,
    exec_failed: Option<ExitStatus>,
    leader: Option<ExitStatus>,
    exited: Option<ExitStatus>,
}

impl Program {
    /// A program whose child was forked just now.
    pub fn new(pid: i32, notes: OwnedFd, outputs: Vec<Output>, input: Input, terminal: Option<OwnedFd>) -> Self {
        Self {
            pid,
            report: StartReport {
                pid,
                ..StartReport::default()
            },
            outputs,
            input,
            terminal,
            limit_names: Vec::new(),
            started_due: false,
            exited_due: false,
            notes: Some(notes),
            note_bytes: Vec::new(),
            exec_failed: None,
            leader: None,
            exited: None,
        }
    }

    /// The notes' pipe, while it is open.
    pub fn wants_notes(&self) -> Option<BorrowedFd<'_>> {
        self.notes.as_ref().map(AsFd::as_fd)
    }

    /// It runs, or was shown not to.
    pub fn started(&self) -> bool {
        self.notes.is_none()
    }

    /// How it ended, when all its output is in the rings.
    pub fn exited(&self) -> Option<ExitStatus> {
        self.exited
    }

    /// The leader has ended.
    pub fn leader_ended(&self) -> bool {
        self.leader.is_some()
    }

    /// Reads the notes' pipe.
    pub fn read_notes(&mut self) {
        let mut buf = [0; 16 * NOTE_BYTES];
        while let Some(fd) = &self.notes {
            match nix::unistd::read(fd, &mut buf) {
                Err(Errno::EAGAIN | Errno::EINTR) => return,
                Ok(read) if read > 0 => self.note_bytes.extend_from_slice(&buf[..read]),
                Ok(_) | Err(_) => {
                    self.notes = None;
                    self.take_notes();
                }
            }
        }
    }

    fn take_notes(&mut self) {
        for chunk in std::mem::take(&mut self.note_bytes).chunks_exact(NOTE_BYTES) {
            match chunk.try_into().ok().and_then(Note::from_bytes) {
                Some(Note::Directory(errno)) => self.report.cwd_errno = Some(errno),
                Some(Note::Limit(index)) => self.report.limits_refused.extend(self.limit_names.get(index).cloned()),
                Some(Note::Fatal(step, errno)) => self.exec_failed = Some(ExitStatus::ExecFailed { step, errno }),
                None => {}
            }
        }
        self.started_due = true;
    }

    /// Looks whether the leader has ended.
    pub fn check_leader(&mut self, now: Instant) {
        if self.leader.is_none()
            && let Some(status) = spawn::peek_exit(self.pid)
        {
            self.leader = Some(status);
            self.read_notes();
            for output in &mut self.outputs {
                output.begin_drain(now);
            }
            self.input.close();
        }
    }

    /// Moves on after anything has happened to it.
    pub fn settle(&mut self, now: Instant) {
        if self.exited.is_some() || self.leader.is_none() {
            return;
        }
        for output in &mut self.outputs {
            output.read(now);
        }
        if self.started() && self.outputs.iter().all(Output::ended) {
            self.exited = self.exec_failed.or(self.leader);
            self.exited_due = true;
            self.terminal = None;
        }
    }

    /// When it has to be looked at again though nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        let waiting = |output: &&Output| !output.ended() && output.ring.room() > 0;
        self.outputs
            .iter()
            .filter(waiting)
            .filter_map(|output| output.drain?.quiet_at)
            .min()
    }

    /// A new session, or none: nothing is owed and nothing flows until it is asked for.
    pub fn quiet(&mut self) {
        self.started_due = false;
        self.exited_due = false;
        self.input.ack_due = false;
        for output in &mut self.outputs {
            output.next = None;
            output.eof_sent = false;
        }
    }

    /// The stream's output, if the program has one.
    pub fn output(&mut self, stream: Stream) -> Option<&mut Output> {
        self.outputs.iter_mut().find(|output| output.stream == stream)
    }

    /// Its streams.
    pub fn streams(&self) -> Vec<StreamReport> {
        self.outputs.iter().map(Output::report).collect()
    }

    /// All that is known of it.
    pub fn describe(&self, program: u32) -> ProgramReport {
        ProgramReport {
            program,
            state: self.exited.map_or(ProgramState::Running, |status| ProgramState::Exited { status }),
            report: self.report.clone(),
            stdin_consumed: self.input.consumed(),
            streams: self.streams(),
        }
    }

    /// Sends a signal. `ESRCH` when there is nobody to get it.
    pub fn signal(&self, signo: i32, all: bool) -> nix::Result<()> {
        if all {
            crate::processes::signal_all(self.pid, signo)
        } else if self.leader.is_some() {
            Err(Errno::ESRCH)
        } else {
            spawn::kill(self.pid, signo)
        }
    }

    /// Sets its terminal's size.
    pub fn resize(&self, rows: u16, cols: u16) -> nix::Result<()> {
        self.terminal
            .as_ref()
            .map_or(Err(Errno::ENOTTY), |fd| spawn::set_window(fd, rows, cols))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if self.leader.is_some() {
            spawn::reap(self.pid);
        }
    }
}

/// A pipe whose end in the helper does not block.
pub fn pipe(helper_reads: bool) -> io::Result<(OwnedFd, OwnedFd)> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    let ours = if helper_reads { &reader } else { &writer };
    fcntl(ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((reader, writer))
}
