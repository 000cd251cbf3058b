//! Moves that were agreed on: the directory of sockets each has, and what the destination lets in while one is open.

use super::auth::{Role, Who};
use super::error::PeerError;
use super::relay::RelayOpen;
use super::streams::Streams;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a stream of a move carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StreamKind {
    /// libvirt's own connection to the other libvirtd. Always encrypted.
    Libvirt,
    /// The guest's memory.
    Migration,
    /// The disks (NBD).
    Disk,
}

impl StreamKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Libvirt, Self::Migration, Self::Disk];

    /// Its socket's name in the move's directory, on both sides.
    #[must_use]
    pub fn socket_name(self) -> &'static str {
        match self {
            Self::Libvirt => "libvirt.sock",
            Self::Migration => "migration.sock",
            Self::Disk => "disk.sock",
        }
    }

    fn index(self) -> usize {
        match self {
            Self::Libvirt => 0,
            Self::Migration => 1,
            Self::Disk => 2,
        }
    }
}

/// Bytes carried so far, by kind of stream, over all its connections.
#[derive(Debug, Default)]
pub struct Progress([Arc<Count>; 3]);

/// Bytes of one kind of stream.
#[derive(Debug, Default)]
pub struct Count {
    /// From the local socket to the peer.
    pub sent: AtomicU64,
    /// From the peer to the local socket.
    pub received: AtomicU64,
}

impl Progress {
    pub(super) fn of(&self, kind: StreamKind) -> Arc<Count> {
        Arc::clone(&self.0[kind.index()])
    }

    /// Bytes sent and received for this kind.
    #[must_use]
    pub fn bytes(&self, kind: StreamKind) -> (u64, u64) {
        let count = &self.0[kind.index()];
        (count.sent.load(Ordering::Relaxed), count.received.load(Ordering::Relaxed))
    }
}

/// Who may use a move's directory and the sockets in it besides us.
///
/// An agent with CAP_CHOWN gives the directory to QEMU's user (`uid`). One without it is a member of QEMU's group: `gid` that group, `dir_mode` 0o770,
/// `socket_mode` 0o660. In both cases nobody else can reach in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// New owner.
    pub uid: Option<u32>,
    /// New group.
    pub gid: Option<u32>,
    /// Mode of the directory.
    pub dir_mode: u32,
    /// Mode of our sockets in it.
    pub socket_mode: u32,
}

impl Default for Access {
    fn default() -> Self {
        Self {
            uid: None,
            gid: None,
            dir_mode: 0o700,
            socket_mode: 0o600,
        }
    }
}

/// The directory of one move. Both sides have one of the same path, because libvirt gives the same socket name to both. Removed when dropped.
#[derive(Debug)]
pub struct MoveDir {
    path: PathBuf,
}

impl MoveDir {
    /// Makes `root/id`; what an earlier process left there is removed first. `root` must be writable by us alone.
    ///
    /// # Errors
    /// If the id is not a plain name, a socket's path would be too long for the kernel, or the file system says no.
    pub fn create(root: &Path, id: &str, access: Access) -> Result<Self, PeerError> {
        let dir = Self::create_private(root, id, access)?;
        dir.hand_over(access)?;
        Ok(dir)
    }

    /// Still ours alone, so that nobody can put a link where we are going to make a socket and set its owner.
    pub(super) fn create_private(root: &Path, id: &str, access: Access) -> Result<Self, PeerError> {
        let io = |source| PeerError::Io {
            what: "make the directory of a move",
            source,
        };
        let fine = !id.is_empty()
            && id.len() <= 64
            && !id.starts_with('.')
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
        if !fine {
            return Err(io(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{id:?} is not a plain name"),
            )));
        }
        let path = root.join(id);
        if path.as_os_str().len() + 1 + StreamKind::Migration.socket_name().len() > 107 {
            return Err(io(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} is too long for a socket", path.display()),
            )));
        }
        remove(&path).map_err(io)?;
        DirBuilder::new().mode(0o700).create(&path).map_err(io)?;
        let dir = Self { path };
        fs::set_permissions(&dir.path, fs::Permissions::from_mode(access.dir_mode)).map_err(io)?;
        Ok(dir)
    }

    pub(super) fn hand_over(&self, access: Access) -> Result<(), PeerError> {
        if access.uid.is_some() || access.gid.is_some() {
            chown(&self.path, access.uid, access.gid).map_err(|source| PeerError::Io {
                what: "give the directory of a move to QEMU",
                source,
            })?;
        }
        Ok(())
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The socket of one kind of stream.
    #[must_use]
    pub fn socket(&self, kind: StreamKind) -> PathBuf {
        self.path.join(kind.socket_name())
    }
}

impl Drop for MoveDir {
    fn drop(&mut self) {
        if let Err(e) = remove(&self.path) {
            log::warn!("cannot remove {}: {e}", self.path.display());
        }
    }
}

/// Removes the directory and the sockets we know. Nothing else is followed or removed: the directory may belong to QEMU's user by now.
fn remove(path: &Path) -> io::Result<()> {
    for kind in StreamKind::ALL {
        match fs::remove_file(path.join(kind.socket_name())) {
            Err(e) if !matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Err(e),
            _ => {}
        }
    }
    match fs::remove_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// What the destination lets in for one agreed move.
#[derive(Debug, Clone)]
pub struct MoveTicket {
    /// The move.
    pub id: String,
    /// The secret that the two agents agreed on for it ([`super::Peer::new_token`]).
    pub token: String,
    /// The source node; no other may use the ticket.
    pub from: String,
    /// Where each kind of stream ends here; kinds that are not listed are refused.
    pub targets: HashMap<StreamKind, PathBuf>,
}

#[derive(Debug)]
struct Entry {
    ticket: MoveTicket,
    streams: Arc<Streams>,
    progress: Arc<Progress>,
}

/// Streams of one move at a time: libvirt opens one, migration one (more with multifd), disks one each.
const MAX_STREAMS: usize = 64;

/// The moves that are open here, as destination.
#[derive(Debug, Default)]
pub struct OpenMoves {
    moves: Mutex<HashMap<String, Entry>>,
}

/// A stream that was let in.
pub(super) struct Admitted {
    pub local: UnixStream,
    pub streams: Arc<Streams>,
    pub progress: Arc<Progress>,
}

impl OpenMoves {
    fn moves(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.moves.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a move for as long as the result lives. A move that is open already under this id is cut and replaced.
    #[must_use]
    pub fn open(self: &Arc<Self>, ticket: MoveTicket) -> OpenMove {
        let (streams, progress) = (Arc::new(Streams::default()), Arc::new(Progress::default()));
        let id = ticket.id.clone();
        let entry = Entry {
            ticket,
            streams: Arc::clone(&streams),
            progress: Arc::clone(&progress),
        };
        if let Some(old) = self.moves().insert(id.clone(), entry) {
            old.streams.cut_all();
        }
        OpenMove {
            moves: Arc::clone(self),
            id,
            streams,
            progress,
        }
    }

    /// Checks a stream against its ticket and connects it to its target. The reason of a refusal is for the peer's log.
    pub(super) fn admit(&self, who: &Who, open: &RelayOpen, allow_plain: bool) -> Result<Admitted, String> {
        let (target, streams, progress) = {
            let moves = self.moves();
            // One answer for "not open" and "wrong secret": the difference is nobody's business.
            let closed = || {
                format!(
                    "move {:?} is not open here for {}",
                    open.move_id.chars().take(64).collect::<String>(),
                    who.node
                )
            };
            let entry = moves.get(&open.move_id).ok_or_else(closed)?;
            if who.role != Role::Node || who.node != entry.ticket.from || !same(&entry.ticket.token, &open.token) {
                return Err(closed());
            }
            if !open.encrypt && (!allow_plain || open.kind == StreamKind::Libvirt) {
                return Err(format!("a {:?} stream without encryption is not allowed here", open.kind));
            }
            if entry.streams.len() >= MAX_STREAMS {
                return Err(format!("{MAX_STREAMS} streams are open already"));
            }
            let target = entry
                .ticket
                .targets
                .get(&open.kind)
                .ok_or_else(|| format!("the move has no {:?} stream", open.kind))?;
            (target.clone(), Arc::clone(&entry.streams), Arc::clone(&entry.progress))
        };
        let local = connect_unix(&target, Duration::from_secs(3))
            .map_err(|e| format!("cannot reach the local socket of the {:?} stream: {e}", open.kind))?;
        Ok(Admitted { local, streams, progress })
    }
}

/// A move that is open; dropping it cuts its streams.
#[derive(Debug)]
pub struct OpenMove {
    moves: Arc<OpenMoves>,
    id: String,
    streams: Arc<Streams>,
    progress: Arc<Progress>,
}

impl OpenMove {
    /// Bytes carried so far.
    #[must_use]
    pub fn progress(&self) -> &Progress {
        &self.progress
    }
}

impl Drop for OpenMove {
    fn drop(&mut self) {
        let mut moves = self.moves.moves();
        // Not if another has been opened under this id meanwhile.
        if moves.get(&self.id).is_some_and(|e| Arc::ptr_eq(&e.streams, &self.streams)) {
            moves.remove(&self.id);
        }
        drop(moves);
        self.streams.cut_all();
    }
}

/// Compares without telling by its time how much was right.
fn same(a: &str, b: &str) -> bool {
    a.len() == b.len() && a.bytes().zip(b.bytes()).fold(0, |d, (x, y)| d | (x ^ y)) == 0
}

/// Connects to a UNIX socket; while its queue is full, tries again until the deadline.
fn connect_unix(path: &Path, deadline: Duration) -> io::Result<UnixStream> {
    let until = Instant::now() + deadline;
    let address = UnixAddr::new(path)?;
    let fd = socket(
        AddressFamily::Unix,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    loop {
        match connect(fd.as_raw_fd(), &address) {
            Ok(()) => break,
            Err(Errno::EAGAIN | Errno::EINTR) if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
            Err(e) => return Err(e.into()),
        }
    }
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false)?;
    Ok(stream)
}
