//! Orders to Slurm, one after the other on one thread, and no faster than slurmctld can bear: a burst at once, then a few a
//! second. Hundreds of jobs that are preempted in one moment must not stop the scheduler that preempted them.
//!
//! Orders by which a node becomes free go before all others: somebody waits for that node. Of those that say the same of
//! several jobs ([`Bulk`]) one command takes all that wait; if Slurm refuses it, each is given by itself.
use std::{
    collections::VecDeque,
    panic::AssertUnwindSafe,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
    time::{Duration, Instant},
};

use crate::{
    effects::Clock,
    slurm::{JobUpdate, Slurm, SlurmError},
};

/// Commands that may follow each other without a pause.
const BURST: u32 = 40;
/// After that, milliseconds for each command: with the polls this makes less than ten commands a second.
const PER_COMMAND_MS: u64 = 180;
/// Orders that wait at the most; who gives one more, waits until there is room.
const MOST_WAITING: usize = 4096;
/// Jobs in one command: their numbers fit into a command line of any length that is usual.
const MOST_JOBS: usize = 200;
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

/// An order that one command gives for many jobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Bulk {
    /// Back into the queue.
    Requeue,
    /// Back into the queue, and held there.
    RequeueHold,
    /// Hold a waiting job.
    Hold,
    /// Let a held job go.
    Release,
    /// Change the same of it.
    Update(JobUpdate),
}

impl Bulk {
    /// Runs the command.
    fn give(&self, slurm: &dyn Slurm, jobs: &[u32]) -> Result<(), SlurmError> {
        match self {
            Self::Requeue => slurm.requeue(jobs),
            Self::RequeueHold => slurm.requeuehold(jobs),
            Self::Hold => slurm.hold(jobs),
            Self::Release => slurm.release(jobs),
            Self::Update(update) => slurm.update_jobs(jobs, update),
        }
    }

    fn frees_node(&self) -> bool {
        matches!(self, Self::Requeue | Self::RequeueHold)
    }
}

/// An order of its own: how many commands it takes, and what it does.
struct Own {
    commands: u32,
    run: Box<dyn FnMut() -> Tried + Send>,
}

/// A job's part of a command for many.
struct Part {
    job: u32,
    /// Takes the answer.
    done: Box<dyn FnOnce(Result<(), SlurmError>) + Send>,
}

enum Task {
    Own(Own),
    Bulk(Bulk, Part),
}

/// What the thread is to do next.
enum Next {
    Own(Own),
    Bulk(Bulk, Vec<Part>),
}

/// What waits. Pure: time is handed in.
#[derive(Default)]
struct Queue {
    /// Orders by which a node becomes free.
    first: VecDeque<Task>,
    rest: VecDeque<Task>,
    again: VecDeque<(Instant, Own)>,
    /// Nobody can give orders any more.
    closed: bool,
}

impl Queue {
    /// An order that frees a node, else the oldest. One whose next try is due goes behind those that wait.
    fn next(&mut self, now: Instant) -> Option<Next> {
        while self.due().is_some_and(|at| at <= now) {
            self.rest.extend(self.again.pop_front().map(|(_, own)| Task::Own(own)));
        }
        pop(&mut self.first).or_else(|| pop(&mut self.rest))
    }

    /// When the next try of some order is due.
    fn due(&self) -> Option<Instant> {
        self.again.front().map(|(at, _)| *at)
    }

    fn is_full(&self) -> bool {
        self.first.len() + self.rest.len() >= MOST_WAITING
    }
}

/// The oldest order, with all that fit into the same command.
fn pop(tasks: &mut VecDeque<Task>) -> Option<Next> {
    match tasks.pop_front()? {
        Task::Own(own) => Some(Next::Own(own)),
        Task::Bulk(kind, part) => {
            let mut parts = vec![part];
            for task in std::mem::take(tasks) {
                match task {
                    Task::Bulk(same, part) if same == kind && parts.len() < MOST_JOBS => parts.push(part),
                    other => tasks.push_back(other),
                }
            }
            Some(Next::Bulk(kind, parts))
        }
    }
}

/// The way to the thread, which ends with it.
pub(super) struct Orders {
    shared: Arc<Shared>,
    pacer: Arc<Pacer>,
}

/// The pace of all commands to Slurm that a move costs, whichever thread gives them.
struct Pacer {
    clock: Arc<dyn Clock>,
    begun: Instant,
    pace: Mutex<Pace>,
}

impl Pacer {
    /// Waits until so many commands may be given.
    fn wait(&self, commands: u32) {
        let now_ms = u64::try_from(self.clock.since(self.begun).as_millis()).unwrap_or(u64::MAX);
        let mut pace = self.pace.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let wait = pace.wait_ms(now_ms, commands);
        drop(pace);
        self.clock.sleep(Duration::from_millis(wait));
    }
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// There is something to do, or the end.
    more: Condvar,
    /// There is room again.
    room: Condvar,
}

impl std::fmt::Debug for Orders {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let queue = self.shared.queue();
        f.debug_struct("Orders")
            .field("first", &queue.first.len())
            .field("rest", &queue.rest.len())
            .finish_non_exhaustive()
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
        self.since_ms += missing * PER_COMMAND_MS;
        // Somebody else may have been given a time that is still to come: this comes after that.
        self.since_ms.saturating_sub(now_ms)
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Waits for the next order; `None`: there will be none.
    fn take(&self, clock: &dyn Clock) -> Option<Next> {
        let mut queue = self.queue();
        loop {
            let now = clock.instant();
            if let Some(next) = queue.next(now) {
                self.room.notify_all();
                return Some(next);
            }
            queue = match queue.due() {
                Some(at) => {
                    let waited = self.more.wait_timeout(queue, at.saturating_duration_since(now));
                    waited.unwrap_or_else(std::sync::PoisonError::into_inner).0
                }
                None if queue.closed => return None,
                None => self.more.wait(queue).unwrap_or_else(std::sync::PoisonError::into_inner),
            };
        }
    }
}

impl Orders {
    /// Starts the thread.
    pub(super) fn start(clock: Arc<dyn Clock>, slurm: Arc<dyn Slurm>) -> Self {
        let shared = Arc::new(Shared::default());
        let pacer = Arc::new(Pacer {
            begun: clock.instant(),
            clock,
            pace: Mutex::new(Pace::new(0)),
        });
        let (waiting, paced) = (shared.clone(), pacer.clone());
        if let Err(e) = thread::Builder::new()
            .name("orders".into())
            .spawn(move || work(&waiting, &paced, &*slurm))
        {
            log::error!("cannot start the thread that gives orders to Slurm: {e}");
        }
        Self { shared, pacer }
    }

    /// For a command that is not given here: waits for its turn.
    pub(super) fn wait_turn(&self, commands: u32) {
        self.pacer.wait(commands);
    }

    /// Puts an order behind the others. `commands`: how many it runs, but for those for which it waits itself
    /// ([`Orders::wait_turn`]).
    pub(super) fn give(&self, commands: u32, run: impl FnMut() -> Tried + Send + 'static) {
        let run = Box::new(run);
        self.put(Task::Own(Own { commands, run }), false);
    }

    /// The same for an order by which a node becomes free.
    pub(super) fn give_first(&self, commands: u32, run: impl FnMut() -> Tried + Send + 'static) {
        let run = Box::new(run);
        self.put(Task::Own(Own { commands, run }), true);
    }

    /// An order that goes with its like of other jobs; `done` takes Slurm's answer.
    pub(super) fn give_bulk(&self, kind: Bulk, job: u32, done: impl FnOnce(Result<(), SlurmError>) + Send + 'static) {
        let done = Box::new(done);
        let first = kind.frees_node();
        self.put(Task::Bulk(kind, Part { job, done }), first);
    }

    fn put(&self, task: Task, first: bool) {
        let mut queue = self.shared.queue();
        while queue.is_full() {
            queue = self.shared.room.wait(queue).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        if first {
            queue.first.push_back(task);
        } else {
            queue.rest.push_back(task);
        }
        self.shared.more.notify_one();
    }
}

impl Drop for Orders {
    fn drop(&mut self) {
        self.shared.queue().closed = true;
        self.shared.more.notify_one();
    }
}

fn work(shared: &Shared, pacer: &Pacer, slurm: &dyn Slurm) {
    while let Some(next) = shared.take(&*pacer.clock) {
        // One order that goes wrong must not end all the others.
        let done = std::panic::catch_unwind(AssertUnwindSafe(|| match next {
            Next::Own(mut own) => {
                // Nothing else may overtake it.
                pacer.wait(own.commands);
                if (own.run)() == Tried::Again {
                    shared.queue().again.push_back((pacer.clock.instant() + AGAIN, own));
                }
            }
            Next::Bulk(kind, parts) => give_all(slurm, &kind, parts, pacer),
        }));
        if done.is_err() {
            log::error!("an order to Slurm was given up by a panic");
        }
    }
}

/// One command for all, and one for each where Slurm refuses that: one of the jobs may have ended.
fn give_all(slurm: &dyn Slurm, kind: &Bulk, parts: Vec<Part>, pacer: &Pacer) {
    let jobs: Vec<u32> = parts.iter().map(|p| p.job).collect();
    pacer.wait(1);
    match kind.give(slurm, &jobs) {
        Err(e) if jobs.len() > 1 && !e.is_transient() => {
            for part in parts {
                pacer.wait(1);
                (part.done)(kind.give(slurm, &[part.job]));
            }
        }
        all => parts.into_iter().for_each(|part| (part.done)(all.clone())),
    }
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::bounded;

    use super::*;
    use crate::{
        effects::SystemClock,
        slurm::{FakeOp, FakeSlurm, Fault},
    };

    fn orders() -> Orders {
        Orders::start(Arc::new(SystemClock), Arc::new(FakeSlurm::with_nodes(1)))
    }

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
            assert!(at.iter().filter(|ms| *ms / 1000 == second).count() <= 6, "second {second}");
        }
        // After a pause there may be a burst again, and not more than one.
        let later = last + 3_600_000;
        let waits: Vec<u64> = (0..=BURST).map(|_| pace.wait_ms(later, 1)).collect();
        assert_eq!(waits.iter().filter(|w| **w == 0).count(), BURST as usize);
    }

    #[test]
    fn an_order_that_frees_a_node_overtakes_those_that_wait() {
        let orders = orders();
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

    /// Orders for some jobs behind one that holds up the thread, so that they wait together. Returns Slurm's answers.
    fn together(slurm: &Arc<FakeSlurm>, jobs: &[u32]) -> Vec<Result<(), SlurmError>> {
        let orders = Orders::start(Arc::new(SystemClock), slurm.clone());
        let (go, gate) = bounded::<()>(0);
        orders.give(1, move || {
            gate.recv().unwrap();
            Tried::Done
        });
        let (told, heard) = bounded(jobs.len());
        for job in jobs {
            let told = told.clone();
            orders.give_bulk(Bulk::Release, *job, move |done| told.send(done).unwrap());
        }
        go.send(()).unwrap();
        let answers = jobs.iter().map(|_| heard.recv_timeout(Duration::from_secs(20)).unwrap());
        answers.collect()
    }

    fn held_jobs(slurm: &FakeSlurm, n: u32) -> Vec<u32> {
        let submit = |_| {
            let job = slurm.submit(crate::slurm::FakeJob::default());
            slurm.hold(&[job]).unwrap();
            job
        };
        (0..n).map(submit).collect()
    }

    #[test]
    fn the_same_order_for_many_jobs_is_one_command() {
        let slurm = Arc::new(FakeSlurm::with_nodes(1));
        let jobs = held_jobs(&slurm, 50);
        assert!(together(&slurm, &jobs).iter().all(Result::is_ok));
        assert_eq!(slurm.calls(FakeOp::Release), 1);
        assert!(jobs.iter().all(|job| !slurm.job(*job).unwrap().unwrap().brief.is_held()));
    }

    #[test]
    fn one_job_that_slurm_refuses_costs_the_others_nothing() {
        let slurm = Arc::new(FakeSlurm::with_nodes(1));
        let mut jobs = held_jobs(&slurm, 2);
        jobs.insert(1, 9999);
        let answers = together(&slurm, &jobs);
        assert_eq!(
            answers.iter().map(Result::is_ok).collect::<Vec<_>>(),
            [true, false, true],
            "{answers:?}"
        );
    }

    #[test]
    fn a_slurmctld_that_does_not_answer_is_asked_once_and_not_for_each_job() {
        let slurm = Arc::new(FakeSlurm::with_nodes(1));
        let jobs = held_jobs(&slurm, 3);
        let error = SlurmError::Timeout {
            program: "scontrol",
            after: Duration::from_secs(15),
        };
        slurm.inject(Fault {
            op: FakeOp::Release,
            error: error.clone(),
            carried_out: false,
            times: 1,
        });
        assert_eq!(together(&slurm, &jobs), [Err(error.clone()), Err(error.clone()), Err(error)]);
        assert_eq!(slurm.calls(FakeOp::Release), 1);
    }

    #[test]
    fn an_order_that_panics_ends_no_other() {
        let orders = orders();
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
        let orders = orders();
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
