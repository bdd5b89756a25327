//! What a finished merge leaves beside its weights: the record, the model card, the base's side files.

use std::path::PathBuf;
use std::time::Instant;

use super::MergeOptions;
use crate::config::MergeConfig;
use crate::error::Error;
use crate::merge::{Inputs, SolveDetail, SolveOutcome};
use crate::plan::{Action, BlockPlan, MergePlan};
use crate::read::{InputFile, IoMode};
use crate::report::{
    CardModel, InputFileRecord, InputRecord, ModelCard, OutputFileRecord, ParameterReport, RoundReport,
    RunReport, RunSettings, UnmergedRecord, peak_anonymous_bytes, peak_rss_bytes,
};
use crate::stream::BlockReport;
use crate::tokenizer::is_tokenizer_file;
use crate::view::View;
use crate::write::{SideFile, copy_side_files, patch_config, torch_dtype_name};

/// Every model that is opened, and its name.
fn checkpoints(inputs: &Inputs) -> impl Iterator<Item = (&View, &String)> {
    // What is made of adapters' factors reads the others' files.
    let made = |k: usize| inputs.factors == Some(k);
    let named = inputs.checkpoints.iter().zip(&inputs.names).enumerate();
    named.filter(move |(k, _)| !made(*k)).map(|(_, (view, name))| (&**view, name))
}

/// Every file that the run reads.
pub(super) fn input_files(inputs: &Inputs) -> impl Iterator<Item = &InputFile> {
    let statistics = inputs.models.iter().filter_map(|m| m.statistics.as_deref()).flat_map(|s| s.files());
    checkpoints(inputs).flat_map(|(checkpoint, _)| checkpoint.files()).chain(statistics)
}

/// Config, tokenizer and generation files of the reference, the model card and the config that was carried out.
pub(super) fn side_files(
    config: &MergeConfig,
    plan: &MergePlan,
    inputs: &Inputs,
) -> Result<Vec<SideFile>, Error> {
    let reference = &inputs.checkpoints[inputs.reference()];
    let mut files = match reference.directory() {
        Some(directory) => copy_side_files(directory)?,
        None => Vec::new(),
    };
    let dtype = config.output_dtype().and_then(|_| {
        plan.blocks
            .iter()
            .find(|b| matches!(b.action, Action::Merge { .. }))
            .and_then(|b| torch_dtype_name(b.dtype.name()))
    });
    let untied = !inputs.tied.is_empty() || inputs.sections.iter().any(|section| !section.tied.is_empty());
    let tie = untied.then_some(false);
    let changed = &inputs.files;
    if let Some(model) = changed.model_config.as_ref().or(reference.config()) {
        let patched = patch_config(model, dtype, tie);
        if let Some(patched) = patched.as_ref().or(changed.model_config.as_ref()) {
            files.retain(|f| f.name != "config.json");
            files.push(SideFile::json("config.json", patched));
        }
    }
    if let Some(directory) = &changed.tokenizer_directory {
        files.retain(|f| !is_tokenizer_file(&f.name));
        files.extend(copy_side_files(directory)?.into_iter().filter(|f| is_tokenizer_file(&f.name)));
    }
    files.retain(|f| !changed.dropped.contains(&f.name.as_str()));
    files.retain(|f| changed.changed.iter().all(|(name, _)| *name != f.name));
    files.extend(changed.changed.iter().map(|(name, bytes)| SideFile::new(name.clone(), bytes.clone())));
    files.retain(|f| f.name != "README.md" && f.name != "merge_config.yml");
    files.push(SideFile::new("README.md", card(config, plan)));
    files.push(SideFile::new("merge_config.yml", config.text.clone()));
    Ok(files)
}

fn card(config: &MergeConfig, plan: &MergePlan) -> String {
    let file_name =
        |path: &PathBuf| path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    let merged = plan
        .blocks
        .iter()
        .filter(|b| matches!(b.action, Action::Merge { .. }) && b.unmatched.is_none())
        .count();
    ModelCard {
        title: config.name.clone().unwrap_or_else(|| "merge".to_owned()),
        base_model: config.base_model.as_ref().map(|m| m.written.clone()),
        models: config
            .models
            .iter()
            .enumerate()
            .map(|(i, m)| CardModel {
                name: m.model.written.clone(),
                weight: config
                    .round
                    .model_parameters
                    .get(i)
                    .and_then(|p| p.uniform_number("weight"))
                    .map(|w| w.to_string()),
                statistics: m.statistics.iter().map(file_name).collect(),
            })
            .collect(),
        method: config.round.method.name().to_owned(),
        summary: format!(
            "{merged} of {} tensors were merged by `{}`.",
            plan.blocks.len(),
            config.round.method.name()
        ),
        config: config.text.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
    .render()
}

/// The run's record.
pub(super) fn report(
    config: &MergeConfig,
    plan: &MergePlan,
    inputs: &Inputs,
    blocks: &[BlockReport],
    options: &MergeOptions,
    started: Instant,
    bytes_written: u64,
) -> RunReport {
    let mut report = RunReport {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        config_hash: config_hash(config),
        wall_seconds: started.elapsed().as_secs_f64(),
        peak_rss_bytes: peak_rss_bytes(),
        peak_anonymous_bytes: peak_anonymous_bytes(),
        bytes_read: blocks.iter().map(|b| b.bytes_read).sum(),
        bytes_written,
        flops: blocks.iter().map(|b| flops(&plan.blocks[b.block], b)).sum(),
        settings: RunSettings {
            threads: options.limits.threads,
            max_memory: options.limits.max_memory,
            io: if options.io == IoMode::Mmap { "mmap" } else { "pread" }.to_owned(),
            seed: Some(options.seed),
        },
        inputs: input_records(config, inputs),
        outputs: plan
            .layout
            .model_shards()
            .iter()
            .map(|s| OutputFileRecord { name: s.file_name.clone(), bytes: s.file_bytes })
            .collect(),
        warnings: plan.warnings.clone(),
        unmerged: plan
            .not_merged()
            .map(|(name, reason)| UnmergedRecord { name: name.to_owned(), reason })
            .collect(),
        ..RunReport::default()
    };
    for block in blocks {
        let planned = &plan.blocks[block.block];
        report.parameters.insert(planned.name.clone(), parameter(planned, block));
        if let Some(model) = &block.differs_in {
            report.warnings.push(differs(&planned.name, model));
        }
    }
    report
}

pub(super) fn flops(planned: &BlockPlan, block: &BlockReport) -> f64 {
    let counted: f64 = block.outcomes.iter().map(|o| o.flops).sum();
    if counted > 0.0 { counted } else { planned.flops }
}

pub(super) fn parameter(planned: &BlockPlan, block: &BlockReport) -> ParameterReport {
    let mut parameter = ParameterReport {
        seconds: block.seconds,
        bytes_read: block.bytes_read,
        note: planned.unmatched.clone(),
        passes: (planned.passes > 1).then_some(planned.passes),
        nonfinite: block.nonfinite.then_some(true),
        ..ParameterReport::default()
    };
    let Action::Merge { recipe, .. } = &planned.action else {
        parameter.method = "copy".to_owned();
        if let Action::Copy { reason, .. } = &planned.action {
            parameter.note = Some((*reason).to_owned());
        }
        return parameter;
    };
    parameter.method = recipe.method.to_owned();
    parameter.start = (!recipe.solves.is_empty()).then(|| recipe.start.name().to_owned());
    parameter.rounds =
        recipe.solves.iter().zip(&block.outcomes).map(|(solve, outcome)| round(solve, outcome)).collect();
    // The last round is the parameter's own.
    if let Some(last) = parameter.rounds.pop() {
        parameter.solver = Some(last.method);
        parameter.subspace = last.subspace;
        parameter.iterations = last.iterations;
        parameter.stop_reason = last.stop_reason;
        parameter.initial_relative_residual = last.initial_relative_residual;
        parameter.final_relative_residual = last.final_relative_residual;
        parameter.objective_initial = last.objective_initial;
        parameter.objective_final = last.objective_final;
        parameter.converged = last.converged;
        parameter.ridge = last.ridge;
        parameter.ridge_raised_from = last.ridge_raised_from;
    }
    if let Some(last) = block.outcomes.last() {
        let SolveDetail { preconditioner, setup, solve_seconds, history, repair } = &last.detail;
        parameter.preconditioner = preconditioner.map(str::to_owned);
        parameter.setup = *setup;
        parameter.solve_seconds = *solve_seconds;
        parameter.factors_lifted = repair.lifted.then_some(true);
        parameter.history.clone_from(history);
    }
    parameter
}

fn round(solve: &crate::merge::Solve, outcome: &SolveOutcome) -> RoundReport {
    RoundReport {
        method: solve.solver.name().to_owned(),
        subspace: Some(solve.system.name().to_owned()),
        iterations: outcome.iterations.map(|k| k as u64),
        stop_reason: Some(outcome.stop.name().to_owned()),
        initial_relative_residual: outcome.initial_relative_residual,
        final_relative_residual: outcome.final_relative_residual,
        objective_initial: Some(outcome.objective_initial),
        objective_final: Some(outcome.objective_final),
        converged: Some(outcome.stop.converged()),
        ridge: (solve.ridge > 0.0).then_some(solve.ridge * outcome.detail.repair.ridge),
        ridge_raised_from: (outcome.detail.repair.ridge > 1.0).then_some(solve.ridge),
    }
}

/// What is told of an integer tensor that `model` has otherwise.
pub(super) fn differs(tensor: &str, model: &str) -> String {
    let name = crate::read::escaped(tensor);
    format!("tensor `{name}` has other values in {model}; the reference's were copied")
}

/// What is told of a finished merge: results that are not finite, solves that stopped early, or that a ridge had to be
/// raised for.
pub(super) fn result_warnings(report: &RunReport) -> Vec<String> {
    let mut lines: Vec<String> = nonfinite(report).into_iter().collect();
    for (name, record) in &report.parameters {
        let Some(reason @ ("not_finite" | "not_positive_definite")) = record.stop_reason.as_deref() else {
            continue;
        };
        // Stored Grams have rounding noise of either sign, which a ridge outweighs.
        let hint = match reason {
            "not_finite" => String::new(),
            _ => format!(
                "; try a `solver.ridge` above {}, or statistics in f32",
                record.ridge.unwrap_or_default()
            ),
        };
        let name = crate::read::escaped(name);
        lines.push(format!(
            "tensor `{name}`: the solver stopped ({reason}) and kept its last good iterate{hint}"
        ));
    }
    lines.extend(raised_ridges(report));
    lines
}

/// Says which results are not finite.
fn nonfinite(report: &RunReport) -> Option<String> {
    let mut tensors = report.parameters.iter().filter(|(_, record)| record.nonfinite == Some(true));
    let shown: Vec<String> =
        tensors.by_ref().take(3).map(|(name, _)| format!("`{}`", crate::read::escaped(name))).collect();
    let more = match tensors.count() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    (!shown.is_empty()).then(|| {
        format!(
            "tensor {}{more}: NaN or infinities in the result: beyond the range of the output's dtype (try a wider \
             `out_dtype`, smaller weights), or in a model",
            shown.join(", ")
        )
    })
}

/// Says where a ridge was too weak for the noise of the statistics, and what was done about it.
fn raised_ridges(report: &RunReport) -> Option<String> {
    let raised: Vec<(f64, f64)> =
        report.parameters.values().filter_map(|record| record.ridge_raised_from.zip(record.ridge)).collect();
    let (from, to) =
        raised.iter().fold((f64::INFINITY, 0.0f64), |(from, to), r| (from.min(r.0), to.max(r.1)));
    let which = match raised.len() {
        0 => return None,
        1 => "1 parameter is".to_owned(),
        n => format!("{n} parameters are"),
    };
    Some(format!(
        "{which} not positive definite with ridge {from} (noise of rounded statistics): raised there, to {to:.2} at most; \
         statistics in f32 would not need it"
    ))
}

/// Hash of what the config means, not of how it is written.
pub(super) fn config_hash(config: &MergeConfig) -> String {
    let text = format!("{}\n{}", env!("CARGO_PKG_VERSION"), config.canonical_hash_input());
    format!("{:032x}", twox_hash::XxHash3_128::oneshot(text.as_bytes()))
}

fn input_records(config: &MergeConfig, inputs: &Inputs) -> Vec<InputRecord> {
    let record = |path: String, files: &mut dyn Iterator<Item = &InputFile>| InputRecord {
        path,
        files: files
            .map(|file| InputFileRecord {
                name: file.path().file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned()),
                bytes: file.fingerprint().len,
                mtime_ns: file.fingerprint().mtime_ns,
                header_hash: None,
                location: None,
            })
            .collect(),
    };
    let checkpoints = checkpoints(inputs).map(|(c, name)| record(name.clone(), &mut c.files()));
    let statistics = inputs.models.iter().zip(&config.models).filter_map(|(input, entry)| {
        let statistics = input.statistics.as_ref()?;
        Some(record(format!("{} (statistics)", entry.model.written), &mut statistics.files().iter()))
    });
    checkpoints.chain(statistics).collect()
}
