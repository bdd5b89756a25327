//! Reinforced Agent Merging (arXiv:2601.13572), as mergekit 0.1.5: what one model alone changed is added whole, what several
//! changed is averaged over them.
//!
//! A value is changed where |τ| > ε. `ramplus_tl` scales what model i alone changed by 1 + r·clamp(sharedᵢ/aloneᵢ, 0, α),
//! counted over each tensor.

use super::{Arguments, BaseUse, Definition, Elementwise, Known, Pass, Piece};
use crate::config::{ParameterSpec, Range};

const EPSILON: ParameterSpec = ParameterSpec::number("epsilon", Range::NonNegative);

pub(super) static RAM: Definition = Definition {
    name: "ram",
    base: BaseUse::Required,
    models: (1, usize::MAX),
    parameters: &[EPSILON],
    build: |arguments| Ok(Box::new(Ram::new(arguments, None))),
};

pub(super) static RAM_PLUS: Definition = Definition {
    name: "ramplus_tl",
    base: BaseUse::Required,
    models: (1, usize::MAX),
    parameters: &[
        EPSILON,
        ParameterSpec::number("r", Range::Any),
        ParameterSpec::number("alpha", Range::NonNegative),
    ],
    build: |arguments| {
        let plus = [arguments.number("r", 0.1), arguments.number("alpha", 0.2)];
        Ok(Box::new(Ram::new(arguments, Some(plus))))
    },
};

#[derive(Debug)]
struct Ram {
    models: usize,
    epsilon: f64,
    /// r and α.
    plus: Option<[f64; 2]>,
}

impl Ram {
    fn new(arguments: &Arguments<'_>, plus: Option<[f64; 2]>) -> Self {
        Self { models: arguments.models(), epsilon: arguments.number("epsilon", 1e-5), plus }
    }

    /// Whether model i changed element k.
    fn changed(&self, piece: &Piece<'_>, i: usize, k: usize) -> bool {
        piece.model(i)[k].abs() > self.epsilon as f32
    }

    fn changes(&self, piece: &Piece<'_>, k: usize) -> usize {
        (0..self.models).filter(|i| self.changed(piece, *i, k)).count()
    }
}

impl Elementwise for Ram {
    fn task_vectors(&self) -> bool {
        true
    }

    fn passes(&self) -> Vec<Pass> {
        if self.plus.is_some() { vec![Pass::Sums { count: 2 * self.models }] } else { Vec::new() }
    }

    fn sums(&self, _pass: usize, piece: &mut Piece<'_>, _known: &Known, sums: &mut [f64]) {
        for k in 0..piece.len() {
            let alone = self.changes(piece, k) == 1;
            for i in 0..self.models {
                if self.changed(piece, i, k) {
                    sums[2 * i + usize::from(alone)] += 1.0;
                }
            }
        }
    }

    fn merge(&self, piece: &mut Piece<'_>, known: &Known, out: &mut [f32]) {
        let factors: Vec<f32> = (0..self.models)
            .map(|i| match self.plus {
                None => 1.0,
                Some([r, alpha]) => {
                    let [shared, alone] = [known.sums(0)[2 * i], known.sums(0)[2 * i + 1]];
                    // mergekit's floor under the count: ε, so that nothing alone gives the largest factor.
                    (1.0 + r * (shared / alone.max(self.epsilon.max(f64::MIN_POSITIVE))).clamp(0.0, alpha))
                        as f32
                }
            })
            .collect();
        for (k, o) in out.iter_mut().enumerate() {
            let count = self.changes(piece, k);
            let mut sum = 0.0f32;
            for (i, factor) in factors.iter().enumerate() {
                if self.changed(piece, i, k) {
                    let value = piece.model(i)[k];
                    sum += if count == 1 { value * *factor } else { value / count as f32 };
                }
            }
            *o = piece.base()[k] + sum;
        }
    }
}
