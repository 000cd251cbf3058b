//! The spine on the other Slurm releases, each in its own Debian root.
mod common;

use common::{Alice, start};
use xtask::{Lab, Options, Slurm};

fn spine(name: &'static str, slurm: Slurm) {
    let lab: Lab = start(
        &Options {
            slurm,
            nodes: 2,
            grace_s: 20,
            ..Options::named(name)
        },
        &[],
    );
    let t = Alice::new(&lab, "spine");
    t.script("hello.sh", "#!/bin/sh\nhostname\necho \"$1\"\nexit $2\n");
    t.script(
        "long.sh",
        "#!/bin/sh\ntrap 'echo got TERM; exit 5' TERM\necho ready\nwhile :; do sleep 0.2; done\n",
    );
    let hello = t.submit("--vm=tiny -o hello hello.sh 'a b' 0");
    let seven = t.submit("--vm=tiny -o seven hello.sh x 7");
    assert_eq!(t.end_of(hello), ("COMPLETED".to_owned(), "0:0".to_owned()));
    assert_eq!(t.text("hello"), format!("slurm-{hello}-0\na b\n"));
    assert_eq!(t.end_of(seven), ("FAILED".to_owned(), "7:0".to_owned()));
    assert!(t.sh("srun --vm=tiny hostname").out.starts_with("slurm-"));

    let long = t.submit("--vm=tiny -o long long.sh");
    t.wait_text("long", "ready");
    t.sh(&format!("scancel {long}"));
    assert_eq!(t.end_of(long).0, "CANCELLED");
    let text = t.text("long");
    assert!(text.contains("got TERM\n") && text.ends_with(": cancelled\n"), "{text}");
    t.leaves_nothing(long);

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
    assert_eq!(t.text("other"), format!("slurm-{job}-0\nelsewhere\n"));
    common::no_node_is_drained(&lab);
    lab.down().expect("down");
}

#[test]
fn the_spine_holds_on_slurm_24_11() {
    spine("t-2411", Slurm::V2411);
}

#[test]
fn the_spine_holds_on_slurm_26_05() {
    spine("t-2605", Slurm::V2605);
}
