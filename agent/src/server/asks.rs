//! `svm`'s questions.
use std::{
    io::{self, BufWriter, Write},
    os::unix::net::UnixStream,
    path::Path,
    sync::Arc,
    time::Duration,
};

use slurm_vm_api::query::{Answer, Ask, VmView};

use super::Roles;
use crate::{
    limits::{Budget, Held},
    node::Node,
};

/// How often a followed log is looked at.
const FOLLOW: Duration = Duration::from_millis(200);

/// Answers one question, or says why it is none. A user has few of them under way, and where Slurm is behind them they have a pace.
pub fn serve(stream: &UnixStream, roles: &Roles, budget: &Arc<Budget>, uid: u32, asked: Result<Ask, String>) -> io::Result<()> {
    let mut out = BufWriter::new(stream);
    let mut say = |answer: Answer| -> io::Result<()> {
        serde_json::to_writer(&mut out, &answer)?;
        out.write_all(b"\n")?;
        out.flush()
    };
    let ask = match asked {
        Ok(ask) => ask,
        Err(why) => return say(Answer::Refused(why)),
    };
    let end = match admitted(roles, budget, uid).and_then(|_question| answer(&ask, roles, uid, &mut say)) {
        Ok(()) => Answer::Done,
        Err(Refusal::Says(why)) => Answer::Refused(why),
        Err(Refusal::Io(e)) => return Err(e),
    };
    say(end)
}

/// A place among the user's questions; held until it is answered.
fn admitted(roles: &Roles, budget: &Arc<Budget>, uid: u32) -> Result<Option<Held>, Refusal> {
    if roles.is_operator(uid) {
        return Ok(None);
    }
    let question = budget.question(uid).map_err(|e| e.to_string())?;
    if roles.controller.is_some() {
        // Only its beginning has a pace: to follow a move may take hours.
        drop(budget.turn(uid).map_err(|e| e.to_string())?);
    }
    Ok(Some(question))
}

/// Why there is no answer.
#[derive(Debug)]
pub enum Refusal {
    /// For the asker.
    Says(String),
    /// The asker is gone.
    Io(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(e: io::Error) -> Self {
        Self::Io(e)
    }
}

impl From<String> for Refusal {
    fn from(why: String) -> Self {
        Self::Says(why)
    }
}

fn answer(ask: &Ask, roles: &Roles, uid: u32, say: &mut dyn FnMut(Answer) -> io::Result<()>) -> Result<(), Refusal> {
    let may_see = |v: &VmView| roles.is_operator(uid) || v.uid == uid;
    if let Some(controller) = &roles.controller {
        return controller.answer(ask, uid, roles.is_operator(uid), say);
    }
    let Some(node) = &roles.node else {
        return Err("this agent has neither the node nor the controller role".to_owned().into());
    };
    match ask {
        Ask::List => {
            let views: Vec<VmView> = node.views().into_iter().filter(may_see).collect();
            let totals = node.totals(&views);
            for v in views {
                say(Answer::Vm(Box::new(v)))?;
            }
            say(Answer::Totals(Box::new(totals)))?;
        }
        Ask::Show { job } => say(Answer::Vm(Box::new(find(node, *job, &may_see)?)))?,
        Ask::Log { job, follow } => {
            let view = find(node, *job, &may_see)?;
            log(node, &view.domain, *job, *follow, say)?;
        }
        Ask::Health => say(Answer::Node(crate::node::health::of(node)))?,
        Ask::Migrate { .. } | Ask::CancelMigration { .. } | Ask::Check => {
            return Err("only the controller does this: ask on the slurmctld host".to_owned().into());
        }
    }
    Ok(())
}

fn find(node: &std::sync::Arc<Node>, job: u32, may_see: &dyn Fn(&VmView) -> bool) -> Result<VmView, Refusal> {
    // Nobody learns that another user's job exists.
    node.view(job)
        .filter(|v| may_see(v))
        .ok_or_else(|| format!("job {job} has no VM on {}", node.name).into())
}

/// Journal, then serial log; with `follow` until the VM is over here.
fn log(
    node: &std::sync::Arc<Node>,
    domain: &str,
    job: u32,
    follow: bool,
    say: &mut dyn FnMut(Answer) -> io::Result<()>,
) -> Result<(), Refusal> {
    let dir = node.world.store.vm_dir(domain);
    let mut journal = Tail::new(&dir.join("journal.log"), "");
    let mut serial = Tail::new(&dir.join("serial.log"), "guest| ");
    loop {
        for text in [journal.more()?, serial.more()?].into_iter().flatten() {
            say(Answer::Text(text))?;
        }
        if !follow || node.owner(job).is_none() {
            return Ok(());
        }
        node.world.clock.sleep(FOLLOW);
    }
}

/// Whole log texts of a VM, for answers that go through a peer.
#[must_use]
pub fn log_text(node: &Node, domain: &str, journal_from: u64, serial_from: u64) -> (Vec<u8>, Vec<u8>) {
    let dir = node.world.store.vm_dir(domain);
    (
        read_from(&dir.join("journal.log"), journal_from).unwrap_or_default(),
        read_from(&dir.join("serial.log"), serial_from).unwrap_or_default(),
    )
}

/// At most this many bytes of a log are read at a time.
const CHUNK: u64 = 256 << 10;

fn read_from(path: &Path, offset: u64) -> io::Result<Vec<u8>> {
    use io::{Read, Seek};
    let mut file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    file.seek(io::SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    file.take(CHUNK).read_to_end(&mut bytes)?;
    Ok(bytes)
}

struct Tail {
    path: std::path::PathBuf,
    prefix: &'static str,
    offset: u64,
}

impl Tail {
    fn new(path: &Path, prefix: &'static str) -> Self {
        Self {
            path: path.into(),
            prefix,
            offset: 0,
        }
    }

    /// What has come since, line by line behind the prefix.
    fn more(&mut self) -> io::Result<Option<String>> {
        let bytes = read_from(&self.path, self.offset)?;
        self.offset += bytes.len() as u64;
        Ok((!bytes.is_empty()).then(|| prefixed(&bytes, self.prefix)))
    }
}

/// Text of a log with a prefix before each line; control characters other than tab do not reach the terminal.
#[must_use]
pub fn prefixed(bytes: &[u8], prefix: &str) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut out = String::with_capacity(text.len() + 64);
    for line in text.lines() {
        out.push_str(prefix);
        out.extend(line.chars().filter(|c| *c == '\t' || !c.is_control()));
        out.push('\n');
    }
    out
}
