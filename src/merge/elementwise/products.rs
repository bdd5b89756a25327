//! Inner products of models straight from the stored bytes: all pairs at once, each model read and widened once.
//!
//! The bits of [`Gram::add`], which goes through memory pair by pair.

use super::Gram;
use super::stored::{Bf16, F32, Stored, is_odd};
use crate::kernel::dispatch;
use crate::kernel::vector::{LANES, add_lanes};
use crate::read::Dtype;

/// Models whose inner products stay in registers.
pub(super) const MOST: usize = 4;

/// Adds to `products` the lower triangle of the inner products of 1 to [`MOST`] models, or of their differences
/// from `base`; says whether some value was not finite.
pub(super) fn products(dtype: Dtype, base: Option<&[u8]>, models: &[&[u8]], products: &mut [f64]) -> bool {
    match dtype {
        Dtype::Bf16 => products_by_count::<Bf16>(base, models, products),
        Dtype::F32 => products_by_count::<F32>(base, models, products),
        _ => unreachable!("`takes` says which dtypes"),
    }
}

fn products_by_count<S: Stored>(base: Option<&[u8]>, models: &[&[u8]], products: &mut [f64]) -> bool {
    match models.len() {
        1 => products_of::<1, { Gram::sums(1) }, S>(base, models, products),
        2 => products_of::<2, { Gram::sums(2) }, S>(base, models, products),
        3 => products_of::<3, { Gram::sums(3) }, S>(base, models, products),
        4 => products_of::<4, { Gram::sums(4) }, S>(base, models, products),
        _ => unreachable!("one to `MOST` models"),
    }
}

fn products_of<const K: usize, const SUMS: usize, S: Stored>(
    base: Option<&[u8]>,
    models: &[&[u8]],
    products: &mut [f64],
) -> bool {
    let models: [&[S::Element]; K] = std::array::from_fn(|k| S::elements(models[k]));
    let (sums, odd) = match base {
        None => lanes::<K, SUMS, S>(
            models,
            models[0],
            #[inline(always)]
            |x, _| x,
        ),
        Some(base) => lanes::<K, SUMS, S>(
            models,
            S::elements(base),
            #[inline(always)]
            |x, base| x - base,
        ),
    };
    for (product, sum) in products.iter_mut().zip(sums) {
        *product += sum;
    }
    odd
}

/// As [`vector::dot`](crate::kernel::vector::dot) of every pair: the same lanes, each model read and widened once. Products
/// of two f32 are exact in f64.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "one index into several slices")]
fn lanes<const K: usize, const SUMS: usize, S: Stored>(
    models: [&[S::Element]; K],
    base: &[S::Element],
    value: impl Fn(f32, f32) -> f32,
) -> ([f64; SUMS], bool) {
    dispatch(
        #[inline(always)]
        move || {
            let n = base.len();
            let models: [&[S::Element]; K] = std::array::from_fn(|k| &models[k][..n]);
            let mut sums = [[0.0f64; LANES]; SUMS];
            let mut odd = 0;
            let whole = n / LANES * LANES;
            for first in (0..whole).step_by(LANES) {
                let mut x = [[0.0f64; LANES]; K];
                for k in 0..K {
                    let (model, base) = (&models[k][first..first + LANES], &base[first..first + LANES]);
                    for lane in 0..LANES {
                        let bits = S::decode(model[lane]);
                        let base = S::decode(base[lane]);
                        odd |= u32::from(is_odd(bits)) | u32::from(is_odd(base));
                        x[k][lane] = f64::from(value(f32::from_bits(bits), f32::from_bits(base)));
                    }
                }
                let mut at = 0;
                for i in 0..K {
                    for j in 0..=i {
                        for lane in 0..LANES {
                            sums[at][lane] += x[i][lane] * x[j][lane];
                        }
                        at += 1;
                    }
                }
            }
            for lane in 0..n - whole {
                let mut x = [0.0f64; K];
                let base = S::decode(base[whole + lane]);
                for k in 0..K {
                    let bits = S::decode(models[k][whole + lane]);
                    odd |= u32::from(is_odd(bits)) | u32::from(is_odd(base));
                    x[k] = f64::from(value(f32::from_bits(bits), f32::from_bits(base)));
                }
                let mut at = 0;
                for i in 0..K {
                    for j in 0..=i {
                        sums[at][lane] += x[i] * x[j];
                        at += 1;
                    }
                }
            }
            (sums.map(add_lanes), odd != 0)
        },
    )
}
