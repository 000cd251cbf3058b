//! What the command line says to the lab's inits: one JSON line there, one back, on a UNIX socket that root alone can open.

use crate::{Result, error::At};
use serde::{Deserialize, Serialize};
use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

/// A wish.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Request {
    /// Is everything started? (host and supervisor)
    Status,
    /// Start a host (supervisor).
    PowerOn(String),
    /// Kill a host without warning (supervisor).
    PowerOff(String),
    /// Let a service run (host).
    Start(String),
    /// End a service and keep it down (host).
    Stop(String),
    /// SIGKILL a service; it is restarted like any daemon that dies (host).
    Kill(String),
    /// Lose every packet to this address (host).
    Block(String),
    /// No longer lose them (host).
    Unblock(String),
    /// Leave no room on the VM state file system, or give it back (host).
    Fill(bool),
}

/// The answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Reply {
    /// What is wrong, if something is.
    pub error: Option<String>,
    /// One line per service (host) or host (supervisor).
    pub lines: Vec<StatusLine>,
}

/// State of one service or host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StatusLine {
    /// Its name.
    pub name: String,
    /// Whether it runs.
    pub up: bool,
    /// Whether somebody wanted it down, or it cannot run here and that is fine.
    pub excused: bool,
    /// Pid in the host's own pid namespace, restarts, or the reason why it is down.
    pub note: String,
}

/// Sends one request and waits for its answer.
pub fn ask(socket: &Path, request: &Request) -> Result<Vec<StatusLine>> {
    let mut stream = UnixStream::connect(socket).at("connect to", socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).at("set up", socket)?;
    let mut line = serde_json::to_string(request).map_err(|e| e.to_string())?;
    line.push('\n');
    stream.write_all(line.as_bytes()).at("write to", socket)?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).at("read from", socket)?;
    let reply: Reply = serde_json::from_str(&answer).map_err(|e| format!("{} answered `{}`: {e}", socket.display(), answer.trim()))?;
    match reply.error {
        Some(error) => Err(error.into()),
        None => Ok(reply.lines),
    }
}

/// Serves one connection; a client that says nothing for a second is dropped, for the caller has other things to do.
pub fn serve(stream: UnixStream, answer: impl FnOnce(Request) -> Result<Vec<StatusLine>>) {
    let _ = stream.set_nonblocking(false);
    let _ = stream.set_read_timeout(Some(Duration::from_secs(1)));
    let mut line = String::new();
    let mut reader = BufReader::new(stream);
    if reader.read_line(&mut line).is_err() || line.is_empty() {
        return;
    }
    let result = match serde_json::from_str::<Request>(&line) {
        Ok(request) => answer(request),
        Err(e) => Err(format!("not a request: {e}").into()),
    };
    let reply = match result {
        Ok(lines) => Reply { error: None, lines },
        Err(e) => Reply {
            error: Some(e.to_string()),
            lines: Vec::new(),
        },
    };
    if let Ok(mut text) = serde_json::to_string(&reply) {
        text.push('\n');
        // The client may have given up; nobody else wants to know.
        let _ = reader.get_mut().write_all(text.as_bytes());
    }
}
