//! Broken nodes: no job is lost, none runs on the host, no node is drained.
mod common;

use std::{
    process::Output,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use common::{Alice, Said, no_node_is_drained, start, wait, wait_with};
use xtask::{Lab, Options};

/// Each test breaks what the others need.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

const HELLO: &str = "#!/bin/sh\n{ echo ran > /shared/home/alice/$1/ran-on-host; } 2>/dev/null\nhostname\n";

fn lab() -> (&'static Lab, MutexGuard<'static, ()>) {
    static LAB: OnceLock<Lab> = OnceLock::new();
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let lab = LAB.get_or_init(|| {
        start(
            &Options {
                grace_s: 20,
                ..Options::named("t-faults")
            },
            &[],
        )
    });
    for node in ["n1", "n2"] {
        for service in ["libvirtd", "slurm-vmd"] {
            // Whatever the last test left: an answer that it runs already is fine.
            let _ = lab.start(node, service);
        }
    }
    features(lab, "vm\nvm\n");
    (lab, guard)
}

/// Waits until the nodes have these features.
fn features(lab: &Lab, wanted: &str) {
    let mut last = String::new();
    wait_with(&format!("features {wanted:?}"), &mut last, |last| {
        let said: Said = Output::into(lab.exec("root", &["sinfo", "-h", "-N", "-p", "low", "-o", "%b"]));
        // An empty list is printed as nothing by some releases.
        *last = said.out.replace("(null)", "");
        last == wanted
    });
}

fn state(t: &Alice, job: u32) -> String {
    t.job(job).get("JobState").cloned().unwrap_or_default()
}

#[test]
fn a_job_that_meets_a_node_without_agent_runs_on_another() {
    let (lab, _alone) = lab();
    let t = Alice::new(lab, "agent");
    t.script("job.sh", HELLO);
    lab.stop("n1", "slurm-vmd").expect("stop");
    // At once, before the controller has noticed. The first may run on n1 only: it is neither failed nor lost.
    let send = |args: &str| {
        let said = t.sh(&format!(
            "SLURM_VM_CONNECT_TIMEOUT=2 sbatch --parsable --vm=tiny {args} job.sh agent"
        ));
        said.out.trim().parse::<u32>().unwrap_or_else(|_| panic!("{said:?}"))
    };
    let job = send("-x n2 -o out");
    let other = send("-o out.other");
    assert_eq!(t.end_of(other).0, "COMPLETED");
    no_node_is_drained(lab);
    assert_eq!(t.text("out.other"), format!("slurm-{other}-0\n"));
    lab.start("n1", "slurm-vmd").expect("start");
    features(lab, "vm\nvm\n");
    t.sh(&format!("scancel {job}"));
    // Not left to the next test, which breaks the node again under it.
    t.end_of(job);
    assert!(!t.path("ran-on-host").exists());
}

#[test]
fn a_job_that_was_started_on_a_broken_node_is_sent_elsewhere_by_itself() {
    let (lab, _alone) = lab();
    let t = Alice::new(lab, "sent");
    t.script("job.sh", HELLO);
    // n2 is kept busy, so that the job starts on n1; the controller is away, so that it does not take n1's feature first.
    let busy = t.submit("-w n2 --exclusive -o /dev/null --wrap 'sleep 8'");
    t.wait_state(busy, "RUNNING");
    lab.stop("ctl", "slurm-vmd").expect("stop");
    lab.stop("n1", "slurm-vmd").expect("stop");
    let said = t.sh("SLURM_VM_CONNECT_TIMEOUT=2 sbatch --parsable --vm=tiny -o out job.sh sent");
    let job: u32 = said.out.trim().parse().expect("a job number");
    t.wait_state(job, "SPECIAL_EXIT");
    lab.start("ctl", "slurm-vmd").expect("start");
    assert_eq!(t.end_of(job), ("COMPLETED".to_owned(), "0:0".to_owned()));
    assert_eq!(t.job(job)["NodeList"], "n2");
    assert_eq!(t.text("out"), format!("slurm-{job}-0\n"));
    assert!(!t.path("ran-on-host").exists());
    no_node_is_drained(lab);
}

#[test]
fn a_node_whose_libvirt_is_down_loses_the_feature_and_its_jobs_go_elsewhere() {
    let (lab, _alone) = lab();
    let t = Alice::new(lab, "libvirt");
    t.script("job.sh", HELLO);
    lab.stop("n1", "libvirtd").expect("stop");
    let jobs: Vec<u32> = (0..3).map(|k| t.submit(&format!("--vm=tiny -o out.{k} job.sh libvirt"))).collect();
    for (k, job) in jobs.iter().enumerate() {
        assert_eq!(t.end_of(*job), ("COMPLETED".to_owned(), "0:0".to_owned()));
        assert_eq!(t.text(&format!("out.{k}")), format!("slurm-{job}-0\n"));
    }
    features(lab, "\nvm\n");
    no_node_is_drained(lab);
    lab.start("n1", "libvirtd").expect("start");
    features(lab, "vm\nvm\n");
    assert!(!t.path("ran-on-host").exists());
}

#[test]
fn with_every_node_sick_jobs_wait_and_run_when_one_is_well() {
    let (lab, _alone) = lab();
    let t = Alice::new(lab, "all");
    t.script("job.sh", HELLO);
    for node in ["n1", "n2"] {
        lab.stop(node, "slurm-vmd").expect("stop");
    }
    let said = t.sh("SLURM_VM_CONNECT_TIMEOUT=2 sbatch --parsable --vm=tiny -o out job.sh all");
    let job: u32 = said.out.trim().parse().expect("a job number");
    // It may meet the node that keeps the feature, and then waits held; or it waits for a node.
    wait("the job to have been tried, or to wait", || {
        let s = state(&t, job);
        println!("{s}");
        (s == "SPECIAL_EXIT" || s == "PENDING" || t.job(job).get("Restarts").is_some_and(|r| r != "0")).then_some(())
    });
    no_node_is_drained(lab);
    for node in ["n1", "n2"] {
        lab.start(node, "slurm-vmd").expect("start");
    }
    assert_eq!(t.end_of(job), ("COMPLETED".to_owned(), "0:0".to_owned()));
    assert_eq!(t.text("out"), format!("slurm-{job}-0\n"));
    assert!(!t.path("ran-on-host").exists());
}

#[test]
fn a_running_program_does_not_notice_that_the_agent_is_restarted() {
    let (lab, _alone) = lab();
    let t = Alice::new(lab, "restart");
    t.script(
        "count.sh",
        "#!/bin/sh\ni=0; while [ $i -lt 80 ]; do echo $i; i=$((i+1)); sleep 0.1; done; exit 6\n",
    );
    let job = t.submit("--vm=tiny -w n1 -o out count.sh");
    t.wait_text("out", "3\n");
    lab.kill("n1", "slurm-vmd").expect("kill");
    t.wait_text("out", "30\n");
    lab.stop("n1", "slurm-vmd").expect("stop");
    lab.start("n1", "slurm-vmd").expect("start");
    t.wait_text("out", "60\n");
    lab.kill("n1", "libvirtd").expect("kill");
    assert_eq!(t.end_of(job), ("FAILED".to_owned(), "6:0".to_owned()));
    let all: String = (0..80).map(|i| format!("{i}\n")).collect();
    assert_eq!(t.text("out"), all);
    t.leaves_nothing(job);
}
