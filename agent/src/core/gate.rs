//! Effects in their order, and what waits when a write to the ledger fails.
//!
//! ```text
//!        push                     next                        carried out
//!  ──────────────> [ effects ] ────────────> write or act ─────────────────>
//!                       ^                        │ the write failed
//!                       └──────── shut ──────────┘
//!  events that come while it is shut wait behind the effects (hold, next_event)
//! ```
//! What stands behind a record must not be done before the record is there: a guest whose record says that it runs here, while it
//! runs elsewhere, is ended or started twice after a power cut. So a write that fails shuts the gate. It is opened for each new
//! try, and stays open with the first that succeeds.
use std::collections::VecDeque;

use super::{Busy, Effect, Event, Vm};

/// After so many milliseconds without a record, what has not begun of a VM is given up.
const UNRECORDED_MS: u64 = 5_000;

/// The gate: `F` are effects, `E` events.
#[derive(Debug, Clone)]
pub struct Gate<F, E> {
    effects: VecDeque<F>,
    events: VecDeque<E>,
    shut: bool,
    /// Since when no write has succeeded, and the reason of the last that failed.
    failing: Option<(u64, String)>,
    told: bool,
}

impl<F, E> Default for Gate<F, E> {
    fn default() -> Self {
        Self {
            effects: VecDeque::new(),
            events: VecDeque::new(),
            shut: false,
            failing: None,
            told: false,
        }
    }
}

impl<F, E> Gate<F, E> {
    /// Effects behind all that wait already.
    pub fn push(&mut self, effects: impl IntoIterator<Item = F>) {
        self.effects.extend(effects);
    }

    /// The next effect; none while it is shut.
    pub fn next_effect(&mut self) -> Option<F> {
        if self.shut { None } else { self.effects.pop_front() }
    }

    /// A write failed at `now_ms`: it waits, before everything that stands behind it. Returns whether it is the first that failed.
    pub fn shut(&mut self, now_ms: u64, write: F, why: String) -> bool {
        self.effects.push_front(write);
        self.shut = true;
        self.pass(now_ms, why)
    }

    /// A write failed, and what stands behind it may be done all the same: the ledger is behind until a later write. Returns whether it is
    /// the first that failed.
    pub fn pass(&mut self, now_ms: u64, why: String) -> bool {
        let since = self.failing.as_ref().map(|(since, _)| *since);
        self.failing = Some((since.unwrap_or(now_ms), why));
        since.is_none()
    }

    /// The last write failed: there has to be another one.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        self.failing.is_some()
    }

    /// A write succeeded. Returns whether one had failed before.
    pub fn written(&mut self) -> bool {
        self.told = false;
        self.failing.take().is_some()
    }

    /// Why nothing goes on: the reason of the last write that failed.
    #[must_use]
    pub fn is_shut(&self) -> Option<&str> {
        self.failing.as_ref().filter(|_| self.shut).map(|(_, why)| why.as_str())
    }

    /// The write is to be tried again.
    pub fn open(&mut self) {
        self.shut = false;
    }

    /// It has been shut for `patience_ms`: why, once.
    pub fn overdue(&mut self, now_ms: u64, patience_ms: u64) -> Option<String> {
        let (since, why) = self.failing.as_ref().filter(|_| self.shut && !self.told)?;
        if now_ms.saturating_sub(*since) < patience_ms {
            return None;
        }
        self.told = true;
        Some(why.clone())
    }

    /// What waits.
    pub fn waiting(&self) -> impl Iterator<Item = &F> {
        self.effects.iter()
    }

    /// What waited is given up, and these are done instead.
    pub fn replace(&mut self, effects: impl IntoIterator<Item = F>) {
        self.effects.clear();
        self.effects.extend(effects);
        self.shut = false;
    }

    /// An event that came while it is shut.
    pub fn hold(&mut self, event: E) {
        self.events.push_back(event);
    }

    /// The oldest event that waits; none while it is shut.
    pub fn next_event(&mut self) -> Option<E> {
        if self.shut { None } else { self.events.pop_front() }
    }

    /// The events that wait.
    pub fn held(&self) -> impl Iterator<Item = &E> {
        self.events.iter()
    }
}

/// The gate of one VM.
impl Gate<Effect, Event> {
    /// Takes an event: it comes back to be decided on at once, or waits. Time is told again.
    pub fn let_in(&mut self, event: Event) -> Option<Event> {
        if self.is_shut().is_none() {
            return Some(event);
        }
        if event != Event::Tick {
            self.hold(event);
        }
        None
    }

    /// The record could not be written. Returns whether it is the first write that failed.
    pub fn not_written(&mut self, vm: &Vm, now_ms: u64, why: String) -> bool {
        if vm.goes_on_unrecorded() {
            self.pass(now_ms, why)
        } else {
            self.shut(now_ms, Effect::Persist, why)
        }
    }

    /// The record could not be written again. Once that has lasted, what has not begun is given up: returns whether there is something to be
    /// done instead, which is the next effect then.
    pub fn give_up(&mut self, vm: &mut Vm, now_ms: u64, await_job_ms: u64) -> bool {
        let Some(why) = self.overdue(now_ms, UNRECORDED_MS) else {
            return false;
        };
        let waits = self.waiting().find_map(Busy::of);
        let instead = vm.on_event(now_ms, await_job_ms, Event::NotRecorded { why, waits });
        let is_given_up = !instead.is_empty();
        if is_given_up {
            self.replace(instead);
        }
        is_given_up
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITE: &str = "write";

    #[test]
    fn nothing_behind_a_write_that_failed_is_done_before_it_succeeds() {
        let mut gate: Gate<&str, u32> = Gate::default();
        gate.push([WRITE, "move"]);
        assert_eq!(gate.next_effect(), Some(WRITE));
        assert!(gate.shut(1_000, WRITE, "disk full".into()), "the first");
        gate.push([WRITE, "answer"]);
        gate.hold(7);
        assert_eq!(
            (gate.next_effect(), gate.next_event(), gate.is_shut()),
            (None, None, Some("disk full"))
        );
        gate.open();
        assert_eq!(gate.next_effect(), Some(WRITE));
        assert!(!gate.shut(2_000, WRITE, "still full".into()), "not the first");
        gate.open();
        assert_eq!(gate.next_effect(), Some(WRITE));
        assert!(gate.written() && !gate.written());
        let rest: Vec<&str> = std::iter::from_fn(|| gate.next_effect()).collect();
        assert_eq!(rest, ["move", WRITE, "answer"]);
        assert_eq!((gate.next_event(), gate.is_shut()), (Some(7), None));
    }

    #[test]
    fn it_is_said_once_that_a_write_has_failed_for_long_and_what_waits_can_be_given_up() {
        let mut gate: Gate<&str, u32> = Gate::default();
        gate.push(["move"]);
        gate.shut(1_000, WRITE, "disk full".into());
        assert_eq!(gate.overdue(5_999, 5_000), None);
        assert_eq!(gate.overdue(6_000, 5_000), Some("disk full".into()));
        assert_eq!(gate.overdue(9_000, 5_000), None, "once");
        assert_eq!(gate.waiting().collect::<Vec<_>>(), [&WRITE, &"move"]);
        gate.replace(["answer", WRITE]);
        assert_eq!(gate.next_effect(), Some("answer"));
    }
}
