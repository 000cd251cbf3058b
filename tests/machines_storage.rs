//! On real machines: moves without shared storage, and an NFS server that is slow, away, full or strict. `cargo xtask test --machines storage`.
mod site;

use std::process::Stdio;

use site::{NODES, Site, counted, counter, wait};

const ALL: [&str; 3] = ["ctl", "n1", "n2"];

fn counting(t: &Site, args: &str, to: u32) -> u32 {
    t.script("count.sh", &counter(to));
    let job = t.submit(&format!("--vm=tiny -w n1 --output=out {args} count.sh"));
    t.wait_text("out", "\n10\n");
    job
}

#[test]
fn without_shared_storage_the_disk_moves_too() {
    let t = Site::take("unshared");
    for host in ALL {
        let line = "sed -i 's|^shared_dir|#shared_dir|' /etc/slurm-vm/slurm-vm.toml && systemctl restart slurm-vmd";
        t.good("root", host, line);
    }
    t.well();
    t.script(
        "disk.sh",
        &format!(
            "{}\nsha256sum -c /scratch/sum && echo \"the disk is whole\"",
            counter(600).replacen(
                '\n',
                "\ndd if=/dev/urandom of=/scratch/data bs=65536 count=64 2>/dev/null; sha256sum /scratch/data >/scratch/sum\n",
                1
            )
        ),
    );
    let job = t.submit("--vm=tiny -w n1 --output=out disk.sh");
    t.wait_text("out", "\n10\n");
    assert_eq!(t.sh(&format!("svm migrate {job} n2")).code, Some(0));
    assert_eq!(t.end_of(job), "COMPLETED 0:0");
    assert_eq!(t.ways(job), ["live"]);
    counted(&t, job, "out", 600);
    assert!(t.text("out").contains("the disk is whole"));
    for host in ALL {
        let line =
            "sed -i 's|^#shared_dir = .*|shared_dir = \"/shared/slurm-vm\"|' /etc/slurm-vm/slurm-vm.toml && systemctl restart slurm-vmd";
        t.good("root", host, line);
    }
    t.end();
}

#[test]
fn an_nfs_server_that_is_away_for_twenty_seconds_costs_no_byte_of_output() {
    let t = Site::take("away");
    let job = counting(&t, "", 400);
    let away = "systemctl stop nfs-server; sleep 20; systemctl start nfs-server";
    // Once while the guest counts, and once while it moves.
    t.good("root", "ctl", away);
    t.wait_text("out", "\n120\n");
    let mut server = t.command("root", "ctl", &format!("sleep 2; {away}"));
    let mut server = server.stdin(Stdio::null()).spawn().expect("ssh");
    let said = t.sh(&format!("svm migrate {job} n2"));
    println!("the move: {said:?}");
    server.wait().expect("ssh");
    assert_eq!(t.end_of(job), "COMPLETED 0:0");
    counted(&t, job, "out", 400);
    t.end();
}

#[test]
fn a_full_export_stops_the_program_until_there_is_room() {
    let t = Site::take("full");
    let make = "truncate -s 24M /srv/small.img && mkfs.ext4 -q -F -m 0 /srv/small.img && mkdir -p /srv/small && mount -o loop /srv/small.img /srv/small &&
        chmod 1777 /srv/small && exportfs -o rw,sync,no_subtree_check,fsid=77 n1:/srv/small && exportfs -o rw,sync,no_subtree_check,fsid=77 n2:/srv/small";
    t.good("root", "ctl", make);
    for node in NODES {
        t.good("root", node, "mkdir -p /srv/small && mount -t nfs4 ctl:/srv/small /srv/small");
    }
    t.script(
        "fill.sh",
        "#!/bin/sh\ni=0\nwhile [ $i -lt 32 ]; do i=$((i + 1)); dd if=/dev/zero bs=65536 count=16 2>/dev/null | tr '\\0' x; done\necho done",
    );
    t.good(
        "root",
        "ctl",
        "dd if=/dev/zero of=/srv/small/other bs=1M count=12 2>/dev/null; df -m /srv/small",
    );
    let job = t.submit("--vm=tiny -w n1 --output=/srv/small/out fill.sh");
    // 32 MiB into what is left of 24. A rest that is smaller than what is written at once stays.
    let mut before = None;
    wait("the export is full", || {
        let said = t.quiet("root", "ctl", "df --output=avail /srv/small | tail -1; stat -c %s /srv/small/out");
        let mut numbers = said.out.split_whitespace().map_while(|n| n.parse::<u64>().ok());
        let now = numbers.next().zip(numbers.next());
        let is_full = now.is_some_and(|(kib, _)| kib < 64) && before == now;
        before = now;
        if is_full { Ok(()) } else { Err(said.out) }
    });
    assert_eq!(t.job(job)["JobState"], "RUNNING");
    t.good("root", "ctl", "rm -f /srv/small/other; truncate -s 64M /srv/small.img; losetup -c $(losetup -j /srv/small.img -O NAME -n); resize2fs $(losetup -j /srv/small.img -O NAME -n)");
    assert_eq!(t.end_of(job), "COMPLETED 0:0");
    let sum = t.good("root", "ctl", "stat -c %s /srv/small/out; tr -d x </srv/small/out");
    assert_eq!(sum, format!("{}\ndone\n", (32 << 20) + 5));
    for node in NODES {
        t.good("root", node, "umount /srv/small");
    }
    t.good(
        "root",
        "ctl",
        "exportfs -u n1:/srv/small; exportfs -u n2:/srv/small; umount /srv/small; rm /srv/small.img",
    );
    t.end();
}

#[test]
fn a_shared_directory_with_root_squash_is_refused_and_said() {
    let t = Site::take("squash");
    let export = |squash: &str| {
        t.good(
            "root",
            "ctl",
            &format!("sed -i '/^.shared/s/\\(no_\\)*root_squash/{squash}/g' /etc/exports && exportfs -ra && cat /etc/exports"),
        );
        for node in NODES {
            // The server's answer to a new client; systemd restarts what fails.
            t.root(node, "umount /shared && mount /shared; systemctl restart slurm-vmd");
        }
    };
    export("root_squash");
    let said = wait("svm health says what is wrong", || {
        let said = t.quiet("root", "ctl", "svm health");
        if said.out.matches("root_squash").count() == NODES.len() {
            Ok(said)
        } else {
            Err(said.out)
        }
    });
    println!("{}", said.out);
    assert_ne!(said.code, Some(0));
    export("no_root_squash");
    t.end();
}
