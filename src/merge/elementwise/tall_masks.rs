//! TALL masks (Wang et al. 2024, arXiv:2405.07813): the summed task vector, and of every task what of it is the task's own.
//!
//! The merged model is θ₀ + τ with τ = Σ τₜ. Mask mₜ is set where |τₜ| > mask_lambdaₜ · |τ - τₜ| (0.6 unless given), as in
//! [`super::consensus`], which merges by counting them. Task t's model is θ₀ + mₜ∘τ: `materialise` makes it of the merged
//! model and the masks kept beside it ([`crate::masks`]); `task` writes it at once.

use super::emr::MASKS;
use super::masks::{TaskMasks, set};
use super::{Arguments, BaseUse, Definition, Elementwise, Known, Piece};
use crate::config::{ParameterSpec, Range};
use crate::masks::Rescaler;

pub(super) static DEFINITION: Definition = Definition {
    name: "tall_masks",
    base: BaseUse::Required,
    models: (1, usize::MAX),
    parameters: &[
        ParameterSpec::number("mask_lambda", Range::NonNegative).per_model(),
        ParameterSpec::number("task", Range::NonNegative),
        MASKS,
    ],
    build,
};

#[derive(Debug)]
struct TallMasks {
    mask_lambda: Vec<f32>,
    /// Place among the models that are merged.
    task: Option<usize>,
    masks: bool,
}

fn build(arguments: &Arguments<'_>) -> Result<Box<dyn Elementwise>, String> {
    let task = super::emr::task(arguments)?;
    Ok(Box::new(TallMasks {
        mask_lambda: arguments.numbers("mask_lambda", 0.6).into_iter().map(|l| l as f32).collect(),
        task,
        masks: task.is_none() && arguments.boolean("masks", true),
    }))
}

/// τ at one element.
fn sum(piece: &Piece<'_>, k: usize) -> f32 {
    (0..piece.models()).map(|i| piece.model(i)[k]).sum()
}

/// Whether a model with the value `own` claims an element where the sum is `sum`.
pub(super) fn claims(own: f32, sum: f32, mask_lambda: f32) -> bool {
    own.abs() > mask_lambda * (sum - own).abs()
}

impl Elementwise for TallMasks {
    fn task_vectors(&self) -> bool {
        true
    }

    fn task_masks(&self) -> Option<&dyn TaskMasks> {
        self.masks.then_some(self)
    }

    fn merge(&self, piece: &mut Piece<'_>, _known: &Known, out: &mut [f32]) {
        for (k, o) in out.iter_mut().enumerate() {
            let sum = sum(piece, k);
            let kept = self.task.is_none_or(|t| claims(piece.model(t)[k], sum, self.mask_lambda[t]));
            *o = piece.base()[k] + if kept { sum } else { 0.0 };
        }
    }
}

impl TaskMasks for TallMasks {
    fn rescaler(&self) -> Rescaler {
        Rescaler::None
    }

    fn record(&self, piece: &Piece<'_>, bits: &mut [u8], _norms: &mut [f64]) {
        let row = piece.len().div_ceil(8);
        for k in 0..piece.len() {
            let sum = sum(piece, k);
            for (i, lambda) in self.mask_lambda.iter().enumerate() {
                if claims(piece.model(i)[k], sum, *lambda) {
                    set(&mut bits[i * row..(i + 1) * row], k);
                }
            }
        }
    }
}
