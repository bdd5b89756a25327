//! Inner products of models: from them alone follow norms, angles, and every combination whose coefficients depend on
//! nothing else.

use super::Piece;
use crate::kernel::{Threading, dispatch, vector};

/// 1 + cos θ of two vectors that are opposite: what f64 inner products leave of the arc between them is rounding noise.
pub(super) const OPPOSITE: f64 = 1e-12;

/// The symmetric matrix of inner products of a tensor's models (or task vectors).
#[derive(Debug, Clone)]
pub struct Gram {
    side: usize,
    products: Vec<f64>,
}

impl Gram {
    /// Sums that a pass over `models` models needs.
    pub const fn sums(models: usize) -> usize {
        models * (models + 1) / 2
    }

    /// Adds the inner products of one piece.
    pub fn add(piece: &Piece<'_>, sums: &mut [f64]) {
        Self::add_range(piece, 0..piece.len(), sums);
    }

    /// Adds those of a part of a piece, as a row.
    pub fn add_range(piece: &Piece<'_>, range: std::ops::Range<usize>, sums: &mut [f64]) {
        let mut k = 0;
        for i in 0..piece.models() {
            for j in 0..=i {
                let (x, y) = (&piece.model(i)[range.clone()], &piece.model(j)[range.clone()]);
                sums[k] += vector::dot(x, y, Threading::Sequential);
                k += 1;
            }
        }
    }

    /// From the sums of a whole pass: the lower triangle, row by row.
    pub fn new(side: usize, products: &[f64]) -> Self {
        Self { side, products: products.to_vec() }
    }

    /// `⟨xᵢ, xⱼ⟩`.
    pub fn product(&self, i: usize, j: usize) -> f64 {
        let (i, j) = (i.max(j), i.min(j));
        self.products[i * (i + 1) / 2 + j]
    }

    /// `‖xᵢ‖`.
    pub fn norm(&self, i: usize) -> f64 {
        self.product(i, i).max(0.0).sqrt()
    }

    /// `⟨Σ aᵢxᵢ, Σ bᵢxᵢ⟩`.
    pub fn inner(&self, a: &[f64], b: &[f64]) -> f64 {
        (0..self.side).map(|i| (0..self.side).map(|j| a[i] * b[j] * self.product(i, j)).sum::<f64>()).sum()
    }
}

/// `out = [base +] Σ cᵢ xᵢ` in f32, models in order: the bits of a weighted sum of [`starts`](super::starts).
pub(super) fn combine(piece: &Piece<'_>, coefficients: &[f64], with_base: bool, out: &mut [f32]) {
    // The sum of task vectors begins at 0, that of models at the first: -0 changes nothing that is added to it.
    let first = if with_base { 0.0 } else { -0.0 };
    for (i, c) in coefficients.iter().enumerate() {
        let (c, x) = (*c as f32, piece.model(i));
        dispatch(
            #[inline(always)]
            || {
                for (o, x) in out.iter_mut().zip(x) {
                    *o = if i == 0 { first } else { *o } + c * *x;
                }
            },
        );
    }
    if coefficients.is_empty() {
        out.fill(0.0);
    }
    if with_base {
        dispatch(
            #[inline(always)]
            || {
                for (o, b) in out.iter_mut().zip(piece.base()) {
                    *o += *b;
                }
            },
        );
    }
}
