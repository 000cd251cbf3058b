//! Running other programs, with errors that say what was run and what it answered.

use crate::Result;
use std::{
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

/// Runs a command to its end; anything but success is an error with the command's own words.
pub fn run(program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("cannot run {program}: {e}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!("`{program} {}` failed ({}): {}", args.join(" "), output.status, text_of(&output)).into())
}

/// What a command said, standard error last, without trailing white space.
pub fn text_of(output: &Output) -> String {
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    [out.trim(), err.trim()]
        .iter()
        .filter(|t| !t.is_empty())
        .copied()
        .collect::<Vec<_>>()
        .join("\n")
}

/// Asks again and again until the answer is there or the deadline has passed. Looks once more after the deadline, so that a slow machine is not a failure.
pub fn wait_for<T>(deadline: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline;
    loop {
        let late = Instant::now() >= end;
        if let Some(found) = look() {
            return Some(found);
        }
        if late {
            return None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The start time of a process in clock ticks since boot, or nothing if it is gone or a zombie: with the pid it names a process for good.
pub fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name is in brackets and may hold anything, brackets included.
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    if matches!(fields.first(), Some(&"Z" | &"X")) {
        return None;
    }
    fields.get(19)?.parse().ok()
}
