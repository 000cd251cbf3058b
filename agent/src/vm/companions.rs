//! The processes beside a VM's QEMU that run as the job's user: what serves its directories, what carries its network.
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

/// Ends what is left of a domain's.
///
/// # Errors
/// One that does not end.
pub fn end(world: &World, domain: &str) -> Result<(), AsUserError> {
    world.as_user.end_servers(&world.store.vm_dir(domain))
}
