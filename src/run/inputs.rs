//! Opening everything a config names, each checkpoint once.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::config::{Initial, MergeConfig, ModelPath};
use crate::error::Error;
use crate::merge::{Inputs, ModelInput, SourceId};
use crate::read::{Checkpoint, IoMode};
use crate::statistics::ModelStatistics;

/// Opens models, base, initial checkpoints and statistics: headers only.
///
/// # Errors
/// The first file that cannot be opened or is not what it should be.
pub fn open_inputs(config: &MergeConfig, io: IoMode, refuse_nonfinite: bool) -> Result<Inputs, Error> {
    let mut opener = Opener { io, by_path: HashMap::new(), checkpoints: Vec::new(), names: Vec::new() };
    let base = config.base_model.as_ref().map(|base| opener.checkpoint(base)).transpose()?;
    let mut models = Vec::with_capacity(config.models.len());
    for entry in &config.models {
        let source = opener.checkpoint(&entry.model)?;
        let statistics = match &entry.statistics[..] {
            [] => None,
            paths => Some(Arc::new(ModelStatistics::open(paths, opener.io_for(&paths[0]))?)),
        };
        models.push(ModelInput { source, written: entry.model.written.clone(), statistics });
    }
    let mut initials = HashMap::new();
    for round in config.rounds() {
        if let Initial::Checkpoint(model) = &round.initial {
            initials.insert(model.path.clone(), opener.checkpoint(model)?);
        }
    }
    Ok(Inputs {
        checkpoints: opener.checkpoints,
        names: opener.names,
        models,
        base,
        initials,
        tied: HashMap::new(),
        refuse_nonfinite,
    })
}

/// All paths that a config reads, for the check that the output is none of them.
pub(super) fn input_paths(config: &MergeConfig) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    paths.extend(config.base_model.iter().map(|m| m.path.clone()));
    for entry in &config.models {
        paths.push(entry.model.path.clone());
        paths.extend(entry.statistics.iter().cloned());
    }
    for round in config.rounds() {
        if let Initial::Checkpoint(model) = &round.initial {
            paths.push(model.path.clone());
        }
    }
    paths
}

struct Opener {
    io: IoMode,
    by_path: HashMap<PathBuf, SourceId>,
    checkpoints: Vec<Arc<Checkpoint>>,
    names: Vec<String>,
}

impl Opener {
    fn checkpoint(&mut self, model: &ModelPath) -> Result<SourceId, Error> {
        // Two spellings of one directory are one checkpoint; what does not exist is reported by `open`.
        let key = model.path.canonicalize().unwrap_or_else(|_| model.path.clone());
        if let Some(source) = self.by_path.get(&key) {
            return Ok(*source);
        }
        let checkpoint = Checkpoint::open(&model.path, self.io_for(&model.path))?;
        self.checkpoints.push(Arc::new(checkpoint));
        self.names.push(model.written.clone());
        self.by_path.insert(key, self.checkpoints.len() - 1);
        Ok(self.checkpoints.len() - 1)
    }

    /// Mapping a file that a server may change or lose ends in a signal: network file systems are read instead.
    fn io_for(&self, path: &Path) -> IoMode {
        match (self.io, IoMode::for_path(path)) {
            (IoMode::Mmap, IoMode::Mmap) => IoMode::Mmap,
            _ => IoMode::Pread,
        }
    }
}
