//! What a merge will do, known from headers alone: blocks in order, how each is solved, what it holds, reads and costs.
//!
//! `align` lines the checkpoints up, `merge::resolve` gives each tensor its recipe, `budget` cuts it to the memory bound,
//! `shards` lays the output out. Pure: nothing but headers is read and nothing is written. `stream` carries it out.

pub mod align;
pub mod budget;
mod flops;
mod mask;
mod print;
pub mod shards;
mod sweep;
mod task;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use align::{AlignError, Alignment, align};
use budget::BlockMemory;
use flops::flops;
use shards::{LayoutError, OutputLayout, SideLayout, TensorSpec};

use crate::config::{MergeConfig, OutDtype, SliceLayers};
use crate::masks::{self, Rescaler, mask_spec, norms_spec};
use crate::merge::block::{Stage, Strategy};
use crate::merge::elementwise::{self, MethodStart};
use crate::merge::{
    Inputs, LayerPosition, MergeError, Recipe, SolverChoice, SourceId, Start, System, gram_key,
    input_factors_key, resolve, snapshot_disk_bytes, statistics_keys,
};
use crate::operator::BlockShape;
use crate::read::{Dtype, TensorMeta};
use crate::report::units::Bytes;
use crate::write::checksum;

pub use mask::MaskPlan;
pub use sweep::SweepPlan;
pub use task::TaskSources;

/// Blocks with more flops than this may take so long that states of their solves are kept: ten seconds of a machine that
/// sustains 100 GFLOP/s.
const LONG_FLOPS: f64 = 1e12;
/// Blocks with more flops than this run alone with parallel kernels, smaller ones side by side.
const LARGE_FLOPS: f64 = 1e9;
/// Elementwise blocks with more elements than this, divided by the threads, are cut into tiles that run side by side. Smaller
/// ones run whole, each on one thread: then one writes while another measures, and nobody waits at the end of a pass.
/// Divided, because what is read at the same time must not outrun the readahead.
const LARGE_ELEMENTS: usize = 64 << 20;
/// The same for however many threads.
const LEAST_LARGE_ELEMENTS: usize = 4 << 20;

/// Resources the user gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bound on anonymous memory.
    pub max_memory: u64,
    /// Worker threads.
    pub threads: usize,
    /// Bytes of one output file.
    pub shard_bytes: u64,
    /// Store tied heads on their own.
    pub untie: bool,
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The checkpoints do not fit together.
    #[error(transparent)]
    Align(#[from] AlignError),
    /// A tensor has no recipe.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// The output cannot be laid out.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Not enough memory for the largest block.
    #[error("--max-memory: tensor `{}` cannot be merged in {} (got {max_memory} bytes, expected at least {least}); \
             try --max-memory {}", crate::read::escaped(tensor), Bytes(*max_memory), mib(*least))]
    Memory {
        /// The tensor that needs most.
        tensor: String,
        /// What was given.
        max_memory: u64,
        /// What would do.
        least: u64,
    },
}

/// `least` as a flag that is enough.
fn mib(bytes: u64) -> String {
    format!("{}MiB", bytes.div_ceil(1 << 20))
}

/// What happens to one tensor of the output.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Its bytes are taken from one checkpoint as they are.
    Copy {
        /// Which.
        source: SourceId,
        /// Why it is not merged.
        reason: &'static str,
    },
    /// It is merged.
    Merge {
        /// How.
        recipe: Recipe,
        /// Cut to the memory bound.
        strategy: Strategy,
    },
}

/// One tensor of the output.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockPlan {
    /// Parameter name.
    pub name: String,
    /// The section of the config that it belongs to, if that has any.
    pub section: Option<usize>,
    /// As stored in the reference.
    pub shape: Vec<usize>,
    /// The same as a matrix: 2-D weights `[out, in]`, everything else one row.
    pub block: BlockShape,
    /// Of the output.
    pub dtype: Dtype,
    /// What happens.
    pub action: Action,
    /// Why the config's method does not apply, where it does not.
    pub unmatched: Option<String>,
    /// Peak bytes beside the overhead.
    pub memory_bytes: u64,
    /// Inputs read, each byte counted once a round and, where a method's quantities need it, once a pass.
    pub read_bytes: u64,
    /// Times that the start reads its checkpoints.
    pub passes: u64,
    /// Of the output's tensor.
    pub write_bytes: u64,
    /// What is kept of every task beside it.
    pub masks: Option<MaskPlan>,
    /// Upper bound: all iterations.
    pub flops: f64,
    /// Runs alone with parallel kernels.
    pub large: bool,
}

impl BlockPlan {
    /// Bytes written for it.
    pub fn output_bytes(&self) -> u64 {
        self.write_bytes + self.masks.map_or(0, |masks| masks.bytes)
    }

    /// Its tensors in the layout that are not the model's.
    pub fn side_tensors(&self) -> impl Iterator<Item = usize> {
        self.masks.into_iter().flat_map(|masks| std::iter::once(masks.mask).chain(masks.norms))
    }

    /// Whether states of its solves are kept while it runs, so that a run that ends early goes on in the middle of them.
    pub fn is_long(&self) -> bool {
        self.flops >= LONG_FLOPS || crate::write::fault::named("solve.often")
    }

    /// Bytes of disk that these states take at most.
    pub fn snapshot_bytes(&self) -> u64 {
        let Action::Merge { recipe, strategy: Strategy::Stages(stages) } = &self.action else { return 0 };
        if !self.is_long() {
            return 0;
        }
        let solves =
            recipe.solves.iter().zip(stages).filter(|(_, stage)| matches!(stage, Stage::Iterative(_)));
        let bytes = solves.map(|(solve, _)| match solve.solver {
            SolverChoice::Iterative(iteration) => {
                snapshot_disk_bytes(self.block.elements(), iteration.max_iterations)
            }
            SolverChoice::Direct => 0,
        });
        bytes.sum()
    }

    /// Whether its start is a method with passes of its own.
    pub fn has_passes(&self) -> bool {
        matches!(&self.action, Action::Merge { recipe, .. } if matches!(recipe.start, Start::Method(_)))
    }
}

/// Blocks that run one after the other in one task, because they share factors.
#[derive(Debug, Clone, PartialEq)]
pub struct Unit {
    /// Indices into [`MergePlan::blocks`].
    pub blocks: Vec<usize>,
    /// Peak bytes beside the overhead.
    pub memory_bytes: u64,
    /// Runs alone with parallel kernels.
    pub large: bool,
}

/// A whole merge.
#[derive(Debug)]
pub struct MergePlan {
    /// In the order of the output and of the reference's files.
    pub blocks: Vec<BlockPlan>,
    /// In the order they run.
    pub units: Vec<Unit>,
    /// Files of the output; tensor k of the layout is block k, and behind them are the tensors of a side file.
    pub layout: OutputLayout,
    /// Tensors that are not in the output, and why.
    pub left_out: BTreeMap<String, String>,
    /// For stderr and the report.
    pub warnings: Vec<String>,
    /// Memory that is not a block's.
    pub overhead_bytes: u64,
    /// Peak of the passes over the whole model, before any tensor is merged.
    pub model_pass_bytes: u64,
    /// The least `--max-memory` that would do.
    pub least_memory_bytes: u64,
    /// The resources it was made for.
    pub limits: Limits,
    /// One of a sweep's.
    pub variant: bool,
}

impl MergePlan {
    /// Makes the plan. `metadata` is what the process holds with all headers open. Enters dissolved ties in `inputs`.
    ///
    /// # Errors
    /// [`PlanError`]; nothing but headers has been read by then.
    pub fn new(
        config: &MergeConfig,
        inputs: &mut Inputs,
        limits: Limits,
        metadata: u64,
    ) -> Result<Self, PlanError> {
        let overhead_bytes = budget::overhead_bytes(limits.threads, metadata);
        let mut whole = Whole::new(limits.max_memory.saturating_sub(overhead_bytes), false, limits.threads);
        if config.sections.is_empty() {
            let alignment = align_inputs(inputs, limits)?;
            whole.add(config, inputs, &alignment, None, None)?;
        }
        for (k, section) in config.sections.iter().enumerate() {
            let part =
                Arc::get_mut(&mut inputs.sections[k]).expect("nobody else has the inputs before the plan");
            let alignment = align_inputs(part, limits)?;
            whole.add(&section.config, part, &alignment, Some(k), section.layers.as_ref())?;
        }
        if config.sections.iter().any(|section| section.module.is_some()) {
            whole.add_rest(inputs);
        }
        Self::of_blocks(config, inputs, whole, limits, overhead_bytes)
    }

    /// The plan of one `variant` of a sweep, whose results take turns in memory.
    fn of_variant(
        config: &MergeConfig,
        inputs: &Inputs,
        alignment: &Alignment,
        limits: Limits,
        metadata: u64,
    ) -> Result<Self, PlanError> {
        let overhead_bytes = budget::overhead_bytes(limits.threads, metadata);
        let mut whole = Whole::new(limits.max_memory.saturating_sub(overhead_bytes), true, limits.threads);
        whole.add(config, inputs, alignment, None, None)?;
        Self::of_blocks(config, inputs, whole, limits, overhead_bytes)
    }

    fn of_blocks(
        config: &MergeConfig,
        inputs: &Inputs,
        whole: Whole,
        limits: Limits,
        overhead_bytes: u64,
    ) -> Result<Self, PlanError> {
        let mut warnings = config.warnings.clone();
        warnings.extend(inputs.files.warnings.iter().cloned());
        for source in &inputs.checkpoints {
            warnings.extend(source.warnings().cloned());
        }
        let Whole { mut blocks, left_out, worst: (worst_bytes, worst), model_pass_bytes, variant, .. } =
            whole;
        for (name, reason) in &left_out {
            warnings.push(format!("tensor `{}` is left out: {reason}", crate::read::escaped(name)));
        }
        warnings.extend(narrowed(&blocks));
        warnings.extend(unused_statistics(inputs, &blocks));
        let least_memory_bytes = overhead_bytes + worst_bytes;
        if least_memory_bytes > limits.max_memory {
            return Err(PlanError::Memory {
                tensor: worst,
                max_memory: limits.max_memory,
                least: least_memory_bytes,
            });
        }
        let units = units(inputs, &blocks);
        let specs = blocks
            .iter()
            .map(|b| TensorSpec {
                name: b.name.clone(),
                dtype: b.dtype.name().to_owned(),
                shape: b.shape.clone(),
                bytes: b.write_bytes,
            })
            .collect();
        let mut layout = OutputLayout::new(specs, limits.shard_bytes)?;
        if let Some(side) = masks_layout(inputs, &mut blocks) {
            layout = layout.with_side(side)?;
        }
        Ok(Self {
            blocks,
            units,
            layout,
            left_out,
            warnings,
            overhead_bytes,
            model_pass_bytes,
            least_memory_bytes,
            limits,
            variant,
        })
    }

    /// Peak anonymous memory of the run: the overhead, what units hold at the same time, and output buffers beyond the least.
    pub fn peak_memory_bytes(&self) -> u64 {
        let peak = self.peak_of_units();
        peak + self.buffers_beside(peak).1
    }

    /// Output buffers of the run.
    pub fn out_buffers(&self) -> usize {
        self.buffers_beside(self.peak_of_units()).0
    }

    fn buffers_beside(&self, peak: u64) -> (usize, u64) {
        let left = self.limits.max_memory.saturating_sub(peak);
        budget::out_buffers(self.limits.threads, left, self.write_bytes())
    }

    /// The overhead and what units hold at the same time.
    fn peak_of_units(&self) -> u64 {
        let alone = self.units.iter().map(|u| u.memory_bytes).max().unwrap_or(0);
        let mut small: Vec<u64> = self.units.iter().filter(|u| !u.large).map(|u| u.memory_bytes).collect();
        small.sort_unstable_by(|a, b| b.cmp(a));
        let together: u64 = small.iter().take(self.limits.threads).sum();
        let available = self.limits.max_memory.saturating_sub(self.overhead_bytes);
        self.overhead_bytes + alone.max(self.model_pass_bytes).max(together.min(available))
    }

    /// Inputs read, each byte counted once a round.
    pub fn read_bytes(&self) -> u64 {
        self.blocks.iter().map(|b| b.read_bytes).sum()
    }

    /// Tensors whose method asks for quantities of the whole model, before any is merged.
    pub(crate) fn model_passes(&self) -> impl Iterator<Item = (usize, &MethodStart)> {
        self.blocks.iter().enumerate().filter_map(|(k, block)| match &block.action {
            Action::Merge { recipe, .. } => recipe.whole_model().map(|start| (k, start)),
            Action::Copy { .. } => None,
        })
    }

    /// Tensor bytes of the output, a side file's included.
    pub fn write_bytes(&self) -> u64 {
        self.blocks.iter().map(BlockPlan::output_bytes).sum()
    }

    /// Bytes of disk that states of long solves take beside the output: of the block at work, and of the one before, which
    /// may not be in the journal yet. A sweep keeps none.
    pub fn snapshot_bytes(&self) -> u64 {
        if self.variant {
            return 0;
        }
        let mut bytes: Vec<u64> = self.blocks.iter().map(BlockPlan::snapshot_bytes).collect();
        bytes.sort_unstable_by(|a, b| b.cmp(a));
        bytes.iter().take(2).sum()
    }

    /// Upper bound of the floating point operations.
    pub fn flops(&self) -> f64 {
        self.blocks.iter().map(|b| b.flops).sum()
    }
}

/// The file of masks, if some block keeps any; gives each its tensors' numbers, which follow the blocks'.
fn masks_layout(inputs: &Inputs, blocks: &mut [BlockPlan]) -> Option<SideLayout> {
    let mut number = blocks.len();
    let mut next = || {
        number += 1;
        number - 1
    };
    let mut specs = Vec::new();
    let mut metadata = None;
    for block in blocks.iter_mut() {
        let elements = block.block.elements() as u64;
        let Some(masks) = &mut block.masks else { continue };
        masks.mask = next();
        specs.push(mask_spec(&block.name, elements, masks.tasks));
        if masks.rescaler != Rescaler::None {
            masks.norms = Some(next());
            specs.push(norms_spec(&block.name, masks.tasks));
        }
        if let Action::Merge { recipe: Recipe { start: Start::Method(start), .. }, .. } = &block.action {
            metadata.get_or_insert_with(|| {
                let name = |source: SourceId| inputs.names[source].as_str();
                let tasks: Vec<&str> = start.models.iter().map(|model| name(*model)).collect();
                masks::metadata(start.name, masks.rescaler, start.base.map_or("", name), &tasks)
            });
        }
    }
    let metadata = metadata?;
    Some(SideLayout { file_name: masks::MASKS_FILE.to_owned(), metadata, specs })
}

/// What a user of f64 checkpoints should know: averages and task arithmetic, solves and methods on singular vectors are f64
/// where the output is; methods with passes of their own see f32 values, as order statistics are of 32 bits.
fn narrowed(blocks: &[BlockPlan]) -> Option<String> {
    let in_f32 = |block: &&BlockPlan| {
        let Action::Merge { recipe, .. } = &block.action else { return false };
        let method = matches!(recipe.start, Start::Method(_)) && recipe.whole_tensor().is_none();
        block.dtype == Dtype::F64 && method
    };
    let mut narrow = blocks.iter().filter(in_f32);
    let first = narrow.next()?;
    let method = match &first.action {
        Action::Merge { recipe: Recipe { start: Start::Method(start), .. }, .. } => start.name,
        _ => "",
    };
    Some(format!(
        "tensor `{}`{}: stored as F64, but `{method}` computes in f32: the result has f32's precision",
        crate::read::escaped(&first.name),
        match narrow.count() {
            0 => String::new(),
            more => format!(" and {more} more"),
        }
    ))
}

/// Statistics that no parameter is merged by: most likely another model's.
fn unused_statistics(inputs: &Inputs, blocks: &[BlockPlan]) -> Option<String> {
    let solved = |block: &BlockPlan| matches!(&block.action, Action::Merge { recipe, .. } if !recipe.solves.is_empty());
    let reason = blocks.iter().find_map(|block| block.unmatched.as_ref())?;
    let given = inputs.models.iter().any(|model| model.statistics.is_some());
    (given && !blocks.iter().any(solved)).then(|| {
        format!("the statistics fit no parameter, which are all merged without (the first: {reason}): are they this model's?")
    })
}

/// Lines the checkpoints up, and enters dissolved ties in `inputs`.
fn align_inputs(inputs: &mut Inputs, limits: Limits) -> Result<Alignment, PlanError> {
    let mut alignment = align(inputs, limits.untie)?;
    inputs.tied.extend(std::mem::take(&mut alignment.tied));
    Ok(alignment)
}

/// The plan of all sections while it is made.
#[derive(Default)]
struct Whole {
    available: u64,
    /// Of a sweep.
    variant: bool,
    blocks: Vec<BlockPlan>,
    left_out: BTreeMap<String, String>,
    threads: usize,
    /// Most bytes of a tensor's share in the passes over the whole model.
    model_pass_bytes: u64,
    /// Least bytes of the most demanding block, and its name.
    worst: (u64, String),
}

impl Whole {
    fn new(available: u64, variant: bool, threads: usize) -> Self {
        Self { available, variant, threads, ..Self::default() }
    }

    /// Adds the blocks of one section, or of a config without sections.
    fn add(
        &mut self,
        config: &MergeConfig,
        inputs: &Inputs,
        alignment: &Alignment,
        section: Option<usize>,
        slice: Option<&SliceLayers>,
    ) -> Result<(), PlanError> {
        let reference = &inputs.checkpoints[inputs.reference()];
        let layers = match (slice, section) {
            (Some(slice), _) => LayerPosition::of_slice(slice.output.clone()),
            (None, Some(_)) => LayerPosition::counted(reference),
            (None, None) => LayerPosition::of(reference),
        };
        let worst = std::mem::take(&mut self.worst);
        let mut planner = Planner {
            config,
            inputs,
            section,
            layers,
            available: self.available,
            variant: self.variant,
            threads: self.threads,
            model_passes: self.model_pass_bytes,
            worst,
        };
        for meta in &alignment.tensors {
            self.blocks.push(planner.block(meta)?);
        }
        self.model_pass_bytes = planner.model_passes;
        self.worst = planner.worst;
        self.left_out.extend(alignment.left_out.iter().map(|(name, why)| (name.clone(), why.clone())));
        Ok(())
    }

    /// What belongs to none of the config's modules is taken from the reference.
    fn add_rest(&mut self, inputs: &Inputs) {
        let merged: HashSet<&str> = self.blocks.iter().map(|block| block.name.as_str()).collect();
        let source = inputs.reference();
        let view = &inputs.checkpoints[source];
        let mut rest = Vec::new();
        for (name, meta) in view.tensors() {
            // What a module leaves out has been told.
            if merged.contains(&*name) || self.left_out.contains_key(&*name) || inputs.in_module(&name) {
                continue;
            }
            let action = if view.is_stored(meta) {
                Action::Copy { source, reason: "in none of the config's modules" }
            } else {
                let recipe = Recipe { start: Start::Copy(source), solves: Vec::new(), method: "copy" };
                Action::Merge { recipe, strategy: Strategy::Elements }
            };
            let elements = meta.elements() as usize;
            rest.push(BlockPlan {
                name: name.into_owned(),
                section: None,
                shape: meta.shape.clone(),
                block: BlockShape::new(1, elements),
                dtype: meta.dtype,
                action,
                unmatched: None,
                memory_bytes: view.held_bytes(meta) + checksum::held_bytes(meta.bytes),
                read_bytes: view.read_bytes(meta),
                passes: 1,
                write_bytes: meta.bytes,
                masks: None,
                flops: 0.0,
                large: elements > large_elements(self.threads),
            });
        }
        self.blocks.append(&mut rest);
    }
}

struct Planner<'a> {
    config: &'a MergeConfig,
    inputs: &'a Inputs,
    section: Option<usize>,
    layers: LayerPosition,
    available: u64,
    /// Of a sweep.
    variant: bool,
    threads: usize,
    /// Most bytes of a tensor's share in the passes over the whole model.
    model_passes: u64,
    /// Least bytes of the most demanding block, and its name.
    worst: (u64, String),
}

/// Elements from which on a block is cut.
fn large_elements(threads: usize) -> usize {
    (LARGE_ELEMENTS / threads.max(1)).max(LEAST_LARGE_ELEMENTS)
}

impl Planner<'_> {
    fn block(&mut self, meta: &TensorMeta) -> Result<BlockPlan, PlanError> {
        let inputs = self.inputs;
        let reference = inputs.reference();
        let source = if inputs.checkpoints[reference].get(&meta.name).is_some() {
            reference
        } else {
            // A head that the reference ties and another model stores.
            inputs
                .models
                .iter()
                .map(|m| m.source)
                .find(|s| inputs.checkpoints[*s].get(&meta.name).is_some())
                .unwrap_or(reference)
        };
        let mut plan = self.copied(meta, source, "");
        let copied = |reason| Action::Copy { source, reason };
        if !meta.dtype.is_float() {
            plan.action = copied("integers are copied, not merged");
            return Ok(plan);
        }
        if meta.elements() == 0 {
            plan.action = copied("no elements");
            return Ok(plan);
        }
        let resolution = resolve(self.config, inputs, meta, &self.layers)?;
        plan.unmatched = resolution.unmatched;
        plan.dtype = self.config.output_dtype().map_or(meta.dtype, stored);
        self.merged(plan, meta, resolution.recipe)
    }

    /// The block of a tensor that is taken from `source` as it is.
    fn copied(&self, meta: &TensorMeta, source: SourceId, reason: &'static str) -> BlockPlan {
        BlockPlan {
            name: meta.name.clone(),
            section: self.section,
            shape: meta.shape.clone(),
            block: BlockShape::new(1, meta.elements() as usize),
            dtype: meta.dtype,
            action: Action::Copy { source, reason },
            unmatched: None,
            memory_bytes: checksum::held_bytes(meta.bytes),
            read_bytes: meta.bytes,
            passes: 1,
            write_bytes: meta.bytes,
            masks: None,
            flops: 0.0,
            large: meta.elements() as usize > large_elements(self.threads),
        }
    }

    /// The block of a tensor that is merged by `recipe`.
    fn merged(
        &mut self,
        mut plan: BlockPlan,
        meta: &TensorMeta,
        recipe: Recipe,
    ) -> Result<BlockPlan, PlanError> {
        let inputs = self.inputs;
        if recipe.solves.is_empty()
            && let Start::Copy(from) = recipe.start
            && inputs
                .tensor(from, &meta.name)
                .is_some_and(|t| t.dtype == plan.dtype && inputs.checkpoints[from].is_stored(t))
        {
            let reason =
                if recipe.method == "passthrough" { "passed through" } else { "taken from the base" };
            plan.action = Action::Copy { source: from, reason };
            return Ok(plan);
        }
        plan.write_bytes = meta.elements() * plan.dtype.bits() / 8;
        // Only what couples entries sees the tensor as a matrix.
        if let [out, input] = meta.shape[..]
            && (recipe.whole_tensor().is_some()
                || recipe
                    .solves
                    .iter()
                    .any(|s| s.system == System::Kfac || matches!(s.system, System::Gram(_))))
        {
            plan.block = BlockShape::new(out, input);
        }
        plan.passes = recipe.passes(meta.elements() as usize);
        plan.read_bytes = self.read_bytes(meta, &recipe);
        plan.flops = flops(inputs, &meta.name, plan.block, &recipe);
        // Eigendecompositions, of which these are mostly made, run on one thread each: side by side they use all.
        let decomposes = recipe.whole_tensor().is_some() && recipe.solves.is_empty();
        plan.large = !decomposes && (plan.large || plan.flops > LARGE_FLOPS);
        let workers = if plan.large || !recipe.solves.is_empty() { self.threads } else { 1 };
        plan.masks = self.masks(meta, &recipe)?;
        let kept = plan.masks.map_or(0, |masks| masks.memory_bytes(meta.elements(), workers));
        // Factors of adapters, mean rows: held from the first value read to the last.
        let held = self.held_bytes(meta, &recipe) + checksum::held_bytes(plan.write_bytes) + kept;
        let available = self.available.saturating_sub(held);
        let fit = |available| {
            budget::fit(inputs, &meta.name, &recipe, plan.block, workers, available, self.variant)
        };
        let least = held
            + match fit(available) {
                Ok(BlockMemory { strategy, bytes }) => {
                    plan.memory_bytes = bytes + held;
                    plan.action = Action::Merge { recipe: recipe.clone(), strategy };
                    fit(0).err().unwrap_or(0)
                }
                Err(least) => least,
            };
        let model_passes = recipe.whole_model().map_or(0, |start| {
            held + elementwise::memory_bytes(start, meta.elements() as usize, self.threads, true)
        });
        self.model_passes = self.model_passes.max(model_passes);
        let least = least.max(model_passes);
        if least >= self.worst.0 {
            self.worst = (least, meta.name.clone());
        }
        Ok(plan)
    }

    /// What the recipe's method keeps of every task. `materialise` reads the base's tensors as they are stored.
    fn masks(&self, meta: &TensorMeta, recipe: &Recipe) -> Result<Option<MaskPlan>, MergeError> {
        let Start::Method(start) = &recipe.start else { return Ok(None) };
        let Some(method) = start.method.task_masks().filter(|_| recipe.solves.is_empty()) else {
            return Ok(None);
        };
        let what = if self.section.is_some() {
            "slices and modules"
        } else if self.config.tokenizer.is_some() {
            "`tokenizer` and `tokenizer_source`"
        } else if self.variant {
            "a sweep"
        } else if !self.inputs.tied.is_empty() {
            "`--untie`"
        } else {
            return Ok(Some(MaskPlan::new(start, method, meta.elements())));
        };
        Err(MergeError::Parameters {
            tensor: meta.name.clone(),
            method: start.name,
            reason: format!(
                "keeps masks of every task, which go with the base as it is stored (got {what}); \
                 `masks: false` keeps none, `task` writes one task's model"
            ),
        })
    }

    fn held_bytes(&self, meta: &TensorMeta, recipe: &Recipe) -> u64 {
        let mut sources = recipe.start.sources();
        sources.extend(recipe.solves.iter().flat_map(|solve| &solve.models).map(|model| model.source));
        sources.sort_unstable();
        sources.dedup();
        let of = |source: &SourceId| {
            let tensor = self.inputs.tensor(*source, &meta.name);
            tensor.map_or(0, |tensor| self.inputs.checkpoints[*source].held_bytes(tensor))
        };
        sources.iter().map(of).sum()
    }

    fn read_bytes(&self, meta: &TensorMeta, recipe: &Recipe) -> u64 {
        let of = |source: SourceId| {
            let tensor = self.inputs.tensor(source, &meta.name);
            tensor.map_or(0, |tensor| self.inputs.checkpoints[source].read_bytes(tensor))
        };
        let mut bytes: u64 = recipe.start.sources().into_iter().map(of).sum();
        bytes *= recipe.passes(meta.elements() as usize).max(1);
        if let Some((start, _)) = recipe.whole_tensor() {
            // The base is read with every model and once more for the result.
            let base = start.base.map_or(0, of);
            bytes = recipe.passes(0) * start.models.iter().map(|m| of(*m) + base).sum::<u64>() + base;
        }
        for solve in &recipe.solves {
            bytes += solve.models.iter().map(|m| of(m.source)).sum::<u64>();
            for (model, kind, _) in statistics_keys(self.inputs, &meta.name, solve) {
                let statistics = self.inputs.models[model].statistics.as_ref();
                bytes += statistics.and_then(|s| s.get(&meta.name, kind)).map_or(0, |s| s.bytes);
            }
        }
        bytes
    }
}

fn stored(dtype: OutDtype) -> Dtype {
    match dtype {
        OutDtype::Float32 => Dtype::F32,
        OutDtype::Float16 => Dtype::F16,
        OutDtype::Bfloat16 => Dtype::Bf16,
        OutDtype::Float64 => Dtype::F64,
    }
}

/// Whether the last solve keeps its input factors in memory.
fn holds_input(block: &BlockPlan) -> bool {
    let Action::Merge { strategy: Strategy::Stages(stages), .. } = &block.action else { return false };
    !matches!(stages.last(), Some(Stage::Iterative(memory) | Stage::Refined(memory)) if !memory.hold_a)
}

/// Groups blocks that share a factored Gram or held input factors, at the place of the first of them.
fn units(inputs: &Inputs, blocks: &[BlockPlan]) -> Vec<Unit> {
    let mut units: Vec<Unit> = Vec::new();
    let mut by_key: HashMap<(Option<usize>, String), usize> = HashMap::new();
    for (k, block) in blocks.iter().enumerate() {
        let inputs = block.section.map_or(inputs, |section| &inputs.sections[section]);
        let key = match &block.action {
            Action::Merge { recipe, .. } => recipe.solves.last().and_then(|solve| {
                let key = gram_key(inputs, &block.name, solve)
                    .or_else(|| input_factors_key(inputs, &block.name, solve, block.block))?;
                Some((block.section, key))
            }),
            Action::Copy { .. } => None,
        };
        let shared = key.as_ref().and_then(|key| by_key.get(key)).copied();
        // What is shared is counted in every member and held through all of them; a member that streams what another
        // holds would pay for it on top.
        if let Some(unit) = shared.map(|u| &mut units[u])
            && holds_input(&blocks[unit.blocks[0]]) == holds_input(block)
        {
            unit.blocks.push(k);
            unit.memory_bytes = unit.memory_bytes.max(block.memory_bytes);
            unit.large |= block.large;
            continue;
        }
        if let Some(key) = key {
            by_key.insert(key, units.len());
        }
        units.push(Unit { blocks: vec![k], memory_bytes: block.memory_bytes, large: block.large });
    }
    units
}
