//! The VM is elsewhere: the job follows.
use super::{Effect, Event, JobSeen, Order, OrderError, PART_MS, Phase, Relocation, Reply, Standing, Step, Word};

impl Relocation {
    pub(super) fn moved(&mut self, now_ms: u64, event: Event) -> Vec<Effect> {
        match (self.phase.clone(), event) {
            (Phase::KeptOut | Phase::KeptOutUnclear { .. }, event) => self.kept_out(now_ms, event),
            (_, Event::Poll(None)) => self.job_is_over(),
            (Phase::Look, Event::Poll(Some(_))) => self.look_moved(now_ms),
            (Phase::Parting { .. }, Event::Parted(true)) => vec![],
            (Phase::Parting { .. }, Event::Parted(false)) => self.requeue(),
            (Phase::Parting { until_ms }, Event::Poll(Some(seen))) => match seen.standing {
                // Slurm's delay of requeued jobs keeps it from starting elsewhere until now, the hold from now on.
                Standing::Waiting if self.record.to.is_some() => self.order(Order::Hold),
                Standing::Waiting => self.is_requeued(now_ms),
                _ if now_ms >= until_ms => {
                    let mut effects = vec![Effect::Log("its shim did not end".into())];
                    effects.extend(self.requeue());
                    effects
                }
                _ => vec![],
            },
            (Phase::Ordering(order), Event::Ordered(done)) => match (order, done) {
                // Whether it has come back into the queue the poll shows.
                (_, Ok(())) => {
                    self.phase = Phase::Look;
                    vec![]
                }
                (order, Err(OrderError::NoAnswer(_))) => {
                    self.phase = Phase::OrderAgain(order);
                    vec![]
                }
                (Order::Requeue { .. }, Err(OrderError::Refused(why))) => {
                    // Its VM is elsewhere already: whatever it takes.
                    let mut effects = self.note(format!("Slurm refused to put the job back into the queue: {why}"));
                    effects.extend(self.order(Order::AllowRequeue));
                    effects
                }
                (_, Err(OrderError::Refused(why))) => {
                    self.phase = Phase::Look;
                    vec![Effect::Log(why)]
                }
            },
            (Phase::OrderAgain(_), Event::Poll(Some(_))) => {
                self.phase = Phase::Look;
                self.look_moved(now_ms)
            }
            (_, Event::Poll(Some(_))) => self.kept_out_in_time(now_ms),
            (_, other) => Self::ignored(&other),
        }
    }

    /// What the poll says of a job whose VM is elsewhere.
    pub(super) fn look_moved(&mut self, now_ms: u64) -> Vec<Effect> {
        let Some(seen) = self.seen.clone() else { return vec![] };
        if self.runs_again(&seen) {
            // It was released before the controller was restarted, or has got away.
            return self.is_requeued(now_ms);
        }
        match seen.standing {
            Standing::Waiting => self.is_requeued(now_ms),
            // On its way into the queue; or it was cancelled, and Slurm would requeue it all the same.
            Standing::Completing => self.kept_out_in_time(now_ms),
            Standing::OnNodes => {
                let mut effects = self.take_limit(now_ms, &seen);
                if self.is_late(now_ms) {
                    effects.extend(self.begin_kept_out());
                } else if self.ends_by_itself() {
                    self.phase = Phase::Parting {
                        until_ms: now_ms + PART_MS,
                    };
                    effects.push(Effect::Part);
                } else {
                    effects.extend(self.requeue());
                }
                effects
            }
        }
    }

    /// Slurm keeps whole minutes: a started minute is not taken away. But the seconds are kept here, so that a job that moves
    /// once a minute does not run for ever.
    fn take_limit(&mut self, now_ms: u64, seen: &JobSeen) -> Vec<Effect> {
        let (Some(limit), None) = (seen.limit_min, self.record.limit_min) else {
            return vec![];
        };
        let elapsed_s = (now_ms / 1000).saturating_sub(seen.start_s.unwrap_or(now_ms / 1000));
        let before = self.record.time_before.filter(|t| t.restarts == self.record.restarts);
        // Who has changed the limit since the last move has changed the whole of it by as much.
        let full = before.map_or(limit, |t| t.full_min.saturating_add(limit).saturating_sub(t.set_min).max(1));
        self.record.used_s = before.map_or(0, |t| t.used_s) + elapsed_s;
        let used_min = u32::try_from(self.record.used_s / 60).unwrap_or(u32::MAX);
        self.record.limit_min = Some(full);
        self.record.left_min = Some(full.saturating_sub(used_min).max(1));
        vec![Effect::Persist]
    }

    /// Held, so that it cannot start anywhere before it is steered. A saved VM is restored wherever its job starts: there a
    /// hold would only cost the job its priority.
    fn requeue(&mut self) -> Vec<Effect> {
        let hold = self.record.to.is_some();
        self.order(Order::Requeue { hold })
    }

    fn is_requeued(&mut self, now_ms: u64) -> Vec<Effect> {
        let mut effects = self.enter(Step::Requeued);
        effects.extend(self.look_requeued(now_ms));
        effects
    }

    pub(super) fn requeued(&mut self, now_ms: u64, event: Event) -> Vec<Effect> {
        match (self.phase.clone(), event) {
            (Phase::KeptOut | Phase::KeptOutUnclear { .. }, event) => self.kept_out(now_ms, event),
            (_, Event::Poll(None)) => self.job_is_over(),
            (Phase::Look, Event::Poll(Some(_))) => self.look_requeued(now_ms),
            (Phase::Keeping, Event::PlaceKept(kept)) => {
                let mut effects = match kept {
                    Ok(()) => vec![],
                    // Slurm refuses the steering then, and says so.
                    Err(why) => self.note(format!("its reservation was lost: {why}")),
                };
                effects.extend(self.steer());
                effects
            }
            (Phase::Ordering(order @ Order::Steer { .. }), Event::Ordered(done)) => match done {
                Ok(()) => self.order(Order::Release),
                Err(OrderError::NoAnswer(_)) => {
                    self.phase = Phase::OrderAgain(order);
                    vec![]
                }
                Err(OrderError::Refused(why)) => {
                    // Held for ever is worse than anywhere: it goes on from a save, or starts over.
                    let mut effects = self.note(format!("steer: {why}"));
                    if self.record.to.is_some() {
                        effects.extend(self.begin_kept_out());
                    } else {
                        effects.extend(self.order(Order::Release));
                    }
                    effects
                }
            },
            (Phase::Ordering(Order::Release), Event::Ordered(done)) => match done {
                Ok(()) => match self.record.priority.filter(|_| self.sets_priority) {
                    // The release gave the job a place behind those that came after it.
                    Some(priority) => self.order(Order::Priority(priority)),
                    None => self.is_released(),
                },
                Err(OrderError::NoAnswer(why) | OrderError::Refused(why)) => {
                    self.phase = Phase::OrderAgain(Order::Release);
                    vec![Effect::Log(format!("release: {why}"))]
                }
            },
            // Where priorities cannot be set the job is behind those that came after it.
            (Phase::Ordering(Order::Priority(_)), Event::Ordered(done)) => {
                let mut effects: Vec<Effect> = done
                    .err()
                    .map(|e| Effect::Log(format!("its priority is not what it was: {e:?}")))
                    .into_iter()
                    .collect();
                effects.extend(self.is_released());
                effects
            }
            (Phase::Ordering(Order::Limit(_)), Event::Ordered(done)) => {
                let mut effects: Vec<Effect> = done
                    .err()
                    .map(|e| Effect::Log(format!("its time limit was not put back: {e:?}")))
                    .into_iter()
                    .collect();
                effects.extend(self.steer());
                effects
            }
            (Phase::OrderAgain(order), Event::Poll(Some(seen))) => {
                if self.runs_again(&seen) {
                    self.is_released()
                } else if self.is_late(now_ms) {
                    self.begin_kept_out()
                } else {
                    self.order(order)
                }
            }
            (Phase::Ordering(_) | Phase::Keeping, Event::Poll(Some(_))) => vec![],
            (_, other) => Self::ignored(&other),
        }
    }

    fn look_requeued(&mut self, now_ms: u64) -> Vec<Effect> {
        let Some(seen) = self.seen.clone() else { return vec![] };
        match seen.standing {
            Standing::OnNodes if self.runs_again(&seen) => self.is_released(),
            Standing::OnNodes | Standing::Completing => self.kept_out_in_time(now_ms),
            Standing::Waiting if self.record.held.is_some() => {
                self.phase = Phase::Keeping;
                vec![Effect::KeepPlace]
            }
            Standing::Waiting => self.steer(),
        }
    }

    /// Where its VM is, with what is left of its time.
    fn steer(&mut self) -> Vec<Effect> {
        let live = self.record.to.is_some();
        let req_nodes = self.seen.as_ref().map_or_else(Vec::new, |s| s.req_nodes.clone());
        let limit = if self.record.lost {
            self.record.limit_min
        } else {
            self.record.left_min
        };
        let has = self.seen.as_ref().and_then(|s| s.limit_min);
        let limit_min = limit.filter(|l| Some(*l) != has);
        self.order(Order::Steer {
            reserved: self.record.held.clone().filter(|_| live),
            limit_min,
            req_nodes: if live { req_nodes } else { vec![] },
        })
    }

    fn is_released(&mut self) -> Vec<Effect> {
        let mut effects = self.enter(Step::Released);
        if self.record.to.is_none() {
            effects.extend(self.over_without_vm());
        }
        effects
    }

    /// Saved: wherever Slurm starts it, the prolog finds the save. Nothing is left to do here.
    fn over_without_vm(&mut self) -> Vec<Effect> {
        let line = if self.record.lost {
            format!("the job starts over{}", self.because())
        } else {
            format!("saved and back in the queue{}", self.because())
        };
        self.end(Ok(line))
    }

    pub(super) fn released(&mut self, now_ms: u64, event: Event) -> Vec<Effect> {
        match (self.phase.clone(), event) {
            (Phase::KeptOut | Phase::KeptOutUnclear { .. }, event) => self.kept_out(now_ms, event),
            (_, Event::Poll(None)) => self.job_is_over(),
            (Phase::Ordering(Order::Limit(_)), Event::Ordered(done)) => match done {
                Err(OrderError::NoAnswer(_)) => {
                    self.phase = Phase::OrderAgain(Order::Limit(self.record.limit_min.unwrap_or(0)));
                    vec![]
                }
                Err(OrderError::Refused(why)) => {
                    let mut effects = vec![Effect::Log(format!("its time limit was not put back: {why}"))];
                    effects.extend(self.over_without_vm());
                    effects
                }
                Ok(()) => self.over_without_vm(),
            },
            (Phase::OrderAgain(order @ Order::Limit(_)), Event::Poll(Some(_))) => self.order(order),
            (Phase::Look, Event::Poll(Some(seen))) => {
                let Some(to) = self.record.to.clone() else {
                    return self.released_without_vm();
                };
                if self.runs_again(&seen) {
                    if seen.nodes.contains(&to) {
                        let mut effects = self.enter(Step::Landed);
                        effects.extend(self.landed(Event::Poll(Some(seen))));
                        return effects;
                    }
                    self.record.lost = true;
                    self.record.to = None;
                    let mut effects = vec![Effect::ReleaseVm { node: to.clone() }];
                    effects.extend(self.leave_place());
                    effects.extend(self.note(format!(
                        "Slurm started the job on {} and not on {to}: its VM there was ended",
                        seen.nodes.join(",")
                    )));
                    effects.extend(self.released_without_vm());
                    return effects;
                }
                self.kept_out_in_time(now_ms)
            }
            (_, other) => Self::ignored(&other),
        }
    }

    pub(super) fn landed(&mut self, event: Event) -> Vec<Effect> {
        match event {
            Event::Poll(_) => {
                let to = self.record.to.clone().unwrap_or_default();
                let line = format!("moved from {} to {to}, and runs there", self.record.from);
                self.end(Ok(line))
            }
            other => Self::ignored(&other),
        }
    }

    /// The destination waits from the landing on: so does this, and it acts a little sooner.
    fn is_late(&self, now_ms: u64) -> bool {
        let margin = (self.await_job_ms / 10).clamp(5_000, 30_000).min(self.await_job_ms / 2);
        let until = self.record.moved_ms.unwrap_or(now_ms) + self.await_job_ms - margin;
        self.record.to.is_some() && now_ms >= until
    }

    fn kept_out_in_time(&mut self, now_ms: u64) -> Vec<Effect> {
        if self.is_late(now_ms) { self.begin_kept_out() } else { vec![] }
    }

    /// The job does not come to its VM (a hold, a QOS, a licence, a source that does not let go of it): the VM is saved.
    fn begin_kept_out(&mut self) -> Vec<Effect> {
        let Some(at) = self.record.to.clone() else { return vec![] };
        self.phase = Phase::KeptOut;
        vec![Effect::Save { at }]
    }

    /// The save that was ordered may have been written, or be under way, although it was refused (that of an earlier life of the
    /// controller) or nothing was heard of it: the VM is given up only when its node says so, or says nothing until it would
    /// have ended the VM itself.
    fn kept_out(&mut self, now_ms: u64, event: Event) -> Vec<Effect> {
        let Some(to) = self.record.to.clone() else { return vec![] };
        let is_over = now_ms >= self.record.moved_ms.unwrap_or(now_ms) + self.await_job_ms;
        match (self.phase.clone(), event) {
            (Phase::KeptOut, Event::Answered(Reply::Done(_))) => self.kept_out_until(now_ms, Ok(())),
            (Phase::KeptOut, Event::Answered(Reply::Refused(why))) => self.ask_where_it_waits(to, why, false),
            (Phase::KeptOut, Event::Answered(Reply::NoWord(why))) => self.ask_where_it_waits(to, why, true),
            (Phase::KeptOutUnclear { why, again, asked: false }, Event::Poll(_)) => self.ask_where_it_waits(to, why, again),
            (Phase::KeptOutUnclear { why, again, asked: true }, Event::Source(word)) => match word {
                Word::Saved => self.kept_out_until(now_ms, Ok(())),
                Word::UnderWay | Word::Silence if word == Word::UnderWay || !is_over => {
                    self.phase = Phase::KeptOutUnclear { why, again, asked: false };
                    vec![]
                }
                Word::Stays if again && !is_over => self.begin_kept_out(),
                _ => self.kept_out_until(now_ms, Err(why)),
            },
            (_, other) => Self::ignored(&other),
        }
    }

    fn ask_where_it_waits(&mut self, node: String, why: String, again: bool) -> Vec<Effect> {
        self.phase = Phase::KeptOutUnclear { why, again, asked: true };
        vec![Effect::AskWaiting { node }]
    }

    fn kept_out_until(&mut self, now_ms: u64, saved: Result<(), String>) -> Vec<Effect> {
        let Some(to) = self.record.to.take() else { return vec![] };
        let mut effects = self.leave_place();
        match saved {
            Ok(()) => effects.extend(self.note(format!("Slurm kept the job out of {to}: its VM was saved"))),
            Err(why) => {
                self.record.lost = true;
                effects.push(Effect::ReleaseVm { node: to.clone() });
                effects.extend(self.note(format!("Slurm kept the job out of {to}, and its VM could not be saved: {why}")));
            }
        }
        match self.record.step {
            Step::Planned | Step::Moved => {
                self.phase = Phase::Look;
                effects.extend(self.look_moved(now_ms));
            }
            Step::Requeued => effects.extend(self.steer()),
            Step::Released | Step::Landed => effects.extend(self.released_without_vm()),
        }
        effects
    }

    /// Where the VM is lost the full limit is put back first.
    fn released_without_vm(&mut self) -> Vec<Effect> {
        match self.record.limit_min.filter(|_| self.record.lost) {
            Some(limit) => self.order(Order::Limit(limit)),
            None => self.over_without_vm(),
        }
    }

    /// The job was cancelled or has ended while its VM was under way: no epilog comes for a VM that waits for it.
    fn job_is_over(&mut self) -> Vec<Effect> {
        let nodes = [self.record.to.clone(), Some(self.record.from.clone())];
        let mut effects: Vec<Effect> = nodes.into_iter().flatten().map(|node| Effect::ReleaseVm { node }).collect();
        effects.extend(self.end(Ok("the job ended in the middle of its move; its VM was ended".into())));
        effects
    }

    /// What comes late, early or twice changes nothing.
    fn ignored(event: &Event) -> Vec<Effect> {
        match event {
            Event::Poll(_)
            | Event::Placed(_)
            | Event::Slot
            | Event::Answered(_)
            | Event::Source(_)
            | Event::Ordered(_)
            | Event::Parted(_)
            | Event::PlaceKept(_)
            | Event::GiveUp(_) => vec![],
        }
    }
}
