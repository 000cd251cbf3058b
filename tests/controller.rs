//! The real controller against the modelled Slurm, with agents that the test plays.
use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex},
    thread,
    time::{Duration, Instant},
};

use slurm_vm::{
    cluster::{OpenEnd, PeerReply, PeerRequest, Peers},
    config::Config,
    controller::Controller,
    effects::{SystemClock, SystemFiles, World, disks::QemuImg, store::DirStore},
    hypervisor::fake,
    slurm::{FakeEvent, FakeJob, FakeOp, FakeSlurm, Fault, JobInfo, JobState, QosInfo, Slurm, SlurmError},
};
use slurm_vm_api::{
    query::{Ask, NodeHealth, Totals, VmView},
    spec::PreemptWay,
};

const DEADLINE: Duration = Duration::from_secs(30);

/// The ledger of a drain's move from n1 to n2 that was copying.
fn write_ledger(state: &Path, job: u32) {
    std::fs::create_dir_all(state.join("moves")).unwrap();
    let ledger = format!(
        r#"{{"v":1,"job":{job},"user":"alice","cause":"drain","step":"planned","from":"n1","to":"n2","to_asked":false,"held":"n2",
        "partition":"low","ways":["live","save","requeue"],"deadline_ms":null,"limit_min":null,"left_min":null,"restarts":0,"notes":[],"done":null,"moving":true}}"#
    );
    std::fs::write(state.join("moves").join(format!("{job}.json")), ledger).unwrap();
}

/// Agents that are well, with the VMs that the test gives them.
#[derive(Debug, Default)]
struct Agents {
    vms: Mutex<BTreeMap<String, Vec<VmView>>>,
    /// Nodes whose answer to `Grace` does not come.
    silent: Mutex<BTreeSet<String>>,
    spoken: Condvar,
    asked: Mutex<Vec<(String, u32)>>,
    /// Moves are played: job and destination, in the order in which they were asked for.
    moved: Mutex<Vec<(u32, String)>>,
    live: bool,
    /// How long each copy takes.
    copy_takes: Duration,
    /// What nodes say of a VM whose move's answer was lost, one word at a time; the last one again and again.
    states: Mutex<Vec<&'static str>>,
    /// All else that was asked for.
    others: Mutex<Vec<String>>,
}

impl Peers for Agents {
    fn request(&self, node: &str, _address: &str, request: &PeerRequest, _deadline: Duration) -> Result<PeerReply, String> {
        match request {
            PeerRequest::Status => Ok(PeerReply::Status {
                health: NodeHealth {
                    node: node.into(),
                    healthy: true,
                    ..NodeHealth::default()
                },
                vms: self.vms.lock().unwrap().get(node).cloned().unwrap_or_default(),
                totals: Totals::default(),
            }),
            PeerRequest::Grace { job, .. } => {
                self.asked.lock().unwrap().push((node.to_owned(), *job));
                let silent = self.silent.lock().unwrap();
                drop(self.spoken.wait_while(silent, |s| s.contains(node)).unwrap());
                Ok(PeerReply::Ways {
                    ways: vec![if self.live { PreemptWay::Live } else { PreemptWay::Requeue }],
                    reserve_ms: 0,
                })
            }
            PeerRequest::MoveOut { job, to, .. } if self.live => {
                self.moved.lock().unwrap().push((*job, to.clone()));
                thread::sleep(self.copy_takes);
                Ok(PeerReply::Moved(Box::default()))
            }
            PeerRequest::Show { job } => {
                let mut states = self.states.lock().unwrap();
                if states.is_empty() {
                    return Err("not played".into());
                }
                let state = if states.len() > 1 { states.remove(0) } else { states[0] };
                Ok(PeerReply::Vm(Some(Box::new(VmView {
                    job: *job,
                    state: state.into(),
                    ..VmView::default()
                }))))
            }
            other => {
                self.others.lock().unwrap().push(format!("{other:?}"));
                Err("not played".into())
            }
        }
    }

    fn token(&self) -> Result<String, String> {
        Err("not played".into())
    }

    fn open_relay(&self, _: &str, _: &str, _: &str, _: &str) -> Result<Box<dyn OpenEnd>, String> {
        Err("not played".into())
    }

    fn admit(&self, _: &str, _: &str, _: &str, _: PathBuf) -> Result<Box<dyn OpenEnd>, String> {
        Err("not played".into())
    }
}

struct Stage {
    slurm: Arc<FakeSlurm>,
    agents: Arc<Agents>,
    now: i64,
}

impl Stage {
    fn new(nodes: u32) -> Self {
        let slurm = Arc::new(FakeSlurm::with_nodes(nodes));
        let now = SystemClockSeconds::now();
        slurm.tick(now);
        Self {
            slurm,
            agents: Arc::default(),
            now,
        }
    }

    /// Agents that carry out live moves at once.
    fn with_moves(nodes: u32) -> Self {
        Self {
            agents: Arc::new(Agents {
                live: true,
                states: Mutex::new(vec!["running"]),
                ..Agents::default()
            }),
            ..Self::new(nodes)
        }
    }

    /// Plays slurmd until `is` says that it is enough: epilogs return at once.
    fn play(&mut self, what: &str, is: impl FnMut(&Self) -> bool) {
        self.play_within(DEADLINE, what, is);
    }

    fn play_within(&mut self, deadline: Duration, what: &str, mut is: impl FnMut(&Self) -> bool) {
        let until = Instant::now() + deadline;
        while !is(self) {
            let jobs = || self.slurm.jobs_poll().map(|all| all.into_iter().take(20).collect::<Vec<_>>());
            assert!(Instant::now() < until, "still waiting for {what}: {:?}", jobs());
            self.slurm.tick(SystemClockSeconds::now());
            for event in self.slurm.events() {
                if let FakeEvent::Ending { job, nodes, .. } = event {
                    for node in nodes {
                        self.slurm.epilog_done(job, &node);
                    }
                }
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// A controller with its state there. It polls until the process ends.
    fn controller(&self, state: &Path) -> Arc<Controller> {
        self.controller_polling(state, 20)
    }

    fn controller_polling(&self, state: &Path, poll_ms: u64) -> Arc<Controller> {
        let mut config = Config::parse("", Path::new("slurm-vm.toml")).unwrap();
        config.state_dir = state.into();
        config.controller.poll_ms = poll_ms;
        let world = World {
            clock: Arc::new(SystemClock),
            store: Arc::new(DirStore::new(state).unwrap()),
            files: Arc::new(SystemFiles),
            disks: Arc::new(QemuImg::default()),
            hypervisor: Arc::new(fake::World::new().node("ctl")),
            slurm: self.slurm.clone(),
            as_user: Arc::new(slurm_vm::effects::MemoryAsUser::default()),
        };
        let controller = Controller::new(Arc::new(config), world, self.agents.clone());
        let running = controller.clone();
        thread::spawn(move || running.run());
        controller
    }

    fn tick(&mut self) {
        self.now += 200;
        self.slurm.tick(self.now);
    }

    fn job(&self, job: u32) -> JobInfo {
        self.slurm.job(job).unwrap().expect("the job")
    }

    fn wait(&self, job: u32, what: &str, is: impl Fn(&JobInfo) -> bool) -> JobInfo {
        let until = Instant::now() + DEADLINE;
        loop {
            let info = self.job(job);
            if is(&info) {
                return info;
            }
            assert!(Instant::now() < until, "still waiting for {what}: {info:?}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Lets the job start, and its shim meet a broken node.
    fn fault(&mut self, job: u32) -> String {
        self.tick();
        let node = self.wait(job, "the job to run", |i| i.brief.state == JobState::Running).brief.nodes[0].clone();
        // The controller has seen it there.
        let polls = self.slurm.calls(FakeOp::Poll);
        let seen = |_: &JobInfo| self.slurm.calls(FakeOp::Poll) > polls + 1;
        self.wait(job, "two polls", seen);
        self.slurm.requeue_special(job).expect("the shim's requeue");
        self.slurm.epilog_done(job, &node);
        node
    }
}

struct SystemClockSeconds;

impl SystemClockSeconds {
    fn now() -> i64 {
        use slurm_vm::effects::Clock;
        i64::try_from(SystemClock.now_ms() / 1000).unwrap()
    }
}

fn released(info: &JobInfo) -> bool {
    info.brief.state == JobState::Pending && !info.brief.is_held()
}

#[test]
fn a_job_that_slurm_holds_for_the_exit_code_of_its_script_is_left_so_and_that_is_remembered() {
    let mut stage = Stage::new(2);
    let state = tempfile::tempdir().unwrap();
    let job = stage.slurm.submit(FakeJob::default());
    stage.controller(state.path());
    stage.tick();
    let node = stage
        .wait(job, "the job to run", |i| i.brief.state == JobState::Running)
        .brief
        .nodes[0]
        .clone();
    let ended = |restarts| VmView {
        job,
        state: "stopped".into(),
        restarts: Some(restarts),
        script_ended: true,
        ..VmView::default()
    };
    stage.agents.vms.lock().unwrap().insert(node.clone(), vec![ended(0)]);
    let polls = |stage: &Stage| {
        let begun = stage.slurm.calls(FakeOp::Poll);
        stage.wait(job, "five polls", |_| stage.slurm.calls(FakeOp::Poll) > begun + 5)
    };
    polls(&stage);
    // RequeueExitHold does what the shim does.
    stage.slurm.requeue_special(job).unwrap();
    stage.slurm.epilog_done(job, &node);
    assert_eq!(polls(&stage).brief.state, JobState::SpecialExit);
    let notes = std::fs::read_to_string(state.path().join("jobs.json")).unwrap();
    assert!(notes.contains("not_a_fault"), "{notes}");
    // What an earlier run of the job left does not excuse a broken node.
    let mut stage = Stage::new(1);
    let state = tempfile::tempdir().unwrap();
    let job = stage.slurm.submit(FakeJob::default());
    stage.controller(state.path());
    stage
        .agents
        .vms
        .lock()
        .unwrap()
        .insert("n1".into(), vec![VmView { job, ..ended(7) }]);
    stage.fault(job);
    stage.wait(job, "the release", released);
}

#[test]
fn three_broken_nodes_in_a_row_leave_a_last_try_and_a_running_program_a_clean_slate() {
    let mut stage = Stage::new(3);
    let state = tempfile::tempdir().unwrap();
    let job = stage.slurm.submit(FakeJob::default());
    stage.controller(state.path());
    for k in 1..=3 {
        let broken = stage.fault(job);
        let info = stage.wait(job, "the release", released);
        assert_eq!(info.exclude_nodes, [broken], "only the last one is kept out");
        assert_eq!(info.brief.requeue, k < 3, "after {k} broken nodes");
    }
    stage.tick();
    let node = stage.wait(job, "the last try", |i| i.brief.state == JobState::Running).brief.nodes[0].clone();
    assert!(
        stage.slurm.requeue_special(job).is_err(),
        "another broken node would have been its end"
    );
    let vm = VmView {
        job,
        state: "running".into(),
        ..VmView::default()
    };
    stage.agents.vms.lock().unwrap().insert(node, vec![vm]);
    stage.wait(job, "Requeue=1", |i| i.brief.requeue);
    stage.agents.vms.lock().unwrap().clear();
    // Slurm's restart count is not what counts.
    for _ in 1..=2 {
        stage.fault(job);
        let info = stage.wait(job, "the release", released);
        assert!(info.brief.requeue, "{} restarts", info.brief.restarts);
    }
}

#[test]
fn a_node_list_that_is_to_be_put_back_outlives_the_controller() {
    let mut stage = Stage::new(2);
    let state = tempfile::tempdir().unwrap();
    let job = stage.slurm.submit(FakeJob::default());
    stage.tick();
    let notes = format!(r#"{{"v": 1, "jobs": {{"{job}": {{"req_nodes": ["n2"]}}}}}}"#);
    std::fs::write(state.path().join("jobs.json"), notes).unwrap();
    stage.controller(state.path());
    stage.wait(job, "the job to run", |i| i.brief.state == JobState::Running);
    stage.slurm.requeuehold(&[job]).unwrap();
    let node = stage.job(job).brief.nodes.first().cloned().unwrap_or_else(|| "n1".into());
    stage.slurm.epilog_done(job, &node);
    stage.wait(job, "the node list", |i| i.brief.req_nodes == ["n2"]);
    let until = Instant::now() + DEADLINE;
    while std::fs::read_to_string(state.path().join("jobs.json")).unwrap().contains("n2") {
        assert!(Instant::now() < until, "the note stays");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_node_that_does_not_answer_holds_up_no_other_jobs_move() {
    let mut stage = Stage::new(2);
    let state = tempfile::tempdir().unwrap();
    let low = || FakeJob {
        cpus_per_node: 4,
        ..FakeJob::default()
    };
    let jobs = [stage.slurm.submit(low()), stage.slurm.submit(low())];
    stage.tick();
    let on: Vec<String> = jobs.iter().map(|j| stage.job(*j).brief.nodes[0].clone()).collect();
    stage.agents.silent.lock().unwrap().insert(on[0].clone());
    stage.controller(state.path());
    stage.slurm.submit(FakeJob {
        partition: "high".into(),
        nodes: 2,
        cpus_per_node: 4,
        ..FakeJob::default()
    });
    stage.now = SystemClockSeconds::now();
    stage.slurm.tick(stage.now + 201);
    let until = Instant::now() + DEADLINE;
    loop {
        let asked = stage.agents.asked.lock().unwrap().clone();
        if asked.iter().any(|(node, _)| *node == on[0]) && asked.iter().any(|(node, _)| *node == on[1]) {
            break;
        }
        assert!(Instant::now() < until, "{asked:?}");
        thread::sleep(Duration::from_millis(5));
    }
    // The job whose node answers goes back into the queue although the other one's is silent.
    stage.wait(jobs[1], "the requeue", |i| i.brief.state != JobState::Running);
    assert_eq!(stage.job(jobs[0]).brief.state, JobState::Running);
    stage.agents.silent.lock().unwrap().clear();
    stage.agents.spoken.notify_all();
    stage.wait(jobs[0], "the requeue", |i| i.brief.state != JobState::Running);
}

/// Two VMs of half a node on each of n1 to n4 of eight nodes, and a preemptor of those four; returns the VMs' jobs and its own.
fn preempted_by_four(stage: &mut Stage, low_qos: Option<&str>, high: FakeJob) -> (Vec<u32>, u32) {
    let mut low = Vec::new();
    for node in ["n1", "n2", "n3", "n4"] {
        for _ in 0..2 {
            low.push(stage.slurm.submit(FakeJob {
                cpus_per_node: 2,
                req_nodes: vec![node.into()],
                qos: low_qos.map(str::to_owned),
                ..FakeJob::default()
            }));
        }
    }
    let started = |s: &Stage, jobs: &[u32]| jobs.iter().all(|j| s.job(*j).brief.state == JobState::Running);
    stage.play("the VMs to run", |s| started(s, &low));
    let high = stage.slurm.submit(FakeJob {
        nodes: 4,
        cpus_per_node: 4,
        features: None,
        req_nodes: ["n1", "n2", "n3", "n4"].map(str::to_owned).into(),
        ..high
    });
    (low, high)
}

fn each_moved_once_to_a_free_node(stage: &mut Stage, low: &[u32], high: u32) {
    stage.play("the preemptor to run, and the VMs beside it", |s| {
        let runs = |job: u32| s.job(job).brief.state == JobState::Running;
        runs(high) && low.iter().all(|j| runs(*j) && s.job(*j).brief.reservation.is_none())
    });
    let moved = stage.agents.moved.lock().unwrap().clone();
    assert_eq!(moved.len(), low.len(), "{moved:?}");
    for (job, to) in &moved {
        assert!(["n5", "n6", "n7", "n8"].contains(&to.as_str()), "{moved:?}");
        assert_eq!(stage.job(*job).brief.nodes, std::slice::from_ref(to));
        assert_eq!(stage.job(*job).brief.restarts, 1);
    }
    stage.play("no reservation to be left", |s| s.slurm.reservations().unwrap().is_empty());
}

#[test]
fn victims_of_a_preemptor_of_four_nodes_move_once_each() {
    let mut stage = Stage::with_moves(8);
    let state = tempfile::tempdir().unwrap();
    stage.controller(state.path());
    let high = FakeJob {
        partition: "high".into(),
        ..FakeJob::default()
    };
    let (low, high) = preempted_by_four(&mut stage, None, high);
    each_moved_once_to_a_free_node(&mut stage, &low, high);
}

#[test]
fn under_preempt_qos_the_qos_say_for_whom_nodes_are_kept() {
    let mut stage = Stage::with_moves(8);
    let qos = |name: &str, preempts: &[&str]| QosInfo {
        name: name.into(),
        preempts: preempts.iter().map(|q| (*q).to_owned()).collect(),
    };
    stage.slurm.set_preempt_qos(vec![qos("normal", &[]), qos("urgent", &["normal"])]);
    let state = tempfile::tempdir().unwrap();
    stage.controller(state.path());
    // All in one partition: tiers would say nothing.
    let high = FakeJob {
        qos: Some("urgent".into()),
        ..FakeJob::default()
    };
    let (low, high) = preempted_by_four(&mut stage, Some("normal"), high);
    each_moved_once_to_a_free_node(&mut stage, &low, high);
}

#[test]
fn reservations_and_claims_of_an_earlier_life_end() {
    let mut stage = Stage::with_moves(2);
    let state = tempfile::tempdir().unwrap();
    let job = stage.slurm.submit(FakeJob::default());
    stage.play("the job to run", |s| s.job(job).brief.state == JobState::Running);
    let left = slurm_vm::slurm::ReservationSpec {
        name: "vmmig_n2".into(),
        nodes: slurm_vm::slurm::ReservationNodes::Named(vec!["n2".into()]),
        partition: None,
        features: None,
        users: vec!["alice".into()],
    };
    stage.slurm.create_reservation(&left).unwrap();
    let other = slurm_vm::slurm::ReservationSpec {
        name: "maintenance".into(),
        nodes: slurm_vm::slurm::ReservationNodes::Named(vec!["n1".into()]),
        ..left
    };
    stage.slurm.create_reservation(&other).unwrap();
    stage.controller(state.path());
    stage.play("our reservation to be gone", |s| s.slurm.reservation("vmmig_n2").unwrap().is_none());
    assert!(stage.slurm.reservation("maintenance").unwrap().is_some(), "it was not ours");
}

#[test]
fn a_copy_that_is_under_way_when_the_controller_starts_is_waited_for() {
    let mut stage = Stage::with_moves(3);
    *stage.agents.states.lock().unwrap() = vec!["leaving", "leaving", "leaving", "leaving", "gone"];
    let state = tempfile::tempdir().unwrap();
    let job = stage.slurm.submit(FakeJob {
        req_nodes: vec!["n1".into()],
        ..FakeJob::default()
    });
    stage.play("the job to run", |s| s.job(job).brief.state == JobState::Running);
    write_ledger(state.path(), job);
    stage.controller(state.path());
    stage.play("the job on n2", |s| s.job(job).brief.nodes == ["n2"]);
    assert_eq!(stage.agents.moved.lock().unwrap().len(), 0, "no second move");
    let others = stage.agents.others.lock().unwrap().clone();
    assert!(others.iter().all(|o| !o.contains("Save") && !o.contains("Cancel")), "{others:?}");
}

#[test]
fn a_preemption_is_acted_on_though_slurm_did_not_answer_one_question_about_its_job() {
    let mut stage = Stage::with_moves(2);
    let state = tempfile::tempdir().unwrap();
    let on_n1 = |job| FakeJob {
        req_nodes: vec!["n1".into()],
        ..job
    };
    let low = stage.slurm.submit(on_n1(FakeJob {
        cpus_per_node: 4,
        ..FakeJob::default()
    }));
    stage.play("the job to run", |s| s.job(low).brief.state == JobState::Running);
    stage.agents.silent.lock().unwrap().insert("n1".into());
    stage.controller(state.path());
    let high = stage.slurm.submit(on_n1(FakeJob {
        partition: "high".into(),
        cpus_per_node: 4,
        features: None,
        ..FakeJob::default()
    }));
    stage.play("the job's node to be asked for its ways", |s| {
        !s.agents.asked.lock().unwrap().is_empty()
    });
    stage.slurm.inject(Fault {
        op: FakeOp::Job,
        error: SlurmError::Unreachable {
            message: "Socket timed out on send/recv operation".into(),
        },
        carried_out: false,
        times: 1,
    });
    let questions = stage.slurm.calls(FakeOp::Job);
    stage.agents.silent.lock().unwrap().clear();
    stage.agents.spoken.notify_all();
    stage.play("the question", |s| s.slurm.calls(FakeOp::Job) > questions);
    stage.play("the job on n2 and the other on n1", |s| {
        s.job(low).brief.nodes == ["n2"] && s.job(high).brief.nodes == ["n1"]
    });
    assert_eq!(*stage.agents.moved.lock().unwrap(), [(low, "n2".to_owned())]);
}

/// Slurm refuses something so often.
fn refuse(stage: &Stage, op: FakeOp, times: u32) {
    stage.slurm.inject(Fault {
        op,
        error: SlurmError::Refused {
            message: "Requested reservation is in use".into(),
        },
        carried_out: false,
        times,
    });
}

#[test]
fn giving_back_a_place_late_does_not_take_away_the_next_one_of_the_same_job() {
    let mut stage = Stage::with_moves(2);
    stage.agents = Arc::new(Agents {
        live: true,
        copy_takes: Duration::from_secs(2),
        states: Mutex::new(vec!["running"]),
        ..Agents::default()
    });
    let state = tempfile::tempdir().unwrap();
    let job = stage.slurm.submit(FakeJob {
        req_nodes: vec!["n1".into()],
        ..FakeJob::default()
    });
    stage.play("the job to run", |s| s.job(job).brief.state == JobState::Running);
    write_ledger(state.path(), job);
    // The place of the controller's earlier life cannot be given back at once.
    refuse(&stage, FakeOp::DeleteReservation, 4);
    stage.controller(state.path());
    stage.play("the copy to begin", |s| !s.agents.moved.lock().unwrap().is_empty());
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(1500) {
        thread::sleep(Duration::from_millis(20));
        assert!(stage.slurm.reservation("vmmig_n2").unwrap().is_some(), "a VM is being copied there");
    }
    stage.play("the job on n2", |s| s.job(job).brief.nodes == ["n2"]);
    stage.play("the reservation to be gone", |s| s.slurm.reservation("vmmig_n2").unwrap().is_none());
    let others = stage.agents.others.lock().unwrap().clone();
    assert!(others.iter().all(|o| !o.contains("Save") && !o.contains("Release")), "{others:?}");
}

#[test]
fn a_place_that_comes_to_a_later_move_of_the_job_which_wants_none_is_given_back() {
    let mut stage = Stage::new(2);
    let state = tempfile::tempdir().unwrap();
    let on_n1 = |job| FakeJob {
        req_nodes: vec!["n1".into()],
        cpus_per_node: 4,
        ..job
    };
    let low = stage.slurm.submit(on_n1(FakeJob::default()));
    stage.play("the job to run", |s| s.job(low).brief.state == JobState::Running);
    let view = VmView {
        job: low,
        node: "n1".into(),
        state: "running".into(),
        ..VmView::default()
    };
    stage.agents.vms.lock().unwrap().insert("n1".into(), vec![view]);
    let controller = stage.controller(state.path());
    let polls = stage.slurm.calls(FakeOp::Poll);
    stage.play("some polls", |s| s.slurm.calls(FakeOp::Poll) > polls + 10);
    // Where there is room cannot be told for a while.
    refuse(&stage, FakeOp::Reservations, 1_000_000);
    let (asker, ask) = (controller.clone(), Ask::Migrate { job: low, to: None });
    thread::spawn(move || asker.answer(&ask, 0, true, &mut |_| Ok(())).is_ok());
    stage.play("the move by hand", |s| {
        !s.agents.asked.lock().unwrap().is_empty() && controller.cluster().moves.contains_key(&low)
    });
    // Preempted: that move gives way to one which only requeues, and Slurm does not do that at once.
    stage.slurm.inject(Fault {
        op: FakeOp::Requeue,
        error: SlurmError::Unreachable { message: "away".into() },
        carried_out: false,
        times: 1_000_000,
    });
    stage.slurm.submit(on_n1(FakeJob {
        partition: "high".into(),
        features: None,
        ..FakeJob::default()
    }));
    let second = || controller.cluster().moves.get(&low).is_some_and(|m| m.cause == "preemption");
    stage.play("the move of the preemption", |s| second() && s.slurm.calls(FakeOp::Requeue) > 0);
    stage.slurm.heal(FakeOp::Reservations);
    let places = stage.slurm.calls(FakeOp::CreateReservation);
    stage.play("a place", |s| s.slurm.calls(FakeOp::CreateReservation) > places);
    stage.play("the place to be given back", |s| s.slurm.reservation("vmmig_n2").unwrap().is_none());
    assert!(second(), "the move goes on");
}

#[test]
fn a_job_that_was_put_back_by_hand_and_was_not_seen_waiting_has_its_whole_time_again() {
    let mut stage = Stage::new(2);
    let state = tempfile::tempdir().unwrap();
    let job = stage.slurm.submit(FakeJob {
        time_limit_min: Some(60),
        ..FakeJob::default()
    });
    stage.play("the job to run", |s| s.job(job).brief.state == JobState::Running);
    stage.slurm.requeue(&[job]).unwrap();
    stage.play("its next run", |s| {
        s.job(job).brief.state == JobState::Running && s.job(job).brief.restarts == 1
    });
    // The run before was given what a move had left of a day.
    let notes = format!(r#"{{"v":1,"jobs":{{"{job}":{{"time":{{"full_min":1440,"used_s":82800,"set_min":60,"restarts":0}}}}}}}}"#);
    std::fs::write(state.path().join("jobs.json"), notes).unwrap();
    stage.controller(state.path());
    stage.wait(job, "its whole time", |i| i.brief.time_limit_min == Some(1440));
}

/// Commands so far: a job's details are two.
#[cfg(feature = "full")]
fn commands(slurm: &FakeSlurm, polls_of_the_test: u64) -> u64 {
    let all: u64 = FakeOp::ALL.iter().map(|op| slurm.calls(*op)).sum();
    all + slurm.calls(FakeOp::Job) - polls_of_the_test
}

#[cfg(feature = "full")]
#[test]
fn five_hundred_jobs_that_are_preempted_at_once_go_on_by_ten_commands_a_second() {
    const NODES: u32 = 125;
    let mut stage = Stage::with_moves(2 * NODES);
    let names: Vec<String> = (1..=NODES).map(|i| format!("n{i}")).collect();
    let submit = |node: &String| {
        stage.slurm.submit(FakeJob {
            req_nodes: vec![node.clone()],
            ..FakeJob::default()
        })
    };
    let low: Vec<u32> = names.iter().flat_map(|node| [node; 4]).map(submit).collect();
    let mine = std::cell::Cell::new(0);
    let states = |s: &Stage| {
        mine.set(mine.get() + 1);
        let jobs = s.slurm.jobs_poll().unwrap();
        let running = jobs.iter().filter(|j| low.contains(&j.id) && j.state == JobState::Running);
        let all: BTreeMap<u32, (bool, bool, u32)> = running
            .map(|j| (j.id, (j.in_grace(), j.reservation.is_some(), j.restarts)))
            .collect();
        all
    };
    stage.play("the VMs to run", |s| states(s).len() == low.len());
    let state = tempfile::tempdir().unwrap();
    stage.controller_polling(state.path(), 1000);
    let high = stage.slurm.submit(FakeJob {
        partition: "high".into(),
        nodes: NODES,
        cpus_per_node: 4,
        features: None,
        req_nodes: names,
        ..FakeJob::default()
    });
    let no_reservation = |s: &Stage| {
        mine.set(mine.get() + 1);
        s.slurm.reservations().unwrap().is_empty()
    };
    let began = Instant::now();
    let (mut seconds, mut high_at) = (vec![commands(&stage.slurm, mine.get())], None);
    stage.play_within(Duration::from_secs(280), "all VMs to run elsewhere, without a reservation", |s| {
        if began.elapsed() >= Duration::from_secs(1) * u32::try_from(seconds.len()).unwrap() {
            seconds.push(commands(&s.slurm, mine.get()));
            if high_at.is_none() && states(s).values().all(|(_, _, restarts)| *restarts == 1) {
                high_at = Some(began.elapsed());
            }
            return states(s)
                .values()
                .filter(|(_, reserved, restarts)| !reserved && *restarts == 1)
                .count()
                == low.len()
                && no_reservation(s);
        }
        false
    });
    let took = began.elapsed();
    assert_eq!(stage.job(high).brief.state, JobState::Running);
    assert_eq!(stage.agents.moved.lock().unwrap().len(), low.len());
    let all = seconds[seconds.len() - 1] - seconds[0];
    println!(
        "the nodes were left after {high_at:?}, all was over after {took:?}: {all} commands, {} in the first second",
        seconds[1] - seconds[0]
    );
    for (from, began) in seconds.iter().enumerate() {
        for (till, ended) in seconds.iter().enumerate().skip(from + 1) {
            let bound = 50 + 10 * u64::try_from(till - from).unwrap();
            assert!(ended - began <= bound, "seconds {from} to {till}: {seconds:?}");
        }
    }
}
