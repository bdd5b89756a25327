//! Weighted sums of models from their stored bytes to the result's: all models at once, element by element, in registers.
//!
//! What [`starts`](super::starts) does piece by piece through memory, with the same f32 operations in the same order, so the
//! same bits: decode, weight, add, divide, round. It takes a few models that are stored alike and says whether a value was
//! not finite without saying which; then the caller goes the long way.

use super::stored::{Bf16, F32, Stored};
use crate::kernel::dispatch;
use crate::read::Dtype;

/// Models at a time, a base included: each number of them has a loop of its own.
pub(super) const MOST: usize = 8;

/// What is done with the values of one element.
#[derive(Debug, Clone, Copy)]
pub(super) enum Sum {
    /// `Σ wᵢ·xᵢ / divisor`.
    Mean { divisor: f32 },
    /// `x₀ + scale·Σ wᵢ·(xᵢ - x₀)`: the base is the first term, its weight is not used.
    TaskVectors { scale: f32 },
}

/// One model: its bytes and its weight.
pub(super) type Term<'b> = (&'b [u8], f32);

/// Fills `out`, stored as `to`, from 1 to [`MOST`] terms; false where a result is not finite, and `out` is then good for
/// nothing. Every value that is not finite makes such a result: no weight, 0 included, turns an infinity or a NaN into a
/// number.
pub(super) fn sum(sum: Sum, dtype: Dtype, terms: &[Term<'_>], to: Dtype, out: &mut [u8]) -> bool {
    match (dtype, to) {
        (Dtype::Bf16, Dtype::Bf16) => sum_by_count::<Bf16, Bf16>(sum, terms, out),
        (Dtype::Bf16, Dtype::F32) => sum_by_count::<Bf16, F32>(sum, terms, out),
        (Dtype::F32, Dtype::Bf16) => sum_by_count::<F32, Bf16>(sum, terms, out),
        (Dtype::F32, Dtype::F32) => sum_by_count::<F32, F32>(sum, terms, out),
        _ => unreachable!("the caller asks `is_upper_f32`"),
    }
}

fn sum_by_count<S: Stored, O: Stored>(sum: Sum, terms: &[Term<'_>], out: &mut [u8]) -> bool {
    match terms.len() {
        1 => sum_of::<1, S, O>(sum, terms, out),
        2 => sum_of::<2, S, O>(sum, terms, out),
        3 => sum_of::<3, S, O>(sum, terms, out),
        4 => sum_of::<4, S, O>(sum, terms, out),
        5 => sum_of::<5, S, O>(sum, terms, out),
        6 => sum_of::<6, S, O>(sum, terms, out),
        7 => sum_of::<7, S, O>(sum, terms, out),
        8 => sum_of::<8, S, O>(sum, terms, out),
        _ => unreachable!("one to `MOST` terms"),
    }
}

fn sum_of<const K: usize, S: Stored, O: Stored>(sum: Sum, terms: &[Term<'_>], out: &mut [u8]) -> bool {
    let models: [&[S::Element]; K] = std::array::from_fn(|k| S::elements(terms[k].0));
    let weights: [f32; K] = std::array::from_fn(|k| terms[k].1);
    let out = O::elements_mut(out);
    match sum {
        // A power of two: its inverse is exact, and a product is had for less than a quotient.
        Sum::Mean { divisor } if divisor.is_normal() && divisor.to_bits() & 0x007f_ffff == 0 => {
            let inverse = 1.0 / divisor;
            elements::<K, S, O>(
                models,
                out,
                #[inline(always)]
                move |x| weighted(&weights, &x) * inverse,
            )
        }
        Sum::Mean { divisor } => elements::<K, S, O>(
            models,
            out,
            #[inline(always)]
            move |x| weighted(&weights, &x) / divisor,
        ),
        Sum::TaskVectors { scale } => elements::<K, S, O>(
            models,
            out,
            #[inline(always)]
            move |x| {
                let mut sum = 0.0;
                for k in 1..K {
                    sum += weights[k] * (x[k] - x[0]);
                }
                x[0] + scale * sum
            },
        ),
    }
}

#[inline(always)]
fn weighted<const K: usize>(weights: &[f32; K], x: &[f32; K]) -> f32 {
    let mut sum = weights[0] * x[0];
    for k in 1..K {
        sum += weights[k] * x[k];
    }
    sum
}

/// Compiled for each vector unit. All is handed on by value: what a closure borrows is not inlined, and the loop stays scalar.
#[inline(always)]
fn elements<const K: usize, S: Stored, O: Stored>(
    models: [&[S::Element]; K],
    out: &mut [O::Element],
    result: impl Fn([f32; K]) -> f32,
) -> bool {
    dispatch(
        #[inline(always)]
        move || elements_here::<K, S, O>(models, out, result),
    )
}

/// One plain loop over the elements, which the compiler vectorises: nothing in it may branch, and every slice has one length.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "one index into several slices")]
fn elements_here<const K: usize, S: Stored, O: Stored>(
    models: [&[S::Element]; K],
    out: &mut [O::Element],
    result: impl Fn([f32; K]) -> f32,
) -> bool {
    let n = out.len();
    let models: [&[S::Element]; K] = std::array::from_fn(|k| &models[k][..n]);
    let mut most = 0u32;
    for i in 0..n {
        let mut x = [0.0; K];
        for k in 0..K {
            x[k] = S::decode(models[k][i]);
        }
        let value = result(x);
        // Bits order as magnitudes do, NaN last.
        most = most.max(value.to_bits() & 0x7fff_ffff);
        out[i] = O::encode(value);
    }
    most < O::LEAST_ODD
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    /// Value by value, as `starts` has it.
    fn one(sum: Sum, x: &[f32], weights: &[f32]) -> f32 {
        match sum {
            Sum::Mean { divisor } => {
                let mut out = if weights[0] == 1.0 { x[0] } else { x[0] * weights[0] };
                for (x, w) in x.iter().zip(weights).skip(1) {
                    out += w * x;
                }
                if divisor == 1.0 { out } else { out / divisor }
            }
            Sum::TaskVectors { scale } => {
                let mut out = 0.0;
                for (value, w) in x.iter().zip(weights).skip(1) {
                    out += w * (value - x[0]);
                }
                x[0] + scale * out
            }
        }
    }

    fn encoded(dtype: Dtype, values: &[f32]) -> Vec<u8> {
        let mut bytes = vec![0; values.len() * dtype.float_bytes().unwrap()];
        crate::read::encode_f32(dtype, values, &mut bytes).unwrap();
        bytes
    }

    /// The sum as `to` from models stored as `dtype`; `None` where it is refused.
    fn summed(kind: Sum, dtype: Dtype, models: &[Vec<f32>], weights: &[f32], to: Dtype) -> Option<Vec<u8>> {
        let stored: Vec<Vec<u8>> = models.iter().map(|model| encoded(dtype, model)).collect();
        let terms: Vec<Term<'_>> = stored.iter().map(|b| &b[..]).zip(weights.iter().copied()).collect();
        let mut out = vec![0; models[0].len() * to.float_bytes().unwrap()];
        sum(kind, dtype, &terms, to, &mut out).then_some(out)
    }

    const KINDS: [Sum; 6] = [
        Sum::Mean { divisor: 1.0 },
        Sum::Mean { divisor: 3.3 },
        Sum::Mean { divisor: -4.0 },
        Sum::Mean { divisor: f32::MIN_POSITIVE },
        Sum::TaskVectors { scale: 1.0 },
        Sum::TaskVectors { scale: 0.7 },
    ];

    const PAIRS: [(Dtype, Dtype); 4] = [
        (Dtype::Bf16, Dtype::Bf16),
        (Dtype::Bf16, Dtype::F32),
        (Dtype::F32, Dtype::Bf16),
        (Dtype::F32, Dtype::F32),
    ];

    #[test]
    fn every_count_dtype_and_length_has_the_bits_of_one_value_at_a_time() {
        for (dtype, to) in PAIRS {
            for (count, len) in (1..=MOST).flat_map(|count| [1, 15, 16, 1000].map(|len| (count, len))) {
                let draw =
                    |model: usize, i: usize| ((model * 1000 + i) as f32 * 0.618_034).fract() * 8.0 - 4.0;
                let mut models: Vec<Vec<f32>> = (0..count)
                    .map(|m| (0..len).map(|i| bf16::from_f32(draw(m, i)).to_f32()).collect())
                    .collect();
                // Signed zeros and denormals.
                models[count - 1][len / 2] = -0.0;
                models[0][len / 2] = if len > 15 { -0.0 } else { f32::from_bits(0x10_0000) };
                let weights: Vec<f32> = (0..count).map(|m| [1.0, 0.3, -1.7, 2.5][m % 4]).collect();
                for kind in KINDS {
                    let want: Vec<f32> = (0..len)
                        .map(|i| one(kind, &models.iter().map(|m| m[i]).collect::<Vec<_>>(), &weights))
                        .collect();
                    let want = want.iter().all(|v| v.is_finite()).then(|| encoded(to, &want));
                    assert_eq!(
                        summed(kind, dtype, &models, &weights, to),
                        want,
                        "{kind:?} {dtype} {count} {len}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_found_whatever_its_weight_and_whatever_makes_it() {
        for (dtype, to) in PAIRS {
            for (kind, place) in KINDS.into_iter().flat_map(|kind| [0, 1, 2].map(|place| (kind, place))) {
                for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    for weight in [0.0, -0.0, 1.0, -3.0] {
                        let mut models = vec![vec![1.0; 37]; 3];
                        models[place][33] = odd;
                        let weights = [1.0, weight, weight];
                        assert_eq!(
                            summed(kind, dtype, &models, &weights, to),
                            None,
                            "{kind:?} {odd} {weight}"
                        );
                    }
                }
            }
            let all = |value: f32| vec![vec![value; 20]; 2];
            let mean = Sum::Mean { divisor: 1.0 };
            assert_eq!(summed(mean, dtype, &all(2e38), &[1.0, 1.0], to), None, "the sum");
        }
        // Finite as f32, an infinity as bf16: from halfway to the next.
        let mean = Sum::Mean { divisor: 1.0 };
        let largest = f32::from_bits(0x7f7f_7fff);
        let rounds = |value: f32| summed(mean, Dtype::F32, &[vec![value; 20]], &[1.0], Dtype::Bf16);
        assert_eq!(rounds(largest), Some(encoded(Dtype::Bf16, &[largest; 20])));
        assert_eq!(rounds(f32::from_bits(0x7f7f_8000)), None);
        assert!(summed(mean, Dtype::F32, &[vec![f32::MAX; 20]], &[1.0], Dtype::F32).is_some());
    }
}
