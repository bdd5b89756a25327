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

/// The preconditioner against the dense inverse: with one model it is exact, ridge included, so one step solves; with
/// several it leads to the same solution in fewer.
#[test]
fn the_kronecker_preconditioner_solves_one_model_at_once_and_several_sooner() {
    use crate::operator::{Damped, Factor, KroneckerSum, KroneckerTerm, MemoryRows, Panels, Symmetric};
    use crate::precond::{Basis, Kronecker};
    let (m, n) = (11, 17);
    // Power-law spectra in bases that differ a little from model to model.
    let gram = |side: usize, model: usize| -> Vec<f64> {
        let f: Vec<f64> = (0..side * side)
            .map(|k| {
                let (i, j) = (k / side, k % side);
                let shared = ((i * 7 + j * 13 + i * j) % 23) as f64 / 23.0 - 0.5;
                let own = ((k * (31 + model) + model) % 29) as f64 / 29.0 - 0.5;
                (shared + 0.3 * own) * 1e6f64.powf(-(i as f64) / (2.0 * side as f64))
            })
            .collect();
        let mut s = vec![0.0; side * side];
        let view = mat(&f, side, side);
        crate::kernel::gemm(
            mat_mut(&mut s, side, side),
            false,
            view.transpose(),
            view,
            1.0,
            Threading::Sequential,
        );
        s
    };
    let factor = |side: usize, s: &[f64]| -> Factor<f64> {
        let rows = std::sync::Arc::new(MemoryRows::new(side, side, s.to_vec()).unwrap());
        Factor::Symmetric(Symmetric::new(Panels::streamed(rows)).unwrap())
    };
    let shape = BlockShape::new(m, n);
    let rhs: Vec<f64> = (0..m * n).map(|k| (k as f64 * 0.7).sin()).collect();
    for models in [1, 4] {
        let grams: Vec<_> = (0..models).map(|k| (gram(m, k), gram(n, k + 10))).collect();
        let terms = grams
            .iter()
            .map(|(g, a)| KroneckerTerm { weight: 1.0, a: factor(n, a), g: factor(m, g), diagonals: None })
            .collect();
        let operator = KroneckerSum::new(shape, terms).unwrap();
        let shift = 1e-4;
        let damped = Damped::new(&operator, shift);
        type Pick = fn(&(Vec<f64>, Vec<f64>)) -> &[f64];
        let basis = |side: usize, pick: Pick| {
            let mut sum = vec![0.0; side * side];
            for pair in &grams {
                for (s, v) in sum.iter_mut().zip(pick(pair)) {
                    *s += *v;
                }
            }
            let eigen = eigen::Eigen::of(mat(&sum, side, side)).unwrap();
            let diagonal = |s: &[f64]| -> Vec<f64> {
                eigen
                    .vectors
                    .chunks_exact(side)
                    .map(|q| (0..side * side).map(|k| q[k / side] * s[k] * q[k % side]).sum())
                    .collect()
            };
            let diagonals: Vec<_> = grams.iter().map(|pair| diagonal(pick(pair))).collect();
            (std::sync::Arc::new(Basis::new(eigen.vectors, side, Threading::Sequential)), diagonals)
        };
        let (g, dg) = basis(m, |pair| &pair.0);
        let (a, da) = basis(n, |pair| &pair.1);
        let mut diagonal = Buffer::zeroed(m * n);
        for (k, d) in diagonal.iter_mut().enumerate() {
            *d = shift + (0..models).map(|i| dg[i][k / n] * da[i][k % n]).sum::<f64>();
        }
        let preconditioner = Kronecker::new(shape, Some(a), Some(g), diagonal).unwrap();
        let run = |preconditioner: &dyn Preconditioner<f64>, steps: usize| {
            let mut rule = Any(vec![Box::new(RelativeResidual(1e-10)), Box::new(MaxIterations(steps))]);
            solve(&damped, preconditioner, &rhs, &vec![0.0; m * n], &mut rule, &mut Silent).unwrap()
        };
        if models == 1 {
            assert_eq!(run(&preconditioner, 2).iterations, 1);
            continue;
        }
        // Another way to the same solution: residuals of 1e-10 of systems of condition 1e10 at most.
        let (with, without) = (run(&preconditioner, 2000), run(&NoPreconditioner, 20_000));
        assert!(with.stop.converged() && with.iterations < without.iterations);
        let size = without.x.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        for (x, y) in with.x.iter().zip(&without.x) {
            assert!((x - y).abs() < 1e-2 * size, "{x} {y}");
        }
        assert!((with.total_decrease - without.total_decrease).abs() < 1e-6 * without.total_decrease);
    }
}
