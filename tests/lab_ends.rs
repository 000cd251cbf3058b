//! How jobs with a VM end in the lab when they do not end by themselves: one clear line, the right state, nothing left.
mod common;

use std::sync::{OnceLock, RwLock};

use common::{Alice, Image, added, images, look, start, wait_with};
use xtask::{Lab, Options};

/// The test that compares whole nodes wants them for itself.
static ALONE: RwLock<()> = RwLock::new(());

const TRAP: &str = "#!/bin/sh\ntrap 'echo got TERM; exit 5' TERM\necho ready\nwhile :; do sleep 0.2; done\n";
const DEAF: &str = "#!/bin/sh\ntrap '' TERM\necho ready\nwhile :; do sleep 0.2; done\n";
const LONG: &str = "#!/bin/sh\necho ready\nsleep 1000\n";

fn lab() -> &'static Lab {
    static LAB: OnceLock<Lab> = OnceLock::new();
    LAB.get_or_init(|| {
        let conf = images(&[
            // No helper of ours comes up in it.
            Image {
                name: "mute",
                cmdline: "console=ttyS0 quiet rdinit=/bin/cat",
            },
            Image {
                name: "unbootable",
                cmdline: "console=ttyS0 quiet rdinit=/absent init=/absent",
            },
            Image {
                name: "halting",
                cmdline: "console=ttyS0 quiet slurm_vm.poweroff_after=3",
            },
            Image {
                name: "panicking",
                cmdline: "console=ttyS0 quiet slurm_vm.panic_after=3",
            },
        ]);
        let options = Options {
            grace_s: 20,
            agent_conf: conf,
            ..Options::named("t-ends")
        };
        start(&options, &["mute", "unbootable", "halting", "panicking"])
    })
}

fn ends(name: &'static str, image: &str, script: &str, args: &str) -> (Alice<'static>, u32) {
    let t = Alice::new(lab(), name);
    t.script("job.sh", script);
    let job = t.submit(&format!("--vm={image} -o out {args} job.sh"));
    (t, job)
}

fn of(state: &str, code: &str) -> (String, String) {
    (state.to_owned(), code.to_owned())
}

#[test]
fn a_cancelled_program_gets_sigterm_and_the_output_one_line() {
    let _with = ALONE.read();
    let (t, job) = ends("cancel", "tiny", TRAP, "");
    t.wait_text("out", "ready");
    t.sh(&format!("scancel {job}"));
    assert_eq!(t.end_of(job), of("CANCELLED", "5:0"));
    let text = t.text("out");
    let lines: Vec<&str> = text.lines().filter(|l| *l != "Terminated").collect();
    assert!(lines[0] == "ready" && lines[1] == "got TERM", "{text}");
    assert!(
        lines.len() == 3 && lines[2].starts_with(&format!("slurm-vm: job {job} on n")) && lines[2].ends_with(": cancelled"),
        "{text}"
    );
    t.leaves_nothing(job);
}

#[test]
fn a_program_that_ignores_sigterm_is_killed_after_kill_wait() {
    let _with = ALONE.read();
    let (t, job) = ends("deaf", "tiny", DEAF, "");
    t.wait_text("out", "ready");
    t.sh(&format!("scancel {job}"));
    assert_eq!(t.end_of(job), of("CANCELLED", "0:9"));
    let text = t.text("out");
    assert!(text.lines().count() == 2 && text.ends_with(": cancelled\n"), "{text}");
    t.leaves_nothing(job);
}

#[test]
fn a_batch_job_at_its_time_limit_gets_sigterm_and_the_output_says_so() {
    let _with = ALONE.read();
    let (t, job) = ends("limit", "tiny", TRAP, "-t 1");
    assert_eq!(t.end_of(job), of("TIMEOUT", "5:0"));
    let text = t.text("out");
    assert!(text.contains("got TERM\n") && text.ends_with(": time limit reached\n"), "{text}");
    t.leaves_nothing(job);
}

#[test]
fn a_guest_that_does_not_come_up_is_a_boot_timeout() {
    let _with = ALONE.read();
    let (t, job) = ends("mute", "mute", LONG, "--vm-boot-timeout=6");
    assert_eq!(t.end_of(job), of("FAILED", "124:0"));
    let text = t.text("out");
    assert!(
        text.lines().count() == 1 && text.starts_with(&format!("slurm-vm: job {job}: ")),
        "{text}"
    );
    t.leaves_nothing(job);
}

#[test]
fn a_kernel_that_cannot_boot_is_told_at_once() {
    let _with = ALONE.read();
    let (t, job) = ends("unbootable", "unbootable", LONG, "--vm-boot-timeout=100");
    let (state, code) = t.end_of(job);
    let text = t.text("out");
    println!("{state} {code}: {text}");
    assert_eq!((state.as_str(), code.as_str()), ("FAILED", "124:0"));
    assert!(
        text.lines().count() == 1 && text.starts_with(&format!("slurm-vm: job {job}: ")),
        "{text}"
    );
    t.leaves_nothing(job);
}

#[test]
fn a_guest_that_powers_off_is_lost() {
    let _with = ALONE.read();
    let (t, job) = ends("halting", "halting", LONG, "");
    assert_eq!(t.end_of(job), of("FAILED", "123:0"));
    let text = t.text("out");
    assert!(
        text.starts_with("ready\nslurm-vm: ") && text.lines().count() == 2 && text.contains("powered off"),
        "{text}"
    );
    t.leaves_nothing(job);
}

#[test]
fn a_guest_whose_kernel_panics_is_lost() {
    let _with = ALONE.read();
    let (t, job) = ends("panicking", "panicking", LONG, "");
    assert_eq!(t.end_of(job), of("FAILED", "123:0"));
    let text = t.text("out");
    assert!(text.starts_with("ready\nslurm-vm: ") && text.lines().count() == 2, "{text}");
    t.leaves_nothing(job);
}

#[test]
fn a_guest_whose_qemu_is_killed_is_lost() {
    let _with = ALONE.read();
    let (t, job) = ends("killed", "tiny", LONG, "-w n1");
    t.wait_text("out", "ready");
    lab().node("n1", &["sh", "-c", &format!("kill -9 $(cat /run/libvirt/qemu/slurm-{job}-0.pid)")]);
    assert_eq!(t.end_of(job), of("FAILED", "123:0"));
    let text = t.text("out");
    assert!(text.starts_with("ready\nslurm-vm: ") && text.lines().count() == 2, "{text}");
    t.leaves_nothing(job);
}

#[test]
fn a_job_cancelled_while_its_guest_boots_leaves_nothing() {
    let _with = ALONE.read();
    let (t, job) = ends("early", "mute", LONG, "--vm-boot-timeout=100 -w n2");
    wait_with("the domain", &mut Vec::new(), |left: &mut Vec<String>| {
        *left = t.left_of(job);
        left.iter().any(|l| l.contains("domain"))
    });
    t.sh(&format!("scancel {job}"));
    assert_eq!(t.end_of(job).0, "CANCELLED");
    t.leaves_nothing(job);
    let text = std::fs::read_to_string(t.path("out")).unwrap_or_default();
    println!("{text}");
    assert!(text.lines().count() <= 1, "{text}");
}

#[test]
fn the_nodes_are_after_all_this_as_they_were_before() {
    let _alone = ALONE.write();
    let nodes = ["n1", "n2"];
    let idle = || {
        common::wait("both nodes idle", || {
            let said: common::Said = lab().exec("root", &["sinfo", "-h", "-N", "-p", "low", "-o", "%T"]).into();
            (said.out == "idle\nidle\n").then_some(())
        });
    };
    idle();
    let before: Vec<Vec<String>> = nodes.iter().map(|n| look(lab(), n)).collect();
    println!("{} things on n1", before[0].len());
    let (t, cancelled) = ends("all1", "tiny", TRAP, "");
    let (_, lost) = ends("all2", "halting", LONG, "");
    let (_, failed) = ends("all3", "mute", LONG, "--vm-boot-timeout=5");
    let (_, fine) = ends("all4", "tiny", "#!/bin/sh\necho ready\n", "");
    assert!(t.sh("srun --vm=tiny -N2 true").code == Some(0));
    t.wait_text("out", "ready");
    t.sh(&format!("scancel {cancelled}"));
    for job in [cancelled, lost, failed, fine] {
        t.end_of(job);
    }
    idle();
    let mut new = Vec::new();
    wait_with("nodes as they were", &mut new, |new: &mut Vec<String>| {
        *new = nodes.iter().zip(&before).flat_map(|(n, b)| added(b, &look(lab(), n))).collect();
        new.is_empty()
    });
    common::no_node_is_drained(lab());
}
