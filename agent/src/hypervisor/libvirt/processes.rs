//! Whether a domain's QEMU runs, seen without libvirt: with libvirtd away nothing can be ended, but what does not run need not be.
#![forbid(unsafe_code)]
use std::{fs, path::Path};

/// Whether it is certain that no process on this host is the QEMU of this domain.
pub(super) fn surely_none(domain: &str) -> bool {
    none_in(Path::new("/proc"), domain)
}

fn none_in(proc: &Path, domain: &str) -> bool {
    // Where other users' processes are hidden (`hidepid`), not seeing one says nothing.
    if !fs::read(proc.join("1/cmdline")).is_ok_and(|line| !line.is_empty()) {
        return false;
    }
    let Ok(entries) = fs::read_dir(proc) else { return false };
    let name = format!("guest={domain}");
    let is_its_qemu = |line: &[u8]| {
        line.split(|b| *b == 0).any(|word| {
            word.strip_prefix(name.as_bytes())
                .is_some_and(|rest| matches!(rest.first(), None | Some(b',')))
        })
    };
    !entries
        .flatten()
        .filter(|e| e.file_name().to_str().is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit())))
        // A process that ends while it is looked at is gone.
        .any(|e| fs::read(e.path().join("cmdline")).is_ok_and(|line| is_its_qemu(&line)))
}

#[cfg(test)]
mod tests {
    use super::none_in;
    use std::fs;

    #[test]
    fn a_qemu_is_known_by_its_guests_name() {
        let proc = tempfile::tempdir().expect("a directory");
        let put = |pid: &str, line: &[u8]| {
            fs::create_dir_all(proc.path().join(pid)).expect("a directory");
            fs::write(proc.path().join(pid).join("cmdline"), line).expect("a file");
        };
        assert!(!none_in(proc.path(), "slurm-1-0"), "nothing can be seen");
        put("1", b"init\0");
        put("20", b"qemu-system-x86_64\0-name\0guest=slurm-11-0,debug-threads=on\0-S\0");
        assert!(none_in(proc.path(), "slurm-1-0"));
        assert!(!none_in(proc.path(), "slurm-11-0"));
    }
}
