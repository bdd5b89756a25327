//! Several checkpoints in one output directory, each in a directory of its own that appears complete or not at all.
//!
//! The engine claims the outer directory ([`SweepDir`]), opens a writer in the directory of each checkpoint
//! ([`SweepDir::place_of`]), completes one after the other under temporary directory names, and publishes: all of them are
//! renamed, then the record is written. The outer directory has a journal that says which sweep it is, each inner one its
//! own with its tensors; a failure takes back what this run made, and nothing else, unless another run can continue it
//! ([`SweepDir::keep_unfinished`]).

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::error::WriteError;
use super::fault;
use super::journal::{self, Journal, RunKey};
use super::output_dir::{JOURNAL_NAME, OutputDir, sync_directory};
use super::shard::{CheckpointWriter, SPARE_BYTES, WrittenCheckpoint};
use super::side::{self, SideFile};
use super::space::free_bytes;
use crate::plan::shards::{INDEX_NAME, OutputLayout};
use crate::report::{REPORT_FILE, SWEEP_FILE};

/// A claimed directory for the checkpoints of a sweep.
#[derive(Debug)]
pub struct SweepDir {
    dir: OutputDir,
    made: Vec<Made>,
    /// Leave what another run can continue.
    keep: bool,
    /// The journal is this run's to remove.
    journal: bool,
}

/// A directory of ours that is complete.
#[derive(Debug)]
struct Made {
    /// Where it is: under its temporary name, then under its final one.
    path: PathBuf,
    name: String,
    /// Everything we put into it; nothing where a run before this one did.
    files: BTreeSet<String>,
}

impl SweepDir {
    /// Claims `path` for the checkpoints `names`, which are plain file names. With `resume`, a directory that holds the
    /// journal of the sweep `key` will do, with checkpoints that are complete or begun.
    ///
    /// # Errors
    /// As [`OutputDir::claim`] and [`OutputDir::claim_unfinished`]; [`WriteError::OtherRun`] for the journal of another
    /// run; [`WriteError::BadSideName`] for a name that is no directory's own.
    pub fn claim(
        path: &Path,
        inputs: &[PathBuf],
        names: &[&str],
        key: RunKey,
        resume: bool,
    ) -> Result<Self, WriteError> {
        for name in names {
            side::check_name(name)?;
        }
        let own = |found: &str| {
            found == SWEEP_FILE || names.iter().any(|n| found == *n || found == side::temporary_name(n))
        };
        let dir = match resume {
            true => OutputDir::claim_unfinished(path, inputs, &own)?,
            false => OutputDir::claim(path, inputs)?,
        };
        let mut claimed = Self { dir, made: Vec::new(), keep: false, journal: false };
        if claimed.dir.unfinished() {
            claimed.keep = true;
            let found = journal::read(claimed.dir.path())?;
            if let Some(what) = found.key.as_ref().and_then(|before| key.difference(before)) {
                return Err(WriteError::OtherRun { path: path.to_owned(), what });
            }
            claimed.remove_record()?;
            if found.key.is_none() {
                journal::discard(claimed.dir.path())?;
                Journal::create(claimed.dir.path(), key)?;
            }
        } else {
            // Removed again if it cannot be made whole.
            claimed.journal = true;
            Journal::create(claimed.dir.path(), key)?;
        }
        claimed.journal = true;
        Ok(claimed)
    }

    /// The record is the last thing a sweep writes, so one that did not end has none that means something.
    fn remove_record(&self) -> Result<(), WriteError> {
        for name in [SWEEP_FILE.to_owned(), side::temporary_name(SWEEP_FILE)] {
            let path = self.dir.path().join(name);
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(WriteError::Io { path, doing: "remove a file of the run before", source });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Where the checkpoint `name` is complete already, by a run before this one.
    pub fn complete_before(&self, name: &str) -> Option<PathBuf> {
        let places = [self.dir.path().join(name), self.place_of(name)];
        places.into_iter().find(|place| place.join(REPORT_FILE).is_file())
    }

    /// The directory in which the checkpoint `name` is made.
    pub fn place_of(&self, name: &str) -> PathBuf {
        self.dir.path().join(side::temporary_name(name))
    }

    /// Whether there is room for the checkpoints `names` of this layout, what they have of it already aside.
    ///
    /// # Errors
    /// [`WriteError::NoSpace`].
    pub fn check_space(&self, names: &[&str], layout: &OutputLayout) -> Result<(), WriteError> {
        let each = layout.file_bytes().saturating_add(SPARE_BYTES);
        let need = names.iter().fold(0u64, |need, name| {
            need.saturating_add(each.saturating_sub(allocated(&self.place_of(name))))
        });
        match free_bytes(self.dir.path()) {
            Some(have) if have < need => Err(WriteError::NoSpace {
                path: self.dir.shown().to_owned(),
                need,
                have: Some(have),
                source: None,
            }),
            _ => Ok(()),
        }
    }

    /// Completes one checkpoint under its temporary directory name, as [`CheckpointWriter::finish`].
    ///
    /// # Errors
    /// As there.
    pub fn complete(
        &mut self,
        name: &str,
        writer: CheckpointWriter,
        before_index: Vec<SideFile>,
        last: SideFile,
    ) -> Result<(), WriteError> {
        let mut files: BTreeSet<String> =
            before_index.iter().chain([&last]).map(|file| file.name.clone()).collect();
        let WrittenCheckpoint { directory, files: shards, .. } = writer.finish(before_index, last)?;
        if shards.len() > 1 {
            files.insert(INDEX_NAME.to_owned());
        }
        files.extend(shards.into_iter().map(|file| file.name));
        self.made.push(Made { path: directory, name: name.to_owned(), files });
        Ok(())
    }

    /// Takes over a checkpoint that [`SweepDir::complete_before`] found at `path`.
    pub fn take_over(&mut self, name: &str, path: PathBuf) {
        OutputDir::tidy(&path);
        self.made.push(Made { path, name: name.to_owned(), files: BTreeSet::new() });
    }

    /// From now on a drop leaves everything for another run to continue.
    pub fn keep_unfinished(&mut self) {
        self.keep = true;
    }

    /// Gives every completed checkpoint its final name, then writes `record`, which says that all are there.
    ///
    /// # Errors
    /// [`WriteError::NameTaken`], [`WriteError::NoSpace`] or [`WriteError::Io`]; nothing is left under a final name then,
    /// unless it is kept for another run.
    pub fn publish(mut self, record: &SideFile) -> Result<(), WriteError> {
        for made in &mut self.made {
            let path = self.dir.path().join(&made.name);
            if made.path == path {
                continue;
            }
            fault::point("rename.model").map_err(|source| {
                WriteError::writing(&path, "rename a directory to its final name", 4096, source)
            })?;
            side::rename_free(&made.path, &path)?;
            made.path = path;
        }
        sync_directory(self.dir.path())?;
        self.dir.place(record)?;
        self.made.clear();
        self.dir.keep();
        // Complete without it: a name that stays is in nobody's way.
        self.journal = false;
        let _ = fs::remove_file(self.dir.path().join(JOURNAL_NAME));
        Ok(())
    }
}

/// Bytes that the files of a directory take on the disk.
fn allocated(directory: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    entries
        .filter_map(|entry| entry.ok()?.metadata().ok())
        .filter(fs::Metadata::is_file)
        .map(|metadata| metadata.blocks() * 512)
        .sum()
}

impl Drop for SweepDir {
    fn drop(&mut self) {
        if self.keep {
            // `dir` unlocks: it cannot remove what is not empty.
            return;
        }
        // File by file: what somebody else put there keeps its directory.
        for made in self.made.drain(..).rev() {
            // The record first: it says that the directory is complete.
            let (record, rest): (Vec<_>, Vec<_>) = made.files.iter().partition(|name| *name == REPORT_FILE);
            for name in record.into_iter().chain(rest) {
                let _ = fs::remove_file(made.path.join(name));
            }
            let _ = fs::remove_dir(&made.path);
        }
        if self.journal {
            let _ = fs::remove_file(self.dir.path().join(JOURNAL_NAME));
        }
        // `dir` is dropped next: it unlocks and removes the directories it made.
    }
}
