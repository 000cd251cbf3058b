//! `cargo xtask mutants`: puts known bugs back into the production code, one at a time, and looks whether the simulation finds each of them
//! within CI's seeds, by what must always hold.
//!
//! The bugs are in `tests/mutants.toml`. All of it happens in a copy of the sources with a build of its own, `target/mutants`: the tree
//! is never touched. Only tests that walk seeds count: a test that was written for a bug would prove nothing about the invariants.

use crate::{Result, error::At, paths, say::seconds, stage};
use serde::Deserialize;
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

/// The test that walks the seeds, in the program `simulation`.
const SEEDED: &str = "whatever_goes_wrong_each_guest_runs_once_and_nothing_is_left";
/// Where the bugs are described, from the top of the project.
const LIST: &str = "tests/mutants.toml";

/// The file of bugs.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    mutant: Vec<Mutant>,
}

/// One bug: a text in a file that is replaced.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mutant {
    /// For the command line.
    name: String,
    /// What goes wrong with it, in one line.
    what: String,
    /// From the top of the project.
    file: PathBuf,
    /// As it is; in the file exactly once.
    from: String,
    /// As it is with the bug.
    to: String,
}

/// How a run of the simulation ended.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    /// No seed failed.
    Nothing,
    /// The first seed that failed, and what did not hold.
    Seed(u64, String),
    /// Something else went wrong, such as the build.
    Broken(String),
}

/// Runs all mutants, or those whose names contain one of `names`.
///
/// # Errors
/// When the simulation fails without a bug, when a bug does not fit the code any more, or when one is not found.
pub fn run(names: &[String]) -> Result<()> {
    let text = fs::read_to_string(paths::project().join(LIST)).at("read", LIST)?;
    let list: List = toml::from_str(&text).map_err(|e| format!("{LIST}: {e}"))?;
    let wanted = |m: &&Mutant| names.is_empty() || names.iter().any(|n| m.name.contains(n.as_str()));
    let mutants: Vec<&Mutant> = list.mutant.iter().filter(wanted).collect();
    if mutants.is_empty() {
        let known: Vec<&str> = list.mutant.iter().map(|m| m.name.as_str()).collect();
        return Err(format!("no mutant has such a name; there are {}", known.join(", ")).into());
    }
    // Before anything takes time: does each still fit?
    for m in &mutants {
        m.apply(&fs::read_to_string(paths::project().join(&m.file)).at("read", &m.file)?)?;
    }
    let tree = paths::target().join("mutants/tree");
    copy_sources(&tree)?;
    let begun = Instant::now();
    match simulate(&tree)? {
        Found::Nothing => println!("{:28}no seed fails ({})", "without a bug", seconds(begun.elapsed())),
        Found::Seed(seed, what) => return Err(format!("the simulation fails without any bug: seed {seed}: {what}").into()),
        Found::Broken(why) => return Err(why.into()),
    }
    let mut missed = Vec::new();
    for m in mutants {
        let begun = Instant::now();
        let path = tree.join(&m.file);
        let sound = fs::read_to_string(&path).at("read", &path)?;
        fs::write(&path, m.apply(&sound)?).at("write", &path)?;
        let found = simulate(&tree);
        fs::write(&path, &sound).at("write", &path)?;
        let took = seconds(begun.elapsed());
        match found? {
            Found::Seed(seed, what) => println!("{:28}found by seed {seed} ({took}): {what}", m.name),
            Found::Nothing => {
                println!("{:28}NOT FOUND ({took}): {}", m.name, m.what);
                missed.push(m.name.as_str());
            }
            Found::Broken(why) => return Err(format!("{}: {why}", m.name).into()),
        }
    }
    if missed.is_empty() {
        Ok(())
    } else {
        Err(format!("not found by any seed: {}", missed.join(", ")).into())
    }
}

impl Mutant {
    /// A file's text with the bug in it.
    fn apply(&self, text: &str) -> Result<String> {
        match text.matches(&self.from).count() {
            1 => Ok(text.replacen(&self.from, &self.to, 1)),
            n => Err(format!(
                "{LIST}: mutant {}: its text is in {} {n} times instead of once: adapt it to the code",
                self.name,
                self.file.display()
            )
            .into()),
        }
    }
}

/// Makes the copy as the tree is now. Files that are the same keep their times, so that little is built again.
fn copy_sources(to: &Path) -> Result<()> {
    let listed = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(paths::project())
        .output()
        .at("run", "git")?;
    if !listed.status.success() {
        return Err("git does not list the sources: this command needs a clone of the project".into());
    }
    let names = String::from_utf8_lossy(&listed.stdout).into_owned();
    let mut kept = BTreeSet::new();
    for name in names.split('\0').filter(|n| !n.is_empty()) {
        let (from, copy) = (paths::project().join(name), to.join(name));
        // One that was removed and is not committed yet.
        let Ok(fresh) = fs::read(&from) else { continue };
        kept.insert(copy.clone());
        if fs::read(&copy).is_ok_and(|there| there == fresh) {
            continue;
        }
        if let Some(dir) = copy.parent() {
            fs::create_dir_all(dir).at("create", dir)?;
        }
        fs::write(&copy, fresh).at("write", &copy)?;
    }
    remove_others(to, &kept)
}

/// What is in the sources no more would be built all the same.
fn remove_others(dir: &Path, kept: &BTreeSet<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).at("read", dir)? {
        let path = entry.at("read", dir)?.path();
        if path.is_dir() {
            remove_others(&path, kept)?;
        } else if !kept.contains(&path) {
            fs::remove_file(&path).at("remove", &path)?;
        }
    }
    Ok(())
}

/// Runs the seeds of CI in a tree.
fn simulate(tree: &Path) -> Result<Found> {
    let mut command = stage::cargo_command(&["test", "--quiet", "-p", "slurm-vm", "--test", "simulation", "--", "--exact", SEEDED]);
    let output = command
        .current_dir(tree)
        .env("CARGO_TARGET_DIR", paths::target().join("mutants/build"))
        .env_remove("SLURM_VM_SEED")
        .env_remove("SLURM_VM_SEEDS")
        .stdin(Stdio::null())
        .output()
        .at("run", "cargo")?;
    let said = format!(
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(read(output.status.success(), &said))
}

/// What the output says.
fn read(passed: bool, said: &str) -> Found {
    // A name that fits no test is a success for cargo.
    if passed && said.contains("1 passed") {
        return Found::Nothing;
    }
    let seed = said.lines().find_map(|line| {
        let (number, what) = line.trim().strip_prefix("seed ")?.split_once(": ")?;
        Some(Found::Seed(number.parse().ok()?, what.to_owned()))
    });
    seed.unwrap_or_else(|| {
        let last: Vec<&str> = said.lines().rev().filter(|l| !l.trim().is_empty()).take(20).collect();
        let last: Vec<&str> = last.into_iter().rev().collect();
        Found::Broken(format!("the simulation did not run as it should:\n{}", last.join("\n")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_that_failed_is_read_and_a_build_that_failed_is_not_taken_for_one() {
        let failed =
            "thread 'main' panicked at tests/simulation/main.rs:63:13:\nseed 17: job 3 has two guests\nreplay with SLURM_VM_SEED=17\n";
        assert_eq!(read(false, failed), Found::Seed(17, "job 3 has two guests".into()));
        assert_eq!(read(true, "test result: ok. 1 passed; 0 failed"), Found::Nothing);
        assert!(matches!(read(true, "test result: ok. 0 passed; 0 failed"), Found::Broken(_)));
        assert!(matches!(read(false, "error[E0425]: cannot find value"), Found::Broken(_)));
    }

    #[test]
    fn each_bug_fits_the_code_as_it_is() {
        let list: List = toml::from_str(&fs::read_to_string(paths::project().join(LIST)).unwrap()).unwrap();
        for m in &list.mutant {
            let sound = fs::read_to_string(paths::project().join(&m.file)).unwrap();
            assert_ne!(m.apply(&sound).unwrap(), sound, "{} changes nothing", m.name);
        }
    }
}
