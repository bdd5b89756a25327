//! Bytes a block holds, and how it is cut to fit under the user's bound.
//!
//! Counted: anonymous memory. Inputs are mapped, so their pages belong to the page cache and can be taken back by the
//! system at any time; the output goes through a few small buffers.

use crate::config::PreconditionerKind;
use crate::kernel::{PANEL, sandwich_scratch};
use crate::merge::block::{Stage, Strategy, is_elementwise};
use crate::merge::{DirectMemory, IterativeMemory, refined_bytes, two_term_bytes};
use crate::merge::{
    GramKind, Inputs, Iteration, Recipe, SHARED_PIECE_BYTES, Solve, SolveModel, SolverChoice, Start, System,
    elementwise, kronecker_kind, rotates, step_bytes,
};
use crate::operator::BlockShape;
use crate::plan::{Action, BlockPlan, MergePlan};
use crate::precond::{KroneckerKind, cost};
use crate::report::StepReport;
use crate::solve::lanczos;
use crate::statistics::{Form, Kind};
use crate::write::{BlockBuffer, checksum};

/// One output buffer: encoded values on their way to the writer.
pub const OUT_BUFFER_BYTES: usize = 512 << 10;
/// Scratch of one worker: pieces of elementwise work, decode buffers, packed panels of a matrix product, its stack.
const WORKER_BYTES: u64 = 6 << 20;
/// What the writer holds of pieces of 64 KiB that have been written in part, to hash them whole.
const HASHING_BYTES: u64 = checksum::PARTIAL_BYTES;
/// Heap that comes and goes: names, reports, channels, the allocator's slack.
const SLACK_BYTES: u64 = 8 << 20;

/// Output buffers at least for so many threads.
fn least_out_buffers(threads: usize) -> usize {
    2 * threads + 4
}

/// Output buffers where memory is to spare: what a disk writes while every thread reads.
const MOST_OUT_BUFFERS: usize = 40;

/// Output buffers where so many bytes are left of the memory bound, and what they take beyond the overhead. At most half of
/// what is left, and no more than there is to write.
pub fn out_buffers(threads: usize, left: u64, write_bytes: u64) -> (usize, u64) {
    let bytes = |buffers| BlockBuffer::cut_from(buffers, OUT_BUFFER_BYTES) as u64;
    let least = least_out_buffers(threads);
    let to_write = write_bytes.div_ceil(OUT_BUFFER_BYTES as u64).min(MOST_OUT_BUFFERS as u64) as usize;
    let more = |buffers: usize| bytes(buffers) - bytes(least);
    let buffers = (least..=to_write).rev().find(|buffers| more(*buffers) <= left / 2).unwrap_or(least);
    (buffers, more(buffers))
}

/// Memory that is not a block's: `metadata` is what the process holds once all headers are open.
pub fn overhead_bytes(threads: usize, metadata: u64) -> u64 {
    let buffers = BlockBuffer::cut_from(least_out_buffers(threads), OUT_BUFFER_BYTES) as u64;
    metadata + SLACK_BYTES + HASHING_BYTES + threads as u64 * WORKER_BYTES + buffers
}

/// How one block runs, and what it holds at its peak.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockMemory {
    /// For `merge::block`.
    pub strategy: Strategy,
    /// Peak bytes beside the overhead.
    pub bytes: u64,
}

/// The stages of a recipe with the memory of each, tried from generous to frugal.
struct Candidate {
    stages: Vec<Stage>,
}

/// What a sweep of `variants` models holds beside what one merge does: a worker's shared piece, and for each further model
/// its plan, writer and report, and what its writer holds to hash the tensors in flight.
pub fn sweep_bytes(plan: &MergePlan, variants: usize) -> u64 {
    /// Names, places and figures of one block in plan, writer and report.
    const BLOCK_BYTES: u64 = 2 << 10;
    /// One step in a report.
    const STEP_BYTES: u64 = 2 * size_of::<StepReport>() as u64;
    /// A writer beside its blocks.
    const WRITER_BYTES: u64 = 16 << 10;
    let of_block = |block: &BlockPlan| {
        let Action::Merge { recipe, .. } = &block.action else { return BLOCK_BYTES };
        let models: usize = recipe.solves.iter().map(|solve| solve.models.len()).sum();
        let steps: usize = recipe
            .solves
            .iter()
            .map(|solve| match solve.solver {
                SolverChoice::Iterative(iteration) => iteration.max_iterations.min(1000),
                SolverChoice::Direct => 0,
            })
            .sum();
        BLOCK_BYTES + (models * size_of::<SolveModel>()) as u64 + steps as u64 * STEP_BYTES
    };
    let mut hashed: Vec<u64> = plan.blocks.iter().map(|b| checksum::held_bytes(b.write_bytes)).collect();
    hashed.sort_unstable_by(|a, b| b.cmp(a));
    let hashed: u64 = hashed.iter().take(2 * plan.limits.threads).sum();
    let model: u64 = WRITER_BYTES + hashed + plan.blocks.iter().map(of_block).sum::<u64>();
    let pieces = checksum::partial_bytes_of(variants).saturating_mul(variants as u64);
    model * variants.saturating_sub(1) as u64
        + pieces.saturating_sub(checksum::PARTIAL_BYTES)
        + (plan.limits.threads * SHARED_PIECE_BYTES) as u64
}

/// The most generous way to run `recipe` in `available` bytes; `Err` holds the least that would do. A `variant` of a
/// sweep keeps what its siblings start from.
///
/// # Errors
/// The bytes of the most frugal way, if that does not fit either.
pub fn fit(
    inputs: &Inputs,
    tensor: &str,
    recipe: &Recipe,
    shape: BlockShape,
    workers: usize,
    available: u64,
    variant: bool,
) -> Result<BlockMemory, u64> {
    let start = start_bytes(recipe, shape, workers);
    // The start's result, from which solves go on.
    let kept = if matches!(recipe.start, Start::Method(_)) { shape.elements() as u64 * 4 } else { 0 };
    if recipe.solves.iter().all(is_elementwise) {
        let bytes = start + if recipe.solves.is_empty() { 0 } else { kept };
        let memory = BlockMemory { strategy: Strategy::Elements, bytes };
        return if bytes <= available { Ok(memory) } else { Err(bytes) };
    }
    let mut least = u64::MAX;
    for frugality in 0.. {
        let Some(candidate) = candidate(recipe, shape, frugality) else { break };
        let solving = bytes(inputs, tensor, recipe, shape, &candidate.stages, kept);
        // The start has let go of all but its result by then, but may find what an earlier tensor shares. Variants of a sweep
        // take turns at the two.
        let shared: u64 = recipe
            .solves
            .iter()
            .zip(&candidate.stages)
            .map(|(solve, stage)| shared_bytes(inputs, tensor, solve, shape, *stage))
            .sum();
        let starting = if start == 0 { 0 } else { start + kept + shared };
        let mut bytes = if variant { start + kept + solving } else { starting.max(solving) };
        if variant {
            bytes += match candidate.stages.last() {
                // The rows' starting point, and while the next ridge is factored, their right-hand side and result.
                Some(Stage::Direct(memory)) => {
                    3 * (memory.tile_rows.min(shape.out_features) * shape.in_features) as u64 * 8
                }
                // The residual there.
                Some(Stage::Iterative(_)) => shape.elements() as u64 * 4,
                _ => 0,
            };
        }
        if bytes <= available {
            return Ok(BlockMemory { strategy: Strategy::Stages(candidate.stages), bytes });
        }
        least = least.min(bytes);
    }
    Err(least)
}

/// What a start holds whose method runs passes, beside its result where solves go on from it.
fn start_bytes(recipe: &Recipe, shape: BlockShape, workers: usize) -> u64 {
    let Start::Method(start) = &recipe.start else { return 0 };
    match start.method.whole() {
        Some(method) => method.memory_bytes(shape, start.models.len()),
        None => elementwise::memory_bytes(start, shape.elements(), workers, !start.method.whole_model()),
    }
}

/// Steps of frugality; none of them changes a bit of the result:
/// 0 hold all factors, keep formed Grams, whole tensors; 1 let output factors stream; 2 all factors stream, Grams formed
/// anew for each tile; 3 … halve the tiles of rows down to one panel; last, no room for an eigendecomposition.
fn candidate(recipe: &Recipe, shape: BlockShape, frugality: usize) -> Option<Candidate> {
    let all = shape.out_features.div_ceil(PANEL).max(1);
    let halvings = usize::BITS as usize - (all - 1).leading_zeros() as usize;
    if frugality > 3 + halvings {
        return None;
    }
    let eigen = frugality <= 2 + halvings;
    let tile_panels = (all >> frugality.saturating_sub(2).min(halvings)).max(1);
    let tile_rows = if frugality <= 2 { shape.out_features.max(1) } else { tile_panels * PANEL };
    let stages = recipe
        .solves
        .iter()
        .map(|solve| match (solve.solver, solve.system) {
            _ if is_elementwise(solve) => Stage::Diagonal,
            (SolverChoice::Direct, System::Kfac) => Stage::TwoTerm,
            (SolverChoice::Direct, _) => {
                Stage::Direct(DirectMemory { tile_rows, keep_formed: frugality <= 1, eigen })
            }
            (SolverChoice::Iterative(iteration), system) => {
                let memory = IterativeMemory { hold_a: frugality <= 1, hold_g: frugality == 0 };
                match system {
                    System::Kfac if iteration.refines() => Stage::Refined(memory),
                    _ => Stage::Iterative(memory),
                }
            }
        })
        .collect();
    Some(Candidate { stages })
}

/// Peak over the runs of stages, as `merge::block` groups them, the first of which starts from so many bytes.
fn bytes(
    inputs: &Inputs,
    tensor: &str,
    recipe: &Recipe,
    shape: BlockShape,
    stages: &[Stage],
    mut source: u64,
) -> u64 {
    let whole = shape.elements() as u64 * 4;
    let mut peak = 0;
    let mut k = 0;
    while k < stages.len() {
        let rows = |stage: &Stage| matches!(stage, Stage::Direct(_) | Stage::Diagonal);
        let mut end = k + 1;
        while rows(&stages[k]) && end < stages.len() && rows(&stages[end]) {
            end += 1;
        }
        let run: u64 =
            (k..end).map(|i| stage_bytes(inputs, tensor, &recipe.solves[i], shape, stages[i])).sum();
        let result = if end == stages.len() { 0 } else { whole };
        // An iterative stage takes its source over and counts it itself.
        let held = if matches!(stages[k], Stage::Iterative(_)) { 0 } else { source };
        peak = peak.max(held + run + if matches!(stages[k], Stage::Iterative(_)) { 0 } else { result });
        source = result;
        k = end;
    }
    peak
}

/// Of a stage's bytes at most those that stay for other tensors of the unit.
fn shared_bytes(inputs: &Inputs, tensor: &str, solve: &Solve, shape: BlockShape, stage: Stage) -> u64 {
    match (stage, solve.solver) {
        (Stage::Iterative(memory) | Stage::Refined(memory), SolverChoice::Iterative(iteration)) => {
            let (n, models) = (shape.in_features as u64, solve.models.len() as u64);
            let factors = if memory.hold_a { models * n * n * 4 } else { 0 };
            factors + Preconditioning::of(inputs, tensor, solve, shape, &iteration).sides
        }
        (Stage::Direct(_), _) => stage_bytes(inputs, tensor, solve, shape, stage),
        _ => 0,
    }
}

fn stage_bytes(inputs: &Inputs, tensor: &str, solve: &Solve, shape: BlockShape, stage: Stage) -> u64 {
    let (m, n) = (shape.out_features, shape.in_features);
    match (stage, solve.system) {
        (Stage::Diagonal, _) => 0,
        (Stage::TwoTerm, _) => {
            two_term_bytes(shape, solve.ridge > 0.0) + low_rank_scratch(inputs, tensor, solve, shape) * 8
        }
        (Stage::Direct(memory), System::Gram(kind)) => {
            let ranks: Vec<_> =
                solve.models.iter().map(|model| factor_rank(inputs, model.model, tensor, kind, m)).collect();
            memory.bytes(m, n, &ranks)
        }
        (Stage::Direct(_), _) => 0,
        (Stage::Iterative(memory) | Stage::Refined(memory), system) => {
            let SolverChoice::Iterative(iteration) = solve.solver else { return 0 };
            let preconditioner = Preconditioning::of(inputs, tensor, solve, shape, &iteration);
            let panel = PANEL.min(m.max(n)) as u64;
            let system = match system {
                System::Identity | System::FisherDiagonal => 3 * shape.elements() as u64,
                System::Gram(_) => (n * n) as u64 + 2 * panel * (n as u64) + panel * panel,
                System::Kfac => {
                    let (m, n, models) = (m as u64, n as u64, solve.models.len() as u64);
                    let held_a = if memory.hold_a { models * n * n } else { panel * n };
                    let held_g = if memory.hold_g { models * m * m } else { 2 * panel * m };
                    sandwich_scratch::<f32>(shape.out_features, shape.in_features) as u64
                        + held_a
                        + held_g
                        + low_rank_scratch(inputs, tensor, solve, shape)
                }
            };
            let whole = shape.elements() as u64 * 4;
            // The initial guess and the displacement are there while the preconditioner is made, the rest comes after.
            let making = 2 * whole + preconditioner.making;
            let iterating = preconditioner.vectors * whole;
            let refined = if matches!(stage, Stage::Refined(_)) { refined_bytes(shape) } else { 0 };
            // Should rounding have made the system indefinite: two of CG's vectors have gone by then.
            let lifting = iterating - 2 * whole + lanczos::memory_bytes(m.max(n));
            let solving = if preconditioner.vectors > 5 { iterating.max(lifting) } else { iterating };
            let steps = step_bytes(iteration.max_iterations);
            system * 4 + preconditioner.sides + making.max(solving) + refined + steps
        }
    }
}

/// What an iterative solve holds because of its preconditioner.
struct Preconditioning {
    /// Whole f32 blocks while it iterates: initial guess, displacement and CG's three, then z, the preconditioner's
    /// diagonal, and for four products the scratch between them.
    vectors: u64,
    /// Bytes of bases and of factors moved into them.
    sides: u64,
    /// Bytes beyond those while they are made; both sides at once.
    making: u64,
}

impl Preconditioning {
    fn of(inputs: &Inputs, tensor: &str, solve: &Solve, shape: BlockShape, iteration: &Iteration) -> Self {
        let (m, n) = (shape.out_features, shape.in_features);
        let none = |vectors| Self { vectors, sides: 0, making: 0 };
        let Some(kind) = kronecker_kind(iteration.preconditioner) else {
            return none(match iteration.preconditioner {
                None | Some(PreconditionerKind::None) => 5,
                Some(_) => 7,
            });
        };
        let (input, output) = match solve.system {
            System::Identity | System::FisherDiagonal => return none(7),
            System::Gram(_) => (true, false),
            System::Kfac if kind == KroneckerKind::Hybrid => {
                (cost::hybrid_keeps(n, m), cost::hybrid_keeps(m, n))
            }
            System::Kfac => (true, true),
        };
        let rotated = solve.system == System::Kfac && rotates(inputs, tensor, solve, shape);
        let vectors = if rotated || kind == KroneckerKind::Cholesky { 7 } else { 8 };
        let models = solve.models.len();
        let mut made = Self { vectors, sides: 0, making: 0 };
        for side in [(input, n), (output, m)].into_iter().filter(|s| s.0).map(|s| s.1) {
            made.sides += cost::side_bytes(side, models, rotated, 4);
            made.making += cost::side_setup_bytes(kind, side, models, 4);
        }
        made
    }
}

/// Rank of a factor stored as `F`, `None` where it is a full or packed Gram.
fn factor_rank(inputs: &Inputs, model: usize, tensor: &str, kind: GramKind, rows: usize) -> Option<usize> {
    match kind {
        GramKind::Delta { .. } => Some(rows),
        GramKind::FisherBlock => None,
        GramKind::Input => {
            let found = inputs.models[model].statistics.as_ref()?.get(tensor, Kind::InputFactor)?;
            match found.form {
                Form::Factor { rank, .. } => Some(rank),
                _ => None,
            }
        }
    }
}

/// Values of scratch that low-rank K-FAC factors need beside a panel.
fn low_rank_scratch(inputs: &Inputs, tensor: &str, solve: &Solve, shape: BlockShape) -> u64 {
    let mut most = 0;
    for model in &solve.models {
        let Some(statistics) = &inputs.models[model.model].statistics else { continue };
        for kind in [Kind::InputFactor, Kind::OutputFactor] {
            if let Some(Form::Factor { rank, side }) = statistics.get(tensor, kind).map(|s| s.form) {
                let (rank, side) = (rank as u64, side as u64);
                let panel = PANEL as u64;
                most = most.max(2 * panel.min(rank) * side + panel * panel + rank * shape.in_features as u64);
            }
        }
    }
    2 * most
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_buffers_take_what_is_left_and_no_more_than_there_is_to_write() {
        let least = least_out_buffers(2);
        // The last large page has room for a few more than the least.
        let (without_room, bytes) = out_buffers(2, 0, 1 << 40);
        assert!((least..least + 4).contains(&without_room) && bytes == 0, "no room: {without_room}, {bytes}");
        assert_eq!(out_buffers(2, 1 << 40, 0), (least, 0), "nothing to write");
        let (all, bytes) = out_buffers(2, 1 << 40, 1 << 40);
        assert_eq!(all, MOST_OUT_BUFFERS);
        let cut = |buffers| BlockBuffer::cut_from(buffers, OUT_BUFFER_BYTES) as u64;
        assert_eq!(bytes, cut(all) - cut(least));
        for left in (0..64).map(|mib| mib << 20) {
            let (buffers, bytes) = out_buffers(2, left, 1 << 40);
            assert!(bytes <= left / 2 && (least..=all).contains(&buffers), "{left}: {buffers}, {bytes}");
        }
        // More threads than the most: their least.
        assert_eq!(out_buffers(64, 1 << 40, 1 << 40).0, least_out_buffers(64));
    }
}
