//! A link is one connection to libvirt that comes back by itself: a thread of its own opens it, again and again with a growing pause, and callers
//! wait for it with a deadline. The thread is there because opening blocks for as long as the daemon does not answer, without a limit.
//!
//! At most [`IN_FLIGHT`] calls are let through at a time. libvirtd stops *reading* a connection with 5 requests on the way (`max_client_requests`), our
//! signs of life then get no answer, and the client cuts a connection that works: so one place is always left free.
#![forbid(unsafe_code)]

use super::callbacks::{Raw, Sink};
use super::ffi::{Connection, VirError};
use crate::hypervisor::{HypervisorError, Result};
use std::{
    ops::Deref,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Calls at a time on one connection; libvirtd's default limit is 5.
const IN_FLIGHT: u32 = 4;
/// Seconds between signs of life, and how many may stay without an answer: a daemon that stands still is given up after about 20 s.
const KEEP_ALIVE: (i32, u32) = (5, 3);
/// How long a daemon that is not there is waited for: several times what its restart takes.
const ABSENT: Duration = Duration::from_secs(20);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Told of `true` when a link is up, `false` when it was lost. Called with no lock held.
pub(super) type Watch = Arc<dyn Fn(bool) + Send + Sync>;

/// One connection that comes back.
#[derive(Debug)]
pub(super) struct Link {
    shared: Arc<Shared>,
}

struct Shared {
    uri: String,
    state: Mutex<State>,
    changed: Condvar,
    /// Registers for events on each new connection.
    events: Option<Sink>,
    watch: Option<Watch>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("uri", &self.uri).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct State {
    connection: Option<Arc<Connection>>,
    /// Counts the connections, so that a late report about an old one does not cut the new one.
    serial: u64,
    /// Broken connections: closed by the link's thread, never by the event thread, which would wait for itself.
    broken: Vec<Arc<Connection>>,
    in_flight: u32,
    error: Option<VirError>,
    wanted: bool,
    ending: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves the state whole: each change is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lost(&self, serial: u64) {
        let mut state = self.lock();
        if state.serial != serial {
            return;
        }
        let Some(broken) = state.connection.take() else { return };
        state.broken.push(broken);
        state.error = None;
        drop(state);
        self.changed.notify_all();
        if let Some(watch) = &self.watch {
            watch(false);
        }
    }
}

impl Link {
    /// Makes a link. It is opened when it is first used, or at once if it carries events.
    pub(super) fn new(name: &str, uri: &str, events: Option<Sink>, watch: Option<Watch>) -> Result<Self> {
        let state = State {
            wanted: events.is_some(),
            ..State::default()
        };
        let shared = Arc::new(Shared {
            uri: uri.into(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            events,
            watch,
        });
        let for_thread = Arc::clone(&shared);
        std::thread::Builder::new()
            .name(format!("libvirt-{name}"))
            .spawn(move || keep_open(&for_thread))
            .map_err(|e| HypervisorError::Connect {
                uri: uri.into(),
                message: format!("no thread for it: {e}"),
            })?;
        Ok(Self { shared })
    }

    /// Calls under way.
    pub(super) fn load(&self) -> u32 {
        self.shared.lock().in_flight
    }

    /// Waits for a place on the connection at most for `patience`, and less for a daemon that is not there: a job that
    /// meets a node without libvirt is to run elsewhere.
    pub(super) fn acquire(&self, call: &'static str, patience: Duration) -> Result<Lease<'_>> {
        let deadline = Instant::now() + patience;
        let mut absent_until = None;
        let mut state = self.shared.lock();
        if !state.wanted {
            state.wanted = true;
            self.shared.changed.notify_all();
        }
        loop {
            if let Some(connection) = &state.connection
                && state.in_flight < IN_FLIGHT
            {
                let lease = Lease {
                    shared: &self.shared,
                    connection: Arc::clone(connection),
                    serial: state.serial,
                };
                state.in_flight += 1;
                return Ok(lease);
            }
            let until = if state.connection.is_none() {
                *absent_until.get_or_insert_with(|| deadline.min(Instant::now() + ABSENT))
            } else {
                absent_until = None;
                deadline
            };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(match (&state.connection, &state.error) {
                    (None, Some(e)) => HypervisorError::Connect {
                        uri: self.shared.uri.clone(),
                        message: e.message.clone(),
                    },
                    (None, None) => HypervisorError::Connect {
                        uri: self.shared.uri.clone(),
                        message: format!("no answer within {:?}", patience.min(ABSENT)),
                    },
                    (Some(_), _) => HypervisorError::Timeout { call, after: patience },
                });
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.ending = true;
        drop(state);
        // The thread is not waited for: it may be inside an open that nobody answers.
        self.shared.changed.notify_all();
    }
}

/// The right to one call on a connection.
#[derive(Debug)]
pub(super) struct Lease<'a> {
    shared: &'a Arc<Shared>,
    connection: Arc<Connection>,
    serial: u64,
}

impl Deref for Lease<'_> {
    type Target = Connection;
    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Lease<'_> {
    /// Whether the connection broke under the call; if so it is opened anew from now on.
    pub(super) fn broke(&self) -> bool {
        let broke = !self.connection.is_alive();
        if broke {
            self.shared.lost(self.serial);
        }
        broke
    }

    /// The URI, for error texts.
    pub(super) fn uri(&self) -> &str {
        &self.shared.uri
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.in_flight -= 1;
        drop(state);
        self.shared.changed.notify_all();
    }
}

/// The link's thread.
fn keep_open(shared: &Arc<Shared>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let mut state = shared.lock();
        let serial = loop {
            let broken = std::mem::take(&mut state.broken);
            if !broken.is_empty() {
                drop(state);
                drop(broken);
                state = shared.lock();
                continue;
            }
            if state.ending {
                let last = state.connection.take();
                drop(state);
                drop(last);
                return;
            }
            if state.wanted && state.connection.is_none() {
                break state.serial + 1;
            }
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        match open(shared, serial) {
            Ok(connection) => {
                pause = FIRST_PAUSE;
                let mut state = shared.lock();
                state.connection = Some(Arc::new(connection));
                state.serial = serial;
                state.error = None;
                drop(state);
                shared.changed.notify_all();
                if let Some(watch) = &shared.watch {
                    watch(true);
                }
            }
            Err(e) => {
                log::debug!("libvirt at {}: {}: {}", shared.uri, e.call, e.message);
                let mut state = shared.lock();
                state.error = Some(e);
                let deadline = Instant::now() + pause;
                while !state.ending {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break;
                    }
                    state = shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
                }
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

fn open(shared: &Arc<Shared>, serial: u64) -> std::result::Result<Connection, VirError> {
    let mut connection = Connection::open(&shared.uri)?;
    let weak = Arc::downgrade(shared);
    connection.on_close(Arc::new(move |raw| {
        if let (Raw::Closed, Some(shared)) = (raw, weak.upgrade()) {
            shared.lost(serial);
        }
    }))?;
    connection.keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1)?;
    if let Some(sink) = &shared.events {
        connection.on_events(sink)?;
    }
    Ok(connection)
}
