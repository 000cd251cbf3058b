//! One shim's connection: a reader (this thread) and a writer thread, with the VM's owner between them.
//!
//! ```text
//! Opening --refused--> one line, closed          (the owner never hears of it)
//!    |----answered--> what there is to say, closed
//!    |----left------> waits for its SIGTERM       (the VM is elsewhere)
//!    '----attached--> frames both ways until either side ends
//! ```
//!
//! What a shim can make the agent hold is charged to its user from the first byte on ([`crate::limits`]): what it brings before it is
//! accepted, frames that the owner has not looked at, frames that it does not read.
use std::{
    io::{self, BufReader, BufWriter, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use slurm_vm_api::session::{Cause, Frame, Kind, MAX_DATA, Open, ToAgent, ToShim, VERSION, read_frame_if, write_frame};

use super::{Roles, Until};
use crate::{
    limits::{BYTES_AT_FIRST, Budget, CONTROL_BYTES, COPIES, Full, Held, OPENING_BYTES, OPENING_WITHIN, STRINGS},
    node::{Admission, Node, Refused},
    vm::{
        Attach, Request,
        outbox::{Outbox, ToSession, Window, outbox},
    },
};

static NEXT: AtomicU64 = AtomicU64::new(1);
/// Size of the buffers of a connection: frames of data are larger and pass by them.
const BUFFER: usize = BYTES_AT_FIRST / 2;

/// What a shim sends before it is accepted.
struct Opening {
    open: Box<Open>,
    environment: Vec<u8>,
    arguments: Vec<u8>,
    script: Option<Vec<u8>>,
    held: Held,
}

/// Serves one shim until either side ends.
pub fn serve(stream: &Arc<UnixStream>, roles: &Roles, budget: &Arc<Budget>, uid: u32) -> io::Result<()> {
    let session = NEXT.fetch_add(1, Ordering::Relaxed);
    let mut reader = BufReader::with_capacity(BUFFER, Until::new(stream, Instant::now() + OPENING_WITHIN));
    let Some(opening) = opening(&mut reader, budget, uid)? else {
        return Ok(());
    };
    let job = opening.open.job;
    let (node, _seat) = match admissible(&opening, roles, budget, uid) {
        Ok(admissible) => admissible,
        Err(refused) => return write_frame(&mut &**stream, &failed(refused)),
    };
    let cut = stream.clone();
    let (to, frames) = outbox(budget.bytes(uid, 0).map_err(full)?, move || {
        let _ = cut.shutdown(Shutdown::Both);
    });
    let writing = stream.clone();
    thread::Builder::new()
        .name(format!("to-shim-{job}"))
        .spawn(move || write(&writing, &frames))?;
    let Opening {
        open,
        environment,
        arguments,
        script,
        held,
    } = opening;
    let attach = Attach {
        session,
        open: *open,
        environment,
        arguments,
        script,
        held: Some(held),
        to: to.clone(),
    };
    let turn = || budget.turn(uid).map_err(|e| Refused::node(e.to_string()));
    match node.attach(attach, uid, turn) {
        // The writer says it and closes; nothing more is read.
        Err(refused) => {
            to.send(failed(refused));
            return Ok(());
        }
        Ok(Admission::Answered) => return Ok(()),
        Ok(Admission::Left) => {
            reader.get_mut().without_end()?;
            return until_its_end(&mut reader, &to);
        }
        Ok(Admission::Attached) => {}
    }
    // From here on the owner has the only way to the shim: when it lets go of it, the connection is closed.
    drop(to);
    reader.get_mut().without_end()?;
    let result = relay(&mut reader, node, budget, uid, job, session);
    if let Some(owner) = node.owner_for(job, uid) {
        let _ = owner.send(Request::Detach { session });
    }
    let _ = stream.shutdown(Shutdown::Both);
    result
}

fn full(full: Full) -> io::Error {
    io::Error::new(io::ErrorKind::OutOfMemory, full)
}

fn too_large(kind: Kind, size: usize) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("a frame {kind:?} of {size} bytes here"))
}

fn failed(refused: Refused) -> Frame<ToShim> {
    Frame::Control(ToShim::Failed {
        outcome: refused.outcome.into(),
        why: refused.why,
    })
}

/// Reads what opens the session; `None` when the shim went away. Where its user has no room left the connection is closed, and the
/// shim tries again.
fn opening(reader: &mut impl io::Read, budget: &Arc<Budget>, uid: u32) -> io::Result<Option<Opening>> {
    let mut held = budget.bytes(uid, BYTES_AT_FIRST).map_err(full)?;
    let (mut environment, mut arguments, mut script) = (Vec::new(), Vec::new(), None);
    loop {
        let may = |kind, size| match kind {
            Kind::Control if size <= OPENING_BYTES => held.grow(size * COPIES).map_err(full),
            Kind::Blob => held.grow(size * COPIES).map_err(full),
            Kind::Control | Kind::Data => Err(too_large(kind, size)),
        };
        match read_frame_if::<ToAgent>(reader, may)? {
            Some(Frame::Environment(b)) => environment = b,
            Some(Frame::Arguments(b)) => arguments = b,
            Some(Frame::Script(b)) => script = Some(b),
            Some(Frame::Control(ToAgent::Open(open))) => {
                return Ok(Some(Opening {
                    open,
                    environment,
                    arguments,
                    script,
                    held,
                }));
            }
            Some(other) => return Err(io::Error::other(format!("before the opening of a session: {other:?}"))),
            None => return Ok(None),
        }
    }
}

/// What can be said without looking at the job.
fn admissible<'a>(opening: &Opening, roles: &'a Roles, budget: &Arc<Budget>, uid: u32) -> Result<(&'a Arc<Node>, Held), Refused> {
    let node = roles.node.as_ref().ok_or_else(|| Refused::node("this agent has no node role"))?;
    let open = &opening.open;
    if open.version != VERSION {
        return Err(Refused::node(format!(
            "the shim speaks version {} and the agent version {VERSION}: update both",
            open.version
        )));
    }
    if open.user.uid != uid && uid != 0 {
        return Err(Refused::request(format!("uid {uid} cannot run a program as uid {}", open.user.uid)));
    }
    for (what, bytes) in [("environment", &opening.environment), ("argument vector", &opening.arguments)] {
        if bytes.split(|b| *b == 0).count() > STRINGS {
            return Err(Refused::request(format!("the {what} has more than {STRINGS} strings")));
        }
    }
    let seat = budget.session(uid, open.job).map_err(|e| Refused::node(e.to_string()))?;
    Ok((node, seat))
}

/// The writer: ends when the owner has dropped its sender, at the first failed write, or when the session was cut; closes the connection.
fn write(stream: &Arc<UnixStream>, frames: &Outbox) {
    let mut socket = BufWriter::with_capacity(BUFFER, &**stream);
    while let Some(frame) = frames.next() {
        let mut done = write_frame(&mut socket, &frame);
        // What is there already goes out in one piece.
        while done.is_ok()
            && let Some(next) = frames.next_at_once()
        {
            done = write_frame(&mut socket, &next);
        }
        if done.and_then(|()| socket.flush()).is_err() {
            break;
        }
    }
    // What was written can still be read at the other end.
    let _ = stream.shutdown(Shutdown::Both);
}

/// Passes frames on to the owner.
fn relay(reader: &mut impl io::Read, node: &Arc<Node>, budget: &Arc<Budget>, uid: u32, job: u32, session: u64) -> io::Result<()> {
    let window = Window::default();
    loop {
        let mut held = None;
        let may = |kind, size| match kind {
            Kind::Control if size <= CONTROL_BYTES => Ok(()),
            Kind::Data if size <= MAX_DATA + 8 => {
                held = Some(budget.bytes(uid, size).map_err(full)?);
                Ok(())
            }
            _ => Err(too_large(kind, size)),
        };
        let Some(frame) = read_frame_if::<ToAgent>(reader, may)? else {
            return Ok(());
        };
        let pass = window.pass(held);
        // A VM that begins anew has another owner: ask for it each time.
        if let Some(owner) = node.owner_for(job, uid) {
            let _ = owner.send(Request::FromShim { session, frame, pass });
        }
    }
}

/// The VM is not here any more: Slurm ends this shim, which only has to learn that it goes quietly.
fn until_its_end(reader: &mut impl io::Read, to: &ToSession) -> io::Result<()> {
    loop {
        let may = |kind, size| if size <= MAX_DATA + 8 { Ok(()) } else { Err(too_large(kind, size)) };
        match read_frame_if::<ToAgent>(reader, may)? {
            Some(Frame::Control(ToAgent::WhyTerm)) => to.send(Frame::Control(ToShim::Cause(Cause::Moved))),
            Some(_) => {}
            None => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::Bounds;

    #[test]
    fn what_opens_a_session_is_charged_to_its_user_before_it_is_read() {
        let budget = Budget::new(Bounds {
            bytes_per_user: 1 << 20,
            ..Bounds::default()
        });
        // An opening of almost a MiB, of which not a byte may be taken in.
        let size = u32::try_from(OPENING_BYTES).unwrap();
        let mut frame = Vec::new();
        write_frame(&mut frame, &Frame::Control(ToAgent::WhyTerm)).unwrap();
        let kind = frame[4];
        let mut head = size.to_le_bytes().to_vec();
        head.push(kind);
        let refused = opening(&mut &head[..], &budget, 2001).map(|o| o.is_some()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::OutOfMemory, "{refused}");
        assert_eq!(budget.bytes_of(2001), 0);
    }
}
