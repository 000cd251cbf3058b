//! Words of a move that come when a later run of its job is there: nothing of that run may change.
use slurm_vm::{
    core::{Event, LeavingStage, Life, ProgramRecord, Record},
    slurm::{FakeJob, Slurm},
};

use crate::cluster::{AWAIT_JOB_MS, Cluster, Order};

fn life(c: &Cluster, node: &str, job: u32) -> Option<Life> {
    c.nodes[node].vms.get(&job).map(|o| o.vm.record.life.clone())
}

fn runs(c: &Cluster, node: &str, job: u32) -> bool {
    life(c, node, job) == Some(Life::Running)
}

fn program(wrote: u64) -> ProgramRecord {
    ProgramRecord {
        id: 1,
        key: "batch.0".into(),
        merged: false,
        terminal: false,
        stdout: None,
        stderr: None,
        wrote: [wrote, 0],
        ended: None,
        started: true,
    }
}

/// The program of the VM on this node has written so much.
fn has_written(c: &mut Cluster, node: &str, job: u32, bytes: u64) {
    let programs = c.programs(node, job, &[program(bytes)]);
    let owner = c.nodes.get_mut(node).unwrap().vms.get_mut(&job).unwrap();
    owner.vm.record.programs = vec![program(bytes)];
    owner.programs = programs;
    let record = owner.vm.record.clone();
    c.nodes.get_mut(node).unwrap().ledger.insert(job, record);
}

fn record(c: &Cluster, node: &str, job: u32) -> Record {
    c.nodes[node].vms[&job].vm.record.clone()
}

/// A job on n1 whose VM is being copied to n2.
fn in_mid_copy() -> (Cluster, u32) {
    let mut c = Cluster::scripted(2);
    c.tracing = true;
    c.slurm.set_drain("n2", Some("the first run is to be on n1"));
    let job = c.slurm.submit(FakeJob::default());
    c.vm_jobs.insert(job, 3_600_000);
    c.until("the job runs on n1", 60, |c| runs(c, "n1", job));
    c.slurm.set_drain("n2", None);
    has_written(&mut c, "n1", job, 5_000);
    let id = c.id();
    c.order("n1", job, id, Order::MoveOut { to: "n2".into() });
    c.until("the VM is being copied", 20, |c| {
        c.libvirt_jobs.contains_key(&("n1".to_owned(), job))
            && matches!(
                life(c, "n1", job),
                Some(Life::Leaving {
                    stage: LeavingStage::Copying,
                    ..
                })
            )
    });
    (c, job)
}

/// n1 loses power in mid copy, and the job starts over on n2. Returns what n1 had on record.
fn started_over() -> (Cluster, u32, Record) {
    let (mut c, job) = in_mid_copy();
    let left = c.nodes["n1"].ledger[&job].clone();
    c.power_off("n1");
    // What libvirt at the destination says when the stream breaks.
    let how = "the stream broke".into();
    c.core("n2", job, Event::DomainEnded { how });
    c.until("the job runs on n2, from its start", 60, |c| runs(c, "n2", job));
    assert_eq!(c.slurm.job(job).unwrap().unwrap().brief.restarts, 1);
    has_written(&mut c, "n2", job, 10);
    (c, job, left)
}

#[test]
fn a_node_that_comes_back_from_a_power_loss_in_mid_copy_leaves_the_jobs_later_run_alone() {
    let (mut c, job, left) = started_over();
    let before = record(&c, "n2", job);
    c.power_on("n1");
    c.until("n1 is done with the move", 60, |c| !c.nodes["n1"].vms.contains_key(&job));
    let after = &c.nodes["n1"].ledger[&job].life;
    assert!(
        matches!(after, Life::Stopped { .. }),
        "n1 takes the later run for the guest that it was to send: {after:?}"
    );
    assert_eq!(record(&c, "n2", job).programs, before.programs, "the later run's offsets");
    assert!(runs(&c, "n2", job) && c.world.running(left.uuid()) == ["n2"]);
}

#[test]
fn a_take_over_of_an_earlier_run_is_refused_and_the_later_runs_offsets_stay() {
    let (mut c, job, mut left) = started_over();
    let Life::Leaving { stage, .. } = &mut left.life else {
        panic!("{:?}", left.life)
    };
    *stage = LeavingStage::Finishing;
    let before = record(&c, "n2", job);
    c.power_on("n1");
    c.nodes.get_mut("n1").unwrap().ledger.insert(job, left);
    // The word as n1 would send it if it took the move for done: from an agent that is started once more.
    c.kill("n1");
    c.restart("n1");
    c.until("n1 is done with the move", 60, |c| !c.nodes["n1"].vms.contains_key(&job));
    assert!(matches!(c.nodes["n1"].ledger[&job].life, Life::Gone { .. }));
    assert_eq!(record(&c, "n2", job).programs, before.programs, "the later run's offsets");
    assert_eq!(c.counts.get("hand-overs refused"), Some(&1), "refused, and not offered again");
    assert_eq!(c.counts.get("hand-overs"), Some(&1));
    assert!(runs(&c, "n2", job));
}

#[test]
fn an_arrival_that_its_source_asks_for_is_ended_before_the_answer_is_no() {
    let (mut c, job) = in_mid_copy();
    c.power_off("n1");
    // n2 does not hear of it: the job starts there while the VM is still expected.
    c.until("the job is on n2", 60, |c| c.job_here("n2", job) == Some(true));
    assert!(matches!(life(&c, "n2", job), Some(Life::Arriving { .. })));
    c.power_on("n1");
    c.until("n1 is done with the move", 60, |c| {
        let done = !c.nodes["n1"].vms.contains_key(&job);
        assert!(
            !done || !matches!(life(c, "n2", job), Some(Life::Arriving { .. } | Life::Stopping { .. })),
            "n1 was told no while the guest could still have come"
        );
        done
    });
    assert!(matches!(c.nodes["n1"].ledger[&job].life, Life::Stopped { .. }));
    c.until("the job runs on n2, from its start", 60, |c| runs(c, "n2", job));
}

#[test]
fn what_a_source_hands_over_twice_is_taken_once() {
    let (mut c, job) = in_mid_copy();
    c.until("n1 is done with the move", 60, |c| {
        matches!(life(c, "n1", job), Some(Life::Gone { .. }))
    });
    let landed = record(&c, "n2", job);
    assert_eq!(landed.programs[0].wrote, [5_000, 0]);
    has_written(&mut c, "n2", job, 6_000);
    let mut left = c.nodes["n1"].ledger[&job].clone();
    let by = landed.arrived_by.expect("the move by which it came").by;
    let stage = LeavingStage::Finishing;
    left.life = Life::Leaving {
        to: "n2".into(),
        by,
        stage,
    };
    left.programs = vec![program(9_000)];
    assert_eq!(c.take_over("n2", &left, &[]), Ok(()));
    assert_eq!(record(&c, "n2", job).programs[0].wrote, [6_000, 0]);
}

#[test]
fn a_copy_that_takes_longer_than_the_destination_waits_for_its_job_lands_all_the_same() {
    let mut c = Cluster::scripted(2);
    c.tracing = true;
    c.copies_take = Some(3 * AWAIT_JOB_MS);
    c.slurm.set_drain("n2", Some("the first run is to be on n1"));
    let job = c.slurm.submit(FakeJob::default());
    c.vm_jobs.insert(job, 3_600_000);
    c.until("the job runs on n1", 60, |c| runs(c, "n1", job));
    c.slurm.set_drain("n2", None);
    let id = c.id();
    c.order("n1", job, id, Order::MoveOut { to: "n2".into() });
    c.until("the copy has come to an end", 4 * AWAIT_JOB_MS / 1000, |c| {
        !matches!(life(c, "n2", job), None | Some(Life::Arriving { .. }))
    });
    assert!(
        matches!(life(&c, "n2", job), Some(Life::AwaitingJob { .. })),
        "{:?}",
        life(&c, "n2", job)
    );
}
