//! Directories of the host in a guest: the same files as without a VM, and they go along when it moves.
mod common;

use common::{
    moves::{Mover, lab},
    wait_with,
};
use std::{fs, time::Instant};
use xtask::Options;

fn options(nodes: u8) -> Options {
    Options {
        nodes,
        companions: true,
        grace_s: 30,
        ..Options::default()
    }
}

/// What a program does with files. `$1` is where: everything that it prints is the same on the host and in a guest.
const FILES: &str = "#!/bin/bash
set -e
mkdir $1
cd $1
pwd
echo $HOME
id -u
id -g
umask 027
echo one > a
mkdir -p d/e
mv a d/e/b
ln -s e/b d/link
cat d/link
echo two >> d/e/b
cp d/e/b d/copy
chmod 600 d/copy
stat -c '%n %u %g %a %s %F' d d/e d/e/b d/copy
wc -c < d/link
rm d/link
find . | sort
cat /home/bob/secret 2>&1 | grep -c -i denied
touch /home/bob/mine 2>&1 | grep -c -i denied
exit 3
";

/// Counts to 150 into its output, into a file that stays open and into one that is opened anew for each number.
const WRITER: &str = "#!/bin/bash
exec 3>>held
cat /proc/sys/kernel/random/boot_id > boot
i=0
while [ $i -lt 150 ]; do
    i=$((i+1))
    echo $i
    echo $i >&3
    echo $i >> $HOME/$1.opened
    sleep 0.1
done
cat /proc/sys/kernel/random/boot_id >> boot
";

fn numbers(upto: usize) -> String {
    (1..=upto).map(|i| format!("{i}\n")).collect()
}

/// The files of [`WRITER`] are whole, and nothing of ours lies beside them.
fn check_written(m: &Mover<'_>, name: &str) {
    let home = m.lab.shared().join("home/alice");
    assert_eq!(m.t.text("out"), numbers(150), "the output");
    assert_eq!(m.t.text("held"), numbers(150), "the file that was held open");
    assert_eq!(fs::read_to_string(home.join(format!("{name}.opened"))).unwrap(), numbers(150));
    let boots = m.t.text("boot");
    let boots: Vec<&str> = boots.lines().collect();
    assert!(
        boots.len() == 2 && boots[0] == boots[1],
        "one boot from its beginning to its end: {boots:?}"
    );
    for dir in [home.clone(), m.t.path("")] {
        let marks: Vec<_> = fs::read_dir(&dir)
            .unwrap()
            .filter_map(|e| e.ok()?.file_name().into_string().ok().filter(|n| n.starts_with(".slurm-vm")))
            .collect();
        assert!(marks.is_empty(), "{}: {marks:?}", dir.display());
    }
}

#[test]
fn a_program_finds_and_leaves_the_same_files_as_without_a_vm() {
    let lab = lab("files", options(1));
    let m = Mover::new(&lab, "files", 1);
    m.t.script("files.sh", FILES);
    lab.node(
        "n1",
        &[
            "sh",
            "-c",
            "echo no > /home/bob/secret && chown bob /home/bob/secret && chmod 600 /home/bob/secret",
        ],
    );
    let plain = m.t.submit("-o plain files.sh /home/alice/a");
    assert_eq!(m.t.end_of(plain), ("FAILED".into(), "3:0".into()), "{}", m.t.text("plain"));
    let vm = m.t.submit("--vm=tiny --vm-mount=/home -o vm files.sh /home/alice/a2");
    assert_eq!(m.t.end_of(vm), ("FAILED".into(), "3:0".into()), "{}", m.t.text("vm"));
    assert_eq!(m.t.text("vm").replace("/a2", "/a"), m.t.text("plain"));
    let tree = |dir: &str| {
        m.t.sh(&format!("cd /home/alice/{dir} && find . -printf '%p %u %g %m %s\\n' | sort"))
            .out
    };
    assert_eq!(tree("a2"), tree("a"), "as the host sees them");
    let readonly =
        m.t.submit("--vm=tiny --vm-mount=/home/bob:/in:ro -o ro --wrap 'ls /in && touch /in/x'");
    m.t.end_of(readonly);
    assert!(m.t.text("ro").contains("Read-only file system"), "{}", m.t.text("ro"));
    for (options, refusal) in [
        ("--vm-mount=/nowhere", "/nowhere: No such file or directory"),
        (
            "--vm-mount=none,/home/bob",
            "the working directory /shared/home/alice/files is not among the directories",
        ),
        ("--vm-workdir=/nowhere", "No such file or directory"),
        ("-D /tmp", "the working directory /tmp cannot be given to the guest"),
    ] {
        let refused = m.t.submit(&format!(
            "--vm=tiny {options} --open-mode=truncate -o /shared/home/alice/files/refused --wrap 'echo ran'"
        ));
        let (state, _) = m.t.end_of(refused);
        let said = m.t.text("refused");
        assert_eq!(state, "FAILED", "{said}");
        assert!(
            said.contains(refusal) && !said.contains("ran") && said.lines().count() == 1,
            "{said}"
        );
    }
    let step = m.t.sh("srun --vm=tiny pwd");
    assert_eq!((step.out.as_str(), step.code), ("/shared/home/alice/files\n", Some(0)), "{step:?}");
    let elsewhere = m.t.sh("cd /tmp && srun --vm=tiny --vm-workdir=/tmp pwd");
    assert_eq!((elsewhere.out.as_str(), elsewhere.code), ("/tmp\n", Some(0)), "{elsewhere:?}");
    m.nothing_left();
    lab.down().expect("down");
}

/// Every node has a directory of that name: the path says nothing.
#[test]
fn with_a_directory_of_the_nodes_own_it_is_not_moved_and_says_so() {
    let lab = lab("filelocal", options(2));
    let m = Mover::new(&lab, "filelocal", 2);
    for node in ["n1", "n2"] {
        lab.node(node, &["sh", "-c", "mkdir /var/local/fast && chown alice /var/local/fast"]);
    }
    m.t.script("writer.sh", WRITER);
    let job =
        m.t.submit("--vm=tiny --vm-mount=/var/local/fast -p low -w n1 -o out writer.sh local");
    m.wait_lines("out", 10);
    let said = m.t.sh(&format!("svm migrate {job} n2"));
    assert_ne!(said.code, Some(0), "{said:?}");
    assert!(said.err.contains("/var/local/fast on n2 is another directory"), "{said:?}");
    m.completed(job, 0);
    check_written(&m, "local");
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn a_guest_whose_directory_is_not_served_any_more_ends_in_one_clear_line() {
    let lab = lab("filelost", options(1));
    let m = Mover::new(&lab, "filelost", 1);
    let job = m.t.submit("--vm=tiny -o out --wrap 'echo begun; sleep 600'");
    m.t.wait_text("out", "begun");
    lab.node(
        "n1",
        &["sh", "-c", "kill -9 -$(cut -d' ' -f1 /var/lib/slurm-vm/vms/slurm-*/slurm-vm-0.pid)"],
    );
    assert_eq!(m.t.end_of(job), ("FAILED".into(), "123:0".into()), "{}", m.t.text("out"));
    let said = m.t.text("out");
    assert!(
        said.contains("the guest was lost: the process that served its directory /home/alice has ended"),
        "{said}"
    );
    m.nothing_left();
    lab.down().expect("down");
}

/// Such a file has no name by which the destination could open it.
#[test]
fn a_file_that_is_open_and_deleted_keeps_a_vm_where_it_is_and_is_named() {
    let lab = lab("filegone", options(2));
    let m = Mover::new(&lab, "filegone", 2);
    m.t.script("gone.sh", "#!/bin/bash\nexec 3>gone\nrm gone\necho begun\ni=0\nwhile [ ! -e stop ]; do i=$((i+1)); echo $i >&3 || echo bad; sleep 0.1; done\necho done\n");
    let job = m.t.submit("--vm=tiny -w n1 -o out gone.sh");
    m.t.wait_text("out", "begun");
    let said = m.t.sh(&format!("svm migrate {job} n2"));
    assert!(
        said.err.contains("open in the guest and deleted: /shared/home/alice/filegone/gone"),
        "{said:?}"
    );
    fs::write(m.t.path("stop"), "").unwrap();
    m.completed(job, 0);
    assert_eq!(m.t.text("out"), "begun\ndone\n", "the file stays usable where the guest is");
    m.nothing_left();
    lab.down().expect("down");
}

#[test]
fn files_that_are_being_written_go_on_in_a_live_move_and_in_a_save() {
    let lab = lab("filemove", options(2));
    let m = Mover::new(&lab, "filemove", 2);
    m.t.script("writer.sh", WRITER);
    let job = m.t.submit("--vm=tiny -p low -w n1 -o out writer.sh live");
    m.wait_lines("out", 20);
    // The servers are the agent's children, and not the next agent's.
    m.restart_agent("n1");
    let begun = Instant::now();
    let high = m.take("n1", 3);
    m.started(high, begun);
    m.completed(job, 1);
    assert_eq!(m.ways(job), ["live"]);
    check_written(&m, "live");
    m.t.end_of(high);

    let full = m.fill("n2");
    fs::remove_file(m.t.path("held")).unwrap();
    let job = m.t.submit("--vm=tiny -p low -w n1 -o out writer.sh save");
    // The file of the first job is still there.
    let mut state = String::new();
    wait_with("the second writer", &mut state, |state| {
        state.clone_from(&m.t.sh("svm list").out);
        state.contains("running") && m.t.text("out").lines().count() > 20 && m.t.text("out").lines().count() < 100
    });
    let high = m.take("n1", 20);
    m.started(high, Instant::now());
    assert_eq!(m.vm_state(job), "saved");
    m.give_back(full);
    m.completed(job, 1);
    assert_eq!(m.ways(job), ["save", "restore"]);
    check_written(&m, "save");
    m.nothing_left();
    lab.down().expect("down");
}
