//! The way of each byte of a job's output: written by its program in the guest, passed on and kept by the agent's [`Programs`], put into the job's file by
//! the shim's [`Durable`]. Both are the production code. What is played is the guest, whose bytes say by themselves which they are, and the
//! connections, which break with agents, shims and moves. When a job has ended its file must hold what its last guest wrote, byte for byte.
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use nix::errno::Errno;
use slurm_vm::{
    core::{Effect, KeptOutput, Life, SessionNews, registry::is_for_a_later_run},
    hypervisor::DomainState,
    limits::{Bounds, Budget},
    shim::{durable::Durable, file::Store},
    vm::{
        Attach,
        outbox::{Outbox, outbox},
        programs::{Kept, ToGuest},
    },
};
use slurm_vm_api::{
    guest::{ExitStatus, ProgramReport, ProgramState, RING_BYTES, StartReport, Stream as GuestStream, StreamReport},
    session::{self, Frame, Open, Sink, StepKind, Stream, ToShim, UserEntry},
    spec::VmSpec,
};

use crate::cluster::{Cluster, Owner, domain};

/// A program writes a byte for so much work: two in half a second.
const WORK_PER_BYTE: u64 = 250;
/// Bytes of a guest at a time.
const PIECE: u64 = 64;
const PROGRAM: u32 = 1;

/// What the program in a job's guest has done. It goes with the guest's memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct Guest {
    /// Which boot of the job's guests it is.
    boot: u32,
    /// The work at which the program was started.
    started: Option<u64>,
    /// First byte that is still in the ring.
    acked: u64,
}

/// The byte at an offset of the output of one boot.
fn byte(job: u32, boot: u32, offset: u64) -> u8 {
    let mixed = (u64::from(job) << 40 ^ u64::from(boot) << 32 ^ offset).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed.to_le_bytes()[6]
}

/// The link of an agent to a guest.
#[derive(Debug, Default)]
pub struct Link {
    /// The guest has answered.
    up: bool,
    /// Next byte to come.
    next: Option<u64>,
    told_end: bool,
}

/// A job's output file.
#[derive(Debug, Clone, Default)]
pub struct File(Arc<Mutex<Vec<u8>>>);

impl File {
    fn bytes(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap()
    }
}

impl Store for File {
    fn size(&self) -> Result<u64, Errno> {
        Ok(self.bytes().len() as u64)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(usize, u64), Errno> {
        let mut file = self.bytes();
        let at = file.len() as u64;
        file.extend(bytes);
        Ok((bytes.len(), at))
    }

    fn seek(&mut self, _: u64) -> Result<(), Errno> {
        Ok(())
    }

    fn read_at(&self, at: u64, into: &mut [u8]) -> Result<usize, Errno> {
        let file = self.bytes();
        let there = file.get(usize::try_from(at).unwrap()..).unwrap_or_default();
        let n = there.len().min(into.len());
        into[..n].copy_from_slice(&there[..n]);
        Ok(n)
    }

    fn write_at(&mut self, at: u64, bytes: &[u8]) -> Result<usize, Errno> {
        let mut file = self.bytes();
        let at = usize::try_from(at).unwrap();
        let end = (at + bytes.len()).max(file.len());
        file.resize(end, 0);
        file[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(bytes.len())
    }

    fn sync(&mut self) -> Result<(), Errno> {
        Ok(())
    }

    fn forget(&self, _: u64) {}

    fn empty(&mut self) -> Result<(), Errno> {
        self.bytes().clear();
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Opening,
    Running,
    HandedOver,
}

/// The shim of one run of a job.
#[derive(Debug)]
pub struct Shim {
    restarts: u32,
    phase: Phase,
    file: Durable<File>,
    sink: Sink,
    queue: VecDeque<u8>,
    acked: u64,
    exited: bool,
    session: Option<Session>,
}

#[derive(Debug)]
struct Session {
    node: String,
    epoch: u64,
    id: u64,
    from: Outbox,
}

impl Shim {
    fn new(job: u32, restarts: u32, file: &File) -> Self {
        let base = file.size().unwrap();
        Self {
            restarts,
            phase: Phase::Opening,
            file: Durable::new(file.clone(), base),
            sink: Sink {
                regular: true,
                dev: 1,
                ino: job.into(),
                base,
                end: None,
            },
            queue: VecDeque::new(),
            acked: 0,
            exited: false,
            session: None,
        }
    }

    fn received(&self) -> u64 {
        self.file.written() + self.queue.len() as u64
    }

    fn open(&self, job: u32, user: UserEntry, spec: VmSpec) -> Open {
        let resume = if self.phase == Phase::Opening {
            vec![]
        } else {
            vec![(Stream::Stdout, self.file.synced())]
        };
        let mut sink = self.sink.clone();
        if self.phase == Phase::Opening {
            // It is emptied when the program starts.
            sink.base = 0;
        }
        Open {
            version: session::VERSION,
            job,
            step: session::BATCH_STEP,
            task: 0,
            restart: self.restarts,
            kind: StepKind::Batch,
            spec,
            cwd: "/".into(),
            umask: 0,
            groups: vec![],
            user,
            rlimits: vec![],
            terminal: None,
            merge_stderr: true,
            stdout: sink.clone(),
            stderr: sink,
            resume,
        }
    }
}

impl Cluster {
    fn instant(&self) -> Instant {
        self.begun + Duration::from_millis(self.now)
    }

    // The guest.

    /// A guest that was booted from nothing since the last look has no program yet.
    fn look_at_boots(&mut self, node: &str, job: u32) {
        let Some(record) = self.nodes[node].vms.get(&job).map(|o| &o.vm.record) else {
            return;
        };
        let boot = self.world.boots(record.uuid());
        if self.guests.get(&job).is_none_or(|g| g.boot != boot) {
            let fresh = Guest { boot, ..Guest::default() };
            self.guests.insert(job, fresh);
        }
    }

    /// How much the program has written, and whether that is all.
    fn produced(&self, node: &str, job: u32) -> (u64, bool) {
        let work = self.hypervisors[node].work(&domain(job)).unwrap_or(0);
        let last = self.vm_jobs[&job];
        let begun = self.guests.get(&job).and_then(|g| g.started);
        let bytes = begun.map_or(0, |begun| work.min(last.max(begun)).saturating_sub(begun) / WORK_PER_BYTE);
        (bytes, begun.is_some() && work >= last)
    }

    fn report(&self, node: &str, job: u32) -> Vec<ProgramReport> {
        let (end, eof) = self.produced(node, job);
        let known = self.guests.get(&job).filter(|g| g.started.is_some());
        let report = |guest: &Guest| ProgramReport {
            program: PROGRAM,
            state: if eof {
                ProgramState::Exited {
                    status: ExitStatus::Code { code: 0 },
                }
            } else {
                ProgramState::Running
            },
            report: StartReport::default(),
            stdin_consumed: 0,
            streams: vec![StreamReport {
                stream: GuestStream::Stdout,
                start: guest.acked,
                end,
                eof,
                ring_bytes: RING_BYTES,
            }],
        };
        known.map(report).into_iter().collect()
    }

    // The agent's end of the guest.

    fn owner_of(&mut self, node: &str, job: u32) -> Option<&mut Owner> {
        self.nodes.get_mut(node).and_then(|n| n.vms.get_mut(&job))
    }

    pub fn guest_answers(&mut self, node: &str, job: u32) {
        self.look_at_boots(node, job);
        let hello = self.report(node, job);
        let Some(owner) = self.owner_of(node, job).filter(|o| o.link != 0) else {
            return;
        };
        owner.guest.up = true;
        let requests = owner.programs.guest_up(&hello);
        self.send_guest(node, job, requests);
        self.sync_programs(node, job);
    }

    pub fn guest_closed(&mut self, node: &str, job: u32) {
        if let Some(owner) = self.owner_of(node, job) {
            owner.guest = Link::default();
            owner.programs.link_gone();
        }
    }

    /// Output of all guests whose link is up.
    pub fn guests_write(&mut self) {
        let of = |(name, n): (&String, &crate::cluster::Node)| n.vms.keys().map(|job| (name.clone(), *job)).collect::<Vec<_>>();
        for (node, job) in self.nodes.iter().flat_map(of).collect::<Vec<_>>() {
            let runs = self.hypervisors[&node].peek(&domain(job)) == Some(DomainState::Running);
            if !runs || self.rough(30) {
                continue;
            }
            let (end, eof) = self.produced(&node, job);
            let boot = self.guests.get(&job).map_or(0, |g| g.boot);
            let Some(owner) = self.owner_of(&node, job).filter(|o| o.guest.up) else {
                continue;
            };
            let Some(next) = owner.guest.next else { continue };
            if next < end {
                let to = end.min(next + PIECE);
                let bytes: Vec<u8> = (next..to).map(|k| byte(job, boot, k)).collect();
                owner.guest.next = Some(to);
                let requests = owner.programs.data(PROGRAM, GuestStream::Stdout, next, &bytes);
                self.send_guest(&node, job, requests);
            } else if eof && !owner.guest.told_end {
                owner.guest.told_end = true;
                let status = ExitStatus::Code { code: 0 };
                let requests = owner.programs.exited(PROGRAM, status, &[(GuestStream::Stdout, end)]);
                self.send_guest(&node, job, requests);
                self.sync_programs(&node, job);
            }
        }
    }

    /// Ends and offsets go to the ledger.
    fn sync_programs(&mut self, node: &str, job: u32) {
        self.carry_out(node, job, vec![Effect::Persist]);
    }

    pub fn send_guest(&mut self, node: &str, job: u32, requests: Vec<ToGuest>) {
        for request in requests {
            let (produced, _) = self.produced(node, job);
            let work = self.hypervisors[node].work(&domain(job)).unwrap_or(0);
            let Some(guest) = self.guests.get_mut(&job) else { return };
            let Some(owner) = self.nodes.get_mut(node).and_then(|n| n.vms.get_mut(&job)) else {
                return;
            };
            // A guest that runs elsewhere, or not at all, hears nothing.
            if !owner.guest.up || self.hypervisors[node].peek(&domain(job)) != Some(DomainState::Running) {
                return;
            }
            let more = match request {
                start @ ToGuest::Start { .. } if owner.gate.is_shut().is_some() => {
                    owner.unstarted.push(start);
                    vec![]
                }
                ToGuest::Start { program, .. } => {
                    guest.started.get_or_insert(work);
                    owner.guest.next = Some(0);
                    owner.programs.started(program, &StartReport::default())
                }
                ToGuest::Resume { program, stream, from } => {
                    owner.guest.next = Some(from.max(guest.acked));
                    if from < guest.acked {
                        owner.programs.lost_before(program, stream, guest.acked)
                    } else {
                        vec![]
                    }
                }
                ToGuest::Ack { offset, .. } => {
                    if offset > produced {
                        self.wrong.push(format!(
                            "job {job}: {node} acknowledges byte {offset}, and the program has written {produced}"
                        ));
                    }
                    guest.acked = guest.acked.max(offset);
                    vec![]
                }
                _ => vec![],
            };
            self.send_guest(node, job, more);
        }
    }

    // Sessions.

    pub fn tell_sessions(&mut self, node: &str, job: u32, news: &SessionNews) {
        if let Some(owner) = self.owner_of(node, job) {
            match news {
                SessionNews::Left => owner.programs.tell_all(&ToShim::HandOver),
                SessionNews::TakeBack => owner.programs.tell_all(&ToShim::TakeBack),
                SessionNews::Progress(_) | SessionNews::Ready | SessionNews::Lost(_) => {}
            }
        }
    }

    /// The shims of a VM that leaves report, if they are quick enough. Returns what is kept for the next one.
    pub fn shims_hand_over(&mut self, node: &str, job: u32) -> Vec<Kept> {
        if !self.rough(100) {
            self.shim_hears(job);
        }
        let Some(owner) = self.owner_of(node, job) else { return vec![] };
        owner.vm.record.programs = owner.programs.records();
        owner.programs.spools()
    }

    pub fn keep(&mut self, node: &str, job: u32, o: &KeptOutput) {
        if let Some(owner) = self.owner_of(node, job) {
            owner.programs.take_spool(o.program, o.stream, o.offset, &o.bytes);
        }
    }

    /// The job's shim ends, with whatever it has in hand.
    fn shim_ends(&mut self, job: u32) {
        let Some(shim) = self.shims.remove(&job) else { return };
        if let Some(session) = shim.session
            && self.is(&session.node, session.epoch)
            && let Some(owner) = self.owner_of(&session.node, job)
        {
            owner.programs.detach(session.id);
            owner.vm.record.programs = owner.programs.records();
            let node = session.node;
            self.retire(&node, job);
        }
    }

    /// The job's run is over on its node, and its shim with it.
    pub fn shim_is_killed(&mut self, job: u32, restarts: u32) {
        if self.shims.get(&job).is_some_and(|s| s.restarts == restarts) {
            self.shim_ends(job);
        }
    }

    /// One turn of the shim of a job's run: connects, takes what has come, writes, reports. True when its program has ended and all of its output
    /// is in the file.
    pub fn shim_turn(&mut self, node: &str, job: u32, restarts: u32) -> bool {
        if self.shims.get(&job).is_some_and(|s| s.restarts != restarts) {
            self.shim_ends(job);
        }
        if !self.shims.contains_key(&job) {
            let file = self.files.entry(job).or_default().clone();
            self.shims.insert(job, Shim::new(job, restarts, &file));
        }
        if self.rough(4) {
            self.say(&format!("job {job}: its connection to the agent breaks"));
            self.shim_loses(job);
        }
        let lost = self.shims[&job]
            .session
            .as_ref()
            .is_some_and(|s| !self.is(&s.node, s.epoch) || s.node != node);
        if lost && let Some(shim) = self.shims.get_mut(&job) {
            shim.session = None;
        }
        if self.shims[&job].session.is_none() {
            self.shim_connects(node, job);
        }
        self.shim_hears(job)
    }

    /// Its connection is gone: the agent learns it as well.
    fn shim_loses(&mut self, job: u32) {
        let Some(session) = self.shims.get_mut(&job).and_then(|s| s.session.take()) else {
            return;
        };
        if self.is(&session.node, session.epoch)
            && let Some(owner) = self.owner_of(&session.node, job)
        {
            owner.programs.detach(session.id);
        }
    }

    fn shim_connects(&mut self, node: &str, job: u32) {
        let now = self.instant();
        let (id, epoch) = (self.id(), self.nodes[node].epoch);
        let Some(owner) = self.nodes.get_mut(node).and_then(|n| n.vms.get_mut(&job)) else {
            return;
        };
        let Some(shim) = self.shims.get_mut(&job) else { return };
        let may = matches!(
            owner.vm.record.life,
            Life::Running | Life::AwaitingJob { .. } | Life::Leaving { .. }
        );
        if !may || owner.gate.is_shut().is_some() || is_for_a_later_run(&owner.vm.record, shim.restarts) {
            return;
        }
        if shim.phase == Phase::Running {
            let _ = shim.file.secure(now);
        }
        let (to, from) = outbox(Budget::new(Bounds::default()).bytes(2001, 0).unwrap(), || {});
        let open = shim.open(job, owner.vm.record.user.clone(), owner.vm.record.spec.clone());
        shim.session = Some(Session {
            node: node.into(),
            epoch,
            id,
            from,
        });
        owner.vm.record.run_state.restart = owner.vm.record.run_state.restart.max(shim.restarts);
        let (_, requests) = owner.programs.attach(
            Attach {
                session: id,
                open,
                environment: vec![],
                arguments: vec![],
                script: None,
                held: None,
                to,
            },
            owner.vm.record.run,
        );
        self.sync_programs(node, job);
        self.send_guest(node, job, requests);
    }

    /// Takes what has come and writes it.
    fn shim_hears(&mut self, job: u32) -> bool {
        let now = self.instant();
        let mut reports = Vec::new();
        let mut handed_over = None;
        let mut reopen = false;
        let Some(shim) = self.shims.get_mut(&job) else { return false };
        let Some(session) = &shim.session else { return false };
        let (node, epoch, id) = (session.node.clone(), session.epoch, session.id);
        while let Some(frame) = shim.session.as_ref().and_then(|s| s.from.next_at_once()) {
            match frame {
                Frame::Data { offset, bytes, .. } if shim.phase != Phase::HandedOver => {
                    let Some(had) = shim.received().checked_sub(offset) else {
                        reopen = true;
                        break;
                    };
                    let new = usize::try_from(had).ok().and_then(|had| bytes.get(had..)).unwrap_or_default();
                    shim.queue.extend(new);
                }
                Frame::Control(ToShim::Started { from, resumed }) => {
                    let first = shim.phase == Phase::Opening;
                    for start in from.iter().filter(|s| s.stream == Stream::Stdout) {
                        if first && resumed {
                            shim.queue.clear();
                            shim.acked = start.offset;
                            let before = start.sink.as_ref().filter(|s| s.regular && s.ino == shim.sink.ino);
                            shim.file.resume(start.offset, before).unwrap();
                            shim.sink.base = shim.file.base();
                        } else if start.offset > shim.received() {
                            shim.queue.clear();
                            shim.file.skip(start.offset - shim.file.written());
                        }
                    }
                    if first && !resumed {
                        shim.file.empty().unwrap();
                        shim.sink.base = 0;
                    }
                    shim.phase = Phase::Running;
                }
                Frame::Control(ToShim::HandOver) if shim.exited && shim.queue.is_empty() && shim.file.is_settled() => {}
                Frame::Control(ToShim::HandOver) => {
                    shim.exited = false;
                    shim.phase = Phase::HandedOver;
                    shim.queue.clear();
                    shim.sink.end = shim.file.secure(now);
                    shim.sink.base = shim.file.base();
                    handed_over = Some((shim.file.synced(), shim.sink.clone()));
                }
                Frame::Control(ToShim::TakeBack) => {
                    shim.phase = Phase::Running;
                    reopen = true;
                    break;
                }
                Frame::Control(ToShim::Exited(_)) if shim.phase != Phase::HandedOver => {
                    shim.exited = true;
                    shim.file.finish();
                }
                _ => {}
            }
        }
        if shim.phase == Phase::Running {
            shim.file.advance(&mut shim.queue, now).unwrap();
            let synced = shim.file.synced();
            if synced > shim.acked {
                shim.acked = synced;
                reports.push(synced);
            }
        }
        let done = shim.exited && shim.queue.is_empty() && shim.file.is_settled();
        if reopen {
            self.shim_loses(job);
        }
        if self.is(&node, epoch) {
            for offset in reports {
                let requests = self.owner_of(&node, job).map(|o| o.programs.wrote(id, Stream::Stdout, offset));
                self.send_guest(&node, job, requests.unwrap_or_default());
            }
            if let Some((wrote, sink)) = handed_over
                && let Some(owner) = self.owner_of(&node, job)
            {
                owner.programs.sealed(id, &[(Stream::Stdout, sink)]);
                let requests = owner.programs.wrote(id, Stream::Stdout, wrote);
                self.send_guest(&node, job, requests);
            }
        }
        done
    }

    /// A job has ended well: its file holds what its last guest's program wrote, and nothing else.
    pub fn check_output(&mut self, job: u32) {
        let Guest { boot, started, .. } = self.guests.get(&job).copied().unwrap_or_default();
        let end = started.map_or(0, |begun| self.vm_jobs[&job].saturating_sub(begun) / WORK_PER_BYTE);
        let wanted: Vec<u8> = (0..end).map(|k| byte(job, boot, k)).collect();
        let file = self.files.entry(job).or_default().bytes().clone();
        self.count("outputs that were compared");
        if file == wanted {
            return;
        }
        let at = file.iter().zip(&wanted).take_while(|(a, b)| a == b).count();
        self.wrong.push(format!(
            "job {job}: its output has {} bytes for {}, and differs from byte {at} on",
            file.len(),
            wanted.len()
        ));
    }
}
