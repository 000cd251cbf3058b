//! An agent's node role over the fakes of libvirt and Slurm, behind its real socket; guests are the real helper on this
//! machine. Clients of other users are processes of these users.
use std::{
    fmt, fs,
    io::{self, BufRead, BufReader, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{Arc, Condvar, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    thread,
    time::{Duration, Instant},
};

use slurm_vm::{
    cluster::Alone,
    config::Config,
    core::Record,
    effects::{Directory, Files, Store, StoreError, SystemClock, SystemFiles, World, disks::QemuImg, store::DirStore, trusted::Distrust},
    hypervisor::fake,
    node::Node,
    server::{self, Roles},
    slurm::{FakeJob, FakeSlurm},
};
use slurm_vm_api::{
    hooks::{self, HookMessage, HookReply, HookRequest},
    session::{BATCH_STEP, Frame, OPENING, Open, Sink, StepKind, ToAgent, ToShim, UserEntry, VERSION, read_frame, write_frame},
    spec::VmSpec,
};

pub const DEADLINE: Duration = Duration::from_secs(60);
pub const ALICE: u32 = 2001;
pub const BOB: u32 = 2002;

/// A ledger whose writes stand still on request, and with them the owner of the VM.
pub struct Gate {
    inner: DirStore,
    shut: Mutex<bool>,
    opened: Condvar,
    /// Writes that stand at the gate.
    waiting: Mutex<u32>,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gate")
    }
}

impl Gate {
    pub fn shut(&self, shut: bool) {
        *self.shut.lock().unwrap() = shut;
        self.opened.notify_all();
    }

    pub fn somebody_waits(&self) -> bool {
        *self.waiting.lock().unwrap() > 0
    }
}

impl Store for Gate {
    fn load(&self) -> Result<Vec<Result<Record, StoreError>>, StoreError> {
        self.inner.load()
    }
    fn put(&self, record: &Record) -> Result<(), StoreError> {
        *self.waiting.lock().unwrap() += 1;
        let shut = self.shut.lock().unwrap();
        drop(self.opened.wait_while(shut, |shut| *shut).unwrap());
        *self.waiting.lock().unwrap() -= 1;
        self.inner.put(record)
    }
    fn remove(&self, domain: &str) -> Result<(), StoreError> {
        self.inner.remove(domain)
    }
    fn journal(&self, domain: &str, now_ms: u64, line: &str) {
        self.inner.journal(domain, now_ms, line);
    }
    fn vm_dir(&self, domain: &str) -> PathBuf {
        self.inner.vm_dir(domain)
    }
}

/// The tests that measure this process want it for themselves.
static ALONE: RwLock<()> = RwLock::new(());

enum Company {
    Others(#[expect(dead_code, reason = "held")] RwLockReadGuard<'static, ()>),
    Nobody(#[expect(dead_code, reason = "held")] RwLockWriteGuard<'static, ()>),
}

/// The agent's files, of which those on shared storage stand still on request, as on a file server that is away.
#[derive(Debug, Default)]
pub struct Remote {
    away: Mutex<bool>,
    back: Condvar,
}

impl Remote {
    pub fn away(&self, away: bool) {
        *self.away.lock().unwrap() = away;
        self.back.notify_all();
    }

    fn reach(&self, path: &Path) {
        if path.components().any(|c| c.as_os_str() == "shared") {
            drop(self.back.wait_while(self.away.lock().unwrap(), |away| *away).unwrap());
        }
    }
}

impl Files for Remote {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.reach(path);
        SystemFiles.read(path)
    }
    fn read_trusted(&self, path: &Path) -> Result<Vec<u8>, Distrust> {
        self.reach(path);
        SystemFiles.read_trusted(path)
    }
    fn trusted(&self, dir: &Path) -> Result<(), Distrust> {
        self.reach(dir);
        SystemFiles.trusted(dir)
    }
    fn write_durably(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.reach(path);
        SystemFiles.write_durably(path, bytes)
    }
    fn touch(&self, path: &Path) -> io::Result<()> {
        self.reach(path);
        SystemFiles.touch(path)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.reach(path);
        SystemFiles.remove(path)
    }
    fn list(&self, path: &Path) -> io::Result<Vec<PathBuf>> {
        self.reach(path);
        SystemFiles.list(path)
    }
    fn is_there(&self, path: &Path) -> bool {
        self.reach(path);
        SystemFiles.is_there(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.reach(from);
        SystemFiles.rename(from, to)
    }
    fn sync(&self, file: &Path) -> io::Result<()> {
        self.reach(file);
        SystemFiles.sync(file)
    }
    fn remove_all(&self, dir: &Path) -> io::Result<()> {
        self.reach(dir);
        SystemFiles.remove_all(dir)
    }
    fn make_directory(&self, dir: &Path, whose: Directory<'_>) -> io::Result<()> {
        self.reach(dir);
        SystemFiles.make_directory(dir, whose)
    }
    fn give(&self, file: &Path, qemu_user: &str) -> io::Result<()> {
        self.reach(file);
        SystemFiles.give(file, qemu_user)
    }
}

pub struct Bench {
    pub files: Arc<Remote>,
    pub dir: tempfile::TempDir,
    pub slurm: Arc<FakeSlurm>,
    pub node: Arc<Node>,
    pub ledger: Arc<Gate>,
    guests: Mutex<Vec<Child>>,
    _company: Company,
}

impl Bench {
    pub fn new() -> Self {
        Self::in_company(Company::Others(ALONE.read().unwrap_or_else(PoisonError::into_inner)))
    }

    /// While no other test runs.
    pub fn alone() -> Self {
        Self::in_company(Company::Nobody(ALONE.write().unwrap_or_else(PoisonError::into_inner)))
    }

    fn in_company(company: Company) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "clients of other users need root");
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(dir.path().join("kernel"), "none").unwrap();
        let text = format!(
            "[hypervisor]\ndomain_type = \"qemu\"\n[images.tiny]\nkernel = \"{}\"\n",
            dir.path().join("kernel").display()
        );
        let mut config = Config::parse(&text, Path::new("slurm-vm.toml")).unwrap();
        config.node_name = Some("n1".into());
        config.state_dir = dir.path().join("state");
        config.run_dir = dir.path().join("run");
        config.shared_dir = Some(dir.path().join("shared"));
        config.socket = dir.path().join("agent/agent.sock");
        fs::create_dir_all(config.run_dir.join("jobs")).unwrap();
        fs::create_dir_all(config.run_dir.join("vm")).unwrap();
        let slurm = Arc::new(FakeSlurm::with_nodes(1));
        slurm.tick(1);
        let ledger = Arc::new(Gate {
            inner: DirStore::new(&config.state_dir).unwrap(),
            shut: Mutex::new(false),
            opened: Condvar::new(),
            waiting: Mutex::new(0),
        });
        let files = Arc::new(Remote::default());
        let world = World {
            clock: Arc::new(SystemClock),
            store: ledger.clone(),
            files: files.clone(),
            disks: Arc::new(QemuImg::default()),
            hypervisor: Arc::new(fake::World::new().node("n1")),
            slurm: slurm.clone(),
            as_user: Arc::new(slurm_vm::effects::MemoryAsUser::default()),
        };
        let listener = server::bind(&config.socket).unwrap();
        let node = Node::new(Arc::new(config), world, Arc::new(Alone));
        let roles = Roles {
            node: Some(node.clone()),
            controller: None,
            operators: vec![],
        };
        thread::spawn(move || server::serve(&listener, &roles));
        Self {
            files,
            dir,
            slurm,
            node,
            ledger,
            guests: Mutex::default(),
            _company: company,
        }
    }

    pub fn socket(&self) -> &Path {
        &self.node.config.socket
    }

    /// A job of this user that Slurm's model runs here.
    pub fn job(&self, uid: u32) -> u32 {
        let job = self.slurm.submit(FakeJob {
            uid,
            user: uid.to_string(),
            ..FakeJob::default()
        });
        self.slurm.tick(1);
        job
    }

    /// One of root's hooks.
    pub fn hook(&self, hook: HookRequest) -> HookReply {
        let line = self.line(&hooks::to_line(&HookMessage::new(hook)));
        hooks::reply_from_line(&line).unwrap_or_else(|e| panic!("{line}: {e}"))
    }

    pub fn prolog(&self, job: u32, uid: u32, gid: u32) -> HookReply {
        self.hook(HookRequest::Ensure {
            job,
            uid,
            gid,
            spec: VmSpec::for_image("tiny").unwrap(),
            restart: 0,
        })
    }

    /// As root: a line and its answer's first line.
    pub fn line(&self, line: &str) -> String {
        let mut stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        let mut reply = String::new();
        BufReader::new(&stream).read_line(&mut reply).unwrap();
        reply
    }

    /// Boots the guest of a job whose domain the agent has started.
    pub fn guest(&self, job: u32) {
        let run = self.dir.path().join("run/vm").join(format!("slurm-{job}-0"));
        wait("the directory of the guest's socket", || run.is_dir().then_some(()));
        let own = self.dir.path().join(format!("guest-{job}"));
        fs::create_dir_all(&own).unwrap();
        fs::set_permissions(&own, fs::Permissions::from_mode(0o755)).unwrap();
        let helper = Path::new(env!("CARGO_BIN_EXE_svm")).with_file_name("slurm-vm-guest");
        let child = Command::new(helper)
            .args(["--socket".as_ref(), run.join("guest.sock").as_os_str()])
            .args(["--run-dir".as_ref(), own.join("run").as_os_str()])
            .args(["--passwd".as_ref(), own.join("passwd").as_os_str()])
            .spawn()
            .expect("the guest helper, made by cargo build --workspace");
        self.guests.lock().unwrap().push(child);
    }

    /// A process of that user with a connection to the agent.
    pub fn client(&self, uid: u32) -> Client {
        let mut child = self
            .perl(uid, &["relay"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Client {
            stdin: child.stdin.take(),
            stdout: child.stdout.take(),
            child,
        }
    }

    /// The program that plays clients of that user.
    pub fn perl(&self, uid: u32, how: &[&str]) -> Command {
        let script = self.dir.path().join("client.pl");
        fs::write(&script, include_str!("client.pl")).unwrap();
        let mut command = Command::new("sh");
        command
            .args(["-c", "ulimit -n 8192; exec perl \"$0\" \"$@\""])
            .arg(script)
            .arg(uid.to_string())
            .arg(self.socket())
            .args(how);
        command
    }

    /// A session of that user's shim: opened, with this program.
    pub fn session(&self, uid: u32, open: Open, program: &str) -> Client {
        let mut client = self.client(uid);
        client.say(&[OPENING]);
        client.send(&Frame::Environment(b"PATH=/usr/bin:/bin\0".to_vec()));
        client.send(&Frame::Arguments(format!("/bin/sh\0-c\0{program}\0").into_bytes()));
        client.send(&Frame::Control(ToAgent::Open(Box::new(open))));
        client
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.ledger.shut(false);
        for mut guest in self.guests.lock().unwrap().drain(..) {
            let _ = guest.kill();
            let _ = guest.wait();
        }
    }
}

/// What an honest shim of that user asks.
pub fn open(job: u32, uid: u32) -> Open {
    let sink = Sink {
        regular: false,
        dev: 0,
        ino: 0,
        base: 0,
        end: None,
    };
    Open {
        version: VERSION,
        job,
        step: BATCH_STEP,
        task: 0,
        restart: 0,
        kind: StepKind::Batch,
        spec: VmSpec::for_image("tiny").unwrap(),
        cwd: "/".into(),
        umask: 0o22,
        groups: vec![uid],
        user: UserEntry {
            name: uid.to_string(),
            uid,
            gid: uid,
            home: "/".into(),
            shell: "/bin/sh".into(),
        },
        rlimits: vec![],
        terminal: None,
        merge_stderr: false,
        stdout: sink.clone(),
        stderr: sink,
        resume: vec![],
    }
}

/// A connection of a user's process.
pub struct Client {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Option<ChildStdout>,
}

impl Client {
    /// False once nobody takes it any more.
    pub fn say(&mut self, bytes: &[u8]) -> bool {
        self.stdin
            .as_mut()
            .is_some_and(|s| s.write_all(bytes).and_then(|()| s.flush()).is_ok())
    }

    pub fn send(&mut self, frame: &Frame<ToAgent>) -> bool {
        let mut wire = Vec::new();
        write_frame(&mut wire, frame).unwrap();
        self.say(&wire)
    }

    /// The next frame; `None` once the agent has closed.
    pub fn next(&mut self) -> Option<Frame<ToShim>> {
        read_frame(self.stdout.as_mut().expect("not read elsewhere")).unwrap_or_else(|e| panic!("what the agent sends: {e}"))
    }

    /// All frames until the agent closes or the time is over, which is said.
    pub fn rest(mut self, within: Duration) -> (Vec<Frame<ToShim>>, bool) {
        let (out, frames) = std::sync::mpsc::channel();
        let mut stdout = self.stdout.take().expect("not read elsewhere");
        thread::spawn(move || {
            while let Ok(Some(frame)) = read_frame::<ToShim>(&mut stdout) {
                if out.send(frame).is_err() {
                    return;
                }
            }
        });
        let until = Instant::now() + within;
        let mut all = Vec::new();
        loop {
            match frames.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(frame) => all.push(frame),
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return (all, true),
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => return (all, false),
            }
        }
    }

    /// Reads output of stdout until it ends with this text.
    pub fn read_until(&mut self, text: &str) -> String {
        let mut output = Vec::new();
        while !String::from_utf8_lossy(&output).ends_with(text) {
            match self.next() {
                Some(Frame::Data { bytes, .. }) => output.extend(bytes),
                Some(Frame::Control(ToShim::Failed { why, .. })) => panic!("{why}"),
                Some(Frame::Control(ToShim::Exited(how))) => panic!("{how:?} after {}", String::from_utf8_lossy(&output)),
                Some(_) => {}
                None => panic!("the agent closed after {}", String::from_utf8_lossy(&output)),
            }
        }
        String::from_utf8(output).unwrap()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stdin = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Looks again and again until there is an answer.
pub fn wait<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        let late = Instant::now() > end;
        if let Some(found) = look() {
            return found;
        }
        assert!(!late, "still waiting after {} s: {what}", DEADLINE.as_secs());
        thread::sleep(Duration::from_millis(20));
    }
}

/// Memory of this process that is really there, in bytes.
pub fn resident() -> u64 {
    let text = fs::read_to_string("/proc/self/statm").unwrap();
    text.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}
