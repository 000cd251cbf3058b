//! What the agent does on the host in the name of a job's user: with that user's uid, gid and groups, and no more rights than those.
//!
//! Directories of the host reach a guest through virtiofsd, one process for each, which the agent starts and the user owns: what the guest
//! may do in them is what the user may. The agent binds the socket, so that nobody but QEMU's user can connect to it, and hands the
//! listening descriptor over. The agent owns the processes, not the job's cgroup: the VM reaches a node before its job, and its QEMU is
//! not in that cgroup either. They outlive the agent, end with their QEMU, and the VM's end looks that they are gone.
//!
//! Whether a directory here is the one that another node calls by the same name is shown by a mark: a file that the user made there, and
//! can read here. Paths say nothing; every node has a `/tmp`. Where the user may not write, the directory's own inode and time of change
//! are compared, and a doubt counts as a no.
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt, FileTypeExt, MetadataExt, chown, lchown},
            net::UnixListener,
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use thiserror::Error;

use super::private;
use crate::core::directories::Mark;

/// How long virtiofsd may take to begin.
const BEGINS_WITHIN: Duration = Duration::from_secs(10);
/// How long a process may take to be gone after SIGKILL.
const GONE_WITHIN: Duration = Duration::from_secs(5);
/// Seconds that a look at a user's directory may take: a file server that is away holds up this VM's worker, and only for so long.
const LOOK_WITHIN_S: &str = "10";
/// Between two looks at a process.
const PAUSE: Duration = Duration::from_millis(5);
/// What virtiofsd says when it can be connected to.
const READY: &str = "Waiting for vhost-user socket connection";
/// What passt says when it can be connected to.
const PASST_READY: &str = "You can start qemu";
/// Bytes that a companion's log may have at a look.
const LONGEST_LOG: u64 = 1 << 20;
/// Name of a mark's file before the VM's own part.
const MARK: &str = ".slurm-vm-same-";

/// Whose rights are used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The user.
    pub uid: u32,
    /// The job's group.
    pub gid: u32,
    /// The supplementary groups.
    pub groups: Vec<u32>,
}

/// A virtiofsd to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectoryServer {
    /// Whose rights it has.
    pub who: Identity,
    /// The program.
    pub program: PathBuf,
    /// The directory that it serves.
    pub source: PathBuf,
    /// The guest may not write.
    pub readonly: bool,
    /// Where QEMU connects; its directory is QEMU's user's alone.
    pub socket: PathBuf,
    /// QEMU's user.
    pub qemu_user: String,
    /// Root's directory, for its process id and what it says: what stands in the socket's could be QEMU's.
    pub notes: PathBuf,
    /// The guest comes from a save: a file that was open and is gone gives the guest an error (EIO), for there is no source to go back to.
    pub restores: bool,
}

/// A passt to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkServer {
    /// Whose rights it has.
    pub who: Identity,
    /// The program.
    pub program: PathBuf,
    /// Where QEMU connects; its directory is QEMU's user's alone.
    pub socket: PathBuf,
    /// QEMU's user.
    pub qemu_user: String,
    /// Root's directory, for its process id and what it says.
    pub notes: PathBuf,
}

/// A directory cannot be used in a user's name.
#[derive(Debug, Error)]
pub enum AsUserError {
    /// The user's directory is at fault: it is not there, or the user may not enter it.
    #[error("{}: {why}", dir.display())]
    Directory {
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        why: String,
    },
    /// The node is at fault.
    #[error("{what}: {why}")]
    Node {
        /// With what.
        what: String,
        /// What failed.
        why: String,
    },
}

impl AsUserError {
    fn node(what: impl fmt::Display, why: impl fmt::Display) -> Self {
        Self::Node {
            what: what.to_string(),
            why: why.to_string(),
        }
    }
}

/// Acts of the agent with a user's rights. Calls block; made from worker threads.
pub trait AsUser: Send + Sync + fmt::Debug {
    /// Starts a virtiofsd and returns when QEMU can connect. One with this socket that still runs is ended first.
    ///
    /// # Errors
    /// [`AsUserError::Directory`] when it says that it cannot serve the directory.
    fn serve(&self, server: &DirectoryServer) -> Result<(), AsUserError>;
    /// Starts a passt and returns when QEMU can connect. One with this socket that still runs is ended first.
    ///
    /// # Errors
    /// [`AsUserError::Node`]
    fn serve_network(&self, server: &NetworkServer) -> Result<(), AsUserError>;
    /// Ends all whose notes are in this directory, and removes those; none is no error.
    ///
    /// # Errors
    /// One that does not end.
    fn end_servers(&self, dir: &Path) -> Result<(), AsUserError>;
    /// The servers with notes in this directory that have ended by themselves: the names of their sockets, without the ending. Logs that have
    /// grown too long are emptied.
    ///
    /// # Errors
    /// When the notes cannot be read.
    fn ended_servers(&self, dir: &Path) -> Result<Vec<String>, AsUserError>;
    /// What the servers with notes in this directory have complained of, oldest first: the name of the socket without the ending, and
    /// the line.
    ///
    /// # Errors
    /// When the notes cannot be read.
    fn complaints(&self, dir: &Path) -> Result<Vec<(String, String)>, AsUserError>;
    /// Whether the user can enter a directory.
    ///
    /// # Errors
    /// [`AsUserError::Directory`] says why not.
    fn look(&self, who: &Identity, dir: &Path) -> Result<(), AsUserError>;
    /// Marks a directory, so that another node can tell whether it sees the same one: `name` is the VM's, `nonce` this mark's. An earlier
    /// mark of the VM is replaced.
    ///
    /// # Errors
    /// When it cannot even be looked at.
    fn mark(&self, who: &Identity, dir: &Path, name: &str, nonce: &str) -> Result<Mark, AsUserError>;
    /// Whether the directory here is the one that was marked.
    ///
    /// # Errors
    /// When it cannot be looked at here.
    fn is_marked(&self, who: &Identity, dir: &Path, name: &str, mark: &Mark) -> Result<bool, AsUserError>;
    /// Removes a VM's mark; none is no error.
    ///
    /// # Errors
    /// When it cannot be removed now.
    fn unmark(&self, who: &Identity, dir: &Path, name: &str) -> Result<(), AsUserError>;
}

/// The real ones, by setpriv(1) of util-linux and the tools of coreutils.
#[derive(Debug, Default)]
pub struct SystemAsUser;

/// A command with a user's rights and nothing of the agent's environment.
fn command(who: &Identity, program: &Path) -> Command {
    let list = |ids: &[u32]| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let mut command = Command::new("setpriv");
    command
        .env_clear()
        .envs([("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), ("LC_ALL", "C")])
        .arg(format!("--reuid={}", who.uid))
        .arg(format!("--regid={}", who.gid));
    if who.groups.is_empty() {
        command.arg("--clear-groups");
    } else {
        command.arg(format!("--groups={}", list(&who.groups)));
    }
    command
        .args(["--no-new-privs", "--inh-caps=-all", "--"])
        .arg(program)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// Runs a tool to its end, within bounds. What it printed, or the last line of its complaint.
fn run(who: &Identity, arguments: &[&str]) -> io::Result<Result<String, String>> {
    let mut command = command(who, Path::new("timeout"));
    let output = command
        .args(["-k", "2", LOOK_WITHIN_S])
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .output()?;
    if output.status.success() {
        return Ok(Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()));
    }
    if matches!(output.status.code(), Some(124 | 137)) {
        return Ok(Err(format!("no answer within {LOOK_WITHIN_S} s")));
    }
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let last = said.lines().last().unwrap_or_default();
    // `stat: cannot statx '/x/.': Permission denied`
    Ok(Err(last.rsplit(": ").next().unwrap_or(last).to_owned()))
}

fn in_directory(who: &Identity, dir: &Path, arguments: &[&str]) -> Result<String, AsUserError> {
    let done = run(who, arguments).map_err(|e| AsUserError::node("setpriv", e))?;
    done.map_err(|why| AsUserError::Directory { dir: dir.into(), why })
}

/// Inode and time of change.
fn appearance(who: &Identity, dir: &Path) -> Result<String, AsUserError> {
    in_directory(who, dir, &["stat", "-c", "%i %.9Z", &format!("{}/.", dir.display())])
}

fn mark_path(dir: &Path, name: &str) -> String {
    format!("{}/{MARK}{name}", dir.display())
}

impl AsUser for SystemAsUser {
    fn serve(&self, server: &DirectoryServer) -> Result<(), AsUserError> {
        let (notes, said) = Notes::fresh(&server.program, &server.notes, &server.socket)?;
        let listener = listen(&server.socket, &server.qemu_user).map_err(at(&server.socket))?;
        let mut command = command(&server.who, &server.program);
        // Standard input is how a descriptor is passed without unsafe code.
        command
            .arg("--fd=0")
            .arg(format!("--shared-dir={}", server.source.display()))
            .args([
                "--sandbox=namespace",
                "--cache=auto",
                "--inode-file-handles=never",
                "--announce-submounts",
            ])
            .args(server.readonly.then_some("--readonly"))
            .args(server.restores.then_some("--migration-on-error=guest-error"))
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stderr(Stdio::from(said));
        match launch(command, &notes, READY)? {
            None => Ok(()),
            Some(why) => Err(AsUserError::Directory {
                dir: server.source.clone(),
                why: format!("virtiofsd: {why}"),
            }),
        }
    }

    fn serve_network(&self, server: &NetworkServer) -> Result<(), AsUserError> {
        let (notes, said) = Notes::fresh(&server.program, &server.notes, &server.socket)?;
        let dir = server.socket.parent().unwrap_or(Path::new("/")).with_extension("passt");
        remove_directory(&dir)
            .and_then(|()| fs::DirBuilder::new().mode(0o700).create(&dir))
            .map_err(at(&dir))?;
        chown(&dir, Some(server.who.uid), Some(server.who.gid)).map_err(at(&dir))?;
        let theirs = dir.join("s");
        let mut command = command(&server.who, &server.program);
        // IPv4 with addresses of our own, the same on every node; names through passt, whatever resolver the node has; no way to the
        // node's loopback; nothing listens on the node for the guest; open connections are not taken along, which would need root.
        command
            .args(["--foreground", "--vhost-user", "--one-off", "--repair-path", "none", "--socket"])
            .arg(&theirs)
            .args(["--ipv4-only", "--no-map-gw", "--tcp-ports", "none", "--udp-ports", "none"])
            .args(["--address", "10.0.2.15", "--netmask", "255.255.255.0", "--gateway", "10.0.2.2"])
            .args(["--dns-forward", "10.0.2.3", "--dns", "10.0.2.3"])
            .stderr(Stdio::from(said));
        let begun = launch(command, &notes, PASST_READY)?;
        let moved = match begun {
            Some(why) => Err(AsUserError::node("passt", why)),
            None => take_socket(&theirs, server).map_err(at(&server.socket)),
        };
        let _ = remove_directory(&dir);
        if moved.is_err() {
            end(&notes.pid)?;
        }
        moved
    }

    fn end_servers(&self, dir: &Path) -> Result<(), AsUserError> {
        pid_notes(dir)?.iter().try_for_each(|file| end(file))
    }

    fn ended_servers(&self, dir: &Path) -> Result<Vec<String>, AsUserError> {
        let mut ended = Vec::new();
        for file in pid_notes(dir)? {
            shorten(&file.with_extension("log"));
            if running(&file)?.is_none() {
                ended.push(file.file_stem().unwrap_or_default().to_string_lossy().into_owned());
            }
        }
        Ok(ended)
    }

    fn complaints(&self, dir: &Path) -> Result<Vec<(String, String)>, AsUserError> {
        let mut all = Vec::new();
        for file in pid_notes(dir)? {
            let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let said = fs::read(file.with_extension("log")).unwrap_or_default();
            let said = String::from_utf8_lossy(&said).into_owned();
            // `[TIME ERROR virtiofsd::MODULE] TEXT`
            let complaint = |line: &str| Some(line.split_once(" ERROR ")?.1.split_once("] ")?.1.to_owned());
            all.extend(said.lines().filter_map(complaint).map(|line| (name.clone(), line)));
        }
        Ok(all)
    }

    fn look(&self, who: &Identity, dir: &Path) -> Result<(), AsUserError> {
        in_directory(who, dir, &["stat", "-c", "%F", &format!("{}/.", dir.display())]).map(drop)
    }

    fn mark(&self, who: &Identity, dir: &Path, name: &str, nonce: &str) -> Result<Mark, AsUserError> {
        let path = mark_path(dir, name);
        // Made anew and never through a link: in a directory of several users somebody else may have put one there.
        let script = "umask 077 && rm -f \"$1\" && set -C && echo \"$2\" > \"$1\"";
        let made = run(who, &["sh", "-c", script, "sh", &path, nonce]);
        let made = made.map_err(|e| AsUserError::node("setpriv", e))?;
        Ok(Mark {
            nonce: made.is_ok().then(|| nonce.to_owned()),
            look: appearance(who, dir)?,
        })
    }

    fn is_marked(&self, who: &Identity, dir: &Path, name: &str, mark: &Mark) -> Result<bool, AsUserError> {
        let Some(nonce) = &mark.nonce else {
            return Ok(appearance(who, dir)? == mark.look);
        };
        self.look(who, dir)?;
        let read = run(who, &["cat", &mark_path(dir, name)]).map_err(|e| AsUserError::node("setpriv", e))?;
        Ok(read.is_ok_and(|text| text == *nonce))
    }

    fn unmark(&self, who: &Identity, dir: &Path, name: &str) -> Result<(), AsUserError> {
        in_directory(who, dir, &["rm", "-f", &mark_path(dir, name)]).map(drop)
    }
}

fn group(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).unwrap_or(i32::MAX))
}

/// What is noted of a server: it is known by the name of its socket.
struct Notes {
    pid: PathBuf,
    log: PathBuf,
}

impl Notes {
    /// Those of a server that is about to start, and where its words go. One of that name that still runs is ended; a program that is not
    /// there is the node's fault.
    fn fresh(program: &Path, dir: &Path, socket: &Path) -> Result<(Self, fs::File), AsUserError> {
        fs::metadata(program).map_err(at(program))?;
        let name = dir.join(socket.file_name().unwrap_or_default());
        let notes = Self {
            pid: name.with_extension("pid"),
            log: name.with_extension("log"),
        };
        end(&notes.pid)?;
        let said = fresh_log(&notes.log).map_err(at(&notes.log))?;
        Ok((notes, said))
    }
}

/// The node's fault, with this file.
fn at(what: &Path) -> impl FnOnce(io::Error) -> AsUserError + use<> {
    let what = what.display().to_string();
    move |e| AsUserError::node(what, e)
}

/// Appended to, so that it can be made shorter while it is written to.
fn fresh_log(log: &Path) -> io::Result<fs::File> {
    let file = fs::File::options().create(true).append(true).open(log)?;
    file.set_len(0)?;
    Ok(file)
}

/// Empties a log that has grown too long: what a guest asks for may be complained of without end, beside the ledger.
fn shorten(log: &Path) {
    if fs::metadata(log).is_ok_and(|m| m.len() > LONGEST_LOG)
        && let Err(e) = fs::File::options().append(true).open(log).and_then(|f| f.set_len(0))
    {
        log::warn!("{}: {e}", log.display());
    }
}

/// A socket that QEMU's user alone can connect to.
fn listen(socket: &Path, qemu_user: &str) -> io::Result<UnixListener> {
    let _ = fs::remove_file(socket);
    let listener = UnixListener::bind(socket)?;
    let qemu = private::qemu(qemu_user)?;
    // Past no link that somebody else's QEMU could have put there.
    lchown(socket, Some(qemu.uid.as_raw()), Some(qemu.gid.as_raw()))?;
    Ok(listener)
}

/// Takes the socket from its user's directory to QEMU's, so that nobody else finds it.
fn take_socket(theirs: &Path, server: &NetworkServer) -> io::Result<()> {
    let _ = fs::remove_file(&server.socket);
    let is_theirs = |m: &fs::Metadata| m.file_type().is_socket() && m.uid() == server.who.uid;
    fs::rename(theirs, &server.socket)?;
    // Looked at where the user can exchange it no more.
    if !fs::symlink_metadata(&server.socket).is_ok_and(|m| is_theirs(&m)) {
        let _ = fs::remove_file(&server.socket);
        return Err(io::Error::other("it is not the socket that passt has made"));
    }
    let qemu = private::qemu(&server.qemu_user)?;
    lchown(&server.socket, Some(qemu.uid.as_raw()), Some(qemu.gid.as_raw()))
}

fn remove_directory(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// When a process began, in the kernel's ticks: with its number it names one process for good. None once it is gone.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything. The 3rd field follows it, the 22nd is the time.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

fn note_pid(file: &Path, pid: u32) -> Result<(), AsUserError> {
    let began = start_time(pid).ok_or_else(|| AsUserError::node("companion", "it ended at once"))?;
    fs::write(file, format!("{pid} {began}\n")).map_err(|e| AsUserError::node(file.display(), e))
}

/// The pid files in a directory; none where there is no directory.
fn pid_notes(dir: &Path) -> Result<Vec<PathBuf>, AsUserError> {
    match fs::read_dir(dir) {
        Ok(entries) => Ok(entries
            .flatten()
            .map(|e| e.path())
            .filter(|p| p.extension().is_some_and(|x| x == "pid"))
            .collect()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(vec![]),
        Err(e) => Err(AsUserError::node(dir.display(), e)),
    }
}

/// The process of a pid file, if it still is that process.
fn running(file: &Path) -> Result<Option<u32>, AsUserError> {
    let text = match fs::read_to_string(file) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(AsUserError::node(file.display(), e)),
    };
    let mut words = text.split_whitespace();
    let pid = words.next().and_then(|w| w.parse().ok());
    let began = words.next().and_then(|w| w.parse::<u64>().ok());
    Ok(pid.filter(|pid| began.is_some() && start_time(*pid) == began))
}

/// Ends the process of a pid file, if it is still that process, and removes the file and what the process said.
fn end(file: &Path) -> Result<(), AsUserError> {
    let until = Instant::now() + GONE_WITHIN;
    while let Some(pid) = running(file)? {
        match killpg(group(pid), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(e) => return Err(AsUserError::node(format!("process {pid}"), e)),
        }
        if Instant::now() > until {
            return Err(AsUserError::node(format!("process {pid}"), "it does not end"));
        }
        thread::sleep(PAUSE);
    }
    let _ = fs::remove_file(file.with_extension("log"));
    let _ = fs::remove_file(file);
    Ok(())
}

/// Starts a server and waits until it says that it is ready; else why it is not.
fn launch(mut command: Command, notes: &Notes, ready: &str) -> Result<Option<String>, AsUserError> {
    let mut child = command.process_group(0).spawn().map_err(|e| AsUserError::node("setpriv", e))?;
    let pid = child.id();
    let begun = note_pid(&notes.pid, pid).and_then(|()| until_ready(&mut child, &notes.log, ready));
    if !matches!(begun, Ok(None)) {
        let _ = killpg(group(pid), Signal::SIGKILL);
    }
    // It ends with its QEMU, and somebody has to take note of that.
    let waits = thread::Builder::new().name(format!("companion-{pid}")).spawn(move || child.wait());
    waits.map_err(|e| AsUserError::node("thread", e))?;
    begun
}

fn until_ready(child: &mut Child, log: &Path, ready: &str) -> Result<Option<String>, AsUserError> {
    let until = Instant::now() + BEGINS_WITHIN;
    loop {
        let said = fs::read(log).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
        if said.contains(ready) {
            return Ok(None);
        }
        let ended = child.try_wait().map_err(|e| AsUserError::node("companion", e))?;
        if ended.is_some() || Instant::now() > until {
            let last = said.lines().last().unwrap_or("it said nothing");
            // `[2026-01-01T00:00:00Z ERROR virtiofsd] Error creating ...`
            return Ok(Some(last.split_once("] ").map_or(last, |(_, text)| text).to_owned()));
        }
        thread::sleep(PAUSE);
    }
}

/// A stand-in without processes, one for each node; they all see the same storage.
#[derive(Debug, Clone, Default)]
pub struct MemoryAsUser {
    node: String,
    held: Arc<Mutex<Memory>>,
}

#[derive(Debug, Default)]
struct Memory {
    /// Those that run: node, directory of their notes, socket.
    servers: BTreeSet<(String, PathBuf, PathBuf)>,
    /// What each mark says, by directory and name.
    marks: BTreeMap<(PathBuf, String), String>,
}

impl MemoryAsUser {
    fn held(&self) -> MutexGuard<'_, Memory> {
        self.held.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// That of another node.
    #[must_use]
    pub fn on(&self, node: &str) -> Self {
        Self {
            node: node.into(),
            held: Arc::clone(&self.held),
        }
    }

    /// A node's servers end with its power.
    pub fn power_off(&self, node: &str) {
        self.held().servers.retain(|(on, ..)| on != node);
    }

    /// Directories of the notes of those that run, with their nodes.
    #[must_use]
    pub fn running(&self) -> Vec<(String, PathBuf)> {
        self.held()
            .servers
            .iter()
            .map(|(node, notes, _)| (node.clone(), notes.clone()))
            .collect()
    }

    /// The marks that are there.
    #[must_use]
    pub fn marks(&self) -> Vec<(PathBuf, String)> {
        self.held().marks.keys().cloned().collect()
    }
}

impl AsUser for MemoryAsUser {
    fn serve(&self, server: &DirectoryServer) -> Result<(), AsUserError> {
        let server = (self.node.clone(), server.notes.clone(), server.socket.clone());
        self.held().servers.insert(server);
        Ok(())
    }

    fn end_servers(&self, dir: &Path) -> Result<(), AsUserError> {
        self.held().servers.retain(|(node, notes, _)| *node != self.node || notes != dir);
        Ok(())
    }

    fn serve_network(&self, server: &NetworkServer) -> Result<(), AsUserError> {
        let server = (self.node.clone(), server.notes.clone(), server.socket.clone());
        self.held().servers.insert(server);
        Ok(())
    }

    fn ended_servers(&self, _: &Path) -> Result<Vec<String>, AsUserError> {
        Ok(vec![])
    }

    fn complaints(&self, _: &Path) -> Result<Vec<(String, String)>, AsUserError> {
        Ok(vec![])
    }

    fn look(&self, _: &Identity, _: &Path) -> Result<(), AsUserError> {
        Ok(())
    }

    fn mark(&self, _: &Identity, dir: &Path, name: &str, nonce: &str) -> Result<Mark, AsUserError> {
        self.held().marks.insert((dir.into(), name.into()), nonce.into());
        Ok(Mark {
            nonce: Some(nonce.into()),
            look: String::new(),
        })
    }

    fn is_marked(&self, _: &Identity, dir: &Path, name: &str, mark: &Mark) -> Result<bool, AsUserError> {
        Ok(self.held().marks.get(&(dir.into(), name.into())) == mark.nonce.as_ref())
    }

    fn unmark(&self, _: &Identity, dir: &Path, name: &str) -> Result<(), AsUserError> {
        self.held().marks.remove(&(dir.into(), name.into()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn nobody() -> Identity {
        Identity {
            uid: 65534,
            gid: 65534,
            groups: vec![],
        }
    }

    /// A directory that nobody may enter.
    fn directory() -> Option<tempfile::TempDir> {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: needs root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Some(dir)
    }

    #[test]
    fn a_directory_is_the_same_where_its_mark_can_be_read_and_only_there() {
        let Some(dir) = directory() else { return };
        let (mine, other, closed) = (dir.path().join("mine"), dir.path().join("other"), dir.path().join("closed"));
        for (path, owner) in [(&mine, 65534), (&other, 65534), (&closed, 0)] {
            fs::create_dir(path).unwrap();
            chown(path, Some(owner), Some(owner)).unwrap();
        }
        let (who, system) = (nobody(), SystemAsUser);
        let is_marked = |dir: &Path, mark: &Mark| system.is_marked(&who, dir, "vm", mark).unwrap();
        let stale = system.mark(&who, &mine, "vm", "abc").unwrap();
        let mark = system.mark(&who, &mine, "vm", "def").unwrap();
        assert!(mark.nonce.is_some());
        assert!(is_marked(&mine, &mark) && !is_marked(&mine, &stale) && !is_marked(&other, &mark));
        system.unmark(&who, &mine, "vm").unwrap();
        assert_eq!(fs::read_dir(&mine).unwrap().count(), 0, "nothing is left");
        // A link that somebody else has put at its place is not followed.
        let precious = dir.path().join("precious");
        fs::write(&precious, "kept").unwrap();
        chown(&precious, Some(65534), Some(65534)).unwrap();
        std::os::unix::fs::symlink(&precious, mark_path(&mine, "vm")).unwrap();
        assert!(system.mark(&who, &mine, "vm", "ghi").unwrap().nonce.is_some());
        assert_eq!(fs::read_to_string(&precious).unwrap(), "kept");
        system.unmark(&who, &mine, "vm").unwrap();
        assert!(!is_marked(&mine, &mark));
        // Where the user cannot write.
        let mark = system.mark(&who, &closed, "vm", "abc").unwrap();
        assert_eq!(mark.nonce, None);
        assert!(is_marked(&closed, &mark) && !is_marked(&other, &mark));
    }

    #[test]
    fn what_a_user_cannot_enter_is_named_with_the_reason() {
        let Some(dir) = directory() else { return };
        let (secret, file) = (dir.path().join("secret"), dir.path().join("file"));
        fs::create_dir(&secret).unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(&file, "").unwrap();
        for (path, why) in [
            (&secret, "Permission denied"),
            (&file, "Not a directory"),
            (&dir.path().join("none"), "No such file or directory"),
        ] {
            let said = SystemAsUser.look(&nobody(), path).unwrap_err().to_string();
            assert_eq!(said, format!("{}: {why}", path.display()));
        }
        SystemAsUser.look(&nobody(), dir.path()).unwrap();
    }

    #[test]
    fn a_process_that_has_another_ones_number_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new("sleep").arg("60").process_group(0).spawn().unwrap();
        let file = dir.path().join("a.pid");
        fs::write(&file, format!("{} 1\n", child.id())).unwrap();
        end(&file).unwrap();
        assert!(child.try_wait().unwrap().is_none() && !file.exists());
        note_pid(&file, child.id()).unwrap();
        assert!(SystemAsUser.ended_servers(dir.path()).unwrap().is_empty());
        fs::write(
            dir.path().join("a.log"),
            "[2026-01-01T00:00:00Z INFO  virtiofsd] Client connected\n[2026-01-01T00:00:01Z ERROR virtiofsd::x::y] Inode 3: Inode deleted (/b)\n",
        )
        .unwrap();
        assert!(SystemAsUser.ended_servers(dir.path()).unwrap().is_empty(), "a short log stays");
        let complaints = SystemAsUser.complaints(dir.path()).unwrap();
        assert_eq!(complaints, [("a".to_owned(), "Inode 3: Inode deleted (/b)".to_owned())]);
        fs::write(dir.path().join("a.log"), vec![b'x'; 2 << 20]).unwrap();
        SystemAsUser.ended_servers(dir.path()).unwrap();
        assert_eq!(fs::metadata(dir.path().join("a.log")).unwrap().len(), 0);
        SystemAsUser.end_servers(dir.path()).unwrap();
        assert!(!child.wait().unwrap().success() && !file.exists());
    }
}
