//! Slurm's side of a job on the nodes: prolog, shim and epilog, and what the agent's registry does with them.
use slurm_vm::{
    core::{End, Event, Life, Record, Vm},
    hypervisor::Hypervisor,
    slurm::{FakeEvent, JobId, Slurm},
};
use slurm_vm_api::{session::UserEntry, spec::VmSpec};

use crate::cluster::{Cluster, EPILOG_MS, Message, Mood, domain, plan};

impl Cluster {
    pub fn slurm_events(&mut self) {
        for event in self.slurm.events() {
            match event {
                FakeEvent::Started { job, nodes, restarts } => {
                    let Some(node) = nodes.first().cloned() else { continue };
                    self.say(&format!("job {job} starts on {node} (restarts {restarts})"));
                    if self.vm_jobs.contains_key(&job) {
                        let (delay, epoch) = (self.random.between(1, 60), self.nodes[&node].epoch);
                        // A prolog that finds no agent does without.
                        if self.nodes[&node].alive {
                            self.at(
                                delay,
                                Message::Ensure {
                                    node,
                                    epoch,
                                    job,
                                    tries: 0,
                                },
                            );
                        }
                        self.at(delay + 200, Message::Shim { job, restarts });
                    } else {
                        let last = self.random.between(10_000, 90_000);
                        self.at(last, Message::HighEnds { job, restarts });
                    }
                }
                FakeEvent::Grace { job, .. } => {
                    self.say(&format!("job {job} is preempted"));
                    self.count("preemptions");
                }
                FakeEvent::Ending { job, nodes, next } => {
                    self.say(&format!("job {job} leaves {nodes:?}, then {next:?}"));
                    for node in nodes {
                        if self.vm_jobs.contains_key(&job) {
                            let delay = self.random.between(50, 2_000);
                            self.at(delay, Message::Epilog { node, job });
                        } else {
                            self.slurm.epilog_done(job, &node);
                        }
                    }
                }
            }
        }
    }

    pub fn runs_on(&self, job: JobId, restarts: u32) -> Option<String> {
        // What slurmd and the shim know of themselves, slurmctld or not.
        self.slurm.set_unreachable(false);
        let info = self.slurm.job(job).ok().flatten();
        self.slurm.set_unreachable(self.slurm_away);
        info.filter(|i| i.brief.state.is_on_nodes() && i.brief.restarts == restarts)?
            .brief
            .nodes
            .first()
            .cloned()
    }

    pub fn ensure(&mut self, node: &str, job: u32, tries: u32) {
        let life = self.nodes[node].vms.get(&job).map(|o| (o.vm.record.life.clone(), o.vm.record.run));
        match life {
            Some((life, _))
                if life.is_over_here() || matches!(life, Life::Stopping { .. } | Life::Leaving { .. } | Life::Saving { .. }) =>
            {
                if tries < 600 {
                    let epoch = self.nodes[node].epoch;
                    self.at(
                        200,
                        Message::Ensure {
                            node: node.into(),
                            epoch,
                            job,
                            tries: tries + 1,
                        },
                    );
                }
            }
            Some((_, run)) => self.core(node, job, Event::JobHere { run: run + 1 }),
            None => {
                let run = self.nodes[node].ledger.get(&job).map_or(1, |r| r.run + 1);
                let save = self
                    .saves
                    .iter()
                    .filter(|s| s.job == job && !s.used)
                    .filter_map(|s| s.manifest.clone())
                    .max_by_key(|r| r.generation);
                let (vm, effects) = match save {
                    Some(mut record) => {
                        record.run = run.max(record.run + 1);
                        record.come_to(node);
                        record.generation += 1;
                        record.plan = Some(plan(&record));
                        Vm::expected(record)
                    }
                    None => Vm::new(self.record(node, job, run)),
                };
                self.adopt(node, job, vm, effects);
            }
        }
    }

    pub fn record(&self, node: &str, job: u32, run: u64) -> Record {
        let user = UserEntry {
            name: "alice".into(),
            uid: 2001,
            gid: 2001,
            home: "/home/alice".into(),
            shell: "/bin/sh".into(),
        };
        let spec = VmSpec {
            image: "tiny".into(),
            cpus: None,
            mem_mib: None,
            boot_timeout_s: Some(60),
            preempt: None,
        };
        Record {
            run,
            created_ms: self.now,
            ..Record::new("fake".into(), node.into(), job, user, spec)
        }
    }

    pub fn epilog(&mut self, node: &str, job: u32) {
        let id = self.id();
        self.epilogs.insert(id, (node.into(), job));
        let owner = self.nodes.get_mut(node).filter(|n| n.alive).and_then(|n| n.vms.get_mut(&job));
        let Some(owner) = owner else {
            if !self.nodes[node].alive {
                self.missed.insert((node.into(), job));
            }
            self.epilog_returns(id);
            return;
        };
        owner.releases.push(id);
        self.at(EPILOG_MS, Message::EpilogOver { id });
        self.core(node, job, Event::Release);
    }

    /// It took too long: the domain is ended by force.
    pub fn epilog_over(&mut self, id: u64) {
        let Some((node, job)) = self.epilogs.get(&id).cloned() else {
            return;
        };
        self.say(&format!("{node}: epilog of {job} overruns"));
        self.count("epilogs that overran");
        let _ = self.hypervisors[&node].destroy(&domain(job));
        if let Some(owner) = self.nodes.get_mut(&node).and_then(|n| n.vms.get_mut(&job)) {
            owner.releases.retain(|r| *r != id);
        }
        self.epilog_returns(id);
        self.retire(&node, job);
    }

    pub fn epilog_returns(&mut self, id: u64) {
        if let Some((node, job)) = self.epilogs.remove(&id) {
            self.say(&format!("{node}: epilog of {job} returns"));
            self.slurm.epilog_done(job, &node);
        }
    }

    /// One look of the shim at its VM.
    pub fn shim(&mut self, job: u32, restarts: u32) {
        let Some(node) = self.runs_on(job, restarts) else { return };
        let again = self.random.between(400, 1_200);
        self.at(again, Message::Shim { job, restarts });
        if !self.nodes[&node].alive {
            return;
        }
        let epoch = self.nodes[&node].epoch;
        let over = match self.nodes[&node].vms.get(&job).map(|o| o.vm.record.life.clone()) {
            Some(Life::Running | Life::AwaitingJob { .. }) => {
                let done = self.hypervisors[&node].work(&domain(job)).is_some_and(|w| w >= self.vm_jobs[&job]);
                if done && self.nodes[&node].vms[&job].vm.record.up_ms.is_some() {
                    self.say(&format!("job {job} has done its work"));
                    self.count("jobs finished");
                    self.slurm.exited(job, 0);
                    self.slurm_events();
                }
                return;
            }
            Some(Life::Stopping { why } | Life::Stopped { why }) => why,
            Some(_) => return,
            None => match self.nodes[&node].ledger.get(&job) {
                // The end of an earlier run says nothing about this one.
                // It is elsewhere, and its job follows: no second one here.
                Some(Record {
                    life: Life::Gone { .. } | Life::Saved { .. },
                    ended_ms,
                    ..
                }) if !self.is_older(job, *ended_ms) => return,
                Some(Record {
                    life: Life::Stopped { why },
                    ended_ms,
                    ..
                }) if why.verdict().is_some() && !self.is_older(job, *ended_ms) => why.clone(),
                _ => {
                    // Not announced by the prolog: taken from Slurm.
                    if self.job_here(&node, job) == Some(true) {
                        self.ensure(&node, job, 0);
                    }
                    return;
                }
            },
        };
        match over {
            End::NodeFault { how } => {
                let n = self.faults.entry(job).or_default();
                *n += 1;
                if *n > 20 {
                    self.slurm.exited(job, 125);
                } else {
                    self.say(&format!("job {job}: shim requeues: {how}"));
                    let _ = self.slurm.requeue(job);
                }
                self.slurm_events();
            }
            End::Released | End::NotArrived | End::Requeued => {
                let _ = epoch;
            }
            End::BootTimeout { .. } | End::BootFailed { .. } | End::GuestLost { .. } | End::Refused { .. } | End::NotReadmitted => {
                self.say(&format!("job {job}: shim reports {over:?}"));
                self.count("jobs that lost their guest");
                if self.mood == Mood::Calm {
                    self.counts.insert("lost guests in calm weather", 1);
                }
                self.slurm.exited(job, 123);
                self.slurm_events();
            }
        }
    }

    pub fn is_older(&self, job: u32, ended_ms: Option<u64>) -> bool {
        let start = self
            .slurm
            .job(job)
            .ok()
            .flatten()
            .and_then(|i| i.brief.start_time)
            .and_then(|s| u64::try_from(s).ok());
        matches!((ended_ms, start), (Some(ended), Some(start)) if ended < start * 1000)
    }
}
