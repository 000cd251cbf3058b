//! The loop between the agent's socket, the task's streams and its signals.
//!
//! Memory is bounded: the agent keeps to a window of unacknowledged bytes for each output, and the shim stops reading
//! from an agent that does not; input is read ahead by one window. A blocked stdout does not hold up stderr, signals
//! or the agent's messages.
use std::{
    io,
    os::fd::AsFd,
    path::PathBuf,
    time::{Duration, Instant},
};

use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr},
};
use slurm_vm_api::session::{Cause, Frame, MAX_DATA, Open, Stream, StreamStart, ToAgent, ToShim, WINDOW};

use super::{
    context,
    contract::Task,
    end::{End, journal, say},
    input::Input,
    link::{Link, agent_is_absent},
    output::{Output, Wrote},
    signals::Signals,
};

/// Slurm's preemption notice as the plugin asks for it (`--signal=B:60@…`); never relayed.
pub const NOTICE_SIGNAL: i32 = 60;
/// An acknowledgement is worth a message from this many bytes on, or when nothing is left to write.
const ACK_EVERY: u64 = 32 << 10;
/// More than this unsent towards the agent, and neither input nor signals are read.
const BACKLOG: usize = 1 << 20;
/// Between attempts to reach the agent.
const RETRY: Duration = Duration::from_millis(250);
/// A connection that lasted this long shows that the agent was well: the wait for the next one begins anew.
const STEADY: Duration = Duration::from_secs(10);
/// The line about a cancel or a time limit waits this long for the program's last words: Slurm's KillWait may end the shim.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// The end of the last acknowledgement.
const FAREWELL: Duration = Duration::from_secs(1);
/// Signals kept while there is nobody to pass them to.
const HELD: usize = 256;

/// How long an agent may be away.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// Before the program was started: then the node is at fault.
    pub connect: Duration,
    /// While the program runs in the guest, which does not need the agent.
    pub reconnect: Duration,
}

impl Times {
    /// The documented variables in seconds, or the defaults.
    pub fn from_environment() -> Self {
        let seconds = |name: &str, default: u64| {
            Duration::from_secs(std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default).min(86_400))
        };
        Self {
            connect: seconds("SLURM_VM_CONNECT_TIMEOUT", 60),
            reconnect: seconds("SLURM_VM_RECONNECT_TIMEOUT", 600),
        }
    }
}

/// A terminal in raw mode, given back as it was.
#[derive(Debug)]
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    fn enter() -> Option<Self> {
        let before = tcgetattr(io::stdin()).ok()?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw).ok()?;
        Some(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.before);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Opening,
    Running,
    HandedOver,
}

/// The task's session with the agent.
#[derive(Debug)]
pub struct Relay {
    task: Task,
    open: Open,
    input: Input,
    outputs: [Output; 2],
    signals: Signals,
    times: Times,
    phase: Phase,
    link: Option<Link>,
    /// The session on this link has been started (again).
    live: bool,
    lost_at: Instant,
    retry_at: Instant,
    last_error: Option<io::Error>,
    terminal: Option<RawTerminal>,
    held: Vec<i32>,
    term_asked: bool,
    notice: bool,
    last_words: Option<(Instant, String)>,
    spoken: bool,
    ending: Option<End>,
    end_now: Option<End>,
}

impl Relay {
    /// Everything that a session needs; nothing happens before [`Relay::run`].
    pub fn new(task: Task, open: Open, input: Input, stdout: Output, stderr: Output, signals: Signals, times: Times) -> Self {
        let now = Instant::now();
        Self {
            task,
            open,
            input,
            outputs: [stdout, stderr],
            signals,
            times,
            phase: Phase::Opening,
            link: None,
            live: false,
            lost_at: now,
            retry_at: now,
            last_error: None,
            terminal: None,
            held: Vec::new(),
            term_asked: false,
            notice: false,
            last_words: None,
            spoken: false,
            ending: None,
            end_now: None,
        }
    }

    /// Relays until the end is known and all output is written.
    pub fn run(mut self) -> (End, Signals, Option<RawTerminal>) {
        let end = loop {
            self.advance();
            if let Some(end) = self.end_now.take() {
                break end;
            }
            if self.ending.is_some() && self.all_is_written() {
                self.farewell();
                self.speak_last_words();
                break self.ending.take().unwrap_or(End::Quiet);
            }
            self.wait();
        };
        (end, self.signals, self.terminal)
    }

    /// Also on storage; after a hand-over that is another node's business.
    fn all_is_written(&mut self) -> bool {
        self.outputs.iter_mut().for_each(Output::finish);
        let handed_over = self.phase == Phase::HandedOver;
        self.outputs.iter().all(|o| o.is_settled() || (handed_over && o.waiting() == 0))
    }

    /// What is due by the clock: connecting, last words, the end of patience with a file.
    fn advance(&mut self) {
        let now = Instant::now();
        if self.last_words.as_ref().is_some_and(|(at, _)| *at <= now) {
            self.speak_last_words();
        }
        if self.phase == Phase::Running
            && let Some((o, error)) = self.outputs.iter().find_map(|o| {
                let (since, error) = o.broken()?;
                (now - since >= self.times.reconnect).then_some((o, error))
            })
        {
            let stream = name(o.stream);
            self.end_now = Some(End::Fault(format!(
                "the file of the task's {stream} cannot be written: {}",
                error.desc()
            )));
        }
        if self.link.is_none() && self.ending.is_none() && self.retry_at <= now {
            match self.patience_is_over(now) {
                Some(why) => self.end_now = Some(End::Fault(why)),
                None => self.connect(now),
            }
        }
    }

    fn patience_is_over(&self, now: Instant) -> Option<String> {
        let patience = match self.phase {
            Phase::Opening => self.times.connect,
            Phase::Running => self.times.reconnect,
            // The VM is leaving: SIGTERM is what ends this wait, with or without an agent.
            Phase::HandedOver => return None,
        };
        let error = self.last_error.as_ref().filter(|_| now - self.lost_at >= patience)?;
        let why = if agent_is_absent(error) {
            "it is not running".to_owned()
        } else {
            error.to_string()
        };
        Some(format!(
            "the agent on this node does not answer at {}: {why}",
            self.task.args.socket
        ))
    }

    fn connect(&mut self, now: Instant) {
        self.retry_at = now + RETRY;
        let path = PathBuf::from(&self.task.args.socket);
        match Link::connect(&path).and_then(|mut link| {
            for blob in &self.task.blobs {
                link.send(blob)?;
            }
            if self.phase == Phase::Opening && self.task.truncates() {
                // The file as it will be: a shim on another node may have to find its place in it though this one never reports.
                (self.open.stdout.base, self.open.stderr.base) = (0, 0);
            }
            if self.phase != Phase::Opening {
                if self.phase == Phase::Running {
                    self.outputs.iter_mut().for_each(|o| o.sync(now));
                }
                self.open.resume = self.offsets();
            }
            link.send(&Frame::Control(ToAgent::Open(Box::new(self.open.clone()))))?;
            if self.term_asked {
                link.send(&Frame::Control(ToAgent::WhyTerm))?;
            }
            Ok(link)
        }) {
            Ok(link) => self.link = Some(link),
            Err(e) => self.last_error = Some(e),
        }
    }

    fn lose(&mut self, error: io::Error) {
        if self.link.take().is_some_and(|l| l.since.elapsed() >= STEADY) || self.live {
            self.lost_at = Instant::now();
        }
        self.live = false;
        self.retry_at = Instant::now() + RETRY;
        self.last_error = Some(error);
    }

    fn offsets(&self) -> Vec<(Stream, u64)> {
        self.outputs.iter().map(|o| (o.stream, o.done())).collect()
    }

    fn send(&mut self, message: ToAgent) {
        self.send_frame(&Frame::Control(message));
    }

    fn send_frame(&mut self, frame: &Frame<ToAgent>) {
        let Some(link) = &mut self.link else { return };
        if let Err(e) = link.send(frame).and_then(|()| link.flush()) {
            self.lose(e);
        }
    }

    fn wait(&mut self) {
        let now = Instant::now();
        let ending = self.ending.is_some();
        let backlog = self.link.as_ref().map_or(0, Link::backlog);
        let writing = self.phase != Phase::HandedOver;
        let mut deadlines: Vec<Instant> = self.outputs.iter().filter(|_| writing).filter_map(|o| o.due_at(now)).collect();
        deadlines.extend(self.last_words.as_ref().map(|(at, _)| *at));
        if self.link.is_none() && !ending {
            deadlines.push(self.retry_at);
        }
        let timeout = deadlines.into_iter().min().map_or(PollTimeout::NONE, |at| {
            let left = at.saturating_duration_since(now).min(Duration::from_secs(60)) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let crowded = self.outputs.iter().any(|o| o.waiting() > 2 * WINDOW);
        let mut link_events = PollFlags::empty();
        link_events.set(PollFlags::POLLIN, !crowded);
        link_events.set(PollFlags::POLLOUT, backlog > 0);
        let link_watched = self.link.as_ref().filter(|_| !link_events.is_empty());
        let input_wanted = self.live && self.phase == Phase::Running && !ending && backlog < BACKLOG && self.input.wants_poll();

        let mut fds = Vec::with_capacity(5);
        let mut who = Vec::with_capacity(5);
        let mut watch = |name, fd, events| {
            fds.push(PollFd::new(fd, events));
            who.push(name);
        };
        if backlog < BACKLOG {
            watch(Source::Signals, self.signals.as_fd(), PollFlags::POLLIN);
        }
        if let Some(link) = link_watched {
            watch(Source::Link, link.as_fd(), link_events);
        }
        if input_wanted {
            watch(Source::Input, self.input.as_fd(), PollFlags::POLLIN);
        }
        for (i, o) in self.outputs.iter().enumerate() {
            if writing && o.wants_poll() {
                watch(Source::Output(i), o.as_fd(), PollFlags::POLLOUT);
            }
        }
        let _ = poll(&mut fds, timeout);
        let ready: Vec<(Source, PollFlags)> = who
            .into_iter()
            .zip(&fds)
            .filter_map(|(w, fd)| Some((w, fd.revents().filter(|r| !r.is_empty())?)))
            .collect();
        let due: Vec<usize> = (0..2)
            .filter(|i| self.outputs[*i].due_at(now).is_some_and(|at| at <= Instant::now()))
            .collect();
        for (source, events) in ready {
            match source {
                Source::Signals => self.on_signals(),
                Source::Link => self.on_link(events),
                Source::Input => self.on_input(),
                Source::Output(i) => self.on_output(i),
            }
        }
        due.into_iter().filter(|_| writing).for_each(|i| self.on_output(i));
    }

    fn on_output(&mut self, i: usize) {
        if self.phase == Phase::HandedOver {
            return;
        }
        let wrote = self.outputs[i].write(Instant::now());
        self.tell_news(i);
        self.acknowledge(i);
        if wrote == Wrote::Closed && self.ending.is_none() {
            // What the program would have met at its next write.
            self.pass_on(libc::SIGPIPE);
        }
    }

    /// For the administrator: the job's output holds the program's bytes alone.
    fn tell_news(&mut self, i: usize) {
        let stream = name(self.outputs[i].stream);
        for line in self.outputs[i].take_news() {
            journal(self.task.args.job, &format!("{stream}: {line}"));
        }
    }

    fn acknowledge(&mut self, i: usize) {
        if self.live
            && let Some(offset) = self.outputs[i].ack_due(ACK_EVERY)
        {
            let stream = self.outputs[i].stream;
            self.send(ToAgent::Wrote { stream, offset });
        }
    }

    fn on_input(&mut self) {
        self.input.fill();
        self.send_input();
    }

    fn send_input(&mut self) {
        while self.live
            && let Some((offset, bytes)) = self.input.unsent()
        {
            for (i, piece) in bytes.chunks(MAX_DATA).enumerate() {
                let offset = offset + (i * MAX_DATA) as u64;
                self.send_frame(&Frame::Data {
                    stream: Stream::Stdin,
                    offset,
                    bytes: piece.to_vec(),
                });
            }
        }
        if self.live
            && let Some(offset) = self.input.unsent_eof()
        {
            self.send(ToAgent::StdinEof { offset });
        }
    }

    fn on_link(&mut self, events: PollFlags) {
        let Some(link) = &mut self.link else { return };
        if events.contains(PollFlags::POLLOUT)
            && let Err(e) = link.flush()
        {
            return self.lose(e);
        }
        if !events.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR) {
            return;
        }
        // What came before the end of the stream is still heard: the agent may have said how the program ended.
        let filled = link.fill();
        while let Some(link) = &mut self.link {
            match link.next_frame() {
                Ok(Some(frame)) => self.on_frame(frame),
                Ok(None) => break,
                Err(e) => return self.lose(e),
            }
            if self.end_now.is_some() {
                return;
            }
        }
        if let Err(e) = filled {
            self.lose(e);
        }
    }

    fn on_frame(&mut self, frame: Frame<ToShim>) {
        match frame {
            Frame::Data { stream, offset, bytes } => self.on_data(stream, offset, &bytes),
            Frame::Control(message) => self.on_message(message),
            Frame::Environment(_) | Frame::Arguments(_) | Frame::Script(_) => {
                self.lose(io::Error::new(io::ErrorKind::InvalidData, "a blob from the agent"));
            }
        }
    }

    fn on_data(&mut self, stream: Stream, offset: u64, bytes: &[u8]) {
        if self.phase == Phase::HandedOver {
            return;
        }
        let Some(i) = self.outputs.iter().position(|o| o.stream == stream) else {
            return;
        };
        if !self.outputs[i].take(offset, bytes) {
            return self.lose(io::Error::new(io::ErrorKind::InvalidData, "bytes of the output are missing"));
        }
        if !self.outputs[i].needs_poll() {
            self.on_output(i);
        }
    }

    fn on_message(&mut self, message: ToShim) {
        match message {
            ToShim::Progress(line) => {
                if !self.task.is_batch() && self.task.args.task == 0 && self.phase == Phase::Opening {
                    say(&format!("slurm-vm: job {}: {line}", self.task.args.job));
                }
            }
            ToShim::Started { from, resumed } => self.on_started(&from, resumed),
            ToShim::StdinTaken { offset } => self.input.taken(offset),
            ToShim::Cause(cause) => self.on_cause(cause),
            // Who goes on with the output is told so again.
            ToShim::Exited(_) if self.phase == Phase::HandedOver => {}
            ToShim::Exited(ended) => self.ending = Some(End::Program(ended)),
            // An agent that was restarted while the VM left does not know of it. Ending here would end the job in Slurm.
            ToShim::Failed { .. } if self.phase == Phase::HandedOver && !self.live => self.lose(io::ErrorKind::ConnectionReset.into()),
            ToShim::Failed { outcome, why } => self.ending = Some(End::Failed(outcome, why)),
            ToShim::HandOver => self.hand_over(),
            ToShim::TakeBack => self.take_back(),
        }
    }

    fn on_started(&mut self, from: &[StreamStart], resumed: bool) {
        let first = self.phase == Phase::Opening;
        // What was sent on a connection that broke may be lost, so it is sent again from where the guest has it.
        let stdin = from
            .iter()
            .find(|s| s.stream == Stream::Stdin)
            .map_or_else(|| self.input.taken_so_far(), |s| s.offset);
        let _ = self.input.restart(stdin);
        for start in from {
            let Some(output) = self.outputs.iter_mut().find(|o| o.stream == start.stream) else {
                continue;
            };
            if first && resumed {
                let _ = output.resume(start);
            } else if start.offset > output.received() {
                output.skip_to(start.offset);
            }
        }
        if first && !resumed && self.task.truncates() {
            self.truncate();
        }
        (self.open.stdout, self.open.stderr) = (self.outputs[0].sink.clone(), self.outputs[1].sink.clone());
        if self.open.terminal.is_some() && self.terminal.is_none() {
            self.terminal = RawTerminal::enter();
        }
        self.phase = Phase::Running;
        self.live = true;
        if std::mem::take(&mut self.notice) {
            self.send(ToAgent::Notice);
        }
        for signo in std::mem::take(&mut self.held) {
            self.send(ToAgent::Signal { signo });
        }
        self.send_input();
    }

    fn truncate(&mut self) {
        let [stdout, stderr] = &mut self.outputs;
        let _ = stdout.truncate();
        if (stdout.sink.dev, stdout.sink.ino) != (stderr.sink.dev, stderr.sink.ino) {
            let _ = stderr.truncate();
        }
    }

    fn hand_over(&mut self) {
        if self.ending.is_some() && self.all_is_written() {
            return;
        }
        // What is not written is dropped here, and the next shim gets it: it is not for this one to end the job.
        self.ending.take_if(|end| matches!(end, End::Program(_)));
        self.phase = Phase::HandedOver;
        let now = Instant::now();
        for i in 0..self.outputs.len() {
            self.outputs[i].hand_over(now);
            self.tell_news(i);
        }
        // What is not on storage is not reported: the guest still has it, and the next shim gets it again.
        let wrote = self.offsets();
        let sinks = self.outputs.iter().map(|o| (o.stream, o.sink.clone())).collect();
        self.send(ToAgent::HandedOver { wrote, sinks });
    }

    /// What was dropped at the hand-over, the program's end perhaps with it, comes again in a session that is opened anew.
    fn take_back(&mut self) {
        self.phase = Phase::Running;
        self.lose(io::Error::other("the VM stays"));
        self.retry_at = Instant::now();
    }

    fn on_cause(&mut self, cause: Cause) {
        self.term_asked = false;
        let what = match cause {
            Cause::Moved | Cause::Requeued => return self.end_now = Some(self.left()),
            Cause::Preemption => return,
            Cause::Cancel => Some("cancelled"),
            Cause::TimeLimit => Some("time limit reached"),
            Cause::Unknown => None,
        };
        // Slurm's own line is kept out of a batch job's output; for a step srun prints it.
        if let Some(what) = what.filter(|_| self.task.is_batch() && self.last_words.is_none() && !self.spoken) {
            let line = format!("slurm-vm: job {} on {}: {what}", self.task.args.job, context::node_name());
            self.last_words = Some((Instant::now() + LAST_WORDS, line));
        }
        match self.phase {
            Phase::Opening => {
                self.speak_last_words();
                self.end_now = Some(End::Killed(libc::SIGTERM));
            }
            Phase::Running => self.pass_on(libc::SIGTERM),
            Phase::HandedOver => self.end_now = Some(self.left()),
        }
    }

    /// The job leaves this node. Its script goes on elsewhere; a step ends here, and whoever waits for it must not take that for success.
    fn left(&self) -> End {
        if self.task.is_batch() {
            End::Quiet
        } else {
            End::Killed(libc::SIGTERM)
        }
    }

    fn speak_last_words(&mut self) {
        if let Some((_, line)) = self.last_words.take() {
            say(&line);
            self.spoken = true;
        }
    }

    fn on_signals(&mut self) {
        while let Some(signo) = self.signals.next_signal() {
            match signo {
                libc::SIGTERM => self.on_term(),
                NOTICE_SIGNAL => {
                    self.notice = !self.live;
                    if self.live {
                        self.send(ToAgent::Notice);
                    }
                }
                libc::SIGWINCH if self.open.terminal.is_some() => self.on_resize(),
                libc::SIGINT | libc::SIGHUP | libc::SIGQUIT if self.phase == Phase::Opening && !self.task.is_batch() => {
                    self.end_now = Some(End::Killed(signo));
                }
                _ => self.pass_on(signo),
            }
            if self.end_now.is_some() {
                return;
            }
        }
    }

    fn on_term(&mut self) {
        match (self.phase, &self.link) {
            (Phase::HandedOver, _) => self.end_now = Some(self.left()),
            // Nobody to ask and nothing that runs.
            (Phase::Opening, None) => self.end_now = Some(End::Killed(libc::SIGTERM)),
            _ => {
                self.term_asked = true;
                self.send(ToAgent::WhyTerm);
            }
        }
    }

    fn on_resize(&mut self) {
        if let Some(size) = context::terminal(&self.input, io::stdout()) {
            self.open.terminal = Some(size.clone());
            if self.live {
                self.send(ToAgent::Resize(size));
            }
        }
    }

    /// A signal for the program, now or once there is a way to it.
    fn pass_on(&mut self, signo: i32) {
        if self.live && self.phase == Phase::Running {
            self.send(ToAgent::Signal { signo });
        } else if self.held.len() < HELD {
            self.held.push(signo);
        }
    }

    /// The agent learns that all output is written; it is not waited for long.
    fn farewell(&mut self) {
        for i in 0..self.outputs.len() {
            self.acknowledge(i);
        }
        let until = Instant::now() + FAREWELL;
        while let Some(link) = &mut self.link
            && link.backlog() > 0
            && Instant::now() < until
        {
            let _ = poll(&mut [PollFd::new(link.as_fd(), PollFlags::POLLOUT)], 100u16);
            if link.flush().is_err() {
                break;
            }
        }
    }
}

fn name(stream: Stream) -> &'static str {
    match stream {
        Stream::Stdin => "standard input",
        Stream::Stdout => "standard output",
        Stream::Stderr => "standard error",
    }
}

#[derive(Debug, Clone, Copy)]
enum Source {
    Signals,
    Link,
    Input,
    Output(usize),
}
