//! A record as `svm` shows it.
use slurm_vm_api::{query::VmView, session::BATCH_STEP};

use super::moving;
use crate::{
    core::{Life, Record, record::program_key},
    node::Node,
};

/// The view of a record.
#[must_use]
pub fn of(node: &Node, r: &Record) -> VmView {
    let now = node.world.clock.now_ms();
    let plan = r.plan.as_ref();
    let why = match &r.life {
        Life::Stopping { why } | Life::Stopped { why } => why.verdict().map(|(_, line)| line),
        Life::Gone { to } => Some(format!("runs on {to}")),
        Life::Saved { at } => Some(format!("saved in {}", at.display())),
        Life::AwaitingJob { .. } => Some("the VM is here, its job is not yet".into()),
        _ => None,
    };
    let batch = program_key(BATCH_STEP, 0, 0);
    VmView {
        job: r.job,
        user: r.user.name.clone(),
        uid: r.user.uid,
        node: r.node.clone(),
        domain: r.domain(),
        state: r.life.name().into(),
        image: r.spec.image.clone(),
        vcpus: plan.map_or(0, |p| p.vcpus),
        mem_mib: plan.map_or(0, |p| p.mem_mib),
        allocated_mib: r.allocation.as_ref().and_then(|a| a.mem_mib).unwrap_or(0),
        cores: r.allocation.as_ref().map(|a| a.cores.clone()).unwrap_or_default(),
        // Of one that is over nothing is here, and nothing is looked at.
        disk_bytes: plan
            .and_then(|p| p.overlay.as_ref())
            .filter(|_| !r.life.is_over_here())
            .map_or(0, |o| node.world.disks.used_bytes(o)),
        domain_type: plan.map(|p| p.domain_type.clone()).unwrap_or_default(),
        domain_type_why: node.domain_type_and_reason().1,
        started_at: r.up_ms.map(|ms| ms / 1000),
        ended_at: r.ended_ms.map(|ms| ms / 1000),
        run_seconds: r.up_ms.map_or(0, |up| r.ended_ms.unwrap_or(now).saturating_sub(up) / 1000),
        run: r.run,
        restarts: r.allocation.as_ref().and_then(|a| a.restarts),
        script_ended: r.programs.iter().any(|p| p.key == batch && p.ended.is_some()),
        mounts: plan.map_or_else(Vec::new, |p| p.directories.iter().map(ToString::to_string).collect()),
        network: plan
            .filter(|p| !p.network.is_none())
            .map_or_else(String::new, |p| p.network.word().to_owned()),
        verdict: (!r.life.is_over_here()).then(|| moving::verdict(node, r)),
        why,
        moves: r.moves.clone(),
    }
}
