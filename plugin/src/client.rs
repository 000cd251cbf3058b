//! In sbatch, salloc and srun: checks the options, and completes the job description so that the job fits its VM.
#![forbid(unsafe_code)]
use crate::{
    args::Settings,
    guard::{FAILED, OK},
    options, os,
    slurm::{self, ClientOptions, Context, Handle, JobOptions, PlugArgs},
};
use slurm_vm_api::{
    constraint,
    overhead::qemu_overhead_mib,
    shim::{CONTROL_PREFIX, OPEN_MODE_CONTROL, OpenMode},
    size,
    spec::{OPTIONS, PreemptWay, SpecError, VmOption, VmSpec},
};
use std::{env, ffi::c_int, fs};

/// Which command this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tool {
    /// sbatch, or scrontab.
    Batch,
    /// salloc.
    Salloc,
    /// srun that makes an allocation.
    Srun,
    /// srun within an allocation: the job's description is settled.
    SrunStep,
}

/// What is wrong with a request: one line for the user.
type Refusal = String;

/// Slurm's way to tell the nodes about an option.
fn remote_variable(prefix: &str, option: VmOption) -> String {
    let name: String = options::name(prefix, option)
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
        .collect();
    format!("_SLURM_SPANK_OPTION_vm_{name}")
}

/// Slurm's way to give an option by the environment.
fn native_variable(prefix: &str, option: VmOption) -> String {
    format!("{CONTROL_PREFIX}{}", remote_variable(prefix, option))
}

/// Our own variables for an option, the one that counts first.
fn own_variables(prefix: &str, option: VmOption, context: Context) -> Vec<String> {
    let name = options::name(prefix, option).replace('-', "_").to_ascii_uppercase();
    let mut variables = vec![format!("SLURM_{name}")];
    if context == Context::Allocator {
        let tool = if os::symbol(c"saopt").is_some() { "SALLOC" } else { "SBATCH" };
        variables.insert(0, format!("{tool}_{name}"));
    }
    variables
}

/// Turns SLURM_VM and its companions into the form that Slurm itself reads, so that it ranks and forwards them like its own variables:
/// after `#SBATCH` lines, before the command line. Within a job, sbatch and salloc do not take over that job's VM: a new job is a new job.
/// That needs the variables for the nodes removed too: slurmstepd would find them in the new job's environment.
pub fn take_environment(settings: &Settings, context: Context) {
    let in_job = env::var_os("SLURM_JOB_ID").is_some();
    for option in VmOption::ALL {
        // Slurm sets it again after the options are read, if the option is given.
        os::remove_env(&remote_variable(&settings.prefix, option));
        let native = native_variable(&settings.prefix, option);
        let inherited = env::var_os(&native).is_some();
        if inherited && in_job && context == Context::Local {
            continue;
        }
        let own = own_variables(&settings.prefix, option, context)
            .iter()
            .find_map(|v| env::var(v).ok())
            .filter(|v| !v.is_empty());
        match own {
            Some(value) => {
                os::set_env(&native, &value);
                options::given().from_env[option.index()] = Some(value);
            }
            None if inherited && in_job => os::remove_env(&native),
            None => {}
        }
    }
}

/// In slurmstepd: takes the options from the job's environment where Slurm did not. Before `--export=NONE` and `--export=NAME` were mended,
/// they kept Slurm's variables for the nodes out of the job's environment, and with them the options; the script would run on the host.
fn options_of_step(spank: Handle, settings: &Settings) -> c_int {
    let mut given = options::given();
    for option in VmOption::ALL {
        if given.texts[option.index()].is_none() {
            given.texts[option.index()] = slurm::task_env(spank, &native_variable(&settings.prefix, option));
        }
    }
    OK
}

/// The hook `init_post_opt`.
pub fn options_known(spank: Handle, args: &PlugArgs) -> c_int {
    let settings = Settings::parse(&args.words());
    if !slurm::is_client() {
        return if slurm::context() == Context::Remote {
            options_of_step(spank, &settings)
        } else {
            OK
        };
    }
    match request(&settings).and_then(|spec| spec.map_or(Ok(false), |spec| complete(spank, &settings, &spec).map(|()| true))) {
        Ok(is_vm) => {
            if is_vm {
                settings.complaints.iter().for_each(|c| slurm::error(c));
            }
            OK
        }
        Err(refusal) => {
            slurm::error(&refusal);
            stop()
        }
    }
}

/// Ends the command, with the code that Slurm's commands use for their own errors. A return value would do the same with two more lines
/// of Slurm's about plugins, but not if the plugin's line in plugstack.conf says `optional`: then the job would be submitted as it is.
/// Nothing was asked of the controller yet, and Slurm writes to standard error unbuffered.
fn stop() -> c_int {
    if cfg!(test) {
        return FAILED;
    }
    os::exit_now(
        env::var("SLURM_EXIT_ERROR")
            .ok()
            .and_then(|c| c.parse().ok())
            .filter(|c| *c > 0)
            .unwrap_or(1),
    )
}

/// Reads and checks what was asked for.
fn request(settings: &Settings) -> Result<Option<VmSpec>, Refusal> {
    let mut given = options::given();
    given.descriptions += 1;
    let given = &*given;
    let mut texts = [None; OPTIONS];
    for (slot, text) in texts.iter_mut().zip(&given.texts) {
        *slot = text.as_deref();
    }
    if texts[VmOption::Image.index()].is_none() {
        // A companion in the environment is a default for VM jobs, not a wish for one.
        for (text, own) in texts.iter_mut().zip(&given.from_env) {
            *text = text.filter(|t| own.as_deref() != Some(t));
        }
    }
    let spec = VmSpec::from_options(&texts).map_err(|e| {
        let prefix = &settings.prefix;
        let option = options::name(prefix, e.option);
        if e.source == SpecError::NoImage {
            format!("--{option} needs --{prefix}=IMAGE as well")
        } else {
            format!("--{option}: {}", e.source)
        }
    })?;
    if let Some(spec) = &spec {
        // Slurm keeps plugins' options for the whole command and what is set for one component for the next: they cannot be told apart.
        if given.descriptions > 1 {
            return Err(format!("--{} cannot be combined with heterogeneous jobs", settings.prefix));
        }
        check_image(settings, &spec.image)?;
        check_ways(settings, spec.preempt.as_deref().unwrap_or_default())?;
    }
    Ok(spec)
}

/// When the site has a list of images, an unknown one is refused here rather than on the node. The list is a help, not a guard: the
/// agent has the last word.
fn check_image(settings: &Settings, image: &str) -> Result<(), Refusal> {
    let Ok(list) = fs::read_to_string(&settings.images) else {
        return Ok(());
    };
    let known: Vec<&str> = list
        .lines()
        .map(|l| l.split('#').next().unwrap_or_default().trim())
        .filter(|l| !l.is_empty())
        .collect();
    if known.contains(&image) {
        return Ok(());
    }
    let known = if known.is_empty() {
        "there are none".to_owned()
    } else {
        format!("the images are {}", known.join(", "))
    };
    Err(format!("--{}: there is no image '{image}': {known}", settings.prefix))
}

fn check_ways(settings: &Settings, ways: &[PreemptWay]) -> Result<(), Refusal> {
    let Some(allowed) = &settings.preempt else { return Ok(()) };
    match ways.iter().find(|w| !allowed.contains(w)) {
        None => Ok(()),
        Some(way) => {
            let allowed = PreemptWay::format_list(allowed);
            Err(format!(
                "--{}: this site does not allow '{way}', only {allowed}",
                options::name(&settings.prefix, VmOption::Preempt)
            ))
        }
    }
}

fn complete(spank: Handle, settings: &Settings, spec: &VmSpec) -> Result<(), Refusal> {
    let Some(mut client) = ClientOptions::find() else {
        slurm::error(&format!(
            "vm: this Slurm does not let the plugin complete the job: give --constraint={} (and --mem, -c, --requeue) yourself",
            settings.feature
        ));
        return Ok(());
    };
    let tool = if os::symbol(c"sropt").is_some() || slurm::context() == Context::Local {
        let within = env::var_os("SLURM_JOB_ID").is_some() || env::var_os("SLURM_JOBID").is_some() || client.is_set("jobid");
        if within { Tool::SrunStep } else { Tool::Srun }
    } else if os::symbol(c"saopt").is_some() {
        Tool::Salloc
    } else {
        Tool::Batch
    };
    let open_mode = adjust(settings, spec, tool, &mut client)?;
    if let Some(line) = verdict(settings, spec, tool, &client) {
        slurm::info(&line);
    }
    if tool == Tool::Batch
        && let Err(why) = slurm::set_job_control(spank, OPEN_MODE_CONTROL, &open_mode.to_string())
    {
        slurm::error(&format!("vm: the open mode cannot be passed on: {why}"));
    }
    Ok(())
}

/// Completes the job's description. Whatever the user said stays; what contradicts the VM is refused.
pub fn adjust(settings: &Settings, spec: &VmSpec, tool: Tool, job: &mut impl JobOptions) -> Result<OpenMode, Refusal> {
    let prefix = &settings.prefix;
    if matches!(tool, Tool::Srun | Tool::SrunStep) && job.is_set("multi-prog") && !slurm::can_prepend() {
        return Err(format!("--{prefix} cannot be combined with --multi-prog in this release of Slurm"));
    }
    if tool == Tool::SrunStep {
        return Ok(OpenMode::Unknown);
    }
    set_cpus(prefix, spec, job)?;
    set_mem(prefix, spec, job)?;
    let asked = job.get("constraint");
    let wanted = constraint::with_feature(asked.as_deref(), &settings.feature).map_err(|e| format!("--{prefix}: {e}"))?;
    if asked.as_deref() != Some(wanted.as_str()) && !job.set("constraint", &wanted) {
        // Without it the script could run on a node without VMs, on the host itself.
        return Err(format!(
            "--{prefix}: the constraint '{wanted}' cannot be set; give it yourself with --constraint"
        ));
    }
    if tool != Tool::Batch {
        return Ok(OpenMode::Unknown);
    }
    if !job.is_set("requeue") && !job.is_set("no-requeue") && !job.set("requeue", "") {
        slurm::info("vm: requeue cannot be set");
    }
    if !job.is_set("signal") && !job.set("signal", &format!("B:{}", settings.notice)) {
        slurm::info("vm: the notice signal cannot be set");
    }
    Ok(match job.get("open-mode").and_then(|m| m.chars().next()) {
        Some('a' | 'A') => OpenMode::Append,
        Some('t' | 'T') => OpenMode::Truncate,
        _ if job.set("open-mode", "append") => OpenMode::Default,
        _ => OpenMode::Unknown,
    })
}

/// What a preemption will do to the job, if the submission alone tells that its VM cannot move: the rest is in `svm show`. For srun and
/// salloc only if the user asked for a way; a line at each of them would say nothing new.
pub fn verdict(settings: &Settings, spec: &VmSpec, tool: Tool, job: &impl JobOptions) -> Option<String> {
    let ways = spec.preempt.as_deref();
    let moves = |w: &PreemptWay| matches!(w, PreemptWay::Live | PreemptWay::Save);
    if ways.is_some_and(|w| !w.iter().any(moves)) {
        return None;
    }
    let most = job.is_set("nodes").then(|| job.get("nodes")).flatten().unwrap_or_default();
    let most: u32 = most.rsplit('-').next().and_then(|n| n.parse().ok()).unwrap_or(1);
    let why = match tool {
        Tool::SrunStep => return None,
        Tool::Srun | Tool::Salloc if ways.is_none() => return None,
        Tool::Srun | Tool::Salloc => "not a batch job: Slurm ends it when it is preempted".to_owned(),
        Tool::Batch if job.get("requeue").as_deref() == Some("no-requeue") => {
            "not requeueable (--no-requeue): Slurm ends it when it is preempted".to_owned()
        }
        Tool::Batch if most > 1 => {
            let cancelled = ways.is_some_and(|w| !w.contains(&PreemptWay::Requeue) && w.contains(&PreemptWay::Cancel));
            let then = if cancelled { "it is cancelled" } else { "it starts over" };
            format!("if it gets more than one node (of {most}), which would have to move together: {then} when it is preempted")
        }
        Tool::Batch => return None,
    };
    Some(format!("--{}: this job cannot move, {why}", settings.prefix))
}

fn number(job: &impl JobOptions, name: &str) -> Option<u32> {
    job.is_set(name).then(|| job.get(name)).flatten().and_then(|v| v.parse().ok())
}

/// Whether the job has one task on each node as far as can be told, so that -c is the CPUs of the VM.
fn one_task(job: &impl JobOptions) -> bool {
    ["ntasks", "ntasks-per-node"]
        .into_iter()
        .all(|n| !job.is_set(n) || number(job, n) == Some(1))
}

fn set_cpus(prefix: &str, spec: &VmSpec, job: &mut impl JobOptions) -> Result<(), Refusal> {
    let Some(vcpus) = spec.cpus else { return Ok(()) };
    if !one_task(job) || job.is_set("exclusive") {
        return Ok(());
    }
    match number(job, "cpus-per-task") {
        Some(cpus) if cpus < vcpus => Err(format!(
            "--{prefix}-cpus={vcpus} does not fit into --cpus-per-task={cpus}: leave one of them out"
        )),
        Some(_) => Ok(()),
        None if job.set("cpus-per-task", &vcpus.to_string()) => Ok(()),
        None => Err(format!("--{prefix}-cpus={vcpus}: --cpus-per-task cannot be set; give it yourself")),
    }
}

fn set_mem(prefix: &str, spec: &VmSpec, job: &mut impl JobOptions) -> Result<(), Refusal> {
    let Some(guest) = spec.mem_mib else { return Ok(()) };
    let cpus = number(job, "cpus-per-task");
    let vcpus = spec.cpus.or(cpus).unwrap_or(1);
    let needed = guest + qemu_overhead_mib(guest, vcpus);
    let explain = |given: &str| {
        let overhead = needed - guest;
        format!(
            "--{prefix}-mem={} needs {needed}M on the node ({overhead}M for QEMU), more than {given}",
            size::format_mib(guest)
        )
    };
    if let Some(given) = job.is_set("mem").then(|| job.get("mem")).flatten() {
        // Zero, which parse_mib refuses, is all the memory of the node.
        return match size::parse_mib(&given) {
            Ok(mem) if mem < needed => Err(explain(&format!("--mem={given}"))),
            _ => Ok(()),
        };
    }
    if let Some(given) = job.is_set("mem-per-cpu").then(|| job.get("mem-per-cpu")).flatten() {
        let total = size::parse_mib(&given).ok().map(|m| m * u64::from(cpus.unwrap_or(1)));
        let known = one_task(job) && !job.is_set("exclusive");
        return match total {
            Some(total) if known && total < needed => Err(explain(&format!("--mem-per-cpu={given} for {} CPUs", cpus.unwrap_or(1)))),
            _ => Ok(()),
        };
    }
    if job.is_set("mem-per-gpu") || job.set("mem", &format!("{needed}M")) {
        Ok(())
    } else {
        Err(format!("--{prefix}-mem: --mem cannot be set; give --mem={needed}M yourself"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[derive(Default)]
    struct Job(BTreeMap<String, String>);

    impl Job {
        fn of(options: &[(&str, &str)]) -> Job {
            Job(options.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect())
        }
        fn text(&self) -> String {
            self.0.iter().map(|(n, v)| format!("{n}={v}")).collect::<Vec<_>>().join(" ")
        }
    }

    impl JobOptions for Job {
        fn get(&self, name: &str) -> Option<String> {
            self.0.get(name).cloned()
        }
        fn is_set(&self, name: &str) -> bool {
            self.0.contains_key(name)
        }
        fn set(&mut self, name: &str, value: &str) -> bool {
            self.0.insert(name.to_owned(), value.to_owned());
            true
        }
    }

    fn spec(cpus: Option<u32>, mem_mib: Option<u64>) -> VmSpec {
        VmSpec {
            cpus,
            mem_mib,
            ..VmSpec::for_image("a").unwrap()
        }
    }

    fn run(tool: Tool, spec: &VmSpec, options: &[(&str, &str)]) -> (Result<OpenMode, Refusal>, String) {
        let mut job = Job::of(options);
        (adjust(&Settings::default(), spec, tool, &mut job), job.text())
    }

    #[test]
    fn a_batch_job_gets_what_the_user_did_not_say() {
        let (mode, job) = run(Tool::Batch, &spec(Some(2), Some(2048)), &[]);
        assert_eq!(mode, Ok(OpenMode::Default));
        assert_eq!(
            job,
            "constraint=vm cpus-per-task=2 mem=2165M open-mode=append requeue= signal=B:60@60"
        );
    }

    #[test]
    fn what_the_user_said_stays() {
        let said = [
            ("constraint", "a&vm"),
            ("cpus-per-task", "4"),
            ("mem", "4G"),
            ("open-mode", "t"),
            ("no-requeue", ""),
            ("signal", "USR1"),
        ];
        let (mode, job) = run(Tool::Batch, &spec(Some(2), Some(2048)), &said);
        assert_eq!(mode, Ok(OpenMode::Truncate));
        assert_eq!(job, Job::of(&said).text());
        assert_eq!(run(Tool::Batch, &spec(None, None), &[("open-mode", "a")]).0, Ok(OpenMode::Append));
    }

    #[test]
    fn an_allocation_gets_its_size_and_constraint_only() {
        for tool in [Tool::Salloc, Tool::Srun] {
            assert_eq!(
                run(tool, &spec(None, None), &[("constraint", "a|b")]),
                (Ok(OpenMode::Unknown), "constraint=(a|b)&vm".to_owned())
            );
        }
    }

    #[test]
    fn a_step_in_an_allocation_changes_nothing() {
        assert_eq!(
            run(Tool::SrunStep, &spec(Some(8), Some(9999)), &[("mem", "1G")]),
            (Ok(OpenMode::Unknown), "mem=1G".to_owned())
        );
    }

    #[test]
    fn a_vm_that_does_not_fit_is_refused_with_the_numbers() {
        let refused = |spec: &VmSpec, options: &[(&str, &str)]| run(Tool::Batch, spec, options).0.unwrap_err();
        assert_eq!(
            refused(&spec(None, Some(2048)), &[("mem", "2G")]),
            "--vm-mem=2G needs 2157M on the node (109M for QEMU), more than --mem=2G"
        );
        assert_eq!(
            refused(&spec(None, Some(2048)), &[("mem-per-cpu", "1G"), ("cpus-per-task", "2")]),
            "--vm-mem=2G needs 2165M on the node (117M for QEMU), more than --mem-per-cpu=1G for 2 CPUs"
        );
        assert_eq!(
            refused(&spec(Some(4), None), &[("cpus-per-task", "2")]),
            "--vm-cpus=4 does not fit into --cpus-per-task=2: leave one of them out"
        );
        assert!(refused(&spec(None, None), &[("constraint", "[a*1&b*1]")]).contains("node counts"));
    }

    #[test]
    fn a_job_that_cannot_move_says_so_at_submit() {
        let said = |tool, ways: Option<&str>, options: &[(&str, &str)]| {
            let preempt = ways.map(|w| PreemptWay::parse_list(w).unwrap());
            let spec = VmSpec {
                preempt,
                ..spec(None, None)
            };
            verdict(&Settings::default(), &spec, tool, &Job::of(options)).unwrap_or_default()
        };
        let no_requeue = [("requeue", "no-requeue")];
        assert!(said(Tool::Batch, None, &no_requeue).contains("(--no-requeue)"));
        assert!(said(Tool::Batch, None, &[("nodes", "1-2")]).contains("more than one node (of 2)"));
        assert!(said(Tool::Salloc, Some("live,cancel"), &[]).contains("not a batch job"));
        for (tool, ways, options) in [
            (Tool::Batch, None, &[("requeue", "requeue"), ("nodes", "1")][..]),
            (Tool::Batch, Some("requeue"), &no_requeue),
            (Tool::Srun, None, &[("nodes", "2")]),
            (Tool::SrunStep, Some("live"), &[]),
        ] {
            assert_eq!(said(tool, ways, options), "", "{tool:?} {ways:?} {options:?}");
        }
    }

    #[test]
    fn what_cannot_be_known_at_submit_is_left_to_the_node() {
        for options in [
            &[("mem", "0")][..],
            &[("mem-per-cpu", "1M"), ("ntasks", "4")],
            &[("mem-per-gpu", "1M")],
            &[("mem-per-cpu", "1M"), ("exclusive", "")],
        ] {
            assert!(run(Tool::Batch, &spec(None, Some(2048)), options).0.is_ok(), "{options:?}");
        }
        assert!(
            run(Tool::Batch, &spec(Some(8), None), &[("ntasks", "8")])
                .1
                .contains("cpus-per-task")
                .eq(&false)
        );
    }

    #[test]
    fn a_site_may_allow_fewer_ways() {
        let settings = Settings {
            preempt: Some(vec![PreemptWay::Save, PreemptWay::Requeue]),
            ..Settings::default()
        };
        assert_eq!(check_ways(&settings, &[PreemptWay::Requeue]), Ok(()));
        assert_eq!(
            check_ways(&settings, &[PreemptWay::Live]).unwrap_err(),
            "--vm-preempt: this site does not allow 'live', only save,requeue"
        );
    }

    #[test]
    fn variables_are_named_after_the_options() {
        assert_eq!(
            native_variable("vm", VmOption::BootTimeout),
            "SLURM_SPANK__SLURM_SPANK_OPTION_vm_vm_boot_timeout"
        );
        assert_eq!(own_variables("vm", VmOption::Image, Context::Local), ["SLURM_VM"]);
        assert_eq!(
            own_variables("vm", VmOption::BootTimeout, Context::Allocator),
            ["SBATCH_VM_BOOT_TIMEOUT", "SLURM_VM_BOOT_TIMEOUT"]
        );
    }
}
