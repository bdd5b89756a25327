//! What will be done to one parameter, decided from headers alone.

use super::SourceId;
use super::elementwise::MethodStart;
use crate::config::{DeltaScale, PreconditionerKind, StopConfig};

/// A starting point, then systems solved one after the other, each from the result before it.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// Elementwise in the models.
    pub start: Start,
    /// Innermost round first; empty for plain averages and copies.
    pub solves: Vec<Solve>,
    /// Name of the outermost method, for the report.
    pub method: &'static str,
}

/// An elementwise combination of checkpoints.
#[derive(Debug, Clone, PartialEq)]
pub enum Start {
    /// All zeros.
    Zero,
    /// One checkpoint's values.
    Copy(SourceId),
    /// `Σ cᵢ θᵢ / divisor`.
    Mean {
        /// Checkpoints and coefficients, in the config's order.
        terms: Vec<(SourceId, f64)>,
        /// The sum of the coefficients, or 1.
        divisor: f64,
    },
    /// `θ₀ + scale · Σ cᵢ (θᵢ - θ₀)`.
    TaskVectors {
        /// θ₀.
        base: SourceId,
        /// Checkpoints and coefficients, in the config's order.
        terms: Vec<(SourceId, f64)>,
        /// λ, over the sum of the coefficients where they are normalised.
        scale: f64,
    },
    /// Elementwise, with passes over the tensor before.
    Method(MethodStart),
}

impl Start {
    /// As plan and report call it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Copy(_) => "checkpoint",
            Self::Mean { .. } => "mean",
            Self::TaskVectors { .. } => "task vectors",
            Self::Method(start) => start.name,
        }
    }

    /// Checkpoints it reads, each once.
    pub fn sources(&self) -> Vec<SourceId> {
        let mut sources: Vec<SourceId> = match self {
            Self::Zero => vec![],
            Self::Copy(source) => vec![*source],
            Self::Mean { terms, .. } => terms.iter().map(|t| t.0).collect(),
            Self::TaskVectors { base, terms, .. } => {
                std::iter::once(*base).chain(terms.iter().map(|t| t.0)).collect()
            }
            Self::Method(start) => start.base.into_iter().chain(start.models.iter().copied()).collect(),
        };
        sources.sort_unstable();
        sources.dedup();
        sources
    }
}

impl Recipe {
    /// Times that a start reads its checkpoints.
    pub fn passes(&self, elements: usize) -> u64 {
        match &self.start {
            Start::Zero => 0,
            Start::Method(start) => match start.method.whole() {
                Some(whole) => whole.reads(),
                None => super::elementwise::passes_over(&*start.method, elements),
            },
            _ => 1,
        }
    }

    /// The start, where it sees a weight as a matrix.
    pub(crate) fn whole_tensor(&self) -> Option<(&MethodStart, &dyn super::elementwise::WholeTensor)> {
        match &self.start {
            Start::Method(start) => start.method.whole().map(|whole| (start, whole)),
            _ => None,
        }
    }

    /// The start, where its quantities are those of the whole model.
    pub(crate) fn whole_model(&self) -> Option<&MethodStart> {
        match &self.start {
            Start::Method(start) if start.method.whole_model() => Some(start),
            _ => None,
        }
    }
}

/// One system `(Σ wᵢCᵢ + μI)(θ - θ_initial) = Σ wᵢCᵢ(θᵢ - θ_initial)`.
#[derive(Debug, Clone, PartialEq)]
pub struct Solve {
    /// The Cᵢ.
    pub system: System,
    /// Models with a weight above 0.
    pub models: Vec<SolveModel>,
    /// How.
    pub solver: SolverChoice,
    /// ρ: μ is this times the mean of the diagonal of `Σ wᵢCᵢ`.
    pub ridge: f64,
    /// Floor under a diagonal Fisher before its weight (the paper's closed form), or 0.
    pub floor: f64,
}

/// One model's part in a system.
#[derive(Debug, Clone, PartialEq)]
pub struct SolveModel {
    /// Index into the config's `models`.
    pub model: usize,
    /// Its checkpoint.
    pub source: SourceId,
    /// `wᵢ > 0`.
    pub weight: f64,
    /// λ of `λC + (1-λ)diag(C)`, on each factor.
    pub off_diagonal: f64,
}

/// Which Cᵢ, on which side.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum System {
    /// I.
    Identity,
    /// diag(Fᵢ).
    FisherDiagonal,
    /// Aᵢ on the input side.
    Gram(GramKind),
    /// Gᵢ · X · Aᵢ.
    Kfac,
}

/// Where the Aᵢ of a Gram system come from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum GramKind {
    /// `input_gram` or `input_factor`.
    Input,
    /// `fisher_block` of a vector parameter, seen as one row.
    FisherBlock,
    /// `s·τᵀτ` of the task vectors, against this base.
    Delta {
        /// θ₀.
        base: SourceId,
        /// s.
        scale: DeltaScale,
    },
}

impl System {
    /// As the config and the report call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::FisherDiagonal => "fisher_diagonal",
            Self::Gram(GramKind::Input) => "gram",
            Self::Gram(GramKind::FisherBlock) => "fisher_block",
            Self::Gram(GramKind::Delta { .. }) => "delta_gram",
            Self::Kfac => "kfac",
        }
    }
}

/// The solver of one system, with its defaults filled in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum SolverChoice {
    /// A closed form or a factorisation.
    Direct,
    /// Conjugate gradients.
    Iterative(Iteration),
}

/// Conjugate gradients with their defaults filled in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Iteration {
    /// `None` is the paper's plain CG.
    pub preconditioner: Option<PreconditionerKind>,
    /// Stop after so many steps.
    pub max_iterations: usize,
    /// What else ends it; the first that fires.
    pub stop: StopConfig,
}

/// True residuals below this are not reached by f32 vectors (measured: they end at 4e-7 of `‖b‖`).
const F32_RESIDUAL: f64 = 1e-6;

impl Iteration {
    /// Whether the accuracy asked for takes refinement with f64 residuals.
    pub fn refines(&self) -> bool {
        self.preconditioner.is_some() && self.stop.relative_residual.is_some_and(|r| r < F32_RESIDUAL)
    }
}

impl SolverChoice {
    /// As the config and the report call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Iterative(Iteration { preconditioner: None, .. }) => "cg",
            Self::Iterative(_) => "pcg",
        }
    }

    /// The preconditioner, where there is one.
    pub fn preconditioner(self) -> Option<PreconditionerKind> {
        match self {
            Self::Direct => None,
            Self::Iterative(iteration) => iteration.preconditioner,
        }
    }
}
