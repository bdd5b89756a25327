//! Weighted sums of models straight from their stored bytes: all models at once, element by element, in registers.
//!
//! What [`starts`](super::starts) does piece by piece through memory, with the same f32 operations in the same order, so the
//! same bits: decode, weight, add, divide. It takes a few models that are stored alike, in a dtype that decodes by a shift
//! or not at all, and says whether a value was not finite without saying which; then the caller looks for it its own way.

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

/// Whether values of this dtype are taken.
pub(super) fn takes(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::Bf16 | Dtype::F32)
}

/// Fills `out` from 1 to [`MOST`] terms; false where some model's value is NaN or infinite.
pub(super) fn sum(sum: Sum, dtype: Dtype, terms: &[Term<'_>], out: &mut [f32]) -> bool {
    match dtype {
        Dtype::Bf16 => by_count(
            sum,
            terms,
            out,
            #[inline(always)]
            |b: [u8; 2]| u32::from(u16::from_le_bytes(b)) << 16,
        ),
        Dtype::F32 => by_count(
            sum,
            terms,
            out,
            #[inline(always)]
            |b: [u8; 4]| u32::from_le_bytes(b),
        ),
        _ => unreachable!("`takes` says which dtypes"),
    }
}

#[inline(always)]
fn by_count<const SIZE: usize>(
    sum: Sum,
    terms: &[Term<'_>],
    out: &mut [f32],
    decode: impl Fn([u8; SIZE]) -> u32 + Copy,
) -> bool {
    match terms.len() {
        1 => of_count::<1, SIZE>(sum, terms, out, decode),
        2 => of_count::<2, SIZE>(sum, terms, out, decode),
        3 => of_count::<3, SIZE>(sum, terms, out, decode),
        4 => of_count::<4, SIZE>(sum, terms, out, decode),
        5 => of_count::<5, SIZE>(sum, terms, out, decode),
        6 => of_count::<6, SIZE>(sum, terms, out, decode),
        7 => of_count::<7, SIZE>(sum, terms, out, decode),
        8 => of_count::<8, SIZE>(sum, terms, out, decode),
        _ => unreachable!("one to `MOST` terms"),
    }
}

#[inline(always)]
fn of_count<const K: usize, const SIZE: usize>(
    sum: Sum,
    terms: &[Term<'_>],
    out: &mut [f32],
    decode: impl Fn([u8; SIZE]) -> u32 + Copy,
) -> bool {
    let models: [&[[u8; SIZE]]; K] = std::array::from_fn(|k| terms[k].0.as_chunks::<SIZE>().0);
    let weights: [f32; K] = std::array::from_fn(|k| terms[k].1);
    match sum {
        // A division by 1 changes nothing and takes as long as another.
        Sum::Mean { divisor: 1.0 } => elements(
            models,
            out,
            decode,
            #[inline(always)]
            |x| weighted(&x, &weights),
        ),
        Sum::Mean { divisor } => elements(
            models,
            out,
            decode,
            #[inline(always)]
            |x| weighted(&x, &weights) / divisor,
        ),
        Sum::TaskVectors { scale } => elements(
            models,
            out,
            decode,
            #[inline(always)]
            |x| {
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
fn weighted<const K: usize>(x: &[f32; K], weights: &[f32; K]) -> f32 {
    let mut sum = weights[0] * x[0];
    for k in 1..K {
        sum += weights[k] * x[k];
    }
    sum
}

/// Compiled for each vector unit. All is handed on by value: what a closure borrows is not inlined, and the loop stays scalar.
#[inline(always)]
fn elements<const K: usize, const SIZE: usize>(
    models: [&[[u8; SIZE]]; K],
    out: &mut [f32],
    decode: impl Fn([u8; SIZE]) -> u32 + Copy,
    result: impl Fn([f32; K]) -> f32,
) -> bool {
    dispatch(
        #[inline(always)]
        move || elements_here(models, out, decode, result),
    )
}

/// One plain loop over the elements, which the compiler vectorises: nothing in it may branch, and every slice has one length.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "one index into several slices")]
fn elements_here<const K: usize, const SIZE: usize>(
    models: [&[[u8; SIZE]]; K],
    out: &mut [f32],
    decode: impl Fn([u8; SIZE]) -> u32 + Copy,
    result: impl Fn([f32; K]) -> f32,
) -> bool {
    const EXPONENT: u32 = 0x7f80_0000;
    let n = out.len();
    let models: [&[[u8; SIZE]]; K] = std::array::from_fn(|k| &models[k][..n]);
    let mut odd = 0;
    for i in 0..n {
        let mut x = [0.0; K];
        for k in 0..K {
            let bits = decode(models[k][i]);
            odd |= u32::from(bits & EXPONENT == EXPONENT);
            x[k] = f32::from_bits(bits);
        }
        out[i] = result(x);
    }
    odd == 0
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

    #[test]
    fn every_count_dtype_and_length_has_the_bits_of_one_value_at_a_time() {
        for dtype in [Dtype::Bf16, Dtype::F32] {
            for (count, len) in (1..=MOST).flat_map(|count| [1, 15, 16, 1000].map(|len| (count, len))) {
                let draw =
                    |model: usize, i: usize| ((model * 1000 + i) as f32 * 0.618_034).fract() * 8.0 - 4.0;
                let mut models: Vec<Vec<f32>> = (0..count)
                    .map(|m| (0..len).map(|i| bf16::from_f32(draw(m, i)).to_f32()).collect())
                    .collect();
                // Signed zeros and denormals.
                models[count - 1][len / 2] = -0.0;
                models[0][len / 2] = if len > 15 { -0.0 } else { f32::from_bits(0x10_0000) };
                let encode = |values: &Vec<f32>| {
                    let mut bytes = vec![0; len * dtype.float_bytes().unwrap()];
                    crate::read::encode_f32(dtype, values, &mut bytes).unwrap();
                    bytes
                };
                let weights: Vec<f32> = (0..count).map(|m| [1.0, 0.3, -1.7, 2.5][m % 4]).collect();
                let mut stored: Vec<Vec<u8>> = models.iter().map(encode).collect();
                let terms = |stored: &'_ [Vec<u8>]| -> Vec<(Vec<u8>, f32)> {
                    stored.iter().cloned().zip(weights.iter().copied()).collect()
                };
                for kind in [
                    Sum::Mean { divisor: 1.0 },
                    Sum::Mean { divisor: 3.3 },
                    Sum::TaskVectors { scale: 1.0 },
                    Sum::TaskVectors { scale: 0.7 },
                ] {
                    let held = terms(&stored);
                    let borrowed: Vec<Term<'_>> = held.iter().map(|(bytes, w)| (&bytes[..], *w)).collect();
                    let mut out = vec![0.0; len];
                    assert!(sum(kind, dtype, &borrowed, &mut out));
                    for (i, out) in out.iter().enumerate() {
                        let x: Vec<f32> = models.iter().map(|model| model[i]).collect();
                        let want = one(kind, &x, &weights);
                        assert_eq!(out.to_bits(), want.to_bits(), "{kind:?} {dtype} {count} {len} {i}");
                    }
                }
                // One value that is not finite, in the last model.
                for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    models[count - 1][len - 1] = odd;
                    stored[count - 1] = encode(&models[count - 1]);
                    let held = terms(&stored);
                    let borrowed: Vec<Term<'_>> = held.iter().map(|(bytes, w)| (&bytes[..], *w)).collect();
                    assert!(!sum(Sum::Mean { divisor: 1.0 }, dtype, &borrowed, &mut vec![0.0; len]));
                }
            }
        }
    }
}
