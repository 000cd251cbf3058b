//! Where the connection to a guest comes from.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Instant;

/// A connection: non-blocking, and with a descriptor that poll understands.
pub trait GuestStream: Read + Write + AsFd + Send {}

impl<T: Read + Write + AsFd + Send> GuestStream for T {}

/// Makes connections to one guest, and tells the time to whoever waits for it: what a simulation replaces.
pub trait GuestTransport: Send {
    /// Connects. The result must be non-blocking.
    ///
    /// # Errors
    /// When there is nobody at the other end now; the link tries again.
    fn connect(&mut self) -> io::Result<Box<dyn GuestStream>>;

    /// Monotonic time for retries.
    fn now(&self) -> Instant {
        Instant::now()
    }
}

/// The UNIX socket that QEMU listens on for a virtio-serial port.
#[derive(Debug, Clone)]
pub struct UnixTransport {
    path: PathBuf,
}

impl UnixTransport {
    /// A transport to this socket.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }
}

impl GuestTransport for UnixTransport {
    fn connect(&mut self) -> io::Result<Box<dyn GuestStream>> {
        let stream = UnixStream::connect(&self.path)?;
        stream.set_nonblocking(true)?;
        Ok(Box::new(stream))
    }
}
