//! The VM is at its source: the preempt actions in their order.
use slurm_vm_api::{query::MoveView, spec::PreemptWay};

use super::{CANCEL_AGAIN_MS, Effect, Event, JobSeen, MOST_MS, Order, OrderError, Phase, Relocation, Reply, Standing, Step, Word};

impl Relocation {
    pub(super) fn planned(&mut self, now_ms: u64, event: Event) -> Vec<Effect> {
        match (self.phase.clone(), event) {
            (Phase::Look, Event::Poll(_)) if self.resumed => {
                self.resumed = false;
                self.settle(super::RESTARTED.into())
            }
            (Phase::Look, Event::Poll(_)) => self.choose(now_ms),

            (Phase::Placing, Event::Placed(Ok(to))) => {
                self.record.to = Some(to.clone());
                self.record.held = Some(to);
                self.phase = Phase::Queued;
                vec![Effect::Persist]
            }
            (Phase::Placing, Event::Placed(Err(why))) => self.not_live(now_ms, &why),
            (Phase::Queued, Event::Slot) => {
                let Some(to) = self.record.held.clone() else {
                    return self.not_live(now_ms, "its place was lost");
                };
                self.record.moving = true;
                self.phase = Phase::Copying;
                vec![Effect::Persist, Effect::MoveOut { to }]
            }
            (Phase::Queued, Event::Poll(seen)) => {
                if self.give_up_ms(now_ms).is_some_and(|t| now_ms >= t) {
                    self.not_live(now_ms, "other moves took the time")
                } else if let Some(end) = self.job_left(seen.as_ref()) {
                    self.end(end)
                } else {
                    vec![]
                }
            }
            // What the place turns out to be is known soon: then it is seen that the job has left.
            (Phase::Placing, Event::Poll(_)) => vec![],

            (Phase::Copying, Event::Answered(Reply::Done(done))) => {
                self.record.done = Some(*done);
                self.has_moved(now_ms)
            }
            (Phase::Copying, Event::Answered(Reply::Refused(why))) => {
                self.record.moving = false;
                self.not_live(now_ms, &why)
            }
            (Phase::Saving, Event::Answered(Reply::Done(done))) => {
                self.record.done = Some(*done);
                self.is_saved(now_ms)
            }
            (Phase::Saving, Event::Answered(Reply::Refused(why))) => self.next_action(now_ms, format!("not saved: {why}")),
            (Phase::Copying | Phase::Saving, Event::Answered(Reply::NoWord(why))) => self.settle(why),
            // The answer comes when it is over; a deadline is the source's to keep.
            (Phase::Copying | Phase::Saving, Event::Poll(_)) => vec![],
            (Phase::Copying | Phase::Settling { .. }, Event::GiveUp(_)) => {
                // The copy's end is awaited, and no other action begins, nor this one again after a restart of the controller.
                let mut effects = vec![];
                if !self.record.ways.is_empty() {
                    self.record.ways.clear();
                    effects.push(Effect::Persist);
                }
                effects.push(Effect::CancelMove);
                effects
            }
            (Phase::Look | Phase::Placing | Phase::Queued, Event::GiveUp(why)) => self.end(Err(format!("the move was given up: {why}"))),

            (
                Phase::Settling {
                    why,
                    asked: false,
                    cancel_at_ms,
                },
                Event::Poll(_),
            ) => {
                self.phase = Phase::Settling {
                    why,
                    asked: true,
                    cancel_at_ms,
                };
                vec![Effect::AskSource]
            }
            (Phase::Settling { why, cancel_at_ms, .. }, Event::Source(word)) => self.settled(now_ms, why, cancel_at_ms, word),
            (Phase::Settling { .. }, Event::Poll(_)) => vec![],

            (Phase::AskingEnd(order), Event::Source(word)) => {
                // Not a job that has just finished: a requeue would run it again.
                if word == Word::Over {
                    self.end(Ok("the job finished within its grace time".into()))
                } else if matches!(order, Order::Requeue { .. }) && self.ends_by_itself() {
                    self.phase = Phase::Parting {
                        until_ms: now_ms + super::PART_MS,
                    };
                    vec![Effect::Part]
                } else {
                    self.order(order)
                }
            }
            (Phase::AskingEnd(_), Event::Poll(_)) => vec![],
            (Phase::Parting { .. }, Event::Parted(false)) => self.order(Order::Requeue { hold: false }),
            (Phase::Parting { .. }, Event::Parted(true)) => vec![],
            (Phase::Parting { until_ms }, Event::Poll(seen)) => {
                let left = seen
                    .as_ref()
                    .is_none_or(|s| s.standing == Standing::Waiting || s.restarts != self.record.restarts);
                if left {
                    let line = format!("requeued to start over{}", self.because());
                    self.end(Ok(line))
                } else if now_ms >= until_ms {
                    let mut effects = vec![Effect::Log("its shim did not end".into())];
                    effects.extend(self.order(Order::Requeue { hold: false }));
                    effects
                } else {
                    vec![]
                }
            }
            (Phase::Ordering(order), Event::Ordered(done)) => match done {
                Ok(()) => {
                    let line = match order {
                        Order::Cancel => format!("cancelled, as its --vm-preempt says{}", self.because()),
                        _ => format!("requeued to start over{}", self.because()),
                    };
                    self.end(Ok(line))
                }
                Err(OrderError::NoAnswer(_)) => {
                    self.phase = Phase::OrderAgain(order);
                    vec![]
                }
                Err(OrderError::Refused(why)) => {
                    let line = format!("its VM stays on {}: Slurm refused: {why}{}", self.record.from, self.because());
                    self.end(Err(line))
                }
            },
            (Phase::OrderAgain(order), Event::Poll(seen)) => match self.job_left(seen.as_ref()) {
                // The order was carried out although its answer was lost, or the job has ended.
                Some(_) => {
                    let line = format!("requeued to start over{}", self.because());
                    self.end(Ok(line))
                }
                None => self.order(order),
            },
            (Phase::Ordering(_), Event::Poll(_)) => vec![],
            // What comes late, early or twice changes nothing.
            (
                _,
                Event::Poll(_)
                | Event::Placed(_)
                | Event::Slot
                | Event::Answered(_)
                | Event::Source(_)
                | Event::Ordered(_)
                | Event::Parted(_)
                | Event::PlaceKept(_)
                | Event::GiveUp(_),
            ) => vec![],
        }
    }

    /// The job is not there any more in the run that was to move: how the move ends.
    fn job_left(&self, seen: Option<&JobSeen>) -> Option<Result<String, String>> {
        match seen {
            Some(s) if s.restarts != self.record.restarts => Some(Ok("Slurm started the job over before its VM moved".into())),
            Some(s) if s.standing == Standing::OnNodes => None,
            _ => Some(Ok("the job ended before its VM moved".into())),
        }
    }

    /// By when a live move must have begun to end, so that the actions after it still have time.
    fn give_up_ms(&self, now_ms: u64) -> Option<u64> {
        let deadline = self.record.deadline_ms?;
        let half = deadline.saturating_sub(now_ms) / 2;
        Some(deadline.saturating_sub(self.record.reserve_ms.min(half)))
    }

    /// The next action that is left.
    fn choose(&mut self, now_ms: u64) -> Vec<Effect> {
        if let Some(end) = self.job_left(self.seen.clone().as_ref()) {
            return self.end(end);
        }
        let mut effects = Vec::new();
        while let Some(action) = self.record.ways.first().copied() {
            let (never, not_now) = self.seen.as_ref().map_or((None, None), |s| (s.never.clone(), s.not_now.clone()));
            let moves = matches!(action, PreemptWay::Live | PreemptWay::Save);
            if let Some(why) = never.filter(|_| action != PreemptWay::Cancel) {
                let line = format!("its VM stays on {}: {why}", self.record.from);
                effects.push(Effect::TellJob(line.clone()));
                effects.extend(self.end(Err(line)));
                return effects;
            }
            let reservation = self
                .seen
                .as_ref()
                .and_then(|s| s.reservation.clone())
                .filter(|_| action == PreemptWay::Live);
            let reserved = reservation.map(|name| format!("the job runs in reservation {name}, and would lose it"));
            let hindrance = not_now.filter(|_| moves).or(reserved).or_else(|| {
                // Each of its nodes would restore the same guest.
                (moves && self.record.nodes > 1).then(|| format!("the job has {} nodes, only jobs of one node can move", self.record.nodes))
            });
            if let Some(why) = hindrance {
                self.record.ways.remove(0);
                let what = if action == PreemptWay::Live { "live" } else { "saved" };
                effects.extend(self.note(format!("not {what}: {why}")));
                continue;
            }
            match action {
                PreemptWay::Live => {
                    self.phase = Phase::Placing;
                    effects.push(Effect::FindPlace {
                        give_up_ms: self.give_up_ms(now_ms),
                    });
                }
                PreemptWay::Save => {
                    self.phase = Phase::Saving;
                    effects.push(Effect::Save {
                        at: self.record.from.clone(),
                    });
                }
                PreemptWay::Requeue => {
                    self.phase = Phase::AskingEnd(Order::Requeue { hold: false });
                    effects.push(Effect::AskSource);
                }
                PreemptWay::Cancel => {
                    self.phase = Phase::AskingEnd(Order::Cancel);
                    effects.push(Effect::AskSource);
                }
            }
            return effects;
        }
        let line = format!("its VM stays on {}{}", self.record.from, self.because());
        effects.extend(self.end(Err(line)));
        effects
    }

    fn not_live(&mut self, now_ms: u64, why: &str) -> Vec<Effect> {
        self.record.moving = false;
        let mut effects = self.leave_place();
        if !self.record.to_asked {
            self.record.to = None;
        }
        effects.extend(self.next_action(now_ms, format!("not live: {why}")));
        effects
    }

    /// The action at hand came to nothing.
    fn next_action(&mut self, now_ms: u64, why: String) -> Vec<Effect> {
        if !self.record.ways.is_empty() {
            self.record.ways.remove(0);
        }
        self.phase = Phase::Look;
        let mut effects = self.note(why);
        effects.extend(self.choose(now_ms));
        effects
    }

    /// The answer was lost: the source is asked with each poll.
    fn settle(&mut self, why: String) -> Vec<Effect> {
        self.phase = Phase::Settling {
            why,
            asked: true,
            cancel_at_ms: 0,
        };
        vec![Effect::AskSource]
    }

    fn settled(&mut self, now_ms: u64, why: String, cancel_at_ms: u64, word: Word) -> Vec<Effect> {
        let again = |cancel_at_ms| Phase::Settling {
            why: why.clone(),
            asked: false,
            cancel_at_ms,
        };
        match word {
            Word::Gone => {
                if self.record.done.is_none() {
                    self.record.done = Some(MoveView {
                        way: "live".into(),
                        from: self.record.from.clone(),
                        to: self.record.to.clone().unwrap_or_default(),
                        outcome: "done".into(),
                        ..MoveView::default()
                    });
                }
                self.has_moved(now_ms)
            }
            Word::Saved => self.is_saved(now_ms),
            Word::UnderWay => {
                let begun = *self.record.settling_ms.get_or_insert(now_ms);
                let limit = self.record.deadline_ms.unwrap_or(begun + MOST_MS);
                if now_ms >= limit.max(cancel_at_ms) {
                    self.phase = again(now_ms + CANCEL_AGAIN_MS);
                    return vec![
                        Effect::Log("its copy takes longer than it may: it is cancelled".into()),
                        Effect::CancelMove,
                    ];
                }
                self.phase = again(cancel_at_ms);
                vec![]
            }
            Word::Silence => match self.job_left(self.seen.clone().as_ref()) {
                Some(end) => self.end(end),
                None => {
                    self.phase = again(cancel_at_ms);
                    vec![]
                }
            },
            Word::Over | Word::Stays => {
                self.record.moving = false;
                let mut effects = self.leave_place();
                if !self.record.to_asked {
                    self.record.to = None;
                }
                // A restart alone is no reason to leave an action out.
                if self.record.settling_ms.take().is_some() || why != super::RESTARTED {
                    effects.extend(self.next_action(now_ms, why));
                } else {
                    self.phase = Phase::Look;
                    effects.push(Effect::Persist);
                    effects.extend(self.choose(now_ms));
                }
                effects
            }
        }
    }

    fn has_moved(&mut self, now_ms: u64) -> Vec<Effect> {
        self.record.moved_ms = Some(now_ms);
        let mut effects = self.enter(Step::Moved);
        effects.extend(self.look_moved(now_ms));
        effects
    }

    fn is_saved(&mut self, now_ms: u64) -> Vec<Effect> {
        let mut effects = self.leave_place();
        self.record.to = None;
        effects.extend(self.has_moved(now_ms));
        effects
    }

    pub(super) fn ends_by_itself(&self) -> bool {
        self.seen.as_ref().is_some_and(|s| s.ends_by_itself && s.in_grace)
    }
}
