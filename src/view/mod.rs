//! A model as a merge sees it: a checkpoint with an adapter added, rows of its vocabulary rearranged, and its layers
//! under the names of the output. Each is a small view on the one below; nothing is copied or held but what one tensor
//! needs while it is read.
//!
//! `run` opens them, `plan` asks for names, shapes and costs, `merge` reads values through [`View::read_values`].

pub mod adapter;
pub mod layers;
mod model;
pub mod names;
mod rows;

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

pub use adapter::{Adapter, AdapterError, LowRank};
pub use layers::{Layers, Section, layer_of};
pub use model::{FactorTerm, Model};
pub use rows::{RowMap, RowSource};

use crate::kernel::Real;
use crate::read::{Checkpoint, InputFile, ReadError, TensorMeta};

/// A [`Model`], or a section of it under other names.
///
/// [`TensorMeta::name`] of what it returns is the stored name: messages about values name the tensor that holds them.
#[derive(Debug)]
pub struct View {
    model: Arc<Model>,
    section: Option<Section>,
}

impl View {
    /// All of a model.
    pub fn whole(model: Arc<Model>) -> Self {
        Self { model, section: None }
    }

    /// A section of it.
    pub fn of_section(model: Arc<Model>, section: Section) -> Self {
        Self { model, section: Some(section) }
    }

    /// The same section of another model.
    pub fn with_model(&self, model: Arc<Model>) -> Self {
        Self { model, section: self.section.clone() }
    }

    /// The section that it is, `None` for a whole model.
    pub fn section(&self) -> Option<&Section> {
        self.section.as_ref()
    }

    /// What is behind it.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The tensor that the output calls `name`.
    pub fn get(&self, name: &str) -> Option<&TensorMeta> {
        match &self.section {
            None => self.model.get(name),
            Some(section) => self.model.get(&section.stored(name)?),
        }
    }

    /// Every tensor with its name in the output, in the order of the model's files.
    pub fn tensors(&self) -> impl Iterator<Item = (Cow<'_, str>, &TensorMeta)> {
        self.model.tensors().filter_map(|meta| {
            let name = match &self.section {
                None => Cow::Borrowed(meta.name.as_str()),
                Some(section) => section.output(&meta.name)?,
            };
            Some((name, meta))
        })
    }

    /// Whether a tensor's bytes are those in the file: then they may be copied as they are.
    pub fn is_stored(&self, meta: &TensorMeta) -> bool {
        self.model.is_stored(meta)
    }

    /// Memory that reading a tensor's values holds until [`View::release`].
    pub fn held_bytes(&self, meta: &TensorMeta) -> u64 {
        self.model.held_bytes(meta)
    }

    /// Bytes read for one pass over a tensor's values.
    pub fn read_bytes(&self, meta: &TensorMeta) -> u64 {
        self.model.read_bytes(meta)
    }

    /// Elements `elements` of a float tensor, flat and row-major. `count` is told the bytes read.
    ///
    /// # Errors
    /// Those of the files.
    pub fn read_values<T: Real>(
        &self,
        meta: &TensorMeta,
        elements: Range<usize>,
        out: &mut [T],
        scratch: &mut Vec<u8>,
        count: &dyn Fn(u64),
    ) -> Result<(), ReadError> {
        self.model.read_values(meta, elements, out, scratch, count)
    }

    /// Bytes of a tensor as stored.
    ///
    /// # Errors
    /// Those of the file.
    pub fn read_stored<'a>(
        &'a self,
        meta: &TensorMeta,
        byte_range: Range<u64>,
        scratch: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], ReadError> {
        self.model.read_stored(meta, byte_range, scratch)
    }

    /// The stored tensors behind one, for readahead.
    pub fn parts<'a>(&'a self, meta: &'a TensorMeta) -> Vec<(&'a Checkpoint, &'a TensorMeta)> {
        self.model.parts(meta)
    }

    /// Gives back what [`View::read_values`] holds for a tensor.
    pub fn release(&self, meta: &TensorMeta) {
        self.model.release(meta);
    }

    /// The checkpoint's `config.json`.
    pub fn config(&self) -> Option<&serde_json::Value> {
        self.model.checkpoint().config()
    }

    /// The checkpoint's directory.
    pub fn directory(&self) -> Option<&Path> {
        self.model.checkpoint().directory()
    }

    /// The files of checkpoint and adapter.
    pub fn files(&self) -> impl Iterator<Item = &InputFile> {
        let adapter = self.model.adapter().into_iter().flat_map(|adapter| adapter.checkpoint().files());
        self.model.checkpoint().files().iter().chain(adapter)
    }

    /// What was accepted but should be known.
    pub fn warnings(&self) -> impl Iterator<Item = &String> {
        let adapter = self.model.adapter().into_iter().flat_map(|adapter| adapter.warnings());
        self.model.checkpoint().warnings().iter().chain(adapter)
    }

    /// Bytes of all headers.
    pub fn header_bytes(&self) -> u64 {
        let adapter = self.model.adapter().map_or(0, |adapter| adapter.checkpoint().header_bytes());
        self.model.checkpoint().header_bytes() + adapter
    }

    /// Bytes of all tensors as stored.
    pub fn total_bytes(&self) -> u64 {
        let adapter = self.model.adapter().map_or(0, |adapter| adapter.checkpoint().total_bytes());
        self.model.checkpoint().total_bytes() + adapter
    }
}
