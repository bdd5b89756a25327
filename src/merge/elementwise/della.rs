//! DELLA (Deep et al. 2024, arXiv:2406.11617): drop values at random, the smaller ones of a row more often.
//!
//! A value of ascending rank r in [0, 1] within its row stays with probability (density - ε) + 2εr; of equal magnitudes the
//! first has the lower rank. Rows run along the last dimension; a vector is one row, and a row of one element stays with
//! probability density. Scaled as DARE, `inverse_probability` being each value's own.

use super::combine::{Combine, DENSITY, INT8_MASK, LAMBDA, NORMALIZE, RESCALE, Rescale, WEIGHT, add_norms};
use super::{Arguments, BaseUse, Definition, Elementwise, Known, Pass, Piece, Stream};
use crate::config::{ParameterSpec, Range};

const PARAMETERS: &[ParameterSpec] = &[
    WEIGHT,
    DENSITY,
    ParameterSpec::number("epsilon", Range::Unit).per_model(),
    NORMALIZE,
    RESCALE,
    LAMBDA,
    INT8_MASK,
];

pub(super) static LINEAR: Definition = Definition {
    name: "della_linear",
    base: BaseUse::Required,
    models: (1, usize::MAX),
    parameters: PARAMETERS,
    build: |arguments| build(arguments, false),
};

pub(super) static TIES: Definition = Definition {
    name: "della",
    base: BaseUse::Required,
    models: (1, usize::MAX),
    parameters: PARAMETERS,
    build: |arguments| build(arguments, true),
};

#[derive(Debug)]
struct Della {
    density: Vec<f64>,
    epsilon: Vec<f64>,
    streams: Vec<Stream>,
    rescale: Rescale,
    row_length: usize,
    combine: Combine,
}

fn build(arguments: &Arguments<'_>, consensus: bool) -> Result<Box<dyn Elementwise>, String> {
    let density = arguments.numbers("density", 1.0);
    let epsilon = arguments.numbers("epsilon", 0.15);
    for (density, epsilon) in density.iter().zip(&epsilon) {
        let partial = *density > 0.0 && *density < 1.0;
        if partial && (density + epsilon >= 1.0 || density - epsilon <= 0.0) {
            return Err(format!(
                "`density` ± `epsilon` must lie between 0 and 1 (got {density} ± {epsilon}); try a smaller `epsilon`"
            ));
        }
    }
    Ok(Box::new(Della {
        density,
        epsilon,
        streams: arguments.streams(),
        rescale: Rescale::of(arguments, true),
        row_length: arguments.row_length().max(1),
        combine: Combine::of(arguments, consensus, consensus)?,
    }))
}

impl Della {
    /// Sets what is dropped to 0; with `inverse`, divides what stays by its probability.
    fn thin(&self, piece: &mut Piece<'_>, inverse: bool) {
        let first = piece.first();
        let mut order: Vec<u64> = Vec::with_capacity(self.row_length);
        for i in 0..self.density.len() {
            let (density, epsilon, stream) = (self.density[i], self.epsilon[i], &self.streams[i]);
            if density >= 1.0 {
                continue;
            }
            if density <= 0.0 {
                piece.model_mut(i).fill(0.0);
                continue;
            }
            for (r, row) in piece.model_mut(i).chunks_mut(self.row_length).enumerate() {
                order.clear();
                order.extend(
                    row.iter().enumerate().map(|(k, v)| u64::from(v.abs().to_bits()) << 32 | k as u64),
                );
                order.sort_unstable();
                let last = row.len().saturating_sub(1);
                for (rank, entry) in order.iter().enumerate() {
                    let k = (*entry & 0xffff_ffff) as usize;
                    let place = if last == 0 { 0.5 } else { rank as f64 / last as f64 };
                    let probability = (density - epsilon) + place * 2.0 * epsilon;
                    if !stream.keeps((first + r * self.row_length + k) as u64, probability) {
                        row[k] = 0.0;
                    } else if inverse {
                        row[k] = (f64::from(row[k]) / probability) as f32;
                    }
                }
            }
        }
    }
}

impl Elementwise for Della {
    fn task_vectors(&self) -> bool {
        true
    }

    fn row_length(&self) -> Option<usize> {
        Some(self.row_length)
    }

    fn passes(&self) -> Vec<Pass> {
        self.rescale.drop_passes(&self.density)
    }

    fn sums(&self, _pass: usize, piece: &mut Piece<'_>, _known: &Known, sums: &mut [f64]) {
        add_norms(piece, sums, 0);
        self.thin(piece, false);
        add_norms(piece, sums, self.density.len());
    }

    fn merge(&self, piece: &mut Piece<'_>, known: &Known, out: &mut [f32]) {
        let (before, after) = known.sums(0).split_at(known.sums(0).len() / 2);
        let factors = self.rescale.factors(before, after, self.density.len());
        self.thin(piece, self.rescale == Rescale::InverseProbability);
        self.combine.merge(piece, &factors, out);
    }
}
