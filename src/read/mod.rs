//! Reading checkpoints: safetensors headers, shard indexes, bytes and their dtypes.
//!
//! Owns everything between a path the user typed and a slice of stored bytes. The planner asks it for
//! [`TensorMeta`]s (known from headers alone), the engine for byte ranges of one tensor at a time, the
//! statistics module for its files. Every length, offset and product that a file states is checked once,
//! here, before anything is allocated for it.
//!
//! It never writes, never interprets a tensor's name as a path, never holds decoded tensors, and never
//! executes anything: pickles of statistics are read as data ([`torch`]), those of weights not at all.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

mod archive;
pub mod checkpoint;
pub mod dtype;
pub mod file;
pub mod header;
pub mod index;
#[allow(unsafe_code, reason = "memory maps; each block says why it is sound")]
mod mmap;
mod pickle;
mod pread;
#[cfg(test)]
pub(crate) mod testing;
pub mod torch;

pub use checkpoint::{Checkpoint, TensorMeta};
pub use dtype::{
    Dtype, decode_difference_f32, decode_f32, decode_f64, decode_finite_f32, decode_integer, encode_f32,
    encode_f64, first_nonfinite, first_nonfinite_f32, first_nonfinite_f64,
};
pub use file::{Fingerprint, InputFile, IoMode, read_small_file};
pub use header::{Header, header_hash, read_header};
pub use mmap::exit_on_lost_pages;
pub use torch::{Storages, TorchFile};

/// Longest safetensors header that is accepted, in bytes.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Most tensors that a file, an index or a checkpoint may have.
pub const MAX_TENSORS: usize = 1_000_000;
/// Highest rank that a tensor may have.
pub const MAX_RANK: usize = 16;
/// Longest shard index that is accepted, in bytes.
pub const MAX_INDEX_BYTES: u64 = 100_000_000;
/// Longest `config.json` that is accepted, in bytes.
pub const MAX_MODEL_CONFIG_BYTES: u64 = 10_000_000;

/// Longest stretch of a foreign name that a message repeats, in characters.
const MAX_NAME_CHARS: usize = 200;

/// How the process ends when an error of this module reaches `main`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitClass {
    /// The input is missing, unopenable, malformed, or not what was asked for.
    BadInput,
    /// The operating system failed to read an input that had been opened.
    Io,
    /// An input changed or vanished after it had been opened.
    Changed,
}

impl ExitClass {
    /// The process exit code.
    pub fn code(self) -> u8 {
        match self {
            Self::BadInput => 2,
            Self::Io => 6,
            Self::Changed => 74,
        }
    }
}

/// A parser's message cut at 300 characters: it may quote foreign text of any length, escaped already.
fn shortened(message: &dyn std::fmt::Display) -> String {
    let message = message.to_string();
    match message.char_indices().nth(300) {
        Some((end, _)) => format!("{}…", &message[..end]),
        None => message,
    }
}

/// What to do with pickled weights: reading them means running what they say.
const CONVERT: &str = "convert them first, for example with `save_pretrained(…, safe_serialization=True)`; pickles are never read";

/// Extensions that PyTorch's pickles go by.
const PICKLED: [&str; 4] = ["bin", "pt", "pth", "ckpt"];

/// What a file that begins so is, where it is one of PyTorch's formats. A safetensors header of 640 bytes begins like a
/// pickle does: what would be a header length within the limit is one.
fn pickled_prefix(prefix: &[u8; 8]) -> Option<&'static str> {
    match prefix {
        _ if u64::from_le_bytes(*prefix) <= MAX_HEADER_BYTES => None,
        [b'P', b'K', 3, 4, ..] => Some("a zip archive (pickled weights)"),
        [0x80, 2..=5, ..] => Some("a pickle"),
        _ => None,
    }
}

/// What a file is, if it is one of PyTorch's formats.
///
/// # Errors
/// Those of reading.
pub(crate) fn pickled(file: &InputFile) -> Result<Option<&'static str>, ReadError> {
    let mut prefix = [0; 8];
    if file.len() < prefix.len() as u64 {
        return Ok(None);
    }
    let mut scratch = Vec::new();
    prefix.copy_from_slice(file.bytes(0..8, &mut scratch)?);
    let zip = prefix.starts_with(b"PK\x03\x04");
    Ok(if zip { Some("a zip archive (pickled tensors)") } else { pickled_prefix(&prefix) })
}

/// A name from a file as it may appear in a message: control characters and quotes escaped, cut at 200
/// characters.
pub fn escaped(name: &str) -> String {
    let mut shown = String::new();
    for (count, c) in name.chars().enumerate() {
        if count == MAX_NAME_CHARS {
            shown.push('…');
            break;
        }
        shown.extend(c.escape_debug());
    }
    shown
}

/// What can be wrong with an input, or go wrong while reading it.
///
/// `tensor`, `key` and `value` fields hold foreign text unescaped; `Display` escapes it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The path is missing or may not be opened.
    #[error("{}: cannot open", path.display())]
    Open { path: PathBuf, source: io::Error },
    /// The path names something whose bytes have no fixed length.
    #[error("{}: not a regular file (got {found}, expected a file)", path.display())]
    NotRegular { path: PathBuf, found: &'static str },
    /// The operating system refused a read, a mapping or a listing.
    #[error("{}: {doing} failed", path.display())]
    Io { path: PathBuf, doing: &'static str, source: io::Error },
    /// The file is not the one that was opened any more.
    #[error("{}: changed while it was being read ({what})", path.display())]
    Changed { path: PathBuf, what: String },
    /// A file that is read whole is longer than its limit.
    #[error("{}: too large (got {bytes} bytes, expected at most {limit})", path.display())]
    FileTooLarge { path: PathBuf, bytes: u64, limit: u64 },
    /// A byte range that the caller asked for is not inside the file, or not inside `tensor` if there is one.
    #[error("{}:{} no such byte range (got {start}..{end}, expected it within 0..{len})", path.display(),
            tensor.as_ref().map(|name| format!(" tensor `{}`:", escaped(name))).unwrap_or_default())]
    RangePastEnd { path: PathBuf, tensor: Option<String>, start: u64, end: u64, len: u64 },

    /// The file ends before its 8-byte header length does.
    #[error("{}: no safetensors header (got {file_len} bytes, expected at least 10)", path.display())]
    HeaderShort { path: PathBuf, file_len: u64 },
    /// The declared header length is over the limit, checked before anything is allocated.
    #[error("{}: header too large (got {header_len} bytes, expected at most {limit})", path.display())]
    HeaderTooLarge { path: PathBuf, header_len: u64, limit: u64 },
    /// The declared header ends beyond the file.
    #[error("{}: header ends beyond the file (got {header_len} bytes of header, expected at most {})",
            path.display(), file_len.saturating_sub(8))]
    HeaderPastEnd { path: PathBuf, header_len: u64, file_len: u64 },
    /// The header is not the JSON that the format prescribes.
    #[error("{}: malformed safetensors header: {detail}", path.display())]
    HeaderSyntax { path: PathBuf, detail: String },
    /// A tensor's entry is not what the format prescribes.
    #[error("{}: tensor `{}`: {detail}", path.display(), escaped(tensor))]
    TensorEntry { path: PathBuf, tensor: String, detail: String },
    /// Two tensors have one name.
    #[error("{}: tensor `{}` is declared twice", path.display(), escaped(tensor))]
    DuplicateTensor { path: PathBuf, tensor: String },
    /// A file or a checkpoint has more tensors than the limit.
    #[error("{}: too many tensors (got more than {limit}, expected at most {limit})", path.display())]
    TooManyTensors { path: PathBuf, limit: usize },
    /// A tensor's rank is over the limit.
    #[error("{}: tensor `{}` has too many dimensions (got {rank}, expected at most {limit})",
            path.display(), escaped(tensor))]
    Rank { path: PathBuf, tensor: String, rank: usize, limit: usize },
    /// The dtype is not one of the safetensors dtypes.
    #[error("{}: tensor `{}` has an unknown dtype (got `{}`, expected F32, F16, BF16 or another known one)",
            path.display(), escaped(tensor), escaped(dtype))]
    UnknownDtype { path: PathBuf, tensor: String, dtype: String },
    /// The shape's element or bit count does not fit 64 bits.
    #[error("{}: tensor `{}` has a shape whose size overflows (got {shape}, expected at most 2^64 - 1 bits)",
            path.display(), escaped(tensor))]
    ShapeOverflow { path: PathBuf, tensor: String, shape: String },
    /// Shape and dtype need another number of bytes than the offsets span.
    #[error("{}: tensor `{}` spans the wrong number of bytes (got {got}, expected {expected} for {dtype} {shape})",
            path.display(), escaped(tensor))]
    TensorSize { path: PathBuf, tensor: String, got: u64, expected: u64, dtype: dtype::Dtype, shape: String },
    /// The bytes between one tensor's end and the next one's start belong to nobody, or to both.
    #[error("{}: tensor `{}` leaves {} in the layout (got a start of {got}, expected {expected})",
            path.display(), escaped(tensor), if got > expected { "a hole" } else { "an overlap" })]
    Layout { path: PathBuf, tensor: String, got: u64, expected: u64 },
    /// The file is shorter or longer than its header says.
    #[error("{}: {} (got {got} bytes, expected {expected})", path.display(),
            if got < expected { "truncated" } else { "trailing bytes after the last tensor" })]
    FileLength { path: PathBuf, got: u64, expected: u64 },

    /// The shard index is malformed as a whole.
    #[error("{}: malformed index: {detail}", path.display())]
    IndexSyntax { path: PathBuf, detail: String },
    /// One entry of the shard index's `weight_map` is malformed.
    #[error("{}: weight_map key `{}`: {detail}", path.display(), escaped(key))]
    IndexEntry { path: PathBuf, key: String, detail: String },
    /// A `weight_map` value is more than one plain file name.
    #[error("{}: weight_map key `{}` names a shard elsewhere (got `{}`, expected one plain file name)",
            path.display(), escaped(key), escaped(value))]
    IndexPath { path: PathBuf, key: String, value: String },
    /// The index places a tensor in a shard that lacks it.
    #[error("{}: weight_map key `{}` is not in its shard (got no such tensor in `{}`, expected one)",
            path.display(), escaped(key), escaped(shard))]
    IndexMismatch { path: PathBuf, key: String, shard: String },

    /// The path holds no checkpoint that can be read.
    #[error("{}: no checkpoint here: {detail}", path.display())]
    NoCheckpoint { path: PathBuf, detail: String },
    /// A zip archive is not the plain one of stored entries that `torch.save` writes.
    #[error("{}: malformed archive: {detail}", path.display())]
    Archive { path: PathBuf, detail: String },
    /// A pickle is not a dictionary of tensors, or is more than that.
    #[error("{}: pickle: {detail}", path.display())]
    Pickle { path: PathBuf, detail: String },
    /// `config.json` is not JSON.
    #[error("{}: malformed JSON", path.display())]
    ModelConfig { path: PathBuf, source: serde_json::Error },

    /// A conversion was asked of a dtype that is no plain float.
    #[error("dtype {dtype} cannot be converted (got {dtype}, expected one of F64, F32, F16, BF16)")]
    NotFloat { dtype: dtype::Dtype },
    /// A conversion's two sides have different numbers of elements.
    #[error("conversion of {elements} elements of {dtype} (got {bytes} bytes, expected {})",
            (*elements as u64).saturating_mul(dtype.bits()) / 8)]
    ConversionLength { dtype: dtype::Dtype, bytes: usize, elements: usize },
}

impl ReadError {
    /// Which exit code the contract gives this error.
    pub fn exit_class(&self) -> ExitClass {
        match self {
            Self::Io { .. } => ExitClass::Io,
            Self::Changed { .. } => ExitClass::Changed,
            _ => ExitClass::BadInput,
        }
    }
}
