//! The VMs of a node that are over: what they were given in all, and which ended last. Kept up to date with each that comes and goes, so that a
//! status costs the same whatever has ended.
use std::collections::BTreeSet;

use super::record::{Life, Record};

/// What VMs that are over were given in all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sums {
    /// VMs that ended here.
    pub ended: u64,
    /// Seconds that the guests of those ran.
    pub run_seconds: u64,
    /// The same times their virtual CPUs.
    pub vcpu_seconds: u64,
    /// Moves away from here, of all that are over.
    pub moves: u64,
    /// Bytes that those took.
    pub moved_bytes: u64,
}

impl Sums {
    /// Of one VM. One that has left is counted where it is now, with all the time it has run.
    #[must_use]
    pub fn of(r: &Record) -> Self {
        let mut sums = Self::default();
        if matches!(r.life, Life::Stopped { .. }) {
            let milliseconds = r.up_ms.zip(r.ended_ms).map_or(0, |(up, ended)| ended.saturating_sub(up));
            sums.ended = 1;
            sums.run_seconds = milliseconds / 1000;
            sums.vcpu_seconds = sums.run_seconds * r.plan.as_ref().map_or(0, |p| u64::from(p.vcpus));
        }
        for m in r.moves.iter().filter(|m| m.from == r.node && m.outcome == "done") {
            sums.moves += 1;
            sums.moved_bytes += m.bytes;
        }
        sums
    }

    fn each(self, other: Self, with: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            ended: with(self.ended, other.ended),
            run_seconds: with(self.run_seconds, other.run_seconds),
            vcpu_seconds: with(self.vcpu_seconds, other.vcpu_seconds),
            moves: with(self.moves, other.moves),
            moved_bytes: with(self.moved_bytes, other.moved_bytes),
        }
    }
}

/// The VMs that are over.
#[derive(Debug, Default)]
pub struct Ended {
    sums: Sums,
    /// Those of which nothing more is to come, by Unix milliseconds of their end, and job.
    by_end: BTreeSet<(u64, u32)>,
    /// Jobs whose saves wait.
    saved: BTreeSet<u32>,
}

impl Ended {
    /// A VM is over.
    pub fn add(&mut self, r: &Record) {
        self.sums = self.sums.each(Sums::of(r), u64::saturating_add);
        if matches!(r.life, Life::Saved { .. }) {
            self.saved.insert(r.job);
        } else {
            self.by_end.insert(Self::key(r));
        }
    }

    /// The record of a VM, as it was added, goes.
    pub fn take(&mut self, r: &Record) {
        self.sums = self.sums.each(Sums::of(r), u64::saturating_sub);
        self.saved.remove(&r.job);
        self.by_end.remove(&Self::key(r));
    }

    /// What all of them were given.
    #[must_use]
    pub fn sums(&self) -> Sums {
        self.sums
    }

    /// Jobs whose saves wait, and of the others the `most` that ended last.
    pub fn recent(&self, most: usize) -> impl Iterator<Item = u32> + '_ {
        let ended = self.by_end.iter().rev().take(most).map(|(_, job)| *job);
        self.saved.iter().copied().chain(ended)
    }

    fn key(r: &Record) -> (u64, u32) {
        (r.ended_ms.unwrap_or(r.created_ms), r.job)
    }
}

#[cfg(test)]
mod tests {
    use slurm_vm_api::{query::MoveView, session::UserEntry, spec::VmSpec};

    use super::*;
    use crate::core::{
        record::{End, Plan},
        registry::Registry,
    };

    fn user() -> UserEntry {
        UserEntry {
            name: "alice".into(),
            uid: 2001,
            gid: 2001,
            home: "/home/alice".into(),
            shell: "/bin/sh".into(),
        }
    }

    /// A VM of two CPUs that ran for ten seconds, and was moved away once before.
    fn record(job: u32, life: Life) -> Record {
        let plan = Plan {
            vcpus: 2,
            mem_mib: 400,
            domain_type: "kvm".into(),
            overlay: None,
            overlay_shared: false,
            layers: vec![],
            disk_mib: None,
            seed: None,
            directories: vec![],
            network: slurm_vm_api::spec::Network::None,
            base_sha256: None,
        };
        let moved = MoveView {
            from: "n1".into(),
            to: "n2".into(),
            bytes: 100,
            outcome: "done".into(),
            ..MoveView::default()
        };
        Record {
            life,
            plan: Some(plan),
            up_ms: Some(1_000 + u64::from(job)),
            ended_ms: Some(11_000 + u64::from(job)),
            moves: vec![moved],
            ..Record::new("example".into(), "n1".into(), job, user(), VmSpec::for_image("tiny").unwrap())
        }
    }

    fn stopped(job: u32) -> Record {
        record(job, Life::Stopped { why: End::Released })
    }

    #[test]
    fn the_last_that_ended_and_all_that_wait_are_told_and_all_are_counted() {
        let mut vms: Registry<()> = Registry::default();
        for job in 1..=10_000 {
            vms.over(stopped(job));
        }
        vms.over(record(
            5,
            Life::Saved {
                at: "/shared/saves/x".into(),
            },
        ));
        vms.over(record(6, Life::Gone { to: "n2".into() }));
        vms.begun(20_001, (), user());
        let told: Vec<u32> = vms.recently_over(80).map(|r| r.job).collect();
        assert_eq!(told.len(), 81);
        assert!(told.contains(&5) && (9_921..=10_000).all(|job| told.contains(&job)), "{told:?}");
        let sums = Sums {
            ended: 9_998,
            run_seconds: 99_980,
            vcpu_seconds: 199_960,
            moves: 10_000,
            moved_bytes: 1_000_000,
        };
        assert_eq!(vms.sums(), sums, "what was saved or has left runs elsewhere, and is counted there");
        // One runs again, one save is for nobody, and the rest is forgotten.
        vms.begun(10_000, (), user());
        assert!(vms.saved_for_nobody(5).is_some());
        assert_eq!((vms.sums().ended, vms.sums().moves), (9_998, 9_999));
        assert_eq!(vms.forget_old(u64::MAX, 0).len(), 9_999);
        assert_eq!(vms.sums(), Sums::default());
        assert_eq!(vms.recently_over(80).count(), 0);
    }
}
