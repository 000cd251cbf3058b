//! On real machines: services that are restarted under jobs, machines that are booted anew or lose power. `cargo xtask test --machines restarts`.
mod site;

use std::process::Stdio;

use site::{Site, counted, counter, wait};

fn counting(t: &Site, args: &str, to: u32) -> u32 {
    t.script("count.sh", &counter(to));
    let job = t.submit(&format!("--vm=tiny -w n1 --output=out {args} count.sh"));
    t.wait_text("out", "\n10\n");
    job
}

/// The services of a node, and the controller's; the last column is the machine.
fn services(node: &str) -> [(&'static str, String); 5] {
    let node = || node.to_owned();
    [
        ("slurm-vmd", node()),
        ("libvirtd", node()),
        ("slurmd", node()),
        ("munge", node()),
        ("slurmctld", "ctl".into()),
    ]
}

#[test]
fn a_running_job_does_not_notice_that_services_are_restarted() {
    let t = Site::take("restarts");
    let job = counting(&t, "", 500);
    for (service, host) in services("n1") {
        t.good("root", &host, &format!("systemctl restart {service}"));
        wait("the node is well", || {
            let said = t.quiet("root", "ctl", "svm health && sinfo -h -N -p low -o '%N %T' && svm list");
            let well = said.code == Some(0) && !said.out.contains("down") && said.out.contains("running");
            if well { Ok(()) } else { Err(format!("{said:?}")) }
        });
    }
    assert_eq!(t.end_of(job), "COMPLETED 0:0");
    assert_eq!(t.job(job)["Restarts"], "0");
    counted(&t, job, "out", 500);
    t.end();
}

#[test]
fn a_moving_job_survives_that_services_are_restarted() {
    let t = Site::take("moving");
    let job = counting(&t, "", 1500);
    let mut at = t.node_of(job);
    for (service, _) in services("n1") {
        let host = if service == "slurmctld" { "ctl".to_owned() } else { at.clone() };
        let to = Site::other(&at);
        let mut order = t.command("root", "ctl", &format!("svm migrate {job} {to}"));
        let order = order
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("ssh");
        wait("the guest is on its way", || {
            let state = t.show(job)["state"].as_str().unwrap_or_default().to_owned();
            if state == "leaving" { Ok(()) } else { Err(state) }
        });
        t.good("root", &host, &format!("systemctl restart {service}"));
        let said: site::Said = order.wait_with_output().expect("ssh").into();
        println!(
            "a move with {service} restarted on {host}: {:?} {} {}",
            said.code,
            said.out.lines().last().unwrap_or_default(),
            said.err
        );
        wait("the job runs somewhere", || {
            let view = t.show(job);
            let state = t.job(job).remove("JobState").unwrap_or_default();
            if view["state"] == "running" && state == "RUNNING" {
                Ok(())
            } else {
                Err(format!("{} {state}", view["state"]))
            }
        });
        at = t.node_of(job);
    }
    assert_eq!(t.end_of(job), "COMPLETED 0:0");
    counted(&t, job, "out", 1500);
    t.end();
}

#[test]
fn a_node_that_is_booted_anew_gives_its_job_to_another_one() {
    let t = Site::take("reboot");
    let job = counting(&t, "", 100);
    t.root("n1", "systemctl reboot");
    let fields = wait("the job starts over", || {
        let fields = t.job(job);
        if fields["Restarts"] != "0" && fields["JobState"] == "RUNNING" {
            Ok(fields)
        } else {
            Err(format!("{fields:?}"))
        }
    });
    println!("it starts over on {}", fields["NodeList"]);
    assert_eq!(t.end_of(job), "COMPLETED 0:0");
    t.m.wait_answers("n1").expect("n1 answers");
    counted(&t, job, "out", 100);
    let order = t.root("n1", "systemd-analyze; systemctl show -p ActiveEnterTimestampMonotonic munge libvirtd slurm-vmd slurmd remote-fs.target; systemctl --failed --no-legend").out;
    println!("{order}");
    t.end();
}

#[test]
fn a_destination_without_power_leaves_the_guest_where_it_is() {
    let t = Site::take("destination");
    t.encrypt(true);
    let job = counting(&t, "", 600);
    let mut order = t.command("root", "ctl", &format!("svm migrate {job} n2"));
    let order = order
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("ssh");
    wait("the copying has begun", || {
        let said = t.quiet("root", "n1", &format!("virsh domjobinfo slurm-{job}-0"));
        if said.out.contains("Memory remaining") {
            Ok(())
        } else {
            Err(said.out)
        }
    });
    t.m.power("n2", false).expect("n2 is off");
    let said: site::Said = order.wait_with_output().expect("ssh").into();
    println!("{} {}", said.out.lines().last().unwrap_or_default(), said.err);
    assert_ne!(said.code, Some(0));
    assert_eq!(t.end_of(job), "COMPLETED 0:0");
    assert_eq!(t.job(job)["Restarts"], "0");
    counted(&t, job, "out", 600);
    t.m.power("n2", true).expect("n2 is on");
    t.encrypt(false);
    t.end();
}

#[test]
fn a_source_without_power_means_that_the_job_starts_over() {
    let t = Site::take("source");
    t.encrypt(true);
    let job = counting(&t, "", 500);
    let mut order = t.command("root", "ctl", &format!("svm migrate {job} n2"));
    let order = order
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("ssh");
    wait("the copying has begun", || {
        let said = t.quiet("root", "n1", &format!("virsh domjobinfo slurm-{job}-0"));
        if said.out.contains("Memory remaining") {
            Ok(())
        } else {
            Err(said.out)
        }
    });
    t.m.power("n1", false).expect("n1 is off");
    let said: site::Said = order.wait_with_output().expect("ssh").into();
    println!("{} {}", said.out.lines().last().unwrap_or_default(), said.err);
    assert_eq!(t.end_of(job), "COMPLETED 0:0");
    assert_eq!(t.job(job)["Restarts"], "1");
    counted(&t, job, "out", 500);
    t.m.power("n1", true).expect("n1 is on");
    t.encrypt(false);
    t.end();
}
