//! What must hold at each step, and what must be left at the end: nothing.
use slurm_vm::{
    core::{Event, Life, Whereabouts},
    hypervisor::DomainState,
    slurm::Slurm,
};

use crate::cluster::{Cluster, Mood, domain};

impl Cluster {
    /// Looks at one job, or at all.
    pub fn check(&self, about: Option<u32>) -> Result<(), String> {
        if let Some(what) = self.world.violations().into_iter().next() {
            return Err(what);
        }
        if let Some(what) = self.wrong.first() {
            return Err(what.clone());
        }
        if about.is_none()
            && let Some(what) = self.slurm.breach()
        {
            return Err(what);
        }
        for (name, node) in &self.nodes {
            for (job, record) in node.ledger.iter().filter(|(job, _)| about.is_none_or(|a| a == **job)) {
                let state = self.hypervisors[name].peek(&domain(*job));
                let info = || state;
                if matches!(record.life, Life::Gone { .. } | Life::Saved { .. }) && info() == Some(DomainState::Running) {
                    return Err(format!("job {job} runs on {name}, whose record says {}", record.life.name()));
                }
                if matches!(record.life, Life::Stopped { .. }) && info().is_some() {
                    return Err(format!("job {job} is stopped on {name}, and its domain is there"));
                }
                if info() == Some(DomainState::Running) && !self.has_disk(record) {
                    return Err(format!("job {job} runs on {name} without its disk"));
                }
            }
        }
        if let Some(torn) = self.torn_saves().first().filter(|_| about.is_none()) {
            return Err(format!("{} has a manifest and no memory", torn.display()));
        }
        if self.mood == Mood::Calm && self.counts.contains_key("lost guests in calm weather") {
            return Err("a guest was lost although nothing failed".into());
        }
        Ok(())
    }

    /// What is left; `None` when the cluster is at rest.
    pub fn left(&self) -> Option<String> {
        if let Some(job) = self.vm_jobs.keys().find(|j| !self.job_is_over(**j)) {
            let at: Vec<String> = self
                .nodes
                .iter()
                .filter_map(|(n, s)| Some(format!("{} on {n}", s.vms.get(job)?.vm.record.life.name())))
                .collect();
            let slurm = self
                .slurm
                .job(*job)
                .ok()
                .flatten()
                .map(|i| (i.brief.state, i.brief.nodes, i.brief.reservation, i.brief.priority));
            return Some(format!("job {job} has not ended: {slurm:?}, VM {at:?}"));
        }
        for (name, node) in &self.nodes {
            if let Some((job, owner)) = node.vms.first_key_value() {
                return Some(format!("{name} still has a VM of job {job}: {}", owner.vm.record.life.name()));
            }
            if let Some((job, record)) = node.ledger.iter().find(|(_, r)| !r.life.is_over_here()) {
                return Some(format!("{name}'s ledger has job {job} {}", record.life.name()));
            }
        }
        let files = self.left_on_storage();
        let with_users = self.left_with_users();
        let left: [(&str, usize); 6] = [
            ("domains", self.world.domains()),
            ("files", files.len()),
            ("servers of directories, or marks in them,", with_users.len()),
            ("moves", self.controller.moves()),
            ("epilogs", self.epilogs.len()),
            ("reservations", self.slurm.reservations().map_or(1, |r| r.len())),
        ];
        left.iter()
            .find(|(_, n)| *n > 0)
            .map(|(what, n)| format!("{n} {what} left ({files:?}, {with_users:?})"))
    }
}

/// An event's name.
pub fn kind(event: &Event) -> &'static str {
    match event {
        Event::Prepared(Ok(_)) => "prepared",
        Event::Prepared(Err(_)) => "prepare-failed",
        Event::DomainStarted(Ok(())) => "started",
        Event::DomainStarted(Err(_)) => "start-failed",
        Event::GuestUp { .. } => "guest-up",
        Event::DomainEnded { .. } => "domain-ended",
        Event::DirectoryLost { .. } => "directory-lost",
        Event::JobHere { .. } => "job-here",
        Event::Release => "release",
        Event::Tick => "tick",
        Event::Destroyed(Ok(())) => "destroyed",
        Event::Destroyed(Err(_)) => "destroy-failed",
        Event::MoveOut { .. } => "move-out",
        Event::DestinationReady(Ok(())) => "destination-ready",
        Event::DestinationReady(Err(_)) => "destination-refused",
        Event::Migrated(Ok(_)) => "migrated",
        Event::Migrated(Err(_)) => "migrate-failed",
        Event::OwnerIs(Whereabouts::AtSource) => "owner-is-source",
        Event::OwnerIs(Whereabouts::AtDestination) => "owner-is-destination",
        Event::OwnerIs(Whereabouts::Nowhere) => "owner-is-nobody",
        Event::OwnerIs(Whereabouts::Unknown) => "owner-is-unknown",
        Event::DomainIs(_) => "domain-is",
        Event::JobIs(_) => "job-is",
        Event::HandedOver(Ok(())) => "handed-over",
        Event::HandedOver(Err(_)) => "hand-over-failed",
        Event::CancelMove => "cancel",
        Event::Arrived => "arrived",
        Event::TookOver { .. } => "took-over",
        Event::Kept { .. } => "kept",
        Event::Abandoned { .. } => "abandoned",
        Event::Asked { .. } => "asked",
        Event::Save { .. } => "save",
        Event::SaveWritten(Ok(_)) => "saved",
        Event::SaveWritten(Err(_)) => "save-failed",
        Event::Restored(Ok(_)) => "restored",
        Event::Restored(Err(_)) => "restore-failed",
        Event::Resumed(_) => "resumed",
        Event::Pinned(Ok(_)) => "pinned",
        Event::Pinned(Err(_)) => "pin-failed",
        Event::GiveUp => "give-up",
        Event::NotRecorded { .. } => "not-recorded",
        Event::ClockStepped { .. } => "clock-stepped",
    }
}
