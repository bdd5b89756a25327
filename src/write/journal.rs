//! The journal of a run: which tensors are on disk for good, so that another process can go on where this one ended.
//!
//! One line a record: 16 hexadecimal digits, a space, JSON. The digits are the XXH3-64 of the JSON seeded with the digits
//! of the line before, so a line counts only behind exactly the lines it was written behind. The first record says which
//! run it is ([`RunKey`]). A record is appended when the tensor's bytes have been synced, never before. Reading stops at the
//! first line that is cut, damaged or out of place; what follows it never happened.
//!
//! Owns the file's format. What a record's `done` means is `run`'s business; whether the bytes that it vouches for are still
//! there is checked by the writer.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use twox_hash::XxHash3_64;

use super::error::WriteError;
use super::fault;
use super::output_dir::{JOURNAL_NAME, sync_directory};

/// What the first record calls the format.
const FORMAT: &str = "mats-stream-journal/1";

/// A longer line is no record of ours.
const MAX_LINE_BYTES: u64 = 256 << 20;

/// Digits and the space before a record's JSON.
const HEAD_BYTES: usize = 17;

/// Everything that decides the output's bytes: two runs with equal keys write the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunKey {
    /// The tool's version.
    pub version: String,
    /// The vector instructions in use: another width sums in another order.
    pub cpu: String,
    /// Hash of the canonical config.
    pub config: String,
    /// The flags that change bytes, as text.
    pub flags: String,
    /// Every file that is read, in order.
    pub inputs: Vec<KeyInput>,
}

/// One input file and its state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyInput {
    /// For messages.
    pub path: String,
    /// Length, times and hash of the header, as text.
    pub state: String,
}

impl RunKey {
    /// What `self`, the run that is asked for, has otherwise than `before`; `None` if nothing.
    pub fn difference(&self, before: &Self) -> Option<String> {
        if self.config != before.config {
            return Some("another config".to_owned());
        }
        if self.flags != before.flags {
            return Some(format!("other flags (got {}, expected {})", self.flags, before.flags));
        }
        if self.version != before.version {
            return Some(format!("another version (got {}, expected {})", self.version, before.version));
        }
        if self.cpu != before.cpu {
            return Some(format!("another processor (got {}, expected {})", self.cpu, before.cpu));
        }
        if self.inputs.len() != before.inputs.len() {
            let (got, expected) = (self.inputs.len(), before.inputs.len());
            return Some(format!("other inputs (got {got} files, expected {expected})"));
        }
        let changed = self.inputs.iter().zip(&before.inputs).find(|(now, then)| now.state != then.state);
        changed.map(|(now, _)| format!("other inputs ({} has changed since)", now.path))
    }
}

/// A tensor that is on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Its number in the layout.
    pub tensor: usize,
    /// Its name, checked against the layout.
    pub name: String,
    /// Of its bytes, checked against the file.
    pub checksum: String,
    /// Whatever the run wants back: as text, of which a checkpoint of many small tensors holds less than of values.
    pub done: Box<RawValue>,
}

impl PartialEq for Record {
    fn eq(&self, other: &Self) -> bool {
        self.tensor == other.tensor
            && self.name == other.name
            && self.checksum == other.checksum
            && self.done.get() == other.done.get()
    }
}

#[derive(Serialize, Deserialize)]
struct First {
    format: String,
    key: RunKey,
}

/// A journal open for appending.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    last: u64,
}

/// What a journal says.
#[derive(Debug, Default)]
pub struct Replay {
    /// `None` if not even the first record can be read.
    pub key: Option<RunKey>,
    /// In the order they were written.
    pub records: Vec<Record>,
    /// Whether something behind the last valid record was passed over.
    pub damaged: bool,
    /// Bytes up to the end of the last valid record, and its hash.
    end: u64,
    last: u64,
}

impl Journal {
    /// Begins the journal of the run `key` in a directory that has none.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn create(directory: &Path, key: RunKey) -> Result<Self, WriteError> {
        let path = directory.join(JOURNAL_NAME);
        let refuse = |doing| {
            let path = path.clone();
            move |source| WriteError::writing(&path, doing, 4096, source)
        };
        fault::point("journal.create").map_err(refuse("create the journal"))?;
        let mut options = OpenOptions::new();
        let options = options.write(true).create_new(true).mode(0o666);
        let file = options
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(&path)
            .map_err(refuse("create the journal"))?;
        let mut journal = Self { path, file, last: 0 };
        let first = serde_json::to_value(First { format: FORMAT.to_owned(), key });
        journal.append(&[first.expect("strings always serialise")])?;
        sync_directory(directory)?;
        Ok(journal)
    }

    /// Goes on behind the last valid record of what [`read`] gave.
    ///
    /// # Errors
    /// Those of the operating system.
    pub fn reopen(directory: &Path, replay: &Replay) -> Result<Self, WriteError> {
        let path = directory.join(JOURNAL_NAME);
        let open = || {
            let mut file =
                OpenOptions::new().write(true).custom_flags(OFlags::NOFOLLOW.bits() as i32).open(&path)?;
            // What is behind it would make the next record invalid.
            file.set_len(replay.end)?;
            file.seek(SeekFrom::Start(replay.end))?;
            file.sync_data()?;
            Ok(file)
        };
        match open() {
            Ok(file) => Ok(Self { path, file, last: replay.last }),
            Err(source) => Err(WriteError::writing(&path, "open the journal", 4096, source)),
        }
    }

    /// Appends records and waits until they are on disk.
    ///
    /// # Errors
    /// [`WriteError::NoSpace`], [`WriteError::Io`]. Part of a record may then stand at the end; it does not count.
    pub fn append(&mut self, records: &[impl Serialize]) -> Result<(), WriteError> {
        let mut text = Vec::new();
        let mut last = self.last;
        for record in records {
            let json = serde_json::to_vec(record).expect("string keys and plain values always serialise");
            last = XxHash3_64::oneshot_with_seed(last, &json);
            text.extend_from_slice(format!("{last:016x} ").as_bytes());
            text.extend_from_slice(&json);
            text.push(b'\n');
        }
        let written = fault::point("journal.write")
            .and_then(|()| self.file.write_all(&text))
            .and_then(|()| fault::point("journal.fsync"))
            .and_then(|()| self.file.sync_data());
        written.map_err(|source| {
            WriteError::writing(&self.path, "write the journal", text.len() as u64, source)
        })?;
        self.last = last;
        Ok(())
    }
}

/// Reads the journal in `directory` up to its last valid record.
///
/// # Errors
/// Those of the operating system; damage is none.
pub fn read(directory: &Path) -> Result<Replay, WriteError> {
    let path = directory.join(JOURNAL_NAME);
    let refuse = |source| WriteError::Io { path: path.clone(), doing: "read the journal", source };
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(&path).map_err(refuse)?;
    replay(BufReader::with_capacity(1 << 20, file)).map_err(refuse)
}

/// Removes a journal that says nothing.
///
/// # Errors
/// Those of the operating system.
pub fn discard(directory: &Path) -> Result<(), WriteError> {
    let path = directory.join(JOURNAL_NAME);
    std::fs::remove_file(&path).map_err(|source| WriteError::Io { path, doing: "remove the journal", source })
}

/// As [`read`], from any bytes.
///
/// # Errors
/// Those of `reader`.
pub fn replay(mut reader: impl BufRead) -> io::Result<Replay> {
    let mut replay = Replay::default();
    let mut line = Vec::new();
    loop {
        line.clear();
        let n = io::Read::take(&mut reader, MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
        if n == 0 {
            return Ok(replay);
        }
        if !replay.enter(&line) {
            replay.damaged = true;
            return Ok(replay);
        }
        replay.end += n as u64;
    }
}

impl Replay {
    /// Enters one line with its end; false if it is no valid one here.
    fn enter(&mut self, line: &[u8]) -> bool {
        let Some(line) = line.strip_suffix(b"\n") else { return false };
        let Some((head, json)) = line.split_at_checked(HEAD_BYTES) else { return false };
        let hash = XxHash3_64::oneshot_with_seed(self.last, json);
        if head != format!("{hash:016x} ").as_bytes() {
            return false;
        }
        if self.key.is_none() {
            match serde_json::from_slice::<First>(json) {
                Ok(first) if first.format == FORMAT => self.key = Some(first.key),
                _ => return false,
            }
        } else {
            match serde_json::from_slice(json) {
                Ok(record) => self.records.push(record),
                Err(_) => return false,
            }
        }
        self.last = hash;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> RunKey {
        RunKey {
            version: "1".into(),
            cpu: "x".into(),
            config: "c".into(),
            flags: "seed 0".into(),
            inputs: vec![KeyInput { path: "a\n".into(), state: "12 7".into() }],
        }
    }

    fn record(tensor: usize) -> Record {
        Record {
            tensor,
            name: format!("layers.{tensor}\n\"ü"),
            checksum: "sum".into(),
            done: RawValue::from_string(r#"{"seconds":1.5,"null":null}"#.to_owned()).unwrap(),
        }
    }

    fn written(count: usize) -> Vec<u8> {
        let root = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(root.path(), key()).unwrap();
        for tensor in 0..count {
            journal.append(&[record(tensor)]).unwrap();
        }
        std::fs::read(root.path().join(JOURNAL_NAME)).unwrap()
    }

    #[test]
    fn what_was_appended_reads_back_and_goes_on() {
        let root = tempfile::tempdir().unwrap();
        let mut journal = Journal::create(root.path(), key()).unwrap();
        journal.append(&[record(0), record(1)]).unwrap();
        drop(journal);
        let replay = read(root.path()).unwrap();
        assert_eq!((replay.key.as_ref(), replay.damaged), (Some(&key()), false));
        let mut journal = Journal::reopen(root.path(), &replay).unwrap();
        journal.append(&[record(2)]).unwrap();
        assert_eq!(read(root.path()).unwrap().records, [record(0), record(1), record(2)]);
        // Never over another one.
        assert!(Journal::create(root.path(), key()).is_err());
    }

    #[test]
    fn f14_cut_at_every_byte_it_reads_up_to_the_last_valid_record() {
        let bytes = written(3);
        let ends: Vec<usize> = (0..bytes.len()).filter(|k| bytes[*k] == b'\n').map(|k| k + 1).collect();
        assert_eq!(ends.len(), 4);
        for cut in 0..=bytes.len() {
            let replay = replay(&bytes[..cut]).unwrap();
            let whole = ends.iter().filter(|end| **end <= cut).count();
            assert_eq!(replay.key.is_some(), whole > 0, "cut at {cut}");
            assert_eq!(replay.records.len(), whole.saturating_sub(1), "cut at {cut}");
            assert_eq!(replay.damaged, cut != 0 && !ends.contains(&cut), "cut at {cut}");
        }
    }

    #[test]
    fn f14_any_flipped_bit_ends_it_there() {
        let bytes = written(3);
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                let replay = replay(&flipped[..]).unwrap();
                let before = bytes[..at].iter().filter(|b| **b == b'\n').count();
                assert!(replay.damaged, "byte {at}, bit {bit}");
                assert_eq!(replay.records.len(), before.saturating_sub(1), "byte {at}, bit {bit}");
            }
        }
    }

    #[test]
    fn lines_out_of_order_or_of_another_journal_do_not_count() {
        let bytes = written(3);
        let lines: Vec<&[u8]> = bytes.split_inclusive(|b| *b == b'\n').collect();
        let swapped = [lines[0], lines[2], lines[1], lines[3]].concat();
        assert!(replay(&swapped[..]).unwrap().records.is_empty());
        let twice = [lines[0], lines[1], lines[1]].concat();
        assert_eq!(replay(&twice[..]).unwrap().records.len(), 1);
        let headless = [lines[1], lines[2]].concat();
        assert!(replay(&headless[..]).unwrap().key.is_none());
    }

    #[test]
    fn keys_say_what_differs() {
        let (a, mut b) = (key(), key());
        assert_eq!(a.difference(&b), None);
        b.inputs[0].state = "13 7".into();
        assert!(a.difference(&b).unwrap().contains("a\n has changed"));
        b.config = "d".into();
        assert_eq!(a.difference(&b).unwrap(), "another config");
    }
}
