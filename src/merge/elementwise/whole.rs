//! Methods that see a weight as a matrix: singular vectors need all of it.
//!
//! Everything is f64 from the models' bytes to the result. Singular vectors come from the eigenvectors of the smaller Gram,
//! orthonormalisation from its inverse square root, so that errors are those of f64 times the squared condition. Directions whose singular value is below 1e-6 of the largest are null: they stay 0, where the papers' SVD
//! completes them with arbitrary vectors.

use super::gram::combine;
use super::{Elementwise, Known, Piece};
use crate::kernel::{Buffer, Threading, gemm, mat, mat_mut, transpose};
use crate::merge::MergeError;
use crate::operator::BlockShape;
use crate::solve::eigen::{Eigen, NoConvergence};

/// Rows or columns that [`map_singular_values`] works on at a time.
const MAPPED: usize = 512;

/// Bytes of a task vector that [`sum_of_tasks`] makes and [`map_singular_values`] works on, and of what the two hold beside it.
pub(super) fn map_bytes(shape: BlockShape) -> u64 {
    let (m, n) = (shape.out_features as u64, shape.in_features as u64);
    let panel = m.min(n) * m.max(n).min(MAPPED as u64);
    8 * (m * n + gram_values(m.min(n)) + panel.max(READ as u64))
}

/// Floating point operations of [`map_singular_values`].
pub(super) fn map_flops(shape: BlockShape) -> f64 {
    let (m, n) = (shape.out_features as f64, shape.in_features as f64);
    let side = m.min(n);
    4.0 * m * n * side + 9.0 * side.powi(3)
}

/// Squared singular values below this share of the largest are null.
pub(super) const NULL: f64 = 1e-12;

/// Reads a stretch of a model's task vector as f64, from this element on.
pub type ReadTask<'a> = dyn FnMut(usize, usize, &mut [f64]) -> Result<(), MergeError> + 'a;

/// Why a weight could not be merged as a matrix.
#[derive(Debug)]
pub enum WholeError {
    /// A model could not be read.
    Read(MergeError),
    /// An eigendecomposition failed.
    Eigen(NoConvergence),
}

impl From<MergeError> for WholeError {
    fn from(error: MergeError) -> Self {
        Self::Read(error)
    }
}

impl From<NoConvergence> for WholeError {
    fn from(error: NoConvergence) -> Self {
        Self::Eigen(error)
    }
}

/// A method that is `W` on weights and `base + λ · mean of the task vectors` on everything else.
#[derive(Debug)]
pub(super) struct OnWeights<W> {
    lambda: f64,
    weight: Option<W>,
}

impl<W: WholeTensor + std::fmt::Debug + Send + 'static> OnWeights<W> {
    /// `weight`: of a tensor that is one.
    pub fn boxed(lambda: f64, weight: Option<W>) -> Box<dyn Elementwise> {
        Box::new(Self { lambda, weight })
    }
}

impl<W: WholeTensor + std::fmt::Debug + Send> Elementwise for OnWeights<W> {
    fn task_vectors(&self) -> bool {
        true
    }

    fn whole(&self) -> Option<&dyn WholeTensor> {
        self.weight.as_ref().map(|weight| weight as &dyn WholeTensor)
    }

    fn merge(&self, piece: &mut Piece<'_>, _known: &Known, out: &mut [f32]) {
        let models = piece.models();
        combine(piece, &vec![self.lambda / models as f64; models], true, out);
    }
}

/// A method on a whole weight.
pub trait WholeTensor: Sync {
    /// Times that every model is read.
    fn reads(&self) -> u64;

    /// Peak bytes, the merged task vector included.
    fn memory_bytes(&self, shape: BlockShape, models: usize) -> u64;

    /// Floating point operations.
    fn flops(&self, shape: BlockShape, models: usize) -> f64;

    /// Writes the merged task vector to `out` `[out, in]`.
    ///
    /// # Errors
    /// [`WholeError`].
    fn merge_whole(
        &self,
        shape: BlockShape,
        models: usize,
        read: &mut ReadTask<'_>,
        threading: Threading,
        out: &mut [f64],
    ) -> Result<(), WholeError>;
}

/// Values that [`svd`] and [`map_singular_values`] decompose with, for a smaller side `s`: the Gram, its
/// eigenvectors and faer's scratch.
pub(super) const fn gram_values(side: u64) -> u64 {
    (2 + Eigen::<f64>::SQUARES as u64) * side * side
}

/// The smaller Gram of row-major `[rows, columns]`: of the rows where there are no more of them than columns.
fn small_gram(x: &[f64], rows: usize, columns: usize, threading: Threading) -> Buffer<f64> {
    let side = rows.min(columns);
    let mut gram = Buffer::<f64>::zeroed(side * side);
    let x = mat(x, rows, columns);
    let (left, right) = if rows <= columns { (x, x.transpose()) } else { (x.transpose(), x) };
    gemm(mat_mut(&mut gram, side, side), false, left, right, 1.0, threading);
    // Products of mirrored entries may differ in their last bit; the lower triangle is what is decomposed.
    gram
}

/// Elements that [`sum_of_tasks`] reads of a model at a time.
const READ: usize = 1 << 18;

/// `out ← Σ wₜτₜ`; gives the squared norm of every wₜτₜ. A model of weight 0 is not read.
pub(super) fn sum_of_tasks(
    read: &mut ReadTask<'_>,
    weights: &[f64],
    out: &mut [f64],
) -> Result<Vec<f64>, MergeError> {
    let mut squares = vec![0.0; weights.len()];
    let mut task = Buffer::<f64>::zeroed(READ.min(out.len()));
    for (k, out) in out.chunks_mut(READ).enumerate() {
        out.fill(0.0);
        let task = &mut task[..out.len()];
        for (t, (weight, squares)) in weights.iter().zip(&mut squares).enumerate() {
            if *weight == 0.0 {
                continue;
            }
            read(t, k * READ, task)?;
            for (out, v) in out.iter_mut().zip(&*task) {
                let v = weight * v;
                *out += v;
                *squares += v * v;
            }
        }
    }
    Ok(squares)
}

/// Leading singular triples, as rows.
pub(super) struct Triples {
    /// `[count, rows]`, orthonormal.
    pub left: Buffer<f64>,
    /// `[count, columns]`, orthonormal.
    pub right: Buffer<f64>,
    /// Descending.
    pub values: Vec<f64>,
}

/// The `count` leading singular triples of row-major `[rows, columns]`; vectors of null directions are 0.
pub(super) fn svd(
    x: &[f64],
    rows: usize,
    columns: usize,
    count: usize,
    threading: Threading,
) -> Result<Triples, NoConvergence> {
    let side = rows.min(columns);
    if count == 0 {
        return Ok(Triples { left: Buffer::zeroed(0), right: Buffer::zeroed(0), values: Vec::new() });
    }
    let gram = small_gram(x, rows, columns, threading);
    let eigen = Eigen::of(mat(&gram, side, side))?;
    drop(gram);
    let floor = NULL * eigen.values.last().copied().unwrap_or(0.0);
    let mut small = Buffer::<f64>::zeroed(count * side);
    let mut values = Vec::with_capacity(count);
    for (k, vector) in small.chunks_exact_mut(side.max(1)).enumerate() {
        let from = side - 1 - k;
        let square = eigen.values[from];
        values.push(if square > floor { square.sqrt() } else { 0.0 });
        if square > floor {
            vector.copy_from_slice(&eigen.vectors[from * side..(from + 1) * side]);
        }
    }
    // The other side's vectors: Uᵀ·X or Vᵀ·Xᵀ, over σ.
    let other_side = rows.max(columns);
    let mut other = Buffer::<f64>::zeroed(count * other_side);
    let x = mat(x, rows, columns);
    let x = if rows <= columns { x } else { x.transpose() };
    gemm(mat_mut(&mut other, count, other_side), false, mat(&small, count, side), x, 1.0, threading);
    for (vector, value) in other.chunks_exact_mut(other_side.max(1)).zip(&values) {
        let scale = if *value > 0.0 { 1.0 / value } else { 0.0 };
        vector.iter_mut().for_each(|v| *v *= scale);
    }
    let (left, right) = if rows <= columns { (small, other) } else { (other, small) };
    Ok(Triples { left, right, values })
}

/// The nearest matrix with orthonormal rows (or columns, where there are fewer): `X ← (XXᵀ)^(-1/2)·X`, in place. Gives the
/// sum of the singular values.
pub(super) fn orthonormalise(
    x: &mut [f64],
    rows: usize,
    columns: usize,
    threading: Threading,
) -> Result<f64, NoConvergence> {
    let mut sum = 0.0;
    map_singular_values(x, rows, columns, threading, |values| {
        let floor = NULL.sqrt() * values.last().copied().unwrap_or(0.0);
        for value in values {
            let positive = *value > floor;
            sum += if positive { *value } else { 0.0 };
            *value = if positive { 1.0 / *value } else { 0.0 };
        }
    })?;
    Ok(sum)
}

/// `X ← U·diag(f(σ)·σ)·Vᵀ`, in place. `factors` is given the singular values, ascending, and leaves `f(σ) ≥ 0` in their place.
pub(super) fn map_singular_values(
    x: &mut [f64],
    rows: usize,
    columns: usize,
    threading: Threading,
    factors: impl FnOnce(&mut [f64]),
) -> Result<(), NoConvergence> {
    let side = rows.min(columns);
    if side == 0 {
        return Ok(());
    }
    let mut gram = small_gram(x, rows, columns, threading);
    let Eigen { values: mut squares, mut vectors } = Eigen::of(mat(&gram, side, side))?;
    squares.iter_mut().for_each(|v| *v = v.max(0.0).sqrt());
    factors(&mut squares);
    // Rows of Qᵀ times √f: their Gram is Q·f·Qᵀ.
    for (row, factor) in vectors.chunks_exact_mut(side).zip(&squares) {
        let scale = factor.sqrt();
        row.iter_mut().for_each(|v| *v *= scale);
    }
    let q = mat(&vectors, side, side);
    gemm(mat_mut(&mut gram, side, side), false, q.transpose(), q, 1.0, threading);
    drop(vectors);
    // In place, panel by panel of the longer side.
    let map = mat(&gram, side, side);
    let mut product = Buffer::<f64>::zeroed(side * MAPPED.min(rows.max(columns)));
    if rows <= columns {
        for first in (0..columns).step_by(MAPPED) {
            let width = MAPPED.min(columns - first);
            let panel = mat(x, rows, columns).get(.., first..first + width);
            gemm(mat_mut(&mut product, rows, width), false, map, panel, 1.0, threading);
            for (row, new) in x.chunks_exact_mut(columns).zip(product.chunks_exact(width)) {
                row[first..first + width].copy_from_slice(new);
            }
        }
    } else {
        for panel in x.chunks_mut(MAPPED * columns) {
            let product = &mut product[..panel.len()];
            let height = panel.len() / columns;
            gemm(mat_mut(product, height, columns), false, mat(panel, height, columns), map, 1.0, threading);
            panel.copy_from_slice(product);
        }
    }
    Ok(())
}

/// `out ← Lᵀ·diag(values)·R` with `[count, rows]` and `[count, columns]`; `left` is overwritten.
pub(super) fn recompose(
    left: &mut [f64],
    right: &[f64],
    values: &[f64],
    rows: usize,
    columns: usize,
    threading: Threading,
    out: &mut [f64],
) {
    let count = values.len();
    if count == 0 {
        out.fill(0.0);
        return;
    }
    for (row, value) in left.chunks_exact_mut(rows.max(1)).zip(values) {
        row.iter_mut().for_each(|v| *v *= value);
    }
    let mut transposed = Buffer::<f64>::zeroed(count * rows);
    transpose(&left[..count * rows], count, rows, &mut transposed, threading);
    gemm(
        mat_mut(out, rows, columns),
        false,
        mat(&transposed, rows, count),
        mat(right, count, columns),
        1.0,
        threading,
    );
}
