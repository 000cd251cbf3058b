//! The real shim against an agent that is played by the test.
mod agent;
mod faults;
mod files;

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::{fs::MetadataExt, process::ExitStatusExt},
    path::Path,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use agent::{Bench, Shim};
use slurm_vm_api::{
    session::{BATCH_STEP, Cause, Ended, Frame, Sink, StepKind, Stream, ToAgent, ToShim, WINDOW, write_frame},
    shim::{OpenMode, Request},
};

fn pattern(len: usize) -> Vec<u8> {
    let mut state = 1u32;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    })
    .take(len)
    .collect()
}

#[test]
fn the_agent_learns_all_of_a_batch_task_and_the_exit_code_comes_back() {
    let bench = Bench::new();
    let mut command = bench.batch();
    command
        .env_clear()
        .env("A", "1")
        .env("ODD", "x=y\nz")
        .env("SLURM_SPANK_VM_OPEN_MODE", "default")
        .current_dir(bench.dir.path());
    let shim = Shim::spawn(command);
    let session = bench.start();
    assert_eq!(session.environment, b"A=1\0ODD=x=y\nz\0");
    assert_eq!(
        session.arguments,
        format!("{}\0first argument\0", bench.path("slurm_script").display()).as_bytes()
    );
    assert_eq!(session.script.as_deref(), Some(b"#!/bin/sh\necho never on this host\n".as_slice()));
    let open = &session.open;
    assert_eq!((open.job, open.step, open.task, open.kind), (12, BATCH_STEP, 0, StepKind::Batch));
    assert_eq!(Path::new(&open.cwd), bench.dir.path());
    assert!(!open.merge_stderr && open.terminal.is_none() && open.resume.is_empty());
    assert_eq!(open.rlimits.len(), 16);
    session.exit(Ended::Code(7));
    let (status, out, err) = shim.finish();
    assert_eq!((status.code(), out.as_str(), err.as_str()), (Some(7), "", ""));
}

#[test]
fn the_words_of_slurm_22_05_come_by_the_environment_and_leave_no_trace() {
    let bench = Bench::new();
    let args = bench.args(slurm_vm_api::shim::StepKind::Step, OpenMode::Unknown);
    let mut command = Command::new(env!("CARGO_BIN_EXE_slurm-vm-run"));
    command
        .arg("-c")
        .env_clear()
        .env("SLURM_VM_SHIM_ARGS", args.to_env_value("/bin/sh"))
        .env("B", "2")
        .stdin(Stdio::null());
    let shim = Shim::spawn(command);
    let session = bench.start();
    assert_eq!(
        (session.environment.as_slice(), session.arguments.as_slice()),
        (b"B=2\0".as_slice(), b"/bin/sh\0-c\0".as_slice())
    );
    assert_eq!(session.script, None);
    session.exit(Ended::Code(0));
    assert_eq!(shim.finish().0.code(), Some(0));
}

#[test]
fn the_shim_dies_of_the_signal_that_the_program_died_of() {
    for signo in [1, 9, 11, 13, 15, 40] {
        let bench = Bench::new();
        let shim = Shim::spawn(bench.batch());
        bench.start().exit(Ended::Signal(signo));
        let status = shim.finish().0;
        assert_eq!((status.signal(), status.core_dumped()), (Some(signo), false));
    }
}

#[test]
fn a_program_that_cannot_be_started_is_reported_as_a_shell_does() {
    for (errno, code, text) in [(2, 127, "No such file or directory"), (13, 126, "Permission denied")] {
        let bench = Bench::new();
        let shim = Shim::spawn(bench.step());
        bench.start().exit(Ended::NotStarted {
            errno,
            path: "/no/such".into(),
        });
        let (status, _, err) = shim.finish();
        assert_eq!((status.code(), err), (Some(code), format!("slurm-vm: /no/such: {text}\n")));
    }
}

#[test]
fn a_verdict_of_the_agent_is_one_line_and_its_exit_code() {
    let bench = Bench::new();
    let shim = Shim::spawn(bench.batch());
    bench.accept().say(ToShim::Failed {
        outcome: 124,
        why: "the guest did not come up in 90 s".into(),
    });
    let (status, out, err) = shim.finish();
    assert_eq!((status.code(), out.as_str()), (Some(124), ""));
    assert_eq!(err, "slurm-vm: job 12: the guest did not come up in 90 s\n");
}

#[test]
fn a_refused_request_never_reaches_the_agent() {
    let bench = Bench::without_agent();
    let mut args = bench.args(slurm_vm_api::shim::StepKind::Batch, OpenMode::Default);
    args.request = Request::Refused("--vm: '/etc' is not an image name".into());
    let (status, _, err) = Shim::spawn(bench.command(&args)).finish();
    assert_eq!(
        (status.code(), err.as_str()),
        (Some(126), "slurm-vm: job 12: --vm: '/etc' is not an image name\n")
    );
}

#[test]
fn sixteen_mebibytes_reach_a_slow_reader_byte_for_byte_and_within_the_window() {
    let bench = Bench::new();
    let mut shim = Shim::spawn(bench.batch());
    let mut out = shim.0.stdout.take().unwrap();
    let bytes = pattern(16 << 20);
    let expected = bytes.clone();
    let reader = thread::spawn(move || {
        let mut got = Vec::new();
        let mut piece = vec![0; 50_000];
        loop {
            match out.read(&mut piece).unwrap() {
                0 => break,
                n => got.extend_from_slice(&piece[..n]),
            }
            // The reader's own slowness is what is tested here.
            if got.len() % 7 == 0 {
                thread::sleep(Duration::from_millis(1));
            }
        }
        assert!(got == expected, "{} bytes differ from {}", got.len(), expected.len());
    });
    let mut session = bench.start();
    let (mut sent, mut acked) = (0usize, 0usize);
    while acked < bytes.len() {
        while sent < bytes.len() && sent - acked < WINDOW {
            let end = (sent + 60_000).min(bytes.len()).min(acked + WINDOW);
            session.data(Stream::Stdout, sent as u64, &bytes[sent..end]);
            sent = end;
        }
        if let Frame::Control(ToAgent::Wrote {
            stream: Stream::Stdout,
            offset,
        }) = session.hear()
        {
            acked = offset.try_into().unwrap();
        }
    }
    session.exit(Ended::Code(0));
    assert_eq!(shim.wait().code(), Some(0));
    reader.join().unwrap();
}

#[test]
fn a_blocked_stdout_does_not_hold_up_stderr() {
    let bench = Bench::new();
    let mut shim = Shim::spawn(bench.batch());
    let mut session = bench.start();
    let bytes = pattern(WINDOW);
    for (i, piece) in bytes.chunks(60_000).enumerate() {
        session.data(Stream::Stdout, i as u64 * 60_000, piece);
    }
    session.data(Stream::Stderr, 0, b"all is well\n");
    session.wrote(Stream::Stderr, 12);
    let mut line = [0; 12];
    shim.0.stderr.as_mut().unwrap().read_exact(&mut line).unwrap();
    assert_eq!(&line, b"all is well\n");
    let mut out = shim.0.stdout.take().unwrap();
    let reader = thread::spawn(move || {
        let mut got = Vec::new();
        out.read_to_end(&mut got).unwrap();
        got
    });
    session.exit(Ended::Code(0));
    assert_eq!(shim.wait().code(), Some(0));
    assert!(reader.join().unwrap() == bytes);
}

#[test]
fn one_file_for_both_outputs_is_one_stream_and_is_emptied_on_a_first_start() {
    let bench = Bench::new();
    let file = bench.output_file("of an earlier job\n");
    let mut command = bench.batch();
    command.stdout(file.try_clone().unwrap()).stderr(file);
    let shim = Shim::spawn(command);
    let mut session = bench.accept();
    assert!(session.open.merge_stderr);
    let meta = fs::metadata(bench.path("out")).unwrap();
    assert_eq!(
        session.open.stdout,
        Sink {
            regular: true,
            dev: meta.dev(),
            ino: meta.ino(),
            base: 0,
            end: None
        }
    );
    assert_eq!(meta.len(), 18, "nothing is lost before the program starts");
    session.started(0, 0, false, None);
    session.data(Stream::Stdout, 0, b"new\n");
    session.exit(Ended::Code(0));
    assert_eq!(shim.finish().0.code(), Some(0));
    assert_eq!(fs::read_to_string(bench.path("out")).unwrap(), "new\n");
}

#[test]
fn a_user_who_chose_append_keeps_what_is_there() {
    let bench = Bench::new();
    let mut command = bench.command(&bench.args(slurm_vm_api::shim::StepKind::Batch, OpenMode::Append));
    command.stdout(bench.output_file("before\n"));
    let shim = Shim::spawn(command);
    let mut session = bench.accept();
    assert_eq!(session.open.stdout.base, 7);
    session.started(0, 0, false, None);
    session.data(Stream::Stdout, 0, b"after\n");
    session.exit(Ended::Code(0));
    assert_eq!(shim.finish().0.code(), Some(0));
    assert_eq!(fs::read_to_string(bench.path("out")).unwrap(), "before\nafter\n");
}

#[test]
fn a_resumed_program_goes_on_at_the_last_acknowledged_byte_and_what_is_behind_it_already_is_not_written_twice() {
    let bench = Bench::new();
    let mut command = bench.batch();
    command.stdout(bench.output_file("base:12345678-written but "));
    let shim = Shim::spawn(command);
    let mut session = bench.accept();
    let sink = Sink {
        base: 5,
        dev: 999,
        ..session.open.stdout.clone()
    };
    session.started(8, 0, true, Some(sink));
    session.data(Stream::Stdout, 8, b"-written but never acknowledged");
    session.exit(Ended::Code(0));
    assert_eq!(shim.finish().0.code(), Some(0));
    assert_eq!(
        fs::read_to_string(bench.path("out")).unwrap(),
        "base:12345678-written but never acknowledged"
    );
}

#[test]
fn another_file_is_not_cut_when_a_program_is_resumed() {
    let bench = Bench::new();
    let mut command = bench.batch();
    command.stdout(bench.output_file("somebody else's file\n"));
    let shim = Shim::spawn(command);
    let mut session = bench.accept();
    let sink = Sink {
        base: 0,
        ino: 1,
        ..session.open.stdout.clone()
    };
    session.started(4, 0, true, Some(sink));
    session.data(Stream::Stdout, 4, b"more\n");
    session.exit(Ended::Code(0));
    assert_eq!(shim.finish().0.code(), Some(0));
    assert_eq!(fs::read_to_string(bench.path("out")).unwrap(), "somebody else's file\nmore\n");
}

#[test]
fn a_session_that_breaks_goes_on_where_it_was_with_no_byte_lost_or_twice() {
    let bench = Bench::new();
    let shim = Shim::spawn(bench.batch());
    let mut session = bench.start();
    session.data(Stream::Stdout, 0, b"one two ");
    session.wrote(Stream::Stdout, 8);
    drop(session);
    let mut session = bench.accept();
    assert_eq!(session.open.resume, [(Stream::Stdout, 8), (Stream::Stderr, 0)]);
    assert!(session.script.is_some());
    // An agent that knows only of the first four sends again from there.
    session.started(4, 0, true, None);
    session.data(Stream::Stdout, 4, b"two three");
    session.exit(Ended::Code(3));
    let (status, out, _) = shim.finish();
    assert_eq!((status.code(), out.as_str()), (Some(3), "one two three"));
}

#[test]
fn stdin_goes_through_a_window_and_is_sent_again_after_a_break() {
    let bench = Bench::new();
    let mut command = bench.step();
    command.stdin(Stdio::piped());
    let mut shim = Shim::spawn(command);
    let bytes = pattern(1 << 20);
    let mut input = shim.0.stdin.take().unwrap();
    let writer = {
        let bytes = bytes.clone();
        thread::spawn(move || input.write_all(&bytes).unwrap())
    };
    let mut session = bench.start();
    let mut got: Vec<u8> = Vec::new();
    let mut broken = false;
    let end = loop {
        match session.hear() {
            Frame::Data {
                stream: Stream::Stdin,
                offset,
                bytes,
            } => {
                assert_eq!(offset, got.len() as u64);
                got.extend_from_slice(&bytes);
                if got.len() > 500_000 && !broken {
                    // The last bytes were not taken by the guest: the next session gets them again.
                    broken = true;
                    got.truncate(got.len() - bytes.len());
                    drop(session);
                    session = bench.accept();
                    session.started(0, got.len() as u64, true, None);
                    continue;
                }
                session.say(ToShim::StdinTaken { offset: got.len() as u64 });
            }
            Frame::Control(ToAgent::StdinEof { offset }) => break offset,
            other => panic!("{other:?}"),
        }
    };
    writer.join().unwrap();
    assert_eq!(end, bytes.len() as u64);
    assert!(got == bytes);
    session.exit(Ended::Code(0));
    assert_eq!(shim.wait().code(), Some(0));
}

#[test]
fn signals_are_relayed_but_the_notice_is_told_to_the_agent_alone() {
    let bench = Bench::new();
    let shim = Shim::spawn(bench.batch());
    let mut session = bench.start();
    for signo in [10, 2, 40, 20] {
        shim.signal(signo);
        assert_eq!(session.message(), ToAgent::Signal { signo });
    }
    shim.signal(60);
    assert_eq!(session.message(), ToAgent::Notice);
    session.exit(Ended::Code(0));
    assert_eq!(shim.finish().0.code(), Some(0));
}

#[test]
fn a_signal_before_the_start_waits_for_the_program() {
    let bench = Bench::new();
    let shim = Shim::spawn(bench.batch());
    let mut session = bench.accept();
    shim.signal(12);
    shim.signal(60);
    session.started(0, 0, false, None);
    assert_eq!(session.message(), ToAgent::Notice);
    assert_eq!(session.message(), ToAgent::Signal { signo: 12 });
    session.exit(Ended::Code(0));
    assert_eq!(shim.finish().0.code(), Some(0));
}

#[test]
fn sigterm_is_relayed_once_its_cause_is_known_and_the_end_says_why() {
    for (cause, line) in [
        (Cause::Cancel, "slurm-vm: job 12 on n1: cancelled\n"),
        (Cause::TimeLimit, "slurm-vm: job 12 on n1: time limit reached\n"),
        (Cause::Unknown, ""),
    ] {
        let bench = Bench::new();
        let shim = Shim::spawn(bench.batch());
        let mut session = bench.start();
        shim.signal(15);
        assert_eq!(session.message(), ToAgent::WhyTerm);
        session.say(ToShim::Cause(cause));
        assert_eq!(session.message(), ToAgent::Signal { signo: 15 });
        session.data(Stream::Stderr, 0, b"");
        session.data(Stream::Stdout, 0, b"last words\n");
        session.exit(Ended::Signal(15));
        let (status, out, err) = shim.finish();
        assert_eq!((status.signal(), out.as_str(), err.as_str()), (Some(15), "last words\n", line));
    }
}

#[test]
fn a_program_that_outlives_the_cancel_is_announced_before_slurm_kills() {
    let bench = Bench::new();
    let mut shim = Shim::spawn(bench.batch());
    let mut session = bench.start();
    shim.signal(15);
    assert_eq!(session.message(), ToAgent::WhyTerm);
    session.say(ToShim::Cause(Cause::Cancel));
    let mut line = [0; 34];
    shim.0.stderr.as_mut().unwrap().read_exact(&mut line).unwrap();
    assert_eq!(&line, b"slurm-vm: job 12 on n1: cancelled\n");
    session.exit(Ended::Code(0));
    let (status, _, err) = shim.finish();
    assert_eq!((status.code(), err.as_str()), (Some(0), ""), "and it is said once");
}

#[test]
fn a_step_is_not_ended_by_the_beginning_of_grace() {
    let bench = Bench::new();
    let shim = Shim::spawn(bench.step());
    let mut session = bench.start();
    shim.signal(15);
    assert_eq!(session.message(), ToAgent::WhyTerm);
    session.say(ToShim::Cause(Cause::Preemption));
    shim.signal(10);
    assert_eq!(session.message(), ToAgent::Signal { signo: 10 }, "nothing was relayed in between");
    session.exit(Ended::Code(0));
    assert_eq!(shim.finish().0.code(), Some(0));
}

#[test]
fn a_requeue_or_a_move_ends_the_shim_quietly() {
    for cause in [Cause::Moved, Cause::Requeued] {
        let bench = Bench::new();
        let shim = Shim::spawn(bench.batch());
        let mut session = bench.start();
        shim.signal(15);
        assert_eq!(session.message(), ToAgent::WhyTerm);
        session.say(ToShim::Cause(cause));
        let (status, out, err) = shim.finish();
        assert_eq!((status.code(), out.as_str(), err.as_str()), (Some(0), "", ""));
    }
}

#[test]
fn after_a_hand_over_nothing_is_written_and_sigterm_ends_the_shim_even_without_an_agent() {
    let bench = Bench::new();
    let mut command = bench.batch();
    command.stdout(bench.output_file(""));
    let shim = Shim::spawn(command);
    let mut session = bench.start();
    session.data(Stream::Stdout, 0, b"here\n");
    session.wrote(Stream::Stdout, 5);
    session.say(ToShim::HandOver);
    assert_eq!(
        session.message(),
        ToAgent::HandedOver {
            wrote: vec![(Stream::Stdout, 5), (Stream::Stderr, 0)],
            sinks: vec![
                (
                    Stream::Stdout,
                    Sink {
                        end: Some(5),
                        ..session.open.stdout.clone()
                    }
                ),
                (Stream::Stderr, session.open.stderr.clone())
            ]
        }
    );
    session.data(Stream::Stdout, 5, b"not here\n");
    drop((session, bench.listener.as_ref()));
    shim.signal(15);
    let (status, _, err) = shim.finish();
    assert_eq!((status.code(), err.as_str()), (Some(0), ""));
    assert_eq!(fs::read_to_string(bench.path("out")).unwrap(), "here\n");
}

#[test]
fn an_agent_that_forgot_the_vm_it_handed_over_does_not_end_the_job() {
    let bench = Bench::new();
    let shim = Shim::spawn(bench.batch());
    let mut session = bench.start();
    session.say(ToShim::HandOver);
    assert!(matches!(session.message(), ToAgent::HandedOver { .. }));
    drop(session);
    bench.accept().say(ToShim::Failed {
        outcome: 123,
        why: "no such VM".into(),
    });
    // It comes back to ask again, and waits for Slurm.
    let _session = bench.accept();
    shim.signal(15);
    let (status, _, err) = shim.finish();
    assert_eq!((status.code(), err.as_str()), (Some(0), ""));
}

#[test]
fn an_agent_that_ignores_the_window_is_made_to_wait() {
    let bench = Bench::new();
    let shim = Shim::spawn(bench.batch());
    let mut session = bench.start();
    session.stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let piece = vec![b'x'; 60_000];
    let mut sent = 0u64;
    // Nobody reads the shim's stdout.
    while write_frame::<ToShim>(
        &mut session.stream,
        &Frame::Data {
            stream: Stream::Stdout,
            offset: sent,
            bytes: piece.clone(),
        },
    )
    .is_ok()
    {
        sent += 60_000;
        assert!(sent < 8 << 20, "the shim keeps everything in its memory");
    }
    drop(shim);
}

#[test]
fn a_program_that_ended_right_before_its_vm_leaves_does_not_end_the_job_while_output_is_missing() {
    let bench = Bench::new();
    let mut command = bench.batch();
    // It takes nothing: what comes waits, and is dropped at the hand-over.
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    command.stdout(full);
    let mut shim = Shim::spawn(command);
    let mut session = bench.start();
    session.data(Stream::Stdout, 0, b"not written\n");
    session.say(ToShim::Exited(Ended::Code(0)));
    session.say(ToShim::HandOver);
    assert!(matches!(session.message(), ToAgent::HandedOver { wrote, .. } if wrote[0] == (Stream::Stdout, 0)));
    // Whoever goes on with the output is told of the end; for this one it changes nothing.
    session.say(ToShim::Exited(Ended::Code(0)));
    session.say(ToShim::TakeBack);
    let mut session = bench.accept();
    assert_eq!(session.open.resume[0], (Stream::Stdout, 0));
    assert!(shim.0.try_wait().unwrap().is_none(), "it has ended the job");
    session.started(0, 0, true, None);
    drop(session);
}

#[test]
fn the_place_in_a_file_that_is_emptied_at_the_start_is_known_from_the_beginning() {
    let bench = Bench::new();
    let mut command = bench.batch();
    command.stdout(bench.output_file("of an earlier run\n"));
    let _shim = Shim::spawn(command);
    // A shim on another node goes by it where this one cannot report.
    assert_eq!(bench.accept().open.stdout.base, 0);
}

#[test]
fn a_move_that_did_not_happen_is_taken_back() {
    for agent_restarts in [false, true] {
        let bench = Bench::new();
        let shim = Shim::spawn(bench.batch());
        let mut session = bench.start();
        session.data(Stream::Stdout, 0, b"before ");
        session.wrote(Stream::Stdout, 7);
        session.say(ToShim::HandOver);
        assert!(matches!(session.message(), ToAgent::HandedOver { .. }));
        shim.signal(10);
        if agent_restarts {
            drop(session);
        } else {
            session.say(ToShim::TakeBack);
        }
        session = bench.accept();
        assert_eq!(session.open.resume[0], (Stream::Stdout, 7));
        session.started(7, 0, true, None);
        assert_eq!(session.message(), ToAgent::Signal { signo: 10 });
        session.data(Stream::Stdout, 7, b"after");
        session.exit(Ended::Code(0));
        assert_eq!(shim.finish().1, "before after");
    }
}

#[test]
fn a_reader_that_is_gone_is_a_sigpipe_for_the_program() {
    let bench = Bench::new();
    let mut shim = Shim::spawn(bench.step());
    let mut session = bench.start();
    drop(shim.0.stdout.take());
    session.data(Stream::Stdout, 0, b"into the void");
    assert_eq!(session.message(), ToAgent::Signal { signo: 13 });
    session.exit(Ended::Signal(13));
    assert_eq!(shim.wait().signal(), Some(13));
}

#[test]
fn progress_is_for_steps_and_never_in_a_batch_jobs_output() {
    for (batch, expected) in [(true, ""), (false, "slurm-vm: job 12: booting\n")] {
        let bench = Bench::new();
        let shim = Shim::spawn(if batch { bench.batch() } else { bench.step() });
        let mut session = bench.accept();
        session.say(ToShim::Progress("booting".into()));
        session.started(0, 0, false, None);
        session.exit(Ended::Code(0));
        assert_eq!(shim.finish().2, expected);
    }
}

#[test]
fn a_terminal_is_raw_while_the_program_runs_and_as_before_afterwards() {
    use nix::sys::termios::{LocalFlags, tcgetattr};
    let bench = Bench::new();
    let size = nix::pty::Winsize {
        ws_row: 33,
        ws_col: 111,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let pty = nix::pty::openpty(&size, None).unwrap();
    let before = tcgetattr(&pty.slave).unwrap().local_flags;
    assert!(before.contains(LocalFlags::ECHO));
    let mut command = bench.step();
    let slave = || pty.slave.try_clone().unwrap();
    command.stdin(slave()).stdout(slave()).stderr(slave());
    let mut shim = Shim::spawn(command);
    let mut session = bench.start();
    let terminal = session.open.terminal.clone().unwrap();
    assert_eq!((terminal.rows, terminal.cols, session.open.merge_stderr), (33, 111, true));
    session.data(Stream::Stdout, 0, b"$ ");
    session.wrote(Stream::Stdout, 2);
    assert!(!tcgetattr(&pty.slave).unwrap().local_flags.contains(LocalFlags::ECHO));
    let mut master = File::from(pty.master);
    master.write_all(b"\x03").unwrap();
    assert_eq!(
        session.hear(),
        Frame::Data {
            stream: Stream::Stdin,
            offset: 0,
            bytes: vec![3]
        },
        "^C is the guest's to understand"
    );
    shim.signal(28);
    assert!(matches!(session.message(), ToAgent::Resize(t) if t.rows == 33));
    session.exit(Ended::Code(0));
    assert_eq!(shim.wait().code(), Some(0));
    assert_eq!(tcgetattr(&pty.slave).unwrap().local_flags, before);
}
