//! Starting a domain: from the overlay being there to the domain running.

use super::{
    Common, SHARED,
    helper::Helper,
    lab, machine,
    paired::{self, Question, Scale},
    publish,
    report::Report,
    stats::{median, quantile},
};
use crate::{Result, lab::Options, stage};

/// How many guests are booted for the figure that is shown apart.
const BOOTS: usize = 5;

/// Runs the bench.
pub fn run(common: &Common) -> Result<Report> {
    let built = stage::build_release()?;
    let lab = lab(
        common,
        Options {
            nodes: 1,
            ..Options::default()
        },
    )?;
    // The bench is the node's agent: two would look after the same domains.
    lab.stop("n1", "slurm-vmd")?;
    let program = publish(&lab, &built.join("examples/bench-start"))?;
    let dir = format!("{SHARED}/start");
    let mut helper = Helper::start(&lab, "n1", &[&program, "/etc/slurm-vm/slurm-vm.toml", &dir, "tiny"])?;
    let mut notes = machine::notes(&lab, "n1");

    let arms = ["direct", "agent", "direct again", "virsh create"];
    let words = ["direct", "agent", "direct", "virsh"];
    let question = |title: &str, number, base, goal| Question {
        title: title.into(),
        number,
        base,
        ours: 1,
        control: (0, 2),
        scale: Scale::Ratio,
        goal,
        goal_p95: None,
        margin: 0.05,
    };
    let questions = [
        question("overlay to running, ledger syncs apart", "ms", 0, Some(1.05)),
        question("overlay to running, ledger syncs apart", "ms", 3, Some(1.00)),
        question("overlay to running, ledger syncs included", "with_sync_ms", 0, None),
    ];
    let mut report = paired::run("start", &arms, &questions, common.limits(20, 2000), |arm| {
        let mut sample = helper.ask(words[arm])?;
        // Bare calls sync nothing: for them both numbers are the same.
        if let Some(ms) = sample.get("ms").copied() {
            sample.entry("with_sync_ms".into()).or_insert(ms);
        }
        Ok(sample)
    })?;

    let boots: Vec<f64> = (0..BOOTS)
        .filter_map(|_| helper.ask("boot").ok()?.get("boot_ms").copied())
        .collect();
    notes.push(machine::load("load average at the end"));
    notes.push(format!(
        "guest boot, from running to the helper's answer, shown apart: median {:.0} ms (min {:.0}, max {:.0}, n {})",
        median(&boots),
        quantile(&boots, 0.0),
        quantile(&boots, 1.0),
        boots.len()
    ));
    report.notes = notes;
    Ok(report)
}
