//! What is known of this host: domain type, QEMU, security model, storage, what it can hold a guest to.
use std::{sync::atomic::Ordering, time::Duration};

use super::{Node, shared::Look, type_name};
use crate::{config::DomainTypeChoice, core::Record, hypervisor::DomainType};

impl Node {
    /// Bytes per second of the last save made here.
    #[must_use]
    pub fn save_speed(&self) -> Option<u64> {
        Some(self.save_speed.load(Ordering::Relaxed)).filter(|s| *s > 0)
    }

    /// A save of so many bytes of memory was made. Of a small one the fixed costs are most.
    pub fn saved_at(&self, bytes: u64, took: Duration) {
        if bytes < 64 << 20 {
            return;
        }
        let ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX).max(1);
        self.save_speed.store(bytes.saturating_mul(1000) / ms, Ordering::Relaxed);
    }

    /// Domain type of new VMs: chosen once, by the configuration or the probe.
    #[must_use]
    pub fn domain_type(&self) -> DomainType {
        self.domain_type_and_reason().0
    }

    /// QEMU's version (`10.0.2`), empty while libvirt does not tell it.
    #[must_use]
    pub fn qemu_version(&self) -> String {
        if let Some(known) = self.host.get() {
            return known.hypervisor_version.clone();
        }
        match self.world.hypervisor.host(self.domain_type()) {
            Ok(host) => self.host.get_or_init(|| host).hypervisor_version.clone(),
            Err(e) => {
                log::warn!("libvirt does not tell QEMU's version: {e}");
                String::new()
            }
        }
    }

    /// What confines QEMU here (`apparmor`, `selinux`, `none`); nothing as long as libvirt has not said it.
    #[must_use]
    pub fn security_model(&self) -> Option<&str> {
        self.host.get().map(|h| h.security_model.as_str())
    }

    /// Looks whether `shared_dir` is of use to VMs. May last as long as a file server is away.
    pub fn look_at_shared_dir(&self) {
        let now = crate::node::shared::look(&self.config);
        let mut known = self.shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(why) = now.trouble.as_ref().filter(|_| known.trouble != now.trouble) {
            log::error!("{why}");
        }
        *known = now;
    }

    /// What the last look at `shared_dir` has found.
    #[must_use]
    pub fn shared(&self) -> Look {
        self.shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// What QEMU as a whole may use: the job's allocation, where cgroups let libvirt enforce it.
    #[must_use]
    pub fn hard_limit_mib(&self, record: &Record) -> Option<u64> {
        let given = record.allocation.as_ref().and_then(|a| a.mem_mib);
        given.filter(|_| self.config.hypervisor.memory_limit && !self.hard_limit_fails.load(Ordering::Relaxed))
    }

    /// Remembers, and says once, that hard limits do not work on this host.
    pub fn no_hard_limit(&self, why: &str) {
        if !self.hard_limit_fails.swap(true, Ordering::Relaxed) {
            log::warn!("QEMU's memory is not held to the job's allocation on this node: {why}");
        }
    }

    /// As [`Node::domain_type`], with the reason for people.
    #[must_use]
    pub fn domain_type_and_reason(&self) -> (DomainType, String) {
        self.domain_type
            .get_or_init(|| {
                let chosen = match self.config.hypervisor.domain_type {
                    DomainTypeChoice::Kvm => (DomainType::Kvm, "set in the configuration".to_owned()),
                    DomainTypeChoice::Qemu => (DomainType::Qemu, "set in the configuration".to_owned()),
                    DomainTypeChoice::Auto => crate::node::probe::choose(&self.config, &self.world),
                };
                log::info!("domain type {}: {}", type_name(chosen.0), chosen.1);
                chosen
            })
            .clone()
    }

    /// The same without waiting: nothing while a guest tries KVM.
    #[must_use]
    pub fn domain_type_if_known(&self) -> Option<(DomainType, String)> {
        match self.config.hypervisor.domain_type {
            DomainTypeChoice::Auto => self.domain_type.get().cloned(),
            _ => Some(self.domain_type_and_reason()),
        }
    }
}
