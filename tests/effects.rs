//! Effects go through the traits of `effects::World`, or live in the one module that is made for them. This reads the sources and
//! fails on a direct call elsewhere: what goes round the traits is seen by neither the fault points nor the simulation.
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Calls of one kind and where they may stand.
struct Rule {
    kind: &'static str,
    calls: &'static [&'static str],
    /// Files or directories (they end in `/`) below agent/src for whose sake the kind exists, or that are not the agent: shim and `svm`.
    home: &'static [&'static str],
    /// Elsewhere, by file: no more than these. The simulation does not see them; the numbers are to go down.
    debt: &'static [(&'static str, usize)],
}

const RULES: [Rule; 6] = [
    Rule {
        kind: "running a program",
        calls: &["Command::new("],
        home: &["effects/", "slurm/run.rs"],
        debt: &[],
    },
    Rule {
        kind: "the wall clock",
        calls: &["SystemTime::now("],
        home: &["effects/", "logging.rs", "shim/", "cli/"],
        debt: &[],
    },
    Rule {
        kind: "calling libvirt",
        calls: &["sys::vir", "virConnect", "virDomain"],
        home: &["hypervisor/libvirt/"],
        debt: &[],
    },
    Rule {
        kind: "randomness",
        calls: &["Uuid::new_v4(", "getrandom", "/dev/urandom", "SystemRandom"],
        home: &["effects/", "hypervisor/libvirt/", "peer/"],
        debt: &[],
    },
    Rule {
        kind: "sockets",
        calls: &[
            "TcpStream::connect",
            "UnixStream::connect",
            "TcpListener::bind",
            "UnixListener::bind",
        ],
        home: &["peer/", "server/", "cluster/tls.rs", "guest/transport.rs", "shim/", "cli/"],
        debt: &[],
    },
    Rule {
        kind: "files",
        calls: &["fs::", "File::open(", "File::create(", "OpenOptions::new("],
        home: &[
            "effects/",
            "slurm/run.rs",
            "peer/",
            "server/",
            "cluster/tls.rs",
            "shim/",
            "cli/",
            "bin/",
            "config.rs",
            "hypervisor/libvirt/",
            "vm/spool.rs",
            "vm/saving.rs",
            "sweep.rs",
        ],
        debt: &[("controller/moves.rs", 4), ("node.rs", 5), ("vm/moving.rs", 4), ("probe.rs", 3)],
    },
];

/// The pure core does nothing of all this, and does not even ask what time it is.
const NOT_IN_CORE: [&str; 6] = ["Instant::now(", "SystemTime", "fs::", "thread::", "std::net", "channel"];

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if name != "fake" {
                sources(&path, found);
            }
        } else if name.ends_with(".rs") && !name.ends_with("tests.rs") && name != "fake.rs" {
            found.push(path);
        }
    }
}

/// The lines that are neither comment, import nor test, with their numbers.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let end = text.find("#[cfg(test)]\nmod tests").unwrap_or(text.len());
    let mut importing = false;
    text[..end]
        .lines()
        .enumerate()
        .map(|(i, line)| (i + 1, line.split("//").next().unwrap_or("").trim()))
        .filter(move |(_, line)| {
            let import = importing || line.starts_with("use ") || line.starts_with("pub use ");
            importing = import && !line.ends_with(';');
            !import
        })
}

/// All direct calls: by rule and file.
fn calls() -> Vec<(&'static Rule, String, Vec<String>)> {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("agent/src");
    let mut files = Vec::new();
    sources(&top, &mut files);
    assert!(files.len() > 50, "only {} sources in {}", files.len(), top.display());
    let mut all = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let name = file.strip_prefix(&top).unwrap().to_string_lossy().into_owned();
        for rule in &RULES {
            let found: Vec<String> = code(&text)
                .filter(|(_, line)| rule.calls.iter().any(|call| line.contains(call)))
                .map(|(n, line)| format!("agent/src/{name}:{n}: {line}"))
                .collect();
            if !found.is_empty() {
                all.push((rule, name.clone(), found));
            }
        }
    }
    all
}

#[test]
fn effects_go_through_their_traits() {
    let mut wrong = Vec::new();
    for (rule, file, found) in calls() {
        if rule
            .home
            .iter()
            .any(|home| file == *home || (home.ends_with('/') && file.starts_with(home)))
        {
            continue;
        }
        let owed = rule.debt.iter().find(|(f, _)| *f == file).map_or(0, |(_, n)| *n);
        if found.len() > owed {
            wrong.push(format!("{} directly:\n  {}", rule.kind, found.join("\n  ")));
        }
    }
    assert!(
        wrong.is_empty(),
        "these belong behind the traits of effects::World:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn the_core_is_pure() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("agent/src/core");
    let mut files = Vec::new();
    sources(&top, &mut files);
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        for (n, line) in code(&text) {
            for call in NOT_IN_CORE {
                assert!(!line.contains(call), "{}:{n}: {line}", file.display());
            }
        }
    }
}

#[test]
fn a_call_in_a_comment_an_import_or_a_test_does_not_count() {
    let text =
        "use std::{\n    fs::File,\n};\n// fs::read\nlet x = fs::read(p); // fs::write\n#[cfg(test)]\nmod tests {\n    fs::read();\n}\n";
    let lines: Vec<_> = code(text).filter(|(_, l)| l.contains("fs::")).collect();
    assert_eq!(lines, [(5, "let x = fs::read(p);")]);
}
