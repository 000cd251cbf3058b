//! Where a VM goes: Slurm picks an idle node by making a reservation; only when there is none, a partly used one is
//! chosen by free CPUs, memory and partition.
use super::{Controller, health, moves::JobMove};
use crate::slurm::{JobInfo, NodeInfo, ReservationNodes, ReservationSpec};

/// No destination, and whether waiting for other moves might help.
#[derive(Debug)]
pub struct NoRoom {
    /// Why, as a fragment.
    pub text: String,
    /// Other moves hold what could be used.
    pub wait: bool,
}

/// Reserves a node for a job's VM and returns its name.
///
/// # Errors
/// [`NoRoom`]
pub fn reserve(c: &Controller, m: &JobMove, info: &JobInfo) -> Result<String, NoRoom> {
    if info.brief.nodes.len() > 1 {
        return Err(NoRoom {
            text: format!("the job has {} nodes, only jobs of one node can move", info.brief.nodes.len()),
            wait: false,
        });
    }
    let name = Controller::reservation(m.job);
    let slurm = &c.world.slurm;
    let partition = info.brief.partition.clone();
    let spec = |nodes: ReservationNodes, picks: bool| ReservationSpec {
        name: name.clone(),
        nodes,
        partition: picks.then(|| partition.clone()),
        features: picks.then(|| c.config.controller.feature.clone()),
        users: vec![m.user.clone()],
    };
    if !m.to_asked {
        match slurm.create_reservation(&spec(ReservationNodes::Count(1), true)) {
            Ok(made) => {
                if let Some(node) = made.nodes.first().filter(|n| **n != m.from && is_healthy(c, n)) {
                    return Ok(node.clone());
                }
                let _ = slurm.delete_reservation(&name);
            }
            Err(e) => log::debug!("job {}: no idle node: {e}", m.job),
        }
    }
    let held: Vec<String> = match slurm.reservations() {
        Ok(all) => all.into_iter().filter(|r| r.name != name).flat_map(|r| r.nodes).collect(),
        Err(e) => {
            return Err(NoRoom {
                text: e.to_string(),
                wait: true,
            });
        }
    };
    let nodes = slurm.nodes().map_err(|e| NoRoom {
        text: e.to_string(),
        wait: true,
    })?;
    let mut ours: Vec<&NodeInfo> = nodes
        .iter()
        .filter(|n| fits(c, &m.from, m.to.as_deref().filter(|_| m.to_asked), info, n))
        .collect();
    // The fullest that fits: idle nodes stay whole.
    ours.sort_by_key(|n| n.cpus_total - n.cpus_alloc.min(n.cpus_total));
    let busy = ours.iter().any(|n| held.contains(&n.name));
    for n in ours.iter().filter(|n| !held.contains(&n.name)) {
        match slurm.create_reservation(&spec(ReservationNodes::Named(vec![n.name.clone()]), false)) {
            Ok(_) => return Ok(n.name.clone()),
            Err(e) => log::info!("job {}: {} cannot be reserved: {e}", m.job, n.name),
        }
    }
    let sick = |to: &str| {
        Some(health::of(&c.cluster(), to))
            .filter(|h| !h.healthy)
            .map(|h| h.why.unwrap_or_default())
    };
    let text = match (&m.to, m.to_asked) {
        (Some(to), true) if nodes.iter().any(|n| n.name == *to) && sick(to).is_some() => {
            format!("{to} is not healthy: {}", sick(to).unwrap_or_default())
        }
        (Some(to), true) => format!("{to} has no room for the VM, or is not in partition {partition}"),
        _ => "no other node has room for the VM".to_owned(),
    };
    Err(NoRoom { text, wait: busy })
}

fn is_healthy(c: &Controller, node: &str) -> bool {
    health::of(&c.cluster(), node).healthy
}

/// Whether a node could take a job's VM from `from` now, and is the one that is `wanted`, if one is.
pub(super) fn fits(c: &Controller, from: &str, wanted: Option<&str>, info: &JobInfo, n: &NodeInfo) -> bool {
    let (cpus, mem) = info
        .allocs
        .first()
        .map_or((info.num_cpus, 0), |a| (u32::try_from(a.cpus.len()).unwrap_or(u32::MAX), a.mem_mib));
    n.name != from
        && wanted.is_none_or(|w| *w == n.name)
        && n.is_usable()
        && n.active_features.contains(&c.config.controller.feature)
        && n.partitions.contains(&info.brief.partition)
        && n.cpus_total.saturating_sub(n.cpus_alloc) >= cpus
        && n.mem_total_mib.saturating_sub(n.mem_alloc_mib) >= mem
        && is_healthy(c, &n.name)
}
