//! The start of a VM's domain.
use super::{companions, moving, prepare};
use crate::{
    core::{Failure, Record},
    node::Node,
};

/// Run of the job that a domain of ours belongs to.
fn run_of(node: &Node, domain: &str) -> Option<u64> {
    Some(node.world.hypervisor.info(domain).ok()??.metadata.run)
}

/// Starts the domain of a VM that is prepared. One that an agent before us has started for this very run is taken for ours.
///
/// # Errors
/// Why it does not run.
pub fn domain(node: &Node, record: &Record) -> Result<(), Failure> {
    let fault = |e: String| Failure::Node(e);
    let mut spec = prepare::domain_spec(&node.config, &node.world, record)
        .ok_or_else(|| Failure::Node(format!("domain {} has no plan", record.domain())))?;
    moving::make_run_dir(&*node.world.files, &node.config, &record.domain()).map_err(fault)?;
    if spec.has_companions() {
        // They are connected to it: starting them anew would cut it off.
        if run_of(node, &spec.name) == Some(record.run) {
            return Ok(());
        }
        companions::start(node, record, false)?;
    }
    spec.hard_limit_mib = node.hard_limit_mib(record);
    let mut started = node.world.hypervisor.start(&spec, false);
    if spec.hard_limit_mib.is_some()
        && let Err(e) = &started
        && e.is_lack_of_cgroups()
    {
        node.no_hard_limit(&e.to_string());
        spec.hard_limit_mib = None;
        started = node.world.hypervisor.start(&spec, false);
    }
    match started {
        Ok(()) => {}
        // The agent was restarted between the call and its record: the domain of this very run is ours.
        Err(crate::hypervisor::HypervisorError::AlreadyExists { .. }) if run_of(node, &spec.name) == Some(record.run) => {}
        Err(crate::hypervisor::HypervisorError::AlreadyExists { .. }) if run_of(node, &spec.name).is_some() => {
            log::warn!("job {}: {} is left from an earlier run: ending it", record.job, spec.name);
            let again = node
                .world
                .hypervisor
                .destroy(&spec.name)
                .and_then(|_| node.world.hypervisor.start(&spec, false));
            again.map_err(|e| Failure::Node(format!("failed to start domain {}: {e}", spec.name)))?;
        }
        Err(e) => return Err(Failure::Node(format!("failed to start domain {}: {e}", spec.name))),
    }
    Ok(())
}
