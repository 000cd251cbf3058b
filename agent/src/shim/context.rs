//! What the program must find in the guest as it would have found it here: environment, directory, limits, groups.
use std::{
    fs, io,
    os::{
        fd::AsFd,
        unix::{ffi::OsStrExt, ffi::OsStringExt},
    },
};

use nix::{
    sys::{
        resource::{RLIM_INFINITY, Resource, getrlimit},
        stat::{Mode, umask},
    },
    unistd::{User, getgid, getgroups, getuid, isatty},
};
use slurm_vm_api::session::{Rlimit, Terminal, UserEntry};

/// The environment as execve(2) left it, `KEY=VALUE` each ended by NUL, without the variables that are private. Read
/// from the kernel, since the standard library leaves out entries without `=`.
pub fn environment(private: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let raw = fs::read("/proc/self/environ").unwrap_or_else(|_| {
        std::env::vars_os().fold(Vec::new(), |mut all, (key, value)| {
            all.extend(key.as_bytes());
            all.push(b'=');
            all.extend(value.into_vec());
            all.push(0);
            all
        })
    });
    let mut kept = Vec::with_capacity(raw.len());
    for entry in raw.split_inclusive(|b| *b == 0) {
        let name = entry.split(|b| *b == b'=').next().unwrap_or_default();
        if entry != [0] && !private(name) {
            kept.extend_from_slice(entry);
        }
    }
    kept
}

/// The mask for new files, which can be read only by setting it.
pub fn file_mask() -> u32 {
    let mask = umask(Mode::empty());
    umask(mask);
    mask.bits()
}

/// Supplementary groups of the task.
///
/// # Errors
/// Those of getgroups(2).
pub fn groups() -> io::Result<Vec<u32>> {
    Ok(getgroups()?.into_iter().map(nix::unistd::Gid::as_raw).collect())
}

/// The passwd entry, made up from numbers where the node has none.
pub fn user() -> UserEntry {
    let (uid, gid) = (getuid(), getgid());
    let entry = User::from_uid(uid).ok().flatten();
    UserEntry {
        name: entry.as_ref().map_or_else(|| format!("user{uid}"), |u| u.name.clone()),
        uid: uid.as_raw(),
        gid: gid.as_raw(),
        home: entry.as_ref().map_or_else(|| "/".into(), |u| u.dir.display().to_string()),
        shell: entry.as_ref().map_or_else(|| "/bin/sh".into(), |u| u.shell.display().to_string()),
    }
}

/// All resource limits of the task.
pub fn rlimits() -> Vec<Rlimit> {
    use Resource as R;
    let all = [
        R::RLIMIT_AS,
        R::RLIMIT_CORE,
        R::RLIMIT_CPU,
        R::RLIMIT_DATA,
        R::RLIMIT_FSIZE,
        R::RLIMIT_LOCKS,
        R::RLIMIT_MEMLOCK,
        R::RLIMIT_MSGQUEUE,
        R::RLIMIT_NICE,
        R::RLIMIT_NOFILE,
        R::RLIMIT_NPROC,
        R::RLIMIT_RSS,
        R::RLIMIT_RTPRIO,
        R::RLIMIT_RTTIME,
        R::RLIMIT_SIGPENDING,
        R::RLIMIT_STACK,
    ];
    let finite = |v| (v != RLIM_INFINITY).then_some(v);
    all.into_iter()
        .filter_map(|r| {
            let (soft, hard) = getrlimit(r).ok()?;
            Some(Rlimit {
                resource: r as u32,
                soft: finite(soft),
                hard: finite(hard),
            })
        })
        .collect()
}

/// The terminal's size, if standard input and output are one.
pub fn terminal(input: impl AsFd, output: impl AsFd) -> Option<Terminal> {
    if !isatty(&input).unwrap_or(false) || !isatty(&output).unwrap_or(false) {
        return None;
    }
    let (cols, rows) = terminal_size::terminal_size_of(output).map_or((80, 24), |(w, h)| (w.0, h.0));
    Some(Terminal { rows, cols })
}

/// The node's name for a message: Slurm's, else the host's.
pub fn node_name() -> String {
    std::env::var("SLURMD_NODENAME")
        .ok()
        .or_else(|| nix::unistd::gethostname().ok().map(|h| h.to_string_lossy().into_owned()))
        .unwrap_or_else(|| "?".into())
}
