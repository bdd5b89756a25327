//! The least eigenvalue of a symmetric matrix that is only applied: a few steps of Lanczos' method.

use super::eigen::Eigen;
use crate::kernel::mat;

/// Steps at most: with them the lower edge of a spectrum is known to about a thousandth of its width, where the few large
/// eigenvalues of a Gram are found first.
const STEPS: usize = 64;

/// Bytes of the basis and what goes with it.
pub fn memory_bytes(side: usize) -> u64 {
    (STEPS as u64 + 3) * side as u64 * 8 + (STEPS * STEPS * 8 * 5) as u64
}

/// What the steps found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LeastEigenvalue {
    /// An upper bound: `⟨v, S·v⟩` of a unit vector.
    pub value: f64,
    /// `‖S·v - value·v‖`: an eigenvalue is so near.
    pub residual: f64,
}

/// Of a symmetric `[side, side]` matrix that `apply` multiplies its first argument with. The start is the same every time.
///
/// Cost: at most 64 applications, and `64²·side` flops for keeping the basis orthogonal. Memory: [`memory_bytes`]. `None` where
/// there is nothing to find: no side, or values that are not finite.
///
/// # Errors
/// Those of `apply`.
///
/// # Source
/// Lanczos 1950; Golub & Van Loan §10.1.
pub fn least_eigenvalue<E>(
    side: usize,
    mut apply: impl FnMut(&[f64], &mut [f64]) -> Result<(), E>,
) -> Result<Option<LeastEigenvalue>, E> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    // Multiples of the golden ratio, less the whole ones: no direction of a Gram looks like that.
    let mut w: Vec<f64> = (1..=side).map(|k| (k as f64 * 0.618_033_988_749_894_9).fract() - 0.5).collect();
    let mut basis: Vec<Vec<f64>> = Vec::new();
    let (mut diagonal, mut off): (Vec<f64>, Vec<f64>) = (Vec::new(), Vec::new());
    let mut next = dot(&w, &w).sqrt();
    let mut scale = 0.0f64;
    for _ in 0..STEPS.min(side) {
        // What is left of an invariant subspace is rounding.
        if next <= f64::from(f32::EPSILON) * scale || next == 0.0 {
            break;
        }
        let v: Vec<f64> = w.iter().map(|x| x / next).collect();
        if !diagonal.is_empty() {
            off.push(next);
        }
        apply(&v, &mut w)?;
        diagonal.push(dot(&v, &w));
        basis.push(v);
        // Twice is enough to stay orthogonal.
        for _ in 0..2 {
            for v in &basis {
                let part = dot(v, &w);
                w.iter_mut().zip(v).for_each(|(w, v)| *w -= part * v);
            }
        }
        next = dot(&w, &w).sqrt();
        if !next.is_finite() {
            return Ok(None);
        }
        scale = scale.max(next).max(diagonal.last().map_or(0.0, |d| d.abs()));
    }
    let steps = diagonal.len();
    if steps == 0 {
        return Ok(None);
    }
    let mut tridiagonal = vec![0.0; steps * steps];
    for (k, d) in diagonal.iter().enumerate() {
        tridiagonal[k * steps + k] = *d;
        if let Some(off) = off.get(k).filter(|_| k + 1 < steps) {
            tridiagonal[k * steps + k + 1] = *off;
            tridiagonal[(k + 1) * steps + k] = *off;
        }
    }
    let eigen = Eigen::<f64>::of(mat(&tridiagonal, steps, steps)).ok();
    Ok(eigen.map(|eigen| LeastEigenvalue {
        value: eigen.values[0],
        residual: next * eigen.vectors[steps - 1].abs(),
    }))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn of(diagonal: &[f64]) -> Option<LeastEigenvalue> {
        least_eigenvalue(diagonal.len(), |x, y| {
            for ((y, x), d) in y.iter_mut().zip(x).zip(diagonal) {
                *y = d * x;
            }
            Ok::<(), Infallible>(())
        })
        .unwrap()
    }

    #[test]
    fn few_directions_are_found_exactly() {
        for (diagonal, least) in
            [(&[3.0][..], 3.0), (&[2.0, -1.0, 5.0], -1.0), (&[4.0; 7], 4.0), (&[0.0; 4], 0.0)]
        {
            let found = of(diagonal).unwrap();
            assert!((found.value - least).abs() < 1e-12, "{found:?}");
            assert!(found.residual < 1e-6, "{found:?}");
        }
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[1.0, f64::NAN]), None);
    }

    /// A Gram's spectrum with noise around zero: outliers, decay, and a bulk of either sign. Chebyshev's bound for 40 steps
    /// behind the outliers on [-1e-3, 1]: the edge to 1·(π/80)² = 1.5e-3 of the width would say nothing about 1e-3; what is
    /// asked is that the residual tells how far it can be trusted.
    #[test]
    fn the_edge_of_noise_is_found_to_within_the_residual() {
        let side = 500;
        let spectrum: Vec<f64> = (0..side)
            .map(|k| if k < 100 { 0.9f64.powi(k) } else { 1e-3 * (f64::from(k - 300) / 200.0) })
            .collect();
        let found = of(&spectrum).unwrap();
        assert!(found.value < 0.0 && found.value >= -1e-3 - 1e-12, "{found:?}");
        assert!(found.value - found.residual <= -0.8e-3, "{found:?}");
    }
}
