//! Who wants to know what a SIGTERM means, and when Slurm is asked: pure. Each question is two commands run as root, and a session can
//! ask as often as it likes; so at most one is under way for a VM, the next begins [`CAUSE_EVERY`] after it at the earliest, and each
//! answers all who asked before it began.
use std::{collections::BTreeSet, time::Instant};

use crate::limits::{ANSWER_WITHIN, CAUSE_EVERY};

/// The sessions of one VM that wait for a cause.
#[derive(Debug, Default)]
pub struct Explain {
    /// Will be told what is being asked now.
    asked: BTreeSet<u64>,
    /// Came after that began: what it tells may be older than their signal.
    next: BTreeSet<u64>,
    under_way: bool,
    last: Option<Instant>,
}

impl Explain {
    /// A session got SIGTERM.
    pub fn wanted_by(&mut self, session: u64) {
        self.next.insert(session);
    }

    /// Whether Slurm is to be asked now. Call whenever time has passed or somebody wants to know.
    pub fn due(&mut self, now: Instant) -> bool {
        // One that never comes back (no thread for it) is not waited for.
        let under_way = self.under_way && self.last.is_some_and(|last| now < last + ANSWER_WITHIN);
        if under_way || self.next.is_empty() || self.last.is_some_and(|last| now < last + CAUSE_EVERY) {
            return false;
        }
        self.under_way = true;
        self.last = Some(now);
        self.asked.append(&mut self.next);
        true
    }

    /// Slurm has answered: who is to be told.
    pub fn answered(&mut self) -> BTreeSet<u64> {
        self.under_way = false;
        std::mem::take(&mut self.asked)
    }

    /// A session has ended.
    pub fn forget(&mut self, session: u64) {
        self.asked.remove(&session);
        self.next.remove(&session);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_first_is_answered_at_once_and_all_who_come_meanwhile_by_the_next() {
        let (mut e, now) = (Explain::default(), Instant::now());
        e.wanted_by(1);
        assert!(e.due(now));
        for session in [1, 2, 3, 2] {
            e.wanted_by(session);
            assert!(!e.due(now + Duration::from_secs(5)), "one is under way");
        }
        assert_eq!(e.answered(), BTreeSet::from([1]));
        assert!(!e.due(now + CAUSE_EVERY / 2));
        e.forget(3);
        assert!(e.due(now + CAUSE_EVERY));
        assert_eq!(e.answered(), BTreeSet::from([1, 2]));
        assert!(!e.due(now + CAUSE_EVERY * 10), "nobody asks");
    }

    #[test]
    fn a_session_that_never_stops_asking_gets_one_question_a_second() {
        let (mut e, begun) = (Explain::default(), Instant::now());
        let mut asked = 0;
        for ms in 0..10_000 {
            e.wanted_by(1);
            if e.due(begun + Duration::from_millis(ms)) {
                asked += 1;
                let _ = e.answered();
            }
        }
        assert_eq!(asked, 10);
    }
}
