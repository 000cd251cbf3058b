//! From a specification to a child: script file, passwd line, descriptors, limits.

use std::ffi::{CString, NulError};
use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::sys::statvfs::{FsFlags, statvfs};
use slurm_vm_api::guest::{ByteString, Limit, RING_BYTES, RING_LIMITS, Refusal, StartSpec, Stdio, Stream, UserLine};

use crate::mounts;
use crate::program::{Input, Output, Program, pipe};
use crate::spawn::{self, Prepared};

/// How long another program may hold the passwd file.
const LOCK_WITHIN: Duration = Duration::from_secs(5);

/// Where things are in this guest.
#[derive(Debug, Clone)]
pub struct Places {
    /// Directory for scripts.
    pub run_dir: PathBuf,
    /// Directory for scripts when the first cannot execute files.
    pub fallback_dir: PathBuf,
    /// The passwd file to add users to, if any.
    pub passwd: Option<PathBuf>,
}

/// Why a program was not started.
#[derive(Debug)]
pub struct Refused {
    /// For the host's code.
    pub reason: Refusal,
    /// For a person.
    pub message: String,
}

impl Refused {
    fn spec(message: impl Into<String>) -> Self {
        Self {
            reason: Refusal::Spec,
            message: message.into(),
        }
    }

    fn failed(what: &str, error: &io::Error) -> Self {
        Self {
            reason: Refusal::Failed,
            message: format!("{what}: {error}"),
        }
    }
}

impl From<NulError> for Refused {
    fn from(_: NulError) -> Self {
        Self::spec("a string has a zero byte in it")
    }
}

/// Starts the program.
pub fn start(places: &Places, id: u32, mut spec: StartSpec, script: Option<&[u8]>) -> Result<Program, Refused> {
    if spec.argv.is_empty() {
        return Err(Refused::spec("no arguments"));
    }
    if let (Some(passwd), Some(user)) = (&places.passwd, &spec.user) {
        // A guest with a read-only or foreign passwd file still runs the program, by number.
        let _ = add_user(passwd, user, spec.uid, spec.gid);
    }
    for mount in &spec.mounts {
        mounts::ensure(mount).map_err(|error| Refused {
            reason: Refusal::Failed,
            message: format!("the guest cannot mount {}: {error}", mount.target.0.escape_ascii()),
        })?;
    }
    let mut script_path = None;
    if let Some(script) = script {
        let path = write_script(places, id, script, spec.uid, spec.gid).map_err(|error| Refused::failed("script file", &error))?;
        let path = path.to_string_lossy().into_owned();
        spec.argv[0] = path.clone().into();
        script_path = Some(path);
    }
    if let Stdio::Pty { term: Some(term), .. } = &spec.stdio
        && !spec.env.iter().any(|entry| entry.0.starts_with(b"TERM="))
    {
        spec.env.push(format!("TERM={term}").into());
    }
    let (limits, limit_names, unknown_limits) = limits(&spec.limits);
    let paths = candidates(&spec.argv[0].0, &spec.env);
    let ring_bytes = spec
        .ring_bytes
        .unwrap_or(RING_BYTES)
        .clamp(*RING_LIMITS.start(), *RING_LIMITS.end());
    let (stdio, ours) = descriptors(&spec.stdio, ring_bytes).map_err(|error| Refused::failed("standard streams", &error))?;
    let prepared = Prepared {
        paths: strings(paths.into_iter())?,
        argv: strings(spec.argv.into_iter().map(|s| s.0))?,
        env: strings(spec.env.into_iter().map(|s| s.0))?,
        cwd: CString::new(spec.cwd.0)?,
        cwd_required: spec.cwd_required,
        wait_network: spec.wait_network,
        uid: spec.uid,
        gid: spec.gid,
        groups: spec.groups,
        umask: spec.umask,
        limits,
        terminal: ours.terminal.is_some(),
        stdio,
    };
    let (pid, notes) = spawn::spawn(&prepared).map_err(|error| Refused::failed("fork", &error))?;
    let mut program = Program::new(pid, notes, ours.outputs, ours.input, ours.terminal);
    program.limit_names = limit_names;
    program.report.limits_refused = unknown_limits;
    program.report.script_path = script_path;
    Ok(program)
}

/// Removes what a start left in the file system.
pub fn clean(places: &Places, id: u32) {
    for dir in [&places.run_dir, &places.fallback_dir] {
        let _ = fs::remove_dir_all(dir.join(format!("job{id}")));
    }
}

fn strings(bytes: impl Iterator<Item = Vec<u8>>) -> Result<Vec<CString>, NulError> {
    bytes.map(CString::new).collect()
}

/// The paths to try for a first argument, as a shell does.
fn candidates(name: &[u8], env: &[ByteString]) -> Vec<Vec<u8>> {
    if name.contains(&b'/') || name.is_empty() {
        return vec![name.to_vec()];
    }
    let path = env
        .iter()
        .find_map(|entry| entry.0.strip_prefix(b"PATH="))
        .unwrap_or(b"/usr/local/bin:/usr/bin:/bin");
    path.split(|byte| *byte == b':')
        .map(|dir| if dir.is_empty() { b"." } else { dir })
        .map(|dir| [dir, b"/", name].concat())
        .collect()
}

struct Ours {
    outputs: Vec<Output>,
    input: Input,
    terminal: Option<OwnedFd>,
}

fn descriptors(stdio: &Stdio, ring_bytes: u32) -> io::Result<([OwnedFd; 3], Ours)> {
    match stdio {
        Stdio::Pipes { merge_stderr, stdin } => {
            let (child_in, input) = if *stdin {
                let (reader, writer) = pipe(false)?;
                (reader, Input::new(writer, false))
            } else {
                (
                    open(c"/dev/null", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?,
                    Input::default(),
                )
            };
            let (out_reader, child_out) = pipe(true)?;
            let mut outputs = vec![Output::new(Stream::Stdout, out_reader, ring_bytes, false)];
            let child_err = if *merge_stderr {
                child_out.try_clone()?
            } else {
                let (err_reader, child_err) = pipe(true)?;
                outputs.push(Output::new(Stream::Stderr, err_reader, ring_bytes, false));
                child_err
            };
            Ok((
                [child_in, child_out, child_err],
                Ours {
                    outputs,
                    input,
                    terminal: None,
                },
            ))
        }
        Stdio::Pty { rows, cols, .. } => {
            let (master, slave) = spawn::open_terminal(*rows, *cols)?;
            let outputs = vec![Output::new(Stream::Stdout, master.try_clone()?, ring_bytes, true)];
            let input = Input::new(master.try_clone()?, true);
            Ok((
                [slave.try_clone()?, slave.try_clone()?, slave],
                Ours {
                    outputs,
                    input,
                    terminal: Some(master),
                },
            ))
        }
    }
}

/// Linux numbers of the limits by Slurm's names.
const LIMITS: [(&str, u32); 15] = [
    ("CPU", libc::RLIMIT_CPU),
    ("FSIZE", libc::RLIMIT_FSIZE),
    ("DATA", libc::RLIMIT_DATA),
    ("STACK", libc::RLIMIT_STACK),
    ("CORE", libc::RLIMIT_CORE),
    ("RSS", libc::RLIMIT_RSS),
    ("NPROC", libc::RLIMIT_NPROC),
    ("NOFILE", libc::RLIMIT_NOFILE),
    ("MEMLOCK", libc::RLIMIT_MEMLOCK),
    ("AS", libc::RLIMIT_AS),
    ("SIGPENDING", libc::RLIMIT_SIGPENDING),
    ("MSGQUEUE", libc::RLIMIT_MSGQUEUE),
    ("NICE", libc::RLIMIT_NICE),
    ("RTPRIO", libc::RLIMIT_RTPRIO),
    ("RTTIME", libc::RLIMIT_RTTIME),
];

type Limits = (Vec<(u32, u64, u64)>, Vec<String>, Vec<String>);

/// Limits to set with their names, and the names that are not known.
fn limits(wanted: &[Limit]) -> Limits {
    let (mut limits, mut names, mut unknown) = (Vec::new(), Vec::new(), Vec::new());
    for limit in wanted {
        let Some((_, number)) = LIMITS.iter().find(|(name, _)| *name == limit.name) else {
            unknown.push(limit.name.chars().take(16).collect());
            continue;
        };
        let (mut soft, mut hard) = (limit.soft.unwrap_or(libc::RLIM_INFINITY), limit.hard.unwrap_or(libc::RLIM_INFINITY));
        if limit.name == "NOFILE" {
            // Even root is refused more than the kernel's own bound, which may be lower here than on the host.
            let most = fs::read_to_string("/proc/sys/fs/nr_open")
                .ok()
                .and_then(|text| text.trim().parse().ok())
                .unwrap_or(1024 * 1024);
            (soft, hard) = (soft.min(most), hard.min(most));
        }
        limits.push((*number, soft, hard));
        names.push(limit.name.clone());
    }
    (limits, names, unknown)
}

/// Puts the script where its owner alone can read it, under the name that Slurm gives it.
fn write_script(places: &Places, id: u32, script: &[u8], uid: u32, gid: u32) -> io::Result<PathBuf> {
    let base = script_base(places)?;
    let dir = base.join(format!("job{id}"));
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::DirBuilder::new().mode(0o700).create(&dir)?;
    let path = dir.join("slurm_script");
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o700).open(&path)?;
    file.write_all(script)?;
    std::os::unix::fs::fchown(&file, Some(uid), Some(gid))?;
    std::os::unix::fs::chown(&dir, Some(uid), Some(gid))?;
    Ok(path)
}

/// A directory on a file system that executes files. Debian's initramfs mounts /run without, so that a small file system of our own goes on top.
fn script_base(places: &Places) -> io::Result<&Path> {
    let usable = |dir: &Path| -> io::Result<bool> {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(dir)?;
        Ok(!statvfs(dir)?.flags().contains(FsFlags::ST_NOEXEC))
    };
    if usable(&places.run_dir)? {
        return Ok(&places.run_dir);
    }
    let flags = nix::mount::MsFlags::MS_NOSUID | nix::mount::MsFlags::MS_NODEV;
    if nix::mount::mount(Some("slurm-vm"), &places.run_dir, Some("tmpfs"), flags, Some("mode=0755")).is_ok() && usable(&places.run_dir)? {
        return Ok(&places.run_dir);
    }
    if usable(&places.fallback_dir)? {
        return Ok(&places.fallback_dir);
    }
    Err(io::Error::other(format!(
        "neither {} nor {} is on a file system that executes files",
        places.run_dir.display(),
        places.fallback_dir.display()
    )))
}

/// The lock of lckpwdf(3), which useradd and its kin hold while they write the file anew. They take a moment; a lock that never comes free is
/// gone past. Held until it is dropped.
fn lock_passwd(passwd: &Path) -> Option<fs::File> {
    let path = passwd.with_file_name(".pwd.lock");
    let file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .ok()?;
    // Numbers of one digit.
    let short = |number: i32| libc::c_short::try_from(number).unwrap_or_default();
    let whole = libc::flock {
        l_type: short(libc::F_WRLCK),
        l_whence: short(libc::SEEK_SET),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    let until = Instant::now() + LOCK_WITHIN;
    while nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_SETLK(&whole)).is_err() {
        if Instant::now() > until {
            return None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Some(file)
}

fn add_user(passwd: &Path, user: &UserLine, uid: u32, gid: u32) -> io::Result<()> {
    let clean = |text: &str| !text.contains([':', '\n', '\0']);
    if user.name.is_empty() || ![&user.name, &user.home, &user.shell].into_iter().all(|text| clean(text)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let _lock = lock_passwd(passwd);
    let text = String::from_utf8_lossy(&fs::read(passwd)?).into_owned();
    let known = text.lines().any(|line| {
        let mut fields = line.split(':');
        fields.next() == Some(&user.name) || fields.nth(1).and_then(|field| field.parse().ok()) == Some(uid)
    });
    if known {
        return Ok(());
    }
    let newline = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
    let line = format!("{newline}{}:x:{uid}:{gid}::{}:{}\n", user.name, user.home, user.shell);
    fs::OpenOptions::new().append(true).open(passwd)?.write_all(line.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_without_a_slash_is_looked_for_along_path() {
        let env = ["A=1".into(), ByteString::from("PATH=/a::/b")];
        assert_eq!(candidates(b"ls", &env), [b"/a/ls".to_vec(), b"./ls".to_vec(), b"/b/ls".to_vec()]);
        assert_eq!(candidates(b"./ls", &env), [b"./ls".to_vec()]);
        assert_eq!(candidates(b"ls", &[]).len(), 3);
    }

    #[test]
    fn a_user_is_added_to_the_passwd_file_once_and_never_over_another() {
        let dir = tempfile::tempdir().unwrap();
        let passwd = dir.path().join("passwd");
        fs::write(&passwd, "root:x:0:0:root:/root:/bin/sh").unwrap();
        let alice = UserLine {
            name: "alice".into(),
            home: "/home/alice".into(),
            shell: "/bin/bash".into(),
        };
        add_user(&passwd, &alice, 1000, 100).unwrap();
        add_user(&passwd, &alice, 1000, 100).unwrap();
        add_user(
            &passwd,
            &UserLine {
                name: "root".into(),
                ..alice.clone()
            },
            2000,
            100,
        )
        .unwrap();
        add_user(
            &passwd,
            &UserLine {
                name: "bob".into(),
                ..alice.clone()
            },
            0,
            0,
        )
        .unwrap();
        assert!(
            add_user(
                &passwd,
                &UserLine {
                    name: "eve:x:0:0::/:/bin/sh\n".into(),
                    ..alice
                },
                3000,
                1
            )
            .is_err()
        );
        assert_eq!(
            fs::read_to_string(&passwd).unwrap(),
            "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:100::/home/alice:/bin/bash\n"
        );
    }

    #[test]
    fn limits_that_the_kernel_does_not_know_are_named() {
        let wanted = [
            Limit {
                name: "NOFILE".into(),
                soft: Some(10),
                hard: None,
            },
            Limit {
                name: "PAPER".into(),
                soft: None,
                hard: None,
            },
        ];
        let (limits, names, unknown) = limits(&wanted);
        assert_eq!((limits[0].0, limits[0].1), (libc::RLIMIT_NOFILE, 10));
        assert!(limits[0].2 < libc::RLIM_INFINITY);
        assert_eq!((names, unknown), (vec!["NOFILE".to_owned()], vec!["PAPER".to_owned()]));
    }
}
