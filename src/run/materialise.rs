//! `materialise`: one task's model of a finished merge that kept masks, written as any merge is.
//!
//! The merge's directory gives the merged model, the masks and the config; the base is where its report says it was, or
//! where the user says it is now. From there on it is an ordinary run: planned, streamed, resumed and published alike.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use super::merge::{MergeOptions, MergeSummary, Prepared, Signals, carry_out, check_output};
use super::record;
use super::resources::{limits, metadata_bytes};
use crate::cli::{MaterialiseArgs, Nonfinite, ResourceArgs};
use crate::config::MergeConfig;
use crate::error::Error;
use crate::masks::MasksFile;
use crate::merge::{Inputs, MergeError, ModelInput, OutputFiles};
use crate::plan::{MergePlan, TaskSources};
use crate::read::{Checkpoint, IoMode, escaped, header_hash};
use crate::report::{InputRecord, ProgressMode, RunReport, Sampling};
use crate::view::{Adapter, Model, View};
use crate::write::OutputDir;

pub(super) fn command(args: MaterialiseArgs) -> Result<ExitCode, Error> {
    let resources = ResourceArgs {
        max_memory: args.max_memory,
        threads: args.threads,
        out_shard_size: args.out_shard_size,
        io: args.io,
        untie: false,
    };
    let options = MergeOptions {
        limits: limits(&resources)?,
        io: super::io_mode(args.io),
        refuse_nonfinite: args.nonfinite == Nonfinite::Error,
        seed: 0,
        progress: match args.progress {
            crate::cli::ProgressMode::Auto => ProgressMode::Auto,
            crate::cli::ProgressMode::Plain => ProgressMode::Plain,
            crate::cli::ProgressMode::None => ProgressMode::None,
        },
        resume: args.resume,
    };
    let signals = Signals::install();
    let made =
        materialise(&args.directory, &args.task, args.base.as_deref(), &args.out, &options, &signals.cancel);
    let summary = made.map_err(|error| match (&error, signals.interrupted(Some(&args.out))) {
        (Error::Merge(MergeError::Cancelled), Some(interrupted)) => interrupted,
        _ => error,
    })?;
    if summary.already {
        tracing::info!("this model is complete; nothing to do");
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes the model of `task` (number or name), of the merge that finished in `directory`, into the new directory `out`.
/// `base` (`PATH` or `PATH+ADAPTER`) is where the merge's base is now, if it is no longer where it was.
///
/// # Errors
/// [`Error`]; nothing stands under a final name then.
pub fn materialise(
    directory: &Path,
    task: &str,
    base: Option<&str>,
    out: &Path,
    options: &MergeOptions,
    cancel: &AtomicBool,
) -> Result<MergeSummary, Error> {
    let started = Instant::now();
    let _sampling = Sampling::start();
    // A directory that has it is complete.
    let report = RunReport::read(directory)?;
    let masks = MasksFile::open(directory, IoMode::for_path(directory))?;
    let task = masks.task(task)?;
    let record = report.inputs.iter().find(|input| input.path == masks.base);
    let base = Base::find(directory, base, &masks, record)?;

    let mut config = MergeConfig::load(&directory.join("merge_config.yml"))?;
    // Of this version: what the directory was made with does not matter, its files are in the key.
    let config_hash = format!("{}-task{task}", record::config_hash(&config));
    let shown = escaped(&masks.tasks[task]);
    config.text = format!(
        "# Task {task} (`{shown}`) of the merge below, by `mats-stream materialise`.\n{}",
        config.text
    );
    let paths: Vec<PathBuf> =
        [directory.to_owned(), base.path.clone()].into_iter().chain(base.adapter.clone()).collect();
    if let Some(report) = check_output(out, &paths, &config_hash, options)? {
        OutputDir::tidy(out);
        return Ok(MergeSummary::already(None, report));
    }

    let (inputs, sources) = open(directory, masks, task, &base, record, options)?;
    let plan = MergePlan::of_task(&config, &inputs, sources, options.limits, metadata_bytes(&inputs))?;
    let prepared = Prepared { config: &config, config_hash, plan, inputs, paths, started };
    carry_out(prepared, out, options, cancel)
}

/// Where the base is.
struct Base {
    path: PathBuf,
    adapter: Option<PathBuf>,
}

impl Base {
    fn find(
        directory: &Path,
        given: Option<&str>,
        masks: &MasksFile,
        record: Option<&InputRecord>,
    ) -> Result<Self, Error> {
        if let Some(given) = given {
            let mut parts = given.split('+');
            let (path, adapter, more) = (parts.next().unwrap_or_default(), parts.next(), parts.next());
            if path.is_empty() || adapter.is_some_and(str::is_empty) || more.is_some() {
                let what = format!("got `{}`, expected PATH or PATH+ADAPTER", escaped(given));
                return Err(Error::Flag { flag: "--base", what });
            }
            return Ok(Self { path: path.into(), adapter: adapter.map(PathBuf::from) });
        }
        let lost = || Error::Flag {
            flag: "--base",
            what: format!(
                "the merge's base `{}` is not where {} says it was; say where it is now",
                escaped(&masks.base),
                directory.join(crate::report::REPORT_FILE).display()
            ),
        };
        let adapted = masks.base.contains('+');
        let written = masks.base.split('+').next().unwrap_or_default();
        let (mut path, mut adapter) = (None, None);
        for file in record.map_or(&[][..], |record| &record.files) {
            let found = directory.join(file.location.as_ref().ok_or_else(lost)?);
            if !found.exists() {
                return Err(lost());
            }
            let parent = found.parent().map(Path::to_owned);
            // An adapter's file comes last, and there is one.
            if adapted && path.is_some() && file.name == "adapter_model.safetensors" {
                adapter = parent;
            } else if written.ends_with(".safetensors") || written.ends_with(".index.json") {
                path.get_or_insert(found);
            } else if path.is_none() {
                path = parent;
            }
        }
        match path {
            Some(path) if adapted == adapter.is_some() => Ok(Self { path, adapter }),
            _ => Err(lost()),
        }
    }

    /// Opens it; `record` says what it was.
    fn open(&self, record: Option<&InputRecord>, options: &MergeOptions) -> Result<View, Error> {
        let io =
            |path: &Path| if IoMode::for_path(path) == IoMode::Pread { IoMode::Pread } else { options.io };
        let checkpoint = Arc::new(Checkpoint::open(&self.path, io(&self.path))?);
        let adapter = match &self.adapter {
            Some(path) => Some(Arc::new(Adapter::open(path, &checkpoint, io(path))?)),
            None => None,
        };
        let view = View::whole(Arc::new(Model::new(checkpoint, adapter)));
        let expected = record.map_or(&[][..], |record| &record.files);
        let mut same = view.files().count() == expected.len();
        for (file, expected) in view.files().zip(expected) {
            same &= file.len() == expected.bytes;
            if let Some(hash) = &expected.header_hash {
                same &= header_hash(file)? == *hash;
            }
        }
        if same {
            return Ok(view);
        }
        let what = format!(
            "{} is not the base of the merge (got files of other lengths or headers than its report has)",
            self.path.display()
        );
        Err(Error::Flag { flag: "--base", what })
    }
}

/// The merged model, the base, and the task's mask times its rescaler.
fn open(
    directory: &Path,
    masks: MasksFile,
    task: usize,
    base: &Base,
    record: Option<&InputRecord>,
    options: &MergeOptions,
) -> Result<(Inputs, TaskSources), Error> {
    let written = directory.display().to_string();
    let merged = Arc::new(Checkpoint::open(directory, options.io)?);
    let mut found = Vec::new();
    for tensor in merged.tensors().iter().filter(|tensor| tensor.dtype.is_float()) {
        if let Some(mask) = masks.mask(&tensor.name, tensor.elements())? {
            found.push((tensor.name.clone(), tensor.shape.clone(), mask.clone()));
        }
    }
    let parameters: Vec<(&str, u64)> = found
        .iter()
        .map(|(name, shape, _)| (name.as_str(), shape.iter().map(|side| *side as u64).product()))
        .collect();
    let factor = masks.rescale(task, &parameters)?;
    let name = masks.tasks[task].clone();
    let names = vec![written.clone(), masks.base.clone(), format!("{written} (masks of {name})")];
    let base = base.open(record, options)?;
    let mask = Model::of_masks(Arc::new(masks.into_checkpoint()), task, factor, found);
    let views = [View::whole(Arc::new(Model::new(merged, None))), base, View::whole(Arc::new(mask))];
    let sources = TaskSources { merged: 0, base: 1, mask: 2 };
    let inputs = Inputs {
        checkpoints: views.into_iter().map(Arc::new).collect(),
        names,
        models: vec![ModelInput { source: sources.merged, written, statistics: None }],
        // The merged model gives names, config and tokenizer.
        base: None,
        initials: HashMap::new(),
        factors: None,
        tied: HashMap::new(),
        refuse_nonfinite: options.refuse_nonfinite,
        sections: Vec::new(),
        files: OutputFiles::default(),
        seed: 0,
    };
    Ok((inputs, sources))
}
