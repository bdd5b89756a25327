//! `merge_report.json`: the run's record as types, written last and read back by `verify` and `report`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};
use thiserror::Error;

use super::units::{Bytes, EscapedPath};

/// The record's name in the output directory; a directory that has it is complete.
pub const FILE_NAME: &str = "merge_report.json";

/// A record larger than this is not read: a million parameters take about half of it.
const MAX_BYTES: u64 = 1 << 30;

/// Everything a run says about itself. Numbers that are not finite become `null`; what makes no sense is
/// absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunReport {
    /// The tool's version.
    pub version: String,
    /// Hash of the canonical config.
    pub config_hash: String,
    /// Hash of everything that decides the output's bytes: config, inputs, flags, version, processor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_hash: Option<String>,
    /// Tensors that were on disk from a run before, which this one continued.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed_tensors: Option<u64>,
    /// The whole run, in seconds.
    #[serde(deserialize_with = "null_is_nan")]
    pub wall_seconds: f64,
    /// Largest resident set, in bytes: mapped input pages included, so it may pass `--max-memory`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_rss_bytes: Option<u64>,
    /// Largest anonymous and shared memory seen, in bytes: what `--max-memory` bounds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_anonymous_bytes: Option<u64>,
    /// Bytes read from the inputs, re-reads counted again.
    pub bytes_read: u64,
    /// Bytes written to the output's shards.
    pub bytes_written: u64,
    /// Floating-point operations, as planned and counted, not measured.
    #[serde(deserialize_with = "null_is_nan")]
    pub flops: f64,
    /// How the run was set up.
    #[serde(default)]
    pub settings: RunSettings,
    /// Every file that was read, by input.
    #[serde(default)]
    pub inputs: Vec<InputRecord>,
    /// The shards written.
    #[serde(default)]
    pub outputs: Vec<OutputFileRecord>,
    /// The file of tensors beside the shards, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub side: Option<SideRecord>,
    /// One line each, as printed on stderr.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// What was copied or left out instead of merged, and why.
    #[serde(default)]
    pub unmerged: Vec<UnmergedRecord>,
    /// By parameter name.
    #[serde(default)]
    pub parameters: BTreeMap<String, ParameterReport>,
}

/// The flags that shaped the run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunSettings {
    /// Worker threads.
    pub threads: usize,
    /// The bound on anonymous and shared memory, in bytes.
    pub max_memory: u64,
    /// `mmap` or `pread`.
    pub io: String,
    /// Seed of the methods that draw random numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

/// One input: a model, a statistics file or an adapter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputRecord {
    /// The path as the config writes it.
    pub path: String,
    /// Its files, with what tells whether they are still the same.
    pub files: Vec<InputFileRecord>,
}

/// An input file's fingerprint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputFileRecord {
    /// File name within the input.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Last modification, nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Hash of the file's header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header_hash: Option<String>,
    /// The way to it from the output directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub location: Option<String>,
}

/// An output shard.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputFileRecord {
    /// File name in the output directory.
    pub name: String,
    /// Its length.
    pub bytes: u64,
}

/// A file of tensors that are not the model's (`masks.safetensors`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SideRecord {
    /// File name in the output directory.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Checksum of each tensor's bytes as written, by name.
    pub tensors: BTreeMap<String, String>,
}

/// A tensor that was not merged.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnmergedRecord {
    /// The tensor.
    pub name: String,
    /// What was done with it and why, in one line.
    pub reason: String,
}

/// One parameter of the output.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ParameterReport {
    /// What made it: the config's `merge_method`, or `average`, `base`, `copy`.
    pub method: String,
    /// What its first system starts from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<String>,
    /// The solver of its last system: `cg`, `pcg`, `direct`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub solver: Option<String>,
    /// The kind of Cᵢ, where there was a system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subspace: Option<String>,
    /// Iterations done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iterations: Option<u64>,
    /// Why the solver stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<String>,
    /// ‖b − Aθ‖/‖b‖ at the initial guess.
    #[serde(default, deserialize_with = "null_is_some_nan", skip_serializing_if = "Option::is_none")]
    pub initial_relative_residual: Option<f64>,
    /// ‖b − Aθ‖/‖b‖ at the result.
    #[serde(default, deserialize_with = "null_is_some_nan", skip_serializing_if = "Option::is_none")]
    pub final_relative_residual: Option<f64>,
    /// The quadratic objective at the initial guess.
    #[serde(default, deserialize_with = "null_is_some_nan", skip_serializing_if = "Option::is_none")]
    pub objective_initial: Option<f64>,
    /// The quadratic objective at the result.
    #[serde(default, deserialize_with = "null_is_some_nan", skip_serializing_if = "Option::is_none")]
    pub objective_final: Option<f64>,
    /// Whether the solver met its tolerance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub converged: Option<bool>,
    /// The ridge ρ in force.
    #[serde(default, deserialize_with = "null_is_some_nan", skip_serializing_if = "Option::is_none")]
    pub ridge: Option<f64>,
    /// The ridge asked for, where it had to be raised because the system was not positive definite with it.
    #[serde(default, deserialize_with = "null_is_some_nan", skip_serializing_if = "Option::is_none")]
    pub ridge_raised_from: Option<f64>,
    /// True where rounding had left stored Grams with negative eigenvalues that made the system indefinite: then each of
    /// its factors has on its diagonal what its least eigenvalue lacked of zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub factors_lifted: Option<bool>,
    /// The preconditioner, where there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preconditioner: Option<String>,
    /// What making it took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub setup: Option<SetupReport>,
    /// Seconds in the iterations or the factorised solve, setup and reading aside.
    #[serde(default, deserialize_with = "null_is_some_nan", skip_serializing_if = "Option::is_none")]
    pub solve_seconds: Option<f64>,
    /// Convergence, one entry a step, the first before any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<StepReport>,
    /// Time spent on it, in seconds.
    #[serde(deserialize_with = "null_is_nan")]
    pub seconds: f64,
    /// Bytes read for it.
    pub bytes_read: u64,
    /// Times that its inputs were read, where more than once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passes: Option<u64>,
    /// True where values of the result are NaN or infinite.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nonfinite: Option<bool>,
    /// Checksum of its bytes as written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum: Option<String>,
    /// Whatever else a reader should know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// The rounds before the last, where `initial` was a config of its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rounds: Vec<RoundReport>,
}

/// What a preconditioner or a factorisation took before the first step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SetupReport {
    /// Wall time, reading included.
    #[serde(deserialize_with = "null_is_nan")]
    pub seconds: f64,
    /// Floating-point operations, as counted.
    #[serde(deserialize_with = "null_is_nan")]
    pub flops: f64,
    /// Bytes it holds while the solve runs.
    pub bytes: u64,
}

/// One step of an iterative solve.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepReport {
    /// Of the recurrence, relative to `‖b‖`.
    #[serde(deserialize_with = "null_is_nan")]
    pub relative_residual: f64,
    /// Objective after the step, ridge term included.
    #[serde(deserialize_with = "null_is_nan")]
    pub objective: f64,
}

/// A round that only prepared the next one's initial guess.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RoundReport {
    /// The solver of this round.
    pub method: String,
    /// As in [`ParameterReport::subspace`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subspace: Option<String>,
    /// As in [`ParameterReport::iterations`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iterations: Option<u64>,
    /// As in [`ParameterReport::stop_reason`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<String>,
    /// As in [`ParameterReport::initial_relative_residual`].
    #[serde(default, deserialize_with = "null_is_some_nan", skip_serializing_if = "Option::is_none")]
    pub initial_relative_residual: Option<f64>,
    /// As in [`ParameterReport::final_relative_residual`].
    #[serde(default, deserialize_with = "null_is_some_nan", skip_serializing_if = "Option::is_none")]
    pub final_relative_residual: Option<f64>,
    /// As in [`ParameterReport::objective_initial`].
    #[serde(default, deserialize_with = "null_is_some_nan", skip_serializing_if = "Option::is_none")]
    pub objective_initial: Option<f64>,
    /// As in [`ParameterReport::objective_final`].
    #[serde(default, deserialize_with = "null_is_some_nan", skip_serializing_if = "Option::is_none")]
    pub objective_final: Option<f64>,
    /// As in [`ParameterReport::converged`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub converged: Option<bool>,
    /// As in [`ParameterReport::ridge`].
    #[serde(default, deserialize_with = "null_is_some_nan", skip_serializing_if = "Option::is_none")]
    pub ridge: Option<f64>,
    /// As in [`ParameterReport::ridge_raised_from`].
    #[serde(default, deserialize_with = "null_is_some_nan", skip_serializing_if = "Option::is_none")]
    pub ridge_raised_from: Option<f64>,
}

/// A number that was written as `null`, since JSON has no NaN.
fn null_is_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// The same where the number may be absent, which is something else: `default` makes that `None`.
fn null_is_some_nan<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
    null_is_nan(deserializer).map(Some)
}

/// Why a run's record cannot be read back.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReportError {
    /// The file is missing or cannot be read.
    #[error(
        "{}: cannot read the run's record (expected the output directory of a finished merge)",
        EscapedPath(path)
    )]
    Io {
        /// The record.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },

    /// Far larger than any record we write.
    #[error("{}: {} is too long for a run's record (expected at most {})",
        EscapedPath(path), Bytes(*bytes), Bytes(MAX_BYTES))]
    TooLarge {
        /// The record.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },

    /// Not a regular file.
    #[error("{}: not a regular file (expected a run's record)", EscapedPath(path))]
    NotRegular {
        /// The path.
        path: PathBuf,
    },

    /// Not JSON, or not this record.
    #[error("{}: not a run's record, or not all of it (expected what `merge` writes)", EscapedPath(path))]
    Malformed {
        /// The record.
        path: PathBuf,
        /// Where it stops being one.
        source: serde_json::Error,
    },

    /// Not JSON, or without a list of runs.
    #[error("{}: not a sweep's record, or not all of it (expected a list `runs`)", EscapedPath(path))]
    MalformedSweep {
        /// The record.
        path: PathBuf,
        /// Where it stops being JSON, if it does.
        source: Option<serde_json::Error>,
    },
}

impl RunReport {
    /// The record as indented JSON with a final newline; NaN and infinities as `null`.
    pub fn to_json(&self) -> Vec<u8> {
        let mut bytes =
            serde_json::to_vec_pretty(self).expect("string keys and plain values always serialise");
        bytes.push(b'\n');
        bytes
    }

    /// Reads [`FILE_NAME`] from an output directory.
    ///
    /// # Errors
    /// [`ReportError`], naming the file.
    pub fn read(directory: &Path) -> Result<Self, ReportError> {
        let path = directory.join(FILE_NAME);
        let bytes = read_record(&path)?;
        serde_json::from_slice(&bytes).map_err(|source| ReportError::Malformed { path, source })
    }
}

/// The bytes of a record: of a regular file, of a length that a record can have.
///
/// # Errors
/// [`ReportError`], naming the file.
pub fn read_record(path: &Path) -> Result<Vec<u8>, ReportError> {
    let io = |source| ReportError::Io { path: path.to_owned(), source };
    // By its metadata first: opening a FIFO would wait for a writer for ever.
    let metadata = std::fs::metadata(path).map_err(io)?;
    if !metadata.is_file() {
        return Err(ReportError::NotRegular { path: path.to_owned() });
    }
    if metadata.len() > MAX_BYTES {
        return Err(ReportError::TooLarge { path: path.to_owned(), bytes: metadata.len() });
    }
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(MAX_BYTES).read_to_end(&mut bytes)).map_err(io)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn sample() -> RunReport {
        let solved = ParameterReport {
            method: "cg".into(),
            subspace: Some("kfac".into()),
            iterations: Some(100),
            stop_reason: Some("max_iterations".into()),
            initial_relative_residual: Some(0.5),
            final_relative_residual: Some(f64::NAN),
            objective_final: Some(f64::NEG_INFINITY),
            converged: Some(false),
            seconds: 1.5,
            bytes_read: 7,
            rounds: vec![RoundReport { method: "direct".into(), ..Default::default() }],
            ..Default::default()
        };
        let averaged = ParameterReport { method: "average".into(), seconds: 0.1, ..Default::default() };
        RunReport {
            version: "0.1.0".into(),
            config_hash: "00".into(),
            wall_seconds: f64::INFINITY,
            bytes_written: u64::MAX,
            parameters: [("w".to_owned(), solved), ("n\n\"".to_owned(), averaged)].into(),
            ..Default::default()
        }
    }

    #[test]
    fn numbers_that_are_not_finite_become_null() {
        let text = String::from_utf8(sample().to_json()).unwrap();
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
        let json: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(json["wall_seconds"], Value::Null);
        assert_eq!(json["parameters"]["w"]["final_relative_residual"], Value::Null);
        assert_eq!(json["parameters"]["w"]["objective_final"], Value::Null);
        assert_eq!(json["bytes_written"], u64::MAX);
        assert!(text.ends_with("}\n"));
    }

    #[test]
    fn what_makes_no_sense_is_absent() {
        let json: Value = serde_json::from_slice(&sample().to_json()).unwrap();
        let averaged = json["parameters"]["n\n\""].as_object().unwrap();
        assert_eq!(averaged.keys().collect::<Vec<_>>(), ["method", "seconds", "bytes_read"]);
        assert_eq!(json["parameters"]["w"]["rounds"][0]["method"], "direct");
        assert!(json.get("peak_rss_bytes").is_none());
    }

    #[test]
    fn a_written_record_reads_back() {
        let directory = tempfile::tempdir().unwrap();
        let mut report = sample();
        report.wall_seconds = 2.0;
        let solved = report.parameters.get_mut("w").unwrap();
        solved.final_relative_residual = Some(1e-5);
        solved.objective_final = Some(-0.1);
        report.inputs = vec![InputRecord {
            path: "models/a".into(),
            files: vec![InputFileRecord {
                name: "x".into(),
                bytes: 3,
                mtime_ns: 1_763_922_000_123_456_789,
                ..Default::default()
            }],
        }];
        std::fs::write(directory.path().join(FILE_NAME), report.to_json()).unwrap();
        assert_eq!(RunReport::read(directory.path()).unwrap(), report);
    }

    #[test]
    fn null_is_read_as_nan_and_absence_as_none() {
        let directory = tempfile::tempdir().unwrap();
        let mut report = sample();
        report.flops = f64::NAN;
        let solved = report.parameters.get_mut("w").unwrap();
        solved.seconds = f64::NAN;
        solved.setup = Some(SetupReport { seconds: f64::NAN, flops: f64::INFINITY, bytes: 1 });
        solved.history = vec![StepReport { relative_residual: f64::NAN, objective: f64::INFINITY }];
        solved.rounds[0].objective_final = Some(f64::NAN);
        std::fs::write(directory.path().join(FILE_NAME), report.to_json()).unwrap();
        let read = RunReport::read(directory.path()).unwrap();
        assert!(read.wall_seconds.is_nan() && read.flops.is_nan());
        let solved = &read.parameters["w"];
        assert!(solved.seconds.is_nan() && solved.setup.unwrap().flops.is_nan());
        assert!(solved.history[0].relative_residual.is_nan() && solved.history[0].objective.is_nan());
        assert!(solved.final_relative_residual.unwrap().is_nan() && solved.solve_seconds.is_none());
        assert!(solved.rounds[0].objective_final.unwrap().is_nan());
        assert!(solved.rounds[0].objective_initial.is_none());
    }

    #[test]
    fn what_is_no_record_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let message = RunReport::read(directory.path()).unwrap_err().to_string();
        assert!(message.contains("merge_report.json: cannot read"), "{message}");
        std::fs::write(directory.path().join(FILE_NAME), b"{}").unwrap();
        assert!(matches!(RunReport::read(directory.path()), Err(ReportError::Malformed { .. })));
        std::fs::remove_file(directory.path().join(FILE_NAME)).unwrap();
        std::fs::create_dir(directory.path().join(FILE_NAME)).unwrap();
        assert!(matches!(RunReport::read(directory.path()), Err(ReportError::NotRegular { .. })));
    }
}
