//! Makes the FFI declarations at build time with bindgen, from the headers that the machine has.
//! One script serves two packages: the agent (libvirt, MUNGE) and the plugin (SPANK).
use std::{env, path::PathBuf};

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let package = env::var("CARGO_PKG_NAME").expect("cargo sets CARGO_PKG_NAME");
    let include = if package == "spank_vm" {
        manifest.join("../include")
    } else {
        manifest.join("include")
    };
    println!("cargo:rerun-if-changed={}", include.display());
    match package.as_str() {
        "spank_vm" => {
            bind(
                &include.join("slurm-vm-spank.h"),
                &["spank_.*", "slurm_spank_log", "slurm_error", "slurm_info"],
                &["spank_.*", "S_.*", "ESPANK_.*", "SLURM_.*"],
                &out.join("spank.rs"),
                "libslurm-dev",
            );
            link_the_unwinder_in(&out);
        }
        "slurm-vm" => {
            bind(
                &include.join("slurm-vm-libvirt.h"),
                &["vir.*"],
                &["vir.*", "VIR_.*"],
                &out.join("libvirt.rs"),
                "libvirt-dev",
            );
            bind(
                &include.join("slurm-vm-munge.h"),
                &["munge_.*"],
                &["munge_.*", "EMUNGE_.*", "MUNGE_.*"],
                &out.join("munge.rs"),
                "libmunge-dev",
            );
        }
        other => panic!("build.rs serves spank_vm and slurm-vm, not {other}"),
    }
}

/// Every sbatch and srun loads the plugin, and with it libgcc_s.so, which Rust's unwinder names and no Slurm client has: most of what loading the
/// plugin costs (docs/performance.md). A linker script of that name, found first, takes the same code from libgcc's archives instead. Where the
/// C compiler has none, the shared library stays.
fn link_the_unwinder_in(out: &std::path::Path) {
    let archive = |name: &str| {
        let said = std::process::Command::new("cc")
            .arg(format!("-print-file-name={name}"))
            .output()
            .ok()?;
        let path = PathBuf::from(String::from_utf8(said.stdout).ok()?.trim());
        // A name that cc does not find comes back as it was.
        path.is_absolute().then_some(path)
    };
    let (Some(unwinder), Some(rest)) = (archive("libgcc_eh.a"), archive("libgcc.a")) else {
        return;
    };
    let script = format!("INPUT({} {})\n", unwinder.display(), rest.display());
    std::fs::write(out.join("libgcc_s.so"), script).unwrap_or_else(|e| panic!("cannot write to {}: {e}", out.display()));
    println!("cargo:rustc-link-search=native={}", out.display());
}

fn bind(header: &std::path::Path, functions: &[&str], others: &[&str], out: &std::path::Path, debian_package: &str) {
    println!("cargo:rerun-if-changed={}", header.display());
    let mut builder = bindgen::Builder::default()
        .header(header.to_string_lossy())
        .layout_tests(false)
        .generate_comments(false)
        .wrap_unsafe_ops(true);
    for f in functions {
        builder = builder.allowlist_function(f);
    }
    for o in others {
        builder = builder.allowlist_type(o).allowlist_var(o);
    }
    let bindings = builder.generate().unwrap_or_else(|e| {
        panic!(
            "cannot read {}: {e}\nIs the package {debian_package} installed? `cargo xtask setup` installs what the build needs.",
            header.display()
        )
    });
    bindings
        .write_to_file(out)
        .unwrap_or_else(|e| panic!("cannot write {}: {e}", out.display()));
}
