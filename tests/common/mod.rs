//! What the tests in the lab share: one lab for each test program, a directory of its own for each test, and looking from outside.
#![allow(dead_code, reason = "each test program uses its part")]

pub mod moves;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::{
        fs::{PermissionsExt, chown},
        process::CommandExt,
    },
    path::PathBuf,
    process::{Child, ChildStdin, Command, Output, Stdio},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use xtask::{Lab, Options};

/// Long enough for a machine that does several things at once; nothing waits for it to pass.
pub const DEADLINE: Duration = Duration::from_secs(240);
/// alice's uid and gid.
const ALICE: u32 = 2001;

/// Standard inputs of the guards: they close when this process ends, however it ends.
static GUARDS: Mutex<Vec<ChildStdin>> = Mutex::new(Vec::new());

/// An image made of the files of `tiny`: its name and kernel command line.
pub struct Image {
    pub name: &'static str,
    pub cmdline: &'static str,
}

/// The agents' configuration for more images.
pub fn images(list: &[Image]) -> String {
    let dir = "/var/lib/slurm-vm-images/tiny";
    list.iter().fold(String::new(), |text, Image { name, cmdline }| {
        text + &format!(
            "[images.{name}]\nkernel = \"{dir}/vmlinuz\"\ninitrd = \"{dir}/initrd\"\ndisk = \"{dir}/disk.qcow2\"\ndisk_format = \"qcow2\"\ncmdline = \"{cmdline}\"\n"
        )
    })
}

/// Brings up the lab of a test program. A process of its own takes it down as soon as this one has ended, also when it was killed.
/// `more_images` are written to the list that submissions are checked against.
pub fn start(options: &Options, more_images: &[&str]) -> Lab {
    let begun = Instant::now();
    let lab = match Lab::up(options) {
        Ok(lab) => lab,
        Err(e) => panic!("no lab: {e}"),
    };
    lab.keep();
    let xtask = xtask::paths::xtask().expect("the xtask program");
    #[expect(clippy::zombie_processes, reason = "it outlives this process")]
    let mut guard = Command::new("/bin/sh")
        .args([
            "-c",
            "cat >/dev/null; exec \"$0\" lab down --name \"$1\"",
            &xtask.to_string_lossy(),
            &options.name,
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .expect("the guard of the lab");
    GUARDS.lock().unwrap().extend(guard.stdin.take());
    if !more_images.is_empty() {
        let text = more_images.join("\\n");
        for host in options.hosts() {
            lab.node(&host, &["sh", "-c", &format!("printf '{text}\\n' >> /etc/slurm-vm/images.list")]);
        }
    }
    println!("lab {} is up after {:.1} s", options.name, begun.elapsed().as_secs_f32());
    lab
}

/// What a command said.
#[derive(Debug)]
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

/// Looks again and again until there is an answer.
pub fn wait<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        let late = Instant::now() > end;
        if let Some(found) = look() {
            return found;
        }
        assert!(!late, "still waiting after {} s: {what}", DEADLINE.as_secs());
        thread::sleep(Duration::from_millis(100));
    }
}

/// One test as alice: its directory is hers, on storage that all hosts see (and no guest).
pub struct Alice<'a> {
    pub lab: &'a Lab,
    name: &'static str,
}

impl<'a> Alice<'a> {
    pub fn new(lab: &'a Lab, name: &'static str) -> Self {
        let me = Self { lab, name };
        fs::create_dir_all(me.path("")).expect("the test's directory");
        chown(me.path(""), Some(ALICE), Some(ALICE)).expect("the test's directory is alice's");
        me
    }

    /// A file of the test, as this machine sees it.
    pub fn path(&self, file: &str) -> PathBuf {
        self.lab.shared().join("home/alice").join(self.name).join(file)
    }

    pub fn bytes(&self, file: &str) -> Vec<u8> {
        fs::read(self.path(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
    }

    pub fn text(&self, file: &str) -> String {
        String::from_utf8_lossy(&self.bytes(file)).into_owned()
    }

    pub fn script(&self, file: &str, text: &str) {
        fs::write(self.path(file), text).expect("a script");
        fs::set_permissions(self.path(file), fs::Permissions::from_mode(0o755)).expect("a script");
    }

    /// Runs a line of bash on the login host, in the test's directory.
    pub fn sh(&self, line: &str) -> Said {
        self.lab.exec("alice", &["bash", "-c", &self.line(line)]).into()
    }

    /// The same, to be spawned by the caller.
    pub fn command(&self, line: &str) -> Command {
        self.lab.command("ctl", "alice", &["bash", "-c", &self.line(line)]).expect("xtask")
    }

    fn line(&self, line: &str) -> String {
        format!("cd /shared/home/alice/{} && {line}", self.name)
    }

    /// Submits a job and gives its number.
    pub fn submit(&self, args: &str) -> u32 {
        let said = self.sh(&format!("sbatch --parsable {args}"));
        said.out.trim().parse().unwrap_or_else(|_| panic!("sbatch {args}: {said:?}"))
    }

    /// Slurm's own words on a job, by field.
    pub fn job(&self, job: u32) -> BTreeMap<String, String> {
        let output = self
            .lab
            .command("ctl", "alice", &["scontrol", "-o", "show", "job", &job.to_string()])
            .and_then(|mut c| c.output().map_err(|e| e.to_string().into()));
        let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).expect("scontrol");
        text.split_whitespace()
            .filter_map(|word| word.split_once('='))
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .collect()
    }

    /// Waits until a job has the state.
    pub fn wait_state(&self, job: u32, state: &str) -> BTreeMap<String, String> {
        let mut last = BTreeMap::new();
        wait_with(&format!("job {job} to be {state}"), &mut last, |last| {
            *last = self.job(job);
            last.get("JobState").is_some_and(|s| s == state)
        });
        last
    }

    /// Waits until a job has ended and gives `JobState ExitCode`.
    pub fn end_of(&self, job: u32) -> (String, String) {
        let mut last = BTreeMap::new();
        wait_with(&format!("the end of job {job}"), &mut last, |last| {
            *last = self.job(job);
            let on = [
                "PENDING",
                "RUNNING",
                "SIGNALING",
                "CONFIGURING",
                "COMPLETING",
                "SPECIAL_EXIT",
                "SUSPENDED",
            ];
            last.get("JobState").is_some_and(|s| !on.contains(&s.as_str()))
        });
        let take = |k: &str| last.get(k).cloned().unwrap_or_default();
        println!("job {job}: {} {} {}", take("JobState"), take("ExitCode"), take("Reason"));
        (take("JobState"), take("ExitCode"))
    }

    /// Waits until a file of the test contains the text.
    pub fn wait_text(&self, file: &str, text: &str) {
        wait(&format!("`{text}` in {file}"), || {
            fs::read(self.path(file))
                .is_ok_and(|b| String::from_utf8_lossy(&b).contains(text))
                .then_some(())
        });
    }

    /// What is left on the nodes of a job's VM, by looking with the system's own tools. The ledger keeps a VM's record and logs.
    pub fn left_of(&self, job: u32) -> Vec<String> {
        let name = format!("slurm-{job}-");
        let mut left = Vec::new();
        for host in ["n1", "n2"] {
            for line in look(self.lab, host) {
                let kept = ["record.json", "serial.log", "journal.log", ""];
                let in_ledger = line
                    .split_once(&format!("/var/lib/slurm-vm/vms/{name}"))
                    .is_some_and(|(_, rest)| kept.contains(&rest.split_once('/').map_or("", |(_, file)| file)));
                let step = line.contains(&format!("slurmstepd: [{job}.")) || line.ends_with(&format!("/run/slurm-vm/jobs/{job}"));
                if step || (line.contains(&name) && !in_ledger) {
                    left.push(format!("{host}: {line}"));
                }
            }
        }
        left
    }

    /// Prints what a line of shell says on a host. It never panics: it is for tests that have failed.
    fn tell(&self, host: &str, line: &str) {
        let said = self.lab.command(host, "root", &["sh", "-c", line]).map(|mut c| c.output());
        if let Ok(Ok(said)) = said {
            println!("--- {host}: {line}\n{}", String::from_utf8_lossy(&said.stdout));
        }
    }

    /// Waits until nothing is left of a job but the ledger's record and logs.
    pub fn leaves_nothing(&self, job: u32) {
        let mut left = Vec::new();
        wait_with(&format!("nothing to be left of job {job}"), &mut left, |left| {
            *left = self.left_of(job);
            left.is_empty()
        });
    }
}

/// A web server of alice's on a host, over her home, until it is dropped.
pub struct WebServer(Child);

impl WebServer {
    pub fn on(lab: &Lab, host: &str, address: &str, port: u16) -> Self {
        let line = format!("cd /shared/home/alice && exec python3 -m http.server {port} --bind {address}");
        let mut command = lab.command(host, "alice", &["sh", "-c", &line]).expect("a command in the lab");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let server = Self(child.expect("a web server"));
        wait("the web server", || {
            let asked = format!("exec 3<>/dev/tcp/{address}/{port}");
            lab.run(host, "alice", &["bash", "-c", &asked]).status.success().then_some(())
        });
        server
    }
}

impl Drop for WebServer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a failed test leaves for whoever reads its output: Slurm's view, the agents' logs, the last lines of the guests' consoles.
impl Drop for Alice<'_> {
    fn drop(&mut self) {
        if !thread::panicking() {
            return;
        }
        self.tell("ctl", "squeue; sinfo -N; svm list");
        for host in self.lab.hosts().unwrap_or_default() {
            println!(
                "--- agent on {}\n{}",
                host.name,
                self.lab.log_tail(&host.name, "slurm-vmd", 40).unwrap_or_default()
            );
            self.tell(
                &host.name,
                "cd /var/lib/slurm-vm/vms 2>/dev/null && for f in $(ls -t */serial.log | head -n 4); do echo \"--- $f\"; tail -n 15 \"$f\"; done",
            );
        }
    }
}

/// Waits for a condition; the state it looked at last is printed when it does not come.
pub fn wait_with<T: std::fmt::Debug>(what: &str, last: &mut T, mut look: impl FnMut(&mut T) -> bool) {
    let end = Instant::now() + DEADLINE;
    loop {
        let late = Instant::now() > end;
        if look(last) {
            return;
        }
        assert!(!late, "still waiting after {} s: {what}; last: {last:?}", DEADLINE.as_secs());
        thread::sleep(Duration::from_millis(200));
    }
}

/// A node as the system's own tools show it: processes, domains, mounts, links, network namespaces, our files, libvirt's files.
pub fn look(lab: &Lab, host: &str) -> Vec<String> {
    let script = "ps -eo args= | grep -v -e '^ps ' -e '^sh -c ps' -e '^sort' -e '^sed' -e '^grep' | sed 's/^/process /'
virsh list --all --name | grep . | sed 's/^/domain /'
cut -d' ' -f2,3 /proc/self/mounts | sed 's/^/mount /'
ls /sys/class/net | sed 's/^/link /'
ls /run/netns 2>/dev/null | sed 's/^/netns /'
find /run/slurm-vm /var/lib/slurm-vm /shared/slurm-vm /run/libvirt /var/lib/libvirt /etc/libvirt/qemu /tmp /dev/shm 2>/dev/null | sed 's/^/file /'
scontrol show reservation -o | grep -v '^No res' | sed 's/^/reservation /'";
    let output = lab
        .command(host, "root", &["sh", "-c", script])
        .and_then(|mut c| c.stdin(Stdio::null()).output().map_err(|e| e.to_string().into()))
        .expect("a look at a node");
    let mut lines: Vec<String> = String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// What is in the second look and not in the first, but for the ledger's records and logs.
pub fn added(before: &[String], after: &[String]) -> Vec<String> {
    let mut had: BTreeMap<&str, usize> = BTreeMap::new();
    for line in before {
        *had.entry(line).or_default() += 1;
    }
    let mut new = Vec::new();
    for line in after {
        match had.get_mut(line.as_str()) {
            Some(n) if *n > 0 => *n -= 1,
            _ if line.starts_with("file /var/lib/slurm-vm/vms/slurm-") => {
                let rest = line.rsplit('/').next().unwrap_or_default();
                if !rest.starts_with("slurm-") && !["record.json", "serial.log", "journal.log"].contains(&rest) {
                    new.push(line.clone());
                }
            }
            _ => new.push(line.clone()),
        }
    }
    new
}

/// No node is down, drained or draining.
pub fn no_node_is_drained(lab: &Lab) {
    let said: Said = lab.exec("root", &["sinfo", "-h", "-N", "-o", "%N %T %E"]).into();
    let bad: BTreeSet<&str> = said
        .out
        .lines()
        .filter(|l| {
            ["drain", "down", "fail"]
                .iter()
                .any(|s| l.split(' ').nth(1).is_some_and(|state| state.contains(s)))
        })
        .collect();
    assert!(bad.is_empty(), "{bad:?}");
}
