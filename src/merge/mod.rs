//! What is done to one parameter: which start, which systems, solved how.
//!
//! `resolve` turns a config's rounds into a [`Recipe`] for one tensor from headers alone; `block` carries a recipe out:
//! `elementwise` makes starting points, averages and the merges that need a few quantities of each tensor, `direct` solves
//! what has a closed form by rows, `iterative` runs conjugate gradients on a whole block, with `kfac` making the K-FAC
//! system and its preconditioner, `lift` repairing one that rounding made indefinite, and `snapshots` keeping the states of
//! long ones, `refined` does so past f32, and `two_term` solves two-model K-FAC exactly; `sweep`
//! carries several recipes out that differ in their last step. `plan` calls `resolve`, `stream` calls `block` and `sweep`.
//! Nothing here decides what runs when, or writes a file.

pub mod block;
mod diagonal;
mod direct;
pub mod elementwise;
mod inputs;
mod iterative;
mod kfac;
mod lift;
mod pieces;
mod recipe;
mod refined;
mod resolve;
mod snapshots;
pub mod sweep;
mod terms;
mod two_term;

pub use direct::DirectMemory;
pub use elementwise::{PIECE, merge_elementwise};
pub use inputs::{Inputs, ModelInput, OutputFiles, SourceId, Tally};
pub use iterative::{BlockContext, IterativeMemory, SeePiece, SolveDetail, SolveOutcome};
pub(crate) use kfac::{apply_flops, kronecker_kind, rotates};
pub use lift::Repair;
pub use pieces::MOST_BYTES as SHARED_PIECE_BYTES;
pub use recipe::{GramKind, Iteration, Recipe, Solve, SolveModel, SolverChoice, Start, System};
pub(crate) use refined::memory_bytes as refined_bytes;
pub use resolve::{LayerPosition, Resolution, resolve};
pub(crate) use resolve::{gram_key, input_factors_key, statistics_keys};
pub(crate) use snapshots::{disk_bytes as snapshot_disk_bytes, step_bytes};
pub use two_term::{memory_bytes as two_term_bytes, most_flops as two_term_flops};

use crate::operator::OperatorError;
use crate::read::{ReadError, escaped};
use crate::solve::eigen::NoConvergence;
use crate::statistics::StatisticsError;

/// Why a parameter could not be merged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MergeError {
    /// A checkpoint could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A statistic could not be read or is not one.
    #[error(transparent)]
    Statistics(#[from] StatisticsError),
    /// An operator failed; a streamed factor that could not be read comes out as what it was.
    #[error(transparent)]
    Operator(OperatorError),
    /// A factorisation failed.
    #[error("tensor `{}`", escaped(tensor))]
    Eigen {
        /// The parameter.
        tensor: String,
        /// What failed.
        source: NoConvergence,
    },
    /// A preconditioner could not be made.
    #[error("tensor `{}`", escaped(tensor))]
    Preconditioner {
        /// The parameter.
        tensor: String,
        /// What failed.
        source: crate::precond::PreconditionerError,
    },
    /// A value of a model that is not finite.
    #[error(
        "{model}: tensor `{}` holds {value} at flat index {index} (expected finite numbers; `--nonfinite propagate` \
             merges it all the same)",
        escaped(tensor)
    )]
    NonFinite {
        /// The checkpoint.
        model: String,
        /// The parameter.
        tensor: String,
        /// Flat index of the value.
        index: u64,
        /// NaN or an infinity.
        value: f64,
    },
    /// The system gives the process no more threads.
    #[error(
        "cannot start the threads (expected room for a few more than `--threads`; try fewer, or raise the limit)"
    )]
    Threads {
        /// Why.
        source: std::io::Error,
    },
    /// All weights of a parameter are 0.
    #[error(
        "tensor `{}`: the weights of all models are 0, or sum to 0 where the sum divides (got {weights:?}, expected \
             a sum that is not 0)",
        escaped(tensor)
    )]
    ZeroWeights {
        /// The parameter.
        tensor: String,
        /// One a model.
        weights: Vec<f64>,
    },
    /// Parameters that do not go together on one tensor.
    #[error("tensor `{}`: `{method}`: {reason}", escaped(tensor))]
    Parameters {
        /// The parameter.
        tensor: String,
        /// `merge_method`.
        method: &'static str,
        /// What is wrong, what was expected.
        reason: String,
    },
    /// A parameter without statistics where the config says `unmatched: error`.
    #[error(
        "tensor `{}` cannot be merged: {reason} (expected statistics, because of `unmatched: error`)",
        escaped(tensor)
    )]
    Unmatched {
        /// The parameter.
        tensor: String,
        /// What is missing.
        reason: String,
    },
    /// A solver that does not fit the system.
    #[error(
        "tensor `{}`: solver.method `direct` solves K-FAC systems of at most two models (got {models}); try `pcg`",
        escaped(tensor)
    )]
    NotDirect {
        /// The parameter.
        tensor: String,
        /// Models with a weight above 0.
        models: usize,
    },
    /// A word of the config that this version does not carry out.
    #[error("{what} is not supported in this version; {hint}")]
    Unsupported {
        /// The key and value.
        what: String,
        /// What to write instead.
        hint: &'static str,
    },
    /// A tensor that a step needs and a checkpoint lacks.
    #[error(
        "{model}: tensor `{}` is missing or has another shape (got {got}, expected {expected:?})",
        escaped(tensor)
    )]
    Missing {
        /// The checkpoint.
        model: String,
        /// The parameter.
        tensor: String,
        /// Its shape there, or `none`.
        got: String,
        /// The shape in the reference.
        expected: Vec<usize>,
    },
    /// The result could not be handed on.
    #[error(transparent)]
    Write(#[from] crate::write::WriteError),
    /// The system refused memory that the plan counts on.
    #[error(
        "out of memory: the system refused {bytes} bytes that are within --max-memory (got less than was planned, \
             expected all of it); try a smaller --max-memory"
    )]
    OutOfMemory {
        /// Size of the refused buffer.
        bytes: usize,
    },
    /// The run is being stopped from outside.
    #[error("interrupted")]
    Cancelled,
}

impl MergeError {
    /// What went wrong while a tensor's preconditioner was made.
    fn preconditioner(tensor: &str, error: crate::precond::PreconditionerError) -> Self {
        use crate::precond::PreconditionerError;
        let tensor = tensor.to_owned();
        match error {
            PreconditionerError::Operator(error) => error.into(),
            PreconditionerError::Eigen(source) => Self::Eigen { tensor, source },
            source => Self::Preconditioner { tensor, source },
        }
    }
}

impl From<OperatorError> for MergeError {
    fn from(error: OperatorError) -> Self {
        match error {
            OperatorError::Source(source) => match source.downcast::<StatisticsError>() {
                Ok(error) => Self::Statistics(*error),
                Err(source) => match source.downcast::<MergeError>() {
                    Ok(error) => *error,
                    Err(source) => Self::Operator(OperatorError::Source(source)),
                },
            },
            error => Self::Operator(error),
        }
    }
}
