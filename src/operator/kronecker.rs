//! The K-FAC operator: a sum of Kronecker products, applied as two matrix products a term.

use faer::prelude::ReborrowMut;

use super::{
    BlockShape, Factor, Lift, LinearOperator, OperatorError, OperatorSum, Properties, TermFactors, Workspace,
    apply_terms, check,
};
use crate::kernel::{PANEL, Real, mat, mat_mut, panels, sandwich, sandwich_scratch};

/// One model's block-diagonal Fisher `wᵢ · Gᵢ X Aᵢ`.
#[derive(Clone)]
pub struct KroneckerTerm<T: Real> {
    /// `wᵢ ≥ 0`.
    pub weight: f64,
    /// Input Gram `[in, in]`.
    pub a: Factor<T>,
    /// Gram of the output gradients `[out, out]`.
    pub g: Factor<T>,
    /// Diagonals of `a` and `g`, where they are known; [`LinearOperator::diagonal`] needs them.
    pub diagonals: Option<(Vec<f64>, Vec<f64>)>,
}

/// Sum of Kronecker-factored Fisher blocks, applied without forming it: `Y = Σᵢ wᵢ · Gᵢ · X · Aᵢ`.
///
/// - `X`, `Y`: `[out, in]`; `Aᵢ`: `[in, in]`, `Gᵢ`: `[out, out]`, symmetric positive semidefinite, held or streamed.
/// - As a matrix on row-major `vec(X)`: `Σᵢ wᵢ (Gᵢ ⊗ Aᵢ)`.
/// - Cost per apply: `2·N·out·in·(out + in)` flops for full factors; scratch: one tile of 512 rows of `X·Aᵢ`, and one
///   panel of 512 rows of each streamed factor.
///
/// # Source
/// Tam, Bansal, Raffel 2024 (arXiv:2312.04339v2), equations 11 to 14, transposed to PyTorch's `[out, in]`.
pub struct KroneckerSum<T: Real> {
    shape: BlockShape,
    terms: Vec<KroneckerTerm<T>>,
    input_scale: f64,
    output_scale: f64,
}

impl<T: Real> KroneckerSum<T> {
    /// # Errors
    /// [`OperatorError::ShapeMismatch`] if a factor's side is not the block's.
    pub fn new(shape: BlockShape, terms: Vec<KroneckerTerm<T>>) -> Result<Self, OperatorError> {
        for term in &terms {
            for (what, got, expected) in [
                ("side of an input factor", term.a.side(), shape.in_features),
                ("side of an output factor", term.g.side(), shape.out_features),
            ] {
                if got != expected {
                    return Err(OperatorError::ShapeMismatch { what, got, expected });
                }
            }
        }
        Ok(Self { shape, terms, input_scale: 1.0, output_scale: 1.0 })
    }

    /// Multiplies the operator by `input · output`, each applied on its side: `X·A` and `G·(X·A)` then both stay inside the
    /// range of `T`, however large or small the factors are. Powers of two scale exactly.
    #[must_use]
    pub fn scaled(mut self, input: f64, output: f64) -> Self {
        self.input_scale *= input;
        self.output_scale *= output;
        self
    }

    /// Input and output factors with their weights and scalings: what a preconditioner is made of. A term's weight stands
    /// on both sides, see [`KroneckerSum::terms_weights`].
    #[allow(clippy::type_complexity, reason = "two lists of one kind")]
    pub(crate) fn sides(&self) -> (Vec<(f64, &Factor<T>)>, Vec<(f64, &Factor<T>)>) {
        let factors = || (0..self.terms.len()).map(|term| self.factors(term));
        (factors().filter_map(|f| f.input).collect(), factors().filter_map(|f| f.output).collect())
    }

    /// One weight a term, without the scalings.
    pub fn terms_weights(&self) -> impl Iterator<Item = f64> + '_ {
        self.terms.iter().map(|t| t.weight)
    }

    fn tile_rows(&self) -> usize {
        PANEL.min(self.shape.out_features)
    }

    fn split_scratch(&self) -> (usize, usize, usize) {
        let rows = self.tile_rows();
        let tile = sandwich_scratch::<T>(self.shape.out_features, self.shape.in_features);
        let a = self.terms.iter().map(|t| t.a.right_scratch(rows)).max().unwrap_or(0);
        let g = self.terms.iter().map(|t| t.g.left_scratch(self.shape.in_features)).max().unwrap_or(0);
        (tile, a, g)
    }
}

impl<T: Real> LinearOperator<T> for KroneckerSum<T> {
    fn shape(&self) -> BlockShape {
        self.shape
    }
    fn properties(&self) -> Properties {
        Properties::SPSD
    }
    fn scratch_elements(&self) -> usize {
        let (tile, a, g) = self.split_scratch();
        tile + a + g
    }
    fn flops(&self) -> f64 {
        let BlockShape { out_features, in_features } = self.shape;
        self.terms.iter().map(|t| t.a.flops(out_features) + t.g.flops(in_features)).sum()
    }
    fn apply(&self, x: &[T], y: &mut [T], workspace: &mut Workspace<T>) -> Result<(), OperatorError> {
        apply_terms(self, x, y, workspace)
    }
    fn diagonal(&self, d: &mut [T]) -> Result<(), OperatorError> {
        check("diagonal", d, self.shape)?;
        let mut rows = Vec::with_capacity(self.terms.len());
        for term in &self.terms {
            let (a, g) = term.diagonals.as_ref().ok_or(OperatorError::NoDiagonal)?;
            rows.push((term.weight * self.input_scale * self.output_scale, a, g));
        }
        for (i, row) in d.chunks_exact_mut(self.shape.in_features.max(1)).enumerate() {
            for (j, v) in row.iter_mut().enumerate() {
                *v = T::from_f64(rows.iter().map(|(w, a, g)| w * g[i] * a[j]).sum());
            }
        }
        Ok(())
    }
}

impl<T: Real> OperatorSum<T> for KroneckerSum<T> {
    fn terms(&self) -> usize {
        self.terms.len()
    }
    fn factors(&self, term: usize) -> TermFactors<'_, T> {
        let KroneckerTerm { weight, a, g, .. } = &self.terms[term];
        TermFactors {
            input: Some((weight * self.input_scale, a)),
            output: Some((weight * self.output_scale, g)),
        }
    }
    fn lift(&mut self, lifts: &[Lift]) {
        for (term, lift) in self.terms.iter_mut().zip(lifts) {
            term.a = term.a.lifted(lift.input);
            term.g = term.g.lifted(lift.output);
            if let Some((a, g)) = &mut term.diagonals {
                a.iter_mut().for_each(|d| *d += lift.input);
                g.iter_mut().for_each(|d| *d += lift.output);
            }
        }
    }
    /// `X·Aᵢ` is made for one tile of rows at a time and multiplied by the matching columns of `Gᵢ` while it is in
    /// cache: the whole product `X·Aᵢ` never exists.
    fn accumulate_term(
        &self,
        term: usize,
        x: &[T],
        y: &mut [T],
        workspace: &mut Workspace<T>,
    ) -> Result<(), OperatorError> {
        check("x", x, self.shape)?;
        check("y", y, self.shape)?;
        let BlockShape { out_features, in_features } = self.shape;
        let KroneckerTerm { weight, a, g, .. } = &self.terms[term];
        if *weight == 0.0 {
            return Ok(());
        }
        let (tile, a_len, _) = self.split_scratch();
        let (scratch, threading) = workspace.take(self.scratch_elements())?;
        let (tile, scratch) = scratch.split_at_mut(tile);
        let (a_scratch, g_scratch) = scratch.split_at_mut(a_len);
        let mut y = mat_mut(y, out_features, in_features);
        if let (Some(a), Some(g)) = (a.in_memory(), g.in_memory()) {
            let x = mat(x, out_features, in_features);
            sandwich(y, g, x, a, self.input_scale, *weight * self.output_scale, tile, threading);
            return Ok(());
        }
        for rows in panels(out_features) {
            let x = mat(&x[rows.start * in_features..rows.end * in_features], rows.len(), in_features);
            let mut xa = mat_mut(tile, rows.len(), in_features);
            a.right_multiply(x, xa.rb_mut(), false, self.input_scale, a_scratch, threading)?;
            let alpha = *weight * self.output_scale;
            g.left_accumulate(rows, xa.as_ref(), y.rb_mut(), alpha, g_scratch, threading)?;
        }
        Ok(())
    }
}
