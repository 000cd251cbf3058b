//! `cargo xtask test --machines`: from fresh machines to a cluster that is installed as docs/install.md says, then the scenarios, all on that one
//! cluster. It stays up when something has failed, so that one scenario can be run again by its name.

use super::{Machines, Options, down, up};
use crate::{
    Result, package, paths,
    say::{Phase, seconds},
    stage,
    test::run_and_count,
};
use std::{path::Path, time::Instant};

/// The cluster's name.
const NAME: &str = "test";
/// The test programs of the root package, in the order in which they are run: the one that breaks most comes last.
const PROGRAMS: [&str; 5] = [
    "machines_jobs",
    "machines_moves",
    "machines_storage",
    "machines_restarts",
    "machines_mistakes",
];

/// Runs the scenarios whose program or test has one of the names in its name; all of them without names. Without a directory of packages those
/// are made.
pub fn run(names: &[String], debs: Option<&Path>) -> Result<()> {
    let begun = Instant::now();
    let options = Options {
        name: NAME.into(),
        fresh: true,
        ..Options::default()
    };
    let phase = Phase::begin("machines", "three fresh machines");
    let was = up(&options)?;
    phase.done(&format!("{was:?}"));
    let cluster = Machines::attach(NAME)?;
    if cluster.shell("n1", "root", "systemctl is-enabled slurm-vmd").is_err() {
        let made = paths::target().join("package");
        if debs.is_none() {
            package::package(&package::Wishes {
                out: Some(made.clone()),
                revision: 1,
            })?;
        }
        let phase = Phase::begin("install", "as docs/install.md says");
        cluster.install(debs.unwrap_or(&made), None)?;
        phase.done("installed as docs/install.md says, and its job has run");
    }
    let mut failed = Vec::new();
    for program in PROGRAMS {
        // A name may be a program's or a test's: of a program that is named all tests are run.
        let whole = names.iter().any(|n| program.contains(n.as_str()));
        let mut args = vec![
            "test",
            "--features",
            "machines",
            "--test",
            program,
            "--",
            "--nocapture",
            "--test-threads=1",
        ];
        if !whole {
            args.extend(names.iter().map(String::as_str));
        }
        let phase = Instant::now();
        let counts = run_and_count(&mut stage::cargo_command(&args))?;
        println!("{program:20}{counts} ({})", seconds(phase.elapsed()));
        if counts.failed > 0 || counts.broken {
            failed.push(program);
        }
    }
    println!("all of it took {}", seconds(begun.elapsed()));
    if !failed.is_empty() {
        return Err(format!(
            "{} failed; the machines are left up: `cargo xtask test --machines NAME` runs a scenario again, `cargo xtask machines down --name {NAME}` ends them",
            failed.join(", ")
        )
        .into());
    }
    if names.is_empty() {
        down(NAME)?;
        println!("the machines are down");
    }
    Ok(())
}
