//! One checkpoint on its way to disk: shards preallocated under temporary names, written at any place by
//! any thread, then made durable and renamed all together.
//!
//! Positioned writes, past the page cache where that can be ([`super::direct`]). Memory taken is a few words a tensor,
//! never tensor data.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{Advice, OFlags};
use serde_json::value::RawValue;

use super::checksum::{Checksum, Hashed, PieceChecksums, partial_bytes_of};
use super::coverage::Coverage;
use super::direct::OpenShard;
use super::error::WriteError;
use super::fault;
use super::journal::{Journal, Record, RunKey};
use super::output_dir::{JOURNAL_NAME, OutputDir, TEMPORARY_PREFIX, TEMPORARY_SUFFIX, sync_directory};
use super::side::{self, SideFile};
use super::snapshot::{self, SolvePlace, SolveStore};
use super::space::{free_bytes, free_files, reserve};
use crate::plan::shards::{INDEX_NAME, OutputLayout};
use crate::report::units::Bytes;

/// Shards kept open at once. A thousand shards must not need a thousand descriptors.
const MAX_OPEN: usize = 16;

/// Shards kept open by all writers of a sweep together, beside one that each needs.
const OPEN_IN_ALL: usize = 64;

/// After this many bytes through the page cache a shard's dirty pages are sent to the disk, so that the final fsync finds
/// little to do and dirty output never crowds the inputs out of memory. 2 GiB written and synced took
/// 1.1 to 1.9 s with it, 3.8 to 6.7 s without (ext4, three runs each, alternating).
const WRITE_BACK_BYTES: u64 = 64 << 20;

/// Free space wanted beyond the shards, for the side files and the file system's own records.
pub(super) const SPARE_BYTES: u64 = 1 << 20;

/// Files wanted beside the shards: config, tokenizer, card, index, report, journal.
const SPARE_FILES: u64 = 32;

/// Holds the place of the side files until they are written.
const SPARE_NAME: &str = "spare";

/// What a writer may take where many work at once.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// Shards kept open.
    open_files: usize,
    /// Bytes of pieces that were written in part.
    partial_bytes: u64,
}

impl Share {
    /// Of one of so many writers.
    pub fn of(writers: usize) -> Self {
        let open_files = (OPEN_IN_ALL / writers.max(1)).clamp(1, MAX_OPEN);
        Self { open_files, partial_bytes: partial_bytes_of(writers) }
    }
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenCheckpoint {
    /// The output directory, canonical.
    pub directory: PathBuf,
    /// The shards under their final names.
    pub files: Vec<WrittenFile>,
    /// Their bytes in all.
    pub bytes: u64,
}

/// A shard as published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenFile {
    /// Its final name.
    pub name: String,
    /// Its length.
    pub bytes: u64,
}

/// Writes a checkpoint of a given layout into a claimed directory.
///
/// Any thread may write any part of any tensor in any order. Dropped without
/// [`CheckpointWriter::finish`], it removes all that it made, unless [`CheckpointWriter::keep_unfinished`] was called.
#[derive(Debug)]
pub struct CheckpointWriter {
    dir: OutputDir,
    layout: Arc<OutputLayout>,
    shards: Vec<Shard>,
    open: Mutex<VecDeque<(usize, Arc<OpenShard>)>>,
    /// Shards kept open at once.
    most_open: usize,
    coverage: Mutex<Coverage>,
    bytes_written: AtomicU64,
    /// Every path of ours in the directory, temporary or final; emptied once they are to stay.
    made: Mutex<Vec<PathBuf>>,
    /// Tensors that an earlier run has written.
    resumed: Vec<bool>,
    journal: Mutex<Option<Journal>>,
    /// What the journal is to say as soon as the tensors are on disk.
    pending: Mutex<Vec<(usize, Box<RawValue>)>>,
    /// Leave what another run can continue.
    keep: AtomicBool,
    /// Every shard has its blocks on the disk.
    reserved: bool,
    /// States of solves that take long.
    solves: Option<SolveStore>,
}

#[derive(Debug)]
struct Shard {
    temporary: PathBuf,
    /// Device and inode, checked when the file is opened again.
    identity: (u64, u64),
    /// Whether whole blocks pass the page cache by.
    direct: bool,
    /// Bytes written through the page cache since dirty pages were last sent to the disk.
    dirty: AtomicU64,
    /// One of the constants below.
    durable: AtomicU8,
}

const NOT_SYNCED: u8 = 0;
const SYNCED: u8 = 1;
const SYNC_FAILED: u8 = 2;

impl CheckpointWriter {
    /// Makes every shard under its temporary name, at its full length where the file system can reserve
    /// it, with its header written.
    ///
    /// # Errors
    /// [`WriteError::NoSpace`] before anything is made if the free space is seen to be too little, or
    /// when a reservation fails; [`WriteError::Io`] else.
    pub fn create(dir: OutputDir, layout: Arc<OutputLayout>) -> Result<Self, WriteError> {
        Self::with_share(dir, layout, Share::of(1))
    }

    /// As [`CheckpointWriter::create`], one of several writers that work at once.
    ///
    /// # Errors
    /// As there.
    pub fn with_share(dir: OutputDir, layout: Arc<OutputLayout>, share: Share) -> Result<Self, WriteError> {
        let mut writer = Self {
            dir,
            coverage: Mutex::new(Coverage::new(&layout, share.partial_bytes)),
            shards: Vec::with_capacity(layout.shards().len()),
            resumed: vec![false; layout.specs().len()],
            layout: Arc::clone(&layout),
            open: Mutex::default(),
            most_open: share.open_files,
            bytes_written: AtomicU64::new(0),
            made: Mutex::default(),
            journal: Mutex::default(),
            pending: Mutex::default(),
            keep: AtomicBool::new(false),
            reserved: true,
            solves: None,
        };
        // Nothing is taken from a directory whose journal belongs to another run: that is settled before.
        let found = if writer.dir.unfinished() { writer.gather()? } else { HashMap::new() };
        let allocated: u64 = found.values().map(|(_, metadata)| metadata.blocks() * 512).sum();
        let need = layout.file_bytes().saturating_sub(allocated).saturating_add(SPARE_BYTES);
        if let Some(have) = free_bytes(writer.dir.path())
            && have < need
        {
            writer.keep.store(writer.dir.unfinished(), Ordering::Relaxed);
            return Err(WriteError::NoSpace {
                path: writer.dir.shown().to_owned(),
                need,
                have: Some(have),
                source: None,
            });
        }
        let need = (layout.shards().len() - found.len()) as u64 + SPARE_FILES;
        if let Some(have) = free_files(writer.dir.path())
            && have < need
        {
            writer.keep.store(writer.dir.unfinished(), Ordering::Relaxed);
            return Err(WriteError::NoFiles { path: writer.dir.shown().to_owned(), need, have });
        }
        writer.keep.store(writer.dir.unfinished(), Ordering::Relaxed);
        let mut found = found;
        let mut left = layout.file_bytes();
        for (number, shard) in layout.shards().iter().enumerate() {
            let (temporary, file) = match found.remove(&number) {
                Some((file, _)) => (writer.dir.path().join(side::temporary_name(&shard.file_name)), file),
                None => side::create_temporary(writer.dir.path(), &shard.file_name)?,
            };
            lock(&writer.made).push(temporary.clone());
            fault::point("shard.reserve")
                .map_err(|source| WriteError::writing(&temporary, "reserve space", left, source))?;
            writer.reserved &= reserve(&temporary, &file, shard.file_bytes, left)?;
            fault::point("shard.header")
                .and_then(|()| file.write_all_at(&shard.header, 0))
                .map_err(|source| WriteError::writing(&temporary, "write the header", left, source))?;
            let metadata = file.metadata().map_err(|source| WriteError::Io {
                path: temporary.clone(),
                doing: "look at a temporary file",
                source,
            })?;
            let identity = (metadata.dev(), metadata.ino());
            let open = Arc::new(OpenShard::new(&temporary, file, shard.file_bytes));
            writer.shards.push(Shard {
                temporary,
                identity,
                direct: open.is_direct(),
                dirty: AtomicU64::new(0),
                durable: AtomicU8::new(NOT_SYNCED),
            });
            writer.remember_open(number, open);
            left -= shard.file_bytes;
        }
        Ok(writer)
    }

    /// Brings a directory that a run left half-way, half-published even, back to temporary names alone, and gives the
    /// shards that are there.
    fn gather(&self) -> Result<HashMap<usize, (File, fs::Metadata)>, WriteError> {
        let directory = self.path();
        let refuse = |doing| move |source| WriteError::Io { path: directory.to_owned(), doing, source };
        // What says that the checkpoint is complete goes first, then what a new run makes anew.
        let mut anew: Vec<PathBuf> = vec![directory.join(INDEX_NAME)];
        let mut finals = HashMap::new();
        for (number, shard) in self.layout.shards().iter().enumerate() {
            finals.insert(shard.file_name.clone(), number);
            finals.insert(side::temporary_name(&shard.file_name), number);
        }
        for entry in fs::read_dir(directory).map_err(refuse("list the output directory"))? {
            let entry = entry.map_err(refuse("list the output directory"))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let ours = [super::output_dir::LOCK_NAME, JOURNAL_NAME].contains(&name.as_str())
                || finals.contains_key(&name)
                || snapshot::is_state(&name);
            if !ours {
                anew.push(entry.path());
            }
        }
        for path in anew {
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(WriteError::Io { path, doing: "remove a file of the run before", source });
                }
                _ => {}
            }
        }
        let mut found = HashMap::new();
        for (number, shard) in self.layout.shards().iter().enumerate() {
            let published = directory.join(&shard.file_name);
            let temporary = directory.join(side::temporary_name(&shard.file_name));
            let regular = |path: &Path| fs::symlink_metadata(path).is_ok_and(|m| m.is_file());
            if regular(&published) && !temporary.exists() {
                fs::rename(&published, &temporary).map_err(|source| WriteError::Io {
                    path: published.clone(),
                    doing: "take back the name of a shard of the run before",
                    source,
                })?;
            }
            let opened = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32)
                .open(&temporary)
                .and_then(|file| Ok((file.metadata()?, file)));
            match opened {
                Ok((metadata, file)) if metadata.is_file() && metadata.len() <= shard.file_bytes => {
                    found.insert(number, (file, metadata));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                _ => {
                    tracing::warn!(file = %temporary.display(), "not this run's shard: written anew");
                    fs::remove_file(&temporary).map_err(|source| WriteError::Io {
                        path: temporary.clone(),
                        doing: "remove a file of the run before",
                        source,
                    })?;
                }
            }
        }
        Ok(found)
    }

    /// Takes over the tensors of an earlier run's journal whose bytes are still what it says; all others are left to be
    /// written. Gives the records that hold, in order. Reads every tensor that is taken over, once.
    ///
    /// # Errors
    /// [`WriteError::Io`] if a shard cannot be read.
    pub fn take_over(&mut self, records: Vec<Record>) -> Result<Vec<Record>, WriteError> {
        let mut held = Vec::with_capacity(records.len());
        let mut scratch = Vec::new();
        for record in records {
            let Some(spec) = self.layout.specs().get(record.tensor) else { continue };
            if spec.name != record.name || self.resumed[record.tensor] {
                continue;
            }
            let checksum = self.read_checksum(record.tensor, &mut scratch)?;
            if Checksum::parse(&record.checksum) != Some(checksum) {
                let name = crate::read::escaped(&record.name);
                tracing::warn!("tensor `{name}`: its bytes are not what the journal says; merging it again");
                continue;
            }
            self.resumed[record.tensor] = true;
            lock(&self.coverage).set_complete(record.tensor, checksum);
            held.push(record);
        }
        Ok(held)
    }

    /// Whether an earlier run has written this tensor.
    pub fn resumed(&self, tensor: usize) -> bool {
        self.resumed.get(tensor).copied().unwrap_or(false)
    }

    /// Keeps a journal from now on: a new one of the run `key`, or the one that is given.
    ///
    /// # Errors
    /// As for [`Journal::create`].
    pub fn start_journal(&self, key: RunKey, journal: Option<Journal>) -> Result<(), WriteError> {
        // Ours from now on, also where it cannot be written to its end.
        lock(&self.made).push(self.path().join(JOURNAL_NAME));
        let journal = match journal {
            Some(journal) => journal,
            None => Journal::create(self.path(), key)?,
        };
        *lock(&self.journal) = Some(journal);
        Ok(())
    }

    /// From now on a drop leaves temporary files and journal, for another run to continue. Without a journal it changes
    /// nothing.
    pub fn keep_unfinished(&self) {
        if lock(&self.journal).is_some() {
            self.keep.store(true, Ordering::Relaxed);
        }
    }

    /// Reserves `bytes` for the side files and some more for index and report, so that a full disk or a quota shows before
    /// the work; [`CheckpointWriter::finish`] gives them free for these files.
    ///
    /// # Errors
    /// [`WriteError::NoSpace`], [`WriteError::Io`].
    pub fn reserve_side_files(&self, bytes: u64) -> Result<(), WriteError> {
        let need = bytes.saturating_add(SPARE_BYTES);
        if let Some(have) = free_bytes(self.path())
            && have < need
        {
            let path = self.dir.shown().to_owned();
            return Err(WriteError::NoSpace { path, need, have: Some(have), source: None });
        }
        let (path, file) = side::create_temporary(self.path(), SPARE_NAME)?;
        lock(&self.made).push(path.clone());
        fault::point("spare.reserve")
            .map_err(|source| WriteError::writing(&path, "reserve space", need, source))?;
        reserve(&path, &file, need, need).map(|_| ())
    }

    /// Keeps states of solves that take long from now on, `bytes` at most at a time, if there is room for them beside the
    /// checkpoint. `run`: hash of the run's key, so that no other run goes on from them.
    pub fn keep_solves(&mut self, run: u128, bytes: u64) {
        let rest = if self.reserved { 0 } else { self.layout.file_bytes() };
        let need = bytes.saturating_add(rest).saturating_add(SPARE_BYTES);
        let store = SolveStore::open(self.dir.path(), run, |tensor| self.resumed(tensor));
        match free_bytes(self.dir.path()) {
            Some(have) if bytes > 0 && have < need => {
                let (need, have) = (Bytes(need), Bytes(have));
                tracing::warn!(
                    "no room for the states of long solves (need {need}, have {have}): a run that ends early can be \
                     continued tensor by tensor only"
                );
                store.clear();
            }
            _ => self.solves = Some(store),
        }
    }

    /// Where the states of a tensor's solves are kept, if they are.
    pub fn solve_place<'a>(&'a self, tensor: usize, name: &'a str) -> Option<SolvePlace<'a>> {
        Some(self.solves.as_ref()?.place(tensor, name))
    }

    /// Takes note that `tensor` is done, with what a run that continues wants to know of it. It enters the journal with the
    /// next [`CheckpointWriter::commit`] that finds all its bytes written. One that an earlier run has written is there.
    pub fn record(&self, tensor: usize, done: Box<RawValue>) {
        if self.resumed(tensor) {
            return;
        }
        lock(&self.pending).push((tensor, done));
    }

    /// Makes the tensors that are recorded and complete durable, then enters them in the journal. Gives their number.
    /// Other threads may write meanwhile; one commit runs at a time.
    ///
    /// # Errors
    /// [`WriteError::NoSpace`], [`WriteError::Io`]: nothing of this commit counts then. [`WriteError::NotDurable`] after a
    /// sync that failed.
    pub fn commit(&self) -> Result<usize, WriteError> {
        let mut journal = lock(&self.journal);
        let Some(journal) = journal.as_mut() else { return Ok(0) };
        let ready: Vec<(usize, Box<RawValue>)> = {
            let coverage = lock(&self.coverage);
            lock(&self.pending).extract_if(.., |(tensor, _)| coverage.complete[*tensor]).collect()
        };
        let shards: std::collections::BTreeSet<usize> =
            ready.iter().filter_map(|(tensor, _)| Some(self.layout.locate(*tensor)?.0)).collect();
        for number in shards {
            self.sync_shard(number)?;
        }
        let mut records = Vec::with_capacity(ready.len());
        for (tensor, done) in ready {
            let checksum = self.checksum(tensor)?.to_string();
            let name = self.layout.specs()[tensor].name.clone();
            records.push(Record { tensor, name, checksum, done });
        }
        if !records.is_empty() {
            journal.append(&records)?;
        }
        if let Some(solves) = &self.solves {
            records.iter().for_each(|record| solves.remove(record.tensor));
        }
        Ok(records.len())
    }

    /// The checksum of a complete tensor: as it was written, or read back where that is not known.
    ///
    /// # Errors
    /// [`WriteError::Io`] if it has to be read and cannot be.
    pub fn checksum(&self, tensor: usize) -> Result<Checksum, WriteError> {
        let known = lock(&self.coverage).checksums[tensor];
        match known {
            Some(checksum) => Ok(checksum),
            None => self.read_checksum(tensor, &mut Vec::new()),
        }
    }

    fn read_checksum(&self, tensor: usize, scratch: &mut Vec<u8>) -> Result<Checksum, WriteError> {
        let spec = &self.layout.specs()[tensor];
        let (number, start) = self.layout.locate(tensor).unwrap_or_default();
        let file = self.file(number)?;
        Checksum::of_bytes(spec, |range, take| {
            scratch.resize((range.end - range.start) as usize, 0);
            file.file.read_exact_at(scratch, start + range.start).map_err(|source| WriteError::Io {
                path: self.shards[number].temporary.clone(),
                doing: "read a tensor back",
                source,
            })?;
            take(scratch);
            Ok(())
        })
    }

    /// The layout that it writes.
    pub fn layout(&self) -> &OutputLayout {
        &self.layout
    }

    /// The output directory, as a canonical path.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Bytes of tensor data written so far, rewrites counted again.
    pub fn bytes_written(&self) -> u64 {
        self.bytes_written.load(Ordering::Relaxed)
    }

    /// Whether whole blocks of any shard pass the page cache by.
    pub fn is_direct(&self) -> bool {
        self.shards.iter().any(|shard| shard.direct)
    }

    /// Where in its file a byte of a tensor goes, if whole blocks of the file pass the page cache by: what a
    /// [`BlockBuffer`](super::BlockBuffer) wants to know. Such writes wait for the disk, so several threads should be at it.
    pub fn direct_place(&self, tensor: usize, offset: u64) -> Option<u64> {
        let (number, start) = self.layout.locate(tensor)?;
        self.shards[number].direct.then(|| start + offset)
    }

    /// Writes `bytes`, encoded as they are to be stored, at `offset` bytes into tensor number `tensor`.
    /// What an earlier run has written stays as it is: the bytes are the same.
    ///
    /// # Errors
    /// [`WriteError::OutOfRange`] if they do not fit the tensor; [`WriteError::NoSpace`] or
    /// [`WriteError::Io`] from the operating system. What was not written does not count, so the call
    /// may be repeated.
    pub fn write_at(&self, tensor: usize, offset: u64, bytes: &[u8]) -> Result<(), WriteError> {
        self.write(tensor, offset, bytes, None)
    }

    /// What [`CheckpointWriter::write_hashed`] wants to know of `bytes` at `offset` bytes into a tensor, which must have them.
    pub fn piece_checksums(&self, tensor: usize, offset: u64, bytes: &[u8]) -> PieceChecksums {
        PieceChecksums::new(offset, bytes, self.layout.specs().get(tensor).map_or(0, |spec| spec.bytes))
    }

    /// As [`CheckpointWriter::write_at`], with the checksums of the bytes.
    ///
    /// # Errors
    /// As there.
    pub fn write_hashed(
        &self,
        tensor: usize,
        offset: u64,
        bytes: &[u8],
        pieces: &PieceChecksums,
    ) -> Result<(), WriteError> {
        self.write(tensor, offset, bytes, Some(pieces))
    }

    fn write(
        &self,
        tensor: usize,
        offset: u64,
        bytes: &[u8],
        pieces: Option<&PieceChecksums>,
    ) -> Result<(), WriteError> {
        let length = bytes.len() as u64;
        let (Some(spec), Some((number, start))) =
            (self.layout.specs().get(tensor), self.layout.locate(tensor))
        else {
            return Err(WriteError::OutOfRange {
                tensor: format!("number {tensor}"),
                offset,
                length,
                bytes: 0,
            });
        };
        let end = match offset.checked_add(length) {
            Some(end) if end <= spec.bytes => end,
            _ => {
                return Err(WriteError::OutOfRange {
                    tensor: spec.name.clone(),
                    offset,
                    length,
                    bytes: spec.bytes,
                });
            }
        };
        if length == 0 || self.resumed[tensor] {
            return Ok(());
        }
        let shard = &self.shards[number];
        let open = self.file(number)?;
        // A later sync has to look again. A failed sync stays failed.
        let _ = shard.durable.compare_exchange(SYNCED, NOT_SYNCED, Ordering::AcqRel, Ordering::Acquire);
        // Hashed first: then the copy into the page cache finds the bytes in this core's.
        let made;
        let pieces = match pieces {
            Some(pieces) => pieces,
            None => {
                made = PieceChecksums::new(offset, bytes, spec.bytes);
                &made
            }
        };
        let cached = fault::point("shard.write")
            .and_then(|()| open.write_all_at(bytes, start + offset))
            .map_err(|source| {
                let need = self.layout.tensor_bytes().saturating_sub(self.bytes_written());
                WriteError::writing(&shard.temporary, "write", need, source)
            })?;
        self.bytes_written.fetch_add(length, Ordering::Relaxed);
        lock(&self.coverage).add(tensor, offset..end, spec, &Hashed { offset, bytes, pieces });
        if shard.dirty.fetch_add(cached, Ordering::Relaxed) + cached >= WRITE_BACK_BYTES {
            shard.dirty.store(0, Ordering::Relaxed);
            // On Linux this starts writing the file's dirty pages without waiting, and drops clean ones.
            // Only advice.
            let _ = rustix::fs::fadvise(&open.file, 0, None, Advice::DontNeed);
        }
        Ok(())
    }

    /// Writes a small file and gives it its final name at once. If the run fails later, it is taken
    /// back.
    ///
    /// # Errors
    /// [`WriteError::BadSideName`], [`WriteError::NameTaken`], [`WriteError::NoSpace`] or
    /// [`WriteError::Io`].
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
        self.check_side_name(name)?;
        let temporary = side::stage(self.path(), &SideFile::new(name, bytes))?;
        lock(&self.made).push(temporary.clone());
        let path = self.path().join(name);
        side::rename_free(&temporary, &path)?;
        lock(&self.made).push(path);
        sync_directory(self.path())
    }

    /// Checks that every tensor is complete and waits until every shard is on disk. `finish` does it
    /// too; done before, its time can stand in the report that `finish` publishes.
    ///
    /// # Errors
    /// [`WriteError::Incomplete`]; [`WriteError::NoSpace`] or [`WriteError::Io`] if the data cannot be
    /// made durable, after which every further attempt is [`WriteError::NotDurable`].
    pub fn sync(&self) -> Result<(), WriteError> {
        lock(&self.coverage).check_complete(&self.layout)?;
        for (number, shard) in self.shards.iter().enumerate() {
            if shard.durable.load(Ordering::Acquire) != SYNCED {
                self.sync_shard(number)?;
                shard.durable.store(SYNCED, Ordering::Release);
            }
        }
        Ok(())
    }

    /// Waits until what was written to a shard before the call is on disk.
    fn sync_shard(&self, number: usize) -> Result<(), WriteError> {
        let shard = &self.shards[number];
        if shard.durable.load(Ordering::Acquire) == SYNC_FAILED {
            return Err(WriteError::NotDurable { path: shard.temporary.clone() });
        }
        let open = self.file(number)?;
        fault::point("shard.fsync").and_then(|()| open.file.sync_data()).map_err(|source| {
            // The kernel forgets a failed page once it has told us: a second fsync may lie.
            shard.durable.store(SYNC_FAILED, Ordering::Release);
            let need = self.layout.shards()[number].file_bytes;
            WriteError::writing(&shard.temporary, "fsync", need, source)
        })
    }

    /// Publishes the checkpoint: `before_index` (config, tokenizer, model card, …), the shards, the
    /// index where there are several, and `last` (the run's record), in this order. Everything is on
    /// disk before the first rename. If a step fails, what was renamed is removed again.
    ///
    /// # Errors
    /// As for [`CheckpointWriter::sync`]; [`WriteError::BadSideName`] for a side file whose name is not
    /// its own; [`WriteError::NameTaken`] if a final name is no longer free.
    pub fn finish(
        mut self,
        before_index: Vec<SideFile>,
        last: SideFile,
    ) -> Result<WrittenCheckpoint, WriteError> {
        let mut names = HashSet::new();
        for file in before_index.iter().chain([&last]) {
            self.check_side_name(&file.name)?;
            if !names.insert(file.name.as_str()) {
                return Err(WriteError::BadSideName { name: file.name.clone(), why: "given twice" });
            }
        }
        self.sync()?;
        self.dir.sync_created()?;
        // The place of what comes now, if it was reserved.
        let _ = fs::remove_file(self.path().join(side::temporary_name(SPARE_NAME)));
        let mut first = before_index.iter().map(|file| self.stage(file)).collect::<Result<Vec<_>, _>>()?;
        let index = match self.layout.index_json() {
            Some(bytes) => Some(self.stage(&SideFile::new(INDEX_NAME, bytes))?),
            None => None,
        };
        let last = self.stage(&last)?;
        for (shard, layout) in self.shards.iter().zip(self.layout.shards()) {
            first.push((shard.temporary.clone(), layout.file_name.clone()));
        }
        // Each step is on disk before the next begins: after a power cut an index has all its shards,
        // too.
        for step in [first, index.into_iter().collect(), vec![last]] {
            for (temporary, name) in &step {
                let path = self.path().join(name);
                side::rename_free(temporary, &path)?;
                lock(&self.made).push(path);
            }
            if !step.is_empty() {
                sync_directory(self.path())?;
            }
        }
        lock(&self.made).clear();
        if lock(&self.journal).take().is_some() {
            // Complete without it: a name that stays is in nobody's way.
            let _ = fs::remove_file(self.path().join(JOURNAL_NAME));
        }
        if let Some(solves) = &self.solves {
            solves.clear();
        }
        self.dir.keep();
        let files: Vec<WrittenFile> = (self.layout.shards().iter())
            .map(|shard| WrittenFile { name: shard.file_name.clone(), bytes: shard.file_bytes })
            .collect();
        Ok(WrittenCheckpoint { directory: self.path().to_owned(), bytes: self.layout.file_bytes(), files })
    }

    /// Prepares a side file: its temporary path and its final name.
    fn stage(&self, file: &SideFile) -> Result<(PathBuf, String), WriteError> {
        let temporary = side::stage(self.path(), file)?;
        lock(&self.made).push(temporary.clone());
        Ok((temporary, file.name.clone()))
    }

    fn check_side_name(&self, name: &str) -> Result<(), WriteError> {
        side::check_name(name)?;
        if self.layout.owns(name) {
            return Err(WriteError::BadSideName { name: name.to_owned(), why: "it is the checkpoint's own" });
        }
        Ok(())
    }

    /// The shard's file, opened again if it had to give way to others.
    ///
    /// Closing a file loses no write error: Linux keeps it with the file and tells whoever next calls
    /// fsync on it.
    fn file(&self, number: usize) -> Result<Arc<OpenShard>, WriteError> {
        {
            let mut open = lock(&self.open);
            if let Some(position) = open.iter().position(|&(held, _)| held == number)
                && let Some(entry) = open.remove(position)
            {
                let file = Arc::clone(&entry.1);
                open.push_back(entry);
                return Ok(file);
            }
        }
        let shard = &self.shards[number];
        let replaced = || WriteError::TemporaryReplaced { path: shard.temporary.clone() };
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(&shard.temporary)
            .and_then(|file| Ok((file.metadata()?, file)));
        let (metadata, file) = match opened {
            Ok(opened) => opened,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(replaced()),
            Err(source) => {
                return Err(WriteError::Io {
                    path: shard.temporary.clone(),
                    doing: "open a temporary file again",
                    source,
                });
            }
        };
        if (metadata.dev(), metadata.ino()) != shard.identity {
            return Err(replaced());
        }
        let file_bytes = self.layout.shards()[number].file_bytes;
        let open = Arc::new(OpenShard::new(&shard.temporary, file, file_bytes));
        self.remember_open(number, Arc::clone(&open));
        Ok(open)
    }

    fn remember_open(&self, number: usize, file: Arc<OpenShard>) {
        let mut open = lock(&self.open);
        while open.len() >= self.most_open {
            open.pop_front(); // the one unused for longest; threads that still write hold it by their Arc
        }
        open.push_back((number, file));
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        // Backwards, so that the record and the index go before what they vouch for.
        let made: Vec<PathBuf> = lock(&self.made).drain(..).rev().collect();
        if !self.keep.load(Ordering::Relaxed) {
            for path in made {
                let _ = fs::remove_file(path);
            }
            if let Some(solves) = &self.solves {
                solves.clear();
            }
            return;
        }
        // Only shards and journal stay, the shards under names that promise nothing.
        for path in made {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let shard_name =
                name.strip_prefix(TEMPORARY_PREFIX).and_then(|n| n.strip_suffix(TEMPORARY_SUFFIX));
            let is_shard = |name: &str| self.layout.shards().iter().any(|shard| shard.file_name == name);
            if name == JOURNAL_NAME || shard_name.is_some_and(is_shard) {
                continue;
            }
            let _ = if is_shard(&name) {
                fs::rename(&path, self.path().join(side::temporary_name(&name)))
            } else {
                fs::remove_file(&path)
            };
        }
        // `dir` is dropped next: it unlocks and removes the directory if we made it.
    }
}

/// A panic in one writing thread does not make the others' records wrong.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
