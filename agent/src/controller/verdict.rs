//! What a preemption would do to a job's VM, completed with what only Slurm knows: is the job requeueable, has it one
//! node, is there time, is there room. Asked anew at each `svm show`, so that it follows what changes.
use slurm_vm_api::query::VmView;

use super::Controller;

/// MiB per second of a move before any was made of this VM: a gigabit line.
const LINE_MIB_S: f64 = 110.0;

/// The verdict on a job, from the node's own (`live, else save, else requeue`).
pub(super) fn complete(c: &Controller, view: &VmView) -> Option<String> {
    let by_node = view.verdict.as_deref()?;
    let slurm = &c.world.slurm;
    let Ok(Some(info)) = slurm.job(view.job) else {
        return Some(by_node.to_owned());
    };
    // Under preempt/qos the grace time is the QOS's.
    let by_partition = slurm.config().is_ok_and(|c| c.preempt_type == "preempt/partition_prio");
    let mode = slurm
        .partitions()
        .unwrap_or_default()
        .into_iter()
        .find(|p| p.name == info.brief.partition);
    let room = c.has_room(view.job, &view.node, &info);
    let on_nodes = info.brief.state.is_on_nodes();
    let facts = Facts {
        batch: info.brief.batch,
        requeue: info.brief.requeue || c.notes().of(view.job).last_try,
        nodes: if on_nodes { info.brief.nodes.len() } else { 1 },
        grace_s: mode.filter(|p| by_partition && p.preempt_mode != "OFF").map(|p| p.grace_s),
        partition: &info.brief.partition,
        room: room || !on_nodes,
    };
    Some(verdict(by_node, view, &facts))
}

/// What Slurm says of a job.
struct Facts<'a> {
    batch: bool,
    requeue: bool,
    nodes: usize,
    /// `None` where nothing preempts, or not by partition.
    grace_s: Option<u64>,
    partition: &'a str,
    /// Another node could take the VM now.
    room: bool,
}

#[expect(clippy::cast_precision_loss, reason = "sizes and seconds for a reader")]
fn verdict(by_node: &str, view: &VmView, facts: &Facts<'_>) -> String {
    let ways = || by_node.split(", else ");
    if !facts.batch {
        return "cannot move: not a batch job".into();
    }
    if !facts.requeue {
        return "cannot move: not requeueable (--no-requeue)".into();
    }
    if facts.grace_s == Some(0) {
        return format!("cannot move: GraceTime of partition {} is 0", facts.partition);
    }
    if facts.nodes > 1 {
        let rest: Vec<&str> = ways().filter(|w| !w.starts_with("live") && !w.starts_with("save")).collect();
        let why = format!("cannot move: the job has {} nodes", facts.nodes);
        return if rest.is_empty() {
            why
        } else {
            format!("{} ({why})", rest.join(", else "))
        };
    }
    let moved = view.moves.iter().rev().find(|m| m.way == "live" && m.seconds > 0.0);
    let speed = moved
        .map_or(LINE_MIB_S, |m| m.bytes as f64 / f64::from(1 << 20) / m.seconds)
        .max(1.0);
    let needs = view.mem_mib as f64 / speed;
    let live = match facts.grace_s {
        _ if !facts.room => "live (not now: no other node has room)".to_owned(),
        Some(grace) if needs > grace as f64 => {
            format!("live (if it fits: up to {needs:.0} s at {speed:.0} MiB/s, and GraceTime is {grace} s)")
        }
        _ => "live".to_owned(),
    };
    let words: Vec<&str> = ways().map(|w| if w == "live" { live.as_str() } else { w }).collect();
    words.join(", else ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use slurm_vm_api::query::MoveView;

    const ALL: &str = "live, else save, else requeue";

    const FACTS: Facts<'static> = Facts {
        batch: true,
        requeue: true,
        nodes: 1,
        grace_s: Some(30),
        partition: "low",
        room: true,
    };

    fn said(facts: &Facts<'_>, mem_mib: u64, moved: Option<(u64, f64)>) -> String {
        let moves = moved.map(|(mib, seconds)| MoveView {
            way: "live".into(),
            bytes: mib << 20,
            seconds,
            ..MoveView::default()
        });
        let view = VmView {
            mem_mib,
            moves: moves.into_iter().collect(),
            ..VmView::default()
        };
        verdict(ALL, &view, facts)
    }

    #[test]
    fn what_slurm_knows_against_a_move_is_part_of_the_verdict() {
        assert_eq!(said(&FACTS, 1024, None), ALL);
        for (facts, expected) in [
            (Facts { batch: false, ..FACTS }, "cannot move: not a batch job"),
            (Facts { requeue: false, ..FACTS }, "cannot move: not requeueable (--no-requeue)"),
            (Facts { grace_s: Some(0), ..FACTS }, "cannot move: GraceTime of partition low is 0"),
            (Facts { nodes: 2, ..FACTS }, "requeue (cannot move: the job has 2 nodes)"),
            (
                Facts { room: false, ..FACTS },
                "live (not now: no other node has room), else save, else requeue",
            ),
        ] {
            assert_eq!(said(&facts, 1024, None), expected);
        }
    }

    #[test]
    fn a_guest_too_large_for_the_grace_time_is_told_with_the_speed_of_its_last_move() {
        assert_eq!(
            said(&FACTS, 11_000, None),
            "live (if it fits: up to 100 s at 110 MiB/s, and GraceTime is 30 s), else save, else requeue"
        );
        assert_eq!(said(&FACTS, 11_000, Some((8_000, 8.0))), ALL, "it moves at 1000 MiB/s");
        assert_eq!(said(&Facts { grace_s: None, ..FACTS }, 11_000, None), ALL, "nothing preempts it");
    }
}
