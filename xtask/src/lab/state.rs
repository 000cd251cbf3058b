//! What a lab keeps on the host while it runs: which process it is, its options, its cuts.

use super::options::Places;
use crate::{Result, error::At, paths, proc};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{fs, os::unix::fs::MetadataExt, time::Duration};

/// Names the lab's first process for good: pids are used again, start times are not.
#[derive(Debug, Serialize, Deserialize)]
struct Status {
    pid: i32,
    start_time: u64,
}

/// Records the lab's first process.
pub fn write_status(places: &Places, pid: i32) -> Result<()> {
    let start_time = proc::start_time(pid).ok_or("the lab's first process died at once")?;
    let text = serde_json::to_string(&Status { pid, start_time }).map_err(|e| e.to_string())?;
    let fresh = places.status().with_extension("new");
    paths::file(&fresh, 0o600, text)?;
    fs::rename(&fresh, places.status()).at("write", places.status())
}

/// The lab's first process, if it lives.
pub fn alive(places: &Places) -> Option<i32> {
    let text = fs::read_to_string(places.status()).ok()?;
    let status: Status = serde_json::from_str(&text).ok()?;
    (proc::start_time(status.pid) == Some(status.start_time)).then_some(status.pid)
}

/// Keeps the options for the lab's processes and for a second `lab up`.
pub fn write_options(places: &Places, options: &impl Serialize) -> Result<()> {
    paths::file(
        places.options(),
        0o600,
        serde_json::to_string_pretty(options).map_err(|e| e.to_string())?,
    )
}

/// The options the lab was started with.
pub fn read_options<T: DeserializeOwned>(places: &Places) -> Result<T> {
    let text = fs::read_to_string(places.options()).at("read", places.options())?;
    serde_json::from_str(&text).map_err(|e| format!("{}: {e}", places.options().display()).into())
}

/// The peers a host is cut off from.
pub fn cuts_of(places: &Places, host: &str) -> Result<Vec<String>> {
    if !places.cuts().exists() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(places.cuts()).at("read", places.cuts())?;
    let names = entries.filter_map(|e| e.ok()?.file_name().into_string().ok());
    Ok(names
        .filter_map(|name| {
            let (a, b) = name.split_once("--")?;
            [(a, b), (b, a)]
                .into_iter()
                .find(|(me, _)| *me == host)
                .map(|(_, peer)| peer.to_owned())
        })
        .collect())
}

/// One `lab up` or `lab down` of a name at a time. The file goes with the lab, so whoever gets the lock looks whether it is still the one in
/// place. While it is there the directory of all labs stays, too.
pub fn lock(places: &Places) -> Result<Flock<fs::File>> {
    let path = lock_path(places);
    loop {
        fs::create_dir_all(places.states()).at("create", places.states())?;
        let file = match fs::File::options().create(true).truncate(false).write(true).open(&path) {
            // The last lab of another name went just now.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            other => other.at("open", &path)?,
        };
        let lock = match Flock::lock(file, FlockArg::LockExclusive) {
            Ok(lock) => lock,
            Err((_, Errno::EINTR)) => continue,
            Err((_, e)) => return Err(std::io::Error::from(e)).at("lock", &path),
        };
        let held = lock.metadata().at("look at", &path)?;
        if fs::metadata(&path).is_ok_and(|now| (held.dev(), held.ino()) == (now.dev(), now.ino())) {
            return Ok(lock);
        }
    }
}

/// Makes the lab's directories. With the lock held.
pub fn make_directories(places: &Places) -> Result<()> {
    // QEMU's user must get through, whatever our umask is; and the last lab of another name may take the common parent away under our hands.
    let common = || paths::dir(places.disks(), 0o755).and_then(|()| paths::dir(places.disk(), 0o755));
    common().or_else(|_| common())?;
    paths::dir(places.state(), 0o700)?;
    paths::dir(places.cuts(), 0o700)
}

fn lock_path(places: &Places) -> std::path::PathBuf {
    places.state().with_extension("lock")
}

/// Ends the lab if it lives and removes all it has on the host but for the lock, which the caller holds.
pub fn remove(places: &Places) -> Result<()> {
    if let Some(pid) = alive(places) {
        // It may go by itself between the look and the kill.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        let gone = || alive(places).is_none().then_some(());
        proc::wait_for(Duration::from_secs(30), gone).ok_or_else(|| format!("process {pid} of the lab does not die"))?;
    }
    for dir in [places.disk(), places.state()] {
        match fs::remove_dir_all(&dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e).at("remove", &dir),
            _ => {}
        }
    }
    // The directory of all labs' disks goes with the last one.
    let _ = fs::remove_dir(places.disks());
    Ok(())
}

/// The last trace of a lab that was removed.
pub fn forget(places: &Places, lock: Flock<fs::File>) {
    let _ = fs::remove_file(lock_path(places));
    let _ = fs::remove_dir(places.states());
    drop(lock);
}
