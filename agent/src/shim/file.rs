//! The regular file that Slurm opened for an output.
use std::{
    fmt::Debug,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, PosixFadviseAdvice, fcntl, open, posix_fadvise},
    sys::{
        stat::{Mode, fstat},
        uio::{pread, pwrite},
    },
    unistd::{Whence, fdatasync, ftruncate, lseek, write},
};

/// A file as [`super::durable::Durable`] needs it; the tests' one fails on demand.
pub trait Store: Debug {
    /// Bytes in it.
    ///
    /// # Errors
    /// Those of fstat(2).
    fn size(&self) -> Result<u64, Errno>;
    /// Writes at the descriptor's position, or at the end if it was opened for appending. Returns how many bytes, and where
    /// in the file they stand.
    ///
    /// # Errors
    /// Those of write(2).
    fn write(&mut self, bytes: &[u8]) -> Result<(usize, u64), Errno>;
    /// Where the next write goes, unless the descriptor appends.
    ///
    /// # Errors
    /// Those of lseek(2).
    fn seek(&mut self, to: u64) -> Result<(), Errno>;
    /// Reads at a place; fewer bytes at the end of the file.
    ///
    /// # Errors
    /// Those of pread(2); EBADF where the file may not be read.
    fn read_at(&self, at: u64, into: &mut [u8]) -> Result<usize, Errno>;
    /// Writes at a place, also where the descriptor appends.
    ///
    /// # Errors
    /// Those of pwrite(2); EBADF where that cannot be done.
    fn write_at(&mut self, at: u64, bytes: &[u8]) -> Result<usize, Errno>;
    /// Forces what was written to the storage. A file system on the network, or one that allocates late, says only here
    /// that it has no room.
    ///
    /// # Errors
    /// Those of fdatasync(2).
    fn sync(&mut self) -> Result<(), Errno>;
    /// Looks at the storage anew from `from` on. After a sync that failed ext4 takes its pages in memory for written, and
    /// would store a second write to them where no file finds it.
    fn forget(&self, from: u64);
    /// Empties it.
    ///
    /// # Errors
    /// Those of ftruncate(2) and lseek(2).
    fn empty(&mut self) -> Result<(), Errno>;
}

const PAGE: u64 = 4096;

/// The file behind a descriptor of the task.
#[derive(Debug)]
pub struct TaskFile {
    fd: OwnedFd,
    appends: bool,
    /// The same file, opened again to read it and to write at a place: Slurm's descriptor is write-only and appends.
    own: Option<OwnedFd>,
}

impl TaskFile {
    /// Takes a duplicate of the task's descriptor.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        let appends = fcntl(&fd, FcntlArg::F_GETFL).is_ok_and(|f| OFlag::from_bits_truncate(f).contains(OFlag::O_APPEND));
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let own = open(path.as_str(), OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC, Mode::empty()).ok();
        Self { fd, appends, own }
    }
}

fn offset(of: u64) -> Result<i64, Errno> {
    i64::try_from(of).map_err(|_| Errno::EOVERFLOW)
}

impl Store for TaskFile {
    fn size(&self) -> Result<u64, Errno> {
        Ok(u64::try_from(fstat(&self.fd)?.st_size).unwrap_or(0))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(usize, u64), Errno> {
        let n = write(&self.fd, bytes)?;
        let end = u64::try_from(lseek(&self.fd, 0, Whence::SeekCur)?).unwrap_or(0);
        Ok((n, end.saturating_sub(n as u64)))
    }

    fn seek(&mut self, to: u64) -> Result<(), Errno> {
        if !self.appends {
            lseek(&self.fd, offset(to)?, Whence::SeekSet)?;
        }
        Ok(())
    }

    fn read_at(&self, at: u64, into: &mut [u8]) -> Result<usize, Errno> {
        pread(self.own.as_ref().ok_or(Errno::EBADF)?, into, offset(at)?)
    }

    fn write_at(&mut self, at: u64, bytes: &[u8]) -> Result<usize, Errno> {
        pwrite(self.own.as_ref().ok_or(Errno::EBADF)?, bytes, offset(at)?)
    }

    fn sync(&mut self) -> Result<(), Errno> {
        match fdatasync(&self.fd) {
            // A file system that has no such thing.
            Err(Errno::EINVAL | Errno::ENOSYS | Errno::EOPNOTSUPP) => Ok(()),
            other => other,
        }
    }

    fn forget(&self, from: u64) {
        let page = from / PAGE * PAGE;
        if let Ok(page) = offset(page) {
            let _ = posix_fadvise(&self.fd, page, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        }
    }

    fn empty(&mut self) -> Result<(), Errno> {
        ftruncate(&self.fd, 0)?;
        lseek(&self.fd, 0, Whence::SeekSet)?;
        Ok(())
    }
}

impl AsFd for TaskFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
