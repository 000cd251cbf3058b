//! A plain model of the controller's protocol: reserve, move or save, requeuehold, steer, release; each step is put on
//! record before the next, and a restart goes on from there.
use std::collections::BTreeMap;

use slurm_vm::{
    core::Life,
    slurm::{JobBrief, JobUpdate, ReservationNodes, ReservationSpec, Slurm},
};

use crate::cluster::{AWAIT_JOB_MS, Cluster, Message, Order};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Planned,
    Moved,
    Requeued,
    Released,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Live,
    Save,
    Requeue,
}

#[derive(Debug, Clone)]
pub struct Move {
    from: String,
    to: Option<String>,
    ways: Vec<Way>,
    step: Step,
    restarts: u32,
    /// The order that is out. Forgotten at a restart, as is `since`.
    waiting: Option<u64>,
    since: u64,
    /// What became of the last order is to be seen at the source.
    unsettled: bool,
}

#[derive(Debug)]
pub struct Controller {
    pub alive: bool,
    pub epoch: u64,
    /// On record: what a restart finds.
    pub moves: BTreeMap<u32, Move>,
    answers: BTreeMap<u64, Result<(), String>>,
}

impl Default for Controller {
    fn default() -> Self {
        Self {
            alive: true,
            epoch: 1,
            moves: BTreeMap::new(),
            answers: BTreeMap::new(),
        }
    }
}

impl Controller {
    pub fn kill(&mut self) {
        self.alive = false;
        self.epoch += 1;
        self.answers.clear();
    }

    pub fn restart(&mut self) {
        self.alive = true;
        for m in self.moves.values_mut() {
            m.waiting = None;
            m.unsettled = true;
        }
    }

    pub fn answered(&mut self, id: u64, epoch: u64, outcome: Result<(), String>) {
        if self.alive && self.epoch == epoch {
            self.answers.insert(id, outcome);
        }
    }
}

fn reservation(job: u32) -> String {
    format!("vmmig_{job}")
}

impl Cluster {
    /// Begins a move of a job's VM unless one is under way.
    pub fn ask_move(&mut self, job: u32, cause: &str) {
        let brief = self.slurm.job(job).ok().flatten().map(|i| i.brief);
        let Some(brief) = brief.filter(|b| b.state.is_on_nodes() && self.controller.alive) else {
            return;
        };
        let Some(from) = brief.nodes.first().cloned() else { return };
        if self.controller.moves.contains_key(&job) {
            return;
        }
        let ways = if cause == "asked" {
            vec![Way::Live]
        } else {
            match self.random.next() % 4 {
                0 => vec![Way::Save, Way::Requeue],
                1 => vec![Way::Live, Way::Requeue],
                _ => vec![Way::Live, Way::Save, Way::Requeue],
            }
        };
        self.say(&format!("controller: job {job} is to leave {from} ({cause}): {ways:?}"));
        let m = Move {
            from,
            to: None,
            ways,
            step: Step::Planned,
            restarts: brief.restarts,
            waiting: None,
            since: self.now,
            unsettled: false,
        };
        self.controller.moves.insert(job, m);
    }

    pub fn controller_tick(&mut self) {
        if !self.controller.alive {
            return;
        }
        let Ok(poll) = self.slurm.jobs_poll() else { return };
        let victims: Vec<u32> = poll
            .iter()
            .filter(|j| j.in_grace() && self.vm_jobs.contains_key(&j.id))
            .map(|j| j.id)
            .collect();
        for job in victims {
            self.ask_move(job, "preemption");
        }
        for job in self.controller.moves.keys().copied().collect::<Vec<_>>() {
            let brief = poll.iter().find(|j| j.id == job).cloned();
            if self.go_on(job, brief).is_none() {
                self.controller.moves.remove(&job);
            }
        }
        self.sweep(&poll);
        self.slurm_events();
    }

    /// Saves and reservations of jobs that are over.
    fn sweep(&mut self, poll: &[JobBrief]) {
        let over = |job: u32| !poll.iter().any(|j| j.id == job);
        self.saves.retain(|s| !over(s.job));
        for job in self.vm_jobs.keys().copied().collect::<Vec<_>>() {
            if over(job) && !self.controller.moves.contains_key(&job) {
                let _ = self.slurm.delete_reservation(&reservation(job));
            }
        }
    }

    fn order_out(&mut self, node: &str, job: u32, order: Order) -> u64 {
        let id = self.id();
        let delay = self.delay();
        self.say(&format!("controller: {order:?} of {job} to {node}"));
        self.at(
            delay,
            Message::Order {
                node: node.into(),
                job,
                id,
                order,
            },
        );
        id
    }

    /// One look at one move; `None` when it is over.
    fn go_on(&mut self, job: u32, brief: Option<JobBrief>) -> Option<()> {
        let mut m = self.controller.moves.get(&job)?.clone();
        let Some(brief) = brief else {
            self.say(&format!("controller: job {job} is over"));
            for node in [Some(m.from.clone()), m.to.clone()].into_iter().flatten() {
                self.order_out(&node, job, Order::Release);
            }
            self.unreserve(job);
            return None;
        };
        let outcome = self.step(job, &mut m, &brief);
        if outcome.is_some() {
            self.controller.moves.insert(job, m);
        }
        outcome
    }

    fn step(&mut self, job: u32, m: &mut Move, brief: &JobBrief) -> Option<()> {
        match m.step {
            Step::Planned => {
                if m.unsettled {
                    // Where the VM is its source knows best.
                    if !self.nodes[&m.from].alive {
                        return Some(());
                    }
                    match self.nodes[&m.from].ledger.get(&job).map(|r| r.life.clone()) {
                        Some(Life::Gone { to }) if m.to.as_ref() == Some(&to) => m.step = Step::Moved,
                        Some(Life::Saved { .. }) => {
                            self.unreserve(job);
                            m.to = None;
                            m.step = Step::Moved;
                        }
                        Some(Life::Leaving { .. } | Life::Saving { .. }) => return Some(()),
                        _ => {
                            self.unreserve(job);
                            m.to = None;
                        }
                    }
                    m.unsettled = false;
                    return Some(());
                }
                if let Some(id) = m.waiting {
                    match self.controller.answers.remove(&id) {
                        None if self.now < m.since + 90_000 => return Some(()),
                        None => m.unsettled = true,
                        Some(Ok(())) => {
                            m.step = Step::Moved;
                            m.since = self.now;
                        }
                        Some(Err(why)) => {
                            self.say(&format!("controller: job {job}: {why}"));
                            m.unsettled = true;
                            m.ways.remove(0);
                        }
                    }
                    m.waiting = None;
                    return Some(());
                }
                if !brief.state.is_on_nodes() || brief.restarts != m.restarts {
                    self.unreserve(job);
                    return None;
                }
                match m.ways.first() {
                    None => {
                        self.unreserve(job);
                        return None;
                    }
                    Some(Way::Live) => {
                        let spec = ReservationSpec {
                            name: reservation(job),
                            nodes: ReservationNodes::Count(1),
                            partition: Some("low".into()),
                            features: Some("vm".into()),
                            users: vec!["alice".into()],
                        };
                        match self.slurm.create_reservation(&spec).map(|r| r.nodes) {
                            Ok(nodes) if nodes.first().is_some_and(|n| *n != m.from) => {
                                let to = nodes[0].clone();
                                m.to = Some(to.clone());
                                m.since = self.now;
                                m.waiting = Some(self.order_out(&m.from, job, Order::MoveOut { to }));
                            }
                            _ => {
                                m.ways.remove(0);
                            }
                        }
                    }
                    Some(Way::Save) => {
                        m.to = None;
                        m.since = self.now;
                        m.waiting = Some(self.order_out(&m.from, job, Order::Save));
                    }
                    Some(Way::Requeue) => {
                        if self.random.permille(500) {
                            self.order_out(&m.from, job, Order::GiveUp);
                        }
                        self.say(&format!("controller: requeue {job}"));
                        let _ = self.slurm.requeue(job);
                        return None;
                    }
                }
            }
            Step::Moved => {
                if brief.restarts == m.restarts && !brief.state.is_waiting() {
                    self.say(&format!("controller: requeuehold {job}"));
                    let _ = self.slurm.requeuehold(job);
                }
                if brief.state.is_waiting() || (brief.restarts > m.restarts && brief.state.is_on_nodes()) {
                    m.step = Step::Requeued;
                }
            }
            Step::Requeued => {
                if brief.state.is_waiting() {
                    let update = JobUpdate {
                        reservation: m.to.as_ref().map(|_| Some(reservation(job))),
                        start_now: true,
                        ..JobUpdate::default()
                    };
                    if self.slurm.update_job(job, &update).is_err()
                        && m.to.is_some()
                        && self.slurm.reservation(&reservation(job)).is_ok_and(|r| r.is_some())
                    {
                        return Some(());
                    }
                    if self.slurm.release(job).is_err() {
                        return Some(());
                    }
                }
                m.since = self.now;
                m.step = Step::Released;
            }
            Step::Released => {
                let to = m.to.clone()?;
                if brief.state.is_on_nodes() {
                    if !brief.nodes.contains(&to) {
                        self.order_out(&to, job, Order::Release);
                    }
                    self.unreserve(job);
                    return None;
                }
                if self.now > m.since + AWAIT_JOB_MS - 5_000 {
                    self.say(&format!("controller: job {job} is kept out of {to}"));
                    let order = if self.random.permille(700) { Order::Save } else { Order::Release };
                    self.order_out(&to, job, order);
                    self.unreserve(job);
                    return None;
                }
            }
        }
        Some(())
    }

    fn unreserve(&mut self, job: u32) {
        let update = JobUpdate {
            reservation: Some(None),
            ..JobUpdate::default()
        };
        let _ = self.slurm.update_job(job, &update);
        let _ = self.slurm.delete_reservation(&reservation(job));
    }
}
