//! What the prolog and epilog hooks and the agent say to each other: one line of JSON each way over the agent's socket.
//!
//! The first byte of a hook's connection is `{`; every other client of the same socket uses another framing.
//! Only root is heard. The prolog's request is short and never waits for a VM; the epilog's is answered when the domain has left the node.
use crate::spec::VmSpec;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The agent's socket.
pub const AGENT_SOCKET: &str = "/run/slurm-vm/agent.sock";
/// One empty file for each job that has a domain on this node, named by the job id: the agent makes it when it accepts `ensure`, or before
/// the domain if a step alone asks for one, and removes it when the domain has left. The epilog hook looks there for jobs without the
/// option, and a batch step without the option does not start if its job's file is there.
pub const JOBS_DIR: &str = "/run/slurm-vm/jobs";
/// The version of these messages.
pub const HOOK_VERSION: u32 = 1;
/// How long the prolog hook tries, all in all.
pub const PROLOG_DEADLINE: Duration = Duration::from_secs(3);
/// How long the epilog hook lets the agent try to get the domain off the node before the agent destroys it.
pub const EPILOG_WAIT: Duration = Duration::from_secs(60);
/// What the epilog hook adds to that for the destruction and the answer.
pub const EPILOG_GRACE: Duration = Duration::from_secs(20);
/// The longest line either side accepts.
pub const MAX_LINE: usize = 16 * 1024;

/// One message from a hook.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HookMessage {
    /// [`HOOK_VERSION`].
    pub v: u32,
    /// The request.
    pub hook: HookRequest,
}

/// What a hook asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
pub enum HookRequest {
    /// The prolog: this job may soon run here, with this VM.
    Ensure {
        /// Job id.
        job: u32,
        /// The job's user.
        uid: u32,
        /// The job's group.
        gid: u32,
        /// What was asked for.
        spec: VmSpec,
        /// Slurm's restart count as the prolog sees it. A hint for the log: runs are told apart by the agent's own run number.
        restart: u32,
    },
    /// The epilog: this job leaves; answer when its domain is off this node.
    Release {
        /// Job id.
        job: u32,
        /// The job's user.
        uid: u32,
        /// How long to wait before the domain is destroyed, in seconds.
        wait_s: u32,
    },
}

/// The agent's answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookReply {
    /// Whether it was done.
    pub ok: bool,
    /// The number of this run, minted at `ensure`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<u64>,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// The domain that is still on the node although it was destroyed: the only answer that makes the epilog hook fail.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stuck: Option<String>,
}

impl HookReply {
    /// Done.
    #[must_use]
    pub fn done(run: Option<u64>) -> HookReply {
        HookReply {
            ok: true,
            run,
            ..HookReply::default()
        }
    }

    /// Not done.
    #[must_use]
    pub fn refused(why: impl Into<String>) -> HookReply {
        HookReply {
            why: Some(why.into()),
            ..HookReply::default()
        }
    }

    /// The domain could not even be destroyed.
    #[must_use]
    pub fn stuck(domain: impl Into<String>, why: impl Into<String>) -> HookReply {
        HookReply {
            why: Some(why.into()),
            stuck: Some(domain.into()),
            ..HookReply::default()
        }
    }
}

impl HookMessage {
    /// A message of this version.
    #[must_use]
    pub fn new(hook: HookRequest) -> HookMessage {
        HookMessage { v: HOOK_VERSION, hook }
    }
}

/// One message as a line, with its line feed.
#[must_use]
pub fn to_line<T: Serialize>(message: &T) -> String {
    // These types have no maps with odd keys and no floats: writing them cannot fail.
    let mut line = serde_json::to_string(message).unwrap_or_default();
    line.push('\n');
    line
}

/// Reads one line, with or without its line feed. A message of another version is an error.
///
/// # Errors
/// Says in one sentence why the line was refused.
pub fn message_from_line(line: &str) -> Result<HookMessage, String> {
    let message: HookMessage = serde_json::from_str(line.trim_end()).map_err(|e| e.to_string())?;
    if message.v != HOOK_VERSION {
        return Err(format!(
            "version {} of the hook messages is not known here, only {HOOK_VERSION}",
            message.v
        ));
    }
    Ok(message)
}

/// Reads the agent's answer.
///
/// # Errors
/// Says in one sentence why the line was refused.
pub fn reply_from_line(line: &str) -> Result<HookReply, String> {
    serde_json::from_str(line.trim_end()).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_golden_messages_are_read_and_written() {
        let ensure = HookRequest::Ensure {
            job: 12,
            uid: 2001,
            gid: 2002,
            spec: VmSpec::for_image("a").unwrap(),
            restart: 0,
        };
        let release = HookRequest::Release {
            job: 12,
            uid: 2001,
            wait_s: 60,
        };
        for (request, golden) in [
            (
                ensure,
                r#"{"v":1,"hook":{"op":"ensure","job":12,"uid":2001,"gid":2002,"spec":{"v":1,"image":"a"},"restart":0}}"#,
            ),
            (release, r#"{"v":1,"hook":{"op":"release","job":12,"uid":2001,"wait_s":60}}"#),
        ] {
            let message = HookMessage::new(request);
            assert_eq!(to_line(&message), format!("{golden}\n"));
            assert_eq!(message_from_line(golden), Ok(message));
        }
    }

    #[test]
    fn the_golden_replies_are_read_and_written() {
        for (reply, golden) in [
            (HookReply::done(Some(3)), r#"{"ok":true,"run":3}"#),
            (HookReply::done(None), r#"{"ok":true}"#),
            (HookReply::refused("no such image"), r#"{"ok":false,"why":"no such image"}"#),
            (
                HookReply::stuck("slurm-12-0", "busy"),
                r#"{"ok":false,"why":"busy","stuck":"slurm-12-0"}"#,
            ),
        ] {
            assert_eq!(to_line(&reply), format!("{golden}\n"));
            assert_eq!(reply_from_line(golden), Ok(reply));
        }
    }

    #[test]
    fn an_older_hook_understands_a_reply_with_more_in_it() {
        assert_eq!(reply_from_line(r#"{"ok":true,"run":3,"later":[1]}"#), Ok(HookReply::done(Some(3))));
    }

    #[test]
    fn other_versions_and_unknown_requests_are_refused() {
        for line in [
            r#"{"v":2,"hook":{"op":"release","job":12,"uid":1,"wait_s":60}}"#,
            r#"{"v":1,"hook":{"op":"destroy","job":12}}"#,
            r#"{"v":1,"hook":{"op":"release","job":-1,"uid":1,"wait_s":60}}"#,
            r#"{"v":1}"#,
            "",
        ] {
            assert!(message_from_line(line).is_err(), "{line}");
        }
    }
}
