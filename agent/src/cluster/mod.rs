//! Agents talking to each other: [`protocol`] says what, [`crate::peer`] carries it.
mod alone;
pub mod points;
pub mod protocol;
mod server;
mod tls;

use std::{
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

pub use alone::Alone;
pub use protocol::{HostFacts, PeerReply, PeerRequest};
pub use server::answer;
pub use tls::TlsPeers;

/// The sockets of one move, at its source or destination; dropping it closes the move.
pub trait OpenEnd: Send + Sync + fmt::Debug {
    /// Directory of the sockets `libvirt.sock`, `migration.sock` and `disk.sock`: the same path on both nodes.
    fn dir(&self) -> &Path;
    /// Bytes of memory and disks carried so far.
    fn bulk_bytes(&self) -> u64;
}

/// Other nodes' agents, as an effect: fakes serve the simulation.
pub trait Peers: Send + Sync + fmt::Debug {
    /// Sends a request and waits for its reply.
    ///
    /// # Errors
    /// A fragment that says why there is no reply: whether the request was carried out is then unknown.
    fn request(&self, node: &str, address: &str, request: &PeerRequest, deadline: Duration) -> Result<PeerReply, String>;
    /// A secret for one move.
    ///
    /// # Errors
    /// When no randomness is to be had.
    fn token(&self) -> Result<String, String>;
    /// Source: sockets whose connections come out at the destination.
    ///
    /// # Errors
    /// When they cannot be made.
    fn open_relay(&self, move_id: &str, token: &str, node: &str, address: &str) -> Result<Box<dyn OpenEnd>, String>;
    /// Destination: let the source's connections in, and on to the local libvirt and QEMU.
    ///
    /// # Errors
    /// When the directory cannot be made.
    fn admit(&self, move_id: &str, token: &str, from: &str, libvirt: PathBuf) -> Result<Box<dyn OpenEnd>, String>;
}
