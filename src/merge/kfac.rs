//! The K-FAC system of one block: its factors, the operator the memory plan asks for, and its preconditioner.

use std::time::Instant;

use super::iterative::{
    BlockContext, Conditioned, IterativeMemory, SharedFactors, SolveOutcome, System, iterate, setup_report,
    zero_operator,
};
use super::resolve::input_factors_key;
use super::terms::{FactorHandle, gram_factor, output_factor, shared_key};
use super::{GramKind, Inputs, Iteration, MergeError, Solve, SolveModel, SolverChoice};
use crate::config::PreconditionerKind;
use crate::kernel::Threading;
use crate::operator::{BlockShape, Damped, KroneckerSum, KroneckerTerm};
use crate::precond::{Jacobi, Kronecker, KroneckerKind, NoPreconditioner, Rotated, Side, cost};
use crate::report::SetupReport;
use crate::statistics::Kind;

/// One model's part, with its input and output factors scanned.
pub(super) type ModelFactors = (SolveModel, FactorHandle, FactorHandle);

/// A power of two near `1/mean`: gradient Grams of 1e-12 and smaller stay inside f32, and scaling is exact.
pub(super) fn power_of_two_scale(mean: f64) -> f64 {
    if mean > 0.0 && mean.is_finite() { (-mean.log2().round()).clamp(-1000.0, 1000.0).exp2() } else { 1.0 }
}

/// Which Kronecker form a config's preconditioner is, if any.
pub(crate) fn kronecker_kind(preconditioner: Option<PreconditionerKind>) -> Option<KroneckerKind> {
    match preconditioner? {
        PreconditionerKind::None | PreconditionerKind::Jacobi => None,
        PreconditionerKind::Kronecker => Some(KroneckerKind::Eigen),
        PreconditionerKind::KroneckerCholesky => Some(KroneckerKind::Cholesky),
        PreconditionerKind::Generalized => Some(KroneckerKind::Generalized),
        PreconditionerKind::Hybrid => Some(KroneckerKind::Hybrid),
    }
}

/// Whether a K-FAC solve is moved into its eigenbases: see [`cost::rotates`]. Low-rank factors are not, where dense ones
/// would cost more. Known from headers, so that plan and engine agree.
pub(crate) fn rotates(inputs: &Inputs, tensor: &str, solve: &Solve, shape: BlockShape) -> bool {
    let SolverChoice::Iterative(iteration) = solve.solver else { return false };
    let low_rank = |model: &SolveModel| {
        inputs.models[model.model].statistics.as_ref().is_some_and(|s| {
            [Kind::InputFactor, Kind::OutputFactor].iter().any(|kind| s.get(tensor, *kind).is_some())
        })
    };
    iteration.preconditioner == Some(PreconditionerKind::Kronecker)
        && !iteration.refines()
        && !solve.models.iter().any(low_rank)
        && cost::rotates(shape, solve.models.len(), iteration.max_iterations)
}

/// Factors of every model, scanned.
pub(super) fn kfac_handles(
    context: &BlockContext<'_>,
    solve: &Solve,
) -> Result<Vec<ModelFactors>, MergeError> {
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
pub(super) fn mean_diagonal(shape: BlockShape, handles: &[ModelFactors]) -> f64 {
    handles.iter().map(|(model, a, g)| model.weight * a.trace() * g.trace()).sum::<f64>()
        / shape.elements().max(1) as f64
}

/// A power of two near one over the mean diagonal of the `Aᵢ`.
fn input_scale(shape: BlockShape, handles: &[ModelFactors]) -> f64 {
    let traces: f64 = handles.iter().map(|(_, a, _)| a.trace()).sum();
    power_of_two_scale(traces / (shape.in_features * handles.len()).max(1) as f64)
}

/// The operator in f32 with its scalings, and what belongs to it.
pub(super) struct KfacSystem {
    /// `scale · Σ wᵢ Gᵢ⊗Aᵢ`.
    pub operator: KroneckerSum<f32>,
    /// Those with factors that are not zero, in the order of the terms.
    pub handles: Vec<ModelFactors>,
    /// The common scaling.
    pub scale: f64,
    /// Its part on the input side; the rest is on the output side.
    pub input_scale: f64,
    /// μ, scaled.
    pub shift: f64,
}

impl KfacSystem {
    /// `None` where all factors are zero.
    pub fn load(
        context: &BlockContext<'_>,
        solve: &Solve,
        memory: IterativeMemory,
        shared: &mut SharedFactors,
    ) -> Result<Option<Self>, MergeError> {
        let BlockContext { inputs, tensor, shape, threading, .. } = *context;
        let handles = kfac_handles(context, solve)?;
        let mean = mean_diagonal(shape, &handles);
        if mean == 0.0 {
            return Ok(None);
        }
        let scale = power_of_two_scale(mean);
        let input_scale = input_scale(shape, &handles);
        let needs_diagonals = solve.solver.preconditioner() == Some(PreconditionerKind::Jacobi);
        let handles: Vec<ModelFactors> =
            handles.into_iter().filter(|(_, a, g)| a.trace() * g.trace() > 0.0).collect();
        let mut terms = Vec::with_capacity(handles.len());
        for (model, a, g) in &handles {
            let diagonals = needs_diagonals.then(|| (a.diagonal(), g.diagonal()));
            let a = shared.input_factor(shared_key(inputs, model, tensor), memory.hold_a, || {
                a.load(memory.hold_a, threading)
            })?;
            let g = shared.output_factor(model.model, memory.hold_g, || g.load(memory.hold_g, threading))?;
            terms.push(KroneckerTerm { weight: model.weight, a, g, diagonals });
        }
        let operator = KroneckerSum::new(shape, terms)?.scaled(input_scale, scale / input_scale);
        Ok(Some(Self { operator, handles, scale, input_scale, shift: solve.ridge * mean * scale }))
    }

    /// The models of the terms.
    pub fn models(&self) -> Vec<SolveModel> {
        self.handles.iter().map(|(model, _, _)| model.clone()).collect()
    }

    /// The preconditioner that `iteration` names, and what making it took.
    pub fn condition(
        &self,
        context: &BlockContext<'_>,
        solve: &Solve,
        iteration: &Iteration,
        shared: &mut SharedFactors,
    ) -> Result<(Conditioned, Option<SetupReport>), MergeError> {
        let BlockContext { inputs, tensor, shape, threading, .. } = *context;
        let started = Instant::now();
        let failed = |error| MergeError::preconditioner(tensor, error);
        let made = match kronecker_kind(iteration.preconditioner) {
            None if iteration.preconditioner == Some(PreconditionerKind::Jacobi) => {
                Conditioned::Applied(Box::new(Jacobi::new(&Damped::new(&self.operator, self.shift))?))
            }
            None => return Ok((Conditioned::Applied(Box::new(NoPreconditioner)), None)),
            Some(KroneckerKind::Cholesky) => Conditioned::Applied(Box::new(
                Kronecker::new(KroneckerKind::Cholesky, &self.operator, self.shift, threading)
                    .map_err(failed)?,
            )),
            Some(kind) => {
                let rotate = rotates(inputs, tensor, solve, shape);
                let weights: Vec<f64> = self.operator.terms_weights().collect();
                let (input, output) = self.operator.sides();
                // A model whose factors are zero here is no term: then nothing is shared.
                let terms: Vec<usize> = self.handles.iter().map(|(model, _, _)| model.model).collect();
                let key = format!(
                    "{} {terms:?} {:?}",
                    input_factors_key(inputs, tensor, solve, shape).unwrap_or_default(),
                    self.input_scale
                );
                let (known, known_output) = (shared.side(&key), shared.output_side(&key));
                let a = || match known {
                    Some(side) => Ok(side),
                    None => Side::of(kind, &input, shape.out_features, rotate, threading),
                };
                let g = || match known_output {
                    Some(side) => Ok(side),
                    None => Side::of(kind, &output, shape.in_features, rotate, threading),
                };
                let (a, g) = match threading {
                    Threading::Sequential => (a(), g()),
                    Threading::Parallel => rayon::join(a, g),
                };
                let (a, g) = (a.map_err(failed)?, g.map_err(failed)?);
                shared.keep_output_side(key.clone(), &g);
                shared.keep_side(key, a.clone());
                if rotate {
                    let scales = (self.input_scale, self.scale / self.input_scale);
                    let rotated = Rotated::new(shape, a, g, &weights, scales)?;
                    let scaling = rotated.scaling(self.shift, threading);
                    Conditioned::Rotated(Box::new(rotated), scaling)
                } else {
                    let made = Kronecker::of_sides(kind, shape, a, g, &weights, self.shift, threading)?;
                    Conditioned::Applied(Box::new(made))
                }
            }
        };
        let setup = setup_report(made.preconditioner(), started);
        Ok((made, setup))
    }
}

/// Solves for the displacement `d` from `x0`.
pub(super) fn solve_kfac(
    context: &BlockContext<'_>,
    solve: &Solve,
    iteration: &Iteration,
    memory: IterativeMemory,
    x0: &[f32],
    d: &mut [f32],
    shared: &mut SharedFactors,
) -> Result<SolveOutcome, MergeError> {
    let Some(mut system) = KfacSystem::load(context, solve, memory, shared)? else {
        d.fill(0.0);
        return Ok(zero_operator());
    };
    let (conditioned, setup) = system.condition(context, solve, iteration, shared)?;
    let models = system.models();
    let system = System {
        operator: &mut system.operator,
        models: &models,
        conditioned,
        setup,
        scale: system.scale,
        shift: system.shift,
        kept: shared.kept_start(),
    };
    iterate(context, iteration, system, x0, d)
}

/// Flops of one application of a K-FAC operator of `models` full terms.
pub(crate) fn apply_flops(shape: BlockShape, models: usize) -> f64 {
    let (m, n) = (shape.out_features as f64, shape.in_features as f64);
    models as f64 * 2.0 * m * n * (m + n)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operator::LinearOperator;

    #[test]
    fn flops_are_the_operators_own() {
        let shape = BlockShape::new(3, 5);
        assert_eq!(apply_flops(shape, 2), 2.0 * 2.0 * 15.0 * 8.0);
        let operator = KroneckerSum::<f32>::new(shape, Vec::new()).unwrap();
        assert_eq!(apply_flops(shape, 0), operator.flops());
    }
}
