//! The disk that brings the guest helper into an image that knows nothing of it: cloud-init's data source NoCloud, a FAT file system with the
//! label `cidata`.
//!
//! Nothing of one VM is in it, so that all VMs of a node share it, read-only, and a move or a save finds the same file everywhere: its name
//! is made of its digest. The helper is started as early as cloud-init can (`bootcmd` in the local stage), before the network is up, and does
//! not wait for anything that systemd starts later. What differs between VMs, the helper does: host name, user, directories.
use std::{
    fs::{self, Permissions},
    io::{self, Cursor, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use fatfs::{FileSystem, FormatVolumeOptions, FsOptions, format_volume};
use sha2::{Digest, Sha256};

/// Room beside the helper: tables, directory, texts.
const ROOM: usize = 256 << 10;
/// Where the helper stands in the guest.
const IN_GUEST: &str = "/usr/local/libexec/slurm-vm-guest";
/// Without a network stage: data and helper are on a disk.
const META_DATA: &str = "instance-id: slurm-vm\ndsmode: local\n";
const USER_DATA: &str = "#cloud-config\n{}\n";

/// Starts the helper, and makes no user of the image's own: it could have the number of the job's.
fn vendor_data() -> String {
    let start = format!(
        "set -e; mkdir -p /run/slurm-vm-seed {dir}; mount -o ro -t vfat LABEL=cidata /run/slurm-vm-seed; \
         install -m 0755 /run/slurm-vm-seed/helper {IN_GUEST}; umount /run/slurm-vm-seed; \
         systemd-run --no-block --unit=slurm-vm-guest -p DefaultDependencies=no -p Restart=always -p RestartSec=1 \
         {IN_GUEST} --port /dev/virtio-ports/{port}",
        dir = "/usr/local/libexec",
        port = slurm_vm_api::guest::PORT_NAME,
    );
    let quoted = serde_json::Value::from(start);
    format!("#cloud-config\npreserve_hostname: true\nusers: []\nbootcmd:\n  - [sh, -c, {quoted}]\n")
}

/// The file system's bytes; the same for the same helper.
fn image(helper: &[u8]) -> io::Result<Vec<u8>> {
    let size = (helper.len() + ROOM).next_multiple_of(64 << 10);
    let mut disk = Cursor::new(vec![0; size]);
    format_volume(&mut disk, FormatVolumeOptions::new().volume_label(*b"cidata     "))?;
    {
        let volume = FileSystem::new(&mut disk, FsOptions::new())?;
        let root = volume.root_dir();
        let texts = [
            ("meta-data", META_DATA.to_owned()),
            ("user-data", USER_DATA.to_owned()),
            ("vendor-data", vendor_data()),
        ];
        for (name, text) in &texts {
            root.create_file(name)?.write_all(text.as_bytes())?;
        }
        root.create_file("helper")?.write_all(helper)?;
    }
    Ok(disk.into_inner())
}

/// Makes the disk of a helper in a directory, if it is not there.
///
/// # Errors
/// Those of the files.
pub(super) fn make(helper: &Path, dir: &Path) -> io::Result<PathBuf> {
    let bytes = image(&fs::read(helper)?)?;
    let path = dir.join(name(&bytes));
    if fs::metadata(&path).is_ok_and(|m| m.len() == bytes.len() as u64) {
        return Ok(path);
    }
    // Everybody's to read: there is nothing of anybody in it.
    super::private::directory(dir, 0o755)?;
    let fresh = path.with_extension("new");
    fs::write(&fresh, &bytes)?;
    fs::File::open(&fresh)?.sync_all()?;
    fs::set_permissions(&fresh, Permissions::from_mode(0o644))?;
    fs::rename(&fresh, &path)?;
    Ok(path)
}

fn name(bytes: &[u8]) -> String {
    let digest = crate::text::hex(&Sha256::digest(bytes));
    format!("{}.img", &digest[..16])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn the_disk_has_what_cloud_init_looks_for_and_is_the_same_each_time() {
        let helper = vec![7; 300_000];
        let bytes = image(&helper).unwrap();
        assert_eq!(bytes, image(&helper).unwrap());
        let volume = FileSystem::new(Cursor::new(bytes), FsOptions::new()).unwrap();
        assert_eq!(volume.volume_label(), "cidata");
        let read = |name: &str| {
            let mut content = Vec::new();
            volume.root_dir().open_file(name).unwrap().read_to_end(&mut content).unwrap();
            content
        };
        assert_eq!(read("helper"), helper);
        let text = String::from_utf8(read("vendor-data")).unwrap();
        assert!(text.starts_with("#cloud-config\n") && text.contains("org.slurm-vm.0"), "{text}");
        assert_eq!(read("meta-data"), META_DATA.as_bytes());
    }

    #[test]
    fn one_that_is_there_stays_and_another_helper_has_another() {
        let dir = tempfile::tempdir().unwrap();
        let helper = dir.path().join("helper");
        fs::write(&helper, "a").unwrap();
        let first = make(&helper, &dir.path().join("seeds")).unwrap();
        let made = fs::metadata(&first).unwrap().modified().unwrap();
        assert_eq!(make(&helper, &dir.path().join("seeds")).unwrap(), first);
        assert_eq!(fs::metadata(&first).unwrap().modified().unwrap(), made);
        fs::write(&helper, "b").unwrap();
        assert_ne!(make(&helper, &dir.path().join("seeds")).unwrap(), first);
        assert!(make(&dir.path().join("none"), dir.path()).is_err());
    }
}
