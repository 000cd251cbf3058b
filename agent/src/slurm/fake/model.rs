//! The model itself. See the parent module for what it does and does not imitate.

use super::{FakeEvent, FakeJob, FakeNode, FakeOp, FakePartition, Fault};
use crate::slurm::SlurmError;
use crate::slurm::types::{
    JobBrief, JobId, JobInfo, JobRequest, JobState, JobUpdate, NodeAlloc, NodeInfo, PartitionInfo, QosInfo, ReservationInfo,
    ReservationNodes, ReservationSpec, SlurmConfig, UserText,
};
use std::collections::{BTreeMap, BTreeSet};

/// What a requeue makes a job wait (cred_expire + 1 in the lab's configuration).
const REQUEUE_DELAY_S: i64 = 11;
/// MinJobAge: how long an ended job is known.
const MIN_JOB_AGE_S: i64 = 300;

#[derive(Debug)]
struct Node {
    spec: FakeNode,
    active: Vec<String>,
    up: bool,
    drain: Option<String>,
}

#[derive(Debug)]
struct Job {
    spec: FakeJob,
    state: JobState,
    /// What it becomes when the last epilog has returned.
    next: JobState,
    epilogs: BTreeSet<String>,
    allocs: Vec<NodeAlloc>,
    held: bool,
    begin: i64,
    start: Option<i64>,
    end: Option<i64>,
    preempt: Option<i64>,
    restarts: u32,
    limit_min: Option<u32>,
    reservation: Option<String>,
    req_nodes: Vec<String>,
    exclude: Vec<String>,
    features: Option<String>,
    comment: Option<String>,
    requeue: bool,
    exit: Option<(i32, i32)>,
}

#[derive(Debug)]
pub(super) struct Model {
    now: i64,
    nodes: BTreeMap<String, Node>,
    partitions: BTreeMap<String, FakePartition>,
    jobs: BTreeMap<JobId, Job>,
    next_id: JobId,
    pub(super) reservations: BTreeMap<String, ReservationInfo>,
    pub(super) events: Vec<FakeEvent>,
    pub(super) calls: BTreeMap<FakeOp, u64>,
    pub(super) faults: Vec<Fault>,
    pub(super) unreachable: bool,
    pub(super) requeues_early_exit: bool,
    pub(super) exempt_s: i64,
    /// Which QOS may preempt which; `None`: tiers of partitions decide.
    pub(super) qos: Option<Vec<QosInfo>>,
}

fn refused(message: &str) -> SlurmError {
    SlurmError::Refused {
        message: message.to_owned(),
    }
}

impl Model {
    pub(super) fn new(nodes: Vec<FakeNode>, partitions: Vec<FakePartition>) -> Self {
        Self {
            now: 0,
            nodes: nodes
                .into_iter()
                .map(|n| {
                    (
                        n.name.clone(),
                        Node {
                            active: n.features.clone(),
                            spec: n,
                            up: true,
                            drain: None,
                        },
                    )
                })
                .collect(),
            partitions: partitions.into_iter().map(|p| (p.name.clone(), p)).collect(),
            jobs: BTreeMap::new(),
            next_id: 1,
            reservations: BTreeMap::new(),
            events: Vec::new(),
            calls: BTreeMap::new(),
            faults: Vec::new(),
            unreachable: false,
            requeues_early_exit: true,
            exempt_s: 0,
            qos: None,
        }
    }

    pub(super) fn submit(&mut self, spec: FakeJob) -> JobId {
        let id = self.next_id;
        self.next_id += 1;
        let job = Job {
            state: JobState::Pending,
            next: JobState::Pending,
            epilogs: BTreeSet::new(),
            allocs: Vec::new(),
            held: false,
            begin: self.now,
            start: None,
            end: None,
            preempt: None,
            restarts: 0,
            limit_min: spec.time_limit_min,
            reservation: None,
            req_nodes: spec.req_nodes.clone(),
            exclude: spec.exclude_nodes.clone(),
            features: spec.features.clone(),
            comment: None,
            requeue: spec.batch && spec.requeue,
            exit: None,
            spec,
        };
        self.jobs.insert(id, job);
        id
    }

    pub(super) fn tick(&mut self, now: i64) {
        self.now = self.now.max(now);
        if self.unreachable {
            return;
        }
        let due: Vec<(JobId, bool)> = self
            .jobs
            .iter()
            .filter(|(_, j)| j.state == JobState::Running && j.end.is_some_and(|e| e <= self.now))
            .map(|(id, j)| (*id, j.preempt.is_some()))
            .collect();
        for (id, preempted) in due {
            let batch = self.jobs[&id].spec.batch;
            self.end_run(
                id,
                if preempted && batch {
                    JobState::Pending
                } else if preempted {
                    JobState::Preempted
                } else {
                    JobState::Timeout
                },
            );
        }
        let now = self.now;
        self.jobs
            .retain(|_, j| !j.state.is_finished() || j.end.is_none_or(|e| e + MIN_JOB_AGE_S > now));
        self.schedule();
    }

    /// Ends what runs: TERM, epilogs, then `next`.
    fn end_run(&mut self, id: JobId, next: JobState) {
        let now = self.now;
        let Some(job) = self.jobs.get_mut(&id) else { return };
        if next == JobState::Pending {
            // As on the real one, the count goes up when the run ends: the first run's epilog already sees 1.
            job.restarts += 1;
        }
        job.state = JobState::Completing;
        job.next = next.clone();
        job.end = Some(now);
        let nodes: Vec<String> = job.allocs.iter().map(|a| a.node.clone()).collect();
        job.epilogs = nodes.iter().filter(|n| self.nodes[*n].up).cloned().collect();
        let settled = job.epilogs.is_empty();
        self.events.push(FakeEvent::Ending { job: id, nodes, next });
        if settled {
            self.settle(id);
        }
    }

    pub(super) fn epilog_done(&mut self, id: JobId, node: &str) {
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.epilogs.remove(node);
        if job.state == JobState::Completing && job.epilogs.is_empty() {
            self.settle(id);
        }
    }

    fn settle(&mut self, id: JobId) {
        let now = self.now;
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.state = job.next.clone();
        if job.state == JobState::Pending {
            job.allocs.clear();
            job.preempt = None;
            job.start = None;
            job.end = None;
            job.begin = now + REQUEUE_DELAY_S;
        }
    }

    pub(super) fn exited(&mut self, id: JobId, code: i32) {
        let early = self.requeues_early_exit;
        let Some(job) = self.jobs.get_mut(&id) else { return };
        if job.state != JobState::Running {
            return;
        }
        job.exit = Some((code, 0));
        let next = match (job.preempt.is_some() && early, code) {
            (true, _) => JobState::Pending,
            (false, 0) => JobState::Completed,
            (false, _) => JobState::Failed,
        };
        self.end_run(id, next);
    }

    pub(super) fn cancel(&mut self, id: JobId) {
        let now = self.now;
        let Some(job) = self.jobs.get_mut(&id) else { return };
        match job.state {
            JobState::Pending => {
                job.state = JobState::Cancelled;
                job.end = Some(now);
            }
            JobState::Running => self.end_run(id, JobState::Cancelled),
            JobState::Completing => job.next = JobState::Cancelled,
            _ => {}
        }
    }

    pub(super) fn requeue(&mut self, id: JobId, hold: bool) -> Result<(), SlurmError> {
        let job = self.jobs.get_mut(&id).ok_or(SlurmError::NoSuchJob)?;
        if !job.spec.batch {
            return Err(refused("Only batch jobs are accepted or processed"));
        }
        if !job.requeue {
            return Err(refused("Requested operation is presently disabled"));
        }
        // `Incomplete`: everything else is left alone, without an error.
        if job.state != JobState::Running {
            return Ok(());
        }
        self.end_run(id, JobState::Pending);
        if hold && let Some(job) = self.jobs.get_mut(&id) {
            job.held = true;
        }
        Ok(())
    }

    /// As [`Model::requeue`] with hold, but the job waits in the state `SPECIAL_EXIT`.
    pub(super) fn requeue_special(&mut self, id: JobId) -> Result<(), SlurmError> {
        let runs = self.jobs.get(&id).is_some_and(|job| job.state == JobState::Running);
        self.requeue(id, true)?;
        if let Some(job) = self.jobs.get_mut(&id).filter(|_| runs) {
            match job.state {
                JobState::Completing => job.next = JobState::SpecialExit,
                _ => job.state = JobState::SpecialExit,
            }
        }
        Ok(())
    }

    pub(super) fn set_held(&mut self, id: JobId, held: bool) -> Result<(), SlurmError> {
        let job = self.jobs.get_mut(&id).ok_or(SlurmError::NoSuchJob)?;
        if job.state.is_finished() {
            return Err(refused("Job has already finished"));
        }
        job.held = held;
        if !held && job.state == JobState::SpecialExit {
            job.state = JobState::Pending;
        }
        Ok(())
    }

    pub(super) fn update(&mut self, id: JobId, update: &JobUpdate) -> Result<(), SlurmError> {
        let now = self.now;
        let known = |r: &str| self.reservations.contains_key(r);
        let job = self.jobs.get_mut(&id).ok_or(SlurmError::NoSuchJob)?;
        if job.state.is_finished() {
            return Err(refused("Job has already finished"));
        }
        if let Some(Some(r)) = &update.reservation
            && !known(r)
        {
            return Err(refused("Requested reservation is invalid"));
        }
        if update.time_limit_min.is_some() && job.preempt.is_some() {
            return Err(refused("Job has already finished"));
        }
        if job.state == JobState::Running && (update.req_nodes.is_some() || update.features.is_some() || update.exclude_nodes.is_some()) {
            return Err(refused("Job is no longer pending execution"));
        }
        if let Some(r) = &update.reservation {
            job.reservation.clone_from(r);
        }
        if let Some(limit) = update.time_limit_min {
            job.limit_min = Some(limit);
            job.end = job.start.map(|s| s + i64::from(limit) * 60);
        }
        if let Some(nodes) = &update.req_nodes {
            job.req_nodes.clone_from(nodes);
        }
        if let Some(nodes) = &update.exclude_nodes {
            job.exclude.clone_from(nodes);
        }
        if let Some(features) = &update.features {
            job.features = Some(features.clone()).filter(|f| !f.is_empty());
        }
        if let Some(comment) = &update.comment {
            job.comment = Some(comment.clone());
        }
        if let Some(requeue) = update.requeue {
            job.requeue = requeue;
        }
        if update.start_now && job.state == JobState::Pending {
            job.begin = now;
        }
        Ok(())
    }

    pub(super) fn reserve(&mut self, spec: &ReservationSpec) -> Result<ReservationInfo, SlurmError> {
        if let Some(there) = self.reservations.get(&spec.name) {
            return if there.users == spec.users {
                Ok(there.clone())
            } else {
                Err(refused("reservation exists for other users"))
            };
        }
        let taken = |n: &str| self.reservations.values().any(|r| r.nodes.iter().any(|x| x == n));
        let (nodes, flags) = match &spec.nodes {
            ReservationNodes::Named(list) => {
                if list.iter().any(|n| !self.nodes.contains_key(n)) {
                    return Err(refused("Error creating the reservation: Invalid node name specified"));
                }
                if list.iter().any(|n| taken(n)) {
                    return Err(refused("Error creating the reservation: Requested nodes are busy"));
                }
                (list.clone(), vec!["IGNORE_JOBS".to_owned(), "SPEC_NODES".to_owned()])
            }
            ReservationNodes::Count(count) => {
                let fits = |(name, n): &(&String, &Node)| {
                    n.up && n.drain.is_none()
                        && has_features(&n.active, spec.features.as_deref())
                        && !taken(name)
                        && self.used(name) == (0, 0)
                };
                let free: Vec<String> = self
                    .nodes
                    .iter()
                    .filter(fits)
                    .map(|(name, _)| name.clone())
                    .take(*count as usize)
                    .collect();
                if free.len() < *count as usize {
                    return Err(refused("Error creating the reservation: Requested nodes are busy"));
                }
                (free, Vec::new())
            }
        };
        let info = ReservationInfo {
            name: spec.name.clone(),
            nodes,
            users: spec.users.clone(),
            partition: spec.partition.clone(),
            features: spec.features.clone(),
            flags,
            start_time: Some(self.now),
            end_time: Some(self.now + 365 * 86_400),
            active: true,
        };
        self.reservations.insert(spec.name.clone(), info.clone());
        Ok(info)
    }

    pub(super) fn unreserve(&mut self, name: &str) -> Result<bool, SlurmError> {
        if self
            .jobs
            .values()
            .any(|j| j.reservation.as_deref() == Some(name) && !j.state.is_finished())
        {
            return Err(refused("Requested reservation is in use"));
        }
        Ok(self.reservations.remove(name).is_some())
    }

    pub(super) fn set_active_features(&mut self, node: &str, features: &[String]) -> Result<(), SlurmError> {
        let node = self
            .nodes
            .get_mut(node)
            .ok_or_else(|| refused("slurm_update error: Invalid node name specified"))?;
        if features.iter().any(|f| !node.spec.features.contains(f)) {
            return Err(refused("slurm_update error: Active features not subset of available features"));
        }
        node.active = features.to_vec();
        Ok(())
    }

    pub(super) fn set_up(&mut self, name: &str, up: bool) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        node.up = up;
        if up {
            return;
        }
        let there: Vec<JobId> = self
            .jobs
            .iter()
            .filter(|(_, j)| j.allocs.iter().any(|a| a.node == name))
            .map(|(id, _)| *id)
            .collect();
        for id in there {
            let job = &self.jobs[&id];
            match job.state {
                JobState::Running => {
                    let next = if job.spec.batch { JobState::Pending } else { JobState::NodeFail };
                    self.end_run(id, next);
                }
                JobState::Completing => self.epilog_done(id, name),
                _ => {}
            }
        }
    }

    pub(super) fn set_drain(&mut self, name: &str, reason: Option<&str>) {
        if let Some(node) = self.nodes.get_mut(name) {
            node.drain = reason.map(str::to_owned);
        }
    }

    pub(super) fn reconfigure(&mut self) {
        for node in self.nodes.values_mut() {
            node.active.clone_from(&node.spec.features);
        }
    }

    /// CPUs and memory in use on a node: an ending job has them until its epilog there is done.
    fn used(&self, node: &str) -> (u32, u64) {
        let mut used = (0, 0);
        for job in self.jobs.values() {
            let holds = job.state == JobState::Running || (job.state == JobState::Completing && job.epilogs.contains(node));
            for a in job.allocs.iter().filter(|a| holds && a.node == node) {
                used.0 += u32::try_from(a.cpus.len()).unwrap_or(u32::MAX);
                used.1 += a.mem_mib;
            }
        }
        used
    }

    /// May the job use the node at all, room apart?
    fn eligible(&self, job: &Job, name: &str) -> bool {
        let node = &self.nodes[name];
        let reservation_ok = match &job.reservation {
            Some(r) => self
                .reservations
                .get(r)
                .is_some_and(|r| r.nodes.iter().any(|n| n == name) && r.users.contains(&job.spec.user)),
            None => !self.reservations.values().any(|r| r.nodes.iter().any(|n| n == name)),
        };
        node.up
            && node.drain.is_none()
            && reservation_ok
            && has_features(&node.active, job.features.as_deref())
            && !job.exclude.iter().any(|n| n == name)
            && (job.req_nodes.is_empty() || job.req_nodes.iter().any(|n| n == name))
    }

    fn fits(&self, job: &Job, name: &str, freed: (u32, u64)) -> bool {
        let (node, used) = (&self.nodes[name].spec, self.used(name));
        if job.spec.exclusive && used.0 > freed.0 {
            return false;
        }
        used.0 - freed.0 + job.spec.cpus_per_node <= node.cpus && used.1 - freed.1 + job.spec.mem_mib_per_node <= node.mem_mib
    }

    fn schedule(&mut self) {
        let mut waiting: Vec<(bool, u32, JobId)> = self
            .jobs
            .iter()
            .filter(|(_, j)| j.state == JobState::Pending && !j.held && j.begin <= self.now)
            .map(|(id, j)| (j.reservation.is_none(), u32::MAX - self.tier(j), *id))
            .collect();
        waiting.sort_unstable();
        for (_, _, id) in waiting {
            let job = &self.jobs[&id];
            let nodes: Vec<String> = self
                .nodes
                .keys()
                .filter(|n| self.eligible(job, n) && self.fits(job, n, (0, 0)))
                .take(job.spec.nodes as usize)
                .cloned()
                .collect();
            if nodes.len() == job.spec.nodes as usize {
                self.start(id, nodes);
            } else {
                self.preempt_for(id);
            }
        }
    }

    fn tier(&self, job: &Job) -> u32 {
        self.partitions.get(&job.spec.partition).map_or(1, |p| p.priority_tier)
    }

    fn start(&mut self, id: JobId, nodes: Vec<String>) {
        let mut allocs = Vec::new();
        for name in &nodes {
            let taken: BTreeSet<u32> = self
                .jobs
                .values()
                .filter(|j| matches!(j.state, JobState::Running | JobState::Completing))
                .flat_map(|j| j.allocs.iter().filter(|a| &a.node == name).flat_map(|a| a.cpus.iter().copied()))
                .collect();
            let spec = &self.jobs[&id].spec;
            let cpus = (0..self.nodes[name].spec.cpus)
                .filter(|c| !taken.contains(c))
                .take(spec.cpus_per_node as usize)
                .collect();
            allocs.push(NodeAlloc {
                node: name.clone(),
                cpus,
                mem_mib: spec.mem_mib_per_node,
            });
        }
        let now = self.now;
        let Some(job) = self.jobs.get_mut(&id) else { return };
        job.allocs = allocs;
        job.state = JobState::Running;
        job.start = Some(now);
        job.end = job.limit_min.map(|m| now + i64::from(m) * 60);
        self.events.push(FakeEvent::Started {
            job: id,
            nodes,
            restarts: job.restarts,
        });
    }

    /// By QOS where that is set, else by the partitions' tiers.
    fn may_preempt(&self, job: &Job, victim: &Job) -> bool {
        let part = self.partitions.get(&victim.spec.partition);
        let preemptable = part.is_some_and(|p| p.preempt_mode != "OFF");
        match &self.qos {
            Some(all) => {
                let mine = all.iter().find(|q| Some(&q.name) == job.spec.qos.as_ref());
                preemptable && mine.is_some_and(|q| victim.spec.qos.as_ref().is_some_and(|v| q.preempts.contains(v)))
            }
            None => preemptable && self.tier(victim) < self.tier(job),
        }
    }

    /// Chooses victims of lower tiers, node by node, unless enough are on their way out already.
    fn preempt_for(&mut self, id: JobId) {
        let job = &self.jobs[&id];
        let mut victims = Vec::new();
        let mut found = 0;
        for name in self.nodes.keys().filter(|n| self.eligible(job, n)) {
            if found == job.spec.nodes {
                break;
            }
            let (mut freed, mut chosen) = ((0, 0), Vec::new());
            // Those that leave anyway count first.
            for (vid, v) in &self.jobs {
                let Some(a) = v.allocs.iter().find(|a| &a.node == name) else {
                    continue;
                };
                let leaving =
                    v.state == JobState::Completing && v.epilogs.contains(name) || v.state == JobState::Running && v.preempt.is_some();
                let victim = v.state == JobState::Running
                    && v.preempt.is_none()
                    && v.reservation.is_none()
                    && self.may_preempt(job, v)
                    && v.start.is_some_and(|s| s + self.exempt_s <= self.now);
                if leaving || victim {
                    freed.0 += u32::try_from(a.cpus.len()).unwrap_or(0);
                    freed.1 += a.mem_mib;
                }
                if victim {
                    chosen.push(*vid);
                }
            }
            if self.fits(job, name, freed) {
                let leaving_is_enough = chosen.is_empty();
                found += 1;
                if !leaving_is_enough {
                    victims.extend(chosen);
                }
            }
        }
        if found < job.spec.nodes {
            return;
        }
        let now = self.now;
        for vid in victims {
            let grace = self.partitions.get(&self.jobs[&vid].spec.partition).map_or(0, |p| p.grace_s);
            let Some(v) = self.jobs.get_mut(&vid) else { continue };
            let limit = now + i64::try_from(grace).unwrap_or(i64::MAX / 2);
            v.preempt = Some(now);
            v.end = Some(v.end.map_or(limit, |e| e.min(limit)));
            let nodes = v.allocs.iter().map(|a| a.node.clone()).collect();
            self.events.push(FakeEvent::Grace { job: vid, nodes });
        }
    }

    fn brief(&self, id: JobId, job: &Job) -> JobBrief {
        let nodes: Vec<String> = job.allocs.iter().map(|a| a.node.clone()).collect();
        JobBrief {
            id,
            uid: job.spec.uid,
            user: job.spec.user.clone(),
            state: job.state.clone(),
            preempt_time: job.preempt,
            start_time: job.start.or(Some(job.begin)),
            end_time: job.end,
            priority: if job.held { 0 } else { u64::from(u32::MAX - id) },
            restarts: job.restarts,
            batch: job.spec.batch,
            batch_host: nodes.first().cloned().filter(|_| job.spec.batch),
            nodes,
            partition: job.spec.partition.clone(),
            reservation: job.reservation.clone(),
            reason: match job.state {
                JobState::Pending if job.held => "job requeued in held state".into(),
                JobState::Pending if job.begin > self.now => "BeginTime".into(),
                JobState::Pending => "Resources".into(),
                _ => "None".into(),
            },
            features: job.features.clone(),
            array: None,
            het: None,
            requeue: job.requeue,
            time_limit_min: job.limit_min,
            req_nodes: job.req_nodes.clone(),
        }
    }

    pub(super) fn briefs(&self) -> Vec<JobBrief> {
        self.jobs
            .iter()
            .filter(|(_, j)| !j.state.is_finished())
            .map(|(id, j)| self.brief(*id, j))
            .collect()
    }

    pub(super) fn requests(&self) -> Vec<JobRequest> {
        let request = |(id, j): (&JobId, &Job)| JobRequest {
            id: *id,
            nodes: j.spec.nodes,
            most_nodes: Some(j.spec.nodes),
            cpus: j.spec.nodes * j.spec.cpus_per_node,
            mem_mib: u64::from(j.spec.nodes) * j.spec.mem_mib_per_node,
            any_nodes: false,
            exclusive: j.spec.exclusive,
            req_nodes: j.req_nodes.clone(),
            qos: j.spec.qos.clone(),
        };
        self.jobs.iter().filter(|(_, j)| !j.state.is_finished()).map(request).collect()
    }

    pub(super) fn set_reservation_users(&mut self, name: &str, users: &[String]) -> Result<(), SlurmError> {
        let there = self
            .reservations
            .get_mut(name)
            .ok_or_else(|| refused("Requested reservation is invalid"))?;
        there.users = users.to_vec();
        Ok(())
    }

    pub(super) fn info(&self, id: JobId) -> Option<JobInfo> {
        let job = self.jobs.get(&id)?;
        Some(JobInfo {
            brief: self.brief(id, job),
            gid: job.spec.uid,
            group: job.spec.user.clone(),
            exit: job.exit,
            num_nodes: job.spec.nodes,
            num_cpus: job.spec.nodes * job.spec.cpus_per_node,
            exclude_nodes: job.exclude.clone(),
            nice: None,
            // As `scontrol -d show job` has it: also of a job that is over, until slurmctld forgets it.
            allocs: if job.state == JobState::Running || job.state.is_finished() {
                job.allocs.clone()
            } else {
                Vec::new()
            },
            user_text: UserText {
                comment: job.comment.clone(),
                ..UserText::default()
            },
            gres: Vec::new(),
        })
    }

    pub(super) fn node_infos(&self) -> Vec<NodeInfo> {
        let info = |(name, n): (&String, &Node)| {
            let used = self.used(name);
            let base = match (n.up, used.0) {
                (false, _) => "DOWN",
                (true, 0) => "IDLE",
                (true, c) if c < n.spec.cpus => "MIXED",
                _ => "ALLOCATED",
            };
            let mut state = vec![base.to_owned()];
            if n.drain.is_some() {
                state.push("DRAIN".into());
            }
            NodeInfo {
                name: name.clone(),
                state,
                reason: n.drain.clone(),
                available_features: n.spec.features.clone(),
                active_features: n.active.clone(),
                cpus_alloc: used.0,
                cpus_total: n.spec.cpus,
                cores: n.spec.cpus,
                threads_per_core: 1,
                mem_alloc_mib: used.1,
                mem_total_mib: n.spec.mem_mib,
                partitions: self.partitions.keys().cloned().collect(),
                address: name.clone(),
            }
        };
        self.nodes.iter().map(info).collect()
    }

    pub(super) fn partition_infos(&self) -> Vec<PartitionInfo> {
        let info = |p: &FakePartition| PartitionInfo {
            name: p.name.clone(),
            preempt_mode: p.preempt_mode.clone(),
            grace_s: p.grace_s,
            priority_tier: p.priority_tier,
            nodes: self.nodes.keys().cloned().collect(),
            up: true,
            is_default: p.priority_tier == 1,
        };
        self.partitions.values().map(info).collect()
    }

    pub(super) fn config(&self) -> SlurmConfig {
        SlurmConfig {
            version: if self.requeues_early_exit { "24.11.5" } else { "22.05.8" }.into(),
            cluster: "fake".into(),
            slurm_user: "slurm".into(),
            slurm_uid: 64030,
            preempt_mode: "REQUEUE".into(),
            preempt_type: if self.qos.is_some() {
                "preempt/qos"
            } else {
                "preempt/partition_prio"
            }
            .into(),
            priority_type: "priority/basic".into(),
            preempt_exempt_s: self.exempt_s.unsigned_abs(),
            job_requeue: true,
            prolog_flags: vec!["Alloc".into()],
            requeue_exit: vec![],
            kill_wait_s: 5,
            auth_info: None,
            multiple_slurmd: true,
        }
    }

    pub(super) fn breach(&self) -> Option<String> {
        for (name, n) in &self.nodes {
            let used = self.used(name);
            if used.0 > n.spec.cpus || used.1 > n.spec.mem_mib {
                return Some(format!("{name} is overcommitted: {used:?}"));
            }
        }
        self.jobs
            .iter()
            .find(|(_, j)| j.state == JobState::Running && j.allocs.len() != j.spec.nodes as usize)
            .map(|(id, _)| format!("job {id} runs without its nodes"))
    }
}

/// Constraints joined by `&`, in any brackets; `|` within one of them means "any of these".
fn has_features(active: &[String], wanted: Option<&str>) -> bool {
    wanted.is_none_or(|w| {
        w.split('&').all(|part| {
            part.split('|')
                .any(|f| active.iter().any(|a| a == f.trim_matches(['(', ')', '[', ']'])))
        })
    })
}
