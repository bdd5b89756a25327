//! Isotropic merging with a ridge: what `mats` starts from, and what it is where there are no statistics.
//!
//! With the task vectors' sum `Σ wₜτₜ = U·diag(σ)·Vᵀ` of a weight, the merged task vector is
//!
//! `λ·ν · U·f(σ)·Vᵀ / ‖f(σ)‖₂`, `f(σ) = σ / √(σ² + (ρ·σ̄)²)`, `σ̄ = Σσ² / Σσ`, `ν = min(‖τ‖ · √max(1, r·T'), ‖Στ‖)`.
//!
//! f makes strong directions equal, as Iso-C does (arXiv:2502.04959: that is ρ = 0), and leaves weak ones in proportion, so
//! that what is only rounding noise, as most directions of LoRA adapters are, stays noise. The norm ν is that of one task
//! vector (‖τ‖, the mean of their norms), times the root of the number of them that the weight has room for:
//! T' = (T‖τ‖/‖Στ‖)² point in different directions (at most T), and r = (Σσ)²/(s·Σσ²) is the share of all s directions that
//! their sum uses; no more than their sum has. One task vector is its own merge. ρ and the rule for ν were chosen on
//! validation splits of models tuned in full and by LoRA (`benches/quality`).
//!
//! Only 2-D weights that are no embeddings; everything else gets the mean of the task vectors, times λ.

use super::combine::LAMBDA;
use super::whole::{
    NULL, OnWeights, ReadTask, WholeError, WholeTensor, map_bytes, map_flops, map_singular_values,
    sum_of_tasks,
};
use super::{Arguments, BaseUse, Definition, Elementwise};
use crate::config::{ParameterSpec, Range};
use crate::kernel::Threading;
use crate::operator::BlockShape;

/// ρ unless given.
const RIDGE: f64 = 0.5;

pub(crate) static DEFINITION: Definition = Definition {
    name: "iso_ridge",
    base: BaseUse::Required,
    models: (1, usize::MAX),
    parameters: &[
        ParameterSpec::number("weight", Range::NonNegative).per_model(),
        LAMBDA,
        ParameterSpec::number("ridge", Range::NonNegative),
    ],
    build,
};

/// `weights` scale task vectors against each other: they have a mean of 1 over the models that have one.
#[derive(Debug)]
struct IsoRidge {
    weights: Vec<f64>,
    lambda: f64,
    ridge: f64,
}

fn build(arguments: &Arguments<'_>) -> Result<Box<dyn Elementwise>, String> {
    let lambda = arguments.number("lambda", 1.0);
    let mut weights = arguments.numbers("weight", 1.0);
    let (count, sum) =
        weights.iter().filter(|w| **w > 0.0).fold((0.0, 0.0), |(count, sum), w| (count + 1.0, sum + w));
    if sum == 0.0 {
        return Err("every `weight` is 0 (expected one above 0)".to_owned());
    }
    weights.iter_mut().for_each(|w| *w *= count / sum);
    let ridge = arguments.number("ridge", RIDGE);
    Ok(OnWeights::boxed(lambda, arguments.is_linear().then_some(IsoRidge { weights, lambda, ridge })))
}

/// Of all models alike, with the defaults: where `mats` starts on a weight.
pub(crate) fn start(models: usize) -> Box<dyn Elementwise> {
    OnWeights::boxed(1.0, Some(IsoRidge { weights: vec![1.0; models], lambda: 1.0, ridge: RIDGE }))
}

impl WholeTensor for IsoRidge {
    fn reads(&self) -> u64 {
        1
    }

    fn memory_bytes(&self, shape: BlockShape, _models: usize) -> u64 {
        map_bytes(shape)
    }

    fn flops(&self, shape: BlockShape, _models: usize) -> f64 {
        map_flops(shape)
    }

    fn merge_whole(
        &self,
        shape: BlockShape,
        _models: usize,
        read: &mut ReadTask<'_>,
        threading: Threading,
        out: &mut [f64],
    ) -> Result<(), WholeError> {
        let squares = sum_of_tasks(read, &self.weights, out)?;
        let norms: Vec<f64> = squares.iter().filter(|s| **s > 0.0).map(|s| s.sqrt()).collect();
        // Nothing to keep apart: one task vector is its own merge.
        if norms.len() < 2 {
            out.iter_mut().for_each(|v| *v *= self.lambda);
            return Ok(());
        }
        map_singular_values(out, shape.out_features, shape.in_features, threading, |values| {
            factors(values, &norms, self.lambda, self.ridge);
        })?;
        Ok(())
    }
}

/// What the singular values of the sum, ascending, are multiplied by, in their place. `norms`: of the task vectors.
fn factors(values: &mut [f64], norms: &[f64], lambda: f64, ridge: f64) {
    let (sum, squares) = values.iter().fold((0.0, 0.0), |(sum, squares), v| (sum + v, squares + v * v));
    let tasks = norms.len() as f64;
    let norm = norms.iter().sum::<f64>() / tasks;
    if squares == 0.0 {
        // They cancel.
        values.fill(0.0);
        return;
    }
    let mean = squares / sum;
    let share = sum * sum / (squares * values.len() as f64);
    let directions = (tasks * tasks * norm * norm / squares).min(tasks);
    let target = lambda * (norm * (share * directions).max(1.0).sqrt()).min(squares.sqrt());
    // Where there is no ridge, directions that are null to rounding stay null.
    let floor = NULL.sqrt() * values.last().copied().unwrap_or(0.0);
    let mut flat = 0.0;
    for value in &mut *values {
        let factor = if *value > floor { value.hypot(ridge * mean).recip() } else { 0.0 };
        flat += (factor * *value).powi(2);
        *value = factor;
    }
    let scale = target / flat.sqrt();
    values.iter_mut().for_each(|factor| *factor *= scale);
}
