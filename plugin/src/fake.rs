//! Slurm's side of the interface for unit tests: the functions that the plugin links, on tables that a test fills.
use crate::{
    guard::PANIC_IN,
    options,
    slurm::{Handle, sys},
};
use std::{
    collections::BTreeMap,
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    ptr,
    sync::{Mutex, MutexGuard, PoisonError},
};

pub const LOCAL: c_uint = sys::spank_context_S_CTX_LOCAL;
pub const REMOTE: c_uint = sys::spank_context_S_CTX_REMOTE;
pub const ALLOCATOR: c_uint = sys::spank_context_S_CTX_ALLOCATOR;
pub const SLURMD: c_uint = sys::spank_context_S_CTX_SLURMD;
pub const JOB_SCRIPT: c_uint = sys::spank_context_S_CTX_JOB_SCRIPT;
pub const JOB_UID: c_uint = sys::spank_item_S_JOB_UID;
pub const JOB_GID: c_uint = sys::spank_item_S_JOB_GID;
pub const JOB_ID: c_uint = sys::spank_item_S_JOB_ID;
pub const STEP_ID: c_uint = sys::spank_item_S_JOB_STEPID;
const JOB_ARGV: c_uint = sys::spank_item_S_JOB_ARGV;
pub const TASK: c_uint = sys::spank_item_S_TASK_GLOBAL_ID;

/// What Slurm knows and was told.
#[derive(Debug, Default)]
pub struct Slurm {
    pub context: c_uint,
    pub items: BTreeMap<c_uint, u32>,
    pub options: BTreeMap<String, String>,
    pub env: BTreeMap<String, String>,
    pub argv: Vec<usize>,
    pub errors: Vec<String>,
    pub registered: Vec<String>,
}

static SLURM: Mutex<Option<Slurm>> = Mutex::new(None);
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The tables. Only for a moment: the plugin's calls need them too.
pub fn slurm<R>(f: impl FnOnce(&mut Slurm) -> R) -> R {
    f(SLURM.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default())
}

/// A test's turn with empty tables; the plugin's state is one per process, as in life.
pub fn turn(context: c_uint) -> MutexGuard<'static, ()> {
    let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    slurm(|s| {
        *s = Slurm {
            context,
            ..Slurm::default()
        }
    });
    *options::given() = options::Given::default();
    PANIC_IN.set(None);
    turn
}

/// The program and arguments that the task would be started with.
pub fn argv() -> Vec<String> {
    slurm(|s| s.argv.clone())
        .into_iter()
        .filter(|p| *p != 0)
        .map(|p| text(p as *const c_char))
        .collect()
}

fn text(pointer: *const c_char) -> String {
    // SAFETY: the plugin passes C strings, and so does `argv`.
    unsafe { CStr::from_ptr(pointer) }.to_str().expect("utf-8").to_owned()
}

/// The plugin's words in the form of a hook's arguments; leaked, as a test is short.
pub fn words(line: &str) -> (c_int, *mut *mut c_char) {
    let words: Vec<*mut c_char> = line.split_whitespace().map(|w| CString::new(w).unwrap().into_raw()).collect();
    (
        c_int::try_from(words.len()).unwrap(),
        Box::leak(words.into_boxed_slice()).as_mut_ptr(),
    )
}

#[unsafe(no_mangle)]
extern "C" fn slurm_error(_format: *const c_char, message: *const c_char) {
    slurm(|s| s.errors.push(text(message)));
}

#[unsafe(no_mangle)]
extern "C" fn slurm_info(_format: *const c_char, _message: *const c_char) {}

#[unsafe(no_mangle)]
extern "C" fn spank_context() -> c_uint {
    slurm(|s| s.context)
}

#[unsafe(no_mangle)]
extern "C" fn spank_option_register(_spank: Handle, option: *mut crate::slurm::RawOption) -> c_uint {
    // SAFETY: the plugin passes a whole option.
    let name = text(unsafe { (*option).name });
    slurm(|s| s.registered.push(name));
    0
}

#[unsafe(no_mangle)]
extern "C" fn spank_option_getopt(_spank: Handle, option: *mut crate::slurm::RawOption, value: *mut *mut c_char) -> c_uint {
    // SAFETY: the plugin passes a whole option and a place for the value.
    let name = text(unsafe { (*option).name });
    match slurm(|s| s.options.get(&name).cloned()) {
        Some(found) => {
            // SAFETY: as above; the text is leaked, as Slurm keeps its own.
            unsafe { *value = CString::new(found).unwrap().into_raw() };
            0
        }
        None => sys::slurm_err_t_ESPANK_ERROR,
    }
}

#[unsafe(no_mangle)]
extern "C" fn spank_get_item(_spank: Handle, item: c_uint, first: *mut c_void, second: *mut *mut *mut c_char) -> c_uint {
    if item == JOB_ARGV {
        let (count, words) = slurm(|s| (s.argv.iter().filter(|p| **p != 0).count(), s.argv.as_mut_ptr()));
        // SAFETY: for this item the plugin passes an int and a pointer; the array stays where it is while the test runs.
        unsafe {
            *first.cast::<c_int>() = c_int::try_from(count).unwrap();
            *second = if count == 0 { ptr::null_mut() } else { words.cast() };
        }
        return 0;
    }
    match slurm(|s| s.items.get(&item).copied()) {
        Some(number) => {
            // SAFETY: for all other items the plugin passes a place for 32 bits.
            unsafe { *first.cast::<u32>() = number };
            0
        }
        None => sys::slurm_err_t_ESPANK_ERROR,
    }
}

#[unsafe(no_mangle)]
extern "C" fn spank_getenv(_spank: Handle, name: *const c_char, buffer: *mut c_char, size: c_int) -> c_uint {
    let Some(value) = slurm(|s| s.env.get(&text(name)).cloned()) else {
        return 3008;
    };
    if value.len() >= usize::try_from(size).unwrap() {
        return sys::slurm_err_t_ESPANK_NOSPACE;
    }
    let value = CString::new(value).unwrap();
    // SAFETY: the buffer has `size` bytes and the text with its zero is not longer.
    unsafe { ptr::copy_nonoverlapping(value.as_ptr(), buffer, value.as_bytes_with_nul().len()) };
    0
}

#[unsafe(no_mangle)]
extern "C" fn spank_setenv(_spank: Handle, name: *const c_char, value: *const c_char, _overwrite: c_int) -> c_uint {
    slurm(|s| s.env.insert(text(name), text(value)));
    0
}

#[unsafe(no_mangle)]
extern "C" fn spank_job_control_setenv(_spank: Handle, _name: *const c_char, _value: *const c_char, _overwrite: c_int) -> c_uint {
    0
}

/// Gives the task a program with arguments.
pub fn set_argv(line: &str) {
    let (count, words) = words(line);
    // SAFETY: `words` made an array of `count` pointers.
    let pointers = (0..usize::try_from(count).unwrap()).map(|i| unsafe { *words.add(i) } as usize);
    slurm(|s| s.argv = pointers.chain([0]).collect());
}
