//! From the submission of a job that preempts to its first line, and what work the preempted job does again.
//!
//! Real agents and controller. One job in `low` fills a node and counts; a job in `high` asks for just that node. `plain`: a job without a VM, which
//! Slurm requeues when GraceTime is over. `vm`: a job with `--vm`, whose VM moves to another node. `three`: three such jobs on three nodes, and a
//! job in `high` that asks for these three.

use super::{
    Common, lab, lines, machine,
    paired::{self, Question, Sample, Scale},
    report::Report,
};
use crate::{
    Result,
    error::At,
    lab::{CTL, Lab, Options},
    paths, proc,
};
use std::{path::PathBuf, time::Duration};

/// GraceTime of the lab, in seconds.
const GRACE: u32 = 20;
/// The counting job has done this much before it is preempted.
const COUNTED: usize = 15;
/// One step of it.
const STEP_S: f64 = 0.2;
/// Nodes of the lab: three that are vacated, three to move to.
const NODES: u8 = 6;
const PATIENCE: Duration = Duration::from_secs(180);
const COUNT: &str = "#!/bin/sh\ni=0\nwhile :; do\n    echo $i\n    i=$((i + 1))\n    sleep 0.2\ndone\n";
const HIGH: &str = "#!/bin/sh\ndate +%s.%N\n";

struct Bench {
    lab: Lab,
    home: PathBuf,
    turns: u32,
}

impl Bench {
    /// Runs a command on the login host as alice and gives what it printed.
    fn alice(&self, argv: &[&str]) -> Result<String> {
        let output = self
            .lab
            .command(CTL, "alice", argv)?
            .stdin(std::process::Stdio::null())
            .output()
            .at("run", "xtask")?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        } else {
            Err(format!("{argv:?}: {}", proc::text_of(&output)).into())
        }
    }

    fn wait<T>(&self, what: &str, look: impl FnMut() -> Option<T>) -> Result<T> {
        proc::wait_for(PATIENCE, look).ok_or_else(|| format!("{what}: not within {} s", PATIENCE.as_secs()).into())
    }

    fn file(&self, name: &str) -> String {
        std::fs::read_to_string(self.home.join(name)).unwrap_or_default()
    }

    fn state(&self, job: &str) -> Option<(String, String)> {
        let text = self.alice(&["squeue", "-h", "-j", job, "-o", "%T %N"]).ok()?;
        let (state, node) = text.split_once(' ').unwrap_or((&text, ""));
        Some((state.to_owned(), node.to_owned()))
    }

    fn clear(&self) -> Result<()> {
        self.alice(&["scancel", "-u", "alice"])?;
        self.wait("an empty cluster", || {
            let idle = self
                .alice(&["sinfo", "-h", "-N", "-p", "low", "-o", "%T"])
                .ok()?
                .lines()
                .all(|state| state == "idle");
            (idle && self.alice(&["squeue", "-h"]).ok()?.is_empty()).then_some(())
        })
    }

    fn turn(&mut self, arm: &Arm) -> Result<Sample> {
        self.clear()?;
        self.turns += 1;
        let high_out = format!("high-{}.out", self.turns);
        let mut low = Vec::new();
        for k in 0..arm.nodes {
            let out = format!("low-{}-{k}.out", self.turns);
            let options = [
                "sbatch",
                "--parsable",
                "--requeue",
                "--open-mode=append",
                "-c2",
                "--mem=1024",
                "-o",
                &out,
            ];
            let vm = arm.vm.then_some("--vm=tiny");
            let argv: Vec<&str> = options.into_iter().chain(vm).chain(["count.sh"]).collect();
            let job = self.alice(&argv)?;
            low.push(Low {
                job,
                out,
                node: String::new(),
            });
        }
        for l in &mut low {
            self.wait("the low job counting", || {
                (self.file(&l.out).lines().count() > COUNTED).then_some(())
            })?;
            (_, l.node) = self.state(&l.job).ok_or("the low job is gone")?;
        }
        let names: Vec<&str> = low.iter().map(|l| l.node.as_str()).collect();
        let (nodes, count) = (names.join(","), names.len());
        let script =
            format!("date +%s.%N; exec sbatch --parsable -p high -w {nodes} -N{count} --ntasks-per-node=1 -c2 -o {high_out} high.sh");
        let text = self.alice(&["sh", "-c", &script])?;
        let asked: f64 = text.lines().next().and_then(|l| l.parse().ok()).ok_or("no time of submission")?;
        let begun: f64 = self.wait("the high job", || self.file(&high_out).trim().parse().ok())?;
        let mut sample = Sample::from([("high_s".to_owned(), begun - asked)]);
        let mut again = 0.0;
        for l in &low {
            if arm.vm {
                // Back at work: it runs on another node and has counted on.
                let had = self.file(&l.out).lines().count();
                self.wait("the low job on its new node", || {
                    let (state, at) = self.state(&l.job)?;
                    (state == "RUNNING" && at != l.node && self.file(&l.out).lines().count() > had + 5).then_some(())
                })?;
                again += redone(&self.file(&l.out))?;
            } else {
                // It begins at its beginning, whenever Slurm runs it next: all it had counted is to be counted again.
                let numbers = self.file(&l.out).lines().filter(|l| l.parse::<u32>().is_ok()).count();
                again += f64::from(u32::try_from(numbers).unwrap_or(u32::MAX)) * STEP_S;
            }
        }
        sample.insert("redone_s".into(), again);
        Ok(sample)
    }
}

/// What is preempted in an arm.
struct Arm {
    title: &'static str,
    vm: bool,
    nodes: usize,
}

const ARMS: [Arm; 5] = [
    Arm {
        title: "plain requeue",
        vm: false,
        nodes: 1,
    },
    Arm {
        title: "--vm, live move",
        vm: true,
        nodes: 1,
    },
    Arm {
        title: "plain again",
        vm: false,
        nodes: 1,
    },
    Arm {
        title: "--vm, three nodes",
        vm: true,
        nodes: 3,
    },
    Arm {
        title: "--vm again",
        vm: true,
        nodes: 1,
    },
];

/// A job that is preempted.
struct Low {
    job: String,
    out: String,
    node: String,
}

/// How much of a counter's output was counted again, in seconds of its work. A number that is missing is an error.
fn redone(text: &str) -> Result<f64> {
    let mut again = 0u32;
    let mut next = 0u32;
    // A last line without its end is still being written.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    for line in whole.lines() {
        let n: u32 = line.parse().map_err(|_| format!("{line:?} is not a number of the counter"))?;
        if n > next {
            return Err(format!("the output goes from {} to {n}", next.saturating_sub(1)).into());
        }
        again += next - n;
        next = n + 1;
    }
    Ok(f64::from(again) * STEP_S)
}

/// Runs the bench. `line_mbit`: what each node can send, in Mbit/s; 0: as much as the machine's memory carries.
pub fn run(common: &Common, line_mbit: u32) -> Result<Report> {
    let lab = lab(
        common,
        Options {
            nodes: NODES,
            grace_s: GRACE,
            release: true,
            ..Options::default()
        },
    )?;
    for node in (1..=NODES).map(|k| format!("n{k}")) {
        lines(&lab, &node, line_mbit)?;
    }
    let home = lab.shared().join("home/alice");
    paths::file(home.join("count.sh"), 0o755, COUNT)?;
    paths::file(home.join("high.sh"), 0o755, HIGH)?;
    let mut notes = machine::notes(&lab, "n1");
    notes.push(machine::line(line_mbit));
    notes.push(format!(
        "GraceTime {GRACE} s; nothing signals the plain job before its end, as Slurm does by default"
    ));
    let mut bench = Bench { lab, home, turns: 0 };

    let question = |title: &str, (base, ours), control, goal| Question {
        title: title.into(),
        number: "high_s",
        base,
        ours,
        control,
        scale: Scale::Ratio,
        goal: Some(goal),
        goal_p95: None,
        margin: 0.1,
    };
    let questions = [
        question("submission of the high job until its first line", (0, 1), (0, 2), 1.0),
        question("the same for three nodes, compared with one", (1, 3), (1, 4), 1.5),
    ];
    let titles = ARMS.map(|arm| arm.title);
    let mut report = paired::run("preempt", &titles, &questions, common.limits(10, 200), |arm| bench.turn(&ARMS[arm]))?;
    for (k, arm) in ARMS.iter().enumerate().filter(|(_, arm)| arm.vm) {
        let redone = report.column(k, "redone_s");
        let worst = redone.iter().copied().fold(0.0, f64::max);
        notes.push(format!(
            "work done again, {}: at most {worst:.1} s in {} preemptions (goal 0: {})",
            arm.title,
            redone.len(),
            if redone.is_empty() {
                "not seen"
            } else if worst == 0.0 {
                "reached"
            } else {
                "MISSED"
            }
        ));
    }
    notes.push(machine::load("load average at the end"));
    report.notes = notes;
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::redone;

    #[test]
    fn work_that_is_done_again_is_counted_and_a_gap_is_an_error() {
        assert!(redone("0\n1\n2\n3").unwrap().abs() < 1e-9);
        assert!((redone("0\n1\n2\n0\n1\n2\n3\n").unwrap() - 0.6).abs() < 1e-9);
        assert!(redone("0\n1\n3\n").is_err());
        assert!(redone("0\nslurm-vm: gone\n").is_err());
    }
}
