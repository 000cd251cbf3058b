//! The machine that writes an output to a regular file so that nothing is lost, cut off or written twice.
//!
//! Bytes are written as they come, but they count as done, and may be acknowledged, only once a sync has put them on
//! storage: a file system on the network may say only then that it has no room. Syncs are at least [`SYNC_AFTER`] apart,
//! unless [`SYNC_BYTES`] wait for one. What is not synced is kept in memory, bounded by the agent's window: the file system
//! may forget what it could not store, so after a sync that failed these bytes are written again, in their places.
//!
//! ```text
//!            bytes                sync
//!  queue ------------> written ----------> synced (acknowledged)
//!    ^  wait, try again   |  ^                |
//!    +--- write failed ---+  +-- sync failed: write again in place
//! ```
//!
//! A sync holds up the relay for as long as the storage takes, as a write may; that bounds what a slow server costs to one
//! wait for each [`SYNC_BYTES`].
//!
//! A shim that goes on where an earlier one stopped finds the file as it is now. Others may write to it as well, so nothing
//! is ever cut off ([`Durable::resume`]).
//!
//! No clock and no descriptor in here: time is handed in, and the file is a [`Store`].
use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use nix::errno::Errno;
use slurm_vm_api::session::{Sink, WINDOW};

use super::file::Store;

/// So much waits for a sync at most: the program waits when twice as much is not acknowledged.
pub const SYNC_BYTES: usize = WINDOW / 2;
/// Time between two syncs of a file that little is written to.
pub const SYNC_AFTER: Duration = Duration::from_secs(1);
/// A file that cannot be written is tried again after this time; the program waits meanwhile.
pub const RETRY: Duration = Duration::from_secs(1);
/// What was written and not acknowledged comes again at once: a tail of the file that it does not fill in this time is not ours.
pub const DOUBT: Duration = Duration::from_secs(1);
/// Written at a time.
const CHUNK: usize = 64 << 10;

/// Whose the end of a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// It is what comes again.
    Ours,
    /// It is something else.
    Others,
    /// It begins with what has come so far.
    Open,
}

/// Compares what stands in the file behind the last acknowledged byte with what comes again.
fn whose(tail: &[u8], coming: &VecDeque<u8>) -> Whose {
    if !tail.iter().zip(coming).all(|(there, ours)| there == ours) {
        Whose::Others
    } else if coming.len() >= tail.len() {
        Whose::Ours
    } else {
        Whose::Open
    }
}

/// Can be had in time: someone makes room, a server comes back. Anything else is the end of the output, as for a program.
fn may_pass(e: Errno) -> bool {
    !matches!(e, Errno::EFBIG | Errno::EBADF | Errno::EINVAL | Errno::EPERM | Errno::EFAULT)
}

fn is_full(e: Errno) -> bool {
    matches!(e, Errno::ENOSPC | Errno::EDQUOT)
}

/// Bytes of ours in the file that are not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    at: u64,
    len: usize,
}

#[derive(Debug)]
struct Doubt {
    tail: Vec<u8>,
    at: u64,
    until: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Failing {
    error: Errno,
    since: Instant,
}

/// One output on its way into one file.
#[derive(Debug)]
pub struct Durable<S> {
    store: S,
    /// Where offset 0 stands, if nobody else writes to the file.
    base: u64,
    written: u64,
    synced: u64,
    /// The bytes `synced..written`, and where in the file they are.
    held: VecDeque<u8>,
    places: Vec<Place>,
    /// A sync failed: nothing is known of what is held.
    again: bool,
    doubt: Option<Doubt>,
    last_sync: Option<Instant>,
    retry_at: Option<Instant>,
    failing: Option<Failing>,
    told: bool,
    flush: bool,
    news: Vec<String>,
}

impl<S: Store> Durable<S> {
    /// Begins with offset 0 at `base`.
    pub fn new(store: S, base: u64) -> Self {
        Self {
            store,
            base,
            written: 0,
            synced: 0,
            held: VecDeque::new(),
            places: Vec::new(),
            again: false,
            doubt: None,
            last_sync: None,
            retry_at: None,
            failing: None,
            told: false,
            flush: false,
            news: Vec::new(),
        }
    }

    /// The file.
    pub fn store(&self) -> &S {
        &self.store
    }

    /// Bytes since the program began that were given to the file.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Bytes since the program began that are on storage.
    pub fn synced(&self) -> u64 {
        self.synced
    }

    /// Where offset 0 stands, if nobody else writes to the file.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// The first start of a program.
    ///
    /// # Errors
    /// Those of [`Store::empty`].
    pub fn empty(&mut self) -> Result<(), Errno> {
        self.store.empty()?;
        self.base = 0;
        Ok(())
    }

    /// Goes on at `offset`, where an earlier shim (perhaps on another node) stopped; `before` is the file as it knew it, if
    /// this is the same one.
    ///
    /// * It handed over properly: it wrote nothing beyond that, what stands there is from others.
    /// * It did not: it may have written more than it acknowledged, and these bytes will come again. What stands behind the
    ///   last acknowledged byte is compared with them. If it is the same, it is not written again; if it is not, others
    ///   write to the file, too, and all that comes is appended. In no case is anything cut off.
    ///
    /// # Errors
    /// Those of the file.
    pub fn resume(&mut self, offset: u64, before: Option<&Sink>) -> Result<(), Errno> {
        (self.written, self.synced, self.again, self.doubt) = (offset, offset, false, None);
        self.held.clear();
        self.places.clear();
        let size = self.store.size()?;
        self.store.seek(size)?;
        let Some(before) = before else {
            self.base = size.saturating_sub(offset);
            return Ok(());
        };
        if let Some(end) = before.end {
            self.base = end.saturating_sub(offset);
            return Ok(());
        }
        self.base = before.base;
        let at = before.base + offset;
        let beyond = usize::try_from(size.saturating_sub(at)).unwrap_or(usize::MAX);
        if beyond > WINDOW {
            self.shared(at, "more than can be ours");
        } else if beyond > 0 {
            let mut tail = vec![0; beyond];
            match self.read(at, &mut tail) {
                Ok(n) => {
                    tail.truncate(n);
                    self.doubt = Some(Doubt { tail, at, until: None });
                }
                Err(e) => self.shared(at, &format!("it cannot be read: {}", e.desc())),
            }
        }
        Ok(())
    }

    /// Bytes that nobody has any more, or that nobody can take. Where an earlier shim has written them they are in the file already.
    pub fn skip(&mut self, bytes: u64) {
        self.written += bytes;
        if let Some(doubt) = &mut self.doubt {
            let there = doubt.tail.len().min(usize::try_from(bytes).unwrap_or(usize::MAX));
            doubt.tail.drain(..there);
            doubt.at += there as u64;
        }
        self.doubt.take_if(|doubt| doubt.tail.is_empty());
        if self.held.is_empty() {
            self.synced = self.written;
        }
    }

    /// The file takes nothing any more: what is not in it counts as done.
    pub fn close(&mut self) {
        self.held.clear();
        self.places.clear();
        (self.again, self.doubt, self.retry_at, self.failing) = (false, None, None, None);
        self.synced = self.written;
    }

    /// No more bytes will come: what is there is written and synced without delay.
    pub fn finish(&mut self) {
        self.flush = true;
    }

    /// All that was written is on storage.
    pub fn is_settled(&self) -> bool {
        self.held.is_empty()
    }

    /// No use in trying to write before [`Durable::due_at`].
    pub fn is_waiting(&self) -> bool {
        self.retry_at.is_some() || self.doubt.as_ref().is_some_and(|d| d.until.is_some())
    }

    /// When [`Durable::advance`] is wanted, whether bytes come or not.
    pub fn due_at(&self, now: Instant) -> Option<Instant> {
        if self.retry_at.is_some() {
            return self.retry_at;
        }
        let sync = (!self.held.is_empty()).then(|| match self.last_sync {
            Some(last) if !self.flush => last + SYNC_AFTER,
            _ => now,
        });
        let doubt = self.doubt.as_ref().and_then(|d| d.until).map(|u| if self.flush { now } else { u });
        sync.into_iter().chain(doubt).min()
    }

    /// The file fails in a way that room does not mend: since when, and how.
    pub fn broken(&self) -> Option<(Instant, Errno)> {
        self.failing.filter(|f| !is_full(f.error)).map(|f| (f.since, f.error))
    }

    /// A line for the log, each said once.
    pub fn take_news(&mut self) -> Vec<String> {
        std::mem::take(&mut self.news)
    }

    /// Does what is due: settles whose the end of the file is, writes once, syncs.
    ///
    /// # Errors
    /// The file takes nothing any more, for good.
    pub fn advance(&mut self, queue: &mut VecDeque<u8>, now: Instant) -> Result<(), Errno> {
        if self.retry_at.is_some_and(|at| now < at) {
            return Ok(());
        }
        self.retry_at = None;
        match self.step(queue, now) {
            Ok(()) => {
                self.failing = None;
                if self.told && queue.is_empty() && self.held.is_empty() {
                    self.told = false;
                    self.news.push("its file is written again, nothing was lost".into());
                }
                Ok(())
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(()),
            Err(e) if may_pass(e) => {
                self.fail(e, now);
                Ok(())
            }
            Err(e) => Err(e),
        }
    }

    /// Before another shim goes on: writes nothing new, and tries once to have all that was written on storage. The end of
    /// the file, if that was done.
    pub fn secure(&mut self, now: Instant) -> Option<u64> {
        let mut done = if self.again { self.write_again() } else { Ok(()) };
        if !self.held.is_empty() {
            done = done.and_then(|()| self.sync(now));
        }
        if let Err(e) = done {
            self.fail(e, now);
            return None;
        }
        self.store.size().ok().filter(|_| self.doubt.is_none())
    }

    fn fail(&mut self, error: Errno, now: Instant) {
        self.retry_at = Some(now + RETRY);
        let since = self.failing.map_or(now, |f| f.since);
        self.failing = Some(Failing { error, since });
        if !self.told {
            self.told = true;
            self.news
                .push(format!("its file cannot be written: {}; the program waits", error.desc()));
        }
    }

    fn step(&mut self, queue: &mut VecDeque<u8>, now: Instant) -> Result<(), Errno> {
        if !self.settle(queue, now)? {
            return Ok(());
        }
        if self.again {
            self.write_again()?;
            self.sync(now)?;
        }
        if !queue.is_empty() {
            let (front, _) = queue.as_slices();
            let piece = &front[..front.len().min(CHUNK)];
            let (n, at) = self.store.write(piece)?;
            self.held.extend(&piece[..n]);
            queue.drain(..n);
            self.have_written(Place { at, len: n });
        }
        let last = self.last_sync.is_none_or(|last| now >= last + SYNC_AFTER);
        if !self.held.is_empty() && (last || self.flush || self.failing.is_some() || self.held.len() >= SYNC_BYTES) {
            self.sync(now)?;
        }
        Ok(())
    }

    fn have_written(&mut self, place: Place) {
        self.written += place.len as u64;
        let end = place.at + place.len as u64;
        self.base = end.checked_sub(self.written).unwrap_or(self.base);
        match self.places.last_mut().filter(|p| p.at + p.len as u64 == place.at) {
            Some(last) => last.len += place.len,
            None => self.places.push(place),
        }
    }

    fn sync(&mut self, now: Instant) -> Result<(), Errno> {
        self.last_sync = Some(now);
        if let Err(e) = self.store.sync() {
            self.again = true;
            return Err(e);
        }
        self.again = false;
        self.synced = self.written;
        self.held.clear();
        self.places.clear();
        Ok(())
    }

    /// `true`: it is known where to go on.
    fn settle(&mut self, queue: &mut VecDeque<u8>, now: Instant) -> Result<bool, Errno> {
        let flush = self.flush;
        let Some(doubt) = self.doubt.as_mut().filter(|_| !queue.is_empty()) else {
            return Ok(true);
        };
        let mut verdict = whose(&doubt.tail, queue);
        if verdict == Whose::Open {
            let until = *doubt.until.get_or_insert(now + DOUBT);
            if now < until && !flush {
                return Ok(false);
            }
            verdict = Whose::Others;
        }
        let (at, len) = (doubt.at, doubt.tail.len());
        // Others may have come in between, so the end of the file is looked for again.
        let size = self.store.size()?;
        self.store.seek(size)?;
        self.doubt = None;
        if verdict == Whose::Ours {
            self.held.extend(queue.drain(..len));
            self.have_written(Place { at, len });
        } else {
            self.shared(at, "something else");
        }
        Ok(true)
    }

    fn shared(&mut self, at: u64, why: &str) {
        self.news.push(format!(
            "behind byte {at} of its file stands {why}: others write to it, so all goes to its end; what was written there and not \
             acknowledged may be in it twice"
        ));
    }

    fn read(&self, at: u64, into: &mut [u8]) -> Result<usize, Errno> {
        let mut have = 0;
        while have < into.len() {
            match self.store.read_at(at + have as u64, &mut into[have..])? {
                0 => break,
                n => have += n,
            }
        }
        Ok(have)
    }

    fn write_again(&mut self) -> Result<(), Errno> {
        let held: Vec<u8> = self.held.iter().copied().collect();
        let mut ours = held.as_slice();
        let mut i = 0;
        if let Some(first) = self.places.iter().map(|p| p.at).min() {
            self.store.forget(first);
        }
        while let Some(&Place { at, len }) = self.places.get(i) {
            let bytes = &ours[..len];
            let mut done = 0;
            if self.is_free_for(at, bytes)? {
                while done < len {
                    match self.store.write_at(at + done as u64, &bytes[done..])? {
                        0 => return Err(Errno::EIO),
                        n => done += n,
                    }
                }
            } else {
                // The file system forgot ours, and another writer came to stand there; or it cannot be seen.
                self.store.seek(self.store.size()?)?;
                let (n, end) = self.store.write(bytes)?;
                self.places[i] = Place { at: end, len: n };
                if n < len {
                    self.places.insert(i + 1, Place { at, len: len - n });
                }
                done = n;
            }
            ours = &ours[done..];
            i += 1;
        }
        Ok(())
    }

    /// Nobody else's bytes are there: ours, or none.
    fn is_free_for(&self, at: u64, ours: &[u8]) -> Result<bool, Errno> {
        let mut there = vec![0; ours.len()];
        match self.read(at, &mut there) {
            Ok(n) => Ok(there[..n].iter().zip(ours).all(|(there, ours)| *there == 0 || there == ours)),
            Err(Errno::EBADF) => Ok(false),
            Err(e) => Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that others append to, that forgets what it cannot store, and fails on demand.
    #[derive(Debug, Default)]
    struct Fake {
        cache: Vec<u8>,
        stored: Vec<u8>,
        /// Bytes of the cache that the next sync stores. One that fails takes them for stored, as Linux does.
        dirty: Vec<std::ops::Range<usize>>,
        room: Option<usize>,
        position: Option<usize>,
        fail_sync: Option<Errno>,
        fail_write: Option<Errno>,
        forgets: bool,
        unreadable: bool,
        syncs: usize,
        at_most: Option<usize>,
    }

    impl Fake {
        fn put(&mut self, at: usize, bytes: &[u8]) {
            if self.cache.len() < at + bytes.len() {
                self.cache.resize(at + bytes.len(), 0);
            }
            self.cache[at..at + bytes.len()].copy_from_slice(bytes);
            self.dirty.push(at..at + bytes.len());
        }
    }

    impl Store for Fake {
        fn size(&self) -> Result<u64, Errno> {
            Ok(self.cache.len() as u64)
        }

        fn write(&mut self, bytes: &[u8]) -> Result<(usize, u64), Errno> {
            self.fail_write.map_or(Ok(()), Err)?;
            let bytes = &bytes[..bytes.len().min(self.at_most.unwrap_or(usize::MAX))];
            let at = self.position.unwrap_or(self.cache.len());
            self.put(at, bytes);
            self.position = self.position.map(|p| p + bytes.len());
            Ok((bytes.len(), at as u64))
        }

        fn seek(&mut self, to: u64) -> Result<(), Errno> {
            self.position = self.position.map(|_| usize::try_from(to).unwrap());
            Ok(())
        }

        fn read_at(&self, at: u64, into: &mut [u8]) -> Result<usize, Errno> {
            if self.unreadable {
                return Err(Errno::EBADF);
            }
            let there = self.cache.get(usize::try_from(at).unwrap()..).unwrap_or_default();
            let n = there.len().min(into.len());
            into[..n].copy_from_slice(&there[..n]);
            Ok(n)
        }

        fn write_at(&mut self, at: u64, bytes: &[u8]) -> Result<usize, Errno> {
            if self.unreadable {
                return Err(Errno::EBADF);
            }
            self.put(usize::try_from(at).unwrap(), bytes);
            Ok(bytes.len())
        }

        fn sync(&mut self) -> Result<(), Errno> {
            self.syncs += 1;
            let full = self.room.filter(|r| self.cache.len() > *r).map(|_| Errno::ENOSPC);
            let dirty = std::mem::take(&mut self.dirty);
            if let Some(e) = self.fail_sync.or(full) {
                if self.forgets {
                    self.cache.clone_from(&self.stored);
                }
                return Err(e);
            }
            for piece in dirty {
                if self.stored.len() < piece.end {
                    self.stored.resize(piece.end, 0);
                }
                self.stored[piece.clone()].copy_from_slice(&self.cache[piece]);
            }
            Ok(())
        }

        fn forget(&self, _from: u64) {}

        fn empty(&mut self) -> Result<(), Errno> {
            self.cache.clear();
            Ok(())
        }
    }

    struct Bench {
        out: Durable<Fake>,
        queue: VecDeque<u8>,
        now: Instant,
    }

    impl Bench {
        fn on(file: &str) -> Self {
            let fake = Fake {
                cache: file.into(),
                stored: file.into(),
                ..Fake::default()
            };
            Self {
                out: Durable::new(fake, file.len() as u64),
                queue: VecDeque::new(),
                now: Instant::now(),
            }
        }

        /// Goes on at `offset` in a file that began at 0.
        fn resumed(file: &str, offset: u64, end: Option<u64>) -> Self {
            let mut b = Self::on(file);
            b.out
                .resume(
                    offset,
                    Some(&Sink {
                        regular: true,
                        dev: 1,
                        ino: 1,
                        base: 0,
                        end,
                    }),
                )
                .unwrap();
            b
        }

        fn give(&mut self, text: &str) {
            self.queue.extend(text.as_bytes());
            self.advance();
        }

        fn advance(&mut self) {
            self.out.advance(&mut self.queue, self.now).unwrap();
        }

        fn later(&mut self, by: Duration) {
            self.now += by;
            self.advance();
        }

        fn other(&mut self, text: &str) {
            let at = self.out.store.cache.len();
            self.out.store.put(at, text.as_bytes());
        }

        fn file(&self) -> &str {
            std::str::from_utf8(&self.out.store.cache).unwrap()
        }

        fn stored(&self) -> &str {
            std::str::from_utf8(&self.out.store.stored).unwrap()
        }
    }

    #[test]
    fn what_was_written_but_not_acknowledged_is_not_written_twice_whatever_pieces_it_comes_in() {
        for cut in 0..=8 {
            for position in [None, Some(0)] {
                let mut b = Bench::resumed("one two three", 5, None);
                b.out.store.position = position;
                b.out.store.seek(13).unwrap();
                let again = "wo three and four";
                b.give(&again[..cut]);
                b.give(&again[cut..]);
                b.advance();
                assert_eq!(b.file(), "one two three and four", "{cut} {position:?}");
                b.later(SYNC_AFTER);
                assert_eq!((b.out.synced(), b.stored()), (22, "one two three and four"));
                assert!(b.out.take_news().is_empty());
            }
        }
    }

    #[test]
    fn what_an_earlier_shim_wrote_and_the_guest_has_no_more_is_neither_missing_nor_written_twice() {
        // It wrote up to 13, and the guest was told so up to `begin`: only what comes from there on comes again.
        for begin in 5..=13 {
            let mut b = Bench::resumed("one two three", 5, None);
            b.out.skip(begin - 5);
            b.give(&"one two three and four"[usize::try_from(begin).unwrap()..]);
            b.advance();
            assert_eq!(b.file(), "one two three and four", "{begin}");
            b.later(SYNC_AFTER);
            assert_eq!(b.out.synced(), 22);
            assert!(b.out.take_news().is_empty());
        }
    }

    #[test]
    fn bytes_of_others_behind_the_last_acknowledged_one_are_kept_and_it_is_said_once() {
        // Nothing of ours, a line that begins like ours, ours with another's behind it.
        for tail in ["other\n", "line 8\n", "line 7\nother\n", "li"] {
            for position in [None, Some(0)] {
                let mut b = Bench::resumed(&format!("line 6\n{tail}"), 7, None);
                b.out.store.position = position.map(|_| 7);
                b.give("line 7\n");
                b.later(DOUBT);
                b.give("line 9\n");
                let file = if tail == "li" {
                    // Ours, as far as it goes.
                    "line 6\nline 7\nline 9\n".to_owned()
                } else {
                    format!("line 6\n{tail}line 7\nline 9\n")
                };
                assert_eq!(b.file(), file, "{tail:?} {position:?}");
                assert_eq!(b.out.take_news().len(), usize::from(tail != "li"), "{tail:?}");
            }
        }
    }

    #[test]
    fn a_tail_that_goes_on_where_ours_ends_is_from_others_after_a_while_or_at_the_programs_end() {
        for ends in [false, true] {
            let mut b = Bench::resumed("0123456", 2, None);
            b.give("23");
            assert_eq!((b.file(), b.queue.len()), ("0123456", 2), "not known yet");
            assert!(b.out.is_waiting() && b.out.due_at(b.now) == Some(b.now + DOUBT));
            if ends {
                b.out.finish();
                assert_eq!(b.out.due_at(b.now), Some(b.now));
                b.advance();
            } else {
                b.later(DOUBT - Duration::from_millis(1));
                assert_eq!(b.queue.len(), 2);
                b.later(Duration::from_millis(1));
            }
            assert_eq!((b.file(), b.queue.len(), b.out.synced()), ("012345623", 0, 4));
        }
    }

    #[test]
    fn after_a_proper_hand_over_equal_lines_of_others_are_not_taken_for_ours() {
        for position in [None, Some(0)] {
            let mut b = Bench::resumed("tick\ntick\ntick\n", 5, Some(5));
            b.out.store.position = position.map(|_| 15);
            b.give("tick\n");
            assert_eq!(b.file(), "tick\ntick\ntick\ntick\n");
            assert!(b.out.take_news().is_empty());
        }
    }

    #[test]
    fn two_that_append_to_one_file_and_take_turns_at_moving_lose_and_double_nothing() {
        let lines = |who: &str, from: usize, to: usize| -> String { (from..to).map(|i| format!("{who}{i}\n")).collect() };
        let mut b = Bench::on("");
        let mut have = String::new();
        for turn in 0..6 {
            let mine = lines("a", turn, turn + 1);
            b.give(&mine[..1]);
            b.other(&lines("b", turn, turn + 1));
            b.give(&mine[1..]);
            have += &format!("a{}{turn}\n", lines("b", turn, turn + 1));
            let end = b.out.secure(b.now);
            assert_eq!(end, Some(have.len() as u64));
            b.other("x");
            have += "x";
            let (offset, base, file) = (b.out.synced(), b.out.base(), b.file().to_owned());
            b = Bench::on(&file);
            let sink = Sink {
                regular: true,
                dev: 2,
                ino: 1,
                base,
                end,
            };
            b.out.resume(offset, Some(&sink)).unwrap();
        }
        assert_eq!(b.file(), have);
    }

    #[test]
    fn a_file_that_was_emptied_or_cannot_be_read_is_appended_to() {
        let mut b = Bench::resumed("", 7, None);
        b.give("on");
        assert_eq!(b.file(), "on");
        let mut b = Bench::on("0123");
        b.out.store.unreadable = true;
        let sink = Sink {
            regular: true,
            dev: 1,
            ino: 1,
            base: 0,
            end: None,
        };
        b.out.resume(2, Some(&sink)).unwrap();
        b.give("23");
        assert_eq!(b.file(), "012323");
        assert_eq!(b.out.take_news().len(), 1);
    }

    #[test]
    fn a_byte_is_acknowledged_only_once_it_is_synced_and_a_failed_sync_is_tried_again() {
        for (error, forgets) in [
            (Errno::ENOSPC, true),
            (Errno::EDQUOT, false),
            (Errno::EIO, true),
            (Errno::ESTALE, false),
        ] {
            let mut b = Bench::on("");
            b.give("first\n");
            assert_eq!((b.out.synced(), b.stored()), (6, "first\n"));
            b.now += SYNC_AFTER;
            b.out.store.fail_sync = Some(error);
            b.out.store.forgets = forgets;
            b.give("second\n");
            assert_eq!((b.out.synced(), b.stored()), (6, "first\n"), "{error}");
            b.give("third\n");
            assert_eq!(b.queue.len(), 6, "{error}: it goes on writing while the file fails");
            for _ in 0..3 {
                b.later(RETRY);
            }
            assert_eq!((b.out.synced(), b.queue.len()), (6, 6), "{error}");
            assert_eq!(b.out.take_news().len(), 1, "{error} is said once");
            assert_eq!(b.out.broken().is_some(), matches!(error, Errno::EIO | Errno::ESTALE));
            b.out.store.fail_sync = None;
            b.later(RETRY);
            b.later(SYNC_AFTER);
            assert_eq!((b.out.synced(), b.stored()), (19, "first\nsecond\nthird\n"), "{error}");
            assert!(b.out.broken().is_none() && b.out.is_settled());
            assert_eq!(b.out.take_news().len(), 1, "{error}: and once that it is over");
        }
    }

    #[test]
    fn what_the_file_system_forgot_is_not_written_over_what_another_put_there() {
        let mut b = Bench::on("");
        b.give("one\n");
        b.now += SYNC_AFTER;
        (b.out.store.room, b.out.store.forgets) = (Some(4), true);
        b.give("two\n");
        assert_eq!(b.file(), "one\n");
        b.other("THREE\n");
        b.out.store.room = None;
        b.out.store.at_most = Some(3);
        b.later(RETRY);
        b.later(RETRY);
        assert_eq!((b.stored(), b.out.synced()), ("one\nTHREE\ntwo\n", 8));
    }

    #[test]
    fn errors_at_a_write_hold_the_bytes_back_unless_the_file_takes_nothing_for_good() {
        for error in [Errno::ENOSPC, Errno::EDQUOT, Errno::EIO, Errno::ESTALE] {
            let mut b = Bench::on("");
            b.out.store.fail_write = Some(error);
            b.give("text");
            assert_eq!(
                (b.out.written(), b.queue.len(), b.out.due_at(b.now)),
                (0, 4, Some(b.now + RETRY)),
                "{error}"
            );
            b.out.store.fail_write = None;
            b.later(RETRY);
            assert_eq!((b.stored(), b.out.synced()), ("text", 4), "{error}");
        }
        let mut b = Bench::on("");
        b.out.store.fail_write = Some(Errno::EFBIG);
        b.queue.extend(b"text");
        assert_eq!(b.out.advance(&mut b.queue, b.now), Err(Errno::EFBIG));
    }

    #[test]
    fn syncs_are_few_and_lines_are_in_the_file_at_once() {
        let mut b = Bench::on("");
        for i in 0..1000 {
            b.give("a line every 10 ms\n");
            assert_eq!(b.file().len(), (i + 1) * 19);
            b.later(Duration::from_millis(10));
        }
        assert!(b.out.store.syncs <= 11, "{}", b.out.store.syncs);
        let before = b.out.store.syncs;
        for _ in 0..32 {
            b.give(&"x".repeat(CHUNK));
        }
        assert_eq!(b.out.store.syncs - before, 32 * CHUNK / SYNC_BYTES);
        b.out.finish();
        b.advance();
        assert!(b.out.is_settled());
    }

    #[test]
    fn a_hand_over_during_an_outage_reports_what_is_stored_and_no_end_of_the_file() {
        let mut b = Bench::on("");
        b.give("one\n");
        b.out.store.fail_sync = Some(Errno::EDQUOT);
        b.give("two\n");
        assert_eq!((b.out.secure(b.now), b.out.synced()), (None, 4));
        b.out.store.fail_sync = None;
        assert_eq!((b.out.secure(b.now), b.out.synced()), (Some(8), 8));
    }
}
