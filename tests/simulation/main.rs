//! Seeded simulation of a cluster: the agents' core as it is ([`slurm_vm::core`]) on N nodes over a hypervisor and a
//! Slurm in memory, with a plain model of the controller's protocol, and everything that can go wrong going wrong:
//! agents and controller killed at any point (in-flight effects are lost, the ledger stays), messages late, lost or
//! twice, imports, starts, saves and restores that fail or whose answer is lost, libvirt and slurmctld away, guests that
//! die, jobs that are cancelled or preempted in any phase.
//!
//! What must hold is checked after each step ([`cluster::Cluster::check`]); at the end the cluster is left alone and must
//! come to rest with nothing left. A failing seed is printed with the last steps; `SLURM_VM_SEED=N` replays it,
//! `SLURM_VM_SEEDS=N` runs so many.
mod check;
mod cluster;
mod controller;
mod effects;
mod jobs;
mod late;
mod output;
mod random;
mod rooms;

use std::collections::{BTreeMap, BTreeSet};

use cluster::{Cluster, Mood};

/// Seeds in a plain `cargo test`.
const SEEDS: u64 = 400;

fn variable(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|v| v.parse().unwrap_or_else(|_| panic!("{name}={v} is not a number")))
}

#[test]
fn whatever_goes_wrong_each_guest_runs_once_and_nothing_is_left() {
    let seeds: Vec<u64> = match (variable("SLURM_VM_SEED"), variable("SLURM_VM_SEEDS")) {
        (Some(seed), _) => vec![seed],
        (None, n) => (1..=n.unwrap_or(SEEDS)).collect(),
    };
    let verbose = seeds.len() == 1;
    let mut reached: BTreeMap<&'static str, BTreeSet<&'static str>> = BTreeMap::new();
    let mut counts: BTreeMap<&'static str, u64> = BTreeMap::new();
    for seed in &seeds {
        let mood = if seed % 4 == 0 { Mood::Calm } else { Mood::Rough };
        let mut cluster = Cluster::new(*seed, mood);
        cluster.tracing = verbose;
        let outcome = cluster.run();
        if let Err(what) = outcome {
            if !verbose {
                // The same again, told this time.
                cluster = Cluster::new(*seed, mood);
                cluster.tracing = true;
                let _ = cluster.run();
            }
            let skipped = if verbose { 0 } else { cluster.trace.len().saturating_sub(300) };
            cluster.trace.iter().skip(skipped).for_each(|line| println!("{line}"));
            panic!("seed {seed}: {what}\nreplay with SLURM_VM_SEED={seed}");
        }
        cluster.trace.iter().for_each(|line| println!("{line}"));
        for (state, event) in &cluster.reached {
            reached.entry(state).or_default().insert(event);
        }
        for (what, n) in &cluster.counts {
            *counts.entry(what).or_default() += n;
        }
    }
    let pairs: usize = reached.values().map(BTreeSet::len).sum();
    println!("{} seeds, {pairs} pairs of state and event", seeds.len());
    for (state, events) in &reached {
        println!("  {state}: {}", events.iter().copied().collect::<Vec<_>>().join(" "));
    }
    for (what, n) in &counts {
        println!("  {n} {what}");
    }
    if seeds.len() as u64 >= SEEDS {
        // A simulation that no longer gets anywhere finds nothing.
        for state in [
            "preparing",
            "booting",
            "running",
            "leaving",
            "arriving",
            "awaiting-job",
            "saving",
            "restoring",
            "stopping",
        ] {
            assert!(reached.get(state).is_some_and(|e| e.len() >= 4), "{state} is hardly reached");
        }
        for what in [
            "jobs finished",
            "live moves",
            "saves",
            "restores",
            "agents killed",
            "writes that failed",
        ] {
            assert!(counts.get(what).is_some_and(|n| *n >= 20), "hardly any {what}");
        }
    }
}
