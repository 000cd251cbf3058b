//! The agent as the tests play it, and the shim as they run it.
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use slurm_vm_api::{
    session::{BATCH_STEP, Ended, Frame, OPENING, Open, Sink, Stream, StreamStart, ToAgent, ToShim, read_frame, write_frame},
    shim::{OpenMode, Request, ShimArgs},
    spec::VmSpec,
};

pub const DEADLINE: Duration = Duration::from_secs(30);

/// A directory with a listening socket and a job script.
pub struct Bench {
    pub dir: tempfile::TempDir,
    pub listener: Option<UnixListener>,
}

/// The agent's end of a session.
pub struct Session {
    pub stream: UnixStream,
    pub environment: Vec<u8>,
    pub arguments: Vec<u8>,
    pub script: Option<Vec<u8>>,
    pub open: Open,
}

impl Bench {
    pub fn new() -> Self {
        let bench = Self::without_agent();
        let listener = UnixListener::bind(bench.path("agent.sock")).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self {
            listener: Some(listener),
            ..bench
        }
    }

    pub fn without_agent() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("slurm_script"), "#!/bin/sh\necho never on this host\n").unwrap();
        Self { dir, listener: None }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn args(&self, kind: slurm_vm_api::shim::StepKind, open_mode: OpenMode) -> ShimArgs {
        let batch = kind == slurm_vm_api::shim::StepKind::Batch;
        ShimArgs {
            job: 12,
            step: if batch { BATCH_STEP } else { 0 },
            task: 0,
            restart: 0,
            kind,
            open_mode,
            socket: self.path("agent.sock").display().to_string(),
            request: Request::Spec(VmSpec::for_image("tiny").unwrap()),
        }
    }

    pub fn command(&self, args: &ShimArgs) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_slurm-vm-run"));
        command
            .args(args.to_words())
            .arg("--")
            .arg(self.path("slurm_script"))
            .arg("first argument");
        command
            .env("SLURMD_NODENAME", "n1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub fn batch(&self) -> Command {
        self.command(&self.args(slurm_vm_api::shim::StepKind::Batch, OpenMode::Default))
    }

    pub fn step(&self) -> Command {
        self.command(&self.args(slurm_vm_api::shim::StepKind::Step, OpenMode::Unknown))
    }

    pub fn output_file(&self, text: &str) -> File {
        fs::write(self.path("out"), text).unwrap();
        OpenOptions::new().append(true).open(self.path("out")).unwrap()
    }

    pub fn accept(&self) -> Session {
        let until = Instant::now() + DEADLINE;
        let mut stream = loop {
            match self.listener.as_ref().unwrap().accept() {
                Ok((stream, _)) => break stream,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => thread::sleep(Duration::from_millis(2)),
                Err(e) => panic!("the shim does not connect: {e}"),
            }
        };
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        let mut first = [0];
        stream.read_exact(&mut first).unwrap();
        assert_eq!(first, [OPENING]);
        let (mut environment, mut arguments, mut script) = (vec![], vec![], None);
        loop {
            match read_frame::<ToAgent>(&mut stream).unwrap().expect("a frame") {
                Frame::Environment(b) => environment = b,
                Frame::Arguments(b) => arguments = b,
                Frame::Script(b) => script = Some(b),
                Frame::Control(ToAgent::Open(open)) => {
                    return Session {
                        stream,
                        environment,
                        arguments,
                        script,
                        open: *open,
                    };
                }
                other => panic!("{other:?} before the session is open"),
            }
        }
    }

    /// Accepts, and starts the program from scratch.
    pub fn start(&self) -> Session {
        let mut session = self.accept();
        session.started(0, 0, false, None);
        session
    }
}

impl Session {
    pub fn say(&mut self, message: ToShim) {
        write_frame(&mut self.stream, &Frame::Control(message)).unwrap();
    }

    pub fn started(&mut self, stdout: u64, stdin: u64, resumed: bool, sink: Option<Sink>) {
        let start = |stream, offset, sink| StreamStart { stream, offset, sink };
        let from = vec![
            start(Stream::Stdin, stdin, None),
            start(Stream::Stdout, stdout, sink),
            start(Stream::Stderr, 0, None),
        ];
        self.say(ToShim::Started { from, resumed });
    }

    pub fn data(&mut self, stream: Stream, offset: u64, bytes: &[u8]) {
        write_frame::<ToShim>(
            &mut self.stream,
            &Frame::Data {
                stream,
                offset,
                bytes: bytes.to_vec(),
            },
        )
        .unwrap();
    }

    pub fn hear(&mut self) -> Frame<ToAgent> {
        read_frame(&mut self.stream)
            .expect("a frame in time")
            .expect("no end of the session")
    }

    /// The next message, without acknowledgements and the end of an empty input.
    pub fn message(&mut self) -> ToAgent {
        loop {
            match self.hear() {
                Frame::Control(ToAgent::Wrote { .. } | ToAgent::StdinEof { .. }) => {}
                Frame::Control(message) => return message,
                other => panic!("{other:?}"),
            }
        }
    }

    pub fn wrote(&mut self, stream: Stream, offset: u64) {
        loop {
            if let Frame::Control(ToAgent::Wrote { stream: s, offset: o }) = self.hear()
                && s == stream
                && o >= offset
            {
                return assert_eq!(o, offset);
            }
        }
    }

    pub fn exit(mut self, ended: Ended) {
        self.say(ToShim::Exited(ended));
        // Keeps the session until the shim has ended it.
        let _ = self.stream.read_to_end(&mut Vec::new());
    }
}

/// Ends the child if the test fails before it did.
pub struct Shim(pub Child);

impl Shim {
    pub fn spawn(mut command: Command) -> Self {
        Self(command.spawn().unwrap())
    }

    pub fn signal(&self, signo: i32) {
        let pid = Pid::from_raw(self.0.id().try_into().unwrap());
        match Signal::try_from(signo) {
            Ok(signal) => kill(pid, signal).unwrap(),
            Err(_) => assert!(
                Command::new("kill")
                    .args([format!("-{signo}"), pid.to_string()])
                    .status()
                    .unwrap()
                    .success()
            ),
        }
    }

    pub fn wait(&mut self) -> ExitStatus {
        let until = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "the shim does not end");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Status, stdout and stderr at the end.
    pub fn finish(mut self) -> (ExitStatus, String, String) {
        let status = self.wait();
        let read = |from: Option<&mut dyn Read>| {
            let mut bytes = Vec::new();
            from.map(|f| f.read_to_end(&mut bytes).unwrap());
            String::from_utf8(bytes).unwrap()
        };
        let out = read(self.0.stdout.as_mut().map(|o| o as &mut dyn Read));
        let err = read(self.0.stderr.as_mut().map(|o| o as &mut dyn Read));
        (status, out, err)
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
