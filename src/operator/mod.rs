//! Linear operators on one parameter block, applied without ever forming a matrix of the block's size squared.
//!
//! A block is a weight `W` `[out, in]`, row-major as stored. Merging solves `C(W) = Σᵢ wᵢ Cᵢ(Wᵢ)` with
//! `C = Σᵢ wᵢ Cᵢ` symmetric positive semidefinite in the Frobenius inner product. The operators here are the Cᵢ of the
//! different task-parameter subspaces: [`Identity`], [`Diagonal`] Fisher, [`GramSum`] on the input side (RegMean and the
//! data-free `τᵀτ`), [`KroneckerSum`] on both sides (K-FAC), and the combinations [`Damped`] and [`Scaled`]. Called by
//! `solve`; knows nothing of files: a factor that is not in memory is a [`RowSource`].

mod combine;
pub mod dense;
mod diagonal;
mod factor;
mod gram;
mod kronecker;

pub use combine::{Damped, Scaled, Sum};
pub use diagonal::{Diagonal, Identity};
pub(crate) use factor::mirror;
pub use factor::{Factor, LowRank, MemoryRows, Panels, RowSource, Symmetric};
pub use gram::{GramSum, GramTerm};
pub use kronecker::{KroneckerSum, KroneckerTerm};

use crate::kernel::{Buffer, Real, Threading};

/// `[out, in]` of a block and of everything an operator takes and gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockShape {
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight, contiguous in memory.
    pub in_features: usize,
}

impl BlockShape {
    /// `[out, in]`.
    pub const fn new(out_features: usize, in_features: usize) -> Self {
        Self { out_features, in_features }
    }
    /// `out · in`.
    pub const fn elements(self) -> usize {
        self.out_features * self.in_features
    }
}

impl std::fmt::Display for BlockShape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "[{}, {}]", self.out_features, self.in_features)
    }
}

/// What an operator promises of itself; sampled by the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Properties {
    /// `⟨x, A·y⟩ = ⟨A·x, y⟩`.
    pub symmetric: bool,
    /// `⟨x, A·x⟩ ≥ 0`.
    pub positive_semidefinite: bool,
}

impl Properties {
    /// No promise.
    pub const NONE: Self = Self { symmetric: false, positive_semidefinite: false };
    /// Symmetric positive semidefinite: what conjugate gradients need.
    pub const SPSD: Self = Self { symmetric: true, positive_semidefinite: true };
}

/// Why an operator could not be applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OperatorError {
    /// A vector or factor does not fit the block.
    #[error("{what}: got {got} values, expected {expected}")]
    ShapeMismatch {
        /// Which operand.
        what: &'static str,
        /// Its length.
        got: usize,
        /// The length that the block's shape asks for.
        expected: usize,
    },
    /// A streamed factor could not be read.
    #[error(transparent)]
    Source(#[from] Box<dyn std::error::Error + Send + Sync>),
    /// The operator has no cheap diagonal.
    #[error("this operator does not give its diagonal")]
    NoDiagonal,
}

/// Scratch memory and threads of one solve: allocated once, before the first iteration.
#[derive(Debug)]
pub struct Workspace<T: Real> {
    scratch: Buffer<T>,
    /// Whether kernels may use the other threads of the pool.
    pub threading: Threading,
}

impl<T: Real> Workspace<T> {
    /// Scratch for operators that ask for up to `elements` values.
    pub fn new(elements: usize, threading: Threading) -> Self {
        Self { scratch: Buffer::zeroed(elements), threading }
    }

    /// The scratch an operator declared in [`LinearOperator::scratch_elements`], and the threading to use.
    ///
    /// # Errors
    /// [`OperatorError::ShapeMismatch`] if the workspace was made for a smaller operator.
    pub fn take(&mut self, elements: usize) -> Result<(&mut [T], Threading), OperatorError> {
        let got = self.scratch.len();
        match self.scratch.get_mut(..elements) {
            Some(scratch) => Ok((scratch, self.threading)),
            None => Err(OperatorError::ShapeMismatch { what: "workspace", got, expected: elements }),
        }
    }
}

/// `y ← A·x` on one block, without forming `A`.
pub trait LinearOperator<T: Real>: Sync {
    /// Of `x` and of `y`.
    fn shape(&self) -> BlockShape;
    /// Declared here, sampled by the tests.
    fn properties(&self) -> Properties {
        Properties::NONE
    }
    /// Values of scratch that `apply` takes from its workspace; the memory plan counts them.
    fn scratch_elements(&self) -> usize {
        0
    }
    /// Floating point operations of one `apply`.
    fn flops(&self) -> f64;
    /// Overwrites `y` with `A·x`; both row-major `[out, in]`.
    ///
    /// # Errors
    /// [`OperatorError`] where the lengths are wrong or a streamed factor cannot be read.
    fn apply(&self, x: &[T], y: &mut [T], workspace: &mut Workspace<T>) -> Result<(), OperatorError>;
    /// Overwrites `d` with the diagonal of `A`, for Jacobi preconditioning.
    ///
    /// # Errors
    /// [`OperatorError::NoDiagonal`] unless the operator knows it cheaply.
    fn diagonal(&self, d: &mut [T]) -> Result<(), OperatorError> {
        let _ = d;
        Err(OperatorError::NoDiagonal)
    }
}

/// A weighted sum `C = Σᵢ Cᵢ` whose terms can be applied one by one: what a right-hand side is made of.
pub trait OperatorSum<T: Real>: LinearOperator<T> {
    /// Number of terms.
    fn terms(&self) -> usize;
    /// `y ← y + Cᵢ·x` (the weight included).
    ///
    /// # Errors
    /// As [`LinearOperator::apply`].
    fn accumulate_term(
        &self,
        term: usize,
        x: &[T],
        y: &mut [T],
        workspace: &mut Workspace<T>,
    ) -> Result<(), OperatorError>;
    /// The factors that a term is made of, where it is made of such.
    fn factors(&self, term: usize) -> TermFactors<'_, T> {
        let _ = term;
        TermFactors { input: None, output: None }
    }
    /// Adds to the diagonals of the terms' factors, one [`Lift`] a term. Does nothing where there are none.
    fn lift(&mut self, lifts: &[Lift]) {
        let _ = lifts;
    }
}

/// See [`OperatorSum::factors`].
pub struct TermFactors<'a, T: Real> {
    /// `[in, in]`, and the weight and scaling on its side: what a preconditioner's side is made with.
    pub input: Option<(f64, &'a Factor<T>)>,
    /// `[out, out]`, in the same way.
    pub output: Option<(f64, &'a Factor<T>)>,
}

/// What is added to the diagonals of a term's factors, weight and scaling aside: `(G + output·I) X (A + input·I)`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Lift {
    /// To the input factor's.
    pub input: f64,
    /// To the output factor's.
    pub output: f64,
}

/// `y ← Σᵢ Cᵢ·x`, term by term.
fn apply_terms<T: Real>(
    sum: &(impl OperatorSum<T> + ?Sized),
    x: &[T],
    y: &mut [T],
    workspace: &mut Workspace<T>,
) -> Result<(), OperatorError> {
    check("y", y, sum.shape())?;
    y.fill(T::default());
    (0..sum.terms()).try_for_each(|term| sum.accumulate_term(term, x, y, workspace))
}

fn check<T>(what: &'static str, v: &[T], shape: BlockShape) -> Result<(), OperatorError> {
    if v.len() == shape.elements() {
        Ok(())
    } else {
        Err(OperatorError::ShapeMismatch { what, got: v.len(), expected: shape.elements() })
    }
}

#[cfg(test)]
mod tests;
