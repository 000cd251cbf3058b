//! Moves one VM back and forth between two nodes: the nodes' half of `cargo xtask bench migrate`.
//!
//! One process per node, with one connection to its libvirt and nobody else at it, as a node has one agent: QEMU's events wake everybody who is told of them,
//! on the processors that the move has. Three ways of moving, each with a VM of its own. `plain` and `encrypted`: the agent's own code (owner thread, core, peer
//! channel, relay), as a node role has it; only Slurm is a model, because what Slurm does comes after the move. `virsh`: the same domain XML, moved by
//! `virsh migrate --live --p2p` straight to the other libvirtd, memory by plain TCP between the QEMUs.
//!
//! Reads one line, answers with one line of JSON. The first word is the way, the rest is one of `boot`, `expect`, `move NODE ADDRESS URI`, `suspend`, `resume`,
//! `clear`, `seen`.
//! `move` answers with `total_ms`: for `virsh` from the start of the process to its end; for the others from the order to the answer, that is with
//! the question to the destination, its preparations, all handshakes and the hand-over of output offsets.
//! `seen` answers with QEMU's own times of its events STOP and RESUME since `clear`, with the time of libvirt's word that the destination's QEMU has
//! started (`started`; all in wall clock seconds, which both nodes share in the lab, like `began` in the answer to `move`) and with the largest step
//! that a counter in the guest saw on its own clock.

use crossbeam_channel::Receiver;
use serde_json::{Value, json};
use slurm_vm::{
    cluster::{self, Peers, TlsPeers},
    config::Config,
    core::{Life, Record, record::domain_name, registry::Announced},
    effects::{Faults, SystemClock, World, disks::QemuImg, store::DirStore},
    hypervisor::{DomainEvent, DomainType, Hypervisor, libvirt::LibvirtHypervisor, repoint},
    node::Node,
    peer::Role,
    slurm::{FakeJob, FakeSlurm},
    vm::{
        Request,
        converge::first_downtime,
        moving::{MoveOrder, make_run_dir},
        prepare,
    },
};
use slurm_vm_api::{session::UserEntry, spec::VmSpec};
use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

const MEM_MIB: u64 = 256;
const IMAGE: &str = "bench";
const BOOTED_WITHIN: Duration = Duration::from_secs(120);
const MOVED_WITHIN: Duration = Duration::from_secs(120);

/// One of QEMU's events, or libvirt's STARTED: domain, name, wall clock in seconds.
type Event = (String, String, f64);

type Events = Arc<Mutex<Vec<Event>>>;

/// The ways of moving.
const WAYS: [&str; 3] = ["virsh", "plain", "encrypted"];

/// One VM, moved in one way.
struct Way {
    node: Arc<Node>,
    virsh: bool,
    job: u32,
    events: Events,
    /// Where the serial log ended at the last `clear`.
    serial_from: usize,
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1000.0
}

/// Wall clock in seconds, as QEMU's events have it.
fn now_s() -> f64 {
    std::time::UNIX_EPOCH.elapsed().map_or(0.0, |d| d.as_secs_f64())
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// Arguments: configuration of the node, directory shared by both nodes, initrd of the image, core for the VMs.
struct Arguments {
    config: PathBuf,
    shared: PathBuf,
    initrd: PathBuf,
    core: u32,
}

/// All ways by name.
fn ways(a: &Arguments) -> Result<HashMap<String, Way>, String> {
    let config = Config::load(&a.config).map_err(text)?;
    let hypervisor = Arc::new(LibvirtHypervisor::new(&config.hypervisor.uri).map_err(text)?);
    hypervisor.ping(Duration::from_secs(20)).map_err(text)?;
    let events = Events::default();
    let (told, core, started) = (hypervisor.events(), a.core, Arc::clone(&events));
    std::thread::spawn(move || own_core(told, core, &started));
    watch_qemu(&config.hypervisor.uri, Arc::clone(&events))?;
    let mut ways = HashMap::new();
    for (number, name) in (1..).zip(WAYS) {
        let way = Way::new(a, config.clone(), number, name, hypervisor.clone(), Arc::clone(&events))?;
        ways.insert(name.to_owned(), way);
    }
    Ok(ways)
}

impl Way {
    /// `number`: from 1, another one for each way.
    fn new(
        a: &Arguments,
        mut config: Config,
        number: u16,
        way: &str,
        hypervisor: Arc<LibvirtHypervisor>,
        events: Events,
    ) -> Result<Self, String> {
        let image = config.images.get("tiny").ok_or("no image tiny")?.clone();
        let image = slurm_vm::config::ImageConfig {
            initrd: Some(a.initrd.clone()),
            cmdline: format!("{} rdinit=/bench/init", image.cmdline),
            ..image
        };
        config.images.insert(IMAGE.into(), image);
        config.state_dir = config.state_dir.join(format!("bench-{way}"));
        config.run_dir = PathBuf::from(format!("/run/bench-{way}"));
        config.shared_dir = Some(a.shared.join(way));
        config.peer.port = 6900 + number;
        config.peer.listen = format!("0.0.0.0:{}", config.peer.port);
        config.peer.encrypt_migration = way != "plain";
        // A VM that waits for its job waits here for the next turn.
        config.node.await_job_s = 86_400;
        let overlays = a.shared.join(way).join("overlays");
        for made in [
            &config.state_dir,
            &config.run_dir.join("jobs"),
            &config.run_dir.join("vm"),
            &overlays,
        ] {
            std::fs::create_dir_all(made).map_err(|e| format!("cannot make {}: {e}", made.display()))?;
        }
        let slurm = Arc::new(FakeSlurm::with_nodes(1));
        // Jobs of different ways have different numbers, for their domains share a libvirtd; and the same core, or they would be pinned to others.
        let mut job = 0;
        for turn in 1..=i64::from(number) {
            job = slurm.submit(FakeJob {
                mem_mib_per_node: 1024,
                ..FakeJob::default()
            });
            slurm.tick(turn);
            if turn < i64::from(number) {
                slurm.exited(job, 0);
                slurm.epilog_done(job, "n1");
                slurm.tick(turn);
            }
        }
        let world = World {
            files: Arc::new(slurm_vm::effects::SystemFiles),
            clock: Arc::new(SystemClock),
            store: Arc::new(DirStore::new(&config.state_dir).map_err(text)?),
            disks: Arc::new(QemuImg::default()),
            hypervisor,
            slurm,
            as_user: Arc::new(slurm_vm::effects::SystemAsUser),
        };
        let config = Arc::new(config);
        let peers = TlsPeers::new(&config, &[0], Role::Node, 0, &Faults::default())?;
        let as_peers: Arc<dyn Peers> = peers.clone();
        let node = Node::new(config.clone(), world, as_peers);
        let domains = node.world.hypervisor.events();
        let (watcher, serving) = (node.clone(), node.clone());
        std::thread::spawn(move || watcher.watch_domains(&domains));
        peers.serve(&config, move |from, request| cluster::answer(&serving, from, request))?;
        Ok(Self {
            node,
            virsh: way == "virsh",
            job,
            events,
            serial_from: 0,
        })
    }

    fn domain(&self) -> String {
        domain_name(self.job, 0)
    }

    fn spec() -> VmSpec {
        VmSpec {
            image: IMAGE.into(),
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

    fn record(&self) -> Record {
        Record::new(self.node.config.cluster.clone(), "n1".into(), self.job, Self::user(), Self::spec())
    }

    /// What the agent does by itself where it takes a VM in.
    fn expect(&self) -> Result<Value, String> {
        if self.virsh {
            self.node.world.store.put(&self.record()).map_err(text)?;
            make_run_dir(&*self.node.world.files, &self.node.config, &self.domain())?;
        }
        Ok(json!({}))
    }

    fn boot(&self) -> Result<Value, String> {
        if self.virsh {
            self.expect()?;
            let mut record = self.record();
            let world = &self.node.world;
            let (allocation, plan) = prepare::allotted(world, &record.node, self.job)
                .and_then(|given| prepare::prepare(world, &self.node.config, DomainType::Qemu, &record, given))
                .map_err(|e| format!("{e:?}"))?;
            record.allocation = Some(allocation);
            record.plan = Some(plan);
            let spec = prepare::domain_spec(&self.node.config, world, &record).ok_or("no plan")?;
            world.hypervisor.start(&spec, false).map_err(text)?;
        } else {
            let run = Announced {
                restart: 0,
                user: Self::user(),
                spec: Self::spec(),
            };
            self.node.ensure(self.job, &run)?;
        }
        let end = Instant::now() + BOOTED_WITHIN;
        let running = || {
            self.virsh
                || self
                    .node
                    .record(self.job)
                    .is_some_and(|r| matches!(r.life, Life::Running | Life::AwaitingJob { .. }))
        };
        while !(running() && self.serial().contains("slurm-vm: guest is up")) {
            if Instant::now() > end {
                let life = self.node.record(self.job).map(|r| r.life);
                return Err(format!("the guest is not up: {life:?}, serial log: {}", self.serial()));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(json!({}))
    }

    fn serial(&self) -> String {
        let bytes = std::fs::read(self.node.world.store.vm_dir(&self.domain()).join("serial.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn migrate(&self, to: &str, address: &str, uri: &str) -> Result<Value, String> {
        if self.virsh {
            // The same settings: ours begins with this downtime, too.
            if let Some(ms) = first_downtime(self.node.config.node.move_downtime_ms) {
                let hypervisor = &self.node.world.hypervisor;
                hypervisor.migrate_tune(&self.domain(), Some(ms), None).map_err(text)?;
            }
            // And the same XML at the destination, which is not pinned to the source's CPUs.
            let there = self.node.config.run_dir.join("there.xml");
            let xml = self.node.world.hypervisor.live_xml(&self.domain()).map_err(text)?;
            let xml = repoint(&xml, &[], None).map_err(text)?;
            std::fs::write(&there, xml).map_err(|e| format!("cannot write {}: {e}", there.display()))?;
            let mut command = Command::new("virsh");
            command.args(["-q", "-c", &self.node.config.hypervisor.uri, "migrate", "--live", "--p2p", "--xml"]);
            command
                .arg(&there)
                .args(["--migrateuri", &format!("tcp://{address}"), &self.domain(), uri]);
            command.stdin(Stdio::null());
            let (began, begin) = (now_s(), Instant::now());
            let output = command.output().map_err(text)?;
            let total = begin.elapsed();
            if !output.status.success() {
                return Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim()));
            }
            return Ok(json!({"total_ms": ms(total), "began": began}));
        }
        let owner = self.node.owner(self.job).ok_or("the VM has no owner here")?;
        let (reply, answer) = crossbeam_channel::bounded(1);
        let order = MoveOrder {
            move_id: format!("bench-{}-{}", self.job, self.node.world.clock.now_ms()),
            to: to.into(),
            address: address.into(),
            cause: "asked".into(),
            deadline_ms: None,
        };
        let (began, begin) = (now_s(), Instant::now());
        owner.send(Request::MoveOut { order, reply }).map_err(text)?;
        let done = answer.recv_timeout(MOVED_WITHIN).map_err(text)??;
        let total = begin.elapsed();
        Ok(json!({"total_ms": ms(total), "began": began, "copy_ms": done.seconds * 1000.0, "sent_bytes": done.bytes}))
    }

    /// What libvirt counted for the last move, as the destination has it.
    fn counted(&self) -> Option<f64> {
        let mut command = Command::new("virsh");
        command.args([
            "-q",
            "-c",
            &self.node.config.hypervisor.uri,
            "domjobinfo",
            "--completed",
            "--rawstats",
            &self.domain(),
        ]);
        let output = command.stdin(Stdio::null()).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().find_map(|l| l.trim().strip_prefix("memory_processed:"))?;
        line.trim().parse().ok()
    }

    fn clear(&mut self) -> Value {
        let domain = self.domain();
        self.events().retain(|(d, _, _)| *d != domain);
        self.serial_from = self.serial().len();
        json!({})
    }

    fn events(&self) -> std::sync::MutexGuard<'_, Vec<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn seen(&self) -> Value {
        let domain = self.domain();
        let at = |name: &str| {
            self.events()
                .iter()
                .find(|(d, n, _)| *d == domain && n == name)
                .map(|(_, _, at)| *at)
        };
        let serial = self.serial();
        // `B NOW STEP`, both in nanoseconds of the guest; a line may have been cut by the move.
        let steps = serial.get(self.serial_from..).unwrap_or_default().lines().filter_map(|l| {
            let (_, step) = l.trim().strip_prefix("B ")?.split_once(' ')?;
            let step = step.strip_suffix(" E")?;
            step.parse::<f64>().ok()
        });
        let step = steps.fold(0.0, f64::max) / 1e6;
        json!({"started": at("STARTED"), "stop": at("STOP"), "resume": at("RESUME"), "step_ms": step, "counted_bytes": self.counted()})
    }

    fn answer(&mut self, words: &[&str]) -> Result<Value, String> {
        match words {
            ["boot"] => self.boot(),
            ["expect"] => self.expect(),
            ["move", to, address, uri] => self.migrate(to, address, uri),
            ["suspend"] => self.node.world.hypervisor.suspend(&self.domain()).map(|()| json!({})).map_err(text),
            ["resume"] => self.node.world.hypervisor.resume(&self.domain()).map(|()| json!({})).map_err(text),
            ["clear"] => Ok(self.clear()),
            ["seen"] => Ok(self.seen()),
            other => Err(format!("unknown words {other:?}")),
        }
    }
}

/// Notes when a QEMU starts here, and gives it the node's own core. The lab's nodes share the machine's, and two QEMUs on one core, which real nodes never have,
/// exchange bytes at a sixth of the speed; which of them meet is the kernel's whim. Not by libvirt, which changes nothing while a domain arrives.
fn own_core(told: Receiver<DomainEvent>, core: u32, into: &Events) {
    for event in told {
        let DomainEvent::Started { name: domain, .. } = event else {
            continue;
        };
        let started = (domain.clone(), "STARTED".to_owned(), now_s());
        into.lock().unwrap_or_else(PoisonError::into_inner).push(started);
        let pid = std::fs::read_to_string(format!("/run/libvirt/qemu/{domain}.pid")).map_err(text);
        let done = pid.and_then(|pid| {
            let mut command = Command::new("taskset");
            command.args(["-acp", &core.to_string(), pid.trim()]);
            command.stdin(Stdio::null()).output().map_err(text)
        });
        match done {
            Ok(output) if output.status.success() => {}
            other => log::error!("{domain} has no core of its own: {other:?}"),
        }
    }
}

/// Collects QEMU's events with QEMU's own times.
fn watch_qemu(uri: &str, into: Events) -> Result<(), String> {
    // virsh fills a buffer before it writes to a pipe, unless told otherwise.
    let mut command = Command::new("stdbuf");
    command.args([
        "-oL",
        "virsh",
        "-c",
        uri,
        "qemu-monitor-event",
        "--loop",
        "--regex",
        "--event",
        "^(STOP|RESUME)$",
    ]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(text)?;
    let output = child.stdout.take().ok_or("no output")?;
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if let Some(event) = event(&line) {
                into.lock().unwrap_or_else(PoisonError::into_inner).push(event);
            }
        }
        let _ = child.wait();
    });
    Ok(())
}

/// `event STOP at 1795401368.123456 for domain 'slurm-1-0': ...`
fn event(line: &str) -> Option<Event> {
    let (name, rest) = line.trim().strip_prefix("event ")?.split_once(" at ")?;
    let (at, rest) = rest.split_once(" for domain ")?;
    let domain = rest.trim_start_matches('\'').split(['\'', ':', ' ']).next()?;
    Some((domain.to_owned(), name.to_owned(), at.parse().ok()?))
}

fn answer(ways: &mut HashMap<String, Way>, line: &str) -> Result<Value, String> {
    let words: Vec<&str> = line.split(' ').collect();
    let (way, words) = words.split_first().ok_or("no words")?;
    let way = ways.get_mut(*way).ok_or_else(|| format!("no way {way:?}"))?;
    way.answer(words)
}

fn main() -> Result<(), String> {
    slurm_vm::logging::init(false);
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [config, shared, initrd, core] = words.as_slice() else {
        return Err("usage: bench-migrate CONFIG SHARED INITRD CORE".into());
    };
    let mut ways = ways(&Arguments {
        config: config.into(),
        shared: Path::new(shared).into(),
        initrd: initrd.into(),
        core: core.parse().map_err(|_| format!("core {core:?} is not a number"))?,
    })?;
    let mut out = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(text)?;
        let answer = answer(&mut ways, line.trim()).unwrap_or_else(|e| json!({"error": e}));
        writeln!(out, "{answer}").and_then(|()| out.flush()).map_err(text)?;
    }
    Ok(())
}
