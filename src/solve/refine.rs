//! Iterative refinement: f32 conjugate gradients inside, f64 residuals outside.
//!
//! Vectors in f32 end at a true residual of some 1e-7 of `‖b‖`, however long they iterate. Where more is asked for, the
//! residual of the result is computed in f64 and solved for again: each round costs one f64 application and gains what
//! its inner solve reaches.

use super::cg::{CgVectors, conjugate_gradients};
use super::observe::Observer;
use super::stop::{
    Any, IterationRecord, MaxIterations, RelativeResidual, SolveStart, Stagnation, StopReason,
};
use crate::kernel::{Buffer, Threading, vector};
use crate::operator::{LinearOperator, OperatorError, Workspace};
use crate::precond::Preconditioner;

/// How far a round's inner solve goes, relative to the residual it starts with: past it f32 has little left to give.
const INNER: f64 = 1e-4;
/// A round that leaves more of the residual than this has met a floor that no further round will pass.
const LEAST_GAIN: f64 = 0.5;

/// What a refined solve aims at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RefineGoal {
    /// Of the true residual, relative to `‖b‖`.
    pub relative_residual: f64,
    /// Inner steps, all rounds together.
    pub max_iterations: usize,
}

/// How a refined solve ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RefineOutcome {
    /// Why.
    pub stop: StopReason,
    /// Rounds: f64 residuals computed after the first.
    pub rounds: usize,
    /// Inner steps, all rounds together.
    pub iterations: usize,
    /// `‖b - A·x‖ / ‖b‖` in f64.
    pub relative_residual: f64,
}

/// What [`refine`] found.
#[derive(Debug, Clone, PartialEq)]
pub struct Refined {
    /// Row-major `[out, in]`.
    pub x: Vec<f64>,
    /// How it ended.
    pub outcome: RefineOutcome,
}

/// Solves `A·x = b` with `A` applied in f64 once a round, and in f32 at every step.
///
/// `narrow` is the same operator in f32; `preconditioner` belongs to it. Memory beside the operators': two f64 vectors and
/// five f32 ones.
///
/// # Errors
/// [`OperatorError`] where lengths do not fit or an operator cannot be applied.
pub fn refine(
    wide: &dyn LinearOperator<f64>,
    narrow: &dyn LinearOperator<f32>,
    preconditioner: &dyn Preconditioner<f32>,
    rhs: &[f64],
    initial_guess: &[f64],
    goal: RefineGoal,
    observer: &mut dyn Observer,
) -> Result<Refined, OperatorError> {
    let len = wide.shape().elements();
    for (what, got) in [
        ("rhs", rhs.len()),
        ("initial guess", initial_guess.len()),
        ("narrow operator", narrow.shape().elements()),
    ] {
        if got != len {
            return Err(OperatorError::ShapeMismatch { what, got, expected: len });
        }
    }
    let threading = Threading::Parallel;
    let mut wide_workspace = Workspace::new(wide.scratch_elements(), threading);
    let scratch = narrow.scratch_elements().max(preconditioner.scratch_elements());
    let mut workspace = Workspace::new(scratch, threading);
    let rhs_norm = vector::dot(rhs, rhs, threading).sqrt();
    let mut d = Buffer::<f64>::zeroed(len);
    let mut x = initial_guess.to_vec();
    let outcome = refine_displacement(
        &mut |d: &[f64], r: &mut [f64]| -> Result<(), OperatorError> {
            x.copy_from_slice(initial_guess);
            vector::axpy(1.0, d, &mut x, threading);
            wide.apply(&x, r, &mut wide_workspace)?;
            vector::xpby(rhs, -1.0, r, threading);
            Ok(())
        },
        rhs_norm,
        narrow,
        preconditioner,
        &mut d,
        goal,
        &mut workspace,
        &mut |step| observer.iteration(step),
    )?;
    x.copy_from_slice(initial_guess);
    vector::axpy(1.0, &d, &mut x, threading);
    Ok(Refined { x, outcome })
}

/// `r ← b - A·(x₀ + d)` in f64: takes `d`, overwrites `r`.
pub(crate) type Residual<'f, E> = dyn FnMut(&[f64], &mut [f64]) -> Result<(), E> + 'f;

/// As [`refine`], on buffers and with the residual as a function of the displacement: the engine computes it from the
/// models themselves.
///
/// # Errors
/// Those of `residual` and of the f32 solve.
#[allow(clippy::too_many_arguments, reason = "a system in two precisions and its surroundings")]
pub(crate) fn refine_displacement<E: From<OperatorError>>(
    residual: &mut Residual<'_, E>,
    rhs_norm: f64,
    narrow: &dyn LinearOperator<f32>,
    preconditioner: &dyn Preconditioner<f32>,
    d: &mut [f64],
    goal: RefineGoal,
    workspace: &mut Workspace<f32>,
    observe: &mut dyn FnMut(&IterationRecord),
) -> Result<RefineOutcome, E> {
    let threading = workspace.threading;
    let len = d.len();
    let mut r = Buffer::<f64>::zeroed(len);
    let [mut step, mut r32, mut p, mut q] = std::array::from_fn(|_| Buffer::<f32>::zeroed(len));
    let mut z = Buffer::<f32>::zeroed(if preconditioner.is_identity() { 0 } else { len });
    residual(d, &mut r)?;
    let mut norm = vector::dot(&r, &r, threading).sqrt();
    let (mut rounds, mut iterations, mut total) = (0, 0, 0.0);
    let stop = loop {
        if !norm.is_finite() {
            break StopReason::NotFinite;
        }
        if norm <= goal.relative_residual * rhs_norm {
            break if norm == 0.0 { StopReason::Solved } else { StopReason::RelativeResidual };
        }
        if iterations >= goal.max_iterations {
            break StopReason::MaxIterations;
        }
        // To one, so that a small residual keeps its digits in f32.
        for (narrow, wide) in r32.iter_mut().zip(r.iter()) {
            *narrow = (wide / norm) as f32;
        }
        let start = SolveStart { rhs_norm: 1.0, residual_norm: 1.0, unknowns: len };
        let mut rule = Any(vec![
            Box::new(RelativeResidual(INNER)),
            Box::new(Stagnation::of::<f32>()),
            Box::new(MaxIterations(goal.max_iterations - iterations)),
        ]);
        let vectors = CgVectors { d: &mut step, r: &mut r32, p: &mut p, q: &mut q, z: &mut z };
        let first = rounds == 0;
        let inner = conjugate_gradients(
            narrow,
            preconditioner,
            vectors,
            &start,
            &mut rule,
            workspace,
            &mut |step, _| {
                // The record of a round's start is the last one's end.
                if first || step.iteration > 0 {
                    observe(&IterationRecord {
                        iteration: iterations + step.iteration,
                        residual_norm: step.residual_norm * norm,
                        relative_residual: step.residual_norm * norm / rhs_norm,
                        preconditioned_norm: step.preconditioned_norm * norm,
                        decrease: step.decrease * norm * norm,
                        total_decrease: total + step.total_decrease * norm * norm,
                    });
                }
            },
        )?;
        iterations += inner.iterations;
        total += inner.total_decrease * norm * norm;
        rounds += 1;
        for (d, s) in d.iter_mut().zip(step.iter()) {
            *d += norm * f64::from(*s);
        }
        if matches!(inner.stop, StopReason::NotPositiveDefinite { .. } | StopReason::NotFinite) {
            break inner.stop;
        }
        residual(d, &mut r)?;
        let before = std::mem::replace(&mut norm, vector::dot(&r, &r, threading).sqrt());
        let better = norm <= LEAST_GAIN * before;
        if norm > before {
            // Worse: the last round was noise.
            for (d, s) in d.iter_mut().zip(step.iter()) {
                *d -= before * f64::from(*s);
            }
            norm = before;
        }
        if !better && norm > goal.relative_residual * rhs_norm && iterations < goal.max_iterations {
            break StopReason::Stagnated;
        }
    };
    let relative_residual = if norm == 0.0 { 0.0 } else { norm / rhs_norm };
    Ok(RefineOutcome { stop, rounds, iterations, relative_residual })
}
