//! Carries bytes between a local UNIX socket and a peer, both ways, until both directions have ended.
//!
//! An end of one direction is passed on as such (half-close): over TLS as `close_notify`, in the clear as TCP's FIN. A TLS stream that ends without `close_notify`
//! was cut, and the local socket is closed whole then, so that nobody takes the cut for an end. In the clear the two cannot be told apart when a peer's process
//! dies; QEMU's and libvirt's own framing notices.
//!
//! **Little waits on the way.** QEMU stops the guest as soon as what is left would pass within the downtime allowed at the speed seen so far, and it sees its bytes
//! go as soon as a socket has taken them. What then still waits in buffers between the two QEMUs is time in which the guest stands still, beyond what was allowed.
//! So sockets and pipes hold what a fast line needs, and no more.

use super::moves::Count;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use nix::{setsockopt_impl, sockopt_impl};
use rustls::Connection;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

/// Large enough that system calls do not count, small enough that 64 streams do not matter.
const BUFFER: usize = 256 << 10;
/// Of a pipe between two sockets.
const PIPE: i32 = 256 << 10;
/// What waits at the receiver at most, as SO_RCVBUF has it (socket(7): the kernel doubles it for its own use): the bandwidth-delay product of 40 Gbit/s at 0.1 ms.
/// Left to itself the kernel lets it grow to tcp_rmem's limit, 6 MiB and more.
const RECEIVED: usize = 512 << 10;
/// What waits at the sender at most, beside what is on the line (tcp(7), TCP_NOTSENT_LOWAT).
const UNSENT: u32 = 128 << 10;

sockopt_impl!(
    /// TCP_NOTSENT_LOWAT
    NotSentLowWater,
    SetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_NOTSENT_LOWAT,
    u32
);

/// For the guest's memory; what else goes over the line may wait as the kernel likes. Without leave to do so (CAP_NET_ADMIN) the kernel's own limits stay: a move
/// then takes no longer, but its guest stands still for longer.
pub(super) fn bound(tcp: &TcpStream) {
    let _ = setsockopt(tcp, sockopt::RcvBufForce, &RECEIVED);
    let _ = setsockopt(tcp, NotSentLowWater, &UNSENT);
}

/// Without encryption: one thread for each direction.
pub(super) fn plain(tcp: &TcpStream, local: &UnixStream, count: &Arc<Count>) -> io::Result<()> {
    tcp.set_nonblocking(false)?;
    tcp.set_read_timeout(None)?;
    tcp.set_write_timeout(None)?;
    local.set_nonblocking(false)?;
    let (tcp_out, local_out) = (tcp.try_clone()?, local.try_clone()?);
    let counter = Arc::clone(count);
    let outward = thread::Builder::new().name("relay-out".into()).spawn(move || {
        let result = one_way(&local_out, &tcp_out, |n| _ = counter.sent.fetch_add(n, Ordering::Relaxed));
        finish(result, &tcp_out, &local_out, |t, _| t.shutdown(Shutdown::Write))
    })?;
    let inward = one_way(tcp, local, |n| _ = count.received.fetch_add(n, Ordering::Relaxed));
    let inward = finish(inward, tcp, local, |_, l| l.shutdown(Shutdown::Write));
    let outward = outward
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the other direction panicked")));
    inward.and(outward)
}

/// By splice(2): the kernel passes pages from one socket to the other, and what a guest wrote is not copied twice more by this process.
fn one_way(from: impl Read + AsFd, to: impl Write + AsFd, count: impl Fn(u64)) -> io::Result<()> {
    let (pipe_out, pipe_in) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    // Without leave for a larger one (/proc/sys/fs/pipe-max-size) the pipe keeps its 64 KiB, which is only slower.
    let _ = fcntl(&pipe_in, FcntlArg::F_SETPIPE_SZ(PIPE));
    let mut carried = false;
    loop {
        let n = match splice(&from, None, &pipe_in, None, PIPE as usize, SpliceFFlags::SPLICE_F_MOVE) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(Errno::EINTR) => continue,
            // Not between sockets of this kind, on this kernel.
            Err(Errno::EINVAL) if !carried => return by_copying(from, to, count),
            Err(e) => return Err(e.into()),
        };
        let mut left = n;
        while left > 0 {
            match splice(&pipe_out, None, &to, None, left, SpliceFFlags::SPLICE_F_MOVE) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(m) => left -= m,
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        carried = true;
        count(n as u64);
    }
}

fn by_copying(mut from: impl Read, mut to: impl Write, count: impl Fn(u64)) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => {
                to.write_all(&buffer[..n])?;
                count(n as u64);
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Passes an end on as an end, and an error as a cut of both.
fn finish(
    result: io::Result<()>,
    tcp: &TcpStream,
    local: &UnixStream,
    end: impl Fn(&TcpStream, &UnixStream) -> io::Result<()>,
) -> io::Result<()> {
    if result.is_ok() {
        // The other end may be gone altogether, which is an end too.
        let _ = end(tcp, local);
    } else {
        let _ = tcp.shutdown(Shutdown::Both);
        let _ = local.shutdown(Shutdown::Both);
    }
    result
}

/// With TLS: one thread, because a TLS session cannot be split.
pub(super) fn encrypted(conn: Connection, tcp: TcpStream, local: UnixStream, count: &Count) -> io::Result<()> {
    tcp.set_nonblocking(true)?;
    local.set_nonblocking(true)?;
    let mut pump = Pump {
        conn,
        tcp,
        local,
        count,
        wire: Chunk::new(),
        inward: Chunk::new(),
        scratch: vec![0; BUFFER / 2].into_boxed_slice(),
        local_ended: false,
        local_gone: false,
        peer_ended: false,
        end_passed_on: false,
    };
    pump.conn.set_buffer_limit(None);
    let result = pump.run();
    if result.is_err() {
        let _ = pump.tcp.shutdown(Shutdown::Both);
        let _ = pump.local.shutdown(Shutdown::Both);
    }
    result
}

/// Bytes that wait to go on.
struct Chunk {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Chunk {
    fn new() -> Self {
        Self {
            bytes: vec![0; BUFFER].into_boxed_slice(),
            start: 0,
            end: 0,
        }
    }

    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    fn waiting(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    fn take(&mut self, n: usize) {
        self.start += n;
        if self.is_empty() {
            (self.start, self.end) = (0, 0);
        }
    }
}

struct Pump<'a> {
    conn: Connection,
    tcp: TcpStream,
    local: UnixStream,
    count: &'a Count,
    /// Ciphertext from the peer that TLS has not taken yet.
    wire: Chunk,
    /// Plaintext from the peer for the local socket.
    inward: Chunk,
    scratch: Box<[u8]>,
    /// Nothing more comes from the local socket; `close_notify` was queued.
    local_ended: bool,
    /// Nobody reads from the local socket any more; what still comes is dropped.
    local_gone: bool,
    /// The peer sent `close_notify`.
    peer_ended: bool,
    /// The local socket knows of it.
    end_passed_on: bool,
}

/// What came of one attempt on a nonblocking socket.
enum Try {
    Bytes(usize),
    NotNow,
}

fn attempt(result: io::Result<usize>) -> io::Result<Try> {
    match result {
        Ok(n) => Ok(Try::Bytes(n)),
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(Try::NotNow),
        Err(e) => Err(e),
    }
}

impl Pump<'_> {
    fn run(&mut self) -> io::Result<()> {
        self.drain_tls()?;
        loop {
            let mut moved = false;
            moved |= self.take_from_peer()?;
            moved |= self.give_to_local()?;
            moved |= self.take_from_local()?;
            moved |= self.give_to_peer()?;
            if self.local_ended && self.end_passed_on && !self.conn.wants_write() {
                return Ok(());
            }
            if !moved {
                self.wait()?;
            }
        }
    }

    fn take_from_peer(&mut self) -> io::Result<bool> {
        let mut moved = false;
        if self.wants_wire() {
            match attempt((&self.tcp).read(&mut self.wire.bytes))? {
                Try::Bytes(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Try::Bytes(n) => {
                    self.wire.end = n;
                    moved = true;
                }
                Try::NotNow => {}
            }
        }
        // A record holds at most 16 KiB: with that much room left nothing has to stay inside TLS.
        while !self.wire.is_empty() && self.room() >= 32 << 10 {
            let mut rest = self.wire.waiting();
            let before = rest.len();
            self.conn.read_tls(&mut rest)?;
            let taken = before - rest.len();
            self.wire.take(taken);
            self.drain_tls()?;
            moved = true;
        }
        Ok(moved)
    }

    fn wants_wire(&self) -> bool {
        !self.peer_ended && self.wire.is_empty() && self.room() >= 32 << 10
    }

    fn room(&self) -> usize {
        self.inward.bytes.len() - self.inward.end
    }

    /// Takes the plaintext out of TLS.
    fn drain_tls(&mut self) -> io::Result<()> {
        let state = self
            .conn
            .process_new_packets()
            .map_err(|e| io::Error::new(ErrorKind::InvalidData, e))?;
        let mut left = state.plaintext_bytes_to_read();
        while left > 0 {
            let n = self.conn.reader().read(&mut self.inward.bytes[self.inward.end..])?;
            if n == 0 {
                return Err(io::Error::other("more came out of a TLS record than it can hold"));
            }
            self.inward.end += n;
            left -= n.min(left);
        }
        self.peer_ended |= state.peer_has_closed();
        Ok(())
    }

    fn give_to_local(&mut self) -> io::Result<bool> {
        let mut moved = false;
        if self.local_gone {
            self.inward.take(self.inward.end - self.inward.start);
        }
        if !self.inward.is_empty() {
            match attempt((&self.local).write(self.inward.waiting())) {
                Ok(Try::Bytes(n)) => {
                    self.inward.take(n);
                    self.count.received.fetch_add(n as u64, Ordering::Relaxed);
                    moved = true;
                }
                Ok(Try::NotNow) => {}
                Err(e) if matches!(e.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                    self.local_gone = true;
                    moved = true;
                }
                Err(e) => return Err(e),
            }
        }
        if self.peer_ended && self.inward.is_empty() && self.wire.is_empty() && !self.end_passed_on {
            let _ = self.local.shutdown(Shutdown::Write);
            self.end_passed_on = true;
            moved = true;
        }
        Ok(moved)
    }

    fn take_from_local(&mut self) -> io::Result<bool> {
        if self.local_ended || self.conn.wants_write() {
            return Ok(false);
        }
        let n = match attempt((&self.local).read(&mut self.scratch)) {
            Ok(Try::NotNow) => return Ok(false),
            Ok(Try::Bytes(n)) => n,
            // Closed over there with something of ours unread: an end, and nobody listens.
            Err(e) if e.kind() == ErrorKind::ConnectionReset => {
                self.local_gone = true;
                0
            }
            Err(e) => return Err(e),
        };
        if n == 0 {
            self.local_ended = true;
            self.conn.send_close_notify();
        } else {
            self.conn.writer().write_all(&self.scratch[..n])?;
            self.count.sent.fetch_add(n as u64, Ordering::Relaxed);
        }
        Ok(true)
    }

    fn give_to_peer(&mut self) -> io::Result<bool> {
        let mut moved = false;
        while self.conn.wants_write() {
            match attempt(self.conn.write_tls(&mut self.tcp))? {
                Try::Bytes(_) => moved = true,
                Try::NotNow => break,
            }
        }
        Ok(moved)
    }

    /// Waits until one of the sockets can do what it is wanted for. A socket that is wanted for nothing is left out: a hang-up would wake us for ever.
    fn wait(&self) -> io::Result<()> {
        let flags = |read: bool, write: bool| {
            let mut f = PollFlags::empty();
            f.set(PollFlags::POLLIN, read);
            f.set(PollFlags::POLLOUT, write);
            f
        };
        let tcp = flags(self.wants_wire(), self.conn.wants_write());
        let local = flags(!self.local_ended && !self.conn.wants_write(), !self.inward.is_empty());
        let mut fds = Vec::with_capacity(2);
        if !tcp.is_empty() {
            fds.push(PollFd::new(self.tcp.as_fd(), tcp));
        }
        if !local.is_empty() {
            fds.push(PollFd::new(self.local.as_fd(), local));
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}
