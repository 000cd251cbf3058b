//! Messages on a stream: four bytes of length (big endian), then JSON.

use super::error::PeerError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{Read, Write};
use std::time::Duration;

/// Writes one message and flushes.
pub(super) fn send<T: Serialize>(
    to: &mut impl Write,
    message: &T,
    max: usize,
    what: &'static str,
    after: Duration,
) -> Result<(), PeerError> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let len = bytes.len() - 4;
    let head = u32::try_from(len)
        .ok()
        .filter(|_| len <= max)
        .ok_or(PeerError::Oversize { len, max })?;
    bytes[..4].copy_from_slice(&head.to_be_bytes());
    to.write_all(&bytes)
        .and_then(|()| to.flush())
        .map_err(|e| PeerError::from_io(what, after, e))
}

/// Reads one message of at most `max` bytes. Memory grows with what arrives, not with what is announced.
pub(super) fn receive<T: DeserializeOwned>(from: &mut impl Read, max: usize, what: &'static str, after: Duration) -> Result<T, PeerError> {
    let mut head = [0; 4];
    from.read_exact(&mut head).map_err(|e| PeerError::from_io(what, after, e))?;
    let len = u32::from_be_bytes(head) as usize;
    if len > max {
        return Err(PeerError::Oversize { len, max });
    }
    let mut bytes = Vec::with_capacity(len.min(16 << 10));
    from.take(len as u64)
        .read_to_end(&mut bytes)
        .map_err(|e| PeerError::from_io(what, after, e))?;
    if bytes.len() < len {
        return Err(PeerError::Closed);
    }
    Ok(serde_json::from_slice(&bytes)?)
}
