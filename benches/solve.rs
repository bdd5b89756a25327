//! Iterations, accuracy and time of the K-FAC solvers on synthetic factors with the spectra of real ones.
//!
//! `cargo bench --bench solve`; with `-- --test` only the smallest problem, once. A program of its own rather than
//! criterion's: what counts is what a solver reaches in its iterations, the time is beside it. Every solver starts at
//! the plain average of the models. `gap` is `‖x-x*‖²_C` relative to the average's, with `x*` a converged f64 solution:
//! 0 is the merged model that was asked for, 1 is no better than averaging.
//!
//! Factors are sample covariances (Wishart) of spectra `k^-1.5` (inputs, with a strong mean) and `k^-2` (output
//! gradients), log-normal jitter on each eigenvalue, eigenbases rotated a little from task to task.

// The table is what the program is for.
#![allow(clippy::print_stdout)]

#[path = "support/random.rs"]
mod random;

use std::time::Instant;

use mats_stream::kernel::{Threading, gemm, mat, mat_mut, vector};
use mats_stream::operator::{
    BlockShape, Factor, KroneckerSum, KroneckerTerm, LinearOperator, MemoryRows, OperatorError, OperatorSum,
    Panels, Symmetric, Workspace,
};
use mats_stream::precond::{Jacobi, NoPreconditioner, Preconditioner};
use mats_stream::solve::eigen::{Pencil, TwoTermInverse};
use mats_stream::solve::{Any, MaxIterations, RelativeResidual, Silent, StopReason, solve};
use random::Random;

const THREADING: Threading = Threading::Parallel;
/// How far each task's eigenbasis is turned away from the common one; 0 not at all, 1 about 45 degrees.
const ROTATION: f64 = 0.3;
/// Samples per dimension of a covariance: below one would leave a null space.
const SAMPLES: usize = 4;
/// Where the reference stops: its error then is far below every gap in the table.
const REFERENCE: f64 = 1e-10;

/// One parameter of several models, with everything in f64.
struct Problem {
    shape: BlockShape,
    /// Input Grams `[in, in]` and output Grams `[out, out]`.
    factors: Vec<(Vec<f64>, Vec<f64>)>,
    /// The models' weights.
    weights: Vec<Vec<f64>>,
    average: Vec<f64>,
    rhs: Vec<f64>,
    operator: KroneckerSum<f64>,
}

/// Rows orthonormal, by modified Gram and Schmidt, twice for orthogonality to rounding.
fn orthonormalise(q: &mut [f64], side: usize) {
    for i in 0..side {
        let (done, rest) = q.split_at_mut(i * side);
        let row = &mut rest[..side];
        for _ in 0..2 {
            for other in done.chunks_exact(side) {
                let dot: f64 = row.iter().zip(other).map(|(x, y)| x * y).sum();
                row.iter_mut().zip(other).for_each(|(x, y)| *x -= dot * y);
            }
        }
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        row.iter_mut().for_each(|x| *x /= norm);
    }
}

/// A sample covariance around `common` eigenvectors, row-major `[side, side]`.
fn covariance(common: &[f64], side: usize, decay: f64, mean: f64, random: &mut Random) -> Vec<f64> {
    let scale = ROTATION / (side as f64).sqrt();
    let mut basis: Vec<f64> = common.iter().map(|q| q + scale * random.normal()).collect();
    orthonormalise(&mut basis, side);
    let samples = SAMPLES * side;
    let deviations: Vec<f64> =
        (0..side).map(|k| (((k + 1) as f64).powf(-decay) * (0.5 * random.normal()).exp()).sqrt()).collect();
    let centre: Vec<f64> = random.normals(side, mean / (side as f64).sqrt());
    let mut z = random.normals(samples * side, 1.0);
    for row in z.chunks_exact_mut(side) {
        row.iter_mut().zip(&deviations).for_each(|(z, d)| *z *= d);
    }
    let mut x: Vec<f64> = (0..samples).flat_map(|_| centre.iter().copied()).collect();
    gemm(
        mat_mut(&mut x, samples, side),
        true,
        mat(&z, samples, side),
        mat(&basis, side, side),
        1.0,
        THREADING,
    );
    let mut gram = vec![0.0; side * side];
    let x = mat(&x, samples, side);
    gemm(mat_mut(&mut gram, side, side), false, x.transpose(), x, 1.0 / samples as f64, THREADING);
    // Symmetric to the last bit, as a stored triangle is.
    for i in 0..side {
        for j in 0..i {
            gram[j * side + i] = gram[i * side + j];
        }
    }
    gram
}

/// Factors at the precision of `T`: f32 is what a merge iterates in.
fn operator<T: mats_stream::kernel::Real>(
    shape: BlockShape,
    factors: &[(Vec<f64>, Vec<f64>)],
) -> Result<KroneckerSum<T>, OperatorError> {
    let held = |values: &[f64], side: usize| -> Result<Factor<T>, OperatorError> {
        let rows = MemoryRows::new(side, side, values.to_vec())?;
        Ok(Factor::Symmetric(Symmetric::new(Panels::held(&rows, THREADING)?)?))
    };
    let diagonal =
        |values: &[f64], side: usize| values.iter().step_by(side + 1).copied().collect::<Vec<f64>>();
    let BlockShape { out_features: m, in_features: n } = shape;
    let terms: Result<Vec<_>, OperatorError> = factors
        .iter()
        .map(|(a, g)| {
            let diagonals = Some((diagonal(a, n), diagonal(g, m)));
            Ok(KroneckerTerm { weight: 1.0, a: held(a, n)?, g: held(g, m)?, diagonals })
        })
        .collect();
    KroneckerSum::new(shape, terms?)
}

impl Problem {
    fn new((m, n): (usize, usize), models: usize) -> Result<Self, OperatorError> {
        let shape = BlockShape::new(m, n);
        let mut random = Random::new(2312_04339, (m * n * models) as u64);
        let mut bases = [n, m].map(|side| (side, random.normals(side * side, 1.0)));
        bases.iter_mut().for_each(|(side, q)| orthonormalise(q, *side));
        let [(_, input), (_, output)] = bases;
        let base = random.normals(m * n, 0.02);
        let mut factors = Vec::new();
        let mut weights = Vec::new();
        for _ in 0..models {
            let a = covariance(&input, n, 1.5, 2.0, &mut random);
            let g = covariance(&output, m, 2.0, 0.0, &mut random);
            factors.push((a, g));
            let task = random.normals(m * n, 0.002);
            weights.push(base.iter().zip(&task).map(|(b, t)| b + t).collect::<Vec<f64>>());
        }
        let operator = operator::<f64>(shape, &factors)?;
        let mut workspace = Workspace::new(operator.scratch_elements(), THREADING);
        let mut rhs = vec![0.0; m * n];
        let mut average = vec![0.0; m * n];
        for (k, w) in weights.iter().enumerate() {
            operator.accumulate_term(k, w, &mut rhs, &mut workspace)?;
            vector::axpy(1.0 / models as f64, w, &mut average, THREADING);
        }
        Ok(Self { shape, factors, weights, average, rhs, operator })
    }

    /// The sums of the first and of the second half of the models, inverted exactly: the solution for two models, a
    /// strong preconditioner for more.
    fn two_terms(&self) -> Result<TwoTermInverse, Box<dyn std::error::Error>> {
        let models = self.factors.len();
        type Pick = fn(&(Vec<f64>, Vec<f64>)) -> &Vec<f64>;
        let mean = |pick: Pick, range: std::ops::Range<usize>| {
            let scale = 1.0 / (range.len() as f64).sqrt();
            let mut sum = vec![0.0; pick(&self.factors[0]).len()];
            self.factors[range].iter().for_each(|f| vector::axpy(scale, pick(f), &mut sum, THREADING));
            sum
        };
        let pencil = |pick: Pick, side| {
            let mut first = mean(pick, 0..models / 2);
            let mut sum = mean(pick, models / 2..models);
            vector::axpy(1.0, &first, &mut sum, THREADING);
            Pencil::of(&mut first, &mut sum, side, 0.0, THREADING)
        };
        let a = pencil(|f| &f.0, self.shape.in_features)?;
        let g = pencil(|f| &f.1, self.shape.out_features)?;
        Ok(TwoTermInverse::new(a, g, 0.0))
    }

    /// `‖x - y‖²_C`.
    fn distance(&self, x: &[f64], y: &[f64]) -> Result<f64, OperatorError> {
        let mut d = x.to_vec();
        vector::axpy(-1.0, y, &mut d, THREADING);
        let mut cd = vec![0.0; d.len()];
        self.operator.apply(&d, &mut cd, &mut Workspace::new(self.operator.scratch_elements(), THREADING))?;
        Ok(vector::dot(&d, &cd, THREADING))
    }

    /// `‖b - C·x‖ / ‖b‖` in f64.
    fn relative_residual(&self, x: &[f64]) -> Result<f64, OperatorError> {
        let mut r = vec![0.0; x.len()];
        self.operator.apply(x, &mut r, &mut Workspace::new(self.operator.scratch_elements(), THREADING))?;
        vector::xpby(&self.rhs, -1.0, &mut r, THREADING);
        Ok((vector::dot(&r, &r, THREADING) / vector::dot(&self.rhs, &self.rhs, THREADING)).sqrt())
    }
}

/// [`TwoTermInverse`] as a preconditioner, for the reference.
struct TwoTerms(TwoTermInverse, usize);

impl Preconditioner<f64> for TwoTerms {
    fn name(&self) -> &'static str {
        "two-term"
    }
    fn scratch_elements(&self) -> usize {
        self.1
    }
    fn apply_inverse(
        &self,
        r: &[f64],
        z: &mut [f64],
        workspace: &mut Workspace<f64>,
    ) -> Result<(), OperatorError> {
        z.copy_from_slice(r);
        let (scratch, threading) = workspace.take(self.1)?;
        self.0.apply(z, scratch, threading);
        Ok(())
    }
}

/// What one solver reached.
struct Reached {
    x: Vec<f64>,
    iterations: usize,
    stop: StopReason,
    seconds: f64,
}

/// Plain or Jacobi CG in f32, factors ready: as the engine iterates.
fn iterate(
    problem: &Problem,
    operator: &KroneckerSum<f32>,
    jacobi: bool,
    tolerance: f64,
    limit: usize,
) -> Result<Reached, OperatorError> {
    let narrow = |v: &[f64]| v.iter().map(|x| *x as f32).collect::<Vec<f32>>();
    let (rhs, average) = (narrow(&problem.rhs), narrow(&problem.average));
    let started = Instant::now();
    let preconditioner: Box<dyn Preconditioner<f32>> =
        if jacobi { Box::new(Jacobi::new(operator)?) } else { Box::new(NoPreconditioner) };
    let mut rule = Any(vec![Box::new(RelativeResidual(tolerance)), Box::new(MaxIterations(limit))]);
    let solution = solve(operator, preconditioner.as_ref(), &rhs, &average, &mut rule, &mut Silent)?;
    let seconds = started.elapsed().as_secs_f64();
    let x = solution.x.iter().map(|x| f64::from(*x)).collect();
    Ok(Reached { x, iterations: solution.iterations, stop: solution.stop, seconds })
}

/// Two generalised eigendecompositions and four products, on the displacement from the average.
fn direct(problem: &Problem) -> Result<Reached, Box<dyn std::error::Error>> {
    let started = Instant::now();
    let inverse = problem.two_terms()?;
    let mut d = vec![0.0; problem.rhs.len()];
    let mut workspace = Workspace::new(problem.operator.scratch_elements(), THREADING);
    // b - C·x₀ term by term from differences of weights, which cancel less than the two large vectors would.
    for (k, w) in problem.weights.iter().enumerate() {
        let mut difference = w.clone();
        vector::axpy(-1.0, &problem.average, &mut difference, THREADING);
        problem.operator.accumulate_term(k, &difference, &mut d, &mut workspace)?;
    }
    let mut scratch = vec![0.0; d.len()];
    inverse.apply(&mut d, &mut scratch, THREADING);
    vector::axpy(1.0, &problem.average, &mut d, THREADING);
    let stop = StopReason::Direct(mats_stream::solve::DirectMethod::GeneralisedEigen);
    Ok(Reached { x: d, iterations: 0, stop, seconds: started.elapsed().as_secs_f64() })
}

/// The best time of up to `repeats` runs; what they reach is the same every time.
fn best<E>(repeats: usize, run: impl Fn() -> Result<Reached, E>) -> Result<Reached, E> {
    let mut reached = run()?;
    for _ in 1..repeats {
        reached.seconds = reached.seconds.min(run()?.seconds);
    }
    Ok(reached)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let quick = std::env::args().any(|a| a == "--test");
    let sizes: &[(usize, usize)] = if quick { &[(192, 160)] } else { &[(192, 160), (384, 320)] };
    let models: &[usize] = if quick { &[2] } else { &[2, 4, 8] };
    let repeats = if quick { 1 } else { 3 };
    println!(
        "{:<9} {:>6}  {:<22} {:>10} {:>10} {:>10} {:>9}  stop",
        "[out,in]", "models", "solver", "iterations", "residual", "gap", "seconds"
    );
    for size in sizes {
        for models in models {
            let problem = Problem::new(*size, *models)?;
            let unknowns = problem.rhs.len();
            let mut rule = Any(vec![Box::new(RelativeResidual(REFERENCE)), Box::new(MaxIterations(3000))]);
            let preconditioner = TwoTerms(problem.two_terms()?, unknowns);
            let reference = solve(
                &problem.operator,
                &preconditioner,
                &problem.rhs,
                &problem.average,
                &mut rule,
                &mut Silent,
            )?;
            let whole = problem.distance(&problem.average, &reference.x)?;
            let line = |name: &str, reached: &Reached| -> Result<(), OperatorError> {
                let gap = problem.distance(&reached.x, &reference.x)? / whole;
                println!(
                    "{:<9} {models:>6}  {name:<22} {:>10} {:>10.1e} {gap:>10.1e} {:>9.4}  {}",
                    format!("{}x{}", size.0, size.1),
                    reached.iterations,
                    problem.relative_residual(&reached.x)?,
                    reached.seconds,
                    reached.stop.name(),
                );
                Ok(())
            };
            let narrow = operator::<f32>(problem.shape, &problem.factors)?;
            for (name, jacobi, tolerance, limit) in [
                ("cg, 10 steps", false, 1e-5, 10),
                ("cg, 100 steps", false, 1e-5, 100),
                ("cg, to 1e-4", false, 1e-4, 1000),
                ("jacobi, 10 steps", true, 1e-5, 10),
                ("jacobi, 100 steps", true, 1e-5, 100),
                ("jacobi, to 1e-4", true, 1e-4, 1000),
            ] {
                // A long solve is its own average.
                let repeats = if limit > 100 { 1 } else { repeats };
                line(name, &best(repeats, || iterate(&problem, &narrow, jacobi, tolerance, limit))?)?;
            }
            if *models == 2 {
                line("direct, two models", &best(repeats, || direct(&problem))?)?;
            }
            println!(
                "{:<9} {models:>6}  {:<22} {:>10} {:>10.1e} {:>10} {:>9}  {}",
                format!("{}x{}", size.0, size.1),
                "(reference, f64)",
                reference.iterations,
                reference.relative_residual,
                "0",
                "",
                reference.stop.name()
            );
        }
    }
    Ok(())
}
