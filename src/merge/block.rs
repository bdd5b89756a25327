//! Carries out a recipe on one tensor: tiles of elements, tiles of rows, or the whole block, as the plan says.
//!
//! Called by `stream` on a worker thread. The bytes that come out do not depend on the strategy's sizes.

use std::collections::HashMap;
use std::ops::Range;

use rayon::prelude::*;

use super::diagonal::{DiagonalOutcome, DiagonalSystem};
use super::direct::{DirectMemory, DirectOutcome, GramDirect};
use super::elementwise::{self, MethodStart, Scratch, merge_stored};
use super::iterative::{BlockContext, IterativeMemory, SharedFactors, SolveDetail, SolveOutcome};
use super::resolve::gram_key;
use super::{
    GramKind, MergeError, PIECE, Recipe, Solve, SolverChoice, Start, System, iterative, merge_elementwise,
    refined, two_term,
};
use crate::kernel::{Buffer, Real, Threading};
use crate::read::{Dtype, first_nonfinite};
use crate::solve::StopReason;
use crate::solve::stop::DirectMethod;

/// Elements of one output tile: 1 Mi, 2 to 8 MiB to write at a time.
pub const TILE: usize = 1 << 20;

/// How a block is cut to fit the memory bound.
#[derive(Debug, Clone, PartialEq)]
pub enum Strategy {
    /// Tiles of [`TILE`] elements; nothing is held.
    Elements,
    /// In the recipe's order, one entry a solve.
    Stages(Vec<Stage>),
}

/// The memory of one solve.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Stage {
    /// Elementwise closed form: rides along with the rows around it.
    Diagonal,
    /// A factored Gram.
    Direct(DirectMemory),
    /// Conjugate gradients on the whole block.
    Iterative(IterativeMemory),
    /// The same with f64 residuals and an f64 result.
    Refined(IterativeMemory),
    /// Two-model K-FAC on the whole block.
    TwoTerm,
}

/// Is this solve an elementwise division?
pub fn is_elementwise(solve: &Solve) -> bool {
    solve.solver == SolverChoice::Direct && matches!(solve.system, System::Identity | System::FisherDiagonal)
}

/// Values of a tile as they were computed.
#[derive(Clone, Copy)]
pub enum Values<'a> {
    /// From elementwise merges and CG.
    F32(&'a [f32]),
    /// From direct solves.
    F64(&'a [f64]),
    /// So many values that are still to be computed, by whoever stores them: straight to where they go.
    Stored(usize, &'a Store<'a>),
}

impl Values<'_> {
    /// Their number.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F64(values) => values.len(),
            Self::Stored(len, _) => *len,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Stores some of them as `dtype`; says whether a stored value is not finite.
    ///
    /// # Errors
    /// Those of reading what is computed here.
    pub fn store(&self, range: Range<usize>, dtype: Dtype, out: &mut [u8]) -> Result<bool, MergeError> {
        match self {
            Self::F32(values) => Ok(encode(&values[range], dtype, out)),
            Self::F64(values) => Ok(encode(&values[range], dtype, out)),
            Self::Stored(_, store) => store(range, dtype, out),
        }
    }
}

/// Encodes values, and looks at each stretch while the first-level cache has it.
fn encode<T: Real>(values: &[T], dtype: Dtype, out: &mut [u8]) -> bool {
    /// Values of a stretch: 16 KiB of f32.
    const NEAR: usize = 4096;
    let width = dtype.float_bytes().unwrap_or(1);
    let mut nonfinite = false;
    for (values, out) in values.chunks(NEAR).zip(out.chunks_mut(NEAR * width)) {
        T::encode(dtype, values, out);
        nonfinite |= first_nonfinite(dtype, out).is_some();
    }
    nonfinite
}

/// Computes values of a range and stores them; says whether a stored value is not finite.
pub type Store<'a> = dyn Fn(Range<usize>, Dtype, &mut [u8]) -> Result<bool, MergeError> + 'a;

/// Takes tiles of the result: index of the first element, and the values. May be called from many threads.
pub type Emit<'a> = dyn Fn(usize, Values<'_>) -> Result<(), MergeError> + Sync + 'a;

/// State that the tensors of one unit share.
#[derive(Default)]
pub struct Shared {
    pub(super) factors: SharedFactors,
    grams: HashMap<String, GramDirect>,
    /// Of the last step of a sweep's variants.
    pub(super) swept: Option<super::sweep::Swept>,
}

/// Merges one tensor. `wide` asks for f64 arithmetic in elementwise merges (f64 outputs). `share` keeps factored Grams in
/// `shared` for the other tensors of the unit.
///
/// Gives one outcome a solve, innermost first.
///
/// # Errors
/// Those of reading, solving and emitting.
pub fn merge_block(
    context: &BlockContext<'_>,
    recipe: &Recipe,
    strategy: &Strategy,
    wide: bool,
    share: bool,
    shared: &mut Shared,
    emit: &Emit<'_>,
) -> Result<Vec<SolveOutcome>, MergeError> {
    match strategy {
        Strategy::Elements if recipe.solves.is_empty() && matches!(recipe.start, Start::Method(_)) => {
            if let Start::Method(start) = &recipe.start {
                if start.method.whole().is_some() {
                    let merged = whole_tensor(context, start)?;
                    emit_all(context, 0, &merged, emit)?;
                    return Ok(Vec::new());
                }
                let merging = elementwise::Merging::of(context, start, context.known)?;
                match merging.weighted_sum() {
                    Some(sum) => start_tiles(context, &sum, emit)?,
                    None => merging.merge(&|first, values| emit(first, Values::F32(values)))?,
                }
            }
            Ok(Vec::new())
        }
        Strategy::Elements if recipe.solves.is_empty() && !wide => {
            start_tiles(context, &recipe.start, emit)?;
            Ok(Vec::new())
        }
        Strategy::Elements => closed_form_tiles(context, recipe, emit),
        Strategy::Stages(stages) => {
            let mut source = match &recipe.start {
                Start::Method(start) => Source::Whole(whole_start(context, start)?),
                start => Source::Start(start),
            };
            let mut outcomes = Vec::new();
            for run in runs(stages) {
                let last = (run.end == stages.len()).then_some(emit);
                let (next, mut found) = stages_run(
                    context,
                    &recipe.solves[run.clone()],
                    &stages[run],
                    source,
                    last,
                    share,
                    shared,
                )?;
                outcomes.append(&mut found);
                source = Source::Whole(next);
            }
            Ok(outcomes)
        }
    }
}

/// Which stages go together: direct stages in a row pass tiles of rows on to each other.
pub(super) fn runs(stages: &[Stage]) -> Vec<Range<usize>> {
    let rows = |stage: &Stage| matches!(stage, Stage::Direct(_) | Stage::Diagonal);
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (k, stage) in stages.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if rows(stage) && rows(&stages[run.start]) => run.end = k + 1,
            _ => runs.push(k..k + 1),
        }
    }
    runs
}

/// One of [`runs`]: from the result before it to its own, which is emitted or given back.
pub(super) fn stages_run(
    context: &BlockContext<'_>,
    solves: &[Solve],
    stages: &[Stage],
    source: Source<'_>,
    emit: Option<&Emit<'_>>,
    share: bool,
    shared: &mut Shared,
) -> Result<(Buffer<f32>, Vec<SolveOutcome>), MergeError> {
    match stages[0] {
        Stage::Direct(_) | Stage::Diagonal => rows_run(context, solves, stages, &source, emit, share, shared),
        Stage::Iterative(memory) => {
            let x0 = source.whole(context)?;
            let mut d = Buffer::<f32>::zeroed(x0.len());
            let outcome =
                iterative::solve_block(context, &solves[0], memory, &x0, &mut d, &mut shared.factors)?;
            let whole = match emit {
                Some(emit) => {
                    emit_displaced(context, &x0, &d, emit)?;
                    Buffer::zeroed(0)
                }
                None => displaced(context, x0, &d),
            };
            Ok((whole, vec![outcome]))
        }
        Stage::TwoTerm | Stage::Refined(_) => {
            wide_run(context, &source, emit, &mut |x| wide_solve(context, &solves[0], stages[0], x, shared))
        }
    }
}

/// A solve of the whole block in f64: replaces the initial guess in `x`.
pub(super) fn wide_solve(
    context: &BlockContext<'_>,
    solve: &Solve,
    stage: Stage,
    x: &mut [f64],
    shared: &mut Shared,
) -> Result<SolveOutcome, MergeError> {
    match (stage, &solve.solver) {
        (Stage::Refined(memory), SolverChoice::Iterative(iteration)) => {
            refined::solve_block(context, solve, iteration, memory, x, &mut shared.factors)
        }
        _ => two_term::solve_block(context, solve, x),
    }
}

/// A start whose method runs passes of its own, in memory for the solves after it.
fn whole_start(context: &BlockContext<'_>, start: &MethodStart) -> Result<Buffer<f32>, MergeError> {
    let mut whole = Buffer::<f32>::zeroed(context.shape.elements());
    if start.method.whole().is_some() {
        for (out, v) in whole.iter_mut().zip(whole_tensor(context, start)?.iter()) {
            *out = *v as f32;
        }
        return Ok(whole);
    }
    let target = std::sync::Mutex::new(&mut whole[..]);
    elementwise::Merging::of(context, start, context.known)?.merge(&|first, values| {
        let mut target = target.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        target[first..first + values.len()].copy_from_slice(values);
        Ok(())
    })?;
    Ok(whole)
}

/// A method's merge of a weight as one matrix: `base + merged task vector`, in f64.
fn whole_tensor(context: &BlockContext<'_>, start: &MethodStart) -> Result<Buffer<f64>, MergeError> {
    let mut merged = Buffer::<f64>::zeroed(context.shape.elements());
    let Some((whole, base)) = start.method.whole().zip(start.base) else { return Ok(merged) };
    let mut read = |model: usize, first: usize, out: &mut [f64]| {
        if context.cancel.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(MergeError::Cancelled);
        }
        let terms = vec![(start.models[model], 1.0), (base, -1.0)];
        fill(context, &Start::Mean { terms, divisor: 1.0 }, first, out, |v| v)
    };
    let done =
        whole.merge_whole(context.shape, start.models.len(), &mut read, context.threading, &mut merged);
    match done {
        Ok(()) => {}
        Err(elementwise::WholeError::Read(error)) => return Err(error),
        // Only values that are not finite have no singular vectors: what they are let through to is all of the tensor.
        Err(elementwise::WholeError::Eigen(_)) if !context.inputs.refuse_nonfinite => merged.fill(f64::NAN),
        Err(elementwise::WholeError::Eigen(source)) => {
            return Err(MergeError::Eigen { tensor: context.tensor.to_owned(), source });
        }
    }
    let add_base = |(k, values): (usize, &mut [f64])| -> Result<(), MergeError> {
        let mut origin = [0.0f64; PIECE];
        let origin = &mut origin[..values.len()];
        fill_piece(context, &Start::Copy(base), k * PIECE, origin)?;
        for (v, b) in values.iter_mut().zip(&*origin) {
            *v += b;
        }
        Ok(())
    };
    match context.threading {
        Threading::Sequential => merged.chunks_mut(PIECE).enumerate().try_for_each(add_base)?,
        Threading::Parallel => merged.par_chunks_mut(PIECE).enumerate().try_for_each(add_base)?,
    }
    Ok(merged)
}

/// At most a piece of a start, in f64.
fn fill_piece(
    context: &BlockContext<'_>,
    start: &Start,
    first: usize,
    out: &mut [f64],
) -> Result<(), MergeError> {
    let range = first..first + out.len();
    let mut scratch = Scratch::default();
    merge_elementwise(context.inputs, start, context.tensor, range, out, &mut scratch, context.tally)
}

/// The result of the stage before.
pub(super) enum Source<'a> {
    Start(&'a Start),
    Whole(Buffer<f32>),
}

impl Source<'_> {
    /// All of it in f32, for a stage that needs the whole block.
    pub fn whole(self, context: &BlockContext<'_>) -> Result<Buffer<f32>, MergeError> {
        match self {
            Source::Start(start) => {
                let mut x = Buffer::<f32>::zeroed(context.shape.elements());
                fill(context, start, 0, &mut x, |v: f64| v as f32)?;
                Ok(x)
            }
            Source::Whole(values) => Ok(values),
        }
    }

    /// Elements `first..` in f64.
    pub fn read(&self, context: &BlockContext<'_>, first: usize, x: &mut [f64]) -> Result<(), MergeError> {
        match self {
            Source::Start(start) => fill(context, start, first, x, |v| v),
            Source::Whole(values) => {
                for (x, v) in x.iter_mut().zip(&values[first..]) {
                    *x = f64::from(*v);
                }
                Ok(())
            }
        }
    }
}

/// A starting point in f64 arithmetic, converted.
fn fill<T: Real>(
    context: &BlockContext<'_>,
    start: &Start,
    first: usize,
    out: &mut [T],
    convert: impl Fn(f64) -> T + Sync,
) -> Result<(), MergeError> {
    let piece = |(k, out): (usize, &mut [T])| {
        let mut values = [0.0f64; PIECE];
        let values = &mut values[..out.len()];
        fill_piece(context, start, first + k * PIECE, values)?;
        for (out, v) in out.iter_mut().zip(&*values) {
            *out = convert(*v);
        }
        Ok(())
    };
    match context.threading {
        Threading::Sequential => out.chunks_mut(PIECE).enumerate().try_for_each(piece),
        Threading::Parallel => out.par_chunks_mut(PIECE).enumerate().try_for_each(piece),
    }
}

pub(super) fn tiles(len: usize, tile: usize) -> Vec<Range<usize>> {
    (0..len).step_by(tile.max(1)).map(|k| k..(k + tile).min(len)).collect()
}

/// Runs `work` on every tile, side by side where the context allows.
pub(super) fn for_tiles<R: Send>(
    context: &BlockContext<'_>,
    tiles: Vec<Range<usize>>,
    work: impl Fn(Range<usize>) -> Result<R, MergeError> + Sync + Send,
) -> Result<Vec<R>, MergeError> {
    let work = |range| {
        context.check_cancelled()?;
        work(range)
    };
    match context.threading {
        Threading::Sequential => tiles.into_iter().map(work).collect(),
        Threading::Parallel => tiles.into_par_iter().map(work).collect(),
    }
}

/// A start that is the result, in f32, tile by tile: each is computed where it is stored.
fn start_tiles(context: &BlockContext<'_>, start: &Start, emit: &Emit<'_>) -> Result<(), MergeError> {
    for_tiles(context, tiles(context.shape.elements(), TILE), |tile| {
        let scratch = std::cell::RefCell::default();
        let store = |range: Range<usize>, dtype: Dtype, out: &mut [u8]| {
            let range = tile.start + range.start..tile.start + range.end;
            let scratch = &mut *scratch.borrow_mut();
            merge_stored(context.inputs, start, context.tensor, range, dtype, out, scratch, context.tally)
        };
        emit(tile.start, Values::Stored(tile.len(), &store))
    })
    .map(|_| ())
}

/// Start and elementwise solves, tile by tile in f64.
fn closed_form_tiles(
    context: &BlockContext<'_>,
    recipe: &Recipe,
    emit: &Emit<'_>,
) -> Result<Vec<SolveOutcome>, MergeError> {
    let elements = context.shape.elements();
    let systems = recipe
        .solves
        .iter()
        .map(|solve| elementwise_system(context, solve))
        .collect::<Result<Vec<_>, _>>()?;
    let whole = match &recipe.start {
        Start::Method(start) => Some(Source::Whole(whole_start(context, start)?)),
        _ => None,
    };
    let parts = for_tiles(context, tiles(elements, 4 * PIECE), |range| {
        let mut x = vec![0.0f64; range.len()];
        match &whole {
            Some(whole) => whole.read(context, range.start, &mut x)?,
            None => merge_elementwise(
                context.inputs,
                &recipe.start,
                context.tensor,
                range.clone(),
                &mut x,
                &mut Scratch::default(),
                context.tally,
            )?,
        }
        let found = systems
            .iter()
            .map(|(system, shift)| solve_elements(context, system, *shift, range.start, &mut x))
            .collect::<Result<Vec<_>, _>>()?;
        emit(range.start, Values::F64(&x))?;
        Ok(found)
    })?;
    Ok((0..systems.len())
        .map(|k| {
            let pieces = parts.iter().flat_map(|tile: &Vec<Vec<DiagonalOutcome>>| tile[k].iter());
            elementwise_outcome(pieces)
        })
        .collect())
}

pub(super) fn elementwise_system(
    context: &BlockContext<'_>,
    solve: &Solve,
) -> Result<(DiagonalSystem, f64), MergeError> {
    let system = DiagonalSystem::new(context.inputs, solve, context.tensor);
    let shift = if solve.ridge > 0.0 {
        solve.ridge * system.mean_diagonal(context.shape.elements(), context.tally)?
    } else {
        0.0
    };
    Ok((system, shift))
}

/// One outcome a piece, so that their sum does not depend on the tiles. `first` is a multiple of the piece.
pub(super) fn solve_elements(
    context: &BlockContext<'_>,
    system: &DiagonalSystem,
    shift: f64,
    first: usize,
    x: &mut [f64],
) -> Result<Vec<DiagonalOutcome>, MergeError> {
    x.chunks_mut(PIECE)
        .enumerate()
        .map(|(k, x)| {
            let begin = first + k * PIECE;
            system.solve_piece(
                context.inputs,
                context.tensor,
                begin..begin + x.len(),
                shift,
                x,
                context.tally,
            )
        })
        .collect()
}

pub(super) fn elementwise_outcome<'p>(pieces: impl Iterator<Item = &'p DiagonalOutcome>) -> SolveOutcome {
    let (mut initial, mut decrease) = (0.0, 0.0);
    for piece in pieces {
        initial += piece.objective_initial;
        decrease += piece.decrease;
    }
    SolveOutcome {
        stop: StopReason::Direct(DirectMethod::Diagonal),
        iterations: None,
        initial_relative_residual: None,
        final_relative_residual: None,
        objective_initial: initial,
        objective_final: (initial - decrease).max(0.0),
        flops: 0.0,
        detail: SolveDetail::default(),
    }
}

/// One direct stage of a run, ready to take rows.
pub(super) enum Prepared {
    /// A factored Gram of this tensor alone.
    Gram(GramDirect),
    /// One that other tensors of the unit share, by its key.
    Shared(String),
    /// An elementwise division and its ridge.
    Elements(DiagonalSystem, f64),
}

/// What the tiles of one stage told, in order.
#[derive(Default)]
pub(super) struct Parts {
    grams: Vec<DirectOutcome>,
    elements: Vec<DiagonalOutcome>,
}

impl Parts {
    /// Those of one more tile of a Gram solved elsewhere.
    pub fn extend_gram(&mut self, parts: Vec<DirectOutcome>) {
        self.grams.extend(parts);
    }
}

impl Prepared {
    /// Readies the stages of a run, and gives the rows that go through all of them at a time.
    pub fn of_run(
        context: &BlockContext<'_>,
        solves: &[Solve],
        stages: &[Stage],
        share: bool,
        shared: &mut Shared,
    ) -> Result<(Vec<Self>, usize), MergeError> {
        let mut tile_rows = context.shape.out_features;
        let mut prepared = Vec::with_capacity(solves.len());
        for (solve, stage) in solves.iter().zip(stages) {
            match (stage, solve.system) {
                (Stage::Direct(memory), System::Gram(kind)) => {
                    tile_rows = tile_rows.min(memory.tile_rows);
                    // Only what several tensors really share is kept after this one.
                    match gram_key(context.inputs, context.tensor, solve).filter(|_| share) {
                        Some(key) => {
                            if !shared.grams.contains_key(&key) {
                                let gram = prepare_gram(context, solve, kind, *memory)?;
                                shared.grams.insert(key.clone(), gram);
                            }
                            prepared.push(Self::Shared(key));
                        }
                        None => prepared.push(Self::Gram(prepare_gram(context, solve, kind, *memory)?)),
                    }
                }
                _ => {
                    let (system, shift) = elementwise_system(context, solve)?;
                    prepared.push(Self::Elements(system, shift));
                }
            }
        }
        Ok((prepared, tile_rows))
    }

    /// Replaces the initial guess in `x`, rows `first_row..`, by this stage's solution.
    pub fn solve(
        &self,
        context: &BlockContext<'_>,
        shared: &Shared,
        first_row: usize,
        x: &mut [f64],
        parts: &mut Parts,
    ) -> Result<(), MergeError> {
        let gram = match self {
            Self::Elements(system, shift) => {
                let first = first_row * context.shape.in_features;
                parts.elements.extend(solve_elements(context, system, *shift, first, x)?);
                return Ok(());
            }
            Self::Gram(gram) => gram,
            Self::Shared(key) => &shared.grams[key],
        };
        parts.grams.extend(gram.solve_rows(context.inputs, context.tensor, first_row, x, context.tally)?);
        Ok(())
    }

    /// Sums over the tiles.
    pub fn outcome(&self, shared: &Shared, parts: &Parts) -> SolveOutcome {
        match self {
            Self::Elements(..) => elementwise_outcome(parts.elements.iter()),
            Self::Gram(gram) => direct_outcome(gram, parts),
            Self::Shared(key) => direct_outcome(&shared.grams[key], parts),
        }
    }
}

/// Forms and factors one tensor's Gram system.
pub(super) fn prepare_gram(
    context: &BlockContext<'_>,
    solve: &Solve,
    kind: GramKind,
    memory: DirectMemory,
) -> Result<GramDirect, MergeError> {
    GramDirect::prepare(
        context.inputs,
        solve,
        kind,
        context.tensor,
        context.shape.out_features,
        context.shape.in_features,
        memory,
        context.threading,
        context.tally,
    )
}

/// A run of direct stages: rows go through all of them tile by tile.
fn rows_run(
    context: &BlockContext<'_>,
    solves: &[Solve],
    stages: &[Stage],
    source: &Source<'_>,
    emit: Option<&Emit<'_>>,
    share: bool,
    shared: &mut Shared,
) -> Result<(Buffer<f32>, Vec<SolveOutcome>), MergeError> {
    let (rows, columns) = (context.shape.out_features, context.shape.in_features);
    let (prepared, tile_rows) = Prepared::of_run(context, solves, stages, share, shared)?;
    let mut whole = Buffer::<f32>::zeroed(if emit.is_some() { 0 } else { rows * columns });
    let mut parts: Vec<Parts> = prepared.iter().map(|_| Parts::default()).collect();
    let mut x = Buffer::<f64>::zeroed(tile_rows.min(rows) * columns);
    for tile in tiles(rows, tile_rows) {
        context.check_cancelled()?;
        let first = tile.start * columns;
        let x = &mut x[..tile.len() * columns];
        source.read(context, first, x)?;
        for (stage, parts) in prepared.iter().zip(&mut parts) {
            stage.solve(context, shared, tile.start, x, parts)?;
        }
        match emit {
            Some(emit) => emit_all(context, first, x, emit)?,
            None => {
                for (out, v) in whole[first..].iter_mut().zip(&*x) {
                    *out = *v as f32;
                }
            }
        }
    }
    let outcomes = prepared.iter().zip(&parts).map(|(stage, parts)| stage.outcome(shared, parts)).collect();
    Ok((whole, outcomes))
}

pub(super) fn direct_outcome(gram: &GramDirect, parts: &Parts) -> SolveOutcome {
    let parts = &parts.grams;
    let (mut initial, mut decrease) = (0.0, 0.0);
    for part in parts {
        initial += part.objective_initial;
        decrease += part.decrease;
    }
    let (residual, rhs) = parts.first().map_or((0.0, 0.0), |p| p.sampled_residual);
    SolveOutcome {
        stop: gram.stop_reason(),
        iterations: None,
        initial_relative_residual: None,
        final_relative_residual: Some(if residual == 0.0 { 0.0 } else { (residual / rhs).sqrt() }),
        objective_initial: initial,
        objective_final: (initial - decrease).max(0.0),
        flops: 0.0,
        detail: SolveDetail::default(),
    }
}

/// Emits long f64 results by tiles, side by side.
pub(super) fn emit_all(
    context: &BlockContext<'_>,
    first: usize,
    x: &[f64],
    emit: &Emit<'_>,
) -> Result<(), MergeError> {
    for_tiles(context, tiles(x.len(), TILE / 4), |range| emit(first + range.start, Values::F64(&x[range])))
        .map(|_| ())
}

/// `x₀ + d`, rounded to the next stage's start.
fn displaced(context: &BlockContext<'_>, mut x0: Buffer<f32>, d: &[f32]) -> Buffer<f32> {
    crate::kernel::vector::axpy(1.0, d, &mut x0, context.threading);
    x0
}

/// `x₀ + d`, rounded once, to the output.
pub(super) fn emit_displaced(
    context: &BlockContext<'_>,
    x0: &[f32],
    d: &[f32],
    emit: &Emit<'_>,
) -> Result<(), MergeError> {
    for_tiles(context, tiles(d.len(), 4 * PIECE), |range| {
        let x: Vec<f64> = x0[range.clone()]
            .iter()
            .zip(&d[range.clone()])
            .map(|(x, d)| f64::from(*x) + f64::from(*d))
            .collect();
        emit(range.start, Values::F64(&x))
    })
    .map(|_| ())
}

/// From the result before a whole-block f64 solve to its own.
pub(super) fn wide_run(
    context: &BlockContext<'_>,
    source: &Source<'_>,
    emit: Option<&Emit<'_>>,
    solve: &mut dyn FnMut(&mut [f64]) -> Result<SolveOutcome, MergeError>,
) -> Result<(Buffer<f32>, Vec<SolveOutcome>), MergeError> {
    let mut x = Buffer::<f64>::zeroed(context.shape.elements());
    source.read(context, 0, &mut x)?;
    let outcome = solve(&mut x)?;
    let mut whole = Buffer::<f32>::zeroed(if emit.is_some() { 0 } else { x.len() });
    match emit {
        Some(emit) => emit_all(context, 0, &x, emit)?,
        None => {
            for (out, v) in whole.iter_mut().zip(x.iter()) {
                *out = *v as f32;
            }
        }
    }
    Ok((whole, vec![outcome]))
}
