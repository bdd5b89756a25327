//! Direct solves of Gram systems: one f64 factorisation of `S = Σ wᵢAᵢ + μI`, then rows in tiles of any number.
//!
//! Rows of the weight do not couple, so a tile of rows needs the factor and itself: a tensor larger than memory is
//! solved tile by tile. Solved for the displacement from the initial guess, so directions that no model weighs stay.

use std::sync::Arc;

use faer::prelude::ReborrowMut;
use rayon::prelude::*;

use super::terms::{FactorHandle, gram_factor};
use super::{GramKind, Inputs, MergeError, PIECE, Solve, SourceId, Tally};
use crate::kernel::{Buffer, PANEL, Real, Threading, gemm, mat, mat_mut, panels, vector};
use crate::operator::{Factor, Panels, Symmetric, mirror};
use crate::read::TensorMeta;
use crate::solve::cholesky;
use crate::solve::eigen::{Eigen, NOISE_FLOOR, eigenvalue_noise};
use crate::solve::stop::{DirectMethod, StopReason};

/// Least ridge of a singular matrix, as a fraction of the mean diagonal: in a null direction the right-hand side is
/// rounding noise of 1e-16; divided by 1e-8 it stays below 1e-8 of the rest.
const LEAST_RIDGE: f64 = 1e-8;
/// Least ridge as a multiple of the noise that storing the Grams put on their eigenvalues: a null direction then moves by
/// at most an eighth of the way to the models, refinement included.
const NOISE_RIDGE: f64 = 16.0;
/// Each failure of Cholesky multiplies the ridge by ten.
const ESCALATIONS: i32 = 5;
/// Steps of iterated Tikhonov against the ridge's bias: each multiplies it by ε/(λ+ε) in a direction of eigenvalue λ, and
/// adds as much noise again. Three where the noise is that of f64, one where it is that of the stored values.
const REFINEMENTS: [usize; 2] = [3, 1];

/// What the memory plan settled for one direct Gram solve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectMemory {
    /// Rows of the weight solved at a time: a multiple of the panel, or all.
    pub tile_rows: usize,
    /// Keep the Grams of task vectors instead of forming them for each tile again.
    pub keep_formed: bool,
    /// Whether an eigendecomposition would fit, should Cholesky fail.
    pub eigen: bool,
}

impl DirectMemory {
    /// Bytes held for `[out, in]` with terms of these ranks (`None`: full), at their peak.
    pub fn bytes(&self, rows: usize, columns: usize, ranks: &[Option<usize>]) -> u64 {
        let (n, t) = (columns as u64, self.tile_rows.min(rows) as u64);
        let low_rank = ranks.iter().any(Option::is_some);
        let formed_terms = ranks.iter().flatten().filter(|rank| forms_gram(**rank, columns)).count();
        let longest = ranks.iter().flatten().copied().max().unwrap_or(0);
        let square = n * n * 8;
        let formed = if formed_terms == 0 {
            0
        } else if self.keep_formed {
            formed_terms as u64 * square
        } else {
            square
        };
        let panels = panel_scratch(columns, longest, low_rank) as u64 * 8;
        // x, right-hand side, displacement and one more for refinement, beside a streamed panel and its product.
        let solving = 4 * t * n * 8 + panels + product_scratch(rows, low_rank) as u64 * 8;
        square + formed + solving + if self.eigen { Eigen::<f64>::SQUARES as u64 * square } else { 0 }
    }
}

/// A panel of a full factor, or of a low-rank one and its transpose.
fn panel_scratch(columns: usize, longest_rank: usize, low_rank: bool) -> usize {
    let full = PANEL.min(columns) * columns;
    if low_rank { full.max(2 * PANEL.min(longest_rank) * columns) } else { full }
}

/// `x·Fᵀ` of a tile of rows.
fn product_scratch(rows: usize, low_rank: bool) -> usize {
    if low_rank { PANEL * PANEL.min(rows) } else { 0 }
}

/// Is `FᵀF` formed (`in²` memory, `2·out·in²` flops to apply) or applied twice (`4·rank·out·in`)?
fn forms_gram(rank: usize, columns: usize) -> bool {
    columns < 2 * rank
}

/// A factored system, for every tensor that shares it.
pub struct GramDirect {
    side: usize,
    terms: Vec<DirectTerm>,
    prepared: Prepared,
    /// Diagonal of `S` before any ridge; its strict upper triangle survives in the factor's buffer.
    diagonal: Vec<f64>,
    /// Its mean.
    mean: f64,
    shift: f64,
    memory: DirectMemory,
    threading: Threading,
}

struct DirectTerm {
    source: SourceId,
    weight: f64,
    handle: FactorHandle,
    formed: Option<Factor<f64>>,
    forms: bool,
}

enum Prepared {
    /// All Grams are zero.
    Zero,
    Cholesky {
        s: Buffer<f64>,
        refinements: usize,
    },
    Eigen {
        s: Buffer<f64>,
        eigen: Eigen,
    },
}

/// What one tile of rows tells, in the order of its panels of rows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct DirectOutcome {
    /// `Σ wᵢ‖θ₀-θᵢ‖²_Cᵢ`.
    pub objective_initial: f64,
    /// How far it (with the ridge) fell.
    pub decrease: f64,
    /// `‖r - (S+μ)δ‖²` and `‖r‖²` of the first panel of rows.
    pub sampled_residual: (f64, f64),
}

/// A system's right-hand side for some rows, from [`GramDirect::right_hand_side`].
pub struct RightHandSide {
    /// Row-major; empty where all Grams are zero.
    values: Buffer<f64>,
    /// `Σ wᵢ‖θ₀-θᵢ‖²_Cᵢ`, one a panel of rows.
    objectives: Vec<f64>,
}

impl GramDirect {
    /// Forms and factors `S`.
    ///
    /// # Errors
    /// Those of reading, and [`MergeError::Eigen`] where nothing factors the matrix.
    #[allow(clippy::too_many_arguments, reason = "one call site; a struct would only rename the list")]
    pub fn prepare(
        inputs: &Arc<Inputs>,
        solve: &Solve,
        kind: GramKind,
        tensor: &str,
        rows: usize,
        columns: usize,
        memory: DirectMemory,
        threading: Threading,
        tally: &Tally,
    ) -> Result<Self, MergeError> {
        let mut terms = Vec::new();
        for model in &solve.models {
            let handle = gram_factor(inputs, model, tensor, kind, rows, columns, tally)?;
            if handle.trace() > 0.0 {
                let forms = handle.is_low_rank() && forms_gram(handle.shape().0, columns);
                terms.push(DirectTerm {
                    source: model.source,
                    weight: model.weight,
                    handle,
                    formed: None,
                    forms,
                });
            }
        }
        let trace: f64 = terms.iter().map(|t| t.weight * t.handle.trace()).sum();
        let mean = trace / columns.max(1) as f64;
        let mut direct = Self {
            side: columns,
            terms,
            prepared: Prepared::Zero,
            diagonal: Vec::new(),
            mean,
            shift: solve.ridge * mean,
            memory,
            threading,
        };
        if direct.terms.is_empty() {
            return Ok(direct);
        }
        let mut s = Buffer::<f64>::zeroed(columns * columns);
        let mut scratch = Buffer::<f64>::zeroed(direct.panel_scratch());
        for k in 0..direct.terms.len() {
            let weight = direct.terms[k].weight;
            if direct.terms[k].forms {
                let formed = direct.form(k, &mut scratch)?;
                formed.add_to(&mut s, weight, &mut scratch, threading)?;
                if memory.keep_formed {
                    direct.terms[k].formed = Some(formed);
                }
            } else {
                let factor = direct.terms[k].handle.load::<f64>(false, threading)?;
                factor.add_to(&mut s, weight, &mut scratch, threading)?;
            }
        }
        drop(scratch);
        mirror(&mut s, columns);
        direct.diagonal = (0..columns).map(|i| s[i * columns + i]).collect();
        direct.factorise(s, tensor)?;
        Ok(direct)
    }

    /// Factors the same `S` with another ridge: the bits of preparing it anew. Cost: `side³/3` flops.
    ///
    /// # Errors
    /// As for [`GramDirect::prepare`].
    pub fn change_ridge(&mut self, ridge: f64, tensor: &str) -> Result<(), MergeError> {
        let shift = ridge * self.mean;
        if shift == self.shift {
            return Ok(());
        }
        let (Prepared::Cholesky { mut s, .. } | Prepared::Eigen { mut s, .. }) =
            std::mem::replace(&mut self.prepared, Prepared::Zero)
        else {
            return Ok(());
        };
        self.shift = shift;
        restore(&mut s, self.side);
        for (i, d) in self.diagonal.iter().enumerate() {
            s[i * self.side + i] = *d;
        }
        self.factorise(s, tensor)
    }

    /// `τᵀτ` (scaled) of one term, in memory.
    fn form(&self, term: usize, scratch: &mut [f64]) -> Result<Factor<f64>, MergeError> {
        let mut gram = Buffer::<f64>::zeroed(self.side * self.side);
        let factor = self.terms[term].handle.load::<f64>(false, self.threading)?;
        factor.add_to(&mut gram, 1.0, scratch, self.threading)?;
        mirror(&mut gram, self.side);
        let panels = Panels::from_buffer(self.side, self.side, Arc::new(gram));
        Ok(Factor::Symmetric(Symmetric::new(panels)?))
    }

    fn factorise(&mut self, mut s: Buffer<f64>, tensor: &str) -> Result<(), MergeError> {
        let (side, mean) = (self.side, self.mean);
        let unit_roundoff = self.terms.iter().map(|t| t.handle.unit_roundoff()).fold(0.0, f64::max);
        let noise = eigenvalue_noise(&s, side, unit_roundoff);
        let stored = NOISE_RIDGE * noise > LEAST_RIDGE * mean;
        let least = (NOISE_RIDGE * noise).max(LEAST_RIDGE * mean);
        for attempt in 0..=ESCALATIONS {
            let extra = if attempt == 0 { 0.0 } else { least * 10f64.powi(attempt - 1) };
            if attempt > 0 {
                restore(&mut s, side);
            }
            for (i, d) in self.diagonal.iter().enumerate() {
                s[i * side + i] = d + self.shift + extra;
            }
            if cholesky::factorise(&mut s, side, self.threading).is_err() {
                continue;
            }
            // An eigenvalue that is only noise would be divided into noise.
            if attempt == 0
                && self.shift < NOISE_FLOOR * noise
                && cholesky::least_eigenvalue(&s, side) < NOISE_FLOOR * noise
            {
                continue;
            }
            let refinements = if attempt == 0 { 0 } else { REFINEMENTS[usize::from(stored)] };
            self.prepared = Prepared::Cholesky { s, refinements };
            return Ok(());
        }
        restore(&mut s, side);
        for (i, d) in self.diagonal.iter().enumerate() {
            s[i * side + i] = d + self.shift;
        }
        if !self.memory.eigen {
            return Err(MergeError::Unsupported {
                what: format!(
                    "tensor `{}`: a Gram matrix that is not positive semidefinite",
                    crate::read::escaped(tensor)
                ),
                hint: "give a larger --max-memory (an eigendecomposition would be tried) or set solver.ridge",
            });
        }
        let eigen = Eigen::of(mat(&s, side, side))
            .map_err(|source| MergeError::Eigen { tensor: tensor.to_owned(), source })?;
        self.prepared = Prepared::Eigen { s, eigen };
        Ok(())
    }

    /// How the system was factored.
    pub fn stop_reason(&self) -> StopReason {
        match &self.prepared {
            Prepared::Zero => StopReason::ZeroOperator,
            Prepared::Cholesky { refinements: 0, .. } => StopReason::Direct(DirectMethod::Cholesky),
            Prepared::Cholesky { .. } => StopReason::Direct(DirectMethod::RidgedCholesky),
            Prepared::Eigen { .. } => StopReason::Direct(DirectMethod::Eigen),
        }
    }

    /// Replaces the initial guess in `x`, rows `first_row..` of the weight, by the solution. One outcome for each panel
    /// of rows, so that sums over tiles do not depend on the tiles.
    ///
    /// # Errors
    /// Those of reading.
    pub fn solve_rows(
        &self,
        inputs: &Inputs,
        tensor: &str,
        first_row: usize,
        x: &mut [f64],
        tally: &Tally,
    ) -> Result<Vec<DirectOutcome>, MergeError> {
        let rhs = self.right_hand_side(inputs, tensor, first_row, x, tally)?;
        Ok(self.displace(&rhs, x))
    }

    /// `Σ wᵢ(θᵢ-x)Aᵢ` for rows `first_row..` of the weight: the same for every ridge.
    ///
    /// # Errors
    /// Those of reading.
    pub fn right_hand_side(
        &self,
        inputs: &Inputs,
        tensor: &str,
        first_row: usize,
        x: &[f64],
        tally: &Tally,
    ) -> Result<RightHandSide, MergeError> {
        let n = self.side;
        let rows = x.len() / n.max(1);
        let threading = self.threading;
        let tiles: Vec<_> = panels(rows).collect();
        let mut objectives = vec![0.0; tiles.len()];
        if matches!(self.prepared, Prepared::Zero) {
            return Ok(RightHandSide { values: Buffer::zeroed(0), objectives });
        }
        let mut rhs = Buffer::<f64>::zeroed(rows * n);
        let mut delta = Buffer::<f64>::zeroed(rows * n);
        let mut scratch =
            Buffer::<f64>::zeroed(self.panel_scratch() + product_scratch(rows, self.low_rank()));
        for term in 0..self.terms.len() {
            let DirectTerm { source, weight, ref formed, forms, .. } = self.terms[term];
            let meta = inputs
                .tensor(source, tensor)
                .expect("a recipe names a checkpoint only where it has the tensor");
            let first = first_row * n;
            read_difference(inputs, source, meta, first, x, &mut delta, threading, tally)?;
            let made;
            let factor = match formed {
                Some(formed) => formed,
                None if forms => {
                    made = self.form(term, &mut scratch)?;
                    &made
                }
                None => {
                    made = self.terms[term].handle.load::<f64>(false, threading)?;
                    &made
                }
            };
            for (objective, tile) in objectives.iter_mut().zip(&tiles) {
                let range = tile.start * n..tile.end * n;
                let (delta, rhs) = (&delta[range.clone()], &mut rhs[range]);
                let before = vector::dot(delta, rhs, threading);
                let view = mat(delta, tile.len(), n);
                let out = mat_mut(rhs, tile.len(), n);
                factor.right_multiply(view, out, true, weight, &mut scratch, threading)?;
                *objective += vector::dot(delta, rhs, threading) - before;
            }
        }
        Ok(RightHandSide { values: rhs, objectives })
    }

    /// Adds the displacement to the initial guess that the right-hand side was made for.
    pub fn displace(&self, rhs: &RightHandSide, x: &mut [f64]) -> Vec<DirectOutcome> {
        let n = self.side;
        let rows = x.len() / n.max(1);
        let threading = self.threading;
        let tiles: Vec<_> = panels(rows).collect();
        let mut outcomes: Vec<DirectOutcome> = rhs
            .objectives
            .iter()
            .map(|objective| DirectOutcome { objective_initial: *objective, ..DirectOutcome::default() })
            .collect();
        let rhs = &rhs.values;
        if matches!(self.prepared, Prepared::Zero) {
            return outcomes;
        }
        let mut scratch =
            Buffer::<f64>::zeroed(self.panel_scratch() + product_scratch(rows, self.low_rank()));
        let mut delta = Buffer::<f64>::zeroed(rows * n);
        let mut extra = Buffer::<f64>::zeroed(rows * n);
        delta.copy_from_slice(rhs);
        self.divide(&mut delta, &mut extra);
        if let Prepared::Cholesky { s, refinements } = &self.prepared {
            for _ in 0..*refinements {
                extra.copy_from_slice(rhs);
                self.subtract_product(s, &delta, &mut extra, &tiles, &mut scratch);
                cholesky::solve_right(s, n, &mut extra, threading);
                vector::axpy(1.0, &extra, &mut delta, threading);
            }
        }
        if let (Some(outcome), Some(tile)) = (outcomes.first_mut(), tiles.first()) {
            let s = match &self.prepared {
                Prepared::Cholesky { s, .. } | Prepared::Eigen { s, .. } => s,
                Prepared::Zero => unreachable!("returned above"),
            };
            let range = 0..tile.end * n;
            let residual = &mut extra[range.clone()];
            residual.copy_from_slice(&rhs[range.clone()]);
            self.subtract_product(s, &delta[range.clone()], residual, &tiles[..1], &mut scratch);
            outcome.sampled_residual = (
                vector::dot(residual, residual, threading),
                vector::dot(&rhs[range.clone()], &rhs[range], threading),
            );
        }
        for (outcome, tile) in outcomes.iter_mut().zip(&tiles) {
            let range = tile.start * n..tile.end * n;
            outcome.decrease = vector::dot(&delta[range.clone()], &rhs[range], threading);
        }
        vector::axpy(1.0, &delta, x, threading);
        outcomes
    }

    /// `R ← R·(S+μ)⁻¹`; `t` is scratch of its length.
    fn divide(&self, r: &mut [f64], t: &mut [f64]) {
        match &self.prepared {
            Prepared::Zero => {}
            Prepared::Cholesky { s, .. } => cholesky::solve_right(s, self.side, r, self.threading),
            Prepared::Eigen { eigen, .. } => eigen.solve_right(r, t, self.threading),
        }
    }

    /// `y ← y - x·(S+μ)`, with `S` from the strict upper triangle of `s` and the saved diagonal.
    fn subtract_product(
        &self,
        s: &[f64],
        x: &[f64],
        y: &mut [f64],
        tiles: &[std::ops::Range<usize>],
        scratch: &mut [f64],
    ) {
        let n = self.side;
        for k in panels(n) {
            let panel = &mut scratch[..k.len() * n];
            for (row, i) in panel.chunks_exact_mut(n).zip(k.clone()) {
                for (j, v) in row[..i].iter_mut().enumerate() {
                    *v = s[j * n + i];
                }
                row[i] = self.diagonal[i] + self.shift;
                row[i + 1..].copy_from_slice(&s[i * n + i + 1..(i + 1) * n]);
            }
            let panel = mat(panel, k.len(), n);
            for tile in tiles {
                let range = tile.start * n..tile.end * n;
                let left = mat(&x[range.clone()], tile.len(), n).get(.., k.start..k.end);
                gemm(mat_mut(&mut y[range], tile.len(), n).rb_mut(), true, left, panel, -1.0, self.threading);
            }
        }
    }

    fn low_rank(&self) -> bool {
        self.terms.iter().any(|t| t.handle.is_low_rank())
    }

    fn panel_scratch(&self) -> usize {
        let ranks = self.terms.iter().filter(|t| t.handle.is_low_rank()).map(|t| t.handle.shape().0);
        panel_scratch(self.side, ranks.max().unwrap_or(0), self.low_rank())
    }
}

/// `delta ← θᵢ - x` for elements `first..` of a model's tensor, in f64.
#[allow(clippy::too_many_arguments, reason = "where from, what, where to, and how")]
pub(super) fn read_difference<T: Real>(
    inputs: &Inputs,
    source: SourceId,
    meta: &TensorMeta,
    first: usize,
    x: &[T],
    delta: &mut [T],
    threading: Threading,
    tally: &Tally,
) -> Result<(), MergeError> {
    let piece = |(k, (delta, x)): (usize, (&mut [T], &[T]))| {
        let mut values = [0.0f64; PIECE];
        let values = &mut values[..delta.len()];
        let mut bytes = Vec::new();
        let begin = first + k * PIECE;
        inputs.read(source, meta, begin..begin + delta.len(), values, &mut bytes, tally)?;
        for ((delta, v), x) in delta.iter_mut().zip(&*values).zip(x) {
            *delta = T::from_f64(v - x.to_f64());
        }
        Ok(())
    };
    match threading {
        Threading::Sequential => delta.chunks_mut(PIECE).zip(x.chunks(PIECE)).enumerate().try_for_each(piece),
        Threading::Parallel => {
            delta.par_chunks_mut(PIECE).zip(x.par_chunks(PIECE)).enumerate().try_for_each(piece)
        }
    }
}

/// Copies the upper triangle, which a factorisation leaves alone, over the lower one.
fn restore(s: &mut [f64], side: usize) {
    for i in 1..side {
        for j in 0..i {
            s[i * side + j] = s[j * side + i];
        }
    }
}
