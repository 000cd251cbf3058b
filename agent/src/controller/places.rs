//! Gives VMs their places: draws the picture for [`super::placement`], reserves what it chose, and looks again.
//!
//! One thread (`places`) does this for all moves, so that all VMs of a moment are placed together and no two rounds overlap.
//! A move asks with [`Controller::ask_place`], and the answer comes to it as an event. A destination node has one reservation ([`reservation_of`]) for all
//! VMs that land there; it goes with the last of them. What an earlier life of the controller left is swept.
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Mutex,
    time::Duration,
};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::{
    Controller, health, locked,
    orders::Tried,
    placement::{self, Arrival, Claims, Picture, PreemptRule, Want, by_node, is_ours, reservation_of},
};
use crate::core::relocation::{Event, JobMove, Resources};
use crate::slurm::{JobBrief, JobInfo, JobRequest, JobUpdate, NodeInfo, ReservationInfo, ReservationNodes, ReservationSpec, SlurmError};

/// Those of one poll come within this time of each other.
const GATHER: Duration = Duration::from_millis(100);
/// While something is wanted and Slurm does not answer.
const AGAIN: Duration = Duration::from_millis(500);
/// A node that was chosen and reserved, and then found to be needed by somebody who goes before, is given back; so often.
const LOOKS: u32 = 3;
/// How long tiers and QOS's of a cluster are taken to be what they were, in milliseconds.
const RULE_KEPT_MS: u64 = 30_000;
/// How often giving a place back is tried, at the pace of [`super::orders`].
const LEAVE_TRIES: u32 = 80;
/// Places that are given back together; other orders may go in between.
const LEAVE_TOGETHER: usize = 32;

/// A move that waits for its place.
#[derive(Debug)]
struct Asked {
    want: Want,
    give_up_ms: Option<u64>,
}

/// A move that is in a node's reservation.
#[derive(Debug, Clone)]
pub(super) struct Hold {
    node: String,
    user: String,
    needs: Resources,
}

/// A move that has let go of its place.
#[derive(Debug)]
struct Leaving {
    job: u32,
    was: Hold,
    /// The move waits for the end of this.
    tell: bool,
    tries: u32,
}

/// Reservations by name, with the users that they were given; `None`: it was removed, or Slurm did not answer.
type Changed = BTreeMap<String, Option<Vec<String>>>;

/// What the room keeps between two rounds.
#[derive(Debug)]
pub(super) struct Places {
    asked: Mutex<BTreeMap<u32, Asked>>,
    /// Who is in which reservation.
    holds: Mutex<BTreeMap<u32, Hold>>,
    wake: Sender<()>,
    woken: Receiver<()>,
    /// Moves whose places are to be looked at before their jobs are steered there.
    keeping: Mutex<Vec<(u32, String)>>,
    /// Moves that have let go of their places; Slurm is to hear of it.
    leaving: Mutex<Vec<Leaving>>,
    /// Held while reservations are made or removed, never while something is awaited. In it: those that were
    /// changed since the round at hand began.
    reserving: Mutex<Changed>,
    memory: Mutex<Memory>,
}

#[derive(Debug, Default)]
struct Memory {
    claims: Claims,
    facts: Option<(u64, SlurmFacts)>,
    /// Nodes that waiting jobs must not have.
    exclude: BTreeMap<u32, Vec<String>>,
}

impl Default for Places {
    fn default() -> Self {
        let (wake, woken) = bounded(1);
        Self {
            asked: Mutex::default(),
            holds: Mutex::default(),
            wake,
            woken,
            keeping: Mutex::default(),
            leaving: Mutex::default(),
            reserving: Mutex::default(),
            memory: Mutex::default(),
        }
    }
}

/// What of Slurm's configuration decides about moves.
#[derive(Debug, Clone)]
pub(super) struct SlurmFacts {
    /// Who may preempt whom.
    pub(super) rule: PreemptRule,
    /// A job whose script ends in its grace time is requeued by Slurm itself.
    pub(super) requeues_early_exit: bool,
    /// Partitions whose jobs are requeued when they are preempted.
    pub(super) requeue_partitions: Vec<String>,
    /// Priorities are the order of submission only, so that one can be set.
    pub(super) sets_priority: bool,
    /// GraceTime of the partitions in seconds.
    pub(super) grace_s: BTreeMap<String, u64>,
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
    /// A node for a move's VM, reserved for it; answered with [`Event::Placed`], at `give_up_ms` at the latest.
    pub(super) fn ask_place(&self, m: &JobMove, give_up_ms: Option<u64>) {
        let want = Want {
            job: m.job,
            user: m.user.clone(),
            from: m.from.clone(),
            partition: m.partition.clone(),
            qos: None,
            constraint: m.constraint.clone(),
            exclude: m.exclude.clone(),
            needs: m.needs,
            wanted: m.to.clone().filter(|_| m.to_asked),
            deadline_ms: m.deadline_ms,
        };
        locked(&self.places.asked).insert(m.job, Asked { want, give_up_ms });
        let _ = self.places.wake.try_send(());
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
            self.give_up_late();
        }
    }

    /// Those whose time is over are told so.
    fn give_up_late(&self) {
        let now_ms = self.world.clock.now_ms();
        let late: Vec<u32> = locked(&self.places.asked)
            .iter()
            .filter(|(_, a)| a.give_up_ms.is_some_and(|t| now_ms >= t))
            .map(|(job, _)| *job)
            .collect();
        for job in late {
            self.answer_place(job, Err("Slurm did not say in time where there is room".into()));
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
            locked(&self.places.reserving).clear();
            self.orders.wait_turn(4);
            let seen = self.see().map_err(|e| e.to_string())?;
            let wants: Vec<Want> = wants.into_iter().map(|w| with_qos(w, &seen)).collect();
            let mut picture = self.picture(&seen);
            picture.refused.clone_from(&refused);
            let decided = placement::place(picture, &wants);
            let mut taken = Vec::new();
            for (job, choice) in decided {
                match choice {
                    Ok(node) => match wants
                        .iter()
                        .find(|w| w.job == job)
                        .map_or(Ok(()), |w| self.take_place(w, &node, &seen.reservations))
                    {
                        Ok(()) => taken.push((job, node)),
                        Err(e) => {
                            log::info!("job {job}: {node} cannot be reserved: {e}");
                            refused.insert(node);
                        }
                    },
                    Err(why) => self.answer_place(job, Err(self.without_place(&why, &seen, job, &wants))),
                }
            }
            self.look_again(&seen, &taken, &wants, look);
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
    fn look_again(&self, before: &Seen, taken: &[(u32, String)], wants: &[Want], look: u32) {
        // One command says whether there is anything new; only then the others are asked too.
        let is_news = || {
            let now_s = i64::try_from(self.world.clock.now_ms() / 1000).unwrap_or(i64::MAX);
            let jobs = self.world.slurm.jobs_poll();
            jobs.map_or(true, |jobs| who_is_where(&jobs, now_s) != who_is_where(&before.jobs, before.now_s))
        };
        let again = if taken.is_empty() || !is_news() { None } else { self.see().ok() };
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
                self.give_back(*job);
            } else if needed.contains(job) {
                self.give_back(*job);
                self.answer_place(*job, Err(format!("{node} is needed by a job that goes before")));
            } else {
                self.answer_place(*job, Ok(node.clone()));
            }
        }
    }

    fn answer_place(&self, job: u32, answer: Result<String, String>) {
        if locked(&self.places.asked).remove(&job).is_some() {
            self.relocations.tell(job, Event::Placed(answer));
        }
    }

    /// A place that nobody has been told of yet.
    fn give_back(&self, job: u32) {
        if let Some(was) = self.let_go(job)
            && let Err(e) = self.clear_place(job, &was)
        {
            log::info!("job {job}: {e}");
        }
    }

    /// A node that was asked for by name and is sick: that is said rather than that it has no room.
    fn without_place(&self, why: &str, seen: &Seen, job: u32, wants: &[Want]) -> String {
        let wanted = wants.iter().find(|w| w.job == job).and_then(|w| w.wanted.clone());
        let sick = wanted
            .filter(|to| seen.nodes.iter().any(|n| n.name == *to))
            .map(|to| health::of(&self.cluster(), &to, self.world.clock.instant()))
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
        let rule = self.facts()?.rule;
        let exclude = self.excluded_by(&jobs);
        let now_ms = self.world.clock.now_ms();
        let well = {
            let (cluster, now) = (self.cluster(), self.world.clock.instant());
            let names = nodes.iter().map(|n| n.name.clone());
            names.filter(|n| health::of(&cluster, n, now).healthy).collect()
        };
        let arrival = |(job, hold): (&u32, &Hold)| Arrival {
            job: *job,
            node: hold.node.clone(),
            needs: hold.needs,
        };
        let arrivals = locked(&self.places.holds).iter().map(arrival).collect();
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

    /// What of Slurm's configuration decides about moves; asked for anew now and then.
    ///
    /// # Errors
    /// Those of Slurm.
    pub(super) fn facts(&self) -> Result<SlurmFacts, SlurmError> {
        let now_ms = self.world.clock.now_ms();
        if let Some((at, facts)) = &locked(&self.places.memory).facts
            && now_ms.saturating_sub(*at) < RULE_KEPT_MS
        {
            return Ok(facts.clone());
        }
        let slurm = &self.world.slurm;
        let config = slurm.config()?;
        let qos = if config.preempt_type == "preempt/qos" {
            slurm
                .qos()
                .inspect_err(|e| {
                    log::warn!("accounting does not say which QOS may preempt which ({e}): each is taken to preempt the others");
                })
                .ok()
        } else {
            None
        };
        let partitions = slurm.partitions()?;
        let requeues = partitions.iter().filter(|p| p.preempt_mode == "REQUEUE");
        let facts = SlurmFacts {
            rule: PreemptRule::of(&config.preempt_type, &partitions, qos),
            requeues_early_exit: config.release() >= Some((24, 5)) && config.preempt_type == "preempt/partition_prio",
            requeue_partitions: requeues.map(|p| p.name.clone()).collect(),
            sets_priority: config.priority_type == "priority/basic",
            grace_s: partitions.iter().map(|p| (p.name.clone(), p.grace_s)).collect(),
        };
        locked(&self.places.memory).facts = Some((now_ms, facts.clone()));
        Ok(facts)
    }

    /// What was last known of it; asks nobody.
    pub(super) fn slurm_facts(&self) -> Option<SlurmFacts> {
        locked(&self.places.memory).facts.as_ref().map(|(_, facts)| facts.clone())
    }

    /// Nodes that waiting jobs must not have: squeue has no column for them that all releases know, so each job is asked for once.
    fn excluded_by(&self, jobs: &[JobBrief]) -> BTreeMap<u32, Vec<String>> {
        let now_s = i64::try_from(self.world.clock.now_ms() / 1000).unwrap_or(i64::MAX);
        let waiting: BTreeSet<u32> = jobs.iter().filter(|j| placement::could_start(j, now_s)).map(|j| j.id).collect();
        let unknown: Vec<u32> = {
            let mut memory = locked(&self.places.memory);
            memory.exclude.retain(|job, _| waiting.contains(job));
            waiting.iter().filter(|job| !memory.exclude.contains_key(job)).copied().collect()
        };
        if !unknown.is_empty() {
            self.orders.wait_turn(2);
        }
        let found = if unknown.is_empty() {
            Ok(vec![])
        } else {
            self.world.slurm.jobs(&unknown)
        };
        match found {
            Ok(found) => {
                let found = found.into_iter().map(|info| (info.brief.id, info.exclude_nodes));
                locked(&self.places.memory).exclude.extend(found);
            }
            Err(e) => log::debug!("excluded nodes of {unknown:?} are not known: {e}"),
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
        let holds = locked(&self.places.holds);
        let users: BTreeSet<&String> = holds.values().filter(|h| h.node == node).map(|h| &h.user).collect();
        users.into_iter().cloned().collect()
    }

    fn is_held(&self, node: &str) -> bool {
        locked(&self.places.holds).values().any(|h| h.node == node)
    }

    /// A move of an earlier life of the controller is in this node's reservation.
    pub(super) fn hold_again(&self, m: &JobMove, node: &str) {
        let hold = Hold {
            node: node.to_owned(),
            user: m.user.clone(),
            needs: m.needs,
        };
        locked(&self.places.holds).insert(m.job, hold);
    }

    /// Puts a move into a node's reservation, which is made if there is none. `seen`: the reservations as the round at hand saw them,
    /// so that not each place costs a question of its own.
    fn take_place(&self, want: &Want, node: &str, seen: &[ReservationInfo]) -> Result<(), String> {
        let is_there = |r: &ReservationInfo| r.name == reservation_of(node) && r.users.contains(&want.user);
        if !seen.iter().any(is_there) && !locked(&self.places.reserving).contains_key(&reservation_of(node)) {
            self.orders.wait_turn(1);
        }
        let mut changed = locked(&self.places.reserving);
        let hold = Hold {
            node: node.to_owned(),
            user: want.user.clone(),
            needs: want.needs,
        };
        locked(&self.places.holds).insert(want.job, hold);
        let name = reservation_of(node);
        let there = match changed.get(&name) {
            Some(Some(users)) if users.contains(&want.user) => return Ok(()),
            Some(_) => self.world.slurm.reservation(&name),
            None => Ok(seen.iter().find(|r| r.name == name).cloned()),
        };
        there.and_then(|there| self.reserve(node, there, &mut changed)).map_err(|e| {
            locked(&self.places.holds).remove(&want.job);
            e.to_string()
        })
    }

    /// Makes a node's reservation as those who hold it need it. `there`: as it is now.
    fn reserve(&self, node: &str, there: Option<ReservationInfo>, changed: &mut Changed) -> Result<(), SlurmError> {
        let slurm = &self.world.slurm;
        let name = reservation_of(node);
        let users = self.users_of(node);
        match there {
            Some(there) if users.iter().all(|u| there.users.contains(u)) => Ok(()),
            Some(there) => {
                let more = users.iter().filter(|u| !there.users.contains(u));
                let all: Vec<String> = there.users.iter().chain(more).cloned().collect();
                let done = slurm.set_reservation_users(&name, &all);
                changed.insert(name, done.is_ok().then_some(all));
                done
            }
            None => {
                let spec = ReservationSpec {
                    name: name.clone(),
                    nodes: ReservationNodes::Named(vec![node.to_owned()]),
                    partition: None,
                    features: None,
                    users: users.clone(),
                };
                let done = slurm.create_reservation(&spec);
                changed.insert(name, done.is_ok().then_some(users));
                done
            }
        }
    }

    /// Before a job is steered to its place, that is looked at: a slurmctld that was killed may have forgotten the reservation. Returns
    /// whether [`Controller::keep_places`] is to be ordered.
    pub(super) fn keep_later(&self, job: u32, node: String) -> bool {
        let mut keeping = locked(&self.places.keeping);
        keeping.push((job, node));
        keeping.len() == 1
    }

    /// One look for all that wait for it; answered with [`Event::PlaceKept`].
    pub(super) fn keep_places(&self) {
        let keeping = std::mem::take(&mut *locked(&self.places.keeping));
        let there = self.world.slurm.reservations();
        for (job, node) in keeping {
            let kept = match &there {
                // It is held by this move, so nobody has removed it since.
                Ok(there) if self.is_reserved(job, &node, there) => Ok(()),
                Ok(_) => {
                    self.orders.wait_turn(2);
                    self.keep_place(job, &node)
                }
                Err(e) => Err(e.to_string()),
            };
            self.relocations.tell(job, Event::PlaceKept(kept));
        }
    }

    fn is_reserved(&self, job: u32, node: &str, there: &[ReservationInfo]) -> bool {
        let holds = locked(&self.places.holds);
        let name = reservation_of(node);
        let hold = holds.get(&job).filter(|h| h.node == node);
        hold.is_some_and(|h| there.iter().any(|r| r.name == name && r.users.contains(&h.user)))
    }

    /// The reservation is made again if Slurm has lost it.
    fn keep_place(&self, job: u32, node: &str) -> Result<(), String> {
        let mut changed = locked(&self.places.reserving);
        if locked(&self.places.holds).get(&job).is_none_or(|h| h.node != node) {
            return Err(format!("{node} is not held any more"));
        }
        let there = self.world.slurm.reservation(&reservation_of(node));
        there
            .and_then(|there| self.reserve(node, there, &mut changed))
            .map_err(|e| e.to_string())
    }

    /// From now on the move is in no node's reservation; what is left to be done in Slurm about the one that it was in is
    /// [`Controller::leave_places`]'s.
    fn let_go(&self, job: u32) -> Option<Hold> {
        locked(&self.places.holds).remove(&job)
    }

    /// As [`Controller::let_go`], and Slurm hears of it in its turn. `tell`: the move waits for that. Returns whether
    /// [`Controller::leave_places`] is to be ordered.
    pub(super) fn leave_later(&self, job: u32, tell: bool) -> bool {
        let Some(was) = self.let_go(job) else {
            if tell {
                self.relocations.place_left(job);
            }
            return false;
        };
        let mut leaving = locked(&self.places.leaving);
        leaving.push(Leaving { job, was, tell, tries: 0 });
        leaving.len() == 1
    }

    /// Gives back some of the places that moves have let go: one look at the jobs and one order for those that are in a reservation
    /// still, and then each reservation goes that nobody holds any more.
    pub(super) fn leave_places(&self) -> Tried {
        let some: Vec<Leaving> = {
            let mut leaving = locked(&self.places.leaving);
            // Those of one node together, so that its reservation can go.
            leaving.sort_by(|a, b| (a.tries, &a.was.node, a.job).cmp(&(b.tries, &b.was.node, b.job)));
            let n = leaving.len().min(LEAVE_TOGETHER);
            leaving.drain(..n).collect()
        };
        if some.is_empty() {
            return Tried::Done;
        }
        let out = self.out_of_reservations(&some);
        let mut cleared: BTreeMap<String, Result<(), String>> = BTreeMap::new();
        for mut left in some {
            let node = &left.was.node;
            let done = match (&out, cleared.get(node)) {
                (Err(e), _) => Err(e.clone()),
                (Ok(()), Some(done)) => done.clone(),
                (Ok(()), None) => {
                    let done = self.unreserve(node, || self.orders.wait_turn(1));
                    cleared.insert(node.clone(), done.clone());
                    done
                }
            };
            match done {
                Err(e) if left.tries < LEAVE_TRIES => {
                    log::debug!("job {}: {e}", left.job);
                    left.tries += 1;
                    locked(&self.places.leaving).push(left);
                    continue;
                }
                // The sweep finds it.
                Err(e) => log::warn!("job {}: {e}", left.job),
                Ok(()) => {}
            }
            if left.tell {
                self.relocations.place_left(left.job);
            }
        }
        // Whoever comes while it is empty, orders this anew.
        if locked(&self.places.leaving).is_empty() {
            Tried::Done
        } else {
            Tried::Again
        }
    }

    /// Jobs that use or ask for a reservation keep it from being deleted. What they have been given since is not touched.
    fn out_of_reservations(&self, leaving: &[Leaving]) -> Result<(), String> {
        self.orders.wait_turn(1);
        let jobs = super::Jobs::new(self.world.slurm.jobs_poll().map_err(|e| e.to_string())?);
        let has_it_again = |l: &Leaving| locked(&self.places.holds).get(&l.job).is_some_and(|h| h.node == l.was.node);
        let is_in = |l: &&Leaving| {
            let name = reservation_of(&l.was.node);
            let job = jobs.by_id(l.job).filter(|j| !j.state.is_finished());
            job.is_some_and(|j| j.reservation.as_deref() == Some(name.as_str())) && !has_it_again(l)
        };
        let inside: Vec<u32> = leaving.iter().filter(is_in).map(|l| l.job).collect();
        let none = JobUpdate {
            reservation: Some(None),
            ..JobUpdate::default()
        };
        if inside.is_empty() {
            return Ok(());
        }
        self.orders.wait_turn(1);
        if let Err(e) = self.world.slurm.update_jobs(&inside, &none) {
            log::debug!("jobs {inside:?}: {e}");
            for job in inside.iter().filter(|_| inside.len() > 1) {
                self.orders.wait_turn(1);
                if let Err(e) = self.world.slurm.update_job(*job, &none) {
                    log::debug!("job {job}: {e}");
                }
            }
        }
        Ok(())
    }

    /// Removes a node's reservation unless a move holds it.
    fn unreserve(&self, node: &str, wait: impl FnOnce()) -> Result<(), String> {
        if self.is_held(node) {
            return Ok(());
        }
        wait();
        let mut changed = locked(&self.places.reserving);
        if self.is_held(node) {
            return Ok(());
        }
        let name = reservation_of(node);
        changed.insert(name.clone(), None);
        match self.world.slurm.delete_reservation(&name) {
            Ok(_) => Ok(()),
            Err(e) => Err(format!("reservation {name} cannot be removed yet: {e}")),
        }
    }

    /// Takes a job out of the reservation that its move was in, which goes with the last one. What the job has been given
    /// since is not touched.
    ///
    /// # Errors
    /// While Slurm refuses or does not answer: to be tried again.
    fn clear_place(&self, job: u32, was: &Hold) -> Result<(), String> {
        let has_it_again = |holds: &BTreeMap<u32, Hold>| holds.get(&job).is_some_and(|h| h.node == was.node);
        if has_it_again(&locked(&self.places.holds)) {
            return Ok(());
        }
        self.out_of_reservation(job, &reservation_of(&was.node));
        self.unreserve(&was.node, || {})
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
            // A move that has just been given its place has not written it down yet.
            let is_used = || {
                let mut held = Vec::from_iter(locked(&self.places.holds).values().map(|h| h.node.clone()));
                held.extend(locked(&self.places.leaving).iter().map(|l| l.was.node.clone()));
                held.extend(self.cluster().moves.values().filter_map(|m| m.held.clone()));
                held.iter().any(|node| reservation_of(node) == name)
            };
            let jobs: Vec<u32> = {
                let cluster = self.cluster();
                let in_it = cluster.jobs.iter().filter(|j| j.reservation.as_deref() == Some(name.as_str()));
                in_it.map(|j| j.id).collect()
            };
            if is_used() {
                continue;
            }
            self.orders.wait_turn(1);
            for job in jobs {
                self.orders.wait_turn(3);
                self.out_of_reservation(job, &name);
            }
            let mut changed = locked(&self.places.reserving);
            if is_used() {
                continue;
            }
            changed.insert(name.clone(), None);
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

/// What of a job decides about places: where it is, and whether it could start with what demands.
type Stand<'a> = (u32, bool, &'a str, &'a [String], &'a [String]);

fn who_is_where(jobs: &[JobBrief], now_s: i64) -> Vec<Stand<'_>> {
    let there = jobs.iter().filter(|j| !j.state.is_finished());
    let mut all: Vec<Stand<'_>> = there
        .map(|j| {
            let starts = placement::could_start(j, now_s);
            (j.id, starts, j.partition.as_str(), j.nodes.as_slice(), j.req_nodes.as_slice())
        })
        .collect();
    all.sort_unstable();
    all
}

fn with_qos(want: Want, seen: &Seen) -> Want {
    let qos = seen.requests.get(&want.job).and_then(|r| r.qos.clone());
    Want { qos, ..want }
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::Arc};

    use super::*;
    use crate::{
        cluster::Alone,
        config::Config,
        effects::{MemoryFiles, SystemClock, World, disks::QemuImg, store::DirStore},
        hypervisor::fake,
        slurm::{FakeSlurm, Slurm},
    };

    #[test]
    fn a_place_that_was_just_given_is_not_swept_before_its_move_has_written_it_down() {
        let state = tempfile::tempdir().unwrap();
        let slurm = Arc::new(FakeSlurm::with_nodes(2));
        let mut config = Config::parse("", Path::new("slurm-vm.toml")).unwrap();
        config.state_dir = state.path().into();
        let world = World {
            clock: Arc::new(SystemClock),
            store: Arc::new(DirStore::new(state.path()).unwrap()),
            files: Arc::new(MemoryFiles::default()),
            disks: Arc::new(QemuImg::default()),
            hypervisor: Arc::new(fake::World::new().node("ctl")),
            slurm: slurm.clone(),
            as_user: Arc::new(crate::effects::MemoryAsUser::default()),
        };
        let c = Controller::new(Arc::new(config), world, Arc::new(Alone));
        let want = Want {
            job: 7,
            user: "alice".into(),
            from: "n1".into(),
            partition: "low".into(),
            qos: None,
            constraint: None,
            exclude: vec![],
            needs: Resources { cpus: 1, mem_mib: 512 },
            wanted: None,
            deadline_ms: None,
        };
        c.take_place(&want, "n2", &[]).unwrap();
        c.sweep_reservations();
        assert!(slurm.reservation("vmmig_n2").unwrap().is_some(), "a VM is on its way there");
        c.give_back(7);
        assert!(slurm.reservation("vmmig_n2").unwrap().is_none(), "nobody is on the way there");
    }
}
