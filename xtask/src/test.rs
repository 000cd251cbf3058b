//! `cargo xtask test`: what CI runs, and what a change has to pass. Every phase says how long it took.

use crate::{
    Result,
    error::At,
    paths,
    say::{self, Phase, seconds},
    setup, stage,
};
use std::{process::Command, time::Instant};

/// What the command line asks for.
#[derive(Debug, Clone)]
pub struct Wishes {
    /// The long tests, too: those behind the feature `full` of the root package.
    pub full: bool,
    /// Only tests whose names contain one of these.
    pub filters: Vec<String>,
}

/// Tests at the same time. One that has a lab keeps a core busy, so more would only run into deadlines.
const THREADS: &str = "2";

/// Runs all phases; the first that fails is the end.
pub fn test(wishes: &Wishes) -> Result<()> {
    let begun = Instant::now();
    setup::phase()?;
    check("format", "cargo fmt", &["fmt", "--all", "--check"], "as rustfmt has it")?;
    let lints = [
        "clippy",
        "--workspace",
        "--all-targets",
        "--features",
        "slurm-vm/full",
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
    let runner = if has_nextest() { "cargo nextest" } else { "cargo test" };
    let tests = Instant::now();
    println!("{:12}{runner}, {THREADS} at a time", "tests");
    let passed = run_tests(wishes);
    println!(
        "{:12}{} ({})",
        "tests",
        if passed.is_ok() { "passed" } else { "failed" },
        seconds(tests.elapsed())
    );
    passed?;
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

fn has_nextest() -> bool {
    Command::new("cargo-nextest")
        .arg("--version")
        .output()
        .is_ok_and(|o| o.status.success())
}

fn run_tests(wishes: &Wishes) -> Result<()> {
    let mut args: Vec<&str> = if has_nextest() {
        vec!["nextest", "run", "--workspace", "--no-fail-fast"]
    } else {
        vec!["test", "--workspace", "--no-fail-fast"]
    };
    if wishes.full {
        args.extend(["--features", "slurm-vm/full"]);
    }
    if has_nextest() {
        args.extend(["--test-threads", THREADS, "--"]);
        args.extend(wishes.filters.iter().map(String::as_str));
    } else {
        args.extend(["--", "--test-threads", THREADS]);
        args.extend(wishes.filters.iter().map(String::as_str));
    }
    let status = stage::cargo_command(&args).status().at("run", "cargo")?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("`cargo {}` failed ({status})", args.join(" ")).into())
    }
}
