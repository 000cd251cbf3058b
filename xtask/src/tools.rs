//! What a site has from its distribution and Debian 12 does not have new enough: virtiofsd that can be migrated, passt that speaks
//! vhost-user. Built once, below the target directory, from what their projects and Debian publish.

use crate::{Result, apt, error::At, paths, proc, setup, stage};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const VIRTIOFSD: &str = "1.14.0";
/// The Debian release whose passt it is.
const PASST_OF: &str = "trixie";

/// Builds them if they are not there, and copies them to a lab's programs.
pub fn into(dir: &Path) -> Result<()> {
    let _lock = stage::build_lock()?;
    stage::copy(&virtiofsd()?, &dir.join("virtiofsd"))?;
    stage::copy(&passt()?, &dir.join("passt"))
}

fn tools() -> PathBuf {
    paths::target().join("tools")
}

fn virtiofsd() -> Result<PathBuf> {
    let built = tools().join("bin/virtiofsd");
    if !built.exists() {
        println!("builds virtiofsd {VIRTIOFSD}, once; this takes a minute or two");
        let root = tools().to_string_lossy().into_owned();
        stage::cargo(
            &[
                "install",
                "--quiet",
                "--locked",
                "virtiofsd",
                "--version",
                VIRTIOFSD,
                "--root",
                &root,
            ],
            &[],
        )?;
    }
    Ok(built)
}

fn passt() -> Result<PathBuf> {
    let built = tools().join("bin/passt");
    if built.exists() {
        return Ok(built);
    }
    println!("builds passt of Debian {PASST_OF}, once");
    for program in ["make", "gcc", "tar"] {
        setup::check(program)?;
    }
    let mirror = apt::debian_mirror()?;
    let dir = tools().join("passt");
    if dir.exists() {
        fs::remove_dir_all(&dir).at("remove", &dir)?;
    }
    let source = dir.join("source");
    fs::create_dir_all(dir.join("lists/partial")).at("create", &dir)?;
    fs::create_dir_all(&source).at("create", &source)?;
    paths::file(dir.join("sources.list"), 0o644, format!("deb-src {mirror} {PASST_OF} main\n"))?;
    let apt_get = |arguments: &[&str]| -> Result<String> {
        let place = |key: &str, name: &str| format!("Dir::{key}={}", dir.join(name).display());
        let options = [
            place("Etc::sourcelist", "sources.list"),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            place("State::lists", "lists"),
            format!("Acquire::Check-Valid-Until={}", apt::check_dates()),
        ];
        let mut command = Command::new("apt-get");
        command
            .current_dir(&source)
            .args(options.iter().flat_map(|o| ["-o", o]))
            .args(arguments);
        let output = command.output().at("run", "apt-get")?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(format!(
            "apt-get {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        )
        .into())
    };
    apt_get(&["update", "-q"])?;
    let listed = apt_get(&["--print-uris", "source", "passt"])?;
    // `'URI' NAME BYTES HASH`
    let original = listed.lines().find(|line| line.contains(".orig.tar."));
    let words: Vec<&str> = original.unwrap_or_default().split_whitespace().collect();
    let [uri, name, _, hash] = words[..] else {
        return Err(format!("apt knows no source of passt in {PASST_OF}").into());
    };
    let archive = dir.join(name).to_string_lossy().into_owned();
    proc::run(
        "/usr/lib/apt/apt-helper",
        &["download-file", uri.trim_matches('\''), &archive, hash],
    )?;
    let source = source.to_string_lossy().into_owned();
    proc::run("tar", &["-xf", &archive, "-C", &source, "--strip-components=1"])?;
    proc::run("make", &["-C", &source, "-j2", "passt"])?;
    fs::create_dir_all(tools().join("bin")).at("create", tools())?;
    stage::copy(&Path::new(&source).join("passt"), &built)?;
    Ok(built)
}
