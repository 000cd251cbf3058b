//! [`Peers`] over the authenticated channel.
use std::{sync::Arc, time::Duration};

use super::{PeerReply, PeerRequest, Peers};
use crate::config::Config;

/// The real one.
#[derive(Debug)]
pub struct TlsPeers;

impl TlsPeers {
    /// x
    pub fn new(_config: &Config) -> Result<Arc<Self>, String> {
        Ok(Arc::new(Self))
    }

    /// x
    pub fn serve(&self, _config: &Config, _answer: impl Fn(PeerRequest) -> PeerReply + Send + Sync + 'static) -> Result<(), String> {
        Ok(())
    }
}

impl Peers for TlsPeers {
    fn request(&self, _node: &str, _address: &str, _request: &PeerRequest, _deadline: Duration) -> Result<PeerReply, String> {
        Err("none".into())
    }
}
