//! What the shim is given: the plugin's words, and the task as Slurm made it.
use std::{
    ffi::OsString,
    fs, io,
    os::unix::{ffi::OsStringExt, fs::OpenOptionsExt},
    path::PathBuf,
};

use nix::libc;
use slurm_vm_api::{
    session::{Frame, MAX_BODY, StepKind, ToAgent},
    shim::{self as handed, OpenMode, Request, SHIM_ARGS_ENV, ShimArgs, ShimError, is_private_variable},
};
use thiserror::Error;

use super::context;

/// The options' prefix, by which the plugin's variables are told from others.
const OPTION_PREFIX: &str = "vm";

/// Why the task cannot be described to the agent.
#[derive(Debug, Error)]
pub enum ContractError {
    /// The plugin's words.
    #[error(transparent)]
    Words(#[from] ShimError),
    /// slurmd's copy of the script.
    #[error("the job script '{path}' cannot be read: {source}")]
    Script {
        /// Its path.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A part does not fit a message to the agent.
    #[error("the {part} of {size} bytes is over the limit of {MAX_BODY}")]
    TooLarge {
        /// Which part.
        part: &'static str,
        /// Its size.
        size: usize,
    },
}

/// One task: who it is and what it runs.
#[derive(Debug)]
pub struct Task {
    /// The plugin's words.
    pub args: ShimArgs,
    /// Environment, arguments and script, in the order in which they are sent.
    pub blobs: Vec<Frame<ToAgent>>,
}

impl Task {
    /// Whether this is the batch script.
    pub fn is_batch(&self) -> bool {
        self.args.kind == handed::StepKind::Batch
    }

    /// The step's kind as the session names it.
    pub fn kind(&self) -> StepKind {
        if self.is_batch() { StepKind::Batch } else { StepKind::Step }
    }

    /// Whether a start from scratch empties the output files: Slurm would have done so, had the plugin not asked it to append.
    pub fn truncates(&self) -> bool {
        self.is_batch() && self.args.open_mode == OpenMode::Default
    }
}

/// Reads the plugin's words; what is left of the arguments is the program.
///
/// # Errors
/// Those of the words.
pub fn read_words(argv: Vec<OsString>, env: Option<OsString>) -> Result<(ShimArgs, Vec<Vec<u8>>), ContractError> {
    let env = env.map(|e| e.to_string_lossy().into_owned());
    let texts = argv.iter().map(|a| a.to_string_lossy().into_owned()).collect();
    let (args, program) = ShimArgs::from_process(texts, env.as_deref())?;
    // A program's arguments need not be UTF-8: they are taken as the bytes that they are.
    let mut raw: Vec<Vec<u8>> = argv.into_iter().map(OsString::into_vec).collect();
    if env.is_some() {
        raw.insert(0, program.into_iter().next().unwrap_or_default().into_bytes());
    } else {
        raw.drain(..raw.len() - program.len());
    }
    Ok((args, raw))
}

/// Collects what the agent has to know of the program.
///
/// # Errors
/// When the script cannot be read or a part is too large.
pub fn describe(args: ShimArgs, program: &[Vec<u8>]) -> Result<Task, ContractError> {
    let fits = |part: &'static str, bytes: Vec<u8>| {
        if bytes.len() > MAX_BODY {
            Err(ContractError::TooLarge { part, size: bytes.len() })
        } else {
            Ok(bytes)
        }
    };
    let private = |name: &[u8]| std::str::from_utf8(name).is_ok_and(|n| is_private_variable(n, OPTION_PREFIX));
    let mut blobs = vec![Frame::Environment(fits("environment", context::environment(private))?)];
    let mut arguments = Vec::new();
    for a in program {
        arguments.extend_from_slice(a);
        arguments.push(0);
    }
    blobs.push(Frame::Arguments(fits("argument list", arguments)?));
    let task = Task { args, blobs };
    if !task.is_batch() || matches!(task.args.request, Request::Refused(_)) {
        return Ok(task);
    }
    let path = PathBuf::from(OsString::from_vec(program.first().cloned().unwrap_or_default()));
    let read = || {
        let mut text = Vec::new();
        // A FIFO in place of the script would stop the shim before it can answer signals.
        let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path)?;
        io::Read::read_to_end(&mut io::Read::take(file, MAX_BODY as u64 + 1), &mut text)?;
        Ok(text)
    };
    let text = read().map_err(|source| ContractError::Script {
        path: path.clone(),
        source,
    })?;
    let mut task = task;
    task.blobs.push(Frame::Script(fits("job script", text)?));
    Ok(task)
}

/// The variable by which the words come on Slurm 22.05.
pub fn words_from_environment() -> Option<OsString> {
    std::env::var_os(SHIM_ARGS_ENV)
}
