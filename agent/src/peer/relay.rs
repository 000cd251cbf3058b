//! The source's side of a move: UNIX sockets for libvirt and QEMU, each connection of which is carried to the destination's agent.
//!
//! ```text
//!  libvirtd/QEMU ── DIR/migration.sock ── this agent ══ TCP: TLS, proof, RelayOpen, bytes ══ agent there ── DIR/migration.sock ── QEMU -incoming
//! ```
//! Threads: `relay-accept` waits on the sockets; `relay-KIND` connects to the peer and carries one connection to its end. A stream without encryption goes on *in
//! the same TCP connection*, from the byte after the last TLS record: so it is tied to the proof by the connection itself, and needs no second secret. What is given
//! up with it is secrecy and integrity of the guest's memory and disks towards whoever can read or write the network between the two nodes.

use super::error::PeerError;
use super::moves::{Access, Count, MoveDir, Progress, StreamKind};
use super::pump;
use super::server::chain;
use super::session::{Peer, PeerAddress};
use super::streams::Streams;
use super::tls::TlsStream;
use super::wake::Wake;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

/// The first message of a relay stream, after the proof of identity.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RelayOpen {
    pub move_id: String,
    pub kind: StreamKind,
    pub token: String,
    pub encrypt: bool,
}

/// The answer to it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum RelayAnswer {
    Ready,
    Refused { reason: String },
}

/// What the source needs for the relay of one move.
#[derive(Debug, Clone)]
pub struct RelaySpec {
    /// The move.
    pub id: String,
    /// Its secret, as agreed with the destination.
    pub token: String,
    /// The destination's agent.
    pub to: PeerAddress,
    /// The parent of the move's directory, e.g. `/run/slurm-vm/move`.
    pub root: PathBuf,
    /// Who may use the sockets.
    pub access: Access,
    /// False: memory and disks go on in the clear; libvirt's own connection never does.
    pub encrypt: bool,
}

/// The sockets of one move, listening. Dropping it cuts all streams and removes the directory.
#[derive(Debug)]
pub struct RelayListener {
    dir: MoveDir,
    wake: Arc<Wake>,
    streams: Arc<Streams>,
    progress: Arc<Progress>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    peer: Arc<Peer>,
    spec: RelaySpec,
    streams: Arc<Streams>,
    progress: Arc<Progress>,
}

impl RelayListener {
    /// Makes the directory and the sockets and begins to listen. The destination's move must be open by the time somebody connects.
    ///
    /// # Errors
    /// If the directory, a socket or a thread cannot be made.
    pub fn open(peer: Arc<Peer>, spec: RelaySpec) -> Result<Self, PeerError> {
        let io = |source| PeerError::Io {
            what: "listen on the sockets of a move",
            source,
        };
        let dir = MoveDir::create_private(&spec.root, &spec.id, spec.access)?;
        let mut listeners = Vec::new();
        for kind in StreamKind::ALL {
            listeners.push((kind, listen(&dir.socket(kind), spec.access).map_err(io)?));
        }
        dir.hand_over(spec.access)?;
        let wake = Arc::new(Wake::new().map_err(io)?);
        let (streams, progress) = (Arc::new(Streams::default()), Arc::new(Progress::default()));
        let shared = Arc::new(Shared {
            peer,
            spec,
            streams: Arc::clone(&streams),
            progress: Arc::clone(&progress),
        });
        let woken = Arc::clone(&wake);
        let thread = thread::Builder::new()
            .name("relay-accept".into())
            .spawn(move || accept(&listeners, &woken, &shared))
            .map_err(io)?;
        Ok(Self {
            dir,
            wake,
            streams,
            progress,
            thread: Some(thread),
        })
    }

    /// The socket for one kind of stream, as libvirt must be told.
    #[must_use]
    pub fn socket(&self, kind: StreamKind) -> PathBuf {
        self.dir.socket(kind)
    }

    /// Bytes carried so far.
    #[must_use]
    pub fn progress(&self) -> &Progress {
        &self.progress
    }
}

impl Drop for RelayListener {
    fn drop(&mut self) {
        self.wake.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.streams.cut_all();
    }
}

fn listen(path: &Path, access: Access) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(access.socket_mode))?;
    if access.uid.is_some() || access.gid.is_some() {
        chown(path, access.uid, access.gid)?;
    }
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn accept(listeners: &[(StreamKind, UnixListener)], wake: &Wake, shared: &Arc<Shared>) {
    let id = &shared.spec.id;
    loop {
        let mut fds = vec![PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
        fds.extend(listeners.iter().map(|(_, l)| PollFd::new(l.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return log::error!("move {id}: stop listening: {e}"),
        }
        if wake.is_woken() {
            return;
        }
        for (kind, listener) in listeners {
            match listener.accept() {
                Ok((local, _)) => start(shared, *kind, local),
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                    ) => {}
                Err(e) => {
                    log::warn!("move {id}: cannot accept a connection: {e}");
                    wake.wait(std::time::Duration::from_millis(100));
                }
            }
        }
    }
}

fn start(shared: &Arc<Shared>, kind: StreamKind, local: UnixStream) {
    let inner = Arc::clone(shared);
    let work = move || {
        if let Err(e) = bridge(&inner, kind, local) {
            log::warn!("move {}: {kind:?} stream to {}: {}", inner.spec.id, inner.spec.to.node, chain(&e));
        }
    };
    if let Err(e) = thread::Builder::new().name(format!("relay-{kind:?}").to_lowercase()).spawn(work) {
        log::warn!("move {}: no thread for a {kind:?} stream: {e}", shared.spec.id);
    }
}

/// Any error before the bytes flow closes the local connection, which is how libvirt and QEMU learn of it.
fn bridge(shared: &Shared, kind: StreamKind, local: UnixStream) -> Result<(), PeerError> {
    let spec = &shared.spec;
    let encrypt = spec.encrypt || kind == StreamKind::Libvirt;
    let open = RelayOpen {
        move_id: spec.id.clone(),
        kind,
        token: spec.token.clone(),
        encrypt,
    };
    let stream = shared.peer.relay(&spec.to, &open)?;
    let watch = |source| PeerError::Io {
        what: "watch a stream",
        source,
    };
    let _listed = shared
        .streams
        .add(stream.socket().try_clone().map_err(watch)?, Some(local.try_clone().map_err(watch)?));
    carry(stream, local, kind, encrypt, &shared.progress.of(kind))
}

/// Carries the bytes of one stream both ways until both ends are done.
pub(super) fn carry(stream: TlsStream, local: UnixStream, kind: StreamKind, encrypt: bool, count: &Arc<Count>) -> Result<(), PeerError> {
    let (conn, tcp) = stream.into_parts();
    if kind == StreamKind::Migration {
        pump::bound(&tcp);
    }
    let result = if encrypt {
        pump::encrypted(conn, tcp, local, count)
    } else {
        pump::plain(&tcp, &local, count)
    };
    result.map_err(|source| PeerError::Io {
        what: "carry a stream to its end",
        source,
    })
}
