//! Gives VMs their places: draws the picture for [`super::placement`], reserves what it chose, and looks again.
//!
//! One thread (`places`) does this for all moves, so that all VMs of a moment are placed together and no two rounds overlap.
//! A move asks with [`Controller::find_place`] and waits. A destination node has one reservation ([`reservation_of`]) for all
//! VMs that land there; it goes with the last of them. What an earlier life of the controller left is swept.
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard},
    time::Duration,
};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::{
    Controller, health,
    moves::{JobMove, Step},
    placement::{self, Arrival, Claims, Picture, PreemptRule, Resources, Want, by_node, is_ours, reservation_of},
};
use crate::slurm::{JobBrief, JobInfo, JobRequest, JobUpdate, NodeInfo, ReservationInfo, ReservationNodes, ReservationSpec, SlurmError};

/// Those of one poll come within this time of each other.
const GATHER: Duration = Duration::from_millis(100);
/// While something is wanted and Slurm does not answer.
const AGAIN: Duration = Duration::from_millis(500);
/// A node that was chosen and reserved, and then found to be needed by somebody who goes before, is given back; so often.
const LOOKS: u32 = 3;
/// How long tiers and QOS's of a cluster are taken to be what they were, in milliseconds.
const RULE_KEPT_MS: u64 = 30_000;
/// Excluded nodes of so many waiting jobs are asked for in one round: each is one command.
const MOST_ASKED: usize = 16;

/// A move that waits for its place.
#[derive(Debug)]
struct Asked {
    want: Want,
    reply: Sender<Result<String, String>>,
}

/// What the room keeps between two rounds.
#[derive(Debug)]
pub(super) struct Places {
    asked: Mutex<BTreeMap<u32, Asked>>,
    wake: Sender<()>,
    woken: Receiver<()>,
    /// Held while reservations are made or removed, never while something is awaited.
    reserving: Mutex<()>,
    memory: Mutex<Memory>,
}

#[derive(Debug, Default)]
struct Memory {
    claims: Claims,
    rule: Option<(u64, PreemptRule)>,
    /// Nodes that waiting jobs must not have.
    exclude: BTreeMap<u32, Vec<String>>,
}

impl Default for Places {
    fn default() -> Self {
        let (wake, woken) = bounded(1);
        Self {
            asked: Mutex::default(),
            wake,
            woken,
            reserving: Mutex::default(),
            memory: Mutex::default(),
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What Slurm says at one moment.
struct Seen {
    nodes: Vec<NodeInfo>,
    jobs: Vec<JobBrief>,
    requests: BTreeMap<u32, JobRequest>,
    reservations: Vec<ReservationInfo>,
    exclude: BTreeMap<u32, Vec<String>>,
    rule: PreemptRule,
    claims: Claims,
    well: BTreeSet<String>,
    arrivals: Vec<Arrival>,
    now_s: i64,
}

impl Seen {
    fn picture<'a>(&'a self, feature: &'a str, moves_in: usize) -> Picture<'a> {
        Picture {
            now_s: self.now_s,
            feature,
            nodes: &self.nodes,
            well: &self.well,
            jobs: &self.jobs,
            requests: &self.requests,
            exclude: &self.exclude,
            reservations: &self.reservations,
            claims: &self.claims,
            arrivals: self.arrivals.clone(),
            rule: &self.rule,
            moves_in,
            refused: BTreeSet::new(),
            on: by_node(&self.jobs),
        }
    }
}

/// What a job's VM takes on a node.
pub(super) fn needs(info: &JobInfo) -> Resources {
    info.allocs.first().map_or(
        Resources {
            cpus: info.num_cpus,
            mem_mib: 0,
        },
        |a| Resources {
            cpus: u32::try_from(a.cpus.len()).unwrap_or(u32::MAX),
            mem_mib: a.mem_mib,
        },
    )
}

impl Controller {
    /// A node for a move's VM, reserved for it; blocks until the next round has decided, `give_up` at the latest.
    ///
    /// # Errors
    /// Why there is none, as a fragment.
    pub(super) fn find_place(&self, m: &JobMove, info: &JobInfo, give_up_ms: Option<u64>) -> Result<String, String> {
        let want = Want {
            job: m.job,
            user: m.user.clone(),
            from: m.from.clone(),
            partition: info.brief.partition.clone(),
            qos: None,
            constraint: info.brief.features.clone(),
            exclude: info.exclude_nodes.clone(),
            needs: needs(info),
            wanted: m.to.clone().filter(|_| m.to_asked),
            deadline_ms: m.deadline_ms,
        };
        let (reply, answer) = bounded(1);
        locked(&self.places.asked).insert(m.job, Asked { want, reply });
        let _ = self.places.wake.try_send(());
        loop {
            match answer.recv_timeout(AGAIN) {
                Ok(answer) => return answer,
                Err(RecvTimeoutError::Timeout) if give_up_ms.is_none_or(|t| self.world.clock.now_ms() < t) => {}
                Err(_) => {
                    locked(&self.places.asked).remove(&m.job);
                    // It may have been answered in this very moment.
                    return answer
                        .try_recv()
                        .unwrap_or_else(|_| Err("Slurm did not say in time where there is room".into()));
                }
            }
        }
    }

    /// Runs for as long as the process does.
    pub(super) fn run_places(&self) {
        loop {
            let _ = self.places.woken.recv_timeout(AGAIN);
            if locked(&self.places.asked).is_empty() {
                continue;
            }
            self.world.clock.sleep(GATHER);
            if let Err(e) = self.round() {
                log::warn!("no places can be given out yet: {e}");
                self.world.clock.sleep(AGAIN);
            }
        }
    }

    /// One round: all that is wanted now is placed together.
    fn round(&self) -> Result<(), String> {
        let mut refused = BTreeSet::new();
        let mut left = BTreeSet::new();
        for look in 1..=LOOKS {
            let wants: Vec<Want> = locked(&self.places.asked).values().map(|a| a.want.clone()).collect();
            if wants.is_empty() {
                return Ok(());
            }
            let seen = self.see().map_err(|e| e.to_string())?;
            let wants: Vec<Want> = wants.into_iter().map(|w| with_qos(w, &seen)).collect();
            let mut picture = self.picture(&seen);
            picture.refused.clone_from(&refused);
            let decided = placement::place(picture, &wants);
            let mut taken = Vec::new();
            for (job, choice) in decided {
                match choice {
                    Ok(node) => match self.take_place(job, &node) {
                        Ok(()) => taken.push((job, node)),
                        Err(e) => {
                            log::info!("job {job}: {node} cannot be reserved: {e}");
                            refused.insert(node);
                        }
                    },
                    Err(why) => self.answer_place(job, Err(self.without_place(&why, &seen, job, &wants))),
                }
            }
            self.look_again(&taken, &wants, look);
            left = wants.into_iter().map(|w| w.job).collect();
        }
        left.retain(|job| locked(&self.places.asked).contains_key(job));
        for job in left {
            self.answer_place(
                job,
                Err("no other node has room for the VM: each was wanted by somebody else".into()),
            );
        }
        Ok(())
    }

    fn picture<'a>(&'a self, seen: &'a Seen) -> Picture<'a> {
        seen.picture(&self.config.controller.feature, self.config.node.moves_in as usize)
    }

    /// After reserving: somebody who goes before may have come into the queue in between.
    fn look_again(&self, taken: &[(u32, String)], wants: &[Want], look: u32) {
        let again = if taken.is_empty() { None } else { self.see().ok() };
        let mut needed = BTreeSet::new();
        if let Some(seen) = &again {
            // As if the new places were not taken yet.
            let mut picture = self.picture(seen);
            picture.arrivals.retain(|a| taken.iter().all(|(job, _)| *job != a.job));
            let mine: Vec<Want> = wants
                .iter()
                .filter_map(|w| {
                    let (_, node) = taken.iter().find(|(job, _)| *job == w.job)?;
                    Some(Want {
                        wanted: Some(node.clone()),
                        ..w.clone()
                    })
                })
                .collect();
            let kept_for_others = |(job, choice): (u32, Result<String, String>)| choice.is_err().then_some(job);
            needed = placement::place(picture, &mine).into_iter().filter_map(kept_for_others).collect();
        }
        for (job, node) in taken {
            if needed.contains(job) && look < LOOKS {
                log::info!("job {job}: {node} is needed by a job that goes before: it is given back");
                self.leave_place(*job);
            } else if needed.contains(job) {
                self.leave_place(*job);
                self.answer_place(*job, Err(format!("{node} is needed by a job that goes before")));
            } else {
                self.answer_place(*job, Ok(node.clone()));
            }
        }
    }

    fn answer_place(&self, job: u32, answer: Result<String, String>) {
        if let Some(asked) = locked(&self.places.asked).remove(&job) {
            let placed = answer.is_ok();
            // Its move has given up waiting.
            if asked.reply.send(answer).is_err() && placed {
                self.leave_place(job);
            }
        } else if answer.is_ok() {
            self.leave_place(job);
        }
    }

    /// A node that was asked for by name and is sick: that is said rather than that it has no room.
    fn without_place(&self, why: &str, seen: &Seen, job: u32, wants: &[Want]) -> String {
        let wanted = wants.iter().find(|w| w.job == job).and_then(|w| w.wanted.clone());
        let sick = wanted
            .filter(|to| seen.nodes.iter().any(|n| n.name == *to))
            .map(|to| health::of(&self.cluster(), &to))
            .filter(|h| !h.healthy);
        sick.map_or_else(
            || why.to_owned(),
            |h| format!("{} is not healthy: {}", h.node, h.why.unwrap_or_default()),
        )
    }

    /// Asks Slurm for all that places depend on.
    fn see(&self) -> Result<Seen, SlurmError> {
        let slurm = &self.world.slurm;
        // The jobs first and their requests after them: a job without a request is left out, and is not there yet either.
        let jobs = slurm.jobs_poll()?;
        let requests: BTreeMap<u32, JobRequest> = slurm.requests()?.into_iter().map(|r| (r.id, r)).collect();
        let nodes = slurm.nodes()?;
        let reservations = slurm.reservations()?;
        let rule = self.preempt_rule()?;
        let exclude = self.excluded_by(&jobs);
        let now_ms = self.world.clock.now_ms();
        let (well, arrivals) = {
            let cluster = self.cluster();
            let well = nodes
                .iter()
                .filter(|n| health::of(&cluster, &n.name).healthy)
                .map(|n| n.name.clone())
                .collect();
            let arrival = |m: &JobMove| {
                let node = m.held.clone().filter(|_| m.step != Step::Landed)?;
                let needs = requests.get(&m.job).map_or(m.needs, |r| Resources {
                    cpus: r.cpus,
                    mem_mib: r.mem_mib,
                });
                Some(Arrival { job: m.job, node, needs })
            };
            (well, cluster.moves.values().filter_map(arrival).collect())
        };
        let mut seen = Seen {
            nodes,
            jobs,
            requests,
            reservations,
            exclude,
            rule,
            claims: Claims::default(),
            well,
            arrivals,
            now_s: i64::try_from(now_ms / 1000).unwrap_or(i64::MAX),
        };
        seen.claims = self.follow_claims(&seen);
        Ok(seen)
    }

    /// Who may preempt whom; asked for anew now and then.
    fn preempt_rule(&self) -> Result<PreemptRule, SlurmError> {
        let now_ms = self.world.clock.now_ms();
        if let Some((at, rule)) = &locked(&self.places.memory).rule
            && now_ms.saturating_sub(*at) < RULE_KEPT_MS
        {
            return Ok(rule.clone());
        }
        let slurm = &self.world.slurm;
        let config = slurm.config()?;
        let qos = if config.preempt_type == "preempt/qos" {
            slurm
                .qos()
                .inspect_err(|e| {
                    log::warn!("accounting does not say which QOS may preempt which ({e}): each is taken to preempt the others")
                })
                .ok()
        } else {
            None
        };
        let rule = PreemptRule::of(&config.preempt_type, &slurm.partitions()?, qos);
        locked(&self.places.memory).rule = Some((now_ms, rule.clone()));
        Ok(rule)
    }

    /// Nodes that waiting jobs must not have: squeue has no column for them that all releases know, so each job is asked for once.
    fn excluded_by(&self, jobs: &[JobBrief]) -> BTreeMap<u32, Vec<String>> {
        let now_s = i64::try_from(self.world.clock.now_ms() / 1000).unwrap_or(i64::MAX);
        let waiting: BTreeSet<u32> = jobs.iter().filter(|j| placement::could_start(j, now_s)).map(|j| j.id).collect();
        let unknown: Vec<u32> = {
            let mut memory = locked(&self.places.memory);
            memory.exclude.retain(|job, _| waiting.contains(job));
            waiting
                .iter()
                .filter(|job| !memory.exclude.contains_key(job))
                .take(MOST_ASKED)
                .copied()
                .collect()
        };
        for job in unknown {
            if let Ok(Some(info)) = self.world.slurm.job(job) {
                locked(&self.places.memory).exclude.insert(job, info.exclude_nodes);
            }
        }
        locked(&self.places.memory).exclude.clone()
    }

    /// Claims of an earlier process.
    pub(super) fn load_claims(&self) {
        let path = self.config.state_dir.join("claims.json");
        let read = self
            .world
            .files
            .read(&path)
            .and_then(|bytes| Ok(serde_json::from_slice::<Claims>(&bytes)?));
        match read {
            Ok(claims) => locked(&self.places.memory).claims = claims,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => log::error!("{}: {e}: nodes that are being vacated are not known any more", path.display()),
        }
    }

    /// Called with each poll: whoever is in grace claims its nodes.
    pub(super) fn note_claims(&self, jobs: &[JobBrief]) {
        let mut memory = locked(&self.places.memory);
        if memory.claims.follow(jobs, |_| None) {
            self.write_claims(&memory.claims);
        }
    }

    fn follow_claims(&self, seen: &Seen) -> Claims {
        let mut memory = locked(&self.places.memory);
        let qos_of = |job| seen.requests.get(&job).and_then(|r| r.qos.clone());
        let mut changed = memory.claims.follow(&seen.jobs, qos_of);
        let picture = self.picture(seen);
        changed |= memory.claims.release(&seen.jobs, |node, claim| picture.is_waited_for(node, claim));
        if changed {
            self.write_claims(&memory.claims);
        }
        memory.claims.clone()
    }

    fn write_claims(&self, claims: &Claims) {
        let path = self.config.state_dir.join("claims.json");
        let written = serde_json::to_vec_pretty(claims)
            .map_err(std::io::Error::from)
            .and_then(|json| self.world.files.write_durably(&path, &json));
        if let Err(e) = written {
            log::error!("{}: {e}", path.display());
        }
    }

    /// Users of the moves that hold a node.
    fn users_of(&self, node: &str) -> Vec<String> {
        let cluster = self.cluster();
        let users: BTreeSet<&String> = cluster
            .moves
            .values()
            .filter(|m| m.held.as_deref() == Some(node))
            .map(|m| &m.user)
            .collect();
        users.into_iter().cloned().collect()
    }

    /// Puts a move into a node's reservation, which is made if there is none.
    pub(super) fn take_place(&self, job: u32, node: &str) -> Result<(), String> {
        let _reserving = locked(&self.places.reserving);
        let name = reservation_of(node);
        match self.cluster().moves.get_mut(&job) {
            Some(m) => m.held = Some(node.to_owned()),
            None => return Err("its move has ended".into()),
        }
        let slurm = &self.world.slurm;
        let users = self.users_of(node);
        let reserve = || -> Result<(), SlurmError> {
            match slurm.reservation(&name)? {
                Some(there) if users.iter().all(|u| there.users.contains(u)) => Ok(()),
                Some(there) => {
                    let more = users.iter().filter(|u| !there.users.contains(u));
                    let all: Vec<String> = there.users.iter().chain(more).cloned().collect();
                    slurm.set_reservation_users(&name, &all)
                }
                None => slurm
                    .create_reservation(&ReservationSpec {
                        name: name.clone(),
                        nodes: ReservationNodes::Named(vec![node.to_owned()]),
                        partition: None,
                        features: None,
                        users: users.clone(),
                    })
                    .map(drop),
            }
        };
        reserve().map_err(|e| {
            if let Some(m) = self.cluster().moves.get_mut(&job) {
                m.held = None;
            }
            e.to_string()
        })
    }

    /// Takes a move out of its node's reservation, which goes with the last one. The job itself may still be in it: then
    /// Slurm refuses, and it is tried again. Blocks for 20 s at most.
    pub(super) fn leave_place(&self, job: u32) {
        let held = self.cluster().moves.get_mut(&job).and_then(|m| m.held.take());
        let Some(node) = held else { return };
        let name = reservation_of(&node);
        let until_ms = self.world.clock.now_ms() + 20_000;
        loop {
            self.out_of_reservation(job, &name);
            let removed = {
                let _reserving = locked(&self.places.reserving);
                let used = self.cluster().moves.values().any(|m| m.held.as_deref() == Some(node.as_str()));
                if used {
                    Ok(false)
                } else {
                    self.world.slurm.delete_reservation(&name)
                }
            };
            match removed {
                Ok(_) => return,
                Err(e) if self.world.clock.now_ms() > until_ms => {
                    log::warn!("reservation {name} cannot be removed yet: {e}");
                    return;
                }
                Err(_) => self.world.clock.sleep(Duration::from_millis(250)),
            }
        }
    }

    /// A reservation that a job uses or asks for cannot be deleted.
    fn out_of_reservation(&self, job: u32, name: &str) {
        if let Ok(Some(info)) = self.world.slurm.job(job)
            && info.brief.reservation.as_deref() == Some(name)
            && !info.brief.state.is_finished()
        {
            let update = JobUpdate {
                reservation: Some(None),
                ..JobUpdate::default()
            };
            if let Err(e) = self.world.slurm.update_job(job, &update) {
                log::debug!("job {job}: {e}");
            }
        }
    }

    /// Removes reservations of ours that no move is in: an earlier life of the controller left them.
    pub(super) fn sweep_reservations(&self) {
        let slurm = &self.world.slurm;
        let left: Vec<String> = match slurm.reservations() {
            Ok(all) => all.into_iter().map(|r| r.name).filter(|n| is_ours(n)).collect(),
            Err(e) => {
                log::debug!("reservations are not swept: {e}");
                return;
            }
        };
        for name in left {
            let is_used = || {
                let cluster = self.cluster();
                cluster
                    .moves
                    .values()
                    .any(|m| m.held.as_deref().is_some_and(|n| reservation_of(n) == name))
            };
            let jobs: Vec<u32> = {
                let cluster = self.cluster();
                let in_it = cluster.jobs.iter().filter(|j| j.reservation.as_deref() == Some(name.as_str()));
                in_it.map(|j| j.id).collect()
            };
            if is_used() {
                continue;
            }
            for job in jobs {
                self.out_of_reservation(job, &name);
            }
            let _reserving = locked(&self.places.reserving);
            if is_used() {
                continue;
            }
            match slurm.delete_reservation(&name) {
                Ok(_) => log::warn!("reservation {name} belonged to no move, and was removed"),
                Err(e) => log::info!("reservation {name} belongs to no move, and cannot be removed yet: {e}"),
            }
        }
    }

    /// Could another node take a job's VM now, whoever it is kept for? For the verdict of `svm show`.
    pub(super) fn has_room(&self, job: u32, from: &str, info: &JobInfo) -> bool {
        let Ok(seen) = self.see() else { return false };
        let want = Want {
            job,
            user: info.brief.user.clone(),
            from: from.to_owned(),
            partition: info.brief.partition.clone(),
            qos: None,
            constraint: info.brief.features.clone(),
            exclude: info.exclude_nodes.clone(),
            needs: needs(info),
            wanted: None,
            deadline_ms: None,
        };
        self.picture(&seen).has_room(&want)
    }
}

fn with_qos(want: Want, seen: &Seen) -> Want {
    let qos = seen.requests.get(&want.job).and_then(|r| r.qos.clone());
    Want { qos, ..want }
}
