//! On real machines: jobs that move, with KVM, sVirt and an NFS between two clients. `cargo xtask test --machines moves`.
mod site;

use site::{Site, counted, counter};

/// Starts a counter on n1 and waits until it counts.
fn counting(t: &Site, args: &str, to: u32) -> u32 {
    t.script("count.sh", &counter(to));
    let job = t.submit(&format!("--vm=tiny -w n1 --output=out {args} count.sh"));
    t.wait_text("out", "\n10\n");
    job
}

#[test]
fn svm_migrate_moves_a_guest_while_it_counts() {
    let t = Site::take("migrate");
    t.encrypt(true);
    let job = counting(&t, "", 600);
    let said = t.sh(&format!("svm migrate {job} n2"));
    assert_eq!(said.code, Some(0), "{said:?}");
    t.wait_vm(job, "n2", "running");
    assert_eq!(t.end_of(job), "COMPLETED 0:0");
    assert_eq!(t.ways(job), ["live"]);
    counted(&t, job, "out", 600);
    t.encrypt(false);
    t.end();
}

#[test]
fn a_guest_with_the_nodes_own_processor_model_moves() {
    let t = Site::take("model");
    let set = |model: &str| site::NODES.iter().for_each(|n| t.set(n, "cpu_model", model));
    set("\"host-model\"");
    t.well();
    let job = counting(&t, "", 700);
    let model = t.root("n1", &format!("virsh dumpxml slurm-{job}-0 | grep -A3 '<cpu '")).out;
    assert!(model.contains("EPYC"), "{model}");
    let said = t.sh(&format!("svm migrate {job} n2"));
    assert_eq!(said.code, Some(0), "{said:?}");
    assert_eq!(t.end_of(job), "COMPLETED 0:0");
    counted(&t, job, "out", 700);
    set("\"\"");
    t.end();
}

#[test]
fn a_preempted_job_moves_live_and_keeps_its_id() {
    let t = Site::take("live");
    let job = counting(&t, "-c1", 700);
    let urgent = t
        .on("bob", "ctl", "cd ~ && sbatch --parsable -p high -w n1 -c1 --wrap 'sleep 10'")
        .out;
    println!("bob's job is {urgent}");
    t.wait_vm(job, "n2", "running");
    assert_eq!(t.end_of(job), "COMPLETED 0:0");
    assert_eq!(t.ways(job), ["live"]);
    assert_eq!(t.job(job)["Restarts"], "1");
    counted(&t, job, "out", 700);
    t.end();
}

#[test]
fn a_preempted_job_is_saved_and_goes_on_later() {
    let t = Site::take("save");
    let job = counting(&t, "-c1 --vm-preempt=save", 200);
    t.on("bob", "ctl", "cd ~ && sbatch --parsable -p high -w n1 -c1 --wrap 'sleep 10'");
    assert_eq!(t.end_of(job), "COMPLETED 0:0");
    assert_eq!(t.ways(job), ["save", "restore"]);
    counted(&t, job, "out", 200);
    t.end();
}

#[test]
fn a_preempted_job_starts_over_if_that_is_all_it_wants() {
    let t = Site::take("requeue");
    let job = counting(&t, "-c1 --vm-preempt=requeue", 60);
    t.on("bob", "ctl", "cd ~ && sbatch --parsable -p high -w n1 -c1 --wrap 'sleep 10'");
    assert_eq!(t.end_of(job), "COMPLETED 0:0");
    assert_eq!(t.job(job)["Restarts"], "1");
    let text = t.text("out");
    // Slurm empties the output of a job that starts over (JobFileAppend=0).
    assert_eq!(
        text.matches("boot ").count(),
        2,
        "the last run was whole, and nothing is left of the one before"
    );
    assert!(text.contains("\n60\nboot "));
    t.end();
}

#[test]
fn a_drained_node_is_left_by_its_guests() {
    let t = Site::take("drain");
    let job = counting(&t, "", 700);
    t.root("ctl", "scontrol update nodename=n1 state=drain reason=test");
    t.wait_vm(job, "n2", "running");
    t.root("ctl", "scontrol update nodename=n1 state=resume");
    assert_eq!(t.end_of(job), "COMPLETED 0:0");
    assert_eq!(t.ways(job), ["live"]);
    counted(&t, job, "out", 700);
    t.end();
}
