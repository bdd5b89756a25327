//! Statistics of one model: which are there, where their bytes lie, what shape they have.
//!
//! The planner opens a [`ModelStatistics`] for each model that has statistics files; the engine reads Grams, factors
//! and diagonals from it by ranges and hands them to the operators; [`mod@convert`] writes them in another form. Keys, aliases, shapes and dtypes are checked here,
//! from headers alone. Values are not: NaN, infinities and negative diagonals are found where they are decoded. Nothing
//! here computes a statistic or merges anything.

use std::path::PathBuf;

use thiserror::Error;

use crate::read::{Dtype, ExitClass, ReadError, escaped};

pub mod convert;
pub mod factor;
pub mod format;

pub use format::{FORMAT, Form, Kind, ModelStatistics, Statistic};

/// What can be wrong with a statistics file.
///
/// `key`, `found` and `target` hold foreign text unescaped; `Display` escapes it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StatisticsError {
    /// The file itself, or its header.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The file's metadata names another format, or none.
    #[error("{}: not a statistics file (got format {}, expected `{FORMAT}`)", path.display(),
            found.as_ref().map_or_else(|| "none".to_owned(), |found| format!("`{}`", escaped(found))))]
    Format { path: PathBuf, found: Option<String> },
    /// The file is one of PyTorch's.
    #[error("{}: not a statistics file (got {what}, expected safetensors); `mats-stream statistics convert` reads \
             those of other tools", path.display())]
    Pickled { path: PathBuf, what: &'static str },
    /// A key is not `{parameter}/{kind}`.
    #[error("{}: key `{}` (got no parameter and kind, expected `PARAMETER/KIND`)", path.display(), escaped(key))]
    KeySyntax { path: PathBuf, key: String },
    /// A key's kind is not one of the format's.
    #[error("{}: key `{}` has an unknown kind (got `{}`, expected a known one; the nearest is `{nearest}`)",
            path.display(), escaped(key), escaped(found))]
    UnknownKind { path: PathBuf, key: String, found: String, nearest: &'static str },
    /// A statistic is stored in a dtype that is no plain float.
    #[error("{}: key `{}` has the wrong dtype (got {dtype}, expected F32, F16, BF16 or F64)",
            path.display(), escaped(key))]
    NotFloat { path: PathBuf, key: String, dtype: Dtype },
    /// A statistic's shape is impossible for its kind.
    #[error("{}: key `{}` has the wrong shape (got {shape:?}, expected {expected})", path.display(), escaped(key))]
    Shape { path: PathBuf, key: String, shape: Vec<usize>, expected: &'static str },
    /// A statistic does not fit the parameter that it is to be used for.
    #[error("{}: key `{}` does not fit parameter `{}` (got side {got}, expected {expected})",
            path.display(), escaped(key), escaped(parameter))]
    Side { path: PathBuf, key: String, parameter: String, got: usize, expected: usize },
    /// A statistic does not have the shape of the parameter that it is to be used for.
    #[error("{}: key `{}` does not fit parameter `{}` (got {got:?}, expected {expected:?})",
            path.display(), escaped(key), escaped(parameter))]
    ParameterShape { path: PathBuf, key: String, parameter: String, got: Vec<usize>, expected: Vec<usize> },
    /// Two files of one model have one key.
    #[error("{}: key `{}` is in two files of one model (got it again, expected it only in {})",
            path.display(), escaped(key), first.display())]
    TwoFiles { path: PathBuf, key: String, first: PathBuf },
    /// A Gram and a factor of it are both there, under one parameter.
    #[error("{}: parameter `{}` is ambiguous (got both {gram} and {factor}, expected one of them)",
            path.display(), escaped(parameter))]
    Ambiguous { path: PathBuf, parameter: String, gram: Kind, factor: Kind },
    /// An alias has the name of a stored statistic.
    #[error("{}: alias `{}` shadows a statistic of that name (got both, expected one of them)",
            path.display(), escaped(key))]
    AliasShadows { path: PathBuf, key: String },
    /// Two files of one model give an alias two targets.
    #[error("{}: alias `{}` has two targets (got `{}`, expected `{}` as in {})",
            path.display(), escaped(key), escaped(target), escaped(first_target), first.display())]
    AliasDiffers { path: PathBuf, key: String, target: String, first_target: String, first: PathBuf },
    /// An alias leads to a key that no file of the model has.
    #[error("{}: alias `{}` dangles (got the target `{}`, expected a key of this model's files)",
            path.display(), escaped(key), escaped(target))]
    AliasDangles { path: PathBuf, key: String, target: String },
    /// An alias leads back to itself.
    #[error("{}: alias `{}` loops (got the target `{}`, expected a key of this model's files)",
            path.display(), escaped(key), escaped(target))]
    AliasLoops { path: PathBuf, key: String, target: String },
    /// An alias stands for a statistic of another kind.
    #[error("{}: alias `{}` changes the kind (got the target `{}`, expected one that ends in `/{kind}`)",
            path.display(), escaped(key), escaped(target))]
    AliasKind { path: PathBuf, key: String, target: String, kind: Kind },
    /// A value that no statistic can have, found while it was read.
    #[error("{}: key `{}` holds {got} at row {row}, column {column} (expected {expected})",
            path.display(), escaped(key))]
    BadValue { path: PathBuf, key: String, row: usize, column: usize, got: f64, expected: &'static str },
    /// The two halves of a full Gram differ by more than rounding.
    #[error("{}: key `{}` is not symmetric (row {row}, column {column}: got {lower} below the diagonal and {upper} \
             above it, expected the same)", path.display(), escaped(key))]
    NotSymmetric { path: PathBuf, key: String, row: usize, column: usize, lower: f64, upper: f64 },
}

impl StatisticsError {
    /// Which exit code the contract gives this error.
    pub fn exit_class(&self) -> ExitClass {
        match self {
            Self::Read(error) => error.exit_class(),
            _ => ExitClass::BadInput,
        }
    }
}
