//! The shipped configuration is the reference: it has every key, with its default, and nothing else.
use std::path::Path;

use slurm_vm::config::Config;

const SAMPLE: &str = include_str!("../packaging/slurm-vm.toml");

/// The keys of a table, from the message about one that is unknown.
fn known_keys(table: &str) -> Vec<String> {
    let text = if table.is_empty() {
        "no_such_key = 1\n".to_owned()
    } else {
        format!("[{table}]\nno_such_key = 1\n")
    };
    let message = Config::parse(&text, Path::new("x")).unwrap_err().to_string();
    let (_, list) = message
        .split_once("expected ")
        .unwrap_or_else(|| panic!("no list of keys in: {message}"));
    list.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// The lines of a table in the sample: from its heading, commented out or not, to the next.
fn table_in_sample(table: &str) -> Vec<&str> {
    let heading = |line: &str| {
        line.trim_start_matches('#')
            .strip_prefix('[')
            .and_then(|l| l.strip_suffix(']'))
            .map(str::to_owned)
    };
    let mut lines = SAMPLE.lines();
    if !table.is_empty() {
        assert!(
            lines.any(|line| heading(line).as_deref() == Some(table)),
            "the sample has no table [{table}]"
        );
    }
    lines.take_while(|line| heading(line).is_none()).collect()
}

#[test]
fn the_sample_means_the_defaults() {
    let sample = Config::parse(SAMPLE, Path::new("packaging/slurm-vm.toml")).unwrap();
    let defaults = Config::parse("", Path::new("none")).unwrap();
    assert_eq!(format!("{sample:#?}"), format!("{defaults:#?}"));
}

#[test]
fn the_sample_has_every_key() {
    let tables = ["hypervisor", "peer", "node", "controller", "files", "network"];
    for (table, in_sample) in [("", ""), ("images.x", "images.debian")].into_iter().chain(tables.map(|t| (t, t))) {
        let lines = table_in_sample(in_sample);
        let keys: Vec<String> = known_keys(table)
            .into_iter()
            .filter(|k| !tables.contains(&k.as_str()) && k != "images")
            .collect();
        assert!(keys.len() > 1, "{table}: {keys:?}");
        for key in keys {
            let there = lines
                .iter()
                .any(|line| line.trim_start_matches('#').split('=').next().is_some_and(|k| k.trim() == key));
            assert!(there, "[{table}] {key} is missing in packaging/slurm-vm.toml");
        }
    }
}

#[test]
fn what_the_sample_has_commented_out_is_accepted_too() {
    let live: String = SAMPLE
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(rest) if !rest.starts_with(' ') => rest,
            _ => line,
        })
        .flat_map(|line| [line, "\n"])
        .collect();
    let config = Config::parse(&live, Path::new("packaging/slurm-vm.toml")).unwrap_or_else(|e| panic!("{e}\n{live}"));
    assert_eq!(config.node_name.as_deref(), Some("n1"));
    assert!(config.images.contains_key("debian") && config.shared_dir.is_some());
}
