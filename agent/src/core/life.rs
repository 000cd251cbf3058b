//! The transitions: one exhaustive match over state and event.
//!
//! An owner thread feeds it ([`crate::vm`]); it never blocks and never fails. Whatever comes too late, too early or twice
//! changes nothing: an effect's event counts only while that effect is under way ([`Vm::busy`]).
use super::{
    event::{Effect, Event, SessionNews, Whereabouts},
    identity::{HandOverError, MoveIdentity, MoveQuestion},
    machine::{Busy, DESTROY_ATTEMPTS, HAND_OVER_ATTEMPTS, Pinning, RETRY_MOST_MS, RETRY_MS, UNKNOWN_MS, Vm},
    record::{End, LeavingStage, Life},
};

impl Vm {
    /// Takes an event and says what is to be done, in order. `now_ms` is Unix time in milliseconds; `await_job_ms` is how
    /// long a VM waits for what another side owes it: its job, or its own arrival.
    pub fn on_event(&mut self, now_ms: u64, await_job_ms: u64, event: Event) -> Vec<Effect> {
        use Effect as Do;
        if let Event::ClockStepped { by_ms } = event {
            return self.clock_stepped(by_ms);
        }
        // What the other end of a move says or asks goes by the record.
        let is_of_the_other_end = matches!(event, Event::TookOver { .. } | Event::Kept { .. } | Event::Asked { .. });
        if self.unclear.is_some() && !is_of_the_other_end {
            return self.on_event_while_unclear(now_ms, &event);
        }
        match (self.record.life.clone(), event) {
            // Preparing and booting.
            (Life::Preparing, Event::Prepared(done)) if self.ended(Busy::Prepare) => match done {
                Ok((allocation, plan)) => {
                    let line = format!(
                        "starting domain {} with {} vCPUs and {} MiB ({})",
                        self.record.domain(),
                        plan.vcpus,
                        plan.mem_mib,
                        plan.domain_type
                    );
                    self.enter(Life::Booting {
                        deadline_ms: now_ms + self.boot_timeout_s() * 1000,
                    });
                    self.record.allocation = Some(allocation);
                    self.record.plan = Some(plan);
                    self.pinning = Pinning::Done;
                    vec![
                        Do::Persist,
                        Do::Journal(line.clone()),
                        Do::Sessions(SessionNews::Progress(line)),
                        self.begin(Busy::Start),
                    ]
                }
                Err(failure) => self.stop(failure.into()),
            },
            // What a boot that failed has left is gone: the next one begins with a disk of its own.
            (Life::Preparing, Event::Destroyed(done)) if self.ended(Busy::Destroy) => match done {
                Ok(()) => vec![self.begin(Busy::Prepare)],
                Err(how) => self.stop(End::NodeFault {
                    how: format!("what is left of the first boot cannot be removed: {how}"),
                }),
            },
            (Life::Booting { .. }, Event::DomainStarted(done)) if self.ended(Busy::Start) => match done {
                Ok(()) => {
                    // The guest's time begins now; an agent that was restarted may have found an older deadline.
                    self.enter(Life::Booting {
                        deadline_ms: now_ms + self.boot_timeout_s() * 1000,
                    });
                    let mut effects = vec![Do::Persist, Do::Journal("domain started".into()), Do::OpenGuest];
                    effects.extend(self.check_lost(now_ms));
                    effects
                }
                Err(failure) => self.stop(failure.into()),
            },
            (Life::Booting { .. }, Event::GuestUp { boot_id }) if self.busy.is_none() => {
                self.record.up_ms = Some(now_ms);
                self.record.boot_id = Some(boot_id);
                let mut effects = self.go_on(format!(
                    "guest is up after {:.1} s",
                    ms_to_s(now_ms.saturating_sub(self.record.created_ms))
                ));
                effects.extend([Do::SetClock, Do::Sessions(SessionNews::Ready)]);
                effects
            }
            (Life::Booting { .. }, Event::Tick) if self.deadline_is_old => {
                self.enter(Life::Booting {
                    deadline_ms: now_ms + self.boot_timeout_s() * 1000,
                });
                vec![Do::Persist]
            }
            (Life::Booting { deadline_ms }, Event::Tick) if self.busy.is_none() && now_ms >= deadline_ms => {
                self.boot_failed(End::BootTimeout {
                    seconds: self.boot_timeout_s(),
                })
            }

            // Running.
            (Life::Running | Life::AwaitingJob { .. }, Event::GuestUp { boot_id }) => {
                if self.record.boot_id.as_ref().is_some_and(|b| *b != boot_id) {
                    return self.stop(End::GuestLost {
                        how: "it was rebooted".into(),
                    });
                }
                self.record.boot_id = Some(boot_id);
                vec![Do::Sessions(SessionNews::Ready)]
            }
            // The word may be about an earlier domain of that name, so libvirt is asked; and it may get lost, so it is asked anyway.
            (Life::Booting { .. } | Life::Running | Life::AwaitingJob { .. }, Event::DomainEnded { how }) => {
                self.lost = Some(how);
                if self.busy.is_some() { vec![] } else { self.check_lost(now_ms) }
            }
            (Life::Booting { .. } | Life::Running | Life::AwaitingJob { .. }, Event::DomainIs(here)) if self.asking => {
                self.asking = false;
                match here {
                    Some(true) => {
                        self.lost = None;
                        vec![]
                    }
                    Some(false) => {
                        let how = self.lost.take().unwrap_or_else(|| "its domain is gone".into());
                        let never_up = matches!(self.record.life, Life::Booting { .. });
                        if never_up {
                            self.boot_failed(End::BootFailed { how })
                        } else {
                            self.stop(End::GuestLost { how })
                        }
                    }
                    None => vec![],
                }
            }
            (Life::Running | Life::AwaitingJob { .. }, Event::DirectoryLost { dir }) if self.busy.is_none() => self.stop(End::GuestLost {
                how: format!("the process that served its directory {} has ended", dir.display()),
            }),
            // What is under way fails by itself, and the guest is looked for then: libvirt tells of the end of a domain
            // whose start or restore fails, too, and that is no fault of the guest.
            (Life::Leaving { .. } | Life::Saving { .. } | Life::Restoring { .. }, Event::DomainEnded { how }) => {
                self.lost = Some(how);
                vec![]
            }
            // A guest that was rebooted is found out where the move leaves it.
            (Life::Leaving { stage, .. }, Event::GuestUp { boot_id }) if stage != LeavingStage::Finishing => {
                if self.record.boot_id.as_ref().is_none_or(|b| *b == boot_id) {
                    vec![Do::Sessions(SessionNews::Ready)]
                } else {
                    vec![]
                }
            }
            (Life::Running | Life::AwaitingJob { .. }, Event::Resumed(done)) => {
                let known = self.resume_failed;
                self.resume_failed = done.is_err();
                self.retry_at_ms = now_ms + RETRY_MS;
                match done {
                    Err(why) if !known => vec![Do::Journal(format!("the guest cannot be let run on, trying again: {why}"))],
                    _ => vec![],
                }
            }
            (Life::Running | Life::AwaitingJob { .. }, Event::Tick) if self.resume_failed && now_ms >= self.retry_at_ms => {
                self.retry_at_ms = now_ms + RETRY_MS;
                vec![Do::ResumeDomain]
            }
            (Life::AwaitingJob { .. }, Event::JobHere { run }) => {
                self.record.begin_run(run);
                self.pinning = Pinning::NOW;
                self.record.await_until_ms = None;
                let mut effects = self.go_on(format!("run {run}: the job is back with its VM"));
                effects.extend(self.open_guest());
                effects
            }
            (Life::Arriving { .. }, Event::JobHere { run }) => {
                self.record.begin_run(run);
                self.job_here = true;
                vec![Do::Persist]
            }
            (
                Life::Preparing
                | Life::Booting { .. }
                | Life::Running
                | Life::Restoring { .. }
                | Life::Leaving { .. }
                | Life::Saving { .. },
                Event::JobHere { run },
            ) => {
                if self.record.run != run {
                    self.pinning = Pinning::NOW;
                }
                self.record.begin_run(run);
                self.job_unsure = false;
                // A move that fails from here on leaves the VM where its job is.
                self.record.await_until_ms = None;
                vec![Do::Persist]
            }
            (Life::Running | Life::Leaving { .. } | Life::Saving { .. }, Event::Pinned(done)) => self.pinned(now_ms, done),
            (_, Event::Pinned(_)) => {
                self.pinning = Pinning::NOW;
                vec![]
            }
            // The prolog may have been missed: Slurm has the last word.
            (Life::AwaitingJob { deadline_ms }, Event::Tick) if now_ms >= deadline_ms.max(self.retry_at_ms) && !self.asking => {
                vec![self.ask(Do::AskJob)]
            }
            (Life::AwaitingJob { .. }, Event::JobIs(here)) if self.asking => {
                self.asking = false;
                self.retry_at_ms = now_ms + RETRY_MS;
                match here {
                    Some(true) => {
                        self.record.run += 1;
                        let mut effects = self.go_on(format!("run {}: Slurm runs the job here", self.record.run));
                        effects.extend(self.open_guest());
                        effects
                    }
                    Some(false) => self.stop(End::NotReadmitted),
                    None => vec![],
                }
            }

            // Leaving.
            (life @ (Life::Running | Life::AwaitingJob { .. }), Event::MoveOut { move_id, to, cause }) => {
                let line = format!("moving to {to} ({cause})");
                self.leave_with(&life);
                // Fixed now: the run may change while the VM is on its way.
                let by = MoveIdentity {
                    move_id,
                    run: self.record.run,
                    generation: self.record.generation,
                };
                self.enter(Life::Leaving {
                    to,
                    by,
                    stage: LeavingStage::Preparing,
                });
                vec![Do::Persist, Do::Journal(line), self.begin(Busy::AskDestination)]
            }
            (_, Event::MoveOut { .. }) => {
                vec![Do::AnswerMove(Err(format!(
                    "the VM is {} and cannot move now",
                    self.record.life.name()
                )))]
            }
            (
                Life::Leaving {
                    stage: LeavingStage::Preparing,
                    to,
                    by,
                },
                Event::DestinationReady(ready),
            ) if self.ended(Busy::AskDestination) => {
                match ready {
                    Ok(()) if self.then.is_none() && self.lost.is_none() && !self.cancelled => {
                        self.enter(Life::Leaving {
                            to,
                            by,
                            stage: LeavingStage::Copying,
                        });
                        vec![Do::Persist, self.begin(Busy::Migrate)]
                    }
                    Ok(()) => self.stay(to, by, "the move was given up before it began".into(), false),
                    // A refusal may stand for a lost answer: then the destination waits in vain.
                    Err(why) => {
                        let why = format!("{to} cannot take the VM: {why}");
                        self.stay(to, by, why, false)
                    }
                }
            }
            (
                Life::Leaving {
                    stage: LeavingStage::Copying,
                    to,
                    by,
                },
                Event::Migrated(done),
            ) if self.ended(Busy::Migrate) => match done {
                Ok(done) => {
                    let line = format!("the guest runs on {to} after {:.2} s, {} bytes", done.seconds, done.bytes);
                    self.record.moves.push(*done);
                    self.finish(to, by, line)
                }
                Err(why) => {
                    let line = format!("the move failed: {why}");
                    self.move_failed = Some(why);
                    vec![Do::Journal(line), self.ask(Do::AskOwner)]
                }
            },
            (
                Life::Leaving {
                    stage: LeavingStage::Copying,
                    to,
                    by,
                },
                Event::OwnerIs(owner),
            ) if self.asking => {
                self.asking = false;
                let failed = self
                    .move_failed
                    .clone()
                    .map_or_else(|| "the move failed".to_owned(), |why| format!("the move failed: {why}"));
                match owner {
                    Whereabouts::AtDestination => {
                        let line = format!("the guest runs on {to}");
                        self.finish(to, by, line)
                    }
                    Whereabouts::AtSource => self.stay(to, by, format!("{failed}; the guest goes on here"), true),
                    Whereabouts::Nowhere => {
                        self.then.get_or_insert(End::GuestLost {
                            how: "it ended during its move".into(),
                        });
                        self.stay(to, by, "the guest was lost during the move".into(), false)
                    }
                    Whereabouts::Unknown => {
                        self.retry_at_ms = now_ms + RETRY_MS;
                        vec![]
                    }
                }
            }
            (
                Life::Leaving {
                    stage: LeavingStage::Copying,
                    ..
                },
                Event::Tick,
            ) if self.busy.is_some() => {
                if now_ms < self.retry_at_ms || (!self.cancelled && self.then.is_none()) {
                    return vec![];
                }
                self.retry_at_ms = now_ms + RETRY_MS;
                vec![Do::AbortMigration]
            }
            (
                Life::Leaving {
                    stage: LeavingStage::Copying,
                    to,
                    ..
                },
                Event::Tick,
            ) => {
                let since = *self.unknown_since_ms.get_or_insert(now_ms);
                if self.then == Some(End::Released) && now_ms >= since + UNKNOWN_MS {
                    // The job has left, and a copy here may not run again: what became of it only the destination can tell.
                    return self.gone(now_ms, &to, Err("it does not answer".into()));
                }
                if self.asking || now_ms < self.retry_at_ms {
                    vec![]
                } else {
                    vec![self.ask(Do::AskOwner)]
                }
            }
            (
                Life::Leaving {
                    stage: LeavingStage::Finishing,
                    to,
                    ..
                },
                Event::HandedOver(outcome),
            ) if self.ended(Busy::HandOver) => {
                self.failures += 1;
                self.retry_at_ms = now_ms + RETRY_MS;
                match outcome {
                    Err(HandOverError::NotNow(_)) if self.failures < HAND_OVER_ATTEMPTS => vec![],
                    // The guest was there and is over, or the job has begun anew there: here it ends in any case. What it
                    // stands on is not touched, for that is the destination's.
                    outcome => self.gone(now_ms, &to, outcome.map_err(|e| e.why().to_owned())),
                }
            }
            (
                Life::Leaving {
                    stage: LeavingStage::Finishing,
                    ..
                },
                Event::Tick,
            ) if self.busy.is_none() && now_ms >= self.retry_at_ms => {
                vec![self.begin(Busy::HandOver)]
            }
            (Life::Leaving { stage, .. }, Event::CancelMove) if stage != LeavingStage::Finishing => {
                self.cancelled = true;
                self.abort(now_ms, stage)
            }
            (Life::Leaving { stage, .. }, Event::Release) if stage != LeavingStage::Finishing => {
                self.then = Some(End::Released);
                self.abort(now_ms, stage)
            }
            (Life::Leaving { stage, .. }, Event::GiveUp) if stage != LeavingStage::Finishing => {
                self.then.get_or_insert(End::Requeued);
                self.abort(now_ms, stage)
            }
            // Answered when the offsets have been handed over.
            (
                Life::Leaving {
                    stage: LeavingStage::Finishing,
                    ..
                },
                Event::Release,
            ) => vec![],

            // Arriving.
            (Life::Arriving { .. }, Event::Arrived) => self.arrive(now_ms, await_job_ms),
            (life, Event::TookOver { by, programs, moves }) => match self.is_of_our_arrival(&by) {
                Ok(true) => {
                    // First: the record says that it was done.
                    let mut effects = vec![Do::Adopt(programs.clone())];
                    if matches!(life, Life::Arriving { .. }) {
                        effects.extend(self.arrive(now_ms, await_job_ms));
                    }
                    effects.extend(self.take_over(programs, moves));
                    // Not where it is on its way out again before the source's word came.
                    if matches!(self.record.life, Life::AwaitingJob { .. } | Life::Running) {
                        effects.extend(self.open_guest());
                    }
                    effects.push(Do::AnswerSource(Ok(())));
                    effects
                }
                Ok(false) => vec![Do::AnswerSource(Ok(()))],
                Err(why) => vec![Do::AnswerSource(Err(why))],
            },
            (_, Event::Kept { by, output }) => match self.is_of_our_arrival(&by) {
                Ok(true) => vec![Do::Keep(output), Do::AnswerSource(Ok(()))],
                Ok(false) => vec![Do::AnswerSource(Ok(()))],
                Err(why) => vec![Do::AnswerSource(Err(why))],
            },
            (Life::Arriving { by: mine, .. }, Event::Abandoned { by }) if mine == by => self.stop(End::NotArrived),
            (Life::Arriving { .. }, Event::DomainEnded { .. }) => self.stop(End::NotArrived),
            // The source goes by the answer: with "yes" the guest has arrived, and before "no" its arrival is ended.
            (life, Event::Asked { by, question, runs }) => {
                let answer = question.answer(&self.record, &by, runs);
                let mut effects = match (life, question) {
                    (Life::Arriving { by: mine, .. }, MoveQuestion::HasCome) if mine == by => {
                        if runs {
                            self.arrive(now_ms, await_job_ms)
                        } else {
                            self.stop(End::NotArrived)
                        }
                    }
                    _ => vec![],
                };
                effects.push(Do::AnswerAsked(answer));
                effects
            }
            // The source or its word may have been lost: a VM that is waited for in vain would keep its job out.
            (Life::Arriving { .. }, Event::Tick) => {
                let by = *self.arrive_by_ms.get_or_insert(now_ms + await_job_ms);
                if self.asking || (now_ms < by && (self.then.is_none() || now_ms < self.retry_at_ms)) {
                    return vec![];
                }
                self.retry_at_ms = now_ms + RETRY_MS;
                self.arrive_by_ms = Some(now_ms + await_job_ms);
                vec![self.ask(Do::AskOwner)]
            }
            // The disk is the source's until the guest runs here: which of them ends it depends on that.
            (Life::Arriving { .. }, Event::Release) => {
                self.then = Some(End::Released);
                if self.asking { vec![] } else { vec![self.ask(Do::AskOwner)] }
            }
            (Life::Arriving { .. }, Event::OwnerIs(owner)) if self.asking => {
                self.asking = false;
                match owner {
                    Whereabouts::AtDestination => self.arrive(now_ms, await_job_ms),
                    Whereabouts::AtSource | Whereabouts::Nowhere => self.stop(End::NotArrived),
                    Whereabouts::Unknown => {
                        self.retry_at_ms = now_ms + RETRY_MS;
                        self.arrive_by_ms = Some(self.retry_at_ms);
                        vec![]
                    }
                }
            }

            // Saving and restoring.
            (life @ (Life::Running | Life::AwaitingJob { .. }), Event::Save { at, cause }) => {
                let line = format!("saving to {} ({cause})", at.display());
                self.leave_with(&life);
                self.enter(Life::Saving { at });
                vec![
                    Do::Persist,
                    Do::Journal(line),
                    Do::Sessions(SessionNews::Left),
                    self.begin(Busy::Save),
                ]
            }
            (_, Event::Save { .. }) => {
                vec![Do::AnswerMove(Err(format!(
                    "the VM is {} and cannot be saved now",
                    self.record.life.name()
                )))]
            }
            (Life::Saving { at }, Event::SaveWritten(done)) if self.ended(Busy::Save) => match done {
                Ok(done) => {
                    let line = format!("saved after {:.2} s, {} bytes", done.seconds, done.bytes);
                    self.record.moves.push((*done).clone());
                    self.enter(Life::Saved { at });
                    self.then = None;
                    self.record.generation += 1;
                    self.record.ended_ms = Some(now_ms);
                    vec![
                        Do::Persist,
                        Do::Journal(line),
                        Do::CloseGuest,
                        Do::Clear,
                        Do::AnswerMove(Ok(done)),
                        Do::AnswerRelease(Ok(())),
                    ]
                }
                Err(why) => {
                    let answer = Do::AnswerMove(Err(why.clone()));
                    if let Some(end) = self.then.take() {
                        let mut effects = self.stop(end);
                        effects.push(answer);
                        return effects;
                    }
                    let mut effects = self.go_on(format!("the save failed, the guest goes on: {why}"));
                    effects.extend([Do::ResumeDomain, Do::OpenGuest, Do::Sessions(SessionNews::TakeBack), answer]);
                    effects
                }
            },
            // Released while it is being saved: grace has ended, and the save is worth its while.
            (Life::Saving { .. }, Event::Release) => {
                self.then = Some(End::Released);
                vec![]
            }
            (Life::Saving { .. }, Event::GiveUp) => {
                self.then.get_or_insert(End::Requeued);
                vec![Do::AbortMigration]
            }
            (Life::Saving { .. }, Event::CancelMove) => vec![Do::AbortMigration],
            (Life::Restoring { .. }, Event::Restored(done)) if self.ended(Busy::Restore) => match done {
                Ok(done) => {
                    let line = format!("restored after {:.2} s", done.seconds);
                    self.record.moves.push(*done);
                    let mut effects = self.go_on(line);
                    effects.extend([Do::OpenGuest, Do::SetClock]);
                    effects
                }
                Err(why) => self.stop(End::NodeFault {
                    how: format!("the saved VM could not be restored: {why}"),
                }),
            },

            // Ending.
            (
                Life::Preparing | Life::Booting { .. } | Life::Running | Life::AwaitingJob { .. } | Life::Restoring { .. },
                Event::Release,
            ) => self.stop(End::Released),
            (Life::Preparing | Life::Booting { .. } | Life::Running | Life::AwaitingJob { .. } | Life::Restoring { .. }, Event::GiveUp) => {
                self.stop(End::Requeued)
            }
            // What was under way when the VM was ended has come to its end: now nothing can come up any more.
            (Life::Stopping { .. }, Event::Prepared(_)) if self.ended(Busy::Prepare) => vec![self.begin(Busy::Destroy)],
            (Life::Stopping { .. }, Event::DomainStarted(_)) if self.ended(Busy::Start) => vec![self.begin(Busy::Destroy)],
            (Life::Stopping { .. }, Event::Restored(_)) if self.ended(Busy::Restore) => vec![self.begin(Busy::Destroy)],
            (Life::Stopping { why }, Event::Destroyed(done)) if self.ended(Busy::Destroy) => match done {
                Ok(()) => {
                    self.enter(Life::Stopped { why });
                    self.record.ended_ms = Some(now_ms);
                    vec![
                        Do::Persist,
                        Do::Journal("stopped, nothing is left".into()),
                        Do::AnswerRelease(Ok(())),
                    ]
                }
                Err(how) => {
                    self.failures += 1;
                    self.retry_at_ms = now_ms + (RETRY_MS << self.failures.min(6)).min(RETRY_MOST_MS) / 4;
                    let mut effects = vec![Do::Journal(format!("ending the domain failed (attempt {}): {how}", self.failures))];
                    if self.failures >= DESTROY_ATTEMPTS {
                        effects.push(Do::AnswerRelease(Err(format!(
                            "domain {} cannot be ended: {how}",
                            self.record.domain()
                        ))));
                    }
                    effects
                }
            },
            (Life::Stopping { .. }, Event::Tick) if self.busy.is_none() && now_ms >= self.retry_at_ms => vec![self.begin(Busy::Destroy)],
            (Life::Gone { .. } | Life::Saved { .. } | Life::Stopped { .. }, Event::Release) => vec![Do::AnswerRelease(Ok(()))],

            (Life::Booting { .. } | Life::Running | Life::AwaitingJob { .. }, Event::Tick) => {
                self.look(now_ms).into_iter().chain(self.pin(now_ms)).collect()
            }
            (Life::Booting { .. } | Life::Running, Event::JobIs(here)) if self.asking => {
                self.asking = false;
                self.job_unsure &= here.is_none();
                if here == Some(false) { self.stop(End::Released) } else { vec![] }
            }

            (_, Event::NotRecorded { why, waits }) => waits.map_or_else(Vec::new, |waits| self.not_recorded(&why, waits)),

            // What comes too late, too early or twice changes nothing.
            (
                _,
                Event::Prepared(_)
                | Event::DomainStarted(_)
                | Event::GuestUp { .. }
                | Event::DomainEnded { .. }
                | Event::DirectoryLost { .. }
                | Event::JobHere { .. }
                | Event::Release
                | Event::Tick
                | Event::Destroyed(_)
                | Event::DestinationReady(_)
                | Event::Migrated(_)
                | Event::OwnerIs(_)
                | Event::DomainIs(_)
                | Event::JobIs(_)
                | Event::HandedOver(_)
                | Event::CancelMove
                | Event::Arrived
                | Event::Abandoned { .. }
                | Event::SaveWritten(_)
                | Event::Restored(_)
                | Event::Resumed(_)
                | Event::GiveUp
                | Event::ClockStepped { .. },
            ) => vec![],
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a duration for a log line")]
pub(super) fn ms_to_s(ms: u64) -> f64 {
    ms as f64 / 1000.0
}
