//! From libvirt's numbers to our events, and on to the subscribers.
#![forbid(unsafe_code)]

use super::{
    callbacks::Raw,
    ffi::{Values, sys},
};
use crate::hypervisor::{DomainEvent, DomainState, StateReason, StopReason};
use crossbeam_channel::{Receiver, Sender, unbounded};
use std::{
    collections::HashMap,
    ffi::c_int,
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use uuid::Uuid;

/// Hands events to all who subscribed. Fed by the event thread and the links' threads; never blocks them.
#[derive(Debug, Default)]
pub(super) struct Hub {
    subscribers: Mutex<Vec<Sender<DomainEvent>>>,
    /// Whether the connection was up before: the first time is not "back".
    was_up: AtomicBool,
    /// The migrations and saves under way.
    jobs: Mutex<HashMap<Uuid, Job>>,
    job_done: Condvar,
}

/// A migration or save under way.
#[derive(Debug, Default)]
struct Job {
    /// Its final numbers.
    values: Option<Values>,
    /// Whether we have asked for its end.
    aborted: bool,
}

impl Hub {
    /// A new subscription.
    pub(super) fn subscribe(&self) -> Receiver<DomainEvent> {
        let (sender, receiver) = unbounded();
        self.subscribers.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        receiver
    }

    fn publish(&self, event: &DomainEvent) {
        self.subscribers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|s| s.send(event.clone()).is_ok());
    }

    /// The control connection came or went.
    pub(super) fn connection(&self, up: bool) {
        if !up {
            self.publish(&DomainEvent::ConnectionLost);
        } else if self.was_up.swap(true, Ordering::SeqCst) {
            self.publish(&DomainEvent::ConnectionBack);
        }
    }

    /// Something that libvirt told.
    pub(super) fn raw(&self, raw: Raw) {
        match raw {
            Raw::JobCompleted { uuid, values } => {
                // Also told at a destination: only what was asked for is kept.
                if let Some(job) = self.lock_jobs().get_mut(&uuid) {
                    job.values = Some(values);
                    self.job_done.notify_all();
                }
            }
            other => {
                if let Some(event) = translate(other) {
                    self.publish(&event);
                }
            }
        }
    }

    fn lock_jobs(&self) -> MutexGuard<'_, HashMap<Uuid, Job>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A job begins on this domain.
    pub(super) fn expect(&self, uuid: Uuid) {
        self.lock_jobs().insert(uuid, Job::default());
    }

    /// The job on this domain is being aborted by us.
    pub(super) fn abort(&self, uuid: Uuid) {
        if let Some(job) = self.lock_jobs().get_mut(&uuid) {
            job.aborted = true;
        }
    }

    /// The numbers of the job; they may come a little after its end. `None`: they did not come.
    pub(super) fn completed(&self, uuid: Uuid, patience: Duration) -> Option<Values> {
        let deadline = Instant::now() + patience;
        let mut jobs = self.lock_jobs();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || jobs.get(&uuid).is_none_or(|job| job.values.is_some()) {
                return jobs.remove(&uuid).and_then(|job| job.values);
            }
            jobs = self.job_done.wait_timeout(jobs, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The job has ended and its numbers are not wanted. `true`: it was aborted by us.
    pub(super) fn forget(&self, uuid: Uuid) -> bool {
        self.lock_jobs().remove(&uuid).is_some_and(|job| job.aborted)
    }
}

/// libvirt's enumerations are unsigned here and signed in its answers.
fn code(number: c_int) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// State and reason in our terms.
pub(super) fn state(state: c_int, reason: c_int) -> (DomainState, StateReason) {
    let other = StateReason::Other(reason);
    match code(state) {
        sys::virDomainState_VIR_DOMAIN_RUNNING | sys::virDomainState_VIR_DOMAIN_BLOCKED => (
            DomainState::Running,
            match code(reason) {
                sys::virDomainRunningReason_VIR_DOMAIN_RUNNING_BOOTED => StateReason::Booted,
                sys::virDomainRunningReason_VIR_DOMAIN_RUNNING_MIGRATED => StateReason::Migrated,
                sys::virDomainRunningReason_VIR_DOMAIN_RUNNING_RESTORED => StateReason::Restored,
                sys::virDomainRunningReason_VIR_DOMAIN_RUNNING_UNPAUSED => StateReason::Unpaused,
                sys::virDomainRunningReason_VIR_DOMAIN_RUNNING_MIGRATION_CANCELED => StateReason::MigrationCanceled,
                sys::virDomainRunningReason_VIR_DOMAIN_RUNNING_SAVE_CANCELED => StateReason::SaveCanceled,
                _ => other,
            },
        ),
        sys::virDomainState_VIR_DOMAIN_PAUSED => (
            DomainState::Paused,
            match code(reason) {
                sys::virDomainPausedReason_VIR_DOMAIN_PAUSED_USER => StateReason::User,
                sys::virDomainPausedReason_VIR_DOMAIN_PAUSED_MIGRATION => StateReason::Migration,
                sys::virDomainPausedReason_VIR_DOMAIN_PAUSED_SAVE => StateReason::Save,
                sys::virDomainPausedReason_VIR_DOMAIN_PAUSED_IOERROR => StateReason::IoError,
                sys::virDomainPausedReason_VIR_DOMAIN_PAUSED_STARTING_UP => StateReason::StartingUp,
                sys::virDomainPausedReason_VIR_DOMAIN_PAUSED_CRASHED => StateReason::Panicked,
                _ => other,
            },
        ),
        sys::virDomainState_VIR_DOMAIN_SHUTDOWN => (DomainState::ShuttingDown, other),
        sys::virDomainState_VIR_DOMAIN_SHUTOFF => (DomainState::Shutoff, other),
        sys::virDomainState_VIR_DOMAIN_CRASHED => (
            DomainState::Crashed,
            if code(reason) == sys::virDomainCrashedReason_VIR_DOMAIN_CRASHED_PANICKED {
                StateReason::Panicked
            } else {
                other
            },
        ),
        _ => (DomainState::Other, other),
    }
}

/// The state alone.
pub(super) fn state_of((number, reason): (c_int, c_int)) -> DomainState {
    state(number, reason).0
}

fn translate(raw: Raw) -> Option<DomainEvent> {
    match raw {
        Raw::Closed | Raw::JobCompleted { .. } => None,
        Raw::Iteration { name, uuid, iteration } => Some(DomainEvent::MigrationIteration {
            name,
            uuid,
            iteration: code(iteration),
        }),
        Raw::Lifecycle { name, uuid, event, detail } => lifecycle(name, uuid, code(event), detail),
    }
}

fn lifecycle(name: String, uuid: Uuid, event: u32, detail: c_int) -> Option<DomainEvent> {
    let other = StateReason::Other(detail);
    match event {
        sys::virDomainEventType_VIR_DOMAIN_EVENT_STARTED => {
            let reason = match code(detail) {
                sys::virDomainEventStartedDetailType_VIR_DOMAIN_EVENT_STARTED_BOOTED => StateReason::Booted,
                sys::virDomainEventStartedDetailType_VIR_DOMAIN_EVENT_STARTED_MIGRATED => StateReason::Migrated,
                sys::virDomainEventStartedDetailType_VIR_DOMAIN_EVENT_STARTED_RESTORED => StateReason::Restored,
                _ => other,
            };
            Some(DomainEvent::Started { name, uuid, reason })
        }
        sys::virDomainEventType_VIR_DOMAIN_EVENT_SUSPENDED => {
            let reason = match code(detail) {
                sys::virDomainEventSuspendedDetailType_VIR_DOMAIN_EVENT_SUSPENDED_PAUSED => StateReason::User,
                sys::virDomainEventSuspendedDetailType_VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED => StateReason::Migration,
                sys::virDomainEventSuspendedDetailType_VIR_DOMAIN_EVENT_SUSPENDED_IOERROR => StateReason::IoError,
                sys::virDomainEventSuspendedDetailType_VIR_DOMAIN_EVENT_SUSPENDED_RESTORED => StateReason::Restored,
                _ => other,
            };
            Some(DomainEvent::Suspended { name, uuid, reason })
        }
        sys::virDomainEventType_VIR_DOMAIN_EVENT_RESUMED => {
            let reason = match code(detail) {
                sys::virDomainEventResumedDetailType_VIR_DOMAIN_EVENT_RESUMED_UNPAUSED => StateReason::Unpaused,
                sys::virDomainEventResumedDetailType_VIR_DOMAIN_EVENT_RESUMED_MIGRATED => StateReason::Migrated,
                _ => other,
            };
            Some(DomainEvent::Resumed { name, uuid, reason })
        }
        sys::virDomainEventType_VIR_DOMAIN_EVENT_STOPPED => {
            let reason = match code(detail) {
                sys::virDomainEventStoppedDetailType_VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN => StopReason::Shutdown,
                sys::virDomainEventStoppedDetailType_VIR_DOMAIN_EVENT_STOPPED_DESTROYED => StopReason::Destroyed,
                sys::virDomainEventStoppedDetailType_VIR_DOMAIN_EVENT_STOPPED_CRASHED => StopReason::Crashed,
                sys::virDomainEventStoppedDetailType_VIR_DOMAIN_EVENT_STOPPED_MIGRATED => StopReason::Migrated,
                sys::virDomainEventStoppedDetailType_VIR_DOMAIN_EVENT_STOPPED_SAVED => StopReason::Saved,
                sys::virDomainEventStoppedDetailType_VIR_DOMAIN_EVENT_STOPPED_FAILED => StopReason::Failed,
                _ => StopReason::Other,
            };
            Some(DomainEvent::Stopped { name, uuid, reason })
        }
        sys::virDomainEventType_VIR_DOMAIN_EVENT_CRASHED => Some(DomainEvent::Panicked { name, uuid }),
        _ => None,
    }
}
