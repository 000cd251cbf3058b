//! A hypervisor in memory: for the seeded simulation and for tests of what stands on [`Hypervisor`].
//!
//! A [`World`] holds the domains of N nodes; each node's agent gets a [`FakeHypervisor`] of it. A migration moves a domain from one node of the world to
//! another. Nothing here is random, looks at a clock or starts a thread: the same calls give the same world.
//!
//! What a guest has done is one number, its *work*: [`World::tick`] adds to it wherever the guest runs; it moves and is saved with the guest's memory.
//! The world watches, at every step, what must never happen, and keeps what it saw for [`World::violations`]:
//! * two nodes run one guest at a time;
//! * a guest's work goes back (an old save was restored, or a source was resumed after the destination ran);
//! * a guest is booted anew while a copy of it exists elsewhere.
//!
//! Faults are ordered beforehand ([`FakeHypervisor::fail_next`]): the next calls of a kind are refused, or are carried out and their answer lost, or
//! hold until they are let go or aborted.
#![forbid(unsafe_code)]

use super::{
    DomainEvent, DomainInfo, DomainMetadata, DomainSpec, DomainState, DomainType, HostInfo, Hypervisor, HypervisorError, JobProgress,
    MigrateOutcome, MigrateParams, Result, SaveFormat, SavedDomain, StateReason, StopReason, check_spec,
    libvirt::xml::{self, Flavor},
};
use crate::effects::Storage;
use crossbeam_channel::{Receiver, Sender, unbounded};
use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use uuid::Uuid;

/// The calls that faults can be ordered for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "named after the calls")]
pub enum Op {
    Ping,
    Host,
    Start,
    Suspend,
    Resume,
    Shutdown,
    Destroy,
    List,
    Info,
    Pin,
    SetMetadata,
    Migrate,
    /// The destination's part of a migration: ordered at the destination, seen by the source.
    Import,
    Save,
    Saved,
    Restore,
}

/// What happens to a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// It fails, and nothing was done.
    Refuse(HypervisorError),
    /// It is carried out, and its answer is lost: the caller sees [`HypervisorError::Connect`].
    LoseAnswer,
    /// It blocks its thread until [`FakeHypervisor::let_go`]; a migration or save also until [`Hypervisor::abort_job`]. A ping that is held is
    /// answered by a timeout at once.
    Hold,
}

#[derive(Debug, Clone)]
struct Guest {
    spec: DomainSpec,
    state: DomainState,
    reason: StateReason,
    work: u64,
    memory_in_use: u64,
    dirty_rate: u64,
    measured: bool,
    /// A job that is held: `Some(true)` once it is aborted.
    job: Option<bool>,
}

#[derive(Debug, Clone)]
struct Image {
    guest: Guest,
    format: SaveFormat,
}

#[derive(Debug, Default)]
struct Node {
    guests: BTreeMap<String, Guest>,
    foreign: Vec<String>,
    faults: HashMap<Op, VecDeque<Fault>>,
    subscribers: Vec<Sender<DomainEvent>>,
    cut: bool,
    /// Calls that are held now; the last ticket that was given to one; the last ticket that was let go.
    held: u32,
    ticket: u64,
    let_go: u64,
    host: HostInfo,
}

#[derive(Debug, Default)]
struct Inner {
    nodes: BTreeMap<String, Node>,
    routes: BTreeMap<String, String>,
    saves: BTreeMap<PathBuf, Image>,
    /// The most work that each guest was ever seen with.
    best: BTreeMap<Uuid, u64>,
    /// How often each guest was booted.
    boots: BTreeMap<Uuid, u32>,
    violations: Vec<String>,
    /// Where saved images lie; without it they lie nowhere, and are never lost.
    storage: Option<Storage>,
}

/// All nodes and their domains. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct World {
    inner: Arc<(Mutex<Inner>, Condvar)>,
}

impl World {
    /// An empty world.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A world whose saved images are files of this storage, written without a sync as libvirt writes them.
    #[must_use]
    pub fn on(storage: Storage) -> Self {
        let world = Self::default();
        world.lock().storage = Some(storage);
        world
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The hypervisor of a node, which is made when it is first asked for.
    #[must_use]
    pub fn node(&self, name: &str) -> FakeHypervisor {
        let mut inner = self.lock();
        let host = HostInfo {
            libvirt_version: "11.3.0".into(),
            hypervisor_version: "10.0.2".into(),
            hostname: name.into(),
            cpu_models: vec!["Nehalem".into(), "qemu64".into()],
            sparse_save: true,
            hard_limit: Some(true),
            ..HostInfo::default()
        };
        inner.nodes.entry(name.into()).or_insert_with(|| Node { host, ..Node::default() });
        drop(inner);
        FakeHypervisor {
            world: self.clone(),
            node: name.into(),
        }
    }

    /// Where a migration to this `libvirt_uri` arrives. Without a route the URI must end with `/NODE` or `=NODE`.
    pub fn route(&self, libvirt_uri: &str, node: &str) {
        self.lock().routes.insert(libvirt_uri.into(), node.into());
    }

    /// Lets all running guests work. Paused ones do not.
    pub fn tick(&self, work: u64) {
        let mut inner = self.lock();
        for guest in inner
            .nodes
            .values_mut()
            .flat_map(|n| n.guests.values_mut())
            .filter(|g| g.state == DomainState::Running)
        {
            guest.work += work;
        }
        inner.watch();
    }

    /// The nodes that run a guest now, of those that have it: more than one is a violation.
    #[must_use]
    pub fn running(&self, uuid: Uuid) -> Vec<String> {
        self.lock().running(uuid)
    }

    /// The most work that a guest was ever seen with.
    #[must_use]
    pub fn work(&self, uuid: Uuid) -> u64 {
        self.lock().best.get(&uuid).copied().unwrap_or(0)
    }

    /// How often a guest was booted from nothing.
    #[must_use]
    pub fn boots(&self, uuid: Uuid) -> u32 {
        self.lock().boots.get(&uuid).copied().unwrap_or(0)
    }

    /// How many domains of ours there are, on all nodes.
    #[must_use]
    pub fn domains(&self) -> usize {
        self.lock().nodes.values().map(|n| n.guests.len()).sum()
    }

    /// What has happened that must not. Empty in a good world.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }
}

impl Inner {
    fn running(&self, uuid: Uuid) -> Vec<String> {
        let runs = |n: &Node| n.guests.values().any(|g| g.spec.uuid == uuid && g.state == DomainState::Running);
        self.nodes.iter().filter(|(_, n)| runs(n)).map(|(name, _)| name.clone()).collect()
    }

    fn violation(&mut self, text: String) {
        if !self.violations.contains(&text) {
            self.violations.push(text);
        }
    }

    /// Looks at every running guest; called at the end of every change.
    fn watch(&mut self) {
        let mut seen: BTreeMap<Uuid, (String, u64)> = BTreeMap::new();
        let mut found = Vec::new();
        for (node, n) in &self.nodes {
            for g in n.guests.values().filter(|g| g.state == DomainState::Running) {
                if let Some((other, _)) = seen.insert(g.spec.uuid, (node.clone(), g.work)) {
                    found.push(format!("{} runs on {other} and on {node}", g.spec.name));
                }
                let best = self.best.get(&g.spec.uuid).copied().unwrap_or(0);
                if g.work < best {
                    found.push(format!("{} on {node} went back from work {best} to {}", g.spec.name, g.work));
                }
            }
        }
        for (uuid, (_, work)) in seen {
            let best = self.best.entry(uuid).or_default();
            *best = work.max(*best);
        }
        for text in found {
            self.violation(text);
        }
    }

    fn emit(&mut self, node: &str, event: &DomainEvent) {
        if let Some(n) = self.nodes.get_mut(node)
            && !n.cut
        {
            n.subscribers.retain(|s| s.send(event.clone()).is_ok());
        }
    }

    fn destination(&self, uri: &str) -> Option<String> {
        let by_name = |uri: &str| {
            self.nodes
                .keys()
                .find(|n| uri.ends_with(&format!("/{n}")) || uri.ends_with(&format!("={n}")))
                .cloned()
        };
        self.routes.get(uri).cloned().or_else(|| by_name(uri))
    }

    /// Takes a domain away, and says so.
    fn stop(&mut self, node: &str, name: &str, reason: StopReason) -> Option<Guest> {
        let guest = self.nodes.get_mut(node)?.guests.remove(name)?;
        self.emit(
            node,
            &DomainEvent::Stopped {
                name: name.into(),
                uuid: guest.spec.uuid,
                reason,
            },
        );
        Some(guest)
    }

    /// Puts a domain in, and says so.
    fn put(&mut self, node: &str, guest: Guest, reason: StateReason) {
        let (name, uuid, runs) = (guest.spec.name.clone(), guest.spec.uuid, guest.state == DomainState::Running);
        if let Some(n) = self.nodes.get_mut(node) {
            n.guests.insert(name.clone(), guest);
        }
        self.emit(
            node,
            &DomainEvent::Started {
                name: name.clone(),
                uuid,
                reason,
            },
        );
        let event = if runs {
            DomainEvent::Resumed { name, uuid, reason }
        } else {
            DomainEvent::Suspended { name, uuid, reason }
        };
        self.emit(node, &event);
        self.watch();
    }
}

/// One node of a [`World`] as its agent sees it.
#[derive(Debug, Clone)]
pub struct FakeHypervisor {
    world: World,
    node: String,
}

impl FakeHypervisor {
    /// Orders a fault for the next `times` calls of a kind, after those ordered before.
    pub fn fail_next(&self, op: Op, fault: Fault, times: usize) {
        self.with(|n| n.faults.entry(op).or_default().extend(std::iter::repeat_n(fault, times)));
    }

    /// Forgets all faults that are ordered and not yet used.
    pub fn clear_faults(&self) {
        self.with(|n| n.faults.clear());
    }

    /// Lets all calls go that are held now.
    pub fn let_go(&self) {
        self.with(|n| n.let_go = n.ticket);
        self.world.inner.1.notify_all();
    }

    /// How many calls are held now: for a test that waits until its call has got there.
    #[must_use]
    pub fn held(&self) -> u32 {
        self.with(|n| n.held)
    }

    /// Cuts the connection to the hypervisor, or brings it back. Guests go on.
    pub fn connect(&self, up: bool) {
        let mut inner = self.world.lock();
        if !up {
            inner.emit(&self.node, &DomainEvent::ConnectionLost);
        }
        if let Some(n) = inner.nodes.get_mut(&self.node) {
            n.cut = !up;
        }
        if up {
            inner.emit(&self.node, &DomainEvent::ConnectionBack);
        }
    }

    /// The node loses power: all its domains are gone, and nobody is told.
    pub fn power_off(&self) {
        self.with(|n| n.guests.clear());
    }

    /// A guest powers off, or panics.
    pub fn end_guest(&self, name: &str, panics: bool) {
        let mut inner = self.world.lock();
        let Some(uuid) = inner.nodes.get(&self.node).and_then(|n| n.guests.get(name)).map(|g| g.spec.uuid) else {
            return;
        };
        if panics {
            inner.emit(&self.node, &DomainEvent::Panicked { name: name.into(), uuid });
        }
        inner.stop(&self.node, name, if panics { StopReason::Crashed } else { StopReason::Shutdown });
    }

    /// Sets what [`Hypervisor::memory_in_use`] and [`Hypervisor::dirty_rate`] will say of a guest.
    pub fn set_load(&self, name: &str, memory_in_use: u64, dirty_rate: u64) {
        self.with(|n| {
            if let Some(g) = n.guests.get_mut(name) {
                (g.memory_in_use, g.dirty_rate) = (memory_in_use, dirty_rate);
            }
        });
    }

    /// Changes what [`Hypervisor::host`] says.
    pub fn set_host(&self, host: HostInfo) {
        self.with(|n| n.host = host);
    }

    /// Adds a domain that is not ours. It is never seen, but its name is taken.
    pub fn add_foreign(&self, name: &str) {
        self.with(|n| n.foreign.push(name.into()));
    }

    /// The domains that are not ours: what we must have left alone.
    #[must_use]
    pub fn foreign(&self) -> Vec<String> {
        self.with(|n| n.foreign.clone())
    }

    /// A domain's state as it is, whatever faults are ordered and whether or not the connection is cut: for the test's own eyes.
    #[must_use]
    pub fn peek(&self, name: &str) -> Option<DomainState> {
        self.with(|n| n.guests.get(name).map(|g| g.state))
    }

    /// A running guest's work so far.
    #[must_use]
    pub fn work(&self, name: &str) -> Option<u64> {
        self.with(|n| n.guests.get(name).map(|g| g.work))
    }

    fn with<T>(&self, f: impl FnOnce(&mut Node) -> T) -> T {
        f(self.world.lock().nodes.entry(self.node.clone()).or_default())
    }

    fn lost(&self) -> HypervisorError {
        HypervisorError::Connect {
            uri: format!("fake:///{}", self.node),
            message: "the connection is cut".into(),
        }
    }

    fn fault(&self, node: &str, op: Op) -> Option<Fault> {
        let mut inner = self.world.lock();
        inner.nodes.get_mut(node)?.faults.get_mut(&op)?.pop_front()
    }

    /// Blocks until the call is let go; `true` if the job of `name` was aborted instead.
    fn hold(&self, name: Option<&str>) -> bool {
        let mut inner = self.world.lock();
        let Some(n) = inner.nodes.get_mut(&self.node) else { return false };
        n.held += 1;
        n.ticket += 1;
        let ticket = n.ticket;
        if let Some(g) = name.and_then(|name| n.guests.get_mut(name)) {
            g.job = Some(false);
        }
        self.world.inner.1.notify_all();
        loop {
            let Some(n) = inner.nodes.get_mut(&self.node) else { return false };
            // A domain that was destroyed under its job ends the job.
            let aborted = name.is_some_and(|name| n.guests.get(name).is_none_or(|g| g.job == Some(true)));
            if aborted || n.let_go >= ticket {
                n.held -= 1;
                if let Some(g) = name.and_then(|name| n.guests.get_mut(name)) {
                    g.job = None;
                }
                return aborted;
            }
            inner = self.world.inner.1.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The frame of every call: cut connection, ordered faults, then the call itself on the locked world.
    fn call<T>(&self, op: Op, name: Option<&str>, act: impl FnOnce(&mut Inner, &str) -> Result<T>) -> Result<T> {
        if self.with(|n| n.cut) {
            return Err(self.lost());
        }
        let fault = self.fault(&self.node, op);
        match &fault {
            Some(Fault::Refuse(e)) => return Err(e.clone()),
            Some(Fault::Hold) => {
                let job = name.filter(|_| matches!(op, Op::Migrate | Op::Save));
                if self.hold(job) {
                    return Err(HypervisorError::Aborted {
                        call: "job",
                        message: "aborted by its owner".into(),
                    });
                }
                if self.with(|n| n.cut) {
                    return Err(self.lost());
                }
            }
            Some(Fault::LoseAnswer) | None => {}
        }
        let done = act(&mut self.world.lock(), &self.node);
        if fault == Some(Fault::LoseAnswer) { Err(self.lost()) } else { done }
    }

    fn change(&self, op: Op, name: &str, act: impl FnOnce(&mut Guest) -> Option<DomainEvent>) -> Result<()> {
        self.call(op, Some(name), |inner, node| {
            let event = act(guest(inner, node, name)?);
            if let Some(event) = event {
                inner.emit(node, &event);
            }
            inner.watch();
            Ok(())
        })
    }
}

fn guest<'a>(inner: &'a mut Inner, node: &str, name: &str) -> Result<&'a mut Guest> {
    inner
        .nodes
        .get_mut(node)
        .and_then(|n| n.guests.get_mut(name))
        .ok_or_else(|| HypervisorError::NoDomain { name: name.into() })
}

fn info(g: &Guest) -> DomainInfo {
    DomainInfo {
        name: g.spec.name.clone(),
        uuid: g.spec.uuid,
        state: g.state,
        reason: g.reason,
        metadata: g.spec.metadata.clone(),
        cpu_time_ns: g.work.saturating_mul(1_000_000),
        mem_mib: g.spec.mem_mib,
        vcpus: g.spec.vcpus,
    }
}

fn check_free(inner: &Inner, node: &str, name: &str, uuid: Uuid) -> Result<()> {
    let Some(n) = inner.nodes.get(node) else { return Ok(()) };
    let taken = n.foreign.iter().any(|f| f == name) || n.guests.values().any(|g| g.spec.name == name || g.spec.uuid == uuid);
    if taken {
        Err(HypervisorError::AlreadyExists { name: name.into() })
    } else {
        Ok(())
    }
}

impl Hypervisor for FakeHypervisor {
    fn ping(&self, deadline: Duration) -> Result<()> {
        let next_is_held = |n: &mut Node| {
            n.faults
                .get_mut(&Op::Ping)
                .is_some_and(|f| f.front() == Some(&Fault::Hold) && f.pop_front().is_some())
        };
        let held = self.with(next_is_held);
        if held {
            return Err(HypervisorError::Timeout {
                call: "ping",
                after: deadline,
            });
        }
        self.call(Op::Ping, None, |_, _| Ok(()))
    }

    fn host(&self, _domain_type: DomainType) -> Result<HostInfo> {
        self.call(Op::Host, None, |inner, node| {
            Ok(inner.nodes.get(node).map(|n| n.host.clone()).unwrap_or_default())
        })
    }

    fn start(&self, spec: &DomainSpec, paused: bool) -> Result<()> {
        check_spec(spec)?;
        self.call(Op::Start, Some(&spec.name), |inner, node| {
            check_free(inner, node, &spec.name, spec.uuid)?;
            let copies = inner
                .nodes
                .iter()
                .filter(|(_, n)| n.guests.values().any(|g| g.spec.uuid == spec.uuid));
            let copies: Vec<String> = copies.map(|(name, _)| name.clone()).collect();
            if !copies.is_empty() {
                inner.violation(format!("{} is booted on {node} and exists on {}", spec.name, copies.join(", ")));
            }
            // A boot from nothing is a new run: its work begins at zero by right.
            inner.best.insert(spec.uuid, 0);
            *inner.boots.entry(spec.uuid).or_default() += 1;
            let (state, reason) = if paused {
                (DomainState::Paused, StateReason::StartingUp)
            } else {
                (DomainState::Running, StateReason::Booted)
            };
            let memory_in_use = spec.mem_mib << 19;
            let guest = Guest {
                spec: spec.clone(),
                state,
                reason,
                work: 0,
                memory_in_use,
                dirty_rate: 0,
                measured: false,
                job: None,
            };
            inner.put(node, guest, StateReason::Booted);
            Ok(())
        })
    }

    fn suspend(&self, name: &str) -> Result<()> {
        self.change(Op::Suspend, name, |g| {
            let was = std::mem::replace(&mut g.state, DomainState::Paused);
            g.reason = StateReason::User;
            (was == DomainState::Running).then(|| DomainEvent::Suspended {
                name: name.into(),
                uuid: g.spec.uuid,
                reason: StateReason::User,
            })
        })
    }

    fn resume(&self, name: &str) -> Result<()> {
        self.change(Op::Resume, name, |g| {
            let was = std::mem::replace(&mut g.state, DomainState::Running);
            g.reason = StateReason::Unpaused;
            (was != DomainState::Running).then(|| DomainEvent::Resumed {
                name: name.into(),
                uuid: g.spec.uuid,
                reason: StateReason::Unpaused,
            })
        })
    }

    fn shutdown(&self, name: &str) -> Result<()> {
        self.call(Op::Shutdown, Some(name), |inner, node| {
            guest(inner, node, name)?;
            inner.stop(node, name, StopReason::Shutdown);
            Ok(())
        })
    }

    fn destroy(&self, name: &str) -> Result<bool> {
        self.call(Op::Destroy, Some(name), |inner, node| {
            Ok(inner.stop(node, name, StopReason::Destroyed).is_some())
        })
        .inspect(|_| self.world.inner.1.notify_all())
    }

    fn list(&self) -> Result<Vec<DomainInfo>> {
        self.call(Op::List, None, |inner, node| {
            Ok(inner
                .nodes
                .get(node)
                .map(|n| n.guests.values().map(info).collect())
                .unwrap_or_default())
        })
    }

    fn info(&self, name: &str) -> Result<Option<DomainInfo>> {
        self.call(Op::Info, Some(name), |inner, node| {
            Ok(guest(inner, node, name).ok().map(|g| info(g)))
        })
    }

    fn pin(&self, name: &str, cpuset: &[u32]) -> Result<()> {
        self.change(Op::Pin, name, |g| {
            g.spec.cpuset = cpuset.to_vec();
            None
        })
    }

    fn set_metadata(&self, name: &str, metadata: &DomainMetadata) -> Result<()> {
        self.change(Op::SetMetadata, name, |g| {
            g.spec.metadata = metadata.clone();
            None
        })
    }

    fn migrate(&self, name: &str, params: &MigrateParams) -> Result<MigrateOutcome> {
        let peer = |message: &str| HypervisorError::Libvirt {
            call: "migrate",
            domain: 0,
            message: message.into(),
            code: 38,
        };
        self.call(Op::Migrate, Some(name), |inner, node| {
            guest(inner, node, name)?;
            let to = inner
                .destination(&params.libvirt_uri)
                .ok_or_else(|| peer(&format!("nobody at {}", params.libvirt_uri)))?;
            let there = inner
                .nodes
                .get_mut(&to)
                .filter(|n| !n.cut && to != *node)
                .ok_or_else(|| peer("the destination cannot be reached"))?;
            let import = there.faults.get_mut(&Op::Import).and_then(VecDeque::pop_front);
            if let Some(Fault::Refuse(e)) = import {
                return Err(e);
            }
            let uuid = guest(inner, node, name)?.spec.uuid;
            check_free(inner, &to, name, uuid)?;
            let Some(mut g) = inner.stop(node, name, StopReason::Migrated) else {
                return Err(peer("the domain has gone"));
            };
            if let Some(xml) = &params.dest_xml {
                g.spec.metadata = xml::read_metadata(xml)?.ok_or_else(|| peer("destination XML without our metadata"))?;
            }
            let was_running = g.state == DomainState::Running;
            (g.state, g.reason, g.job) = if was_running && !params.paused {
                (DomainState::Running, StateReason::Migrated, None)
            } else {
                (DomainState::Paused, StateReason::Migration, None)
            };
            let memory_bytes = g.memory_in_use;
            inner.put(&to, g, StateReason::Migrated);
            if import == Some(Fault::LoseAnswer) {
                return Err(peer("the destination's answer was lost"));
            }
            Ok(MigrateOutcome {
                wall_ms: 1_000,
                total_ms: 900,
                downtime_ms: 100,
                memory_bytes,
                disk_bytes: 0,
                iterations: 3,
            })
        })
    }

    fn job_progress(&self, name: &str) -> Result<Option<JobProgress>> {
        self.call(Op::Info, Some(name), |inner, node| {
            Ok(guest(inner, node, name).ok().filter(|g| g.job.is_some()).map(|g| JobProgress {
                elapsed_ms: 100,
                bytes_left: g.memory_in_use,
                memory_total_bytes: g.spec.mem_mib << 20,
                bandwidth_bytes_s: 100 << 20,
                dirty_rate_bytes_s: g.dirty_rate,
                iteration: 1,
                ..JobProgress::default()
            }))
        })
    }

    fn migrate_tune(&self, name: &str, _max_downtime_ms: Option<u64>, _bandwidth_mib_s: Option<u64>) -> Result<()> {
        self.change(Op::Info, name, |_| None)
    }

    fn abort_job(&self, name: &str) -> Result<()> {
        let aborted = self.call(Op::Info, Some(name), |inner, node| {
            let g = guest(inner, node, name)?;
            let none = HypervisorError::WrongState {
                call: "abort",
                message: "no job is active on the domain".into(),
            };
            g.job.as_mut().map(|j| *j = true).ok_or(none)
        });
        self.world.inner.1.notify_all();
        aborted
    }

    fn save(&self, name: &str, path: &Path, format: SaveFormat) -> Result<SaveFormat> {
        self.call(Op::Save, Some(name), |inner, node| {
            guest(inner, node, name)?;
            let Some(guest) = inner.stop(node, name, StopReason::Saved) else {
                return Err(HypervisorError::NoDomain { name: name.into() });
            };
            inner.saves.insert(path.into(), Image { guest, format });
            if let Some(storage) = &inner.storage {
                storage.on(node).write(path, b"memory");
            }
            Ok(format)
        })
    }

    fn saved(&self, path: &Path) -> Result<SavedDomain> {
        self.call(Op::Saved, None, |inner, _| {
            let image = image(inner, path)?;
            let spec = &image.guest.spec;
            log::trace!("{} holds {} in format {:?}", path.display(), spec.name, image.format);
            Ok(SavedDomain {
                name: spec.name.clone(),
                uuid: spec.uuid,
                metadata: spec.metadata.clone(),
                xml: xml::domain(spec, Flavor::Qemu),
            })
        })
    }

    fn restore(&self, path: &Path, new_xml: Option<&str>, paused: bool) -> Result<()> {
        self.call(Op::Restore, None, |inner, node| {
            let mut g = image(inner, path)?.guest;
            check_free(inner, node, &g.spec.name, g.spec.uuid)?;
            if let Some(new_xml) = new_xml {
                let (name, uuid) = xml::read_identity(new_xml)?;
                if (&name, uuid) != (&g.spec.name, g.spec.uuid) {
                    return Err(HypervisorError::Invalid {
                        what: format!("the image holds {}, not {name}", g.spec.name),
                    });
                }
                let without = || HypervisorError::Invalid {
                    what: format!("new XML for {name} without our metadata"),
                };
                g.spec.metadata = xml::read_metadata(new_xml)?.ok_or_else(without)?;
            }
            (g.state, g.reason) = if paused {
                (DomainState::Paused, StateReason::User)
            } else {
                (DomainState::Running, StateReason::Restored)
            };
            inner.put(node, g, StateReason::Restored);
            Ok(())
        })
    }

    fn live_xml(&self, name: &str) -> Result<String> {
        self.call(Op::Info, Some(name), |inner, node| {
            Ok(xml::domain(&guest(inner, node, name)?.spec, Flavor::Qemu))
        })
    }

    fn dirty_rate_start(&self, name: &str, _seconds: u32) -> Result<()> {
        self.change(Op::Info, name, |g| {
            g.measured = true;
            None
        })
    }

    fn dirty_rate(&self, name: &str) -> Result<Option<u64>> {
        self.call(Op::Info, Some(name), |inner, node| {
            let g = guest(inner, node, name)?;
            Ok(g.measured.then_some(g.dirty_rate))
        })
    }

    fn memory_in_use(&self, name: &str) -> Result<u64> {
        self.call(Op::Info, Some(name), |inner, node| Ok(guest(inner, node, name)?.memory_in_use))
    }

    fn xml_for(&self, spec: &DomainSpec) -> Result<String> {
        check_spec(spec)?;
        Ok(xml::domain(spec, Flavor::Qemu))
    }

    fn events(&self) -> Receiver<DomainEvent> {
        let (sender, receiver) = unbounded();
        self.with(|n| n.subscribers.push(sender));
        receiver
    }
}

fn image(inner: &Inner, path: &Path) -> Result<Image> {
    let none = || HypervisorError::Libvirt {
        call: "saved",
        domain: 0,
        message: format!("{}: no such file", path.display()),
        code: 38,
    };
    let is_there = inner.storage.as_ref().is_none_or(|s| s.has(path));
    inner.saves.get(path).filter(|_| is_there).cloned().ok_or_else(none)
}

#[cfg(test)]
mod tests;
