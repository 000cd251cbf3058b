//! The prolog and epilog hooks, as root, on every node of the job.
//!
//! The prolog's message is a courtesy that saves time: without it the shim asks the agent itself. So the prolog never fails. The epilog is
//! the last moment at which the node is the job's: it waits, bounded, until the agent says that the VM is off the node, and fails only if
//! the agent could not even destroy it. Both look at nothing of the user's but the options' values.
#![forbid(unsafe_code)]
use crate::{
    args::Settings,
    guard::{FAILED, OK},
    hook::{self, NoAnswer},
    options,
    slurm::{self, Handle, Item, PlugArgs},
};
use slurm_vm_api::{
    hooks::{EPILOG_GRACE, HookRequest, PROLOG_DEADLINE},
    spec::{OPTIONS, OptionTexts, VmOption, VmSpec},
};
use std::{ffi::c_int, path::PathBuf, time::Duration};

fn option_texts(spank: Handle, settings: &Settings) -> [Option<String>; OPTIONS] {
    VmOption::ALL.map(|o| slurm::option_value(spank, &options::name(&settings.prefix, o)))
}

/// The request as the nodes see it: companions without an image are no request, and the site's ways are filled in.
pub fn request(texts: &[Option<String>; OPTIONS], settings: &Settings) -> Result<Option<VmSpec>, String> {
    if texts[VmOption::Image.index()].is_none() {
        return Ok(None);
    }
    let mut borrowed: OptionTexts<'_> = [None; OPTIONS];
    for (slot, text) in borrowed.iter_mut().zip(texts) {
        *slot = text.as_deref();
    }
    let refused = |option, why: String| format!("--{}: {why}", options::name(&settings.prefix, option));
    let mut spec = VmSpec::from_options(&borrowed).map_err(|e| refused(e.option, e.source.to_string()))?;
    if let (Some(spec), Some(site)) = (&mut spec, &settings.preempt) {
        let ways = spec.preempt.get_or_insert_with(|| site.clone());
        if let Some(way) = ways.iter().find(|w| !site.contains(w)) {
            return Err(refused(VmOption::Preempt, format!("this site does not allow '{way}'")));
        }
    }
    Ok(spec)
}

/// The hook `job_prolog`.
pub fn prolog(spank: Handle, args: &PlugArgs) -> c_int {
    let settings = Settings::parse(&args.words());
    let texts = option_texts(spank, &settings);
    let Some(job) = slurm::item(spank, Item::Job) else { return OK };
    let spec = match request(&texts, &settings) {
        Ok(Some(spec)) => spec,
        Ok(None) => return OK,
        Err(why) => {
            slurm::error(&format!("job {job}: the request for a VM is refused: {why}"));
            return OK;
        }
    };
    let (Some(uid), Some(gid)) = (slurm::item(spank, Item::Uid), slurm::item(spank, Item::Gid)) else {
        slurm::error(&format!("job {job}: Slurm does not say whose job it is, the agent is not told"));
        return OK;
    };
    let restart = std::env::var("SLURM_JOB_RESTART_COUNT")
        .ok()
        .and_then(|c| c.parse().ok())
        .unwrap_or(0);
    let request = HookRequest::Ensure {
        job,
        uid,
        gid,
        spec,
        restart,
    };
    match hook::ask(&settings.socket, request, PROLOG_DEADLINE, PROLOG_DEADLINE) {
        Ok(reply) if reply.ok => slurm::info(&format!("job {job}: the agent knows of it, run {}", reply.run.unwrap_or(0))),
        Ok(reply) => slurm::error(&format!("job {job}: the agent refuses: {}", reply.why.unwrap_or_default())),
        Err(e) => slurm::error(&format!("job {job}: {e}")),
    }
    OK
}

/// The hook `job_epilog`.
pub fn epilog(spank: Handle, args: &PlugArgs) -> c_int {
    let settings = Settings::parse(&args.words());
    let Some(job) = slurm::item(spank, Item::Job) else { return OK };
    let marker = marker(&settings, job);
    let asked = slurm::option_value(spank, &options::name(&settings.prefix, VmOption::Image)).is_some();
    // A step alone may have asked for a VM; then the job has no option, but the agent left its mark.
    if !asked && !marker.exists() {
        return OK;
    }
    let uid = slurm::item(spank, Item::Uid).unwrap_or(u32::MAX);
    let wait = Duration::from_secs(settings.epilog_wait_s.into());
    let connect_for = if marker.exists() { wait } else { PROLOG_DEADLINE.min(wait) };
    let request = HookRequest::Release {
        job,
        uid,
        wait_s: settings.epilog_wait_s,
    };
    match hook::ask(&settings.socket, request, connect_for, wait + EPILOG_GRACE) {
        Ok(reply) if reply.ok => OK,
        Ok(reply) => {
            let why = reply.why.unwrap_or_default();
            let Some(domain) = reply.stuck else {
                slurm::error(&format!("job {job}: the agent does not release it: {why}"));
                return OK;
            };
            slurm::error(&format!(
                "job {job}: the domain {domain} is still on this node and cannot be destroyed: {why}"
            ));
            FAILED
        }
        Err(NoAnswer::Unreachable(_)) if !marker.exists() => OK,
        Err(e) => {
            slurm::error(&format!(
                "job {job}: {e}; its VM, if any, is the agent's to clear away when it is back"
            ));
            OK
        }
    }
}

/// The agent's mark for a job with a domain on this node: beside its socket, wherever that is.
pub fn marker(settings: &Settings, job: u32) -> PathBuf {
    settings.socket.with_file_name("jobs").join(job.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use slurm_vm_api::{hooks::JOBS_DIR, spec::PreemptWay};

    #[test]
    fn the_mark_is_where_the_agent_puts_it() {
        assert_eq!(marker(&Settings::default(), 12), PathBuf::from(JOBS_DIR).join("12"));
    }

    #[test]
    fn the_sites_ways_are_filled_in_and_hold() {
        let site = vec![PreemptWay::Save];
        let settings = Settings {
            preempt: Some(site.clone()),
            ..Settings::default()
        };
        let texts = |preempt: Option<&str>| {
            [
                Some("a".to_owned()),
                None,
                None,
                None,
                preempt.map(str::to_owned),
                None,
                None,
                None,
                None,
            ]
        };
        assert_eq!(request(&texts(None), &settings).unwrap().unwrap().preempt, Some(site));
        assert!(request(&texts(Some("live")), &settings).is_err());
        assert_eq!(
            request(&[None, Some("x".into()), None, None, None, None, None, None, None], &settings),
            Ok(None)
        );
    }
}
