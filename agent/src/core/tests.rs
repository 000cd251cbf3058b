//! The core's transitions: every state against every event, and the important paths one by one.
use slurm_vm_api::{query::MoveView, session::UserEntry, spec::VmSpec};

use super::*;

pub(crate) const NOW: u64 = 1_000_000;
const AWAIT: u64 = 60_000;

pub(crate) fn record(life: Life) -> Record {
    let user = UserEntry {
        name: "alice".into(),
        uid: 2001,
        gid: 2001,
        home: "/".into(),
        shell: "/bin/sh".into(),
    };
    let spec = VmSpec {
        image: "tiny".into(),
        cpus: None,
        mem_mib: None,
        boot_timeout_s: Some(60),
        preempt: None,
        mounts: vec![],
        workdir: None,
        net: None,
        disk_mib: None,
    };
    Record {
        life,
        created_ms: NOW,
        boot_id: Some("boot".into()),
        ..Record::new("c".into(), "n1".into(), 7, user, spec)
    }
}

fn prepared() -> Event {
    let plan = Plan {
        vcpus: 1,
        mem_mib: 256,
        domain_type: "qemu".into(),
        overlay: None,
        overlay_shared: false,
        layers: vec![],
        disk_mib: None,
        seed: None,
        directories: vec![],
        network: slurm_vm_api::spec::Network::None,
        base_sha256: None,
    };
    Event::Prepared(Ok((given(0), plan)))
}

fn given(cpu: u32) -> Allocation {
    Allocation {
        cores: vec![cpu],
        pinned: vec![cpu],
        ..Allocation::default()
    }
}

fn moved() -> Box<MoveView> {
    Box::new(MoveView::default())
}

fn up(boot_id: &str) -> Event {
    Event::GuestUp { boot_id: boot_id.into() }
}

fn by(move_id: &str) -> MoveIdentity {
    MoveIdentity {
        move_id: move_id.into(),
        run: 1,
        generation: 1,
    }
}

fn program(wrote: u64) -> ProgramRecord {
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

fn took_over(by: MoveIdentity, wrote: u64) -> Event {
    Event::TookOver {
        by,
        programs: vec![program(wrote)],
        moves: vec![],
    }
}

fn kept(by: MoveIdentity) -> Event {
    let output = KeptOutput {
        program: 1,
        stream: 0,
        offset: 3,
        bytes: b"abc".to_vec(),
    };
    Event::Kept { by, output }
}

fn asked(by: MoveIdentity, question: MoveQuestion, runs: bool) -> Event {
    Event::Asked { by, question, runs }
}

fn not_this_move() -> Result<(), HandOverError> {
    Err(HandOverError::NotThisMove("why".into()))
}

fn move_out() -> Event {
    Event::MoveOut {
        move_id: "m".into(),
        to: "n2".into(),
        cause: "asked".into(),
    }
}

fn save() -> Event {
    Event::Save {
        at: "/save".into(),
        cause: "asked".into(),
    }
}

fn lost() -> Event {
    Event::DomainEnded { how: "QEMU died".into() }
}

/// A VM and all that it has ever asked for.
#[derive(Clone)]
struct Told {
    vm: Vm,
    all: Vec<Effect>,
    last: Vec<Effect>,
    now: u64,
}

impl Told {
    fn begin((vm, effects): (Vm, Vec<Effect>)) -> Self {
        Self {
            vm,
            all: effects.clone(),
            last: effects,
            now: NOW,
        }
    }

    fn then(mut self, event: Event) -> Self {
        self.tell(event);
        self
    }

    fn tell(&mut self, event: Event) -> &[Effect] {
        self.last = self.vm.on_event(self.now, AWAIT, event);
        self.all.extend(self.last.clone());
        &self.last
    }

    fn after(mut self, ms: u64) -> Self {
        self.now += ms;
        self.then(Event::Tick)
    }

    fn is(&self, name: &str) -> bool {
        self.vm.record.life.name() == name
    }

    fn did(&self, effect: &Effect) -> bool {
        self.last.contains(effect)
    }
}

fn arriving() -> Told {
    Told::begin(Vm::expected(record(Life::Arriving {
        from: "n0".into(),
        by: by("m0"),
    })))
}

fn running() -> Told {
    Told::begin(Vm::new(record(Life::Preparing)))
        .then(prepared())
        .then(Event::DomainStarted(Ok(())))
        .then(up("boot"))
}

fn copying() -> Told {
    running().then(move_out()).then(Event::DestinationReady(Ok(())))
}

fn restoring() -> Told {
    Told::begin(Vm::expected(record(Life::Restoring { from: "/save".into() })))
}

/// A way into every state, in every stage of it.
fn states() -> Vec<Told> {
    let new = || Told::begin(Vm::new(record(Life::Preparing)));
    let stopping = |t: Told| t.then(Event::Release);
    vec![
        new(),
        stopping(new()),
        new().then(prepared()),
        stopping(new().then(prepared())),
        new().then(prepared()).then(lost()),
        new().then(prepared()).then(Event::DomainStarted(Ok(()))),
        running(),
        running().then(lost()),
        running().then(Event::Resumed(Err("no".into()))),
        running().then(move_out()),
        running().then(move_out()).then(Event::Release),
        running().then(move_out()).then(Event::CancelMove),
        copying(),
        copying().then(Event::Release),
        copying().then(Event::Migrated(Err("no".into()))),
        copying().then(Event::Migrated(Ok(moved()))),
        copying().then(Event::Migrated(Ok(moved()))).then(Event::HandedOver(Ok(()))),
        arriving(),
        arriving().then(Event::JobHere { run: 2 }),
        arriving().then(Event::Release),
        arriving().then(Event::Arrived),
        arriving().then(Event::Arrived).then(move_out()),
        running().then(save()),
        running().then(save()).then(Event::Release),
        running().then(save()).then(Event::SaveWritten(Ok(moved()))),
        restoring(),
        stopping(restoring()),
        stopping(running()),
        stopping(running()).then(Event::Destroyed(Err("no".into()))),
        stopping(running()).then(Event::Destroyed(Ok(()))),
        Told::begin(Vm::recovered(record(Life::Running), None, None)),
        Told::begin(Vm::recovered(record(Life::Preparing), Some(false), None)),
    ]
}

fn events() -> Vec<Event> {
    let why = || "why".to_owned();
    vec![
        prepared(),
        Event::Prepared(Err(Failure::Node(why()))),
        Event::Prepared(Err(Failure::Request(why()))),
        Event::DomainStarted(Ok(())),
        Event::DomainStarted(Err(Failure::Node(why()))),
        up("boot"),
        up("another boot"),
        lost(),
        Event::JobHere { run: 9 },
        Event::Release,
        Event::Tick,
        Event::Destroyed(Ok(())),
        Event::Destroyed(Err(why())),
        move_out(),
        Event::DestinationReady(Ok(())),
        Event::DestinationReady(Err(why())),
        Event::Migrated(Ok(moved())),
        Event::Migrated(Err(why())),
        Event::OwnerIs(Whereabouts::AtSource),
        Event::OwnerIs(Whereabouts::AtDestination),
        Event::OwnerIs(Whereabouts::Nowhere),
        Event::OwnerIs(Whereabouts::Unknown),
        Event::DomainIs(Some(true)),
        Event::DomainIs(Some(false)),
        Event::DomainIs(None),
        Event::JobIs(Some(true)),
        Event::JobIs(Some(false)),
        Event::JobIs(None),
        Event::HandedOver(Ok(())),
        Event::HandedOver(Err(HandOverError::NotNow(why()))),
        Event::HandedOver(not_this_move()),
        Event::CancelMove,
        Event::Arrived,
        took_over(by("m0"), 5),
        took_over(by("another"), 5),
        kept(by("m0")),
        kept(by("another")),
        Event::Abandoned { by: by("m0") },
        Event::Abandoned { by: by("another") },
        asked(by("m0"), MoveQuestion::HasCome, true),
        asked(by("m0"), MoveQuestion::HasCome, false),
        asked(by("m"), MoveQuestion::Stays, true),
        asked(by("another"), MoveQuestion::HasCome, true),
        save(),
        Event::SaveWritten(Ok(moved())),
        Event::SaveWritten(Err(why())),
        Event::Restored(Ok(moved())),
        Event::Restored(Err(why())),
        Event::Resumed(Ok(())),
        Event::Resumed(Err(why())),
        Event::Pinned(Ok(given(1))),
        Event::Pinned(Err(why())),
        Event::GiveUp,
        Event::ClockStepped { by_ms: 1_000 },
        not_recorded(None),
        not_recorded(Some(Busy::Migrate)),
        not_recorded(Some(Busy::Save)),
    ]
}

fn not_recorded(waits: Option<Busy>) -> Event {
    Event::NotRecorded {
        why: "no space left".into(),
        waits,
    }
}

/// Acts whose intent must be on record first.
fn is_act(effect: &Effect) -> bool {
    matches!(
        effect,
        Effect::StartDomain | Effect::Migrate | Effect::WriteSave | Effect::Clear | Effect::ResumeDomain | Effect::AskDestination
    )
}

fn answers(effects: &[Effect]) -> usize {
    effects.iter().filter(|e| matches!(e, Effect::AnswerMove(_))).count()
}

/// Checks one step from a state, and what it leads to.
fn check(before: &Told, event: &Event, told: &Told) {
    let (from, to) = (&before.vm.record.life, &told.vm.record.life);
    let step = format!("{from:?} <- {event:?} -> {to:?}: {:?}", told.last);
    let asked = matches!(event, Event::MoveOut { .. } | Event::Save { .. });
    if from.is_over_here() {
        assert_eq!(from, to, "{step}");
        let answer = |e: &Effect| {
            matches!(
                e,
                Effect::AnswerRelease(_) | Effect::AnswerMove(_) | Effect::AnswerSource(_) | Effect::AnswerAsked(_)
            )
        };
        assert!(told.last.iter().all(answer), "{step}");
        assert_eq!(
            told.last.iter().any(|e| matches!(e, Effect::AnswerRelease(Ok(())))),
            *event == Event::Release,
            "{step}"
        );
    }
    if from != to {
        let persist = told.last.iter().position(|e| *e == Effect::Persist);
        assert!(persist.is_some(), "a change that is not put on record: {step}");
        let act = told.last.iter().position(is_act);
        assert!(act.is_none_or(|a| persist < Some(a)), "an act before its intent: {step}");
    }
    if matches!(to, Life::Stopped { .. }) && !from.is_over_here() {
        assert!(
            matches!(from, Life::Stopping { .. }) && before.all.contains(&Effect::Destroy),
            "stopped without an end of the domain: {step}"
        );
    }
    let (handed, questions) = (
        told.last.iter().filter(|e| matches!(e, Effect::AnswerSource(_))).count(),
        told.last.iter().filter(|e| matches!(e, Effect::AnswerAsked(_))).count(),
    );
    assert_eq!(
        (handed, questions),
        (
            usize::from(matches!(event, Event::TookOver { .. } | Event::Kept { .. })),
            usize::from(matches!(event, Event::Asked { .. }))
        ),
        "each word of the other end is answered once: {step}"
    );
    let takes = told.last.iter().any(|e| matches!(e, Effect::Adopt(_) | Effect::Keep(_)));
    assert_eq!(
        takes,
        told.did(&Effect::AnswerSource(Ok(()))) && !before.vm.record.arrived_by.as_ref().is_some_and(|a| a.handed_over),
        "{step}"
    );
    if takes {
        let came = before.vm.record.arrived_by.as_ref().map(|a| &a.by);
        let comes = match from {
            Life::Arriving { by, .. } => Some(by),
            _ => None,
        };
        assert_eq!(came.or(comes), Some(&by("m0")), "taken by a VM that came by no such move: {step}");
        assert!(
            !matches!(event, Event::TookOver { by, .. } | Event::Kept { by, .. } if by.move_id == "another"),
            "{step}"
        );
    }
    assert!(answers(&told.last) <= 1, "{step}");
    if asked {
        let accepted = matches!(to, Life::Leaving { .. } | Life::Saving { .. }) && from != to;
        assert_eq!(answers(&told.last), usize::from(!accepted), "{step}");
    } else if answers(&told.last) == 1 {
        assert!(
            matches!(from, Life::Leaving { .. } | Life::Saving { .. }),
            "an answer that nobody waits for: {step}"
        );
    }
    let leaves = matches!(from, Life::Leaving { .. } | Life::Saving { .. }) && !matches!(to, Life::Leaving { .. } | Life::Saving { .. });
    if leaves {
        assert_eq!(answers(&told.last), 1, "a move that is over and not answered: {step}");
    }
    let long = |e: &&Effect| {
        matches!(
            e,
            Effect::Prepare
                | Effect::StartDomain
                | Effect::AskDestination
                | Effect::Migrate
                | Effect::HandOver
                | Effect::WriteSave
                | Effect::Restore
                | Effect::Destroy
        )
    };
    let begun = told.last.iter().filter(long).count();
    assert!(begun <= 1 && (begun == 0 || told.vm.busy().is_some()), "{step}");
    if begun == 1 && before.vm.busy().is_some() {
        assert_ne!(before.vm.busy(), told.vm.busy(), "begun twice: {step}");
    }
}

#[test]
fn every_state_takes_every_event_and_the_one_after_it() {
    let mut pairs = std::collections::BTreeSet::new();
    for begin in states() {
        for first in events() {
            let mut told = begin.clone();
            told.now += 5_000;
            told.tell(first.clone());
            pairs.insert(begin.vm.record.life.name());
            check(&begin, &first, &told);
            let before = told;
            for second in events() {
                let mut told = before.clone();
                told.now += 65_000;
                told.tell(second.clone());
                check(&before, &second, &told);
            }
        }
    }
    assert_eq!(pairs.len(), 12, "all states are walked from: {pairs:?}");
}

/// What an obliging world answers to what is under way.
fn oblige(told: &mut Told) {
    let event = match told.vm.busy() {
        Some(Busy::Prepare) => prepared(),
        Some(Busy::Start) => Event::DomainStarted(Ok(())),
        Some(Busy::AskDestination) => Event::DestinationReady(Ok(())),
        Some(Busy::Migrate) => Event::Migrated(Err("aborted".into())),
        Some(Busy::HandOver) => Event::HandedOver(Ok(())),
        Some(Busy::Save) => Event::SaveWritten(Err("aborted".into())),
        Some(Busy::Restore) => Event::Restored(Ok(moved())),
        Some(Busy::Destroy) => Event::Destroyed(Ok(())),
        None if told.vm.asking => {
            let question = |e: &&Effect| matches!(e, Effect::AskOwner | Effect::AskDomain | Effect::AskJob);
            match told.all.iter().rfind(question) {
                Some(Effect::AskOwner) => Event::OwnerIs(Whereabouts::AtSource),
                Some(Effect::AskDomain) => Event::DomainIs(Some(true)),
                _ => Event::JobIs(Some(false)),
            }
        }
        None => Event::Tick,
    };
    told.now += 3_000;
    told.tell(event);
}

#[test]
fn a_release_is_answered_from_every_state_after_any_event() {
    for begin in states() {
        for event in events() {
            let mut told = begin.clone().then(event.clone()).then(Event::Release);
            let name = told.vm.record.life.name();
            for _ in 0..60 {
                if told.all.iter().any(|e| matches!(e, Effect::AnswerRelease(_))) && told.vm.record.life.is_over_here() {
                    break;
                }
                oblige(&mut told);
            }
            assert!(
                told.all.contains(&Effect::AnswerRelease(Ok(()))),
                "{event:?}, released while {name}: {:?}",
                told.vm.record.life
            );
            assert!(
                told.vm.record.life.is_over_here(),
                "{event:?}, released while {name}: {:?}",
                told.vm.record.life
            );
        }
    }
}

#[test]
fn a_release_while_the_domain_is_being_created_ends_it_after_it_has_come_up() {
    let told = Told::begin(Vm::new(record(Life::Preparing))).then(prepared()).then(Event::Release);
    assert!(
        told.is("stopping") && !told.did(&Effect::Destroy),
        "ended before it came up, it would come up with no owner"
    );
    assert!(told.then(Event::DomainStarted(Ok(()))).did(&Effect::Destroy));
}

#[test]
fn a_failed_import_leaves_the_guest_at_the_source() {
    let told = copying().then(Event::Migrated(Err("import failed".into())));
    assert!(
        told.is("leaving") && told.did(&Effect::AskOwner),
        "nobody resumes before it is clear"
    );
    let told = told.then(Event::OwnerIs(Whereabouts::Unknown));
    assert!(told.is("leaving") && told.last.is_empty());
    let told = told.after(5_000);
    assert!(told.did(&Effect::AskOwner), "it is asked again");
    let told = told.then(Event::OwnerIs(Whereabouts::AtSource));
    assert!(told.is("running") && told.did(&Effect::ResumeDomain) && answers(&told.last) == 1);
}

#[test]
fn a_guest_that_runs_at_the_destination_is_never_resumed_at_the_source() {
    let told = copying()
        .then(Event::Migrated(Err("connection lost".into())))
        .then(Event::OwnerIs(Whereabouts::AtDestination));
    let told = told
        .then(lost())
        .then(up("another boot"))
        .then(Event::CancelMove)
        .then(Event::Release)
        .then(Event::HandedOver(Ok(())));
    assert!(told.is("gone"));
    assert!(
        !told.all.contains(&Effect::ResumeDomain) && !told.all.contains(&Effect::Destroy),
        "{:?}",
        told.all
    );
}

#[test]
fn a_cancel_before_the_copying_begins_is_kept() {
    let told = running()
        .then(move_out())
        .then(Event::CancelMove)
        .then(Event::DestinationReady(Ok(())));
    assert!(told.is("running") && !told.all.contains(&Effect::Migrate));
    assert!(
        told.last
            .iter()
            .any(|e| matches!(e, Effect::AbandonDestination { to, .. } if to == "n2"))
    );
}

#[test]
fn an_abort_is_repeated_until_the_copying_has_ended() {
    let told = copying().then(Event::CancelMove);
    assert!(told.did(&Effect::AbortMigration), "libvirt may not have begun yet");
    assert!(told.after(3_000).did(&Effect::AbortMigration));
}

#[test]
fn a_job_that_comes_before_its_vm_is_not_waited_for_again() {
    let told = arriving().then(Event::JobHere { run: 5 }).then(Event::Arrived);
    assert!(told.is("running"), "a deadline would end a VM whose job runs");
}

#[test]
fn a_destination_that_waits_in_vain_asks_and_gives_up() {
    let told = arriving().after(1_000).after(AWAIT + 1_000);
    assert!(told.did(&Effect::AskOwner));
    assert!(told.then(Event::OwnerIs(Whereabouts::AtSource)).is("stopping"));
}

#[test]
fn a_vm_whose_job_does_not_come_is_ended_only_when_slurm_says_so() {
    let told = arriving().then(Event::Arrived).after(AWAIT + 1_000);
    assert!(
        told.is("awaiting-job") && told.did(&Effect::AskJob),
        "the prolog may have been missed"
    );
    let told = told.then(Event::JobIs(None));
    assert!(told.is("awaiting-job"));
    let told = told.after(5_000);
    assert!(told.did(&Effect::AskJob));
    assert!(told.then(Event::JobIs(Some(true))).is("running"));
}

#[test]
fn a_vm_that_moves_on_before_its_job_came_waits_again_when_that_fails() {
    let told = arriving().then(Event::Arrived).then(move_out());
    assert!(
        told.vm.record.await_until_ms.is_some(),
        "on record, for an agent that is restarted in between"
    );
    assert!(told.then(Event::DestinationReady(Err("no room".into()))).is("awaiting-job"));
}

#[test]
fn a_guest_that_dies_while_it_is_saved_is_missed_afterwards() {
    let told = running()
        .then(save())
        .then(lost())
        .then(Event::SaveWritten(Err("QEMU died".into())));
    assert!(told.did(&Effect::AskDomain));
    assert!(told.then(Event::DomainIs(Some(false))).is("stopping"));
}

#[test]
fn a_failed_save_after_the_job_has_left_is_answered() {
    let told = running()
        .then(save())
        .then(Event::Release)
        .then(Event::SaveWritten(Err("no space".into())));
    assert!(told.is("stopping") && answers(&told.last) == 1);
}

#[test]
fn a_word_of_an_earlier_domains_end_is_not_believed() {
    let told = running().then(lost());
    assert!(told.is("running") && told.did(&Effect::AskDomain));
    assert!(told.then(Event::DomainIs(Some(true))).is("running"));
}

#[test]
fn a_guest_whose_end_nobody_told_is_missed() {
    let told = running().after(1_000).after(40_000);
    assert!(told.did(&Effect::AskDomain));
    assert!(told.then(Event::DomainIs(Some(false))).is("stopping"));
}

#[test]
fn an_end_that_fails_is_told_to_the_epilog_and_tried_again() {
    let mut told = running().then(Event::Release);
    for _ in 0..3 {
        told = told.then(Event::Destroyed(Err("libvirt is away".into()))).after(60_000);
    }
    assert!(
        told.all
            .iter()
            .any(|e| matches!(e, Effect::AnswerRelease(Err(why)) if why.contains("slurm-7-0")))
    );
    assert!(told.did(&Effect::Destroy) && told.then(Event::Destroyed(Ok(()))).is("stopped"));
}

#[test]
fn an_agent_that_cannot_ask_libvirt_takes_no_vm_for_lost() {
    let told = Told::begin(Vm::recovered(record(Life::Running), None, Some(true)));
    assert!(told.is("running") && told.did(&Effect::AskDomain));
    let told = told.then(Event::DomainIs(None)).after(3_000);
    assert!(told.is("running") && told.did(&Effect::AskDomain));
    let told = told.then(Event::DomainIs(Some(true)));
    assert!(told.is("running") && told.did(&Effect::OpenGuest));
}

#[test]
fn an_agent_that_cannot_ask_slurm_starts_nothing() {
    for life in [
        Life::Preparing,
        Life::Booting { deadline_ms: 0 },
        Life::Restoring { from: "/save".into() },
    ] {
        let told = Told::begin(Vm::recovered(record(life), Some(false), None));
        assert_eq!(told.all, [Effect::AskJob]);
        assert!(told.then(Event::JobIs(Some(false))).is("stopping"));
    }
}

#[test]
fn a_missed_epilog_is_made_up_for_as_soon_as_slurm_answers() {
    let told = Told::begin(Vm::recovered(record(Life::Running), Some(true), None))
        .after(1_000)
        .after(5_000);
    assert!(told.did(&Effect::AskJob));
    assert!(told.then(Event::JobIs(Some(false))).is("stopping"));
}

#[test]
fn each_state_is_found_again_after_a_restart() {
    let leaving = |stage| Life::Leaving {
        to: "n2".into(),
        by: by("m"),
        stage,
    };
    let at = || "/save".into();
    // State, libvirt has the domain, Slurm has the job, what becomes of it.
    let table = [
        (Life::Preparing, false, true, "preparing"),
        (Life::Booting { deadline_ms: 0 }, true, true, "booting"),
        (Life::Booting { deadline_ms: 0 }, false, true, "booting"),
        (Life::Booting { deadline_ms: 0 }, true, false, "stopping"),
        (Life::Running, true, true, "running"),
        (Life::Running, false, true, "stopping"),
        (Life::Running, true, false, "stopping"),
        (leaving(LeavingStage::Preparing), true, true, "running"),
        (leaving(LeavingStage::Preparing), false, true, "stopping"),
        (leaving(LeavingStage::Preparing), true, false, "stopping"),
        (leaving(LeavingStage::Copying), true, true, "leaving"),
        (leaving(LeavingStage::Copying), false, false, "leaving"),
        (leaving(LeavingStage::Finishing), false, false, "leaving"),
        (Life::Gone { to: "n2".into() }, false, false, "gone"),
        (
            Life::Arriving {
                from: "n0".into(),
                by: by("m"),
            },
            false,
            false,
            "arriving",
        ),
        (Life::AwaitingJob { deadline_ms: 0 }, true, false, "awaiting-job"),
        (Life::AwaitingJob { deadline_ms: 0 }, true, true, "running"),
        (Life::AwaitingJob { deadline_ms: 0 }, false, false, "stopping"),
        (Life::Saving { at: at() }, true, true, "running"),
        (Life::Saving { at: at() }, false, true, "stopping"),
        (Life::Saving { at: at() }, true, false, "stopping"),
        (Life::Saved { at: at() }, false, false, "saved"),
        (Life::Restoring { from: at() }, true, true, "restoring"),
        (Life::Restoring { from: at() }, false, true, "restoring"),
        (Life::Restoring { from: at() }, false, false, "stopping"),
        (Life::Stopping { why: End::Released }, true, true, "stopping"),
        (Life::Stopped { why: End::Released }, false, false, "stopped"),
    ];
    for (life, domain, job, becomes) in table {
        let told = Told::begin(Vm::recovered(record(life.clone()), Some(domain), Some(job)));
        assert_eq!(
            told.vm.record.life.name(),
            becomes,
            "{life:?}, domain {domain}, job {job}: {:?}",
            told.all
        );
    }
}

#[test]
fn a_save_that_the_agents_death_cut_short_is_the_nodes_fault() {
    let told = Told::begin(Vm::recovered(record(Life::Saving { at: "/save".into() }), Some(false), Some(true)));
    assert!(
        matches!(
            &told.vm.record.life,
            Life::Stopping {
                why: End::NodeFault { .. }
            }
        ),
        "the job is requeued, not failed"
    );
}

#[test]
fn an_old_boot_deadline_counts_anew_after_a_restart() {
    let told = Told::begin(Vm::recovered(record(Life::Booting { deadline_ms: 1 }), Some(true), Some(true))).after(1_000);
    assert!(told.is("booting"));
    assert!(told.after(61_000).is("preparing"), "booted once more");
}

#[test]
fn a_guest_that_is_not_up_in_time_or_ends_before_is_booted_once_more_from_a_new_disk_and_given_up_after_that() {
    let booting = |told: Told| told.then(prepared()).then(Event::DomainStarted(Ok(())));
    let begin = || booting(Told::begin(Vm::new(record(Life::Preparing))));
    let hangs = |told: Told| told.after(60_000);
    let ends = |told: Told| {
        let how = "its kernel panicked".to_owned();
        told.then(Event::DomainEnded { how }).then(Event::DomainIs(Some(false)))
    };
    for (first, second) in [(true, true), (true, false), (false, true), (false, false)] {
        let fails = |told: Told, hang: bool| if hang { hangs(told) } else { ends(told) };
        let told = fails(begin(), first);
        assert!(told.is("preparing"), "{:?}", told.vm.record.life);
        assert!(told.did(&Effect::Destroy) && told.did(&Effect::CloseGuest));
        let kept: Record = serde_json::from_str(&serde_json::to_string(&told.vm.record).unwrap()).unwrap();
        let told = told.then(Event::Destroyed(Ok(())));
        assert!(told.did(&Effect::Prepare), "a disk of its own");
        let told = booting(told);
        assert!(told.is("booting"));
        let up = booting(fails(begin(), first).then(Event::Destroyed(Ok(())))).then(Event::GuestUp { boot_id: "b".into() });
        assert!(up.is("running"));
        assert!(fails(told, second).is("stopping"), "twice is enough");
        // What the first boot left is ended first by an agent that is restarted, too.
        let again = Told::begin(Vm::recovered(kept, Some(true), Some(true)));
        assert!(again.did(&Effect::Destroy) && !again.did(&Effect::Prepare));
        assert!(again.then(Event::Destroyed(Ok(()))).did(&Effect::Prepare));
    }
    let told = hangs(begin()).then(Event::Release);
    assert!(told.is("stopping"), "a job that is cancelled in between");
    assert!(told.then(Event::Destroyed(Ok(()))).is("stopped"));
    let told = hangs(begin()).then(Event::Destroyed(Err("libvirt is away".into())));
    assert!(told.is("stopping"), "no second guest beside the first");
}

#[test]
fn a_vm_that_came_is_pinned_to_what_its_job_has_here_once_the_job_is_here() {
    let awaiting = arriving().then(Event::Arrived).after(10_000);
    assert!(
        awaiting.is("awaiting-job") && !awaiting.all.contains(&Effect::Pin),
        "{:?}",
        awaiting.all
    );
    let running = awaiting.then(Event::JobHere { run: 2 }).after(500);
    assert!(running.is("running") && running.did(&Effect::Pin), "{:?}", running.last);
    assert!(!running.clone().after(60_000).did(&Effect::Pin), "asked twice at a time");
    let pinned = running.clone().then(Event::Pinned(Ok(given(1))));
    assert_eq!(pinned.vm.record.allocation, Some(given(1)));
    assert!(pinned.did(&Effect::Persist) && pinned.did(&Effect::Journal("pinned to CPU 1".into())));
    assert!(!pinned.after(60_000).did(&Effect::Pin));
    let failed = running.then(Event::Pinned(Err("no answer".into())));
    assert_eq!(failed.last.len(), 1, "told once: {:?}", failed.last);
    let again = failed.after(60_000);
    assert!(again.did(&Effect::Pin));
    assert!(again.then(Event::Pinned(Err("no answer".into()))).last.is_empty());
}

#[test]
fn a_vm_that_begins_here_is_pinned_by_its_start_and_not_asked_for_again() {
    assert!(!running().after(500).after(60_000).all.contains(&Effect::Pin));
}

fn refused(told: &Told) -> bool {
    told.last.len() == 1 && matches!(&told.last[0], Effect::AnswerSource(Err(HandOverError::NotThisMove(_))))
}

#[test]
fn what_another_move_hands_over_is_refused_and_changes_nothing() {
    let awaiting = || arriving().then(Event::Arrived);
    let same_id_of_another_run = MoveIdentity { run: 2, ..by("m0") };
    let same_id_of_another_generation = MoveIdentity { generation: 2, ..by("m0") };
    for wrong in [by("m1"), same_id_of_another_run, same_id_of_another_generation] {
        // A run that began here has come by no move at all.
        for vm in [
            running(),
            awaiting(),
            arriving(),
            awaiting().then(move_out()),
            awaiting().then(save()),
        ] {
            for word in [took_over(wrong.clone(), 5), kept(wrong.clone())] {
                let before = vm.vm.record.clone();
                let told = vm.clone().then(word);
                assert!(refused(&told), "{:?}: {:?}", before.life, told.last);
                assert_eq!(told.vm.record, before);
            }
        }
    }
    assert!(refused(&running().then(took_over(by("m0"), 5))));
    assert!(refused(&running().then(kept(by("m0")))));
}

#[test]
fn offsets_of_the_move_by_which_the_vm_came_are_taken_once_and_before_that_is_on_record() {
    for told in [
        arriving(),
        arriving().then(Event::Arrived),
        arriving().then(Event::Arrived).then(Event::JobHere { run: 2 }),
        arriving().then(Event::Arrived).then(move_out()),
    ] {
        let told = told.then(kept(by("m0")));
        assert!(
            matches!(told.last[..], [Effect::Keep(_), Effect::AnswerSource(Ok(()))]),
            "{:?}",
            told.last
        );
        let told = told.then(took_over(by("m0"), 5));
        assert!(
            matches!(told.last[0], Effect::Adopt(_)) && told.did(&Effect::AnswerSource(Ok(()))),
            "{:?}",
            told.last
        );
        assert_eq!(told.vm.record.programs, [program(5)]);
        for again in [took_over(by("m0"), 9), kept(by("m0"))] {
            let told = told.clone().then(again);
            assert_eq!(told.last, [Effect::AnswerSource(Ok(()))], "it was taken before");
            assert_eq!(told.vm.record.programs, [program(5)]);
        }
    }
}

#[test]
fn a_vm_that_moved_on_or_came_out_of_a_save_takes_nothing_of_the_move_before() {
    let mut saved = arriving().then(Event::Arrived).vm.record;
    saved.life = Life::Restoring { from: "/save".into() };
    saved.come_to("n1");
    let restored = Told::begin(Vm::expected(saved)).then(Event::Restored(Ok(moved())));
    assert!(restored.is("running") && refused(&restored.then(took_over(by("m0"), 5))));
    let mut moved_on = arriving().then(Event::Arrived).vm.record;
    moved_on.life = Life::Arriving {
        from: "n2".into(),
        by: by("m1"),
    };
    moved_on.come_to("n1");
    let back = Told::begin(Vm::expected(moved_on)).then(Event::Arrived);
    assert!(refused(&back.clone().then(took_over(by("m0"), 5))));
    assert!(back.then(took_over(by("m1"), 5)).did(&Effect::AnswerSource(Ok(()))));
}

#[test]
fn offsets_that_the_destination_never_takes_are_not_offered_again_and_the_guest_is_not_resumed() {
    let finishing = || copying().then(Event::Migrated(Ok(moved())));
    let told = finishing().then(Event::HandedOver(not_this_move()));
    assert!(told.is("gone"), "{:?}", told.last);
    assert!(!told.all.contains(&Effect::ResumeDomain) && !told.all.contains(&Effect::Destroy));
    let told = finishing().then(Event::HandedOver(Err(HandOverError::NotNow("no answer".into()))));
    assert!(told.is("leaving") && told.after(3_000).did(&Effect::HandOver));
}

#[test]
fn a_move_keeps_its_name_when_the_job_begins_its_next_run_on_the_way() {
    let told = arriving().then(Event::Arrived).then(move_out()).then(Event::JobHere { run: 9 });
    let Life::Leaving { by, .. } = &told.vm.record.life else {
        panic!("{:?}", told.vm.record.life)
    };
    assert_eq!((by.move_id.as_str(), by.run, by.generation), ("m", 1, 2));
    assert_eq!(told.vm.record.run, 9);
}

fn answer(told: &Told) -> Option<&Result<bool, String>> {
    told.last.iter().find_map(|e| match e {
        Effect::AnswerAsked(answer) => Some(answer),
        _ => None,
    })
}

#[test]
fn a_destination_says_no_only_when_the_guest_can_no_longer_come() {
    let ask = |runs| asked(by("m0"), MoveQuestion::HasCome, runs);
    let told = arriving().then(ask(false));
    assert!(
        matches!(answer(&told), Some(Err(_))) && told.is("stopping") && told.did(&Effect::Destroy),
        "{:?}",
        told.last
    );
    let told = told.then(ask(false));
    assert!(matches!(answer(&told), Some(Err(_))), "its end is still under way");
    assert!(refused(&told.clone().then(took_over(by("m0"), 5))));
    let told = told.then(Event::Destroyed(Ok(()))).then(ask(false));
    assert_eq!(answer(&told), Some(&Ok(false)));
}

#[test]
fn a_destination_that_says_yes_has_the_guest_for_good() {
    let ask = |runs| asked(by("m0"), MoveQuestion::HasCome, runs);
    let told = arriving().then(ask(true));
    assert!(answer(&told) == Some(&Ok(true)) && told.is("awaiting-job"));
    let told = told.then(Event::Abandoned { by: by("m0") });
    assert!(told.is("awaiting-job"), "the source was told that it has come");
    let told = told.then(Event::Release).then(ask(false));
    assert_eq!(answer(&told), Some(&Ok(true)), "it has come, and the source may not go on with it");
}

#[test]
fn a_guest_that_came_by_another_move_or_began_here_is_not_the_one_that_is_asked_for() {
    for told in [running(), arriving(), arriving().then(Event::Arrived)] {
        let name = told.vm.record.life.name();
        let told = told.then(asked(by("m1"), MoveQuestion::HasCome, true));
        assert_eq!(answer(&told), Some(&Ok(false)), "{name}");
        assert_eq!(told.last.len(), 1, "{name}");
    }
}

#[test]
fn a_source_says_that_the_guest_stays_only_when_the_move_is_over() {
    let ask = |told: Told, runs| {
        let told = told.then(asked(by("m"), MoveQuestion::Stays, runs));
        answer(&told).cloned()
    };
    assert!(
        matches!(ask(copying(), true), Some(Err(_))),
        "a copy may take longer than its destination likes to wait"
    );
    assert_eq!(ask(copying(), false), Some(Ok(false)), "a paused copy proves nothing");
    let finishing = || copying().then(Event::Migrated(Ok(moved())));
    assert_eq!(ask(finishing(), true), Some(Ok(false)));
    assert_eq!(ask(finishing().then(Event::HandedOver(Ok(()))), false), Some(Ok(false)));
    assert_eq!(
        ask(
            copying()
                .then(Event::Migrated(Err("broken".into())))
                .then(Event::OwnerIs(Whereabouts::AtSource)),
            true
        ),
        Some(Ok(true))
    );
    // Another run of the job, or the same that stayed: by that move nothing comes any more.
    assert_eq!(ask(running(), true), Some(Ok(true)));
    assert_eq!(ask(copying().then(Event::Release), false), Some(Ok(false)));
}

#[test]
fn an_arrival_is_given_up_by_the_word_of_its_own_source_only() {
    assert!(arriving().then(Event::Abandoned { by: by("m1") }).is("arriving"));
    assert!(arriving().then(Event::Abandoned { by: by("m0") }).is("stopping"));
}

#[test]
fn offsets_that_come_before_a_restarted_agent_has_found_its_vm_are_taken_all_the_same() {
    let landed = arriving().then(Event::Arrived).vm.record;
    let told = Told::begin(Vm::recovered(landed, None, None)).then(took_over(by("m0"), 5));
    assert!(told.did(&Effect::AnswerSource(Ok(()))) && matches!(told.last[0], Effect::Adopt(_)));
    assert!(!told.did(&Effect::OpenGuest), "it is not known yet whether libvirt has the domain");
    assert!(told.then(Event::DomainIs(Some(true))).did(&Effect::OpenGuest));
}

#[test]
fn what_has_not_begun_is_given_up_when_its_record_cannot_be_written() {
    let told = Told::begin(Vm::new(record(Life::Preparing))).then(not_recorded(Some(Busy::Prepare)));
    assert!(matches!(
        &told.vm.record.life,
        Life::Stopping { why: End::NodeFault { how } } if how.contains("no space left")
    ));
    assert!(told.last.contains(&Effect::Destroy), "an overlay may be there");

    for (told, waits) in [
        (running().then(move_out()), Busy::AskDestination),
        (copying(), Busy::Migrate),
        (running().then(save()), Busy::Save),
    ] {
        let told = told.then(not_recorded(Some(waits)));
        assert!(told.is("running"), "{waits:?}: {:?}", told.vm.record.life);
        let answer = told.last.iter().position(|e| matches!(e, Effect::AnswerMove(Err(_))));
        let write = told.last.iter().position(|e| *e == Effect::Persist);
        assert!(
            answer.is_some() && answer < write,
            "{waits:?}: who asked hears of it although nothing can be written"
        );
        assert_eq!(told.vm.busy(), None);
    }
}

#[test]
fn what_has_begun_waits_until_its_record_can_be_written() {
    for told in [running(), copying(), running().then(save())] {
        let before = told.vm.record.life.clone();
        let told = told.then(not_recorded(None));
        assert!(told.last.is_empty());
        assert_eq!(told.vm.record.life, before);
    }
}

#[test]
fn a_clock_that_is_set_ends_no_guest_before_its_time_and_none_later() {
    let hour = 3_600_000;
    let late = |mut told: Told| {
        told.now = 10_000_000;
        told
    };
    let booting = || {
        late(Told::begin(Vm::new(record(Life::Preparing))))
            .then(prepared())
            .then(Event::DomainStarted(Ok(())))
    };
    let awaiting = || late(arriving()).then(Event::Arrived);
    for step in [hour, -hour] {
        let set = |told: Told| {
            let mut told = told;
            told.now = told.now.saturating_add_signed(step);
            told.then(Event::ClockStepped { by_ms: step })
        };
        let told = set(booting()).after(1_000);
        assert!(told.is("booting"), "set by {step}: {:?}", told.vm.record.life);
        assert!(told.all.contains(&Effect::Persist));
        assert!(
            set(booting()).after(10 * AWAIT + 3_600_000).is("preparing"),
            "set by {step}: booted once more"
        );
        let told = set(awaiting()).after(1_000);
        assert!(told.is("awaiting-job") && !told.last.contains(&Effect::AskJob), "set by {step}");
        assert!(set(awaiting()).after(AWAIT + 1_000).last.contains(&Effect::AskJob), "set by {step}");
    }
}

#[test]
fn what_is_known_of_a_run_is_in_the_record_until_the_run_is_over() {
    let mut told = running();
    told.vm.record.run_state = RunState {
        in_grace: true,
        parted: false,
        restart: 1,
        term_unexplained: false,
    };
    assert!(told.vm.record.run_state.is_run_again_at_its_end());
    let kept: Record = serde_json::from_str(&serde_json::to_string(&told.vm.record).unwrap()).unwrap();
    assert_eq!(kept.run_state, told.vm.record.run_state, "an agent that is restarted knows it");
    let again = told.vm.record.run;
    let told = told.then(Event::JobHere { run: again });
    assert!(told.vm.record.run_state.in_grace, "the same run");
    let told = told.then(Event::JobHere { run: again + 1 });
    assert!(told.vm.record.run_state.is_plain(), "another run");
    let mut elsewhere = kept;
    elsewhere.come_to("n2");
    assert!(elsewhere.run_state.is_plain());
}
