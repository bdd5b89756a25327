//! Model Stock (Jang et al. 2024, arXiv:2403.19522), as mergekit 0.1.5: t·mean + (1-t)·base with t = N·c/(1+(N-1)·c), c the
//! mean cosine between task vectors, of the whole tensor or with `filter_wise` of each row along the last dimension.
//!
//! Where the denominator vanishes the base stays.

use super::{Arguments, BaseUse, Definition, Elementwise, Gram, Known, Pass, Piece};
use crate::config::ParameterSpec;

const LEAST_NORM_PRODUCT: f64 = 1e-6;
const LEAST_DENOMINATOR: f64 = 1e-6;

pub(super) static DEFINITION: Definition = Definition {
    name: "model_stock",
    base: BaseUse::Required,
    models: (2, usize::MAX),
    parameters: &[ParameterSpec::boolean("filter_wise")],
    build,
};

#[derive(Debug)]
struct ModelStock {
    models: usize,
    /// Length of a row, where each has its own t.
    row: Option<usize>,
}

fn build(arguments: &Arguments<'_>) -> Result<Box<dyn Elementwise>, String> {
    let row = arguments.boolean("filter_wise", false).then(|| arguments.row_length().max(1));
    Ok(Box::new(ModelStock { models: arguments.models(), row }))
}

impl ModelStock {
    fn t(&self, gram: &Gram) -> f32 {
        let (mut sum, mut pairs) = (0.0, 0.0);
        for i in 0..self.models {
            for j in 0..i {
                let product = (gram.norm(i) * gram.norm(j)).max(LEAST_NORM_PRODUCT);
                sum += (gram.product(i, j) / product).clamp(-1.0, 1.0);
                pairs += 1.0;
            }
        }
        let (cosine, n) = (sum / pairs, self.models as f64);
        let denominator = 1.0 + (n - 1.0) * cosine;
        if denominator.abs() < LEAST_DENOMINATOR { 0.0 } else { (n * cosine / denominator) as f32 }
    }

    fn blend(&self, t: f32, piece: &Piece<'_>, range: std::ops::Range<usize>, out: &mut [f32]) {
        // base + t · mean of the task vectors.
        out.fill(0.0);
        for i in 0..self.models {
            for (o, d) in out.iter_mut().zip(&piece.model(i)[range.clone()]) {
                *o += *d;
            }
        }
        let count = self.models as f32;
        for (o, b) in out.iter_mut().zip(&piece.base()[range]) {
            *o = *b + t * (*o / count);
        }
    }
}

impl Elementwise for ModelStock {
    fn task_vectors(&self) -> bool {
        true
    }

    fn row_length(&self) -> Option<usize> {
        self.row
    }

    fn passes(&self) -> Vec<Pass> {
        if self.row.is_some() { Vec::new() } else { vec![Pass::Gram] }
    }

    fn merge(&self, piece: &mut Piece<'_>, known: &Known, out: &mut [f32]) {
        let Some(row) = self.row else {
            let t = self.t(&Gram::new(self.models, known.sums(0)));
            let all = 0..out.len();
            return self.blend(t, piece, all, out);
        };
        let mut products = vec![0.0; Gram::sums(self.models)];
        for (k, out) in out.chunks_mut(row).enumerate() {
            let range = k * row..k * row + out.len();
            products.fill(0.0);
            Gram::add_range(piece, range.clone(), &mut products);
            let t = self.t(&Gram::new(self.models, &products));
            self.blend(t, piece, range, out);
        }
    }
}
