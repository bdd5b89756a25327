//! A checkpoint with an adapter added to it, or with the rows of its vocabulary rearranged, or a task's masks: the tensors
//! that change are known from headers, their values are formed piece by piece as they are read.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::adapter::{Adapter, LowRank};
use super::rows::{RowMap, RowSource};
use crate::kernel::{Buffer, Real, dispatch};
use crate::read::{Checkpoint, Dtype, ReadError, TensorMeta};

/// Columns of a low-rank product formed at a time: with its factors' rows it stays in the first-level cache.
const COLUMNS: usize = 1024;
/// Elements of a factor decoded at a time.
const DECODED: usize = 1 << 14;

/// One model: what is stored and what is made of it.
///
/// Two kinds are stacked where a model needs both: the lower one has the adapter, the upper one the rows.
#[derive(Debug)]
pub struct Model {
    checkpoint: Arc<Checkpoint>,
    adapter: Option<Arc<Adapter>>,
    /// The model whose rows this one has in another order.
    below: Option<Arc<Model>>,
    /// By stored name.
    changed: HashMap<String, Changed>,
    /// Names of tensors that the adapter has beyond the checkpoint, in order; of masks, all.
    added: Vec<String>,
    /// The checkpoint's own tensors are not the model's: it holds masks.
    masks: bool,
}

#[derive(Debug)]
struct Changed {
    /// What a merge sees: the stored name, the new shape.
    meta: TensorMeta,
    kind: Kind,
    /// Made by the first read, given back when the tensor is done.
    held: Mutex<Option<Arc<Held>>>,
}

#[derive(Debug)]
enum Kind {
    /// The adapter's own tensor of that name, or the checkpoint's, plus a product.
    Adapted { replaced: Option<TensorMeta>, low_rank: Option<LowRank> },
    /// Rows of the model below.
    Rows(RowMap),
    /// The checkpoint's own tensor times `own`, plus one product of several adapters' factors, each side a weighted sum.
    Factors { own: f64, terms: Vec<FactorTerm> },
    /// One bit an element, by this row of the stored tensor: the factor where it is set, 0 elsewhere.
    Mask { row: TensorMeta, factor: f64 },
}

/// One adapter's part in a product of summed factors.
#[derive(Debug, Clone)]
pub struct FactorTerm {
    /// Whose factors.
    pub adapter: Arc<Adapter>,
    /// Which: all terms of one tensor are of one rank and one direction. Its own scale does not enter.
    pub low_rank: LowRank,
    /// Weight of A.
    pub a: f64,
    /// Weight of B.
    pub b: f64,
}

/// Values that every piece of a tensor needs.
#[derive(Debug)]
enum Held {
    /// `[rows, rank]` and `[rank, columns]`, row-major.
    Factors(Buffer<f32>, Buffer<f32>),
    /// The mean row.
    Mean(Vec<f64>),
}

impl Model {
    /// A checkpoint as it is, or with an adapter.
    pub fn new(checkpoint: Arc<Checkpoint>, adapter: Option<Arc<Adapter>>) -> Self {
        let mut model = Self {
            checkpoint,
            adapter: None,
            below: None,
            changed: HashMap::new(),
            added: Vec::new(),
            masks: false,
        };
        let Some(adapter) = adapter else { return model };
        for (name, change) in adapter.changes() {
            let stored = change.replaced.as_ref().or_else(|| model.checkpoint.get(name));
            let Some(stored) = stored else { continue };
            if model.checkpoint.get(name).is_none() {
                model.added.push(name.clone());
            }
            let meta = TensorMeta { name: name.clone(), ..stored.clone() };
            let kind = Kind::Adapted { replaced: change.replaced.clone(), low_rank: change.low_rank.clone() };
            model.changed.insert(name.clone(), Changed { meta, kind, held: Mutex::default() });
        }
        model.adapter = Some(adapter);
        model
    }

    /// `below` with the rows of some tensors rearranged: by stored name.
    pub fn with_rows(below: Arc<Model>, rows: impl IntoIterator<Item = (String, RowMap)>) -> Self {
        let changed = rows
            .into_iter()
            .filter_map(|(name, map)| {
                let mut meta = below.get(&name)?.clone();
                let old = meta.shape.first().copied().unwrap_or(1).max(1) as u64;
                meta.bytes = meta.bytes / old * map.rows.len() as u64;
                *meta.shape.first_mut()? = map.rows.len();
                Some((name, Changed { meta, kind: Kind::Rows(map), held: Mutex::default() }))
            })
            .collect();
        Self {
            checkpoint: Arc::clone(&below.checkpoint),
            adapter: below.adapter.clone(),
            below: Some(below),
            changed,
            added: Vec::new(),
            masks: false,
        }
    }

    /// A checkpoint with products of summed factors: `own · W + (Σ bᵢBᵢ)·(Σ aᵢAᵢ)` for each of `tensors`, by stored name.
    pub fn of_factors(
        checkpoint: Arc<Checkpoint>,
        tensors: impl IntoIterator<Item = (String, f64, Vec<FactorTerm>)>,
    ) -> Self {
        let mut model = Self::new(checkpoint, None);
        for (name, own, terms) in tensors {
            let Some(meta) = model.checkpoint.get(&name).cloned() else { continue };
            let kind = Kind::Factors { own, terms };
            model.changed.insert(name, Changed { meta, kind, held: Mutex::default() });
        }
        model
    }

    /// Masks as a model that holds `factor` where row `task` of a parameter's mask is set and 0 elsewhere. `masks` gives
    /// name and shape of each parameter, and its mask in `checkpoint`, U8 `[tasks, ⌈elements/8⌉]`.
    pub fn of_masks(
        checkpoint: Arc<Checkpoint>,
        task: usize,
        factor: f64,
        masks: impl IntoIterator<Item = (String, Vec<usize>, TensorMeta)>,
    ) -> Self {
        let mut model = Self { masks: true, ..Self::new(checkpoint, None) };
        for (name, shape, stored) in masks {
            let bytes = stored.shape.get(1).map_or(0, |bytes| *bytes as u64);
            let offset = stored.offset + task as u64 * bytes;
            let row = TensorMeta { shape: vec![bytes as usize], offset, bytes, ..stored };
            let mut meta = TensorMeta { name: name.clone(), dtype: Dtype::F32, shape, ..row.clone() };
            meta.bytes = 4 * meta.elements();
            model.added.push(name.clone());
            let kind = Kind::Mask { row, factor };
            model.changed.insert(name, Changed { meta, kind, held: Mutex::default() });
        }
        model
    }

    /// What is stored.
    pub fn checkpoint(&self) -> &Arc<Checkpoint> {
        &self.checkpoint
    }

    /// The adapter, if there is one.
    pub fn adapter(&self) -> Option<&Arc<Adapter>> {
        self.adapter.as_ref()
    }

    /// The tensor of this stored name.
    pub fn get(&self, name: &str) -> Option<&TensorMeta> {
        match self.changed.get(name) {
            Some(changed) => Some(&changed.meta),
            None => match &self.below {
                Some(below) => below.get(name),
                None if self.masks => None,
                None => self.checkpoint.get(name),
            },
        }
    }

    /// Every tensor, in the order of the files; what an adapter adds comes last.
    pub fn tensors(&self) -> Box<dyn Iterator<Item = &TensorMeta> + '_> {
        let below: Box<dyn Iterator<Item = &TensorMeta>> = match &self.below {
            Some(below) => below.tensors(),
            None if self.masks => Box::new(std::iter::empty()),
            None => Box::new(self.checkpoint.tensors().iter()),
        };
        let added = self.added.iter().filter_map(|name| self.get(name));
        Box::new(
            below.map(|meta| self.changed.get(&meta.name).map_or(meta, |changed| &changed.meta)).chain(added),
        )
    }

    /// Bytes of the row maps.
    pub fn map_bytes(&self) -> u64 {
        let rows = |changed: &Changed| match &changed.kind {
            Kind::Rows(map) => map.bytes(),
            Kind::Adapted { .. } | Kind::Factors { .. } | Kind::Mask { .. } => 0,
        };
        self.changed.values().map(rows).sum()
    }

    /// As [`super::View::is_stored`].
    pub fn is_stored(&self, meta: &TensorMeta) -> bool {
        match self.changed.get(&meta.name).map(|changed| &changed.kind) {
            Some(Kind::Adapted { low_rank, .. }) => low_rank.is_none(),
            Some(Kind::Rows(_) | Kind::Factors { .. } | Kind::Mask { .. }) => false,
            None => self.below.as_ref().is_none_or(|below| below.is_stored(meta)),
        }
    }

    /// As [`super::View::held_bytes`].
    pub fn held_bytes(&self, meta: &TensorMeta) -> u64 {
        match self.changed.get(&meta.name).map(|changed| &changed.kind) {
            None => self.below.as_ref().map_or(0, |below| below.held_bytes(meta)),
            Some(Kind::Adapted { low_rank: None, .. } | Kind::Mask { .. }) => 0,
            Some(Kind::Adapted { low_rank: Some(low), .. }) => {
                // Turning a factor round takes a second copy of it for a moment.
                4 * (low.elements() + if low.transposed { low.a.elements().max(low.b.elements()) } else { 0 })
            }
            Some(Kind::Factors { terms, .. }) => {
                // The sums, an adapter's factors, and the same as above.
                let most = terms.iter().map(|term| term.low_rank.elements()).max().unwrap_or(0);
                4 * 3 * most
            }
            Some(Kind::Rows(map)) => {
                let columns = columns(meta) as u64;
                let mean = if map.has_padding() { 8 * columns } else { 0 };
                let of = |(model, name): &(Arc<Model>, String)| {
                    model.get(name).map_or(0, |meta| model.held_bytes(meta))
                };
                let own = self.below_meta(&meta.name).map_or(0, |(below, meta)| below.held_bytes(meta));
                mean + own + map.donors.iter().map(of).sum::<u64>()
            }
        }
    }

    /// As [`super::View::read_bytes`].
    pub fn read_bytes(&self, meta: &TensorMeta) -> u64 {
        match self.changed.get(&meta.name).map(|changed| &changed.kind) {
            None => self.below.as_ref().map_or(meta.bytes, |below| below.read_bytes(meta)),
            Some(Kind::Adapted { low_rank, .. }) => {
                meta.bytes + low_rank.as_ref().map_or(0, |low| low.a.bytes + low.b.bytes)
            }
            Some(Kind::Rows(map)) => {
                let own = self.below_meta(&meta.name).map_or(0, |(below, meta)| below.read_bytes(meta));
                if map.has_padding() { 2 * own } else { own }
            }
            Some(Kind::Factors { terms, .. }) => {
                let of = |term: &FactorTerm| term.low_rank.a.bytes + term.low_rank.b.bytes;
                meta.bytes + terms.iter().map(of).sum::<u64>()
            }
            Some(Kind::Mask { row, .. }) => row.bytes,
        }
    }

    /// As [`super::View::parts`].
    pub fn parts<'a>(&'a self, meta: &'a TensorMeta) -> Vec<(&'a Checkpoint, &'a TensorMeta)> {
        match self.changed.get(&meta.name).map(|changed| &changed.kind) {
            None => match &self.below {
                Some(below) => below.parts(meta),
                None => vec![(&*self.checkpoint, meta)],
            },
            Some(Kind::Adapted { replaced, low_rank }) => {
                let mut parts = vec![self.stored(&meta.name, replaced.as_ref())]
                    .into_iter()
                    .flatten()
                    .collect::<Vec<_>>();
                if let (Some(low), Some(adapter)) = (low_rank, &self.adapter) {
                    parts.extend([(adapter.checkpoint(), &low.a), (adapter.checkpoint(), &low.b)]);
                }
                parts
            }
            Some(Kind::Rows(_)) => match self.below_meta(&meta.name) {
                Some((below, meta)) => below.parts(meta),
                None => Vec::new(),
            },
            Some(Kind::Factors { terms, .. }) => {
                let of = |term: &'a FactorTerm| {
                    let checkpoint = term.adapter.checkpoint();
                    [(checkpoint, &term.low_rank.a), (checkpoint, &term.low_rank.b)]
                };
                let own = self.checkpoint.get(&meta.name).map(|own| (&*self.checkpoint, own));
                own.into_iter().chain(terms.iter().flat_map(of)).collect()
            }
            Some(Kind::Mask { row, .. }) => vec![(&*self.checkpoint, row)],
        }
    }

    /// As [`super::View::release`].
    pub fn release(&self, meta: &TensorMeta) {
        match self.changed.get(&meta.name) {
            None => {
                if let Some(below) = &self.below {
                    below.release(meta);
                }
            }
            Some(changed) => {
                *changed.held.lock().unwrap_or_else(PoisonError::into_inner) = None;
                if let Kind::Rows(map) = &changed.kind {
                    for (model, name) in &map.donors {
                        if let Some(meta) = model.get(name) {
                            model.release(meta);
                        }
                    }
                    if let Some((below, meta)) = self.below_meta(&meta.name) {
                        below.release(meta);
                    }
                }
            }
        }
    }

    /// As [`super::View::read_stored`].
    pub fn read_stored<'a>(
        &'a self,
        meta: &TensorMeta,
        byte_range: Range<u64>,
        scratch: &'a mut Vec<u8>,
    ) -> Result<&'a [u8], ReadError> {
        if let Some(Changed { kind: Kind::Adapted { replaced: Some(replaced), .. }, .. }) =
            self.changed.get(&meta.name)
            && let Some(adapter) = &self.adapter
        {
            return adapter.checkpoint().read(replaced, byte_range, scratch);
        }
        match &self.below {
            Some(below) => below.read_stored(meta, byte_range, scratch),
            None => self.checkpoint.read(meta, byte_range, scratch),
        }
    }

    /// As [`super::View::read_values`].
    pub fn read_values<T: Real>(
        &self,
        meta: &TensorMeta,
        elements: Range<usize>,
        out: &mut [T],
        scratch: &mut Vec<u8>,
        count: &dyn Fn(u64),
    ) -> Result<(), ReadError> {
        let Some(changed) = self.changed.get(&meta.name) else {
            return match &self.below {
                Some(below) => below.read_values(meta, elements, out, scratch, count),
                None => decode(&self.checkpoint, meta, elements, out, scratch, count),
            };
        };
        match &changed.kind {
            Kind::Adapted { replaced, low_rank } => {
                if let Some((checkpoint, stored)) = self.stored(&meta.name, replaced.as_ref()) {
                    decode(checkpoint, stored, elements.clone(), out, scratch, count)?;
                }
                if let Some(low) = low_rank {
                    let Some(adapter) = &self.adapter else {
                        unreachable!("only an adapter has factors");
                    };
                    let held = changed.hold(|| {
                        let (left, right) = factors(adapter, low, count)?;
                        Ok(Held::Factors(left, right))
                    })?;
                    if let Held::Factors(left, right) = &*held {
                        add_product(left, right, (low.rank, low.scale), columns(meta), elements.start, out);
                    }
                }
                Ok(())
            }
            Kind::Factors { own, terms } => {
                if let Some(stored) = self.checkpoint.get(&meta.name) {
                    decode(&self.checkpoint, stored, elements.clone(), out, scratch, count)?;
                }
                if *own != 1.0 {
                    let own = T::from_f64(*own);
                    for out in &mut *out {
                        *out *= own;
                    }
                }
                let held = changed.hold(|| summed_factors(terms, count))?;
                if let (Held::Factors(left, right), Some(term)) = (&*held, terms.first()) {
                    add_product(left, right, (term.low_rank.rank, 1.0), columns(meta), elements.start, out);
                }
                Ok(())
            }
            Kind::Rows(map) => {
                let mean = if map.has_padding() {
                    Some(changed.hold(|| self.mean_row(meta, map, count))?)
                } else {
                    None
                };
                let mean = match mean.as_deref() {
                    Some(Held::Mean(mean)) => &mean[..],
                    _ => &[],
                };
                self.read_rows(meta, map, mean, elements, out, scratch, count)
            }
            Kind::Mask { row, factor } => {
                let bytes = elements.start as u64 / 8..(elements.end as u64).div_ceil(8);
                count(bytes.end - bytes.start);
                let skipped = elements.start % 8;
                let bits = self.checkpoint.read(row, bytes, scratch)?;
                let factor = T::from_f64(*factor);
                for (k, out) in out.iter_mut().enumerate() {
                    let k = skipped + k;
                    *out = if bits[k / 8] >> (k % 8) & 1 == 1 { factor } else { T::default() };
                }
                Ok(())
            }
        }
    }

    /// Where a tensor's own values are.
    fn stored<'a>(
        &'a self,
        name: &str,
        replaced: Option<&'a TensorMeta>,
    ) -> Option<(&'a Checkpoint, &'a TensorMeta)> {
        match (replaced, &self.adapter) {
            (Some(meta), Some(adapter)) => Some((adapter.checkpoint(), meta)),
            _ => Some((&*self.checkpoint, self.checkpoint.get(name)?)),
        }
    }

    fn below_meta(&self, name: &str) -> Option<(&Model, &TensorMeta)> {
        let below = self.below.as_deref()?;
        Some((below, below.get(name)?))
    }

    /// The mean of all rows before the padding, summed in f64 in their order.
    fn mean_row(&self, meta: &TensorMeta, map: &RowMap, count: &dyn Fn(u64)) -> Result<Held, ReadError> {
        let (columns, filled) = (columns(meta), map.filled());
        let mut mean = vec![0.0; columns];
        let mut row = vec![0.0f64; columns];
        let mut scratch = Vec::new();
        for k in 0..filled {
            let elements = k * columns..(k + 1) * columns;
            self.read_rows(meta, map, &[], elements, &mut row, &mut scratch, count)?;
            for (sum, value) in mean.iter_mut().zip(&row) {
                *sum += value;
            }
        }
        for sum in &mut mean {
            *sum /= filled.max(1) as f64;
        }
        Ok(Held::Mean(mean))
    }

    #[allow(clippy::too_many_arguments, reason = "the private half of `read_values`")]
    fn read_rows<T: Real>(
        &self,
        meta: &TensorMeta,
        map: &RowMap,
        mean: &[f64],
        elements: Range<usize>,
        out: &mut [T],
        scratch: &mut Vec<u8>,
        count: &dyn Fn(u64),
    ) -> Result<(), ReadError> {
        let Some((below, own)) = self.below_meta(&meta.name) else { return Ok(()) };
        let columns = columns(meta).max(1);
        let mut at = elements.start;
        while at < elements.end {
            let (row, column) = (at / columns, at % columns);
            // Rows that follow each other in both are read together.
            let mut last = row;
            if let RowSource::Own(first) = map.rows[row] {
                while (last + 1) * columns < elements.end
                    && let Some(RowSource::Own(next)) = map.rows.get(last + 1)
                    && *next as usize == first as usize + (last + 1 - row)
                {
                    last += 1;
                }
            }
            let end = ((last + 1) * columns).min(elements.end);
            let part = &mut out[at - elements.start..end - elements.start];
            match map.rows[row] {
                RowSource::Own(first) => {
                    let start = first as usize * columns + column;
                    below.read_values(own, start..start + part.len(), part, scratch, count)?;
                }
                RowSource::Zero => part.fill(T::default()),
                RowSource::Padding => {
                    for (out, value) in part.iter_mut().zip(&mean[column..]) {
                        *out = T::from_f64(*value);
                    }
                }
                RowSource::Mean(index) => {
                    let rows = &map.means[index as usize];
                    let mut other = vec![T::default(); part.len()];
                    part.fill(T::default());
                    for (k, (donor, row)) in rows.iter().enumerate() {
                        let (model, name) = &map.donors[*donor as usize];
                        let Some(theirs) = model.get(name) else { continue };
                        let start = *row as usize * columns + column;
                        model.read_values(theirs, start..start + other.len(), &mut other, scratch, count)?;
                        for (out, value) in part.iter_mut().zip(&other) {
                            // Not added to zero: a row of its own keeps its negative zeros.
                            *out = if k == 0 { *value } else { *out + *value };
                        }
                    }
                    if rows.len() > 1 {
                        let divisor = T::from_f64(rows.len() as f64);
                        for out in &mut *part {
                            *out /= divisor;
                        }
                    }
                }
            }
            at = end;
        }
        Ok(())
    }
}

impl Changed {
    /// What is held, made by whoever needs it first.
    fn hold(&self, make: impl FnOnce() -> Result<Held, ReadError>) -> Result<Arc<Held>, ReadError> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = &*held {
            return Ok(Arc::clone(held));
        }
        let made = Arc::new(make()?);
        *held = Some(Arc::clone(&made));
        Ok(made)
    }
}

/// The product of all dimensions but the first.
fn columns(meta: &TensorMeta) -> usize {
    meta.shape.iter().skip(1).product()
}

fn decode<T: Real>(
    checkpoint: &Checkpoint,
    meta: &TensorMeta,
    elements: Range<usize>,
    out: &mut [T],
    scratch: &mut Vec<u8>,
    count: &dyn Fn(u64),
) -> Result<(), ReadError> {
    let width = meta.dtype.float_bytes().unwrap_or(0);
    let range = (elements.start * width) as u64..(elements.end * width) as u64;
    count(range.end - range.start);
    T::decode(meta.dtype, checkpoint.read(meta, range, scratch)?, out);
    Ok(())
}

/// Reads the factors of a product, each with the dimension of the stored weight that it belongs to.
fn factors(
    adapter: &Adapter,
    low: &LowRank,
    count: &dyn Fn(u64),
) -> Result<(Buffer<f32>, Buffer<f32>), ReadError> {
    let load = |meta: &TensorMeta| {
        let mut values = Buffer::<f32>::zeroed(meta.elements() as usize);
        let mut scratch = Vec::new();
        for first in (0..values.len()).step_by(DECODED) {
            let range = first..(first + DECODED).min(values.len());
            let out = &mut values[range.clone()];
            decode(adapter.checkpoint(), meta, range, out, &mut scratch, count)?;
        }
        Ok::<_, ReadError>(values)
    };
    if low.transposed {
        let left = turned(&load(&low.a)?, low.rank);
        let right = load(&low.b)?;
        let outputs = right.len() / low.rank;
        Ok((left, turned(&right, outputs)))
    } else {
        Ok((load(&low.b)?, load(&low.a)?))
    }
}

/// The sums of all terms' factors, in their order.
fn summed_factors(terms: &[FactorTerm], count: &dyn Fn(u64)) -> Result<Held, ReadError> {
    let mut sums: Option<(Buffer<f32>, Buffer<f32>)> = None;
    for FactorTerm { adapter, low_rank, a, b } in terms {
        let (mut left, mut right) = factors(adapter, low_rank, count)?;
        let (of_left, of_right) = if low_rank.transposed { (*a, *b) } else { (*b, *a) };
        for (values, weight) in [(&mut left, of_left), (&mut right, of_right)] {
            let weight = weight as f32;
            values.iter_mut().for_each(|v| *v *= weight);
        }
        match &mut sums {
            None => sums = Some((left, right)),
            Some(sums) => {
                for (sum, values) in [(&mut sums.0, &left), (&mut sums.1, &right)] {
                    for (sum, v) in sum.iter_mut().zip(values.iter()) {
                        *sum += v;
                    }
                }
            }
        }
    }
    let (left, right) = sums.unwrap_or_else(|| (Buffer::zeroed(0), Buffer::zeroed(0)));
    Ok(Held::Factors(left, right))
}

/// `[rows, n]` as `[n, rows]`.
fn turned(values: &[f32], rows: usize) -> Buffer<f32> {
    let columns = values.len() / rows.max(1);
    let mut out = Buffer::<f32>::zeroed(values.len());
    for (k, value) in values.iter().enumerate() {
        out[(k % columns) * rows + k / columns] = *value;
    }
    out
}

/// Adds elements of `scale · L·R`, of inner dimension `rank`, to those of a tensor that begin at flat index `first`. Each element is one sum over
/// the rank in its order, whatever the piece: the bits do not depend on how a tensor is cut.
fn add_product<T: Real>(
    left: &[f32],
    right: &[f32],
    (rank, scale): (usize, f64),
    columns: usize,
    first: usize,
    out: &mut [T],
) {
    let mut sums = [T::default(); COLUMNS];
    let scale = T::from_f64(scale);
    let mut at = 0;
    while at < out.len() {
        let (row, column) = ((first + at) / columns, (first + at) % columns);
        let len = (columns - column).min(COLUMNS).min(out.len() - at);
        let (sums, out) = (&mut sums[..len], &mut out[at..at + len]);
        let left = &left[row * rank..(row + 1) * rank];
        dispatch(
            #[inline(always)]
            || {
                sums.fill(T::default());
                for (k, l) in left.iter().enumerate() {
                    let l = T::from_f64(f64::from(*l));
                    let right = &right[k * columns + column..][..len];
                    for (sum, r) in sums.iter_mut().zip(right) {
                        *sum += l * T::from_f64(f64::from(*r));
                    }
                }
                for (out, sum) in out.iter_mut().zip(&*sums) {
                    *out += scale * *sum;
                }
            },
        );
        at += len;
    }
}
