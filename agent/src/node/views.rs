//! What `svm` and the controller are told of the VMs here.
use std::{sync::Arc, time::Duration};

use crossbeam_channel::{Receiver, Sender, bounded};
use slurm_vm_api::query::{Totals, VmView};

use super::{Known, Node};
use crate::{
    core::{Record, registry::Entry},
    vm::{Request, view},
};

/// How long the VMs of a node together may take to say how they are.
const VIEWS_WITHIN: Duration = Duration::from_secs(1);
/// Ended VMs in a status: some 500 bytes each, so that it stays below 64 KiB whatever has ended.
pub const MOST_ENDED: usize = 80;

impl Node {
    /// What there is of a job here, alive or over.
    #[must_use]
    pub fn view(self: &Arc<Self>, job: u32) -> Option<VmView> {
        match self.known(job)? {
            Known::Live(tx) => self.ask(&tx, Request::View),
            Known::Over(record) => Some(view::of(self, &record)),
        }
    }

    /// What is sent every second: all VMs that are alive, those that wait in a save, and of those that are over the [`MOST_ENDED`] that ended
    /// last; and what all have been given. The others are asked for by their job. It costs the same whatever has ended.
    #[must_use]
    pub fn status(self: &Arc<Self>) -> (Vec<VmView>, Totals) {
        let (ways, over, sums) = {
            let vms = self.vms();
            let ways = vms.alive().map(|(job, live)| (job, live.way.clone())).collect();
            let over: Vec<Record> = vms.recently_over(MOST_ENDED).cloned().collect();
            (ways, over, vms.sums())
        };
        let mut views = self.views_of(ways);
        let mut totals = self.totals(&views);
        totals.ended += sums.ended;
        totals.run_seconds += sums.run_seconds;
        totals.vcpu_seconds += sums.vcpu_seconds;
        totals.moves += sums.moves;
        totals.moved_bytes += sums.moved_bytes;
        views.extend(over.iter().map(|record| view::of(self, record)));
        (views, totals)
    }

    /// All VMs of this node, those that are over last.
    #[must_use]
    pub fn views(self: &Arc<Self>) -> Vec<VmView> {
        let mut views = Vec::new();
        let mut asked = Vec::new();
        let mut over = Vec::new();
        for (job, entry) in self.vms().iter() {
            match entry {
                Entry::Live(live) => asked.push((job, live.way.clone())),
                Entry::Over(record) => over.push(record.clone()),
            }
        }
        views.extend(over.iter().map(|record| view::of(self, record)));
        views.extend(self.views_of(asked));
        views.sort_by_key(|v| (v.is_over() || v.state == "saved", v.job));
        views
    }

    /// Asks the owners, all at once: one that looks at a file server which is away keeps nobody waiting for the others.
    fn views_of(&self, ways: Vec<(u32, Sender<Request>)>) -> Vec<VmView> {
        let answers: Vec<(u32, Receiver<VmView>)> = ways
            .into_iter()
            .filter_map(|(job, tx)| {
                let (reply, answer) = bounded(1);
                tx.send(Request::View(reply)).ok().map(|()| (job, answer))
            })
            .collect();
        let until = self.world.clock.instant() + VIEWS_WITHIN;
        let mut last = self.last_views.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let known = std::mem::take(&mut *last);
        let mut views = Vec::new();
        for (job, answer) in answers {
            let told = answer.recv_deadline(until).ok().or_else(|| known.get(&job).cloned());
            if let Some(told) = told {
                last.insert(job, told.clone());
                views.push(told);
            }
        }
        views
    }

    /// What this node's VMs have been given.
    #[must_use]
    pub fn totals(&self, views: &[VmView]) -> Totals {
        let mut t = Totals {
            scope: self.name.clone(),
            ..Totals::default()
        };
        for v in views {
            // A VM that has left is counted where it is now, with all the time it has run.
            let left = matches!(v.state.as_str(), "gone" | "saved");
            if v.state == "stopped" {
                t.ended += 1;
            } else if !left {
                t.vms += 1;
                t.vcpus += v.vcpus;
                t.mem_mib += v.mem_mib;
                t.disk_bytes += v.disk_bytes;
            }
            if !left {
                t.run_seconds += v.run_seconds;
                t.vcpu_seconds += v.run_seconds * u64::from(v.vcpus);
            }
            for m in v.moves.iter().filter(|m| m.from == self.name && m.outcome == "done") {
                t.moves += 1;
                t.moved_bytes += m.bytes;
            }
        }
        t
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use slurm_vm_api::query::MoveView;

    /// As long as views get in practice.
    fn view(job: u32, state: &str) -> VmView {
        let moved = MoveView {
            way: "live".into(),
            from: "node-with-a-name-1".into(),
            to: "node-with-a-name-2".into(),
            cause: "preemption".into(),
            outcome: "done".into(),
            ..MoveView::default()
        };
        VmView {
            job,
            user: "a-user-with-a-name".into(),
            node: "node-with-a-name-1".into(),
            domain: format!("slurm-{job}-0"),
            state: state.into(),
            image: "debian12".into(),
            domain_type: "kvm".into(),
            domain_type_why: "a guest has booted with it".into(),
            ended_at: Some(1_700_000_000 + u64::from(job)),
            moves: vec![moved],
            ..VmView::default()
        }
    }

    #[test]
    fn a_status_is_small_whatever_has_ended() {
        let ended = u32::try_from(MOST_ENDED).unwrap();
        let mut told: Vec<VmView> = (1..=ended).map(|job| view(job, "stopped")).collect();
        told.extend([view(20_001, "running"), view(20_002, "saved")]);
        let bytes = serde_json::to_vec(&told).unwrap().len();
        assert!(bytes <= 64 << 10, "{bytes} bytes");
    }
}
