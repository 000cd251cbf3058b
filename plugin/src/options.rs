//! The options: their table, their registration, and what was given.
#![forbid(unsafe_code)]
use crate::{
    args::Settings,
    client,
    guard::{OK, guard},
    slurm::{self, Context, Handle, PlugArgs},
};
use slurm_vm_api::spec::{OPTIONS, VmOption};
use std::{
    ffi::{c_char, c_int},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Argument and help of each option, in the style of Slurm's own.
fn help(option: VmOption) -> (&'static str, &'static str) {
    match option {
        VmOption::Image => ("image", "run the job in its own virtual machine, booted from this image"),
        VmOption::Cpus => ("ncpus", "number of virtual cpus; default: the cpus of the job on the node"),
        VmOption::Mem => ("MB", "memory of the guest; default: what the job's memory leaves for it"),
        VmOption::BootTimeout => ("time", "how long the guest may take to come up; a bare number is seconds"),
        VmOption::Preempt => (
            "list",
            "what to do when the job is preempted, in this order; of live, save, requeue, cancel",
        ),
        VmOption::Mount => (
            "list",
            "directories of the host for the guest: SRC[:DST][:ro], home, workdir; none: not even what the site gives",
        ),
        VmOption::Disk => ("MB", "size of the guest's disk; default: the image's own"),
        VmOption::Net => (
            "none|user",
            "network of the guest; user: what a process of yours on the node reaches",
        ),
        VmOption::Workdir => (
            "path",
            "directory in the guest in which the programs run; default: the working directory",
        ),
    }
}

/// What was given, by place in [`VmOption::ALL`].
#[derive(Debug, Default)]
pub struct Given {
    /// The values, the last one given counts.
    pub texts: [Option<String>; OPTIONS],
    /// The values that came from SLURM_VM_… variables.
    pub from_env: [Option<String>; OPTIONS],
    /// How many job descriptions this command has made: more than one is a heterogeneous job.
    pub descriptions: u32,
}

static GIVEN: Mutex<Given> = Mutex::new(Given {
    texts: [const { None }; OPTIONS],
    from_env: [const { None }; OPTIONS],
    descriptions: 0,
});

/// What was given. There is one thread, so the lock is free; after a panic the data are still plain values.
pub fn given() -> MutexGuard<'static, Given> {
    GIVEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether an image was asked for.
pub fn asked_for_vm() -> bool {
    given().texts[VmOption::Image.index()].is_some()
}

/// The option's name.
pub fn name(prefix: &str, option: VmOption) -> String {
    format!("{prefix}{}", option.suffix())
}

/// The hook `init`.
pub fn init(spank: Handle, args: &PlugArgs) -> c_int {
    let settings = Settings::parse(&args.words());
    let context = slurm::context();
    if context == Context::Slurmd {
        // Once, in slurmd's log, rather than on every user's terminal.
        settings.complaints.iter().for_each(|c| slurm::error(c));
        return OK;
    }
    for (value, option) in (0..).zip(VmOption::ALL) {
        let (arginfo, usage) = help(option);
        let name = name(&settings.prefix, option);
        if let Err(code) = slurm::register_option(spank, &name, arginfo, usage, value, option_given) {
            slurm::error(&format!("vm: the option --{name} cannot be registered (error {code})"));
        }
    }
    if slurm::is_client() {
        client::take_environment(&settings, context);
    }
    OK
}

/// Slurm's callback for an option. It may come twice for one option, and it only takes the value down: what is wrong is told at
/// `init_post_opt`, where all options are known, and on a node nothing may fail here.
pub extern "C" fn option_given(value: c_int, text: *const c_char, _remote: c_int) -> c_int {
    guard("option", || {
        let index = usize::try_from(value).unwrap_or(usize::MAX);
        if let (Some(slot), Some(text)) = (given().texts.get_mut(index), slurm::option_text(text)) {
            *slot = Some(text);
        }
        OK
    })
}
