//! The programs of one VM and the sessions (shims) attached to them: who has got which byte.
//!
//! For each output stream the guest numbers the bytes. `received` is the next byte expected from the guest, `wrote`
//! what a shim has reported on its descriptor. With a shim attached, bytes pass straight through and the guest is told
//! of them only when the shim has written them: a crash of the agent loses nothing, the guest's ring still has it.
//! Without one (the job is between two nodes), they go to a [`Spool`] on disk, bounded, so that the program does not
//! stall; the spool shares the fate of the VM on this node and is therefore not synced. Runs on the VM's owner thread.
use std::{collections::HashMap, path::PathBuf};

use slurm_vm_api::{
    guest::{self, ExitStatus},
    session::{self, Ended, Frame, Open, Sink, Stream, StreamStart, ToShim},
};

use super::{outbox::ToSession, place::Place, spool::Spool};
use crate::{
    core::{
        KeptOutput, ProgramRecord,
        record::{is_of_another_run, program_key},
    },
    limits::Held,
};

/// So many bytes that are kept are left in the guest's ring, too: half of it. What keeps them may be lost.
const KEPT_IN_RING: u64 = guest::RING_BYTES as u64 / 2;

/// How many bytes of a spool are under way to a shim at a time.
const PUMP_WINDOW: u64 = 256 << 10;

/// Output that was kept for a shim, to travel with a move or a save: program, stream index, offset of the first byte, bytes.
pub type Kept = (u32, usize, u64, Vec<u8>);

impl From<Kept> for KeptOutput {
    fn from((program, stream, offset, bytes): Kept) -> Self {
        Self {
            program,
            stream,
            offset,
            bytes,
        }
    }
}

/// What a session brings.
#[derive(Debug)]
pub struct Attach {
    /// Unique in the process.
    pub session: u64,
    /// The request.
    pub open: Open,
    /// `KEY=VALUE` NUL-terminated.
    pub environment: Vec<u8>,
    /// NUL-terminated.
    pub arguments: Vec<u8>,
    /// The batch script's text.
    pub script: Option<Vec<u8>>,
    /// What those take of its user's account; kept until the guest has them.
    pub held: Option<Held>,
    /// Towards the shim.
    pub to: ToSession,
}

/// What a program is started with, until it has been.
#[derive(Debug)]
struct Start {
    spec: Box<guest::StartSpec>,
    script: Option<Vec<u8>>,
    _held: Option<Held>,
}

impl Start {
    fn of(a: Attach) -> Self {
        Self {
            spec: Box::new(start_spec(&a)),
            script: a.script,
            _held: a.held,
        }
    }
}

/// What is to be sent to the guest.
#[derive(Debug, Clone, PartialEq)]
pub enum ToGuest {
    /// Upload and start a program.
    Start {
        /// Its number.
        program: u32,
        /// What to run.
        spec: Box<guest::StartSpec>,
        /// Its script.
        script: Option<Vec<u8>>,
    },
    /// Ask for a stream from an offset on.
    Resume {
        /// Program.
        program: u32,
        /// Stream.
        stream: guest::Stream,
        /// First byte wanted.
        from: u64,
    },
    /// Bytes below this offset are safe.
    Ack {
        /// Program.
        program: u32,
        /// Stream.
        stream: guest::Stream,
        /// First byte still wanted.
        offset: u64,
    },
    /// Input.
    Stdin {
        /// Program.
        program: u32,
        /// Offset of the first byte.
        offset: u64,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// End of input.
    StdinEof {
        /// Program.
        program: u32,
        /// Length of the input.
        offset: u64,
    },
    /// A signal.
    Signal {
        /// Program.
        program: u32,
        /// Signal number.
        signo: i32,
        /// Leader or all.
        scope: guest::Scope,
    },
    /// Terminal size.
    Resize {
        /// Program.
        program: u32,
        /// Rows.
        rows: u16,
        /// Columns.
        cols: u16,
    },
}

#[derive(Debug)]
struct Output {
    received: u64,
    wrote: u64,
    /// Where the stream ends, once the guest has said so: to this agent, for it is not on record.
    end: Option<u64>,
    spool: Spool,
    /// Next byte of the spool to go to the shim.
    pumped: u64,
}

impl Output {
    /// The guest's ring begins there: what came before was acknowledged, so it was written (or kept) by an agent that died before it
    /// could put that on record or hand it over. True if that is news.
    fn skip_to(&mut self, start: u64) -> bool {
        if start <= self.received.max(self.spool.end()) {
            return false;
        }
        self.received = start;
        self.wrote = start;
        self.pumped = start;
        self.spool.clear();
        true
    }
}

#[derive(Debug)]
struct Program {
    record: ProgramRecord,
    batch: bool,
    started: bool,
    /// Its output file holds what an earlier shim has written of it, and is not emptied.
    resumed: bool,
    session: Option<u64>,
    start: Option<Start>,
    /// For the message when it cannot be started.
    argv0: String,
    outputs: [Output; 2],
    ended: Option<Ended>,
    note: Option<String>,
    told_start: bool,
    told_end: bool,
    /// The link of now delivers its output.
    followed: bool,
}

/// All programs and sessions of one VM.
#[derive(Debug)]
pub struct Programs {
    list: Vec<Program>,
    sessions: HashMap<u64, ToSession>,
    dir: PathBuf,
    spool_limit: u64,
    guest_up: bool,
    next_id: u32,
    complaints: Vec<String>,
    place: Place,
}

const OUTPUTS: [guest::Stream; 2] = [guest::Stream::Stdout, guest::Stream::Stderr];

fn index(stream: guest::Stream) -> Option<usize> {
    match stream {
        guest::Stream::Stdin => None,
        guest::Stream::Stdout => Some(0),
        guest::Stream::Stderr => Some(1),
    }
}

fn to_session(i: usize) -> Stream {
    if i == 0 { Stream::Stdout } else { Stream::Stderr }
}

impl Programs {
    /// The programs of a record; `dir` takes the spools, each of at most `spool_limit` bytes.
    #[must_use]
    pub fn new(records: &[ProgramRecord], dir: PathBuf, spool_limit: u64) -> Self {
        let mut programs = Self {
            list: Vec::new(),
            sessions: HashMap::new(),
            dir,
            spool_limit,
            guest_up: false,
            next_id: 1,
            complaints: Vec::new(),
            place: Place::default(),
        };
        for r in records {
            programs.adopt(r);
        }
        programs
    }

    /// Says where programs run that are started from now on.
    pub fn run_in(&mut self, place: Place) {
        self.place = place;
    }

    /// Takes in a record of a program that runs in the guest already (agent restarted, VM moved).
    pub fn adopt(&mut self, r: &ProgramRecord) {
        self.next_id = self.next_id.max(r.id + 1);
        if let Some(mine) = self.list.iter_mut().find(|p| p.record.id == r.id) {
            for i in 0..2 {
                let o = &mut mine.outputs[i];
                // A shim here that got more may have written it.
                if o.wrote.max(o.pumped) <= r.wrote[i] {
                    let (here, there) = if i == 0 {
                        (&mut mine.record.stdout, &r.stdout)
                    } else {
                        (&mut mine.record.stderr, &r.stderr)
                    };
                    here.clone_from(there);
                }
                o.wrote = o.wrote.max(r.wrote[i]);
                if o.wrote > o.pumped {
                    // Its shim learns that these bytes are in the file.
                    o.pumped = o.wrote;
                    mine.told_start = false;
                }
                o.received = o.received.max(o.wrote).max(o.spool.end());
            }
            if r.started && !mine.started {
                (mine.started, mine.resumed) = (true, true);
            }
            mine.ended = mine.ended.take().or_else(|| r.ended.clone());
            self.progress(&mut Vec::new());
            return;
        }
        let output = |i: usize| {
            let spool = Spool::open(&self.dir, r.id, i, self.spool_limit);
            let received = spool.end().max(r.wrote[i]);
            Output {
                received,
                wrote: r.wrote[i],
                end: None,
                pumped: r.wrote[i],
                spool,
            }
        };
        self.list.push(Program {
            batch: r.key.starts_with("batch."),
            outputs: [output(0), output(1)],
            ended: r.ended.clone(),
            record: r.clone(),
            started: r.started,
            resumed: r.started,
            session: None,
            start: None,
            argv0: String::new(),
            note: None,
            told_start: false,
            told_end: false,
            followed: false,
        });
    }

    /// The records, with what has been written so far.
    #[must_use]
    pub fn records(&self) -> Vec<ProgramRecord> {
        self.list
            .iter()
            .map(|p| ProgramRecord {
                wrote: [p.outputs[0].wrote, p.outputs[1].wrote],
                ended: p.ended.clone(),
                started: p.started,
                ..p.record.clone()
            })
            .collect()
    }

    /// Some program still runs or has output that nobody took.
    #[must_use]
    pub fn attached(&self) -> bool {
        !self.sessions.is_empty()
    }

    /// The program is the batch script.
    #[must_use]
    pub fn is_batch(&self, program: u32) -> bool {
        self.list.iter().any(|p| p.record.id == program && p.batch)
    }

    /// How the batch script ended, if it has.
    #[must_use]
    pub fn batch_ended(&self) -> Option<Ended> {
        self.list.iter().find(|p| p.batch).and_then(|p| p.ended.clone())
    }

    /// A session opens. `true` in the result: the records changed and must be persisted before the requests are sent. `run`: the job's present one.
    pub fn attach(&mut self, a: Attach, run: u64) -> (bool, Vec<ToGuest>) {
        let key = program_key(a.open.step, a.open.task, run);
        self.sessions.insert(a.session, a.to.clone());
        let mut requests = self.end_steps_before(run);
        if let Some(p) = self.list.iter_mut().find(|p| p.record.key == key) {
            if let Some(old) = p.session.replace(a.session).filter(|old| *old != a.session) {
                self.sessions.remove(&old);
            }
            p.told_start = false;
            p.told_end = false;
            if !a.open.resume.is_empty() {
                // It has perhaps written since, for an agent that could not put that on record.
                unseal(&mut p.record, 0);
                unseal(&mut p.record, 1);
            }
            for (i, stream) in OUTPUTS.into_iter().enumerate() {
                let o = &mut p.outputs[i];
                let from = a
                    .open
                    .resume
                    .iter()
                    .find(|(s, _)| *s == to_session(i))
                    .map_or(o.wrote, |(_, offset)| *offset);
                o.wrote = o.wrote.max(from);
                o.pumped = from;
                if !o.spool.covers(from) {
                    o.spool.clear();
                    o.received = from;
                    if self.guest_up && p.started {
                        requests.push(ToGuest::Resume {
                            program: p.record.id,
                            stream,
                            from,
                        });
                    }
                }
            }
            // A shim that comes back over the same file keeps its own idea of it; a new one learns the old one's.
            if a.open.resume.is_empty() && !p.started {
                p.start = Some(Start::of(a));
            }
        } else {
            let id = self.next_id;
            self.next_id += 1;
            let sink = |s: &Sink| s.regular.then(|| s.clone());
            let record = ProgramRecord {
                id,
                key,
                merged: a.open.merge_stderr,
                terminal: a.open.terminal.is_some(),
                stdout: sink(&a.open.stdout),
                stderr: sink(&a.open.stderr),
                wrote: [0, 0],
                ended: None,
                started: false,
            };
            let output = |i| {
                let mut spool = Spool::open(&self.dir, id, i, self.spool_limit);
                spool.clear();
                Output {
                    received: 0,
                    wrote: 0,
                    end: None,
                    pumped: 0,
                    spool,
                }
            };
            self.list.push(Program {
                outputs: [output(0), output(1)],
                batch: record.key.starts_with("batch."),
                record,
                started: false,
                resumed: false,
                session: Some(a.session),
                argv0: String::from_utf8_lossy(a.arguments.split(|b| *b == 0).next().unwrap_or_default()).into_owned(),
                start: Some(Start::of(a)),
                ended: None,
                note: None,
                told_start: false,
                told_end: false,
                followed: false,
            });
            self.start_pending(&mut requests);
            return (true, requests);
        }
        self.start_pending(&mut requests);
        self.progress(&mut requests);
        (false, requests)
    }

    /// Steps end with the run of their job; in the guest nobody has told them.
    fn end_steps_before(&self, run: u64) -> Vec<ToGuest> {
        let left = self
            .list
            .iter()
            .filter(|p| p.ended.is_none() && is_of_another_run(&p.record.key, run));
        left.map(|p| ToGuest::Signal {
            program: p.record.id,
            signo: nix::libc::SIGKILL,
            scope: guest::Scope::All,
        })
        .collect()
    }

    fn start_pending(&mut self, requests: &mut Vec<ToGuest>) {
        if !self.guest_up {
            return;
        }
        for p in self.list.iter().filter(|p| !p.started) {
            if let Some(start) = &p.start {
                requests.push(ToGuest::Start {
                    program: p.record.id,
                    spec: Box::new(self.place.of(&start.spec)),
                    script: start.script.clone(),
                });
            }
        }
    }

    /// The session's connection is gone.
    pub fn detach(&mut self, session: u64) {
        self.sessions.remove(&session);
        for p in &mut self.list {
            if p.session == Some(session) {
                p.session = None;
                for o in &mut p.outputs {
                    // What was on its way to the shim and never reported is asked for again by whoever comes next.
                    o.pumped = o.wrote;
                    if o.spool.is_empty() {
                        o.received = o.wrote;
                    }
                }
            }
        }
    }

    /// The guest answers (again): start what waits, go on with what runs.
    pub fn guest_up(&mut self, hello: &[guest::ProgramReport]) -> Vec<ToGuest> {
        self.guest_up = true;
        let mut requests = Vec::new();
        for p in &mut self.list {
            let Some(report) = hello.iter().find(|r| r.program == p.record.id) else {
                if p.start.is_none() && p.started {
                    p.ended.get_or_insert_with(|| Ended::NotStarted {
                        errno: libc::ESRCH,
                        path: "the guest does not know the program any more".into(),
                    });
                    p.outputs.iter_mut().for_each(|o| o.end = o.end.or(Some(o.received)));
                }
                continue;
            };
            if !p.started {
                // By an agent that died before it could put that on record. As long as the guest has all of the output, it is written anew.
                p.resumed = report.streams.iter().any(|s| s.start > 0);
            }
            p.started = true;
            p.start = None;
            if !p.followed {
                // A new link: everything below `received` has been written or is kept.
                p.followed = true;
                for s in &report.streams {
                    if let Some(i) = index(s.stream) {
                        let from = p.outputs[i].received;
                        if p.outputs[i].skip_to(s.start) {
                            p.told_start = false;
                            self.complaints.push(format!(
                                "program {}: bytes {from} to {} of its {:?} were acknowledged without a record of who has them",
                                p.record.id, s.start, s.stream
                            ));
                        }
                        requests.push(ToGuest::Resume {
                            program: p.record.id,
                            stream: s.stream,
                            from: p.outputs[i].received,
                        });
                    }
                }
            }
        }
        self.start_pending(&mut requests);
        self.progress(&mut requests);
        requests
    }

    /// The connection to the guest is down.
    pub fn guest_down(&mut self) {
        self.guest_up = false;
    }

    /// The link was dropped: the next one has to be told where to go on.
    pub fn link_gone(&mut self) {
        self.guest_up = false;
        self.list.iter_mut().for_each(|p| p.followed = false);
    }

    /// The guest has started a program, now or before.
    pub fn started(&mut self, program: u32, report: &guest::StartReport) -> Vec<ToGuest> {
        let mut requests = Vec::new();
        if let Some(p) = self.list.iter_mut().find(|p| p.record.id == program) {
            // The link follows the output of what it starts from the beginning.
            p.started = true;
            p.followed = true;
            p.start = None;
            if report.cwd_errno.is_some() {
                p.note =
                    Some("the submit directory is not in the guest: the program runs in /, files written there end with the job".into());
            }
        }
        self.progress(&mut requests);
        requests
    }

    /// A line for the journal about a program's start, once.
    pub fn take_note(&mut self, program: u32) -> Option<String> {
        self.list.iter_mut().find(|p| p.record.id == program).and_then(|p| p.note.take())
    }

    /// The guest does not know a program any more.
    pub fn lost(&mut self, program: u32) {
        self.refused(program, "the guest does not know the program any more");
    }

    /// The guest could not start a program.
    pub fn refused(&mut self, program: u32, why: &str) {
        if let Some(p) = self.list.iter_mut().find(|p| p.record.id == program) {
            p.ended = Some(Ended::NotStarted {
                errno: 0,
                path: why.into(),
            });
            p.outputs.iter_mut().for_each(|o| o.end = Some(o.received));
        }
        self.progress(&mut Vec::new());
    }

    /// Output from the guest.
    pub fn data(&mut self, program: u32, stream: guest::Stream, offset: u64, bytes: &[u8]) -> Vec<ToGuest> {
        let mut requests = Vec::new();
        let (Some(p), Some(i)) = (self.list.iter_mut().find(|p| p.record.id == program), index(stream)) else {
            return requests;
        };
        let o = &mut p.outputs[i];
        let skip = o.received.saturating_sub(offset);
        if offset > o.received {
            requests.push(ToGuest::Resume {
                program,
                stream,
                from: o.received,
            });
            return requests;
        }
        let Some(fresh) = usize::try_from(skip).ok().and_then(|s| bytes.get(s..)).filter(|f| !f.is_empty()) else {
            return requests;
        };
        let session = p.session.and_then(|s| self.sessions.get(&s));
        match session {
            Some(to) if o.spool.is_empty() && p.told_start => {
                unseal(&mut p.record, i);
                for chunk in fresh.chunks(session::MAX_DATA) {
                    to.send(Frame::Data {
                        stream: to_session(i),
                        offset: o.received,
                        bytes: chunk.to_vec(),
                    });
                    o.received += chunk.len() as u64;
                }
                o.pumped = o.received;
            }
            _ => {
                let had = o.received;
                o.received += o.spool.append(o.received, fresh);
                let acked = had.saturating_sub(KEPT_IN_RING).max(o.wrote);
                let offset = o.received.saturating_sub(KEPT_IN_RING);
                if offset > acked {
                    requests.push(ToGuest::Ack { program, stream, offset });
                }
            }
        }
        self.progress(&mut requests);
        requests
    }

    /// The guest no longer has what was asked for: its ring begins at `start`. The shim is told to go on there.
    pub fn lost_before(&mut self, program: u32, stream: guest::Stream, start: u64) -> Vec<ToGuest> {
        let mut requests = Vec::new();
        let found = self.list.iter_mut().find(|p| p.record.id == program);
        if let (Some(p), Some(i)) = (found, index(stream))
            && p.outputs[i].skip_to(start)
        {
            log::warn!("program {program}: goes on at byte {start} of its output, all before it was acknowledged");
            p.told_start = false;
            self.progress(&mut requests);
        }
        requests
    }

    /// A program has ended.
    pub fn exited(&mut self, program: u32, status: ExitStatus, ends: &[(guest::Stream, u64)]) -> Vec<ToGuest> {
        let mut requests = Vec::new();
        if let Some(p) = self.list.iter_mut().find(|p| p.record.id == program) {
            set_end(p, status, ends);
        }
        self.progress(&mut requests);
        requests
    }

    /// The guest has taken input.
    pub fn stdin_taken(&self, program: u32, offset: u64) {
        if let Some(p) = self.list.iter().find(|p| p.record.id == program) {
            self.tell(p, ToShim::StdinTaken { offset });
        }
    }

    /// A shim reports bytes written.
    pub fn wrote(&mut self, session: u64, stream: Stream, offset: u64) -> Vec<ToGuest> {
        let mut requests = Vec::new();
        let i = match stream {
            Stream::Stdin => return requests,
            Stream::Stdout => 0,
            Stream::Stderr => 1,
        };
        if let Some(p) = self.list.iter_mut().find(|p| p.session == Some(session)) {
            let o = &mut p.outputs[i];
            // What has not been sent to it, it cannot have written.
            let offset = offset.min(o.pumped);
            if offset > o.wrote {
                o.wrote = offset;
                if o.spool.is_empty() || offset > o.received.saturating_sub(KEPT_IN_RING) {
                    requests.push(ToGuest::Ack {
                        program: p.record.id,
                        stream: OUTPUTS[i],
                        offset,
                    });
                }
                if !o.spool.is_empty() && o.wrote >= o.spool.end() {
                    // Everything kept has arrived: from here on bytes pass straight through again.
                    o.spool.clear();
                    o.received = o.received.max(o.wrote);
                    requests.push(ToGuest::Resume {
                        program: p.record.id,
                        stream: OUTPUTS[i],
                        from: o.received,
                    });
                }
            }
        }
        self.progress(&mut requests);
        requests
    }

    /// A shim has handed over: its files as it left them.
    pub fn sealed(&mut self, session: u64, sinks: &[(Stream, Sink)]) {
        if let Some(p) = self.list.iter_mut().find(|p| p.session == Some(session)) {
            for (stream, sink) in sinks.iter().filter(|(_, s)| s.regular) {
                match stream {
                    Stream::Stdin => {}
                    Stream::Stdout => p.record.stdout = Some(sink.clone()),
                    Stream::Stderr => p.record.stderr = Some(sink.clone()),
                }
            }
        }
    }

    /// The program of a session, and whether it is the batch script.
    #[must_use]
    pub fn of_session(&self, session: u64) -> Option<(u32, bool)> {
        self.list
            .iter()
            .find(|p| p.session == Some(session))
            .map(|p| (p.record.id, p.batch))
    }

    /// Tells all shims.
    pub fn tell_all(&self, message: &ToShim) {
        for to in self.sessions.values() {
            to.send(Frame::Control(message.clone()));
        }
    }

    /// Tells one shim.
    pub fn tell_session(&self, session: u64, message: ToShim) {
        if let Some(to) = self.sessions.get(&session) {
            to.send(Frame::Control(message));
        }
    }

    /// The way to a session's shim.
    #[must_use]
    pub fn sender(&self, session: u64) -> Option<ToSession> {
        self.sessions.get(&session).cloned()
    }

    /// Tells the shims whose program has not ended.
    pub fn fail_unfinished(&self, message: &ToShim) {
        for p in self.list.iter().filter(|p| !p.told_end) {
            self.tell(p, message.clone());
        }
    }

    /// Kept output of all programs, to travel with a move: program, stream index, offset, bytes.
    #[must_use]
    pub fn spools(&mut self) -> Vec<Kept> {
        let mut kept = Vec::new();
        for p in &self.list {
            for (i, o) in p.outputs.iter().enumerate() {
                match o.spool.take_all() {
                    Ok(Some((offset, bytes))) => kept.push((p.record.id, i, offset, bytes)),
                    Ok(None) => {}
                    Err(e) => self
                        .complaints
                        .push(format!("program {}: what was kept of its output cannot be read: {e}", p.record.id)),
                }
            }
        }
        kept
    }

    /// The VM is over here and nobody reads any more: what was kept is of no use, and must not be found by a VM that comes back.
    pub fn forget_spools(&mut self) {
        for o in self.list.iter_mut().flat_map(|p| p.outputs.iter_mut()) {
            o.spool.clear();
        }
    }

    /// Takes in a piece of output that was kept at the source of a move; before [`Programs::adopt`] of its offsets. A piece may
    /// come again, when the answer to it was lost.
    pub fn take_spool(&mut self, program: u32, stream: usize, offset: u64, bytes: &[u8]) {
        let found = self.list.iter_mut().find(|p| p.record.id == program);
        let Some(o) = found.and_then(|p| p.outputs.get_mut(stream)) else {
            let line = format!(
                "{} kept bytes of program {program}, which is not known here, are dropped",
                bytes.len()
            );
            return self.complaints.push(line);
        };
        let mut fresh = bytes;
        if o.spool.covers(offset) {
            match o.spool.read(offset, bytes.len()) {
                Ok(had) if bytes.starts_with(&had) => fresh = &bytes[had.len()..],
                had => {
                    let why = had.map_or_else(|e| e.to_string(), |_| "it is of another run".into());
                    let line = format!("program {program}: what was kept of its output here is dropped: {why}");
                    self.complaints.push(line);
                    o.spool.clear();
                }
            }
        } else if !o.spool.is_empty() {
            self.complaints.push(format!(
                "program {program}: what was kept of its output ends at byte {} and goes on at {offset}; the older part is dropped",
                o.spool.end()
            ));
            o.spool.clear();
        }
        let at = offset + (bytes.len() - fresh.len()) as u64;
        if !fresh.is_empty()
            && let Err(e) = o.spool.take_over(at, fresh)
        {
            self.complaints.push(format!(
                "program {program}: {} kept bytes of its output found no room on the disk and are in memory: {e}",
                fresh.len()
            ));
        }
        // The guest's ring has the end of it as well: it goes on behind what is kept.
        o.received = o.received.max(o.spool.end());
    }

    /// Lines for the VM's journal.
    pub fn take_complaints(&mut self) -> Vec<String> {
        std::mem::take(&mut self.complaints)
    }

    /// Sessions attached now.
    #[must_use]
    pub fn session_ids(&self) -> Vec<u64> {
        self.sessions.keys().copied().collect()
    }

    fn tell(&self, p: &Program, message: ToShim) {
        if let Some(to) = p.session.and_then(|s| self.sessions.get(&s)) {
            to.send(Frame::Control(message));
        }
    }

    /// Sends what has become due: start, kept output, end.
    fn progress(&mut self, requests: &mut Vec<ToGuest>) {
        for p in &mut self.list {
            let Some(to) = p.session.and_then(|s| self.sessions.get(&s)) else {
                continue;
            };
            if !p.told_start && (p.started || p.ended.is_some()) {
                let sinks = [p.record.stdout.clone(), p.record.stderr.clone()];
                // Merged streams have one file: stderr's offset 0 there would cut it to nothing.
                let streams = if p.record.merged || p.record.terminal { 1 } else { 2 };
                let from = (0..streams)
                    .map(|i| StreamStart {
                        stream: to_session(i),
                        offset: p.outputs[i].pumped,
                        sink: sinks[i].clone(),
                    })
                    .collect();
                to.send(Frame::Control(ToShim::Started { from, resumed: p.resumed }));
                p.told_start = true;
            }
            if !p.told_start {
                continue;
            }
            for (i, stream) in OUTPUTS.into_iter().enumerate() {
                let o = &mut p.outputs[i];
                while !o.spool.is_empty() && o.pumped < o.spool.end() && o.pumped < o.wrote + PUMP_WINDOW {
                    match o.spool.read(o.pumped, session::MAX_DATA) {
                        Ok(bytes) if !bytes.is_empty() => {
                            unseal(&mut p.record, i);
                            let n = bytes.len() as u64;
                            to.send(Frame::Data {
                                stream: to_session(i),
                                offset: o.pumped,
                                bytes,
                            });
                            o.pumped += n;
                        }
                        _ => break,
                    }
                }
                if !o.spool.is_empty() && o.pumped >= o.spool.end() && o.wrote >= o.spool.end() {
                    o.spool.clear();
                    requests.push(ToGuest::Resume {
                        program: p.record.id,
                        stream,
                        from: o.received,
                    });
                }
            }
            if !p.told_end
                && let Some(ended) = &p.ended
                && p.outputs.iter().all(|o| o.end.is_some_and(|end| o.pumped >= end))
            {
                to.send(Frame::Control(ToShim::Exited(ended.clone())));
                p.told_end = true;
            }
        }
    }
}

/// The shim gets bytes (again): where its file ended at a hand-over no longer tells what is its own.
fn unseal(record: &mut ProgramRecord, stream: usize) {
    let sink = if stream == 0 { &mut record.stdout } else { &mut record.stderr };
    if let Some(sink) = sink {
        sink.end = None;
    }
}

/// A guest's exit status as a shim is told.
#[must_use]
pub fn ended(status: ExitStatus, argv0: &str) -> Ended {
    match status {
        ExitStatus::Code { code } => Ended::Code(code),
        ExitStatus::Signal { signo, .. } => Ended::Signal(signo),
        ExitStatus::ExecFailed {
            step: guest::ExecStep::Directory,
            errno,
        } => Ended::NotStarted {
            errno,
            path: "the working directory".into(),
        },
        ExitStatus::ExecFailed { errno, .. } => Ended::NotStarted { errno, path: argv0.into() },
    }
}

fn set_end(p: &mut Program, status: ExitStatus, ends: &[(guest::Stream, u64)]) {
    p.ended = Some(ended(status, &p.argv0));
    // A stream that the guest does not have (merged, a terminal) ends where it is.
    p.outputs.iter_mut().for_each(|o| o.end = Some(o.received));
    for (stream, end) in ends {
        if let Some(i) = index(*stream) {
            p.outputs[i].end = Some(*end);
        }
    }
}

fn split_nul(bytes: &[u8]) -> Vec<guest::ByteString> {
    bytes
        .split_inclusive(|b| *b == 0)
        .map(|part| guest::ByteString(part.strip_suffix(&[0]).unwrap_or(part).to_vec()))
        .collect()
}

/// Names of RLIMIT_* by number (Linux x86-64, asm-generic/resource.h).
const LIMIT_NAMES: [&str; 16] = [
    "CPU",
    "FSIZE",
    "DATA",
    "STACK",
    "CORE",
    "RSS",
    "NPROC",
    "NOFILE",
    "MEMLOCK",
    "AS",
    "LOCKS",
    "SIGPENDING",
    "MSGQUEUE",
    "NICE",
    "RTPRIO",
    "RTTIME",
];

fn start_spec(a: &Attach) -> guest::StartSpec {
    let limits = a
        .open
        .rlimits
        .iter()
        .filter_map(|l| {
            let name = LIMIT_NAMES.get(usize::try_from(l.resource).ok()?)?;
            Some(guest::Limit {
                name: (*name).into(),
                soft: l.soft,
                hard: l.hard,
            })
        })
        .collect();
    let stdio = match &a.open.terminal {
        Some(t) => guest::Stdio::Pty {
            rows: t.rows,
            cols: t.cols,
            term: None,
        },
        None => guest::Stdio::Pipes {
            merge_stderr: a.open.merge_stderr,
            stdin: a.open.kind != session::StepKind::Batch,
        },
    };
    guest::StartSpec {
        argv: split_nul(&a.arguments),
        env: split_nul(&a.environment),
        cwd: a.open.cwd.as_str().into(),
        uid: a.open.user.uid,
        gid: a.open.user.gid,
        groups: a.open.groups.clone(),
        umask: a.open.umask,
        limits,
        stdio,
        ring_bytes: None,
        user: (!a.open.user.name.is_empty()).then(|| guest::UserLine {
            name: a.open.user.name.clone(),
            home: a.open.user.home.clone(),
            shell: a.open.user.shell.clone(),
        }),
        mounts: vec![],
        cwd_required: false,
        wait_network: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        limits::{Bounds, Budget},
        vm::outbox::{Outbox, outbox},
    };

    fn record(wrote: u64) -> ProgramRecord {
        ProgramRecord {
            id: 1,
            key: "batch.0".into(),
            merged: false,
            terminal: false,
            stdout: None,
            stderr: None,
            wrote: [wrote, 0],
            ended: None,
            started: true,
        }
    }

    /// A shim of the job's batch script comes; `resume`: it has written so much.
    fn shim(programs: &mut Programs, session: u64, resume: Option<u64>) -> Outbox {
        let (to, from) = outbox(Budget::new(Bounds::default()).bytes(7, 0).unwrap(), || {});
        let sink = Sink {
            regular: true,
            dev: 1,
            ino: 1,
            base: 0,
            end: None,
        };
        let open = Open {
            version: session::VERSION,
            job: 1,
            step: session::BATCH_STEP,
            task: 0,
            restart: 0,
            kind: session::StepKind::Batch,
            spec: slurm_vm_api::spec::VmSpec::for_image("tiny").unwrap(),
            cwd: "/".into(),
            umask: 0,
            groups: vec![],
            user: session::UserEntry::default(),
            rlimits: vec![],
            terminal: None,
            merge_stderr: false,
            stdout: sink.clone(),
            stderr: sink,
            resume: resume.map(|at| (Stream::Stdout, at)).into_iter().collect(),
        };
        let (environment, arguments, script) = (vec![], vec![], None);
        programs.attach(
            Attach {
                session,
                open,
                environment,
                arguments,
                script,
                held: None,
                to,
            },
            1,
        );
        from
    }

    /// What a shim was sent of stdout, in order and without holes from `at` on.
    fn sent(from: &Outbox, mut at: u64) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(frame) = from.next_at_once() {
            if let Frame::Data {
                stream: Stream::Stdout,
                offset,
                bytes,
            } = frame
            {
                assert_eq!(offset, at);
                at += bytes.len() as u64;
                all.extend(bytes);
            }
        }
        all
    }

    #[test]
    fn kept_output_that_is_over_the_limit_or_finds_no_room_on_the_disk_is_not_dropped() {
        for (dir_is_there, limit) in [(true, 4), (false, 1 << 20), (true, 0)] {
            let dir = tempfile::tempdir().unwrap();
            let spools = if dir_is_there { dir.path().into() } else { dir.path().join("none") };
            let mut programs = Programs::new(&[record(100)], spools, limit);
            programs.take_spool(1, 0, 100, b"0123456789");
            programs.take_spool(1, 0, 110, b"abc");
            programs.adopt(&record(100));
            assert_eq!(programs.take_complaints().is_empty(), dir_is_there);
            assert_eq!(
                programs.spools(),
                [(1, 0, 100, b"0123456789abc".to_vec())],
                "to go on with the next move"
            );
            let from = shim(&mut programs, 1, None);
            assert_eq!(sent(&from, 100), b"0123456789abc", "{dir_is_there} {limit}");
            // Nothing more goes there: it stays in the guest.
            assert_eq!(programs.data(1, guest::Stream::Stdout, 113, b"new").len(), 0);
            let requests = programs.wrote(1, Stream::Stdout, 113);
            assert!(requests.contains(&resume(113)) || requests.contains(&resume(116)), "{requests:?}");
        }
    }

    #[test]
    fn after_a_restore_the_guest_goes_on_behind_what_came_with_the_save_though_its_ring_begins_before() {
        let dir = tempfile::tempdir().unwrap();
        let mut programs = Programs::new(&[record(100)], dir.path().into(), 1 << 20);
        // A save's kept output comes without a word of offsets.
        programs.take_spool(1, 0, 100, b"0123456789");
        assert!(programs.guest_up(&[report(100)]).contains(&resume(110)));
        programs.data(1, guest::Stream::Stdout, 110, b"abc");
        assert_eq!(programs.spools(), [(1, 0, 100, b"0123456789abc".to_vec())]);
        let from = shim(&mut programs, 1, None);
        assert_eq!(sent(&from, 100), b"0123456789abc");
    }

    #[test]
    fn a_kept_piece_that_comes_twice_is_neither_doubled_nor_takes_the_place_of_what_came_before() {
        let dir = tempfile::tempdir().unwrap();
        let mut programs = Programs::new(&[record(100)], dir.path().into(), 1 << 20);
        for (offset, piece) in [(100, b"0123"), (104, b"4567"), (104, b"4567"), (100, b"0123"), (106, b"6789")] {
            programs.take_spool(1, 0, offset, piece);
        }
        assert_eq!(programs.spools(), [(1, 0, 100, b"0123456789".to_vec())]);
        assert!(programs.take_complaints().is_empty());
        // Of another run: nothing of it is ours.
        programs.take_spool(1, 0, 104, b"another");
        assert_eq!(programs.spools(), [(1, 0, 104, b"another".to_vec())]);
        assert_eq!(programs.take_complaints().len(), 1);
    }

    #[test]
    fn what_is_kept_stays_in_the_guests_ring_while_there_is_room_so_that_a_failed_hand_over_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut programs = Programs::new(&[record(100)], dir.path().into(), 1 << 20);
        let mut acked = 100;
        let (mut at, piece) = (100, vec![b'x'; 32 << 10]);
        for _ in 0..20 {
            for request in programs.data(1, guest::Stream::Stdout, at, &piece) {
                match request {
                    ToGuest::Ack { offset, .. } => {
                        assert!(offset > acked, "{offset} after {acked}");
                        acked = offset;
                    }
                    other => panic!("{other:?}"),
                }
            }
            at += piece.len() as u64;
            let stays = at - acked;
            assert!(stays <= KEPT_IN_RING && (stays == KEPT_IN_RING || acked == 100), "{stays}");
        }
        // The next node was never told: its guest still has it.
        let mut next = Programs::new(&[record(acked)], dir.path().join("none"), 1 << 20);
        assert!(next.guest_up(&[report(acked)]).contains(&resume(acked)));
        assert!(next.take_complaints().is_empty());
        let mut next = Programs::new(&[record(100)], dir.path().join("none"), 1 << 20);
        assert!(next.guest_up(&[report(acked)]).contains(&resume(acked)));
        assert_eq!(next.take_complaints().len(), 1, "what is gone is said");
    }

    #[test]
    fn the_end_of_a_file_at_a_hand_over_is_passed_on_and_forgotten_as_soon_as_the_shim_gets_more() {
        let sealed = |p: &Programs| p.records()[0].stdout.as_ref().and_then(|s| s.end);
        let hand_over = |p: &mut Programs, session| {
            let sink = Sink {
                regular: true,
                dev: 1,
                ino: 1,
                base: 0,
                end: Some(104),
            };
            p.sealed(session, &[(Stream::Stdout, sink)]);
        };
        let dir = tempfile::tempdir().unwrap();
        let mut programs = Programs::new(&[record(100)], dir.path().into(), 1 << 20);
        programs.guest_up(&[report(100)]);
        let _from = shim(&mut programs, 1, None);
        programs.data(1, guest::Stream::Stdout, 100, b"1234");
        programs.wrote(1, Stream::Stdout, 104);
        hand_over(&mut programs, 1);
        assert_eq!(sealed(&programs), Some(104));
        // Taken back.
        programs.data(1, guest::Stream::Stdout, 104, b"5678");
        assert_eq!(sealed(&programs), None);
        hand_over(&mut programs, 1);
        let _from = shim(&mut programs, 2, Some(104));
        assert_eq!(sealed(&programs), None, "a shim that came back may have written in between");
        hand_over(&mut programs, 2);
        let from = shim(&mut programs, 3, None);
        let told = std::iter::from_fn(|| from.next_at_once()).find_map(|f| match f {
            Frame::Control(ToShim::Started { from, .. }) => from[0].sink.clone(),
            _ => None,
        });
        assert_eq!(told.and_then(|s| s.end), Some(104), "the next shim learns of it");
    }

    #[test]
    fn the_node_that_takes_over_learns_the_end_of_the_file_unless_its_own_shim_has_bytes_already() {
        let mut handed = record(104);
        handed.stdout = Some(Sink {
            regular: true,
            dev: 1,
            ino: 1,
            base: 0,
            end: Some(104),
        });
        for (late, end) in [(false, Some(104)), (true, None)] {
            let dir = tempfile::tempdir().unwrap();
            let mut programs = Programs::new(&[record(100)], dir.path().into(), 1 << 20);
            let _from = late.then(|| shim(&mut programs, 1, None));
            if late {
                programs.guest_up(&[report(100)]);
                programs.data(1, guest::Stream::Stdout, 100, b"12345678");
            }
            programs.adopt(&handed);
            let told = programs.records()[0].stdout.as_ref().and_then(|s| s.end);
            assert_eq!(told, end, "{late}");
        }
    }

    fn resumed_from(wrote: u64, kept: &[u8], ring_start: u64) -> (Vec<ToGuest>, u64) {
        let dir = tempfile::tempdir().unwrap();
        let record = record(wrote);
        let mut programs = Programs::new(std::slice::from_ref(&record), dir.path().into(), 1 << 20);
        programs.take_spool(1, 0, wrote, kept);
        programs.adopt(&record);
        (programs.guest_up(&[report(ring_start)]), programs.records()[0].wrote[0])
    }

    fn report(ring_start: u64) -> guest::ProgramReport {
        guest::ProgramReport {
            program: 1,
            state: guest::ProgramState::Running,
            report: guest::StartReport::default(),
            stdin_consumed: 0,
            streams: vec![guest::StreamReport {
                stream: guest::Stream::Stdout,
                start: ring_start,
                end: 1000,
                eof: false,
                ring_bytes: 4096,
            }],
        }
    }

    fn resume(from: u64) -> ToGuest {
        ToGuest::Resume {
            program: 1,
            stream: guest::Stream::Stdout,
            from,
        }
    }

    #[test]
    fn output_goes_on_at_the_last_written_byte_or_where_the_guests_ring_begins() {
        let (requests, wrote) = resumed_from(436, b"", 400);
        assert!(requests.contains(&resume(436)) && wrote == 436, "{requests:?} {wrote}");
        // An agent that died had acknowledged more than it put on record: all of that was written.
        let (requests, wrote) = resumed_from(436, b"", 560);
        assert!(requests.contains(&resume(560)) && wrote == 560, "{requests:?} {wrote}");
        // What the last agent had kept for a shim is not skipped.
        let (requests, wrote) = resumed_from(436, &[b'x'; 124], 560);
        assert!(requests.contains(&resume(560)) && wrote == 436, "{requests:?} {wrote}");
    }

    fn exited_at(programs: &mut Programs, end: u64) {
        let status = ExitStatus::Code { code: 0 };
        programs.exited(1, status, &[(guest::Stream::Stdout, end)]);
    }

    /// What a shim was told, beside output: where to go on, and whether the file holds something already; or that the program has ended.
    fn told(from: &Outbox) -> Vec<Result<(u64, bool), Ended>> {
        let mut told = Vec::new();
        while let Some(frame) = from.next_at_once() {
            match frame {
                Frame::Control(ToShim::Started { from, resumed }) => told.push(Ok((from[0].offset, resumed))),
                Frame::Control(ToShim::Exited(ended)) => told.push(Err(ended)),
                _ => {}
            }
        }
        told
    }

    #[test]
    fn a_program_that_ended_before_the_agent_was_restarted_has_ended_for_its_shim_only_when_all_of_its_output_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let ended = ProgramRecord {
            ended: Some(Ended::Code(0)),
            ..record(100)
        };
        let mut programs = Programs::new(&[ended], dir.path().into(), 1 << 20);
        let from = shim(&mut programs, 1, Some(100));
        assert_eq!(told(&from), [Ok((100, true))], "its output is not known yet");
        programs.guest_up(&[report(100)]);
        programs.data(1, guest::Stream::Stdout, 100, b"the rest");
        assert_eq!(told(&from), []);
        exited_at(&mut programs, 108);
        assert_eq!(told(&from), [Err(Ended::Code(0))]);
        // A guest that knows nothing of it has nothing more to say.
        let ended = ProgramRecord {
            ended: Some(Ended::Code(3)),
            ..record(100)
        };
        let mut programs = Programs::new(&[ended], dir.path().join("none"), 1 << 20);
        let from = shim(&mut programs, 1, Some(100));
        programs.guest_up(&[]);
        assert_eq!(told(&from), [Ok((100, true)), Err(Ended::Code(3))]);
    }

    #[test]
    fn a_program_that_was_put_on_record_and_not_started_yet_is_started_by_the_next_agent_and_writes_its_file_anew() {
        let dir = tempfile::tempdir().unwrap();
        let unstarted = ProgramRecord {
            started: false,
            ..record(0)
        };
        let programs = || Programs::new(std::slice::from_ref(&unstarted), dir.path().into(), 1 << 20);
        let mut killed_before = programs();
        let from = shim(&mut killed_before, 1, None);
        let requests = killed_before.guest_up(&[]);
        assert!(matches!(requests[..], [ToGuest::Start { program: 1, .. }]), "{requests:?}");
        killed_before.started(1, &guest::StartReport::default());
        assert_eq!(told(&from), [Ok((0, false))]);
        assert!(killed_before.records()[0].started);
        // Started, and killed before that was written. The guest has all of its output, or not.
        for (ring_start, resumed) in [(0, false), (64, true)] {
            let mut killed_after = programs();
            let from = shim(&mut killed_after, 1, None);
            let requests = killed_after.guest_up(&[report(ring_start)]);
            assert!(!requests.iter().any(|r| matches!(r, ToGuest::Start { .. })), "twice: {requests:?}");
            assert_eq!(told(&from), [Ok((ring_start, resumed))]);
        }
        // One that was started, and that the guest has forgotten, is not started again.
        let mut lost = Programs::new(&[record(0)], dir.path().into(), 1 << 20);
        let _from = shim(&mut lost, 1, None);
        assert_eq!(lost.guest_up(&[]), []);
        assert!(matches!(lost.batch_ended(), Some(Ended::NotStarted { .. })));
    }

    #[test]
    fn a_shim_is_told_where_to_go_on_when_what_it_waits_for_was_acknowledged_by_another() {
        let dir = tempfile::tempdir().unwrap();
        // The source's word never came: its shim wrote up to 148, and here 116 is on record.
        let mut programs = Programs::new(&[record(116)], dir.path().into(), 1 << 20);
        let from = shim(&mut programs, 1, None);
        assert_eq!(told(&from), [Ok((116, true))]);
        programs.guest_up(&[report(148)]);
        assert_eq!(told(&from), [Ok((148, true))]);
        // It comes back in between, with what it had.
        let from = shim(&mut programs, 2, Some(116));
        programs.lost_before(1, guest::Stream::Stdout, 148);
        assert_eq!(told(&from), [Ok((116, true)), Ok((148, true))]);
        // The word comes at last.
        let mut programs = Programs::new(&[record(116)], dir.path().into(), 1 << 20);
        let from = shim(&mut programs, 1, None);
        programs.adopt(&record(148));
        assert_eq!(told(&from), [Ok((116, true)), Ok((148, true))]);
    }

    #[test]
    fn a_late_word_of_offsets_takes_nothing_back_of_what_the_shim_here_has() {
        let dir = tempfile::tempdir().unwrap();
        let mut programs = Programs::new(&[record(100)], dir.path().into(), 1 << 20);
        programs.guest_up(&[report(100)]);
        let from = shim(&mut programs, 1, Some(100));
        programs.data(1, guest::Stream::Stdout, 100, &[b'x'; 50]);
        programs.adopt(&record(120));
        exited_at(&mut programs, 150);
        assert_eq!(told(&from), [Ok((100, true)), Err(Ended::Code(0))]);
        assert_eq!(programs.wrote(1, Stream::Stdout, 150).len(), 1, "acknowledged");
        assert_eq!(programs.records()[0].wrote[0], 150);
    }
}
