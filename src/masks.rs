//! `masks.safetensors`: the file in an output directory that holds, for every task, what of the merged task vector is its
//! own. Written along with the merge by methods that keep masks (`emr`, `tall_masks`), read by `materialise`.
//!
//! | key | dtype, shape | meaning |
//! |---|---|---|
//! | `{parameter}/mask` | U8 `[tasks, ⌈elements/8⌉]` | element k of task t: bit `k % 8`, from the lowest, of byte `k / 8` of row t; elements flat and row-major |
//! | `{parameter}/norms` | F64 `[2, tasks]` | `Σ\|τₜ\|` of each task, then `Σ\|mₜ∘τ\|`; only where there is a rescaler |
//!
//! Metadata: `format` = `mats-stream-masks/1`, `method`, `base` and `tasks` (a JSON list) as the config writes them, and
//! `rescaler`. Task t's model is `θ₀ + λₜ · mₜ∘(θ - θ₀)` with θ the merged model, θ₀ the base; λₜ is 1 (`none`),
//! `Σ mean|τₜ| / Σ mean|mₜ∘τ|` (`tensors`: means over each parameter, sums over all), or the same of plain sums (`flat`).
//!
//! No index lists the file: what loads the model does not see it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::plan::shards::TensorSpec;
use crate::read::{Checkpoint, Dtype, IoMode, ReadError, TensorMeta, escaped};

/// Its name in the output directory.
pub const MASKS_FILE: &str = "masks.safetensors";

/// `format` in its metadata.
const FORMAT: &str = "mats-stream-masks/1";

/// What a task's masked vector is scaled by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rescaler {
    /// 1.
    None,
    /// Sums over parameters of their means: each counts alike.
    Tensors,
    /// Plain sums: each element counts alike.
    Flat,
}

impl Rescaler {
    const ALL: [Self; 3] = [Self::None, Self::Tensors, Self::Flat];

    /// As the metadata writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Tensors => "tensors",
            Self::Flat => "flat",
        }
    }
}

/// Bytes of one task's mask.
pub fn mask_bytes(elements: u64) -> u64 {
    elements.div_ceil(8)
}

/// The mask tensor of a parameter of so many elements.
pub fn mask_spec(parameter: &str, elements: u64, tasks: usize) -> TensorSpec {
    let row = mask_bytes(elements);
    TensorSpec {
        name: format!("{parameter}/mask"),
        dtype: "U8".to_owned(),
        shape: vec![tasks, row as usize],
        bytes: tasks as u64 * row,
    }
}

/// The tensor of its norms.
pub fn norms_spec(parameter: &str, tasks: usize) -> TensorSpec {
    let (dtype, shape) = ("F64".to_owned(), vec![2, tasks]);
    TensorSpec { name: format!("{parameter}/norms"), dtype, shape, bytes: 16 * tasks as u64 }
}

/// The file's metadata.
pub fn metadata(method: &str, rescaler: Rescaler, base: &str, tasks: &[&str]) -> BTreeMap<String, String> {
    let entry = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    BTreeMap::from([
        entry("format", FORMAT),
        entry("method", method),
        entry("rescaler", rescaler.name()),
        entry("base", base),
        entry("tasks", &serde_json::json!(tasks).to_string()),
    ])
}

/// Why a directory's masks are of no use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MasksError {
    /// The file cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// There is none.
    #[error(
        "{}: no {MASKS_FILE} here (expected the output directory of a merge that keeps masks: `emr`, `tall_masks`)",
        directory.display()
    )]
    Missing {
        /// The directory.
        directory: PathBuf,
    },
    /// Metadata or a tensor is not what is written here.
    #[error("{}: {what} (got {got}, expected {expected})", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The entry.
        what: String,
        /// What it says.
        got: String,
        /// What it should.
        expected: String,
    },
    /// A task that is none.
    #[error(
        "TASK: {} is none of the merge's tasks (got `{}`, expected its number from 0 or one of: {})",
        if *several { "more than one model goes by that name, or it" } else { "it" }, escaped(task), tasks.join(", ")
    )]
    Task {
        /// As typed.
        task: String,
        /// Number and name of each.
        tasks: Vec<String>,
        /// Whether the name fits several.
        several: bool,
    },
}

/// The file, opened and checked as far as headers go.
#[derive(Debug)]
pub struct MasksFile {
    checkpoint: Checkpoint,
    rescaler: Rescaler,
    /// As the config wrote it.
    pub base: String,
    /// Models, as the config wrote them.
    pub tasks: Vec<String>,
}

impl MasksFile {
    /// Opens the masks of an output directory: headers only.
    ///
    /// # Errors
    /// [`MasksError`].
    pub fn open(directory: &Path, io: IoMode) -> Result<Self, MasksError> {
        let path = directory.join(MASKS_FILE);
        if std::fs::symlink_metadata(&path).is_err() {
            return Err(MasksError::Missing { directory: directory.to_owned() });
        }
        let checkpoint = Checkpoint::open(&path, io)?;
        let get = |key: &str| checkpoint.metadata().get(key).map(String::as_str);
        let malformed = |key: &str, expected: String| MasksError::Malformed {
            path: path.clone(),
            what: format!("metadata `{key}`"),
            got: get(key).map_or_else(|| "nothing".to_owned(), |text| format!("`{}`", escaped(text))),
            expected,
        };
        if get("format") != Some(FORMAT) {
            return Err(malformed("format", format!("`{FORMAT}`")));
        }
        let rescaler = Rescaler::ALL.into_iter().find(|r| get("rescaler") == Some(r.name()));
        let rescaler =
            rescaler.ok_or_else(|| malformed("rescaler", "`none`, `tensors` or `flat`".to_owned()))?;
        let tasks: Option<Vec<String>> = get("tasks").and_then(|text| serde_json::from_str(text).ok());
        let tasks = tasks.ok_or_else(|| malformed("tasks", "a JSON list of names".to_owned()))?;
        let base = get("base").ok_or_else(|| malformed("base", "the base's name".to_owned()))?.to_owned();
        Ok(Self { rescaler, base, tasks, checkpoint })
    }

    /// What is stored.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Gives up all but the stored tensors.
    pub fn into_checkpoint(self) -> Checkpoint {
        self.checkpoint
    }

    /// The number of a task: as typed, else by name, else by the last part of its path.
    ///
    /// # Errors
    /// [`MasksError::Task`].
    pub fn task(&self, typed: &str) -> Result<usize, MasksError> {
        if let Ok(number) = typed.parse::<usize>()
            && number < self.tasks.len()
        {
            return Ok(number);
        }
        let last = |path: &str| path.trim_end_matches('/').rsplit('/').next().unwrap_or(path).to_owned();
        let named = |fits: &dyn Fn(&str) -> bool| -> Vec<usize> {
            (0..self.tasks.len()).filter(|k| fits(&self.tasks[*k])).collect()
        };
        let mut found = named(&|name| name == typed);
        if found.is_empty() {
            found = named(&|name| last(name) == typed);
        }
        match found[..] {
            [one] => Ok(one),
            _ => Err(MasksError::Task {
                task: typed.to_owned(),
                tasks: self.tasks.iter().enumerate().map(|(k, t)| format!("{k} `{}`", escaped(t))).collect(),
                several: found.len() > 1,
            }),
        }
    }

    /// The mask of a parameter of so many elements; `None` where it was not merged.
    ///
    /// # Errors
    /// [`MasksError::Malformed`] for one of another size.
    pub fn mask(&self, parameter: &str, elements: u64) -> Result<Option<&TensorMeta>, MasksError> {
        let spec = mask_spec(parameter, elements, self.tasks.len());
        let Some(found) = self.checkpoint.get(&spec.name) else { return Ok(None) };
        self.expect(found, Dtype::U8, &spec.shape)?;
        Ok(Some(found))
    }

    fn expect(&self, found: &TensorMeta, dtype: Dtype, shape: &[usize]) -> Result<(), MasksError> {
        if found.dtype == dtype && found.shape == shape {
            return Ok(());
        }
        Err(MasksError::Malformed {
            path: self.checkpoint.files()[found.file].path().to_owned(),
            what: format!("tensor `{}`", escaped(&found.name)),
            got: format!("{} {:?}", found.dtype, found.shape),
            expected: format!("{dtype} {shape:?}"),
        })
    }

    /// λₜ of a task: reads the norms of every parameter, of which `elements` gives the number of elements.
    ///
    /// # Errors
    /// [`MasksError`]: norms that are missing, of another shape, negative or not finite.
    pub fn rescale(&self, task: usize, parameters: &[(&str, u64)]) -> Result<f64, MasksError> {
        if self.rescaler == Rescaler::None {
            return Ok(1.0);
        }
        let tasks = self.tasks.len();
        let (mut own, mut masked) = (0.0, 0.0);
        let mut scratch = Vec::new();
        for (parameter, elements) in parameters {
            let spec = norms_spec(parameter, tasks);
            let malformed = |got: String| MasksError::Malformed {
                path: self.checkpoint.path().to_owned(),
                what: format!("tensor `{}`", escaped(&spec.name)),
                got,
                expected: "two finite sums of at least 0 a task".to_owned(),
            };
            let found = self.checkpoint.get(&spec.name).ok_or_else(|| malformed("none".to_owned()))?;
            self.expect(found, Dtype::F64, &spec.shape)?;
            let bytes = self.checkpoint.read(found, 0..found.bytes, &mut scratch)?;
            let mut values = vec![0.0; 2 * tasks];
            crate::read::decode_f64(Dtype::F64, bytes, &mut values)?;
            if let Some(bad) = values.iter().find(|v| !v.is_finite() || **v < 0.0) {
                return Err(malformed(bad.to_string()));
            }
            let unit = if self.rescaler == Rescaler::Flat { 1.0 } else { 1.0 / (*elements).max(1) as f64 };
            own += values[task] * unit;
            masked += values[tasks + task] * unit;
        }
        // A task that never agrees with the merged vector has no share in it.
        Ok(if masked > 0.0 { own / masked } else { 1.0 })
    }
}
