//! The shim's end of the agent's socket: non-blocking, with frames in and out of buffers.
//!
//! Nothing here blocks: the relay must go on answering signals while the agent is slow, restarted or gone.
use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::Instant,
};

use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket},
};
use slurm_vm_api::session::{Frame, MAX_BODY, OPENING, ToAgent, ToShim, read_frame, write_frame};

const CHUNK: usize = 64 << 10;

/// A connection to the agent.
#[derive(Debug)]
pub struct Link {
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    /// When it was made: a link that breaks at once is no sign of a healthy agent.
    pub since: Instant,
}

impl Link {
    /// Connects without waiting: a listener with a full backlog is an error like an absent one, to be tried again.
    ///
    /// # Errors
    /// Those of socket(2) and connect(2).
    pub fn connect(path: &Path) -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Unix,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            None,
        )?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(Self {
            stream: UnixStream::from(fd),
            input: Vec::new(),
            output: vec![OPENING],
            since: Instant::now(),
        })
    }

    /// Puts a frame in line; [`Link::flush`] sends it.
    ///
    /// # Errors
    /// A body above the protocol's limit.
    pub fn send(&mut self, frame: &Frame<ToAgent>) -> io::Result<()> {
        write_frame(&mut self.output, frame)
    }

    /// How many bytes wait to be sent.
    pub fn backlog(&self) -> usize {
        self.output.len()
    }

    /// Sends what the socket takes now.
    ///
    /// # Errors
    /// Those of write(2), but for a full socket.
    pub fn flush(&mut self) -> io::Result<()> {
        let mut sent = 0;
        let result = loop {
            if sent == self.output.len() {
                break Ok(());
            }
            match self.stream.write(&self.output[sent..]) {
                Ok(0) => break Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => sent += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => break Err(e),
            }
        };
        self.output.drain(..sent);
        result
    }

    /// Reads once what the socket has.
    ///
    /// # Errors
    /// Those of read(2); `UnexpectedEof` when the agent has closed.
    pub fn fill(&mut self) -> io::Result<()> {
        let have = self.input.len();
        self.input.resize(have + CHUNK, 0);
        let got = loop {
            match self.stream.read(&mut self.input[have..]) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        self.input.truncate(have + *got.as_ref().unwrap_or(&0));
        match got {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// The next whole frame that was read.
    ///
    /// # Errors
    /// `InvalidData` for what is no frame of this protocol.
    pub fn next_frame(&mut self) -> io::Result<Option<Frame<ToShim>>> {
        let Some((head, _)) = self.input.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let whole = 4 + u32::from_le_bytes(*head) as usize;
        if whole <= 4 + MAX_BODY + 1 && self.input.len() < whole.max(5) {
            return Ok(None);
        }
        let mut rest = self.input.as_slice();
        let frame = read_frame(&mut rest)?;
        let used = self.input.len() - rest.len();
        self.input.drain(..used);
        Ok(frame)
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// Whether an error is of the kind that another try may mend, for the wording of the last one.
pub fn agent_is_absent(error: &io::Error) -> bool {
    error
        .raw_os_error()
        .is_some_and(|e| [Errno::ENOENT, Errno::ECONNREFUSED].contains(&Errno::from_raw(e)))
}
