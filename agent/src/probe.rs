//! KVM or emulation: KVM counts as usable only when a probe guest has really booted with it. `/dev/kvm` that opens, and
//! capabilities that list it, prove nothing: a host without nested virtualization offers both, and guests hang in it.
use std::time::{Duration, Instant};

use slurm_vm_api::{guest::PORT_NAME, spec::VmSpec};

use crate::{
    config::Config,
    core::{Plan, Record},
    effects::{World, store::write_durably},
    guest::{GuestLink, LinkConfig, LinkEvent, UnixTransport},
    hypervisor::{Boot, Channel, CpuModel, DomainSpec, DomainType},
    vm::{moving, prepare},
};

/// Guest memory of the probe.
const PROBE_MIB: u64 = 192;

/// Chooses, by the answer that is on file for this boot of this kernel and QEMU, else by a probe guest.
#[must_use]
pub fn choose(config: &Config, world: &World) -> (DomainType, String) {
    if !std::path::Path::new("/dev/kvm").exists() {
        return (DomainType::Qemu, "there is no /dev/kvm".into());
    }
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let file = config.state_dir.join("kvm-probe");
    if let Some((known, answer)) = std::fs::read_to_string(&file).ok().as_deref().and_then(|t| t.split_once('\n'))
        && known == boot.trim()
    {
        let kind = if answer.starts_with("kvm") {
            DomainType::Kvm
        } else {
            DomainType::Qemu
        };
        return (kind, format!("{} (probed since the last boot)", answer.trim()));
    }
    let (kind, why) = match probe(config, world) {
        Ok(seconds) => (DomainType::Kvm, format!("kvm: a probe guest came up in {seconds:.1} s")),
        Err(why) => (DomainType::Qemu, format!("emulation: {why}")),
    };
    if let Err(e) = write_durably(&file, format!("{}\n{why}\n", boot.trim()).as_bytes()) {
        log::warn!("{}: {e}", file.display());
    }
    (kind, why)
}

/// Boots a guest with KVM and waits for its helper.
fn probe(config: &Config, world: &World) -> Result<f64, String> {
    let (name, image) = config
        .images
        .iter()
        .find(|(_, i)| i.kernel.is_some())
        .ok_or("no image of the catalogue has a kernel to probe KVM with")?;
    let user = slurm_vm_api::session::UserEntry::default();
    let spec = VmSpec::for_image(name).map_err(|e| e.to_string())?;
    let record = Record {
        run: 0,
        generation: 0,
        plan: Some(Plan {
            vcpus: 1,
            mem_mib: PROBE_MIB.max(image.min_mem_mib),
            domain_type: "kvm".into(),
            overlay: None,
            overlay_shared: false,
            layers: vec![],
            base_sha256: None,
        }),
        ..Record::new(config.cluster.clone(), config.node(), 0, user, spec)
    };
    let domain = record.domain();
    moving::make_run_dir(config, &domain)?;
    let socket = prepare::run_dir(config, &domain).join("guest.sock");
    let spec = DomainSpec {
        name: domain.clone(),
        uuid: record.uuid(),
        domain_type: DomainType::Kvm,
        machine: None,
        vcpus: 1,
        cpuset: vec![],
        mem_mib: PROBE_MIB.max(image.min_mem_mib),
        hard_limit_mib: None,
        cpu: CpuModel::Default,
        boot: Boot::Kernel {
            kernel: image.kernel.clone().unwrap_or_default(),
            initrd: image.initrd.clone(),
            cmdline: format!("{} panic=1", image.cmdline),
        },
        disks: vec![],
        channels: vec![Channel {
            name: PORT_NAME.into(),
            socket: socket.clone(),
        }],
        serial_log: prepare::run_dir(config, &domain).join("serial.log"),
        metadata: prepare::metadata(&record),
    };
    let begun = Instant::now();
    let limit = Duration::from_secs(config.hypervisor.probe_timeout_s.into());
    world
        .hypervisor
        .start(&spec, false)
        .map_err(|e| format!("the probe guest did not start: {e}"))?;
    let up = GuestLink::start(LinkConfig::new("probe", 1), Box::new(UnixTransport::new(socket)))
        .map_err(|e| e.to_string())
        .and_then(|(link, events)| {
            let outcome = loop {
                let left = limit.checked_sub(begun.elapsed());
                match left.map(|l| events.recv_timeout(l)) {
                    Some(Ok(LinkEvent::Up { .. })) => break Ok(begun.elapsed().as_secs_f64()),
                    Some(Ok(_)) => {}
                    _ => {
                        break Err(format!(
                            "/dev/kvm is there, but a probe guest did not come up within {} s",
                            limit.as_secs()
                        ));
                    }
                }
            };
            link.stop();
            outcome
        });
    if let Err(e) = world.hypervisor.destroy(&domain) {
        log::warn!("the probe guest cannot be ended: {e}");
    }
    let _ = std::fs::remove_dir_all(prepare::run_dir(config, &domain));
    up
}
