//! `svm`: what users and administrators ask of an agent. One question a run, in the manner of squeue and scontrol.
//!
//! [`args`] is the command line, [`client`] the agent's socket, [`table`] the columns, [`show`] one job at length,
//! [`images`] the catalogue. Exit codes are [`OK`], [`REFUSED`], [`USAGE`] and [`UNREACHABLE`].
pub mod args;
pub mod client;
pub mod images;
pub mod show;
pub mod table;

use std::io::{self, IsTerminal, Write};

use clap::Parser;
use serde_json::json;
use slurm_vm_api::query::{Answer, Ask, Finding, NodeHealth, Totals, VmView};
use thiserror::Error;

use args::{Args, Verb};
use client::{Client, ClientError};

/// Done, and nothing wrong was found.
pub const OK: u8 = 0;
/// Refused, not found, or a node or setting is found wrong.
pub const REFUSED: u8 = 1;
/// The command line is wrong.
pub const USAGE: u8 = 2;
/// No agent answers.
pub const UNREACHABLE: u8 = 3;

/// Why a question was not answered.
#[derive(Debug, Error)]
pub enum CliError {
    /// The agent.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The agent said no.
    #[error("{0}")]
    Refused(String),
    /// Nothing to see under this number.
    #[error("job {0} has no VM that is known here, or it is not yours to see; `svm list --all` shows what is")]
    UnknownJob(u32),
    /// The catalogue.
    #[error(transparent)]
    Images(#[from] images::ImagesError),
    /// The reader of our output.
    #[error("cannot write: {0}")]
    Write(#[from] io::Error),
}

impl CliError {
    fn code(&self) -> u8 {
        match self {
            Self::Client(_) => UNREACHABLE,
            _ => REFUSED,
        }
    }
}

/// Runs `svm` and returns its exit code.
pub fn main() -> u8 {
    let args = Args::parse();
    match run(&args, &mut io::stdout().lock()) {
        Ok(code) => code,
        // `svm list | head` is no failure.
        Err(CliError::Write(e)) if e.kind() == io::ErrorKind::BrokenPipe => OK,
        Err(e) => {
            let _ = writeln!(io::stderr(), "svm: {e}");
            e.code()
        }
    }
}

/// Everything of one kind that an answer holds.
#[derive(Debug, Default)]
struct Answers {
    vms: Vec<VmView>,
    totals: Vec<Totals>,
    nodes: Vec<NodeHealth>,
    findings: Vec<Finding>,
}

fn ask(args: &Args, question: Ask, out: &mut impl Write) -> Result<Answers, CliError> {
    let mut client = Client::ask(&args.socket, question)?;
    let mut all = Answers::default();
    let careful = io::stdout().is_terminal();
    loop {
        match client.answer()? {
            Answer::Vm(vm) => all.vms.push(*vm),
            Answer::Totals(t) => all.totals.push(*t),
            Answer::Node(n) => all.nodes.push(n),
            Answer::Finding(f) => all.findings.push(f),
            Answer::Text(text) => {
                write_text(out, &text, careful)?;
                out.flush()?;
            }
            Answer::Done => return Ok(all),
            Answer::Refused(why) => return Err(CliError::Refused(why)),
        }
    }
}

/// A guest writes its own log: on a terminal its control characters are shown, not obeyed.
fn write_text(out: &mut impl Write, text: &str, careful: bool) -> io::Result<()> {
    let text = text.strip_suffix('\n').unwrap_or(text);
    if !careful {
        return writeln!(out, "{text}");
    }
    let shown: String = text
        .chars()
        .filter(|c| *c != '\r')
        .flat_map(|c| {
            if c.is_control() && c != '\n' && c != '\t' {
                c.escape_default().collect::<Vec<_>>()
            } else {
                vec![c]
            }
        })
        .collect();
    writeln!(out, "{shown}")
}

fn print_json(out: &mut impl Write, value: &serde_json::Value) -> Result<(), CliError> {
    writeln!(out, "{}", serde_json::to_string_pretty(value).map_err(io::Error::from)?)?;
    Ok(())
}

/// Answers one command line; everything for the user but errors goes to `out`.
///
/// # Errors
/// One clear line and, by its kind, the exit code.
pub fn run(args: &Args, out: &mut impl Write) -> Result<u8, CliError> {
    match &args.verb {
        Verb::List { all, totals, json } => {
            let mut got = ask(args, Ask::List, out)?;
            got.vms.retain(|vm| *all || !table::has_ended(vm));
            got.vms.sort_by(|a, b| (a.job, &a.domain).cmp(&(b.job, &b.domain)));
            if *json {
                let document = if *totals {
                    json!({"vms": got.vms, "totals": got.totals})
                } else {
                    json!({"vms": got.vms})
                };
                print_json(out, &document)?;
            } else {
                write!(out, "{}", table::vms(&got.vms))?;
                if *totals {
                    write!(out, "\n{}", table::totals(&got.totals))?;
                }
            }
        }
        Verb::Show { job, json } => {
            let got = ask(args, Ask::Show { job: *job }, out)?;
            if got.vms.is_empty() {
                return Err(CliError::UnknownJob(*job));
            }
            if *json {
                print_json(out, &json!({"vms": got.vms}))?;
            } else {
                for vm in &got.vms {
                    write!(out, "{}", show::vm(vm))?;
                }
            }
        }
        Verb::Log { job, follow } => drop(ask(
            args,
            Ask::Log {
                job: *job,
                follow: *follow,
            },
            out,
        )?),
        Verb::Migrate { job, cancel: true, .. } => drop(ask(args, Ask::CancelMigration { job: *job }, out)?),
        Verb::Migrate { job, node, .. } => drop(ask(
            args,
            Ask::Migrate {
                job: *job,
                to: node.clone(),
            },
            out,
        )?),
        Verb::Health { json } => {
            let got = ask(args, Ask::Health, out)?;
            if *json {
                print_json(out, &json!({"nodes": got.nodes}))?;
            } else {
                write!(out, "{}", table::nodes(&got.nodes))?;
            }
            return Ok(if got.nodes.iter().all(|n| n.healthy) { OK } else { REFUSED });
        }
        Verb::Check { json } => {
            let got = ask(args, Ask::Check, out)?;
            if *json {
                print_json(out, &json!({"findings": got.findings}))?;
            } else {
                write!(out, "{}", show::findings(&got.findings))?;
            }
            return Ok(if got.findings.iter().any(|f| f.level == "error") {
                REFUSED
            } else {
                OK
            });
        }
        Verb::Images { names, json, config } => {
            let images = images::read(config)?;
            if *json {
                print_json(out, &json!({"images": images}))?;
            } else if *names {
                images.iter().try_for_each(|i| writeln!(out, "{}", i.name))?;
            } else {
                write!(out, "{}", table::images(&images))?;
            }
        }
    }
    Ok(OK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_command_the_terminal_of_who_reads_its_log() {
        let written = |careful| {
            let mut out = Vec::new();
            write_text(&mut out, "a\x1b[2Jb\r\n\tc\u{9b}\n", careful).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert_eq!(written(true), "a\\u{1b}[2Jb\n\tc\\u{9b}\n");
        assert_eq!(written(false), "a\x1b[2Jb\r\n\tc\u{9b}\n");
    }
}
