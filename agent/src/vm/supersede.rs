//! A job that begins anew must not leave a guest of its last run behind on another node.
//!
//! That can only be when a live move has landed and Slurm started the job elsewhere, because nobody was there to steer
//! it: the grace time ended while the controller was down. The landed VM waits for its job ([`Life::AwaitingJob`])
//! until its own deadline. So before a VM is made for a job that has been restarted, the other nodes' agents are asked to
//! end what waits there; a node that does not answer is left to that deadline.
use std::{sync::Arc, time::Duration};

use crate::{
    cluster::{PeerReply, PeerRequest},
    core::{Life, Record},
    node::Node,
    slurm::NodeInfo,
};

/// For one question, beside the time that a connection takes.
const WITHIN: Duration = Duration::from_secs(5);
/// A VM that cannot be ended is asked about for so long; then the new one is made all the same.
const PATIENCE_MS: u64 = 20_000;
/// So many agents are asked at the same time.
const AT_ONCE: usize = 32;

/// Asks the agents of all other VM nodes that are up; returns when all have answered or had their time. `restarts`: Slurm's
/// count for the run that has started here.
pub fn end_elsewhere(node: &Arc<Node>, job: u32, restarts: u32) {
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
                scope.spawn(move || ask(node, other, job, restarts));
            }
        });
    }
}

fn ask(node: &Node, other: &NodeInfo, job: u32, restarts: u32) {
    let name = &other.name;
    let until = node.world.clock.now_ms() + PATIENCE_MS;
    loop {
        match node
            .peers
            .request(name, &other.address, &PeerRequest::Supersede { job, restarts }, WITHIN)
        {
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

/// Whether a VM waits here, or is being ended, that comes from a run before the one which has now started elsewhere. A
/// word that took long may be of a run that is over, and the VM of a later one: that is left alone.
#[must_use]
pub fn is_superseded(record: &Record, restarts: u32) -> bool {
    let waits = matches!(
        record.life,
        Life::AwaitingJob { .. } | Life::Arriving { .. } | Life::Stopping { .. }
    );
    let from = record.allocation.as_ref().and_then(|a| a.restarts);
    waits && from.is_none_or(|from| from < restarts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::{Allocation, End, tests};

    fn record(life: Life, restarts: Option<u32>) -> Record {
        Record {
            allocation: Some(Allocation {
                restarts,
                ..Allocation::default()
            }),
            ..tests::record(life)
        }
    }

    #[test]
    fn a_vm_that_waits_is_ended_for_a_later_run_and_not_by_the_word_of_its_own_or_an_earlier_one() {
        let waiting = record(Life::AwaitingJob { deadline_ms: 1 }, Some(2));
        assert!(is_superseded(&waiting, 3));
        assert!(!is_superseded(&waiting, 2), "the word of the run that it comes from");
        assert!(!is_superseded(&waiting, 1));
        assert!(is_superseded(&record(Life::AwaitingJob { deadline_ms: 1 }, None), 1));
    }

    #[test]
    fn a_vm_whose_job_is_here_is_left_alone_and_one_that_ends_is_waited_for() {
        assert!(!is_superseded(&record(Life::Running, Some(0)), 3));
        assert!(is_superseded(&record(Life::Stopping { why: End::Released }, Some(0)), 3));
    }
}
