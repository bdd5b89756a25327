//! Runs a method's passes and its merge over one tensor, piece by piece.
//!
//! A piece is [`PIECE`] elements, or as many whole rows; a worker holds the models' values of one piece. A tensor of a
//! single piece is read once and kept for all passes. Partial sums are made over stretches of pieces that depend on the
//! shape alone and added in order; histograms are counts. The bytes that come out therefore depend on nothing else.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::order::{HISTOGRAM_BYTES, Scores, Window};
use super::places::{Line, Places, add_places};
use super::{Elementwise, Gram, MethodStart, OrderStatistic, PIECE, Pass, products};
use crate::kernel::{Buffer, Threading};
use crate::merge::{BlockContext, MergeError, SourceId, Start};
use crate::read::{Dtype, TensorMeta};

/// Pieces of one stretch of a merge: their output is handed on together.
pub(super) const STRETCH: usize = 8;
/// Pieces of one partial sum.
const SUM_STRETCH: usize = 64;
/// Most partial sums of a pass with many of them (one a column, say).
const MOST_WIDE_STRETCHES: usize = 16;
/// Most ranks of one column.
pub(super) const MOST_RANKS: u64 = 3;
/// More sums than this are many.
const WIDE: usize = 256;

/// What the passes so far have found.
#[derive(Debug, Clone, Default)]
pub struct Known {
    passes: Vec<Found>,
}

#[derive(Debug, Clone)]
pub(super) enum Found {
    Sums(Vec<f64>),
    Order(Vec<Vec<OrderStatistic>>),
    /// And each column's L1 norms before and after, where they are asked for.
    Trim(Vec<Window>, Vec<[f64; 2]>),
}

impl Known {
    /// The sums of a [`Pass::Sums`].
    pub fn sums(&self, pass: usize) -> &[f64] {
        match self.passes.get(pass) {
            Some(Found::Sums(sums)) => sums,
            _ => &[],
        }
    }

    /// One column's statistics of a [`Pass::Order`], in the order of its ranks.
    pub fn order(&self, pass: usize, column: usize) -> &[OrderStatistic] {
        match self.passes.get(pass) {
            Some(Found::Order(columns)) => columns.get(column).map_or(&[], |c| c),
            _ => &[],
        }
    }

    /// The L1 norms of each column before and after a [`Pass::Trim`] that asks for them.
    pub fn norms(&self, pass: usize) -> &[[f64; 2]] {
        match self.passes.get(pass) {
            Some(Found::Trim(_, norms)) => norms,
            _ => &[],
        }
    }

    /// The windows that trim each model, if there are any.
    fn windows(&self) -> Option<(usize, &[Window])> {
        self.passes.iter().enumerate().find_map(|(k, found)| match found {
            Found::Trim(windows, _) => Some((k, &windows[..])),
            _ => None,
        })
    }
}

/// A stretch of a tensor's elements: the values of all models in f32.
pub struct Piece<'a> {
    first: usize,
    len: usize,
    base: &'a [f32],
    models: &'a mut [f32],
}

impl<'a> Piece<'a> {
    /// Of values in memory: `models` holds those of every model, one after the other, `base` the base's or nothing. For
    /// tests of a method without files.
    pub fn new(first: usize, len: usize, base: &'a [f32], models: &'a mut [f32]) -> Self {
        Self { first, len, base, models }
    }

    /// Flat index of the first element in the tensor.
    pub fn first(&self) -> usize {
        self.first
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of models.
    pub fn models(&self) -> usize {
        self.models.len().checked_div(self.len).unwrap_or(0)
    }

    /// The base's values; empty without one.
    pub fn base(&self) -> &[f32] {
        self.base
    }

    /// A model's values, or its task vector's.
    pub fn model(&self, i: usize) -> &[f32] {
        &self.models[i * self.len..(i + 1) * self.len]
    }

    /// The same to be changed: the method's own copy.
    pub fn model_mut(&mut self, i: usize) -> &mut [f32] {
        &mut self.models[i * self.len..(i + 1) * self.len]
    }
}

/// The cut of one tensor.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    pub elements: usize,
    pub piece: usize,
}

impl Cut {
    fn new(elements: usize, method: &dyn Elementwise) -> Self {
        let piece = match method.row_length() {
            None => PIECE,
            Some(row) => (PIECE / row.max(1)).max(1) * row.max(1),
        };
        Self { elements, piece: piece.min(elements.max(1)) }
    }

    pub fn pieces(self) -> usize {
        self.elements.div_ceil(self.piece)
    }

    fn range(self, piece: usize) -> Range<usize> {
        piece * self.piece..((piece + 1) * self.piece).min(self.elements)
    }

    /// Pieces of one partial sum, from the shape and the number of sums alone.
    fn sum_stretch(self, count: usize) -> usize {
        if count > WIDE { self.pieces().div_ceil(MOST_WIDE_STRETCHES).max(1) } else { SUM_STRETCH }
    }
}

/// Times a pass reads the data, as a plan counts: an order takes one read where a sample (of up to 1/64) tells where its
/// ranks lie, two where it does not, and three where it was wrong.
fn reads(pass: Pass) -> u64 {
    if matches!(pass, Pass::Sums { .. } | Pass::Gram) { 1 } else { 2 }
}

/// Reads of a tensor of so many elements, the merge included. A whole model's passes are counted like a tensor's.
pub(crate) fn passes_over(method: &dyn Elementwise, elements: usize) -> u64 {
    let passes: u64 = method.passes().into_iter().map(reads).sum();
    if Cut::new(elements, method).pieces() <= 1 && !method.whole_model() { 1 } else { 1 + passes }
}

/// Peak bytes that a tensor's merge holds on so many workers and, with `passes`, what its passes hold.
pub(crate) fn memory_bytes(start: &MethodStart, elements: usize, workers: usize, passes: bool) -> u64 {
    let method = &*start.method;
    let cut = Cut::new(elements, method);
    let (piece, models) = (cut.piece as u64, start.models.len() as u64);
    // The only piece is kept beside the working copy and selected from in memory, except for a whole model's passes.
    let single = cut.pieces() <= 1;
    let histograms = !single || method.whole_model();
    let workers = workers.min(cut.pieces().max(1)) as u64;
    // Values, scores, what a method makes beside them, and a stretch of output; rows ask for an order of a row.
    let values = (models + 1) * if single { 2 } else { 1 } + 5;
    let stretch = if single { 1 } else { STRETCH as u64 };
    let row = method.row_length().map_or(0, |row| 8 * row as u64);
    // Equal scores are counted in order over a stretch that is read once.
    let trims = !single && method.passes().iter().any(|pass| matches!(pass, Pass::Trim { .. }));
    let held = if trims { (models + 1) * (STRETCH as u64 - 1) } else { 0 };
    let worker = (values + stretch + held) * piece * 4 + row;
    let counters = if workers > 1 { workers + 1 } else { 1 };
    let mut most = 0;
    let sums = |count: usize| {
        let stretches = cut.pieces().div_ceil(cut.sum_stretch(count)).max(1) as u64;
        (stretches + 1) * count as u64 * 8
    };
    for pass in if passes { method.passes() } else { Vec::new() } {
        most = most.max(match pass {
            Pass::Sums { count } => sums(count),
            Pass::Gram => sums(Gram::sums(start.models.len())),
            // A column's few ranks lie in different buckets.
            Pass::Order { columns } if histograms => MOST_RANKS * columns as u64 * HISTOGRAM_BYTES * counters,
            Pass::Trim { columns, .. } if histograms => 2 * columns as u64 * HISTOGRAM_BYTES * counters,
            Pass::Order { .. } | Pass::Trim { .. } => piece * 8,
        });
    }
    worker * workers + most
}

/// One worker's buffers: room for one piece, or for a stretch of them where equal scores are counted in order.
pub(super) struct Slot {
    base: Buffer<f32>,
    models: Buffer<f32>,
    scores: Buffer<f32>,
    bytes: Vec<u8>,
    /// Of each model whose file is not mapped, a base first, where several are read at once.
    each: Vec<Vec<u8>>,
    /// The pieces whose values are there.
    held: Range<usize>,
}

impl Slot {
    fn base_place(&self, run: &Run<'_>, place: usize) -> Range<usize> {
        let piece = run.cut.piece;
        (place * piece).min(self.base.len())..((place + 1) * piece).min(self.base.len())
    }

    fn models_place(&self, run: &Run<'_>, place: usize) -> Range<usize> {
        let values = run.cut.piece * run.start.models.len();
        (place * values).min(self.models.len())..((place + 1) * values).min(self.models.len())
    }
}

/// One column's scores of a piece: in `scratch`, unless they are the magnitudes of its values.
pub(super) fn scores_of<'s>(
    method: &dyn Elementwise,
    pass: usize,
    column: usize,
    piece: &'s Piece<'_>,
    known: &Known,
    scratch: &'s mut [f32],
) -> Scores<'s> {
    if method.by_magnitude(pass) {
        return Scores::Magnitudes(piece.model(column));
    }
    method.scores(pass, column, piece, known, scratch);
    Scores::Plain(scratch)
}

/// A tensor being merged.
pub(super) struct Run<'a> {
    pub context: &'a BlockContext<'a>,
    pub start: &'a MethodStart,
    pub cut: Cut,
    /// Where the tensor is in the base and in each model.
    base_meta: Option<&'a TensorMeta>,
    metas: Arc<[&'a TensorMeta]>,
    /// The only piece, read once: base and models, task vectors already.
    kept: Option<(Buffer<f32>, Buffer<f32>)>,
}

impl<'a> Run<'a> {
    fn new(context: &'a BlockContext<'a>, start: &'a MethodStart) -> Result<Self, MergeError> {
        let mut run = Self::unread(context, start);
        let cut = run.cut;
        if cut.pieces() <= 1 {
            let mut slot = run.slot(1);
            run.read(0, 0, &mut slot)?;
            run.kept = Some((slot.base, slot.models));
        }
        Ok(run)
    }

    /// The same, whatever its size is.
    fn unread(context: &'a BlockContext<'a>, start: &'a MethodStart) -> Self {
        let meta = |source: &SourceId| {
            let found = context.inputs.tensor(*source, context.tensor);
            found.expect("a recipe names a checkpoint only where it has the tensor")
        };
        Self {
            context,
            start,
            cut: Cut::new(context.shape.elements(), &*start.method),
            base_meta: start.base.as_ref().map(meta),
            metas: start.models.iter().map(meta).collect(),
            kept: None,
        }
    }

    /// The same tensor cut into pieces of `piece` elements.
    pub fn cut_into(&self, piece: usize) -> Self {
        let cut = Cut { elements: self.cut.elements, piece };
        Self { cut, metas: self.metas.clone(), kept: None, ..*self }
    }

    pub fn slot(&self, pieces: usize) -> Slot {
        let room = (pieces * self.cut.piece).min(self.cut.elements);
        let base = if self.start.base.is_some() { room } else { 0 };
        Slot {
            base: Buffer::zeroed(base),
            models: Buffer::zeroed(room * self.start.models.len()),
            scores: Buffer::zeroed(self.cut.piece),
            bytes: Vec::new(),
            each: Vec::new(),
            held: 0..0,
        }
    }

    /// Values of a piece of all models, or their differences from the base, into one of the slot's places.
    fn read(&self, piece: usize, place: usize, slot: &mut Slot) -> Result<(), MergeError> {
        let range = self.cut.range(piece);
        let (base, models) = (slot.base_place(self, place), slot.models_place(self, place));
        let (inputs, tally) = (self.context.inputs, self.context.tally);
        let len = range.len();
        let Slot { base: bases, models: values, bytes, .. } = slot;
        let base = &mut bases[base];
        if let (Some(source), Some(meta)) = (self.start.base, self.base_meta) {
            inputs.read(source, meta, range.clone(), &mut base[..len], bytes, tally)?;
        }
        let differences = self.start.method.task_vectors();
        let read = self.start.models.iter().zip(&*self.metas);
        for ((source, meta), out) in read.zip(values[models].chunks_mut(len.max(1))) {
            let out = &mut out[..len];
            if differences {
                inputs.read_differences(*source, meta, range.clone(), &base[..len], out, bytes, tally)?;
            } else {
                inputs.read(*source, meta, range.clone(), out, bytes, tally)?;
            }
        }
        Ok(())
    }

    /// Where equal scores stand in the tensor's order, for a stretch of pieces whose windows ask for it: counted before
    /// anything is done with them, so that the workers behind need not wait for that.
    pub fn places(
        &self,
        stretch: usize,
        pieces: Range<usize>,
        slot: &mut Slot,
        known: &Known,
        line: Option<&Line>,
    ) -> Result<Option<Places>, MergeError> {
        let (Some(line), Some((pass, windows))) = (line, known.windows()) else { return Ok(None) };
        slot.held = 0..0;
        let counted: Result<VecDeque<Vec<[u64; 2]>>, MergeError> = pieces
            .clone()
            .map(|piece| {
                if self.kept.is_none() {
                    self.read(piece, piece - pieces.start, slot)?;
                    slot.held = pieces.start..piece + 1;
                }
                let (loaded, scores) = self.values(piece, slot)?;
                let count = |(column, window): (usize, &Window)| {
                    if !window.in_order {
                        return [0, 0];
                    }
                    window.equals(scores_of(&*self.start.method, pass, column, &loaded, known, scores))
                };
                Ok(windows.iter().enumerate().map(count).collect())
            })
            .collect();
        if counted.is_err() {
            // Those behind must not wait for it.
            line.failed.store(true, Ordering::Relaxed);
        }
        let own = counted?;
        let mut total = vec![[0, 0]; windows.len()];
        own.iter().for_each(|own| add_places(&mut total, own));
        let before = line.pass(pieces.start / stretch, &total, self.context.cancel)?;
        Ok(Some(Places { before, own }))
    }

    /// The values of one piece as they are.
    fn values<'s>(&self, piece: usize, slot: &'s mut Slot) -> Result<(Piece<'s>, &'s mut [f32]), MergeError> {
        if self.context.cancel.load(Ordering::Relaxed) {
            return Err(MergeError::Cancelled);
        }
        let range = self.cut.range(piece);
        let len = range.len();
        let place = if slot.held.contains(&piece) { piece - slot.held.start } else { 0 };
        if !slot.held.contains(&piece) {
            match &self.kept {
                Some((base, models)) => {
                    slot.base.copy_from_slice(base);
                    slot.models.copy_from_slice(models);
                }
                None => self.read(piece, 0, slot)?,
            }
        }
        let (base, models) = (slot.base_place(self, place), slot.models_place(self, place));
        let base = if self.start.base.is_some() { &slot.base[base][..len] } else { &[] };
        let models = &mut slot.models[models][..len * self.start.models.len()];
        Ok((Piece { first: range.start, len, base, models }, &mut slot.scores[..len]))
    }

    /// One piece, trimmed as far as windows are known. Pieces are loaded in the order of their `places`.
    pub fn load<'s>(
        &self,
        piece: usize,
        slot: &'s mut Slot,
        known: &Known,
        places: &mut Option<Places>,
    ) -> Result<(Piece<'s>, &'s mut [f32]), MergeError> {
        let (mut loaded, scores) = self.values(piece, slot)?;
        if let Some((pass, windows)) = known.windows() {
            let joint = windows.len() == 1 && loaded.models() > 1;
            let mut own = places.as_mut().and_then(|p| p.own.pop_front());
            for (column, window) in windows.iter().enumerate() {
                if window.keeps_all() {
                    continue;
                }
                let own_magnitudes = self.start.method.by_magnitude(pass);
                if !own_magnitudes {
                    self.start.method.scores(pass, column, &loaded, known, scores);
                }
                let scores = if own_magnitudes { None } else { Some(&*scores) };
                let of = |counts: Option<&Vec<[u64; 2]>>| counts.map_or([0, 0], |c| c[column]);
                let (before, own) = (of(places.as_ref().map(|p| &p.before)), of(own.as_ref()));
                let models = if joint { 0..loaded.models() } else { column..column + 1 };
                for model in models {
                    window.apply(scores, before, own, loaded.model_mut(model));
                }
            }
            if let (Some(places), Some(own)) = (places, own.take()) {
                add_places(&mut places.before, &own);
            }
        }
        Ok((loaded, scores))
    }

    pub fn workers(&self, stretch: usize) -> usize {
        match self.context.threading {
            Threading::Sequential => 1,
            Threading::Parallel => {
                rayon::current_num_threads().min(self.cut.pieces().div_ceil(stretch)).max(1)
            }
        }
    }

    /// Hands stretches of `stretch` pieces to the workers in order; gives back what each worker made.
    pub fn sweep<S: Send>(
        &self,
        stretch: usize,
        line: Option<&Line>,
        init: impl Fn() -> S + Sync,
        work: impl Fn(&mut S, &mut Slot, Range<usize>) -> Result<(), MergeError> + Sync,
    ) -> Result<Vec<S>, MergeError> {
        let pieces = self.cut.pieces();
        let next = AtomicUsize::new(0);
        let failed = AtomicBool::new(false);
        let worker = || -> Result<S, MergeError> {
            let mut state = init();
            let mut slot = self.slot(if line.is_some() { stretch } else { 1 });
            loop {
                let first = next.fetch_add(1, Ordering::Relaxed) * stretch;
                if first >= pieces || failed.load(Ordering::Relaxed) {
                    return Ok(state);
                }
                let done = work(&mut state, &mut slot, first..(first + stretch).min(pieces));
                if let Err(error) = done {
                    failed.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
        };
        let workers = self.workers(stretch);
        if workers == 1 {
            return Ok(vec![worker()?]);
        }
        let results = Mutex::new(Vec::with_capacity(workers));
        rayon::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|_| {
                    let result = worker();
                    results.lock().unwrap_or_else(PoisonError::into_inner).push(result);
                });
            }
        });
        // A worker that only stopped because another failed must not hide why.
        let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
        results.sort_by_key(|r| matches!(r, Ok(_) | Err(MergeError::Cancelled)));
        results.into_iter().collect()
    }

    /// The dtype that all models are stored in, base included, where their products can be made from the bytes.
    fn alike(&self) -> Option<Dtype> {
        let dtype = self.metas.first()?.dtype;
        let alike =
            dtype.is_upper_f32() && self.base_meta.iter().chain(&*self.metas).all(|meta| meta.dtype == dtype);
        (alike && self.kept.is_none()).then_some(dtype)
    }

    /// Adds the inner products of a piece from the stored bytes; false where these are not to be had, or where a value is
    /// not finite and the long way says which.
    fn products(
        &self,
        dtype: Dtype,
        piece: usize,
        slot: &mut Slot,
        sums: &mut [f64],
    ) -> Result<bool, MergeError> {
        if self.context.cancel.load(Ordering::Relaxed) {
            return Err(MergeError::Cancelled);
        }
        let (inputs, range) = (self.context.inputs, self.cut.range(piece));
        slot.each.resize_with(self.metas.len() + 1, Vec::new);
        let origin = self.base_meta.filter(|_| self.start.method.task_vectors()).zip(self.start.base);
        let (base_bytes, each) = slot.each.split_at_mut(1);
        let base = match origin {
            None => None,
            Some((meta, source)) => {
                let Some(bytes) = inputs.stored(source, meta, range.clone(), &mut base_bytes[0])? else {
                    return Ok(false);
                };
                Some(bytes)
            }
        };
        let mut models = Vec::with_capacity(self.metas.len());
        for ((source, meta), bytes) in self.start.models.iter().zip(&*self.metas).zip(each) {
            let Some(bytes) = inputs.stored(*source, meta, range.clone(), bytes)? else { return Ok(false) };
            models.push(bytes);
        }
        let mut found = vec![0.0; sums.len()];
        if !products::products(dtype, base, &models, &mut found) {
            return Ok(false);
        }
        sums.iter_mut().zip(found).for_each(|(sum, found)| *sum += found);
        self.context.tally.add(base.iter().chain(&models).map(|bytes| bytes.len() as u64).sum());
        Ok(true)
    }

    pub fn line(&self, known: &Known) -> Option<Line> {
        let (_, windows) = known.windows()?;
        windows.iter().any(|w| w.in_order).then(|| Line::new(windows.len()))
    }

    /// What a pass of sums finds in this tensor.
    fn sums(&self, pass: usize, kind: Pass, known: &Known) -> Result<Vec<f64>, MergeError> {
        let count = kind.sums(self.start.models.len());
        let alike = self.alike().filter(|_| kind == Pass::Gram && known.windows().is_none());
        let line = self.line(known);
        let stretch = if line.is_some() { STRETCH } else { self.cut.sum_stretch(count) };
        let parts = self.sweep(
            stretch,
            line.as_ref(),
            Vec::new,
            |parts: &mut Vec<(usize, Vec<f64>)>, slot, pieces| {
                let at = pieces.start;
                let mut sums = vec![0.0; count];
                let mut places = self.places(stretch, pieces.clone(), slot, known, line.as_ref())?;
                for piece in pieces {
                    if let Some(dtype) = alike
                        && self.products(dtype, piece, slot, &mut sums)?
                    {
                        continue;
                    }
                    let (mut piece, _) = self.load(piece, slot, known, &mut places)?;
                    match kind {
                        Pass::Gram => Gram::add(&piece, &mut sums),
                        _ => self.start.method.sums(pass, &mut piece, known, &mut sums),
                    }
                }
                parts.push((at, sums));
                Ok(())
            },
        )?;
        let mut parts: Vec<_> = parts.into_iter().flatten().collect();
        parts.sort_unstable_by_key(|p| p.0);
        let mut total = vec![0.0; count];
        for (_, part) in parts {
            for (total, part) in total.iter_mut().zip(part) {
                *total += part;
            }
        }
        Ok(total)
    }
}

/// Passes over one or more tensors, one after the other: what each pass finds is of all of them together.
pub(crate) struct ModelPasses<'a> {
    pub(super) runs: Vec<Run<'a>>,
}

impl<'a> ModelPasses<'a> {
    /// Of the tensors `blocks`, all merged by one method.
    ///
    /// # Errors
    /// Those of reading.
    pub fn new(
        blocks: impl IntoIterator<Item = (&'a BlockContext<'a>, &'a MethodStart)>,
    ) -> Result<Self, MergeError> {
        let mut runs = Vec::new();
        for (context, start) in blocks {
            runs.push(Run::unread(context, start));
        }
        Ok(Self { runs })
    }

    /// Runs every pass.
    ///
    /// # Errors
    /// Those of reading.
    pub fn run(&self) -> Result<Known, MergeError> {
        let mut known = Known::default();
        let Some(first) = self.runs.first() else { return Ok(known) };
        for (pass, kind) in first.start.method.passes().into_iter().enumerate() {
            let found = match kind {
                Pass::Sums { .. } | Pass::Gram => {
                    let mut total = vec![0.0; kind.sums(first.start.models.len())];
                    for run in &self.runs {
                        for (total, part) in total.iter_mut().zip(run.sums(pass, kind, &known)?) {
                            *total += part;
                        }
                    }
                    Found::Sums(total)
                }
                Pass::Order { .. } | Pass::Trim { .. } if self.runs.len() == 1 && first.kept.is_some() => {
                    first.select(pass, kind, &known)?
                }
                Pass::Order { columns } | Pass::Trim { columns, .. } => {
                    self.order(pass, kind, columns, &known)?
                }
            };
            known.passes.push(found);
        }
        Ok(known)
    }
}

/// Takes a stretch of a result: index of its first element, and the values.
pub(crate) type Emit<'a> = dyn Fn(usize, &[f32]) -> Result<(), MergeError> + Sync + 'a;

/// A tensor's merge after its passes.
pub(crate) struct Merging<'a> {
    passes: ModelPasses<'a>,
    known: Cow<'a, Known>,
}

impl<'a> Merging<'a> {
    /// Runs the passes; `given` are a whole model's quantities.
    ///
    /// # Errors
    /// Those of reading.
    pub fn of(
        context: &'a BlockContext<'a>,
        start: &'a MethodStart,
        given: Option<&'a Known>,
    ) -> Result<Self, MergeError> {
        let passes = ModelPasses { runs: vec![Run::new(context, start)?] };
        let known = match given {
            Some(known) => Cow::Borrowed(known),
            None => Cow::Owned(passes.run()?),
        };
        Ok(Self { passes, known })
    }

    fn run(&self) -> &Run<'a> {
        &self.passes.runs[0]
    }

    /// What is left to be done as a weighted sum, where it is one. What was read once is not read again, and whoever wants
    /// to see the pieces has to see them.
    pub fn weighted_sum(&self) -> Option<Start> {
        let Run { context, start, kept, .. } = self.run();
        if kept.is_some() || context.piece.is_some() {
            return None;
        }
        let coefficients = start.method.coefficients(&self.known)?;
        let terms = start.models.iter().copied().zip(coefficients).collect();
        Some(match start.base.filter(|_| start.method.task_vectors()) {
            Some(base) => Start::TaskVectors { base, terms, scale: 1.0 },
            None => Start::Mean { terms, divisor: 1.0 },
        })
    }

    /// Merges piece by piece. `emit` takes stretches of the result, from many threads.
    ///
    /// # Errors
    /// Those of reading and of `emit`.
    pub fn merge(&self, emit: &Emit<'_>) -> Result<(), MergeError> {
        let (run, known) = (self.run(), &*self.known);
        let line = run.line(known);
        let capacity = (STRETCH * run.cut.piece).min(run.cut.elements);
        run.sweep(
            STRETCH,
            line.as_ref(),
            || Buffer::<f32>::zeroed(capacity),
            |out, slot, pieces| {
                let range = run.cut.range(pieces.start).start..run.cut.range(pieces.end - 1).end;
                let out = &mut out[..range.len()];
                let mut done = 0;
                let mut places = run.places(STRETCH, pieces.clone(), slot, known, line.as_ref())?;
                for piece in pieces {
                    let (mut piece, _) = run.load(piece, slot, known, &mut places)?;
                    let len = piece.len();
                    if let Some(see) = run.context.piece {
                        see(&piece)?;
                    }
                    run.start.method.merge(&mut piece, known, &mut out[done..done + len]);
                    done += len;
                }
                emit(range.start, out)
            },
        )
        .map(|_| ())
    }
}
