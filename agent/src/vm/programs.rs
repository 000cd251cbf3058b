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
mod tests;
