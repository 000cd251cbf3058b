//! How the plugin hands a task over to the shim (`slurm-vm-run`).
//!
//! From Slurm 23.11 on the plugin puts the shim in front of the task's arguments:
//! `slurm-vm-run --job J --step S --task T … -- PROGRAM ARGS…`. Older releases let it replace only the first argument, so there the same
//! words, and then the program's name, travel as a JSON list in [`SHIM_ARGS_ENV`]; what follows the shim's own name are the program's
//! remaining arguments. Either way [`ShimArgs::from_process`] gives the same result. The shim takes the variables of
//! [`is_private_variable`] out of the program's environment, so that it is what it would be without `--vm`.
use crate::spec::{SpecError, VmSpec};
use std::{fmt, str::FromStr};
use thiserror::Error;

/// Where the shim is installed.
pub const DEFAULT_RUN: &str = "/usr/libexec/slurm-vm/slurm-vm-run";
/// The variable that carries the shim's words where Slurm cannot put them in front of the task's arguments.
pub const SHIM_ARGS_ENV: &str = "SLURM_VM_SHIM_ARGS";
/// The variable by which the client tells the batch step about the open mode, as Slurm's job-control environment names it.
pub const OPEN_MODE_CONTROL: &str = "VM_OPEN_MODE";
/// Slurm's prefix for variables of the job-control environment in a job's environment.
pub const CONTROL_PREFIX: &str = "SLURM_SPANK_";

/// Who decided whether Slurm appends to the output file or truncates it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// The user said nothing and the plugin asked for append: the shim truncates on a start from scratch.
    Default,
    /// The user asked for append.
    Append,
    /// The user asked for truncate.
    Truncate,
    /// Nothing is known: the plugin could not ask, or this is no batch step.
    Unknown,
}

/// What kind of step a task belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepKind {
    /// The batch script.
    Batch,
    /// A task of `srun`.
    Step,
}

macro_rules! words {
    ($type:ident { $($variant:ident = $word:literal),+ }) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $($type::$variant => $word),+ })
            }
        }
        impl FromStr for $type {
            type Err = ShimError;
            fn from_str(text: &str) -> Result<Self, ShimError> {
                match text { $($word => Ok($type::$variant),)+ _ => Err(ShimError::Value(text.to_owned())) }
            }
        }
    };
}
words!(OpenMode { Default = "default", Append = "append", Truncate = "truncate", Unknown = "unknown" });
words!(StepKind { Batch = "batch", Step = "step" });

/// Why the shim cannot read what it was given.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ShimError {
    /// An unknown word.
    #[error("unknown argument '{0}'")]
    Unknown(String),
    /// A word without its value.
    #[error("'{0}' needs a value")]
    NoValue(String),
    /// A value that cannot be read.
    #[error("'{0}' is not a value that is known here")]
    Value(String),
    /// Something is missing.
    #[error("'{0}' is missing")]
    Missing(&'static str),
    /// The list in the environment cannot be read.
    #[error("{SHIM_ARGS_ENV} cannot be read: {0}")]
    Environment(String),
    /// The request.
    #[error(transparent)]
    Spec(#[from] SpecError),
}

/// What to run in the guest, or why nothing can be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// The job's VM.
    Spec(VmSpec),
    /// The options were not checked by the client and are wrong: the shim says so and exits with 126.
    Refused(String),
}

/// All that the shim is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShimArgs {
    /// Job id.
    pub job: u32,
    /// Step id, as a number; the batch step is 4294967291.
    pub step: u32,
    /// Rank of the task in the step.
    pub task: u32,
    /// Slurm's restart count.
    pub restart: u32,
    /// Batch script or task of a step.
    pub kind: StepKind,
    /// Who decided on append or truncate.
    pub open_mode: OpenMode,
    /// The agent's socket.
    pub socket: String,
    /// The request.
    pub request: Request,
}

impl ShimArgs {
    /// The words, without the shim's own path and without the `--`.
    #[must_use]
    pub fn to_words(&self) -> Vec<String> {
        let mut words: Vec<String> = Vec::new();
        let mut put = |name: &str, value: String| words.extend([name.to_owned(), value]);
        put("--job", self.job.to_string());
        put("--step", self.step.to_string());
        put("--task", self.task.to_string());
        put("--restart", self.restart.to_string());
        put("--kind", self.kind.to_string());
        put("--open-mode", self.open_mode.to_string());
        put("--socket", self.socket.clone());
        match &self.request {
            Request::Spec(spec) => put("--spec", spec.to_json()),
            Request::Refused(why) => put("--refused", why.clone()),
        }
        words
    }

    /// The value of [`SHIM_ARGS_ENV`]: the words, `--`, and the program's own first argument.
    #[must_use]
    pub fn to_env_value(&self, program: &str) -> String {
        let mut words = self.to_words();
        words.extend(["--".to_owned(), program.to_owned()]);
        serde_json::Value::from(words).to_string()
    }

    /// Reads the words up to `--`; what follows is the program and its arguments.
    ///
    /// # Errors
    /// Names the word that is unknown, unreadable or missing.
    pub fn from_words<I: IntoIterator<Item = String>>(words: I) -> Result<(ShimArgs, Vec<String>), ShimError> {
        let mut words = words.into_iter();
        let (mut job, mut step, mut task, mut restart) = (None, None, None, None);
        let (mut kind, mut open_mode, mut socket, mut request) = (None, None, None, None);
        loop {
            let word = words.next().ok_or(ShimError::Missing("--"))?;
            if word == "--" {
                break;
            }
            let value = words.next().ok_or_else(|| ShimError::NoValue(word.clone()))?;
            let number = || value.parse::<u32>().map_err(|_| ShimError::Value(value.clone()));
            match word.as_str() {
                "--job" => job = Some(number()?),
                "--step" => step = Some(number()?),
                "--task" => task = Some(number()?),
                "--restart" => restart = Some(number()?),
                "--kind" => kind = Some(value.parse()?),
                "--open-mode" => open_mode = Some(value.parse()?),
                "--socket" => socket = Some(value),
                "--spec" => request = Some(Request::Spec(VmSpec::from_json(&value)?)),
                "--refused" => request = Some(Request::Refused(value)),
                _ => return Err(ShimError::Unknown(word)),
            }
        }
        let args = ShimArgs {
            job: job.ok_or(ShimError::Missing("--job"))?,
            step: step.ok_or(ShimError::Missing("--step"))?,
            task: task.ok_or(ShimError::Missing("--task"))?,
            restart: restart.ok_or(ShimError::Missing("--restart"))?,
            kind: kind.ok_or(ShimError::Missing("--kind"))?,
            open_mode: open_mode.ok_or(ShimError::Missing("--open-mode"))?,
            socket: socket.ok_or(ShimError::Missing("--socket"))?,
            request: request.ok_or(ShimError::Missing("--spec"))?,
        };
        let program: Vec<String> = words.collect();
        if program.is_empty() {
            Err(ShimError::Missing("program"))
        } else {
            Ok((args, program))
        }
    }

    /// Reads what the plugin handed over, whichever way it came. `argv` excludes the shim's own name; `env` is [`SHIM_ARGS_ENV`].
    ///
    /// # Errors
    /// As [`ShimArgs::from_words`].
    pub fn from_process(argv: Vec<String>, env: Option<&str>) -> Result<(ShimArgs, Vec<String>), ShimError> {
        let Some(env) = env else { return ShimArgs::from_words(argv) };
        let mut words: Vec<String> = serde_json::from_str(env).map_err(|e| ShimError::Environment(e.to_string()))?;
        words.extend(argv);
        ShimArgs::from_words(words)
    }
}

/// Whether a variable of the task's environment is the plugin's, so that the program must not see it. `prefix` is the options' prefix.
#[must_use]
pub fn is_private_variable(name: &str, prefix: &str) -> bool {
    let option = |name: &str| {
        name.strip_prefix("_SLURM_SPANK_OPTION_vm_")
            .and_then(|o| o.strip_prefix(&prefix.replace('-', "_")))
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(['_', '-']))
    };
    name == SHIM_ARGS_ENV
        || option(name)
        || name
            .strip_prefix(CONTROL_PREFIX)
            .is_some_and(|n| n == OPEN_MODE_CONTROL || option(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args() -> ShimArgs {
        ShimArgs {
            job: 12,
            step: 0xffff_fffb,
            task: 0,
            restart: 1,
            kind: StepKind::Batch,
            open_mode: OpenMode::Default,
            socket: "/run/slurm-vm/agent.sock".into(),
            request: Request::Spec(VmSpec::for_image("a").unwrap()),
        }
    }

    const GOLDEN: &str = r#"--job 12 --step 4294967291 --task 0 --restart 1 --kind batch --open-mode default --socket /run/slurm-vm/agent.sock --spec {"v":1,"image":"a"}"#;

    #[test]
    fn both_ways_of_handing_over_give_the_same() {
        assert_eq!(args().to_words().join(" "), GOLDEN);
        let program: Vec<String> = ["job.sh", "--", "--job", "x y"].map(str::to_owned).to_vec();
        let front = [args().to_words(), vec!["--".into()], program.clone()].concat();
        assert_eq!(ShimArgs::from_process(front, None), Ok((args(), program.clone())));
        let env = args().to_env_value("job.sh");
        assert_eq!(ShimArgs::from_process(program[1..].to_vec(), Some(&env)), Ok((args(), program)));
    }

    #[test]
    fn a_refusal_travels_too() {
        let refused = ShimArgs {
            request: Request::Refused("--vm: no".into()),
            ..args()
        };
        assert_eq!(
            ShimArgs::from_process(vec![], Some(&refused.to_env_value("x"))),
            Ok((refused, vec!["x".to_owned()]))
        );
    }

    #[test]
    fn what_is_missing_or_unknown_is_named() {
        let read = |text: &str| ShimArgs::from_words(text.split(' ').map(str::to_owned)).unwrap_err();
        assert_eq!(read("--job 12 --"), ShimError::Missing("--step"));
        assert_eq!(read("--job"), ShimError::NoValue("--job".into()));
        assert_eq!(read("--job x --"), ShimError::Value("x".into()));
        assert_eq!(read("--fly 1 --"), ShimError::Unknown("--fly".into()));
        assert_eq!(read(&format!("{GOLDEN} --")), ShimError::Missing("program"));
        assert_eq!(read(GOLDEN), ShimError::Missing("--"));
    }

    #[test]
    fn only_the_plugins_own_variables_are_private() {
        for name in [
            "SLURM_VM_SHIM_ARGS",
            "SLURM_SPANK_VM_OPEN_MODE",
            "SLURM_SPANK__SLURM_SPANK_OPTION_vm_vm",
            "SLURM_SPANK__SLURM_SPANK_OPTION_vm_vm_cpus",
            "_SLURM_SPANK_OPTION_vm_vm",
            "_SLURM_SPANK_OPTION_vm_vm-mem",
        ] {
            assert!(is_private_variable(name, "vm"), "{name}");
        }
        for name in [
            "PATH",
            "SLURM_VM",
            "SLURM_JOB_ID",
            "_SLURM_SPANK_OPTION_vmx_vm",
            "_SLURM_SPANK_OPTION_vm_other",
            "SLURM_SPANK_X",
        ] {
            assert!(!is_private_variable(name, "vm"), "{name}");
        }
    }
}
