//! The shim's signals: all are blocked and read from a descriptor, so that none interrupts a write.
use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    time::{Duration, Instant},
};

use nix::{
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        resource::{Resource, setrlimit},
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};

/// All signals of this process.
#[derive(Debug)]
pub struct Signals {
    fd: SignalFd,
}

impl Signals {
    /// Blocks what can be blocked, from now on.
    ///
    /// # Errors
    /// Those of sigprocmask(2) and signalfd(2).
    pub fn block_all() -> io::Result<Self> {
        let all = SigSet::all();
        all.thread_block()?;
        Ok(Self {
            fd: SignalFd::with_flags(&all, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?,
        })
    }

    /// The next signal that arrived, without those that the shim's own writes and children cause.
    pub fn next_signal(&self) -> Option<i32> {
        while let Ok(Some(info)) = self.fd.read_signal() {
            let signo = i32::try_from(info.ssi_signo).unwrap_or_default();
            let own_pipe = signo == libc::SIGPIPE && info.ssi_pid == std::process::id();
            if signo != libc::SIGCHLD && !own_pipe {
                return Some(signo);
            }
        }
        None
    }

    /// Waits for SIGTERM; other signals are dropped.
    pub fn wait_for_term(&self, at_most: Duration) -> bool {
        let until = Instant::now() + at_most;
        loop {
            while let Some(signo) = self.next_signal() {
                if signo == libc::SIGTERM {
                    return true;
                }
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let wait = PollTimeout::try_from(left.min(Duration::from_secs(60))).unwrap_or(PollTimeout::MAX);
            let _ = poll(&mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)], wait);
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Ends this process by a signal's default action, so that Slurm sees what it would have seen of the program itself.
/// Without a core file: it would be the shim's.
pub fn die_of(signo: i32) -> ! {
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    match Signal::try_from(signo) {
        // These do not end a process by default, and a program cannot have died of them.
        Ok(Signal::SIGCHLD | Signal::SIGCONT | Signal::SIGURG | Signal::SIGWINCH) => {}
        Ok(Signal::SIGSTOP | Signal::SIGTSTP | Signal::SIGTTIN | Signal::SIGTTOU) => {}
        Ok(signal) => {
            // Restores the default disposition too, for a signal that was ignored when the shim was started.
            if signal_hook_knows(signal) {
                let _ = signal_hook::low_level::emulate_default_handler(signo);
            }
            let mut one = SigSet::empty();
            one.add(signal);
            let _ = one.thread_unblock();
            let _ = signal_hook::low_level::raise(signo);
        }
        Err(_) => {
            // A real-time signal, which a set of nix cannot name one by one.
            let mut realtime = SigSet::all();
            Signal::iterator().for_each(|s| realtime.remove(s));
            let _ = signal_hook::low_level::raise(signo);
            let _ = realtime.thread_unblock();
        }
    }
    std::process::exit(128 + signo)
}

/// Signals whose default action the crate carries out; for others it would do nothing.
fn signal_hook_knows(signal: Signal) -> bool {
    !matches!(signal, Signal::SIGSTKFLT | Signal::SIGPWR)
}
