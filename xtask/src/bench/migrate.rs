//! A live move by the agents, in the clear and encrypted, against `virsh migrate --live --p2p`.
//!
//! Three VMs of one kind, one per way of moving; those whose turn it is not are paused, so that one guest runs at a time. A node's QEMUs have one core,
//! the other node's another one, where there are two: so the QEMUs of a move do not wait for each other. Each turn moves its VM to
//! the other node. The gap is taken from QEMU's own times of STOP at the source and RESUME at the destination; the guest's clock stands still in
//! between, so that a counter in the guest cannot see it; what the guest does see, before and after, is the counter's largest step.

use super::{
    Common, SHARED,
    helper::Helper,
    lab, lines, machine, memory,
    paired::{self, Question, Sample, Scale},
    publish,
    report::Report,
    set_up, shared,
};
use crate::{
    Result,
    error::At,
    image::Archive,
    lab::{CTL, Lab, Options, address},
    paths, proc, stage,
};
use std::{thread::sleep, time::Duration};

const COUNTER: &str = include_str!("counter.c");
const NODES: [&str; 2] = ["n1", "n2"];
/// The ways of moving, as the helpers call them.
const WAYS: [&str; 3] = ["virsh", "plain", "encrypted"];
/// What a guest runs before it is moved, and after.
const SETTLE: Duration = Duration::from_millis(400);

/// Memory that is made ready for the QEMU at the destination: more than guest and QEMU will touch.
const TOUCHED_MIB: usize = 512;

/// The helpers on both nodes, and on which of them the VM of each way is.
struct Nodes {
    helpers: [Helper; 2],
    at: [usize; WAYS.len()],
}

impl Nodes {
    fn ask(&mut self, node: usize, way: usize, words: &str) -> Result<Sample> {
        self.helpers[node].ask(&format!("{} {words}", WAYS[way]))
    }

    fn boot(&mut self, way: usize) -> Result<()> {
        self.ask(1, way, "expect")?;
        self.ask(0, way, "boot")?;
        self.ask(0, way, "suspend")?;
        Ok(())
    }

    fn turn(&mut self, way: usize) -> Result<Sample> {
        let (from, to) = (self.at[way], 1 - self.at[way]);
        self.ask(from, way, "resume")?;
        sleep(SETTLE);
        for node in [from, to] {
            self.ask(node, way, "clear")?;
        }
        memory::touch(TOUCHED_MIB)?;
        let there = NODES[to];
        let uri = format!("qemu+unix:///system?socket={SHARED}/run-{there}/libvirt-sock");
        let mut sample = self.ask(from, way, &format!("move {there} {} {uri}", address(there)?))?;
        sleep(SETTLE);
        let (left, came) = (self.ask(from, way, "seen")?, self.ask(to, way, "seen")?);
        self.ask(to, way, "suspend")?;
        self.at[way] = to;
        let (Some(stop), Some(resume)) = (left.get("stop"), came.get("resume")) else {
            return Err(format!("QEMU's events did not come: {left:?} {came:?}").into());
        };
        sample.insert("gap_ms".into(), (resume - stop) * 1000.0);
        if let (Some(began), Some(started), Some(total)) = (sample.remove("began"), came.get("started"), sample.get("total_ms").copied()) {
            sample.insert("prepare_ms".into(), (started - began) * 1000.0);
            sample.insert("until_stop_ms".into(), (stop - started) * 1000.0);
            sample.insert("finish_ms".into(), total - (resume - began) * 1000.0);
        }
        let step = [&left, &came]
            .iter()
            .filter_map(|s| s.get("step_ms"))
            .fold(0.0_f64, |a, b| a.max(*b));
        sample.insert("guest_step_ms".into(), step);
        if let Some(bytes) = came.get("counted_bytes") {
            sample.insert("moved_mib".into(), bytes / f64::from(1 << 20));
        }
        if let Some(bytes) = sample.remove("sent_bytes") {
            sample.insert("line_mib".into(), bytes / f64::from(1 << 20));
        }
        Ok(sample)
    }
}

/// Runs the bench. `line_mbit`: what each node can send, in Mbit/s; 0: as much as the machine's memory carries.
pub fn run(common: &Common, pairs: usize, line_mbit: u32) -> Result<Report> {
    let built = stage::build_release()?;
    let lab = lab(common, Options::default())?;
    for host in [CTL, "n1", "n2"] {
        lab.stop(host, "slurm-vmd")?;
    }
    for node in NODES {
        open_libvirt(&lab, node)?;
        lines(&lab, node, line_mbit)?;
    }
    let program = publish(&lab, &built.join("examples/bench-migrate"))?;
    let initrd = image(&lab)?;
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let start = |k: usize| {
        let core = (k % cores).to_string();
        Helper::start(&lab, NODES[k], &[&program, "/etc/slurm-vm/slurm-vm.toml", SHARED, &initrd, &core])
    };
    let mut nodes = Nodes {
        helpers: [start(0)?, start(1)?],
        at: [0; WAYS.len()],
    };
    for way in 0..WAYS.len() {
        nodes.boot(way)?;
        // Not measured: it begins otherwise than it goes on, pinned by its XML.
        nodes.turn(way)?;
    }
    let mut notes = machine::notes(&lab, "n1");
    notes.push("guest: 256 MiB, 1 vCPU, a counter that runs without pause and writes little memory; shared storage".into());
    notes.push(machine::line(line_mbit));

    let arms = ["virsh", "ours, in the clear", "virsh again", "ours, encrypted"];
    let way_of = [0, 1, 0, 2];
    let question = |title: &str, number, ours, goal, goal_p95| Question {
        title: title.into(),
        number,
        base: 0,
        ours,
        control: (0, 2),
        scale: Scale::Ratio,
        goal,
        goal_p95,
        margin: 0.05,
    };
    let questions = [
        question(
            "gap: QEMU stopped at the source until it runs at the destination",
            "gap_ms",
            1,
            Some(1.05),
            Some(1.10),
        ),
        question("total time", "total_ms", 1, Some(1.05), None),
        question(
            "gap: QEMU stopped at the source until it runs at the destination",
            "gap_ms",
            3,
            None,
            None,
        ),
        question("total time", "total_ms", 3, None, None),
        question(
            "largest step of the guest's own clock around the move",
            "guest_step_ms",
            1,
            None,
            None,
        ),
        question("bytes moved, by libvirt's count", "moved_mib", 1, None, None),
    ];
    let mut report = paired::run("migrate", &arms, &questions, common.limits(pairs, 1000), |arm| {
        nodes.turn(way_of[arm])
    })?;
    notes.push(machine::load("load average at the end"));
    report.notes = notes;
    Ok(report)
}

/// Puts the socket of a node's libvirtd where the other node sees it: then the other libvirtd reaches it with nothing in between. The rest of
/// /run/libvirt stays in memory, as on any node: libvirt syncs a domain's state to it while the guest stands still.
fn open_libvirt(lab: &Lab, node: &str) -> Result<()> {
    lab.stop(node, "libvirtd")?;
    paths::dir(shared(lab).join(format!("run-{node}")), 0o755)?;
    let inside = format!("{SHARED}/run-{node}");
    let open = format!(
        "echo 'unix_sock_dir = \"{inside}\"' >> /etc/libvirt/libvirtd.conf\n\
         ln -sf {inside}/libvirt-sock /run/libvirt/libvirt-sock"
    );
    set_up(lab, node, &["sh", "-ec", &open])?;
    lab.start(node, "libvirtd")?;
    let answers = || {
        lab.node(node, &["virsh", "-q", "-c", "qemu:///system", "list"])
            .status
            .success()
            .then_some(())
    };
    proc::wait_for(Duration::from_secs(20), answers).ok_or_else(|| format!("libvirtd on {node} does not come back").into())
}

/// The image tiny with the counter started before its init; gives the path of its initrd in the lab.
fn image(lab: &Lab) -> Result<String> {
    let dir = paths::target().join("bench");
    paths::dir(&dir, 0o755)?;
    let (source, program) = (dir.join("counter.c"), dir.join("counter"));
    paths::file(&source, 0o644, COUNTER)?;
    let (from, to) = (source.to_string_lossy(), program.to_string_lossy());
    let flags = ["-O2", "-static", "-nostdlib", "-fno-stack-protector", "-fno-builtin", "-o"];
    let words: Vec<&str> = flags.into_iter().chain([&*to, &*from]).collect();
    proc::run("cc", &words)?;
    let counter = std::fs::read(&program).at("read", &program)?;

    let mut more = Archive::default();
    more.directory("bench", 0o755);
    more.file("bench/counter", 0o755, &counter);
    more.file("bench/init", 0o755, b"#!/bin/sh\n/bench/counter &\nexec /init\n");
    let tiny = crate::image::build()?.join("initrd");
    let mut bytes = std::fs::read(&tiny).at("read", &tiny)?;
    // The kernel looks for the next archive at a multiple of four.
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(more.finish());
    paths::file(shared(lab).join("initrd"), 0o644, bytes)?;
    Ok(format!("{SHARED}/initrd"))
}
