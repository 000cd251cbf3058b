//! Actions on the guest as a whole: clock, name, file systems, power.

use std::ffi::CString;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use crate::spawn;

/// Sets the real-time clock.
pub fn set_clock(unix_ns: u64) -> nix::Result<()> {
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(Duration::from_nanos(unix_ns)))
}

/// How far the real-time clock is behind a time, in nanoseconds.
pub fn clock_behind(unix_ns: u64) -> nix::Result<i64> {
    let now = Duration::from(nix::time::clock_gettime(ClockId::CLOCK_REALTIME)?);
    let behind = i128::from(unix_ns) - i128::try_from(now.as_nanos()).unwrap_or(i128::MAX);
    Ok(i64::try_from(behind).unwrap_or(if behind < 0 { i64::MIN } else { i64::MAX }))
}

/// Sets the host name.
pub fn set_hostname(name: &str) -> nix::Result<()> {
    if name.is_empty() || name.len() > 64 {
        return Err(Errno::EINVAL);
    }
    nix::unistd::sethostname(name)
}

/// In a worker: writes the file systems out.
pub fn sync() -> nix::Result<()> {
    nix::unistd::sync();
    Ok(())
}

/// In a worker: freezes or thaws all file systems that are on a block device. A file system that has no freezing is left out.
pub fn freeze(thaw: bool) -> nix::Result<()> {
    let mounts =
        std::fs::read_to_string("/proc/self/mounts").map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
    let mut points: Vec<&str> = mounts
        .lines()
        .filter(|line| line.starts_with("/dev/"))
        .filter_map(|line| line.split(' ').nth(1))
        .collect();
    // The last mounted first, so that no file system is frozen before one that lies on it (a loop device).
    points.reverse();
    for point in points {
        let Ok(path) = CString::new(unescape(point)) else { continue };
        match spawn::freeze(&path, thaw) {
            // Not freezable; frozen already (mounted twice); not frozen.
            Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOTTY | Errno::EBUSY | Errno::EINVAL | Errno::ENOTDIR) => {}
            Err(errno) if thaw => return Err(errno),
            Err(errno) => {
                let _ = freeze(true);
                return Err(errno);
            }
        }
    }
    Ok(())
}

/// Mount points have spaces and the like as three octal digits.
fn unescape(point: &str) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = point.as_bytes();
    while let Some((byte, tail)) = rest.split_first() {
        rest = tail;
        let digits = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(value) if *byte == b'\\' => {
                out.push(value);
                rest = &tail[3..];
            }
            _ => out.push(*byte),
        }
    }
    out
}

/// In a worker: writes the file systems out and powers off.
pub fn power_off() -> nix::Result<()> {
    nix::unistd::sync();
    match reboot(RebootMode::RB_POWER_OFF) {
        Ok(never) => match never {},
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_unescaped() {
        assert_eq!(unescape("/mnt/a\\040b\\134c"), b"/mnt/a b\\c");
        assert_eq!(unescape("/end\\04"), b"/end\\04");
    }
}
