//! `merge` of a config with `sweep`: one read of the inputs, one published directory a combination, one record of all.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::inputs::{input_paths, open_inputs};
use super::merge::{MergeOptions, MergeSummary, drops_cache, unconverged};
use super::record;
use super::resources::metadata_bytes;
use crate::config::{ConfigError, MergeConfig, Variant};
use crate::error::Error;
use crate::plan::SweepPlan;
use crate::report::{Progress, Sampling, SweepReport, SweepRun};
use crate::stream::{self, BlockReport};
use crate::write::{OutputDir, SideFile, SweepDir};

/// What a finished sweep tells.
#[derive(Debug)]
pub struct SweepSummary {
    /// As published in `sweep.json`.
    pub report: SweepReport,
    /// One a combination, in the order of the grid.
    pub models: Vec<MergeSummary>,
}

/// Merges every combination of the config's `sweep` into a directory of its name in the new directory `out`. Raise
/// `cancel` to stop. Each model has the bytes that [`super::merge`] gives for its combination alone.
///
/// # Errors
/// [`Error`]; nothing stands under a final name then.
pub fn sweep(
    config: &Path,
    out: &Path,
    options: &MergeOptions,
    cancel: &AtomicBool,
) -> Result<SweepSummary, Error> {
    sweep_config(&MergeConfig::load(config)?, out, options, cancel)
}

pub(super) fn sweep_config(
    config: &MergeConfig,
    out: &Path,
    options: &MergeOptions,
    cancel: &AtomicBool,
) -> Result<SweepSummary, Error> {
    let started = Instant::now();
    let _sampling = Sampling::start();
    if options.resume {
        let what = "a sweep cannot be continued in this version; empty the directory and start it again";
        return Err(Error::Flag { flag: "--resume", what: what.to_owned() });
    }
    let Some(sweep) = &config.sweep else {
        return Err(Error::Config(ConfigError::Missing {
            path: config.path.clone(),
            line: 1,
            key: "sweep".to_owned(),
            why: "it says what is varied".to_owned(),
        }));
    };
    // The config has at least one.
    let variants = &sweep.variants;
    let paths = input_paths(config);
    OutputDir::check(out, &paths)?;
    let mut inputs = open_inputs(config, options.io, options.refuse_nonfinite)?;
    inputs.set_seed(options.seed);
    let metadata = metadata_bytes(&inputs);
    let plan = SweepPlan::new(variants, &mut inputs, options.limits, metadata)?;
    let plans = &plan.plans;
    let first = &plans[0];
    for warning in &first.warnings {
        tracing::warn!("{warning}");
    }
    let inputs = Arc::new(inputs);

    // Declared before its writers: they take their directories away before it goes itself.
    let mut directory = SweepDir::claim(out, &paths)?;
    let names: Vec<&str> = variants.iter().map(|v| v.name.as_str()).collect();
    let writers = directory.writers(&names, &Arc::new(first.layout.clone()))?;
    let progress =
        Progress::new(options.progress, first.blocks.len() as u64, plan.read_bytes() + plan.write_bytes());
    let drop_cache = drops_cache(&inputs);
    let blocks = stream::run_variants(plans, &inputs, &writers, &progress, cancel, drop_cache, &|_| ())?;
    progress.finish();
    for file in record::input_files(&inputs) {
        file.check_unchanged()?;
    }

    let mut models = Vec::with_capacity(variants.len());
    let mut runs = Vec::with_capacity(variants.len());
    for ((((k, variant), plan), writer), blocks) in
        variants.iter().enumerate().zip(plans).zip(writers).zip(&blocks)
    {
        writer.sync()?;
        let bytes_written = writer.bytes_written();
        let config = &variant.config;
        let report = record::report(config, plan, &inputs, blocks, options, started, bytes_written);
        if k == 0 {
            for warning in &report.warnings[first.warnings.len()..] {
                tracing::warn!("{warning}");
            }
        }
        let before_index = record::side_files(config, plan, &inputs)?;
        let last = SideFile::new(crate::report::REPORT_FILE, report.to_json());
        directory.complete(&variant.name, writer, before_index, last)?;
        let unconverged = unconverged(plan, blocks);
        runs.push(run(variant, blocks, unconverged.is_empty()));
        models.push(MergeSummary { name: Some(variant.name.clone()), report, unconverged, already: false });
    }
    let report = SweepReport {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        config_hash: record::config_hash(config),
        wall_seconds: started.elapsed().as_secs_f64(),
        bytes_read: models.iter().map(|model| model.report.bytes_read).sum(),
        bytes_written: models.iter().map(|model| model.report.bytes_written).sum(),
        grid: sweep.grid(),
        runs,
    };
    directory.publish(&SideFile::new(crate::report::SWEEP_FILE, report.to_json()))?;
    Ok(SweepSummary { report, models })
}

/// One model's line of the record.
fn run(variant: &Variant, blocks: &[BlockReport], converged: bool) -> SweepRun {
    let solved: Vec<_> = blocks.iter().filter_map(|block| block.outcomes.last()).collect();
    let sum = |values: Vec<f64>| (!values.is_empty()).then(|| values.iter().sum());
    let iterations: Vec<u64> =
        solved.iter().filter_map(|outcome| outcome.iterations).map(|k| k as u64).collect();
    SweepRun {
        name: variant.name.clone(),
        directory: variant.name.clone(),
        parameters: variant.parameters(),
        objective_initial: sum(solved.iter().map(|outcome| outcome.objective_initial).collect()),
        objective_final: sum(solved.iter().map(|outcome| outcome.objective_final).collect()),
        iterations: (!iterations.is_empty()).then(|| iterations.iter().sum()),
        wall_seconds: blocks.iter().map(|block| block.seconds).sum(),
        bytes_read: blocks.iter().map(|block| block.bytes_read).sum(),
        converged,
    }
}
