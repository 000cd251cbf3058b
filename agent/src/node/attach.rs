//! Sessions: a shim wants its program run. Who may have whose VM is decided here.
use std::sync::Arc;

use slurm_vm_api::session::{Frame, ToShim};

use super::{Entry, Live, Node, Refused};
use crate::{
    core::{End, Life, Record},
    vm::{Attach, Request},
};

/// What becomes of a session that was asked for.
#[derive(Debug)]
pub enum Admission {
    /// The VM's owner has it.
    Attached,
    /// All there is to say to it was said.
    Answered,
    /// The VM has left and its job follows; the shim is ended with it.
    Left,
}

impl Node {
    /// A shim wants its program run. Who it is, is `peer_uid`, which the kernel attests; whose the job is, is in the registry, or
    /// Slurm says it. The shim's own word on its user and groups counts for nothing. `turn` is called before Slurm is asked.
    ///
    /// # Errors
    /// Why the session is refused; the VM's owner never hears of it then.
    pub fn attach<T>(
        self: &Arc<Self>,
        mut attach: Attach,
        peer_uid: u32,
        turn: impl FnOnce() -> Result<T, Refused>,
    ) -> Result<Admission, Refused> {
        let job = attach.open.job;
        if attach.open.step == slurm_vm_api::session::BATCH_STEP
            && attach.open.restart > 0
            && let Some(ended) = self.completion(job, peer_uid)
        {
            attach.to.send(Frame::Control(ToShim::Started {
                from: vec![],
                resumed: true,
            }));
            attach.to.send(Frame::Control(ToShim::Exited(ended)));
            self.forget_completion(job);
            return Ok(Admission::Answered);
        }
        let mut over = None;
        let known = match self.vms().get(&job) {
            Some(Entry::Live(live)) if live.user.uid != peer_uid && peer_uid != 0 => {
                return Err(Refused::request(format!("job {job} is not yours")));
            }
            Some(Entry::Live(live)) => Some(live.clone()),
            Some(Entry::Over(last)) if last.user.uid == peer_uid || peer_uid == 0 => {
                over = Some(last.clone());
                None
            }
            _ => None,
        };
        let live = if let Some(live) = known {
            live
        } else {
            let _turn = turn()?;
            // Of an earlier run nothing is told any more.
            if let Some(last) = over.filter(|last| !self.is_of_an_earlier_run(last)) {
                if let Some((outcome, why)) = over_verdict(&last) {
                    return Err(Refused { outcome, why });
                }
                if matches!(last.life, Life::Gone { .. } | Life::Saved { .. }) {
                    // The VM is elsewhere and its job follows: another one here would be a second.
                    let line = format!("the VM is {}, its job follows", last.life.name());
                    attach.to.send(Frame::Control(ToShim::Progress(line)));
                    return Ok(Admission::Left);
                }
            }
            self.ensure_from_slurm(job, peer_uid, &attach)?
        };
        attach.open.groups = crate::accounts::groups(&live.user);
        attach.open.user = live.user;
        live.tx
            .send(Request::Attach(Box::new(attach)))
            .map(|()| Admission::Attached)
            .map_err(|_| Refused::node("the VM's owner has ended"))
    }

    /// The VM ended before the job's present run began.
    fn is_of_an_earlier_run(&self, last: &Record) -> bool {
        let start = self.world.slurm.job(last.job).ok().flatten().and_then(|info| info.brief.start_time);
        let start_ms = start.and_then(|s| u64::try_from(s).ok()).map(|s| s * 1000);
        matches!((last.ended_ms, start_ms), (Some(ended), Some(start)) if ended < start)
    }

    /// A job that the prolog did not announce (the agent was down then) is looked up in Slurm: the shim's word alone is not believed.
    fn ensure_from_slurm(self: &Arc<Self>, job: u32, uid: u32, attach: &Attach) -> Result<Live, Refused> {
        let info = self
            .world
            .slurm
            .job(job)
            .map_err(|e| Refused::node(format!("cannot ask Slurm about job {job}: {e}")))?;
        let info = info.ok_or_else(|| Refused::node(format!("Slurm knows no job {job}")))?;
        if info.brief.uid != uid && uid != 0 {
            return Err(Refused::request(format!("job {job} is not yours")));
        }
        // A job that is over keeps its node list for a while, and no epilog would end what is made for it now.
        if !info.brief.state.is_on_nodes() || !info.brief.nodes.contains(&self.name) {
            return Err(Refused::node(format!("job {job} does not run on {}", self.name)));
        }
        log::info!("job {job}: not announced by the prolog, taken from Slurm");
        let user = crate::accounts::entry(info.brief.uid, info.gid);
        self.ensure(job, info.brief.restarts, user, attach.open.spec.clone())
            .map_err(Refused::node)?;
        match self.vms().get(&job) {
            Some(Entry::Live(live)) if live.user.uid == info.brief.uid => Ok(live.clone()),
            Some(Entry::Live(_)) => Err(Refused::request(format!("job {job} is not yours"))),
            _ => Err(Refused::node(format!("the VM of job {job} ended at once"))),
        }
    }
}

/// What a shim that comes after the end is told; `None` where the job may begin anew.
fn over_verdict(last: &Record) -> Option<(u8, String)> {
    match &last.life {
        Life::Stopped {
            why: End::Released | End::Requeued | End::NotArrived,
        }
        | Life::Gone { .. }
        | Life::Saved { .. } => None,
        Life::Stopped { why } => why
            .verdict()
            .map(|(outcome, line)| (u8::try_from(outcome).unwrap_or(slurm_vm_api::outcome::NODE_FAULT), line)),
        _ => None,
    }
}
