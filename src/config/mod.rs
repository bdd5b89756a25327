//! The configuration: mergekit's YAML and the keys of its own, read once, checked before any tensor is
//! touched. Called by the commands that take a CONFIG; the engine asks the resulting [`MergeConfig`]. Never
//! opens a checkpoint or a statistics file.
//!
//! `yaml` (text → nodes with lines) → `fields` (typed access, errors that name the place) → `parse` (keys →
//! `schema` types, all checks) → `parameters` (values per tensor) and `canonical` (the text that is hashed). `sweep` makes
//! several configurations of one, `emit` writes each as YAML again.

mod canonical;
mod emit;
mod error;
mod fields;
mod parameters;
mod parse;
mod schema;
mod slices;
mod solver;
mod sweep;
mod tokenizer;
mod yaml;

#[cfg(test)]
mod tests;

use std::path::Path;

use crate::merge::elementwise::Definition;

pub use error::ConfigError;
pub use parameters::{ParameterKind, ParameterSpec, Parameters, Range};
pub use schema::{
    DeltaScale, Initial, MergeConfig, Method, ModelEntry, ModelPath, OutDtype, PCG_RIDGE, PreconditionerKind,
    Round, Section, SolverConfig, SolverMethod, StopConfig, Subspace, TASK_VECTOR_RIDGE, Unmatched,
};
pub use slices::SliceLayers;
pub use sweep::{MAX_COMBINATIONS, Sweep, SweepAxis, SweepKey, Variant};
pub use tokenizer::{ChatTemplate, EmbeddingSource, TokenEmbedding, TokenizerConfig, TokenizerSource};

impl MergeConfig {
    /// Reads and checks the config at `path`. Existence of models and statistics is left to whoever opens
    /// them.
    ///
    /// # Errors
    /// The first problem in the order: the file, the YAML, unknown keys, the method, the models, the round
    /// (outermost first). Each error names file, line, key path and value.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Self::load_with(path, &[])
    }

    /// As [`MergeConfig::load`], with further elementwise methods that `merge_method` may name.
    ///
    /// # Errors
    /// As [`MergeConfig::load`].
    pub fn load_with(path: &Path, methods: &[&'static Definition]) -> Result<Self, ConfigError> {
        let text = yaml::read_text(path)?;
        Self::parse_with(path, text, methods)
    }

    /// As [`MergeConfig::load`], of a text in hand; `path` names it in errors and its directory is what
    /// relative paths are relative to.
    ///
    /// # Errors
    /// As [`MergeConfig::load`]; a text longer than a config file may be is refused too.
    pub fn parse(path: &Path, text: String) -> Result<Self, ConfigError> {
        Self::parse_with(path, text, &[])
    }

    fn parse_with(path: &Path, text: String, methods: &[&'static Definition]) -> Result<Self, ConfigError> {
        if text.len() > yaml::MAX_BYTES {
            return Err(ConfigError::TooLarge { path: path.to_owned() });
        }
        let root = yaml::parse(path, &text)?;
        parse::config(path, text, root.as_ref(), methods)
    }
}
