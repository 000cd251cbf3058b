//! Finding the processes of a program, as Slurm signals a whole step.
//!
//! A program's leader has a session of its own. Its processes are those of that session or of the leader's process group, and all their
//! descendants. A daemon that left the session and lost its parent is not found: inside the guest there is nothing that would still tie it
//! to the program.

use nix::errno::Errno;

use crate::spawn;

#[derive(Debug, Clone, Copy)]
struct Process {
    pid: i32,
    parent: i32,
    group: i32,
    session: i32,
    zombie: bool,
}

/// Parses `/proc/PID/stat`. The command in parentheses may hold anything, so the fields are counted from its last parenthesis.
fn parse_stat(stat: &str) -> Option<Process> {
    let (pid, _) = stat.split_once(' ')?;
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?;
    let mut number = || fields.next()?.parse().ok();
    Some(Process {
        pid: pid.parse().ok()?,
        parent: number()?,
        group: number()?,
        session: number()?,
        zombie: matches!(state, "Z" | "X"),
    })
}

fn all() -> Vec<Process> {
    let Ok(dir) = std::fs::read_dir("/proc") else { return Vec::new() };
    dir.flatten()
        .filter(|entry| entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit))
        .filter_map(|entry| parse_stat(&String::from_utf8_lossy(&std::fs::read(entry.path().join("stat")).ok()?)))
        .collect()
}

fn members(leader: i32) -> Vec<i32> {
    let processes = all();
    let mut found: Vec<i32> = processes
        .iter()
        .filter(|p| p.pid == leader || p.session == leader || p.group == leader)
        .map(|p| p.pid)
        .collect();
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        next += 1;
        let children: Vec<i32> = processes
            .iter()
            .filter(|p| p.parent == parent && !found.contains(&p.pid))
            .map(|p| p.pid)
            .collect();
        found.extend(children);
    }
    found.retain(|pid| processes.iter().any(|p| p.pid == *pid && !p.zombie));
    found
}

/// Signals all processes of the program with this leader. `ESRCH` when there are none.
pub fn signal_all(leader: i32, signo: i32) -> nix::Result<()> {
    let mut signalled: Vec<i32> = Vec::new();
    // A process that forks between the look and the signal has a child that was not seen: look again until there is nobody new. The bound
    // is there for a program that forks for ever.
    for _ in 0..8 {
        let new: Vec<i32> = members(leader).into_iter().filter(|pid| !signalled.contains(pid)).collect();
        if new.is_empty() {
            break;
        }
        for pid in &new {
            let _ = spawn::kill(*pid, signo);
        }
        signalled.extend(new);
    }
    if signalled.is_empty() {
        // Without /proc there is still the process group.
        return spawn::kill(-leader, signo).map_err(|_| Errno::ESRCH);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_with_spaces_and_parentheses_does_not_shift_the_fields() {
        let process = parse_stat("42 (a ) (b) R 1 7) S 10 11 12 34816 42 0").unwrap();
        assert_eq!(
            (process.pid, process.parent, process.group, process.session, process.zombie),
            (42, 10, 11, 12, false)
        );
        assert!(parse_stat("42 (zombie) Z 1 1 1 0").unwrap().zombie);
        assert!(parse_stat("garbage").is_none());
    }

    #[test]
    fn this_process_is_found_by_its_own_pid() {
        let me = i32::try_from(std::process::id()).unwrap();
        assert!(members(me).contains(&me));
    }
}
