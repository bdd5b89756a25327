//! TIES (Yadav et al. 2023, arXiv:2306.01708): keep the largest, elect a sign, average what has it.
//!
//! `scope: tensor` is mergekit 0.1.5's: of each tensor and model the ⌊density·n⌋ largest (one at least; of equal ones the
//! first). `scope: model` is the paper's: one threshold a model over all tensors, and what equals it stays.

use super::combine::{
    Combine, DENSITY, INT8_MASK, LAMBDA, NORMALIZE, RESCALE, Rescale, WEIGHT, trimmed_factors,
};
use super::{Arguments, BaseUse, Counts, Definition, Elementwise, Kept, Known, Pass, Piece};
use crate::config::ParameterSpec;

/// `scope` of methods that know both.
pub(super) const SCOPE: ParameterSpec = ParameterSpec::word("scope", &["tensor", "model"]);

pub(super) static DEFINITION: Definition = Definition {
    name: "ties",
    base: BaseUse::Required,
    models: (1, usize::MAX),
    parameters: &[WEIGHT, DENSITY, NORMALIZE, RESCALE, LAMBDA, INT8_MASK, SCOPE],
    build,
};

#[derive(Debug)]
struct Ties {
    density: Vec<f64>,
    rescale: Rescale,
    whole_model: bool,
    combine: Combine,
}

fn build(arguments: &Arguments<'_>) -> Result<Box<dyn Elementwise>, String> {
    let rescale = Rescale::of_trim(arguments)?;
    let whole_model = arguments.word("scope", "tensor") == "model";
    if whole_model {
        arguments.expect_uniform("density")?;
    }
    Ok(Box::new(Ties {
        density: arguments.numbers("density", 1.0),
        rescale,
        whole_model,
        combine: Combine::of(arguments, true, true)?,
    }))
}

impl Elementwise for Ties {
    fn task_vectors(&self) -> bool {
        true
    }

    fn whole_model(&self) -> bool {
        self.whole_model
    }

    fn passes(&self) -> Vec<Pass> {
        self.rescale.trim_passes(&self.density)
    }

    fn by_magnitude(&self, _pass: usize) -> bool {
        true
    }

    fn kept(&self, _pass: usize, column: usize, counts: Counts) -> Kept {
        let density = self.density[column];
        if density >= 1.0 {
            return Kept::All;
        }
        if density <= 0.0 {
            return Kept::Nothing;
        }
        let take = ((density * counts.elements as f64) as u64).max(1);
        if self.whole_model { Kept::AtLeast { take } } else { Kept::FromLargest { skip: 0, take } }
    }

    fn merge(&self, piece: &mut Piece<'_>, known: &Known, out: &mut [f32]) {
        self.combine.merge(piece, &trimmed_factors(self.rescale, known, self.density.len()), out);
    }
}
