//! The program's standard input: read ahead by one window, kept until the guest has taken it.
use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    unistd::{Whence, lseek, read},
};
use slurm_vm_api::session::STDIN_WINDOW as WINDOW;
/// The task's standard input.
#[derive(Debug)]
pub struct Input {
    fd: OwnedFd,
    /// Bytes that were read and not yet taken by the guest; the first stands at `taken`.
    buffer: VecDeque<u8>,
    taken: u64,
    sent: u64,
    /// Bytes to throw away: an earlier shim has delivered them.
    skip: u64,
    eof: bool,
    eof_sent: bool,
}

impl Input {
    /// Around a duplicate of the task's descriptor 0.
    pub fn new(fd: OwnedFd) -> Self {
        Self {
            fd,
            buffer: VecDeque::new(),
            taken: 0,
            sent: 0,
            skip: 0,
            eof: false,
            eof_sent: false,
        }
    }

    /// There is room to read more.
    pub fn wants_poll(&self) -> bool {
        !self.eof && self.buffer.len() < WINDOW
    }

    /// Reads once; call it when poll(2) says that there is something.
    pub fn fill(&mut self) {
        let mut piece = vec![0u8; (WINDOW - self.buffer.len()).min(32 << 10)];
        match read(&self.fd, &mut piece) {
            Ok(0) => self.eof = true,
            Ok(n) => {
                let drop = usize::try_from(self.skip).unwrap_or(usize::MAX).min(n);
                self.skip -= drop as u64;
                self.buffer.extend(&piece[drop..n]);
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            // A terminal that hung up, or a descriptor that cannot be read: the program would see no more input either.
            Err(_) => self.eof = true,
        }
    }

    /// The next bytes to send and their offset.
    pub fn unsent(&mut self) -> Option<(u64, Vec<u8>)> {
        let from = usize::try_from(self.sent - self.taken).unwrap_or(usize::MAX);
        if from >= self.buffer.len() {
            return None;
        }
        let bytes: Vec<u8> = self.buffer.range(from..).copied().collect();
        let offset = self.sent;
        self.sent += bytes.len() as u64;
        Some((offset, bytes))
    }

    /// The end of the input, once, when all before it was sent.
    pub fn unsent_eof(&mut self) -> Option<u64> {
        let due = self.eof && !self.eof_sent && self.sent == self.taken + self.buffer.len() as u64;
        self.eof_sent |= due;
        due.then_some(self.sent)
    }

    /// The guest has everything below this offset.
    pub fn taken(&mut self, offset: u64) {
        let n = usize::try_from(offset.saturating_sub(self.taken))
            .unwrap_or(usize::MAX)
            .min(self.buffer.len());
        self.buffer.drain(..n);
        self.taken += n as u64;
        self.sent = self.sent.max(self.taken);
    }

    /// What the guest is known to have.
    pub fn taken_so_far(&self) -> u64 {
        self.taken
    }

    /// A session begins (again): the guest has everything below this offset and nothing of what follows.
    ///
    /// # Errors
    /// None that matter: a descriptor that cannot seek is read up to the place instead.
    pub fn restart(&mut self, offset: u64) -> io::Result<()> {
        let end = self.taken + self.buffer.len() as u64;
        self.taken(offset.min(end));
        if offset > end {
            self.skip = offset - end;
            if lseek(&self.fd, i64::try_from(self.skip).map_err(io::Error::other)?, Whence::SeekCur).is_ok() {
                self.skip = 0;
            }
            self.taken = offset;
        }
        self.sent = self.taken;
        self.eof_sent = false;
        Ok(())
    }
}

impl AsFd for Input {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
