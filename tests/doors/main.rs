//! Who may do what at the agent's socket, and how much of it: each test is one way in, tried as another user.
mod bench;

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::chown,
    path::Path,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use bench::{ALICE, BOB, Bench, DEADLINE, open, resident, wait};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use slurm_vm::{
    core::{Life, Record},
    slurm::FakeOp,
};
use slurm_vm_api::{
    outcome,
    query::Answer,
    session::{Ended, Frame, OPENING, Stream, ToAgent, ToShim},
    spec::VmSpec,
};

/// A program that goes on until nobody reads it: the guest's helper ends with the test, and takes no program along.
const IDLE: &str = "while sleep 1; do echo; done";

/// What a refused session gets, and nothing after it.
fn is_refusal(frames: &[Frame<ToShim>]) -> bool {
    matches!(frames, [Frame::Control(ToShim::Failed { outcome, .. })] if *outcome == i32::from(outcome::REFUSED))
}

#[test]
fn another_users_session_is_refused_while_the_owner_of_the_vm_stands_still() {
    let t = Bench::new();
    let job = t.job(ALICE);
    assert!(t.prolog(job, ALICE, ALICE).ok);
    t.guest(job);
    let mut alice = t.session(ALICE, open(job, ALICE), "while :; do echo secret; sleep 0.1; done");
    alice.read_until("secret\n");
    // A second program of hers is put on record: the owner stands at the gate.
    t.ledger.shut(true);
    let mut step = open(job, ALICE);
    (step.step, step.kind) = (0, slurm_vm_api::session::StepKind::Step);
    let _step = t.session(ALICE, step, IDLE);
    wait("the owner to stand still", || t.ledger.somebody_waits().then_some(()));
    let begun = Instant::now();
    let mut claims = open(job, BOB);
    claims.user.uid = BOB;
    let bob = t.session(BOB, claims, "id");
    let answer = thread::spawn(move || bob.rest(Duration::from_secs(25)));
    while !answer.is_finished() && begun.elapsed() < Duration::from_secs(15) {
        thread::sleep(Duration::from_millis(50));
    }
    t.ledger.shut(false);
    let (frames, closed) = answer.join().unwrap();
    assert!(is_refusal(&frames), "{frames:?}");
    assert!(closed, "the refused session stays open");
    // Hers goes on.
    alice.read_until("secret\nsecret\n");
}

/// What `id` says of a program whose shim asks for root's group.
fn ids(t: &Bench, job: u32) -> String {
    t.guest(job);
    let mut claims = open(job, 1);
    claims.user.gid = 0;
    claims.user.name = "root".into();
    claims.user.home = "/root".into();
    claims.groups = vec![0, 42];
    let mut client = t.session(1, claims, &format!("echo $(id -u):$(id -g):$(id -G):$HOME; echo end; {IDLE}"));
    client.read_until("end\n")
}

#[test]
fn a_program_runs_with_the_ids_of_slurms_job_and_the_groups_of_the_hosts_database() {
    let t = Bench::new();
    let announced = t.job(1);
    assert!(t.prolog(announced, 1, 1).ok);
    assert!(ids(&t, announced).starts_with("1:1:1:"), "{}", ids(&t, announced));
    // The prolog's message did not come: Slurm is asked.
    let job = t.job(1);
    let mut waits = t.session(1, open(job, 1), "true");
    while !matches!(waits.next(), Some(Frame::Control(ToShim::Progress(_)))) {}
    drop(waits);
    assert!(ids(&t, job).starts_with("1:1:1:"), "{}", ids(&t, job));
}

#[test]
fn ten_thousand_words_of_a_refused_session_ask_slurm_nothing() {
    let t = Bench::new();
    let job = t.job(ALICE);
    assert!(t.prolog(job, ALICE, ALICE).ok);
    t.guest(job);
    let mut alice = t.session(ALICE, open(job, ALICE), &format!("echo begun; {IDLE}"));
    alice.read_until("begun\n");
    let mut bob = t.session(BOB, open(job, BOB), "id");
    assert!(matches!(bob.next(), Some(Frame::Control(ToShim::Failed { .. }))));
    let before = t.slurm.calls(FakeOp::Job);
    for _ in 0..10_000 {
        if !bob.send(&Frame::Control(ToAgent::WhyTerm)) {
            break;
        }
    }
    let (frames, closed) = bob.rest(Duration::from_secs(10));
    let asked = t.slurm.calls(FakeOp::Job) - before;
    assert!(
        frames.is_empty() && closed && asked == 0,
        "{asked} questions, closed: {closed}, {frames:?}"
    );
}

#[test]
fn ten_thousand_words_of_one_session_are_few_questions_to_slurm() {
    let t = Bench::new();
    let job = t.job(ALICE);
    assert!(t.prolog(job, ALICE, ALICE).ok);
    t.guest(job);
    let mut alice = t.session(ALICE, open(job, ALICE), &format!("echo begun; {IDLE}"));
    alice.read_until("begun\n");
    let (before, begun) = (t.slurm.calls(FakeOp::Job), Instant::now());
    for _ in 0..10_000 {
        assert!(alice.send(&Frame::Control(ToAgent::WhyTerm)));
    }
    while !matches!(alice.next().expect("an answer"), Frame::Control(ToShim::Cause(_))) {}
    // The owner has taken all words when it has done what came behind them.
    assert!(alice.send(&Frame::Control(ToAgent::Signal { signo: 9 })));
    let mut causes = 1;
    loop {
        match alice.next() {
            Some(Frame::Control(ToShim::Cause(_))) => causes += 1,
            Some(Frame::Control(ToShim::Exited(how))) => {
                assert_eq!(how, Ended::Signal(9));
                break;
            }
            Some(_) => {}
            None => panic!("closed"),
        }
    }
    let (asked, seconds) = (t.slurm.calls(FakeOp::Job) - before, begun.elapsed().as_secs());
    assert!(
        causes > 0 && asked <= 3 + seconds,
        "{asked} questions in {seconds} s, {causes} answers"
    );
}

/// As systemd starts a daemon when nobody says otherwise.
fn few_descriptors() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 1024, hard).unwrap();
}

#[test]
fn two_thousand_dripping_connections_of_one_user_keep_nobody_else_out() {
    few_descriptors();
    let t = Bench::alone();
    let mut dripping = t.perl(BOB, &["drip", "2000"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(dripping.stdout.take().unwrap()).lines().map_while(Result::ok);
    println!("{}", said.next().expect("connections"));
    // In the midst of it: a job of hers starts, runs and ends.
    let job = t.job(ALICE);
    assert!(t.prolog(job, ALICE, ALICE).ok);
    t.guest(job);
    let alice = t.session(ALICE, open(job, ALICE), "echo begun; sleep 1; echo done");
    let (frames, closed) = alice.rest(Duration::from_secs(30));
    let exited = |f: &Frame<ToShim>| *f == Frame::Control(ToShim::Exited(Ended::Code(0)));
    assert!(frames.iter().any(exited), "closed: {closed}, {frames:?}");
    let release = slurm_vm_api::hooks::HookRequest::Release {
        job,
        uid: ALICE,
        wait_s: 20,
    };
    assert!(t.hook(release).ok);
    // And who drips is cut, byte by byte or not.
    let until = Instant::now() + DEADLINE;
    let mut last = String::new();
    while let Some(line) = said.next()
        && Instant::now() < until
    {
        last = line;
    }
    let _ = dripping.kill();
    let _ = dripping.wait();
    assert!(last.starts_with("open 0 "), "{last}");
}

#[test]
fn what_unopened_sessions_send_takes_bounded_memory() {
    let t = Bench::alone();
    let before = resident();
    let blob = vec![b'x'; 8 << 20];
    let mut clients = Vec::new();
    let mut grown = Vec::new();
    // Each round as much as all that one user may have, many times over; the allocator keeps some of what was given back.
    for _ in 0..3 {
        for _ in 0..30 {
            let mut client = t.client(BOB);
            client.say(&[OPENING]);
            for frame in [
                Frame::Environment(blob.clone()),
                Frame::Arguments(blob.clone()),
                Frame::Script(blob.clone()),
            ] {
                if !client.send(&frame) {
                    break;
                }
            }
            clients.push(client);
        }
        grown.push(resident().saturating_sub(before) >> 20);
    }
    drop(blob);
    // Another user's session is opened all the same.
    let job = t.job(ALICE);
    assert!(t.prolog(job, ALICE, ALICE).ok);
    t.guest(job);
    t.session(ALICE, open(job, ALICE), &format!("echo begun; {IDLE}"))
        .read_until("begun\n");
    assert!(grown[0] < 400 && grown[2] < grown[0] + 100, "MiB more than before: {grown:?}");
}

#[test]
fn a_shim_that_acknowledges_and_does_not_read_takes_bounded_memory() {
    let t = Bench::alone();
    let job = t.job(ALICE);
    assert!(t.prolog(job, ALICE, ALICE).ok);
    t.guest(job);
    let mut alice = t.session(ALICE, open(job, ALICE), "echo begun; yes");
    alice.read_until("begun\n");
    let (before, begun) = (resident(), Instant::now());
    let (mut offset, mut most) = (0, 0);
    let mut alive = true;
    while alive && begun.elapsed() < Duration::from_secs(10) {
        offset += 4 << 10;
        alive = alice.send(&Frame::Control(ToAgent::Wrote {
            stream: Stream::Stdout,
            offset,
        }));
        most = most.max(resident().saturating_sub(before) >> 20);
        // Not faster than its program writes: the guest takes no word for more than it has sent.
        thread::sleep(Duration::from_millis(1));
    }
    assert!(most < 16, "{most} MiB more than before, {} MiB acknowledged", offset >> 20);
    assert!(!alive, "it is still served after {} MiB", offset >> 20);
}

#[test]
fn a_question_that_names_a_node_called_hook_is_a_question() {
    let t = Bench::new();
    let ask = r#"{"v":1,"ask":{"migrate":{"job":7,"to":"hook"}}}"#;
    let reply = t.line(&format!("{ask}\n"));
    let Ok(Answer::Refused(why)) = serde_json::from_str(&reply) else {
        panic!("{reply}")
    };
    assert!(why.contains("controller"), "{why}");
}

/// A file on shared storage as another user could have put it there.
fn forge(path: &Path, json: &serde_json::Value) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, json.to_string()).unwrap();
    chown(path, Some(BOB), Some(BOB)).unwrap();
}

#[test]
fn saves_and_ends_that_another_user_could_have_forged_are_not_believed() {
    let t = Bench::new();
    let shared = t.node.config.shared_dir.clone().unwrap();
    let job = t.job(ALICE);
    let spec = VmSpec::for_image("tiny").unwrap();
    let mut record = Record::new("cluster".into(), "n1".into(), job, open(job, ALICE).user, spec);
    let save = shared.join("saves").join(format!("{}.5.1.n1", record.file_stem()));
    record.life = Life::Restoring { from: save.clone() };
    record.generation = 5;
    forge(
        &save.join("manifest.json"),
        &serde_json::json!({"v": 1, "record": record, "chain": [], "kept": []}),
    );
    assert!(t.prolog(job, ALICE, ALICE).ok);
    let mut last = None;
    wait("the VM to boot anew", || {
        let record = t.node.record(job).unwrap();
        assert_eq!(record.generation, 1, "{record:?}");
        last = Some(record.life);
        matches!(last, Some(Life::Booting { .. })).then_some(())
    });
    // That its script has ended, and is not to run again.
    let job = t.job(ALICE);
    forge(
        &shared.join(format!("done/{job}.json")),
        &serde_json::json!({"v": 1, "uid": ALICE, "ended": {"code": 0}}),
    );
    assert_eq!(t.prolog(job, ALICE, ALICE).run, Some(1));
}

#[test]
fn a_file_server_that_is_away_holds_up_one_vm_and_never_the_node() {
    let t = Bench::new();
    let running = t.job(ALICE);
    assert!(t.prolog(running, ALICE, ALICE).ok);
    t.guest(running);
    let mut alice = t.session(ALICE, open(running, ALICE), &format!("echo begun; {IDLE}"));
    alice.read_until("begun\n");
    t.files.away(true);
    let quick = |what: &str, begun: Instant| assert!(begun.elapsed() < Duration::from_secs(3), "{what} took {:?}", begun.elapsed());
    // Whether a save waits for it is asked of the file server.
    let waits = t.job(ALICE);
    let begun = Instant::now();
    assert!(t.prolog(waits, ALICE, ALICE).ok);
    quick("the prolog of a VM that has to look for a save", begun);
    let begun = Instant::now();
    let views = t.node.views();
    assert!(views.iter().any(|v| v.job == running && v.state == "running"), "{views:?}");
    quick("a status", begun);
    let begun = Instant::now();
    let mut step = open(running, ALICE);
    (step.step, step.kind) = (0, slurm_vm_api::session::StepKind::Step);
    let mut second = t.session(ALICE, step, &format!("echo second; {IDLE}"));
    second.read_until("second\n");
    quick("another program of a VM that runs", begun);
    let begun = Instant::now();
    t.node.release(running, Duration::from_secs(20)).unwrap();
    quick("the epilog of a VM that runs", begun);
    t.files.away(false);
    wait("the other VM to be prepared", || {
        t.node.record(waits).filter(|r| matches!(r.life, Life::Booting { .. }))
    });
}

#[test]
fn a_job_that_is_over_gets_no_vm_by_a_forged_session() {
    let t = Bench::new();
    let job = t.job(ALICE);
    t.slurm.exited(job, 0);
    t.slurm.epilog_done(job, "n1");
    // Slurm shows for a while what it had where.
    let info = t.node.world.slurm.job(job).unwrap().expect("the job");
    assert!(info.brief.state.is_finished() && info.allocs.len() == 1, "{info:?}");
    let session = t.session(ALICE, open(job, ALICE), "id");
    let (frames, closed) = session.rest(Duration::from_secs(10));
    assert!(
        matches!(&frames[..], [Frame::Control(ToShim::Failed { why, .. })] if why.contains("does not run")),
        "{frames:?}"
    );
    assert!(closed && t.node.record(job).is_none());
}
