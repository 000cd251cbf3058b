//! From what the user asked, what Slurm gave and what the catalogue has to a domain: the plan and its XML's inputs.
use std::path::{Path, PathBuf};

use slurm_vm_api::overhead::{guest_mib_for, qemu_overhead_mib};

use super::{directories, network};
use crate::{
    config::{Config, HelperBy, ImageConfig},
    core::{Allocation, Failure, Plan, Record, record::file_stem, registry::job_of},
    effects::{DiskError, World},
    hypervisor::{Boot, Channel, CpuModel, Disk, DiskCache, DiskFormat, DomainMetadata, DomainSpec, DomainType},
    node::Node,
    slurm::{HostCpus, SYSFS, SlurmError},
};

/// Name of the guest helper's virtio-serial port.
pub const PORT: &str = slurm_vm_api::guest::PORT_NAME;

impl From<DiskError> for Failure {
    fn from(e: DiskError) -> Self {
        match e {
            DiskError::Image { .. } => Self::Request(e.to_string()),
            DiskError::Node { .. } => Self::Node(e.to_string()),
        }
    }
}

/// Looks an image up.
///
/// # Errors
/// [`Failure::Request`] that lists the known ones.
pub fn image<'a>(config: &'a Config, name: &str) -> Result<&'a ImageConfig, Failure> {
    config.images.get(name).ok_or_else(|| {
        let known: Vec<&str> = config.images.keys().map(String::as_str).collect();
        Failure::Request(format!("unknown image `{name}`; the known ones are: {}", known.join(", ")))
    })
}

/// Where a VM's overlay is: on shared storage when there is some. Every run has its own, so that what a node removes late
/// is never another node's.
#[must_use]
pub fn overlay_path(config: &Config, vm_dir: &Path, record: &Record) -> (PathBuf, bool) {
    match &config.shared_dir {
        Some(shared) => (
            shared
                .join("overlays")
                .join(format!("{}.{}.{}.qcow2", record.file_stem(), record.node, record.run)),
            true,
        ),
        None => (vm_dir.join("overlay.qcow2"), false),
    }
}

/// Overlays on shared storage that this node has made, with their jobs.
#[must_use]
pub fn overlays_made_by(node: &Node) -> Vec<(u32, PathBuf)> {
    let Some(shared) = &node.config.shared_dir else { return vec![] };
    let dir = shared.join("overlays");
    let all = node.world.files.list(&dir);
    let all = all.inspect_err(|e| log::warn!("{}: {e}", dir.display())).unwrap_or_default();
    let mine = |path: PathBuf| {
        let name = path.file_name()?.to_str()?.to_owned();
        let job = job_of(&name)?;
        let rest = name.strip_prefix(&file_stem(&node.config.cluster, job, 0))?.strip_prefix('.')?;
        let (maker, _run) = rest.strip_suffix(".qcow2")?.rsplit_once('.')?;
        (maker == node.name).then_some((job, path))
    };
    all.into_iter().filter_map(mine).collect()
}

/// Directory of a VM's sockets.
#[must_use]
pub fn run_dir(config: &Config, domain: &str) -> PathBuf {
    config.run_dir.join("vm").join(domain)
}

/// Reads the allocation, checks the request against it, checks the image and makes the overlay.
///
/// # Errors
/// [`Failure::Request`] where trying elsewhere would not help, [`Failure::Node`] where it might.
pub fn prepare(
    world: &World,
    config: &Config,
    domain_type: DomainType,
    record: &Record,
    given: Given,
) -> Result<(Allocation, Plan), Failure> {
    let Given { allocation, workdir } = given;
    let image = image(config, &record.spec.image)?;
    let allocated_cpus = u32::try_from(allocation.cores.len()).unwrap_or(u32::MAX).max(1);
    let vcpus = record.spec.cpus.unwrap_or(allocated_cpus);
    if vcpus > allocated_cpus {
        return Err(Failure::Request(format!(
            "--vm-cpus={vcpus} is more than the {allocated_cpus} CPUs that the job has on {}; ask for them with -c",
            record.node
        )));
    }
    let mem_mib = guest_memory(record, &allocation, vcpus)?;
    if mem_mib < image.min_mem_mib {
        return Err(Failure::Request(format!(
            "{mem_mib} MiB of guest memory are too few for image {}, which needs {} MiB; ask for more with --vm-mem or --mem",
            record.spec.image, image.min_mem_mib
        )));
    }
    for file in [&image.kernel, &image.initrd].into_iter().flatten() {
        world.disks.readable(file)?;
    }
    let mut plan = Plan {
        vcpus,
        mem_mib,
        domain_type: match domain_type {
            DomainType::Kvm => "kvm".into(),
            DomainType::Qemu => "qemu".into(),
        },
        overlay: None,
        overlay_shared: false,
        layers: vec![],
        disk_mib: None,
        base_sha256: None,
        seed: match image.helper {
            HelperBy::Image => None,
            HelperBy::Seed => Some(seed(world, config)?),
        },
        directories: directories::prepare(world, config, record, workdir.as_deref())?,
        network: network::choose(config, record),
    };
    if let Some(disk) = &image.disk {
        let base = world.disks.base(disk, &image.disk_format)?;
        if let Some(wanted) = image.sha256.as_ref().filter(|w| !w.eq_ignore_ascii_case(&base.sha256)) {
            return Err(Failure::Request(format!(
                "image file {}: its SHA-256 is {}, the catalogue says {wanted}",
                disk.display(),
                base.sha256
            )));
        }
        let (overlay, shared) = overlay_path(config, &world.store.vm_dir(&record.domain()), record);
        if let Some(wanted) = record.spec.disk_mib {
            let own = base.virtual_bytes.div_ceil(1 << 20);
            if wanted < own {
                return Err(Failure::Request(format!(
                    "--vm-disk={wanted}M is smaller than the disk of image {}, which has {own} MiB; a disk only grows",
                    record.spec.image
                )));
            }
            plan.disk_mib = Some(wanted);
        }
        world.disks.make_overlay(&overlay, disk, &image.disk_format, plan.disk_mib)?;
        plan.overlay = Some(overlay);
        plan.overlay_shared = shared;
        plan.base_sha256 = Some(base.sha256);
    } else if record.spec.disk_mib.is_some() {
        return Err(Failure::Request(format!("--vm-disk: image {} has no disk", record.spec.image)));
    }
    Ok((allocation, plan))
}

/// The disk that brings this node's guest helper into an image.
///
/// # Errors
/// [`DiskError::Node`]: there is no helper on this node, or no room.
pub fn seed(world: &World, config: &Config) -> Result<PathBuf, DiskError> {
    world.disks.seed(&config.node.guest_helper, &config.state_dir.join("seeds"))
}

/// What Slurm says of a job on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    /// Its part of the node.
    pub allocation: Allocation,
    /// Its working directory: the user's word.
    pub workdir: Option<String>,
}

/// Asks Slurm for a job's part of this node.
///
/// # Errors
/// [`Failure::Node`] when Slurm does not answer or the job is not on this node, [`Failure::Request`] for a job with generic resources.
pub fn allotted(world: &World, node: &str, job: u32) -> Result<Given, Failure> {
    let info = world
        .slurm
        .job(job)
        .map_err(|e: SlurmError| Failure::Node(format!("cannot ask Slurm for the allocation of job {job}: {e}")))?
        .ok_or_else(|| Failure::Node(format!("Slurm knows no job {job}")))?;
    // Asked after the VM is on record: an epilog that came before this has found nothing to end.
    if !info.brief.state.is_on_nodes() {
        return Err(Failure::Node(format!("job {job} runs no more")));
    }
    let here = info
        .allocs
        .iter()
        .find(|a| a.node == node)
        .ok_or_else(|| Failure::Node(format!("Slurm does not show job {job} on {node}")))?;
    if !info.gres.is_empty() {
        return Err(Failure::Request(format!(
            "the job has {}, which no guest can be given yet; submit it without --gres and --gpus, or without --vm",
            info.gres.join(",")
        )));
    }
    let pinned = kernel_cpus(world, node, &here.cpus)
        .map_err(|e| Failure::Node(format!("cannot ask Slurm how many threads a core of {node} has: {e}")))?;
    let allocation = Allocation {
        cores: here.cpus.clone(),
        pinned,
        mem_mib: (here.mem_mib > 0).then_some(here.mem_mib),
        restarts: Some(info.brief.restarts),
    };
    let workdir = info.user_text.work_dir;
    Ok(Given { allocation, workdir })
}

fn guest_memory(record: &Record, allocation: &Allocation, vcpus: u32) -> Result<u64, Failure> {
    match (record.spec.mem_mib, allocation.mem_mib) {
        (Some(wanted), Some(given)) => {
            let need = wanted + qemu_overhead_mib(wanted, vcpus);
            if need > given {
                return Err(Failure::Request(format!(
                    "--vm-mem={wanted}M needs {need} MiB with QEMU's own memory, the job has {given} MiB on {}; ask for it with --mem={need}",
                    record.node
                )));
            }
            Ok(wanted)
        }
        (Some(wanted), None) => Ok(wanted),
        (None, Some(given)) => guest_mib_for(given, vcpus).ok_or_else(|| {
            Failure::Request(format!(
                "the job's {given} MiB on {} leave no memory for a guest; ask for more with --mem or --vm-mem",
                record.node
            ))
        }),
        (None, None) => Ok(1024),
    }
}

/// The domain of a record that has a plan; `None` without one.
#[must_use]
pub fn domain_spec(config: &Config, world: &World, record: &Record) -> Option<DomainSpec> {
    let plan = record.plan.as_ref()?;
    let image = config.images.get(&record.spec.image)?;
    let domain = record.domain();
    let format = |f: &str| if f == "raw" { DiskFormat::Raw } else { DiskFormat::Qcow2 };
    let boot = match &image.kernel {
        Some(kernel) => Boot::Kernel {
            kernel: kernel.clone(),
            initrd: image.initrd.clone(),
            cmdline: format!("{} slurm_vm.hostname={domain} panic=1", image.cmdline).trim().to_owned(),
        },
        None => Boot::Disk,
    };
    let mut disks = match (&plan.overlay, &image.disk) {
        (Some(overlay), Some(base)) => vec![Disk {
            path: overlay.clone(),
            format: DiskFormat::Qcow2,
            backing: vec![(base.clone(), format(&image.disk_format))],
            target: "vda".into(),
            readonly: false,
            serial: Some("slurm-vm-root".into()),
            cache: DiskCache::default(),
        }],
        _ => vec![],
    };
    disks.extend(plan.seed.as_ref().map(|seed| Disk {
        path: seed.clone(),
        format: DiskFormat::Raw,
        backing: vec![],
        target: "vdb".into(),
        readonly: true,
        serial: Some("slurm-vm-seed".into()),
        cache: DiskCache::default(),
    }));
    Some(DomainSpec {
        name: domain.clone(),
        uuid: record.uuid(),
        domain_type: if plan.domain_type == "kvm" {
            DomainType::Kvm
        } else {
            DomainType::Qemu
        },
        machine: None,
        vcpus: plan.vcpus,
        cpuset: record.allocation.as_ref().map(|a| a.pinned.clone()).unwrap_or_default(),
        mem_mib: plan.mem_mib,
        hard_limit_mib: None,
        cpu: match config.hypervisor.cpu_model.as_str() {
            "" => CpuModel::Default,
            "host-model" => CpuModel::HostModel,
            name => CpuModel::Named(name.to_owned()),
        },
        boot,
        disks,
        channels: vec![Channel {
            name: PORT.into(),
            socket: run_dir(config, &domain).join("guest.sock"),
        }],
        serial_log: world.store.vm_dir(&domain).join("serial.log"),
        directories: directories::devices(config, record),
        interfaces: network::devices(config, record),
        metadata: metadata(record),
    })
}

/// The kernel's numbers of allocated CPUs; none if some are among those that the node declares and the host does not have (the lab, cloud nodes).
fn kernel_cpus(world: &World, node: &str, allocated: &[u32]) -> Result<Vec<u32>, SlurmError> {
    let Some(host) = HostCpus::read(&*world.files, Path::new(SYSFS)) else {
        return Ok(vec![]);
    };
    let declared = world.slurm.node(node)?;
    Ok(host
        .of_slurm(allocated, declared.cores, declared.threads_per_core)
        .unwrap_or_default())
}

/// Our notes in a domain.
#[must_use]
pub fn metadata(record: &Record) -> DomainMetadata {
    DomainMetadata {
        job: record.job,
        k: record.k,
        user: record.user.name.clone(),
        uid: record.user.uid,
        spec: serde_json::to_string(&record.spec).unwrap_or_default(),
        node: record.node.clone(),
        run: record.run,
        generation: record.generation,
    }
}
