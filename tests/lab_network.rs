//! A guest's network: what a process of its user on the node reaches, the same after a move, and never the node's loopback.
mod common;

use std::time::Instant;

use common::{
    WebServer,
    moves::{Mover, lab},
};
use xtask::Options;

/// Asks a server of the login host and prints the answer, until there is a file `stop`.
const ASKS: &str = "#!/bin/bash
ask() { printf 'GET /net/word HTTP/1.0\\r\\n\\r\\n' | nc -w 3 $1 $2 2>/dev/null | tail -n 1; }
ifconfig eth0 | grep -o 'inet addr:[0-9.]*'
for where in '127.0.0.1 8080' '10.0.2.2 8080' '10.0.2.3 8080' '169.254.1.1 8080'; do echo \"$where: $(ask $where)\"; done
while [ ! -e stop ]; do echo \"answer $(ask 10.77.0.1 8000)\"; sleep 0.3; done
ifconfig eth0 | grep -o 'inet addr:[0-9.]*'
";

#[test]
fn a_guest_reaches_what_its_user_does_before_and_after_a_move_and_not_the_nodes_loopback() {
    let options = Options {
        nodes: 2,
        companions: true,
        grace_s: 30,
        ..Options::default()
    };
    let lab = lab("net", options);
    let _server = WebServer::on(&lab, "ctl", "10.77.0.1", 8000);
    // What a process on the node would get from its own loopback.
    let _own = WebServer::on(&lab, "n1", "127.0.0.1", 8080);
    let m = Mover::new(&lab, "net", 2);
    m.t.script("asks.sh", ASKS);
    m.t.script("word", "a-word");
    let job = m.t.submit("--vm=tiny --vm-net=user -p low -w n1 -o out asks.sh");
    m.t.wait_text("out", "answer a-word");
    let high = m.take("n1", 3);
    m.started(high, Instant::now());
    m.wait_vm(job, "running");
    assert_eq!(m.ways(job), ["live"]);
    let before = m.lines("out");
    m.wait_lines("out", before + 5);
    std::fs::write(m.t.path("stop"), "").unwrap();
    m.completed(job, 1);
    let out = m.t.text("out");
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines.first(), Some(&"inet addr:10.0.2.15"), "{out}");
    assert_eq!(lines.last(), lines.first(), "{out}");
    for own in &lines[1..5] {
        assert!(own.ends_with(": "), "the node's loopback answers: {own}");
    }
    let answers = &lines[5..lines.len() - 1];
    assert!(
        answers[answers.len() - 3..].iter().all(|a| *a == "answer a-word"),
        "after the move: {out}"
    );
    let lost = answers.iter().filter(|a| **a != "answer a-word").count();
    assert!(lost <= 1, "only a question that was open at the move is lost: {out}");
    // Saved and restored as well.
    let full = m.fill("n2");
    std::fs::remove_file(m.t.path("stop")).unwrap();
    let job = m.t.submit("--vm=tiny --vm-net=user -p low -w n1 -o out2 asks.sh");
    m.t.wait_text("out2", "answer a-word");
    let high = m.take("n1", 5);
    m.started(high, Instant::now());
    assert_eq!(m.vm_state(job), "saved");
    m.give_back(full);
    m.wait_vm(job, "running");
    let before = m.lines("out2");
    m.wait_lines("out2", before + 5);
    std::fs::write(m.t.path("stop"), "").unwrap();
    m.completed(job, 1);
    let out = m.t.text("out2");
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(
        lines[lines.len() - 3..],
        ["answer a-word", "answer a-word", "inet addr:10.0.2.15"],
        "{out}"
    );
    let refused = m.t.sh("sbatch --vm=tiny --vm-net=host --wrap true");
    assert!(refused.err.contains("--vm-net: 'host' is not a network"), "{refused:?}");
    m.nothing_left();
    lab.down().expect("down");
}

/// passt ends when it has handed its state over, before it is known whether the guest runs there.
#[test]
fn a_network_comes_back_after_a_move_that_failed_and_after_its_process_was_killed() {
    let options = Options {
        nodes: 2,
        companions: true,
        ..Options::default()
    };
    let lab = lab("netback", options);
    let _server = WebServer::on(&lab, "ctl", "10.77.0.1", 8000);
    let m = Mover::new(&lab, "netback", 2);
    let script = ASKS
        .replace("/net/word", "/netback/word")
        .replace("ask() {", "exec 3>gone; rm gone\nask() {");
    m.t.script("asks.sh", &script);
    m.t.script("word", "a-word");
    let job = m.t.submit("--vm=tiny --vm-net=user -w n1 -o out asks.sh");
    let answered = |more: usize| {
        let answers = || m.t.text("out").lines().filter(|l| *l == "answer a-word").count();
        let before = answers();
        common::wait("answers over the network", || (answers() >= before + more).then_some(()));
    };
    m.t.wait_text("out", "answer a-word");
    // The file that is open and deleted fails the move in its very last phase.
    let said = m.t.sh(&format!("svm migrate {job} n2"));
    assert!(said.err.contains("open in the guest and deleted"), "{said:?}");
    answered(5);
    let killed = lab.node(
        "n1",
        &[
            "sh",
            "-c",
            "kill -9 $(cut -d' ' -f1 /var/lib/slurm-vm/vms/slurm-*/slurm-vm-net.pid)",
        ],
    );
    assert!(killed.status.success());
    answered(5);
    std::fs::write(m.t.path("stop"), "").unwrap();
    m.completed(job, 0);
    m.nothing_left();
    lab.down().expect("down");
}
