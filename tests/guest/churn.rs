//! Runs in a guest: counts in memory and prints each number with a running checksum, the boot id, its pid and the guest's
//! time, and between two numbers rewrites a large memory that it checks while it does so. Built with rustc by the tests.
//!
//! `churn NUMBERS INTERVAL_MS MEMORY_MIB REWRITE_MIB_PER_INTERVAL`
use std::{
    env, fs,
    hint::black_box,
    process::ExitCode,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

const PAGE_WORDS: usize = 512;

/// What a page holds after it was written that often.
fn word(page: usize, times: u64, k: usize) -> u64 {
    (page as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ times.wrapping_mul(0xd134_2543_de82_ef95) ^ (k as u64) << 17
}

fn main() -> ExitCode {
    let args: Vec<usize> = env::args().skip(1).map(|a| a.parse().expect("numbers")).collect();
    let [numbers, interval_ms, memory_mib, rewrite_mib] = args[..] else { panic!("four numbers") };
    let pages = memory_mib * 256;
    let mut memory = vec![0u64; pages * PAGE_WORDS];
    let mut times = vec![0u64; pages];
    let mut next = 0;
    let mut rewrite = |memory: &mut [u64], count: usize| -> Result<(), usize> {
        for _ in 0..count {
            let page = &mut memory[next * PAGE_WORDS..][..PAGE_WORDS];
            for k in (0..PAGE_WORDS).step_by(64) {
                if times[next] > 0 && black_box(page[k]) != word(next, times[next], k) {
                    return Err(next);
                }
                page[k] = word(next, times[next] + 1, k);
            }
            times[next] += 1;
            next = (next + 1) % pages.max(1);
        }
        Ok(())
    };
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("a boot id");
    let (boot, pid) = (boot.trim(), std::process::id());
    let mut sum = 0u64;
    if pages > 0 {
        rewrite(&mut memory, pages).expect("fresh memory");
    }
    for i in 1..=numbers as u64 {
        let until = Instant::now() + Duration::from_millis(interval_ms as u64);
        sum = (sum * 31 + i) % 1_000_003;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a time after 1970").as_millis();
        println!("{i} {sum} {boot} {pid} {now}");
        if let Err(page) = rewrite(&mut memory, if pages > 0 { rewrite_mib * 256 } else { 0 }) {
            println!("memory is damaged at page {page}");
            return ExitCode::from(9);
        }
        thread::sleep(until.saturating_duration_since(Instant::now()));
    }
    if pages > 0 && let Err(page) = rewrite(&mut memory, pages) {
        println!("memory is damaged at page {page}");
        return ExitCode::from(9);
    }
    ExitCode::SUCCESS
}
