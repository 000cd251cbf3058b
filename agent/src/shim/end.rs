//! How the shim ends: as the program did, or with one of the documented outcomes and one line that says why.
use std::{
    io::{self, Write},
    os::unix::net::UnixDatagram,
    path::PathBuf,
    process::exit,
    time::{Duration, Instant},
};

use nix::libc;
use slurm_vm_api::{outcome, session::Ended};

use super::{
    relay::RawTerminal,
    signals::{Signals, die_of},
};
use crate::slurm::{JobState, Slurm, SlurmCommands, SlurmError, SlurmSettings};

/// After a requeue of its own job the shim waits this long for Slurm to end it.
const REQUEUE_PATIENCE: Duration = Duration::from_secs(120);
/// Between attempts to requeue while slurmctld does not answer.
const REQUEUE_RETRY: Duration = Duration::from_secs(5);
/// Where Slurm's commands are, if in none of the usual directories.
const PROGRAMS: &str = "SLURM_VM_SLURM_BIN";

/// Why the relay stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The program ended.
    Program(Ended),
    /// A verdict of the agent, with its outcome and reason.
    Failed(i32, String),
    /// This node or its agent is at fault: not the user's, so the job is to run elsewhere.
    Fault(String),
    /// Ended by a signal before the program ran.
    Killed(i32),
    /// The job goes on elsewhere or starts over.
    Quiet,
}

/// One line on standard error, also where QEMU or libvirt gave its reason in several; a reader that is gone is no news to
/// anyone.
pub fn say(text: &str) {
    let line: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let _ = writeln!(io::stderr(), "{}", line.join("; "));
}

/// Whose end it is.
#[derive(Debug, Clone, Copy)]
pub struct Whose {
    /// The job.
    pub job: u32,
    /// Its batch script: Slurm can requeue it.
    pub batch: bool,
}

/// Ends the process.
pub fn finish(whose: Whose, end: End, signals: Option<&Signals>, terminal: Option<RawTerminal>) -> ! {
    // Before anything is printed: a raw terminal needs more than a line feed.
    drop(terminal);
    let job = whose.job;
    match end {
        End::Program(Ended::Code(code)) => exit(code),
        End::Program(Ended::Signal(signo)) | End::Killed(signo) => die_of(signo),
        End::Program(Ended::NotStarted { errno, path }) => {
            let why = io::Error::from_raw_os_error(errno).to_string();
            say(&format!("slurm-vm: {path}: {}", why.split(" (os error").next().unwrap_or(&why)));
            exit(if errno == libc::ENOENT {
                outcome::NOT_FOUND.into()
            } else {
                outcome::REFUSED.into()
            })
        }
        End::Quiet => exit(0),
        End::Failed(code, why) if code == i32::from(outcome::NODE_FAULT) => fault(whose, &why, signals),
        End::Failed(code, why) => {
            say(&format!("slurm-vm: job {job}: {why}"));
            exit(code)
        }
        End::Fault(why) => fault(whose, &why, signals),
    }
}

/// A node's fault does not fail a batch job: it goes back to the queue, held, in the state by which the controller knows
/// it, and the controller releases it without this node.
fn fault(whose: Whose, why: &str, signals: Option<&Signals>) -> ! {
    let job = whose.job;
    let node = super::context::node_name();
    if !whose.batch {
        say(&format!(
            "slurm-vm: job {job}: {why} (node {node}; a job of srun or salloc cannot be requeued)"
        ));
        exit(outcome::NODE_FAULT.into());
    }
    let refusal = match requeue_special(job, signals) {
        Ok(Requeue::Done) => {
            journal(job, &format!("requeued, held: node fault on {node}: {why}"));
            wait_for_term(signals, REQUEUE_PATIENCE);
            exit(0)
        }
        Ok(Requeue::Ending) => {
            journal(job, &format!("node fault on {node}: {why}; not requeued, Slurm is ending the job"));
            die_of(libc::SIGTERM)
        }
        Err(e) => e,
    };
    journal(job, &format!("node fault on {node}: {why}; the requeue failed to {refusal}"));
    say(&format!(
        "slurm-vm: job {job}: {why} (node {node}; the requeue failed to {refusal})"
    ));
    exit(outcome::NODE_FAULT.into())
}

enum Requeue {
    /// The job is held in the queue, or about to be.
    Done,
    /// The job was cancelled, is over its time limit or was requeued by somebody: a requeue now would bring it back to life.
    Ending,
}

/// As the job's owner. What broke the node may keep slurmctld from answering as well, so that is waited for. Slurm may be
/// ending the job already, and would requeue it all the same: so it is asked first, and a SIGTERM meanwhile says so, too.
fn requeue_special(job: u32, signals: Option<&Signals>) -> Result<Requeue, SlurmError> {
    let settings = SlurmSettings {
        conf: std::env::var_os("SLURM_CONF").map(PathBuf::from),
        programs: std::env::var_os(PROGRAMS).map(PathBuf::from),
        ..SlurmSettings::default()
    };
    let slurm = SlurmCommands::new(settings);
    let until = Instant::now() + REQUEUE_PATIENCE;
    // The answer to an order may be lost, and the order carried out.
    let mut ordered = false;
    let ending = |ordered| if ordered { Requeue::Done } else { Requeue::Ending };
    loop {
        let asked = match slurm.job_state(job) {
            Ok(state) if state.as_ref().is_some_and(JobState::is_on_nodes) => {
                ordered = true;
                slurm.requeue_special(job).map(|()| Requeue::Done)
            }
            Ok(_) => Ok(ending(ordered)),
            Err(e) => Err(e),
        };
        match asked {
            Err(e) if e.is_already_pending() => return Ok(Requeue::Done),
            Err(e) if e.is_transient() && Instant::now() < until => {
                if wait_for_term(signals, REQUEUE_RETRY) {
                    return Ok(ending(ordered));
                }
            }
            other => return other,
        }
    }
}

fn wait_for_term(signals: Option<&Signals>, at_most: Duration) -> bool {
    match signals {
        Some(signals) => signals.wait_for_term(at_most),
        // Without the descriptor SIGTERM still has its default action: it ends the process, as it should here.
        None => {
            std::thread::sleep(at_most);
            false
        }
    }
}

/// One line for the node's administrator: the agent, which keeps the log otherwise, may be what is broken.
pub fn journal(job: u32, text: &str) {
    const USER_ERROR: u32 = 8 + 3;
    let line = format!("<{USER_ERROR}>slurm-vm-run[{}]: job {job}: {text}", std::process::id());
    if let Ok(socket) = UnixDatagram::unbound() {
        let _ = socket.set_nonblocking(true);
        let _ = socket.send_to(line.as_bytes(), "/dev/log");
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_page_explains_every_outcome() {
        let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/outcomes.md")).expect("docs/outcomes.md");
        for outcome in slurm_vm_api::outcome::OUTCOMES {
            assert!(page.contains(&format!("| {} | ", outcome.code)), "{}", outcome.code);
        }
    }
}
