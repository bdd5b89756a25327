//! The plan of one task's model, made of a merged model and the masks that were kept beside it.

use super::budget;
use super::{Limits, MergePlan, PlanError, Planner, Whole};
use crate::config::MergeConfig;
use crate::merge::elementwise::Masked;
use crate::merge::{Inputs, LayerPosition, MergeError, Recipe, SourceId, Start};

/// Where a task's model comes from, in [`Inputs::checkpoints`].
#[derive(Debug, Clone, Copy)]
pub struct TaskSources {
    /// The origin of task vectors.
    pub base: SourceId,
    /// The merged model: it gives names, order and dtypes.
    pub merged: SourceId,
    /// The task's mask times its rescaler, for each tensor that was merged.
    pub mask: SourceId,
}

impl MergePlan {
    /// Every tensor that has a mask is masked, every other one taken from the merged model. `config` is the merge's.
    ///
    /// # Errors
    /// [`PlanError`]: a base that lacks a tensor, too little memory.
    pub fn of_task(
        config: &MergeConfig,
        inputs: &Inputs,
        sources: TaskSources,
        limits: Limits,
        metadata: u64,
    ) -> Result<Self, PlanError> {
        let overhead_bytes = budget::overhead_bytes(limits.threads, metadata);
        let available = limits.max_memory.saturating_sub(overhead_bytes);
        let mut whole = Whole::new(available, false, limits.threads);
        let mut planner = Planner {
            config,
            inputs,
            section: None,
            layers: LayerPosition::default(),
            available,
            variant: false,
            threads: limits.threads,
            model_passes: 0,
            worst: Default::default(),
        };
        let TaskSources { base, merged, mask } = sources;
        for (name, meta) in inputs.checkpoints[merged].tensors() {
            let block = planner.copied(meta, merged, "not masked: the same for every task");
            if inputs.tensor(mask, &name).is_none() {
                whole.blocks.push(block);
                continue;
            }
            let found = inputs.tensor(base, &name);
            if found.is_none_or(|found| found.shape != meta.shape || !found.dtype.is_float()) {
                return Err(PlanError::Merge(MergeError::Missing {
                    model: inputs.names[base].clone(),
                    tensor: name.into_owned(),
                    got: found.map_or_else(
                        || "none".to_owned(),
                        |found| format!("{} {:?}", found.dtype, found.shape),
                    ),
                    expected: meta.shape.clone(),
                }));
            }
            let method = config.round.method.name();
            let start = Start::Method(Masked::start(method, base, merged, mask));
            let recipe = Recipe { start, solves: Vec::new(), method };
            whole.blocks.push(planner.merged(block, meta, recipe)?);
        }
        whole.worst = planner.worst;
        Self::of_blocks(config, inputs, whole, limits, overhead_bytes)
    }
}
