//! The small files beside the weights: staged under a temporary name, made durable, renamed.
//!
//! Also which of them are taken over from the base model, and the two settings of `config.json` that a
//! merge can make untrue. Nothing here reads a tensor.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::error::WriteError;
use super::fault;
use super::output_dir::{TEMPORARY_PREFIX, TEMPORARY_SUFFIX};
use crate::plan::shards::INDEX_NAME;
use crate::report::REPORT_FILE;
use crate::tokenizer::TOKENIZER_FILES;

/// A file of the base model longer than this is not taken for a side file.
const MAX_COPY_BYTES: u64 = 256 << 20;

/// Taken over from the base model where it has them, beside the tokenizer's: what mergekit copies, and what other
/// processors of the same models need.
const COPIED: &[&str] = &[
    "config.json",
    "generation_config.json",
    // images, sound, video
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "feature_extractor_config.json",
    "video_preprocessor_config.json",
];

/// A file beside the weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SideFile {
    /// Its final name in the output directory: one plain component.
    pub name: String,
    /// What it will hold.
    pub content: SideContent,
}

/// Where a side file's bytes come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SideContent {
    /// Here they are.
    Bytes(Vec<u8>),
    /// Copied, in small pieces, when the file is written.
    Copy {
        /// The file to copy; symbolic links are followed, as in a Hugging Face cache.
        from: PathBuf,
        /// Its length when it was listed.
        bytes: u64,
    },
}

impl SideFile {
    /// A file with these bytes.
    pub fn new(name: impl Into<String>, bytes: impl Into<Vec<u8>>) -> Self {
        Self { name: name.into(), content: SideContent::Bytes(bytes.into()) }
    }

    /// A file with this value as indented JSON and a final newline.
    pub fn json(name: impl Into<String>, value: &Value) -> Self {
        let mut text = format!("{value:#}");
        text.push('\n');
        Self::new(name, text)
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        match &self.content {
            SideContent::Bytes(bytes) => bytes.len() as u64,
            SideContent::Copy { bytes, .. } => *bytes,
        }
    }
}

/// The side files that `base` (a model's directory) has, to be copied verbatim. What it lacks is left
/// out, and so is what is not a regular file.
///
/// # Errors
/// [`WriteError::SideFileTooLarge`]; [`WriteError::SideFileUnreadable`].
pub fn copy_side_files(base: &Path) -> Result<Vec<SideFile>, WriteError> {
    let mut files = Vec::new();
    for name in COPIED.iter().chain(&TOKENIZER_FILES).copied() {
        let from = base.join(name);
        // Followed: caches link to their blobs.
        let metadata = match fs::metadata(&from) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if from.is_symlink() {
                    tracing::warn!(file = %from.display(), "left out: a symbolic link to nothing");
                }
                continue;
            }
            Err(source) => {
                return Err(WriteError::SideFileUnreadable { path: from, source });
            }
        };
        if !metadata.is_file() {
            tracing::warn!(file = %from.display(), "left out: not a regular file");
            continue;
        }
        // Now, not when everything has been merged.
        if let Err(source) = open_to_copy(&from) {
            return Err(WriteError::SideFileUnreadable { path: from, source });
        }
        let bytes = metadata.len();
        if bytes > MAX_COPY_BYTES {
            return Err(WriteError::SideFileTooLarge { path: from, bytes, limit: MAX_COPY_BYTES });
        }
        files.push(SideFile { name: name.to_owned(), content: SideContent::Copy { from, bytes } });
    }
    Ok(files)
}

/// What PyTorch calls a floating-point dtype of safetensors: `BF16` is `bfloat16`. `None` for every
/// other dtype.
pub fn torch_dtype_name(dtype: &str) -> Option<&'static str> {
    Some(match dtype {
        "F64" => "float64",
        "F32" => "float32",
        "F16" => "float16",
        "BF16" => "bfloat16",
        _ => return None,
    })
}

/// `config.json` with what the merge made untrue put right, its keys in their order; `None` where it is
/// true already, so that the file can be copied verbatim.
///
/// - `torch_dtype`: the output's float dtype, where it has a single one. It replaces `torch_dtype` or
///   `dtype` where they name a float dtype, in nested `*_config` objects too (but not in
///   `quantization_config`). A config that says nothing is left saying nothing.
/// - `tie`: whether the output's embeddings are tied; written even where the key was absent, since
///   defaults differ.
pub fn patch_config(config: &Value, torch_dtype: Option<&str>, tie: Option<bool>) -> Option<Value> {
    let mut patched = config.clone();
    let root = patched.as_object_mut()?;
    if let Some(dtype) = torch_dtype {
        patch_dtype(root, dtype);
    }
    if let Some(tie) = tie {
        root.insert("tie_word_embeddings".to_owned(), tie.into());
        for (_, nested) in nested_configs(root) {
            if let Some(value) = nested.get_mut("tie_word_embeddings") {
                *value = tie.into();
            }
        }
    }
    (patched != *config).then_some(patched)
}

fn patch_dtype(config: &mut Map<String, Value>, dtype: &str) {
    for key in ["torch_dtype", "dtype"] {
        let Some(Value::String(found)) = config.get_mut(key) else {
            continue;
        };
        let (prefix, plain) = match found.strip_prefix("torch.") {
            Some(plain) => ("torch.", plain),
            None => ("", found.as_str()),
        };
        if matches!(plain, "float64" | "float32" | "float16" | "bfloat16") && plain != dtype {
            *found = format!("{prefix}{dtype}");
        }
    }
    for (_, nested) in nested_configs(config) {
        patch_dtype(nested, dtype);
    }
}

/// The sub-models' configs. JSON's own depth limit bounds how deep this can be followed.
fn nested_configs(
    config: &mut Map<String, Value>,
) -> impl Iterator<Item = (&String, &mut Map<String, Value>)> {
    config
        .iter_mut()
        .filter(|(key, _)| key.ends_with("_config") && *key != "quantization_config")
        .filter_map(|(key, value)| Some((key, value.as_object_mut()?)))
}

/// Refuses a name that is not one plain, visible component.
pub(super) fn check_name(name: &str) -> Result<(), WriteError> {
    let why = if name.is_empty() {
        "empty"
    } else if name.contains(['/', '\\', '\0']) {
        "contains a separator"
    } else if name.starts_with('.') {
        "begins with a dot"
    } else {
        return Ok(());
    };
    Err(WriteError::BadSideName { name: name.to_owned(), why })
}

/// The name under which the file `name` is prepared.
pub(super) fn temporary_name(name: &str) -> String {
    format!("{TEMPORARY_PREFIX}{name}{TEMPORARY_SUFFIX}")
}

/// Makes a new temporary file for the final name `name`; its mode is 0666 cut by the umask.
pub(super) fn create_temporary(directory: &Path, name: &str) -> Result<(PathBuf, File), WriteError> {
    let path = directory.join(temporary_name(name));
    let created = fault::point("temporary.create")
        .and_then(|()| OpenOptions::new().read(true).write(true).create_new(true).mode(0o666).open(&path));
    match created {
        Ok(file) => Ok((path, file)),
        Err(source) => Err(WriteError::writing(&path, "create a temporary file", 4096, source)),
    }
}

/// Writes a side file under its temporary name and waits until it is on disk. On failure nothing is
/// left.
pub(super) fn stage(directory: &Path, side: &SideFile) -> Result<PathBuf, WriteError> {
    let (path, file) = create_temporary(directory, &side.name)?;
    let staged = fill(&path, &file, side).and_then(|()| {
        fault::point("side.fsync")
            .and_then(|()| file.sync_all())
            .map_err(|source| WriteError::writing(&path, "fsync", side.bytes(), source))
    });
    match staged {
        Ok(()) => Ok(path),
        Err(error) => {
            let _ = fs::remove_file(&path);
            Err(error)
        }
    }
}

/// Not blocking: a FIFO put there since the listing would otherwise wait for ever.
fn open_to_copy(from: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32).open(from)
}

fn fill(path: &Path, mut file: &File, side: &SideFile) -> Result<(), WriteError> {
    let refuse = |source| WriteError::writing(path, "write", side.bytes(), source);
    let (from, expected) = match &side.content {
        SideContent::Bytes(bytes) => {
            return fault::point("side.write").and_then(|()| file.write_all(bytes)).map_err(refuse);
        }
        SideContent::Copy { from, bytes } => (from, *bytes),
    };
    let unreadable = |doing| move |source| WriteError::Io { path: from.clone(), doing, source };
    let source = open_to_copy(from).map_err(unreadable("open a file to copy"))?;
    // One byte more than expected is enough to notice that it grew.
    let mut source = source.take(expected.saturating_add(1));
    let mut buffer = vec![0; 256 << 10];
    let mut got = 0;
    loop {
        let n = match source.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(unreadable("read a file to copy")(error)),
        };
        file.write_all(&buffer[..n]).map_err(refuse)?;
        got += n as u64;
    }
    if got != expected {
        return Err(WriteError::SideFileChanged { path: from.clone(), got, expected });
    }
    Ok(())
}

/// Renames within a directory that we hold, refusing to replace anything.
pub(super) fn rename_free(temporary: &Path, name: &Path) -> Result<(), WriteError> {
    match fs::symlink_metadata(name) {
        Ok(_) => {
            return Err(WriteError::NameTaken { path: name.to_owned() });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => {
            return Err(WriteError::Io { path: name.to_owned(), doing: "look at a final name", source });
        }
    }
    let step = match name.file_name().and_then(|name| name.to_str()) {
        Some(REPORT_FILE) => "rename.report",
        Some(INDEX_NAME) => "rename.index",
        Some(name) if name.ends_with(".safetensors") => "rename.shard",
        _ => "rename.side",
    };
    fault::point(step).and_then(|()| fs::rename(temporary, name)).map_err(|source| {
        WriteError::writing(name, "rename a temporary file to its final name", 4096, source)
    })
}

#[cfg(test)]
mod tests;
