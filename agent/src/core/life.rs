//! The transitions: one exhaustive match over state and event.
use std::path::PathBuf;

use slurm_vm_api::query::MoveView;

use super::record::{Allocation, End, LeavingStage, Life, Plan, ProgramRecord, Record};

/// Why an effect failed, by whose fault it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The request or the image is at fault: trying elsewhere would not help.
    Request(String),
    /// Node, libvirt or agent.
    Node(String),
}

impl From<Failure> for End {
    fn from(f: Failure) -> Self {
        match f {
            Failure::Request(why) => Self::Refused { why },
            Failure::Node(how) => Self::NodeFault { how },
        }
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// [`Effect::Prepare`] ended.
    Prepared(Result<(Allocation, Plan), Failure>),
    /// [`Effect::StartDomain`] ended.
    DomainStarted(Result<(), Failure>),
    /// The guest's helper answered.
    GuestUp {
        /// The kernel's boot id.
        boot_id: String,
    },
    /// The domain is no longer there, or no longer runs, without our doing.
    DomainEnded {
        /// What happened, as a fragment.
        how: String,
    },
    /// Slurm starts (or started) the job on this node.
    JobHere {
        /// Run number minted for it.
        run: u64,
    },
    /// The job has left this node (epilog), or is known to be over.
    Release,
    /// Time passed.
    Tick,
    /// [`Effect::Destroy`] ended.
    Destroyed(Result<(), String>),
    /// Somebody wants the VM on another node.
    MoveOut {
        /// The move.
        move_id: String,
        /// Destination node.
        to: String,
        /// `preemption`, `drain` or `asked`.
        cause: String,
    },
    /// The destination has prepared, or cannot.
    DestinationReady(Result<(), String>),
    /// [`Effect::Migrate`] ended: libvirt has the guest running there, or still here.
    Migrated(Result<Box<MoveView>, String>),
    /// It is not known where the guest runs after a failed migration; asked of both sides.
    OwnerIs {
        /// It runs at the destination.
        there: bool,
    },
    /// The destination has taken over the output offsets.
    HandedOver(Result<(), String>),
    /// Give the move up; the VM goes on here.
    CancelMove,
    /// Destination: the guest runs here now.
    Arrived,
    /// Destination: the source has handed over the output offsets and the history.
    TookOver {
        /// Programs with what was written of their output.
        programs: Vec<ProgramRecord>,
        /// Moves so far, this one included.
        moves: Vec<MoveView>,
    },
    /// Destination: the source gave the move up.
    Abandoned,
    /// Save the VM and let the job be requeued.
    Save {
        /// Directory of the save.
        at: PathBuf,
        /// `preemption`, `drain` or `asked`.
        cause: String,
    },
    /// [`Effect::WriteSave`] ended.
    SaveWritten(Result<Box<MoveView>, String>),
    /// [`Effect::Restore`] ended.
    Restored(Result<Box<MoveView>, String>),
    /// Stop the VM so that the job can start over elsewhere.
    GiveUp,
}

/// What is to be done; each ends in the event named.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Write the record to the ledger before anything that follows.
    Persist,
    /// Read the allocation, check the image, make the overlay: [`Event::Prepared`].
    Prepare,
    /// Create the domain: [`Event::DomainStarted`].
    StartDomain,
    /// Connect to the guest's helper and keep the connection: [`Event::GuestUp`].
    OpenGuest,
    /// Drop the connection.
    CloseGuest,
    /// End the domain if there is one, and remove what belongs to it here: [`Event::Destroyed`].
    Destroy,
    /// Remove what belongs to the VM here while the domain lives elsewhere or in a save.
    Clear,
    /// Tell the sessions.
    Sessions(SessionNews),
    /// A line for `svm log`.
    Journal(String),
    /// Answer who waits for the VM to have left this node.
    AnswerRelease(Result<(), String>),
    /// Ask the destination to prepare: [`Event::DestinationReady`].
    AskDestination,
    /// Copy the VM to the destination: [`Event::Migrated`].
    Migrate,
    /// Stop the copying: the pending [`Event::Migrated`] then fails.
    AbortMigration,
    /// Find out from libvirt here and the destination where the guest runs: [`Event::OwnerIs`].
    AskOwner,
    /// Let shims sync their output, then pass the offsets on: [`Event::HandedOver`].
    HandOver,
    /// Tell the destination to forget the move.
    AbandonDestination,
    /// Answer who asked for the move or the save.
    AnswerMove(Result<Box<MoveView>, String>),
    /// Pause the guest, let shims sync, write memory, overlay and manifest: [`Event::SaveWritten`].
    WriteSave,
    /// Let a paused guest run on.
    ResumeDomain,
    /// Bring the VM back from a save: [`Event::Restored`].
    Restore,
    /// Set the guest's clock.
    SetClock,
}

/// What sessions (shims) are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionNews {
    /// For a terminal.
    Progress(String),
    /// The guest answers: programs may be started.
    Ready,
    /// The VM is no more.
    Lost(End),
    /// Nothing more is to be written: the VM is elsewhere or saved.
    Left,
    /// A save failed and the VM goes on.
    TakeBack,
}

/// One VM.
#[derive(Debug, Clone)]
pub struct Vm {
    /// What the ledger holds.
    pub record: Record,
    /// The job left while the VM could not be stopped yet (a move is under way).
    released: bool,
    /// How often ending the domain has failed.
    destroy_failures: u32,
    /// Arrived by a live move, and the source has not handed over the output offsets yet: until it has (or the job is
    /// here), the guest's output is left in its rings.
    offsets_pending: bool,
}

/// How often ending a domain is tried before the epilog is told.
const DESTROY_ATTEMPTS: u32 = 3;

impl Vm {
    /// A VM that begins here because its job does.
    #[must_use]
    pub fn new(record: Record) -> (Self, Vec<Effect>) {
        let line = format!(
            "run {} of job {} for {}: preparing image {}",
            record.run, record.job, record.user.name, record.spec.image
        );
        (
            Self {
                record,
                released: false,
                destroy_failures: 0,
                offsets_pending: false,
            },
            vec![Effect::Persist, Effect::Journal(line), Effect::Prepare],
        )
    }

    /// A VM that is expected from another node, or comes from a save: `record.life` says which.
    #[must_use]
    pub fn expected(record: Record) -> (Self, Vec<Effect>) {
        let mut effects = vec![Effect::Persist];
        match &record.life {
            Life::Restoring { from } => {
                effects.push(Effect::Journal(format!("restoring from {}", from.display())));
                effects.push(Effect::Restore);
            }
            Life::Arriving { from, .. } => effects.push(Effect::Journal(format!("expecting the VM from {from}"))),
            _ => {}
        }
        (
            Self {
                record,
                released: false,
                destroy_failures: 0,
                offsets_pending: false,
            },
            effects,
        )
    }

    /// A VM found in the ledger when the agent starts. `runs_here`: libvirt has its domain running.
    /// `job_here`: Slurm says that this node runs the job (`None`: Slurm could not be asked).
    #[must_use]
    pub fn recovered(record: Record, domain_here: bool, job_here: Option<bool>) -> (Self, Vec<Effect>) {
        let mut vm = Self {
            record,
            released: false,
            destroy_failures: 0,
            offsets_pending: false,
        };
        let effects = match vm.record.life.clone() {
            Life::Stopped { .. } | Life::Gone { .. } | Life::Saved { .. } => vec![],
            Life::Stopping { .. } => vec![Effect::Destroy],
            _ if job_here == Some(false) && !matches!(vm.record.life, Life::AwaitingJob { .. } | Life::Arriving { .. }) => {
                vm.stop(End::Released)
            }
            Life::Preparing => vec![Effect::Journal("agent restarted: preparing again".into()), Effect::Prepare],
            Life::Booting { .. } | Life::Running | Life::AwaitingJob { .. } if domain_here => {
                vec![Effect::Journal("agent restarted: the domain goes on".into()), Effect::OpenGuest]
            }
            // The intent was recorded and the domain never came, or it ended while no agent looked.
            Life::Booting { .. } => vec![Effect::StartDomain],
            Life::Running | Life::AwaitingJob { .. } => vm.stop(End::GuestLost {
                how: "it ended while the agent was away".into(),
            }),
            Life::Leaving { .. } => vec![
                Effect::Journal("agent restarted in a move: asking who has the guest".into()),
                Effect::AskOwner,
            ],
            Life::Arriving { .. } => {
                if domain_here {
                    vec![Effect::AskOwner]
                } else {
                    vm.stop(End::NotArrived)
                }
            }
            Life::Saving { .. } => {
                if domain_here {
                    vm.record.life = Life::Running;
                    vec![
                        Effect::Persist,
                        Effect::Journal("agent restarted in a save: the guest goes on".into()),
                        Effect::ResumeDomain,
                        Effect::OpenGuest,
                    ]
                } else {
                    vm.stop(End::GuestLost {
                        how: "the agent ended while the guest was being saved".into(),
                    })
                }
            }
            Life::Restoring { .. } => {
                if domain_here {
                    vm.record.life = Life::Running;
                    vec![Effect::Persist, Effect::ResumeDomain, Effect::OpenGuest, Effect::SetClock]
                } else {
                    vec![Effect::Restore]
                }
            }
        };
        (vm, effects)
    }

    fn stop(&mut self, why: End) -> Vec<Effect> {
        let mut effects = Vec::new();
        if let Some((_, line)) = why.verdict() {
            effects.push(Effect::Journal(format!("stopping: {line}")));
        } else {
            effects.push(Effect::Journal("stopping: the job has left".into()));
        }
        self.record.life = Life::Stopping { why: why.clone() };
        effects.insert(0, Effect::Persist);
        effects.push(Effect::CloseGuest);
        effects.push(Effect::Sessions(SessionNews::Lost(why)));
        effects.push(Effect::Destroy);
        effects
    }

    fn run_on(&mut self, line: String) -> Vec<Effect> {
        self.record.life = Life::Running;
        vec![Effect::Persist, Effect::Journal(line)]
    }

    /// Takes an event and says what is to be done, in order. `now_ms` is Unix time in milliseconds.
    pub fn on_event(&mut self, now_ms: u64, await_job_ms: u64, event: Event) -> Vec<Effect> {
        use Effect as Do;
        let life = self.record.life.clone();
        match (life, event) {
            // Preparing and booting.
            (Life::Preparing, Event::Prepared(Ok((allocation, plan)))) => {
                let seconds = u64::from(self.record.spec.boot_timeout_s.unwrap_or(120));
                let line = format!(
                    "starting domain {} with {} vCPUs and {} MiB ({})",
                    self.record.domain(),
                    plan.vcpus,
                    plan.mem_mib,
                    plan.domain_type
                );
                self.record.life = Life::Booting {
                    deadline_ms: now_ms + seconds * 1000,
                };
                self.record.allocation = Some(allocation);
                self.record.plan = Some(plan);
                vec![
                    Do::Persist,
                    Do::Journal(line.clone()),
                    Do::Sessions(SessionNews::Progress(line)),
                    Do::StartDomain,
                ]
            }
            (Life::Preparing, Event::Prepared(Err(failure))) => self.stop(failure.into()),
            (Life::Booting { .. }, Event::DomainStarted(Ok(()))) => vec![Do::Journal("domain started".into()), Do::OpenGuest],
            (Life::Booting { .. }, Event::DomainStarted(Err(failure))) => self.stop(failure.into()),
            (Life::Booting { .. }, Event::GuestUp { boot_id }) => {
                self.record.up_ms = Some(now_ms);
                self.record.boot_id = Some(boot_id);
                let mut effects = self.run_on(format!(
                    "guest is up after {:.1} s",
                    ms_to_s(now_ms.saturating_sub(self.record.created_ms))
                ));
                effects.extend([Do::SetClock, Do::Sessions(SessionNews::Ready)]);
                effects
            }
            (Life::Booting { deadline_ms }, Event::Tick) if now_ms >= deadline_ms => {
                let seconds = u64::from(self.record.spec.boot_timeout_s.unwrap_or(120));
                self.stop(End::BootTimeout { seconds })
            }

            // Running.
            (Life::Running | Life::AwaitingJob { .. } | Life::Leaving { .. }, Event::GuestUp { boot_id }) => {
                if self.record.boot_id.as_ref().is_some_and(|b| *b != boot_id) {
                    return self.stop(End::GuestLost {
                        how: "it was rebooted".into(),
                    });
                }
                self.record.boot_id = Some(boot_id);
                vec![Do::Sessions(SessionNews::Ready)]
            }
            (Life::AwaitingJob { .. }, Event::JobHere { run }) => {
                self.record.run = run;
                let mut effects = self.run_on(format!("run {run}: the job is back with its VM"));
                effects.extend(self.open_guest());
                effects
            }
            (_, Event::JobHere { run }) => {
                self.record.run = run;
                vec![Do::Persist]
            }
            (Life::AwaitingJob { deadline_ms }, Event::Tick) if now_ms >= deadline_ms => self.stop(End::NotReadmitted),

            // Leaving.
            (Life::Running | Life::AwaitingJob { .. }, Event::MoveOut { move_id, to, cause }) => {
                let line = format!("moving to {to} ({cause})");
                self.record.life = Life::Leaving {
                    to,
                    move_id,
                    stage: LeavingStage::Preparing,
                };
                vec![Do::Persist, Do::Journal(line), Do::AskDestination]
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
                    move_id,
                },
                Event::DestinationReady(Ok(())),
            ) => {
                if self.released {
                    let mut effects = vec![Do::AbandonDestination, Do::AnswerMove(Err("the job has ended".into()))];
                    effects.extend(self.stop(End::Released));
                    return effects;
                }
                self.record.life = Life::Leaving {
                    to,
                    move_id,
                    stage: LeavingStage::Copying,
                };
                vec![Do::Persist, Do::Migrate]
            }
            (
                Life::Leaving {
                    stage: LeavingStage::Preparing,
                    to,
                    ..
                },
                Event::DestinationReady(Err(why)),
            ) => self.stay(format!("{to} cannot take the VM: {why}")),
            (
                Life::Leaving {
                    stage: LeavingStage::Copying,
                    to,
                    move_id,
                },
                Event::Migrated(Ok(done)),
            ) => {
                let line = format!("the guest runs on {to} after {:.2} s, {} bytes", done.seconds, done.bytes);
                self.record.moves.push(*done);
                self.record.life = Life::Leaving {
                    to,
                    move_id,
                    stage: LeavingStage::Finishing,
                };
                vec![
                    Do::Persist,
                    Do::Journal(line),
                    Do::CloseGuest,
                    Do::Sessions(SessionNews::Left),
                    Do::HandOver,
                ]
            }
            (
                Life::Leaving {
                    stage: LeavingStage::Copying,
                    ..
                },
                Event::Migrated(Err(why)),
            ) => {
                vec![Do::Journal(format!("the move failed: {why}")), Do::AskOwner]
            }
            (Life::Leaving { to, move_id, .. }, Event::OwnerIs { there: true }) => {
                self.record.life = Life::Leaving {
                    to,
                    move_id,
                    stage: LeavingStage::Finishing,
                };
                vec![Do::Persist, Do::CloseGuest, Do::Sessions(SessionNews::Left), Do::HandOver]
            }
            (Life::Leaving { .. }, Event::OwnerIs { there: false }) => {
                let mut effects = vec![Do::AbandonDestination];
                effects.extend(self.stay("the guest goes on here".into()));
                effects.push(Do::OpenGuest);
                effects
            }
            (
                Life::Leaving {
                    stage: LeavingStage::Finishing,
                    to,
                    ..
                },
                Event::HandedOver(outcome),
            ) => {
                let done = self.record.moves.last().cloned().unwrap_or_default();
                self.record.life = Life::Gone { to: to.clone() };
                self.record.generation += 1;
                let mut effects = vec![Do::Persist];
                if let Err(why) = outcome {
                    effects.push(Do::Journal(format!(
                        "{to} has the guest, but did not confirm the output offsets: {why}"
                    )));
                }
                effects.extend([Do::Clear, Do::AnswerMove(Ok(Box::new(done))), Do::AnswerRelease(Ok(()))]);
                effects
            }
            (Life::Leaving { stage, .. }, Event::CancelMove) if stage != LeavingStage::Finishing => vec![Do::AbortMigration],
            (Life::Leaving { stage, .. }, Event::Release) => {
                self.released = true;
                if stage == LeavingStage::Finishing {
                    vec![]
                } else {
                    vec![Do::AbortMigration]
                }
            }

            // Arriving.
            (Life::Arriving { .. }, Event::Arrived | Event::OwnerIs { there: true }) => self.arrive(now_ms, await_job_ms),
            (Life::Arriving { .. }, Event::TookOver { programs, moves }) => {
                let mut effects = self.arrive(now_ms, await_job_ms);
                effects.extend(self.take_over(programs, moves));
                effects
            }
            (Life::AwaitingJob { .. } | Life::Running, Event::TookOver { programs, moves }) => self.take_over(programs, moves),
            (Life::Arriving { .. }, Event::Abandoned | Event::DomainEnded { .. } | Event::OwnerIs { there: false }) => {
                self.stop(End::NotArrived)
            }

            // Saving and restoring.
            (Life::Running | Life::AwaitingJob { .. }, Event::Save { at, cause }) => {
                let line = format!("saving to {} ({cause})", at.display());
                self.record.life = Life::Saving { at };
                vec![Do::Persist, Do::Journal(line), Do::Sessions(SessionNews::Left), Do::WriteSave]
            }
            (_, Event::Save { .. }) => {
                vec![Do::AnswerMove(Err(format!(
                    "the VM is {} and cannot be saved now",
                    self.record.life.name()
                )))]
            }
            (Life::Saving { at }, Event::SaveWritten(Ok(done))) => {
                let line = format!("saved after {:.2} s, {} bytes", done.seconds, done.bytes);
                self.record.moves.push((*done).clone());
                self.record.life = Life::Saved { at };
                self.record.generation += 1;
                vec![
                    Do::Persist,
                    Do::Journal(line),
                    Do::CloseGuest,
                    Do::Clear,
                    Do::AnswerMove(Ok(done)),
                    Do::AnswerRelease(Ok(())),
                ]
            }
            (Life::Saving { .. }, Event::SaveWritten(Err(why))) => {
                if self.released {
                    return self.stop(End::Released);
                }
                let mut effects = self.run_on(format!("the save failed, the guest goes on: {why}"));
                effects.extend([
                    Do::ResumeDomain,
                    Do::OpenGuest,
                    Do::Sessions(SessionNews::TakeBack),
                    Do::AnswerMove(Err(why)),
                ]);
                effects
            }
            (Life::Saving { .. }, Event::Release) => {
                self.released = true;
                vec![]
            }
            (Life::Restoring { .. }, Event::Restored(Ok(done))) => {
                let line = format!("restored after {:.2} s", done.seconds);
                self.record.moves.push(*done);
                let mut effects = self.run_on(line);
                effects.extend([Do::OpenGuest, Do::SetClock]);
                effects
            }
            (Life::Restoring { .. }, Event::Restored(Err(why))) => self.stop(End::NodeFault {
                how: format!("the saved VM could not be restored: {why}"),
            }),

            // Ending.
            (
                Life::Preparing
                | Life::Booting { .. }
                | Life::Running
                | Life::AwaitingJob { .. }
                | Life::Arriving { .. }
                | Life::Restoring { .. },
                Event::Release,
            ) => self.stop(End::Released),
            (Life::Running | Life::AwaitingJob { .. } | Life::Booting { .. }, Event::GiveUp) => self.stop(End::Requeued),
            (Life::Booting { .. }, Event::DomainEnded { how }) => self.stop(End::BootFailed { how }),
            (Life::Running | Life::AwaitingJob { .. } | Life::Restoring { .. }, Event::DomainEnded { how }) => {
                self.stop(End::GuestLost { how })
            }
            (
                Life::Leaving {
                    stage: LeavingStage::Preparing,
                    ..
                },
                Event::DomainEnded { how },
            ) => {
                let mut effects = vec![Do::AbandonDestination, Do::AnswerMove(Err(format!("the guest was lost: {how}")))];
                effects.extend(self.stop(End::GuestLost { how }));
                effects
            }
            (Life::Stopping { why }, Event::Destroyed(Ok(()))) => {
                self.record.life = Life::Stopped { why };
                self.record.ended_ms = Some(now_ms);
                vec![
                    Do::Persist,
                    Do::Journal("stopped, nothing is left".into()),
                    Do::AnswerRelease(Ok(())),
                ]
            }
            (Life::Stopping { .. }, Event::Destroyed(Err(why))) => {
                self.destroy_failures += 1;
                let mut effects = vec![Do::Journal(format!(
                    "ending the domain failed ({} of {DESTROY_ATTEMPTS}): {why}",
                    self.destroy_failures
                ))];
                if self.destroy_failures >= DESTROY_ATTEMPTS {
                    effects.push(Do::AnswerRelease(Err(format!(
                        "domain {} cannot be ended: {why}",
                        self.record.domain()
                    ))));
                }
                effects
            }
            (Life::Stopping { .. }, Event::Tick) if self.destroy_failures > 0 => vec![Do::Destroy],
            (Life::Gone { .. } | Life::Saved { .. } | Life::Stopped { .. }, Event::Release) => vec![Do::AnswerRelease(Ok(()))],

            // What comes too late, too early or twice changes nothing.
            (
                _,
                Event::Prepared(_)
                | Event::DomainStarted(_)
                | Event::GuestUp { .. }
                | Event::DomainEnded { .. }
                | Event::Release
                | Event::Tick
                | Event::Destroyed(_)
                | Event::DestinationReady(_)
                | Event::Migrated(_)
                | Event::OwnerIs { .. }
                | Event::HandedOver(_)
                | Event::CancelMove
                | Event::Arrived
                | Event::TookOver { .. }
                | Event::Abandoned
                | Event::SaveWritten(_)
                | Event::Restored(_)
                | Event::GiveUp,
            ) => vec![],
        }
    }

    fn stay(&mut self, why: String) -> Vec<Effect> {
        let answer = Effect::AnswerMove(Err(why.clone()));
        if self.released {
            let mut effects = vec![answer];
            effects.extend(self.stop(End::Released));
            return effects;
        }
        let mut effects = self.run_on(why);
        effects.push(answer);
        effects
    }

    fn arrive(&mut self, now_ms: u64, await_job_ms: u64) -> Vec<Effect> {
        self.record.life = Life::AwaitingJob {
            deadline_ms: now_ms + await_job_ms,
        };
        self.record.generation += 1;
        self.offsets_pending = true;
        vec![Effect::Persist, Effect::Journal("the guest runs here; waiting for its job".into())]
    }

    fn take_over(&mut self, programs: Vec<ProgramRecord>, moves: Vec<MoveView>) -> Vec<Effect> {
        for p in programs {
            match self.record.programs.iter_mut().find(|mine| mine.id == p.id) {
                Some(mine) => {
                    mine.wrote = [mine.wrote[0].max(p.wrote[0]), mine.wrote[1].max(p.wrote[1])];
                    mine.ended = mine.ended.take().or(p.ended);
                }
                None => self.record.programs.push(p),
            }
        }
        self.record.moves = moves;
        let mut effects = vec![Effect::Persist];
        effects.extend(self.open_guest());
        effects
    }

    fn open_guest(&mut self) -> Vec<Effect> {
        if std::mem::take(&mut self.offsets_pending) {
            vec![Effect::OpenGuest, Effect::SetClock]
        } else {
            vec![]
        }
    }

    /// How often ending the domain has failed so far.
    #[must_use]
    pub fn destroy_failures(&self) -> u32 {
        self.destroy_failures
    }
}

#[expect(clippy::cast_precision_loss, reason = "a duration for a log line")]
fn ms_to_s(ms: u64) -> f64 {
    ms as f64 / 1000.0
}
