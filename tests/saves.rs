//! Restores that fail, come twice, come too late or meet a stranger's save: the real code over fakes of libvirt and Slurm and real files.
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use slurm_vm::{
    cluster::Alone,
    config::Config,
    core::{Allocation, Life, Plan, Record, record::file_stem, registry::Announced},
    effects::{Faults, SystemClock, SystemFiles, World, disks::QemuImg, store::DirStore},
    hypervisor::{
        Boot, CpuModel, DomainMetadata, DomainSpec, DomainState, DomainType, Hypervisor, SaveFormat,
        fake::{self, FakeHypervisor, Fault, Op},
    },
    node::Node,
    slurm::{FakeJob, FakeSlurm, Slurm},
    vm::{
        Birth,
        saving::{self, NotRestored},
    },
};
use slurm_vm_api::{session::UserEntry, spec::VmSpec};

const ALICE: u32 = 2001;

/// Two nodes with one storage, and a job whose VM was saved in its first run. It runs again, on n1.
struct Stage {
    dir: tempfile::TempDir,
    slurm: Arc<FakeSlurm>,
    nodes: [Arc<Node>; 2],
    libvirt: [Arc<FakeHypervisor>; 2],
    job: u32,
    save: PathBuf,
}

impl Stage {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let slurm = Arc::new(FakeSlurm::with_nodes(2));
        let hosts = fake::World::new();
        let libvirt = ["n1", "n2"].map(|n| Arc::new(hosts.node(n)));
        let nodes = [0, 1].map(|k| node(dir.path(), k, &slurm, &libvirt[k]));
        slurm.tick(1);
        let job = slurm.submit(FakeJob {
            req_nodes: vec!["n1".into()],
            ..FakeJob::default()
        });
        slurm.tick(2);
        let save = dir
            .path()
            .join("shared/saves")
            .join(format!("{}.1.5.n1", file_stem(&nodes[0].config.cluster, job, 0)));
        let stage = Self {
            dir,
            slurm,
            nodes,
            libvirt,
            job,
            save,
        };
        stage.write_save();
        stage.next_run(10);
        stage
    }

    fn record(&self) -> Record {
        let user = UserEntry {
            name: "alice".into(),
            uid: ALICE,
            gid: ALICE,
            home: "/home/alice".into(),
            shell: "/bin/sh".into(),
        };
        let spec = VmSpec::for_image("tiny").unwrap();
        Record {
            life: Life::Restoring { from: self.save.clone() },
            generation: 2,
            created_ms: 5,
            allocation: Some(Allocation {
                restarts: Some(0),
                ..Allocation::default()
            }),
            ..Record::new(self.nodes[0].config.cluster.clone(), "n1".into(), self.job, user, spec)
        }
    }

    fn write_save(&self) {
        let record = self.record();
        let domain = DomainSpec {
            name: record.domain(),
            uuid: record.uuid(),
            domain_type: DomainType::Qemu,
            machine: None,
            vcpus: 1,
            cpuset: vec![],
            mem_mib: 256,
            hard_limit_mib: None,
            cpu: CpuModel::Default,
            boot: Boot::Disk,
            disks: vec![],
            channels: vec![],
            serial_log: "/run/vm/serial.log".into(),
            directories: vec![],
            interfaces: vec![],
            metadata: DomainMetadata {
                job: self.job,
                ..DomainMetadata::default()
            },
        };
        fs::create_dir_all(&self.save).unwrap();
        self.libvirt[0].start(&domain, false).unwrap();
        self.libvirt[0]
            .save(&domain.name, &self.save.join("memory"), SaveFormat::Sparse)
            .unwrap();
        fs::write(self.save.join("memory"), "memory").unwrap();
        let manifest = serde_json::json!({"v": 1, "record": record, "chain": [], "kept": []});
        fs::write(self.save.join("manifest.json"), manifest.to_string()).unwrap();
    }

    /// The job is put back into the queue and started again.
    fn next_run(&self, now: i64) {
        let restarts = self.restarts();
        self.slurm.requeue(&[self.job]).unwrap();
        self.slurm.epilog_done(self.job, "n1");
        for later in 0..300 {
            self.slurm.tick(now + later);
            if self.restarts() > restarts && self.nodes[0].job_here(self.job) == Some(true) {
                return;
            }
        }
        panic!("{:?}", self.slurm.job(self.job));
    }

    fn restarts(&self) -> u32 {
        self.slurm.job(self.job).unwrap().unwrap().brief.restarts
    }

    fn restore(&self) -> Result<(), NotRestored> {
        saving::restore(&self.nodes[0], &self.record()).map(drop)
    }

    fn waits(&self) -> bool {
        saving::find(&self.nodes[1], self.job, ALICE).expect("storage answers").is_some()
    }

    /// What libvirt on n1 has of it.
    fn domain(&self) -> Option<DomainState> {
        self.libvirt[0].info(&self.record().domain()).unwrap().map(|d| d.state)
    }
}

fn node(dir: &Path, k: usize, slurm: &Arc<FakeSlurm>, libvirt: &Arc<FakeHypervisor>) -> Arc<Node> {
    node_with(dir, k, slurm, libvirt, &Faults::default())
}

fn node_with(dir: &Path, k: usize, slurm: &Arc<FakeSlurm>, libvirt: &Arc<FakeHypervisor>, faults: &Faults) -> Arc<Node> {
    let mut config = Config::parse("[hypervisor]\ndomain_type = \"qemu\"\n", Path::new("slurm-vm.toml")).unwrap();
    config.node_name = Some(format!("n{}", k + 1));
    config.state_dir = dir.join(format!("state{k}"));
    config.run_dir = dir.join(format!("run{k}"));
    config.shared_dir = Some(dir.join("shared"));
    fs::create_dir_all(config.run_dir.join("vm")).unwrap();
    let world = World {
        clock: Arc::new(SystemClock),
        store: Arc::new(DirStore::new(&config.state_dir).unwrap()),
        files: Arc::new(SystemFiles),
        disks: Arc::new(QemuImg::default()),
        hypervisor: libvirt.clone(),
        slurm: slurm.clone(),
        as_user: Arc::new(slurm_vm::effects::MemoryAsUser::default()),
    };
    Node::new(Arc::new(config), world.with_fault_points(faults), Arc::new(Alone))
}

#[test]
fn a_job_whose_save_cannot_be_looked_at_does_not_start_over() {
    let s = Stage::new();
    let dir = s.dir.path();
    let announced = |restart| Announced {
        restart,
        user: s.record().user,
        spec: s.record().spec,
    };
    for point in ["files.list", "files.read_trusted"] {
        // Once is looked at again.
        for (times, waits) in [("", true), ("@*", false)] {
            let faults = Faults::parse(&format!("{point}.before=fail{times}")).unwrap();
            let node = node_with(dir, 1, &s.slurm, &s.libvirt[1], &faults);
            match node.birth(s.job, 2, announced(1)) {
                Some(Birth::Expected(record)) => assert!(waits && record.generation == 3, "{point}{times}"),
                Some(Birth::Failed(_, why)) => assert!(!waits && why.contains(point), "{point}{times}: {why}"),
                other => panic!("{point}{times}: {other:?}"),
            }
        }
    }
    let faults = Faults::parse("files.list.before=fail@*").unwrap();
    let first = node_with(dir, 1, &s.slurm, &s.libvirt[1], &faults).birth(s.job, 1, announced(0));
    assert!(
        matches!(first, Some(Birth::New(_))),
        "a job that runs for the first time has no save: {first:?}"
    );
}

#[test]
fn a_save_is_restored_once() {
    let s = Stage::new();
    assert!(s.waits());
    s.restore().unwrap();
    assert_eq!(s.domain(), Some(DomainState::Running));
    assert!(!s.waits() && saving::is_used(&SystemFiles, &s.save));
    assert!(!s.save.join("memory").exists(), "its memory is of no use any more");
    // The guest has ended since: it is not begun a second time from the same memory.
    s.libvirt[0].destroy(&s.record().domain()).unwrap();
    let again = s.restore().unwrap_err();
    assert!(again.why.contains("restored already"), "{again:?}");
    assert_eq!(s.domain(), None);
}

#[test]
fn a_restore_whose_guest_cannot_be_let_run_leaves_the_save_to_the_next_one() {
    let s = Stage::new();
    s.libvirt[0].fail_next(Op::Resume, Fault::Refuse(refusal("resume")), 1);
    let failed = s.restore().unwrap_err();
    assert!(!failed.job_left, "{failed:?}");
    assert_eq!(s.domain(), None, "what was loaded has been ended");
    assert!(s.waits() && s.save.join("memory").exists());
    s.restore().unwrap();
    assert_eq!(s.domain(), Some(DomainState::Running));
}

#[test]
fn a_restore_whose_memory_cannot_be_loaded_leaves_the_save_to_the_next_one() {
    let s = Stage::new();
    s.libvirt[0].fail_next(Op::Restore, Fault::Refuse(refusal("restore")), 1);
    s.restore().unwrap_err();
    assert!(s.waits());
    s.restore().unwrap();
}

#[test]
fn a_guest_that_was_let_run_although_the_answer_was_lost_uses_its_save_up() {
    let s = Stage::new();
    s.libvirt[0].fail_next(Op::Resume, Fault::LoseAnswer, 1);
    s.restore().unwrap();
    assert_eq!(s.domain(), Some(DomainState::Running));
    assert!(!s.waits());
}

#[test]
fn a_job_that_is_preempted_again_before_its_guest_runs_keeps_its_save() {
    let s = Stage::new();
    let job = s.slurm.submit(FakeJob {
        user: "bob".into(),
        uid: 2002,
        partition: "high".into(),
        cpus_per_node: 4,
        features: None,
        req_nodes: vec!["n1".into()],
        ..FakeJob::default()
    });
    for later in 0..60 {
        s.slurm.tick(1_000 + later);
        if s.slurm.job(s.job).unwrap().unwrap().brief.in_grace() {
            break;
        }
    }
    assert!(s.slurm.job(s.job).unwrap().unwrap().brief.in_grace(), "job {job} preempts it");
    let left = s.restore().unwrap_err();
    assert!(left.job_left && left.why.contains("is being preempted"), "{left:?}");
    assert!(s.waits());
    // And one that was cancelled is nobody's fault either.
    s.slurm.cancel(s.job, None).unwrap();
    assert!(s.restore().unwrap_err().job_left);
    assert_eq!(s.domain(), None);
}

#[test]
fn the_save_of_another_job_that_had_the_number_is_never_restored() {
    let s = Stage::new();
    let mut theirs = s.record();
    // It was saved in a later run than this job has had.
    theirs.allocation = Some(Allocation {
        restarts: Some(1),
        ..Allocation::default()
    });
    let manifest = serde_json::json!({"v": 1, "record": theirs, "chain": [], "kept": []});
    fs::write(s.save.join("manifest.json"), manifest.to_string()).unwrap();
    let refused = saving::restore(&s.nodes[0], &theirs).unwrap_err();
    assert!(refused.why.contains("another job"), "{refused:?}");
    assert!(!s.waits());
    // Not in a later run of this job either.
    s.next_run(5_000);
    assert!(!s.waits());
}

#[test]
fn a_save_of_another_cluster_is_not_found() {
    let s = Stage::new();
    let mut theirs = s.record();
    theirs.cluster = "elsewhere".into();
    let manifest = serde_json::json!({"v": 1, "record": theirs, "chain": [], "kept": []});
    fs::write(s.save.join("manifest.json"), manifest.to_string()).unwrap();
    assert!(!s.waits());
    assert!(saving::made_by(&s.nodes[0]).is_empty(), "nor swept");
    assert!(s.save.exists());
}

#[test]
fn a_base_image_that_was_replaced_is_refused_by_name_and_the_save_waits_on() {
    let s = Stage::new();
    let mut record = s.record();
    record.plan = Some(Plan {
        vcpus: 1,
        mem_mib: 256,
        domain_type: "qemu".into(),
        overlay: Some(s.dir.path().join("overlay.qcow2")),
        overlay_shared: true,
        layers: vec![],
        disk_mib: None,
        seed: None,
        directories: vec![],
        network: slurm_vm_api::spec::Network::None,
        base_sha256: Some("ab".repeat(32)),
    });
    let base = s.save.join("overlay.qcow2");
    let made = std::process::Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&base)
        .arg("1M")
        .status();
    assert!(made.is_ok_and(|m| m.success()), "qemu-img");
    let refused = saving::restore(&s.nodes[0], &record).unwrap_err();
    assert!(
        refused.why.contains("image tiny") && refused.why.contains("was replaced") && !refused.job_left,
        "{refused:?}"
    );
    assert!(s.waits());
    assert_eq!(s.domain(), None);
}

#[test]
fn only_the_saves_of_the_very_vm_that_ends_are_removed() {
    let s = Stage::new();
    let other = s.save.with_file_name(format!("{}.1.6.n1", s.record().file_stem()));
    fs::create_dir_all(&other).unwrap();
    fs::write(other.join("manifest.used.json"), "{}").unwrap();
    saving::remove_saves(&s.nodes[0], &s.record(), false);
    assert!(s.waits(), "nobody was restored from it, and its job is not over");
    saving::remove_saves(&s.nodes[0], &s.record(), true);
    assert!(!s.save.exists());
    assert!(other.exists(), "a later VM of the job stands on it");
}

fn refusal(call: &'static str) -> slurm_vm::hypervisor::HypervisorError {
    slurm_vm::hypervisor::HypervisorError::Libvirt {
        call,
        domain: 10,
        message: format!("{call} fails as ordered"),
        code: 9,
    }
}

#[test]
fn what_a_save_that_was_never_whole_has_left_is_found_by_the_node_that_made_it() {
    let s = Stage::new();
    fs::remove_file(s.save.join("manifest.json")).unwrap();
    let made = |k: usize| saving::made_by(&s.nodes[k]);
    let [left] = &made(0)[..] else { panic!("{:?}", made(0)) };
    assert_eq!((left.job, left.uid, &left.dir), (s.job, None, &s.save));
    assert!(made(1).is_empty(), "n2 did not make it");
}
