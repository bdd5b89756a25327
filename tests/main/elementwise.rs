//! Elementwise methods: each against its formula in plain f64, random ones by their statistics, and all of them byte for
//! byte over whatever must not matter.

mod formulas;
mod masks;
mod oracle;
mod random;
mod same;
mod sampled;
pub mod spectral;

use crate::util::{Random, Scratch, Tensor};

/// Name and shape: one piece, several pieces, a vector, one element, three dimensions, a tensor nobody changed.
pub const TENSORS: [(&str, &[usize]); 6] = [
    ("layers.0.small.weight", &[37, 53]),
    ("layers.1.large.weight", &[301, 211]),
    ("layers.1.norm.weight", &[19]),
    ("scale", &[1]),
    ("layers.0.conv.weight", &[5, 3, 4]),
    ("layers.1.still.weight", &[6, 10]),
];

/// A base and three models of it.
pub struct World {
    pub scratch: Scratch,
    pub base: Vec<Tensor>,
    pub models: Vec<Vec<Tensor>>,
}

impl World {
    pub fn new(dtype: &'static str, seed: u64) -> Self {
        let mut random = Random::new(seed);
        let scratch = Scratch::new();
        let base: Vec<Tensor> =
            TENSORS.iter().map(|(name, shape)| Tensor::random(name, dtype, shape, &mut random)).collect();
        scratch.sharded_model("base", &base, 2);
        let mut models = Vec::new();
        for k in 0..3 {
            let tensors: Vec<Tensor> = base
                .iter()
                .map(|tensor| {
                    if tensor.name.contains("still") {
                        return tensor.clone();
                    }
                    // Differences of about a quarter, one in ten exactly 0.
                    let values: Vec<f64> = tensor
                        .values()
                        .iter()
                        .map(|v| if random.uniform() < -0.8 { *v } else { v + random.uniform() / 4.0 })
                        .collect();
                    Tensor::new(&tensor.name, dtype, &tensor.shape, &values)
                })
                .collect();
            scratch.model(&format!("m{k}"), &tensors);
            models.push(tensors);
        }
        Self { scratch, base, models }
    }

    /// A config of the first `count` models, `parameters` one each.
    pub fn config(head: &str, parameters: &[&str]) -> String {
        let mut text = format!("{head}\nmodels:\n");
        for (k, parameters) in parameters.iter().enumerate() {
            text += &format!("  - model: m{k}\n");
            if !parameters.is_empty() {
                text += &format!("    parameters: {{ {parameters} }}\n");
            }
        }
        text
    }

    /// Base and models' values of one tensor.
    pub fn values(&self, name: &str) -> (Vec<f64>, Vec<Vec<f64>>) {
        let find = |tensors: &[Tensor]| tensors.iter().find(|t| t.name == name).expect("a tensor").values();
        (find(&self.base), self.models.iter().map(|m| find(m)).collect())
    }
}
