//! What a recipe costs, from its shapes.

use crate::merge::{
    Inputs, Iteration, Recipe, Solve, SolverChoice, System, apply_flops, kronecker_kind, rotates,
    two_term_flops,
};
use crate::operator::BlockShape;
use crate::precond::{KroneckerKind, cost};

/// Upper bound of a recipe's flops, from its shapes: setting up included.
pub(super) fn flops(inputs: &Inputs, tensor: &str, shape: BlockShape, recipe: &Recipe) -> f64 {
    let (m, n) = (shape.out_features as f64, shape.in_features as f64);
    let mut total = recipe.start.sources().len() as f64 * 2.0 * m * n;
    if let Some((start, whole)) = recipe.whole_tensor() {
        total += whole.flops(shape, start.models.len());
    }
    for solve in &recipe.solves {
        let models = solve.models.len() as f64;
        let one = match solve.system {
            System::Identity | System::FisherDiagonal => 4.0 * models * m * n,
            System::Gram(_) => 2.0 * m * n * n,
            System::Kfac => apply_flops(shape, solve.models.len()),
        };
        total += match (solve.solver, solve.system) {
            (SolverChoice::Iterative(iteration), system) => {
                let steps = iteration.max_iterations as f64;
                let (setup, step) = preconditioner_flops(inputs, tensor, solve, shape, &iteration);
                // Right-hand side and true residual take an application each beside the initial one, by terms.
                let ends = if matches!(system, System::Gram(_)) { 2.0 * models + 1.0 } else { 3.0 };
                setup + (steps + ends) * one + steps * step
            }
            (SolverChoice::Direct, System::Gram(_)) => one * (2.0 * models + 2.0) + n * n * n / 3.0,
            (SolverChoice::Direct, System::Kfac) => two_term_flops(shape, solve.ridge > 0.0),
            (SolverChoice::Direct, _) => one,
        };
    }
    total
}

/// Flops of making a solve's preconditioner, and of applying it once.
fn preconditioner_flops(
    inputs: &Inputs,
    tensor: &str,
    solve: &Solve,
    shape: BlockShape,
    iteration: &Iteration,
) -> (f64, f64) {
    let (m, n) = (shape.out_features, shape.in_features);
    let Some(kind) = kronecker_kind(iteration.preconditioner) else { return (0.0, 0.0) };
    let sides: &[(usize, usize)] = match solve.system {
        System::Identity | System::FisherDiagonal => &[],
        System::Gram(_) => &[(n, m)],
        System::Kfac if kind == KroneckerKind::Hybrid && m < n => &[(m, n)],
        System::Kfac if kind == KroneckerKind::Hybrid && n < m => &[(n, m)],
        System::Kfac => &[(n, m), (m, n)],
    };
    let rotated = solve.system == System::Kfac && rotates(inputs, tensor, solve, shape);
    let models = solve.models.len();
    let setup = sides.iter().map(|(side, _)| cost::side_flops(kind, *side, models, rotated)).sum();
    let products: f64 = sides.iter().map(|(side, other)| 4.0 * (side * side * other) as f64).sum();
    if rotated { (setup + products, 0.0) } else { (setup, products) }
}
