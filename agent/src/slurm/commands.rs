//! The real thing: `scontrol`, `squeue` and `scancel`.

use super::error::classify;
use super::run::{Output, Run};
use super::types::{
    JobBrief, JobId, JobInfo, JobRequest, JobState, JobUpdate, NodeInfo, PartitionInfo, QosInfo, ReservationInfo, ReservationNodes,
    ReservationSpec, SlurmConfig,
};
use super::{Slurm, SlurmError, parse, parse_admin, parse_requests};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

/// How to run Slurm's commands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlurmSettings {
    /// Passed on as `SLURM_CONF`; `None` leaves Slurm its default.
    pub conf: Option<PathBuf>,
    /// Where the commands are; `None` looks through [`SlurmSettings::PATH`].
    pub programs: Option<PathBuf>,
    /// For one command.
    pub deadline: Duration,
    /// Most that a command may print. A poll takes about 200 bytes for each job.
    pub max_output: usize,
}

impl SlurmSettings {
    /// The only directories in which commands are looked up, and all of the PATH that they see.
    pub const PATH: &'static str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/slurm/bin";
}

impl Default for SlurmSettings {
    fn default() -> Self {
        Self {
            conf: None,
            programs: None,
            deadline: Duration::from_secs(15),
            max_output: 64 << 20,
        }
    }
}

/// [`Slurm`] by way of its commands.
#[derive(Debug)]
pub struct SlurmCommands {
    settings: SlurmSettings,
    env: Vec<(String, String)>,
    /// How orders name the jobs of the last poll.
    named: Mutex<HashMap<JobId, OrderName>>,
}

/// How an order must name a job so that it means this one alone. A name once true stays true: that of an array's part that may still be
/// divided is not kept.
#[derive(Debug, Clone, PartialEq, Eq)]
enum OrderName {
    /// Its number.
    Number,
    /// A task of an array: the array's number and the task's index.
    Task(JobId, String),
}

/// Numbers of jobs in one argument: some 20 KiB, of the 128 KiB that Linux allows (MAX_ARG_STRLEN).
const ASKED_AT_ONCE: usize = 2000;

impl SlurmCommands {
    /// Nothing is run yet: [`ping`](Slurm::ping) tells whether it works.
    #[must_use]
    pub fn new(settings: SlurmSettings) -> Self {
        let mut env = vec![
            ("PATH".to_owned(), SlurmSettings::PATH.to_owned()),
            ("LC_ALL".to_owned(), "C".to_owned()),
            // Times as unix seconds on every release; the default is local time without a zone, ambiguous once a year.
            ("SLURM_TIME_FORMAT".to_owned(), "%s".to_owned()),
        ];
        if let Some(conf) = &settings.conf {
            env.push(("SLURM_CONF".to_owned(), conf.to_string_lossy().into_owned()));
        }
        Self {
            settings,
            env,
            named: Mutex::default(),
        }
    }

    fn path(&self, program: &'static str) -> Result<PathBuf, SlurmError> {
        if let Some(dir) = &self.settings.programs {
            return Ok(dir.join(program));
        }
        SlurmSettings::PATH
            .split(':')
            .map(|dir| Path::new(dir).join(program))
            .find(|p| p.is_file())
            .ok_or_else(|| SlurmError::Command {
                program,
                reason: format!("it is in none of {}", SlurmSettings::PATH),
            })
    }

    fn output(&self, program: &'static str, args: &[String]) -> Result<Output, SlurmError> {
        let path = self.path(program)?;
        let run = Run {
            program,
            path: &path,
            args,
            env: &self.env,
            deadline: self.settings.deadline,
            max_output: self.settings.max_output,
        };
        let out = run.run()?;
        log::debug!(
            "{program} {args:?}: status {:?}, {} bytes, {:?}",
            out.code,
            out.stdout.len(),
            out.stderr.trim_end()
        );
        Ok(out)
    }

    fn ask(&self, program: &'static str, args: &[String]) -> Result<String, SlurmError> {
        let out = self.output(program, args)?;
        if out.code == Some(0) {
            Ok(out.stdout)
        } else {
            Err(classify(&out.stderr, &out.stdout, out.code))
        }
    }

    fn scontrol(&self, args: &[&str]) -> Result<String, SlurmError> {
        self.ask("scontrol", &args.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>())
    }

    /// Where a job stands, and no more: what a job's owner may ask, in one short command. None if Slurm no longer knows it.
    ///
    /// # Errors
    /// As [`Slurm::job`].
    pub fn job_state(&self, id: JobId) -> Result<Option<JobState>, SlurmError> {
        Ok(self.short(id)?.map(|(_, state)| state))
    }

    /// How an order must name a job so that it means this one alone, and its state. The last task of an array has the number of the
    /// whole array, and an order that names it so is an order for all tasks.
    fn short(&self, id: JobId) -> Result<Option<(String, JobState)>, SlurmError> {
        let args = ["--local", "--noheader", "--all", "--states=all", "--format=%A %F %K %T", "--jobs"];
        let args: Vec<String> = args.iter().map(|a| (*a).to_owned()).chain([id.to_string()]).collect();
        match self.ask("squeue", &args) {
            Ok(text) => parse::short(&text, id),
            Err(SlurmError::NoSuchJob) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The name of a job in an order. One question to Slurm where the last poll did not tell it.
    fn ordered(&self, id: JobId) -> Result<String, SlurmError> {
        match self.named().get(&id) {
            Some(OrderName::Number) => return Ok(id.to_string()),
            Some(OrderName::Task(array, task)) => return Ok(format!("{array}_{task}")),
            None => {}
        }
        Ok(self.short(id)?.ok_or(SlurmError::NoSuchJob)?.0)
    }

    /// The same for several, in one word.
    fn ordered_all(&self, ids: &[JobId]) -> Result<String, SlurmError> {
        let names: Result<Vec<String>, SlurmError> = ids.iter().map(|id| self.ordered(*id)).collect();
        names.map(|n| n.join(","))
    }

    fn named(&self) -> MutexGuard<'_, HashMap<JobId, OrderName>> {
        self.named.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The jobs that wait, run, or are leaving, each with its own number. squeue shows the waiting tasks of an array as one record, under the
    /// number of the array, and among them one that ran before and was requeued (in held state, too): such a task would seem to have ended.
    /// So tasks that were there at the last look are asked for by number, and at the first look every array is taken apart.
    fn all_jobs(&self) -> Result<Vec<JobBrief>, SlurmError> {
        let before: Option<Vec<JobId>> = {
            let named = self.named();
            let task = |(id, name): (&JobId, &OrderName)| matches!(name, OrderName::Task(..)).then_some(*id);
            (!named.is_empty()).then(|| named.iter().filter_map(task).collect())
        };
        let whole: &[&str] = if before.is_some() { &[] } else { &["--array"] };
        let mut jobs = parse::briefs(&self.squeue(whole, parse::squeue_format())?)?;
        let mut seen = HashSet::new();
        jobs.retain(|job| seen.insert(job.id));
        let hidden: Vec<JobId> = before.unwrap_or_default().into_iter().filter(|id| !seen.contains(id)).collect();
        // All tasks of a large array may have ended since, and an argument has its bounds.
        for hidden in hidden.chunks(ASKED_AT_ONCE) {
            let list = hidden.iter().map(JobId::to_string).collect::<Vec<_>>().join(",");
            match self.squeue(&["--array", "--jobs", &list], parse::squeue_format()) {
                Ok(text) => jobs.extend(parse::briefs(&text)?.into_iter().filter(|job| hidden.contains(&job.id))),
                Err(SlurmError::NoSuchJob) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(jobs)
    }

    fn squeue(&self, more: &[&str], format: String) -> Result<String, SlurmError> {
        let mut args: Vec<String> = ["--local", "--noheader", "--all"]
            .iter()
            .chain(more)
            .map(|a| (*a).to_owned())
            .collect();
        args.push("--Format".to_owned());
        args.push(format);
        self.ask("squeue", &args)
    }
}

/// Names go into `key=value` arguments and lists: nothing that could end one and begin another.
/// What a poll tells of a job's name in orders; `None`: it has to be asked for.
fn order_name(job: &JobBrief) -> Option<OrderName> {
    match (&job.array, &job.het) {
        (None, None) => Some(OrderName::Number),
        (Some((array, task)), None) if task.bytes().all(|b| b.is_ascii_digit()) => Some(OrderName::Task(*array, task.clone())),
        _ => None,
    }
}

fn name<'a>(what: &str, text: &'a str) -> Result<&'a str, SlurmError> {
    let fine = !text.is_empty()
        && text.len() <= 255
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.' | b'+' | b'@' | b':' | b'/'));
    if fine && !text.starts_with('-') {
        Ok(text)
    } else {
        Err(SlurmError::Command {
            program: "scontrol",
            reason: format!("{what} {text:?} is not a name"),
        })
    }
}

fn names(what: &str, list: &[String]) -> Result<String, SlurmError> {
    list.iter()
        .map(|n| name(what, n))
        .collect::<Result<Vec<_>, _>>()
        .map(|l| l.join(","))
}

/// Constraints and comments: one line of text.
fn one_line<'a>(what: &str, text: &'a str) -> Result<&'a str, SlurmError> {
    if text.len() <= 4096 && !text.contains(char::is_control) {
        Ok(text)
    } else {
        Err(SlurmError::Command {
            program: "scontrol",
            reason: format!("{what} is not one short line"),
        })
    }
}

fn update_args(job: &str, update: &JobUpdate) -> Result<Vec<String>, SlurmError> {
    let mut args = vec!["update".to_owned(), format!("JobId={job}")];
    if let Some(reservation) = &update.reservation {
        args.push(format!(
            "ReservationName={}",
            reservation.as_deref().map_or(Ok(""), |r| name("reservation", r))?
        ));
    }
    if let Some(nodes) = &update.req_nodes {
        args.push(format!("ReqNodeList={}", names("node", nodes)?));
    }
    if let Some(nodes) = &update.exclude_nodes {
        args.push(format!("ExcNodeList={}", names("node", nodes)?));
    }
    if let Some(features) = &update.features {
        args.push(format!("Features={}", one_line("constraint", features)?));
    }
    if let Some(comment) = &update.comment {
        args.push(format!("Comment={}", one_line("comment", comment)?));
    }
    if let Some(minutes) = update.time_limit_min {
        args.push(format!("TimeLimit={minutes}"));
    }
    if let Some(priority) = update.priority {
        args.push(format!("Priority={priority}"));
    }
    if let Some(requeue) = update.requeue {
        args.push(format!("Requeue={}", u8::from(requeue)));
    }
    if update.start_now {
        args.push("StartTime=now".to_owned());
    }
    Ok(args)
}

fn reservation_args(spec: &ReservationSpec) -> Result<Vec<String>, SlurmError> {
    let mut args = vec![
        "create".to_owned(),
        "reservation".to_owned(),
        format!("ReservationName={}", name("reservation", &spec.name)?),
    ];
    match &spec.nodes {
        ReservationNodes::Named(list) => {
            args.push(format!("Nodes={}", names("node", list)?));
            args.push("Flags=IGNORE_JOBS".to_owned());
        }
        ReservationNodes::Count(n) => args.push(format!("NodeCnt={n}")),
    }
    if let Some(partition) = &spec.partition {
        args.push(format!("PartitionName={}", name("partition", partition)?));
    }
    if let Some(features) = &spec.features {
        args.push(format!("Features={}", one_line("constraint", features)?));
    }
    args.push(format!("Users={}", names("user", &spec.users)?));
    args.push("StartTime=now".to_owned());
    // It must outlive the job's time limit, else the job waits for ever: "may be reserved for other job".
    args.push("Duration=UNLIMITED".to_owned());
    Ok(args)
}

impl Slurm for SlurmCommands {
    fn job(&self, id: JobId) -> Result<Option<JobInfo>, SlurmError> {
        let found = match self.squeue(&["--states=all", "--jobs", &id.to_string()], parse::squeue_format()) {
            Ok(text) => parse::pick(&text, id)?,
            Err(SlurmError::NoSuchJob) => None,
            Err(e) => return Err(e),
        };
        let Some(job) = found else { return Ok(None) };
        let details = match self.scontrol(&["--details", "--oneliner", "show", "job", &parse::exact_name(&job)]) {
            Ok(text) => text,
            Err(SlurmError::NoSuchJob) => return Ok(None),
            Err(e) => return Err(e),
        };
        parse::with_details(job, &details).map(Some)
    }

    fn jobs(&self, ids: &[JobId]) -> Result<Vec<JobInfo>, SlurmError> {
        if let [id] = ids {
            return self.job(*id).map(|job| job.into_iter().collect());
        }
        let list = ids.iter().map(JobId::to_string).collect::<Vec<_>>().join(",");
        let text = match self.squeue(&["--states=all", "--jobs", &list], parse::squeue_format()) {
            // One of them is not known any more: the others may be.
            Err(SlurmError::NoSuchJob) => return Ok(Vec::new()),
            other => other?,
        };
        let details = self.scontrol(&["--all", "--details", "--oneliner", "show", "job"])?;
        parse::several(&text, &details, ids)
    }

    fn jobs_poll(&self) -> Result<Vec<JobBrief>, SlurmError> {
        let jobs = self.all_jobs()?;
        let named = jobs.iter().filter_map(|j| Some((j.id, order_name(j)?))).collect();
        *self.named() = named;
        Ok(jobs)
    }

    fn requests(&self) -> Result<Vec<JobRequest>, SlurmError> {
        parse_requests::requests(&self.squeue(&[], parse_requests::squeue_format())?)
    }

    fn qos(&self) -> Result<Vec<QosInfo>, SlurmError> {
        let args = ["--noheader", "--parsable2", "show", "qos", "format=name,preempt"];
        parse_requests::qos(&self.ask("sacctmgr", &args.map(str::to_owned))?)
    }

    fn nodes(&self) -> Result<Vec<NodeInfo>, SlurmError> {
        parse_admin::nodes(&self.scontrol(&["--all", "--oneliner", "show", "node"])?)
    }

    fn node(&self, node: &str) -> Result<NodeInfo, SlurmError> {
        let text = self.scontrol(&["--oneliner", "show", "node", name("node", node)?])?;
        parse_admin::nodes(&text)?
            .into_iter()
            .find(|n| n.name == node)
            .ok_or_else(|| SlurmError::parse("NodeName", &text))
    }

    fn set_active_features(&self, nodes: &[String], features: &[String]) -> Result<(), SlurmError> {
        let (nodes, features) = (names("node", nodes)?, names("feature", features)?);
        self.scontrol(&["update", &format!("NodeName={nodes}"), &format!("ActiveFeatures={features}")])
            .map(|_| ())
    }

    fn requeue(&self, jobs: &[JobId]) -> Result<(), SlurmError> {
        self.scontrol(&["requeue", "Incomplete", &self.ordered_all(jobs)?]).map(|_| ())
    }

    fn requeuehold(&self, jobs: &[JobId]) -> Result<(), SlurmError> {
        self.scontrol(&["requeuehold", "Incomplete", &self.ordered_all(jobs)?]).map(|_| ())
    }

    fn requeue_special(&self, job: JobId) -> Result<(), SlurmError> {
        self.scontrol(&["requeuehold", "Incomplete", "State=SpecialExit", &self.ordered(job)?])
            .map(|_| ())
    }

    fn hold(&self, jobs: &[JobId]) -> Result<(), SlurmError> {
        self.scontrol(&["hold", &self.ordered_all(jobs)?]).map(|_| ())
    }

    fn release(&self, jobs: &[JobId]) -> Result<(), SlurmError> {
        self.scontrol(&["release", &self.ordered_all(jobs)?]).map(|_| ())
    }

    fn update_jobs(&self, jobs: &[JobId], update: &JobUpdate) -> Result<(), SlurmError> {
        if *update == JobUpdate::default() {
            return Ok(());
        }
        self.ask("scontrol", &update_args(&self.ordered_all(jobs)?, update)?).map(|_| ())
    }

    fn create_reservation(&self, spec: &ReservationSpec) -> Result<(), SlurmError> {
        let Err(refused) = self.ask("scontrol", &reservation_args(spec)?) else {
            return Ok(());
        };
        if refused.is_transient() {
            return Err(refused);
        }
        // Slurm answers a second creation with "nodes are busy", which does not say that it is ours.
        match self.reservation(&spec.name)? {
            Some(there) if there.users == spec.users => Ok(()),
            Some(_) => Err(SlurmError::Refused {
                message: format!("reservation {} exists for other users", spec.name),
            }),
            None => Err(refused),
        }
    }

    fn set_reservation_users(&self, wanted: &str, users: &[String]) -> Result<(), SlurmError> {
        let reservation = format!("ReservationName={}", name("reservation", wanted)?);
        let users = format!("Users={}", names("user", users)?);
        self.scontrol(&["update", &reservation, &users]).map(|_| ())
    }

    fn reservation(&self, wanted: &str) -> Result<Option<ReservationInfo>, SlurmError> {
        let wanted = name("reservation", wanted)?;
        Ok(self.reservations()?.into_iter().find(|r| r.name == wanted))
    }

    fn reservations(&self) -> Result<Vec<ReservationInfo>, SlurmError> {
        parse_admin::reservations(&self.scontrol(&["--all", "--oneliner", "show", "reservation"])?)
    }

    fn delete_reservation(&self, wanted: &str) -> Result<bool, SlurmError> {
        match self.scontrol(&["delete", &format!("ReservationName={}", name("reservation", wanted)?)]) {
            Ok(_) => Ok(true),
            Err(e) if e.is_no_such_reservation() => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn cancel(&self, job: JobId, signal: Option<u8>) -> Result<(), SlurmError> {
        let mut args = Vec::new();
        if let Some(n) = signal {
            args.push(format!("--signal={n}"));
            args.push("--full".to_owned());
        }
        let ordered = match self.ordered(job) {
            Err(SlurmError::NoSuchJob) => return Ok(()),
            other => other?,
        };
        args.push(ordered);
        match self.ask("scancel", &args) {
            Err(e) if e == SlurmError::NoSuchJob || e.is_already_finished() => Ok(()),
            other => other.map(|_| ()),
        }
    }

    fn config(&self) -> Result<SlurmConfig, SlurmError> {
        parse_admin::config(&self.scontrol(&["show", "config"])?)
    }

    fn partitions(&self) -> Result<Vec<PartitionInfo>, SlurmError> {
        parse_admin::partitions(&self.scontrol(&["--all", "--oneliner", "show", "partition"])?)
    }

    fn ping(&self) -> Result<(), SlurmError> {
        // With a backup controller the status is 0 only if both answer; one is enough for us.
        let out = self.output("scontrol", &["ping".to_owned()])?;
        if out.stdout.lines().any(|l| l.starts_with("Slurmctld(") && l.ends_with(" is UP")) {
            Ok(())
        } else if out.stdout.contains(" is DOWN") {
            Err(SlurmError::Unreachable {
                message: out.stdout.lines().next().unwrap_or_default().trim().to_owned(),
            })
        } else {
            Err(classify(&out.stderr, &out.stdout, out.code))
        }
    }
}
