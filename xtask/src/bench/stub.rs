//! A stub of the agent: answers hooks at once, and ends every program at once with exit code 0, without a VM.
//!
//! What is left of a job with `--vm` is then the plugin, the shim and their messages: what `bench plugin` wants to see.

use crate::{Result, error::At};
use slurm_vm_api::{
    hooks::{self, HookReply, HookRequest},
    session::{Ended, Frame, OPENING, Stream, StreamStart, ToAgent, ToShim, read_frame, write_frame},
};
use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    path::Path,
};

/// Serves on `socket` until it is killed. When a session opens, which is when a program would begin, a byte goes into `fifo`.
pub fn serve(socket: &Path, fifo: &Path) -> Result<()> {
    let _ = fs::remove_file(socket);
    let listener = UnixListener::bind(socket).at("listen on", socket)?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o666)).at("set the mode of", socket)?;
    // Read and write: this end must not wait for a reader.
    let fifo_end = fs::File::options().read(true).write(true).open(fifo).at("open", fifo)?;
    println!("{{}}");
    for stream in listener.incoming() {
        let stream = stream.at("accept on", socket)?;
        let fifo_end = fifo_end.try_clone().at("open", fifo)?;
        std::thread::spawn(move || {
            if let Err(e) = client(stream, fifo_end) {
                eprintln!("stub: {e}");
            }
        });
    }
    Ok(())
}

fn client(mut stream: UnixStream, mut fifo: fs::File) -> io::Result<()> {
    let mut first = [0u8; 1];
    stream.read_exact(&mut first)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    if first[0] == OPENING {
        while let Some(frame) = read_frame::<ToAgent>(&mut reader)? {
            if let Frame::Control(ToAgent::Open(_)) = frame {
                fifo.write_all(b"x")?;
                let start = |stream| StreamStart {
                    stream,
                    offset: 0,
                    sink: None,
                };
                let started = ToShim::Started {
                    from: vec![start(Stream::Stdout), start(Stream::Stderr)],
                    resumed: false,
                };
                write_frame(&mut stream, &Frame::Control(started))?;
                write_frame(&mut stream, &Frame::Control(ToShim::Exited(Ended::Code(0))))?;
            }
        }
        return Ok(());
    }
    let mut line = String::from_utf8_lossy(&first).into_owned();
    reader.read_line(&mut line)?;
    let reply = match hooks::message_from_line(&line) {
        Ok(message) => match message.hook {
            HookRequest::Ensure { .. } => HookReply::done(Some(1)),
            HookRequest::Release { .. } => HookReply::done(None),
        },
        Err(why) => HookReply::refused(why),
    };
    stream.write_all(hooks::to_line(&reply).as_bytes())
}
