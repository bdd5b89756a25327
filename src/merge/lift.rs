//! What rounding took from stored Grams: they are no longer positive semidefinite, and this gives it back.
//!
//! Called by the solvers where a solve has met a direction without curvature. A Gram in 16 bits has eigenvalues of either
//! sign where the model has no data; `Gᵢ ⊗ Aᵢ` carries the negative ones of one side into the large ones of the other, far
//! below any sensible ridge. Each factor gets on its diagonal what its least eigenvalue lacks of zero: no more than its
//! noise, and the eigenbases stay what they are.

use super::{BlockContext, MergeError};
use crate::kernel::{Buffer, Real, mat, mat_mut};
use crate::operator::{Factor, Lift, OperatorError, OperatorSum, Workspace};
use crate::solve::StopReason;
use crate::solve::lanczos::least_eigenvalue;

/// How often a solve begins anew with a larger ridge.
const MOST_RAISES: usize = 10;

/// The shift to try after a solve with `shift` met a direction without curvature: twice what would have done there, because
/// there will be others. `None` where no ridge was asked for, or the solve ended otherwise.
fn raised_shift(stop: &StopReason, shift: f64) -> Option<f64> {
    match stop {
        StopReason::NotPositiveDefinite { curvature } if curvature.is_finite() && shift > 0.0 => {
            Some(2.0 * (shift - curvature))
        }
        _ => None,
    }
}

/// What was done to a system that was not positive definite, because its statistics were rounded.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Repair {
    /// Whether factors were lifted to be positive semidefinite.
    pub lifted: bool,
    /// By how much the ridge was multiplied; 1: it is the one given.
    pub ridge: f64,
}

impl Default for Repair {
    fn default() -> Self {
        Self { lifted: false, ridge: 1.0 }
    }
}

/// The repairs of one system, from the first attempt to solve it on.
pub(super) struct Repairs {
    given: f64,
    raises: usize,
    /// The shift to solve with.
    pub shift: f64,
    /// Whether factors were lifted.
    pub lifted: bool,
}

impl Repairs {
    /// None yet, of a system with this shift.
    pub fn of(shift: f64) -> Self {
        Self { given: shift, raises: 0, shift, lifted: false }
    }

    /// After a solve that ended so: what to lift before the next, which has another shift where that is nothing. `None`
    /// where there is no next one.
    pub fn after<T: Real>(
        &mut self,
        stop: &StopReason,
        operator: &(impl OperatorSum<T> + ?Sized),
        context: &BlockContext<'_>,
        workspace: &mut Workspace<T>,
    ) -> Result<Option<Lifts>, MergeError> {
        if raised_shift(stop, self.shift).is_none() {
            return Ok(None);
        }
        if !self.lifted
            && let Some(lifts) = Lifts::of(operator, context, workspace)?
        {
            self.lifted = true;
            return Ok(Some(lifts));
        }
        let Some(shift) = self.next_shift(stop) else { return Ok(None) };
        self.raise(shift);
        Ok(Some(Lifts::default()))
    }

    /// The shift to try after a solve that ended so, if it is to be tried once more.
    pub fn next_shift(&self, stop: &StopReason) -> Option<f64> {
        raised_shift(stop, self.shift).filter(|_| self.raises < MOST_RAISES)
    }

    /// The next solve has this shift.
    pub fn raise(&mut self, shift: f64) {
        self.raises += 1;
        self.shift = shift;
    }

    /// For the report.
    pub fn made(&self) -> Repair {
        let ridge = if self.raises > 0 { self.shift / self.given } else { 1.0 };
        Repair { lifted: self.lifted, ridge }
    }
}

/// The lifts of an operator's terms, and what a preconditioner is told of them.
#[derive(Debug, Default)]
pub(super) struct Lifts {
    /// One a term.
    pub terms: Vec<Lift>,
    /// On the input side, with weights and scaling.
    pub input: Vec<f64>,
    /// The same on the output side.
    pub output: Vec<f64>,
}

impl Lifts {
    /// `None` where all factors are positive semidefinite as far as can be told.
    ///
    /// Cost: at most 64 products with a vector a factor; a streamed one is read as often. Memory: that of
    /// [`least_eigenvalue`], and the operator's scratch.
    ///
    /// # Errors
    /// Those of reading streamed factors; [`MergeError::Cancelled`].
    pub fn of<T: Real>(
        operator: &(impl OperatorSum<T> + ?Sized),
        context: &BlockContext<'_>,
        workspace: &mut Workspace<T>,
    ) -> Result<Option<Self>, MergeError> {
        let mut lifts = Self::default();
        for term in 0..operator.terms() {
            let factors = operator.factors(term);
            let mut side = |factor: Option<(f64, &Factor<T>)>| -> Result<(f64, f64), MergeError> {
                let Some((weight, factor)) = factor else { return Ok((0.0, 0.0)) };
                context.check_cancelled()?;
                let lift = lacking(factor, workspace)?;
                Ok((lift, weight * lift))
            };
            let (input, output) = (side(factors.input)?, side(factors.output)?);
            lifts.terms.push(Lift { input: input.0, output: output.0 });
            lifts.input.push(input.1);
            lifts.output.push(output.1);
        }
        Ok(lifts.terms.iter().any(|lift| *lift != Lift::default()).then_some(lifts))
    }
}

/// How far the least eigenvalue of a factor is below zero, the uncertainty of that included.
fn lacking<T: Real>(factor: &Factor<T>, workspace: &mut Workspace<T>) -> Result<f64, OperatorError> {
    if matches!(factor, Factor::LowRank(_)) {
        return Ok(0.0);
    }
    let side = factor.side();
    let (scratch, threading) = workspace.take(factor.right_scratch(1))?;
    let mut x = Buffer::<T>::zeroed(side);
    let mut y = Buffer::<T>::zeroed(side);
    let least = least_eigenvalue(side, |from: &[f64], to: &mut [f64]| {
        x.iter_mut().zip(from).for_each(|(x, v)| *x = T::from_f64(*v));
        let out = mat_mut(&mut y, 1, side);
        factor.right_multiply(mat(&x, 1, side), out, false, 1.0, scratch, threading)?;
        to.iter_mut().zip(y.iter()).for_each(|(v, y)| *v = y.to_f64());
        Ok::<(), OperatorError>(())
    })?;
    Ok(least.filter(|least| least.value < 0.0).map_or(0.0, |least| least.residual - least.value))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::kernel::Threading;
    use crate::operator::{MemoryRows, Panels, Symmetric};

    #[test]
    fn a_factor_lacks_what_its_least_eigenvalue_does() {
        // Eigenvalues 3 and -1; 2 and 2.
        for (values, expected) in [([1.0, 2.0, 2.0, 1.0], 1.0), ([2.0, 0.0, 0.0, 2.0], 0.0)] {
            let rows = MemoryRows::new(2, 2, values.to_vec()).unwrap();
            let held = Panels::held(&rows, Threading::Sequential).unwrap();
            for panels in [held, Panels::streamed(Arc::new(rows))] {
                let factor = Factor::<f64>::Symmetric(Symmetric::new(panels).unwrap());
                let mut workspace = Workspace::new(factor.right_scratch(1), Threading::Sequential);
                let lacks = lacking(&factor, &mut workspace).unwrap();
                assert!((lacks - expected).abs() < 1e-12, "{lacks}");
                let lifted = lacking(&factor.lifted(lacks), &mut workspace).unwrap();
                assert!(lifted < 1e-12, "{lifted}");
            }
        }
    }

    #[test]
    fn a_ridge_is_raised_past_the_curvature_that_was_met() {
        let met = |curvature| StopReason::NotPositiveDefinite { curvature };
        assert_eq!(raised_shift(&met(-0.5), 0.25), Some(1.5));
        assert_eq!(raised_shift(&met(0.0), 0.25), Some(0.5));
        assert_eq!(raised_shift(&met(f64::NAN), 0.25), None);
        assert_eq!(raised_shift(&met(-0.5), 0.0), None, "nobody asked for a ridge");
        assert_eq!(raised_shift(&StopReason::MaxIterations, 0.25), None);
    }
}
