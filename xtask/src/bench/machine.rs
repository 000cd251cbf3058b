//! On what was measured.

use crate::{lab::Lab, proc};

/// Lines for a report: machine, load, versions.
pub fn notes(lab: &Lab, host: &str) -> Vec<String> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let first = |text: String| text.lines().next().unwrap_or("").trim().to_owned();
    let said = |argv: &[&str]| {
        lab.command(host, "root", argv)
            .ok()
            .and_then(|mut c| c.output().ok())
            .map(|o| first(proc::text_of(&o)))
    };
    let model = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = model
        .lines()
        .find_map(|l| l.strip_prefix("model name"))
        .unwrap_or("unknown")
        .trim_start_matches([':', ' ', '\t'])
        .to_owned();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let versions: Vec<String> = [
        said(&["slurmd", "-V"]),
        said(&["libvirtd", "--version"]),
        said(&["qemu-system-x86_64", "--version"]),
    ]
    .into_iter()
    .flatten()
    .collect();
    vec![
        format!(
            "machine: {cores} cores, {model}, Linux {}; guests by emulation (TCG); release build",
            kernel.trim()
        ),
        format!("versions: {}", versions.join("; ")),
        load("load average at the start"),
    ]
}

/// One line on how fast the nodes send.
pub fn line(mbit: u32) -> String {
    match mbit {
        0 => "line: none, the nodes share the machine's memory".into(),
        mbit => format!("line: {mbit} Mbit/s out of each node"),
    }
}

/// One line on how busy the machine is beside this bench.
pub fn load(when: &str) -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    format!("{when}: {}", load.split(' ').take(3).collect::<Vec<_>>().join(" "))
}
