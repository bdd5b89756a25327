//! Dtypes that a vector loop reads and writes without a table: an f32, or the upper half of one.

use crate::read::dtype::{bf16_as_f32, bf16_bits_of_finite};

/// A dtype whose values are the upper bits of an f32 ([`Dtype::is_upper_f32`](crate::read::Dtype::is_upper_f32)).
pub(super) trait Stored {
    /// Its bytes, at any address.
    type Element: bytemuck::Pod;
    fn decode(element: Self::Element) -> f32;
    /// Rounded to nearest, ties to even. Of finite values.
    fn encode(value: f32) -> Self::Element;
    /// Bits of the least f32 that is stored as an infinity: magnitudes from there on are not finite, or will not be.
    const LEAST_ODD: u32;

    /// Of whole elements.
    fn elements(bytes: &[u8]) -> &[Self::Element] {
        bytemuck::cast_slice(bytes)
    }

    /// The same to be written.
    fn elements_mut(bytes: &mut [u8]) -> &mut [Self::Element] {
        bytemuck::cast_slice_mut(bytes)
    }
}

pub(super) struct Bf16;
pub(super) struct F32;

impl Stored for Bf16 {
    type Element = [u8; 2];
    const LEAST_ODD: u32 = 0x7f7f_8000;
    #[inline(always)]
    fn decode(element: [u8; 2]) -> f32 {
        f32::from_bits(bf16_as_f32(element))
    }
    #[inline(always)]
    fn encode(value: f32) -> [u8; 2] {
        bf16_bits_of_finite(value).to_le_bytes()
    }
}

impl Stored for F32 {
    type Element = [u8; 4];
    const LEAST_ODD: u32 = 0x7f80_0000;
    #[inline(always)]
    fn decode(element: [u8; 4]) -> f32 {
        f32::from_le_bytes(element)
    }
    #[inline(always)]
    fn encode(value: f32) -> [u8; 4] {
        value.to_le_bytes()
    }
}
