//! Base images and overlays, through `qemu-img`: formats are always named, never probed; a base that stands on
//! something else is refused (design: security lessons).
use std::{
    collections::HashMap,
    fmt, fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
};

use sha2::{Digest, Sha256};
use thiserror::Error;

use super::files::{Files, MemoryFiles};

/// A disk cannot be used or made.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The image is at fault.
    #[error("image file {path}: {why}")]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The node is at fault: no space, no `qemu-img`.
    #[error("{act} {path}: {why}")]
    Node {
        /// What was done.
        act: &'static str,
        /// With which file.
        path: PathBuf,
        /// What failed.
        why: String,
    },
}

/// A base disk that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// SHA-256 of the file in hex.
    pub sha256: String,
    /// Size in bytes that the guest sees.
    pub virtual_bytes: u64,
}

/// Files behind virtual disks. Calls block; made from worker threads.
pub trait Disks: Send + Sync + fmt::Debug {
    /// Checks a base disk and takes its digest; the answer is kept as long as the file stays the same.
    ///
    /// # Errors
    /// [`DiskError::Image`] for a file that is missing, damaged or stands on another file.
    fn base(&self, path: &Path, format: &str) -> Result<Base, DiskError>;
    /// Makes an empty overlay over a base disk, of so many MiB or of the base's size. An older file of that name is replaced.
    ///
    /// # Errors
    /// [`DiskError::Node`]
    fn make_overlay(&self, overlay: &Path, base: &Path, base_format: &str, mib: Option<u64>) -> Result<(), DiskError>;
    /// The disk that brings this guest helper into an image, made in `dir` if it is not there.
    ///
    /// # Errors
    /// [`DiskError::Node`]
    fn seed(&self, helper: &Path, dir: &Path) -> Result<PathBuf, DiskError>;
    /// Removes a file; none there is no error.
    ///
    /// # Errors
    /// [`DiskError::Node`]
    fn remove(&self, path: &Path) -> Result<(), DiskError>;
    /// Bytes that a file takes on its storage; 0 when it is not there.
    fn used_bytes(&self, path: &Path) -> u64;
    /// Bytes free where this path is.
    ///
    /// # Errors
    /// [`DiskError::Node`]
    fn free_bytes(&self, path: &Path) -> Result<u64, DiskError>;
    /// Whether a file can be read (kernel, initrd).
    ///
    /// # Errors
    /// [`DiskError::Image`]
    fn readable(&self, path: &Path) -> Result<(), DiskError>;
}

/// The real ones.
#[derive(Debug, Default)]
pub struct QemuImg {
    /// Whom overlays are given to.
    owner: Option<String>,
    /// By path: what identified the file, and what was found.
    known: Mutex<HashMap<PathBuf, (FileIdentity, Base)>>,
    /// The seed disk that was made last, and from what.
    seed: Mutex<Option<(PathBuf, FileIdentity, PathBuf)>>,
}

impl QemuImg {
    /// Overlays are this user's alone: QEMU's.
    #[must_use]
    pub fn for_user(name: &str) -> Self {
        Self {
            owner: Some(name.into()),
            ..Self::default()
        }
    }
}

type FileIdentity = (u64, u64, u64, i64, i64);

fn identity(path: &Path) -> io::Result<FileIdentity> {
    let m = fs::metadata(path)?;
    Ok((m.dev(), m.ino(), m.size(), m.mtime(), m.mtime_nsec()))
}

/// `qemu-img` with a cleared environment and fixed arguments.
fn qemu_img(arguments: &[&std::ffi::OsStr]) -> io::Result<std::process::Output> {
    Command::new("qemu-img")
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("LC_ALL", "C")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
}

fn last_line(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes)
        .lines()
        .last()
        .unwrap_or("no message")
        .trim_start_matches("qemu-img: ")
        .to_owned()
}

impl Disks for QemuImg {
    fn base(&self, path: &Path, format: &str) -> Result<Base, DiskError> {
        let image = |why: String| DiskError::Image { path: path.into(), why };
        let id = identity(path).map_err(|e| image(e.to_string()))?;
        if let Some((_, base)) = self
            .known
            .lock()
            .ok()
            .and_then(|k| k.get(path).filter(|(known, _)| *known == id).cloned())
        {
            return Ok(base);
        }
        let out = qemu_img(&[
            "info".as_ref(),
            "-U".as_ref(),
            "--output=json".as_ref(),
            "-f".as_ref(),
            format.as_ref(),
            path.as_os_str(),
        ])
        .map_err(|e| DiskError::Node {
            act: "run qemu-img info on",
            path: path.into(),
            why: e.to_string(),
        })?;
        if !out.status.success() {
            return Err(image(format!("it is not a sound {format} image: {}", last_line(&out.stderr))));
        }
        let info: serde_json::Value = serde_json::from_slice(&out.stdout).map_err(|e| image(format!("qemu-img info gave no JSON: {e}")))?;
        if info.get("backing-filename").is_some() {
            return Err(image(
                "it stands on another file (backing file), which a base image must not".into(),
            ));
        }
        if info.pointer("/format-specific/data/data-file").is_some() {
            return Err(image(
                "its data is in another file (data file), which a base image must not have".into(),
            ));
        }
        if info.pointer("/format-specific/data/corrupt").and_then(serde_json::Value::as_bool) == Some(true) {
            return Err(image("it is marked corrupt".into()));
        }
        if format == "qcow2" {
            let check = qemu_img(&["check".as_ref(), "-U".as_ref(), "-f".as_ref(), format.as_ref(), path.as_os_str()]).map_err(|e| {
                DiskError::Node {
                    act: "run qemu-img check on",
                    path: path.into(),
                    why: e.to_string(),
                }
            })?;
            if !check.status.success() {
                return Err(image(format!("it is damaged: {}", last_line(&check.stderr))));
            }
        }
        let virtual_bytes = info.get("virtual-size").and_then(serde_json::Value::as_u64).unwrap_or_default();
        let mut file = fs::File::open(path).map_err(|e| image(e.to_string()))?;
        let mut hash = Sha256::new();
        io::copy(&mut file, &mut hash).map_err(|e| image(e.to_string()))?;
        let base = Base {
            sha256: crate::text::hex(&hash.finalize()),
            virtual_bytes,
        };
        if let Ok(mut known) = self.known.lock() {
            known.insert(path.into(), (id, base.clone()));
        }
        Ok(base)
    }

    fn make_overlay(&self, overlay: &Path, base: &Path, base_format: &str, mib: Option<u64>) -> Result<(), DiskError> {
        let node = |why: String| DiskError::Node {
            act: "make overlay",
            path: overlay.into(),
            why,
        };
        self.remove(overlay)?;
        let size = mib.map(|mib| format!("{mib}M"));
        let mut arguments: Vec<&std::ffi::OsStr> = vec![
            "create".as_ref(),
            "-q".as_ref(),
            "-f".as_ref(),
            "qcow2".as_ref(),
            "-F".as_ref(),
            base_format.as_ref(),
            "-b".as_ref(),
            base.as_os_str(),
            overlay.as_os_str(),
        ];
        arguments.extend(size.as_ref().map(AsRef::<std::ffi::OsStr>::as_ref));
        let out = qemu_img(&arguments).map_err(|e| node(e.to_string()))?;
        if !out.status.success() {
            return Err(node(last_line(&out.stderr)));
        }
        match &self.owner {
            Some(owner) => super::private::give(overlay, owner).map_err(|e| node(e.to_string())),
            None => Ok(()),
        }
    }

    fn seed(&self, helper: &Path, dir: &Path) -> Result<PathBuf, DiskError> {
        let made = || {
            let id = identity(helper)?;
            let mut last = self.seed.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let known = last.as_ref().filter(|(of, was, seed)| of == helper && *was == id && seed.exists());
            if let Some((.., seed)) = known {
                return Ok(seed.clone());
            }
            let seed = super::seed::make(helper, dir)?;
            *last = Some((helper.into(), id, seed.clone()));
            Ok(seed)
        };
        made().map_err(|e: io::Error| DiskError::Node {
            act: "bring the guest helper in with",
            path: helper.into(),
            why: e.to_string(),
        })
    }

    fn remove(&self, path: &Path) -> Result<(), DiskError> {
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(DiskError::Node {
                act: "remove",
                path: path.into(),
                why: e.to_string(),
            }),
            _ => Ok(()),
        }
    }

    fn used_bytes(&self, path: &Path) -> u64 {
        // st_blocks counts units of 512 bytes (stat(2)).
        fs::metadata(path).map(|m| m.blocks() * 512).unwrap_or(0)
    }

    fn free_bytes(&self, path: &Path) -> Result<u64, DiskError> {
        let s = nix::sys::statvfs::statvfs(path).map_err(|e| DiskError::Node {
            act: "look at",
            path: path.into(),
            why: e.to_string(),
        })?;
        Ok(s.blocks_available() * s.fragment_size())
    }

    fn readable(&self, path: &Path) -> Result<(), DiskError> {
        fs::File::open(path).map(drop).map_err(|e| DiskError::Image {
            path: path.into(),
            why: e.to_string(),
        })
    }
}

/// Disks in memory, for tests: any file may be an image, and an overlay is an empty file.
#[derive(Debug, Clone)]
pub struct MemoryDisks(pub MemoryFiles);

impl Disks for MemoryDisks {
    fn base(&self, path: &Path, _: &str) -> Result<Base, DiskError> {
        Ok(Base {
            sha256: crate::text::hex(&Sha256::digest(path.as_os_str().as_encoded_bytes())),
            virtual_bytes: 1 << 30,
        })
    }

    fn make_overlay(&self, overlay: &Path, _: &Path, _: &str, _: Option<u64>) -> Result<(), DiskError> {
        self.0.write_durably(overlay, b"").map_err(|e| DiskError::Node {
            act: "make",
            path: overlay.into(),
            why: e.to_string(),
        })
    }

    fn seed(&self, _: &Path, dir: &Path) -> Result<PathBuf, DiskError> {
        Ok(dir.join("seed.img"))
    }

    fn remove(&self, path: &Path) -> Result<(), DiskError> {
        self.0.remove(path).map_err(|e| DiskError::Node {
            act: "remove",
            path: path.into(),
            why: e.to_string(),
        })
    }

    fn used_bytes(&self, path: &Path) -> u64 {
        u64::from(self.0.is_there(path))
    }

    fn free_bytes(&self, _: &Path) -> Result<u64, DiskError> {
        Ok(1 << 40)
    }

    fn readable(&self, _: &Path) -> Result<(), DiskError> {
        Ok(())
    }
}
