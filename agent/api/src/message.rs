//! The first line of a connection to the agent's socket that is no session: who speaks, and what is asked.
//!
//! One line of JSON, `{"v":1,"hook":…}` or `{"v":1,"ask":…}`. It is parsed once; what it is follows from its key alone, never from what
//! stands in its values. It is answered in the speaker's own form, also where it is not understood.
use serde::Deserialize;
use serde_json::Value;

use crate::{
    hooks::{HOOK_VERSION, HookRequest},
    query::{ASK_VERSION, Ask},
};

/// What a connection begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The prolog or the epilog.
    Hook(HookRequest),
    /// `svm`.
    Ask(Ask),
}

/// A line that was not understood, by the form in which that is to be said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Misread {
    /// A hook waits for a [`crate::hooks::HookReply`].
    Hook(String),
    /// Everybody else waits for an [`crate::query::Answer`].
    Ask(String),
}

/// The line as it stands on the wire.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    v: u32,
    #[serde(default)]
    hook: Option<Value>,
    #[serde(default)]
    ask: Option<Value>,
}

impl Message {
    /// Reads one line, with or without its line feed.
    ///
    /// # Errors
    /// Says in one sentence why the line was refused, in the form for who speaks.
    pub fn read(line: &str) -> Result<Self, Misread> {
        let not_understood = |e: serde_json::Error| format!("the question is not understood: {e}");
        let line: Line = serde_json::from_str(line.trim_end()).map_err(|e| Misread::Ask(not_understood(e)))?;
        match (line.hook, line.ask) {
            (Some(_), None) if line.v != HOOK_VERSION => Err(Misread::Hook(format!(
                "version {} of the hook messages is not known here, only {HOOK_VERSION}",
                line.v
            ))),
            (Some(hook), None) => serde_json::from_value(hook)
                .map(Self::Hook)
                .map_err(|e| Misread::Hook(e.to_string())),
            (None, Some(_)) if line.v != ASK_VERSION => Err(Misread::Ask(format!(
                "version {} of the questions is not known here: update svm and the agent together",
                line.v
            ))),
            (None, Some(ask)) => serde_json::from_value(ask)
                .map(Self::Ask)
                .map_err(|e| Misread::Ask(not_understood(e))),
            (None, None) | (Some(_), Some(_)) => Err(Misread::Ask("a line has either `hook` or `ask`".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        hooks::{HookMessage, to_line},
        query::AskLine,
    };

    fn asks() -> Vec<Ask> {
        vec![
            Ask::List,
            Ask::Show { job: 7 },
            Ask::Log { job: 7, follow: true },
            Ask::Migrate {
                job: 7,
                to: Some("hook".into()),
            },
            Ask::Migrate {
                job: 7,
                to: Some(r#"{"hook":{"op":"release"}}"#.into()),
            },
            Ask::CancelMigration { job: 7 },
            Ask::Health,
            Ask::Check,
        ]
    }

    #[test]
    fn what_a_line_is_follows_from_its_key_and_from_no_value() {
        for ask in asks() {
            let line = to_line(&AskLine {
                v: ASK_VERSION,
                ask: ask.clone(),
            });
            assert_eq!(Message::read(&line), Ok(Message::Ask(ask)));
        }
        let release = HookRequest::Release {
            job: 12,
            uid: 2001,
            wait_s: 60,
        };
        assert_eq!(
            Message::read(&to_line(&HookMessage::new(release.clone()))),
            Ok(Message::Hook(release))
        );
    }

    #[test]
    fn a_line_that_is_not_understood_is_answered_in_the_form_of_who_speaks() {
        for line in [
            r#"{"v":2,"hook":{"op":"release","job":12,"uid":1,"wait_s":60}}"#,
            r#"{"v":1,"hook":{"op":"destroy","job":12}}"#,
            r#"{"v":1,"hook":"ask"}"#,
        ] {
            assert!(matches!(Message::read(line), Err(Misread::Hook(_))), "{line}");
        }
        for line in [
            r#"{"v":2,"ask":"list"}"#,
            r#"{"v":1,"ask":"fly"}"#,
            r#"{"v":1}"#,
            r#"{"v":1,"ask":"list","hook":{"op":"release","job":1,"uid":1,"wait_s":1}}"#,
            r#"{"v":1,"ask":"list","more":1}"#,
            r#""hook""#,
            "",
        ] {
            assert!(matches!(Message::read(line), Err(Misread::Ask(_))), "{line}");
        }
    }
}
