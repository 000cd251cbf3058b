//! Daemons that die in the middle of a move: it ends with one running copy or a clean requeue.
mod common;

use std::time::Instant;

use common::moves::{Count, Mover, OneCopy, lab};
use xtask::{Lab, Options};

const NUMBERS: usize = 200;

fn up(name: &str) -> Lab {
    lab(
        name,
        Options {
            nodes: 2,
            grace_s: 60,
            ..Options::default()
        },
    )
}

/// Preempts a counter on n1 with a fault armed in a host's agent. `over`: it may start over, too.
fn with_fault(m: &Mover, host: &str, point: &str, full: bool, may_start_over: bool) {
    println!("=== {point} on {host}");
    m.arm(host, &format!("{point}=abort"));
    let full = full.then(|| m.fill("n2"));
    let out = format!("{host}.{point}");
    let job = m.count(Count::to(NUMBERS), &out, if full.is_some() { "" } else { "-w n1" });
    m.wait_lines(&out, 5);
    let copies = OneCopy::watch(m.lab, &m.nodes, job);
    // Restored on n2, where the fault is: n1 stays taken.
    let stays = full.is_some() && host == "n2";
    let high = m.take("n1", if stays { 900 } else { 3 });
    m.started(high, Instant::now());
    if let Some(full) = full {
        m.give_back(full);
    }
    m.wait_log(host, &format!("fault point {point}: aborting"));
    let end = m.t.end_of(job);
    if end != ("COMPLETED".into(), "0:0".into()) {
        m.tell(job);
        panic!("{point}: {end:?}");
    }
    copies.check();
    m.check(&out, NUMBERS);
    let ways = m.ways(job);
    println!("=== {point} on {host}: {ways:?}");
    assert!(may_start_over || !ways.is_empty(), "{point}: it started over");
    if stays {
        m.give_back(high);
    }
    m.t.end_of(high);
    m.wait_healthy();
    m.t.leaves_nothing(job);
}

#[test]
fn the_controller_dies_at_each_step_of_a_move() {
    let lab = up("ctl");
    let m = Mover::new(&lab, "ctl", 2);
    for point in [
        "slurm.create_reservation.before",
        "slurm.create_reservation.after",
        "peers.move_out.after",
        "slurm.requeuehold.before",
        "slurm.requeuehold.after",
        "slurm.release.before",
        "slurm.release.after",
        "slurm.delete_reservation.before",
        "slurm.delete_reservation.after",
    ] {
        with_fault(&m, "ctl", point, false, false);
    }
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn the_sources_agent_dies_at_each_step_of_a_live_move() {
    let lab = up("source");
    let m = Mover::new(&lab, "source", 2);
    for point in [
        "peers.import.before",
        "peers.import.after",
        "hypervisor.migrate.before",
        "hypervisor.migrate.after",
        "peers.take_over.before",
        "peers.take_over.after",
    ] {
        with_fault(&m, "n1", point, false, true);
    }
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn the_destinations_agent_dies_at_each_step_of_a_live_move() {
    let lab = up("dest");
    let m = Mover::new(&lab, "dest", 2);
    for point in ["peers.admit.before", "peers.admit.after"] {
        with_fault(&m, "n2", point, false, true);
    }
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn the_agent_dies_while_it_saves_and_while_it_restores() {
    let lab = up("save");
    let m = Mover::new(&lab, "save", 2);
    for point in ["hypervisor.save.before", "hypervisor.save.after"] {
        with_fault(&m, "n1", point, true, true);
    }
    for point in ["hypervisor.restore.before", "hypervisor.restore.after"] {
        with_fault(&m, "n2", point, true, true);
    }
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn slurmctld_dies_or_is_restarted_in_the_middle_of_a_move() {
    let lab = up("slurmctld");
    let m = Mover::new(&lab, "slurmctld", 2);
    m.set("n1", "node", "move_bandwidth_mib_s = 16");
    let count = Count {
        numbers: 250,
        memory_mib: 128,
        rewrite_mib: 1,
    };
    for phase in ["leaving", "awaiting"] {
        let job = m.count(count, phase, "-w n1");
        m.wait_lines(phase, 5);
        let copies = OneCopy::watch(&lab, &m.nodes, job);
        let high = m.take("n1", 3);
        lab.node("ctl", &["touch", "/run/submitted"]);
        let at = if phase == "leaving" { "n1" } else { "n2" };
        m.as_soon_as_on(at, &format!("svm show {job} 2>/dev/null | grep -q State={phase}"), "true");
        if phase == "leaving" {
            // Killed before it has saved its state it forgets the high job, and that the low one has started.
            m.as_soon_as("sleep 0.05; test /var/spool/slurmctld/job_state -nt /run/submitted", "true");
            lab.kill("ctl", "slurmctld").expect("killed");
        } else {
            // Killed here, it would forget that the high job has just been started, and drain its node.
            lab.stop("ctl", "slurmctld").expect("stopped");
            lab.start("ctl", "slurmctld").expect("started");
        }
        m.started(high, Instant::now());
        m.completed(job, 1);
        copies.check();
        m.check(phase, count.numbers);
        assert_eq!(m.ways(job), ["live"]);
        m.t.end_of(high);
    }
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn a_copy_that_takes_minutes_outlives_a_restart_of_the_controller() {
    let lab = lab(
        "minutes",
        Options {
            nodes: 2,
            grace_s: 240,
            ..Options::default()
        },
    );
    let m = Mover::new(&lab, "minutes", 2);
    // About 200 MiB at 2 MiB/s.
    m.set("n1", "node", "move_bandwidth_mib_s = 2");
    let count = Count {
        numbers: 900,
        memory_mib: 96,
        rewrite_mib: 0,
    };
    let job = m.count(count, "out", "-w n1");
    m.wait_lines("out", 5);
    let copies = OneCopy::watch(&lab, &m.nodes, job);
    let high = m.take("n1", 3);
    m.wait_vm(job, "leaving");
    m.restart_agent("ctl");
    let begun = Instant::now();
    m.started(high, begun);
    let took = begun.elapsed().as_secs();
    assert!(took > 60, "the copy took {took} s only: this shows nothing");
    m.completed(job, 1);
    copies.check();
    m.check("out", count.numbers);
    assert_eq!(m.ways(job), ["live"]);
    m.t.end_of(high);
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn a_job_that_starts_over_elsewhere_has_the_copy_that_waits_for_it_ended_first() {
    let lab = lab(
        "away",
        Options {
            nodes: 2,
            grace_s: 20,
            ..Options::default()
        },
    );
    let m = Mover::new(&lab, "away", 2);
    for node in ["n1", "n2"] {
        // Its own deadline must not be what ends it.
        m.set(node, "node", "await_job_s = 600");
    }
    m.set("n1", "node", "move_bandwidth_mib_s = 40");
    let count = Count {
        numbers: NUMBERS,
        memory_mib: 128,
        rewrite_mib: 1,
    };
    let job = m.count(count, "out", "-w n1");
    m.wait_lines("out", 5);
    let copies = OneCopy::watch(&lab, &m.nodes, job);
    let high = m.take("n1", 3);
    m.wait_vm(job, "leaving");
    lab.stop("ctl", "slurm-vmd").expect("the controller stops");
    // The VM lands; nobody steers its job, which Slurm puts back into the queue when its grace time ends.
    m.started(high, Instant::now());
    m.t.wait_state(job, "RUNNING");
    m.wait_log("n2", &format!("job {job}: it has started over on n1: its VM here is ended"));
    lab.start("ctl", "slurm-vmd").expect("the controller starts");
    m.completed(job, 1);
    copies.check();
    m.check("out", count.numbers);
    m.t.end_of(high);
    m.wait_healthy();
    m.nothing_left();
    lab.down().expect("down");
}
