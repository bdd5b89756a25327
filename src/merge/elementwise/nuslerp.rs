//! Spherical interpolation by two weights, of models or of their task vectors, as mergekit 0.1.5.
//!
//! t = w₂/(w₁+w₂), one half where the weights cancel. The angle is that of the whole tensors, or with `nuslerp_flatten:
//! false` of each row along the last dimension, or with `nuslerp_row_wise` besides of each column along the first. Linear
//! where sin θ ≤ 1e-8 and where the two are opposite.

use super::gram::{OPPOSITE, combine};
use super::{Arguments, BaseUse, Definition, Elementwise, Gram, Known, Pass, Piece};
use crate::config::{ParameterSpec, Range};
use crate::kernel::{Threading, vector};

const LEAST_NORM: f64 = 1e-7;
/// sin² θ of vectors that are parallel.
const PARALLEL: f64 = 1e-16;

pub(super) static DEFINITION: Definition = Definition {
    name: "nuslerp",
    base: BaseUse::Optional,
    models: (2, 2),
    parameters: &[
        ParameterSpec::number("weight", Range::Any).per_model().required(),
        ParameterSpec::boolean("nuslerp_flatten"),
        ParameterSpec::boolean("nuslerp_row_wise"),
    ],
    build,
};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Along {
    Tensor,
    Rows(usize),
    /// Of the given number.
    Columns(usize),
}

#[derive(Debug)]
struct NuSlerp {
    t: f64,
    along: Along,
    has_base: bool,
}

fn build(arguments: &Arguments<'_>) -> Result<Box<dyn Elementwise>, String> {
    let weights = arguments.required_numbers("weight")?;
    let total: f64 = weights.iter().sum();
    let t = if total.abs() < 1e-6 { 0.5 } else { weights[1] / total };
    let (shape, row) = (arguments.shape(), arguments.row_length().max(1));
    let along = if arguments.boolean("nuslerp_flatten", true) || shape.len() < 2 {
        Along::Tensor
    } else if arguments.boolean("nuslerp_row_wise", false) {
        Along::Columns(shape[1..].iter().product::<usize>().max(1))
    } else {
        Along::Rows(row)
    };
    Ok(Box::new(NuSlerp { t, along, has_base: arguments.has_base() }))
}

impl NuSlerp {
    /// Coefficients of two vectors with these inner products.
    fn of_products(&self, aa: f64, bb: f64, ab: f64) -> [f64; 2] {
        let norm = |square: f64| square.max(0.0).sqrt().max(LEAST_NORM);
        let cosine = (ab / (norm(aa) * norm(bb))).clamp(-1.0, 1.0);
        if 1.0 - cosine * cosine <= PARALLEL || 1.0 + cosine <= OPPOSITE {
            return [1.0 - self.t, self.t];
        }
        let theta = cosine.acos();
        [((1.0 - self.t) * theta).sin() / theta.sin(), (self.t * theta).sin() / theta.sin()]
    }
}

impl Elementwise for NuSlerp {
    fn task_vectors(&self) -> bool {
        self.has_base
    }

    fn row_length(&self) -> Option<usize> {
        match self.along {
            Along::Tensor => None,
            Along::Rows(length) | Along::Columns(length) => Some(length),
        }
    }

    fn passes(&self) -> Vec<Pass> {
        match self.along {
            Along::Tensor => vec![Pass::Gram],
            Along::Rows(_) => Vec::new(),
            Along::Columns(columns) => vec![Pass::Sums { count: Gram::sums(2) * columns }],
        }
    }

    fn sums(&self, _pass: usize, piece: &mut Piece<'_>, _known: &Known, sums: &mut [f64]) {
        let Along::Columns(columns) = self.along else { return };
        let (aa, rest) = sums.split_at_mut(columns);
        let (ab, bb) = rest.split_at_mut(columns);
        for (a, b) in piece.model(0).chunks_exact(columns).zip(piece.model(1).chunks_exact(columns)) {
            for (k, (a, b)) in a.iter().zip(b).enumerate() {
                let (a, b) = (f64::from(*a), f64::from(*b));
                aa[k] += a * a;
                ab[k] += a * b;
                bb[k] += b * b;
            }
        }
    }

    fn coefficients(&self, known: &Known) -> Option<Vec<f64>> {
        let sums = known.sums(0);
        (self.along == Along::Tensor).then(|| self.of_products(sums[0], sums[2], sums[1]).to_vec())
    }

    fn merge(&self, piece: &mut Piece<'_>, known: &Known, out: &mut [f32]) {
        let sums = known.sums(0);
        match self.along {
            Along::Tensor => {
                return combine(piece, &self.of_products(sums[0], sums[2], sums[1]), self.has_base, out);
            }
            Along::Rows(length) => {
                for (k, out) in out.chunks_mut(length).enumerate() {
                    let range = k * length..k * length + out.len();
                    let (a, b) = (&piece.model(0)[range.clone()], &piece.model(1)[range]);
                    let dot = |x: &[f32], y: &[f32]| vector::dot(x, y, Threading::Sequential);
                    let [ca, cb] = self.of_products(dot(a, a), dot(b, b), dot(a, b)).map(|c| c as f32);
                    for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
                        *o = ca * *a + cb * *b;
                    }
                }
            }
            Along::Columns(columns) => {
                let coefficients: Vec<[f32; 2]> = (0..columns)
                    .map(|k| {
                        self.of_products(sums[k], sums[2 * columns + k], sums[columns + k]).map(|c| c as f32)
                    })
                    .collect();
                for (k, o) in out.iter_mut().enumerate() {
                    let [ca, cb] = coefficients[k % columns];
                    *o = ca * piece.model(0)[k] + cb * piece.model(1)[k];
                }
            }
        }
        if self.has_base {
            for (o, b) in out.iter_mut().zip(piece.base()) {
                *o += *b;
            }
        }
    }
}
