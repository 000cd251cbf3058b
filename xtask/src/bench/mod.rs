//! `cargo xtask bench`: paired measurements in a lab of their own. `docs/performance.md` says what is measured and what came out.
//!
//! The pairing, the order and the statistics are in this process ([`paired`], [`stats`]); what is timed runs inside the lab, in a helper that
//! answers one word a line ([`helper`]), so that neither this process nor the way into the lab is in any window.

mod helper;
mod inside;
mod machine;
mod memory;
mod migrate;
mod paired;
mod plugin;
mod preempt;
mod report;
mod scale;
mod start;
mod stats;
mod stub;

pub use inside::run as run_inside;

use crate::{
    Result,
    error::At,
    lab::{Lab, Options},
    paths, proc,
};
use paired::Limits;
use report::Report;
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

/// What all benches take.
#[derive(Debug, Clone, clap::Args)]
pub struct Common {
    /// Name of the bench's own lab
    #[arg(long, default_value = "bench")]
    pub name: String,
    /// At most so long, in minutes
    #[arg(long, default_value_t = 10.0)]
    pub minutes: f64,
    /// Seed of order and intervals; a new one each time when absent
    #[arg(long)]
    pub seed: Option<u64>,
    /// Write everything, raw samples included, to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Which bench.
#[derive(Debug, Clone, clap::Subcommand)]
pub enum Bench {
    /// Starting a domain: the agent against bare libvirt calls and against virsh
    Start(Common),
    /// One operation of the agent and of the controller, with few and with many VMs and nodes
    Scale(Common),
    /// srun and sbatch: our plugin against a no-op plugin and none, and with --vm against a stub of the agent
    Plugin(Common),
    /// A live move: the agents against virsh migrate
    Migrate {
        /// As everywhere
        #[command(flatten)]
        common: Common,
        /// At least so many pairs, if the time suffices
        #[arg(long, default_value_t = 30)]
        pairs: usize,
        /// Speed of each node's line in Mbit/s; 0: none, the nodes share the machine's memory
        #[arg(long, value_name = "N", default_value_t = 1000)]
        line_mbit: u32,
    },
    /// Preemption: until the preempting job runs, and what work is done again
    Preempt {
        /// As everywhere
        #[command(flatten)]
        common: Common,
        /// Speed of each node's line in Mbit/s; 0: none, the nodes share the machine's memory and processors only
        #[arg(long, value_name = "N", default_value_t = 1000)]
        line_mbit: u32,
    },
}

impl Common {
    fn limits(&self, least: usize, most: usize) -> Limits {
        let clock = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        Limits {
            time: Duration::from_secs_f64((self.minutes * 60.0).clamp(1.0, 36_000.0)),
            least,
            most,
            seed: self.seed.unwrap_or(clock.as_secs()),
        }
    }

    fn finish(&self, report: &Report) -> Result<()> {
        println!("{}", report.text());
        if let Some(path) = &self.json {
            std::fs::write(path, format!("{:#}\n", report.json())).at("write", path)?;
        }
        Ok(())
    }
}

/// Runs a bench and prints its report.
///
/// # Errors
/// When the lab does not come up or the helper in it dies. A goal that is missed is no error.
pub fn run(bench: &Bench) -> Result<()> {
    match bench {
        Bench::Start(common) => common.finish(&start::run(common)?),
        Bench::Scale(common) => common.finish(&scale::run(common)?),
        Bench::Plugin(common) => common.finish(&plugin::run(common)?),
        Bench::Preempt { common, line_mbit } => common.finish(&preempt::run(common, *line_mbit)?),
        Bench::Migrate { common, pairs, line_mbit } => common.finish(&migrate::run(common, *pairs, *line_mbit)?),
    }
}

/// A lab for one bench, without agents that would take part: their places are for what is measured.
fn lab(common: &Common, options: Options) -> Result<Lab> {
    eprintln!("bench: building, and starting lab {}", common.name);
    let lab = Lab::up(&Options {
        name: common.name.clone(),
        ..options
    })?;
    paths::dir(shared(&lab), 0o755)?;
    Ok(lab)
}

/// Does one thing on a host of the lab as root, for the set-up of a bench.
fn set_up(lab: &Lab, host: &str, argv: &[&str]) -> Result<()> {
    let done = lab.node(host, argv);
    if !done.status.success() {
        return Err(format!("cannot set up {host}: {}", proc::text_of(&done)).into());
    }
    Ok(())
}

/// Lets a node send no faster than its line, in Mbit/s (tc-tbf(8)); TCP keeps little in such a queue, so nothing is dropped. 0: as fast as the
/// machine's memory carries it.
fn lines(lab: &Lab, node: &str, mbit: u32) -> Result<()> {
    if mbit == 0 {
        return Ok(());
    }
    let rate = format!("{mbit}mbit");
    let words = [
        "tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", &rate, "burst", "256kb", "latency", "20ms",
    ];
    set_up(lab, node, &words)
}

/// The bench's directory as this process sees it.
fn shared(lab: &Lab) -> PathBuf {
    lab.shared().join("bench")
}

/// The same as the lab's hosts see it.
const SHARED: &str = "/shared/bench";

/// Copies a program to where all hosts of the lab see it, and gives its path there.
fn publish(lab: &Lab, from: &Path) -> Result<String> {
    let name = from.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let to = shared(lab).join(&name);
    std::fs::copy(from, &to).at("copy", from)?;
    Ok(format!("{SHARED}/{name}"))
}
