//! Gigabytes of output into a slow reader: nothing in between grows.
mod common;

use std::{
    io::Read,
    process::Stdio,
    sync::OnceLock,
    time::{Duration, Instant},
};

use common::{Alice, Said, start};
use xtask::{Lab, Options};

const TOTAL: u64 = 2 << 30;

fn lab() -> &'static Lab {
    static LAB: OnceLock<Lab> = OnceLock::new();
    LAB.get_or_init(|| {
        start(
            &Options {
                nodes: 1,
                grace_s: 20,
                ..Options::named("t-bulk")
            },
            &[],
        )
    })
}

/// Resident KiB of the processes with this name on n1.
fn resident(name: &str) -> u64 {
    let said: Said = lab()
        .node("n1", &["sh", "-c", &format!("ps -C {name} -o rss= | sort -n | tail -1")])
        .into();
    said.out.trim().parse().unwrap_or(0)
}

#[test]
fn two_gibibytes_into_a_slow_reader_cost_no_memory_anywhere() {
    let t = Alice::new(lab(), "slow");
    let mut child = t
        .command("srun --vm=tiny --vm-mem=200 sh -c 'yes 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde | head -c 2147483648; grep -E \"VmHWM\" /proc/$(pidof slurm-vm-guest)/status >&2'")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("srun");
    let mut out = child.stdout.take().expect("its output");
    let (mut got, mut buffer, begun) = (0u64, vec![0u8; 1 << 20], Instant::now());
    let mut peak = [0u64; 3];
    let (names, limits) = (["slurm-vm-run", "slurm-vmd", "qemu-system-x86"], [40 << 10, 120 << 10, 420 << 10]);
    let mut next_look = Instant::now();
    let line = b"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde\n";
    loop {
        let n = out.read(&mut buffer).expect("output");
        if n == 0 {
            break;
        }
        for (i, b) in buffer[..n].iter().enumerate() {
            let at = usize::try_from((got + i as u64) % line.len() as u64).expect("a column");
            assert_eq!(*b, line[at], "at byte {}", got + i as u64);
        }
        got += n as u64;
        if Instant::now() >= next_look {
            next_look = Instant::now() + Duration::from_secs(5);
            for (peak, name) in peak.iter_mut().zip(names) {
                *peak = (*peak).max(resident(name));
            }
            println!("{} MiB after {} s, KiB resident: {peak:?}", got >> 20, begun.elapsed().as_secs());
        }
        // Slower than the guest for the first 64 MiB: everything before the reader fills up.
        if got < 64 << 20 {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let rest = child.wait_with_output().expect("its end");
    let err = String::from_utf8_lossy(&rest.stderr).into_owned();
    println!("{err}");
    assert!(rest.status.success(), "{}", rest.status);
    assert_eq!(got, TOTAL);
    for ((peak, limit), name) in peak.iter().zip(limits).zip(names) {
        assert!(*peak > 0 && *peak < limit, "{name}: {peak} KiB of {limit}");
    }
    let helper: u64 = err
        .split_whitespace()
        .skip_while(|w| *w != "VmHWM:")
        .nth(1)
        .and_then(|n| n.parse().ok())
        .expect("the helper's peak");
    assert!(helper < 40 << 10, "the guest helper took {helper} KiB");
}
