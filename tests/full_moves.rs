//! Preemption in every phase of a job's life, by drain and by hand, with what the user set left as it was.
mod common;

use std::{
    io::{BufRead, BufReader},
    process::Stdio,
    time::Instant,
};

use common::{
    Said,
    moves::{Count, Mover, OneCopy, lab},
    wait, wait_with,
};
use xtask::Options;

fn options(nodes: u8, grace_s: u32) -> Options {
    Options {
        nodes,
        grace_s,
        ..Options::default()
    }
}

/// The node a job runs on, once it has been restarted that often.
fn node_of(m: &Mover, job: u32, restarts: u32) -> String {
    let mut last = Default::default();
    wait_with(&format!("job {job} to run with {restarts} restarts"), &mut last, |last| {
        *last = m.t.job(job);
        last.get("JobState").is_some_and(|s| s == "RUNNING") && last.get("Restarts").is_some_and(|r| *r == restarts.to_string())
    });
    last["NodeList"].clone()
}

#[test]
fn without_shared_storage_the_overlay_goes_along() {
    let lab = lab(
        "unshared",
        Options {
            shared: false,
            ..options(2, 60)
        },
    );
    let m = Mover::new(&lab, "unshared", 2);
    m.t.script(
        "disk.sh",
        "#!/bin/sh\nhead -c 50000000 /dev/urandom > /scratch/r\nsha256sum < /scratch/r\nsync\ni=0\nwhile [ $i -lt 100 ]; do i=$((i+1)); echo $i; date > /scratch/d; sleep 0.2; done\nsha256sum < /scratch/r\n",
    );
    let job = m.t.submit("--vm=tiny -p low -o out -w n1 disk.sh");
    m.wait_lines("out", 20);
    let high = m.take("n1", 3);
    m.started(high, Instant::now());
    m.completed(job, 1);
    let text = m.t.text("out");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 102, "{text}");
    assert_eq!(lines[0], lines[101], "the disk is not what it was");
    assert!(lines[1..101].iter().enumerate().all(|(k, l)| *l == (k + 1).to_string()), "{text}");
    assert_eq!(m.ways(job), ["live"]);
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn memory_written_faster_than_the_line_is_saved_instead_and_the_log_says_why() {
    let lab = lab("dirty", options(2, 45));
    let m = Mover::new(&lab, "dirty", 2);
    m.set("n1", "node", "move_bandwidth_mib_s = 16");
    let count = Count {
        numbers: 400,
        memory_mib: 128,
        rewrite_mib: 64,
    };
    let job = m.count(count, "out", "-w n1");
    m.wait_lines("out", 5);
    let high = m.take("n1", 3);
    m.started(high, Instant::now());
    m.completed(job, 1);
    m.check("out", count.numbers);
    let said: Said = lab.node("ctl", &["svm", "log", &job.to_string()]).into();
    assert_eq!(m.ways(job), ["save", "restore"]);
    let shown = m.show(job).to_string();
    assert!(
        said.out.contains("does not converge") || shown.contains("does not converge"),
        "{}\n{shown}",
        said.out
    );
    m.nothing_left();
    lab.down().expect("down");
}

/// More often than Slurm's MaxBatchRequeue (5): that counts failed launches, and no job is held for its moves.
/// Slurm counts a job's steps from 0 again after a requeue.
#[test]
fn a_step_after_a_move_is_a_new_one_and_a_step_before_it_has_ended_with_its_run() {
    let lab = lab("steps", options(2, 30));
    let m = Mover::new(&lab, "steps", 2);
    let job = m.count(Count::to(300), "out", "-w n1");
    m.wait_lines("out", 5);
    let step = |words: &str| m.t.sh(&format!("srun --jobid={job} --overlap --vm=tiny {words}"));
    assert_eq!(step("echo before").out, "before\n");
    let line = format!("srun --jobid={job} --overlap --vm=tiny sh -c 'while true; do date +%s > /scratch/alive; sleep 0.2; done'");
    let mut left = m.t.command(&line).spawn().expect("a step");
    common::wait("the second step", || step("cat /scratch/alive").out.trim().parse::<u64>().ok());
    let moved = m.t.sh(&format!("svm migrate {job} n2"));
    assert_eq!(moved.code, Some(0), "{moved:?}");
    assert!(!left.wait().expect("the step's srun").success());
    m.t.wait_state(job, "RUNNING");
    let after = step("sh -c 'echo after; exit 5'");
    assert_eq!((after.out.as_str(), after.code), ("after\n", Some(5)), "{after:?}");
    let first = step("cat /scratch/alive").out;
    common::wait("a second of the guest", || step("sleep 1").code);
    assert_eq!(
        step("cat /scratch/alive").out,
        first,
        "what the step before the move left is still at work"
    );
    m.t.sh(&format!("scancel {job}"));
    m.t.end_of(job);
    m.nothing_left();
    lab.down().expect("down");
}

/// A job that has moved is run again for its code once, as one that has not.
#[test]
fn a_job_that_slurm_runs_again_for_its_exit_code_runs_again_also_after_a_move() {
    let lab = lab(
        "again",
        Options {
            slurm_conf: "RequeueExit=7".into(),
            ..options(2, 30)
        },
    );
    let m = Mover::new(&lab, "again", 2);
    m.t.script(
        "again.sh",
        "#!/bin/bash\n[ -n \"$SLURM_RESTART_COUNT\" ] && [ \"$SLURM_RESTART_COUNT\" -ge 2 ] && { echo again; exit 0; }\n\
         echo first\ni=0\nwhile [ $i -lt 60 ]; do i=$((i+1)); sleep 0.2; done\nexit 7\n",
    );
    let job = m.t.submit("--vm=tiny -w n1 -o out again.sh");
    m.t.wait_text("out", "first");
    let moved = m.t.sh(&format!("svm migrate {job} n2"));
    assert_eq!(moved.code, Some(0), "{moved:?}");
    m.completed(job, 2);
    assert_eq!(m.t.text("out"), "again\n", "a job that starts over has the output of its last run");
    m.nothing_left();
    lab.down().expect("down");
}

/// While a task of an array moves its place under the limit is free.
#[test]
fn the_tasks_of_an_array_with_a_limit_all_end_well_though_one_of_them_moves() {
    let lab = lab("limit", options(2, 30));
    let m = Mover::new(&lab, "limit", 2);
    let array = m.t.submit(&format!(
        "--vm=tiny -p low -o out.%a --array=1-3%1 count.sh {}",
        Count::to(60).args()
    ));
    m.wait_lines("out.1", 10);
    let moved =
        m.t.sh(&format!("svm migrate {array}_1 n2 || svm migrate $(squeue -h -t R -o %A) n2"));
    println!("{moved:?}");
    for task in 1..=3 {
        m.wait_lines(&format!("out.{task}"), 60);
        let text = m.t.text(&format!("out.{task}"));
        let numbers: Vec<&str> = text.lines().filter_map(|line| line.split(' ').next()).collect();
        let wanted: Vec<String> = (1..=60).map(|n| n.to_string()).collect();
        assert_eq!(numbers, wanted, "task {task}");
    }
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn seven_preemptions_in_a_row_move_it_seven_times() {
    const MOVES: u32 = 7;
    let lab = lab("row", options(3, 40));
    let m = Mover::new(&lab, "row", 3);
    let count = Count {
        numbers: 900,
        memory_mib: 64,
        rewrite_mib: 4,
    };
    let job = m.count(count, "out", "-w n1");
    m.wait_lines("out", 10);
    let copies = OneCopy::watch(&lab, &m.nodes, job);
    for restarts in 1..=MOVES {
        let node = node_of(&m, job, restarts - 1);
        let high = m.take(&node, 3);
        let began = Instant::now();
        m.started(high, began);
        node_of(&m, job, restarts);
    }
    let end = m.t.end_of(job);
    assert_eq!(end, ("COMPLETED".into(), "0:0".into()));
    copies.check();
    m.check("out", count.numbers);
    assert_eq!(m.t.job(job)["Restarts"], MOVES.to_string());
    assert_eq!(m.ways(job), vec!["live"; MOVES as usize]);
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn preempted_again_right_after_landing_it_moves_again() {
    let lab = lab("again", options(3, 40));
    let m = Mover::new(&lab, "again", 3);
    let count = Count {
        numbers: 250,
        memory_mib: 64,
        rewrite_mib: 4,
    };
    let job = m.count(count, "out", "-w n1");
    m.wait_lines("out", 10);
    let copies = OneCopy::watch(&lab, &m.nodes, job);
    let first = m.take("n1", 60);
    let reserved = "scontrol show res -o 2>/dev/null | grep ^ReservationName=vmmig_";
    let mut to = String::new();
    wait_with("a reservation", &mut to, |to| {
        let said: Said = lab.node("ctl", &["sh", "-c", reserved]).into();
        let node = said
            .out
            .split_whitespace()
            .find_map(|w| w.strip_prefix("Nodes=").map(str::to_owned));
        to.clone_from(&node.unwrap_or_default());
        !to.is_empty()
    });
    // Waits for a node that is reserved, and takes it as soon as the job has landed there.
    let second = m.take(&to, 60);
    m.started(first, Instant::now());
    m.started(second, Instant::now());
    let last = node_of(&m, job, 2);
    assert!(last != "n1" && last != to, "{last} after n1 and {to}");
    m.completed(job, 2);
    copies.check();
    m.check("out", count.numbers);
    assert_eq!(m.ways(job), ["live", "live"]);
    m.give_back(first);
    m.give_back(second);
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn preempted_while_it_is_saved_for_a_drain_it_is_saved_and_comes_back() {
    let lab = lab("saving", options(2, 60));
    let m = Mover::new(&lab, "saving", 2);
    let count = Count {
        numbers: 150,
        memory_mib: 1024,
        rewrite_mib: 2,
    };
    let full = m.fill("n2");
    let job = m.count(count, "out", "");
    m.wait_lines("out", 5);
    let copies = OneCopy::watch(&lab, &m.nodes, job);
    lab.node("ctl", &["scontrol", "update", "nodename=n1", "state=drain", "reason=broom"]);
    m.as_soon_as(
        &format!("svm show {job} | grep -q State=saving"),
        "scontrol update nodename=n1 state=resume",
    );
    let high = m.take("n1", 3);
    let state = m.vm_state(job);
    assert_eq!(state, "saving", "with the preemptor in the queue");
    m.started(high, Instant::now());
    m.completed(job, 1);
    copies.check();
    m.check("out", count.numbers);
    assert_eq!(m.ways(job), ["save", "restore"]);
    m.give_back(full);
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn preempted_while_booting_it_starts_over_and_while_finishing_it_is_not_run_twice() {
    let lab = lab("edges", options(2, 30));
    let m = Mover::new(&lab, "edges", 2);
    let count = Count::to(30);
    let job = m.count(count, "boot", "-w n1");
    m.wait_vm(job, "booting");
    let high = m.take("n1", 2);
    m.started(high, Instant::now());
    m.t.end_of(job);
    m.check("boot", 30);
    for (k, line) in [("a", 26), ("b", 28), ("c", 29), ("d", 30)] {
        let out = format!("end.{k}");
        let job = m.count(count, &out, "-w n1");
        m.wait_lines(&out, line);
        let high = m.take("n1", 2);
        let end = m.t.end_of(job);
        assert_eq!(end, ("COMPLETED".into(), "0:0".into()), "preempted at line {line}");
        m.check(&out, 30);
        m.t.end_of(high);
    }
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn preempted_while_a_slow_move_by_hand_is_under_way_it_is_away_before_the_grace_ends() {
    let lab = lab("slowhand", options(2, 40));
    let m = Mover::new(&lab, "slowhand", 2);
    let count = Count {
        numbers: 350,
        memory_mib: 256,
        rewrite_mib: 8,
    };
    m.set("n1", "node", "move_bandwidth_mib_s = 4");
    let job = m.count(count, "out", "-w n1");
    let other = m.count(Count::to(200), "other", "-w n1");
    m.wait_lines("out", 5);
    m.wait_lines("other", 5);
    let mut hand =
        m.t.command(&format!("svm migrate {job} n2"))
            .stdin(Stdio::null())
            .spawn()
            .expect("svm");
    m.wait_vm(job, "leaving");
    let high = m.take("n1", 3);
    m.started(high, Instant::now());
    println!("the move by hand: {:?}", hand.wait().expect("svm"));
    m.completed(job, 1);
    m.check("out", count.numbers);
    m.completed(other, 1);
    m.check("other", 200);
    println!("{:?} {:?}", m.ways(job), m.ways(other));
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn an_array_of_six_on_three_nodes_loses_nothing() {
    let lab = lab("array", options(3, 90));
    let m = Mover::new(&lab, "array", 3);
    let text =
        m.t.sh("sbatch --parsable --vm=tiny -p low -o out.%a --array=1-6 -c1 count.sh 250 200 0 0");
    let id: u32 = text.out.trim().parse().expect("a job");
    for k in 1..=6 {
        m.wait_lines(&format!("out.{k}"), 3);
    }
    let begun = Instant::now();
    let high = m.t.submit("-p high -N 3 -c 2 -o /dev/null --wrap 'sleep 5'");
    let after = m.started(high, begun);
    assert!(after < 90.0, "{after} s");
    wait("the array to end", || {
        m.t.sh(&format!("squeue -h -j {id}")).out.trim().is_empty().then_some(())
    });
    for k in 1..=6 {
        m.check(&format!("out.{k}"), 250);
    }
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn the_tasks_of_an_array_move_live_each_by_itself() {
    let lab = lab("tasks", options(3, 60));
    let m = Mover::new(&lab, "tasks", 3);
    let text =
        m.t.sh("sbatch --parsable --vm=tiny -p low -w n1 -o out.%a --array=1-2 -c1 count.sh 250 200 0 0");
    let id: u32 = text.out.trim().parse().expect("a job");
    for k in 1..=2 {
        m.wait_lines(&format!("out.{k}"), 3);
    }
    let tasks: Vec<u32> =
        m.t.sh(&format!("squeue -h -r -j {id} -o %A"))
            .out
            .lines()
            .map(|l| l.trim().parse().expect("a job"))
            .collect();
    assert_eq!(tasks.len(), 2, "{tasks:?}");
    let high = m.take("n1", 60);
    let after = m.started(high, Instant::now());
    assert!(after < 60.0, "{after} s");
    for task in &tasks {
        m.completed(*task, 1);
        assert_eq!(m.ways(*task), ["live"]);
    }
    for k in 1..=2 {
        m.check(&format!("out.{k}"), 250);
    }
    m.give_back(high);
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn a_drain_empties_the_node_and_a_move_by_hand_can_be_cancelled_half_way() {
    let lab = lab("drain", options(2, 30));
    let m = Mover::new(&lab, "drain", 2);
    let count = Count {
        numbers: 350,
        memory_mib: 128,
        rewrite_mib: 2,
    };
    let job = m.count(count, "out", "-w n1");
    m.wait_lines("out", 5);
    m.set("n1", "node", "move_bandwidth_mib_s = 4");
    let mut hand =
        m.t.command(&format!("svm migrate {job}"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("svm");
    let mut out = BufReader::new(hand.stdout.take().expect("its output"));
    let mut told = String::new();
    while !told.contains("MiB done") {
        assert_ne!(out.read_line(&mut told).expect("progress"), 0, "no progress: {told}");
    }
    println!("{told}");
    let cancel = m.t.sh(&format!("svm migrate {job} --cancel"));
    assert_eq!(cancel.code, Some(0), "{cancel:?}");
    let said: Said = hand.wait_with_output().expect("svm").into();
    println!("{said:?}");
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.err.contains("cancel"), "{said:?}");
    m.wait_vm(job, "running");
    let slurm = m.t.job(job);
    assert_eq!((slurm["NodeList"].as_str(), slurm["Restarts"].as_str()), ("n1", "0"));
    let lines = m.lines("out");
    m.wait_lines("out", lines + 5);
    m.lab.node("n1", &["sed", "-i", "/move_bandwidth/d", "/etc/slurm-vm/slurm-vm.toml"]);
    m.restart_agent("n1");
    lab.node("ctl", &["scontrol", "update", "nodename=n1", "state=drain", "reason=broom"]);
    assert_eq!(node_of(&m, job, 1), "n2");
    m.completed(job, 1);
    m.check("out", count.numbers);
    assert_eq!(m.ways(job), ["live"]);
    lab.node("ctl", &["scontrol", "update", "nodename=n1", "state=resume"]);
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn node_list_comment_priority_and_the_rest_of_the_time_limit_are_carried_over() {
    let lab = lab("fields", options(2, 30));
    let m = Mover::new(&lab, "fields", 2);
    let job = m.count(Count::to(600), "out", "-w n1 --comment='my words' --time=5 --nice=7");
    m.wait_lines("out", 320);
    let before = m.t.job(job);
    let high = m.take("n1", 3);
    m.started(high, Instant::now());
    assert_eq!(node_of(&m, job, 1), "n2");
    let after = m.t.job(job);
    for field in [
        "Comment",
        "Nice",
        "Partition",
        "ExcNodeList",
        "Requeue",
        "JobName",
        "StdOut",
        "OverSubscribe",
        "Features",
    ] {
        assert_eq!(before.get(field), after.get(field), "{field}");
    }
    println!("TimeLimit before {} and after {}", before["TimeLimit"], after["TimeLimit"]);
    assert_eq!(after["TimeLimit"], "00:04:00");
    wait("the move to be over", || {
        let said: Said = lab.node("ctl", &["scontrol", "show", "reservation"]).into();
        (!said.out.contains("vmmig_")).then_some(())
    });
    // Slurm lets a node list be changed only while the job waits.
    lab.node("ctl", &["scontrol", "requeuehold", &job.to_string()]);
    let mut last = String::new();
    wait_with("the user's node list to be back", &mut last, |last| {
        *last = m.t.job(job).get("ReqNodeList").cloned().unwrap_or_default();
        last == "n1"
    });
    lab.node("ctl", &["scancel", &job.to_string()]);
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn scancel_in_any_phase_ends_everything() {
    let lab = lab("cancel", options(2, 60));
    let m = Mover::new(&lab, "cancel", 2);
    let cancelled = |job: u32, phase: &str| {
        m.t.sh(&format!("scancel {job}"));
        let (state, _) = m.t.end_of(job);
        assert_eq!(state, "CANCELLED", "{phase}");
        println!("--- {phase}: {state}");
        m.t.leaves_nothing(job);
    };
    let job = m.count(Count::to(500), "boot", "-w n1");
    m.wait_vm(job, "booting");
    cancelled(job, "booting");

    // Between landing and readmission.
    let job = m.count(Count::to(500), "land", "-w n1");
    m.wait_lines("land", 5);
    let high = m.take("n1", 1);
    m.as_soon_as(&format!("squeue -h -j {job} -o %T | grep -q PENDING"), &format!("scancel {job}"));
    let (state, _) = m.t.end_of(job);
    assert_eq!(state, "CANCELLED", "between landing and readmission");
    m.t.leaves_nothing(job);
    m.t.end_of(high);

    // While it is copied.
    m.set("n1", "node", "move_bandwidth_mib_s = 4");
    let job = m.count(
        Count {
            numbers: 500,
            memory_mib: 128,
            rewrite_mib: 1,
        },
        "copy",
        "-w n1",
    );
    m.wait_lines("copy", 5);
    let high = m.take("n1", 1);
    m.wait_vm(job, "leaving");
    cancelled(job, "copying");
    m.t.end_of(high);

    // While it is saved, saved, and restored.
    for phase in ["saving", "saved", "restoring"] {
        let full = m.fill("n2");
        let job = m.count(
            Count {
                numbers: 500,
                memory_mib: 512,
                rewrite_mib: 1,
            },
            phase,
            "",
        );
        m.wait_lines(phase, 5);
        let high = m.take("n1", 900);
        if phase == "restoring" {
            m.wait_vm(job, "saved");
            let condition = format!("scancel {full}; svm show {job} | grep -q State={phase}");
            m.as_soon_as_on("n2", &condition, &format!("scancel {job}"));
        } else {
            let condition = format!("svm show {job} | grep -q State={phase}");
            m.as_soon_as_on("n1", &condition, &format!("scancel {job}"));
        }
        let (state, _) = m.t.end_of(job);
        assert_eq!(state, "CANCELLED", "{phase}");
        println!("--- {phase}: {state}");
        m.t.sh(&format!("scancel {full} {high}"));
        m.t.end_of(high);
        m.t.end_of(full);
        m.t.leaves_nothing(job);
    }
    let mut listed = String::new();
    wait_with("no VM of a cancelled job to be called saved", &mut listed, |listed| {
        *listed = m.t.sh("svm list").out;
        !listed.contains("saved")
    });
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn kept_out_after_landing_the_deadline_acts_and_it_comes_back_from_a_save() {
    let lab = lab(
        "kept",
        Options {
            slurm_conf: "Licenses=pass:1\n".into(),
            ..options(3, 40)
        },
    );
    let m = Mover::new(&lab, "kept", 3);
    for host in ["n1", "n2", "n3"] {
        m.set(host, "node", "await_job_s = 20");
    }
    // The controller has a table of that name, too.
    m.set("ctl", "node", "await_job_s = 20");
    let job = m.count(Count::to(300), "out", "-w n1 -L pass:1");
    m.wait_lines("out", 5);
    // Waits for the licence, ahead of everybody, and has it as soon as the job is put back into the queue.
    let thief = m.t.submit("-p high -w n3 -c 1 -L pass:1 -o /dev/null --wrap 'sleep 45'");
    let high = m.take("n1", 3);
    m.started(high, Instant::now());
    m.t.wait_state(thief, "RUNNING");
    m.wait_vm(job, "saved");
    assert_eq!(m.t.job(job)["JobState"], "PENDING");
    m.completed(job, 1);
    m.check("out", 300);
    assert_eq!(m.ways(job), ["live", "save", "restore"]);
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn a_job_that_slurm_holds_for_its_exit_code_stays_held_as_without_a_vm() {
    let lab = lab(
        "exit-hold",
        Options {
            slurm_conf: "RequeueExitHold=7".into(),
            ..options(1, 40)
        },
    );
    let m = Mover::new(&lab, "exit-hold", 1);
    m.t.script("seven.sh", "#!/bin/sh\necho ran\nexit 7\n");
    let jobs = ["--vm=tiny --vm-mem=200", ""].map(|vm| m.t.submit(&format!("{vm} --open-mode=append -o out%j seven.sh")));
    for job in jobs {
        m.t.wait_state(job, "SPECIAL_EXIT");
    }
    // The controller has looked at it.
    m.wait_log("ctl", "RequeueExitHold");
    for job in jobs {
        m.t.wait_state(job, "SPECIAL_EXIT");
        assert_eq!(m.t.text(&format!("out{job}")), "ran\n", "it ran once");
        assert_eq!(m.t.sh(&format!("scancel {job}")).code, Some(0));
    }
    m.nothing_left();
    lab.down().expect("down");
}

/// A mount point without its mount is a directory as well.
#[test]
fn a_node_whose_shared_directory_is_not_the_others_takes_no_guest() {
    let lab = lab("mount", options(2, 40));
    let m = Mover::new(&lab, "mount", 2);
    let shared_dir = |to: &str| {
        let edit = format!("s|^shared_dir = .*|shared_dir = \"{to}\"|");
        lab.stop("n2", "slurm-vmd").expect("the agent stops");
        let before = Said::from(lab.node("n2", &["grep", "^shared_dir", "/etc/slurm-vm/slurm-vm.toml"])).out;
        lab.node("n2", &["sed", "-i", &edit, "/etc/slurm-vm/slurm-vm.toml"]);
        lab.start("n2", "slurm-vmd").expect("the agent starts");
        before
    };
    let job = m.count(Count::to(200), "out", "-w n1");
    m.wait_lines("out", 5);
    let before = shared_dir("/var/lib/not-mounted");
    let before = before.trim().trim_start_matches("shared_dir = ").trim_matches('"').to_owned();
    let mut health = String::new();
    wait_with("n2 to be sick", &mut health, |health| {
        *health = Said::from(lab.node("ctl", &["svm", "health"])).out;
        health.lines().any(|l| l.starts_with("n2") && l.contains("is it mounted?"))
    });
    assert!(health.lines().any(|l| l.starts_with("n1") && l.contains(" ok ")), "{health}");
    let said = m.t.sh(&format!("svm migrate {job} n2"));
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.err.contains("is it mounted?"), "{said:?}");
    shared_dir(&before);
    m.wait_healthy();
    assert_eq!(m.t.sh(&format!("svm migrate {job} n2")).code, Some(0));
    m.completed(job, 1);
    m.check("out", 200);
    lab.node("n2", &["rm", "-r", "/var/lib/not-mounted"]);
    m.nothing_left();
    lab.down().expect("down");
}
