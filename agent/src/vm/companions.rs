//! The processes beside a VM's QEMU that run as the job's user: what serves its directories, what carries its network.
use std::path::PathBuf;

use super::{directories, network};
use crate::{
    core::{Failure, Record},
    effects::{AsUserError, World},
    node::Node,
};

/// Starts them; the VM's run directory is there, its domain is not. `restores`: the guest comes from a save.
///
/// # Errors
/// What cannot be given to the guest; what was started is ended with the VM.
pub fn start(node: &Node, record: &Record, restores: bool) -> Result<(), Failure> {
    directories::serve(node, record, restores)?;
    network::serve(node, record)
}

/// Looks after those of a running guest: a network that has ended is started anew. A directory whose server has ended cannot be given again:
/// it is returned, and the VM is to be ended.
#[must_use]
pub fn look_after(node: &Node, record: &Record) -> Option<PathBuf> {
    let plan = record.plan.as_ref()?;
    if plan.directories.is_empty() && plan.network.is_none() {
        return None;
    }
    let ended = node.world.as_user.ended_servers(&node.world.store.vm_dir(&record.domain()));
    let ended = ended.inspect_err(|e| log::warn!("job {}: {e}", record.job)).unwrap_or_default();
    if let Err(e) = network::mend(node, record, &ended) {
        log::error!("job {}: the guest has lost its network: {}", record.job, e.why());
    }
    directories::lost(record, &ended)
}

/// Ends what is left of a domain's.
///
/// # Errors
/// One that does not end.
pub fn end(world: &World, domain: &str) -> Result<(), AsUserError> {
    world.as_user.end_servers(&world.store.vm_dir(domain))
}
