//! A small operator materialised column by column: the oracle of the tests, and a view for debugging.

use super::{LinearOperator, OperatorError, Workspace};
use crate::kernel::{Real, Threading};

/// The matrix of `operator` on row-major `vec(X)`, row-major `[n, n]` with `n = out·in`, by `n` applies.
///
/// # Errors
/// Those of the operator.
pub fn materialise<T: Real>(operator: &dyn LinearOperator<T>) -> Result<Vec<f64>, OperatorError> {
    let n = operator.shape().elements();
    let mut workspace = Workspace::new(operator.scratch_elements(), Threading::Sequential);
    let mut matrix = vec![0.0; n * n];
    let mut x = vec![T::default(); n];
    let mut y = vec![T::default(); n];
    for j in 0..n {
        x[j] = T::from_f64(1.0);
        operator.apply(&x, &mut y, &mut workspace)?;
        x[j] = T::default();
        for i in 0..n {
            matrix[i * n + j] = y[i].to_f64();
        }
    }
    Ok(matrix)
}
