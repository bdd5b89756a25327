//! Seeing a solve without steering it.

use super::stop::IterationRecord;

/// Called once before the first step and after each one. Every method has an empty default.
pub trait Observer {
    /// The state after `step.iteration` steps.
    fn iteration(&mut self, step: &IterationRecord) {
        let _ = step;
    }
}

/// Sees nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Observer for Silent {}

/// Keeps every record: for convergence plots and tests.
#[derive(Debug, Clone, Default)]
pub struct History(pub Vec<IterationRecord>);

impl Observer for History {
    fn iteration(&mut self, step: &IterationRecord) {
        self.0.push(*step);
    }
}

impl<F: FnMut(&IterationRecord)> Observer for F {
    fn iteration(&mut self, step: &IterationRecord) {
        self(step);
    }
}
