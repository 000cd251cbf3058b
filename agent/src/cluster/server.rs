//! The node role's answers to other agents.
use std::sync::Arc;

use super::protocol::{PeerReply, PeerRequest};
use crate::{health, node::Node, server::log_text, vm::Request};

/// Answers one request of an authenticated agent; may block as long as a move takes.
#[must_use]
pub fn answer(node: &Arc<Node>, request: PeerRequest) -> PeerReply {
    match request {
        PeerRequest::Status => {
            let vms = node.views();
            let totals = node.totals(&vms);
            PeerReply::Status { health: health::of(node), vms, totals }
        }
        PeerRequest::Show { job } => PeerReply::Vm(node.view(job).map(Box::new)),
        PeerRequest::Log { job, journal, serial } => {
            let (j, s) = log_text(node, &crate::core::record::domain_name(job, 0), journal, serial);
            PeerReply::Log {
                journal: String::from_utf8_lossy(&j).into_owned(),
                journal_bytes: j.len() as u64,
                serial: String::from_utf8_lossy(&s).into_owned(),
                serial_bytes: s.len() as u64,
                over: node.owner(job).is_none(),
            }
        }
        PeerRequest::Progress { job } => {
            PeerReply::Progress(node.owner(job).and_then(|owner| node.ask(&owner, Request::Progress)).flatten())
        }
        PeerRequest::GiveUp { job } => tell(node, job, crate::core::Event::GiveUp),
        PeerRequest::CancelMove { job } => tell(node, job, crate::core::Event::CancelMove),
        PeerRequest::Release { job } => tell(node, job, crate::core::Event::Release),
        other => PeerReply::Refused(format!("not possible yet: {other:?}")),
    }
}

fn tell(node: &Arc<Node>, job: u32, event: crate::core::Event) -> PeerReply {
    match node.owner(job) {
        Some(owner) if owner.send(Request::Core(event)).is_ok() => PeerReply::Ok,
        _ => PeerReply::Refused(format!("job {job} has no VM on {}", node.name)),
    }
}
