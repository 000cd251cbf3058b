//! Where a VM is whose move's answer was lost, from its source's word. A pure machine: word and time in, what to do out.
//!
//! ```text
//!  leaving, saving ──> wait; past the limit: cancel, again and again, and wait
//!  gone ──> Moved      saved ──> Saved      anything else ──> Stays
//!  silence ──> wait while the job is there in the run that was to move; else JobLeft
//! ```
//! The source alone knows. As long as it says that the VM is leaving or being saved, or says nothing, no other way of the
//! preemption may begin: a second order beside a copy that still runs is how a guest is lost.
use std::cmp::max;

/// Milliseconds between two orders to cancel.
const CANCEL_AGAIN_MS: u64 = 5_000;

/// What the source says of its VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    /// It is being copied away or saved.
    UnderWay,
    /// It is at the destination.
    Gone,
    /// It is in a save.
    Saved,
    /// It is there, or has ended, or was never there.
    Other,
    /// No answer.
    Silence {
        /// Slurm has the job on its nodes, in the run that was to move.
        job_is_there: bool,
    },
}

impl Word {
    /// From the state's name in a view; `None`: the source knows no VM of the job.
    pub(super) fn of(state: Option<&str>) -> Self {
        match state {
            Some("leaving" | "saving") => Self::UnderWay,
            Some("gone") => Self::Gone,
            Some("saved") => Self::Saved,
            _ => Self::Other,
        }
    }
}

/// Where the VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Settled {
    /// At the destination.
    Moved,
    /// In a save.
    Saved,
    /// At its source, or nowhere.
    Stays,
    /// The job has left the source, which does not answer.
    JobLeft,
}

/// What to do after a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Next {
    /// Order the source to cancel.
    pub(super) cancel: bool,
    /// It is clear; else ask again.
    pub(super) settled: Option<Settled>,
}

/// One search.
#[derive(Debug)]
pub(super) struct Settling {
    limit_ms: u64,
    cancel_at_ms: u64,
}

impl Settling {
    /// The copy may take until `limit_ms` (Unix milliseconds).
    pub(super) fn new(limit_ms: u64) -> Self {
        Self { limit_ms, cancel_at_ms: 0 }
    }

    pub(super) fn on_word(&mut self, now_ms: u64, word: Word) -> Next {
        let settled = match word {
            Word::Gone => Some(Settled::Moved),
            Word::Saved => Some(Settled::Saved),
            Word::Other => Some(Settled::Stays),
            Word::Silence { job_is_there: false } => Some(Settled::JobLeft),
            Word::UnderWay | Word::Silence { job_is_there: true } => None,
        };
        let cancel = word == Word::UnderWay && now_ms >= max(self.limit_ms, self.cancel_at_ms);
        if cancel {
            self.cancel_at_ms = now_ms + CANCEL_AGAIN_MS;
        }
        Next { cancel, settled }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_settled_while_the_source_says_leaving_or_saving_however_long_that_takes() {
        let mut settling = Settling::new(1_000);
        let day = 86_400_000;
        for now_ms in [0, 999] {
            let next = settling.on_word(now_ms, Word::UnderWay);
            assert_eq!((next.cancel, next.settled), (false, None), "{now_ms}");
        }
        // Past its limit it is cancelled, every few seconds, and its end awaited.
        let cancels: Vec<bool> = [1_000, 2_000, 5_999, 6_000, 10_999, 11_000, day]
            .map(|now_ms| {
                let next = settling.on_word(now_ms, Word::UnderWay);
                assert_eq!(next.settled, None);
                next.cancel
            })
            .into();
        assert_eq!(cancels, [true, false, false, true, false, true, true]);
        assert_eq!(settling.on_word(day, Word::of(Some("running"))).settled, Some(Settled::Stays));
    }

    #[test]
    fn the_end_of_a_copy_or_save_is_taken_as_it_is() {
        for (state, settled) in [
            (Some("gone"), Settled::Moved),
            (Some("saved"), Settled::Saved),
            (Some("running"), Settled::Stays),
            (Some("stopped"), Settled::Stays),
            (None, Settled::Stays),
        ] {
            let next = Settling::new(0).on_word(5, Word::of(state));
            assert_eq!(
                next,
                Next {
                    cancel: false,
                    settled: Some(settled)
                },
                "{state:?}"
            );
        }
    }

    #[test]
    fn a_silent_source_is_asked_until_its_job_has_left() {
        let mut settling = Settling::new(1_000);
        for now_ms in [0, 2_000, 86_400_000] {
            let next = settling.on_word(now_ms, Word::Silence { job_is_there: true });
            assert_eq!((next.cancel, next.settled), (false, None), "{now_ms}");
        }
        let next = settling.on_word(86_400_001, Word::Silence { job_is_there: false });
        assert_eq!(next.settled, Some(Settled::JobLeft));
    }
}
