//! Output kept on disk while no shim is attached: one file per stream, bounded, named after the offset it begins at so
//! that a restarted agent finds it again.
use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// The kept bytes `begin..end` of one stream.
#[derive(Debug)]
pub struct Spool {
    dir: PathBuf,
    stem: String,
    file: Option<File>,
    path: PathBuf,
    begin: u64,
    end: u64,
    limit: u64,
}

impl Spool {
    /// Opens what an earlier agent has kept for this stream, or nothing.
    #[must_use]
    pub fn open(dir: &Path, program: u32, stream: usize, limit: u64) -> Self {
        let stem = format!("spool-{program}-{stream}-");
        let mut spool = Self {
            dir: dir.into(),
            stem,
            file: None,
            path: PathBuf::new(),
            begin: 0,
            end: 0,
            limit,
        };
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let begin = name
                .to_str()
                .and_then(|n| n.strip_prefix(&spool.stem))
                .and_then(|n| n.parse::<u64>().ok());
            if let (Some(begin), Ok(file)) = (begin, OpenOptions::new().read(true).write(true).open(entry.path())) {
                spool.begin = begin;
                spool.end = begin + file.metadata().map(|m| m.len()).unwrap_or(0);
                spool.file = Some(file);
                spool.path = entry.path();
            }
        }
        spool
    }

    /// Nothing is kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.file.is_none()
    }

    /// Offset behind the last byte kept; 0 when nothing is.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.end
    }

    /// The byte at this offset is kept, or is the next one to come.
    #[must_use]
    pub fn covers(&self, offset: u64) -> bool {
        self.file.is_some() && (self.begin..=self.end).contains(&offset)
    }

    /// Keeps bytes that stand at `offset`; returns how many, fewer when the limit is reached or the disk is full.
    pub fn append(&mut self, offset: u64, bytes: &[u8]) -> u64 {
        if self.file.is_none() {
            let path = self.dir.join(format!("{}{offset}", self.stem));
            match OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path) {
                Ok(file) => {
                    self.file = Some(file);
                    self.path = path;
                    self.begin = offset;
                    self.end = offset;
                }
                Err(e) => {
                    log::warn!("cannot keep output in {}: {e}", path.display());
                    return 0;
                }
            }
        }
        let Some(file) = &self.file else { return 0 };
        let room = usize::try_from(self.limit.saturating_sub(self.end - self.begin)).unwrap_or(usize::MAX);
        let kept = &bytes[..bytes.len().min(room)];
        match file.write_all_at(kept, self.end - self.begin) {
            Ok(()) => {
                self.end += kept.len() as u64;
                kept.len() as u64
            }
            Err(e) => {
                log::warn!("cannot keep output in {}: {e}", self.path.display());
                0
            }
        }
    }

    /// At most `most` kept bytes from `offset` on.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn read(&self, offset: u64, most: usize) -> io::Result<Vec<u8>> {
        let Some(file) = &self.file else { return Ok(Vec::new()) };
        let n = usize::try_from(self.end.saturating_sub(offset)).unwrap_or(usize::MAX).min(most);
        let mut bytes = vec![0; n];
        file.read_exact_at(&mut bytes, offset - self.begin)?;
        Ok(bytes)
    }

    /// All kept bytes with the offset they begin at, to travel with a move.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn take_all(&self) -> io::Result<Option<(u64, Vec<u8>)>> {
        if self.is_empty() {
            return Ok(None);
        }
        Ok(Some((self.begin, self.read(self.begin, usize::MAX)?)))
    }

    /// Forgets what was kept.
    pub fn clear(&mut self) {
        if self.file.take().is_some()
            && let Err(e) = fs::remove_file(&self.path)
        {
            log::warn!("cannot remove {}: {e}", self.path.display());
        }
        self.begin = 0;
        self.end = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_output_is_found_again_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let mut s = Spool::open(dir.path(), 3, 0, 10);
        assert_eq!(s.append(100, b"abcdef"), 6);
        assert_eq!(s.append(106, b"ghijkl"), 4);
        drop(s);
        let mut s = Spool::open(dir.path(), 3, 0, 10);
        assert_eq!((s.end(), s.covers(100), s.covers(99)), (110, true, false));
        assert_eq!(s.read(104, 4).unwrap(), b"efgh");
        s.clear();
        assert!(Spool::open(dir.path(), 3, 0, 10).is_empty());
    }
}
