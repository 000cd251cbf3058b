//! The real `svm` against an agent that is played by the test.
use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixListener,
    process::{Command, Output},
    thread,
};

use slurm_vm_api::query::{Answer, Ask, AskLine, Finding, NodeHealth, VmView};

/// Runs `svm` with an agent that gives these answers; returns what was asked, and what came out.
fn svm(args: &[&str], answers: Vec<Answer>) -> (Ask, Output) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let agent = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        let asked: AskLine = serde_json::from_str(&line).unwrap();
        assert_eq!(asked.v, 1);
        for answer in answers {
            let text = serde_json::to_string(&answer).unwrap() + "\n";
            (&stream).write_all(text.as_bytes()).unwrap();
        }
        asked.ask
    });
    let output = Command::new(env!("CARGO_BIN_EXE_svm"))
        .arg("--socket")
        .arg(&socket)
        .args(args)
        .output()
        .unwrap();
    (agent.join().unwrap(), output)
}

fn out(output: &Output) -> (Option<i32>, String, String) {
    let text = |b: &[u8]| String::from_utf8(b.to_vec()).unwrap();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

fn vm(job: u32, state: &str) -> Answer {
    Answer::Vm(Box::new(VmView {
        job,
        user: "alice".into(),
        node: "n1".into(),
        image: "tiny".into(),
        state: state.into(),
        vcpus: 1,
        mem_mib: 512,
        ..VmView::default()
    }))
}

#[test]
fn the_list_shows_what_is_alive_and_all_of_it_on_request() {
    let answers = || vec![vm(13, "stopped"), vm(12, "running"), Answer::Done];
    let (asked, output) = svm(&["list"], answers());
    assert_eq!(asked, Ask::List);
    let golden = "\
JOBID  USER NODE IMAGE CPUS  MEM DISK TIME STATE
   12 alice n1   tiny     1 512M    0 0:00 running
";
    assert_eq!(out(&output), (Some(0), golden.to_owned(), String::new()));
    assert_eq!(out(&svm(&["list", "--all"], answers()).1).1.lines().count(), 3);
    let document: serde_json::Value = serde_json::from_slice(&svm(&["list", "--json", "--all"], answers()).1.stdout).unwrap();
    assert_eq!(document["vms"][1]["job"], 13);
}

#[test]
fn a_job_without_a_vm_is_named_and_is_exit_code_one() {
    let (asked, output) = svm(&["show", "99"], vec![Answer::Done]);
    assert_eq!(asked, Ask::Show { job: 99 });
    let (code, stdout, stderr) = out(&output);
    assert_eq!((code, stdout.as_str()), (Some(1), ""));
    assert!(
        stderr.starts_with("svm: job 99 has no VM") && stderr.lines().count() == 1,
        "{stderr}"
    );
    let (_, output) = svm(&["show", "12", "--json"], vec![vm(12, "running"), Answer::Done]);
    assert_eq!(
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()["vms"][0]["image"],
        "tiny"
    );
}

#[test]
fn a_refusal_is_one_line_and_progress_is_printed_before() {
    let answers = vec![
        Answer::Text("reserving a node".into()),
        Answer::Refused("job 12 cannot move: not a batch job".into()),
    ];
    let (asked, output) = svm(&["migrate", "12", "n2"], answers);
    assert_eq!(
        asked,
        Ask::Migrate {
            job: 12,
            to: Some("n2".into())
        }
    );
    assert_eq!(
        out(&output),
        (
            Some(1),
            "reserving a node\n".into(),
            "svm: job 12 cannot move: not a batch job\n".into()
        )
    );
    assert_eq!(
        svm(&["migrate", "12", "--cancel"], vec![Answer::Done]).0,
        Ask::CancelMigration { job: 12 }
    );
    assert_eq!(svm(&["log", "-f", "12"], vec![Answer::Done]).0, Ask::Log { job: 12, follow: true });
}

#[test]
fn sick_nodes_and_errors_of_the_configuration_are_exit_code_one() {
    let node = |healthy| {
        Answer::Node(NodeHealth {
            node: "n1".into(),
            healthy,
            ..NodeHealth::default()
        })
    };
    assert_eq!(svm(&["health"], vec![node(true), Answer::Done]).1.status.code(), Some(0));
    assert_eq!(
        svm(&["health"], vec![node(true), node(false), Answer::Done]).1.status.code(),
        Some(1)
    );
    let finding = |level: &str| {
        Answer::Finding(Finding {
            level: level.into(),
            setting: "GraceTime".into(),
            text: "is 0".into(),
        })
    };
    assert_eq!(svm(&["check"], vec![finding("advice"), Answer::Done]).1.status.code(), Some(0));
    assert_eq!(svm(&["check"], vec![finding("error"), Answer::Done]).1.status.code(), Some(1));
}

#[test]
fn an_agent_that_is_not_there_or_hangs_up_is_exit_code_three_and_wrong_usage_two() {
    let output = Command::new(env!("CARGO_BIN_EXE_svm"))
        .args(["--socket", "/no/such.sock", "list"])
        .output()
        .unwrap();
    let (code, _, stderr) = out(&output);
    assert_eq!((code, stderr.lines().count()), (Some(3), 1), "{stderr}");
    assert!(
        stderr.contains("/no/such.sock") && stderr.contains("run svm on a compute node"),
        "{stderr}"
    );
    let (_, output) = svm(&["list"], vec![vm(12, "running")]);
    assert_eq!(output.status.code(), Some(3), "half an answer is not printed as if it were all");
    assert_eq!(output.stdout, b"");
    let output = Command::new(env!("CARGO_BIN_EXE_svm")).args(["migrate"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn images_are_listed_without_an_agent() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("slurm-vm.toml");
    std::fs::write(&config, "[images.tiny]\nkernel = \"/k\"\ndisk = \"/d\"\n").unwrap();
    let run = |extra: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_svm"))
            .args(["images", extra, "--config"])
            .arg(&config)
            .output()
            .unwrap();
        out(&output)
    };
    assert_eq!(run("--names"), (Some(0), "tiny\n".into(), String::new()));
    let document: serde_json::Value = serde_json::from_str(&run("--json").1).unwrap();
    assert_eq!(document["images"][0]["settings"]["disk"], "/d");
}
