//! `cargo xtask machines`: the command line.

use super::{Debian, Machines, Options, door, down, options, up};
use crate::{
    Result,
    error::At,
    lab::{CTL, Was},
    paths,
};
use std::{io::IsTerminal, path::PathBuf, time::Instant};

/// Which cluster.
#[derive(Debug, clap::Args)]
pub struct Name {
    /// Which cluster
    #[arg(long, default_value = "main")]
    name: String,
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Switch {
    /// On
    On,
    /// Off
    Off,
}

/// What `machines up` takes.
#[derive(Debug, clap::Args)]
pub struct Up {
    #[command(flatten)]
    name: Name,
    /// Compute nodes
    #[arg(long, default_value_t = 2)]
    nodes: u8,
    /// 12 (QEMU and libvirt from backports) or 13
    #[arg(long, value_enum, default_value = "12")]
    debian: Debian,
    /// Without Slurm, NFS and users set up: to follow docs/install.md from its beginning
    #[arg(long)]
    fresh: bool,
    /// Whether the NFS server takes root on a node for nobody, in /shared
    #[arg(long, value_enum, default_value = "off")]
    root_squash: Switch,
    /// GraceTime of partition low, in seconds
    #[arg(long, default_value_t = 300, value_name = "SEC")]
    grace: u32,
    /// Memory of a node
    #[arg(long, default_value_t = 2560, value_name = "MIB")]
    memory: u32,
    /// Processors of a node
    #[arg(long, default_value_t = 2)]
    cpus: u32,
}

/// A cluster of real machines under emulation (needs root; `docs/machines.md`).
#[derive(Debug, clap::Subcommand)]
pub enum MachinesCommand {
    /// Start machines, or those of them that are off, and wait until all nodes are idle
    Up(Up),
    /// End the machines and remove all they have
    Down(Name),
    /// Machines and nodes
    Status(Name),
    /// Run a command on the login host
    Exec {
        /// Which cluster
        #[command(flatten)]
        name: Name,
        /// root, alice or bob
        #[arg(long, default_value = "root")]
        user: String,
        /// The command
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Run a command on a node
    Node {
        /// Which cluster
        #[command(flatten)]
        name: Name,
        /// root, alice or bob
        #[arg(long, default_value = "root")]
        user: String,
        /// n1, n2, ... or ctl
        node: String,
        /// The command
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Install slurm-vm as docs/install.md says, by executing its blocks
    Install {
        /// Which cluster
        #[command(flatten)]
        name: Name,
        /// The directory with the packages [default: target/package]
        #[arg(long, value_name = "DIR")]
        debs: Option<PathBuf>,
        /// Another guide than docs/install.md
        #[arg(long, value_name = "FILE")]
        guide: Option<PathBuf>,
    },
    /// Pull a machine's plug, or switch it on
    Power {
        /// Which cluster
        #[command(flatten)]
        name: Name,
        /// n1, n2, ... or ctl
        node: String,
        /// off or on
        #[arg(value_enum)]
        state: Switch,
    },
    /// Lose all packets between two machines
    Cut(Pair),
    /// End a cut
    Heal(Pair),
    /// The end of a machine's console, or of a unit's journal
    Logs {
        /// Which cluster
        #[command(flatten)]
        name: Name,
        /// n1, n2, ... or ctl
        node: String,
        /// slurm-vmd, slurmd, ...; the console without one
        unit: Option<String>,
        /// How many lines
        #[arg(short = 'n', long, default_value_t = 50)]
        lines: usize,
    },
}

/// Two machines.
#[derive(Debug, clap::Args)]
pub struct Pair {
    #[command(flatten)]
    name: Name,
    /// One machine
    a: String,
    /// The other
    b: String,
}

/// Does what the command line says.
pub fn run(command: MachinesCommand) -> Result<i32> {
    match command {
        MachinesCommand::Up(wishes) => bring_up(wishes)?,
        MachinesCommand::Down(Name { name }) => {
            let was = down(&name)?;
            println!(
                "{}",
                if was {
                    format!("the machines {name} are down")
                } else {
                    format!("there are no machines {name}")
                }
            );
        }
        MachinesCommand::Status(Name { name }) => {
            for machine in Machines::attach(&name)?.hosts()? {
                println!("{:4} {}", machine.name, machine.note);
            }
            return enter(&name, CTL, "root", &["sinfo".into(), "-N".into(), "-l".into()]);
        }
        MachinesCommand::Exec { name, user, command } => return enter(&name.name, CTL, &user, &command),
        MachinesCommand::Node { name, user, node, command } => return enter(&name.name, &node, &user, &command),
        MachinesCommand::Install { name, debs, guide } => {
            let begun = Instant::now();
            Machines::attach(&name.name)?.install(&debs.unwrap_or_else(|| paths::target().join("package")), guide.as_deref())?;
            println!("slurm-vm is installed ({:.0} s)", begun.elapsed().as_secs_f32());
        }
        MachinesCommand::Power { name, node, state } => Machines::attach(&name.name)?.power(&node, state == Switch::On)?,
        MachinesCommand::Cut(p) => Machines::attach(&p.name.name)?.cut(&p.a, &p.b)?,
        MachinesCommand::Heal(p) => Machines::attach(&p.name.name)?.heal(&p.a, &p.b)?,
        MachinesCommand::Logs { name, node, unit, lines } => match unit {
            Some(unit) => {
                let lines = lines.to_string();
                let argv = ["journalctl", "--no-pager", "-n", &lines, "-u", &unit].map(str::to_owned);
                return enter(&name.name, &node, "root", &argv);
            }
            None => {
                let text = Machines::attach(&name.name)?.console(&node)?;
                let all: Vec<&str> = text.lines().collect();
                println!("{}", all[all.len().saturating_sub(lines)..].join("\n"));
            }
        },
    }
    Ok(0)
}

fn bring_up(wishes: Up) -> Result<()> {
    let options = Options {
        name: wishes.name.name,
        nodes: wishes.nodes,
        debian: wishes.debian,
        fresh: wishes.fresh,
        root_squash: wishes.root_squash == Switch::On,
        grace_s: wishes.grace,
        mem_mib: wishes.memory,
        cpus: wishes.cpus,
    };
    let begun = Instant::now();
    let was = up(&options)?;
    let (name, seconds) = (&options.name, begun.elapsed().as_secs_f32());
    println!(
        "the machines {name} are {} ({} nodes, {seconds:.1} s): cargo xtask machines exec --name {name} --user alice -- sinfo",
        match was {
            Was::Started => "up",
            Was::Up => "already up",
            Was::Repaired => "all up again",
        },
        options.nodes
    );
    Ok(())
}

/// Runs a command with this process's streams, and with a terminal if there is one.
fn enter(name: &str, host: &str, user: &str, argv: &[String]) -> Result<i32> {
    let places = options::places(name)?;
    let argv: Vec<&str> = argv.iter().map(String::as_str).collect();
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let status = door::command(&places, host, user, &argv, terminal)?.status().at("run", "ssh")?;
    Ok(status.code().unwrap_or(1))
}
