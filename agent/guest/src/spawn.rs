//! Fork, exec and the system calls that have no safe wrapper: all of the helper's unsafe code.
//!
//! The helper has one thread, so a forked child is a full copy that may do what it likes; it still keeps to system calls on what the parent
//! prepared. What the child has to say before its program runs comes back on a close-on-exec pipe as [`Note`]s: the pipe's end without a
//! fatal note means that the program runs.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};
use std::{io, ptr};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use slurm_vm_api::guest::{ExecStep, ExitStatus, NETWORK_WITHIN_S};

/// Closes what an init or a shell has left open for us: our programs would inherit it.
pub fn close_inherited() {
    let Ok(dir) = std::fs::read_dir("/proc/self/fd") else { return };
    let open: Vec<i32> = dir.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for fd in open.into_iter().filter(|fd| *fd > 2) {
        // SAFETY: called first thing in main(), before anything in this process owns a descriptor above 2; the one of the directory just
        // read is closed already, so that closing it again fails harmlessly.
        unsafe { libc::close(fd) };
    }
}

/// What a child is made of.
#[derive(Debug)]
pub struct Prepared {
    /// Paths to try in order, as a shell walks PATH.
    pub paths: Vec<CString>,
    /// Arguments.
    pub argv: Vec<CString>,
    /// Environment.
    pub env: Vec<CString>,
    /// Directory.
    pub cwd: CString,
    /// Fails instead of running in `/`.
    pub cwd_required: bool,
    /// Begins once there is a way out of the guest.
    pub wait_network: bool,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// File mode mask.
    pub umask: u32,
    /// Limits: number, soft, hard.
    pub limits: Vec<(u32, u64, u64)>,
    /// Standard input, output and error; for a terminal thrice the same.
    pub stdio: [OwnedFd; 3],
    /// Standard input is to be the controlling terminal.
    pub terminal: bool,
}

/// What a child says before its program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Note {
    /// The directory could not be entered: `/` is used.
    Directory(i32),
    /// The limit at this place of [`Prepared::limits`] was not accepted.
    Limit(usize),
    /// The program will not run.
    Fatal(ExecStep, i32),
}

/// Bytes of a note on the pipe.
pub const NOTE_BYTES: usize = 12;

const STEPS: [ExecStep; 5] = [
    ExecStep::Session,
    ExecStep::Stdio,
    ExecStep::Identity,
    ExecStep::Directory,
    ExecStep::Exec,
];

impl Note {
    fn to_bytes(self) -> [u8; NOTE_BYTES] {
        let (tag, what, errno) = match self {
            Self::Directory(errno) => (1, 0, errno),
            Self::Limit(index) => (2, index, 0),
            Self::Fatal(step, errno) => (3, step as usize, errno),
        };
        let mut bytes = [0; NOTE_BYTES];
        bytes[0] = tag;
        bytes[4..8].copy_from_slice(&u32::try_from(what).unwrap_or(0).to_le_bytes());
        bytes[8..].copy_from_slice(&errno.to_le_bytes());
        bytes
    }

    /// The note in these bytes.
    pub fn from_bytes(bytes: [u8; NOTE_BYTES]) -> Option<Self> {
        let what = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]) as usize;
        let errno = i32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        Some(match bytes[0] {
            1 => Self::Directory(errno),
            2 => Self::Limit(what),
            3 => Self::Fatal(*STEPS.get(what)?, errno),
            _ => return None,
        })
    }
}

/// Forks the child. Returns its pid and the reading end of the notes' pipe.
pub fn spawn(prepared: &Prepared) -> io::Result<(i32, OwnedFd)> {
    let (reader, writer) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    nix::fcntl::fcntl(&reader, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let argv = pointers(&prepared.argv);
    let env = pointers(&prepared.env);
    // SAFETY: the helper has one thread (nothing in this crate starts another), so no lock can be held by a thread that the child lacks.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            if prepared.wait_network {
                wait_for_network();
            }
            let (step, errno) = become_program(prepared, &argv, &env, writer.as_fd());
            note(writer.as_fd(), Note::Fatal(step, errno));
            // SAFETY: ends the child at once, without running the parent's destructors or exit handlers.
            unsafe { libc::_exit(127) }
        }
        pid => Ok((pid, reader)),
    }
}

/// Waits for a default route. In the child, so that the helper goes on.
fn wait_for_network() {
    let until = Instant::now() + Duration::from_secs(NETWORK_WITHIN_S);
    while Instant::now() < until && !std::fs::read_to_string("/proc/net/route").is_ok_and(|table| has_default_route(&table)) {
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// `IFACE DESTINATION GATEWAY FLAGS ...`, the numbers in hexadecimal.
fn has_default_route(table: &str) -> bool {
    table.lines().skip(1).any(|line| line.split_whitespace().nth(1) == Some("00000000"))
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
}

fn note(pipe: BorrowedFd<'_>, note: Note) {
    // A note is smaller than PIPE_BUF and the pipe is read by nobody who could leave: it is written whole or the parent is gone.
    let _ = nix::unistd::write(pipe, &note.to_bytes());
}

/// In the child: everything up to `execve`. Returns only when it failed.
fn become_program(
    prepared: &Prepared,
    argv: &[*const libc::c_char],
    env: &[*const libc::c_char],
    notes: BorrowedFd<'_>,
) -> (ExecStep, i32) {
    let fail = |step| (step, Errno::last_raw());
    // SAFETY: plain system calls on values; the pointers handed over are to data that `prepared` owns and that outlives the calls, the arrays
    // `argv` and `env` end in null (made by `pointers`), and `default` is as large as the kernel's sigaction, for which zero is SIG_DFL.
    unsafe {
        if libc::setsid() < 0 {
            return fail(ExecStep::Session);
        }
        let [stdin, stdout, stderr] = &prepared.stdio;
        if prepared.terminal && libc::ioctl(stdin.as_raw_fd(), libc::TIOCSCTTY, 0) < 0 {
            return fail(ExecStep::Session);
        }
        for (target, fd) in [stdin, stdout, stderr].into_iter().enumerate() {
            // main() made sure that 0, 1 and 2 were taken before, so source and target differ and close-on-exec is cleared.
            if libc::dup2(fd.as_raw_fd(), i32::try_from(target).unwrap_or(0)) < 0 {
                return fail(ExecStep::Stdio);
            }
        }
        reset_oom_score();
        for (index, (resource, soft, hard)) in prepared.limits.iter().enumerate() {
            let limit = libc::rlimit {
                rlim_cur: *soft,
                rlim_max: *hard,
            };
            if libc::setrlimit(*resource, &raw const limit) < 0 {
                note(notes, Note::Limit(index));
            }
        }
        // Without privilege there is one identity that can be had: one's own.
        let privileged = libc::geteuid() == 0;
        if privileged && libc::setgroups(prepared.groups.len(), prepared.groups.as_ptr()) < 0
            || libc::setresgid(prepared.gid, prepared.gid, prepared.gid) < 0
            || libc::setresuid(prepared.uid, prepared.uid, prepared.uid) < 0
        {
            return fail(ExecStep::Identity);
        }
        libc::umask(prepared.umask & 0o777);
        if libc::chdir(prepared.cwd.as_ptr()) < 0 {
            if prepared.cwd_required {
                return fail(ExecStep::Directory);
            }
            note(notes, Note::Directory(Errno::last_raw()));
            if libc::chdir(c"/".as_ptr()) < 0 {
                return fail(ExecStep::Directory);
            }
        }
        // Past the C library, which keeps signals 32 and 33 to itself and would leave them as they were inherited.
        let default = [0u64; 4];
        for signo in 1..=64 {
            libc::syscall(libc::SYS_rt_sigaction, signo, default.as_ptr(), ptr::null_mut::<u64>(), 8);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());

        let mut errno = libc::ENOENT;
        for path in &prepared.paths {
            libc::execve(path.as_ptr(), argv.as_ptr(), env.as_ptr());
            match Errno::last_raw() {
                // As a shell: go on looking, but remember that something was there.
                libc::ENOENT | libc::ENOTDIR => {}
                libc::EACCES => errno = libc::EACCES,
                other => {
                    errno = other;
                    break;
                }
            }
        }
        (ExecStep::Exec, errno)
    }
}

fn reset_oom_score() {
    if let Ok(fd) = nix::fcntl::open(
        c"/proc/self/oom_score_adj",
        OFlag::O_WRONLY | OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    ) {
        let _ = nix::unistd::write(&fd, b"0");
    }
}

/// Runs `work` in a child, because it may block for long; the child's exit code is the errno.
pub fn worker(work: impl FnOnce() -> nix::Result<()>) -> io::Result<i32> {
    // SAFETY: as in `spawn`; the closure runs in a full copy of a process with one thread.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let errno = work().err().map_or(0, |errno| errno as i32);
            // SAFETY: ends the child at once, without running the parent's destructors or exit handlers.
            unsafe { libc::_exit(errno.clamp(0, 255)) }
        }
        pid => Ok(pid),
    }
}

/// How a child of ours ended, if it has. The child stays a zombie, so that its pid, which is also the id of its session, is not given away.
pub fn peek_exit(pid: i32) -> Option<ExitStatus> {
    // SAFETY: `info` is plain data for which zero is valid, and outlives the call.
    let info = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let rc = libc::waitid(
            libc::P_PID,
            pid.cast_unsigned(),
            &raw mut info,
            libc::WEXITED | libc::WNOHANG | libc::WNOWAIT,
        );
        if rc < 0 || info.si_pid() == 0 {
            return None;
        }
        info
    };
    // SAFETY: waitid has filled in a SIGCHLD siginfo (si_pid was not 0), for which si_status is the field in use.
    let status = unsafe { info.si_status() };
    Some(match info.si_code {
        libc::CLD_EXITED => ExitStatus::Code { code: status },
        code => ExitStatus::Signal {
            signo: status,
            core: code == libc::CLD_DUMPED,
        },
    })
}

/// Reaps a child that has ended.
pub fn reap(pid: i32) {
    // SAFETY: a null status pointer is allowed; only this pid is waited for, without blocking.
    unsafe { libc::waitpid(pid, ptr::null_mut(), libc::WNOHANG) };
}

/// Sends a signal by number: real-time signals have no name in `nix`.
pub fn kill(pid: i32, signo: i32) -> nix::Result<()> {
    // SAFETY: takes values only.
    Errno::result(unsafe { libc::kill(pid, signo) }).map(drop)
}

/// Bytes that could be read from a pipe or a terminal now.
pub fn readable_bytes(fd: impl AsFd) -> usize {
    let mut count: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int through the pointer, which is to a live int.
    let rc = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::FIONREAD, &raw mut count) };
    if rc < 0 { 0 } else { usize::try_from(count).unwrap_or(0) }
}

/// Sets a terminal's size.
pub fn set_window(fd: impl AsFd, rows: u16, cols: u16) -> nix::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads one winsize through the pointer, which is to a live one.
    Errno::result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }).map(drop)
}

/// A terminal: master (non-blocking) and slave, both close-on-exec.
pub fn open_terminal(rows: u16, cols: u16) -> nix::Result<(OwnedFd, OwnedFd)> {
    let master = nix::fcntl::open(
        c"/dev/ptmx",
        OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK,
        nix::sys::stat::Mode::empty(),
    )?;
    let unlock: libc::c_int = 0;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCSPTLCK reads one int through the pointer, which is to a live int. TIOCGPTPEER takes flags and returns a new descriptor
    // that nobody else owns; it needs no /dev/pts path, so it works whatever is mounted there.
    let slave = unsafe {
        Errno::result(libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock))?;
        OwnedFd::from_raw_fd(Errno::result(libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags))?)
    };
    set_window(&master, rows, cols)?;
    Ok((master, slave))
}

/// Freezes or thaws the file system that `path` is on.
pub fn freeze(path: &CStr, thaw: bool) -> nix::Result<()> {
    // _IOWR('X', 119, int) and _IOWR('X', 120, int) of linux/fs.h, on architectures with the generic ioctl layout.
    const FIFREEZE: libc::c_ulong = 0xC004_5877;
    const FITHAW: libc::c_ulong = 0xC004_5878;
    let dir = nix::fcntl::open(
        path,
        OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )?;
    // SAFETY: both requests ignore their argument.
    Errno::result(unsafe { libc::ioctl(dir.as_raw_fd(), (if thaw { FITHAW } else { FIFREEZE }) as _, 0) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_up_when_there_is_a_way_out() {
        let head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\n";
        let local = "eth0\t0002000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\n";
        let out = "eth0\t00000000\t0202000A\t0003\t0\t0\t0\t00000000\n";
        assert!(!has_default_route(&format!("{head}{local}")) && has_default_route(&format!("{head}{local}{out}")));
    }

    #[test]
    fn notes_survive_the_pipe() {
        for note in [
            Note::Directory(13),
            Note::Limit(5),
            Note::Fatal(ExecStep::Identity, 1),
            Note::Fatal(ExecStep::Exec, 8),
        ] {
            assert_eq!(Note::from_bytes(note.to_bytes()), Some(note));
        }
    }
}
