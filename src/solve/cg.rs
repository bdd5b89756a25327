//! Preconditioned conjugate gradients on the displacement from the initial guess.
//!
//! With `x = x₀ + d` the system `A·x = b` becomes `A·d = r₀` with `r₀ = b - A·x₀`, and the iterates are those of CG
//! started at `x₀`. Solving for `d` keeps the digits of a small correction that adding to `x` would round away, and it
//! leaves the null space of a singular `A` exactly where the initial guess put it.

use std::time::{Duration, Instant};

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

/// A solve between two steps: with the vectors `d`, `r` and `p`, all that it takes to go on with the same bits.
#[derive(Clone, Debug, Default)]
pub struct CgState {
    /// `⟨r, r⟩`, as the fused update summed it.
    pub rr: f64,
    /// `⟨r, M⁻¹r⟩`.
    pub rho: f64,
    /// All steps so far, first the state before any: observer and stopping rules see them again.
    pub steps: Vec<IterationRecord>,
    /// Spent on them.
    pub elapsed: Duration,
}

/// Keeps states of a long solve, so that another process can go on in its middle.
pub trait Snapshots<T: Real> {
    /// Fills `vectors` (`d`, `r`, `p`) with a state that was kept of the solve that starts like this one, if there is any;
    /// else they stay as they are.
    ///
    /// # Errors
    /// Those of reading it.
    fn restore(
        &mut self,
        start: &SolveStart,
        vectors: [&mut [T]; 3],
    ) -> Result<Option<CgState>, OperatorError>;

    /// Offers the state after a step; whether it is kept is for the implementation to decide. `last`: the run is being
    /// stopped, and there will be no other.
    ///
    /// # Errors
    /// Those of writing it.
    fn offer(
        &mut self,
        start: &SolveStart,
        state: &CgState,
        vectors: [&[T]; 3],
        last: bool,
    ) -> Result<(), OperatorError>;
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
    conjugate_gradients_from(operator, preconditioner, vectors, start, rule, workspace, None, observe)
}

/// As [`conjugate_gradients`], going on from what `snapshots` has and offering it every step. Where it went on, `observe`
/// sees the earlier steps again, all with the displacement that they came to; the iterates are those of a solve in one go.
///
/// # Errors
/// Those of `snapshots` too.
#[allow(clippy::too_many_arguments, reason = "a system, its solver and its surroundings")]
pub fn conjugate_gradients_from<T: Real>(
    operator: &dyn LinearOperator<T>,
    preconditioner: &dyn Preconditioner<T>,
    vectors: CgVectors<'_, T>,
    start: &SolveStart,
    rule: &mut dyn StoppingRule,
    workspace: &mut Workspace<T>,
    mut snapshots: Option<&mut (dyn Snapshots<T> + '_)>,
    observe: &mut dyn FnMut(&IterationRecord, &[T]),
) -> Result<CgOutcome, OperatorError> {
    let CgVectors { d, r, p, q, z } = vectors;
    let threading = workspace.threading;
    let plain = preconditioner.is_identity();
    let started = Instant::now();
    let relative = |norm: f64| if norm == 0.0 { 0.0 } else { norm / start.rhs_norm };
    rule.start(start);
    let mut before = match &mut snapshots {
        Some(snapshots) => snapshots.restore(start, [&mut *d, &mut *r, &mut *p])?,
        None => None,
    };
    // What a rule says of the steps before is what it said then, but for those that look at a clock or a flag.
    let mut stopped = None;
    let (mut rr, mut rho, mut step) =
        match before.as_mut().and_then(|state| Some((state.steps.pop()?, state))) {
            Some((last, state)) => {
                rule.resumed(state.elapsed);
                for step in &state.steps {
                    observe(step, d);
                    stopped = stopped.or(rule.check(step));
                }
                (state.rr, state.rho, last)
            }
            None => {
                d.fill(T::default());
                let rr = vector::dot(r, r, threading);
                let rho = if plain {
                    p.copy_from_slice(r);
                    rr
                } else {
                    preconditioner.apply_inverse(r, z, workspace)?;
                    p.copy_from_slice(z);
                    vector::dot(r, z, threading)
                };
                let step = IterationRecord {
                    iteration: 0,
                    residual_norm: rr.sqrt(),
                    relative_residual: relative(rr.sqrt()),
                    preconditioned_norm: rho.max(0.0).sqrt(),
                    decrease: 0.0,
                    total_decrease: 0.0,
                };
                (rr, rho, step)
            }
        };
    observe(&step, d);
    let mut state = before.unwrap_or_default();
    let elapsed_before = state.elapsed;
    if snapshots.is_some() {
        state.steps.push(step);
    }

    let stop = loop {
        if !rr.is_finite() || !rho.is_finite() {
            break StopReason::NotFinite;
        }
        if rr == 0.0 {
            break StopReason::Solved;
        }
        if let Some(reason) = stopped.or_else(|| rule.check(&step)) {
            if let (StopReason::Cancelled, Some(snapshots)) = (reason, &mut snapshots) {
                snapshots.offer(start, &state, [&*d, &*r, &*p], true)?;
            }
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
        if let Some(snapshots) = &mut snapshots {
            state.steps.push(step);
            (state.rr, state.rho, state.elapsed) = (rr, rho, elapsed_before + started.elapsed());
            snapshots.offer(start, &state, [&*d, &*r, &*p], false)?;
        }
    };
    Ok(CgOutcome {
        stop,
        iterations: step.iteration,
        relative_residual: step.relative_residual,
        total_decrease: step.total_decrease,
    })
}
