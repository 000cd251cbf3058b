//! The real plugin in the real sbatch, srun and salloc of this machine, without any daemon: what they show, and what they refuse before
//! they would speak to a controller.
use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

/// The plugin that belongs to this test: cargo builds it beside the test (and leaves an older one of `cargo build` a directory above alone).
fn plugin() -> PathBuf {
    let exe = std::env::current_exe().expect("the test's own path");
    let found = exe.ancestors().map(|d| d.join("libspank_vm.so")).find(|p| p.is_file());
    found.expect("libspank_vm.so beside the test: `cargo build -p spank_vm` makes it")
}

/// A configuration of Slurm with the plugin and nothing else; no daemon listens.
struct Site(PathBuf);

impl Site {
    fn new(words: &str) -> Site {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let site = Site(std::env::temp_dir().join(format!("spank-vm-clients-{}-{number}", std::process::id())));
        fs::create_dir_all(&site.0).unwrap();
        site.write("images", "debian-12\nrocky-9   # the newer one\n\n# nothing\n");
        site.write(
            "plugstack.conf",
            &format!("{words} {} images={}\n", plugin().display(), site.path("images")),
        );
        let conf = format!(
            "ClusterName=t\nSlurmctldHost=localhost\nSlurmctldPort=1\nPlugStackConfig={}\nNodeName=localhost CPUs=2\nPartitionName=p Nodes=ALL Default=YES\n",
            site.path("plugstack.conf")
        );
        site.write("slurm.conf", &conf);
        site
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.0.join(name), text).unwrap();
    }

    /// Runs a command line (words split at blanks) with variables, and returns whether it succeeded and all it said.
    fn run(&self, line: &str, env: &[(&str, &str)]) -> (bool, String) {
        let mut words = line.split_whitespace();
        let program = words.next().unwrap();
        let output = Command::new(program)
            .args(words)
            .env_clear()
            .env("PATH", "/usr/bin:/bin:/usr/local/bin")
            .env("SLURM_CONF", self.path("slurm.conf"))
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .output()
            .unwrap_or_else(|e| panic!("{program}: {e}; Debian's package slurm-client has it"));
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        println!("$ {line} {env:?}\n{said}-> {}", output.status);
        (output.status.success(), said)
    }

    fn refuses(&self, line: &str, env: &[(&str, &str)], message: &str) {
        let (ok, said) = self.run(line, env);
        assert!(!ok, "{line}");
        let program = line.split_whitespace().next().unwrap();
        assert!(said.starts_with(&format!("{program}: error: {message}")), "{line}: {said}");
        assert_eq!(said.lines().count(), 1, "one line is enough: {said}");
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn the_help_shows_the_options_in_slurms_own_style() {
    let site = Site::new("required");
    for tool in ["sbatch", "srun", "salloc"] {
        let (ok, said) = site.run(&format!("{tool} --help"), &[]);
        assert!(ok);
        let line = |start: &str| {
            said.lines()
                .find(|l| l.trim_start().starts_with(start))
                .unwrap_or_else(|| panic!("{start} in the help"))
                .to_owned()
        };
        for (start, text) in [
            ("--vm=image", "run the job in its own virtual machine"),
            ("--vm-cpus=ncpus", "number of virtual cpus"),
            ("--vm-mem=MB", "memory of the guest"),
            ("--vm-boot-timeout=time", "how long the guest may take"),
            ("--vm-preempt=list", "what to do when the job is preempted"),
        ] {
            let line = line(start);
            assert!(line.starts_with("      --vm"), "{line}");
            assert!(line[30..].starts_with(text), "the help's column, as Slurm's own: {line}");
        }
    }
}

#[test]
fn each_wrong_value_is_refused_with_one_line_that_says_what_is_allowed() {
    let site = Site::new("required");
    site.write("plain.sh", "#!/bin/sh\n");
    let script = site.path("plain.sh");
    for tool in ["sbatch", "srun", "salloc"] {
        for (options, message) in [
            ("--vm=../x", "--vm: '../x' is not an image name: use 1 to 64 letters"),
            ("--vm=nope", "--vm: there is no image 'nope': the images are debian-12, rocky-9"),
            (
                "--vm=debian-12 --vm-cpus=0",
                "--vm-cpus: '0' is not a number of vCPUs: give a whole number from 1",
            ),
            (
                "--vm=debian-12 --vm-mem=1.5G",
                "--vm-mem: '1.5G' is not a size: give a whole number of MiB",
            ),
            (
                "--vm=debian-12 --vm-boot-timeout=soon",
                "--vm-boot-timeout: 'soon' is not a time: give seconds",
            ),
            (
                "--vm=debian-12 --vm-preempt=cancel,live",
                "--vm-preempt: 'cancel,live' goes on after cancel",
            ),
            ("--vm-mem=1G", "--vm-mem needs --vm=IMAGE as well"),
            (
                "--vm=debian-12 --vm-mem=2G --mem=2G",
                "--vm-mem=2G needs 2157M on the node (109M for QEMU), more than --mem=2G",
            ),
            ("--vm=debian-12 --vm-cpus=4 -c2", "--vm-cpus=4 does not fit into --cpus-per-task=2"),
            ("--vm=debian-12 -C [a*1&b*1]", "--vm: the constraint '[a*1&b*1]' has node counts"),
        ] {
            site.refuses(&format!("{tool} {options} {script}"), &[], message);
        }
        let het = format!("{tool} --vm=debian-12 : -n2 {script}");
        site.refuses(&het, &[], "--vm cannot be combined with heterogeneous jobs");
    }
}

#[test]
fn the_command_line_beats_the_environment_and_that_beats_the_script() {
    let site = Site::new("required");
    site.write("job.sh", "#!/bin/sh\n#SBATCH --vm=script\n");
    let job = site.path("job.sh");
    site.refuses(&format!("sbatch {job}"), &[], "--vm: there is no image 'script'");
    site.refuses(
        &format!("sbatch {job}"),
        &[("SLURM_VM", "common")],
        "--vm: there is no image 'common'",
    );
    site.refuses(
        &format!("sbatch {job}"),
        &[("SLURM_VM", "common"), ("SBATCH_VM", "own")],
        "--vm: there is no image 'own'",
    );
    site.refuses(
        &format!("sbatch --vm=line {job}"),
        &[("SBATCH_VM", "own")],
        "--vm: there is no image 'line'",
    );
    site.refuses(
        "salloc true",
        &[("SALLOC_VM", "own"), ("SBATCH_VM", "other")],
        "--vm: there is no image 'own'",
    );
    site.refuses(
        "srun true",
        &[("SLURM_VM", "debian-12"), ("SLURM_VM_CPUS", "many")],
        "--vm-cpus: 'many' is not",
    );
}

#[test]
fn a_site_can_rename_and_restrict() {
    let site = Site::new("required");
    let plugin = plugin();
    let line = |words: &str| format!("optional {} images={} {words}\n", plugin.display(), site.path("images"));
    site.write("plugstack.conf", &line("prefix=guest preempt=save,requeue"));
    site.refuses("sbatch --guest=nope --wrap=true", &[], "--guest: there is no image 'nope'");
    site.refuses("sbatch --guest-mem=1G --wrap=true", &[], "--guest-mem needs --guest=IMAGE as well");
    site.refuses(
        "sbatch --guest=debian-12 --guest-preempt=live --wrap=true",
        &[],
        "--guest-preempt: this site does not allow 'live'",
    );
    site.refuses("sbatch --wrap=true", &[("SLURM_GUEST", "x")], "--guest: there is no image 'x'");
}

#[test]
fn the_plugin_needs_nothing_of_slurm_that_some_release_lacks() {
    // Cargo links plugins so that every imported name must be there when they are loaded.
    let everywhere = [
        "slurm_error",
        "slurm_info",
        "spank_context",
        "spank_get_item",
        "spank_getenv",
        "spank_job_control_setenv",
        "spank_option_getopt",
        "spank_option_register",
        "spank_setenv",
    ];
    let symbols = |kind: &str| {
        let output = Command::new("nm")
            .args(["-D", kind, "--format=posix"])
            .arg(plugin())
            .output()
            .expect("nm, of Debian's binutils");
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines()
            .filter_map(|l| l.split(['@', ' ']).next())
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let imported: Vec<String> = symbols("--undefined-only")
        .into_iter()
        .filter(|s| s.contains("slurm") || s.contains("spank"))
        .collect();
    assert_eq!(imported, everywhere);
    let mut exported = symbols("--defined-only");
    exported.retain(|s| s.starts_with("slurm") || s.starts_with("plugin") || s.starts_with("spank"));
    exported.sort();
    let expected = [
        "plugin_name",
        "plugin_type",
        "plugin_version",
        "slurm_spank_init",
        "slurm_spank_init_post_opt",
        "slurm_spank_job_epilog",
        "slurm_spank_job_prolog",
        "slurm_spank_task_init",
        "slurm_spank_task_post_fork",
        "spank_plugin_version",
    ];
    assert_eq!(exported, expected);
}
