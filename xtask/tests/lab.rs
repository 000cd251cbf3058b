//! The lab itself, on real daemons. Needs root; without it each test says so and ends.

use std::{path::Path, time::Duration};
use xtask::{
    Lab, Options,
    lab::{self, Places, Was},
    paths, proc,
};

/// Options under a name that no other run has, or nothing without root.
fn options(what: &str) -> Option<Options> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: the lab needs root");
        return None;
    }
    Some(Options::named(&format!("t-{what}-{}", std::process::id())))
}

fn nothing_is_left(name: &str) {
    assert!(!Path::new(paths::LAB_STATE).join(name).exists(), "state is left");
    assert!(!Path::new(paths::LAB_DISKS).join(name).exists(), "disks are left");
    assert!(!lab::list().iter().any(|(n, _)| n == name));
}

fn succeeds(lab: &Lab, host: &str, script: &str) -> bool {
    lab.node(host, &["bash", "-c", script]).status.success()
}

#[test]
fn a_lab_comes_up_twice_runs_jobs_and_leaves_nothing() {
    let Some(options) = options("jobs") else { return };
    let name = options.name.clone();
    let lab = Lab::up(&options).expect("up");
    assert_eq!(lab::up(&options).expect("up again"), Was::Up);
    let other = Options {
        nodes: 3,
        ..options.clone()
    };
    assert!(lab::up(&other).expect_err("other options").to_string().contains("other options"));
    let output = lab.exec("alice", &["srun", "-N2", "sh", "-c", "echo $(hostname) $(id -un)"]);
    let mut lines: Vec<_> = String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
    lines.sort();
    assert_eq!(lines, ["n1 alice", "n2 alice"]);
    assert_eq!(lab.exec("bob", &["sh", "-c", "exit 7"]).status.code(), Some(7));
    assert_eq!(
        String::from_utf8_lossy(&lab.exec("bob", &["pwd"]).stdout).trim(),
        "/shared/home/bob"
    );
    lab.down().expect("down");
    nothing_is_left(&name);
    assert!(!lab::down(&name).expect("down again"));
}

#[test]
fn a_lab_whose_first_process_was_killed_is_cleaned_up_by_the_next_up() {
    let Some(options) = options("killed") else { return };
    let lab = Lab::up(&options).expect("up");
    let status = std::fs::read_to_string(Places::of(&options.name).expect("a name").status()).expect("status");
    let pid: i32 = status
        .split(|c: char| !c.is_ascii_digit())
        .find(|w| !w.is_empty())
        .expect("a pid")
        .parse()
        .expect("a number");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).expect("kill");
    proc::wait_for(Duration::from_secs(10), || Lab::attach(&options.name).is_err().then_some(())).expect("the lab is dead");
    assert_eq!(lab::up(&options).expect("up again"), Was::Started);
    drop(lab);
    nothing_is_left(&options.name);
}

#[test]
fn a_cut_stalls_connections_until_it_is_healed_and_outlives_a_power_cycle() {
    let Some(options) = options("cut") else { return };
    let lab = Lab::up(&options).expect("up");
    let reach_n2 = "timeout 2 bash -c 'exec 3<>/dev/tcp/n2/6818'";
    assert!(succeeds(&lab, "n1", reach_n2));
    lab.cut("n1", "n2").expect("cut");
    // 124 is timeout's own code: the connection was neither made nor refused.
    assert_eq!(lab.node("n1", &["bash", "-c", reach_n2]).status.code(), Some(124));
    assert!(succeeds(&lab, "n1", "timeout 2 bash -c 'exec 3<>/dev/tcp/ctl/6817'"));
    lab.power("n1", false).expect("off");
    assert!(lab.services("n1").is_err());
    lab.power("n1", true).expect("on");
    assert_eq!(lab.node("n1", &["bash", "-c", reach_n2]).status.code(), Some(124));
    lab.heal("n1", "n2").expect("heal");
    assert!(succeeds(&lab, "n1", reach_n2));
}

#[test]
fn services_stop_start_and_come_back_after_a_kill() {
    let Some(options) = options("services") else { return };
    let lab = Lab::up(&options).expect("up");
    let line = |service: &str| {
        lab.services("n1")
            .expect("services")
            .into_iter()
            .find(|s| s.name == service)
            .expect("known")
    };
    lab.stop("n1", "libvirtd").expect("stop");
    assert!(line("libvirtd").excused);
    lab.start("n1", "libvirtd").expect("start");
    proc::wait_for(Duration::from_secs(20), || line("libvirtd").up.then_some(())).expect("libvirtd listens again");
    let before = line("slurmd").note;
    lab.kill("n1", "slurmd").expect("kill");
    let again = || Some(line("slurmd")).filter(|s| s.up && s.note != before);
    proc::wait_for(Duration::from_secs(20), again).expect("slurmd is back");
    assert!(lab.stop("n1", "nonsense").expect_err("unknown").to_string().contains("libvirtd"));
}

#[test]
fn a_full_node_has_no_block_left_until_the_room_is_given_back() {
    let Some(options) = options("full") else { return };
    let lab = Lab::up(&options).expect("up");
    let write = "echo x > /var/lib/slurm-vm/file";
    lab.fill("n1", true).expect("fill");
    assert!(!succeeds(&lab, "n1", write));
    assert!(succeeds(&lab, "n2", write));
    lab.fill("n1", false).expect("undo");
    assert!(succeeds(&lab, "n1", write));
}

#[test]
fn the_tiny_image_boots_under_the_nodes_libvirtd() {
    let Some(options) = options("boot") else { return };
    let lab = Lab::up(&options).expect("up");
    let xml = "<domain type='qemu'><name>boot</name><memory unit='MiB'>192</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type><kernel>/var/lib/slurm-vm-images/tiny/vmlinuz</kernel>
<initrd>/var/lib/slurm-vm-images/tiny/initrd</initrd><cmdline>console=ttyS0 quiet slurm_vm.hostname=boot</cmdline></os>
<devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/var/lib/slurm-vm/boot.qcow2'/><target dev='vda' bus='virtio'/></disk>
<serial type='file'><source path='/var/log/libvirt/qemu/boot-serial.log'/><target port='0'/></serial>
<channel type='unix'><target type='virtio' name='org.slurm-vm.0'/></channel></devices></domain>";
    std::fs::write(lab.shared().join("boot.xml"), xml).expect("write");
    let overlay = "qemu-img create -q -f qcow2 -F qcow2 -b /var/lib/slurm-vm-images/tiny/disk.qcow2 /var/lib/slurm-vm/boot.qcow2";
    assert!(succeeds(&lab, "n1", &format!("{overlay} && virsh create /shared/boot.xml")));
    let serial = lab.logs("n1").join("libvirt/qemu/boot-serial.log");
    let said = || std::fs::read_to_string(&serial).ok().filter(|text| text.contains("guest is up"));
    let text = proc::wait_for(Duration::from_secs(60), said).expect("the guest's init speaks");
    assert!(!text.contains("there is no port"), "{text}");
    assert!(!text.contains("did not load"), "{text}");
}
