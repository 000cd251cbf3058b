//! Rounds: each arm once per round, in random order, until the control is quiet enough or time is up.
//!
//! Two arms of every bench do the same (the base and its control): what they differ by is noise, and nothing smaller than that is claimed.

use super::{
    report::{Answer, Finding, Report},
    stats::{Interval, Random, interval},
};
use crate::Result;
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// What one turn of an arm gave: numbers by name, times in milliseconds.
pub type Sample = BTreeMap<String, f64>;

/// How two arms are compared, turn by turn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scale {
    /// Ours divided by base; the goal is a ratio.
    Ratio,
    /// Ours less base, in the unit of the samples; the goal is such a difference.
    Difference,
}

impl Scale {
    fn compare(self, base: f64, ours: f64) -> f64 {
        match self {
            Self::Ratio => (ours / base).ln(),
            Self::Difference => ours - base,
        }
    }

    fn back(self, value: f64) -> f64 {
        match self {
            Self::Ratio => value.exp(),
            Self::Difference => value,
        }
    }
}

/// One question of a bench.
#[derive(Debug, Clone)]
pub struct Question {
    /// What is asked, for people.
    pub title: String,
    /// Which number of the samples.
    pub number: &'static str,
    /// Index of the arm that is compared with.
    pub base: usize,
    /// Index of the arm that is judged.
    pub ours: usize,
    /// Two arms that do the same: the base twice, if it is run twice.
    pub control: (usize, usize),
    /// How.
    pub scale: Scale,
    /// Goal for the median; none for what is only shown.
    pub goal: Option<f64>,
    /// Goal for the ratio of the 95th percentiles.
    pub goal_p95: Option<f64>,
    /// How much counts: the run ends when every control is known to half of it.
    pub margin: f64,
}

/// How long and how often.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Never longer than this.
    pub time: Duration,
    /// Never fewer rounds, unless time is up.
    pub least: usize,
    /// Never more rounds.
    pub most: usize,
    /// For order and intervals.
    pub seed: u64,
}

/// Rounds between two looks at the control.
const LOOK_EVERY: usize = 5;
/// So many failed turns end a bench.
const FAILURES: usize = 5;

/// Runs rounds of all arms. `turn` takes the index of an arm and gives its sample; it prepares and cleans up outside what it measures.
pub fn run(
    bench: &str,
    arms: &[&str],
    questions: &[Question],
    limits: Limits,
    mut turn: impl FnMut(usize) -> Result<Sample>,
) -> Result<Report> {
    let begun = Instant::now();
    let mut random = Random::new(limits.seed);
    let mut report = Report::new(bench, arms, limits.seed);
    eprintln!("bench {bench}: seed {}, at most {} s", limits.seed, limits.time.as_secs());
    // The first turn of each arm pays for cold caches and is not counted.
    for arm in random.order(arms.len()) {
        turn(arm)?;
    }
    let mut failures = 0;
    while begun.elapsed() < limits.time && report.rounds.len() < limits.most {
        let mut round = vec![Sample::new(); arms.len()];
        let mut whole = true;
        for arm in random.order(arms.len()) {
            match turn(arm) {
                Ok(sample) => round[arm] = sample,
                Err(e) => {
                    failures += 1;
                    eprintln!("bench {bench}: {}: {e}", arms[arm]);
                    report.failures.push(format!("{}: {e}", arms[arm]));
                    whole = false;
                    break;
                }
            }
        }
        if failures >= FAILURES {
            report.stopped = format!("{failures} turns failed");
            break;
        }
        if !whole {
            continue;
        }
        report.rounds.push(round);
        let n = report.rounds.len();
        if n >= limits.least && n.is_multiple_of(LOOK_EVERY) {
            // What is only shown does not prolong a run.
            let quiet = questions.iter().filter(|q| q.goal.is_some()).all(|q| {
                let noise = control(&report, q, limits.seed).reach(0.0);
                noise < half_margin(q)
            });
            if n.is_multiple_of(LOOK_EVERY * 4) {
                let noise: Vec<String> = questions
                    .iter()
                    .map(|q| format!("{:.4}", control(&report, q, limits.seed).reach(0.0)))
                    .collect();
                eprintln!(
                    "bench {bench}: {n} rounds, {:.0} s, noise {}",
                    begun.elapsed().as_secs_f64(),
                    noise.join(" ")
                );
            }
            if quiet {
                report.stopped = "every control is known to half its margin".into();
                break;
            }
        }
    }
    if report.stopped.is_empty() {
        report.stopped = if report.rounds.len() >= limits.most {
            "all rounds are done".into()
        } else {
            "time is up".into()
        };
    }
    report.seconds = begun.elapsed().as_secs_f64();
    let findings: Vec<Finding> = questions.iter().map(|q| finding(&report, q, limits.seed)).collect();
    report.findings = findings;
    Ok(report)
}

fn half_margin(q: &Question) -> f64 {
    match q.scale {
        Scale::Ratio => (1.0 + q.margin / 2.0).ln(),
        Scale::Difference => q.margin / 2.0,
    }
}

fn values(report: &Report, q: &Question, base: usize, ours: usize) -> Vec<f64> {
    report
        .rounds
        .iter()
        .filter_map(|round| {
            let value = q.scale.compare(*round[base].get(q.number)?, *round[ours].get(q.number)?);
            value.is_finite().then_some(value)
        })
        .collect()
}

fn control(report: &Report, q: &Question, seed: u64) -> Interval {
    interval(&values(report, q, q.control.0, q.control.1), 0.5, &mut Random::new(seed ^ 1))
}

fn finding(report: &Report, q: &Question, seed: u64) -> Finding {
    let of_control = control(report, q, seed);
    let ours = interval(&values(report, q, q.base, q.ours), 0.5, &mut Random::new(seed ^ 2));
    let (shown, shown_control) = (ours.map(|v| q.scale.back(v)), of_control.map(|v| q.scale.back(v)));
    let smallest = q.scale.back(of_control.reach(0.0));
    let answer = q.goal.map(|goal| Answer::of(shown, goal));
    let p95 = (q.scale == Scale::Ratio).then(|| ratio_of_p95(report, q, (q.base, q.ours), seed ^ 3));
    let p95_control = (q.scale == Scale::Ratio).then(|| ratio_of_p95(report, q, q.control, seed ^ 4));
    Finding {
        title: q.title.clone(),
        number: q.number.into(),
        scale: q.scale,
        base: q.base,
        ours: q.ours,
        value: shown,
        control: shown_control,
        smallest,
        goal: q.goal,
        answer,
        p95_answer: q.goal_p95.zip(p95).map(|(goal, p95)| (goal, Answer::of(p95, goal))),
        p95,
        p95_control,
    }
}

/// The 95th percentile of ours by that of the base, with its interval: rounds are drawn anew, so that pairs stay together.
fn ratio_of_p95(report: &Report, q: &Question, (base, ours): (usize, usize), seed: u64) -> Interval {
    let pairs: Vec<(f64, f64)> = report
        .rounds
        .iter()
        .filter_map(|r| Some((*r[base].get(q.number)?, *r[ours].get(q.number)?)))
        .collect();
    super::stats::paired_interval(&pairs, &mut Random::new(seed), |base, ours| {
        super::stats::quantile(ours, 0.95) / super::stats::quantile(base, 0.95)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(goal: f64) -> Question {
        Question {
            title: "test".into(),
            number: "ms",
            base: 0,
            ours: 1,
            control: (0, 2),
            scale: Scale::Ratio,
            goal: Some(goal),
            goal_p95: None,
            margin: 0.05,
        }
    }

    fn limits(most: usize) -> Limits {
        Limits {
            time: Duration::from_secs(60),
            least: 10,
            most,
            seed: 5,
        }
    }

    fn sample(ms: f64) -> Sample {
        Sample::from([("ms".to_owned(), ms)])
    }

    #[test]
    fn a_quiet_control_ends_the_run_and_a_slower_arm_is_seen() {
        let mut noise = Random::new(9);
        let mut turn = |arm: usize| {
            let jitter = f64::from(u32::try_from(noise.below(100)).unwrap()) / 100.0;
            Ok(sample(if arm == 1 { 110.0 } else { 100.0 } + jitter))
        };
        let report = run("test", &["base", "ours", "control"], &[question(1.05)], limits(1000), &mut turn).unwrap();
        assert_eq!(report.rounds.len(), 10, "{}", report.stopped);
        let found = &report.findings[0];
        assert!((found.value.at - 1.1).abs() < 0.01, "{found:?}");
        assert_eq!(found.answer, Some(Answer::Missed));
    }

    #[test]
    fn what_lies_below_the_noise_is_called_not_resolved() {
        let mut noise = Random::new(9);
        let mut turn = |arm: usize| {
            let jitter = f64::from(u32::try_from(noise.below(100)).unwrap());
            Ok(sample(if arm == 1 { 103.0 } else { 100.0 } + jitter))
        };
        let report = run("test", &["base", "ours", "control"], &[question(1.02)], limits(30), &mut turn).unwrap();
        let found = &report.findings[0];
        assert_eq!(found.answer, Some(Answer::NotResolved), "{found:?}");
        assert!(found.smallest > 1.01, "{found:?}");
        assert_eq!(report.stopped, "all rounds are done");
    }

    #[test]
    fn a_failed_turn_drops_its_round_and_many_end_the_bench() {
        let mut calls = 0;
        let report = run("test", &["base", "ours", "control"], &[question(1.02)], limits(30), |_| {
            calls += 1;
            if calls > 3 && calls % 4 == 0 {
                Err("no".into())
            } else {
                Ok(sample(1.0))
            }
        })
        .unwrap();
        assert_eq!(report.failures.len(), 5);
        assert!(report.stopped.contains("failed"), "{}", report.stopped);
    }
}
