//! `cargo xtask`: the project's own commands.
#![forbid(unsafe_code)]

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::{path::PathBuf, process::ExitCode};
use xtask::{
    Error, Result, bench,
    demo::{self, Wishes},
    image::{self, debian::Release},
    lab::{self, Lab, Options, Places, Slurm, Was},
    machines::{self, MachinesCommand},
    mutants, package, paths, setup, stage, test,
};

/// Whether the demonstration has its second part.
const PREEMPTION: bool = true;

/// The project's own commands.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install, build, run a job in a VM on a cluster of two nodes, let it be preempted, clean up (needs root)
    Demo {
        /// Name of its lab
        #[arg(long, default_value = "demo")]
        name: String,
        /// Leave the cluster up at the end
        #[arg(long)]
        keep: bool,
    },
    /// What CI runs: format, lints, build, all tests (needs root for those in the lab)
    Test {
        /// The long ones, too
        #[arg(long)]
        full: bool,
        /// The scenarios on real machines instead (docs/machines.md); they take more than an hour
        #[arg(long, conflicts_with = "full")]
        machines: bool,
        /// The packages that are installed on the machines [default: they are made]
        #[arg(long, value_name = "DIR", requires = "machines")]
        debs: Option<std::path::PathBuf>,
        /// Only tests whose names contain one of these
        filters: Vec<String>,
    },
    /// A real cluster on this machine, in namespaces (needs root)
    #[command(subcommand)]
    Lab(LabCommand),
    /// A cluster of real machines under emulation: KVM, systemd, AppArmor, NFS (needs root)
    #[command(subcommand)]
    Machines(MachinesCommand),
    /// Install what the build and the lab need (Debian 12 and 13, by apt)
    Setup,
    /// Build, and copy what a lab runs to target/stage
    Stage,
    /// Build a test image
    Image {
        /// Which: tiny, debian12 or debian13
        #[arg(value_parser = ["tiny", "debian12", "debian13"])]
        name: String,
    },
    /// Make .deb files of the plugin, the agent, svm and the guest helper (packaging/README.md)
    Package {
        /// Where they go [default: target/package]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Debian's revision: a higher one makes an upgrade of the same version
        #[arg(long, value_name = "N", default_value_t = 1)]
        revision: u32,
    },
    /// Put known bugs back, one at a time, and see whether the simulation finds each (tests/mutants.toml)
    Mutants {
        /// Only those whose names contain one of these
        names: Vec<String>,
    },
    /// Measure, in a lab of its own (docs/performance.md)
    #[command(subcommand)]
    Bench(bench::Bench),
    #[command(hide = true)]
    BenchInside {
        #[arg(trailing_var_arg = true)]
        words: Vec<String>,
    },
    #[command(hide = true)]
    LabInit {
        #[arg(long)]
        inner: bool,
        #[arg(long)]
        name: String,
    },
    #[command(hide = true)]
    MachinesInit {
        #[arg(long)]
        inner: bool,
        #[arg(long)]
        name: String,
    },
    #[command(hide = true)]
    LabHost {
        #[arg(long)]
        inner: bool,
        #[arg(long)]
        name: String,
        #[arg(long)]
        host: String,
    },
}

#[derive(Args)]
struct Name {
    /// Which lab
    #[arg(long, default_value = "main")]
    name: String,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Switch {
    On,
    Off,
}

#[derive(Args)]
struct Up {
    #[command(flatten)]
    name: Name,
    /// Compute nodes
    #[arg(long, default_value_t = 2)]
    nodes: u8,
    /// GraceTime of partition low, in seconds
    #[arg(long, default_value_t = 60, value_name = "SEC")]
    grace: u32,
    /// PreemptExemptTime, in seconds
    #[arg(long, default_value_t = 0, value_name = "SEC")]
    exempt: u32,
    /// Storage shared by all nodes
    #[arg(long, value_enum, default_value = "on")]
    shared: Switch,
    /// native, 22.05, 24.11 or 26.05
    #[arg(long, default_value = "native")]
    slurm: Slurm,
    /// Load the plugin into Slurm
    #[arg(long, value_enum, default_value = "on")]
    plugin: Switch,
    /// qemu, kvm or auto
    #[arg(long, default_value = "qemu", value_name = "TYPE")]
    domain_type: String,
    /// Size of each node's file system for VM state
    #[arg(long, default_value_t = 3072, value_name = "MIB")]
    vm_disk: u32,
    /// Guests find the user's home and the working directory, and may have a network
    #[arg(long, value_enum, default_value = "off")]
    companions: Switch,
    /// Images beside `tiny`: debian12, debian13
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    images: Vec<String>,
}

#[derive(Subcommand)]
enum LabCommand {
    /// Start a lab, or repair one, and wait until all nodes are idle
    Up(Up),
    /// End a lab and remove all it has
    Down(Name),
    /// Hosts, services and nodes
    Status(Name),
    /// Run a command on the login host
    Exec {
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
    /// End a service and keep it down
    Stop(Which),
    /// Start a service
    Start(Which),
    /// SIGKILL a service; it is restarted a second later
    Kill(Which),
    /// Lose all packets between two hosts
    Cut(Pair),
    /// End a cut
    Heal(Pair),
    /// Switch a host off or on
    Power {
        #[command(flatten)]
        name: Name,
        /// n1, n2, ... or ctl
        node: String,
        /// off or on
        #[arg(value_enum)]
        state: Switch,
    },
    /// Leave no room for VM state on a node
    Fill {
        #[command(flatten)]
        name: Name,
        /// n1, n2, ...
        node: String,
        /// Give the room back
        #[arg(long)]
        undo: bool,
    },
    /// The end of a service's log
    Logs {
        #[command(flatten)]
        which: Which,
        /// How many lines
        #[arg(short = 'n', long, default_value_t = 50)]
        lines: usize,
    },
}

#[derive(Args)]
struct Which {
    #[command(flatten)]
    name: Name,
    /// n1, n2, ... or ctl
    node: String,
    /// munged, slurmctld, slurmd, libvirtd, slurm-vmd
    service: String,
}

#[derive(Args)]
struct Pair {
    #[command(flatten)]
    name: Name,
    /// One host
    a: String,
    /// The other
    b: String,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(e) => {
            eprintln!("error: {e}");
            // As a shell shows the end by a signal.
            if matches!(e, Error::Interrupted) {
                ExitCode::from(130)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

fn run(command: Command) -> Result<i32> {
    match command {
        Command::Demo { name, keep } => demo::demo(&Wishes {
            name,
            keep,
            preemption: PREEMPTION,
        })
        .map(|()| 0),
        Command::Test {
            machines: true,
            debs,
            filters,
            ..
        } => machines::run_scenarios(&filters, debs.as_deref()).map(|()| 0),
        Command::Test { full, filters, .. } => test::test(&test::Wishes { full, filters }).map(|()| 0),
        Command::Lab(command) => lab_command(command),
        Command::Setup => setup::setup().map(|()| 0),
        Command::Stage => stage::stage_into(&paths::target().join("stage"), false).map(|()| 0),
        Command::Image { name } => {
            let built = match Release::named(&name) {
                Some(release) => image::debian::build(release)?,
                None => image::build()?,
            };
            println!("{}", built.display());
            Ok(0)
        }
        Command::Package { out, revision } => package::package(&package::Wishes { out, revision }).map(|()| 0),
        Command::Mutants { names } => mutants::run(&names).map(|()| 0),
        Command::Bench(bench) => bench::run(&bench).map(|()| 0),
        Command::BenchInside { words } => bench::run_inside(&words).map(|()| 0),
        Command::LabInit { inner: false, name } => lab::supervisor_outer(&name).map(|()| 0),
        Command::LabInit { inner: true, name } => lab::supervisor_inner(&name).map(|()| 0),
        Command::Machines(command) => machines::run(command),
        Command::MachinesInit { inner: false, name } => machines::supervisor_outer(&name).map(|()| 0),
        Command::MachinesInit { inner: true, name } => machines::supervisor_inner(&name).map(|()| 0),
        Command::LabHost { inner: false, name, host } => lab::host_outer(&name, &host).map(|()| 0),
        Command::LabHost { inner: true, name, host } => lab::host_inner(&name, &host).map(|()| 0),
    }
}

fn lab_command(command: LabCommand) -> Result<i32> {
    match command {
        LabCommand::Up(options) => up(options)?,
        LabCommand::Down(Name { name }) => {
            let was = lab::down(&name)?;
            println!(
                "{}",
                if was {
                    format!("lab {name} is down")
                } else {
                    format!("there is no lab {name}")
                }
            );
        }
        LabCommand::Status(Name { name }) => return status(&name),
        LabCommand::Exec { name, user, command } => return lab::run_inside(&Places::of(&name.name)?, lab::CTL, Some(&user), &command),
        LabCommand::Node { name, user, node, command } => return lab::run_inside(&Places::of(&name.name)?, &node, Some(&user), &command),
        LabCommand::Stop(w) => Lab::attach(&w.name.name)?.stop(&w.node, &w.service)?,
        LabCommand::Start(w) => Lab::attach(&w.name.name)?.start(&w.node, &w.service)?,
        LabCommand::Kill(w) => Lab::attach(&w.name.name)?.kill(&w.node, &w.service)?,
        LabCommand::Cut(p) => Lab::attach(&p.name.name)?.cut(&p.a, &p.b)?,
        LabCommand::Heal(p) => Lab::attach(&p.name.name)?.heal(&p.a, &p.b)?,
        LabCommand::Power { name, node, state } => Lab::attach(&name.name)?.power(&node, state == Switch::On)?,
        LabCommand::Fill { name, node, undo } => Lab::attach(&name.name)?.fill(&node, !undo)?,
        LabCommand::Logs { which, lines } => println!("{}", Lab::attach(&which.name.name)?.log_tail(&which.node, &which.service, lines)?),
    }
    Ok(0)
}

fn up(up: Up) -> Result<()> {
    let options = Options {
        name: up.name.name,
        nodes: up.nodes,
        grace_s: up.grace,
        exempt_s: up.exempt,
        shared: up.shared == Switch::On,
        slurm: up.slurm,
        plugin: up.plugin == Switch::On,
        domain_type: up.domain_type,
        vm_disk_mib: up.vm_disk,
        companions: up.companions == Switch::On,
        images: up.images,
        ..Options::default()
    };
    let begun = std::time::Instant::now();
    let was = lab::up(&options)?;
    let (name, nodes, seconds) = (&options.name, options.nodes, begun.elapsed().as_secs_f32());
    match was {
        Was::Up => println!("lab {name} is already up ({nodes} nodes)"),
        Was::Repaired => println!("lab {name} was up in part and is whole again ({nodes} nodes, {seconds:.1} s)"),
        Was::Started => {
            println!("lab {name} is up ({nodes} nodes, {seconds:.1} s): cargo xtask lab exec --name {name} --user alice -- sinfo");
        }
    }
    Ok(())
}

fn status(name: &str) -> Result<i32> {
    let others: Vec<String> = lab::list()
        .into_iter()
        .filter(|(n, _)| n != name)
        .map(|(n, up)| format!("{n} ({})", if up { "up" } else { "dead" }))
        .collect();
    if !others.is_empty() {
        println!("other labs: {}", others.join(", "));
    }
    let lab = Lab::attach(name)?;
    for host in lab.hosts()? {
        if !host.up {
            println!("{:4} {}", host.name, host.note);
            continue;
        }
        let services = lab.services(&host.name)?;
        let text: Vec<String> = services.iter().map(|s| format!("{} {}", s.name, s.note)).collect();
        println!("{:4} {}", host.name, text.join("; "));
    }
    lab::run_inside(&Places::of(name)?, lab::CTL, None, &["sinfo".into()])
}
