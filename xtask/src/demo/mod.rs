//! `cargo xtask demo`: everything once, for somebody who has just cloned the project.
//!
//! Installs what is missing, builds, brings a lab up, runs a job in a VM, lets a second one be preempted and go on elsewhere, and takes
//! the lab down: at the end, after an error, and on Ctrl-C. What it says is checked, not hoped: a wrong exit code or a missing number is an error.

mod jobs;

use crate::{
    Error, Lab, Options, Result, lab, proc,
    say::{Phase, seconds},
    setup, stage,
};
use jobs::Door;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// What the command line asks for.
#[derive(Debug, Clone)]
pub struct Wishes {
    /// Name of the lab.
    pub name: String,
    /// Leave the lab up at the end.
    pub keep: bool,
    /// Run the second part, too.
    pub preemption: bool,
}

/// Runs the demonstration.
pub fn demo(wishes: &Wishes) -> Result<()> {
    let begun = Instant::now();
    if !nix::unistd::geteuid().is_root() {
        return Err(
            "root is needed, for namespaces and packages: run it as root, or as `sudo -E env PATH=\"$PATH\" cargo xtask demo`".into(),
        );
    }
    let stop = Stop::on_signals()?;
    println!("slurm-vm on a real Slurm cluster of two nodes, in namespaces of this machine. Ctrl-C ends it and cleans up.\n");
    stop.or(setup::phase())?;
    stop.or(stage::phase())?;
    let result = stop.or(cluster(wishes, &stop)).and_then(|lab| {
        let told = stop.or(tell(wishes, &lab, &stop));
        if let Err(e) = &told
            && !matches!(e, Error::Interrupted)
        {
            eprintln!("\n{}", post_mortem(&lab));
        }
        told
    });
    if wishes.keep && result.is_ok() {
        let name = &wishes.name;
        println!("\nThe cluster stays up: cargo xtask lab exec --name {name} --user alice -- bash; cargo xtask lab down --name {name}");
        return Ok(());
    }
    println!();
    let phase = Phase::begin("clean-up", "takes the cluster down");
    lab::down(&wishes.name)?;
    phase.done("the cluster is gone, nothing of it is left on this machine");
    result?;
    println!(
        "\nAll of it took {}. Next: README.md, docs/, and `cargo xtask lab up` for a cluster to play with.",
        seconds(begun.elapsed())
    );
    Ok(())
}

fn cluster(wishes: &Wishes, stop: &Stop) -> Result<Lab> {
    let phase = Phase::begin("cluster", "starts");
    // What an earlier demonstration left when it was killed.
    lab::down(&wishes.name)?;
    lab::up(&Options::named(&wishes.name))?;
    let lab = Lab::attach(&wishes.name)?;
    stop.check()?;
    let version = Door::root(&lab, stop).ask(&["scontrol", "--version"])?;
    let release = version.trim().rsplit(' ').next().unwrap_or("?").to_owned();
    phase.done(&format!(
        "Slurm {release}: a login host, and nodes n1 and n2, each with a libvirt and an agent of its own"
    ));
    Ok(lab)
}

fn tell(wishes: &Wishes, lab: &Lab, stop: &Stop) -> Result<()> {
    jobs::in_a_vm(lab, stop)?;
    if wishes.preemption {
        jobs::preempted(lab, stop)?;
    }
    Ok(())
}

/// What helps to see why it failed.
fn post_mortem(lab: &Lab) -> String {
    let mut text = String::from("It went wrong. The ends of the agents' logs:");
    for host in [lab::CTL, "n1", "n2"] {
        let log = lab.log_tail(host, "slurm-vmd", 12).unwrap_or_default();
        text += &format!("\n--- {host}\n{log}");
    }
    text
}

/// Ctrl-C, TERM and HUP: noted, and looked at between two steps, so that the lab is taken down whatever the moment.
#[derive(Debug, Clone)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    fn on_signals() -> Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [
            signal_hook::consts::SIGINT,
            signal_hook::consts::SIGTERM,
            signal_hook::consts::SIGHUP,
        ] {
            signal_hook::flag::register(signal, flag.clone()).map_err(|e| format!("cannot catch signal {signal}: {e}"))?;
        }
        Ok(Self(flag))
    }

    fn asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// A result, unless the user wants to go: what a Ctrl-C has hit has failed for that reason.
    fn or<T>(&self, result: Result<T>) -> Result<T> {
        self.check().and(result)
    }

    /// An error if the user wants to go.
    fn check(&self) -> Result<()> {
        if self.asked() { Err(Error::Interrupted) } else { Ok(()) }
    }

    /// Asks again and again until there is an answer; an error at the deadline or when the user wants to go.
    fn wait<T>(&self, what: &str, deadline: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
        let mut end = Ok(None);
        let found = proc::wait_for(deadline, || {
            if self.asked() {
                end = Err(Error::Interrupted);
                return Some(());
            }
            end = self.or(look());
            (!matches!(end, Ok(None))).then_some(())
        });
        match (found, end) {
            (Some(()), Ok(Some(value))) => Ok(value),
            (_, Err(e)) => Err(e),
            _ => Err(format!("waited {} in vain: {what}", seconds(deadline)).into()),
        }
    }
}
