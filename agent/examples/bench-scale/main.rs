//! What an agent and the controller pay at scale, over fakes in memory: `cargo xtask bench scale` asks.
//!
//! One word a line on standard input, one line of JSON with times in milliseconds on standard output:
//! * `vms N`: a node that has N ended VMs in its ledger. `status_ms` is one answer to the controller's question of every second; `cycle_ms` is a
//!   VM from its prolog until its epilog has returned, the guest never being up.
//! * `nodes N`: a cluster of N nodes with a VM on half of them. `place_ms` is the choice of a destination for one victim.
use std::{
    collections::{BTreeMap, BTreeSet},
    io::BufRead,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use slurm_vm::{
    cluster::Alone,
    config::Config,
    controller::placement::{Claims, Picture, PreemptRule, Want, by_node, place},
    core::{
        Life, Record,
        record::{End, Plan},
        registry::Announced,
        relocation::Resources,
    },
    effects::{Files, MemoryDisks, MemoryFiles, Store, StoreError, SystemClock, World},
    hypervisor::fake,
    node::Node,
    slurm::{FakeJob, FakeSlurm, JobBrief, JobRequest, JobState, NodeInfo},
};
use slurm_vm_api::{session::UserEntry, spec::VmSpec};

/// Operations that one answer is the mean of.
const STATUSES: u32 = 50;
const CYCLES: u32 = 20;
const PLACES: u32 = 20;
const IMAGE: &str = "/images/tiny.qcow2";

fn main() -> Result<(), String> {
    let mut nodes: BTreeMap<u32, Arc<Node>> = BTreeMap::new();
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|e| e.to_string())?;
        let (what, n) = line.split_once(' ').ok_or("a word and a number are wanted")?;
        let n: u32 = n.parse().map_err(|e| format!("{n}: {e}"))?;
        match what {
            "vms" => {
                let node = nodes.entry(n).or_insert_with(|| node_with(n));
                let status_ms = mean(STATUSES, || {
                    let told = node.status();
                    assert!(serde_json::to_vec(&told).is_ok_and(|bytes| !bytes.is_empty()));
                });
                let cycle_ms = mean(CYCLES, || cycle(node));
                println!("{{\"status_ms\": {status_ms}, \"cycle_ms\": {cycle_ms}}}");
            }
            "nodes" => println!("{{\"place_ms\": {}}}", placing(n)),
            other => return Err(format!("{other}: not known")),
        }
    }
    Ok(())
}

/// Milliseconds that one takes.
fn mean(times: u32, mut act: impl FnMut()) -> f64 {
    let begun = Instant::now();
    for _ in 0..times {
        act();
    }
    begun.elapsed().as_secs_f64() * 1000.0 / f64::from(times)
}

fn alice() -> UserEntry {
    UserEntry {
        name: "alice".into(),
        uid: 2001,
        gid: 2001,
        home: "/home/alice".into(),
        shell: "/bin/sh".into(),
    }
}

/// The ledger of a node on which so many VMs have ended.
#[derive(Debug)]
struct Ledger(u32);

impl Store for Ledger {
    fn load(&self) -> Result<Vec<Result<Record, StoreError>>, StoreError> {
        let now = u64::try_from(std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_millis()).unwrap_or(0);
        let spec = VmSpec::for_image("tiny").expect("a name");
        let record = |k: u32| Record {
            life: Life::Stopped { why: End::Released },
            plan: Some(Plan {
                vcpus: 1,
                mem_mib: 200,
                domain_type: "kvm".into(),
                overlay: None,
                overlay_shared: false,
                layers: vec![],
                disk_mib: None,
                seed: None,
                directories: vec![],
                network: slurm_vm_api::spec::Network::None,
                base_sha256: None,
            }),
            up_ms: Some(now - 60_000),
            ended_ms: Some(now - 10_000 + u64::from(k % 10_000)),
            ..Record::new("cluster".into(), "n1".into(), 1_000_000 + k, alice(), spec.clone())
        };
        Ok((0..self.0).map(|k| Ok(record(k))).collect())
    }

    fn put(&self, _: &Record) -> Result<(), StoreError> {
        Ok(())
    }

    fn remove(&self, _: &str) -> Result<(), StoreError> {
        Ok(())
    }

    fn journal(&self, _: &str, _: u64, _: &str) {}

    fn vm_dir(&self, domain: &str) -> PathBuf {
        Path::new("/state/vms").join(domain)
    }
}

/// The one job that begins and ends again and again.
const JOB: u32 = 1;

fn node_with(ended: u32) -> Arc<Node> {
    let text = format!("[hypervisor]\ndomain_type = \"qemu\"\n[images.tiny]\ndisk = \"{IMAGE}\"\n");
    let mut config = Config::parse(&text, Path::new("slurm-vm.toml")).expect("a configuration");
    config.node_name = Some("n1".into());
    let files = MemoryFiles::default();
    files.write_durably(Path::new(IMAGE), b"an image").expect("memory");
    let slurm = Arc::new(FakeSlurm::with_nodes(1));
    slurm.tick(1);
    assert_eq!(slurm.submit(FakeJob::default()), JOB);
    slurm.tick(2);
    let world = World {
        clock: Arc::new(SystemClock),
        store: Arc::new(Ledger(ended)),
        disks: Arc::new(MemoryDisks(files.clone())),
        files: Arc::new(files),
        hypervisor: Arc::new(fake::World::new().node("n1")),
        slurm,
        as_user: Arc::new(slurm_vm::effects::MemoryAsUser::default()),
    };
    let node = Node::new(Arc::new(config), world, Arc::new(Alone));
    node.recover();
    node
}

fn cycle(node: &Arc<Node>) {
    let announced = Announced {
        restart: 0,
        user: alice(),
        spec: VmSpec::for_image("tiny").expect("a name"),
    };
    node.ensure(JOB, &announced).expect("a VM");
    node.release(JOB, Duration::from_secs(20)).expect("its end");
}

/// Nodes of two CPUs, every other one with a VM; one of those is preempted.
fn placing(count: u32) -> f64 {
    let now_s = 1_700_000_000;
    let name = |k: u32| format!("n{k}");
    let nodes: Vec<NodeInfo> = (0..count)
        .map(|k| NodeInfo {
            name: name(k),
            state: vec![if k % 2 == 0 { "MIXED" } else { "IDLE" }.into()],
            reason: None,
            available_features: vec!["vm".into()],
            active_features: vec!["vm".into()],
            cpus_alloc: u32::from(k % 2 == 0),
            cpus_total: 2,
            cores: 2,
            threads_per_core: 1,
            mem_alloc_mib: if k % 2 == 0 { 1024 } else { 0 },
            mem_total_mib: 4096,
            partitions: vec!["low".into(), "high".into()],
            address: name(k),
        })
        .collect();
    let slurm = FakeSlurm::with_nodes(1);
    slurm.tick(1);
    let job = slurm.submit(FakeJob::default());
    slurm.tick(2);
    let brief = {
        use slurm_vm::slurm::Slurm;
        let all = slurm.jobs_poll().expect("the fake answers");
        all.into_iter().find(|j| j.id == job).expect("the job")
    };
    let jobs: Vec<JobBrief> = (0..count)
        .step_by(2)
        .map(|k| JobBrief {
            id: k + 1,
            state: JobState::Running,
            partition: "low".into(),
            start_time: Some(now_s - 100),
            nodes: vec![name(k)],
            ..brief.clone()
        })
        .collect();
    let request = |j: &JobBrief| JobRequest {
        id: j.id,
        nodes: 1,
        cpus: 1,
        mem_mib: 1024,
        ..JobRequest::default()
    };
    let requests: BTreeMap<u32, JobRequest> = jobs.iter().map(|j| (j.id, request(j))).collect();
    let well: BTreeSet<String> = nodes.iter().map(|n| n.name.clone()).collect();
    let rule = PreemptRule::Partitions([("low".to_owned(), (1, true)), ("high".to_owned(), (10, false))].into());
    let (exclude, claims) = (BTreeMap::new(), Claims::default());
    let want = Want {
        job: 1,
        user: "alice".into(),
        from: name(0),
        partition: "low".into(),
        qos: None,
        constraint: Some("vm".into()),
        exclude: vec![],
        needs: Resources { cpus: 1, mem_mib: 1024 },
        wanted: None,
        deadline_ms: None,
    };
    mean(PLACES, || {
        let picture = Picture {
            now_s,
            feature: "vm",
            nodes: &nodes,
            well: &well,
            jobs: &jobs,
            requests: &requests,
            exclude: &exclude,
            reservations: &[],
            claims: &claims,
            arrivals: vec![],
            rule: &rule,
            moves_in: 2,
            refused: BTreeSet::new(),
            on: by_node(&jobs),
        };
        let placed = place(picture, std::slice::from_ref(&want));
        assert!(placed.iter().all(|(_, to)| to.is_ok()), "{placed:?}");
    })
}
