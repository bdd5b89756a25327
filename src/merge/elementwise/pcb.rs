//! PCB-Merging (Du et al. 2024, arXiv:2410.02396): parameters compete by their own size and by agreeing with other models.
//!
//! Of the versions in the authors' repository, the one whose pairwise term is the paper's (`vision_source_code/pcb_ES.py`):
//! magnitudes are clamped to their 1 % and 99 % order statistics and scaled to â in [0, 1], τ̂ = sign·â,
//! β = exp(T·â²)·Σⱼ tanh(τ̂ᵢτ̂ⱼ); what is above the (1-density) order statistic of β, scaled to [0, 1], weighs the clamped
//! task vectors. `scope: model` (the paper's) takes the order statistics over all tensors, `tensor` over each.

use super::ties::SCOPE;
use super::{Arguments, BaseUse, Counts, Definition, Elementwise, Known, Pass, Piece};
use crate::config::{ParameterSpec, Range};

pub(super) static DEFINITION: Definition = Definition {
    name: "pcb",
    base: BaseUse::Required,
    models: (1, usize::MAX),
    parameters: &[
        ParameterSpec::number("weight", Range::Any).per_model(),
        ParameterSpec::number("density", Range::Unit),
        SCOPE,
    ],
    build,
};

#[derive(Debug)]
struct Pcb {
    weights: Vec<f32>,
    density: f64,
    whole_model: bool,
}

fn build(arguments: &Arguments<'_>) -> Result<Box<dyn Elementwise>, String> {
    let whole_model = arguments.word("scope", "model") == "model";
    if whole_model {
        arguments.expect_uniform("density")?;
    }
    Ok(Box::new(Pcb {
        weights: arguments.numbers("weight", 1.0).into_iter().map(|w| w as f32).collect(),
        density: arguments.number("density", 0.05),
        whole_model,
    }))
}

impl Pcb {
    /// Least and greatest magnitude of model i after clamping.
    fn bounds(known: &Known, i: usize) -> [f32; 2] {
        [known.order(0, i)[0].score, known.order(0, i)[1].score]
    }

    /// τ̂ of model i.
    fn scaled(piece: &Piece<'_>, known: &Known, i: usize, out: &mut [f32]) {
        let [low, high] = Self::bounds(known, i);
        let range = high - low;
        for (o, value) in out.iter_mut().zip(piece.model(i)) {
            let size = if range > 0.0 { (value.abs().max(low).min(high) - low) / range } else { 0.0 };
            *o = if *value == 0.0 { 0.0 } else { size.copysign(*value) };
        }
    }

    /// β of model i. Loops over one vector each, so that they are compiled to vector instructions: a tanh for every pair
    /// of models is most of this method's work.
    fn competition(&self, piece: &Piece<'_>, known: &Known, i: usize, beta: &mut [f32]) {
        let (mut own, mut other) = (vec![0.0f32; beta.len()], vec![0.0f32; beta.len()]);
        Self::scaled(piece, known, i, &mut own);
        beta.fill(0.0);
        for j in 0..self.weights.len() {
            Self::scaled(piece, known, j, &mut other);
            for ((beta, own), other) in beta.iter_mut().zip(&own).zip(&other) {
                *beta += tanh_within_one(own * other);
            }
        }
        let models = self.weights.len() as f32;
        for (beta, own) in beta.iter_mut().zip(&own) {
            *beta *= (models * own * own).exp();
        }
    }
}

/// `tanh x` for `|x| ≤ 1`, to 4e-10 before rounding: the continued fraction `x/(1 + x²/(3 + x²/(5 + …)))` as far as 11.
fn tanh_within_one(x: f32) -> f32 {
    let s = x * x;
    x * (10395.0 + s * (1260.0 + 21.0 * s)) / (10395.0 + s * (4725.0 + s * (210.0 + s)))
}

impl Elementwise for Pcb {
    fn task_vectors(&self) -> bool {
        true
    }

    fn whole_model(&self) -> bool {
        self.whole_model
    }

    fn passes(&self) -> Vec<Pass> {
        vec![Pass::Order { columns: self.weights.len() }; 2]
    }

    fn by_magnitude(&self, pass: usize) -> bool {
        pass == 0
    }

    fn scores(&self, pass: usize, column: usize, piece: &Piece<'_>, known: &Known, scores: &mut [f32]) {
        debug_assert_eq!(pass, 1, "the first is by magnitude");
        self.competition(piece, known, column, scores);
    }

    fn ranks(&self, pass: usize, _column: usize, counts: Counts) -> Vec<u64> {
        let n = counts.elements as f64;
        let rank = |r: f64| r.clamp(0.0, (n - 1.0).max(0.0)) as u64;
        if pass == 0 {
            vec![rank(0.01 * n), rank(0.99 * n - 1.0)]
        } else {
            vec![rank(n * (1.0 - self.density)), rank(n)]
        }
    }

    fn merge(&self, piece: &mut Piece<'_>, known: &Known, out: &mut [f32]) {
        let (mut sum, mut beta) = (vec![0.0f32; out.len()], vec![0.0f32; out.len()]);
        out.fill(0.0);
        for (i, weight) in self.weights.iter().enumerate() {
            let [low, high] = Self::bounds(known, i);
            let [least, most] = [known.order(1, i)[0].score, known.order(1, i)[1].score];
            self.competition(piece, known, i, &mut beta);
            for (k, d) in piece.model(i).iter().enumerate() {
                let share = if most > least { ((beta[k] - least) / (most - least)).max(0.0) } else { 0.0 };
                let clamped = if *d == 0.0 { 0.0 } else { d.abs().clamp(low, high.max(low)).copysign(*d) };
                out[k] += *weight * clamped * share;
                sum[k] += share;
            }
        }
        for ((o, s), b) in out.iter_mut().zip(&sum).zip(piece.base()) {
            *o = *b + *o / s.max(1e-12);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tanh_is_that_of_the_library_to_a_few_roundings() {
        for k in -1000..=1000 {
            let x = k as f32 / 1000.0;
            let exact = f64::from(x).tanh();
            // Five roundings above, five below, a quotient and a product, each of half a unit in the last place; those
            // of the smaller terms count less.
            let off = (f64::from(tanh_within_one(x)) - exact).abs();
            assert!(off <= 4.0 * f64::from(f32::EPSILON) * exact.abs(), "{x}: off by {off:e}");
        }
        assert_eq!(tanh_within_one(0.0), 0.0);
    }
}
