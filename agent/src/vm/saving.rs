//! A VM saved to shared storage, and brought back wherever its job starts next.
//!
//! `SHARED/saves/DOMAIN.GENERATION/{memory,overlay.qcow2,manifest.json}`, the manifest last: without it there is no
//! save. A restore never writes into the save: it puts a fresh qcow2 layer over the saved overlay, restores paused,
//! renames the manifest (from then on the save is only a backing file) and lets the guest run. Leave to restore comes
//! from Slurm, which starts the job here, not from what a network file system shows; QEMU's image locks stay on.
//! All saves of a VM are removed when the VM ends.
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant,
};

use serde::{Deserialize, Serialize};
use slurm_vm_api::query::MoveView;

use super::{moving::make_run_dir, prepare, private, programs::Kept};
use crate::{
    core::{Life, Record, record::domain_name},
    effects::{store::write_durably, trusted::Distrust},
    hypervisor::{Disk, DiskCache, DiskFormat, SaveFormat, repoint},
    node::Node,
};

/// What a save consists of.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    v: u32,
    record: Record,
    /// Backing files of the saved overlay, nearest first, with their formats.
    chain: Vec<(PathBuf, String)>,
    /// Kept output: program, stream, offset, bytes in hexadecimal.
    kept: Vec<(u32, usize, u64, String)>,
}

const MANIFEST: &str = "manifest.json";
/// The manifest of a save that a VM was restored from and now stands on.
const USED: &str = "manifest.used.json";

/// Directory of the next save of a VM; `None` without shared storage.
#[must_use]
pub fn directory(node: &Node, record: &Record) -> Option<PathBuf> {
    let shared = node.config.shared_dir.as_ref()?;
    Some(shared.join("saves").join(format!("{}.{}", record.domain(), record.generation)))
}

/// Whether a save can be promised now.
///
/// # Errors
/// What stands against it.
pub fn fits(node: &Node, record: &Record) -> Result<PathBuf, String> {
    let dir = directory(node, record).ok_or("there is no shared storage (shared_dir)")?;
    let shared = node.config.shared_dir.as_ref().ok_or("there is no shared storage (shared_dir)")?;
    let need = node.world.hypervisor.memory_in_use(&record.domain()).map_err(|e| e.to_string())?;
    // What others could forge, no node restores.
    let saves = shared.join("saves");
    node.world.files.trusted(&saves).map_err(|e| e.to_string())?;
    let free = node.world.disks.free_bytes(shared).map_err(|e| e.to_string())?;
    if need + (64 << 20) > free {
        return Err(format!(
            "a save needs {} MiB and {} has {} MiB free",
            need >> 20,
            shared.display(),
            free >> 20
        ));
    }
    Ok(dir)
}

/// Writes memory, overlay and manifest of a paused VM. After success the domain is gone from here.
///
/// # Errors
/// Why there is no save; the domain is then still there, paused.
pub fn save(node: &Node, record: &Record, kept: &[Kept], cause: &str) -> Result<MoveView, String> {
    node.world.faults.pass("save.before")?;
    let Life::Saving { at: dir } = &record.life else {
        return Err("the VM is not being saved".into());
    };
    let begun = Instant::now();
    let _ = fs::remove_dir_all(dir);
    private::passage(dir, &node.config.peer.qemu_user).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
    let memory = dir.join("memory");
    let domain = record.domain();
    let overlay = record.plan.as_ref().and_then(|p| p.overlay.clone());
    if let Err(e) = node.world.hypervisor.save(&domain, &memory, SaveFormat::Sparse) {
        let _ = fs::remove_dir_all(dir);
        return Err(e.to_string());
    }
    // From here on the domain is gone: whatever fails now, it is brought back from its own memory.
    match complete(node, record, dir, begun, kept, cause) {
        Ok(done) => Ok(done),
        Err(why) => {
            if let Some(overlay) = overlay.filter(|o| !o.exists()) {
                let _ = fs::rename(dir.join("overlay.qcow2"), overlay);
            }
            let _ = fs::remove_file(dir.join(MANIFEST));
            match node.world.hypervisor.restore(&memory, None, true) {
                Ok(()) => {
                    let _ = fs::remove_dir_all(dir);
                    Err(why)
                }
                Err(e) => Err(format!(
                    "{why}; and the guest could not be brought back from {}: {e}",
                    memory.display()
                )),
            }
        }
    }
}

/// The part of a save after the memory: overlay, syncs, manifest last.
fn complete(node: &Node, record: &Record, dir: &Path, begun: Instant, kept: &[Kept], cause: &str) -> Result<MoveView, String> {
    let memory = dir.join("memory");
    let mut bytes = node.world.disks.used_bytes(&memory);
    let memory_bytes = bytes;
    let mut files = vec![memory];
    if let Some(overlay) = record.plan.as_ref().and_then(|p| p.overlay.as_ref()) {
        let saved = dir.join("overlay.qcow2");
        fs::rename(overlay, &saved).map_err(|e| format!("{}: {e}", overlay.display()))?;
        // libvirt has given it back to root; it is read again under a fresh layer.
        private::give(&saved, &node.config.peer.qemu_user).map_err(|e| format!("{}: {e}", saved.display()))?;
        bytes += node.world.disks.used_bytes(&saved);
        files.push(saved);
    }
    for file in &files {
        fs::File::open(file)
            .and_then(|f| f.sync_all())
            .map_err(|e| format!("{}: {e}", file.display()))?;
    }
    let mut saved = record.clone();
    saved.life = Life::Restoring { from: dir.to_path_buf() };
    saved.generation += 1;
    let done = MoveView {
        way: "save".into(),
        from: node.name.clone(),
        to: String::new(),
        at: node.world.clock.now_ms() / 1000,
        bytes,
        seconds: begun.elapsed().as_secs_f64(),
        downtime_ms: None,
        gap_ms: None,
        cause: cause.into(),
        outcome: "done".into(),
    };
    // An overlay is only renamed.
    node.saved_at(memory_bytes, begun.elapsed());
    saved.moves.push(done.clone());
    let image = node.config.images.get(&record.spec.image);
    let mut chain = Vec::new();
    if let Some(plan) = &record.plan {
        chain.extend(plan.layers.iter().map(|l| (l.clone(), "qcow2".to_owned())));
    }
    if let Some((disk, format)) = image.and_then(|i| i.disk.clone().map(|d| (d, i.disk_format.clone()))) {
        chain.push((disk, format));
    }
    let manifest = Manifest {
        v: 1,
        record: saved,
        chain,
        kept: kept.iter().map(|(p, s, o, b)| (*p, *s, *o, crate::text::hex(b))).collect(),
    };
    let json = serde_json::to_vec_pretty(&manifest).map_err(|e| e.to_string())?;
    write_durably(&dir.join(MANIFEST), &json).map_err(|e| format!("{}: {e}", dir.join(MANIFEST).display()))?;
    node.world.faults.pass("save.after")?;
    Ok(done)
}

/// The save of a job that waits on shared storage, as a record that is to be restored. Only what root wrote is believed, and
/// what others could have written is not looked at.
#[must_use]
pub fn find(node: &Node, job: u32, uid: u32) -> Option<Record> {
    let saves = node.config.shared_dir.as_ref()?.join("saves");
    let prefix = format!("{}.", domain_name(job, 0));
    let mut found: Option<Record> = None;
    for entry in fs::read_dir(&saves).ok()?.flatten() {
        if !entry.file_name().to_string_lossy().starts_with(&prefix) {
            continue;
        }
        let Some(m) = read(node, &entry.path().join(MANIFEST)) else {
            continue;
        };
        if m.record.job == job && m.record.user.uid == uid && found.as_ref().is_none_or(|f| f.generation < m.record.generation) {
            found = Some(m.record);
        }
    }
    found
}

fn read(node: &Node, path: &Path) -> Option<Manifest> {
    let bytes = node.world.files.read_trusted(path).inspect_err(Distrust::complain).ok()?;
    match serde_json::from_slice::<Manifest>(&bytes) {
        Ok(m) if m.v == 1 => Some(m),
        Ok(m) => {
            log::error!("{}: version {} of a save is not known here", path.display(), m.v);
            None
        }
        Err(e) => {
            log::error!("{}: {e}", path.display());
            None
        }
    }
}

/// Brings a VM back from its save; the guest runs when this returns.
///
/// # Errors
/// Why it cannot be restored; nothing of it runs then.
pub fn restore(node: &Arc<Node>, record: &Record) -> Result<(MoveView, Vec<Kept>), String> {
    node.world.faults.pass("restore.before")?;
    let Life::Restoring { from: dir } = &record.life else {
        return Err("the VM is not being restored".into());
    };
    let begun = Instant::now();
    // The job may have been cancelled, or requeued to another node, while its last run's VM was on its way out here.
    match node.job_here(record.job) {
        Some(true) => {}
        Some(false) => return Err(format!("Slurm does not run job {} here", record.job)),
        None => return Err(format!("Slurm does not say whether job {} runs here", record.job)),
    }
    let mine = crate::node::type_name(node.domain_type());
    if let Some(theirs) = record.plan.as_ref().map(|p| p.domain_type.as_str()).filter(|t| *t != mine) {
        return Err(format!("it was saved under {theirs}, this node runs guests with {mine}"));
    }
    let manifest = read(node, &dir.join(MANIFEST))
        .or_else(|| read(node, &dir.join(USED)))
        .ok_or_else(|| format!("{} has no manifest", dir.display()))?;
    let domain = record.domain();
    make_run_dir(&node.config, &domain)?;
    let memory = dir.join("memory");
    // Restored already, by an agent that was restarted before it could say so: not a second time.
    let here = node
        .world
        .hypervisor
        .info(&domain)
        .map_err(|e| e.to_string())?
        .is_some_and(|d| d.uuid == record.uuid());
    if !here {
        load(node, record, dir, &manifest)?;
    }
    let used = fs::rename(dir.join(MANIFEST), dir.join(USED)).or_else(|e| if dir.join(USED).exists() { Ok(()) } else { Err(e) });
    used.map_err(|e| format!("{}: {e}", dir.display()))?;
    node.world.hypervisor.resume(&domain).map_err(|e| e.to_string())?;
    // Memory is in the guest again; only the disk layers are still needed.
    let bytes = node.world.disks.used_bytes(&memory);
    let _ = fs::remove_file(&memory);
    node.world.faults.pass("restore.after")?;
    let kept = manifest
        .kept
        .iter()
        .filter_map(|(p, s, o, hex)| Some((*p, *s, *o, crate::text::unhex(hex)?)))
        .collect();
    let from = record.moves.last().map(|m| m.from.clone()).unwrap_or_default();
    Ok((
        MoveView {
            way: "restore".into(),
            from,
            to: node.name.clone(),
            at: node.world.clock.now_ms() / 1000,
            bytes,
            seconds: begun.elapsed().as_secs_f64(),
            downtime_ms: None,
            gap_ms: None,
            cause: record.moves.last().map(|m| m.cause.clone()).unwrap_or_default(),
            outcome: "done".into(),
        },
        kept,
    ))
}

/// Puts a fresh layer over the saved disk and starts the guest from its memory, paused.
fn load(node: &Node, record: &Record, dir: &Path, manifest: &Manifest) -> Result<(), String> {
    let memory = dir.join("memory");
    let saved = node.world.hypervisor.saved(&memory).map_err(|e| e.to_string())?;
    let mut disks = Vec::new();
    if let Some(overlay) = record.plan.as_ref().and_then(|p| p.overlay.clone()) {
        let base = dir.join("overlay.qcow2");
        node.world.disks.make_overlay(&overlay, &base, "qcow2").map_err(|e| e.to_string())?;
        let mut backing = vec![(base, DiskFormat::Qcow2)];
        backing.extend(
            manifest
                .chain
                .iter()
                .map(|(p, f)| (p.clone(), if f == "raw" { DiskFormat::Raw } else { DiskFormat::Qcow2 })),
        );
        disks.push(Disk {
            path: overlay,
            format: DiskFormat::Qcow2,
            backing,
            target: "vda".into(),
            readonly: false,
            serial: None,
            cache: DiskCache::default(),
        });
    }
    let xml = repoint(&saved.xml, &disks, Some(&prepare::metadata(record))).map_err(|e| e.to_string())?;
    node.world.hypervisor.restore(&memory, Some(&xml), true).map_err(|e| e.to_string())
}

/// Jobs whose VM this node has saved, with the job's user.
#[must_use]
pub fn saved_by(node: &Node) -> Vec<(u32, Option<u32>)> {
    let Some(saves) = node.config.shared_dir.as_ref().map(|s| s.join("saves")) else {
        return vec![];
    };
    let mut jobs = Vec::new();
    for entry in fs::read_dir(&saves).into_iter().flatten().flatten() {
        if let Some(m) = read(node, &entry.path().join(MANIFEST)).filter(|m| m.record.node == node.name) {
            jobs.push((m.record.job, Some(m.record.user.uid)));
        }
    }
    jobs
}

/// Whether a save waits for nobody any more: it was restored, or removed because its job has ended. Not when the storage does not answer.
#[must_use]
pub fn is_used(save: &Path) -> bool {
    let missing = |path: &Path| fs::metadata(path).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound);
    save.parent().is_some_and(Path::is_dir) && missing(&save.join(MANIFEST))
}

/// Removes the saves of a VM that has ended. One that nobody was restored from stays unless the job is over: a restore
/// that failed here may do better on another node.
pub fn remove_saves(node: &Node, domain: &str, job_is_over: bool) {
    let Some(saves) = node.config.shared_dir.as_ref().map(|s| s.join("saves")) else {
        return;
    };
    let prefix = format!("{domain}.");
    for entry in fs::read_dir(&saves).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(&prefix)
            && (job_is_over || !entry.path().join(MANIFEST).exists())
            && let Err(e) = fs::remove_dir_all(entry.path())
        {
            log::warn!("{}: {e}", entry.path().display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_save_is_used_when_its_manifest_is_not_there_and_the_storage_is() {
        let shared = tempfile::tempdir().unwrap();
        let saves = shared.path().join("saves");
        let save = saves.join("slurm-7-0.1");
        assert!(!is_used(&save), "storage that is not mounted says nothing");
        fs::create_dir_all(&save).unwrap();
        fs::write(save.join(MANIFEST), "{}").unwrap();
        assert!(!is_used(&save));
        fs::rename(save.join(MANIFEST), save.join(USED)).unwrap();
        assert!(is_used(&save));
        fs::remove_dir_all(&save).unwrap();
        assert!(is_used(&save));
    }
}
