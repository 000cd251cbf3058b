//! `svm` for the whole cluster.
use std::{collections::HashMap, io, sync::Arc, time::Duration};

use slurm_vm_api::query::{Answer, Ask, Totals, VmView};

use super::{Controller, health, verdict};
use crate::{
    cluster::{PeerReply, PeerRequest},
    core::relocation::{Event, Step},
    server::{asks::Refusal, prefixed},
};

const PEER: Duration = Duration::from_secs(10);

impl Controller {
    /// Answers one question; `operator`: root or SlurmUser.
    ///
    /// # Errors
    /// A line for the asker, or that he is gone.
    pub fn answer(
        self: &Arc<Self>,
        ask: &Ask,
        uid: u32,
        operator: bool,
        say: &mut dyn FnMut(Answer) -> io::Result<()>,
    ) -> Result<(), Refusal> {
        let may_see = |v: &VmView| operator || v.uid == uid;
        match ask {
            Ask::List => {
                let (views, totals) = self.list();
                for v in views.into_iter().filter(may_see) {
                    say(Answer::Vm(Box::new(v)))?;
                }
                say(Answer::Totals(Box::new(totals)))?;
            }
            Ask::Show { job } => {
                let view = self.find(*job, &may_see)?;
                // The poll's word may be a second old.
                let fresh = self
                    .peers
                    .request(&view.node, &self.address(&view.node), &PeerRequest::Show { job: *job }, PEER);
                let mut view = match fresh {
                    Ok(PeerReply::Vm(Some(fresh))) => *fresh,
                    _ => view,
                };
                view.verdict = verdict::complete(self, &view);
                say(Answer::Vm(Box::new(view)))?;
            }
            Ask::Log { job, follow } => self.log(*job, *follow, &may_see, say)?,
            Ask::Health => {
                let all: Vec<_> = {
                    let (cluster, now) = (self.cluster(), self.world.clock.instant());
                    cluster.nodes.keys().map(|n| health::of(&cluster, n, now)).collect()
                };
                for n in all {
                    say(Answer::Node(n))?;
                }
            }
            Ask::Migrate { job, to } => {
                let view = self.find(*job, &may_see)?;
                self.migrate(&view, to.clone())?;
                self.follow_move(&view, say)?;
            }
            Ask::CancelMigration { job } => {
                self.find(*job, &may_see)?;
                let step = self.cluster().moves.get(job).map(|m| m.step);
                match step {
                    Some(Step::Planned) => self.relocations.tell(*job, Event::GiveUp("it was cancelled".into())),
                    Some(_) => return Err(format!("the VM of job {job} has moved already").into()),
                    None => return Err(format!("job {job} is not moving").into()),
                }
            }
            Ask::Check => {
                for f in self.check()? {
                    say(Answer::Finding(f))?;
                }
            }
        }
        Ok(())
    }

    /// Tells how a move by hand goes until it has ended.
    fn follow_move(&self, view: &VmView, say: &mut dyn FnMut(Answer) -> io::Result<()>) -> Result<(), Refusal> {
        let job = view.job;
        let mut last = String::new();
        loop {
            let (running, result) = {
                let cluster = self.cluster();
                (cluster.moves.get(&job).cloned(), cluster.results.get(&job).cloned())
            };
            let Some(m) = running else {
                return match result {
                    Some((Ok(line), _)) => Ok(say(Answer::Text(format!("job {job}: {line}\n")))?),
                    Some((Err(line), _)) => Err(line.into()),
                    None => Err(format!("job {job}: its move ended, and the job with it").into()),
                };
            };
            let line = match m.step {
                Step::Planned => {
                    let progress = self
                        .peers
                        .request(&m.from, &self.address(&m.from), &PeerRequest::Progress { job }, PEER);
                    match (progress, &m.to) {
                        (Ok(PeerReply::Progress(Some(text))), _) => text,
                        (_, Some(to)) => format!("{to} is reserved"),
                        _ => "looking for a node".to_owned(),
                    }
                }
                Step::Moved => "the guest runs there; the job is put back into the queue".to_owned(),
                Step::Requeued | Step::Released => "the job is on its way to its VM".to_owned(),
                Step::Landed => "the job is back with its VM".to_owned(),
            };
            if line != last {
                say(Answer::Text(format!("job {job}: {line}\n")))?;
                last = line;
            }
            self.world.clock.sleep(Duration::from_millis(250));
        }
    }

    /// VMs of the cluster, one line per job: where a job was on several nodes, the one that has it now.
    fn list(&self) -> (Vec<VmView>, Totals) {
        let cluster = self.cluster();
        let mut totals = Totals {
            scope: "cluster".into(),
            ..Totals::default()
        };
        let mut views: HashMap<u32, &VmView> = HashMap::new();
        for status in cluster.nodes.values().flatten() {
            let t = &status.totals;
            totals.vms += t.vms;
            totals.vcpus += t.vcpus;
            totals.mem_mib += t.mem_mib;
            totals.disk_bytes += t.disk_bytes;
            totals.run_seconds += t.run_seconds;
            totals.vcpu_seconds += t.vcpu_seconds;
            totals.ended += t.ended;
            totals.moves += t.moves;
            totals.moved_bytes += t.moved_bytes;
            for v in &status.vms {
                let known = views.entry(v.job).or_insert(v);
                if rank(v) > rank(known) {
                    *known = v;
                }
            }
        }
        let mut views: Vec<VmView> = views.into_values().cloned().collect();
        views.sort_by_key(|v| (v.is_over(), v.job));
        (views, totals)
    }

    fn find(&self, job: u32, may_see: &dyn Fn(&VmView) -> bool) -> Result<VmView, Refusal> {
        let cluster = self.cluster();
        let words = cluster.nodes.values().flatten().flat_map(|status| &status.vms);
        let newest = words.filter(|v| v.job == job).max_by_key(|v| rank(v)).cloned();
        drop(cluster);
        newest
            .or_else(|| self.ended_before(job))
            .filter(may_see)
            .ok_or_else(|| format!("job {job} has no VM in the cluster (or it ended long ago)").into())
    }

    /// A VM that ended before those that the nodes report of by themselves: each node is asked.
    fn ended_before(&self, job: u32) -> Option<VmView> {
        let well: Vec<String> = {
            let (cluster, now) = (self.cluster(), self.world.clock.instant());
            let nodes = cluster.nodes.keys().filter(|n| health::of(&cluster, n, now).healthy);
            nodes.cloned().collect()
        };
        let ask = |node: String| match self.peers.request(&node, &self.address(&node), &PeerRequest::Show { job }, PEER) {
            Ok(PeerReply::Vm(view)) => view.map(|v| *v),
            _ => None,
        };
        well.into_iter().filter_map(ask).max_by_key(rank)
    }

    fn log(
        &self,
        job: u32,
        follow: bool,
        may_see: &dyn Fn(&VmView) -> bool,
        say: &mut dyn FnMut(Answer) -> io::Result<()>,
    ) -> Result<(), Refusal> {
        let node = self.find(job, may_see)?.node;
        let (mut journal, mut serial) = (0, 0);
        loop {
            let reply = self
                .peers
                .request(&node, &self.address(&node), &PeerRequest::Log { job, journal, serial }, PEER)
                .map_err(|e| format!("{node} does not answer: {e}"))?;
            let PeerReply::Log {
                journal: j,
                journal_bytes,
                serial: s,
                serial_bytes,
                over,
            } = reply
            else {
                return Err(format!("{node} gave another answer than asked for").into());
            };
            if !j.is_empty() {
                say(Answer::Text(j))?;
            }
            if !s.is_empty() {
                say(Answer::Text(prefixed(s.as_bytes(), "guest| ")))?;
            }
            journal += journal_bytes;
            serial += serial_bytes;
            let nothing_new = journal_bytes == 0 && serial_bytes == 0;
            if nothing_new && (!follow || over) {
                return Ok(());
            }
            if nothing_new {
                self.world.clock.sleep(Duration::from_millis(200));
            }
        }
    }
}

/// Which of two nodes' words on a job counts: alive before over, more of the job's history before less, later run before earlier.
fn rank(v: &VmView) -> (bool, usize, u8, u64) {
    let over = match v.state.as_str() {
        "gone" => 0,
        "stopped" => 1,
        "saved" | "arriving" => 2,
        _ => 3,
    };
    (over == 3, v.moves.len(), over, v.started_at.unwrap_or(0) + v.run)
}

#[cfg(test)]
mod tests {
    use super::*;
    use slurm_vm_api::query::MoveView;

    #[test]
    fn a_vm_that_was_restored_and_has_ended_is_not_called_saved() {
        let at = |state: &str, moves: usize| VmView {
            state: state.into(),
            moves: vec![MoveView::default(); moves],
            ..VmView::default()
        };
        assert!(rank(&at("stopped", 3)) > rank(&at("saved", 2)));
        assert!(rank(&at("saved", 1)) > rank(&at("gone", 1)));
        assert!(rank(&at("running", 0)) > rank(&at("saved", 1)));
        assert!(rank(&at("leaving", 0)) > rank(&at("arriving", 0)));
    }
}
