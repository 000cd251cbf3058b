//! Prolog and epilog, and VMs that arrive: what begins and ends a VM on this node.
use std::{sync::Arc, time::Duration};

use crossbeam_channel::bounded;
use slurm_vm_api::{session::UserEntry, spec::VmSpec};

use super::{ANSWER, Entry, Live, Node};
use crate::{
    core::{Life, Record, record::domain_name},
    vm::{self, Birth, Request},
};

impl Node {
    /// Prolog: the job may run here soon; `restart` is Slurm's count of its restarts. Returns the run number at once; everything else happens on the VM's thread.
    ///
    /// # Errors
    /// A fragment for the log.
    pub fn ensure(self: &Arc<Self>, job: u32, restart: u32, user: UserEntry, spec: VmSpec) -> Result<u64, String> {
        for _ in 0..2 {
            let mut vms = self.vms();
            let run = match vms.get(&job) {
                Some(Entry::Live(live)) => {
                    let (tx, owned_by) = (live.tx.clone(), live.user.uid);
                    // Nobody else waits for this owner.
                    drop(vms);
                    let (reply, answer) = bounded(1);
                    let record = self.ask(&tx, Request::Record);
                    if let Some(record) = record.filter(|r| is_on_its_way_out(&r.life)) {
                        // The last run is still on its way out: begin anew as soon as it is over.
                        let node = self.clone();
                        let run = record.run + 1;
                        std::thread::spawn(move || node.ensure_after(job, restart, user, spec));
                        return Ok(run);
                    }
                    if owned_by != user.uid {
                        return Err(format!(
                            "job {job} of uid {} meets a VM of uid {owned_by}'s job of that number",
                            user.uid
                        ));
                    }
                    if tx.send(Request::JobHere(reply)).is_ok()
                        && let Ok(run) = answer.recv_timeout(ANSWER)
                    {
                        return Ok(run);
                    }
                    continue;
                }
                Some(Entry::Over(last)) => last.run + 1,
                None => 1,
            };
            let of = user.clone();
            let tx = vm::spawn(self.clone(), job, move |node| node.birth(job, restart, run, of, spec));
            vms.insert(job, Entry::Live(Live { tx, user }));
            return Ok(run);
        }
        Err(format!("the owner of job {job}'s VM does not answer"))
    }

    /// As [`Node::ensure`], once the VM of the job's last run is over here.
    fn ensure_after(self: &Arc<Self>, job: u32, restart: u32, user: UserEntry, spec: VmSpec) {
        let deadline = std::time::Instant::now() + Duration::from_secs(120);
        loop {
            let over = match self.vms().get(&job) {
                Some(Entry::Live(_)) => false,
                Some(Entry::Over(_)) | None => true,
            };
            if over || std::time::Instant::now() > deadline {
                break;
            }
            self.world.clock.sleep(Duration::from_millis(50));
        }
        if let Err(e) = self.ensure(job, restart, user, spec) {
            log::error!("job {job}: {e}");
        }
    }

    /// A record for a new VM, or the one of a save that waits on shared storage; nothing if the job's script has ended in its grace time and
    /// is not to run again. May last as long as a file server is away: called on the VM's own thread.
    fn birth(&self, job: u32, restart: u32, run: u64, user: UserEntry, spec: VmSpec) -> Option<Birth> {
        if restart == 0 {
            // Of another job that had this number.
            self.forget_completion(job);
        } else if self.completion(job, user.uid).is_some() {
            log::info!("job {job}: its script ended within its grace time: it is not run again");
            self.vms().remove(&job);
            return None;
        }
        let now = self.world.clock.now_ms();
        if let Some(saved) = vm::saving::find(self, job, user.uid) {
            let mut record = saved;
            record.run = run.max(record.run + 1);
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
        Some(Birth::New(Record {
            run,
            created_ms: now,
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
        }))
    }

    /// Takes in a VM that is to arrive from another node.
    ///
    /// # Errors
    /// When this node has a live VM of the job already.
    pub fn expect(self: &Arc<Self>, record: Record) -> Result<(), String> {
        let mut vms = self.vms();
        if let Some(Entry::Live(_)) = vms.get(&record.job) {
            return Err(format!("job {} has a VM here already", record.job));
        }
        let (job, user) = (record.job, record.user.clone());
        let tx = vm::spawn(self.clone(), job, |_| Some(Birth::Expected(record)));
        vms.insert(job, Entry::Live(Live { tx, user }));
        Ok(())
    }

    /// Epilog: returns when the VM has left this node or `wait` has passed and it was ended.
    ///
    /// # Errors
    /// Names the domain that could not be ended.
    pub fn release(&self, job: u32, wait: Duration) -> Result<(), String> {
        let tx = match self.vms().get(&job) {
            Some(Entry::Live(Live { tx, .. })) => tx.clone(),
            _ => return Ok(()),
        };
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

/// The VM's run ends here: a job that begins here meanwhile gets another VM, or this one back, once it is over.
fn is_on_its_way_out(life: &Life) -> bool {
    life.is_over_here() || matches!(life, Life::Stopping { .. } | Life::Leaving { .. } | Life::Saving { .. })
}
