//! Solver × operator × condition, against dense solutions in f64.

use super::*;
use crate::kernel::{mat, mat_mut};
use crate::operator::{BlockShape, Diagonal};
use crate::precond::{Jacobi, NoPreconditioner};

fn operator(values: &[f64]) -> Diagonal<f64> {
    let mut d = Buffer::zeroed(values.len());
    d.copy_from_slice(values);
    Diagonal::new(BlockShape::new(1, values.len()), vec![d]).unwrap()
}

/// Eigenvalues from 1 down to 1/condition, evenly on a log scale.
fn spectrum(n: usize, condition: f64) -> Vec<f64> {
    (0..n).map(|k| condition.powf(-(k as f64) / (n - 1) as f64)).collect()
}

#[test]
fn a_table_of_conditions() {
    let n = 60;
    for (condition, steps, tolerance) in [(1.0, 1, 1e-14), (1e3, 200, 1e-9), (1e8, 4000, 1e-4)] {
        let values = spectrum(n, condition);
        let a = operator(&values);
        let want: Vec<f64> = (0..n).map(|k| (k as f64 * 0.37).cos()).collect();
        let rhs: Vec<f64> = want.iter().zip(&values).map(|(x, d)| x * d).collect();
        let preconditioners: [&dyn Preconditioner<f64>; 2] = [&NoPreconditioner, &Jacobi::new(&a).unwrap()];
        for preconditioner in preconditioners {
            let mut rule = Any(vec![Box::new(RelativeResidual(1e-14)), Box::new(MaxIterations(steps))]);
            let solution = solve(&a, preconditioner, &rhs, &vec![0.0; n], &mut rule, &mut Silent).unwrap();
            assert!(solution.stop.converged(), "{condition} {:?}", solution.stop);
            // A residual of 1e-14·‖b‖ bounds the error by 1e-14·condition·‖b‖.
            for (got, want) in solution.x.iter().zip(&want) {
                assert!(
                    (got - want).abs() < tolerance,
                    "{condition} {}: {got} {want}",
                    preconditioner.name()
                );
            }
        }
    }
}

#[test]
fn a_singular_system_keeps_the_null_space_of_the_guess() {
    let a = operator(&[2.0, 0.0, 4.0]);
    let mut rule = Any(vec![Box::new(RelativeResidual(1e-14)), Box::new(MaxIterations(9))]);
    let solution =
        solve(&a, &NoPreconditioner, &[2.0, 0.0, 8.0], &[5.0, 7.0, -1.0], &mut rule, &mut Silent).unwrap();
    assert_eq!(solution.x[1], 7.0);
    assert!((solution.x[0] - 1.0).abs() < 1e-14 && (solution.x[2] - 2.0).abs() < 1e-14);
}

#[test]
fn an_indefinite_operator_stops_with_its_curvature_and_the_best_iterate() {
    let a = operator(&[1.0, -1.0]);
    let mut rule = MaxIterations(10);
    // The first direction has curvature 0 + …: r = (1, 2), ⟨r, A r⟩ = 1 - 4 < 0.
    let solution = solve(&a, &NoPreconditioner, &[1.0, 2.0], &[0.0, 0.0], &mut rule, &mut Silent).unwrap();
    assert_eq!(solution.stop, StopReason::NotPositiveDefinite { curvature: -0.6 });
    assert_eq!(solution.x, [0.0, 0.0]);
    assert_eq!(solution.iterations, 0);
}

#[test]
fn not_finite_values_stop_the_solve() {
    let a = operator(&[1.0, 2.0]);
    let mut rule = MaxIterations(10);
    let solution =
        solve(&a, &NoPreconditioner, &[f64::NAN, 2.0], &[0.5, 0.5], &mut rule, &mut Silent).unwrap();
    assert_eq!(solution.stop, StopReason::NotFinite);
    assert_eq!(solution.x, [0.5, 0.5]);
}

#[test]
fn the_objective_falls_at_every_step_by_what_is_recorded() {
    let n = 40;
    let values = spectrum(n, 1e4);
    let a = operator(&values);
    let rhs: Vec<f64> = (0..n).map(|k| 1.0 + (k as f64).sin()).collect();
    let objective = |x: &[f64]| -> f64 {
        x.iter().zip(&values).zip(&rhs).map(|((x, d), b)| d * x * x - 2.0 * b * x).sum()
    };
    let mut last = 0.0;
    for steps in 1..12 {
        let mut history = History::default();
        let solution =
            solve(&a, &NoPreconditioner, &rhs, &vec![0.0; n], &mut MaxIterations(steps), &mut history)
                .unwrap();
        let now = objective(&solution.x);
        assert!(now <= last);
        // α⟨r,r⟩ is the exact decrease: f64 rounding of sums of 40 terms.
        assert!((now + solution.total_decrease).abs() < 1e-12 * now.abs());
        assert_eq!(history.0.len(), steps + 1);
        last = now;
    }
}

#[test]
fn the_tolerance_is_relative_to_b_and_tested_before_each_step() {
    let a = operator(&[1.0, 1.0]);
    let mut rule = Any(vec![Box::new(RelativeResidual(0.5)), Box::new(MaxIterations(10))]);
    // b = (10, 0), x₀ = (6, 0): the residual 4 is below 5 already.
    let solution = solve(&a, &NoPreconditioner, &[10.0, 0.0], &[6.0, 0.0], &mut rule, &mut Silent).unwrap();
    assert_eq!((solution.stop, solution.iterations), (StopReason::RelativeResidual, 0));
}

/// The dense oracle of a Gram solve: `X·S = B` by Cholesky, against CG on the same system.
#[test]
fn cholesky_and_cg_agree_on_a_gram_system() {
    use crate::operator::{GramSum, GramTerm, MemoryRows, Panels, Symmetric};
    let (m, n) = (5, 12);
    let f: Vec<f64> = (0..20 * n).map(|k| ((k * k % 97) as f64) / 97.0 - 0.5).collect();
    let mut s = vec![0.0; n * n];
    let view = mat(&f, 20, n);
    crate::kernel::gemm(mat_mut(&mut s, n, n), false, view.transpose(), view, 1.0, Threading::Sequential);
    let rhs: Vec<f64> = (0..m * n).map(|k| (k as f64 * 1.3).sin()).collect();
    let rows = std::sync::Arc::new(MemoryRows::new(n, n, s.clone()).unwrap());
    let factor = crate::operator::Factor::Symmetric(Symmetric::new(Panels::streamed(rows)).unwrap());
    let a =
        GramSum::<f64>::new(BlockShape::new(m, n), vec![GramTerm { weight: 1.0, a: factor, diagonal: None }])
            .unwrap();
    let mut rule = Any(vec![Box::new(RelativeResidual(1e-13)), Box::new(MaxIterations(500))]);
    let solution = solve(&a, &NoPreconditioner, &rhs, &vec![0.0; m * n], &mut rule, &mut Silent).unwrap();
    let mut direct = rhs.clone();
    cholesky::factorise(&mut s, n, Threading::Sequential).unwrap();
    cholesky::solve_right(&s, n, &mut direct, Threading::Sequential);
    let size = direct.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    for (got, want) in solution.x.iter().zip(&direct) {
        // The condition of 20 samples in 12 dimensions stays below 1e4.
        assert!((got - want).abs() < 1e-8 * size, "{got} {want}");
    }
}

#[test]
fn rules_combine_and_the_first_that_fires_is_told() {
    let n = 50;
    let values = spectrum(n, 1e4);
    let a = operator(&values);
    let rhs: Vec<f64> = (0..n).map(|k| 1.0 + (k as f64).sin()).collect();
    let run = |rule: Box<dyn StoppingRule>| {
        let mut rule = Any(vec![rule, Box::new(MaxIterations(500))]);
        let mut history = History::default();
        let solution = solve(&a, &NoPreconditioner, &rhs, &vec![0.0; n], &mut rule, &mut history).unwrap();
        (solution, history.0)
    };
    let (solution, history) = run(Box::new(PreconditionedResidual::new(1e-3)));
    assert_eq!(solution.stop, StopReason::PreconditionedResidual);
    let last = history.last().unwrap();
    assert!(last.preconditioned_norm <= 1e-3 * history[0].preconditioned_norm);
    assert!(history[history.len() - 2].preconditioned_norm > 1e-3 * history[0].preconditioned_norm);

    let (solution, history) = run(Box::new(ObjectiveDecrease(1e-2)));
    assert_eq!(solution.stop, StopReason::ObjectiveDecrease);
    let last = history.last().unwrap();
    assert!(last.decrease <= 1e-2 * last.total_decrease);

    let (solution, _) = run(Box::new(TimeLimit::new(std::time::Duration::ZERO)));
    assert_eq!((solution.stop, solution.iterations), (StopReason::TimeLimit, 0));
    assert!(!solution.stop.converged());
}

/// In f32 the recurrence's residual falls for ever while the true one ends at rounding: the rule ends the solve where they
/// part, and does not call it converged.
/// One exact step leaves nothing for a second: the solve is over, not stuck.
#[test]
fn what_one_step_solves_has_converged() {
    let n = 50;
    let mut values = Buffer::<f32>::zeroed(n);
    values.iter_mut().enumerate().for_each(|(k, v)| *v = 0.3 + k as f32);
    let operator = Diagonal::new(BlockShape::new(1, n), vec![values]).unwrap();
    let jacobi = Jacobi::new(&operator).unwrap();
    let rhs: Vec<f32> = (0..n).map(|k| (k as f32 * 0.37).cos()).collect();
    let run = |stagnation| {
        let mut rule =
            Any(vec![Box::new(ObjectiveDecrease(1e-5)), Box::new(stagnation), Box::new(MaxIterations(9))]);
        solve(&operator, &jacobi, &rhs, &vec![0.0; n], &mut rule, &mut Silent).unwrap()
    };
    let alone = run(Stagnation::of::<f32>());
    let beside = run(Stagnation::of::<f32>().or_enough(1e-5));
    assert_eq!((alone.stop, beside.stop), (StopReason::Stagnated, StopReason::ObjectiveDecrease));
    assert_eq!((alone.iterations, alone.x), (beside.iterations, beside.x));
}

#[test]
fn stagnation_is_recognised_and_refinement_goes_past_it() {
    let n = 200;
    let values = spectrum(n, 1e5);
    let wide = operator(&values);
    let mut narrow = Buffer::<f32>::zeroed(n);
    narrow.iter_mut().zip(&values).for_each(|(n, v)| *n = *v as f32);
    let narrow = Diagonal::new(BlockShape::new(1, n), vec![narrow]).unwrap();
    let want: Vec<f64> = (0..n).map(|k| (k as f64 * 0.37).cos()).collect();
    let rhs: Vec<f64> = want.iter().zip(&values).map(|(x, d)| x * d).collect();
    let rhs32: Vec<f32> = rhs.iter().map(|v| *v as f32).collect();
    let mut rule = Any(vec![
        Box::new(RelativeResidual(1e-12)),
        Box::new(Stagnation::of::<f32>()),
        Box::new(MaxIterations(5000)),
    ]);
    let solution = solve(&narrow, &NoPreconditioner, &rhs32, &vec![0.0; n], &mut rule, &mut Silent).unwrap();
    assert_eq!(solution.stop, StopReason::Stagnated);
    assert!(!solution.stop.converged());
    // As far as f32 goes: rounding x alone leaves 2^-24.
    assert!(solution.relative_residual < 1e-5, "{}", solution.relative_residual);

    let goal = RefineGoal { relative_residual: 1e-13, max_iterations: 5000 };
    let refined = refine(&wide, &narrow, &NoPreconditioner, &rhs, &vec![0.0; n], goal, &mut Silent).unwrap();
    assert_eq!(refined.outcome.stop, StopReason::RelativeResidual);
    assert!(refined.outcome.relative_residual <= 1e-13 && refined.outcome.rounds > 1);
    for (got, want) in refined.x.iter().zip(&want) {
        // 1e-13·‖b‖ over the least eigenvalue 1e-5.
        assert!((got - want).abs() < 1e-6, "{got} {want}");
    }

    // A floor that no round passes: a right-hand side outside the range.
    let singular = operator(&[1.0, 0.0]);
    let mut flat = Buffer::<f32>::zeroed(2);
    flat[0] = 1.0;
    let flat = Diagonal::new(BlockShape::new(1, 2), vec![flat]).unwrap();
    let refined = refine(
        &singular,
        &flat,
        &NoPreconditioner,
        &[1.0, 1.0],
        &[0.0, 0.0],
        RefineGoal { relative_residual: 1e-10, max_iterations: 100 },
        &mut Silent,
    )
    .unwrap();
    assert!(!refined.outcome.stop.converged());
    assert!(refined.x.iter().all(|x| x.is_finite()));
}

/// Keeps every state in memory, and hands one on.
#[derive(Default)]
struct InMemory {
    kept: Vec<(CgState, [Vec<f64>; 3])>,
    from: Option<(CgState, [Vec<f64>; 3])>,
}

impl Snapshots<f64> for InMemory {
    fn restore(
        &mut self,
        _start: &SolveStart,
        vectors: [&mut [f64]; 3],
    ) -> Result<Option<CgState>, OperatorError> {
        let Some((state, kept)) = self.from.take() else { return Ok(None) };
        for (vector, kept) in vectors.into_iter().zip(&kept) {
            vector.copy_from_slice(kept);
        }
        Ok(Some(state))
    }

    fn offer(
        &mut self,
        _start: &SolveStart,
        state: &CgState,
        vectors: [&[f64]; 3],
        _last: bool,
    ) -> Result<(), OperatorError> {
        self.kept.push((state.clone(), vectors.map(<[f64]>::to_vec)));
        Ok(())
    }
}

/// The rules whose state is in the steps, for 1000 steps at most.
fn stateful_rule(seconds: f64) -> Any<'static> {
    Any(vec![
        Box::new(PreconditionedResidual::new(1e-7)),
        Box::new(Stagnation::of::<f64>()),
        Box::new(TimeLimit::new(std::time::Duration::from_secs_f64(seconds))),
        Box::new(MaxIterations(1000)),
    ])
}

#[test]
fn a_solve_that_goes_on_from_any_step_takes_the_same_ones() {
    let n = 60;
    let values = spectrum(n, 1e5);
    let a = operator(&values);
    let skewed = operator(&values.iter().map(|v| v.powf(0.4)).collect::<Vec<_>>());
    let jacobi = Jacobi::new(&skewed).unwrap();
    let preconditioners: [&dyn Preconditioner<f64>; 2] = [&NoPreconditioner, &jacobi];
    let start = SolveStart { rhs_norm: (n as f64).sqrt(), residual_norm: (n as f64).sqrt(), unknowns: n };
    for preconditioner in preconditioners {
        let run = |memory: &mut InMemory, seconds: f64| {
            // What is restored replaces everything but the right-hand side's norms.
            let [mut d, mut r, mut p, mut q, mut z] = std::array::from_fn(|_| vec![1.0; n]);
            let vectors = CgVectors { d: &mut d, r: &mut r, p: &mut p, q: &mut q, z: &mut z };
            let mut seen = Vec::new();
            let outcome = conjugate_gradients_from(
                &a,
                preconditioner,
                vectors,
                &start,
                &mut stateful_rule(seconds),
                &mut Workspace::new(0, Threading::Sequential),
                Some(memory),
                &mut |step, _| {
                    seen.push((step.iteration, step.residual_norm.to_bits(), step.decrease.to_bits()))
                },
            )
            .unwrap();
            (outcome, d, seen)
        };
        let mut memory = InMemory::default();
        let whole = run(&mut memory, 3600.0);
        assert!(
            whole.0.iterations > 10 && whole.0.stop == StopReason::PreconditionedResidual,
            "{:?}",
            whole.0
        );
        assert_eq!(memory.kept.len(), whole.0.iterations);
        for kept in memory.kept.clone() {
            let mut memory = InMemory { from: Some(kept), ..InMemory::default() };
            assert_eq!(run(&mut memory, 3600.0), whole);
        }
        // Time that the parts before have used up is used up.
        let (mut state, vectors) = memory.kept[4].clone();
        state.elapsed = std::time::Duration::from_secs(7200);
        let displacement = vectors[0].clone();
        let mut memory = InMemory { from: Some((state, vectors)), ..InMemory::default() };
        let (outcome, d, _) = run(&mut memory, 3600.0);
        assert_eq!((outcome.stop, outcome.iterations), (StopReason::TimeLimit, 5));
        assert_eq!(d, displacement);
    }
}
