//! Eigenvalues of a Gram as far as memory goes: all of them, or the extremes by Lanczos steps, from a matrix that is held
//! or read anew at each step.
//!
//! `inspect` calls `of` for each Gram, Fisher block or factor whose values are finite. It decides nothing: what the
//! merge does about small eigenvalues is `solve::cholesky`'s and `solve::eigen`'s, whose floor is quoted here.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::kernel::{Buffer, Threading, gemm, mat, mat_mut};
use crate::read::{Checkpoint, Dtype, ReadError, TensorMeta, decode_f64};
use crate::solve::eigen::{EIGENVALUES_SQUARES, NOISE_FLOOR, eigenvalues};
use crate::statistics::Form;

/// Largest matrix whose eigenvalues are all computed, by its side: a second on one core.
pub const MAX_WHOLE_SIDE: usize = 1024;
/// Lanczos steps. Extreme eigenvalues of Grams, whose spectra decay, are found in far fewer.
const LANCZOS_STEPS: usize = 64;
/// Which quantiles are told.
const QUANTILES: [(&str, f64); 7] = [
    ("0.01", 0.01),
    ("0.1", 0.1),
    ("0.25", 0.25),
    ("0.5", 0.5),
    ("0.75", 0.75),
    ("0.9", 0.9),
    ("0.99", 0.99),
];

/// How a spectrum was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// All eigenvalues.
    Whole,
    /// The extremes, each from within.
    Lanczos,
}

/// What is known of a symmetric matrix's eigenvalues.
#[derive(Clone, Debug, Serialize)]
pub struct Spectrum {
    /// All of them, or the extremes.
    pub method: Method,
    /// The largest, or a value below it.
    pub largest: f64,
    /// The least, or a value above it. Below zero by rounding, or the matrix is no Gram.
    pub smallest: f64,
    /// Below this an eigenvalue is not told from the rounding of the stored values, and direct solves do not divide by it.
    /// `None` for factors, whose Grams have no negative eigenvalues however they are rounded.
    pub noise: Option<f64>,
    /// How many are above it; of factors, above f64's rounding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub above_noise: Option<usize>,
    /// Largest over smallest, or over the noise where that is more. `None` for a matrix of zeros and for factors of less
    /// than full rank.
    pub condition_at_noise: Option<f64>,
    /// By share of eigenvalues: `0.1` is the value that a tenth of them do not exceed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantiles: Option<BTreeMap<&'static str, f64>>,
}

/// The spectrum of a stored Gram, or of `FᵀF` for a stored factor. `None` where it has none, or a factor is too large.
///
/// `squares` is `‖·‖²_F` of a Gram. Memory: at most `max_memory`, but for `64·side` values of the Lanczos basis and one
/// row. A matrix that does not fit is read at every step.
///
/// # Errors
/// Those of reading.
pub(super) fn of(
    checkpoint: &Checkpoint,
    tensor: &TensorMeta,
    form: Form,
    squares: Option<f64>,
    max_memory: u64,
) -> Result<Option<Spectrum>, ReadError> {
    let (side, packed) = match form {
        Form::Full { side } => (side, false),
        Form::Packed { side } => (side, true),
        Form::Factor { rank, side } => return of_factor(checkpoint, tensor, rank, side, max_memory),
        Form::Dense => return Ok(None),
    };
    let matrix = Stored { checkpoint, tensor, side, packed };
    let noise = squares.map(|squares| {
        let deviation = (squares / side.max(1) as f64).sqrt();
        NOISE_FLOOR * 2.0 * unit_roundoff(tensor.dtype) / 3f64.sqrt() * deviation
    });
    let square = 8 * (side as u64).saturating_mul(side as u64);
    if side <= MAX_WHOLE_SIDE && square * (1 + EIGENVALUES_SQUARES as u64) <= max_memory {
        let held = matrix.hold()?;
        return Ok(eigenvalues(mat(&held, side, side)).ok().and_then(|values| whole(&values, noise)));
    }
    let extremes = if square <= max_memory {
        let held = matrix.hold()?;
        extreme_ritz_values(side, |x, y| {
            y.fill(0.0);
            for (i, row) in held.chunks_exact(side).enumerate() {
                add_row(i, &row[..i], row[i], x, y);
            }
            Ok(())
        })?
    } else {
        extreme_ritz_values(side, |x, y| {
            y.fill(0.0);
            matrix.lower_rows(|i, row| add_row(i, &row[..i], row[i], x, y))
        })?
    };
    Ok(extremes.map(|(smallest, largest)| Spectrum {
        method: Method::Lanczos,
        largest,
        smallest,
        noise,
        above_noise: None,
        condition_at_noise: condition(smallest, largest, noise.unwrap_or(0.0)),
        quantiles: None,
    }))
}

/// Of a stored value, as the direct solves count it: those of 16 bits count as f32.
fn unit_roundoff(dtype: Dtype) -> f64 {
    if dtype == Dtype::F64 { 2f64.powi(-53) } else { 2f64.powi(-25) }
}

fn condition(smallest: f64, largest: f64, noise: f64) -> Option<f64> {
    let floor = smallest.max(noise);
    (floor > 0.0).then(|| largest / floor)
}

/// Of all eigenvalues, ascending.
fn whole(values: &[f64], noise: Option<f64>) -> Option<Spectrum> {
    let (smallest, largest) = (*values.first()?, *values.last()?);
    let rounding = largest * values.len() as f64 * f64::EPSILON;
    let floor = noise.unwrap_or(rounding);
    let at = |share: f64| values[((values.len() - 1) as f64 * share) as usize];
    Some(Spectrum {
        method: Method::Whole,
        largest,
        smallest,
        noise,
        above_noise: Some(values.iter().filter(|v| **v > floor).count()),
        condition_at_noise: condition(smallest, largest, noise.unwrap_or(0.0)),
        quantiles: Some(QUANTILES.into_iter().map(|(name, share)| (name, at(share))).collect()),
    })
}

/// The nonzero eigenvalues of `FᵀF` are those of `FFᵀ`.
fn of_factor(
    checkpoint: &Checkpoint,
    tensor: &TensorMeta,
    rank: usize,
    side: usize,
    max_memory: u64,
) -> Result<Option<Spectrum>, ReadError> {
    let (r, n) = (rank as u64, side as u64);
    let needed = 8 * (r * n + r * r * (1 + EIGENVALUES_SQUARES as u64));
    if rank == 0 || rank > MAX_WHOLE_SIDE || needed > max_memory {
        return Ok(None);
    }
    let mut factor = Buffer::<f64>::zeroed(rank * side);
    let mut scratch = Vec::new();
    for (k, row) in factor.chunks_exact_mut(side).enumerate() {
        let width = tensor.dtype.bits() / 8 * n;
        let bytes = checkpoint.read(tensor, k as u64 * width..(k as u64 + 1) * width, &mut scratch)?;
        decode_f64(tensor.dtype, bytes, row)?;
    }
    let f = mat(&factor, rank, side);
    let mut inner = Buffer::<f64>::zeroed(rank * rank);
    gemm(mat_mut(&mut inner, rank, rank), false, f, f.transpose(), 1.0, Threading::Parallel);
    let Ok(values) = eigenvalues(mat(&inner, rank, rank)) else { return Ok(None) };
    let mut all = vec![0.0; side - rank];
    all.extend(values);
    all.sort_by(f64::total_cmp);
    Ok(whole(&all, None))
}

/// A Gram where it is stored.
struct Stored<'a> {
    checkpoint: &'a Checkpoint,
    tensor: &'a TensorMeta,
    side: usize,
    packed: bool,
}

impl Stored<'_> {
    /// Calls `visit` with each row up to its diagonal.
    fn lower_rows(&self, mut visit: impl FnMut(usize, &[f64])) -> Result<(), ReadError> {
        let width = self.tensor.dtype.bits() / 8;
        let mut scratch = Vec::new();
        let mut row = vec![0.0; self.side];
        for i in 0..self.side {
            let start = if self.packed { i * (i + 1) / 2 } else { i * self.side } as u64;
            let range = start * width..(start + i as u64 + 1) * width;
            let bytes = self.checkpoint.read(self.tensor, range, &mut scratch)?;
            decode_f64(self.tensor.dtype, bytes, &mut row[..=i])?;
            visit(i, &row[..=i]);
        }
        self.checkpoint.release(self.tensor, 0..self.tensor.bytes, false);
        Ok(())
    }

    /// The lower triangle in a square.
    fn hold(&self) -> Result<Buffer<f64>, ReadError> {
        let mut held = Buffer::<f64>::zeroed(self.side * self.side);
        self.lower_rows(|i, row| held[i * self.side..=i * self.side + i].copy_from_slice(row))?;
        Ok(held)
    }
}

/// What row `i` of a symmetric matrix, up to its diagonal, adds to `y = A·x`.
fn add_row(i: usize, lower: &[f64], diagonal: f64, x: &[f64], y: &mut [f64]) {
    let mut sum = diagonal * x[i];
    for ((a, x_column), y_column) in lower.iter().zip(x).zip(y.iter_mut()) {
        sum += a * x_column;
        *y_column += a * x[i];
    }
    y[i] += sum;
}

/// The least and the largest Ritz value of a symmetric matrix after [`LANCZOS_STEPS`] steps with full
/// reorthogonalisation; exact where the side is no larger. They lie between the extreme eigenvalues. `apply` is `y ← A·x`.
///
/// # Source
/// Parlett, The Symmetric Eigenvalue Problem, chapters 4 (Sturm counts) and 13 (Lanczos).
fn extreme_ritz_values(
    side: usize,
    mut apply: impl FnMut(&[f64], &mut [f64]) -> Result<(), ReadError>,
) -> Result<Option<(f64, f64)>, ReadError> {
    if side == 0 {
        return Ok(None);
    }
    // Any start that no structure of a Gram is orthogonal to; the same on every run.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut start: Vec<f64> = (0..side)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1u64 << 53) as f64 - 0.5
        })
        .collect();
    let length = norm(&start);
    start.iter_mut().for_each(|v| *v /= length);

    let (mut alphas, mut betas): (Vec<f64>, Vec<f64>) = (Vec::new(), Vec::new());
    let mut basis = vec![start];
    let mut next = vec![0.0; side];
    while let Some(current) = basis.last() {
        apply(current, &mut next)?;
        alphas.push(dot(current, &next));
        if alphas.len() == side.min(LANCZOS_STEPS) {
            break;
        }
        // Twice is enough.
        for _ in 0..2 {
            for direction in &basis {
                let along = dot(direction, &next);
                next.iter_mut().zip(direction).for_each(|(v, d)| *v -= along * d);
            }
        }
        let beta = norm(&next);
        let scale = alphas.iter().fold(0f64, |scale, alpha| scale.max(alpha.abs()));
        // An invariant subspace: its Ritz values are eigenvalues.
        if beta <= scale * side as f64 * f64::EPSILON {
            break;
        }
        betas.push(beta);
        basis.push(next.iter().map(|v| v / beta).collect());
    }

    // Gershgorin's interval, then bisection on the number of eigenvalues below a point.
    let beta_at = |at: Option<usize>| at.and_then(|at| betas.get(at)).copied().unwrap_or(0.0);
    let radius = |at: usize| beta_at(at.checked_sub(1)) + beta_at(Some(at));
    let low = alphas.iter().enumerate().map(|(at, a)| a - radius(at)).fold(f64::INFINITY, f64::min);
    let high = alphas.iter().enumerate().map(|(at, a)| a + radius(at)).fold(f64::NEG_INFINITY, f64::max);
    if !(low.is_finite() && high.is_finite()) {
        return Ok(None);
    }
    let below = |point: f64| {
        let mut count = 0;
        let mut pivot = 1.0;
        for (at, alpha) in alphas.iter().enumerate() {
            let beta = beta_at(at.checked_sub(1));
            pivot = alpha - point - if at == 0 { 0.0 } else { beta * beta / pivot };
            if pivot == 0.0 {
                pivot = f64::MIN_POSITIVE;
            }
            count += usize::from(pivot < 0.0);
        }
        count
    };
    let bisect = |wanted: usize| {
        let (mut left, mut right) = (low, high);
        for _ in 0..200 {
            let middle = left + (right - left) / 2.0;
            if middle <= left || middle >= right {
                break;
            }
            if below(middle) >= wanted { right = middle } else { left = middle }
        }
        right
    };
    Ok(Some((bisect(1), bisect(alphas.len()))))
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

#[cfg(test)]
mod tests;
