//! Solving `A·x = b` on one block: conjugate gradients, direct factorisations, stopping rules.
//!
//! [`solve`] is the entry for library users: any [`LinearOperator`], no checkpoint needed. The engine's own entries are
//! the same routines on buffers it has planned ([`cg`], [`cholesky`], [`eigen`]). Knows nothing of files.

pub mod cg;
pub mod cholesky;
pub mod eigen;
pub mod lanczos;
pub mod observe;
pub mod pencil;
pub mod refine;
pub mod stop;

pub use cg::{CgOutcome, CgState, CgVectors, Snapshots, conjugate_gradients, conjugate_gradients_from};
pub use observe::{History, Observer, Silent};
pub use refine::{RefineGoal, RefineOutcome, Refined, refine};
pub use stop::{
    Any, Cancelled, DirectMethod, IterationRecord, MaxIterations, ObjectiveDecrease, PreconditionedResidual,
    RelativeResidual, SolveStart, Stagnation, StopReason, StoppingRule, TimeLimit,
};

use crate::kernel::{Buffer, Real, Threading, vector};
use crate::operator::{LinearOperator, OperatorError, Workspace};
use crate::precond::Preconditioner;

/// What [`solve`] found. Running out of iterations is an outcome, not an error.
#[derive(Debug, Clone, PartialEq)]
pub struct Solution<T> {
    /// Row-major `[out, in]`.
    pub x: Vec<T>,
    /// Why the solve ended.
    pub stop: StopReason,
    /// Steps taken.
    pub iterations: usize,
    /// `‖b - A·x‖ / ‖b‖`, computed from `x`, not from the recurrence.
    pub relative_residual: f64,
    /// How far `⟨x, A·x⟩ - 2⟨x, b⟩` fell from the initial guess.
    pub total_decrease: f64,
}

/// Solves `A·x = b` from `initial_guess` by preconditioned conjugate gradients.
///
/// Allocates five vectors and the operator's scratch. What lies in the null space of `A` stays as the initial guess has
/// it. Uses all threads of the current rayon pool; the result does not depend on how many there are.
///
/// ```
/// use mats_stream::operator::{BlockShape, Identity};
/// use mats_stream::precond::NoPreconditioner;
/// use mats_stream::solve::{Any, MaxIterations, RelativeResidual, Silent, solve};
///
/// let double = Identity::new(BlockShape::new(1, 2), vec![2.0]);
/// let mut rule = Any(vec![Box::new(RelativeResidual(1e-12)), Box::new(MaxIterations(10))]);
/// let solution = solve(&double, &NoPreconditioner, &[2.0, 4.0], &[0.0, 0.0], &mut rule, &mut Silent)?;
/// assert_eq!(solution.x, [1.0, 2.0]);
/// assert_eq!(solution.iterations, 1);
/// # Ok::<(), mats_stream::operator::OperatorError>(())
/// ```
///
/// # Errors
/// [`OperatorError`] where lengths do not fit the operator or it cannot be applied.
pub fn solve<T: Real>(
    operator: &dyn LinearOperator<T>,
    preconditioner: &dyn Preconditioner<T>,
    rhs: &[T],
    initial_guess: &[T],
    rule: &mut dyn StoppingRule,
    observer: &mut dyn Observer,
) -> Result<Solution<T>, OperatorError> {
    let len = operator.shape().elements();
    for (what, v) in [("rhs", rhs), ("initial guess", initial_guess)] {
        if v.len() != len {
            return Err(OperatorError::ShapeMismatch { what, got: v.len(), expected: len });
        }
    }
    let scratch = operator.scratch_elements().max(preconditioner.scratch_elements());
    let mut workspace = Workspace::new(scratch, Threading::Parallel);
    let [mut d, mut r, mut p, mut q] = std::array::from_fn(|_| Buffer::<T>::zeroed(len));
    let mut z = Buffer::<T>::zeroed(if preconditioner.is_identity() { 0 } else { len });
    let residual = |x: &[T], r: &mut [T], workspace: &mut Workspace<T>| -> Result<f64, OperatorError> {
        operator.apply(x, r, workspace)?;
        vector::xpby(rhs, -1.0, r, Threading::Parallel);
        Ok(vector::dot(r, r, Threading::Parallel).sqrt())
    };
    let rhs_norm = vector::dot(rhs, rhs, Threading::Parallel).sqrt();
    let residual_norm = residual(initial_guess, &mut r, &mut workspace)?;
    let start = SolveStart { rhs_norm, residual_norm, unknowns: len };
    let vectors = CgVectors { d: &mut d, r: &mut r, p: &mut p, q: &mut q, z: &mut z };
    let outcome = conjugate_gradients(
        operator,
        preconditioner,
        vectors,
        &start,
        rule,
        &mut workspace,
        &mut |step, _| {
            observer.iteration(step);
        },
    )?;
    let x: Vec<T> =
        initial_guess.iter().zip(d.iter()).map(|(x, d)| T::from_f64(x.to_f64() + d.to_f64())).collect();
    let norm = residual(&x, &mut r, &mut workspace)?;
    Ok(Solution {
        x,
        stop: outcome.stop,
        iterations: outcome.iterations,
        relative_residual: if norm == 0.0 { 0.0 } else { norm / rhs_norm },
        total_decrease: outcome.total_decrease,
    })
}

#[cfg(test)]
mod tests;
