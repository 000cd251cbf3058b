//! What the scenarios on real machines share: one cluster for all of them, installed as docs/install.md says, taken by one test at a time, and a
//! look from outside at its end.
#![allow(dead_code, reason = "each test program uses its part")]

use std::{
    collections::BTreeMap,
    process::{Command, Output, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use xtask::machines::Machines;

/// Long enough for emulation on a loaded machine; nothing waits for it to pass.
pub const DEADLINE: Duration = Duration::from_secs(900);
/// The nodes of the cluster.
pub const NODES: [&str; 2] = ["n1", "n2"];
const ALL: [&str; 3] = ["ctl", "n1", "n2"];

static TURN: Mutex<()> = Mutex::new(());

/// What a command said.
#[derive(Debug, Clone)]
pub struct Said {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl From<Output> for Said {
    fn from(o: Output) -> Self {
        Self {
            code: o.status.code(),
            out: String::from_utf8_lossy(&o.stdout).into_owned(),
            err: String::from_utf8_lossy(&o.stderr).into_owned(),
        }
    }
}

/// Looks again and again until there is an answer; says what it saw last when none comes.
pub fn wait<T>(what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let begun = Instant::now();
    loop {
        let late = begun.elapsed() > DEADLINE;
        match look() {
            Ok(found) => {
                println!("after {:.1} s: {what}", begun.elapsed().as_secs_f32());
                return found;
            }
            Err(last) => assert!(!late, "still waiting after {} s: {what}; last: {last}", DEADLINE.as_secs()),
        }
        thread::sleep(Duration::from_millis(300));
    }
}

/// The cluster, for the time of one test.
pub struct Site {
    pub m: Machines,
    name: &'static str,
    since: BTreeMap<&'static str, String>,
    _turn: MutexGuard<'static, ()>,
}

impl Site {
    /// Takes the cluster; `name` is the test's directory in alice's home.
    pub fn take(name: &'static str) -> Self {
        // A test that failed has not broken the cluster for the next one: what it has left, that one sees.
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let cluster = std::env::var("SLURM_VM_TEST_MACHINES").unwrap_or_else(|_| "test".into());
        let m = Machines::attach(&cluster).unwrap_or_else(|e| panic!("{e}; `cargo xtask test --machines` makes them"));
        let mut site = Self {
            m,
            name,
            since: BTreeMap::new(),
            _turn: turn,
        };
        site.settle();
        site.well();
        for host in ALL {
            let said = site.root(host, "date '+%F %T'");
            site.since.insert(host, said.out.trim().to_owned());
        }
        site.sh_in("/", &format!("rm -rf ~/{name}; mkdir ~/{name}"));
        site
    }

    /// What the tests need beyond the guide, once: another user, preemption without a wait, nodes that are missed soon, and one VM at a time
    /// on a node (docs/machines.md says why).
    fn settle(&self) {
        if self.root("ctl", "id bob").code == Some(0) {
            return;
        }
        for host in ALL {
            let home = if host == "ctl" { "--create-home" } else { "--no-create-home" };
            self.good("root", host, &format!("useradd {home} --uid 2002 --shell /bin/bash bob"));
        }
        let change = "sed -i -e 's/^PreemptExemptTime=.*/PreemptExemptTime=0/' -e 's/^NodeName=.*/& CoreSpecCount=1/' /etc/slurm/slurm.conf
cat >>/etc/slurm/slurm.conf <<END
SlurmdTimeout=60
MessageTimeout=60
SchedulerParameters=batch_sched_delay=0,sched_interval=5,bf_interval=5
END
for node in n1 n2; do scp -q /etc/slurm/slurm.conf root@$node:/etc/slurm/; done
systemctl restart slurmctld && ssh root@n1 systemctl restart slurmd && ssh root@n2 systemctl restart slurmd";
        self.good("root", "ctl", change);
        for node in NODES {
            self.set(node, "boot_timeout_s", "600");
            self.set(node, "probe_timeout_s", "300");
        }
        // One poll is a dozen processes, and each takes the emulated controller a tenth of a second.
        self.set("ctl", "poll_ms", "4000");
        self.encrypt(false);
    }

    /// Whether the bulk of moves is encrypted, as it is by default: emulated processors take minutes for that.
    pub fn encrypt(&self, on: bool) {
        for node in NODES {
            self.set(node, "encrypt_migration", &on.to_string());
        }
        self.well();
    }

    /// Sets a key of a machine's slurm-vm.toml that is in the file already, and starts the agent anew.
    pub fn set(&self, host: &str, key: &str, value: &str) {
        let line = format!("sed -i 's|^#*{key} = .*|{key} = {value}|' /etc/slurm-vm/slurm-vm.toml && systemctl restart slurm-vmd");
        self.good("root", host, &line);
    }

    /// Waits until all nodes are idle and all agents healthy.
    pub fn well(&self) {
        wait("all nodes idle and healthy", || {
            let said = self.quiet("root", "ctl", "sinfo -h -N -p low -o '%N %T %b'; svm health");
            let idle = said.out.lines().filter(|l| l.ends_with(" idle vm")).count();
            if idle == NODES.len() && said.code == Some(0) {
                Ok(())
            } else {
                Err(format!("{said:?}"))
            }
        });
    }

    /// A line of bash as any user on any machine, printed with all it says.
    pub fn on(&self, user: &str, host: &str, line: &str) -> Said {
        self.m.run(host, user, &["bash", "-c", line]).into()
    }

    /// The same, not printed: for those who ask again and again.
    pub fn quiet(&self, user: &str, host: &str, line: &str) -> Said {
        let output = self
            .command(user, host, line)
            .stdin(Stdio::null())
            .output()
            .unwrap_or_else(|e| panic!("ssh: {e}"));
        output.into()
    }

    /// The same, to be spawned by the caller.
    pub fn command(&self, user: &str, host: &str, line: &str) -> Command {
        self.m.command(host, user, &["bash", "-c", line]).unwrap_or_else(|e| panic!("{e}"))
    }

    /// The same; it must succeed.
    pub fn good(&self, user: &str, host: &str, line: &str) -> String {
        let said = self.on(user, host, line);
        assert_eq!(said.code, Some(0), "{line}");
        said.out
    }

    /// As root on a machine.
    pub fn root(&self, host: &str, line: &str) -> Said {
        self.on("root", host, line)
    }

    /// As alice on the login host, in the test's directory.
    pub fn sh(&self, line: &str) -> Said {
        self.sh_in(&format!("/home/alice/{}", self.name), line)
    }

    fn sh_in(&self, dir: &str, line: &str) -> Said {
        self.on("alice", "ctl", &format!("cd {dir} && {line}"))
    }

    /// Writes a script of alice's.
    pub fn script(&self, file: &str, text: &str) {
        let line = format!("cat >{file} <<'END OF SCRIPT'\n{text}\nEND OF SCRIPT\nchmod +x {file}");
        assert_eq!(self.sh(&line).code, Some(0), "{file} is written");
    }

    /// A file of the test, as the login host sees it.
    pub fn text(&self, file: &str) -> String {
        self.quiet("alice", "ctl", &format!("cat ~/{}/{file}", self.name)).out
    }

    /// Submits a job and gives its number.
    pub fn submit(&self, args: &str) -> u32 {
        let said = self.sh(&format!("sbatch --parsable {args}"));
        said.out.trim().parse().unwrap_or_else(|_| panic!("sbatch {args}: {said:?}"))
    }

    /// Slurm's own words on a job, by field.
    pub fn job(&self, job: u32) -> BTreeMap<String, String> {
        let said = self.quiet("root", "ctl", &format!("scontrol -o show job {job}"));
        said.out
            .split_whitespace()
            .filter_map(|word| word.split_once('='))
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect()
    }

    /// Waits until a job has ended and gives `JobState ExitCode`.
    pub fn end_of(&self, job: u32) -> String {
        wait(&format!("job {job} ended"), || {
            let fields = self.job(job);
            let get = |k: &str| fields.get(k).map_or("", String::as_str);
            let on = ["", "PENDING", "RUNNING", "SIGNALING", "CONFIGURING", "COMPLETING", "SUSPENDED"];
            if on.contains(&get("JobState")) {
                Err(format!("{fields:?}"))
            } else {
                Ok(format!("{} {}", get("JobState"), get("ExitCode")))
            }
        })
    }

    /// Waits until a file of the test contains the text, as a node sees it: a client of NFS writes to the server in its own time.
    pub fn wait_text(&self, file: &str, text: &str) {
        wait(&format!("`{}` in {file}", text.trim()), || {
            let mut last = String::new();
            // Looked at first: what is written by a job that ends in between is there.
            let jobs = self.quiet("root", "ctl", "squeue -h -u alice").out;
            for node in NODES {
                let found = self.quiet("alice", node, &format!("cat ~/{}/{file}", self.name)).out;
                if found.contains(text) {
                    return Ok(());
                }
                last += &tail(&found);
            }
            if jobs.is_empty() {
                self.root("ctl", "scontrol show job; svm health");
                panic!("no job is left that could write it: {last}");
            }
            Err(last)
        });
    }

    /// What svm knows of a job's VM.
    pub fn show(&self, job: u32) -> Value {
        let said = self.quiet("root", "ctl", &format!("svm show --json {job}"));
        serde_json::from_str::<Value>(&said.out).map_or(Value::Null, |v| v["vms"][0].clone())
    }

    /// Waits for a state of a job's VM on a node.
    pub fn wait_vm(&self, job: u32, node: &str, state: &str) {
        wait(&format!("the VM of job {job} is {state} on {node}"), || {
            let view = self.show(job);
            if view["state"] == state && view["node"] == node {
                Ok(())
            } else {
                Err(format!("{} on {}", view["state"], view["node"]))
            }
        });
    }

    /// Ways of the moves that were done, oldest first.
    pub fn ways(&self, job: u32) -> Vec<String> {
        let view = self.show(job);
        println!("job {job}: moves {}", view["moves"]);
        let moves = view["moves"].as_array().cloned().unwrap_or_default();
        let done = moves.iter().filter(|m| m["outcome"] == "done");
        done.map(|m| m["way"].as_str().unwrap_or_default().to_owned()).collect()
    }

    /// The node a job runs on.
    pub fn node_of(&self, job: u32) -> String {
        wait(&format!("job {job} runs"), || {
            let fields = self.job(job);
            if fields.get("JobState").is_some_and(|s| s == "RUNNING") {
                Ok(fields["NodeList"].clone())
            } else {
                Err(format!("{:?} {:?}", fields.get("JobState"), fields.get("Reason")))
            }
        })
    }

    /// Everything about a job, for a test that is about to fail.
    pub fn tell(&self, job: u32) {
        self.root(
            "ctl",
            &format!("scontrol show job {job}; svm show {job}; squeue; sinfo -N -l; svm health; svm log {job} | tail -20"),
        );
        for host in ALL {
            self.root(host, "journalctl --no-pager -u slurm-vmd -n 60 -o cat");
        }
    }

    /// The other node.
    pub fn other(node: &str) -> &'static str {
        if node == NODES[0] { NODES[1] } else { NODES[0] }
    }

    /// Ends the test: nothing is left of it, no node is drained, AppArmor has denied nothing of ours, all clocks agree.
    pub fn end(self) {
        self.well();
        wait("nothing is left", || {
            let look = "virsh list --all --name | grep . | sed 's/^/domain /'
ps -eo args= | grep '^/usr/bin/qemu-system' | cut -c1-80
find /run/slurm-vm/vm /run/slurm-vm/move /run/slurm-vm/jobs /var/lib/libvirt/qemu/save -mindepth 1 2>/dev/null
find /var/lib/slurm-vm/vms /shared/slurm-vm -type f ! -name record.json ! -name serial.log ! -name journal.log 2>/dev/null
scontrol show reservation -o | grep -v '^No res'";
            let left: Vec<String> = NODES
                .iter()
                .flat_map(|n| {
                    self.quiet("root", n, look)
                        .out
                        .lines()
                        .map(|l| format!("{n}: {l}"))
                        .collect::<Vec<_>>()
                })
                .collect();
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        });
        let denied: Vec<String> = NODES.iter().flat_map(|n| self.denied(n)).collect();
        assert!(denied.is_empty(), "AppArmor has denied something: {denied:#?}");
    }

    /// What AppArmor has denied on a node since the test began.
    pub fn denied(&self, node: &str) -> Vec<String> {
        let since = &self.since[node];
        let line = format!("journalctl -k --no-pager -o cat --since '{since}' | grep 'apparmor=\"DENIED\"'");
        self.quiet("root", node, &line)
            .out
            .lines()
            .map(|l| format!("{node}: {l}"))
            .collect()
    }
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}

/// A program of the guest that counts, five numbers a second, and says at both ends which boot of which guest it is and what time.
pub fn counter(to: u32) -> String {
    format!(
        "#!/bin/sh
echo \"boot $(cat /proc/sys/kernel/random/boot_id)\"
i=0
while [ $i -lt {to} ]; do i=$((i + 1)); echo $i; sleep 0.2; done
echo \"boot $(cat /proc/sys/kernel/random/boot_id)\"
echo \"time $(date +%s)\""
    )
}

/// What [`counter`] wrote must be every number once and in order, by one guest, whose clock is right at its end.
pub fn counted(site: &Site, job: u32, file: &str, to: u32) {
    let text = site.text(file);
    let mut lines = text.lines();
    let (boot, mut expected) = (lines.next().unwrap_or_default().to_owned(), 1..=to);
    let numbers: Vec<&str> = lines.by_ref().take(to as usize).collect();
    let wrong = numbers
        .iter()
        .find(|n| expected.next().map(|e| e.to_string()).as_deref() != Some(**n));
    if wrong.is_some() || numbers.len() != to as usize || lines.next() != Some(boot.as_str()) {
        site.tell(job);
        panic!("job {job}: wrong at {wrong:?}, {} numbers; {}", numbers.len(), tail(&text));
    }
    let time: i64 = lines.next().and_then(|l| l.strip_prefix("time ")?.parse().ok()).expect("a time");
    let written = site.quiet("alice", "ctl", &format!("stat -c %Y ~/{}/{file}", site.name)).out;
    let off = written.trim().parse::<i64>().expect("a time") - time;
    println!("job {job}: the guest's clock is {off} s off at its end");
    assert!((-2..=10).contains(&off), "the guest's clock is {off} s behind");
}
