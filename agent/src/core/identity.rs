//! Which move is spoken of.
//!
//! What the two ends of a move say to each other may come late: the job may have begun anew by then, on either node, under
//! the same job id and with a domain of the same name. So each word names its move ([`MoveIdentity`]), and counts only where
//! the VM that is there came, comes or leaves by that very move. A VM that begins here has come by none.
use serde::{Deserialize, Serialize};

use super::record::{LeavingStage, Life, Record};

/// Names one move of one VM, for both its ends.
///
/// A record or word without run or generation has 0, which no move has: nothing is taken over by its name then, which is the
/// safe side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveIdentity {
    /// Unique in the cluster.
    pub move_id: String,
    /// The source's [`Record::run`] when the move was ordered.
    #[serde(default)]
    pub run: u64,
    /// The source's [`Record::generation`] then.
    #[serde(default)]
    pub generation: u64,
}

/// The move by which a VM came to the node where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArrivedBy {
    /// The move.
    #[serde(flatten)]
    pub by: MoveIdentity,
    /// The source's output offsets were taken over: a second offer of them changes nothing.
    pub handed_over: bool,
}

/// What one end of a move asks the other when it is unclear which of them has the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MoveQuestion {
    /// The source asks: has the guest come to you by this move? "No" is a promise that it never will.
    HasCome,
    /// The destination asks: does the guest stay with you, so that nothing comes by this move any more? "No" says only that
    /// this is not certain; while it is being copied there is no answer.
    Stays,
}

impl MoveQuestion {
    /// The answer of a node that has no record of the job.
    #[must_use]
    pub fn answer_without_record(self) -> bool {
        self == Self::Stays
    }

    /// The answer that a record gives. `runs`: libvirt there has the domain, and it runs.
    ///
    /// # Errors
    /// Why it cannot be told yet: it is to be asked again.
    pub fn answer(self, record: &Record, by: &MoveIdentity, runs: bool) -> Result<bool, String> {
        match (self, &record.life) {
            (Self::HasCome, Life::Arriving { by: mine, .. }) if mine == by => {
                if runs {
                    Ok(true)
                } else {
                    // "No" only when nothing can come any more.
                    Err("it has not come, and its arrival is ended now".into())
                }
            }
            // Whatever became of it since.
            (Self::HasCome, _) if record.arrived_by.as_ref().is_some_and(|a| a.by == *by) => Ok(true),
            (Self::HasCome, Life::Stopping { .. }) => Err("the VM there is being ended".into()),
            (Self::HasCome, _) => Ok(false),
            // A copy may take longer than a destination likes to wait.
            (Self::Stays, Life::Leaving { by: mine, stage, .. }) if mine == by && *stage != LeavingStage::Finishing && runs => {
                Err("it is on its way".into())
            }
            (Self::Stays, Life::Leaving { by: mine, .. }) if mine == by => Ok(false),
            (Self::Stays, Life::Gone { .. }) => Ok(false),
            (Self::Stays, _) => Ok(true),
        }
    }
}

/// Why the destination of a move did not take what the source handed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HandOverError {
    /// It may take it later, or the answer was lost.
    NotNow(String),
    /// The VM there did not come by this move, or is over: it never will.
    NotThisMove(String),
}

impl HandOverError {
    /// As a fragment.
    #[must_use]
    pub fn why(&self) -> &str {
        match self {
            Self::NotNow(why) | Self::NotThisMove(why) => why,
        }
    }
}

impl From<String> for HandOverError {
    fn from(why: String) -> Self {
        Self::NotNow(why)
    }
}
