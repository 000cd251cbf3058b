//! Agents talking to each other: [`protocol`] says what, [`crate::peer`] carries it.
pub mod protocol;
mod server;
mod tls;

use std::{fmt, time::Duration};

pub use protocol::{HostFacts, PeerReply, PeerRequest};
pub use server::answer;
pub use tls::TlsPeers;

/// Other nodes' agents, as an effect: fakes serve the simulation.
pub trait Peers: Send + Sync + fmt::Debug {
    /// Sends a request and waits for its reply.
    ///
    /// # Errors
    /// A fragment that says why there is no reply: whether the request was carried out is then unknown.
    fn request(&self, node: &str, address: &str, request: &PeerRequest, deadline: Duration) -> Result<PeerReply, String>;
}
