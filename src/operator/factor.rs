//! One Gram or Kronecker factor: held in memory or streamed by panels of rows, full or low rank.

use std::ops::Range;
use std::sync::Arc;

use faer::prelude::ReborrowMut;
use faer::{MatMut, MatRef};
use rayon::prelude::*;

use super::OperatorError;
use crate::kernel::{
    Buffer, PANEL, Real, Threading, gemm, gemm_lower, mat, mat_mut, panels, transpose, vector,
};

/// Rows of a matrix that is somewhere else: in a statistics file, in memory, or a difference of two checkpoints.
pub trait RowSource: Send + Sync {
    /// `[rows, columns]`.
    fn shape(&self) -> (usize, usize);
    /// Fills `out` `[rows.len(), columns]`.
    ///
    /// # Errors
    /// Whatever reading runs into; the error's own text names the file.
    fn read_f32(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), OperatorError>;
    /// As [`RowSource::read_f32`], without rounding to f32.
    ///
    /// # Errors
    /// As [`RowSource::read_f32`].
    fn read_f64(&self, rows: Range<usize>, out: &mut [f64]) -> Result<(), OperatorError>;
}

/// Reads rows at the precision of `T`, in parallel pieces where allowed.
pub(crate) fn read_rows<T: Real>(
    source: &dyn RowSource,
    rows: Range<usize>,
    out: &mut [T],
    threading: Threading,
) -> Result<(), OperatorError> {
    /// Rows that one task reads: small enough to balance, long enough to stream.
    const PIECE: usize = 128;
    let columns = source.shape().1;
    let read = |first: usize, out: &mut [T]| -> Result<(), OperatorError> {
        let range = first..first + out.len() / columns.max(1);
        // Two scalars exist, and each casts to itself.
        match bytemuck::try_cast_slice_mut::<T, f64>(out) {
            Ok(out) if T::BYTES == size_of::<f64>() => source.read_f64(range, out),
            _ => source.read_f32(range, bytemuck::cast_slice_mut::<T, f32>(out)),
        }
    };
    if columns == 0 {
        return Ok(());
    }
    match threading {
        Threading::Sequential => read(rows.start, out),
        Threading::Parallel => out
            .par_chunks_mut(PIECE * columns)
            .enumerate()
            .try_for_each(|(k, out)| read(rows.start + k * PIECE, out)),
    }
}

/// A matrix in memory as a [`RowSource`], for library users and tests.
#[derive(Debug, Clone)]
pub struct MemoryRows {
    rows: usize,
    columns: usize,
    values: Vec<f64>,
}

impl MemoryRows {
    /// Row-major `[rows, columns]`.
    ///
    /// # Errors
    /// [`OperatorError::ShapeMismatch`] if the length is another.
    pub fn new(rows: usize, columns: usize, values: Vec<f64>) -> Result<Self, OperatorError> {
        if values.len() != rows * columns {
            return Err(OperatorError::ShapeMismatch {
                what: "rows",
                got: values.len(),
                expected: rows * columns,
            });
        }
        Ok(Self { rows, columns, values })
    }
}

impl RowSource for MemoryRows {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }
    fn read_f32(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), OperatorError> {
        for (out, v) in out.iter_mut().zip(&self.values[rows.start * self.columns..rows.end * self.columns]) {
            *out = *v as f32;
        }
        Ok(())
    }
    fn read_f64(&self, rows: Range<usize>, out: &mut [f64]) -> Result<(), OperatorError> {
        out.copy_from_slice(&self.values[rows.start * self.columns..rows.end * self.columns]);
        Ok(())
    }
}

/// A row-major matrix that gives panels of its rows: held widened in memory, or decoded anew at every use.
#[derive(Clone)]
pub struct Panels<T: Real> {
    rows: usize,
    columns: usize,
    store: Store<T>,
}

#[derive(Clone)]
enum Store<T: Real> {
    Held(Arc<Buffer<T>>),
    Streamed(Arc<dyn RowSource>),
}

impl<T: Real> Panels<T> {
    /// Decoded panel by panel at each use: no memory of its own, one read of the source per pass.
    pub fn streamed(source: Arc<dyn RowSource>) -> Self {
        let (rows, columns) = source.shape();
        Self { rows, columns, store: Store::Streamed(source) }
    }

    /// Read once and kept.
    ///
    /// # Errors
    /// Those of the source.
    pub fn held(source: &dyn RowSource, threading: Threading) -> Result<Self, OperatorError> {
        let (rows, columns) = source.shape();
        let mut buffer = Buffer::zeroed(rows * columns);
        for range in panels(rows) {
            read_rows(
                source,
                range.clone(),
                &mut buffer[range.start * columns..range.end * columns],
                threading,
            )?;
        }
        Ok(Self { rows, columns, store: Store::Held(Arc::new(buffer)) })
    }

    /// Takes over a matrix that was made in memory, `[rows, columns]`.
    pub fn from_buffer(rows: usize, columns: usize, buffer: Arc<Buffer<T>>) -> Self {
        Self { rows, columns, store: Store::Held(buffer) }
    }

    fn scratch_elements(&self) -> usize {
        match self.store {
            Store::Held(_) => 0,
            Store::Streamed(_) => self.panel_elements(),
        }
    }

    fn panel_elements(&self) -> usize {
        PANEL.min(self.rows) * self.columns
    }

    /// All rows, where they are in memory.
    fn in_memory(&self) -> Option<MatRef<'_, T>> {
        match &self.store {
            Store::Held(buffer) => Some(mat(buffer, self.rows, self.columns)),
            Store::Streamed(_) => None,
        }
    }

    /// Rows `range`, row-major; `scratch` holds them where they are not held.
    pub(crate) fn panel<'s>(
        &'s self,
        range: Range<usize>,
        scratch: &'s mut [T],
        threading: Threading,
    ) -> Result<&'s [T], OperatorError> {
        match &self.store {
            Store::Held(buffer) => Ok(&buffer[range.start * self.columns..range.end * self.columns]),
            Store::Streamed(source) => {
                let out = &mut scratch[..range.len() * self.columns];
                read_rows(source.as_ref(), range, out, threading)?;
                Ok(out)
            }
        }
    }

    /// A panel `[p, columns]` and its transpose `[columns, p]`; `scratch` holds the copy and, where it is not held, the
    /// panel itself: see [`Panels::pair_scratch`].
    fn panel_pair<'s>(
        &'s self,
        range: Range<usize>,
        scratch: &'s mut [T],
        threading: Threading,
    ) -> Result<(MatRef<'s, T>, MatRef<'s, T>), OperatorError> {
        let rows = range.len();
        let (copy, scratch) = scratch.split_at_mut(self.panel_elements());
        let panel = self.panel(range, scratch, threading)?;
        transpose(panel, rows, self.columns, copy, threading);
        Ok((mat(panel, rows, self.columns), mat(copy, self.columns, rows)))
    }

    /// Scratch of [`Panels::panel_pair`].
    fn pair_scratch(&self) -> usize {
        self.panel_elements() + self.scratch_elements()
    }

    /// As [`Panels::panel`], as a `[range.len(), columns]` view.
    fn panel_view<'s>(
        &'s self,
        range: Range<usize>,
        scratch: &'s mut [T],
        threading: Threading,
    ) -> Result<MatRef<'s, T>, OperatorError> {
        let rows = range.len();
        Ok(mat(self.panel(range, scratch, threading)?, rows, self.columns))
    }
}

/// A symmetric positive semidefinite `[side, side]` matrix in full rows, and a multiple of the identity beside it.
#[derive(Clone)]
pub struct Symmetric<T: Real> {
    panels: Panels<T>,
    lift: f64,
}

impl<T: Real> Symmetric<T> {
    /// From square panels.
    ///
    /// # Errors
    /// [`OperatorError::ShapeMismatch`] if they are not square.
    pub fn new(panels: Panels<T>) -> Result<Self, OperatorError> {
        if panels.rows != panels.columns {
            return Err(OperatorError::ShapeMismatch {
                what: "a symmetric factor's columns",
                got: panels.columns,
                expected: panels.rows,
            });
        }
        Ok(Self { panels, lift: 0.0 })
    }
}

/// `scale · (λ FᵀF + (1-λ) diag(FᵀF))` with `F` `[rank, side]`, applied as `Fᵀ(F·x)`.
#[derive(Clone)]
pub struct LowRank<T: Real> {
    panels: Panels<T>,
    scale: f64,
    off_diagonal: f64,
    /// `diag(FᵀF)`, needed where `off_diagonal < 1`.
    diagonal: Arc<[f64]>,
}

impl<T: Real> LowRank<T> {
    /// From `F`; `diagonal` is that of `FᵀF`, unscaled, of length `side`.
    pub fn new(panels: Panels<T>, scale: f64, off_diagonal: f64, diagonal: Arc<[f64]>) -> Self {
        Self { panels, scale, off_diagonal, diagonal }
    }
}

/// One side of a K-FAC term, or the input Gram of a RegMean term.
#[derive(Clone)]
pub enum Factor<T: Real> {
    /// In full rows.
    Symmetric(Symmetric<T>),
    /// As `Fᵀ F`.
    LowRank(LowRank<T>),
}

impl<T: Real> Factor<T> {
    /// Side of the (never formed) square matrix.
    pub fn side(&self) -> usize {
        match self {
            Self::Symmetric(f) => f.panels.columns,
            Self::LowRank(f) => f.panels.columns,
        }
    }

    /// `A + by·I`, sharing the values of `A`. A product `FᵀF` is positive semidefinite as it is, and stays so.
    #[must_use]
    pub fn lifted(&self, by: f64) -> Self {
        match self {
            Self::Symmetric(f) => Self::Symmetric(Symmetric { panels: f.panels.clone(), lift: f.lift + by }),
            Self::LowRank(f) => Self::LowRank(f.clone()),
        }
    }

    /// The whole matrix, where it is in memory.
    pub(crate) fn in_memory(&self) -> Option<MatRef<'_, T>> {
        match self {
            Self::Symmetric(f) if f.lift == 0.0 => f.panels.in_memory(),
            _ => None,
        }
    }

    /// Flops of `X·A` for `X` with `rows` rows.
    pub fn flops(&self, rows: usize) -> f64 {
        let (r, side) = (rows as f64, self.side() as f64);
        match self {
            Self::Symmetric(_) => 2.0 * r * side * side,
            Self::LowRank(f) => 4.0 * r * side * f.panels.rows as f64,
        }
    }

    /// Scratch of [`Factor::right_multiply`] for a tile of at most `rows` rows.
    pub(crate) fn right_scratch(&self, rows: usize) -> usize {
        match self {
            Self::Symmetric(f) => f.panels.scratch_elements(),
            Self::LowRank(f) => f.panels.scratch_elements() + rows * PANEL.min(f.panels.rows),
        }
    }

    /// `y ← [y +] alpha · x · A` for a tile `x` of whole rows, `[rows, side]`.
    pub(crate) fn right_multiply(
        &self,
        x: MatRef<'_, T>,
        mut y: MatMut<'_, T>,
        accumulate: bool,
        alpha: f64,
        scratch: &mut [T],
        threading: Threading,
    ) -> Result<(), OperatorError> {
        match self {
            Self::Symmetric(f) => {
                for k in panels(f.panels.rows) {
                    let panel = f.panels.panel_view(k.clone(), scratch, threading)?;
                    let x = x.get(.., k.start..k.end);
                    gemm(y.rb_mut(), accumulate || k.start > 0, x, panel, alpha, threading);
                }
                if f.lift != 0.0 {
                    let lift = alpha * f.lift;
                    for i in 0..x.nrows() {
                        for j in 0..f.panels.columns {
                            y[(i, j)] = T::from_f64(y[(i, j)].to_f64() + lift * x[(i, j)].to_f64());
                        }
                    }
                }
            }
            Self::LowRank(f) => {
                if !accumulate {
                    y.rb_mut().fill(T::default());
                }
                let rows = x.nrows();
                let (panel_scratch, u) = scratch.split_at_mut(f.panels.scratch_elements());
                for k in panels(f.panels.rows) {
                    let panel = f.panels.panel_view(k.clone(), panel_scratch, threading)?;
                    let mut u = mat_mut(u, rows, k.len());
                    gemm(u.rb_mut(), false, x, panel.transpose(), 1.0, threading);
                    gemm(y.rb_mut(), true, u.as_ref(), panel, alpha * f.scale * f.off_diagonal, threading);
                }
                if f.off_diagonal < 1.0 {
                    let rest = alpha * f.scale * (1.0 - f.off_diagonal);
                    for i in 0..rows {
                        for (j, d) in f.diagonal.iter().enumerate() {
                            y[(i, j)] = T::from_f64(y[(i, j)].to_f64() + rest * d * x[(i, j)].to_f64());
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Scratch of [`Factor::left_accumulate`] for tiles of `columns` columns.
    pub(crate) fn left_scratch(&self, columns: usize) -> usize {
        match self {
            Self::Symmetric(f) if f.panels.in_memory().is_some() => 0,
            Self::Symmetric(f) => f.panels.pair_scratch(),
            Self::LowRank(f) => f.panels.pair_scratch() + f.panels.rows * columns,
        }
    }

    /// One step of `y ← y + alpha · A · t`, where `t` arrives as tiles of rows: `rows` says which this `tile`
    /// `[rows.len(), columns]` holds. A symmetric factor adds at once; a low-rank one sums `F·t` in its scratch and adds
    /// after the last tile.
    pub(crate) fn left_accumulate(
        &self,
        rows: Range<usize>,
        tile: MatRef<'_, T>,
        mut y: MatMut<'_, T>,
        alpha: f64,
        scratch: &mut [T],
        threading: Threading,
    ) -> Result<(), OperatorError> {
        let columns = tile.ncols();
        match self {
            Self::Symmetric(f) => {
                // The columns of a symmetric matrix are its rows, transposed.
                let matching = match f.panels.in_memory() {
                    Some(whole) => whole.get(.., rows.start..rows.end),
                    None => f.panels.panel_pair(rows.clone(), scratch, threading)?.1,
                };
                gemm(y.rb_mut(), true, matching, tile, alpha, threading);
                if f.lift != 0.0 {
                    let lift = alpha * f.lift;
                    for (i, row) in rows.enumerate() {
                        for j in 0..columns {
                            y[(row, j)] = T::from_f64(y[(row, j)].to_f64() + lift * tile[(i, j)].to_f64());
                        }
                    }
                }
            }
            Self::LowRank(f) => {
                let (panel_scratch, sums) = scratch.split_at_mut(f.panels.pair_scratch());
                let last = rows.end == f.panels.columns;
                for k in panels(f.panels.rows) {
                    let (panel, transposed) = f.panels.panel_pair(k.clone(), panel_scratch, threading)?;
                    let mut sum = mat_mut(&mut sums[k.start * columns..k.end * columns], k.len(), columns);
                    gemm(
                        sum.rb_mut(),
                        rows.start > 0,
                        panel.get(.., rows.start..rows.end),
                        tile,
                        1.0,
                        threading,
                    );
                    if last {
                        let scale = alpha * f.scale * f.off_diagonal;
                        gemm(y.rb_mut(), true, transposed, sum.as_ref(), scale, threading);
                    }
                }
                if f.off_diagonal < 1.0 {
                    let rest = alpha * f.scale * (1.0 - f.off_diagonal);
                    for (i, row) in rows.enumerate() {
                        let d = rest * f.diagonal[row];
                        for j in 0..columns {
                            y[(row, j)] = T::from_f64(y[(row, j)].to_f64() + d * tile[(i, j)].to_f64());
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// `s ← s + weight · A` for a dense row-major `s` `[side, side]`. The lower triangle is exact; what ends up above it
    /// depends on the form, see [`mirror`].
    pub(crate) fn add_to(
        &self,
        s: &mut [T],
        weight: f64,
        scratch: &mut [T],
        threading: Threading,
    ) -> Result<(), OperatorError> {
        let side = self.side();
        match self {
            Self::Symmetric(f) => {
                for k in panels(side) {
                    let rows = k.start * side..k.end * side;
                    vector::axpy(weight, f.panels.panel(k, scratch, threading)?, &mut s[rows], threading);
                }
                if f.lift != 0.0 {
                    for v in s.iter_mut().step_by(side + 1) {
                        *v = T::from_f64(v.to_f64() + weight * f.lift);
                    }
                }
            }
            Self::LowRank(f) => {
                for k in panels(f.panels.rows) {
                    let (panel, transposed) = f.panels.panel_pair(k.clone(), scratch, threading)?;
                    let alpha = weight * f.scale * f.off_diagonal;
                    gemm_lower(mat_mut(s, side, side), true, transposed, panel, alpha, threading);
                }
                if f.off_diagonal < 1.0 {
                    for (j, d) in f.diagonal.iter().enumerate() {
                        let v = &mut s[j * side + j];
                        *v = T::from_f64(v.to_f64() + weight * f.scale * (1.0 - f.off_diagonal) * d);
                    }
                }
            }
        }
        Ok(())
    }

    /// `weight · diag(A)`: one pass over the rows.
    pub(crate) fn diagonal(&self, weight: f64, threading: Threading) -> Result<Vec<f64>, OperatorError> {
        let side = self.side();
        match self {
            Self::Symmetric(f) => {
                let mut scratch = Buffer::<T>::zeroed(f.panels.scratch_elements());
                let mut diagonal = Vec::with_capacity(side);
                for k in panels(side) {
                    let panel = f.panels.panel(k.clone(), &mut scratch, threading)?;
                    diagonal.extend(
                        k.enumerate()
                            .map(|(row, column)| weight * (panel[row * side + column].to_f64() + f.lift)),
                    );
                }
                Ok(diagonal)
            }
            // Off-diagonal scaling leaves the diagonal alone.
            Self::LowRank(f) => Ok(f.diagonal.iter().map(|d| weight * f.scale * d).collect()),
        }
    }

    /// Scratch of [`Factor::add_to`].
    pub(crate) fn add_scratch(&self) -> usize {
        match self {
            Self::Symmetric(f) => f.panels.scratch_elements(),
            Self::LowRank(f) => f.panels.pair_scratch(),
        }
    }
}

/// Copies the lower triangle of row-major `s` `[side, side]` over the upper one.
pub(crate) fn mirror<T: Real>(s: &mut [T], side: usize) {
    const TILE: usize = 64;
    for rows in (0..side).step_by(TILE) {
        for columns in (rows..side).step_by(TILE) {
            for i in rows..(rows + TILE).min(side) {
                for j in columns.max(i + 1)..(columns + TILE).min(side) {
                    s[i * side + j] = s[j * side + i];
                }
            }
        }
    }
}
