//! The feature `vm` follows the health of each node's agent and libvirt.
//!
//! Only ActiveFeatures are changed. They are lost at a reconfigure and at a restart of slurmctld, so they are compared
//! at each poll. The last node never loses the feature: Slurm would then refuse submissions instead of queueing them
//! (slurm: "Requested node configuration is not available").
use std::time::Instant;

use slurm_vm_api::query::NodeHealth;

use super::{Cluster, Controller, STALE};
use crate::slurm::NodeInfo;

/// Health of one node as the controller sees it: the agent's own word, or that there is none.
#[must_use]
pub fn of(cluster: &Cluster, name: &str) -> NodeHealth {
    match cluster.nodes.get(name) {
        Some(Some(status)) if status.heard.elapsed() <= STALE => status.health.clone(),
        Some(Some(status)) => NodeHealth {
            healthy: false,
            why: Some(format!(
                "its agent has not answered for {} s",
                Instant::now().duration_since(status.heard).as_secs()
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

impl Controller {
    /// Compares and corrects.
    pub(super) fn keep_features(&self, nodes: &[NodeInfo]) {
        let feature = &self.config.controller.feature;
        let judged: Vec<(NodeInfo, bool)> = {
            let cluster = self.cluster();
            // A controller that has just started has heard nobody: it waits before it takes anything away.
            if cluster.nodes.values().any(Option::is_none) && self.started.elapsed() < STALE {
                return;
            }
            nodes.iter().map(|n| (n.clone(), of(&cluster, &n.name).healthy)).collect()
        };
        for (node, features) in changes(feature, &judged) {
            let gives = features.contains(feature);
            let why = of(&self.cluster(), &node).why.unwrap_or_default();
            match self.world.slurm.set_active_features(&node, &features) {
                Ok(()) if gives => log::info!("{node}: healthy, has feature {feature} again"),
                Ok(()) => log::warn!("{node}: feature {feature} taken away: {why}"),
                Err(e) => log::error!("{node}: its features cannot be set: {e}"),
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
    fn a_healthy_node_gets_the_feature_back_before_a_sick_one_loses_it() {
        let c = changes("vm", &[(node("n1", &["vm"]), false), (node("n2", &[]), true)]);
        assert_eq!(c, vec![("n2".into(), vec!["vm".into()]), ("n1".into(), vec![])]);
    }
}
