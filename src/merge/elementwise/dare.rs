//! DARE (Yu et al. 2023, arXiv:2311.03099): drop values of the task vectors at random and scale the rest up.
//!
//! `rescale: true` (or `l1`) is mergekit 0.1.5's: to the tensor's L1 norm before. `rescale: inverse_probability` is the
//! paper's: by 1/density. The masks are this crate's own: a function of seed, model, tensor and element.

use super::combine::{Combine, DENSITY, INT8_MASK, LAMBDA, NORMALIZE, RESCALE, Rescale, WEIGHT, add_norms};
use super::{Arguments, BaseUse, Definition, Elementwise, Known, Pass, Piece, Stream};
use crate::config::ParameterSpec;

const PARAMETERS: &[ParameterSpec] = &[WEIGHT, DENSITY, NORMALIZE, RESCALE, LAMBDA, INT8_MASK];

pub(super) static LINEAR: Definition = Definition {
    name: "dare_linear",
    base: BaseUse::Required,
    models: (1, usize::MAX),
    parameters: PARAMETERS,
    build: |arguments| build(arguments, false),
};

pub(super) static TIES: Definition = Definition {
    name: "dare_ties",
    base: BaseUse::Required,
    models: (1, usize::MAX),
    parameters: PARAMETERS,
    build: |arguments| build(arguments, true),
};

#[derive(Debug)]
struct Dare {
    density: Vec<f64>,
    streams: Vec<Stream>,
    rescale: Rescale,
    combine: Combine,
}

fn build(arguments: &Arguments<'_>, consensus: bool) -> Result<Box<dyn Elementwise>, String> {
    Ok(Box::new(Dare {
        density: arguments.numbers("density", 1.0),
        streams: arguments.streams(),
        rescale: Rescale::of(arguments, true),
        combine: Combine::of(arguments, consensus, false)?,
    }))
}

impl Dare {
    /// Sets what is dropped to 0.
    fn thin(&self, piece: &mut Piece<'_>) {
        let first = piece.first() as u64;
        for (i, (density, stream)) in self.density.iter().zip(&self.streams).enumerate() {
            if *density >= 1.0 {
                continue;
            }
            stream.thin(first, *density, piece.model_mut(i));
        }
    }
}

impl Elementwise for Dare {
    fn task_vectors(&self) -> bool {
        true
    }

    fn passes(&self) -> Vec<Pass> {
        self.rescale.drop_passes(&self.density)
    }

    fn sums(&self, _pass: usize, piece: &mut Piece<'_>, _known: &Known, sums: &mut [f64]) {
        add_norms(piece, sums, 0);
        self.thin(piece);
        add_norms(piece, sums, self.density.len());
    }

    fn merge(&self, piece: &mut Piece<'_>, known: &Known, out: &mut [f32]) {
        let models = self.density.len();
        let factors = match self.rescale {
            Rescale::InverseProbability => {
                self.density.iter().map(|d| if *d > 0.0 { (1.0 / d) as f32 } else { 1.0 }).collect()
            }
            _ => {
                let (before, after) = known.sums(0).split_at(known.sums(0).len() / 2);
                self.rescale.factors(before, after, models)
            }
        };
        self.thin(piece);
        self.combine.merge(piece, &factors, out);
    }
}
