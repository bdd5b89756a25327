//! Grams with power-law spectra and dense eigenvectors, any element of which costs a few operations.
//!
//! A Gram is `S·Q·(D + Σₘ Eₘ)·Qᵀ·S + c·cᵀ`: Q a Hadamard matrix (times a small orthogonal one where the side is no power of
//! two), S random signs, D a power law with a jitter of each model, c a strong mean. `Eₘ` couples eigenvector k with `k ^ m`
//! by a share of `√(d_k·d_{k^m})` that differs from model to model, so that the models' eigenbases differ as those of real
//! ones do and nothing is positive definite by accident: the shares sum to [`COUPLING`] at most. In the basis of Q
//! every such part is a Walsh transform of a vector, looked up at `i ^ j`.

use super::random::Random;

/// Couplings of different `m` in one Gram.
const COUPLINGS: usize = 6;
/// Most that all couplings take of `√(d_k·d_l)`: below one, the Gram stays definite.
const COUPLING: f64 = 0.9;
/// Under the power law, relative to its first value: storing in bf16 leaves noise of a tenth of it.
const FLOOR: f64 = 2e-3;
/// Squared norm of the mean.
const MEAN: f64 = 1.0;

/// What decides the numbers of a Gram.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spectrum {
    pub side: usize,
    /// Eigenvalues fall as `k^-decay`.
    pub decay: f64,
    /// Without a mean: activations have one, gradients hardly.
    pub centred: bool,
    /// Of all values; a power of two.
    pub scale: f64,
    /// Of what the models share.
    pub common: u64,
    /// Of one model.
    pub own: u64,
}

/// A Gram whose elements can be asked for.
pub(crate) struct SpectralGram {
    /// Side of the Hadamard matrix: a power of two.
    block: usize,
    /// For blocks `(p, q)`, `p ≥ q`, and each coupling: its value at `i ^ j`.
    tables: Vec<f32>,
    masks: [usize; COUPLINGS + 1],
    /// `S`, times the square root of the scale.
    signs: Vec<f32>,
    mean: Vec<f32>,
}

/// `Σ_k (-1)^popcount(k & x)·v_k` for all x.
fn walsh(v: &mut [f64]) {
    let mut half = 1;
    while half < v.len() {
        for pair in v.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
}

/// `[side, side]` orthogonal, dense: the cosine transform.
fn cosines(side: usize) -> Vec<f64> {
    (0..side * side)
        .map(|at| {
            let (i, k) = (at / side, at % side);
            let norm = if k == 0 { 1.0 } else { 2.0 } / side as f64;
            norm.sqrt() * (std::f64::consts::PI * (i as f64 + 0.5) * k as f64 / side as f64).cos()
        })
        .collect()
}

impl SpectralGram {
    pub(crate) fn new(spectrum: Spectrum) -> Self {
        let Spectrum { side, decay, centred, scale, common, own } = spectrum;
        let block = 1 << side.trailing_zeros();
        let blocks = side / block;
        let mut shared = Random::new(common, side as u64);
        let mut random = Random::new(own, side as u64);
        // A permutation: neighbours in the spectrum are not neighbours in the transform.
        let mut rank: Vec<usize> = (0..side).collect();
        for k in (1..side).rev() {
            rank.swap(k, (shared.bits() % (k as u64 + 1)) as usize);
        }
        let mut masks = [0; COUPLINGS + 1];
        masks[1..].iter_mut().for_each(|m| *m = shared.bits() as usize % block);
        let sign = |bit: u64| if bit & 1 == 0 { 1.0 } else { -1.0 };
        let size = scale.sqrt();
        let signs: Vec<f32> = (0..side).map(|_| (sign(shared.bits()) * size) as f32).collect();
        // The models' means lie within about twenty degrees of a common one.
        let mean = |shared: f64, own: f64| size * (MEAN / side as f64).sqrt() * (shared + 0.3 * own);
        let mean: Vec<f32> = if centred {
            vec![0.0; side]
        } else {
            (0..side).map(|_| mean(shared.normal(), random.normal()) as f32).collect()
        };
        let values: Vec<f64> = rank
            .iter()
            .map(|k| ((*k + 1) as f64).powf(-decay) * (0.5 * random.normal()).exp() + FLOOR)
            .collect();

        // Transforms of each block of D and of the couplings.
        let mut transforms = vec![0.0; blocks * (COUPLINGS + 1) * block];
        for (p, values) in values.chunks_exact(block).enumerate() {
            for (k, mask) in masks.into_iter().enumerate() {
                let at = (p * (COUPLINGS + 1) + k) * block;
                let v = &mut transforms[at..at + block];
                if k == 0 {
                    v.copy_from_slice(values);
                } else if mask != 0 {
                    let share = COUPLING / COUPLINGS as f64;
                    for i in 0..block {
                        // Both ends of a pair take the number drawn for the first.
                        let j = i ^ mask;
                        if i < j {
                            let strength = share * (2.0 * random.uniform() - 1.0);
                            (v[i], v[j]) = (strength, strength);
                        }
                    }
                    for i in 0..block {
                        v[i] *= (values[i] * values[i ^ mask]).sqrt();
                    }
                }
                walsh(v);
                v.iter_mut().for_each(|v| *v /= block as f64);
            }
        }
        // … mixed between blocks.
        let mixing = cosines(blocks);
        let width = (COUPLINGS + 1) * block;
        let mut tables = Vec::with_capacity(blocks * (blocks + 1) / 2 * width);
        for p in 0..blocks {
            for q in 0..=p {
                let mut table = vec![0.0; width];
                for (r, transform) in transforms.chunks_exact(width).enumerate() {
                    let factor = mixing[p * blocks + r] * mixing[q * blocks + r];
                    table.iter_mut().zip(transform).for_each(|(t, v)| *t += factor * v);
                }
                tables.extend(table.into_iter().map(|v| v as f32));
            }
        }
        Self { block, tables, masks, signs, mean }
    }

    /// Elements `(i, first)…` of the lower triangle: `first + out.len()` is at most `i + 1`.
    pub(crate) fn row(&self, i: usize, first: usize, out: &mut [f32]) {
        let (p, low) = (i / self.block, i % self.block);
        let width = (COUPLINGS + 1) * self.block;
        for (j, out) in (first..).zip(out) {
            let (q, column) = (j / self.block, j % self.block);
            let at = (p * (p + 1) / 2 + q) * width + (low ^ column);
            let mut value = self.tables[at];
            for (k, mask) in self.masks.iter().enumerate().skip(1) {
                let part = self.tables[at + k * self.block];
                value += if (mask & column).count_ones() & 1 == 0 { part } else { -part };
            }
            *out = self.signs[i] * self.signs[j] * value + self.mean[i] * self.mean[j];
        }
    }
}
