//! Several checkpoints in one output directory, each in a directory of its own that appears complete or not at all.
//!
//! The engine claims the outer directory ([`SweepDir`]), opens a [`CheckpointWriter`] for each name, completes one after
//! the other under temporary directory names, and publishes: all of them are renamed, then the record is written. A
//! failure at any point takes back what this run made, and nothing else.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use super::error::{WriteError, free_bytes};
use super::output_dir::{OutputDir, sync_directory};
use super::shard::{CheckpointWriter, MAX_OPEN, SPARE_BYTES, WrittenCheckpoint};
use super::side::{self, SideFile};
use crate::plan::shards::OutputLayout;

/// Shards kept open by all writers together, beside one that each needs.
const OPEN_IN_ALL: usize = 64;

/// A claimed directory for the checkpoints of a sweep.
#[derive(Debug)]
pub struct SweepDir {
    dir: OutputDir,
    made: Vec<Made>,
}

/// A directory of ours that is complete.
#[derive(Debug)]
struct Made {
    /// Where it is: under its temporary name, then under its final one.
    path: PathBuf,
    name: String,
    /// Everything we put into it.
    files: BTreeSet<String>,
}

impl SweepDir {
    /// As [`OutputDir::claim`].
    ///
    /// # Errors
    /// As there.
    pub fn claim(path: &std::path::Path, inputs: &[PathBuf]) -> Result<Self, WriteError> {
        Ok(Self { dir: OutputDir::claim(path, inputs)?, made: Vec::new() })
    }

    /// A writer for each of `names`, which are plain file names, all of one layout.
    ///
    /// # Errors
    /// As [`CheckpointWriter::create`], for the space that all of them need; [`WriteError::BadSideName`] for a name that
    /// is no directory's own.
    pub fn writers(
        &self,
        names: &[&str],
        layout: &Arc<OutputLayout>,
    ) -> Result<Vec<CheckpointWriter>, WriteError> {
        let each = layout.file_bytes().saturating_add(SPARE_BYTES);
        let need = each.saturating_mul(names.len() as u64);
        if let Some(have) = free_bytes(self.dir.path())
            && have < need
        {
            return Err(WriteError::NoSpace {
                path: self.dir.shown().to_owned(),
                need,
                have: Some(have),
                source: None,
            });
        }
        let open = (OPEN_IN_ALL / names.len().max(1)).clamp(1, MAX_OPEN);
        names
            .iter()
            .map(|name| {
                side::check_name(name)?;
                let path = self.dir.path().join(side::temporary_name(name));
                let dir = OutputDir::claim(&path, &[])?;
                CheckpointWriter::with_open_files(dir, Arc::clone(layout), open)
            })
            .collect()
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
            files.insert(crate::plan::shards::INDEX_NAME.to_owned());
        }
        files.extend(shards.into_iter().map(|file| file.name));
        self.made.push(Made { path: directory, name: name.to_owned(), files });
        Ok(())
    }

    /// Gives every completed checkpoint its final name, then writes `record`, which says that all are there.
    ///
    /// # Errors
    /// [`WriteError::NameTaken`], [`WriteError::NoSpace`] or [`WriteError::Io`]; nothing is left under a final name then.
    pub fn publish(mut self, record: &SideFile) -> Result<(), WriteError> {
        for made in &mut self.made {
            let path = self.dir.path().join(&made.name);
            side::rename_free(&made.path, &path)?;
            made.path = path;
        }
        sync_directory(self.dir.path())?;
        self.dir.place(record)?;
        self.made.clear();
        self.dir.keep();
        Ok(())
    }
}

impl Drop for SweepDir {
    fn drop(&mut self) {
        // File by file: what somebody else put there keeps its directory.
        for made in self.made.drain(..).rev() {
            // The record first: it says that the directory is complete.
            let (record, rest): (Vec<_>, Vec<_>) =
                made.files.iter().partition(|name| *name == crate::report::REPORT_FILE);
            for name in record.into_iter().chain(rest) {
                let _ = fs::remove_file(made.path.join(name));
            }
            let _ = fs::remove_dir(&made.path);
        }
        // `dir` is dropped next: it unlocks and removes the directories it made.
    }
}
