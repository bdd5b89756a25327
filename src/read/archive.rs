//! The zip archive that PyTorch saves into, read strictly and for one purpose: where each stored entry's bytes lie.
//!
//! [`super::torch`] is its one caller. An entry is a name and a range of the file, so a storage of many gigabytes is
//! read by ranges like any tensor and never as a whole. Written here rather than taken from a library because libraries
//! are lenient where a reader of foreign files must not be: of two entries with one name the last wins, the local and
//! the central header may disagree, entries may overlap, anything may stand before, between and after them. Nothing
//! is ever decompressed, so there is no such thing as a bomb; no name is ever used as a path.

use std::collections::BTreeMap;
use std::ops::Range;

use super::file::InputFile;
use super::{MAX_HEADER_BYTES, MAX_TENSORS, ReadError, escaped};

const LOCAL: u32 = 0x0403_4b50;
const CENTRAL: u32 = 0x0201_4b50;
const END: u32 = 0x0605_4b50;
const END64: u32 = 0x0606_4b50;
const LOCATOR64: u32 = 0x0706_4b50;
const LOCAL_BYTES: u64 = 30;
const CENTRAL_BYTES: usize = 46;
const END_BYTES: u64 = 22;
const END64_BYTES: u64 = 56;
const LOCATOR64_BYTES: u64 = 20;
/// Sizes and checksum stand behind the data; names are UTF-8. No other flag is accepted.
const TRAILING_SIZES: u16 = 1 << 3;
const UTF8: u16 = 1 << 11;
/// Lengths that a record of sizes behind the data can have.
const DESCRIPTORS: [u64; 4] = [12, 16, 20, 24];
/// Bytes that a checksum pass reads at once.
const PIECE: u64 = 1 << 20;

/// A stored entry: plain bytes of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// First byte, counted from the beginning of the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// CRC-32 as stated; 0 where the writer was told to leave it out.
    pub crc: u32,
}

impl Entry {
    fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.bytes
    }
}

/// All entries, by name.
#[derive(Debug)]
pub(super) struct Archive {
    entries: BTreeMap<String, Entry>,
}

fn malformed(file: &InputFile, detail: String) -> ReadError {
    ReadError::Archive { path: file.path().to_owned(), detail }
}

/// Little-endian integers of a record whose length has been checked.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_le_bytes)
}
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// Where the directory is and how many entries it has.
struct Directory {
    range: Range<u64>,
    entries: u64,
}

/// A directory record, before its local header has been looked at.
struct Record {
    name: String,
    flags: u16,
    crc: u32,
    bytes: u64,
    local: u64,
}

impl Archive {
    /// Reads the directory and every local header.
    ///
    /// # Errors
    /// [`ReadError::Archive`] for everything that a plain archive of stored entries would not have: compression,
    /// encryption, several disks, a comment, two entries of one name, names that are no plain relative path, bytes that
    /// belong to no entry or to two, headers that contradict each other; those of reading.
    pub(super) fn open(file: &InputFile) -> Result<Self, ReadError> {
        let directory = find_directory(file)?;
        let records = read_directory(file, &directory)?;
        let mut entries = BTreeMap::new();
        // In the order of the file, so that holes and overlaps show.
        let mut end = 0;
        let mut trailing = false;
        let mut scratch = Vec::new();
        for record in records {
            check_gap(file, &record.name, end, record.local, trailing)?;
            let name = record.name.clone();
            trailing = record.flags & TRAILING_SIZES != 0;
            let entry = locate(file, record, directory.range.start, &mut scratch)?;
            end = entry.offset + entry.bytes;
            if entries.insert(name.clone(), entry).is_some() {
                return Err(malformed(file, format!("entry `{}` is there twice", escaped(&name))));
            }
        }
        check_gap(file, "the directory", end, directory.range.start, trailing)?;
        Ok(Self { entries })
    }

    pub(super) fn get(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }
}

/// Compares an entry's bytes with its checksum. One pass over them, in pieces; an entry without a checksum passes.
///
/// # Errors
/// [`ReadError::Archive`] naming the entry; those of reading.
pub(super) fn check_crc(file: &InputFile, name: &str, entry: &Entry) -> Result<(), ReadError> {
    if entry.crc == 0 {
        return Ok(());
    }
    let mut hasher = crc32fast::Hasher::new();
    let mut scratch = Vec::new();
    let Range { mut start, end } = entry.range();
    while start < end {
        let next = (start + PIECE).min(end);
        file.will_need(next..(next + PIECE).min(end));
        hasher.update(file.bytes(start..next, &mut scratch)?);
        file.release(start..next, false);
        start = next;
    }
    let got = hasher.finalize();
    if got == entry.crc {
        return Ok(());
    }
    let detail =
        format!("entry `{}` is damaged (got checksum {got:08x}, expected {:08x})", escaped(name), entry.crc);
    Err(malformed(file, detail))
}

/// The end record, which must be the file's last bytes, and where there is one the larger record before it.
fn find_directory(file: &InputFile) -> Result<Directory, ReadError> {
    let mut scratch = Vec::new();
    let len = file.len();
    let Some(end_at) = len.checked_sub(END_BYTES) else {
        return Err(malformed(file, format!("got {len} bytes, expected at least {END_BYTES}")));
    };
    let end = file.bytes(end_at..len, &mut scratch)?.to_vec();
    if u32_at(&end, 0) != END || u16_at(&end, 20) != 0 {
        let detail = "got no end record as its last 22 bytes, expected one without a comment: the file is cut short or \
                      has something behind it"
            .to_owned();
        return Err(malformed(file, detail));
    }
    if u16_at(&end, 4) != 0 || u16_at(&end, 6) != 0 || u16_at(&end, 8) != u16_at(&end, 10) {
        return Err(malformed(file, "got an archive of several disks, expected one".to_owned()));
    }
    let small = [u64::from(u16_at(&end, 10)), u64::from(u32_at(&end, 12)), u64::from(u32_at(&end, 16))];
    let limits = [u64::from(u16::MAX), u64::from(u32::MAX), u64::from(u32::MAX)];
    let mut stop = end_at;
    let mut found = small;
    if let Some(at) = end_at.checked_sub(LOCATOR64_BYTES) {
        let locator = file.bytes(at..end_at, &mut scratch)?.to_vec();
        if u32_at(&locator, 0) == LOCATOR64 {
            stop = u64_at(&locator, 8);
            if u32_at(&locator, 4) != 0
                || u32_at(&locator, 16) > 1
                || stop.checked_add(END64_BYTES) != Some(at)
            {
                let detail =
                    "got a zip64 locator that points elsewhere, expected the record before it".to_owned();
                return Err(malformed(file, detail));
            }
            let large = file.bytes(stop..at, &mut scratch)?;
            if u32_at(large, 0) != END64
                || u64_at(large, 4) != END64_BYTES - 12
                || u32_at(large, 16) != 0
                || u32_at(large, 20) != 0
                || u64_at(large, 24) != u64_at(large, 32)
            {
                return Err(malformed(file, "got a malformed zip64 end record".to_owned()));
            }
            found = [u64_at(large, 32), u64_at(large, 40), u64_at(large, 48)];
            // A smaller field says the same, or that it is too small to.
            if (0..3).any(|k| small[k] != limits[k] && small[k] != found[k]) {
                return Err(malformed(file, "got two end records that disagree".to_owned()));
            }
        }
    }
    let [entries, bytes, start] = found;
    if start.checked_add(bytes) != Some(stop) {
        let detail = format!("got a directory at {start} of {bytes} bytes, expected it to end at {stop}");
        return Err(malformed(file, detail));
    }
    if bytes > MAX_HEADER_BYTES {
        let detail = format!("got a directory of {bytes} bytes, expected at most {MAX_HEADER_BYTES}");
        return Err(malformed(file, detail));
    }
    // A few entries that are no tensors.
    let limit = MAX_TENSORS as u64 + 64;
    if entries > limit || entries.saturating_mul(CENTRAL_BYTES as u64) > bytes {
        let detail = format!(
            "got {entries} entries in a directory of {bytes} bytes, expected at most {limit}, of 46 each"
        );
        return Err(malformed(file, detail));
    }
    Ok(Directory { range: start..stop, entries })
}

/// The directory's records, in the order of their local headers.
fn read_directory(file: &InputFile, directory: &Directory) -> Result<Vec<Record>, ReadError> {
    let mut scratch = Vec::new();
    let mut rest = file.bytes(directory.range.clone(), &mut scratch)?;
    let mut records = Vec::with_capacity(directory.entries as usize);
    for _ in 0..directory.entries {
        let cut = || malformed(file, "got a directory that ends within a record".to_owned());
        if rest.len() < CENTRAL_BYTES || u32_at(rest, 0) != CENTRAL {
            return Err(cut());
        }
        let [name_len, extra_len, comment_len] = [28, 30, 32].map(|at| usize::from(u16_at(rest, at)));
        let (head, tail) = rest.split_at(CENTRAL_BYTES);
        if tail.len() < name_len + extra_len + comment_len {
            return Err(cut());
        }
        let (name, tail) = tail.split_at(name_len);
        let (extra, tail) = tail.split_at(extra_len);
        rest = &tail[comment_len..];
        records.push(record(file, head, name, extra)?);
    }
    if !rest.is_empty() {
        return Err(malformed(file, "got bytes behind the directory's last record".to_owned()));
    }
    records.sort_by_key(|record| record.local);
    Ok(records)
}

fn record(file: &InputFile, head: &[u8], name: &[u8], extra: &[u8]) -> Result<Record, ReadError> {
    let name = match std::str::from_utf8(name) {
        Ok(name) if is_plain(name) => name.to_owned(),
        _ => {
            let shown = String::from_utf8_lossy(name);
            let detail = format!(
                "entry `{}` has a name that leads elsewhere (expected DIRECTORY/NAME)",
                escaped(&shown)
            );
            return Err(malformed(file, detail));
        }
    };
    let refuse = |what: &str| malformed(file, format!("entry `{}` {what}", escaped(&name)));
    let (flags, method) = (u16_at(head, 8), u16_at(head, 10));
    if method != 0 {
        let what = format!("is compressed (got method {method}, expected 0: torch.save stores)");
        return Err(refuse(&what));
    }
    if flags & !(TRAILING_SIZES | UTF8) != 0 {
        return Err(refuse(&format!("is encrypted or patched (got flags {flags:#06x}, expected 0x0808)")));
    }
    let (mut stored, mut bytes, mut local) =
        (u64::from(u32_at(head, 20)), u64::from(u32_at(head, 24)), u64::from(u32_at(head, 42)));
    let saturated = u64::from(u32::MAX);
    if [stored, bytes, local].contains(&saturated) {
        let Some(mut wide) = extra_field(extra, 1) else {
            return Err(refuse("lacks its zip64 sizes"));
        };
        // In this order, and only those that did not fit.
        for value in [&mut bytes, &mut stored, &mut local].into_iter().filter(|v| **v == saturated) {
            let Some((first, next)) = wide.split_at_checked(8) else {
                return Err(refuse("lacks its zip64 sizes"));
            };
            *value = u64_at(first, 0);
            wide = next;
        }
    }
    if stored != bytes {
        return Err(refuse(&format!("has two sizes (got {stored} stored, expected {bytes})")));
    }
    if u16_at(head, 34) != 0 {
        return Err(refuse("is on another disk"));
    }
    Ok(Record { name, flags, crc: u32_at(head, 16), bytes, local })
}

/// Whether a name is `A/B/…` of visible parts: what torch writes.
fn is_plain(name: &str) -> bool {
    name.split('/')
        .all(|part| !matches!(part, "" | "." | "..") && !part.contains(|c: char| c == '\\' || c.is_control()))
}

/// The data of an extra field.
fn extra_field(mut extra: &[u8], wanted: u16) -> Option<&[u8]> {
    while extra.len() >= 4 {
        let (id, len) = (u16_at(extra, 0), usize::from(u16_at(extra, 2)));
        let data = extra.get(4..4 + len)?;
        if id == wanted {
            return Some(data);
        }
        extra = &extra[4 + len..];
    }
    None
}

/// Between an entry's end and what comes next there may only be the record of sizes that its flags announce.
fn check_gap(file: &InputFile, name: &str, end: u64, next: u64, trailing: bool) -> Result<(), ReadError> {
    let Some(gap) = next.checked_sub(end) else {
        let detail =
            format!("`{}` overlaps the entry before it (got {next}, expected {end} or more)", escaped(name));
        return Err(malformed(file, detail));
    };
    if gap == 0 || (trailing && DESCRIPTORS.contains(&gap)) {
        return Ok(());
    }
    let detail = format!("{gap} bytes before `{}` belong to no entry", escaped(name));
    Err(malformed(file, detail))
}

/// Reads a local header, which must say what the directory says, and gives the place of the data behind it.
fn locate(file: &InputFile, record: Record, limit: u64, scratch: &mut Vec<u8>) -> Result<Entry, ReadError> {
    let refuse = |what: &str| malformed(file, format!("entry `{}` {what}", escaped(&record.name)));
    let past = || refuse("reaches into the directory");
    let names = record.local.checked_add(LOCAL_BYTES).filter(|end| *end <= limit).ok_or_else(past)?;
    let head = file.bytes(record.local..names, scratch)?.to_vec();
    let (name_len, extra_len) = (u64::from(u16_at(&head, 26)), u64::from(u16_at(&head, 28)));
    let offset = names + name_len + extra_len;
    if offset.checked_add(record.bytes).is_none_or(|end| end > limit) {
        return Err(past());
    }
    let same_name = file.bytes(names..names + name_len, scratch)? == record.name.as_bytes();
    if u32_at(&head, 0) != LOCAL || u16_at(&head, 6) != record.flags || u16_at(&head, 8) != 0 || !same_name {
        return Err(refuse("differs between its header and the directory"));
    }
    let agrees = |got: u64, expected: u64| {
        // Behind the data, or in a field too wide for this one.
        got == expected || got == u64::from(u32::MAX) || (record.flags & TRAILING_SIZES != 0 && got == 0)
    };
    let [crc, stored, bytes] = [14, 18, 22].map(|at| u64::from(u32_at(&head, at)));
    if !(agrees(crc, u64::from(record.crc)) && agrees(stored, record.bytes) && agrees(bytes, record.bytes)) {
        return Err(refuse("has other sizes in its header than in the directory"));
    }
    Ok(Entry { offset, bytes: record.bytes, crc: record.crc })
}
