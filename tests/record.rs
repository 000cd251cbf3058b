//! The ledger's record against golden files: what older and newer agents make of each other's records.
use slurm_vm::core::{End, LeavingStage, Life, MoveIdentity, Record, record::RECORD_VERSION};

const RECORD_V1: &str = include_str!("data/record-v1.json");
const LIVES_V1: &str = include_str!("data/record-v1-lives.json");

fn golden() -> serde_json::Value {
    serde_json::from_str(RECORD_V1).unwrap()
}

fn parse(value: &serde_json::Value) -> Result<Record, String> {
    Record::parse(value.to_string().as_bytes())
}

/// Every state, each end once.
fn lives() -> Vec<Life> {
    let by = || MoveIdentity {
        move_id: "17-n1-1700000000000".into(),
        run: 3,
        generation: 4,
    };
    let leaving = |stage| Life::Leaving {
        to: "n2".into(),
        by: by(),
        stage,
    };
    let at = || "/shared/saves/slurm-17-0.2".into();
    let ends = [
        End::Released,
        End::BootTimeout { seconds: 120 },
        End::BootFailed { how: "QEMU died".into() },
        End::GuestLost {
            how: "it powered off".into(),
        },
        End::NodeFault { how: "no space".into() },
        End::Refused {
            why: "unknown image".into(),
        },
        End::NotArrived,
        End::NotReadmitted,
        End::Requeued,
    ];
    let mut lives = vec![
        Life::Preparing,
        Life::Booting { deadline_ms: 1 },
        Life::Running,
        leaving(LeavingStage::Preparing),
        leaving(LeavingStage::Copying),
        leaving(LeavingStage::Finishing),
        Life::Gone { to: "n2".into() },
        Life::Arriving {
            from: "n1".into(),
            by: by(),
        },
        Life::AwaitingJob { deadline_ms: 2 },
        Life::Saving { at: at() },
        Life::Saved { at: at() },
        Life::Restoring { from: at() },
        Life::Stopping { why: End::Released },
    ];
    lives.extend(ends.into_iter().map(|why| Life::Stopped { why }));
    lives
}

#[test]
fn a_record_of_version_1_is_read_and_written_as_it_is() {
    let record = Record::parse(RECORD_V1.as_bytes()).unwrap();
    assert_eq!(record.v, RECORD_VERSION);
    assert_eq!(
        serde_json::to_string_pretty(&record).unwrap() + "\n",
        RECORD_V1,
        "the written form has changed: see RECORD_VERSION"
    );
}

#[test]
fn every_state_and_end_is_written_as_version_1_does() {
    assert_eq!(
        serde_json::to_string_pretty(&lives()).unwrap() + "\n",
        LIVES_V1,
        "a state's written form has changed, or there is a new one: that raises RECORD_VERSION"
    );
    assert_eq!(serde_json::from_str::<Vec<Life>>(LIVES_V1).unwrap(), lives());
}

#[test]
fn a_new_agent_reads_a_record_without_the_fields_that_came_later() {
    let mut old = golden();
    old.as_object_mut().unwrap().remove("await_until_ms").unwrap();
    old.as_object_mut().unwrap().remove("arrived_by").unwrap();
    old["plan"].as_object_mut().unwrap().remove("layers").unwrap();
    let record = parse(&old).unwrap();
    assert_eq!((record.await_until_ms, record.plan.unwrap().layers), (None, vec![]));
    assert_eq!(record.arrived_by, None);
}

#[test]
fn a_move_on_record_without_run_and_generation_is_none_that_is_made_today() {
    let old: Life = serde_json::from_str(r#"{"leaving": {"to": "n2", "move_id": "m", "stage": "copying"}}"#).unwrap();
    let Life::Leaving { by, .. } = old else { panic!("{old:?}") };
    assert_eq!((by.run, by.generation), (0, 0));
    let first = Record::parse(RECORD_V1.as_bytes()).unwrap();
    assert!(first.run > 0 && first.generation > 0);
}

#[test]
fn an_old_agent_reads_a_newer_record_of_its_version() {
    let mut newer = golden();
    newer["color"] = "green".into();
    newer["plan"]["speed"] = 3.into();
    assert_eq!(parse(&newer).unwrap(), Record::parse(RECORD_V1.as_bytes()).unwrap());
}

#[test]
fn a_record_of_an_unknown_version_is_refused_by_its_number() {
    for v in [0, RECORD_VERSION + 1, 99] {
        let mut other = golden();
        other["v"] = v.into();
        other["life"] = "levitating".into();
        assert_eq!(
            parse(&other).unwrap_err(),
            format!("version {v}, this agent reads {RECORD_VERSION}")
        );
    }
}
