//! Jobs that met a broken node. The shim requeues its own job into the state SPECIAL_EXIT, held (a user can do that with
//! his own jobs, and nothing else makes that state by itself); here the node is excluded and the job released. The shim
//! gives up by itself (outcome 125) when Slurm's restart count reaches the attempts allowed.
use super::Controller;
use crate::slurm::{JobState, JobUpdate};

impl Controller {
    /// Sends each such job elsewhere.
    pub(super) fn retry_faulty(&self) {
        let feature = &self.config.controller.feature;
        let (jobs, nodes) = {
            let cluster = self.cluster();
            let faulty: Vec<_> = cluster
                .jobs
                .iter()
                .filter(|j| {
                    j.state == JobState::SpecialExit && j.batch && j.features.as_ref().is_some_and(|f| f.contains(feature.as_str()))
                })
                .map(|j| (j.id, cluster.last_node.get(&j.id).cloned()))
                .collect();
            (faulty, cluster.slurm_nodes.len())
        };
        for (job, node) in jobs {
            // With one node there is nowhere else: the same node is tried again.
            let exclude = node.clone().filter(|_| nodes > 1);
            log::warn!(
                "job {job}: met a broken node{}; it is released to try elsewhere",
                node.map_or(String::new(), |n| format!(" ({n})"))
            );
            let update = JobUpdate {
                exclude_nodes: exclude.map(|n| vec![n]),
                start_now: true,
                ..JobUpdate::default()
            };
            let slurm = &self.world.slurm;
            if let Err(e) = slurm.update_job(job, &update).and_then(|()| slurm.release(job)) {
                log::error!("job {job}: cannot be sent elsewhere: {e}");
            }
        }
    }
}
