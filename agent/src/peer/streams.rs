//! A list of open sockets, so that they can be cut from another thread.

use std::collections::HashMap;
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
struct List {
    open: HashMap<u64, (TcpStream, Option<UnixStream>)>,
    next: u64,
    cut: bool,
}

/// Sockets that are in use by other threads. Once cut, whatever is added is cut at once.
#[derive(Debug, Default)]
pub(super) struct Streams(Mutex<List>);

impl Streams {
    fn list(&self) -> MutexGuard<'_, List> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lists clones of a connection's socket, and of the local one it is bridged to, until the result is dropped.
    pub(super) fn add(self: &Arc<Self>, socket: TcpStream, local: Option<UnixStream>) -> Listed {
        let mut list = self.list();
        if list.cut {
            cut(&socket, local.as_ref());
        }
        let number = list.next;
        list.next += 1;
        list.open.insert(number, (socket, local));
        Listed {
            streams: Arc::clone(self),
            number,
        }
    }

    /// Both directions of every socket end now; the threads that use them notice by themselves.
    pub(super) fn cut_all(&self) {
        let mut list = self.list();
        list.cut = true;
        for (socket, local) in list.open.values() {
            cut(socket, local.as_ref());
        }
    }

    pub(super) fn is_cut(&self) -> bool {
        self.list().cut
    }

    pub(super) fn len(&self) -> usize {
        self.list().open.len()
    }
}

fn cut(socket: &TcpStream, local: Option<&UnixStream>) {
    // Both fail only if the other end is gone already.
    let _ = socket.shutdown(Shutdown::Both);
    if let Some(local) = local {
        let _ = local.shutdown(Shutdown::Both);
    }
}

/// A place in the list.
#[derive(Debug)]
pub(super) struct Listed {
    streams: Arc<Streams>,
    number: u64,
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.streams.list().open.remove(&self.number);
    }
}
