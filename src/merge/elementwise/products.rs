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
        _ => unreachable!("the caller asks `is_upper_f32`"),
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

#[cfg(test)]
mod tests {
    use super::super::{Gram, Piece};
    use super::*;

    fn encoded(dtype: Dtype, values: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0; values.len() * dtype.float_bytes().unwrap()];
        crate::read::encode_f32(dtype, values, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn every_count_and_length_has_the_bits_of_one_pair_at_a_time() {
        let draw = |model: usize, i: usize| {
            half::bf16::from_f32(((model * 977 + i) as f32 * 0.618_034).fract() * 6.0 - 3.0).to_f32()
        };
        for dtype in [Dtype::Bf16, Dtype::F32] {
            for (count, len) in (1..=5).flat_map(|count| [1, 15, 16, 17, 1003].map(|len| (count, len))) {
                let values: Vec<Vec<f32>> =
                    (0..=count).map(|m| (0..len).map(|i| draw(m, i)).collect()).collect();
                let stored: Vec<Vec<u8>> = values.iter().map(|v| encoded(dtype, v)).collect();
                let (base, models) = stored.split_first().unwrap();
                let models: Vec<&[u8]> = models.iter().map(|m| &m[..]).collect();
                for with_base in [false, true] {
                    let mut flat: Vec<f32> = values[1..]
                        .iter()
                        .flat_map(|v| {
                            v.iter().zip(&values[0]).map(|(x, b)| if with_base { x - b } else { *x })
                        })
                        .collect();
                    // What was there is added to.
                    let mut want = vec![0.25; Gram::sums(count)];
                    let mut found = want.clone();
                    Gram::add(&Piece::new(0, len, &[], &mut flat), &mut want);
                    assert!(products(dtype, with_base.then_some(&base[..]), &models, &mut found));
                    assert_eq!(found, want, "{dtype} {count} {len} {with_base}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_found() {
        for dtype in [Dtype::Bf16, Dtype::F32] {
            for (place, odd) in (0..3).flat_map(|place| [f32::NAN, f32::INFINITY].map(|odd| (place, odd))) {
                for count in [1, 2] {
                    let mut values = vec![vec![1.0f32; 21]; 3];
                    values[place][20] = odd;
                    let stored: Vec<Vec<u8>> = values.iter().map(|v| encoded(dtype, v)).collect();
                    let models: Vec<&[u8]> = stored[1..=count].iter().map(|m| &m[..]).collect();
                    let finite =
                        products(dtype, Some(&stored[0]), &models, &mut vec![0.0; Gram::sums(count)]);
                    assert_eq!(finite, place > count, "{dtype} {place} {odd} {count}");
                }
            }
        }
    }
}
