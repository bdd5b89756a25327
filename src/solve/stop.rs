//! When a solve is over: rules that combine, and the reason that is reported.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Known before the first step.
#[derive(Clone, Copy, Debug)]
pub struct SolveStart {
    /// `‖b‖`, the norm that relative residuals are relative to.
    pub rhs_norm: f64,
    /// `‖b - A·x₀‖`.
    pub residual_norm: f64,
    /// Number of unknowns.
    pub unknowns: usize,
}

/// State after `iteration` steps; a rule sees it before the next one.
#[derive(Clone, Copy, Debug)]
pub struct IterationRecord {
    /// Steps taken so far.
    pub iteration: usize,
    /// Norm of the recurrence residual.
    pub residual_norm: f64,
    /// The same relative to `‖b‖` (0 where both are 0).
    pub relative_residual: f64,
    /// `√⟨r, M⁻¹r⟩`.
    pub preconditioned_norm: f64,
    /// How far the last step lowered `Σ ‖x-θᵢ‖²_Cᵢ` (+ ridge): `α·⟨r, z⟩`, exact and free.
    pub decrease: f64,
    /// Sum of the decreases so far.
    pub total_decrease: f64,
}

/// Why a solve ended. Running out of iterations is an outcome, not an error.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum StopReason {
    /// The recurrence residual fell to the tolerance.
    RelativeResidual,
    /// A step's decrease of the objective fell below the tolerance.
    ObjectiveDecrease,
    /// The residual in the preconditioner's norm fell to the tolerance.
    PreconditionedResidual,
    /// The residual reached what rounding leaves of it: more than this precision gives was asked for.
    Stagnated,
    /// The last allowed step was taken.
    MaxIterations,
    /// Time ran out.
    TimeLimit,
    /// The residual is zero: nothing is left to solve.
    Solved,
    /// All operators are zero here: the initial guess stays.
    ZeroOperator,
    /// Solved directly by the named factorisation.
    Direct(DirectMethod),
    /// `⟨p, A·p⟩ ≤ 0` or not finite: the last good iterate is kept.
    NotPositiveDefinite {
        /// `⟨p, A·p⟩ / ⟨p, p⟩`.
        curvature: f64,
    },
    /// A residual or step was not finite: the last good iterate is kept.
    NotFinite,
    /// The run is being stopped from outside.
    Cancelled,
}

/// Which factorisation gave a direct solution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirectMethod {
    /// Elementwise division.
    Diagonal,
    /// f64 Cholesky.
    Cholesky,
    /// f64 Cholesky with a tiny ridge that made it succeed.
    RidgedCholesky,
    /// Eigendecomposition with a floor under the eigenvalues.
    Eigen,
    /// Two generalised eigendecompositions: a sum of two Kronecker products.
    GeneralisedEigen,
}

impl StopReason {
    /// One word for reports.
    pub fn name(&self) -> &'static str {
        match self {
            Self::RelativeResidual => "relative_residual",
            Self::ObjectiveDecrease => "objective_decrease",
            Self::PreconditionedResidual => "preconditioned_residual",
            Self::Stagnated => "stagnated",
            Self::MaxIterations => "max_iterations",
            Self::TimeLimit => "time_limit",
            Self::Solved => "solved",
            Self::ZeroOperator => "zero_operator",
            Self::Direct(DirectMethod::Diagonal) => "direct_diagonal",
            Self::Direct(DirectMethod::Cholesky) => "direct_cholesky",
            Self::Direct(DirectMethod::RidgedCholesky) => "direct_cholesky_ridged",
            Self::Direct(DirectMethod::Eigen) => "direct_eigen",
            Self::Direct(DirectMethod::GeneralisedEigen) => "direct_generalised_eigen",
            Self::NotPositiveDefinite { .. } => "not_positive_definite",
            Self::NotFinite => "not_finite",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether the solution is as good as was asked for.
    pub fn converged(&self) -> bool {
        matches!(
            self,
            Self::RelativeResidual
                | Self::ObjectiveDecrease
                | Self::PreconditionedResidual
                | Self::Solved
                | Self::ZeroOperator
                | Self::Direct(_)
        )
    }
}

/// Decides when a solve is over. Rules combine in [`Any`]; the first that fires is the reason reported.
pub trait StoppingRule: Send {
    /// Called once, before the first step.
    fn start(&mut self, start: &SolveStart) {
        let _ = start;
    }
    /// Called after `start` where a solve goes on that another process began: so long it took so far. The steps before
    /// are checked again, one by one.
    fn resumed(&mut self, elapsed: Duration) {
        let _ = elapsed;
    }
    /// `None`: take another step.
    fn check(&mut self, step: &IterationRecord) -> Option<StopReason>;
}

/// Stops when `‖r‖ ≤ tolerance · ‖b‖`: scipy's rule, relative to `b` alone.
#[derive(Clone, Copy, Debug)]
pub struct RelativeResidual(pub f64);

impl StoppingRule for RelativeResidual {
    fn check(&mut self, step: &IterationRecord) -> Option<StopReason> {
        (step.relative_residual <= self.0).then_some(StopReason::RelativeResidual)
    }
}

/// Stops after so many steps.
#[derive(Clone, Copy, Debug)]
pub struct MaxIterations(pub usize);

impl StoppingRule for MaxIterations {
    fn check(&mut self, step: &IterationRecord) -> Option<StopReason> {
        (step.iteration >= self.0).then_some(StopReason::MaxIterations)
    }
}

/// Stops when a step lowers the objective by less than this fraction of all steps so far.
#[derive(Clone, Copy, Debug)]
pub struct ObjectiveDecrease(pub f64);

impl StoppingRule for ObjectiveDecrease {
    fn check(&mut self, step: &IterationRecord) -> Option<StopReason> {
        (step.iteration > 0 && step.decrease <= self.0 * step.total_decrease)
            .then_some(StopReason::ObjectiveDecrease)
    }
}

/// Stops when `√⟨r, M⁻¹r⟩` has fallen to this fraction of its start: the residual in the norm in which a good
/// preconditioner makes all directions count alike.
#[derive(Clone, Copy, Debug)]
pub struct PreconditionedResidual {
    tolerance: f64,
    start: Option<f64>,
}

impl PreconditionedResidual {
    /// Relative to the norm before the first step.
    pub fn new(tolerance: f64) -> Self {
        Self { tolerance, start: None }
    }
}

impl StoppingRule for PreconditionedResidual {
    fn start(&mut self, _start: &SolveStart) {
        self.start = None;
    }
    fn check(&mut self, step: &IterationRecord) -> Option<StopReason> {
        let start = *self.start.get_or_insert(step.preconditioned_norm);
        (step.preconditioned_norm <= self.tolerance * start).then_some(StopReason::PreconditionedResidual)
    }
}

/// Stops where the recurrence's residual no longer is the true one.
///
/// Every update `r ← r - α·A·p` rounds by about `u·‖α·A·p‖ ≤ u·(‖rₖ‖ + ‖rₖ₊₁‖)`, and these errors stay in the true
/// residual while the recurrence's goes on falling (van der Vorst & Ye 2000). Once the recurrence is below their sum,
/// further steps change nothing that is real.
#[derive(Clone, Copy, Debug)]
pub struct Stagnation {
    unit_roundoff: f64,
    errors: f64,
    last: f64,
    /// Of the objective's decrease so far: a next step that promises less is not asked for.
    enough: Option<f64>,
}

impl Stagnation {
    /// For vectors and operators at the precision of `T`.
    pub fn of<T: crate::kernel::Real>() -> Self {
        let unit_roundoff = if T::BYTES == 4 { 2f64.powi(-24) } else { 2f64.powi(-53) };
        Self { unit_roundoff, errors: 0.0, last: 0.0, enough: None }
    }

    /// Beside [`ObjectiveDecrease`] of this tolerance, which sees a step when it is done: where there is nothing left, what
    /// the next would bring (`⟨r, M⁻¹r⟩`, for a preconditioner that fits) tells whether the goal is reached. One step solves
    /// a diagonal system, and leaves no second to compare it with.
    #[must_use]
    pub fn or_enough(self, tolerance: f64) -> Self {
        Self { enough: Some(tolerance), ..self }
    }
}

impl StoppingRule for Stagnation {
    fn start(&mut self, start: &SolveStart) {
        self.errors = 0.0;
        self.last = start.residual_norm;
    }
    fn check(&mut self, step: &IterationRecord) -> Option<StopReason> {
        if step.iteration > 0 {
            self.errors += self.unit_roundoff * (self.last + step.residual_norm);
            self.last = step.residual_norm;
        }
        if step.iteration == 0 || step.residual_norm > self.errors {
            return None;
        }
        let left = step.preconditioned_norm.powi(2);
        let enough = self.enough.is_some_and(|tolerance| left <= tolerance * step.total_decrease);
        Some(if enough { StopReason::ObjectiveDecrease } else { StopReason::Stagnated })
    }
}

/// Stops when the wall clock says so. Results then depend on the machine: not for reproducible merges.
#[derive(Clone, Copy, Debug)]
pub struct TimeLimit {
    limit: Duration,
    started: Option<Instant>,
}

impl TimeLimit {
    /// From the start of the solve, the parts before a `--resume` included.
    pub fn new(limit: Duration) -> Self {
        Self { limit, started: None }
    }
}

impl StoppingRule for TimeLimit {
    fn start(&mut self, _start: &SolveStart) {
        self.started = Some(Instant::now());
    }
    fn resumed(&mut self, elapsed: Duration) {
        // Before the clock's own beginning: all of the limit is used up.
        match self.started.and_then(|started| started.checked_sub(elapsed)) {
            Some(started) => self.started = Some(started),
            None => self.limit = Duration::ZERO,
        }
    }
    fn check(&mut self, _step: &IterationRecord) -> Option<StopReason> {
        self.started.is_some_and(|t| t.elapsed() >= self.limit).then_some(StopReason::TimeLimit)
    }
}

/// Stops when a flag is raised from outside.
#[derive(Clone, Copy, Debug)]
pub struct Cancelled<'a>(pub &'a AtomicBool);

impl StoppingRule for Cancelled<'_> {
    fn check(&mut self, _step: &IterationRecord) -> Option<StopReason> {
        self.0.load(Ordering::Relaxed).then_some(StopReason::Cancelled)
    }
}

/// The first of several rules that fires.
#[derive(Default)]
pub struct Any<'a>(pub Vec<Box<dyn StoppingRule + 'a>>);

impl StoppingRule for Any<'_> {
    fn start(&mut self, start: &SolveStart) {
        for rule in &mut self.0 {
            rule.start(start);
        }
    }
    fn resumed(&mut self, elapsed: Duration) {
        for rule in &mut self.0 {
            rule.resumed(elapsed);
        }
    }
    fn check(&mut self, step: &IterationRecord) -> Option<StopReason> {
        self.0.iter_mut().find_map(|rule| rule.check(step))
    }
}
