//! Self-synchronising frames for a byte channel that may be cut anywhere.
//!
//! The virtio-serial port between host and guest outlives either reader: after a restart of the agent, a migration or a restore, bytes are
//! missing, a frame is cut in half, or bytes of an earlier connection arrive. So each frame stands alone:
//!
//! ```text
//! COBS( crc32 u32 LE | kind u8 | channel u32 LE | body ) 0x00
//! ```
//!
//! COBS (consistent overhead byte stuffing) keeps 0x00 out of the encoded bytes, so that a reader is in step again after the next 0x00. The
//! checksum covers everything behind it. A frame that is cut, too long or wrong is dropped and counted, never repaired: recovery is the
//! business of the offsets in [`crate::guest`].
//!
//! The coder here works on runs rather than on single bytes, because all output of a job passes through it twice. A property test holds it
//! against the `cobs` crate.

use std::fmt;

/// Delimiter between frames. A writer that starts anew sends one first, to end whatever was cut before.
pub const DELIMITER: u8 = 0;

/// Bytes of a decoded frame in front of its body.
pub const HEADER_BYTES: usize = 9;

/// Largest body of a frame: a full data frame, or the largest JSON text, with room for its own small header.
pub const MAX_BODY_BYTES: usize = 48 * 1024;

/// Largest encoded frame without its delimiter that a reader keeps; anything longer is dropped before it is stored.
pub const MAX_ENCODED_BYTES: usize = 64 * 1024;

const MAX_RUN: usize = 254;

/// What a frame's body is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// JSON text: [`crate::guest::ToGuest`] or [`crate::guest::ToHost`]. The channel is 0.
    Control = 1,
    /// Bytes of a program's stream: `stream u8 | offset u64 LE | bytes`. The channel is the program's id.
    Data = 2,
    /// The reader is done with a stream's bytes below an offset: `stream u8 | offset u64 LE`. The channel is the program's id.
    Ack = 3,
    /// A stream ends at an offset: `stream u8 | offset u64 LE`. The channel is the program's id.
    Eof = 4,
    /// Bytes of an upload: `offset u64 LE | bytes`. The channel is the upload's id.
    Put = 5,
    /// Bytes of an upload that have arrived: `offset u64 LE`. The channel is the upload's id.
    PutAck = 6,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Control,
            2 => Self::Data,
            3 => Self::Ack,
            4 => Self::Eof,
            5 => Self::Put,
            6 => Self::PutAck,
            _ => return None,
        })
    }
}

/// A frame that arrived whole. The body lives in the [`Decoder`] that gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// What the body is.
    pub kind: Kind,
    /// A program's id, an upload's id, or 0.
    pub channel: u32,
    /// The body, at most [`MAX_BODY_BYTES`].
    pub body: &'a [u8],
    /// How many frames were dropped before this one, as [`Decoder::bad_frames`].
    pub bad_before: u64,
}

/// The body of a frame would be longer than [`MAX_BODY_BYTES`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("frame body of {len} bytes is over the limit of {MAX_BODY_BYTES}")]
pub struct BodyTooLong {
    /// How long the body was.
    pub len: usize,
}

/// CRC-32 of bytes that travel in many frames, such as an upload.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// Appends one frame, with its delimiter, to `out`. The body comes in parts so that a ring buffer needs no copy of its own.
///
/// # Errors
/// When the parts together are longer than [`MAX_BODY_BYTES`]; `out` is then as it was.
pub fn encode(out: &mut Vec<u8>, kind: Kind, channel: u32, body: &[&[u8]]) -> Result<(), BodyTooLong> {
    let len: usize = body.iter().map(|part| part.len()).sum();
    if len > MAX_BODY_BYTES {
        return Err(BodyTooLong { len });
    }
    let mut head = [0; HEADER_BYTES];
    head[4] = kind as u8;
    head[5..].copy_from_slice(&channel.to_le_bytes());
    let mut crc = crc32fast::Hasher::new();
    crc.update(&head[4..]);
    for part in body {
        crc.update(part);
    }
    head[..4].copy_from_slice(&crc.finalize().to_le_bytes());

    out.reserve(len + HEADER_BYTES + (len + HEADER_BYTES) / MAX_RUN + 3);
    let mut writer = Stuffer::new(out);
    writer.push(&head);
    for part in body {
        writer.push(part);
    }
    writer.finish();
    out.push(DELIMITER);
    Ok(())
}

/// Writes COBS runs behind what is in `out` already.
struct Stuffer<'a> {
    out: &'a mut Vec<u8>,
    code_at: usize,
    after_full_run: bool,
}

impl<'a> Stuffer<'a> {
    fn new(out: &'a mut Vec<u8>) -> Self {
        let code_at = out.len();
        out.push(1);
        Self {
            out,
            code_at,
            after_full_run: false,
        }
    }

    fn run(&self) -> usize {
        self.out.len() - self.code_at - 1
    }

    fn close_run(&mut self, full: bool) {
        self.out[self.code_at] = u8::try_from(self.run() + 1).unwrap_or(u8::MAX);
        self.code_at = self.out.len();
        self.out.push(1);
        self.after_full_run = full;
    }

    fn push(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            let window = &data[..data.len().min(MAX_RUN - self.run())];
            if let Some(zero) = window.iter().position(|byte| *byte == 0) {
                self.out.extend_from_slice(&window[..zero]);
                self.close_run(false);
                data = &data[zero + 1..];
                // Output is often full of zeros: each further one is a run by itself, and the open one is the last of them.
                let more = data.iter().position(|byte| *byte != 0).unwrap_or(data.len());
                self.out.resize(self.out.len() + more, 1);
                self.code_at += more;
                data = &data[more..];
            } else {
                self.out.extend_from_slice(window);
                data = &data[window.len()..];
                if self.run() == MAX_RUN {
                    self.close_run(true);
                }
            }
        }
    }

    fn finish(self) {
        // A full run means "no zero behind me": when nothing followed it, the run that was opened after it stands for nothing.
        if self.after_full_run && self.run() == 0 {
            self.out.pop();
        } else {
            self.out[self.code_at] = u8::try_from(self.run() + 1).unwrap_or(u8::MAX);
        }
    }
}

/// Takes the stuffing out in place; `None` when the runs do not add up.
fn unstuff(buf: &mut [u8]) -> Option<usize> {
    let (mut from, mut to) = (0, 0);
    while from < buf.len() {
        let zeros = buf[from..].iter().position(|code| *code != 1).unwrap_or(buf.len() - from);
        if zeros > 0 {
            // Empty runs stand for a zero each, but for the one that ends the frame.
            from += zeros;
            let zeros = zeros - usize::from(from == buf.len());
            buf[to..to + zeros].fill(0);
            to += zeros;
            continue;
        }
        let code = usize::from(buf[from]);
        let end = from + code;
        if code == 0 || end > buf.len() {
            return None;
        }
        buf.copy_within(from + 1..end, to);
        to += code - 1;
        from = end;
        if code <= MAX_RUN && from < buf.len() {
            buf[to] = 0;
            to += 1;
        }
    }
    Some(to)
}

/// Cuts a byte stream into frames. Holds at most one encoded frame.
#[derive(Default)]
pub struct Decoder {
    buf: Vec<u8>,
    // The frame in `buf` has been handed out: the next call begins a new one.
    taken: bool,
    overlong: bool,
    bad: u64,
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder")
            .field("held", &self.buf.len())
            .field("bad", &self.bad)
            .finish_non_exhaustive()
    }
}

impl Decoder {
    /// A decoder at the start of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many frames were dropped as cut, too long, wrong or of an unknown kind.
    #[must_use]
    pub fn bad_frames(&self) -> u64 {
        self.bad
    }

    /// Forgets a frame that has begun; what follows belongs to another connection.
    pub fn reset(&mut self) {
        self.buf.clear();
        self.taken = false;
        self.overlong = false;
    }

    /// Takes bytes from the front of `input` until one frame is whole. `None` means that `input` is used up.
    pub fn next<'s>(&'s mut self, input: &mut &[u8]) -> Option<Frame<'s>> {
        let (kind, len) = loop {
            if std::mem::take(&mut self.taken) {
                self.buf.clear();
            }
            let Some(end) = input.iter().position(|byte| *byte == DELIMITER) else {
                self.keep(input);
                *input = &[];
                return None;
            };
            self.keep(&input[..end]);
            *input = &input[end + 1..];
            self.taken = true;
            if std::mem::take(&mut self.overlong) {
                self.bad += 1;
                continue;
            }
            if self.buf.is_empty() {
                continue;
            }
            match Self::check(&mut self.buf) {
                Some(found) => break found,
                None => self.bad += 1,
            }
        };
        let channel = u32::from_le_bytes([self.buf[5], self.buf[6], self.buf[7], self.buf[8]]);
        Some(Frame {
            kind,
            channel,
            body: &self.buf[HEADER_BYTES..len],
            bad_before: self.bad,
        })
    }

    fn keep(&mut self, bytes: &[u8]) {
        if self.overlong {
            return;
        }
        if self.buf.len() + bytes.len() > MAX_ENCODED_BYTES {
            self.overlong = true;
            self.buf.clear();
        } else {
            self.buf.extend_from_slice(bytes);
        }
    }

    fn check(buf: &mut [u8]) -> Option<(Kind, usize)> {
        let len = unstuff(buf)?;
        if !(HEADER_BYTES..=HEADER_BYTES + MAX_BODY_BYTES).contains(&len) {
            return None;
        }
        let crc = u32::from_le_bytes([buf[0], buf[1], buf[2], buf[3]]);
        if crc32fast::hash(&buf[4..len]) != crc {
            return None;
        }
        Some((Kind::from_byte(buf[4])?, len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(kind: Kind, channel: u32, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        encode(&mut out, kind, channel, &[body]).unwrap();
        out
    }

    fn decode_all(decoder: &mut Decoder, mut input: &[u8]) -> Vec<(Kind, u32, Vec<u8>)> {
        let mut frames = Vec::new();
        while let Some(frame) = decoder.next(&mut input) {
            frames.push((frame.kind, frame.channel, frame.body.to_vec()));
        }
        frames
    }

    #[test]
    fn the_encoding_of_a_frame_is_the_documented_one() {
        assert_eq!(frame(Kind::Ack, 7, &[1, 0, 2]), [7, 31, 237, 198, 193, 3, 7, 1, 1, 2, 1, 2, 2, 0]);
    }

    #[test]
    fn a_body_over_the_limit_is_refused_and_leaves_the_buffer_alone() {
        let mut out = vec![9];
        let body = vec![1; MAX_BODY_BYTES + 1];
        assert_eq!(
            encode(&mut out, Kind::Data, 1, &[&body]),
            Err(BodyTooLong { len: MAX_BODY_BYTES + 1 })
        );
        assert_eq!(out, [9]);
    }

    #[test]
    fn the_largest_frame_fits_the_readers_cap() {
        for fill in [0, 1] {
            let encoded = frame(Kind::Data, u32::MAX, &vec![fill; MAX_BODY_BYTES]);
            assert!(encoded.len() <= MAX_ENCODED_BYTES);
            assert_eq!(decode_all(&mut Decoder::new(), &encoded).len(), 1);
        }
    }

    #[test]
    fn an_endless_frame_costs_bounded_memory_and_the_next_one_is_read() {
        let mut decoder = Decoder::new();
        for _ in 0..1000 {
            assert!(decode_all(&mut decoder, &[7; 4096]).is_empty());
        }
        assert!(decoder.buf.capacity() <= 4 * MAX_ENCODED_BYTES);
        assert!(decode_all(&mut decoder, &[0]).is_empty());
        assert_eq!(decoder.bad_frames(), 1);
        assert_eq!(decode_all(&mut decoder, &frame(Kind::Eof, 3, b"x")).len(), 1);
    }

    #[test]
    fn an_unknown_kind_is_counted_and_dropped() {
        let mut out = Vec::new();
        encode(&mut out, Kind::Data, 1, &[b"abc"]).unwrap();
        let mut plain = out[..out.len() - 1].to_vec();
        let len = unstuff(&mut plain).unwrap();
        plain.truncate(len);
        plain[4] = 99;
        let crc = crc32fast::hash(&plain[4..]);
        plain[..4].copy_from_slice(&crc.to_le_bytes());
        let mut odd = cobs::encode_vec(&plain);
        odd.push(0);
        let mut decoder = Decoder::new();
        assert!(decode_all(&mut decoder, &odd).is_empty());
        assert_eq!(decoder.bad_frames(), 1);
    }

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..2000),
            proptest::collection::vec(prop_oneof![Just(0u8), Just(1u8)], 0..2000),
            (0usize..1100, 0usize..3).prop_map(|(n, zeros)| [vec![5; n], vec![0; zeros]].concat()),
        ]
    }

    proptest! {
        #[test]
        fn stuffing_agrees_with_the_cobs_crate(parts in proptest::collection::vec(bytes(), 1..4)) {
            let whole = parts.concat();
            let mut out = Vec::new();
            let mut stuffer = Stuffer::new(&mut out);
            for part in &parts {
                stuffer.push(part);
            }
            stuffer.finish();
            prop_assert_eq!(cobs::decode_vec(&out).unwrap(), whole.clone());
            let mut theirs = cobs::encode_vec(&whole);
            let len = unstuff(&mut theirs).unwrap();
            prop_assert_eq!(&theirs[..len], &whole[..]);
            let len = unstuff(&mut out).unwrap();
            prop_assert_eq!(&out[..len], &whole[..]);
        }

        #[test]
        fn frames_survive_any_cutting_into_reads(bodies in proptest::collection::vec(bytes(), 1..6), cut in 1usize..700) {
            let mut wire = Vec::new();
            for body in &bodies {
                encode(&mut wire, Kind::Data, 4, &[body]).unwrap();
            }
            let mut decoder = Decoder::new();
            let mut got = Vec::new();
            for chunk in wire.chunks(cut) {
                got.extend(decode_all(&mut decoder, chunk).into_iter().map(|frame| frame.2));
            }
            prop_assert_eq!(got, bodies);
            prop_assert_eq!(decoder.bad_frames(), 0);
        }

        #[test]
        fn a_damaged_stream_gives_only_frames_that_were_sent(bodies in proptest::collection::vec(bytes(), 2..6), at in any::<prop::sample::Index>(), lost in 1usize..300, noise in any::<u8>()) {
            let mut wire = Vec::new();
            for body in &bodies {
                encode(&mut wire, Kind::Data, 4, &[body]).unwrap();
            }
            let at = at.index(wire.len());
            let end = (at + lost).min(wire.len());
            wire.splice(at..end, [noise]);
            wire.push(0);
            for (_, _, body) in decode_all(&mut Decoder::new(), &wire) {
                prop_assert!(bodies.contains(&body));
            }
        }

        #[test]
        fn noise_never_panics(noise in proptest::collection::vec(any::<u8>(), 0..5000)) {
            let _ = decode_all(&mut Decoder::new(), &noise);
        }
    }
}
