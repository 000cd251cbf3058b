//! The XML as text, and our calls on libvirt's own test driver, which lives in this process: `test:///default` is one for all tests here, so each
//! test has names of its own.
#![forbid(unsafe_code)]

use super::*;
use crate::hypervisor::{Boot, Channel, CpuModel, Disk, DiskCache, DiskFormat, StateReason, StopReason};

const TEST_URI: &str = "test:///default";

fn sample(job: u32) -> DomainSpec {
    DomainSpec {
        name: format!("slurm-{job}-0"),
        uuid: domain_uuid("cluster", job, 0),
        domain_type: DomainType::Qemu,
        machine: None,
        vcpus: 3,
        cpuset: vec![4, 6],
        mem_mib: 512,
        hard_limit_mib: Some(700),
        cpu: CpuModel::Named("Nehalem".into()),
        boot: Boot::Kernel {
            kernel: "/img/vmlinuz".into(),
            initrd: Some("/img/initrd".into()),
            cmdline: "console=ttyS0 a=\"<&>\"".into(),
        },
        disks: vec![Disk {
            path: "/run/vm/top.qcow2".into(),
            format: DiskFormat::Qcow2,
            backing: vec![("/img/base.raw".into(), DiskFormat::Raw)],
            target: "vda".into(),
            readonly: false,
            serial: Some("root".into()),
            cache: DiskCache::None,
        }],
        channels: vec![Channel {
            name: "org.slurm-vm.0".into(),
            socket: "/run/vm/guest.sock".into(),
        }],
        serial_log: "/run/vm/serial.log".into(),
        directories: vec![],
        interfaces: vec![],
        metadata: DomainMetadata {
            job,
            k: 0,
            user: "o'\"brien & <co>".into(),
            uid: 1000,
            spec: "{\"image\": \"a<b>&'c'\",\n\"n\": 1}".into(),
            node: "n1".into(),
            run: 3,
            generation: 1,
        },
    }
}

fn connect() -> LibvirtHypervisor {
    let hypervisor = LibvirtHypervisor::new(TEST_URI).unwrap();
    hypervisor.ping(Duration::from_secs(20)).unwrap();
    hypervisor
}

/// Waits for an event of a domain that `wanted` accepts.
fn wait_for(events: &Receiver<DomainEvent>, what: &str, wanted: impl Fn(&DomainEvent) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut seen = Vec::new();
    loop {
        match events.recv_deadline(deadline) {
            Ok(event) if wanted(&event) => return,
            Ok(event) => seen.push(event),
            Err(e) => panic!("no {what}: {e}; seen: {seen:?}"),
        }
    }
}

#[test]
fn the_xml_of_a_domain_is_the_golden_one() {
    assert_eq!(xml::domain(&sample(7), Flavor::Qemu), include_str!("golden-domain.xml").trim_end());
}

#[test]
fn a_disk_without_backing_file_says_so_and_is_not_probed() {
    let mut spec = sample(8);
    spec.disks[0].backing.clear();
    let xml = xml::domain(&spec, Flavor::Qemu);
    assert!(xml.contains("<source file=\"/run/vm/top.qcow2\"/>\n      <backingStore/>"), "{xml}");
}

#[test]
fn a_domain_without_limits_has_no_pinning_and_no_hard_limit() {
    let spec = DomainSpec {
        cpuset: Vec::new(),
        hard_limit_mib: None,
        cpu: CpuModel::Default,
        boot: Boot::Disk,
        ..sample(9)
    };
    let xml = xml::domain(&spec, Flavor::Qemu);
    for absent in ["<cputune", "<memtune", "<cpu ", "<kernel"] {
        assert!(!xml.contains(absent), "{absent} in {xml}");
    }
    assert!(xml.contains("<boot dev=\"hd\"/>"), "{xml}");
}

#[test]
fn metadata_with_quotes_brackets_and_newlines_comes_back_as_it_was() {
    let metadata = sample(10).metadata;
    assert_eq!(xml::read_metadata(&xml::metadata(&metadata)).unwrap(), Some(metadata.clone()));
    assert_eq!(
        xml::read_metadata(&xml::domain(&sample(10), Flavor::Qemu)).unwrap(),
        Some(metadata.clone())
    );
    assert_eq!(xml::read_metadata_element(&xml::metadata_to_set(&metadata)).unwrap(), metadata);
}

#[test]
fn metadata_of_another_version_is_read_as_far_as_it_is_known() {
    let text = format!("<x:domain xmlns:x='{}' job='5' later='7'><x:more/></x:domain>", xml::NAMESPACE);
    assert_eq!(
        xml::read_metadata(&text).unwrap(),
        Some(DomainMetadata {
            job: 5,
            ..DomainMetadata::default()
        })
    );
    assert_eq!(
        xml::read_metadata("<domain type='kvm'><metadata><domain xmlns='urn:other' job='5'/></metadata></domain>").unwrap(),
        None
    );
    assert!(xml::read_metadata(&text.replace("'5'", "'-5'")).is_err());
}

#[test]
fn repointing_changes_disk_and_metadata_and_drops_the_pinning_and_nothing_else() {
    let spec = sample(11);
    let old = xml::domain(&spec, Flavor::Qemu);
    let mut new_spec = spec.clone();
    new_spec.metadata.generation = 2;
    new_spec.disks[0].path = "/run/vm/new&fresh.qcow2".into();
    new_spec.disks[0].backing.insert(0, ("/save/top.qcow2".into(), DiskFormat::Qcow2));
    assert!(!spec.cpuset.is_empty(), "the sample shows nothing of pinning");
    new_spec.cpuset = vec![];
    let new = xml::repoint(&old, &new_spec.disks, Some(&new_spec.metadata)).unwrap();
    let squeeze = |xml: &str| xml.split_whitespace().collect::<String>();
    assert_eq!(squeeze(&new), squeeze(&xml::domain(&new_spec, Flavor::Qemu)));
}

#[test]
fn repointing_a_disk_that_is_not_there_is_refused() {
    let spec = sample(12);
    let mut disks = spec.disks.clone();
    disks[0].target = "vdq".into();
    assert!(xml::repoint(&xml::domain(&spec, Flavor::Qemu), &disks, None).is_err());
}

#[test]
fn usable_processors_and_the_host_model_are_read_from_the_capabilities() {
    let text = "<domainCapabilities><cpu><mode name='host-passthrough' supported='yes'/><mode name='maximum' supported='yes'>\
        <enum name='x'><value>on</value></enum></mode><mode name='host-model' supported='yes'><model fallback='forbid'>EPYC</model>\
        <feature policy='require' name='ss'/></mode><mode name='custom' supported='yes'><model usable='no'>Bad</model>\
        <model usable='yes' vendor='Intel'>Good</model></mode></cpu></domainCapabilities>";
    let (models, host) = xml::read_cpus(text).unwrap();
    assert_eq!(models, ["Good"]);
    assert_eq!(
        host,
        "<cpu mode='custom' match='exact'><model fallback='forbid'>EPYC</model><feature policy='require' name='ss'/></cpu>"
    );
}

#[test]
fn names_and_paths_that_xml_cannot_carry_are_refused_before_libvirt_sees_them() {
    let hypervisor = connect();
    let refused = |spec: DomainSpec| matches!(hypervisor.start(&spec, false), Err(HypervisorError::Invalid { .. }));
    assert!(refused(DomainSpec {
        name: "a/b".into(),
        ..sample(13)
    }));
    assert!(refused(DomainSpec {
        name: String::new(),
        ..sample(13)
    }));
    assert!(refused(DomainSpec {
        serial_log: "relative".into(),
        directories: vec![],
        interfaces: vec![],
        ..sample(13)
    }));
    assert!(refused(DomainSpec { vcpus: 0, ..sample(13) }));
    let mut odd = sample(13);
    odd.metadata.user = "a\u{1}b".into();
    assert!(refused(odd));
    assert!(matches!(hypervisor.info("nul\0byte"), Err(HypervisorError::Libvirt { .. })));
}

#[test]
fn a_domain_goes_through_its_life_on_the_test_driver() {
    let hypervisor = connect();
    let events = hypervisor.events();
    let spec = sample(20);
    let name = spec.name.clone();
    hypervisor.start(&spec, false).unwrap();
    wait_for(
        &events,
        "start",
        |e| matches!(e, DomainEvent::Started { uuid, reason: StateReason::Booted, .. } if *uuid == spec.uuid),
    );
    assert_eq!(
        hypervisor.start(&spec, false),
        Err(HypervisorError::AlreadyExists { name: name.clone() })
    );
    let same_uuid = DomainSpec {
        name: "slurm-20-other".into(),
        ..spec.clone()
    };
    assert!(matches!(
        hypervisor.start(&same_uuid, false),
        Err(HypervisorError::AlreadyExists { .. })
    ));

    let info = hypervisor.info(&name).unwrap().unwrap();
    assert_eq!(
        (info.state, info.uuid, info.vcpus, info.mem_mib),
        (DomainState::Running, spec.uuid, 3, 512)
    );
    assert_eq!(info.metadata, spec.metadata);
    assert!(
        hypervisor
            .list()
            .unwrap()
            .iter()
            .any(|d| d.name == name && d.metadata == spec.metadata)
    );

    hypervisor.suspend(&name).unwrap();
    wait_for(
        &events,
        "pause",
        |e| matches!(e, DomainEvent::Suspended { uuid, .. } if *uuid == spec.uuid),
    );
    assert_eq!(hypervisor.info(&name).unwrap().unwrap().state, DomainState::Paused);
    hypervisor.resume(&name).unwrap();
    hypervisor.resume(&name).unwrap();
    assert_eq!(hypervisor.info(&name).unwrap().unwrap().state, DomainState::Running);

    let changed = DomainMetadata {
        generation: 2,
        node: "n\"2".into(),
        ..spec.metadata.clone()
    };
    hypervisor.set_metadata(&name, &changed).unwrap();
    assert_eq!(hypervisor.info(&name).unwrap().unwrap().metadata, changed);

    assert!(hypervisor.destroy(&name).unwrap());
    wait_for(
        &events,
        "stop",
        |e| matches!(e, DomainEvent::Stopped { uuid, reason: StopReason::Destroyed, .. } if *uuid == spec.uuid),
    );
    assert!(!hypervisor.destroy(&name).unwrap());
    assert_eq!(hypervisor.info(&name).unwrap(), None);
    assert_eq!(hypervisor.suspend(&name), Err(HypervisorError::NoDomain { name }));
}

#[test]
fn a_running_domain_is_pinned_anew() {
    let hypervisor = connect();
    let mut spec = sample(23);
    (spec.vcpus, spec.cpuset) = (3, vec![0]);
    hypervisor.start(&spec, false).unwrap();
    hypervisor.pin(&spec.name, &[1, 3]).unwrap();
    let pinned = hypervisor.live_xml(&spec.name).unwrap();
    for line in [
        "<vcpupin vcpu='0' cpuset='1'/>",
        "<vcpupin vcpu='1' cpuset='3'/>",
        "<vcpupin vcpu='2' cpuset='1'/>",
        "<emulatorpin cpuset='1,3'/>",
    ] {
        assert!(pinned.contains(line), "{line} in {pinned}");
    }
    hypervisor.pin(&spec.name, &[]).unwrap();
    assert_eq!(hypervisor.live_xml(&spec.name).unwrap(), pinned);
    assert!(hypervisor.destroy(&spec.name).unwrap());
}

#[test]
fn a_saved_domain_comes_back_paused_with_its_metadata() {
    let hypervisor = connect();
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let spec = sample(21);
    hypervisor.start(&spec, false).unwrap();
    assert_eq!(hypervisor.save(&spec.name, &image, SaveFormat::Sparse).unwrap(), SaveFormat::Raw);
    assert_eq!(hypervisor.info(&spec.name).unwrap(), None);
    let saved = hypervisor.saved(&image).unwrap();
    assert_eq!((&saved.name, saved.uuid, &saved.metadata), (&spec.name, spec.uuid, &spec.metadata));
    assert!(hypervisor.restore(&image, Some("<domain/>"), true).is_err());
    hypervisor.restore(&image, None, true).unwrap();
    let info = hypervisor.info(&spec.name).unwrap().unwrap();
    assert_eq!((info.state, info.metadata), (DomainState::Paused, spec.metadata.clone()));
    assert_eq!(
        hypervisor.restore(&image, None, true),
        Err(HypervisorError::AlreadyExists { name: spec.name.clone() })
    );
    assert!(hypervisor.destroy(&spec.name).unwrap());
}

#[test]
fn a_domain_without_our_metadata_is_neither_seen_nor_touched() {
    let hypervisor = connect();
    // The test driver begins with a domain of its own.
    assert!(
        hypervisor
            .control
            .acquire("test", PATIENCE)
            .unwrap()
            .lookup("test")
            .unwrap()
            .is_some()
    );
    assert!(!hypervisor.list().unwrap().iter().any(|d| d.name == "test"));
    assert_eq!(hypervisor.info("test").unwrap(), None);
    let none = || HypervisorError::NoDomain { name: "test".into() };
    assert!(!hypervisor.destroy("test").unwrap());
    assert_eq!(hypervisor.suspend("test"), Err(none()));
    assert_eq!(hypervisor.shutdown("test"), Err(none()));
    assert_eq!(hypervisor.set_metadata("test", &DomainMetadata::default()), Err(none()));
    assert_eq!(hypervisor.migrate("test", &MigrateParams::default()), Err(none()));
    assert_eq!(hypervisor.save("test", Path::new("/nowhere/image"), SaveFormat::Raw), Err(none()));
    let lease = hypervisor.control.acquire("test", PATIENCE).unwrap();
    assert_eq!(
        events::state_of(lease.lookup("test").unwrap().unwrap().state().unwrap()),
        DomainState::Running
    );
}

#[test]
fn a_guest_that_powers_off_is_gone() {
    let hypervisor = connect();
    let events = hypervisor.events();
    let spec = sample(22);
    hypervisor.start(&spec, true).unwrap();
    hypervisor.resume(&spec.name).unwrap();
    hypervisor.shutdown(&spec.name).unwrap();
    wait_for(
        &events,
        "stop",
        |e| matches!(e, DomainEvent::Stopped { uuid, reason: StopReason::Shutdown, .. } if *uuid == spec.uuid),
    );
    assert_eq!(hypervisor.info(&spec.name).unwrap(), None);
}

#[test]
fn many_threads_at_a_time_do_not_stop_each_other() {
    let hypervisor = connect();
    std::thread::scope(|scope| {
        for job in 100..116 {
            let hypervisor = &hypervisor;
            scope.spawn(move || {
                let spec = sample(job);
                for _ in 0..5 {
                    hypervisor.start(&spec, false).unwrap();
                    assert!(hypervisor.info(&spec.name).unwrap().is_some());
                    assert!(hypervisor.destroy(&spec.name).unwrap());
                }
            });
        }
    });
}

#[test]
fn a_libvirt_that_is_not_there_is_an_error_in_time_and_not_a_wait() {
    let directory = tempfile::tempdir().unwrap();
    let uri = format!("qemu+unix:///system?socket={}/none", directory.path().display());
    let hypervisor = LibvirtHypervisor::new(&uri).unwrap();
    let begin = Instant::now();
    let answer = hypervisor.ping(Duration::from_millis(500));
    assert!(
        matches!(answer, Err(HypervisorError::Timeout { .. } | HypervisorError::Connect { .. })),
        "{answer:?}"
    );
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
}
