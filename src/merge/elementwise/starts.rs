//! Starting points and averages that need nothing but one pass over the models, piece by piece, nothing held.

use std::any::TypeId;
use std::ops::Range;

use super::sums::{self, Sum};
use crate::kernel::{Real, dispatch};
use crate::merge::{Inputs, MergeError, SourceId, Start, Tally};

/// Elements worked on at a time: a few vectors of them stay in the second-level cache.
pub const PIECE: usize = 1 << 14;

/// Scratch of one worker for elementwise work.
#[derive(Debug, Default)]
pub struct Scratch {
    bytes: Vec<u8>,
    /// Of each model whose file is not mapped, where several are read at once.
    each: Vec<Vec<u8>>,
}

/// Fills `out` with elements `range` of `start`, all arithmetic in `T`: f32 for merges that are elementwise to the end
/// (as mergekit 0.1.5's linear), f64 for the starting point of a solve.
///
/// # Errors
/// Those of reading the models.
pub fn merge_elementwise<T: Real>(
    inputs: &Inputs,
    start: &Start,
    name: &str,
    range: Range<usize>,
    out: &mut [T],
    scratch: &mut Scratch,
    tally: &Tally,
) -> Result<(), MergeError> {
    let mut buffers = [[T::default(); PIECE], [T::default(); PIECE]];
    for begin in range.clone().step_by(PIECE) {
        let elements = begin..(begin + PIECE).min(range.end);
        let out = &mut out[begin - range.start..elements.end - range.start];
        if at_once(inputs, start, name, elements.clone(), out, scratch, tally)? {
            continue;
        }
        let [x, base_values] = &mut buffers;
        let (x, base_values) = (&mut x[..out.len()], &mut base_values[..out.len()]);
        let mut read = |source: SourceId, values: &mut [T], each: &mut dyn FnMut(usize, &mut [T])| {
            let meta = inputs
                .tensor(source, name)
                .expect("a recipe names a checkpoint only where it has the tensor");
            inputs.read_each(source, meta, elements.clone(), values, &mut scratch.bytes, tally, each)
        };
        match start {
            Start::Zero => out.fill(T::default()),
            Start::Copy(source) => read(*source, out, &mut |_, _| {})?,
            Start::Method(_) => {
                unreachable!("`block` runs methods with passes before anything asks for a range")
            }
            Start::Mean { terms, divisor } => {
                for (k, (source, weight)) in terms.iter().enumerate() {
                    let weight = T::from_f64(*weight);
                    if k == 0 {
                        read(*source, out, &mut |_, out| {
                            if weight != T::from_f64(1.0) {
                                dispatch(
                                    #[inline(always)]
                                    || out.iter_mut().for_each(|v| *v *= weight),
                                );
                            }
                        })?;
                    } else {
                        read(*source, x, &mut |at, x| {
                            let out = &mut out[at..at + x.len()];
                            dispatch(
                                #[inline(always)]
                                || {
                                    for (v, x) in out.iter_mut().zip(x) {
                                        *v += weight * *x;
                                    }
                                },
                            );
                        })?;
                    }
                }
                if *divisor != 1.0 {
                    let divisor = T::from_f64(*divisor);
                    dispatch(
                        #[inline(always)]
                        || out.iter_mut().for_each(|v| *v /= divisor),
                    );
                }
            }
            Start::TaskVectors { base, terms, scale } => {
                read(*base, base_values, &mut |_, _| {})?;
                out.fill(T::default());
                for (source, weight) in terms {
                    let weight = T::from_f64(*weight);
                    read(*source, x, &mut |at, x| {
                        let (out, base) = (&mut out[at..at + x.len()], &base_values[at..at + x.len()]);
                        dispatch(
                            #[inline(always)]
                            || {
                                for ((v, x), b) in out.iter_mut().zip(x).zip(base) {
                                    *v += weight * (*x - *b);
                                }
                            },
                        );
                    })?;
                }
                let scale = T::from_f64(*scale);
                dispatch(
                    #[inline(always)]
                    || {
                        for (v, b) in out.iter_mut().zip(&*base_values) {
                            *v = *b + scale * *v;
                        }
                    },
                );
            }
        }
    }
    Ok(())
}

/// The same for sums of models that are stored alike, without a detour through memory; false where that cannot be, or where
/// a value is not finite and somebody has to say which.
fn at_once<T: Real>(
    inputs: &Inputs,
    start: &Start,
    name: &str,
    elements: Range<usize>,
    out: &mut [T],
    scratch: &mut Scratch,
    tally: &Tally,
) -> Result<bool, MergeError> {
    let (sum, base, terms) = match start {
        Start::Mean { terms, divisor } => (Sum::Mean { divisor: *divisor as f32 }, None, terms),
        Start::TaskVectors { base, terms, scale } => {
            (Sum::TaskVectors { scale: *scale as f32 }, Some((*base, 1.0)), terms)
        }
        _ => return Ok(false),
    };
    // Starts of solves are f64, and no merge waits for them.
    if TypeId::of::<T>() != TypeId::of::<f32>() {
        return Ok(false);
    }
    let out: &mut [f32] = bytemuck::cast_slice_mut(out);
    let count = terms.len() + usize::from(base.is_some());
    if !(1..=sums::MOST).contains(&count) {
        return Ok(false);
    }
    scratch.each.resize_with(count, Vec::new);
    let mut stored = Vec::with_capacity(count);
    let mut dtype = None;
    for ((source, weight), bytes) in base.iter().chain(terms).zip(&mut scratch.each) {
        let meta =
            inputs.tensor(*source, name).expect("a recipe names a checkpoint only where it has the tensor");
        if !sums::takes(meta.dtype) || *dtype.get_or_insert(meta.dtype) != meta.dtype {
            return Ok(false);
        }
        let Some(bytes) = inputs.stored(*source, meta, elements.clone(), bytes)? else { return Ok(false) };
        stored.push((bytes, *weight as f32));
    }
    let Some(dtype) = dtype else { return Ok(false) };
    if !sums::sum(sum, dtype, &stored, out) && inputs.refuse_nonfinite {
        return Ok(false);
    }
    tally.add(stored.iter().map(|(bytes, _)| bytes.len() as u64).sum());
    Ok(true)
}
