//! Bytes that the host puts here before it starts a program: specifications and scripts, too long for one frame.

use std::collections::{BTreeMap, BTreeSet};

use slurm_vm_api::frame::checksum;
use slurm_vm_api::guest::{MAX_SCRIPT_BYTES, MAX_SPEC_BYTES, Upload};

/// All uploads together hold no more than one start can need.
const MAX_TOTAL: u64 = MAX_SPEC_BYTES + MAX_SCRIPT_BYTES;
/// And there are no more of them than this.
const MAX_UPLOADS: usize = 256;

/// The uploads by id.
#[derive(Debug, Default)]
pub struct Uploads {
    held: BTreeMap<u32, Vec<u8>>,
    /// Uploads whose length the host is owed.
    pub ack_due: BTreeSet<u32>,
}

impl Uploads {
    /// Adds bytes. What is here already is skipped; beyond a gap or over the limits nothing is added. The acknowledgement says what is here.
    pub fn put(&mut self, id: u32, offset: u64, bytes: &[u8]) {
        if !self.held.contains_key(&id) && self.held.len() >= MAX_UPLOADS {
            return;
        }
        let total: u64 = self.held.values().map(|held| held.len() as u64).sum();
        let held = self.held.entry(id).or_default();
        self.ack_due.insert(id);
        let Some(skip) = (held.len() as u64).checked_sub(offset).and_then(|skip| usize::try_from(skip).ok()) else {
            return;
        };
        let Some(new) = bytes.get(skip..) else { return };
        if total + new.len() as u64 <= MAX_TOTAL {
            held.extend_from_slice(new);
        }
    }

    /// How much of an upload is here.
    pub fn len(&self, id: u32) -> u64 {
        self.held.get(&id).map_or(0, |held| held.len() as u64)
    }

    /// Takes an upload out. One that is not what the host says is dropped: the host begins it again.
    pub fn take(&mut self, upload: Upload, max: u64) -> Option<Vec<u8>> {
        let held = self.held.remove(&upload.id)?;
        (held.len() as u64 == upload.len && upload.len <= max && checksum(&held) == upload.crc32).then_some(held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_and_overlapping_puts_give_the_bytes_once() {
        let mut uploads = Uploads::default();
        uploads.put(7, 0, b"hello");
        uploads.put(7, 3, b"lo wo");
        uploads.put(7, 100, b"gap");
        uploads.put(7, 8, b"rld");
        uploads.put(7, 0, b"");
        assert_eq!(uploads.len(7), 11);
        let upload = Upload {
            id: 7,
            len: 11,
            crc32: checksum(b"hello world"),
        };
        assert_eq!(uploads.take(upload, 100).as_deref(), Some(&b"hello world"[..]));
        assert_eq!(uploads.take(upload, 100), None);
    }

    #[test]
    fn an_upload_that_is_not_what_was_announced_is_dropped() {
        let mut uploads = Uploads::default();
        uploads.put(1, 0, b"abc");
        assert_eq!(uploads.take(Upload { id: 1, len: 3, crc32: 1 }, 100), None);
        assert_eq!(uploads.len(1), 0);
    }
}
