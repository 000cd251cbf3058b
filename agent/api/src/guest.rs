//! What the agent and the helper in the guest say to each other, on top of [`crate::frame`].
//!
//! Three rules carry everything, so that either side may lose its memory of the connection at any byte:
//!
//! * **Hello first.** Whoever connects on the host sends [`ToGuest::Hello`] with a fresh nonce and believes nothing until the guest has
//!   answered with it. The answer is the whole state of the guest. Nothing flows in a session before it was asked for.
//! * **Streams are numbered bytes.** Each has a ring in the guest: bytes stay there until acknowledged, and are sent again from any offset
//!   in it. The reader's window is the ring: the guest cannot send more than `ring_bytes` beyond what was acknowledged.
//! * **Control is idempotent.** Starting a program twice, or repeating a request with the same id, changes nothing and reports the state.
//!
//! The page `docs/guest-protocol.md` has the exchange in full.

use std::fmt;

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::frame::{self, BodyTooLong, Kind};

/// The newest protocol that this source speaks.
pub const PROTOCOL: u32 = 1;
/// The oldest protocol that this source still speaks.
pub const OLDEST_PROTOCOL: u32 = 1;
/// Name of the virtio-serial port.
pub const PORT_NAME: &str = "org.slurm-vm.0";
/// Most bytes of a stream in one data frame.
pub const MAX_DATA_BYTES: usize = 32 * 1024;
/// Ring of a stream in the guest when the start names none; also the window of standard input and of uploads.
pub const RING_BYTES: u32 = 256 * 1024;
/// Smallest and largest ring that a start may ask for.
pub const RING_LIMITS: std::ops::RangeInclusive<u32> = 4096..=16 * 1024 * 1024;
/// Largest specification of a program (JSON): a full `execve` argument area with room to spare.
pub const MAX_SPEC_BYTES: u64 = 16 * 1024 * 1024;
/// Largest batch script.
pub const MAX_SCRIPT_BYTES: u64 = 64 * 1024 * 1024;
/// Most programs that a guest keeps at a time, so that a hello fits one frame.
pub const MAX_PROGRAMS: usize = 64;

/// Bytes that are usually text: JSON text when they are UTF-8, else an array of numbers. File names, arguments and environment strings
/// need not be text, and must arrive as they are.
#[derive(Clone, PartialEq, Eq, Default, Hash, PartialOrd, Ord)]
pub struct ByteString(pub Vec<u8>);

impl fmt::Debug for ByteString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.escape_ascii())
    }
}

impl From<&str> for ByteString {
    fn from(text: &str) -> Self {
        Self(text.as_bytes().to_vec())
    }
}

impl From<String> for ByteString {
    fn from(text: String) -> Self {
        Self(text.into_bytes())
    }
}

impl From<Vec<u8>> for ByteString {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

impl From<&[u8]> for ByteString {
    fn from(bytes: &[u8]) -> Self {
        Self(bytes.to_vec())
    }
}

impl Serialize for ByteString {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match std::str::from_utf8(&self.0) {
            Ok(text) => serializer.serialize_str(text),
            Err(_) => serializer.collect_seq(&self.0),
        }
    }
}

impl<'de> Deserialize<'de> for ByteString {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Bytes;
        impl<'de> Visitor<'de> for Bytes {
            type Value = ByteString;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text or an array of bytes")
            }
            fn visit_str<E>(self, text: &str) -> Result<ByteString, E> {
                Ok(text.into())
            }
            fn visit_string<E>(self, text: String) -> Result<ByteString, E> {
                Ok(text.into())
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<ByteString, A::Error> {
                let mut bytes = Vec::new();
                while let Some(byte) = seq.next_element()? {
                    bytes.push(byte);
                }
                Ok(ByteString(bytes))
            }
        }
        deserializer.deserialize_any(Bytes)
    }
}

/// A stream of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Stream {
    /// Host to guest.
    Stdin = 0,
    /// Guest to host; with merged pipes or a pty also what the program writes to its standard error.
    Stdout = 1,
    /// Guest to host; with merged pipes or a pty there is none.
    Stderr = 2,
}

impl Stream {
    /// The stream with this number on the wire.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        [Self::Stdin, Self::Stdout, Self::Stderr].get(usize::from(byte)).copied()
    }
}

/// Host to guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub enum ToGuest {
    /// Begins a session: the guest forgets what it was sending and answers with [`GuestHello`].
    Hello {
        /// Newest protocol of the host.
        protocol: u32,
        /// Oldest protocol of the host.
        oldest: u32,
        /// Repeated in the answer, so that an answer to an earlier host is not taken for ours.
        nonce: u64,
    },
    /// Starts a program from uploads that have arrived. Answered by [`ToHost::Started`] or [`ToHost::Refused`].
    Start {
        /// The program's id, chosen by the host. An id that is known already is not started again.
        program: u32,
        /// The upload with [`StartSpec`] as JSON.
        spec: Upload,
        /// The upload with the batch script.
        script: Option<Upload>,
    },
    /// Send this stream from this offset on.
    Resume {
        /// The program.
        program: u32,
        /// Which of its output streams.
        stream: Stream,
        /// First byte wanted. This acknowledges nothing: a host that has received bytes may still lose them.
        from: u64,
    },
    /// Something to do once. Answered by [`ToHost::Done`].
    Request {
        /// Repeating a request with the id of one that was done only repeats the answer.
        id: u64,
        /// What to do.
        action: Action,
    },
}

/// An upload as the host knows it: the guest checks that it has exactly this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upload {
    /// The channel that the bytes were put on.
    pub id: u32,
    /// How many bytes.
    pub len: u64,
    /// CRC-32 of them.
    pub crc32: u32,
}

/// What a request asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Action {
    /// Sends a signal. The answer is `ESRCH` when nobody is left to get it.
    Signal {
        /// The program.
        program: u32,
        /// The signal's number.
        signo: i32,
        /// Who gets it.
        scope: Scope,
    },
    /// Sets the size of a program's terminal; its foreground processes get SIGWINCH from the kernel.
    Resize {
        /// The program.
        program: u32,
        /// Lines.
        rows: u16,
        /// Columns.
        cols: u16,
    },
    /// Sets the guest's real-time clock: a guest that was saved, or moved, has lost time.
    SetClock {
        /// Nanoseconds since 1970.
        unix_ns: u64,
    },
    /// Sets the guest's host name.
    SetHostname {
        /// The name.
        name: String,
    },
    /// Writes the guest's file systems out.
    Sync,
    /// Freezes the guest's block-backed file systems. The guest thaws them by itself after [`FREEZE_LIMIT_S`].
    Freeze,
    /// Thaws them.
    Thaw,
    /// Writes the file systems out and powers the guest off. There is an answer only when it failed.
    Shutdown,
    /// Nothing but an answer.
    Ping,
    /// Kills what is left of a program and drops all that is known of it.
    Forget {
        /// The program.
        program: u32,
    },
    /// An action that this reader does not know; answered with `EOPNOTSUPP`.
    #[serde(other)]
    Unknown,
}

/// How long a guest stays frozen without being told to thaw: a host that died must not leave it stuck.
pub const FREEZE_LIMIT_S: u64 = 60;

/// Who gets a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// The program's first process alone, as `scancel --batch` does.
    Leader,
    /// All its processes that can be found: its session, its process group and all their descendants, as Slurm signals a step.
    All,
}

/// Guest to host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub enum ToHost {
    /// The answer to a hello.
    Hello(GuestHello),
    /// A start was carried out, now or before.
    Started {
        /// The program.
        program: u32,
        /// What came of it.
        report: StartReport,
    },
    /// A start was not carried out, and left nothing behind.
    Refused {
        /// The program.
        program: u32,
        /// Why.
        reason: Refusal,
        /// For a person.
        message: String,
    },
    /// A program's first process has ended, and its output streams end at the offsets given.
    Exited {
        /// The program.
        program: u32,
        /// How it ended.
        status: ExitStatus,
        /// Its output streams with their ends.
        streams: Vec<StreamReport>,
    },
    /// A stream's ring no longer has the offset that was asked for; the guest sends from `start` on.
    Lost {
        /// The program.
        program: u32,
        /// Which stream.
        stream: Stream,
        /// The first byte that is still there.
        start: u64,
    },
    /// A request was carried out.
    Done {
        /// Its id.
        id: u64,
        /// Why it failed; `None` when it did not.
        failed: Option<Failure>,
    },
    /// Before a clock was set: how far it was behind the time it was given. Right after a live move this is how long the
    /// guest stood still, for its clock stands still with it.
    ClockWas {
        /// Nanoseconds behind; negative: ahead.
        behind_ns: i64,
    },
    /// The guest saw a damaged frame within a session: the host begins a new one.
    Resync {
        /// How many so far.
        bad_frames: u64,
    },
    /// A message that this reader does not know.
    #[serde(other)]
    Unknown,
}

/// A system call's failure in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message} (errno {errno})")]
pub struct Failure {
    /// The guest's errno.
    pub errno: i32,
    /// For a person.
    pub message: String,
}

/// Why a start was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// An upload is not there, or not what the start says it is: put it again.
    Upload,
    /// The specification is not one.
    Spec,
    /// There are [`MAX_PROGRAMS`] programs: forget some.
    TooMany,
    /// The guest could not make pipes, a terminal, the script's file or the process.
    Failed,
    /// A reason that this reader does not know.
    #[serde(other)]
    Unknown,
}

/// All that a guest knows, at the start of a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestHello {
    /// The protocol that the guest will speak: at most the host's newest.
    pub protocol: u32,
    /// The nonce of the hello that this answers.
    pub nonce: u64,
    /// The kernel's boot id: another one means that the guest was reset.
    pub boot_id: String,
    /// Changes when the helper starts anew: its programs are then lost to it.
    pub instance: String,
    /// The helper's version.
    pub version: String,
    /// The kernel's release.
    pub kernel: String,
    /// The guest's host name.
    pub hostname: String,
    /// Damaged frames seen since the helper started.
    pub bad_frames: u64,
    /// The programs that were started and not forgotten.
    pub programs: Vec<ProgramReport>,
}

/// A program as the guest knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramReport {
    /// Its id.
    pub program: u32,
    /// Where it is in its life.
    pub state: ProgramState,
    /// How its start went.
    pub report: StartReport,
    /// Standard input: what the program has been given.
    pub stdin_consumed: u64,
    /// Its output streams.
    pub streams: Vec<StreamReport>,
}

/// Where a program is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum ProgramState {
    /// Runs, or has ended with output that is not in the ring yet.
    Running,
    /// Has ended; the streams' ends are final.
    Exited {
        /// How.
        status: ExitStatus,
    },
}

/// An output stream as the guest knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamReport {
    /// Which.
    pub stream: Stream,
    /// First byte that is still in the ring.
    pub start: u64,
    /// End of what the program has written so far.
    pub end: u64,
    /// No more will come.
    pub eof: bool,
    /// The ring's size: the most that comes un-acknowledged.
    pub ring_bytes: u32,
}

/// How a program's start went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct StartReport {
    /// The first process.
    pub pid: i32,
    /// The directory asked for was not usable (errno): the program runs in `/`.
    pub cwd_errno: Option<i32>,
    /// Limits that the guest's kernel did not accept.
    pub limits_refused: Vec<String>,
    /// Where the script was put: its `argv[0]`.
    pub script_path: Option<String>,
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "snake_case")]
pub enum ExitStatus {
    /// It exited.
    Code {
        /// With this code, 0 to 255.
        code: i32,
    },
    /// A signal ended it.
    Signal {
        /// Its number.
        signo: i32,
        /// With a core dump.
        core: bool,
    },
    /// It never ran.
    ExecFailed {
        /// The step that failed.
        step: ExecStep,
        /// Why.
        errno: i32,
    },
}

/// The steps between fork and the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExecStep {
    /// Session and terminal.
    Session,
    /// Standard input, output and error.
    Stdio,
    /// Supplementary groups, gid or uid.
    Identity,
    /// `/` as the directory of last resort.
    Directory,
    /// `execve`.
    Exec,
}

/// A program to start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartSpec {
    /// The arguments. With a script the first is replaced by the script's path in the guest, as slurmstepd does. Without, a first argument
    /// that has no slash is looked for in the PATH of `env`.
    pub argv: Vec<ByteString>,
    /// The whole environment, `NAME=value` each, kept in this order.
    pub env: Vec<ByteString>,
    /// The directory to run in; `/` when the user cannot enter it.
    pub cwd: ByteString,
    /// Numeric: the guest may not know the user.
    pub uid: u32,
    /// Numeric.
    pub gid: u32,
    /// Supplementary groups.
    #[serde(default)]
    pub groups: Vec<u32>,
    /// File mode mask.
    pub umask: u32,
    /// Resource limits to set; the others are the helper's own.
    #[serde(default)]
    pub limits: Vec<Limit>,
    /// What the program's standard streams are.
    pub stdio: Stdio,
    /// Ring of each output stream, within [`RING_LIMITS`]; [`RING_BYTES`] when not given.
    #[serde(default)]
    pub ring_bytes: Option<u32>,
    /// Makes the user known to the guest by a line in its passwd file, when it has none for the uid.
    #[serde(default)]
    pub user: Option<UserLine>,
    /// Directories of the host that are mounted before the program starts, outer ones first; what is mounted already stays.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<GuestMount>,
    /// The program does not run at all when it cannot run in `cwd`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cwd_required: bool,
    /// The guest has a network: the program begins once it is up, or after [`NETWORK_WITHIN_S`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub wait_network: bool,
}

/// How long a program waits for the guest's network, in seconds: longer than a distribution takes to bring it up under emulation.
pub const NETWORK_WITHIN_S: u64 = 60;

/// A directory of the host as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMount {
    /// The virtiofs device.
    pub tag: String,
    /// Where it is mounted; made when it is not there.
    pub target: ByteString,
    /// The guest does not write either.
    #[serde(default)]
    pub readonly: bool,
}

/// A resource limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// Name without `RLIMIT_`, as Slurm has it: `NOFILE`, `CORE`, `AS`…
    pub name: String,
    /// Soft limit; `None` is no limit.
    pub soft: Option<u64>,
    /// Hard limit; `None` is no limit.
    pub hard: Option<u64>,
}

/// What a program's standard streams are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "on", rename_all = "lowercase")]
pub enum Stdio {
    /// Pipes.
    Pipes {
        /// Standard output and standard error are one pipe: they keep their order.
        merge_stderr: bool,
        /// Standard input is a pipe fed by the host, else `/dev/null`.
        stdin: bool,
    },
    /// A terminal of its own, the program its session's leader.
    Pty {
        /// Lines.
        rows: u16,
        /// Columns.
        cols: u16,
        /// Sets TERM in the program's environment when the environment has none.
        term: Option<String>,
    },
}

/// A line for the guest's passwd file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserLine {
    /// Login name.
    pub name: String,
    /// Home directory.
    pub home: String,
    /// Login shell.
    pub shell: String,
}

/// A message could not be put into a frame.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// It is longer than a frame's body.
    #[error(transparent)]
    TooLong(#[from] BodyTooLong),
    /// It cannot be written as JSON.
    #[error("message cannot be written as json")]
    Json(#[source] serde_json::Error),
}

/// Appends a control message as a frame.
///
/// # Errors
/// When it does not fit a frame.
pub fn put_control<T: Serialize>(out: &mut Vec<u8>, message: &T) -> Result<(), EncodeError> {
    let text = serde_json::to_vec(message).map_err(EncodeError::Json)?;
    Ok(frame::encode(out, Kind::Control, 0, &[&text])?)
}

fn stream_head(stream: Stream, offset: u64) -> [u8; 9] {
    let mut head = [stream as u8; 9];
    head[1..].copy_from_slice(&offset.to_le_bytes());
    head
}

/// Appends bytes of a stream as a frame. At most [`MAX_DATA_BYTES`].
///
/// # Errors
/// When they do not fit a frame.
pub fn put_data(out: &mut Vec<u8>, program: u32, stream: Stream, offset: u64, bytes: [&[u8]; 2]) -> Result<(), BodyTooLong> {
    frame::encode(out, Kind::Data, program, &[&stream_head(stream, offset), bytes[0], bytes[1]])
}

/// Appends a frame that acknowledges a stream below `offset`, or ends it there.
///
/// # Errors
/// Never with these sizes; the signature is that of the coder.
pub fn put_mark(out: &mut Vec<u8>, kind: Kind, program: u32, stream: Stream, offset: u64) -> Result<(), BodyTooLong> {
    frame::encode(out, kind, program, &[&stream_head(stream, offset)])
}

/// Appends bytes of an upload as a frame.
///
/// # Errors
/// When they do not fit a frame.
pub fn put_upload(out: &mut Vec<u8>, upload: u32, offset: u64, bytes: &[u8]) -> Result<(), BodyTooLong> {
    frame::encode(out, Kind::Put, upload, &[&offset.to_le_bytes(), bytes])
}

/// Appends the acknowledgement of an upload as a frame.
///
/// # Errors
/// Never with these sizes; the signature is that of the coder.
pub fn put_upload_ack(out: &mut Vec<u8>, upload: u32, offset: u64) -> Result<(), BodyTooLong> {
    frame::encode(out, Kind::PutAck, upload, &[&offset.to_le_bytes()])
}

/// Splits the body of a data, ack or eof frame into stream, offset and bytes.
#[must_use]
pub fn split_stream(body: &[u8]) -> Option<(Stream, u64, &[u8])> {
    let (stream, rest) = body.split_first()?;
    let (offset, bytes) = split_offset(rest)?;
    Some((Stream::from_byte(*stream)?, offset, bytes))
}

/// Splits the body of a put or put-ack frame into offset and bytes.
#[must_use]
pub fn split_offset(body: &[u8]) -> Option<(u64, &[u8])> {
    let (offset, bytes) = body.split_first_chunk()?;
    Some((u64::from_le_bytes(*offset), bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_no_text_survive_json() {
        for bytes in [&b"plain"[..], b"", b"caf\xc3\xa9", b"\xff\xfe=\x00\x80"] {
            let text = serde_json::to_string(&ByteString::from(bytes)).unwrap();
            assert_eq!(serde_json::from_str::<ByteString>(&text).unwrap().0, bytes, "{text}");
        }
    }

    #[test]
    fn messages_have_the_documented_form() {
        let start = ToGuest::Start {
            program: 1,
            spec: Upload { id: 2, len: 300, crc32: 7 },
            script: None,
        };
        assert_eq!(
            serde_json::to_string(&start).unwrap(),
            r#"{"say":"start","program":1,"spec":{"id":2,"len":300,"crc32":7},"script":null}"#
        );
        let signal = ToGuest::Request {
            id: 9,
            action: Action::Signal {
                program: 1,
                signo: 15,
                scope: Scope::All,
            },
        };
        assert_eq!(
            serde_json::to_string(&signal).unwrap(),
            r#"{"say":"request","id":9,"action":{"do":"signal","program":1,"signo":15,"scope":"all"}}"#
        );
        let exited = ToHost::Exited {
            program: 1,
            status: ExitStatus::Code { code: 3 },
            streams: vec![],
        };
        assert_eq!(
            serde_json::to_string(&exited).unwrap(),
            r#"{"say":"exited","program":1,"status":{"by":"code","code":3},"streams":[]}"#
        );
    }

    #[test]
    fn a_newer_peers_messages_and_fields_are_tolerated() {
        assert_eq!(
            serde_json::from_str::<Action>(r#"{"do":"dance","with":[1]}"#).unwrap(),
            Action::Unknown
        );
        assert_eq!(serde_json::from_str::<ToHost>(r#"{"say":"sing"}"#).unwrap(), ToHost::Unknown);
        let done = serde_json::from_str::<ToHost>(r#"{"say":"done","id":4,"failed":null,"took_ms":3}"#).unwrap();
        assert_eq!(done, ToHost::Done { id: 4, failed: None });
    }

    #[test]
    fn a_hello_with_all_programs_fits_a_frame() {
        let stream = StreamReport {
            stream: Stream::Stdout,
            start: u64::MAX,
            end: u64::MAX,
            eof: false,
            ring_bytes: u32::MAX,
        };
        let program = ProgramReport {
            program: u32::MAX,
            state: ProgramState::Exited {
                status: ExitStatus::Signal { signo: 64, core: false },
            },
            report: StartReport {
                pid: i32::MAX,
                cwd_errno: Some(133),
                limits_refused: vec!["SIGPENDING".into(), "MSGQUEUE".into()],
                script_path: Some("/var/lib/slurm-vm/job4294967295/slurm_script".into()),
            },
            stdin_consumed: u64::MAX,
            streams: vec![stream; 2],
        };
        let hello = GuestHello {
            protocol: 1,
            nonce: u64::MAX,
            boot_id: "x".repeat(36),
            instance: "x".repeat(36),
            version: "x".repeat(20),
            kernel: "x".repeat(64),
            hostname: "x".repeat(64),
            bad_frames: u64::MAX,
            programs: vec![program; MAX_PROGRAMS],
        };
        put_control(&mut Vec::new(), &ToHost::Hello(hello)).unwrap();
    }

    #[test]
    fn stream_bodies_are_split_as_they_were_put() {
        let mut out = Vec::new();
        put_data(&mut out, 5, Stream::Stderr, 1 << 40, [b"ab", b"c"]).unwrap();
        let mut decoder = frame::Decoder::new();
        let frame = decoder.next(&mut &out[..]).unwrap();
        assert_eq!((frame.kind, frame.channel), (Kind::Data, 5));
        assert_eq!(split_stream(frame.body), Some((Stream::Stderr, 1 << 40, &b"abc"[..])));
        assert_eq!(split_stream(b"\x03\0\0\0\0\0\0\0\0"), None);
        assert_eq!(split_stream(b"\x01\0\0"), None);
    }
}
