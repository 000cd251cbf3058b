//! All calls of Slurm. Functions that every release has are linked; the others are looked up, because an unresolved name would keep the
//! plugin from loading at all.
use crate::os;
use std::{
    ffi::{CStr, CString, c_char, c_int, c_void},
    ptr,
};

#[expect(non_camel_case_types, non_upper_case_globals, dead_code, reason = "made by bindgen")]
#[allow(clippy::all, clippy::undocumented_unsafe_blocks, reason = "made by bindgen")]
pub(crate) mod sys {
    include!(concat!(env!("OUT_DIR"), "/spank.rs"));
}

/// Slurm's handle, only ever passed back to it.
pub type Handle = sys::spank_t;
/// An option callback.
pub type OptionCallback = unsafe extern "C" fn(c_int, *const c_char, c_int) -> c_int;
/// An option as Slurm wants it described.
pub type RawOption = sys::spank_option;

const SUCCESS: u32 = sys::ESPANK_SUCCESS;

/// Numbers that a step or task has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item {
    /// User id.
    Uid,
    /// Group id.
    Gid,
    /// Job id.
    Job,
    /// Step id.
    Step,
    /// Rank of the task in its step.
    Task,
    /// How often the job was requeued.
    Restarts,
}

/// Where the plugin runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Context {
    /// sbatch, salloc and scrontab.
    Allocator,
    /// srun.
    Local,
    /// slurmstepd.
    Remote,
    /// slurmd.
    Slurmd,
    /// Prolog and epilog.
    JobScript,
    /// Anything else.
    Other,
}

/// Asks Slurm where the plugin runs.
pub fn context() -> Context {
    // SAFETY: takes nothing and may be called at any time.
    match unsafe { sys::spank_context() } {
        sys::spank_context_S_CTX_ALLOCATOR => Context::Allocator,
        sys::spank_context_S_CTX_LOCAL => Context::Local,
        sys::spank_context_S_CTX_REMOTE => Context::Remote,
        sys::spank_context_S_CTX_SLURMD => Context::Slurmd,
        sys::spank_context_S_CTX_JOB_SCRIPT => Context::JobScript,
        _ => Context::Other,
    }
}

/// Whether a user waits for this process.
pub fn is_client() -> bool {
    matches!(context(), Context::Allocator | Context::Local)
}

/// A C string of a text; what follows a zero byte is left out.
pub fn c_string(text: &str) -> CString {
    CString::new(text.split('\0').next().unwrap_or_default()).unwrap_or_default()
}

fn text_at(pointer: *const c_char) -> Option<String> {
    if pointer.is_null() {
        return None;
    }
    // SAFETY: all callers hold a pointer that Slurm gave as a C string, and copy it before they return to Slurm.
    Some(unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned())
}

/// The text that an option callback got.
pub fn option_text(pointer: *const c_char) -> Option<String> {
    text_at(pointer)
}

/// An error, in Slurm's log or on the client's terminal.
pub fn error(text: &str) {
    let text = c_string(text);
    // SAFETY: the format takes one string and gets one, alive for the call.
    unsafe { sys::slurm_error(c"%s".as_ptr(), text.as_ptr()) }
}

/// A line of the log; on the client, one on standard error unless `-Q` was given.
pub fn info(text: &str) {
    let text = c_string(text);
    // SAFETY: as in `error`.
    unsafe { sys::slurm_info(c"%s".as_ptr(), text.as_ptr()) }
}

/// The words of the plugin's line in plugstack.conf.
#[derive(Debug, Clone, Copy)]
pub struct PlugArgs {
    count: c_int,
    words: *mut *mut c_char,
}

impl PlugArgs {
    /// What a hook was called with.
    pub fn new(count: c_int, words: *mut *mut c_char) -> Self {
        PlugArgs { count, words }
    }

    /// The words.
    pub fn words(&self) -> Vec<String> {
        if self.words.is_null() {
            return Vec::new();
        }
        // SAFETY: Slurm calls every hook with an array of `count` C strings that it keeps while the plugin is loaded.
        (0..usize::try_from(self.count).unwrap_or(0))
            .filter_map(|i| text_at(unsafe { *self.words.add(i) }))
            .collect()
    }
}

/// Registers an option. It lives for ever, as Slurm keeps the pointer.
pub fn register_option(spank: Handle, name: &str, arginfo: &str, usage: &str, value: c_int, callback: OptionCallback) -> Result<(), u32> {
    let option = Box::leak(Box::new(raw_option(name, arginfo, usage, value, Some(callback))));
    // SAFETY: the handle is the hook's own, and the option with all its strings is never freed.
    match unsafe { sys::spank_option_register(spank, option) } {
        SUCCESS => Ok(()),
        code => Err(code),
    }
}

fn raw_option(name: &str, arginfo: &str, usage: &str, value: c_int, cb: Option<OptionCallback>) -> RawOption {
    let raw = |text: &str| c_string(text).into_raw();
    RawOption {
        name: raw(name),
        arginfo: raw(arginfo),
        usage: raw(usage),
        has_arg: 1,
        val: value,
        cb,
    }
}

/// The value of an option, in the hooks where Slurm offers it (prolog, epilog, task_init).
pub fn option_value(spank: Handle, name: &str) -> Option<String> {
    let mut option = raw_option(name, "", "", 0, None);
    let mut value: *mut c_char = ptr::null_mut();
    // SAFETY: both pointers are to locals that outlive the call; Slurm reads the option's name and writes one pointer.
    let code = unsafe { sys::spank_option_getopt(spank, &raw mut option, &raw mut value) };
    let text = if code == SUCCESS { text_at(value) } else { None };
    for field in [option.name, option.arginfo, option.usage] {
        // SAFETY: made by into_raw in raw_option; spank_option_getopt keeps nothing of the option.
        drop(unsafe { CString::from_raw(field) });
    }
    text
}

/// A number of the step or task.
pub fn item(spank: Handle, item: Item) -> Option<u32> {
    let id = match item {
        Item::Uid => sys::spank_item_S_JOB_UID,
        Item::Gid => sys::spank_item_S_JOB_GID,
        Item::Job => sys::spank_item_S_JOB_ID,
        Item::Step => sys::spank_item_S_JOB_STEPID,
        Item::Task => sys::spank_item_S_TASK_GLOBAL_ID,
        Item::Restarts => sys::spank_item_S_SLURM_RESTART_COUNT,
    };
    let mut number: u32 = 0;
    // SAFETY: all of these items are 32 bits wide, and the local outlives the call.
    let code = unsafe { sys::spank_get_item(spank, id, &raw mut number) };
    (code == SUCCESS).then_some(number)
}

/// A variable of the task's environment. One that is too long for any use of ours comes as a text that no check lets pass.
pub fn task_env(spank: Handle, name: &str) -> Option<String> {
    let name = c_string(name);
    let mut buffer = [0_u8; 256];
    let size = c_int::try_from(buffer.len()).ok()?;
    // SAFETY: the buffer has that size and outlives the call.
    match unsafe { sys::spank_getenv(spank, name.as_ptr(), buffer.as_mut_ptr().cast(), size) } {
        SUCCESS => Some(CStr::from_bytes_until_nul(&buffer).ok()?.to_string_lossy().into_owned()),
        sys::slurm_err_t_ESPANK_NOSPACE => Some("(too long)".to_owned()),
        _ => None,
    }
}

/// Sets a variable of the task's environment.
pub fn set_task_env(spank: Handle, name: &str, value: &str) -> Result<(), String> {
    let (name, value) = (c_string(name), c_string(value));
    // SAFETY: Slurm copies both strings.
    match unsafe { sys::spank_setenv(spank, name.as_ptr(), value.as_ptr(), 1) } {
        SUCCESS => Ok(()),
        code => Err(format!("spank_setenv says {code}")),
    }
}

/// Adds a variable to the environment that Slurm keeps with the job for prologs and batch steps.
pub fn set_job_control(spank: Handle, name: &str, value: &str) -> Result<(), String> {
    let (name, value) = (c_string(name), c_string(value));
    // SAFETY: Slurm copies both strings.
    match unsafe { sys::spank_job_control_setenv(spank, name.as_ptr(), value.as_ptr(), 1) } {
        SUCCESS => Ok(()),
        code => Err(format!("spank_job_control_setenv says {code}")),
    }
}

type Prepend = unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> u32;

/// Whether this release can put words in front of a task's arguments (23.11 and later).
pub fn can_prepend() -> bool {
    os::symbol(c"spank_prepend_task_argv").is_some()
}

/// Puts words in front of the task's arguments. `None` when this release cannot.
pub fn prepend_task_argv(spank: Handle, words: &[String]) -> Option<Result<(), String>> {
    let function = os::symbol(c"spank_prepend_task_argv")?;
    // SAFETY: spank.h of 23.11 and later declares it so; releases without it do not have the symbol.
    let function = unsafe { std::mem::transmute::<*mut c_void, Prepend>(function) };
    let words: Vec<CString> = words.iter().map(|w| c_string(w)).collect();
    let pointers: Vec<*const c_char> = words.iter().map(|w| w.as_ptr()).collect();
    let Ok(count) = c_int::try_from(pointers.len()) else {
        return Some(Err("too many words".to_owned()));
    };
    // SAFETY: `count` C strings that outlive the call; Slurm copies them.
    match unsafe { function(spank, count, pointers.as_ptr()) } {
        SUCCESS => Some(Ok(())),
        code => Some(Err(format!("spank_prepend_task_argv says {code}"))),
    }
}

/// Replaces the task's first argument and returns what it was. For releases up to 23.02, where the array that this changes is the very
/// one that the task is started with.
pub fn replace_program(spank: Handle, program: &str) -> Result<String, String> {
    let mut count: c_int = 0;
    let mut words: *mut *mut c_char = ptr::null_mut();
    // SAFETY: this item writes an int and a pointer to an array of C strings; both locals outlive the call.
    let code = unsafe { sys::spank_get_item(spank, sys::spank_item_S_JOB_ARGV, &raw mut count, &raw mut words) };
    if code != SUCCESS || count < 1 || words.is_null() {
        return Err(format!("S_JOB_ARGV says {code}"));
    }
    // SAFETY: the array has `count` > 0 entries.
    let old = text_at(unsafe { *words }).ok_or("the task has no program")?;
    // SAFETY: as above. This is a forked child about to exec, so nobody else reads the array, and what is put there is never freed.
    unsafe { *words = c_string(program).into_raw() };
    Ok(old)
}

/// The options of the client itself (`--mem`, `--constraint` …), through functions that libslurm exports but does not promise.
#[derive(Debug, Clone, Copy)]
pub struct ClientOptions {
    options: *mut c_void,
    get: Get,
    is_set: IsSet,
    set: Set,
}

type Get = unsafe extern "C" fn(*mut c_void, *const c_char) -> *mut c_char;
type IsSet = unsafe extern "C" fn(*mut c_void, *const c_char) -> bool;
type Set = unsafe extern "C" fn(*mut c_void, *const c_char, *const c_char, bool) -> c_int;

impl ClientOptions {
    /// `None` when this process does not have them.
    pub fn find() -> Option<ClientOptions> {
        let options = os::symbol(c"opt")?;
        let (get, is_set, set) = (
            os::symbol(c"slurm_option_get")?,
            os::symbol(c"slurm_option_isset")?,
            os::symbol(c"slurm_option_set")?,
        );
        // SAFETY: the three functions have had these types from 22.05 to 26.05, the releases in which this plugin loads.
        unsafe {
            Some(ClientOptions {
                options,
                get: std::mem::transmute::<*mut c_void, Get>(get),
                is_set: std::mem::transmute::<*mut c_void, IsSet>(is_set),
                set: std::mem::transmute::<*mut c_void, Set>(set),
            })
        }
    }
}

/// The client's options, as the plugin uses them.
pub trait JobOptions {
    /// The value of an option.
    fn get(&self, name: &str) -> Option<String>;
    /// Whether the user gave it, in whatever way.
    fn is_set(&self, name: &str) -> bool;
    /// Gives it.
    fn set(&mut self, name: &str, value: &str) -> bool;
}

impl JobOptions for ClientOptions {
    fn get(&self, name: &str) -> Option<String> {
        let name = c_string(name);
        // SAFETY: `options` is the client's own structure, which these functions take. The text is leaked: it belongs to Slurm's
        // allocator, and a client lives for a moment.
        text_at(unsafe { (self.get)(self.options, name.as_ptr()) })
    }

    fn is_set(&self, name: &str) -> bool {
        let name = c_string(name);
        // SAFETY: as in `get`.
        unsafe { (self.is_set)(self.options, name.as_ptr()) }
    }

    fn set(&mut self, name: &str, value: &str) -> bool {
        let name = c_string(name);
        // Some setters write into the value or keep it, so it is memory of its own that is never freed.
        let value = c_string(value).into_raw();
        // SAFETY: as in `get`; the value is writable and lives on.
        unsafe { (self.set)(self.options, name.as_ptr(), value, false) == 0 }
    }
}
