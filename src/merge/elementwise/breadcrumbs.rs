//! Model Breadcrumbs (Davari, Belilovsky 2023, arXiv:2312.06795): drop the largest and the smallest of each tensor.
//!
//! As mergekit 0.1.5: of n values the ⌊γ·n⌋ largest go and ⌊density·n⌋ stay; fewer large ones go where that would not
//! leave enough. A density of 1 drops nothing.

use super::combine::{
    Combine, DENSITY, INT8_MASK, LAMBDA, NORMALIZE, RESCALE, Rescale, WEIGHT, trimmed_factors,
};
use super::{Arguments, BaseUse, Counts, Definition, Elementwise, Kept, Known, Pass, Piece};
use crate::config::{ParameterSpec, Range};

const PARAMETERS: &[ParameterSpec] = &[
    WEIGHT,
    DENSITY,
    ParameterSpec::number("gamma", Range::Unit).per_model(),
    NORMALIZE,
    RESCALE,
    LAMBDA,
    INT8_MASK,
];

pub(super) static LINEAR: Definition = Definition {
    name: "breadcrumbs",
    base: BaseUse::Required,
    models: (1, usize::MAX),
    parameters: PARAMETERS,
    build: |arguments| build(arguments, false),
};

pub(super) static TIES: Definition = Definition {
    name: "breadcrumbs_ties",
    base: BaseUse::Required,
    models: (1, usize::MAX),
    parameters: PARAMETERS,
    build: |arguments| build(arguments, true),
};

#[derive(Debug)]
struct Breadcrumbs {
    density: Vec<f64>,
    gamma: Vec<f64>,
    rescale: Rescale,
    combine: Combine,
}

fn build(arguments: &Arguments<'_>, consensus: bool) -> Result<Box<dyn Elementwise>, String> {
    let rescale = Rescale::of_trim(arguments)?;
    Ok(Box::new(Breadcrumbs {
        density: arguments.numbers("density", 1.0),
        gamma: arguments.numbers("gamma", 0.01),
        rescale,
        combine: Combine::of(arguments, consensus, false)?,
    }))
}

impl Elementwise for Breadcrumbs {
    fn task_vectors(&self) -> bool {
        true
    }

    fn passes(&self) -> Vec<Pass> {
        self.rescale.trim_passes(&self.density)
    }

    fn by_magnitude(&self, _pass: usize) -> bool {
        true
    }

    fn kept(&self, _pass: usize, column: usize, counts: Counts) -> Kept {
        if self.density[column] >= 1.0 {
            return Kept::All;
        }
        let n = counts.elements;
        let take = (self.density[column] * n as f64) as u64;
        let top = (self.gamma[column] * n as f64) as u64;
        Kept::FromSmallest { skip: n.saturating_sub(take).saturating_sub(top), take }
    }

    fn merge(&self, piece: &mut Piece<'_>, known: &Known, out: &mut [f32]) {
        self.combine.merge(piece, &trimmed_factors(self.rescale, known, self.density.len()), out);
    }
}
