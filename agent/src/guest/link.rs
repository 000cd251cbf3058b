//! The link's thread: socket, timers and channels around [`LinkCore`].
//!
//! The thread is named after the VM. It ends when the link is stopped or dropped, or when the receiver of the events is gone. When the
//! events' channel is full it waits, and so does the guest: its windows are not opened.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, SendTimeoutError, Sender, TryRecvError, bounded, unbounded};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::core::LinkCore;
use super::events::{LinkEvent, LinkRequest};
use super::transport::{GuestStream, GuestTransport};

/// How often a thread that waits for its owner looks whether it has to stop.
const STOP_LOOK: Duration = Duration::from_millis(50);

/// How a link behaves.
#[derive(Debug, Clone)]
pub struct LinkConfig {
    /// For the thread's name and the log.
    pub name: String,
    /// Random, and another one for each link to the same guest: it keeps the answers to this link apart from those to an earlier one.
    pub seed: u64,
    /// Pause after the first failed connection, doubled up to `retry_max`.
    pub retry_min: Duration,
    /// Longest pause between connections.
    pub retry_max: Duration,
    /// Events kept for the owner before the thread waits.
    pub event_capacity: usize,
}

impl LinkConfig {
    /// The usual behaviour.
    #[must_use]
    pub fn new(name: impl Into<String>, seed: u64) -> Self {
        Self {
            name: name.into(),
            seed,
            retry_min: Duration::from_millis(20),
            retry_max: Duration::from_secs(1),
            event_capacity: 1024,
        }
    }
}

/// Hands requests to a link; as many copies as needed.
#[derive(Debug, Clone)]
pub struct LinkHandle {
    requests: Sender<LinkRequest>,
    wake: Arc<EventFd>,
}

impl LinkHandle {
    /// Hands in a request; never blocks. After the link's end the request is dropped: the events' channel is closed then, too.
    pub fn send(&self, request: LinkRequest) {
        if self.requests.send(request).is_ok() {
            // Fails only when the counter is full, and then the thread is awake anyway.
            let _ = self.wake.write(1);
        }
    }
}

/// A link to the helper of one guest.
pub struct GuestLink {
    handle: LinkHandle,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for GuestLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestLink").field("stopped", &self.stop).finish_non_exhaustive()
    }
}

impl GuestLink {
    /// Starts the thread. Requests may be handed in at once; nothing is sent before the guest has answered.
    ///
    /// # Errors
    /// When the thread or its wake-up descriptor cannot be made.
    pub fn start(config: LinkConfig, transport: Box<dyn GuestTransport>) -> io::Result<(Self, Receiver<LinkEvent>)> {
        let (requests, inbox) = unbounded();
        let (events, receiver) = bounded(config.event_capacity.max(1));
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let stop = Arc::new(AtomicBool::new(false));
        let name = format!("guest-{}", config.name);
        let mut runner = Runner {
            core: LinkCore::new(config.seed),
            next_try: transport.now(),
            pause: config.retry_min,
            config,
            transport,
            stream: None,
            outbox: Vec::new(),
            sent: 0,
            inbox,
            events,
            wake: Arc::clone(&wake),
            stop: Arc::clone(&stop),
            inbuf: vec![0; 64 * 1024].into_boxed_slice(),
        };
        let thread = std::thread::Builder::new().name(name).spawn(move || runner.run())?;
        Ok((
            Self {
                handle: LinkHandle { requests, wake },
                stop,
                thread: Some(thread),
            },
            receiver,
        ))
    }

    /// A handle for requests.
    #[must_use]
    pub fn handle(&self) -> LinkHandle {
        self.handle.clone()
    }

    /// Hands in a request.
    pub fn send(&self, request: LinkRequest) {
        self.handle.send(request);
    }

    /// Closes the connection and ends the thread. What was not sent is dropped; the guest keeps its side for the next link.
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ = self.handle.wake.write(1);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of a guest link has panicked");
        }
    }
}

impl Drop for GuestLink {
    fn drop(&mut self) {
        self.end();
    }
}

struct Runner {
    config: LinkConfig,
    core: LinkCore,
    transport: Box<dyn GuestTransport>,
    stream: Option<Box<dyn GuestStream>>,
    next_try: Instant,
    pause: Duration,
    outbox: Vec<u8>,
    sent: usize,
    inbox: Receiver<LinkRequest>,
    events: Sender<LinkEvent>,
    wake: Arc<EventFd>,
    stop: Arc<AtomicBool>,
    inbuf: Box<[u8]>,
}

impl Runner {
    fn run(&mut self) {
        while !self.stop.load(Ordering::Acquire) {
            loop {
                match self.inbox.try_recv() {
                    Ok(request) => self.core.request(request),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            self.connect();
            self.write();
            if let Some(reason) = self.core.broken() {
                self.disconnect(&reason);
            }
            if !self.deliver() {
                return;
            }
            self.wait_and_read();
        }
    }

    fn connect(&mut self) {
        let now = self.transport.now();
        if self.stream.is_some() || now < self.next_try {
            return;
        }
        match self.transport.connect() {
            Ok(stream) => {
                self.stream = Some(stream);
                self.core.connected(now);
            }
            Err(error) => {
                log::debug!("{}: failed to connect to the guest: {error}", self.config.name);
                self.retry_later(now);
            }
        }
    }

    fn retry_later(&mut self, now: Instant) {
        self.next_try = now + self.pause;
        self.pause = (self.pause * 2).min(self.config.retry_max);
    }

    fn disconnect(&mut self, reason: &str) {
        self.stream = None;
        self.outbox.clear();
        self.sent = 0;
        self.core.disconnected(reason);
        let now = self.transport.now();
        self.retry_later(now);
    }

    fn write(&mut self) {
        loop {
            if self.sent == self.outbox.len() {
                self.outbox.clear();
                self.sent = 0;
                let now = self.transport.now();
                self.core.fill(&mut self.outbox, now);
            }
            let Some(stream) = &mut self.stream else { return };
            if self.outbox.is_empty() {
                return;
            }
            match stream.write(&self.outbox[self.sent..]) {
                Ok(0) => return self.disconnect("the connection takes no more"),
                Ok(written) => self.sent += written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return self.disconnect(&error.to_string()),
            }
        }
    }

    /// Hands the events over. False when nobody wants them any more.
    fn deliver(&mut self) -> bool {
        while let Some(mut event) = self.core.event() {
            if matches!(event, LinkEvent::Up { .. }) {
                self.pause = self.config.retry_min;
            }
            loop {
                match self.events.send_timeout(event, STOP_LOOK) {
                    Ok(()) => break,
                    Err(SendTimeoutError::Disconnected(_)) => return false,
                    Err(SendTimeoutError::Timeout(_)) if self.stop.load(Ordering::Acquire) => return false,
                    Err(SendTimeoutError::Timeout(back)) => event = back,
                }
            }
        }
        true
    }

    fn wait_and_read(&mut self) {
        let now = self.transport.now();
        let deadline = if self.stream.is_some() {
            self.core.deadline()
        } else {
            Some(self.next_try)
        };
        let timeout = deadline.map_or(PollTimeout::NONE, |at| {
            PollTimeout::try_from(at.saturating_duration_since(now) + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        let mut fds = vec![PollFd::new(self.wake.as_fd(), PollFlags::POLLIN)];
        if let Some(stream) = &self.stream {
            let mut flags = PollFlags::POLLIN;
            flags.set(PollFlags::POLLOUT, self.sent < self.outbox.len());
            fds.push(PollFd::new(stream.as_fd(), flags));
        }
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => {
                log::error!("{}: failed to wait: {errno}", self.config.name);
                self.stop.store(true, Ordering::Release);
                return;
            }
        }
        let readable = fds
            .get(1)
            .and_then(PollFd::revents)
            .is_some_and(|flags| flags.intersects(!PollFlags::POLLOUT));
        // Non-blocking: an error only says that nobody has woken us.
        let _ = self.wake.read();
        if readable {
            self.read();
        }
    }

    fn read(&mut self) {
        let Some(stream) = &mut self.stream else { return };
        match stream.read(&mut self.inbuf) {
            Ok(0) => self.disconnect("the guest's port was closed"),
            Ok(read) => {
                let now = self.transport.now();
                self.core.received(&self.inbuf[..read], now);
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => self.disconnect(&error.to_string()),
        }
    }
}
