//! Which controllers have spoken to this agent. A second one that is alive beside the first, after a failover perhaps, is said once.
use super::Node;
use crate::peer::Who;

/// The controllers that have been heard.
#[derive(Debug, Default)]
pub(super) struct Controllers {
    /// Term and node of the one that began last.
    newest: Option<(u64, String)>,
    /// Term of the older one that was said last.
    said: u64,
}

impl Controllers {
    /// One has spoken. Returns a line for the log where that is no matter of course.
    fn heard(&mut self, term: u64, node: &str) -> Option<String> {
        match &self.newest {
            Some((newest, _)) if term == *newest => None,
            Some((newest, at)) if term < *newest => {
                let is_new = self.said != term;
                self.said = term;
                is_new.then(|| {
                    format!(
                        "the controller on {node} speaks beside the one on {at}, which began later: only one must run (controller.enabled)"
                    )
                })
            }
            known => {
                let line = known
                    .as_ref()
                    .filter(|(_, at)| at != node)
                    .map(|(_, at)| format!("the controller is on {node} now; it was on {at}"));
                self.newest = Some((term, node.to_owned()));
                line
            }
        }
    }
}

impl Node {
    /// Takes note of a controller that speaks.
    pub fn heard_controller(&self, who: &Who) {
        let mut controllers = self.controllers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(line) = controllers.heard(who.term, &who.node) {
            log::warn!("{line}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_controllers_at_once_are_said_once_and_a_restart_is_not() {
        let mut controllers = Controllers::default();
        assert_eq!(controllers.heard(10, "ctl"), None);
        assert_eq!(controllers.heard(20, "ctl"), None, "it was restarted");
        let moved = controllers.heard(30, "backup").unwrap();
        assert!(moved.contains("backup") && moved.contains("ctl"), "{moved}");
        let both = controllers.heard(20, "ctl").unwrap();
        assert!(both.contains("only one must run"), "{both}");
        assert_eq!(controllers.heard(20, "ctl"), None, "once");
        assert_eq!(controllers.heard(30, "backup"), None);
    }
}
