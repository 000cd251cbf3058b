//! Builds the workspace and copies what a lab runs to one directory.

use crate::{
    Result,
    error::At,
    image, paths,
    say::{self, Phase},
};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The target of the guest helper: named, so that `+crt-static` does not reach build scripts and proc macros.
pub(crate) const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu";
/// What makes the guest helper static.
pub(crate) const GUEST_FLAGS: &str = "-Ctarget-feature=+crt-static";
/// What a lab runs, from the host build.
const PROGRAMS: [(&str, &str); 4] = [
    ("slurm-vmd", "slurm-vmd"),
    ("slurm-vm-run", "slurm-vm-run"),
    ("svm", "svm"),
    ("libspank_vm.so", "spank_vm.so"),
];

/// One build at a time: labs may be started side by side.
pub(crate) fn build_lock() -> Result<Flock<fs::File>> {
    let path = paths::target().join(".xtask.lock");
    fs::create_dir_all(paths::target()).at("create", paths::target())?;
    let file = fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .at("open", &path)?;
    loop {
        match Flock::lock(file.try_clone().at("open", &path)?, FlockArg::LockExclusive) {
            Ok(lock) => return Ok(lock),
            Err((_, Errno::EINTR)) => {}
            Err((_, e)) => return Err(std::io::Error::from(e)).at("lock", &path),
        }
    }
}

/// Cargo, at the top of the project.
pub(crate) fn cargo_command(args: &[&str]) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(args).current_dir(paths::project());
    // What cargo set for us or for a test process is not for another build: it would look like a change.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG")
            || text.starts_with("CARGO_MANIFEST")
            || text.starts_with("CARGO_BIN")
            || text == "CARGO_PRIMARY_PACKAGE"
            || text == "OUT_DIR"
        {
            command.env_remove(&name);
        }
    }
    command
}

pub(crate) fn cargo(args: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    let mut command = cargo_command(args);
    command.envs(environment.iter().copied());
    let status = command.status().at("run", "cargo")?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("`cargo {}` failed ({status})", args.join(" ")).into())
    }
}

/// Builds everything that runs on the hosts. A cdylib is built by this only, not by `cargo test`.
pub fn build() -> Result<()> {
    cargo(&["build", "--quiet", "--workspace"], &[])
}

/// Builds the static guest helper and gives its path. It has a target directory of its own, so that neither build undoes the other.
pub fn build_guest() -> Result<PathBuf> {
    let dir = paths::target().join("guest");
    let args = [
        "build",
        "--quiet",
        "--release",
        "-p",
        "slurm-vm-guest",
        "--target",
        GUEST_TARGET,
        "--target-dir",
    ];
    let dir_text = dir.to_string_lossy().into_owned();
    let args: Vec<&str> = args.into_iter().chain([dir_text.as_str()]).collect();
    // Stripped: it sits in every guest's memory, and its symbols would be most of it.
    let environment = [
        ("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", GUEST_FLAGS),
        ("CARGO_PROFILE_RELEASE_STRIP", "true"),
        ("CARGO_PROFILE_RELEASE_DEBUG", "false"),
    ];
    cargo(&args, &environment)?;
    Ok(dir.join(GUEST_TARGET).join("release/slurm-vm-guest"))
}

/// The build as a phase of a newcomer's command: on one line, with the crate that is being compiled, and all of cargo's words if it fails.
pub fn phase() -> Result<()> {
    let _lock = build_lock()?;
    let first = !paths::target().join("debug/slurm-vmd").exists();
    let mut phase = Phase::begin(
        "build",
        if first {
            "the first time takes some minutes"
        } else {
            "looks for changes"
        },
    );
    let mut crates = 0_u32;
    let result = say::run(
        cargo_command(&["build", "--workspace", "--color", "never"]).env("CARGO_TERM_PROGRESS_WHEN", "never"),
        &paths::target().join("build.log"),
        60,
        |line| {
            if let Some(name) = line.strip_prefix("Compiling ") {
                crates += 1;
                phase.now(&format!("crate {crates}, {}", name.split(" (").next().unwrap_or(name)));
            }
        },
    );
    if result.is_err() {
        phase.pause();
    }
    result?;
    phase.now("the guest helper");
    build_guest()?;
    phase.now("the image of the guest");
    let _ = image::build_locked()?;
    phase.done(&match crates {
        0 => "nothing has changed".to_owned(),
        n => format!("{n} crates, the guest helper, the image `tiny`"),
    });
    Ok(())
}

/// Builds in the release profile, for benches, and gives the directory. One command for all of them: another choice of packages is another
/// choice of features for cargo, and so another build of everything.
pub fn build_release() -> Result<PathBuf> {
    let packages = ["-p", "slurm-vm", "-p", "spank_vm", "--lib", "--bins", "--examples"];
    let all: Vec<&str> = ["build", "--quiet", "--release"].into_iter().chain(packages).collect();
    cargo(&all, &[])?;
    Ok(paths::target().join("release"))
}

/// Builds and copies the programs under test. The copies stay what they are while the next build runs. `release`: in the release profile.
pub fn stage_into(dir: &Path, release: bool) -> Result<()> {
    let _lock = build_lock()?;
    let built = if release {
        build_release()?
    } else {
        build()?;
        paths::target().join("debug")
    };
    paths::dir(dir, 0o755)?;
    for (from, to) in PROGRAMS {
        copy(&built.join(from), &dir.join(to))?;
    }
    copy(&build_guest()?, &dir.join("slurm-vm-guest"))
}

/// A copy under a fresh name, then renamed: a program that runs from the old file keeps it.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    let fresh = to.with_extension("new");
    fs::copy(from, &fresh).at("copy", from)?;
    fs::rename(&fresh, to).at("write", to)
}
