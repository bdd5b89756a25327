//! Vector kernels of the conjugate gradient loop: fused passes over long vectors, sums in f64.
//!
//! A sum is cut into pieces of fixed length, each summed in sixteen interleaved f64 accumulators, and the pieces are
//! added in order: the same bits for one thread and for many. Products of two f32 are exact in f64.

use rayon::prelude::*;

use super::{Real, Threading, dispatch};

/// Elements of one piece of a sum: 64 Ki, two vectors of f32 in 512 KiB.
const PIECE: usize = 1 << 16;
/// Interleaved sums.
pub(crate) const LANES: usize = 16;

/// `Σ term(xᵢ, yᵢ)` in interleaved lanes, added up by a fixed tree. Cut into arrays, so that nothing is left to check in
/// the loop and it is vectorised.
#[inline(always)]
fn sum_lanes<T: Real>(x: &[T], y: &[T], term: impl Fn(f64, f64) -> f64) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    for (x, y) in x.iter().zip(y) {
        for lane in 0..LANES {
            lanes[lane] += term(x[lane].to_f64(), y[lane].to_f64());
        }
    }
    for ((lane, x), y) in lanes.iter_mut().zip(x_rest).zip(y_rest) {
        *lane += term(x.to_f64(), y.to_f64());
    }
    add_lanes(lanes)
}

/// The tree that ends a sum.
#[inline(always)]
pub(crate) fn add_lanes(mut lanes: [f64; LANES]) -> f64 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

fn pieces(len: usize) -> usize {
    len.div_ceil(PIECE)
}

fn sum_pieces(len: usize, threading: Threading, piece: impl Fn(usize) -> f64 + Sync + Send) -> f64 {
    match threading {
        Threading::Parallel if pieces(len) > 1 => {
            (0..pieces(len)).into_par_iter().map(piece).collect::<Vec<f64>>().iter().sum()
        }
        _ => (0..pieces(len)).map(piece).sum(),
    }
}

/// `⟨x, y⟩`, accumulated in f64.
pub fn dot<T: Real>(x: &[T], y: &[T], threading: Threading) -> f64 {
    let len = x.len().min(y.len());
    sum_pieces(len, threading, |k| {
        let range = k * PIECE..((k + 1) * PIECE).min(len);
        let (x, y) = (&x[range.clone()], &y[range]);
        dispatch(
            #[inline(always)]
            || {
                sum_lanes(
                    x,
                    y,
                    #[inline(always)]
                    |x, y| x * y,
                )
            },
        )
    })
}

/// `Σ|x|`, accumulated in f64.
pub fn sum_of_magnitudes<T: Real>(x: &[T], threading: Threading) -> f64 {
    sum_pieces(x.len(), threading, |k| {
        let x = &x[k * PIECE..((k + 1) * PIECE).min(x.len())];
        dispatch(
            #[inline(always)]
            || {
                sum_lanes(
                    x,
                    x,
                    #[inline(always)]
                    |x, _| x.abs(),
                )
            },
        )
    })
}

/// `⟨x + y, x + y⟩`, accumulated in f64.
pub fn squared_norm_of_sum<T: Real>(x: &[T], y: &[T], threading: Threading) -> f64 {
    let len = x.len().min(y.len());
    sum_pieces(len, threading, |k| {
        let range = k * PIECE..((k + 1) * PIECE).min(len);
        let (x, y) = (&x[range.clone()], &y[range]);
        dispatch(
            #[inline(always)]
            || {
                sum_lanes(
                    x,
                    y,
                    #[inline(always)]
                    |x, y| (x + y) * (x + y),
                )
            },
        )
    })
}

/// Applies `op` to matching pieces of one written and one read vector.
fn for_pieces<T: Real>(y: &mut [T], x: &[T], threading: Threading, op: impl Fn(&mut [T], &[T]) + Sync) {
    match threading {
        Threading::Parallel => y.par_chunks_mut(PIECE).zip(x.par_chunks(PIECE)).for_each(|(y, x)| op(y, x)),
        Threading::Sequential => y.chunks_mut(PIECE).zip(x.chunks(PIECE)).for_each(|(y, x)| op(y, x)),
    }
}

/// `y ← y + a·x`, each element in f64 and rounded once.
pub fn axpy<T: Real>(a: f64, x: &[T], y: &mut [T], threading: Threading) {
    for_pieces(y, x, threading, |y, x| {
        dispatch(
            #[inline(always)]
            || {
                for (y, x) in y.iter_mut().zip(x) {
                    *y = T::from_f64(y.to_f64() + a * x.to_f64());
                }
            },
        );
    });
}

/// `y ← x + b·y`, each element in f64 and rounded once: the new search direction.
pub fn xpby<T: Real>(x: &[T], b: f64, y: &mut [T], threading: Threading) {
    for_pieces(y, x, threading, |y, x| {
        dispatch(
            #[inline(always)]
            || {
                for (y, x) in y.iter_mut().zip(x) {
                    *y = T::from_f64(x.to_f64() + b * y.to_f64());
                }
            },
        );
    });
}

/// `y ← a·y`.
pub fn scale<T: Real>(a: f64, y: &mut [T]) {
    for y in y.iter_mut() {
        *y = T::from_f64(a * y.to_f64());
    }
}

/// `y ← x ∘ y`, each element in f64 and rounded once.
pub fn multiply<T: Real>(x: &[T], y: &mut [T], threading: Threading) {
    for_pieces(y, x, threading, |y, x| {
        dispatch(
            #[inline(always)]
            || {
                for (y, x) in y.iter_mut().zip(x) {
                    *y = T::from_f64(y.to_f64() * x.to_f64());
                }
            },
        );
    });
}

/// Hands every row of row-major `y` `[rows, columns]` to `op` with its index, on all threads where allowed.
pub fn for_rows<T: Real>(
    y: &mut [T],
    columns: usize,
    threading: Threading,
    op: impl Fn(usize, &mut [T]) + Sync + Send,
) {
    let columns = columns.max(1);
    match threading {
        Threading::Sequential => y.chunks_exact_mut(columns).enumerate().for_each(|(i, row)| op(i, row)),
        Threading::Parallel => {
            y.par_chunks_exact_mut(columns).enumerate().for_each(|(i, row)| op(i, row));
        }
    }
}

/// `r ← r - a·q`, and `⟨r, r⟩` of the new `r`, in one pass.
pub fn subtract_and_square<T: Real>(a: f64, q: &[T], r: &mut [T], threading: Threading) -> f64 {
    let piece = |r: &mut [T], q: &[T]| {
        dispatch(
            #[inline(always)]
            || {
                let q = &q[..r.len()];
                for (r, q) in r.iter_mut().zip(q) {
                    *r = T::from_f64(r.to_f64() - a * q.to_f64());
                }
                let r = &*r;
                sum_lanes(
                    r,
                    r,
                    #[inline(always)]
                    |x, y| x * y,
                )
            },
        )
    };
    match threading {
        Threading::Parallel => {
            let sums: Vec<f64> =
                r.par_chunks_mut(PIECE).zip(q.par_chunks(PIECE)).map(|(r, q)| piece(r, q)).collect();
            sums.iter().sum()
        }
        Threading::Sequential => r.chunks_mut(PIECE).zip(q.chunks(PIECE)).map(|(r, q)| piece(r, q)).sum(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_exact_on_integers_and_independent_of_threads() {
        let n = 3 * PIECE + 17;
        let x: Vec<f32> = (0..n).map(|i| (i % 7) as f32).collect();
        let y: Vec<f32> = (0..n).map(|i| (i % 5) as f32).collect();
        let want: f64 = x.iter().zip(&y).map(|(a, b)| f64::from(a * b)).sum();
        assert_eq!(dot(&x, &y, Threading::Sequential), want);
        let negated: Vec<f32> = x.iter().map(|v| -v).collect();
        let sum: f64 = x.iter().map(|v| f64::from(*v)).sum();
        assert_eq!(sum_of_magnitudes(&negated, Threading::Parallel), sum);
        let noisy: Vec<f32> = (0..n).map(|i| (i as f32).sin() * 1e3f32.powi(i as i32 % 5)).collect();
        let one = dot(&noisy, &noisy, Threading::Sequential);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        assert_eq!(one.to_bits(), pool.install(|| dot(&noisy, &noisy, Threading::Parallel)).to_bits());
        let mut a = noisy.clone();
        let mut b = noisy.clone();
        let ra = subtract_and_square(0.3, &x, &mut a, Threading::Sequential);
        let rb = pool.install(|| subtract_and_square(0.3, &x, &mut b, Threading::Parallel));
        assert_eq!(ra.to_bits(), rb.to_bits());
        assert!(a == b);
        assert_eq!(ra, dot(&a, &a, Threading::Sequential));
    }

    #[test]
    fn updates_follow_their_formulas() {
        let x = [1.0f64, -2.0, 4.0];
        let mut y = [10.0f64, 20.0, 30.0];
        axpy(0.5, &x, &mut y, Threading::Sequential);
        assert_eq!(y, [10.5, 19.0, 32.0]);
        xpby(&x, 2.0, &mut y, Threading::Parallel);
        assert_eq!(y, [22.0, 36.0, 68.0]);
        assert_eq!(squared_norm_of_sum(&x, &y, Threading::Parallel), 23.0 * 23.0 + 34.0 * 34.0 + 72.0 * 72.0);
    }
}
