//! What [`Effect`]s do in the simulated cluster: as `agent/src/vm` does it, in two halves with time between them.
use slurm_vm::{
    core::{
        Busy, Effect, Event, Failure, HandOverError, Life, MoveIdentity, MoveQuestion, Record, Vm, Whereabouts,
        locate::{Copy, Search},
        registry::Entry,
        supersede::{Heard, Next, is_superseded, next},
    },
    hypervisor::{DomainState, Hypervisor, HypervisorError, MigrateParams, SaveFormat},
    vm::{moving, prepare, programs::Kept, saving, start, supersede},
};

use crate::cluster::{AWAIT_JOB_MS, Act, Cluster, LibvirtJob, Message, Order, Owner, domain, view};

impl Cluster {
    pub fn carry_out(&mut self, node: &str, job: u32, effects: Vec<Effect>) {
        if let Some(owner) = self.owner(node, job) {
            owner.gate.push(effects);
        }
        while let Some(effect) = self.owner(node, job).and_then(|o| o.gate.next_effect()) {
            self.effect(node, job, effect);
        }
    }

    fn owner(&mut self, node: &str, job: u32) -> Option<&mut Owner> {
        self.nodes.get_mut(node).and_then(|n| n.vms.get_mut(&job))
    }

    fn persist(&mut self, node: &str, job: u32) {
        let now = self.now;
        let Some(n) = self.nodes.get_mut(node) else { return };
        let full = now < n.full_until;
        let Some(owner) = n.vms.get_mut(&job) else { return };
        owner.vm.record.programs = owner.programs.records();
        if full {
            owner.gate.not_written(&owner.vm, now, "no space".into());
            self.count("writes that failed");
        } else {
            owner.gate.written();
            n.ledger.insert(job, owner.vm.record.clone());
        }
    }

    /// As an owner does with each tick.
    pub fn write_again(&mut self, node: &str, job: u32) {
        let now = self.now;
        let Some(owner) = self.owner(node, job).filter(|o| o.gate.is_behind()) else {
            return;
        };
        if owner.gate.is_shut().is_none() {
            self.persist(node, job);
            self.retire(node, job);
            return;
        }
        owner.gate.open();
        self.carry_out(node, job, vec![]);
        let Some(owner) = self.owner(node, job) else { return };
        if owner.gate.give_up(&mut owner.vm, now, AWAIT_JOB_MS) {
            self.say(&format!("{node}: job {job}: given up without a record"));
            self.count("given up without a record");
            self.carry_out(node, job, vec![]);
        }
        while let Some(event) = self.owner(node, job).and_then(|o| o.gate.next_event()) {
            self.core(node, job, event);
        }
        if let Some(owner) = self.owner(node, job).filter(|o| o.gate.is_shut().is_none()) {
            let starts = std::mem::take(&mut owner.unstarted);
            self.send_guest(node, job, starts);
        }
        self.retire(node, job);
    }

    /// What must never be begun before the ledger says so.
    fn check_recorded(&mut self, node: &str, job: u32, effect: &Effect) {
        let acts = matches!(
            Busy::of(effect),
            Some(Busy::Start | Busy::AskDestination | Busy::Migrate | Busy::Save | Busy::Restore)
        );
        let n = &self.nodes[node];
        let (Some(owner), recorded) = (n.vms.get(&job), n.ledger.get(&job)) else {
            return;
        };
        let (is, was) = (owner.vm.record.life.clone(), recorded.map(|r| r.life.clone()));
        if acts && was.as_ref() != Some(&is) {
            self.wrong.push(format!(
                "job {job}: {node} begins {effect:?} as {}, and its ledger says {}",
                is.name(),
                was.map_or("nothing", |w| w.name())
            ));
        }
    }

    fn effect(&mut self, node: &str, job: u32, effect: Effect) {
        self.check_recorded(node, job, &effect);
        let Some(n) = self.nodes.get_mut(node) else { return };
        let epoch = n.epoch;
        let Some(owner) = n.vms.get_mut(&job) else { return };
        let record = owner.vm.record.clone();
        let later = |act| Message::Act {
            node: node.into(),
            epoch,
            job,
            act,
        };
        match effect {
            Effect::Persist => self.persist(node, job),
            Effect::Journal(_) | Effect::SetClock => {}
            Effect::Sessions(news) => self.tell_sessions(node, job, &news),
            Effect::CloseGuest => {
                owner.link = 0;
                self.guest_closed(node, job);
            }
            Effect::OpenGuest => {
                self.guest_closed(node, job);
                self.next_link(node, job);
            }
            Effect::Prepare => self.soon(later(Act::Prepare)),
            Effect::StartDomain => self.soon(later(Act::Start)),
            Effect::Destroy => self.soon(later(Act::Destroy)),
            Effect::ResumeDomain => self.soon(later(Act::Resume)),
            Effect::Pin => self.soon(later(Act::Pin)),
            Effect::AskOwner => self.soon(later(Act::AskOwner)),
            Effect::AskDomain => self.soon(later(Act::AskDomain)),
            Effect::AskJob => self.soon(later(Act::AskJob)),
            Effect::Clear => {
                let _ = self.hypervisors[node].destroy(&domain(job));
                self.reach(node, |rooms| moving::clear_here(rooms, &record));
            }
            Effect::AnswerRelease(_) => {
                for id in std::mem::take(&mut owner.releases) {
                    self.epilog_returns(id);
                }
            }
            Effect::AnswerMove(outcome) => {
                if let Some(id) = owner.move_reply.take() {
                    self.answer(id, outcome.map(drop));
                }
            }
            Effect::AskDestination => {
                let Life::Leaving { to, .. } = &record.life else { return };
                let to = to.clone();
                let import = Message::Import {
                    from: node.into(),
                    epoch,
                    to,
                    record: Box::new(record),
                };
                if self.rough(100) {
                    // Given up by the source, and perhaps carried out by the destination all the same.
                    let (timeout, late) = (self.random.between(5_000, 15_000), self.random.between(1, 20_000));
                    self.at(
                        timeout,
                        Message::Core {
                            node: node.into(),
                            epoch,
                            job,
                            event: Event::DestinationReady(Err("no answer".into())),
                        },
                    );
                    if self.random.permille(500) {
                        self.at(late, import);
                    }
                } else {
                    self.soon(import);
                }
            }
            Effect::Migrate => {
                let Life::Leaving { to, .. } = &record.life else { return };
                let (to, to_epoch) = (to.clone(), n.departures.get(&job).copied());
                self.soon(later(Act::Migrate { to, to_epoch }));
            }
            Effect::AbortMigration => {
                // libvirt has nothing to abort before the job has begun and after it has ended.
                if let Some(aborted) = self.libvirt_jobs.remove(&(node.to_owned(), job)) {
                    self.libvirt_job_failed(node, job, &aborted, "aborted".into());
                }
            }
            Effect::HandOver => {
                let Life::Leaving { to, .. } = &record.life else { return };
                let to = to.clone();
                let kept = self.shims_hand_over(node, job);
                let record = self.nodes[node].vms[&job].vm.record.clone();
                let take_over = Message::TakeOver {
                    from: node.into(),
                    epoch,
                    to,
                    record: Box::new(record),
                    kept,
                };
                // Once more, and perhaps when a later run is there.
                if self.rough(500) {
                    let late = self.random.between(100, 300_000);
                    self.at(late, take_over.clone());
                }
                if self.rough(60) {
                    self.at(
                        3_000,
                        Message::Core {
                            node: node.into(),
                            epoch,
                            job,
                            event: Event::HandedOver(Err(HandOverError::NotNow("no answer".into()))),
                        },
                    );
                } else {
                    self.soon(take_over);
                }
            }
            Effect::Adopt(programs) => {
                programs.iter().for_each(|p| owner.programs.adopt(p));
                self.adopted = true;
            }
            Effect::Keep(output) => self.keep(node, job, &output),
            Effect::AnswerSource(answer) => self.taken = Some(answer),
            Effect::AnswerAsked(answer) => self.answered = Some(answer),
            Effect::AbandonDestination { to, by } => {
                n.departures.remove(&job);
                if !self.rough(100) {
                    self.soon(Message::Abandon { to, job, by });
                }
            }
            Effect::WriteSave => {
                let Life::Saving { at } = &record.life else { return };
                let at = at.clone();
                if let Err(e) = self.hypervisors[node].suspend(&domain(job)) {
                    self.soon(Message::Core {
                        node: node.into(),
                        epoch,
                        job,
                        event: Event::SaveWritten(Err(e.to_string())),
                    });
                    return;
                }
                let kept = self.shims_hand_over(node, job);
                let record = Box::new(self.nodes[node].vms[&job].vm.record.clone());
                self.soon(later(Act::Save { at, record, kept }));
            }
            Effect::Restore => {
                self.soon(later(Act::Restore));
            }
        }
    }

    fn soon(&mut self, message: Message) {
        let delay = self.delay();
        self.at(delay, message);
    }

    fn next_link(&mut self, node: &str, job: u32) {
        let (link, delay) = (self.id(), self.random.between(50, 2_000));
        let Some(n) = self.nodes.get_mut(node) else { return };
        let epoch = n.epoch;
        if let Some(owner) = n.vms.get_mut(&job) {
            owner.link = link;
        }
        self.at(
            delay,
            Message::Act {
                node: node.into(),
                epoch,
                job,
                act: Act::OpenGuest { link },
            },
        );
    }

    fn tell(&mut self, node: &str, epoch: u64, job: u32, event: Event) {
        let delay = self.delay();
        self.at(
            delay,
            Message::Core {
                node: node.into(),
                epoch,
                job,
                event,
            },
        );
    }

    /// The half of an effect that reaches out.
    pub fn act(&mut self, node: &str, epoch: u64, job: u32, act: Act) {
        let hypervisor = self.hypervisors[node].clone();
        let name = domain(job);
        let Some(record) = self.nodes[node].vms.get(&job).map(|o| o.vm.record.clone()) else {
            return;
        };
        let words = |e: HypervisorError| e.to_string();
        match act {
            Act::Prepare => {
                let elsewhere = match self.job_here(node, job) {
                    Some(true) if self.restarts(job) > 0 => self.supersede(node, job),
                    _ => Ok(true),
                };
                if elsewhere == Ok(false) {
                    let node = node.to_owned();
                    let act = Act::Prepare;
                    return self.at(500, Message::Act { node, epoch, job, act });
                }
                let done = if self.job_here(node, job) != Some(true) {
                    Err(Failure::Node("Slurm does not show the job here".into()))
                } else if self.rough(20) {
                    Err(Failure::Node("no space".into()))
                } else if let Err(why) = elsewhere {
                    self.count("starts refused because of a copy");
                    Err(Failure::Node(why))
                } else {
                    let prepared = self.reach(node, |rooms| {
                        let given = prepare::allotted(&rooms.world, &rooms.name, job)?;
                        prepare::prepare(&rooms.world, &rooms.config, rooms.domain_type(), &record, given)
                    });
                    let Some(prepared) = prepared else { return };
                    prepared
                };
                self.tell(node, epoch, job, Event::Prepared(done));
            }
            Act::Start => {
                let Some(done) = self.reach(node, |rooms| start::domain(rooms, &record)) else {
                    return;
                };
                self.count("boots");
                self.tell(node, epoch, job, Event::DomainStarted(done));
            }
            Act::Destroy => {
                self.close_arrivals(node, job);
                let Some(done) = self.reach(node, |rooms| moving::destroy(rooms, &record)) else {
                    return;
                };
                self.tell(node, epoch, job, Event::Destroyed(done));
            }
            Act::Resume => {
                let event = match hypervisor.resume(&name) {
                    Err(_) if matches!(hypervisor.info(&name), Ok(None)) => Event::DomainEnded {
                        how: "its domain is gone".into(),
                    },
                    done => Event::Resumed(done.map_err(words)),
                };
                self.tell(node, epoch, job, event);
            }
            Act::Pin => {
                let given = prepare::allotted(&self.nodes[node].rooms.world, node, job);
                let done = match given {
                    Ok(prepare::Given { allocation, .. }) => hypervisor.pin(&name, &allocation.pinned).map(|()| allocation).map_err(words),
                    Err(Failure::Request(why) | Failure::Node(why)) => Err(why),
                };
                self.tell(node, epoch, job, Event::Pinned(done));
            }
            Act::AskDomain => {
                let here = hypervisor.info(&name).ok().map(|d| d.is_some());
                self.tell(node, epoch, job, Event::DomainIs(here));
            }
            Act::AskJob => {
                let here = self.job_here(node, job);
                self.tell(node, epoch, job, Event::JobIs(here));
            }
            // Who asks is told so where nobody can say it, and asks again in his own time.
            Act::AskOwner => {
                let found = self.find_guest(node, &record);
                self.tell(node, epoch, job, Event::OwnerIs(found));
            }
            Act::OpenGuest { link } => {
                if self.nodes[node].vms.get(&job).is_none_or(|o| o.link != link) {
                    return;
                }
                match hypervisor.info(&name) {
                    Ok(Some(d)) if d.state == DomainState::Running => {
                        let boot_id = format!("boot {}", self.world.boots(record.uuid()));
                        self.core(node, job, Event::GuestUp { boot_id });
                        self.guest_answers(node, job);
                    }
                    // The link tries again as long as it is wanted.
                    _ => self.at(
                        1_000,
                        Message::Act {
                            node: node.into(),
                            epoch,
                            job,
                            act: Act::OpenGuest { link },
                        },
                    ),
                }
            }
            Act::Migrate { to, to_epoch } => {
                let there = &self.nodes[&to];
                let expected = matches!(there.vms.get(&job).map(|o| &o.vm.record.life), Some(Life::Arriving { .. }));
                if to_epoch != Some(there.epoch) || !there.alive || !expected {
                    self.tell(node, epoch, job, Event::Migrated(Err("the destination is not there".into())));
                    return;
                }
                // Some take longer than the destination waits for its job.
                let most = if self.rough(60) { 3 * AWAIT_JOB_MS } else { 20_000 };
                let long = self.random.between(500, most);
                let long = self.copies_take.unwrap_or(long);
                self.libvirt_job(node, job, epoch, Act::Migrate { to, to_epoch }, long);
            }
            Act::Save { at, record, kept } => {
                let long = self.random.between(300, 10_000);
                self.libvirt_job(node, job, epoch, Act::Save { at, record, kept }, long);
            }
            Act::Restore => {
                let Some(done) = self.reach(node, |rooms| saving::restore(rooms, &record)) else {
                    return;
                };
                if let Err(e) = &done {
                    self.say(&format!("{node}: job {job} is not restored: {}", e.why));
                }
                if done.is_ok() {
                    self.count("restores");
                }
                if done.as_ref().is_err_and(|e| e.job_left) {
                    self.tell(node, epoch, job, Event::GiveUp);
                }
                let done = done.map_err(|e| e.why).map(|(done, kept)| {
                    for output in kept {
                        self.keep(node, job, &output.into());
                    }
                    Box::new(done)
                });
                self.tell(node, epoch, job, Event::Restored(done));
            }
        }
    }

    /// A round of questions to the other nodes about what an earlier run has left there; `true` when nothing is waited for any more.
    fn supersede(&mut self, node: &str, job: u32) -> Result<bool, String> {
        let restarts = self.restarts(job);
        let key = (node.to_owned(), job);
        let rooms = self.nodes[node].rooms.clone();
        let (since, asked) = match self.superseding.remove(&key) {
            Some(known) => known,
            None => (self.now, supersede::others(&rooms)?),
        };
        let mut again = Vec::new();
        for other in asked {
            let superseded = |c: &Self| {
                let vm = c.nodes[&other.name].vms.get(&job);
                vm.is_some_and(|o| is_superseded(&o.vm.record, restarts))
            };
            if self.nodes[&other.name].alive && superseded(self) {
                self.count("copies ended because their job started over elsewhere");
                self.core(&other.name, job, Event::Release);
            }
            let heard = match (self.nodes[&other.name].alive, superseded(self)) {
                (false, _) => Heard::Silent("nobody there"),
                (true, true) => Heard::Ending("its end takes time"),
                (true, false) => Heard::Clear,
            };
            match next(heard, self.now - since, supersede::is_well(&rooms, &other)) {
                Next::Clear => {}
                Next::Again => again.push(other),
                Next::Unknown(why) => {
                    self.say(&format!("{node}: job {job}: {}: {why}", other.name));
                    self.count("starts beside a silent agent");
                }
                Next::Refused(why) => return Err(why),
            }
        }
        if again.is_empty() {
            return Ok(true);
        }
        self.superseding.insert(key, (since, again));
        Ok(false)
    }

    /// As an agent does it; what libvirt and the other end say may be late or lost.
    fn find_guest(&mut self, node: &str, record: &Record) -> Whereabouts {
        let Some(search) = Search::of(record) else {
            return Whereabouts::AtSource;
        };
        let here = match self.hypervisors[node].info(&record.domain()) {
            Err(_) => return Whereabouts::Unknown,
            Ok(None) => Copy::None,
            // libvirt tells it at the source only.
            Ok(Some(_)) if self.libvirt_jobs.contains_key(&(node.to_owned(), record.job)) => Copy::Busy,
            Ok(Some(d)) if d.state == DomainState::Running => Copy::Runs,
            Ok(Some(_)) => Copy::Stands,
        };
        if let Some(found) = search.saw(here) {
            return found;
        }
        let mut answer = None;
        if self.nodes[&search.other].alive && !self.rough(150) {
            answer = self.asked(&search.other, record.job, &search.by, search.question);
        }
        if self.rough(100) {
            answer = None;
        }
        search.heard(here, answer)
    }

    /// The answer of the other end of a move; `None`: to be asked again.
    fn asked(&mut self, node: &str, job: u32, by: &MoveIdentity, question: MoveQuestion) -> Option<bool> {
        let runs = self.hypervisors[node]
            .info(&domain(job))
            .ok()?
            .is_some_and(|d| d.state == DomainState::Running);
        if self.nodes[node].vms.contains_key(&job) {
            if self.nodes[node].vms[&job].gate.is_shut().is_some() {
                return None;
            }
            self.answered = None;
            let by = by.clone();
            self.core(
                node,
                job,
                Event::Asked {
                    by: by.clone(),
                    question,
                    runs,
                },
            );
            let answer = self.answered.take()?.ok();
            let may_come = match self.nodes[node].vms.get(&job).map(|o| &o.vm.record.life) {
                Some(Life::Arriving { by: mine, .. }) => *mine == by,
                Some(Life::Stopping { .. }) => true,
                _ => false,
            };
            if (question, answer) == (MoveQuestion::HasCome, Some(false)) && may_come {
                self.wrong.push(format!(
                    "job {job}: {node} says no while the guest could still come by {}",
                    by.move_id
                ));
            }
            return answer;
        }
        match self.nodes[node].registry.get(job) {
            Some(Entry::Over(record)) => question.answer(record, by, false).ok(),
            _ => Some(question.answer_without_record()),
        }
    }

    /// A source hands over its output offsets.
    pub fn take_over(&mut self, to: &str, from: &Record, kept: &[Kept]) -> Result<(), HandOverError> {
        let job = from.job;
        if !self.nodes[to].alive {
            return Err(HandOverError::NotNow(format!("{to} does not answer")));
        }
        let Life::Leaving { by, .. } = &from.life else {
            return Err(HandOverError::NotNow("it is not leaving".into()));
        };
        let Some(guest) = self.nodes[to].vms.get(&job).map(|o| o.vm.record.boot_id.clone()) else {
            return Err(HandOverError::NotThisMove(format!("{to} has no VM")));
        };
        if self.nodes[to].vms[&job].gate.is_shut().is_some() {
            return Err(HandOverError::NotNow(format!("{to} cannot write its ledger")));
        }
        for output in kept.iter().cloned() {
            self.taken = None;
            let (by, output) = (by.clone(), output.into());
            self.core(to, job, Event::Kept { by, output });
            match self.taken.take() {
                Some(Ok(())) => {}
                Some(Err(why)) => return Err(why),
                None => return Err(HandOverError::NotNow(format!("{to} does not answer"))),
            }
        }
        (self.taken, self.adopted) = (None, false);
        self.core(
            to,
            job,
            Event::TookOver {
                by: by.clone(),
                programs: from.programs.clone(),
                moves: from.moves.clone(),
            },
        );
        if self.adopted && guest != from.boot_id {
            let (there, boot) = (guest.unwrap_or_default(), from.boot_id.as_deref().unwrap_or_default());
            self.wrong
                .push(format!("job {job}: on {to} the guest of {there} took the offsets of {boot} over"));
        }
        self.count("hand-overs");
        let taken = self.taken.take();
        if taken.is_none() && self.nodes[to].vms.get(&job).is_some_and(|o| o.gate.is_shut().is_some()) {
            return Err(HandOverError::NotNow(format!("{to} could not write its ledger")));
        }
        let Some(taken) = taken else {
            self.wrong.push(format!("job {job}: {to} does not answer a hand-over"));
            return Ok(());
        };
        if let Err(HandOverError::NotThisMove(why)) = &taken {
            self.say(&format!("{to}: job {job}: a hand-over is refused: {why}"));
            self.count("hand-overs refused");
        }
        taken
    }

    // What libvirt does on its own.

    fn libvirt_job(&mut self, node: &str, job: u32, epoch: u64, act: Act, long: u64) {
        let id = self.id();
        self.libvirt_jobs.insert((node.to_owned(), job), LibvirtJob { id, epoch, act });
        self.at(
            long,
            Message::LibvirtJobEnds {
                node: node.into(),
                job,
                id,
            },
        );
    }

    fn libvirt_job_failed(&mut self, node: &str, job: u32, failed: &LibvirtJob, why: String) {
        let event = match failed.act {
            Act::Migrate { .. } => Event::Migrated(Err(why)),
            _ => Event::SaveWritten(Err(why)),
        };
        self.tell(node, failed.epoch, job, event);
    }

    /// The relay of what is on its way to this node ends with the VM that was expected.
    fn close_arrivals(&mut self, node: &str, job: u32) {
        let on_its_way = |((_, j), l): &(&(String, u32), &LibvirtJob)| *j == job && matches!(&l.act, Act::Migrate { to, .. } if to == node);
        let Some(from) = self.libvirt_jobs.iter().find(on_its_way).map(|((from, _), _)| from.clone()) else {
            return;
        };
        if let Some(closed) = self.libvirt_jobs.remove(&(from.clone(), job)) {
            self.libvirt_job_failed(&from, job, &closed, "the destination has closed the move".into());
        }
    }

    /// A node is gone: nothing comes from it or to it any more.
    pub fn end_migrations_of(&mut self, node: &str) {
        let its = |((from, _), j): &(&(String, u32), &LibvirtJob)| from == node || matches!(&j.act, Act::Migrate { to, .. } if to == node);
        let ended: Vec<(String, u32)> = self.libvirt_jobs.iter().filter(its).map(|(key, _)| key.clone()).collect();
        for key in ended {
            if let Some(broken) = self.libvirt_jobs.remove(&key) {
                self.libvirt_job_failed(&key.0, key.1, &broken, "the line broke".into());
            }
        }
    }

    /// An agent dies, and the relay of its migrations with it; what is on its way may be enough all the same.
    pub fn break_relays(&mut self, node: &str) {
        let broken: Vec<((String, u32), LibvirtJob)> = self
            .libvirt_jobs
            .iter()
            .filter(|((from, _), j)| matches!(&j.act, Act::Migrate { to, .. } if from == node || to == node))
            .map(|(key, j)| (key.clone(), j.clone()))
            .collect();
        for ((from, job), broken) in broken {
            if self.random.permille(700) {
                self.libvirt_jobs.remove(&(from.clone(), job));
                self.libvirt_job_failed(&from, job, &broken, "the line broke".into());
            } else {
                self.at(
                    20,
                    Message::LibvirtJobEnds {
                        node: from,
                        job,
                        id: broken.id,
                    },
                );
            }
        }
    }

    pub fn libvirt_job_ends(&mut self, node: &str, job: u32, id: u64) {
        let key = (node.to_owned(), job);
        if self.libvirt_jobs.get(&key).is_none_or(|j| j.id != id) {
            return;
        }
        let Some(ended) = self.libvirt_jobs.remove(&key) else { return };
        let hypervisor = self.hypervisors[node].clone();
        let name = domain(job);
        let ours = |c: &Cluster| c.nodes[node].alive && c.nodes[node].epoch == ended.epoch;
        match &ended.act {
            Act::Migrate { to, .. } => {
                let params = MigrateParams {
                    libvirt_uri: format!("fake:///{to}"),
                    ..MigrateParams::default()
                };
                let done = hypervisor.migrate(&name, &params);
                self.say(&format!("libvirt: {name} {node} -> {to}: {done:?}"));
                match done {
                    Ok(_) => {
                        self.count("live moves");
                        self.tell(node, ended.epoch, job, Event::Migrated(Ok(Box::new(view(node, to)))));
                    }
                    Err(e) => self.libvirt_job_failed(node, job, &ended, e.to_string()),
                }
            }
            Act::Save { record, kept, .. } if ours(self) => {
                let Some(done) = self.reach(node, |rooms| {
                    saving::save(rooms, record, kept, "preemption").map_err(|e| e.to_string())
                }) else {
                    return;
                };
                if done.is_ok() {
                    self.count("saves");
                }
                self.tell(node, ended.epoch, job, Event::SaveWritten(done.map(Box::new)));
            }
            // Its memory is written, and nobody is there to write the manifest.
            Act::Save { at, .. } => {
                let done = hypervisor.save(&name, &at.join("memory"), SaveFormat::Sparse);
                self.say(&format!("libvirt: {name} saved for nobody: {done:?}"));
            }
            _ => {}
        }
    }

    // Between agents.

    pub fn import(&mut self, from: &str, epoch: u64, to: &str, mut record: Record) {
        let job = record.job;
        let there = &self.nodes[to];
        let refused = if !there.alive {
            Some("nobody there".to_owned())
        } else if let Err(why) = there.registry.expects(job) {
            Some(why)
        } else if self.rough(40) {
            Some("another QEMU".into())
        } else {
            None
        };
        if let Some(why) = refused {
            self.tell(from, epoch, job, Event::DestinationReady(Err(why)));
            return;
        }
        let Life::Leaving { by, .. } = record.life else { return };
        record.life = Life::Arriving {
            from: from.into(),
            by: by.clone(),
        };
        record.come_to(to);
        let (vm, effects) = Vm::expected(record);
        self.adopt(to, job, vm, effects);
        if self.nodes[to].vms[&job].gate.is_shut().is_some() {
            self.core(to, job, Event::Abandoned { by });
            self.tell(from, epoch, job, Event::DestinationReady(Err("no space for its record".into())));
            return;
        }
        let to_epoch = self.nodes[to].epoch;
        if let Some(n) = self.nodes.get_mut(from)
            && n.epoch == epoch
        {
            n.departures.insert(job, to_epoch);
        }
        self.tell(from, epoch, job, Event::DestinationReady(Ok(())));
    }

    /// An order of the controller reaches an agent.
    pub fn order(&mut self, node: &str, job: u32, id: u64, order: Order) {
        if !self.nodes[node].alive {
            self.answer(id, Err("nobody there".into()));
            return;
        }
        let now = self.now;
        let Some(owner) = self.nodes.get_mut(node).and_then(|n| n.vms.get_mut(&job)) else {
            self.answer(id, Err("no such VM".into()));
            return;
        };
        let busy = owner.move_reply.is_some() || owner.gate.is_shut().is_some();
        match order {
            Order::MoveOut { .. } | Order::Save if busy => self.answer(id, Err("another move is under way".into())),
            Order::MoveOut { to } => {
                owner.move_reply = Some(id);
                self.core(
                    node,
                    job,
                    Event::MoveOut {
                        move_id: format!("{job}-{node}-{now}"),
                        to,
                        cause: "preemption".into(),
                    },
                );
            }
            Order::Save => {
                let record = owner.vm.record.clone();
                let at = match self.reach(node, |rooms| saving::fits(rooms, &record)) {
                    None => return self.answer(id, Err("connection lost".into())),
                    Some(Err(why)) => return self.answer(id, Err(why.to_string())),
                    Some(Ok(at)) => at,
                };
                let owner = self.nodes.get_mut(node).and_then(|n| n.vms.get_mut(&job));
                if let Some(owner) = owner {
                    owner.move_reply = Some(id);
                }
                self.core(
                    node,
                    job,
                    Event::Save {
                        at,
                        cause: "preemption".into(),
                    },
                );
            }
            Order::Cancel => self.core(node, job, Event::CancelMove),
            Order::Release => {
                self.core(node, job, Event::Release);
                self.answer(id, Ok(()));
            }
        }
    }
}
