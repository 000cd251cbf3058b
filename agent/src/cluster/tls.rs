//! [`Peers`] over the authenticated channel.
use std::{
    collections::HashMap,
    fmt,
    net::TcpListener,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use super::{OpenEnd, PeerReply, PeerRequest, Peers};
use crate::{
    config::Config,
    effects::Faults,
    peer::{
        Access, Handler, MoveDir, MoveTicket, Munge, OpenMove, OpenMoves, Peer, PeerAddress, PeerServer, PeerSettings, RelayListener,
        RelaySpec, Role, Session, StreamKind, Who,
    },
    text::chain,
};

/// The real one. Idle sessions are kept for the next request to the same node.
#[derive(Debug)]
pub struct TlsPeers {
    peer: Arc<Peer>,
    moves: Arc<OpenMoves>,
    port: u16,
    encrypt: bool,
    access: Access,
    root: PathBuf,
    idle: Mutex<HashMap<String, Session>>,
    server: Mutex<Option<PeerServer>>,
}

struct Answers<F>(F);

impl<F: Fn(&Who, PeerRequest) -> PeerReply + Send + Sync + 'static> Handler for Answers<F> {
    type Question = PeerRequest;
    type Answer = PeerReply;

    fn answer(&self, from: &Who, question: PeerRequest) -> PeerReply {
        (self.0)(from, question)
    }
}

impl TlsPeers {
    /// Makes key and certificate of this role of the process. `operators`: SlurmUser beside root. `term`: which life of a controller this is
    /// ([`PeerSettings::term`]).
    ///
    /// # Errors
    /// A line for the administrator.
    pub fn new(config: &Config, operators: &[u32], role: Role, term: u64, faults: &Faults) -> Result<Arc<Self>, String> {
        let mut allowed = vec![0, nix::unistd::getuid().as_raw()];
        allowed.extend(operators);
        allowed.dedup();
        let settings = PeerSettings {
            allow_plain: !config.peer.encrypt_migration,
            max_message: 4 << 20,
            faults: faults.clone(),
            term,
            ..PeerSettings::new(&config.node(), role, allowed)
        };
        let user = nix::unistd::User::from_name(&config.peer.qemu_user).ok().flatten();
        if user.is_none() {
            log::warn!(
                "peer.qemu_user: there is no user {}: live moves will be refused by QEMU",
                config.peer.qemu_user
            );
        }
        // The directory is QEMU's: it makes its own socket there at the destination, and connects to ours at the source.
        let access = Access {
            uid: user.as_ref().map(|u| u.uid.as_raw()),
            gid: user.as_ref().map(|u| u.gid.as_raw()),
            ..Access::default()
        };
        let root = config.run_dir.join("move");
        std::fs::create_dir_all(&root).map_err(|e| format!("cannot make {}: {e}", root.display()))?;
        Ok(Arc::new(Self {
            peer: Arc::new(Peer::new(settings, Arc::new(Munge::default())).map_err(|e| chain(&e))?),
            moves: Arc::new(OpenMoves::default()),
            port: config.peer.port,
            encrypt: config.peer.encrypt_migration,
            access,
            root,
            idle: Mutex::new(HashMap::new()),
            server: Mutex::new(None),
        }))
    }

    /// Listens and answers other agents.
    ///
    /// # Errors
    /// A line that names the address.
    pub fn serve(&self, config: &Config, answer: impl Fn(&Who, PeerRequest) -> PeerReply + Send + Sync + 'static) -> Result<(), String> {
        let listener = TcpListener::bind(&config.peer.listen).map_err(|e| format!("cannot listen on {}: {e}", config.peer.listen))?;
        let server =
            PeerServer::start(self.peer.clone(), listener, self.moves.clone(), Arc::new(Answers(answer))).map_err(|e| chain(&e))?;
        *self.server.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(server);
        Ok(())
    }

    fn address(&self, node: &str, address: &str) -> PeerAddress {
        PeerAddress {
            node: node.into(),
            host: address.into(),
            port: self.port,
        }
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, HashMap<String, Session>> {
        self.idle.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Peers for TlsPeers {
    fn request(&self, node: &str, address: &str, request: &PeerRequest, deadline: Duration) -> Result<PeerReply, String> {
        let kept = self.idle().remove(node);
        // A kept session may have been closed by the other side; only what may be asked twice is tried again.
        let again = kept.is_some() && matches!(request, PeerRequest::Status | PeerRequest::Show { .. } | PeerRequest::Log { .. });
        let kept = kept.filter(|_| again);
        let mut session = match kept {
            Some(session) => session,
            None => self.peer.connect(&self.address(node, address)).map_err(|e| chain(&e))?,
        };
        let mut reply = session.ask(request, deadline);
        if reply.is_err() && again {
            session = self.peer.connect(&self.address(node, address)).map_err(|e| chain(&e))?;
            reply = session.ask(request, deadline);
        }
        let reply = reply.map_err(|e| chain(&e))?;
        self.idle().insert(node.into(), session);
        Ok(reply)
    }

    fn token(&self) -> Result<String, String> {
        self.peer.new_token().map_err(|e| chain(&e))
    }

    fn open_relay(&self, move_id: &str, token: &str, node: &str, address: &str) -> Result<Box<dyn OpenEnd>, String> {
        let spec = RelaySpec {
            id: move_id.into(),
            token: token.into(),
            to: self.address(node, address),
            root: self.root.clone(),
            access: self.access,
            encrypt: self.encrypt,
        };
        let relay = RelayListener::open(self.peer.clone(), spec).map_err(|e| chain(&e))?;
        let dir = relay
            .socket(StreamKind::Libvirt)
            .parent()
            .map(Path::to_path_buf)
            .unwrap_or_default();
        Ok(Box::new(Source { dir, relay }))
    }

    fn admit(&self, move_id: &str, token: &str, from: &str, libvirt: PathBuf) -> Result<Box<dyn OpenEnd>, String> {
        let dir = MoveDir::create(&self.root, move_id, self.access).map_err(|e| chain(&e))?;
        let targets = HashMap::from([
            (StreamKind::Libvirt, libvirt),
            (StreamKind::Migration, dir.socket(StreamKind::Migration)),
            (StreamKind::Disk, dir.socket(StreamKind::Disk)),
        ]);
        let open = self.moves.open(MoveTicket {
            id: move_id.into(),
            token: token.into(),
            from: from.into(),
            targets,
        });
        Ok(Box::new(Destination { dir, open }))
    }
}

struct Source {
    dir: PathBuf,
    relay: RelayListener,
}

struct Destination {
    dir: MoveDir,
    open: OpenMove,
}

impl OpenEnd for Source {
    fn dir(&self) -> &Path {
        &self.dir
    }

    fn bulk_bytes(&self) -> u64 {
        let p = self.relay.progress();
        p.bytes(StreamKind::Migration).0 + p.bytes(StreamKind::Disk).0
    }
}

impl OpenEnd for Destination {
    fn dir(&self) -> &Path {
        self.dir.path()
    }

    fn bulk_bytes(&self) -> u64 {
        let p = self.open.progress();
        p.bytes(StreamKind::Migration).0 + p.bytes(StreamKind::Disk).0
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source").field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl fmt::Debug for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Destination").field("dir", &self.dir.path()).finish_non_exhaustive()
    }
}
