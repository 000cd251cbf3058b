//! What can go wrong between two nodes.

use std::io;
use std::time::Duration;

/// Why a connection to another node, or something on it, failed.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the fields are what the texts show")]
pub enum PeerError {
    /// No connection at all.
    #[error("connect to {node} at {address}")]
    Connect { node: String, address: String, source: io::Error },
    /// The other side did not answer, or not fast enough.
    #[error("{what} within {} s", after.as_secs_f32())]
    Deadline { what: &'static str, after: Duration },
    /// TLS failed.
    #[error("agree on TLS")]
    Tls(#[from] rustls::Error),
    /// No certificate could be made.
    #[error("make a certificate")]
    Certificate(#[from] rcgen::Error),
    /// MUNGE failed here.
    #[error("use MUNGE")]
    Credential(#[from] CredentialError),
    /// What the other side proved is not enough, or not what it should be.
    #[error("trust the other side: {reason}")]
    NotTrusted { reason: String },
    /// The other side said no.
    #[error("be let in: {reason}")]
    Refused { reason: String },
    /// The two sides have no protocol version in common.
    #[error("find a common version: here {ours:?}, there {theirs:?}")]
    Version { ours: (u32, u32), theirs: (u32, u32) },
    /// A message larger than allowed; nothing was allocated for it.
    #[error("take a message of {len} bytes, {max} are allowed")]
    Oversize { len: usize, max: usize },
    /// A message that cannot be read.
    #[error("read the message")]
    Format(#[from] serde_json::Error),
    /// The other side is gone.
    #[error("go on: the connection is closed")]
    Closed,
    /// Anything else with sockets and files.
    #[error("{what}")]
    Io { what: &'static str, source: io::Error },
}

impl PeerError {
    /// Sorts an I/O error into what it means here. `after` is the deadline that was in force.
    pub(super) fn from_io(what: &'static str, after: Duration, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Deadline { what, after },
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionAborted => Self::Closed,
            io::ErrorKind::InvalidData => match source.downcast::<rustls::Error>() {
                Ok(tls) => Self::Tls(tls),
                Err(source) => Self::Io { what, source },
            },
            _ => Self::Io { what, source },
        }
    }
}

/// Why a credential could not be made or is not good.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CredentialError {
    /// The local daemon does not answer.
    #[error("reach munged: {0}")]
    Daemon(String),
    /// The credential is forged, expired, rewound or was used before on this node.
    #[error("accept the credential: {0}")]
    Bad(String),
}
