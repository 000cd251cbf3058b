//! The agent daemon: node role, controller role, or both, as the configuration says.
use std::{path::PathBuf, process::ExitCode, sync::Arc, thread};

use clap::Parser;
use slurm_vm::{
    cluster::{self, TlsPeers},
    config::{self, Config},
    controller::Controller,
    effects::{Faults, SystemClock, World, disks::QemuImg, points, private, store::DirStore, trusted},
    hypervisor::{Hypervisor, libvirt::LibvirtHypervisor},
    logging,
    node::Node,
    peer::{HANDSHAKE_VERSION, Role},
    server::{self, Roles},
    slurm::{Slurm, SlurmCommands, SlurmSettings},
    text::chain,
};

/// The agent of slurm-vm: runs the virtual machines of this node's jobs, and the cluster's moves where it is the controller.
#[derive(Debug, Parser)]
#[command(name = "slurm-vmd", version)]
struct Arguments {
    /// Configuration file.
    #[arg(long, default_value = config::DEFAULT_PATH)]
    config: PathBuf,
    /// Check the configuration and exit.
    #[arg(long)]
    check: bool,
    /// List the fault points, which `SLURM_VM_FAULT=POINT=abort|fail[@N]` arms for tests, and exit.
    #[arg(long)]
    fault_points: bool,
    /// Print debug lines, too.
    #[arg(long, short)]
    verbose: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.fault_points {
        println!("{}", fault_points().join("\n"));
        return ExitCode::SUCCESS;
    }
    logging::init(arguments.verbose || std::env::var_os("SLURM_VM_DEBUG").is_some());
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("slurm-vmd: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), String> {
    let config = Config::load(&arguments.config).map_err(|e| chain(&e))?;
    if config.node.enabled
        && let Some(shared) = &config.shared_dir
    {
        // Not there yet is no fault: it may be mounted later.
        trusted::directory(shared).or_else(|e| if e.is_absent() { Ok(()) } else { Err(format!("shared_dir: {e}")) })?;
    }
    if arguments.check {
        println!("{}: good", arguments.config.display());
        return Ok(());
    }
    if !config.node.enabled && !config.controller.enabled {
        return Err(format!(
            "{}: neither the node role nor the controller role is enabled",
            arguments.config.display()
        ));
    }
    let config = Arc::new(config);
    raise_descriptors();
    // What the agent makes is nobody else's, except where it says so.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    make_directories(&config)?;
    let slurm: Arc<dyn Slurm> = Arc::new(SlurmCommands::new(SlurmSettings {
        conf: config.slurm_conf.clone(),
        ..SlurmSettings::default()
    }));
    let hypervisor: Arc<dyn Hypervisor> = Arc::new(LibvirtHypervisor::new(&config.hypervisor.uri).map_err(|e| e.to_string())?);
    let world = World {
        files: Arc::new(slurm_vm::effects::SystemFiles),
        clock: Arc::new(SystemClock),
        store: Arc::new(DirStore::new(&config.state_dir).map_err(|e| chain(&e))?),
        disks: Arc::new(QemuImg::for_user(&config.peer.qemu_user)),
        hypervisor,
        slurm,
        as_user: Arc::new(slurm_vm::effects::SystemAsUser),
    };
    let faults = Faults::from_environment(&fault_points())?;
    let world = world.with_fault_points(&faults);
    let operators = world.slurm.config().map(|c| vec![c.slurm_uid]).unwrap_or_default();
    let peers = TlsPeers::new(&config, &operators, Role::Node, 0, &faults)?;
    let as_peers = cluster::points::with_fault_points(peers.clone(), &faults);
    let node = config.node.enabled.then(|| Node::new(config.clone(), world.clone(), as_peers));
    let controller = if config.controller.enabled {
        // A key of its own: what an agent may order depends on the role it proves.
        Some(Controller::new(
            config.clone(),
            world.clone(),
            cluster::points::with_fault_points(
                TlsPeers::new(&config, &operators, Role::Controller, world.clock.now_ms(), &faults)?,
                &faults,
            ),
        ))
    } else {
        None
    };
    if let Some(node) = &node {
        // Overlays hold users' data: only root and QEMU's user get past this directory.
        let dir = config.state_dir.join("vms");
        private::passage(&dir, &config.peer.qemu_user).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
        let done = config.state_dir.join("done");
        private::directory(&done, 0o700).map_err(|e| format!("cannot make {}: {e}", done.display()))?;
        node.look_at_shared_dir();
        let events = world.hypervisor.events();
        let watcher = node.clone();
        thread::Builder::new()
            .name("domains".into())
            .spawn(move || watcher.watch_domains(&events))
            .map_err(|e| e.to_string())?;
        node.recover();
        let sweeper = node.clone();
        thread::Builder::new()
            .name("sweep".into())
            .spawn(move || slurm_vm::node::sweep::run(&sweeper))
            .map_err(|e| e.to_string())?;
        let prober = node.clone();
        thread::Builder::new()
            .name("probe".into())
            .spawn(move || {
                let _ = prober.qemu_version();
            })
            .map_err(|e| e.to_string())?;
        let serving = node.clone();
        peers.serve(&config, move |from, request| cluster::answer(&serving, from, request))?;
    }
    if let Some(controller) = &controller {
        let controller = controller.clone();
        thread::Builder::new()
            .name("controller".into())
            .spawn(move || controller.run())
            .map_err(|e| e.to_string())?;
    }
    let listener = server::bind(&config.socket).map_err(|e| format!("cannot listen on {}: {e}", config.socket.display()))?;
    log::info!("slurm-vmd {} on {}: ready", env!("CARGO_PKG_VERSION"), config.node());
    // Without systemd there is nobody to notify, and that is no fault.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    server::serve(
        &listener,
        &Roles {
            node,
            controller,
            operators,
        },
    );
    Ok(())
}

/// All fault points of the daemon.
fn fault_points() -> Vec<String> {
    let mut points = [points::points(), cluster::points::points(), vec![HANDSHAKE_VERSION.to_owned()]].concat();
    points.sort();
    points
}

/// Takes as many descriptors as the service may have: each client needs one.
fn raise_descriptors() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(e) = raised {
        log::warn!("the number of descriptors cannot be raised: {e}");
    }
}

/// Makes the directories that others than root must reach, with the modes for that.
fn make_directories(config: &Config) -> Result<(), String> {
    let run = &config.run_dir;
    // The plugin looks for sockets and markers as the user; QEMU passes to the directories that are its own.
    for (dir, mode) in [
        (run.clone(), 0o755),
        (run.join("jobs"), 0o755),
        (run.join("vm"), 0o711),
        (run.join("move"), 0o711),
    ] {
        private::directory(&dir, mode).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
    }
    // It is the administrator's where it is there.
    let dir = &config.state_dir;
    if !dir.is_dir() {
        private::directory(dir, 0o711).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
    }
    Ok(())
}
