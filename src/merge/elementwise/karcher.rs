//! Karcher mean on the unit sphere, times the mean norm, as mergekit 0.1.5 (arXiv:2603.04972): all models weigh the same,
//! the base is one of them.
//!
//! Every iterate lies in the span of the models, so the iteration runs on their inner products in f64. A model of norm
//! `tol` or less counts for the norm only.

use super::gram::OPPOSITE;
use super::{Arguments, BaseUse, Definition, Elementwise, Gram, Known, Pass};
use crate::config::{ParameterSpec, Range};

pub(super) static DEFINITION: Definition = Definition {
    name: "karcher",
    base: BaseUse::Model,
    models: (1, usize::MAX),
    parameters: &[
        ParameterSpec::number("max_iter", Range::NonNegative),
        ParameterSpec::number("tol", Range::NonNegative),
    ],
    build,
};

#[derive(Debug)]
struct Karcher {
    models: usize,
    iterations: u64,
    tolerance: f64,
}

fn build(arguments: &Arguments<'_>) -> Result<Box<dyn Elementwise>, String> {
    let iterations = arguments.number("max_iter", 10.0);
    if iterations.fract() != 0.0 || iterations > 1e6 {
        return Err(format!("`max_iter` must be an integer from 0 to 1000000 (got {iterations})"));
    }
    let tolerance = arguments.number("tol", 1e-5);
    Ok(Box::new(Karcher { models: arguments.models(), iterations: iterations as u64, tolerance }))
}

impl Karcher {
    /// The result's coefficients of the models.
    fn of_gram(&self, gram: &Gram) -> Vec<f64> {
        let all = self.models;
        if all == 1 {
            return vec![1.0];
        }
        let valid: Vec<usize> = (0..all).filter(|i| gram.norm(*i) > self.tolerance).collect();
        if valid.is_empty() {
            return vec![0.0; all];
        }
        let alpha = 1.0 / valid.len() as f64;
        let unit = |i: usize| {
            let mut unit = vec![0.0; all];
            unit[i] = 1.0 / gram.norm(i);
            unit
        };
        let norm = |v: &[f64]| gram.inner(v, v).max(0.0).sqrt();
        let mut mean = vec![0.0; all];
        for i in &valid {
            mean[*i] = alpha / gram.norm(*i);
        }
        let length = norm(&mean);
        if length < self.tolerance {
            mean = unit(valid[0]);
        } else {
            mean.iter_mut().for_each(|m| *m /= length);
        }
        for _ in 0..self.iterations {
            let mut tangent = vec![0.0; all];
            for i in &valid {
                let unit = unit(*i);
                let dot = gram.inner(&mean, &unit).clamp(-1.0, 1.0);
                let theta = dot.acos();
                // An opposite model has no direction to pull in: what is left of `u - dot * m` is rounding noise.
                if theta < self.tolerance || 1.0 + dot <= OPPOSITE {
                    continue;
                }
                let pull = alpha * theta / theta.sin();
                for (t, (u, m)) in tangent.iter_mut().zip(unit.iter().zip(&mean)) {
                    *t += pull * (u - dot * m);
                }
            }
            let step = norm(&tangent);
            if step < self.tolerance || step == 0.0 {
                break;
            }
            for (m, t) in mean.iter_mut().zip(&tangent) {
                *m = step.cos() * *m + step.sin() * t / step;
            }
            let length = norm(&mean);
            if length > self.tolerance {
                mean.iter_mut().for_each(|m| *m /= length);
            }
        }
        let scale = (0..all).map(|i| gram.norm(i)).sum::<f64>() / all as f64;
        mean.iter().map(|m| m * scale).collect()
    }
}

impl Elementwise for Karcher {
    fn passes(&self) -> Vec<Pass> {
        if self.models == 1 { Vec::new() } else { vec![Pass::Gram] }
    }

    fn coefficients(&self, known: &Known) -> Option<Vec<f64>> {
        Some(self.of_gram(&Gram::new(self.models, known.sums(0))))
    }
}
