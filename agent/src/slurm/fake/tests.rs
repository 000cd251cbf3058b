//! The model behaves as the recorded sessions with the real Slurm did.

use super::*;
use crate::slurm::{JobUpdate, ReservationNodes};

fn started(slurm: &FakeSlurm, job: JobId) -> Option<(Vec<String>, u32)> {
    slurm.events().into_iter().find_map(|e| match e {
        FakeEvent::Started { job: j, nodes, restarts } if j == job => Some((nodes, restarts)),
        _ => None,
    })
}

fn big(partition: &str) -> FakeJob {
    FakeJob {
        partition: partition.into(),
        cpus_per_node: 4,
        ..FakeJob::default()
    }
}

fn spec(name: &str, nodes: ReservationNodes) -> ReservationSpec {
    ReservationSpec {
        name: name.into(),
        nodes,
        partition: Some("low".into()),
        features: Some("vm".into()),
        users: vec!["alice".into()],
    }
}

#[test]
fn a_preempted_job_is_steered_to_a_reserved_node_and_keeps_its_number() {
    let slurm = FakeSlurm::with_nodes(2);
    let victim = slurm.submit(big("low"));
    slurm.tick(100);
    assert_eq!(started(&slurm, victim), Some((vec!["n1".to_owned()], 0)));
    let high = slurm.submit(FakeJob {
        req_nodes: vec!["n1".into()],
        ..big("high")
    });
    slurm.tick(101);
    assert_eq!(
        slurm.events(),
        [FakeEvent::Grace {
            job: victim,
            nodes: vec!["n1".into()]
        }]
    );
    let job = slurm.job(victim).unwrap().unwrap();
    assert!(job.brief.in_grace() && job.brief.end_time == Some(161));
    assert!(
        slurm
            .update_job(
                victim,
                &JobUpdate {
                    time_limit_min: Some(5),
                    ..JobUpdate::default()
                }
            )
            .is_err(),
        "no new limit within grace"
    );

    slurm.create_reservation(&spec("vm-1", ReservationNodes::Count(1))).unwrap();
    let made = slurm.reservation("vm-1").unwrap().unwrap();
    assert_eq!(made.nodes, ["n2"]);
    slurm
        .create_reservation(&spec("vm-1", ReservationNodes::Count(1)))
        .expect("a second time it changes nothing");
    assert_eq!(slurm.reservation("vm-1").unwrap(), Some(made));
    assert!(
        slurm
            .create_reservation(&spec("vm-2", ReservationNodes::Count(1)))
            .unwrap_err()
            .is_busy()
    );

    slurm.requeuehold(&[victim]).unwrap();
    assert_eq!(
        slurm.events(),
        [FakeEvent::Ending {
            job: victim,
            nodes: vec!["n1".into()],
            next: JobState::Pending
        }]
    );
    let steer = JobUpdate {
        reservation: Some(Some("vm-1".into())),
        start_now: true,
        time_limit_min: Some(30),
        ..JobUpdate::default()
    };
    slurm.tick(102);
    assert_eq!(
        started(&slurm, high),
        None,
        "the node is not given away before the epilog has returned"
    );
    slurm.epilog_done(victim, "n1");
    slurm.tick(103);
    assert!(started(&slurm, high).is_some());
    slurm.requeuehold(&[victim]).expect("a second time it changes nothing");
    slurm.update_job(victim, &steer).unwrap();
    slurm.tick(104);
    assert_eq!(started(&slurm, victim), None, "held");
    slurm.release(&[victim]).unwrap();
    slurm.tick(105);
    assert_eq!(started(&slurm, victim), Some((vec!["n2".to_owned()], 1)));
    assert!(slurm.delete_reservation("vm-1").is_err(), "in use");
    slurm
        .update_job(
            victim,
            &JobUpdate {
                reservation: Some(None),
                ..JobUpdate::default()
            },
        )
        .unwrap();
    assert_eq!(
        (slurm.delete_reservation("vm-1").unwrap(), slurm.delete_reservation("vm-1").unwrap()),
        (true, false)
    );
    assert_eq!(slurm.breach(), None);
}

#[test]
fn grace_that_runs_out_requeues_and_the_job_waits_out_the_delay() {
    let slurm = FakeSlurm::with_nodes(1);
    let victim = slurm.submit(big("low"));
    slurm.tick(0);
    let high = slurm.submit(big("high"));
    slurm.tick(1);
    slurm.tick(60);
    assert_eq!(slurm.job(victim).unwrap().unwrap().brief.state, JobState::Running);
    slurm.tick(61);
    assert_eq!(slurm.job(victim).unwrap().unwrap().brief.state, JobState::Completing);
    slurm.epilog_done(victim, "n1");
    slurm.tick(62);
    let _ = slurm.events();
    slurm.exited(high, 0);
    slurm.epilog_done(high, "n1");
    slurm.tick(63);
    assert_eq!(started(&slurm, victim), None);
    slurm.tick(75);
    assert_eq!(started(&slurm, victim), Some((vec!["n1".to_owned()], 1)));
}

#[test]
fn a_lost_answer_leaves_the_order_carried_out() {
    let slurm = FakeSlurm::with_nodes(1);
    let job = slurm.submit(FakeJob::default());
    slurm.tick(0);
    let error = SlurmError::Timeout {
        program: "scontrol",
        after: std::time::Duration::from_secs(15),
    };
    slurm.inject(Fault {
        op: FakeOp::RequeueHold,
        error: error.clone(),
        carried_out: true,
        times: 1,
    });
    assert_eq!(slurm.requeuehold(&[job]), Err(error));
    assert_eq!(slurm.job(job).unwrap().unwrap().brief.state, JobState::Completing);
    slurm.set_unreachable(true);
    assert!(slurm.ping().unwrap_err().is_transient());
}

#[test]
fn a_node_without_the_feature_gets_no_new_job_and_a_reconfigure_gives_the_feature_back() {
    let slurm = FakeSlurm::with_nodes(1);
    slurm.set_active_features(&["n1".into()], &[]).unwrap();
    let job = slurm.submit(FakeJob::default());
    slurm.tick(0);
    assert_eq!(started(&slurm, job), None);
    assert!(slurm.set_active_features(&["n1".into()], &["nosuch".into()]).is_err());
    slurm.reconfigure();
    slurm.tick(1);
    assert!(started(&slurm, job).is_some());
    slurm.set_up("n1", false);
    assert_eq!(slurm.job(job).unwrap().unwrap().brief.state, JobState::Pending);
}

#[test]
fn an_exit_within_grace_is_a_requeue_on_new_releases_and_an_end_on_old_ones() {
    for (new, expected) in [(true, JobState::Pending), (false, JobState::Completed)] {
        let slurm = FakeSlurm::with_nodes(1);
        slurm.set_requeues_early_exit(new);
        let victim = slurm.submit(big("low"));
        slurm.tick(0);
        slurm.submit(big("high"));
        slurm.tick(1);
        slurm.exited(victim, 0);
        slurm.epilog_done(victim, "n1");
        assert_eq!(slurm.job(victim).unwrap().unwrap().brief.state, expected);
    }
}
