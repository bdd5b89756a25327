//! K-FAC merging of at most two models, exactly: two generalised eigendecompositions instead of iterations.

use std::time::Instant;

use super::iterative::{BlockContext, SolveDetail, SolveOutcome, residual_at};
use super::kfac::{kfac_handles, mean_diagonal, power_of_two_scale};
use super::terms::FactorHandle;
use super::{MergeError, Solve};
use crate::kernel::{Buffer, PANEL, Threading, sandwich_scratch, vector};
use crate::operator::{
    BlockShape, Damped, Factor, KroneckerSum, KroneckerTerm, LinearOperator, OperatorError, Workspace,
};
use crate::precond::Preconditioner;
use crate::report::SetupReport;
use crate::solve::eigen::{Eigen, Pencil, TwoTermInverse};
use crate::solve::stop::{DirectMethod, StopReason};
use crate::solve::{Any, CgVectors, MaxIterations, RelativeResidual, SolveStart, conjugate_gradients};

/// Where a ridge makes the system three terms, CG in the two-term basis is run to this relative residual …
const REFINE_TO: f64 = 1e-12;
/// … or so many steps: a handful where the ridge is weak or strong, some tens in between.
const REFINE_STEPS: usize = 200;

/// Bytes of f64 buffers that a two-model solve holds at its peak for `[out, in]`.
pub fn memory_bytes(shape: BlockShape) -> u64 {
    let (m, n) = (shape.out_features as u64, shape.in_features as u64);
    let side = m.max(n);
    let building = (Eigen::<f64>::SQUARES as u64 + 4) * side * side;
    let vectors = 2 * (m * m + n * n);
    // x, r, d, p, q, z, and the scratch of operator and preconditioner.
    let blocks = 8 * m * n;
    let tile = sandwich_scratch::<f64>(shape.out_features, shape.in_features) as u64;
    let panels = tile + PANEL as u64 * (2 * m + n);
    (building.max(blocks + panels) + vectors + 2 * m * n) * 8
}

/// Replaces the initial guess in `x` by the solution of `Σ wᵢ Gᵢ(X-Wᵢ)Aᵢ + μ(X-X₀) = 0`.
///
/// # Errors
/// Those of reading, and [`MergeError::Eigen`] on factors that are not finite.
pub fn solve_block(
    context: &BlockContext<'_>,
    solve: &Solve,
    x: &mut [f64],
) -> Result<SolveOutcome, MergeError> {
    let BlockContext { tensor, shape, threading, .. } = *context;
    let (m, n) = (shape.out_features, shape.in_features);
    let started = Instant::now();
    let handles = kfac_handles(context, solve)?;
    let mean = mean_diagonal(shape, &handles);
    let mut outcome = SolveOutcome {
        stop: StopReason::ZeroOperator,
        iterations: None,
        initial_relative_residual: None,
        final_relative_residual: Some(0.0),
        objective_initial: 0.0,
        objective_final: 0.0,
        flops: 0.0,
        detail: SolveDetail::default(),
    };
    if mean == 0.0 {
        return Ok(outcome);
    }
    let scale = power_of_two_scale(mean);
    let shift = solve.ridge * mean * scale;
    let failed = |source| MergeError::Eigen { tensor: tensor.to_owned(), source };

    let mut terms = Vec::new();
    for (model, a, g) in &handles {
        terms.push(KroneckerTerm {
            weight: model.weight * scale,
            a: a.load::<f64>(false, threading)?,
            g: g.load::<f64>(false, threading)?,
            diagonals: None,
        });
    }
    let a: Vec<_> = handles.iter().map(|(_, a, _)| (1.0, a)).collect();
    let g: Vec<_> = handles.iter().map(|(model, _, g)| (model.weight * scale, g)).collect();
    let a = pencil(&a, n, threading)?.map_err(failed)?;
    let g = pencil(&g, m, threading)?.map_err(failed)?;
    let inverse = TwoTermInverse::new(a, g, shift);
    let (mf, nf) = (m as f64, n as f64);
    let setup = SetupReport {
        seconds: started.elapsed().as_secs_f64(),
        // Two decompositions and three products a side.
        flops: 24.0 * (mf.powi(3) + nf.powi(3)),
        bytes: 8 * (m * m + n * n) as u64,
    };
    let operator = KroneckerSum::new(shape, terms)?;
    let mut workspace = Workspace::new(operator.scratch_elements().max(m * n), threading);

    let mut r = Buffer::<f64>::zeroed(m * n);
    let mut p = Buffer::<f64>::zeroed(m * n);
    let models: Vec<_> = handles.iter().map(|(model, _, _)| model.clone()).collect();
    outcome.objective_initial =
        residual_at(context, &operator, &models, x, &mut r, &mut p, &mut workspace)? / scale;
    operator.apply(x, &mut p, &mut workspace)?;
    let rhs_norm = vector::squared_norm_of_sum(&r, &p, threading).sqrt();
    let relative = |norm: f64| if norm == 0.0 { 0.0 } else { norm / rhs_norm };
    let residual_norm = vector::dot(&r, &r, threading).sqrt();
    outcome.initial_relative_residual = Some(relative(residual_norm));
    outcome.stop = StopReason::Direct(DirectMethod::GeneralisedEigen);
    outcome.flops = setup.flops + 3.0 * operator.flops();
    outcome.detail.setup = Some(setup);
    let started = Instant::now();

    let mut d = Buffer::<f64>::zeroed(m * n);
    let preconditioner = InPencils { inverse, elements: m * n };
    if shift == 0.0 {
        preconditioner.apply_inverse(&r, &mut d, &mut workspace)?;
    } else {
        let damped = Damped::new(&operator, shift);
        let mut q = Buffer::<f64>::zeroed(m * n);
        let mut z = Buffer::<f64>::zeroed(m * n);
        let start = SolveStart { rhs_norm: residual_norm, residual_norm, unknowns: m * n };
        let mut rule =
            Any(vec![Box::new(RelativeResidual(REFINE_TO)), Box::new(MaxIterations(REFINE_STEPS))]);
        let vectors = CgVectors { d: &mut d, r: &mut r, p: &mut p, q: &mut q, z: &mut z };
        let cg = conjugate_gradients(
            &damped,
            &preconditioner,
            vectors,
            &start,
            &mut rule,
            &mut workspace,
            &mut |step, _| (context.observe)(step),
        )?;
        outcome.iterations = Some(cg.iterations);
        outcome.flops += damped.flops() * cg.iterations as f64;
    }
    outcome.detail.solve_seconds = Some(started.elapsed().as_secs_f64());
    vector::axpy(1.0, &d, x, threading);
    let objective = residual_at(context, &operator, &models, x, &mut r, &mut p, &mut workspace)? / scale;
    vector::axpy(-shift, &d, &mut r, threading);
    outcome.final_relative_residual = Some(relative(vector::dot(&r, &r, threading).sqrt()));
    outcome.objective_final = objective + shift / scale * vector::dot(&d, &d, threading);
    Ok(outcome)
}

/// The first factor and the sum, dense in f64, made diagonal at once.
fn pencil(
    factors: &[(f64, &FactorHandle)],
    side: usize,
    threading: Threading,
) -> Result<Result<Pencil, crate::solve::eigen::NoConvergence>, OperatorError> {
    let mut first = Buffer::<f64>::zeroed(side * side);
    let mut sum = Buffer::<f64>::zeroed(side * side);
    for (k, (weight, handle)) in factors.iter().enumerate() {
        let factor: Factor<f64> = handle.load(false, threading)?;
        let mut scratch = Buffer::<f64>::zeroed(factor.add_scratch());
        factor.add_to(&mut sum, *weight, &mut scratch, threading)?;
        if k == 0 {
            first.copy_from_slice(&sum);
        }
    }
    crate::operator::mirror(&mut first, side);
    crate::operator::mirror(&mut sum, side);
    let unit_roundoff = factors.iter().map(|(_, handle)| handle.unit_roundoff()).fold(0.0, f64::max);
    Ok(Pencil::of(&mut first, &mut sum, side, unit_roundoff, threading))
}

/// [`TwoTermInverse`] as a preconditioner.
struct InPencils {
    inverse: TwoTermInverse,
    elements: usize,
}

impl Preconditioner<f64> for InPencils {
    fn name(&self) -> &'static str {
        "generalized"
    }
    fn scratch_elements(&self) -> usize {
        self.elements
    }
    fn apply_inverse(
        &self,
        r: &[f64],
        z: &mut [f64],
        workspace: &mut Workspace<f64>,
    ) -> Result<(), OperatorError> {
        z.copy_from_slice(r);
        let (scratch, threading) = workspace.take(self.elements)?;
        self.inverse.apply(z, scratch, threading);
        Ok(())
    }
}
