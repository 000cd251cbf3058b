//! A job without --vm is byte for byte what it is without the plugin.
mod common;

use std::collections::BTreeMap;

use common::{Alice, start};
use xtask::{Lab, Options};

/// What differs between two runs of anything.
const VOLATILE: [&str; 12] = [
    "SubmitTime",
    "EligibleTime",
    "AccrueTime",
    "StartTime",
    "EndTime",
    "LastSchedEval",
    "RunTime",
    "Scheduler",
    "SuspendTime",
    "AllocNode:Sid",
    "PreemptEligibleTime",
    "Priority",
];

/// What a few jobs without a VM show, by what was asked.
fn seen(lab: &Lab) -> BTreeMap<String, String> {
    let t = Alice::new(lab, "plain");
    let mut seen = BTreeMap::new();
    t.script(
        "env.sh",
        "#!/bin/bash\nenv | grep -v -e ^SLURM_JOB_START_TIME -e ^SLURM_JOB_END_TIME -e ^SLURM_TASK_PID -e ^SLURM_SUBMIT_HOST_TIME -e ^_= | sort\nulimit -a\numask\npwd\nreadlink /proc/self/fd/1\ngrep Sig /proc/self/status\necho to-err >&2\necho $0 \"$@\"\nexit 3\n",
    );
    t.script(
        "step.sh",
        "#!/bin/bash\nenv | grep SLURM | grep -v -e TIME -e PID -e PORT -e ADDR | sort\nls -l /proc/self/fd | awk '{print $9}'\n",
    );
    for (name, args) in [
        ("batch", "-o out.batch"),
        ("apart", "-o out.apart -e err.apart --open-mode=append"),
        ("asked", "-o out.asked -c2 --mem=300 --signal=B:USR1@30 --no-requeue -C vm"),
        ("array", "-o out.array --array=3"),
    ] {
        let job = t.submit(&format!("{args} env.sh one 'two three'"));
        t.end_of(job);
        seen.insert(format!("{name}: output"), t.text(&format!("out.{name}")));
        let fields: BTreeMap<String, String> = t.job(job).into_iter().filter(|(k, _)| !VOLATILE.contains(&k.as_str())).collect();
        seen.insert(format!("{name}: accounting"), format!("{fields:#?}"));
    }
    seen.insert("apart: errors".into(), t.text("err.apart"));
    for line in [
        "srun -l -n2 bash ./step.sh | sort",
        "salloc bash -c 'env | grep SLURM | grep -v TIME | grep -v PORT | sort; srun -n1 true'",
        "srun bash -c 'exit 9'",
        "srun bash -c 'kill -9 $$'",
        "echo in | srun cat",
        "sbatch nothing.sh",
        "sbatch --wrap=true --vim=x",
    ] {
        let said = t.sh(line);
        // What Slurm says of waiting depends on how long it waited.
        let waits = [
            "queued and waiting",
            "has been allocated",
            "Pending job",
            "Waiting for resource",
            "ready for job",
            "revoked",
        ];
        let err: Vec<&str> = said.err.lines().filter(|l| !waits.iter().any(|w| l.contains(w))).collect();
        seen.insert(line.into(), format!("{:?}\n{}\n{}", said.code, said.out, err.join("\n")));
    }
    seen
}

#[test]
fn a_job_without_a_vm_is_the_same_with_and_without_the_plugin() {
    let options = |plugin| Options {
        plugin,
        grace_s: 20,
        nodes: 1,
        ..Options::named("t-plain")
    };
    let without = {
        let lab = start(&options(false), &[]);
        let seen = seen(&lab);
        lab.down().expect("down");
        seen
    };
    let lab = start(&options(true), &[]);
    assert!(
        Alice::new(&lab, "plain").sh("sbatch --help").out.contains("--vm=image"),
        "the plugin is not loaded"
    );
    let with = seen(&lab);
    let mut different = Vec::new();
    for (what, before) in &without {
        let now = &with[what];
        for line in before.lines().filter(|l| !now.lines().any(|n| n == *l)) {
            different.push(format!("{what}: only without the plugin: {line}"));
        }
        for line in now.lines().filter(|l| !before.lines().any(|n| n == *l)) {
            different.push(format!("{what}: only with the plugin: {line}"));
        }
        if different.is_empty() && before != now {
            different.push(format!("{what}: in another order"));
        }
    }
    assert!(different.is_empty(), "{}", different.join("\n"));
}
