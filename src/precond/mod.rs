//! Preconditioners: cheap stand-ins `M` for an operator, applied as `M⁻¹·r`.
//!
//! Called by `solve::cg`. [`NoPreconditioner`] is the paper's plain conjugate gradients, [`Jacobi`] the operator's
//! diagonal, [`Kronecker`] a K-FAC operator made diagonal, or nearly so, side by side: `side` makes the bases, `kronecker`
//! applies them, `rotated` moves a whole system into them, `cost` knows what each choice takes before it is made. Nothing
//! here reads a file.

pub mod cost;
mod identity;
mod jacobi;
mod kronecker;
mod rotated;
mod side;

pub use cost::SetupCost;
pub use identity::NoPreconditioner;
pub use jacobi::Jacobi;
pub use kronecker::Kronecker;
pub use rotated::{Rotated, Scaling};
pub use side::{Basis, Side};

use crate::kernel::{Real, Threading};
use crate::operator::{OperatorError, Workspace};
use crate::solve::eigen::NoConvergence;

/// `z ← M⁻¹·r`, with `M` symmetric positive definite.
pub trait Preconditioner<T: Real>: Sync {
    /// As written in a config.
    fn name(&self) -> &'static str;
    /// True where `M` is the identity: the solver then needs no vector for `z`.
    fn is_identity(&self) -> bool {
        false
    }
    /// What making it took, as counted.
    fn setup_cost(&self) -> SetupCost {
        SetupCost::default()
    }
    /// Values of scratch that `apply_inverse` takes from its workspace; the memory plan counts them.
    fn scratch_elements(&self) -> usize {
        0
    }
    /// Floating point operations of one `apply_inverse`.
    fn flops(&self) -> f64 {
        0.0
    }
    /// Overwrites `z`; both row-major `[out, in]`.
    ///
    /// # Errors
    /// [`OperatorError`] where the lengths are wrong or something streamed cannot be read.
    fn apply_inverse(&self, r: &[T], z: &mut [T], workspace: &mut Workspace<T>) -> Result<(), OperatorError>;
    /// The operator's ridge is `shift` from now on, and the factors of its terms have more on their diagonals: `input` and
    /// `output` of each term, weights and scalings of the sides included (empty: none has). One that stays as it is stays
    /// positive definite.
    fn damp(&mut self, shift: f64, input: &[f64], output: &[f64], threading: Threading) {
        let _ = (shift, input, output, threading);
    }
}

/// Which `M` stands in for a sum of Kronecker products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KroneckerKind {
    /// The exact diagonal in the eigenbases of `Σ wᵢAᵢ` and `Σ wᵢGᵢ`: a ridge is exact, too.
    Eigen,
    /// `(Σ wᵢAᵢ/Σ wᵢ + γI) ⊗ (Σ wᵢGᵢ + γ'I)` by Cholesky: cheap to set up, a ridge only approximate.
    Cholesky,
    /// The diagonal in bases that whiten the sums and diagonalise the leading difference between the models: exact for
    /// two models without a ridge.
    Generalized,
    /// Eigenbasis of the smaller side, plain diagonal of the larger one.
    Hybrid,
}

impl KroneckerKind {
    /// As written in a config.
    pub fn name(self) -> &'static str {
        match self {
            Self::Eigen => "kronecker",
            Self::Cholesky => "kronecker_cholesky",
            Self::Generalized => "generalized",
            Self::Hybrid => "hybrid",
        }
    }
}

/// A preconditioner could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PreconditionerError {
    /// A factor could not be read, or does not fit the block.
    #[error(transparent)]
    Operator(#[from] OperatorError),
    /// A factor holds values that are not finite.
    #[error(transparent)]
    Eigen(#[from] NoConvergence),
    /// A summed factor is not positive definite, whatever the damping.
    #[error("a sum of factors is not positive definite (row {row}), even damped")]
    NotPositive {
        /// First row that failed.
        row: usize,
    },
}

#[cfg(test)]
mod tests;
