//! K-FAC systems to measure solvers on: real ones from a config's models and statistics, synthetic ones of any shape.
//!
//! Synthetic factors are sample covariances (Wishart) of spectra `k^-1.5` (inputs, with a strong mean) and `k^-2` (output
//! gradients), log-normal jitter on each eigenvalue, eigenbases rotated a little from task to task. Every system is the
//! displacement from the plain average of the models; each side is scaled so that its mean diagonal is one. Called by
//! `benches/solve.rs`; never by the library.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use faer::Par;
use faer::linalg::triangular_solve::solve_lower_triangular_in_place;
use mats_stream::config::MergeConfig;
use mats_stream::kernel::{Buffer, Threading, gemm, gemm_lower, mat, mat_mut, vector};
use mats_stream::operator::{
    BlockShape, Factor, KroneckerSum, KroneckerTerm, OperatorError, OperatorSum, Panels, RowSource,
    Symmetric, Workspace,
};
use mats_stream::read::{Checkpoint, IoMode, decode_f32};
use mats_stream::solve::cholesky::factorise;
use mats_stream::statistics::factor::GramRows;
use mats_stream::statistics::{Kind, ModelStatistics};

use super::random::Random;

pub(crate) const THREADING: Threading = Threading::Parallel;
/// How far each task's eigenbasis is turned away from the common one; 0 not at all, 1 about 45 degrees.
const ROTATION: f64 = 0.3;
/// Samples per dimension of a covariance: below one would leave a null space.
const SAMPLES: usize = 4;

/// One parameter of several models, as a system for the displacement from their average.
pub(crate) struct Problem {
    /// Where the factors are from.
    pub source: String,
    pub shape: BlockShape,
    /// `Σ Gᵢ⊗Aᵢ`, factors held in f32. Its mean diagonal is near the number of models.
    pub operator: KroneckerSum<f32>,
    pub a: Vec<Factor<f32>>,
    pub g: Vec<Factor<f32>>,
    /// `Σ Cᵢ(θᵢ - average)`.
    pub rhs: Vec<f32>,
    /// Mean of the operator's diagonal: a ridge ρ is a shift of ρ times this.
    pub mean: f64,
}

/// A side's factor: full, row-major, symmetric.
struct Gram {
    side: usize,
    values: Buffer<f32>,
}

impl Gram {
    fn diagonal(&self) -> Vec<f64> {
        self.values.iter().step_by(self.side + 1).map(|v| f64::from(*v)).collect()
    }
}

/// Divides all of one side by their mean diagonal: gradient Grams of 1e-12 would leave f32.
fn normalise(grams: &mut [Gram]) {
    let total: f64 = grams.iter().flat_map(Gram::diagonal).sum();
    let entries: usize = grams.iter().map(|g| g.side).sum();
    if total > 0.0 {
        let scale = entries as f64 / total;
        grams.iter_mut().for_each(|g| vector::scale(scale, &mut g.values));
    }
}

impl Problem {
    pub fn models(&self) -> usize {
        self.a.len()
    }

    /// From factors and the models' differences to their average.
    fn of(
        source: String,
        shape: BlockShape,
        mut inputs: Vec<Gram>,
        mut outputs: Vec<Gram>,
        differences: &[Vec<f32>],
    ) -> Result<Self, OperatorError> {
        normalise(&mut inputs);
        normalise(&mut outputs);
        let mut terms = Vec::new();
        let (mut a, mut g) = (Vec::new(), Vec::new());
        let mut mean = 0.0;
        for (input, output) in inputs.into_iter().zip(outputs) {
            let diagonals = (input.diagonal(), output.diagonal());
            mean += diagonals.0.iter().sum::<f64>() * diagonals.1.iter().sum::<f64>();
            let factor = |gram: Gram| -> Result<Factor<f32>, OperatorError> {
                let panels = Panels::from_buffer(gram.side, gram.side, Arc::new(gram.values));
                Ok(Factor::Symmetric(Symmetric::new(panels)?))
            };
            a.push(factor(input)?);
            g.push(factor(output)?);
            terms.push(KroneckerTerm {
                weight: 1.0,
                a: a[a.len() - 1].clone(),
                g: g[g.len() - 1].clone(),
                diagonals: Some(diagonals),
            });
        }
        let operator = KroneckerSum::new(shape, terms)?;
        use mats_stream::operator::LinearOperator as _;
        let mut workspace = Workspace::new(operator.scratch_elements(), THREADING);
        let mut rhs = vec![0.0f32; shape.elements()];
        for (k, difference) in differences.iter().enumerate() {
            operator.accumulate_term(k, difference, &mut rhs, &mut workspace)?;
        }
        Ok(Self { source, shape, operator, a, g, rhs, mean: mean / shape.elements() as f64 })
    }

    /// A synthetic problem. The same arguments give the same numbers on every machine, up to the rounding of its cores.
    pub fn synthetic(shape: BlockShape, models: usize) -> Result<Self, OperatorError> {
        let BlockShape { out_features: m, in_features: n } = shape;
        let mut random = Random::new(2312_04339, (m * n * models) as u64);
        let [input, output] = [n, m].map(|side| {
            let mut q = random.normals(side * side, 1.0);
            // Twice: a square Gaussian matrix is far from orthogonal, and the first pass squares its condition.
            orthonormalise(&mut q, side);
            orthonormalise(&mut q, side);
            q
        });
        let (mut a, mut g) = (Vec::new(), Vec::new());
        for _ in 0..models {
            a.push(covariance(&input, n, 1.5, 2.0, &mut random));
            g.push(covariance(&output, m, 2.0, 0.0, &mut random));
        }
        let tasks: Vec<Vec<f64>> = (0..models).map(|_| random.normals(m * n, 0.002)).collect();
        Self::of("synthetic".to_owned(), shape, a, g, &differences(tasks))
    }

    /// Parameters of a config's models that have both Grams: of each shape the one in the middle.
    pub fn real(config: &Path) -> Result<Vec<Self>, Box<dyn Error>> {
        let config_path = config;
        let config = MergeConfig::load(config)?;
        let mut models = Vec::new();
        for entry in &config.models {
            let statistics = Arc::new(ModelStatistics::open(&entry.statistics, IoMode::Mmap)?);
            models.push((Checkpoint::open(&entry.model.path, IoMode::Mmap)?, statistics));
        }
        let (first, statistics) = models.first().ok_or("the config names no models")?;
        let mut by_shape: Vec<(BlockShape, Vec<&str>)> = Vec::new();
        for tensor in first.tensors() {
            let both = [Kind::InputGram, Kind::OutputGram];
            if tensor.shape.len() == 2 && both.iter().all(|k| statistics.get(&tensor.name, *k).is_some()) {
                let shape = BlockShape::new(tensor.shape[0], tensor.shape[1]);
                match by_shape.iter_mut().find(|(s, _)| *s == shape) {
                    Some((_, names)) => names.push(&tensor.name),
                    None => by_shape.push((shape, vec![&tensor.name])),
                }
            }
        }
        let label = config_path.parent().and_then(Path::file_name).unwrap_or(config_path.as_os_str());
        by_shape
            .into_iter()
            .map(|(shape, names)| {
                let name = names[names.len() / 2];
                let source = format!("{}:{name}", label.to_string_lossy());
                Self::real_parameter(&models, name, shape, source)
            })
            .collect()
    }

    fn real_parameter(
        models: &[(Checkpoint, Arc<ModelStatistics>)],
        name: &str,
        shape: BlockShape,
        source: String,
    ) -> Result<Self, Box<dyn Error>> {
        let (mut a, mut g, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        for (checkpoint, statistics) in models {
            for (kind, grams) in [(Kind::InputGram, &mut a), (Kind::OutputGram, &mut g)] {
                let found =
                    statistics.get(name, kind).ok_or_else(|| format!("{name} lacks {}", kind.name()))?;
                let rows = GramRows::new(Arc::clone(statistics), found, 1.0)
                    .ok_or_else(|| format!("{name}: {} is no Gram", kind.name()))?;
                let (side, _) = rows.shape();
                // Normalised in f64, so that f32 keeps the digits of gradients of any size.
                let mut wide = vec![0.0f64; side * side];
                rows.read_f64(0..side, &mut wide)?;
                grams.push((side, wide));
            }
            let tensor = checkpoint.get(name).ok_or_else(|| format!("a model lacks {name}"))?;
            let mut values = vec![0.0f32; shape.elements()];
            decode_f32(
                tensor.dtype,
                checkpoint.read(tensor, 0..tensor.bytes, &mut Vec::new())?,
                &mut values,
            )?;
            weights.push(values.iter().map(|v| f64::from(*v)).collect());
        }
        let narrow = |grams: Vec<(usize, Vec<f64>)>| {
            let largest = grams.iter().flat_map(|(_, v)| v).fold(f64::MIN_POSITIVE, |m, v| m.max(v.abs()));
            grams.into_iter().map(|(side, values)| gram(side, &values, 1.0 / largest)).collect()
        };
        Ok(Self::of(source, shape, narrow(a), narrow(g), &differences(weights))?)
    }
}

fn gram(side: usize, values: &[f64], scale: f64) -> Gram {
    let mut narrow = Buffer::<f32>::zeroed(side * side);
    narrow.iter_mut().zip(values).for_each(|(n, v)| *n = (scale * v) as f32);
    Gram { side, values: narrow }
}

/// Each model's weights less their average.
fn differences(mut weights: Vec<Vec<f64>>) -> Vec<Vec<f32>> {
    let count = weights.len() as f64;
    let mut average = vec![0.0; weights.first().map_or(0, Vec::len)];
    weights.iter().for_each(|w| vector::axpy(1.0 / count, w, &mut average, THREADING));
    weights
        .iter_mut()
        .map(|w| w.iter().zip(&average).map(|(w, average)| (w - average) as f32).collect())
        .collect()
}

/// Rows orthonormal, as Gram and Schmidt's process leaves them: `L⁻¹·Q` with `Q·Qᵀ = L·Lᵀ`.
fn orthonormalise(q: &mut [f64], side: usize) {
    let mut products = vec![0.0; side * side];
    let rows = mat(q, side, side);
    gemm_lower(mat_mut(&mut products, side, side), false, rows, rows.transpose(), 1.0, THREADING);
    factorise(&mut products, side, THREADING).expect("random rows are linearly independent");
    solve_lower_triangular_in_place(mat(&products, side, side), mat_mut(q, side, side), Par::Seq);
}

/// A sample covariance around `common` eigenvectors, uncentred.
///
/// Drawn without its samples (Bartlett): the scatter of ν samples is `XᵀX/ν` with `X = Lᵀ·diag(σ)·V`, L lower triangular,
/// `Lᵢᵢ² ~ χ²(ν-1-i)`, normals below. The sample mean is independent of it.
fn covariance(common: &[f64], side: usize, decay: f64, mean: f64, random: &mut Random) -> Gram {
    let scale = ROTATION / (side as f64).sqrt();
    let mut basis: Vec<f64> = common.iter().map(|q| q + scale * random.normal()).collect();
    orthonormalise(&mut basis, side);
    let samples = SAMPLES * side;
    for (k, row) in basis.chunks_exact_mut(side).enumerate() {
        let variance = ((k + 1) as f64).powf(-decay) * (0.5 * random.normal()).exp();
        row.iter_mut().for_each(|v| *v *= variance.sqrt());
    }
    // Lᵀ, row-major: upper triangular.
    let mut upper = vec![0.0; side * side];
    for i in 0..side {
        let freedom = (samples - 1 - i) as f64;
        // Of so many degrees of freedom χ is normal for all purposes.
        upper[i * side + i] = (freedom - 0.5).sqrt() + random.normal() / std::f64::consts::SQRT_2;
        upper[i * side + i + 1..(i + 1) * side].iter_mut().for_each(|v| *v = random.normal());
    }
    let mut x = vec![0.0; side * side];
    let product = (mat(&upper, side, side), mat(&basis, side, side));
    gemm(mat_mut(&mut x, side, side), false, product.0, product.1, 1.0 / (samples as f64).sqrt(), THREADING);
    drop(upper);
    // The sample mean in the basis: the centre, and what the samples add to it. Rows of `basis` hold σ already.
    let centre = random.normals(side, mean / (side as f64).sqrt());
    let weights = random.normals(side, 1.0 / (samples as f64).sqrt());
    let mut sample_mean = centre;
    for (row, weight) in basis.chunks_exact(side).zip(&weights) {
        vector::axpy(*weight, row, &mut sample_mean, Threading::Sequential);
    }
    let mut values = basis;
    let x = mat(&x, side, side);
    gemm_lower(mat_mut(&mut values, side, side), false, x.transpose(), x, 1.0, THREADING);
    let mut narrow = Buffer::<f32>::zeroed(side * side);
    for i in 0..side {
        for j in 0..=i {
            let value = (values[i * side + j] + sample_mean[i] * sample_mean[j]) as f32;
            // Symmetric to the last bit, as a stored triangle is.
            narrow[i * side + j] = value;
            narrow[j * side + i] = value;
        }
    }
    Gram { side, values: narrow }
}
