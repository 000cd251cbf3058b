//! Nodes that are being vacated for somebody: claimed from the moment Slurm chose a victim there.
//!
//! ```text
//!  a job in grace on n1 ──> n1 claimed ──┬── a job that started later has it ──> free
//!                                        └── nobody waits any more who goes before the victim and could use it ──> free
//! ```
//! A node that a preemptor waits for looks idle between its victim's leaving and the preemptor's start. Whoever put a VM there
//! in that moment would keep the preemptor out, and Slurm would choose new victims.
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::slurm::JobBrief;

/// Why a node is claimed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    /// Unix seconds at which the last victim there was chosen.
    pub since: i64,
    /// The victim's partition.
    pub partition: String,
    /// The victim's QOS, where it is known.
    #[serde(default)]
    pub qos: Option<String>,
}

/// All of them, by node. Kept in the controller's ledger, since Slurm forgets a victim's grace when it is requeued.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Claims {
    nodes: BTreeMap<String, Claim>,
}

impl Claims {
    /// The node is kept for somebody.
    #[must_use]
    pub fn has(&self, node: &str) -> bool {
        self.nodes.contains_key(node)
    }

    /// Takes in what a poll shows: jobs in grace claim their nodes, jobs that started later end claims. Returns whether that
    /// changed anything.
    pub fn follow(&mut self, jobs: &[JobBrief], qos_of: impl Fn(u32) -> Option<String>) -> bool {
        let before = self.clone();
        for (job, since) in jobs.iter().filter(|j| j.in_grace()).filter_map(|j| j.preempt_time.map(|t| (j, t))) {
            for node in &job.nodes {
                let known = self.nodes.get(node);
                if known.is_none_or(|c| c.since < since) {
                    let claim = Claim {
                        since,
                        partition: job.partition.clone(),
                        qos: qos_of(job.id).or_else(|| known.and_then(|c| c.qos.clone())),
                    };
                    self.nodes.insert(node.clone(), claim);
                }
            }
        }
        self.nodes.retain(|node, claim| {
            let mut there = jobs.iter().filter(|j| j.state.is_on_nodes() && j.nodes.contains(node));
            let taken = there.clone().any(|j| j.start_time.is_some_and(|t| t > claim.since));
            there.any(JobBrief::in_grace) || !taken
        });
        *self != before
    }

    /// Ends the claims on nodes without a job in grace for which nobody waits. Returns whether that changed anything.
    pub fn release(&mut self, jobs: &[JobBrief], is_waited_for: impl Fn(&str, &Claim) -> bool) -> bool {
        let before = self.nodes.len();
        self.nodes.retain(|node, claim| {
            let grace = jobs.iter().any(|j| j.in_grace() && j.nodes.contains(node));
            grace || is_waited_for(node, claim)
        });
        self.nodes.len() != before
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::brief;
    use super::*;
    use crate::slurm::JobState;

    fn on(id: u32, node: &str, start: i64, preempt: Option<i64>) -> JobBrief {
        JobBrief {
            state: JobState::Running,
            start_time: Some(start),
            preempt_time: preempt,
            nodes: vec![node.into()],
            ..brief(id, "low")
        }
    }

    #[test]
    fn a_claim_outlives_its_victim_until_a_later_job_has_the_node() {
        let mut claims = Claims::default();
        assert!(claims.follow(&[on(1, "n1", 100, Some(200)), on(2, "n2", 100, None)], |_| None));
        assert!(claims.has("n1") && !claims.has("n2"));
        // Nothing new.
        assert!(!claims.follow(&[on(1, "n1", 100, Some(200))], |_| None));
        // The victim has left, another old job is still there.
        assert!(!claims.follow(&[on(3, "n1", 150, None)], |_| None));
        assert!(claims.has("n1"));
        assert!(claims.follow(&[on(4, "n1", 201, None)], |_| None));
        assert!(!claims.has("n1"));
    }

    #[test]
    fn a_claim_ends_when_nobody_waits_but_not_while_a_job_is_in_grace_there() {
        let mut claims = Claims::default();
        let grace = [on(1, "n1", 100, Some(200))];
        claims.follow(&grace, |_| None);
        assert!(!claims.release(&grace, |_, _| false));
        assert!(!claims.release(&[], |node, claim| node == "n1" && claim.partition == "low"));
        assert!(claims.release(&[], |_, _| false));
        assert!(!claims.has("n1"));
    }

    #[test]
    fn claims_are_written_and_read_as_they_are() {
        let mut claims = Claims::default();
        claims.follow(&[on(1, "n1", 100, Some(200))], |_| Some("normal".into()));
        let json = serde_json::to_string(&claims).unwrap();
        assert_eq!(json, r#"{"n1":{"since":200,"partition":"low","qos":"normal"}}"#);
        assert_eq!(serde_json::from_str::<Claims>(&json).unwrap(), claims);
    }
}
