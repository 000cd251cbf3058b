//! The other Slurm releases, each in its own Debian root: what a job in a VM is there, and how it moves.
mod common;

use std::time::Instant;

use common::{
    Alice,
    moves::{Count, Mover, lab},
};
use xtask::{Lab, Options, Slurm};

const GRACE: u32 = 60;

fn up(name: &str, slurm: Slurm) -> Lab {
    let options = Options {
        slurm,
        nodes: 2,
        grace_s: GRACE,
        ..Options::default()
    };
    lab(name, options)
}

/// Batch jobs, steps and ends.
fn spine(name: &str, slurm: Slurm) {
    let lab = up(name, slurm);
    let t = Alice::new(&lab, "spine");
    println!("{}", t.sh("sbatch --version; scontrol --version").out.trim());
    t.script("hello.sh", "#!/bin/sh\nhostname\necho \"$1\" \"$WORD\"\nexit $2\n");
    t.script(
        "long.sh",
        "#!/bin/sh\ntrap 'echo got TERM; exit 5' TERM\necho ready\nwhile :; do sleep 0.2; done\n",
    );
    let hello = t.sh("WORD='from outside' sbatch --parsable --vm=tiny -o hello hello.sh 'a b' 0");
    let hello: u32 = hello.out.trim().parse().expect("a job number");
    let seven = t.submit("--vm=tiny --export=NONE -o seven hello.sh x 7");
    assert_eq!(t.end_of(hello), ("COMPLETED".to_owned(), "0:0".to_owned()));
    assert_eq!(t.text("hello"), format!("slurm-{hello}-0\na b from outside\n"));
    assert_eq!(t.end_of(seven), ("FAILED".to_owned(), "7:0".to_owned()));
    assert_eq!(t.text("seven"), format!("slurm-{seven}-0\nx \n"));

    let step = t.sh("srun --vm=tiny hostname");
    assert!(step.out.starts_with("slurm-") && step.code == Some(0), "{step:?}");
    let steps =
        t.sh("salloc --vm=tiny sh -c 'srun cat /proc/sys/kernel/random/boot_id; srun cat /proc/sys/kernel/random/boot_id; hostname'");
    let lines: Vec<&str> = steps.out.lines().collect();
    assert!(
        lines.len() == 3 && lines[0].len() == 36 && lines[0] == lines[1] && lines[2] == "ctl",
        "{steps:?}"
    );
    println!("a step and the steps of an allocation: {} {}", step.out.trim(), steps.out.trim());

    let help = t.sh("sbatch --help").out;
    for option in [
        "--vm=image",
        "--vm-cpus=ncpus",
        "--vm-mem=MB",
        "--vm-boot-timeout=time",
        "--vm-preempt=list",
    ] {
        assert!(
            help.lines().any(|l| l.trim_start().starts_with(option)),
            "{option} is not in {help}"
        );
    }

    let long = t.submit("--vm=tiny -o long long.sh");
    t.wait_text("long", "ready");
    t.sh(&format!("scancel {long}"));
    assert_eq!(t.end_of(long).0, "CANCELLED");
    let text = t.text("long");
    assert!(text.contains("got TERM\n") && text.ends_with(": cancelled\n"), "{text}");
    t.leaves_nothing(long);

    let limited = t.submit("--vm=tiny -t 1 -o limited long.sh");
    t.wait_text("limited", "ready");
    assert_eq!(t.end_of(limited).0, "TIMEOUT");
    let text = t.text("limited");
    assert!(text.contains("got TERM\n") && text.ends_with(": time limit reached\n"), "{text}");
    println!("a cancelled and a timed out job say {:?}", text.lines().last());
    t.leaves_nothing(limited);

    // An agent that is stopped: the job goes to the other node.
    lab.stop("ctl", "slurm-vmd").expect("stop");
    let busy = t.submit("-w n2 --exclusive -o /dev/null --wrap 'sleep 8'");
    t.wait_state(busy, "RUNNING");
    lab.stop("n1", "slurm-vmd").expect("stop");
    let said = t.sh("SLURM_VM_CONNECT_TIMEOUT=2 sbatch --parsable --vm=tiny -o other hello.sh elsewhere 0");
    let job: u32 = said.out.trim().parse().expect("a job number");
    t.wait_state(job, "SPECIAL_EXIT");
    lab.start("ctl", "slurm-vmd").expect("start");
    assert_eq!(t.end_of(job), ("COMPLETED".to_owned(), "0:0".to_owned()));
    assert_eq!(t.text("other"), format!("slurm-{job}-0\nelsewhere \n"));
    common::no_node_is_drained(&lab);
    lab.down().expect("down");
}

/// Live, from a save, by hand, from the start; and a job that ends within its grace time.
fn moves(name: &str, slurm: Slurm) {
    let lab = up(name, slurm);
    let m = Mover::new(&lab, "moves", 2);
    let before_grace_ends = |high: u32, begun: Instant| {
        let after = m.started(high, begun);
        assert!(
            after < 0.8 * f32::from(u8::try_from(GRACE).unwrap()),
            "the preemptor started after {after} s"
        );
        m.t.end_of(high);
    };

    let live = m.count(Count::to(150), "live", "-w n1");
    m.wait_lines("live", 10);
    before_grace_ends(m.take("n1", 3), Instant::now());
    m.completed(live, 1);
    m.check("live", 150);
    assert_eq!(m.ways(live), ["live"]);

    let full = m.take("n2", 3600);
    m.t.wait_state(full, "RUNNING");
    let saved = m.count(Count::to(150), "saved", "");
    m.wait_lines("saved", 10);
    before_grace_ends(m.take("n1", 5), Instant::now());
    m.t.sh(&format!("scancel {full}"));
    m.completed(saved, 1);
    m.check("saved", 150);
    assert_eq!(m.ways(saved), ["save", "restore"]);

    let hand = m.count(Count::to(100), "hand", "-w n1");
    m.wait_lines("hand", 10);
    let said = m.t.sh(&format!("svm migrate {hand} n2"));
    assert_eq!(said.code, Some(0), "{said:?}");
    m.completed(hand, 1);
    m.check("hand", 100);
    assert_eq!(m.ways(hand), ["live"]);

    let again = m.count(Count::to(40), "again", "-w n1 --vm-preempt=requeue");
    m.wait_lines("again", 10);
    before_grace_ends(m.take("n1", 3), Instant::now());
    m.completed(again, 1);
    m.check("again", 40);

    // Nowhere to go, and the script ends by itself within the grace time: Slurm >= 24.05 requeues it all the same, and it
    // must not run again.
    let full = m.take("n2", 3600);
    m.t.wait_state(full, "RUNNING");
    let quick = m.count(Count::to(60), "quick", "-w n1 --vm-preempt=live");
    m.wait_lines("quick", 50);
    before_grace_ends(m.take("n1", 3), Instant::now());
    m.t.sh(&format!("scancel {full}"));
    let end = m.t.end_of(quick);
    assert_eq!(end, ("COMPLETED".to_owned(), "0:0".to_owned()));
    m.check("quick", 60);
    m.nothing_left();
    common::no_node_is_drained(&lab);
    lab.down().expect("down");
}

#[test]
fn the_spine_holds_on_slurm_24_11() {
    spine("2411", Slurm::V2411);
}

#[test]
fn the_spine_holds_on_slurm_26_05() {
    spine("2605", Slurm::V2605);
}

#[test]
fn jobs_move_on_slurm_24_11() {
    moves("2411m", Slurm::V2411);
}

#[test]
fn jobs_move_on_slurm_26_05() {
    moves("2605m", Slurm::V2605);
}
