//! Readahead in the order of the plan, a bounded distance ahead of the blocks that run.

use std::sync::{Condvar, Mutex};

use crate::merge::{Inputs, statistics_keys};
use crate::plan::{Action, BlockPlan, MergePlan};

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

/// Asks the system for the inputs of every block in turn, at most `window` bytes ahead.
pub(super) fn run(plan: &MergePlan, inputs: &Inputs, position: &Position, window: u64) {
    let mut asked = 0;
    for block in plan.units.iter().flat_map(|u| &u.blocks).map(|k| &plan.blocks[*k]) {
        let mut ranges: Vec<(Box<dyn Fn(std::ops::Range<u64>) + '_>, u64)> = Vec::new();
        for_inputs(inputs, block, |ask, bytes| ranges.push((ask, bytes)));
        // Round robin: elementwise merges read all models in step.
        let longest = ranges.iter().map(|r| r.1).max().unwrap_or(0);
        let mut first = 0;
        while first < longest {
            for (ask, bytes) in &ranges {
                if first < *bytes {
                    if !position.wait(asked, window) {
                        return;
                    }
                    let end = (first + STEP).min(*bytes);
                    ask(first..end);
                    asked += end - first;
                }
            }
            first += STEP;
        }
        // The plan counts some inputs once a round; stay in step with what the blocks report.
        let counted: u64 = ranges.iter().map(|r| r.1).sum();
        asked += block.read_bytes.saturating_sub(counted);
    }
}

/// Calls `found` with a way to ask for a range and the length of each input of a block, each once.
fn for_inputs<'i>(
    inputs: &'i Inputs,
    block: &BlockPlan,
    mut found: impl FnMut(Box<dyn Fn(std::ops::Range<u64>) + 'i>, u64),
) {
    let mut sources = match &block.action {
        Action::Copy { source, .. } => vec![*source],
        Action::Merge { recipe, .. } => {
            let mut sources = recipe.start.sources();
            sources.extend(recipe.solves.iter().flat_map(|s| s.models.iter().map(|m| m.source)));
            for solve in &recipe.solves {
                for (model, kind, _) in statistics_keys(inputs, &block.name, solve) {
                    let statistics = inputs.models[model].statistics.as_ref();
                    if let Some((s, found_statistic)) = statistics.and_then(|s| Some((s, s.get(&block.name, kind)?))) {
                        let statistic = found_statistic.clone();
                        let bytes = statistic.bytes;
                        found(Box::new(move |range| s.will_need(&statistic, range)), bytes);
                    }
                }
            }
            sources
        }
    };
    sources.sort_unstable();
    sources.dedup();
    for source in sources {
        if let Some(meta) = inputs.tensor(source, &block.name) {
            let checkpoint = &inputs.checkpoints[source];
            found(Box::new(move |range| checkpoint.will_need(meta, range)), meta.bytes);
        }
    }
}

/// Gives the pages of a finished block's tensors back.
pub(super) fn release(inputs: &Inputs, block: &BlockPlan, drop_cache: bool) {
    let mut sources = match &block.action {
        Action::Copy { source, .. } => vec![*source],
        Action::Merge { recipe, .. } => {
            let mut sources = recipe.start.sources();
            sources.extend(recipe.solves.iter().flat_map(|s| s.models.iter().map(|m| m.source)));
            for solve in &recipe.solves {
                for (model, kind, _) in statistics_keys(inputs, &block.name, solve) {
                    let statistics = inputs.models[model].statistics.as_ref();
                    if let Some((s, statistic)) = statistics.and_then(|s| Some((s, s.get(&block.name, kind)?))) {
                        // A Gram that another layer shares stays in the page cache.
                        s.release(statistic, 0..statistic.bytes, false);
                    }
                }
            }
            sources
        }
    };
    sources.sort_unstable();
    sources.dedup();
    for source in sources {
        if let Some(meta) = inputs.tensor(source, &block.name) {
            inputs.checkpoints[source].release(meta, 0..meta.bytes, drop_cache);
        }
    }
}
