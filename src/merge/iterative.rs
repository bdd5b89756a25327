//! Conjugate gradients on a whole block: builds the operator the memory plan asks for, the right-hand side, and checks
//! the result against the models themselves.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use super::diagonal::DiagonalSystem;
use super::direct::read_difference;
use super::resolve::input_factors_key;
use super::terms::{FactorHandle, gram_factor, output_factor};
use super::{GramKind, Inputs, MergeError, Solve, SolveModel, SolverChoice, System, Tally};
use crate::config::PreconditionerKind;
use crate::kernel::{Buffer, PANEL, Real, Threading, mat, mat_mut, panels, vector};
use crate::operator::{
    BlockShape, Damped, Diagonal, Factor, GramSum, GramTerm, KroneckerSum, KroneckerTerm, LinearOperator,
    OperatorSum, Workspace,
};
use crate::precond::{Basis, Jacobi, Kronecker, NoPreconditioner, Preconditioner};
use crate::report::{SetupReport, StepReport};
use crate::solve::eigen::Eigen;
use crate::solve::{
    Any, Cancelled, CgVectors, IterationRecord, MaxIterations, ObjectiveDecrease, RelativeResidual,
    SolveStart, StopReason, conjugate_gradients,
};

/// What the memory plan settled for one iterative solve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IterativeMemory {
    /// Keep the input factors widened to f32.
    pub hold_a: bool,
    /// Keep the output factors widened to f32.
    pub hold_g: bool,
}

/// What several tensors of a unit share on their input side.
#[derive(Default)]
pub struct SharedFactors {
    /// Held factors, by model, key and off-diagonal scaling.
    factors: HashMap<(usize, String, u64), Factor<f32>>,
    /// The eigenbasis of their weighted sum, by those and the weights.
    bases: HashMap<String, Diagonalised>,
}

/// An eigenbasis of `Σ wᵢCᵢ`, and the diagonal of each `wᵢCᵢ` in it.
#[derive(Clone)]
struct Diagonalised {
    basis: Arc<Basis<f32>>,
    diagonals: Arc<Vec<Vec<f64>>>,
}

/// What the report says of one solve.
#[derive(Debug, Clone, PartialEq)]
pub struct SolveOutcome {
    /// Why it ended.
    pub stop: StopReason,
    /// CG steps, where there are any.
    pub iterations: Option<usize>,
    /// `‖b - A·θ₀‖ / ‖b‖`.
    pub initial_relative_residual: Option<f64>,
    /// `‖b - A·θ‖ / ‖b‖`, recomputed from θ.
    pub final_relative_residual: Option<f64>,
    /// `Σ wᵢ‖θ₀-θᵢ‖²_Cᵢ`.
    pub objective_initial: f64,
    /// The same at θ, plus `μ‖θ-θ₀‖²`.
    pub objective_final: f64,
    /// Flops spent in operators.
    pub flops: f64,
    /// How it went.
    pub detail: SolveDetail,
}

/// How a solve went: empty where it has no steps and no setup.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SolveDetail {
    /// As written in a config.
    pub preconditioner: Option<&'static str>,
    /// What preconditioner or factorisation took.
    pub setup: Option<SetupReport>,
    /// In the iterations.
    pub solve_seconds: Option<f64>,
    /// One entry a step, the first before any.
    pub history: Vec<StepReport>,
}

/// One block's data and surroundings.
pub struct BlockContext<'a> {
    /// Where values come from.
    pub inputs: &'a Arc<Inputs>,
    /// Parameter name.
    pub tensor: &'a str,
    /// Its shape as a matrix.
    pub shape: BlockShape,
    /// One thread, or all of the pool.
    pub threading: Threading,
    /// Counts bytes.
    pub tally: &'a Tally,
    /// Raised to stop the run.
    pub cancel: &'a std::sync::atomic::AtomicBool,
    /// Sees every iteration.
    pub observe: &'a (dyn Fn(&IterationRecord) + Sync),
}

/// Solves for the displacement `d` from `x0`, both `[out, in]`.
///
/// # Errors
/// Those of reading; a breakdown is an outcome.
pub fn solve_block(
    context: &BlockContext<'_>,
    solve: &Solve,
    memory: IterativeMemory,
    x0: &[f32],
    d: &mut [f32],
    shared: &mut SharedFactors,
) -> Result<SolveOutcome, MergeError> {
    match solve.system {
        System::Identity | System::FisherDiagonal => solve_diagonal(context, solve, x0, d),
        System::Gram(kind) => solve_gram(context, solve, kind, x0, d),
        System::Kfac => solve_kfac(context, solve, memory, x0, d, shared),
    }
}

/// A power of two near `1/mean`: gradient Grams of 1e-12 and smaller stay inside f32, and scaling is exact.
pub(super) fn power_of_two_scale(mean: f64) -> f64 {
    if mean > 0.0 && mean.is_finite() { (-mean.log2().round()).clamp(-1000.0, 1000.0).exp2() } else { 1.0 }
}

fn zero_operator() -> SolveOutcome {
    SolveOutcome {
        stop: StopReason::ZeroOperator,
        iterations: Some(0),
        initial_relative_residual: Some(0.0),
        final_relative_residual: Some(0.0),
        objective_initial: 0.0,
        objective_final: 0.0,
        flops: 0.0,
        detail: SolveDetail::default(),
    }
}

fn solve_kfac(
    context: &BlockContext<'_>,
    solve: &Solve,
    memory: IterativeMemory,
    x0: &[f32],
    d: &mut [f32],
    shared: &mut SharedFactors,
) -> Result<SolveOutcome, MergeError> {
    let BlockContext { inputs, tensor, shape, threading, .. } = *context;
    let (m, n) = (shape.out_features, shape.in_features);
    let handles = kfac_handles(context, solve)?;
    let mean = mean_diagonal(shape, &handles);
    if mean == 0.0 {
        d.fill(0.0);
        return Ok(zero_operator());
    }
    let scale = power_of_two_scale(mean);
    let input_scale = input_scale(shape, &handles);
    let needs_diagonals = matches!(
        solve.solver,
        SolverChoice::Iterative { preconditioner: Some(PreconditionerKind::Jacobi), .. }
    );
    let mut models = Vec::new();
    let mut terms = Vec::new();
    for (model, a, g) in handles {
        if a.trace() * g.trace() == 0.0 {
            continue;
        }
        let diagonals = needs_diagonals.then(|| (a.diagonal(), g.diagonal()));
        let key = super::terms::shared_key(inputs, &model, tensor);
        let a = match shared.factors.get(&key) {
            Some(factor) => factor.clone(),
            None => {
                let factor = a.load(memory.hold_a, threading)?;
                if memory.hold_a {
                    shared.factors.insert(key, factor.clone());
                }
                factor
            }
        };
        let g = g.load(memory.hold_g, threading)?;
        terms.push(KroneckerTerm { weight: model.weight, a, g, diagonals });
        models.push(model);
    }
    let shift = solve.ridge * mean * scale;
    let preconditioner = if wants_kronecker(solve) {
        let a: Vec<_> = terms.iter().map(|t| (t.weight * input_scale, &t.a)).collect();
        let g: Vec<_> = terms.iter().map(|t| (t.weight * scale / input_scale, &t.g)).collect();
        let key = input_factors_key(inputs, tensor, solve).unwrap_or_default();
        let weights: Vec<f64> = a.iter().map(|(weight, _)| *weight).collect();
        let key = format!("{key} {weights:?}");
        let known = shared.bases.get(&key).cloned();
        let input = || known.map_or_else(|| eigenbasis(context, &a, n), Ok);
        let output = || eigenbasis(context, &g, m);
        let (a, g) = match threading {
            Threading::Sequential => (input(), output()),
            Threading::Parallel => rayon::join(input, output),
        };
        let (a, g) = (a?, g?);
        shared.bases.insert(key, a.clone());
        // Either side has the weights in its diagonals.
        let once: Vec<f64> = terms.iter().map(|t| 1.0 / t.weight).collect();
        let diagonal = outer_sum(shape, &once, &g.diagonals, &a.diagonals, shift);
        Some(Kronecker::new(shape, Some(a.basis), Some(g.basis), diagonal)?)
    } else {
        None
    };
    let operator = KroneckerSum::new(shape, terms)?.scaled(input_scale, scale / input_scale);
    iterate(context, solve, &operator, preconditioner, &models, shift, scale, x0, d)
}

/// Factors of every model, scanned.
pub(super) fn kfac_handles(
    context: &BlockContext<'_>,
    solve: &Solve,
) -> Result<Vec<(SolveModel, FactorHandle, FactorHandle)>, MergeError> {
    let BlockContext { inputs, tensor, shape, tally, .. } = *context;
    let (m, n) = (shape.out_features, shape.in_features);
    solve
        .models
        .iter()
        .map(|model| {
            let a = gram_factor(inputs, model, tensor, GramKind::Input, m, n, tally)?;
            let g = output_factor(inputs, model, tensor, tally)?;
            Ok((model.clone(), a, g))
        })
        .collect()
}

/// Mean of the diagonal of `Σ wᵢ Gᵢ⊗Aᵢ`.
pub(super) fn mean_diagonal(shape: BlockShape, handles: &[(SolveModel, FactorHandle, FactorHandle)]) -> f64 {
    handles.iter().map(|(model, a, g)| model.weight * a.trace() * g.trace()).sum::<f64>()
        / shape.elements().max(1) as f64
}

/// A power of two near one over the mean diagonal of the `Aᵢ`.
pub(super) fn input_scale(shape: BlockShape, handles: &[(SolveModel, FactorHandle, FactorHandle)]) -> f64 {
    let traces: f64 = handles.iter().map(|(_, a, _)| a.trace()).sum();
    power_of_two_scale(traces / (shape.in_features * handles.len()).max(1) as f64)
}

fn solve_gram(
    context: &BlockContext<'_>,
    solve: &Solve,
    kind: GramKind,
    x0: &[f32],
    d: &mut [f32],
) -> Result<SolveOutcome, MergeError> {
    let BlockContext { inputs, tensor, shape, threading, tally, .. } = *context;
    let (m, n) = (shape.out_features, shape.in_features);
    let mut handles = Vec::new();
    for model in &solve.models {
        handles.push((model.clone(), gram_factor(inputs, model, tensor, kind, m, n, tally)?));
    }
    let mean = handles.iter().map(|(model, a)| model.weight * a.trace()).sum::<f64>() / n.max(1) as f64;
    if mean == 0.0 {
        d.fill(0.0);
        return Ok(zero_operator());
    }
    let scale = power_of_two_scale(mean);
    let mut models = Vec::new();
    let mut terms = Vec::new();
    for (model, a) in handles.into_iter().filter(|(_, a)| a.trace() > 0.0) {
        let diagonal = Some(a.diagonal());
        terms.push(GramTerm { weight: model.weight * scale, a: a.load(false, threading)?, diagonal });
        models.push(model);
    }
    let SolverChoice::Iterative { max_iterations, .. } = solve.solver else {
        unreachable!("direct systems are solved elsewhere")
    };
    let forms = forms_sum(shape, terms.iter().map(|t| &t.a), max_iterations);
    let shift = solve.ridge * mean * scale;
    let preconditioner = if wants_kronecker(solve) {
        let a: Vec<_> = terms.iter().map(|t| (t.weight, &t.a)).collect();
        let a = eigenbasis(context, &a, n)?;
        let ones = vec![vec![1.0; m]; a.diagonals.len()];
        let diagonal = outer_sum(shape, &vec![1.0; a.diagonals.len()], &ones, &a.diagonals, shift);
        Some(Kronecker::new(shape, Some(a.basis), None, diagonal)?)
    } else {
        None
    };
    let mut operator = GramSum::new(shape, terms)?;
    if forms {
        let mut workspace = Workspace::new(operator.scratch_elements(), threading);
        operator.form(&mut workspace)?;
    }
    iterate(context, solve, &operator, preconditioner, &models, shift, scale, x0, d)
}

/// Whether one `S` for all iterations costs less than applying each term, forming included.
fn forms_sum<'f>(
    shape: BlockShape,
    factors: impl Iterator<Item = &'f Factor<f32>>,
    iterations: usize,
) -> bool {
    let (m, n, k) = (shape.out_features as f64, shape.in_features as f64, iterations as f64 + 1.0);
    let (mut by_terms, mut forming) = (0.0, 0.0);
    for factor in factors {
        by_terms += k * factor.flops(shape.out_features);
        // A symmetric product costs half; a stored Gram only an addition.
        forming += factor.flops(1) / (4.0 * n) * 0.5 * 2.0 * n * n;
        if matches!(factor, Factor::Symmetric(_)) {
            forming = 0.0;
        }
    }
    forming + k * 2.0 * m * n * n <= by_terms
}

fn solve_diagonal(
    context: &BlockContext<'_>,
    solve: &Solve,
    x0: &[f32],
    d: &mut [f32],
) -> Result<SolveOutcome, MergeError> {
    let BlockContext { inputs, tensor, shape, threading, tally, .. } = *context;
    let system = DiagonalSystem::new(inputs, solve, tensor);
    let mean = system.mean_diagonal(shape.elements(), tally)?;
    if mean == 0.0 {
        d.fill(0.0);
        return Ok(zero_operator());
    }
    let scale = power_of_two_scale(mean);
    let mut r = Buffer::<f32>::zeroed(shape.elements());
    let mut diagonal = Buffer::<f32>::zeroed(shape.elements());
    let (objective, rhs_squared) =
        system.residual(inputs, tensor, scale, x0, &mut r, &mut diagonal, tally)?;
    let operator = Diagonal::new(shape, vec![diagonal])?;
    let shift = solve.ridge * mean * scale;
    let start = Start {
        objective_initial: objective,
        rhs_norm: rhs_squared.sqrt() * scale,
        scale,
        shift,
        flops: 0.0,
    };
    let mut workspace = Workspace::new(0, threading);
    let (outcome, q) = run(context, solve, &operator, None, &start, &mut r, d, &mut workspace)?;
    // The true residual costs one more pass over the models.
    let x: Vec<f32> = x0.iter().zip(&*d).map(|(x, d)| x + d).collect();
    let mut discard = q;
    let (objective, _) = system.residual(inputs, tensor, scale, &x, &mut r, &mut discard, tally)?;
    Ok(finish(outcome, &start, objective, &mut r, d, threading))
}

/// What the right-hand side tells.
struct Start {
    objective_initial: f64,
    /// Scaled, as the operator.
    rhs_norm: f64,
    scale: f64,
    shift: f64,
    flops: f64,
}

#[allow(clippy::too_many_arguments, reason = "the pieces of one linear system")]
fn iterate(
    context: &BlockContext<'_>,
    solve: &Solve,
    operator: &dyn OperatorSum<f32>,
    preconditioner: Option<Kronecker<f32>>,
    models: &[SolveModel],
    shift: f64,
    scale: f64,
    x0: &[f32],
    d: &mut [f32],
) -> Result<SolveOutcome, MergeError> {
    let BlockContext { shape, threading, .. } = *context;
    let scratch = preconditioner.as_ref().map_or(0, |p| p.scratch_elements());
    let mut workspace = Workspace::new(operator.scratch_elements().max(scratch), threading);
    let mut r = Buffer::<f32>::zeroed(shape.elements());
    let mut p = Buffer::<f32>::zeroed(shape.elements());
    let mut q = Buffer::<f32>::zeroed(shape.elements());
    let objective_initial =
        residual_at(context, operator, models, x0, &mut r, &mut p, &mut workspace)? / scale;
    operator.apply(x0, &mut q, &mut workspace)?;
    let rhs_norm = vector::squared_norm_of_sum(&r, &q, threading).sqrt();
    drop((p, q));
    let start = Start { objective_initial, rhs_norm, scale, shift, flops: 3.0 * operator.flops() };
    let (outcome, mut p) = run(context, solve, operator, preconditioner, &start, &mut r, d, &mut workspace)?;
    let mut x = Buffer::<f32>::zeroed(shape.elements());
    x.copy_from_slice(x0);
    vector::axpy(1.0, d, &mut x, threading);
    let objective = residual_at(context, operator, models, &x, &mut r, &mut p, &mut workspace)? / scale;
    Ok(finish(outcome, &start, objective, &mut r, d, threading))
}

/// `r ← Σ Cᵢ(θᵢ - x)`, and the objective `Σ ⟨θᵢ-x, Cᵢ(θᵢ-x)⟩`, both in the operator's scaling: one application, term by
/// term. `p` is scratch.
pub(super) fn residual_at<T: Real>(
    context: &BlockContext<'_>,
    operator: &dyn OperatorSum<T>,
    models: &[SolveModel],
    x: &[T],
    r: &mut [T],
    p: &mut [T],
    workspace: &mut Workspace<T>,
) -> Result<f64, MergeError> {
    let BlockContext { inputs, tensor, threading, tally, .. } = *context;
    let mut objective = 0.0;
    r.fill(T::default());
    for (term, model) in models.iter().enumerate() {
        let meta = inputs
            .tensor(model.source, tensor)
            .expect("a recipe names a checkpoint only where it has the tensor");
        read_difference(inputs, model.source, meta, 0, x, p, threading, tally)?;
        let before = vector::dot(p, r, threading);
        operator.accumulate_term(term, p, r, workspace)?;
        objective += vector::dot(p, r, threading) - before;
    }
    Ok(objective)
}

fn wants_kronecker(solve: &Solve) -> bool {
    matches!(
        solve.solver,
        SolverChoice::Iterative { preconditioner: Some(PreconditionerKind::Kronecker), .. }
    )
}

/// Diagonalises `Σ wᵢCᵢ`.
///
/// Cost: one f32 eigendecomposition and one product a model. Memory while it runs: `4·side²` f32.
fn eigenbasis(
    context: &BlockContext<'_>,
    factors: &[(f64, &Factor<f32>)],
    side: usize,
) -> Result<Diagonalised, MergeError> {
    let threading = context.threading;
    let need = factors.iter().map(|(_, f)| f.add_scratch()).max().unwrap_or(0);
    let basis = {
        let mut sum = Buffer::<f32>::zeroed(side * side);
        let mut scratch = Buffer::<f32>::zeroed(need);
        for (weight, factor) in factors {
            factor.add_to(&mut sum, *weight, &mut scratch, threading)?;
        }
        drop(scratch);
        let failed = |source| MergeError::Eigen { tensor: context.tensor.to_owned(), source };
        let eigen = Eigen::<f32>::of(mat(&sum, side, side)).map_err(failed)?;
        drop(sum);
        Basis::new(eigen.vectors, side, threading)
    };
    let need = factors.iter().map(|(_, f)| f.right_scratch(PANEL.min(side))).max().unwrap_or(0);
    let mut scratch = Buffer::<f32>::zeroed(need);
    let mut tile = Buffer::<f32>::zeroed(PANEL.min(side) * side);
    let mut diagonals = Vec::with_capacity(factors.len());
    for (weight, factor) in factors {
        let mut diagonal = Vec::with_capacity(side);
        for rows in panels(side) {
            let q = &basis.rows()[rows.start * side..rows.end * side];
            let out = mat_mut(&mut tile, rows.len(), side);
            factor.right_multiply(mat(q, rows.len(), side), out, false, *weight, &mut scratch, threading)?;
            for (q, c) in q.chunks_exact(side).zip(tile.chunks_exact(side)) {
                diagonal.push(vector::dot(q, c, Threading::Sequential).max(0.0));
            }
        }
        diagonals.push(diagonal);
    }
    Ok(Diagonalised { basis: Arc::new(basis), diagonals: Arc::new(diagonals) })
}

/// `Σ wᵢ gᵢ aᵢᵀ + shift`, row-major `[out, in]`.
fn outer_sum(shape: BlockShape, weights: &[f64], g: &[Vec<f64>], a: &[Vec<f64>], shift: f64) -> Buffer<f32> {
    let mut diagonal = Buffer::<f32>::zeroed(shape.elements());
    for (i, row) in diagonal.chunks_exact_mut(shape.in_features.max(1)).enumerate() {
        for (j, v) in row.iter_mut().enumerate() {
            let sum: f64 = weights.iter().zip(g).zip(a).map(|((w, g), a)| w * g[i] * a[j]).sum();
            *v = (sum + shift) as f32;
        }
    }
    diagonal
}

/// The CG loop itself; gives back a vector for reuse.
#[allow(clippy::too_many_arguments, reason = "a system, its solver and its surroundings")]
fn run(
    context: &BlockContext<'_>,
    solve: &Solve,
    operator: &(impl LinearOperator<f32> + ?Sized),
    kronecker: Option<Kronecker<f32>>,
    start: &Start,
    r: &mut [f32],
    d: &mut [f32],
    workspace: &mut Workspace<f32>,
) -> Result<(SolveOutcome, Buffer<f32>), MergeError> {
    let SolverChoice::Iterative { preconditioner, max_iterations, tolerance, by_objective } = solve.solver
    else {
        unreachable!("direct systems are solved elsewhere")
    };
    let threading = context.threading;
    let damped = Damped::new(operator, start.shift);
    let preconditioner: Box<dyn Preconditioner<f32>> = match (preconditioner, kronecker) {
        (_, Some(kronecker)) => Box::new(kronecker),
        // A system without coupling is its own diagonal.
        (Some(PreconditionerKind::Jacobi | PreconditionerKind::Kronecker), None) => {
            Box::new(Jacobi::new(&damped)?)
        }
        _ => Box::new(NoPreconditioner),
    };
    let mut p = Buffer::<f32>::zeroed(r.len());
    let mut q = Buffer::<f32>::zeroed(r.len());
    let mut z = Buffer::<f32>::zeroed(if preconditioner.is_identity() { 0 } else { r.len() });
    let residual_norm = vector::dot(r, r, threading).sqrt();
    let solve_start = SolveStart { rhs_norm: start.rhs_norm, residual_norm, unknowns: r.len() };
    let mut rule = Any(vec![Box::new(Cancelled(context.cancel))]);
    if by_objective {
        rule.0.push(Box::new(ObjectiveDecrease(tolerance)));
    } else {
        rule.0.push(Box::new(RelativeResidual(tolerance)));
    }
    rule.0.push(Box::new(MaxIterations(max_iterations)));
    let vectors = CgVectors { d, r, p: &mut p, q: &mut q, z: &mut z };
    let mut history = Vec::new();
    let started = Instant::now();
    let outcome = conjugate_gradients(
        &damped,
        preconditioner.as_ref(),
        vectors,
        &solve_start,
        &mut rule,
        workspace,
        &mut |step| {
            history.push(StepReport {
                relative_residual: step.relative_residual,
                objective: start.objective_initial - step.total_decrease / start.scale,
            });
            (context.observe)(step);
        },
    )?;
    let solve_seconds = Some(started.elapsed().as_secs_f64());
    if outcome.stop == StopReason::Cancelled {
        return Err(MergeError::Cancelled);
    }
    let relative = |norm: f64| if norm == 0.0 { 0.0 } else { norm / start.rhs_norm };
    Ok((
        SolveOutcome {
            stop: outcome.stop,
            iterations: Some(outcome.iterations),
            initial_relative_residual: Some(relative(residual_norm)),
            final_relative_residual: Some(outcome.relative_residual),
            objective_initial: start.objective_initial,
            objective_final: start.objective_initial - outcome.total_decrease / start.scale,
            flops: start.flops + damped.flops() * outcome.iterations as f64,
            detail: SolveDetail {
                preconditioner: (!preconditioner.is_identity()).then(|| preconditioner.name()),
                setup: None,
                solve_seconds,
                history,
            },
        },
        p,
    ))
}

/// Puts the true residual and objective in the place of the recurrence's. `r` holds `Σ Cᵢ(θᵢ-x)`.
fn finish(
    mut outcome: SolveOutcome,
    start: &Start,
    objective: f64,
    r: &mut [f32],
    d: &[f32],
    threading: Threading,
) -> SolveOutcome {
    vector::axpy(-start.shift, d, r, threading);
    let norm = vector::dot(r, r, threading).sqrt();
    outcome.final_relative_residual = Some(if norm == 0.0 { 0.0 } else { norm / start.rhs_norm });
    outcome.objective_final = objective + start.shift / start.scale * vector::dot(d, d, threading);
    outcome
}
