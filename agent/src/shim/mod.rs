//! `slurm-vm-run`, the shim: what a job's batch script or a task of a step becomes.
//!
//! It runs as the user, in the job's cgroup, with Slurm's standard streams, limits and signals. It describes the task
//! to the node's agent, which boots or finds the job's VM and runs the program there; then it relays streams and
//! signals, and ends as the program ended. The program never runs on this host.
//!
//! ```text
//!  Opening --Started--> Running --HandOver--> HandedOver --SIGTERM--> exit 0
//!     |                 |   ^                     |
//!     |                 |   +------ TakeBack -----+   (or Started, when the agent was restarted meanwhile)
//!     +--Failed--+      +--Exited / Failed--> draining --> end as the program did
//! ```
//! A connection that breaks is made again with the offsets that were written: the program goes on in the guest.
//!
//! One thread, one poll(2) loop ([`relay`]). How each failure ends is in [`end`] and in docs/outcomes.md.
pub mod context;
pub mod contract;
pub mod durable;
pub mod end;
pub mod file;
pub mod input;
pub mod link;
pub mod output;
pub mod relay;
pub mod signals;

use std::{ffi::OsString, io, os::fd::AsFd};

use slurm_vm_api::{
    outcome,
    session::{Open, Stream, VERSION},
    shim::Request,
};

use contract::{ContractError, Task};
use end::{End, Whose};
use input::Input;
use output::Output;
use relay::{Relay, Times};
use signals::Signals;

/// Runs the task and ends the process as the program ended.
pub fn main() -> ! {
    let argv: Vec<OsString> = std::env::args_os().skip(1).collect();
    let (args, program) = match contract::read_words(argv, contract::words_from_environment()) {
        Ok(read) => read,
        Err(e) => {
            end::say(&format!(
                "slurm-vm: this program is started by Slurm's plugin for jobs with --vm: {e}"
            ));
            std::process::exit(outcome::REFUSED.into());
        }
    };
    let job = args.job;
    if let Request::Refused(why) = &args.request {
        end::say(&format!("slurm-vm: job {job}: {why}"));
        std::process::exit(outcome::REFUSED.into());
    }
    match contract::describe(args, &program) {
        Ok(task) => run(task),
        // slurmd's own copy is gone: that is the node's fault, not the user's.
        Err(e @ ContractError::Script { .. }) => {
            let whose = Whose { job, batch: true };
            end::finish(whose, End::Fault(e.to_string()), Signals::block_all().ok().as_ref(), None)
        }
        Err(e) => {
            end::say(&format!("slurm-vm: job {job}: {e}"));
            std::process::exit(outcome::REFUSED.into());
        }
    }
}

fn run(task: Task) -> ! {
    let whose = Whose {
        job: task.args.job,
        batch: task.is_batch(),
    };
    match prepare(task) {
        Ok(relay) => {
            let (end, signals, terminal) = relay.run();
            end::finish(whose, end, Some(&signals), terminal)
        }
        Err(e) => end::finish(whose, End::Fault(format!("the task's streams cannot be used: {e}")), None, None),
    }
}

fn prepare(task: Task) -> io::Result<Relay> {
    let signals = Signals::block_all()?;
    let duplicate = |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned();
    let input = duplicate(io::stdin().as_fd())?;
    let mut stdout = Output::new(Stream::Stdout, duplicate(io::stdout().as_fd())?)?;
    let mut stderr = Output::new(Stream::Stderr, duplicate(io::stderr().as_fd())?)?;
    let terminal = context::terminal(&input, io::stdout());
    if task.truncates() {
        // What is in the files now is gone once the program starts from scratch; offset 0 will stand at their beginning.
        (stdout.sink.base, stderr.sink.base) = (0, 0);
    }
    let Request::Spec(spec) = task.args.request.clone() else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let open = Open {
        version: VERSION,
        job: task.args.job,
        step: task.args.step,
        task: task.args.task,
        restart: task.args.restart,
        kind: task.kind(),
        spec,
        cwd: std::env::current_dir().map_or_else(|_| "/".into(), |d| d.display().to_string()),
        umask: context::file_mask(),
        groups: context::groups()?,
        user: context::user(),
        rlimits: context::rlimits(),
        merge_stderr: terminal.is_some() || (stdout.sink.dev, stdout.sink.ino) == (stderr.sink.dev, stderr.sink.ino),
        terminal,
        stdout: stdout.sink.clone(),
        stderr: stderr.sink.clone(),
        resume: Vec::new(),
    };
    Ok(Relay::new(
        task,
        open,
        Input::new(input),
        stdout,
        stderr,
        signals,
        Times::from_environment(),
    ))
}
