//! A preempted job moves: same job, same output, nothing done twice. The short ones; `full_moves*` has the rest.
mod common;

use std::time::Instant;

use common::moves::{Count, Mover, OneCopy, lab};
use xtask::{Options, proc::text_of};

const GRACE: u32 = 30;

fn options(nodes: u8) -> Options {
    Options {
        nodes,
        grace_s: GRACE,
        ..Options::default()
    }
}

#[test]
fn a_preempted_job_goes_on_elsewhere_with_its_memory_and_every_number_once() {
    let lab = lab("live", options(2));
    let m = Mover::new(&lab, "live", 2);
    let count = Count {
        numbers: 200,
        memory_mib: 256,
        rewrite_mib: 4,
    };
    let job = m.count(count, "out", "-w n1");
    m.wait_lines("out", 10);
    let copies = OneCopy::watch(&lab, &m.nodes, job);
    let begun = Instant::now();
    let high = m.take("n1", 3);
    let after = m.started(high, begun);
    assert!(
        after < f32::from(u8::try_from(GRACE).unwrap()),
        "the preemptor started after {after} s, which is not before the grace of {GRACE} s"
    );
    m.completed(job, 1);
    copies.check();
    m.check("out", count.numbers);
    assert_eq!(m.ways(job), ["live"]);
    m.t.end_of(high);
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn with_every_node_full_it_is_saved_and_goes_on_when_one_is_free() {
    let lab = lab("save", options(2));
    let m = Mover::new(&lab, "save", 2);
    let count = Count {
        numbers: 120,
        memory_mib: 256,
        rewrite_mib: 4,
    };
    let full = m.fill("n2");
    let job = m.count(count, "out", "");
    m.wait_lines("out", 10);
    let begun = Instant::now();
    let high = m.take("n1", 20);
    let after = m.started(high, begun);
    assert!(
        after < f32::from(u8::try_from(GRACE).unwrap()),
        "the preemptor started after {after} s, which is not before the grace of {GRACE} s"
    );
    assert_eq!(m.vm_state(job), "saved");
    m.give_back(full);
    // The list is what the nodes last said of themselves.
    let mut listed = String::new();
    common::wait_with("the VM in the list, once, as running", &mut listed, |listed| {
        *listed = m.t.sh("svm list").out;
        listed.contains("running") && !listed.contains("saved")
    });
    m.completed(job, 1);
    m.check("out", count.numbers);
    assert_eq!(m.ways(job), ["save", "restore"]);
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn with_requeue_it_starts_over_and_its_output_is_that_of_the_second_run() {
    let lab = lab("requeue", options(2));
    let m = Mover::new(&lab, "requeue", 2);
    let count = Count::to(60);
    let job = m.count(count, "out", "-w n1 --vm-preempt=requeue");
    m.wait_lines("out", 20);
    let begun = Instant::now();
    let high = m.take("n1", 3);
    m.started(high, begun);
    m.completed(job, 1);
    m.check("out", count.numbers);
    assert!(m.ways(job).is_empty());
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn a_move_by_hand_tells_how_it_goes_and_leaves_the_job_as_it_was() {
    let lab = lab("hand", options(2));
    let m = Mover::new(&lab, "hand", 2);
    let count = Count::to(120);
    let job = m.count(count, "out", "-w n1 --comment='my words' --time=30");
    m.wait_lines("out", 10);
    // Its first core is another's on n2: the VM must not stay on the one that it had on n1.
    let other = m.t.submit("-w n2 -n1 --mem=100 -o /dev/null --wrap 'sleep 600'");
    m.t.wait_state(other, "RUNNING");
    let pinned_to = |node: &str, cpu: &str| {
        let domain = format!("slurm-{job}-0");
        let mut seen = String::new();
        common::wait_with("the VM's CPU", &mut seen, |seen| {
            let text = text_of(&lab.node(node, &["virsh", "-q", "vcpupin", &domain]));
            *seen = text.split_whitespace().last().unwrap_or_default().to_owned();
            seen == cpu
        });
        seen
    };
    assert_eq!(pinned_to("n1", "0"), "0");
    let before = m.t.job(job);
    let said = m.t.sh(&format!("svm migrate {job} n2"));
    assert_eq!(said.code, Some(0), "{said:?}");
    let told: Vec<&str> = said.out.lines().collect();
    assert!(
        told.len() > 1 && told.iter().all(|l| l.starts_with(&format!("job {job}: "))),
        "{told:?}"
    );
    assert_eq!(
        told.last(),
        Some(&format!("job {job}: moved from n1 to n2, and runs there").as_str()),
        "{told:?}"
    );
    let after = m.t.job(job);
    assert_eq!((after["NodeList"].as_str(), after["JobState"].as_str()), ("n2", "RUNNING"));
    for field in ["Comment", "Priority", "TimeLimit", "Partition", "ExcNodeList"] {
        assert_eq!(before.get(field), after.get(field), "{field}");
    }
    assert_eq!(pinned_to("n2", "1"), "1");
    m.completed(job, 1);
    m.check("out", count.numbers);
    assert_eq!(m.ways(job), ["live"]);
    m.give_back(other);
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn a_node_that_cannot_write_its_ledger_neither_takes_nor_sends_a_guest_and_the_guest_goes_on() {
    let lab = lab(
        "unwritten",
        Options {
            vm_disk_mib: 256,
            ..options(2)
        },
    );
    let m = Mover::new(&lab, "unwritten", 2);
    let count = Count::to(300);
    let job = m.count(count, "out", "-w n1");
    m.wait_lines("out", 10);
    // Of the destination the controller may have heard already that it is full.
    let refusals = [("n2", "n2 is not healthy: /var/lib/slurm-vm: only "), ("n1", "(nothing else)")];
    for (node, or) in refusals {
        let why = format!("its record cannot be written on {node}: ");
        let fill = lab.node(node, &["sh", "-c", "cat /dev/zero > /var/lib/slurm-vm/filler"]);
        assert!(!fill.status.success(), "{node} has more room than it should");
        let said = m.t.sh(&format!("svm migrate {job} n2"));
        assert_eq!(said.code, Some(1), "{said:?}");
        assert!(said.err.contains(&why) || said.err.contains(or), "{said:?}");
        let lines = m.lines("out");
        m.wait_lines("out", lines + 5);
        assert_eq!(m.vm_state(job), "running");
        assert!(lab.node(node, &["rm", "/var/lib/slurm-vm/filler"]).status.success());
        m.wait_healthy();
    }
    // With room again it moves, at the latest with the next try.
    let mut last = String::new();
    common::wait_with("a move", &mut last, |last| {
        let said = m.t.sh(&format!("svm migrate {job} n2"));
        *last = format!("{said:?}");
        said.code == Some(0)
    });
    m.completed(job, 1);
    m.check("out", count.numbers);
    m.nothing_left();
    lab.down().expect("down");
}
