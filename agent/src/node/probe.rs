//! KVM or emulation: KVM counts as usable only when a probe guest has really booted with it. `/dev/kvm` that opens, and
//! capabilities that list it, prove nothing: a host without nested virtualization offers both, and guests hang in it.
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use slurm_vm_api::{guest::PORT_NAME, spec::VmSpec};

use crate::{
    config::Config,
    core::{Plan, Record},
    effects::{World, store::write_durably},
    guest::{GuestLink, LinkConfig, LinkEvent, UnixTransport},
    hypervisor::{Boot, Channel, CpuModel, DomainSpec, DomainType},
    vm::{moving, prepare},
};

/// A host that has been up for so many seconds has loaded its modules.
const JUST_BOOTED_S: f64 = 120.0;
/// Guest memory of the probe.
const PROBE_MIB: u64 = 192;

/// Chooses, by the answer that is on file for this boot of this kernel and QEMU, else by a probe guest. Only a good answer is kept: what failed
/// may have been mended since, and then a restart of the agent is enough.
#[must_use]
pub fn choose(config: &Config, world: &World) -> (DomainType, String) {
    if !device(world) {
        return (DomainType::Qemu, "there is no /dev/kvm".into());
    }
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let file = config.state_dir.join("kvm-probe");
    if let Some((known, answer)) = std::fs::read_to_string(&file).ok().as_deref().and_then(|t| t.split_once('\n'))
        && known == boot.trim()
        && answer.starts_with("kvm")
    {
        return (DomainType::Kvm, format!("{} (probed since the last boot)", answer.trim()));
    }
    match probe(config, world) {
        Ok(seconds) => {
            let why = format!("kvm: a probe guest came up in {seconds:.1} s");
            if let Err(e) = write_durably(&file, format!("{}\n{why}\n", boot.trim()).as_bytes()) {
                log::warn!("{}: {e}", file.display());
            }
            (DomainType::Kvm, why)
        }
        Err(why) => (DomainType::Qemu, format!("emulation: {why}")),
    }
}

/// Whether there is a /dev/kvm. The kernel's module may be loaded after this agent was started: on a host that has just booted, and whose
/// processors could, it is waited for.
fn device(world: &World) -> bool {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let able = cpus
        .lines()
        .filter(|l| l.starts_with("flags"))
        .any(|l| l.split(' ').any(|f| f == "vmx" || f == "svm"));
    loop {
        if Path::new("/dev/kvm").exists() {
            return true;
        }
        let uptime: f64 = read("/proc/uptime")
            .split(' ')
            .next()
            .and_then(|t| t.parse().ok())
            .unwrap_or(f64::MAX);
        if !able || uptime > JUST_BOOTED_S {
            return false;
        }
        world.clock.sleep(Duration::from_secs(1));
    }
}

/// What a probe guest boots, and how it shows that it has.
struct Guest {
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    cmdline: String,
    mem_mib: u64,
    /// It is an image of the catalogue: its helper answers. Else it is a kernel alone, which ends where it looks for a root file system.
    helper: bool,
}

/// An image of the catalogue that has a kernel, else this host's own kernel, with nothing to start: a catalogue may hold disks only.
fn guest(config: &Config, dir: &Path) -> Result<Guest, String> {
    if let Some((_, image)) = config.images.iter().find(|(_, i)| i.kernel.is_some()) {
        return Ok(Guest {
            kernel: image.kernel.clone().unwrap_or_default(),
            initrd: image.initrd.clone(),
            cmdline: format!("{} panic=1", image.cmdline),
            mem_mib: PROBE_MIB.max(image.min_mem_mib),
            helper: true,
        });
    }
    let release = nix::sys::utsname::uname()
        .map_err(|e| e.to_string())?
        .release()
        .to_string_lossy()
        .into_owned();
    let places = [format!("/boot/vmlinuz-{release}"), format!("/lib/modules/{release}/vmlinuz")];
    // A copy: libvirt gives what a guest boots to QEMU's user for the time.
    let kernel = dir.join("vmlinuz");
    let copied = places.iter().find_map(|place| std::fs::copy(place, &kernel).ok());
    copied.ok_or_else(|| {
        let places = places.join(" and ");
        format!("no image of the catalogue has a kernel to probe KVM with, and this host's own is not in {places}")
    })?;
    Ok(Guest {
        kernel,
        initrd: None,
        cmdline: "console=ttyS0 panic=-1".into(),
        mem_mib: PROBE_MIB,
        helper: false,
    })
}

/// Boots a guest with KVM and waits until it has come up.
fn probe(config: &Config, world: &World) -> Result<f64, String> {
    let user = slurm_vm_api::session::UserEntry::default();
    let spec = VmSpec::for_image("probe").map_err(|e| e.to_string())?;
    let record = Record {
        run: 0,
        generation: 0,
        plan: Some(Plan {
            vcpus: 1,
            mem_mib: PROBE_MIB,
            domain_type: "kvm".into(),
            overlay: None,
            overlay_shared: false,
            layers: vec![],
            disk_mib: None,
            seed: None,
            directories: vec![],
            network: slurm_vm_api::spec::Network::None,
            base_sha256: None,
        }),
        ..Record::new(config.cluster.clone(), config.node(), 0, user, spec)
    };
    let domain = record.domain();
    moving::make_run_dir(&*world.files, config, &domain)?;
    let dir = prepare::run_dir(config, &domain);
    let result = guest(config, &dir).and_then(|guest| boot(config, world, &record, &dir, &guest));
    let _ = world.files.remove_all(&dir);
    result
}

fn boot(config: &Config, world: &World, record: &Record, dir: &Path, guest: &Guest) -> Result<f64, String> {
    let domain = record.domain();
    let (socket, console) = (dir.join("guest.sock"), dir.join("serial.log"));
    let spec = DomainSpec {
        name: domain.clone(),
        uuid: record.uuid(),
        domain_type: DomainType::Kvm,
        machine: None,
        vcpus: 1,
        cpuset: vec![],
        mem_mib: guest.mem_mib,
        hard_limit_mib: None,
        cpu: CpuModel::Default,
        boot: Boot::Kernel {
            kernel: guest.kernel.clone(),
            initrd: guest.initrd.clone(),
            cmdline: guest.cmdline.clone(),
        },
        disks: vec![],
        channels: vec![Channel {
            name: PORT_NAME.into(),
            socket: socket.clone(),
        }],
        serial_log: console.clone(),
        directories: vec![],
        interfaces: vec![],
        metadata: prepare::metadata(record),
    };
    let limit = Duration::from_secs(config.hypervisor.probe_timeout_s.into());
    world
        .hypervisor
        .start(&spec, false)
        .map_err(|e| format!("the probe guest did not start: {e}"))?;
    // libvirt's own part may take long on a host that has just booted, and says nothing about KVM.
    let begun = world.clock.instant();
    let up = if guest.helper {
        answers(world, socket, limit)
    } else {
        boots(world, &console, limit)
    };
    if let Err(e) = world.hypervisor.destroy(&domain) {
        log::warn!("the probe guest cannot be ended: {e}");
    }
    if up {
        return Ok(world.clock.since(begun).as_secs_f64());
    }
    Err(format!(
        "/dev/kvm is there, but a probe guest did not come up within {} s",
        limit.as_secs()
    ))
}

/// Waits for the guest's helper.
fn answers(world: &World, socket: PathBuf, limit: Duration) -> bool {
    let begun = world.clock.instant();
    let Ok((link, events)) = GuestLink::start(LinkConfig::new("probe", 1), Box::new(UnixTransport::new(socket))) else {
        return false;
    };
    let up = loop {
        let left = limit.checked_sub(world.clock.since(begun));
        match left.map(|l| events.recv_timeout(l)) {
            Some(Ok(LinkEvent::Up { .. })) => break true,
            Some(Ok(_)) => {}
            _ => break false,
        }
    };
    link.stop();
    up
}

/// Waits until a kernel without a root file system has come to where it needs one.
fn boots(world: &World, console: &Path, limit: Duration) -> bool {
    let end = world.clock.instant() + limit;
    loop {
        let late = world.clock.instant() > end;
        if std::fs::read(console).is_ok_and(|text| has_booted(&text)) {
            return true;
        }
        if late {
            return false;
        }
        world.clock.sleep(Duration::from_millis(100));
    }
}

/// All of the kernel's own work is done by then: processors, memory, interrupts, timers, devices.
fn has_booted(console: &[u8]) -> bool {
    String::from_utf8_lossy(console).contains("VFS: Cannot open root device")
}

#[cfg(test)]
mod tests {
    use super::has_booted;

    #[test]
    fn a_kernel_that_hangs_half_way_has_not_booted() {
        let half = b"[    0.000000] Linux version 6.1\n[    0.91] clocksource: tsc\n";
        assert!(!has_booted(half));
        let whole = b"...\n[    1.2] VFS: Cannot open root device \"(null)\" or unknown-block(0,0): error -6\n";
        assert!(has_booted(whole));
    }
}
