//! Arcee Fusion, as mergekit 0.1.5: take from the model what is important, leave the base elsewhere.
//!
//! Importance is |θ₁ - θ₀| times the row's KL(softmax θ₁ ‖ softmax θ₀), rows along the last dimension. Taken is what reaches
//! median + 1.5·(third - first quartile). mergekit estimates quartiles of more than a million values from a random sample;
//! here they are exact, at the same places: element ⌊q·(n-1)⌋ of the sorted values.

use super::{Arguments, BaseUse, Counts, Definition, Elementwise, Known, Pass, Piece};

const EPSILON: f64 = 1e-8;

pub(super) static DEFINITION: Definition =
    Definition { name: "arcee_fusion", base: BaseUse::Required, models: (1, 1), parameters: &[], build };

#[derive(Debug)]
struct ArceeFusion {
    row: usize,
}

fn build(arguments: &Arguments<'_>) -> Result<Box<dyn Elementwise>, String> {
    Ok(Box::new(ArceeFusion { row: arguments.row_length().max(1) }))
}

/// Largest value and `ln Σ exp(x - largest)`.
fn log_sum(row: &[f32]) -> (f64, f64) {
    let largest = row.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
    let largest = f64::from(largest);
    (largest, row.iter().map(|x| (f64::from(*x) - largest).exp()).sum())
}

/// `Σ p ln(p/q)`, both with mergekit's 1e-8 added.
fn divergence(model: &[f32], base: &[f32]) -> f64 {
    let ((top_p, sum_p), (top_q, sum_q)) = (log_sum(model), log_sum(base));
    model
        .iter()
        .zip(base)
        .map(|(x, y)| {
            let p = (f64::from(*x) - top_p).exp() / sum_p + EPSILON;
            let q = (f64::from(*y) - top_q).exp() / sum_q + EPSILON;
            p * (p / q).ln()
        })
        .sum()
}

impl Elementwise for ArceeFusion {
    fn row_length(&self) -> Option<usize> {
        Some(self.row)
    }

    fn passes(&self) -> Vec<Pass> {
        vec![Pass::Order { columns: 1 }]
    }

    fn scores(&self, _pass: usize, _column: usize, piece: &Piece<'_>, _known: &Known, scores: &mut [f32]) {
        let (model, base) = (piece.model(0), piece.base());
        for ((scores, x), y) in
            scores.chunks_mut(self.row).zip(model.chunks(self.row)).zip(base.chunks(self.row))
        {
            let divergence = divergence(x, y) as f32;
            for ((score, x), y) in scores.iter_mut().zip(x).zip(y) {
                *score = (*x - *y).abs() * divergence;
            }
        }
    }

    fn ranks(&self, _pass: usize, _column: usize, counts: Counts) -> Vec<u64> {
        [0.25, 0.5, 0.75].map(|q| (q * (counts.elements.saturating_sub(1)) as f64) as u64).to_vec()
    }

    fn merge(&self, piece: &mut Piece<'_>, known: &Known, out: &mut [f32]) {
        self.scores(0, 0, piece, known, out);
        let [first, median, third] = [0, 1, 2].map(|k| known.order(0, 0)[k].score);
        let threshold = median + 1.5 * (third - first);
        for ((o, x), b) in out.iter_mut().zip(piece.model(0)).zip(piece.base()) {
            *o = if *o >= threshold { *b + (*x - *b) } else { *b };
        }
    }
}
