//! Operators on the input side alone: RegMean's Σ w·X·A, the data-free Σ w·s·X·τᵀτ, and a vector's full Fisher block.

use faer::prelude::ReborrowMut;

use super::{
    BlockShape, Factor, Lift, LinearOperator, OperatorError, OperatorSum, Properties, TermFactors, Workspace,
    apply_terms, check,
};
use crate::kernel::{PANEL, Real, gemm, mat, mat_mut, panels};

/// One model's `wᵢ · X Aᵢ`.
#[derive(Clone)]
pub struct GramTerm<T: Real> {
    /// `wᵢ ≥ 0`, with any common scaling folded in.
    pub weight: f64,
    /// `[in, in]`: a Gram from a statistics file, `FᵀF`, or `s·τᵀτ` of a task vector.
    pub a: Factor<T>,
    /// Its diagonal, where known.
    pub diagonal: Option<Vec<f64>>,
}

/// `Y = Σᵢ wᵢ · X · Aᵢ`: rows do not couple, all of them share `S = Σᵢ wᵢ Aᵢ`.
///
/// `apply` uses `S` where it was formed ([`GramSum::form`]: `2·out·in²` flops however many models), else term by term
/// (`4·rank·out·in` flops a low-rank term: cheaper where the ranks are small).
///
/// # Source
/// Jin et al. 2023 (RegMean, arXiv:2212.09849); arXiv:2312.04339v2 §5.1 for its place among the Fishers; with
/// `Aᵢ = τᵢᵀτᵢ/‖τᵢ‖²` the objective of WUDI (arXiv:2503.08099), with `Aᵢ = τᵢᵀτᵢ` that of ACTMat (arXiv:2604.01329).
pub struct GramSum<T: Real> {
    shape: BlockShape,
    terms: Vec<GramTerm<T>>,
    formed: Option<Factor<T>>,
}

impl<T: Real> GramSum<T> {
    /// # Errors
    /// [`OperatorError::ShapeMismatch`] if a factor's side is not `in`.
    pub fn new(shape: BlockShape, terms: Vec<GramTerm<T>>) -> Result<Self, OperatorError> {
        for term in &terms {
            if term.a.side() != shape.in_features {
                return Err(OperatorError::ShapeMismatch {
                    what: "side of an input factor",
                    got: term.a.side(),
                    expected: shape.in_features,
                });
            }
        }
        Ok(Self { shape, terms, formed: None })
    }

    /// Forms `S` in memory, `[in, in]`, and uses it from now on.
    ///
    /// # Errors
    /// Those of reading a streamed factor.
    pub fn form(&mut self, workspace: &mut Workspace<T>) -> Result<(), OperatorError> {
        let side = self.shape.in_features;
        let mut s = crate::kernel::Buffer::<T>::zeroed(side * side);
        let need = self.terms.iter().map(|t| t.a.add_scratch()).max().unwrap_or(0);
        let (scratch, threading) = workspace.take(need)?;
        for term in &self.terms {
            term.a.add_to(&mut s, term.weight, scratch, threading)?;
        }
        super::factor::mirror(&mut s, side);
        let panels = super::Panels::from_buffer(side, side, std::sync::Arc::new(s));
        self.formed = Some(Factor::Symmetric(super::Symmetric::new(panels)?));
        Ok(())
    }

    fn multiply(
        &self,
        a: &Factor<T>,
        alpha: f64,
        x: &[T],
        y: &mut [T],
        workspace: &mut Workspace<T>,
    ) -> Result<(), OperatorError> {
        check("x", x, self.shape)?;
        check("y", y, self.shape)?;
        let BlockShape { out_features: m, in_features: n } = self.shape;
        let (scratch, threading) = workspace.take(self.scratch_elements())?;
        if let Some(a) = a.in_memory() {
            gemm(mat_mut(y, m, n), true, mat(x, m, n), a, alpha, threading);
            return Ok(());
        }
        for rows in panels(m) {
            let range = rows.start * n..rows.end * n;
            let mut tile = mat_mut(&mut y[range.clone()], rows.len(), n);
            a.right_multiply(mat(&x[range], rows.len(), n), tile.rb_mut(), true, alpha, scratch, threading)?;
        }
        Ok(())
    }
}

impl<T: Real> LinearOperator<T> for GramSum<T> {
    fn shape(&self) -> BlockShape {
        self.shape
    }
    fn properties(&self) -> Properties {
        Properties::SPSD
    }
    fn scratch_elements(&self) -> usize {
        let rows = PANEL.min(self.shape.out_features);
        self.terms.iter().map(|t| t.a.right_scratch(rows).max(t.a.add_scratch())).max().unwrap_or(0)
    }
    fn flops(&self) -> f64 {
        let rows = self.shape.out_features;
        match &self.formed {
            Some(s) => s.flops(rows),
            None => self.terms.iter().map(|t| t.a.flops(rows)).sum(),
        }
    }
    fn apply(&self, x: &[T], y: &mut [T], workspace: &mut Workspace<T>) -> Result<(), OperatorError> {
        let Some(s) = &self.formed else { return apply_terms(self, x, y, workspace) };
        y.fill(T::default());
        self.multiply(s, 1.0, x, y, workspace)
    }
    fn diagonal(&self, d: &mut [T]) -> Result<(), OperatorError> {
        check("diagonal", d, self.shape)?;
        let mut row = vec![0.0; self.shape.in_features];
        for term in &self.terms {
            let diagonal = term.diagonal.as_ref().ok_or(OperatorError::NoDiagonal)?;
            for (v, a) in row.iter_mut().zip(diagonal) {
                *v += term.weight * a;
            }
        }
        for out in d.chunks_exact_mut(self.shape.in_features.max(1)) {
            for (v, a) in out.iter_mut().zip(&row) {
                *v = T::from_f64(*a);
            }
        }
        Ok(())
    }
}

impl<T: Real> OperatorSum<T> for GramSum<T> {
    fn terms(&self) -> usize {
        self.terms.len()
    }
    fn factors(&self, term: usize) -> TermFactors<'_, T> {
        let GramTerm { weight, a, .. } = &self.terms[term];
        TermFactors { input: Some((*weight, a)), output: None }
    }
    fn lift(&mut self, lifts: &[Lift]) {
        let mut sum = 0.0;
        for (term, lift) in self.terms.iter_mut().zip(lifts) {
            term.a = term.a.lifted(lift.input);
            if let Some(diagonal) = &mut term.diagonal {
                diagonal.iter_mut().for_each(|d| *d += lift.input);
            }
            sum += term.weight * lift.input;
        }
        self.formed = self.formed.as_ref().map(|s| s.lifted(sum));
    }
    fn accumulate_term(
        &self,
        term: usize,
        x: &[T],
        y: &mut [T],
        workspace: &mut Workspace<T>,
    ) -> Result<(), OperatorError> {
        let GramTerm { weight, a, .. } = &self.terms[term];
        if *weight == 0.0 {
            return Ok(());
        }
        self.multiply(a, *weight, x, y, workspace)
    }
}
