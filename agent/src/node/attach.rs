//! Sessions: a shim wants its program run. Who may have whose VM is decided here.
use std::sync::Arc;

use crossbeam_channel::Sender;
use slurm_vm_api::session::{Frame, ToShim, UserEntry};

use super::{Node, Refused};
use crate::{
    core::{
        Record,
        registry::{self, Announced, JobSeen, WithoutVm, without_vm},
    },
    slurm::JobInfo,
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
        // The registry is not locked while Slurm is asked.
        let known = self.vms().attaches(job, peer_uid);
        let (owner, user) = match known {
            registry::Admission::To(owner, user) => (owner, user),
            registry::Admission::NotYours => return Err(Refused::request(format!("job {job} is not yours"))),
            registry::Admission::AskSlurm(last) => {
                let _turn = turn()?;
                match self.begin_from_slurm(job, peer_uid, &attach, last.as_deref())? {
                    Some(begun) => begun,
                    None => return Ok(Admission::Left),
                }
            }
        };
        attach.open.groups = crate::accounts::groups(&user);
        attach.open.user = user;
        owner
            .send(Request::Attach(Box::new(attach)))
            .map(|()| Admission::Attached)
            .map_err(|_| Refused::node("the VM's owner has ended"))
    }

    /// A job that the prolog did not announce (the agent was down then) is looked up in Slurm: the shim's word alone is not believed.
    /// Returns the way to the owner of the VM that is begun, and its user; nothing if the VM is elsewhere.
    fn begin_from_slurm(
        self: &Arc<Self>,
        job: u32,
        peer_uid: u32,
        attach: &Attach,
        last: Option<&Record>,
    ) -> Result<Option<(Sender<Request>, UserEntry)>, Refused> {
        let info = self.world.slurm.job(job).map_err(|e| e.to_string());
        let seen = info.clone().map(|info| info.as_ref().map(|info| self.job_seen(info)));
        match without_vm(job, &self.name, peer_uid, seen, last) {
            WithoutVm::Announce => {}
            WithoutVm::Left(life) => {
                let line = format!("the VM is {life}, its job follows");
                attach.to.send(Frame::Control(ToShim::Progress(line)));
                return Ok(None);
            }
            WithoutVm::Refused(outcome, why) => return Err(Refused { outcome, why }),
        }
        let Ok(Some(info)) = info else {
            return Err(Refused::node(format!("Slurm knows no job {job}")));
        };
        log::info!("job {job}: not announced by the prolog, taken from Slurm");
        let run = Announced {
            restart: info.brief.restarts,
            user: crate::accounts::entry(info.brief.uid, info.gid),
            spec: attach.open.spec.clone(),
        };
        self.ensure(job, &run).map_err(Refused::node)?;
        let begun = self.vms().attaches(job, peer_uid);
        match begun {
            registry::Admission::To(owner, user) => Ok(Some((owner, user))),
            registry::Admission::NotYours => Err(Refused::request(format!("job {job} is not yours"))),
            registry::Admission::AskSlurm(_) => Err(Refused::node(format!("the VM of job {job} ended at once"))),
        }
    }

    /// Slurm's word on a job as the registry looks at it.
    #[must_use]
    pub fn job_seen(&self, info: &JobInfo) -> JobSeen {
        let brief = &info.brief;
        JobSeen {
            uid: brief.uid,
            here: brief.state.is_on_nodes() && brief.nodes.contains(&self.name),
            start_ms: brief.start_time.and_then(|s| u64::try_from(s).ok()).map(|s| s * 1000),
        }
    }
}
