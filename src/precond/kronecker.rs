use std::sync::Arc;

use faer::prelude::ReborrowMut;

use super::Preconditioner;
use crate::kernel::{Buffer, Real, Threading, gemm, mat, mat_mut, transpose};
use crate::operator::{BlockShape, OperatorError, Workspace};

/// Entries of the diagonal below this fraction of the largest are null directions: they are left out of the correction,
/// where dividing rounding noise by them would send the iterate far away.
const FLOOR: f64 = 1e-7;

/// An orthonormal basis of one side of a block.
#[derive(Debug)]
pub struct Basis<T: Real> {
    /// Row k is the k-th vector: `Qᵀ` `[side, side]`.
    rows: Buffer<T>,
    /// `Q`, so that both products have row-major operands.
    columns: Buffer<T>,
    side: usize,
}

impl<T: Real> Basis<T> {
    /// From `Qᵀ`, row-major `[side, side]`.
    pub fn new(rows: Buffer<T>, side: usize, threading: Threading) -> Self {
        let mut columns = Buffer::<T>::zeroed(side * side);
        transpose(&rows, side, side, &mut columns, threading);
        Self { rows, columns, side }
    }

    /// `Qᵀ`, row-major.
    pub fn rows(&self) -> &[T] {
        &self.rows
    }

    /// Values held, per `side²`.
    pub const SQUARES: usize = 2;
}

/// `M = (Q_G ⊗ Q_A) · D · (Q_G ⊗ Q_A)ᵀ`: the operator's diagonal in the eigenbases of `Σ wᵢAᵢ` and `Σ wᵢGᵢ`.
///
/// The number of steps it leaves measures how different the models' factors are from each other, not how ill-conditioned
/// they are; a ridge is exact, because the bases are orthonormal. One application is four matrix products,
/// `4·out·in·(out + in)` flops: `2/N` of a K-FAC operator's of N models. A side without a basis is left as it is (Gram
/// systems couple the input side alone, and are solved in one step).
///
/// # Source
/// George et al. 2018 (EKFAC, arXiv:1806.03884) for the diagonal in a Kronecker eigenbasis; the basis of the sum is ours.
#[derive(Debug)]
pub struct Kronecker<T: Real> {
    shape: BlockShape,
    a: Option<Arc<Basis<T>>>,
    g: Option<Arc<Basis<T>>>,
    inverse: Buffer<T>,
}

impl<T: Real> Kronecker<T> {
    /// From bases and the operator's diagonal in them, row-major `[out, in]`, ridge included.
    ///
    /// # Errors
    /// [`OperatorError::ShapeMismatch`] where a length does not fit the block.
    pub fn new(
        shape: BlockShape,
        a: Option<Arc<Basis<T>>>,
        g: Option<Arc<Basis<T>>>,
        mut diagonal: Buffer<T>,
    ) -> Result<Self, OperatorError> {
        for (what, got, expected) in [
            ("diagonal", diagonal.len(), shape.elements()),
            ("input basis", a.as_ref().map_or(shape.in_features, |b| b.side), shape.in_features),
            ("output basis", g.as_ref().map_or(shape.out_features, |b| b.side), shape.out_features),
        ] {
            if got != expected {
                return Err(OperatorError::ShapeMismatch { what, got, expected });
            }
        }
        let floor = FLOOR * diagonal.iter().fold(0.0f64, |m, v| m.max(v.to_f64()));
        for v in diagonal.iter_mut() {
            let d = v.to_f64();
            *v = T::from_f64(if d > floor { 1.0 / d } else { 0.0 });
        }
        Ok(Self { shape, a, g, inverse: diagonal })
    }
}

impl<T: Real> Preconditioner<T> for Kronecker<T> {
    fn name(&self) -> &'static str {
        "kronecker"
    }
    fn scratch_elements(&self) -> usize {
        self.shape.elements()
    }
    fn apply_inverse(&self, r: &[T], z: &mut [T], workspace: &mut Workspace<T>) -> Result<(), OperatorError> {
        let BlockShape { out_features: m, in_features: n } = self.shape;
        let (t, threading) = workspace.take(m * n)?;
        // Into the bases: Q_Gᵀ · R · Q_A ends up in z …
        match &self.a {
            Some(basis) => {
                gemm(mat_mut(t, m, n), false, mat(r, m, n), mat(&basis.columns, n, n), 1.0, threading);
            }
            None => t.copy_from_slice(r),
        }
        match &self.g {
            Some(basis) => {
                gemm(mat_mut(z, m, n).rb_mut(), false, mat(&basis.rows, m, m), mat(t, m, n), 1.0, threading);
            }
            None => z.copy_from_slice(t),
        }
        for (z, d) in z.iter_mut().zip(self.inverse.iter()) {
            *z = T::from_f64(z.to_f64() * d.to_f64());
        }
        // … and back: Q_G · Z · Q_Aᵀ.
        match &self.g {
            Some(basis) => {
                gemm(mat_mut(t, m, n), false, mat(&basis.columns, m, m), mat(z, m, n), 1.0, threading);
            }
            None => t.copy_from_slice(z),
        }
        match &self.a {
            Some(basis) => {
                gemm(mat_mut(z, m, n).rb_mut(), false, mat(t, m, n), mat(&basis.rows, n, n), 1.0, threading);
            }
            None => z.copy_from_slice(t),
        }
        Ok(())
    }
}
