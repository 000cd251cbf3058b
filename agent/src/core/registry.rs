//! Which VMs there are on a node, and what becomes of who comes for one: a prolog, a shim, an epilog, another node, the agent's own next start.
//!
//! ```text
//!   (none) --announced, expected, found in the ledger--> Live --retired--> Over --announced--> Live
//!                                                         | announced, and it is on its way out: the next run waits for that
//!                                                         '--retired, and a run waits------------------------------> Live
//! ```
//!
//! Pure: no libvirt, Slurm, file, clock or lock. `W` is the way to a VM's owner. What has to be asked first comes as a parameter, so the
//! caller holds no lock meanwhile; what is to be done comes back as a value. The node role ([`crate::node`]) and the simulation carry it
//! out.
use std::collections::{BTreeMap, BTreeSet};

use slurm_vm_api::{outcome, session::UserEntry, spec::VmSpec};
use uuid::Uuid;

use super::{
    ended::{Ended, Sums},
    record::{End, Life, Record},
};

/// A run of a job that begins on this node, as the prolog or Slurm tells it.
#[derive(Debug, Clone, PartialEq)]
pub struct Announced {
    /// Slurm's count of the job's restarts.
    pub restart: u32,
    /// The job's user.
    pub user: UserEntry,
    /// What the user asked for.
    pub spec: VmSpec,
}

/// A VM with an owner.
#[derive(Debug, Clone)]
pub struct Live<W> {
    /// The way to its owner.
    pub way: W,
    /// Whose it is: nobody has to wait for the owner to learn it.
    pub user: UserEntry,
    /// Which of the VMs that this registry has seen it is.
    vm: u64,
    /// A later run of the job, which waits until this VM has left the node.
    next: Option<Announced>,
}

/// What is known of one job on this node.
#[derive(Debug, Clone)]
pub enum Entry<W> {
    /// Its VM has an owner.
    Live(Box<Live<W>>),
    /// Its VM is over here; the record says how.
    Over(Box<Record>),
}

/// What a run that was announced leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Begin<W> {
    /// A VM is to be begun, with this run number.
    Begin {
        /// The run's number.
        run: u64,
    },
    /// There is a VM. Its owner has to say whether it is for this run ([`meets`]).
    Ask {
        /// The way to the owner.
        way: W,
        /// Which VM it is, for [`Registry::waits`].
        vm: u64,
    },
}

/// What the owner of a VM says to a run that is announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meeting {
    /// The VM is the run's.
    Goes {
        /// The run's number.
        run: u64,
    },
    /// The VM belongs to an earlier run, and is on its way out.
    Leaves {
        /// The number of the run that begins then.
        run: u64,
    },
    /// The VM is another user's: Slurm has used the job's number twice.
    Stranger {
        /// The VM's user.
        uid: u32,
    },
}

/// What a shim is told that comes for a VM.
#[derive(Debug, Clone, PartialEq)]
pub enum Admission<W> {
    /// Its VM's owner takes it, as this user.
    To(W, UserEntry),
    /// There is no VM. Slurm has to say whether the job runs here ([`without_vm`]); of the last VM there is this record, if it was this user's.
    AskSlurm(Option<Box<Record>>),
    /// The job is somebody else's.
    NotYours,
}

/// What Slurm says of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JobSeen {
    /// Its user.
    pub uid: u32,
    /// It has this node, and has not ended.
    pub here: bool,
    /// When its present run began, in Unix milliseconds.
    pub start_ms: Option<u64>,
}

/// What becomes of a shim that finds no VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WithoutVm {
    /// The job's run is announced now: the prolog found no agent.
    Announce,
    /// The VM has left, and its job follows: another one here would be a second.
    Left(&'static str),
    /// Exit code of the shim, and one line for the user.
    Refused(u8, String),
}

/// A domain of ours, as libvirt names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its identity across hosts.
    pub uuid: Uuid,
    /// The job's run that it was started for, by our own note in it.
    pub run: u64,
}

/// What an agent does with a record that it finds at its start.
#[derive(Debug, Clone, PartialEq)]
pub enum Found {
    /// Its time is up: it is removed.
    Old(Record),
    /// The VM is over. `left`: its domain is there all the same, and is to be ended.
    Over {
        /// The record.
        record: Record,
        /// The domain is there.
        left: bool,
    },
    /// The VM goes on, or is ended, as its life says.
    Goes {
        /// The record.
        record: Record,
        /// libvirt has its domain; `None` when libvirt did not say.
        domain_here: Option<bool>,
    },
}

/// What is to be done when libvirt can be asked again.
#[derive(Debug, PartialEq, Eq)]
pub struct Recheck<W> {
    /// Owners whose VM should run, and libvirt has no domain: its end was not told.
    pub ended: Vec<W>,
    /// Domains that nobody has: of VMs that are over, or of none.
    pub left: Vec<String>,
}

/// The VMs of a node, by job.
#[derive(Debug)]
pub struct Registry<W> {
    vms: BTreeMap<u32, Entry<W>>,
    ended: Ended,
    /// VMs that have had an owner so far.
    seen: u64,
    /// Domains of records that this agent cannot read: they are not its to end.
    foreign: BTreeSet<String>,
    /// All of the ledger has been looked at. Before, a domain that is not known may be a VM's all the same.
    complete: bool,
}

impl<W> Default for Registry<W> {
    fn default() -> Self {
        Self {
            vms: BTreeMap::new(),
            ended: Ended::default(),
            seen: 0,
            foreign: BTreeSet::new(),
            complete: false,
        }
    }
}

impl<W: Clone> Registry<W> {
    /// What is known of a job.
    #[must_use]
    pub fn get(&self, job: u32) -> Option<&Entry<W>> {
        self.vms.get(&job)
    }

    /// All that is known, by job.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Entry<W>)> {
        self.vms.iter().map(|(job, entry)| (*job, entry))
    }

    fn put(&mut self, job: u32, entry: Entry<W>) -> Option<Entry<W>> {
        let before = self.take(job);
        if let Entry::Over(record) = &entry {
            self.ended.add(record);
        }
        self.vms.insert(job, entry);
        before
    }

    fn take(&mut self, job: u32) -> Option<Entry<W>> {
        let before = self.vms.remove(&job);
        if let Some(Entry::Over(record)) = &before {
            self.ended.take(record);
        }
        before
    }

    /// The VMs that have an owner, by job.
    pub fn alive(&self) -> impl Iterator<Item = (u32, &Live<W>)> {
        self.vms.iter().filter_map(|(job, entry)| match entry {
            Entry::Live(live) => Some((*job, &**live)),
            Entry::Over(_) => None,
        })
    }

    /// VMs that are over: those whose saves wait, and of the others the `most` that ended last.
    pub fn recently_over(&self, most: usize) -> impl Iterator<Item = &Record> {
        self.ended.recent(most).filter_map(|job| match self.vms.get(&job) {
            Some(Entry::Over(record)) => Some(&**record),
            _ => None,
        })
    }

    /// What the VMs that are over were given in all.
    #[must_use]
    pub fn sums(&self) -> Sums {
        self.ended.sums()
    }

    /// The VM of a job, if it has an owner.
    #[must_use]
    pub fn live(&self, job: u32) -> Option<&Live<W>> {
        match self.vms.get(&job) {
            Some(Entry::Live(live)) => Some(live),
            _ => None,
        }
    }

    /// A run begins: the caller makes the VM, and says so ([`Registry::begun`]) before it lets go of the registry.
    #[must_use]
    pub fn announced(&self, job: u32) -> Begin<W> {
        match self.vms.get(&job) {
            Some(Entry::Live(live)) => Begin::Ask {
                way: live.way.clone(),
                vm: live.vm,
            },
            Some(Entry::Over(last)) => Begin::Begin { run: last.run + 1 },
            None => Begin::Begin { run: 1 },
        }
    }

    /// The owner has said that the job's VM is on its way out ([`Meeting::Leaves`]). The run waits for that; `false` when the VM has
    /// left meanwhile, so that the run is to be announced again.
    pub fn waits(&mut self, job: u32, vm: u64, run: Announced) -> bool {
        match self.vms.get_mut(&job) {
            Some(Entry::Live(live)) if live.vm == vm => {
                live.next = Some(run);
                true
            }
            _ => false,
        }
    }

    /// A VM has an owner from now on.
    pub fn begun(&mut self, job: u32, way: W, user: UserEntry) {
        self.seen += 1;
        let vm = self.seen;
        self.put(job, Entry::Live(Box::new(Live { way, user, vm, next: None })));
    }

    /// Nothing was begun after all.
    pub fn not_begun(&mut self, job: u32) {
        self.take(job);
    }

    /// A VM wants to come from another node.
    ///
    /// # Errors
    /// When the job has a VM here.
    pub fn expects(&self, job: u32) -> Result<(), String> {
        self.live(job).map_or(Ok(()), |_| Err(format!("job {job} has a VM here already")))
    }

    /// The VM is over here and its owner ends. A run that has waited for that begins now, with this number.
    pub fn retired(&mut self, record: Record) -> Option<(u64, Announced)> {
        let (job, run) = (record.job, record.run + 1);
        match self.put(job, Entry::Over(Box::new(record))) {
            Some(Entry::Live(live)) => live.next.map(|next| (run, next)),
            _ => None,
        }
    }

    /// The VM was on its way out and stays, so that a run which has waited for its end gets it. True if one has, and it is that user's:
    /// the owner goes on as if it had been announced now.
    pub fn stays(&mut self, job: u32, uid: u32) -> bool {
        match self.vms.get_mut(&job) {
            Some(Entry::Live(live)) => live.next.take_if(|next| next.user.uid == uid).is_some(),
            _ => false,
        }
    }

    /// The job leaves this node: the way to its VM's owner, who has to know. A run that waits for the VM's end is over as well.
    pub fn released(&mut self, job: u32) -> Option<W> {
        match self.vms.get_mut(&job) {
            Some(Entry::Live(live)) => {
                live.next = None;
                Some(live.way.clone())
            }
            _ => None,
        }
    }

    /// A shim of the user `peer_uid` comes for the job's VM. The uid is what the kernel says of the connection.
    #[must_use]
    pub fn attaches(&self, job: u32, peer_uid: u32) -> Admission<W> {
        let may = |uid| uid == peer_uid || peer_uid == 0;
        match self.vms.get(&job) {
            Some(Entry::Live(live)) if may(live.user.uid) => Admission::To(live.way.clone(), live.user.clone()),
            Some(Entry::Live(_)) => Admission::NotYours,
            Some(Entry::Over(last)) if may(last.user.uid) => Admission::AskSlurm(Some(last.clone())),
            _ => Admission::AskSlurm(None),
        }
    }

    /// What an agent finds at its start. `domains` is `None` when libvirt did not say which there are: a VM must not be taken for lost because
    /// libvirt is away. `keep_ms`: how long a record is kept after its VM's end.
    #[must_use]
    pub fn found(record: Record, domains: Option<&[Domain]>, now_ms: u64, keep_ms: u64) -> Found {
        let here = |uuid: Option<Uuid>| {
            domains.map(|all| {
                all.iter()
                    .any(|d| d.name == record.domain() && uuid.is_none_or(|uuid| d.uuid == uuid))
            })
        };
        if !record.life.is_over_here() {
            let domain_here = here(Some(record.uuid()));
            return Found::Goes { record, domain_here };
        }
        let left = here(None) == Some(true);
        if !left && record.ended_ms.is_some_and(|ended| ended + keep_ms < now_ms) {
            return Found::Old(record);
        }
        Found::Over { record, left }
    }

    /// A VM is over, as found at the agent's start.
    pub fn over(&mut self, record: Record) {
        self.put(record.job, Entry::Over(Box::new(record)));
    }

    /// A record of this domain cannot be read.
    pub fn foreign(&mut self, domain: String) {
        self.foreign.insert(domain);
    }

    /// The whole ledger has been found.
    pub fn all_found(&mut self) {
        self.complete = true;
    }

    /// Domains of ours that nobody has; none before [`Registry::all_found`]. `lives`: the records of VMs that have an owner.
    #[must_use]
    pub fn strays(&self, domains: &[Domain], lives: &BTreeMap<u32, Record>) -> Vec<String> {
        if !self.complete {
            return vec![];
        }
        let has = |name: &str| {
            let Some(entry) = job_of(name).and_then(|job| Some((job, self.get(job)?))) else {
                return false;
            };
            match entry {
                (job, Entry::Live(_)) => lives.get(&job).is_none_or(|r| r.domain() == name),
                (_, Entry::Over(last)) => last.domain() == name,
            }
        };
        let strays = domains.iter().filter(|d| !self.foreign.contains(&d.name) && !has(&d.name));
        strays.map(|d| d.name.clone()).collect()
    }

    /// libvirt can be asked again: its events may have been lost, and a start that it was busy with may have come through after its VM
    /// was given up. `domains` was asked for before `lives`, the records as the owners have them: what began later has nothing to fear.
    #[must_use]
    pub fn recheck(&self, domains: &[Domain], lives: &BTreeMap<u32, Record>) -> Recheck<W> {
        let is_there = |record: &Record| domains.iter().any(|d| d.name == record.domain());
        let mut ended = Vec::new();
        let mut left = self.strays(domains, lives);
        for (job, entry) in self.iter() {
            match entry {
                // What starts, moves or is saved learns by itself what became of it.
                Entry::Live(live) => {
                    let runs = |r: &&Record| matches!(r.life, Life::Running | Life::AwaitingJob { .. });
                    if lives.get(&job).filter(runs).is_some_and(|r| !is_there(r)) {
                        ended.push(live.way.clone());
                    }
                }
                Entry::Over(last) => {
                    let its_own = |d: &&Domain| d.name == last.domain() && d.run == last.run;
                    left.extend(domains.iter().find(its_own).map(|d| d.name.clone()));
                }
            }
        }
        Recheck { ended, left }
    }

    /// Takes out the records of VMs that ended longer ago than they are kept.
    pub fn forget_old(&mut self, now_ms: u64, keep_ms: u64) -> Vec<Record> {
        let old = |entry: &Entry<W>| match entry {
            Entry::Over(r) => r.ended_ms.unwrap_or(r.created_ms) + keep_ms < now_ms,
            Entry::Live(_) => false,
        };
        let jobs: Vec<u32> = self.iter().filter(|(_, e)| old(e)).map(|(job, _)| job).collect();
        let out = jobs.into_iter().filter_map(|job| match self.take(job) {
            Some(Entry::Over(record)) => Some(*record),
            _ => None,
        });
        out.collect()
    }

    /// The save of a VM waits for nobody any more: it was restored, here or elsewhere, or its job has ended. Returns the record to be written.
    pub fn saved_for_nobody(&mut self, job: u32) -> Option<Record> {
        match self.vms.get_mut(&job) {
            Some(Entry::Over(record)) if matches!(record.life, Life::Saved { .. }) => {
                self.ended.take(record);
                record.life = Life::Stopped { why: End::Released };
                self.ended.add(record);
                Some((**record).clone())
            }
            _ => None,
        }
    }
}

/// What the owner of this VM says to a run that is announced for a user's job.
#[must_use]
pub fn meets(record: &Record, uid: u32) -> Meeting {
    let run = record.run + 1;
    if is_on_its_way_out(&record.life) {
        Meeting::Leaves { run }
    } else if record.user.uid != uid {
        Meeting::Stranger { uid: record.user.uid }
    } else {
        Meeting::Goes { run }
    }
}

/// The VM's run ends here: a job that begins here meanwhile gets another VM, or this one back, once it is over.
#[must_use]
pub fn is_on_its_way_out(life: &Life) -> bool {
    life.is_over_here() || matches!(life, Life::Stopping { .. } | Life::Leaving { .. } | Life::Saving { .. })
}

/// The shim belongs to a later run than the VM, which is on its way out: it has to wait for its own, or for this one to stay. `restart` is Slurm's count as the shim has it.
#[must_use]
pub fn is_for_a_later_run(record: &Record, restart: u32) -> bool {
    let known = record
        .allocation
        .as_ref()
        .and_then(|a| a.restarts)
        .unwrap_or(0)
        .max(record.run_state.restart);
    is_on_its_way_out(&record.life) && restart > known
}

/// What becomes of a shim of the user `uid` that finds no VM, by what Slurm says of the job and by the record of its last VM here.
#[must_use]
pub fn without_vm(job: u32, node: &str, uid: u32, seen: Result<Option<JobSeen>, String>, last: Option<&Record>) -> WithoutVm {
    let node_fault = |why| WithoutVm::Refused(outcome::NODE_FAULT, why);
    // Of an earlier run nothing is told any more.
    let start_ms = seen.as_ref().ok().copied().flatten().and_then(|s| s.start_ms);
    let is_earlier = |last: &&Record| matches!((last.ended_ms, start_ms), (Some(ended), Some(start)) if ended < start);
    if let Some(last) = last.filter(|last| !is_earlier(last)) {
        match &last.life {
            Life::Gone { .. } | Life::Saved { .. } => return WithoutVm::Left(last.life.name()),
            Life::Stopped { why } => {
                if let Some((code, line)) = why.verdict() {
                    return WithoutVm::Refused(u8::try_from(code).unwrap_or(outcome::NODE_FAULT), line);
                }
            }
            _ => {}
        }
    }
    let seen = match seen {
        Ok(Some(seen)) => seen,
        Ok(None) => return node_fault(format!("Slurm knows no job {job}")),
        Err(e) => return node_fault(format!("cannot ask Slurm about job {job}: {e}")),
    };
    if seen.uid != uid && uid != 0 {
        WithoutVm::Refused(outcome::REFUSED, format!("job {job} is not yours"))
    } else if !seen.here {
        // A job that is over keeps its node list for a while, and no epilog would end what is made for it now.
        node_fault(format!("job {job} does not run on {node}"))
    } else {
        WithoutVm::Announce
    }
}

/// The job that a domain of ours belongs to, by its name.
#[must_use]
pub fn job_of(domain: &str) -> Option<u32> {
    domain.strip_prefix("slurm-")?.split('-').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::{Allocation, LeavingStage, MoveIdentity, tests};

    const JOB: u32 = 7;
    const UID: u32 = 2001;

    fn run(restart: u32) -> Announced {
        let record = tests::record(Life::Running);
        Announced {
            restart,
            user: record.user,
            spec: record.spec,
        }
    }

    fn with_live() -> Registry<&'static str> {
        let mut r = Registry::default();
        r.begun(JOB, "first", run(0).user);
        r
    }

    fn asked(r: &Registry<&'static str>) -> u64 {
        match r.announced(JOB) {
            Begin::Ask { vm, .. } => vm,
            Begin::Begin { run } => panic!("run {run} begins beside a VM"),
        }
    }

    fn leaving() -> Life {
        let by = MoveIdentity {
            move_id: "m".into(),
            run: 1,
            generation: 1,
        };
        Life::Leaving {
            to: "n2".into(),
            by,
            stage: LeavingStage::Copying,
        }
    }

    fn domain(record: &Record) -> Domain {
        Domain {
            name: record.domain(),
            uuid: record.uuid(),
            run: record.run,
        }
    }

    fn stopped() -> Life {
        Life::Stopped { why: End::Released }
    }

    #[test]
    fn a_run_that_begins_while_the_last_ones_vm_is_on_its_way_out_begins_when_that_has_left_and_not_before() {
        let mut r = with_live();
        let record = tests::record(leaving());
        assert_eq!(meets(&record, UID), Meeting::Leaves { run: 2 });
        let vm = asked(&r);
        assert!(r.waits(JOB, vm, run(1)));
        assert!(matches!(r.announced(JOB), Begin::Ask { .. }), "still the old one's");
        let left = tests::record(Life::Gone { to: "n2".into() });
        assert_eq!(r.retired(left), Some((2, run(1))));
    }

    #[test]
    fn a_vm_that_stays_after_all_is_the_waiting_runs() {
        let mut r = with_live();
        let vm = asked(&r);
        assert!(!r.stays(JOB, UID), "nobody waits");
        assert!(r.waits(JOB, vm, run(1)));
        assert!(!r.stays(JOB, 2002), "another user's VM is not for it");
        assert!(r.stays(JOB, UID));
        assert_eq!(r.retired(tests::record(stopped())), None, "it has had its VM");
    }

    #[test]
    fn a_run_that_waits_is_over_when_its_job_leaves() {
        let mut r = with_live();
        let vm = asked(&r);
        assert!(r.waits(JOB, vm, run(1)));
        assert_eq!(r.released(JOB), Some("first"));
        assert_eq!(r.retired(tests::record(stopped())), None);
    }

    #[test]
    fn nobody_waits_for_a_vm_that_is_another_by_now() {
        let mut r = with_live();
        let vm = asked(&r);
        assert_eq!(r.retired(tests::record(stopped())), None);
        assert!(!r.waits(JOB, vm, run(1)), "it has left");
        assert_eq!(r.announced(JOB), Begin::Begin { run: 2 });
        r.begun(JOB, "second", run(1).user);
        assert!(!r.waits(JOB, vm, run(1)), "the second is the run's own");
        assert_eq!(
            r.retired(tests::record(Life::Gone { to: "n2".into() })),
            None,
            "and has no successor"
        );
    }

    #[test]
    fn a_vm_goes_on_with_its_own_users_job_only() {
        let record = tests::record(Life::Running);
        assert_eq!(meets(&record, UID), Meeting::Goes { run: 2 });
        assert_eq!(meets(&record, 2002), Meeting::Stranger { uid: UID });
        let over = tests::record(Life::Stopping { why: End::Released });
        assert_eq!(
            meets(&over, 2002),
            Meeting::Leaves { run: 2 },
            "what is on its way out is in nobody's way"
        );
    }

    #[test]
    fn a_vm_is_its_users_and_roots() {
        let mut r = with_live();
        let to = Admission::To("first", run(0).user);
        assert_eq!(r.attaches(JOB, UID), to);
        assert_eq!(r.attaches(JOB, 0), to);
        assert_eq!(r.attaches(JOB, 2002), Admission::NotYours);
        let last = tests::record(stopped());
        assert_eq!(r.retired(last.clone()), None);
        assert_eq!(r.attaches(JOB, UID), Admission::AskSlurm(Some(Box::new(last))));
        assert_eq!(
            r.attaches(JOB, 2002),
            Admission::AskSlurm(None),
            "of a stranger's VM nothing is told"
        );
        assert!(r.expects(JOB).is_ok());
    }

    #[test]
    fn a_shim_without_a_vm_begins_one_only_where_slurm_runs_its_users_job() {
        let seen = JobSeen {
            uid: UID,
            here: true,
            start_ms: Some(tests::NOW),
        };
        let ask = |seen, last: Option<&Record>| without_vm(JOB, "n1", UID, seen, last);
        assert_eq!(ask(Ok(Some(seen)), None), WithoutVm::Announce);
        let refused = |w| match w {
            WithoutVm::Refused(code, why) => (code, why),
            other => panic!("{other:?}"),
        };
        for (seen, code, says) in [
            (Ok(None), outcome::NODE_FAULT, "knows no job"),
            (Err("timed out".to_owned()), outcome::NODE_FAULT, "timed out"),
            (Ok(Some(JobSeen { uid: 2002, ..seen })), outcome::REFUSED, "not yours"),
            (Ok(Some(JobSeen { here: false, ..seen })), outcome::NODE_FAULT, "does not run on n1"),
        ] {
            let (is, why) = refused(ask(seen, None));
            assert!(is == code && why.contains(says), "{is}: {why}");
        }
        // The end of the last VM, of this run and of an earlier one.
        let ended = |life, ended_ms| Record {
            ended_ms: Some(ended_ms),
            ..tests::record(life)
        };
        let lost = || Life::Stopped {
            why: End::GuestLost { how: "QEMU died".into() },
        };
        assert_eq!(
            refused(ask(Ok(Some(seen)), Some(&ended(lost(), tests::NOW)))).0,
            outcome::GUEST_LOST
        );
        assert_eq!(ask(Ok(Some(seen)), Some(&ended(lost(), tests::NOW - 1))), WithoutVm::Announce);
        let gone = || Life::Gone { to: "n2".into() };
        assert_eq!(ask(Ok(Some(seen)), Some(&ended(gone(), tests::NOW))), WithoutVm::Left("gone"));
        assert_eq!(ask(Ok(Some(seen)), Some(&ended(gone(), tests::NOW - 1))), WithoutVm::Announce);
        assert_eq!(
            ask(Err("timed out".into()), Some(&ended(gone(), tests::NOW - 1))),
            WithoutVm::Left("gone"),
            "while Slurm does not answer no second VM is begun"
        );
        assert_eq!(ask(Ok(Some(seen)), Some(&ended(stopped(), tests::NOW))), WithoutVm::Announce);
    }

    #[test]
    fn a_shim_of_a_later_run_waits_for_its_own_vm() {
        let ending = Record {
            allocation: Some(Allocation {
                restarts: Some(1),
                ..Allocation::default()
            }),
            ..tests::record(Life::Stopping { why: End::Released })
        };
        assert!(!is_for_a_later_run(&ending, 1));
        assert!(is_for_a_later_run(&ending, 2));
        assert!(is_for_a_later_run(&tests::record(leaving()), 1));
        assert!(!is_for_a_later_run(&tests::record(leaving()), 0), "its own shim comes back");
        assert!(
            !is_for_a_later_run(&tests::record(Life::Running), 2),
            "a VM that goes on is the run's"
        );
    }

    #[test]
    fn what_the_ledger_has_is_kept_gone_on_with_or_forgotten() {
        let keep = 1_000;
        let running = tests::record(Life::Running);
        let found = |record: &Record, domains: Option<&[Domain]>, now| Registry::<()>::found(record.clone(), domains, now, keep);
        let goes = |domain_here| Found::Goes {
            record: running.clone(),
            domain_here,
        };
        assert_eq!(found(&running, None, 0), goes(None), "libvirt is away: it is not taken for lost");
        assert_eq!(found(&running, Some(&[]), 0), goes(Some(false)));
        assert_eq!(found(&running, Some(&[domain(&running)]), 0), goes(Some(true)));
        let strange = Domain {
            uuid: Uuid::nil(),
            ..domain(&running)
        };
        assert_eq!(found(&running, Some(&[strange]), 0), goes(Some(false)), "another cluster's");
        let over = Record {
            ended_ms: Some(10),
            ..tests::record(stopped())
        };
        let kept = |left| Found::Over {
            record: over.clone(),
            left,
        };
        assert_eq!(found(&over, Some(&[]), 1_010), kept(false));
        assert_eq!(
            found(&over, Some(&[domain(&over)]), 5_000),
            kept(true),
            "old, and its domain is there"
        );
        assert_eq!(found(&over, Some(&[]), 1_011), Found::Old(over.clone()));
    }

    #[test]
    fn domains_that_nobody_has_are_ended_and_those_of_unreadable_records_are_not() {
        let mut r = with_live();
        let live = tests::record(Life::Running);
        r.foreign("slurm-9-0".into());
        let named = |name: &str| Domain {
            name: name.into(),
            ..domain(&live)
        };
        let there = [named("slurm-7-0"), named("slurm-7-1"), named("slurm-8-0"), named("slurm-9-0")];
        let lives = BTreeMap::from([(JOB, live.clone())]);
        assert_eq!(
            r.strays(&there, &lives),
            Vec::<String>::new(),
            "the rest of the ledger may know them"
        );
        r.all_found();
        assert_eq!(r.strays(&there, &lives), ["slurm-7-1", "slurm-8-0"]);
        assert_eq!(
            r.strays(&there, &BTreeMap::new()),
            ["slurm-8-0"],
            "its owner has not said which is his"
        );
    }

    #[test]
    fn when_libvirt_is_back_ends_that_were_not_told_are_told_and_what_came_through_late_is_ended() {
        let mut r = with_live();
        let live = tests::record(Life::Running);
        let lives = BTreeMap::from([(JOB, live.clone())]);
        let nothing = Recheck {
            ended: vec![],
            left: vec![],
        };
        assert_eq!(r.recheck(&[domain(&live)], &lives), nothing);
        assert_eq!(r.recheck(&[], &lives).ended, ["first"]);
        for life in [Life::Booting { deadline_ms: 1 }, leaving()] {
            let lives = BTreeMap::from([(JOB, tests::record(life))]);
            assert_eq!(r.recheck(&[], &lives), nothing, "what is under way learns its end by itself");
        }
        let over = tests::record(Life::Stopped {
            why: End::NodeFault { how: "no answer".into() },
        });
        assert_eq!(r.retired(over.clone()), None);
        assert_eq!(r.recheck(&[domain(&over)], &BTreeMap::new()).left, [over.domain()]);
        let later = Domain {
            run: over.run + 1,
            ..domain(&over)
        };
        assert_eq!(r.recheck(&[later], &BTreeMap::new()), nothing, "a later run's");
    }

    #[test]
    fn a_save_that_waits_for_nobody_is_put_down_as_ended_once() {
        let mut r = Registry::<()>::default();
        r.over(tests::record(Life::Saved { at: "/s".into() }));
        assert_eq!(r.saved_for_nobody(JOB).map(|record| record.life), Some(stopped()));
        assert_eq!(r.saved_for_nobody(JOB), None);
        assert!(r.forget_old(tests::NOW + 11, 10).len() == 1 && r.get(JOB).is_none());
    }
}
