//! A live move as its two ends do it, and what ends of a VM do to the outside.
//!
//! ```text
//!  source                                             destination
//!  Leaving{Preparing}  ── Import{record, token} ───>  checks image, CPU model, room; opens its end; Arriving
//!  Leaving{Copying}    <─ Ready{disk} ──────────────
//!                      ══ libvirt, memory, disk ═══>  (relay of crate::peer, open only now)
//!                         libvirt's Finish: the guest runs there; the commit point
//!  Leaving{Finishing}  shims sync and report          AwaitingJob (libvirt's event)
//!                      ── Kept*, TakeOver{offsets} >  drains the guest's output from there on
//!  Gone                <─ Ok ───────────────────────
//! ```
//!
//! What can fail: the destination refuses or is not there (the guest goes on here); the copying fails or is aborted
//! (libvirt resumes it here); the end is unclear (libvirtd or the line died in the Finish phase: both sides' libvirt
//! are asked, [`find_guest`]); `TakeOver` does not arrive (the guest runs there, offsets come from the file itself); a word
//! arrives when a later run of the job is there (each names its move, [`crate::core::identity`]: it is refused).
use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use slurm_vm_api::query::MoveView;

use super::{
    Request, companions,
    converge::{self, Watch},
    directories, prepare,
    programs::Kept,
};
use crate::{
    cluster::{HostFacts, OpenEnd, PeerReply, PeerRequest},
    config::Config,
    core::{
        Event, Failure, HandOverError, Life, MoveIdentity, MoveQuestion, Plan, Record, Whereabouts,
        directories::Mark,
        locate::{Copy, Search},
    },
    effects::{Directory, Files, World},
    hypervisor::{Disk, DiskCache, DiskFormat, HypervisorError, MigrateParams, repoint},
    node::{Known, Node},
    text,
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

/// Moves of which this node is an end.
#[derive(Debug, Default)]
pub struct Moves {
    arriving: Mutex<HashMap<String, Arrival>>,
    leaving: Mutex<HashMap<u32, Departure>>,
}

#[derive(Debug)]
struct Arrival {
    job: u32,
    _end: Box<dyn OpenEnd>,
}

/// What the source keeps between the destination's yes and the copying.
#[derive(Debug, Clone)]
struct Departure {
    token: String,
    disk: Option<(PathBuf, PathBuf, String)>,
}

impl Moves {
    fn arriving(&self) -> MutexGuard<'_, HashMap<String, Arrival>> {
        self.arriving.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn leaving(&self) -> MutexGuard<'_, HashMap<u32, Departure>> {
        self.leaving.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Closes this node's end of a move.
    pub fn close_arrival(&self, move_id: &str) {
        self.arriving().remove(move_id);
    }
}

/// How long the destination may take to prepare.
const IMPORT_WITHIN: Duration = Duration::from_secs(15);
/// How long the destination may take to confirm.
const CONFIRM_WITHIN: Duration = Duration::from_secs(10);
/// Bytes of kept output in one message (hexadecimal doubles them).
const KEPT_PIECE: usize = 512 << 10;

/// Makes the directory of a VM's sockets, which is QEMU's user's alone.
///
/// # Errors
/// A fragment that names the directory.
pub fn make_run_dir(files: &dyn Files, config: &Config, domain: &str) -> Result<(), String> {
    let dir = prepare::run_dir(config, domain);
    let made = files.make_directory(&dir, Directory::Sockets(&config.peer.qemu_user));
    made.map_err(|e| format!("cannot make {}: {e}", dir.display()))
}

/// Ends the domain, removes what belongs to the VM, and looks again.
///
/// # Errors
/// What stayed, as a fragment.
pub fn destroy(node: &Node, record: &Record) -> Result<(), String> {
    let domain = record.domain();
    // First: what is still on its way here would come up after its end.
    close_moves_of(node, record.job);
    let was_there = node.world.hypervisor.destroy(&domain).map_err(|e| e.to_string())?;
    companions::end(&node.world, &domain).map_err(|e| e.to_string())?;
    // Trust no return code: is it really gone?
    if was_there && node.world.hypervisor.info(&domain).map_err(|e| e.to_string())?.is_some() {
        return Err(format!("{domain} is still there after it was destroyed"));
    }
    // An arriving VM that never came still stands on its source's shared overlay.
    let not_ours = matches!(
        &record.life,
        Life::Stopping {
            why: crate::core::End::NotArrived
        }
    );
    let overlay = match &record.plan {
        Some(plan) => plan.overlay.clone().filter(|_| !(not_ours && plan.overlay_shared)),
        // Made by a preparation that nobody heard the end of.
        None => Some(prepare::overlay_path(&node.config, &node.world.store.vm_dir(&domain), record).0),
    };
    if let Some(overlay) = overlay {
        node.world.disks.remove(&overlay).map_err(|e| e.to_string())?;
    }
    // What ends without having run here may have left its layers to a VM elsewhere: the sweep looks at them when the job has ended.
    let job_is_over = node.job_is_over(record.job);
    if !not_ours && (was_there || job_is_over) && record.has_been_saved() {
        super::saving::remove_saves(node, record, job_is_over);
    }
    // Who restores a save of it compares: its marks go with its saves.
    if !not_ours && !record.has_been_saved() {
        directories::unmark(node, record);
    }
    remove_run_dir(node, &domain);
    Ok(())
}

/// Removes what belongs to the VM on this node while it lives elsewhere: a shared overlay stays.
pub fn clear_here(node: &Node, record: &Record) {
    if let Some(plan) = record
        .plan
        .as_ref()
        .filter(|p| !p.overlay_shared && !matches!(record.life, Life::Saved { .. }))
        && let Some(overlay) = &plan.overlay
        && let Err(e) = node.world.disks.remove(overlay)
    {
        log::warn!("job {}: {e}", record.job);
    }
    close_moves_of(node, record.job);
    if let Err(e) = companions::end(&node.world, &record.domain()) {
        log::warn!("job {}: {e}", record.job);
    }
    remove_run_dir(node, &record.domain());
}

fn close_moves_of(node: &Node, job: u32) {
    node.moves.arriving().retain(|_, a| a.job != job);
    node.moves.leaving().remove(&job);
}

fn remove_run_dir(node: &Node, domain: &str) {
    let dir = prepare::run_dir(&node.config, domain);
    if let Err(e) = node.world.files.remove_all(&dir) {
        log::warn!("{}: {e}", dir.display());
    }
}

/// At the agent's start: removes the directories of sockets that no VM of the ledger has. A move does not outlive the agent
/// that carries it, so nothing under `move` is of use any more.
pub fn clear_left_sockets(world: &World, config: &Config, known: &[String]) {
    let files = &world.files;
    for (parent, keep) in [("move", &[][..]), ("vm", known)] {
        for dir in files.list(&config.run_dir.join(parent)).unwrap_or_default() {
            let is_known = keep.iter().any(|k| dir.ends_with(k));
            if is_known {
                continue;
            }
            let domain = dir.file_name().unwrap_or_default().to_string_lossy();
            if let Err(e) = companions::end(world, &domain) {
                log::warn!("{}: {e}", dir.display());
            }
            if let Err(e) = files.remove_all(&dir) {
                log::warn!("{}: {e}", dir.display());
            }
        }
    }
}

/// One line on how the move or save that is under way goes.
#[must_use]
pub fn progress_line(world: &World, domain: &str, life: &Life) -> String {
    match world.hypervisor.job_progress(domain) {
        Ok(Some(p)) => format!(
            "{}: {} MiB done, {} MiB left, pass {}, {} MiB/s, guest writes {} MiB/s{}",
            life.name(),
            p.bytes_done >> 20,
            p.bytes_left >> 20,
            p.iteration,
            p.bandwidth_bytes_s >> 20,
            p.dirty_rate_bytes_s >> 20,
            if p.throttle_percent > 0 {
                format!(", slowed by {} %", p.throttle_percent)
            } else {
                String::new()
            }
        ),
        _ => life.name().to_owned(),
    }
}

/// What a preemption would do to this VM, as far as this node can tell: the ways of `--vm-preempt` in order, with the
/// reason where one does not fit.
#[must_use]
pub fn verdict(node: &Node, record: &Record) -> String {
    use slurm_vm_api::spec::PreemptWay;
    let batch = record.programs.is_empty() || record.programs.iter().any(|p| p.key.starts_with("batch."));
    if !batch {
        return "cannot move: not a batch job".into();
    }
    let ways = ways(&node.config, record);
    let words: Vec<String> = ways
        .iter()
        .map(|way| match way {
            PreemptWay::Live => "live".to_owned(),
            PreemptWay::Save => save_word(node, record),
            other => other.word().to_owned(),
        })
        .collect();
    words.join(", else ")
}

/// Whether there is a place for a save now, by the guest's full size: a look costs one statvfs(2).
fn save_word(node: &Node, record: &Record) -> String {
    let Some(shared) = &node.config.shared_dir else {
        return "save (not here: no shared storage)".into();
    };
    let most = record.plan.as_ref().map_or(0, |p| p.mem_mib);
    match node.world.disks.free_bytes(shared) {
        Ok(free) if free >> 20 < most => format!(
            "save (if it fits: {} has {} MiB free, the guest up to {most} MiB)",
            shared.display(),
            free >> 20
        ),
        Ok(_) => "save".into(),
        Err(e) => format!("save (not now: {e})"),
    }
}

/// The ways of a job: its own, else the site's.
#[must_use]
pub fn ways(config: &Config, record: &Record) -> Vec<slurm_vm_api::spec::PreemptWay> {
    use slurm_vm_api::spec::PreemptWay;
    record
        .spec
        .preempt
        .clone()
        .or_else(|| PreemptWay::parse_list(&config.controller.preempt.join(",")).ok())
        .unwrap_or_else(|| PreemptWay::DEFAULT.to_vec())
}

fn facts(node: &Node, domain_type: &str) -> HostFacts {
    HostFacts {
        agent: env!("CARGO_PKG_VERSION").into(),
        domain_type: domain_type.into(),
        cpu_model: node.config.hypervisor.cpu_model.clone(),
        qemu: node.qemu_version(),
        storage: node.shared().storage,
    }
}

/// Source: asks the destination to prepare.
///
/// # Errors
/// Why it cannot take the VM.
pub fn ask_destination(node: &Node, record: &Record, order: &MoveOrder) -> Result<(), String> {
    let out = node.moves.leaving().len();
    if out >= node.config.node.moves_out as usize {
        return Err(format!("{out} moves are leaving {} already (node.moves_out)", node.name));
    }
    let plan = record.plan.as_ref().ok_or("the VM has no plan")?;
    let copy_overlay = plan
        .overlay
        .as_ref()
        .filter(|_| !plan.overlay_shared)
        .map(|o| node.world.disks.used_bytes(o));
    let token = node.peers.token()?;
    let marks = directories::mark(node, record)?;
    let request = PeerRequest::Import {
        record: Box::new(record.clone()),
        token: token.clone(),
        copy_overlay,
        host: facts(node, &plan.domain_type),
        marks,
    };
    let reply = node.peers.request(&order.to, &order.address, &request, IMPORT_WITHIN);
    directories::unmark(node, record);
    match reply? {
        PeerReply::Ready { disk } => {
            node.moves.leaving().insert(record.job, Departure { token, disk });
            Ok(())
        }
        PeerReply::Refused(why) => Err(why),
        other => Err(format!("another answer than asked for: {other:?}")),
    }
}

/// Destination: checks and prepares. Answered with [`PeerReply::Ready`] or [`PeerReply::Refused`].
///
/// # Errors
/// Why the VM cannot come here.
pub fn import(
    node: &Arc<Node>,
    from: &str,
    mut record: Record,
    token: &str,
    copy_overlay: Option<u64>,
    host: &HostFacts,
    marks: &[Mark],
) -> Result<PeerReply, String> {
    let arriving = node.moves.arriving().len();
    if arriving >= node.config.node.moves_in as usize {
        return Err(format!("{arriving} moves are arriving already (node.moves_in)"));
    }
    if host.agent != env!("CARGO_PKG_VERSION") {
        return Err(format!("its agent is {}, the source's {}", env!("CARGO_PKG_VERSION"), host.agent));
    }
    let mine = facts(node, crate::node::type_name(node.domain_type()));
    if mine.domain_type != host.domain_type {
        return Err(format!(
            "it runs guests with {}, the source with {}",
            mine.domain_type, host.domain_type
        ));
    }
    if mine.cpu_model != host.cpu_model {
        return Err(format!(
            "its CPU model is `{}`, the source's `{}` (hypervisor.cpu_model)",
            mine.cpu_model, host.cpu_model
        ));
    }
    if older(&mine.qemu, &host.qemu) {
        return Err(format!("its QEMU {} is older than the source's {}", mine.qemu, host.qemu));
    }
    let Life::Leaving { by, .. } = record.life else {
        return Err(format!("the VM is {} at the source", record.life.name()));
    };
    let move_id = by.move_id.clone();
    record.life = Life::Arriving { from: from.into(), by };
    record.come_to(&node.name);
    let domain = record.domain();
    let plan = record.plan.as_mut().ok_or("the record has no plan")?;
    if (plan.overlay_shared || !plan.layers.is_empty()) && mine.storage != host.storage {
        return Err("its shared_dir is another storage than the source's: is it mounted?".into());
    }
    directories::same_here(node, &record, marks)?;
    let plan = record.plan.as_mut().ok_or("the record has no plan")?;
    same_seed(node, plan)?;
    let mut disk = None;
    if let (Some(overlay), Some(wanted)) = (plan.overlay.clone(), plan.base_sha256.clone()) {
        let (base, format) = base_by_digest(node, &wanted).ok_or_else(|| format!("no image here has the base disk {wanted}"))?;
        let overlay = if let Some(bytes) = copy_overlay {
            let (mine, _) = (node.world.store.vm_dir(&domain).join("overlay.qcow2"), ());
            let free = node.world.disks.free_bytes(&node.config.state_dir).map_err(|e| e.to_string())?;
            if bytes + (256 << 20) > free {
                return Err(format!("{} MiB are free for an overlay of {} MiB", free >> 20, bytes >> 20));
            }
            let files = &node.world.files;
            files
                .make_directory(&node.world.store.vm_dir(&domain), Directory::Root(0o711))
                .map_err(|e| e.to_string())?;
            let size = plan.disk_mib;
            node.world
                .disks
                .make_overlay(&mine, &base, &format, size)
                .map_err(|e| e.to_string())?;
            mine
        } else {
            if node.world.disks.used_bytes(&overlay) == 0 {
                return Err(format!(
                    "{} is not to be seen here: is shared_dir really shared?",
                    overlay.display()
                ));
            }
            overlay
        };
        plan.overlay = Some(overlay.clone());
        plan.overlay_shared = copy_overlay.is_none();
        disk = Some((overlay, base, format));
    }
    let libvirt = libvirt_socket(&node.config.hypervisor.uri);
    let prepared = make_run_dir(&*node.world.files, &node.config, &domain).and_then(|()| node.peers.admit(&move_id, token, from, libvirt));
    let end = prepared.inspect_err(|_| {
        // Of a VM of the job that is here already nothing is taken away.
        if node.owner(record.job).is_none() {
            clear_here(node, &record);
        }
    })?;
    let job = record.job;
    let by = match &record.life {
        Life::Arriving { by, .. } => by.clone(),
        other => return Err(format!("the VM is {} here", other.name())),
    };
    let served = record.clone();
    node.expect(record)?;
    // A guest that lands here without a record is ended by the agent's next start.
    let owner = node.owner(job).ok_or("its owner has ended")?;
    let recorded = node.ask(&owner, Request::Recorded);
    // Only now: servers of a VM that is here already are not to be touched.
    let ready = recorded
        .unwrap_or_else(|| Err("its owner does not answer".into()))
        .and_then(|()| companions::start(node, &served, false).map_err(Failure::why));
    if let Err(why) = ready {
        let _ = owner.send(Request::Core(Event::Abandoned { by }));
        return Err(why);
    }
    node.moves.arriving().insert(move_id, Arrival { job, _end: end });
    Ok(PeerReply::Ready { disk })
}

/// Whether this node has the seed disk that a VM was booted with; it is made if the helper here is the same.
///
/// # Errors
/// That it is not, as a fragment.
pub(super) fn same_seed(node: &Node, plan: &Plan) -> Result<(), String> {
    let Some(wanted) = &plan.seed else { return Ok(()) };
    let here = prepare::seed(&node.world, &node.config).map_err(|e| e.to_string())?;
    if here == *wanted || node.world.disks.readable(wanted).is_ok() {
        return Ok(());
    }
    Err(format!(
        "{} is not on {}: its guest helper is another one ({})",
        wanted.display(),
        node.name,
        node.config.node.guest_helper.display()
    ))
}

/// Is version `a` (`10.0.2`) older than `b` in its major number? Within one, QEMU's versioned machine types go both ways.
fn older(a: &str, b: &str) -> bool {
    let major = |v: &str| v.split('.').next().and_then(|m| m.parse::<u32>().ok());
    matches!((major(a), major(b)), (Some(a), Some(b)) if a < b)
}

pub(super) fn base_by_digest(node: &Node, sha256: &str) -> Option<(PathBuf, String)> {
    node.config.images.values().find_map(|image| {
        let disk = image.disk.as_ref()?;
        let base = node.world.disks.base(disk, &image.disk_format).ok()?;
        (base.sha256 == sha256).then(|| (disk.clone(), image.disk_format.clone()))
    })
}

/// Socket of the local libvirtd: named in the URI, else the system daemon's.
fn libvirt_socket(uri: &str) -> PathBuf {
    uri.split_once("socket=").map_or_else(
        || "/run/libvirt/libvirt-sock".into(),
        |(_, s)| s.split('&').next().unwrap_or(s).into(),
    )
}

/// Source: copies the VM; returns when the guest runs there, or goes on here.
///
/// # Errors
/// Why it did not move.
pub fn migrate(node: &Arc<Node>, record: &Record, order: &MoveOrder) -> Result<MoveView, String> {
    let departure = node
        .moves
        .leaving()
        .get(&record.job)
        .cloned()
        .ok_or("the destination's answer was lost")?;
    let plan = record.plan.as_ref().ok_or("the VM has no plan")?;
    let domain = record.domain();
    let relay = node.peers.open_relay(&order.move_id, &departure.token, &order.to, &order.address)?;
    let dir = relay.dir().display();
    let mut there = prepare::metadata(record);
    there.node.clone_from(&order.to);
    there.generation += 1;
    let mut disks = Vec::new();
    let copies = plan.overlay.is_some() && !plan.overlay_shared;
    if let Some((overlay, base, format)) = &departure.disk
        && (Some(overlay) != plan.overlay.as_ref() || copies)
    {
        let format = if format == "raw" { DiskFormat::Raw } else { DiskFormat::Qcow2 };
        disks.push(Disk {
            path: overlay.clone(),
            format: DiskFormat::Qcow2,
            backing: vec![(base.clone(), format)],
            target: "vda".into(),
            readonly: false,
            serial: None,
            cache: DiskCache::default(),
        });
    }
    let xml = node.world.hypervisor.live_xml(&domain).map_err(|e| e.to_string())?;
    let dest_xml = repoint(&xml, &disks, Some(&there)).map_err(|e| e.to_string())?;
    let limit = |v: u64| (v > 0).then_some(v);
    let params = MigrateParams {
        libvirt_uri: format!("qemu+unix:///system?socket={dir}/libvirt.sock"),
        migrate_uri: format!("unix://{dir}/migration.sock"),
        disks_uri: copies.then(|| format!("unix://{dir}/disk.sock")),
        copy_disks: if copies { vec!["vda".into()] } else { vec![] },
        dest_xml: Some(dest_xml),
        bandwidth_mib_s: limit(node.config.node.move_bandwidth_mib_s),
        max_downtime_ms: converge::first_downtime(node.config.node.move_downtime_ms),
        auto_converge: order.deadline_ms.is_some(),
        parallel_connections: None,
        paused: false,
    };
    let before = directories::before(&node.world, record);
    let watch = Watch::start(node, record, order.deadline_ms);
    let begun = node.world.clock.instant();
    let outcome = node.world.hypervisor.migrate(&domain, &params);
    let verdict = watch.end();
    match outcome {
        Ok(done) => Ok(MoveView {
            way: "live".into(),
            from: node.name.clone(),
            to: order.to.clone(),
            at: node.world.clock.now_ms() / 1000,
            bytes: relay.bulk_bytes().max(done.memory_bytes + done.disk_bytes),
            seconds: node.world.clock.since(begun).as_secs_f64(),
            downtime_ms: Some(done.downtime_ms),
            gap_ms: None,
            cause: order.cause.clone(),
            outcome: "done".into(),
        }),
        Err(e) => {
            // One that has lost a directory is ended at the next look.
            let _ = companions::look_after(node, record);
            Err(match e {
                HypervisorError::Aborted { .. } => verdict.unwrap_or_else(|| "it was cancelled".into()),
                e => verdict
                    .or_else(|| directories::kept_by(&node.world, record, &before))
                    .unwrap_or_else(|| e.to_string()),
            })
        }
    }
}

/// The address of the other end of a move. After a restart there is no order any more; a node's name is mostly an address
/// as well.
fn address(order: Option<&MoveOrder>, node: &str, by: &MoveIdentity) -> String {
    order
        .filter(|o| o.move_id == by.move_id)
        .map_or_else(|| node.to_owned(), |o| o.address.clone())
}

/// Asks libvirt here, then the other end ([`Search`]). Where nobody can say it now the core asks again in its own time.
#[must_use]
pub fn find_guest(node: &Node, record: &Record, order: Option<&MoveOrder>) -> Whereabouts {
    let Some(search) = Search::of(record) else {
        return Whereabouts::AtSource;
    };
    let (job, other) = (record.job, &search.other);
    let here = match copy_here(node, record) {
        Ok(here) => here,
        Err(e) => {
            log::warn!("job {job}: libvirt does not say whether it has the guest: {e}");
            return Whereabouts::Unknown;
        }
    };
    if let Some(found) = search.saw(here) {
        return found;
    }
    let request = PeerRequest::RunsHere {
        job,
        by: search.by.clone(),
        question: search.question,
    };
    let answer = match node
        .peers
        .request(other, &address(order, other, &search.by), &request, CONFIRM_WITHIN)
    {
        Ok(PeerReply::RunsHere(answer)) => Some(answer),
        Ok(said) => {
            log::info!("job {job}: it is not clear yet who has the guest; {other} says {said:?}");
            None
        }
        Err(e) => {
            log::warn!("job {job}: {other} does not say whether it has the guest: {e}");
            None
        }
    };
    search.heard(here, answer)
}

/// What libvirt here has of the VM.
fn copy_here(node: &Node, record: &Record) -> Result<Copy, HypervisorError> {
    let domain = record.domain();
    Ok(match node.world.hypervisor.info(&domain)? {
        None => Copy::None,
        Some(_) if node.world.hypervisor.job_progress(&domain).ok().flatten().is_some() => Copy::Busy,
        Some(info) if runs(&info) => Copy::Runs,
        Some(_) => Copy::Stands,
    })
}

fn runs(info: &crate::hypervisor::DomainInfo) -> bool {
    info.state == crate::hypervisor::DomainState::Running
}

/// Answers the other end of a move.
///
/// # Errors
/// Why it cannot be told yet; when libvirt does not say, that is no "no".
pub fn has_guest(node: &Node, job: u32, by: &MoveIdentity, question: MoveQuestion) -> Result<bool, String> {
    let silent = || format!("the owner of job {job}'s VM does not answer");
    let owner = match node.known(job) {
        Some(Known::Live(owner)) => owner,
        Some(Known::Over(record)) => return question.answer(&record, by, false),
        None => return Ok(question.answer_without_record()),
    };
    let record = node.ask(&owner, Request::Record).ok_or_else(silent)?;
    let info = node.world.hypervisor.info(&record.domain()).map_err(|e| e.to_string())?;
    let asked = |reply| Request::Asked {
        by: by.clone(),
        question,
        runs: info.is_some_and(|i| runs(&i)),
        reply,
    };
    node.ask(&owner, asked).ok_or_else(silent)?
}

/// Source: tells the destination that the move was given up.
pub fn abandon(node: &Node, job: u32, to: &str, by: MoveIdentity, order: Option<&MoveOrder>) {
    node.moves.leaving().remove(&job);
    let address = address(order, to, &by);
    if let Err(e) = node.peers.request(to, &address, &PeerRequest::Abandon { job, by }, CONFIRM_WITHIN) {
        log::warn!("job {job}: {to} was not told that the move is off: {e}");
    }
}

/// Source: passes offsets, history and kept output on to the destination.
///
/// # Errors
/// Why it did not confirm, and whether it ever will.
pub fn hand_over(node: &Node, record: &Record, order: Option<&MoveOrder>, kept: &[Kept]) -> Result<(), HandOverError> {
    node.moves.leaving().remove(&record.job);
    let Life::Leaving { to, by, .. } = &record.life else {
        return Err(HandOverError::NotNow(format!("the VM is {}", record.life.name())));
    };
    let address = address(order, to, by);
    let deadline = node.world.clock.instant() + Duration::from_secs(30);
    let ask = |request: &PeerRequest| loop {
        match node.peers.request(to, &address, request, CONFIRM_WITHIN) {
            Ok(PeerReply::Ok) => return Ok(()),
            Ok(PeerReply::NotThisMove(why)) => return Err(HandOverError::NotThisMove(why)),
            Ok(other) => return Err(HandOverError::NotNow(format!("{to}: {other:?}"))),
            Err(e) if node.world.clock.instant() > deadline => return Err(HandOverError::NotNow(e)),
            Err(e) => {
                log::warn!("job {}: {to}: {e}; trying again", record.job);
                node.world.clock.sleep(Duration::from_millis(500));
            }
        }
    };
    for (program, stream, offset, bytes) in kept {
        for (i, piece) in bytes.chunks(KEPT_PIECE).enumerate() {
            ask(&PeerRequest::Kept {
                job: record.job,
                by: by.clone(),
                program: *program,
                stream: *stream,
                offset: offset + (i * KEPT_PIECE) as u64,
                hex: text::hex(piece),
            })?;
        }
    }
    ask(&PeerRequest::TakeOver {
        job: record.job,
        by: by.clone(),
        programs: record.programs.clone(),
        moves: record.moves.clone(),
    })?;
    Ok(())
}
