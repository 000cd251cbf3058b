//! How much a user can make the agent do: every bound in one place, and one account per uid that is held against them.
//!
//! The agent runs as root and serves everybody on its node through one socket, so whatever a client's word costs (a connection, a thread,
//! memory, a question to Slurm) is charged to the uid that the kernel attests for the connection. [`Accounts`] decides and does nothing
//! else; [`Budget`] is the same behind a lock, and what it gives out comes back when it is dropped. Root and SlurmUser have places of
//! their own and wait for no turn: hooks must get through whatever users do.
//!
//! docs/security.md has the table; a test holds it against these constants.
use std::{
    collections::HashMap,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Connections of all users at a time, where descriptors allow so many.
pub const CONNECTIONS: usize = 4096;
/// Connections that only root and SlurmUser can have, beyond those: hooks, administrators.
pub const RESERVED_CONNECTIONS: usize = 256;
/// Connections of one user. Besides, nobody gets more places than are left free for others.
pub const CONNECTIONS_PER_USER: usize = 1024;
/// Questions of `svm` under way for one user; following a log or a move is one all the while.
pub const QUESTIONS_PER_USER: usize = 32;
/// Sessions of one VM at a time: two for each program that a guest runs, the old one and the one that takes its place.
pub const SESSIONS_PER_VM: usize = 256;
/// Bytes that the agent holds for one user: what sessions brought and the guest has not taken, and output on its way to shims.
pub const BYTES_PER_USER: usize = 128 << 20;
/// Bytes of output on their way to one shim; an honest one never has half of it, a session above it is cut.
pub const BYTES_PER_SESSION: usize = 2 << 20;
/// Strings in an environment or an argument vector.
pub const STRINGS: usize = 64 << 10;
/// Bytes of a control frame that opens a session.
pub const OPENING_BYTES: usize = 1 << 20;
/// Bytes of any other control frame.
pub const CONTROL_BYTES: usize = 4 << 10;
/// Frames of one session that its VM's owner has not looked at; the reader waits.
pub const FRAMES_PER_SESSION: usize = 16;
/// What a session takes from its beginning on: the buffers of its connection.
pub const BYTES_AT_FIRST: usize = 64 << 10;
/// How often what a session brings to start its program is held until the guest has it: as it came, as the guest is told, and on its way.
pub const COPIES: usize = 3;
/// Questions to Slurm under way for one user; the next waits for its turn.
pub const TURNS_PER_USER: usize = 2;
/// Questions to Slurm that a user may ask at once after a quiet while.
pub const TURNS_AT_ONCE: u32 = 32;
/// Time between two of them in the long run.
pub const TURN_EVERY: Duration = Duration::from_millis(200);
/// How long a client waits for its turn before it is refused.
pub const TURN_WITHIN: Duration = Duration::from_secs(60);
/// Time between two questions to Slurm of what a SIGTERM means, for one VM.
pub const CAUSE_EVERY: Duration = Duration::from_secs(1);
/// Orders for a guest that it has not carried out; signals beyond are dropped.
pub const ORDERS_PER_VM: usize = 256;
/// How long a client may take to say what it wants, all in all.
pub const FIRST_WORDS: Duration = Duration::from_secs(10);
/// How long a shim may take to open its session, all in all.
pub const OPENING_WITHIN: Duration = Duration::from_secs(30);
/// How long a client may take to read an answer.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// Descriptors for all that is no client: guests, libvirt, the ledger, Slurm's commands, other agents.
pub const OWN_DESCRIPTORS: u64 = 512;

/// What [`Accounts`] holds everybody to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// [`CONNECTIONS`], or as many as there are descriptors for.
    pub connections: usize,
    /// [`RESERVED_CONNECTIONS`]
    pub reserved: usize,
    /// [`CONNECTIONS_PER_USER`]
    pub connections_per_user: usize,
    /// [`QUESTIONS_PER_USER`]
    pub questions_per_user: usize,
    /// [`SESSIONS_PER_VM`]
    pub sessions_per_vm: usize,
    /// [`BYTES_PER_USER`]
    pub bytes_per_user: usize,
    /// [`TURNS_PER_USER`]
    pub turns_per_user: usize,
    /// [`TURNS_AT_ONCE`]
    pub turns_at_once: u32,
    /// [`TURN_EVERY`]
    pub turn_every: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            connections: CONNECTIONS,
            reserved: RESERVED_CONNECTIONS,
            connections_per_user: CONNECTIONS_PER_USER,
            questions_per_user: QUESTIONS_PER_USER,
            sessions_per_vm: SESSIONS_PER_VM,
            bytes_per_user: BYTES_PER_USER,
            turns_per_user: TURNS_PER_USER,
            turns_at_once: TURNS_AT_ONCE,
            turn_every: TURN_EVERY,
        }
    }
}

impl Bounds {
    /// The usual ones, for a process that may open so many descriptors: each connection has one. What is left after our own and the
    /// reserved ones is for users, so that a flood meets its bound before the process runs out of descriptors.
    #[must_use]
    pub fn for_descriptors(limit: u64) -> Self {
        let usual = Self::default();
        let spare = usize::try_from(limit.saturating_sub(OWN_DESCRIPTORS)).unwrap_or(usize::MAX);
        let reserved = usual.reserved.min(spare / 4);
        Self {
            connections: usual.connections.min(spare - reserved),
            reserved,
            ..usual
        }
    }
}

/// What was asked for and is not given, in words for the asker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// No place for another connection.
    #[error("this user has {0} connections to the agent, more are not served")]
    Connections(usize),
    /// Too many questions under way.
    #[error("{0} questions of this user are under way already")]
    Questions(usize),
    /// Too many sessions of the VM.
    #[error("the job's VM has {0} sessions already")]
    Sessions(usize),
    /// Too many bytes.
    #[error("the agent holds {} MiB for this user and takes no more", .0 >> 20)]
    Bytes(usize),
    /// No turn in time.
    #[error("too many questions of this user to Slurm are waiting")]
    Turns,
}

/// Whether a question to Slurm may be asked now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum May {
    /// Yes, and it is counted.
    Go,
    /// When one that is under way has ended.
    AfterAnother,
    /// After this time.
    In(Duration),
}

#[derive(Debug, Default)]
struct Account {
    connections: usize,
    questions: usize,
    bytes: usize,
    turns: usize,
    /// When the turns that were taken are paid off, at one each [`Bounds::turn_every`].
    paid_at: Option<Instant>,
}

/// Who holds how much of what. Pure: time is handed in.
#[derive(Debug)]
pub struct Accounts {
    bounds: Bounds,
    users: HashMap<u32, Account>,
    /// Sessions by user and job: who tries another user's job takes no place of it.
    sessions: HashMap<(u32, u32), usize>,
    /// Connections of users, and of root and SlurmUser.
    connections: [usize; 2],
}

impl Accounts {
    /// Nobody holds anything.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            users: HashMap::new(),
            sessions: HashMap::new(),
            connections: [0, 0],
        }
    }

    fn of(&mut self, uid: u32) -> &mut Account {
        self.users.entry(uid).or_default()
    }

    /// Accounts that hold nothing and owe nothing are not kept: their number is bounded by what is held.
    fn tidy(&mut self, uid: u32, now: Instant) {
        let idle = |a: &Account| a.connections + a.questions + a.bytes + a.turns == 0 && a.paid_at.is_none_or(|at| at <= now);
        if self.users.get(&uid).is_some_and(idle) {
            self.users.remove(&uid);
        }
    }

    /// A connection comes in.
    ///
    /// # Errors
    /// [`Full::Connections`]
    pub fn connect(&mut self, uid: u32, operator: bool) -> Result<(), Full> {
        let [users, operators] = self.connections;
        let mine = self.users.get(&uid).map_or(0, |a| a.connections);
        let fits = if operator {
            users + operators < self.bounds.connections + self.bounds.reserved
        } else {
            let free = self.bounds.connections.saturating_sub(users);
            mine < self.bounds.connections_per_user && mine < free
        };
        if !fits {
            return Err(Full::Connections(mine));
        }
        self.connections[usize::from(operator)] += 1;
        self.of(uid).connections += 1;
        Ok(())
    }

    /// A connection has ended.
    pub fn disconnect(&mut self, uid: u32, operator: bool, now: Instant) {
        self.connections[usize::from(operator)] -= 1;
        self.of(uid).connections -= 1;
        self.tidy(uid, now);
    }

    /// A question of `svm` begins.
    ///
    /// # Errors
    /// [`Full::Questions`]
    pub fn ask(&mut self, uid: u32) -> Result<(), Full> {
        let most = self.bounds.questions_per_user;
        let account = self.of(uid);
        if account.questions >= most {
            return Err(Full::Questions(account.questions));
        }
        account.questions += 1;
        Ok(())
    }

    /// It has been answered.
    pub fn answered(&mut self, uid: u32, now: Instant) {
        self.of(uid).questions -= 1;
        self.tidy(uid, now);
    }

    /// A session of a job's VM begins.
    ///
    /// # Errors
    /// [`Full::Sessions`]
    pub fn attach(&mut self, uid: u32, job: u32) -> Result<(), Full> {
        let most = self.bounds.sessions_per_vm;
        let sessions = self.sessions.entry((uid, job)).or_default();
        if *sessions >= most {
            return Err(Full::Sessions(*sessions));
        }
        *sessions += 1;
        Ok(())
    }

    /// It has ended.
    pub fn detach(&mut self, uid: u32, job: u32) {
        if let Some(sessions) = self.sessions.get_mut(&(uid, job)) {
            *sessions -= 1;
            if *sessions == 0 {
                self.sessions.remove(&(uid, job));
            }
        }
    }

    /// Bytes are taken in for a user.
    ///
    /// # Errors
    /// [`Full::Bytes`]
    pub fn take(&mut self, uid: u32, bytes: usize) -> Result<(), Full> {
        let most = self.bounds.bytes_per_user;
        let account = self.of(uid);
        if account.bytes.saturating_add(bytes) > most {
            return Err(Full::Bytes(account.bytes));
        }
        account.bytes += bytes;
        Ok(())
    }

    /// They are held no more.
    pub fn give_back(&mut self, uid: u32, bytes: usize, now: Instant) {
        self.of(uid).bytes -= bytes;
        self.tidy(uid, now);
    }

    /// A question to Slurm for this user.
    pub fn turn(&mut self, uid: u32, now: Instant) -> May {
        let (most, every, at_once) = (self.bounds.turns_per_user, self.bounds.turn_every, self.bounds.turns_at_once);
        let account = self.of(uid);
        if account.turns >= most {
            return May::AfterAnother;
        }
        let paid_at = account.paid_at.map_or(now, |at| at.max(now)) + every;
        let early = (paid_at - now).saturating_sub(every * at_once);
        if !early.is_zero() {
            return May::In(early);
        }
        account.paid_at = Some(paid_at);
        account.turns += 1;
        May::Go
    }

    /// Slurm has answered.
    pub fn turn_over(&mut self, uid: u32, now: Instant) {
        self.of(uid).turns -= 1;
        self.tidy(uid, now);
    }

    /// Bytes held for a user.
    #[must_use]
    pub fn bytes(&self, uid: u32) -> usize {
        self.users.get(&uid).map_or(0, |a| a.bytes)
    }

    /// Nobody holds anything: what was given out has all come back.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        let idle = |a: &Account| a.connections + a.questions + a.bytes + a.turns == 0;
        self.users.values().all(idle) && self.sessions.is_empty() && self.connections == [0, 0]
    }
}

/// [`Accounts`] for threads.
#[derive(Debug)]
pub struct Budget {
    accounts: Mutex<Accounts>,
    changed: Condvar,
}

/// Something that was given out, and goes back when it is dropped.
#[derive(Debug)]
pub struct Held {
    budget: Arc<Budget>,
    what: What,
}

#[derive(Debug)]
enum What {
    Connection { uid: u32, operator: bool },
    Question { uid: u32 },
    Session { uid: u32, job: u32 },
    Bytes { uid: u32, bytes: usize },
    Turn { uid: u32 },
}

impl Budget {
    /// Nobody holds anything.
    #[must_use]
    pub fn new(bounds: Bounds) -> Arc<Self> {
        Arc::new(Self {
            accounts: Mutex::new(Accounts::new(bounds)),
            changed: Condvar::new(),
        })
    }

    fn accounts(&self) -> MutexGuard<'_, Accounts> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(self: &Arc<Self>, what: What) -> Held {
        Held {
            budget: self.clone(),
            what,
        }
    }

    /// A place for a connection.
    ///
    /// # Errors
    /// [`Full`]
    pub fn connection(self: &Arc<Self>, uid: u32, operator: bool) -> Result<Held, Full> {
        self.accounts().connect(uid, operator)?;
        Ok(self.held(What::Connection { uid, operator }))
    }

    /// A place for a question of `svm`.
    ///
    /// # Errors
    /// [`Full`]
    pub fn question(self: &Arc<Self>, uid: u32) -> Result<Held, Full> {
        self.accounts().ask(uid)?;
        Ok(self.held(What::Question { uid }))
    }

    /// A place for a session of a job's VM.
    ///
    /// # Errors
    /// [`Full`]
    pub fn session(self: &Arc<Self>, uid: u32, job: u32) -> Result<Held, Full> {
        self.accounts().attach(uid, job)?;
        Ok(self.held(What::Session { uid, job }))
    }

    /// Room for bytes.
    ///
    /// # Errors
    /// [`Full`]
    pub fn bytes(self: &Arc<Self>, uid: u32, bytes: usize) -> Result<Held, Full> {
        self.accounts().take(uid, bytes)?;
        Ok(self.held(What::Bytes { uid, bytes }))
    }

    /// Waits until a question to Slurm may be asked for this user; the turn is over when the result is dropped.
    ///
    /// # Errors
    /// [`Full::Turns`] when it does not come within [`TURN_WITHIN`].
    pub fn turn(self: &Arc<Self>, uid: u32) -> Result<Held, Full> {
        let deadline = Instant::now() + TURN_WITHIN;
        let mut accounts = self.accounts();
        loop {
            let now = Instant::now();
            let pause = match accounts.turn(uid, now) {
                May::Go => break,
                May::In(pause) => pause,
                May::AfterAnother => TURN_WITHIN,
            };
            let left = deadline.saturating_duration_since(now);
            if left.is_zero() {
                return Err(Full::Turns);
            }
            accounts = self
                .changed
                .wait_timeout(accounts, pause.min(left))
                .map_or_else(|e| e.into_inner().0, |(accounts, _)| accounts);
        }
        drop(accounts);
        Ok(self.held(What::Turn { uid }))
    }

    /// Bytes held for a user.
    #[must_use]
    pub fn bytes_of(&self, uid: u32) -> usize {
        self.accounts().bytes(uid)
    }

    /// Nobody holds anything.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.accounts().is_idle()
    }
}

impl Held {
    /// Gives a part of held bytes back.
    pub fn shrink(&mut self, by: usize) {
        if let What::Bytes { uid, bytes } = &mut self.what {
            let by = by.min(*bytes);
            *bytes -= by;
            self.budget.accounts().give_back(*uid, by, Instant::now());
        }
    }

    /// Holds more bytes.
    ///
    /// # Errors
    /// [`Full::Bytes`]; what was held stays.
    pub fn grow(&mut self, by: usize) -> Result<(), Full> {
        if let What::Bytes { uid, bytes } = &mut self.what {
            self.budget.accounts().take(*uid, by)?;
            *bytes += by;
        }
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut accounts = self.budget.accounts();
        match self.what {
            What::Connection { uid, operator } => accounts.disconnect(uid, operator, now),
            What::Question { uid } => accounts.answered(uid, now),
            What::Session { uid, job } => accounts.detach(uid, job),
            What::Bytes { uid, bytes } => accounts.give_back(uid, bytes, now),
            What::Turn { uid } => {
                accounts.turn_over(uid, now);
                drop(accounts);
                self.budget.changed.notify_all();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALICE: u32 = 2001;
    const BOB: u32 = 2002;

    fn connections(a: &mut Accounts, uid: u32) -> usize {
        (0..10_000).take_while(|_| a.connect(uid, uid == 0).is_ok()).count()
    }

    #[test]
    fn a_user_who_takes_all_he_can_get_leaves_places_for_others_and_for_root() {
        let mut a = Accounts::new(Bounds::default());
        assert_eq!(connections(&mut a, BOB), CONNECTIONS_PER_USER);
        assert_eq!(connections(&mut a, ALICE), CONNECTIONS_PER_USER);
        // However many do so, the next one finds places, and root those that are his.
        let more: Vec<usize> = (3000..3010).map(|uid| connections(&mut a, uid)).collect();
        assert!(more.iter().all(|n| *n > 0), "{more:?}");
        assert!(connections(&mut a, 0) >= RESERVED_CONNECTIONS);
        a.disconnect(BOB, false, Instant::now());
        assert!(a.connect(BOB, false).is_err() || a.connect(ALICE, false).is_err());
    }

    #[test]
    fn with_few_descriptors_there_are_fewer_places_but_each_has_its_descriptor() {
        for limit in [0, 600, 1024, 4096, 65536, u64::MAX] {
            let b = Bounds::for_descriptors(limit);
            assert!(
                (b.connections + b.reserved) as u64 <= limit.saturating_sub(OWN_DESCRIPTORS),
                "{limit}: {b:?}"
            );
        }
        assert!(Bounds::for_descriptors(1024).connections > 300);
        assert_eq!(Bounds::for_descriptors(65536), Bounds::default());
    }

    #[test]
    fn questions_to_slurm_come_at_once_first_and_then_at_a_pace() {
        let mut a = Accounts::new(Bounds::default());
        let begun = Instant::now();
        assert_eq!((a.turn(BOB, begun), a.turn(BOB, begun)), (May::Go, May::Go));
        assert_eq!(a.turn(BOB, begun), May::AfterAnother);
        assert_eq!(a.turn(ALICE, begun), May::Go, "another user waits for nobody");
        a.turn_over(BOB, begun);
        a.turn_over(BOB, begun);
        let mut asked = 2;
        for ms in 0..60_000 {
            let now = begun + Duration::from_millis(ms);
            while a.turn(BOB, now) == May::Go {
                asked += 1;
                a.turn_over(BOB, now);
            }
        }
        let paced = u32::try_from(60_000 / TURN_EVERY.as_millis()).unwrap();
        assert!(asked >= paced && asked <= paced + TURNS_AT_ONCE + 1, "{asked} in a minute");
    }

    #[test]
    fn the_table_of_the_documentation_has_these_bounds() {
        let page = include_str!("../../docs/security.md");
        let mib = |bytes: usize| format!("{} MiB", bytes >> 20);
        for (what, bounds) in [
            ("connections", vec![CONNECTIONS_PER_USER.to_string(), CONNECTIONS.to_string()]),
            ("connections of root and SlurmUser", vec![RESERVED_CONNECTIONS.to_string()]),
            (
                "time to say what is wanted",
                vec![format!("{} s", FIRST_WORDS.as_secs()), format!("{} s", OPENING_WITHIN.as_secs())],
            ),
            ("memory", vec![mib(BYTES_PER_USER), format!("{COPIES} times")]),
            ("output on its way to one shim", vec![mib(BYTES_PER_SESSION)]),
            ("frames of one session before the VM's owner", vec![FRAMES_PER_SESSION.to_string()]),
            ("environment and arguments", vec![STRINGS.to_string()]),
            ("sessions of one job's VM", vec![SESSIONS_PER_VM.to_string()]),
            ("questions of `svm` under way", vec![QUESTIONS_PER_USER.to_string()]),
            (
                "questions to Slurm",
                vec![
                    format!("{TURNS_PER_USER} at a time"),
                    format!("{TURNS_AT_ONCE} at once"),
                    format!("{} ms", TURN_EVERY.as_millis()),
                    format!("{} s", TURN_WITHIN.as_secs()),
                ],
            ),
            ("orders that a guest has not carried out", vec![ORDERS_PER_VM.to_string()]),
        ] {
            let row = page
                .lines()
                .find(|l| l.starts_with(&format!("| {what}")))
                .unwrap_or_else(|| panic!("no row for {what}"));
            for bound in bounds {
                assert!(row.contains(&bound), "{bound} is not in: {row}");
            }
        }
        assert_eq!(CAUSE_EVERY, Duration::from_secs(1), "one a second, says the table");
    }

    #[test]
    fn what_was_given_out_comes_back() {
        let budget = Budget::new(Bounds::default());
        {
            let _held = (
                budget.connection(BOB, false).unwrap(),
                budget.connection(0, true).unwrap(),
                budget.question(BOB).unwrap(),
                budget.session(BOB, 7).unwrap(),
                budget.turn(BOB).unwrap(),
            );
            let mut bytes = budget.bytes(BOB, 100).unwrap();
            bytes.grow(50).unwrap();
            bytes.shrink(120);
            assert_eq!(budget.bytes_of(BOB), 30);
            assert!(!budget.is_idle());
        }
        assert!(budget.is_idle());
    }

    #[test]
    fn bytes_questions_and_sessions_have_their_bounds() {
        let budget = Budget::new(Bounds::default());
        let half = budget.bytes(BOB, BYTES_PER_USER / 2).unwrap();
        let rest = budget.bytes(BOB, BYTES_PER_USER / 2).unwrap();
        assert_eq!(budget.bytes(BOB, 1).unwrap_err(), Full::Bytes(BYTES_PER_USER));
        assert!(budget.bytes(ALICE, 1).is_ok());
        drop((half, rest));
        assert!(budget.bytes(BOB, 1).is_ok());
        let questions: Vec<Held> = (0..QUESTIONS_PER_USER).map(|_| budget.question(BOB).unwrap()).collect();
        assert!(budget.question(BOB).is_err() && budget.question(ALICE).is_ok());
        let sessions: Vec<Held> = (0..SESSIONS_PER_VM).map(|_| budget.session(BOB, 7).unwrap()).collect();
        assert!(budget.session(BOB, 7).is_err() && budget.session(BOB, 8).is_ok() && budget.session(ALICE, 7).is_ok());
        drop((questions, sessions));
        assert!(budget.is_idle());
    }
}
