//! One side of a Kronecker preconditioner: a basis, and the models' factors in it.

use std::sync::Arc;

use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::prelude::ReborrowMut;
use faer::{MatMut, Par};

use super::cost::hybrid_keeps;
use super::{KroneckerKind, PreconditionerError};
use crate::kernel::{
    Buffer, PANEL, Real, Threading, gemm, gemm_lower, mat, mat_mut, panels, transpose, vector,
};
use crate::operator::{Factor, OperatorError, Panels, Symmetric, mirror};
use crate::solve::cholesky;
use crate::solve::eigen::{EIGENVALUE_FLOOR, Eigen};

/// Factors of one side with their weights, in the order of the models.
pub type Weighted<'f, T> = [(f64, &'f Factor<T>)];

/// Eigenvalues of a sum below this fraction of the largest are not whitened: f32 noise of the factors.
const WHITEN_FLOOR: f64 = 1e-6;
/// Largest condition at which a damped sum's inverse is rounded to f32: its own relative error of `u·condition` then stays
/// below a tenth, and `M` positive definite. Past it the factors are applied one after the other.
const INVERTIBLE: f64 = 1e6;
/// Damping of a Cholesky side where it would otherwise fail, as a fraction of the mean diagonal: first, and at most.
const DAMPING: (f64, f64) = (1e-9, 1e-2);

/// A basis `V` of one side of a block, orthonormal or not.
#[derive(Debug)]
pub struct Basis<T: Real> {
    /// Row k is the k-th vector: `Vᵀ` `[side, side]`.
    rows: Buffer<T>,
    /// `V`, so that both products have row-major operands; `None` where it is the same.
    columns: Option<Buffer<T>>,
}

impl<T: Real> Basis<T> {
    /// From `Vᵀ`, row-major `[side, side]`.
    pub fn new(rows: Buffer<T>, side: usize, threading: Threading) -> Self {
        let mut columns = Buffer::<T>::zeroed(side * side);
        transpose(&rows, side, side, &mut columns, threading);
        Self { rows, columns: Some(columns) }
    }

    /// A symmetric matrix in the place of `V`.
    fn symmetric(rows: Buffer<T>) -> Self {
        Self { rows, columns: None }
    }

    /// `Vᵀ`, row-major.
    pub fn rows(&self) -> &[T] {
        &self.rows
    }

    /// `V`, row-major.
    pub fn columns(&self) -> &[T] {
        self.columns.as_ref().unwrap_or(&self.rows)
    }
}

/// A side of a preconditioner: cheap to clone, so that tensors with one input can share theirs.
#[derive(Clone)]
pub struct Side<T: Real> {
    side: usize,
    /// `None`: the unit vectors.
    basis: Option<Arc<Basis<T>>>,
    /// `diag(Vᵀ·wᵢCᵢ·V)`, one a term; none where the kind needs none.
    diagonals: Arc<Vec<Vec<f64>>>,
    /// `diag(VᵀV)` of a basis that is not orthonormal.
    norms: Option<Arc<[f64]>>,
    /// `VᵀCᵢV`, weights not included.
    rotated: Option<Arc<Vec<Factor<T>>>>,
    /// Whether `basis` is the inverse of the sum itself: one product instead of two.
    inverted: bool,
}

impl<T: Real> Side<T> {
    /// Both sides of a block, made at the same time where threads allow.
    ///
    /// # Errors
    /// Those of reading streamed factors and of decomposing their sums.
    pub fn pair(
        kind: KroneckerKind,
        a: &Weighted<'_, T>,
        g: &Weighted<'_, T>,
        shift: f64,
        threading: Threading,
    ) -> Result<(Self, Self), PreconditionerError> {
        let (n, m) = (side_of(a), side_of(g));
        match kind {
            KroneckerKind::Cholesky => {
                // The weights count on one side; on the other their mean keeps M at the operator's size.
                let total: f64 = a.iter().map(|(w, _)| w).sum();
                let mean: Vec<_> = a.iter().map(|(w, f)| (w / total, *f)).collect();
                let (sum_a, sum_g) = (sum(&mean, threading)?, sum(g, threading)?);
                // Factored Tikhonov damping: π balances the sides, and γ·γ' = shift.
                let (mean_a, mean_g) = (mean_diagonal(&sum_a, n), mean_diagonal(&sum_g, m));
                let pi = if mean_g > 0.0 && mean_a > 0.0 { (mean_a / mean_g).sqrt() } else { 1.0 };
                let root = shift.max(0.0).sqrt();
                let (damping_a, damping_g) = (pi * root, root / pi);
                // The largest eigenvalue is below the trace, the least above the damping.
                let condition = |mean: f64, side: usize, damping: f64| mean * side as f64 / damping;
                let inverts = condition(mean_a, n, damping_a) <= INVERTIBLE
                    && condition(mean_g, m, damping_g) <= INVERTIBLE;
                both(
                    threading,
                    || Self::cholesky(sum_a, n, damping_a, a.len(), inverts, threading),
                    || Self::cholesky(sum_g, m, damping_g, g.len(), inverts, threading),
                )
            }
            _ => both(
                threading,
                || Self::of(kind, a, m, false, threading),
                || Self::of(kind, g, n, false, threading),
            ),
        }
    }

    /// One side on its own, beside another of length `other`. With `rotate` the factors are moved into an eigenbasis.
    ///
    /// A Cholesky side made so is not damped: [`Side::pair`] shares a ridge between two.
    ///
    /// # Errors
    /// As [`Side::pair`].
    pub fn of(
        kind: KroneckerKind,
        factors: &Weighted<'_, T>,
        other: usize,
        rotate: bool,
        threading: Threading,
    ) -> Result<Self, PreconditionerError> {
        match kind {
            KroneckerKind::Eigen => Self::eigen(factors, rotate, threading),
            KroneckerKind::Generalized => Self::generalized(factors, threading),
            KroneckerKind::Hybrid if hybrid_keeps(side_of(factors), other) => {
                Self::eigen(factors, false, threading)
            }
            KroneckerKind::Hybrid => Self::unit(factors, threading),
            KroneckerKind::Cholesky => Self::cholesky_of(factors, 0.0, threading),
        }
    }

    /// `V = L⁻ᵀ` of `Σ wᵢCᵢ + damping·I`.
    ///
    /// # Errors
    /// Those of reading streamed factors; [`PreconditionerError::NotPositive`].
    pub fn cholesky_of(
        factors: &Weighted<'_, T>,
        damping: f64,
        threading: Threading,
    ) -> Result<Self, PreconditionerError> {
        Self::cholesky(sum(factors, threading)?, side_of(factors), damping, factors.len(), false, threading)
    }

    /// A side on which `terms` operators are all the identity: the rows of a Gram system.
    pub fn identity(side: usize, terms: usize) -> Self {
        Self {
            side,
            basis: None,
            diagonals: Arc::new(vec![vec![1.0; side]; terms]),
            norms: None,
            rotated: None,
            inverted: false,
        }
    }

    /// Eigenvectors of `Σ wᵢCᵢ`. With `rotate` the factors are moved into them, too, and held.
    ///
    /// Cost: one eigendecomposition (`9·side³` flops, sequential, so that bits do not depend on threads) and one product a
    /// factor, two where they are moved.
    ///
    /// # Errors
    /// Those of reading streamed factors; [`PreconditionerError::Eigen`] on values that are not finite.
    pub fn eigen(
        factors: &Weighted<'_, T>,
        rotate: bool,
        threading: Threading,
    ) -> Result<Self, PreconditionerError> {
        let side = side_of(factors);
        let basis = {
            let sum = sum(factors, threading)?;
            let eigen = Eigen::<T>::of(mat(&sum, side, side))?;
            drop(sum);
            Basis::new(eigen.vectors, side, threading)
        };
        let (diagonals, rotated) = in_basis(factors, &basis, rotate, threading)?;
        Ok(Self {
            side,
            basis: Some(Arc::new(basis)),
            diagonals: Arc::new(diagonals),
            norms: None,
            rotated: rotate.then(|| Arc::new(rotated)),
            inverted: false,
        })
    }

    /// The unit vectors: each factor's own diagonal.
    ///
    /// # Errors
    /// Those of reading streamed factors.
    pub fn unit(factors: &Weighted<'_, T>, threading: Threading) -> Result<Self, PreconditionerError> {
        let side = side_of(factors);
        let diagonals = factors
            .iter()
            .map(|(weight, factor)| factor.diagonal(*weight, threading))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            side,
            basis: None,
            diagonals: Arc::new(diagonals),
            norms: None,
            rotated: None,
            inverted: false,
        })
    }

    /// `V` with `Vᵀ(Σ wᵢCᵢ)V = I` on what is not null, turned into the eigenvectors of the leading principal component of
    /// the whitened factors: for two of them that is the basis in which both are diagonal.
    ///
    /// # Errors
    /// As [`Side::eigen`].
    pub fn generalized(factors: &Weighted<'_, T>, threading: Threading) -> Result<Self, PreconditionerError> {
        let side = side_of(factors);
        let whiten = whitening(factors, side, threading)?;
        let whitened = {
            let basis = Basis::new(whiten, side, threading);
            let (_, whitened) = in_basis(factors, &basis, true, threading)?;
            (basis, whitened)
        };
        let (whiten, whitened) = whitened;
        let component = leading_component(factors, &whitened, side, threading)?;
        drop(whitened);
        let inner = Eigen::<f64>::of(mat(&component, side, side))?;
        drop(component);
        let turn = narrow::<T>(&inner.vectors);
        drop(inner);
        let mut rows = Buffer::<T>::zeroed(side * side);
        let view = mat_mut(&mut rows, side, side);
        gemm(view, false, mat(&turn, side, side), mat(whiten.rows(), side, side), 1.0, threading);
        drop((turn, whiten));
        let norms = rows
            .chunks_exact(side.max(1))
            .map(|v| vector::dot(v, v, Threading::Sequential))
            .collect::<Vec<f64>>();
        let basis = Basis::new(rows, side, threading);
        let (diagonals, _) = in_basis(factors, &basis, false, threading)?;
        Ok(Self {
            side,
            basis: Some(Arc::new(basis)),
            diagonals: Arc::new(diagonals),
            norms: Some(norms.into()),
            rotated: None,
            inverted: false,
        })
    }

    /// `V = L⁻ᵀ` of `sum + damping·I = L·Lᵀ`, or where `inverts` the inverse itself. A sum that is singular in f64 is damped
    /// further until it factors.
    fn cholesky(
        sum: Buffer<T>,
        side: usize,
        damping: f64,
        terms: usize,
        inverts: bool,
        threading: Threading,
    ) -> Result<Self, PreconditionerError> {
        let mean = mean_diagonal(&sum, side);
        let mut wide = Buffer::<f64>::zeroed(side * side);
        let mut extra = 0.0;
        loop {
            for (w, s) in wide.iter_mut().zip(sum.iter()) {
                *w = s.to_f64();
            }
            let damped = damping.max(extra * mean);
            wide.iter_mut().step_by(side + 1).for_each(|d| *d += damped);
            match cholesky::factorise(&mut wide, side, threading) {
                Ok(()) => break,
                Err(_) if extra < DAMPING.1 => extra = (extra * 10.0).max(DAMPING.0),
                Err(error) => return Err(PreconditionerError::NotPositive { row: error.row }),
            }
        }
        drop(sum);
        let mut inverse = Buffer::<f64>::zeroed(side * side);
        let out: MatMut<'_, f64> = mat_mut(&mut inverse, side, side);
        invert_lower_triangular(out, mat(&wide, side, side), Par::Seq);
        let basis = if inverts {
            // L⁻ᵀ·L⁻¹, in the place of L.
            let factor = mat(&inverse, side, side);
            gemm_lower(mat_mut(&mut wide, side, side), false, factor.transpose(), factor, 1.0, threading);
            drop(inverse);
            mirror(&mut wide, side);
            Basis::symmetric(narrow::<T>(&wide))
        } else {
            drop(wide);
            Basis::new(narrow::<T>(&inverse), side, threading)
        };
        Ok(Self {
            side,
            basis: Some(Arc::new(basis)),
            diagonals: Arc::new(vec![Vec::new(); terms]),
            norms: None,
            rotated: None,
            inverted: inverts,
        })
    }

    /// The factors have so much more on their diagonals, weights included: `diag(Vᵀ(C + δI)V)`.
    pub(super) fn lift(&mut self, by: &[f64]) {
        if by.iter().all(|by| *by == 0.0) {
            return;
        }
        let mut diagonals = self.diagonals.as_ref().clone();
        for (diagonal, by) in diagonals.iter_mut().zip(by) {
            for (k, d) in diagonal.iter_mut().enumerate() {
                *d += by * self.norm(k);
            }
        }
        self.diagonals = Arc::new(diagonals);
    }

    /// Length of the side.
    pub fn side(&self) -> usize {
        self.side
    }
    /// Factors it was made of.
    pub fn terms(&self) -> usize {
        self.diagonals.len()
    }
    /// Whether products are needed to get into it.
    pub fn has_basis(&self) -> bool {
        self.basis.is_some()
    }
    pub(super) fn inverted(&self) -> bool {
        self.inverted
    }
    pub(super) fn diagonals(&self) -> &[Vec<f64>] {
        &self.diagonals
    }
    pub(super) fn norm(&self, k: usize) -> f64 {
        self.norms.as_ref().map_or(1.0, |n| n[k])
    }
    pub(super) fn rotated(&self) -> Option<&[Factor<T>]> {
        self.rotated.as_ref().map(|f| f.as_slice())
    }

    /// `out ← x·V` for row-major `x` `[rows, side]`.
    pub(super) fn right(&self, x: &[T], out: &mut [T], rows: usize, threading: Threading) {
        self.times_right(x, out, rows, Basis::columns, threading);
    }
    /// `out ← x·Vᵀ`.
    pub(super) fn right_back(&self, x: &[T], out: &mut [T], rows: usize, threading: Threading) {
        self.times_right(x, out, rows, Basis::rows, threading);
    }
    /// `out ← Vᵀ·x` for row-major `x` `[side, columns]`.
    pub(super) fn left(&self, x: &[T], out: &mut [T], columns: usize, threading: Threading) {
        self.times_left(x, out, columns, Basis::rows, threading);
    }
    /// `out ← V·x`.
    pub(super) fn left_back(&self, x: &[T], out: &mut [T], columns: usize, threading: Threading) {
        self.times_left(x, out, columns, Basis::columns, threading);
    }

    fn times_right(
        &self,
        x: &[T],
        out: &mut [T],
        rows: usize,
        pick: fn(&Basis<T>) -> &[T],
        threading: Threading,
    ) {
        match &self.basis {
            None => out.copy_from_slice(x),
            Some(basis) => {
                let n = self.side;
                let out = mat_mut(out, rows, n);
                gemm(out, false, mat(x, rows, n), mat(pick(basis), n, n), 1.0, threading);
            }
        }
    }

    fn times_left(
        &self,
        x: &[T],
        out: &mut [T],
        columns: usize,
        pick: fn(&Basis<T>) -> &[T],
        threading: Threading,
    ) {
        match &self.basis {
            None => out.copy_from_slice(x),
            Some(basis) => {
                let m = self.side;
                let out = mat_mut(out, m, columns);
                gemm(out, false, mat(pick(basis), m, m), mat(x, m, columns), 1.0, threading);
            }
        }
    }
}

/// Runs both, side by side where threads allow.
fn both<R: Send>(
    threading: Threading,
    input: impl FnOnce() -> Result<R, PreconditionerError> + Send,
    output: impl FnOnce() -> Result<R, PreconditionerError> + Send,
) -> Result<(R, R), PreconditionerError> {
    let (a, g) = match threading {
        Threading::Sequential => (input(), output()),
        Threading::Parallel => rayon::join(input, output),
    };
    Ok((a?, g?))
}

fn mean_diagonal<T: Real>(s: &[T], side: usize) -> f64 {
    s.iter().step_by(side + 1).map(|v| v.to_f64()).sum::<f64>() / side.max(1) as f64
}

fn side_of<T: Real>(factors: &Weighted<'_, T>) -> usize {
    factors.first().map_or(0, |(_, f)| f.side())
}

/// `Σ wᵢCᵢ`, both triangles.
fn sum<T: Real>(factors: &Weighted<'_, T>, threading: Threading) -> Result<Buffer<T>, OperatorError> {
    let side = side_of(factors);
    let mut sum = Buffer::<T>::zeroed(side * side);
    let need = factors.iter().map(|(_, f)| f.add_scratch()).max().unwrap_or(0);
    let mut scratch = Buffer::<T>::zeroed(need);
    for (weight, factor) in factors {
        factor.add_to(&mut sum, *weight, &mut scratch, threading)?;
    }
    mirror(&mut sum, side);
    Ok(sum)
}

/// Diagonals of every factor in a basis and, where asked for, the factors themselves.
type InBasis<T> = (Vec<Vec<f64>>, Vec<Factor<T>>);

/// `diag(Vᵀ·wᵢCᵢ·V)` of every factor and, where asked for, `VᵀCᵢV` itself.
///
/// Cost: `2·side³` flops a factor, twice that with the products.
fn in_basis<T: Real>(
    factors: &Weighted<'_, T>,
    basis: &Basis<T>,
    products: bool,
    threading: Threading,
) -> Result<InBasis<T>, OperatorError> {
    let side = side_of(factors);
    let need = factors.iter().map(|(_, f)| f.right_scratch(PANEL.min(side))).max().unwrap_or(0);
    let mut scratch = Buffer::<T>::zeroed(need);
    let mut tile = Buffer::<T>::zeroed(PANEL.min(side) * side);
    let (mut diagonals, mut moved) = (Vec::with_capacity(factors.len()), Vec::new());
    for (weight, factor) in factors {
        let mut diagonal = Vec::with_capacity(side);
        let mut product = Buffer::<T>::zeroed(if products { side * side } else { 0 });
        for rows in panels(side) {
            let v = &basis.rows[rows.start * side..rows.end * side];
            let mut out = mat_mut(&mut tile, rows.len(), side);
            factor.right_multiply(
                mat(v, rows.len(), side),
                out.rb_mut(),
                false,
                1.0,
                &mut scratch,
                threading,
            )?;
            if products {
                let moved = mat_mut(&mut product[rows.start * side..rows.end * side], rows.len(), side);
                gemm(
                    moved,
                    false,
                    mat(&tile, rows.len(), side),
                    mat(basis.columns(), side, side),
                    1.0,
                    threading,
                );
            }
            for (v, c) in v.chunks_exact(side).zip(tile.chunks_exact(side)) {
                diagonal.push(weight * vector::dot(v, c, Threading::Sequential).max(0.0));
            }
        }
        diagonals.push(diagonal);
        if products {
            // Rounding breaks the symmetry that the operator's kernels rely on.
            mirror(&mut product, side);
            moved.push(Factor::Symmetric(Symmetric::new(Panels::from_buffer(
                side,
                side,
                Arc::new(product),
            ))?));
        }
    }
    Ok((diagonals, moved))
}

/// `Λ^-½·Qᵀ` of `Σ wᵢCᵢ`, rows below the floor zero.
fn whitening<T: Real>(
    factors: &Weighted<'_, T>,
    side: usize,
    threading: Threading,
) -> Result<Buffer<T>, PreconditionerError> {
    let mut wide = Buffer::<f64>::zeroed(side * side);
    {
        let sum = sum(factors, threading)?;
        wide.iter_mut().zip(sum.iter()).for_each(|(w, s)| *w = s.to_f64());
    }
    let mut eigen = Eigen::<f64>::of(mat(&wide, side, side))?;
    drop(wide);
    let relative = if T::BYTES == size_of::<f64>() { EIGENVALUE_FLOOR } else { WHITEN_FLOOR };
    let floor = relative * eigen.values.last().copied().unwrap_or(0.0);
    for (row, value) in eigen.vectors.chunks_exact_mut(side.max(1)).zip(&eigen.values) {
        let scale = if *value > floor { value.sqrt().recip() } else { 0.0 };
        row.iter_mut().for_each(|v| *v *= scale);
    }
    Ok(narrow::<T>(&eigen.vectors))
}

/// `Σ vᵢ·C̃ᵢ` with `v` the leading eigenvector of the covariance of the whitened factors `C̃ᵢ`.
fn leading_component<T: Real>(
    factors: &Weighted<'_, T>,
    whitened: &[Factor<T>],
    side: usize,
    threading: Threading,
) -> Result<Buffer<f64>, PreconditionerError> {
    let models = whitened.len();
    let mut scratch = Buffer::<T>::zeroed(0);
    let dense = whitened
        .iter()
        .map(|f| {
            let mut values = Buffer::<T>::zeroed(side * side);
            f.add_to(&mut values, 1.0, &mut scratch, threading).map(|()| values)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let weights: Vec<f64> = factors.iter().map(|(w, _)| *w).collect();
    let mut products = vec![0.0; models * models];
    for i in 0..models {
        for j in 0..=i {
            let value = weights[i] * weights[j] * vector::dot(&dense[i], &dense[j], threading);
            (products[i * models + j], products[j * models + i]) = (value, value);
        }
    }
    // Around the mean: what all share turns nothing.
    let row_means: Vec<f64> =
        products.chunks_exact(models.max(1)).map(|r| r.iter().sum::<f64>() / models as f64).collect();
    let mean = row_means.iter().sum::<f64>() / models.max(1) as f64;
    for i in 0..models {
        for j in 0..models {
            products[i * models + j] += mean - row_means[i] - row_means[j];
        }
    }
    let covariance = Eigen::<f64>::of(mat(&products, models, models))?;
    let leading = &covariance.vectors[models * models.saturating_sub(1)..];
    let shift = leading.iter().sum::<f64>() / models.max(1) as f64;
    let mut component = Buffer::<f64>::zeroed(side * side);
    for (k, values) in dense.iter().enumerate() {
        let weight = weights[k] * (leading[k] - shift);
        for (c, v) in component.iter_mut().zip(values.iter()) {
            *c += weight * v.to_f64();
        }
    }
    Ok(component)
}

fn narrow<T: Real>(wide: &[f64]) -> Buffer<T> {
    let mut out = Buffer::<T>::zeroed(wide.len());
    out.iter_mut().zip(wide).for_each(|(o, w)| *o = T::from_f64(*w));
    out
}
