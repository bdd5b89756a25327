//! SCE (Wan et al. 2024, arXiv:2408.07990), as mergekit 0.1.5: select by variance, calculate weights, erase minorities.
//!
//! Of each tensor's values those with the largest variance over the models stay: ⌊`select_topk` · number that vary⌋. Weights
//! are the mean squares of what stays, over their sum (equal where that is below 1e-6). Values against the sign of the
//! plain sum are erased; the rest is their weighted mean.

use super::combine::INT8_MASK;
use super::{Arguments, BaseUse, Counts, Definition, Elementwise, Kept, Known, Pass, Piece};
use crate::config::{ParameterSpec, Range};
use crate::kernel::{Threading, vector};

pub(super) static DEFINITION: Definition = Definition {
    name: "sce",
    base: BaseUse::Required,
    models: (1, usize::MAX),
    parameters: &[ParameterSpec::number("select_topk", Range::Unit), INT8_MASK],
    build,
};

#[derive(Debug)]
struct Sce {
    models: usize,
    elements: f64,
    topk: f64,
}

fn build(arguments: &Arguments<'_>) -> Result<Box<dyn Elementwise>, String> {
    let elements = arguments.shape().iter().product::<usize>() as f64;
    Ok(Box::new(Sce { models: arguments.models(), elements, topk: arguments.number("select_topk", 1.0) }))
}

impl Sce {
    fn selects(&self) -> bool {
        self.topk < 1.0
    }
}

impl Elementwise for Sce {
    fn task_vectors(&self) -> bool {
        true
    }

    fn passes(&self) -> Vec<Pass> {
        let squares = Pass::Sums { count: self.models };
        if self.selects() { vec![Pass::Trim { columns: 1, norms: false }, squares] } else { vec![squares] }
    }

    fn scores(&self, _pass: usize, _column: usize, piece: &Piece<'_>, _known: &Known, scores: &mut [f32]) {
        let count = self.models as f64;
        for (k, score) in scores.iter_mut().enumerate() {
            let mean = (0..self.models).map(|i| f64::from(piece.model(i)[k])).sum::<f64>() / count;
            let variance =
                (0..self.models).map(|i| (f64::from(piece.model(i)[k]) - mean).powi(2)).sum::<f64>() / count;
            *score = variance as f32;
        }
    }

    fn kept(&self, _pass: usize, _column: usize, counts: Counts) -> Kept {
        match (self.topk * counts.nonzero as f64) as u64 {
            0 => Kept::Nothing,
            take => Kept::FromLargest { skip: 0, take },
        }
    }

    fn sums(&self, _pass: usize, piece: &mut Piece<'_>, _known: &Known, sums: &mut [f64]) {
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum += vector::dot(piece.model(i), piece.model(i), Threading::Sequential);
        }
    }

    fn merge(&self, piece: &mut Piece<'_>, known: &Known, out: &mut [f32]) {
        let squares = known.sums(usize::from(self.selects()));
        let sum: f64 = squares.iter().sum::<f64>() / self.elements;
        let weights: Vec<f32> = squares
            .iter()
            .map(|s| if sum < 1e-6 { 1.0 / self.models as f32 } else { (s / self.elements / sum) as f32 })
            .collect();
        for (k, o) in out.iter_mut().enumerate() {
            let vote: f32 = (0..self.models).map(|i| piece.model(i)[k]).sum();
            let (mut merged, mut divisor) = (0.0f32, 0.0f32);
            for (i, weight) in weights.iter().enumerate() {
                let d = piece.model(i)[k];
                if (vote >= 0.0 && d > 0.0) || (vote < 0.0 && d < 0.0) {
                    merged += d * *weight;
                    divisor += *weight;
                }
            }
            *o = piece.base()[k] + merged / divisor.max(1e-6);
        }
    }
}
