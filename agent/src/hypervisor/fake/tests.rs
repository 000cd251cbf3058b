//! The fake against what real libvirt was seen to do, and its watch over the world.
#![forbid(unsafe_code)]

use super::*;
use crate::hypervisor::{Boot, CpuModel, libvirt::domain_uuid};

fn spec(job: u32) -> DomainSpec {
    DomainSpec {
        name: format!("slurm-{job}-0"),
        uuid: domain_uuid("cluster", job, 0),
        domain_type: DomainType::Qemu,
        machine: None,
        vcpus: 1,
        cpuset: Vec::new(),
        mem_mib: 256,
        hard_limit_mib: None,
        cpu: CpuModel::Default,
        boot: Boot::Disk,
        disks: Vec::new(),
        channels: Vec::new(),
        serial_log: "/run/vm/serial.log".into(),
        directories: vec![],
        interfaces: vec![],
        metadata: DomainMetadata {
            job,
            node: "n1".into(),
            generation: 1,
            ..DomainMetadata::default()
        },
    }
}

fn to(node: &str) -> MigrateParams {
    MigrateParams {
        libvirt_uri: format!("fake:///{node}"),
        ..MigrateParams::default()
    }
}

fn refusal() -> HypervisorError {
    HypervisorError::Libvirt {
        call: "migrate",
        domain: 10,
        message: "ordered".into(),
        code: 9,
    }
}

fn wait_until_held(world: &World, node: &str, calls: u32) {
    let mut inner = world.lock();
    while inner.nodes.get(node).is_none_or(|n| n.held < calls) {
        let (next, late) = world.inner.1.wait_timeout(inner, Duration::from_secs(20)).unwrap();
        assert!(!late.timed_out(), "{calls} calls on {node} were not held");
        inner = next;
    }
}

#[test]
fn calls_that_are_held_together_are_let_go_together() {
    let world = World::new();
    let a = world.node("n1");
    a.fail_next(Op::List, Fault::Hold, 2);
    std::thread::scope(|scope| {
        let calls = [scope.spawn(|| a.list()), scope.spawn(|| a.list())];
        wait_until_held(&world, "n1", 2);
        a.let_go();
        for call in calls {
            assert_eq!(call.join().unwrap(), Ok(vec![]));
        }
    });
    assert_eq!(a.held(), 0);
}

#[test]
fn destroying_a_domain_ends_the_migration_that_is_held() {
    let world = World::new();
    let (a, _b) = (world.node("n1"), world.node("n2"));
    let s = spec(10);
    a.start(&s, false).unwrap();
    a.fail_next(Op::Migrate, Fault::Hold, 1);
    std::thread::scope(|scope| {
        let job = scope.spawn(|| a.migrate(&s.name, &to("n2")));
        wait_until_held(&world, "n1", 1);
        assert!(a.destroy(&s.name).unwrap());
        assert!(matches!(job.join().unwrap(), Err(HypervisorError::Aborted { .. })));
    });
    assert_eq!(world.domains(), 0);
}

#[test]
fn a_guest_keeps_its_work_when_it_moves() {
    let world = World::new();
    let (a, b) = (world.node("n1"), world.node("n2"));
    let s = spec(1);
    let events = (a.events(), b.events());
    a.start(&s, false).unwrap();
    world.tick(10);
    let moved = DomainMetadata {
        generation: 2,
        node: "n2".into(),
        ..s.metadata.clone()
    };
    let dest_xml = xml::repoint(&a.live_xml(&s.name).unwrap(), &[], Some(&moved)).unwrap();
    a.migrate(
        &s.name,
        &MigrateParams {
            dest_xml: Some(dest_xml),
            ..to("n2")
        },
    )
    .unwrap();
    world.tick(5);
    assert_eq!((a.info(&s.name).unwrap(), b.work(&s.name)), (None, Some(15)));
    assert_eq!(b.info(&s.name).unwrap().unwrap().metadata, moved);
    assert!(events.0.try_iter().any(|e| matches!(
        e,
        DomainEvent::Stopped {
            reason: StopReason::Migrated,
            ..
        }
    )));
    assert!(events.1.try_iter().any(|e| matches!(
        e,
        DomainEvent::Started {
            reason: StateReason::Migrated,
            ..
        }
    )));
    assert_eq!((world.violations(), world.running(s.uuid)), (vec![], vec!["n2".to_owned()]));
}

#[test]
fn a_failed_import_leaves_the_guest_running_at_the_source() {
    let world = World::new();
    let (a, b) = (world.node("n1"), world.node("n2"));
    let s = spec(2);
    a.start(&s, false).unwrap();
    b.fail_next(Op::Import, Fault::Refuse(refusal()), 2);
    assert_eq!(a.migrate(&s.name, &to("n2")), Err(refusal()));
    assert_eq!(a.migrate(&s.name, &to("n2")), Err(refusal()));
    assert_eq!(world.running(s.uuid), ["n1"]);
    a.migrate(&s.name, &to("n2")).unwrap();
    assert_eq!(world.running(s.uuid), ["n2"]);
}

#[test]
fn a_lost_answer_hides_a_move_that_was_made() {
    let world = World::new();
    let (a, b) = (world.node("n1"), world.node("n2"));
    let s = spec(3);
    a.start(&s, false).unwrap();
    a.fail_next(Op::Migrate, Fault::LoseAnswer, 1);
    assert!(matches!(a.migrate(&s.name, &to("n2")), Err(HypervisorError::Connect { .. })));
    assert_eq!(a.info(&s.name).unwrap(), None);
    assert!(b.info(&s.name).unwrap().is_some());
}

#[test]
fn a_held_migration_can_be_aborted_and_shows_progress() {
    let world = World::new();
    let (a, _b) = (world.node("n1"), world.node("n2"));
    let s = spec(4);
    a.start(&s, false).unwrap();
    a.fail_next(Op::Migrate, Fault::Hold, 1);
    std::thread::scope(|scope| {
        let job = scope.spawn(|| a.migrate(&s.name, &to("n2")));
        wait_until_held(&world, "n1", 1);
        assert!(a.job_progress(&s.name).unwrap().is_some());
        a.abort_job(&s.name).unwrap();
        assert!(matches!(job.join().unwrap(), Err(HypervisorError::Aborted { .. })));
    });
    assert_eq!(
        (world.running(s.uuid), a.job_progress(&s.name).unwrap()),
        (vec!["n1".to_owned()], None)
    );
    assert!(matches!(a.abort_job(&s.name), Err(HypervisorError::WrongState { .. })));
}

#[test]
fn restoring_an_old_save_after_the_guest_went_on_is_a_violation() {
    let world = World::new();
    let (a, b) = (world.node("n1"), world.node("n2"));
    let s = spec(5);
    let path = Path::new("/state/5.save");
    a.start(&s, false).unwrap();
    world.tick(10);
    a.save(&s.name, path, SaveFormat::Sparse).unwrap();
    b.restore(path, None, true).unwrap();
    b.resume(&s.name).unwrap();
    world.tick(1);
    assert_eq!((world.work(s.uuid), world.violations()), (11, vec![]));
    b.destroy(&s.name).unwrap();
    a.restore(path, None, false).unwrap();
    assert_eq!(world.violations(), ["slurm-5-0 on n1 went back from work 11 to 10"]);
}

#[test]
fn one_guest_on_two_nodes_is_a_violation() {
    let world = World::new();
    let (a, b) = (world.node("n1"), world.node("n2"));
    let s = spec(6);
    a.start(&s, false).unwrap();
    b.start(&s, false).unwrap();
    assert_eq!(
        world.violations(),
        ["slurm-6-0 is booted on n2 and exists on n1", "slurm-6-0 runs on n1 and on n2"]
    );
    assert_eq!(world.boots(s.uuid), 2);
}

#[test]
fn a_boot_after_a_clean_stop_is_a_new_run_and_no_violation() {
    let world = World::new();
    let a = world.node("n1");
    let s = spec(7);
    a.start(&s, false).unwrap();
    world.tick(10);
    assert!(a.destroy(&s.name).unwrap());
    assert!(!a.destroy(&s.name).unwrap());
    a.start(&s, false).unwrap();
    world.tick(1);
    assert_eq!((world.violations(), world.boots(s.uuid), world.domains()), (vec![], 2, 1));
}

#[test]
fn a_cut_connection_fails_all_calls_and_guests_go_on() {
    let world = World::new();
    let a = world.node("n1");
    let s = spec(8);
    a.start(&s, false).unwrap();
    let events = a.events();
    a.connect(false);
    world.tick(3);
    assert!(matches!(a.list(), Err(HypervisorError::Connect { .. })));
    assert!(a.ping(Duration::from_secs(1)).is_err());
    a.connect(true);
    assert_eq!(a.work(&s.name), Some(3));
    assert_eq!(
        events.try_iter().collect::<Vec<_>>(),
        [DomainEvent::ConnectionLost, DomainEvent::ConnectionBack]
    );
}

#[test]
fn a_domain_that_is_not_ours_is_not_touched_and_its_name_is_taken() {
    let a = World::new().node("n1");
    let s = spec(9);
    a.add_foreign(&s.name);
    assert!(matches!(a.start(&s, false), Err(HypervisorError::AlreadyExists { .. })));
    assert!(!a.destroy(&s.name).unwrap());
    assert_eq!((a.list().unwrap(), a.foreign()), (vec![], vec![s.name]));
}

#[test]
fn a_held_ping_is_a_timeout_and_no_wait() {
    let a = World::new().node("n1");
    a.fail_next(Op::Ping, Fault::Hold, 1);
    assert!(matches!(a.ping(Duration::from_secs(3600)), Err(HypervisorError::Timeout { .. })));
    a.ping(Duration::from_secs(1)).unwrap();
}
