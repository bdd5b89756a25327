//! The output's layout: which tensor goes into which shard, at which byte, behind which header.
//!
//! The plan calls it once the output's tensors are known; the writer places bytes by it and never
//! decides a place itself. It touches no file and never looks at tensor data.

use std::collections::{BTreeMap, HashSet};

use serde_json::{Map, Value, json};
use thiserror::Error;

use crate::report::units::{Bytes, Escaped};

/// A safetensors header may take this many bytes at most (contract §1), its padding included.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A disk's block and a page: what writes that pass the page cache by are cut at.
pub const BLOCK_BYTES: u64 = 4096;

/// From so much tensor data on, a shard's data begins at a whole block.
const BLOCKS_FROM: u64 = 1 << 20;

/// The index's final name.
pub const INDEX_NAME: &str = "model.safetensors.index.json";

/// The key of a header that is not a tensor.
const METADATA_KEY: &str = "__metadata__";

/// The metadata that transformers expects of a checkpoint that PyTorch will load.
const METADATA: &str = r#"{"format":"pt"}"#;

/// One tensor of the output, in output order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name, opaque to us.
    pub name: String,
    /// The dtype's safetensors name, such as `BF16`.
    pub dtype: String,
    /// Its dimensions; empty for a scalar.
    pub shape: Vec<usize>,
    /// Its size as stored, in bytes.
    pub bytes: u64,
}

/// A tensor's place in a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacedTensor {
    /// Index into [`OutputLayout::specs`].
    pub spec: usize,
    /// First byte, counted from the beginning of the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// One output file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardLayout {
    /// The final name: `model.safetensors`, or `model-00001-of-00003.safetensors`.
    pub file_name: String,
    /// The file's first bytes: 8-byte little-endian length, then JSON padded with spaces to a multiple
    /// of 8, or of [`BLOCK_BYTES`] before much data.
    pub header: Vec<u8>,
    /// Where tensor data begins: the header's length.
    pub data_start: u64,
    /// The whole file's length.
    pub file_bytes: u64,
    /// Its tensors by offset, without gaps.
    pub tensors: Vec<PlacedTensor>,
}

/// A file of tensors that are not the model's: beside the shards, in no index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SideLayout {
    /// Its final name.
    pub file_name: String,
    /// The strings of its header.
    pub metadata: BTreeMap<String, String>,
    /// Its tensors, in order.
    pub specs: Vec<TensorSpec>,
}

/// The whole output: every tensor exactly once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputLayout {
    specs: Vec<TensorSpec>,
    /// Those of the model come first.
    model_tensors: usize,
    shards: Vec<ShardLayout>,
    model_shards: usize,
    /// Per tensor: its shard and its first byte in that file.
    places: Vec<(u32, u64)>,
}

/// Why tensors cannot be laid out. All of it is bad input: it comes from the checkpoints' headers or
/// from a flag.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// The format keeps this name for the header's metadata; a file with such a tensor cannot be read
    /// back.
    #[error(
        "tensor `__metadata__`: safetensors reserves this name, so it cannot be written; rename it in the input"
    )]
    ReservedName,

    /// Two tensors of one name.
    #[error("tensor `{}`: named twice in the output (expected each name once)", Escaped(name))]
    DuplicateName {
        /// The tensor.
        name: String,
    },

    /// A dtype that safetensors does not have.
    #[error("tensor `{}`: dtype `{}` is none of safetensors'", Escaped(name), Escaped(dtype))]
    UnknownDtype {
        /// The tensor.
        name: String,
        /// The dtype as given.
        dtype: String,
    },

    /// Shape and dtype do not give the number of bytes, or give more than can be counted.
    #[error(
        "tensor `{}`: {dtype} {shape:?} does not take {bytes} bytes (expected {})",
        Escaped(name),
        expected.map_or_else(|| "a size below 2^64 bits".to_owned(), |bytes| bytes.to_string())
    )]
    SizeMismatch {
        /// The tensor.
        name: String,
        /// Its dtype.
        dtype: String,
        /// Its shape.
        shape: Vec<usize>,
        /// The size given.
        bytes: u64,
        /// The size that shape and dtype give, if they give one.
        expected: Option<u64>,
    },

    /// The output is larger than a file offset can say.
    #[error("tensor `{}`: the output passes 2^62 bytes here", Escaped(name))]
    TooLarge {
        /// The first tensor that does not fit.
        name: String,
    },

    /// One tensor's name or shape alone fills a header.
    #[error(
        "tensor `{}`: its header entry alone takes {} (at most {} allowed)",
        Escaped(name),
        Bytes(*bytes),
        Bytes(MAX_HEADER_BYTES)
    )]
    EntryTooLarge {
        /// The tensor.
        name: String,
        /// The entry's length in the header.
        bytes: u64,
    },

    /// A side file of so many tensors that its header passes the format's limit.
    #[error(
        "{file}: its header would take {} (at most {} allowed): there are too many parameters for it",
        Bytes(*bytes),
        Bytes(MAX_HEADER_BYTES)
    )]
    SideHeader {
        /// The file.
        file: String,
        /// The header's length.
        bytes: u64,
    },

    /// A shard size of 0.
    #[error("shard size 0: a shard must hold something (expected at least 1 byte)")]
    ZeroShardSize,
}

impl OutputLayout {
    /// Lays `specs` out in their order, closing a shard before it would pass `shard_bytes` of tensor
    /// data (`u64::MAX`: one file). A tensor larger than that gets a shard of its own; a header that
    /// would pass [`MAX_HEADER_BYTES`] closes a shard early.
    ///
    /// Within a shard the order is kept too, unless a tensor would then start at an address its dtype
    /// cannot be read from in place (a 3-byte `BOOL` before an `F32`): such a shard holds its wide
    /// dtypes first.
    ///
    /// # Errors
    /// [`LayoutError`], naming the tensor.
    pub fn new(specs: Vec<TensorSpec>, shard_bytes: u64) -> Result<Self, LayoutError> {
        Self::with_header_limit(specs, shard_bytes, MAX_HEADER_BYTES)
    }

    fn with_header_limit(
        specs: Vec<TensorSpec>,
        shard_bytes: u64,
        header_limit: u64,
    ) -> Result<Self, LayoutError> {
        if shard_bytes == 0 {
            return Err(LayoutError::ZeroShardSize);
        }
        check_specs(&specs)?;
        let groups = group(&specs, shard_bytes, header_limit)?;
        let count = groups.len();
        let mut places = vec![(0, 0); specs.len()];
        let mut shards = Vec::with_capacity(count);
        for (number, members) in groups.into_iter().enumerate() {
            let file_name = match count {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            let shard = lay_out_shard(&specs, file_name, METADATA, members);
            for placed in &shard.tensors {
                places[placed.spec] = (number as u32, placed.offset);
            }
            shards.push(shard);
        }
        Ok(Self { model_tensors: specs.len(), model_shards: count, specs, shards, places })
    }

    /// The same with a file beside the model's, whose tensors are numbered behind those that are there.
    ///
    /// # Errors
    /// [`LayoutError`], naming the tensor or the file.
    pub fn with_side(mut self, side: SideLayout) -> Result<Self, LayoutError> {
        let SideLayout { file_name, metadata, specs } = side;
        let first = self.specs.len();
        self.specs.extend(specs);
        check_specs(&self.specs)?;
        let metadata = serde_json::to_string(&metadata).expect("strings always serialise");
        let members = (first..self.specs.len()).collect();
        let shard = lay_out_shard(&self.specs, file_name, &metadata, members);
        if shard.data_start - 8 > MAX_HEADER_BYTES {
            return Err(LayoutError::SideHeader { file: shard.file_name, bytes: shard.data_start - 8 });
        }
        self.places.resize(self.specs.len(), (0, 0));
        for placed in &shard.tensors {
            self.places[placed.spec] = (self.shards.len() as u32, placed.offset);
        }
        self.shards.push(shard);
        Ok(self)
    }

    /// The tensors, in the order given: the model's, then those of a side file.
    pub fn specs(&self) -> &[TensorSpec] {
        &self.specs
    }

    /// The files, in order: the model's shards, then a side file. There is always at least one shard, if only with an
    /// empty header.
    pub fn shards(&self) -> &[ShardLayout] {
        &self.shards
    }

    /// The model's shards alone.
    pub fn model_shards(&self) -> &[ShardLayout] {
        &self.shards[..self.model_shards]
    }

    /// The file beside them, and the number of its first tensor.
    pub fn side(&self) -> Option<(&ShardLayout, usize)> {
        self.shards.get(self.model_shards).map(|shard| (shard, self.model_tensors))
    }

    /// Whether `name` is the final name of a shard, of the side file or of the index.
    pub fn owns(&self, name: &str) -> bool {
        name == INDEX_NAME || self.shards.iter().any(|shard| shard.file_name == name)
    }

    /// The shard that holds tensor number `tensor`, and the tensor's first byte in that file. `None`: no
    /// such tensor.
    pub fn locate(&self, tensor: usize) -> Option<(usize, u64)> {
        self.places.get(tensor).map(|&(shard, offset)| (shard as usize, offset))
    }

    /// Bytes of tensor data, a side file's included.
    pub fn tensor_bytes(&self) -> u64 {
        self.specs.iter().map(|spec| spec.bytes).sum()
    }

    /// Bytes of all shards, headers included.
    pub fn file_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.file_bytes).sum()
    }

    /// `model.safetensors.index.json`, with its names sorted; `None` where a single file needs none.
    pub fn index_json(&self) -> Option<Vec<u8>> {
        if self.model_shards < 2 {
            return None;
        }
        let mut order: Vec<usize> = (0..self.model_tensors).collect();
        order.sort_unstable_by(|&a, &b| self.specs[a].name.cmp(&self.specs[b].name));
        let weight_map: Map<String, Value> = order
            .into_iter()
            .map(|tensor| {
                let file = &self.shards[self.places[tensor].0 as usize].file_name;
                (self.specs[tensor].name.clone(), Value::from(file.as_str()))
            })
            .collect();
        let total: u64 = self.specs[..self.model_tensors].iter().map(|spec| spec.bytes).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        let mut bytes = serde_json::to_vec_pretty(&index).expect("strings and integers always serialise");
        bytes.push(b'\n');
        Some(bytes)
    }
}

fn check_specs(specs: &[TensorSpec]) -> Result<(), LayoutError> {
    // Signed file offsets end at 2^63, and headers take room too.
    const LIMIT: u64 = 1 << 62;
    let mut names = HashSet::with_capacity(specs.len());
    let mut total: u64 = 0;
    for spec in specs {
        if spec.name == METADATA_KEY {
            return Err(LayoutError::ReservedName);
        }
        if !names.insert(spec.name.as_str()) {
            return Err(LayoutError::DuplicateName { name: spec.name.clone() });
        }
        let Some(bits) = dtype_bits(&spec.dtype) else {
            return Err(LayoutError::UnknownDtype { name: spec.name.clone(), dtype: spec.dtype.clone() });
        };
        let expected = stored_bytes(&spec.shape, bits);
        if expected != Some(spec.bytes) {
            return Err(LayoutError::SizeMismatch {
                name: spec.name.clone(),
                dtype: spec.dtype.clone(),
                shape: spec.shape.clone(),
                bytes: spec.bytes,
                expected,
            });
        }
        total = total
            .checked_add(spec.bytes)
            .filter(|&sum| sum <= LIMIT)
            .ok_or_else(|| LayoutError::TooLarge { name: spec.name.clone() })?;
    }
    Ok(())
}

/// Bytes of a tensor; `None` if the product overflows or does not end on a byte.
fn stored_bytes(shape: &[usize], bits: u64) -> Option<u64> {
    let elements =
        shape.iter().try_fold(1_u64, |product, &side| product.checked_mul(u64::try_from(side).ok()?))?;
    let bits = elements.checked_mul(bits)?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// Bits of one element, by the dtype's safetensors name.
fn dtype_bits(name: &str) -> Option<u64> {
    Some(match name {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E5M2FNUZ" | "F8_E4M3FNUZ" => 8,
        "U16" | "I16" | "F16" | "BF16" => 16,
        "U32" | "I32" | "F32" => 32,
        "U64" | "I64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

/// The address a tensor's first byte must be divisible by to be read in place.
fn alignment(spec: &TensorSpec) -> u64 {
    dtype_bits(&spec.dtype).map_or(1, |bits| (bits / 8).max(1))
}

/// Greedy in output order: the tensors of each shard.
fn group(specs: &[TensorSpec], shard_bytes: u64, header_limit: u64) -> Result<Vec<Vec<usize>>, LayoutError> {
    // `{`, metadata, `}` and up to 7 bytes of padding.
    let empty_header = metadata_entry(METADATA).len() as u64 + 2 + 7;
    let mut groups = Vec::new();
    let (mut members, mut data, mut header) = (Vec::new(), 0_u64, empty_header);
    for (index, spec) in specs.iter().enumerate() {
        // Offsets are not final yet, so every entry is counted with the longest ones there can be.
        let entry = 1 + header_entry(spec, u64::MAX, u64::MAX).len() as u64;
        if empty_header + entry > header_limit {
            return Err(LayoutError::EntryTooLarge { name: spec.name.clone(), bytes: entry });
        }
        if !members.is_empty() && (data + spec.bytes > shard_bytes || header + entry > header_limit) {
            groups.push(std::mem::take(&mut members));
            (data, header) = (0, empty_header);
        }
        members.push(index);
        data += spec.bytes;
        header += entry;
    }
    // No tensor at all still makes a (valid, empty) file.
    if !members.is_empty() || groups.is_empty() {
        groups.push(members);
    }
    Ok(groups)
}

fn metadata_entry(metadata: &str) -> String {
    format!(r#""{METADATA_KEY}":{metadata}"#)
}

fn lay_out_shard(
    specs: &[TensorSpec],
    file_name: String,
    metadata: &str,
    mut members: Vec<usize>,
) -> ShardLayout {
    if !lies_aligned(specs, &members) {
        members.sort_by_key(|&index| std::cmp::Reverse(alignment(&specs[index]))); // stable
    }
    let mut json = String::with_capacity(64 + 96 * members.len());
    json.push('{');
    json.push_str(&metadata_entry(metadata));
    let mut end = 0;
    let mut tensors = Vec::with_capacity(members.len());
    for index in members {
        let spec = &specs[index];
        let begin = end;
        end += spec.bytes;
        json.push(',');
        json.push_str(&header_entry(spec, begin, end));
        tensors.push(PlacedTensor { spec: index, offset: begin, bytes: spec.bytes });
    }
    json.push('}');
    let aligned = |multiple: u64| (8 + json.len() as u64).next_multiple_of(multiple) - 8;
    let padded = match aligned(BLOCK_BYTES) {
        padded if end >= BLOCKS_FROM && padded <= MAX_HEADER_BYTES => padded,
        _ => aligned(8),
    };
    json.extend(std::iter::repeat_n(' ', padded as usize - json.len()));
    let mut header = Vec::with_capacity(8 + json.len());
    header.extend_from_slice(&(json.len() as u64).to_le_bytes());
    header.extend_from_slice(json.as_bytes());
    let data_start = header.len() as u64;
    for placed in &mut tensors {
        placed.offset += data_start;
    }
    ShardLayout { file_name, header, data_start, file_bytes: data_start + end, tensors }
}

/// Whether every tensor, laid end to end in this order, starts at a multiple of its element size.
fn lies_aligned(specs: &[TensorSpec], members: &[usize]) -> bool {
    let mut offset = 0;
    members.iter().all(|&index| {
        let fits = u64::is_multiple_of(offset, alignment(&specs[index]));
        offset += specs[index].bytes;
        fits
    })
}

/// `"name":{"dtype":…,"shape":[…],"data_offsets":[begin,end]}`
fn header_entry(spec: &TensorSpec, begin: u64, end: u64) -> String {
    let name = serde_json::to_string(&spec.name).expect("a string always serialises");
    let shape = serde_json::to_string(&spec.shape).expect("integers always serialise");
    let dtype = &spec.dtype; // checked against a list of plain names
    format!(r#"{name}:{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
}

#[cfg(test)]
mod tests;
