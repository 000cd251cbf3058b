//! Starts domains in three ways and says how long each took: the node's half of `cargo xtask bench start`.
//!
//! Runs on a node with libvirtd, beside no other agent. Reads one word a line (`direct`, `virsh`, `agent`, `boot`) and answers each with one
//! line of JSON, times in milliseconds. What is measured:
//!
//! * `direct`: one call of virDomainCreateXML on an open connection, with the XML that the agent makes. Overlay, directories and XML are there.
//! * `virsh`: `virsh create FILE` with the same XML, from the start of the process to its end.
//! * `agent`: the agent's own code (owner thread, core, effects) from the moment the overlay is there until the owner has taken in that the domain
//!   runs: the `Prepared` event, the record's sync, journal and marker, worker threads, the XML, the socket directory, virDomainCreateXML, the
//!   `DomainStarted` event. `ms` is without the ledger's syncs, which are `sync_ms`; `overlay_ms` is before it and not in it.
//! * `boot`: as `agent`, and `boot_ms` from there until the helper in the guest answers.

mod libvirt;

use serde_json::json;
use slurm_vm::{
    cluster::Alone,
    config::Config,
    core::{Allocation, Plan, Record, registry::Announced},
    effects::{Base, DiskError, Disks, Store, StoreError, SystemClock, World, disks::QemuImg, store::DirStore},
    hypervisor::{DomainType, Hypervisor, libvirt::LibvirtHypervisor},
    node::Node,
    slurm::{FakeEvent, FakeJob, FakeSlurm},
    vm::{moving::make_run_dir, prepare},
};
use slurm_vm_api::{session::UserEntry, spec::VmSpec};
use std::{
    ffi::CString,
    io::{BufRead, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Guest memory: as a job with `--vm-mem=256M` has it.
const MEM_MIB: u64 = 256;
const STARTED_WITHIN: Duration = Duration::from_secs(60);
const BOOTED_WITHIN: Duration = Duration::from_secs(120);

/// When things happened in the turn that runs.
#[derive(Debug, Default)]
struct Marks {
    overlay: Option<(Instant, Instant)>,
    started: Option<Instant>,
    up: Option<Instant>,
    ended: Option<String>,
    sync: Duration,
}

#[derive(Debug, Default, Clone)]
struct Shared(Arc<Mutex<Marks>>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Marks> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self, what: &str, within: Duration, seen: impl Fn(&Marks) -> bool) -> Result<(), String> {
        let end = Instant::now() + within;
        loop {
            {
                let marks = self.lock();
                if seen(&marks) {
                    return Ok(());
                }
                if let Some(why) = &marks.ended {
                    return Err(format!("not {what}: {why}"));
                }
            }
            if Instant::now() > end {
                return Err(format!("not {what} within {} s", within.as_secs()));
            }
            // Coarse on purpose: the marks carry the times, and a busy wait would take a core from QEMU.
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// The real ledger with a clock beside it.
#[derive(Debug)]
struct TimedStore(DirStore, Shared);

impl Store for TimedStore {
    fn load(&self) -> Result<Vec<Result<Record, StoreError>>, StoreError> {
        self.0.load()
    }
    fn put(&self, record: &Record) -> Result<(), StoreError> {
        let begin = Instant::now();
        let done = self.0.put(record);
        let mut marks = self.1.lock();
        // Only what lies between overlay and start counts as a part of the window.
        if marks.overlay.is_some() && marks.started.is_none() {
            marks.sync += begin.elapsed();
        }
        done
    }
    fn remove(&self, domain: &str) -> Result<(), StoreError> {
        self.0.remove(domain)
    }
    fn journal(&self, domain: &str, now_ms: u64, line: &str) {
        let now = Instant::now();
        {
            let mut marks = self.1.lock();
            if line == "domain started" {
                marks.started = Some(now);
            } else if line.starts_with("guest is up") {
                marks.up = Some(now);
            } else if let Some(why) = line.strip_prefix("stopping: ") {
                marks.ended = Some(why.to_owned());
            }
        }
        self.0.journal(domain, now_ms, line);
    }
    fn vm_dir(&self, domain: &str) -> PathBuf {
        self.0.vm_dir(domain)
    }
}

/// The real disks with a clock beside them.
#[derive(Debug)]
struct TimedDisks(QemuImg, Shared);

impl Disks for TimedDisks {
    fn seed(&self, helper: &Path, dir: &Path) -> Result<PathBuf, DiskError> {
        self.0.seed(helper, dir)
    }

    fn base(&self, path: &Path, format: &str) -> Result<Base, DiskError> {
        self.0.base(path, format)
    }
    fn make_overlay(&self, overlay: &Path, base: &Path, base_format: &str, mib: Option<u64>) -> Result<(), DiskError> {
        let begin = Instant::now();
        let done = self.0.make_overlay(overlay, base, base_format, mib);
        self.1.lock().overlay = Some((begin, Instant::now()));
        done
    }
    fn remove(&self, path: &Path) -> Result<(), DiskError> {
        self.0.remove(path)
    }
    fn used_bytes(&self, path: &Path) -> u64 {
        self.0.used_bytes(path)
    }
    fn free_bytes(&self, path: &Path) -> Result<u64, DiskError> {
        self.0.free_bytes(path)
    }
    fn readable(&self, path: &Path) -> Result<(), DiskError> {
        self.0.readable(path)
    }
}

struct Bench {
    node: Arc<Node>,
    slurm: Arc<FakeSlurm>,
    direct: libvirt::Connection,
    marks: Shared,
    image: String,
    dir: PathBuf,
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1000.0
}

impl Bench {
    fn new(config: &Path, dir: &Path, image: &str) -> Result<Self, String> {
        let mut config = Config::load(config).map_err(|e| e.to_string())?;
        config.state_dir = dir.join("state");
        config.run_dir = dir.join("run");
        config.shared_dir = None;
        for made in [&config.state_dir, &config.run_dir.join("jobs"), &config.run_dir.join("vm")] {
            std::fs::create_dir_all(made).map_err(|e| format!("cannot make {}: {e}", made.display()))?;
        }
        let marks = Shared::default();
        let hypervisor = LibvirtHypervisor::new(&config.hypervisor.uri).map_err(|e| e.to_string())?;
        hypervisor.ping(Duration::from_secs(20)).map_err(|e| e.to_string())?;
        let slurm = Arc::new(FakeSlurm::with_nodes(1));
        let world = World {
            files: Arc::new(slurm_vm::effects::SystemFiles),
            clock: Arc::new(SystemClock),
            store: Arc::new(TimedStore(
                DirStore::new(&config.state_dir).map_err(|e| e.to_string())?,
                marks.clone(),
            )),
            disks: Arc::new(TimedDisks(QemuImg::default(), marks.clone())),
            hypervisor: Arc::new(hypervisor),
            slurm: slurm.clone(),
            as_user: Arc::new(slurm_vm::effects::SystemAsUser),
        };
        let direct = libvirt::Connection::open(&config.hypervisor.uri)?;
        let node = Node::new(Arc::new(config), world, Arc::new(Alone));
        Ok(Self {
            node,
            slurm,
            direct,
            marks,
            image: image.into(),
            dir: dir.into(),
        })
    }

    fn spec(&self) -> VmSpec {
        VmSpec {
            image: self.image.clone(),
            cpus: Some(1),
            mem_mib: Some(MEM_MIB),
            boot_timeout_s: None,
            preempt: None,
            mounts: vec![],
            workdir: None,
            net: None,
            disk_mib: None,
        }
    }

    fn user() -> UserEntry {
        UserEntry {
            name: "alice".into(),
            uid: 2001,
            gid: 2001,
            home: "/".into(),
            shell: "/bin/sh".into(),
        }
    }

    /// A job that the model of Slurm runs on this node.
    fn job(&self) -> Result<u32, String> {
        let job = self.slurm.submit(FakeJob {
            mem_mib_per_node: 1024,
            ..FakeJob::default()
        });
        self.slurm.tick(1);
        let started = self
            .slurm
            .events()
            .iter()
            .any(|e| matches!(e, FakeEvent::Started { job: j, .. } if *j == job));
        if started {
            Ok(job)
        } else {
            Err(format!("the model does not start job {job}"))
        }
    }

    fn job_over(&self, job: u32) {
        self.slurm.exited(job, 0);
        self.slurm.epilog_done(job, &self.node.name);
        self.slurm.tick(1);
    }

    /// The record of a job as it is when its domain is about to be started; overlay and directories are made.
    fn prepared(&self, job: u32) -> Result<Record, String> {
        let mut record = Record::new(
            self.node.config.cluster.clone(),
            self.node.name.clone(),
            job,
            Self::user(),
            self.spec(),
        );
        let world = &self.node.world;
        world.store.put(&record).map_err(|e| e.to_string())?;
        let (allocation, plan): (Allocation, Plan) = prepare::allotted(world, &record.node, record.job)
            .and_then(|given| prepare::prepare(world, &self.node.config, DomainType::Qemu, &record, given))
            .map_err(|e| format!("{e:?}"))?;
        record.allocation = Some(allocation);
        record.plan = Some(plan);
        make_run_dir(&*self.node.world.files, &self.node.config, &record.domain())?;
        Ok(record)
    }

    fn xml(&self, record: &Record) -> Result<String, String> {
        let spec = prepare::domain_spec(&self.node.config, &self.node.world, record).ok_or("no plan")?;
        self.node.world.hypervisor.xml_for(&spec).map_err(|e| e.to_string())
    }

    fn base(&self, virsh: bool) -> Result<serde_json::Value, String> {
        let job = self.job()?;
        let record = self.prepared(job)?;
        let xml = self.xml(&record)?;
        let took = if virsh {
            let file = self.dir.join("domain.xml");
            std::fs::write(&file, &xml).map_err(|e| e.to_string())?;
            let mut command = Command::new("virsh");
            command
                .args(["-q", "-c", &self.node.config.hypervisor.uri, "create"])
                .arg(&file)
                .stdin(Stdio::null())
                .stdout(Stdio::null());
            let begin = Instant::now();
            let status = command.status().map_err(|e| e.to_string())?;
            let took = begin.elapsed();
            if !status.success() {
                return Err(format!("virsh create: {status}"));
            }
            took
        } else {
            let text = CString::new(xml).map_err(|e| e.to_string())?;
            let begin = Instant::now();
            self.direct.create(&text)?;
            begin.elapsed()
        };
        self.direct.destroy(&record.domain())?;
        if let Some(overlay) = record.plan.as_ref().and_then(|p| p.overlay.as_ref()) {
            self.node.world.disks.remove(overlay).map_err(|e| e.to_string())?;
        }
        self.node.world.store.remove(&record.domain()).map_err(|e| e.to_string())?;
        self.job_over(job);
        Ok(json!({"ms": ms(took)}))
    }

    fn agent(&self, boot: bool) -> Result<serde_json::Value, String> {
        let job = self.job()?;
        *self.marks.lock() = Marks::default();
        let run = Announced {
            restart: 0,
            user: Self::user(),
            spec: self.spec(),
        };
        self.node.ensure(job, &run)?;
        self.marks.wait("started", STARTED_WITHIN, |m| m.started.is_some())?;
        let up = if boot {
            self.marks.wait("up", BOOTED_WITHIN, |m| m.up.is_some())
        } else {
            Ok(())
        };
        self.node.release(job, Duration::from_secs(20))?;
        up?;
        self.node
            .world
            .store
            .remove(&slurm_vm::core::record::domain_name(job, 0))
            .map_err(|e| e.to_string())?;
        self.job_over(job);
        let marks = self.marks.lock();
        let (Some((begin, overlay)), Some(started)) = (marks.overlay, marks.started) else {
            return Err("a mark is missing".into());
        };
        let whole = started - overlay;
        let mut answer = json!({
            "ms": ms(whole.saturating_sub(marks.sync)),
            "with_sync_ms": ms(whole),
            "sync_ms": ms(marks.sync),
            "overlay_ms": ms(overlay - begin),
        });
        if let Some(up) = marks.up.filter(|_| boot) {
            answer["boot_ms"] = json!(ms(up - started));
        }
        Ok(answer)
    }
}

fn main() -> Result<(), String> {
    slurm_vm::logging::init(false);
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [config, dir, image] = words.as_slice() else {
        return Err("usage: bench-start CONFIG DIRECTORY IMAGE".into());
    };
    let bench = Bench::new(Path::new(config), Path::new(dir), image)?;
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|e| e.to_string())?;
        let done = match line.trim() {
            "direct" => bench.base(false),
            "virsh" => bench.base(true),
            "agent" => bench.agent(false),
            "boot" => bench.agent(true),
            other => Err(format!("unknown word {other}")),
        };
        let answer = done.unwrap_or_else(|e| json!({"error": e}));
        writeln!(out, "{answer}").and_then(|()| out.flush()).map_err(|e| e.to_string())?;
    }
    Ok(())
}
