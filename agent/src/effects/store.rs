//! The ledger: one JSON record per VM, written to a temporary file, synced, renamed, the directory synced; and the
//! per-VM directory with its journal and the guest's serial log.
use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use thiserror::Error;

use crate::core::Record;

/// The ledger could not be read or written.
#[derive(Debug, Error)]
pub enum StoreError {
    /// A file system call failed.
    #[error("{act} {path}")]
    Io {
        /// What was done.
        act: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A record is not one that this version reads.
    #[error("record {path} is not understood: {why}")]
    Record {
        /// The file.
        path: PathBuf,
        /// serde's message.
        why: String,
    },
}

impl StoreError {
    /// The domain whose record it is about.
    #[must_use]
    pub fn domain(&self) -> Option<String> {
        let (Self::Io { path, .. } | Self::Record { path, .. }) = self;
        path.parent()?.file_name()?.to_str().map(str::to_owned)
    }
}

/// Durable state of the agent's VMs. Called from the VMs' owner threads.
pub trait Store: Send + Sync + fmt::Debug {
    /// All records; those that cannot be read come as errors beside them.
    ///
    /// # Errors
    /// When the directory itself cannot be read.
    fn load(&self) -> Result<Vec<Result<Record, StoreError>>, StoreError>;
    /// Writes a record durably: after this returns, a power cut does not lose it.
    ///
    /// # Errors
    /// The old record is then still whole.
    fn put(&self, record: &Record) -> Result<(), StoreError>;
    /// Removes a VM's directory with all in it.
    ///
    /// # Errors
    /// When something of it stays.
    fn remove(&self, domain: &str) -> Result<(), StoreError>;
    /// Appends a line to a VM's journal, with the time before it. Failures are logged, not returned.
    fn journal(&self, domain: &str, now_ms: u64, line: &str);
    /// Directory of one VM.
    fn vm_dir(&self, domain: &str) -> PathBuf;
}

/// The ledger in a directory: `DIR/vms/DOMAIN/{record.json,journal.log,serial.log,overlay.qcow2}`.
#[derive(Debug)]
pub struct DirStore {
    vms: PathBuf,
}

impl DirStore {
    /// Uses (and makes) `state_dir/vms`, mode 0711: QEMU's user reaches overlays by name only.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn new(state_dir: &Path) -> Result<Self, StoreError> {
        let vms = state_dir.join("vms");
        super::private::directory(&vms, 0o711).map_err(|source| StoreError::Io {
            act: "make",
            path: vms.clone(),
            source,
        })?;
        Ok(Self { vms })
    }
}

/// Writes a file so that a reader sees the old or the new one, never half of it, also after a power cut.
///
/// # Errors
/// Those of the file system.
pub fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let temporary = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_data()?;
    fs::rename(&temporary, path)?;
    File::open(dir)?.sync_all()
}

impl Store for DirStore {
    fn load(&self) -> Result<Vec<Result<Record, StoreError>>, StoreError> {
        let io = |act, path: &Path| {
            let path = path.to_owned();
            move |source| StoreError::Io { act, path, source }
        };
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.vms).map_err(io("read", &self.vms))? {
            let path = entry.map_err(io("read", &self.vms))?.path().join("record.json");
            let bytes = match fs::read(&path) {
                Ok(bytes) => bytes,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => {
                    records.push(Err(StoreError::Io { act: "read", path, source }));
                    continue;
                }
            };
            records.push(Record::parse(&bytes).map_err(|why| StoreError::Record { path, why }));
        }
        Ok(records)
    }

    fn put(&self, record: &Record) -> Result<(), StoreError> {
        let dir = self.vm_dir(&record.domain());
        let path = dir.join("record.json");
        let io = |source| StoreError::Io {
            act: "write",
            path: path.clone(),
            source,
        };
        if !dir.is_dir() {
            super::private::directory(&dir, 0o711).map_err(io)?;
            File::open(&self.vms).and_then(|d| d.sync_all()).map_err(io)?;
        }
        let mut bytes = serde_json::to_vec_pretty(record).map_err(|e| io(e.into()))?;
        bytes.push(b'\n');
        write_durably(&path, &bytes).map_err(io)
    }

    fn remove(&self, domain: &str) -> Result<(), StoreError> {
        let path = self.vm_dir(domain);
        match fs::remove_dir_all(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(StoreError::Io {
                act: "remove",
                path,
                source: e,
            }),
            _ => Ok(()),
        }
    }

    fn journal(&self, domain: &str, now_ms: u64, line: &str) {
        let path = self.vm_dir(domain).join("journal.log");
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path)?;
            file.write_all(format!("{} {line}\n", crate::text::utc(now_ms)).as_bytes())
        };
        if let Err(e) = write() {
            log::warn!("{domain}: cannot write {}: {e}", path.display());
        }
    }

    fn vm_dir(&self, domain: &str) -> PathBuf {
        self.vms.join(domain)
    }
}
