//! A stopping rule of one's own: stop when the steps have not lowered the objective by a tenth of its fall so far for
//! three steps in a row. Rules combine; the first that fires is the reason that is told.
//!
//! `cargo run --release --example custom_stopping_rule`

#![allow(clippy::print_stdout, reason = "the output is what the example is for")]

use mats_stream::kernel::Buffer;
use mats_stream::operator::{BlockShape, Diagonal, OperatorError};
use mats_stream::precond::NoPreconditioner;
use mats_stream::solve::{
    Any, History, IterationRecord, MaxIterations, RelativeResidual, SolveStart, StopReason, StoppingRule,
    solve,
};

/// Patience: so many steps in a row that gain less than `fraction` of everything gained before.
struct Patience {
    fraction: f64,
    patience: usize,
    slow: usize,
}

impl StoppingRule for Patience {
    fn start(&mut self, _: &SolveStart) {
        self.slow = 0;
    }
    fn check(&mut self, step: &IterationRecord) -> Option<StopReason> {
        let slow = step.iteration > 0 && step.decrease < self.fraction * step.total_decrease;
        self.slow = if slow { self.slow + 1 } else { 0 };
        (self.slow >= self.patience).then_some(StopReason::ObjectiveDecrease)
    }
}

fn main() -> Result<(), OperatorError> {
    let n = 1000;
    let mut diagonal = Buffer::<f64>::zeroed(n);
    diagonal.iter_mut().enumerate().for_each(|(k, d)| *d = 1.0 / (1.0 + k as f64));
    let operator = Diagonal::new(BlockShape::new(1, n), vec![diagonal])?;
    let rhs = vec![1.0; n];
    let mut history = History::default();
    let mut rule = Any(vec![
        Box::new(RelativeResidual(1e-10)),
        Box::new(Patience { fraction: 0.1, patience: 3, slow: 0 }),
        Box::new(MaxIterations(500)),
    ]);
    let found = solve(&operator, &NoPreconditioner, &rhs, &vec![0.0; n], &mut rule, &mut history)?;
    for step in &history.0 {
        println!(
            "{:>3}  residual {:.2e}  objective fell by {:.3e}",
            step.iteration, step.relative_residual, step.total_decrease
        );
    }
    println!("stopped after {} steps: {}", found.iterations, found.stop.name());
    Ok(())
}
