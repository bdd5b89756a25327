//! Low-rank factors of Grams: `F` `[r, side]` with `FᵀF` near the Gram, and how near.
//!
//! The leading eigenpairs, exact where the matrix is small or the rank is large, else by subspace iteration, which reads
//! the Gram a few times in panels of rows and never holds it. Which one is a matter of shapes alone, so that the memory
//! bound never changes a bit. Either way the error is stated as a bound that holds for what was written.

use super::super::StatisticsError;
use super::super::factor::{FactorRows, FactorSummary, GramRows};
use crate::kernel::{Buffer, PANEL, Threading, gemm, mat, mat_mut, panels};
use crate::solve::eigen::{Eigen, NoConvergence};

/// Grams up to this side are decomposed whole.
const WHOLE_SIDE: usize = 1024;
/// Power steps of the subspace iteration. Each lowers what the subspace holds of directions beyond it by the ratio of their
/// eigenvalues; more cost a pass over the Gram each. The error is stated whatever comes out.
const POWER_STEPS: usize = 3;

/// How a rank is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    /// All eigenpairs, of which the leading ones stay. `9·side³` flops.
    Eigen,
    /// Rayleigh-Ritz on a subspace of this many dimensions. `2·(POWER_STEPS + 2)·side²·subspace` flops.
    Subspace(usize),
}

impl Method {
    /// By shapes alone.
    pub(super) fn of(side: usize, rank: usize) -> Self {
        let subspace = (rank + rank / 4 + 16).min(side);
        if side <= WHOLE_SIDE || 4 * subspace > side { Self::Eigen } else { Self::Subspace(subspace) }
    }

    /// Bytes held at the peak, the result included.
    pub(super) fn bytes(self, side: usize, rank: usize) -> u64 {
        let (n, r) = (side as u64, rank as u64);
        8 * match self {
            Self::Eigen => n * n * (1 + Eigen::<f64>::SQUARES as u64) + r * n,
            // Two blocks of vectors, the QR's two and its Q; a panel of the Gram; the small problem.
            Self::Subspace(l) => {
                let l = l as u64;
                6 * l * n + PANEL as u64 * n + (2 + Eigen::<f64>::SQUARES as u64) * l * l + r * (n + l)
            }
        }
    }
}

/// Bytes held while a factor `[rows, side]` is cut to a smaller rank.
pub(super) fn factor_bytes(rows: usize, side: usize, rank: usize) -> u64 {
    let (k, n, r) = (rows as u64, side as u64, rank as u64);
    8 * (k * n + k * k * (1 + Eigen::<f64>::SQUARES as u64) + r * (n + k))
}

/// A factor and what it leaves out.
#[derive(Debug)]
pub(super) struct LowRank {
    /// `F`, row-major `[rank, side]`, rows by falling eigenvalue.
    pub factor: Buffer<f64>,
    /// Trace of the Gram minus that of `FᵀF`.
    pub dropped_trace: f64,
    /// At least the spectral norm of the Gram minus `FᵀF`. Of [`Method::Eigen`] it is the largest eigenvalue dropped, of
    /// [`Method::Subspace`] the Frobenius norm of what is.
    pub dropped_norm: f64,
    /// Largest eigenvalue of `FᵀF`.
    pub largest: f64,
}

/// What can stop a decomposition.
#[derive(Debug)]
pub(super) enum LowRankError {
    Statistics(StatisticsError),
    NoConvergence(NoConvergence),
}

impl From<StatisticsError> for LowRankError {
    fn from(error: StatisticsError) -> Self {
        Self::Statistics(error)
    }
}
impl From<NoConvergence> for LowRankError {
    fn from(error: NoConvergence) -> Self {
        Self::NoConvergence(error)
    }
}

/// The leading `rank` directions of a Gram. `summary` is its scan's.
pub(super) fn of_gram(
    gram: &GramRows,
    summary: &FactorSummary,
    side: usize,
    rank: usize,
) -> Result<LowRank, LowRankError> {
    match Method::of(side, rank) {
        Method::Eigen => whole(gram, summary, side, rank),
        Method::Subspace(subspace) => subspace_iteration(gram, summary, side, rank, subspace),
    }
}

/// Rounding of an eigendecomposition, relative to the trace: `side` units in the last place of the largest eigenvalue.
fn rounding(side: usize, trace: f64) -> f64 {
    side as f64 * f64::EPSILON * trace
}

fn whole(
    gram: &GramRows,
    summary: &FactorSummary,
    side: usize,
    rank: usize,
) -> Result<LowRank, LowRankError> {
    let mut matrix = Buffer::<f64>::zeroed(side * side);
    let mut scratch = Vec::new();
    for (i, row) in matrix.chunks_exact_mut(side.max(1)).enumerate() {
        gram.read_lower(i, row, &mut scratch)?;
    }
    let eigen = Eigen::of(mat(&matrix, side, side))?;
    drop(matrix);
    let mut factor = Buffer::<f64>::zeroed(rank * side);
    let (kept_trace, mut dropped_norm) = scaled_rows(&eigen, side, &mut factor);
    dropped_norm += rounding(side, summary.trace);
    Ok(LowRank {
        factor,
        dropped_trace: summary.trace - kept_trace,
        dropped_norm,
        largest: eigen.values.last().copied().unwrap_or(0.0).max(0.0),
    })
}

/// The leading eigenvectors times the roots of their eigenvalues, and: the sum of these, the largest magnitude left out.
/// What rounding has made negative is left out.
fn scaled_rows(eigen: &Eigen, side: usize, factor: &mut [f64]) -> (f64, f64) {
    let rank = factor.len() / side.max(1);
    let (mut kept, mut dropped) = (0.0, 0.0f64);
    // Ascending: the leading ones come last.
    for (k, (value, vector)) in
        eigen.values.iter().zip(eigen.vectors.chunks_exact(side.max(1))).rev().enumerate()
    {
        if k < rank && *value > 0.0 {
            kept += value;
            let root = value.sqrt();
            for (f, v) in factor[k * side..(k + 1) * side].iter_mut().zip(vector) {
                *f = root * v;
            }
        } else {
            dropped = dropped.max(value.abs());
        }
    }
    (kept, dropped)
}

/// Orthonormal rows that span the rows of `y` `[l, n]`, in place.
fn orthonormalise(y: &mut [f64], l: usize, n: usize) {
    let q = mat(y, l, n).transpose().qr().compute_thin_Q();
    for (k, row) in y.chunks_exact_mut(n.max(1)).enumerate() {
        for (v, q) in row.iter_mut().zip(q.col(k).iter()) {
            *v = *q;
        }
    }
}

/// `y ← z·A` for row-major `[l, n]`, `A` streamed in panels of rows. Gives back `‖A‖²_F`.
fn multiply(
    gram: &GramRows,
    z: &[f64],
    y: &mut [f64],
    l: usize,
    n: usize,
    panel: &mut [f64],
) -> Result<f64, StatisticsError> {
    let mut squares = 0.0;
    for rows in panels(n) {
        let len = rows.len();
        let panel = &mut panel[..len * n];
        gram.read(rows.clone(), panel)?;
        squares += crate::kernel::vector::dot(panel, panel, Threading::Parallel);
        let z = mat(z, l, n).subcols(rows.start, len);
        gemm(mat_mut(y, l, n), rows.start > 0, z, mat(panel, len, n), 1.0, Threading::Parallel);
    }
    Ok(squares)
}

/// Halko, Martinsson & Tropp 2011 (arXiv:0909.4061), algorithm 4.4, with Rayleigh-Ritz values at its end.
fn subspace_iteration(
    gram: &GramRows,
    summary: &FactorSummary,
    n: usize,
    rank: usize,
    l: usize,
) -> Result<LowRank, LowRankError> {
    let mut panel = Buffer::<f64>::zeroed(PANEL.min(n) * n);
    let mut z = Buffer::<f64>::zeroed(l * n);
    let mut y = Buffer::<f64>::zeroed(l * n);
    for (at, v) in z.iter_mut().enumerate() {
        *v = uniform(at as u64);
    }
    for _ in 0..=POWER_STEPS {
        multiply(gram, &z, &mut y, l, n, &mut panel)?;
        orthonormalise(&mut y, l, n);
        std::mem::swap(&mut z, &mut y);
    }
    // The matrix as the subspace sees it; products are not symmetric to the last bit.
    let squares = multiply(gram, &z, &mut y, l, n, &mut panel)?;
    drop(panel);
    let mut inner = Buffer::<f64>::zeroed(l * l);
    gemm(
        mat_mut(&mut inner, l, l),
        false,
        mat(&y, l, n),
        mat(&z, l, n).transpose(),
        1.0,
        Threading::Parallel,
    );
    drop(y);
    let eigen = Eigen::of(mat(&inner, l, l))?;
    drop(inner);
    let mut top = Buffer::<f64>::zeroed(rank * l);
    let (kept_trace, _) = scaled_rows(&eigen, l, &mut top);
    let mut factor = Buffer::<f64>::zeroed(rank * n);
    gemm(mat_mut(&mut factor, rank, n), false, mat(&top, rank, l), mat(&z, l, n), 1.0, Threading::Parallel);
    // With V orthonormal and VᵀAV = Θ diagonal, ‖A - VΘVᵀ‖²_F = ‖A‖²_F - ‖Θ‖²_F. The difference is rounding where
    // nothing is left.
    let kept = eigen.values.iter().rev().take(rank).map(|v| v.max(0.0).powi(2)).sum::<f64>();
    let dropped = (squares - kept).max(0.0) + rounding(n, squares);
    Ok(LowRank {
        factor,
        dropped_trace: summary.trace - kept_trace,
        dropped_norm: dropped.sqrt(),
        largest: eigen.values.last().copied().unwrap_or(0.0).max(0.0),
    })
}

/// The leading `rank` directions of a factor `F₀` `[rows, side]`: `Uᵀ·F₀` with U those of `F₀·F₀ᵀ`.
pub(super) fn of_factor(
    source: &FactorRows,
    rows: usize,
    side: usize,
    rank: usize,
) -> Result<LowRank, LowRankError> {
    let mut whole = Buffer::<f64>::zeroed(rows * side);
    source.read(0..rows, &mut whole)?;
    let f = mat(&whole, rows, side);
    let mut inner = Buffer::<f64>::zeroed(rows * rows);
    gemm(mat_mut(&mut inner, rows, rows), false, f, f.transpose(), 1.0, Threading::Parallel);
    let eigen = Eigen::of(mat(&inner, rows, rows))?;
    drop(inner);
    let mut leading = Buffer::<f64>::zeroed(rank * rows);
    let vectors = eigen.vectors.chunks_exact(rows.max(1)).rev();
    for (row, vector) in leading.chunks_exact_mut(rows.max(1)).zip(vectors) {
        row.copy_from_slice(vector);
    }
    let mut factor = Buffer::<f64>::zeroed(rank * side);
    gemm(mat_mut(&mut factor, rank, side), false, mat(&leading, rank, rows), f, 1.0, Threading::Parallel);
    let trace: f64 = eigen.values.iter().sum();
    let mut left = eigen.values.iter().rev().skip(rank);
    let dropped_norm = left.clone().fold(0.0f64, |most, v| most.max(v.abs())) + rounding(side, trace);
    Ok(LowRank {
        factor,
        dropped_trace: left.by_ref().sum(),
        dropped_norm,
        largest: eigen.values.last().copied().unwrap_or(0.0).max(0.0),
    })
}

/// In [-0.5, 0.5), a function of the element's place: SplitMix64 (Steele, Lea & Flood 2014).
fn uniform(at: u64) -> f64 {
    let mut z = (at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64 - 0.5
}
