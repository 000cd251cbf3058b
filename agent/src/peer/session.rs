//! The connecting side: what this process is to its peers, and a session of questions and answers.

use super::auth::{Party, Purpose, Role, Who};
use super::credentials::Credentials;
use super::error::PeerError;
use super::frame;
use super::relay::{RelayAnswer, RelayOpen};
use super::tls::{Tls, TlsStream};
use crate::effects::Faults;
use nix::sys::socket::{setsockopt, sockopt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How a process takes part.
#[derive(Debug, Clone)]
pub struct PeerSettings {
    /// This node's name, as Slurm has it.
    pub node: String,
    /// As what.
    pub role: Role,
    /// Which life of a controller this is: Unix milliseconds of its start. Every word that it says is said in a session that was opened in
    /// its name. 0 for the agent of a node.
    pub term: u64,
    /// Whose credentials are believed: root, our own uid, SlurmUser.
    pub allowed_uids: Vec<u32>,
    /// For a TCP connection.
    pub connect_deadline: Duration,
    /// For TLS and for the proof of identity, each.
    pub handshake_deadline: Duration,
    /// How long a session may stand without a question.
    pub idle: Duration,
    /// Largest question or answer, in bytes.
    pub max_message: usize,
    /// Connections served at a time, relay streams included.
    pub max_connections: usize,
    /// Lets the bulk streams of a move go on without encryption, if the other side wants that too. Who is who is proved all the same.
    pub allow_plain: bool,
    /// [`HANDSHAKE_VERSION`](super::HANDSHAKE_VERSION): answers the agents of nodes as a release would that has no version in common with them.
    pub faults: Faults,
}

impl PeerSettings {
    /// The defaults of the shipped configuration.
    #[must_use]
    pub fn new(node: &str, role: Role, allowed_uids: Vec<u32>) -> Self {
        Self {
            node: node.to_owned(),
            role,
            term: 0,
            allowed_uids,
            connect_deadline: Duration::from_secs(3),
            handshake_deadline: Duration::from_secs(5),
            idle: Duration::from_secs(60),
            max_message: 1 << 20,
            max_connections: 256,
            allow_plain: false,
            faults: Faults::default(),
        }
    }
}

/// Where a peer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAddress {
    /// The node's name; the other side must say the same of itself.
    pub node: String,
    /// Host or address. Give the address that Slurm has for the node: names are looked up by the system's resolver, which has deadlines of its own.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

/// The port if the configuration says nothing.
pub const DEFAULT_PORT: u16 = 6822;

/// This process among its peers: its key, its credentials, its limits. Made once at start, shared by all threads.
#[derive(Debug)]
pub struct Peer {
    pub(super) settings: PeerSettings,
    pub(super) tls: Tls,
    credentials: Arc<dyn Credentials>,
}

impl Peer {
    /// Makes a new key and certificate.
    ///
    /// # Errors
    /// If no randomness is to be had.
    pub fn new(settings: PeerSettings, credentials: Arc<dyn Credentials>) -> Result<Self, PeerError> {
        Ok(Self {
            settings,
            tls: Tls::new()?,
            credentials,
        })
    }

    pub(super) fn party(&self) -> Party<'_> {
        Party {
            tls: &self.tls,
            credentials: self.credentials.as_ref(),
            node: &self.settings.node,
            role: self.settings.role,
            term: self.settings.term,
            allowed_uids: &self.settings.allowed_uids,
            deadline: self.settings.handshake_deadline,
            faults: &self.settings.faults,
        }
    }

    /// A secret for one move: 32 random bytes in hexadecimal.
    ///
    /// # Errors
    /// If no randomness is to be had.
    pub fn new_token(&self) -> Result<String, PeerError> {
        self.tls.random_hex(32)
    }

    /// Opens a session of questions and answers.
    ///
    /// # Errors
    /// If the peer is not there, not in time, or not who it should be.
    pub fn connect(&self, to: &PeerAddress) -> Result<Session, PeerError> {
        let (stream, who) = self.authenticated(to, Purpose::Request)?;
        Ok(Session {
            stream,
            who,
            max_message: self.settings.max_message,
        })
    }

    fn authenticated(&self, to: &PeerAddress, purpose: Purpose) -> Result<(TlsStream, Who), PeerError> {
        let tcp = self.tcp(to)?;
        let mut stream = self.tls.connect(tcp, self.settings.handshake_deadline)?;
        let who = self.party().prove_to_server(&mut stream, &to.node, purpose)?;
        Ok((stream, who))
    }

    fn tcp(&self, to: &PeerAddress) -> Result<TcpStream, PeerError> {
        let failed = |source| PeerError::Connect {
            node: to.node.clone(),
            address: format!("{}:{}", to.host, to.port),
            source,
        };
        let until = Instant::now() + self.settings.connect_deadline;
        let mut last = std::io::Error::from(std::io::ErrorKind::AddrNotAvailable);
        for address in (to.host.as_str(), to.port).to_socket_addrs().map_err(failed)? {
            let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            match TcpStream::connect_timeout(&address, left) {
                Ok(tcp) => return prepare(&tcp).map(|()| tcp).map_err(failed),
                Err(e) => last = e,
            }
        }
        Err(failed(last))
    }

    /// Opens one relay stream up to the point where its bytes may flow.
    pub(super) fn relay(&self, to: &PeerAddress, open: &RelayOpen) -> Result<TlsStream, PeerError> {
        let (mut stream, _) = self.authenticated(to, Purpose::Relay)?;
        let deadline = self.settings.handshake_deadline;
        stream.set_deadline(deadline);
        frame::send(&mut stream, open, self.settings.max_message, "ask for a relay stream", deadline)?;
        match frame::receive(&mut stream, self.settings.max_message, "ask for a relay stream", deadline)? {
            RelayAnswer::Ready => Ok(stream),
            RelayAnswer::Refused { reason } => Err(PeerError::Refused {
                reason: reason.chars().take(400).collect(),
            }),
        }
    }
}

/// Sets what holds for every connection: no waiting for more to send, and a peer that has silently gone is noticed within half a minute.
pub(super) fn prepare(tcp: &TcpStream) -> std::io::Result<()> {
    tcp.set_nodelay(true)?;
    setsockopt(tcp, sockopt::KeepAlive, &true)?;
    setsockopt(tcp, sockopt::TcpKeepIdle, &10)?;
    setsockopt(tcp, sockopt::TcpKeepInterval, &5)?;
    setsockopt(tcp, sockopt::TcpKeepCount, &4)?;
    setsockopt(tcp, sockopt::TcpUserTimeout, &30_000)?;
    Ok(())
}

/// Questions to one peer, one at a time.
#[derive(Debug)]
pub struct Session {
    stream: TlsStream,
    who: Who,
    max_message: usize,
}

impl Session {
    /// Who answers.
    #[must_use]
    pub fn who(&self) -> &Who {
        &self.who
    }

    /// Asks and waits for the answer, both together for at most `deadline`. After an error the session is of no use: whether the question arrived is unknown.
    ///
    /// # Errors
    /// If the peer is gone or late, or one of the messages is too large or cannot be read.
    pub fn ask<Q: Serialize, A: DeserializeOwned>(&mut self, question: &Q, deadline: Duration) -> Result<A, PeerError> {
        self.stream.set_deadline(deadline);
        frame::send(&mut self.stream, question, self.max_message, "send a question", deadline)?;
        frame::receive(&mut self.stream, self.max_message, "get an answer", deadline)
    }

    /// Ends it in good order.
    pub fn close(self) {
        self.stream.close();
    }

    #[cfg(test)]
    pub(super) fn stream(&mut self) -> &mut TlsStream {
        &mut self.stream
    }
}
