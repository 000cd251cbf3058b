//! All effects of the agent go through the traits of `agent/src/effects` and its like (hypervisor, Slurm, peers, guest):
//! there stand the fault points, and there the simulation plugs in. This test reads the sources and fails on a direct call
//! elsewhere. What is allowed stands in [`RULES`], each with its reason; comments and test code do not count.
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// What is looked for.
enum Needle {
    /// In code, comments and strings apart: any of these.
    Code(&'static [&'static str]),
    /// A string that is exactly one of these.
    Word(&'static [&'static str]),
}

struct Rule {
    what: &'static str,
    needle: Needle,
    /// Files or directories (with `/` at the end) below agent/src, and why they may.
    allowed: &'static [(&'static str, &'static str)],
}

const SHIM: (&str, &str) = (
    "shim/",
    "the shim is a user's process of its own: files, sockets and time are its trade, and it is tested as a process",
);
const CLI: (&str, &str) = ("cli/", "svm is a process of its own that asks an agent and prints");
const LIBVIRT: (&str, &str) = ("hypervisor/libvirt/", "behind the trait Hypervisor");
const SLURM: (&str, &str) = ("slurm/run.rs", "behind the trait Slurm");
const DISKS: (&str, &str) = ("effects/disks.rs", "behind the trait Disks");
const AS_USER: (&str, &str) = ("effects/as_user.rs", "behind the trait AsUser");
const PEER: (&str, &str) = ("peer/", "behind the trait Peers: the channel between agents itself");
const SERVER: (&str, &str) = ("server/", "the agent's own socket: the outermost edge, tested as a process");
const DAEMON: (&str, &str) = ("bin/", "a process's start: pid, directories, sockets");

const RULES: &[Rule] = &[
    Rule {
        what: "a file system call",
        needle: Needle::Code(&[
            "fs::",
            "OpenOptions",
            "File::open",
            "File::create",
            "File::options",
            ".exists()",
            ".is_dir()",
            ".is_file()",
        ]),
        allowed: &[
            SHIM,
            CLI,
            LIBVIRT,
            DISKS,
            AS_USER,
            PEER,
            SERVER,
            DAEMON,
            ("effects/seed.rs", "behind the trait Disks"),
            ("effects/store.rs", "behind the trait Store"),
            ("effects/trusted.rs", "behind the trait Files"),
            ("effects/private.rs", "behind the trait Files: owners and modes"),
            ("effects/files.rs", "behind the trait Files"),
            ("slurm/commands.rs", "behind the trait Slurm: where its commands are"),
            ("config.rs", "the configuration is read once, before anything else"),
            ("cluster/tls.rs", "behind the trait Peers: sockets of a move"),
            ("node/probe.rs", "asks once, at the start, what the host can do"),
            (
                "node/shared.rs",
                "a site's directories: their owners and modes, which Files does not have",
            ),
            (
                "vm/spool.rs",
                "kept output is written by offset into an open file: no fault point stands between two writes of it",
            ),
        ],
    },
    Rule {
        what: "a child process",
        needle: Needle::Code(&["Command::new", "process::Command"]),
        allowed: &[SLURM, DISKS, AS_USER],
    },
    Rule {
        what: "a socket",
        needle: Needle::Code(&[
            "std::net",
            "UnixStream",
            "UnixListener",
            "UnixDatagram",
            "TcpStream",
            "TcpListener",
            "UdpSocket",
        ]),
        allowed: &[
            SHIM,
            CLI,
            PEER,
            SERVER,
            AS_USER,
            ("cluster/tls.rs", "behind the trait Peers"),
            ("guest/transport.rs", "behind the trait Transport: the guest helper's port"),
        ],
    },
    Rule {
        what: "the wall clock",
        needle: Needle::Code(&["SystemTime::now"]),
        allowed: &[
            ("effects/mod.rs", "behind the trait Clock"),
            ("logging.rs", "the time before a log line"),
        ],
    },
    Rule {
        what: "a monotonic clock",
        needle: Needle::Code(&["Instant::now"]),
        allowed: &[
            SHIM,
            LIBVIRT,
            SLURM,
            AS_USER,
            PEER,
            SERVER,
            (
                "limits.rs",
                "how long a client waits for its turn; the accounts themselves are told the time",
            ),
            ("guest/transport.rs", "deadline of a read"),
            ("effects/mod.rs", "behind the trait Clock"),
        ],
    },
    Rule {
        what: "a thread that sleeps past the clock",
        needle: Needle::Code(&["thread::sleep"]),
        allowed: &[
            SHIM,
            LIBVIRT,
            SLURM,
            AS_USER,
            PEER,
            SERVER,
            ("effects/mod.rs", "behind the trait Clock"),
        ],
    },
    Rule {
        what: "randomness",
        needle: Needle::Code(&["rand::", "getrandom", "thread_rng", "new_v4", "RandomState"]),
        allowed: &[],
    },
    Rule {
        what: "libvirt",
        needle: Needle::Code(&["virDomain", "virConnect", "virEvent", "virGetLastError"]),
        allowed: &[LIBVIRT],
    },
    Rule {
        what: "virsh",
        needle: Needle::Word(&["virsh", "/usr/bin/virsh"]),
        allowed: &[],
    },
    Rule {
        what: "a command of Slurm's",
        needle: Needle::Word(&["scontrol", "squeue", "sinfo", "sbatch", "sacct", "scancel", "srun", "salloc"]),
        allowed: &[("slurm/", "behind the trait Slurm")],
    },
];

/// A source without its comments, its test code, and (in `code`) its strings.
struct Source {
    code: String,
    strings: Vec<(usize, String)>,
}

fn read(text: &str) -> Source {
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or(text);
    let bytes: Vec<char> = text.chars().collect();
    let (mut code, mut strings, mut line, mut i) = (String::new(), Vec::new(), 1_usize, 0_usize);
    let at = |i: usize| bytes.get(i).copied().unwrap_or('\0');
    while i < bytes.len() {
        let c = bytes[i];
        if c == '/' && at(i + 1) == '/' {
            while i < bytes.len() && bytes[i] != '\n' {
                i += 1;
            }
        } else if c == '/' && at(i + 1) == '*' {
            let mut depth = 1;
            i += 2;
            while i < bytes.len() && depth > 0 {
                match (bytes[i], at(i + 1)) {
                    ('/', '*') => (depth, i) = (depth + 1, i + 1),
                    ('*', '/') => (depth, i) = (depth - 1, i + 1),
                    ('\n', _) => {
                        line += 1;
                        code.push('\n');
                    }
                    _ => {}
                }
                i += 1;
            }
        } else if c == '"' || (c == 'r' && matches!(at(i + 1), '"' | '#') && !code.ends_with(|p: char| p.is_alphanumeric() || p == '_')) {
            let raw = c == 'r';
            let mut hashes = 0;
            if raw {
                i += 1;
                while at(i) == '#' {
                    (hashes, i) = (hashes + 1, i + 1);
                }
                if at(i) != '"' {
                    // A raw identifier, or the end.
                    code.push('r');
                    continue;
                }
            }
            let (begin, mut string) = (line, String::new());
            i += 1;
            while i < bytes.len() {
                match bytes[i] {
                    '\\' if !raw => {
                        i += 1;
                        string.push(at(i));
                    }
                    '"' if (0..hashes).all(|h| at(i + 1 + h) == '#') => break,
                    other => string.push(other),
                }
                if at(i) == '\n' {
                    line += 1;
                    code.push('\n');
                }
                i += 1;
            }
            i += 1 + hashes;
            code.push_str("\"\"");
            strings.push((begin, string));
        } else if c == '\'' && (at(i + 2) == '\'' || (at(i + 1) == '\\' && at(i + 3) == '\'')) {
            // A character, not a lifetime.
            i += if at(i + 1) == '\\' { 4 } else { 3 };
            code.push_str("' '");
        } else {
            if c == '\n' {
                line += 1;
            }
            code.push(c);
            i += 1;
        }
    }
    Source { code, strings }
}

/// `a::fs::x`, but not `my_fs::x`: what stands before must not be a part of the word.
fn finds(line: &str, needle: &str) -> bool {
    let joins = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(needle)
        .any(|(at, _)| !needle.starts_with(joins) || !line[..at].ends_with(joins))
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
        let name = entry.file_name().unwrap().to_string_lossy().into_owned();
        if entry.is_dir() {
            if name != "fake" {
                sources(&entry, found);
            }
        } else if name.ends_with(".rs") && !name.ends_with("tests.rs") && name != "fake.rs" {
            found.push(entry);
        }
    }
}

#[test]
fn every_effect_goes_through_its_trait() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("agent/src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    files.sort();
    assert!(files.len() > 50, "only {} sources found below {}", files.len(), root.display());
    let (mut wrong, mut used) = (Vec::new(), BTreeSet::new());
    for path in files {
        let name = path.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
        let source = read(&fs::read_to_string(&path).unwrap());
        for rule in RULES {
            let hits: Vec<(usize, String)> = match rule.needle {
                Needle::Code(needles) => source
                    .code
                    .lines()
                    .enumerate()
                    .filter(|(_, line)| needles.iter().any(|n| finds(line, n)))
                    .map(|(i, line)| (i + 1, line.trim().to_owned()))
                    .collect(),
                Needle::Word(words) => source
                    .strings
                    .iter()
                    .filter(|(_, s)| words.contains(&s.as_str()))
                    .cloned()
                    .collect(),
            };
            let allowed = rule
                .allowed
                .iter()
                .find(|(place, _)| *place == name || (place.ends_with('/') && name.starts_with(place)));
            match allowed {
                Some((place, _)) if !hits.is_empty() => {
                    used.insert((rule.what, *place));
                }
                Some(_) => {}
                None => wrong.extend(
                    hits.iter()
                        .map(|(line, text)| format!("agent/src/{name}:{line}: {}: {text}", rule.what)),
                ),
            }
        }
    }
    for rule in RULES {
        for (place, reason) in rule.allowed {
            assert!(!reason.is_empty(), "{place} may have {} for no reason", rule.what);
            if !used.contains(&(rule.what, *place)) {
                wrong.push(format!("{place} may have {}, and has none: the entry goes", rule.what));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "direct effects outside the modules that may have them (tests/effects.rs, RULES):\n{}",
        wrong.join("\n")
    );
}

/// The core decides, and does nothing: no thread, no channel, no log, not even a look at the time.
#[test]
fn the_core_is_pure() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("agent/src/core");
    let mut files = Vec::new();
    sources(&root, &mut files);
    for path in files {
        let source = read(&fs::read_to_string(&path).unwrap());
        for needle in [
            "Instant",
            "SystemTime",
            "thread::",
            "channel",
            "Mutex",
            "log::",
            "std::env",
            "std::io",
        ] {
            assert!(!finds(&source.code, needle), "{} has {needle}", path.display());
        }
    }
}

#[test]
fn comments_strings_and_tests_are_not_taken_for_code() {
    let source = read(
        "a(); // fs::read\n/* Command::new /* x */ */ let s = \"fs::write \\\" y\"; let c = '\"'; b();\nr#\"fs::q \" \"#\n#[cfg(test)]\nmod tests {\n fs::read()",
    );
    assert!(!source.code.contains("fs::") && !source.code.contains("Command"), "{}", source.code);
    assert!(source.code.contains("a();") && source.code.contains("b();"));
    assert_eq!(source.strings.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [2, 3]);
    assert!(finds("std::fs::read(x)", "fs::") && !finds("my_fs::read(x)", "fs::"));
}
