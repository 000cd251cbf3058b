//! The channel to the host: a virtio-serial port, or a UNIX socket that stands in for one.
//!
//! A port is not a socket. It stays open in the guest whoever comes and goes on the host; while nobody is there a read gives 0 bytes, a write
//! `EAGAIN`, and poll reports a hang-up at once and for ever. So a port that is hung up is left out of the poll set and looked at again every
//! [`LOOK_AGAIN`]. A new host is noticed by its hello alone, never by the port's state.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::PollFlags;

/// How often a port without a host is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// The channel.
#[derive(Debug)]
pub struct Port {
    kind: Kind,
    fd: Option<OwnedFd>,
    look_at: Option<Instant>,
}

#[derive(Debug)]
enum Kind {
    Device(PathBuf),
    Listener(UnixListener),
}

/// What came of a read or a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moved {
    /// So many bytes.
    Bytes(usize),
    /// None at the moment.
    Nothing,
    /// The host has gone.
    Gone,
}

impl Port {
    /// A virtio-serial port. It need not exist yet.
    pub fn device(path: PathBuf) -> Self {
        Self {
            kind: Kind::Device(path),
            fd: None,
            look_at: None,
        }
    }

    /// A UNIX socket that takes one host at a time, as QEMU's does.
    pub fn listen(path: &std::path::Path) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            kind: Kind::Listener(listener),
            fd: None,
            look_at: None,
        })
    }

    /// Gets a descriptor if there is none. Errors are for the log: the port is tried again by itself.
    pub fn open(&mut self, now: Instant) -> io::Result<()> {
        if self.fd.is_some() || self.look_at.is_some_and(|at| now < at) {
            return Ok(());
        }
        let opened = match &self.kind {
            Kind::Device(path) => {
                let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
                self.look_at = Some(now + LOOK_AGAIN);
                nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty()).map_err(io::Error::from)
            }
            Kind::Listener(listener) => listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(true)?;
                Ok(UnixStream::into(stream))
            }),
        };
        match opened {
            Ok(fd) => {
                self.fd = Some(fd);
                self.look_at = None;
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The descriptor to wait on, and whether it is the channel itself, rather than a listener.
    pub fn poll_fd(&self, now: Instant) -> Option<(BorrowedFd<'_>, bool)> {
        match (&self.fd, &self.kind) {
            (Some(fd), _) => self.look_at.is_none_or(|at| now >= at).then_some((fd.as_fd(), true)),
            (None, Kind::Listener(listener)) => Some((listener.as_fd(), false)),
            (None, Kind::Device(_)) => None,
        }
    }

    /// When to look again without being woken.
    pub fn deadline(&self) -> Option<Instant> {
        self.look_at
    }

    /// Takes what poll said. True when the host is there.
    pub fn polled(&mut self, flags: PollFlags, now: Instant) -> bool {
        if matches!(self.kind, Kind::Listener(_)) {
            return true;
        }
        if flags.intersects(PollFlags::POLLNVAL | PollFlags::POLLERR) {
            self.fd = None;
        }
        let here = self.fd.is_some() && !flags.contains(PollFlags::POLLHUP);
        self.look_at = (!here).then(|| now + LOOK_AGAIN);
        here
    }

    /// Reads.
    pub fn read(&mut self, buf: &mut [u8], now: Instant) -> Moved {
        let Some(fd) = &self.fd else { return Moved::Gone };
        let moved = match nix::unistd::read(fd, buf) {
            Ok(0) => Moved::Gone,
            Ok(read) => Moved::Bytes(read),
            Err(Errno::EAGAIN | Errno::EINTR) => Moved::Nothing,
            Err(_) => self.failed(),
        };
        self.after(moved, now)
    }

    /// Writes.
    pub fn write(&mut self, bytes: &[u8], now: Instant) -> Moved {
        let Some(fd) = &self.fd else { return Moved::Gone };
        let moved = match nix::unistd::write(fd, bytes) {
            Ok(written) => Moved::Bytes(written),
            Err(Errno::EAGAIN | Errno::EINTR) => Moved::Nothing,
            Err(_) => self.failed(),
        };
        self.after(moved, now)
    }

    fn failed(&mut self) -> Moved {
        // ENODEV: the port was unplugged. It is opened again when it is back.
        self.fd = None;
        Moved::Gone
    }

    fn after(&mut self, moved: Moved, now: Instant) -> Moved {
        if moved == Moved::Gone {
            match self.kind {
                Kind::Listener(_) => self.fd = None,
                Kind::Device(_) => self.look_at = Some(now + LOOK_AGAIN),
            }
        }
        moved
    }
}
