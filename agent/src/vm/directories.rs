//! Directories of the host in a VM: chosen at its preparation ([`crate::core::directories`]), served by one virtiofsd each that runs as the
//! job's user ([`crate::effects::as_user`]), and compared before the VM goes to another node.
//!
//! ```text
//!  prepare: the user can enter each          start, import, restore: virtiofsd listens in the VM's run directory, then libvirt
//!  leave, save: mark each                    import, restore: is each marked here? else the VM does not come here
//!  end of the VM on a node: no virtiofsd of it is left
//! ```
use std::path::PathBuf;

use super::prepare::run_dir;
use crate::{
    accounts,
    config::Config,
    core::{
        Failure, Record,
        directories::{Directory, Mark, Wishes, choose},
    },
    effects::{AsUserError, DirectoryServer, Identity, World},
    hypervisor::SharedDirectory,
    node::Node,
};

impl From<AsUserError> for Failure {
    fn from(e: AsUserError) -> Self {
        match e {
            AsUserError::Directory { .. } => Self::Request(format!("a directory cannot be given to the guest: {e}")),
            AsUserError::Node { .. } => Self::Node(format!("directories cannot be given to the guest: {e}")),
        }
    }
}

/// Whose rights the VM's companions have.
pub(super) fn identity(record: &Record) -> Identity {
    Identity {
        uid: record.user.uid,
        gid: record.user.gid,
        groups: accounts::groups(&record.user),
    }
}

fn directories(record: &Record) -> &[Directory] {
    record.plan.as_ref().map_or(&[], |plan| &plan.directories)
}

fn socket(config: &Config, record: &Record, directory: &Directory) -> PathBuf {
    run_dir(config, &record.domain()).join(format!("{}.sock", directory.tag))
}

/// The directories of a VM that is being prepared; the user can enter them all. `workdir` is the user's word, and opened only with the
/// user's rights.
///
/// # Errors
/// [`Failure::Request`] names the one that cannot be given.
pub fn prepare(world: &World, config: &Config, record: &Record, workdir: Option<&str>) -> Result<Vec<Directory>, Failure> {
    let chosen = choose(&Wishes {
        site_home: config.files.home,
        site_workdir: config.files.workdir,
        allowed: &config.files.allow,
        home: &record.user.home,
        workdir,
        user: &record.spec.mounts,
        elsewhere: record.spec.workdir.is_some(),
    })
    .map_err(Failure::Request)?;
    if chosen.is_empty() {
        return Ok(chosen);
    }
    let who = identity(record);
    for directory in &chosen {
        world.as_user.look(&who, &directory.source)?;
    }
    Ok(chosen)
}

/// As the domain has them.
#[must_use]
pub fn devices(config: &Config, record: &Record) -> Vec<SharedDirectory> {
    let device = |directory: &Directory| SharedDirectory {
        tag: directory.tag.clone(),
        socket: socket(config, record, directory),
    };
    directories(record).iter().map(device).collect()
}

/// Starts what serves the VM's directories; its run directory is there. `restores`: the guest comes from a save.
///
/// # Errors
/// As [`prepare`]; what was started is ended with the VM.
pub fn serve(node: &Node, record: &Record, restores: bool) -> Result<(), Failure> {
    if directories(record).is_empty() {
        return Ok(());
    }
    let who = identity(record);
    for directory in directories(record) {
        node.world.as_user.serve(&DirectoryServer {
            who: who.clone(),
            program: node.config.files.virtiofsd.clone(),
            source: directory.source.clone(),
            readonly: directory.readonly,
            socket: socket(&node.config, record, directory),
            qemu_user: node.config.peer.qemu_user.clone(),
            notes: node.world.store.vm_dir(&record.domain()),
            restores,
        })?;
    }
    Ok(())
}

/// A directory of the VM whose server is among those that have ended: what the guest asks of it is never answered.
#[must_use]
pub fn lost(record: &Record, ended: &[String]) -> Option<PathBuf> {
    let lost = directories(record).iter().find(|d| ended.contains(&d.tag));
    lost.map(|d| d.source.clone())
}

/// What the servers of a VM's directories had complained of before something was tried.
#[derive(Debug)]
pub struct Before(usize);

/// To be called before a move or a save, for [`kept_by`] after it.
#[must_use]
pub fn before(world: &World, record: &Record) -> Before {
    Before(complaints(world, record).len())
}

fn complaints(world: &World, record: &Record) -> Vec<(String, String)> {
    if directories(record).is_empty() {
        return vec![];
    }
    let said = world.as_user.complaints(&world.store.vm_dir(&record.domain()));
    said.inspect_err(|e| log::warn!("job {}: {e}", record.job)).unwrap_or_default()
}

/// Files that the guest has open and that are deleted: they have no name by which the other side could open them. One line about them and
/// about what else the servers complained of meanwhile; nothing if they did not.
#[must_use]
pub fn kept_by(world: &World, record: &Record, before: &Before) -> Option<String> {
    let mut files = Vec::new();
    let mut others = Vec::new();
    for (tag, line) in complaints(world, record).into_iter().skip(before.0) {
        let Some(source) = directories(record).iter().find(|d| d.tag == tag).map(|d| &d.source) else {
            continue;
        };
        match deleted(&line) {
            Some(path) => files.push(source.join(path.trim_start_matches('/')).display().to_string()),
            None => others.push(format!("virtiofsd: {line}")),
        }
    }
    files.dedup();
    if !files.is_empty() {
        return Some(format!("open in the guest and deleted: {}", files.join(", ")));
    }
    others.pop()
}

/// The path below the directory, of `Inode 3: Failed to get path from /proc/self/fd: Inode deleted (/u/gone)`.
fn deleted(line: &str) -> Option<&str> {
    line.split_once("Inode deleted (")?.1.strip_suffix(')')
}

/// A later VM of the job has marks of its own, as it has saves of its own.
fn mark_name(record: &Record) -> String {
    format!("{}.{:x}", record.file_stem(), record.created_ms)
}

/// Marks the VM's directories, by which another node knows them; in their order.
///
/// # Errors
/// Which one cannot be looked at.
pub fn mark(node: &Node, record: &Record) -> Result<Vec<Mark>, String> {
    if directories(record).is_empty() {
        return Ok(vec![]);
    }
    let who = identity(record);
    // No secret: only the user could make such a file, and would deceive nobody else.
    let nonce = format!("{}-{}", node.name, node.world.clock.now_ms());
    let mut marks = Vec::new();
    for directory in directories(record) {
        match node.world.as_user.mark(&who, &directory.source, &mark_name(record), &nonce) {
            Ok(mark) => marks.push(mark),
            Err(e) => {
                unmark(node, record);
                return Err(e.to_string());
            }
        }
    }
    Ok(marks)
}

/// Removes the VM's marks. One that stays is a small hidden file of the user's own.
pub fn unmark(node: &Node, record: &Record) {
    if directories(record).is_empty() {
        return;
    }
    let who = identity(record);
    for directory in directories(record) {
        if let Err(e) = node.world.as_user.unmark(&who, &directory.source, &mark_name(record)) {
            log::warn!("job {}: a mark may stay in {e}", record.job);
        }
    }
}

/// Whether this node has the very directories that were marked.
///
/// # Errors
/// Which one is another one here, as a fragment.
pub fn same_here(node: &Node, record: &Record, marks: &[Mark]) -> Result<(), String> {
    let all = directories(record);
    if all.len() != marks.len() {
        return Err(format!("{} directories of the VM and {} marks of them", all.len(), marks.len()));
    }
    if all.is_empty() {
        return Ok(());
    }
    let who = identity(record);
    for (directory, mark) in all.iter().zip(marks) {
        match node.world.as_user.is_marked(&who, &directory.source, &mark_name(record), mark) {
            Ok(true) => {}
            Ok(false) => return Err(format!("{} on {} is another directory", directory.source.display(), node.name)),
            Err(e) => return Err(format!("on {} the guest's directory cannot be used: {e}", node.name)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deleted_file_is_read_from_what_virtiofsd_says() {
        let line = "Inode 3: Failed to get path from /proc/self/fd: Inode deleted (/u/gone (1))";
        assert_eq!(deleted(line), Some("/u/gone (1)"));
        assert_eq!(deleted("Migration failed"), None);
    }
}
