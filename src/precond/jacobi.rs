use rayon::prelude::*;

use super::Preconditioner;
use crate::kernel::{Buffer, Real, Threading};
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
    fn apply_inverse(&self, r: &[T], z: &mut [T], workspace: &mut Workspace<T>) -> Result<(), OperatorError> {
        let piece = |z: &mut [T], r: &[T], inverse: &[T]| {
            for ((z, r), d) in z.iter_mut().zip(r).zip(inverse) {
                *z = T::from_f64(r.to_f64() * d.to_f64());
            }
        };
        const PIECE: usize = 1 << 16;
        match workspace.threading {
            Threading::Sequential => piece(z, r, &self.inverse),
            Threading::Parallel => z
                .par_chunks_mut(PIECE)
                .zip(r.par_chunks(PIECE))
                .zip(self.inverse.par_chunks(PIECE))
                .for_each(|((z, r), d)| piece(z, r, d)),
        }
        Ok(())
    }
}
