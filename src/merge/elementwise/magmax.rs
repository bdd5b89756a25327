//! MagMax (Marczak et al. 2024, arXiv:2407.06322): at each element the task vector that is largest there.
//!
//! θ₀ + λ·τ with τ of the greatest magnitude; of equal ones the first model's.

use super::combine::LAMBDA;
use super::{Arguments, BaseUse, Definition, Elementwise, Known, Piece};
use crate::kernel::dispatch;

pub(super) static DEFINITION: Definition = Definition {
    name: "magmax",
    base: BaseUse::Required,
    models: (1, usize::MAX),
    parameters: &[LAMBDA],
    build,
};

#[derive(Debug)]
struct MagMax {
    lambda: f32,
}

fn build(arguments: &Arguments<'_>) -> Result<Box<dyn Elementwise>, String> {
    Ok(Box::new(MagMax { lambda: arguments.number("lambda", 1.0) as f32 }))
}

impl Elementwise for MagMax {
    fn task_vectors(&self) -> bool {
        true
    }

    fn merge(&self, piece: &mut Piece<'_>, _known: &Known, out: &mut [f32]) {
        out.copy_from_slice(piece.model(0));
        for i in 1..piece.models() {
            let values = piece.model(i);
            dispatch(
                #[inline(always)]
                || {
                    for (o, d) in out.iter_mut().zip(values) {
                        *o = if d.abs() > o.abs() { *d } else { *o };
                    }
                },
            );
        }
        for (o, b) in out.iter_mut().zip(piece.base()) {
            *o = *b + self.lambda * *o;
        }
    }
}
