//! Barycentric interpolation on the sphere through the tangent space at the weighted mean, as mergekit 0.1.5's
//! `multislerp`: of models, or of task vectors where there is a base.
//!
//! With uᵢ = xᵢ/(‖xᵢ‖+ε), m the normalised Σ wᵢuᵢ and v = Σ wᵢ(uᵢ - ⟨uᵢ,m⟩m): (cos‖v‖·m + sin‖v‖·v/‖v‖)·Σ wᵢ‖xᵢ‖. All of
//! it lies in the span of the inputs, so that it runs on their inner products.

use super::{Arguments, BaseUse, Definition, Elementwise, Gram, Known, Pass};
use crate::config::{ParameterSpec, Range};

pub(super) static DEFINITION: Definition = Definition {
    name: "multislerp",
    base: BaseUse::Optional,
    models: (1, usize::MAX),
    parameters: &[
        ParameterSpec::number("weight", Range::Any).per_model().required(),
        ParameterSpec::boolean("normalize_weights"),
        ParameterSpec::number("eps", Range::NonNegative),
    ],
    build,
};

#[derive(Debug)]
struct MultiSlerp {
    weights: Vec<f64>,
    epsilon: f64,
    has_base: bool,
}

fn build(arguments: &Arguments<'_>) -> Result<Box<dyn Elementwise>, String> {
    let mut weights = arguments.required_numbers("weight")?;
    // One model is the result, whatever its weight is.
    if arguments.boolean("normalize_weights", true) && weights.len() > 1 {
        let (sum, size) = (weights.iter().sum::<f64>(), weights.iter().map(|w| w.abs()).sum::<f64>());
        if sum.abs() <= 1e-12 * size {
            return Err(format!("the weights {weights:?} sum to 0, and their sum divides"));
        }
        weights.iter_mut().for_each(|w| *w /= sum);
    }
    Ok(Box::new(MultiSlerp {
        weights,
        epsilon: arguments.number("eps", 1e-8),
        has_base: arguments.has_base(),
    }))
}

impl MultiSlerp {
    /// The result's coefficients of the inputs.
    fn of_gram(&self, gram: &Gram) -> Vec<f64> {
        let models = self.weights.len();
        if models == 1 {
            return vec![1.0];
        }
        let units: Vec<f64> = (0..models).map(|i| 1.0 / (gram.norm(i) + self.epsilon)).collect();
        let mut mean: Vec<f64> = (0..models).map(|i| self.weights[i] * units[i]).collect();
        let norm = gram.inner(&mean, &mean).max(0.0).sqrt();
        if norm.is_nan() || norm < self.epsilon || norm == 0.0 {
            // Opposite vectors that cancel: linear, where mergekit does so for two and refuses more.
            return self.weights.clone();
        }
        mean.iter_mut().for_each(|m| *m /= norm);
        let mut tangent = vec![0.0; models];
        for (i, (length, weight)) in units.iter().zip(&self.weights).enumerate() {
            let unit: Vec<f64> = (0..models).map(|j| if i == j { *length } else { 0.0 }).collect();
            let dot = gram.inner(&unit, &mean);
            for (t, (u, m)) in tangent.iter_mut().zip(unit.iter().zip(&mean)) {
                *t += weight * (u - dot * m);
            }
        }
        let length = gram.inner(&tangent, &tangent).max(0.0).sqrt() + self.epsilon;
        let along = if length > 0.0 { length.sin() / length } else { 1.0 };
        let scale: f64 = (0..models).map(|i| self.weights[i] * gram.norm(i)).sum();
        mean.iter().zip(&tangent).map(|(m, t)| scale * (m * length.cos() + t * along)).collect()
    }
}

impl Elementwise for MultiSlerp {
    fn task_vectors(&self) -> bool {
        self.has_base
    }

    fn passes(&self) -> Vec<Pass> {
        if self.weights.len() == 1 { Vec::new() } else { vec![Pass::Gram] }
    }

    fn coefficients(&self, known: &Known) -> Option<Vec<f64>> {
        Some(self.of_gram(&Gram::new(self.weights.len(), known.sums(0))))
    }
}
