//! Jobs that move: a guest program that counts, what its output must be, and how a test makes Slurm preempt.
use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde_json::Value;
use xtask::{Lab, Options};

use super::{Alice, Said, added, look, start, wait, wait_with};

/// A lab of this process alone, taken down when it ends.
pub fn lab(name: &str, options: Options) -> Lab {
    start(
        &Options {
            name: format!("pp-{name}-{}", std::process::id()),
            ..options
        },
        &[],
    )
}

/// What `count.sh` of a test runs in the guest: `tests/guest/churn.rs`.
#[derive(Debug, Clone, Copy)]
pub struct Count {
    pub numbers: usize,
    pub memory_mib: usize,
    /// Rewritten and checked between two numbers.
    pub rewrite_mib: usize,
}

impl Count {
    /// No memory to speak of.
    pub fn to(numbers: usize) -> Self {
        Self {
            numbers,
            memory_mib: 0,
            rewrite_mib: 0,
        }
    }

    /// Arguments after `count.sh`: a number every 0.2 s.
    pub fn args(self) -> String {
        format!("{} 200 {} {}", self.numbers, self.memory_mib, self.rewrite_mib)
    }
}

/// One line of the counter.
#[derive(Debug, Clone)]
pub struct Line {
    pub boot: String,
    pub pid: u32,
    /// The guest's time in Unix milliseconds.
    pub at_ms: u64,
}

/// A script with the guest program in it: compressed, in base64.
fn script() -> &'static str {
    static SCRIPT: OnceLock<String> = OnceLock::new();
    SCRIPT.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a directory");
        let program = dir.path().join("churn");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/churn.rs");
        let flags = ["-O", "-Ctarget-feature=+crt-static", "-Cpanic=abort", "-Cstrip=symbols", "-Clto=fat"];
        let status = Command::new("rustc").args(["--edition", "2024"]).args(flags).arg("-o").arg(&program).arg(source).status().expect("rustc");
        assert!(status.success(), "the guest's program does not build");
        let packed = Command::new("sh").args(["-c", "gzip -9c \"$0\" | base64"]).arg(&program).output().expect("gzip and base64").stdout;
        let text = String::from_utf8(packed).expect("base64");
        format!("#!/bin/sh\nbase64 -d > /tmp/churn.gz <<END\n{text}END\ngzip -dc /tmp/churn.gz > /tmp/churn && chmod +x /tmp/churn && exec /tmp/churn \"$@\"\n")
    })
}

/// Now, in Unix milliseconds.
pub fn now_ms() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).expect("a time after 1970").as_millis()).expect("a time")
}

/// A test with jobs that move.
pub struct Mover<'a> {
    pub t: Alice<'a>,
    pub lab: &'a Lab,
    pub nodes: Vec<String>,
    before: Vec<(String, Vec<String>)>,
}

impl<'a> Mover<'a> {
    pub fn new(lab: &'a Lab, name: &'static str, nodes: u8) -> Self {
        let t = Alice::new(lab, name);
        t.script("count.sh", script());
        let nodes: Vec<String> = (1..=nodes).map(|k| format!("n{k}")).collect();
        wait("all agents to be healthy", || {
            let said: Said = lab.node("ctl", &["svm", "health"]).into();
            (said.code == Some(0) && nodes.iter().all(|n| said.out.contains(n.as_str()))).then_some(())
        });
        let before = nodes.iter().map(|n| (n.clone(), look(lab, n))).collect();
        Self { t, lab, nodes, before }
    }

    /// Submits a counter to the partition that can be preempted; its output goes to `out`.
    pub fn count(&self, count: Count, out: &str, options: &str) -> u32 {
        let memory = if count.memory_mib > 0 {
            format!("--vm-mem={}", count.memory_mib + 160)
        } else {
            String::new()
        };
        self.t
            .submit(&format!("--vm=tiny -p low -o {out} {memory} {options} count.sh {}", count.args()))
    }

    /// Waits until the counter has printed that many lines.
    pub fn wait_lines(&self, out: &str, lines: usize) {
        let mut seen = 0;
        wait_with(&format!("{lines} lines in {out}"), &mut seen, |seen| {
            *seen = fs::read(self.t.path(out))
                .unwrap_or_default()
                .iter()
                .filter(|b| **b == b'\n')
                .count();
            *seen >= lines
        });
    }

    /// Lines so far.
    pub fn lines(&self, out: &str) -> usize {
        fs::read(self.t.path(out))
            .unwrap_or_default()
            .iter()
            .filter(|b| **b == b'\n')
            .count()
    }

    /// A job that takes a whole node from those that can be preempted, for so long.
    pub fn take(&self, node: &str, seconds: u32) -> u32 {
        self.t
            .submit(&format!("-p high -w {node} -c 2 -o /dev/null --wrap 'sleep {seconds}'"))
    }

    /// Takes a node until [`Mover::give_back`].
    pub fn fill(&self, node: &str) -> u32 {
        let job = self.take(node, 900);
        self.t.wait_state(job, "RUNNING");
        job
    }

    /// Ends a job that filled a node.
    pub fn give_back(&self, job: u32) {
        self.t.sh(&format!("scancel {job}"));
        self.t.end_of(job);
    }

    /// Waits until a job runs and says when it began, in seconds since `from`.
    pub fn started(&self, job: u32, from: Instant) -> f32 {
        self.t.wait_state(job, "RUNNING");
        let after = from.elapsed().as_secs_f32();
        println!("job {job} runs after {after:.1} s");
        after
    }

    /// A counter's output is every number once and in order, from one boot and one process, and nothing else.
    pub fn check(&self, out: &str, numbers: usize) -> Vec<Line> {
        let text = self.t.text(out);
        let mut sum = 0u64;
        let mut lines = Vec::new();
        for (k, line) in text.lines().enumerate() {
            let i = k as u64 + 1;
            sum = (sum * 31 + i) % 1_000_003;
            let words: Vec<&str> = line.split(' ').collect();
            let [number, check, boot, pid, at] = words[..] else {
                panic!("{out}: line {i} is `{line}`")
            };
            assert_eq!(
                (number, check),
                (i.to_string().as_str(), sum.to_string().as_str()),
                "{out}: line {i} is `{line}`"
            );
            lines.push(Line {
                boot: boot.into(),
                pid: pid.parse().expect("a pid"),
                at_ms: at.parse().expect("a time"),
            });
        }
        assert!(
            text.ends_with('\n') && lines.len() == numbers,
            "{out} has {} lines, not {numbers}, or the last is cut off",
            lines.len()
        );
        let boots: BTreeSet<&str> = lines.iter().map(|l| l.boot.as_str()).collect();
        let pids: BTreeSet<u32> = lines.iter().map(|l| l.pid).collect();
        assert_eq!((boots.len(), pids.len()), (1, 1), "{out}: boots {boots:?}, pids {pids:?}");
        let longest = lines.windows(2).map(|w| w[1].at_ms.saturating_sub(w[0].at_ms)).max().unwrap_or(0);
        println!("{out}: {numbers} numbers, once and in order; the longest pause by the guest's clock is {longest} ms");
        // A line is in the file within 2 s: the file's own time says what the guest's clock should have been.
        let written = fs::metadata(self.t.path(out)).and_then(|m| m.modified()).expect("the file's time");
        let written = i128::try_from(written.duration_since(UNIX_EPOCH).expect("a time after 1970").as_millis()).expect("a time");
        let off = written - i128::from(lines[lines.len() - 1].at_ms);
        assert!((-500..=3000).contains(&off), "the guest's clock is {off} ms behind");
        lines
    }

    /// The job ended well, with that many restarts in Slurm's books.
    pub fn completed(&self, job: u32, restarts: u32) {
        let end = self.t.end_of(job);
        if end != ("COMPLETED".to_owned(), "0:0".to_owned()) {
            self.tell(job);
            panic!("job {job}: {end:?}");
        }
        assert_eq!(self.t.job(job)["Restarts"], restarts.to_string(), "restarts of job {job}");
    }

    /// What svm knows of a job's VM.
    pub fn show(&self, job: u32) -> Value {
        let output = self
            .lab
            .command("ctl", "root", &["svm", "show", "--json", &job.to_string()])
            .and_then(|mut c| c.stdin(Stdio::null()).output().map_err(|e| e.to_string().into()));
        let output = output.expect("svm");
        serde_json::from_slice::<Value>(&output.stdout).map_or(Value::Null, |v| v["vms"][0].clone())
    }

    /// State of a job's VM.
    pub fn vm_state(&self, job: u32) -> String {
        self.show(job)["state"].as_str().unwrap_or("none").to_owned()
    }

    /// Waits for a state of the VM.
    pub fn wait_vm(&self, job: u32, state: &str) {
        let mut last = String::new();
        wait_with(&format!("the VM of job {job} to be {state}"), &mut last, |last| {
            *last = self.vm_state(job);
            last == state
        });
    }

    /// Ways of the moves that were done, oldest first.
    pub fn ways(&self, job: u32) -> Vec<String> {
        let view = self.show(job);
        println!("job {job}: moves {}", view["moves"]);
        let moves = view["moves"].as_array().cloned().unwrap_or_default();
        moves
            .iter()
            .filter(|m| m["outcome"] == "done")
            .map(|m| m["way"].as_str().unwrap_or_default().to_owned())
            .collect()
    }

    /// All that is said of a job, for a test that fails.
    pub fn tell(&self, job: u32) {
        for (host, line) in [
            (
                "ctl",
                format!("scontrol show job {job}; svm show {job}; squeue; sinfo -N; scontrol show res"),
            ),
            ("ctl", format!("svm log {job}")),
        ] {
            self.lab.node(host, &["sh", "-c", &line]);
        }
        for host in std::iter::once("ctl").chain(self.nodes.iter().map(String::as_str)) {
            println!(
                "--- agent on {host}\n{}",
                self.lab.log_tail(host, "slurm-vmd", 60).unwrap_or_default()
            );
        }
    }

    /// Nothing is left but the ledger: no domain, file, process, reservation.
    pub fn nothing_left(&self) {
        let mut left: Vec<String> = Vec::new();
        wait_with("nothing to be left", &mut left, |left| {
            *left = self
                .before
                .iter()
                .flat_map(|(n, before)| added(before, &look(self.lab, n)).into_iter().map(move |l| format!("{n}: {l}")))
                .collect();
            // Directories that the agents make once.
            left.retain(|l| {
                ![
                    "shared/slurm-vm/saves",
                    "shared/slurm-vm/overlays",
                    "shared/slurm-vm/done",
                    "var/lib/slurm-vm/done",
                ]
                .iter()
                .any(|d| l.ends_with(&format!(": file /{d}")))
            });
            // The disk with the guest helper, which all VMs of a node share.
            left.retain(|l| !l.contains(": file /var/lib/slurm-vm/seeds"));
            left.retain(|l| {
                !l.contains("process /bin/sh -c cat") && !l.contains("process slurmd") && !l.contains("slurmstepd: [") || l.contains("qemu")
            });
            left.is_empty()
        });
    }

    /// Arms fault points in a host's agent, by restarting it. When it dies of them, the next one has none.
    pub fn arm(&self, host: &str, faults: &str) {
        self.lab.node(
            host,
            &[
                "sh",
                "-c",
                &format!("mkdir -p /etc/default; echo 'SLURM_VM_FAULT={faults}' > /etc/default/slurm-vm"),
            ],
        );
        self.restart_agent(host);
        self.lab.node(host, &["rm", "/etc/default/slurm-vm"]);
    }

    /// Waits until a text is in the log of a host's agent.
    pub fn wait_log(&self, host: &str, text: &str) {
        wait(&format!("`{text}` in the log of {host}'s agent"), || {
            self.lab.log_tail(host, "slurm-vmd", 400).ok().filter(|t| t.contains(text))
        });
    }

    /// Runs a line of sh on the login host again and again, without a pause, until it succeeds.
    pub fn as_soon_as(&self, condition: &str, act: &str) {
        self.as_soon_as_on("ctl", condition, act);
    }

    /// The same on any host: what a node's own agent says is newer than what the controller has heard.
    pub fn as_soon_as_on(&self, host: &str, condition: &str, act: &str) {
        let line = format!("for i in $(seq 20000); do if {condition}; then {act}; exit; fi; done; exit 77");
        let said: Said = self.lab.node(host, &["sh", "-c", &line]).into();
        assert_ne!(said.code, Some(77), "never came: {condition}");
    }

    /// Adds settings to a table of a host's slurm-vm.toml and restarts its agent.
    pub fn set(&self, host: &str, table: &str, line: &str) {
        self.lab.node(
            host,
            &[
                "sed",
                "-i",
                &format!("s/^\\[{table}\\]$/[{table}]\\n{line}/"),
                "/etc/slurm-vm/slurm-vm.toml",
            ],
        );
        self.restart_agent(host);
    }

    /// Restarts a host's agent and waits until the controller calls all nodes healthy.
    pub fn restart_agent(&self, host: &str) {
        self.lab.stop(host, "slurm-vmd").expect("the agent stops");
        self.lab.start(host, "slurm-vmd").expect("the agent starts");
        // The controller's word may be older than the restart.
        wait("the agent to answer", || {
            Said::from(self.lab.node(host, &["svm", "list"])).code.filter(|c| *c == 0)
        });
        self.wait_healthy();
    }

    /// Waits until the controller calls all nodes healthy.
    pub fn wait_healthy(&self) {
        let mut last = String::new();
        wait_with("all agents to be healthy", &mut last, |last| {
            // A node that was sick gets its feature back with the controller's next poll.
            let both = "svm health && test \"$(sinfo -h -o %b | sort -u)\" = vm";
            let said: Said = self.lab.node("ctl", &["sh", "-c", both]).into();
            *last = said.out + &said.err;
            said.code == Some(0)
        });
    }
}

/// Watches from outside that no two nodes run the guest of a job at the same time.
pub struct OneCopy {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<String>>>,
}

impl OneCopy {
    pub fn watch(lab: &Lab, nodes: &[String], job: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let done = stop.clone();
        let domain = format!("slurm-{job}-0");
        // Looks at the first node again after the others: what runs before and after runs in between.
        let order: Vec<String> = nodes.iter().chain(nodes.first()).cloned().collect();
        let commands: Vec<_> = order
            .iter()
            .map(|n| {
                let line = format!("virsh list --state-running --name | grep -cx {domain}");
                let c = lab.command(n, "root", &["sh", "-c", &line]).expect("a command");
                let args: Vec<_> = c.get_args().map(std::ffi::OsStr::to_owned).collect();
                (n.clone(), c.get_program().to_owned(), args)
            })
            .collect();
        let thread = thread::spawn(move || {
            let mut found = Vec::new();
            while !done.load(Ordering::Acquire) {
                let runs: Vec<bool> = commands
                    .iter()
                    .map(|(_, program, args)| {
                        Command::new(program)
                            .args(args)
                            .stdin(Stdio::null())
                            .output()
                            .is_ok_and(|o| o.stdout.starts_with(b"1"))
                    })
                    .collect();
                let (first, last) = (runs[0], runs[runs.len() - 1]);
                let others = runs[1..runs.len() - 1].iter().filter(|r| **r).count();
                if (first && last && others > 0) || others > 1 {
                    found.push(
                        commands
                            .iter()
                            .zip(&runs)
                            .map(|((n, ..), r)| format!("{n}:{r}"))
                            .collect::<Vec<_>>()
                            .join(" "),
                    );
                }
                thread::sleep(Duration::from_millis(200));
            }
            found
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    /// No look found two.
    pub fn check(mut self) {
        self.stop.store(true, Ordering::Release);
        let found = self.thread.take().expect("the watch").join().expect("the watch");
        assert!(found.is_empty(), "two copies ran: {found:?}");
    }
}
