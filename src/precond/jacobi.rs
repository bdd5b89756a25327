use super::{Preconditioner, SetupCost};
use crate::kernel::{Buffer, Real, vector};
use crate::operator::{LinearOperator, OperatorError, Workspace};

/// Entries below this fraction of the largest count as null directions and are passed through unscaled by it: dividing
/// rounding noise by a vanishing diagonal would send the iterate far away.
const FLOOR: f64 = 1e-7;

/// `M = diag(A)`, floored.
///
/// One vector of memory. Helps plain CG by a factor of two at most on K-FAC systems (DESIGN.md): a fallback.
#[derive(Debug)]
pub struct Jacobi<T: Real> {
    inverse: Buffer<T>,
}

impl<T: Real> Jacobi<T> {
    /// Asks the operator for its diagonal.
    ///
    /// # Errors
    /// [`OperatorError::NoDiagonal`] where it has none.
    pub fn new(operator: &dyn LinearOperator<T>) -> Result<Self, OperatorError> {
        let mut inverse = Buffer::<T>::zeroed(operator.shape().elements());
        operator.diagonal(&mut inverse)?;
        let largest = inverse.iter().fold(0.0f64, |m, v| m.max(v.to_f64()));
        let floor = largest * FLOOR;
        for v in inverse.iter_mut() {
            let d = v.to_f64().max(floor);
            *v = T::from_f64(if d > 0.0 { 1.0 / d } else { 1.0 });
        }
        Ok(Self { inverse })
    }
}

impl<T: Real> Preconditioner<T> for Jacobi<T> {
    fn name(&self) -> &'static str {
        "jacobi"
    }
    fn setup_cost(&self) -> SetupCost {
        SetupCost { flops: 2.0 * self.inverse.len() as f64, bytes: self.inverse.bytes() as u64 }
    }
    fn flops(&self) -> f64 {
        self.inverse.len() as f64
    }
    fn apply_inverse(&self, r: &[T], z: &mut [T], workspace: &mut Workspace<T>) -> Result<(), OperatorError> {
        z.copy_from_slice(r);
        vector::multiply(&self.inverse, z, workspace.threading);
        Ok(())
    }
}
