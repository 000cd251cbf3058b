//! A fault point before and one after everything that another agent is asked for, as [`crate::effects::points`] has them for the rest.
use std::{path::PathBuf, sync::Arc, time::Duration};

use super::{OpenEnd, PeerReply, PeerRequest, Peers};
use crate::effects::{Faults, points::Pointed};

/// The effects besides requests; those are named after what is asked (`peers.import`).
const OTHERS: [&str; 3] = ["token", "open_relay", "admit"];

fn around<T>(faults: &Faults, effect: &str, act: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    faults.pass(&format!("peers.{effect}.before"))?;
    let done = act()?;
    faults.pass(&format!("peers.{effect}.after"))?;
    Ok(done)
}

impl Peers for Pointed<dyn Peers> {
    fn request(&self, node: &str, address: &str, request: &PeerRequest, deadline: Duration) -> Result<PeerReply, String> {
        around(self.faults(), request.kind(), || {
            self.inner().request(node, address, request, deadline)
        })
    }

    fn token(&self) -> Result<String, String> {
        around(self.faults(), "token", || self.inner().token())
    }

    fn open_relay(&self, move_id: &str, token: &str, node: &str, address: &str) -> Result<Box<dyn OpenEnd>, String> {
        around(self.faults(), "open_relay", || {
            self.inner().open_relay(move_id, token, node, address)
        })
    }

    fn admit(&self, move_id: &str, token: &str, from: &str, libvirt: PathBuf) -> Result<Box<dyn OpenEnd>, String> {
        around(self.faults(), "admit", || self.inner().admit(move_id, token, from, libvirt))
    }
}

/// `peers` with a fault point before and after each of its effects.
pub fn with_fault_points(peers: Arc<dyn Peers>, faults: &Faults) -> Arc<dyn Peers> {
    Arc::new(Pointed::<dyn Peers>::new(peers, faults))
}

/// All points of this layer, sorted.
#[must_use]
pub fn points() -> Vec<String> {
    let effects = PeerRequest::KINDS.iter().chain(&OTHERS);
    let mut points: Vec<String> = effects
        .flat_map(|e| [format!("peers.{e}.before"), format!("peers.{e}.after")])
        .collect();
    points.sort();
    points
}
