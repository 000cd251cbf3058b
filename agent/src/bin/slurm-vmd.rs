//! The agent daemon: node role, controller role, or both, as the configuration says.
use std::{path::PathBuf, process::ExitCode, sync::Arc, thread};

use clap::Parser;
use slurm_vm::{
    cluster::{self, Peers, TlsPeers},
    config::{self, Config},
    controller::Controller,
    effects::{Faults, SystemClock, World, disks::QemuImg, store::DirStore},
    hypervisor::{Hypervisor, libvirt::LibvirtHypervisor},
    logging,
    node::Node,
    peer::Role,
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
    /// Print debug lines, too.
    #[arg(long, short)]
    verbose: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
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
    for dir in [
        &config.state_dir,
        &config.run_dir,
        &config.run_dir.join("jobs"),
        &config.run_dir.join("vm"),
    ] {
        std::fs::create_dir_all(dir).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
    }
    let slurm: Arc<dyn Slurm> = Arc::new(SlurmCommands::new(SlurmSettings {
        conf: config.slurm_conf.clone(),
        ..SlurmSettings::default()
    }));
    let hypervisor: Arc<dyn Hypervisor> = Arc::new(LibvirtHypervisor::new(&config.hypervisor.uri).map_err(|e| e.to_string())?);
    let world = World {
        files: Arc::new(slurm_vm::effects::SystemFiles),
        clock: Arc::new(SystemClock),
        store: Arc::new(DirStore::new(&config.state_dir).map_err(|e| chain(&e))?),
        disks: Arc::new(QemuImg::default()),
        hypervisor,
        slurm: slurm.clone(),
        faults: Faults::from_environment()?,
    };
    let operators = slurm.config().map(|c| vec![c.slurm_uid]).unwrap_or_default();
    let peers = TlsPeers::new(&config, &operators, Role::Node, &world.faults)?;
    let as_peers: Arc<dyn Peers> = peers.clone();
    let node = config.node.enabled.then(|| Node::new(config.clone(), world.clone(), as_peers));
    let controller = if config.controller.enabled {
        // A key of its own: what an agent may order depends on the role it proves.
        Some(Controller::new(
            config.clone(),
            world.clone(),
            TlsPeers::new(&config, &operators, Role::Controller, &world.faults)?,
        ))
    } else {
        None
    };
    if let Some(node) = &node {
        // Overlays and saves hold users' data: only root and QEMU's group get past these directories.
        let mut private = vec![config.state_dir.join("vms")];
        if let Some(shared) = &config.shared_dir {
            private.extend([shared.join("overlays"), shared.join("saves")]);
        }
        for dir in private {
            keep_private(&dir, &config.peer.qemu_user).map_err(|e| format!("cannot make {}: {e}", dir.display()))?;
        }
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
            .spawn(move || slurm_vm::sweep::run(&sweeper))
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

/// Takes as many descriptors as the service may have: each client needs one.
fn raise_descriptors() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(e) = raised {
        log::warn!("the number of descriptors cannot be raised: {e}");
    }
}

/// Makes a directory that only root may list and only QEMU's group may pass.
fn keep_private(dir: &std::path::Path, qemu_user: &str) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::create_dir_all(dir)?;
    if let Some(user) = nix::unistd::User::from_name(qemu_user)? {
        std::os::unix::fs::chown(dir, None, Some(user.gid.as_raw()))?;
    }
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o710))
}
