//! The solvers that `benches/solve.rs` compares, and what each reached after every matvec.

use std::error::Error;

use mats_stream::kernel::Buffer;
use mats_stream::operator::{Damped, Factor, LinearOperator, Workspace};
use mats_stream::precond::{
    Jacobi, Kronecker, KroneckerKind, NoPreconditioner, Preconditioner, Rotated, Side,
};
use mats_stream::solve::{
    Any, CgVectors, IterationRecord, MaxIterations, SolveStart, Stagnation, StopReason, StoppingRule,
    conjugate_gradients,
};

use super::clock::now;
use super::problems::{Problem, THREADING};

/// What is made before the first step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contender {
    /// The paper's conjugate gradients.
    Plain,
    Jacobi,
    /// A Kronecker form applied by products at every step.
    Applied(KroneckerKind),
    /// The system moved into the eigenbases once.
    Rotated,
}

impl Contender {
    pub const ALL: [Self; 7] = [
        Self::Applied(KroneckerKind::Eigen),
        Self::Plain,
        Self::Jacobi,
        Self::Rotated,
        Self::Applied(KroneckerKind::Cholesky),
        Self::Applied(KroneckerKind::Generalized),
        Self::Applied(KroneckerKind::Hybrid),
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Jacobi => "jacobi",
            Self::Applied(kind) => kind.name(),
            Self::Rotated => "kronecker, rotated",
        }
    }
}

/// After each step, the first before any: seconds since the first began, and how far the objective fell.
pub(crate) type Steps = Vec<(f64, f64)>;

/// One solve, step by step.
#[derive(Clone, Debug)]
pub(crate) struct Trace {
    pub contender: Contender,
    pub ridge: f64,
    /// Everything before the first step, moving into the bases and back included.
    pub setup_seconds: f64,
    /// The same, and that of a step, in applications of the operator, by flops.
    pub setup_matvecs: f64,
    pub step_matvecs: f64,
    /// Vectors and what the preconditioner holds; the factors themselves not.
    pub bytes: u64,
    pub steps: Steps,
    pub stop: StopReason,
}

/// A gap as first reached.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reached {
    pub matvecs: usize,
    /// Set-up included.
    pub seconds: f64,
    /// Set-up and preconditioning included, in applications of the operator.
    pub work: f64,
}

impl Trace {
    /// Steps taken.
    pub fn iterations(&self) -> usize {
        self.steps.len() - 1
    }

    /// Of the whole solve.
    pub fn seconds(&self) -> f64 {
        self.setup_seconds + self.steps.last().map_or(0.0, |s| s.0)
    }

    /// How far the objective fell in all.
    pub fn total(&self) -> f64 {
        self.steps.last().map_or(0.0, |s| s.1)
    }

    /// `(f(x_k) - f*) / (f(x_0) - f*)`, where the objective can fall by `whole` in all.
    pub fn gap(&self, step: usize, whole: f64) -> f64 {
        (whole - self.steps[step].1) / whole
    }

    pub fn reached(&self, gap: f64, whole: f64) -> Option<Reached> {
        let matvecs = (0..self.steps.len()).find(|k| self.gap(*k, whole) <= gap)?;
        let seconds = self.setup_seconds + self.steps[matvecs].0;
        Some(Reached { matvecs, seconds, work: self.setup_matvecs + matvecs as f64 * self.step_matvecs })
    }
}

/// When a solve has nothing left to show.
pub(crate) enum Until {
    /// The objective has fallen so far.
    Decrease(f64),
    /// Five steps together lowered it by less than this fraction.
    Flat(f64),
}

impl StoppingRule for Until {
    fn check(&mut self, step: &IterationRecord) -> Option<StopReason> {
        let done = match self {
            Self::Decrease(goal) => step.total_decrease >= *goal,
            // Steps fall off geometrically, so the last one stands for the next few.
            Self::Flat(fraction) => {
                step.iteration > 5 && 5.0 * step.decrease < *fraction * step.total_decrease
            }
        };
        done.then_some(StopReason::ObjectiveDecrease)
    }
}

/// Bases of both sides, where they do not depend on the ridge: made once, timed once.
pub(crate) struct Bases {
    sides: Option<(Side<f32>, Side<f32>)>,
    seconds: f64,
}

fn weighted(factors: &[Factor<f32>]) -> Vec<(f64, &Factor<f32>)> {
    factors.iter().map(|f| (1.0, f)).collect()
}

impl Contender {
    pub fn bases(self, problem: &Problem) -> Result<Bases, Box<dyn Error>> {
        let started = now();
        let (a, g) = (weighted(&problem.a), weighted(&problem.g));
        let sides = match self {
            Self::Plain | Self::Jacobi | Self::Applied(KroneckerKind::Cholesky) => None,
            Self::Applied(kind) => Some(Side::pair(kind, &a, &g, 0.0, THREADING)?),
            Self::Rotated => {
                let (a, g) =
                    rayon::join(|| Side::eigen(&a, true, THREADING), || Side::eigen(&g, true, THREADING));
                Some((a?, g?))
            }
        };
        Ok(Bases { sides, seconds: now() - started })
    }

    /// Solves for the displacement with a ridge, at most `limit` steps.
    pub fn run(
        self,
        problem: &Problem,
        bases: &Bases,
        ridge: f64,
        until: Until,
        limit: usize,
    ) -> Result<Trace, Box<dyn Error>> {
        let Problem { shape, operator, mean, .. } = problem;
        let shape = *shape;
        let shift = ridge * mean;
        let weights = vec![1.0; problem.models()];
        let mut r = Buffer::<f32>::zeroed(shape.elements());
        r.copy_from_slice(&problem.rhs);
        let mut t = Buffer::<f32>::zeroed(shape.elements());
        let started = now();
        let sides = || bases.sides.clone().ok_or("this one has no bases");
        let mut rotated = None;
        let preconditioner: Box<dyn Preconditioner<f32>> = match self {
            Self::Plain => Box::new(NoPreconditioner),
            Self::Jacobi => Box::new(Jacobi::new(&Damped::new(operator, shift))?),
            Self::Applied(KroneckerKind::Cholesky) => {
                Box::new(Kronecker::new(KroneckerKind::Cholesky, operator, shift, THREADING)?)
            }
            Self::Applied(kind) => {
                let (a, g) = sides()?;
                Box::new(Kronecker::of_sides(kind, shape, a, g, &weights, shift, THREADING)?)
            }
            Self::Rotated => {
                let (a, g) = sides()?;
                let system = Rotated::new(shape, a, g, &weights, (1.0, 1.0))?;
                let scaling = system.scaling(shift, THREADING);
                system.enter(&mut r, &mut t, THREADING);
                rotated = Some(system);
                Box::new(scaling)
            }
        };
        let mut setup_seconds = bases.seconds + now() - started;
        let system = rotated.as_ref().map_or(operator, Rotated::operator);
        let (steps, stop) =
            iterate(&Damped::new(system, shift), preconditioner.as_ref(), &mut r, until, limit)?;
        let cost = preconditioner.setup_cost();
        let mut setup_flops = cost.flops;
        if let Some(system) = &rotated {
            let started = now();
            system.leave(&mut r, &mut t, THREADING);
            setup_seconds += now() - started;
            // There and back: four products.
            let (m, n) = (shape.out_features as f64, shape.in_features as f64);
            setup_flops += 4.0 * m * n * (m + n);
        }
        let vectors = if preconditioner.is_identity() { 4 } else { 5 };
        Ok(Trace {
            contender: self,
            ridge,
            setup_seconds,
            setup_matvecs: setup_flops / operator.flops(),
            step_matvecs: 1.0 + preconditioner.flops() / operator.flops(),
            bytes: cost.bytes + (vectors * shape.elements() * size_of::<f32>()) as u64,
            steps,
            stop,
        })
    }
}

/// Time and decrease after each step.
fn iterate(
    operator: &dyn LinearOperator<f32>,
    preconditioner: &dyn Preconditioner<f32>,
    r: &mut [f32],
    until: Until,
    limit: usize,
) -> Result<(Steps, StopReason), Box<dyn Error>> {
    let [mut d, mut p, mut q] = std::array::from_fn(|_| Buffer::<f32>::zeroed(r.len()));
    let mut z = Buffer::<f32>::zeroed(if preconditioner.is_identity() { 0 } else { r.len() });
    let scratch = operator.scratch_elements().max(preconditioner.scratch_elements());
    let mut workspace = Workspace::new(scratch, THREADING);
    let norm = mats_stream::kernel::vector::dot(r, r, THREADING).sqrt();
    let start = SolveStart { rhs_norm: norm, residual_norm: norm, unknowns: r.len() };
    let mut rule =
        Any(vec![Box::new(until), Box::new(Stagnation::of::<f32>()), Box::new(MaxIterations(limit))]);
    let vectors = CgVectors { d: &mut d, r, p: &mut p, q: &mut q, z: &mut z };
    let mut steps = Vec::new();
    let started = now();
    let outcome = conjugate_gradients(
        operator,
        preconditioner,
        vectors,
        &start,
        &mut rule,
        &mut workspace,
        &mut |step, _| steps.push((now() - started, step.total_decrease)),
    )?;
    Ok((steps, outcome.stop))
}
