//! One question to the agent, by a deadline.
#![forbid(unsafe_code)]
use crate::os;
use slurm_vm_api::hooks::{self, HookMessage, HookReply, HookRequest, MAX_LINE};
use std::{
    io::{self, Read, Write},
    path::Path,
    time::{Duration, Instant},
};

/// Why there is no answer.
#[derive(Debug)]
pub enum NoAnswer {
    /// Nobody listens.
    Unreachable(String),
    /// Somebody listens, and no answer that can be read came in time.
    Broken(String),
}

impl std::fmt::Display for NoAnswer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            NoAnswer::Unreachable(why) => write!(f, "the agent cannot be reached: {why}"),
            NoAnswer::Broken(why) => write!(f, "the agent did not answer: {why}"),
        }
    }
}

/// Sends a request and reads the reply. `connect_for` bounds the connecting, `deadline` all of it.
pub fn ask(socket: &Path, request: HookRequest, connect_for: Duration, deadline: Duration) -> Result<HookReply, NoAnswer> {
    let end = Instant::now() + deadline;
    let connected = os::connect(socket, end.min(Instant::now() + connect_for));
    let mut stream = connected.map_err(|e| NoAnswer::Unreachable(format!("{}: {e}", socket.display())))?;
    let broken = |e: io::Error| {
        let timed_out = matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
        NoAnswer::Broken(if timed_out {
            format!("nothing for {} s", deadline.as_secs())
        } else {
            e.to_string()
        })
    };
    // A timeout of zero would mean "for ever".
    let left = || end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    stream.set_write_timeout(Some(left())).map_err(broken)?;
    stream
        .write_all(hooks::to_line(&HookMessage::new(request)).as_bytes())
        .map_err(broken)?;
    let mut line = Vec::new();
    let mut chunk = [0_u8; 1024];
    while !line.contains(&b'\n') {
        if Instant::now() >= end {
            return Err(broken(io::ErrorKind::TimedOut.into()));
        }
        stream.set_read_timeout(Some(left())).map_err(broken)?;
        match stream.read(&mut chunk) {
            Ok(0) => return Err(NoAnswer::Broken("it closed the connection".to_owned())),
            Ok(n) => line.extend_from_slice(&chunk[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(broken(e)),
        }
        if line.len() > MAX_LINE {
            return Err(NoAnswer::Broken("its answer is too long".to_owned()));
        }
    }
    let text = String::from_utf8_lossy(&line);
    hooks::reply_from_line(text.lines().next().unwrap_or_default()).map_err(NoAnswer::Broken)
}
