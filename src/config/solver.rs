//! Owns the meaning of `solver`: its keys, their checks and what goes with which method. Called by `parse` for each round.

use super::error::ConfigError;
use super::fields::{Field, Scope};
use super::schema::{Method, SolverConfig, SolverMethod, StopConfig};

/// Everything `solver` may hold.
pub(super) const SOLVER_KEYS: &[&str] =
    &["method", "preconditioner", "max_iterations", "tolerance", "ridge", "stop"];
/// Everything `solver.stop` may hold.
const STOP_KEYS: &[&str] = &["objective_decrease", "preconditioned_residual", "relative_residual", "seconds"];

/// Reads `solver` of a round whose `merge_method` stands on `line`.
pub(super) fn solver(scope: &Scope<'_>, method: Method, line: usize) -> Result<SolverConfig, ConfigError> {
    let default = match method {
        Method::Wudi | Method::Actmat => SolverMethod::Direct,
        _ => SolverMethod::Auto,
    };
    let mut config = SolverConfig {
        method: default,
        preconditioner: None,
        max_iterations: None,
        tolerance: None,
        ridge: None,
        stop: None,
        line,
    };
    let Some(field) = scope.field("solver") else {
        return Ok(config);
    };
    if !method.solves() {
        return Err(field.not_allowed(format!("`{}` solves nothing, so it has no solver", method.name())));
    }
    let solver = field.scope("a mapping, as `{ method: cg }`")?;
    solver.check_keys(SOLVER_KEYS, |_| None)?;
    config.line = field.line;
    if let Some(field) = solver.field("method") {
        config.method = field.word()?;
    }
    if let Some(field) = solver.field("preconditioner") {
        config.preconditioner = Some(field.word()?);
        if config.method != SolverMethod::Pcg {
            return Err(field.not_allowed(format!(
                "only `method: pcg` has a preconditioner, and the method here is {}",
                config.method.name()
            )));
        }
    }
    if let Some(field) = solver.field("max_iterations") {
        config.max_iterations =
            Some(field.integer(SolverConfig::MAX_ITERATIONS, "an integer from 0 to 1000000")?);
    }
    config.tolerance = not_negative(&solver, "tolerance")?;
    config.ridge = not_negative(&solver, "ridge")?;
    config.stop = solver.field("stop").map(|field| stop(&field, &config)).transpose()?;
    Ok(config)
}

fn not_negative(scope: &Scope<'_>, name: &str) -> Result<Option<f64>, ConfigError> {
    match scope.field(name) {
        Some(field) => field.number(|x| x >= 0.0, "a finite number of at least 0").map(Some),
        None => Ok(None),
    }
}

/// `solver.stop`.
fn stop(field: &Field<'_>, solver: &SolverConfig) -> Result<StopConfig, ConfigError> {
    if solver.method != SolverMethod::Pcg {
        return Err(field.not_allowed(format!(
            "only `method: pcg` has more than one stopping rule, and the method here is {}",
            solver.method.name()
        )));
    }
    if solver.tolerance.is_some() {
        return Err(field.not_allowed("stands in the place of `tolerance`: give one of the two"));
    }
    let scope = field.scope("a mapping, as `{ objective_decrease: 1e-3 }`")?;
    scope.check_keys(STOP_KEYS, |_| None)?;
    let stop = StopConfig {
        objective_decrease: not_negative(&scope, "objective_decrease")?,
        preconditioned_residual: not_negative(&scope, "preconditioned_residual")?,
        relative_residual: not_negative(&scope, "relative_residual")?,
        seconds: not_negative(&scope, "seconds")?,
    };
    if stop == StopConfig::default() {
        return Err(field.not_allowed("names no rule: give `objective_decrease`, say"));
    }
    Ok(stop)
}
