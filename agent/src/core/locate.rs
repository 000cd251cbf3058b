//! Which end of a live move has the guest, when what was to say it was lost.
//!
//! libvirt here is looked at first, then the other end is asked. What cannot be told now is asked again; nobody resumes meanwhile. The answers are
//! promises ([`MoveQuestion`]): they hold however late they come.
//!
//! Pure: the caller looks, asks and waits.
use super::{
    event::Whereabouts,
    identity::{MoveIdentity, MoveQuestion},
    record::{Life, Record},
};

/// What libvirt here has of the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copy {
    /// No domain.
    None,
    /// A domain that does not run. It proves nothing: a source whose libvirt lost the answer of the Finish phase has one, too.
    Stands,
    /// A domain that runs.
    Runs,
    /// A migration or save is under way, perhaps on behalf of an agent that died: its end is waited for.
    Busy,
}

/// A search, by one end of a move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Search {
    /// The node at the other end.
    pub other: String,
    /// The move.
    pub by: MoveIdentity,
    /// What the other end is asked.
    pub question: MoveQuestion,
}

impl Search {
    /// `None` where there is nothing to search for: the VM is at neither end of a move.
    #[must_use]
    pub fn of(record: &Record) -> Option<Self> {
        let (other, by, question) = match &record.life {
            Life::Leaving { to, by, .. } => (to, by, MoveQuestion::HasCome),
            Life::Arriving { from, by } => (from, by, MoveQuestion::Stays),
            _ => return None,
        };
        Some(Self {
            other: other.clone(),
            by: by.clone(),
            question,
        })
    }

    /// What libvirt here has says where the guest is; `None`: the other end has to be asked. A libvirt that says nothing leaves it
    /// [`Whereabouts::Unknown`].
    #[must_use]
    pub fn saw(&self, here: Copy) -> Option<Whereabouts> {
        match here {
            Copy::Runs => Some(self.here()),
            Copy::Busy => Some(Whereabouts::Unknown),
            Copy::None | Copy::Stands => None,
        }
    }

    /// What the other end says; `None` when it cannot tell, or does not answer. `here` is what was seen before it was asked.
    #[must_use]
    pub fn heard(&self, here: Copy, answer: Option<bool>) -> Whereabouts {
        match (answer, here) {
            (Some(true), _) => self.there(),
            (Some(false), Copy::None) => Whereabouts::Nowhere,
            // "It has not come, and never will": what stands here is the guest.
            (Some(false), Copy::Stands) if self.question == MoveQuestion::HasCome => Whereabouts::AtSource,
            _ => Whereabouts::Unknown,
        }
    }

    fn here(&self) -> Whereabouts {
        match self.question {
            MoveQuestion::HasCome => Whereabouts::AtSource,
            MoveQuestion::Stays => Whereabouts::AtDestination,
        }
    }

    fn there(&self) -> Whereabouts {
        match self.question {
            MoveQuestion::HasCome => Whereabouts::AtDestination,
            MoveQuestion::Stays => Whereabouts::AtSource,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::{LeavingStage, tests};

    fn by() -> MoveIdentity {
        MoveIdentity {
            move_id: "7-n1-1".into(),
            run: 1,
            generation: 1,
        }
    }

    fn source() -> Search {
        let stage = LeavingStage::Copying;
        Search::of(&tests::record(Life::Leaving {
            to: "n2".into(),
            by: by(),
            stage,
        }))
        .unwrap()
    }

    fn destination() -> Search {
        Search::of(&tests::record(Life::Arriving {
            from: "n1".into(),
            by: by(),
        }))
        .unwrap()
    }

    #[test]
    fn a_guest_that_runs_here_is_found_here_and_nobody_is_asked() {
        assert_eq!(source().saw(Copy::Runs), Some(Whereabouts::AtSource));
        assert_eq!(destination().saw(Copy::Runs), Some(Whereabouts::AtDestination));
        assert_eq!(Search::of(&tests::record(Life::Running)), None);
    }

    #[test]
    fn nobody_is_asked_while_libvirt_is_busy_with_it() {
        for end in [source(), destination()] {
            assert_eq!(end.saw(Copy::Busy), Some(Whereabouts::Unknown));
            assert_eq!(end.saw(Copy::Stands), None);
            assert_eq!(end.saw(Copy::None), None);
        }
    }

    #[test]
    fn no_answer_never_lets_anybody_resume() {
        for end in [source(), destination()] {
            for copy in [Copy::None, Copy::Stands] {
                assert_eq!(end.heard(copy, None), Whereabouts::Unknown);
            }
        }
    }

    #[test]
    fn only_the_promise_that_it_never_comes_lets_the_source_resume_what_stands_there() {
        assert_eq!(source().heard(Copy::Stands, Some(false)), Whereabouts::AtSource);
        assert_eq!(source().heard(Copy::None, Some(false)), Whereabouts::Nowhere);
        assert_eq!(source().heard(Copy::Stands, Some(true)), Whereabouts::AtDestination);
        assert_eq!(
            destination().heard(Copy::Stands, Some(false)),
            Whereabouts::Unknown,
            "\"it does not stay\" says nothing about what stands here"
        );
        assert_eq!(destination().heard(Copy::Stands, Some(true)), Whereabouts::AtSource);
        assert_eq!(destination().heard(Copy::None, Some(false)), Whereabouts::Nowhere);
    }
}
