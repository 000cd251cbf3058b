//! Settings of slurm.conf that are missing or unwise, each with what it costs.
use slurm_vm_api::query::Finding;

use super::Controller;

impl Controller {
    /// Looks at Slurm's configuration as slurmctld has it.
    ///
    /// # Errors
    /// When Slurm does not answer.
    pub fn check(&self) -> Result<Vec<Finding>, String> {
        let slurm = &self.world.slurm;
        let config = slurm.config().map_err(|e| e.to_string())?;
        let partitions = slurm.partitions().map_err(|e| e.to_string())?;
        let nodes = slurm.nodes().map_err(|e| e.to_string())?;
        let feature = &self.config.controller.feature;
        let mut findings = Vec::new();
        let mut find = |level: &str, setting: &str, text: String| {
            findings.push(Finding {
                level: level.into(),
                setting: setting.into(),
                text,
            });
        };
        let vm_nodes: Vec<&str> = nodes
            .iter()
            .filter(|n| n.available_features.contains(feature))
            .map(|n| n.name.as_str())
            .collect();
        if vm_nodes.is_empty() {
            find(
                "error",
                "Feature",
                format!("no node has Feature={feature}: every --vm job is refused or waits for ever"),
            );
        }
        if vm_nodes.len() == 1 {
            find(
                "advice",
                "Feature",
                format!("only {} has Feature={feature}: there is nowhere to move a VM to", vm_nodes[0]),
            );
        }
        if config.preempt_type == "preempt/none" {
            find(
                "advice",
                "PreemptType",
                "is preempt/none: nothing is preempted, VMs move only by hand and at a drain".into(),
            );
        }
        let preempts = partitions.iter().map(|p| p.priority_tier).max().unwrap_or(0);
        for p in partitions.iter().filter(|p| p.nodes.iter().any(|n| vm_nodes.contains(&n.as_str()))) {
            let name = format!("PartitionName={}", p.name);
            if p.priority_tier == preempts || p.preempt_mode.eq_ignore_ascii_case("OFF") || config.preempt_type == "preempt/none" {
                continue;
            }
            if !p.preempt_mode.to_uppercase().contains("REQUEUE") {
                find(
                    "error",
                    &name,
                    format!("PreemptMode={}: a preempted job keeps its id only with REQUEUE", p.preempt_mode),
                );
            }
            if p.grace_s == 0 {
                find(
                    "error",
                    &name,
                    "GraceTime=0: a preempted job is ended before its VM can move; 300 is a good start".into(),
                );
            } else if p.grace_s < 60 {
                find(
                    "advice",
                    &name,
                    format!(
                        "GraceTime={}: large or busy guests need longer to move; 300 is a good start",
                        p.grace_s
                    ),
                );
            }
        }
        if !config.job_requeue {
            find(
                "advice",
                "JobRequeue",
                "is 0: the plugin asks for --requeue where it can, other jobs are killed when preempted".into(),
            );
        }
        if config.preempt_exempt_s == 0 && config.preempt_type != "preempt/none" {
            find(
                "advice",
                "PreemptExemptTime",
                "is 0: a job that has just landed can be preempted again at once; 00:05:00 keeps it from going round".into(),
            );
        }
        if !config.prolog_flags.iter().any(|f| f.eq_ignore_ascii_case("Alloc")) {
            find(
                "advice",
                "PrologFlags",
                "lacks Alloc: the VM of a salloc job boots only with its first step".into(),
            );
        }
        if !config.prolog_flags.iter().any(|f| f.eq_ignore_ascii_case("DeferBatch")) && config.release().is_some_and(|r| r >= (22, 5)) {
            find(
                "advice",
                "PrologFlags",
                "lacks DeferBatch: a batch script may start before the other nodes' prologs".into(),
            );
        }
        Ok(findings)
    }
}
