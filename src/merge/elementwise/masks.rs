//! What a method keeps of every task beside the merged model, so that each task's own model can be made of it again: one
//! bit an element that says whether the merged task vector counts for the task, and the sums its rescaler is made of.
//!
//! A method that keeps them implements [`TaskMasks`]; `stream` writes what [`TaskMasks::record`] gives while the piece is
//! merged, into the file that [`crate::masks`] describes. [`Masked`] makes one task's model of it.

use super::{Elementwise, Known, MethodStart, Piece};
use crate::masks::Rescaler;
use crate::merge::SourceId;

/// Masks of every task, made piece by piece along with the merge.
///
/// Rows must not be asked for ([`Elementwise::row_length`]): pieces then begin at multiples of 8 elements.
pub trait TaskMasks: Sync {
    /// Of what a task's model is scaled by.
    fn rescaler(&self) -> Rescaler;

    /// Marks one piece. `bits` holds `len.div_ceil(8)` zeroed bytes a task, task after task; element k is bit `k % 8`
    /// (from the lowest) of byte `k / 8`. With a rescaler, adds to `norms` `Σ|τₜ|` of every task, then `Σ|mₜ∘τ|` of every
    /// task, τ being the merged task vector.
    fn record(&self, piece: &Piece<'_>, bits: &mut [u8], norms: &mut [f64]);
}

/// Sets the bit of element `k`.
pub(super) fn set(bits: &mut [u8], k: usize) {
    bits[k / 8] |= 1 << (k % 8);
}

/// `θ₀ + mₜ∘(θ - θ₀)`, of the merged model θ and the mask mₜ, which is 0 or the task's rescaler: two models and a base.
#[derive(Debug)]
pub struct Masked;

impl Masked {
    /// The model of one task.
    pub fn start(name: &'static str, base: SourceId, merged: SourceId, mask: SourceId) -> MethodStart {
        MethodStart { name, base: Some(base), models: vec![merged, mask], method: std::sync::Arc::new(Self) }
    }
}

impl Elementwise for Masked {
    fn merge(&self, piece: &mut Piece<'_>, _known: &Known, out: &mut [f32]) {
        let models = piece.model(0).iter().zip(piece.model(1));
        for ((o, base), (merged, mask)) in out.iter_mut().zip(piece.base()).zip(models) {
            // Not multiplied by 0: what is not finite stays away from tasks that it is masked for.
            *o = if *mask == 0.0 { *base } else { *base + *mask * (*merged - *base) };
        }
    }
}
