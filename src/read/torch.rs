//! `torch.save`d dictionaries of tensors as names and byte ranges, without running anything.
//!
//! The statistics module opens one for each `.pt` file of another tool. Weights are never read this way: `merge` refuses
//! pickles. The archive (`archive`) says where each storage's bytes lie, the pickle (`pickle`, read as
//! data) which tensor is which part of which storage; here the two are held against each other. What comes out is what a
//! safetensors header gives: a [`TensorMeta`] for each tensor, read by ranges.

use std::collections::HashMap;
use std::path::Path;

use super::archive::{self, Archive, Entry};
use super::checkpoint::TensorMeta;
use super::file::{InputFile, IoMode};
use super::pickle::{self, PickledTensor};
use super::{MAX_HEADER_BYTES, ReadError, escaped};

/// A `.pt` file: its tensors, by place in the file.
#[derive(Debug)]
pub struct TorchFile {
    /// The open file.
    pub file: InputFile,
    /// Sorted by offset and name. Several may share bytes.
    pub tensors: Vec<TensorMeta>,
    /// What was accepted but should be known, one line each, naming the file.
    pub warnings: Vec<String>,
    /// Bytes of directory and pickle: what the metadata in memory is in proportion to.
    pub header_bytes: u64,
    /// The storages that tensors lie in.
    pub storages: Storages,
}

/// Storages of an archive, with their checksums.
#[derive(Debug)]
pub struct Storages(Vec<(String, Entry)>);

impl Storages {
    /// Reads every storage of `file` once and compares it with its checksum.
    ///
    /// # Errors
    /// [`ReadError::Archive`] naming the first that is damaged; those of reading.
    pub fn check(&self, file: &InputFile) -> Result<(), ReadError> {
        self.0.iter().try_for_each(|(name, entry)| archive::check_crc(file, name, entry))
    }
}

impl TorchFile {
    /// Opens what `torch.save` wrote since PyTorch 1.6. `file_index` is what each [`TensorMeta::file`] will be.
    ///
    /// # Errors
    /// [`ReadError::Archive`], [`ReadError::Pickle`] and [`ReadError::TensorEntry`], each naming the file and, where there
    /// is one, the tensor; a hint for the older format, which is a bare pickle.
    pub fn open(path: &Path, io: IoMode, file_index: usize) -> Result<Self, ReadError> {
        let file = InputFile::open(path, io)?;
        let refuse = |detail: String| ReadError::Pickle { path: path.to_owned(), detail };
        if !is_zip(&file)? {
            return Err(refuse(
                "got no zip archive, expected what torch.save writes since PyTorch 1.6; load it in a trusted place and \
                 save it again with torch.save"
                    .to_owned(),
            ));
        }
        let archive = Archive::open(&file)?;
        let prefix = prefix_of(&archive).map_err(refuse)?;
        let get = |name: &str| archive.get(&format!("{prefix}/{name}"));
        if let Some(entry) = get("byteorder") {
            let mut scratch = Vec::new();
            let stated = file.bytes(entry.offset..entry.offset + entry.bytes.min(16), &mut scratch)?;
            if stated != b"little" {
                let stated = String::from_utf8_lossy(stated).into_owned();
                return Err(refuse(format!("got byte order `{}`, expected `little`", escaped(&stated))));
            }
        }
        let pickle_name = format!("{prefix}/data.pkl");
        let entry = archive.get(&pickle_name).ok_or_else(|| refuse("has no data.pkl".to_owned()))?;
        if entry.bytes > MAX_HEADER_BYTES {
            return Err(refuse(format!("got {} bytes, expected at most {MAX_HEADER_BYTES}", entry.bytes)));
        }
        archive::check_crc(&file, &pickle_name, entry)?;
        let mut scratch = Vec::new();
        let bytes = file.bytes(entry.offset..entry.offset + entry.bytes, &mut scratch)?;
        let named = pickle::tensors(bytes).map_err(refuse)?;
        drop(scratch);

        let mut warnings = Vec::new();
        if entry.crc == 0 && entry.bytes > 0 {
            warnings.push(format!("{}: was saved without checksums: damage would not show", path.display()));
        }
        let header_bytes = entry.bytes;
        let mut storages: HashMap<String, Entry> = HashMap::new();
        let mut tensors = Vec::with_capacity(named.len());
        for (name, tensor) in named {
            let storage = format!("{prefix}/data/{}", tensor.storage);
            let entry = archive.get(&storage);
            let meta = place(&tensor, &name, entry, file_index).map_err(|detail| ReadError::TensorEntry {
                path: path.to_owned(),
                tensor: name.clone(),
                detail,
            })?;
            if let Some(entry) = entry {
                storages.entry(storage).or_insert_with(|| entry.clone());
            }
            tensors.push(meta);
        }
        tensors.sort_by(|a, b| (a.offset, &a.name).cmp(&(b.offset, &b.name)));
        let mut storages: Vec<(String, Entry)> = storages.into_iter().collect();
        storages.sort_by_key(|(_, entry)| entry.offset);
        Ok(Self { file, tensors, warnings, header_bytes, storages: Storages(storages) })
    }
}

/// Whether a file begins as a zip archive does.
pub fn is_zip(file: &InputFile) -> Result<bool, ReadError> {
    let mut scratch = Vec::new();
    Ok(file.len() >= 4 && file.bytes(0..4, &mut scratch)? == b"PK\x03\x04")
}

/// The one directory that everything in the archive is in.
fn prefix_of(archive: &Archive) -> Result<String, String> {
    let first = |name: &str| name.split('/').next().unwrap_or_default().to_owned();
    let mut names = archive.names();
    let prefix = names.next().map(first).unwrap_or_default();
    match names.find(|name| first(name) != prefix) {
        Some(other) => Err(format!(
            "got entries in two directories (`{}` and `{}`), expected one",
            escaped(&prefix),
            escaped(&first(other))
        )),
        None => Ok(prefix),
    }
}

/// The tensor's bytes, if it lies in its storage as one row-major block.
fn place(
    tensor: &PickledTensor,
    name: &str,
    entry: Option<&Entry>,
    file: usize,
) -> Result<TensorMeta, String> {
    let PickledTensor { storage, dtype, storage_elements, offset, shape, strides } = tensor;
    let Some(entry) = entry else {
        return Err(format!("lies in storage `{}`, which the archive lacks", escaped(storage)));
    };
    let width = dtype.bits() / 8;
    if storage_elements.checked_mul(width) != Some(entry.bytes) {
        return Err(format!(
            "lies in a storage of the wrong size (got {} bytes, expected {storage_elements} elements of {dtype})",
            entry.bytes
        ));
    }
    let elements = shape.iter().try_fold(1u64, |product, dim| product.checked_mul(*dim));
    let Some(end) = elements.and_then(|elements| offset.checked_add(elements)) else {
        return Err(format!("has a shape whose size overflows (got {shape:?})"));
    };
    let empty = shape.contains(&0);
    // Row-major, as `contiguous()` leaves it. A repeated view (stride 0) would make much out of little.
    let mut expected = 1u64;
    for (dim, stride) in shape.iter().zip(strides).rev() {
        if !empty && *dim != 1 && *stride != expected {
            return Err(format!(
                "is a strided view (got strides {strides:?} of {shape:?}, expected row-major); save it with .contiguous()"
            ));
        }
        expected = expected.saturating_mul(*dim);
    }
    if !empty && end > *storage_elements {
        return Err(format!(
            "reaches beyond its storage (got elements {offset}..{end}, expected them within 0..{storage_elements})"
        ));
    }
    let dims: Option<Vec<usize>> = shape.iter().map(|dim| usize::try_from(*dim).ok()).collect();
    let Some(dims) = dims else {
        return Err(format!("has a shape whose size overflows (got {shape:?})"));
    };
    let first = if empty { 0 } else { offset * width };
    Ok(TensorMeta {
        name: name.to_owned(),
        dtype: *dtype,
        shape: dims,
        file,
        offset: entry.offset + first,
        bytes: elements.unwrap_or(0) * width,
    })
}

#[cfg(test)]
mod tests;
