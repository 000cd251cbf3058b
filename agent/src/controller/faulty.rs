//! Jobs that met a broken node. The shim requeues its own job into the state SPECIAL_EXIT, held (a user can do that with
//! his own jobs). Slurm puts jobs into it, too, by RequeueExitHold: after their script has ended by itself, as the agent of their node
//! knows; those are left alone. Of the others the node is excluded and the job released, as soon as
//! there is a node that it can run on and that is well. After three such nodes in a row the job is made not requeueable
//! for its last try: should that meet a broken node too, Slurm refuses the shim's requeue, and the job ends with outcome
//! 125. Once its program runs it is requeueable again, and the count begins anew.
use std::time::{Duration, Instant};

use slurm_vm_api::query::VmView;

use super::{Controller, NodeStatus, STALE, health};
use crate::slurm::{JobBrief, JobState, JobUpdate};

/// Why a job is in the state SPECIAL_EXIT.
#[derive(Debug, PartialEq, Eq)]
enum Special {
    /// Its shim met a broken node.
    Fault,
    /// Its script ended, and Slurm holds it for that (RequeueExitHold).
    Ended,
    /// Its node may say in a moment.
    NotKnownYet,
}

/// Judges by what the agent of the job's last node has said since the job was first seen so, `for_` long ago. An agent that says nothing is
/// itself the fault.
fn judge(job: u32, last_run: Option<&(String, u32)>, status: Option<&NodeStatus>, since: Instant, for_: Duration) -> Special {
    let word = status.filter(|s| s.heard >= since);
    let of_this_run = |v: &&VmView| v.job == job && v.restarts.is_some() && v.restarts == last_run.map(|(_, restarts)| *restarts);
    match word {
        Some(s) if s.vms.iter().find(of_this_run).is_some_and(|v| v.script_ended) => Special::Ended,
        Some(_) => Special::Fault,
        None if for_ <= STALE => Special::NotKnownYet,
        None => Special::Fault,
    }
}

/// So many broken nodes in a row bring a job back into the queue.
const MOST_FAULTS: u32 = 3;

impl Controller {
    /// Sends each such job elsewhere.
    pub(super) fn retry_faulty(&self) {
        let feature = &self.config.controller.feature;
        let now = self.world.clock.instant();
        let (jobs, nodes) = {
            let cluster = self.cluster();
            let faulty: Vec<_> = cluster
                .jobs
                .iter()
                .filter(|j| {
                    j.state == JobState::SpecialExit && j.batch && j.features.as_ref().is_some_and(|f| f.contains(feature.as_str()))
                })
                .map(|j| {
                    let last = cluster.last_run.get(&j.id);
                    let status = last.and_then(|(host, _)| cluster.nodes.get(host)?.as_ref());
                    let since = cluster.special.get(&j.id).copied().unwrap_or(now);
                    let special = judge(j.id, last, status, since, now.duration_since(since));
                    (j.id, j.restarts, last.map(|(host, _)| host.clone()), special)
                })
                .collect();
            let nodes: Vec<(String, bool)> = cluster
                .slurm_nodes
                .keys()
                .map(|n| (n.clone(), health::of(&cluster, n, now).healthy))
                .collect();
            (faulty, nodes)
        };
        for (job, restarts, broken, special) in jobs {
            let notes = self.notes().of(job);
            if notes.not_a_fault == Some(restarts) || special == Special::NotKnownYet {
                continue;
            }
            if special == Special::Ended {
                log::info!("job {job}: its script has ended and Slurm holds it in SPECIAL_EXIT (RequeueExitHold): it is left so");
                self.notes().change(job, |n| n.not_a_fault = Some(restarts));
                continue;
            }
            let slurm = &self.world.slurm;
            let info = match slurm.job(job) {
                Ok(Some(info)) if info.brief.state == JobState::SpecialExit => info,
                Ok(_) => continue,
                Err(e) => {
                    log::warn!("job {job}: met a broken node, and Slurm cannot be asked about it: {e}");
                    continue;
                }
            };
            let users: Vec<String> = info.exclude_nodes.iter().filter(|n| !notes.excluded.contains(n)).cloned().collect();
            let want = usize::try_from(info.num_nodes).unwrap_or(usize::MAX);
            let Some(list) = excluded(broken.as_deref(), &users, &info.brief.req_nodes, want, &nodes) else {
                log::debug!("job {job}: waits for a node that is well");
                continue;
            };
            let faults = notes.faults + 1;
            let last_try = faults >= MOST_FAULTS;
            log::warn!(
                "job {job}: met a broken node{}, its {faults}. in a row; it is released {}{}",
                broken.map_or(String::new(), |n| format!(" ({n})")),
                if last_try { "for its last try" } else { "to try again" },
                if list.is_empty() {
                    String::new()
                } else {
                    format!(", not on {}", list.join(","))
                }
            );
            let ours = list.iter().filter(|n| !users.contains(n)).cloned().collect();
            // Before the job can start: what is not remembered would be taken for the user's own wish.
            self.notes().change(job, |n| {
                n.excluded = ours;
                n.last_try = last_try;
            });
            let update = JobUpdate {
                exclude_nodes: (list != info.exclude_nodes).then_some(list),
                start_now: true,
                requeue: last_try.then_some(false),
                ..JobUpdate::default()
            };
            match slurm.update_job(job, &update).and_then(|()| slurm.release(&[job])) {
                Ok(()) => self.notes().change(job, |n| n.faults = faults),
                Err(e) => log::error!("job {job}: cannot be sent elsewhere: {e}"),
            }
        }
    }

    /// Jobs whose program runs have met a node that is well.
    pub(super) fn settle_faulty(&self) {
        let all = self.notes().all();
        for (job, notes) in all {
            // By the word of the node on which Slurm has the job now, and not by an old one.
            let (runs, in_grace) = {
                let cluster = self.cluster();
                let brief = cluster.jobs.by_id(job).filter(|j| j.state.is_on_nodes());
                let host = brief.and_then(|j| j.batch_host.clone());
                let status = host.and_then(|h| cluster.nodes.get(&h).cloned().flatten());
                let runs = status
                    .filter(|s| self.world.clock.since(s.heard) <= STALE)
                    .is_some_and(|s| s.vms.iter().any(|v| v.job == job && v.state == "running"));
                (runs, brief.is_some_and(JobBrief::in_grace))
            };
            // A preemption is no fault of the node: Slurm must be able to requeue the job.
            let gives_back = notes.last_try && (runs || in_grace);
            if gives_back {
                let update = JobUpdate {
                    requeue: Some(true),
                    ..JobUpdate::default()
                };
                if let Err(e) = self.world.slurm.update_job(job, &update) {
                    log::warn!("job {job}: cannot be made requeueable again: {e}");
                    continue;
                }
                self.notes().change(job, |n| n.last_try = false);
            }
            if runs {
                self.notes().change(job, |n| n.faults = 0);
            }
        }
    }
}

/// The nodes to be excluded from the next attempt: the user's own and the broken one, if enough others are well. `None`
/// while no node that the job may use is well: it waits.
fn excluded(broken: Option<&str>, users: &[String], asked: &[String], want: usize, nodes: &[(String, bool)]) -> Option<Vec<String>> {
    let well: Vec<&str> = nodes
        .iter()
        .filter(|(n, is_well)| *is_well && !users.contains(n) && (asked.is_empty() || asked.contains(n)))
        .map(|(n, _)| n.as_str())
        .collect();
    if well.is_empty() {
        return None;
    }
    let mut list = users.to_vec();
    // After a restart of the controller it is not known where the job was: on one of the sick nodes.
    let broken: Vec<&str> = match broken {
        Some(node) => vec![node],
        None => nodes.iter().filter(|(_, is_well)| !is_well).map(|(n, _)| n.as_str()).collect(),
    };
    let others = well.iter().filter(|n| !broken.contains(n)).count();
    if others >= want.max(1) {
        // Slurm refuses a job that asks for a node and excludes it.
        let more = broken.iter().filter(|n| !asked.iter().chain(users).any(|m| m == *n));
        list.extend(more.map(|n| (*n).to_owned()));
    }
    Some(list)
}

#[cfg(test)]
mod tests {
    use super::excluded;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|n| (*n).to_owned()).collect()
    }

    fn nodes(well: &[&str], sick: &[&str]) -> Vec<(String, bool)> {
        let all = well.iter().map(|n| ((*n).to_owned(), true));
        all.chain(sick.iter().map(|n| ((*n).to_owned(), false))).collect()
    }

    #[test]
    fn the_broken_node_is_excluded_beside_the_users_own() {
        let all = nodes(&["n1", "n2", "n3"], &[]);
        assert_eq!(excluded(Some("n1"), &[], &[], 1, &all), Some(names(&["n1"])));
        assert_eq!(excluded(Some("n1"), &names(&["n2"]), &[], 1, &all), Some(names(&["n2", "n1"])));
        assert_eq!(
            excluded(Some("n1"), &names(&["n2", "n3"]), &[], 1, &all),
            Some(names(&["n2", "n3"]))
        );
        assert_eq!(
            excluded(Some("n1"), &[], &names(&["n1"]), 1, &all),
            Some(vec![]),
            "asked for by name"
        );
        assert_eq!(excluded(Some("n1"), &[], &[], 3, &all), Some(vec![]), "three of three");
        assert_eq!(excluded(None, &[], &[], 1, &all), Some(vec![]), "a controller that was restarted");
        assert_eq!(excluded(None, &[], &[], 1, &nodes(&["n1"], &["n2"])), Some(names(&["n2"])));
    }

    #[test]
    fn a_job_waits_until_a_node_that_it_may_use_is_well() {
        assert_eq!(excluded(Some("n1"), &[], &[], 1, &nodes(&[], &["n1", "n2"])), None);
        assert_eq!(excluded(Some("n1"), &names(&["n2"]), &[], 1, &nodes(&["n2"], &["n1"])), None);
        assert_eq!(excluded(Some("n1"), &[], &names(&["n1"]), 1, &nodes(&["n2"], &["n1"])), None);
        assert_eq!(
            excluded(Some("n1"), &[], &[], 1, &nodes(&["n1"], &["n2"])),
            Some(vec![]),
            "it has recovered"
        );
    }
}
