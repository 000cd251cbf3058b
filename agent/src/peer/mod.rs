//! The channel between agents: one TCP port, TLS, and MUNGE to say who is there.
//!
//! * [`Peer`] is this process among its peers; [`Peer::connect`] opens a [`Session`] of questions and answers with another agent.
//! * [`PeerServer`] is the listening side; the agent's [`Handler`] answers.
//! * A move adds streams: the source opens a [`RelayListener`], UNIX sockets that libvirt and QEMU use as if the other node were behind them; the destination opens
//!   the move in [`OpenMoves`] for as long as it lasts. libvirtd listens on no network.
//!
//! How the two sides come to trust each other, and why neither replay nor a man in the middle gets anywhere, is said in `auth.rs`; what the channel protects
//! against and what not, in docs/security.md. In one sentence: *whoever holds the cluster's MUNGE key can be root on the cluster, as in Slurm itself.*
//!
//! Every blocking operation has a deadline (connect, handshake, idle, answer); sizes are checked before memory is taken; connections are counted. Relay streams
//! alone may be silent for as long as they like, because libvirt's connection is; TCP keepalive notices a node that is gone, and closing the move cuts them.

mod auth;
mod credentials;
mod error;
mod frame;
mod moves;
#[expect(unsafe_code, reason = "the FFI of libmunge")]
mod munge_ffi;
mod pump;
mod relay;
mod server;
mod session;
mod streams;
mod tls;
mod wake;

#[cfg(test)]
mod tests;

pub use auth::{HANDSHAKE_VERSION, Purpose, Role, VERSIONS, Who};
pub use credentials::{Credentials, Decoded, FakeCredentials};
pub use error::{CredentialError, PeerError};
pub use moves::{Access, Count, MoveDir, MoveTicket, OpenMove, OpenMoves, Progress, StreamKind};
pub use munge_ffi::Munge;
pub use relay::{RelayListener, RelaySpec};
pub use server::{Handler, PeerServer};
pub use session::{DEFAULT_PORT, Peer, PeerAddress, PeerSettings, Session};
