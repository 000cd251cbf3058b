//! Reads what `squeue` and `scontrol show job` print.

use std::collections::{HashMap, HashSet};

use super::SlurmError;
use super::hostlist::{expand_hosts, expand_numbers};
use super::types::{JobBrief, JobId, JobInfo, JobState, NodeAlloc, UserText};

/// The fields asked of `squeue`, in this order. None of them is a text that a user can choose freely, and the delimiters are control characters, so that a `|` in a
/// constraint or a line break in a plugin's reason moves nothing.
/// `:` and the delimiter behind a name mean "no padding, no cutting": a width such as `:20` would cut long values without a word.
const FIELDS: [&str; 28] = [
    "JobID",
    "ArrayJobID",
    "ArrayTaskID",
    "HetJobID",
    "HetJobOffset",
    "UserID",
    "GroupID",
    "UserName",
    "GroupName",
    "State",
    "PreemptTime",
    "StartTime",
    "EndTime",
    "TimeLimit",
    "PriorityLong",
    "Requeue",
    "RestartCnt",
    "BatchFlag",
    "exit_code",
    "NumNodes",
    "NumCPUs",
    "BatchHost",
    "NodeList",
    "Partition",
    "Reservation",
    "ReqNodes",
    "Reason",
    "Feature",
];

/// Between fields, and at the end of a record (before its line break).
const UNIT: char = '\x1f';
const RECORD: char = '\x1e';

/// The argument of `squeue --Format` for the poll.
pub(super) fn squeue_format() -> String {
    format_of(&FIELDS)
}

/// The argument of `squeue --Format` for these fields.
pub(super) fn format_of(fields: &[&str]) -> String {
    let last = fields.len() - 1;
    fields
        .iter()
        .enumerate()
        .map(|(i, f)| format!("{f}:{}", if i == last { RECORD } else { UNIT }))
        .collect::<Vec<_>>()
        .join(",")
}

/// What `squeue` printed, by records and their values.
pub(super) fn records_of(text: &str) -> Result<Vec<(&str, Vec<&str>)>, SlurmError> {
    if text.is_empty() {
        return Ok(Vec::new());
    }
    let records = text
        .strip_suffix("\x1e\n")
        .ok_or_else(|| SlurmError::parse("end of squeue's records", text))?;
    Ok(records.split("\x1e\n").map(|line| (line, line.split(UNIT).collect())).collect())
}

/// Reads `squeue`'s records into jobs without allocations and texts.
pub(super) fn squeue(text: &str) -> Result<Vec<JobInfo>, SlurmError> {
    records_of(text)?
        .into_iter()
        .map(|(line, values)| squeue_line(line, &values))
        .collect()
}

fn squeue_line(line: &str, values: &[&str]) -> Result<JobInfo, SlurmError> {
    let bad = |field: &'static str| SlurmError::parse(field, line);
    let [
        id,
        array_job,
        array_task,
        het_job,
        het_offset,
        uid,
        gid,
        user,
        group,
        state,
        preempt,
        start,
        end,
        limit,
        priority,
        requeue,
        restarts,
        batch,
        exit,
        num_nodes,
        num_cpus,
        batch_host,
        nodes,
        partition,
        reservation,
        req_nodes,
        reason,
        feature,
    ] = *values
    else {
        return Err(bad("squeue line"));
    };
    let batch = flag(batch).ok_or_else(|| bad("BatchFlag"))?;
    let array = if array_task == "N/A" || array_task.is_empty() {
        None
    } else {
        Some((array_job.parse().map_err(|_| bad("ArrayJobID"))?, array_task.to_owned()))
    };
    let het = match (some(het_job), some(het_offset)) {
        (Some(job), Some(offset)) if job != "0" => Some((
            job.parse().map_err(|_| bad("HetJobID"))?,
            offset.parse().map_err(|_| bad("HetJobOffset"))?,
        )),
        _ => None,
    };
    let brief = JobBrief {
        id: id.parse().map_err(|_| bad("JobID"))?,
        uid: uid.parse().map_err(|_| bad("UserID"))?,
        user: user.to_owned(),
        state: JobState::read(state),
        preempt_time: time(preempt).ok_or_else(|| bad("PreemptTime"))?,
        start_time: time(start).ok_or_else(|| bad("StartTime"))?,
        end_time: time(end).ok_or_else(|| bad("EndTime"))?,
        priority: priority.parse().map_err(|_| bad("Priority"))?,
        restarts: restarts.parse().map_err(|_| bad("RestartCnt"))?,
        batch,
        nodes: hosts(nodes)?,
        batch_host: some(batch_host).filter(|_| batch),
        partition: partition.to_owned(),
        reservation: some(reservation),
        reason: reason.to_owned(),
        features: some(feature),
        array,
        het,
        requeue: flag(requeue).ok_or_else(|| bad("Requeue"))?,
        time_limit_min: minutes(limit).ok_or_else(|| bad("TimeLimit"))?,
        req_nodes: hosts(req_nodes)?,
    };
    Ok(JobInfo {
        brief,
        gid: gid.parse().map_err(|_| bad("GroupID"))?,
        group: group.to_owned(),
        exit: exit_code(exit).ok_or_else(|| bad("exit_code"))?,
        num_nodes: number(num_nodes).ok_or_else(|| bad("NumNodes"))?,
        num_cpus: number(num_cpus).ok_or_else(|| bad("NumCPUs"))?,
        exclude_nodes: Vec::new(),
        nice: None,
        allocs: Vec::new(),
        user_text: UserText::default(),
        gres: Vec::new(),
    })
}

/// How `scontrol show job` must be asked so that it prints this one record: the plain number of an array's or a heterogeneous job's first part prints all parts.
pub(super) fn exact_name(job: &JobInfo) -> String {
    match (&job.brief.array, job.brief.het) {
        (Some((array, task)), _) if task.bytes().all(|b| b.is_ascii_digit()) => format!("{array}_{task}"),
        (_, Some((leader, offset))) => format!("{leader}+{offset}"),
        _ => job.brief.id.to_string(),
    }
}

fn nice(record: &str) -> Option<i64> {
    record
        .split(' ')
        .find_map(|word| word.strip_prefix("Nice="))
        .and_then(|n| n.parse().ok())
}

/// Several jobs out of what `squeue` and `scontrol show job -d -o` print of many. One that a text may have been forged for, or that is not
/// told for sure, is left out.
pub(super) fn several(text: &str, details: &str, ids: &[JobId]) -> Result<Vec<JobInfo>, SlurmError> {
    let wanted: HashSet<JobId> = ids.iter().copied().collect();
    let mut records: HashMap<&str, Vec<&str>> = HashMap::new();
    for record in split_records(details) {
        if let Some(id) = record.strip_prefix("JobId=").and_then(|r| r.split(' ').next()) {
            records.entry(id).or_default().push(record);
        }
    }
    let mut jobs: HashMap<JobId, Vec<JobInfo>> = HashMap::new();
    for job in squeue(text)?.into_iter().filter(|j| wanted.contains(&j.brief.id)) {
        jobs.entry(job.brief.id).or_default().push(job);
    }
    let one = |(id, mut found): (JobId, Vec<JobInfo>)| {
        let job = found.pop().filter(|_| found.is_empty())?;
        let [record] = records.get(id.to_string().as_str())?[..] else {
            return None;
        };
        with_details(job, record).ok()
    };
    Ok(jobs.into_iter().filter_map(one).collect())
}

/// The job as squeue has it, completed by [`add_details`].
pub(super) fn with_details(mut job: JobInfo, text: &str) -> Result<JobInfo, SlurmError> {
    if job.brief.state.is_on_nodes() {
        add_details(&mut job, text)?;
    } else {
        // It holds no CPUs (any more), and records of ended runs are not always complete: the texts are all there is to take.
        let nodes = std::mem::take(&mut job.brief.nodes);
        add_details(&mut job, text)?;
        job.brief.nodes = nodes;
    }
    Ok(job)
}

/// Adds from `scontrol show job -d -o` what squeue does not have: the CPUs and memory on each node, and the free texts.
///
/// Every node that squeue named must appear in exactly one `Nodes=… CPU_IDs=… Mem=…` group and no other node in any: a user can add groups by a clever job name, but
/// cannot take the true ones away, so a forgery is always a duplicate.
pub(super) fn add_details(job: &mut JobInfo, text: &str) -> Result<(), SlurmError> {
    let ours = format!("JobId={} ", job.brief.id);
    let mut records: Vec<&str> = split_records(text);
    if job.brief.nodes.is_empty() {
        // Of a waiting array all parts may be printed; only texts are taken then.
        records.retain(|r| r.starts_with(&ours));
        if let [record] = records[..] {
            job.user_text = user_text(record);
            job.exclude_nodes = excluded(record)?;
            job.nice = nice(record);
        }
        return Ok(());
    }
    let [record] = records[..] else {
        return Err(SlurmError::parse("one record of the job", text));
    };
    if !record.starts_with(&ours) {
        return Err(SlurmError::parse("JobId", record));
    }
    let mut found = allocations(record)?;
    let mut allocs = Vec::with_capacity(job.brief.nodes.len());
    for node in &job.brief.nodes {
        let at = found
            .iter()
            .position(|a| &a.node == node)
            .ok_or_else(|| SlurmError::parse("CPU_IDs of each node", record))?;
        allocs.push(found.swap_remove(at));
    }
    if !found.is_empty() {
        return Err(SlurmError::parse("CPU_IDs (a node is listed twice)", record));
    }
    job.allocs = allocs;
    job.user_text = user_text(record);
    job.exclude_nodes = excluded(record)?;
    job.nice = nice(record);
    job.gres = gres(record);
    Ok(())
}

/// From the lines of the nodes: `GRES=gpu:1(IDX:0)`, empty without. (The job's TRES have them only where accounting follows them.) A user can add
/// some by a clever job name, to the job's own harm only.
fn gres(record: &str) -> Vec<String> {
    let mut gres: Vec<String> = record
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("GRES="))
        .filter(|list| !list.is_empty() && *list != "(null)")
        .map(str::to_owned)
        .collect();
    gres.dedup();
    gres
}

/// Records begin with `JobId=` at the start of a line; other line breaks come from user texts.
fn split_records(text: &str) -> Vec<&str> {
    let mut starts: Vec<usize> = text
        .match_indices("JobId=")
        .map(|(at, _)| at)
        .filter(|&at| at == 0 || text.as_bytes()[at - 1] == b'\n')
        .collect();
    starts.push(text.len());
    starts.windows(2).map(|w| text[w[0]..w[1]].trim_end()).collect()
}

fn allocations(record: &str) -> Result<Vec<NodeAlloc>, SlurmError> {
    let bad = |field: &'static str| SlurmError::parse(field, record);
    let mut out = Vec::new();
    let mut words = record.split_whitespace().peekable();
    while let Some(word) = words.next() {
        let Some(nodes) = word.strip_prefix("Nodes=") else { continue };
        let Some(cpus) = words.next_if(|w| w.starts_with("CPU_IDs=")) else {
            continue;
        };
        let mem = words.next().and_then(|w| w.strip_prefix("Mem=")).ok_or_else(|| bad("Mem"))?;
        let cpus = expand_numbers(&cpus["CPU_IDs=".len()..])?;
        let mem_mib = mem.parse().map_err(|_| bad("Mem"))?;
        for node in expand_hosts(nodes)? {
            out.push(NodeAlloc {
                node,
                cpus: cpus.clone(),
                mem_mib,
            });
        }
    }
    Ok(out)
}

/// The record ends with `WorkDir=… [Comment=…] StdErr=… StdIn=… StdOut=… [Power=]`.
/// squeue has no column for it that all releases know.
fn excluded(record: &str) -> Result<Vec<String>, SlurmError> {
    let mut words = record.split_whitespace().skip_while(|w| !w.starts_with("ReqNodeList=")).skip(1);
    let list = words
        .next()
        .and_then(|w| w.strip_prefix("ExcNodeList="))
        .ok_or_else(|| SlurmError::parse("ExcNodeList", record))?;
    hosts(list)
}

fn user_text(record: &str) -> UserText {
    let between = |from: &str, to: &[&str]| -> Option<String> {
        let at = record.rfind(from)? + from.len();
        let rest = &record[at..];
        let end = to.iter().filter_map(|t| rest.find(t)).min().unwrap_or(rest.len());
        Some(rest[..end].trim_end().to_owned()).filter(|s| !s.is_empty() && s != "(null)")
    };
    UserText {
        comment: between(" Comment=", &[" StdErr="]),
        // A job without a script has no streams after it.
        work_dir: between(
            " WorkDir=",
            &[
                " Comment=",
                " AdminComment=",
                " SystemComment=",
                " StdErr=",
                " Power=",
                " TresPer",
                " TRESPer",
                " MailUser=",
                " CpusPerTres=",
                " MemPerTres=",
                " NtasksPerTRES:",
            ],
        ),
        std_out: between(" StdOut=", &[" Power=", " TresPerNode=", " MailUser="]),
        std_err: between(" StdErr=", &[" StdIn="]),
    }
}

/// Empty, `(null)`, `N/A` and `n/a` are Slurm's ways to say "nothing".
pub(super) fn some(text: &str) -> Option<String> {
    (!matches!(text, "" | "(null)" | "N/A" | "n/a" | "None")).then(|| text.to_owned())
}

pub(super) fn hosts(text: &str) -> Result<Vec<String>, SlurmError> {
    some(text).map_or_else(|| Ok(Vec::new()), |t| expand_hosts(&t))
}

/// A time printed under `SLURM_TIME_FORMAT=%s`; the outer `None` means "cannot be read".
#[expect(clippy::option_option, reason = "unreadable, absent and present are three things")]
pub(super) fn time(text: &str) -> Option<Option<i64>> {
    match text {
        "N/A" | "NONE" | "None" | "Unknown" | "" | "(null)" => Some(None),
        t => t.parse().ok().map(Some),
    }
}

fn flag(text: &str) -> Option<bool> {
    match text {
        "0" | "NO" | "No" | "no" => Some(false),
        // BatchFlag counts the launches of a requeued job: 2, 3, ...
        t if t == "YES" || t == "Yes" || t == "yes" => Some(true),
        t => t.parse::<u32>().ok().map(|n| n != 0),
    }
}

/// squeue may print a range (`1-2`) or a count in thousands for waiting jobs; the lower bound counts.
pub(super) fn number(text: &str) -> Option<u32> {
    let low = text.split('-').next().unwrap_or(text);
    low.strip_suffix('K')
        .map_or_else(|| low.parse().ok(), |k| k.parse::<u32>().ok()?.checked_mul(1024))
}

/// 22.05 prints the raw wait status, later releases `code:signal`.
#[expect(clippy::option_option, reason = "unreadable, absent and present are three things")]
fn exit_code(text: &str) -> Option<Option<(i32, i32)>> {
    match text.split_once(':') {
        Some((code, signal)) => Some(Some((code.parse().ok()?, signal.parse().ok()?))),
        None if text == "N/A" => Some(None),
        None => text.parse::<i32>().ok().map(|status| Some((status >> 8 & 0xff, status & 0x7f))),
    }
}

/// `30:00`, `1:00:00`, `1-02:00:00`: always with seconds in squeue. The inner `None` means "no limit".
#[expect(clippy::option_option, reason = "unreadable, unlimited and a limit are three things")]
pub(super) fn minutes(text: &str) -> Option<Option<u32>> {
    if matches!(text, "UNLIMITED" | "NOT_SET" | "Partition_Limit" | "N/A" | "INVALID" | "NONE") {
        return Some(None);
    }
    u32::try_from(seconds(text)? / 60).ok().map(Some)
}

/// `[D-]HH:MM:SS`, `MM:SS`.
pub(super) fn seconds(text: &str) -> Option<u64> {
    let (days, clock) = text.split_once('-').map_or((Some(0), text), |(d, c)| (d.parse::<u64>().ok(), c));
    let mut total = 0_u64;
    let parts: Vec<&str> = clock.split(':').collect();
    if parts.len() < 2 || parts.len() > 3 {
        return None;
    }
    for p in parts {
        total = total.checked_mul(60)?.checked_add(p.parse().ok()?)?;
    }
    days?.checked_mul(86_400)?.checked_add(total)
}

/// The jobs of a poll.
pub(super) fn briefs(text: &str) -> Result<Vec<JobBrief>, SlurmError> {
    Ok(squeue(text)?.into_iter().map(|j| j.brief).collect())
}

/// Picks a job out of `squeue --format "%A %F %K %T"`, none of which a user can choose: its exact name and its state.
pub(super) fn short(text: &str, id: JobId) -> Result<Option<(String, JobState)>, SlurmError> {
    for line in text.lines().filter(|l| !l.trim().is_empty()) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [number, array, task, state] = words[..] else {
            return Err(SlurmError::parse("%A %F %K %T", line));
        };
        if number.parse() == Ok(id) {
            let is_task = task.bytes().all(|b| b.is_ascii_digit());
            let name = if is_task { format!("{array}_{task}") } else { number.to_owned() };
            return Ok(Some((name, JobState::read(state))));
        }
    }
    Ok(None)
}

/// Picks the job out of what `squeue -j` printed: it prints all parts of an array or of a heterogeneous job.
pub(super) fn pick(text: &str, id: JobId) -> Result<Option<JobInfo>, SlurmError> {
    let mut jobs: Vec<JobInfo> = squeue(text)?.into_iter().filter(|j| j.brief.id == id).collect();
    if jobs.len() > 1 {
        return Err(SlurmError::parse("JobID (twice)", text));
    }
    Ok(jobs.pop())
}

#[cfg(test)]
mod tests {
    use super::user_text;

    #[test]
    fn the_working_directory_ends_where_the_next_field_begins() {
        for rest in [
            "",
            " Power=",
            " StdErr=/a StdIn=/dev/null StdOut=/a Power=",
            " Comment=x StdErr=/a",
            " TresPerNode=gres:gpu:1",
        ] {
            let record = format!("JobId=7 Command=/bin/sh WorkDir=/home/a b{rest}");
            assert_eq!(user_text(&record).work_dir.as_deref(), Some("/home/a b"), "{rest}");
        }
    }
}
