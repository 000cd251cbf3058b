//! Looks after a live move. QEMU stops the guest as soon as it thinks that what is left fits into the allowed downtime,
//! so a guest that writes little is stopped early with much left, if much is allowed: a move begins with a short downtime,
//! and more is allowed by and by, up to the site's limit, when it does not converge.
//!
//! A move with a deadline is given up in time for the next way of the chain when memory is written faster than it is
//! carried; before that, the guest may stand still longer if that is all that is missing. QEMU slows the guest down
//! meanwhile (auto-converge). A move without a deadline goes on until it converges or is cancelled.
use std::{sync::Arc, thread::JoinHandle, time::Duration};

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use slurm_vm_api::spec::PreemptWay;

use super::moving::ways;
use crate::{core::Record, hypervisor::JobProgress, node::Node};

/// How often a running move is looked at.
const WATCH: Duration = Duration::from_millis(250);
/// What ending the move, requeueing the job and ending its step take, beside the save itself, in milliseconds.
const END_MS: u64 = 2_000;
/// Bytes per second of a save before any was made here: a slow disk's.
const SAVE_SPEED: u64 = 100 << 20;
/// Downtime that a move begins with, in milliseconds. Short: what QEMU is allowed it uses up, and a guest that needs more is seen after two passes.
const FIRST_DOWNTIME_MS: u64 = 5;
/// QEMU's own limit (`downtime-limit`), in milliseconds.
const QEMU_DOWNTIME_MS: u64 = 300;
/// Longest downtime that is allowed near the end, in milliseconds.
const LAST_DOWNTIME_MS: u64 = 2_000;

/// Milliseconds that the ways after `live` need before the deadline: for a save, the guest's memory in use at the speed of
/// this node's last save, and half as much again.
#[must_use]
pub fn reserve_ms(node: &Node, record: &Record) -> u64 {
    let saves = node.config.shared_dir.is_some() && ways(&node.config, record).contains(&PreemptWay::Save);
    if !saves {
        return END_MS;
    }
    let memory = node
        .world
        .hypervisor
        .memory_in_use(&record.domain())
        .unwrap_or_else(|_| record.plan.as_ref().map_or(0, |p| p.mem_mib << 20));
    END_MS + save_ms(memory, node.save_speed())
}

fn save_ms(memory: u64, speed: Option<u64>) -> u64 {
    memory.saturating_mul(1500) / speed.unwrap_or(SAVE_SPEED).max(1)
}

/// What to do about a move now.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    GoOn,
    /// Allow the guest to stand still for so many milliseconds.
    Allow(u64),
    GiveUp(String),
}

/// Downtime that a move begins with, in milliseconds; `None`: QEMU's own.
#[must_use]
pub fn first_downtime(limit_ms: u64) -> Option<u64> {
    (limit_ms > 0).then_some(limit_ms.min(FIRST_DOWNTIME_MS))
}

/// How much time is left, and how much of it the next way needs, in milliseconds.
#[derive(Debug, Clone, Copy)]
struct Time {
    left: u64,
    reserve: u64,
}

/// `downtime_ms`: allowed so far, `limit_ms`: by the site; 0 leaves it to QEMU.
fn decide(p: &JobProgress, time: Option<Time>, downtime_ms: u64, limit_ms: u64) -> Step {
    let late = time.is_some_and(|t| t.left <= t.reserve);
    // What is left in this pass, at the speed so far. In the first pass nothing is known of what the guest writes.
    let needs_ms = (p.bandwidth_bytes_s > 0).then(|| p.bytes_left * 1000 / p.bandwidth_bytes_s);
    // A move that is nearly there is not given up for a way that takes longer.
    let nearly = p.bytes_done > 0 && time.is_some_and(|t| needs_ms.is_some_and(|ms| ms < t.reserve / 8 && t.left > t.reserve / 2));
    if late && p.bytes_done == 0 {
        return Step::GiveUp("the time is up before the copying has begun".into());
    }
    let Some(needs_ms) = needs_ms.filter(|_| p.iteration >= 2) else {
        return if late && !nearly {
            Step::GiveUp(format!("{} MiB are left and the time is up", p.bytes_left >> 20))
        } else {
            Step::GoOn
        };
    };
    let converges = p.dirty_rate_bytes_s < p.bandwidth_bytes_s / 2;
    if late && !(nearly && converges) {
        return Step::GiveUp(format!(
            "it does not converge: the guest writes {} MiB/s, the line carries {} MiB/s, {} MiB are left",
            p.dirty_rate_bytes_s >> 20,
            p.bandwidth_bytes_s >> 20,
            p.bytes_left >> 20
        ));
    }
    // The last set of dirty pages is what the guest stands still for.
    let near = time.is_some_and(|t| t.left < t.reserve + LAST_DOWNTIME_MS * 2);
    if near && p.dirty_rate_bytes_s > p.bandwidth_bytes_s / 2 && needs_ms < LAST_DOWNTIME_MS && needs_ms > downtime_ms {
        return Step::Allow(needs_ms + 100);
    }
    if p.iteration > 2 && downtime_ms < limit_ms {
        return Step::Allow((downtime_ms * 2).min(limit_ms));
    }
    Step::GoOn
}

/// The watch over one move; it ends with [`Watch::end`], or when it is dropped.
pub(super) struct Watch(Option<(Sender<()>, JoinHandle<Option<String>>)>);

impl Watch {
    pub(super) fn start(node: &Arc<Node>, record: &Record, deadline_ms: Option<u64>) -> Self {
        let (stop, stopped) = bounded(1);
        let (node, domain) = (node.clone(), record.domain());
        let left = move |node: &Node| deadline_ms.map(|d| d.saturating_sub(node.world.clock.now_ms()));
        // Never more than half of the time: a live move is the better way.
        let reserve = left(&node).map_or(0, |left| reserve_ms(&node, record).min(left / 2));
        let watch = move || {
            let limit = node.config.node.move_downtime_ms;
            let mut downtime = first_downtime(limit).unwrap_or(QEMU_DOWNTIME_MS);
            while matches!(stopped.recv_timeout(WATCH), Err(RecvTimeoutError::Timeout)) {
                let Ok(Some(p)) = node.world.hypervisor.job_progress(&domain) else {
                    continue;
                };
                let time = left(&node).map(|left| Time { left, reserve });
                match decide(&p, time, downtime, limit) {
                    Step::GoOn => {}
                    Step::Allow(ms) => {
                        downtime = ms;
                        log::info!("{domain}: allowing {ms} ms of downtime so that the move ends");
                        let _ = node.world.hypervisor.migrate_tune(&domain, Some(ms), None);
                    }
                    Step::GiveUp(why) => {
                        log::warn!("{domain}: giving the live move up: {why}");
                        let _ = node.world.hypervisor.abort_job(&domain);
                        return Some(why);
                    }
                }
            }
            None
        };
        let thread = std::thread::Builder::new().name(format!("watch-{}", record.domain())).spawn(watch);
        Self(thread.ok().map(|thread| (stop, thread)))
    }

    /// Ends the watch at once; why it gave the move up, if it did.
    pub(super) fn end(self) -> Option<String> {
        let (stop, thread) = self.0?;
        drop(stop);
        thread.join().ok().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(iteration: u32, dirty_mib: u64, line_mib: u64, left_mib: u64) -> JobProgress {
        JobProgress {
            iteration,
            dirty_rate_bytes_s: dirty_mib << 20,
            bandwidth_bytes_s: line_mib << 20,
            bytes_left: left_mib << 20,
            bytes_done: 1 << 20,
            ..JobProgress::default()
        }
    }

    #[test]
    fn the_next_way_gets_the_time_that_a_save_took_here() {
        assert_eq!(save_ms(1 << 30, Some(512 << 20)), 3_000);
        assert_eq!(save_ms(100 << 20, None), 1_500, "before the first save a slow disk is expected");
        assert_eq!(save_ms(1, Some(0)), 1_500);
    }

    const TIME: fn(u64) -> Option<Time> = |left| Some(Time { left, reserve: 8_000 });

    #[test]
    fn a_move_goes_on_until_the_next_way_needs_the_time() {
        let busy = progress(5, 900, 100, 640);
        assert_eq!(decide(&busy, TIME(30_000), 300, 300), Step::GoOn);
        assert_eq!(decide(&busy, None, 300, 300), Step::GoOn, "without a deadline it goes on");
        let Step::GiveUp(why) = decide(&busy, TIME(8_000), 300, 300) else {
            panic!("it goes on")
        };
        assert_eq!(
            why,
            "it does not converge: the guest writes 900 MiB/s, the line carries 100 MiB/s, 640 MiB are left"
        );
        let Step::GiveUp(why) = decide(&progress(1, 0, 4, 100), TIME(8_000), 300, 300) else {
            panic!("it goes on")
        };
        assert_eq!(why, "100 MiB are left and the time is up");
        let nothing = JobProgress {
            bytes_done: 0,
            ..progress(0, 0, 0, 0)
        };
        assert!(matches!(decide(&nothing, TIME(8_000), 300, 300), Step::GiveUp(why) if why.contains("has begun")));
    }

    #[test]
    fn a_move_that_is_nearly_there_is_not_given_up_for_a_way_that_takes_longer() {
        assert_eq!(decide(&progress(1, 0, 100, 20), TIME(7_000), 300, 300), Step::GoOn);
        assert_eq!(decide(&progress(3, 10, 100, 20), TIME(7_000), 300, 300), Step::GoOn);
        for (p, left) in [
            (progress(3, 90, 100, 20), 7_000),
            (progress(3, 10, 100, 200), 7_000),
            (progress(3, 10, 100, 20), 3_000),
        ] {
            assert!(matches!(decide(&p, TIME(left), 300, 300), Step::GiveUp(_)), "{p:?}");
        }
    }

    #[test]
    fn near_the_end_a_longer_standstill_is_allowed_if_it_is_all_that_is_missing() {
        assert_eq!(decide(&progress(5, 90, 100, 64), TIME(10_000), 300, 300), Step::Allow(740));
        assert_eq!(
            decide(&progress(5, 90, 100, 64), TIME(10_000), 740, 300),
            Step::GoOn,
            "it is allowed already"
        );
        let far = progress(5, 90, 100, 640);
        assert_eq!(decide(&far, TIME(10_000), 300, 300), Step::GoOn, "six seconds are no standstill");
        let calm = progress(5, 10, 100, 64);
        assert_eq!(decide(&calm, TIME(10_000), 300, 300), Step::GoOn, "it converges by itself");
    }

    #[test]
    fn more_downtime_is_allowed_by_and_by_up_to_the_limit() {
        assert_eq!(first_downtime(300), Some(5));
        assert_eq!(first_downtime(3), Some(3));
        assert_eq!(first_downtime(0), None, "QEMU's own");
        for (iteration, allowed, step) in [
            (2, 50, Step::GoOn),
            (3, 50, Step::Allow(100)),
            (3, 200, Step::Allow(300)),
            (9, 300, Step::GoOn),
        ] {
            assert_eq!(decide(&progress(iteration, 10, 100, 9), None, allowed, 300), step);
        }
        assert_eq!(decide(&progress(9, 10, 100, 9), None, 0, 0), Step::GoOn);
    }
}
