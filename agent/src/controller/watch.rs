//! What sets a move off: a job in its grace time, a node put into drain, somebody who asks.
use std::{collections::BTreeSet, sync::Arc, thread, time::Duration};

use slurm_vm_api::{query::VmView, spec::PreemptWay};

use super::{
    Controller,
    admission::{self, Admission},
    places,
};
use crate::{
    cluster::{PeerReply, PeerRequest},
    core::relocation::{Event, JobMove, MOVE_VERSION, Step},
    slurm::{JobBrief, JobInfo, JobUpdate},
};

/// After a failed move off a node that is drained, a job is left alone for so long, unless it is preempted.
const LEAVE_ALONE: Duration = Duration::from_secs(60);

/// Whether a move may begin; that it must not is the error.
enum Admitted {
    /// It may; what Slurm says of the job.
    Yes(Box<JobInfo>),
    /// Slurm did not answer: to be asked again with the next poll.
    NotKnown(String),
}

/// What the grace time is taken for where nobody says it.
const GRACE_GUESS_S: i64 = 120;

/// When a preempted job's grace ends. Slurm's commands do not show the end of a job without a time limit, not even in its grace.
fn grace_end(j: &JobBrief, grace_s: impl FnOnce() -> i64) -> Option<i64> {
    j.end_time.or_else(|| j.preempt_time.map(|at| at + grace_s()))
}

impl Controller {
    /// Starts the moves that the last poll calls for.
    pub(super) fn start_moves(self: &Arc<Self>) {
        let feature = &self.config.controller.feature;
        let (jobs, draining) = {
            let cluster = self.cluster();
            let draining = cluster.slurm_nodes.values().filter(|n| n.is_draining());
            let draining: BTreeSet<String> = draining.map(|n| n.name.clone()).collect();
            (cluster.jobs.clone(), draining)
        };
        self.give_way();
        self.put_node_lists_back();
        self.put_limits_back();
        let is_vm = |j: &JobBrief| j.batch && j.features.as_ref().is_some_and(|f| f.contains(feature.as_str()));
        for j in jobs.iter().filter(|j| is_vm(j) && j.state.is_on_nodes()) {
            let Some(from) = j.batch_host.clone().or_else(|| j.nodes.first().cloned()) else {
                continue;
            };
            if !(j.in_grace() || draining.contains(&from)) || self.is_moving(j.id) {
                continue;
            }
            if j.in_grace() {
                if self.cluster().handled.get(&j.id) == Some(&j.restarts) {
                    continue;
                }
                self.cluster().handled.insert(j.id, j.restarts);
                let end = grace_end(j, || self.grace_of(&j.partition));
                log::info!("job {}: preempted on {from}, grace ends at {end:?}", j.id);
                let deadline_ms = end.and_then(|t| u64::try_from(t).ok()).map(|t| t * 1000);
                self.plan_aside(j.clone(), from, "preemption", deadline_ms);
            } else if self
                .cluster()
                .failed
                .get(&j.id)
                .is_none_or(|at| self.world.clock.since(*at) > LEAVE_ALONE)
            {
                log::info!("job {}: {from} is being drained", j.id);
                self.plan_aside(j.clone(), from, "drain", None);
            }
        }
    }

    /// A move of the job is under way or being planned.
    fn is_moving(&self, job: u32) -> bool {
        let cluster = self.cluster();
        cluster.moves.contains_key(&job) || cluster.planning.contains(&job)
    }

    /// GraceTime of a partition; a guess where Slurm does not say it, or where it is the QOS's.
    fn grace_of(&self, partition: &str) -> i64 {
        let grace = self.slurm_facts().and_then(|facts| facts.grace_s.get(partition).copied());
        grace
            .filter(|g| *g > 0)
            .and_then(|g| i64::try_from(g).ok())
            .unwrap_or(GRACE_GUESS_S)
    }

    /// Plans on a thread of its own: a node that does not answer must not hold up the other jobs' moves.
    fn plan_aside(self: &Arc<Self>, j: JobBrief, from: String, cause: &'static str, deadline_ms: Option<u64>) {
        let job = j.id;
        self.cluster().planning.insert(job);
        let controller = self.clone();
        let spawned = thread::Builder::new().name(format!("plan-{job}")).spawn(move || {
            let planned = controller.plan(&j, from, cause, None, deadline_ms);
            let mut cluster = controller.cluster();
            cluster.planning.remove(&job);
            if let Err(why) = planned {
                if cluster.stays.get(&job) != Some(&j.restarts) {
                    log::warn!("job {job}: its {cause} is left to Slurm for now: {why}");
                }
                if cause == "drain" {
                    cluster.failed.insert(job, controller.world.clock.instant());
                }
            }
        });
        if let Err(e) = spawned {
            log::error!("job {job}: no thread for its move: {e}");
            self.cluster().planning.remove(&job);
        }
    }

    /// Slurm takes a node list only while the job waits.
    fn put_node_lists_back(&self) {
        let all = self.notes().all();
        for (job, notes) in all {
            let waits = || {
                let cluster = self.cluster();
                !cluster.moves.contains_key(&job) && cluster.jobs.by_id(job).is_some_and(|j| j.state.is_waiting())
            };
            if notes.req_nodes.is_empty() || !waits() {
                continue;
            }
            let update = JobUpdate {
                req_nodes: Some(notes.req_nodes),
                ..JobUpdate::default()
            };
            match self.world.slurm.update_job(job, &update) {
                Ok(()) => self.notes().change(job, |n| n.req_nodes.clear()),
                Err(e) => log::debug!("job {job}: its node list is not put back yet: {e}"),
            }
        }
    }

    /// A job in a run that no move has led to starts over, with its whole time, whether it was seen waiting for that run or not.
    fn put_limits_back(&self) {
        let all = self.notes().all();
        for (job, notes) in all {
            let Some(time) = notes.time else { continue };
            let starts_over = {
                let cluster = self.cluster();
                let later = |j: &JobBrief| (j.state.is_waiting() || j.state.is_on_nodes()) && j.restarts > time.restarts;
                !cluster.moves.contains_key(&job) && cluster.jobs.by_id(job).is_some_and(later)
            };
            if !starts_over {
                continue;
            }
            let update = JobUpdate {
                time_limit_min: Some(time.full_min),
                ..JobUpdate::default()
            };
            match self.world.slurm.update_job(job, &update) {
                Ok(()) => {
                    log::info!("job {job}: starts over, with its whole time limit");
                    self.notes().change(job, |n| n.time = None);
                }
                Err(e) => log::debug!("job {job}: its time limit is not put back yet: {e}"),
            }
        }
    }

    /// A move without a deadline makes way for the preemption of its job, which has one.
    fn give_way(&self) {
        let late: Vec<u32> = {
            let cluster = self.cluster();
            let moves = &cluster.moves;
            let in_grace = cluster.jobs.iter().filter(|j| j.in_grace()).filter_map(|j| moves.get(&j.id));
            in_grace
                .filter(|m| m.step == Step::Planned && m.deadline_ms.is_none())
                .map(|m| m.job)
                .collect()
        };
        for job in late {
            log::info!("job {job}: preempted in the middle of a move: that move is given up");
            self.relocations.tell(job, Event::GiveUp("its job is being preempted".into()));
        }
    }

    /// Plans and starts one move.
    fn plan(self: &Arc<Self>, j: &JobBrief, from: String, cause: &str, to: Option<String>, deadline_ms: Option<u64>) -> Result<(), String> {
        let asked = PeerRequest::Grace {
            job: j.id,
            preempted: deadline_ms.is_some(),
        };
        let (mut ways, reserve_ms) = match self.peers.request(&from, &self.address(&from), &asked, Duration::from_secs(3)) {
            Ok(PeerReply::Ways { ways, reserve_ms }) => (ways, reserve_ms),
            // A job on a VM node without a VM of its own: Slurm preempts it as ever.
            Ok(PeerReply::Refused(why)) => {
                log::debug!("job {}: {why}", j.id);
                return Err(why);
            }
            Ok(other) => return Err(format!("{from} gave another answer than asked for: {other:?}")),
            // Not acted on: the next poll tries again as long as the grace time lasts.
            Err(why) => {
                self.cluster().handled.remove(&j.id);
                return Err(format!("{from} does not answer: {why}"));
            }
        };
        match cause {
            "asked" => ways = vec![PreemptWay::Live],
            // A drain never costs a job its work.
            "drain" => ways.retain(|w| matches!(w, PreemptWay::Live | PreemptWay::Save)),
            _ => {}
        }
        let info = match self.admit(j, &from, cause)? {
            Admitted::Yes(info) => *info,
            Admitted::NotKnown(why) => {
                self.cluster().handled.remove(&j.id);
                return Err(why);
            }
        };
        let m = JobMove {
            v: MOVE_VERSION,
            job: j.id,
            user: j.user.clone(),
            cause: cause.into(),
            step: Step::Planned,
            from,
            to_asked: to.is_some(),
            to,
            held: None,
            needs: places::needs(&info),
            nodes: u32::try_from(info.brief.nodes.len()).unwrap_or(u32::MAX),
            ways,
            deadline_ms,
            reserve_ms,
            time_before: self.notes().of(j.id).time,
            limit_min: None,
            left_min: None,
            used_s: 0,
            // Setting a priority sets the user's nice value to 0: a job that has one keeps that instead.
            priority: Some(j.priority).filter(|p| *p > 0 && info.nice == Some(0)),
            restarts: j.restarts,
            moved_ms: None,
            settling_ms: None,
            lost: false,
            constraint: info.brief.features.clone(),
            exclude: info.exclude_nodes.clone(),
            partition: info.brief.partition.clone(),
            notes: vec![],
            done: None,
            moving: false,
        };
        if self.start(m, false) {
            Ok(())
        } else {
            // A move by hand was quicker. It gives way, and then the preemption is to be acted on all the same.
            self.cluster().handled.remove(&j.id);
            Err(format!("job {} is moving already", j.id))
        }
    }

    /// Nothing is begun whose last step Slurm would refuse. What keeps a job where it is, is said once for each of its runs.
    fn admit(&self, j: &JobBrief, from: &str, cause: &str) -> Result<Admitted, String> {
        let info = match self.job_details(j.id) {
            Ok(info) => info.ok_or_else(|| format!("Slurm knows no job {}", j.id))?,
            Err(e) => return Ok(Admitted::NotKnown(format!("Slurm does not say: {e}"))),
        };
        let Admission::Never(why) = admission::of(&info.brief, self.notes().of(j.id).last_try) else {
            return Ok(Admitted::Yes(Box::new(info)));
        };
        let told = self.cluster().stays.insert(j.id, j.restarts) == Some(j.restarts);
        if !told && cause != "asked" {
            let line = match cause {
                "drain" => format!("{from} is being drained, and the VM stays: {why}"),
                _ => format!("the job is being preempted, and the VM stays until Slurm ends it: {why}"),
            };
            self.tell_job(from, j.id, &line);
        }
        Err(why)
    }

    /// A line for a job's user, in the journal of its VM (`svm log`).
    pub(super) fn tell_job(&self, node: &str, job: u32, line: &str) {
        log::info!("job {job}: {line}");
        let note = PeerRequest::Note {
            job,
            line: line.to_owned(),
        };
        if let Err(e) = self.peers.request(node, &self.address(node), &note, Duration::from_secs(3)) {
            log::debug!("job {job}: {node}: {e}");
        }
    }

    /// `svm migrate`: starts a move by hand.
    ///
    /// # Errors
    /// Why there is none.
    pub(super) fn migrate(self: &Arc<Self>, view: &VmView, to: Option<String>) -> Result<(), String> {
        let job = view.job;
        let info = self
            .world
            .slurm
            .job(job)
            .map_err(|e| e.to_string())?
            .filter(|i| i.brief.state.is_on_nodes())
            .ok_or_else(|| format!("job {job} does not run"))?;
        if let Admission::NotNow(why) | Admission::Never(why) = admission::of(&info.brief, self.notes().of(job).last_try) {
            return Err(format!("job {job} cannot move: {why}"));
        }
        let from = info
            .brief
            .batch_host
            .clone()
            .or_else(|| info.brief.nodes.first().cloned())
            .ok_or_else(|| format!("job {job} has no node"))?;
        if let Some(to) = &to {
            let cluster = self.cluster();
            if !cluster.slurm_nodes.contains_key(to) {
                let known: Vec<&str> = cluster.slurm_nodes.keys().map(String::as_str).collect();
                return Err(format!("{to} is no VM node; the VM nodes are {}", known.join(", ")));
            }
            if *to == from {
                return Err(format!("the VM of job {job} is on {to} already"));
            }
        }
        if info.brief.in_grace() {
            return Err(format!("job {job} is being preempted: its VM moves anyway"));
        }
        self.cluster().results.remove(&job);
        self.plan(&info.brief, from, "asked", to, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::placement::tests::brief;

    #[test]
    fn the_grace_of_a_job_without_a_time_limit_ends_a_grace_time_after_its_preemption() {
        let mut job = JobBrief {
            preempt_time: Some(1000),
            end_time: None,
            ..brief(7, "low")
        };
        assert_eq!(grace_end(&job, || 60), Some(1060));
        // With a limit Slurm says itself when the job ends, and is believed.
        job.end_time = Some(1030);
        assert_eq!(grace_end(&job, || unreachable!("nobody needs to be asked")), Some(1030));
        (job.preempt_time, job.end_time) = (None, None);
        assert_eq!(grace_end(&job, || 60), None);
    }
}
