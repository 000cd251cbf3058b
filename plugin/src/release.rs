//! One file for many Slurm releases.
//!
//! Slurm loads a plugin, then looks `plugin_version` up and refuses another release's number. So the number is filled in while the file is
//! loaded, from the API number of the Slurm library that is in the process. It is a trick, not a promise of Slurm's; it rests on the SPANK
//! interface being the same in all releases of the table, and so releases that are not in it are refused.
use crate::{os, plugin_version};
use std::{
    ffi::{c_long, c_void},
    sync::atomic::Ordering,
};

/// API numbers of libslurm and the releases they belong to.
const RELEASES: [(u8, u8, u8); 8] = [
    (38, 22, 5),
    (39, 23, 2),
    (40, 23, 11),
    (41, 24, 5),
    (42, 24, 11),
    (43, 25, 5),
    (44, 25, 11),
    (45, 26, 5),
];

#[used]
#[unsafe(link_section = ".init_array")]
static AT_LOAD: extern "C" fn() = at_load;

extern "C" fn at_load() {
    // Without the symbol this is no Slurm process at all: a test, or a tool that looks at the file.
    let Some(function) = os::symbol(c"slurm_api_version") else { return };
    // SAFETY: libslurm declares it as `long slurm_api_version(void)` in every release.
    let function = unsafe { std::mem::transmute::<*mut c_void, extern "C" fn() -> c_long>(function) };
    let api = ((function() >> 16) & 0xff).to_le_bytes()[0];
    match version_for(api) {
        Some(version) => plugin_version.store(version, Ordering::Relaxed),
        // Left at zero, which Slurm refuses by itself; it only says "incompatible", so say why. A process may have no standard error.
        None => drop(std::io::Write::write_all(&mut std::io::stderr(), refusal(api).as_bytes())),
    }
}

/// The release's version number as Slurm writes it, or nothing for an unknown API number.
fn version_for(api: u8) -> Option<u32> {
    RELEASES
        .iter()
        .find(|r| r.0 == api)
        .map(|&(_, major, minor)| u32::from(major) << 16 | u32::from(minor) << 8)
}

fn refusal(api: u8) -> String {
    let name = |r: &(u8, u8, u8)| format!("{:02}.{:02}", r.1, r.2);
    let (first, last) = (name(&RELEASES[0]), name(&RELEASES[RELEASES.len() - 1]));
    format!("spank_vm: this Slurm (API {api}) is not one that the plugin was made for ({first} to {last}); install a newer slurm-vm\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_releases_get_their_number_and_others_none() {
        assert_eq!(version_for(38), Some(0x16_05_00));
        assert_eq!(version_for(45), Some(0x1a_05_00));
        assert_eq!(version_for(37), None);
        assert_eq!(version_for(46), None);
        assert!(refusal(46).contains("API 46"));
        assert!(refusal(46).contains("22.05 to 26.05"));
    }
}
