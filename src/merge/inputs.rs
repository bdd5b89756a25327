//! The opened checkpoints and statistics of a run, and reading a tensor's values from them.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{MergeError, pieces};
use crate::kernel::{Real, dispatch};
use crate::operator::{OperatorError, RowSource};
use crate::read::{TensorMeta, decode_difference_f32};
use crate::statistics::ModelStatistics;
use crate::statistics::factor::FactorSummary;
use crate::view::View;
use crate::view::names::twin;

/// Elements decoded, checked and used at a time: 16 KiB of f64, half of a first-level cache.
const NEAR: usize = 2048;

/// Index into [`Inputs::checkpoints`].
pub type SourceId = usize;

/// Bytes read on behalf of one parameter, and in a sweep what reading its factors told.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    bytes: Arc<AtomicU64>,
    /// Scans of whole factors by what they are of, for the variants to come.
    scans: Option<Arc<Mutex<HashMap<String, FactorSummary>>>>,
}

impl Tally {
    /// For the variants of a sweep, one after the other: each factor is scanned once.
    pub fn of_variants() -> Self {
        Self { scans: Some(Arc::default()), ..Self::default() }
    }
    /// Counts `bytes` more.
    pub fn add(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }
    /// So far.
    pub fn total(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// What `scan` gives, which passes over a whole factor; known already where another variant has scanned it.
    pub(super) fn scanned(
        &self,
        key: impl FnOnce() -> String,
        scan: impl FnOnce() -> Result<FactorSummary, MergeError>,
    ) -> Result<FactorSummary, MergeError> {
        let Some(scans) = &self.scans else { return scan() };
        let lock = || scans.lock().unwrap_or_else(PoisonError::into_inner);
        let key = key();
        if let Some(known) = lock().get(&key) {
            return Ok(known.clone());
        }
        let summary = scan()?;
        lock().insert(key, summary.clone());
        Ok(summary)
    }
}

/// One of the config's `models`.
pub struct ModelInput {
    /// Which checkpoint it is.
    pub source: SourceId,
    /// As written in the config.
    pub written: String,
    /// Its statistics, if it names any.
    pub statistics: Option<Arc<ModelStatistics>>,
}

/// Changes to the files beside the weights, made when the inputs are opened so that whatever is wrong with them shows
/// before any work.
#[derive(Debug, Default)]
pub struct OutputFiles {
    /// `config.json`, where slices or vocabularies change it.
    pub model_config: Option<serde_json::Value>,
    /// Whose tokenizer files are copied, where it is not the reference's.
    pub tokenizer_directory: Option<std::path::PathBuf>,
    /// Files that replace those that are copied.
    pub changed: Vec<(String, Vec<u8>)>,
    /// Files that are not copied, since they would overrule a changed one.
    pub dropped: Vec<&'static str>,
    /// Memory that vocabularies took while they were brought together.
    pub vocabulary_bytes: u64,
    /// For stderr and the report.
    pub warnings: Vec<String>,
}

/// Everything a merge reads. A checkpoint that is named twice is opened once.
pub struct Inputs {
    /// Distinct models: checkpoints, some with an adapter added or rows rearranged.
    pub checkpoints: Vec<Arc<View>>,
    /// As written in the config, for messages; one a checkpoint.
    pub names: Vec<String>,
    /// In the config's order.
    pub models: Vec<ModelInput>,
    /// `base_model`.
    pub base: Option<SourceId>,
    /// Checkpoints named by `initial`, by path as resolved.
    pub initials: HashMap<std::path::PathBuf, SourceId>,
    /// What `space: factor` makes of tensors that adapters change: a model that holds the results.
    pub factors: Option<SourceId>,
    /// Tensors that a checkpoint stores under another name: (source, name) to stored name (`--untie`).
    pub tied: HashMap<(SourceId, String), String>,
    /// Whether values that are not finite are an error.
    pub refuse_nonfinite: bool,
    /// What each section of the config reads; empty where there is none.
    pub sections: Vec<Arc<Inputs>>,
    /// What the files beside the output's weights have that the reference's have not.
    pub files: OutputFiles,
    /// Key of all random numbers, with model, tensor and element.
    pub seed: u64,
}

impl Inputs {
    /// Sets the key of all random numbers, in every section: before anybody else has the inputs.
    pub fn set_seed(&mut self, seed: u64) {
        self.seed = seed;
        for section in self.sections.iter_mut().filter_map(Arc::get_mut) {
            section.set_seed(seed);
        }
    }

    /// What a block of this section reads.
    pub fn of_section(self: &Arc<Self>, section: Option<usize>) -> &Arc<Self> {
        section.and_then(|k| self.sections.get(k)).unwrap_or(self)
    }

    /// Whether a tensor belongs to a module of the config, also where the module's slices leave it out.
    pub fn in_module(&self, name: &str) -> bool {
        let owns = |inputs: &Arc<Inputs>| {
            let section = inputs.checkpoints[inputs.reference()].section();
            section.is_none_or(|section| name.starts_with(&section.prefix))
        };
        self.sections.iter().any(owns)
    }

    /// The name that the output's tensor `name` has in one of the config's models: what filters of its parameters match.
    pub fn name_in<'n>(&self, source: SourceId, name: &'n str) -> Cow<'n, str> {
        let section = self.checkpoints[source].section();
        section.and_then(|section| section.stored(name)).unwrap_or(Cow::Borrowed(name))
    }

    /// The checkpoint that gives names, order and dtypes: the base, else the first model.
    pub fn reference(&self) -> SourceId {
        self.base.unwrap_or(self.models[0].source)
    }

    /// A tensor's place in a checkpoint, which may store it under another name.
    pub fn tensor(&self, source: SourceId, name: &str) -> Option<&TensorMeta> {
        let checkpoint = &self.checkpoints[source];
        let tied = || {
            if self.tied.is_empty() {
                return None;
            }
            self.tied.get(&(source, name.to_owned())).and_then(|stored| checkpoint.get(stored))
        };
        checkpoint.get(name).or_else(tied).or_else(|| checkpoint.get(&twin(name)?))
    }

    /// Decodes elements of a float tensor, flat and row-major.
    ///
    /// # Errors
    /// [`MergeError::Read`], or [`MergeError::NonFinite`] where that is asked for.
    pub fn read<T: Real>(
        &self,
        source: SourceId,
        meta: &TensorMeta,
        elements: Range<usize>,
        out: &mut [T],
        scratch: &mut Vec<u8>,
        tally: &Tally,
    ) -> Result<(), MergeError> {
        self.read_each(source, meta, elements, out, scratch, tally, |_, _| {})
    }

    /// As [`Inputs::read`], and hands each stretch of `out`, with its place there, to `each` while the first-level cache
    /// still has it.
    ///
    /// # Errors
    /// As [`Inputs::read`].
    #[allow(clippy::too_many_arguments, reason = "those of `read`, and what is done with the values")]
    pub fn read_each<T: Real>(
        &self,
        source: SourceId,
        meta: &TensorMeta,
        elements: Range<usize>,
        out: &mut [T],
        scratch: &mut Vec<u8>,
        tally: &Tally,
        mut each: impl FnMut(usize, &mut [T]),
    ) -> Result<(), MergeError> {
        let first = elements.start;
        let view = &self.checkpoints[source];
        if !view.is_stored(meta) {
            view.read_values(meta, elements, out, scratch, &|bytes| tally.add(bytes))?;
            for (k, values) in out.chunks_mut(NEAR).enumerate() {
                if self.refuse_nonfinite {
                    self.check_finite(source, meta, first + k * NEAR, values)?;
                }
                each(k * NEAR, values);
            }
            return Ok(());
        }
        let width = meta.dtype.float_bytes().unwrap_or(0);
        let mut decode = |bytes: &[u8], check: bool, out: &mut [T]| {
            for (k, (values, bytes)) in
                out.chunks_mut(NEAR).zip(bytes.chunks(NEAR * width.max(1))).enumerate()
            {
                if !check {
                    T::decode(meta.dtype, bytes, values);
                } else if !T::decode_finite(meta.dtype, bytes, values) {
                    self.check_finite(source, meta, first + k * NEAR, values)?;
                }
                each(k * NEAR, values);
            }
            Ok(())
        };
        let range = (elements.start * width) as u64..(elements.end * width) as u64;
        let (kind, len) = (pieces::Kind::Tensor(source), (range.end - range.start) as usize);
        // Whatever it holds was checked when it was read.
        let mut taken = Ok(());
        if pieces::take(kind, range.start, len, |bytes| taken = decode(bytes, false, out)) {
            return taken;
        }
        tally.add(range.end - range.start);
        let bytes = view.read_stored(meta, range.clone(), scratch)?;
        decode(bytes, self.refuse_nonfinite, out)?;
        pieces::keep(kind, range.start, len, |kept| kept.copy_from_slice(bytes));
        Ok(())
    }

    /// Decodes the differences of elements from `base`, in f32.
    ///
    /// # Errors
    /// As [`Inputs::read`].
    #[allow(clippy::too_many_arguments, reason = "those of `read`, and the base")]
    pub fn read_differences(
        &self,
        source: SourceId,
        meta: &TensorMeta,
        elements: Range<usize>,
        base: &[f32],
        out: &mut [f32],
        scratch: &mut Vec<u8>,
        tally: &Tally,
    ) -> Result<(), MergeError> {
        // Asked first: bytes that are of no use here would be read twice where files are not mapped.
        if meta.dtype.is_upper_f32()
            && let Some(bytes) = self.stored(source, meta, elements.clone(), scratch)?
            && matches!(decode_difference_f32(meta.dtype, bytes, base, out), Ok(Some(true)))
        {
            tally.add(bytes.len() as u64);
            return Ok(());
        }
        // Piece by piece; a value that is not finite is found there.
        self.read_each(source, meta, elements, out, scratch, tally, |at, values| {
            let base = &base[at..at + values.len()];
            dispatch(
                #[inline(always)]
                || {
                    for (x, b) in values.iter_mut().zip(base) {
                        *x -= *b;
                    }
                },
            );
        })
    }

    /// The stored bytes of elements of a float tensor, not looked at; `None` where values are made, or where a sweep keeps
    /// what is read.
    ///
    /// # Errors
    /// [`MergeError::Read`].
    pub fn stored<'a>(
        &'a self,
        source: SourceId,
        meta: &TensorMeta,
        elements: Range<usize>,
        scratch: &'a mut Vec<u8>,
    ) -> Result<Option<&'a [u8]>, MergeError> {
        let view = &self.checkpoints[source];
        let Some(width) = meta.dtype.float_bytes().filter(|_| view.is_stored(meta) && !pieces::active())
        else {
            return Ok(None);
        };
        let range = (elements.start * width) as u64..(elements.end * width) as u64;
        Ok(Some(view.read_stored(meta, range, scratch)?))
    }

    /// # Errors
    /// [`MergeError::NonFinite`] naming the first value that is not finite.
    pub fn check_finite<T: Real>(
        &self,
        source: SourceId,
        meta: &TensorMeta,
        first: usize,
        values: &[T],
    ) -> Result<(), MergeError> {
        match T::first_nonfinite(values) {
            None => Ok(()),
            Some(k) => Err(MergeError::NonFinite {
                model: self.names[source].clone(),
                tensor: meta.name.clone(),
                index: (first + k) as u64,
                value: values[k].to_f64(),
            }),
        }
    }
}

/// Task vector `τ = θᵢ - θ₀` of a 2-D weight as rows: the factor of the data-free Gram `τᵀτ`.
pub(super) struct TaskVectorRows {
    pub inputs: Arc<Inputs>,
    pub model: SourceId,
    pub base: SourceId,
    pub name: String,
    pub rows: usize,
    pub columns: usize,
    pub tally: Tally,
}

impl TaskVectorRows {
    fn read<T: Real>(&self, rows: Range<usize>, out: &mut [T]) -> Result<(), MergeError> {
        let elements = rows.start * self.columns..rows.end * self.columns;
        let mut scratch = Vec::new();
        let mut piece = vec![0.0f64; 2 * super::PIECE.min(elements.len())];
        let (x, y) = piece.split_at_mut(super::PIECE.min(elements.len()));
        let find = |source| {
            self.inputs.tensor(source, &self.name).ok_or_else(|| MergeError::Missing {
                model: self.inputs.names[source].clone(),
                tensor: self.name.clone(),
                got: "none".to_owned(),
                expected: vec![self.rows, self.columns],
            })
        };
        let (model, base) = (find(self.model)?, find(self.base)?);
        for start in (0..elements.len()).step_by(super::PIECE) {
            let len = super::PIECE.min(elements.len() - start);
            let range = elements.start + start..elements.start + start + len;
            self.inputs.read(self.model, model, range.clone(), &mut x[..len], &mut scratch, &self.tally)?;
            self.inputs.read(self.base, base, range, &mut y[..len], &mut scratch, &self.tally)?;
            for ((out, x), y) in out[start..start + len].iter_mut().zip(&*x).zip(&*y) {
                *out = T::from_f64(x - y);
            }
        }
        Ok(())
    }
}

impl RowSource for TaskVectorRows {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }
    fn read_f32(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), OperatorError> {
        self.read(rows, out).map_err(|e| OperatorError::Source(Box::new(e)))
    }
    fn read_f64(&self, rows: Range<usize>, out: &mut [f64]) -> Result<(), OperatorError> {
        self.read(rows, out).map_err(|e| OperatorError::Source(Box::new(e)))
    }
}
