//! The rule of placement, case by case, on small clusters.
use super::*;

/// A job as the poll has it: it runs nowhere and waits for nothing.
pub(in crate::controller) fn brief(id: u32, partition: &str) -> JobBrief {
    JobBrief {
        id,
        uid: 2001,
        user: "alice".into(),
        state: JobState::Pending,
        preempt_time: None,
        start_time: None,
        end_time: None,
        priority: u64::from(u32::MAX - id),
        restarts: 0,
        batch: true,
        nodes: vec![],
        batch_host: None,
        partition: partition.into(),
        reservation: None,
        reason: "Resources".into(),
        features: Some("vm".into()),
        array: None,
        het: None,
        requeue: true,
        time_limit_min: Some(60),
        req_nodes: vec![],
    }
}

/// A requeueable batch job that runs on n1.
pub(in crate::controller) fn running(id: u32, partition: &str) -> JobBrief {
    JobBrief {
        state: JobState::Running,
        nodes: vec!["n1".into()],
        ..brief(id, partition)
    }
}

const NOW: i64 = 1_000;
const MEM: u64 = 512;

/// A cluster of nodes n1, n2, ... with two CPUs each; partitions low (tier 1), high (tier 10, not preemptable).
struct Stage {
    nodes: Vec<NodeInfo>,
    well: BTreeSet<String>,
    jobs: Vec<JobBrief>,
    requests: BTreeMap<u32, JobRequest>,
    exclude: BTreeMap<u32, Vec<String>>,
    reservations: Vec<ReservationInfo>,
    claims: Claims,
    arrivals: Vec<Arrival>,
    rule: PreemptRule,
}

impl Stage {
    fn new(count: usize) -> Self {
        let node = |k| NodeInfo {
            name: format!("n{k}"),
            state: vec!["IDLE".into()],
            reason: None,
            available_features: vec!["vm".into()],
            active_features: vec!["vm".into()],
            cpus_alloc: 0,
            cpus_total: 2,
            cores: 2,
            threads_per_core: 1,
            mem_alloc_mib: 0,
            mem_total_mib: 4096,
            partitions: vec!["low".into(), "high".into()],
            address: format!("n{k}"),
        };
        let nodes: Vec<NodeInfo> = (1..=count).map(node).collect();
        Self {
            well: nodes.iter().map(|n| n.name.clone()).collect(),
            nodes,
            jobs: vec![],
            requests: BTreeMap::new(),
            exclude: BTreeMap::new(),
            reservations: vec![],
            claims: Claims::default(),
            arrivals: vec![],
            rule: PreemptRule::Partitions([("low".to_owned(), (1, true)), ("high".to_owned(), (10, false))].into()),
        }
    }

    fn node(&mut self, name: &str) -> &mut NodeInfo {
        self.nodes.iter_mut().find(|n| n.name == name).expect("a node")
    }

    /// A job that runs on a node.
    fn runs(&mut self, id: u32, partition: &str, node: &str, cpus: u32) {
        self.jobs.push(JobBrief {
            state: JobState::Running,
            start_time: Some(NOW - 100),
            nodes: vec![node.into()],
            ..brief(id, partition)
        });
        let n = self.node(node);
        n.cpus_alloc += cpus;
        n.mem_alloc_mib += MEM * u64::from(cpus);
        n.state = vec!["MIXED".into()];
        let request = JobRequest {
            id,
            nodes: 1,
            cpus,
            mem_mib: MEM * u64::from(cpus),
            ..JobRequest::default()
        };
        self.requests.insert(id, request);
    }

    /// It has been chosen as a victim.
    fn preempted(&mut self, id: u32) -> Want {
        let job = self.jobs.iter_mut().find(|j| j.id == id).expect("a job");
        job.preempt_time = Some(NOW);
        let (from, partition) = (job.nodes[0].clone(), job.partition.clone());
        self.claims.follow(&self.jobs, |_| None);
        Want {
            job: id,
            user: "alice".into(),
            from,
            partition,
            qos: None,
            constraint: Some("vm".into()),
            exclude: vec![],
            needs: Resources {
                cpus: self.requests[&id].cpus,
                mem_mib: self.requests[&id].mem_mib,
            },
            wanted: None,
            deadline_ms: Some(2_000_000),
        }
    }

    /// A job that waits in partition high.
    fn waits(&mut self, id: u32, nodes: u32, cpus: u32) -> &mut JobRequest {
        self.jobs.push(brief(id, "high"));
        let request = JobRequest {
            id,
            nodes,
            most_nodes: Some(nodes),
            cpus,
            mem_mib: MEM * u64::from(cpus),
            ..JobRequest::default()
        };
        self.requests.insert(id, request);
        self.requests.get_mut(&id).expect("just inserted")
    }

    fn place(&self, wants: &[Want]) -> BTreeMap<u32, Result<String, String>> {
        place(self.picture(), wants).into_iter().collect()
    }

    fn picture(&self) -> Picture<'_> {
        Picture {
            now_s: NOW,
            feature: "vm",
            nodes: &self.nodes,
            well: &self.well,
            jobs: &self.jobs,
            requests: &self.requests,
            exclude: &self.exclude,
            reservations: &self.reservations,
            claims: &self.claims,
            arrivals: self.arrivals.clone(),
            rule: &self.rule,
            moves_in: 2,
            refused: BTreeSet::new(),
            on: by_node(&self.jobs),
        }
    }
}

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(|n| (*n).to_owned()).collect()
}

/// Two VMs of one CPU on each of the nodes, all preempted.
fn victims(stage: &mut Stage, nodes: &[&str]) -> Vec<Want> {
    let mut id = 0;
    for node in nodes {
        for _ in 0..2 {
            id += 1;
            stage.runs(id, "low", node, 1);
        }
    }
    (1..=id).map(|id| stage.preempted(id)).collect()
}

fn count_on(placed: &BTreeMap<u32, Result<String, String>>, node: &str) -> usize {
    placed.values().filter(|p| p.as_deref() == Ok(node)).count()
}

#[test]
fn victims_of_a_preemptor_of_four_nodes_go_to_none_of_them_and_share_the_others() {
    let mut stage = Stage::new(8);
    let wants = victims(&mut stage, &["n1", "n2", "n3", "n4"]);
    stage.waits(9, 4, 8).req_nodes = names(&["n1", "n2", "n3", "n4"]);
    let placed = stage.place(&wants);
    for node in ["n5", "n6", "n7", "n8"] {
        assert_eq!(count_on(&placed, node), 2, "{placed:?}");
    }
}

#[test]
fn a_preemptor_that_counts_nodes_keeps_the_idle_ones_beside_those_that_are_vacated_for_it() {
    // n1 and n2 are vacated, n3 and n4 idle: four nodes for job 9. Only n5 and n6 are for the victims.
    let mut stage = Stage::new(6);
    let wants = victims(&mut stage, &["n1", "n2"]);
    stage.runs(20, "high", "n5", 1);
    stage.runs(21, "high", "n6", 1);
    stage.waits(9, 4, 8);
    let placed = stage.place(&wants);
    assert_eq!((count_on(&placed, "n5"), count_on(&placed, "n6")), (1, 1), "{placed:?}");
    let left: Vec<&String> = placed.values().filter_map(|p| p.as_ref().err()).collect();
    assert_eq!(left.len(), 2);
    assert!(
        left.iter()
            .all(|why| why.contains("n3 is kept for job 9") && why.contains("n4 is kept for job 9")),
        "{left:?}"
    );
}

#[test]
fn a_vacated_node_stays_claimed_until_its_preemptor_is_there_or_gone() {
    let mut stage = Stage::new(3);
    let wants = victims(&mut stage, &["n1"]);
    stage.waits(9, 1, 2).req_nodes = names(&["n1"]);
    // The victims have left n1; another VM looks for a place.
    stage.jobs.retain(|j| j.id == 9);
    *stage.node("n1") = NodeInfo {
        name: "n1".into(),
        ..Stage::new(1).nodes[0].clone()
    };
    let other = Want {
        from: "n2".into(),
        wanted: Some("n1".into()),
        ..wants[0].clone()
    };
    let refused = stage.place(std::slice::from_ref(&other))[&1].clone().unwrap_err();
    assert!(refused.contains("n1 is kept for job 9"), "{refused}");
    // The preemptor is cancelled.
    stage.jobs.clear();
    let mut claims = stage.claims.clone();
    claims.release(&stage.jobs, |node, claim| stage.picture().is_waited_for(node, claim));
    assert_eq!(claims, Claims::default());
    stage.claims = claims;
    assert_eq!(stage.place(&[other])[&1], Ok("n1".to_owned()));
}

#[test]
fn a_node_that_is_vacated_for_one_job_is_not_given_to_the_victim_of_another() {
    let mut stage = Stage::new(2);
    let wants = victims(&mut stage, &["n1", "n2"]);
    stage.waits(9, 1, 2).req_nodes = names(&["n1"]);
    stage.waits(10, 1, 2).req_nodes = names(&["n2"]);
    // Both nodes' victims but one have left.
    stage.jobs.retain(|j| j.id != 3 && j.id != 4);
    let n2 = stage.node("n2");
    (n2.cpus_alloc, n2.mem_alloc_mib) = (0, 0);
    let placed = stage.place(&wants[..2]);
    assert!(placed.values().all(Result::is_err), "{placed:?}");
}

#[test]
fn a_high_queue_that_is_never_empty_leaves_what_it_cannot_use() {
    // Whole nodes are waited for, without an end; n3 and n4 have half a node free each.
    let mut stage = Stage::new(4);
    let wants = victims(&mut stage, &["n1"]);
    stage.runs(20, "high", "n2", 2);
    stage.runs(21, "high", "n3", 1);
    stage.runs(22, "high", "n4", 1);
    for id in 30..60 {
        stage.waits(id, 1, 2);
    }
    let placed = stage.place(&wants);
    assert_eq!((count_on(&placed, "n3"), count_on(&placed, "n4")), (1, 1), "{placed:?}");
}

#[test]
fn a_waiter_that_nobody_can_serve_keeps_only_what_it_asked_for_by_name() {
    // Job 9 wants all four nodes; n4 is another high job's for long.
    let mut stage = Stage::new(4);
    let wants = victims(&mut stage, &["n1"]);
    stage.runs(20, "high", "n4", 2);
    stage.waits(9, 4, 8);
    let placed = stage.place(&wants);
    assert!(placed.values().all(Result::is_ok), "{placed:?}");
    stage.requests.get_mut(&9).unwrap().req_nodes = names(&["n2", "n3", "n4", "n1"]);
    let placed = stage.place(&wants);
    assert!(placed.values().all(Result::is_err), "{placed:?}");
}

#[test]
fn a_waiter_that_is_served_only_by_more_victims_keeps_what_there_is() {
    // n1 is vacated for job 9, which wants three nodes: n2 is idle, n3 has a job that it may preempt as well.
    let mut stage = Stage::new(3);
    let wants = victims(&mut stage, &["n1"]);
    stage.runs(20, "low", "n3", 1);
    stage.waits(9, 3, 6);
    let placed = stage.place(&wants);
    assert_eq!(count_on(&placed, "n2"), 0, "{placed:?}");
}

#[test]
fn an_exclusive_waiter_keeps_idle_nodes_and_leaves_partly_used_ones() {
    let mut stage = Stage::new(4);
    let wants = victims(&mut stage, &["n1"]);
    stage.runs(20, "high", "n3", 1);
    stage.runs(21, "high", "n4", 1);
    // Two nodes to itself, though one CPU each would do: n1 and n2.
    stage.waits(9, 2, 2).exclusive = true;
    let placed = stage.place(&wants);
    assert_eq!((count_on(&placed, "n3"), count_on(&placed, "n4")), (1, 1), "{placed:?}");
}

#[test]
fn two_preemptors_keep_their_nodes_each() {
    let mut stage = Stage::new(5);
    let wants = victims(&mut stage, &["n1", "n2"]);
    stage.waits(9, 2, 4);
    stage.waits(10, 2, 4);
    // Four nodes for both: n1 and n2 as they are vacated, and two of n3, n4, n5.
    let placed = stage.place(&wants);
    let taken: BTreeSet<&String> = placed.values().filter_map(|p| p.as_ref().ok()).collect();
    assert_eq!(taken.len(), 1, "{placed:?}");
    assert_eq!(placed.values().filter(|p| p.is_ok()).count(), 2);
}

#[test]
fn cpus_that_may_be_spread_are_counted_over_nodes() {
    let mut stage = Stage::new(4);
    let wants = victims(&mut stage, &["n1"]);
    // Six CPUs wherever they are: n1, n2, n3 are as good as n4.
    stage.waits(9, 3, 6).any_nodes = true;
    let placed = stage.place(&wants);
    let taken: BTreeSet<&String> = placed.values().filter_map(|p| p.as_ref().ok()).collect();
    assert_eq!(taken.len(), 1, "{placed:?}");
}

#[test]
fn jobs_that_do_not_wait_for_room_keep_nothing() {
    for change in [
        |j: &mut JobBrief| j.priority = 0,
        |j: &mut JobBrief| j.reason = "Dependency".into(),
        |j: &mut JobBrief| j.reason = "QOSMaxJobsPerUserLimit".into(),
        |j: &mut JobBrief| j.reason = "BeginTime".into(),
        |j: &mut JobBrief| j.partition = "low".into(),
        |j: &mut JobBrief| j.reservation = Some("vmmig_n2".into()),
    ] {
        let mut stage = Stage::new(2);
        let wants = victims(&mut stage, &["n1"]);
        stage.waits(9, 1, 2).req_nodes = names(&["n2"]);
        assert!(stage.place(&wants).values().all(Result::is_err));
        change(stage.jobs.last_mut().unwrap());
        assert!(stage.place(&wants).values().all(Result::is_ok), "{:?}", stage.jobs.last());
    }
}

#[test]
fn a_job_that_our_own_reservation_keeps_out_still_waits() {
    let mut stage = Stage::new(2);
    let wants = victims(&mut stage, &["n1"]);
    stage.waits(9, 1, 2).req_nodes = names(&["n2"]);
    stage.jobs.last_mut().unwrap().reason = "ReqNodeNotAvail, May be reserved for other job".into();
    assert!(stage.place(&wants).values().all(Result::is_err));
}

#[test]
fn under_preempt_qos_the_qos_say_who_goes_before() {
    let mut stage = Stage::new(2);
    let mut wants = victims(&mut stage, &["n1"]);
    let qos = |name: &str, preempts: &[&str]| QosInfo {
        name: name.into(),
        preempts: names(preempts),
    };
    let all = vec![qos("normal", &[]), qos("urgent", &["normal"]), qos("spare", &[])];
    stage.waits(9, 1, 2).req_nodes = names(&["n2"]);
    for w in &mut wants {
        w.qos = Some("normal".into());
    }
    for (waiter, known, kept) in [
        ("urgent", true, true),
        ("spare", true, false),
        ("normal", true, false),
        // Accounting does not answer: any other QOS may go before.
        ("spare", false, true),
        ("normal", false, false),
    ] {
        stage.rule = PreemptRule::of("preempt/qos", &[], known.then(|| all.clone()));
        stage.requests.get_mut(&9).unwrap().qos = Some(waiter.into());
        let placed = stage.place(&wants);
        assert_eq!(placed.values().all(Result::is_err), kept, "{waiter} {known} {placed:?}");
    }
    assert_eq!(PreemptRule::of("preempt/none", &[], None), PreemptRule::Nothing);
}

#[test]
fn a_destination_has_what_the_job_demands() {
    let mut stage = Stage::new(7);
    stage.runs(1, "low", "n1", 1);
    let want = Want {
        constraint: Some("(icelake|rome)&vm".into()),
        exclude: names(&["n2"]),
        ..stage.preempted(1)
    };
    for name in ["n2", "n3", "n4", "n5", "n6", "n7"] {
        stage.node(name).active_features.push("rome".into());
    }
    // n2 is excluded; n3 is drained, n4 sick, n5 of another partition, n6 without the feature.
    stage.node("n3").state.push("DRAIN".into());
    stage.well.remove("n4");
    stage.node("n5").partitions = vec!["high".into()];
    stage.node("n6").active_features = vec!["vm".into()];
    assert_eq!(stage.place(std::slice::from_ref(&want))[&1], Ok("n7".to_owned()));
    let reservation = ReservationInfo {
        name: "maintenance".into(),
        nodes: names(&["n7"]),
        users: vec![],
        partition: None,
        features: None,
        flags: vec![],
        start_time: None,
        end_time: None,
        active: false,
    };
    stage.reservations.push(reservation);
    assert!(stage.place(std::slice::from_ref(&want))[&1].is_err(), "reserved for others");
    stage.reservations[0].name = reservation_of("n7");
    assert_eq!(stage.place(&[want])[&1], Ok("n7".to_owned()), "our own reservation");
}

#[test]
fn what_is_on_its_way_to_a_node_is_counted_until_its_job_runs_there() {
    let mut stage = Stage::new(2);
    stage.runs(1, "low", "n1", 1);
    stage.runs(2, "low", "n1", 1);
    let wants = [stage.preempted(1), stage.preempted(2)];
    let arrival = |job| Arrival {
        job,
        node: "n2".into(),
        needs: Resources { cpus: 1, mem_mib: MEM },
    };
    stage.arrivals = vec![arrival(7)];
    let placed = stage.place(&wants);
    assert_eq!(count_on(&placed, "n2"), 1, "{placed:?}");
    // Job 7 runs there now: Slurm counts it.
    stage.runs(7, "low", "n2", 1);
    let placed = stage.place(&wants);
    assert_eq!(count_on(&placed, "n2"), 1, "{placed:?}");
    stage.arrivals = vec![arrival(7), arrival(8)];
    assert_eq!(count_on(&stage.place(&wants), "n2"), 0);
}

#[test]
fn partly_used_nodes_come_before_idle_ones_and_full_ones_not_at_all() {
    let mut stage = Stage::new(4);
    stage.runs(1, "low", "n1", 1);
    let want = stage.preempted(1);
    stage.runs(20, "low", "n2", 2);
    stage.runs(21, "low", "n4", 1);
    assert_eq!(stage.place(std::slice::from_ref(&want))[&1], Ok("n4".to_owned()));
    let to_full = Want {
        wanted: Some("n2".into()),
        ..want
    };
    let why = stage.place(&[to_full])[&1].clone().unwrap_err();
    assert_eq!(why, "n2 has no room for the VM, or is not in partition low");
}
