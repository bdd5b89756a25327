//! The sum of task vectors that most methods end in: weighted, with or without TIES' election of signs.

use std::ops::Range;

use super::{Arguments, Known, Pass, Piece};
use crate::config::{ParameterSpec, Range as Allowed};
use crate::kernel::{Threading, dispatch, vector};

/// What all of these methods take.
pub(super) const WEIGHT: ParameterSpec = ParameterSpec::number("weight", Allowed::Any).per_model().required();
pub(super) const DENSITY: ParameterSpec = ParameterSpec::number("density", Allowed::Unit).per_model();
pub(super) const NORMALIZE: ParameterSpec = ParameterSpec::boolean("normalize");
pub(super) const LAMBDA: ParameterSpec = ParameterSpec::number("lambda", Allowed::Any);
/// mergekit's dtype of masks: no mask is stored here.
pub(super) const INT8_MASK: ParameterSpec = ParameterSpec::boolean("int8_mask");
pub(super) const RESCALE: ParameterSpec =
    ParameterSpec::word("rescale", &["false", "true", "l1", "inverse_probability"]);

/// Elements worked on at a time.
const CHUNK: usize = 512;
/// Elements whose election stays in registers.
const GROUP: usize = 64;
/// L1 norms below this are not divided by.
const LEAST_NORM: f64 = 1e-7;

/// How what is left of a thinned task vector is scaled up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rescale {
    /// Not at all.
    None,
    /// To the L1 norm of the whole vector (mergekit's `true`).
    L1,
    /// By the inverse of each element's probability to stay (the papers').
    InverseProbability,
}

impl Rescale {
    pub(super) fn of(arguments: &Arguments<'_>, default: bool) -> Self {
        match arguments.word("rescale", if default { "true" } else { "false" }) {
            "true" | "l1" => Self::L1,
            "inverse_probability" => Self::InverseProbability,
            _ => Self::None,
        }
    }

    /// Of methods that drop by magnitude, where no value has a probability to stay.
    ///
    /// # Errors
    /// `inverse_probability`.
    pub(super) fn of_trim(arguments: &Arguments<'_>) -> Result<Self, String> {
        match Self::of(arguments, false) {
            Self::InverseProbability => {
                Err("`rescale: inverse_probability` needs a method that drops at random (dare, della)"
                    .to_owned())
            }
            rescale => Ok(rescale),
        }
    }

    /// The passes of methods that drop at random: both norms of each model at once.
    pub(super) fn drop_passes(self, density: &[f64]) -> Vec<Pass> {
        if self == Self::L1 && density.iter().any(|d| *d < 1.0) {
            vec![Pass::Sums { count: 2 * density.len() }]
        } else {
            Vec::new()
        }
    }

    /// The pass of methods that trim.
    pub(super) fn trim_passes(self, density: &[f64]) -> Vec<Pass> {
        if density.iter().all(|d| *d >= 1.0) {
            return Vec::new();
        }
        vec![Pass::Trim { columns: density.len(), norms: self == Self::L1 }]
    }

    /// Factors from L1 norms before and after, one of each a model.
    pub(super) fn factors(self, before: &[f64], after: &[f64], models: usize) -> Vec<f32> {
        (0..models)
            .map(|i| match (self, before.get(i), after.get(i)) {
                (Self::L1, Some(before), Some(after)) if *before >= LEAST_NORM && *after >= LEAST_NORM => {
                    (before / after) as f32
                }
                _ => 1.0,
            })
            .collect()
    }
}

/// `base + λ · Σ wᵢ dᵢ [/ Σ wᵢ]`, over all models or, with `consensus`, over those whose weighted value has the sign of the
/// weighted sum (0 counts as positive, a value of 0 agrees with nobody).
#[derive(Debug, Clone)]
pub struct Combine {
    weights: Vec<f32>,
    consensus: bool,
    normalize: bool,
    lambda: f32,
}

impl Combine {
    /// From `weight`, `normalize` and `lambda`.
    ///
    /// # Errors
    /// A weight that is not there, or weights that sum to 0 where the sum divides.
    pub fn of(arguments: &Arguments<'_>, consensus: bool, normalize: bool) -> Result<Self, String> {
        let weights = arguments.required_numbers("weight")?;
        let normalize = arguments.boolean("normalize", normalize);
        let (sum, size) = (weights.iter().sum::<f64>(), weights.iter().map(|w| w.abs()).sum::<f64>());
        if normalize && !consensus && sum.abs() <= 1e-12 * size {
            return Err(format!(
                "the weights {weights:?} sum to 0, and their sum divides (`normalize: false` sums)"
            ));
        }
        let lambda = arguments.number("lambda", 1.0) as f32;
        Ok(Self { weights: weights.into_iter().map(|w| w as f32).collect(), consensus, normalize, lambda })
    }

    /// Merges task vectors times `factors`, one a model.
    pub fn merge(&self, piece: &Piece<'_>, factors: &[f32], out: &mut [f32]) {
        for first in (0..out.len()).step_by(CHUNK) {
            let end = (first + CHUNK).min(out.len());
            let base = &piece.base()[first..end];
            let out = &mut out[first..end];
            dispatch(
                #[inline(always)]
                || {
                    if self.consensus {
                        self.elect(piece, factors, first..end, base, out);
                    } else {
                        self.add(piece, factors, first..end, base, out);
                    }
                },
            );
        }
    }

    /// `Σ wᵢ fᵢ dᵢ` of at most a chunk.
    #[inline(always)]
    fn add_weighted(&self, piece: &Piece<'_>, factors: &[f32], range: &Range<usize>, sum: &mut [f32]) {
        for (i, (weight, factor)) in self.weights.iter().zip(factors).enumerate() {
            for (s, d) in sum.iter_mut().zip(&piece.model(i)[range.clone()]) {
                *s += (*d * *factor) * *weight;
            }
        }
    }

    #[inline(always)]
    fn add(&self, piece: &Piece<'_>, factors: &[f32], range: Range<usize>, base: &[f32], out: &mut [f32]) {
        out.fill(0.0);
        self.add_weighted(piece, factors, &range, out);
        let divisor = if self.normalize { self.weights.iter().sum() } else { 1.0f32 };
        for (o, b) in out.iter_mut().zip(base) {
            *o = *b + *o / divisor * self.lambda;
        }
    }

    #[inline(always)]
    fn elect(&self, piece: &Piece<'_>, factors: &[f32], range: Range<usize>, base: &[f32], out: &mut [f32]) {
        let (groups, rest) = out.as_chunks_mut::<GROUP>();
        let (bases, base_rest) = base.as_chunks::<GROUP>();
        let whole = groups.len() * GROUP;
        for (k, (out, base)) in groups.iter_mut().zip(bases).enumerate() {
            let first = range.start + k * GROUP;
            let of = |i: usize| -> &[f32; GROUP] {
                piece.model(i)[first..first + GROUP].try_into().expect("a whole group")
            };
            self.elect_group(factors, of, base, out);
        }
        if rest.is_empty() {
            return;
        }
        // The last group, filled up.
        let (mut last, mut filled) = ([0.0; GROUP], [0.0; GROUP]);
        filled[..rest.len()].copy_from_slice(base_rest);
        let of = |i: usize| {
            let mut values = [0.0; GROUP];
            values[..rest.len()].copy_from_slice(&piece.model(i)[range.start + whole..range.end]);
            values
        };
        self.elect_group(factors, of, &filled, &mut last);
        rest.copy_from_slice(&last[..rest.len()]);
    }

    /// So few elements that their sums stay in registers.
    #[inline(always)]
    fn elect_group<V: std::borrow::Borrow<[f32; GROUP]>>(
        &self,
        factors: &[f32],
        of: impl Fn(usize) -> V,
        base: &[f32; GROUP],
        out: &mut [f32; GROUP],
    ) {
        let [mut vote, mut sum, mut divisor] = [[0.0f32; GROUP]; 3];
        for (i, (weight, factor)) in self.weights.iter().zip(factors).enumerate() {
            let deltas = of(i);
            for (vote, d) in vote.iter_mut().zip(deltas.borrow()) {
                *vote += (*d * *factor) * *weight;
            }
        }
        for (i, (weight, factor)) in self.weights.iter().zip(factors).enumerate() {
            let deltas = of(i);
            for (((sum, divisor), vote), d) in
                sum.iter_mut().zip(&mut divisor).zip(&vote).zip(deltas.borrow())
            {
                let value = (*d * *factor) * *weight;
                let agrees = (*vote >= 0.0) & (value > 0.0) | (*vote < 0.0) & (value < 0.0);
                *sum += if agrees { value } else { 0.0 };
                *divisor += if agrees { *weight } else { 0.0 };
            }
        }
        for (((out, sum), divisor), b) in out.iter_mut().zip(&sum).zip(&divisor).zip(base) {
            let divides = self.normalize & (*divisor != 0.0);
            *out = *b + *sum / if divides { *divisor } else { 1.0 } * self.lambda;
        }
    }
}

/// Adds the L1 norms of the piece's columns from `sums[at]` on.
pub(super) fn add_norms(piece: &Piece<'_>, sums: &mut [f64], at: usize) {
    for i in 0..piece.models() {
        sums[at + i] += vector::sum_of_magnitudes(piece.model(i), Threading::Sequential);
    }
}

/// Factors of methods that trim in their first pass.
pub(super) fn trimmed_factors(rescale: Rescale, known: &Known, models: usize) -> Vec<f32> {
    let (before, after): (Vec<f64>, Vec<f64>) =
        known.norms(0).iter().map(|[before, after]| (before, after)).unzip();
    rescale.factors(&before, &after, models)
}
