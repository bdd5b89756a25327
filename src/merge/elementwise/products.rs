//! Inner products of models straight from the stored bytes: a pair of models at a time, each value read and widened once,
//! all sums in registers.
//!
//! The bits of [`Gram::add`](super::Gram::add), which goes through memory.

use super::stored::{Bf16, F32, Stored};
use crate::kernel::dispatch;
use crate::kernel::vector::{LANES, add_lanes};
use crate::read::Dtype;

/// Adds to `products` the lower triangle, row by row, of the inner products of models, or of their differences from `base`;
/// false where a value is not finite, which shows in its model's product with itself.
pub(super) fn products(dtype: Dtype, base: Option<&[u8]>, models: &[&[u8]], products: &mut [f64]) -> bool {
    match dtype {
        Dtype::Bf16 => pairs::<Bf16>(base, models, products),
        Dtype::F32 => pairs::<F32>(base, models, products),
        _ => unreachable!("`takes` says which dtypes"),
    }
}

fn pairs<S: Stored>(base: Option<&[u8]>, models: &[&[u8]], products: &mut [f64]) -> bool {
    let pair = |i: usize, j: usize| {
        let (x, y) = (S::elements(models[i]), S::elements(models[j]));
        match base {
            None => pair::<S, false>(x, y, x),
            Some(base) => pair::<S, true>(x, y, S::elements(base)),
        }
    };
    if models.len() == 1 {
        products[0] += pair(0, 0).xx;
    }
    for i in 1..models.len() {
        let row = i * (i + 1) / 2;
        for j in 0..i {
            let pair = pair(i, j);
            products[row + j] += pair.xy;
            if j == 0 {
                products[row + i] += pair.xx;
            }
            if (i, j) == (1, 0) {
                products[0] += pair.yy;
            }
        }
    }
    products.iter().all(|product| product.is_finite())
}

/// The inner products of two models.
struct Pair {
    xx: f64,
    xy: f64,
    yy: f64,
}

/// As [`vector::dot`](crate::kernel::vector::dot), in the same lanes; products of two f32 are exact in f64. Arrays of a fixed
/// length and one small loop an array: the compiler keeps each in two vector registers.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "one index into several arrays")]
fn pair<S: Stored, const BASE: bool>(x: &[S::Element], y: &[S::Element], base: &[S::Element]) -> Pair {
    let ((x, x_rest), (y, y_rest)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    let (base, base_rest) = base.as_chunks::<LANES>();
    let (mut xx, mut xy, mut yy) = dispatch(
        #[inline(always)]
        move || {
            let (mut xx, mut xy, mut yy) = ([0.0f64; LANES], [0.0f64; LANES], [0.0f64; LANES]);
            for ((x, y), base) in x.iter().zip(y).zip(base) {
                let (mut a, mut b) = ([0.0f64; LANES], [0.0f64; LANES]);
                for k in 0..LANES {
                    a[k] = value::<S, BASE>(x[k], base[k]);
                }
                for k in 0..LANES {
                    b[k] = value::<S, BASE>(y[k], base[k]);
                }
                for k in 0..LANES {
                    xx[k] += a[k] * a[k];
                }
                for k in 0..LANES {
                    xy[k] += a[k] * b[k];
                }
                for k in 0..LANES {
                    yy[k] += b[k] * b[k];
                }
            }
            (xx, xy, yy)
        },
    );
    for (k, ((x, y), base)) in x_rest.iter().zip(y_rest).zip(base_rest).enumerate() {
        let (a, b) = (value::<S, BASE>(*x, *base), value::<S, BASE>(*y, *base));
        xx[k] += a * a;
        xy[k] += a * b;
        yy[k] += b * b;
    }
    Pair { xx: add_lanes(xx), xy: add_lanes(xy), yy: add_lanes(yy) }
}

/// A model's value, or its difference from the base, in f32 and widened.
#[inline(always)]
fn value<S: Stored, const BASE: bool>(element: S::Element, base: S::Element) -> f64 {
    let value = S::decode(element);
    f64::from(if BASE { value - S::decode(base) } else { value })
}
