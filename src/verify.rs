//! `mats-stream verify DIR`: whether a finished directory still is what `merge_report.json` says, tensor by tensor.
//!
//! `run` calls [`verify`], prints the [`Verification`] and exits with 1 where anything is wrong. Every file is read once,
//! front to back, in pieces of 1 MiB; what cannot be read is a finding like others, so that one broken shard does not hide
//! the rest. Writes nothing. A report that lies about its own checksums is believed: this finds damage, not forgery.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::Error;
use crate::plan::shards::{INDEX_NAME, TensorSpec};
use crate::read::{Checkpoint, InputFile, IoMode, ReadError, TensorMeta, escaped, header_hash, read_header};
use crate::report::units::{Bytes, EscapedPath};
use crate::report::{InputFileRecord, RunReport};
use crate::write::Checksum;

/// The result of [`verify`]; serialised, it is what `--json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct Verification {
    /// The directory, as it was given.
    pub path: String,
    /// Nothing was found.
    pub ok: bool,
    /// Tensors whose bytes have the recorded checksum.
    pub tensors: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Input files that are as they were; absent unless asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inputs: Option<u64>,
    /// What is wrong, in the order of the files.
    pub problems: Vec<Problem>,
}

/// One thing that is not as recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// What kind of thing.
    pub what: Finding,
    /// The tensor's or file's name.
    pub name: String,
    /// What was found and what was expected.
    pub detail: String,
}

/// Kinds of [`Problem`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Finding {
    /// A tensor's bytes, dtype or shape are others.
    ChangedTensor,
    /// A recorded tensor is nowhere, or the index does not lead to it.
    MissingTensor,
    /// A tensor that the record does not know.
    ExtraTensor,
    /// The record has no checksum for a tensor.
    UnknownChecksum,
    /// A shard or the index cannot be opened or is malformed.
    BrokenFile,
    /// A weight file that the record does not know.
    ExtraFile,
    /// An input is not what was merged.
    ChangedInput,
}

impl Finding {
    fn words(self) -> &'static str {
        match self {
            Self::ChangedTensor => "changed tensor",
            Self::MissingTensor => "missing tensor",
            Self::ExtraTensor => "extra tensor",
            Self::UnknownChecksum => "no checksum for tensor",
            Self::BrokenFile => "broken file",
            Self::ExtraFile => "extra file",
            Self::ChangedInput => "changed input",
        }
    }
}

/// Checks the tensors of `directory` against its report, and with `inputs` the size, time and header of every file that
/// was read.
///
/// # Errors
/// [`Error::Report`] where there is no report to check against; [`ReadError::Changed`] for a file that changes meanwhile.
pub fn verify(directory: &Path, inputs: bool, io: IoMode) -> Result<Verification, Error> {
    let report = RunReport::read(directory)?;
    let mut check =
        Check { report: &report, seen: BTreeMap::new(), problems: Vec::new(), tensors: 0, bytes: 0 };
    for output in &report.outputs {
        match shard(directory, &output.name, io) {
            Ok((file, tensors)) => {
                if file.len() != output.bytes {
                    let detail = format!("got {} bytes, expected {}", file.len(), output.bytes);
                    check.find(Finding::BrokenFile, &output.name, detail);
                }
                for tensor in &tensors {
                    check.tensor(&file, &output.name, tensor)?;
                }
                file.check_unchanged()?;
            }
            Err(error) => check.find(Finding::BrokenFile, &output.name, chain(&error)),
        }
    }
    check.side(directory, io)?;
    check.extra_files(directory);
    check.index(directory, io);
    let found = if inputs { Some(check.inputs(directory)) } else { None };
    Ok(Verification {
        path: directory.to_string_lossy().into_owned(),
        ok: check.problems.is_empty(),
        tensors: check.tensors,
        bytes: check.bytes,
        inputs: found,
        problems: check.problems,
    })
}

/// A shard by a name that the report gives: one plain file name, or it is not looked for.
fn shard(directory: &Path, name: &str, io: IoMode) -> Result<(InputFile, Vec<TensorMeta>), ReadError> {
    let plain = !name.contains(['/', '\\', '\0']) && !matches!(name, "" | "." | "..");
    if !plain {
        return Err(ReadError::NoCheckpoint {
            path: directory.to_owned(),
            detail: format!("the report names a shard `{}`, expected a plain file name", escaped(name)),
        });
    }
    let file = InputFile::open(&directory.join(name), io)?;
    let header = read_header(&file, 0)?;
    Ok((file, header.tensors))
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text
}

struct Check<'r> {
    report: &'r RunReport,
    /// Shard of each tensor that is there.
    seen: BTreeMap<String, String>,
    problems: Vec<Problem>,
    tensors: u64,
    bytes: u64,
}

impl Check<'_> {
    fn find(&mut self, what: Finding, name: &str, detail: String) {
        self.problems.push(Problem { what, name: name.to_owned(), detail });
    }

    /// One of the model's tensors.
    fn tensor(&mut self, file: &InputFile, shard: &str, tensor: &TensorMeta) -> Result<(), ReadError> {
        let name = &tensor.name;
        let Some(parameter) = self.report.parameters.get(name) else {
            self.find(Finding::ExtraTensor, name, format!("in {shard}, not in the report"));
            return Ok(());
        };
        if let Some(other) = self.seen.insert(name.clone(), shard.to_owned()) {
            self.find(Finding::ExtraTensor, name, format!("in {shard} and in {other}"));
        }
        self.compare(file, shard, tensor, parameter.checksum.as_deref())
    }

    /// The tensors of the file beside the shards.
    fn side(&mut self, directory: &Path, io: IoMode) -> Result<(), ReadError> {
        let Some(side) = &self.report.side else { return Ok(()) };
        let (file, tensors) = match shard(directory, &side.name, io) {
            Ok(found) => found,
            Err(error) => {
                self.find(Finding::BrokenFile, &side.name, chain(&error));
                return Ok(());
            }
        };
        if file.len() != side.bytes {
            let detail = format!("got {} bytes, expected {}", file.len(), side.bytes);
            self.find(Finding::BrokenFile, &side.name, detail);
        }
        for tensor in &tensors {
            match side.tensors.get(&tensor.name) {
                Some(recorded) => self.compare(&file, &side.name, tensor, Some(recorded))?,
                None => {
                    let detail = format!("in {}, not in the report", side.name);
                    self.find(Finding::ExtraTensor, &tensor.name, detail);
                }
            }
        }
        let found: BTreeSet<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        for name in side.tensors.keys().filter(|name| !found.contains(name.as_str())) {
            self.find(Finding::MissingTensor, name, format!("in the report, not in {}", side.name));
        }
        file.check_unchanged()
    }

    /// Reads one tensor and compares it with its checksum.
    fn compare(
        &mut self,
        file: &InputFile,
        shard: &str,
        tensor: &TensorMeta,
        recorded: Option<&str>,
    ) -> Result<(), ReadError> {
        let name = &tensor.name;
        let Some(expected) = recorded.and_then(Checksum::parse) else {
            let detail = match recorded {
                Some(text) => format!("got `{}`, expected a checksum of this version", escaped(text)),
                None => "the report has none".to_owned(),
            };
            self.find(Finding::UnknownChecksum, name, detail);
            return Ok(());
        };
        let spec = TensorSpec {
            name: name.clone(),
            dtype: tensor.dtype.name().to_owned(),
            shape: tensor.shape.clone(),
            bytes: tensor.bytes,
        };
        let mut scratch = Vec::new();
        let read = Checksum::of_bytes(&spec, |range, take| {
            let at = tensor.offset + range.start..tensor.offset + range.end;
            take(file.bytes(at.clone(), &mut scratch)?);
            file.release(at, false);
            Ok(())
        });
        match read {
            Ok(got) if got == expected => {
                self.tensors += 1;
                self.bytes += tensor.bytes;
            }
            Ok(got) => {
                let detail = format!("in {shard}: got {got}, expected {expected}");
                self.find(Finding::ChangedTensor, name, detail);
            }
            Err(error @ ReadError::Changed { .. }) => return Err(error),
            Err(error) => self.find(Finding::BrokenFile, shard, chain(&error)),
        }
        Ok(())
    }

    /// Weight files beside those of the record: a loader may prefer them.
    fn extra_files(&mut self, directory: &Path) {
        let outputs = self.report.outputs.iter().map(|o| o.name.as_str());
        let known: BTreeSet<&str> = outputs.chain(self.report.side.iter().map(|s| s.name.as_str())).collect();
        let Ok(entries) = std::fs::read_dir(directory) else { return };
        let mut extra: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| {
                let weights = name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json");
                let index = name == INDEX_NAME && self.report.outputs.len() > 1;
                weights && !index && !known.contains(name.as_str())
            })
            .collect();
        extra.sort_unstable();
        for name in extra {
            self.find(Finding::ExtraFile, &name, "not in the report".to_owned());
        }
    }

    /// What a loader finds: by the index, where there is one.
    fn index(&mut self, directory: &Path, io: IoMode) {
        let reachable = if self.report.outputs.len() > 1 {
            match Checkpoint::open(directory, io) {
                Ok(checkpoint) => Some(checkpoint),
                Err(error) => {
                    // A shard that is broken has been told already.
                    if !self.problems.iter().any(|p| p.what == Finding::BrokenFile) {
                        self.find(Finding::BrokenFile, INDEX_NAME, chain(&error));
                    }
                    None
                }
            }
        } else {
            None
        };
        let missing: Vec<(String, String)> = self
            .report
            .parameters
            .keys()
            .filter_map(|name| {
                let detail = match (self.seen.get(name), &reachable) {
                    (None, _) => "in the report, in no shard".to_owned(),
                    (Some(shard), Some(found)) if found.get(name).is_none() => {
                        format!("in {shard}, but the index does not say so")
                    }
                    _ => return None,
                };
                Some((name.clone(), detail))
            })
            .collect();
        for (name, detail) in missing {
            self.find(Finding::MissingTensor, &name, detail);
        }
    }

    /// Gives the number of input files that are as they were.
    fn inputs(&mut self, directory: &Path) -> u64 {
        let mut same = 0;
        let report = self.report;
        for input in &report.inputs {
            for file in &input.files {
                let name = format!("{}: {}", input.path, file.name);
                match input_file(directory, file) {
                    Ok(None) => same += 1,
                    Ok(Some(detail)) => self.find(Finding::ChangedInput, &name, detail),
                    Err(error) => self.find(Finding::ChangedInput, &name, chain(&error)),
                }
            }
        }
        same
    }
}

/// In words how an input differs from its record; `None` if it does not.
fn input_file(directory: &Path, record: &InputFileRecord) -> Result<Option<String>, ReadError> {
    let Some(location) = &record.location else {
        return Ok(Some("the report does not say where it was".to_owned()));
    };
    let file = InputFile::open(&directory.join(PathBuf::from(location)), IoMode::Pread)?;
    let state = file.fingerprint();
    if state.len != record.bytes {
        return Ok(Some(format!("got {} bytes, expected {}", state.len, record.bytes)));
    }
    if let Some(expected) = &record.header_hash
        && &header_hash(&file)? != expected
    {
        return Ok(Some("its header is another one".to_owned()));
    }
    if state.mtime_ns != record.mtime_ns {
        return Ok(Some("it was modified since it was merged, at the same length".to_owned()));
    }
    Ok(None)
}

impl Verification {
    /// One line a finding, and one that sums up.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_table(&self, out: &mut dyn Write) -> io::Result<()> {
        for problem in &self.problems {
            writeln!(out, "{} `{}`: {}", problem.what.words(), escaped(&problem.name), problem.detail)?;
        }
        let path = EscapedPath(Path::new(&self.path)).to_string();
        let inputs = self.inputs.map_or_else(String::new, |n| format!(", {n} input files"));
        let verified = format!("{} tensors ({}){inputs} are as recorded", self.tensors, Bytes(self.bytes));
        match self.problems.len() {
            0 => writeln!(out, "{path}: complete: {verified}"),
            n => writeln!(out, "{path}: {n} findings; {verified}"),
        }
    }
}
