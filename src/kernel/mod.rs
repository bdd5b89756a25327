//! Dense kernels on row-major buffers: memory, matrix products, reductions.
//!
//! Owns every choice that decides the bits of a result: the order and the panels of a product's sums, the tree of a
//! long sum. They depend on shapes alone, never on the number of threads, on the memory budget, on how a factor is
//! stored or on the vector unit, so a merge gives the same bytes however it is run. Called by `operator`,
//! `precond`, `solve` and `merge`; knows nothing of files.

mod buffer;
mod gemm;
#[allow(unsafe_code, reason = "vector intrinsics; each block says why it is sound")]
mod micro;
#[allow(unsafe_code, reason = "vector intrinsics; each block says why it is sound")]
pub(crate) mod ranked;
pub mod vector;
#[allow(unsafe_code, reason = "one call of a function compiled for a vector unit that was found")]
mod wide;

pub use buffer::{Buffer, OutOfMemory};
pub use gemm::{Threading, gemm, gemm_lower, mat, mat_mut, sandwich, sandwich_scratch, transpose};
pub(crate) use wide::dispatch;

use crate::read::dtype::{self, Dtype};

/// Length of a panel along the inner dimension of a product, and rows of a tile that streams through one.
///
/// Part of the bits of a result: each panel of a sum is added up on its own. 512 rows of eight strips of f32 fill 768 KiB
/// of a second-level cache, and a streamed panel of an 11008-wide factor takes 22 MiB.
pub const PANEL: usize = 512;

/// The solver's scalar: `f32` (storage of the CG vectors) or `f64` (direct solves, oracles).
pub trait Real:
    Copy
    + Send
    + Sync
    + Default
    + PartialOrd
    + std::fmt::Debug
    + bytemuck::Pod
    + faer::traits::RealField
    + micro::Micro
    + 'static
{
    /// Bytes of one value.
    const BYTES: usize = size_of::<Self>();
    /// Rounds to nearest.
    fn from_f64(value: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
    /// Decodes stored values, rounding to nearest where `Self` is narrower.
    fn decode(dtype: Dtype, bytes: &[u8], out: &mut [Self]);
    /// The same, and says whether all values are finite.
    fn decode_finite(dtype: Dtype, bytes: &[u8], out: &mut [Self]) -> bool {
        Self::decode(dtype, bytes, out);
        Self::first_nonfinite(out).is_none()
    }
    /// Encodes into a stored dtype with one rounding.
    fn encode(dtype: Dtype, values: &[Self], out: &mut [u8]);
    /// Index of the first NaN or infinity.
    fn first_nonfinite(values: &[Self]) -> Option<usize>;
}

impl Real for f32 {
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value as f32
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    fn decode(dtype: Dtype, bytes: &[u8], out: &mut [Self]) {
        dtype::decode_f32(dtype, bytes, out)
            .expect("float dtypes and matching lengths are checked when the plan is made");
    }
    fn decode_finite(dtype: Dtype, bytes: &[u8], out: &mut [Self]) -> bool {
        dtype::decode_finite_f32(dtype, bytes, out)
            .expect("float dtypes and matching lengths are checked when the plan is made")
    }
    fn encode(dtype: Dtype, values: &[Self], out: &mut [u8]) {
        dtype::encode_f32(dtype, values, out)
            .expect("float dtypes and matching lengths are checked when the plan is made");
    }
    fn first_nonfinite(values: &[Self]) -> Option<usize> {
        dtype::first_nonfinite_f32(values)
    }
}

impl Real for f64 {
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    fn decode(dtype: Dtype, bytes: &[u8], out: &mut [Self]) {
        dtype::decode_f64(dtype, bytes, out)
            .expect("float dtypes and matching lengths are checked when the plan is made");
    }
    fn encode(dtype: Dtype, values: &[Self], out: &mut [u8]) {
        dtype::encode_f64(dtype, values, out)
            .expect("float dtypes and matching lengths are checked when the plan is made");
    }
    fn first_nonfinite(values: &[Self]) -> Option<usize> {
        dtype::first_nonfinite_f64(values)
    }
}

/// Cuts `0..len` into ranges of [`PANEL`]; the last may be shorter.
pub fn panels(
    len: usize,
) -> impl DoubleEndedIterator<Item = std::ops::Range<usize>> + ExactSizeIterator + Clone {
    (0..len.div_ceil(PANEL)).map(move |k| k * PANEL..((k + 1) * PANEL).min(len))
}
