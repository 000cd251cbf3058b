//! A list of open sockets, so that they can be cut from another thread.

use std::collections::HashMap;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
struct List {
    open: HashMap<u64, TcpStream>,
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

    /// Lists a clone of the socket until the result is dropped.
    pub(super) fn add(self: &Arc<Self>, socket: TcpStream) -> Listed {
        let mut list = self.list();
        if list.cut {
            let _ = socket.shutdown(Shutdown::Both);
        }
        let number = list.next;
        list.next += 1;
        list.open.insert(number, socket);
        Listed {
            streams: Arc::clone(self),
            number,
        }
    }

    /// Both directions of every socket end now; the threads that use them notice by themselves.
    pub(super) fn cut_all(&self) {
        let mut list = self.list();
        list.cut = true;
        for socket in list.open.values() {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    pub(super) fn is_cut(&self) -> bool {
        self.list().cut
    }

    pub(super) fn len(&self) -> usize {
        self.list().open.len()
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
