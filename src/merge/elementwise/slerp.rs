//! Spherical interpolation of two tensors, each taken as one vector, as mergekit 0.1.5.
//!
//! With θ the angle between base and model: sin((1-t)θ)/sin θ · θ₀ + sin(tθ)/sin θ · θ₁; linear where |cos θ| > 0.9995. A
//! norm of 1e-8 or less is not divided by.

use super::{Arguments, BaseUse, Definition, Elementwise, Gram, Known, Pass};
use crate::config::{ParameterSpec, Range};

const LINEAR_FROM: f64 = 0.9995;
const LEAST_NORM: f64 = 1e-8;

pub(super) static DEFINITION: Definition = Definition {
    name: "slerp",
    base: BaseUse::Model,
    models: (2, 2),
    parameters: &[ParameterSpec::number("t", Range::Any).required()],
    build,
};

#[derive(Debug)]
struct Slerp {
    t: f64,
    /// Which of the two is the base.
    base: usize,
}

fn build(arguments: &Arguments<'_>) -> Result<Box<dyn Elementwise>, String> {
    let base = arguments.base_model().ok_or("`slerp` needs `base_model`, where `t` is 0")?;
    Ok(Box::new(Slerp { t: arguments.required("t")?, base }))
}

impl Elementwise for Slerp {
    fn passes(&self) -> Vec<Pass> {
        vec![Pass::Gram]
    }

    fn coefficients(&self, known: &Known) -> Option<Vec<f64>> {
        let gram = Gram::new(2, known.sums(0));
        let norm = |i| if gram.norm(i) > LEAST_NORM { gram.norm(i) } else { 1.0 };
        let cosine = (gram.product(0, 1) / (norm(0) * norm(1))).clamp(-1.0, 1.0);
        let [a, b] = if cosine.abs() > LINEAR_FROM {
            [1.0 - self.t, self.t]
        } else {
            let theta = cosine.acos();
            [((1.0 - self.t) * theta).sin() / theta.sin(), (self.t * theta).sin() / theta.sin()]
        };
        Some(if self.base == 0 { vec![a, b] } else { vec![b, a] })
    }
}
