//! One shim's connection: a reader (this thread) and a writer thread, with the VM's owner between them.
use std::{
    io::{self, BufReader, BufWriter, Write},
    os::unix::net::UnixStream,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use crossbeam_channel::unbounded;
use slurm_vm_api::{
    outcome,
    session::{Frame, Open, ToAgent, ToShim, VERSION, read_frame, write_frame},
};

use super::Roles;
use crate::vm::{Attach, Request};

static NEXT: AtomicU64 = AtomicU64::new(1);

/// Serves one shim until either side ends. A shim that reads slowly only slows its own program: the guest sends no
/// more than a window beyond what the shim has acknowledged, so the queue between owner and writer is bounded.
pub fn serve(stream: &UnixStream, roles: &Roles, uid: u32) -> io::Result<()> {
    let session = NEXT.fetch_add(1, Ordering::Relaxed);
    let mut reader = BufReader::with_capacity(128 << 10, stream.try_clone()?);
    let (mut environment, mut arguments, mut script) = (Vec::new(), Vec::new(), None);
    let open: Open = loop {
        match read_frame::<ToAgent>(&mut reader)? {
            Some(Frame::Environment(b)) => environment = b,
            Some(Frame::Arguments(b)) => arguments = b,
            Some(Frame::Script(b)) => script = Some(b),
            Some(Frame::Control(ToAgent::Open(open))) => break *open,
            Some(other) => return Err(io::Error::other(format!("before the opening of a session: {other:?}"))),
            None => return Ok(()),
        }
    };
    stream.set_read_timeout(None)?;
    let (to, outgoing) = unbounded::<Frame<ToShim>>();
    let job = open.job;
    let refuse = |outcome: u8, why: String| {
        let failed: Frame<ToShim> = Frame::Control(ToShim::Failed {
            outcome: outcome.into(),
            why,
        });
        write_frame(&mut &*stream, &failed)
    };
    let Some(node) = &roles.node else {
        return refuse(outcome::NODE_FAULT, "this agent has no node role".into());
    };
    if open.version != VERSION {
        return refuse(
            outcome::NODE_FAULT,
            format!(
                "the shim speaks version {} and the agent version {VERSION}: update both",
                open.version
            ),
        );
    }
    if open.user.uid != uid && uid != 0 {
        return refuse(outcome::REFUSED, format!("uid {uid} cannot run a program as uid {}", open.user.uid));
    }
    let writing = stream.try_clone()?;
    writing.set_write_timeout(None)?;
    let writer = thread::Builder::new().name(format!("to-shim-{job}")).spawn(move || {
        let mut socket = BufWriter::with_capacity(128 << 10, writing);
        while let Ok(frame) = outgoing.recv() {
            let mut done = write_frame(&mut socket, &frame);
            // What is there already goes out in one piece.
            while done.is_ok()
                && let Ok(next) = outgoing.try_recv()
            {
                done = write_frame(&mut socket, &next);
            }
            if done.and_then(|()| socket.flush()).is_err() {
                break;
            }
        }
    })?;
    node.attach(
        Attach {
            session,
            open,
            environment,
            arguments,
            script,
            to,
        },
        uid,
    );
    let result = loop {
        match read_frame::<ToAgent>(&mut reader) {
            Ok(Some(frame)) => {
                // A VM that begins anew has another owner: ask for it each time.
                if let Some(owner) = node.owner(job) {
                    let _ = owner.send(Request::FromShim { session, frame });
                }
            }
            Ok(None) => break Ok(()),
            Err(e) => break Err(e),
        }
    };
    if let Some(owner) = node.owner(job) {
        let _ = owner.send(Request::Detach { session });
    }
    // The writer ends when the owner has dropped its sender, or at the first failed write.
    let _ = stream.shutdown(std::net::Shutdown::Both);
    drop(writer);
    result
}
