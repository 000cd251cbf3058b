//! What agents say to each other against golden files: a word that changes its form is noticed here, before two agents of neighbouring versions
//! notice it.
//!
//! `tests/data/words-v1.jsonl` has each request and each reply of version 1 once, a line each. A field may be added if the old line is still
//! understood (`serde(default)`); then the next version's file is made beside this one. Nothing else may change without a new version
//! (`peer::VERSIONS`), and the file of the version before stays until nobody speaks it any more.
use slurm_vm::{
    cluster::{HostFacts, PeerReply, PeerRequest},
    core::{MoveIdentity, MoveQuestion, Record, directories::Mark},
    peer::VERSIONS,
};
use slurm_vm_api::{
    query::{MoveView, NodeHealth, Totals, VmView},
    spec::PreemptWay,
};

const RECORD_V1: &str = include_str!("data/record-v1.json");
const WORDS_V1: &str = include_str!("data/words-v1.jsonl");

fn by() -> MoveIdentity {
    MoveIdentity {
        move_id: "17-n1-1700000000000".into(),
        run: 3,
        generation: 4,
    }
}

fn record() -> Record {
    Record::parse(RECORD_V1.as_bytes()).unwrap()
}

fn moved() -> MoveView {
    MoveView {
        way: "live".into(),
        from: "n1".into(),
        to: "n2".into(),
        at: 1_700_000_000,
        bytes: 1 << 20,
        seconds: 1.5,
        downtime_ms: Some(31),
        gap_ms: Some(40),
        cause: "preemption".into(),
        outcome: "done".into(),
    }
}

fn requests() -> Vec<PeerRequest> {
    let job = 17;
    vec![
        PeerRequest::Status,
        PeerRequest::Show { job },
        PeerRequest::Log {
            job,
            journal: 10,
            serial: 20,
        },
        PeerRequest::MoveOut {
            job,
            to: "n2".into(),
            address: "n2:6822".into(),
            cause: "preemption".into(),
            deadline_ms: Some(1_700_000_000_000),
        },
        PeerRequest::Save {
            job,
            cause: "preemption".into(),
        },
        PeerRequest::CancelMove { job },
        PeerRequest::Progress { job },
        PeerRequest::Grace { job, preempted: true },
        PeerRequest::Part { job },
        PeerRequest::Note {
            job,
            line: "a line".into(),
        },
        PeerRequest::Release { job },
        PeerRequest::Import {
            record: Box::new(record()),
            token: "a token".into(),
            copy_overlay: Some(4096),
            host: HostFacts {
                agent: "0.1.0".into(),
                domain_type: "kvm".into(),
                cpu_model: "EPYC".into(),
                qemu: "10.0.2".into(),
                storage: Some("1700000000000-n1".into()),
            },
            marks: vec![Mark {
                nonce: Some("n1-1700000000000".into()),
                look: "2 1700000000.000000000".into(),
            }],
        },
        PeerRequest::TakeOver {
            job,
            by: by(),
            programs: record().programs,
            moves: vec![moved()],
        },
        PeerRequest::Kept {
            job,
            by: by(),
            program: 1,
            stream: 0,
            offset: 5,
            hex: "6869".into(),
        },
        PeerRequest::Abandon { job, by: by() },
        PeerRequest::Supersede { job, restarts: 2 },
        PeerRequest::RunsHere {
            job,
            by: by(),
            question: MoveQuestion::HasCome,
        },
        PeerRequest::RunsHere {
            job,
            by: by(),
            question: MoveQuestion::Stays,
        },
    ]
}

fn replies() -> Vec<PeerReply> {
    let view = VmView {
        job: 17,
        user: "alice".into(),
        node: "n1".into(),
        domain: "slurm-17-0".into(),
        state: "running".into(),
        moves: vec![moved()],
        ..VmView::default()
    };
    vec![
        PeerReply::Status {
            health: NodeHealth {
                node: "n1".into(),
                healthy: true,
                ..NodeHealth::default()
            },
            vms: vec![view.clone()],
            totals: Totals::default(),
        },
        PeerReply::Vm(Some(Box::new(view))),
        PeerReply::Vm(None),
        PeerReply::Log {
            journal: "a".into(),
            journal_bytes: 1,
            serial: "b".into(),
            serial_bytes: 1,
            over: true,
        },
        PeerReply::Moved(Box::new(moved())),
        PeerReply::Ready { disk: None },
        PeerReply::Ready {
            disk: Some(("/a".into(), "/b".into(), "qcow2".into())),
        },
        PeerReply::Ways {
            ways: vec![PreemptWay::Live, PreemptWay::Save, PreemptWay::Requeue],
            reserve_ms: 10,
        },
        PeerReply::Progress(Some("leaving".into())),
        PeerReply::RunsHere(true),
        PeerReply::NotThisMove("why".into()),
        PeerReply::Ok,
        PeerReply::Refused("why".into()),
    ]
}

#[test]
fn each_word_of_version_1_is_said_as_it_is_recorded() {
    let mut said: Vec<String> = requests().iter().map(|r| serde_json::to_string(r).unwrap()).collect();
    said.extend(replies().iter().map(|r| serde_json::to_string(r).unwrap()));
    let recorded: Vec<&str> = WORDS_V1.lines().collect();
    assert_eq!(said, recorded, "in full:\n{}", said.join("\n"));
}

#[test]
fn each_recorded_word_is_understood() {
    let mut lines = WORDS_V1.lines();
    for request in requests() {
        let heard: PeerRequest = serde_json::from_str(lines.next().unwrap()).unwrap();
        assert_eq!(heard, request);
    }
    for reply in replies() {
        let heard: PeerReply = serde_json::from_str(lines.next().unwrap()).unwrap();
        assert_eq!(heard, reply);
    }
}

#[test]
fn every_kind_of_request_is_recorded_and_the_versions_have_their_files() {
    for kind in PeerRequest::KINDS {
        assert!(requests().iter().any(|r| r.kind() == kind), "{kind} is not recorded");
    }
    assert_eq!(
        VERSIONS,
        (1, 1),
        "a new version has a file of words of its own, and keeps the one before"
    );
}
