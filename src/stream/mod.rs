//! Runs a plan: reader, solvers and writer side by side, memory admitted before a block starts.
//!
//! The dispatcher takes units in plan order and waits until the memory of the next one is free. Small units run side by
//! side on the pool with sequential kernels, a large one alone with parallel kernels. Results are encoded into a fixed
//! set of buffers that a writer thread empties; a prefetch thread asks for input pages a bounded distance ahead. Owns
//! scheduling and cancellation; what is computed is `merge`'s business and what is published is `write`'s.

mod marker;
mod pool;
mod prefetch;
mod sink;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use crate::kernel::{Buffer, OutOfMemory, Real, Threading};
use crate::merge::block::{Shared, Strategy, Values, merge_block};
use crate::merge::elementwise::{Known, ModelPasses, Piece};
use crate::merge::sweep::{Variant, VariantRun, merge_variants};
use crate::merge::{BlockContext, Inputs, MergeError, SolveOutcome, Tally};
use crate::plan::{Action, BlockPlan, MergePlan, Unit, budget};
use crate::read::{Dtype, first_nonfinite};
use crate::report::Progress;
use crate::solve::IterationRecord;
use crate::write::{BlockBuffer, CheckpointWriter};
use marker::Marker;

/// Least distance of the readahead: one block's worth keeps the disk busy.
const LEAST_WINDOW: u64 = 32 << 20;
/// Most: beyond it page cache is only held longer.
const MOST_WINDOW: u64 = 256 << 20;
/// Bytes copied at a time where a tensor passes through.
const COPY_BYTES: u64 = 1 << 20;

/// What one block did.
#[derive(Debug, Clone)]
pub struct BlockReport {
    /// Index into the plan's blocks.
    pub block: usize,
    /// One a solve, innermost first.
    pub outcomes: Vec<SolveOutcome>,
    /// From start to the last byte handed on.
    pub seconds: f64,
    /// Inputs read, re-reads included.
    pub bytes_read: u64,
    /// An integer tensor that other models have with other values.
    pub differs_in: Option<String>,
    /// Values of the result are NaN or infinite.
    pub nonfinite: bool,
}

/// Runs every unit of a plan, or of the plans of a sweep's variants together, block by block: each block's inputs are read
/// once for all of them. The plans have the same blocks and units; the units of the first, whose memory is that of every
/// variant, are the ones that run. One writer and one list of reports a plan, in the order of the blocks.
///
/// Tensors that all writers have from a run before are passed over; where only some have, the others' are merged, and
/// there is a report for each. `finished` is told of every block, with the plan's number, on the thread that finished it;
/// its last bytes may still be on their way to the writer.
///
/// # Errors
/// The first error of any block; the others are stopped at their next tile or iteration.
pub fn run(
    plans: &[MergePlan],
    inputs: &Arc<Inputs>,
    writers: &[CheckpointWriter],
    progress: &Progress,
    cancel: &AtomicBool,
    drop_cache: bool,
    finished: &(dyn Fn(usize, &BlockReport) + Sync),
) -> Result<Vec<Vec<BlockReport>>, MergeError> {
    let Some(plan) = plans.first() else { return Ok(Vec::new()) };
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(plan.limits.threads)
        .thread_name(|k| format!("solver-{k}"))
        .build()
        .map_err(|error| MergeError::Threads { source: std::io::Error::other(error) })?;
    let available = plan.limits.max_memory.saturating_sub(plan.overhead_bytes);
    let window = (plan.limits.max_memory / 4).clamp(LEAST_WINDOW, MOST_WINDOW);
    let buffers = plan.out_buffers();
    let mut memory =
        catching(|| Ok(Buffer::<u8>::zeroed(BlockBuffer::cut_from(buffers, budget::OUT_BUFFER_BYTES))))?;
    let (sink, drain) = sink::channel(writers, buffers, &mut memory);
    let position = prefetch::Position::default();
    let state = Admission::new(available);
    let tallies: Vec<Tally> = plan.blocks.iter().map(|_| Tally::default()).collect();
    let known = catching(|| pool.install(|| model_passes(plan, inputs, cancel, &tallies)))?;
    let known = known.as_ref();
    let engine =
        Engine { plans, inputs, writers, progress, cancel, position: &position, drop_cache, finished, known };

    let (reports, written) = std::thread::scope(|threads| {
        let mut drained = Vec::new();
        for k in 0..sink::writer_threads(writers) {
            let drain = drain.clone();
            let work = move || {
                let result = drain.run(writers);
                if result.is_err() {
                    cancel.store(true, Ordering::Relaxed);
                }
                result
            };
            match std::thread::Builder::new().name(format!("writer-{k}")).spawn_scoped(threads, work) {
                Ok(thread) => drained.push(thread),
                // One can do it alone.
                Err(_) if k > 0 => break,
                Err(source) => return (Err(MergeError::Threads { source }), Ok(())),
            }
        }
        drop(drain);
        // Only faster with it.
        let _ = std::thread::Builder::new()
            .name("readahead".to_owned())
            .spawn_scoped(threads, || prefetch::run(plan, inputs, &position, window, |k| engine.resumed(k)));
        let reports: Mutex<Vec<Vec<BlockReport>>> = Mutex::new(Vec::with_capacity(plan.blocks.len()));
        let failed: Mutex<Option<MergeError>> = Mutex::new(None);
        let work = |unit: &Unit, threading: Threading| match engine.unit_or_error(unit, threading, &sink) {
            Ok(mut found) => lock(&reports).append(&mut found),
            Err(error) => {
                // What is only a consequence of another error must not hide it.
                let mut first = lock(&failed);
                if first.is_none() || matches!(*first, Some(MergeError::Cancelled)) {
                    *first = Some(error);
                }
                engine.cancel.store(true, Ordering::Relaxed);
            }
        };
        let (work, state) = (&work, &state);
        pool.in_place_scope(|scope| {
            for unit in plan.units.iter().filter(|unit| !unit.blocks.iter().all(|k| engine.resumed(*k))) {
                state.admit(unit, plan.limits.threads);
                if engine.cancel.load(Ordering::Relaxed) {
                    state.release(unit);
                    break;
                }
                if unit.large {
                    pool.install(|| work(unit, Threading::Parallel));
                    state.release(unit);
                } else {
                    scope.spawn(move |_| {
                        work(unit, Threading::Sequential);
                        state.release(unit);
                    });
                }
            }
        });
        position.stop();
        drop(sink);
        let ended: Vec<Result<(), MergeError>> =
            (drained.into_iter()).map(|thread| thread.join().unwrap_or(Err(MergeError::Cancelled))).collect();
        let written: Result<(), MergeError> = ended.into_iter().collect();
        let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
        let reports = reports.into_inner().unwrap_or_else(PoisonError::into_inner);
        (failed.map_or(Ok(reports), Err), written)
    });
    // A write that failed stopped the blocks: it is the cause.
    written?;
    let by_block = reports?;
    if by_block.len() != (0..plan.blocks.len()).filter(|k| !engine.resumed(*k)).count() {
        return Err(MergeError::Cancelled);
    }
    let mut reports: Vec<Vec<BlockReport>> =
        plans.iter().map(|_| Vec::with_capacity(by_block.len())).collect();
    for block in by_block {
        for (reports, report) in reports.iter_mut().zip(block) {
            reports.push(report);
        }
    }
    for reports in &mut reports {
        reports.sort_by_key(|r| r.block);
    }
    // What passes over the whole model have read, once for all variants.
    for (report, before) in reports.iter_mut().take(1).flatten().zip(&tallies) {
        report.bytes_read += before.total();
    }
    Ok(reports)
}

/// Runs `work`; a buffer that the system refuses unwinds to here.
fn catching<R>(work: impl FnOnce() -> Result<R, MergeError>) -> Result<R, MergeError> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|payload| match payload.downcast::<OutOfMemory>() {
        Ok(error) => Err(MergeError::OutOfMemory { bytes: error.bytes }),
        Err(payload) => resume_unwind(payload),
    })
}

/// The passes over all tensors whose method asks for quantities of the whole model.
fn model_passes(
    plan: &MergePlan,
    inputs: &Arc<Inputs>,
    cancel: &AtomicBool,
    tallies: &[Tally],
) -> Result<Option<Known>, MergeError> {
    let observe = |_: &IterationRecord| {};
    let blocks: Vec<_> = plan
        .model_passes()
        .map(|(index, start)| {
            let block = &plan.blocks[index];
            let context = BlockContext {
                inputs: inputs.of_section(block.section),
                tensor: &block.name,
                shape: block.block,
                threading: Threading::Parallel,
                tally: &tallies[index],
                cancel,
                known: None,
                observe: &observe,
                watch: None,
                piece: None,
                snapshots: None,
            };
            (context, start)
        })
        .collect();
    let Some((_, first)) = blocks.first() else { return Ok(None) };
    // One threshold a model over all tensors: every tensor must have the same models.
    if let Some((context, start)) = blocks.iter().find(|(_, start)| start.models.len() != first.models.len())
    {
        return Err(MergeError::Unsupported {
            what: format!(
                "tensor `{}`: `{}` over the whole model, of {} models here and of {} elsewhere,",
                crate::read::escaped(context.tensor),
                start.name,
                start.models.len(),
                first.models.len()
            ),
            hint: "give every slice the same models, or `scope: tensor`",
        });
    }
    ModelPasses::new(blocks.iter().map(|(context, start)| (context, *start)))?.run().map(Some)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Memory and places of the units in flight.
struct Admission {
    available: u64,
    state: Mutex<InFlight>,
    freed: Condvar,
}

#[derive(Default)]
struct InFlight {
    bytes: u64,
    units: usize,
}

impl Admission {
    fn new(available: u64) -> Self {
        Self { available, state: Mutex::default(), freed: Condvar::new() }
    }

    /// Waits until `unit` fits beside what runs: a large one runs alone.
    fn admit(&self, unit: &Unit, threads: usize) {
        let mut state = lock(&self.state);
        loop {
            let fits = if unit.large {
                state.units == 0
            } else {
                // One waiting behind each that runs keeps the pool busy.
                state.units < 2 * threads && state.bytes + unit.memory_bytes <= self.available
            };
            if fits || state.units == 0 {
                state.units += 1;
                state.bytes += unit.memory_bytes;
                return;
            }
            state = self.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn release(&self, unit: &Unit) {
        let mut state = lock(&self.state);
        state.units -= 1;
        state.bytes -= unit.memory_bytes;
        self.freed.notify_all();
    }
}

struct Engine<'e> {
    /// One, or one for each variant of a sweep, with the same blocks.
    plans: &'e [MergePlan],
    inputs: &'e Arc<Inputs>,
    writers: &'e [CheckpointWriter],
    progress: &'e Progress,
    cancel: &'e AtomicBool,
    position: &'e prefetch::Position,
    drop_cache: bool,
    finished: &'e (dyn Fn(usize, &BlockReport) + Sync),
    /// Quantities of the whole model.
    known: Option<&'e Known>,
}

impl Engine<'_> {
    /// Whether a run before this one has written the block, for every plan.
    fn resumed(&self, block: usize) -> bool {
        let of_block = &self.plans[0].blocks[block];
        let all = |writer: &CheckpointWriter| {
            writer.resumed(block) && of_block.side_tensors().all(|tensor| writer.resumed(tensor))
        };
        self.writers.iter().all(all)
    }

    /// As [`Engine::unit`], with memory that the system refuses as an error.
    fn unit_or_error(
        &self,
        unit: &Unit,
        threading: Threading,
        sink: &sink::Sink<'_, '_>,
    ) -> Result<Vec<Vec<BlockReport>>, MergeError> {
        catching(|| self.unit(unit, threading, sink))
    }

    /// For each block of the unit, one report a plan.
    fn unit(
        &self,
        unit: &Unit,
        threading: Threading,
        sink: &sink::Sink<'_, '_>,
    ) -> Result<Vec<Vec<BlockReport>>, MergeError> {
        let mut shared = Shared::default();
        let mut reports = Vec::with_capacity(unit.blocks.len());
        for index in unit.blocks.iter().filter(|index| !self.resumed(**index)) {
            if self.cancel.load(Ordering::Relaxed) {
                return Err(MergeError::Cancelled);
            }
            let block = &self.plans[0].blocks[*index];
            self.progress.block_started(&block.name);
            let found = self.block(*index, threading, unit.blocks.len() > 1, &mut shared, sink)?;
            prefetch::release(self.inputs.of_section(block.section), block, self.drop_cache);
            self.position.advance(block.read_bytes);
            let read: u64 = found.iter().map(|report| report.bytes_read).sum();
            self.progress.bytes(read + block.output_bytes() * found.len() as u64);
            if let Some(last) = found.last() {
                self.progress.block_finished(&block.name, &line(block, last, found.len()));
            }
            for (plan, report) in found.iter().enumerate() {
                (self.finished)(plan, report);
            }
            reports.push(found);
        }
        Ok(reports)
    }

    /// One block in every plan: what is the same in several of them is done once.
    fn block(
        &self,
        index: usize,
        threading: Threading,
        share: bool,
        shared: &mut Shared,
        sink: &sink::Sink<'_, '_>,
    ) -> Result<Vec<BlockReport>, MergeError> {
        let block = &self.plans[0].blocks[index];
        let groups = self.groups(index);
        let tally = if groups.len() > 1 { Tally::of_variants() } else { Tally::default() };
        let started = Instant::now();
        let (found, differs_in) = match &block.action {
            Action::Copy { source, .. } => {
                let differs_in = self.copy(index, block, *source, &groups[0], sink, &tally)?;
                let run = VariantRun {
                    outcomes: Vec::new(),
                    seconds: started.elapsed().as_secs_f64(),
                    bytes_read: tally.total(),
                };
                (vec![run], differs_in)
            }
            Action::Merge { .. } => {
                (self.merge(index, &groups, threading, share, shared, sink, &tally)?, None)
            }
        };
        let mut reports: Vec<Option<BlockReport>> = self.plans.iter().map(|_| None).collect();
        for (group, VariantRun { outcomes, seconds, bytes_read }) in groups.iter().zip(found) {
            for (k, output) in group.iter().enumerate() {
                // Whoever shares a result did nothing for it.
                let first = k == 0;
                reports[*output] = Some(BlockReport {
                    block: index,
                    outcomes: outcomes.clone(),
                    seconds: if first { seconds } else { 0.0 },
                    bytes_read: if first { bytes_read } else { 0 },
                    differs_in: differs_in.clone(),
                    nonfinite: sink.nonfinite(*output, index),
                });
            }
        }
        Ok(reports.into_iter().flatten().collect())
    }

    /// The plans by what they do to a block: those that do the same stand together.
    fn groups(&self, index: usize) -> Vec<Arc<[usize]>> {
        let mut groups: Vec<Vec<usize>> = Vec::new();
        for (k, plan) in self.plans.iter().enumerate() {
            let action = &plan.blocks[index].action;
            match groups.iter_mut().find(|group| self.plans[group[0]].blocks[index].action == *action) {
                Some(group) => group.push(k),
                None => groups.push(vec![k]),
            }
        }
        groups.into_iter().map(Arc::from).collect()
    }

    /// Passes a tensor through bit for bit. An integer tensor that another model has differently is told, not merged.
    fn copy(
        &self,
        index: usize,
        block: &BlockPlan,
        source: usize,
        outputs: &[usize],
        sink: &sink::Sink<'_, '_>,
        tally: &Tally,
    ) -> Result<Option<String>, MergeError> {
        let inputs = self.inputs.of_section(block.section);
        let find = |source| inputs.tensor(source, &block.name);
        let meta = find(source).expect("the plan copies a tensor from a checkpoint that has it");
        let others: Vec<usize> = if block.dtype.is_float() {
            Vec::new()
        } else {
            inputs.models.iter().map(|m| m.source).filter(|s| *s != source && find(*s).is_some()).collect()
        };
        let mut differs_in = None;
        let (mut scratch, mut other_scratch) = (Vec::new(), Vec::new());
        for first in (0..meta.bytes).step_by(COPY_BYTES as usize) {
            if self.cancel.load(Ordering::Relaxed) {
                return Err(MergeError::Cancelled);
            }
            let range = first..(first + COPY_BYTES).min(meta.bytes);
            let bytes = inputs.checkpoints[source].read_stored(meta, range.clone(), &mut scratch)?;
            tally.add(range.end - range.start);
            if inputs.refuse_nonfinite
                && let Some(k) = first_nonfinite(meta.dtype, bytes)
                && let Some(width) = meta.dtype.float_bytes()
            {
                let mut value = [0.0f64];
                f64::decode(meta.dtype, &bytes[k * width..(k + 1) * width], &mut value);
                inputs.check_finite(source, meta, first as usize / width + k, &value)?;
            }
            sink.write_bytes(outputs, index, first, bytes)?;
            for other in &others {
                let Some(theirs) = find(*other) else { continue };
                let same = theirs.dtype == meta.dtype
                    && inputs.checkpoints[*other].read_stored(theirs, range.clone(), &mut other_scratch)?
                        == bytes;
                if !same && differs_in.is_none() {
                    differs_in = Some(inputs.names[*other].clone());
                }
            }
        }
        Ok(differs_in)
    }

    /// The block in one plan of each group; results go to all outputs of the group.
    #[allow(
        clippy::too_many_arguments,
        reason = "one call site; the block, its surroundings and where it goes"
    )]
    fn merge(
        &self,
        index: usize,
        groups: &[Arc<[usize]>],
        threading: Threading,
        share: bool,
        shared: &mut Shared,
        sink: &sink::Sink<'_, '_>,
        tally: &Tally,
    ) -> Result<Vec<VariantRun>, MergeError> {
        let block = &self.plans[0].blocks[index];
        let variants: Vec<Variant<'_>> = groups
            .iter()
            .map(|group| match &self.plans[group[0]].blocks[index].action {
                Action::Merge { recipe, strategy } => Variant { recipe, strategy },
                Action::Copy { .. } => unreachable!("what a sweep varies decides no copy"),
            })
            .collect();
        let observe = |step: &IterationRecord| {
            self.progress.iteration(&block.name, step.iteration as u64, step.relative_residual);
        };
        let context = BlockContext {
            inputs: self.inputs.of_section(block.section),
            tensor: &block.name,
            shape: block.block,
            threading,
            tally,
            cancel: self.cancel,
            // Nothing that a sweep varies (weights, scales) enters what is measured over the whole model.
            known: self.known.filter(|_| variants.iter().any(|v| v.recipe.whole_model().is_some())),
            observe: &observe,
            watch: None,
            piece: None,
            snapshots: match self.writers {
                [writer] if block.is_long() => writer.solve_place(index, &block.name),
                _ => None,
            },
        };
        // The mean of equal values is that value, bit for bit, only where sums are wider than the values.
        let wide = block.dtype == Dtype::F64 || block.unmatched.is_some();
        // Straight from the cache that computed them: a second thread would only move them to another one.
        let at_once = variants.iter().all(|v| *v.strategy == Strategy::Elements);
        let emit = |variant: usize, first: usize, values: Values<'_>| {
            if !at_once {
                return sink.queue(&groups[variant], index, block.dtype, first, values);
            }
            thread_local! {
                static BUFFER: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) };
            }
            BUFFER.with_borrow_mut(|buffer| {
                sink.write(&groups[variant], index, block.dtype, first, values, buffer)
            })
        };
        let [Variant { recipe, strategy }] = variants[..] else {
            return merge_variants(&context, &variants, wide, share, shared, &emit);
        };
        let started = Instant::now();
        let emit = |first: usize, values: Values<'_>| emit(0, first, values);
        let marker = Marker::of(block, recipe, sink, &groups[0]);
        let see = |piece: &Piece<'_>| marker.as_ref().map_or(Ok(()), |marker| marker.piece(piece));
        let context = BlockContext { piece: marker.is_some().then_some(&see), ..context };
        let outcomes = merge_block(&context, recipe, strategy, wide, share, shared, &emit)?;
        if let Some(marker) = &marker {
            marker.finish()?;
        }
        let seconds = started.elapsed().as_secs_f64();
        Ok(vec![VariantRun { outcomes, seconds, bytes_read: tally.total() }])
    }
}

/// One plain line about a finished block, of `models` models.
fn line(block: &BlockPlan, report: &BlockReport, models: usize) -> String {
    let mut line = block.summary();
    if models > 1 {
        line += &format!(", the last of {models} models");
    }
    if let Some(outcome) = report.outcomes.last() {
        if let Some(iterations) = outcome.iterations {
            line += &format!(", {iterations} iterations");
        }
        if let Some(residual) = outcome.final_relative_residual {
            line += &format!(", residual {residual:.1e}");
        }
        line += &format!(", {}", outcome.stop.name());
    }
    format!("{line}, {:.2} s", report.seconds)
}
