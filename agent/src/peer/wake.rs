//! Wakes a thread that waits in poll(2).

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// Once woken, it stays so.
#[derive(Debug)]
pub(super) struct Wake(EventFd);

impl Wake {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(EventFd::from_value_and_flags(
            0,
            EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK,
        )?))
    }

    pub(super) fn wake(&self) {
        // It can only fail if the counter is near its limit of 2^64, and then it is awake anyway.
        let _ = self.0.write(1);
    }

    pub(super) fn is_woken(&self) -> bool {
        self.wait(Duration::ZERO)
    }

    /// Waits for it; true if it was woken.
    pub(super) fn wait(&self, at_most: Duration) -> bool {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::try_from(at_most).unwrap_or(PollTimeout::MAX)).is_ok_and(|n| n > 0)
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
