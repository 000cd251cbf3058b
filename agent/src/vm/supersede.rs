//! A job that begins anew must not leave a guest of its last run behind on another node.
//!
//! That can only be when a live move has landed and Slurm started the job elsewhere, because nobody was there to steer
//! it: the grace time ended while the controller was down. The landed VM waits for its job ([`Life::AwaitingJob`])
//! until its own deadline. So before a VM is made for a job that has been restarted, the other nodes' agents are asked to
//! end what waits there; a node that does not answer is left to that deadline.
use std::{sync::Arc, time::Duration};

use crate::{
    cluster::{PeerReply, PeerRequest},
    core::Life,
    node::Node,
    slurm::NodeInfo,
};

/// For one question, beside the time that a connection takes.
const WITHIN: Duration = Duration::from_secs(5);
/// A VM that cannot be ended is asked about for so long; then the new one is made all the same.
const PATIENCE_MS: u64 = 20_000;
/// So many agents are asked at the same time.
const AT_ONCE: usize = 32;

/// Asks the agents of all other VM nodes that are up; returns when all have answered or had their time.
pub fn end_elsewhere(node: &Arc<Node>, job: u32) {
    let feature = &node.config.controller.feature;
    let is_away = |n: &NodeInfo| {
        ["DOWN", "NOT_RESPONDING", "POWERED_DOWN"]
            .iter()
            .any(|s| n.state.iter().any(|t| t == s))
    };
    let others: Vec<NodeInfo> = match node.world.slurm.nodes() {
        Ok(all) => all
            .into_iter()
            .filter(|n| n.name != node.name && n.available_features.contains(feature) && !is_away(n))
            .collect(),
        Err(e) => {
            log::warn!("job {job}: Slurm does not name the nodes on which an earlier run may be left: {e}");
            return;
        }
    };
    for some in others.chunks(AT_ONCE) {
        std::thread::scope(|scope| {
            for other in some {
                scope.spawn(move || ask(node, other, job));
            }
        });
    }
}

fn ask(node: &Node, other: &NodeInfo, job: u32) {
    let name = &other.name;
    let until = node.world.clock.now_ms() + PATIENCE_MS;
    loop {
        match node.peers.request(name, &other.address, &PeerRequest::Supersede { job }, WITHIN) {
            Ok(PeerReply::Refused(why)) if node.world.clock.now_ms() < until => {
                log::info!("job {job}: {why}; waiting for its end");
                node.world.clock.sleep(Duration::from_millis(200));
            }
            Ok(PeerReply::Refused(why)) => return log::error!("job {job}: starts over beside its last run: {why}"),
            Ok(_) => return,
            Err(e) => return log::info!("job {job}: {name} does not say whether it has a VM of an earlier run: {e}"),
        }
    }
}

/// Whether Slurm runs the job on the node that says so. The word of one that asked long ago, for a run that is over, would end the VM of a later run.
///
/// # Errors
/// When Slurm does not say.
pub fn runs_on(node: &Node, job: u32, asker: &str) -> Result<bool, String> {
    match node.world.slurm.job(job) {
        Ok(info) => Ok(info.is_some_and(|i| i.brief.nodes.iter().any(|n| n == asker))),
        Err(e) => Err(format!("cannot ask Slurm whether job {job} runs on {asker}: {e}")),
    }
}

/// Whether a VM waits here for a job that has now started elsewhere.
#[must_use]
pub fn waits_here(node: &Node, job: u32) -> bool {
    node.record(job)
        .is_some_and(|r| matches!(r.life, Life::AwaitingJob { .. } | Life::Arriving { .. }))
}
