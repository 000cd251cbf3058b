//! The feature `vm` follows the health of each node's agent and libvirt.
//!
//! Only ActiveFeatures are changed. They are lost at a reconfigure and at a restart of slurmctld, so they are compared
//! at each poll. The last node never loses the feature: Slurm would then refuse submissions instead of queueing them
//! (slurm: "Requested node configuration is not available").
use std::{collections::BTreeMap, time::Instant};

use slurm_vm_api::query::NodeHealth;

use super::{Cluster, Controller, STALE};
use crate::slurm::NodeInfo;

/// Nodes in one command to Slurm: their names fit into a command line of any length that is usual.
const MOST_NODES: usize = 500;

/// Health of one node as the controller sees it at `now`: the agent's own word, or that there is none.
#[must_use]
pub fn of(cluster: &Cluster, name: &str, now: Instant) -> NodeHealth {
    match cluster.nodes.get(name) {
        Some(Some(status)) if now.duration_since(status.heard) <= STALE => {
            let (mine, usual) = (&status.health.storage, &cluster.storage);
            let strange = status.health.healthy && mine.is_some() && usual.is_some() && mine != usual;
            if !strange {
                return status.health.clone();
            }
            NodeHealth {
                healthy: false,
                why: Some("its shared_dir is another storage than the other nodes': is it mounted?".into()),
                ..status.health.clone()
            }
        }
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

/// The storage that the cluster shares, by what its nodes say: that of most of them, and of as many the one that was first used. An id begins with
/// the milliseconds of that.
#[must_use]
pub fn usual_storage<'a>(ids: impl Iterator<Item = &'a str>) -> Option<String> {
    let mut nodes: BTreeMap<&str, usize> = BTreeMap::new();
    for id in ids {
        *nodes.entry(id).or_default() += 1;
    }
    let begun = |id: &str| id.split('-').next().and_then(|ms| ms.parse::<u64>().ok()).unwrap_or(u64::MAX);
    let usual = nodes.into_iter().max_by_key(|(id, count)| (*count, std::cmp::Reverse(begun(id))));
    usual.map(|(id, _)| id.to_owned())
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
    use slurm_vm_api::query::Totals;

    use super::*;
    use crate::controller::NodeStatus;

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

    #[test]
    fn a_node_whose_shared_directory_is_another_storage_is_sick_by_the_word_of_the_others() {
        let usual = |ids: &[&str]| usual_storage(ids.iter().copied());
        assert_eq!(usual(&[]), None);
        assert_eq!(usual(&["20-n2", "10-n1", "20-n2"]).as_deref(), Some("20-n2"), "what most have");
        assert_eq!(usual(&["200-n2", "1000-n1"]).as_deref(), Some("200-n2"), "the first of as many");
        let now = Instant::now();
        let status = |storage: Option<&str>, healthy| NodeStatus {
            health: NodeHealth {
                healthy,
                storage: storage.map(str::to_owned),
                ..NodeHealth::default()
            },
            vms: vec![],
            totals: Totals::default(),
            heard: now,
        };
        let mut cluster = Cluster {
            storage: Some("20-n2".into()),
            ..Cluster::default()
        };
        for (name, storage, healthy) in [
            ("same", Some("20-n2"), true),
            ("other", Some("30-n3"), true),
            ("none", None, true),
            ("sick", Some("30-n3"), false),
        ] {
            cluster.nodes.insert(name.into(), Some(status(storage, healthy)));
        }
        let said = |name: &str| (of(&cluster, name, now).healthy, of(&cluster, name, now).why);
        assert_eq!(said("same"), (true, None));
        assert!(matches!(said("other"), (false, Some(why)) if why.contains("is it mounted?")));
        assert_eq!(said("none"), (true, None), "a site without shared storage");
        assert_eq!(said("sick"), (false, None), "its own word comes first");
    }
}
