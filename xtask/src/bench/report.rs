//! What a bench found, for people and as JSON.

use super::{
    paired::{Sample, Scale},
    stats::{Interval, median, quantile},
};
use serde_json::{Value, json};
use std::fmt::Write;

/// Whether a goal was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The whole interval is at or below the goal.
    Reached,
    /// The whole interval is above the goal.
    Missed,
    /// The goal lies within the interval.
    NotResolved,
}

impl Answer {
    /// Judges a value by a goal that is an upper limit.
    pub fn of(value: Interval, goal: f64) -> Self {
        if value.high <= goal {
            Self::Reached
        } else if value.low > goal {
            Self::Missed
        } else {
            Self::NotResolved
        }
    }

    /// For people.
    pub fn text(self) -> &'static str {
        match self {
            Self::Reached => "reached",
            Self::Missed => "MISSED",
            Self::NotResolved => "not resolved",
        }
    }
}

/// The answer to one question.
#[derive(Debug, Clone)]
pub struct Finding {
    /// What was asked.
    pub title: String,
    /// Which number of the samples.
    pub number: String,
    /// How the arms were compared.
    pub scale: Scale,
    /// Index of the arm compared with.
    pub base: usize,
    /// Index of the arm judged.
    pub ours: usize,
    /// Median over the pairs.
    pub value: Interval,
    /// The same for base against base.
    pub control: Interval,
    /// The smallest ratio (or difference) that this run could have told from none.
    pub smallest: f64,
    /// Upper limit for the median.
    pub goal: Option<f64>,
    /// Whether it holds.
    pub answer: Option<Answer>,
    /// Ratio of the 95th percentiles.
    pub p95: Option<Interval>,
    /// The same for base against base.
    pub p95_control: Option<Interval>,
    /// Its upper limit, and whether it holds.
    pub p95_answer: Option<(f64, Answer)>,
}

/// A whole run.
#[derive(Debug, Clone)]
pub struct Report {
    /// Which bench.
    pub bench: String,
    /// The arms' names.
    pub arms: Vec<String>,
    /// Seed of order and intervals.
    pub seed: u64,
    /// One sample per arm and round.
    pub rounds: Vec<Vec<Sample>>,
    /// Turns that failed.
    pub failures: Vec<String>,
    /// Why it ended.
    pub stopped: String,
    /// How long it took.
    pub seconds: f64,
    /// Answers.
    pub findings: Vec<Finding>,
    /// What is worth saying beside: how it was measured, on what.
    pub notes: Vec<String>,
}

impl Report {
    /// An empty one.
    pub fn new(bench: &str, arms: &[&str], seed: u64) -> Self {
        Self {
            bench: bench.into(),
            arms: arms.iter().map(|a| (*a).to_owned()).collect(),
            seed,
            rounds: Vec::new(),
            failures: Vec::new(),
            stopped: String::new(),
            seconds: 0.0,
            findings: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// All values of one number of one arm.
    pub fn column(&self, arm: usize, number: &str) -> Vec<f64> {
        self.rounds.iter().filter_map(|r| r[arm].get(number).copied()).collect()
    }

    /// For a terminal.
    pub fn text(&self) -> String {
        let mut out = format!(
            "bench {}: {} rounds of {} arms in {:.0} s, seed {}; ended because {}\n",
            self.bench,
            self.rounds.len(),
            self.arms.len(),
            self.seconds,
            self.seed,
            self.stopped
        );
        for note in &self.notes {
            let _ = writeln!(out, "  {note}");
        }
        for f in &self.findings {
            out.push_str(&self.finding_text(f));
        }
        let _ = writeln!(
            out,
            "\n{:34} {:>5} {:>10} {:>10} {:>10}",
            "absolute values (secondary)", "n", "min", "median", "p95"
        );
        let mut numbers: Vec<&String> = self.rounds.iter().flatten().flat_map(Sample::keys).collect();
        numbers.sort();
        numbers.dedup();
        for number in numbers {
            for (k, arm) in self.arms.iter().enumerate() {
                let column = self.column(k, number);
                if !column.is_empty() {
                    let (least, mid, high) = (quantile(&column, 0.0), median(&column), quantile(&column, 0.95));
                    let _ = writeln!(
                        out,
                        "{:34} {:>5} {least:>10.3} {mid:>10.3} {high:>10.3}",
                        format!("{number}  {arm}"),
                        column.len()
                    );
                }
            }
        }
        if !self.failures.is_empty() {
            let _ = writeln!(out, "\n{} turns failed; their rounds are not counted:", self.failures.len());
            for f in &self.failures {
                let _ = writeln!(out, "  {f}");
            }
        }
        out
    }

    fn finding_text(&self, f: &Finding) -> String {
        let unit = |v: f64| match f.scale {
            Scale::Ratio => format!("{v:.3}"),
            Scale::Difference => format!("{v:+.2}"),
        };
        if !f.value.low.is_finite() {
            return format!("\n{}: too few pairs\n", f.title);
        }
        let line = |i: &Interval| format!("{}  [{} .. {}]", unit(i.at), unit(i.low), unit(i.high));
        let what = match f.scale {
            Scale::Ratio => "ratio",
            Scale::Difference => "difference",
        };
        let mut out = format!("\n{}: {} against {}\n", f.title, self.arms[f.ours], self.arms[f.base]);
        let _ = writeln!(out, "  median {what}   {}", line(&f.value));
        let _ = writeln!(
            out,
            "  control         {}   smallest {what} told apart: {}",
            line(&f.control),
            unit(f.smallest)
        );
        let none = match f.scale {
            Scale::Ratio => 1.0,
            Scale::Difference => 0.0,
        };
        // A finding within what base differs from itself is no finding.
        let within = match f.scale {
            Scale::Ratio => f.value.at.ln().abs() < f.smallest.ln(),
            Scale::Difference => f.value.at.abs() < f.smallest,
        };
        if within {
            let _ = writeln!(out, "  against {none:.0}: below the noise, not resolved");
        }
        if let (Some(goal), Some(answer)) = (f.goal, f.answer) {
            let _ = writeln!(out, "  goal <= {}: {}", unit(goal), answer.text());
        }
        if let (Some(p95), Some(control)) = (&f.p95, &f.p95_control) {
            let _ = write!(out, "  p95 ratio       {}   control {}", line(p95), line(control));
            match f.p95_answer {
                Some((goal, answer)) => {
                    let _ = writeln!(out, "   goal <= {goal:.2}: {}", answer.text());
                }
                None => out.push('\n'),
            }
        }
        out
    }

    /// For programs: everything, raw samples included.
    pub fn json(&self) -> Value {
        let interval = |i: &Interval| json!({"at": finite(i.at), "low": finite(i.low), "high": finite(i.high)});
        let findings: Vec<Value> = self
            .findings
            .iter()
            .map(|f| {
                json!({
                    "title": f.title,
                    "number": f.number,
                    "scale": match f.scale { Scale::Ratio => "ratio", Scale::Difference => "difference" },
                    "base": self.arms[f.base],
                    "ours": self.arms[f.ours],
                    "median": interval(&f.value),
                    "control": interval(&f.control),
                    "smallest": finite(f.smallest),
                    "goal": f.goal,
                    "answer": f.answer.map(Answer::text),
                    "p95": f.p95.as_ref().map(interval),
                    "p95_control": f.p95_control.as_ref().map(interval),
                    "p95_goal": f.p95_answer.map(|(goal, _)| goal),
                    "p95_answer": f.p95_answer.map(|(_, answer)| answer.text()),
                })
            })
            .collect();
        json!({
            "v": 1,
            "bench": self.bench,
            "seed": self.seed,
            "arms": self.arms,
            "seconds": self.seconds,
            "stopped": self.stopped,
            "notes": self.notes,
            "failures": self.failures,
            "findings": findings,
            "rounds": self.rounds,
        })
    }
}

/// JSON has no infinity.
fn finite(v: f64) -> Option<f64> {
    v.is_finite().then_some(v)
}
