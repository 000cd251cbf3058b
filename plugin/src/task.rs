//! In slurmstepd: a task with `--vm` becomes the shim instead of the user's program, or nothing at all.
#![forbid(unsafe_code)]
use crate::{
    args::Settings,
    guard::{FAILED, OK},
    node, options, os,
    slurm::{self, Handle, Item, PlugArgs},
};
use slurm_vm_api::{
    outcome,
    shim::{CONTROL_PREFIX, OPEN_MODE_CONTROL, OpenMode, Request, SHIM_ARGS_ENV, ShimArgs, StepKind},
};
use std::{
    ffi::c_int,
    fs::{DirBuilder, OpenOptions},
    io,
    os::{
        fd::AsFd,
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::Path,
};

const BATCH_STEP: u32 = 0xffff_fffb;
/// Step ids from here on are Slurm's own steps: batch, extern, interactive.
const FIRST_SPECIAL_STEP: u32 = 0xffff_fff0;

/// What kind of step this is; nothing for those that stay on the host (extern, and the shell of salloc).
fn kind_of(step: u32) -> Option<StepKind> {
    match step {
        BATCH_STEP => Some(StepKind::Batch),
        FIRST_SPECIAL_STEP.. => None,
        _ => Some(StepKind::Step),
    }
}

/// The hook `task_init`.
pub fn init(spank: Handle, args: &PlugArgs) -> c_int {
    let settings = Settings::parse(&args.words());
    let handed_over = if options::asked_for_vm() {
        become_shim(spank, &settings)
    } else {
        stay_on_host(spank, &settings)
    };
    match handed_over {
        Ok(()) => OK,
        Err(why) => {
            // This is the task: Slurm writes its errors to the job's own standard error as well as to its log.
            slurm::error(&format!("vm: the program was not started: {why}"));
            FAILED
        }
    }
}

/// A second guard, should a release or a site's filter lose the options on their way: the agent's mark says that this job has a VM. A job
/// whose steps only have VMs has no mark yet when its script starts.
fn stay_on_host(spank: Handle, settings: &Settings) -> Result<(), String> {
    if slurm::item(spank, Item::Step) != Some(BATCH_STEP) {
        return Ok(());
    }
    let lost = slurm::item(spank, Item::Job).is_some_and(|job| node::marker(settings, job).exists());
    if !lost {
        return Ok(());
    }
    options::given().texts[0] = Some(String::new());
    Err("the job asked for a VM, but its options did not reach this step".to_owned())
}

fn become_shim(spank: Handle, settings: &Settings) -> Result<(), String> {
    let step = slurm::item(spank, Item::Step).ok_or("Slurm does not tell the step")?;
    let Some(kind) = kind_of(step) else { return Ok(()) };
    let request = match node::request(&options::given().texts, settings) {
        Ok(Some(spec)) => Request::Spec(spec),
        Ok(None) => return Err("the request is gone".to_owned()),
        Err(why) => Request::Refused(why),
    };
    let open_mode = match kind {
        StepKind::Batch => slurm::task_env(spank, &format!("{CONTROL_PREFIX}{OPEN_MODE_CONTROL}"))
            .and_then(|m| m.parse().ok())
            .unwrap_or(OpenMode::Unknown),
        StepKind::Step => OpenMode::Unknown,
    };
    let shim = ShimArgs {
        job: slurm::item(spank, Item::Job).ok_or("Slurm does not tell the job")?,
        step,
        task: slurm::item(spank, Item::Task).ok_or("Slurm does not tell the task")?,
        restart: restarts(spank),
        kind,
        open_mode,
        socket: settings.socket.display().to_string(),
        request,
    };
    let mut words = vec![settings.run.clone()];
    words.extend(shim.to_words());
    words.push("--".to_owned());
    if let Some(done) = slurm::prepend_task_argv(spank, &words) {
        return done;
    }
    let program = slurm::replace_program(spank, &settings.run)?;
    slurm::set_task_env(spank, SHIM_ARGS_ENV, &shim.to_env_value(&program))
}

/// Slurm's restart count. Some releases (22.05) have it in the batch step's environment only, where a user can set it too: it is a hint.
fn restarts(spank: Handle) -> u32 {
    let item = slurm::item(spank, Item::Restarts).filter(|n| *n > 0);
    item.or_else(|| slurm::task_env(spank, "SLURM_RESTART_COUNT")?.parse().ok())
        .unwrap_or(0)
}

/// The last word about a task: when the hand-over failed, the program must not run on the host. Slurm fails the task on a negative
/// return, unless the plugin's line in plugstack.conf says `optional`: so the task ends here. For a job without `--vm` this never acts.
pub fn fail_closed(outcome: c_int) -> c_int {
    if outcome < 0 && options::asked_for_vm() && !cfg!(test) {
        os::exit_now(outcome::NODE_FAULT);
    }
    outcome
}

/// The hook `task_post_fork`: Slurm writes `*** JOB … CANCELLED … ***` to slurmstepd's standard error, which for a batch step is the job's
/// output file. From here on it goes to a log of ours. The task, already forked, keeps its own.
pub fn forked(spank: Handle, args: &PlugArgs) -> c_int {
    if !options::asked_for_vm() || slurm::item(spank, Item::Step) != Some(BATCH_STEP) {
        return OK;
    }
    let log = Settings::parse(&args.words()).log;
    if let Err(e) = redirect_to(&log) {
        slurm::error(&format!(
            "vm: Slurm's own lines go to the job's output, because {}: {e}",
            log.display()
        ));
    }
    OK
}

fn redirect_to(log: &Path) -> io::Result<()> {
    if let Some(directory) = log.parent() {
        DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    }
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(log)?;
    os::replace_stderr(file.as_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batch_and_normal_steps_are_handed_over_and_slurms_own_are_not() {
        assert_eq!(kind_of(0xffff_fffb), Some(StepKind::Batch));
        assert_eq!(kind_of(0), Some(StepKind::Step));
        assert_eq!(kind_of(0xffff_fffa), None, "the shell of salloc");
        assert_eq!(kind_of(0xffff_fffc), None, "extern");
    }
}
