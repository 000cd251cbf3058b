//! The parsers and the classification of errors, held against what the three Debian releases of Slurm really printed (`tests/data/slurm/`).

use super::error::classify;
use super::*;
use std::collections::HashMap;

const RELEASES: [(&str, &str); 3] = [
    ("22.05", include_str!("../../../tests/data/slurm/22.05.txt")),
    ("24.11", include_str!("../../../tests/data/slurm/24.11.txt")),
    ("26.05", include_str!("../../../tests/data/slurm/26.05.txt")),
];

#[derive(Debug, Default, Clone)]
struct Sample {
    code: i32,
    out: String,
    err: String,
}

impl Sample {
    fn error(&self) -> SlurmError {
        assert_ne!(self.code, 0, "{self:?}");
        classify(&self.err, &self.out, Some(self.code))
    }
}

/// The recorded sessions, by release; `get` panics with both names if one is missing.
struct Samples {
    release: &'static str,
    all: HashMap<String, Sample>,
}

impl Samples {
    fn get(&self, name: &str) -> &Sample {
        self.all.get(name).unwrap_or_else(|| panic!("no sample {name} of {}", self.release))
    }

    fn out(&self, name: &str) -> &str {
        &self.get(name).out
    }

    /// The job as `SlurmCommands::job` would put it together.
    fn job(&self, name: &str, details: &str) -> Result<JobInfo, SlurmError> {
        let mut jobs = parse::squeue(self.out(&format!("squeue_{name}"))).expect("squeue");
        let mut job = jobs.remove(0);
        parse::add_details(&mut job, self.out(details))?;
        Ok(job)
    }
}

fn samples() -> impl Iterator<Item = Samples> {
    RELEASES.iter().map(|(release, text)| {
        let mut all: HashMap<String, Sample> = HashMap::new();
        let (mut name, mut in_err) = (String::new(), false);
        for line in text.lines() {
            if let Some(head) = line.strip_prefix("=== ") {
                let (n, code) = head.rsplit_once(' ').expect("name and status");
                name = n.to_owned();
                all.entry(name.clone()).or_default().code = code.parse().expect("status");
            } else if line == "--- out" || line == "--- err" {
                in_err = line == "--- err";
            } else {
                let sample = all.get_mut(&name).expect("a header first");
                let to = if in_err { &mut sample.err } else { &mut sample.out };
                // Shown as symbols in the files.
                to.push_str(&line.replace('␟', "\x1f").replace('␞', "\x1e"));
                to.push('\n');
            }
        }
        Samples { release, all }
    })
}

#[test]
fn generic_resources_that_a_job_was_given_are_read() {
    for s in samples() {
        let task = s.out("job_array_task");
        let mut job = parse::squeue(s.out("squeue_array_task")).unwrap().remove(0);
        parse::add_details(&mut job, task).unwrap();
        assert_eq!(job.gres, [] as [String; 0], "{}", s.release);
        let with = task.replacen(" GRES=", " GRES=gpu:2(IDX:0-1)", 1);
        parse::add_details(&mut job, &with).unwrap();
        assert_eq!(job.gres, ["gpu:2(IDX:0-1)"], "{}", s.release);
    }
}

#[test]
fn a_running_job_is_read_in_full() {
    for s in samples() {
        let job = s.job("running", "job_running").unwrap();
        assert_eq!(job.brief.state, JobState::Running, "{}", s.release);
        assert_eq!(
            (job.brief.user.as_str(), job.brief.uid, job.gid, job.group.as_str()),
            ("alice", 2001, 2001, "alice")
        );
        assert_eq!(
            (job.brief.nodes.as_slice(), job.brief.batch_host.as_deref()),
            (["n1".to_owned()].as_slice(), Some("n1"))
        );
        assert_eq!(
            job.allocs,
            [NodeAlloc {
                node: "n1".into(),
                cpus: vec![1, 3],
                mem_mib: 200
            }]
        );
        assert_eq!(
            (job.brief.time_limit_min, job.brief.req_nodes.as_slice()),
            (Some(26 * 60), ["n1".to_owned()].as_slice())
        );
        assert_eq!(job.brief.features.as_deref(), Some("vm&fast"));
        assert_eq!((job.brief.batch, job.brief.requeue, job.brief.restarts), (true, true, 0));
        assert_eq!(job.brief.end_time.unwrap() - job.brief.start_time.unwrap(), 26 * 3600);
        assert_eq!(
            (job.brief.preempt_time, job.brief.reservation.as_deref(), job.brief.array.is_none()),
            (None, None, true)
        );
        assert_eq!(
            (job.user_text.work_dir.as_deref(), job.user_text.comment.as_deref()),
            (Some("/home/alice"), None)
        );
        assert_eq!(
            job.user_text.std_out.as_deref(),
            Some(format!("/home/alice/{}.out", job.brief.id).as_str())
        );
        assert_eq!(
            s.job("commented", "job_commented").unwrap().user_text.comment.as_deref(),
            Some("two words a=b")
        );
    }
}

#[test]
fn each_node_of_a_job_has_its_own_cpus_and_memory() {
    for s in samples() {
        let job = s.job("twonodes", "job_twonodes").unwrap();
        assert_eq!((job.brief.nodes.len(), job.num_nodes, job.num_cpus), (2, 2, 5), "{}", s.release);
        assert_eq!(
            job.allocs.iter().map(|a| (a.node.as_str(), a.mem_mib)).collect::<Vec<_>>(),
            [("n1", 500), ("n2", 500)]
        );
        assert_eq!(job.allocs.iter().map(|a| a.cpus.len()).sum::<usize>(), 5);
    }
}

#[test]
fn waiting_jobs_have_no_nodes_and_held_ones_say_so() {
    for s in samples() {
        let job = s.job("pending", "job_pending").unwrap();
        assert_eq!(
            (job.brief.state.clone(), job.brief.nodes.len(), job.brief.batch_host.as_deref()),
            (JobState::Pending, 0, None),
            "{}",
            s.release
        );
        assert_eq!((job.brief.is_held(), job.brief.time_limit_min, job.allocs.len()), (false, None, 0));
        assert!(s.job("held", "job_held").unwrap().brief.is_held());
    }
}

#[test]
fn the_way_of_a_preempted_job_is_visible_at_each_step() {
    for s in samples() {
        let grace = s.job("grace", "job_grace").unwrap().brief;
        assert!(grace.in_grace(), "{}: {grace:?}", s.release);
        assert!(
            (118..=122).contains(&(grace.end_time.unwrap() - grace.preempt_time.unwrap())),
            "GraceTime is 120 s"
        );
        let waits = s.job("requeuehold", "job_requeuehold").unwrap().brief;
        assert_eq!(
            (waits.state.clone(), waits.is_held(), waits.restarts, waits.preempt_time),
            (JobState::Pending, true, 1, None)
        );
        let steered = s.job("steered", "job_steered").unwrap();
        assert_eq!(
            (steered.brief.reservation.as_deref(), steered.brief.time_limit_min),
            (Some(format!("vmmig_{}", waits.id).as_str()), Some(30))
        );
        let landed = s.job("landed", "job_landed").unwrap();
        assert_eq!(
            (landed.brief.id, landed.brief.state.clone(), landed.brief.nodes.as_slice()),
            (grace.id, JobState::Running, ["n2".to_owned()].as_slice())
        );
        assert_eq!((landed.allocs[0].cpus.len(), landed.brief.restarts), (4, 1));
        assert_eq!(s.job("cleared", "job_cleared").unwrap().brief.reservation, None);
        let excluded = s.job("excluded", "job_excluded").unwrap();
        assert_eq!(
            (excluded.brief.req_nodes, excluded.exclude_nodes),
            (vec!["n2".to_owned()], vec!["n1".to_owned()])
        );
        let unexcluded = s.job("unexcluded", "job_unexcluded").unwrap();
        assert!(unexcluded.brief.req_nodes.is_empty() && unexcluded.exclude_nodes.is_empty());
        assert_eq!(s.job("refeatured", "job_refeatured").unwrap().brief.features.as_deref(), Some("vm"));
    }
}

#[test]
fn ends_have_their_exit_codes() {
    for s in samples() {
        let exit = |name: &str| {
            let job = parse::squeue(s.out(&format!("squeue_{name}"))).unwrap().remove(0);
            (job.brief.state, job.exit)
        };
        assert_eq!(exit("failed"), (JobState::Failed, Some((3, 0))), "{}", s.release);
        assert_eq!(exit("completed"), (JobState::Completed, Some((0, 0))));
        assert_eq!(exit("cancelled"), (JobState::Cancelled, Some((0, 15))));
    }
}

#[test]
fn the_right_part_of_an_array_and_of_a_heterogeneous_job_is_picked() {
    for s in samples() {
        let text = s.out("squeue_array");
        let waiting = parse::squeue(text).unwrap().remove(0);
        let task = parse::squeue(s.out("squeue_array_task")).unwrap().remove(0);
        let (array, _) = task.brief.array.clone().unwrap();
        assert_eq!(
            (array, waiting.brief.id),
            (array, array),
            "{}: the part not yet split off has the array's number",
            s.release
        );
        let mut picked = parse::pick(text, task.brief.id).unwrap().unwrap();
        assert_eq!((picked.brief.id, parse::exact_name(&picked)), (task.brief.id, format!("{array}_1")));
        parse::add_details(&mut picked, s.out("job_array_task")).unwrap();
        assert_eq!(picked.allocs.len(), 1);
        assert!(
            parse::add_details(&mut picked, s.out("job_array")).is_err(),
            "several records are not guessed among"
        );
        assert_eq!(parse::pick(text, 4711).unwrap(), None);

        let leader = parse::squeue(s.out("squeue_het")).unwrap().remove(0).brief.id;
        let mut second = parse::pick(s.out("squeue_het"), leader + 1).unwrap().unwrap();
        assert_eq!(
            (second.brief.het, parse::exact_name(&second)),
            (Some((leader, 1)), format!("{leader}+1"))
        );
        parse::add_details(&mut second, s.out("job_het_one")).unwrap();
        assert_eq!(second.allocs[0].node, "n2");
    }
}

#[test]
fn a_job_whose_name_and_comment_forge_records_is_not_believed() {
    for s in samples() {
        let text = s.out("squeue_forged");
        let job = parse::squeue(text).unwrap().remove(0);
        assert_eq!((job.brief.uid, job.brief.user.as_str()), (2001, "alice"), "{}", s.release);
        assert!(s.out("job_forged").contains("UserId=root(0)"), "the sample is the attack");
        assert!(matches!(s.job("forged", "job_forged"), Err(SlurmError::Parse { .. })));
        assert!(parse::briefs(s.out("squeue_forged_all")).unwrap().iter().all(|j| j.uid == 2001));
    }
    let real = "JobId=9 JobName=x Nodes=n1 CPU_IDs=0-63 Mem=9 GRES= UserId=a(1) Nodes=n1 CPU_IDs=1 Mem=100 GRES= WorkDir=/ StdErr= StdIn= StdOut=/x";
    let mut job = samples().next().unwrap().job("running", "job_running").unwrap();
    job.brief.id = 9;
    assert!(parse::add_details(&mut job, real).is_err(), "a second group for the same node");
    assert!(
        parse::add_details(&mut job, &real.replacen("Nodes=n1", "Nodes=n7", 1)).is_err(),
        "a group for another node"
    );
}

#[test]
fn of_many_jobs_one_whose_record_somebody_forges_is_left_out() {
    for s in samples() {
        let (squeue, details) = (s.out("squeue_running"), s.out("job_running"));
        let job = s.job("running", "job_running").unwrap();
        let id = job.brief.id;
        let others = details.replacen(&format!("JobId={id} "), "JobId=4000000 ", 1);
        let many = format!("{others}\n{details}");
        assert_eq!(parse::several(squeue, &many, &[id]).unwrap(), [job], "{}", s.release);
        // Another job's name may have a line break in it, and go on like a record.
        let forged = format!("{others}\nJobId={id} JobName=x UserId=root(0)\n{details}");
        assert_eq!(parse::several(squeue, &forged, &[id]).unwrap(), []);
        // Nobody can take the true one away; where it is missing, the job is asked for alone.
        assert_eq!(parse::several(squeue, &others, &[id]).unwrap(), []);
        let attack = parse::squeue(s.out("squeue_forged")).unwrap().remove(0).brief.id;
        assert_eq!(parse::several(s.out("squeue_forged"), s.out("job_forged"), &[attack]).unwrap(), []);
    }
}

#[test]
fn jobs_that_cannot_be_requeued_are_told_apart() {
    for s in samples() {
        let job = s.job("interactive", "job_interactive").unwrap().brief;
        assert_eq!(
            (job.batch, job.batch_host, job.state),
            (false, None, JobState::Running),
            "{}",
            s.release
        );
        assert!(s.get("requeue_interactive").error().is_not_a_batch_job());
        assert!(s.get("requeuehold_interactive").error().is_not_a_batch_job());
    }
}

#[test]
fn nodes_show_their_state_features_and_room() {
    for s in samples() {
        let nodes = parse_admin::nodes(s.out("nodes_mixed")).unwrap();
        assert_eq!(
            nodes.iter().map(|n| n.name.as_str()).collect::<Vec<_>>(),
            ["n1", "n2"],
            "{}",
            s.release
        );
        let n1 = &nodes[0];
        assert_eq!(
            (n1.cpus_alloc, n1.cpus_total, n1.mem_alloc_mib, n1.mem_total_mib),
            (4, 4, 400, 4000)
        );
        assert_eq!(
            (n1.active_features.join("+"), n1.partitions.join("+"), n1.address.as_str()),
            ("vm+fast".into(), "low+high".into(), "10.99.0.1")
        );
        assert!(n1.is_usable() && nodes[1].is_usable() && n1.reason.is_none());

        let features = parse_admin::nodes(s.out("nodes_features_none")).unwrap();
        assert_eq!(
            (features[0].active_features.join(","), features[1].active_features.len()),
            ("fast".into(), 0)
        );
        assert_eq!(features[1].available_features, ["vm"]);

        let ill = parse_admin::nodes(s.out("nodes_drained")).unwrap();
        assert!(ill[0].is_draining() && !ill[0].is_usable() && !ill[1].is_usable());
        assert!(
            ill[0].reason.as_deref().is_some_and(|r| r.starts_with("disk is bad = x [root@")),
            "{:?}",
            ill[0].reason
        );
    }
}

#[test]
fn reservations_partitions_and_the_configuration_are_read() {
    for s in samples() {
        let all = parse_admin::reservations(s.out("resv_show_all")).unwrap();
        let (counted, named) = (&all[0], &all[1]);
        assert_eq!(
            (counted.nodes.join(","), counted.users.join(","), counted.active),
            ("n2".into(), "alice".into(), true),
            "{}",
            s.release
        );
        assert_eq!(
            (counted.partition.as_deref(), counted.features.as_deref(), counted.flags.len()),
            (Some("low"), Some("vm"), 0)
        );
        assert_eq!(
            (named.nodes.join(","), named.flags.contains(&"IGNORE_JOBS".to_owned())),
            ("n1".into(), true)
        );
        assert!(parse_admin::reservations(s.out("resv_none")).unwrap().is_empty());

        let parts = parse_admin::partitions(s.out("partitions")).unwrap();
        let low = PartitionInfo {
            name: "low".into(),
            preempt_mode: "REQUEUE".into(),
            grace_s: 120,
            priority_tier: 1,
            nodes: vec!["n1".into(), "n2".into()],
            up: true,
            is_default: true,
        };
        assert_eq!(
            (parts[0].clone(), parts[1].preempt_mode.as_str(), parts[1].priority_tier),
            (low, "OFF", 10)
        );

        let config = parse_admin::config(s.out("config")).unwrap();
        assert!(config.version.starts_with(s.release));
        assert_eq!(
            (config.cluster.as_str(), config.slurm_user.as_str(), config.slurm_uid),
            ("lab", "root", 0)
        );
        assert_eq!(
            (config.preempt_mode.as_str(), config.preempt_type.as_str(), config.preempt_exempt_s),
            ("REQUEUE", "preempt/partition_prio", 0)
        );
        assert_eq!((config.job_requeue, config.kill_wait_s, config.multiple_slurmd), (true, 5, true));
        assert_eq!(
            (config.prolog_flags.join(","), config.auth_info.as_deref()),
            ("Alloc".into(), Some("cred_expire=10"))
        );
        assert_eq!(config.release().map(|(a, b)| format!("{a}.{b:02}")).as_deref(), Some(s.release));
    }
}

#[test]
fn messages_are_told_apart_by_what_to_do_about_them() {
    for s in samples() {
        for name in [
            "down_squeue",
            "down_show",
            "down_node",
            "down_update",
            "down_requeue",
            "down_resv",
            "down_delete",
            "down_cancel",
            "nomunge_squeue",
            "badconf",
        ] {
            assert!(
                matches!(s.get(name).error(), SlurmError::Unreachable { .. }),
                "{} {name}: {:?}",
                s.release,
                s.get(name)
            );
        }
        for name in [
            "nojob_show",
            "nojob_squeue",
            "nojob_requeue",
            "nojob_requeuehold",
            "nojob_update",
            "nojob_release",
        ] {
            assert_eq!(s.get(name).error(), SlurmError::NoSuchJob, "{} {name}", s.release);
        }
        for name in ["denied_requeue", "denied_node"] {
            assert!(matches!(s.get(name).error(), SlurmError::Denied { .. }), "{} {name}", s.release);
        }
        for name in [
            "update_bad_feature",
            "resv_bad_node",
            "resv_bad_user",
            "resv_bad_part",
            "node_features_bad",
            "node_unknown",
            "upd_badresv",
            "denied_resv",
        ] {
            assert!(matches!(s.get(name).error(), SlurmError::Refused { .. }), "{} {name}", s.release);
        }
        assert!(s.get("resv_busy").error().is_busy());
        assert!(s.get("resv_delete_absent").error().is_no_such_reservation());
        assert!(s.get("update_finished").error().is_already_finished());
        assert!(s.get("hold_finished").error().is_already_finished());
    }
}

#[test]
fn answers_that_are_not_understood_are_errors() {
    let good = samples().next().unwrap().out("squeue_running").to_owned();
    for bad in [
        "garbage",
        "1|2|3",
        &good.replacen("2001", "alice", 1),
        &good[..good.len() / 2],
        &good.replace("n1\x1fn1", "n1\x1fn[1-"),
    ] {
        assert!(matches!(parse::briefs(bad), Err(SlurmError::Parse { .. })), "{bad}");
    }
    let odd = good.replacen("None", "a plugin said: |\n\u{1e}no", 1);
    assert_eq!(
        parse::briefs(&odd).unwrap()[0].reason,
        "a plugin said: |\n\u{1e}no",
        "a reason moves nothing"
    );
    assert!(parse::briefs("").unwrap().is_empty());
    assert!(parse_admin::nodes("NodeName=n1 State=IDLE\n").is_err());
    assert!(parse_admin::config("ClusterName = x\n").is_err());
}

#[test]
fn the_last_task_of_an_array_is_named_by_its_index_and_not_as_the_whole_array() {
    let text = "12 12 3 RUNNING\n13 12 1 COMPLETING\n14 14 N/A PENDING\n";
    let short = |id| parse::short(text, id).unwrap();
    assert_eq!(short(12), Some(("12_3".into(), JobState::Running)));
    assert_eq!(short(13), Some(("12_1".into(), JobState::Completing)));
    assert_eq!(short(14), Some(("14".into(), JobState::Pending)));
    assert_eq!(short(15), None);
    assert!(parse::short("12 RUNNING", 12).is_err());
}

/// Run it on the controller of a test cluster with a job of alice's that is in its grace time and an idle node with the feature `vm`.
#[test]
fn the_commands_steer_a_preempted_job_where_a_cluster_runs() {
    if std::env::var_os("SLURM_VM_TEST_SLURM").is_none() {
        return println!("no cluster given (SLURM_VM_TEST_SLURM): not tested");
    }
    let slurm = SlurmCommands::new(SlurmSettings::default());
    let until = |what: &str, is: &dyn Fn() -> bool| {
        let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while !is() {
            assert!(std::time::Instant::now() < end, "{what}");
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
    };
    slurm.ping().unwrap();
    let config = slurm.config().unwrap();
    println!("{config:?}\n{:?}", slurm.partitions().unwrap());
    let victim = slurm
        .jobs_poll()
        .unwrap()
        .into_iter()
        .find(JobBrief::in_grace)
        .expect("a job in grace");
    let before = slurm.job(victim.id).unwrap().unwrap();
    assert_eq!(before.allocs.len(), 1);
    let spec = ReservationSpec {
        name: format!("vm-{}", victim.id),
        nodes: ReservationNodes::Count(1),
        partition: Some(victim.partition.clone()),
        features: Some("vm".into()),
        users: vec![victim.user.clone()],
    };
    slurm.create_reservation(&spec).unwrap();
    let made = slurm.reservation(&spec.name).unwrap().unwrap();
    slurm.create_reservation(&spec).expect("a second time it changes nothing");
    assert_eq!(slurm.reservation(&spec.name).unwrap().as_ref(), Some(&made));
    assert!(
        slurm
            .create_reservation(&ReservationSpec {
                name: "vm-x".into(),
                ..spec.clone()
            })
            .unwrap_err()
            .is_busy()
    );
    let limit = JobUpdate {
        time_limit_min: Some(7),
        ..JobUpdate::default()
    };
    assert!(slurm.update_job(victim.id, &limit).is_err(), "no new limit within grace");
    slurm.requeuehold(&[victim.id]).unwrap();
    let now = || slurm.job(victim.id).unwrap().unwrap();
    until("back in the queue", &|| now().brief.state == JobState::Pending);
    assert!(now().brief.is_held());
    slurm.requeuehold(&[victim.id]).expect("a second time it changes nothing");
    let steer = JobUpdate {
        reservation: Some(Some(spec.name.clone())),
        start_now: true,
        time_limit_min: Some(7),
        comment: Some("moved by a test".into()),
        ..JobUpdate::default()
    };
    slurm.update_job(victim.id, &steer).unwrap();
    slurm.release(&[victim.id]).unwrap();
    until("runs on the reserved node", &|| now().brief.state == JobState::Running);
    let after = now();
    assert_eq!(
        (&after.brief.nodes, after.brief.restarts, after.brief.time_limit_min),
        (&made.nodes, victim.restarts + 1, Some(7))
    );
    assert_eq!(after.allocs[0].cpus.len(), before.allocs[0].cpus.len());
    assert_eq!(after.user_text.comment.as_deref(), Some("moved by a test"));
    slurm
        .update_job(
            victim.id,
            &JobUpdate {
                reservation: Some(None),
                ..JobUpdate::default()
            },
        )
        .unwrap();
    assert!(slurm.delete_reservation(&spec.name).unwrap() && !slurm.delete_reservation(&spec.name).unwrap());
    assert!(slurm.reservations().unwrap().is_empty());

    let named = ReservationSpec {
        name: "vm-n".into(),
        nodes: ReservationNodes::Named(vec!["n1".into()]),
        partition: None,
        features: None,
        users: spec.users,
    };
    slurm.create_reservation(&named).unwrap();
    assert_eq!(slurm.reservation("vm-n").unwrap().unwrap().nodes, ["n1"]);
    assert!(slurm.delete_reservation("vm-n").unwrap());
    let features = || slurm.nodes().unwrap().into_iter().find(|n| n.name == "n1").unwrap().active_features;
    slurm.set_active_features(&["n1".into()], &[]).unwrap();
    assert!(features().is_empty());
    slurm.set_active_features(&["n1".into()], &["vm".into()]).unwrap();
    assert_eq!(features(), ["vm"]);
    assert!(slurm.set_active_features(&["n1".into()], &["nosuch".into()]).is_err());
    assert!(slurm.set_active_features(&["n1 State=DOWN".into()], &[]).is_err(), "not a name");

    assert_eq!(slurm.job(4_000_000).unwrap(), None);
    assert_eq!(slurm.requeue(&[4_000_000]), Err(SlurmError::NoSuchJob));
    slurm.cancel(4_000_000, None).unwrap();
    slurm.cancel(victim.id, Some(18)).unwrap();
    slurm.requeue(&[victim.id]).unwrap();
    until("back in the queue again", &|| now().brief.state == JobState::Pending);
    let nodes = JobUpdate {
        req_nodes: Some(vec!["n2".into()]),
        exclude_nodes: Some(vec!["n1".into()]),
        ..JobUpdate::default()
    };
    slurm.update_job(victim.id, &nodes).unwrap();
    assert_eq!(now().brief.req_nodes, ["n2"]);
    let clear = JobUpdate {
        req_nodes: Some(vec![]),
        exclude_nodes: Some(vec![]),
        features: Some("vm".into()),
        ..JobUpdate::default()
    };
    slurm.update_job(victim.id, &clear).unwrap();
    assert_eq!((now().brief.req_nodes.len(), now().brief.features.as_deref()), (0, Some("vm")));
    slurm.hold(&[victim.id]).unwrap();
    assert!(now().brief.is_held());
    slurm.cancel(victim.id, None).unwrap();
    until("cancelled", &|| now().brief.state == JobState::Cancelled);
    slurm.cancel(victim.id, None).unwrap();
    assert!(slurm.update_job(victim.id, &limit).unwrap_err().is_already_finished());
}
