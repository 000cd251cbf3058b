//! What the plugin costs: commands without `--vm` against a no-op plugin and against none, and with `--vm` against a stub of the agent.
//!
//! Two nodes. n1's slurmd was started with a plugin that has a prolog and an epilog, so that it forks for them in every turn; its plugstack and the
//! login host's are one file, which is swapped before each turn: the plugins are compared on the same node and the same daemons. n2's slurmd was
//! started without a plugin: the arm "none" runs there.

use super::{
    Common, SHARED,
    helper::Helper,
    inside, lab, machine,
    paired::{self, Question, Sample, Scale},
    publish,
    report::Report,
    set_up, shared,
};
use crate::{
    Result,
    error::At,
    lab::{CTL, Lab, Options},
    paths, proc, stage,
};
use std::os::unix::fs::PermissionsExt;

const NOOP: &str = include_str!("noop.c");
const PLUGSTACK: &str = "/etc/slurm/plugstack.conf";

/// In every so manieth round a batch job is run to its script.
const BEGIN_EVERY: usize = 8;

/// Runs the bench.
pub fn run(common: &Common) -> Result<Report> {
    let built = stage::build_release()?;
    let lab = lab(
        common,
        Options {
            nodes: 2,
            plugin: false,
            // The stub answers no peers, and the controller role would take the feature `vm` from its node.
            ..Options::default()
        },
    )?;
    for host in [CTL, "n1", "n2"] {
        lab.stop(host, "slurm-vmd")?;
    }
    let plugin = publish(&lab, &built.join("libspank_vm.so"))?;
    let shim = publish(&lab, &built.join("slurm-vm-run"))?;
    let xtask = publish(&lab, &paths::xtask()?)?;
    let noop = no_op_plugin(&lab)?;
    let dir = shared(&lab);
    paths::file(dir.join("plugstack.none"), 0o644, "")?;
    paths::file(dir.join("plugstack.noop"), 0o644, format!("required {noop}\n"))?;
    paths::file(dir.join("plugstack.ours"), 0o644, format!("required {plugin} run={shim}\n"))?;
    paths::file(dir.join(inside::PLUGSTACK), 0o644, format!("required {noop}\n"))?;
    paths::file(
        dir.join("script.sh"),
        0o755,
        format!("#!/bin/sh\necho x > {SHARED}/{}\n", inside::FIFO),
    )?;
    let fifo = dir.join(inside::FIFO);
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o666)).at("make", &fifo)?;
    std::fs::set_permissions(&fifo, std::fs::Permissions::from_mode(0o666)).at("set the mode of", &fifo)?;
    for host in [CTL, "n1"] {
        let plugstack = format!("{SHARED}/{}", inside::PLUGSTACK);
        set_up(&lab, host, &["ln", "-sf", &plugstack, PLUGSTACK])?;
    }
    // slurmd learns at its start whether there is a prolog.
    lab.stop("n1", "slurmd")?;
    lab.start("n1", "slurmd")?;

    let socket = "/run/slurm-vm/agent.sock";
    let mut stub = Helper::start(
        &lab,
        "n1",
        &[&xtask, "bench-inside", "stub", socket, &format!("{SHARED}/{}", inside::FIFO)],
    )?;
    stub.hear()?;
    let mut clients = Helper::start(&lab, CTL, &[&xtask, "bench-inside", "clients", SHARED, "n1", "n2"])?;
    let mut notes = machine::notes(&lab, "n1");

    let arms = ["no-op plugin", "our plugin", "no-op again", "no plugin (n2)", "our plugin, --vm"];
    let words = ["noop", "ours", "noop", "none", "vm"];
    let question = |title: &str, number, ours, scale, goal, margin| Question {
        title: title.into(),
        number,
        base: 0,
        ours,
        control: (0, 2),
        scale,
        goal,
        goal_p95: None,
        margin,
    };
    let ratio = |title, number, ours, goal| question(title, number, ours, Scale::Ratio, goal, 0.02);
    let more = |title, number, goal| question(title, number, 4, Scale::Difference, goal, 5.0);
    let against_none = |q: Question| Question { base: 3, goal: None, ..q };
    let srun = ratio("srun /bin/true, a job of its own", "srun_ms", 1, Some(1.02));
    let step = ratio("srun /bin/true, a step of an allocation", "step_ms", 1, Some(1.02));
    let sbatch = ratio("sbatch, the command", "sbatch_ms", 1, Some(1.02));
    let questions = [
        srun.clone(),
        step.clone(),
        sbatch.clone(),
        more("srun --vm, a job of its own, stubbed agent (ms)", "srun_ms", Some(5.0)),
        more("srun --vm, a step of an allocation, stubbed agent (ms)", "step_ms", Some(5.0)),
        more("sbatch --vm, the command (ms)", "sbatch_ms", Some(5.0)),
        ratio("srun in a job of its own, processor time of srun", "srun_cpu_ms", 1, None),
        ratio("srun in an allocation, processor time of srun", "step_cpu_ms", 1, None),
        ratio("sbatch, processor time of sbatch", "sbatch_cpu_ms", 1, None),
        more("sbatch --vm, processor time of sbatch (ms)", "sbatch_cpu_ms", None),
        against_none(srun),
        against_none(step),
        against_none(sbatch),
        ratio("sbatch until the script runs", "begun_ms", 1, None),
        more("sbatch --vm until the program would begin, stubbed agent (ms)", "begun_ms", None),
    ];
    let mut turns = 0;
    let mut report = paired::run("plugin", &arms, &questions, common.limits(20, 5000), |arm| {
        let mut sample = Sample::new();
        for command in ["srun", "step", "sbatch"] {
            sample.extend(clients.ask(&format!("{command} {}", words[arm]))?);
        }
        // A whole batch job takes most of a second, nearly all of it slurmctld's own timers: it is looked at now and then only.
        if (turns / arms.len()).is_multiple_of(BEGIN_EVERY) {
            sample.extend(clients.ask(&format!("begin {}", words[arm]))?);
        }
        turns += 1;
        Ok(sample)
    })?;
    notes.push(machine::load("load average at the end"));
    report.notes = notes;
    stub.kill();
    Ok(report)
}

/// Builds the no-op plugin and gives its path in the lab.
fn no_op_plugin(lab: &Lab) -> Result<String> {
    let dir = paths::target().join("bench");
    paths::dir(&dir, 0o755)?;
    let (source, library) = (dir.join("noop.c"), dir.join("spank_noop.so"));
    paths::file(&source, 0o644, NOOP)?;
    let (from, to) = (source.to_string_lossy(), library.to_string_lossy());
    proc::run("cc", &["-O2", "-shared", "-fPIC", "-o", &to, &from])?;
    publish(lab, &library)
}
