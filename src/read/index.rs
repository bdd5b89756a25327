//! `model.safetensors.index.json`: which tensor lies in which shard.
//!
//! [`super::Checkpoint`] is the one caller. The index comes from whoever made the checkpoint, and its values
//! become paths: each must be one plain file name, checked here, before anything is joined or opened. This
//! module opens the index and nothing else.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::Path;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, Visitor};

use super::file::read_small_file;
use super::header::Skip;
use super::{MAX_INDEX_BYTES, MAX_TENSORS, ReadError, escaped, shortened};

/// A parsed and checked index.
#[derive(Debug)]
pub(super) struct Index {
    /// The shards' file names, sorted.
    pub(super) shards: Vec<String>,
    /// Each tensor's name and its shard's place in `shards`, sorted by name.
    weight_map: Vec<(String, usize)>,
}

impl Index {
    /// Reads an index of at most [`MAX_INDEX_BYTES`].
    ///
    /// # Errors As [`read_small_file`]; [`ReadError::IndexSyntax`], [`ReadError::IndexEntry`] and
    /// [`ReadError::IndexPath`] for what the index says; [`ReadError::TooManyTensors`].
    pub(super) fn read(path: &Path) -> Result<Self, ReadError> {
        match read_small_file(path, MAX_INDEX_BYTES)? {
            Some(json) => Self::parse(path, &json),
            None => {
                Err(ReadError::Open { path: path.to_owned(), source: std::io::ErrorKind::NotFound.into() })
            }
        }
    }

    fn parse(path: &Path, json: &[u8]) -> Result<Self, ReadError> {
        let mut parse = Parse { path, entries: None, error: None };
        let mut json = serde_json::Deserializer::from_slice(json);
        let outcome = (&mut parse).deserialize(&mut json).and_then(|()| json.end());
        if let Err(error) = outcome {
            let detail = shortened(&error);
            let syntax = || ReadError::IndexSyntax { path: path.to_owned(), detail };
            return Err(parse.error.take().unwrap_or_else(syntax));
        }
        let Some(entries) = parse.entries else {
            return Err(ReadError::IndexSyntax {
                path: path.to_owned(),
                detail: "got no `weight_map`, expected one".to_owned(),
            });
        };
        let WeightMap { mut names, shards, .. } = entries;
        if names.is_empty() {
            return Err(ReadError::IndexSyntax {
                path: path.to_owned(),
                detail: "got an empty `weight_map`, expected at least one tensor".to_owned(),
            });
        }
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(ReadError::IndexEntry {
                path: path.to_owned(),
                key: pair[0].0.clone(),
                detail: "is declared twice".to_owned(),
            });
        }
        // Shards were numbered as they came; the order that counts is that of their names.
        let mut order: Vec<(String, usize)> = shards.into_iter().collect();
        order.sort_unstable();
        let mut place = vec![0; order.len()];
        for (sorted, (_, first_seen)) in order.iter().enumerate() {
            place[*first_seen] = sorted;
        }
        for (_, shard) in &mut names {
            *shard = place[*shard];
        }
        Ok(Self { shards: order.into_iter().map(|(name, _)| name).collect(), weight_map: names })
    }

    /// Number of tensors.
    pub(super) fn len(&self) -> usize {
        self.weight_map.len()
    }

    /// Where a tensor stands in the index, and its shard's place in `shards`.
    pub(super) fn find(&self, tensor: &str) -> Option<(usize, usize)> {
        let at = self.weight_map.binary_search_by(|(name, _)| name.as_str().cmp(tensor)).ok()?;
        Some((at, self.weight_map[at].1))
    }

    /// Name and shard of the tensor at a place that [`Index::find`] may return.
    pub(super) fn entry(&self, at: usize) -> (&str, &str) {
        let (name, shard) = &self.weight_map[at];
        (name, &self.shards[*shard])
    }
}

/// Whether `name` is one plain file name, on every system: joined to a directory it stays inside.
fn is_plain_file_name(name: &str) -> bool {
    let drive = name.as_bytes().get(1) == Some(&b':') && name.as_bytes()[0].is_ascii_alphabetic();
    !matches!(name, "" | "." | "..")
        && !drive
        && !name.contains(|c: char| matches!(c, '/' | '\\') || c.is_control())
}

#[derive(Default)]
struct WeightMap {
    names: Vec<(String, usize)>,
    shards: HashMap<String, usize>,
}

/// The state of parsing one index; its errors are put aside typed, since serde's carry only text.
struct Parse<'p> {
    path: &'p Path,
    entries: Option<WeightMap>,
    error: Option<ReadError>,
}

impl Parse<'_> {
    fn fail<E: de::Error>(&mut self, error: ReadError) -> E {
        self.error.get_or_insert(error);
        E::custom("refused")
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
        f.write_str("a map with weight_map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            if seen.contains(&key) {
                let detail = format!("the key `{}` is there twice", escaped(&key));
                return Err(self.fail(ReadError::IndexSyntax { path: self.path.to_owned(), detail }));
            }
            if key == "weight_map" {
                map.next_value_seed(Entries(self))?;
            } else {
                map.next_value_seed(Skip)?;
            }
            seen.insert(key);
        }
        Ok(())
    }
}

/// The value of `weight_map`.
struct Entries<'a, 'p>(&'a mut Parse<'p>);

impl<'de> DeserializeSeed<'de> for Entries<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensor names to file names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let parse = self.0;
        let mut entries = WeightMap::default();
        while let Some(key) = map.next_key::<String>()? {
            let value = match map.next_value::<String>() {
                Ok(value) => value,
                Err(error) => {
                    let (path, detail) = (parse.path.to_owned(), shortened(&error));
                    return Err(parse.fail(ReadError::IndexEntry { path, key, detail }));
                }
            };
            if !is_plain_file_name(&value) {
                let path = parse.path.to_owned();
                return Err(parse.fail(ReadError::IndexPath { path, key, value }));
            }
            if entries.names.len() == MAX_TENSORS {
                let path = parse.path.to_owned();
                return Err(parse.fail(ReadError::TooManyTensors { path, limit: MAX_TENSORS }));
            }
            let next = entries.shards.len();
            let shard = *entries.shards.entry(value).or_insert(next);
            entries.names.push((key, shard));
        }
        parse.entries = Some(entries);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
