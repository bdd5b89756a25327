//! Operators made of operators.

use super::{BlockShape, LinearOperator, OperatorError, Properties, Workspace};
use crate::kernel::{Real, vector};

/// `A + shift·I`: the explicit ridge.
pub struct Damped<'a, T: Real, A: LinearOperator<T> + ?Sized> {
    operator: &'a A,
    shift: f64,
    scalar: std::marker::PhantomData<T>,
}

impl<'a, T: Real, A: LinearOperator<T> + ?Sized> Damped<'a, T, A> {
    /// `shift ≥ 0` in the units of `A`'s diagonal.
    pub fn new(operator: &'a A, shift: f64) -> Self {
        Self { operator, shift, scalar: std::marker::PhantomData }
    }
}

impl<T: Real, A: LinearOperator<T> + ?Sized> LinearOperator<T> for Damped<'_, T, A> {
    fn shape(&self) -> BlockShape {
        self.operator.shape()
    }
    fn properties(&self) -> Properties {
        self.operator.properties()
    }
    fn scratch_elements(&self) -> usize {
        self.operator.scratch_elements()
    }
    fn flops(&self) -> f64 {
        self.operator.flops() + 2.0 * self.shape().elements() as f64
    }
    fn apply(&self, x: &[T], y: &mut [T], workspace: &mut Workspace<T>) -> Result<(), OperatorError> {
        self.operator.apply(x, y, workspace)?;
        if self.shift != 0.0 {
            vector::axpy(self.shift, x, y, workspace.threading);
        }
        Ok(())
    }
    fn diagonal(&self, d: &mut [T]) -> Result<(), OperatorError> {
        self.operator.diagonal(d)?;
        for v in d {
            *v = T::from_f64(v.to_f64() + self.shift);
        }
        Ok(())
    }
}

/// `factor · A`.
pub struct Scaled<'a, T: Real, A: LinearOperator<T> + ?Sized> {
    operator: &'a A,
    factor: f64,
    scalar: std::marker::PhantomData<T>,
}

impl<'a, T: Real, A: LinearOperator<T> + ?Sized> Scaled<'a, T, A> {
    /// `factor ≥ 0` keeps a positive semidefinite operator so.
    pub fn new(operator: &'a A, factor: f64) -> Self {
        Self { operator, factor, scalar: std::marker::PhantomData }
    }
}

impl<T: Real, A: LinearOperator<T> + ?Sized> LinearOperator<T> for Scaled<'_, T, A> {
    fn shape(&self) -> BlockShape {
        self.operator.shape()
    }
    fn properties(&self) -> Properties {
        let inner = self.operator.properties();
        Properties { positive_semidefinite: inner.positive_semidefinite && self.factor >= 0.0, ..inner }
    }
    fn scratch_elements(&self) -> usize {
        self.operator.scratch_elements()
    }
    fn flops(&self) -> f64 {
        self.operator.flops() + self.shape().elements() as f64
    }
    fn apply(&self, x: &[T], y: &mut [T], workspace: &mut Workspace<T>) -> Result<(), OperatorError> {
        self.operator.apply(x, y, workspace)?;
        vector::scale(self.factor, y);
        Ok(())
    }
    fn diagonal(&self, d: &mut [T]) -> Result<(), OperatorError> {
        self.operator.diagonal(d)?;
        vector::scale(self.factor, d);
        Ok(())
    }
}

/// `Σ Aₖ` of operators of one shape: K-FAC plus a data-free term, say.
pub struct Sum<'a, T: Real> {
    operators: Vec<&'a dyn LinearOperator<T>>,
    shape: BlockShape,
}

impl<'a, T: Real> Sum<'a, T> {
    /// # Errors
    /// [`OperatorError::ShapeMismatch`] if there is none or their shapes differ.
    pub fn new(operators: Vec<&'a dyn LinearOperator<T>>) -> Result<Self, OperatorError> {
        let Some(first) = operators.first() else {
            return Err(OperatorError::ShapeMismatch { what: "operators of a sum", got: 0, expected: 1 });
        };
        let shape = first.shape();
        for operator in &operators {
            if operator.shape() != shape {
                return Err(OperatorError::ShapeMismatch {
                    what: "operator of a sum",
                    got: operator.shape().elements(),
                    expected: shape.elements(),
                });
            }
        }
        Ok(Self { operators, shape })
    }
}

impl<T: Real> LinearOperator<T> for Sum<'_, T> {
    fn shape(&self) -> BlockShape {
        self.shape
    }
    fn properties(&self) -> Properties {
        Properties {
            symmetric: self.operators.iter().all(|o| o.properties().symmetric),
            positive_semidefinite: self.operators.iter().all(|o| o.properties().positive_semidefinite),
        }
    }
    fn scratch_elements(&self) -> usize {
        self.operators.iter().map(|o| o.scratch_elements()).max().unwrap_or(0)
    }
    fn flops(&self) -> f64 {
        self.operators.iter().map(|o| o.flops()).sum()
    }
    fn apply(&self, x: &[T], y: &mut [T], workspace: &mut Workspace<T>) -> Result<(), OperatorError> {
        let mut part = vec![T::default(); y.len()];
        y.fill(T::default());
        for operator in &self.operators {
            operator.apply(x, &mut part, workspace)?;
            vector::axpy(1.0, &part, y, workspace.threading);
        }
        Ok(())
    }
    fn diagonal(&self, d: &mut [T]) -> Result<(), OperatorError> {
        let mut part = vec![T::default(); d.len()];
        d.fill(T::default());
        for operator in &self.operators {
            operator.diagonal(&mut part)?;
            for (d, p) in d.iter_mut().zip(&part) {
                *d = T::from_f64(d.to_f64() + p.to_f64());
            }
        }
        Ok(())
    }
}
