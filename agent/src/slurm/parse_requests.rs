//! Reads what jobs ask for: `squeue` with fields that matter only where places are given out, and the QOS's of accounting.

use super::SlurmError;
use super::parse::{format_of, hosts, number, records_of, some};
use super::types::{JobRequest, QosInfo};

/// The fields asked of `squeue`, in this order. As in the poll, a user can choose none of them freely.
const FIELDS: [&str; 8] = [
    "JobID",
    "NumNodes",
    "MaxNodes",
    "NumCPUs",
    "tres-alloc",
    "OverSubscribe",
    "ReqNodes",
    "QOS",
];

/// The argument of `squeue --Format`.
pub(super) fn squeue_format() -> String {
    format_of(&FIELDS)
}

/// Reads `squeue`'s records.
pub(super) fn requests(text: &str) -> Result<Vec<JobRequest>, SlurmError> {
    records_of(text)?.into_iter().map(|(line, values)| request(line, &values)).collect()
}

fn request(line: &str, values: &[&str]) -> Result<JobRequest, SlurmError> {
    let bad = |field: &'static str| SlurmError::parse(field, line);
    let [id, nodes, most, cpus, tres, shares, req_nodes, qos] = *values else {
        return Err(bad("squeue line"));
    };
    let of = |name: &str| tres.split(',').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let least: u32 = number(nodes).ok_or_else(|| bad("NumNodes"))?;
    Ok(JobRequest {
        id: id.parse().map_err(|_| bad("JobID"))?,
        nodes: least,
        most_nodes: number(most).filter(|n| *n >= least),
        cpus: number(cpus).ok_or_else(|| bad("NumCPUs"))?,
        mem_mib: of("mem").map_or(Some(0), mebibytes).ok_or_else(|| bad("tres-alloc mem"))?,
        // Slurm estimates NumNodes from the CPUs where the user named no number of nodes; what was asked for is here.
        any_nodes: of("node").and_then(number).is_some_and(|n| n < least),
        exclusive: shares == "NO",
        req_nodes: hosts(req_nodes)?,
        qos: some(qos),
    })
}

/// `512M`, `2G`, `1.50T`: whole MiB, rounded up. Without a suffix it is MiB.
fn mebibytes(text: &str) -> Option<u64> {
    let (number, shift) = match text.chars().last()? {
        'K' => (&text[..text.len() - 1], -10),
        'M' => (&text[..text.len() - 1], 0),
        'G' => (&text[..text.len() - 1], 10),
        'T' => (&text[..text.len() - 1], 20),
        'P' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let value: f64 = number.parse().ok().filter(|n: &f64| n.is_finite() && *n >= 0.0)?;
    let mib = (value * 2f64.powi(shift)).ceil();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked against the largest")]
    (mib < 9e15).then_some(mib as u64)
}

/// `sacctmgr --parsable2 --noheader show qos format=name,preempt`: `high|low,scavenge`.
pub(super) fn qos(text: &str) -> Result<Vec<QosInfo>, SlurmError> {
    let line = |line: &str| {
        let (name, list) = line.split_once('|').ok_or_else(|| SlurmError::parse("name|preempt", line))?;
        let preempts = list.split(',').filter(|q| !q.is_empty()).map(str::to_owned).collect();
        Ok(QosInfo {
            name: name.to_owned(),
            preempts,
        })
    };
    text.lines().filter(|l| !l.trim().is_empty()).map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Debian's 22.05.8, 24.11.5 and 26.05.5 print it for jobs that wait: four nodes with two CPUs each to itself, eight
    /// CPUs wherever, two to three nodes with memory and a node by name.
    const WAITING: &str = "1\x1f4\x1f4\x1f8\x1fcpu=8,mem=2G,node=4,billing=8\x1fNO\x1f\x1f(null)\x1e\n\
        2\x1f4\x1f4\x1f8\x1fcpu=8,mem=800M,node=1,billing=8\x1fOK\x1f\x1fnormal\x1e\n\
        3\x1f2\x1f3\x1f1\x1fcpu=1,mem=3000M,node=2,billing=1\x1fOK\x1fn[1-2]\x1f(null)\x1e\n";

    #[test]
    fn what_waiting_jobs_ask_for_is_read() {
        let all = requests(WAITING).unwrap();
        let first = JobRequest {
            id: 1,
            nodes: 4,
            most_nodes: Some(4),
            cpus: 8,
            mem_mib: 2048,
            any_nodes: false,
            exclusive: true,
            req_nodes: vec![],
            qos: None,
        };
        assert_eq!(all[0], first);
        assert_eq!(
            (all[1].any_nodes, all[1].exclusive, all[1].qos.as_deref()),
            (true, false, Some("normal"))
        );
        assert_eq!((all[2].nodes, all[2].most_nodes, all[2].mem_mib), (2, Some(3), 3000));
        assert_eq!(all[2].req_nodes, ["n1", "n2"]);
        assert_eq!(requests("").unwrap(), []);
        assert!(requests("1\x1f4\x1e\n").is_err() && requests("1").is_err());
    }

    #[test]
    fn sizes_are_read_in_every_unit_and_nonsense_is_refused() {
        for (text, mib) in [("512M", 512), ("2G", 2048), ("1.50G", 1536), ("1T", 1 << 20), ("100K", 1), ("7", 7)] {
            assert_eq!(mebibytes(text), Some(mib), "{text}");
        }
        for text in ["", "M", "-1G", "infG", "1e300T", "2Gx"] {
            assert_eq!(mebibytes(text), None, "{text}");
        }
        assert_eq!((number("2-4"), number("2K"), number("x")), (Some(2), Some(2048), None));
    }

    #[test]
    fn the_qos_that_may_preempt_others_are_read() {
        let all = qos("normal|\nhigh|low,scavenge\n").unwrap();
        assert_eq!(all[0].preempts, Vec::<String>::new());
        assert_eq!(
            (all[1].name.as_str(), all[1].preempts.join("+")),
            ("high", "low+scavenge".to_owned())
        );
        assert!(qos("normal").is_err());
    }
}
