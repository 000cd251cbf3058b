//! Carries out [`crate::core::supersede`]: asks the agents of all other VM nodes, those that have to be asked again together.
use std::{sync::Arc, time::Duration};

use crate::{
    cluster::{PeerReply, PeerRequest},
    core::supersede::{Heard, Next, next},
    node::Node,
    slurm::NodeInfo,
};

/// For one question, beside the time that a connection takes.
const WITHIN: Duration = Duration::from_secs(5);
/// Between two rounds.
const PAUSE: Duration = Duration::from_millis(500);
/// So many agents are asked at the same time.
const AT_ONCE: usize = 32;

/// The nodes on which an earlier run of a job may have left a guest: all others for VMs that are up.
///
/// # Errors
/// When Slurm does not name them.
pub fn others(node: &Node) -> Result<Vec<NodeInfo>, String> {
    let feature = &node.config.controller.feature;
    let is_away = |n: &NodeInfo| {
        ["DOWN", "NOT_RESPONDING", "POWERED_DOWN"]
            .iter()
            .any(|s| n.state.iter().any(|t| t == s))
    };
    let mut all = node
        .world
        .slurm
        .nodes()
        .map_err(|e| format!("Slurm does not name the nodes on which an earlier run may be left: {e}"))?;
    all.retain(|n| n.name != node.name && n.available_features.contains(feature) && !is_away(n));
    Ok(all)
}

/// Whether the agent there was well a moment ago, as far as Slurm knows.
#[must_use]
pub fn is_well(node: &Node, other: &NodeInfo) -> bool {
    other.active_features.contains(&node.config.controller.feature)
}

/// Asks the agents of all other VM nodes that are up; returns when nothing of an earlier run can be anywhere, or nobody is left who could say
/// so. `restarts`: Slurm's count for the run that has started here.
///
/// # Errors
/// Why no VM may begin here now, as a fragment.
pub fn end_elsewhere(node: &Arc<Node>, job: u32, restarts: u32) -> Result<(), String> {
    let begun = node.world.clock.now_ms();
    let mut asked = others(node)?;
    loop {
        let waited_ms = node.world.clock.now_ms().saturating_sub(begun);
        let mut again = Vec::new();
        for some in asked.chunks(AT_ONCE) {
            let said: Vec<Next> = std::thread::scope(|scope| {
                let asks: Vec<_> = some
                    .iter()
                    .map(|other| scope.spawn(move || ask(node, other, job, restarts, waited_ms)))
                    .collect();
                let gone = || Next::Unknown("it was not asked".into());
                asks.into_iter().map(|a| a.join().unwrap_or_else(|_| gone())).collect()
            });
            for (other, said) in some.iter().zip(said) {
                match said {
                    Next::Clear => {}
                    Next::Again => again.push(other.clone()),
                    Next::Unknown(why) => log::warn!("job {job}: {}: {why}", other.name),
                    Next::Refused(why) => return Err(format!("{}: {why}", other.name)),
                }
            }
        }
        if again.is_empty() {
            return Ok(());
        }
        let names: Vec<&str> = again.iter().map(|o| o.name.as_str()).collect();
        log::info!("job {job}: waiting for word from {}", names.join(", "));
        asked = again;
        node.world.clock.sleep(PAUSE);
    }
}

fn ask(node: &Node, other: &NodeInfo, job: u32, restarts: u32, waited_ms: u64) -> Next {
    let request = PeerRequest::Supersede { job, restarts };
    let said = node.peers.request(&other.name, &other.address, &request, WITHIN);
    let heard = match &said {
        Ok(PeerReply::Refused(why)) => Heard::Ending(why),
        Ok(_) => Heard::Clear,
        Err(why) => Heard::Silent(why),
    };
    next(heard, waited_ms, is_well(node, other))
}
