//! What the shim does when the node is at fault: there is no agent, and Slurm is played by two scripts.
use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::ExitStatusExt},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use crate::agent::{Bench, DEADLINE, Shim};

/// A `squeue` that knows the job's state, and a `scontrol` that notes its arguments and ends with a code.
fn slurm(bench: &Bench, state: &str, code: i32) -> PathBuf {
    let asked = bench.path("asked");
    let scontrol = format!(
        "echo \"$@\" > {}; echo 'Requested operation is presently disabled' >&2; exit {code}",
        asked.display()
    );
    for (name, line) in [
        ("scontrol", scontrol),
        ("squeue", format!("echo 11 11 N/A PENDING; echo 12 12 N/A {state}")),
    ] {
        fs::write(bench.path(name), format!("#!/bin/sh\n{line}\n")).unwrap();
        fs::set_permissions(bench.path(name), fs::Permissions::from_mode(0o755)).unwrap();
    }
    bench.dir.path().to_owned()
}

#[test]
fn an_absent_agent_sends_a_batch_job_back_to_the_queue() {
    let bench = Bench::without_agent();
    let mut command = bench.batch();
    command
        .env("SLURM_VM_SLURM_BIN", slurm(&bench, "RUNNING", 0))
        .env("SLURM_VM_CONNECT_TIMEOUT", "1");
    let shim = Shim::spawn(command);
    let until = Instant::now() + DEADLINE;
    while !fs::read_to_string(bench.path("asked")).is_ok_and(|t| t == "requeuehold Incomplete State=SpecialExit 12\n") {
        assert!(Instant::now() < until, "no requeue");
        thread::sleep(Duration::from_millis(5));
    }
    shim.signal(15);
    let (status, out, err) = shim.finish();
    assert_eq!((status.code(), out.as_str(), err.as_str()), (Some(0), "", ""));
}

#[test]
fn a_node_fault_is_told_when_the_job_cannot_be_requeued() {
    let bench = Bench::without_agent();
    let mut command = bench.batch();
    command
        .env("SLURM_VM_SLURM_BIN", slurm(&bench, "RUNNING", 1))
        .env("SLURM_VM_CONNECT_TIMEOUT", "1");
    let (status, _, err) = Shim::spawn(command).finish();
    assert_eq!(status.code(), Some(125));
    assert!(
        err.starts_with("slurm-vm: job 12: the agent on this node does not answer at "),
        "{err}"
    );
    assert!(
        err.ends_with("(node n1; the requeue failed to have Slurm accept it: Requested operation is presently disabled)\n"),
        "{err}"
    );

    let mut command = bench.step();
    command.env("SLURM_VM_CONNECT_TIMEOUT", "1");
    let (status, _, err) = Shim::spawn(command).finish();
    assert_eq!((status.code(), err.lines().count()), (Some(125), 1), "{err}");
}

#[test]
fn a_job_that_slurm_is_ending_already_is_not_brought_back_by_a_requeue() {
    for state in ["COMPLETING", "CANCELLED", "TIMEOUT"] {
        let bench = Bench::without_agent();
        let mut command = bench.batch();
        command
            .env("SLURM_VM_SLURM_BIN", slurm(&bench, state, 0))
            .env("SLURM_VM_CONNECT_TIMEOUT", "1");
        let (status, out, err) = Shim::spawn(command).finish();
        assert_eq!((status.signal(), out.as_str(), err.as_str()), (Some(15), "", ""), "{state}");
        assert!(!bench.path("asked").exists(), "{state}: it asked for a requeue");
    }
}
