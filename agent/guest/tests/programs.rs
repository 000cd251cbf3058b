//! Programs in a helper, driven through a real link: what they get and what comes back.

mod support;

use std::time::{Duration, Instant};

use slurm_vm::guest::{LinkEvent, LinkRequest};
use slurm_vm_api::guest::{Action, ByteString, ExecStep, ExitStatus, Limit, RING_BYTES, Refusal, Scope, Stdio, Stream, UserLine};
use support::{Guest, Host, Random, sh, spec};

fn pair() -> (Guest, Host) {
    let guest = Guest::new();
    let host = Host::new(&guest.port(), 7);
    (guest, host)
}

#[test]
fn a_program_returns_its_output_and_its_exit_code() {
    let (_guest, mut host) = pair();
    let outcome = host.run(1, sh("echo out; echo err >&2; exit 3"));
    assert_eq!((outcome.stdout(), outcome.stderr()), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!(outcome.status, Some(ExitStatus::Code { code: 3 }));
    assert!(outcome.started.unwrap().pid > 0);
}

#[test]
fn empty_output_and_output_without_a_newline_arrive_as_they_are() {
    let (_guest, mut host) = pair();
    assert_eq!(host.run(1, sh("exit 0")).stdout(), b"");
    assert_eq!(host.run(2, sh("printf 'no newline'")).stdout(), b"no newline");
    assert_eq!(host.run(3, sh("printf '\\0\\0\\377'")).stdout(), b"\0\0\xff");
}

#[test]
fn merged_streams_keep_their_order() {
    let (_guest, mut host) = pair();
    let mut spec = sh("for i in $(seq 500); do echo o$i; echo e$i >&2; done");
    spec.stdio = Stdio::Pipes {
        merge_stderr: true,
        stdin: false,
    };
    let outcome = host.run(1, spec);
    let expected: String = (1..=500).map(|i| format!("o{i}\ne{i}\n")).collect();
    assert_eq!(outcome.text(), expected);
    assert!(!outcome.streams.contains_key(&Stream::Stderr));
}

#[test]
fn standard_input_arrives_whole_and_ends() {
    let (_guest, mut host) = pair();
    let bytes = Random(99).bytes(2_000_000);
    let mut spec = spec(&["cat"]);
    spec.stdio = Stdio::Pipes {
        merge_stderr: true,
        stdin: true,
    };
    host.start(1, spec);
    let mut sent = 0usize;
    while sent < bytes.len() {
        host.until("room for input", |host| sent as u64 - host.stdin_acked < u64::from(RING_BYTES) / 2);
        let end = (sent + 50_000).min(bytes.len());
        host.link.send(LinkRequest::Stdin {
            program: 1,
            offset: sent as u64,
            bytes: bytes[sent..end].to_vec(),
        });
        sent = end;
    }
    host.link.send(LinkRequest::StdinEof {
        program: 1,
        offset: sent as u64,
    });
    let outcome = host.finish(1);
    assert_eq!(outcome.code(), Some(0));
    assert!(outcome.stdout() == bytes, "cat must give back what it was given");
    assert_eq!(host.others, []);
}

#[test]
fn input_that_does_not_join_on_is_rejected_with_the_offset_to_go_on_from() {
    let (_guest, mut host) = pair();
    let mut spec = spec(&["cat"]);
    spec.stdio = Stdio::Pipes {
        merge_stderr: true,
        stdin: true,
    };
    host.start(1, spec);
    host.link.send(LinkRequest::Stdin {
        program: 1,
        offset: 0,
        bytes: b"abc".to_vec(),
    });
    host.link.send(LinkRequest::Stdin {
        program: 1,
        offset: 5,
        bytes: b"gap".to_vec(),
    });
    host.until("the rejection", |host| !host.others.is_empty());
    assert_eq!(host.others, [LinkEvent::StdinRejected { program: 1, next: 3 }]);
    // Overlapping and repeated input is taken once.
    host.link.send(LinkRequest::Stdin {
        program: 1,
        offset: 1,
        bytes: b"bcd".to_vec(),
    });
    host.link.send(LinkRequest::Stdin {
        program: 1,
        offset: 0,
        bytes: b"ab".to_vec(),
    });
    host.link.send(LinkRequest::StdinEof { program: 1, offset: 4 });
    assert_eq!(host.finish(1).text(), "abcd");
}

#[test]
fn a_program_that_does_not_read_its_input_still_ends() {
    let (_guest, mut host) = pair();
    let mut spec = sh("exec <&-; sleep 0.1; echo done");
    spec.stdio = Stdio::Pipes {
        merge_stderr: true,
        stdin: true,
    };
    host.start(1, spec);
    host.link.send(LinkRequest::Stdin {
        program: 1,
        offset: 0,
        bytes: vec![1; 200_000],
    });
    let outcome = host.finish(1);
    assert_eq!((outcome.text().as_str(), outcome.code()), ("done\n", Some(0)));
}

#[test]
fn a_signal_reaches_the_leader_alone_or_the_whole_session() {
    let (_guest, mut host) = pair();
    // Ready when the child's trap is set, too. Each signal ends one wait; the third is for the child, which would be ended with its leader.
    let child = "trap 'echo child; exit' USR1; echo ready; while :; do sleep 0.05; done";
    let command = &format!("trap 'echo leader' USR1; ({child}) & wait; wait; wait; echo end");
    host.start(1, sh(command));
    host.until("the program to be ready", |host| {
        host.programs.get(&1).is_some_and(|outcome| outcome.text().contains("ready"))
    });
    let usr1 = |scope| Action::Signal {
        program: 1,
        signo: libc::SIGUSR1,
        scope,
    };
    assert_eq!(host.act(1, usr1(Scope::Leader)), None);
    host.until("the leader's trap", |host| host.programs[&1].text().contains("leader\n"));
    assert!(!host.programs[&1].text().contains("child"));
    assert_eq!(host.act(2, usr1(Scope::All)), None);
    let outcome = host.finish(1);
    assert!(outcome.text().contains("child\n"), "{}", outcome.text());
    assert_eq!(host.act(3, usr1(Scope::Leader)).unwrap().errno, libc::ESRCH);
    assert_eq!(
        host.act(
            4,
            Action::Signal {
                program: 9,
                signo: 15,
                scope: Scope::All
            }
        )
        .unwrap()
        .errno,
        libc::ESRCH
    );
}

#[test]
fn death_by_a_signal_is_told_with_its_number_real_time_ones_too() {
    let (_guest, mut host) = pair();
    assert_eq!(
        host.run(1, sh("kill -TERM $$")).status,
        Some(ExitStatus::Signal {
            signo: libc::SIGTERM,
            core: false
        })
    );
    host.start(2, spec(&["sleep", "100"]));
    host.until("the start", |host| host.programs.contains_key(&2));
    assert_eq!(
        host.act(
            1,
            Action::Signal {
                program: 2,
                signo: 60,
                scope: Scope::Leader
            }
        ),
        None
    );
    assert_eq!(host.finish(2).status, Some(ExitStatus::Signal { signo: 60, core: false }));
}

#[test]
fn signals_and_mask_are_the_default_ones_in_the_program() {
    let (_guest, mut host) = pair();
    let text = host.run(1, spec(&["grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status"])).text();
    assert_eq!(text, "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n");
    // No descriptor of the helper leaks: ls has its own directory as the fourth.
    assert_eq!(host.run(2, sh("ls /proc/self/fd | wc -l")).text().trim(), "4");
}

#[test]
fn a_program_that_cannot_run_says_why() {
    let (_guest, mut host) = pair();
    let failed = |errno| {
        Some(ExitStatus::ExecFailed {
            step: ExecStep::Exec,
            errno,
        })
    };
    assert_eq!(host.run(1, spec(&["/nowhere/at/all"])).status, failed(libc::ENOENT));
    assert_eq!(host.run(2, spec(&["no-such-command"])).status, failed(libc::ENOENT));
    assert_eq!(host.run(3, spec(&["/etc/passwd"])).status, failed(libc::EACCES));
}

fn run_script(host: &mut Host, program: u32, script: &[u8]) -> support::Outcome {
    let spec = spec(&["replaced", "one", "two words"]);
    host.link.send(LinkRequest::Start {
        program,
        spec: Box::new(spec),
        script: Some(script.to_vec()),
    });
    host.finish(program)
}

#[test]
fn a_script_runs_by_its_first_line_and_is_its_own_first_argument() {
    let (_guest, mut host) = pair();
    let outcome = run_script(&mut host, 1, b"#!/bin/sh\necho \"$0|$1|$2\"; stat -c %a \"$0\"\n");
    let path = outcome.started.clone().unwrap().script_path.unwrap();
    assert!(path.ends_with("/job1/slurm_script"));
    assert_eq!(outcome.text(), format!("{path}|one|two words\n700\n"));
}

#[test]
fn a_script_without_a_first_line_fails_as_execve_does() {
    let (_guest, mut host) = pair();
    let failed = |errno| {
        Some(ExitStatus::ExecFailed {
            step: ExecStep::Exec,
            errno,
        })
    };
    assert_eq!(run_script(&mut host, 1, b"echo hello\n").status, failed(libc::ENOEXEC));
    assert_eq!(
        run_script(&mut host, 2, b"#!/bin/sh\r\necho hello\r\n").status,
        failed(libc::ENOENT)
    );
    assert_eq!(run_script(&mut host, 3, b"").status, failed(libc::ENOEXEC));
}

#[test]
fn a_script_of_megabytes_arrives() {
    let (_guest, mut host) = pair();
    let script = [
        b"#!/bin/sh\ntail -c 5 \"$0\"; exit 4\n".to_vec(),
        vec![b'#'; 5_000_000],
        b"\nLAST".to_vec(),
    ]
    .concat();
    let outcome = run_script(&mut host, 1, &script);
    assert_eq!((outcome.text().as_str(), outcome.code()), ("\nLAST", Some(4)));
}

#[test]
fn a_huge_environment_that_is_not_text_arrives_in_order() {
    let (_guest, mut host) = pair();
    let mut random = Random(5);
    let mut spec = spec(&["/usr/bin/env", "-0"]);
    spec.env = (0..4000)
        .map(|i| ByteString([format!("V{i}=").into_bytes(), random.bytes(90)].concat()))
        .collect();
    for entry in &mut spec.env {
        entry.0.retain(|byte| *byte != 0);
    }
    // Twice the same name is allowed, and both stay.
    spec.env.push("V0=again".into());
    let expected: Vec<u8> = spec.env.iter().flat_map(|entry| [&entry.0[..], b"\0"].concat()).collect();
    let outcome = host.run(1, spec);
    assert_eq!(outcome.code(), Some(0));
    assert!(outcome.stdout() == expected);
}

#[test]
fn an_argument_list_that_is_too_long_fails_as_execve_does() {
    let (_guest, mut host) = pair();
    let mut spec = spec(&["/bin/true"]);
    spec.argv.push(vec![b'x'; 200_000].into());
    assert_eq!(
        host.run(1, spec).status,
        Some(ExitStatus::ExecFailed {
            step: ExecStep::Exec,
            errno: libc::E2BIG
        })
    );
    let mut spec = sh("true");
    spec.argv.clear();
    host.start(2, spec);
    host.until("the refusal", |host| !host.others.is_empty());
    assert!(matches!(
        host.others[0],
        LinkEvent::Refused {
            program: 2,
            reason: Refusal::Spec,
            ..
        }
    ));
}

#[test]
fn identity_directory_mask_and_limits_are_as_asked() {
    let (guest, mut host) = pair();
    std::fs::write(guest.dir.path().join("passwd"), "root:x:0:0::/:/bin/sh\n").unwrap();
    let mut spec = sh("id -u; id -g; id -G; pwd; umask; ulimit -n; ulimit -c");
    (spec.uid, spec.gid, spec.groups, spec.umask) = (12345, 12346, vec![12346, 777], 0o027);
    spec.cwd = "/usr/bin".into();
    spec.limits = vec![
        Limit {
            name: "NOFILE".into(),
            soft: Some(333),
            hard: Some(400),
        },
        Limit {
            name: "CORE".into(),
            soft: Some(0),
            hard: None,
        },
        Limit {
            name: "WARP".into(),
            soft: None,
            hard: None,
        },
    ];
    spec.user = Some(UserLine {
        name: "alice".into(),
        home: "/home/alice".into(),
        shell: "/bin/sh".into(),
    });
    let outcome = host.run(1, spec);
    assert_eq!(outcome.text(), "12345\n12346\n12346 777\n/usr/bin\n0027\n333\n0\n");
    assert_eq!(outcome.started.unwrap().limits_refused, ["WARP"]);
    let passwd = std::fs::read_to_string(guest.dir.path().join("passwd")).unwrap();
    assert!(passwd.ends_with("\nalice:x:12345:12346::/home/alice:/bin/sh\n"));
}

#[test]
fn a_missing_directory_is_replaced_and_reported() {
    let (_guest, mut host) = pair();
    let mut spec = sh("pwd");
    spec.cwd = "/no/such/place".into();
    let outcome = host.run(1, spec);
    assert_eq!(
        (outcome.text().as_str(), outcome.started.unwrap().cwd_errno),
        ("/\n", Some(libc::ENOENT))
    );
}

#[test]
fn a_terminal_has_size_name_and_control() {
    let (_guest, mut host) = pair();
    let mut spec = sh(
        "tty | cut -c1-9; stty size; echo $TERM; echo err >&2; stty -echo; read line; echo got $line; trap 'stty size; exit 7' WINCH; echo wait; while :; do sleep 0.05; done",
    );
    spec.stdio = Stdio::Pty {
        rows: 33,
        cols: 101,
        term: Some("xterm-slurm".into()),
    };
    host.start(1, spec);
    host.until("the terminal", |host| {
        host.programs.get(&1).is_some_and(|outcome| outcome.text().contains("err"))
    });
    host.link.send(LinkRequest::Stdin {
        program: 1,
        offset: 0,
        bytes: b"hello\r".to_vec(),
    });
    host.until("the trap", |host| host.programs[&1].text().contains("wait"));
    assert_eq!(
        host.act(
            1,
            Action::Resize {
                program: 1,
                rows: 44,
                cols: 55
            }
        ),
        None
    );
    let outcome = host.finish(1);
    let text = outcome.text();
    assert!(text.starts_with("/dev/pts/\r\n33 101\r\nxterm-slurm\r\nerr\r\n"), "{text:?}");
    assert!(text.ends_with("got hello\r\nwait\r\n44 55\r\n"), "{text:?}");
    assert_eq!(outcome.code(), Some(7));
}

#[test]
fn an_interrupt_typed_at_a_terminal_reaches_the_program() {
    let (_guest, mut host) = pair();
    let mut spec = spec(&["sleep", "100"]);
    spec.stdio = Stdio::Pty {
        rows: 24,
        cols: 80,
        term: None,
    };
    host.start(1, spec);
    host.until("the start", |host| host.programs.contains_key(&1));
    host.link.send(LinkRequest::Stdin {
        program: 1,
        offset: 0,
        bytes: b"\x03".to_vec(),
    });
    assert_eq!(
        host.finish(1).status,
        Some(ExitStatus::Signal {
            signo: libc::SIGINT,
            core: false
        })
    );
}

#[test]
fn a_grandchild_that_holds_the_pipe_delays_nothing_and_is_gone_when_forgotten() {
    let (_guest, mut host) = pair();
    let begun = Instant::now();
    let outcome = host.run(1, sh("sleep 300 & echo $!; exit 5"));
    assert_eq!(outcome.code(), Some(5));
    assert!(begun.elapsed() < Duration::from_secs(30));
    let pid: i32 = outcome.text().trim().parse().unwrap();
    let alive = || std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
    assert!(alive());
    assert_eq!(host.act(1, Action::Forget { program: 1 }), None);
    let end = Instant::now() + support::DEADLINE;
    while alive() {
        assert!(Instant::now() < end, "the grandchild lives on");
        std::thread::yield_now();
    }
}

#[test]
fn the_same_start_twice_runs_once_and_a_forgotten_id_can_be_used_again() {
    let (guest, mut host) = pair();
    let mark = guest.dir.path().join("mark");
    let command = format!("echo x >> {}; cat {0}", mark.display());
    host.acknowledge = false;
    assert_eq!(host.run(1, sh(&command)).text(), "x\n");
    drop(host);
    let mut other = Host::new(&guest.port(), 8);
    assert_eq!(other.run(1, sh(&command)).text(), "x\n", "what was not acknowledged comes again");
    assert_eq!(std::fs::read_to_string(&mark).unwrap(), "x\n");
    assert_eq!(other.act(1, Action::Forget { program: 1 }), None);
    other.programs.clear();
    assert_eq!(other.run(1, sh(&command)).text(), "x\nx\n");
}

#[test]
fn a_line_arrives_at_once() {
    let (_guest, mut host) = pair();
    host.start(1, sh("echo first; sleep 100"));
    let begun = Instant::now();
    host.until("the line", |host| {
        host.programs.get(&1).is_some_and(|outcome| outcome.stdout() == b"first\n")
    });
    assert!(begun.elapsed() < Duration::from_secs(2), "took {:?}", begun.elapsed());
    assert_eq!(
        host.act(
            1,
            Action::Signal {
                program: 1,
                signo: 9,
                scope: Scope::All
            }
        ),
        None
    );
    host.finish(1);
}

#[test]
fn simple_actions_are_answered() {
    let (guest, mut host) = pair();
    assert_eq!(host.act(1, Action::Ping), None);
    assert_eq!(host.act(2, Action::Sync), None);
    assert_eq!(host.act(3, Action::Unknown).unwrap().errno, libc::EOPNOTSUPP);
    assert_eq!(
        host.act(
            4,
            Action::Resize {
                program: 1,
                rows: 1,
                cols: 1
            }
        )
        .unwrap()
        .errno,
        libc::ESRCH
    );
    let hello = host.hello.clone().unwrap();
    assert_eq!(
        hello.boot_id,
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim()
    );
    drop(guest);
}
