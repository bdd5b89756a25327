//! `merge`: config → plan → stream → published directory with its report.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use super::inputs::{input_paths, open_inputs};
use super::record;
use super::resources::{available_memory, limits, metadata_bytes};
use super::sweep::sweep_config;
use crate::cli::{MergeArgs, Nonfinite};
use crate::config::{ConfigError, MergeConfig};
use crate::error::Error;
use crate::merge::{Inputs, MergeError};
use crate::plan::{Limits, MergePlan};
use crate::read::IoMode;
use crate::report::{Progress, ProgressMode, RunReport};
use crate::stream::{self, BlockReport};
use crate::write::{CheckpointWriter, OutputDir, SideFile};

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

    fn interrupted(&self) -> Option<Error> {
        match self.number.load(Ordering::Relaxed) {
            0 => None,
            signal => Some(Error::Interrupted { signal: signal as i32 }),
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
    };
    let signals = Signals::install();
    let config = MergeConfig::load(&args.config)?;
    let merged = match config.sweep {
        Some(_) => sweep_config(&config, &out, &options, &signals.cancel).map(|summary| summary.models),
        None => merge_config(&config, &out, &options, &signals.cancel).map(|summary| vec![summary]),
    };
    let summaries = merged.map_err(|error| match (&error, signals.interrupted()) {
        (Error::Merge(MergeError::Cancelled), Some(interrupted)) => interrupted,
        _ => error,
    })?;
    let mut code = ExitCode::SUCCESS;
    for summary in &summaries {
        let of = summary.name.as_ref().map_or_else(String::new, |name| format!("{name}: "));
        for (name, record) in &summary.report.parameters {
            if let Some(reason @ ("not_finite" | "not_positive_definite")) = record.stop_reason.as_deref() {
                let name = crate::read::escaped(name);
                tracing::warn!(
                    "{of}tensor `{name}`: the solver stopped ({reason}) and kept its last good iterate"
                );
            }
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
    let paths = input_paths(config);
    OutputDir::check(out, &paths)?;
    let mut inputs = open_inputs(config, options.io, options.refuse_nonfinite)?;
    inputs.set_seed(options.seed);
    let metadata = metadata_bytes(&inputs);
    let plan = MergePlan::new(config, &mut inputs, options.limits, metadata)?;
    for warning in &plan.warnings {
        tracing::warn!("{warning}");
    }
    let inputs = Arc::new(inputs);

    let directory = OutputDir::claim(out, &paths)?;
    let writer = CheckpointWriter::create(directory, Arc::new(plan.layout.clone()))?;
    let progress =
        Progress::new(options.progress, plan.blocks.len() as u64, plan.read_bytes() + plan.write_bytes());
    let blocks = stream::run(&plan, &inputs, &writer, &progress, cancel, drops_cache(&inputs))?;
    progress.finish();
    for file in record::input_files(&inputs) {
        file.check_unchanged()?;
    }
    writer.sync()?;

    let unconverged = unconverged(&plan, &blocks);
    let report = record::report(config, &plan, &inputs, &blocks, options, started, writer.bytes_written());
    for warning in &report.warnings[plan.warnings.len()..] {
        tracing::warn!("{warning}");
    }
    let before_index = record::side_files(config, &plan, &inputs)?;
    let last = SideFile::new(crate::report::REPORT_FILE, report.to_json());
    writer.finish(before_index, last)?;
    Ok(MergeSummary { name: None, report, unconverged })
}

/// Inputs that will not fit in the page cache are not kept there: the machine has better use for it.
pub(super) fn drops_cache(inputs: &Inputs) -> bool {
    let input_bytes: u64 = inputs.checkpoints.iter().map(|c| c.total_bytes()).sum();
    input_bytes > available_memory() / 2
}

/// Parameters whose last solver did not meet its tolerance.
pub(super) fn unconverged(plan: &MergePlan, blocks: &[BlockReport]) -> Vec<String> {
    blocks
        .iter()
        .filter(|b| b.outcomes.last().is_some_and(|o| !o.stop.converged()))
        .map(|b| plan.blocks[b.block].name.clone())
        .collect()
}
