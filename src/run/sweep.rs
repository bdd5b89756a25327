//! `merge` of a config with `sweep`: one read of the inputs, one published directory a combination, one record of all.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::inputs::{input_paths, open_inputs};
use super::merge::{MergeOptions, MergeSummary, stream_and_commit, unconverged};
use super::record;
use super::resources::metadata_bytes;
use super::resume::{self, Before};
use crate::config::{ConfigError, MergeConfig, Variant};
use crate::error::Error;
use crate::plan::SweepPlan;
use crate::report::{Progress, RunReport, Sampling, SweepReport, SweepRun};
use crate::write::journal::RunKey;
use crate::write::{CheckpointWriter, OutputDir, Share, SideFile, SweepDir};

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
    let config_hash = record::config_hash(config);
    let paths = input_paths(config);
    let complete = if options.resume { resume::finished_sweep(out) } else { None };
    match (&complete, options.resume) {
        (Some(report), _) => resume::check_finished_sweep(out, report, &config_hash, None)?,
        (None, true) => OutputDir::check_unfinished(out, &paths)?,
        (None, false) => OutputDir::check(out, &paths)?,
    }
    let opened = open_inputs(config, options.io, options.refuse_nonfinite);
    if let Some(report) = complete {
        // Inputs may be gone once a sweep is done.
        if let Ok(inputs) = &opened {
            let key = resume::key(config_hash.clone(), options, inputs)?;
            resume::check_finished_sweep(out, &report, &config_hash, Some(&key))?;
        }
        let models = variants
            .iter()
            .map(|v| Ok(MergeSummary::already(Some(v.name.clone()), RunReport::read(&out.join(&v.name))?)))
            .collect::<Result<_, Error>>()?;
        OutputDir::tidy(out);
        return Ok(SweepSummary { report, models });
    }
    let mut inputs = opened?;
    inputs.set_seed(options.seed);
    let metadata = metadata_bytes(&inputs);
    let plan = SweepPlan::new(variants, &mut inputs, options.limits, metadata)?;
    let first = &plan.plans[0];
    for warning in &first.warnings {
        tracing::warn!("{warning}");
    }
    let told = first.warnings.len();
    let layout = first.layout.clone();
    let inputs = Arc::new(inputs);

    // Declared before its writers: they take their directories away before it goes itself.
    let key = resume::key(config_hash.clone(), options, &inputs)?;
    let names: Vec<&str> = variants.iter().map(|v| v.name.as_str()).collect();
    let mut directory = SweepDir::claim(out, &paths, &names, key.clone(), options.resume)?;
    let mut models: Vec<Option<MergeSummary>> = variants.iter().map(|_| None).collect();
    let mut plans = Vec::new();
    let mut open: Vec<Model<'_>> = Vec::new();
    let all_bytes = plan.read_bytes() + plan.write_bytes();
    for ((variant, plan), done) in variants.iter().zip(plan.plans).zip(&mut models) {
        let key = RunKey { config: record::config_hash(&variant.config), ..key.clone() };
        if let Some(path) = directory.complete_before(&variant.name) {
            let report = RunReport::read(&path)?;
            resume::check_finished(&path, &report, &key.config, Some(&key))?;
            directory.take_over(&variant.name, path);
            let summary = MergeSummary::already(Some(variant.name.clone()), report);
            *done = Some(MergeSummary { already: false, ..summary });
            continue;
        }
        let side = record::side_files(&variant.config, &plan, &inputs)?;
        plans.push(plan);
        open.push(Model { variant, key, side, before: Before::default(), done });
    }
    let unfinished: Vec<&str> = open.iter().map(|model| model.variant.name.as_str()).collect();
    directory.check_space(&unfinished, &layout)?;
    let share = Share::of(open.len());
    let mut writers = Vec::with_capacity(open.len());
    for (model, plan) in open.iter_mut().zip(&plans) {
        let place = directory.place_of(&model.variant.name);
        let own = |name: &str| model.side.iter().any(|file| file.name == name) || layout.owns(name);
        let (writer, before) =
            resume::open(&place, &[], &own, options.resume, plan, model.key.clone(), share)?;
        writer.reserve_side_files(model.side.iter().map(SideFile::bytes).sum())?;
        model.before = before;
        writers.push(writer);
    }
    if open.len() < variants.len() || open.iter().any(|model| model.before.len() > 0) {
        let tensors: usize = open.iter().map(|model| model.before.len()).sum();
        let whole = variants.len() - open.len();
        tracing::info!(
            "{whole} of {} models and {tensors} tensors of others are there already",
            variants.len()
        );
    }
    let to_do = |block: &usize| !writers.iter().all(|writer| writer.resumed(*block));
    let blocks = (0..layout.specs().len()).filter(to_do).count() as u64;
    let bytes = all_bytes * blocks / (layout.specs().len() as u64).max(1);
    let progress = Progress::new(options.progress, blocks, bytes);
    let mut keep = |error: &Error| {
        if resume::resumable(error) {
            writers.iter().for_each(CheckpointWriter::keep_unfinished);
            directory.keep_unfinished();
        }
    };
    let blocks = stream_and_commit(&plans, &inputs, &writers, &progress, cancel).inspect_err(&mut keep)?;
    progress.finish();
    for file in record::input_files(&inputs) {
        file.check_unchanged()?;
    }
    // From here on only the disk can be at fault, and everything is there.
    writers.iter().for_each(CheckpointWriter::keep_unfinished);
    directory.keep_unfinished();

    let mut warned = false;
    for (((model, plan), writer), mut blocks) in open.into_iter().zip(&plans).zip(writers).zip(blocks) {
        let Model { variant, key, side, before, done } = model;
        // What another model still needed was made for this one, too, and not written.
        blocks.retain(|block| !writer.resumed(block.block));
        writer.sync()?;
        let mut unconverged: Vec<String> =
            unconverged(plan, &blocks).into_iter().chain(before.unconverged(plan)).collect();
        unconverged.sort_unstable();
        let bytes_written = writer.bytes_written();
        let config = &variant.config;
        let mut report = record::report(config, plan, &inputs, &blocks, options, started, bytes_written);
        before.complete(&mut report, plan, &writer, &key, record::input_files(&inputs))?;
        if !std::mem::replace(&mut warned, true) {
            for warning in &report.warnings[told..] {
                tracing::warn!("{warning}");
            }
        }
        report.warnings.extend(record::result_warnings(&report));
        let last = SideFile::new(crate::report::REPORT_FILE, report.to_json());
        directory.complete(&variant.name, writer, side, last)?;
        let name = Some(variant.name.clone());
        *done = Some(MergeSummary { name, report, unconverged, already: false });
    }
    let models: Vec<MergeSummary> = models.into_iter().flatten().collect();
    let report = SweepReport {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        config_hash,
        run_hash: Some(resume::run_hash(&key)),
        wall_seconds: started.elapsed().as_secs_f64(),
        bytes_read: models.iter().map(|model| model.report.bytes_read).sum(),
        bytes_written: models.iter().map(|model| model.report.bytes_written).sum(),
        grid: sweep.grid(),
        runs: variants.iter().zip(&models).map(|(variant, model)| run(variant, model)).collect(),
    };
    directory.publish(&SideFile::new(crate::report::SWEEP_FILE, report.to_json()))?;
    Ok(SweepSummary { report, models })
}

/// A model that is still to be made.
struct Model<'a> {
    variant: &'a Variant,
    key: RunKey,
    side: Vec<SideFile>,
    before: Before,
    /// Where it is told once it is complete.
    done: &'a mut Option<MergeSummary>,
}

/// One model's line of the record.
fn run(variant: &Variant, model: &MergeSummary) -> SweepRun {
    let parameters = &model.report.parameters;
    let solved = || parameters.values().filter(|parameter| parameter.solver.is_some());
    let any = solved().next().is_some();
    let mut iterations = solved().filter_map(|parameter| parameter.iterations).peekable();
    SweepRun {
        name: variant.name.clone(),
        directory: variant.name.clone(),
        parameters: variant.parameters(),
        objective_initial: any.then(|| solved().filter_map(|parameter| parameter.objective_initial).sum()),
        objective_final: any.then(|| solved().filter_map(|parameter| parameter.objective_final).sum()),
        iterations: iterations.peek().is_some().then(|| iterations.sum()),
        wall_seconds: parameters.values().map(|parameter| parameter.seconds).sum(),
        bytes_read: model.report.bytes_read,
        converged: model.unconverged.is_empty(),
    }
}
