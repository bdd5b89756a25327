//! The safetensors header: parsed strictly, every length, offset and product checked.
//!
//! [`super::Checkpoint`] and the statistics module call [`read_header`] once for each file. The `safetensors`
//! crate accepts duplicate keys (the last wins), leading spaces and any rank, so this is a parser of its own,
//! on top of `serde_json`'s tokens. It builds one [`TensorMeta`] per entry and nothing else: no tree of JSON
//! values, no copy of the header where the file is mapped. It never reads a tensor's data.

use std::collections::{BTreeMap, btree_map};
use std::fmt;
use std::path::Path;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use super::checkpoint::TensorMeta;
use super::dtype::Dtype;
use super::file::InputFile;
use super::{MAX_HEADER_BYTES, MAX_RANK, MAX_TENSORS, ReadError, escaped, shortened};

/// Key of the header's free-form strings.
const METADATA: &str = "__metadata__";
/// Bytes before the header's JSON: its length, little-endian.
const PREFIX: u64 = 8;

/// What one file's header says, checked.
#[derive(Clone, Debug)]
pub struct Header {
    /// In the order of their offsets; these are absolute.
    pub tensors: Vec<TensorMeta>,
    /// The strings of `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// What was accepted but should be known, one line each, naming the file.
    pub warnings: Vec<String>,
    /// Bytes before the first tensor's data.
    pub header_bytes: u64,
}

/// Reads and checks the header of a safetensors file. `file_index` is what each [`TensorMeta::file`] will be.
///
/// Memory: the tensors' names and shapes, and under `--io pread` the header's JSON until this function
/// returns.
///
/// # Errors Every way in which a header can be wrong, each naming the file and, where there is one, the
/// tensor; and those of [`InputFile::bytes`].
pub fn read_header(file: &InputFile, file_index: usize) -> Result<Header, ReadError> {
    let path = file.path();
    let mut scratch = Vec::new();
    if file.len() < PREFIX {
        return Err(ReadError::HeaderShort { path: path.to_owned(), file_len: file.len() });
    }
    let mut prefix = [0; PREFIX as usize];
    prefix.copy_from_slice(file.bytes(0..PREFIX, &mut scratch)?);
    let header_len = u64::from_le_bytes(prefix);
    // Before anything is allocated: the length is whatever somebody wrote there.
    if header_len > MAX_HEADER_BYTES {
        if let Some(found) = super::pickled_prefix(&prefix) {
            let detail = format!("got {found}, expected safetensors; {}", super::CONVERT);
            return Err(ReadError::NoCheckpoint { path: path.to_owned(), detail });
        }
        let limit = MAX_HEADER_BYTES;
        return Err(ReadError::HeaderTooLarge { path: path.to_owned(), header_len, limit });
    }
    let data_start = PREFIX + header_len;
    if data_start > file.len() {
        return Err(ReadError::HeaderPastEnd { path: path.to_owned(), header_len, file_len: file.len() });
    }
    let json = file.bytes(PREFIX..data_start, &mut scratch)?;
    let mut header = parse(path, file_index, json)?;
    header.header_bytes = data_start;
    let end = check_layout(path, &mut header.tensors, data_start)?;
    if end != file.len() {
        return Err(ReadError::FileLength { path: path.to_owned(), got: file.len(), expected: end });
    }
    file.release(0..data_start, false);
    Ok(header)
}

/// XXH3-128 of a safetensors file's header with its length, in hexadecimal: the quick half of what tells whether a file is
/// still the same.
///
/// # Errors
/// Those of reading; [`ReadError::RangePastEnd`] for a file that has no header.
pub fn header_hash(file: &InputFile) -> Result<String, ReadError> {
    const AT_ONCE: u64 = 64 << 10;
    let mut scratch = Vec::new();
    let mut length = [0; PREFIX as usize];
    length.copy_from_slice(file.bytes(0..PREFIX, &mut scratch)?);
    let end = PREFIX.saturating_add(u64::from_le_bytes(length)).min(file.len());
    let mut hasher = twox_hash::XxHash3_128::default();
    for first in (0..end).step_by(AT_ONCE as usize) {
        hasher.write(file.bytes(first..(first + AT_ONCE).min(end), &mut scratch)?);
    }
    Ok(format!("{:032x}", hasher.finish_128()))
}

/// Parses the header's JSON; offsets stay relative to the data, and only each tensor by itself is checked.
fn parse(path: &Path, file_index: usize, json: &[u8]) -> Result<Header, ReadError> {
    let malformed = |detail| ReadError::HeaderSyntax { path: path.to_owned(), detail };
    match json.first() {
        Some(b'{') => {}
        // A space or a byte order mark here is how one file passes for two formats.
        Some(byte) => {
            return Err(malformed(format!("got a first byte of {byte:#04x}, expected `{{`")));
        }
        None => return Err(malformed("got an empty header, expected `{`".to_owned())),
    }
    let text = std::str::from_utf8(json)
        .map_err(|error| malformed(format!("got a byte that is not UTF-8 at {}", error.valid_up_to())))?;
    let mut parse = Parse {
        path,
        file_index,
        tensors: Vec::new(),
        metadata: None,
        unknown_fields: 0,
        unknown_field: None,
        error: None,
    };
    let mut json = serde_json::Deserializer::from_str(text);
    let outcome = (&mut parse).deserialize(&mut json).and_then(|()| json.end());
    if let Err(error) = outcome {
        return Err(parse.error.take().unwrap_or_else(|| malformed(shortened(&error))));
    }
    let mut warnings = Vec::new();
    if let Some((tensor, field)) = parse.unknown_field {
        warnings.push(format!(
            "{}: ignored {} unknown header fields, the first `{}` of tensor `{}`",
            path.display(),
            parse.unknown_fields,
            escaped(&field),
            escaped(&tensor)
        ));
    }
    Ok(Header {
        tensors: parse.tensors,
        metadata: parse.metadata.unwrap_or_default(),
        warnings,
        header_bytes: 0,
    })
}

/// Checks that names are unique and that the tensors tile the data without holes or overlaps; sorts them by
/// offset, makes their offsets absolute and returns where the last one ends.
fn check_layout(path: &Path, tensors: &mut [TensorMeta], data_start: u64) -> Result<u64, ReadError> {
    let mut by_name: Vec<&str> = tensors.iter().map(|t| t.name.as_str()).collect();
    by_name.sort_unstable();
    if let Some(pair) = by_name.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(ReadError::DuplicateTensor { path: path.to_owned(), tensor: pair[0].to_owned() });
    }
    // Empty tensors come first among those that start at one place; they are the only ones that may share it.
    tensors.sort_by_key(|t| (t.offset, t.bytes));
    let mut end = 0u64;
    for tensor in tensors.iter_mut() {
        if tensor.offset != end {
            return Err(ReadError::Layout {
                path: path.to_owned(),
                tensor: tensor.name.clone(),
                got: tensor.offset,
                expected: end,
            });
        }
        // No overflow: each end was read as a u64 of its own, and the sum below is compared as one.
        end += tensor.bytes;
        tensor.offset = tensor.offset.saturating_add(data_start);
    }
    Ok(end.saturating_add(data_start))
}

/// The state of parsing one header. Its errors are put aside typed, since serde's carry only text.
struct Parse<'p> {
    path: &'p Path,
    file_index: usize,
    tensors: Vec<TensorMeta>,
    metadata: Option<BTreeMap<String, String>>,
    unknown_fields: u64,
    unknown_field: Option<(String, String)>,
    error: Option<ReadError>,
}

impl Parse<'_> {
    /// Puts a typed error aside and returns the one that ends serde's run.
    fn fail<E: de::Error>(&mut self, error: ReadError) -> E {
        let text = E::custom("refused");
        self.error.get_or_insert(error);
        text
    }

    fn fail_entry<E: de::Error>(&mut self, tensor: &str, detail: String) -> E {
        let error = ReadError::TensorEntry { path: self.path.to_owned(), tensor: tensor.to_owned(), detail };
        self.fail(error)
    }
}

impl<'de> DeserializeSeed<'de> for &mut Parse<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut Parse<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                let detail = match (&self.metadata, map.next_value_seed(Strings)) {
                    (Some(_), Ok(_)) => format!("`{METADATA}` is declared twice"),
                    (None, Ok(Ok(strings))) => {
                        self.metadata = Some(strings);
                        continue;
                    }
                    (None, Ok(Err(key))) => {
                        format!("`{METADATA}` has the key `{}` twice", escaped(&key))
                    }
                    (_, Err(error)) => format!("`{METADATA}`: {}", shortened(&error)),
                };
                return Err(self.fail(ReadError::HeaderSyntax { path: self.path.to_owned(), detail }));
            }
            if self.tensors.len() == MAX_TENSORS {
                let path = self.path.to_owned();
                return Err(self.fail(ReadError::TooManyTensors { path, limit: MAX_TENSORS }));
            }
            let entry = map.next_value_seed(Entry { parse: self, name: &name });
            match entry {
                Ok((dtype, shape, [begin, end])) => {
                    let tensor = tensor(self.path, name, dtype, shape, begin, end, self.file_index)
                        .map_err(|error| self.fail(error))?;
                    self.tensors.push(tensor);
                }
                // Nothing typed yet: a JSON type or syntax that does not fit.
                Err(error) => return Err(self.fail_entry(&name, shortened(&error))),
            }
        }
        Ok(())
    }
}

/// Checks one tensor by itself: its shape's product, its size.
fn tensor(
    path: &Path,
    name: String,
    dtype: Dtype,
    shape: Vec<u64>,
    begin: u64,
    end: u64,
    file: usize,
) -> Result<TensorMeta, ReadError> {
    // Zeros count as ones here: the product of the others must fit too, as later code multiplies some of
    // them.
    let bits = shape.iter().try_fold(dtype.bits(), |bits, dim| bits.checked_mul((*dim).max(1)));
    let dims: Option<Vec<usize>> = shape.iter().map(|dim| usize::try_from(*dim).ok()).collect();
    let (Some(bits), Some(dims)) = (bits, dims) else {
        return Err(ReadError::ShapeOverflow {
            path: path.to_owned(),
            tensor: name,
            shape: format!("{shape:?}"),
        });
    };
    let bits = if shape.contains(&0) { 0 } else { bits };
    let Some(bytes) = end.checked_sub(begin) else {
        let detail = format!("ends before it starts (got data_offsets [{begin}, {end}])");
        return Err(ReadError::TensorEntry { path: path.to_owned(), tensor: name, detail });
    };
    if bits % 8 != 0 {
        let detail = format!("does not end at a whole byte (got {bits} bits for {dtype} {shape:?})");
        return Err(ReadError::TensorEntry { path: path.to_owned(), tensor: name, detail });
    }
    if bytes != bits / 8 {
        return Err(ReadError::TensorSize {
            path: path.to_owned(),
            tensor: name,
            got: bytes,
            expected: bits / 8,
            dtype,
            shape: format!("{shape:?}"),
        });
    }
    Ok(TensorMeta { name, dtype, shape: dims, file, offset: begin, bytes })
}

/// One value of the tensor map: `{"dtype": …, "shape": […], "data_offsets": [begin, end]}`.
struct Entry<'a, 'p> {
    parse: &'a mut Parse<'p>,
    name: &'a str,
}

impl<'de> DeserializeSeed<'de> for Entry<'_, '_> {
    type Value = (Dtype, Vec<u64>, [u64; 2]);

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Entry<'_, '_> {
    type Value = (Dtype, Vec<u64>, [u64; 2]);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let Self { parse, name } = self;
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(field) = map.next_key::<String>()? {
            let twice = match field.as_str() {
                "dtype" => {
                    let stated: String = map.next_value()?;
                    let Some(known) = Dtype::from_name(&stated) else {
                        let (path, tensor) = (parse.path.to_owned(), name.to_owned());
                        return Err(parse.fail(ReadError::UnknownDtype { path, tensor, dtype: stated }));
                    };
                    dtype.replace(known).is_some()
                }
                "shape" => match map.next_value_seed(Shape)? {
                    Ok(stated) => shape.replace(stated).is_some(),
                    Err(rank) => {
                        let (path, tensor) = (parse.path.to_owned(), name.to_owned());
                        return Err(parse.fail(ReadError::Rank { path, tensor, rank, limit: MAX_RANK }));
                    }
                },
                "data_offsets" => offsets.replace(map.next_value::<[u64; 2]>()?).is_some(),
                _ => {
                    map.next_value_seed(Skip)?;
                    parse.unknown_fields += 1;
                    if parse.unknown_field.is_none() {
                        parse.unknown_field = Some((name.to_owned(), field));
                    }
                    continue;
                }
            };
            if twice {
                return Err(parse.fail_entry(name, format!("has `{field}` twice")));
            }
        }
        let mut missing = |field: &str| parse.fail_entry(name, format!("has no `{field}`"));
        let dtype = dtype.ok_or_else(|| missing("dtype"))?;
        let shape = shape.ok_or_else(|| missing("shape"))?;
        let offsets = offsets.ok_or_else(|| missing("data_offsets"))?;
        Ok((dtype, shape, offsets))
    }
}

/// A list of dimensions, or its rank if that is over the limit (counted, not stored).
struct Shape;

impl<'de> DeserializeSeed<'de> for Shape {
    type Value = Result<Vec<u64>, usize>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Shape {
    type Value = Result<Vec<u64>, usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of non-negative integers")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let (mut dims, mut rank) = (Vec::new(), 0);
        while let Some(dim) = seq.next_element::<u64>()? {
            rank += 1;
            if rank <= MAX_RANK {
                dims.push(dim);
            }
        }
        Ok(if rank <= MAX_RANK { Ok(dims) } else { Err(rank) })
    }
}

/// A map of strings to strings, or the key that it has twice.
struct Strings;

impl<'de> DeserializeSeed<'de> for Strings {
    type Value = Result<BTreeMap<String, String>, String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Strings {
    type Value = Result<BTreeMap<String, String>, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of strings to strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut strings, mut twice) = (BTreeMap::new(), None);
        while let Some((key, value)) = map.next_entry::<String, String>()? {
            match strings.entry(key) {
                btree_map::Entry::Vacant(vacant) => {
                    vacant.insert(value);
                }
                btree_map::Entry::Occupied(occupied) => {
                    twice = twice.or_else(|| Some(occupied.key().clone()))
                }
            }
        }
        Ok(match twice {
            None => Ok(strings),
            Some(key) => Err(key),
        })
    }
}

/// Any JSON value, read and forgotten. Unlike serde's `IgnoredAny` it counts nesting, so that `serde_json`
/// refuses what is nested too deeply here as it does elsewhere.
pub(super) struct Skip;

impl<'de> DeserializeSeed<'de> for Skip {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Skip {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(Skip)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while map.next_key_seed(Skip)?.is_some() {
            map.next_value_seed(Skip)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
