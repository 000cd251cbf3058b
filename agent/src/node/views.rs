//! What `svm` and the controller are told of the VMs here.
use std::{sync::Arc, time::Duration};

use crossbeam_channel::{Receiver, bounded};
use slurm_vm_api::query::{Totals, VmView};

use super::{Known, Node};
use crate::{
    core::registry::Entry,
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

    /// VMs for a status that is sent every second: all that are alive, and of those that are over the [`MOST_ENDED`] that ended last. The
    /// others are asked for by their job.
    #[must_use]
    pub fn recent(views: Vec<VmView>) -> Vec<VmView> {
        let (mut ended, alive): (Vec<VmView>, Vec<VmView>) = views.into_iter().partition(VmView::is_over);
        ended.sort_by_key(|v| std::cmp::Reverse(v.ended_at));
        ended.truncate(MOST_ENDED);
        alive.into_iter().chain(ended).collect()
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
        // All at once: one that looks at a file server which is away keeps nobody waiting for the others.
        let answers: Vec<(u32, Receiver<VmView>)> = asked
            .into_iter()
            .filter_map(|(job, tx)| {
                let (reply, answer) = bounded(1);
                tx.send(Request::View(reply)).ok().map(|()| (job, answer))
            })
            .collect();
        let until = self.world.clock.instant() + VIEWS_WITHIN;
        let mut last = self.last_views.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let known = std::mem::take(&mut *last);
        for (job, answer) in answers {
            let told = answer.recv_deadline(until).ok().or_else(|| known.get(&job).cloned());
            if let Some(told) = told {
                last.insert(job, told.clone());
                views.push(told);
            }
        }
        drop(last);
        views.sort_by_key(|v| (v.is_over() || v.state == "saved", v.job));
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
    fn a_status_is_small_whatever_has_ended_and_tells_all_that_lives() {
        let mut all: Vec<VmView> = (1..=10_000).map(|job| view(job, "stopped")).collect();
        all.extend([view(20_001, "running"), view(20_002, "saved")]);
        let told = Node::recent(all);
        let bytes = serde_json::to_vec(&told).unwrap().len();
        assert!(bytes <= 64 << 10, "{bytes} bytes");
        let jobs: Vec<u32> = told.iter().map(|v| v.job).collect();
        assert!(jobs.contains(&20_001) && jobs.contains(&20_002), "{jobs:?}");
        let last = u32::try_from(MOST_ENDED).unwrap();
        assert!(
            (10_001 - last..=10_000).all(|job| jobs.contains(&job)),
            "those that ended last: {jobs:?}"
        );
    }
}
