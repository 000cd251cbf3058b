//! What goes between a link and its owner.

use slurm_vm_api::guest::{Action, ExitStatus, Failure, GuestHello, Refusal, StartReport, StartSpec, Stream, StreamReport};

/// What the owner of a link asks for.
#[derive(Debug)]
pub enum LinkRequest {
    /// Starts a program and follows its output from the beginning (or from where a `Resume` said). A program with this id that runs already,
    /// or has ended, is followed instead. Answered by `Started` or `Refused`.
    Start {
        /// The program's id.
        program: u32,
        /// What to start.
        spec: Box<StartSpec>,
        /// The batch script; its path in the guest replaces the first argument.
        script: Option<Vec<u8>>,
    },
    /// Follows a stream of a program from this offset on, now and after every break, and hears of the program's end. Everything below is
    /// acknowledged. For a program that an earlier link has started.
    Resume {
        /// The program.
        program: u32,
        /// Which stream.
        stream: Stream,
        /// The first byte wanted.
        from: u64,
    },
    /// The bytes below `offset` are safe: the guest may drop them, and send as many more.
    Ack {
        /// The program.
        program: u32,
        /// Which stream.
        stream: Stream,
        /// Everything below.
        offset: u64,
    },
    /// Bytes for a program's standard input. No more than [`RING_BYTES`](slurm_vm_api::guest::RING_BYTES) may be un-acknowledged.
    Stdin {
        /// The program.
        program: u32,
        /// Offset of the first byte.
        offset: u64,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Standard input ends at this offset.
    StdinEof {
        /// The program.
        program: u32,
        /// Its end.
        offset: u64,
    },
    /// Does something once. Answered by `Done` with the same token.
    Do {
        /// The owner's name for it.
        token: u64,
        /// What to do.
        action: Action,
    },
}

/// What a link tells its owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkEvent {
    /// The helper has answered; all streams go on by themselves.
    Up {
        /// What it said.
        hello: Box<GuestHello>,
    },
    /// The connection is gone; the link connects again by itself.
    Down {
        /// Why, for the log.
        reason: String,
    },
    /// A program was started, now or before.
    Started {
        /// The program.
        program: u32,
        /// How it went.
        report: StartReport,
    },
    /// A program was not started.
    Refused {
        /// The program.
        program: u32,
        /// Why.
        reason: Refusal,
        /// For a person.
        message: String,
    },
    /// The next bytes of a stream: `offset` is where the last ones ended.
    Data {
        /// The program.
        program: u32,
        /// Which stream.
        stream: Stream,
        /// Offset of the first byte.
        offset: u64,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// A stream has ended; all its bytes have been delivered.
    Eof {
        /// The program.
        program: u32,
        /// Which stream.
        stream: Stream,
        /// Its end.
        offset: u64,
    },
    /// A program has ended, and all output of the streams followed has been delivered.
    Exited {
        /// The program.
        program: u32,
        /// How.
        status: ExitStatus,
        /// Its output streams.
        streams: Vec<StreamReport>,
    },
    /// The program has taken its input up to here: the owner may drop it.
    StdinAck {
        /// The program.
        program: u32,
        /// Everything below.
        offset: u64,
    },
    /// Input did not join on to what came before, or was too much: nothing was taken, go on from `next`.
    StdinRejected {
        /// The program.
        program: u32,
        /// The offset to go on from.
        next: u64,
    },
    /// A stream's bytes from `wanted` on are not in the guest any more (or never were); it goes on at `start`.
    Lost {
        /// The program.
        program: u32,
        /// Which stream.
        stream: Stream,
        /// What was to come next.
        wanted: u64,
        /// What comes next.
        start: u64,
    },
    /// The guest does not know a program that runs there by all we know: it was reset, or its helper was.
    ProgramLost {
        /// The program.
        program: u32,
    },
    /// A request was carried out, or not.
    Done {
        /// The owner's name for it.
        token: u64,
        /// Why not; `None` when it was.
        failed: Option<Failure>,
    },
    /// Before its clock was set, the guest's was so far behind.
    ClockWas {
        /// Nanoseconds; negative: ahead.
        behind_ns: i64,
    },
    /// The guest did what it must not; the connection was dropped.
    Violation {
        /// What it did.
        what: String,
    },
    /// The helper speaks only a protocol that is too old or too new.
    Incompatible {
        /// Its protocol.
        protocol: u32,
    },
}
