//! A job that begins anew must not leave a guest of its last run behind on another node.
//!
//! That can only be when a live move has landed and Slurm started the job elsewhere, because nobody was there to steer it: the grace time ended
//! while the controller was down. The landed VM waits for its job ([`Life::AwaitingJob`]) until its own deadline. So before a VM is made for
//! a job that has been restarted, the agents of the other nodes are asked to end what waits there.
//!
//! ```text
//!  asked ── nothing of it there ──────────────────────────> clear
//!    ^────── being ended ─────── for 20 s, then ──────────> refused: the job may try again later
//!    ^────── no answer, node well ─ for 60 s, then ───────> begun all the same
//!    '────── no answer, node not well ────────────────────> begun all the same
//! ```
//! An agent that is being restarted is back within seconds. One that has been away for longer has lost the node's feature: a cluster must not
//! stand still for it, and what waits there ends by its own deadline when that agent is back.
use super::record::{Life, Record};

/// A VM that cannot be ended is waited for so long, in milliseconds.
const ENDING_MS: u64 = 20_000;
/// An agent that does not answer is waited for so long, in milliseconds.
const SILENT_MS: u64 = 60_000;

/// What an agent says, or does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard<'a> {
    /// Nothing of an earlier run is there any more.
    Clear,
    /// It is being ended; what the agent says about it.
    Ending(&'a str),
    /// No answer, and why.
    Silent(&'a str),
}

/// What follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// This node is done with.
    Clear,
    /// It is to be asked again.
    Again,
    /// It is done with, although nobody knows; a fragment for the log.
    Unknown(String),
    /// No VM may begin; why, as a fragment.
    Refused(String),
}

/// `waited_ms`: since it was asked first. `well`: the node has the feature for VMs, so that its agent was there a moment ago.
#[must_use]
pub fn next(heard: Heard<'_>, waited_ms: u64, well: bool) -> Next {
    match heard {
        Heard::Clear => Next::Clear,
        Heard::Ending(_) if waited_ms < ENDING_MS => Next::Again,
        Heard::Ending(why) => Next::Refused(format!("its last run is not ended: {why}")),
        Heard::Silent(_) if well && waited_ms < SILENT_MS => Next::Again,
        Heard::Silent(why) => Next::Unknown(format!("it is not known whether its last run has left a guest there: {why}")),
    }
}

/// Whether a VM waits here, or is being ended, that comes from a run before the one which has now started elsewhere. A word that took long
/// may be of a run that is over, and the VM of a later one: that is left alone.
#[must_use]
pub fn is_superseded(record: &Record, restarts: u32) -> bool {
    let waits = matches!(
        record.life,
        Life::AwaitingJob { .. } | Life::Arriving { .. } | Life::Stopping { .. }
    );
    let from = record.allocation.as_ref().and_then(|a| a.restarts);
    waits && from.is_none_or(|from| from < restarts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::{Allocation, End, tests};

    fn record(life: Life, restarts: Option<u32>) -> Record {
        Record {
            allocation: Some(Allocation {
                restarts,
                ..Allocation::default()
            }),
            ..tests::record(life)
        }
    }

    #[test]
    fn a_vm_that_waits_is_ended_for_a_later_run_and_not_by_the_word_of_its_own_or_an_earlier_one() {
        let waiting = record(Life::AwaitingJob { deadline_ms: 1 }, Some(2));
        assert!(is_superseded(&waiting, 3));
        assert!(!is_superseded(&waiting, 2), "the word of the run that it comes from");
        assert!(!is_superseded(&waiting, 1));
        assert!(is_superseded(&record(Life::AwaitingJob { deadline_ms: 1 }, None), 1));
    }

    #[test]
    fn a_vm_whose_job_is_here_is_left_alone_and_one_that_ends_is_waited_for() {
        assert!(!is_superseded(&record(Life::Running, Some(0)), 3));
        assert!(is_superseded(&record(Life::Stopping { why: End::Released }, Some(0)), 3));
    }

    #[test]
    fn a_guest_that_cannot_be_ended_keeps_the_next_run_out_and_a_silent_agent_only_for_a_while() {
        let ending = Heard::Ending("domain slurm-7-0 cannot be destroyed");
        assert_eq!(next(ending, 19_999, true), Next::Again);
        let Next::Refused(why) = next(ending, 20_000, true) else {
            panic!("it begins beside it")
        };
        assert!(why.contains("slurm-7-0"), "{why}");
        assert_eq!(next(Heard::Silent("refused"), 59_999, true), Next::Again);
        assert!(matches!(next(Heard::Silent("refused"), 60_000, true), Next::Unknown(_)));
        assert!(
            matches!(next(Heard::Silent("refused"), 0, false), Next::Unknown(_)),
            "an agent that has been away for long holds up nobody"
        );
        assert_eq!(next(Heard::Clear, 0, false), Next::Clear);
    }
}
