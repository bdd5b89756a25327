//! Two symmetric matrices made diagonal at once, and with them the exact inverse of a sum of two Kronecker products.

use faer::MatRef;
use faer::prelude::ReborrowMut;

use super::eigen::{EIGENVALUE_FLOOR, Eigen, NOISE_FLOOR, NoConvergence, eigenvalue_noise};
use crate::kernel::{Buffer, Threading, gemm, mat, mat_mut};

/// Roundings that add up in a share, of products as long as a side and of two decompositions.
const ROUNDING: f64 = 64.0;

/// `V` with `Vᵀ(B₁+B₂)V = I` and `Vᵀ B₁ V = diag(share)`, `Vᵀ B₂ V = diag(1-share)`: both matrices made diagonal at
/// once. Directions in which both vanish have a zero column.
#[derive(Debug)]
pub struct Pencil {
    /// Row-major `Vᵀ` `[side, side]`.
    pub vectors: Buffer<f64>,
    /// In [0, 1].
    pub share: Vec<f64>,
    /// What f64 arithmetic does to `vᵀB₁v` of a vector of length 1.
    rounding: f64,
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
        let largest = whole.values.last().copied().unwrap_or(0.0);
        let whiten = whitening(whole, noise.max(EIGENVALUE_FLOOR * largest));
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
        Ok(Self { vectors, share, rounding: ROUNDING * f64::EPSILON * largest })
    }

    /// Which of the two matrices weigh direction `k`.
    fn weighed(&self, k: usize) -> Weighed {
        let row = self.row(k);
        // Forming the matrices and the products has moved a share by so much.
        let floor = EIGENVALUE_FLOOR.max(self.rounding * row.iter().map(|v| v * v).sum::<f64>());
        match self.share[k] {
            share if share <= floor => Weighed::Second,
            share if 1.0 - share <= floor => Weighed::First,
            _ => Weighed::Both,
        }
    }

    fn row(&self, k: usize) -> &[f64] {
        let side = self.share.len();
        &self.vectors[k * side..(k + 1) * side]
    }

    /// An orthonormal basis, in rows, of the directions that one of the matrices alone weighs.
    ///
    /// # Errors
    /// [`NoConvergence`] on values that are not finite.
    fn basis(&self, weighed: Weighed, threading: Threading) -> Result<Rows, NoConvergence> {
        let side = self.share.len();
        let norm = |k: usize| self.row(k).iter().map(|v| v * v).sum::<f64>().sqrt();
        // A direction that neither weighs has no column.
        let ours: Vec<usize> = (0..side).filter(|k| self.weighed(*k) == weighed && norm(*k) > 0.0).collect();
        let mut rows = Rows::of(ours.len(), side);
        for (row, k) in rows.values.chunks_exact_mut(side.max(1)).zip(ours) {
            let norm = norm(k);
            row.iter_mut().zip(self.row(k)).for_each(|(to, v)| *to = v / norm);
        }
        // Twice is enough: the first leaves them almost orthonormal.
        rows.orthonormal(threading)?.orthonormal(threading)
    }
}

/// `Λ^(-½)·Qᵀ`, with 0 for eigenvalues up to `floor`.
fn whitening(eigen: Eigen, floor: f64) -> Buffer<f64> {
    let mut rows = eigen.vectors;
    for (row, value) in rows.chunks_exact_mut(eigen.values.len().max(1)).zip(&eigen.values) {
        let scale = if *value > floor { value.sqrt().recip() } else { 0.0 };
        row.iter_mut().for_each(|v| *v *= scale);
    }
    rows
}

/// Which of two matrices weigh a direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Weighed {
    First,
    Second,
    Both,
}

/// A row-major matrix.
#[derive(Debug)]
struct Rows {
    count: usize,
    side: usize,
    values: Buffer<f64>,
}

impl Rows {
    fn of(count: usize, side: usize) -> Self {
        Self { count, side, values: Buffer::zeroed(count * side) }
    }

    fn view(&self) -> MatRef<'_, f64> {
        mat(&self.values, self.count, self.side)
    }

    /// `lhs · rhs`.
    fn product(lhs: MatRef<'_, f64>, rhs: MatRef<'_, f64>, threading: Threading) -> Self {
        let mut out = Self::of(lhs.nrows(), rhs.ncols());
        gemm(mat_mut(&mut out.values, out.count, out.side), false, lhs, rhs, 1.0, threading);
        out
    }

    /// `self ← self - lhs · rhs`.
    fn subtract(&mut self, lhs: MatRef<'_, f64>, rhs: MatRef<'_, f64>, threading: Threading) {
        gemm(mat_mut(&mut self.values, self.count, self.side), true, lhs, rhs, -1.0, threading);
    }

    /// Rows that span the same and are orthonormal, as far as the condition of these allows.
    fn orthonormal(&self, threading: Threading) -> Result<Self, NoConvergence> {
        if self.count == 0 {
            return Ok(Self::of(0, self.side));
        }
        let gram = Self::product(self.view(), self.view().transpose(), threading);
        let whiten = whitening(Eigen::of(gram.view())?, EIGENVALUE_FLOOR);
        Ok(Self::product(mat(&whiten, self.count, self.count), self.view(), threading))
    }
}

/// The inverse of `X ↦ G₁·X·A₁ + G₂·X·A₂` on row-major `[out, in]` blocks. Directions that no term weighs give zero.
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
    ///
    /// Where there are null directions this is one of many solutions: the bases are not orthogonal, so that it has a part in
    /// them. See [`TwoTermInverse::leave_null_space`].
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

    /// Takes from `d` what lies in the null space of the sum, by orthogonal projection: a solution becomes the least one.
    ///
    /// Beside what a factor's sum lacks (where a solution has nothing), the null space is `U₁⊗W₂ + U₂⊗W₁`: output directions that
    /// the first model alone has, with input directions that the second alone has, and the other way round. With orthonormal
    /// bases, the projection's coordinates solve `Z₁ + C·Z₂·E = U₁ᵀDW₂`, `Z₂ + Cᵀ·Z₁·Eᵀ = U₂ᵀDW₁` where `C = U₁ᵀU₂` and
    /// `E = W₁ᵀW₂`, which the eigenvectors of `CCᵀ` and `EᵀE` make diagonal.
    ///
    /// # Errors
    /// [`NoConvergence`] on values that are not finite.
    pub fn leave_null_space(&self, d: &mut [f64], threading: Threading) -> Result<(), NoConvergence> {
        let (m, n) = (self.g.share.len(), self.a.share.len());
        let (u1, u2) = (self.g.basis(Weighed::First, threading)?, self.g.basis(Weighed::Second, threading)?);
        let (w1, w2) = (self.a.basis(Weighed::First, threading)?, self.a.basis(Weighed::Second, threading)?);
        if u1.count * w2.count + u2.count * w1.count == 0 {
            return Ok(());
        }
        let coordinates = |u: &Rows, w: &Rows| {
            let half = Rows::product(u.view(), mat(d, m, n), threading);
            Rows::product(half.view(), w.view().transpose(), threading)
        };
        let (mut z1, mut z2) = (coordinates(&u1, &w2), coordinates(&u2, &w1));
        if z1.values.len() * z2.values.len() > 0 {
            let c = Rows::product(u1.view(), u2.view().transpose(), threading);
            let e = Rows::product(w1.view(), w2.view().transpose(), threading);
            let c_z2 = Rows::product(c.view(), z2.view(), threading);
            z1.subtract(c_z2.view(), e.view(), threading);
            let left: Eigen = Eigen::of(Rows::product(c.view(), c.view().transpose(), threading).view())?;
            let right: Eigen = Eigen::of(Rows::product(e.view().transpose(), e.view(), threading).view())?;
            let (p, q) = (mat(&left.vectors, u1.count, u1.count), mat(&right.vectors, w2.count, w2.count));
            let half = Rows::product(p, z1.view(), threading);
            let mut inner = Rows::product(half.view(), q.transpose(), threading);
            for (row, gamma) in inner.values.chunks_exact_mut(w2.count).zip(&left.values) {
                for (v, phi) in row.iter_mut().zip(&right.values) {
                    // 0 only where one direction were in both bases.
                    *v /= (1.0 - gamma * phi).max(EIGENVALUE_FLOOR);
                }
            }
            let half = Rows::product(p.transpose(), inner.view(), threading);
            z1 = Rows::product(half.view(), q, threading);
            let c_z1 = Rows::product(c.view().transpose(), z1.view(), threading);
            z2.subtract(c_z1.view(), e.view().transpose(), threading);
        }
        for (u, z, w) in [(&u1, &z1, &w2), (&u2, &z2, &w1)] {
            if !z.values.is_empty() {
                let half = Rows::product(u.view().transpose(), z.view(), threading);
                gemm(mat_mut(d, m, n), true, half.view(), w.view(), -1.0, threading);
            }
        }
        Ok(())
    }

    /// Values that [`TwoTermInverse::leave_null_space`] allocates at most for `[m, n]`.
    pub fn null_space_values(m: usize, n: usize) -> usize {
        // Bases beside what they were made of, coordinates beside the halves of products, Grams and their decompositions.
        let side = m.max(n);
        3 * (m * m + n * n) + 4 * m * n + (Eigen::<f64>::SQUARES + 3) * side * side
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

    /// `K⁺K·x` of `K = G₁⊗A₁ + G₂⊗A₂`, formed and decomposed, against the pencils' solution of `K·d = K·x`.
    fn least_solution(ranks_g: [usize; 2], ranks_a: [usize; 2]) -> f64 {
        let (m, n, threading) = (7, 5, Threading::Sequential);
        let g = [wishart(m, ranks_g[0], 5), wishart(m, ranks_g[1], 6)];
        let a = [wishart(n, ranks_a[0], 7), wishart(n, ranks_a[1], 8)];
        let size = m * n;
        let mut k = vec![0.0; size * size];
        for (g, a) in g.iter().zip(&a) {
            for (row, column) in (0..size * size).map(|i| (i / size, i % size)) {
                k[row * size + column] += g[row / n * m + column / n] * a[row % n * n + column % n];
            }
        }
        let x: Vec<f64> = (0..size).map(|i| (i as f64 * 0.7).sin()).collect();
        let mut b = vec![0.0; size];
        gemm(mat_mut(&mut b, size, 1), false, mat(&k, size, size), mat(&x, size, 1), 1.0, threading);
        let (mut want, mut t) = (b.clone(), vec![0.0; size]);
        Eigen::of(mat(&k, size, size)).unwrap().solve_right(&mut want, &mut t, threading);
        let pencil = |two: &[Vec<f64>; 2], side| {
            let mut sum: Vec<f64> = two[0].iter().zip(&two[1]).map(|(a, b)| a + b).collect();
            Pencil::of(&mut two[0].clone(), &mut sum, side, 0.0, threading).unwrap()
        };
        let inverse = TwoTermInverse::new(pencil(&a, n), pencil(&g, m));
        inverse.apply(&mut b, &mut t, threading);
        inverse.leave_null_space(&mut b, threading).unwrap();
        b.iter().zip(&want).map(|(got, want)| (got - want).abs()).fold(0.0, f64::max)
    }

    #[test]
    fn a_singular_sum_leaves_its_null_space_alone() {
        // Conditions of 1e3 at most on each side. The last ones: what both lack, one model with everything, no overlap.
        for (ranks_g, ranks_a) in [
            ([4, 5], [3, 3]),
            ([5, 4], [4, 3]),
            ([2, 3], [2, 2]),
            ([7, 3], [2, 5]),
            ([3, 4], [2, 3]),
            ([9, 9], [9, 9]),
            ([1, 1], [1, 1]),
        ] {
            let error = least_solution(ranks_g, ranks_a);
            assert!(error < 1e-9, "{ranks_g:?} {ranks_a:?}: {error}");
        }
    }
}
