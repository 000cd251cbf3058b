//! What nobody else removes: saves of jobs that were cancelled while no VM of theirs existed, overlays whose move lost both ends, completions that were not
//! asked for again, records of VMs that ended long ago. It looks at `shared_dir` as well. One thread, every half minute.
use std::{path::PathBuf, sync::Arc, time::Duration};

use crate::{
    node::Node,
    vm::{prepare, saving},
};

const EVERY: Duration = Duration::from_secs(30);
/// So many seconds after its end nothing uses what a job has left.
const LONG_S: i64 = 600;

/// Sweeps until the process ends.
pub fn run(node: &Arc<Node>) {
    loop {
        node.world.clock.sleep(EVERY);
        node.look_at_shared_dir();
        node.look_after_companions();
        saves(node);
        overlays(node, |job| node.owner(job).is_some());
        for (job, at) in node.saved() {
            if saving::is_used(&*node.world.files, &at) {
                node.saved_for_nobody(job);
            }
        }
        for (job, path) in completions(node) {
            if is_over(node, job, None) {
                let _ = node.world.files.remove(&path);
            }
        }
        node.forget_old();
    }
}

/// Removes the saves that this node has made of jobs that are over.
pub fn saves(node: &Node) {
    for save in saving::made_by(node) {
        let job = save.job;
        if is_over(node, job, save.uid) {
            log::info!("job {job} has ended: removing its save {}", save.dir.display());
            saving::remove(node, &save.dir);
            node.saved_for_nobody(job);
        }
    }
}

/// Removes overlays that this node has made for jobs that ended long ago: both ends of a move may have been lost before they knew whose
/// it is. `has_vm`: the node has a VM of the job. One that another node cannot end yet may still be using it, hence the time.
pub fn overlays(node: &Node, has_vm: impl Fn(u32) -> bool) {
    for (job, overlay) in prepare::overlays_made_by(node) {
        if !has_vm(job) && has_long_been_over(node, job) {
            log::info!("job {job} has ended: removing {}", overlay.display());
            if let Err(e) = node.world.disks.remove(&overlay) {
                log::warn!("job {job}: {e}");
            }
        }
    }
}

/// Slurm has forgotten the job, or says that it ended [`LONG_S`] ago.
fn has_long_been_over(node: &Node, job: u32) -> bool {
    let now_s = i64::try_from(node.world.clock.now_ms() / 1000).unwrap_or(i64::MAX);
    match node.world.slurm.job(job) {
        Ok(Some(info)) => info.brief.state.is_finished() && info.brief.end_time.is_some_and(|end| end + LONG_S < now_s),
        Ok(None) => true,
        Err(_) => false,
    }
}

/// Slurm says clearly that the job will not run again; when it does not answer, nothing is removed.
fn is_over(node: &Node, job: u32, uid: Option<u32>) -> bool {
    match node.world.slurm.job(job) {
        Ok(Some(info)) => info.brief.state.is_finished() || uid.is_some_and(|u| u != info.brief.uid),
        Ok(None) => true,
        Err(_) => false,
    }
}

fn completions(node: &Node) -> Vec<(u32, PathBuf)> {
    let Some(dir) = node.completion_path(0).parent().map(PathBuf::from) else {
        return vec![];
    };
    let found = node.world.files.list(&dir).unwrap_or_default();
    found
        .into_iter()
        .filter_map(|path| Some((path.file_stem()?.to_str()?.parse().ok()?, path)))
        .collect()
}
