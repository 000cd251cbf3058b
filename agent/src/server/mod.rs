//! The agent's UNIX socket: prolog and epilog hooks, shims, `svm`. One thread accepts, one thread serves each
//! connection; who is at the other end is taken from SO_PEERCRED (unix(7)), never from what it says.
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
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use slurm_vm_api::{
    hooks::{self, HookReply, HookRequest},
    session::{OPENING, UserEntry},
};

pub use asks::{log_text, prefixed};

use crate::{controller::Controller, node::Node};

/// Connections served at a time; more are closed at once.
const MAX_CONNECTIONS: usize = 4096;
/// How long a client may take to say what it wants.
const FIRST_WORDS: Duration = Duration::from_secs(10);

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

/// Accepts until the listener fails; each connection gets a thread.
pub fn serve(listener: &UnixListener, roles: &Roles) {
    let open = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            Err(e) => {
                log::warn!("accept: {e}");
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        if open.fetch_add(1, Ordering::SeqCst) >= MAX_CONNECTIONS {
            open.fetch_sub(1, Ordering::SeqCst);
            log::warn!("more than {MAX_CONNECTIONS} connections: one is refused");
            continue;
        }
        let (roles, count) = (roles.clone(), open.clone());
        let spawned = thread::Builder::new().name("client".into()).spawn(move || {
            if let Err(e) = client(stream, &roles) {
                log::debug!("client: {e}");
            }
            count.fetch_sub(1, Ordering::SeqCst);
        });
        if spawned.is_err() {
            open.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

fn client(mut stream: UnixStream, roles: &Roles) -> io::Result<()> {
    let uid = nix::sys::socket::getsockopt(&stream.as_fd(), nix::sys::socket::sockopt::PeerCredentials)?.uid();
    stream.set_read_timeout(Some(FIRST_WORDS))?;
    let mut first = [0u8; 1];
    stream.read_exact(&mut first)?;
    if first[0] == OPENING {
        return session::serve(&stream, roles, uid);
    }
    let mut line = String::from_utf8_lossy(&first).into_owned();
    let mut reader = BufReader::new(stream.try_clone()?).take(hooks::MAX_LINE as u64);
    reader.read_line(&mut line)?;
    if line.contains("\"hook\"") {
        let reply = match hooks::message_from_line(&line) {
            Ok(message) => hook(message.hook, roles, uid),
            Err(why) => HookReply::refused(why),
        };
        return io::Write::write_all(&mut stream, hooks::to_line(&reply).as_bytes());
    }
    asks::serve(&stream, roles, uid, &line)
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
            let name = nix::unistd::User::from_uid(uid.into()).ok().flatten();
            let user = UserEntry {
                name: name.as_ref().map_or_else(|| uid.to_string(), |u| u.name.clone()),
                uid,
                gid,
                home: name.as_ref().map_or_else(String::new, |u| u.dir.to_string_lossy().into_owned()),
                shell: name.map_or_else(String::new, |u| u.shell.to_string_lossy().into_owned()),
            };
            if restart == 0 {
                // Of another job that had this number.
                node.forget_completion(job);
            }
            match node.ensure(job, user, spec) {
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
