//! On real machines: jobs in guests with KVM, AppArmor enforcing, control groups and systemd. `cargo xtask test --machines jobs`.
mod site;

use site::{NODES, Site, wait};

#[test]
fn a_script_runs_with_kvm_and_its_exit_code_comes_back() {
    let t = Site::take("hello");
    let health = t.root("ctl", "svm health").out;
    assert_eq!(health.matches("kvm (").count(), NODES.len(), "both nodes have KVM: {health}");
    t.script(
        "hello.sh",
        "#!/bin/sh\necho \"hello from $(hostname), uid $(id -u)\"\nsleep 40\nexit 7",
    );
    let job = t.submit("--vm=tiny --output=out hello.sh");
    t.wait_text("out", "hello from slurm-");
    let node = t.node_of(job);
    let xml = t.root(&node, &format!("virsh dumpxml slurm-{job}-0")).out;
    assert!(xml.contains("<domain type='kvm'"), "it is KVM");
    let label = t
        .root(
            &node,
            "for p in $(pgrep -f '^/usr/bin/qemu-system'); do cat /proc/$p/attr/current; done",
        )
        .out;
    assert!(
        label.contains("libvirt-") && label.contains("(enforce)"),
        "QEMU is confined: {label}"
    );
    assert_eq!(t.end_of(job), "FAILED 7:0");
    assert!(t.text("out").starts_with(&format!("hello from slurm-{job}-0, uid 2001")));
    t.end();
}

#[test]
fn sixty_four_mebibytes_come_back_byte_for_byte() {
    let t = Site::take("bytes");
    // The guest says what it sends: a sum made there of the very bytes.
    t.script(
        "bytes.sh",
        "#!/bin/sh\nmkfifo /tmp/f; sha256sum </tmp/f >/tmp/sum &\ndd if=/dev/urandom bs=65536 count=1024 2>/dev/null | tee /tmp/f\nwait\ncat /tmp/sum >&2",
    );
    let job = t.submit("--vm=tiny --output=out --error=err bytes.sh");
    assert_eq!(t.end_of(job), "COMPLETED 0:0");
    let sums = t.good("alice", "ctl", "cd ~/bytes && stat -c %s out && sha256sum <out && cat err");
    let lines: Vec<&str> = sums.lines().collect();
    assert_eq!(lines[0], "67108864");
    assert_eq!(lines[1], lines[2], "what arrived is what was sent");
    t.end();
}

#[test]
fn srun_has_a_standard_input_and_salloc_a_machine() {
    let t = Site::take("interactive");
    let said = t.sh("printf 'one\\ntwo\\n' | srun --vm=tiny sh -c 'cat; echo three; exit 5'");
    assert_eq!((said.out.as_str(), said.code), ("one\ntwo\nthree\n", Some(5)), "{}", said.err);
    let said = t.sh("salloc -n1 --vm=tiny sh -c 'srun hostname; srun hostname'");
    let names: Vec<&str> = said.out.lines().filter(|l| l.starts_with("slurm-")).collect();
    assert!(names.len() == 2 && names[0] == names[1], "{said:?}");
    t.end();
}

#[test]
fn four_tasks_of_an_array_have_four_guests() {
    let t = Site::take("array");
    t.script(
        "task.sh",
        "#!/bin/sh\necho \"$SLURM_ARRAY_TASK_ID $(cat /proc/sys/kernel/random/boot_id)\"",
    );
    let job = t.submit("--vm=tiny --mem=400M --array=1-4 --output=out-%a task.sh");
    wait("all four tasks ended", || {
        let said = t.quiet("root", "ctl", &format!("squeue -h -j {job}"));
        if said.out.is_empty() { Ok(()) } else { Err(said.out) }
    });
    let text = t.good("alice", "ctl", "cat ~/array/out-[1-4]");
    let boots: std::collections::BTreeSet<&str> = text.lines().filter_map(|l| l.split(' ').nth(1)).collect();
    let ids: Vec<&str> = text.lines().filter_map(|l| l.split(' ').next()).collect();
    assert_eq!((ids, boots.len()), (vec!["1", "2", "3", "4"], 4), "{text}");
    t.end();
}

#[test]
fn a_hog_dies_in_the_guest_and_qemu_is_held_to_the_jobs_memory() {
    let t = Site::take("memory");
    t.script(
        "hog.sh",
        "#!/bin/sh\nfree -m\nsleep 15\n# A string that doubles, in a shell of its own.\nsh -c 'x=0123456789abcdef; while :; do x=$x$x; done'\necho \"the hog ended with $?\"\nsleep 5",
    );
    let job = t.submit("--vm=tiny --mem=700M --output=out hog.sh");
    t.wait_text("out", "Mem");
    let node = t.node_of(job);
    let limits = "for p in $(pgrep -f '^/usr/bin/qemu-system'); do g=/sys/fs/cgroup$(sed 's/^0:://' /proc/$p/cgroup); while [ $g != /sys/fs/cgroup ]; do
        echo \"$g $(cat $g/memory.max) $(cat $g/memory.current)\"; g=$(dirname $g); done; done";
    let said = t.root(&node, limits).out;
    let limit = (700 << 20).to_string();
    assert!(
        said.lines().any(|l| l.split(' ').nth(1) == Some(&limit)),
        "memory.max is the job's {limit}: {said}"
    );
    let pins = t
        .root(&node, &format!("virsh vcpupin slurm-{job}-0; virsh emulatorpin slurm-{job}-0"))
        .out;
    let cpus = t
        .root("ctl", &format!("scontrol -d show job {job} | grep -o 'CPU_IDs=[0-9,-]*'"))
        .out;
    println!("pinned {pins}; Slurm gave {cpus}");
    t.wait_text("out", "the hog ended with 137");
    assert_eq!(t.end_of(job), "COMPLETED 0:0");
    let killed = t
        .root(&node, "journalctl -k --no-pager -o cat -n 200 | grep -i 'oom-kill\\|Out of memory'")
        .out;
    assert_eq!(killed, "", "nothing is killed on the host");
    t.end();
}
