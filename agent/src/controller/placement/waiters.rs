//! Who waits, and which nodes must be kept so that those who go before can start.
use std::collections::{BTreeMap, BTreeSet};

use super::{Picture, Resources};
use crate::slurm::{JobBrief, JobRequest, NodeInfo, satisfies};

/// A job that waits, could start now, and may preempt others.
#[derive(Debug, Clone)]
pub struct Waiter<'a> {
    /// The job.
    pub job: &'a JobBrief,
    /// What it asks for.
    pub request: &'a JobRequest,
    /// Nodes that it must not have.
    pub exclude: &'a [String],
}

impl Waiter<'_> {
    /// What each of its nodes must have at least.
    fn per_node(&self) -> Resources {
        let nodes = self.request.nodes.max(1);
        if self.request.any_nodes {
            let mem = self.request.mem_mib / u64::from(self.request.cpus.max(1));
            return Resources { cpus: 1, mem_mib: mem };
        }
        Resources {
            cpus: self.request.cpus.div_ceil(nodes).max(1),
            mem_mib: self.request.mem_mib.div_ceil(u64::from(nodes)),
        }
    }

    /// May it ever have the node, room apart?
    pub fn may_use(&self, picture: &Picture<'_>, node: &NodeInfo) -> bool {
        node.is_usable()
            && self.job.partition.split(',').any(|p| node.partitions.iter().any(|q| q == p))
            // Not understood: better kept than given away.
            && satisfies(self.job.features.as_deref(), &node.active_features).unwrap_or(true)
            && !self.exclude.contains(&node.name)
            && picture.reserved_for(&node.name, self.job.reservation.as_deref())
            && (self.request.req_nodes.is_empty()
                || self.request.req_nodes.contains(&node.name)
                || self.request.req_nodes.len() < self.request.nodes as usize)
    }
}

/// Could the job start now if there were room? It is not held, its time has come, and it waits for resources only.
pub fn could_start(job: &JobBrief, now_s: i64) -> bool {
    // A job that Slurm has not looked at yet has no reason. Our own reservations make "ReqNodeNotAvail, May be reserved".
    let waits_for_room = matches!(job.reason.as_str(), "" | "None" | "Resources" | "Priority") || job.reason.starts_with("ReqNodeNotAvail");
    job.state.is_waiting()
        && !job.is_held()
        && waits_for_room
        && job.start_time.is_none_or(|t| t <= now_s || job.reason != "BeginTime")
        && job.reservation.as_deref().is_none_or(|r| !super::is_ours(r))
}

/// The nodes that `waiters` need, in the order in which Slurm would serve them, with the job that each is kept for.
///
/// A waiter that can be served keeps the nodes it is served with; vacated ones first, then those no VM could use, then idle
/// ones. One that could be served only if more jobs were preempted keeps what there is of them. One that waits for jobs that
/// nobody preempts keeps nothing but the nodes it asked for by name: it does not start soon in any case.
pub fn kept(picture: &Picture<'_>, waiters: &[Waiter<'_>]) -> BTreeMap<String, u32> {
    let mut order: Vec<&Waiter<'_>> = waiters.iter().collect();
    let tier = |w: &Waiter<'_>| picture.rule.tier(&w.job.partition);
    order.sort_by_key(|w| (std::cmp::Reverse((tier(w), w.job.priority)), w.job.id));
    let mut room = Room::of(picture, |j| picture.is_leaving(j));
    // What there would be if all were preempted whom a job of this partition and QOS may preempt.
    let mut at_most: BTreeMap<(&str, Option<&str>), Room> = BTreeMap::new();
    let mut kept = BTreeMap::new();
    for w in order {
        for node in &w.request.req_nodes {
            kept.entry(node.clone()).or_insert(w.job.id);
        }
        let served = room.serve(picture, w, &kept);
        let nodes = match served {
            Served::Whole(nodes) => nodes,
            Served::Part(nodes) => {
                let most = at_most
                    .entry((w.job.partition.as_str(), w.request.qos.as_deref()))
                    .or_insert_with(|| {
                        let yields = |j: &JobBrief| picture.rule.may_preempt(w.job, w.request, j, picture.request(j.id));
                        Room::of(picture, |j| picture.is_leaving(j) || yields(j))
                    });
                if !matches!(most.serve(picture, w, &kept), Served::Whole(_)) {
                    continue;
                }
                nodes
            }
        };
        for node in nodes {
            room.take(&node, w);
            kept.entry(node).or_insert(w.job.id);
        }
    }
    kept
}

enum Served {
    Whole(Vec<String>),
    Part(Vec<String>),
}

/// What is free on each node when certain jobs have left.
struct Room {
    free: BTreeMap<String, Resources>,
    /// Nodes without any job.
    empty: BTreeSet<String>,
}

impl Room {
    fn of(picture: &Picture<'_>, leaves: impl Fn(&JobBrief) -> bool) -> Self {
        let mut room = Self {
            free: BTreeMap::new(),
            empty: BTreeSet::new(),
        };
        for node in picture.nodes.iter().filter(|n| !picture.is_landing_place(&n.name)) {
            let (stay, go): (Vec<&JobBrief>, Vec<&JobBrief>) = picture.jobs_on(&node.name).iter().copied().partition(|j| !leaves(j));
            let going = go.iter().fold(Resources::default(), |sum, j| sum.plus(picture.share(j)));
            let free = Resources {
                cpus: node
                    .cpus_total
                    .saturating_sub(node.cpus_alloc)
                    .saturating_add(going.cpus)
                    .min(node.cpus_total),
                mem_mib: node
                    .mem_total_mib
                    .saturating_sub(node.mem_alloc_mib)
                    .saturating_add(going.mem_mib)
                    .min(node.mem_total_mib),
            };
            if stay.is_empty() {
                room.empty.insert(node.name.clone());
            }
            room.free.insert(node.name.clone(), free);
        }
        room
    }

    fn fits(&self, w: &Waiter<'_>, node: &str) -> bool {
        self.free.get(node).is_some_and(|free| free.has(w.per_node())) && (!w.request.exclusive || self.empty.contains(node))
    }

    fn serve(&self, picture: &Picture<'_>, w: &Waiter<'_>, kept: &BTreeMap<String, u32>) -> Served {
        let want = w.request.nodes.max(1) as usize;
        let mut nodes: Vec<&NodeInfo> = picture
            .nodes
            .iter()
            .filter(|n| w.may_use(picture, n) && self.fits(w, &n.name))
            .collect();
        let demanded = |n: &NodeInfo| w.request.req_nodes.contains(&n.name);
        nodes.sort_by_key(|n| {
            let idle = n.cpus_alloc == 0;
            (
                !demanded(n),
                !kept.contains_key(&n.name),
                !picture.claims.has(&n.name),
                picture.is_for_vms(n),
                !idle,
            )
        });
        let all_demanded = w.request.req_nodes.iter().all(|r| nodes.iter().any(|n| n.name == *r));
        let name = |n: &&NodeInfo| n.name.clone();
        if w.request.any_nodes {
            // Spread over as many nodes as it takes.
            let mut cpus = 0;
            let mut chosen = Vec::new();
            for n in &nodes {
                if cpus >= w.request.cpus {
                    break;
                }
                cpus += self.free.get(&n.name).map_or(0, |f| f.cpus);
                chosen.push(n.name.clone());
            }
            return if all_demanded && cpus >= w.request.cpus {
                Served::Whole(chosen)
            } else {
                Served::Part(chosen)
            };
        }
        let chosen: Vec<String> = nodes.iter().take(want).map(name).collect();
        if all_demanded && chosen.len() == want {
            Served::Whole(chosen)
        } else {
            Served::Part(chosen)
        }
    }

    fn take(&mut self, node: &str, w: &Waiter<'_>) {
        let given = w.per_node();
        self.empty.remove(node);
        if let Some(free) = self.free.get_mut(node) {
            *free = if w.request.exclusive || w.request.any_nodes {
                Resources::default()
            } else {
                free.less(given)
            };
        }
    }
}
