//! libvirt's events and Slurm's notices on their way to the owners of the VMs.
use std::{collections::HashMap, sync::Arc};

use crossbeam_channel::{Receiver, Sender};

use super::{Node, domains_of};
use crate::{
    core::{
        Life,
        registry::{Entry, Recheck, job_of},
    },
    hypervisor::{DomainEvent, StateReason, StopReason},
    vm::{Request, companions},
};

impl Node {
    /// Slurm's notice reached a shim. What moves the VM is the controller's own poll.
    pub fn notice(&self, job: u32) {
        log::info!("job {job}: preemption notice");
        // Also where no controller says so: a script that ends from here on is not to run again.
        if let Some(owner) = self.owner(job) {
            let _ = owner.send(Request::Grace);
        }
    }

    /// Passes libvirt's events on to the owners; runs on its own thread until the hypervisor goes away.
    pub fn watch_domains(self: &Arc<Self>, events: &Receiver<DomainEvent>) {
        let mut panicked: HashMap<String, &'static str> = HashMap::new();
        for event in events {
            match event {
                DomainEvent::Panicked { name, .. } => {
                    panicked.insert(name, "its kernel panicked");
                }
                DomainEvent::Stopped { name, reason, .. } => {
                    let how = panicked.remove(&name).unwrap_or(match reason {
                        StopReason::Shutdown => "it powered off or rebooted",
                        StopReason::Destroyed => "its domain was destroyed",
                        StopReason::Crashed => "QEMU died",
                        StopReason::Failed => "QEMU was ended",
                        StopReason::Migrated | StopReason::Saved => continue,
                        StopReason::Other => "its domain ended",
                    });
                    self.tell(&name, crate::core::Event::DomainEnded { how: how.into() });
                }
                DomainEvent::Resumed {
                    name,
                    reason: StateReason::Migrated,
                    ..
                } => self.tell(&name, crate::core::Event::Arrived),
                DomainEvent::ConnectionBack => self.recheck(),
                DomainEvent::ConnectionLost => log::warn!("the connection to libvirt is lost"),
                other => log::debug!("{other:?}"),
            }
        }
    }

    fn tell(&self, domain: &str, event: crate::core::Event) {
        if let Some(tx) = job_of(domain).and_then(|j| self.owner(j)) {
            let _ = tx.send(Request::Core(event));
        }
    }

    /// The owners of all live VMs.
    fn owners(&self) -> Vec<(u32, Sender<Request>)> {
        let vms = self.vms();
        let owner = |(job, entry): (u32, &Entry<Sender<Request>>)| match entry {
            Entry::Live(live) => Some((job, live.way.clone())),
            Entry::Over(_) => None,
        };
        vms.iter().filter_map(owner).collect()
    }

    /// Looks after the companions of running VMs: a network is started anew, a VM that has lost a directory of the host is ended, for its
    /// programs would wait for it for ever.
    pub fn look_after_companions(&self) {
        for (job, way) in self.owners() {
            let Some(record) = self.ask(&way, Request::Record).filter(|r| r.life == Life::Running) else {
                continue;
            };
            if let Some(dir) = companions::look_after(self, &record) {
                log::error!("job {job}: the server of its directory {} has ended", dir.display());
                let _ = way.send(Request::Core(crate::core::Event::DirectoryLost { dir }));
            }
        }
    }

    /// Events may have been lost while libvirt was away: compare.
    fn recheck(self: &Arc<Self>) {
        let Ok(domains) = self.world.hypervisor.list() else { return };
        log::info!("libvirt is back, {} domains", domains.len());
        let lives = self
            .owners()
            .into_iter()
            .filter_map(|(job, way)| Some((job, self.ask(&way, Request::Record)?)))
            .collect();
        let Recheck { ended, left } = self.vms().recheck(&domains_of(&domains), &lives);
        for way in ended {
            let _ = way.send(Request::Core(crate::core::Event::DomainEnded {
                how: "it ended while libvirt was away".into(),
            }));
        }
        for name in left {
            log::warn!("domain {name} is there though its VM is over: ending it");
            if let Err(e) = self.world.hypervisor.destroy(&name) {
                log::error!("cannot end {name}: {e}");
            }
        }
    }
}
