//! The machine's paths one by one, and every step against every event.
use slurm_vm_api::spec::PreemptWay;

use super::*;

const NOW: u64 = 1_000_000;
const AWAIT: u64 = 300_000;

fn record(ways: &[PreemptWay]) -> JobMove {
    JobMove {
        v: MOVE_VERSION,
        job: 7,
        user: "alice".into(),
        cause: "preemption".into(),
        step: Step::Planned,
        from: "n1".into(),
        to: None,
        to_asked: false,
        held: None,
        needs: Resources { cpus: 1, mem_mib: 512 },
        nodes: 1,
        ways: ways.to_vec(),
        deadline_ms: Some(NOW + 60_000),
        reserve_ms: 2_000,
        time_before: None,
        limit_min: None,
        left_min: None,
        used_s: 0,
        priority: Some(100),
        restarts: 0,
        moved_ms: None,
        settling_ms: None,
        lost: false,
        constraint: Some("vm".into()),
        exclude: vec![],
        partition: "low".into(),
        notes: vec![],
        done: None,
        moving: false,
    }
}

fn runs() -> JobSeen {
    JobSeen {
        standing: Standing::OnNodes,
        nodes: vec!["n1".into()],
        in_grace: true,
        start_s: Some(NOW / 1000 - 150),
        limit_min: Some(60),
        ..JobSeen::default()
    }
}

fn waits() -> JobSeen {
    JobSeen {
        standing: Standing::Waiting,
        restarts: 1,
        limit_min: Some(60),
        ..JobSeen::default()
    }
}

fn runs_on(node: &str) -> JobSeen {
    JobSeen {
        standing: Standing::OnNodes,
        restarts: 1,
        nodes: vec![node.into()],
        ..JobSeen::default()
    }
}

/// A move with its clock.
struct Stage {
    r: Relocation,
    now: u64,
}

impl Stage {
    fn new(ways: &[PreemptWay]) -> Self {
        let (r, effects) = Relocation::new(record(ways), AWAIT, true);
        assert_eq!(effects, [Effect::Persist]);
        Self { r, now: NOW }
    }

    fn at(record: JobMove) -> Self {
        let (r, _) = Relocation::resumed(record, AWAIT, true);
        Self { r, now: NOW }
    }

    /// What is done but for what is written and said.
    fn on(&mut self, event: Event) -> Vec<Effect> {
        let all = self.r.on_event(self.now, event);
        // What changes the outside stands behind the write that it rests on.
        let said = |e: &&Effect| !matches!(e, Effect::Persist | Effect::Log(_));
        all.iter().filter(said).cloned().collect()
    }

    fn poll(&mut self, seen: JobSeen) -> Vec<Effect> {
        self.on(Event::Poll(Some(seen)))
    }

    fn later(&mut self, ms: u64) -> &mut Self {
        self.now += ms;
        self
    }

    fn to_copying(ways: &[PreemptWay]) -> Self {
        let mut s = Self::new(ways);
        s.poll(runs());
        s.on(Event::Placed(Ok("n2".into())));
        assert_eq!(s.on(Event::Slot), [Effect::MoveOut { to: "n2".into() }]);
        s
    }

    fn to_moved() -> Self {
        let mut s = Self::to_copying(&PreemptWay::DEFAULT);
        let done = Event::Answered(Reply::Done(Box::default()));
        assert_eq!(s.on(done), [Effect::Order(Order::Requeue { hold: true })]);
        assert_eq!(s.r.record.step, Step::Moved);
        s
    }

    fn to_released() -> Self {
        let mut s = Self::to_moved();
        s.on(Event::Ordered(Ok(())));
        s.poll(waits());
        s.on(Event::PlaceKept(Ok(())));
        s.on(Event::Ordered(Ok(())));
        s.on(Event::Ordered(Ok(())));
        s.on(Event::Ordered(Ok(())));
        assert_eq!(s.r.record.step, Step::Released);
        s
    }
}

fn end(effects: &[Effect]) -> Option<Result<String, String>> {
    effects.iter().find_map(|e| {
        if let Effect::End(outcome) = e {
            Some(outcome.clone())
        } else {
            None
        }
    })
}

fn no_answer() -> Event {
    Event::Ordered(Err(OrderError::NoAnswer("away".into())))
}

fn refused() -> Event {
    Event::Ordered(Err(OrderError::Refused("no".into())))
}

#[test]
fn a_live_move_goes_through_all_steps() {
    let mut s = Stage::new(&PreemptWay::DEFAULT);
    let give_up = Some(NOW + 58_000);
    assert_eq!(s.poll(runs()), [Effect::FindPlace { give_up_ms: give_up }]);
    assert_eq!(s.on(Event::Placed(Ok("n2".into()))), []);
    assert!(s.r.is_queued());
    assert_eq!(s.on(Event::Slot), [Effect::MoveOut { to: "n2".into() }]);
    assert!(s.r.is_copying());
    assert_eq!(s.poll(runs()), []);
    let requeue = Effect::Order(Order::Requeue { hold: true });
    assert_eq!(s.on(Event::Answered(Reply::Done(Box::default()))), [requeue]);
    assert_eq!(s.on(Event::Ordered(Ok(()))), []);
    let completing = JobSeen {
        standing: Standing::Completing,
        restarts: 1,
        ..runs()
    };
    assert_eq!(s.poll(completing), []);
    let asked = JobSeen {
        req_nodes: vec!["n1".into()],
        ..waits()
    };
    assert_eq!(s.poll(asked), [Effect::KeepPlace]);
    // 150 s of an hour are gone: two whole minutes.
    let steer = Order::Steer {
        reserved: Some("n2".into()),
        limit_min: Some(58),
        req_nodes: vec!["n1".into()],
    };
    assert_eq!(s.on(Event::PlaceKept(Ok(()))), [Effect::Order(steer)]);
    assert_eq!(s.on(Event::Ordered(Ok(()))), [Effect::Order(Order::Release)]);
    assert_eq!(s.on(Event::Ordered(Ok(()))), [Effect::Order(Order::Priority(100))]);
    assert_eq!(s.on(Event::Ordered(Ok(()))), []);
    assert_eq!(s.poll(waits()), []);
    let effects = s.poll(runs_on("n2"));
    assert_eq!(effects[0], Effect::LeavePlace);
    assert_eq!(end(&effects), Some(Ok("moved from n1 to n2, and runs there".into())));
}

#[test]
fn without_a_place_it_is_saved_and_goes_back_into_the_queue_without_a_hold() {
    let mut s = Stage::new(&PreemptWay::DEFAULT);
    s.poll(runs());
    assert_eq!(
        s.on(Event::Placed(Err("no other node has room for the VM".into()))),
        [Effect::Save { at: "n1".into() }]
    );
    let requeue = Effect::Order(Order::Requeue { hold: false });
    assert_eq!(s.on(Event::Answered(Reply::Done(Box::default()))), [requeue]);
    s.on(Event::Ordered(Ok(())));
    let steer = Order::Steer {
        reserved: None,
        limit_min: Some(58),
        req_nodes: vec![],
    };
    assert_eq!(s.poll(waits()), [Effect::Order(steer)]);
    assert_eq!(s.on(Event::Ordered(Ok(()))), [Effect::Order(Order::Release)]);
    s.on(Event::Ordered(Ok(())));
    let outcome = end(&s.on(Event::Ordered(Ok(())))).expect("its end").expect("a good one");
    assert!(outcome.starts_with("saved and back in the queue"), "{outcome}");
}

#[test]
fn an_action_that_is_refused_is_followed_by_the_next_and_the_last_by_what_slurm_does() {
    let mut s = Stage::to_copying(&[PreemptWay::Live, PreemptWay::Save]);
    let effects = s.on(Event::Answered(Reply::Refused("no image".into())));
    assert_eq!(effects, [Effect::LeavePlace, Effect::Save { at: "n1".into() }]);
    let outcome = end(&s.on(Event::Answered(Reply::Refused("no space".into())))).expect("its end");
    assert_eq!(outcome, Err("its VM stays on n1 (not live: no image; not saved: no space)".into()));
}

#[test]
fn nothing_else_begins_while_the_source_says_leaving_or_saving_or_nothing() {
    let mut s = Stage::to_copying(&PreemptWay::DEFAULT);
    assert_eq!(s.on(Event::Answered(Reply::NoWord("line broke".into()))), [Effect::AskSource]);
    for _ in 0..1000 {
        let word = if s.now.is_multiple_of(3) { Word::Silence } else { Word::UnderWay };
        let effects = s.later(1_001).on(Event::Source(word));
        assert!(effects.iter().all(|e| *e == Effect::CancelMove), "{effects:?}");
        let late = s.now >= NOW + 60_000;
        assert!(late || effects.is_empty(), "cancelled before its time");
        assert_eq!(s.poll(runs()), [Effect::AskSource]);
    }
    let effects = s.on(Event::Source(Word::Gone));
    assert_eq!(effects, [Effect::Order(Order::Requeue { hold: true })]);
}

#[test]
fn a_restart_asks_the_source_first_and_leaves_out_no_action() {
    let mut copying = record(&PreemptWay::DEFAULT);
    (copying.to, copying.held, copying.moving) = (Some("n2".into()), Some("n2".into()), true);
    let mut s = Stage::at(copying.clone());
    assert_eq!(s.poll(runs()), [Effect::AskSource]);
    let effects = s.on(Event::Source(Word::Stays));
    assert!(matches!(effects[..], [Effect::LeavePlace, Effect::FindPlace { .. }]), "{effects:?}");

    let mut s = Stage::at(copying.clone());
    s.poll(runs());
    assert_eq!(s.on(Event::Source(Word::UnderWay)), []);
    s.poll(runs());
    assert_eq!(s.on(Event::Source(Word::Gone)), [Effect::Order(Order::Requeue { hold: true })]);

    let mut s = Stage::at(copying);
    s.poll(runs());
    let effects = s.on(Event::Source(Word::Saved));
    assert_eq!(effects, [Effect::LeavePlace, Effect::Order(Order::Requeue { hold: false })]);
}

#[test]
fn a_source_that_is_silent_for_good_is_waited_for_until_its_job_has_left() {
    let mut s = Stage::to_copying(&PreemptWay::DEFAULT);
    s.on(Event::Answered(Reply::NoWord("power".into())));
    for _ in 0..600 {
        assert_eq!(s.later(1000).on(Event::Source(Word::Silence)), []);
        s.poll(runs());
    }
    let left = JobSeen { restarts: 1, ..waits() };
    s.poll(left);
    let effects = s.on(Event::Source(Word::Silence));
    assert_eq!(effects[0], Effect::LeavePlace);
    assert!(end(&effects).is_some());
}

#[test]
fn orders_are_repeated_for_as_long_as_slurm_does_not_answer() {
    let mut s = Stage::to_moved();
    for _ in 0..1000 {
        assert_eq!(s.later(100).on(no_answer()), []);
        assert_eq!(s.poll(runs()), [Effect::Order(Order::Requeue { hold: true })]);
    }
    s.on(no_answer());
    // Carried out although nobody heard of it.
    assert_eq!(s.poll(waits()), [Effect::KeepPlace]);
    let steer = s.on(Event::PlaceKept(Ok(())));
    s.on(no_answer());
    assert_eq!(s.poll(waits()), steer);
    s.on(Event::Ordered(Ok(())));
    // A job that is held is never left behind.
    for answer in [no_answer(), refused()] {
        assert_eq!(s.on(answer), []);
        assert_eq!(s.poll(waits()), [Effect::Order(Order::Release)]);
    }
}

#[test]
fn a_job_that_became_unrequeueable_under_way_is_made_requeueable() {
    let mut s = Stage::to_moved();
    assert_eq!(s.on(refused()), [Effect::Order(Order::AllowRequeue)]);
    assert_eq!(s.on(Event::Ordered(Ok(()))), []);
    assert_eq!(s.poll(runs()), [Effect::Order(Order::Requeue { hold: true })]);
}

#[test]
fn a_job_that_is_kept_out_has_its_vm_saved_before_the_destination_gives_up() {
    let mut s = Stage::to_released();
    let landed = s.r.record.moved_ms.expect("the landing");
    let mut saved = None;
    while saved.is_none() {
        s.later(1_000);
        assert!(s.now < landed + AWAIT, "the destination has ended the VM");
        let effects = s.poll(waits());
        assert!(effects.is_empty() || effects == [Effect::Save { at: "n2".into() }], "{effects:?}");
        saved = effects.first().map(|_| s.now);
    }
    let effects = s.on(Event::Answered(Reply::Done(Box::default())));
    assert_eq!(effects[0], Effect::LeavePlace);
    assert!(end(&effects).expect("its end").expect("a good one").contains("its VM was saved"));
}

#[test]
fn a_source_that_does_not_let_go_of_its_job_costs_the_vm_neither_time_nor_its_place() {
    // It is completing on a node that is dead, longer than the destination waits.
    let mut s = Stage::to_moved();
    s.on(Event::Ordered(Ok(())));
    let completing = JobSeen {
        standing: Standing::Completing,
        restarts: 1,
        ..runs()
    };
    assert_eq!(s.later(AWAIT - 31_000).poll(completing.clone()), []);
    assert_eq!(s.later(2_000).poll(completing.clone()), [Effect::Save { at: "n2".into() }]);
    let effects = s.on(Event::Answered(Reply::Done(Box::default())));
    assert_eq!(effects, [Effect::LeavePlace]);
    assert_eq!(s.later(900_000).poll(completing), [], "it is waited for without an end");
    let steer = s.poll(waits());
    assert!(
        matches!(&steer[..], [Effect::Order(Order::Steer { reserved: None, .. })]),
        "{steer:?}"
    );
    assert_eq!(s.on(Event::Ordered(Ok(()))), [Effect::Order(Order::Release)]);
}

#[test]
fn a_vm_that_is_lost_gives_the_job_its_whole_time_back() {
    let mut s = Stage::to_released();
    s.later(AWAIT).poll(waits());
    let ask = Effect::AskWaiting { node: "n2".into() };
    assert_eq!(s.on(Event::Answered(Reply::Refused("no space".into()))), [ask]);
    let effects = s.on(Event::Source(Word::Stays));
    let released = Effect::ReleaseVm { node: "n2".into() };
    assert_eq!(effects, [Effect::LeavePlace, released, Effect::Order(Order::Limit(60))]);
    assert_eq!(s.on(no_answer()), []);
    assert_eq!(s.poll(waits()), [Effect::Order(Order::Limit(60))]);
    assert!(end(&s.on(Event::Ordered(Ok(())))).is_some());
}

#[test]
fn a_steering_that_slurm_refuses_saves_the_vm_and_lets_the_job_go() {
    let mut s = Stage::to_moved();
    s.on(Event::Ordered(Ok(())));
    s.poll(waits());
    s.on(Event::PlaceKept(Err("its node is down".into())));
    assert_eq!(s.on(refused()), [Effect::Save { at: "n2".into() }]);
    let effects = s.on(Event::Answered(Reply::Done(Box::default())));
    assert!(
        matches!(
            &effects[..],
            [Effect::LeavePlace, Effect::Order(Order::Steer { reserved: None, .. })]
        ),
        "{effects:?}"
    );
    assert_eq!(s.on(refused()), [Effect::Order(Order::Release)]);
}

#[test]
fn a_job_that_ends_under_way_takes_its_vm_with_it() {
    for mut s in [Stage::to_moved(), Stage::to_released()] {
        let effects = s.on(Event::Poll(None));
        let nodes: Vec<&Effect> = effects.iter().filter(|e| matches!(e, Effect::ReleaseVm { .. })).collect();
        assert_eq!(nodes.len(), 2, "{effects:?}");
        assert!(effects.contains(&Effect::LeavePlace) && end(&effects).is_some());
    }
}

#[test]
fn a_job_that_starts_elsewhere_has_its_waiting_vm_ended() {
    let mut s = Stage::to_released();
    let effects = s.poll(runs_on("n3"));
    assert_eq!(effects[0], Effect::ReleaseVm { node: "n2".into() });
    let outcome = end(&s.on(Event::Ordered(Ok(())))).expect("its end").expect("the job runs");
    assert!(outcome.contains("starts over") && outcome.contains("n3 and not on n2"), "{outcome}");
}

#[test]
fn a_job_that_starts_over_elsewhere_gets_its_whole_time_back() {
    let mut s = Stage::to_released();
    let effects = s.poll(runs_on("n3"));
    assert!(effects.contains(&Effect::Order(Order::Limit(60))), "{effects:?}");
    assert!(end(&effects).is_none(), "not before it has it");
    assert!(s.r.time_after().is_none(), "nothing of it is used up");
    // Nor is it forgotten by a controller that dies in between.
    let mut s = Stage::at(s.r.record.clone());
    assert_eq!(s.poll(runs_on("n3")), [Effect::Order(Order::Limit(60))]);
}

#[test]
fn a_save_of_a_job_that_is_kept_out_is_waited_for_though_its_answer_was_lost() {
    let mut s = Stage::to_released();
    let save = Effect::Save { at: "n2".into() };
    assert_eq!(s.later(AWAIT - 20_000).poll(waits()), std::slice::from_ref(&save));
    let ask = Effect::AskWaiting { node: "n2".into() };
    // A controller that was restarted in between orders the save again, which is refused as one is under way.
    let mut again = Stage::at(s.r.record.clone());
    again.now = s.now;
    assert_eq!(again.poll(waits()), std::slice::from_ref(&save));
    let refused = Reply::Refused("the VM is saving and cannot be saved now".into());
    for (mut s, reply) in [(s, Reply::NoWord("line broke".into())), (again, refused)] {
        assert_eq!(s.on(Event::Answered(reply)), std::slice::from_ref(&ask));
        // However long it takes.
        for word in [Word::Silence, Word::UnderWay, Word::UnderWay] {
            assert_eq!(s.later(5_000).on(Event::Source(word)), []);
            assert_eq!(s.later(5_000).poll(waits()), std::slice::from_ref(&ask));
        }
        let effects = s.on(Event::Source(Word::Saved));
        assert!(effects.iter().all(|e| !matches!(e, Effect::ReleaseVm { .. })), "{effects:?}");
        assert!(end(&effects).expect("its end").expect("a good one").contains("its VM was saved"));
    }
}

#[test]
fn a_save_that_its_node_never_heard_of_is_ordered_again_as_long_as_there_is_time() {
    let mut s = Stage::to_released();
    let save = Effect::Save { at: "n2".into() };
    assert_eq!(s.later(AWAIT - 20_000).poll(waits()), std::slice::from_ref(&save));
    s.on(Event::Answered(Reply::NoWord("line broke".into())));
    assert_eq!(s.later(1_000).on(Event::Source(Word::Stays)), [save]);
    s.on(Event::Answered(Reply::NoWord("line broke".into())));
    let effects = s.later(30_000).on(Event::Source(Word::Silence));
    assert!(effects.contains(&Effect::ReleaseVm { node: "n2".into() }), "{effects:?}");
    assert!(effects.contains(&Effect::Order(Order::Limit(60))), "{effects:?}");
}

#[test]
fn a_script_that_ended_in_its_grace_time_is_not_run_again() {
    let mut s = Stage::new(&[PreemptWay::Requeue]);
    assert_eq!(s.poll(runs()), [Effect::AskSource]);
    assert_eq!(
        end(&s.on(Event::Source(Word::Over))),
        Some(Ok("the job finished within its grace time".into()))
    );
    let mut s = Stage::new(&[PreemptWay::Requeue]);
    s.poll(runs());
    assert_eq!(s.on(Event::Source(Word::Stays)), [Effect::Order(Order::Requeue { hold: false })]);
}

#[test]
fn where_slurm_requeues_by_itself_the_shim_ends_and_the_job_is_held() {
    let newer = JobSeen {
        ends_by_itself: true,
        ..runs()
    };
    let mut s = Stage::to_copying(&PreemptWay::DEFAULT);
    s.poll(newer.clone());
    assert_eq!(s.on(Event::Answered(Reply::Done(Box::default()))), [Effect::Part]);
    assert_eq!(s.on(Event::Parted(true)), []);
    assert_eq!(s.poll(newer.clone()), []);
    assert_eq!(s.poll(waits()), [Effect::Order(Order::Hold)]);
    assert_eq!(s.on(Event::Ordered(Ok(()))), []);
    assert_eq!(s.poll(waits()), [Effect::KeepPlace]);
    // A shim that does not end is requeued by order.
    let mut s = Stage::to_copying(&PreemptWay::DEFAULT);
    s.poll(newer.clone());
    s.on(Event::Answered(Reply::Done(Box::default())));
    assert_eq!(s.later(PART_MS).poll(newer), [Effect::Order(Order::Requeue { hold: true })]);
}

#[test]
fn what_slurm_would_refuse_at_the_end_is_not_begun() {
    let stays = JobSeen {
        never: Some("it is not requeueable".into()),
        ..runs()
    };
    let mut s = Stage::new(&PreemptWay::DEFAULT);
    let effects = s.poll(stays.clone());
    let line = "its VM stays on n1: it is not requeueable".to_owned();
    assert_eq!(effects, [Effect::TellJob(line.clone()), Effect::End(Err(line))]);
    let mut s = Stage::new(&[PreemptWay::Cancel]);
    assert_eq!(s.poll(stays), [Effect::AskSource], "its user wants it cancelled");
    let suspended = JobSeen {
        not_now: Some("it is suspended".into()),
        ..runs()
    };
    let mut s = Stage::new(&PreemptWay::DEFAULT);
    assert_eq!(s.poll(suspended), [Effect::AskSource], "a requeue is all that is left");
}

#[test]
fn a_move_that_gives_way_cancels_its_copy_and_begins_nothing_else() {
    let mut s = Stage::to_copying(&[PreemptWay::Live, PreemptWay::Save]);
    assert_eq!(s.on(Event::GiveUp("preempted".into())), [Effect::CancelMove]);
    let effects = s.on(Event::Answered(Reply::Refused("it was cancelled".into())));
    assert!(end(&effects).expect("its end").is_err());
    let mut s = Stage::new(&PreemptWay::DEFAULT);
    s.poll(runs());
    assert!(end(&s.on(Event::GiveUp("preempted".into()))).is_some());
}

/// Every event that there is.
fn events() -> Vec<Event> {
    let mut all = vec![
        Event::Poll(None),
        Event::Poll(Some(runs())),
        Event::Poll(Some(waits())),
        Event::Poll(Some(runs_on("n2"))),
        Event::Poll(Some(runs_on("n3"))),
        Event::Poll(Some(JobSeen {
            standing: Standing::Completing,
            restarts: 1,
            ..runs()
        })),
        Event::Placed(Ok("n2".into())),
        Event::Placed(Err("none".into())),
        Event::Slot,
        Event::Answered(Reply::Done(Box::default())),
        Event::Answered(Reply::Refused("no".into())),
        Event::Answered(Reply::NoWord("cut".into())),
        Event::Ordered(Ok(())),
        no_answer(),
        refused(),
        Event::Parted(true),
        Event::Parted(false),
        Event::PlaceKept(Ok(())),
        Event::PlaceKept(Err("lost".into())),
        Event::GiveUp("way".into()),
    ];
    let words = [Word::UnderWay, Word::Gone, Word::Saved, Word::Over, Word::Stays, Word::Silence];
    all.extend(words.map(Event::Source));
    all
}

/// Walks from every state that three thousand seeds of events reach; what must hold after each event.
#[test]
fn whatever_happens_in_whatever_order_a_held_job_is_not_left_behind() {
    let all = events();
    for seed in 1..=3000_u64 {
        let mut random = seed;
        let mut next = |n: usize| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            usize::try_from(random % n as u64).unwrap()
        };
        let mut s = Stage::new(&PreemptWay::DEFAULT);
        // Slurm's side: held by us, and nobody else.
        let mut held = false;
        for _ in 0..60 {
            let event = all[next(all.len())].clone();
            let text = format!("seed {seed}: {event:?} in {:?} {:?}", s.r.record.step, s.r.phase);
            s.now += 700;
            let effects = s.r.on_event(s.now, event.clone());
            let gone = matches!(event, Event::Poll(None));
            for e in &effects {
                match e {
                    Effect::Order(Order::Requeue { hold: true } | Order::Hold) => held = true,
                    Effect::Order(Order::Release) => held = false,
                    _ => {}
                }
            }
            // What is ordered of agents and Slurm stands behind the write of the step that it belongs to.
            let first_act = effects.iter().position(|e| matches!(e, Effect::MoveOut { .. } | Effect::Order(_)));
            let last_write = effects.iter().position(|e| *e == Effect::Persist);
            if let (Some(act), Some(write)) = (first_act, last_write) {
                assert!(write < act || effects[..act].contains(&Effect::Persist), "{text}: {effects:?}");
            }
            if end(&effects).is_some() {
                // A job that runs or is over is not held by anybody.
                let runs = matches!(&event, Event::Poll(Some(j)) if j.standing == Standing::OnNodes)
                    || s.r.seen.as_ref().is_some_and(|j| j.standing == Standing::OnNodes);
                assert!(!held || gone || runs || s.r.seen.is_none(), "{text}: held, and the move is over");
                assert_eq!(s.r.record.held, None, "{text}: a place is left");
                break;
            }
        }
        // The ledger can be read again, and goes on.
        let json = serde_json::to_vec(&s.r.record).unwrap();
        assert_eq!(serde_json::from_slice::<JobMove>(&json).unwrap(), s.r.record);
    }
}

#[test]
fn a_job_that_moves_once_a_minute_uses_up_its_time_all_the_same() {
    let mut time: Option<TimeAccount> = None;
    let mut given = Vec::new();
    for hop in 0..6_u32 {
        let mut m = record(&PreemptWay::DEFAULT);
        (m.restarts, m.time_before) = (hop, time);
        let mut s = Stage {
            r: Relocation::new(m, AWAIT, true).0,
            now: NOW,
        };
        let seen = JobSeen {
            restarts: hop,
            // 40 s of a run whose limit is what the last move left.
            start_s: Some(NOW / 1000 - 40),
            limit_min: Some(given.last().copied().unwrap_or(60)),
            ..runs()
        };
        s.poll(seen);
        s.on(Event::Placed(Ok("n2".into())));
        s.on(Event::Slot);
        s.on(Event::Answered(Reply::Done(Box::default())));
        given.push(s.r.record.left_min.expect("what is left"));
        assert_eq!(s.r.record.limit_min, Some(60), "the whole limit is not forgotten");
        time = s.r.time_after();
    }
    assert_eq!(given, [60, 59, 58, 58, 57, 56]);
    // A run that no move led to begins anew.
    let mut m = record(&PreemptWay::DEFAULT);
    (m.restarts, m.time_before) = (9, time);
    let mut s = Stage::at(m);
    s.poll(JobSeen { restarts: 9, ..runs() });
    s.on(Event::Source(Word::Gone));
    assert_eq!((s.r.record.limit_min, s.r.record.used_s), (Some(60), 150));
}

#[test]
fn a_limit_that_somebody_raised_between_two_moves_stays_raised() {
    let mut m = record(&PreemptWay::DEFAULT);
    m.time_before = Some(TimeAccount {
        full_min: 60,
        used_s: 1800,
        set_min: 30,
        restarts: 0,
    });
    let mut s = Stage::at(m);
    s.poll(JobSeen {
        limit_min: Some(90),
        ..runs()
    });
    s.on(Event::Source(Word::Gone));
    assert_eq!((s.r.record.limit_min, s.r.record.left_min), (Some(120), Some(120 - 32)));
}

#[test]
fn a_job_in_a_reservation_of_its_users_is_saved_and_keeps_it() {
    let mut s = Stage::new(&PreemptWay::DEFAULT);
    let reserved = JobSeen {
        reservation: Some("course".into()),
        ..runs()
    };
    assert_eq!(s.poll(reserved), [Effect::Save { at: "n1".into() }]);
    assert!(s.r.record.notes[0].contains("reservation course"), "{:?}", s.r.record.notes);
}

#[test]
fn a_vm_whose_job_slurm_does_not_put_back_is_saved_before_the_destination_gives_up() {
    let mut s = Stage::to_moved();
    let landed = s.now;
    let save = Effect::Save { at: "n2".into() };
    loop {
        s.on(refused());
        s.on(Event::Ordered(Ok(())));
        s.later(1_000);
        assert!(s.now < landed + AWAIT, "the destination has ended the VM");
        let effects = s.poll(runs());
        if effects == [save.clone()] {
            break;
        }
        assert_eq!(effects, [Effect::Order(Order::Requeue { hold: true })]);
    }
}

#[test]
fn a_move_that_was_given_up_is_not_begun_again_by_the_next_controller() {
    let mut s = Stage::to_copying(&[PreemptWay::Live]);
    let effects = s.r.on_event(s.now, Event::GiveUp("it was cancelled".into()));
    assert_eq!(effects, [Effect::Persist, Effect::CancelMove]);
    let mut s = Stage::at(s.r.record.clone());
    assert_eq!(s.poll(runs()), [Effect::AskSource]);
    let effects = s.on(Event::Source(Word::Stays));
    assert!(end(&effects).expect("its end").is_err(), "{effects:?}");
}

#[test]
fn a_jobs_time_goes_on_to_be_counted_though_slurm_put_it_back_twice() {
    let mut s = Stage::to_released();
    let twice = JobSeen {
        restarts: 2,
        ..runs_on("n2")
    };
    assert!(end(&s.poll(twice)).is_some());
    let time = s.r.time_after().expect("what is used");
    assert_eq!((time.full_min, time.set_min, time.restarts), (60, 58, 2));
}
