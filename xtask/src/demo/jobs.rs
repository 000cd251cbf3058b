//! The two parts of the demonstration.

use super::Stop;
use crate::{Error, Lab, Result, error::At, lab};
use std::{
    collections::BTreeMap,
    fs,
    process::Stdio,
    time::{Duration, Instant},
};

/// How long a job may take to reach a state that it reaches in seconds: a machine may be busy.
const DEADLINE: Duration = Duration::from_secs(400);

const HELLO: &str = "#!/bin/sh
echo \"hello from $(hostname), kernel $(uname -r), up $(cut -d. -f1 /proc/uptime) s\"
echo \"I am uid $(id -u), with $(nproc) CPUs and $(awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo) MiB\"
sleep 4
exit 3
";

/// How far the counter counts: long enough to be preempted half way.
const LAST: u32 = 150;

fn counter() -> String {
    format!(
        "#!/bin/sh
echo \"boot $(cut -c1-8 /proc/sys/kernel/random/boot_id), process $$\"
i=0
while [ $i -lt {LAST} ]; do i=$((i + 1)); echo $i; sleep 0.2; done
echo \"boot $(cut -c1-8 /proc/sys/kernel/random/boot_id), process $$\"
"
    )
}

const URGENT: &str = "#!/bin/sh
echo \"urgent work on $(hostname)\"
sleep 3
";

/// A user at the login host.
#[derive(Debug)]
pub struct Door<'a> {
    lab: &'a Lab,
    stop: &'a Stop,
    user: &'static str,
}

impl<'a> Door<'a> {
    /// The administrator.
    pub fn root(lab: &'a Lab, stop: &'a Stop) -> Self {
        Self { lab, stop, user: "root" }
    }

    fn of(lab: &'a Lab, stop: &'a Stop, user: &'static str) -> Self {
        Self { lab, stop, user }
    }

    /// What a command says on standard output.
    pub fn ask(&self, argv: &[&str]) -> Result<String> {
        self.ask_on(lab::CTL, argv)
    }

    fn ask_on(&self, host: &str, argv: &[&str]) -> Result<String> {
        let output = self
            .lab
            .command(host, self.user, argv)?
            .stdin(Stdio::null())
            .output()
            .at("run", argv[0])?;
        self.stop.check()?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = crate::proc::text_of(&output);
        Err(format!("`{}` failed for {} ({}): {said}", argv.join(" "), self.user, output.status).into())
    }

    /// Shows the command and what it says.
    fn show(&self, argv: &[&str]) -> Result<String> {
        println!("  {}@login$ {}", self.user, argv.join(" "));
        let said = self.ask(argv)?;
        quote(&said);
        Ok(said)
    }

    /// Writes a script into the user's home and shows it.
    fn script(&self, name: &str, text: &str) -> Result<()> {
        let path = self.lab.shared().join("home").join(self.user).join(name);
        fs::write(&path, text).at("write", &path)?;
        println!("  {}@login$ cat {name}", self.user);
        quote(text);
        Ok(())
    }

    /// Submits and gives the job's id.
    fn submit(&self, argv: &[&str]) -> Result<String> {
        let said = self.show(argv)?;
        let id = said.trim().rsplit(' ').next().unwrap_or_default();
        if id.is_empty() || !id.bytes().all(|b| b.is_ascii_digit()) {
            return Err(format!("sbatch gave no job id: {said}").into());
        }
        Ok(id.to_owned())
    }

    /// What Slurm knows of a job.
    fn job(&self, id: &str) -> Result<BTreeMap<String, String>> {
        Ok(fields(&self.ask(&["scontrol", "show", "job", "--oneliner", id])?))
    }

    fn output(&self, id: &str) -> Result<String> {
        let path = self.lab.shared().join("home").join(self.user).join(format!("slurm-{id}.out"));
        match fs::read(&path) {
            Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
            Err(e) => Err(e).at("read", &path),
        }
    }
}

fn quote(text: &str) {
    for line in text.lines() {
        println!("    {line}");
    }
}

/// `Key=Value` words; values with blanks are cut, nobody here needs those.
fn fields(text: &str) -> BTreeMap<String, String> {
    text.split_whitespace()
        .filter_map(|word| word.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

fn is(job: &BTreeMap<String, String>, key: &str, value: &str) -> bool {
    job.get(key).is_some_and(|v| v == value)
}

fn get<'a>(job: &'a BTreeMap<String, String>, key: &str) -> &'a str {
    job.get(key).map_or("", String::as_str)
}

fn over(job: &BTreeMap<String, String>) -> bool {
    !["PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"].contains(&get(job, "JobState"))
}

/// Part one: hello from the guest, `svm list` while it runs, the exit code.
pub fn in_a_vm(lab: &Lab, stop: &Stop) -> Result<()> {
    println!("\n1. A job in a virtual machine of its own\n");
    let alice = Door::of(lab, stop, "alice");
    alice.script("hello.sh", HELLO)?;
    let id = alice.submit(&["sbatch", "--vm=tiny", "hello.sh"])?;
    stop.wait("the first line of the job's output", DEADLINE, || {
        let job = alice.job(&id)?;
        if over(&job) {
            return Err(format!("the job ended too early: {}", summary(&job)).into());
        }
        Ok((alice.output(&id)?.lines().count() >= 2).then_some(()))
    })?;
    // The controller hears from the nodes about once a second.
    stop.wait("the VM in `svm list`", DEADLINE, || {
        let listed = alice.ask(&["svm", "list"])?;
        let shown = listed
            .lines()
            .any(|line| line.split_whitespace().next() == Some(id.as_str()) && line.ends_with(" running"));
        Ok(shown.then_some(()))
    })?;
    alice.show(&["svm", "list"])?;
    let job = stop.wait("the job's end", DEADLINE, || Ok(Some(alice.job(&id)?).filter(over)))?;
    println!("  alice@login$ cat slurm-{id}.out");
    let output = alice.output(&id)?;
    quote(&output);
    let node = get(&job, "BatchHost").to_owned();
    let door = Door::root(lab, stop);
    let uptime = door.ask_on(&node, &["cat", "/proc/uptime"])?;
    let minutes = uptime.split('.').next().and_then(|s| s.parse::<u64>().ok()).unwrap_or(0) / 60;
    println!("\n  That was the guest. Below it is node {node}, which has been up for {minutes} min: the script ran in the VM, not there.");
    if get(&job, "ExitCode") != "3:0" {
        return Err(format!("the script ended with `exit 3`, but Slurm says {}", summary(&job)).into());
    }
    println!(
        "  Its exit code came back as well: Slurm says JobState={} ExitCode={}.",
        get(&job, "JobState"),
        get(&job, "ExitCode")
    );
    Ok(())
}

fn summary(job: &BTreeMap<String, String>) -> String {
    ["JobState", "Reason", "ExitCode", "Restarts", "NodeList"]
        .map(|key| format!("{key}={}", get(job, key)))
        .join(" ")
}

/// Part two: a counter is preempted, its VM moves, nothing is lost.
pub fn preempted(lab: &Lab, stop: &Stop) -> Result<()> {
    println!("\n2. Preempted, and not killed\n");
    let (alice, bob) = (Door::of(lab, stop, "alice"), Door::of(lab, stop, "bob"));
    alice.script("count.sh", &counter())?;
    let id = alice.submit(&["sbatch", "--vm=tiny", "-c2", "count.sh"])?;
    stop.wait("the counter's first numbers", DEADLINE, || {
        let job = alice.job(&id)?;
        if over(&job) {
            return Err(format!("the counter ended too early: {}", summary(&job)).into());
        }
        Ok((alice.output(&id)?.lines().count() > 20).then_some(()))
    })?;
    let home = get(&alice.job(&id)?, "BatchHost").to_owned();
    println!("  Job {id} counts on node {home}. Now bob needs that very node, and partition high goes before low:");
    bob.script("urgent.sh", URGENT)?;
    let urgent = bob.submit(&["sbatch", "-p", "high", "-w", &home, "-c2", "urgent.sh"])?;
    let begun = Instant::now();
    let since = || format!("+{:.1} s", begun.elapsed().as_secs_f64());
    let state_is = |door: &Door<'_>, id: &str, wanted: &str| -> Result<Option<BTreeMap<String, String>>> {
        let job = door.job(id)?;
        Ok(is(&job, "JobState", wanted).then_some(job))
    };
    stop.wait("the preemption", DEADLINE, || {
        let job = alice.job(&id)?;
        Ok((get(&job, "PreemptTime") != "None" || !is(&job, "Restarts", "0")).then_some(()))
    })?;
    println!("    {:>8}  Slurm preempts job {id}: it has to leave {home}", since());
    let mut told_urgent = false;
    let landed = stop.wait("the counter on another node", DEADLINE, || {
        if !told_urgent && state_is(&bob, &urgent, "RUNNING")?.is_some() {
            told_urgent = true;
            println!("    {:>8}  bob's job {urgent} runs on {home}", since());
        }
        Ok(state_is(&alice, &id, "RUNNING")?.filter(|job| is(job, "Restarts", "1")))
    })?;
    let there = get(&landed, "BatchHost").to_owned();
    println!(
        "    {:>8}  job {id} runs on {there}: same id, Restarts={}",
        since(),
        get(&landed, "Restarts")
    );
    if there == home {
        return Err(format!("job {id} came back to {home}").into());
    }
    if !told_urgent {
        stop.wait("bob's job", DEADLINE, || {
            let job = bob.job(&urgent)?;
            Ok((is(&job, "JobState", "RUNNING") || over(&job)).then_some(()))
        })?;
        println!("    {:>8}  bob's job {urgent} runs on {home}", since());
    }
    let ended = stop.wait("the counter's end", Duration::from_secs(120), || {
        Ok(Some(alice.job(&id)?).filter(over))
    })?;
    println!(
        "    {:>8}  the counter has reached its end: JobState={}",
        since(),
        get(&ended, "JobState")
    );
    if !is(&ended, "JobState", "COMPLETED") || !is(&ended, "ExitCode", "0:0") {
        return Err(format!("the counter did not end well: {}", summary(&ended)).into());
    }
    let shown = alice.ask(&["svm", "show", &id])?;
    let mut in_short = "It went on elsewhere.";
    if let Some(moved) = shown.lines().map(str::trim).find(|line| line.starts_with("Move=")) {
        let moved = fields(moved);
        let gap = ["GuestGap", "Downtime"]
            .into_iter()
            .map(|key| get(&moved, key))
            .find(|v| v.ends_with("ms"));
        let stood = gap.map_or_else(String::new, |gap| format!("; the guest stood still for {gap}"));
        in_short = match get(&moved, "Move") {
            "live" => "It moved, while it counted.",
            "save" => "It was saved, and went on where it was resumed.",
            _ => in_short,
        };
        println!(
            "            svm show {id}: moved {}, {} in {}{stood}",
            get(&moved, "Move"),
            get(&moved, "Bytes"),
            get(&moved, "Took")
        );
    }
    let boot = checked(&alice.output(&id)?).map_err(Error::Other)?;
    println!("\n  slurm-{id}.out has every number from 1 to {LAST}, once and in order, and the first line is the last one:");
    println!("    {boot}");
    println!("  The same guest, the same process: nothing was started again, nothing was done twice. {in_short}");
    Ok(())
}

/// The counter's output must be what an undisturbed run prints. Gives the line that names guest and process.
fn checked(output: &str) -> std::result::Result<String, String> {
    let lines: Vec<&str> = output.lines().collect();
    let [first, numbers @ .., last] = lines.as_slice() else {
        return Err(format!("the counter's output has {} lines", lines.len()));
    };
    let numbers: std::result::Result<Vec<u32>, _> = numbers.iter().map(|line| line.parse()).collect();
    let numbers = numbers.map_err(|_| format!("there is more than numbers in the counter's output:\n{output}"))?;
    if let Some((place, number)) = (1..).zip(&numbers).find(|(place, number)| place != *number) {
        return Err(format!("in the counter's output {number} stands where {place} should"));
    }
    if numbers.len() != LAST as usize {
        return Err(format!("the counter's output ends at {} instead of {LAST}", numbers.len()));
    }
    if first != last || !first.starts_with("boot ") {
        return Err(format!("it is another guest or process at the end: `{first}`, then `{last}`"));
    }
    Ok((*first).to_owned())
}

#[cfg(test)]
mod tests {
    use super::{LAST, checked, fields};

    fn output(numbers: impl Iterator<Item = u32>) -> String {
        let numbers: String = numbers.map(|n| format!("{n}\n")).collect();
        format!("boot 1a2b, process 88\n{numbers}boot 1a2b, process 88\n")
    }

    #[test]
    fn a_whole_count_passes_and_a_gap_a_repetition_a_restart_or_a_stray_line_does_not() {
        assert_eq!(checked(&output(1..=LAST)).as_deref(), Ok("boot 1a2b, process 88"));
        assert!(checked(&output((1..=LAST).filter(|n| *n != 40))).is_err());
        assert!(checked(&output((1..=40).chain(40..=LAST))).is_err());
        assert!(checked(&output(1..LAST)).is_err());
        assert!(checked(&output(1..=LAST).replace("\n7\n", "\n7\nslurm-vm: moved\n")).is_err());
        assert!(checked(&output(1..=LAST).replacen("1a2b", "ffff", 1)).is_err());
        assert!(checked("").is_err());
    }

    #[test]
    fn what_scontrol_says_is_read_by_its_keys() {
        let job = fields("JobId=7 JobName=a b UserId=alice(2001) JobState=RUNNING Reason=None ExitCode=0:0\n");
        assert_eq!(job.get("JobState").map(String::as_str), Some("RUNNING"));
        assert_eq!(job.get("UserId").map(String::as_str), Some("alice(2001)"));
    }
}
