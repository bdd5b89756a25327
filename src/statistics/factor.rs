//! Gram factors of a statistics file as rows: full, packed or low rank, checked once while they stream.
//!
//! Full and packed Grams become one type that the operators take. The off-diagonal scaling `λ·C + (1-λ)·diag(C)` is
//! applied as rows are decoded, so that nothing is stored twice.

use std::ops::Range;
use std::sync::Arc;

use super::{Form, ModelStatistics, Statistic, StatisticsError};
use crate::kernel::{PANEL, Real};
use crate::operator::{OperatorError, RowSource};
use crate::read::Dtype;

/// How far the two halves of a full Gram may differ, relative to `√(cᵢᵢ·cⱼⱼ)` (which bounds every entry of a positive
/// semidefinite matrix): sums of f32 products in another order, or a rounding to 16 bits on either side of a midpoint.
fn symmetry_tolerance(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::Bf16 => 1.0 / 128.0,
        Dtype::F16 => 1.0 / 512.0,
        _ => 1e-3,
    }
}

/// What one pass over a factor tells: needed for ridges, scaling and Jacobi, and the proof that the values are usable.
#[derive(Debug, Clone)]
pub struct FactorSummary {
    /// Diagonal of the (unscaled) Gram, length `side`.
    pub diagonal: Arc<[f64]>,
    /// Its sum.
    pub trace: f64,
}

impl FactorSummary {
    /// Whether the Gram is zero: it adds nothing.
    pub fn is_zero(&self) -> bool {
        self.trace == 0.0
    }
}

/// A Gram `[side, side]` in full rows, read from full or packed storage.
pub struct GramRows {
    statistics: Arc<ModelStatistics>,
    statistic: Statistic,
    side: usize,
    packed: bool,
    off_diagonal: f64,
}

/// `F` `[rank, side]` of a Gram `FᵀF`, or a diagonal Fisher as one long row.
pub struct FactorRows {
    statistics: Arc<ModelStatistics>,
    statistic: Statistic,
    rows: usize,
    columns: usize,
}

fn boxed(error: StatisticsError) -> OperatorError {
    OperatorError::Source(Box::new(error))
}

impl GramRows {
    /// A full or packed Gram; `None` for the other forms.
    pub fn new(statistics: Arc<ModelStatistics>, statistic: &Statistic, off_diagonal: f64) -> Option<Self> {
        let (side, packed) = match statistic.form {
            Form::Full { side } => (side, false),
            Form::Packed { side } => (side, true),
            Form::Factor { .. } | Form::Dense => return None,
        };
        Some(Self { statistics, statistic: statistic.clone(), side, packed, off_diagonal })
    }

    /// Index of `(i, j)`, `j ≤ i` where packed.
    fn position(&self, i: usize, j: usize) -> usize {
        if self.packed { i * (i + 1) / 2 + j } else { i * self.side + j }
    }

    /// Rows `rows` of the whole matrix.
    pub(super) fn read<T: Real>(&self, rows: Range<usize>, out: &mut [T]) -> Result<(), StatisticsError> {
        let side = self.side;
        let mut scratch = Vec::new();
        if self.packed {
            for (k, i) in rows.clone().enumerate() {
                let start = self.position(i, 0);
                self.decode(start..start + i + 1, &mut out[k * side..k * side + i + 1], &mut scratch)?;
            }
            // What lies right of the diagonal stands in the rows below: columns `rows` of row j.
            // Sixteen of those at a time, so that a whole cache line of `out` is written at once.
            const LINES: usize = 16;
            let mut segments = [T::default(); LINES * PANEL];
            for first in (rows.start..rows.end).step_by(PANEL) {
                let last = (first + PANEL).min(rows.end);
                for line in (first + 1..side).step_by(LINES) {
                    let lines = line..(line + LINES).min(side);
                    for (segment, j) in segments.chunks_exact_mut(PANEL).zip(lines.clone()) {
                        let segment = &mut segment[..last.min(j) - first];
                        let start = self.position(j, first);
                        self.decode(start..start + segment.len(), segment, &mut scratch)?;
                    }
                    for i in first..last.min(lines.end - 1) {
                        // Row i is right of its diagonal from j = i + 1 on.
                        let columns = lines.start.max(i + 1)..lines.end;
                        let row = &mut out[(i - rows.start) * side..][columns.clone()];
                        let from = segments[(columns.start - lines.start) * PANEL + i - first..].iter();
                        for (v, value) in row.iter_mut().zip(from.step_by(PANEL)) {
                            *v = *value;
                        }
                    }
                }
            }
        } else {
            self.decode(rows.start * side..rows.end * side, &mut out[..rows.len() * side], &mut scratch)?;
        }
        if self.off_diagonal != 1.0 {
            for (k, i) in rows.enumerate() {
                for (j, v) in out[k * side..(k + 1) * side].iter_mut().enumerate() {
                    if i != j {
                        *v = T::from_f64(v.to_f64() * self.off_diagonal);
                    }
                }
            }
        }
        Ok(())
    }

    /// Row `i` up to its diagonal, `i + 1` values, as stored.
    pub(super) fn read_lower(
        &self,
        i: usize,
        out: &mut [f64],
        scratch: &mut Vec<u8>,
    ) -> Result<(), StatisticsError> {
        let start = self.position(i, 0);
        self.decode(start..start + i + 1, &mut out[..i + 1], scratch)
    }

    fn decode<T: Real>(
        &self,
        elements: Range<usize>,
        out: &mut [T],
        scratch: &mut Vec<u8>,
    ) -> Result<(), StatisticsError> {
        decode(&self.statistics, &self.statistic, elements, out, scratch)
    }

    /// Reads the whole Gram once: finite, non-negative diagonal, symmetric where both halves are stored.
    ///
    /// # Errors
    /// [`StatisticsError`] naming file, key and position of the first value that is wrong.
    pub fn scan(&self) -> Result<FactorSummary, StatisticsError> {
        let side = self.side;
        let mut diagonal = vec![0.0; side];
        let mut scratch = Vec::new();
        let mut row = vec![0.0f64; side];
        for (i, d) in diagonal.iter_mut().enumerate() {
            let start = self.position(i, 0);
            let row = &mut row[..if self.packed { i + 1 } else { side }];
            self.decode(start..start + row.len(), row, &mut scratch)?;
            if let Some(j) = crate::read::first_nonfinite_f64(row) {
                return Err(self.bad_value(i, j, row[j], "a finite number"));
            }
            if row[i] < 0.0 {
                return Err(self.bad_value(i, i, row[i], "a diagonal that is not negative"));
            }
            *d = row[i];
        }
        if !self.packed {
            self.check_symmetry(&diagonal)?;
        }
        let trace = diagonal.iter().sum();
        Ok(FactorSummary { diagonal: diagonal.into(), trace })
    }

    /// Compares the halves tile by tile: rows of one side against the transposed rows of the other.
    fn check_symmetry(&self, diagonal: &[f64]) -> Result<(), StatisticsError> {
        const TILE: usize = 128;
        let side = self.side;
        let tolerance = symmetry_tolerance(self.statistic.dtype);
        let noise = 1e-9 * diagonal.iter().copied().fold(0.0, f64::max);
        let mut scratch = Vec::new();
        let mut upper = vec![0.0f32; TILE * TILE];
        let mut lower = vec![0.0f32; TILE];
        let tiles = |len: usize| (0..len).step_by(TILE).map(move |k| k..(k + TILE).min(len));
        for rows in tiles(side) {
            for columns in tiles(side).filter(|c| c.start >= rows.start) {
                let width = columns.len();
                for (k, i) in rows.clone().enumerate() {
                    let start = i * side + columns.start;
                    self.decode(start..start + width, &mut upper[k * TILE..k * TILE + width], &mut scratch)?;
                }
                for (l, j) in columns.clone().enumerate() {
                    let start = j * side + rows.start;
                    let lower = &mut lower[..rows.len()];
                    self.decode(start..start + rows.len(), lower, &mut scratch)?;
                    for (k, v) in lower.iter().enumerate() {
                        let other = upper[k * TILE + l];
                        let scale = (diagonal[j] * diagonal[rows.start + k]).sqrt();
                        if f64::from((v - other).abs()) > tolerance * scale + noise {
                            return Err(StatisticsError::NotSymmetric {
                                path: self.statistics.path_of(&self.statistic).to_path_buf(),
                                key: self.statistic.key.clone(),
                                row: j,
                                column: rows.start + k,
                                lower: f64::from(*v),
                                upper: f64::from(other),
                            });
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn bad_value(&self, row: usize, column: usize, got: f64, expected: &'static str) -> StatisticsError {
        bad_value(&self.statistics, &self.statistic, (row, column), got, expected)
    }
}

impl RowSource for GramRows {
    fn shape(&self) -> (usize, usize) {
        (self.side, self.side)
    }
    fn read_f32(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), OperatorError> {
        self.read(rows, out).map_err(boxed)
    }
    fn read_f64(&self, rows: Range<usize>, out: &mut [f64]) -> Result<(), OperatorError> {
        self.read(rows, out).map_err(boxed)
    }
}

impl FactorRows {
    /// An `input_factor` or `output_factor` as its rows; anything else as one row of all its values.
    pub fn new(statistics: Arc<ModelStatistics>, statistic: &Statistic) -> Self {
        let (rows, columns) = match statistic.form {
            Form::Factor { rank, side } => (rank, side),
            _ => (1, statistic.shape.iter().product()),
        };
        Self { statistics, statistic: statistic.clone(), rows, columns }
    }

    /// Reads the whole factor once: finite; the diagonal of `FᵀF`.
    ///
    /// # Errors
    /// [`StatisticsError`] naming file, key and position of the first value that is not finite.
    pub fn scan(&self) -> Result<FactorSummary, StatisticsError> {
        let mut diagonal = vec![0.0; self.columns];
        let mut scratch = Vec::new();
        let mut row = vec![0.0f64; self.columns];
        for i in 0..self.rows {
            decode(
                &self.statistics,
                &self.statistic,
                i * self.columns..(i + 1) * self.columns,
                &mut row,
                &mut scratch,
            )?;
            if let Some(j) = crate::read::first_nonfinite_f64(&row) {
                return Err(self.bad_value(i, j, row[j], "a finite number"));
            }
            for (d, v) in diagonal.iter_mut().zip(&row) {
                *d += v * v;
            }
        }
        let trace = diagonal.iter().sum();
        Ok(FactorSummary { diagonal: diagonal.into(), trace })
    }

    /// Decodes values `elements` of the flattened statistic and refuses what is not finite or negative: a diagonal
    /// Fisher is a mean of squares.
    ///
    /// # Errors
    /// [`StatisticsError`] naming file, key and flat index.
    pub fn read_squares<T: Real>(
        &self,
        elements: Range<usize>,
        out: &mut [T],
        scratch: &mut Vec<u8>,
    ) -> Result<(), StatisticsError> {
        decode(&self.statistics, &self.statistic, elements.clone(), out, scratch)?;
        // A NaN fails the comparison, too.
        if let Some(k) = out.iter().position(|v| !(v.to_f64() >= 0.0 && v.to_f64().is_finite())) {
            return Err(self.bad_value(
                0,
                elements.start + k,
                out[k].to_f64(),
                "a finite number that is not negative",
            ));
        }
        Ok(())
    }

    fn bad_value(&self, row: usize, column: usize, got: f64, expected: &'static str) -> StatisticsError {
        bad_value(&self.statistics, &self.statistic, (row, column), got, expected)
    }

    /// Rows `rows` of `F`.
    pub(super) fn read<T: Real>(&self, rows: Range<usize>, out: &mut [T]) -> Result<(), StatisticsError> {
        let mut scratch = Vec::new();
        let elements = rows.start * self.columns..rows.end * self.columns;
        decode(
            &self.statistics,
            &self.statistic,
            elements,
            &mut out[..rows.len() * self.columns],
            &mut scratch,
        )
    }
}

impl RowSource for FactorRows {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }
    fn read_f32(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), OperatorError> {
        self.read(rows, out).map_err(boxed)
    }
    fn read_f64(&self, rows: Range<usize>, out: &mut [f64]) -> Result<(), OperatorError> {
        self.read(rows, out).map_err(boxed)
    }
}

pub(super) fn bad_value(
    statistics: &ModelStatistics,
    statistic: &Statistic,
    (row, column): (usize, usize),
    got: f64,
    expected: &'static str,
) -> StatisticsError {
    let path = statistics.path_of(statistic).to_path_buf();
    StatisticsError::BadValue { path, key: statistic.key.clone(), row, column, got, expected }
}

/// Values `elements` of a flattened statistic.
pub(super) fn decode<T: Real>(
    statistics: &ModelStatistics,
    statistic: &Statistic,
    elements: Range<usize>,
    out: &mut [T],
    scratch: &mut Vec<u8>,
) -> Result<(), StatisticsError> {
    /// Longest piece that is read at once without a map: stays in the second-level cache.
    const PIECE: usize = 1 << 16;
    let width = statistic.dtype.float_bytes().unwrap_or(0);
    for range in (0..out.len()).step_by(PIECE) {
        let end = (range + PIECE).min(out.len());
        let bytes = ((elements.start + range) * width) as u64..((elements.start + end) * width) as u64;
        T::decode(statistic.dtype, statistics.read(statistic, bytes, scratch)?, &mut out[range..end]);
    }
    Ok(())
}
