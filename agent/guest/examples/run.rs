//! Runs a program in a guest from the command line: a workbench for the link.
//!
//! `run SOCKET [--relink-every BYTES] [--script FILE] PROGRAM-ID ARG...` writes the program's output to its own, and the speed to standard error. With
//! `--relink-every` it throws the link away after so many bytes, and goes on with a new one from what it has written.

use std::io::Write;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use slurm_vm::guest::{GuestLink, LinkConfig, LinkEvent, LinkRequest, UnixTransport};
use slurm_vm_api::guest::{StartSpec, Stdio, Stream};

fn link(socket: &str, seed: u64) -> (GuestLink, crossbeam_channel::Receiver<LinkEvent>) {
    GuestLink::start(LinkConfig::new("bench", seed), Box::new(UnixTransport::new(socket))).expect("a thread for the link")
}

fn main() {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let socket = args.remove(0);
    let mut relink_every = u64::MAX;
    if args[0] == "--relink-every" {
        relink_every = args[1].parse().expect("a number of bytes");
        args.drain(..2);
    }
    let mut script = None;
    if args[0] == "--script" {
        script = Some(std::fs::read(&args[1]).expect("a readable script"));
        args.drain(..2);
    }
    let program: u32 = args.remove(0).parse().expect("a program id");
    let spec = StartSpec {
        argv: args.into_iter().map(Into::into).collect(),
        env: vec!["PATH=/usr/bin:/bin:/sbin".into()],
        cwd: "/".into(),
        uid: 0,
        gid: 0,
        groups: vec![],
        umask: 0o022,
        limits: vec![],
        stdio: Stdio::Pipes {
            merge_stderr: true,
            stdin: false,
        },
        ring_bytes: None,
        user: None,
        mounts: vec![],
        cwd_required: false,
        wait_network: false,
    };
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_secs()) << 20;
    let (mut current, mut events) = link(&socket, seed);
    current.send(LinkRequest::Start {
        program,
        spec: Box::new(spec),
        script,
    });
    let (mut written, mut begun, mut links) = (0u64, Instant::now(), 1u64);
    let mut out = std::io::stdout().lock();
    loop {
        match events.recv_timeout(Duration::from_secs(300)).expect("an event within five minutes") {
            LinkEvent::Data { stream, offset, bytes, .. } => {
                assert_eq!(offset, written);
                if written == 0 {
                    begun = Instant::now();
                }
                out.write_all(&bytes).expect("to write the output");
                written += bytes.len() as u64;
                current.send(LinkRequest::Ack {
                    program,
                    stream,
                    offset: written,
                });
                if written / relink_every >= links {
                    links += 1;
                    // Its socket closes with what is on the way in both directions.
                    current.stop();
                    (current, events) = link(&socket, seed + links);
                    current.send(LinkRequest::Resume {
                        program,
                        stream: Stream::Stdout,
                        from: written,
                    });
                }
            }
            LinkEvent::Exited { status, .. } => {
                let seconds = begun.elapsed().as_secs_f64();
                #[expect(clippy::cast_precision_loss, reason = "for people")]
                let rate = written as f64 / seconds / 1e6;
                eprintln!("{written} bytes in {seconds:.3} s, {rate:.1} MB/s, {links} links, {status:?}");
                return;
            }
            LinkEvent::Up { hello } => eprintln!(
                "up: kernel {} helper {} bad frames {}",
                hello.kernel, hello.version, hello.bad_frames
            ),
            other => eprintln!("{other:?}"),
        }
    }
}
