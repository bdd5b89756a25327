//! An operator of one's own in the solver, without a checkpoint: a diagonal Fisher plus a low-rank part,
//! `C·x = f ∘ x + Fᵀ(F·x)`, of which the diagonal makes a good preconditioner.
//!
//! `cargo run --release --example custom_operator`

#![allow(clippy::print_stdout, reason = "the output is what the example is for")]

use mats_stream::operator::{BlockShape, LinearOperator, OperatorError, Properties, Workspace};
use mats_stream::precond::{Jacobi, NoPreconditioner, Preconditioner};
use mats_stream::solve::{Any, MaxIterations, RelativeResidual, Silent, solve};

/// `diag(f) + FᵀF` on blocks of one row; `F` is `[rank, d]`.
struct DiagonalPlusLowRank {
    diagonal: Vec<f64>,
    rows: Vec<Vec<f64>>,
}

impl LinearOperator<f64> for DiagonalPlusLowRank {
    fn shape(&self) -> BlockShape {
        BlockShape::new(1, self.diagonal.len())
    }
    fn properties(&self) -> Properties {
        Properties::SPSD
    }
    fn flops(&self) -> f64 {
        (2 + 4 * self.rows.len()) as f64 * self.diagonal.len() as f64
    }
    fn apply(&self, x: &[f64], y: &mut [f64], _: &mut Workspace<f64>) -> Result<(), OperatorError> {
        for ((y, x), f) in y.iter_mut().zip(x).zip(&self.diagonal) {
            *y = f * x;
        }
        for row in &self.rows {
            let along: f64 = row.iter().zip(x).map(|(r, x)| r * x).sum();
            for (y, r) in y.iter_mut().zip(row) {
                *y += along * r;
            }
        }
        Ok(())
    }
    /// Known cheaply, so [`Jacobi`] can use it.
    fn diagonal(&self, d: &mut [f64]) -> Result<(), OperatorError> {
        for (k, d) in d.iter_mut().enumerate() {
            *d = self.diagonal[k] + self.rows.iter().map(|row| row[k] * row[k]).sum::<f64>();
        }
        Ok(())
    }
}

fn main() -> Result<(), OperatorError> {
    let d = 2000;
    // Eigenvalues over six decades, and three strong directions.
    let operator = DiagonalPlusLowRank {
        diagonal: (0..d).map(|k| 10f64.powf(-6.0 * k as f64 / d as f64)).collect(),
        rows: (1..4).map(|r| (0..d).map(|k| 1e-2 * (k as f64 * f64::from(r)).sin()).collect()).collect(),
    };
    let rhs: Vec<f64> = (0..d).map(|k| (k as f64 * 0.1).cos()).collect();
    let jacobi = Jacobi::new(&operator)?;
    let preconditioners: [&dyn Preconditioner<f64>; 2] = [&NoPreconditioner, &jacobi];
    for preconditioner in preconditioners {
        let mut rule = Any(vec![Box::new(RelativeResidual(1e-8)), Box::new(MaxIterations(5000))]);
        let found = solve(&operator, preconditioner, &rhs, &vec![0.0; d], &mut rule, &mut Silent)?;
        println!(
            "{:<8} {:>5} steps, residual {:.1e}, {}",
            preconditioner.name(),
            found.iterations,
            found.relative_residual,
            found.stop.name()
        );
    }
    Ok(())
}
