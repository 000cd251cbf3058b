//! The file that Slurm opened: others write to it as well, and its storage may be full.
use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use slurm_vm_api::session::{Ended, Frame, Sink, Stream, ToAgent, ToShim, WINDOW};

use crate::{
    agent::{Bench, DEADLINE, Session, Shim},
    pattern,
};

fn append(path: &Path, text: &str) {
    OpenOptions::new()
        .append(true)
        .open(path)
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
}

fn resumed(bench: &Bench) -> (Shim, Session) {
    let mut command = bench.batch();
    command.stdout(OpenOptions::new().append(true).open(bench.path("out")).unwrap());
    let shim = Shim::spawn(command);
    let session = bench.accept();
    (shim, session)
}

#[test]
fn bytes_of_another_writer_stay_when_a_program_is_resumed() {
    let bench = Bench::new();
    drop(bench.output_file("base:12345678somebody else's\n"));
    let (shim, mut session) = resumed(&bench);
    let sink = Sink {
        base: 5,
        ..session.open.stdout.clone()
    };
    session.started(8, 0, true, Some(sink));
    session.data(Stream::Stdout, 8, b"-goes on\n");
    session.exit(Ended::Code(0));
    assert_eq!(shim.finish().0.code(), Some(0));
    assert_eq!(
        fs::read_to_string(bench.path("out")).unwrap(),
        "base:12345678somebody else's\n-goes on\n"
    );
}

#[test]
fn a_job_that_moves_leaves_the_lines_of_another_job_in_their_file_even_where_they_are_the_same_as_its_own() {
    let bench = Bench::new();
    let mut command = bench.batch();
    command.stdout(bench.output_file(""));
    let shim = Shim::spawn(command);
    let mut session = bench.start();
    session.data(Stream::Stdout, 0, b"tick\n");
    session.wrote(Stream::Stdout, 5);
    append(&bench.path("out"), "tick\n");
    session.data(Stream::Stdout, 5, b"ti");
    session.wrote(Stream::Stdout, 7);
    session.say(ToShim::HandOver);
    let sink = match session.message() {
        ToAgent::HandedOver { wrote, sinks } => {
            assert_eq!(wrote[0], (Stream::Stdout, 7));
            assert_eq!(sinks[0].1.end, Some(12));
            sinks[0].1.clone()
        }
        other => panic!("{other:?}"),
    };
    append(&bench.path("out"), "ck\nline of the other\n");
    shim.signal(15);
    assert_eq!(shim.finish().0.code(), Some(0));

    let (shim, mut session) = resumed(&bench);
    session.started(7, 0, true, Some(sink));
    session.data(Stream::Stdout, 7, b"ck\n");
    session.data(Stream::Stdout, 10, b"tick\n");
    session.exit(Ended::Code(0));
    assert_eq!(shim.finish().0.code(), Some(0));
    assert_eq!(
        fs::read_to_string(bench.path("out")).unwrap(),
        "tick\ntick\ntick\nline of the other\nck\ntick\n"
    );
}

/// A file system that takes every write, like one on the network with a quota, and says only at a sync that it has no room.
struct Full {
    dir: tempfile::TempDir,
}

impl Full {
    fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: mounting needs root");
            return None;
        }
        let full = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        for name in ["store", "files"] {
            fs::create_dir(full.dir.path().join(name)).unwrap();
        }
        full.sh("mount -t tmpfs -o size=2m none store");
        full.sh("truncate -s 64m store/image && mkfs.ext4 -q -b 4096 -O ^has_journal store/image");
        // The loop driver takes a write that was cut short for a whole one. One of a page is never cut short.
        full.sh("device=$(losetup --show -f store/image) && echo 4 > /sys/block/${device#/dev/}/queue/max_sectors_kb && mount $device files && losetup -d $device");
        Some(full)
    }

    fn sh(&self, line: &str) {
        let said = Command::new("sh").args(["-c", line]).current_dir(self.dir.path()).output().unwrap();
        assert!(said.status.success(), "{line}: {said:?}");
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("files/out")
    }

    fn make_room(&self) {
        self.sh("mount -o remount,size=64m store");
    }

    /// From now on each write and each sync is an input or output error.
    fn break_down(&self) {
        // EXT4_IOC_SHUTDOWN, and EXT4_GOING_FLAGS_NOLOGFLUSH
        const SHUTDOWN: nix::libc::c_ulong = 0x8004_587d;
        let at_once = 2u32;
        let file = fs::File::open(self.file()).unwrap();
        // SAFETY: the descriptor is open, and the request reads one u32.
        let done = unsafe { nix::libc::ioctl(file.as_raw_fd(), SHUTDOWN, &raw const at_once) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }

    /// What is in the file once nothing is in memory any more.
    fn stored(&self) -> Vec<u8> {
        self.sh("umount files && mount -o loop store/image files");
        fs::read(self.file()).unwrap()
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        for name in ["files", "store"] {
            let _ = Command::new("umount").args(["-l", name]).current_dir(self.dir.path()).status();
        }
    }
}

/// Ranges in which they differ.
fn different(a: &[u8], b: &[u8]) -> Vec<std::ops::Range<usize>> {
    let mut ranges: Vec<std::ops::Range<usize>> = Vec::new();
    for i in (0..a.len().min(b.len())).filter(|i| a[*i] != b[*i]) {
        match ranges.last_mut().filter(|r| i - r.end < 4096) {
            Some(last) => last.end = i + 1,
            None => ranges.push(i..i + 1),
        }
    }
    ranges
}

/// Sends what the window allows and returns what was acknowledged when that no longer grows, or all.
fn feed(session: &mut Session, bytes: &[u8], acked: &mut usize, sent: &mut usize, patience: Duration) {
    session.stream.set_read_timeout(Some(patience)).unwrap();
    while *acked < bytes.len() {
        while *sent < bytes.len() && *sent - *acked < WINDOW {
            let end = (*sent + 60_000).min(bytes.len()).min(*acked + WINDOW);
            session.data(Stream::Stdout, *sent as u64, &bytes[*sent..end]);
            *sent = end;
        }
        match slurm_vm_api::session::read_frame::<ToAgent>(&mut session.stream) {
            Ok(Some(Frame::Control(ToAgent::Wrote {
                stream: Stream::Stdout,
                offset,
            }))) => *acked = offset.try_into().unwrap(),
            Ok(Some(_)) => {}
            Ok(None) => panic!("the shim has ended"),
            Err(_) => break,
        }
    }
    session.stream.set_read_timeout(Some(DEADLINE)).unwrap();
}

#[test]
fn what_a_full_file_system_says_only_at_a_sync_stops_the_program_and_nothing_acknowledged_is_lost() {
    let Some(full) = Full::new() else { return };
    let bench = Bench::new();
    let mut command = bench.batch();
    command.stdout(OpenOptions::new().append(true).create(true).open(full.file()).unwrap());
    let mut shim = Shim::spawn(command);
    let mut session = bench.start();
    let bytes = pattern(4 << 20);
    let (mut acked, mut sent) = (0, 0);
    feed(&mut session, &bytes, &mut acked, &mut sent, Duration::from_secs(3));
    assert!(acked < bytes.len(), "all is acknowledged, and there is room for half of it");
    assert!(acked > 0, "nothing is acknowledged");
    full.make_room();
    feed(&mut session, &bytes, &mut acked, &mut sent, DEADLINE);
    assert_eq!(acked, bytes.len());
    session.exit(Ended::Code(0));
    assert_eq!(shim.wait().code(), Some(0));
    let stored = full.stored();
    let wrong = different(&stored, &bytes);
    assert!(
        stored.len() == bytes.len() && wrong.is_empty(),
        "{} bytes, wrong at {wrong:?}",
        stored.len()
    );
}

#[test]
fn a_hand_over_reports_only_what_is_stored() {
    let Some(full) = Full::new() else { return };
    let bench = Bench::new();
    let mut command = bench.batch();
    command.stdout(OpenOptions::new().append(true).create(true).open(full.file()).unwrap());
    let shim = Shim::spawn(command);
    let mut session = bench.start();
    let bytes = pattern(4 << 20);
    let (mut acked, mut sent) = (0, 0);
    feed(&mut session, &bytes, &mut acked, &mut sent, Duration::from_secs(3));
    session.say(ToShim::HandOver);
    let ToAgent::HandedOver { wrote, .. } = session.message() else {
        panic!("no hand-over")
    };
    let reported = usize::try_from(wrote[0].1).unwrap();
    assert!(reported < bytes.len(), "all of it is reported, and there is room for half of it");
    shim.signal(15);
    assert_eq!(shim.finish().0.code(), Some(0));
    full.make_room();
    let stored = full.stored();
    let wrong = different(&stored[..reported.min(stored.len())], &bytes);
    assert!(
        stored.len() >= reported && wrong.is_empty(),
        "{} bytes of {reported}, wrong at {wrong:?}",
        stored.len()
    );
}

#[test]
fn a_file_that_fails_for_good_is_a_fault_of_the_node_and_no_byte_of_it_counts_as_written() {
    let Some(full) = Full::new() else { return };
    let bench = Bench::new();
    let mut command = bench.step();
    command.stdout(OpenOptions::new().append(true).create(true).open(full.file()).unwrap());
    command.env("SLURM_VM_RECONNECT_TIMEOUT", "1");
    let shim = Shim::spawn(command);
    let mut session = bench.start();
    session.data(Stream::Stdout, 0, b"one\n");
    session.wrote(Stream::Stdout, 4);
    full.break_down();
    session.data(Stream::Stdout, 4, b"two\n");
    let (status, _, err) = shim.finish();
    assert_eq!(
        (status.code(), err.as_str()),
        (
            Some(125),
            "slurm-vm: job 12: the file of the task's standard output cannot be written: I/O error (node n1; a job of srun or salloc \
             cannot be requeued)\n"
        )
    );
    while let Ok(Some(frame)) = slurm_vm_api::session::read_frame::<ToAgent>(&mut session.stream) {
        assert!(!matches!(frame, Frame::Control(ToAgent::Wrote { .. })), "{frame:?}");
    }
}
