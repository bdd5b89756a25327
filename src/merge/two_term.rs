//! K-FAC merging of at most two models, exactly: two generalised eigendecompositions instead of iterations.

use std::time::Instant;

use super::iterative::{BlockContext, SolveDetail, SolveOutcome, residual_at, zero_operator};
use super::kfac::{ModelFactors, kfac_handles, mean_diagonal, power_of_two_scale};
use super::lift::{Lifts, Repairs};
use super::terms::FactorHandle;
use super::{MergeError, Solve, SolveModel};
use crate::kernel::{Buffer, PANEL, Threading, sandwich_scratch, vector};
use crate::operator::{
    BlockShape, Damped, Factor, KroneckerSum, KroneckerTerm, Lift, LinearOperator, OperatorError,
    OperatorSum, Workspace,
};
use crate::precond::Preconditioner;
use crate::report::SetupReport;
use crate::solve::eigen::{Eigen, NoConvergence};
use crate::solve::pencil::{Pencil, TwoTermInverse};
use crate::solve::stop::{DirectMethod, StopReason};
use crate::solve::{
    Any, Cancelled, CgVectors, MaxIterations, RelativeResidual, SolveStart, conjugate_gradients,
};

/// Where a ridge makes the system three terms, CG in the two-term basis is run to this relative residual …
const REFINE_TO: f64 = 1e-10;
/// … or so many steps. On Grams of two language models it takes 60 at a ridge of 1e-4, 100 from 1e-2 on.
const REFINE_STEPS: usize = 200;
/// What storing Grams in f32 leaves in directions that no model has data for may keep the residual above that; above
/// this, the system is not solved.
const REFINED_ENOUGH: f64 = 1e-5;

/// Flops of one solve at most: its set-up, three applications, and with a ridge the steps that are allowed, of two terms and
/// four products with bases each.
pub fn most_flops(shape: BlockShape, ridged: bool) -> f64 {
    let (m, n) = (shape.out_features as f64, shape.in_features as f64);
    let steps = if ridged { 2 * REFINE_STEPS } else { 0 };
    setup_flops(shape) + (3 + steps) as f64 * 4.0 * m * n * (m + n)
}

/// Two decompositions and three products a side.
fn setup_flops(shape: BlockShape) -> f64 {
    24.0 * ((shape.out_features as f64).powi(3) + (shape.in_features as f64).powi(3))
}

/// Bytes of f64 buffers that a two-model solve holds at its peak for `[out, in]`.
pub fn memory_bytes(shape: BlockShape, ridged: bool) -> u64 {
    let (m, n) = (shape.out_features as u64, shape.in_features as u64);
    let side = m.max(n);
    let building = (Eigen::<f64>::SQUARES as u64 + 4) * side * side;
    let vectors = 2 * (m * m + n * n);
    // x, r, d, p, q, z, and the scratch of operator and preconditioner.
    let blocks = 8 * m * n;
    let tile = sandwich_scratch::<f64>(shape.out_features, shape.in_features) as u64;
    let panels = tile + PANEL as u64 * (2 * m + n);
    // x, r, d, p, and what a solution's part in the null space takes.
    let leaving = 4 * m * n + TwoTermInverse::null_space_values(shape.out_features, shape.in_features) as u64;
    let exact = if ridged { 0 } else { leaving + panels };
    (building.max(blocks + panels).max(exact) + vectors + 2 * m * n) * 8
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
    let mut handles = kfac_handles(context, solve)?;
    handles.retain(|(model, a, g)| model.weight * a.trace() * g.trace() > 0.0);
    let mean = mean_diagonal(context.shape, &handles);
    if mean == 0.0 {
        return Ok(SolveOutcome { iterations: None, initial_relative_residual: None, ..zero_operator() });
    }
    let scale = power_of_two_scale(mean);
    let repairs = Repairs::of(solve.ridge * mean * scale);
    let mut system = System { handles, scale, repairs, lifts: Lifts::default() };
    let mut flops = 0.0;
    loop {
        let (mut outcome, refused) = attempt(context, &system, x)?;
        flops += outcome.flops;
        match refused {
            Some(Refused::Lacking(lifts)) => {
                system.repairs.lifted = true;
                system.lifts = lifts;
            }
            Some(Refused::Below(shift)) => system.repairs.raise(shift),
            None => {
                outcome.flops = flops;
                outcome.detail.repair = system.repairs.made();
                return Ok(outcome);
            }
        }
    }
}

/// What is solved.
struct System {
    handles: Vec<ModelFactors>,
    scale: f64,
    /// With μ, scaled.
    repairs: Repairs,
    /// Of the factors; empty where they are taken as stored.
    lifts: Lifts,
}

impl System {
    fn operator(&self, shape: BlockShape, threading: Threading) -> Result<KroneckerSum<f64>, MergeError> {
        let mut terms = Vec::new();
        for (model, a, g) in &self.handles {
            terms.push(KroneckerTerm {
                weight: model.weight * self.scale,
                a: a.load::<f64>(false, threading)?,
                g: g.load::<f64>(false, threading)?,
                diagonals: None,
            });
        }
        let mut operator = KroneckerSum::new(shape, terms)?;
        operator.lift(&self.lifts.terms);
        Ok(operator)
    }

    /// Exact without a ridge. With one, `Σ Gᵢ'⊗Aᵢ'` of K terms has half of it on each side: `Aᵢ' = Aᵢ + π√(μ/K)·I`,
    /// `Gᵢ' = Gᵢ + √(μ/K)/π·I`, of which the last product is μI and those between damp where the other side is strong.
    fn inverse(&self, context: &BlockContext<'_>) -> Result<TwoTermInverse, MergeError> {
        let BlockContext { tensor, shape, threading, .. } = *context;
        let weight = |model: &SolveModel| model.weight * self.scale;
        let traces = self.handles.iter().map(|(model, a, g)| [a.trace(), weight(model) * g.trace()]);
        let [a, g] = traces.fold([0.0, 0.0], |[a, g], [ai, gi]| [a + ai, g + gi]);
        let mean = [a / shape.in_features as f64, g / shape.out_features as f64];
        let root = (self.repairs.shift / self.handles.len() as f64).sqrt();
        let balance = if mean[1] > 0.0 { (mean[0] / mean[1]).sqrt() } else { 1.0 };
        let (mut inputs, mut outputs) = (Vec::new(), Vec::new());
        for (k, (model, a, g)) in self.handles.iter().enumerate() {
            let Lift { input, output } = self.lifts.terms.get(k).copied().unwrap_or_default();
            inputs.push((1.0, a, input + balance * root));
            outputs.push((weight(model), g, output + root / balance / weight(model)));
        }
        let failed = |source| MergeError::Eigen { tensor: tensor.to_owned(), source };
        let a = pencil(&inputs, shape.in_features, threading)?.map_err(failed)?;
        let g = pencil(&outputs, shape.out_features, threading)?.map_err(failed)?;
        Ok(TwoTermInverse::new(a, g))
    }
}

/// Why a system is not solved as it is.
enum Refused {
    /// Its factors lack so much of being positive semidefinite.
    Lacking(Lifts),
    /// It has a direction without curvature: the shift to try.
    Below(f64),
}

/// Solves the system as it is, and leaves `x` alone where it is refused.
fn attempt(
    context: &BlockContext<'_>,
    system: &System,
    x: &mut [f64],
) -> Result<(SolveOutcome, Option<Refused>), MergeError> {
    let BlockContext { shape, threading, .. } = *context;
    let (m, n) = (shape.out_features, shape.in_features);
    let System { handles, scale, repairs, .. } = system;
    let shift = repairs.shift;
    let started = Instant::now();
    let inverse = system.inverse(context)?;
    let setup = SetupReport {
        seconds: started.elapsed().as_secs_f64(),
        flops: setup_flops(shape),
        bytes: 8 * (m * m + n * n) as u64,
    };
    let operator = system.operator(shape, threading)?;
    let mut workspace = Workspace::new(operator.scratch_elements().max(m * n), threading);

    let mut r = Buffer::<f64>::zeroed(m * n);
    let mut p = Buffer::<f64>::zeroed(m * n);
    let models: Vec<_> = handles.iter().map(|(model, _, _)| model.clone()).collect();
    let objective_initial =
        residual_at(context, &operator, &models, x, &mut r, &mut p, &mut workspace)? / scale;
    operator.apply(x, &mut p, &mut workspace)?;
    let rhs_norm = vector::squared_norm_of_sum(&r, &p, threading).sqrt();
    let relative = |norm: f64| if norm == 0.0 { 0.0 } else { norm / rhs_norm };
    let residual_norm = vector::dot(&r, &r, threading).sqrt();
    let mut outcome = SolveOutcome {
        stop: StopReason::Direct(DirectMethod::GeneralisedEigen),
        iterations: None,
        initial_relative_residual: Some(relative(residual_norm)),
        final_relative_residual: None,
        objective_initial,
        objective_final: objective_initial,
        flops: setup.flops + 3.0 * operator.flops(),
        detail: SolveDetail { setup: Some(setup), ..SolveDetail::default() },
    };
    let started = Instant::now();

    let mut d = Buffer::<f64>::zeroed(m * n);
    let preconditioner = InPencils { inverse, elements: m * n };
    let mut refused = None;
    if shift == 0.0 {
        preconditioner.apply_inverse(&r, &mut d, &mut workspace)?;
        let failed = |source| MergeError::Eigen { tensor: context.tensor.to_owned(), source };
        preconditioner.inverse.leave_null_space(&mut d, threading).map_err(failed)?;
    } else {
        let damped = Damped::new(&operator, shift);
        let mut q = Buffer::<f64>::zeroed(m * n);
        let mut z = Buffer::<f64>::zeroed(m * n);
        let start = SolveStart { rhs_norm: residual_norm, residual_norm, unknowns: m * n };
        let mut rule = Any(vec![
            Box::new(Cancelled(context.cancel)),
            Box::new(RelativeResidual(REFINE_TO)),
            Box::new(MaxIterations(REFINE_STEPS)),
        ]);
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
        context.check_cancelled()?;
        outcome.iterations = Some(cg.iterations);
        outcome.flops += damped.flops() * cg.iterations as f64;
        if cg.relative_residual > REFINED_ENOUGH {
            outcome.stop = cg.stop;
            let lifts = if repairs.lifted { None } else { Lifts::of(&operator, context, &mut workspace)? };
            let below = || repairs.next_shift(&cg.stop).map(Refused::Below);
            refused = lifts.map(Refused::Lacking).or_else(below);
        }
    }
    outcome.detail.solve_seconds = Some(started.elapsed().as_secs_f64());
    if refused.is_some() {
        return Ok((outcome, refused));
    }
    vector::axpy(1.0, &d, x, threading);
    let objective = residual_at(context, &operator, &models, x, &mut r, &mut p, &mut workspace)? / scale;
    vector::axpy(-shift, &d, &mut r, threading);
    outcome.final_relative_residual = Some(relative(vector::dot(&r, &r, threading).sqrt()));
    outcome.objective_final = objective + shift / scale * vector::dot(&d, &d, threading);
    Ok((outcome, None))
}

/// The first factor and the sum, dense in f64, made diagonal at once. Of each factor: weight, itself, lift.
fn pencil(
    factors: &[(f64, &FactorHandle, f64)],
    side: usize,
    threading: Threading,
) -> Result<Result<Pencil, NoConvergence>, OperatorError> {
    let mut first = Buffer::<f64>::zeroed(side * side);
    let mut sum = Buffer::<f64>::zeroed(side * side);
    for (k, (weight, handle, lift)) in factors.iter().enumerate() {
        let factor: Factor<f64> = handle.load(false, threading)?;
        let mut scratch = Buffer::<f64>::zeroed(factor.add_scratch());
        factor.add_to(&mut sum, *weight, &mut scratch, threading)?;
        // Here, where a low-rank factor is dense: in its product it could not have it.
        sum.iter_mut().step_by(side + 1).for_each(|diagonal| *diagonal += weight * lift);
        if k == 0 {
            first.copy_from_slice(&sum);
        }
    }
    crate::operator::mirror(&mut first, side);
    crate::operator::mirror(&mut sum, side);
    let unit_roundoff = factors.iter().map(|(_, handle, _)| handle.unit_roundoff()).fold(0.0, f64::max);
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
