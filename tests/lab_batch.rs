//! Batch jobs in the lab: what a script gets, what comes out, how it ends.
mod common;

use std::{
    fs,
    sync::OnceLock,
    time::{Duration, Instant},
};

use common::{Alice, start, wait};
use sha2::{Digest, Sha256};
use slurm_vm_api::overhead::guest_mib_for;
use xtask::{Lab, Options};

fn lab() -> &'static Lab {
    static LAB: OnceLock<Lab> = OnceLock::new();
    LAB.get_or_init(|| {
        start(
            &Options {
                grace_s: 20,
                ..Options::named("t-batch")
            },
            &[],
        )
    })
}

#[test]
fn a_script_gets_its_arguments_and_environment_inside_the_guest() {
    let t = Alice::new(lab(), "args");
    t.script(
        "job.sh",
        "#!/bin/sh\necho \"$#:$1:$2\"\necho \"FOO=$FOO job=$SLURM_JOB_ID\"\nhostname\nuname -r\ncut -d. -f1 /proc/uptime\nid -u\nid -g\n",
    );
    let said = t.sh("FOO='x  y' sbatch --wait --parsable --vm=tiny -o out job.sh a 'b c'");
    assert_eq!((said.code, said.err.as_str()), (Some(0), ""));
    let job = said.out.trim();
    let out = t.text("out");
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[..2], ["2:a:b c", &format!("FOO=x  y job={job}")], "{out}");
    assert_eq!(lines[2], format!("slurm-{job}-0"));
    let host = fs::read_to_string("/proc/sys/kernel/osrelease").expect("the host's kernel");
    assert_ne!(lines[3], host.trim(), "that is the host's kernel");
    assert!(
        lines[4].parse::<u32>().expect("an uptime") < 120,
        "that is the host's uptime: {}",
        lines[4]
    );
    assert_eq!(lines[5..], ["2001", "2001"]);
}

#[test]
fn exit_codes_and_signals_are_what_slurm_shows_without_a_vm() {
    let t = Alice::new(lab(), "ends");
    t.script(
        "end.sh",
        "#!/bin/sh\necho ready\ncase $1 in [A-Z]*) kill -$1 $$ ;; *) exit $1 ;; esac\n",
    );
    let ways = ["0", "7", "KILL", "TERM"];
    let jobs: Vec<(u32, u32)> = ways
        .iter()
        .map(|w| {
            (
                t.submit(&format!("--vm=tiny -o vm.{w} end.sh {w}")),
                t.submit(&format!("-o plain.{w} end.sh {w}")),
            )
        })
        .collect();
    for (way, (vm, plain)) in ways.iter().zip(jobs) {
        assert_eq!(t.end_of(vm), t.end_of(plain), "{way}");
        assert_eq!(t.text(&format!("vm.{way}")), t.text(&format!("plain.{way}")), "{way}");
    }
    let seven = t.submit("--vm=tiny -o vm.7 end.sh 7");
    assert_eq!(t.end_of(seven), ("FAILED".to_owned(), "7:0".to_owned()));
    assert_eq!(t.sh("sbatch --wait --vm=tiny -o vm.9 end.sh 9").code, Some(9));
}

#[test]
fn sixty_four_mebibytes_arrive_unchanged_and_stderr_apart() {
    let t = Alice::new(lab(), "bulk");
    t.script(
        "bulk.sh",
        "#!/bin/sh\nhead -c 67108864 /dev/urandom > /scratch/r\nsha256sum < /scratch/r >&2\necho to stderr >&2\ncat /scratch/r\n",
    );
    let job = t.submit("--vm=tiny -o out -e err bulk.sh");
    assert_eq!(t.end_of(job), ("COMPLETED".to_owned(), "0:0".to_owned()));
    let out = t.bytes("out");
    assert_eq!(out.len(), 64 << 20);
    let sum = Sha256::digest(&out).iter().fold(String::new(), |s, b| s + &format!("{b:02x}"));
    assert_eq!(t.text("err"), format!("{sum}  -\nto stderr\n"));
}

#[test]
fn what_is_printed_is_in_the_file_as_without_a_vm() {
    let t = Alice::new(lab(), "bytes");
    let scripts = [
        (
            "order",
            "i=0; while [ $i -lt 300 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done",
        ),
        ("empty", ":"),
        ("unended", "printf 'one\\ntwo'"),
        ("bytes", "printf '\\000\\001\\377\\r\\n\\n'; printf '*** JOB'"),
    ];
    let jobs: Vec<(u32, u32)> = scripts
        .iter()
        .map(|(name, text)| {
            t.script(&format!("{name}.sh"), &format!("#!/bin/sh\n{text}\n"));
            // What an earlier run left is gone, as it is in Slurm.
            fs::write(t.path(&format!("{name}.vm")), "old\n").expect("an old output");
            (
                t.submit(&format!("--vm=tiny -o {name}.plain {name}.sh").replace("--vm=tiny ", "")),
                {
                    std::os::unix::fs::chown(t.path(&format!("{name}.vm")), Some(2001), Some(2001)).expect("alice's file");
                    t.submit(&format!("--vm=tiny -o {name}.vm {name}.sh"))
                },
            )
        })
        .collect();
    for ((name, _), (plain, vm)) in scripts.iter().zip(jobs) {
        assert_eq!(t.end_of(plain), t.end_of(vm), "{name}");
        assert_eq!(t.bytes(&format!("{name}.vm")), t.bytes(&format!("{name}.plain")), "{name}");
    }
}

#[test]
fn a_script_that_sbatch_refuses_is_refused_in_the_same_words() {
    let t = Alice::new(lab(), "refused");
    t.script("crlf.sh", "#!/bin/sh\r\necho hi\r\n");
    t.script("bare.sh", "echo hi\n");
    for script in ["crlf.sh", "bare.sh", "absent.sh"] {
        let (plain, vm) = (t.sh(&format!("sbatch {script}")), t.sh(&format!("sbatch --vm=tiny {script}")));
        assert_eq!((plain.code, &plain.err), (vm.code, &vm.err), "{script}");
        assert_ne!(plain.code, Some(0), "{script}");
    }
    t.script("space.sh", "#! /bin/sh -e\necho \"one $0\" | cut -c1-3\nfalse\necho not here\n");
    let (plain, vm) = (t.submit("-o plain space.sh"), t.submit("--vm=tiny -o vm space.sh"));
    assert_eq!(t.end_of(plain), t.end_of(vm));
    assert_eq!(t.text("plain"), t.text("vm"));
}

#[test]
fn a_line_is_in_the_file_within_two_seconds() {
    let t = Alice::new(lab(), "latency");
    // The guest's clock and ours are the same host's; the guest has whole seconds.
    t.script("line.sh", "#!/bin/sh\nfor i in 1 2 3 4 5; do date +%s; sleep 1; done\n");
    let job = t.submit("--vm=tiny -o out line.sh");
    let mut seen = 0;
    let mut worst = Duration::ZERO;
    wait("five lines", || {
        let text = fs::read_to_string(t.path("out")).unwrap_or_default();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock");
        for line in text.split_inclusive('\n').filter(|l| l.ends_with('\n')).skip(seen) {
            seen += 1;
            let printed = Duration::from_secs(line.trim().parse().expect("a time"));
            // The second may have begun up to 1 s before the line was printed.
            worst = worst.max(now.saturating_sub(printed));
        }
        (seen == 5).then_some(())
    });
    println!("a line took at most {} ms, of which up to 1000 are the clock's", worst.as_millis());
    assert!(worst < Duration::from_secs(3), "{worst:?}");
    t.end_of(job);
}

#[test]
fn each_job_of_an_array_has_its_own_vm() {
    let t = Alice::new(lab(), "array");
    t.script(
        "one.sh",
        "#!/bin/sh\necho $SLURM_ARRAY_TASK_ID $(hostname) $(cat /proc/sys/kernel/random/boot_id)\n",
    );
    let said = t.sh("sbatch --wait --array=1-4 --vm=tiny -o out.%a one.sh");
    assert_eq!(said.code, Some(0));
    let mut boots = std::collections::BTreeSet::new();
    for k in 1..=4 {
        let text = t.text(&format!("out.{k}"));
        let words: Vec<&str> = text.split_whitespace().collect();
        assert_eq!(words.len(), 3, "{text}");
        assert_eq!(words[0], k.to_string());
        boots.insert(words[2].to_owned());
    }
    assert_eq!(boots.len(), 4, "{boots:?}");
}

#[test]
fn two_jobs_on_one_node_have_their_own_cpus_and_memory() {
    let t = Alice::new(lab(), "sizes");
    t.script(
        "size.sh",
        "#!/bin/sh\nnproc\nawk '/MemTotal/ {print int($2/1024)}' /proc/meminfo\necho ready\nwhile [ ! -e /tmp/end ]; do sleep 0.2; done\n",
    );
    let sizes = [400u64, 700];
    let jobs: Vec<u32> = sizes
        .iter()
        .map(|mem| t.submit(&format!("--vm=tiny -w n2 -c1 --mem={mem} -o out.{mem} size.sh")))
        .collect();
    let mut pins = Vec::new();
    for (job, mem) in jobs.iter().zip(sizes) {
        let file = format!("out.{mem}");
        t.wait_text(&file, "ready");
        let text = t.text(&file);
        let numbers: Vec<u64> = text.lines().filter_map(|l| l.parse().ok()).collect();
        let given = guest_mib_for(mem, 1).expect("room for a guest");
        assert_eq!(numbers[0], 1, "{text}");
        // The kernel keeps some for itself and never shows more than there is.
        assert!(numbers[1] <= given && numbers[1] + 60 > given, "{} of {given} MiB", numbers[1]);
        let domain = format!("slurm-{job}-0");
        let info: common::Said = lab().node("n2", &["virsh", "dominfo", &domain]).into();
        assert!(info.out.contains(&format!("{} KiB", given << 10)), "{}", info.out);
        let pin: common::Said = lab().node("n2", &["virsh", "vcpupin", &domain]).into();
        pins.push(
            pin.out
                .lines()
                .find(|l| l.trim().starts_with("0 "))
                .unwrap_or_default()
                .trim()
                .to_owned(),
        );
    }
    assert_ne!(pins[0], pins[1], "both on the same core");
    let list = t.sh("svm list");
    println!("{}", list.out);
    assert_eq!(t.sh(&format!("scancel {} {}", jobs[0], jobs[1])).code, Some(0));
    for job in jobs {
        t.end_of(job);
    }
}

#[test]
fn a_job_of_two_cpus_has_two_and_the_vm_is_up_in_seconds() {
    let t = Alice::new(lab(), "two");
    t.script("two.sh", "#!/bin/sh\nnproc\n");
    let begun = Instant::now();
    assert_eq!(t.sh("sbatch --wait -c2 --vm=tiny --vm-mem=200 -o out two.sh").code, Some(0));
    println!("a job with a VM took {:.1} s from submit to end", begun.elapsed().as_secs_f32());
    assert_eq!(t.text("out"), "2\n");
    let job = t.submit("-N1 --vm=tiny --vm-cpus=2 -o out2 two.sh");
    t.end_of(job);
    assert_eq!(t.text("out2"), "2\n");
}

#[test]
fn svm_shows_a_job_to_its_owner_and_to_nobody_else() {
    let t = Alice::new(lab(), "svm");
    t.script("job.sh", "#!/bin/sh\necho ready\nwhile :; do sleep 0.2; done\n");
    let job = t.submit("--vm=tiny --vm-mem=200 -o out job.sh");
    t.wait_text("out", "ready");
    let mut list = String::new();
    // The controller hears of a VM when it next asks the node.
    common::wait_with("the VM in svm list", &mut list, |list| {
        *list = t.sh("svm list").out;
        list.lines().any(|l| {
            let words: Vec<&str> = l.split_whitespace().collect();
            words.first() == Some(&job.to_string().as_str())
                && words.contains(&"alice")
                && words.contains(&"tiny")
                && l.to_lowercase().contains("running")
        })
    });
    let show = t.sh(&format!("svm show {job}"));
    assert!(
        show.code == Some(0) && show.out.contains("qemu"),
        "says that it is emulated: {}",
        show.out
    );
    let json = t.sh(&format!("svm show {job} --json")).out;
    let json: serde_json::Value = serde_json::from_str(&json).expect("one JSON document");
    assert_eq!(json["vms"][0]["job"], job, "{json}");
    assert_eq!(json["vms"][0]["mem_mib"], 200, "{json}");
    let log = t.sh(&format!("svm log {job}")).out;
    assert!(log.contains("guest| slurm-vm: guest is up"), "{log}");
    let totals = t.sh("svm list --totals").out;
    println!("{totals}");

    let bob: common::Said = lab().exec("bob", &["svm", "list"]).into();
    assert!(!bob.out.contains("alice"), "{}", bob.out);
    for ask in ["show", "log"] {
        let bob: common::Said = lab().exec("bob", &["svm", ask, &job.to_string()]).into();
        assert!(
            bob.code == Some(1) && bob.out.is_empty() && bob.err.contains("has no VM"),
            "{bob:?}"
        );
    }
    let absent: common::Said = lab().exec("bob", &["svm", "show", "99999"]).into();
    let there: common::Said = lab().exec("bob", &["svm", "show", &job.to_string()]).into();
    assert_eq!(
        absent.err.replace("99999", "N"),
        there.err.replace(&job.to_string(), "N"),
        "whether a job exists is told"
    );
    t.sh(&format!("scancel {job}"));
    t.end_of(job);
    let root: common::Said = lab().exec("root", &["svm", "list", "--all"]).into();
    assert!(root.out.contains(&job.to_string()), "{}", root.out);
}
