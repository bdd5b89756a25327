//! Conjugate gradients on a whole block: builds the operator the memory plan asks for, the right-hand side, and checks
//! the result against the models themselves.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::diagonal::DiagonalSystem;
use super::direct::read_difference;
use super::kfac::{kronecker_kind, power_of_two_scale, solve_kfac};
use super::lift::{Lifts, Repair, Repairs};
use super::snapshots::Keeper;
use super::terms::gram_factor;
use super::{GramKind, Inputs, Iteration, MergeError, Solve, SolveModel, SolverChoice, Tally};
use crate::config::PreconditionerKind;
use crate::kernel::{Buffer, Real, Threading, vector};
use crate::operator::{
    BlockShape, Damped, Diagonal, Factor, GramSum, GramTerm, LinearOperator, OperatorError, OperatorSum,
    Workspace,
};
use crate::precond::{
    Jacobi, Kronecker, KroneckerKind, NoPreconditioner, Preconditioner, Rotated, Scaling, Side,
};
use crate::report::{SetupReport, StepReport};
use crate::solve::{
    Any, Cancelled, CgVectors, IterationRecord, MaxIterations, ObjectiveDecrease, PreconditionedResidual,
    RelativeResidual, SolveStart, Stagnation, StopReason, TimeLimit, conjugate_gradients_from,
};
use crate::write::SolvePlace;

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
    /// The basis with the factors in it that was made last, and what it was made of: one is what the plan counts.
    side: Option<(String, Side<f32>)>,
    /// In a sweep: names the system that all of this belongs to, of whatever tensor.
    system: Option<String>,
    /// In a sweep: what the variants of one tensor share beside that.
    variants: Option<SharedByVariants>,
}

/// What one tensor's variants share whose systems differ in the ridge and the solver alone.
#[derive(Default)]
struct SharedByVariants {
    /// Held output factors, by model.
    output_factors: HashMap<usize, Factor<f32>>,
    /// As `SharedFactors::side`, of the output.
    output_side: Option<(String, Side<f32>)>,
    start: Option<KeptStart>,
}

/// What a solve starts from, scaled as the operator: the ridge is no part of it.
pub(super) struct KeptStart {
    /// `Σ Cᵢ(θᵢ-x₀)`.
    residual: Buffer<f32>,
    objective: f64,
    rhs_norm: f64,
}

impl SharedFactors {
    /// The next solves are of variants of one tensor whose systems are named so. Factors of another system make room.
    pub(super) fn begin_variants(&mut self, system: &str) {
        if self.system.as_ref().is_some_and(|known| known != system) {
            *self = Self::default();
        }
        self.system = Some(system.to_owned());
        self.variants.get_or_insert_default();
    }

    /// The tensor is done; what other tensors share with it stays.
    pub(super) fn end_variants(&mut self) {
        self.variants = None;
    }

    /// Where the variants' start is kept, if these are variants.
    pub(super) fn kept_start(&mut self) -> Option<&mut Option<KeptStart>> {
        self.variants.as_mut().map(|variants| &mut variants.start)
    }

    /// As [`SharedFactors::side`], of the output: only variants share it.
    pub(super) fn output_side(&mut self, key: &str) -> Option<Side<f32>> {
        let kept = &mut self.variants.as_mut()?.output_side;
        kept.take_if(|(known, _)| known != key);
        kept.as_ref().map(|(_, side)| side.clone())
    }

    /// As [`SharedFactors::keep_side`], of the output.
    pub(super) fn keep_output_side(&mut self, key: String, side: &Side<f32>) {
        if let Some(variants) = &mut self.variants {
            variants.output_side = Some((key, side.clone()));
        }
    }

    /// An output factor that is held for the other variants, or loaded for one solve.
    pub(super) fn output_factor(
        &mut self,
        model: usize,
        hold: bool,
        load: impl FnOnce() -> Result<Factor<f32>, OperatorError>,
    ) -> Result<Factor<f32>, OperatorError> {
        let Some(variants) = self.variants.as_mut().filter(|_| hold) else { return load() };
        if let Some(factor) = variants.output_factors.get(&model) {
            return Ok(factor.clone());
        }
        let factor = load()?;
        variants.output_factors.insert(model, factor.clone());
        Ok(factor)
    }

    /// The input side of a preconditioner, if this very one was made last. Another one is dropped: its successor takes
    /// its place in memory.
    pub(super) fn side(&mut self, key: &str) -> Option<Side<f32>> {
        self.side.take_if(|(known, _)| known != key);
        self.side.as_ref().map(|(_, side)| side.clone())
    }

    /// Keeps an input side for the next tensor.
    pub(super) fn keep_side(&mut self, key: String, side: Side<f32>) {
        self.side = Some((key, side));
    }

    /// An input factor that is held for the other tensors of the unit, or loaded for one.
    pub(super) fn input_factor(
        &mut self,
        key: (usize, String, u64),
        hold: bool,
        load: impl FnOnce() -> Result<Factor<f32>, OperatorError>,
    ) -> Result<Factor<f32>, OperatorError> {
        if let Some(factor) = self.factors.get(&key) {
            return Ok(factor.clone());
        }
        let factor = load()?;
        if hold {
            self.factors.insert(key, factor.clone());
        }
        Ok(factor)
    }
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
    /// How the system was made positive definite, if it was not.
    pub repair: Repair,
    /// One entry a step, the first before any.
    pub history: Vec<StepReport>,
}

/// Sees every iteration of an f32 solve, and the displacement it has come to.
pub type Watch<'w> = dyn Fn(&IterationRecord, &[f32]) + Sync + 'w;

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
    /// Quantities of the whole model, where the start's method has such.
    pub known: Option<&'a super::elementwise::Known>,
    /// Sees every iteration.
    pub observe: &'a (dyn Fn(&IterationRecord) + Sync),
    /// A sweep hands iterates on.
    pub watch: Option<&'a Watch<'a>>,
    /// Sees every piece that a start's method merges, before it is merged.
    pub piece: Option<&'a SeePiece<'a>>,
    /// Where states of its solves are kept, if they take long.
    pub snapshots: Option<SolvePlace<'a>>,
}

/// Takes a piece of a method's merge, from many threads.
pub type SeePiece<'a> = dyn Fn(&super::elementwise::Piece<'_>) -> Result<(), super::MergeError> + Sync + 'a;

impl BlockContext<'_> {
    /// # Errors
    /// [`MergeError::Cancelled`] once the run is being stopped.
    pub fn check_cancelled(&self) -> Result<(), MergeError> {
        if self.cancel.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(MergeError::Cancelled);
        }
        Ok(())
    }
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
    let SolverChoice::Iterative(iteration) = &solve.solver else {
        unreachable!("direct systems are solved elsewhere")
    };
    match solve.system {
        super::System::Identity | super::System::FisherDiagonal => {
            solve_diagonal(context, solve, iteration, x0, d)
        }
        super::System::Gram(kind) => solve_gram(context, solve, iteration, kind, x0, d),
        super::System::Kfac => solve_kfac(context, solve, iteration, memory, x0, d, shared),
    }
}

pub(super) fn zero_operator() -> SolveOutcome {
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

fn solve_gram(
    context: &BlockContext<'_>,
    solve: &Solve,
    iteration: &Iteration,
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
    let forms = forms_sum(shape, terms.iter().map(|t| &t.a), iteration.max_iterations);
    let shift = solve.ridge * mean * scale;
    let started = Instant::now();
    let made = match kronecker_kind(iteration.preconditioner) {
        None => None,
        Some(kind) => {
            let factors: Vec<_> = terms.iter().map(|t| (t.weight, &t.a)).collect();
            let failed = |error| MergeError::preconditioner(tensor, error);
            // One factor, no output side: every basis but Cholesky's is the eigenbasis.
            let (kind, a) = match kind {
                KroneckerKind::Cholesky => {
                    (kind, Side::cholesky_of(&factors, shift, threading).map_err(failed)?)
                }
                _ => (KroneckerKind::Eigen, Side::eigen(&factors, false, threading).map_err(failed)?),
            };
            let g = Side::identity(m, factors.len());
            Some(Kronecker::of_sides(kind, shape, a, g, &vec![1.0; factors.len()], shift, threading)?)
        }
    };
    let mut operator = GramSum::new(shape, terms)?;
    if forms {
        let mut workspace = Workspace::new(operator.scratch_elements(), threading);
        operator.form(&mut workspace)?;
    }
    let preconditioner: Box<dyn Preconditioner<f32>> = match made {
        Some(kronecker) => Box::new(kronecker),
        None if iteration.preconditioner == Some(PreconditionerKind::Jacobi) => {
            Box::new(Jacobi::new(&Damped::new(&operator, shift))?)
        }
        None => Box::new(NoPreconditioner),
    };
    let setup = setup_report(preconditioner.as_ref(), started);
    let conditioned = Conditioned::Applied(preconditioner);
    let system =
        System { operator: &mut operator, models: &models, conditioned, setup, scale, shift, kept: None };
    iterate(context, iteration, system, x0, d)
}

/// What making a preconditioner took since `started`; nothing where there is none.
pub(super) fn setup_report(
    preconditioner: &dyn Preconditioner<f32>,
    started: Instant,
) -> Option<SetupReport> {
    let cost = preconditioner.setup_cost();
    let seconds = started.elapsed().as_secs_f64();
    (!preconditioner.is_identity()).then_some(SetupReport { seconds, flops: cost.flops, bytes: cost.bytes })
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
    iteration: &Iteration,
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
    let started = Instant::now();
    // A system without coupling is its own diagonal.
    let preconditioner: Box<dyn Preconditioner<f32>> = match iteration.preconditioner {
        None | Some(PreconditionerKind::None) => Box::new(NoPreconditioner),
        Some(_) => Box::new(Jacobi::new(&Damped::new(&operator, shift))?),
    };
    let setup = setup_report(preconditioner.as_ref(), started);
    let (mut outcome, q) =
        run(context, iteration, &operator, preconditioner.as_ref(), &start, &mut r, d, &mut workspace)?;
    outcome.detail.setup = setup;
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

/// How a system is preconditioned.
pub(super) enum Conditioned {
    /// At every step.
    Applied(Box<dyn Preconditioner<f32>>),
    /// Moved into bases in which it is a division.
    Rotated(Box<Rotated<f32>>, Scaling<f32>),
}

impl Conditioned {
    pub fn preconditioner(&self) -> &dyn Preconditioner<f32> {
        match self {
            Self::Applied(preconditioner) => preconditioner.as_ref(),
            Self::Rotated(_, scaling) => scaling,
        }
    }

    /// For a larger ridge, and lifted factors.
    fn damp(&mut self, shift: f64, lifts: &Lifts, threading: Threading) {
        match self {
            Self::Applied(preconditioner) => {
                preconditioner.damp(shift, &lifts.input, &lifts.output, threading);
            }
            Self::Rotated(rotated, scaling) => {
                rotated.lift(&lifts.terms, &lifts.input, &lifts.output);
                *scaling = rotated.scaling(shift, threading);
            }
        }
    }
}

/// One linear system in f32.
pub(super) struct System<'s> {
    pub operator: &'s mut dyn OperatorSum<f32>,
    /// In the order of the operator's terms.
    pub models: &'s [SolveModel],
    pub conditioned: Conditioned,
    pub setup: Option<SetupReport>,
    /// Of the operator.
    pub scale: f64,
    /// μ, scaled as the operator.
    pub shift: f64,
    /// In a sweep, where the start is left for the next variant.
    pub kept: Option<&'s mut Option<KeptStart>>,
}

/// `r ← Σ Cᵢ(θᵢ-x₀)`, from what variants of a sweep share where it is kept. Gives the objective at `x0`, and `‖b‖` in the
/// operator's scaling.
#[allow(clippy::too_many_arguments, reason = "a system, its surroundings and where the residual goes")]
fn begin(
    context: &BlockContext<'_>,
    operator: &dyn OperatorSum<f32>,
    models: &[SolveModel],
    scale: f64,
    x0: &[f32],
    r: &mut [f32],
    kept: Option<&mut Option<KeptStart>>,
    workspace: &mut Workspace<f32>,
) -> Result<(f64, f64), MergeError> {
    if let Some(Some(known)) = &kept {
        r.copy_from_slice(&known.residual);
        return Ok((known.objective, known.rhs_norm));
    }
    let mut p = Buffer::<f32>::zeroed(r.len());
    let objective = residual_at(context, operator, models, x0, r, &mut p, workspace)? / scale;
    operator.apply(x0, &mut p, workspace)?;
    let rhs_norm = vector::squared_norm_of_sum(r, &p, context.threading).sqrt();
    if let Some(kept) = kept {
        let mut residual = Buffer::<f32>::zeroed(r.len());
        residual.copy_from_slice(r);
        *kept = Some(KeptStart { residual, objective, rhs_norm });
    }
    Ok((objective, rhs_norm))
}

/// Right-hand side, iterations, and the truth about the result.
pub(super) fn iterate(
    context: &BlockContext<'_>,
    iteration: &Iteration,
    system: System<'_>,
    x0: &[f32],
    d: &mut [f32],
) -> Result<SolveOutcome, MergeError> {
    let BlockContext { shape, threading, .. } = *context;
    let System { operator, models, mut conditioned, setup, scale, shift, mut kept } = system;
    let scratch = conditioned.preconditioner().scratch_elements();
    let mut workspace = Workspace::new(operator.scratch_elements().max(scratch), threading);
    let mut r = Buffer::<f32>::zeroed(shape.elements());
    let mut repairs = Repairs::of(shift);
    let (mut spent, mut seconds) = (0.0, 0.0);
    let (mut outcome, start, mut p) = loop {
        let (objective_initial, rhs_norm) =
            begin(context, operator, models, scale, x0, &mut r, kept.as_deref_mut(), &mut workspace)?;
        let flops = spent + 3.0 * operator.flops();
        let start = Start { objective_initial, rhs_norm, scale, shift: repairs.shift, flops };
        let preconditioner = conditioned.preconditioner();
        let (mut outcome, p) = match &conditioned {
            Conditioned::Applied(_) => {
                run(context, iteration, operator, preconditioner, &start, &mut r, d, &mut workspace)?
            }
            Conditioned::Rotated(rotated, _) => {
                let mut t = Buffer::<f32>::zeroed(shape.elements());
                rotated.enter(&mut r, &mut t, threading);
                drop(t);
                let operator = rotated.operator();
                let (outcome, mut p) =
                    run(context, iteration, operator, preconditioner, &start, &mut r, d, &mut workspace)?;
                rotated.leave(d, &mut p, threading);
                (outcome, p)
            }
        };
        if f32::first_nonfinite(d).is_some() {
            // A basis beyond f32's range makes NaN of anything: the start is the last good iterate.
            d.fill(0.0);
            outcome.stop = StopReason::NotFinite;
        }
        seconds += outcome.detail.solve_seconds.unwrap_or_default();
        // The paper's plain CG stops where it stops.
        let plain = preconditioner.is_identity();
        let lifts =
            if plain { None } else { repairs.after(&outcome.stop, operator, context, &mut workspace)? };
        let Some(lifts) = lifts else { break (outcome, start, p) };
        spent = outcome.flops;
        operator.lift(&lifts.terms);
        conditioned.damp(repairs.shift, &lifts, threading);
        if repairs.lifted {
            // What variants of a sweep share is the start of the system as it is stored.
            kept = None;
        }
    };
    outcome.detail.solve_seconds = Some(seconds);
    outcome.detail.repair = repairs.made();
    outcome.detail.setup = setup;
    outcome.flops += setup.map_or(0.0, |s| s.flops);
    drop(conditioned);
    let objective = if let Some(Some(known)) = kept {
        // The models need not be read again: Σ Cᵢ(θᵢ-x₀-d) from the kept start and one application to the result.
        operator.apply(d, &mut p, &mut workspace)?;
        r.copy_from_slice(&known.residual);
        vector::axpy(-1.0, &p, &mut r, threading);
        let decrease = vector::dot(d, &known.residual, threading) + vector::dot(d, &r, threading);
        (start.objective_initial - decrease / scale).max(0.0)
    } else {
        let mut x = Buffer::<f32>::zeroed(shape.elements());
        x.copy_from_slice(x0);
        vector::axpy(1.0, d, &mut x, threading);
        residual_at(context, operator, models, &x, &mut r, &mut p, &mut workspace)? / scale
    };
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

/// The rules of an iteration, in the order in which they are asked.
pub(super) fn rules<'c>(iteration: &Iteration, cancel: &'c std::sync::atomic::AtomicBool) -> Any<'c> {
    let stop = iteration.stop;
    let mut rule = Any(vec![Box::new(Cancelled(cancel))]);
    if let Some(tolerance) = stop.objective_decrease {
        rule.0.push(Box::new(ObjectiveDecrease(tolerance)));
    }
    if let Some(tolerance) = stop.preconditioned_residual {
        rule.0.push(Box::new(PreconditionedResidual::new(tolerance)));
    }
    if let Some(tolerance) = stop.relative_residual {
        rule.0.push(Box::new(RelativeResidual(tolerance)));
    }
    if let Some(seconds) = stop.seconds {
        // More than a Duration holds is for ever.
        rule.0.extend(
            Duration::try_from_secs_f64(seconds).ok().map(|limit| Box::new(TimeLimit::new(limit)) as Box<_>),
        );
    }
    if iteration.preconditioner.is_some() {
        let stagnation = Stagnation::of::<f32>();
        rule.0.push(Box::new(match stop.objective_decrease {
            Some(tolerance) => stagnation.or_enough(tolerance),
            None => stagnation,
        }));
    }
    rule.0.push(Box::new(MaxIterations(iteration.max_iterations)));
    rule
}

/// The CG loop itself; gives back a vector for reuse.
#[allow(clippy::too_many_arguments, reason = "a system, its solver and its surroundings")]
fn run(
    context: &BlockContext<'_>,
    iteration: &Iteration,
    operator: &(impl LinearOperator<f32> + ?Sized),
    preconditioner: &dyn Preconditioner<f32>,
    start: &Start,
    r: &mut [f32],
    d: &mut [f32],
    workspace: &mut Workspace<f32>,
) -> Result<(SolveOutcome, Buffer<f32>), MergeError> {
    let threading = context.threading;
    let damped = Damped::new(operator, start.shift);
    let mut p = Buffer::<f32>::zeroed(r.len());
    let mut q = Buffer::<f32>::zeroed(r.len());
    let mut z = Buffer::<f32>::zeroed(if preconditioner.is_identity() { 0 } else { r.len() });
    let residual_norm = vector::dot(r, r, threading).sqrt();
    let solve_start = SolveStart { rhs_norm: start.rhs_norm, residual_norm, unknowns: r.len() };
    let mut rule = rules(iteration, context.cancel);
    let vectors = CgVectors { d, r, p: &mut p, q: &mut q, z: &mut z };
    let mut history = Vec::new();
    let started = Instant::now();
    // What was handed on to a watcher would be handed on again.
    let place = context.snapshots.filter(|_| context.watch.is_none());
    let mut keeper = place.map(|place| Keeper::new(place, iteration.max_iterations, start.shift));
    let outcome = conjugate_gradients_from(
        &damped,
        preconditioner,
        vectors,
        &solve_start,
        &mut rule,
        workspace,
        keeper.as_mut().map(|keeper| keeper as _),
        &mut |step, d| {
            if let Some(watch) = context.watch {
                watch(step, d);
            }
            history.push(StepReport {
                relative_residual: step.relative_residual,
                objective: start.objective_initial - step.total_decrease / start.scale,
            });
            (context.observe)(step);
        },
    )?;
    if let (StopReason::NotPositiveDefinite { .. }, Some(keeper)) = (outcome.stop, &keeper) {
        keeper.discard(&solve_start);
    }
    let before = keeper.map_or(Duration::ZERO, |keeper| keeper.before);
    let solve_seconds = Some((before + started.elapsed()).as_secs_f64());
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
            flops: start.flops + (damped.flops() + preconditioner.flops()) * outcome.iterations as f64,
            detail: SolveDetail {
                preconditioner: (!preconditioner.is_identity()).then(|| preconditioner.name()),
                setup: None,
                solve_seconds,
                repair: Repair::default(),
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
