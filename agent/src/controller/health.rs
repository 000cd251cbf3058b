//! The feature `vm` follows the health of each node's agent and libvirt.
//!
//! Only ActiveFeatures are changed. They are lost at a reconfigure and at a restart of slurmctld, so they are compared
//! at each poll. The last node never loses the feature: Slurm would then refuse submissions instead of queueing them
//! (slurm: "Requested node configuration is not available").
use std::time::Instant;

use slurm_vm_api::query::NodeHealth;

use super::{Cluster, Controller, STALE};
use crate::slurm::NodeInfo;

/// Nodes in one command to Slurm: their names fit into a command line of any length that is usual.
const MOST_NODES: usize = 500;

/// Health of one node as the controller sees it at `now`: the agent's own word, or that there is none.
#[must_use]
pub fn of(cluster: &Cluster, name: &str, now: Instant) -> NodeHealth {
    match cluster.nodes.get(name) {
        Some(Some(status)) if now.duration_since(status.heard) <= STALE => status.health.clone(),
        Some(Some(status)) => NodeHealth {
            healthy: false,
            why: Some(format!(
                "its agent has not answered for {} s",
                now.duration_since(status.heard).as_secs()
            )),
            ..status.health.clone()
        },
        _ => NodeHealth {
            node: name.to_owned(),
            healthy: false,
            why: Some("its agent has not answered yet".into()),
            ..NodeHealth::default()
        },
    }
}

/// What is to be changed: `(node, features it shall have)`.
#[must_use]
pub fn changes(feature: &str, nodes: &[(NodeInfo, bool)]) -> Vec<(String, Vec<String>)> {
    let mut out = Vec::new();
    let mut bearers = nodes.iter().filter(|(n, _)| n.active_features.iter().any(|f| f == feature)).count();
    for (n, is_healthy) in nodes {
        let has = n.active_features.iter().any(|f| f == feature);
        if *is_healthy && !has {
            let mut features = n.active_features.clone();
            features.push(feature.to_owned());
            out.push((n.name.clone(), features));
            bearers += 1;
        }
    }
    for (n, is_healthy) in nodes {
        let has = n.active_features.iter().any(|f| f == feature);
        if !*is_healthy && has && bearers > 1 {
            out.push((
                n.name.clone(),
                n.active_features.iter().filter(|f| *f != feature).cloned().collect(),
            ));
            bearers -= 1;
        }
    }
    out
}

/// Nodes that one command can set: those that get the same features. After a reconfigure all nodes of a cluster have lost theirs, and a
/// command for each would keep the poll waiting for minutes. Who gets the feature stays before who loses it.
fn in_groups(changes: Vec<(String, Vec<String>)>) -> Vec<(Vec<String>, Vec<String>)> {
    let mut groups: Vec<(Vec<String>, Vec<String>)> = Vec::new();
    for (node, features) in changes {
        let fits = |(nodes, same): &&mut (Vec<String>, Vec<String>)| *same == features && nodes.len() < MOST_NODES;
        match groups.iter_mut().find(fits) {
            Some((nodes, _)) => nodes.push(node),
            None => groups.push((vec![node], features)),
        }
    }
    groups
}

impl Controller {
    /// Compares and corrects.
    pub(super) fn keep_features(&self, nodes: &[NodeInfo]) {
        let feature = &self.config.controller.feature;
        let now = self.world.clock.instant();
        let judged: Vec<(NodeInfo, bool)> = {
            let cluster = self.cluster();
            // A controller that has just started has heard nobody: it waits before it takes anything away.
            if cluster.nodes.values().any(Option::is_none) && now.duration_since(self.started) < STALE {
                return;
            }
            nodes.iter().map(|n| (n.clone(), of(&cluster, &n.name, now).healthy)).collect()
        };
        for (nodes, features) in in_groups(changes(feature, &judged)) {
            let gives = features.contains(feature);
            match self.world.slurm.set_active_features(&nodes, &features) {
                Ok(()) if gives => log::info!("{}: healthy, has feature {feature} again", nodes.join(",")),
                Ok(()) => {
                    for node in nodes {
                        let why = of(&self.cluster(), &node, now).why.unwrap_or_default();
                        log::warn!("{node}: feature {feature} taken away: {why}");
                    }
                }
                Err(e) => log::error!("{}: features cannot be set: {e}", nodes.join(",")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, active: &[&str]) -> NodeInfo {
        NodeInfo {
            name: name.into(),
            state: vec!["IDLE".into()],
            reason: None,
            available_features: vec!["vm".into(), "x".into()],
            active_features: active.iter().map(|f| (*f).to_owned()).collect(),
            cpus_alloc: 0,
            cpus_total: 2,
            cores: 2,
            threads_per_core: 1,
            mem_alloc_mib: 0,
            mem_total_mib: 4096,
            partitions: vec![],
            address: name.into(),
        }
    }

    #[test]
    fn a_sick_node_loses_the_feature_and_keeps_the_others() {
        let c = changes("vm", &[(node("n1", &["vm", "x"]), false), (node("n2", &["vm"]), true)]);
        assert_eq!(c, vec![("n1".into(), vec!["x".into()])]);
    }

    #[test]
    fn the_last_bearer_never_loses_the_feature() {
        let c = changes("vm", &[(node("n1", &["vm"]), false), (node("n2", &["vm"]), false)]);
        assert_eq!(c.len(), 1, "{c:?}");
        let c = changes("vm", &[(node("n1", &["vm"]), false), (node("n2", &[]), false)]);
        assert!(c.is_empty(), "{c:?}");
    }

    #[test]
    fn a_cluster_that_has_lost_its_features_gets_them_back_in_a_few_commands() {
        let all: Vec<(NodeInfo, bool)> = (0..1200).map(|k| (node(&format!("n{k}"), &[]), true)).collect();
        let groups = in_groups(changes("vm", &all));
        assert_eq!(groups.iter().map(|(nodes, _)| nodes.len()).collect::<Vec<_>>(), [500, 500, 200]);
        let other = in_groups(changes("vm", &[(node("n1", &["x"]), true), (node("n2", &[]), true)]));
        assert_eq!(other.len(), 2, "what else a node has stays its own: {other:?}");
    }

    #[test]
    fn a_healthy_node_gets_the_feature_back_before_a_sick_one_loses_it() {
        let c = changes("vm", &[(node("n1", &["vm"]), false), (node("n2", &[]), true)]);
        assert_eq!(c, vec![("n2".into(), vec!["vm".into()]), ("n1".into(), vec![])]);
    }
}
