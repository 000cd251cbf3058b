//! The host's side of the protocol, without input or output: requests, received bytes and the time go in, bytes to send and events come out.
//!
//! ```text
//! disconnected -> greeting{nonce} -> up -> disconnected
//!                     ^               |
//!                     +---- a damaged frame, the guest's resync
//! ```
//!
//! What the owner wants (programs started, streams followed, input delivered, requests done) is kept here until the guest has confirmed it;
//! a new session begins by comparing that with the guest's hello. The guest is not trusted: its user may be root in it. Whatever it sends
//! costs no more memory than the windows that were opened, and a violation ends the connection.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use super::events::{LinkEvent, LinkRequest};
use slurm_vm_api::frame::{self, Decoder, Frame, Kind};
use slurm_vm_api::guest::{
    self, Action, ExitStatus, Failure, GuestHello, MAX_DATA_BYTES, MAX_SCRIPT_BYTES, MAX_SPEC_BYTES, OLDEST_PROTOCOL, PROTOCOL,
    ProgramState, RING_BYTES, RING_LIMITS, Refusal, StartSpec, Stdio, Stream, StreamReport, ToGuest, ToHost, Upload,
};

/// Bytes to keep ready for the socket.
const OUTBOX_BYTES: usize = 64 * 1024;
const HELLO_RETRY: Duration = Duration::from_secs(1);
/// Between two sessions on one connection.
const HELLO_PAUSE: Duration = Duration::from_millis(20);
const HELLO_RETRY_MAX: Duration = Duration::from_secs(5);
/// An upload that arrives damaged is sent so often.
const UPLOAD_ATTEMPTS: u32 = 3;

/// Bytes on their way into the guest before a start.
#[derive(Debug)]
struct Sending {
    id: u32,
    bytes: Vec<u8>,
    acked: usize,
    sent: usize,
    // Sent something in this session: an empty upload needs a frame, too.
    begun: bool,
    complete: bool,
}

impl Sending {
    fn new(id: u32, bytes: Vec<u8>) -> Self {
        Self {
            id,
            bytes,
            acked: 0,
            sent: 0,
            begun: false,
            complete: false,
        }
    }

    fn upload(&self) -> Upload {
        Upload {
            id: self.id,
            len: self.bytes.len() as u64,
            crc32: frame::checksum(&self.bytes),
        }
    }

    fn rewind(&mut self, to: usize) {
        (self.acked, self.sent, self.begun, self.complete) = (to, to, false, false);
    }

    fn acknowledged(&mut self, offset: u64) {
        match usize::try_from(offset) {
            Ok(offset) if offset <= self.bytes.len() => {
                // Less than before: the guest has lost it. More than was sent: it had kept more than its last word said.
                self.sent = if offset < self.acked { offset } else { self.sent.max(offset) };
                self.acked = offset;
                self.complete = offset == self.bytes.len();
            }
            // More than there is: a remainder of another upload with this id, which the checksum will show.
            _ => self.complete = true,
        }
    }

    fn fill(&mut self, out: &mut Vec<u8>) {
        let window = (self.acked + RING_BYTES as usize).min(self.bytes.len());
        while out.len() < OUTBOX_BYTES && !self.complete && (self.sent < window || !self.begun) {
            let end = (self.sent + MAX_DATA_BYTES).min(window);
            let _ = guest::put_upload(out, self.id, self.sent as u64, &self.bytes[self.sent..end]);
            self.begun = true;
            self.sent = end;
        }
    }
}

#[derive(Debug)]
struct Starting {
    spec: Sending,
    script: Option<Sending>,
    attempts: u32,
    asked: bool,
}

impl Starting {
    fn parts(&mut self) -> impl Iterator<Item = &mut Sending> {
        std::iter::once(&mut self.spec).chain(&mut self.script)
    }
}

/// An output stream that the owner follows.
#[derive(Debug)]
struct Followed {
    next: u64,
    acked: u64,
    window: u64,
    ack_due: bool,
    asked_again: bool,
    eof_told: bool,
}

#[derive(Debug, Default)]
struct Stdin {
    acked: u64,
    sent: u64,
    held: VecDeque<u8>,
    end: Option<u64>,
    end_sent: bool,
}

impl Stdin {
    fn end_of_held(&self) -> u64 {
        self.acked + self.held.len() as u64
    }

    fn acknowledged(&mut self, offset: u64) -> bool {
        let known = offset > self.acked && offset <= self.end_of_held();
        if known {
            self.held
                .drain(..usize::try_from(offset - self.acked).unwrap_or(usize::MAX).min(self.held.len()));
            self.acked = offset;
            self.sent = self.sent.max(offset);
        }
        known
    }

    fn fill(&mut self, out: &mut Vec<u8>, program: u32) {
        while out.len() < OUTBOX_BYTES && self.sent < self.end_of_held() {
            let at = usize::try_from(self.sent - self.acked).unwrap_or(usize::MAX);
            let (front, back) = self.held.as_slices();
            let part = if at < front.len() {
                &front[at..]
            } else {
                &back[at - front.len()..]
            };
            let part = &part[..part.len().min(MAX_DATA_BYTES)];
            let _ = guest::put_data(out, program, Stream::Stdin, self.sent, [part, &[]]);
            self.sent += part.len() as u64;
        }
        if let (Some(end), false) = (self.end, self.end_sent)
            && self.sent == end
        {
            self.end_sent = guest::put_mark(out, Kind::Eof, program, Stream::Stdin, end).is_ok();
        }
    }
}

#[derive(Debug, Default)]
struct Program {
    starting: Option<Starting>,
    // The guest knows it, or did.
    known: bool,
    ring_bytes: Option<u32>,
    streams: BTreeMap<Stream, Followed>,
    stdin: Stdin,
    exited: Option<(ExitStatus, Vec<StreamReport>)>,
    exited_told: bool,
}

impl Program {
    fn follow(&mut self, stream: Stream, from: u64) -> &mut Followed {
        let window = u64::from(self.ring_bytes.unwrap_or(RING_BYTES));
        self.streams.entry(stream).or_insert(Followed {
            next: from,
            acked: from,
            window,
            ack_due: false,
            asked_again: false,
            eof_told: false,
        })
    }
}

#[derive(Debug)]
enum Phase {
    Disconnected,
    Greeting { nonce: u64, again_at: Instant, wait: Duration },
    Up,
}

/// The protocol's state.
#[derive(Debug)]
pub struct LinkCore {
    phase: Phase,
    decoder: Decoder,
    bad_seen: u64,
    ids: u64,
    nonce: u64,
    greeted: Option<Instant>,
    controls: VecDeque<ToGuest>,
    programs: BTreeMap<u32, Program>,
    pending: BTreeMap<u64, (u64, Action)>,
    events: VecDeque<LinkEvent>,
    broken: Option<String>,
}

impl LinkCore {
    /// A core. `seed` must differ from those of earlier links to the same guest: it makes nonces and request ids of its own.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            phase: Phase::Disconnected,
            decoder: Decoder::new(),
            bad_seen: 0,
            ids: seed.rotate_left(32),
            nonce: seed,
            greeted: None,
            controls: VecDeque::new(),
            programs: BTreeMap::new(),
            pending: BTreeMap::new(),
            events: VecDeque::new(),
            broken: None,
        }
    }

    /// The next event for the owner.
    pub fn event(&mut self) -> Option<LinkEvent> {
        self.events.pop_front()
    }

    /// When [`LinkCore::fill`] has to be called again though nothing happens.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        if let Phase::Greeting { again_at, .. } = self.phase {
            Some(again_at)
        } else {
            None
        }
    }

    /// Why the connection must be dropped, if it must.
    pub fn broken(&mut self) -> Option<String> {
        self.broken.take()
    }

    /// A connection was made.
    pub fn connected(&mut self, now: Instant) {
        self.decoder.reset();
        self.greet(now);
    }

    /// The connection is gone. Says whether the session had been up.
    pub fn disconnected(&mut self, reason: &str) {
        if matches!(self.phase, Phase::Up) {
            self.events.push_back(LinkEvent::Down { reason: reason.to_owned() });
            // A clock setting is stale by the time the link is back.
            let clocks: Vec<u64> = self
                .pending
                .iter()
                .filter(|(_, (_, action))| matches!(action, Action::SetClock { .. }))
                .map(|(id, _)| *id)
                .collect();
            for id in clocks {
                self.fail(id, "the connection broke before the answer");
            }
        }
        self.phase = Phase::Disconnected;
        self.controls.clear();
    }

    fn greet(&mut self, now: Instant) {
        self.nonce = self.nonce.wrapping_add(1);
        self.controls.clear();
        // A guest that sends nothing but rubbish must not keep this thread busy.
        let again_at = self.greeted.map_or(now, |last| now.max(last + HELLO_PAUSE));
        self.greeted = Some(again_at);
        self.phase = Phase::Greeting {
            nonce: self.nonce,
            again_at,
            wait: HELLO_RETRY,
        };
    }

    fn fail(&mut self, id: u64, message: &str) {
        if let Some((token, _)) = self.pending.remove(&id) {
            let failed = Some(Failure {
                errno: libc::ECONNRESET,
                message: message.to_owned(),
            });
            self.events.push_back(LinkEvent::Done { token, failed });
        }
    }

    fn violated(&mut self, what: String) {
        self.events.push_back(LinkEvent::Violation { what: what.clone() });
        self.broken = Some(what);
    }

    // ---- from the owner ----

    /// Takes a request.
    pub fn request(&mut self, request: LinkRequest) {
        match request {
            LinkRequest::Start { program, spec, script } => self.start(program, &spec, script),
            LinkRequest::Resume { program, stream, from } => {
                let known = self.programs.entry(program).or_default();
                // With a start under way the guest need not know it yet.
                known.known |= known.starting.is_none();
                known.exited_told = false;
                known.streams.remove(&stream);
                known.follow(stream, from).ack_due = true;
                self.ask(ToGuest::Resume { program, stream, from });
            }
            LinkRequest::Ack { program, stream, offset } => {
                if let Some(followed) = self.programs.get_mut(&program).and_then(|known| known.streams.get_mut(&stream))
                    && offset > followed.acked
                    && offset <= followed.next
                {
                    followed.acked = offset;
                    followed.ack_due = true;
                }
            }
            LinkRequest::Stdin { program, offset, bytes } => {
                let stdin = &mut self.programs.entry(program).or_default().stdin;
                let next = stdin.end_of_held();
                let new = next.checked_sub(offset).and_then(|skip| bytes.get(usize::try_from(skip).ok()?..));
                match new {
                    Some(new) if stdin.held.len() + new.len() <= RING_BYTES as usize => stdin.held.extend(new),
                    // All of it was delivered before.
                    None if offset + (bytes.len() as u64) <= next => {}
                    _ => self.events.push_back(LinkEvent::StdinRejected { program, next }),
                }
            }
            LinkRequest::StdinEof { program, offset } => {
                self.programs.entry(program).or_default().stdin.end = Some(offset);
            }
            LinkRequest::Do { token, action } => {
                if let Action::Forget { program } = action {
                    self.programs.remove(&program);
                }
                self.ids = self.ids.wrapping_add(1);
                let id = self.ids;
                self.pending.insert(id, (token, action.clone()));
                self.ask(ToGuest::Request { id, action });
            }
        }
    }

    fn ask(&mut self, message: ToGuest) {
        // Outside a session the hello brings everything up to date.
        if matches!(self.phase, Phase::Up) {
            self.controls.push_back(message);
        }
    }

    fn start(&mut self, id: u32, spec: &StartSpec, script: Option<Vec<u8>>) {
        let refuse = |message: &str| LinkEvent::Refused {
            program: id,
            reason: Refusal::Spec,
            message: message.to_owned(),
        };
        let Ok(text) = serde_json::to_vec(spec) else {
            return self.events.push_back(refuse("the specification cannot be written as json"));
        };
        if text.len() as u64 > MAX_SPEC_BYTES || script.as_ref().is_some_and(|script| script.len() as u64 > MAX_SCRIPT_BYTES) {
            return self
                .events
                .push_back(refuse("the arguments, the environment or the script are too large"));
        }
        let program = self.programs.entry(id).or_default();
        if program.starting.is_some() {
            return;
        }
        program.known = false;
        program.ring_bytes = Some(
            spec.ring_bytes
                .unwrap_or(RING_BYTES)
                .clamp(*RING_LIMITS.start(), *RING_LIMITS.end()),
        );
        program.follow(Stream::Stdout, 0);
        if matches!(spec.stdio, Stdio::Pipes { merge_stderr: false, .. }) {
            program.follow(Stream::Stderr, 0);
        }
        // Two uploads per program: their ids are derived, so that a link made anew goes on with them.
        let spec = Sending::new(id.wrapping_mul(2), text);
        let script = script.map(|bytes| Sending::new(id.wrapping_mul(2).wrapping_add(1), bytes));
        program.starting = Some(Starting {
            spec,
            script,
            attempts: 0,
            asked: false,
        });
    }

    // ---- from the guest ----

    /// Takes received bytes.
    pub fn received(&mut self, mut input: &[u8], now: Instant) {
        let mut decoder = std::mem::take(&mut self.decoder);
        while self.broken.is_none()
            && let Some(frame) = decoder.next(&mut input)
        {
            self.frame(frame, now);
        }
        self.decoder = decoder;
        let bad = self.decoder.bad_frames();
        if bad > self.bad_seen {
            self.bad_seen = bad;
            if matches!(self.phase, Phase::Up) {
                log::warn!("damaged frame from the guest, beginning a new session");
                self.greet(now);
            }
        }
    }

    fn frame(&mut self, frame: Frame<'_>, now: Instant) {
        if frame.kind == Kind::Control {
            match serde_json::from_slice::<ToHost>(frame.body) {
                Ok(ToHost::Hello(hello)) => self.hello(&hello),
                Ok(message) if matches!(self.phase, Phase::Up) => self.control(message, now),
                // Before the hello's answer: of an earlier session.
                Ok(_) => {}
                Err(error) => self.violated(format!("a control message that is none: {error}")),
            }
            return;
        }
        if !matches!(self.phase, Phase::Up) {
            return;
        }
        let id = frame.channel;
        match (frame.kind, guest::split_stream(frame.body)) {
            (Kind::Data, Some((stream, offset, bytes))) => self.data(id, stream, offset, bytes),
            (Kind::Eof, Some((stream, offset, _))) => self.eof(id, stream, offset),
            (Kind::Ack, Some((Stream::Stdin, offset, _))) => {
                let news = self.programs.get_mut(&id).is_some_and(|program| program.stdin.acknowledged(offset));
                self.events.extend(news.then_some(LinkEvent::StdinAck { program: id, offset }));
            }
            (Kind::PutAck, _) => {
                if let Some((offset, _)) = guest::split_offset(frame.body) {
                    let starting = self.programs.values_mut().filter_map(|program| program.starting.as_mut());
                    for sending in starting.flat_map(Starting::parts).filter(|sending| sending.id == id) {
                        sending.acknowledged(offset);
                    }
                }
            }
            _ => {}
        }
    }

    fn hello(&mut self, hello: &GuestHello) {
        let repeated = match self.phase {
            Phase::Greeting { nonce, .. } if nonce == hello.nonce => false,
            // Our hello was repeated before the first answer came: the guest began anew with the second.
            Phase::Up if self.nonce == hello.nonce => true,
            _ => return,
        };
        if !(OLDEST_PROTOCOL..=PROTOCOL).contains(&hello.protocol) {
            self.events.push_back(LinkEvent::Incompatible { protocol: hello.protocol });
            self.broken = Some(format!("the guest speaks protocol {}", hello.protocol));
            return;
        }
        self.phase = Phase::Up;
        self.controls.clear();
        if !repeated {
            self.events.push_back(LinkEvent::Up {
                hello: Box::new(hello.clone()),
            });
        }
        for (id, (_, action)) in &self.pending {
            self.controls.push_back(ToGuest::Request {
                id: *id,
                action: action.clone(),
            });
        }
        let mut lost = Vec::new();
        for (id, program) in &mut self.programs {
            let Some(report) = hello.programs.iter().find(|report| report.program == *id) else {
                if program.known {
                    lost.push(*id);
                } else if let Some(starting) = &mut program.starting {
                    starting.asked = false;
                    for sending in starting.parts() {
                        // The guest answers with how much it has, which may be nothing.
                        let acked = sending.acked;
                        sending.rewind(acked);
                    }
                }
                continue;
            };
            program.known = true;
            if program.starting.take().is_some() {
                self.events.push_back(LinkEvent::Started {
                    program: *id,
                    report: report.report.clone(),
                });
            }
            let stdin = &mut program.stdin;
            let fresh = stdin.held.is_empty() && report.stdin_consumed > stdin.acked;
            if fresh {
                // An earlier link has delivered this.
                stdin.acked = report.stdin_consumed;
            }
            if fresh || stdin.acknowledged(report.stdin_consumed) {
                self.events.push_back(LinkEvent::StdinAck {
                    program: *id,
                    offset: stdin.acked,
                });
            }
            stdin.sent = stdin.acked;
            stdin.end_sent = false;
            for (stream, followed) in &mut program.streams {
                if let Some(ring) = report.streams.iter().find(|report| report.stream == *stream) {
                    followed.window = u64::from(ring.ring_bytes.min(*RING_LIMITS.end()));
                }
                followed.ack_due = true;
                followed.asked_again = false;
                self.controls.push_back(ToGuest::Resume {
                    program: *id,
                    stream: *stream,
                    from: followed.next,
                });
            }
            if let ProgramState::Exited { status } = report.state {
                program.exited = Some((status, report.streams.clone()));
            }
        }
        for id in lost {
            self.programs.remove(&id);
            self.events.push_back(LinkEvent::ProgramLost { program: id });
        }
        self.settle();
    }

    fn control(&mut self, message: ToHost, now: Instant) {
        match message {
            ToHost::Hello(_) | ToHost::Unknown => {}
            ToHost::Started { program: id, report } => {
                let Some(program) = self.programs.get_mut(&id) else { return };
                program.known = true;
                if program.starting.take().is_some() {
                    self.events.push_back(LinkEvent::Started { program: id, report });
                    for (stream, followed) in &program.streams {
                        self.controls.push_back(ToGuest::Resume {
                            program: id,
                            stream: *stream,
                            from: followed.next,
                        });
                    }
                }
            }
            ToHost::Refused {
                program: id,
                reason,
                message,
            } => {
                let Some(starting) = self.programs.get_mut(&id).and_then(|program| program.starting.as_mut()) else {
                    return;
                };
                if reason == Refusal::Upload && starting.attempts < UPLOAD_ATTEMPTS {
                    starting.attempts += 1;
                    starting.asked = false;
                    for sending in starting.parts() {
                        sending.rewind(0);
                    }
                } else {
                    self.programs.remove(&id);
                    self.events.push_back(LinkEvent::Refused {
                        program: id,
                        reason,
                        message,
                    });
                }
            }
            ToHost::Exited {
                program: id,
                status,
                streams,
            } => {
                if let Some(program) = self.programs.get_mut(&id) {
                    program.exited = Some((status, streams));
                    self.settle();
                }
            }
            ToHost::Lost {
                program: id,
                stream,
                start,
            } => {
                if let Some(followed) = self.programs.get_mut(&id).and_then(|program| program.streams.get_mut(&stream)) {
                    let wanted = followed.next;
                    // A loss that does not move the stream is an answer to a question asked twice.
                    if start != wanted {
                        (followed.next, followed.acked) = (start, start);
                        self.events.push_back(LinkEvent::Lost {
                            program: id,
                            stream,
                            wanted,
                            start,
                        });
                        self.settle();
                    }
                }
            }
            ToHost::Done { id, failed } => {
                if let Some((token, _)) = self.pending.remove(&id) {
                    self.events.push_back(LinkEvent::Done { token, failed });
                }
            }
            ToHost::ClockWas { behind_ns } => self.events.push_back(LinkEvent::ClockWas { behind_ns }),
            ToHost::Resync { bad_frames } => {
                log::warn!("the guest saw {bad_frames} damaged frames, beginning a new session");
                self.greet(now);
            }
        }
    }

    fn data(&mut self, id: u32, stream: Stream, offset: u64, bytes: &[u8]) {
        let Some(followed) = self.programs.get_mut(&id).and_then(|program| program.streams.get_mut(&stream)) else {
            return;
        };
        if offset > followed.next {
            if !followed.asked_again {
                followed.asked_again = true;
                self.controls.push_back(ToGuest::Resume {
                    program: id,
                    stream,
                    from: followed.next,
                });
            }
            return;
        }
        let end = offset.saturating_add(bytes.len() as u64);
        if end <= followed.next {
            return;
        }
        if end > followed.acked.saturating_add(followed.window) {
            let window = followed.window;
            return self.violated(format!("program {id} sent beyond its window of {window} bytes"));
        }
        let skip = usize::try_from(followed.next - offset).unwrap_or(bytes.len());
        let event = LinkEvent::Data {
            program: id,
            stream,
            offset: followed.next,
            bytes: bytes[skip..].to_vec(),
        };
        followed.next = end;
        followed.asked_again = false;
        self.events.push_back(event);
        if self.programs.get(&id).is_some_and(|program| program.exited.is_some()) {
            self.settle();
        }
    }

    fn eof(&mut self, id: u32, stream: Stream, offset: u64) {
        let Some(followed) = self.programs.get_mut(&id).and_then(|program| program.streams.get_mut(&stream)) else {
            return;
        };
        if followed.next == offset && !followed.eof_told {
            followed.eof_told = true;
            self.events.push_back(LinkEvent::Eof {
                program: id,
                stream,
                offset,
            });
            self.settle();
        }
    }

    /// Tells of the programs that have ended and whose output is complete.
    fn settle(&mut self) {
        for (id, program) in &mut self.programs {
            let Some((status, streams)) = &program.exited else { continue };
            let complete = |followed: (&Stream, &Followed)| {
                streams
                    .iter()
                    .find(|report| report.stream == *followed.0)
                    .is_none_or(|report| followed.1.next >= report.end)
            };
            if !program.exited_told && program.streams.iter().all(complete) {
                program.exited_told = true;
                for (stream, followed) in &mut program.streams {
                    if !std::mem::replace(&mut followed.eof_told, true) {
                        self.events.push_back(LinkEvent::Eof {
                            program: *id,
                            stream: *stream,
                            offset: followed.next,
                        });
                    }
                }
                self.events.push_back(LinkEvent::Exited {
                    program: *id,
                    status: *status,
                    streams: streams.clone(),
                });
            }
        }
    }

    // ---- to the guest ----

    /// Appends what there is to send, up to a moderate amount.
    pub fn fill(&mut self, out: &mut Vec<u8>, now: Instant) {
        match &mut self.phase {
            Phase::Disconnected => return,
            Phase::Greeting { nonce, again_at, wait } => {
                if now >= *again_at {
                    *again_at = now + *wait;
                    *wait = (*wait * 2).min(HELLO_RETRY_MAX);
                    let hello = ToGuest::Hello {
                        protocol: PROTOCOL,
                        oldest: OLDEST_PROTOCOL,
                        nonce: *nonce,
                    };
                    out.push(frame::DELIMITER);
                    put_control(out, &hello);
                }
                return;
            }
            Phase::Up => {}
        }
        while out.len() < OUTBOX_BYTES
            && let Some(message) = self.controls.pop_front()
        {
            put_control(out, &message);
        }
        for (id, program) in &mut self.programs {
            for (stream, followed) in &mut program.streams {
                if std::mem::take(&mut followed.ack_due) {
                    let _ = guest::put_mark(out, Kind::Ack, *id, *stream, followed.acked);
                }
            }
            if let Some(starting) = &mut program.starting {
                for sending in starting.parts() {
                    sending.fill(out);
                }
                if !starting.asked && starting.parts().all(|sending| sending.complete) {
                    starting.asked = true;
                    let script = starting.script.as_ref().map(Sending::upload);
                    put_control(
                        out,
                        &ToGuest::Start {
                            program: *id,
                            spec: starting.spec.upload(),
                            script,
                        },
                    );
                }
            } else if program.known {
                program.stdin.fill(out, *id);
            }
        }
    }
}

fn put_control(out: &mut Vec<u8>, message: &ToGuest) {
    if let Err(error) = guest::put_control(out, message) {
        log::error!("failed to send to the guest: {error}");
    }
}

#[cfg(test)]
#[path = "core_tests.rs"]
mod tests;
