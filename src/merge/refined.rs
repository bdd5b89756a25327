//! K-FAC merging past what f32 gives: f32 conjugate gradients, f64 residuals, f64 result.

use std::time::Instant;

use super::iterative::{
    BlockContext, IterativeMemory, SharedFactors, SolveDetail, SolveOutcome, residual_at,
};
use super::kfac::KfacSystem;
use super::{Iteration, MergeError, Solve};
use crate::kernel::{Buffer, PANEL, vector};
use crate::operator::{BlockShape, Damped, KroneckerSum, KroneckerTerm, LinearOperator, Workspace};
use crate::report::StepReport;
use crate::solve::refine::refine_displacement;
use crate::solve::{RefineGoal, StopReason};

/// Bytes of f64 buffers that a refined solve holds beside its f32 one: result, displacement, residual, a difference and
/// their sum; panels of the streamed f64 operator.
pub fn memory_bytes(shape: BlockShape) -> u64 {
    let (m, n) = (shape.out_features as u64, shape.in_features as u64);
    let panel = PANEL as u64;
    (5 * m * n + panel.min(m) * n + panel.min(n) * n + 2 * panel.min(m) * m) * 8
}

/// Replaces the initial guess in `x` by the solution of `Σ wᵢ Gᵢ(X-Wᵢ)Aᵢ + μ(X-X₀) = 0`, to the residual that
/// `iteration.stop` asks for.
///
/// # Errors
/// Those of reading; a floor that is met first is an outcome.
pub fn solve_block(
    context: &BlockContext<'_>,
    solve: &Solve,
    iteration: &Iteration,
    memory: IterativeMemory,
    x: &mut [f64],
    shared: &mut SharedFactors,
) -> Result<SolveOutcome, MergeError> {
    let BlockContext { shape, threading, .. } = *context;
    let Some(system) = KfacSystem::load(context, solve, memory, shared)? else {
        return Ok(super::iterative::zero_operator());
    };
    let (conditioned, setup) = system.condition(context, solve, iteration, shared)?;
    let preconditioner = conditioned.preconditioner();
    let KfacSystem { operator, handles, scale, input_scale, shift } = &system;
    let terms = handles
        .iter()
        .map(|(model, a, g)| {
            let (a, g) = (a.load::<f64>(false, threading)?, g.load::<f64>(false, threading)?);
            Ok(KroneckerTerm { weight: model.weight, a, g, diagonals: None })
        })
        .collect::<Result<Vec<_>, MergeError>>()?;
    let wide = KroneckerSum::new(shape, terms)?.scaled(*input_scale, scale / input_scale);
    let models = system.models();
    let mut wide_workspace = Workspace::new(wide.scratch_elements(), threading);
    let scratch = operator.scratch_elements().max(preconditioner.scratch_elements());
    let mut workspace = Workspace::new(scratch, threading);

    let mut d = Buffer::<f64>::zeroed(shape.elements());
    let mut p = Buffer::<f64>::zeroed(shape.elements());
    let mut at = Buffer::<f64>::zeroed(shape.elements());
    // The right-hand side is what is left at x₀ and what the operator makes of x₀.
    let objective_initial =
        residual_at(context, &wide, &models, x, &mut d, &mut p, &mut wide_workspace)? / scale;
    let residual_norm = vector::dot(&d, &d, threading).sqrt();
    wide.apply(x, &mut at, &mut wide_workspace)?;
    let rhs_norm = vector::squared_norm_of_sum(&d, &at, threading).sqrt();
    d.fill(0.0);
    let goal = RefineGoal {
        relative_residual: iteration.stop.relative_residual.unwrap_or(0.0),
        max_iterations: iteration.max_iterations,
    };
    let damped = Damped::new(operator, *shift);
    let mut history = Vec::new();
    let started = Instant::now();
    let (mut objective, mut applied) = (objective_initial, 2.0);
    let outcome = refine_displacement(
        &mut |d: &[f64], r: &mut [f64]| -> Result<(), MergeError> {
            if context.cancel.load(std::sync::atomic::Ordering::Relaxed) {
                return Err(MergeError::Cancelled);
            }
            at.copy_from_slice(x);
            vector::axpy(1.0, d, &mut at, threading);
            objective = residual_at(context, &wide, &models, &at, r, &mut p, &mut wide_workspace)? / scale;
            vector::axpy(-shift, d, r, threading);
            applied += 1.0;
            Ok(())
        },
        rhs_norm,
        &damped,
        preconditioner,
        &mut d,
        goal,
        &mut workspace,
        &mut |step| {
            history.push(StepReport {
                relative_residual: step.relative_residual,
                objective: objective_initial - step.total_decrease / scale,
            });
            (context.observe)(step);
        },
    )?;
    let solve_seconds = Some(started.elapsed().as_secs_f64());
    let stop = if residual_norm == 0.0 { StopReason::Solved } else { outcome.stop };
    vector::axpy(1.0, &d, x, threading);
    Ok(SolveOutcome {
        stop,
        iterations: Some(outcome.iterations),
        initial_relative_residual: Some(if residual_norm == 0.0 { 0.0 } else { residual_norm / rhs_norm }),
        final_relative_residual: Some(outcome.relative_residual),
        objective_initial,
        objective_final: objective + shift / scale * vector::dot(&d, &d, threading),
        flops: setup.map_or(0.0, |s| s.flops)
            + (damped.flops() + preconditioner.flops()) * outcome.iterations as f64
            + wide.flops() * applied,
        detail: SolveDetail {
            preconditioner: (!preconditioner.is_identity()).then(|| preconditioner.name()),
            setup,
            solve_seconds,
            repair: super::lift::Repair::default(),
            history,
        },
    })
}
