//! What the programs of a VM promise, by their sessions and their guest.
use super::*;
use crate::{
    limits::{Bounds, Budget},
    vm::outbox::{Outbox, outbox},
};

fn record(wrote: u64) -> ProgramRecord {
    ProgramRecord {
        id: 1,
        key: "batch.0".into(),
        merged: false,
        terminal: false,
        stdout: None,
        stderr: None,
        wrote: [wrote, 0],
        ended: None,
        started: true,
    }
}

/// A shim of the job's batch script comes; `resume`: it has written so much.
fn shim(programs: &mut Programs, session: u64, resume: Option<u64>) -> Outbox {
    let (to, from) = outbox(Budget::new(Bounds::default()).bytes(7, 0).unwrap(), || {});
    let sink = Sink {
        regular: true,
        dev: 1,
        ino: 1,
        base: 0,
        end: None,
    };
    let open = Open {
        version: session::VERSION,
        job: 1,
        step: session::BATCH_STEP,
        task: 0,
        restart: 0,
        kind: session::StepKind::Batch,
        spec: slurm_vm_api::spec::VmSpec::for_image("tiny").unwrap(),
        cwd: "/".into(),
        umask: 0,
        groups: vec![],
        user: session::UserEntry::default(),
        rlimits: vec![],
        terminal: None,
        merge_stderr: false,
        stdout: sink.clone(),
        stderr: sink,
        resume: resume.map(|at| (Stream::Stdout, at)).into_iter().collect(),
    };
    let (environment, arguments, script) = (vec![], vec![], None);
    programs.attach(
        Attach {
            session,
            open,
            environment,
            arguments,
            script,
            held: None,
            to,
        },
        1,
    );
    from
}

/// What a shim was sent of stdout, in order and without holes from `at` on.
fn sent(from: &Outbox, mut at: u64) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(frame) = from.next_at_once() {
        if let Frame::Data {
            stream: Stream::Stdout,
            offset,
            bytes,
        } = frame
        {
            assert_eq!(offset, at);
            at += bytes.len() as u64;
            all.extend(bytes);
        }
    }
    all
}

#[test]
fn kept_output_that_is_over_the_limit_or_finds_no_room_on_the_disk_is_not_dropped() {
    for (dir_is_there, limit) in [(true, 4), (false, 1 << 20), (true, 0)] {
        let dir = tempfile::tempdir().unwrap();
        let spools = if dir_is_there { dir.path().into() } else { dir.path().join("none") };
        let mut programs = Programs::new(&[record(100)], spools, limit);
        programs.take_spool(1, 0, 100, b"0123456789");
        programs.take_spool(1, 0, 110, b"abc");
        programs.adopt(&record(100));
        assert_eq!(programs.take_complaints().is_empty(), dir_is_there);
        assert_eq!(
            programs.spools(),
            [(1, 0, 100, b"0123456789abc".to_vec())],
            "to go on with the next move"
        );
        let from = shim(&mut programs, 1, None);
        assert_eq!(sent(&from, 100), b"0123456789abc", "{dir_is_there} {limit}");
        // Nothing more goes there: it stays in the guest.
        assert_eq!(programs.data(1, guest::Stream::Stdout, 113, b"new").len(), 0);
        let requests = programs.wrote(1, Stream::Stdout, 113);
        assert!(requests.contains(&resume(113)) || requests.contains(&resume(116)), "{requests:?}");
    }
}

#[test]
fn after_a_restore_the_guest_goes_on_behind_what_came_with_the_save_though_its_ring_begins_before() {
    let dir = tempfile::tempdir().unwrap();
    let mut programs = Programs::new(&[record(100)], dir.path().into(), 1 << 20);
    // A save's kept output comes without a word of offsets.
    programs.take_spool(1, 0, 100, b"0123456789");
    assert!(programs.guest_up(&[report(100)]).contains(&resume(110)));
    programs.data(1, guest::Stream::Stdout, 110, b"abc");
    assert_eq!(programs.spools(), [(1, 0, 100, b"0123456789abc".to_vec())]);
    let from = shim(&mut programs, 1, None);
    assert_eq!(sent(&from, 100), b"0123456789abc");
}

#[test]
fn a_kept_piece_that_comes_twice_is_neither_doubled_nor_takes_the_place_of_what_came_before() {
    let dir = tempfile::tempdir().unwrap();
    let mut programs = Programs::new(&[record(100)], dir.path().into(), 1 << 20);
    for (offset, piece) in [(100, b"0123"), (104, b"4567"), (104, b"4567"), (100, b"0123"), (106, b"6789")] {
        programs.take_spool(1, 0, offset, piece);
    }
    assert_eq!(programs.spools(), [(1, 0, 100, b"0123456789".to_vec())]);
    assert!(programs.take_complaints().is_empty());
    // Of another run: nothing of it is ours.
    programs.take_spool(1, 0, 104, b"another");
    assert_eq!(programs.spools(), [(1, 0, 104, b"another".to_vec())]);
    assert_eq!(programs.take_complaints().len(), 1);
}

#[test]
fn what_is_kept_stays_in_the_guests_ring_while_there_is_room_so_that_a_failed_hand_over_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut programs = Programs::new(&[record(100)], dir.path().into(), 1 << 20);
    let mut acked = 100;
    let (mut at, piece) = (100, vec![b'x'; 32 << 10]);
    for _ in 0..20 {
        for request in programs.data(1, guest::Stream::Stdout, at, &piece) {
            match request {
                ToGuest::Ack { offset, .. } => {
                    assert!(offset > acked, "{offset} after {acked}");
                    acked = offset;
                }
                other => panic!("{other:?}"),
            }
        }
        at += piece.len() as u64;
        let stays = at - acked;
        assert!(stays <= KEPT_IN_RING && (stays == KEPT_IN_RING || acked == 100), "{stays}");
    }
    // The next node was never told: its guest still has it.
    let mut next = Programs::new(&[record(acked)], dir.path().join("none"), 1 << 20);
    assert!(next.guest_up(&[report(acked)]).contains(&resume(acked)));
    assert!(next.take_complaints().is_empty());
    let mut next = Programs::new(&[record(100)], dir.path().join("none"), 1 << 20);
    assert!(next.guest_up(&[report(acked)]).contains(&resume(acked)));
    assert_eq!(next.take_complaints().len(), 1, "what is gone is said");
}

#[test]
fn the_end_of_a_file_at_a_hand_over_is_passed_on_and_forgotten_as_soon_as_the_shim_gets_more() {
    let sealed = |p: &Programs| p.records()[0].stdout.as_ref().and_then(|s| s.end);
    let hand_over = |p: &mut Programs, session| {
        let sink = Sink {
            regular: true,
            dev: 1,
            ino: 1,
            base: 0,
            end: Some(104),
        };
        p.sealed(session, &[(Stream::Stdout, sink)]);
    };
    let dir = tempfile::tempdir().unwrap();
    let mut programs = Programs::new(&[record(100)], dir.path().into(), 1 << 20);
    programs.guest_up(&[report(100)]);
    let _from = shim(&mut programs, 1, None);
    programs.data(1, guest::Stream::Stdout, 100, b"1234");
    programs.wrote(1, Stream::Stdout, 104);
    hand_over(&mut programs, 1);
    assert_eq!(sealed(&programs), Some(104));
    // Taken back.
    programs.data(1, guest::Stream::Stdout, 104, b"5678");
    assert_eq!(sealed(&programs), None);
    hand_over(&mut programs, 1);
    let _from = shim(&mut programs, 2, Some(104));
    assert_eq!(sealed(&programs), None, "a shim that came back may have written in between");
    hand_over(&mut programs, 2);
    let from = shim(&mut programs, 3, None);
    let told = std::iter::from_fn(|| from.next_at_once()).find_map(|f| match f {
        Frame::Control(ToShim::Started { from, .. }) => from[0].sink.clone(),
        _ => None,
    });
    assert_eq!(told.and_then(|s| s.end), Some(104), "the next shim learns of it");
}

#[test]
fn the_node_that_takes_over_learns_the_end_of_the_file_unless_its_own_shim_has_bytes_already() {
    let mut handed = record(104);
    handed.stdout = Some(Sink {
        regular: true,
        dev: 1,
        ino: 1,
        base: 0,
        end: Some(104),
    });
    for (late, end) in [(false, Some(104)), (true, None)] {
        let dir = tempfile::tempdir().unwrap();
        let mut programs = Programs::new(&[record(100)], dir.path().into(), 1 << 20);
        let _from = late.then(|| shim(&mut programs, 1, None));
        if late {
            programs.guest_up(&[report(100)]);
            programs.data(1, guest::Stream::Stdout, 100, b"12345678");
        }
        programs.adopt(&handed);
        let told = programs.records()[0].stdout.as_ref().and_then(|s| s.end);
        assert_eq!(told, end, "{late}");
    }
}

fn resumed_from(wrote: u64, kept: &[u8], ring_start: u64) -> (Vec<ToGuest>, u64) {
    let dir = tempfile::tempdir().unwrap();
    let record = record(wrote);
    let mut programs = Programs::new(std::slice::from_ref(&record), dir.path().into(), 1 << 20);
    programs.take_spool(1, 0, wrote, kept);
    programs.adopt(&record);
    (programs.guest_up(&[report(ring_start)]), programs.records()[0].wrote[0])
}

fn report(ring_start: u64) -> guest::ProgramReport {
    guest::ProgramReport {
        program: 1,
        state: guest::ProgramState::Running,
        report: guest::StartReport::default(),
        stdin_consumed: 0,
        streams: vec![guest::StreamReport {
            stream: guest::Stream::Stdout,
            start: ring_start,
            end: 1000,
            eof: false,
            ring_bytes: 4096,
        }],
    }
}

fn resume(from: u64) -> ToGuest {
    ToGuest::Resume {
        program: 1,
        stream: guest::Stream::Stdout,
        from,
    }
}

#[test]
fn output_goes_on_at_the_last_written_byte_or_where_the_guests_ring_begins() {
    let (requests, wrote) = resumed_from(436, b"", 400);
    assert!(requests.contains(&resume(436)) && wrote == 436, "{requests:?} {wrote}");
    // An agent that died had acknowledged more than it put on record: all of that was written.
    let (requests, wrote) = resumed_from(436, b"", 560);
    assert!(requests.contains(&resume(560)) && wrote == 560, "{requests:?} {wrote}");
    // What the last agent had kept for a shim is not skipped.
    let (requests, wrote) = resumed_from(436, &[b'x'; 124], 560);
    assert!(requests.contains(&resume(560)) && wrote == 436, "{requests:?} {wrote}");
}

fn exited_at(programs: &mut Programs, end: u64) {
    let status = ExitStatus::Code { code: 0 };
    programs.exited(1, status, &[(guest::Stream::Stdout, end)]);
}

/// What a shim was told, beside output: where to go on, and whether the file holds something already; or that the program has ended.
fn told(from: &Outbox) -> Vec<Result<(u64, bool), Ended>> {
    let mut told = Vec::new();
    while let Some(frame) = from.next_at_once() {
        match frame {
            Frame::Control(ToShim::Started { from, resumed }) => told.push(Ok((from[0].offset, resumed))),
            Frame::Control(ToShim::Exited(ended)) => told.push(Err(ended)),
            _ => {}
        }
    }
    told
}

#[test]
fn a_program_that_ended_before_the_agent_was_restarted_has_ended_for_its_shim_only_when_all_of_its_output_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let ended = ProgramRecord {
        ended: Some(Ended::Code(0)),
        ..record(100)
    };
    let mut programs = Programs::new(&[ended], dir.path().into(), 1 << 20);
    let from = shim(&mut programs, 1, Some(100));
    assert_eq!(told(&from), [Ok((100, true))], "its output is not known yet");
    programs.guest_up(&[report(100)]);
    programs.data(1, guest::Stream::Stdout, 100, b"the rest");
    assert_eq!(told(&from), []);
    exited_at(&mut programs, 108);
    assert_eq!(told(&from), [Err(Ended::Code(0))]);
    // A guest that knows nothing of it has nothing more to say.
    let ended = ProgramRecord {
        ended: Some(Ended::Code(3)),
        ..record(100)
    };
    let mut programs = Programs::new(&[ended], dir.path().join("none"), 1 << 20);
    let from = shim(&mut programs, 1, Some(100));
    programs.guest_up(&[]);
    assert_eq!(told(&from), [Ok((100, true)), Err(Ended::Code(3))]);
}

#[test]
fn a_program_that_was_put_on_record_and_not_started_yet_is_started_by_the_next_agent_and_writes_its_file_anew() {
    let dir = tempfile::tempdir().unwrap();
    let unstarted = ProgramRecord {
        started: false,
        ..record(0)
    };
    let programs = || Programs::new(std::slice::from_ref(&unstarted), dir.path().into(), 1 << 20);
    let mut killed_before = programs();
    let from = shim(&mut killed_before, 1, None);
    let requests = killed_before.guest_up(&[]);
    assert!(matches!(requests[..], [ToGuest::Start { program: 1, .. }]), "{requests:?}");
    killed_before.started(1, &guest::StartReport::default());
    assert_eq!(told(&from), [Ok((0, false))]);
    assert!(killed_before.records()[0].started);
    // Started, and killed before that was written. The guest has all of its output, or not.
    for (ring_start, resumed) in [(0, false), (64, true)] {
        let mut killed_after = programs();
        let from = shim(&mut killed_after, 1, None);
        let requests = killed_after.guest_up(&[report(ring_start)]);
        assert!(!requests.iter().any(|r| matches!(r, ToGuest::Start { .. })), "twice: {requests:?}");
        assert_eq!(told(&from), [Ok((ring_start, resumed))]);
    }
    // One that was started, and that the guest has forgotten, is not started again.
    let mut lost = Programs::new(&[record(0)], dir.path().into(), 1 << 20);
    let _from = shim(&mut lost, 1, None);
    assert_eq!(lost.guest_up(&[]), []);
    assert!(matches!(lost.batch_ended(), Some(Ended::NotStarted { .. })));
}

#[test]
fn a_shim_is_told_where_to_go_on_when_what_it_waits_for_was_acknowledged_by_another() {
    let dir = tempfile::tempdir().unwrap();
    // The source's word never came: its shim wrote up to 148, and here 116 is on record.
    let mut programs = Programs::new(&[record(116)], dir.path().into(), 1 << 20);
    let from = shim(&mut programs, 1, None);
    assert_eq!(told(&from), [Ok((116, true))]);
    programs.guest_up(&[report(148)]);
    assert_eq!(told(&from), [Ok((148, true))]);
    // It comes back in between, with what it had.
    let from = shim(&mut programs, 2, Some(116));
    programs.lost_before(1, guest::Stream::Stdout, 148);
    assert_eq!(told(&from), [Ok((116, true)), Ok((148, true))]);
    // The word comes at last.
    let mut programs = Programs::new(&[record(116)], dir.path().into(), 1 << 20);
    let from = shim(&mut programs, 1, None);
    programs.adopt(&record(148));
    assert_eq!(told(&from), [Ok((116, true)), Ok((148, true))]);
}

#[test]
fn a_late_word_of_offsets_takes_nothing_back_of_what_the_shim_here_has() {
    let dir = tempfile::tempdir().unwrap();
    let mut programs = Programs::new(&[record(100)], dir.path().into(), 1 << 20);
    programs.guest_up(&[report(100)]);
    let from = shim(&mut programs, 1, Some(100));
    programs.data(1, guest::Stream::Stdout, 100, &[b'x'; 50]);
    programs.adopt(&record(120));
    exited_at(&mut programs, 150);
    assert_eq!(told(&from), [Ok((100, true)), Err(Ended::Code(0))]);
    assert_eq!(programs.wrote(1, Stream::Stdout, 150).len(), 1, "acknowledged");
    assert_eq!(programs.records()[0].wrote[0], 150);
}
