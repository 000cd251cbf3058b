//! Runs one Slurm command: no shell, empty environment, capped output, killed at the deadline.

use super::SlurmError;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What a command left behind.
#[derive(Debug)]
pub(super) struct Output {
    pub stdout: String,
    pub stderr: String,
    /// `None` if a signal ended it.
    pub code: Option<i32>,
}

/// One command to run.
#[derive(Debug)]
pub(super) struct Run<'a> {
    pub program: &'static str,
    pub path: &'a Path,
    pub args: &'a [String],
    pub env: &'a [(String, String)],
    pub deadline: Duration,
    pub max_output: usize,
}

/// Messages are short; a flood of them is cut.
const MAX_STDERR: usize = 64 << 10;

impl Run<'_> {
    pub(super) fn run(&self) -> Result<Output, SlurmError> {
        let until = Instant::now() + self.deadline;
        let mut child = Command::new(self.path)
            .args(self.args)
            .env_clear()
            .envs(self.env.iter().map(|(k, v)| (k, v)))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(|e| SlurmError::Command {
                program: self.program,
                reason: e.to_string(),
            })?;
        let result = self.collect(&mut child, until);
        if result.is_err() {
            end(&mut child);
        }
        result
    }

    fn collect(&self, child: &mut Child, until: Instant) -> Result<Output, SlurmError> {
        let fail = |reason: String| SlurmError::Command {
            program: self.program,
            reason,
        };
        let (Some(mut out), Some(mut err)) = (child.stdout.take(), child.stderr.take()) else {
            return Err(fail("no pipes".into()));
        };
        nonblocking(&out)
            .and_then(|()| nonblocking(&err))
            .map_err(|e| fail(e.to_string()))?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let (mut out_open, mut err_open) = (true, true);
        while out_open || err_open {
            let left = until.checked_duration_since(Instant::now()).ok_or_else(|| self.timeout())?;
            let mut fds = Vec::with_capacity(2);
            if out_open {
                fds.push(PollFd::new(out.as_fd(), PollFlags::POLLIN));
            }
            if err_open {
                fds.push(PollFd::new(err.as_fd(), PollFlags::POLLIN));
            }
            let wait = PollTimeout::try_from(left.min(Duration::from_secs(60)) + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut fds, wait) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(fail(e.to_string())),
            }
            drop(fds);
            if out_open {
                out_open = drain(&mut out, &mut stdout).map_err(|e| fail(e.to_string()))?;
                if stdout.len() > self.max_output {
                    return Err(fail(format!("it printed more than {} bytes", self.max_output)));
                }
            }
            if err_open {
                err_open = drain(&mut err, &mut stderr).map_err(|e| fail(e.to_string()))?;
                stderr.truncate(MAX_STDERR);
            }
        }
        // Both pipes are closed: it is about to end. Nothing to wait on but the process itself.
        let status = loop {
            match child.try_wait().map_err(|e| fail(e.to_string()))? {
                Some(status) => break status,
                None if Instant::now() >= until => return Err(self.timeout()),
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        let stdout = String::from_utf8(stdout).map_err(|e| SlurmError::parse("UTF-8", &String::from_utf8_lossy(e.as_bytes())))?;
        Ok(Output {
            stdout,
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
            code: status.code(),
        })
    }

    fn timeout(&self) -> SlurmError {
        SlurmError::Timeout {
            program: self.program,
            after: self.deadline,
        }
    }
}

/// Kills the command and whatever it started, and reaps it.
fn end(child: &mut Child) {
    if let Ok(pid) = i32::try_from(child.id()) {
        let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let _ = child.kill();
    let _ = child.wait();
}

fn nonblocking(fd: &impl AsFd) -> nix::Result<()> {
    let flags = OFlag::from_bits_truncate(fcntl(fd.as_fd(), FcntlArg::F_GETFL)?);
    fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(|_| ())
}

/// Reads what is there (at most 1 MiB at a time); false at the end of the stream.
fn drain(from: &mut impl Read, into: &mut Vec<u8>) -> std::io::Result<bool> {
    let mut buf = [0_u8; 16 << 10];
    for _ in 0..64 {
        match from.read(&mut buf) {
            Ok(0) => return Ok(false),
            Ok(n) => into.extend_from_slice(&buf[..n]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(true),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, deadline: Duration, max_output: usize) -> Result<Output, SlurmError> {
        let args = ["-c".to_owned(), script.to_owned()];
        Run {
            program: "sh",
            path: Path::new("/bin/sh"),
            args: &args,
            env: &[("A".into(), "b".into())],
            deadline,
            max_output,
        }
        .run()
    }

    #[test]
    fn output_messages_status_and_environment_are_as_given() {
        let out = sh("echo $A $HOME; echo no >&2; exit 3", Duration::from_secs(20), 1000).unwrap();
        assert_eq!((out.stdout.as_str(), out.stderr.as_str(), out.code), ("b\n", "no\n", Some(3)));
    }

    #[test]
    fn a_command_that_hangs_is_killed_with_its_children_at_the_deadline() {
        let began = Instant::now();
        assert!(matches!(
            sh("sleep 600 & sleep 600", Duration::from_millis(200), 1000),
            Err(SlurmError::Timeout { .. })
        ));
        assert!(began.elapsed() < Duration::from_secs(60));
    }

    #[test]
    fn a_flood_is_cut_off() {
        assert!(matches!(
            sh("while :; do echo xxxxxxxxxxxxxxxx; done", Duration::from_secs(30), 10_000),
            Err(SlurmError::Command { .. })
        ));
    }
}
