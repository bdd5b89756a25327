//! Dtypes that a vector loop reads and writes without a table: an f32, or the upper half of one.

use crate::read::Dtype;
use crate::read::dtype::bf16_bits_of_finite;

/// Whether loops over [`Stored`] take values of this dtype.
pub(super) fn takes(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::Bf16 | Dtype::F32)
}

/// A dtype whose values are the upper bits of an f32.
pub(super) trait Stored {
    type Element: Copy;
    fn elements(bytes: &[u8]) -> &[Self::Element];
    fn elements_mut(bytes: &mut [u8]) -> &mut [Self::Element];
    fn decode(element: Self::Element) -> f32;
    /// Rounded to nearest, ties to even. Of finite values.
    fn encode(value: f32) -> Self::Element;
    /// Bits of the least f32 that is stored as an infinity: magnitudes from there on are not finite, or will not be.
    const LEAST_ODD: u32;
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
    fn decode(element: [u8; 2]) -> f32 {
        f32::from_bits(u32::from(u16::from_le_bytes(element)) << 16)
    }
    #[inline(always)]
    fn encode(value: f32) -> [u8; 2] {
        bf16_bits_of_finite(value).to_le_bytes()
    }
    const LEAST_ODD: u32 = 0x7f7f_8000;
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
    fn decode(element: [u8; 4]) -> f32 {
        f32::from_le_bytes(element)
    }
    #[inline(always)]
    fn encode(value: f32) -> [u8; 4] {
        value.to_le_bytes()
    }
    const LEAST_ODD: u32 = 0x7f80_0000;
}
