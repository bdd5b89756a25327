//! Several recipes for one tensor that differ in their last step: what they have in common is read and computed once.
//!
//! Called by `stream` for the variants of a sweep. Every variant's values have the bits that `block::merge_block` gives
//! for its recipe alone: nothing is started from another variant's solution, only from what does not depend on what is
//! swept. That is, by kind of the last step:
//!
//! - elementwise: each piece of the inputs, read once;
//! - a direct Gram solve: start, `S` before the ridge, and the right-hand side; then one Cholesky a ridge (`n³/3` flops: an
//!   eigendecomposition that served all ridges would cost that of some 25);
//! - conjugate gradients: start, scanned and held factors, eigenbases; plain CG runs once for all `max_iterations` and hands
//!   its iterate on at each of them;
//! - a start whose method runs passes: nothing;
//! - anything else: start and scans.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::block::{
    Parts, Prepared, Shared, Source, Stage, Strategy, Values, direct_outcome, elementwise_outcome,
    elementwise_system, emit_all, emit_displaced, for_tiles, merge_block, prepare_gram, runs, solve_elements,
    stages_run, tiles, wide_run, wide_solve,
};
use super::diagonal::{DiagonalOutcome, DiagonalSystem};
use super::direct::{GramDirect, RightHandSide};
use super::elementwise::Scratch;
use super::iterative::{self, BlockContext, IterativeMemory, SolveOutcome};
use super::resolve::gram_key;
use super::{MergeError, PIECE, Recipe, Solve, SolverChoice, Start, System, merge_elementwise, pieces};
use crate::kernel::{Buffer, Real};
use crate::merge::block::TILE;
use crate::solve::{IterationRecord, StopReason};

/// What is done to the tensor in one variant.
#[derive(Debug, Clone, Copy)]
pub struct Variant<'a> {
    /// How.
    pub recipe: &'a Recipe,
    /// Cut to the memory bound.
    pub strategy: &'a Strategy,
}

/// What one variant did.
#[derive(Debug, Clone)]
pub struct VariantRun {
    /// One a solve, innermost first.
    pub outcomes: Vec<SolveOutcome>,
    /// Spent on it; what variants share counts for the first of them, or in equal parts where they take turns.
    pub seconds: f64,
    /// Read for it, beyond what variants before it had read.
    pub bytes_read: u64,
}

/// As `block::Emit`, with the variant's number first.
pub type EmitVariant<'a> = dyn Fn(usize, usize, Values<'_>) -> Result<(), MergeError> + Sync + 'a;

/// A factored Gram that the variants of one unit take turns with.
pub(super) struct Swept {
    key: String,
    gram: GramDirect,
}

/// Merges one tensor in every variant. Parameters as of `block::merge_block`; the context's tally should be one of
/// variants.
///
/// # Errors
/// Those of reading, solving and emitting.
pub fn merge_variants(
    context: &BlockContext<'_>,
    variants: &[Variant<'_>],
    wide: bool,
    share: bool,
    shared: &mut Shared,
    emit: &EmitVariant<'_>,
) -> Result<Vec<VariantRun>, MergeError> {
    if variants.is_empty() {
        return Ok(Vec::new());
    }
    // A method with passes of its own goes through them in every variant.
    let shareable = |v: &Variant<'_>| !matches!(v.recipe.start, Start::Method(_));
    if variants.iter().all(|v| *v.strategy == Strategy::Elements && shareable(v)) {
        return if !wide && variants.iter().all(|v| v.recipe.solves.is_empty()) {
            starts(context, variants, emit)
        } else {
            closed_forms(context, variants, emit)
        };
    }
    if let Some(stages) = alike(variants) {
        return staged(context, variants, &stages, share, shared, emit);
    }
    let mut clock = Clock::start(context);
    let mut found = Vec::with_capacity(variants.len());
    for (v, Variant { recipe, strategy }) in variants.iter().enumerate() {
        let emit = |first: usize, values: Values<'_>| emit(v, first, values);
        let outcomes = merge_block(context, recipe, strategy, wide, share, shared, &emit)?;
        found.push(clock.lap(outcomes));
    }
    Ok(found)
}

/// Measures what each variant adds.
struct Clock<'c> {
    context: &'c BlockContext<'c>,
    began: Instant,
    bytes: u64,
}

impl<'c> Clock<'c> {
    fn start(context: &'c BlockContext<'c>) -> Self {
        Self { context, began: Instant::now(), bytes: context.tally.total() }
    }

    /// Time and bytes since the last lap.
    fn lap(&mut self, outcomes: Vec<SolveOutcome>) -> VariantRun {
        let (now, bytes) = (Instant::now(), self.context.tally.total());
        let run = VariantRun {
            outcomes,
            seconds: (now - self.began).as_secs_f64(),
            bytes_read: bytes - self.bytes,
        };
        (self.began, self.bytes) = (now, bytes);
        run
    }

    /// Variants that took turns: time in equal parts, bytes to the first.
    fn split(mut self, outcomes: Vec<Vec<SolveOutcome>>) -> Vec<VariantRun> {
        let all = self.lap(Vec::new());
        let seconds = all.seconds / outcomes.len().max(1) as f64;
        outcomes
            .into_iter()
            .enumerate()
            .map(|(v, outcomes)| VariantRun {
                outcomes,
                seconds,
                bytes_read: if v == 0 { all.bytes_read } else { 0 },
            })
            .collect()
    }
}

/// Elementwise to the end, in f32.
fn starts(
    context: &BlockContext<'_>,
    variants: &[Variant<'_>],
    emit: &EmitVariant<'_>,
) -> Result<Vec<VariantRun>, MergeError> {
    let clock = Clock::start(context);
    for_tiles(context, tiles(context.shape.elements(), TILE), |range| {
        let mut values = vec![0.0f32; PIECE.min(range.len())];
        let mut scratch = Scratch::default();
        for piece in tiles(range.len(), PIECE) {
            let first = range.start + piece.start;
            let values = &mut values[..piece.len()];
            pieces::shared(|| {
                for (v, variant) in variants.iter().enumerate() {
                    start(context, variant.recipe, first, values, &mut scratch)?;
                    emit(v, first, Values::F32(values))?;
                }
                Ok::<(), MergeError>(())
            })?;
        }
        Ok(())
    })?;
    Ok(clock.split(vec![Vec::new(); variants.len()]))
}

/// Elements `first..` of a recipe's starting point.
fn start<T: Real>(
    context: &BlockContext<'_>,
    recipe: &Recipe,
    first: usize,
    values: &mut [T],
    scratch: &mut Scratch,
) -> Result<(), MergeError> {
    let range = first..first + values.len();
    merge_elementwise(context.inputs, &recipe.start, context.tensor, range, values, scratch, context.tally)
}

/// Starts and elementwise divisions, in f64.
fn closed_forms(
    context: &BlockContext<'_>,
    variants: &[Variant<'_>],
    emit: &EmitVariant<'_>,
) -> Result<Vec<VariantRun>, MergeError> {
    let clock = Clock::start(context);
    let mut systems: Vec<Vec<(DiagonalSystem, f64)>> = Vec::with_capacity(variants.len());
    let mut means = Vec::new();
    for variant in variants {
        let solves = variant.recipe.solves.iter();
        systems.push(solves.map(|solve| with_shift(context, solve, &mut means)).collect::<Result<_, _>>()?);
    }
    type Found = Vec<Vec<Vec<DiagonalOutcome>>>;
    let parts: Vec<Found> = for_tiles(context, tiles(context.shape.elements(), 4 * PIECE), |range| {
        let mut x = vec![0.0f64; PIECE.min(range.len())];
        let mut scratch = Scratch::default();
        let mut found: Found = systems.iter().map(|systems| vec![Vec::new(); systems.len()]).collect();
        for piece in tiles(range.len(), PIECE) {
            let first = range.start + piece.start;
            let x = &mut x[..piece.len()];
            pieces::shared(|| {
                for (v, variant) in variants.iter().enumerate() {
                    start(context, variant.recipe, first, x, &mut scratch)?;
                    for ((system, shift), found) in systems[v].iter().zip(&mut found[v]) {
                        found.extend(solve_elements(context, system, *shift, first, x)?);
                    }
                    emit(v, first, Values::F64(x))?;
                }
                Ok::<(), MergeError>(())
            })?;
        }
        Ok(found)
    })?;
    let outcomes = systems
        .iter()
        .enumerate()
        .map(|(v, systems)| {
            (0..systems.len())
                .map(|k| elementwise_outcome(parts.iter().flat_map(|tile| tile[v][k].iter())))
                .collect()
        })
        .collect();
    Ok(clock.split(outcomes))
}

/// As `block::elementwise_system`; `means` has the mean diagonals of the systems before, by all but the ridge.
fn with_shift(
    context: &BlockContext<'_>,
    solve: &Solve,
    means: &mut Vec<(Solve, f64)>,
) -> Result<(DiagonalSystem, f64), MergeError> {
    let system = DiagonalSystem::new(context.inputs, solve, context.tensor);
    if solve.ridge == 0.0 {
        return Ok((system, 0.0));
    }
    let unridged = Solve { ridge: 0.0, ..solve.clone() };
    let mean = match means.iter().find(|(known, _)| *known == unridged) {
        Some((_, mean)) => *mean,
        None => {
            let mean = system.mean_diagonal(context.shape.elements(), context.tally)?;
            means.push((unridged, mean));
            mean
        }
    };
    Ok((system, solve.ridge * mean))
}

/// The stages of each variant, if all variants are the same up to the parameters of their last solve.
fn alike<'a>(variants: &[Variant<'a>]) -> Option<Vec<&'a [Stage]>> {
    let all: Vec<&[Stage]> = variants
        .iter()
        .map(|v| match v.strategy {
            Strategy::Stages(stages) if !stages.is_empty() => Some(&stages[..]),
            _ => None,
        })
        .collect::<Option<_>>()?;
    let last = all[0].len() - 1;
    let (recipe, first) = (variants[0].recipe, all[0]);
    let same = variants.iter().zip(&all).all(|(v, stages)| {
        stages.len() == first.len()
            && v.recipe.start == recipe.start
            && v.recipe.solves[..last] == recipe.solves[..last]
            && stages[..last] == first[..last]
            && std::mem::discriminant(&stages[last]) == std::mem::discriminant(&first[last])
    });
    same.then_some(all)
}

/// Runs what the variants share, then the run of stages that ends with the swept one.
fn staged(
    context: &BlockContext<'_>,
    variants: &[Variant<'_>],
    stages: &[&[Stage]],
    share: bool,
    shared: &mut Shared,
    emit: &EmitVariant<'_>,
) -> Result<Vec<VariantRun>, MergeError> {
    let clock = Clock::start(context);
    let recipe = variants[0].recipe;
    let mut runs = runs(stages[0]);
    let Some(last_run) = runs.pop() else { return Ok(Vec::new()) };
    let mut source = Source::Start(&recipe.start);
    let mut before = Vec::new();
    for run in runs {
        let (whole, mut found) =
            stages_run(context, &recipe.solves[run.clone()], &stages[0][run], source, None, share, shared)?;
        before.append(&mut found);
        source = Source::Whole(whole);
    }
    let last = last_run.end - 1;
    let lasts: Vec<(&Solve, Stage)> =
        variants.iter().zip(stages).map(|(v, stages)| (&v.recipe.solves[last], stages[last])).collect();
    let prefix = (&recipe.solves[last_run.start..last], &stages[0][last_run.start..last]);
    let mut found = match stages[0][last] {
        Stage::Iterative(_) => iterative_variants(context, &lasts, source, shared, clock, emit)?,
        Stage::TwoTerm | Stage::Refined(_) => {
            let mut clock = clock;
            let mut found = Vec::with_capacity(lasts.len());
            for (v, (solve, stage)) in lasts.iter().enumerate() {
                let emit = |first: usize, values: Values<'_>| emit(v, first, values);
                let (_, outcomes) = wide_run(context, &source, Some(&emit), &mut |x| {
                    wide_solve(context, solve, *stage, x, shared)
                })?;
                found.push(clock.lap(outcomes));
            }
            found
        }
        Stage::Direct(_) | Stage::Diagonal => {
            let rows = rows_variants(context, prefix, &lasts, source, share, shared, clock, emit);
            if !share {
                shared.swept = None;
            }
            rows?
        }
    };
    for run in &mut found {
        run.outcomes.splice(0..0, before.iter().cloned());
    }
    Ok(found)
}

/// The last direct stage in every variant, behind the direct stages `prefix` that they share.
#[allow(clippy::too_many_arguments, reason = "one call site; the run, its surroundings and where it goes")]
fn rows_variants(
    context: &BlockContext<'_>,
    prefix: (&[Solve], &[Stage]),
    lasts: &[(&Solve, Stage)],
    source: Source<'_>,
    share: bool,
    shared: &mut Shared,
    mut clock: Clock<'_>,
    emit: &EmitVariant<'_>,
) -> Result<Vec<VariantRun>, MergeError> {
    let (rows, columns) = (context.shape.out_features, context.shape.in_features);
    let (prepared, mut tile_rows) = Prepared::of_run(context, prefix.0, prefix.1, share, shared)?;
    for (_, stage) in lasts {
        if let Stage::Direct(memory) = stage {
            tile_rows = tile_rows.min(memory.tile_rows);
        }
    }
    // Rows through the prefix, and what it told the first time.
    let mut prefix_parts: Vec<Parts> = prepared.iter().map(|_| Parts::default()).collect();
    let begin = |shared: &Shared, first_row: usize, x: &mut [f64], parts: &mut [Parts]| {
        source.read(context, first_row * columns, x)?;
        prepared
            .iter()
            .zip(parts)
            .try_for_each(|(stage, parts)| stage.solve(context, shared, first_row, x, parts))
    };
    let mut found: Vec<Option<VariantRun>> = lasts.iter().map(|_| None).collect();
    let mut x = Buffer::<f64>::zeroed(tile_rows.min(rows) * columns);
    let whole = tile_rows >= rows;
    let mut x0 = Buffer::<f64>::zeroed(if whole { rows * columns } else { 0 });
    if whole {
        begin(shared, 0, &mut x0, &mut prefix_parts)?;
    }
    let mut rhs: Option<(String, RightHandSide)> = None;
    for v in by_system(lasts) {
        context.check_cancelled()?;
        let (solve, stage) = lasts[v];
        let emit = |first: usize, values: Values<'_>| emit(v, first, values);
        let last = Last::ready(context, solve, stage, share, shared)?;
        let mut parts = Parts::default();
        if whole {
            x.copy_from_slice(&x0);
            match &last {
                Last::Elements(elements) => elements.solve(context, shared, 0, &mut x, &mut parts)?,
                Last::Gram(key) => {
                    let gram = &shared.swept.as_ref().expect("made ready above").gram;
                    if rhs.as_ref().is_none_or(|(known, _)| known != key) {
                        // The one before it goes first: there is room for one.
                        rhs = None;
                    }
                    let (_, rhs) = match &mut rhs {
                        Some(known) => known,
                        none => none.insert((
                            key.clone(),
                            gram.right_hand_side(context.inputs, context.tensor, 0, &x0, context.tally)?,
                        )),
                    };
                    parts.extend_gram(gram.displace(rhs, &mut x));
                }
            }
            emit_all(context, 0, &x, &emit)?;
        } else {
            // Too large to keep its start and right-hand side: each variant goes through the tiles anew.
            for tile in tiles(rows, tile_rows) {
                context.check_cancelled()?;
                let x = &mut x[..tile.len() * columns];
                let mut ignored: Vec<Parts> = prepared.iter().map(|_| Parts::default()).collect();
                // The first variant of all is the first in any order.
                let prefix = if v == 0 { &mut prefix_parts } else { &mut ignored };
                begin(shared, tile.start, x, prefix)?;
                match &last {
                    Last::Elements(elements) => {
                        elements.solve(context, shared, tile.start, x, &mut parts)?;
                    }
                    Last::Gram(_) => {
                        let gram = &shared.swept.as_ref().expect("made ready above").gram;
                        parts.extend_gram(gram.solve_rows(
                            context.inputs,
                            context.tensor,
                            tile.start,
                            x,
                            context.tally,
                        )?);
                    }
                }
                emit_all(context, tile.start * columns, x, &emit)?;
            }
        }
        let mut outcomes: Vec<SolveOutcome> =
            prepared.iter().zip(&prefix_parts).map(|(stage, parts)| stage.outcome(shared, parts)).collect();
        outcomes.push(match &last {
            Last::Elements(elements) => elements.outcome(shared, &parts),
            Last::Gram(_) => direct_outcome(&shared.swept.as_ref().expect("made ready above").gram, &parts),
        });
        found[v] = Some(clock.lap(outcomes));
    }
    Ok(found.into_iter().flatten().collect())
}

/// The swept stage of one variant, ready to take rows.
enum Last {
    /// An elementwise division.
    Elements(Prepared),
    /// The Gram in `Shared::swept`, with this variant's ridge; the key names all but the ridge.
    Gram(String),
}

impl Last {
    fn ready(
        context: &BlockContext<'_>,
        solve: &Solve,
        stage: Stage,
        share: bool,
        shared: &mut Shared,
    ) -> Result<Self, MergeError> {
        let (Stage::Direct(memory), System::Gram(kind)) = (stage, solve.system) else {
            let (system, shift) = elementwise_system(context, solve)?;
            return Ok(Self::Elements(Prepared::Elements(system, shift)));
        };
        let key = but_for_the_ridge(context, solve, share);
        if shared.swept.as_ref().is_none_or(|swept| swept.key != key) {
            // The one before it goes first: there is room for one.
            shared.swept = None;
            let gram = prepare_gram(context, solve, kind, memory)?;
            shared.swept = Some(Swept { key: key.clone(), gram });
        }
        if let Some(swept) = &mut shared.swept {
            swept.gram.change_ridge(solve.ridge, context.tensor)?;
        }
        Ok(Self::Gram(key))
    }
}

/// Identifies a system before its ridge; tensors of a unit that share their Gram have one name for it.
fn but_for_the_ridge(context: &BlockContext<'_>, solve: &Solve, share: bool) -> String {
    let solve = Solve { ridge: 0.0, ..solve.clone() };
    gram_key(context.inputs, context.tensor, &solve)
        .filter(|_| share)
        .unwrap_or_else(|| format!("{} {}", context.tensor, system_name(&solve)))
}

/// Conjugate gradients from one start in every variant.
fn iterative_variants(
    context: &BlockContext<'_>,
    lasts: &[(&Solve, Stage)],
    source: Source<'_>,
    shared: &mut Shared,
    mut clock: Clock<'_>,
    emit: &EmitVariant<'_>,
) -> Result<Vec<VariantRun>, MergeError> {
    let x0 = source.whole(context)?;
    let mut d = Buffer::<f32>::zeroed(x0.len());
    let mut found: Vec<Option<VariantRun>> = lasts.iter().map(|_| None).collect();
    for v in by_system(lasts) {
        let (solve, stage) = lasts[v];
        let Stage::Iterative(memory) = stage else { continue };
        if found[v].is_some() {
            continue;
        }
        // Where one variant holds factors that another streams, neither pays for both.
        shared.factors.begin_variants(&format!("{memory:?} {}", system_name(solve)));
        let group: Vec<usize> =
            (0..lasts.len()).filter(|w| found[*w].is_none() && one_run(solve, lasts[*w].0)).collect();
        for (w, outcome) in run_group(context, lasts, &group, memory, &x0, &mut d, shared, emit)? {
            found[w] = Some(clock.lap(vec![outcome]));
        }
    }
    shared.factors.end_variants();
    Ok(found.into_iter().flatten().collect())
}

/// The variants in an order in which equal systems, ridge and solver aside, stand together.
fn by_system(lasts: &[(&Solve, Stage)]) -> Vec<usize> {
    let mut order: Vec<usize> = Vec::with_capacity(lasts.len());
    let same = |a: &Solve, b: &Solve| a.system == b.system && a.models == b.models && a.floor == b.floor;
    for v in 0..lasts.len() {
        if !order.contains(&v) {
            order.extend((v..lasts.len()).filter(|w| same(lasts[v].0, lasts[*w].0)));
        }
    }
    order
}

/// Names the system that [`by_system`] goes by.
fn system_name(solve: &Solve) -> String {
    format!("{:?} {:?} {:?}", solve.system, solve.models, solve.floor)
}

/// Whether one CG run passes through the results of both: plain CG on K-FAC, whose steps do not depend on how many there
/// may be, with other limits.
fn one_run(a: &Solve, b: &Solve) -> bool {
    let steps = |solve: &Solve| match solve.solver {
        SolverChoice::Iterative(iteration)
            if iteration.preconditioner.is_none() && solve.system == System::Kfac =>
        {
            Some(iteration.max_iterations)
        }
        _ => None,
    };
    let Some(most) = steps(a).zip(steps(b)).map(|(a, b)| a.max(b)) else { return a == b };
    with_limit(a, most) == with_limit(b, most)
}

fn with_limit(solve: &Solve, limit: usize) -> Solve {
    let mut solve = solve.clone();
    if let SolverChoice::Iterative(iteration) = &mut solve.solver {
        iteration.max_iterations = limit;
    }
    solve
}

fn limit(solve: &Solve) -> usize {
    match solve.solver {
        SolverChoice::Iterative(iteration) => iteration.max_iterations,
        SolverChoice::Direct => 0,
    }
}

/// Solves once, to the largest limit of the group; gives each variant and its outcome, smallest limit first.
#[allow(clippy::too_many_arguments, reason = "one call site; a system, its surroundings and where it goes")]
fn run_group(
    context: &BlockContext<'_>,
    lasts: &[(&Solve, Stage)],
    group: &[usize],
    memory: IterativeMemory,
    x0: &[f32],
    d: &mut [f32],
    shared: &mut Shared,
    emit: &EmitVariant<'_>,
) -> Result<Vec<(usize, SolveOutcome)>, MergeError> {
    let mut group = group.to_vec();
    group.sort_by_key(|w| limit(lasts[*w].0));
    let Some((&longest, shorter)) = group.split_last() else { return Ok(Vec::new()) };
    let emit_to =
        |w: usize, d: &[f32]| emit_displaced(context, x0, d, &|first, values| emit(w, first, values));
    // What was handed on at its own limit, with the step's record.
    let passed: Mutex<Result<Vec<(usize, IterationRecord)>, MergeError>> = Mutex::new(Ok(Vec::new()));
    let snapshot = |step: &IterationRecord, d: &[f32]| {
        let mut passed = passed.lock().unwrap_or_else(PoisonError::into_inner);
        for w in shorter.iter().filter(|w| limit(lasts[**w].0) == step.iteration) {
            match (emit_to(*w, d), &mut *passed) {
                (Ok(()), Ok(passed)) => passed.push((*w, *step)),
                (Err(error), Ok(_)) => *passed = Err(error),
                (_, Err(_)) => {}
            }
        }
    };
    let watched = BlockContext { watch: (!shorter.is_empty()).then_some(&snapshot), ..*context };
    let outcome = iterative::solve_block(&watched, lasts[longest].0, memory, x0, d, &mut shared.factors)?;
    let passed = passed.into_inner().unwrap_or_else(PoisonError::into_inner)?;
    let mut found = Vec::with_capacity(group.len());
    for &w in &group {
        let record = passed.iter().find(|(passed, _)| *passed == w).map(|(_, record)| record);
        if record.is_none() {
            emit_to(w, d)?;
        }
        found.push((w, record.map_or_else(|| outcome.clone(), |record| cut(&outcome, record))));
    }
    Ok(found)
}

/// The outcome of the run that would have ended with this step.
fn cut(outcome: &SolveOutcome, step: &IterationRecord) -> SolveOutcome {
    let mut cut = outcome.clone();
    let steps = outcome.iterations.unwrap_or(0);
    if step.iteration == steps && outcome.stop.converged() {
        return cut;
    }
    cut.stop = StopReason::MaxIterations;
    cut.iterations = Some(step.iteration);
    cut.detail.history.truncate(step.iteration + 1);
    if step.iteration < steps {
        // Of the recurrence: the run went on, so nothing was computed from this iterate again.
        cut.final_relative_residual = Some(step.relative_residual);
        if let Some(last) = cut.detail.history.last() {
            cut.objective_final = last.objective;
        }
        // Three applications beside one a step.
        cut.flops *= (step.iteration + 3) as f64 / (steps + 3) as f64;
    }
    cut
}
