//! Prolog and epilog, and VMs that arrive: what begins and ends a VM on this node.
use std::{sync::Arc, time::Duration};

use crossbeam_channel::bounded;
use slurm_vm_api::{session::UserEntry, spec::VmSpec};

use super::{ANSWER, Node, Registry};
use crate::{
    core::{
        Life, Record,
        record::domain_name,
        registry::{Announced, Begin, Meeting},
    },
    vm::{self, Birth, Request},
};

impl Node {
    /// Prolog: a run of the job may begin here soon. Returns the run number at once; everything else happens on the VM's thread.
    ///
    /// # Errors
    /// A fragment for the log.
    pub fn ensure(self: &Arc<Self>, job: u32, run: &Announced) -> Result<u64, String> {
        for _ in 0..2 {
            let (way, vm) = {
                let mut vms = self.vms();
                match vms.announced(job) {
                    Begin::Begin { run: number } => {
                        self.begin(&mut vms, job, number, run.clone());
                        return Ok(number);
                    }
                    Begin::Ask { way, vm } => (way, vm),
                }
            };
            let uid = run.user.uid;
            match self.ask(&way, |reply| Request::JobHere { uid, reply }) {
                Some(Meeting::Goes { run }) => return Ok(run),
                Some(Meeting::Stranger { uid: owner }) => {
                    return Err(format!("job {job} of uid {uid} meets a VM of uid {owner}'s job of that number"));
                }
                Some(Meeting::Leaves { run: number }) if self.vms().waits(job, vm, run.clone()) => return Ok(number),
                // It has ended meanwhile.
                Some(Meeting::Leaves { .. }) | None => {}
            }
        }
        Err(format!("the owner of job {job}'s VM does not answer"))
    }

    /// A VM is begun for a run of the job.
    pub(super) fn begin(self: &Arc<Self>, vms: &mut Registry, job: u32, number: u64, run: Announced) {
        let user = run.user.clone();
        let way = vm::spawn(self.clone(), job, move |node| node.birth(job, number, run));
        vms.begun(job, way, user);
    }

    /// A record for a new VM, or the one of a save that waits on shared storage; nothing if the job's script has ended in its grace time and
    /// is not to run again. May last as long as a file server is away: called on the VM's own thread.
    #[must_use]
    pub fn birth(&self, job: u32, number: u64, run: Announced) -> Option<Birth> {
        let Announced { restart, user, spec } = run;
        if restart == 0 {
            // Of another job that had this number.
            self.forget_completion(job);
        } else if self.completion(job, user.uid).is_some() {
            log::info!("job {job}: its script ended within its grace time: it is not run again");
            self.vms().not_begun(job);
            return None;
        }
        let saved = match vm::saving::find(self, job, user.uid) {
            Ok(saved) => saved,
            // A job that runs for the first time has none.
            Err(why) if restart == 0 => {
                log::warn!("job {job}: {why}");
                None
            }
            Err(why) => {
                let record = self.new_record(job, number, user, spec);
                return Some(Birth::Failed(
                    record,
                    format!("it cannot be known whether a save of the VM waits: {why}"),
                ));
            }
        };
        if let Some(mut record) = saved {
            record.run = number.max(record.run + 1);
            record.come_to(&self.name);
            record.generation += 1;
            let (overlay, shared) = vm::prepare::overlay_path(&self.config, &self.world.store.vm_dir(&record.domain()), &record);
            if let (Life::Restoring { from }, Some(plan)) = (&record.life, record.plan.as_mut()) {
                plan.layers.insert(0, from.join("overlay.qcow2"));
                if plan.overlay.is_some() {
                    (plan.overlay, plan.overlay_shared) = (Some(overlay), shared);
                }
            }
            return Some(Birth::Expected(record));
        }
        Some(Birth::New(self.new_record(job, number, user, spec)))
    }

    fn new_record(&self, job: u32, number: u64, user: UserEntry, spec: VmSpec) -> Record {
        Record {
            run: number,
            created_ms: self.world.clock.now_ms(),
            ..Record::new(
                self.config.cluster.clone(),
                self.name.clone(),
                job,
                user,
                VmSpec {
                    boot_timeout_s: spec.boot_timeout_s.or(Some(self.config.node.boot_timeout_s)),
                    ..spec
                },
            )
        }
    }

    /// Takes in a VM that is to arrive from another node.
    ///
    /// # Errors
    /// When this node has a live VM of the job already.
    pub fn expect(self: &Arc<Self>, record: Record) -> Result<(), String> {
        let mut vms = self.vms();
        vms.expects(record.job)?;
        let (job, user) = (record.job, record.user.clone());
        let way = vm::spawn(self.clone(), job, |_| Some(Birth::Expected(record)));
        vms.begun(job, way, user);
        Ok(())
    }

    /// Epilog: returns when the VM has left this node or `wait` has passed and it was ended.
    ///
    /// # Errors
    /// Names the domain that could not be ended.
    pub fn release(&self, job: u32, wait: Duration) -> Result<(), String> {
        let Some(tx) = self.vms().released(job) else { return Ok(()) };
        let (reply, answer) = bounded(1);
        if tx.send(Request::Release(reply)).is_err() {
            return Ok(());
        }
        if let Ok(outcome) = answer.recv_timeout(wait) {
            return outcome;
        }
        let domain = self.record(job).map_or_else(|| domain_name(job, 0), |r| r.domain());
        log::warn!("job {job}: its VM did not leave within {} s: ending {domain}", wait.as_secs());
        let (reply, answer) = bounded(1);
        let _ = tx.send(Request::Release(reply));
        match self.world.hypervisor.destroy(&domain) {
            Ok(_) => {
                let _ = answer.recv_timeout(ANSWER);
                Ok(())
            }
            Err(e) => Err(format!("domain {domain} cannot be ended: {e}")),
        }
    }
}
