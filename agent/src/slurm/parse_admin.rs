//! Reads what `scontrol show node|reservation|partition|config` prints. These hold administrators' texts only, and the free ones come last or are cut off first.

use super::SlurmError;
use super::hostlist::expand_hosts;
use super::parse::{hosts, seconds, some, time};
use super::types::{NodeInfo, PartitionInfo, ReservationInfo, SlurmConfig};

/// One record, `Key=value` words; a value ends at the next blank.
struct Record<'a> {
    line: &'a str,
    words: Vec<(&'a str, &'a str)>,
}

impl<'a> Record<'a> {
    /// `free` names the fields that hold free text: everything from the first of them on is left out.
    fn new(line: &'a str, free: &[&str]) -> Self {
        let end = free.iter().filter_map(|f| line.find(f)).min().unwrap_or(line.len());
        let words = line[..end].split_whitespace().filter_map(|w| w.split_once('=')).collect();
        Self { line, words }
    }

    fn get(&self, key: &'static str) -> Result<&'a str, SlurmError> {
        self.maybe(key).ok_or_else(|| SlurmError::parse(key, self.line))
    }

    fn maybe(&self, key: &str) -> Option<&'a str> {
        self.words.iter().find(|(k, _)| *k == key).map(|(_, v)| *v)
    }

    fn number<T: std::str::FromStr>(&self, key: &'static str) -> Result<T, SlurmError> {
        self.get(key)?.parse().map_err(|_| SlurmError::parse(key, self.line))
    }

    fn list(&self, key: &'static str) -> Result<Vec<String>, SlurmError> {
        Ok(some(self.get(key)?).map_or_else(Vec::new, |t| t.split(',').map(str::to_owned).collect()))
    }
}

fn lines<'a>(text: &'a str, begin: &'static str) -> impl Iterator<Item = &'a str> {
    text.lines().filter(move |l| l.starts_with(begin))
}

/// `scontrol show node -o`.
pub(super) fn nodes(text: &str) -> Result<Vec<NodeInfo>, SlurmError> {
    lines(text, "NodeName=").map(node).collect()
}

fn node(line: &str) -> Result<NodeInfo, SlurmError> {
    let record = Record::new(line, &[" Reason=", " Comment=", " Extra="]);
    let reason = line.find(" Reason=").map(|at| line[at + " Reason=".len()..].trim().to_owned());
    Ok(NodeInfo {
        name: record.get("NodeName")?.to_owned(),
        state: node_state(record.get("State")?),
        reason,
        available_features: record.list("AvailableFeatures")?,
        active_features: record.list("ActiveFeatures")?,
        cpus_alloc: record.number("CPUAlloc")?,
        // Without the CPUs set aside for the system (CoreSpecCount); older than 22.05 would not have it.
        cpus_total: if record.maybe("CPUEfctv").is_some() {
            record.number("CPUEfctv")?
        } else {
            record.number("CPUTot")?
        },
        cores: record.number::<u32>("Sockets")?.saturating_mul(record.number("CoresPerSocket")?),
        threads_per_core: record.number("ThreadsPerCore")?,
        mem_alloc_mib: record.number("AllocMem")?,
        mem_total_mib: record.number("RealMemory")?,
        partitions: record
            .maybe("Partitions")
            .and_then(some)
            .map_or_else(Vec::new, |t| t.split(',').map(str::to_owned).collect()),
        address: record.maybe("NodeAddr").unwrap_or_default().to_owned(),
    })
}

/// `IDLE+DRAIN`, `DOWN*+DRAIN`: one character behind a state is a flag, see sinfo(1).
fn node_state(text: &str) -> Vec<String> {
    let mut flags = Vec::new();
    for part in text.split('+') {
        let name = part.trim_end_matches(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        if !name.is_empty() {
            flags.push(name.to_owned());
        }
        for mark in part[name.len()..].chars() {
            let flag = match mark {
                '*' => "NOT_RESPONDING",
                '~' => "POWERED_DOWN",
                '#' => "POWERING_UP",
                '!' => "POWER_DOWN",
                '%' => "POWERING_DOWN",
                '$' => "MAINTENANCE",
                '@' => "REBOOT_REQUESTED",
                '^' => "REBOOT_ISSUED",
                '-' => "PLANNED",
                _ => continue,
            };
            flags.push(flag.to_owned());
        }
    }
    flags
}

/// `scontrol show reservation -o [NAME]`; a sentence instead of records means "none".
pub(super) fn reservations(text: &str) -> Result<Vec<ReservationInfo>, SlurmError> {
    let mut out = Vec::new();
    for line in lines(text, "ReservationName=") {
        let record = Record::new(line, &[" Comment="]);
        out.push(ReservationInfo {
            name: record.get("ReservationName")?.to_owned(),
            nodes: hosts(record.get("Nodes")?)?,
            users: record.list("Users")?,
            partition: some(record.get("PartitionName")?),
            features: some(record.get("Features")?),
            flags: record.list("Flags")?,
            start_time: time(record.get("StartTime")?).ok_or_else(|| SlurmError::parse("StartTime", line))?,
            end_time: time(record.get("EndTime")?).ok_or_else(|| SlurmError::parse("EndTime", line))?,
            active: record.get("State")? == "ACTIVE",
        });
    }
    Ok(out)
}

/// `scontrol show partition -o`.
pub(super) fn partitions(text: &str) -> Result<Vec<PartitionInfo>, SlurmError> {
    let mut out = Vec::new();
    for line in lines(text, "PartitionName=") {
        let record = Record::new(line, &[]);
        out.push(PartitionInfo {
            name: record.get("PartitionName")?.to_owned(),
            preempt_mode: record.get("PreemptMode")?.to_owned(),
            grace_s: record.number("GraceTime")?,
            priority_tier: record.number("PriorityTier")?,
            nodes: some(record.get("Nodes")?).map_or_else(|| Ok(Vec::new()), |t| expand_hosts(&t))?,
            up: record.get("State")? == "UP",
            is_default: record.get("Default")? == "YES",
        });
    }
    Ok(out)
}

/// `scontrol show config`: `Key  = value` lines.
/// The codes of `1-3,7`. Slurm takes nothing but those, so what is not one names no code.
fn exit_codes(list: &str) -> Vec<i32> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.trim().parse().ok()?..=last.trim().parse().ok()?)
    };
    list.split(',').filter_map(range).flatten().collect()
}

pub(super) fn config(text: &str) -> Result<SlurmConfig, SlurmError> {
    let maybe = |key: &str| {
        text.lines()
            .filter_map(|l| l.split_once('='))
            .find(|(k, _)| k.trim() == key)
            .map(|(_, v)| v.trim())
    };
    let get = |key: &'static str| maybe(key).ok_or_else(|| SlurmError::parse(key, "no such line"));
    let user = get("SlurmUser")?;
    let (slurm_user, uid) = user
        .strip_suffix(')')
        .and_then(|u| u.rsplit_once('('))
        .ok_or_else(|| SlurmError::parse("SlurmUser", user))?;
    let kill_wait = get("KillWait")?;
    let exempt = maybe("PreemptExemptTime").unwrap_or("00:00:00");
    Ok(SlurmConfig {
        version: get("SLURM_VERSION")?.to_owned(),
        cluster: get("ClusterName")?.to_owned(),
        slurm_user: slurm_user.to_owned(),
        slurm_uid: uid.parse().map_err(|_| SlurmError::parse("SlurmUser", user))?,
        preempt_mode: get("PreemptMode")?.to_owned(),
        priority_type: maybe("PriorityType").and_then(some).unwrap_or_else(|| "priority/basic".to_owned()),
        preempt_type: maybe("PreemptType").and_then(some).unwrap_or_else(|| "preempt/none".to_owned()),
        preempt_exempt_s: if some(exempt).is_none() || exempt == "INFINITE" || exempt == "UNLIMITED" {
            0
        } else {
            seconds(exempt).ok_or_else(|| SlurmError::parse("PreemptExemptTime", exempt))?
        },
        job_requeue: get("JobRequeue")? == "1",
        prolog_flags: maybe("PrologFlags")
            .and_then(some)
            .map_or_else(Vec::new, |t| t.split(',').map(str::to_owned).collect()),
        requeue_exit: ["RequeueExit", "RequeueExitHold"]
            .into_iter()
            .filter_map(|key| maybe(key).and_then(some))
            .flat_map(|list| exit_codes(&list))
            .collect(),
        kill_wait_s: kill_wait
            .trim_end_matches(" sec")
            .parse()
            .map_err(|_| SlurmError::parse("KillWait", kill_wait))?,
        auth_info: maybe("AuthInfo").and_then(some),
        multiple_slurmd: maybe("MULTIPLE_SLURMD").is_some_and(|v| v.eq_ignore_ascii_case("yes")),
    })
}
