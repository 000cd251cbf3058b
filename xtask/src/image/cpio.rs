//! Writes an initramfs: the "newc" cpio format that the kernel unpacks.

/// An archive under construction. All files belong to root and have no time, so that equal inputs give equal archives.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    directories: std::collections::BTreeSet<String>,
}

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER: u32 = 0o020_000;

impl Archive {
    /// A directory, with those above it.
    pub fn directory(&mut self, path: &str, mode: u32) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.parent(parent);
        }
        if self.directories.insert(path.to_owned()) {
            self.entry(path, DIRECTORY | mode, (0, 0), &[]);
        }
    }

    fn parent(&mut self, path: &str) {
        if !path.is_empty() && !self.directories.contains(path) {
            self.directory(path, 0o755);
        }
    }

    /// A file.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.above(path);
        self.entry(path, REGULAR | mode, (0, 0), content);
    }

    /// A symbolic link.
    pub fn link(&mut self, path: &str, to: &str) {
        self.above(path);
        self.entry(path, SYMLINK | 0o777, (0, 0), to.as_bytes());
    }

    /// A character device.
    pub fn device(&mut self, path: &str, mode: u32, number: (u32, u32)) {
        self.above(path);
        self.entry(path, CHARACTER | mode, number, &[]);
    }

    fn above(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.parent(parent);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(path.len() + 1).unwrap_or(u32::MAX);
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// The archive, complete.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::Archive;
    use std::{io::Write, process::*};

    #[test]
    fn cpio_lists_what_was_put_in_with_parents_first() {
        let mut archive = Archive::default();
        archive.file("usr/bin/x", 0o755, b"abc");
        archive.link("bin", "usr/bin");
        let mut child = Command::new("cpio")
            .arg("-t")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("cpio");
        child.stdin.take().expect("piped").write_all(&archive.finish()).expect("write");
        let output = child.wait_with_output().expect("cpio ends");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "usr\nusr/bin\nusr/bin/x\nbin\n");
    }
}
