//! The fake of [`Peers`] for what needs no other node.
use std::{path::PathBuf, time::Duration};

use super::{OpenEnd, PeerReply, PeerRequest, Peers};

/// No other node answers.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

fn nobody<T>() -> Result<T, String> {
    Err("there is no other node".into())
}

impl Peers for Alone {
    fn request(&self, _: &str, _: &str, _: &PeerRequest, _: Duration) -> Result<PeerReply, String> {
        nobody()
    }
    fn token(&self) -> Result<String, String> {
        nobody()
    }
    fn open_relay(&self, _: &str, _: &str, _: &str, _: &str) -> Result<Box<dyn OpenEnd>, String> {
        nobody()
    }
    fn admit(&self, _: &str, _: &str, _: &str, _: PathBuf) -> Result<Box<dyn OpenEnd>, String> {
        nobody()
    }
}
