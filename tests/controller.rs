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
    effects::{Faults, SystemClock, SystemFiles, World, disks::QemuImg, store::DirStore},
    hypervisor::fake,
    slurm::{FakeJob, FakeOp, FakeSlurm, JobInfo, JobState, Slurm},
};
use slurm_vm_api::{
    query::{NodeHealth, Totals, VmView},
    spec::PreemptWay,
};

const DEADLINE: Duration = Duration::from_secs(30);

/// Agents that are well, with the VMs that the test gives them.
#[derive(Debug, Default)]
struct Agents {
    vms: Mutex<BTreeMap<String, Vec<VmView>>>,
    /// Nodes whose answer to `Grace` does not come.
    silent: Mutex<BTreeSet<String>>,
    spoken: Condvar,
    asked: Mutex<Vec<(String, u32)>>,
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
                    ways: vec![PreemptWay::Requeue],
                    reserve_ms: 0,
                })
            }
            _ => Err("not played".into()),
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

    /// A controller with its state there. It polls until the process ends.
    fn controller(&self, state: &Path) {
        let mut config = Config::parse("", Path::new("slurm-vm.toml")).unwrap();
        config.state_dir = state.into();
        config.controller.poll_ms = 20;
        let world = World {
            clock: Arc::new(SystemClock),
            store: Arc::new(DirStore::new(state).unwrap()),
            files: Arc::new(SystemFiles),
            disks: Arc::new(QemuImg::default()),
            hypervisor: Arc::new(fake::World::new().node("ctl")),
            slurm: self.slurm.clone(),
            faults: Faults::default(),
        };
        let controller = Controller::new(Arc::new(config), world, self.agents.clone());
        thread::spawn(move || controller.run());
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
fn three_broken_nodes_in_a_row_leave_a_last_try_and_a_running_program_a_clean_slate() {
    let mut stage = Stage::new(3);
    let state = tempfile::tempdir().unwrap();
    let job = stage.slurm.submit(FakeJob::default());
    stage.controller(state.path());
    for k in 1..=3 {
        let broken = stage.fault(job);
        let info = stage.wait(job, "the release", released);
        assert_eq!(info.exclude_nodes, [broken], "only the last one is kept out");
        assert_eq!(info.requeue, k < 3, "after {k} broken nodes");
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
    stage.wait(job, "Requeue=1", |i| i.requeue);
    stage.agents.vms.lock().unwrap().clear();
    // Slurm's restart count is not what counts.
    for _ in 1..=2 {
        stage.fault(job);
        let info = stage.wait(job, "the release", released);
        assert!(info.requeue, "{} restarts", info.brief.restarts);
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
    stage.slurm.requeuehold(job).unwrap();
    let node = stage.job(job).brief.nodes.first().cloned().unwrap_or_else(|| "n1".into());
    stage.slurm.epilog_done(job, &node);
    stage.wait(job, "the node list", |i| i.req_nodes == ["n2"]);
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
