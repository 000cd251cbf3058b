//! Preemptors of several nodes: they start as soon as their victims have left, and the victims move once, to nodes that nobody
//! who goes before needs. Labs of eight nodes with two VMs on each of the first four.
mod common;

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use common::{
    Said,
    moves::{Count, Mover, lab},
    wait, wait_with,
};
use xtask::{Lab, Options};

/// Sixteen guests at once would be slow for reasons of this machine.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Numbers that a victim counts: it must outlive what is done to it.
const NUMBERS: usize = 420;

/// GraceTime of the labs in seconds.
const GRACE: u32 = 60;

fn start(name: &str, slurm_conf: &str) -> Lab {
    start_with(8, name, slurm_conf)
}

fn start_with(nodes: u8, name: &str, slurm_conf: &str) -> Lab {
    lab(
        name,
        Options {
            nodes,
            grace_s: GRACE,
            slurm_conf: slurm_conf.into(),
            ..Options::default()
        },
    )
}

/// Two VMs of one CPU on each of these nodes, counting.
struct Victims<'a, 'l> {
    m: &'a Mover<'l>,
    jobs: Vec<(u32, String)>,
}

impl<'a, 'l> Victims<'a, 'l> {
    fn on(m: &'a Mover<'l>, round: &str, nodes: &[&str]) -> Self {
        let mut jobs = Vec::new();
        for node in nodes {
            for k in 1..=2 {
                let out = format!("{round}-{node}-{k}");
                jobs.push((m.count(Count::to(NUMBERS), &out, &format!("-n1 -w {node}")), out));
            }
        }
        for (_, out) in &jobs {
            m.wait_lines(out, 5);
        }
        Self { m, jobs }
    }

    /// Each has ended well with every number once, having moved once at most; returns the ways of the moves.
    fn check(&self) -> Vec<Vec<String>> {
        let mut ways = Vec::new();
        for (job, out) in &self.jobs {
            let end = self.m.t.end_of(*job);
            if end != ("COMPLETED".to_owned(), "0:0".to_owned()) {
                self.m.tell(*job);
                panic!("job {job}: {end:?}");
            }
            let restarts = self.m.t.job(*job)["Restarts"].clone();
            assert!(matches!(restarts.as_str(), "0" | "1"), "job {job} moved twice: {restarts} restarts");
            self.m.check(out, NUMBERS);
            ways.push(self.m.ways(*job));
        }
        ways
    }

    /// All of them have moved live.
    fn moved_live(&self) {
        let ways = self.check();
        assert!(ways.iter().all(|w| w == &["live"]), "{ways:?}");
    }
}

fn no_reservation(lab: &Lab) {
    let mut said = String::new();
    wait_with("no reservation to be left", &mut said, |said| {
        *said = Said::from(lab.node("ctl", &["scontrol", "show", "reservation"])).out;
        said.contains("No reservations")
    });
}

/// Submits to partition high and waits until the job runs; seconds from the submission.
fn begins(m: &Mover, options: &str, seconds: u32) -> (u32, f32) {
    let begun = Instant::now();
    let job = m.t.submit(&format!("-p high {options} -o /dev/null --wrap 'sleep {seconds}'"));
    let after = m.started(job, begun);
    (job, after)
}

/// The single-node equal: two victims of one node, and a preemptor of that node.
fn single(m: &Mover, round: &str) -> f32 {
    let victims = Victims::on(m, round, &["n1"]);
    let (high, after) = begins(m, "-w n1 -N1 -n2", 1);
    m.t.end_of(high);
    victims.moved_live();
    after
}

/// A preemptor that starves waits for the end of the grace time, or of its victims. How much later than its single-node equal it
/// begins is printed; what that is on a machine with nothing else to do, `cargo xtask bench preempt` measures.
fn is_not_starved(what: &str, single: f32, several: f32) {
    println!("{what}: {several:.1} s, its single-node equal {single:.1} s");
    let half_of_grace = f32::from(u8::try_from(GRACE).expect("a short grace")) / 2.0;
    assert!(several < half_of_grace, "{what} began after {several:.1} s of a grace of {GRACE} s");
}

#[test]
fn a_preemptor_of_four_nodes_begins_as_soon_as_one_of_one_node() {
    let _alone = alone();
    let lab = start("four", "");
    let m = Mover::new(&lab, "four", 8);
    let one = single(&m, "single");

    // By name.
    let victims = Victims::on(&m, "named", &["n1", "n2", "n3", "n4"]);
    let (high, after) = begins(&m, "-w n1,n2,n3,n4 -N4 -n8", 3);
    is_not_starved("by name", one, after);
    m.t.end_of(high);
    victims.moved_live();

    // To itself alone.
    let victims = Victims::on(&m, "exclusive", &["n1", "n2", "n3", "n4"]);
    let (high, after) = begins(&m, "-w n1,n2,n3,n4 -N4 -n4 --exclusive", 3);
    is_not_starved("exclusive", one, after);
    m.t.end_of(high);
    victims.moved_live();

    // By count, with two nodes idle: two are vacated for it, the other two must stay idle. n5 and n6 have half a node each.
    let halves = ["n5", "n6"].map(|node| {
        let job =
            m.t.submit(&format!("-p high -w {node} -n1 --mem=100 -o /dev/null --wrap 'sleep 600'"));
        m.t.wait_state(job, "RUNNING");
        job
    });
    let victims = Victims::on(&m, "counted", &["n1", "n2", "n3", "n4"]);
    let (high, after) = begins(&m, "-N4 -n8", 3);
    is_not_starved("by count", one, after);
    m.t.end_of(high);
    let ways = victims.check();
    let moved = |way: &str| ways.iter().filter(|w| w.first().is_some_and(|first| first == way)).count();
    assert_eq!((moved("live"), moved("save")), (2, 2), "{ways:?}");
    for job in halves {
        m.give_back(job);
    }
    no_reservation(&lab);
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn two_preemptors_at_once_and_one_that_is_cancelled_half_way_cost_no_work() {
    let _alone = alone();
    let lab = start("two", "");
    let m = Mover::new(&lab, "two", 8);
    let one = single(&m, "single");

    let victims = Victims::on(&m, "both", &["n1", "n2", "n3", "n4"]);
    let begun = Instant::now();
    let high = ["n1,n2", "n3,n4"].map(|nodes| m.t.submit(&format!("-p high -w {nodes} -N2 -n4 -o /dev/null --wrap 'sleep 3'")));
    let after = high.map(|job| m.started(job, begun));
    is_not_starved("the first of two", one, after[0].min(after[1]));
    is_not_starved("the second of two", one, after[0].max(after[1]));
    for job in high {
        m.t.end_of(job);
    }
    victims.moved_live();

    // Cancelled as soon as the first victim is on its way: the others leave all the same, since Slurm does not forget.
    let victims = Victims::on(&m, "cancelled", &["n1", "n2", "n3", "n4"]);
    let high = m.t.submit("-p high -w n1,n2,n3,n4 -N4 -n8 -o /dev/null --wrap 'sleep 3'");
    m.as_soon_as("squeue -h -t PD,CG -p low | grep -q .", &format!("scancel {high}"));
    victims.moved_live();
    no_reservation(&lab);

    // And the nodes that were vacated for nobody can be used again: all others are full.
    let full: Vec<u32> = ["n5", "n6", "n7", "n8", "n2", "n3"].iter().map(|n| m.fill(n)).collect();
    let victims = Victims::on(&m, "after", &["n1"]);
    let (high, _) = begins(&m, "-w n1 -N1 -n2", 1);
    m.t.end_of(high);
    victims.moved_live();
    for job in full {
        m.give_back(job);
    }
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn beside_a_high_queue_that_is_never_empty_vms_still_move_live() {
    let _alone = alone();
    let lab = start("queue", "");
    let m = Mover::new(&lab, "queue", 8);
    // Whole nodes are what the queue waits for; n7 and n8 have half a node free, which is of no use to it.
    let mut long: Vec<u32> = ["n3", "n4", "n5", "n6"].iter().map(|n| m.fill(n)).collect();
    long.extend(["n7", "n8"].map(|node| {
        m.t.submit(&format!("-p high -w {node} -n1 --mem=100 -o /dev/null --wrap 'sleep 900'"))
    }));
    let victims = Victims::on(&m, "whole", &["n1"]);
    // n2 and then n1 go to the queue, one job after the other, and others wait all the time.
    let queue: Vec<u32> = (0..12)
        .map(|_| m.t.submit("-p high -N1 -n2 -o /dev/null --wrap 'sleep 6'"))
        .collect();
    wait("both VMs to be elsewhere", || {
        let nodes: Vec<String> = victims.jobs.iter().map(|(job, _)| m.t.job(*job)["NodeList"].clone()).collect();
        (nodes.iter().all(|n| matches!(n.as_str(), "n7" | "n8")) && nodes[0] != nodes[1]).then_some(())
    });
    let waiting = m.t.sh("squeue -h -p high -t PD | wc -l").out;
    assert_ne!(waiting.trim(), "0", "the queue is empty: this shows nothing");
    for job in queue {
        m.t.end_of(job);
    }
    victims.moved_live();
    for job in long {
        m.give_back(job);
    }
    no_reservation(&lab);
    m.nothing_left();
    lab.down().expect("down");
}

/// The scheduler as it comes, and the other one: what the lab sets elsewhere hides how slow they are.
fn with_scheduler(name: &'static str, slurm_conf: &str) {
    let _alone = alone();
    let lab = start(name, slurm_conf);
    let m = Mover::new(&lab, name, 8);
    let one = single(&m, "single");
    let victims = Victims::on(&m, "named", &["n1", "n2", "n3", "n4"]);
    let (high, after) = begins(&m, "-w n1,n2,n3,n4 -N4 -n8", 3);
    is_not_starved(name, one, after);
    m.t.end_of(high);
    victims.moved_live();
    no_reservation(&lab);
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn with_slurms_own_scheduler_parameters_it_is_the_same() {
    with_scheduler("plainsched", "SchedulerParameters=default_queue_depth=100\n");
}

#[test]
fn with_the_builtin_scheduler_it_is_the_same() {
    with_scheduler(
        "builtin",
        "SchedulerParameters=default_queue_depth=100\nSchedulerType=sched/builtin\n",
    );
}

#[test]
fn a_job_that_cannot_be_requeued_stays_whole_and_one_line_says_why() {
    let _alone = alone();
    let lab = lab(
        "norequeue",
        Options {
            nodes: 2,
            grace_s: 30,
            ..Options::default()
        },
    );
    let m = Mover::new(&lab, "norequeue", 2);
    let job = m.count(Count::to(200), "out", "-w n1 --no-requeue");
    m.wait_lines("out", 5);
    // By hand: refused before anything moves.
    let said = m.t.sh(&format!("svm migrate {job}"));
    assert_ne!(said.code, Some(0), "{said:?}");
    assert_eq!(said.err.lines().count(), 1, "{said:?}");
    assert!(said.err.contains("cannot move: it is not requeueable (--no-requeue)"), "{said:?}");
    assert_eq!(m.vm_state(job), "running");
    // A drain leaves it alone, and says so once.
    lab.node("ctl", &["scontrol", "update", "nodename=n1", "state=drain", "reason=test"]);
    let line = "n1 is being drained, and the VM stays: it is not requeueable";
    let told = |line: &str| {
        let log: Said = lab.node("ctl", &["svm", "log", &job.to_string()]).into();
        log.out.lines().filter(|l| l.contains(line)).count()
    };
    wait("the line in svm log", || (told(line) > 0).then_some(()));
    m.wait_lines("out", m.lines("out") + 20);
    assert_eq!((told(line), m.vm_state(job)), (1, "running".to_owned()));
    lab.node("ctl", &["scontrol", "update", "nodename=n1", "state=resume"]);
    m.completed(job, 0);
    m.check("out", 200);
    assert!(m.ways(job).is_empty());

    // A preemption is Slurm's to carry out: until it ends the job, its VM runs where it is.
    let job = m.count(Count::to(2000), "preempted", "-w n1 --no-requeue");
    m.wait_lines("preempted", 5);
    let high = m.t.submit("-p high -w n1 -N1 -n2 -o /dev/null --wrap 'sleep 2'");
    let line = "the job is being preempted, and the VM stays until Slurm ends it: it is not requeueable";
    let told = |job: u32, line: &str| {
        let log: Said = lab.node("ctl", &["svm", "log", &job.to_string()]).into();
        log.out.lines().filter(|l| l.contains(line)).count()
    };
    wait("the line in svm log", || (told(job, line) > 0).then_some(()));
    let lines = m.lines("preempted");
    m.wait_lines("preempted", lines + 20);
    assert_eq!(m.vm_state(job), "running", "it is whole until its grace is over");
    let end = m.t.end_of(job);
    assert_eq!(end.0, "PREEMPTED", "{end:?}");
    assert_eq!(told(job, line), 1);
    m.t.end_of(high);
    m.nothing_left();
    lab.down().expect("down");
}

/// A drain of which a job wants no part must not slow the others down.
#[test]
fn a_drain_moves_the_jobs_that_can_and_leaves_the_one_that_cannot() {
    let _alone = alone();
    let lab = lab(
        "drainboth",
        Options {
            nodes: 2,
            grace_s: 30,
            ..Options::default()
        },
    );
    let m = Mover::new(&lab, "drainboth", 2);
    let stays = m.count(Count::to(150), "stays", "-w n1 -n1 --no-requeue");
    let moves = m.count(Count::to(150), "moves", "-w n1 -n1");
    m.wait_lines("stays", 5);
    m.wait_lines("moves", 5);
    let begun = Instant::now();
    lab.node("ctl", &["scontrol", "update", "nodename=n1", "state=drain", "reason=test"]);
    wait("the other to be on n2", || (m.t.job(moves)["NodeList"] == "n2").then_some(()));
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    m.completed(moves, 1);
    m.completed(stays, 0);
    m.check("moves", 150);
    m.check("stays", 150);
    lab.node("ctl", &["scontrol", "update", "nodename=n1", "state=resume"]);
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn twelve_vms_on_six_nodes_that_are_preempted_at_once_all_go_on() {
    let _alone = alone();
    let lab = start_with(12, "twelve", "");
    let m = Mover::new(&lab, "twelve", 12);
    // Each command that the controller gives is a line of its log.
    lab.node(
        "ctl",
        &["sh", "-c", "mkdir -p /etc/default; echo SLURM_VM_DEBUG=1 > /etc/default/slurm-vm"],
    );
    m.restart_agent("ctl");
    m.wait_healthy();
    let victims = Victims::on(&m, "all", &["n1", "n2", "n3", "n4", "n5", "n6"]);
    let commands = || {
        let log = lab.log_tail("ctl", "slurm-vmd", 100_000).unwrap_or_default();
        log.lines().filter(|l| l.contains("]: status Some(")).count()
    };
    let (begun, before) = (Instant::now(), commands());
    let (high, after) = begins(&m, "-w n1,n2,n3,n4,n5,n6 -N6 -n12", 1);
    let mut queue = String::new();
    wait_with("all twelve to run again", &mut queue, |queue| {
        *queue = Said::from(lab.exec("alice", &["squeue", "-h", "-p", "low", "-o", "%i %T %R"])).out;
        !queue.lines().any(|l| !l.contains(" RUNNING "))
    });
    let (seconds, given) = (begun.elapsed().as_secs_f32(), commands() - before);
    m.t.end_of(high);
    let ways = victims.check();
    println!(
        "twelve VMs of six nodes: the preemptor began after {after:.1} s, all ran again after {seconds:.1} s, {given} commands to Slurm"
    );
    assert!(given > 0, "the controller's log shows its commands");
    // A burst of 50 and ten a second: the bound that the pacer keeps with five hundred.
    assert!(given as f32 <= 50.0 + 10.0 * seconds, "{given} commands in {seconds} s");
    let moved = |way: &str| ways.iter().filter(|w| w.first().is_some_and(|first| first == way)).count();
    println!("{} live, {} by a save", moved("live"), moved("save"));
    assert_eq!(moved("live") + moved("save"), 12, "none starts over: {ways:?}");
    no_reservation(&lab);
    m.nothing_left();
    lab.down().expect("down");
}
