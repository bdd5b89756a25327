//! KnOTS (Stoica et al. 2024, arXiv:2410.19735): task vectors in one common basis, merged there.
//!
//! Of each 2-D weight the task vectors side by side, `[τ₁ … τ_T] = U·Σ·[V₁ᵀ … V_Tᵀ]`, give one left basis U for all tasks;
//! a task's coordinates are `Cₜ = Uᵀ·τₜ = Σ·Vₜᵀ`. These are trimmed to the ⌊density·n⌋ largest (of equal ones the first) and
//! merged elementwise, by TIES' election of signs or, with `inner: linear`, by their weighted sum; either is divided by
//! the weights that count unless `normalize: false`. The result is `θ₀ + λ · U·C`. Made for LoRA adapters (`base+adapter`):
//! the fewer the directions of all tasks together, the more they share.
//!
//! The paper's code trims the coordinates of all weights together; here each weight is trimmed by itself. Embeddings and
//! what is not 2-D get the mean of the task vectors, times λ. Singular vectors of equal singular values are any basis of
//! their space, here as in the paper.

use faer::MatRef;

use super::combine::{DENSITY, LAMBDA, NORMALIZE};
use super::whole::{NULL, OnWeights, ReadTask, WholeError, WholeTensor, gram_values};
use super::{Arguments, BaseUse, Definition, Elementwise};
use crate::config::{ParameterSpec, Range};
use crate::kernel::{Buffer, Threading, gemm, mat, mat_mut};
use crate::operator::BlockShape;
use crate::solve::eigen::Eigen;

pub(super) static DEFINITION: Definition = Definition {
    name: "knots",
    base: BaseUse::Required,
    models: (1, usize::MAX),
    parameters: &[
        ParameterSpec::number("weight", Range::Any).per_model(),
        DENSITY,
        NORMALIZE,
        LAMBDA,
        ParameterSpec::word("inner", &["ties", "linear"]),
    ],
    build,
};

#[derive(Debug)]
struct Knots {
    weights: Vec<f64>,
    density: Vec<f64>,
    normalize: bool,
    /// Signs are elected.
    ties: bool,
    lambda: f64,
}

fn build(arguments: &Arguments<'_>) -> Result<Box<dyn Elementwise>, String> {
    let weights = arguments.numbers("weight", 1.0);
    let normalize = arguments.boolean("normalize", true);
    let ties = arguments.word("inner", "ties") == "ties";
    let (sum, size) = (weights.iter().sum::<f64>(), weights.iter().map(|w| w.abs()).sum::<f64>());
    if normalize && !ties && sum.abs() <= 1e-12 * size {
        return Err(format!(
            "the weights {weights:?} sum to 0, and their sum divides (`normalize: false` sums)"
        ));
    }
    let lambda = arguments.number("lambda", 1.0);
    let density = arguments.numbers("density", 1.0);
    let knots = Knots { weights, density, normalize, ties, lambda };
    Ok(OnWeights::boxed(lambda, arguments.is_linear().then_some(knots)))
}

impl Knots {
    /// Sets all but the ⌊density·n⌋ largest to 0, one at least kept. `scratch` is as long as `values`.
    fn trim(values: &mut [f64], density: f64, scratch: &mut [f64]) {
        if density >= 1.0 || values.is_empty() {
            return;
        }
        if density <= 0.0 {
            values.fill(0.0);
            return;
        }
        let take = ((density * values.len() as f64) as usize).max(1);
        for (s, v) in scratch.iter_mut().zip(&*values) {
            *s = v.abs();
        }
        let (_, least, above) = scratch.select_nth_unstable_by(values.len() - take, f64::total_cmp);
        let least = *least;
        // Of those that equal the least one kept, the first.
        let mut equal = take - above.iter().filter(|v| **v > least).count();
        for v in values {
            let kept = v.abs() > least || v.abs() == least && equal > 0;
            equal -= usize::from(kept && v.abs() == least);
            if !kept {
                *v = 0.0;
            }
        }
    }

    /// Merges coordinates `[task][len]`, `stride` apart, into `out`.
    fn combine(&self, coordinates: &[f64], stride: usize, out: &mut [f64]) {
        for (k, out) in out.iter_mut().enumerate() {
            let values =
                || self.weights.iter().enumerate().map(|(t, w)| (coordinates[t * stride + k] * w, *w));
            let vote: f64 = values().map(|(value, _)| value).sum();
            let (mut sum, mut weight) = (0.0, 0.0);
            for (value, w) in values() {
                if !self.ties || (vote >= 0.0 && value > 0.0) || (vote < 0.0 && value < 0.0) {
                    sum += value;
                    weight += w;
                }
            }
            *out = self.lambda * if self.normalize && weight != 0.0 { sum / weight } else { sum };
        }
    }
}

/// The common left basis, rows orthonormal, and its number of directions; the tasks `[m, n]`, one after the other, are
/// replaced by their coordinates `[count, n]`.
fn align(
    tasks: &mut [f64],
    (m, n): (usize, usize),
    models: usize,
    scratch: &mut [f64],
    threading: Threading,
) -> Result<(Buffer<f64>, usize), WholeError> {
    let high = m > models * n;
    let side = if high { models * n } else { m };
    let mut gram = Buffer::<f64>::zeroed(side * side);
    if high {
        for s in 0..models {
            for t in 0..=s {
                let block = &mut scratch[..n * n];
                let (left, right) = (mat(&tasks[s * m * n..], m, n), mat(&tasks[t * m * n..], m, n));
                gemm(mat_mut(block, n, n), false, left.transpose(), right, 1.0, threading);
                for (i, row) in block.chunks_exact(n).enumerate() {
                    let at = (s * n + i) * side + t * n;
                    gram[at..at + n].copy_from_slice(row);
                }
            }
        }
    } else {
        for t in 0..models {
            let task = mat(&tasks[t * m * n..], m, n);
            gemm(mat_mut(&mut gram, m, m), true, task, task.transpose(), 1.0, threading);
        }
    }
    let eigen = Eigen::of(mat(&gram, side, side))?;
    drop(gram);
    // Descending, without null directions.
    let floor = NULL * eigen.values.last().copied().unwrap_or(0.0);
    let kept = eigen.values.iter().filter(|v| **v > floor).count();
    let mut basis = Buffer::<f64>::zeroed(side * kept);
    let directions = (0..kept).map(|k| side - 1 - k);
    for (row, from) in basis.chunks_exact_mut(side.max(1)).zip(directions.clone()) {
        row.copy_from_slice(&eigen.vectors[from * side..(from + 1) * side]);
    }
    if !high {
        coordinates(tasks, mat(&basis, kept, m), n, scratch, threading);
        return Ok((basis, kept));
    }
    // The rows are right vectors here: U = Σₜ τₜ·Vₜ / σ. Cₜ is σ·Vₜᵀ, but for rounding noise where a task has a column of
    // zeros, and noise has a sign that votes: so Cₜ = Uᵀτₜ.
    let sigma: Vec<f64> = directions.map(|from| eigen.values[from].sqrt()).collect();
    drop(eigen);
    let mut left = Buffer::<f64>::zeroed(kept * m);
    for t in 0..models {
        let part = mat(&basis, kept, side).subcols(t * n, n);
        let task = mat(&tasks[t * m * n..], m, n);
        gemm(mat_mut(&mut left, kept, m), true, part, task.transpose(), 1.0, threading);
    }
    for (row, sigma) in left.chunks_exact_mut(m).zip(&sigma) {
        row.iter_mut().for_each(|v| *v /= sigma);
    }
    coordinates(tasks, mat(&left, kept, m), n, scratch, threading);
    Ok((left, kept))
}

/// Replaces every task `[m, n]` by its coordinates `[count, n]` in a basis `[count, m]`, `count ≤ m`.
fn coordinates(
    tasks: &mut [f64],
    basis: MatRef<'_, f64>,
    n: usize,
    scratch: &mut [f64],
    threading: Threading,
) {
    let (count, m) = (basis.nrows(), basis.ncols());
    let product = &mut scratch[..count * n];
    for task in tasks.chunks_exact_mut((m * n).max(1)) {
        gemm(mat_mut(product, count, n), false, basis, mat(task, m, n), 1.0, threading);
        task[..count * n].copy_from_slice(product);
    }
}

impl WholeTensor for Knots {
    fn reads(&self) -> u64 {
        1
    }

    fn memory_bytes(&self, shape: BlockShape, models: usize) -> u64 {
        let (m, n, models) = (shape.out_features as u64, shape.in_features as u64, models as u64);
        let side = m.min(models * n);
        // All tasks, the result, a product; both bases and the Gram.
        8 * ((models + 2) * m * n + side * (m + side) + gram_values(side))
    }

    fn flops(&self, shape: BlockShape, models: usize) -> f64 {
        let (m, n, models) = (shape.out_features as f64, shape.in_features as f64, models as f64);
        let side = m.min(models * n);
        2.0 * models * m * n * side * 2.0 + 9.0 * side.powi(3) + 2.0 * m * n * side
    }

    fn merge_whole(
        &self,
        shape: BlockShape,
        models: usize,
        read: &mut ReadTask<'_>,
        threading: Threading,
        out: &mut [f64],
    ) -> Result<(), WholeError> {
        let (m, n) = (shape.out_features, shape.in_features);
        let mut tasks = Buffer::<f64>::zeroed(models * m * n);
        for (t, task) in tasks.chunks_exact_mut((m * n).max(1)).enumerate() {
            read(t, 0, task)?;
        }
        if tasks.iter().all(|v| *v == 0.0) {
            out.fill(0.0);
            return Ok(());
        }
        let mut scratch = Buffer::<f64>::zeroed(m * n);
        let (basis, kept) = align(&mut tasks, (m, n), models, &mut scratch, threading)?;
        let len = kept * n;
        for (task, density) in tasks.chunks_exact_mut(m * n).zip(&self.density) {
            Self::trim(&mut task[..len], *density, &mut scratch[..len]);
        }
        let merged = &mut scratch[..len];
        self.combine(&tasks, m * n, merged);
        let (basis, merged) = (mat(&basis, kept, m), mat(merged, kept, n));
        gemm(mat_mut(out, m, n), false, basis.transpose(), merged, 1.0, threading);
        Ok(())
    }
}
