//! Slurm's side of a job on the nodes: prolog, shim and epilog, and what the agent's registry does with them.
use slurm_vm::{
    core::{
        End, Event, Life, Vm,
        registry::{Admission, Announced, Begin, Meeting, WithoutVm, is_for_a_later_run, meets, without_vm},
    },
    hypervisor::Hypervisor,
    slurm::{FakeEvent, JobId, Slurm},
    vm::Birth,
};
use slurm_vm_api::{mount, session::UserEntry, spec::VmSpec};

use crate::{
    cluster::{Cluster, EPILOG_MS, Message, Mood, domain},
    rooms::IMAGE,
};

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
                            self.at(delay, Message::Ensure { node, epoch, job });
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
                            let since = self.now + delay;
                            self.at(delay, Message::Epilog { node, job, since });
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

    /// A run of the job is announced, by its prolog or by its shim.
    pub fn ensure(&mut self, node: &str, job: u32) {
        let run = Announced {
            restart: self.restarts(job),
            user: user(),
            spec: spec(),
        };
        for _ in 0..2 {
            let n = &self.nodes[node];
            let vm = match n.registry.announced(job) {
                Begin::Begin { run: number } => return self.begin(node, job, number, &run),
                Begin::Ask { vm, .. } => vm,
            };
            match n.vms.get(&job).map(|o| meets(&o.vm.record, run.user.uid)) {
                Some(Meeting::Goes { run }) => return self.core(node, job, Event::JobHere { run }),
                Some(Meeting::Leaves { .. }) => {
                    let n = self.nodes.get_mut(node);
                    if n.is_some_and(|n| n.registry.waits(job, vm, run.clone())) {
                        return;
                    }
                }
                other => return self.wrong.push(format!("job {job}: {node} has it on record as alive: {other:?}")),
            }
        }
    }

    /// A VM begins, new or from a save.
    pub fn begin(&mut self, node: &str, job: u32, number: u64, run: &Announced) {
        let Some(birth) = self.reach(node, |rooms| rooms.birth(job, number, run.clone())) else {
            return;
        };
        let (vm, effects) = match birth {
            Some(Birth::New(record)) => Vm::new(record),
            Some(Birth::Failed(record, why)) => Vm::failed(record, why),
            Some(Birth::Expected(record)) => Vm::expected(record),
            other => return self.wrong.push(format!("job {job}: on {node} it begins as {other:?}")),
        };
        self.adopt(node, job, vm, effects);
    }

    /// The hook waits for its agent to come back, as long as it would wait for the VM's end.
    pub fn epilog(&mut self, node: &str, job: u32, since: u64) {
        if !self.nodes[node].alive && self.now < since + EPILOG_MS {
            let node = node.to_owned();
            return self.at(500, Message::Epilog { node, job, since });
        }
        let id = self.id();
        self.epilogs.insert(id, (node.into(), job));
        let n = self.nodes.get_mut(node).filter(|n| n.alive);
        let owner = n.and_then(|n| n.registry.released(job).and_then(|job| n.vms.get_mut(&job)));
        let Some(owner) = owner else {
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
        let Some(node) = self.runs_on(job, restarts) else {
            return self.shim_is_killed(job, restarts);
        };
        let again = self.random.between(400, 1_200);
        self.at(again, Message::Shim { job, restarts });
        if !self.nodes[&node].alive {
            return;
        }
        let over = match self.nodes[&node].registry.attaches(job, user().uid) {
            Admission::To(job, _) => {
                let record = &self.nodes[&node].vms[&job].vm.record;
                if is_for_a_later_run(record, restarts) {
                    return;
                }
                let is_up = record.up_ms.is_some();
                match record.life.clone() {
                    Life::Stopping { why } | Life::Stopped { why } => why,
                    _ => {
                        if self.shim_turn(&node, job, restarts) && is_up {
                            self.say(&format!("job {job} has done its work"));
                            self.check_output(job);
                            self.count("jobs finished");
                            self.slurm.exited(job, 0);
                            self.slurm_events();
                        }
                        return;
                    }
                }
            }
            Admission::NotYours => return self.wrong.push(format!("job {job}: {node} takes its shim for another user's")),
            Admission::AskSlurm(last) => {
                let rooms = &self.nodes[&node].rooms;
                let seen = self.slurm.job(job).map_err(|e| e.to_string());
                let seen = seen.map(|info| info.as_ref().map(|info| rooms.job_seen(info)));
                match without_vm(job, &node, user().uid, seen, last.as_deref()) {
                    WithoutVm::Announce => return self.ensure(&node, job),
                    WithoutVm::Left(_) => return,
                    WithoutVm::Refused(..) => match last.map(|r| r.life) {
                        Some(Life::Stopped { why }) if why.verdict().is_some() => why,
                        // In production the shim is told to try elsewhere; here it looks again.
                        _ => return,
                    },
                }
            }
        };
        match over {
            End::NodeFault { how } => {
                self.say(&format!("job {job}: shim requeues: {how}"));
                let tries = self.faults.get(&job).copied().unwrap_or(0);
                if tries > 20 {
                    self.wrong.push(format!("job {job} finds no node where its VM can be: {how}"));
                }
                // It ends all the same while slurmctld is away; then it is asked again.
                if self.slurm.requeue(&[job]).is_ok() {
                    self.faults.insert(job, tries + 1);
                }
                self.slurm_events();
            }
            End::Released | End::NotArrived | End::Requeued => {}
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
}

fn user() -> UserEntry {
    UserEntry {
        name: "alice".into(),
        uid: 2001,
        gid: 2001,
        home: "/home/alice".into(),
        shell: "/bin/sh".into(),
    }
}

fn spec() -> VmSpec {
    VmSpec {
        image: IMAGE.into(),
        cpus: None,
        mem_mib: None,
        boot_timeout_s: Some(60),
        preempt: None,
        mounts: mount::parse_list("/data,/scratch:/in:ro").unwrap(),
        workdir: Some("/data".into()),
        net: None,
        disk_mib: None,
    }
}
