//! Runs a job's programs inside its virtual machine, for the agent on the node.
//!
//! Started at boot by the guest's init with `--port /dev/virtio-ports/org.slurm-vm.0`; it needs nothing of the guest but a kernel with
//! virtio-serial. One thread, one poll loop ([`server`]); the only unsafe code is in [`spawn`]. It never ends by itself: without a port or a
//! host it waits for one. With `--socket PATH` it takes its host on a UNIX socket instead, for tests and for pretended guests.

#![deny(unsafe_code)]

mod admin;
mod mounts;
mod port;
mod processes;
mod program;
mod ring;
mod server;
#[allow(unsafe_code)]
mod spawn;
mod start;
mod uploads;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use crate::port::Port;
use crate::server::{Options, Server};
use crate::start::Places;

const USAGE: &str = "usage: slurm-vm-guest --port DEVICE | --socket PATH [--run-dir DIR] [--passwd FILE]";

#[derive(Debug, Default)]
struct Arguments {
    port: Option<PathBuf>,
    socket: Option<PathBuf>,
    run_dir: Option<PathBuf>,
    passwd: Option<PathBuf>,
}

fn parse(mut args: impl Iterator<Item = std::ffi::OsString>) -> Result<Arguments, String> {
    let mut parsed = Arguments::default();
    while let Some(arg) = args.next() {
        let slot = match arg.to_str() {
            Some("--port") => &mut parsed.port,
            Some("--socket") => &mut parsed.socket,
            Some("--run-dir") => &mut parsed.run_dir,
            Some("--passwd") => &mut parsed.passwd,
            _ => return Err(format!("unknown argument {}", arg.display())),
        };
        *slot = Some(args.next().ok_or_else(|| format!("{} needs a value", arg.display()))?.into());
    }
    if parsed.port.is_some() == parsed.socket.is_some() {
        return Err("one of --port and --socket is needed".to_owned());
    }
    Ok(parsed)
}

/// Makes descriptors 0, 1 and 2 exist: a child's pipe must not be one of them.
fn reserve_standard_descriptors() {
    while let Ok(fd) = open(c"/dev/null", OFlag::O_RDWR, Mode::empty()) {
        use std::os::fd::{AsRawFd, IntoRawFd};
        if fd.as_raw_fd() > 2 {
            break;
        }
        let _ = fd.into_raw_fd();
    }
}

fn run(arguments: Arguments) -> std::io::Result<()> {
    let pretend = arguments.socket.is_some();
    let places = Places {
        run_dir: arguments.run_dir.unwrap_or_else(|| "/run/slurm-vm".into()),
        fallback_dir: if pretend {
            "/tmp/slurm-vm-guest".into()
        } else {
            "/var/lib/slurm-vm".into()
        },
        // A pretended guest is the host: its users are nobody's business.
        passwd: arguments.passwd.or_else(|| (!pretend).then(|| "/etc/passwd".into())),
    };
    let port = match (arguments.port, arguments.socket) {
        (Some(device), _) => Port::device(device),
        (None, Some(socket)) => Port::listen(&socket)?,
        (None, None) => return Err(std::io::ErrorKind::InvalidInput.into()),
    };
    if !pretend && Path::new("/proc/self/oom_score_adj").exists() {
        // A job that eats all memory must not take with it the one who reports that. Programs start with 0 again.
        let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    }
    Server::new(Options { places, pretend }, port)?.run()
}

fn main() -> ExitCode {
    spawn::close_inherited();
    reserve_standard_descriptors();
    let arguments = match parse(std::env::args_os().skip(1)) {
        Ok(arguments) => arguments,
        Err(message) => {
            eprintln!("slurm-vm-guest: {message}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("slurm-vm-guest: failed: {error}");
            ExitCode::FAILURE
        }
    }
}
