//! `cargo xtask package`: .deb files of the plugin, the agent, `svm` and the guest helper.
//!
//! Cargo builds the programs, for a release and in a target directory of their own; Debian's debhelper makes the packages from them,
//! by the rules in `packaging/debian`. `packaging/README.md` says how and why.

use crate::{
    Result,
    error::At,
    paths, proc,
    say::{self, Phase},
    setup, stage,
};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

/// What building packages needs beside what building the programs needs.
const TOOLS: [&str; 3] = ["debhelper", "dpkg-dev", "lintian"];
/// Name of the source package, and what Debian's version is given for.
const SOURCE: &str = "slurm-vm";
/// What goes into the packages from the release build, and under which name.
const PROGRAMS: [(&str, &str); 4] = [
    ("slurm-vmd", "slurm-vmd"),
    ("slurm-vm-run", "slurm-vm-run"),
    ("svm", "svm"),
    ("libspank_vm.so", "spank_vm.so"),
];

/// What lintian is not asked: no bug in Debian's tracker is closed by a package that is not Debian's, and there are no manual pages yet
/// (`--help` and the documents in the packages have what would be in them).
const NOT_ASKED: &str = "initial-upload-closes-no-bugs,no-manual-page";
/// Between the words of `CARGO_ENCODED_RUSTFLAGS`.
const BETWEEN: &str = "\u{1f}";

/// What the command line asks for.
#[derive(Debug, Clone)]
pub struct Wishes {
    /// Where the .deb files go; `target/package` when absent.
    pub out: Option<PathBuf>,
    /// Debian's revision, after the version's hyphen: a higher one makes an upgrade of the same version.
    pub revision: u32,
}

/// Builds what has changed and makes the packages; says where they are.
pub fn package(wishes: &Wishes) -> Result<()> {
    setup::phase_with(&TOOLS)?;
    let _lock = stage::build_lock()?;
    let work = paths::target().join("package");
    paths::dir(&work, 0o755)?;
    let built = build(&work)?;
    let tree = work.join("build").join(SOURCE);
    lay_out(&tree, &built, wishes.revision)?;
    let mut phase = Phase::begin("packages", "debhelper");
    let log = work.join("debhelper.log");
    let mut command = Command::new("dpkg-buildpackage");
    // -d: cargo and its crates are no Debian packages, and debhelper was looked for above.
    command.args(["-b", "-us", "-uc", "-d"]).current_dir(&tree).env("LC_ALL", "C.UTF-8");
    say::run(&mut command, &log, 30, |line| phase.now(line)).inspect_err(|_| phase.pause())?;
    let debs = debs(&work.join("build"))?;
    phase.done(&format!("{} of version {}", debs.len(), version(wishes.revision)));
    lint(&work.join("build"), &work.join("lintian.log"))?;
    let out = wishes.out.clone().unwrap_or(work);
    fs::create_dir_all(&out).at("create", &out)?;
    // Those of an earlier version would be installed by `apt install ./*.deb` as well.
    for old in debs_of(&out)? {
        fs::remove_file(&old).at("remove", &old)?;
    }
    for deb in debs {
        let to = out.join(deb.file_name().unwrap_or_default());
        fs::copy(&deb, &to).at("copy", &deb)?;
        println!("{}", to.display());
    }
    Ok(())
}

/// The programs as they are shipped.
struct Built {
    programs: PathBuf,
    guest: PathBuf,
}

/// Builds for a release. No path of this machine gets into the programs: the crates' places are part of their panic messages.
fn build(work: &Path) -> Result<Built> {
    let dir = work.join("cargo");
    let home = std::env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".cargo")))
        .ok_or("there is neither CARGO_HOME nor HOME")?;
    let remap = remap_flags(&paths::project(), &registries(&home), &home);
    let dir_text = dir.to_string_lossy().into_owned();
    let mut phase = Phase::begin("build", "for a release: some minutes when much has changed");
    let mut crates = 0_u32;
    let args = ["build", "--release", "--locked", "--color", "never", "--target-dir", &dir_text];
    let host = ["-p", "slurm-vm", "-p", "spank_vm", "--bins", "--lib"];
    let guest = ["-p", "slurm-vm-guest", "--target", stage::GUEST_TARGET];
    for (what, flags) in [
        (&host[..], remap.clone()),
        (&guest[..], format!("{remap}{BETWEEN}{}", stage::GUEST_FLAGS)),
    ] {
        let mut command = stage::cargo_command(&[&args, what].concat());
        command
            .env("CARGO_ENCODED_RUSTFLAGS", flags)
            .env("CARGO_TERM_PROGRESS_WHEN", "never")
            .env("CARGO_PROFILE_RELEASE_DEBUG", "false");
        say::run(&mut command, &work.join("cargo.log"), 60, |line| {
            if let Some(name) = line.strip_prefix("Compiling ") {
                crates += 1;
                phase.now(&format!("crate {crates}, {}", name.split(" (").next().unwrap_or(name)));
            }
        })
        .inspect_err(|_| phase.pause())?;
    }
    phase.done(&match crates {
        0 => "nothing has changed".to_owned(),
        n => format!("{n} crates"),
    });
    Ok(Built {
        programs: dir.join("release"),
        guest: dir.join(stage::GUEST_TARGET).join("release/slurm-vm-guest"),
    })
}

/// The directories of unpacked crates, one for each registry. Their names tell which registry it was.
fn registries(home: &Path) -> Vec<PathBuf> {
    fs::read_dir(home.join("registry/src"))
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .collect()
}

/// rustc takes the last prefix that fits, so the longest are at the end.
fn remap_flags(project: &Path, registries: &[PathBuf], home: &Path) -> String {
    let flag = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
    [flag(home, "/cargo"), flag(project, "/slurm-vm")]
        .into_iter()
        .chain(registries.iter().map(|dir| flag(dir, "/crates")))
        .collect::<Vec<_>>()
        .join(BETWEEN)
}

/// The tree that debhelper works in: the programs, what is installed as it is, and `debian/`.
fn lay_out(tree: &Path, built: &Built, revision: u32) -> Result<()> {
    let above = tree.parent().unwrap_or(tree);
    if above.exists() {
        fs::remove_dir_all(above).at("empty", above)?;
    }
    let project = paths::project();
    for (from, to) in PROGRAMS {
        copy(&built.programs.join(from), &tree.join("bin").join(to), 0o755)?;
    }
    copy(&built.guest, &tree.join("bin/slurm-vm-guest"), 0o755)?;
    for dir in ["packaging", "docs"] {
        copy_tree(&project.join(dir), &tree.join(dir))?;
    }
    copy(&project.join("CHANGELOG.md"), &tree.join("CHANGELOG.md"), 0o644)?;
    let debian = tree.join("debian");
    copy_tree(&project.join("packaging/debian"), &debian)?;
    copy(
        &project.join("packaging/slurm-vmd.service"),
        &debian.join("slurm-vmd.service"),
        0o644,
    )?;
    paths::file(debian.join("changelog"), 0o644, changelog(revision)?)
}

/// Debian wants one; what has changed is in CHANGELOG.md, which is in the packages as well.
fn changelog(revision: u32) -> Result<String> {
    let control_path = paths::project().join("packaging/debian/control");
    let control = fs::read_to_string(&control_path).at("read", &control_path)?;
    let maintainer = control
        .lines()
        .find_map(|line| line.strip_prefix("Maintainer: "))
        .ok_or("packaging/debian/control names no maintainer")?;
    Ok(format!(
        "{SOURCE} ({}) unstable; urgency=medium\n\n  * Built from the project's own source; CHANGELOG.md has the changes.\n\n -- {maintainer}  {}\n",
        version(revision),
        time_of_source()?
    ))
}

/// The version of the workspace as Debian writes it.
fn version(revision: u32) -> String {
    format!("{}-{revision}", env!("CARGO_PKG_VERSION").replace('-', "~"))
}

/// When the source was committed, so that the same source gives the same packages; now, where that is not known.
fn time_of_source() -> Result<String> {
    let project = paths::project();
    let said = proc::run("git", &["-C", &project.to_string_lossy(), "log", "-1", "--format=%cD"]);
    match said {
        Ok(time) if !time.trim().is_empty() => Ok(time.trim().to_owned()),
        _ => Ok(proc::run("date", &["-R"])?.trim().to_owned()),
    }
}

/// Debian's own check. What it may say is in the `lintian-overrides` files, each with its reason, and in [`NOT_ASKED`].
fn lint(dir: &Path, log: &Path) -> Result<()> {
    let phase = Phase::begin("lintian", "looks at the packages");
    // It leaves files of its own in the directory for temporary ones.
    let scratch = dir.join("lintian");
    paths::dir(&scratch, 0o755)?;
    let mut command = Command::new("lintian");
    command
        .args([
            "--fail-on",
            "error,warning",
            "--suppress-tags",
            NOT_ASKED,
            "--tag-display-limit",
            "0",
            "--allow-root",
        ])
        .args(debs(dir)?)
        .env("LC_ALL", "C.UTF-8")
        .env("TMPDIR", &scratch);
    say::run(&mut command, log, 60, |_| {}).inspect_err(|_| phase.pause())?;
    phase.done("no errors, no warnings");
    Ok(())
}

fn debs(dir: &Path) -> Result<Vec<PathBuf>> {
    let found = debs_of(dir)?;
    if found.is_empty() {
        return Err(format!("there is no package in {}", dir.display()).into());
    }
    Ok(found)
}

/// The packages of this project in a directory, in order.
fn debs_of(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir)
        .at("read", dir)?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            name.ends_with(".deb") && (name.starts_with("slurm-vm") || name.starts_with("slurm-spank-vm"))
        })
        .collect();
    found.sort();
    Ok(found)
}

fn copy(from: &Path, to: &Path, mode: u32) -> Result<()> {
    if let Some(parent) = to.parent() {
        paths::dir(parent, 0o755)?;
    }
    fs::copy(from, to).at("copy", from)?;
    fs::set_permissions(to, fs::Permissions::from_mode(mode)).at("set the mode of", to)
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).at("read", from)? {
        let path = entry.at("read", from)?.path();
        let target = to.join(path.file_name().unwrap_or_default());
        if path.is_dir() {
            copy_tree(&path, &target)?;
        } else {
            let executable = fs::metadata(&path).at("look at", &path)?.permissions().mode() & 0o100 != 0;
            copy(&path, &target, if executable { 0o755 } else { 0o644 })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{changelog, remap_flags, version};
    use crate::paths;
    use std::{fs, path::Path};

    #[test]
    fn the_version_is_the_workspaces_as_debian_writes_it() {
        assert_eq!(version(2), format!("{}-2", env!("CARGO_PKG_VERSION")));
        assert!(
            changelog(2)
                .expect("a changelog")
                .starts_with(&format!("slurm-vm ({})", version(2)))
        );
    }

    #[test]
    fn the_most_specific_prefix_is_the_last_one() {
        let flags = remap_flags(Path::new("/p"), &["/h/registry/src/x".into()], Path::new("/h"));
        let at = |text: &str| flags.find(text).unwrap_or_else(|| panic!("{text} in {flags}"));
        assert!(at("=/h=/cargo") < at("=/h/registry/src/x=/crates"));
    }

    #[test]
    fn what_the_packages_install_is_in_the_project() {
        let project = paths::project();
        let debian = project.join("packaging/debian");
        let mut seen = 0;
        for entry in fs::read_dir(&debian).expect("packaging/debian") {
            let path = entry.expect("an entry").path();
            if !path.extension().is_some_and(|e| e == "install" || e == "docs") {
                continue;
            }
            for line in fs::read_to_string(&path).expect("a list").lines() {
                let source = line.split(' ').next().unwrap_or_default();
                if !source.starts_with("bin/") {
                    assert!(project.join(source).exists(), "{}: {source}", path.display());
                    seen += 1;
                }
            }
        }
        assert!(seen > 5, "{seen}");
    }
}
