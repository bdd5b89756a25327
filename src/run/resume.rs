//! Going on where a run ended: what identifies a run, what it writes into its journal, what another takes over.
//!
//! `merge` opens its output through [`open`], tells [`Committer`] of every finished block, and fills what was done before
//! into its report by [`Before::complete`]. The journal's format and the bytes on disk are `write`'s.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::merge::MergeOptions;
use super::record;
use crate::error::Error;
use crate::merge::Inputs;
use crate::plan::{BlockPlan, MergePlan};
use crate::read::{InputFile, ReadError, header_hash};
use crate::report::{ParameterReport, REPORT_FILE, RunReport, SWEEP_FILE, SideRecord, SweepReport};
use crate::tokenizer::is_tokenizer_file;
use crate::write::fault;
use crate::write::journal::{self, Journal, KeyInput, Record, RunKey};
use crate::write::{CheckpointWriter, OutputDir, Share, WriteError};

/// Between two commits at least.
const LEAST_INTERVAL: Duration = Duration::from_millis(250);
/// And so many times as long as the last one took: waiting for the disk stays a twentieth of the time.
const INTERVAL_FACTOR: u32 = 20;

/// What another run wants to know of a finished tensor.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Done {
    pub parameter: ParameterReport,
    pub flops: f64,
    /// Its last solver did not meet its tolerance.
    pub unconverged: bool,
    /// As in [`crate::stream::BlockReport`].
    pub differs_in: Option<String>,
}

/// Everything that decides the bytes of the output.
pub(super) fn key(config_hash: String, options: &MergeOptions, inputs: &Inputs) -> Result<RunKey, ReadError> {
    let files = record::input_files(inputs).map(|file| {
        let state = file.fingerprint();
        Ok(KeyInput {
            path: file.path().display().to_string(),
            state: format!("{} {} {} {}", state.len, state.mtime_ns, state.ctime_ns, header_hash(file)?),
        })
    });
    let mut files = files.collect::<Result<Vec<_>, ReadError>>()?;
    for directory in inputs.checkpoints.iter().filter_map(|checkpoint| checkpoint.directory()) {
        files.extend(small_files(directory));
    }
    Ok(RunKey {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        cpu: cpu(),
        config: config_hash,
        flags: format!(
            "--seed {} --out-shard-size {} --nonfinite {}{}",
            options.seed,
            options.limits.shard_bytes,
            if options.refuse_nonfinite { "error" } else { "propagate" },
            if options.limits.untie { " --untie" } else { "" },
        ),
        inputs: files,
    })
}

/// Configs and tokenizers beside a model: they say what vocabularies and layers there are.
fn small_files(directory: &Path) -> Vec<KeyInput> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let mut files: Vec<KeyInput> = entries
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let name = path.file_name()?.to_str()?;
            if name != "config.json" && !is_tokenizer_file(name) {
                return None;
            }
            let metadata = std::fs::metadata(&path).ok()?;
            let modified = metadata.modified().ok()?.duration_since(std::time::UNIX_EPOCH).ok()?;
            let state = format!("{} {}", metadata.len(), modified.as_nanos());
            Some(KeyInput { path: path.display().to_string(), state })
        })
        .collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    files
}

/// Names a run: states of solves carry it.
pub(super) fn run_number(key: &RunKey) -> u128 {
    let text = serde_json::to_vec(key).expect("strings always serialise");
    twox_hash::XxHash3_128::oneshot(&text)
}

/// One line for the report, by which a finished directory is known again.
pub(super) fn run_hash(key: &RunKey) -> String {
    format!("{:032x}", run_number(key))
}

/// Vector instructions that the matrix kernels choose between.
fn cpu() -> String {
    let mut name = std::env::consts::ARCH.to_owned();
    #[cfg(target_arch = "x86_64")]
    for (feature, there) in [
        ("avx2", std::arch::is_x86_feature_detected!("avx2")),
        ("fma", std::arch::is_x86_feature_detected!("fma")),
        ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
    ] {
        if there {
            name += "+";
            name += feature;
        }
    }
    name
}

/// The report of a directory that is complete already, if it is.
pub(super) fn finished(out: &Path) -> Option<RunReport> {
    if out.join(REPORT_FILE).is_file() { RunReport::read(out).ok() } else { None }
}

/// Whether the run that finished in `out` is the one that is asked for.
///
/// # Errors
/// [`WriteError::OtherRun`] if not.
pub(super) fn check_finished(
    out: &Path,
    report: &RunReport,
    config_hash: &str,
    key: Option<&RunKey>,
) -> Result<(), Error> {
    same_run(out, (&report.config_hash, report.run_hash.as_deref()), config_hash, key)?;
    let there =
        |name: &str, bytes: u64| std::fs::metadata(out.join(name)).is_ok_and(|found| found.len() == bytes);
    match report.outputs.iter().find(|file| !there(&file.name, file.bytes)) {
        None => Ok(()),
        Some(file) => {
            let name = crate::read::escaped(&file.name);
            let what = format!("no `{name}` of {} bytes any more (and was complete)", file.bytes);
            Err(WriteError::OtherRun { path: out.to_owned(), what }.into())
        }
    }
}

fn same_run(
    out: &Path,
    before: (&str, Option<&str>),
    config_hash: &str,
    key: Option<&RunKey>,
) -> Result<(), Error> {
    let what = if before.0 != config_hash {
        "another config (and is complete)"
    } else if key.is_some_and(|key| before.1 != Some(&run_hash(key))) {
        "other inputs, flags or another version (and is complete)"
    } else {
        return Ok(());
    };
    Err(WriteError::OtherRun { path: out.to_owned(), what: what.to_owned() }.into())
}

/// As [`finished`], of a sweep.
pub(super) fn finished_sweep(out: &Path) -> Option<SweepReport> {
    if out.join(SWEEP_FILE).is_file() { SweepReport::read(out).ok() } else { None }
}

/// As [`check_finished`], of a sweep.
///
/// # Errors
/// [`WriteError::OtherRun`] if it is another one.
pub(super) fn check_finished_sweep(
    out: &Path,
    report: &SweepReport,
    config_hash: &str,
    key: Option<&RunKey>,
) -> Result<(), Error> {
    same_run(out, (&report.config_hash, report.run_hash.as_deref()), config_hash, key)
}

/// What a run before this one has done.
#[derive(Debug, Default)]
pub(super) struct Before {
    tensors: Vec<(usize, Done)>,
}

/// Opens the output: new, or with what another run of the same key left. `own` tells the final names of the output's
/// files.
///
/// # Errors
/// [`WriteError`].
pub(super) fn open(
    out: &Path,
    inputs: &[PathBuf],
    own: &dyn Fn(&str) -> bool,
    resume: bool,
    plan: &MergePlan,
    key: RunKey,
    share: Share,
) -> Result<(CheckpointWriter, Before), Error> {
    let directory = match resume {
        true => OutputDir::claim_unfinished(out, inputs, own)?,
        false => OutputDir::claim(out, inputs)?,
    };
    let mut replay = None;
    if directory.unfinished() {
        let found = journal::read(directory.path())?;
        let what = found.key.as_ref().and_then(|before| key.difference(before));
        if let Some(what) = what {
            return Err(WriteError::OtherRun { path: out.to_owned(), what }.into());
        }
        if found.damaged {
            let kept = found.records.len();
            tracing::warn!("the journal is damaged: going on from its last valid record ({kept} tensors)");
        }
        replay = Some(found);
    }
    let path = directory.path().to_owned();
    let mut writer = CheckpointWriter::with_share(directory, Arc::new(plan.layout.clone()), share)?;
    let mut before = Before::default();
    match replay {
        Some(mut found) if found.key.is_some() => {
            let records = std::mem::take(&mut found.records);
            let side = |record: &Record| record.tensor >= plan.blocks.len();
            let readable =
                records.into_iter().filter(|record| side(record) || done(record).is_some()).collect();
            let held = writer.take_over(readable)?;
            // A tensor whose masks are not there is merged again.
            let whole = |record: &&Record| {
                let block = plan.blocks.get(record.tensor);
                block.is_some_and(|block| block.side_tensors().all(|tensor| writer.resumed(tensor)))
            };
            let tensors = held.iter().filter(whole).filter_map(|record| Some((record.tensor, done(record)?)));
            before.tensors.extend(tensors);
            let journal = Journal::reopen(&path, &found)?;
            writer.start_journal(key, Some(journal))?;
        }
        found => {
            if found.is_some() {
                journal::discard(&path)?;
            }
            writer.start_journal(key, None)?;
        }
    }
    Ok((writer, before))
}

fn done(record: &Record) -> Option<Done> {
    serde_json::from_str(record.done.get()).ok()
}

impl Before {
    /// Tensors that need not be merged again.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Bytes that need not be read or written again, as the plan counts them.
    pub fn bytes(&self, plan: &MergePlan) -> u64 {
        let of_block = |block: &BlockPlan| block.read_bytes + block.output_bytes();
        self.tensors.iter().map(|(k, _)| of_block(&plan.blocks[*k])).sum()
    }

    /// Those whose solver did not converge.
    pub fn unconverged<'a>(&'a self, plan: &'a MergePlan) -> impl Iterator<Item = String> + 'a {
        self.tensors.iter().filter(|(_, done)| done.unconverged).map(|(k, _)| plan.blocks[*k].name.clone())
    }

    /// Enters what was done before this run, and what only the writer and the directory know.
    ///
    /// # Errors
    /// Of reading back what was written twice.
    pub fn complete<'f>(
        self,
        report: &mut RunReport,
        plan: &MergePlan,
        writer: &CheckpointWriter,
        key: &RunKey,
        files: impl Iterator<Item = &'f InputFile>,
    ) -> Result<(), Error> {
        report.run_hash = Some(run_hash(key));
        let resumed = self.len();
        for (k, done) in self.tensors {
            report.bytes_read += done.parameter.bytes_read;
            report.flops += done.flops;
            report.bytes_written += plan.blocks[k].output_bytes();
            let name = &plan.blocks[k].name;
            report.warnings.extend(done.differs_in.map(|model| record::differs(name, &model)));
            report.parameters.insert(name.clone(), done.parameter);
        }
        report.resumed_tensors = (resumed > 0).then_some(resumed as u64);
        for (k, block) in plan.blocks.iter().enumerate() {
            if let Some(parameter) = report.parameters.get_mut(&block.name) {
                parameter.checksum = Some(writer.checksum(k)?.to_string());
            }
        }
        if let Some((file, first)) = plan.layout.side() {
            let mut tensors = std::collections::BTreeMap::new();
            for (k, spec) in plan.layout.specs().iter().enumerate().skip(first) {
                tensors.insert(spec.name.clone(), writer.checksum(k)?.to_string());
            }
            report.side = Some(SideRecord { name: file.file_name.clone(), bytes: file.file_bytes, tensors });
        }
        let records = report.inputs.iter_mut().flat_map(|input| &mut input.files);
        for (record, file) in records.zip(files) {
            record.header_hash = Some(header_hash(file)?);
            record.location = location(file.path(), writer.path());
        }
        Ok(())
    }
}

/// The way from the directory `from` to a file, by `..` where need be.
fn location(file: &Path, from: &Path) -> Option<String> {
    let parent = match file.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return None,
    };
    let to = parent.canonicalize().ok()?.join(file.file_name()?);
    let shared = to.components().zip(from.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(shared).map(|_| "..".as_ref());
    let path: PathBuf = up.chain(to.components().skip(shared).map(|c| c.as_os_str())).collect();
    Some(path.to_string_lossy().into_owned())
}

/// Makes finished tensors durable every now and then, on a thread of its own, while others are being merged.
pub(super) struct Committer<'w> {
    writers: &'w [CheckpointWriter],
    stopped: Mutex<bool>,
    wake: Condvar,
}

impl<'w> Committer<'w> {
    pub fn new(writers: &'w [CheckpointWriter]) -> Self {
        Self { writers, stopped: Mutex::new(false), wake: Condvar::new() }
    }

    /// Commits until it is stopped, and once more then.
    ///
    /// # Errors
    /// The first commit that fails; `cancel` is raised with it.
    pub fn run(&self, cancel: &AtomicBool) -> Result<(), WriteError> {
        // Tests commit all the time.
        let (least, factor) = match fault::named("commit.often") {
            true => (Duration::from_millis(1), 1),
            false => (LEAST_INTERVAL, INTERVAL_FACTOR),
        };
        let mut interval = least;
        loop {
            let stopped = {
                let stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
                let waited = self.wake.wait_timeout_while(stopped, interval, |stopped| !*stopped);
                *waited.unwrap_or_else(PoisonError::into_inner).0
            };
            let started = Instant::now();
            for writer in self.writers {
                writer.commit().inspect_err(|_| cancel.store(true, Ordering::Relaxed))?;
            }
            if stopped {
                return Ok(());
            }
            interval = least.max(started.elapsed() * factor);
        }
    }

    /// Stops it when dropped: a panic elsewhere must not leave it waiting.
    pub fn stop_at_end(&self) -> impl Drop + '_ {
        struct Stop<'c, 'w>(&'c Committer<'w>);
        impl Drop for Stop<'_, '_> {
            fn drop(&mut self) {
                self.0.stop();
            }
        }
        Stop(self)
    }

    /// Nothing more will be finished.
    fn stop(&self) {
        *self.stopped.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.wake.notify_all();
    }
}

/// Whether a run that ended so can be continued: nothing that was read is at fault.
pub(super) fn resumable(error: &Error) -> bool {
    use crate::merge::MergeError;
    matches!(error, Error::Merge(MergeError::Cancelled | MergeError::OutOfMemory { .. }))
        || matches!(error.exit_code(), 5 | 6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_lead_from_the_output_to_the_input() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("models/a")).unwrap();
        let file = root.join("models/a/x.safetensors");
        assert_eq!(location(&file, &root.join("out/deep")).unwrap(), "../../models/a/x.safetensors");
        assert_eq!(location(&file, &root).unwrap(), "models/a/x.safetensors");
        assert_eq!(location(&root.join("absent/x"), &root), None);
    }
}
