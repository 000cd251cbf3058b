//! On real machines: what goes wrong at a site's first try, and whether it is said. `cargo xtask test --machines mistakes`.
mod site;

use site::{NODES, Site, counted, counter, wait};

/// Waits until `svm health` has a text in a node's line.
fn health_says(t: &Site, node: &str, text: &str) {
    let line = wait(&format!("svm health says `{text}` of {node}"), || {
        let said = t.quiet("root", "ctl", "svm health");
        match said.out.lines().find(|l| l.starts_with(node) && l.contains(text)) {
            Some(line) => Ok(line.to_owned()),
            None => Err(said.out),
        }
    });
    println!("{line}");
}

#[test]
fn svm_health_says_kvm_and_apparmor() {
    let t = Site::take("health");
    for node in NODES {
        health_says(&t, node, "kvm (");
        health_says(&t, node, "AppArmor");
    }
    t.end();
}

#[test]
fn a_shared_directory_that_is_not_roots_or_that_qemu_cannot_enter_is_said() {
    let t = Site::take("owner");
    t.good("root", "ctl", "chmod 700 /shared/slurm-vm");
    for node in NODES {
        t.good("root", node, "systemctl restart slurm-vmd");
        health_says(&t, node, "libvirt-qemu cannot pass /shared/slurm-vm");
    }
    t.good("root", "ctl", "chown alice:alice /shared/slurm-vm");
    let said = t
        .root("n1", "systemctl restart slurm-vmd; journalctl -u slurm-vmd -n 20 --no-pager -o cat")
        .out;
    assert!(said.contains("belongs to uid 2001"), "the agent refuses it: {said}");
    t.good("root", "ctl", "chown root:root /shared/slurm-vm && chmod 755 /shared/slurm-vm");
    t.end();
}

#[test]
fn a_kvm_that_qemus_user_may_not_open_is_said_and_mended_by_a_restart() {
    let t = Site::take("kvm");
    t.good(
        "root",
        "n1",
        "chown root:root /dev/kvm && chmod 600 /dev/kvm && rm -f /var/lib/slurm-vm/kvm-probe && systemctl restart slurm-vmd",
    );
    health_says(&t, "n1", "emulation");
    t.good(
        "root",
        "n1",
        "chown root:kvm /dev/kvm && chmod 660 /dev/kvm && systemctl restart slurm-vmd",
    );
    health_says(&t, "n1", "kvm (");
    t.end();
}

#[test]
fn a_node_whose_clock_is_half_a_minute_off_takes_a_guest_all_the_same() {
    let t = Site::take("clock");
    t.good("root", "n2", "date -s '+30 sec'");
    t.script("count.sh", &counter(200));
    let job = t.submit("--vm=tiny -w n1 --output=out count.sh");
    t.wait_text("out", "\n10\n");
    let said = t.sh(&format!("svm migrate {job} n2"));
    assert_eq!(said.code, Some(0), "{said:?}");
    assert_eq!(t.end_of(job), "COMPLETED 0:0");
    t.good("root", "n2", "date -s '-30 sec'");
    let text = t.text("out");
    println!("{}", text.lines().last().unwrap_or_default());
    counted_but_for_the_clock(&text, 200);
    t.end();
}

fn counted_but_for_the_clock(text: &str, to: u32) {
    let numbers: Vec<String> = text.lines().skip(1).take(to as usize).map(str::to_owned).collect();
    let wanted: Vec<String> = (1..=to).map(|n| n.to_string()).collect();
    assert_eq!(numbers, wanted);
}

#[test]
fn a_closed_port_is_said_and_the_guest_stays() {
    let t = Site::take("port");
    t.script("count.sh", &counter(400));
    let job = t.submit("--vm=tiny -w n1 --output=out count.sh");
    t.wait_text("out", "\n10\n");
    let close = "nft add table inet site && nft 'add chain inet site in { type filter hook input priority 0; }' && nft add rule inet site in tcp dport 6822 drop";
    t.good("root", "n2", close);
    health_says(&t, "n2", "sick");
    let said = t.sh(&format!("svm migrate {job} n2"));
    assert_ne!(said.code, Some(0), "{said:?}");
    t.good("root", "n2", "nft delete table inet site");
    assert_eq!(t.end_of(job), "COMPLETED 0:0");
    counted(&t, job, "out", 400);
    t.end();
}
