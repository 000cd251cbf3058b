//! Running a program on a host of the lab: this process steps into the host's namespaces and starts the program there.
//!
//! Only the xtask program does that, for a process with threads (a test) cannot change its mount namespace.

use super::{
    PATH,
    options::{Places, USERS},
};
use crate::{Result, error::At};
use nix::{
    sched::{CloneFlags, setns},
    sys::{
        signal::{Signal, kill},
        socket::{getsockopt, sockopt::PeerCredentials},
    },
    unistd::Pid,
};
use signal_hook::{consts, iterator::Signals};
use std::{
    fs,
    os::unix::{
        net::UnixStream,
        process::{CommandExt, ExitStatusExt},
    },
    process::Command,
};

/// The pid of a host's init, as seen from here: the kernel says it of the socket that init listens on.
fn init_of(places: &Places, host: &str) -> Result<i32> {
    super::options::address(host)?;
    let socket = places.host_socket(host);
    let stream = UnixStream::connect(&socket).map_err(|_| {
        let name = places
            .state()
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        if super::state::alive(places).is_some() {
            format!("host {host} of lab {name} is off or unknown: `cargo xtask lab status --name {name}`")
        } else {
            format!("lab {name} is not up: `cargo xtask lab up --name {name}`")
        }
    })?;
    let peer = getsockopt(&stream, PeerCredentials).at("ask for the owner of", &socket)?;
    Ok(peer.pid())
}

fn step_into(pid: i32) -> Result<()> {
    // All are opened before the first is entered: /proc is another one afterwards.
    let kinds = [
        ("pid", CloneFlags::CLONE_NEWPID),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("uts", CloneFlags::CLONE_NEWUTS),
        ("net", CloneFlags::CLONE_NEWNET),
        ("mnt", CloneFlags::CLONE_NEWNS),
    ];
    let mut files = Vec::new();
    for (kind, flag) in kinds {
        let path = format!("/proc/{pid}/ns/{kind}");
        files.push((fs::File::open(&path).at("open", &path)?, flag, path));
    }
    for (file, flag, path) in files {
        setns(file, flag).at("enter", path)?;
    }
    Ok(())
}

/// Runs a program on a host, as a user, with this process's standard streams. Gives the exit code, 128 + the signal for one that was killed.
pub fn run(places: &Places, host: &str, user: Option<&str>, argv: &[String]) -> Result<i32> {
    let (program, args) = argv.split_first().ok_or("no command given: put it behind --")?;
    let user = match user {
        None | Some("root") => None,
        Some(name) => Some(
            USERS
                .iter()
                .find(|u| u.name == name)
                .ok_or_else(|| format!("unknown user {name}: root, alice, bob"))?,
        ),
    };
    // Signals for us are for the program; those from a terminal reach it by themselves, and it decides.
    let wanted = [consts::SIGTERM, consts::SIGHUP, consts::SIGINT, consts::SIGQUIT, consts::SIGCHLD];
    let mut signals = Signals::new(wanted).at("catch", "signals")?;
    step_into(init_of(places, host)?)?;
    let mut command = Command::new(program);
    command
        .args(args)
        .env_clear()
        .env("PATH", PATH)
        .env("LANG", "C.UTF-8")
        .env("SHELL", "/bin/bash");
    if let Some(term) = std::env::var_os("TERM") {
        command.env("TERM", term);
    }
    match user {
        Some(user) => {
            command.uid(user.id).gid(user.id).env("USER", user.name).env("LOGNAME", user.name);
            command
                .env("HOME", format!("/home/{}", user.name))
                .current_dir(format!("/shared/home/{}", user.name));
        }
        None => {
            command
                .env("USER", "root")
                .env("LOGNAME", "root")
                .env("HOME", "/root")
                .current_dir("/");
        }
    }
    // execvp looks along our own PATH, which may be anything.
    command.env("PATH", PATH);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(e) => {
            eprintln!("xtask: cannot run {program} on {host}: {e}");
            return Ok(127);
        }
    };
    let pid = Pid::from_raw(i32::try_from(child.id()).map_err(|e| e.to_string())?);
    // No thread for this: a process that starts its children in another pid namespace can have none.
    let status = loop {
        for signal in signals.wait() {
            if signal == consts::SIGTERM || signal == consts::SIGHUP {
                // The child may have ended: then nobody needs it.
                let _ = Signal::try_from(signal).and_then(|s| kill(pid, s));
            }
        }
        if let Some(status) = child.try_wait().at("wait for", program)? {
            break status;
        }
    };
    Ok(status.code().or_else(|| status.signal().map(|s| 128 + s)).unwrap_or(1))
}
