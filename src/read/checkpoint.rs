//! One model as the rest of the program sees it: a list of named tensors, wherever their bytes lie.
//!
//! The planner opens a [`Checkpoint`] for each model and reads its list; the engine reads byte ranges of
//! tensors. Opening reads headers, the shard index and `config.json`, never a tensor's data. Nothing here
//! depends on what a tensor is called, and nothing is merged here.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::dtype::Dtype;
use super::file::{InputFile, IoMode, read_small_file};
use super::header::{Header, read_header};
use super::index::Index;
use super::{CONVERT, MAX_MODEL_CONFIG_BYTES, MAX_TENSORS, PICKLED, ReadError, escaped};

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
const INDEX_SUFFIX: &str = ".index.json";
const CONFIG_FILE: &str = "config.json";
/// How many names a warning lists before it only counts.
const LISTED: usize = 10;

/// What a header says of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMeta {
    /// The tensor's name: opaque, foreign text. Never a path; shown only through [`escaped`].
    pub name: String,
    /// Element type as stored.
    pub dtype: Dtype,
    /// Dimensions, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Place of the tensor's file in [`Checkpoint::files`].
    pub file: usize,
    /// First byte, counted from the beginning of the file. Not necessarily a multiple of the element's size.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

impl TensorMeta {
    /// Number of elements; 1 for a scalar. The header's check keeps the product from overflowing.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|dim| *dim as u64).product()
    }
}

/// A model's tensors in one or many safetensors files.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    directory: Option<PathBuf>,
    files: Vec<InputFile>,
    /// By file, then offset.
    tensors: Vec<TensorMeta>,
    /// Places in `tensors`, by name. At most [`MAX_TENSORS`], so `u32` holds them.
    by_name: Vec<u32>,
    config: Option<serde_json::Value>,
    metadata: BTreeMap<String, String>,
    warnings: Vec<String>,
    left_out: Vec<String>,
    header_bytes: u64,
}

impl Checkpoint {
    /// Opens an HF directory, a single safetensors file, or the directory of an `*.index.json`.
    ///
    /// In a directory, `model.safetensors.index.json` comes first, then `model.safetensors`, then the one
    /// `*.safetensors` that is there.
    ///
    /// # Errors
    /// Everything that can be wrong with a path, an index or a header, each naming file and tensor;
    /// [`ReadError::NoCheckpoint`] where there is none, with a hint for pickled weights.
    pub fn open(path: &Path, io: IoMode) -> Result<Self, ReadError> {
        let found = fs::metadata(path).map_err(|source| ReadError::Open { path: path.to_owned(), source })?;
        let source = if found.is_dir() {
            Source::of_directory(path)?
        } else if path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(INDEX_SUFFIX)) {
            Source::Sharded { index: path.to_owned(), directory: parent(path) }
        } else if path.extension().and_then(|e| e.to_str()).is_some_and(|e| PICKLED.contains(&e)) {
            let detail = format!("got pickled weights by its name, expected safetensors; {CONVERT}");
            return Err(ReadError::NoCheckpoint { path: path.to_owned(), detail });
        } else {
            Source::File { file: path.to_owned(), directory: None }
        };

        let mut checkpoint = Self {
            path: path.to_owned(),
            directory: None,
            files: Vec::new(),
            tensors: Vec::new(),
            by_name: Vec::new(),
            config: None,
            metadata: BTreeMap::new(),
            warnings: Vec::new(),
            left_out: Vec::new(),
            header_bytes: 0,
        };
        match source {
            Source::File { file, directory } => {
                let header = checkpoint.add_file(&file, io)?;
                checkpoint.tensors = header.tensors;
                checkpoint.directory = directory;
            }
            Source::Sharded { index, directory } => {
                checkpoint.add_shards(&index, &directory, io)?;
                checkpoint.directory = Some(directory);
            }
        }
        let tensors = &checkpoint.tensors;
        checkpoint.by_name = (0..tensors.len() as u32).collect();
        checkpoint.by_name.sort_unstable_by_key(|at| tensors[*at as usize].name.as_str());
        if let Some(directory) = &checkpoint.directory {
            checkpoint.config = read_config(&directory.join(CONFIG_FILE))?;
        }
        Ok(checkpoint)
    }

    /// Opens one file and takes from its header all but the tensors.
    fn add_file(&mut self, path: &Path, io: IoMode) -> Result<Header, ReadError> {
        let file = InputFile::open(path, io)?;
        let mut header = read_header(&file, self.files.len())?;
        self.files.push(file);
        self.header_bytes += header.header_bytes;
        self.warnings.append(&mut header.warnings);
        for (key, value) in std::mem::take(&mut header.metadata) {
            self.metadata.entry(key).or_insert(value);
        }
        Ok(header)
    }

    /// Opens every shard that the index names and keeps the tensors that the index places there.
    fn add_shards(&mut self, index_path: &Path, directory: &Path, io: IoMode) -> Result<(), ReadError> {
        let index = Index::read(index_path)?;
        let mut found = vec![false; index.len()];
        for (shard, name) in index.shards.iter().enumerate() {
            let header = self.add_file(&directory.join(name), io)?;
            let (mut unlisted, mut elsewhere) = (Vec::new(), Vec::new());
            for tensor in header.tensors {
                match index.find(&tensor.name) {
                    Some((at, home)) if home == shard => {
                        found[at] = true;
                        self.tensors.push(tensor);
                    }
                    Some(_) => elsewhere.push(tensor.name),
                    None => unlisted.push(tensor.name),
                }
                if self.tensors.len() > MAX_TENSORS {
                    return Err(ReadError::TooManyTensors { path: self.path.clone(), limit: MAX_TENSORS });
                }
            }
            let shard_path = self.files[shard].path();
            let warnings = [
                (&unlisted, "left out, as the index lacks them"),
                (&elsewhere, "left out here, as the index places them in another shard"),
            ];
            for (names, why) in warnings.into_iter().filter(|(names, _)| !names.is_empty()) {
                self.warnings.push(format!("{}: {why}: {}", shard_path.display(), listed(names)));
            }
            self.left_out.append(&mut unlisted);
        }
        match found.iter().position(|found| !found) {
            None => Ok(()),
            Some(at) => {
                let (key, shard) = index.entry(at);
                let path = index_path.to_owned();
                Err(ReadError::IndexMismatch { path, key: key.to_owned(), shard: shard.to_owned() })
            }
        }
    }

    /// The path as it was given to [`Checkpoint::open`].
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every tensor, by file and then by offset: reading them in this order reads each file once, forwards.
    pub fn tensors(&self) -> &[TensorMeta] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<&TensorMeta> {
        let name_of = |at: &u32| self.tensors[*at as usize].name.as_str();
        let at = self.by_name.binary_search_by(|at| name_of(at).cmp(name)).ok()?;
        self.tensors.get(self.by_name[at] as usize)
    }

    /// The files, in the order of their names.
    pub fn files(&self) -> &[InputFile] {
        &self.files
    }

    /// The directory's `config.json`, if it has one.
    pub fn config(&self) -> Option<&serde_json::Value> {
        self.config.as_ref()
    }

    /// The directory that holds config and tokenizer; `None` for a single file.
    pub fn directory(&self) -> Option<&Path> {
        self.directory.as_deref()
    }

    /// The headers' free-form strings; where two files differ, the first one's.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// What was accepted but should be known, one line each, naming the file.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Names of the tensors that a shard has and the index lacks.
    pub fn left_out(&self) -> &[String] {
        &self.left_out
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.iter().fold(0u64, |sum, tensor| sum.saturating_add(tensor.bytes))
    }

    /// Bytes of all headers: what the metadata in memory is in proportion to.
    pub fn header_bytes(&self) -> u64 {
        self.header_bytes
    }

    /// Bytes of a tensor as stored. `byte_range` counts from the tensor's first byte.
    ///
    /// # Errors
    /// As [`InputFile::bytes`]; a range outside the tensor names the tensor.
    pub fn read<'a>(
        &'a self,
        tensor: &TensorMeta,
        byte_range: Range<u64>,
        scratch: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], ReadError> {
        let file = &self.files[tensor.file];
        match within(tensor.offset, tensor.bytes, &byte_range) {
            Some(range) => file.bytes(range, scratch),
            None => Err(ReadError::RangePastEnd {
                path: file.path().to_owned(),
                tensor: Some(tensor.name.clone()),
                start: byte_range.start,
                end: byte_range.end,
                len: tensor.bytes,
            }),
        }
    }

    /// Asks the kernel to read a part of a tensor ahead. See [`InputFile::will_need`].
    pub fn will_need(&self, tensor: &TensorMeta, byte_range: Range<u64>) {
        if let Some(range) = within(tensor.offset, tensor.bytes, &byte_range) {
            self.files[tensor.file].will_need(range);
        }
    }

    /// Gives back a part of a tensor that has been read. See [`InputFile::release`].
    pub fn release(&self, tensor: &TensorMeta, byte_range: Range<u64>, drop_cache: bool) {
        if let Some(range) = within(tensor.offset, tensor.bytes, &byte_range) {
            self.files[tensor.file].release(range, drop_cache);
        }
    }

    /// Compares every file with the one that was opened.
    ///
    /// # Errors
    /// [`ReadError::Changed`] for the first that differs.
    pub fn check_unchanged(&self) -> Result<(), ReadError> {
        self.files.iter().try_for_each(InputFile::check_unchanged)
    }
}

/// A range inside a tensor as a range of its file; `None` if it is not inside.
pub(crate) fn within(offset: u64, bytes: u64, range: &Range<u64>) -> Option<Range<u64>> {
    (range.start <= range.end && range.end <= bytes).then(|| offset + range.start..offset + range.end)
}

/// Names for a warning, escaped, at most [`LISTED`] of them.
fn listed(names: &[String]) -> String {
    let mut text =
        names.iter().take(LISTED).map(|name| format!("`{}`", escaped(name))).collect::<Vec<_>>().join(", ");
    if names.len() > LISTED {
        text.push_str(&format!(" and {} more", names.len() - LISTED));
    }
    text
}

/// The directory of a file, as a path that can be opened.
fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Reads a directory's `config.json`; its absence is no error, its being malformed is.
fn read_config(path: &Path) -> Result<Option<serde_json::Value>, ReadError> {
    match read_small_file(path, MAX_MODEL_CONFIG_BYTES)? {
        None => Ok(None),
        Some(json) => serde_json::from_slice(&json)
            .map(Some)
            .map_err(|source| ReadError::ModelConfig { path: path.to_owned(), source }),
    }
}

/// Where a checkpoint's tensors are.
enum Source {
    File { file: PathBuf, directory: Option<PathBuf> },
    Sharded { index: PathBuf, directory: PathBuf },
}

impl Source {
    fn of_directory(path: &Path) -> Result<Self, ReadError> {
        let directory = path.to_owned();
        // A dangling link counts as there: opening it then says what is wrong.
        let is_there = |name| fs::symlink_metadata(path.join(name)).is_ok();
        if is_there(INDEX_FILE) {
            return Ok(Self::Sharded { index: path.join(INDEX_FILE), directory });
        }
        if is_there(SINGLE_FILE) {
            return Ok(Self::File { file: path.join(SINGLE_FILE), directory: Some(directory) });
        }

        let failed = |source| ReadError::Io { path: path.to_owned(), doing: "listing", source };
        let (mut safetensors, mut pickled) = (Vec::new(), None);
        for entry in fs::read_dir(path).map_err(|source| ReadError::Open { path: path.to_owned(), source })? {
            let name = PathBuf::from(entry.map_err(failed)?.file_name());
            match name.extension().and_then(|extension| extension.to_str()) {
                Some("safetensors") => safetensors.push(name),
                Some(extension) if PICKLED.contains(&extension) => pickled = Some(name),
                _ => {}
            }
        }
        safetensors.sort_unstable();
        let detail = match (safetensors.as_slice(), pickled) {
            ([file], _) => {
                return Ok(Self::File { file: path.join(file), directory: Some(directory) });
            }
            ([], Some(pickled)) => format!(
                "got pickled weights (`{}`), expected safetensors; {CONVERT}",
                escaped(&pickled.to_string_lossy())
            ),
            ([], None) => {
                format!("got no *.safetensors file, expected {SINGLE_FILE} or {INDEX_FILE}")
            }
            (files, _) => {
                let names: Vec<String> =
                    files.iter().map(|name| name.to_string_lossy().into_owned()).collect();
                format!(
                    "got {} *.safetensors files and no {INDEX_FILE}, expected one file or an index ({})",
                    files.len(),
                    listed(&names)
                )
            }
        };
        Err(ReadError::NoCheckpoint { path: directory, detail })
    }
}

#[cfg(test)]
mod tests;
