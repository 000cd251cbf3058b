//! [`Hypervisor`] on libvirt. The only part of the agent that knows libvirt.
//!
//! Connections ([`link`]): one for all short calls and the events, one for starts, [`LONG_LINKS`] for calls that last (migrate, save, restore), so that none
//! waits for another kind; each comes back by itself after libvirtd was restarted, with its events registered again. A QEMU does not notice any of that.
//!
//! Threads: one per link (`libvirt-control`, `libvirt-long-N`), one for pings, and one in the process for libvirt's event loop (`libvirt-events`).
//! Calls run in the caller's thread. A libvirtd that hangs while its connection lives blocks its caller; only [`Hypervisor::ping`] has a deadline.
//!
//! libvirt's test driver (`test:///default`, for unit tests) lacks the flags for a paused start and restore: there it is two steps.
//!
//! How it fails: a broken connection gives [`HypervisorError::Connect`]. Calls that only look are made once more on the next connection; calls that act
//! are not, because nobody knows whether the first was carried out.

mod call;
#[expect(unsafe_code, reason = "C calls these")]
mod callbacks;
mod events;
#[expect(unsafe_code, reason = "calls C")]
mod ffi;
mod link;
mod processes;
pub mod xml;

use super::{
    DomainEvent, DomainInfo, DomainMetadata, DomainSpec, DomainState, DomainType, HostInfo, Hypervisor, HypervisorError, JobProgress,
    MigrateOutcome, MigrateParams, Result, SaveFormat, SavedDomain, check_spec,
};
use call::{Answer, Failure, describe, metadata_of, must, ours, short};
use crossbeam_channel::{Receiver, Sender, bounded};
use ffi::{Connection, Domain, Param, VirError, number, sys};
use link::Link;
use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use uuid::Uuid;
use xml::Flavor;

/// How long a call waits for a connection that is being opened.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a long call waits for a place on one of the long links: other moves may have to end first.
const LONG_PATIENCE: Duration = Duration::from_secs(600);
/// Connections for calls that last: four calls each, so twelve moves, saves and restores at a time.
const LONG_LINKS: usize = 3;
/// How long the numbers of a completed migration may come after it.
const STATS_PATIENCE: Duration = Duration::from_secs(1);

type Ping = Sender<Result<()>>;

/// libvirt as the agent uses it. Made once; shared by all threads.
#[derive(Debug)]
pub struct LibvirtHypervisor {
    control: Arc<Link>,
    starts: Link,
    long: Vec<Link>,
    flavor: Flavor,
    hub: Arc<events::Hub>,
    pings: Sender<Ping>,
    hard_limit: Mutex<Option<bool>>,
}

impl LibvirtHypervisor {
    /// Makes the links to `uri` (`qemu:///system`, `test:///default`) and starts to open the first. Does not wait for it: see [`Hypervisor::ping`].
    pub fn new(uri: &str) -> Result<Self> {
        ffi::initialize();
        let hub = Arc::new(events::Hub::default());
        let (for_events, for_watch) = (Arc::clone(&hub), Arc::clone(&hub));
        let sink: callbacks::Sink = Arc::new(move |raw| for_events.raw(raw));
        let control = Arc::new(Link::new(
            "control",
            uri,
            Some(sink),
            Some(Arc::new(move |up| for_watch.connection(up))),
        )?);
        let starts = Link::new("starts", uri, None, None)?;
        let long = (0..LONG_LINKS)
            .map(|n| Link::new(&format!("long-{n}"), uri, None, None))
            .collect::<Result<Vec<_>>>()?;
        let (pings, requests) = bounded::<Ping>(0);
        let for_pings = Arc::clone(&control);
        std::thread::Builder::new()
            .name("libvirt-ping".into())
            .spawn(move || {
                for reply in requests {
                    // A caller who has given up does not hear it.
                    let _ = reply.send(short(&for_pings, "", PATIENCE, |c| Ok(c.count_domains()?)));
                }
            })
            .map_err(|e| HypervisorError::Connect {
                uri: uri.into(),
                message: format!("no thread for it: {e}"),
            })?;
        let flavor = if uri.starts_with("test:") { Flavor::Test } else { Flavor::Qemu };
        Ok(Self {
            control,
            starts,
            long,
            flavor,
            hub,
            pings,
            hard_limit: Mutex::new(None),
        })
    }

    /// A short call that changes something.
    fn act<T>(&self, name: &str, call: impl FnOnce(&Connection) -> Answer<T>) -> Result<T> {
        short(&self.control, name, PATIENCE, call)
    }

    /// A short call that only looks: made once more if the connection broke.
    fn look<T>(&self, name: &str, call: impl Fn(&Connection) -> Answer<T>) -> Result<T> {
        match self.act(name, &call) {
            Err(HypervisorError::Connect { .. }) => self.act(name, &call),
            other => other,
        }
    }

    /// A call that may last, on the long link that has the least to do.
    fn last<T>(&self, name: &str, call: impl FnOnce(&Connection) -> Answer<T>) -> Result<T> {
        let link = self.long.iter().min_by_key(|l| l.load()).unwrap_or(&self.control);
        short(link, name, LONG_PATIENCE, call)
    }

    /// libvirt reports a job that was aborted as failed, in the words of whatever broke by it: who has aborted knows better.
    fn job_failed(&self, uuid: Uuid, e: VirError) -> Failure {
        if self.hub.forget(uuid) {
            Failure::Ours(HypervisorError::Aborted {
                call: e.call,
                message: e.message,
            })
        } else {
            Failure::Vir(e)
        }
    }
}

fn text_path(path: &Path) -> Result<&str> {
    match path.to_str() {
        Some(text) if path.is_absolute() => Ok(text),
        _ => Err(HypervisorError::Invalid {
            what: format!("{} is not an absolute path in UTF-8", path.display()),
        }),
    }
}

fn version(number: u64) -> String {
    format!("{}.{}.{}", number / 1_000_000, number / 1_000 % 1_000, number % 1_000)
}

impl Hypervisor for LibvirtHypervisor {
    fn ping(&self, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        let late = |_| HypervisorError::Timeout {
            call: "ping",
            after: deadline,
        };
        let (reply, answer) = bounded(1);
        // The ping before this one may still hang: then there is nobody to take it.
        self.pings.send_deadline(reply, end).map_err(|_| late(()))?;
        answer.recv_deadline(end).map_err(|_| late(()))?
    }

    fn host(&self, domain_type: DomainType) -> Result<HostInfo> {
        let virt_type = match domain_type {
            DomainType::Kvm => "kvm",
            DomainType::Qemu => "qemu",
        };
        let hard_limit = *self.hard_limit.lock().unwrap_or_else(PoisonError::into_inner);
        self.look("", |c| {
            let (library, hypervisor) = c.versions()?;
            let (cpu_models, host_model_xml) = match (self.flavor, c.domain_capabilities(xml::DEFAULT_MACHINE, virt_type)) {
                (_, Ok(capabilities)) => xml::read_cpus(&capabilities)?,
                (Flavor::Test, Err(_)) => (Vec::new(), String::new()),
                (Flavor::Qemu, Err(e)) => return Err(e.into()),
            };
            Ok(HostInfo {
                libvirt_version: version(library),
                hypervisor_version: version(hypervisor),
                hostname: c.hostname()?,
                cpu_models,
                host_model_xml,
                sparse_save: library >= 11_002_000,
                hard_limit,
                security_model: c.security_model(),
            })
        })
    }

    fn start(&self, spec: &DomainSpec, paused: bool) -> Result<()> {
        check_spec(spec)?;
        let xml = xml::domain(spec, self.flavor);
        let domain = short(&self.starts, &spec.name, LONG_PATIENCE, |c| {
            let flag = paused && self.flavor == Flavor::Qemu;
            let domain = c.create(&xml, flag).map_err(|e| {
                // The code says only "failed". A create that failed leaves nothing, so what is there now was there before.
                let taken = matches!(c.lookup(&spec.name), Ok(Some(_))) || matches!(c.lookup_uuid(spec.uuid), Ok(Some(_)));
                if taken {
                    HypervisorError::AlreadyExists { name: spec.name.clone() }.into()
                } else {
                    Failure::Vir(e)
                }
            })?;
            if paused && !flag {
                domain.suspend()?;
            }
            Ok(domain)
        })?;
        let mut known = self.hard_limit.lock().unwrap_or_else(PoisonError::into_inner);
        if known.is_none() {
            *known = Some(domain.has_memory_cgroup());
        }
        Ok(())
    }

    fn suspend(&self, name: &str) -> Result<()> {
        self.act(name, |c| Ok(must(c, name)?.suspend()?))
    }

    fn resume(&self, name: &str) -> Result<()> {
        self.act(name, |c| {
            let domain = must(c, name)?;
            match domain.resume() {
                // libvirt refuses to resume what runs, though it lets suspend what stands still.
                Err(_) if domain.state().is_ok_and(|s| events::state_of(s) == DomainState::Running) => Ok(()),
                other => Ok(other?),
            }
        })
    }

    fn shutdown(&self, name: &str) -> Result<()> {
        self.act(name, |c| {
            let domain = must(c, name)?;
            // Only ACPI: libvirt would otherwise try an agent in the guest first, and wait for it.
            let acpi = if self.flavor == Flavor::Test {
                0
            } else {
                sys::virDomainShutdownFlagValues_VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN
            };
            Ok(domain.shutdown(acpi)?)
        })
    }

    fn destroy(&self, name: &str) -> Result<bool> {
        let answer = self.act(name, |c| match ours(c, name)? {
            None => Ok(false),
            Some((domain, _)) => Ok(domain.destroy(0).map(|()| true)?),
        });
        match answer {
            // It went away by itself between the look and the kill.
            Err(HypervisorError::NoDomain { .. } | HypervisorError::WrongState { .. }) => Ok(false),
            // A daemon that is not there starts nothing either; what it may have been asked to start is looked for when it is back.
            Err(HypervisorError::Connect { .. }) if self.flavor == Flavor::Qemu && processes::surely_none(name) => Ok(false),
            other => other,
        }
    }

    fn list(&self) -> Result<Vec<DomainInfo>> {
        self.look("", |c| {
            let mut list = Vec::new();
            for domain in c.domains()? {
                if let Some(metadata) = metadata_of(&domain)? {
                    list.extend(describe(&domain, metadata)?);
                }
            }
            Ok(list)
        })
    }

    fn info(&self, name: &str) -> Result<Option<DomainInfo>> {
        self.look(name, |c| match ours(c, name)? {
            None => Ok(None),
            Some((domain, metadata)) => describe(&domain, metadata),
        })
    }

    fn pin(&self, name: &str, cpuset: &[u32]) -> Result<()> {
        if cpuset.is_empty() {
            return Ok(());
        }
        self.act(name, |c| {
            let domain = must(c, name)?;
            for (vcpu, cpu) in (0..domain.vcpus()?).zip(cpuset.iter().cycle()) {
                domain.pin_vcpu(vcpu, *cpu)?;
            }
            Ok(domain.pin_emulator(cpuset)?)
        })
    }

    fn set_metadata(&self, name: &str, metadata: &DomainMetadata) -> Result<()> {
        let element = xml::metadata_to_set(metadata);
        self.act(name, |c| Ok(must(c, name)?.set_metadata(&element, xml::PREFIX, xml::NAMESPACE)?))
    }

    fn migrate(&self, name: &str, params: &MigrateParams) -> Result<MigrateOutcome> {
        if let Some(downtime) = params.max_downtime_ms {
            // libvirt takes it before the start too: from 3.9 it is kept for the next migration.
            self.migrate_tune(name, Some(downtime), None)?;
        }
        let begin = Instant::now();
        let uuid = self.last(name, |c| {
            let domain = must(c, name)?;
            let Some((_, uuid)) = domain.identity() else {
                return Err(HypervisorError::NoDomain { name: name.into() }.into());
            };
            let (list, flags) = migrate_arguments(params)?;
            self.hub.expect(uuid);
            domain
                .migrate(&params.libvirt_uri, &list, flags)
                .map_err(|e| self.job_failed(uuid, e))?;
            Ok(uuid)
        })?;
        let wall_ms = millis(begin.elapsed());
        let stats = self.hub.completed(uuid, STATS_PATIENCE).unwrap_or_default();
        Ok(MigrateOutcome {
            wall_ms,
            total_ms: number(&stats, sys::VIR_DOMAIN_JOB_TIME_ELAPSED),
            downtime_ms: number(&stats, sys::VIR_DOMAIN_JOB_DOWNTIME),
            memory_bytes: number(&stats, sys::VIR_DOMAIN_JOB_MEMORY_PROCESSED),
            disk_bytes: number(&stats, sys::VIR_DOMAIN_JOB_DISK_PROCESSED),
            iterations: small(number(&stats, sys::VIR_DOMAIN_JOB_MEMORY_ITERATION)),
        })
    }

    fn job_progress(&self, name: &str) -> Result<Option<JobProgress>> {
        self.look(name, |c| {
            let gone = [sys::virErrorNumber_VIR_ERR_NO_DOMAIN, sys::virErrorNumber_VIR_ERR_OPERATION_INVALID];
            let Some((domain, _)) = ours(c, name)? else { return Ok(None) };
            let (kind, stats) = match domain.job_stats() {
                Ok(told) => told,
                // The domain has left between the look and the question.
                Err(e) if gone.iter().any(|n| e.is(*n)) => return Ok(None),
                Err(e) => return Err(e.into()),
            };
            let runs = [
                sys::virDomainJobType_VIR_DOMAIN_JOB_BOUNDED,
                sys::virDomainJobType_VIR_DOMAIN_JOB_UNBOUNDED,
            ];
            if !runs.iter().any(|r| i64::from(*r) == i64::from(kind)) {
                return Ok(None);
            }
            let n = |name: &[u8]| number(&stats, name);
            let (memory_done, memory_left) = (n(sys::VIR_DOMAIN_JOB_MEMORY_PROCESSED), n(sys::VIR_DOMAIN_JOB_MEMORY_REMAINING));
            let (disk_bytes_done, disk_bytes_left) = (n(sys::VIR_DOMAIN_JOB_DISK_PROCESSED), n(sys::VIR_DOMAIN_JOB_DISK_REMAINING));
            Ok(Some(JobProgress {
                elapsed_ms: n(sys::VIR_DOMAIN_JOB_TIME_ELAPSED),
                bytes_done: memory_done + disk_bytes_done,
                bytes_left: memory_left + disk_bytes_left,
                memory_total_bytes: n(sys::VIR_DOMAIN_JOB_MEMORY_TOTAL),
                bandwidth_bytes_s: n(sys::VIR_DOMAIN_JOB_MEMORY_BPS),
                dirty_rate_bytes_s: n(sys::VIR_DOMAIN_JOB_MEMORY_DIRTY_RATE)
                    .saturating_mul(n(sys::VIR_DOMAIN_JOB_MEMORY_PAGE_SIZE).max(4096)),
                iteration: small(n(sys::VIR_DOMAIN_JOB_MEMORY_ITERATION)),
                disk_bytes_done,
                disk_bytes_left,
                throttle_percent: small(n(sys::VIR_DOMAIN_JOB_AUTO_CONVERGE_THROTTLE)),
            }))
        })
    }

    fn migrate_tune(&self, name: &str, max_downtime_ms: Option<u64>, bandwidth_mib_s: Option<u64>) -> Result<()> {
        self.act(name, |c| {
            let domain = must(c, name)?;
            if let Some(ms) = max_downtime_ms {
                domain.set_max_downtime(ms, 0)?;
            }
            if let Some(speed) = bandwidth_mib_s {
                domain.set_max_speed(speed, 0)?;
            }
            Ok(())
        })
    }

    fn abort_job(&self, name: &str) -> Result<()> {
        self.act(name, |c| {
            let domain = must(c, name)?;
            let uuid = domain.identity().map(|(_, uuid)| uuid);
            // Before the act: the job's own call may return before this one.
            if let Some(uuid) = uuid {
                self.hub.abort(uuid);
            }
            Ok(domain.abort_job()?)
        })
    }

    fn save(&self, name: &str, path: &Path, format: SaveFormat) -> Result<SaveFormat> {
        let path = text_path(path)?;
        let sparse = format == SaveFormat::Sparse && self.flavor == Flavor::Qemu;
        self.last(name, |c| {
            let domain = must(c, name)?;
            let Some((_, uuid)) = domain.identity() else {
                return Err(HypervisorError::NoDomain { name: name.into() }.into());
            };
            self.hub.expect(uuid);
            let file = (sys::VIR_DOMAIN_SAVE_PARAM_FILE.as_slice(), Param::Text(path));
            if sparse && c.versions()?.0 >= 11_002_000 {
                match domain.save(&[file, (SAVE_FORMAT, Param::Text("sparse"))], 0) {
                    Ok(()) => {
                        self.hub.forget(uuid);
                        return Ok(SaveFormat::Sparse);
                    }
                    Err(e)
                        if e.is(sys::virErrorNumber_VIR_ERR_OPERATION_UNSUPPORTED)
                            || e.is(sys::virErrorNumber_VIR_ERR_CONFIG_UNSUPPORTED) =>
                    {
                        log::info!("{name}: this QEMU cannot save in the sparse format: {}", e.message);
                    }
                    Err(e) => return Err(self.job_failed(uuid, e)),
                }
            }
            // The test driver has the older call only.
            let saved = if self.flavor == Flavor::Test {
                domain.save_simply(path)
            } else {
                domain.save(&[file], 0)
            };
            saved.map_err(|e| self.job_failed(uuid, e))?;
            self.hub.forget(uuid);
            Ok(SaveFormat::Raw)
        })
    }

    fn saved(&self, path: &Path) -> Result<SavedDomain> {
        let path = text_path(path)?;
        let xml = self.look(path, |c| Ok(c.saved_xml(path)?))?;
        let (name, uuid) = xml::read_identity(&xml)?;
        let metadata = xml::read_metadata(&xml)?.ok_or_else(|| HypervisorError::NoDomain { name: name.clone() })?;
        Ok(SavedDomain { name, uuid, metadata, xml })
    }

    fn restore(&self, path: &Path, new_xml: Option<&str>, paused: bool) -> Result<()> {
        let saved = self.saved(path)?;
        if let Some(new_xml) = new_xml
            && xml::read_metadata(new_xml)?.is_none()
        {
            return Err(HypervisorError::Invalid {
                what: format!("new XML for {} without our metadata", saved.name),
            });
        }
        let path = text_path(path)?;
        self.last(&saved.name, |c| {
            if c.lookup_uuid(saved.uuid)?.is_some() || c.lookup(&saved.name)?.is_some() {
                return Err(HypervisorError::AlreadyExists { name: saved.name.clone() }.into());
            }
            if self.flavor == Flavor::Test {
                c.restore(path, new_xml, None)?;
                return if paused { Ok(must(c, &saved.name)?.suspend()?) } else { Ok(()) };
            }
            Ok(c.restore(path, new_xml, Some(paused))?)
        })
    }

    fn live_xml(&self, name: &str) -> Result<String> {
        self.look(name, |c| {
            Ok(must(c, name)?.xml(sys::virDomainXMLFlags_VIR_DOMAIN_XML_SECURE | sys::virDomainXMLFlags_VIR_DOMAIN_XML_MIGRATABLE)?)
        })
    }

    fn dirty_rate_start(&self, name: &str, seconds: u32) -> Result<()> {
        let seconds = i32::try_from(seconds.clamp(1, 60)).unwrap_or(1);
        self.act(name, |c| {
            let domain = must(c, name)?;
            let (measuring, _) = dirty_rate(&domain)?;
            if !measuring {
                domain.start_dirty_rate(seconds, sys::virDomainDirtyRateCalcFlags_VIR_DOMAIN_DIRTYRATE_MODE_PAGE_SAMPLING)?;
            }
            Ok(())
        })
    }

    fn dirty_rate(&self, name: &str) -> Result<Option<u64>> {
        self.look(name, |c| Ok(dirty_rate(&must(c, name)?)?.1))
    }

    fn memory_in_use(&self, name: &str) -> Result<u64> {
        let resident = self.look(name, |c| Ok(must(c, name)?.resident_kib()?))?;
        let unsupported = || HypervisorError::Unsupported {
            call: "virDomainMemoryStats",
            message: "no resident set size".into(),
        };
        resident.map(|kib| kib * 1024).ok_or_else(unsupported)
    }

    fn xml_for(&self, spec: &DomainSpec) -> Result<String> {
        check_spec(spec)?;
        Ok(xml::domain(spec, self.flavor))
    }

    fn events(&self) -> Receiver<DomainEvent> {
        self.hub.subscribe()
    }
}

/// `VIR_DOMAIN_SAVE_PARAM_IMAGE_FORMAT`, by its text: headers before libvirt 11.2 lack it.
const SAVE_FORMAT: &[u8] = b"image_format\0";

fn millis(d: Duration) -> u64 {
    u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
}

fn small(n: u64) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

/// Whether a measurement runs, and the last one's result in bytes a second.
fn dirty_rate(domain: &Domain) -> std::result::Result<(bool, Option<u64>), VirError> {
    let stats = domain.stats(sys::virDomainStatsTypes_VIR_DOMAIN_STATS_DIRTYRATE)?;
    let status = number(&stats, b"dirtyrate.calc_status");
    let measuring = status == u64::from(sys::virDomainDirtyRateStatus_VIR_DOMAIN_DIRTYRATE_MEASURING);
    let measured = status == u64::from(sys::virDomainDirtyRateStatus_VIR_DOMAIN_DIRTYRATE_MEASURED);
    Ok((measuring, measured.then(|| number(&stats, b"dirtyrate.megabytes_per_second") << 20)))
}

type Arguments<'a> = (Vec<(&'static [u8], Param<'a>)>, u32);

fn migrate_arguments(params: &MigrateParams) -> Result<Arguments<'_>> {
    let mut flags = sys::virDomainMigrateFlags_VIR_MIGRATE_LIVE
        | sys::virDomainMigrateFlags_VIR_MIGRATE_PEER2PEER
        | sys::virDomainMigrateFlags_VIR_MIGRATE_ABORT_ON_ERROR;
    let mut list: Vec<(&'static [u8], Param<'_>)> = vec![(sys::VIR_MIGRATE_PARAM_URI, Param::Text(&params.migrate_uri))];
    if params.auto_converge {
        flags |= sys::virDomainMigrateFlags_VIR_MIGRATE_AUTO_CONVERGE;
    }
    if params.paused {
        flags |= sys::virDomainMigrateFlags_VIR_MIGRATE_PAUSED;
    }
    if params.copy_disks.is_empty() {
        // Our configuration says that the storage is shared, and disks are opened without the host's cache. libvirt would guess from the kind of
        // file system: the kinds it knows are few, and older releases have no setting that adds to them.
        flags |= sys::virDomainMigrateFlags_VIR_MIGRATE_UNSAFE;
    } else {
        flags |= sys::virDomainMigrateFlags_VIR_MIGRATE_NON_SHARED_INC;
        // The name comes once per disk.
        list.extend(
            params
                .copy_disks
                .iter()
                .map(|d| (sys::VIR_MIGRATE_PARAM_MIGRATE_DISKS.as_slice(), Param::Text(d))),
        );
    }
    if let Some(uri) = &params.disks_uri {
        list.push((sys::VIR_MIGRATE_PARAM_DISKS_URI, Param::Text(uri)));
    }
    if let Some(xml) = &params.dest_xml {
        if xml::read_metadata(xml)?.is_none() {
            return Err(HypervisorError::Invalid {
                what: "destination XML without our metadata".into(),
            });
        }
        list.push((sys::VIR_MIGRATE_PARAM_DEST_XML, Param::Text(xml)));
    }
    if let Some(speed) = params.bandwidth_mib_s {
        list.push((sys::VIR_MIGRATE_PARAM_BANDWIDTH, Param::Number(speed)));
    }
    if let Some(n) = params.parallel_connections.filter(|n| *n > 1) {
        flags |= sys::virDomainMigrateFlags_VIR_MIGRATE_PARALLEL;
        list.push((
            sys::VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS,
            Param::Int(i32::try_from(n).unwrap_or(i32::MAX)),
        ));
    }
    Ok((list, flags))
}

/// The uuid that a VM has on every node: version 5 of cluster, job and number.
#[must_use]
pub fn domain_uuid(cluster: &str, job: u32, k: u32) -> Uuid {
    Uuid::new_v5(&Uuid::NAMESPACE_URL, format!("{}/{cluster}/{job}/{k}", xml::NAMESPACE).as_bytes())
}

#[cfg(test)]
mod tests;
