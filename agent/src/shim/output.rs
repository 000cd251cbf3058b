//! One output of the program: bytes arrive at offsets, are written to the task's descriptor, and are counted.
//!
//! The queue is bounded by the window that the agent keeps to. Regular files go through [`Durable`]. Any other descriptor
//! is never made non-blocking in place: its open file description may be shared with slurmstepd or other tasks.
use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::Instant,
};

use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::{
        socket::{MsgFlags, send},
        stat::{Mode, SFlag, fstat},
    },
    unistd::write,
};
use slurm_vm_api::session::{Sink, Stream, StreamStart};

use super::{
    durable::{Durable, RETRY},
    file::TaskFile,
};

/// A pipe that polls writable takes this much without blocking.
const ATOMIC: usize = 4096;
const CHUNK: usize = 64 << 10;

/// How a descriptor that is no regular file is written without blocking the relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Devices: a write does not wait for a reader.
    Plain,
    /// Own description with `O_NONBLOCK`.
    Reopened,
    /// MSG_DONTWAIT.
    Socket,
    /// Small writes after poll(2) said that there is room.
    Small,
}

#[derive(Debug)]
enum Target {
    File(Box<Durable<TaskFile>>),
    Other {
        fd: OwnedFd,
        way: Way,
        written: u64,
        /// The device was full.
        retry_at: Option<Instant>,
    },
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
    target: Target,
    queue: VecDeque<u8>,
    acked: u64,
    closed: bool,
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
            end: None,
        };
        let target = if regular {
            Target::File(Box::new(Durable::new(TaskFile::new(fd), sink.base)))
        } else {
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
            Target::Other {
                fd,
                way,
                written: 0,
                retry_at: None,
            }
        };
        Ok(Self {
            stream,
            sink,
            target,
            queue: VecDeque::new(),
            acked: 0,
            closed: false,
        })
    }

    /// Offset of the next byte that is new.
    pub fn received(&self) -> u64 {
        self.written() + self.queue.len() as u64
    }

    fn written(&self) -> u64 {
        match &self.target {
            Target::File(file) => file.written(),
            Target::Other { written, .. } => *written,
        }
    }

    /// Bytes since the program began that cannot be lost any more: in the descriptor, and on storage if it is a file.
    pub fn done(&self) -> u64 {
        match &self.target {
            Target::File(file) => file.synced(),
            Target::Other { written, .. } => *written,
        }
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
            self.skip(new.len() as u64);
        } else {
            self.queue.extend(new);
        }
        true
    }

    fn skip(&mut self, bytes: u64) {
        match &mut self.target {
            Target::File(file) => file.skip(bytes),
            Target::Other { written, .. } => *written += bytes,
        }
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
        if let Target::File(file) = &mut self.target {
            file.empty()?;
            self.sink.base = 0;
        }
        Ok(())
    }

    /// Goes on where an earlier shim (perhaps on another node) stopped.
    ///
    /// # Errors
    /// Those of the file.
    pub fn resume(&mut self, start: &StreamStart) -> io::Result<()> {
        self.queue.clear();
        self.acked = start.offset;
        match &mut self.target {
            Target::File(file) => {
                // The device number of a network file system is each node's own, so the inode is all that can be compared.
                let before = start.sink.as_ref().filter(|s| s.regular && s.ino == self.sink.ino);
                file.resume(start.offset, before)?;
                self.sink.base = file.base();
            }
            Target::Other { written, .. } => *written = start.offset,
        }
        Ok(())
    }

    /// Leaves out bytes that nobody has any more.
    pub fn skip_to(&mut self, offset: u64) {
        self.queue.clear();
        self.skip(offset.saturating_sub(self.written()));
    }

    /// Whether poll(2) should watch for room.
    pub fn wants_poll(&self) -> bool {
        !self.queue.is_empty()
            && match &self.target {
                Target::File(file) => !file.is_waiting(),
                Target::Other { retry_at, .. } => retry_at.is_none(),
            }
    }

    /// A write without poll(2) before it might wait for the reader.
    pub fn needs_poll(&self) -> bool {
        matches!(self.target, Target::Other { way: Way::Small, .. })
    }

    /// When [`Output::write`] is wanted without poll(2): to try again, or to sync.
    pub fn due_at(&self, now: Instant) -> Option<Instant> {
        match &self.target {
            Target::File(file) => file.due_at(now),
            Target::Other { retry_at, .. } => *retry_at,
        }
    }

    /// No more bytes will come.
    pub fn finish(&mut self) {
        if let Target::File(file) = &mut self.target {
            file.finish();
        }
    }

    /// Everything that came is where it belongs.
    pub fn is_settled(&self) -> bool {
        self.queue.is_empty()
            && match &self.target {
                Target::File(file) => file.is_settled(),
                Target::Other { .. } => true,
            }
    }

    /// The file fails, and not for want of room: since when, and how.
    pub fn broken(&self) -> Option<(Instant, Errno)> {
        match &self.target {
            Target::File(file) => file.broken(),
            Target::Other { .. } => None,
        }
    }

    /// Lines for the log.
    pub fn take_news(&mut self) -> Vec<String> {
        match &mut self.target {
            Target::File(file) => file.take_news(),
            Target::Other { .. } => Vec::new(),
        }
    }

    /// Writes once, and syncs if that is due.
    pub fn write(&mut self, now: Instant) -> Wrote {
        let result = match &mut self.target {
            Target::File(file) => file.advance(&mut self.queue, now),
            Target::Other {
                fd,
                way,
                written,
                retry_at,
            } => {
                *retry_at = None;
                if self.queue.is_empty() {
                    return Wrote::Fine;
                }
                let (front, _) = self.queue.as_slices();
                let limit = if *way == Way::Small { ATOMIC } else { CHUNK };
                let piece = &front[..front.len().min(limit)];
                let wrote = match way {
                    Way::Socket => send(fd.as_raw_fd(), piece, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL),
                    _ => write(&*fd, piece),
                };
                match wrote {
                    Ok(n) => {
                        self.queue.drain(..n);
                        *written += n as u64;
                        Ok(())
                    }
                    Err(Errno::EAGAIN | Errno::EINTR) => Ok(()),
                    Err(Errno::ENOSPC | Errno::EDQUOT) => {
                        *retry_at = Some(now + RETRY);
                        Ok(())
                    }
                    Err(e) => Err(e),
                }
            }
        };
        if result.is_ok() {
            return Wrote::Fine;
        }
        self.closed = true;
        self.skip(self.queue.len() as u64);
        self.queue.clear();
        if let Target::File(file) = &mut self.target {
            file.close();
        }
        Wrote::Closed
    }

    /// The offset to acknowledge, once there is enough to be worth a message or nothing is left to write. A file's syncs are
    /// rare enough.
    pub fn ack_due(&mut self, at_least: u64) -> Option<u64> {
        let done = self.done();
        let enough = matches!(self.target, Target::File(_)) || self.queue.is_empty() || done.saturating_sub(self.acked) >= at_least;
        let due = done > self.acked && enough;
        if due {
            self.acked = done;
        }
        due.then_some(done)
    }

    /// Before another node goes on: nothing more is written from here, and what was is put on storage if that can be done.
    pub fn hand_over(&mut self, now: Instant) {
        self.queue.clear();
        if let Target::File(file) = &mut self.target {
            self.sink.end = file.secure(now);
            self.sink.base = file.base();
        }
    }

    /// The session is opened again: [`Output::done`] should be as far as it can be.
    pub fn sync(&mut self, now: Instant) {
        if let Target::File(file) = &mut self.target {
            let _ = file.secure(now);
        }
    }
}

impl AsFd for Output {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.target {
            Target::File(file) => file.store().as_fd(),
            Target::Other { fd, .. } => fd.as_fd(),
        }
    }
}
