//! Element types of safetensors files, and the conversions between stored bytes and f32 or f64.
//!
//! The engine and the statistics module call the conversions on tiles of a few MiB; bytes come from a mapping
//! and may start at any address, so they are never reinterpreted as wider elements. Values are little-endian,
//! as the format prescribes. Every conversion to fewer bits rounds once, to nearest, ties to even; NaN stays
//! NaN, overflow becomes an infinity, denormals are kept. This module never allocates and knows no file.

use std::fmt;

use half::f16;
use half::slice::HalfFloatSliceExt as _;
use serde::{Serialize, Serializer};

use super::ReadError;
use crate::kernel::dispatch;

/// An element type that a safetensors header may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    Bool,
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    F4,
    F6E2M3,
    F6E3M2,
    F8E4M3,
    F8E5M2,
    F8E8M0,
    F8E4M3Fnuz,
    F8E5M2Fnuz,
    F16,
    Bf16,
    F32,
    F64,
    C64,
}

impl Dtype {
    /// Every dtype of the format.
    pub const ALL: [Self; 22] = [
        Self::Bool,
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::U64,
        Self::I64,
        Self::F4,
        Self::F6E2M3,
        Self::F6E3M2,
        Self::F8E4M3,
        Self::F8E5M2,
        Self::F8E8M0,
        Self::F8E4M3Fnuz,
        Self::F8E5M2Fnuz,
        Self::F16,
        Self::Bf16,
        Self::F32,
        Self::F64,
        Self::C64,
    ];

    /// The name that safetensors headers use.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bool => "BOOL",
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::U16 => "U16",
            Self::I16 => "I16",
            Self::U32 => "U32",
            Self::I32 => "I32",
            Self::U64 => "U64",
            Self::I64 => "I64",
            Self::F4 => "F4",
            Self::F6E2M3 => "F6_E2M3",
            Self::F6E3M2 => "F6_E3M2",
            Self::F8E4M3 => "F8_E4M3",
            Self::F8E5M2 => "F8_E5M2",
            Self::F8E8M0 => "F8_E8M0",
            Self::F8E4M3Fnuz => "F8_E4M3FNUZ",
            Self::F8E5M2Fnuz => "F8_E5M2FNUZ",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::F32 => "F32",
            Self::F64 => "F64",
            Self::C64 => "C64",
        }
    }

    /// The dtype of a header's name; `None` if safetensors has no such name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Bits per element.
    pub fn bits(self) -> u64 {
        match self {
            Self::F4 => 4,
            Self::F6E2M3 | Self::F6E3M2 => 6,
            Self::Bool | Self::U8 | Self::I8 => 8,
            Self::F8E4M3 | Self::F8E5M2 | Self::F8E8M0 | Self::F8E4M3Fnuz | Self::F8E5M2Fnuz => 8,
            Self::U16 | Self::I16 | Self::F16 | Self::Bf16 => 16,
            Self::U32 | Self::I32 | Self::F32 => 32,
            Self::U64 | Self::I64 | Self::F64 | Self::C64 => 64,
        }
    }

    /// Bytes per element of a dtype that can be merged; `None` for the others.
    pub fn float_bytes(self) -> Option<usize> {
        match self {
            Self::F16 | Self::Bf16 => Some(2),
            Self::F32 => Some(4),
            Self::F64 => Some(8),
            _ => None,
        }
    }

    /// Whether weights of this dtype can be merged: F64, F32, F16 and BF16.
    pub fn is_float(self) -> bool {
        self.float_bytes().is_some()
    }

    /// Whether a value is the upper bits of an f32, so that vector loops decode it by a shift at most.
    pub(crate) fn is_upper_f32(self) -> bool {
        matches!(self, Self::Bf16 | Self::F32)
    }

    /// Whether tensors of this dtype pass from the base to the output as they are: integers and BOOL.
    pub fn is_copied(self) -> bool {
        matches!(
            self,
            Self::Bool
                | Self::U8
                | Self::I8
                | Self::U16
                | Self::I16
                | Self::U32
                | Self::I32
                | Self::U64
                | Self::I64
        )
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for Dtype {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// Elements that pass through a stack buffer at a time, where the source or the target needs alignment (2 KiB
/// of f16).
const CHUNK: usize = 1024;

/// Checks that `bytes` are exactly `elements` elements of a float dtype.
fn check(dtype: Dtype, bytes: usize, elements: usize) -> Result<(), ReadError> {
    let size = dtype.float_bytes().ok_or(ReadError::NotFloat { dtype })?;
    if elements.checked_mul(size) == Some(bytes) {
        Ok(())
    } else {
        Err(ReadError::ConversionLength { dtype, bytes, elements })
    }
}

/// Runs an autovectorised loop over `(element of out, SIZE little-endian bytes)` with the widest registers of
/// this CPU.
#[inline(always)]
fn decode_loop<const SIZE: usize, T>(bytes: &[u8], out: &mut [T], convert: impl Fn([u8; SIZE]) -> T) {
    let (elements, _) = bytes.as_chunks::<SIZE>();
    dispatch(
        #[inline(always)]
        || {
            for (value, element) in out.iter_mut().zip(elements) {
                *value = convert(*element);
            }
        },
    );
}

/// As [`decode_loop`], the other way.
#[inline(always)]
fn encode_loop<const SIZE: usize, T: Copy>(values: &[T], out: &mut [u8], convert: impl Fn(T) -> [u8; SIZE]) {
    let (elements, _) = out.as_chunks_mut::<SIZE>();
    dispatch(
        #[inline(always)]
        || {
            for (element, value) in elements.iter_mut().zip(values) {
                *element = convert(*value);
            }
        },
    );
}

/// Decodes little-endian f16 by aligned chunks, so that `half` can use the CPU's conversion instructions.
fn f16_chunks(bytes: &[u8], mut sink: impl FnMut(usize, &[f32])) {
    let mut stored = [f16::ZERO; CHUNK];
    let mut wide = [0f32; CHUNK];
    for (index, chunk) in bytes.chunks(2 * CHUNK).enumerate() {
        let (elements, _) = chunk.as_chunks::<2>();
        let count = elements.len();
        for (value, element) in stored.iter_mut().zip(elements) {
            *value = f16::from_le_bytes(*element);
        }
        stored[..count].convert_to_f32_slice(&mut wide[..count]);
        sink(index * CHUNK, &wide[..count]);
    }
}

/// Encodes `len` values, given as f32 by chunks, as little-endian f16.
fn f16_encode(len: usize, out: &mut [u8], mut source: impl FnMut(usize, &mut [f32])) {
    let mut wide = [0f32; CHUNK];
    let mut stored = [f16::ZERO; CHUNK];
    for (index, chunk) in out.chunks_mut(2 * CHUNK).enumerate() {
        let (elements, _) = chunk.as_chunks_mut::<2>();
        let count = elements.len().min(len - index * CHUNK);
        source(index * CHUNK, &mut wide[..count]);
        stored[..count].convert_from_f32_slice(&wide[..count]);
        for (element, value) in elements.iter_mut().zip(&stored[..count]) {
            *element = value.to_le_bytes();
        }
    }
}

/// f32 to bf16 bits: nearest, ties to even, in integers, so that denormals survive on every CPU. Of anything but NaN.
#[inline(always)]
pub(crate) fn bf16_bits_of_finite(value: f32) -> u16 {
    let bits = value.to_bits();
    (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// The same of any value.
#[inline(always)]
fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bf16_bits_of_finite(value);
    // A NaN could round to an infinity or carry into the sign; it keeps its upper payload and is made quiet
    // instead.
    let quiet = ((bits >> 16) | 0x0040) as u16;
    if bits & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded }
}

/// f64 to f32, rounded to odd: an inexact result gets its last bit set.
///
/// Rounding the result once more, to a type with at least two bits fewer, then gives what a single rounding
/// of the f64 would have given (Boldo & Melquiond 2008), which two roundings to nearest do not.
#[inline(always)]
fn round_to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    let back = f64::from(nearest);
    let bits = nearest.to_bits();
    // Towards zero first: one step down in magnitude where rounding went up. Bits order as magnitudes do.
    let truncated = if back.abs() > value.abs() { bits.wrapping_sub(1) } else { bits };
    // A NaN is unequal to itself, and still a NaN with its last bit set.
    f32::from_bits(if back != value { truncated | 1 } else { bits })
}

/// Decodes stored elements into f32. f64 is rounded to nearest; the other floats are exact.
///
/// - `bytes`: `out.len()` elements of `dtype`, little-endian, at any alignment.
///
/// # Errors
/// [`ReadError::NotFloat`] or [`ReadError::ConversionLength`]: the caller mixed up tensors.
pub fn decode_f32(dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> Result<(), ReadError> {
    check(dtype, bytes.len(), out.len())?;
    match dtype {
        Dtype::F32 => decode_loop(bytes, out, f32::from_le_bytes),
        Dtype::Bf16 => decode_loop(bytes, out, |b| f32::from_bits(bf16_as_f32(b))),
        Dtype::F16 => f16_chunks(bytes, |at, wide| out[at..at + wide.len()].copy_from_slice(wide)),
        Dtype::F64 => decode_loop(bytes, out, |b| f64::from_le_bytes(b) as f32),
        _ => return Err(ReadError::NotFloat { dtype }),
    }
    Ok(())
}

/// Decodes stored elements into f64, exactly.
///
/// - `bytes`: `out.len()` elements of `dtype`, little-endian, at any alignment.
///
/// # Errors
/// [`ReadError::NotFloat`] or [`ReadError::ConversionLength`]: the caller mixed up tensors.
pub fn decode_f64(dtype: Dtype, bytes: &[u8], out: &mut [f64]) -> Result<(), ReadError> {
    check(dtype, bytes.len(), out.len())?;
    match dtype {
        Dtype::F64 => decode_loop(bytes, out, f64::from_le_bytes),
        Dtype::F32 => decode_loop(bytes, out, |b| f64::from(f32::from_le_bytes(b))),
        Dtype::Bf16 => decode_loop(bytes, out, |b| f64::from(f32::from_bits(bf16_as_f32(b)))),
        Dtype::F16 => f16_chunks(bytes, |at, wide| {
            for (value, element) in out[at..].iter_mut().zip(wide) {
                *value = f64::from(*element);
            }
        }),
        _ => return Err(ReadError::NotFloat { dtype }),
    }
    Ok(())
}

/// Whether an f32 of these bits is finite, of a loop's greatest magnitude: bits order as magnitudes do, NaN last.
fn is_finite(most: u32) -> bool {
    most < 0x7f80_0000
}

/// Bits of the f32 that a bf16 is the upper half of.
#[inline(always)]
pub(crate) fn bf16_as_f32(element: [u8; 2]) -> u32 {
    u32::from(u16::from_le_bytes(element)) << 16
}

/// As [`decode_f32`], and says whether all values are finite: in one loop where a value is at hand as the bits of an f32.
///
/// # Errors
/// As there.
pub fn decode_finite_f32(dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> Result<bool, ReadError> {
    #[inline(always)]
    fn here<const SIZE: usize>(bytes: &[u8], out: &mut [f32], bits: impl Fn([u8; SIZE]) -> u32) -> bool {
        let (elements, _) = bytes.as_chunks::<SIZE>();
        is_finite(dispatch(
            #[inline(always)]
            || {
                let mut most = 0u32;
                for (value, element) in out.iter_mut().zip(elements) {
                    let bits = bits(*element);
                    most = most.max(bits & 0x7fff_ffff);
                    *value = f32::from_bits(bits);
                }
                most
            },
        ))
    }
    check(dtype, bytes.len(), out.len())?;
    match dtype {
        Dtype::F32 => Ok(here(bytes, out, u32::from_le_bytes)),
        Dtype::Bf16 => Ok(here(bytes, out, bf16_as_f32)),
        _ => {
            decode_f32(dtype, bytes, out)?;
            Ok(first_nonfinite_f32(out).is_none())
        }
    }
}

/// Stored elements less `base`, in f32 and in one loop, where a value is at hand as the bits of an f32: `None` for other
/// dtypes. Says whether all differences are finite; then so are the values.
///
/// # Errors
/// As [`decode_f32`].
pub fn decode_difference_f32(
    dtype: Dtype,
    bytes: &[u8],
    base: &[f32],
    out: &mut [f32],
) -> Result<Option<bool>, ReadError> {
    #[inline(always)]
    fn here<const SIZE: usize>(
        bytes: &[u8],
        base: &[f32],
        out: &mut [f32],
        bits: impl Fn([u8; SIZE]) -> u32,
    ) -> Option<bool> {
        let (elements, _) = bytes.as_chunks::<SIZE>();
        Some(is_finite(dispatch(
            #[inline(always)]
            || {
                let mut most = 0u32;
                for ((value, element), base) in out.iter_mut().zip(elements).zip(base) {
                    let difference = f32::from_bits(bits(*element)) - base;
                    most = most.max(difference.to_bits() & 0x7fff_ffff);
                    *value = difference;
                }
                most
            },
        )))
    }
    check(dtype, bytes.len(), out.len())?;
    check(dtype, bytes.len(), base.len())?;
    Ok(match dtype {
        Dtype::F32 => here(bytes, base, out, u32::from_le_bytes),
        Dtype::Bf16 => here(bytes, base, out, bf16_as_f32),
        _ => None,
    })
}

/// Encodes f32 values as stored elements, each rounded once.
///
/// - `out`: room for exactly `values.len()` elements of `dtype`, at any alignment.
///
/// # Errors
/// [`ReadError::NotFloat`] or [`ReadError::ConversionLength`]: the caller mixed up tensors.
pub fn encode_f32(dtype: Dtype, values: &[f32], out: &mut [u8]) -> Result<(), ReadError> {
    check(dtype, out.len(), values.len())?;
    match dtype {
        Dtype::F32 => encode_loop(values, out, f32::to_le_bytes),
        Dtype::Bf16 => encode_loop(values, out, |v| bf16_bits(v).to_le_bytes()),
        Dtype::F16 => f16_encode(values.len(), out, |at, wide| {
            wide.copy_from_slice(&values[at..at + wide.len()]);
        }),
        Dtype::F64 => encode_loop(values, out, |v: f32| f64::from(v).to_le_bytes()),
        _ => return Err(ReadError::NotFloat { dtype }),
    }
    Ok(())
}

/// Encodes f64 values as stored elements, each rounded once, straight from f64.
///
/// - `out`: room for exactly `values.len()` elements of `dtype`, at any alignment.
///
/// # Errors
/// [`ReadError::NotFloat`] or [`ReadError::ConversionLength`]: the caller mixed up tensors.
pub fn encode_f64(dtype: Dtype, values: &[f64], out: &mut [u8]) -> Result<(), ReadError> {
    check(dtype, out.len(), values.len())?;
    match dtype {
        Dtype::F64 => encode_loop(values, out, f64::to_le_bytes),
        Dtype::F32 => encode_loop(values, out, |v: f64| (v as f32).to_le_bytes()),
        Dtype::Bf16 => encode_loop(values, out, |v| bf16_bits(round_to_odd(v)).to_le_bytes()),
        Dtype::F16 => f16_encode(values.len(), out, |at, wide| {
            let source = &values[at..at + wide.len()];
            dispatch(
                #[inline(always)]
                || {
                    for (narrow, value) in wide.iter_mut().zip(source) {
                        *narrow = round_to_odd(*value);
                    }
                },
            );
        }),
        _ => return Err(ReadError::NotFloat { dtype }),
    }
    Ok(())
}

/// The value of one stored integer or BOOL element; `None` for other dtypes or another number of bytes.
pub fn decode_integer(dtype: Dtype, element: &[u8]) -> Option<i128> {
    let signed = matches!(dtype, Dtype::I8 | Dtype::I16 | Dtype::I32 | Dtype::I64);
    if !dtype.is_copied() || element.len() as u64 * 8 != dtype.bits() {
        return None;
    }
    let negative = signed && element.last().is_some_and(|byte| byte & 0x80 != 0);
    let mut wide = [if negative { 0xff } else { 0 }; 16];
    wide[..element.len()].copy_from_slice(element);
    Some(i128::from_le_bytes(wide))
}

/// Index of the first NaN or infinity. Reads at memory speed while there is none.
pub fn first_nonfinite_f32(values: &[f32]) -> Option<usize> {
    const EXPONENT: u32 = 0x7f80_0000;
    first_in_chunks(values, |v| v.to_bits() & EXPONENT == EXPONENT)
}

/// Index of the first NaN or infinity. Reads at memory speed while there is none.
pub fn first_nonfinite_f64(values: &[f64]) -> Option<usize> {
    const EXPONENT: u64 = 0x7ff0_0000_0000_0000;
    first_in_chunks(values, |v| v.to_bits() & EXPONENT == EXPONENT)
}

/// Index of the first NaN or infinity among encoded values; `None` for dtypes that are no floats. Reads at memory speed
/// while there is none.
pub fn first_nonfinite(dtype: Dtype, bytes: &[u8]) -> Option<usize> {
    fn search<const SIZE: usize>(bytes: &[u8], exponent: u64) -> Option<usize> {
        let (elements, _) = bytes.as_chunks::<SIZE>();
        first_in_chunks(elements, |element| {
            let mut wide = [0; 8];
            wide[..SIZE].copy_from_slice(&element);
            u64::from_le_bytes(wide) & exponent == exponent
        })
    }
    match dtype {
        Dtype::F64 => search::<8>(bytes, 0x7ff0_0000_0000_0000),
        Dtype::F32 => search::<4>(bytes, 0x7f80_0000),
        Dtype::Bf16 => search::<2>(bytes, 0x7f80),
        Dtype::F16 => search::<2>(bytes, 0x7c00),
        _ => None,
    }
}

/// A search that leaves the loop only once a chunk, so that the loop over a chunk has no branches.
#[inline(always)]
fn first_in_chunks<T: Copy>(values: &[T], found: impl Fn(T) -> bool) -> Option<usize> {
    for (index, chunk) in values.chunks(CHUNK).enumerate() {
        let any = dispatch(
            #[inline(always)]
            || chunk.iter().fold(false, |any, v| any | found(*v)),
        );
        if any {
            return chunk.iter().position(|v| found(*v)).map(|at| index * CHUNK + at);
        }
    }
    None
}

#[cfg(test)]
mod tests;
