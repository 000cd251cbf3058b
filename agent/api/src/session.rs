//! What the shim (`slurm-vm-run`) and the node agent say to each other over the agent's UNIX socket.
//!
//! A session is one task of one step: it begins with the byte [`OPENING`], then both sides send frames
//! `length (u32 LE, of what follows) | kind (u8) | body`. Control frames are JSON, data frames raw bytes behind an
//! offset. The shim sends its blobs (environment, argument vector, script) first and [`ToAgent::Open`] last; the
//! agent answers with progress, then [`ToShim::Started`], data, and exactly one of [`ToShim::Exited`],
//! [`ToShim::Failed`] or [`ToShim::HandOver`].
//!
//! Offsets count the bytes of a stream since the program began, so that a session can be opened again after either
//! side was restarted, or on another node: the shim names what it has written, the agent goes on from there.
use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

use crate::spec::VmSpec;

/// First byte of a session on the agent's socket; hook and `svm` requests begin with `{` instead.
pub const OPENING: u8 = b'S';
/// Version of this protocol; a peer accepts its own and the one before.
pub const VERSION: u32 = 1;
/// The largest frame body either side accepts: room for an environment or a script as large as Slurm lets through.
pub const MAX_BODY: usize = 8 << 20;
/// How many bytes of a stream one data frame carries at most.
pub const MAX_DATA: usize = 64 << 10;
/// How many bytes of an output stream the agent sends beyond the last [`ToAgent::Wrote`]; a shim that holds twice as
/// much stops reading from the agent.
pub const WINDOW: usize = 256 << 10;
/// How many bytes of stdin the shim sends beyond the last [`ToShim::StdinTaken`].
pub const STDIN_WINDOW: usize = 128 << 10;

/// One of a program's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, PartialOrd, Ord)]
#[serde(rename_all = "lowercase")]
pub enum Stream {
    /// Towards the program.
    Stdin,
    /// From the program; with a pty or with stderr merged the only one.
    Stdout,
    /// From the program.
    Stderr,
}

/// What kind of step a task belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StepKind {
    /// The batch script: the only kind that can be requeued.
    Batch,
    /// A step of srun.
    Step,
}

/// A terminal's size and type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// Rows of characters.
    pub rows: u16,
    /// Columns of characters.
    pub cols: u16,
}

/// One resource limit as getrlimit(2) reports it; `None` is unlimited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// Number of the resource (RLIMIT_*, Linux x86-64).
    pub resource: u32,
    /// Soft limit.
    pub soft: Option<u64>,
    /// Hard limit.
    pub hard: Option<u64>,
}

/// What the shim knows of the file behind one of its output descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sink {
    /// A regular file keeps exactly-once across a move; a pipe, socket or terminal cannot.
    pub regular: bool,
    /// `st_dev` of the file.
    pub dev: u64,
    /// `st_ino` of the file.
    pub ino: u64,
    /// Size in bytes before the program's first byte: where offset 0 of the stream stands in the file.
    pub base: u64,
    /// Size of the file at a hand-over at which all that the shim wrote was in it and on storage. What stands beyond is from
    /// others. `None`: the shim did not get to say so, or has written since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<u64>,
}

/// Control frames from the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToAgent {
    /// Opens the session; environment, arguments and script have gone ahead as blobs.
    Open(Box<Open>),
    /// All bytes of the stream below this offset have been written to the shim's descriptor; a regular file has been synced.
    Wrote {
        /// Which stream.
        stream: Stream,
        /// Bytes since the program began.
        offset: u64,
    },
    /// No more input after this offset.
    StdinEof {
        /// Bytes since the program began.
        offset: u64,
    },
    /// A signal to pass to the program.
    Signal {
        /// Linux signal number.
        signo: i32,
    },
    /// The shim got SIGTERM and asks what it means; answered by [`ToShim::Cause`].
    WhyTerm,
    /// Slurm's preemption notice arrived (design: a real-time signal at the start of grace).
    Notice,
    /// The terminal's size changed.
    Resize(Terminal),
    /// The shim writes nothing more: the answer to [`ToShim::HandOver`].
    HandedOver {
        /// Offsets written, by stream; of a regular file what is on its storage.
        wrote: Vec<(Stream, u64)>,
        /// The files, with [`Sink::end`] where everything in them is on their storage.
        #[serde(default)]
        sinks: Vec<(Stream, Sink)>,
    },
}

/// The request that opens a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// [`VERSION`] of the shim.
    pub version: u32,
    /// Slurm's job id.
    pub job: u32,
    /// Slurm's step id; the batch step is [`BATCH_STEP`].
    pub step: u32,
    /// Global task rank within the step.
    pub task: u32,
    /// Slurm's restart count of the job.
    pub restart: u32,
    /// Batch script or step.
    pub kind: StepKind,
    /// What the user asked for.
    pub spec: VmSpec,
    /// Directory to start in.
    pub cwd: String,
    /// File mode creation mask.
    pub umask: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// The job's user, for the guest's passwd line.
    pub user: UserEntry,
    /// Limits of the task.
    pub rlimits: Vec<Rlimit>,
    /// A terminal is on the task's standard streams.
    pub terminal: Option<Terminal>,
    /// stdout and stderr are one file here, so they are one stream in the guest.
    pub merge_stderr: bool,
    /// Where stdout goes.
    pub stdout: Sink,
    /// Where stderr goes.
    pub stderr: Sink,
    /// Offsets that this shim has already written: it reconnects after the agent was restarted. Empty at first.
    pub resume: Vec<(Stream, u64)>,
}

/// Step id of the batch step (slurm.h: SLURM_BATCH_SCRIPT).
pub const BATCH_STEP: u32 = 0xffff_fffb;

/// What a passwd line says of a user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct UserEntry {
    /// Login name.
    pub name: String,
    /// Numeric user id.
    pub uid: u32,
    /// Numeric primary group.
    pub gid: u32,
    /// Home directory.
    pub home: String,
    /// Login shell.
    pub shell: String,
}

/// Why Slurm sent SIGTERM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// scancel, or the job was ended by an administrator.
    Cancel,
    /// The time limit was reached.
    TimeLimit,
    /// The job is requeued, its VM stays alive elsewhere or in a save: leave quietly.
    Moved,
    /// The job is requeued and starts over.
    Requeued,
    /// Grace has begun; the job goes on for now.
    Preemption,
    /// Slurm did not say in time.
    Unknown,
}

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ended {
    /// exit(2) with this code.
    Code(i32),
    /// Killed by this signal.
    Signal(i32),
    /// It could not be started: an errno of execve(2) in the guest.
    NotStarted {
        /// errno.
        errno: i32,
        /// The path that was tried.
        path: String,
    },
}

/// Control frames from the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToShim {
    /// A line for a terminal; never for a batch job's output.
    Progress(String),
    /// The program runs (or ran on all the time, when the VM was moved).
    Started {
        /// Offset each stream goes on from, and what the agent knows of the file it was written to before.
        from: Vec<StreamStart>,
        /// The VM came from another node or a save with its program running.
        resumed: bool,
    },
    /// stdin up to this offset has been taken.
    StdinTaken {
        /// Bytes since the program began.
        offset: u64,
    },
    /// Answer to [`ToAgent::WhyTerm`].
    Cause(Cause),
    /// The program has ended and every byte of its output was sent before this frame.
    Exited(Ended),
    /// The program cannot run or was lost; `outcome` is one of the documented exit codes.
    Failed {
        /// Exit code of the shim.
        outcome: i32,
        /// One line for the user.
        why: String,
    },
    /// The VM leaves this node: sync the output, answer [`ToAgent::HandedOver`], then wait for SIGTERM.
    HandOver,
    /// The move did not happen: go on as before.
    TakeBack,
}

/// Where a stream goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamStart {
    /// Which stream.
    pub stream: Stream,
    /// First offset that will be sent.
    pub offset: u64,
    /// The file an earlier shim wrote to, when it was a regular one: offset 0 is at `base` in it.
    pub sink: Option<Sink>,
}

/// One frame, either way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame<C> {
    /// A control message.
    Control(C),
    /// Bytes of a stream at an offset.
    Data {
        /// Which stream.
        stream: Stream,
        /// Offset of the first byte.
        offset: u64,
        /// At most [`MAX_DATA`] bytes.
        bytes: Vec<u8>,
    },
    /// The environment: `KEY=VALUE`, each ended by NUL.
    Environment(Vec<u8>),
    /// The argument vector, each argument ended by NUL.
    Arguments(Vec<u8>),
    /// The batch script's text.
    Script(Vec<u8>),
}

const KIND_CONTROL: u8 = 0;
const KIND_STDIN: u8 = 1;
const KIND_STDOUT: u8 = 2;
const KIND_STDERR: u8 = 3;
const KIND_ENVIRONMENT: u8 = 10;
const KIND_ARGUMENTS: u8 = 11;
const KIND_SCRIPT: u8 = 12;

/// Writes one frame in a single `write_all`.
///
/// # Errors
/// Those of the writer, or `InvalidInput` for a body above [`MAX_BODY`].
pub fn write_frame<C: Serialize>(to: &mut impl Write, frame: &Frame<C>) -> io::Result<()> {
    let mut buffer = vec![0u8; 5];
    let kind = match frame {
        Frame::Control(c) => {
            serde_json::to_writer(&mut buffer, c)?;
            KIND_CONTROL
        }
        Frame::Data { stream, offset, bytes } => {
            buffer.extend_from_slice(&offset.to_le_bytes());
            buffer.extend_from_slice(bytes);
            match stream {
                Stream::Stdin => KIND_STDIN,
                Stream::Stdout => KIND_STDOUT,
                Stream::Stderr => KIND_STDERR,
            }
        }
        Frame::Environment(b) => {
            buffer.extend_from_slice(b);
            KIND_ENVIRONMENT
        }
        Frame::Arguments(b) => {
            buffer.extend_from_slice(b);
            KIND_ARGUMENTS
        }
        Frame::Script(b) => {
            buffer.extend_from_slice(b);
            KIND_SCRIPT
        }
    };
    let body = buffer.len() - 5;
    if body > MAX_BODY {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a frame of {body} bytes is over the limit of {MAX_BODY}"),
        ));
    }
    let length = u32::try_from(body + 1).expect("MAX_BODY fits u32");
    buffer[..4].copy_from_slice(&length.to_le_bytes());
    buffer[4] = kind;
    to.write_all(&buffer)
}

/// What a frame is, as far as its head tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A control message.
    Control,
    /// Bytes of a stream.
    Data,
    /// Environment, arguments or script.
    Blob,
}

/// Reads one frame; `None` at a clean end between frames.
///
/// # Errors
/// Those of the reader; `InvalidData` for an unknown kind, bad JSON or a frame above [`MAX_BODY`] (checked before
/// anything is allocated).
pub fn read_frame<C: for<'a> Deserialize<'a>>(from: &mut impl Read) -> io::Result<Option<Frame<C>>> {
    read_frame_if(from, |_, _| Ok(()))
}

/// As [`read_frame`]; `may` hears of the kind and the size of a frame before memory is taken for it, and can refuse.
///
/// # Errors
/// As [`read_frame`], and what `may` says.
pub fn read_frame_if<C: for<'a> Deserialize<'a>>(
    from: &mut impl Read,
    may: impl FnOnce(Kind, usize) -> io::Result<()>,
) -> io::Result<Option<Frame<C>>> {
    let bad = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    let mut head = [0u8; 5];
    let mut have = 0;
    while have < head.len() {
        match from.read(&mut head[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => have += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let length = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
    if length == 0 || length > MAX_BODY + 1 {
        return Err(bad(format!("a frame of {length} bytes is over the limit of {MAX_BODY}")));
    }
    may(
        match head[4] {
            KIND_CONTROL => Kind::Control,
            KIND_STDIN | KIND_STDOUT | KIND_STDERR => Kind::Data,
            _ => Kind::Blob,
        },
        length - 1,
    )?;
    let mut body = vec![0u8; length - 1];
    from.read_exact(&mut body)?;
    let data = |stream, mut body: Vec<u8>| -> io::Result<Frame<C>> {
        let Some((offset, _)) = body.split_first_chunk::<8>() else {
            return Err(bad("a data frame without an offset".into()));
        };
        let offset = u64::from_le_bytes(*offset);
        body.drain(..8);
        Ok(Frame::Data {
            stream,
            offset,
            bytes: body,
        })
    };
    Ok(Some(match head[4] {
        KIND_CONTROL => {
            Frame::Control(serde_json::from_slice(&body).map_err(|e| bad(format!("a control frame that is not understood: {e}")))?)
        }
        KIND_STDIN => data(Stream::Stdin, body)?,
        KIND_STDOUT => data(Stream::Stdout, body)?,
        KIND_STDERR => data(Stream::Stderr, body)?,
        KIND_ENVIRONMENT => Frame::Environment(body),
        KIND_ARGUMENTS => Frame::Arguments(body),
        KIND_SCRIPT => Frame::Script(body),
        other => return Err(bad(format!("a frame of unknown kind {other}"))),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_as_they_were_sent() {
        let frames: Vec<Frame<ToAgent>> = vec![
            Frame::Environment(b"A=1\0B=two words\0".to_vec()),
            Frame::Control(ToAgent::Signal { signo: 15 }),
            Frame::Data {
                stream: Stream::Stdin,
                offset: 7,
                bytes: vec![0, 255, 10],
            },
            Frame::Data {
                stream: Stream::Stdout,
                offset: 0,
                bytes: vec![],
            },
        ];
        let mut wire = Vec::new();
        for f in &frames {
            write_frame(&mut wire, f).unwrap();
        }
        let mut from = wire.as_slice();
        for f in &frames {
            assert_eq!(read_frame::<ToAgent>(&mut from).unwrap().as_ref(), Some(f));
        }
        assert_eq!(read_frame::<ToAgent>(&mut from).unwrap(), None);
    }

    #[test]
    fn a_frame_can_be_refused_by_its_head_before_its_body_is_there() {
        let mut wire = Vec::new();
        write_frame::<ToAgent>(&mut wire, &Frame::Script(vec![0; 1000])).unwrap();
        let mut seen = None;
        let refuse = |kind, bytes| {
            seen = Some((kind, bytes));
            Err(io::ErrorKind::OutOfMemory.into())
        };
        let e = read_frame_if::<ToAgent>(&mut &wire[..5], refuse).unwrap_err();
        assert_eq!((e.kind(), seen), (io::ErrorKind::OutOfMemory, Some((Kind::Blob, 1000))));
    }

    #[test]
    fn an_oversized_frame_is_refused_before_it_is_allocated() {
        let mut wire = u32::MAX.to_le_bytes().to_vec();
        wire.push(0);
        let e = read_frame::<ToAgent>(&mut wire.as_slice()).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::InvalidData);
    }
}
