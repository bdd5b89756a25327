//! Readahead in the order of the plan, a bounded distance ahead of the blocks that run.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex};

use crate::merge::{Inputs, statistics_keys};
use crate::plan::{Action, BlockPlan, MergePlan};
use crate::read::{Checkpoint, TensorMeta};
use crate::statistics::{ModelStatistics, Statistic};

/// Bytes asked for at a time.
const STEP: u64 = 4 << 20;

/// How far the run has come, for the prefetcher to stay ahead of.
#[derive(Default)]
pub(super) struct Position {
    state: Mutex<State>,
    moved: Condvar,
}

#[derive(Default)]
struct State {
    finished_bytes: u64,
    stopped: bool,
}

impl Position {
    /// A block that read `bytes` is done.
    pub fn advance(&self, bytes: u64) {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        state.finished_bytes += bytes;
        self.moved.notify_all();
    }

    /// Nothing more will run.
    pub fn stop(&self) {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        state.stopped = true;
        self.moved.notify_all();
    }

    /// Waits until `ahead` is less than `window` beyond what is finished; false once the run is over.
    fn wait(&self, ahead: u64, window: u64) -> bool {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        while !state.stopped && ahead > state.finished_bytes + window {
            state = self.moved.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        !state.stopped
    }
}

/// A stretch of input that a block reads.
enum Part<'i> {
    Tensor(&'i Checkpoint, &'i TensorMeta),
    Statistic(&'i ModelStatistics, &'i Statistic),
}

impl Part<'_> {
    fn bytes(&self) -> u64 {
        match self {
            Self::Tensor(_, meta) => meta.bytes,
            Self::Statistic(_, statistic) => statistic.bytes,
        }
    }

    fn will_need(&self, range: Range<u64>) {
        match self {
            Self::Tensor(checkpoint, meta) => checkpoint.will_need(meta, range),
            Self::Statistic(statistics, statistic) => statistics.will_need(statistic, range),
        }
    }

    fn release(&self, drop_cache: bool) {
        match self {
            Self::Tensor(checkpoint, meta) => checkpoint.release(meta, 0..meta.bytes, drop_cache),
            // A Gram that another layer shares stays in the page cache.
            Self::Statistic(statistics, statistic) => {
                statistics.release(statistic, 0..statistic.bytes, false)
            }
        }
    }
}

/// Everything a block reads, each stretch once.
fn parts<'i>(inputs: &'i Inputs, block: &BlockPlan) -> Vec<Part<'i>> {
    let mut parts = Vec::new();
    let mut sources = match &block.action {
        Action::Copy { source, .. } => vec![*source],
        Action::Merge { recipe, .. } => {
            let mut sources = recipe.start.sources();
            for solve in &recipe.solves {
                sources.extend(solve.models.iter().map(|m| m.source));
                for (model, kind, _) in statistics_keys(inputs, &block.name, solve) {
                    let statistics = inputs.models[model].statistics.as_deref();
                    let found = statistics.and_then(|s| Some(Part::Statistic(s, s.get(&block.name, kind)?)));
                    parts.extend(found);
                }
            }
            sources
        }
    };
    sources.sort_unstable();
    sources.dedup();
    for source in sources {
        if let Some(meta) = inputs.tensor(source, &block.name) {
            let stored = inputs.checkpoints[source].parts(meta);
            parts.extend(stored.into_iter().map(|(checkpoint, meta)| Part::Tensor(checkpoint, meta)));
        }
    }
    parts
}

/// Asks the system for the inputs of every block in turn but those to `skip`, at most `window` bytes ahead.
pub(super) fn run(
    plan: &MergePlan,
    inputs: &Arc<Inputs>,
    position: &Position,
    window: u64,
    skip: impl Fn(usize) -> bool,
) {
    let mut asked = 0;
    let blocks = plan.units.iter().flat_map(|u| &u.blocks).filter(|k| !skip(**k));
    for block in blocks.map(|k| &plan.blocks[*k]) {
        let parts = parts(inputs.of_section(block.section), block);
        // Round robin: elementwise merges read all models in step.
        let longest = parts.iter().map(Part::bytes).max().unwrap_or(0);
        for first in (0..longest).step_by(STEP as usize) {
            for part in parts.iter().filter(|p| first < p.bytes()) {
                if !position.wait(asked, window) {
                    return;
                }
                let end = (first + STEP).min(part.bytes());
                part.will_need(first..end);
                asked += end - first;
            }
        }
        // The plan counts some inputs once a round; stay in step with what the blocks report.
        let counted: u64 = parts.iter().map(Part::bytes).sum();
        asked += block.read_bytes.saturating_sub(counted);
    }
}

/// Gives the pages of a finished block's inputs back.
pub(super) fn release(inputs: &Inputs, block: &BlockPlan, drop_cache: bool) {
    for part in parts(inputs, block) {
        part.release(drop_cache);
    }
    for (k, view) in inputs.checkpoints.iter().enumerate() {
        if let Some(meta) = inputs.tensor(k, &block.name) {
            view.release(meta);
        }
    }
}
