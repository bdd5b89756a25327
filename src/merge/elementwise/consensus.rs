//! Consensus merging by TALL masks (Wang et al. 2024, arXiv:2405.07813): of the summed task vector keep what enough models
//! claim.
//!
//! Model t claims an element where |τₜ| > mask_lambdaₜ · |τ - τₜ| with τ = Σ τₜ; kept is what `min_models` (2) claim: what is
//! of use to one model alone, or to none, goes. The result is θ₀ + λ · τ there, θ₀ elsewhere. [`super::tall_masks`] keeps the
//! masks themselves.

use super::combine::LAMBDA;
use super::tall_masks::claims;
use super::{Arguments, BaseUse, Definition, Elementwise, Known, Piece};
use crate::config::{ParameterSpec, Range};

pub(super) static DEFINITION: Definition = Definition {
    name: "consensus",
    base: BaseUse::Required,
    models: (1, usize::MAX),
    parameters: &[
        ParameterSpec::number("mask_lambda", Range::NonNegative).per_model(),
        ParameterSpec::number("min_models", Range::NonNegative),
        LAMBDA,
    ],
    build,
};

#[derive(Debug)]
struct Consensus {
    mask_lambda: Vec<f32>,
    min_models: f64,
    lambda: f32,
}

fn build(arguments: &Arguments<'_>) -> Result<Box<dyn Elementwise>, String> {
    Ok(Box::new(Consensus {
        mask_lambda: arguments.numbers("mask_lambda", 0.6).into_iter().map(|l| l as f32).collect(),
        min_models: arguments.number("min_models", 2.0),
        lambda: arguments.number("lambda", 1.0) as f32,
    }))
}

impl Elementwise for Consensus {
    fn task_vectors(&self) -> bool {
        true
    }

    fn merge(&self, piece: &mut Piece<'_>, _known: &Known, out: &mut [f32]) {
        for (k, o) in out.iter_mut().enumerate() {
            let sum: f32 = (0..piece.models()).map(|i| piece.model(i)[k]).sum();
            let claims = |(i, lambda): &(usize, &f32)| claims(piece.model(*i)[k], sum, **lambda);
            let claimed = self.mask_lambda.iter().enumerate().filter(claims).count();
            *o = piece.base()[k] + if claimed as f64 >= self.min_models { self.lambda * sum } else { 0.0 };
        }
    }
}
