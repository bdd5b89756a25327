//! The checksum of a stored tensor: XXH3-128 over the checksums of its 64 KiB pieces.
//!
//! The writer makes it from bytes that arrive in any order, at any cut, from any thread (`Assembler`); `verify` and a
//! resumed run make the same from a file read front to back ([`Checksum::of_bytes`]). Dtype and shape enter too, so that a
//! header that says something else about the same bytes is noticed. Detects damage, not malice: XXH3 is no signature.

use std::fmt;
use std::ops::Range;

use twox_hash::XxHash3_128;

use crate::plan::shards::TensorSpec;

/// Bytes of one piece: what encoded tiles are cut at, so that most pieces arrive whole.
pub const PIECE_BYTES: u64 = 64 << 10;

/// What a writer may hold of pieces that have arrived in part. A tensor that would need more is read back instead.
pub const PARTIAL_BYTES: u64 = 2 << 20;

/// The same for each of so many writers that work at once.
pub fn partial_bytes_of(writers: usize) -> u64 {
    (PARTIAL_BYTES / writers.max(1) as u64).max(PIECE_BYTES)
}

/// Bytes that the checksums of the pieces of a tensor of `bytes` bytes take while it is written; those of a single piece
/// do not count.
pub fn held_bytes(bytes: u64) -> u64 {
    // 17 while they come in, 16 more when they are hashed in turn.
    bytes / PIECE_BYTES * 33
}

/// Begins every checksum's text, and names what was computed.
const PREFIX: &str = "xxh3-128/64KiB:";

/// Of one tensor: its dtype, shape and stored bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum(u128);

impl Checksum {
    /// From the checksums of the pieces, in order.
    fn of_pieces(spec: &TensorSpec, pieces: &[u128]) -> Self {
        let mut text = format!("{} {:?}\n", spec.dtype, spec.shape).into_bytes();
        text.reserve(16 * pieces.len());
        text.extend(pieces.iter().flat_map(|piece| piece.to_le_bytes()));
        Self(XxHash3_128::oneshot(&text))
    }

    /// Of a tensor whose bytes `read` gives range by range, in order and in multiples of [`PIECE_BYTES`].
    ///
    /// # Errors
    /// Those of `read`.
    pub fn of_bytes<E>(
        spec: &TensorSpec,
        mut read: impl FnMut(Range<u64>, &mut dyn FnMut(&[u8])) -> Result<(), E>,
    ) -> Result<Self, E> {
        const AT_ONCE: u64 = 16 * PIECE_BYTES;
        let mut pieces = Vec::with_capacity(spec.bytes.div_ceil(PIECE_BYTES) as usize);
        let mut at = 0;
        while at < spec.bytes {
            let end = (at + AT_ONCE).min(spec.bytes);
            read(at..end, &mut |bytes| {
                pieces.extend(bytes.chunks(PIECE_BYTES as usize).map(XxHash3_128::oneshot));
            })?;
            at = end;
        }
        Ok(Self::of_pieces(spec, &pieces))
    }

    /// Reads what `Display` writes.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix(PREFIX)?;
        let plain = digits.len() == 32 && digits.bytes().all(|b| b.is_ascii_hexdigit());
        if plain { u128::from_str_radix(digits, 16).ok().map(Self) } else { None }
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{:032x}", self.0)
    }
}

/// Checksums of the whole pieces of one write: made by whoever has the bytes in its cache, before any lock is taken.
#[derive(Debug)]
pub struct PieceChecksums {
    /// First whole piece, and the checksums from there on.
    first: u64,
    whole: Vec<u128>,
}

impl PieceChecksums {
    /// Of `bytes` at `offset` of a tensor of `total` bytes.
    pub fn new(offset: u64, bytes: &[u8], total: u64) -> Self {
        let end = offset + bytes.len() as u64;
        let first = offset.div_ceil(PIECE_BYTES);
        // The last piece is as short as the tensor leaves it.
        let last = if end == total { end.div_ceil(PIECE_BYTES) } else { end / PIECE_BYTES };
        let whole = (first..last)
            .map(|piece| {
                let from = piece * PIECE_BYTES;
                let to = (from + PIECE_BYTES).min(end);
                XxHash3_128::oneshot(&bytes[(from - offset) as usize..(to - offset) as usize])
            })
            .collect();
        Self { first, whole }
    }
}

/// One write with its checksums.
pub(super) struct Hashed<'b> {
    pub offset: u64,
    pub bytes: &'b [u8],
    pub pieces: &'b PieceChecksums,
}

/// Collects one tensor's pieces in any order.
///
/// Holds 17 bytes a piece, and the bytes of pieces that arrived in part: one at each ragged edge between two writes whose
/// neighbour is still to come. They share the writer's room for such; where it runs out, the tensor is read back at the end.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    pieces: Vec<u128>,
    known: Vec<bool>,
    left: usize,
    partial: std::collections::BTreeMap<u64, Vec<(u64, Vec<u8>)>>,
    /// Something was written twice, so that what is known may no longer be what is stored; or there was no room.
    unknown: bool,
}

impl Assembler {
    /// For a tensor of `bytes` bytes.
    pub fn new(bytes: u64) -> Self {
        let count = bytes.div_ceil(PIECE_BYTES) as usize;
        Self { pieces: vec![0; count], known: vec![false; count], left: count, ..Self::default() }
    }

    /// Enters what was written. `room`: bytes that may still be held.
    pub fn add(&mut self, written: &Hashed<'_>, total: u64, room: &mut u64) {
        let end = written.offset + written.bytes.len() as u64;
        let PieceChecksums { first, whole } = written.pieces;
        for (k, hash) in whole.iter().enumerate() {
            self.set(first + k as u64, *hash);
        }
        let after_whole = first + whole.len() as u64;
        // What is left of the first whole piece, and right of the last; both may be one piece's middle.
        let head = written.offset..end.min(first * PIECE_BYTES);
        let tail = (after_whole * PIECE_BYTES).max(written.offset)..end;
        if !head.is_empty() {
            self.add_part(head.clone(), written, total, room);
        }
        if !tail.is_empty() && tail.start >= head.end {
            self.add_part(tail, written, total, room);
        }
    }

    /// Part of one piece.
    fn add_part(&mut self, range: Range<u64>, written: &Hashed<'_>, total: u64, room: &mut u64) {
        let piece = range.start / PIECE_BYTES;
        let length = range.end - range.start;
        if self.unknown {
            return;
        }
        if self.known[piece as usize] || length > *room {
            self.give_up(room);
            return;
        }
        let from = piece * PIECE_BYTES;
        let wanted = (from + PIECE_BYTES).min(total) - from;
        let bytes =
            &written.bytes[(range.start - written.offset) as usize..(range.end - written.offset) as usize];
        let parts = self.partial.entry(piece).or_default();
        let place = parts.partition_point(|(start, _)| *start < range.start);
        let before = place.checked_sub(1).is_some_and(|k| parts[k].0 + parts[k].1.len() as u64 > range.start);
        let after = parts.get(place).is_some_and(|(start, _)| *start < range.end);
        if before || after {
            self.give_up(room);
            return;
        }
        *room -= length;
        parts.insert(place, (range.start, bytes.to_vec()));
        if parts.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>() == wanted {
            let parts = self.partial.remove(&piece).unwrap_or_default();
            *room += wanted;
            let whole: Vec<u8> = parts.into_iter().flat_map(|(_, bytes)| bytes).collect();
            self.set(piece, XxHash3_128::oneshot(&whole));
        }
    }

    fn set(&mut self, piece: u64, hash: u128) {
        let piece = piece as usize;
        if self.known[piece] || self.partial.contains_key(&(piece as u64)) {
            self.unknown = true;
            return;
        }
        self.pieces[piece] = hash;
        self.known[piece] = true;
        self.left -= 1;
    }

    /// Nothing more is kept of this tensor's parts.
    pub fn give_up(&mut self, room: &mut u64) {
        self.unknown = true;
        let parts = std::mem::take(&mut self.partial).into_values().flatten();
        *room += parts.map(|(_, bytes)| bytes.len() as u64).sum::<u64>();
    }

    /// `None` where bytes are missing, were written twice or could not be held: then the file has to be asked.
    pub fn finish(&self, spec: &TensorSpec) -> Option<Checksum> {
        (self.left == 0 && !self.unknown).then(|| Checksum::of_pieces(spec, &self.pieces))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec(bytes: usize) -> TensorSpec {
        TensorSpec { name: "w".into(), dtype: "U8".into(), shape: vec![bytes], bytes: bytes as u64 }
    }

    fn sequential(spec: &TensorSpec, data: &[u8]) -> Checksum {
        let read = |range: Range<u64>, take: &mut dyn FnMut(&[u8])| {
            take(&data[range.start as usize..range.end as usize]);
            Ok::<(), std::convert::Infallible>(())
        };
        match Checksum::of_bytes(spec, read) {
            Ok(checksum) => checksum,
            Err(never) => match never {},
        }
    }

    fn add(assembler: &mut Assembler, range: Range<usize>, data: &[u8], room: &mut u64) {
        let (offset, bytes, total) = (range.start as u64, &data[range], data.len() as u64);
        let pieces = PieceChecksums::new(offset, bytes, total);
        assembler.add(&Hashed { offset, bytes, pieces: &pieces }, total, room);
    }

    fn data(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|k| (k * 31 + k / 251) as u8).collect()
    }

    proptest! {
        #[test]
        fn any_cut_in_any_order_gives_the_sequential_checksum(
            bytes in 1usize..400_000,
            cuts in prop::collection::vec(0usize..400_000, 0..12),
            seed in 0u64..1000,
        ) {
            let (spec, data) = (spec(bytes), data(bytes));
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut % bytes).collect();
            cuts.extend([0, bytes]);
            cuts.sort_unstable();
            let mut parts: Vec<Range<usize>> = cuts.windows(2).map(|w| w[0]..w[1]).collect();
            parts.sort_by_key(|part| XxHash3_128::oneshot_with_seed(seed, &part.start.to_le_bytes()));
            let mut assembler = Assembler::new(spec.bytes);
            let mut room = 1 << 20;
            for part in parts.iter().filter(|p| !p.is_empty()) {
                prop_assert_eq!(assembler.finish(&spec), None);
                add(&mut assembler, (*part).clone(), &data, &mut room);
            }
            prop_assert_eq!(room, 1 << 20, "all of it is given back");
            prop_assert_eq!(assembler.finish(&spec), Some(sequential(&spec, &data)));
            prop_assert!(assembler.partial.is_empty());
        }

        #[test]
        fn one_flipped_bit_is_another_checksum(bytes in 1usize..200_000, at in 0usize..200_000, bit in 0u8..8) {
            let (spec, mut data) = (spec(bytes), data(bytes));
            let before = sequential(&spec, &data);
            data[at % bytes] ^= 1 << bit;
            prop_assert_ne!(sequential(&spec, &data), before);
        }
    }

    #[test]
    fn what_is_written_twice_is_not_vouched_for() {
        let spec = spec(200_000);
        let data = data(200_000);
        let mut room = 1 << 20;
        for again in [0..10, 65_000..66_000, 131_072..196_608, 0..200_000] {
            let mut assembler = Assembler::new(spec.bytes);
            add(&mut assembler, 0..200_000, &data, &mut room);
            add(&mut assembler, again, &data, &mut room);
            assert_eq!(assembler.finish(&spec), None);
        }
        // A part over a part.
        let mut assembler = Assembler::new(spec.bytes);
        for range in [10..20, 15..30, 0..200_000] {
            add(&mut assembler, range, &data, &mut room);
        }
        assert_eq!(assembler.finish(&spec), None);
    }

    #[test]
    fn where_there_is_no_room_for_parts_the_file_is_asked() {
        let spec = spec(400_000);
        let data = data(400_000);
        // Three pieces.
        const ROOM: u64 = 3 * PIECE_BYTES;
        let mut room = ROOM;
        let mut assembler = Assembler::new(spec.bytes);
        // Each part begins and ends within a piece; from the end, so that an edge waits for the part before it.
        for start in (0..400_000).step_by(70_000).rev() {
            let end = (start + 70_000).min(400_000);
            add(&mut assembler, start..end, &data, &mut room);
        }
        assert_eq!(assembler.finish(&spec), Some(sequential(&spec, &data)), "neighbours in turn need little");
        assert_eq!(room, ROOM);
        let mut assembler = Assembler::new(spec.bytes);
        for start in (0..400_000).step_by(140_000) {
            add(&mut assembler, start + 1..start + 70_000, &data, &mut room);
        }
        assert_eq!(assembler.finish(&spec), None);
        assert!(assembler.partial.is_empty() && room == ROOM, "what was held is free again");
    }

    #[test]
    fn dtype_and_shape_count_and_text_reads_back() {
        let plain = spec(12);
        let other = TensorSpec { dtype: "F32".into(), shape: vec![3], ..plain.clone() };
        let turned = TensorSpec { shape: vec![3, 4], ..plain.clone() };
        let all: Vec<Checksum> =
            [&plain, &other, &turned].map(|spec| sequential(spec, &data(12))).into_iter().collect();
        assert!(all[0] != all[1] && all[0] != all[2] && all[1] != all[2]);
        let text = all[0].to_string();
        assert_eq!(Checksum::parse(&text), Some(all[0]));
        for bad in ["", "xxh3-128/64KiB:", "xxh3-128/64KiB:+0000000000000000000000000000000", &text[..46]] {
            assert_eq!(Checksum::parse(bad), None, "{bad}");
        }
        // Nothing at all has a checksum too.
        assert_eq!(Assembler::new(0).finish(&spec(0)), Some(sequential(&spec(0), &[])));
    }
}
