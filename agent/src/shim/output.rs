//! One output of the program: bytes arrive at offsets, are written to the task's descriptor, and are counted.
//!
//! The queue is bounded by the window that the agent keeps to. A descriptor is never made non-blocking in place:
//! its open file description may be shared with slurmstepd or other tasks.
use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl, open},
    sys::{
        socket::{MsgFlags, send},
        stat::{Mode, SFlag, fstat},
    },
    unistd::{Whence, fsync, ftruncate, lseek, write},
};
use slurm_vm_api::session::{Sink, Stream, StreamStart};

/// A pipe that polls writable takes this much without blocking.
const ATOMIC: usize = 4096;
const CHUNK: usize = 64 << 10;
/// A full file system or quota: the bytes are kept and tried again, so that the program waits instead of losing output.
const RETRY: Duration = Duration::from_secs(1);

/// How a descriptor is written without blocking the relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Regular files and devices: a write does not wait for a reader.
    Plain,
    /// Own description with `O_NONBLOCK`.
    Reopened,
    /// MSG_DONTWAIT.
    Socket,
    /// Small writes after poll(2) said that there is room.
    Small,
}

/// What an attempt to write did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrote {
    /// Some or all, or nothing for now.
    Fine,
    /// The reader is gone: a program would have got SIGPIPE.
    Closed,
}

/// One output stream of the program.
#[derive(Debug)]
pub struct Output {
    /// Which stream it is.
    pub stream: Stream,
    /// The file behind the descriptor, with the base that is in force.
    pub sink: Sink,
    fd: OwnedFd,
    way: Way,
    queue: VecDeque<u8>,
    written: u64,
    acked: u64,
    closed: bool,
    retry_at: Option<Instant>,
}

impl Output {
    /// Looks at a descriptor (a duplicate of the task's) and prepares to write to it.
    ///
    /// # Errors
    /// Those of fstat(2).
    pub fn new(stream: Stream, fd: OwnedFd) -> io::Result<Self> {
        let stat = fstat(&fd)?;
        let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
        let regular = kind == SFlag::S_IFREG;
        let sink = Sink {
            regular,
            dev: stat.st_dev,
            ino: stat.st_ino,
            base: if regular { u64::try_from(stat.st_size).unwrap_or(0) } else { 0 },
        };
        let (fd, way) = if kind == SFlag::S_IFIFO || (kind == SFlag::S_IFCHR && nix::unistd::isatty(&fd).unwrap_or(false)) {
            let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
            match open(
                path.as_str(),
                OFlag::O_WRONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC,
                Mode::empty(),
            ) {
                Ok(own) => (own, Way::Reopened),
                Err(_) => (fd, Way::Small),
            }
        } else if kind == SFlag::S_IFSOCK {
            (fd, Way::Socket)
        } else {
            (fd, Way::Plain)
        };
        Ok(Self {
            stream,
            sink,
            fd,
            way,
            queue: VecDeque::new(),
            written: 0,
            acked: 0,
            closed: false,
            retry_at: None,
        })
    }

    /// Offset of the next byte that is new.
    pub fn received(&self) -> u64 {
        self.written + self.queue.len() as u64
    }

    /// Bytes since the program began that are in the descriptor.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Bytes that wait to be written.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Takes bytes; what was had before is skipped (the agent may send again after a break).
    /// `false`: bytes between are missing.
    pub fn take(&mut self, offset: u64, bytes: &[u8]) -> bool {
        let Some(had) = self.received().checked_sub(offset) else {
            return false;
        };
        let new = usize::try_from(had).ok().and_then(|had| bytes.get(had..)).unwrap_or_default();
        if self.closed {
            self.written += new.len() as u64;
        } else {
            self.queue.extend(new);
        }
        true
    }

    /// Drops what is not written yet; it will be sent again.
    pub fn drop_queue(&mut self) {
        self.queue.clear();
    }

    /// The first start of a program: the file is emptied as Slurm would have done without us.
    ///
    /// # Errors
    /// Those of ftruncate(2).
    pub fn truncate(&mut self) -> io::Result<()> {
        if self.sink.regular {
            ftruncate(&self.fd, 0)?;
            lseek(&self.fd, 0, Whence::SeekSet)?;
            self.sink.base = 0;
        }
        Ok(())
    }

    /// Goes on where an earlier shim (perhaps on another node) stopped. What it wrote beyond the last acknowledged
    /// byte is cut off, since it will be sent again. Returns how many acknowledged bytes the file lacks.
    ///
    /// # Errors
    /// Those of fstat(2), ftruncate(2) and lseek(2).
    pub fn resume(&mut self, start: &StreamStart) -> io::Result<u64> {
        (self.written, self.acked) = (start.offset, start.offset);
        self.queue.clear();
        if !self.sink.regular {
            return Ok(0);
        }
        let size = u64::try_from(fstat(&self.fd)?.st_size).unwrap_or(0);
        // The device number of a network file system is each node's own, so the inode is all that can be compared.
        let Some(before) = start.sink.as_ref().filter(|s| s.regular && s.ino == self.sink.ino) else {
            self.sink.base = size.saturating_sub(start.offset);
            return Ok(0);
        };
        self.sink.base = before.base;
        let expected = before.base + start.offset;
        if size > expected {
            ftruncate(&self.fd, i64::try_from(expected).map_err(io::Error::other)?)?;
        }
        if !OFlag::from_bits_truncate(fcntl(&self.fd, FcntlArg::F_GETFL)?).contains(OFlag::O_APPEND) {
            lseek(
                &self.fd,
                i64::try_from(expected.min(size)).map_err(io::Error::other)?,
                Whence::SeekSet,
            )?;
        }
        Ok(expected.saturating_sub(size))
    }

    /// Leaves out bytes that nobody has any more.
    pub fn skip_to(&mut self, offset: u64) {
        self.queue.clear();
        (self.written, self.acked) = (offset, offset);
    }

    /// Whether poll(2) should watch for room, and when to try again if the file system was full.
    pub fn wants_poll(&self) -> bool {
        !self.queue.is_empty() && self.retry_at.is_none()
    }

    /// A write without poll(2) before it might wait for the reader.
    pub fn needs_poll(&self) -> bool {
        self.way == Way::Small
    }

    /// When a full file system is tried again.
    pub fn retry_at(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Writes once.
    pub fn write(&mut self) -> Wrote {
        self.retry_at = None;
        if self.queue.is_empty() {
            return Wrote::Fine;
        }
        let (front, _) = self.queue.as_slices();
        let limit = if self.way == Way::Small { ATOMIC } else { CHUNK };
        let piece = &front[..front.len().min(limit)];
        let result = match self.way {
            Way::Socket => send(self.fd.as_raw_fd(), piece, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL),
            _ => write(&self.fd, piece),
        };
        match result {
            Ok(n) => {
                self.queue.drain(..n);
                self.written += n as u64;
                Wrote::Fine
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Wrote::Fine,
            Err(Errno::ENOSPC | Errno::EDQUOT) => {
                self.retry_at = Some(Instant::now() + RETRY);
                Wrote::Fine
            }
            Err(_) => {
                self.closed = true;
                self.written = self.received();
                self.queue.clear();
                Wrote::Closed
            }
        }
    }

    /// The offset to acknowledge, once there is enough to be worth a message or nothing is left to write.
    pub fn ack_due(&mut self, at_least: u64) -> Option<u64> {
        let due = self.written > self.acked && (self.queue.is_empty() || self.written - self.acked >= at_least);
        if due {
            self.acked = self.written;
        }
        due.then_some(self.written)
    }

    /// Forces a regular file to its storage, before another node goes on with it.
    ///
    /// # Errors
    /// Those of fsync(2).
    pub fn sync(&self) -> io::Result<()> {
        if self.sink.regular {
            fsync(&self.fd)?;
        }
        Ok(())
    }
}

impl AsFd for Output {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
