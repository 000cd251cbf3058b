//! A VM saved to shared storage, and brought back wherever its job starts next.
//!
//! `SHARED/saves/DOMAIN.CLUSTER.GENERATION.BIRTH.NODE/{memory,overlay.qcow2,manifest.json}`, the manifest last: without it there is no
//! save. BIRTH is when the VM began ([`Record::created_ms`], hexadecimal): a later VM of the same job, or of another job that was
//! given the same number, has saves of its own, and so has another cluster's ([`Record::file_stem`]). NODE has made it, and looks after it until its job has ended.
//!
//! A restore never writes into the save: it claims it ([`claim`]), puts a fresh qcow2 layer over the saved overlay, restores paused,
//! marks the save as used (from then on it is only a backing file) and lets the guest run. If it fails before the guest has run, or
//! the job has left meanwhile, the claim is given back and the save waits on. Leave to restore comes from Slurm, which starts the job
//! here, not from what a network file system shows; QEMU's image locks stay on. What a save is of must be what is restored: this
//! cluster, this job in a later run than the one that was saved, and the very base image.
//! The saves of a VM are removed when it ends where it ran, or when its job has ended.
mod claim;
mod error;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use slurm_vm_api::query::MoveView;

use claim::{Claim, Stand, Taken};
pub use error::SaveError;

use super::{
    companions, directories,
    moving::{make_run_dir, same_seed},
    prepare,
    programs::Kept,
};
use crate::{
    core::{Life, Record, directories::Mark, record::file_stem, registry::job_of},
    effects::{Directory, Files, trusted::Distrust},
    hypervisor::{Disk, DiskCache, DiskFormat, DomainState, SaveFormat, repoint},
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
    /// By which the node that restores it knows the directories of the host that the guest sees, in the record's order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    marks: Vec<Mark>,
}

/// Why a VM was not restored; nothing of it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotRestored {
    /// As a fragment.
    pub why: String,
    /// The job has left, or is leaving: that is nobody's fault, and the save waits for its next run.
    pub job_left: bool,
}

impl From<SaveError> for NotRestored {
    fn from(why: SaveError) -> Self {
        Self {
            why: why.to_string(),
            job_left: false,
        }
    }
}

/// Directory of the next save of a VM; `None` without shared storage.
#[must_use]
pub fn directory(node: &Node, record: &Record) -> Option<PathBuf> {
    let shared = node.config.shared_dir.as_ref()?;
    let name = format!("{}.{}.{}.{}", record.file_stem(), record.generation, birth(record), node.name);
    Some(shared.join("saves").join(name))
}

fn birth(record: &Record) -> String {
    format!("{:x}", record.created_ms)
}

/// A save's directory, and what its name says.
#[derive(Debug)]
struct Named {
    dir: PathBuf,
    job: u32,
    birth: String,
    node: String,
}

impl Named {
    /// `None` for what is another cluster's, or no save.
    fn parse(dir: PathBuf, cluster: &str) -> Option<Self> {
        let name = dir.file_name()?.to_str()?;
        let job = job_of(name)?;
        let rest = name.strip_prefix(&file_stem(cluster, job, 0))?.strip_prefix('.')?;
        let mut parts = rest.splitn(3, '.').map(str::to_owned);
        let (_generation, birth, node) = (parts.next()?, parts.next()?, parts.next()?);
        Some(Self { dir, job, birth, node })
    }
}

/// All saves of this cluster on shared storage, whole or not.
fn all(node: &Node) -> Vec<Named> {
    listed(node).inspect_err(|e| log::warn!("{e}")).unwrap_or_default()
}

fn listed(node: &Node) -> Result<Vec<Named>, SaveError> {
    let Some(saves) = node.config.shared_dir.as_ref().map(|s| s.join("saves")) else {
        return Ok(vec![]);
    };
    match node.world.files.list(&saves) {
        Ok(all) => Ok(all.into_iter().filter_map(|dir| Named::parse(dir, &node.config.cluster)).collect()),
        // Nothing has been saved yet.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(vec![]),
        Err(e) => Err(SaveError::file(saves)(e)),
    }
}

/// Whether a save can be promised now.
///
/// # Errors
/// What stands against it.
pub fn fits(node: &Node, record: &Record) -> Result<PathBuf, SaveError> {
    let dir = directory(node, record).ok_or(SaveError::NoSharedDir)?;
    let shared = node.config.shared_dir.as_ref().ok_or(SaveError::NoSharedDir)?;
    let need = node.world.hypervisor.memory_in_use(&record.domain())?;
    // What others could forge, no node restores.
    let saves = shared.join("saves");
    node.world.files.trusted(&saves)?;
    let free = node.world.disks.free_bytes(shared)?;
    if need + (64 << 20) > free {
        return Err(SaveError::NoRoom {
            need_mib: need >> 20,
            free_mib: free >> 20,
            dir: shared.clone(),
        });
    }
    Ok(dir)
}

/// Writes memory, overlay and manifest of a paused VM. After success the domain is gone from here.
///
/// # Errors
/// Why there is no save; the domain is then still there, paused.
pub fn save(node: &Node, record: &Record, kept: &[Kept], cause: &str) -> Result<MoveView, SaveError> {
    let Life::Saving { at: dir } = &record.life else {
        return Err(SaveError::NotSaving);
    };
    let begun = node.world.clock.instant();
    let files = &node.world.files;
    let _ = files.remove_all(dir);
    files
        .make_directory(dir, Directory::Passage(&node.config.peer.qemu_user))
        .map_err(SaveError::file(dir))?;
    let memory = dir.join("memory");
    let domain = record.domain();
    let overlay = record.plan.as_ref().and_then(|p| p.overlay.clone());
    let marks = directories::mark(node, record).map_err(SaveError::Unfit)?;
    let before = directories::before(&node.world, record);
    if let Err(e) = node.world.hypervisor.save(&domain, &memory, SaveFormat::Sparse) {
        let _ = files.remove_all(dir);
        directories::unmark(node, record);
        return Err(e.into());
    }
    if let Some(lost) = directories::kept_by(&node.world, record, &before) {
        let line = format!("the guest gets an error (EIO) from what cannot be brought back: {lost}");
        node.world.store.journal(&domain, node.world.clock.now_ms(), &line);
    }
    // From here on the domain is gone: whatever fails now, it is brought back from its own memory.
    match complete(node, record, dir, begun, kept, &marks, cause) {
        Ok(done) => Ok(done),
        Err(why) => {
            directories::unmark(node, record);
            // They have ended with the QEMU that is gone.
            if let Err(e) = companions::start(node, record, true) {
                log::error!("job {}: {}", record.job, e.why());
            }
            if let Some(overlay) = overlay.filter(|o| !files.is_there(o)) {
                let _ = files.rename(&dir.join("overlay.qcow2"), &overlay);
            }
            let _ = files.remove(&dir.join(claim::MANIFEST));
            match node.world.hypervisor.restore(&memory, None, true) {
                Ok(()) => {
                    let _ = files.remove_all(dir);
                    Err(why)
                }
                Err(again) => Err(SaveError::Lost {
                    why: Box::new(why),
                    memory,
                    again,
                }),
            }
        }
    }
}

/// The part of a save after the memory: overlay, syncs, manifest last.
fn complete(
    node: &Node,
    record: &Record,
    dir: &Path,
    begun: Instant,
    kept: &[Kept],
    marks: &[Mark],
    cause: &str,
) -> Result<MoveView, SaveError> {
    let memory = dir.join("memory");
    let mut bytes = node.world.disks.used_bytes(&memory);
    let memory_bytes = bytes;
    let files = &node.world.files;
    let mut written = vec![memory];
    if let Some(overlay) = record.plan.as_ref().and_then(|p| p.overlay.as_ref()) {
        let saved = dir.join("overlay.qcow2");
        files.rename(overlay, &saved).map_err(SaveError::file(overlay))?;
        // libvirt has given it back to root; it is read again under a fresh layer.
        files.give(&saved, &node.config.peer.qemu_user).map_err(SaveError::file(&saved))?;
        bytes += node.world.disks.used_bytes(&saved);
        written.push(saved);
    }
    for file in &written {
        files.sync(file).map_err(SaveError::file(file))?;
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
        seconds: node.world.clock.since(begun).as_secs_f64(),
        downtime_ms: None,
        gap_ms: None,
        cause: cause.into(),
        outcome: "done".into(),
    };
    // An overlay is only renamed.
    node.saved_at(memory_bytes, node.world.clock.since(begun));
    saved.moves.push(done.clone());
    let mut chain = Vec::new();
    if let Some(plan) = &record.plan {
        chain.extend(plan.layers.iter().map(|l| (l.clone(), "qcow2".to_owned())));
    }
    chain.extend(base(node, record)?);
    let manifest = Manifest {
        v: 1,
        record: saved,
        chain,
        kept: kept.iter().map(|(p, s, o, b)| (*p, *s, *o, crate::text::hex(b))).collect(),
        marks: marks.to_vec(),
    };
    let json = serde_json::to_vec_pretty(&manifest).map_err(|e| SaveError::Unfit(e.to_string()))?;
    let manifest = dir.join(claim::MANIFEST);
    files.write_durably(&manifest, &json).map_err(SaveError::file(&manifest))?;
    Ok(done)
}

/// The base disk that a VM stands on, as this node has it; none for a VM without a disk.
///
/// # Errors
/// When the catalogue's image is another one by now: on another base the guest's disk would be damaged in silence.
fn base(node: &Node, record: &Record) -> Result<Option<(PathBuf, String)>, SaveError> {
    let Some(wanted) = record.plan.as_ref().and_then(|p| p.base_sha256.as_ref()) else {
        return Ok(None);
    };
    let found = super::moving::base_by_digest(node, wanted);
    found.map(Some).ok_or_else(|| SaveError::BaseReplaced {
        node: node.name.clone(),
        image: record.spec.image.clone(),
        sha256: wanted.clone(),
    })
}

/// How often shared storage is looked at for a save before it is said that it cannot be.
const LOOKS: u32 = 3;
/// The pause before it is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// The save of a job that waits on shared storage, as a record that is to be restored. Only what root wrote is believed, and
/// what others could have written is not looked at.
///
/// # Errors
/// When it cannot be known whether a save waits: a job that started over then would lose what it has done, and its save would
/// become the guest of a later run.
pub fn find(node: &Node, job: u32, uid: u32) -> Result<Option<Record>, SaveError> {
    let mut looks = 1;
    loop {
        match look_for(node, job, uid) {
            Err(why) if looks < LOOKS => {
                log::warn!("job {job}: looking for a save again: {why}");
                looks += 1;
                node.world.clock.sleep(LOOK_AGAIN);
            }
            done => return done,
        }
    }
}

fn look_for(node: &Node, job: u32, uid: u32) -> Result<Option<Record>, SaveError> {
    let mut found: Option<Record> = None;
    for Named { dir, .. } in listed(node)?.into_iter().filter(|s| s.job == job) {
        let manifest = match claim::stand(&*node.world.files, &dir) {
            Ok((Stand::Waits | Stand::Claimed(_), manifest)) => manifest,
            Ok((Stand::Used | Stand::None, _)) => continue,
            Err(e) => return Err(SaveError::file(dir)(e)),
        };
        let m = match node.world.files.read_trusted(&manifest) {
            Ok(bytes) => understood(&manifest, &bytes),
            // One that has just been renamed is found again by its new name.
            Err(e @ Distrust::Io { .. }) => return Err(e.into()),
            Err(e) => {
                e.complain();
                None
            }
        };
        let Some(m) = m else { continue };
        let is_its = m.record.job == job && m.record.user.uid == uid && m.record.cluster == node.config.cluster;
        if is_its && !is_of_another_job(node, &dir, &m.record) && found.as_ref().is_none_or(|f| f.generation < m.record.generation) {
            found = Some(m.record);
        }
    }
    Ok(found)
}

/// A slurmctld that was killed right after a submission gives the number out again; then the save of the one must not become the guest of
/// the other. Slurm counts the runs of a job, and a save is for a later run than the one that was saved.
fn is_of_another_job(node: &Node, save: &Path, record: &Record) -> bool {
    let saved_in = record.allocation.as_ref().and_then(|a| a.restarts);
    let now = node.world.slurm.job(record.job).ok().flatten().map(|info| info.brief.restarts);
    // Where Slurm does not answer the restore asks again.
    if !matches!((saved_in, now), (Some(saved), Some(now)) if now <= saved) {
        return false;
    }
    log::warn!(
        "job {}: {} is of another job that had this number: it is not used",
        record.job,
        save.display()
    );
    // For good: this job's own next run could be taken for the one that the save waits for.
    match claim::take(&*node.world.files, save, &node.name) {
        Ok(Taken::Claim(mut claim)) => {
            if let Err(e) = claim.mark_used(&*node.world.files) {
                log::error!("{}: {e}", save.display());
            }
        }
        Ok(Taken::Used) => {}
        Err(e) => log::error!("{}: {e}", save.display()),
    }
    true
}

fn read(node: &Node, path: &Path) -> Option<Manifest> {
    let bytes = node.world.files.read_trusted(path).inspect_err(Distrust::complain).ok()?;
    understood(path, &bytes)
}

fn understood(path: &Path, bytes: &[u8]) -> Option<Manifest> {
    match serde_json::from_slice::<Manifest>(bytes) {
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

/// Whether the job's present run may have this VM.
fn admit(node: &Node, record: &Record) -> Result<(), NotRestored> {
    let job = record.job;
    let left = |why: String| Err(NotRestored { why, job_left: true });
    let info = match node.world.slurm.job(job) {
        Ok(info) => info,
        Err(why) => return Err(SaveError::NoWordOfSlurm { job, why }.into()),
    };
    // The job may have been cancelled, or requeued to another node.
    let here = info.filter(|i| i.brief.state.is_on_nodes() && i.brief.nodes.contains(&node.name));
    let Some(info) = here else {
        return left(format!("Slurm does not run job {job} here"));
    };
    // A guest that runs for the moment until the job is requeued would have used up its save.
    if info.brief.in_grace() {
        return left(format!("job {job} is being preempted"));
    }
    let saved_in = record.allocation.as_ref().and_then(|a| a.restarts);
    if saved_in.is_some_and(|run| info.brief.restarts <= run) {
        return Err(SaveError::Unfit(format!("the save is of another job that had the number {job}")).into());
    }
    Ok(())
}

/// Brings a VM back from its save; the guest runs when this returns.
///
/// # Errors
/// Why it cannot be restored; nothing of it runs then.
pub fn restore(node: &Arc<Node>, record: &Record) -> Result<(MoveView, Vec<Kept>), NotRestored> {
    let Life::Restoring { from: dir } = &record.life else {
        return Err(SaveError::Unfit("the VM is not being restored".into()).into());
    };
    let begun = node.world.clock.instant();
    admit(node, record)?;
    let mine = crate::node::type_name(node.domain_type());
    if let Some(theirs) = record.plan.as_ref().map(|p| p.domain_type.as_str()).filter(|t| *t != mine) {
        return Err(SaveError::Unfit(format!("it was saved under {theirs}, this node runs guests with {mine}")).into());
    }
    let storage = |e: std::io::Error| SaveError::file(dir)(e);
    let files = &*node.world.files;
    let taken = claim::take(files, dir, &node.name).map_err(storage)?;
    let (_, manifest) = claim::stand(files, dir).map_err(storage)?;
    let domain = record.domain();
    // Loaded already, by an agent that was restarted before it could say so: not a second time.
    let here = node.world.hypervisor.info(&domain).map_err(SaveError::from);
    let here = here.map(|d| d.is_some_and(|d| d.uuid == record.uuid()));
    let manifest = read(node, &manifest).ok_or_else(|| SaveError::Unfit(format!("{} has no manifest", dir.display())));
    let manifest = match taken {
        Taken::Used => {
            if !here? {
                return Err(SaveError::Unfit(format!("{} was restored already", dir.display())).into());
            }
            node.world.hypervisor.resume(&domain).map_err(SaveError::from)?;
            manifest?
        }
        Taken::Claim(mut claim) => {
            let done = here.and_then(|here| Ok((here, manifest?)));
            let run = done.map_err(NotRestored::from).and_then(|(here, manifest)| {
                if !here {
                    directories::same_here(node, record, &manifest.marks).map_err(SaveError::Unfit)?;
                    if let Some(plan) = &record.plan {
                        same_seed(node, plan).map_err(SaveError::Unfit)?;
                    }
                    make_run_dir(files, &node.config, &domain).map_err(SaveError::Unfit)?;
                    companions::start(node, record, true).map_err(|e| SaveError::Unfit(e.why()))?;
                    load(node, record, dir, &manifest)?;
                }
                admit(node, record)?;
                claim.mark_used(files).map_err(storage)?;
                let_run(node, &domain)?;
                Ok(manifest)
            });
            run.inspect_err(|_| unload(node, record, &claim))?
        }
    };
    directories::unmark(node, record);
    // Memory is in the guest again; only the disk layers are still needed.
    let memory = dir.join("memory");
    let bytes = node.world.disks.used_bytes(&memory);
    let _ = files.remove(&memory);
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
            seconds: node.world.clock.since(begun).as_secs_f64(),
            downtime_ms: None,
            gap_ms: None,
            cause: record.moves.last().map(|m| m.cause.clone()).unwrap_or_default(),
            outcome: "done".into(),
        },
        kept,
    ))
}

/// Lets the loaded guest run. An answer that was lost is not taken for a refusal.
fn let_run(node: &Node, domain: &str) -> Result<(), SaveError> {
    let Err(e) = node.world.hypervisor.resume(domain) else {
        return Ok(());
    };
    match node.world.hypervisor.info(domain) {
        Ok(Some(d)) if d.state == DomainState::Running => Ok(()),
        _ => Err(e.into()),
    }
}

/// The restore has failed. The save waits on if it is certain that the guest has not run: its domain stands still, or was never made.
fn unload(node: &Node, record: &Record, claim: &Claim) {
    let (job, domain) = (record.job, record.domain());
    let never_ran = match node.world.hypervisor.info(&domain) {
        Ok(Some(d)) => d.state == DomainState::Paused && matches!(node.world.hypervisor.destroy(&domain), Ok(true)),
        // One that was let run may have ended at once.
        Ok(None) => !claim.is_marked(),
        Err(_) => false,
    };
    if never_ran && let Err(e) = companions::end(&node.world, &domain) {
        log::warn!("job {job}: {e}");
    }
    if !never_ran {
        log::error!("job {job}: it is not certain that the guest has not run: its save is not used again");
        return;
    }
    if let Some(overlay) = record.plan.as_ref().and_then(|p| p.overlay.as_ref())
        && let Err(e) = node.world.disks.remove(overlay)
    {
        log::warn!("job {job}: {e}");
    }
    if let Err(e) = claim.give_back(&*node.world.files) {
        log::error!("job {job}: its save cannot be given back: {e}");
    }
}

/// Puts a fresh layer over the saved disk and starts the guest from its memory, paused.
fn load(node: &Node, record: &Record, dir: &Path, manifest: &Manifest) -> Result<(), SaveError> {
    let memory = dir.join("memory");
    let saved = node.world.hypervisor.saved(&memory)?;
    let mut disks = Vec::new();
    if let Some(overlay) = record.plan.as_ref().and_then(|p| p.overlay.clone()) {
        let base = dir.join("overlay.qcow2");
        node.world.disks.make_overlay(&overlay, &base, "qcow2", None)?;
        let mut backing = vec![(base, DiskFormat::Qcow2)];
        // The last of the chain is the base image, which this node may have elsewhere.
        let mut chain = manifest.chain.clone();
        if let Some(image) = self::base(node, record)? {
            chain.pop();
            chain.push(image);
        }
        let format = |f: &str| if f == "raw" { DiskFormat::Raw } else { DiskFormat::Qcow2 };
        backing.extend(chain.into_iter().map(|(p, f)| (p, format(&f))));
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
    let xml = repoint(&saved.xml, &disks, Some(&prepare::metadata(record))).map_err(|e| SaveError::Unfit(e.to_string()))?;
    Ok(node.world.hypervisor.restore(&memory, Some(&xml), true)?)
}

/// A save that this node has made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// Its directory.
    pub dir: PathBuf,
    /// The job.
    pub job: u32,
    /// The job's user; unknown while it is not whole.
    pub uid: Option<u32>,
}

/// The saves that this node has made: used, waiting, and what those have left that were never whole.
#[must_use]
pub fn made_by(node: &Node) -> Vec<Made> {
    let mut made = Vec::new();
    for Named { dir, job, .. } in all(node).into_iter().filter(|s| s.node == node.name) {
        let Ok((stand, manifest)) = claim::stand(&*node.world.files, &dir) else {
            continue;
        };
        let whole = if stand == Stand::None { None } else { read(node, &manifest) };
        match (stand, whole) {
            (_, Some(m)) if m.record.cluster == node.config.cluster => {
                let uid = Some(m.record.user.uid);
                made.push(Made { dir, job, uid });
            }
            (Stand::None, None) => made.push(Made { dir, job, uid: None }),
            _ => {}
        }
    }
    made
}

/// Removes a save of a VM that nobody will bring back, and the VM's marks.
pub fn remove(node: &Node, dir: &Path) {
    let files = &*node.world.files;
    if let Ok((Stand::Waits | Stand::Claimed(_) | Stand::Used, manifest)) = claim::stand(files, dir)
        && let Some(m) = read(node, &manifest)
    {
        directories::unmark(node, &m.record);
    }
    if let Err(e) = files.remove_all(dir) {
        log::warn!("{}: {e}", dir.display());
    }
}

/// Whether a save waits for nobody any more: it was restored, or removed because its job has ended. Not when the storage does not answer.
#[must_use]
pub fn is_used(files: &dyn Files, save: &Path) -> bool {
    save.parent().is_some_and(|saves| files.is_there(saves)) && matches!(claim::stand(files, save), Ok((Stand::Used | Stand::None, _)))
}

/// Removes the saves of a VM that has ended here, and of no other VM of its job. One that nobody was restored from stays unless the job
/// is over: a restore that failed here may do better on another node.
pub fn remove_saves(node: &Node, record: &Record, job_is_over: bool) {
    let (files, birth) = (&*node.world.files, birth(record));
    for Named { dir, .. } in all(node).into_iter().filter(|s| s.job == record.job && s.birth == birth) {
        let waits = || !matches!(claim::stand(files, &dir), Ok((Stand::Used | Stand::None, _)));
        if job_is_over || !waits() {
            remove(node, &dir);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::effects::SystemFiles;

    #[test]
    fn a_save_is_used_when_its_manifest_is_not_there_and_the_storage_is() {
        let shared = tempfile::tempdir().unwrap();
        let saves = shared.path().join("saves");
        let save = saves.join("slurm-7-0.1.a.n1");
        assert!(!is_used(&SystemFiles, &save), "storage that is not mounted says nothing");
        fs::create_dir_all(&save).unwrap();
        fs::write(save.join(claim::MANIFEST), "{}").unwrap();
        assert!(!is_used(&SystemFiles, &save));
        let Taken::Claim(mut claimed) = claim::take(&SystemFiles, &save, "n1").unwrap() else {
            panic!("used")
        };
        assert!(!is_used(&SystemFiles, &save), "n1 may fail");
        claimed.mark_used(&SystemFiles).unwrap();
        assert!(is_used(&SystemFiles, &save));
        fs::remove_dir_all(&save).unwrap();
        assert!(is_used(&SystemFiles, &save));
    }
}
