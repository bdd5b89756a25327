//! `merge`: config → plan → stream → published directory with its report.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use serde_json::value::{RawValue, to_raw_value};

use super::inputs::{input_paths, open_inputs};
use super::record;
use super::resources::{available_memory, limits, metadata_bytes};
use super::resume::{self, Committer, Done};
use super::sweep::sweep_config;
use crate::cli::{MergeArgs, Nonfinite};
use crate::config::{ConfigError, MergeConfig};
use crate::error::Error;
use crate::merge::{Inputs, MergeError};
use crate::plan::{Limits, MergePlan};
use crate::read::IoMode;
use crate::report::{Progress, ProgressMode, RunReport, Sampling, peak_anonymous_bytes};
use crate::stream::{self, BlockReport};
use crate::write::{CheckpointWriter, OutputDir, Share, SideFile};

/// How to merge: the flags, for callers of the library.
#[derive(Debug, Clone)]
pub struct MergeOptions {
    /// Memory, threads, shard size, ties.
    pub limits: Limits,
    /// How inputs are read.
    pub io: IoMode,
    /// Refuse NaN and infinities in the models.
    pub refuse_nonfinite: bool,
    /// Key of the methods that draw random numbers.
    pub seed: u64,
    /// What is shown on stderr.
    pub progress: ProgressMode,
    /// Continue a run that ended early.
    pub resume: bool,
}

/// What a finished merge tells.
#[derive(Debug)]
pub struct MergeSummary {
    /// Of the model, where it is one of a sweep.
    pub name: Option<String>,
    /// As published in `merge_report.json`.
    pub report: RunReport,
    /// Parameters whose solver did not converge.
    pub unconverged: Vec<String>,
    /// The directory was complete before: nothing was done.
    pub already: bool,
}

impl MergeSummary {
    /// Of a directory that is complete.
    pub(super) fn already(name: Option<String>, report: RunReport) -> Self {
        let unconverged = report.parameters.iter().filter(|(_, p)| p.converged == Some(false));
        let unconverged = unconverged.map(|(name, _)| name.clone()).collect();
        Self { name, report, unconverged, already: true }
    }
}

/// Raised by signals; the number of the first one.
pub(super) struct Signals {
    pub cancel: Arc<AtomicBool>,
    number: Arc<AtomicUsize>,
}

impl Signals {
    pub fn install() -> Self {
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

    /// `out`: where `--resume` can go on.
    pub fn interrupted(&self, out: Option<&Path>) -> Option<Error> {
        match self.number.load(Ordering::Relaxed) {
            0 => None,
            signal => Some(Error::Interrupted { signal: signal as i32, out: out.map(Path::to_owned) }),
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
    let config = MergeConfig::load(&args.config)?;
    let merged = match config.sweep {
        Some(_) => sweep_config(&config, &out, &options, &signals.cancel).map(|summary| summary.models),
        None => merge_config(&config, &out, &options, &signals.cancel).map(|summary| vec![summary]),
    };
    let summaries = merged.map_err(|error| match (&error, signals.interrupted(Some(&out))) {
        (Error::Merge(MergeError::Cancelled), Some(interrupted)) => interrupted,
        _ => error,
    })?;
    let mut code = ExitCode::SUCCESS;
    if summaries.iter().all(|summary| summary.already) {
        let out = crate::report::units::EscapedPath(&out).to_string();
        let _ = writeln!(std::io::stderr(), "mats-stream: {out}: this merge is complete; nothing to do");
    }
    for summary in &summaries {
        let of = summary.name.as_ref().map_or_else(String::new, |name| format!("{name}: "));
        for warning in record::result_warnings(&summary.report) {
            tracing::warn!("{of}{warning}");
        }
        let lifted =
            summary.report.parameters.values().filter(|record| record.factors_lifted == Some(true)).count();
        if lifted > 0 {
            tracing::info!(
                "{of}{lifted} parameters have Grams that rounding left with negative eigenvalues: made positive semidefinite"
            );
        }
        if summary.unconverged.is_empty() {
            continue;
        }
        let shown: Vec<String> =
            summary.unconverged.iter().take(3).map(|n| crate::read::escaped(n)).collect();
        let more = summary.unconverged.len() - shown.len();
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let count = summary.unconverged.len();
        let line = format!("{of}{count} parameters did not converge: {}{more}", shown.join(", "));
        if args.require_convergence {
            tracing::error!("{line}");
            code = ExitCode::from(3);
        } else {
            tracing::info!("{line}");
        }
    }
    Ok(code)
}

/// Merges the models of the config at `config` into the new directory `out`. Raise `cancel` to stop. A config with `sweep`
/// is [`super::sweep`]'s.
///
/// # Errors
/// [`Error`]; nothing stands under a final name then.
pub fn merge(
    config: &Path,
    out: &Path,
    options: &MergeOptions,
    cancel: &AtomicBool,
) -> Result<MergeSummary, Error> {
    merge_config(&MergeConfig::load(config)?, out, options, cancel)
}

/// As [`merge`], of a config in hand: [`MergeConfig::load_with`] brings methods of the caller's own.
///
/// # Errors
/// [`Error`]; nothing stands under a final name then.
pub fn merge_config(
    config: &MergeConfig,
    out: &Path,
    options: &MergeOptions,
    cancel: &AtomicBool,
) -> Result<MergeSummary, Error> {
    if let Some(sweep) = &config.sweep {
        return Err(Error::Config(ConfigError::NotAllowed {
            path: config.path.clone(),
            line: sweep.line,
            key: "sweep".to_owned(),
            why: "stands for several models, and one was asked for".to_owned(),
        }));
    }
    let started = Instant::now();
    let _sampling = Sampling::start();
    let config_hash = record::config_hash(config);
    let paths = input_paths(config);
    let complete = check_output(out, &paths, &config_hash, options)?;
    let opened = open_inputs(config, options.io, options.refuse_nonfinite);
    if let Some(report) = complete {
        // Inputs may be gone once a merge is done.
        if let Ok(inputs) = &opened {
            let key = resume::key(config_hash.clone(), options, inputs)?;
            resume::check_finished(out, &report, &config_hash, Some(&key))?;
        }
        OutputDir::tidy(out);
        return Ok(MergeSummary::already(None, report));
    }
    let mut inputs = opened?;
    inputs.set_seed(options.seed);
    let metadata = metadata_bytes(&inputs);
    let plan = MergePlan::new(config, &mut inputs, options.limits, metadata)?;
    let prepared = Prepared { config, config_hash, plan, inputs, paths, started };
    carry_out(prepared, out, options, cancel)
}

/// Whether the output directory will do; the report of a run that is complete there, where it may be continued.
///
/// # Errors
/// What it is refused for.
pub(super) fn check_output(
    out: &Path,
    paths: &[PathBuf],
    config_hash: &str,
    options: &MergeOptions,
) -> Result<Option<RunReport>, Error> {
    let complete = if options.resume { resume::finished(out) } else { None };
    match (&complete, options.resume) {
        (Some(report), _) => resume::check_finished(out, report, config_hash, None)?,
        (None, true) => OutputDir::check_unfinished(out, paths)?,
        (None, false) => OutputDir::check(out, paths)?,
    }
    Ok(complete)
}

/// A run as far as it is known before anything is read or written.
pub(super) struct Prepared<'c> {
    /// What is merged, for the record and the model card.
    pub config: &'c MergeConfig,
    /// Of everything that the config says.
    pub config_hash: String,
    /// What is done.
    pub plan: MergePlan,
    /// Opened.
    pub inputs: Inputs,
    /// Paths of the inputs.
    pub paths: Vec<PathBuf>,
    /// When it began.
    pub started: Instant,
}

/// From a plan to a published directory.
///
/// # Errors
/// [`Error`]; nothing stands under a final name then.
pub(super) fn carry_out(
    prepared: Prepared<'_>,
    out: &Path,
    options: &MergeOptions,
    cancel: &AtomicBool,
) -> Result<MergeSummary, Error> {
    let Prepared { config, config_hash, plan, inputs, paths, started } = prepared;
    for warning in &plan.warnings {
        tracing::warn!("{warning}");
    }
    let inputs = Arc::new(inputs);

    let key = resume::key(config_hash.clone(), options, &inputs)?;
    let side = record::side_files(config, &plan, &inputs)?;
    let own = |name: &str| side.iter().any(|file| file.name == name) || plan.layout.owns(name);
    let (mut writer, before) =
        resume::open(out, &paths, &own, options.resume, &plan, key.clone(), Share::of(1))?;
    writer.reserve_side_files(side.iter().map(SideFile::bytes).sum())?;
    writer.keep_solves(resume::run_number(&key), plan.snapshot_bytes());
    if before.len() > 0 {
        tracing::info!("{} of {} tensors are there already", before.len(), plan.blocks.len());
    }
    let progress = Progress::new(
        options.progress,
        (plan.blocks.len() - before.len()) as u64,
        plan.read_bytes() + plan.write_bytes() - before.bytes(&plan),
    );
    let (plans, writers) = (std::slice::from_ref(&plan), std::slice::from_ref(&writer));
    let blocks = stream_and_commit(plans, &inputs, writers, &progress, cancel)
        .inspect_err(|error| {
            if resume::resumable(error) {
                writer.keep_unfinished();
            }
        })?
        .pop()
        .unwrap_or_default();
    progress.finish();
    for file in record::input_files(&inputs) {
        file.check_unchanged()?;
    }
    // From here on only the disk can be at fault, and everything is there.
    writer.keep_unfinished();
    writer.sync()?;

    let mut unconverged: Vec<String> =
        unconverged(&plan, &blocks).into_iter().chain(before.unconverged(&plan)).collect();
    unconverged.sort_unstable();
    let mut report =
        record::report(config, &plan, &inputs, &blocks, options, started, writer.bytes_written());
    report.config_hash = config_hash;
    before.complete(&mut report, &plan, &writer, &key, record::input_files(&inputs))?;
    for warning in &report.warnings[plan.warnings.len()..] {
        tracing::warn!("{warning}");
    }
    // `command` says these, of whatever it has merged or found complete.
    report.warnings.extend(record::result_warnings(&report));
    report.peak_anonymous_bytes = peak_anonymous_bytes();
    let last = SideFile::new(crate::report::REPORT_FILE, report.to_json());
    writer.finish(side, last)?;
    Ok(MergeSummary { name: None, report, unconverged, already: false })
}

/// What made a block fail, if an input changed: what was found in it then says nothing about the file that was opened.
fn changed_input(error: Error, inputs: &Inputs) -> Error {
    if matches!(error, Error::Merge(MergeError::Cancelled | MergeError::Write(_)) | Error::Write(_)) {
        return error;
    }
    record::input_files(inputs).find_map(|file| file.check_unchanged().err()).map_or(error, Error::from)
}

/// Runs the plans, one a writer, while a thread of its own makes finished tensors durable.
///
/// # Errors
/// What made a block fail, or that an input changed.
pub(super) fn stream_and_commit(
    plans: &[MergePlan],
    inputs: &Arc<Inputs>,
    writers: &[CheckpointWriter],
    progress: &Progress,
    cancel: &AtomicBool,
) -> Result<Vec<Vec<BlockReport>>, Error> {
    let committer = Committer::new(writers);
    let finished = |plan: usize, block: &BlockReport| {
        let planned = &plans[plan].blocks[block.block];
        let done = Done {
            parameter: record::parameter(planned, block),
            flops: record::flops(planned, block),
            unconverged: is_unconverged(block),
            differs_in: block.differs_in.clone(),
        };
        writers[plan].record(block.block, to_raw_value(&done).expect("string keys and plain values"));
        for tensor in planned.side_tensors() {
            writers[plan].record(tensor, RawValue::NULL.to_owned());
        }
    };
    let (streamed, committed) = std::thread::scope(|threads| {
        let commits = std::thread::Builder::new().name("commits".to_owned());
        let commits = match commits.spawn_scoped(threads, || committer.run(cancel)) {
            Ok(commits) => commits,
            Err(source) => return (Err(MergeError::Threads { source }), Ok(())),
        };
        let end = committer.stop_at_end();
        let streamed = stream::run(plans, inputs, writers, progress, cancel, drops_cache(inputs), &finished);
        drop(end);
        (streamed, commits.join().unwrap_or(Ok(())))
    });
    let streamed = match (streamed, committed) {
        // A commit that failed stopped the blocks: it is the cause.
        (Ok(_) | Err(MergeError::Cancelled), Err(error)) => Err(error.into()),
        (streamed, _) => streamed.map_err(Error::from),
    };
    streamed.map_err(|error| changed_input(error, inputs))
}

fn is_unconverged(block: &BlockReport) -> bool {
    block.outcomes.last().is_some_and(|outcome| !outcome.stop.converged())
}

/// Inputs that will not fit in the page cache are not kept there: the machine has better use for it.
fn drops_cache(inputs: &Inputs) -> bool {
    let input_bytes: u64 = inputs.checkpoints.iter().map(|c| c.total_bytes()).sum();
    input_bytes > available_memory() / 2
}

/// Parameters whose last solver did not meet its tolerance.
pub(super) fn unconverged(plan: &MergePlan, blocks: &[BlockReport]) -> Vec<String> {
    blocks.iter().filter(|block| is_unconverged(block)).map(|b| plan.blocks[b.block].name.clone()).collect()
}
