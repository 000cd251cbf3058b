//! The one guard of all callbacks.
#![forbid(unsafe_code)]
use crate::{options, slurm};
use std::{
    ffi::c_int,
    panic::{AssertUnwindSafe, catch_unwind},
};

/// Success, to Slurm.
pub const OK: c_int = 0;
/// Failure: negative, because releases up to 24.11 look at the sign.
pub const FAILED: c_int = -1;

#[cfg(test)]
thread_local! {
    /// The callback that shall panic on this thread.
    pub static PANIC_IN: std::cell::Cell<Option<&'static str>> = const { std::cell::Cell::new(None) };
}

/// Runs a callback. After a panic the answer depends on what is at stake: on the client and in a task, a VM job must not go on as a job of
/// the host; everywhere else a failure would drain the node for no gain.
pub fn guard(name: &'static str, callback: impl FnOnce() -> c_int) -> c_int {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        #[cfg(test)]
        if PANIC_IN.get() == Some(name) {
            panic!("on purpose");
        }
        callback()
    }));
    outcome.unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("panic");
        slurm::error(&format!("vm: {name}: internal error: {text}"));
        let stops = match name {
            "init" | "init_post_opt" | "option" => slurm::is_client() && options::asked_for_vm(),
            "task_init" => options::asked_for_vm(),
            _ => false,
        };
        if stops { FAILED } else { OK }
    })
}
