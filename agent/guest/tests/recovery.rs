//! What is left after connections break, readers are slow, and hosts and guests come and go: every byte once, in bounded memory.

mod support;

use std::time::{Duration, Instant};

use slurm_vm::guest::{LinkEvent, LinkRequest};
use slurm_vm_api::guest::{Action, ExitStatus, ProgramState, RING_BYTES, Scope, Stdio, Stream};
use support::{Guest, Host, Random, cutting_proxy, sh, spec};

/// A file of random bytes in the guest's directory, and a program that prints it.
fn random_file(guest: &Guest, seed: u64, len: usize) -> (Vec<u8>, String) {
    let bytes = Random(seed | 1).bytes(len);
    let path = guest.dir.path().join("random");
    std::fs::write(&path, &bytes).unwrap();
    (bytes, path.to_str().unwrap().to_owned())
}

#[test]
fn much_output_through_a_slow_reader_is_exact_and_costs_the_helper_bounded_memory() {
    let guest = Guest::new();
    let (bytes, path) = random_file(&guest, 3, 64 << 20);
    let mut host = Host::new(&guest.port(), 1);
    host.acknowledge = false;
    host.start(1, spec(&["cat", &path]));
    let mut acknowledged = 0u64;
    let mut pauses = 0;
    while acknowledged < bytes.len() as u64 {
        let got = |host: &Host| host.programs.get(&1).map_or(0, |outcome| outcome.stdout().len() as u64);
        host.until("more output", |host| got(host) > acknowledged);
        // Reading goes on only after a pause now and then; meanwhile the window is what may come, and no more.
        if acknowledged >> 22 > pauses {
            pauses += 1;
            let until = Instant::now() + Duration::from_millis(20);
            while let Ok(event) = host.events.recv_deadline(until) {
                host.take(event);
            }
        }
        assert!(got(&host) - acknowledged <= u64::from(RING_BYTES), "more than the window");
        acknowledged = got(&host);
        host.link.send(LinkRequest::Ack {
            program: 1,
            stream: Stream::Stdout,
            offset: acknowledged,
        });
    }
    let outcome = host.finish(1);
    assert!(outcome.stdout() == bytes);
    assert!(guest.peak_kib() < 8 * 1024, "the helper took {} KiB", guest.peak_kib());
}

#[test]
fn a_program_whose_reader_stops_is_held_up_like_on_a_pipe() {
    let guest = Guest::new();
    let mark = guest.dir.path().join("mark");
    let mut host = Host::new(&guest.port(), 1);
    host.acknowledge = false;
    host.start(1, sh(&format!("head -c 2000000 /dev/zero; echo x > {}", mark.display())));
    host.until("a full window", |host| {
        host.programs
            .get(&1)
            .is_some_and(|outcome| outcome.stdout().len() == RING_BYTES as usize)
    });
    assert_eq!(host.act(1, Action::Ping), None);
    assert!(!mark.exists());
    host.acknowledge = true;
    host.link.send(LinkRequest::Ack {
        program: 1,
        stream: Stream::Stdout,
        offset: u64::from(RING_BYTES),
    });
    assert_eq!(host.finish(1).stdout().len(), 2_000_000);
    assert!(mark.exists());
}

fn through_cuts(seed: u64) {
    println!("seed {seed}");
    let guest = Guest::new();
    let (bytes, path) = random_file(&guest, seed, 6_000_000);
    let outer = guest.dir.path().join("outer");
    let proxy = cutting_proxy(&outer, guest.port(), seed, 25);
    let mut host = Host::new(&outer, seed);
    // Two programs at a time: one by a script that is long enough to be cut itself, one that takes input.
    let script = [
        format!("#!/bin/sh\ncat {path} & cat {path} >&2; wait; exit 9\n").into_bytes(),
        vec![b'#'; 400_000],
    ]
    .concat();
    host.link.send(LinkRequest::Start {
        program: 1,
        spec: Box::new(spec(&["x"])),
        script: Some(script),
    });
    let mut cat = spec(&["cat"]);
    cat.stdio = Stdio::Pipes {
        merge_stderr: true,
        stdin: true,
    };
    host.start(2, cat);
    let input = &bytes[..1_500_000];
    let mut sent = 0;
    while sent < input.len() {
        host.until("room for input", |host| {
            (sent as u64) < host.stdin_acked + u64::from(RING_BYTES) / 2
        });
        let end = (sent + 30_000).min(input.len());
        host.link.send(LinkRequest::Stdin {
            program: 2,
            offset: sent as u64,
            bytes: input[sent..end].to_vec(),
        });
        sent = end;
    }
    host.link.send(LinkRequest::StdinEof {
        program: 2,
        offset: sent as u64,
    });
    let second = host.finish(2);
    assert!(second.stdout() == input, "seed {seed}: input came back wrong");
    let first = host.finish(1);
    assert!(first.stdout() == bytes, "seed {seed}: standard output is wrong");
    assert!(first.stderr() == bytes, "seed {seed}: standard error is wrong");
    assert_eq!((first.code(), second.code()), (Some(9), Some(0)), "seed {seed}");
    assert_eq!(host.others, [], "seed {seed}");
    let ups = host.ups;
    drop(host);
    let made = proxy.join().unwrap();
    assert!(made >= 20 && ups >= 10, "seed {seed}: {made} cuts, {ups} sessions");
}

#[test]
fn output_input_and_uploads_are_exact_however_often_the_connection_is_cut() {
    match std::env::var("SLURM_VM_SEED") {
        Ok(seed) => through_cuts(seed.parse().unwrap()),
        Err(_) => (1..=4).for_each(through_cuts),
    }
}

#[test]
fn a_new_link_gets_again_what_the_last_one_had_not_acknowledged() {
    let guest = Guest::new();
    let mut host = Host::new(&guest.port(), 1);
    host.acknowledge = false;
    host.start(1, sh("printf 'one two three'; sleep 0.2; printf ' four'"));
    host.until("output", |host| {
        host.programs.get(&1).is_some_and(|outcome| outcome.stdout().len() >= 13)
    });
    // Durable up to here; the rest was seen by a host that forgot it.
    host.link.send(LinkRequest::Ack {
        program: 1,
        stream: Stream::Stdout,
        offset: 4,
    });
    assert_eq!(host.act(1, Action::Ping), None);
    drop(host);
    let mut next = Host::new(&guest.port(), 2);
    next.programs.entry(1).or_default().streams.insert(Stream::Stdout, b"ONE ".to_vec());
    next.link.send(LinkRequest::Resume {
        program: 1,
        stream: Stream::Stdout,
        from: 4,
    });
    assert_eq!(next.finish(1).text(), "ONE two three four");
    assert_eq!(next.others, []);
}

#[test]
fn a_resume_below_what_was_acknowledged_is_told_as_a_loss() {
    let guest = Guest::new();
    let mut host = Host::new(&guest.port(), 1);
    host.run(1, sh("printf abcdef"));
    assert_eq!(host.act(1, Action::Ping), None);
    drop(host);
    let mut next = Host::new(&guest.port(), 2);
    next.link.send(LinkRequest::Resume {
        program: 1,
        stream: Stream::Stdout,
        from: 2,
    });
    next.until("the loss", |host| !host.others.is_empty());
    assert_eq!(
        next.others,
        [LinkEvent::Lost {
            program: 1,
            stream: Stream::Stdout,
            wanted: 2,
            start: 6
        }]
    );
}

#[test]
fn a_program_that_ends_while_nobody_is_there_is_reported_to_whoever_comes() {
    let guest = Guest::new();
    let mut host = Host::new(&guest.port(), 1);
    let mark = guest.dir.path().join("mark");
    host.start(
        1,
        sh(&format!(
            "while [ ! -e {} ]; do sleep 0.02; done; echo late; exit 6",
            mark.display()
        )),
    );
    host.until("the start", |host| {
        host.programs.get(&1).is_some_and(|outcome| outcome.started.is_some())
    });
    drop(host);
    std::fs::write(&mark, "").unwrap();
    // By now it may or may not have ended: both must do.
    let mut next = Host::new(&guest.port(), 2);
    next.link.send(LinkRequest::Resume {
        program: 1,
        stream: Stream::Stdout,
        from: 0,
    });
    let outcome = next.finish(1);
    assert_eq!((outcome.text().as_str(), outcome.code()), ("late\n", Some(6)));
    drop(next);
    let mut last = Host::new(&guest.port(), 3);
    last.until("the hello", |host| host.hello.is_some());
    let report = last.hello.unwrap().programs.remove(0);
    assert_eq!(
        report.state,
        ProgramState::Exited {
            status: ExitStatus::Code { code: 6 }
        }
    );
}

#[test]
fn a_guest_that_was_reset_is_noticed() {
    let mut guest = Guest::new();
    let mut host = Host::new(&guest.port(), 1);
    host.start(1, spec(&["sleep", "100"]));
    host.until("the start", |host| {
        host.programs.get(&1).is_some_and(|outcome| outcome.started.is_some())
    });
    let pid = host.programs[&1].started.as_ref().unwrap().pid;
    let before = host.hello.clone().unwrap();
    guest.replace();
    host.until("the loss", |host| !host.lost.is_empty());
    assert_eq!(host.lost, [1]);
    assert_ne!(host.hello.clone().unwrap().instance, before.instance);
    // A start after that is a new one.
    assert_eq!(host.run(2, sh("echo again")).text(), "again\n");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[test]
fn a_helper_without_a_host_waits_without_work() {
    let guest = Guest::new();
    let mut host = Host::new(&guest.port(), 1);
    host.start(1, spec(&["yes"]));
    host.until("some output", |host| {
        host.programs.get(&1).is_some_and(|outcome| outcome.stdout().len() > 1_000_000)
    });
    drop(host);
    let ticks = || -> u64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", guest.child.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    };
    std::thread::sleep(Duration::from_millis(100));
    let before = ticks();
    std::thread::sleep(Duration::from_millis(500));
    assert!(ticks() - before <= 2, "the helper spins");
    let mut next = Host::new(&guest.port(), 2);
    assert_eq!(
        next.act(
            1,
            Action::Signal {
                program: 1,
                signo: 9,
                scope: Scope::All
            }
        ),
        None
    );
}
