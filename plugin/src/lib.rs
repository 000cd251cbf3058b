//! `spank_vm.so`: the `--vm` options of sbatch, srun and salloc, and the hand-over of their tasks to VMs.
//!
//! This file holds only what Slurm looks up by name. Every hook goes through one guard ([`guard`]): no panic reaches Slurm, and what a
//! hook returns is decided in one place. The work is in `client` (sbatch, salloc, srun), `node` (prolog and epilog) and `task`
//! (slurmstepd). The plugin has no threads, reads no configuration but its own line in plugstack.conf, and a job without `--vm` passes
//! through without a file opened or a message sent.
//!
//! One build serves every Slurm release that `release` knows.

mod args;
mod client;
mod guard;
mod hook;
mod node;
mod options;
mod os;
mod release;
mod slurm;
mod task;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

use crate::{
    guard::guard,
    slurm::{Handle, PlugArgs},
};
use std::{
    ffi::{c_char, c_int, c_uint},
    sync::atomic::AtomicU32,
};

/// The plugin's name: part of the options' names in environments.
#[unsafe(no_mangle)]
pub static plugin_name: [u8; 3] = *b"vm\0";

/// The kind of plugin.
#[unsafe(no_mangle)]
pub static plugin_type: [u8; 6] = *b"spank\0";

/// The Slurm release this plugin is for; set by `release` when the file is loaded, before Slurm reads it.
#[unsafe(no_mangle)]
pub static plugin_version: AtomicU32 = AtomicU32::new(0);

/// The version of this plugin, for whoever asks.
#[unsafe(no_mangle)]
pub static spank_plugin_version: c_uint = 1;

/// Everywhere: registers the options.
#[unsafe(no_mangle)]
pub extern "C" fn slurm_spank_init(spank: Handle, count: c_int, words: *mut *mut c_char) -> c_int {
    guard("init", || options::init(spank, &PlugArgs::new(count, words)))
}

/// Everywhere but the prolog: all options are known. On the client they are checked and the job description is completed.
#[unsafe(no_mangle)]
pub extern "C" fn slurm_spank_init_post_opt(spank: Handle, count: c_int, words: *mut *mut c_char) -> c_int {
    guard("init_post_opt", || client::options_known(spank, &PlugArgs::new(count, words)))
}

/// On each node before the job, as root: tells the agent.
#[unsafe(no_mangle)]
pub extern "C" fn slurm_spank_job_prolog(spank: Handle, count: c_int, words: *mut *mut c_char) -> c_int {
    guard("job_prolog", || node::prolog(spank, &PlugArgs::new(count, words)))
}

/// On each node after the job, as root: waits until the VM has left.
#[unsafe(no_mangle)]
pub extern "C" fn slurm_spank_job_epilog(spank: Handle, count: c_int, words: *mut *mut c_char) -> c_int {
    guard("job_epilog", || node::epilog(spank, &PlugArgs::new(count, words)))
}

/// In slurmstepd, as root, after a task was forked: keeps Slurm's own lines out of the job's output.
#[unsafe(no_mangle)]
pub extern "C" fn slurm_spank_task_post_fork(spank: Handle, count: c_int, words: *mut *mut c_char) -> c_int {
    guard("task_post_fork", || task::forked(spank, &PlugArgs::new(count, words)))
}

/// In the task, as the user, just before it becomes the program: makes it become the shim. Fails closed: see [`task::fail_closed`].
#[unsafe(no_mangle)]
pub extern "C" fn slurm_spank_task_init(spank: Handle, count: c_int, words: *mut *mut c_char) -> c_int {
    task::fail_closed(guard("task_init", || task::init(spank, &PlugArgs::new(count, words))))
}
