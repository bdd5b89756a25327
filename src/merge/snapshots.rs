//! When the state of a long conjugate gradient solve is kept, and how it is written: [`crate::write::SolvePlace`] has the
//! file. Called by `iterative`; knows nothing of what is solved.

use std::time::{Duration, Instant};

use super::MergeError;
use crate::operator::OperatorError;
use crate::solve::{CgState, IterationRecord, Snapshots, SolveStart};
use crate::write::{SolvePlace, WriteError, fault};

/// Between two states at least.
const LEAST_INTERVAL: Duration = Duration::from_secs(30);
/// And so many times as long as the last one took: writing them stays a twentieth of the time.
const INTERVAL_FACTOR: u32 = 20;
/// ρ, ‖r‖², seconds, nanoseconds.
const HEAD_WORDS: usize = 4;
/// Of one step.
const STEP_WORDS: usize = 6;

/// Keeps the states of one solve.
pub(super) struct Keeper<'a> {
    place: SolvePlace<'a>,
    max_iterations: usize,
    shift: f64,
    last: Instant,
    cost: Duration,
    /// Steps that the state which is kept has.
    kept: usize,
    /// Spent by the runs before.
    pub before: Duration,
}

impl<'a> Keeper<'a> {
    /// For a solve with `shift` added to its operator.
    pub fn new(place: SolvePlace<'a>, max_iterations: usize, shift: f64) -> Self {
        let (cost, before) = (Duration::ZERO, Duration::ZERO);
        Self { place, max_iterations, shift, last: Instant::now(), cost, kept: 0, before }
    }

    /// Removes the state of a solve that ended without a result.
    pub fn discard(&self, start: &SolveStart) {
        self.place.discard(self.number(start));
    }

    /// Tells the solves of one tensor apart, and notices where a start is no longer what it was: bits of its norms.
    fn number(&self, start: &SolveStart) -> u64 {
        let words = [
            start.rhs_norm.to_bits(),
            start.residual_norm.to_bits(),
            start.unknowns as u64,
            self.shift.to_bits(),
        ];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        twox_hash::XxHash3_64::oneshot(&bytes)
    }
}

fn encode(state: &CgState) -> Vec<u64> {
    let head = [
        state.rho.to_bits(),
        state.rr.to_bits(),
        state.elapsed.as_secs(),
        u64::from(state.elapsed.subsec_nanos()),
    ];
    let step = |s: &IterationRecord| -> [u64; STEP_WORDS] {
        [
            s.iteration as u64,
            s.residual_norm.to_bits(),
            s.relative_residual.to_bits(),
            s.preconditioned_norm.to_bits(),
            s.decrease.to_bits(),
            s.total_decrease.to_bits(),
        ]
    };
    head.into_iter().chain(state.steps.iter().flat_map(step)).collect()
}

/// `None` if these are no words of a state.
fn decode(words: &[u64]) -> Option<CgState> {
    let (head, steps) = words.split_first_chunk::<HEAD_WORDS>()?;
    let steps: Vec<IterationRecord> = steps
        .chunks_exact(STEP_WORDS)
        .enumerate()
        .map(|(k, s)| {
            let step = IterationRecord {
                iteration: usize::try_from(s[0]).ok()?,
                residual_norm: f64::from_bits(s[1]),
                relative_residual: f64::from_bits(s[2]),
                preconditioned_norm: f64::from_bits(s[3]),
                decrease: f64::from_bits(s[4]),
                total_decrease: f64::from_bits(s[5]),
            };
            (step.iteration == k).then_some(step)
        })
        .collect::<Option<_>>()?;
    let nanoseconds = u32::try_from(head[3]).ok().filter(|nanoseconds| *nanoseconds < 1_000_000_000)?;
    let whole = words.len() == HEAD_WORDS + STEP_WORDS * steps.len() && steps.len() > 1;
    whole.then(|| CgState {
        rho: f64::from_bits(head[0]),
        rr: f64::from_bits(head[1]),
        elapsed: Duration::new(head[2], nanoseconds),
        steps,
    })
}

fn failed(error: WriteError) -> OperatorError {
    OperatorError::Source(Box::new(MergeError::Write(error)))
}

impl Snapshots<f32> for Keeper<'_> {
    fn restore(
        &mut self,
        start: &SolveStart,
        vectors: [&mut [f32]; 3],
    ) -> Result<Option<CgState>, OperatorError> {
        let most_words = HEAD_WORDS + STEP_WORDS * self.max_iterations.saturating_add(1);
        let bytes = vectors.map(bytemuck::cast_slice_mut);
        let usable = |words: &[u64]| decode(words).is_some();
        let read = self.place.read(self.number(start), most_words, bytes, &usable).map_err(failed)?;
        let Some(state) = read.as_deref().and_then(decode) else { return Ok(None) };
        tracing::info!(
            "tensor `{}`: going on after step {}",
            self.place.tensor_name(),
            state.steps.len() - 1
        );
        (self.kept, self.before) = (state.steps.len(), state.elapsed);
        Ok(Some(state))
    }

    fn offer(
        &mut self,
        start: &SolveStart,
        state: &CgState,
        vectors: [&[f32]; 3],
        last: bool,
    ) -> Result<(), OperatorError> {
        let due = fault::named("solve.often")
            || self.last.elapsed() >= LEAST_INTERVAL.max(INTERVAL_FACTOR * self.cost);
        if (due || last) && state.steps.len() > self.kept.max(1) {
            let started = Instant::now();
            let bytes = vectors.map(bytemuck::cast_slice);
            self.place.write(self.number(start), &encode(state), bytes).map_err(failed)?;
            self.kept = state.steps.len();
            self.cost = started.elapsed();
            self.last = Instant::now();
        }
        fault::point("solve.step").map_err(|source| {
            failed(WriteError::Io { path: self.place.tensor_name().into(), doing: "take a step", source })
        })
    }
}

/// Bytes of disk that the states of one solve take at most: the one that is kept and the one that is written.
pub(crate) fn disk_bytes(elements: usize, max_iterations: usize) -> u64 {
    let words = HEAD_WORDS as u64 + STEP_WORDS as u64 * (max_iterations as u64 + 1);
    2 * (3 * 4 * elements as u64 + 8 * words + 4096)
}

/// Bytes of memory that the steps of a solve take: for the report, and for its states.
pub(crate) fn step_bytes(max_iterations: usize) -> u64 {
    let step = size_of::<crate::report::StepReport>() + size_of::<IterationRecord>();
    step as u64 * (max_iterations as u64).saturating_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_read_back_bit_for_bit() {
        let step = |iteration| IterationRecord {
            iteration,
            residual_norm: 0.1 + iteration as f64,
            relative_residual: f64::NAN,
            preconditioned_norm: -0.0,
            decrease: f64::MIN_POSITIVE / 2.0,
            total_decrease: f64::INFINITY,
        };
        let state = CgState {
            rr: 1.0 / 3.0,
            rho: f64::EPSILON,
            steps: (0..4).map(step).collect(),
            elapsed: Duration::new(77, 999_999_999),
        };
        let words = encode(&state);
        assert_eq!(encode(&decode(&words).unwrap()), words);
        for bad in [&words[..3], &words[..words.len() - 1], &words[..10], &[]] {
            assert!(decode(bad).is_none());
        }
        let mut swapped = words.clone();
        swapped[HEAD_WORDS] = 1;
        assert!(decode(&swapped).is_none());
    }
}
