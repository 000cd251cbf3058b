//! Where VMs go: one pure function over all VMs that look for a node, with what Slurm's queue still needs in view.
//!
//! ```text
//!  poll: nodes, jobs, requests, reservations ─┐
//!  claims (ledger), moves under way ──────────┼─> place(picture, wants) ─> a node each, or why there is none
//!  wants: VMs of this moment ─────────────────┘
//! ```
//! The rule. *Claimed* ([`Claims`]) is every node that is being vacated for somebody. *Waiters* are the jobs in the queue that
//! could start now and may preempt the VM's job, by tier or by QOS. A node may be taken only if it is not claimed and every
//! waiter can still be served: the nodes that it asked for by name stay free, and enough others for its request, claimed nodes
//! counted as empty. Of what remains, nodes that no waiter could use come first, then partly used ones, then idle ones. If
//! nothing remains, the next preempt action is taken at once.
//!
//! Without this a preemptor of several nodes starves: its victims move round among the very nodes that it waits for.
//!
//! No input or output here: the room around it is [`super::places`].
mod claims;
mod waiters;

#[cfg(test)]
pub(in crate::controller) mod tests;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

pub use claims::{Claim, Claims};
pub use waiters::{Waiter, could_start};

use crate::core::relocation::Resources;
use crate::slurm::{JobBrief, JobRequest, JobState, NodeInfo, PartitionInfo, QosInfo, ReservationInfo, satisfies};

/// How the names of our reservations begin.
const PREFIX: &str = "vmmig_";

/// Name of the reservation that holds a node for the VMs that land there.
#[must_use]
pub fn reservation_of(node: &str) -> String {
    format!("{PREFIX}{node}")
}

/// One of ours?
#[must_use]
pub fn is_ours(reservation: &str) -> bool {
    reservation.starts_with(PREFIX)
}

/// Which job may preempt which.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PreemptRule {
    /// `preempt/none`.
    Nothing,
    /// `preempt/partition_prio`: priority tier of each partition, and whether its jobs may be preempted.
    Partitions(BTreeMap<String, (u32, bool)>),
    /// `preempt/qos`: for each QOS those that it may preempt. `None` where accounting does not say: then any other QOS.
    Qos(Option<BTreeMap<String, Vec<String>>>),
}

impl PreemptRule {
    /// The rule of a cluster.
    #[must_use]
    pub fn of(preempt_type: &str, partitions: &[PartitionInfo], qos: Option<Vec<QosInfo>>) -> Self {
        match preempt_type {
            "preempt/none" => Self::Nothing,
            "preempt/qos" => Self::Qos(qos.map(|all| all.into_iter().map(|q| (q.name, q.preempts)).collect())),
            _ => Self::Partitions(
                partitions
                    .iter()
                    .map(|p| (p.name.clone(), (p.priority_tier, !p.preempt_mode.eq_ignore_ascii_case("OFF"))))
                    .collect(),
            ),
        }
    }

    /// The highest tier of a list of partitions; the same for all where tiers do not decide.
    fn tier(&self, partitions: &str) -> u32 {
        match self {
            Self::Partitions(all) => partitions
                .split(',')
                .filter_map(|p| all.get(p))
                .map(|(tier, _)| *tier)
                .max()
                .unwrap_or(0),
            Self::Nothing | Self::Qos(_) => 0,
        }
    }

    /// May a job of `partitions` and `qos` preempt one of that partition and QOS?
    fn goes_before(&self, partitions: &str, qos: Option<&str>, victim_partition: &str, victim_qos: Option<&str>) -> bool {
        match self {
            Self::Nothing => false,
            Self::Partitions(all) => all
                .get(victim_partition)
                .is_some_and(|(tier, preemptable)| *preemptable && self.tier(partitions) > *tier),
            Self::Qos(None) => qos != victim_qos,
            Self::Qos(Some(all)) => qos
                .and_then(|q| all.get(q))
                .is_some_and(|list| victim_qos.is_some_and(|v| list.iter().any(|q| q == v))),
        }
    }

    fn may_preempt(&self, job: &JobBrief, request: &JobRequest, victim: &JobBrief, victims: Option<&JobRequest>) -> bool {
        let victim_qos = victims.and_then(|r| r.qos.as_deref());
        self.goes_before(&job.partition, request.qos.as_deref(), &victim.partition, victim_qos)
    }
}

/// A VM that has been given a node, and whose job does not run there yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    /// Its job.
    pub job: u32,
    /// Where it goes.
    pub node: String,
    /// What it takes there.
    pub needs: Resources,
}

/// A VM that looks for a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    /// Its job.
    pub job: u32,
    /// Whose job it is, by name.
    pub user: String,
    /// Where it is.
    pub from: String,
    /// The job's partition.
    pub partition: String,
    /// The job's QOS, where there is such.
    pub qos: Option<String>,
    /// The job's constraint.
    pub constraint: Option<String>,
    /// Nodes that the job must not have.
    pub exclude: Vec<String>,
    /// What it takes.
    pub needs: Resources,
    /// The node that was asked for by name.
    pub wanted: Option<String>,
    /// Unix milliseconds by which it must have left.
    pub deadline_ms: Option<u64>,
}

/// All that a decision rests on.
#[derive(Debug)]
pub struct Picture<'a> {
    /// Unix seconds.
    pub now_s: i64,
    /// The feature of VM nodes.
    pub feature: &'a str,
    /// All nodes of the cluster.
    pub nodes: &'a [NodeInfo],
    /// VM nodes whose agent and libvirt are well.
    pub well: &'a BTreeSet<String>,
    /// The poll.
    pub jobs: &'a [JobBrief],
    /// What its jobs ask for or have.
    pub requests: &'a BTreeMap<u32, JobRequest>,
    /// Nodes that waiting jobs must not have, as far as it is known.
    pub exclude: &'a BTreeMap<u32, Vec<String>>,
    /// All reservations.
    pub reservations: &'a [ReservationInfo],
    /// Nodes that are being vacated for somebody.
    pub claims: &'a Claims,
    /// VMs on their way.
    pub arrivals: Vec<Arrival>,
    /// Who may preempt whom.
    pub rule: &'a PreemptRule,
    /// Moves that a node takes at the same time.
    pub moves_in: usize,
    /// Nodes that Slurm has just refused to reserve.
    pub refused: BTreeSet<String>,
    /// [`by_node`] of the jobs.
    pub on: BTreeMap<&'a str, Vec<&'a JobBrief>>,
}

/// The jobs that have nodes, by node.
#[must_use]
pub fn by_node(jobs: &[JobBrief]) -> BTreeMap<&str, Vec<&JobBrief>> {
    let mut on: BTreeMap<&str, Vec<&JobBrief>> = BTreeMap::new();
    let have_nodes = |j: &&JobBrief| j.state.is_on_nodes() || j.state == JobState::Completing;
    for job in jobs.iter().filter(have_nodes) {
        for node in &job.nodes {
            on.entry(node).or_default().push(job);
        }
    }
    on
}

impl<'a> Picture<'a> {
    fn request(&self, job: u32) -> Option<&'a JobRequest> {
        self.requests.get(&job)
    }

    fn jobs_on(&self, node: &str) -> &[&'a JobBrief] {
        self.on.get(node).map_or(&[][..], Vec::as_slice)
    }

    /// Its nodes will be free soon.
    fn is_leaving(&self, job: &JobBrief) -> bool {
        job.in_grace() || job.state == JobState::Completing
    }

    /// What a job has on each of its nodes. Of a job on several nodes this is an even share.
    fn share(&self, job: &JobBrief) -> Resources {
        let nodes = u32::try_from(job.nodes.len()).unwrap_or(u32::MAX).max(1);
        self.request(job.id).map_or_else(Resources::default, |r| Resources {
            cpus: r.cpus.div_ceil(nodes),
            mem_mib: r.mem_mib.div_ceil(u64::from(nodes)),
        })
    }

    fn is_landing_place(&self, node: &str) -> bool {
        self.arrivals.iter().any(|a| a.node == node)
    }

    /// No reservation keeps a job with that reservation (or none) off the node. Ours do not count: their nodes are landing
    /// places, which are looked at apart.
    fn reserved_for(&self, node: &str, reservation: Option<&str>) -> bool {
        let mut on_it = self
            .reservations
            .iter()
            .filter(|r| r.active && !is_ours(&r.name) && r.nodes.iter().any(|n| n == node));
        match reservation {
            Some(mine) => on_it.any(|r| r.name == mine),
            None => on_it.next().is_none(),
        }
    }

    /// A VM could run there, room apart.
    fn is_for_vms(&self, node: &NodeInfo) -> bool {
        node.is_usable() && node.active_features.iter().any(|f| f == self.feature) && self.well.contains(&node.name)
    }

    /// What is free on a node now, less what is on its way there.
    fn free(&self, node: &NodeInfo) -> Resources {
        let coming = self
            .arrivals
            .iter()
            .filter(|a| a.node == node.name && !self.jobs_on(&node.name).iter().any(|j| j.id == a.job))
            .fold(Resources::default(), |sum, a| sum.plus(a.needs));
        let now = Resources {
            cpus: node.cpus_total.saturating_sub(node.cpus_alloc),
            mem_mib: node.mem_total_mib.saturating_sub(node.mem_alloc_mib),
        };
        now.less(coming)
    }

    /// The jobs in the queue that go before a job of that partition and QOS.
    #[must_use]
    pub fn waiters_before(&self, partition: &str, qos: Option<&str>) -> Vec<Waiter<'a>> {
        let waiter = |job: &'a JobBrief| {
            let request = self.request(job.id)?;
            let before = self.rule.goes_before(&job.partition, request.qos.as_deref(), partition, qos);
            (before && could_start(job, self.now_s)).then(|| Waiter {
                job,
                request,
                exclude: self.exclude.get(&job.id).map_or(&[][..], Vec::as_slice),
            })
        };
        self.jobs.iter().filter_map(waiter).collect()
    }

    /// Somebody in the queue goes before the victims that a node was claimed from, and could use the node.
    #[must_use]
    pub fn is_waited_for(&self, node: &str, claim: &Claim) -> bool {
        let Some(info) = self.nodes.iter().find(|n| n.name == node) else {
            return false;
        };
        self.waiters_before(&claim.partition, claim.qos.as_deref())
            .iter()
            .any(|w| w.may_use(self, info))
    }

    /// Could the node take the VM, waiters and claims apart?
    fn fits(&self, want: &Want, node: &NodeInfo) -> bool {
        node.name != want.from
            && want.wanted.as_deref().is_none_or(|w| w == node.name)
            && self.is_for_vms(node)
            && node.partitions.contains(&want.partition)
            // Slurm would not start the job there.
            && satisfies(want.constraint.as_deref(), &node.active_features).unwrap_or(false)
            && !want.exclude.contains(&node.name)
            && self.reservations.iter().all(|r| is_ours(&r.name) || !r.nodes.contains(&node.name))
            && self.free(node).has(want.needs)
    }

    /// Could any node take the VM now, whoever it is kept for?
    #[must_use]
    pub fn has_room(&self, want: &Want) -> bool {
        self.nodes.iter().any(|n| self.fits(want, n))
    }
}

/// Nodes that are kept for waiters, with the jobs that they are kept for, and the waiters.
type Kept<'a> = (BTreeMap<String, u32>, Vec<Waiter<'a>>);

/// Places all VMs together: for each a node, or the reason why there is none, as a fragment.
#[must_use]
pub fn place(mut picture: Picture<'_>, wants: &[Want]) -> Vec<(u32, Result<String, String>)> {
    let mut order: Vec<&Want> = wants.iter().collect();
    // Who has least time goes first; among those of one second the largest, which fits in fewest places.
    let seconds = |w: &Want| w.deadline_ms.map_or(u64::MAX, |ms| ms / 1000);
    order.sort_by_key(|w| (seconds(w), Reverse(w.needs.cpus), w.job));
    let mut keep: BTreeMap<(String, Option<String>), Kept<'_>> = BTreeMap::new();
    let mut placed = Vec::new();
    for want in order {
        let class = (want.partition.clone(), want.qos.clone());
        let (kept, waiters) = keep.entry(class).or_insert_with(|| {
            let waiters = picture.waiters_before(&want.partition, want.qos.as_deref());
            (waiters::kept(&picture, &waiters), waiters)
        });
        let choice = choose(&picture, want, kept, waiters);
        if let Ok(node) = &choice {
            picture.arrivals.push(Arrival {
                job: want.job,
                node: node.clone(),
                needs: want.needs,
            });
        }
        placed.push((want.job, choice));
    }
    placed
}

fn choose(picture: &Picture<'_>, want: &Want, kept: &BTreeMap<String, u32>, waiters: &[Waiter<'_>]) -> Result<String, String> {
    let fitting: Vec<&NodeInfo> = picture.nodes.iter().filter(|n| picture.fits(want, n)).collect();
    let may_be_taken = |n: &&&NodeInfo| !picture.claims.has(&n.name) && !kept.contains_key(&n.name) && !picture.refused.contains(&n.name);
    let best = fitting.iter().filter(may_be_taken).min_by_key(|n| {
        let arrivals = picture.arrivals.iter().filter(|a| a.node == n.name).count();
        let partly_used = n.cpus_alloc > 0 || arrivals > 0;
        (
            waiters.iter().any(|w| w.may_use(picture, n)),
            !partly_used,
            arrivals >= picture.moves_in,
            picture.free(n).cpus,
            n.name.clone(),
        )
    });
    if let Some(node) = best {
        return Ok(node.name.clone());
    }
    let held: Vec<String> = fitting
        .iter()
        .filter_map(|n| {
            let for_whom = kept.get(&n.name).map(|job| format!("{} is kept for job {job}", n.name));
            let vacated = || {
                picture
                    .claims
                    .has(&n.name)
                    .then(|| format!("{} is being vacated for another job", n.name))
            };
            for_whom.or_else(vacated)
        })
        .collect();
    let partition = &want.partition;
    Err(match &want.wanted {
        Some(_) if !held.is_empty() => format!("{}, which goes before this one", held.join("; ")),
        Some(to) => format!("{to} has no room for the VM, or is not in partition {partition}"),
        None if held.is_empty() => "no other node has room for the VM".to_owned(),
        None => format!("no other node has room for the VM ({})", some_of(&held)),
    })
}

/// The first few of a list, and how many more there are.
fn some_of(list: &[String]) -> String {
    const MOST: usize = 4;
    let shown = list[..list.len().min(MOST)].join(", ");
    match list.len().checked_sub(MOST) {
        Some(more @ 1..) => format!("{shown} and {more} more"),
        _ => shown,
    }
}
