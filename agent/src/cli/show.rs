//! One VM at length, in the manner of `scontrol show job`, and the findings of `svm check`.
use std::fmt::Write;

use slurm_vm_api::{
    query::{Finding, MoveView, VmView},
    size::format_mib,
};

use super::table::{bytes, dash, span};

/// A block of `Key=Value`, ended by an empty line.
pub fn vm(vm: &VmView) -> String {
    let cores: Vec<String> = vm.cores.iter().map(u32::to_string).collect();
    let started = vm.started_at.map_or_else(|| "Unknown".to_owned(), date);
    let (guest, allocated, disk) = (format_mib(vm.mem_mib), format_mib(vm.allocated_mib), bytes(vm.disk_bytes));
    let mut lines = vec![
        format!("JobId={} VmName={}", vm.job, dash(&vm.domain)),
        format!("   UserId={}({}) Node={} Run={}", dash(&vm.user), vm.uid, dash(&vm.node), vm.run),
        format!("   State={} Reason={}", vm.state, dash(vm.why.as_deref().unwrap_or_default())),
        format!("   RunTime={} StartTime={started}", span(vm.run_seconds)),
        format!("   Image={} Type={}{}", dash(&vm.image), dash(&vm.domain_type), type_why(vm)),
        format!(
            "   CPUs={} Cores={} Mem={guest} AllocMem={allocated} Disk={disk}",
            vm.vcpus,
            dash(&cores.join(","))
        ),
        format!("   Mounts={} Net={}", dash(&vm.mounts.join(",")), dash(&vm.network)),
        format!("   Preempt={}", dash(vm.verdict.as_deref().unwrap_or_default())),
        format!("   Moves={}", vm.moves.len()),
    ];
    lines.extend(vm.moves.iter().map(one_move));
    lines.join("\n") + "\n\n"
}

fn one_move(m: &MoveView) -> String {
    let ms = |v: Option<u64>| v.map_or_else(|| "-".to_owned(), |v| format!("{v}ms"));
    format!(
        "   Move={} Time={} From={} To={} Cause={} Took={:.1}s Bytes={} Downtime={} GuestGap={} Outcome={}",
        m.way,
        date(m.at),
        dash(&m.from),
        dash(&m.to),
        m.cause,
        m.seconds,
        bytes(m.bytes),
        ms(m.downtime_ms),
        ms(m.gap_ms),
        m.outcome
    )
}

/// Settings and what they cost, the errors first.
pub fn findings(findings: &[Finding]) -> String {
    if findings.is_empty() {
        return "slurm.conf has all that VM jobs need\n".to_owned();
    }
    let mut sorted: Vec<&Finding> = findings.iter().collect();
    sorted.sort_by_key(|f| f.level != "error");
    sorted.iter().fold(String::new(), |mut text, f| {
        let _ = writeln!(text, "{}: {}: {}", f.level, f.setting, f.text);
        text
    })
}

/// Unix seconds as `2026-11-23T01:02:03Z`: the same on every host, whatever its time zone.
fn date(unix: u64) -> String {
    let (days, rest) = (unix / 86_400, unix % 86_400);
    // Civil date from a day count, with years that begin in March (Howard Hinnant's days_from_civil, turned round).
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        rest / 3600,
        rest / 60 % 60,
        rest % 60
    )
}

/// Who or what chose the type, in brackets.
fn type_why(vm: &VmView) -> String {
    if vm.domain_type_why.is_empty() {
        String::new()
    } else {
        format!(" ({})", vm.domain_type_why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (unix, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_795_395_723, "2026-11-23T01:02:03Z"),
        ] {
            assert_eq!(date(unix), text);
        }
    }

    #[test]
    fn a_vm_is_shown_like_a_job() {
        let moved = MoveView {
            way: "live".into(),
            from: "n1".into(),
            to: "n2".into(),
            at: 951_782_400,
            bytes: 300 << 20,
            seconds: 2.26,
            downtime_ms: Some(31),
            gap_ms: None,
            cause: "preemption".into(),
            outcome: "done".into(),
        };
        let view = VmView {
            job: 12,
            user: "alice".into(),
            uid: 1000,
            node: "n2".into(),
            domain: "slurm-12-0".into(),
            state: "running".into(),
            image: "tiny".into(),
            vcpus: 2,
            mem_mib: 1024,
            allocated_mib: 2048,
            cores: vec![0, 1],
            disk_bytes: 3 << 20,
            domain_type: "qemu".into(),
            domain_type_why: String::new(),
            started_at: Some(0),
            ended_at: None,
            run_seconds: 75,
            run: 3,
            restarts: Some(1),
            script_ended: false,
            mounts: vec!["/home/alice".into(), "/data:/in:ro".into()],
            network: "user".into(),
            verdict: Some("live: fits in 60 s".into()),
            why: None,
            moves: vec![moved],
        };
        let golden = "\
JobId=12 VmName=slurm-12-0
   UserId=alice(1000) Node=n2 Run=3
   State=running Reason=-
   RunTime=1:15 StartTime=1970-01-01T00:00:00Z
   Image=tiny Type=qemu
   CPUs=2 Cores=0,1 Mem=1G AllocMem=2G Disk=3.0M
   Mounts=/home/alice,/data:/in:ro Net=user
   Preempt=live: fits in 60 s
   Moves=1
   Move=live Time=2000-02-29T00:00:00Z From=n1 To=n2 Cause=preemption Took=2.3s Bytes=300M Downtime=31ms GuestGap=- Outcome=done

";
        assert_eq!(vm(&view), golden);
    }

    #[test]
    fn errors_come_before_advice() {
        let finding = |level: &str, setting: &str| Finding {
            level: level.into(),
            setting: setting.into(),
            text: "why".into(),
        };
        let text = findings(&[finding("advice", "GraceTime"), finding("error", "PlugStackConfig")]);
        assert_eq!(text, "error: PlugStackConfig: why\nadvice: GraceTime: why\n");
    }
}
