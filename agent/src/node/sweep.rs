//! What nobody else removes: saves of jobs that were cancelled while no VM of theirs existed, completions that were not
//! asked for again, records of VMs that ended long ago. It looks at `shared_dir` as well. One thread, every half minute.
use std::{path::PathBuf, sync::Arc, time::Duration};

use crate::{node::Node, vm::saving};

const EVERY: Duration = Duration::from_secs(30);

/// Sweeps until the process ends.
pub fn run(node: &Arc<Node>) {
    loop {
        node.world.clock.sleep(EVERY);
        node.look_at_shared_dir();
        saves(node);
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
            saving::remove(&*node.world.files, &save.dir);
            node.saved_for_nobody(job);
        }
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
