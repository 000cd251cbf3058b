//! The ring of one output stream: the bytes between what the host has acknowledged and what the program has written.

use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno;

/// A circular buffer addressed by stream offsets: `start <= end <= start + size`.
#[derive(Debug)]
pub struct Ring {
    // A zeroed allocation: the kernel gives pages only as they are written.
    buf: Box<[u8]>,
    start: u64,
    end: u64,
}

/// What came of reading into a ring.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub enum Filled {
    /// So many bytes.
    Bytes(usize),
    /// Nothing there at the moment, or no room.
    Nothing,
    /// No more will ever come.
    End,
}

impl Ring {
    /// An empty ring at offset 0.
    pub fn new(size: usize) -> Self {
        Self {
            buf: vec![0; size].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    /// First offset that is still here.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// One past the last offset here.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// The most bytes it holds.
    pub fn size(&self) -> usize {
        self.buf.len()
    }

    /// Room for more.
    pub fn room(&self) -> usize {
        self.buf.len() - self.held(self.start)
    }

    /// Drops what lies below `offset`. An offset outside the ring changes nothing: it is late or wrong.
    pub fn release(&mut self, offset: u64) {
        if offset > self.start && offset <= self.end {
            self.start = offset;
        }
    }

    /// Reads from `fd` into the room there is, at most `limit` bytes.
    pub fn fill(&mut self, fd: impl AsFd, limit: usize) -> io::Result<Filled> {
        let at = self.index(self.end);
        let len = self.room().min(self.buf.len() - at).min(limit);
        if len == 0 {
            return Ok(Filled::Nothing);
        }
        match nix::unistd::read(fd, &mut self.buf[at..at + len]) {
            // EIO is how a terminal says that its last process is gone.
            Ok(0) | Err(Errno::EIO) => Ok(Filled::End),
            Ok(read) => {
                self.end += read as u64;
                Ok(Filled::Bytes(read))
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(Filled::Nothing),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Up to `max` bytes from `from` on, in the two parts they lie in. `from` must be in the ring.
    pub fn peek(&self, from: u64, max: usize) -> [&[u8]; 2] {
        let len = self.held(from).min(max);
        let at = self.index(from);
        let first = len.min(self.buf.len() - at);
        [&self.buf[at..at + first], &self.buf[..len - first]]
    }

    fn held(&self, from: u64) -> usize {
        usize::try_from(self.end - from).unwrap_or(usize::MAX)
    }

    fn index(&self, offset: u64) -> usize {
        usize::try_from(offset % self.buf.len() as u64).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::OFlag;

    #[test]
    fn a_ring_gives_back_what_went_in_across_its_edge() {
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_NONBLOCK).unwrap();
        let mut ring = Ring::new(10);
        let mut written = 0u8;
        let mut seen = Vec::new();
        for step in 1..40 {
            let bytes: Vec<u8> = (0..step % 7).map(|i| written.wrapping_add(i)).collect();
            nix::unistd::write(&writer, &bytes).unwrap();
            written = written.wrapping_add(step % 7);
            while let Filled::Bytes(_) = ring.fill(&reader, usize::MAX).unwrap() {}
            let [a, b] = ring.peek(ring.start(), 4);
            seen.extend_from_slice(a);
            seen.extend_from_slice(b);
            ring.release(ring.start() + (a.len() + b.len()) as u64);
        }
        assert!(seen.len() > 100);
        assert!(seen.iter().enumerate().all(|(i, byte)| usize::from(*byte) == i % 256));
    }

    #[test]
    fn a_full_ring_reads_nothing_and_a_wrong_release_changes_nothing() {
        let (reader, writer) = nix::unistd::pipe2(OFlag::O_NONBLOCK).unwrap();
        let mut ring = Ring::new(4);
        nix::unistd::write(&writer, b"abcdef").unwrap();
        assert_eq!(ring.fill(&reader, usize::MAX).unwrap(), Filled::Bytes(4));
        assert_eq!(ring.fill(&reader, usize::MAX).unwrap(), Filled::Nothing);
        ring.release(5);
        assert_eq!((ring.start(), ring.room()), (0, 0));
        ring.release(3);
        assert_eq!(ring.fill(&reader, usize::MAX).unwrap(), Filled::Bytes(2));
        drop(writer);
        ring.release(4);
        assert_eq!(ring.fill(&reader, usize::MAX).unwrap(), Filled::End);
        assert_eq!(ring.peek(4, 9), [&b"ef"[..], b""]);
    }
}
