//! Eigendecompositions in f64, and the direct solve that sees every direction: floored, for singular Grams.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_singular_gram_leaves_its_null_space_alone() {
        // diag(4, 0): only the first coordinate is solved.
        let eigen = Eigen::of(mat(&[4.0, 0.0, 0.0, 0.0], 2, 2)).unwrap();
        let (mut r, mut t) = (vec![8.0, 3.0], vec![0.0; 2]);
        eigen.solve_right(&mut r, &mut t, Threading::Sequential);
        assert_eq!(r, [2.0, 0.0]);
    }
}
