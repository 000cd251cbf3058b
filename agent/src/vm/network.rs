//! The guest's network: passt, one process for each VM, which runs as the job's user. What the guest connects to is what a process of
//! that user on the node would reach, but for the node's own loopback.
//!
//! The guest has the same address on every node, so a move does not change it. Connections that are open end with the move: they are
//! passt's, and it stays with the node.
use std::path::PathBuf;

use slurm_vm_api::spec::Network;

use super::{directories::identity, prepare::run_dir};
use crate::{
    config::Config,
    core::{Failure, Record},
    effects::NetworkServer,
    hypervisor::UserInterface,
    node::Node,
};

/// Name of the server's socket, without the ending.
const SERVER: &str = "slurm-vm-net";

/// What a VM gets: its user's word, else the site's.
#[must_use]
pub fn choose(config: &Config, record: &Record) -> Network {
    record.spec.net.unwrap_or(config.network.default)
}

fn has_one(record: &Record) -> bool {
    record.plan.as_ref().is_some_and(|plan| plan.network == Network::User)
}

fn socket(config: &Config, record: &Record) -> PathBuf {
    run_dir(config, &record.domain()).join(format!("{SERVER}.sock"))
}

/// As the domain has it.
#[must_use]
pub fn devices(config: &Config, record: &Record) -> Vec<UserInterface> {
    let interface = || {
        let [a, b, c, ..] = *record.uuid().as_bytes();
        UserInterface {
            // QEMU's prefix, and what no other VM has.
            mac: format!("52:54:00:{a:02x}:{b:02x}:{c:02x}"),
            socket: socket(config, record),
        }
    };
    has_one(record).then(interface).into_iter().collect()
}

/// Starts a passt anew if it is among those that have ended while the guest runs: it ends when it has handed its state over at the end of a
/// move, also if that move then fails. QEMU connects to the new one by itself; connections that were open are lost.
///
/// # Errors
/// As [`serve`].
pub(super) fn mend(node: &Node, record: &Record, ended: &[String]) -> Result<(), Failure> {
    if !ended.iter().any(|name| name == SERVER) {
        return Ok(());
    }
    log::info!("job {}: the guest's network is started anew", record.job);
    serve(node, record)
}

/// Starts a passt for the domain that is about to start.
///
/// # Errors
/// [`Failure::Node`]
pub fn serve(node: &Node, record: &Record) -> Result<(), Failure> {
    if !has_one(record) {
        return Ok(());
    }
    let served = node.world.as_user.serve_network(&NetworkServer {
        who: identity(record),
        program: node.config.network.passt.clone(),
        socket: socket(&node.config, record),
        qemu_user: node.config.peer.qemu_user.clone(),
        notes: node.world.store.vm_dir(&record.domain()),
    });
    served.map_err(|e| Failure::Node(format!("the guest cannot be given a network: {e}")))
}
