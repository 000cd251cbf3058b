//! What an agent and the controller pay at scale, over fakes in memory: the cost of one operation with few and with many VMs and nodes.

use super::{
    Common,
    helper::Helper,
    paired::{self, Question, Scale},
    report::Report,
    stats::median,
};
use crate::{Result, stage};
use std::process::Command;

/// Runs the bench; it needs no lab.
pub fn run(common: &Common) -> Result<Report> {
    let built = stage::build_release()?;
    let mut helper = Helper::of(&mut Command::new(built.join("examples/bench-scale")))?;
    let arms = [
        "10 VMs",
        "1,000 VMs",
        "10,000 VMs",
        "10 VMs again",
        "100 nodes",
        "2,000 nodes",
        "100 nodes again",
    ];
    let words = ["vms 10", "vms 1000", "vms 10000", "vms 10", "nodes 100", "nodes 2000", "nodes 100"];
    let question = |title: &str, number, (base, ours, again), goal| Question {
        title: title.into(),
        number,
        base,
        ours,
        control: (base, again),
        scale: Scale::Ratio,
        goal,
        goal_p95: None,
        margin: 0.1,
    };
    let questions = [
        question(
            "a VM's prolog to epilog, beside 10,000 that ended",
            "cycle_ms",
            (0, 2, 3),
            Some(1.2),
        ),
        question("a VM's prolog to epilog, beside 1,000 that ended", "cycle_ms", (0, 1, 3), None),
        question("a status, 10,000 ended", "status_ms", (0, 2, 3), None),
        question("a status, 10,000 ended against 1,000", "status_ms", (1, 2, 3), None),
        question("a destination among 2,000 nodes against 100", "place_ms", (4, 5, 6), None),
    ];
    let mut report = paired::run("scale", &arms, &questions, common.limits(20, 200), |arm| helper.ask(words[arm]))?;
    for (arm, name) in arms.iter().enumerate() {
        for number in ["cycle_ms", "status_ms", "place_ms"] {
            let values: Vec<f64> = report.rounds.iter().filter_map(|r| r[arm].get(number).copied()).collect();
            if !values.is_empty() {
                report.notes.push(format!("{name}: {number} {:.3} (median)", median(&values)));
            }
        }
    }
    Ok(report)
}
