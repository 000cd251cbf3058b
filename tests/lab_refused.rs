//! Requests that cannot be granted: refused at submit where that can be known, else on the node before the boot. None
//! drains a node, none runs on the host.
mod common;

use std::{fs, sync::OnceLock};

use common::{Alice, no_node_is_drained, start};
use xtask::{Lab, Options};

/// Writes a file on storage that hosts share and guests do not have: it is there only if the script ran on a host.
const ON_HOST: &str = "#!/bin/sh\n{ echo ran > /shared/home/alice/$1/ran-on-host; } 2>/dev/null\necho ran\n";

fn lab() -> &'static Lab {
    static LAB: OnceLock<Lab> = OnceLock::new();
    LAB.get_or_init(|| {
        let tiny = "/var/lib/slurm-vm-images/tiny";
        let table = |name: &str, disk: &str, more: &str| {
            format!(
                "[images.{name}]\nkernel = \"{tiny}/vmlinuz\"\ninitrd = \"{tiny}/initrd\"\ndisk = \"{disk}\"\ndisk_format = \"qcow2\"\ncmdline = \"console=ttyS0\"\n{more}\n"
            )
        };
        let conf = table("missing", "/shared/missing.qcow2", "")
            + &table("damaged", "/shared/damaged.qcow2", "")
            + &table("other", &format!("{tiny}/disk.qcow2"), &format!("sha256 = \"{}\"", "0".repeat(64)))
            + &table("big", &format!("{tiny}/disk.qcow2"), "min_mem_mib = 2000");
        let options = Options { grace_s: 20, agent_conf: conf, ..Options::named("t-refused") };
        let lab = start(&options, &["missing", "damaged", "other", "big", "unlisted"]);
        fs::write(lab.shared().join("damaged.qcow2"), b"no image at all\n".repeat(5000)).expect("a damaged image");
        lab
    })
}

#[test]
fn a_bad_request_is_refused_at_submit_in_one_line_that_says_what_is_allowed() {
    let t = Alice::new(lab(), "submit");
    t.script("job.sh", ON_HOST);
    for (options, words) in [
        ("--vm=absent", vec!["--vm: there is no image 'absent'", "tiny"]),
        ("--vm=../tiny", vec!["is not an image name"]),
        ("--vm=", vec!["is not an image name"]),
        ("--vm=tiny --vm-mem=0", vec!["'0' is zero"]),
        ("--vm=tiny --vm-mem=lots", vec!["'lots' is not a size", "K, M, G or T"]),
        ("--vm=tiny --vm-mem=1.5G", vec!["is not a size"]),
        ("--vm=tiny --vm-mem=-1", vec!["is not a size"]),
        ("--vm=tiny --vm-mem=99999999999999999999", vec!["--vm-mem"]),
        ("--vm=tiny --vm-mem=2G --mem=1G", vec!["--vm-mem=2G needs", "more than --mem=1G"]),
        ("--vm=tiny --vm-cpus=0", vec!["'0' is not a number of vCPUs", "1 to 4096"]),
        ("--vm=tiny --vm-cpus=two", vec!["is not a number of vCPUs"]),
        ("--vm=tiny --vm-cpus=2 -c1", vec!["--vm-cpus=2 does not fit into --cpus-per-task=1"]),
        ("--vm=tiny --vm-boot-timeout=soon", vec!["'soon' is not a time"]),
        (
            "--vm=tiny --vm-preempt=hope",
            vec!["'hope' is not a way to leave a node", "live, save, requeue and cancel"],
        ),
        ("--vm-mem=1G", vec!["--vm-mem needs --vm=IMAGE as well"]),
        ("--vm=tiny -C 'a*2'", vec!["the constraint 'a*2'", "cannot be combined with --vm"]),
        ("--vm=tiny -C '[a*1&b*1]'", vec!["the constraint '[a*1&b*1]'"]),
        ("--vm=tiny -C '([a|b])'", vec!["the constraint '([a|b])'"]),
    ] {
        for command in ["sbatch job.sh submit", "srun sh job.sh submit", "salloc sh job.sh submit"] {
            let (program, rest) = command.split_once(' ').expect("a command and its arguments");
            let said = t.sh(&format!("{program} {options} {rest}"));
            assert_ne!(said.code, Some(0), "{program} {options}");
            let line = said.err.lines().find(|l| l.contains("--vm")).unwrap_or_default();
            assert!(words.iter().all(|w| line.contains(w)), "{program} {options}: {}", said.err);
            assert!(line.starts_with(&format!("{program}: error: ")), "{line}");
            assert!(
                !said.out.contains("ran") && !t.path("ran-on-host").exists(),
                "{program} {options} ran"
            );
        }
    }
    let said = t.sh("sbatch --vm=tiny -C nosuchfeature job.sh submit");
    assert!(
        said.code != Some(0) && said.err.contains("Invalid feature specification"),
        "{said:?}"
    );
    no_node_is_drained(lab());
}

#[test]
fn an_image_that_is_not_usable_is_refused_before_the_boot() {
    let t = Alice::new(lab(), "images");
    t.script("job.sh", ON_HOST);
    let cases = [
        ("unlisted", vec!["unknown image `unlisted`; the known ones are: ", "tiny"]),
        ("missing", vec!["/shared/missing.qcow2"]),
        ("damaged", vec!["/shared/damaged.qcow2"]),
        ("other", vec!["SHA-256"]),
        ("big", vec!["too few for image big, which needs 2000 MiB"]),
    ];
    let jobs: Vec<u32> = cases
        .iter()
        .map(|(image, _)| t.submit(&format!("--vm={image} -o out.{image} job.sh images")))
        .collect();
    for ((image, words), job) in cases.iter().zip(jobs) {
        assert_eq!(t.end_of(job), ("FAILED".to_owned(), "126:0".to_owned()), "{image}");
        let text = t.text(&format!("out.{image}"));
        println!("{text}");
        assert!(
            text.lines().count() == 1 && text.starts_with(&format!("slurm-vm: job {job}: ")),
            "{text}"
        );
        assert!(words.iter().all(|w| text.contains(w)), "{text}");
        t.leaves_nothing(job);
    }
    assert!(!t.path("ran-on-host").exists());
    no_node_is_drained(lab());
}

#[test]
fn a_step_that_asks_for_more_than_its_allocation_is_refused_on_the_node() {
    let t = Alice::new(lab(), "step");
    let said = t.sh("salloc -C vm --mem=300 -c1 srun --vm=tiny --vm-mem=1G hostname");
    println!("{said:?}");
    assert!(
        said.err.contains("--vm-mem=1024M needs ") && said.err.contains("the job has 300 MiB"),
        "{}",
        said.err
    );
    assert_eq!(said.out, "");
    let said = t.sh("salloc -C vm --mem=300 -c1 srun --vm=tiny --vm-cpus=2 hostname");
    assert!(
        said.code != Some(0) && said.out.is_empty() && said.err.contains("--vm-cpus=2"),
        "{said:?}"
    );
    no_node_is_drained(lab());
}

#[test]
fn the_options_are_in_the_help_like_the_others() {
    let t = Alice::new(lab(), "help");
    for program in ["sbatch", "srun", "salloc"] {
        let help = t.sh(&format!("{program} --help")).out;
        let own: Vec<&str> = help.lines().skip_while(|l| !l.starts_with("Options provided by plugins")).collect();
        for option in [
            "--vm=image",
            "--vm-cpus=ncpus",
            "--vm-mem=MB",
            "--vm-boot-timeout=time",
            "--vm-preempt=list",
        ] {
            assert!(
                own.iter().any(|l| l.starts_with(&format!("      {option} "))),
                "{program}: {option}\n{}",
                own.join("\n")
            );
        }
        assert!(own.iter().all(|l| l.len() <= 80), "{}", own.join("\n"));
    }
}
