//! The half of `bench plugin` that runs inside the lab: a hidden subcommand of xtask, copied to the lab's shared directory.

use super::stub;
use crate::{Result, error::At, proc};
use serde_json::{Value, json};
use std::{
    fs::{self, File},
    io::{BufRead, Read, Write},
    os::unix::{fs::OpenOptionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Runs what the hidden subcommand names: `clients DIR NODE NODE_WITHOUT` or `stub SOCKET FIFO`.
pub fn run(words: &[String]) -> Result<()> {
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["clients", dir, node, bare] => Clients::new(Path::new(dir), node, bare)?.serve(),
        ["stub", socket, fifo] => stub::serve(Path::new(socket), Path::new(fifo)),
        other => Err(format!("nothing of this name runs inside a lab: {other:?}").into()),
    }
}

/// The FIFO by which a batch script says that it runs.
pub const FIFO: &str = "begun";
/// The file that plugstack.conf is a link to.
pub const PLUGSTACK: &str = "plugstack.conf";
/// Which user runs the commands: alice.
const USER: u32 = 2001;
/// How long a job may take in all.
const PATIENCE: Duration = Duration::from_secs(60);

/// Times Slurm's clients on the login host.
struct Clients {
    dir: PathBuf,
    node: String,
    bare: String,
    fifo: File,
    /// Allocations on both nodes that stay, for steps: by node.
    standing: Vec<(String, String)>,
}

impl Clients {
    fn new(dir: &Path, node: &str, bare: &str) -> Result<Self> {
        let path = dir.join(FIFO);
        // Opened for both ends: then neither side waits for the other, and the end of a writer is not the end of the file.
        let fifo = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .at("open", &path)?;
        let standing = [node, bare].map(|n| Ok((n.to_owned(), allocation(n)?)));
        Ok(Self {
            dir: dir.into(),
            node: node.into(),
            bare: bare.into(),
            fifo,
            standing: standing.into_iter().collect::<Result<_>>()?,
        })
    }

    fn serve(&mut self) -> Result<()> {
        let mut out = std::io::stdout().lock();
        for line in std::io::stdin().lock().lines() {
            let line = line.at("read", "standard input")?;
            let answer = match line.split_once(' ') {
                Some((command, variant)) => self.turn(command, variant).unwrap_or_else(|e| json!({"error": e.to_string()})),
                None => json!({"error": format!("{line:?} is not COMMAND VARIANT")}),
            };
            writeln!(out, "{answer}")
                .and_then(|()| out.flush())
                .at("write", "standard output")?;
        }
        Ok(())
    }

    /// One command with one plugstack. Before it, outside the window: the last job is off its node, the plugstack is swapped on the login host
    /// and on the node at once (both read the same file).
    fn turn(&mut self, command: &str, variant: &str) -> Result<Value> {
        self.wait_idle()?;
        let (stack, vm) = match variant {
            "vm" => ("ours", true),
            other => (other, false),
        };
        let fresh = self.dir.join("plugstack.new");
        fs::copy(self.dir.join(format!("plugstack.{stack}")), &fresh).at("copy", &fresh)?;
        fs::rename(&fresh, self.dir.join(PLUGSTACK)).at("write", self.dir.join(PLUGSTACK))?;
        let node = if stack == "none" { self.bare.clone() } else { self.node.clone() };
        let mut args: Vec<&str> = vec!["-w", &node, "-n1", "--mem=512"];
        if vm {
            args.push("--vm=tiny");
        }
        let script = self.dir.join("script.sh");
        let script = script.to_string_lossy();
        match command {
            "srun" => {
                args.push("/bin/true");
                let t = time(&mut slurm("srun", &args))?;
                Ok(json!({"srun_ms": t.wall_ms, "srun_cpu_ms": t.cpu_ms}))
            }
            "step" => {
                let job = self.standing.iter().find(|(n, _)| *n == node).map_or("", |(_, job)| job);
                let job = format!("--jobid={job}");
                args.extend([job.as_str(), "--overlap", "/bin/true"]);
                let t = time(&mut slurm("srun", &args))?;
                Ok(json!({"step_ms": t.wall_ms, "step_cpu_ms": t.cpu_ms}))
            }
            "sbatch" => {
                args.extend(["--hold", "--parsable", "-o", "/dev/null", &script]);
                let t = time(&mut slurm("sbatch", &args))?;
                proc::run("scancel", &[&t.printed])?;
                Ok(json!({"sbatch_ms": t.wall_ms, "sbatch_cpu_ms": t.cpu_ms}))
            }
            "begin" => {
                args.extend(["-Q", "-o", "/dev/null", &script]);
                self.drain()?;
                let begin = Instant::now();
                time(&mut slurm("sbatch", &args))?;
                self.wait_begun()?;
                Ok(json!({"begun_ms": ms(begin.elapsed())}))
            }
            other => Err(format!("unknown command {other}").into()),
        }
    }

    fn wait_idle(&self) -> Result<()> {
        let stays = |job: &str| self.standing.iter().any(|(_, j)| j == job);
        let idle = || {
            proc::run("squeue", &["-h", "-o", "%i"])
                .ok()
                .filter(|text| text.lines().all(|job| stays(job.trim())))
        };
        proc::wait_for(PATIENCE, idle)
            .map(drop)
            .ok_or_else(|| format!("the last job is still there after {} s", PATIENCE.as_secs()).into())
    }

    fn drain(&mut self) -> Result<()> {
        let mut rest = [0; 64];
        loop {
            match self.fifo.read(&mut rest) {
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e).at("read", self.dir.join(FIFO)),
            }
        }
    }

    fn wait_begun(&mut self) -> Result<()> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        use std::os::fd::AsFd;
        let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.fifo.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, timeout)
            .map_err(std::io::Error::from)
            .at("wait for", self.dir.join(FIFO))?;
        if ready == 0 {
            return Err(format!("the batch script did not begin within {} s", PATIENCE.as_secs()).into());
        }
        Ok(())
    }
}

fn slurm(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command
        .args(args)
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("HOME", "/home/alice")
        .env("USER", "alice")
        .env("LANG", "C.UTF-8");
    command
        .uid(USER)
        .gid(USER)
        .current_dir("/tmp")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// An allocation on a node that stays.
fn allocation(node: &str) -> Result<String> {
    let output = slurm("salloc", &["--no-shell", "-w", node, "-n1", "--mem=1024"])
        .output()
        .at("run", "salloc")?;
    let text = String::from_utf8_lossy(&output.stderr);
    let granted = text.lines().find_map(|l| l.split_once("Granted job allocation "));
    granted
        .map(|(_, job)| job.trim().to_owned())
        .ok_or_else(|| format!("no allocation on {node}: {}", text.trim()).into())
}

/// What a command took, and what it printed.
struct Timed {
    wall_ms: f64,
    /// Processor time of the command itself: on a busy machine it tells more than the time that passed.
    cpu_ms: f64,
    printed: String,
}

/// Processor time of all children that were waited for.
fn children_ms() -> Result<f64> {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_CHILDREN)
        .map_err(std::io::Error::from)
        .at("ask for the use of", "processor time")?;
    let ms = |t: nix::sys::time::TimeVal| ms(Duration::from(nix::sys::time::TimeSpec::new(t.tv_sec(), t.tv_usec() * 1000)));
    Ok(ms(usage.user_time()) + ms(usage.system_time()))
}

/// From the start of the process to its end.
fn time(command: &mut Command) -> Result<Timed> {
    let used = children_ms()?;
    let begin = Instant::now();
    let child = command.spawn().at("run", command.get_program())?;
    let output = child.wait_with_output().at("wait for", command.get_program())?;
    let wall_ms = ms(begin.elapsed());
    if output.status.success() {
        Ok(Timed {
            wall_ms,
            cpu_ms: children_ms()? - used,
            printed: String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        })
    } else {
        Err(format!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()).into())
    }
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1000.0
}
