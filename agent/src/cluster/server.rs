//! The node role's answers to other agents.
use std::{sync::Arc, time::Duration};

use crossbeam_channel::bounded;

use super::protocol::{PeerReply, PeerRequest};
use crate::{
    core::{Event, HandOverError, KeptOutput, supersede::is_superseded},
    node::{Node, health},
    peer::{Role, Who},
    server::log_text,
    vm::{
        Request, converge,
        moving::{self, MoveOrder},
    },
};

/// Longest time for ending a VM that another node's start of the job has made needless.
const RELEASE_WITHIN: Duration = Duration::from_secs(4);

/// Answers one request of an authenticated agent; may block as long as a move takes.
#[must_use]
pub fn answer(node: &Arc<Node>, from: &Who, request: PeerRequest) -> PeerReply {
    if from.role == Role::Controller {
        node.heard_controller(from);
    }
    if !allowed(from.role, &request) {
        log::warn!("{} ({:?}) asked what its role may not: {request:?}", from.node, from.role);
        return PeerReply::Refused(format!("a {:?} may not ask this", from.role));
    }
    match request {
        PeerRequest::Status => {
            let (vms, totals) = node.status();
            PeerReply::Status {
                health: health::of(node),
                vms,
                totals,
            }
        }
        PeerRequest::Show { job } => PeerReply::Vm(node.view(job).map(Box::new)),
        PeerRequest::Log { job, journal, serial } => {
            let domain = node
                .record(job)
                .map_or_else(|| crate::core::record::domain_name(job, 0), |r| r.domain());
            let (j, s) = log_text(node, &domain, journal, serial);
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
        PeerRequest::MoveOut {
            job,
            to,
            address,
            cause,
            deadline_ms,
        } => {
            let move_id = format!("{job}-{}-{}", node.name, node.world.clock.now_ms());
            let order = MoveOrder {
                move_id,
                to,
                address,
                cause,
                deadline_ms,
            };
            moved(node, job, |reply| Request::MoveOut { order, reply })
        }
        PeerRequest::Save { job, cause } => moved(node, job, |reply| Request::Save { cause, reply }),
        PeerRequest::Grace { job, preempted } => match node.record(job) {
            Some(record) => {
                if let Some(owner) = node.owner(job).filter(|_| preempted) {
                    let _ = owner.send(Request::Grace);
                }
                PeerReply::Ways {
                    ways: moving::ways(&node.config, &record),
                    reserve_ms: converge::reserve_ms(node, &record),
                }
            }
            None => PeerReply::Refused(format!("job {job} has no VM on {}", node.name)),
        },
        PeerRequest::CancelMove { job } => tell(node, job, Event::CancelMove),
        PeerRequest::Part { job } => match node.owner(job) {
            Some(owner) if owner.send(Request::Part).is_ok() => PeerReply::Ok,
            _ => PeerReply::Refused(format!("job {job} has no VM on {}", node.name)),
        },
        PeerRequest::Note { job, line } => match node.record(job) {
            Some(record) => {
                node.world.store.journal(&record.domain(), node.world.clock.now_ms(), &line);
                PeerReply::Ok
            }
            None => PeerReply::Refused(format!("job {job} has no VM on {}", node.name)),
        },
        PeerRequest::Release { job } => tell(node, job, Event::Release),
        PeerRequest::Import {
            record,
            token,
            copy_overlay,
            host,
            marks,
        } => match moving::import(node, &from.node, *record, &token, copy_overlay, &host, &marks) {
            Ok(reply) => reply,
            Err(why) => PeerReply::Refused(why),
        },
        PeerRequest::Kept {
            job,
            by,
            program,
            stream,
            offset,
            hex,
        } => match crate::text::unhex(&hex) {
            Some(bytes) => {
                let output = KeptOutput {
                    program,
                    stream,
                    offset,
                    bytes,
                };
                handed_over(node, job, |reply| Request::Kept { by, output, reply })
            }
            None => PeerReply::Refused("the output is not in hexadecimal".into()),
        },
        PeerRequest::TakeOver { job, by, programs, moves } => {
            let move_id = by.move_id.clone();
            let request = |reply| Request::TookOver {
                by,
                programs,
                moves,
                reply,
            };
            let answer = handed_over(node, job, request);
            if answer == PeerReply::Ok {
                node.moves.close_arrival(&move_id);
            }
            answer
        }
        PeerRequest::Abandon { job, by } => {
            node.moves.close_arrival(&by.move_id);
            // Only a VM that is still expected by this very move is forgotten.
            if let Some(owner) = node.owner(job) {
                let _ = owner.send(Request::Core(Event::Abandoned { by }));
            }
            PeerReply::Ok
        }
        PeerRequest::Supersede { job, restarts } if node.record(job).is_some_and(|r| is_superseded(&r, restarts)) => {
            log::warn!("job {job}: it has started over on {}: its VM here is ended", from.node);
            let (reply, answer) = bounded(1);
            if node.owner(job).is_none_or(|o| o.send(Request::Release(reply)).is_err()) {
                return PeerReply::Ok;
            }
            match answer.recv_timeout(RELEASE_WITHIN) {
                Ok(Ok(())) => PeerReply::Ok,
                Ok(Err(why)) => PeerReply::Refused(why),
                Err(_) => PeerReply::Refused(format!("the VM of job {job} is still on {}", node.name)),
            }
        }
        PeerRequest::Supersede { .. } => PeerReply::Ok,
        PeerRequest::RunsHere { job, by, question } => match moving::has_guest(node, job, &by, question) {
            Ok(here) => PeerReply::RunsHere(here),
            Err(why) => PeerReply::Refused(why),
        },
    }
}

/// Orders come from the controller, the steps of a move from the other node.
fn allowed(role: Role, request: &PeerRequest) -> bool {
    match request {
        PeerRequest::Status | PeerRequest::Show { .. } | PeerRequest::Log { .. } | PeerRequest::Progress { .. } => true,
        PeerRequest::RunsHere { .. }
        | PeerRequest::Import { .. }
        | PeerRequest::Kept { .. }
        | PeerRequest::TakeOver { .. }
        | PeerRequest::Abandon { .. }
        | PeerRequest::Supersede { .. } => role == Role::Node,
        PeerRequest::MoveOut { .. }
        | PeerRequest::Save { .. }
        | PeerRequest::CancelMove { .. }
        | PeerRequest::Grace { .. }
        | PeerRequest::Part { .. }
        | PeerRequest::Note { .. }
        | PeerRequest::Release { .. } => role == Role::Controller,
    }
}

fn moved(
    node: &Arc<Node>,
    job: u32,
    request: impl FnOnce(crossbeam_channel::Sender<Result<slurm_vm_api::query::MoveView, String>>) -> Request,
) -> PeerReply {
    let Some(owner) = node.owner(job) else {
        return PeerReply::Refused(format!("job {job} has no VM on {}", node.name));
    };
    let (reply, answer) = bounded(1);
    if owner.send(request(reply)).is_err() {
        return PeerReply::Refused(format!("the VM of job {job} has just ended"));
    }
    // As long as it takes: an answer before the end would let the controller begin something else beside the copy.
    match answer.recv() {
        Ok(Ok(done)) => PeerReply::Moved(Box::new(done)),
        Ok(Err(why)) => PeerReply::Refused(why),
        Err(_) => PeerReply::Refused(format!("the VM of job {job} ended while it was to move")),
    }
}

/// Passes on what the source of a move hands over, and waits until it was taken or refused.
fn handed_over(
    node: &Arc<Node>,
    job: u32,
    request: impl FnOnce(crossbeam_channel::Sender<Result<(), HandOverError>>) -> Request,
) -> PeerReply {
    let Some(owner) = node.owner(job) else {
        return PeerReply::NotThisMove(format!("job {job} has no VM on {}", node.name));
    };
    match node.ask(&owner, request) {
        Some(Ok(())) => PeerReply::Ok,
        Some(Err(HandOverError::NotThisMove(why))) => {
            log::warn!("job {job}: what the source of a move hands over is not taken: {why}");
            PeerReply::NotThisMove(why)
        }
        Some(Err(HandOverError::NotNow(why))) => PeerReply::Refused(why),
        None => PeerReply::Refused(format!("the owner of job {job}'s VM does not answer")),
    }
}

fn tell(node: &Arc<Node>, job: u32, event: Event) -> PeerReply {
    match node.owner(job) {
        Some(owner) if owner.send(Request::Core(event)).is_ok() => PeerReply::Ok,
        _ => PeerReply::Refused(format!("job {job} has no VM on {}", node.name)),
    }
}
