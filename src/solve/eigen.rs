//! Direct solves that see every direction: a floored eigendecomposition for singular Grams, and two generalised
//! eigendecompositions for a sum of two Kronecker products.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::prelude::ReborrowMut;
use faer::{MatRef, Par};

use crate::kernel::{Buffer, PANEL, Real, Threading, gemm, mat, mat_mut};

/// Eigenvalues below this fraction of the largest are null directions: f64 noise of a matrix stored in f32.
pub const EIGENVALUE_FLOOR: f64 = 1e-10;

/// An eigenvalue below so many times the storage noise is not told from zero.
pub const NOISE_FLOOR: f64 = 4.0;

/// How far rounding every entry of a symmetric row-major `[side, side]` matrix by a relative `unit_roundoff` moves its
/// eigenvalues: the spectral norm of a random symmetric matrix with entries of that size, `2·σ·√side` with σ² the
/// variance of a uniform rounding error.
pub fn eigenvalue_noise(s: &[f64], side: usize, unit_roundoff: f64) -> f64 {
    let squares: f64 =
        s[..side * side].chunks(1 << 16).map(|piece| piece.iter().map(|v| v * v).sum::<f64>()).sum();
    2.0 * unit_roundoff / 3f64.sqrt() * squares.sqrt() / (side.max(1) as f64).sqrt()
}

/// An eigendecomposition did not converge: only matrices that are not finite do that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the eigendecomposition of a {side} x {side} matrix did not converge")]
pub struct NoConvergence {
    /// Side of the matrix.
    pub side: usize,
}

/// `S = Q·Λ·Qᵀ`, in f64 for direct solves; f32 is enough for, and half the price of, a preconditioner's basis.
#[derive(Debug)]
pub struct Eigen<T: Real = f64> {
    /// Ascending.
    pub values: Vec<f64>,
    /// Row-major `[side, side]`; row k is the k-th eigenvector, so this is `Qᵀ`.
    pub vectors: Buffer<T>,
}

impl<T: Real> Eigen<T> {
    /// Values that [`Eigen::of`] allocates besides its argument, per `side²`: vectors and faer's scratch.
    pub const SQUARES: usize = 3;

    /// Decomposes a symmetric row-major `[side, side]` matrix, of which the lower triangle is read.
    ///
    /// Sequential, so that the bits do not depend on threads. Cost: about `9·side³` flops.
    ///
    /// # Errors
    /// [`NoConvergence`] on values that are not finite.
    pub fn of(s: MatRef<'_, T>) -> Result<Self, NoConvergence> {
        let side = s.nrows();
        let mut values = faer::Col::<T>::zeros(side);
        let mut vectors = Buffer::<T>::zeroed(side * side);
        let scratch =
            self_adjoint_evd_scratch::<T>(side, ComputeEigenvectors::Yes, Par::Seq, Default::default());
        let mut memory = MemBuffer::new(scratch);
        self_adjoint_evd(
            s,
            values.as_diagonal_mut(),
            // Column-major Q is row-major Qᵀ.
            Some(mat_mut(&mut vectors, side, side).transpose_mut()),
            Par::Seq,
            MemStack::new(&mut memory),
            Default::default(),
        )
        .map_err(|_| NoConvergence { side })?;
        Ok(Self { values: values.iter().map(|v| v.to_f64()).collect(), vectors })
    }
}

/// Values that [`eigenvalues`] allocates, per `side²`; and some 100 a side.
pub const EIGENVALUES_SQUARES: usize = 1;

/// The eigenvalues of a symmetric row-major `[side, side]` matrix, of which the lower triangle is read, ascending.
///
/// Sequential. Cost: about `4/3·side³` flops.
///
/// # Errors
/// [`NoConvergence`] on values that are not finite.
pub fn eigenvalues(s: MatRef<'_, f64>) -> Result<Vec<f64>, NoConvergence> {
    let side = s.nrows();
    let mut values = faer::Col::<f64>::zeros(side);
    let scratch =
        self_adjoint_evd_scratch::<f64>(side, ComputeEigenvectors::No, Par::Seq, Default::default());
    let mut memory = MemBuffer::new(scratch);
    let stack = MemStack::new(&mut memory);
    self_adjoint_evd(s, values.as_diagonal_mut(), None, Par::Seq, stack, Default::default())
        .map_err(|_| NoConvergence { side })?;
    Ok(values.iter().copied().collect())
}

impl Eigen<f64> {
    /// `R ← R·S⁺` for row-major `r` `[rows, side]`: directions below [`EIGENVALUE_FLOOR`] give zero.
    /// `t` is scratch of `r`'s length.
    pub fn solve_right(&self, r: &mut [f64], t: &mut [f64], threading: Threading) {
        let side = self.values.len();
        let largest = self.values.last().copied().unwrap_or(0.0);
        let q_transposed = mat(&self.vectors, side, side);
        // In panels of rows, so that the bits do not depend on how many rows there are.
        let panel = PANEL * side.max(1);
        for (r, t) in r.chunks_mut(panel).zip(t.chunks_mut(panel)) {
            let rows = r.len() / side.max(1);
            gemm(mat_mut(t, rows, side), false, mat(r, rows, side), q_transposed.transpose(), 1.0, threading);
            for row in t.chunks_exact_mut(side.max(1)) {
                for (v, value) in row.iter_mut().zip(&self.values) {
                    *v = if *value > largest * EIGENVALUE_FLOOR { *v / value } else { 0.0 };
                }
            }
            gemm(mat_mut(r, rows, side), false, mat(t, rows, side), q_transposed, 1.0, threading);
        }
    }
}

/// `V` with `Vᵀ(B₁+B₂)V = I` and `Vᵀ B₁ V = diag(share)`, `Vᵀ B₂ V = diag(1-share)`: both matrices made diagonal at
/// once. Directions in which both vanish have a zero column.
#[derive(Debug)]
pub struct Pencil {
    /// Row-major `Vᵀ` `[side, side]`.
    pub vectors: Buffer<f64>,
    /// In [0, 1].
    pub share: Vec<f64>,
}

impl Pencil {
    /// Of two symmetric positive semidefinite row-major `[side, side]` matrices. `sum` holds `B₁+B₂` on entry and is
    /// overwritten, `first` holds `B₁` and is overwritten. Directions of the sum below the noise of storing it with
    /// `unit_roundoff` count as null. Cost: two eigendecompositions and four products.
    ///
    /// # Errors
    /// [`NoConvergence`] on values that are not finite.
    pub fn of(
        first: &mut [f64],
        sum: &mut [f64],
        side: usize,
        unit_roundoff: f64,
        threading: Threading,
    ) -> Result<Self, NoConvergence> {
        let noise = NOISE_FLOOR * eigenvalue_noise(sum, side, unit_roundoff);
        let whole = Eigen::of(mat(sum, side, side))?;
        let floor = noise.max(EIGENVALUE_FLOOR * whole.values.last().copied().unwrap_or(0.0));
        let mut whiten = whole.vectors;
        for (row, value) in whiten.chunks_exact_mut(side.max(1)).zip(&whole.values) {
            let scale = if *value > floor { value.sqrt().recip() } else { 0.0 };
            row.iter_mut().for_each(|v| *v *= scale);
        }
        // whiten·B₁·whitenᵀ, in `first`, by way of `sum`.
        gemm(
            mat_mut(sum, side, side),
            false,
            mat(&whiten, side, side),
            mat(first, side, side),
            1.0,
            threading,
        );
        gemm(
            mat_mut(first, side, side),
            false,
            mat(sum, side, side),
            mat(&whiten, side, side).transpose(),
            1.0,
            threading,
        );
        let inner = Eigen::of(mat(first, side, side))?;
        let mut vectors = Buffer::<f64>::zeroed(side * side);
        gemm(
            mat_mut(&mut vectors, side, side).rb_mut(),
            false,
            mat(&inner.vectors, side, side),
            mat(&whiten, side, side),
            1.0,
            threading,
        );
        let share = inner.values.iter().map(|v| v.clamp(0.0, 1.0)).collect();
        Ok(Self { vectors, share })
    }
}

/// The inverse of `X ↦ G₁·X·A₁ + G₂·X·A₂` on row-major `[out, in]` blocks. Directions that no model weighs give zero.
///
/// # Source
/// Two-term generalised Sylvester equations by simultaneous diagonalisation (Golub & Van Loan §8.7).
#[derive(Debug)]
pub struct TwoTermInverse {
    a: Pencil,
    g: Pencil,
}

impl TwoTermInverse {
    /// From the pencils of the input and of the output factors (weights folded into the factors).
    pub fn new(a: Pencil, g: Pencil) -> Self {
        Self { a, g }
    }

    /// `R ← (…)⁻¹ R`; `t` is scratch of `r`'s length.
    pub fn apply(&self, r: &mut [f64], t: &mut [f64], threading: Threading) {
        let (m, n) = (self.g.share.len(), self.a.share.len());
        let (va, vg) = (mat(&self.a.vectors, n, n), mat(&self.g.vectors, m, m));
        // Vgᵀ·R·Va, divided, and back: Vg·(…)·Vaᵀ.
        gemm(mat_mut(t, m, n), false, mat(r, m, n), va.transpose(), 1.0, threading);
        gemm(mat_mut(r, m, n), false, vg, mat(t, m, n), 1.0, threading);
        for (row, b) in r.chunks_exact_mut(n.max(1)).zip(&self.g.share) {
            for (v, a) in row.iter_mut().zip(&self.a.share) {
                let weight = b * a + (1.0 - b) * (1.0 - a);
                *v = if weight > EIGENVALUE_FLOOR { *v / weight } else { 0.0 };
            }
        }
        gemm(mat_mut(t, m, n), false, vg.transpose(), mat(r, m, n), 1.0, threading);
        gemm(mat_mut(r, m, n), false, mat(t, m, n), va, 1.0, threading);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wishart(side: usize, rank: usize, seed: u64) -> Vec<f64> {
        let mut state = seed | 1;
        let f: Vec<f64> = (0..rank * side)
            .map(|_| {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                ((state >> 33) as f64) / f64::from(1u32 << 31) - 0.5
            })
            .collect();
        let mut s = vec![0.0; side * side];
        let f = mat(&f, rank, side);
        gemm(mat_mut(&mut s, side, side), false, f.transpose(), f, 1.0, Threading::Sequential);
        s
    }

    #[test]
    fn a_singular_gram_leaves_its_null_space_alone() {
        // diag(4, 0): only the first coordinate is solved.
        let eigen = Eigen::of(mat(&[4.0, 0.0, 0.0, 0.0], 2, 2)).unwrap();
        let (mut r, mut t) = (vec![8.0, 3.0], vec![0.0; 2]);
        eigen.solve_right(&mut r, &mut t, Threading::Sequential);
        assert_eq!(r, [2.0, 0.0]);
    }

    #[test]
    fn two_kronecker_terms_are_inverted_exactly() {
        let (m, n) = (7, 5);
        let (a1, a2) = (wishart(n, 9, 1), wishart(n, 8, 2));
        let (g1, g2) = (wishart(m, 9, 3), wishart(m, 11, 4));
        let x: Vec<f64> = (0..m * n).map(|i| (i as f64 * 0.7).sin()).collect();
        let mut r = vec![0.0; m * n];
        let mut t = vec![0.0; m * n];
        for (a, g) in [(&a1, &g1), (&a2, &g2)] {
            gemm(mat_mut(&mut t, m, n), false, mat(&x, m, n), mat(a, n, n), 1.0, Threading::Sequential);
            gemm(mat_mut(&mut r, m, n), true, mat(g, m, m), mat(&t, m, n), 1.0, Threading::Sequential);
        }
        let add = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(a, b)| a + b).collect::<Vec<f64>>();
        let (mut sum_a, mut sum_g) = (add(&a1, &a2), add(&g1, &g2));
        let a = Pencil::of(&mut a1.clone(), &mut sum_a, n, 0.0, Threading::Sequential).unwrap();
        let g = Pencil::of(&mut g1.clone(), &mut sum_g, m, 0.0, Threading::Sequential).unwrap();
        TwoTermInverse::new(a, g).apply(&mut r, &mut t, Threading::Sequential);
        // Conditions of 1e3 at most on each side: 1e-16 · 1e6.
        for (got, want) in r.iter().zip(&x) {
            assert!((got - want).abs() < 1e-9, "{got} {want}");
        }
    }
}
