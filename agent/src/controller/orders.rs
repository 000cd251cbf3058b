//! Orders to Slurm, one after the other on one thread, and no faster than slurmctld can bear: a burst at once, then a few a
//! second. Hundreds of jobs that are preempted in one moment must not stop the scheduler that preempted them. Orders by which a node
//! becomes free go before all others: somebody waits for that node.
use std::{
    collections::VecDeque,
    panic::AssertUnwindSafe,
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender, at, bounded, never, select_biased};

/// Commands that may follow each other without a pause.
const BURST: u32 = 40;
/// After that, milliseconds for each command: with the polls this makes less than ten commands a second.
const PER_COMMAND_MS: u64 = 200;
/// Orders that wait at the most; who gives one more, waits until there is room.
const MOST_WAITING: usize = 4096;
/// Between two tries of an order that is to be tried again.
const AGAIN: Duration = Duration::from_millis(250);

/// What came of trying an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tried {
    /// It is done, or given up.
    Done,
    /// It is to be tried again in a moment.
    Again,
}

/// An order: how many commands it takes, and what it does.
struct Task {
    commands: u32,
    run: Box<dyn FnMut() -> Tried + Send>,
}

/// The way to the thread.
#[derive(Debug, Clone)]
pub(super) struct Orders {
    first: Sender<Task>,
    queue: Sender<Task>,
}

/// The thread's ends.
struct Waiting {
    first: Receiver<Task>,
    queue: Receiver<Task>,
}

impl std::fmt::Debug for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Task").field("commands", &self.commands).finish_non_exhaustive()
    }
}

/// How fast commands may follow each other. Pure: time is handed in.
#[derive(Debug)]
struct Pace {
    /// Commands that may be given at once.
    left: u32,
    since_ms: u64,
}

impl Pace {
    fn new(now_ms: u64) -> Self {
        Self {
            left: BURST,
            since_ms: now_ms,
        }
    }

    /// Milliseconds to wait before so many commands, which are counted now.
    fn wait_ms(&mut self, now_ms: u64, commands: u32) -> u64 {
        let earned = now_ms.saturating_sub(self.since_ms) / PER_COMMAND_MS;
        self.since_ms += earned * PER_COMMAND_MS;
        self.left = self.left.saturating_add(u32::try_from(earned).unwrap_or(BURST)).min(BURST);
        if self.left >= commands {
            self.left -= commands;
            return 0;
        }
        let missing = u64::from(commands - self.left);
        self.left = 0;
        let wait = (missing * PER_COMMAND_MS).saturating_sub(now_ms.saturating_sub(self.since_ms));
        self.since_ms += missing * PER_COMMAND_MS;
        wait
    }
}

impl Orders {
    /// Starts the thread.
    pub(super) fn start() -> Self {
        let (first, urgent) = bounded(MOST_WAITING);
        let (queue, ordinary) = bounded(MOST_WAITING);
        let waiting = Waiting {
            first: urgent,
            queue: ordinary,
        };
        if let Err(e) = thread::Builder::new().name("orders".into()).spawn(move || work(&waiting)) {
            log::error!("cannot start the thread that gives orders to Slurm: {e}");
        }
        Self { first, queue }
    }

    /// Puts an order behind the others. `commands`: how many it runs.
    pub(super) fn give(&self, commands: u32, run: impl FnMut() -> Tried + Send + 'static) {
        let _ = self.queue.send(Task {
            commands,
            run: Box::new(run),
        });
    }

    /// The same for an order by which a node becomes free.
    pub(super) fn give_first(&self, commands: u32, run: impl FnMut() -> Tried + Send + 'static) {
        let _ = self.first.send(Task {
            commands,
            run: Box::new(run),
        });
    }
}

/// The next order: one that frees a node, else the oldest. `None`: one that is to be tried again is `due`, or nobody can give orders any more.
fn next(waiting: &Waiting, due: Option<Instant>) -> Option<Task> {
    let due = due.map_or_else(never, at);
    select_biased! {
        recv(waiting.first) -> task => task.ok(),
        recv(due) -> _ => None,
        recv(waiting.queue) -> task => task.ok(),
    }
}

fn work(waiting: &Waiting) {
    let begun = Instant::now();
    let now_ms = || u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    let mut pace = Pace::new(0);
    let mut again: VecDeque<(Instant, Task)> = VecDeque::new();
    loop {
        let due = again.front().map(|(at, _)| *at);
        let task = next(waiting, due).or_else(|| again.pop_front().map(|(_, task)| task));
        // Without orders to try again there is no end of waiting but that of the controller.
        let Some(mut task) = task else { return };
        let wait = pace.wait_ms(now_ms(), task.commands);
        if wait > 0 {
            // Nothing else may overtake it.
            let _ = never::<()>().recv_timeout(Duration::from_millis(wait));
        }
        // One order that goes wrong must not end all the others.
        match std::panic::catch_unwind(AssertUnwindSafe(|| (task.run)())) {
            Ok(Tried::Done) => {}
            Ok(Tried::Again) => again.push_back((Instant::now() + AGAIN, task)),
            Err(_) => log::error!("an order to Slurm was given up by a panic"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_goes_at_once_and_what_follows_a_few_a_second() {
        let mut pace = Pace::new(0);
        let (mut now_ms, mut at) = (0, Vec::new());
        for _ in 0..1000 {
            now_ms += pace.wait_ms(now_ms, 1);
            at.push(now_ms);
        }
        assert!(at[..BURST as usize].iter().all(|ms| *ms == 0));
        let last = *at.last().unwrap();
        assert_eq!(last, (1000 - u64::from(BURST)) * PER_COMMAND_MS);
        for second in at.iter().map(|ms| ms / 1000).filter(|s| *s > 0) {
            assert!(at.iter().filter(|ms| *ms / 1000 == second).count() <= 5, "second {second}");
        }
        // After a pause there may be a burst again, and not more than one.
        let later = last + 3_600_000;
        let waits: Vec<u64> = (0..=BURST).map(|_| pace.wait_ms(later, 1)).collect();
        assert_eq!(waits.iter().filter(|w| **w == 0).count(), BURST as usize);
    }

    #[test]
    fn an_order_that_frees_a_node_overtakes_those_that_wait() {
        let orders = Orders::start();
        let (told, heard) = bounded(10);
        let (go, gate) = bounded::<()>(0);
        orders.give(1, move || {
            gate.recv().unwrap();
            Tried::Done
        });
        for (name, frees) in [("steer", false), ("release", false), ("requeue", true)] {
            let told = told.clone();
            let run = move || {
                told.send(name).unwrap();
                Tried::Done
            };
            if frees {
                orders.give_first(1, run);
            } else {
                orders.give(1, run);
            }
        }
        go.send(()).unwrap();
        let said: Vec<&str> = (0..3).map(|_| heard.recv_timeout(Duration::from_secs(20)).unwrap()).collect();
        assert_eq!(said, ["requeue", "steer", "release"]);
    }

    #[test]
    fn an_order_that_panics_ends_no_other() {
        let orders = Orders::start();
        let (told, heard) = bounded(1);
        orders.give(1, || panic!("on purpose"));
        orders.give(1, move || {
            told.send(()).unwrap();
            Tried::Done
        });
        heard.recv_timeout(Duration::from_secs(20)).unwrap();
    }

    #[test]
    fn an_order_that_is_to_be_tried_again_holds_up_no_other() {
        let orders = Orders::start();
        let (told, heard) = bounded(10);
        let first = told.clone();
        let mut tries = 0;
        orders.give(1, move || {
            tries += 1;
            first.send(format!("first {tries}")).unwrap();
            if tries < 3 { Tried::Again } else { Tried::Done }
        });
        orders.give(1, move || {
            told.send("second".into()).unwrap();
            Tried::Done
        });
        let said: Vec<String> = (0..4).map(|_| heard.recv_timeout(Duration::from_secs(20)).unwrap()).collect();
        assert_eq!(said, ["first 1", "second", "first 2", "first 3"]);
    }
}
