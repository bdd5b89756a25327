//! Operators without coupling: the identity and a diagonal Fisher.

use super::{
    BlockShape, LinearOperator, OperatorError, OperatorSum, Properties, Workspace, apply_terms, check,
};
use crate::kernel::{Buffer, Real};

/// `Y = w · X`, the Cᵢ of plain averaging, summed over the models.
#[derive(Debug, Clone)]
pub struct Identity {
    shape: BlockShape,
    weights: Vec<f64>,
}

impl Identity {
    /// One weight a model.
    pub fn new(shape: BlockShape, weights: Vec<f64>) -> Self {
        Self { shape, weights }
    }
}

impl<T: Real> LinearOperator<T> for Identity {
    fn shape(&self) -> BlockShape {
        self.shape
    }
    fn properties(&self) -> Properties {
        Properties::SPSD
    }
    fn flops(&self) -> f64 {
        self.shape.elements() as f64
    }
    fn apply(&self, x: &[T], y: &mut [T], _workspace: &mut Workspace<T>) -> Result<(), OperatorError> {
        check("x", x, self.shape)?;
        check("y", y, self.shape)?;
        let weight: f64 = self.weights.iter().sum();
        for (y, x) in y.iter_mut().zip(x) {
            *y = T::from_f64(weight * x.to_f64());
        }
        Ok(())
    }
    fn diagonal(&self, d: &mut [T]) -> Result<(), OperatorError> {
        d.fill(T::from_f64(self.weights.iter().sum()));
        Ok(())
    }
}

impl<T: Real> OperatorSum<T> for Identity {
    fn terms(&self) -> usize {
        self.weights.len()
    }
    fn accumulate_term(
        &self,
        term: usize,
        x: &[T],
        y: &mut [T],
        workspace: &mut Workspace<T>,
    ) -> Result<(), OperatorError> {
        check("x", x, self.shape)?;
        check("y", y, self.shape)?;
        crate::kernel::vector::axpy(self.weights[term], x, y, workspace.threading);
        Ok(())
    }
}

/// `Y = Σᵢ wᵢ · Fᵢ ∘ X`: diagonal Fisher merging (Matena & Raffel 2022, arXiv:2111.09832).
///
/// Holds one `[out, in]` diagonal a term, the weight folded in.
pub struct Diagonal<T: Real> {
    shape: BlockShape,
    terms: Vec<Buffer<T>>,
}

impl<T: Real> Diagonal<T> {
    /// # Errors
    /// [`OperatorError::ShapeMismatch`] if a diagonal has another length than the block.
    pub fn new(shape: BlockShape, terms: Vec<Buffer<T>>) -> Result<Self, OperatorError> {
        for term in &terms {
            check("a Fisher diagonal", term, shape)?;
        }
        Ok(Self { shape, terms })
    }
}

impl<T: Real> LinearOperator<T> for Diagonal<T> {
    fn shape(&self) -> BlockShape {
        self.shape
    }
    fn properties(&self) -> Properties {
        Properties::SPSD
    }
    fn flops(&self) -> f64 {
        2.0 * self.terms.len() as f64 * self.shape.elements() as f64
    }
    fn apply(&self, x: &[T], y: &mut [T], workspace: &mut Workspace<T>) -> Result<(), OperatorError> {
        apply_terms(self, x, y, workspace)
    }
    fn diagonal(&self, d: &mut [T]) -> Result<(), OperatorError> {
        check("diagonal", d, self.shape)?;
        for (i, v) in d.iter_mut().enumerate() {
            *v = T::from_f64(self.terms.iter().map(|t| t[i].to_f64()).sum());
        }
        Ok(())
    }
}

impl<T: Real> OperatorSum<T> for Diagonal<T> {
    fn terms(&self) -> usize {
        self.terms.len()
    }
    fn accumulate_term(
        &self,
        term: usize,
        x: &[T],
        y: &mut [T],
        _workspace: &mut Workspace<T>,
    ) -> Result<(), OperatorError> {
        check("x", x, self.shape)?;
        check("y", y, self.shape)?;
        for ((y, x), f) in y.iter_mut().zip(x).zip(self.terms[term].iter()) {
            *y = T::from_f64(y.to_f64() + f.to_f64() * x.to_f64());
        }
        Ok(())
    }
}
