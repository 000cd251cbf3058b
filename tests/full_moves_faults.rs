//! Moves that fail: the VM goes on at its source or by the next way of the chain; never two copies, never none.
mod common;

use std::{process::Stdio, time::Instant};

use common::{
    Said,
    moves::{Count, Mover, OneCopy, lab},
    wait, wait_with,
};
use xtask::{Lab, Options};

const NUMBERS: usize = 200;

fn up(name: &str) -> Lab {
    lab(
        name,
        Options {
            nodes: 2,
            grace_s: 40,
            ..Options::default()
        },
    )
}

/// Preempts a counter on n1 once and expects these ways, one restart and an output that is whole.
fn preempted(m: &Mover, out: &str, count: Count, at: impl FnOnce(u32)) -> u32 {
    let job = m.count(count, out, "-w n1");
    m.wait_lines(out, 5);
    let copies = OneCopy::watch(m.lab, &m.nodes, job);
    let high = m.take("n1", 3);
    at(job);
    m.started(high, Instant::now());
    m.completed(job, 1);
    copies.check();
    m.check(out, count.numbers);
    m.t.end_of(high);
    job
}

/// What the controller noted of a job's moves.
fn noted(m: &Mover, job: u32) -> String {
    let log = m.lab.log_tail("ctl", "slurm-vmd", 400).unwrap_or_default();
    log.lines()
        .filter(|l| l.contains(&format!("job {job}:")))
        .fold(String::new(), |s, l| s + l + "\n")
}

#[test]
fn a_failed_import_leaves_the_guest_at_its_source_and_a_preempted_one_is_saved() {
    let lab = up("import");
    let m = Mover::new(&lab, "import", 2);
    m.arm("n2", "peers.admit.before=fail@1,peers.admit.after=fail@1,peers.admit.before=fail@2");
    let job = m.count(Count::to(250), "hand", "-w n1");
    m.wait_lines("hand", 5);
    let copies = OneCopy::watch(&lab, &m.nodes, job);
    for _ in 0..2 {
        let said = m.t.sh(&format!("svm migrate {job} n2"));
        assert_eq!(said.code, Some(1), "{said:?}");
        assert!(said.err.contains("fault injected"), "{said:?}");
        m.wait_vm(job, "running");
        assert_eq!(m.t.job(job)["NodeList"], "n1");
        let lines = m.lines("hand");
        m.wait_lines("hand", lines + 3);
    }
    let high = m.take("n1", 3);
    m.started(high, Instant::now());
    m.completed(job, 1);
    copies.check();
    m.check("hand", 250);
    let ways = m.ways(job);
    println!("{ways:?}\n{}", noted(&m, job));
    assert!(ways == ["save", "restore"] || ways == ["live"], "{ways:?}");
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn with_the_destinations_agent_stopped_it_is_saved() {
    let lab = up("stopped");
    let m = Mover::new(&lab, "stopped", 2);
    let job = preempted(&m, "out", Count::to(NUMBERS), |_| {
        lab.stop("n2", "slurm-vmd").expect("stops");
    });
    println!("{}", noted(&m, job));
    assert_eq!(m.ways(job), ["save", "restore"]);
    lab.start("n2", "slurm-vmd").expect("starts");
    m.wait_healthy();
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn with_the_line_cut_in_mid_stream_it_goes_by_the_next_way() {
    let lab = up("cut");
    let m = Mover::new(&lab, "cut", 2);
    m.set("n1", "node", "move_bandwidth_mib_s = 4");
    let count = Count {
        numbers: 350,
        memory_mib: 128,
        rewrite_mib: 1,
    };
    let job = preempted(&m, "out", count, |job| {
        m.wait_vm(job, "leaving");
        lab.cut("n1", "n2").expect("cut");
    });
    println!("{}", noted(&m, job));
    assert_eq!(m.ways(job), ["save", "restore"]);
    lab.heal("n1", "n2").expect("heal");
    m.wait_healthy();
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn a_source_that_loses_power_in_mid_copy_leaves_the_run_that_began_meanwhile_alone() {
    let lab = up("power");
    let m = Mover::new(&lab, "power", 2);
    m.set("n1", "node", "move_bandwidth_mib_s = 2");
    let count = Count {
        numbers: 250,
        memory_mib: 128,
        rewrite_mib: 1,
    };
    let job = m.count(count, "out", "-w n1");
    // The more the first run has written, the more of the second one's output its offsets would swallow.
    m.wait_lines("out", 150);
    let first = boot_of(&m, "out").expect("a line");
    let mut migrate = lab
        .command("ctl", "root", &["svm", "migrate", &job.to_string(), "n2"])
        .expect("a command");
    let mut migrate = migrate.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("svm");
    m.as_soon_as_on("n2", &format!("virsh list --all --name | grep -qx slurm-{job}-0"), "true");
    assert_eq!(m.vm_state(job), "leaving");
    lab.power("n1", false).expect("off");
    let off = Instant::now();
    m.lab
        .node("ctl", &["scontrol", "update", "nodename=n1", "state=down", "reason=power"]);
    m.lab
        .node("ctl", &["scontrol", "update", &format!("jobid={job}"), "reqnodelist=n2"]);
    wait("the second run's output", || {
        (m.lines("out") >= 3 && boot_of(&m, "out").is_some_and(|boot| boot != first)).then_some(())
    });
    assert_eq!(m.t.job(job)["NodeList"], "n2");
    println!("the second run writes {:.1} s after the power loss", off.elapsed().as_secs_f32());
    lab.power("n1", true).expect("on");
    m.wait_log("n1", &format!("job {job}: the guest is "));
    let lines = m.lines("out");
    assert!(lines < 150, "n1 came back too late to do harm: {lines} lines");
    m.completed(job, 1);
    m.check("out", count.numbers);
    println!("{:?}", migrate.wait().expect("svm ends"));
    let log = lab.log_tail("n1", "slurm-vmd", 400).unwrap_or_default();
    assert!(log.contains(&format!("job {job}: the guest is Nowhere")), "{log}");
    m.wait_healthy();
    // What libvirt made for a QEMU that died with its node is libvirt's own.
    let mut left = Vec::new();
    wait_with("nothing to be left", &mut left, |left| {
        *left = m.t.left_of(job);
        left.retain(|l| !l.contains("/var/lib/libvirt/qemu/domain-"));
        left.is_empty()
    });
    lab.down().expect("down");
}

/// The guest that wrote the first line.
fn boot_of(m: &Mover, out: &str) -> Option<String> {
    let text = m.t.text(out);
    text.lines().next()?.split(' ').nth(2).map(str::to_owned)
}

#[test]
fn without_space_for_the_save_it_starts_over_and_says_why() {
    let lab = up("space");
    let m = Mover::new(&lab, "space", 2);
    // Seen before: too little room for memory. Not seen before: the file system of the saves is full half way.
    for (out, mount, size) in [("seen", "/shared/slurm-vm", "90m"), ("unseen", "/shared/slurm-vm/saves", "40m")] {
        lab.node(
            "n1",
            &[
                "sh",
                "-c",
                &format!(
                    "id=$(cat /shared/slurm-vm/.storage-id); mkdir -p {mount}; mount -t tmpfs -o size={size},mode=0755 none {mount}; \
                     cd /shared/slurm-vm && mkdir -p overlays saves && echo \"$id\" > .storage-id"
                ),
            ],
        );
        let full = m.fill("n2");
        let count = Count {
            numbers: 80,
            memory_mib: 64,
            rewrite_mib: 1,
        };
        let job = preempted(&m, out, count, |_| {});
        let noted = noted(&m, job);
        println!("{noted}");
        assert!(noted.contains("not saved: "), "{noted}");
        assert!(noted.contains("requeued to start over"), "{noted}");
        m.give_back(full);
        m.t.leaves_nothing(job);
        lab.node("n1", &["umount", mount]);
    }
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn a_destination_with_another_cpu_model_is_refused_and_it_is_saved() {
    let lab = up("cpu");
    let m = Mover::new(&lab, "cpu", 2);
    m.set("n2", "hypervisor", "cpu_model = \"Nehalem\"");
    let job = preempted(&m, "out", Count::to(NUMBERS), |_| {});
    let noted = noted(&m, job);
    assert!(noted.contains("its CPU model is `Nehalem`"), "{noted}");
    assert_eq!(m.ways(job), ["save", "restore"]);
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn a_destination_of_another_release_is_refused_at_the_handshake_and_it_is_saved() {
    let lab = up("version");
    let m = Mover::new(&lab, "version", 2);
    m.arm("n2", "handshake.version=fail@*");
    let job = preempted(&m, "out", Count::to(NUMBERS), |_| {});
    let noted = noted(&m, job);
    assert!(noted.contains("find a common version"), "{noted}");
    assert_eq!(m.ways(job), ["save", "restore"]);
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn a_full_destination_without_shared_storage_is_refused() {
    let lab = lab(
        "full",
        Options {
            nodes: 2,
            grace_s: 40,
            shared: false,
            ..Options::default()
        },
    );
    let m = Mover::new(&lab, "full", 2);
    lab.fill("n2", true).expect("fill");
    let job = m.count(Count::to(100), "out", "-w n1");
    m.wait_lines("out", 5);
    let said: Said = m.t.sh(&format!("svm migrate {job} n2"));
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.err.contains("n2 is not healthy: "), "{said:?}");
    lab.fill("n2", false).expect("room again");
    m.wait_healthy();
    let said: Said = m.t.sh(&format!("svm migrate {job} n2"));
    assert_eq!(said.code, Some(0), "{said:?}");
    m.completed(job, 1);
    m.check("out", 100);
    m.nothing_left();
    lab.down().expect("down");
}
