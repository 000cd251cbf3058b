//! What can go wrong when Slurm is asked, told apart by what the caller should do about it.

use std::time::Duration;

/// Why a question to Slurm, or an order to it, came to nothing.
///
/// After [`Unreachable`](SlurmError::Unreachable) and [`Timeout`](SlurmError::Timeout) it is *unknown* whether the order was carried out: look again before acting on it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SlurmError {
    /// slurmctld, or the munge daemon that the command needs to talk to it, does not answer.
    #[error("reach slurmctld: {message}")]
    Unreachable {
        /// Slurm's own words.
        message: String,
    },
    /// This account may not do that.
    #[error("get leave from Slurm: {message}")]
    Denied {
        /// Slurm's own words.
        message: String,
    },
    /// Slurm knows no such job (any more).
    #[error("find the job in Slurm")]
    NoSuchJob,
    /// Slurm understood and said no.
    #[error("have Slurm accept it: {message}")]
    Refused {
        /// Slurm's own words.
        message: String,
    },
    /// Slurm's answer is not what we know how to read; nothing was guessed from it.
    #[error("read {field} in Slurm's answer {sample:?}")]
    Parse {
        /// The field or table at fault.
        field: &'static str,
        /// The offending text, cut short.
        sample: String,
    },
    /// The command did not end in time and was killed.
    #[error("hear from {program} within {} s", after.as_secs())]
    Timeout {
        /// Which command.
        program: &'static str,
        /// The deadline it missed.
        after: Duration,
    },
    /// The command could not be run at all, or an argument for it is not acceptable.
    #[error("run {program}: {reason}")]
    Command {
        /// Which command.
        program: &'static str,
        /// Why not.
        reason: String,
    },
}

impl SlurmError {
    /// True if waiting and asking again may help: nothing was said about the request itself.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Timeout { .. })
    }

    /// A requeue, or a requeue with hold, of a job that is already waiting in the queue.
    #[must_use]
    pub fn is_already_pending(&self) -> bool {
        self.refused_with("pending execution")
    }

    /// An order to a job that has ended. Slurm says the same of a new time limit for a job that runs on in its grace time.
    #[must_use]
    pub fn is_already_finished(&self) -> bool {
        self.refused_with("already finished") || self.refused_with("already completed")
    }

    /// A job that Slurm cannot requeue because it has no batch script (`srun`, `salloc`).
    #[must_use]
    pub fn is_not_a_batch_job(&self) -> bool {
        self.refused_with("Only batch jobs")
    }

    /// No nodes are free for what was asked.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.refused_with("nodes are busy")
            || self.refused_with("node configuration is not available")
            || self.refused_with("not available now")
    }

    /// A reservation that does not exist, or not any more.
    #[must_use]
    pub fn is_no_such_reservation(&self) -> bool {
        self.refused_with("reservation is invalid")
    }

    fn refused_with(&self, words: &str) -> bool {
        matches!(self, Self::Refused { message } if message.contains(words))
    }

    pub(super) fn parse(field: &'static str, sample: &str) -> Self {
        Self::Parse {
            field,
            sample: sample.chars().take(160).collect(),
        }
    }
}

/// Reads a failed command's messages. `slurmctld` down looks different for each command: updates say "Unexpected message received".
pub(super) fn classify(stderr: &str, stdout: &str, code: Option<i32>) -> SlurmError {
    let text = if stderr.trim().is_empty() { stdout } else { stderr };
    // The last line is the verdict; scontrol prints a second, vaguer one for hold and release ("slurm_suspend error: ...").
    let message: String = text
        .lines()
        .map(str::trim)
        .find(|l| !l.is_empty())
        .unwrap_or("no message")
        .chars()
        .take(400)
        .collect();
    let has = |words: &str| text.contains(words);
    if has("Unable to contact slurm controller")
        || has("Unexpected message received")
        || has("Socket timed out")
        || has("Zero Bytes were transmitted")
        || has("Connection refused")
        || has("Transport endpoint is not connected")
        || has("Protocol authentication error")
        || has("Authentication plugin initialization failed")
        || has("auth_g_pack")
        || has("in standby mode")
        || has("Munge encode failed")
        || has("Unable to process configuration file")
        || has("Could not establish a configuration source")
    {
        SlurmError::Unreachable { message }
    } else if has("Access/permission denied")
        || has("Access denied")
        || (has("Invalid user id") && !has("creating the reservation"))
        || has("not authorized")
    {
        SlurmError::Denied { message }
    } else if has("Invalid job id specified") {
        SlurmError::NoSuchJob
    } else if text.trim().is_empty() {
        SlurmError::Refused {
            message: format!(
                "no message, exit status {}",
                code.map_or_else(|| "by a signal".to_owned(), |c| c.to_string())
            ),
        }
    } else {
        SlurmError::Refused { message }
    }
}
