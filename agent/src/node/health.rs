//! Whether VMs can be started on this node right now.
use std::{sync::Arc, time::Duration};

use slurm_vm_api::query::NodeHealth;

use crate::node::{Node, type_name};

/// How long libvirt may take to answer before the node counts as sick.
const LIBVIRT_ANSWERS_WITHIN: Duration = Duration::from_secs(3);
/// Below this many free bytes in the state directory no overlay should be begun.
const FREE_BYTES: u64 = 64 << 20;

/// Looks at libvirt and the state directory; takes at most a few seconds.
#[must_use]
pub fn of(node: &Arc<Node>) -> NodeHealth {
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let Some((domain_type, reason)) = node.domain_type_if_known() else {
        return NodeHealth {
            node: node.name.clone(),
            healthy: false,
            why: Some("it has just started: a guest tries whether KVM works".into()),
            version,
            domain_type: "not known yet".into(),
            storage: node.shared().storage,
        };
    };
    let why = trouble(node);
    NodeHealth {
        node: node.name.clone(),
        healthy: why.is_none(),
        why,
        version,
        domain_type: format!("{} ({reason}{})", type_name(domain_type), confined(node)),
        storage: node.shared().storage,
    }
}

/// What keeps a guest that has broken out of QEMU from the host.
fn confined(node: &Arc<Node>) -> &'static str {
    match node.security_model() {
        None => "",
        Some("apparmor") => "; AppArmor",
        Some("selinux") => "; SELinux",
        Some(_) => "; neither AppArmor nor SELinux",
    }
}

fn trouble(node: &Arc<Node>) -> Option<String> {
    if let Err(e) = node.world.hypervisor.ping(LIBVIRT_ANSWERS_WITHIN) {
        return Some(format!("libvirt: {e}"));
    }
    if let Some(why) = node.shared().trouble {
        return Some(why);
    }
    match node.world.disks.free_bytes(&node.config.state_dir) {
        Ok(free) if free < FREE_BYTES => Some(format!("{}: only {} MiB free", node.config.state_dir.display(), free >> 20)),
        Ok(_) => None,
        Err(e) => Some(e.to_string()),
    }
}
