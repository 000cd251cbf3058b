//! What others than the owner of a job and root can reach or use up on a node: tried in the lab as another user.
mod common;

use std::{
    io::{BufRead, BufReader},
    process::Stdio,
    sync::OnceLock,
    time::Instant,
};

use common::{Alice, DEADLINE, Said, start};
use xtask::{Lab, Options};

/// bob's uid.
const BOB: &str = "2002";

fn lab() -> &'static Lab {
    static LAB: OnceLock<Lab> = OnceLock::new();
    LAB.get_or_init(|| start(&Options::named("t-doors"), &[]))
}

fn root(host: &str, line: &str) -> Said {
    lab().node(host, &["bash", "-c", line]).into()
}

#[test]
fn a_member_of_qemus_group_reaches_nothing_of_another_users_vm() {
    let t = Alice::new(lab(), "private");
    t.script("job.sh", "#!/bin/sh\necho ready\nsleep 1000\n");
    let job = t.submit("--vm=tiny -w n1 -o out job.sh");
    t.wait_text("out", "ready");
    let listed = root(
        "n1",
        &format!(
            "find /run/slurm-vm/vm/slurm-{job}-0 /var/lib/slurm-vm/vms/slurm-{job}-0 /shared/slurm-vm/overlays/slurm-{job}-0.* -printf '%M %u %g %p\\n'"
        ),
    );
    println!("{}", listed.out);
    for what in ["guest.sock", "record.json", "journal.log", "serial.log", ".qcow2"] {
        assert!(listed.out.lines().any(|l| l.ends_with(what)), "no {what} among\n{}", listed.out);
    }
    // bob in the group that QEMU runs with, as sites give people /dev/kvm.
    let group = root("n1", "stat -c %g /shared/slurm-vm/overlays").out.trim().to_owned();
    let mut reached = Vec::new();
    for path in listed.out.lines().filter_map(|l| l.split_whitespace().last()) {
        for may in ["-r", "-w"] {
            let test = format!("setpriv --reuid={BOB} --regid={BOB} --groups={group} test {may} {path}");
            if root("n1", &test).code == Some(0) {
                reached.push(format!("{may} {path}"));
            }
        }
    }
    assert!(reached.is_empty(), "{reached:?}");
    t.sh(&format!("scancel {job}"));
    t.leaves_nothing(job);
}

#[test]
fn two_thousand_dripping_connections_of_bob_keep_no_job_of_alices_from_its_vm() {
    let t = Alice::new(lab(), "drip");
    t.script("client.pl", include_str!("doors/client.pl"));
    let client = format!("ulimit -n 8192; exec perl /shared/home/alice/drip/client.pl {BOB} /run/slurm-vm/agent.sock drip 2000");
    let mut dripping = lab()
        .command("n2", "root", &["bash", "-c", &client])
        .and_then(|mut c| c.stdout(Stdio::piped()).spawn().map_err(|e| e.to_string().into()))
        .expect("connections");
    let mut said = BufReader::new(dripping.stdout.take().unwrap()).lines().map_while(Result::ok);
    println!("{}", said.next().expect("connections"));
    t.script("job.sh", "#!/bin/sh\necho ready\nsleep 1\necho done\n");
    let job = t.submit("--vm=tiny -w n2 -o out job.sh");
    assert_eq!(t.end_of(job), ("COMPLETED".to_owned(), "0:0".to_owned()));
    assert_eq!(t.text("out"), "ready\ndone\n");
    t.leaves_nothing(job);
    // All that drip are cut in the end.
    let begun = Instant::now();
    let mut last = String::new();
    while begun.elapsed() < DEADLINE
        && let Some(line) = said.next()
    {
        last = line;
    }
    assert!(last.starts_with("open 0 "), "{last}");
    let _ = dripping.wait();
    // Bob is served again.
    let again: Said = lab()
        .node("n2", &["setpriv", "--reuid", BOB, "--regid", BOB, "--clear-groups", "svm", "list"])
        .into();
    assert_eq!(again.code, Some(0), "{again:?}");
}
