//! Preconditioned conjugate gradients on the displacement from the initial guess.
//!
//! With `x = x₀ + d` the system `A·x = b` becomes `A·d = r₀` with `r₀ = b - A·x₀`, and the iterates are those of CG
//! started at `x₀`. Solving for `d` keeps the digits of a small correction that adding to `x` would round away, and it
//! leaves the null space of a singular `A` exactly where the initial guess put it.

use super::stop::{IterationRecord, SolveStart, StopReason, StoppingRule};
use crate::kernel::{Real, vector};
use crate::operator::{LinearOperator, OperatorError, Workspace};
use crate::precond::Preconditioner;

/// The vectors of one solve, each of the block's length, row-major `[out, in]`.
///
/// Memory: four vectors, five with a preconditioner that is not the identity.
#[derive(Debug)]
pub struct CgVectors<'a, T: Real> {
    /// In: anything. Out: the displacement.
    pub d: &'a mut [T],
    /// In: `r₀ = b - A·x₀`. Out: the recurrence residual.
    pub r: &'a mut [T],
    /// Search direction; overwritten.
    pub p: &'a mut [T],
    /// `A·p`; overwritten.
    pub q: &'a mut [T],
    /// `M⁻¹·r`; may be empty where the preconditioner is the identity.
    pub z: &'a mut [T],
}

/// How a solve ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CgOutcome {
    /// Why.
    pub stop: StopReason,
    /// Steps taken.
    pub iterations: usize,
    /// Of the recurrence residual, relative to `‖b‖`.
    pub relative_residual: f64,
    /// `Σ αₖ⟨rₖ, zₖ⟩`: how far the objective `Σ ‖x-θᵢ‖²_Cᵢ` (+ ridge) fell. Never negative.
    pub total_decrease: f64,
}

/// Solves `A·d = r₀` from `d = 0`, with the letters of the textbook: one `alpha` and `beta` for the whole block.
///
/// Each step costs one application of `operator`, one of `preconditioner`, and three fused passes over the vectors.
/// Scalars and sums are f64 whatever `T` is. A breakdown (`⟨p, A·p⟩ ≤ 0`, anything not finite) ends the solve with its
/// reason and the last good iterate: the objective falls at every completed step, so the last is the best. `observe` sees
/// the start and every step, each with the displacement so far.
///
/// # Errors
/// Those of the operator and the preconditioner.
///
/// # Source
/// Hestenes & Stiefel 1952; the paper's use of it: arXiv:2312.04339v2 §4 and appendix B.
pub fn conjugate_gradients<T: Real>(
    operator: &dyn LinearOperator<T>,
    preconditioner: &dyn Preconditioner<T>,
    vectors: CgVectors<'_, T>,
    start: &SolveStart,
    rule: &mut dyn StoppingRule,
    workspace: &mut Workspace<T>,
    observe: &mut dyn FnMut(&IterationRecord, &[T]),
) -> Result<CgOutcome, OperatorError> {
    let CgVectors { d, r, p, q, z } = vectors;
    let threading = workspace.threading;
    let plain = preconditioner.is_identity();
    d.fill(T::default());

    let relative = |norm: f64| if norm == 0.0 { 0.0 } else { norm / start.rhs_norm };
    let mut rr = vector::dot(r, r, threading);
    let mut rho = if plain {
        p.copy_from_slice(r);
        rr
    } else {
        preconditioner.apply_inverse(r, z, workspace)?;
        p.copy_from_slice(z);
        vector::dot(r, z, threading)
    };
    let mut step = IterationRecord {
        iteration: 0,
        residual_norm: rr.sqrt(),
        relative_residual: relative(rr.sqrt()),
        preconditioned_norm: rho.max(0.0).sqrt(),
        decrease: 0.0,
        total_decrease: 0.0,
    };
    rule.start(start);
    observe(&step, d);

    let stop = loop {
        if !rr.is_finite() || !rho.is_finite() {
            break StopReason::NotFinite;
        }
        if rr == 0.0 {
            break StopReason::Solved;
        }
        if let Some(reason) = rule.check(&step) {
            break reason;
        }
        operator.apply(p, q, workspace)?;
        let pq = vector::dot(p, q, threading);
        if !(pq.is_finite() && pq > 0.0) {
            break StopReason::NotPositiveDefinite { curvature: pq / vector::dot(p, p, threading) };
        }
        let alpha = rho / pq;
        if !(alpha.is_finite() && rho > 0.0) {
            break StopReason::NotFinite;
        }
        rr = vector::subtract_and_square(alpha, q, r, threading);
        let rho_next = if plain {
            rr
        } else {
            preconditioner.apply_inverse(r, z, workspace)?;
            vector::dot(r, z, threading)
        };
        if !rr.is_finite() || !rho_next.is_finite() {
            break StopReason::NotFinite;
        }
        vector::axpy(alpha, p, d, threading);
        let beta = rho_next / rho;
        vector::xpby(if plain { &*r } else { &*z }, beta, p, threading);

        let decrease = alpha * rho;
        step = IterationRecord {
            iteration: step.iteration + 1,
            residual_norm: rr.sqrt(),
            relative_residual: relative(rr.sqrt()),
            preconditioned_norm: rho_next.max(0.0).sqrt(),
            decrease,
            total_decrease: step.total_decrease + decrease,
        };
        rho = rho_next;
        observe(&step, d);
    };
    Ok(CgOutcome {
        stop,
        iterations: step.iteration,
        relative_residual: step.relative_residual,
        total_decrease: step.total_decrease,
    })
}
