//! Systems without coupling (identity, diagonal Fisher): closed forms, and the right-hand side for CG on them.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::terms::find;
use super::{Inputs, MergeError, PIECE, Solve, System, Tally, pieces};
use crate::kernel::Real;
use crate::read::Dtype;
use crate::statistics::Kind;
use crate::statistics::factor::FactorRows;

/// What a closed-form or CG solve starts from, for one piece of elements, in f64.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct DiagonalOutcome {
    /// `Σ wᵢ‖θ₀-θᵢ‖²_Fᵢ`.
    pub objective_initial: f64,
    /// How far it (with the ridge) fell.
    pub decrease: f64,
}

/// The weights `wᵢ·Fᵢ` and task vectors of a diagonal system, read by pieces.
pub struct DiagonalSystem {
    terms: Vec<Term>,
    floor: f64,
}

struct Term {
    model: usize,
    source: usize,
    weight: f64,
    /// `None` for the identity.
    fisher: Option<FactorRows>,
    bytes_per_element: f64,
}

/// Buffers of one piece.
struct Piece {
    /// `Σ wF(θ-x)`.
    numerator: Vec<f64>,
    /// `Σ wF`.
    weight: Vec<f64>,
    /// `Σ wFθ`, only its square is wanted.
    rhs_squared: f64,
    objective: f64,
}

impl DiagonalSystem {
    /// Looks the statistics up; reads nothing.
    pub fn new(inputs: &Inputs, solve: &Solve, tensor: &str) -> Self {
        let terms = solve
            .models
            .iter()
            .map(|model| {
                let (fisher, bytes_per_element) = if solve.system == System::Identity {
                    (None, 0.0)
                } else {
                    let (statistics, statistic) = find(inputs, model, tensor, &[Kind::FisherDiagonal]);
                    let bytes = statistic.bytes as f64 / statistic.elements().max(1) as f64;
                    (Some(FactorRows::new(Arc::clone(statistics), statistic)), bytes)
                };
                Term {
                    model: model.model,
                    source: model.source,
                    weight: model.weight,
                    fisher,
                    bytes_per_element,
                }
            })
            .collect();
        Self { terms, floor: solve.floor }
    }

    fn fisher(
        &self,
        term: &Term,
        range: Range<usize>,
        out: &mut [f64],
        bytes: &mut Vec<u8>,
        tally: &Tally,
    ) -> Result<(), MergeError> {
        match &term.fisher {
            None => out.fill(term.weight),
            Some(rows) => {
                let (kind, len) = (pieces::Kind::Fisher(term.model), size_of_val(out));
                let first = range.start as u64;
                if !pieces::take(kind, first, len, |kept| f64::decode(Dtype::F64, kept, out)) {
                    tally.add((range.len() as f64 * term.bytes_per_element) as u64);
                    rows.read_squares(range, out, bytes)?;
                    pieces::keep(kind, first, len, |kept| f64::encode(Dtype::F64, out, kept));
                }
                for v in out {
                    *v = term.weight * v.max(self.floor);
                }
            }
        }
        Ok(())
    }

    /// Mean of the diagonal of `Σ wᵢFᵢ`: one pass over the statistics, for the ridge. Pieces are added in order.
    pub fn mean_diagonal(&self, elements: usize, tally: &Tally) -> Result<f64, MergeError> {
        let sums: Vec<f64> = (0..elements.div_ceil(PIECE))
            .into_par_iter()
            .map(|k| {
                let range = k * PIECE..((k + 1) * PIECE).min(elements);
                let (mut values, mut bytes) = (vec![0.0; range.len()], Vec::new());
                let mut sum = 0.0;
                for term in &self.terms {
                    self.fisher(term, range.clone(), &mut values, &mut bytes, tally)?;
                    sum += values.iter().sum::<f64>();
                }
                Ok(sum)
            })
            .collect::<Result<_, MergeError>>()?;
        Ok(sums.iter().sum::<f64>() / elements.max(1) as f64)
    }

    fn piece(
        &self,
        inputs: &Inputs,
        tensor: &str,
        range: Range<usize>,
        x: &[f64],
        tally: &Tally,
    ) -> Result<Piece, MergeError> {
        let len = range.len();
        let mut piece =
            Piece { numerator: vec![0.0; len], weight: vec![0.0; len], rhs_squared: 0.0, objective: 0.0 };
        let (mut f, mut theta, mut rhs) = (vec![0.0; len], vec![0.0; len], vec![0.0; len]);
        let mut bytes = Vec::new();
        for term in &self.terms {
            let meta = inputs
                .tensor(term.source, tensor)
                .expect("a recipe names a checkpoint only where it has the tensor");
            inputs.read(term.source, meta, range.clone(), &mut theta, &mut bytes, tally)?;
            self.fisher(term, range.clone(), &mut f, &mut bytes, tally)?;
            for i in 0..len {
                let difference = theta[i] - x[i];
                piece.numerator[i] += f[i] * difference;
                piece.weight[i] += f[i];
                piece.objective += f[i] * difference * difference;
                rhs[i] += f[i] * theta[i];
            }
        }
        piece.rhs_squared = rhs.iter().map(|v| v * v).sum();
        Ok(piece)
    }

    /// Replaces the initial guess in `x` (elements `range`, at most a piece) by the solution
    /// `x + Σ wF(θ-x) / (Σ wF + μ)`; where no model weighs an element it stays.
    pub fn solve_piece(
        &self,
        inputs: &Inputs,
        tensor: &str,
        range: Range<usize>,
        shift: f64,
        x: &mut [f64],
        tally: &Tally,
    ) -> Result<DiagonalOutcome, MergeError> {
        let piece = self.piece(inputs, tensor, range, x, tally)?;
        let mut decrease = 0.0;
        for ((x, numerator), weight) in x.iter_mut().zip(&piece.numerator).zip(&piece.weight) {
            let weight = weight + shift;
            if weight > 0.0 {
                let delta = numerator / weight;
                decrease += delta * numerator;
                *x += delta;
            }
        }
        Ok(DiagonalOutcome { objective_initial: piece.objective, decrease })
    }

    /// For CG: the residual `Σ wF(θ-x)` and the diagonal `Σ wF`, both scaled, into f32 vectors; gives the objective at
    /// `x` and `‖b‖²`, unscaled.
    #[allow(clippy::too_many_arguments, reason = "two outputs beside what is read")]
    pub fn residual(
        &self,
        inputs: &Inputs,
        tensor: &str,
        scale: f64,
        x: &[f32],
        residual: &mut [f32],
        diagonal: &mut [f32],
        tally: &Tally,
    ) -> Result<(f64, f64), MergeError> {
        let parts: Vec<(f64, f64)> = residual
            .par_chunks_mut(PIECE)
            .zip(diagonal.par_chunks_mut(PIECE))
            .zip(x.par_chunks(PIECE))
            .enumerate()
            .map(|(k, ((residual, diagonal), x))| {
                let x: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
                let piece = self.piece(inputs, tensor, k * PIECE..k * PIECE + x.len(), &x, tally)?;
                for (out, v) in residual.iter_mut().zip(&piece.numerator) {
                    *out = (v * scale) as f32;
                }
                for (out, v) in diagonal.iter_mut().zip(&piece.weight) {
                    *out = (v * scale) as f32;
                }
                Ok((piece.objective, piece.rhs_squared))
            })
            .collect::<Result<_, MergeError>>()?;
        Ok(parts.iter().fold((0.0, 0.0), |(a, b), (c, d)| (a + c, b + d)))
    }
}
