//! Output kept on disk while no shim is attached: one file per stream, bounded, named after the offset it begins at so
//! that a restarted agent finds it again. What came with a move or a save is in no guest any more: it is kept in memory where
//! the disk does not take it.
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
    /// Bytes before `end` that the disk did not take.
    memory: Vec<u8>,
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
            memory: Vec::new(),
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
        self.file.is_none() && self.memory.is_empty()
    }

    /// Offset behind the last byte kept; 0 when nothing is.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.end
    }

    /// The byte at this offset is kept, or is the next one to come.
    #[must_use]
    pub fn covers(&self, offset: u64) -> bool {
        !self.is_empty() && (self.begin..=self.end).contains(&offset)
    }

    /// Keeps bytes that stand at `offset`; returns how many, fewer when the limit is reached or the disk is full.
    pub fn append(&mut self, offset: u64, bytes: &[u8]) -> u64 {
        // Bytes go nowhere but behind the last one kept.
        if !self.memory.is_empty() || (!self.is_empty() && offset != self.end) {
            return 0;
        }
        let begin = if self.is_empty() { offset } else { self.begin };
        let room = usize::try_from(self.limit.saturating_sub(self.end.max(begin) - begin)).unwrap_or(usize::MAX);
        self.write(offset, &bytes[..bytes.len().min(room)]).unwrap_or(0)
    }

    /// Takes over bytes that are nowhere else: also beyond the limit, which they kept to where they come from.
    ///
    /// # Errors
    /// The disk did not take them; they are in memory.
    pub fn take_over(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let written = if self.memory.is_empty() { self.write(offset, bytes) } else { Ok(0) };
        if matches!(written, Ok(n) if n == bytes.len() as u64) {
            return Ok(());
        }
        if self.is_empty() {
            self.begin = offset;
            self.end = offset;
        }
        self.memory.extend(bytes);
        self.end += bytes.len() as u64;
        written.map(|_| ())
    }

    /// All or nothing.
    fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<u64> {
        if self.file.is_none() {
            let path = self.dir.join(format!("{}{offset}", self.stem));
            let open = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path);
            self.file = Some(open.inspect_err(|e| log::warn!("cannot keep output in {}: {e}", path.display()))?);
            self.path = path;
            self.begin = offset;
            self.end = offset;
        }
        let Some(file) = &self.file else { return Ok(0) };
        file.write_all_at(bytes, self.end - self.begin)
            .inspect_err(|e| log::warn!("cannot keep output in {}: {e}", self.path.display()))?;
        self.end += bytes.len() as u64;
        Ok(bytes.len() as u64)
    }

    /// At most `most` kept bytes from `offset` on.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn read(&self, offset: u64, most: usize) -> io::Result<Vec<u8>> {
        let n = usize::try_from(self.end.saturating_sub(offset)).unwrap_or(usize::MAX).min(most);
        let mut bytes = vec![0; n];
        let from_disk = (self.end - self.memory.len() as u64).saturating_sub(offset);
        let (disk, memory) = bytes.split_at_mut(usize::try_from(from_disk).unwrap_or(usize::MAX).min(n));
        if let Some(file) = self.file.as_ref().filter(|_| !disk.is_empty()) {
            file.read_exact_at(disk, offset - self.begin)?;
        }
        let at = self.memory.len()
            - usize::try_from(self.end - offset.min(self.end))
                .unwrap_or(usize::MAX)
                .min(self.memory.len());
        memory.copy_from_slice(&self.memory[at..at + memory.len()]);
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
        self.memory.clear();
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

    #[test]
    fn what_the_disk_does_not_take_is_read_behind_what_it_took() {
        let dir = tempfile::tempdir().unwrap();
        let mut s = Spool::open(dir.path(), 3, 0, 10);
        s.take_over(100, b"abcdef").unwrap();
        // It takes nothing any more.
        s.file = Some(File::open(&s.path).unwrap());
        assert!(s.take_over(106, b"ghi").is_err());
        s.take_over(109, b"jkl").unwrap();
        assert_eq!((s.end(), s.covers(112), s.append(112, b"m")), (112, true, 0));
        assert_eq!(s.take_all().unwrap(), Some((100, b"abcdefghijkl".to_vec())));
        for from in 100..=112 {
            for most in 0..14 {
                let all = &b"abcdefghijkl"[usize::try_from(from - 100).unwrap()..];
                assert_eq!(s.read(from, most).unwrap(), all[..most.min(all.len())], "{from} {most}");
            }
        }
        s.clear();
        assert!(s.is_empty() && s.take_all().unwrap().is_none());
    }
}
