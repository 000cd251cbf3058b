//! A program, mostly inside the lab, that answers words: one line in, one line of JSON out.

use super::paired::Sample;
use crate::{Result, error::At, lab::Lab};
use std::{
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

/// The program and the way to it.
#[derive(Debug)]
pub struct Helper {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Helper {
    /// Starts a program as root on a host. What it says on standard error goes to a file in the lab's logs.
    pub fn start(lab: &Lab, host: &str, argv: &[&str]) -> Result<Self> {
        let log = lab.logs(host).join("bench.log");
        let errors = std::fs::File::options().create(true).append(true).open(&log).at("open", &log)?;
        Self::of(lab.command(host, "root", argv)?.stderr(errors))
    }

    /// Starts a program that needs no lab.
    pub fn of(command: &mut Command) -> Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().at("run", "a helper")?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("a child without streams".into());
        };
        Ok(Self {
            child,
            input: Some(input),
            output: BufReader::new(output),
        })
    }

    /// Says a word and gives the numbers that come back.
    pub fn ask(&mut self, word: &str) -> Result<Sample> {
        let gone = |e: &dyn std::fmt::Display| format!("the helper in the lab is gone ({e}): see bench.log among the lab's logs");
        let input = self.input.as_mut().ok_or("the helper was ended")?;
        writeln!(input, "{word}").and_then(|()| input.flush()).map_err(|e| gone(&e))?;
        self.hear().map_err(|e| format!("{word}: {e}").into())
    }

    /// Reads one answer.
    pub fn hear(&mut self) -> Result<Sample> {
        let gone = |e: &dyn std::fmt::Display| format!("the helper in the lab is gone ({e}): see bench.log among the lab's logs");
        let mut line = String::new();
        self.output.read_line(&mut line).map_err(|e| gone(&e))?;
        if line.is_empty() {
            return Err(gone(&"it closed its output").into());
        }
        let answer: serde_json::Value = serde_json::from_str(&line).map_err(|e| format!("{line:?} is no JSON: {e}"))?;
        if let Some(error) = answer.get("error") {
            return Err(error.to_string().into());
        }
        let object = answer.as_object().ok_or_else(|| format!("{line:?} is no object"))?;
        Ok(object.iter().filter_map(|(k, v)| Some((k.clone(), v.as_f64()?))).collect())
    }
}

impl Helper {
    /// Ends a program that does not end with its input. What runs inside the lab is ended with the lab.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // The end of its input ends most; one that fails in between must not hold up the end of the lab, which ends the rest.
        self.input = None;
        let ended = crate::proc::wait_for(std::time::Duration::from_secs(2), || self.child.try_wait().ok().flatten());
        if ended.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
