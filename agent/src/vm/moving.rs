//! What moves and ends of a VM do to the outside: domains, files, the other node.
use std::{
    collections::HashMap,
    fs,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    sync::Mutex,
};

use slurm_vm_api::query::MoveView;

use super::prepare;
use crate::{
    config::Config,
    core::{Life, Record},
    effects::World,
    node::Node,
};

/// A move as it was ordered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MoveOrder {
    /// Unique in the cluster.
    pub move_id: String,
    /// Destination node.
    pub to: String,
    /// Its address.
    pub address: String,
    /// `preemption`, `drain` or `asked`.
    pub cause: String,
    /// Unix milliseconds by which it must have left.
    pub deadline_ms: Option<u64>,
}

/// Moves of which this node is an end, by id.
#[derive(Debug, Default)]
pub struct OpenMoves {
    _arriving: Mutex<HashMap<String, u32>>,
}

/// Makes the directory of a VM's sockets, which QEMU's user must be able to enter.
///
/// # Errors
/// A fragment that names the directory.
pub fn make_run_dir(config: &Config, domain: &str) -> Result<(), String> {
    let dir = prepare::run_dir(config, domain);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(&dir)
        .and_then(|()| fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)))
        .map_err(|e| format!("cannot make {}: {e}", dir.display()))
}

/// Ends the domain, removes what belongs to the VM, and looks again.
///
/// # Errors
/// What stayed, as a fragment.
pub fn destroy(node: &Node, record: &Record) -> Result<(), String> {
    node.world.faults.pass("destroy.before")?;
    let domain = record.domain();
    node.world.hypervisor.destroy(&domain).map_err(|e| e.to_string())?;
    // Trust no return code: is it really gone?
    if node.world.hypervisor.info(&domain).map_err(|e| e.to_string())?.is_some() {
        return Err(format!("{domain} is still there after it was destroyed"));
    }
    if let Some(overlay) = record.plan.as_ref().and_then(|p| p.overlay.as_ref()) {
        node.world.disks.remove(overlay).map_err(|e| e.to_string())?;
    }
    remove_run_dir(&node.config, &domain);
    node.world.faults.pass("destroy.after")
}

/// Removes what belongs to the VM on this node while it lives elsewhere: a shared overlay stays.
pub fn clear_here(node: &Node, record: &Record) {
    if let Some(plan) = record.plan.as_ref().filter(|p| !p.overlay_shared && !matches!(record.life, Life::Saved { .. }))
        && let Some(overlay) = &plan.overlay
        && let Err(e) = node.world.disks.remove(overlay)
    {
        log::warn!("job {}: {e}", record.job);
    }
    remove_run_dir(&node.config, &record.domain());
}

fn remove_run_dir(config: &Config, domain: &str) {
    let dir = prepare::run_dir(config, domain);
    if let Err(e) = fs::remove_dir_all(&dir)
        && e.kind() != std::io::ErrorKind::NotFound
    {
        log::warn!("{}: {e}", dir.display());
    }
}

/// One line on how the move or save that is under way goes.
#[must_use]
pub fn progress_line(world: &World, domain: &str, life: &Life) -> String {
    match world.hypervisor.job_progress(domain) {
        Ok(Some(p)) => format!(
            "{}: {} MiB done, {} MiB left, pass {}, {} MiB/s, dirty rate {} MiB/s",
            life.name(),
            p.bytes_done >> 20,
            p.bytes_left >> 20,
            p.iteration,
            p.bandwidth_bytes_s >> 20,
            p.dirty_rate_bytes_s >> 20
        ),
        _ => life.name().to_owned(),
    }
}

/// What a preemption would do to this VM, as far as this node can tell.
#[must_use]
pub fn verdict(_node: &Node, _record: &Record) -> String {
    "requeue".into()
}

/// The save of a job, when one waits on shared storage.
#[must_use]
pub fn find_save(_node: &Node, _job: u32, _uid: u32) -> Option<Record> {
    None
}

/// Asks the destination to prepare.
///
/// # Errors
/// Why it cannot take the VM.
pub fn ask_destination(_node: &Node, _record: &Record, order: &MoveOrder) -> Result<(), String> {
    Err(format!("moves to {} are not possible yet", order.to))
}

/// Copies the VM.
///
/// # Errors
/// Why the guest goes on here.
pub fn migrate(_node: &Node, _record: &Record, order: &MoveOrder) -> Result<MoveView, String> {
    Err(format!("moves to {} are not possible yet", order.to))
}

/// Where the guest runs after an unclear end of a move.
#[must_use]
pub fn runs_there(_node: &Node, _record: &Record, _order: Option<&MoveOrder>) -> bool {
    false
}

/// Tells the destination that the move was given up.
pub fn abandon(_node: &Node, _record: &Record, _order: Option<&MoveOrder>) {}

/// Passes offsets, history and kept output on to the destination.
///
/// # Errors
/// Why it did not confirm.
pub fn hand_over(_node: &Node, _record: &Record, _order: Option<&MoveOrder>, _spools: Vec<(u32, usize, u64, Vec<u8>)>) -> Result<(), String> {
    Ok(())
}

/// Writes memory, overlay and manifest of a paused VM.
///
/// # Errors
/// Why there is no save; the domain is then still there.
pub fn save(_node: &Node, _record: &Record, _spools: &[(u32, usize, u64, Vec<u8>)]) -> Result<MoveView, String> {
    Err("saves are not possible yet".into())
}

/// Brings a VM back from its save.
///
/// # Errors
/// Why it cannot be restored.
pub fn restore(_node: &Node, _record: &Record) -> Result<MoveView, String> {
    Err("saves are not possible yet".into())
}
