//! A job that begins anew must not leave a guest of its last run behind on another node.
//!
//! That can only be when a live move has landed and Slurm started the job elsewhere, because nobody was there to steer
//! it: the grace time ended while the controller was down. The landed VM waits for its job ([`Life::AwaitingJob`])
//! until its own deadline. So before a VM is made for a job that has been restarted, the other nodes' agents are asked to
//! end what waits there; a node that does not answer within [`WITHIN`] is left to that deadline.
use std::{sync::Arc, time::Duration};

use crate::{
    cluster::{PeerReply, PeerRequest},
    core::Life,
    node::Node,
};

/// How long one agent may take. All are asked at the same time.
const WITHIN: Duration = Duration::from_secs(5);

/// Asks the agents of all other VM nodes; returns when all have answered or had their time.
pub fn end_elsewhere(node: &Arc<Node>, job: u32) {
    let feature = &node.config.controller.feature;
    let others = match node.world.slurm.nodes() {
        Ok(all) => all
            .into_iter()
            .filter(|n| n.name != node.name && n.available_features.contains(feature)),
        Err(e) => {
            log::warn!("job {job}: Slurm does not name the nodes on which an earlier run may be left: {e}");
            return;
        }
    };
    let asking: Vec<_> = others
        .filter_map(|n| {
            let peers = node.peers.clone();
            let ask = move || match peers.request(&n.name, &n.address, &PeerRequest::Supersede { job }, WITHIN) {
                Ok(PeerReply::Ok) => log::info!("job {job}: its VM waited on {}, and was ended there: it starts over here", n.name),
                Ok(_) => {}
                Err(e) => log::info!("job {job}: {} does not say whether it has a VM of an earlier run: {e}", n.name),
            };
            std::thread::Builder::new().name(format!("supersede-{job}")).spawn(ask).ok()
        })
        .collect();
    for thread in asking {
        let _ = thread.join();
    }
}

/// Whether a VM waits here for a job that has now started elsewhere.
#[must_use]
pub fn waits_here(node: &Node, job: u32) -> bool {
    node.record(job)
        .is_some_and(|r| matches!(r.life, Life::AwaitingJob { .. } | Life::Arriving { .. }))
}
