//! Directories of the host, mounted before the program that wants them.
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::mount::MsFlags;
use slurm_vm_api::guest::GuestMount;

/// Mounts a directory where it is not mounted yet.
pub fn ensure(mount: &GuestMount) -> io::Result<()> {
    let target = PathBuf::from(std::ffi::OsStr::from_bytes(&mount.target.0));
    if is_mounted(&fs::read_to_string("/proc/self/mountinfo")?, &mount.tag, &target) {
        return Ok(());
    }
    fs::DirBuilder::new().recursive(true).mode(0o755).create(&target)?;
    // Whoever is root in here could make a device node or a setuid program in it for the guest; neither is for a user's directory.
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    flags.set(MsFlags::MS_RDONLY, mount.readonly);
    nix::mount::mount(Some(mount.tag.as_str()), &target, Some("virtiofs"), flags, None::<&str>).map_err(|errno| match errno {
        nix::errno::Errno::ENODEV => io::Error::other("its kernel has no virtiofs"),
        nix::errno::Errno::EINVAL => io::Error::other("it has no such device"),
        other => other.into(),
    })
}

/// Whether the device is mounted there: a line is `ID PARENT DEV ROOT PLACE OPTIONS ... - TYPE SOURCE SUPER`.
fn is_mounted(table: &str, tag: &str, target: &Path) -> bool {
    table.lines().any(|line| {
        let Some((head, tail)) = line.split_once(" - ") else { return false };
        let place = head.split(' ').nth(4).map(unescaped);
        let mut tail = tail.split(' ');
        place.as_deref() == Some(target.as_os_str().as_bytes()) && tail.next() == Some("virtiofs") && tail.next() == Some(tag)
    })
}

/// The kernel writes space, tab, newline and backslash as `\` and three octal digits.
fn unescaped(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, more)) = rest.split_first() {
        let code = (*first == b'\\')
            .then(|| more.get(..3))
            .flatten()
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match code {
            Some(byte) => {
                bytes.push(byte);
                rest = &more[3..];
            }
            None => {
                bytes.push(*first);
                rest = more;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_mounted_once_at_its_place() {
        let table = "22 1 0:20 / /proc rw - proc proc rw\n\
            40 1 0:33 / /home/a\\040b rw,nosuid,nodev shared:5 - virtiofs slurm-vm-0 rw\n";
        let mounted = |tag, place: &str| is_mounted(table, tag, Path::new(place));
        assert!(mounted("slurm-vm-0", "/home/a b"));
        assert!(!mounted("slurm-vm-1", "/home/a b") && !mounted("slurm-vm-0", "/home/a") && !mounted("proc", "/proc"));
    }
}
