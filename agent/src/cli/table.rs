//! Columns as squeue has them: numbers to the right, names to the left, as wide as the widest entry.
use std::fmt::Write;

use slurm_vm_api::{
    query::{NodeHealth, Totals, VmView},
    size::format_mib,
};

use super::images::Image;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Left,
    Right,
}
use Side::{Left, Right};

/// Lines of aligned columns under a heading. Nothing follows the last entry of a line.
fn layout(heading: &[(&str, Side)], rows: &[Vec<String>]) -> String {
    let width = |s: &str| s.chars().count();
    let widths: Vec<usize> = heading
        .iter()
        .enumerate()
        .map(|(i, (name, _))| rows.iter().map(|r| width(&r[i])).chain([width(name)]).max().unwrap_or(0))
        .collect();
    let names: Vec<String> = heading.iter().map(|(name, _)| (*name).to_owned()).collect();
    let mut text = String::new();
    for row in std::iter::once(&names).chain(rows) {
        let mut line = String::new();
        for ((entry, (_, side)), width) in row.iter().zip(heading).zip(&widths) {
            let _ = match side {
                Left => write!(line, "{entry:<width$} "),
                Right => write!(line, "{entry:>width$} "),
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// A VM that is over, here and everywhere.
pub fn has_ended(vm: &VmView) -> bool {
    ["stopped", "gone"].contains(&vm.state.to_lowercase().as_str())
}

/// `svm list`.
pub fn vms(vms: &[VmView]) -> String {
    let heading = [
        ("JOBID", Right),
        ("USER", Right),
        ("NODE", Left),
        ("IMAGE", Left),
        ("CPUS", Right),
        ("MEM", Right),
        ("DISK", Right),
        ("TIME", Right),
        ("STATE", Left),
    ];
    let rows: Vec<Vec<String>> = vms
        .iter()
        .map(|vm| {
            vec![
                vm.job.to_string(),
                vm.user.clone(),
                dash(&vm.node),
                vm.image.clone(),
                vm.vcpus.to_string(),
                format_mib(vm.mem_mib),
                bytes(vm.disk_bytes),
                span(vm.run_seconds),
                vm.why
                    .as_ref()
                    .map_or_else(|| vm.state.clone(), |why| format!("{} ({why})", vm.state)),
            ]
        })
        .collect();
    layout(&heading, &rows)
}

/// `svm list --totals`.
pub fn totals(totals: &[Totals]) -> String {
    let heading = [
        ("TOTAL", Left),
        ("VMS", Right),
        ("CPUS", Right),
        ("MEM", Right),
        ("DISK", Right),
        ("TIME", Right),
        ("CPUTIME", Right),
        ("ENDED", Right),
        ("MOVES", Right),
        ("MOVED", Right),
    ];
    let rows: Vec<Vec<String>> = totals
        .iter()
        .map(|t| {
            vec![
                t.scope.clone(),
                t.vms.to_string(),
                t.vcpus.to_string(),
                format_mib(t.mem_mib),
                bytes(t.disk_bytes),
                span(t.run_seconds),
                span(t.vcpu_seconds),
                t.ended.to_string(),
                t.moves.to_string(),
                bytes(t.moved_bytes),
            ]
        })
        .collect();
    layout(&heading, &rows)
}

/// `svm health`.
pub fn nodes(nodes: &[NodeHealth]) -> String {
    let heading = [
        ("NODE", Left),
        ("HEALTH", Left),
        ("VERSION", Left),
        ("TYPE", Left),
        ("REASON", Left),
    ];
    let rows: Vec<Vec<String>> = nodes
        .iter()
        .map(|n| {
            vec![
                n.node.clone(),
                if n.healthy { "ok" } else { "sick" }.to_owned(),
                dash(&n.version),
                dash(&n.domain_type),
                n.why.clone().unwrap_or_default(),
            ]
        })
        .collect();
    layout(&heading, &rows)
}

/// `svm images`.
pub fn images(images: &[Image]) -> String {
    let heading = [("NAME", Left), ("BOOT", Left), ("DISK", Left), ("DESCRIPTION", Left)];
    let rows: Vec<Vec<String>> = images
        .iter()
        .map(|i| {
            let boot = match (i.settings.is_empty(), i.text("kernel").is_empty()) {
                (true, _) => "-",
                (_, true) => "disk",
                (_, false) => "kernel",
            };
            vec![
                i.name.clone(),
                boot.to_owned(),
                dash(i.text("disk")),
                i.text("description").to_owned(),
            ]
        })
        .collect();
    layout(&heading, &rows)
}

/// What is empty is shown as a dash, so that columns can be cut by scripts.
pub fn dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

/// Bytes in the largest binary unit that leaves at least one before the point, as `ls -h` does.
pub fn bytes(n: u64) -> String {
    let units = ["", "K", "M", "G", "T", "P", "E"];
    let unit = (0..units.len()).rev().find(|i| n >> (10 * i) > 0).unwrap_or(0);
    if unit == 0 {
        return n.to_string();
    }
    let tenths = u128::from(n) * 10 / (1u128 << (10 * unit));
    if tenths < 100 {
        format!("{}.{}{}", tenths / 10, tenths % 10, units[unit])
    } else {
        format!("{}{}", tenths / 10, units[unit])
    }
}

/// Seconds as squeue writes them: `M:SS`, `H:MM:SS`, `D-HH:MM:SS`.
pub fn span(seconds: u64) -> String {
    let (d, h, m, s) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    match (d, h) {
        (0, 0) => format!("{m}:{s:02}"),
        (0, _) => format!("{h}:{m:02}:{s:02}"),
        _ => format!("{d}-{h:02}:{m:02}:{s:02}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(job: u32, user: &str, node: &str, image: &str) -> VmView {
        VmView {
            job,
            user: user.into(),
            node: node.into(),
            image: image.into(),
            state: "running".into(),
            vcpus: 2,
            mem_mib: 2048,
            disk_bytes: 1_288_490_189,
            run_seconds: 3_725,
            ..VmView::default()
        }
    }

    #[test]
    fn columns_align_with_long_names() {
        let mut long = vm(
            1_234_567,
            "a.very.long.user.name",
            "compute-rack12-node007",
            "debian-12-with-everything",
        );
        (long.vcpus, long.mem_mib, long.disk_bytes, long.run_seconds) = (128, 1_536, 0, 900_061);
        (long.state, long.why) = ("leaving".into(), Some("to n2, live".into()));
        let text = vms(&[vm(12, "alice", "n1", "tiny"), long]);
        let golden = "\
\x20 JOBID                  USER NODE                   IMAGE                     CPUS   MEM DISK        TIME STATE
     12                 alice n1                     tiny                         2    2G 1.2G     1:02:05 running
1234567 a.very.long.user.name compute-rack12-node007 debian-12-with-everything  128 1536M    0 10-10:01:01 leaving (to n2, live)
";
        assert_eq!(text, golden);
        assert_eq!(vms(&[]), "JOBID USER NODE IMAGE CPUS MEM DISK TIME STATE\n");
    }

    #[test]
    fn totals_health_and_images_have_their_columns() {
        let sum = Totals {
            scope: "cluster".into(),
            vms: 3,
            vcpus: 6,
            mem_mib: 6144,
            disk_bytes: 5 << 30,
            run_seconds: 59,
            vcpu_seconds: 118,
            ended: 41,
            moves: 7,
            moved_bytes: 12 << 30,
        };
        let golden = "\
TOTAL   VMS CPUS MEM DISK TIME CPUTIME ENDED MOVES MOVED
cluster   3    6  6G 5.0G 0:59    1:58    41     7   12G
";
        assert_eq!(totals(&[sum]), golden);
        let well = NodeHealth {
            node: "n1".into(),
            healthy: true,
            version: "0.1.0".into(),
            domain_type: "kvm".into(),
            why: None,
            storage: None,
        };
        let ill = NodeHealth {
            node: "n10".into(),
            why: Some("libvirt does not answer".into()),
            ..NodeHealth::default()
        };
        let golden = "\
NODE HEALTH VERSION TYPE REASON
n1   ok     0.1.0   kvm
n10  sick   -       -    libvirt does not answer
";
        assert_eq!(nodes(&[well, ill]), golden);
        let settings = "kernel = \"/k\"\ndisk = \"/i/tiny.qcow2\"\ndescription = \"small, for tests\""
            .parse()
            .unwrap();
        let known = Image {
            name: "tiny".into(),
            settings,
        };
        let golden = "\
NAME   BOOT   DISK          DESCRIPTION
tiny   kernel /i/tiny.qcow2 small, for tests
debian -      -
";
        assert_eq!(
            images(&[
                known,
                Image {
                    name: "debian".into(),
                    settings: toml::Table::new()
                }
            ]),
            golden
        );
    }

    #[test]
    fn sizes_and_times_are_written_as_users_know_them() {
        let cases = [
            (0, "0"),
            (1023, "1023"),
            (1024, "1.0K"),
            (10 << 20, "10M"),
            (1_073_741_823, "1023M"),
            (u64::MAX, "15E"),
        ];
        for (n, text) in cases {
            assert_eq!(bytes(n), text);
        }
        for (n, text) in [(0, "0:00"), (61, "1:01"), (3600, "1:00:00"), (86_400, "1-00:00:00")] {
            assert_eq!(span(n), text);
        }
    }
}
