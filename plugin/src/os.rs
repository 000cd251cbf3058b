//! The few calls of libc that the standard library does not offer: symbol look-up, a bounded connect, dup2 and `_exit`.
use std::{
    ffi::{CStr, c_void},
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::{ffi::OsStrExt, net::UnixStream},
    },
    path::Path,
    time::{Duration, Instant},
};

/// Looks a symbol up in the process and all its libraries.
pub fn symbol(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: RTLD_DEFAULT needs no handle, and `name` is a C string for the time of the call.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

/// Connects to a socket by a deadline. A plain connect waits for ever when the backlog is full; an agent that is just being restarted
/// refuses, or has no socket yet: all of these are tried again.
pub fn connect(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    loop {
        match connect_now(path) {
            Ok(stream) => return Ok(stream),
            Err(e) => {
                let later = matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
                );
                let left = deadline.saturating_duration_since(Instant::now());
                if !later || left.is_zero() {
                    return Err(e);
                }
                std::thread::sleep(left.min(Duration::from_millis(50)));
            }
        }
    }
}

fn connect_now(path: &Path) -> io::Result<UnixStream> {
    // SAFETY: an all-zero sockaddr_un is valid.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).unwrap_or(0);
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "socket path too long"));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    // SAFETY: no pointers; the result is checked.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just made and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let length = libc::socklen_t::try_from(size_of::<libc::sockaddr_un>()).unwrap_or(0);
    // SAFETY: the address is a whole sockaddr_un of that length, its path ended by a zero, and outlives the call.
    if unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), length) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let stream = UnixStream::from(fd);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Puts a file in the place of this process's standard error.
pub fn replace_stderr(file: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both are descriptors; the file is open for the time of the call.
    if unsafe { libc::dup2(file.as_raw_fd(), libc::STDERR_FILENO) } < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Ends this process at once, without running anything that the parent registered.
pub fn exit_now(code: u8) -> ! {
    // SAFETY: _exit does not return and needs nothing.
    unsafe { libc::_exit(i32::from(code)) }
}

/// Sets a variable of this process.
pub fn set_env(name: &str, value: &str) {
    // SAFETY: called from Slurm's clients while they read their options, when they have one thread.
    unsafe { std::env::set_var(name, value) }
}

/// Removes a variable of this process.
pub fn remove_env(name: &str) {
    // SAFETY: as in `set_env`.
    unsafe { std::env::remove_var(name) }
}
