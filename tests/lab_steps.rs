//! srun and salloc with a VM in the lab.
mod common;

use std::{
    collections::BTreeSet,
    io::Write,
    process::{Output, Stdio},
    sync::OnceLock,
};

use common::{Alice, start};
use sha2::{Digest, Sha256};
use xtask::{Lab, Options};

fn lab() -> &'static Lab {
    static LAB: OnceLock<Lab> = OnceLock::new();
    LAB.get_or_init(|| {
        start(
            &Options {
                grace_s: 20,
                ..Options::named("t-steps")
            },
            &[],
        )
    })
}

/// Runs a line with standard input.
fn fed(t: &Alice, line: &str, input: &[u8]) -> Output {
    let mut child = t
        .command(line)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a command");
    let mut stdin = child.stdin.take().expect("its input");
    let bytes = input.to_vec();
    let writer = std::thread::spawn(move || {
        let _ = stdin.write_all(&bytes);
    });
    let output = child.wait_with_output().expect("its end");
    writer.join().expect("the writer");
    println!("$ {line}\n[{}] {}", output.status, String::from_utf8_lossy(&output.stderr));
    output
}

#[test]
fn piped_input_reaches_the_program_and_its_output_the_pipe() {
    let t = Alice::new(lab(), "pipe");
    let input: Vec<u8> = (0u32..300_000).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    let output = fed(
        &t,
        "srun --vm=tiny sh -c 'tee /tmp/in | sha256sum; cat /tmp/in | wc -c; hostname; exit 3'",
        &input,
    );
    let sum = Sha256::digest(&input).iter().fold(String::new(), |s, b| s + &format!("{b:02x}"));
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[0], format!("{sum}  -"), "{out}");
    assert_eq!(lines[1], input.len().to_string());
    assert!(lines[2].starts_with("slurm-"), "{out}");
    assert_eq!(output.status.code(), Some(3));
}

#[test]
fn an_interactive_shell_has_a_terminal_of_its_size() {
    let t = Alice::new(lab(), "pty");
    // script(1) is the user's terminal. What is typed comes when the shell asks for it.
    let typed = b"test -t 0 && echo is-a-tty; stty size; hostname; exit 4\n";
    let output = fed(&t, "script -qefc 'stty rows 33 cols 101; srun --pty --vm=tiny sh' /dev/null", typed);
    let out = String::from_utf8_lossy(&output.stdout).replace('\r', "");
    println!("{out}");
    assert!(out.lines().any(|l| l == "is-a-tty"), "{out}");
    assert!(out.contains("33 101"), "{out}");
    assert!(out.lines().any(|l| l.starts_with("slurm-") && l.ends_with("-0")), "{out}");
    assert_eq!(output.status.code(), Some(4));
}

#[test]
fn the_steps_of_an_allocation_share_its_vm() {
    let t = Alice::new(lab(), "salloc");
    t.script(
        "steps.sh",
        "#!/bin/bash\nfor i in 1 2 3; do srun cat /proc/sys/kernel/random/boot_id; done\nsrun sh -c 'echo kept > /tmp/f'\nsrun cat /tmp/f\nsrun sh -c 'exit 5'; echo rc $?\nsrun absent; echo rc $?\nsrun /etc/passwd; echo rc $?\nhostname\n",
    );
    let said = t.sh("salloc --vm=tiny ./steps.sh");
    let lines: Vec<&str> = said.out.lines().collect();
    assert_eq!(lines[0].len(), 36, "{said:?}");
    assert_eq!((lines[1], lines[2]), (lines[0], lines[0]), "one boot for all steps");
    assert_eq!(lines[3..], ["kept", "rc 5", "rc 127", "rc 126", "ctl"]);
    assert!(said.err.contains("slurm-vm: absent: No such file or directory\n"), "{}", said.err);
    assert!(said.err.contains("slurm-vm: /etc/passwd: Permission denied\n"), "{}", said.err);
}

#[test]
fn the_tasks_of_a_step_on_two_nodes_run_in_their_nodes_vms() {
    let t = Alice::new(lab(), "tasks");
    let said = t.sh("srun --vm=tiny -n4 -N2 sh -c 'echo $SLURM_PROCID $SLURM_NODEID $(hostname) $(cat /proc/sys/kernel/random/boot_id)'");
    assert_eq!(said.code, Some(0), "{}", said.err);
    let mut lines: Vec<Vec<&str>> = said.out.lines().map(|l| l.split(' ').collect()).collect();
    lines.sort();
    let ranks: Vec<&str> = lines.iter().map(|l| l[0]).collect();
    assert_eq!(ranks, ["0", "1", "2", "3"], "{}", said.out);
    let of = |column: usize| lines.iter().map(|l| l[column]).collect::<BTreeSet<_>>();
    assert_eq!((of(1).len(), of(2).len(), of(3).len()), (2, 2, 2), "{}", said.out);
    for l in &lines {
        assert!(
            l[2].ends_with(&format!("-{}", l[1])),
            "the guest's name has the node's place: {l:?}"
        );
    }
}

#[test]
fn an_interrupted_step_is_over_and_leaves_nothing() {
    let t = Alice::new(lab(), "interrupt");
    t.script(
        "interrupted.sh",
        "#!/bin/bash\nsrun --vm=tiny sh -c 'echo $SLURM_JOB_ID; trap \"echo interrupted; exit 3\" INT; while :; do sleep 0.2; done' > out 2> err &\nsrun=$!\nfor i in $(seq 600); do grep -q . out && break; sleep 0.1; done\nkill -INT $srun; sleep 0.3; kill -INT $srun\nwait $srun\n",
    );
    let said = t.sh("./interrupted.sh; cat err >&2");
    println!("{said:?}");
    let job: u32 = t.text("out").lines().next().and_then(|l| l.parse().ok()).expect("a job number");
    t.end_of(job);
    t.leaves_nothing(job);
}
