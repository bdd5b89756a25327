//! Dtypes that a vector loop reads and writes without a table: an f32, or the upper half of one.

use crate::read::Dtype;
use crate::read::dtype::bf16_bits;

/// Whether loops over [`Stored`] take values of this dtype.
pub(super) fn takes(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::Bf16 | Dtype::F32)
}

/// The bits of a magnitude: those of NaN and infinities are the greatest, so that the maximum of a loop says whether it met
/// one, without a branch or a mask.
#[inline(always)]
pub(super) fn magnitude(bits: u32) -> u32 {
    bits & 0x7fff_ffff
}

/// Whether the greatest magnitude is a NaN or an infinity.
pub(super) fn is_odd(most: u32) -> bool {
    most >= 0x7f80_0000
}

/// A dtype whose values are the upper bits of an f32.
pub(super) trait Stored {
    type Element: Copy;
    fn elements(bytes: &[u8]) -> &[Self::Element];
    fn elements_mut(bytes: &mut [u8]) -> &mut [Self::Element];
    /// Bits of the f32.
    fn decode(element: Self::Element) -> u32;
    fn encode(value: f32) -> Self::Element;
}

pub(super) struct Bf16;
pub(super) struct F32;

impl Stored for Bf16 {
    type Element = [u8; 2];
    fn elements(bytes: &[u8]) -> &[[u8; 2]] {
        bytes.as_chunks().0
    }
    fn elements_mut(bytes: &mut [u8]) -> &mut [[u8; 2]] {
        bytes.as_chunks_mut().0
    }
    #[inline(always)]
    fn decode(element: [u8; 2]) -> u32 {
        u32::from(u16::from_le_bytes(element)) << 16
    }
    #[inline(always)]
    fn encode(value: f32) -> [u8; 2] {
        bf16_bits(value).to_le_bytes()
    }
}

impl Stored for F32 {
    type Element = [u8; 4];
    fn elements(bytes: &[u8]) -> &[[u8; 4]] {
        bytes.as_chunks().0
    }
    fn elements_mut(bytes: &mut [u8]) -> &mut [[u8; 4]] {
        bytes.as_chunks_mut().0
    }
    #[inline(always)]
    fn decode(element: [u8; 4]) -> u32 {
        u32::from_le_bytes(element)
    }
    #[inline(always)]
    fn encode(value: f32) -> [u8; 4] {
        value.to_le_bytes()
    }
}
