//! The accepting side: one listening thread, one thread for each connection.
//!
//! Threads: `peer-accept` waits for connections; `peer-N` proves who is there, then answers questions until the peer goes or is idle for too long, or becomes one
//! relay stream of a move. More connections than the limit are closed at once, before any work is done for them. [`PeerServer::stop`] (or drop) ends all of them.

use super::auth::{Purpose, Who};
use super::error::PeerError;
use super::frame;
use super::moves::OpenMoves;
use super::relay::{self, RelayAnswer, RelayOpen};
use super::session::{Peer, prepare};
use super::streams::Streams;
use super::tls::TlsStream;
use super::wake::Wake;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Answers questions. Called on the connection's thread; takes as long as it must (the asking side has the deadline).
pub trait Handler: Send + Sync + 'static {
    /// What is asked.
    type Question: DeserializeOwned;
    /// What is answered.
    type Answer: Serialize;

    /// `from` has proved who it is; what it may ask is for this function to decide.
    fn answer(&self, from: &Who, question: Self::Question) -> Self::Answer;
}

/// The listening side, running.
#[derive(Debug)]
pub struct PeerServer {
    address: SocketAddr,
    wake: Arc<Wake>,
    streams: Arc<Streams>,
    thread: Option<JoinHandle<()>>,
}

struct Shared<H> {
    peer: Arc<Peer>,
    moves: Arc<OpenMoves>,
    handler: Arc<H>,
    streams: Arc<Streams>,
    count: AtomicUsize,
}

impl PeerServer {
    /// Starts to serve on a bound listener.
    ///
    /// # Errors
    /// If a thread or descriptor is not to be had.
    pub fn start<H: Handler>(peer: Arc<Peer>, listener: TcpListener, moves: Arc<OpenMoves>, handler: Arc<H>) -> Result<Self, PeerError> {
        let io = |source| PeerError::Io {
            what: "start to listen for peers",
            source,
        };
        listener.set_nonblocking(true).map_err(io)?;
        let address = listener.local_addr().map_err(io)?;
        let wake = Arc::new(Wake::new().map_err(io)?);
        let streams = Arc::new(Streams::default());
        let shared = Arc::new(Shared {
            peer,
            moves,
            handler,
            streams: Arc::clone(&streams),
            count: AtomicUsize::new(0),
        });
        let woken = Arc::clone(&wake);
        let thread = thread::Builder::new()
            .name("peer-accept".into())
            .spawn(move || accept(&listener, &woken, &shared))
            .map_err(io)?;
        Ok(Self {
            address,
            wake,
            streams,
            thread: Some(thread),
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops listening and cuts all connections. Threads in the middle of an answer end when they try to send it.
    pub fn stop(&mut self) {
        self.wake.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.streams.cut_all();
    }
}

impl Drop for PeerServer {
    fn drop(&mut self) {
        self.stop();
    }
}

fn accept<H: Handler>(listener: &TcpListener, wake: &Wake, shared: &Arc<Shared<H>>) {
    let mut number = 0_u64;
    loop {
        let mut fds = [
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(wake.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return log::error!("stop listening for peers: {e}"),
        }
        if wake.is_woken() {
            return;
        }
        match listener.accept() {
            Ok((tcp, from)) => {
                number += 1;
                start(shared, tcp, from, number);
            }
            Err(e)
                if matches!(
                    e.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted | std::io::ErrorKind::ConnectionAborted
                ) => {}
            Err(e) => {
                // Out of descriptors or memory: the connection stays in the queue, so try again a little later rather than at once.
                log::warn!("cannot accept a peer's connection: {e}");
                wake.wait(Duration::from_millis(100));
            }
        }
    }
}

fn start<H: Handler>(shared: &Arc<Shared<H>>, tcp: TcpStream, from: SocketAddr, number: u64) {
    if shared.count.fetch_add(1, Ordering::SeqCst) >= shared.peer.settings.max_connections {
        shared.count.fetch_sub(1, Ordering::SeqCst);
        log::warn!(
            "connection from {from} closed: {} are open already",
            shared.peer.settings.max_connections
        );
        return;
    }
    let counted = Counted(Arc::clone(shared));
    let work = move || {
        let shared = &counted.0;
        if let Err(e) = serve(shared, tcp) {
            log::warn!("connection from {from}: {}", chain(&e));
        }
    };
    if let Err(e) = thread::Builder::new().name(format!("peer-{number}")).spawn(work) {
        log::warn!("connection from {from} closed: no thread: {e}");
    }
}

/// One of the connections that count; also when its thread panics or could not be started.
struct Counted<H>(Arc<Shared<H>>);

impl<H> Drop for Counted<H> {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::SeqCst);
    }
}

fn serve<H: Handler>(shared: &Shared<H>, tcp: TcpStream) -> Result<(), PeerError> {
    let settings = &shared.peer.settings;
    let io = |source| PeerError::Io {
        what: "set up a peer's connection",
        source,
    };
    tcp.set_nonblocking(false).and_then(|()| prepare(&tcp)).map_err(io)?;
    let _listed = shared.streams.add(tcp.try_clone().map_err(io)?, None);
    let mut stream = shared.peer.tls.accept(tcp, settings.handshake_deadline)?;
    let (who, purpose) = shared.peer.party().prove_to_client(&mut stream)?;
    log::debug!("{} ({:?}, uid {}) is here for {purpose:?}", who.node, who.role, who.uid);
    match purpose {
        Purpose::Request => questions(shared, stream, &who),
        Purpose::Relay => relay_stream(shared, stream, &who),
    }
}

fn questions<H: Handler>(shared: &Shared<H>, mut stream: TlsStream, who: &Who) -> Result<(), PeerError> {
    let settings = &shared.peer.settings;
    loop {
        stream.set_deadline(settings.idle);
        let question = match frame::receive(&mut stream, settings.max_message, "hear a question", settings.idle) {
            Ok(question) => question,
            Err(PeerError::Closed | PeerError::Deadline { .. }) => {
                stream.close();
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        let answer = shared.handler.answer(who, question);
        stream.set_deadline(settings.idle);
        frame::send(&mut stream, &answer, settings.max_message, "send an answer", settings.idle)?;
    }
}

fn relay_stream<H: Handler>(shared: &Shared<H>, mut stream: TlsStream, who: &Who) -> Result<(), PeerError> {
    let settings = &shared.peer.settings;
    let deadline = settings.handshake_deadline;
    stream.set_deadline(deadline);
    let open: RelayOpen = frame::receive(&mut stream, settings.max_message, "hear which stream", deadline)?;
    let admitted = match shared.moves.admit(who, &open, settings.allow_plain) {
        Ok(admitted) => admitted,
        Err(reason) => {
            frame::send(
                &mut stream,
                &RelayAnswer::Refused { reason: reason.clone() },
                settings.max_message,
                "refuse a stream",
                deadline,
            )?;
            stream.close();
            return Err(PeerError::Refused { reason });
        }
    };
    let watch = |source| PeerError::Io {
        what: "watch a stream",
        source,
    };
    let (cut, local) = (
        stream.socket().try_clone().map_err(watch)?,
        admitted.local.try_clone().map_err(watch)?,
    );
    let _listed = admitted.streams.add(cut, Some(local));
    if admitted.streams.is_cut() {
        return Err(PeerError::Closed);
    }
    frame::send(&mut stream, &RelayAnswer::Ready, settings.max_message, "open a stream", deadline)?;
    relay::carry(stream, admitted.local, open.kind, open.encrypt, &admitted.progress.of(open.kind))
}

/// An error with all that lies behind it, in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(e) = next {
        text = format!("{text}: {e}");
        next = e.source();
    }
    text
}
