//! The agent's UNIX socket: prolog and epilog hooks, shims, `svm`. One thread accepts, one thread serves each
//! connection; who is at the other end is taken from SO_PEERCRED (unix(7)), never from what it says. How much of it a user
//! can have stands in [`crate::limits`]: whoever is over it is closed at once, and a client of ours tries again.
pub mod asks;
mod session;

use std::{
    io::{self, BufRead, BufReader, Read},
    os::{
        fd::AsFd,
        unix::{
            fs::PermissionsExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use slurm_vm_api::{
    hooks::{self, HookReply, HookRequest},
    message::{Message, Misread},
    session::OPENING,
};

pub use asks::{log_text, prefixed};

use crate::{
    controller::Controller,
    core::registry::Announced,
    limits::{ANSWER_WITHIN, Bounds, Budget, FIRST_WORDS},
    node::Node,
};

/// What the socket serves.
#[derive(Debug, Clone)]
pub struct Roles {
    /// The node role, where it is enabled.
    pub node: Option<Arc<Node>>,
    /// The controller role, where it is enabled.
    pub controller: Option<Arc<Controller>>,
    /// Users (besides root) that may see and move all jobs: SlurmUser.
    pub operators: Vec<u32>,
}

impl Roles {
    /// Root and SlurmUser.
    #[must_use]
    pub fn is_operator(&self, uid: u32) -> bool {
        uid == 0 || self.operators.contains(&uid)
    }
}

/// Binds the socket, mode 0666: everybody may connect, SO_PEERCRED decides what they may do.
///
/// # Errors
/// Those of bind(2); a stale socket is removed first.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755))?;
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}

/// Accepts until the listener fails; each connection gets a thread, within what its user may have.
pub fn serve(listener: &UnixListener, roles: &Roles) {
    let (descriptors, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
    let bounds = Bounds::for_descriptors(descriptors);
    if bounds != Bounds::default() {
        log::warn!(
            "{descriptors} descriptors are enough for {} connections of users, not for {}: give the service more (LimitNOFILE)",
            bounds.connections,
            Bounds::default().connections
        );
    }
    let budget = Budget::new(bounds);
    let mut complaints = Complaints::default();
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            Err(e) => {
                complaints.say(&format!("accept: {e}"));
                // No descriptor is free, most likely: waiting clients stay in the listener's queue.
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let uid = match getsockopt(&stream.as_fd(), PeerCredentials) {
            Ok(peer) => peer.uid(),
            Err(e) => {
                complaints.say(&format!("a client's uid is not told: {e}"));
                continue;
            }
        };
        let place = match budget.connection(uid, roles.is_operator(uid)) {
            Ok(place) => place,
            Err(e) => {
                complaints.say(&format!("a connection of uid {uid} is closed: {e}"));
                continue;
            }
        };
        let (roles, budget) = (roles.clone(), budget.clone());
        let spawned = thread::Builder::new().name("client".into()).spawn(move || {
            let _place = place;
            if let Err(e) = client(stream, &roles, &budget, uid) {
                log::debug!("client: {e}");
            }
        });
        if let Err(e) = spawned {
            complaints.say(&format!("a connection of uid {uid} is closed: {e}"));
        }
    }
}

/// Lines that a client can cause: one in ten seconds, with the number of those that were left out.
#[derive(Default)]
struct Complaints {
    last: Option<Instant>,
    left_out: u64,
}

impl Complaints {
    fn say(&mut self, line: &str) {
        if self.last.is_some_and(|last| last.elapsed() < Duration::from_secs(10)) {
            self.left_out += 1;
            return;
        }
        let more = std::mem::take(&mut self.left_out);
        let more = if more > 0 {
            format!(" (and {more} like it before)")
        } else {
            String::new()
        };
        log::warn!("{line}{more}");
        self.last = Some(Instant::now());
    }
}

/// A connection that is read until a point in time and not beyond, however slowly the bytes come.
struct Until<'a> {
    stream: &'a UnixStream,
    end: Option<Instant>,
}

impl<'a> Until<'a> {
    fn new(stream: &'a UnixStream, end: Instant) -> Self {
        Self { stream, end: Some(end) }
    }

    /// From here on it may take as long as it takes.
    fn without_end(&mut self) -> io::Result<()> {
        self.end = None;
        self.stream.set_read_timeout(None)
    }
}

impl Read for Until<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(end) = self.end {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left))?;
        }
        self.stream.read(buffer)
    }
}

fn client(stream: UnixStream, roles: &Roles, budget: &Arc<Budget>, uid: u32) -> io::Result<()> {
    let mut words = Until::new(&stream, Instant::now() + FIRST_WORDS);
    let mut first = [0u8; 1];
    words.read_exact(&mut first)?;
    if first[0] == OPENING {
        return session::serve(&Arc::new(stream), roles, budget, uid);
    }
    let mut line = first.to_vec();
    BufReader::new(words).take(hooks::MAX_LINE as u64).read_until(b'\n', &mut line)?;
    stream.set_write_timeout(Some(ANSWER_WITHIN))?;
    let reply = match Message::read(&String::from_utf8_lossy(&line)) {
        Ok(Message::Hook(request)) => hook(request, roles, uid),
        Err(Misread::Hook(why)) => HookReply::refused(why),
        Ok(Message::Ask(ask)) => return asks::serve(&stream, roles, budget, uid, Ok(ask)),
        Err(Misread::Ask(why)) => return asks::serve(&stream, roles, budget, uid, Err(why)),
    };
    io::Write::write_all(&mut &stream, hooks::to_line(&reply).as_bytes())
}

/// Prolog and epilog: root only.
fn hook(request: HookRequest, roles: &Roles, uid: u32) -> HookReply {
    if uid != 0 {
        return HookReply::refused("only root's prolog and epilog may ask this");
    }
    let Some(node) = &roles.node else {
        return HookReply::refused("this agent has no node role");
    };
    match request {
        HookRequest::Ensure {
            job,
            uid,
            gid,
            spec,
            restart,
        } => {
            log::info!("job {job}: prolog (restart {restart}, uid {uid}, image {})", spec.image);
            let user = crate::accounts::entry(uid, gid);
            match node.ensure(job, &Announced { restart, user, spec }) {
                Ok(run) => HookReply::done(Some(run)),
                Err(why) => HookReply::refused(why),
            }
        }
        HookRequest::Release { job, uid: _, wait_s } => {
            log::info!("job {job}: epilog");
            match node.release(job, Duration::from_secs(wait_s.into())) {
                Ok(()) => HookReply::done(None),
                Err(why) => {
                    let domain = node
                        .record(job)
                        .map_or_else(|| crate::core::record::domain_name(job, 0), |r| r.domain());
                    HookReply::stuck(domain, why)
                }
            }
        }
    }
}
