//! The factors of a solve: found in the statistics, scanned once, loaded the way the memory plan says.

use std::ops::Range;
use std::sync::Arc;

use super::inputs::TaskVectorRows;
use super::{GramKind, Inputs, MergeError, SolveModel, Tally};
use crate::config::DeltaScale;
use crate::kernel::{Buffer, Real, Threading, panels};
use crate::operator::{Factor, LowRank, OperatorError, Panels, RowSource, Symmetric};
use crate::read::Dtype;
use crate::statistics::factor::{FactorRows, FactorSummary, GramRows};
use crate::statistics::{Kind, ModelStatistics, Statistic};

/// One factor of one model, scanned but not loaded.
#[derive(Clone)]
pub(super) struct FactorHandle {
    rows: Arc<dyn RowSource>,
    low_rank: bool,
    scale: f64,
    off_diagonal: f64,
    summary: FactorSummary,
    unit_roundoff: f64,
}

/// Half a unit in the last place of a Gram's entries. 16-bit Grams count as f32: what rounding to 16 bits did to them
/// cannot be told from what they are, and their exact solution is what was asked for.
fn unit_roundoff(dtype: Dtype) -> f64 {
    if dtype == Dtype::F64 { F64_ROUNDOFF } else { 2f64.powi(-25) }
}

/// That of a Gram made here, in f64, from its factor.
const F64_ROUNDOFF: f64 = 1.0 / (1u64 << 53) as f64;

impl FactorHandle {
    /// Relative rounding error of the entries of this Gram.
    pub fn unit_roundoff(&self) -> f64 {
        self.unit_roundoff
    }

    /// `(rows, side)` of what is stored.
    pub fn shape(&self) -> (usize, usize) {
        self.rows.shape()
    }

    /// Whether it is stored as `F` of `FᵀF`.
    pub fn is_low_rank(&self) -> bool {
        self.low_rank
    }

    /// Trace of the factor, scale included; off-diagonal scaling leaves it alone.
    pub fn trace(&self) -> f64 {
        self.scale * self.summary.trace
    }

    /// Diagonal of the factor, scale included.
    pub fn diagonal(&self) -> Vec<f64> {
        self.summary.diagonal.iter().map(|d| d * self.scale).collect()
    }

    /// Ready for an operator: read into memory, or to be streamed at each use.
    pub fn load<T: Real>(&self, hold: bool, threading: Threading) -> Result<Factor<T>, OperatorError> {
        let panels = if hold {
            Panels::held(self.rows.as_ref(), threading)?
        } else {
            Panels::streamed(Arc::clone(&self.rows))
        };
        if self.low_rank {
            let diagonal = Arc::clone(&self.summary.diagonal);
            Ok(Factor::LowRank(LowRank::new(panels, self.scale, self.off_diagonal, diagonal)))
        } else {
            Ok(Factor::Symmetric(Symmetric::new(panels)?))
        }
    }
}

/// Counts what is read through it.
struct Counted<R> {
    rows: R,
    bytes_per_row: f64,
    tally: Tally,
}

impl<R: RowSource> RowSource for Counted<R> {
    fn shape(&self) -> (usize, usize) {
        self.rows.shape()
    }
    fn read_f32(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), OperatorError> {
        self.tally.add((self.bytes_per_row * rows.len() as f64) as u64);
        self.rows.read_f32(rows, out)
    }
    fn read_f64(&self, rows: Range<usize>, out: &mut [f64]) -> Result<(), OperatorError> {
        self.tally.add((self.bytes_per_row * rows.len() as f64) as u64);
        self.rows.read_f64(rows, out)
    }
}

fn counted<R: RowSource>(rows: R, statistic: &Statistic, tally: &Tally) -> Counted<R> {
    let bytes_per_row = statistic.bytes as f64 / rows.shape().0.max(1) as f64;
    Counted { rows, bytes_per_row, tally: tally.clone() }
}

/// A square statistic of `model`: the first of `kinds` that it has.
fn statistic_factor(
    inputs: &Inputs,
    model: &SolveModel,
    tensor: &str,
    kinds: &[Kind],
    tally: &Tally,
) -> Result<FactorHandle, MergeError> {
    let (statistics, statistic) = find(inputs, model, tensor, kinds);
    // The diagonal is the same whatever the off-diagonal scaling.
    let key = || format!("{} {}", model.model, statistic.key);
    if let Some(rows) = GramRows::new(Arc::clone(statistics), statistic, model.off_diagonal) {
        let summary = tally.scanned(key, || {
            tally.add(statistic.bytes);
            Ok(rows.scan()?)
        })?;
        let rows = Arc::new(counted(rows, statistic, tally));
        return Ok(FactorHandle {
            rows,
            low_rank: false,
            scale: 1.0,
            off_diagonal: model.off_diagonal,
            summary,
            unit_roundoff: unit_roundoff(statistic.dtype),
        });
    }
    let rows = FactorRows::new(Arc::clone(statistics), statistic);
    let summary = tally.scanned(key, || {
        tally.add(statistic.bytes);
        Ok(rows.scan()?)
    })?;
    let rows = Arc::new(counted(rows, statistic, tally));
    Ok(FactorHandle {
        rows,
        low_rank: true,
        scale: 1.0,
        off_diagonal: model.off_diagonal,
        summary,
        unit_roundoff: F64_ROUNDOFF,
    })
}

/// What `resolve` has seen in the headers.
pub(super) fn find<'a>(
    inputs: &'a Inputs,
    model: &SolveModel,
    tensor: &str,
    kinds: &[Kind],
) -> (&'a Arc<ModelStatistics>, &'a Statistic) {
    inputs.models[model.model]
        .statistics
        .as_ref()
        .and_then(|s| kinds.iter().find_map(|kind| Some((s, s.get(tensor, *kind)?))))
        .expect("a recipe names a statistic only where the model has it")
}

/// The input-side factor of a Gram system.
pub(super) fn gram_factor(
    inputs: &Arc<Inputs>,
    model: &SolveModel,
    tensor: &str,
    kind: GramKind,
    rows: usize,
    columns: usize,
    tally: &Tally,
) -> Result<FactorHandle, MergeError> {
    match kind {
        GramKind::Input => {
            statistic_factor(inputs, model, tensor, &[Kind::InputGram, Kind::InputFactor], tally)
        }
        GramKind::FisherBlock => statistic_factor(inputs, model, tensor, &[Kind::FisherBlock], tally),
        GramKind::Delta { base, scale } => {
            let rows = TaskVectorRows {
                inputs: Arc::clone(inputs),
                model: model.source,
                base,
                name: tensor.to_owned(),
                rows,
                columns,
                tally: tally.clone(),
            };
            // No key of a statistic begins so.
            let key = || format!("{} - {base}", model.source);
            let summary = tally.scanned(key, || scan_rows(&rows))?;
            let scale = match scale {
                DeltaScale::One => 1.0,
                DeltaScale::InverseSquaredNorm if summary.trace > 0.0 => 1.0 / summary.trace,
                // A model that did not move this tensor has nothing to say about it.
                DeltaScale::InverseSquaredNorm => 0.0,
            };
            let off_diagonal = model.off_diagonal;
            Ok(FactorHandle {
                rows: Arc::new(rows),
                low_rank: true,
                scale,
                off_diagonal,
                summary,
                unit_roundoff: F64_ROUNDOFF,
            })
        }
    }
}

/// The output-side factor of a K-FAC system.
pub(super) fn output_factor(
    inputs: &Inputs,
    model: &SolveModel,
    tensor: &str,
    tally: &Tally,
) -> Result<FactorHandle, MergeError> {
    statistic_factor(inputs, model, tensor, &[Kind::OutputGram, Kind::OutputFactor], tally)
}

/// Diagonal of `FᵀF` by one pass over `F`, row by row in order.
fn scan_rows(source: &dyn RowSource) -> Result<FactorSummary, MergeError> {
    /// Rows decoded at a time.
    const ROWS: usize = 16;
    let (rows, columns) = source.shape();
    let mut diagonal = vec![0.0; columns];
    let mut buffer = Buffer::<f64>::zeroed(ROWS.min(rows) * columns);
    for range in panels(rows).flat_map(|r| {
        let end = r.end;
        r.step_by(ROWS).map(move |k| k..(k + ROWS).min(end))
    }) {
        let values = &mut buffer[..range.len() * columns];
        source.read_f64(range, values)?;
        for row in values.chunks_exact(columns.max(1)) {
            for (d, v) in diagonal.iter_mut().zip(row) {
                *d += v * v;
            }
        }
    }
    let trace = diagonal.iter().sum();
    Ok(FactorSummary { diagonal: diagonal.into(), trace })
}

/// Identifies an input factor that several tensors may share: model, resolved key, off-diagonal scaling.
pub(super) fn shared_key(inputs: &Inputs, model: &SolveModel, tensor: &str) -> (usize, String, u64) {
    let (_, statistic) = find(inputs, model, tensor, &[Kind::InputGram, Kind::InputFactor]);
    (model.model, statistic.key.clone(), model.off_diagonal.to_bits())
}
