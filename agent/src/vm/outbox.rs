//! Frames on their way between a VM's owner and one shim.
//!
//! The owner never waits for a shim, so the queue between the two has no room that it could run out of; it is bounded by what a shim may
//! leave unread. The guest sends no more than its rings beyond what was acknowledged: only a shim that acknowledges what it has not read
//! (or a guest that keeps to no window) lets the queue grow beyond that, and such a session is cut. A shim that is only slow, or stopped,
//! slows its own program and nothing else. What is queued is charged to the user's account.
//!
//! The other way the shim's reader waits: it has no more than a few frames with the owner at a time ([`Window`]).
use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use slurm_vm_api::session::{Frame, ToShim};

use crate::limits::{BYTES_PER_SESSION, FRAMES_PER_SESSION, Held};

/// What a control frame is counted as, and what comes on top of the bytes of a data frame.
const FRAME: usize = 256;

/// The owner's end. Copies are of the same session; when the last is dropped the session is closed.
#[derive(Clone)]
pub struct ToSession {
    queue: Sender<Frame<ToShim>>,
    backlog: Arc<Backlog>,
}

/// The writer's end.
#[derive(Debug)]
pub struct Outbox {
    queue: Receiver<Frame<ToShim>>,
    backlog: Arc<Backlog>,
}

struct Backlog {
    bytes: Mutex<(usize, Held)>,
    is_cut: AtomicBool,
    cut: Box<dyn Fn() + Send + Sync>,
}

impl fmt::Debug for Backlog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backlog").field("is_cut", &self.is_cut).finish_non_exhaustive()
    }
}

impl fmt::Debug for ToSession {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ToSession").field("backlog", &self.backlog).finish_non_exhaustive()
    }
}

/// A queue of one session. `held` is the user's account; `cut` closes the connection, from any thread, also while a write to it waits.
#[must_use]
pub fn outbox(held: Held, cut: impl Fn() + Send + Sync + 'static) -> (ToSession, Outbox) {
    let (sender, receiver) = unbounded();
    let backlog = Arc::new(Backlog {
        bytes: Mutex::new((0, held)),
        is_cut: AtomicBool::new(false),
        cut: Box::new(cut),
    });
    let to = ToSession {
        queue: sender,
        backlog: backlog.clone(),
    };
    (to, Outbox { queue: receiver, backlog })
}

fn size(frame: &Frame<ToShim>) -> usize {
    match frame {
        Frame::Data { bytes, .. } => FRAME + bytes.len(),
        Frame::Control(_) => FRAME,
        Frame::Environment(b) | Frame::Arguments(b) | Frame::Script(b) => FRAME + b.len(),
    }
}

impl Backlog {
    /// Counts a frame in; what was counted already stays where there is no room for it.
    fn add(&self, size: usize) -> Result<(), String> {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        if bytes.0 + size > BYTES_PER_SESSION {
            return Err(format!(
                "{} KiB wait for it, more than the window lets an honest shim have",
                bytes.0 >> 10
            ));
        }
        bytes.1.grow(size).map_err(|e| e.to_string())?;
        bytes.0 += size;
        Ok(())
    }

    fn remove(&self, size: usize) {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        bytes.0 -= size;
        bytes.1.shrink(size);
    }
}

impl ToSession {
    /// Puts a frame in line; never waits. Dropped when the session is over.
    pub fn send(&self, frame: Frame<ToShim>) {
        if self.backlog.is_cut.load(Ordering::Acquire) {
            return;
        }
        let size = size(&frame);
        if let Err(why) = self.backlog.add(size) {
            log::warn!("a shim's session is cut: {why}");
            self.cut();
        } else if self.queue.send(frame).is_err() {
            self.backlog.remove(size);
        }
    }

    /// Closes the session.
    pub fn cut(&self) {
        if !self.backlog.is_cut.swap(true, Ordering::AcqRel) {
            (self.backlog.cut)();
        }
    }
}

impl Outbox {
    /// The next frame; `None` when all copies of the other end are gone, or the session was cut.
    #[must_use]
    pub fn next(&self) -> Option<Frame<ToShim>> {
        let frame = self.queue.recv().ok()?;
        self.taken(frame)
    }

    /// The next frame that is there already.
    #[must_use]
    pub fn next_at_once(&self) -> Option<Frame<ToShim>> {
        let frame = self.queue.try_recv().ok()?;
        self.taken(frame)
    }

    fn taken(&self, frame: Frame<ToShim>) -> Option<Frame<ToShim>> {
        self.backlog.remove(size(&frame));
        (!self.backlog.is_cut.load(Ordering::Acquire)).then_some(frame)
    }
}

/// How many frames of a session its owner may have before it at a time.
#[derive(Debug)]
pub struct Window {
    taken: Sender<()>,
    back: Receiver<()>,
}

/// One frame's place in the window; free again when it is dropped.
#[derive(Debug)]
pub struct Pass {
    back: Receiver<()>,
    _held: Option<Held>,
}

impl Default for Window {
    fn default() -> Self {
        let (taken, back) = bounded(FRAMES_PER_SESSION);
        Self { taken, back }
    }
}

impl Window {
    /// A place for a frame that holds so much of its user's account; waits for one.
    #[must_use]
    pub fn pass(&self, held: Option<Held>) -> Pass {
        // We hold the other end: this fails never.
        let _ = self.taken.send(());
        Pass {
            back: self.back.clone(),
            _held: held,
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let _ = self.back.try_recv();
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::atomic::AtomicU32, thread};

    use slurm_vm_api::session::{MAX_DATA, Stream, WINDOW};

    use super::*;
    use crate::limits::{BYTES_PER_USER, Bounds, Budget};

    fn data(offset: u64) -> Frame<ToShim> {
        Frame::Data {
            stream: Stream::Stdout,
            offset,
            bytes: vec![0; MAX_DATA],
        }
    }

    #[test]
    fn a_session_with_more_waiting_than_a_window_allows_is_cut_once_and_holds_nothing_more() {
        let budget = Budget::new(Bounds::default());
        let cuts = Arc::new(AtomicU32::new(0));
        let count = cuts.clone();
        let (to, outbox) = outbox(budget.bytes(7, 0).unwrap(), move || {
            count.fetch_add(1, Ordering::SeqCst);
        });
        // Both streams' rings and as much kept output: what an honest shim may have before it.
        let honest = 4 * WINDOW / MAX_DATA;
        for i in 0..honest {
            to.send(data(i as u64));
        }
        assert_eq!(cuts.load(Ordering::SeqCst), 0);
        assert!(matches!(outbox.next(), Some(Frame::Data { offset: 0, .. })));
        for i in 0..1000 {
            to.send(data(i));
        }
        assert_eq!(cuts.load(Ordering::SeqCst), 1);
        assert!(budget.bytes_of(7) <= BYTES_PER_SESSION, "{}", budget.bytes_of(7));
        assert!(outbox.next().is_none());
        drop((to, outbox));
        assert_eq!(budget.bytes_of(7), 0);
    }

    #[test]
    fn a_reader_waits_while_the_owner_has_enough_before_it() {
        let window = Window::default();
        let mut before: Vec<Pass> = (0..FRAMES_PER_SESSION).map(|_| window.pass(None)).collect();
        thread::scope(|s| {
            let next = s.spawn(|| window.pass(None));
            thread::yield_now();
            assert!(!next.is_finished());
            before.pop();
            next.join().unwrap();
        });
    }

    #[test]
    fn a_session_is_cut_when_its_user_has_no_room_left() {
        let budget = Budget::new(Bounds::default());
        let _all = budget.bytes(7, BYTES_PER_USER).unwrap();
        let (to, outbox) = outbox(budget.bytes(7, 0).unwrap(), || {});
        to.send(data(0));
        assert!(to.backlog.is_cut.load(Ordering::SeqCst) && outbox.queue.is_empty());
    }
}
