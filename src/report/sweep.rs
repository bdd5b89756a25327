//! `sweep.json`: what a sweep made and how each model came out, written last into the directory of its models.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::json::{ReportError, read_record};

/// The record's name in the output directory of a sweep; a directory that has it is complete.
pub const FILE_NAME: &str = "sweep.json";

/// A sweep's record. Numbers that are not finite become `null`; what makes no sense is absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SweepReport {
    /// The tool's version.
    pub version: String,
    /// Hash of the canonical config, `sweep` included.
    pub config_hash: String,
    /// As in [`super::RunReport::run_hash`], of the sweep.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_hash: Option<String>,
    /// The whole run, in seconds.
    pub wall_seconds: f64,
    /// Bytes read from the inputs for all models together.
    pub bytes_read: u64,
    /// Bytes written to the shards of all models.
    pub bytes_written: u64,
    /// The lists, by key.
    pub grid: Value,
    /// One a combination, the last key of the grid running fastest.
    pub runs: Vec<SweepRun>,
}

/// One model of a sweep.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SweepRun {
    /// As `ridge=0.001,off_diagonal=0.9`.
    pub name: String,
    /// Where the model is, relative to this record.
    pub directory: String,
    /// The swept values, by key.
    pub parameters: Value,
    /// The quadratic objectives at the initial guesses, summed over the solved parameters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objective_initial: Option<f64>,
    /// The same at the results, ridge terms included.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objective_final: Option<f64>,
    /// Iterations, summed over the parameters whose solver has any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iterations: Option<u64>,
    /// Spent on this model's parameters, in seconds. What models share counts for the first of them.
    pub wall_seconds: f64,
    /// Bytes read for it, beyond what the models before it had read.
    pub bytes_read: u64,
    /// Whether every solver met its tolerance.
    pub converged: bool,
}

impl SweepReport {
    /// Reads [`FILE_NAME`] from a sweep's directory.
    ///
    /// # Errors
    /// [`ReportError`], naming the file.
    pub fn read(directory: &Path) -> Result<Self, ReportError> {
        let path = directory.join(FILE_NAME);
        let bytes = read_record(&path)?;
        serde_json::from_slice(&bytes)
            .map_err(|source| ReportError::MalformedSweep { path, source: Some(source) })
    }

    /// The record as indented JSON with a final newline.
    pub fn to_json(&self) -> Vec<u8> {
        let mut bytes =
            serde_json::to_vec_pretty(self).expect("string keys and plain values always serialise");
        bytes.push(b'\n');
        bytes
    }
}
