//! `merge`: config → plan → stream → published directory with its report.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use super::inputs::{input_paths, open_inputs};
use super::resources::{available_memory, limits, metadata_bytes};
use super::resume::{self, Committer, Done};
use crate::cli::{MergeArgs, Nonfinite};
use crate::config::MergeConfig;
use crate::error::Error;
use crate::merge::{Inputs, MergeError, SolveDetail, SolveOutcome};
use crate::plan::{Action, BlockPlan, Limits, MergePlan};
use crate::read::{InputFile, IoMode};
use crate::report::{
    CardModel, InputFileRecord, InputRecord, ModelCard, OutputFileRecord, ParameterReport, Progress,
    ProgressMode, RoundReport, RunReport, RunSettings, UnmergedRecord, anonymous_bytes, peak_rss_bytes,
};
use crate::stream::{self, BlockReport};
use crate::write::{CheckpointWriter, OutputDir, SideFile, copy_side_files, patch_config, torch_dtype_name};

/// How to merge: the flags, for callers of the library.
#[derive(Debug, Clone)]
pub struct MergeOptions {
    /// Memory, threads, shard size, ties.
    pub limits: Limits,
    /// How inputs are read.
    pub io: IoMode,
    /// Refuse NaN and infinities in the models.
    pub refuse_nonfinite: bool,
    /// Recorded; this version's methods draw no random numbers.
    pub seed: u64,
    /// What is shown on stderr.
    pub progress: ProgressMode,
    /// Continue a run that ended early.
    pub resume: bool,
}

/// What a finished merge tells.
#[derive(Debug)]
pub struct MergeSummary {
    /// As published in `merge_report.json`.
    pub report: RunReport,
    /// Parameters whose solver did not converge.
    pub unconverged: Vec<String>,
    /// The directory was complete before: nothing was done.
    pub already: bool,
}

impl MergeSummary {
    /// Of a directory that is complete.
    fn already(report: RunReport) -> Self {
        let unconverged = report.parameters.iter().filter(|(_, p)| p.converged == Some(false));
        let unconverged = unconverged.map(|(name, _)| name.clone()).collect();
        Self { report, unconverged, already: true }
    }
}

/// Raised by signals; the number of the first one.
struct Signals {
    cancel: Arc<AtomicBool>,
    number: Arc<AtomicUsize>,
}

impl Signals {
    fn install() -> Self {
        use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
        let cancel = Arc::new(AtomicBool::new(false));
        let number = Arc::new(AtomicUsize::new(0));
        for signal in [SIGINT, SIGTERM] {
            // A second signal ends the process at once. Handlers that cannot be installed change nothing else.
            let _ =
                signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&cancel));
            let _ = signal_hook::flag::register_usize(signal, Arc::clone(&number), signal as usize);
            let _ = signal_hook::flag::register(signal, Arc::clone(&cancel));
        }
        let _ = crate::read::exit_on_lost_pages();
        // Over the file size limit a write then fails with its reason.
        let _ = signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)));
        Self { cancel, number }
    }

    fn interrupted(&self, out: &Path) -> Option<Error> {
        match self.number.load(Ordering::Relaxed) {
            0 => None,
            signal => Some(Error::Interrupted { signal: signal as i32, out: out.to_owned() }),
        }
    }
}

pub(super) fn command(args: MergeArgs) -> Result<ExitCode, Error> {
    let Some(out) = args.out else {
        return Err(Error::Flag { flag: "--out", what: "got nothing, expected a directory".to_owned() });
    };
    let options = MergeOptions {
        limits: limits(&args.resources)?,
        io: super::io_mode(args.resources.io),
        refuse_nonfinite: args.nonfinite == Nonfinite::Error,
        seed: args.seed,
        progress: match args.progress {
            crate::cli::ProgressMode::Auto => ProgressMode::Auto,
            crate::cli::ProgressMode::Plain => ProgressMode::Plain,
            crate::cli::ProgressMode::None => ProgressMode::None,
        },
        resume: args.resume,
    };
    let signals = Signals::install();
    let summary = merge(&args.config, &out, &options, &signals.cancel).map_err(|error| {
        match (&error, signals.interrupted(&out)) {
            (Error::Merge(MergeError::Cancelled), Some(interrupted)) => interrupted,
            _ => error,
        }
    })?;
    if summary.already {
        let out = crate::report::units::EscapedPath(&out).to_string();
        let _ = writeln!(std::io::stderr(), "mats-stream: {out}: this merge is complete; nothing to do");
    }
    for (name, record) in &summary.report.parameters {
        if let Some(reason @ ("not_finite" | "not_positive_definite")) = record.stop_reason.as_deref() {
            let name = crate::read::escaped(name);
            tracing::warn!("tensor `{name}`: the solver stopped ({reason}) and kept its last good iterate");
        }
    }
    if !summary.unconverged.is_empty() {
        let shown: Vec<String> =
            summary.unconverged.iter().take(3).map(|n| crate::read::escaped(n)).collect();
        let more = summary.unconverged.len() - shown.len();
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let line =
            format!("{} parameters did not converge: {}{more}", summary.unconverged.len(), shown.join(", "));
        if args.require_convergence {
            tracing::error!("{line}");
            return Ok(ExitCode::from(3));
        }
        tracing::info!("{line}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Merges the models of the config at `config` into the new directory `out`. Raise `cancel` to stop.
///
/// # Errors
/// [`Error`]; nothing stands under a final name then.
pub fn merge(
    config: &Path,
    out: &Path,
    options: &MergeOptions,
    cancel: &AtomicBool,
) -> Result<MergeSummary, Error> {
    let started = Instant::now();
    let config = MergeConfig::load(config)?;
    let config_hash = config_hash(&config);
    let paths = input_paths(&config);
    let complete = if options.resume { resume::finished(out) } else { None };
    match (&complete, options.resume) {
        (Some(report), _) => resume::check_finished(out, report, &config_hash, None)?,
        (None, true) => OutputDir::check_unfinished(out, &paths)?,
        (None, false) => OutputDir::check(out, &paths)?,
    }
    let opened = open_inputs(&config, options.io, options.refuse_nonfinite);
    if let Some(report) = complete {
        // Inputs may be gone once a merge is done.
        if let Ok(inputs) = &opened {
            let key = resume::key(config_hash.clone(), options, input_files(inputs))?;
            resume::check_finished(out, &report, &config_hash, Some(&key))?;
        }
        OutputDir::tidy(out);
        return Ok(MergeSummary::already(report));
    }
    let mut inputs = opened?;
    let metadata = metadata_bytes(&inputs);
    let plan = MergePlan::new(&config, &mut inputs, options.limits, metadata)?;
    for warning in &plan.warnings {
        tracing::warn!("{warning}");
    }
    let inputs = Arc::new(inputs);

    let key = resume::key(config_hash, options, input_files(&inputs))?;
    let side = side_files(&config, &plan, &inputs)?;
    let own = |name: &str| side.iter().any(|file| file.name == name) || plan.layout.owns(name);
    let (writer, before) = resume::open(out, &paths, &own, options.resume, &plan, key.clone())?;
    if before.len() > 0 {
        tracing::info!("{} of {} tensors are there already", before.len(), plan.blocks.len());
    }
    let progress = Progress::new(
        options.progress,
        (plan.blocks.len() - before.len()) as u64,
        plan.read_bytes() + plan.write_bytes() - before.bytes(&plan),
    );
    let blocks = stream_and_commit(&plan, &inputs, &writer, &progress, cancel)
        .map_err(|error| changed_input(error, &inputs))
        .inspect_err(|error| {
            if resume::resumable(error) {
                writer.keep_unfinished();
            }
        })?;
    progress.finish();
    for file in input_files(&inputs) {
        file.check_unchanged()?;
    }
    // From here on only the disk can be at fault, and everything is there.
    writer.keep_unfinished();
    writer.sync()?;

    let mut unconverged: Vec<String> = blocks
        .iter()
        .filter(|b| is_unconverged(b))
        .map(|b| plan.blocks[b.block].name.clone())
        .chain(before.unconverged(&plan))
        .collect();
    unconverged.sort_unstable();
    let mut report = report(&config, &plan, &inputs, &blocks, options, started, writer.bytes_written());
    before.complete(&mut report, &plan, &writer, &key, input_files(&inputs))?;
    let record = SideFile::new(crate::report::REPORT_FILE, report.to_json());
    writer.finish(side, record)?;
    Ok(MergeSummary { report, unconverged, already: false })
}

/// What made a block fail, if an input changed: what was found in it then says nothing about the file that was opened.
fn changed_input(error: Error, inputs: &Inputs) -> Error {
    if matches!(error, Error::Merge(MergeError::Cancelled | MergeError::Write(_)) | Error::Write(_)) {
        return error;
    }
    input_files(inputs).find_map(|file| file.check_unchanged().err()).map_or(error, Error::from)
}

/// Runs the plan while a thread of its own makes finished tensors durable.
fn stream_and_commit(
    plan: &MergePlan,
    inputs: &Arc<Inputs>,
    writer: &CheckpointWriter,
    progress: &Progress,
    cancel: &AtomicBool,
) -> Result<Vec<BlockReport>, Error> {
    let input_bytes: u64 = inputs.checkpoints.iter().map(|c| c.total_bytes()).sum();
    // Inputs that will not fit in the page cache are not kept there: the machine has better use for it.
    let drop_cache = input_bytes > available_memory() / 2;
    let committer = Committer::new(writer);
    let finished = |block: &BlockReport| {
        let planned = &plan.blocks[block.block];
        let done = Done {
            parameter: parameter(planned, block),
            flops: flops(planned, block),
            unconverged: is_unconverged(block),
            differs_in: block.differs_in.clone(),
        };
        writer.record(block.block, serde_json::to_value(done).expect("string keys and plain values"));
    };
    let (streamed, committed) = std::thread::scope(|threads| {
        let commits = threads.spawn(|| committer.run(cancel));
        let end = committer.stop_at_end();
        let streamed = stream::run(plan, inputs, writer, progress, cancel, drop_cache, &finished);
        drop(end);
        (streamed, commits.join().unwrap_or(Ok(())))
    });
    match (streamed, committed) {
        // A commit that failed stopped the blocks: it is the cause.
        (Ok(_) | Err(MergeError::Cancelled), Err(error)) => Err(error.into()),
        (streamed, _) => Ok(streamed?),
    }
}

fn is_unconverged(block: &BlockReport) -> bool {
    block.outcomes.last().is_some_and(|outcome| !outcome.stop.converged())
}

/// What is told of an integer tensor that `model` has otherwise.
pub(super) fn differs(tensor: &str, model: &str) -> String {
    let name = crate::read::escaped(tensor);
    format!("tensor `{name}` has other values in {model}; the reference's were copied")
}

fn input_files(inputs: &Inputs) -> impl Iterator<Item = &InputFile> {
    let statistics = inputs.models.iter().filter_map(|m| m.statistics.as_deref()).flat_map(|s| s.files());
    inputs.checkpoints.iter().flat_map(|c| c.files()).chain(statistics)
}

/// Config, tokenizer and generation files of the reference, the model card and the config that was carried out.
fn side_files(config: &MergeConfig, plan: &MergePlan, inputs: &Inputs) -> Result<Vec<SideFile>, Error> {
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
    let tie = (!inputs.tied.is_empty()).then_some(false);
    if let Some(patched) = reference.config().and_then(|c| patch_config(c, dtype, tie)) {
        files.retain(|f| f.name != "config.json");
        files.push(SideFile::json("config.json", &patched));
    }
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

fn report(
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
        peak_anonymous_bytes: anonymous_bytes(),
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
            .shards()
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
            tracing::warn!("{}", report.warnings[report.warnings.len() - 1]);
        }
    }
    report
}

fn flops(planned: &BlockPlan, block: &BlockReport) -> f64 {
    let counted: f64 = block.outcomes.iter().map(|o| o.flops).sum();
    if counted > 0.0 { counted } else { planned.flops }
}

fn parameter(planned: &BlockPlan, block: &BlockReport) -> ParameterReport {
    let mut parameter = ParameterReport {
        seconds: block.seconds,
        bytes_read: block.bytes_read,
        note: planned.unmatched.clone(),
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
    }
    if let Some(last) = block.outcomes.last() {
        let SolveDetail { preconditioner, setup, solve_seconds, history } = &last.detail;
        parameter.preconditioner = preconditioner.map(str::to_owned);
        parameter.setup = *setup;
        parameter.solve_seconds = *solve_seconds;
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
        ridge: (solve.ridge > 0.0).then_some(solve.ridge),
    }
}

/// Hash of what the config means, not of how it is written.
fn config_hash(config: &MergeConfig) -> String {
    let text = format!("{}\n{}", env!("CARGO_PKG_VERSION"), config.canonical_hash_input());
    format!("{:032x}", twox_hash::XxHash3_128::oneshot(text.as_bytes()))
}

fn input_records(config: &MergeConfig, inputs: &Inputs) -> Vec<InputRecord> {
    let record = |path: String, files: &[InputFile]| InputRecord {
        path,
        files: files
            .iter()
            .map(|file| InputFileRecord {
                name: file.path().file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned()),
                bytes: file.fingerprint().len,
                mtime_ns: file.fingerprint().mtime_ns,
                header_hash: None,
                location: None,
            })
            .collect(),
    };
    let checkpoints =
        inputs.checkpoints.iter().zip(&inputs.names).map(|(c, name)| record(name.clone(), c.files()));
    let statistics = inputs.models.iter().zip(&config.models).filter_map(|(input, entry)| {
        let statistics = input.statistics.as_ref()?;
        Some(record(format!("{} (statistics)", entry.model.written), statistics.files()))
    });
    checkpoints.chain(statistics).collect()
}
