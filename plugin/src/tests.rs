//! The hooks as Slurm calls them, with Slurm's side in `fake`.
use crate::{
    fake::{self, ALLOCATOR, JOB_GID, JOB_ID, JOB_SCRIPT, JOB_UID, LOCAL, REMOTE, SLURMD, STEP_ID, TASK, slurm, turn, words},
    guard::PANIC_IN,
    hook, options,
    slurm::Handle,
};
use slurm_vm_api::{
    hooks::{self, HookMessage, HookReply, HookRequest},
    shim::{OpenMode, Request, SHIM_ARGS_ENV, ShimArgs, StepKind},
    spec::VmSpec,
};
use std::{
    ffi::{CString, c_char, c_int},
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixListener,
    path::PathBuf,
    ptr,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

type Hook = extern "C" fn(Handle, c_int, *mut *mut c_char) -> c_int;

const HOOKS: [(&str, Hook); 6] = [
    ("init", crate::slurm_spank_init),
    ("init_post_opt", crate::slurm_spank_init_post_opt),
    ("job_prolog", crate::slurm_spank_job_prolog),
    ("job_epilog", crate::slurm_spank_job_epilog),
    ("task_post_fork", crate::slurm_spank_task_post_fork),
    ("task_init", crate::slurm_spank_task_init),
];

fn call(hook: Hook, line: &str) -> c_int {
    let (count, words) = words(line);
    hook(ptr::null_mut(), count, words)
}

fn give(option: c_int, text: &str) -> c_int {
    let text = CString::new(text).unwrap();
    options::option_given(option, text.as_ptr(), 0)
}

fn errors() -> String {
    slurm(|s| s.errors.join("\n"))
}

/// A directory of a test's own, and in it the agent's socket.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Place {
        let place = std::env::temp_dir().join(format!("spank-vm-{}-{name}", std::process::id()));
        fs::create_dir_all(place.join("jobs")).unwrap();
        Place(place)
    }
    fn line(&self) -> String {
        format!("socket={} images=/none", self.0.join("a").display())
    }
    fn mark(&self, job: u32) {
        fs::write(self.0.join("jobs").join(job.to_string()), "").unwrap();
    }
    /// An agent that gives one answer and passes on what it heard.
    fn agent(&self, reply: &HookReply) -> mpsc::Receiver<HookMessage> {
        let listener = UnixListener::bind(self.0.join("a")).unwrap();
        let (tell, heard) = mpsc::channel();
        let reply = hooks::to_line(reply);
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut line = String::new();
            BufReader::new(&stream).read_line(&mut line).unwrap();
            stream.write_all(reply.as_bytes()).unwrap();
            tell.send(hooks::message_from_line(&line).unwrap()).unwrap();
        });
        heard
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn job(options: &[(&str, &str)]) {
    slurm(|s| {
        s.items.extend([(JOB_ID, 12), (JOB_UID, 2001), (JOB_GID, 2002)]);
        s.options.extend(options.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())));
    });
}

fn heard(agent: &mpsc::Receiver<HookMessage>) -> HookRequest {
    agent.recv_timeout(Duration::from_secs(10)).expect("the agent hears of it").hook
}

#[test]
fn no_panic_reaches_slurm_and_a_job_without_a_vm_goes_on() {
    for (context, (name, hook)) in [LOCAL, REMOTE, ALLOCATOR, SLURMD, JOB_SCRIPT]
        .into_iter()
        .flat_map(|c| HOOKS.map(|h| (c, h)))
    {
        let _turn = turn(context);
        PANIC_IN.set(Some(name));
        assert_eq!(call(hook, ""), 0, "{name} in context {context}");
        assert_eq!(errors(), format!("vm: {name}: internal error: on purpose"));
    }
    let _turn = turn(ALLOCATOR);
    PANIC_IN.set(Some("option"));
    assert_eq!(give(0, "a"), 0);
    assert_eq!(errors(), "vm: option: internal error: on purpose");
}

#[test]
fn a_panic_stops_a_vm_job_where_it_would_else_run_on_the_host_and_nowhere_else() {
    for (context, stops) in [
        (ALLOCATOR, &["init", "init_post_opt", "task_init"][..]),
        (REMOTE, &["task_init"]),
        (JOB_SCRIPT, &["task_init"]),
    ] {
        for (name, hook) in HOOKS {
            let _turn = turn(context);
            give(0, "a");
            PANIC_IN.set(Some(name));
            assert_eq!(call(hook, "") < 0, stops.contains(&name), "{name} in context {context}");
        }
    }
}

#[test]
fn the_options_are_registered_everywhere_but_in_slurmd() {
    for context in [LOCAL, REMOTE, ALLOCATOR] {
        let _turn = turn(context);
        assert_eq!(call(crate::slurm_spank_init, "prefix=x sockets=/s"), 0);
        assert_eq!(
            slurm(|s| s.registered.clone()),
            [
                "x",
                "x-cpus",
                "x-mem",
                "x-boot-timeout",
                "x-preempt",
                "x-mount",
                "x-workdir",
                "x-net",
                "x-disk"
            ]
        );
        assert_eq!(errors(), "");
    }
    let _turn = turn(SLURMD);
    assert_eq!(call(crate::slurm_spank_init, "sockets=/s"), 0);
    assert!(errors().contains("there is no key 'sockets'"));
}

#[test]
fn the_last_value_of_an_option_counts_and_nonsense_from_slurm_is_survived() {
    let _turn = turn(REMOTE);
    give(0, "a");
    give(0, "b");
    assert_eq!(give(99, "c"), 0);
    assert_eq!(give(-1, "c"), 0);
    assert_eq!(options::option_given(1, ptr::null(), 0), 0);
    assert_eq!(options::given().texts[..2], [Some("b".to_owned()), None]);
}

#[test]
fn the_client_refuses_what_it_can_know() {
    for (option, text, message) in [
        (0, "../a", "--vm: '../a' is not an image name"),
        (1, "2", "--vm-cpus needs --vm=IMAGE as well"),
        (4, "live", "--vm-preempt needs --vm=IMAGE as well"),
    ] {
        let _turn = turn(ALLOCATOR);
        give(option, text);
        assert!(call(crate::slurm_spank_init_post_opt, "images=/none") < 0);
        assert!(errors().starts_with(message), "{}", errors());
    }
}

#[test]
fn a_companion_in_the_environment_alone_is_no_vm_job() {
    let _turn = turn(ALLOCATOR);
    give(2, "nonsense");
    options::given().from_env[2] = Some("nonsense".to_owned());
    assert_eq!(call(crate::slurm_spank_init_post_opt, ""), 0);
    assert_eq!(errors(), "");
}

#[test]
fn the_prolog_tells_the_agent_and_never_fails() {
    let _turn = turn(JOB_SCRIPT);
    let place = Place::new("prolog");
    job(&[("vm", "a"), ("vm-mem", "1G")]);
    let agent = place.agent(&HookReply::done(Some(3)));
    assert_eq!(call(crate::slurm_spank_job_prolog, &place.line()), 0);
    let spec = VmSpec {
        mem_mib: Some(1024),
        ..VmSpec::for_image("a").unwrap()
    };
    assert_eq!(
        heard(&agent),
        HookRequest::Ensure {
            job: 12,
            uid: 2001,
            gid: 2002,
            spec,
            restart: 0
        }
    );
    assert_eq!(errors(), "");

    fs::remove_file(place.0.join("a")).unwrap();
    let start = Instant::now();
    assert_eq!(call(crate::slurm_spank_job_prolog, &place.line()), 0);
    assert!(start.elapsed() < hooks::PROLOG_DEADLINE + Duration::from_secs(1));
    assert!(errors().starts_with("job 12: the agent cannot be reached"), "{}", errors());
}

#[test]
fn a_job_without_a_vm_says_nothing_to_the_agent() {
    let _turn = turn(JOB_SCRIPT);
    let place = Place::new("plain");
    job(&[]);
    let agent = place.agent(&HookReply::done(None));
    assert_eq!(call(crate::slurm_spank_job_prolog, &place.line()), 0);
    assert_eq!(call(crate::slurm_spank_job_epilog, &place.line()), 0);
    assert!(agent.try_recv().is_err());
    assert_eq!(errors(), "");
}

#[test]
fn a_request_that_no_client_checked_never_reaches_the_agent() {
    let _turn = turn(JOB_SCRIPT);
    job(&[("vm", "../../etc")]);
    assert_eq!(call(crate::slurm_spank_job_prolog, "socket=/none"), 0);
    assert!(
        errors().starts_with("job 12: the request for a VM is refused: --vm: '../../etc' is not"),
        "{}",
        errors()
    );
}

#[test]
fn the_epilog_fails_only_for_a_domain_that_cannot_be_destroyed() {
    for (reply, fails) in [
        (HookReply::done(None), false),
        (HookReply::refused("no such job"), false),
        (HookReply::stuck("slurm-12-0", "device or resource busy"), true),
    ] {
        let _turn = turn(JOB_SCRIPT);
        let place = Place::new("epilog");
        job(&[("vm", "a")]);
        let agent = place.agent(&reply);
        assert_eq!(
            call(crate::slurm_spank_job_epilog, &format!("{} epilog_wait=5", place.line())) < 0,
            fails,
            "{reply:?}"
        );
        assert_eq!(
            heard(&agent),
            HookRequest::Release {
                job: 12,
                uid: 2001,
                wait_s: 5
            }
        );
        assert_eq!(errors().contains("slurm-12-0"), fails);
    }
}

#[test]
fn the_epilog_releases_a_job_whose_step_alone_had_a_vm() {
    let _turn = turn(JOB_SCRIPT);
    let place = Place::new("step");
    job(&[]);
    place.mark(12);
    let agent = place.agent(&HookReply::done(None));
    assert_eq!(call(crate::slurm_spank_job_epilog, &place.line()), 0);
    assert!(matches!(heard(&agent), HookRequest::Release { job: 12, .. }));
}

#[test]
fn an_agent_that_says_nothing_is_left_after_the_deadline() {
    let place = Place::new("mute");
    let listener = UnixListener::bind(place.0.join("a")).unwrap();
    let start = Instant::now();
    let request = HookRequest::Release {
        job: 12,
        uid: 1,
        wait_s: 1,
    };
    let outcome = hook::ask(&place.0.join("a"), request, Duration::from_secs(1), Duration::from_millis(200));
    assert!(matches!(outcome, Err(hook::NoAnswer::Broken(_))), "{outcome:?}");
    assert!(start.elapsed() < Duration::from_secs(2));
    drop(listener);
}

#[test]
fn a_full_backlog_does_not_hold_the_hook() {
    let place = Place::new("full");
    let listener = UnixListener::bind(place.0.join("a")).unwrap();
    let request = || HookRequest::Release {
        job: 12,
        uid: 1,
        wait_s: 1,
    };
    // Never accepted: sooner or later the backlog is full and connect would wait. None of these takes longer than its deadline.
    for _ in 0..3 {
        let start = Instant::now();
        assert!(hook::ask(&place.0.join("a"), request(), Duration::from_millis(50), Duration::from_millis(50)).is_err());
        assert!(start.elapsed() < Duration::from_secs(2));
    }
    drop(listener);
}

fn step(id: u32) {
    job(&[]);
    slurm(|s| s.items.extend([(STEP_ID, id), (TASK, 0)]));
    fake::set_argv("/spool/script one two");
}

fn shim_args() -> (ShimArgs, Vec<String>) {
    let env = slurm(|s| s.env.get(SHIM_ARGS_ENV).cloned());
    ShimArgs::from_process(fake::argv()[1..].to_vec(), env.as_deref()).unwrap()
}

#[test]
fn a_batch_script_becomes_the_shim() {
    let _turn = turn(REMOTE);
    step(0xffff_fffb);
    slurm(|s| {
        s.env.insert("SLURM_SPANK_VM_OPEN_MODE".into(), "truncate".into());
        s.env.insert("SLURM_RESTART_COUNT".into(), "2".into());
    });
    give(0, "a");
    assert_eq!(call(crate::slurm_spank_task_init, "run=/r/run"), 0);
    assert_eq!(fake::argv()[0], "/r/run");
    let (args, program) = shim_args();
    assert_eq!(program, ["/spool/script", "one", "two"]);
    assert_eq!(
        (args.job, args.step, args.kind, args.open_mode, args.restart),
        (12, 0xffff_fffb, StepKind::Batch, OpenMode::Truncate, 2)
    );
    assert_eq!(args.request, Request::Spec(VmSpec::for_image("a").unwrap()));
}

#[test]
fn a_request_that_no_client_checked_is_refused_by_the_shim() {
    let _turn = turn(REMOTE);
    step(0);
    give(0, "../a");
    assert_eq!(call(crate::slurm_spank_task_init, ""), 0);
    let (args, _) = shim_args();
    assert!(
        matches!(&args.request, Request::Refused(why) if why.starts_with("--vm: '../a' is not")),
        "{args:?}"
    );
}

#[test]
fn options_that_export_kept_out_of_the_environment_are_found() {
    let _turn = turn(REMOTE);
    step(0xffff_fffb);
    slurm(|s| s.env.insert("SLURM_SPANK__SLURM_SPANK_OPTION_vm_vm".into(), "a".into()));
    assert_eq!(call(crate::slurm_spank_init_post_opt, ""), 0);
    assert_eq!(call(crate::slurm_spank_task_init, ""), 0);
    assert_eq!(shim_args().0.request, Request::Spec(VmSpec::for_image("a").unwrap()));
}

#[test]
fn a_value_that_is_too_long_is_refused_and_not_forgotten() {
    let _turn = turn(REMOTE);
    step(0xffff_fffb);
    slurm(|s| s.env.insert("SLURM_SPANK__SLURM_SPANK_OPTION_vm_vm".into(), "a".repeat(5000)));
    assert_eq!(call(crate::slurm_spank_init_post_opt, ""), 0);
    assert_eq!(call(crate::slurm_spank_task_init, ""), 0);
    assert!(matches!(shim_args().0.request, Request::Refused(_)));
}

#[test]
fn the_shell_of_salloc_and_plain_tasks_stay_on_the_host() {
    for (id, vm) in [(0xffff_fffa, true), (0xffff_fffb, false), (0, false)] {
        let _turn = turn(REMOTE);
        step(id);
        if vm {
            give(0, "a");
        }
        assert_eq!(call(crate::slurm_spank_task_init, "socket=/none/a"), 0);
        assert_eq!(fake::argv(), ["/spool/script", "one", "two"]);
        assert!(slurm(|s| s.env.is_empty()));
    }
}

#[test]
fn a_script_whose_options_were_lost_does_not_start_on_the_host() {
    let _turn = turn(REMOTE);
    let place = Place::new("lost");
    place.mark(12);
    step(0xffff_fffb);
    assert!(call(crate::slurm_spank_task_init, &place.line()) < 0);
    assert!(errors().contains("its options did not reach this step"));
}

#[test]
fn a_task_that_cannot_be_handed_over_does_not_start() {
    let _turn = turn(REMOTE);
    step(0xffff_fffb);
    slurm(|s| s.argv.clear());
    give(0, "a");
    assert!(call(crate::slurm_spank_task_init, "") < 0);
    assert!(errors().starts_with("vm: the program was not started: S_JOB_ARGV"), "{}", errors());
}
