//! NearSwap, as mergekit 0.1.5: the closer the model is to the base at an element, the more of the model is taken.
//!
//! w = clamp(t / max(|θ₀ - θ₁|, 1e-6), 0, 1), then w·θ₁ + (1-w)·θ₀.

use super::{Arguments, BaseUse, Definition, Elementwise, Known, Piece};
use crate::config::{ParameterSpec, Range};
use crate::kernel::dispatch;

pub(super) static DEFINITION: Definition = Definition {
    name: "nearswap",
    base: BaseUse::Required,
    models: (1, 1),
    parameters: &[ParameterSpec::number("t", Range::Any).required()],
    build,
};

#[derive(Debug)]
struct NearSwap {
    t: f32,
}

fn build(arguments: &Arguments<'_>) -> Result<Box<dyn Elementwise>, String> {
    Ok(Box::new(NearSwap { t: arguments.required("t")? as f32 }))
}

impl Elementwise for NearSwap {
    fn merge(&self, piece: &mut Piece<'_>, _known: &Known, out: &mut [f32]) {
        let (t, base, model) = (self.t, piece.base(), piece.model(0));
        dispatch(
            #[inline(always)]
            || {
                for ((o, a), b) in out.iter_mut().zip(base).zip(model) {
                    let weight = (t / (*a - *b).abs().max(1e-6)).clamp(0.0, 1.0);
                    *o = weight * *b + (1.0 - weight) * *a;
                }
            },
        );
    }
}
