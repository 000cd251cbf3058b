//! `cargo xtask test`: what CI runs, and what a change has to pass. Every phase says how long it took.

use crate::{
    Result,
    error::At,
    paths,
    say::{self, Phase, seconds},
    setup, stage,
};
use std::{
    io::{BufRead, BufReader},
    process::Stdio,
    time::Instant,
};

/// What the command line asks for.
#[derive(Debug, Clone)]
pub struct Wishes {
    /// The long tests, too: those behind the feature `full` of the root package.
    pub full: bool,
    /// Only tests whose names contain one of these.
    pub filters: Vec<String>,
}

/// Runs all phases; the first that fails is the end.
pub fn test(wishes: &Wishes) -> Result<()> {
    let begun = Instant::now();
    setup::phase()?;
    check("format", "cargo fmt", &["fmt", "--all", "--check"], "as rustfmt has it")?;
    let lints = [
        "clippy",
        "--keep-going",
        "--workspace",
        "--all-targets",
        "--features",
        "slurm-vm/full,slurm-vm/machines",
        "--",
        "-D",
        "warnings",
    ];
    check("lints", "cargo clippy", &lints, "no warnings")?;
    // Everything, also what tests do not name: a cdylib, and the programs that a lab runs.
    stage::phase()?;
    if !nix::unistd::geteuid().is_root() {
        println!("{:12}without root: the tests in the lab say `skipped` and show nothing", "tests");
    }
    let phase = Instant::now();
    println!("{:12}cargo test", "tests");
    let counts = run_tests(wishes)?;
    println!("{:12}{counts} ({})", "tests", seconds(phase.elapsed()));
    if counts.failed > 0 || counts.broken {
        return Err("tests failed: their names and what they printed are above".into());
    }
    println!("all of it took {}", seconds(begun.elapsed()));
    Ok(())
}

/// A phase that is one cargo command and has nothing to say when it passes.
fn check(name: &'static str, what: &str, args: &[&str], done: &str) -> Result<()> {
    let mut phase = Phase::begin(name, what);
    let result = say::run(
        &mut stage::cargo_command(args),
        &paths::target().join(format!("{name}.log")),
        60,
        |line| {
            if let Some(name) = line.strip_prefix("Checking ").or_else(|| line.strip_prefix("Compiling ")) {
                phase.now(name.split(" (").next().unwrap_or(name));
            }
        },
    );
    phase.pause();
    if let Err(e) = result {
        let text = e.to_string();
        // cargo's own words when a component of the toolchain is missing.
        let remedy = if text.contains("is not installed") || text.contains("no such command") {
            "\n`rustup component add rustfmt clippy` installs what is missing"
        } else if name == "format" {
            "\n`cargo fmt --all` mends it"
        } else {
            ""
        };
        return Err(format!("{text}{remedy}").into());
    }
    phase.done(done);
    Ok(())
}

/// Sums over all test programs.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    passed: u32,
    pub(crate) failed: u32,
    ignored: u32,
    /// Something failed beside the tests: a program did not build, or died.
    pub(crate) broken: bool,
}

impl Counts {
    /// Takes in one line of what the tests print.
    fn read(&mut self, line: &str) {
        let Some((_, numbers)) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". ")) else {
            return;
        };
        for part in numbers.split("; ") {
            let Some((number, what)) = part.split_once(' ') else { continue };
            let number: u32 = number.parse().unwrap_or(0);
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed, {} failed, {} ignored", self.passed, self.failed, self.ignored)?;
        if self.broken && self.failed == 0 {
            f.write_str("; a test program did not build or died")
        } else {
            Ok(())
        }
    }
}

/// All tests. Those in the lab share one lab in each test program, so they are threads of it, and `cargo test` it is.
fn run_tests(wishes: &Wishes) -> Result<Counts> {
    let mut args = vec!["test", "--workspace", "--no-fail-fast"];
    if wishes.full {
        args.extend(["--features", "slurm-vm/full"]);
    }
    args.push("--");
    args.extend(wishes.filters.iter().map(String::as_str));
    run_and_count(&mut stage::cargo_command(&args))
}

/// Runs a `cargo test`, passes on what it prints, and sums up its results.
pub(crate) fn run_and_count(command: &mut std::process::Command) -> Result<Counts> {
    let mut child = command.stdout(Stdio::piped()).spawn().at("run", "cargo")?;
    let mut counts = Counts::default();
    let out = child.stdout.take().ok_or("cargo's output is not there")?;
    for line in BufReader::new(out).split(b'\n') {
        let line = line.at("read the output of", "cargo")?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        counts.read(&line);
    }
    counts.broken = !child.wait().at("wait for", "cargo")?.success();
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use super::Counts;

    #[test]
    fn the_results_of_all_test_programs_are_summed_up() {
        let mut counts = Counts::default();
        for line in [
            "running 3 tests",
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.01s",
            "test x ... FAILED",
            "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
        ] {
            counts.read(line);
        }
        assert_eq!(counts.to_string(), "4 passed, 2 failed, 1 ignored");
    }
}
