//! Starting points and averages that need nothing but one pass over the models, piece by piece, nothing held.

use std::ops::Range;

use super::sums::{self, Sum};
use crate::kernel::{Real, dispatch};
use crate::merge::{Inputs, MergeError, SourceId, Start, Tally};
use crate::read::{Dtype, TensorMeta, first_nonfinite};

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

/// Fills `out` with the same elements stored as `to`, all arithmetic in f32; says whether a result is not finite.
///
/// # Errors
/// Those of reading the models.
#[allow(clippy::too_many_arguments, reason = "those of `merge_elementwise`, and how the result is stored")]
pub(crate) fn merge_stored(
    inputs: &Inputs,
    start: &Start,
    name: &str,
    range: Range<usize>,
    to: Dtype,
    out: &mut [u8],
    scratch: &mut Scratch,
    tally: &Tally,
) -> Result<bool, MergeError> {
    let width = to.float_bytes().unwrap_or(0);
    let together = Together::of(inputs, start, name).filter(|_| to.is_upper_f32());
    let mut nonfinite = false;
    let mut values = Vec::new();
    for (begin, out) in range.clone().step_by(PIECE).zip(out.chunks_mut((PIECE * width).max(1))) {
        let elements = begin..(begin + PIECE).min(range.end);
        if let Some(together) = &together
            && together.sum(elements.clone(), to, out, &mut scratch.each, tally)?
        {
            continue;
        }
        values.resize(elements.len(), 0.0f32);
        merge_elementwise(inputs, start, name, elements, &mut values, scratch, tally)?;
        f32::encode(to, &values, out);
        nonfinite |= first_nonfinite(to, out).is_some();
    }
    Ok(nonfinite)
}

/// A sum of models that are stored alike: without a detour through memory.
struct Together<'i> {
    inputs: &'i Inputs,
    sum: Sum,
    dtype: Dtype,
    /// A base first.
    terms: Vec<(SourceId, &'i TensorMeta, f32)>,
}

impl<'i> Together<'i> {
    /// `None` where it cannot be.
    fn of(inputs: &'i Inputs, start: &Start, name: &str) -> Option<Self> {
        let (sum, base, terms) = match start {
            Start::Mean { terms, divisor } => (Sum::Mean { divisor: *divisor as f32 }, None, terms),
            Start::TaskVectors { base, terms, scale } => {
                (Sum::TaskVectors { scale: *scale as f32 }, Some((*base, 1.0)), terms)
            }
            _ => return None,
        };
        let terms: Vec<_> = base
            .iter()
            .chain(terms)
            .map(|(source, weight)| Some((*source, inputs.tensor(*source, name)?, *weight as f32)))
            .collect::<Option<_>>()?;
        let dtype = terms.first()?.1.dtype;
        let alike = dtype.is_upper_f32() && terms.iter().all(|(_, meta, _)| meta.dtype == dtype);
        (alike && terms.len() <= sums::MOST).then_some(Self { inputs, sum, dtype, terms })
    }

    /// False where the stored bytes are not to be had, or where a value is not finite and the long way says which.
    fn sum(
        &self,
        elements: Range<usize>,
        to: Dtype,
        out: &mut [u8],
        scratch: &mut Vec<Vec<u8>>,
        tally: &Tally,
    ) -> Result<bool, MergeError> {
        scratch.resize_with(self.terms.len(), Vec::new);
        let mut stored = Vec::with_capacity(self.terms.len());
        for ((source, meta, weight), bytes) in self.terms.iter().zip(scratch) {
            let Some(bytes) = self.inputs.stored(*source, meta, elements.clone(), bytes)? else {
                return Ok(false);
            };
            stored.push((bytes, *weight));
        }
        let finite = sums::sum(self.sum, self.dtype, &stored, to, out);
        if finite {
            tally.add(stored.iter().map(|(bytes, _)| bytes.len() as u64).sum());
        }
        Ok(finite)
    }
}
