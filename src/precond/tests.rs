//! Every Kronecker preconditioner × number of models × condition, against dense solutions in f64; out ≠ in throughout.

use super::*;
use crate::kernel::{Threading, vector};
use crate::operator::{
    BlockShape, Damped, Factor, KroneckerSum, KroneckerTerm, LinearOperator, MemoryRows, OperatorSum, Panels,
    Symmetric,
};
use crate::solve::pencil::{Pencil, TwoTermInverse};
use crate::solve::{
    Any, MaxIterations, RefineGoal, RelativeResidual, Silent, StopReason, cholesky, refine, solve,
};

const KINDS: [KroneckerKind; 4] =
    [KroneckerKind::Eigen, KroneckerKind::Cholesky, KroneckerKind::Generalized, KroneckerKind::Hybrid];
const M: usize = 13;
const N: usize = 17;

fn random(len: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 33) as f64) / f64::from(1u32 << 31) - 0.5
        })
        .collect()
}

/// `Σ λₖ qₖqₖᵀ` with λ from 1 down to 1/condition and bases that differ a little from model to model.
fn gram(side: usize, condition: f64, shared: u64, own: u64) -> Vec<f64> {
    let mut q = random(side * side, shared);
    for (q, o) in q.iter_mut().zip(random(side * side, own)) {
        *q += 0.3 * o;
    }
    for i in 0..side {
        let (done, rest) = q.split_at_mut(i * side);
        let row = &mut rest[..side];
        for _ in 0..2 {
            for other in done.chunks_exact(side) {
                let dot: f64 = row.iter().zip(other).map(|(x, y)| x * y).sum();
                row.iter_mut().zip(other).for_each(|(x, y)| *x -= dot * y);
            }
        }
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        row.iter_mut().for_each(|x| *x /= norm);
    }
    let mut s = vec![0.0; side * side];
    for (k, q) in q.chunks_exact(side).enumerate() {
        let value = condition.powf(-(k as f64) / (side - 1) as f64);
        for i in 0..side {
            for j in 0..side {
                s[i * side + j] += value * q[i] * q[j];
            }
        }
    }
    s
}

fn factor<T: Real>(side: usize, s: &[f64]) -> Factor<T> {
    let rows = MemoryRows::new(side, side, s.to_vec()).unwrap();
    Factor::Symmetric(Symmetric::new(Panels::held(&rows, Threading::Sequential).unwrap()).unwrap())
}

/// `(weight, A, G)` of each model.
type Factors = Vec<(f64, Vec<f64>, Vec<f64>)>;

fn factors(models: usize, condition: f64) -> Factors {
    (0..models as u64)
        .map(|k| (0.5 + k as f64, gram(N, condition, 1, 100 + k), gram(M, condition.sqrt(), 2, 200 + k)))
        .collect()
}

fn operator<T: Real>(factors: &Factors) -> KroneckerSum<T> {
    let terms = factors
        .iter()
        .map(|(weight, a, g)| KroneckerTerm {
            weight: *weight,
            a: factor(N, a),
            g: factor(M, g),
            diagonals: None,
        })
        .collect();
    KroneckerSum::new(BlockShape::new(M, N), terms).unwrap()
}

/// `(Σ w G⊗A + shift·I)⁻¹ b` by Cholesky of the dense matrix.
fn dense_solution(factors: &Factors, shift: f64, b: &[f64]) -> Vec<f64> {
    let size = M * N;
    let mut c = vec![0.0; size * size];
    for (w, a, g) in factors {
        for row in 0..size {
            for column in 0..size {
                c[row * size + column] += w * g[row / N * M + column / N] * a[row % N * N + column % N];
            }
        }
    }
    c.iter_mut().step_by(size + 1).for_each(|d| *d += shift);
    cholesky::factorise(&mut c, size, Threading::Sequential).unwrap();
    let mut x = b.to_vec();
    cholesky::solve_right(&c, size, &mut x, Threading::Sequential);
    x
}

#[test]
fn every_kind_leads_to_the_dense_solution_in_fewer_steps() {
    let b = random(M * N, 7);
    for condition in [1e1, 1e4] {
        for models in [1, 2, 4] {
            let factors = factors(models, condition);
            let operator = operator::<f64>(&factors);
            for shift in [0.0, 1e-4, 0.1] {
                let damped = Damped::new(&operator, shift);
                let want = dense_solution(&factors, shift, &b);
                let size = want.iter().fold(0.0f64, |m, v| m.max(v.abs()));
                let run = |preconditioner: &dyn Preconditioner<f64>| {
                    let mut rule =
                        Any(vec![Box::new(RelativeResidual(1e-12)), Box::new(MaxIterations(20_000))]);
                    solve(&damped, preconditioner, &b, &vec![0.0; M * N], &mut rule, &mut Silent).unwrap()
                };
                let plain = run(&NoPreconditioner);
                for kind in KINDS {
                    let preconditioner =
                        Kronecker::new(kind, &operator, shift, Threading::Sequential).unwrap();
                    assert_eq!(preconditioner.name(), kind.name());
                    let found = run(&preconditioner);
                    let what = format!(
                        "{} N={models} condition {condition:e} shift {shift}: {} against {}",
                        kind.name(),
                        found.iterations,
                        plain.iterations
                    );
                    assert!(found.stop.converged(), "{what} {:?}", found.stop);
                    // A residual of 1e-12·‖b‖ of a system of condition 1e6 at most (1e4 on one side, 1e2 on the other).
                    for (got, want) in found.x.iter().zip(&want) {
                        assert!((got - want).abs() < 1e-5 * size, "{what}: {got} {want}");
                    }
                    // Where there is something to gain. A hybrid promises nothing where the long side's basis is not
                    // near the unit vectors, as here.
                    if condition > 1e3 && shift < 0.1 && kind != KroneckerKind::Hybrid {
                        assert!(found.iterations * 2 < plain.iterations, "{what}");
                    }
                    match (kind, models, shift) {
                        // The eigenbases make one model's operator diagonal, ridge included.
                        (KroneckerKind::Eigen, 1, _) => assert!(found.iterations <= 2, "{what}"),
                        (KroneckerKind::Cholesky, 1, 0.0) => assert!(found.iterations <= 2, "{what}"),
                        (KroneckerKind::Generalized, 1 | 2, 0.0) => assert!(found.iterations <= 2, "{what}"),
                        _ => {}
                    }
                }
            }
        }
    }
}

/// Symmetric and positive definite on samples, for any weights and scalings of the operator.
#[test]
fn every_kind_is_symmetric_and_positive_definite() {
    for models in [1, 3] {
        let operator = operator::<f64>(&factors(models, 1e3)).scaled(4.0, 0.125);
        for kind in KINDS {
            let preconditioner = Kronecker::new(kind, &operator, 1e-3, Threading::Sequential).unwrap();
            let mut workspace = Workspace::new(preconditioner.scratch_elements(), Threading::Sequential);
            let mut inverse = |x: &[f64]| {
                let mut z = vec![0.0; x.len()];
                preconditioner.apply_inverse(x, &mut z, &mut workspace).unwrap();
                z
            };
            for seed in 0..5 {
                let (x, y) = (random(M * N, seed), random(M * N, seed + 50));
                let (zx, zy) = (inverse(&x), inverse(&y));
                let dot = |a: &[f64], b: &[f64]| vector::dot(a, b, Threading::Sequential);
                let size = dot(&zx, &zx).sqrt() * dot(&y, &y).sqrt();
                // Sums of some hundred products, four in a row: 1e-16 · 1e4.
                assert!((dot(&zx, &y) - dot(&x, &zy)).abs() < 1e-12 * size, "{}", kind.name());
                assert!(dot(&x, &zx) > 0.0, "{}", kind.name());
            }
        }
    }
}

/// A rotated system is the same system: same steps, same solution.
#[test]
fn rotating_changes_coordinates_and_nothing_else() {
    let factors = factors(3, 1e3);
    let operator = operator::<f64>(&factors).scaled(2.0, 0.5);
    let (shape, shift, threading) = (operator.shape(), 1e-3, Threading::Sequential);
    let weights: Vec<f64> = operator.terms_weights().collect();
    let b = random(M * N, 9);
    let run = |operator: &dyn LinearOperator<f64>, preconditioner: &dyn Preconditioner<f64>, b: &[f64]| {
        let mut rule = Any(vec![Box::new(RelativeResidual(1e-11)), Box::new(MaxIterations(500))]);
        solve(&Damped::new(operator, shift), preconditioner, b, &vec![0.0; M * N], &mut rule, &mut Silent)
            .unwrap()
    };
    let applied = Kronecker::new(KroneckerKind::Eigen, &operator, shift, threading).unwrap();
    let want = run(&operator, &applied, &b);

    let (a, g) = operator.sides();
    let a = Side::of(KroneckerKind::Eigen, &a, M, true, threading).unwrap();
    let g = Side::of(KroneckerKind::Eigen, &g, N, true, threading).unwrap();
    let rotated = Rotated::new(shape, a, g, &weights, (2.0, 0.5)).unwrap();
    let scaling = rotated.scaling(shift, threading);
    let (mut r, mut t) = (b.clone(), vec![0.0; M * N]);
    rotated.enter(&mut r, &mut t, threading);
    let mut found = run(rotated.operator(), &scaling, &r);
    rotated.leave(&mut found.x, &mut t, threading);
    assert!(found.iterations.abs_diff(want.iterations) <= 1);
    let size = want.x.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    for (got, want) in found.x.iter().zip(&want.x) {
        // Residuals of 1e-11 of a system of condition 3e4 at most.
        assert!((got - want).abs() < 1e-6 * size, "{got} {want}");
    }
    // And it reports what it takes: more than unrotated, by the second half of each product.
    assert!(scaling.setup_cost().flops > applied.setup_cost().flops);
    assert!(scaling.setup_cost().bytes > applied.setup_cost().bytes);
}

/// Exact null vectors on both sides, a model that is all zero, traces twelve orders of magnitude apart: what the
/// minimised function bounds stays bounded in f32, for any ridge, and null directions stay where they were.
#[test]
fn null_vectors_and_far_apart_traces_do_not_blow_up() {
    let mut all = factors(4, 1e4);
    for (k, (_, a, g)) in all.iter_mut().enumerate() {
        // A dead unit: row and column of zeros. A LayerNorm: the constant vector is in the null space of G.
        for i in 0..N {
            (a[3 * N + i], a[i * N + 3]) = (0.0, 0.0);
        }
        let project = |g: &mut [f64], side: usize| {
            for _ in 0..2 {
                let copy = g.to_vec();
                for i in 0..side {
                    let mean = copy[i * side..(i + 1) * side].iter().sum::<f64>() / side as f64;
                    g[i * side..(i + 1) * side].iter_mut().for_each(|v| *v -= mean);
                }
                let copy = g.to_vec();
                (0..side * side).for_each(|k| g[k] = copy[k % side * side + k / side]);
            }
        };
        project(g, M);
        let scale = [1.0, 1e-12, 0.0, 1e-3][k];
        g.iter_mut().for_each(|v| *v = f64::from((*v * scale) as f32));
        a.iter_mut().for_each(|v| *v = f64::from(*v as f32));
    }
    let operator = operator::<f32>(&all);
    let mut workspace = Workspace::new(operator.scratch_elements(), Threading::Sequential);
    let trace = |s: &[f64], side: usize| s.iter().step_by(side + 1).sum::<f64>();
    let mean: f64 = all.iter().map(|(w, a, g)| w * trace(a, N) * trace(g, M)).sum::<f64>() / (M * N) as f64;
    let (mut b, mut objective) = (vec![0.0f32; M * N], 0.0);
    for k in 0..4 {
        let delta: Vec<f32> = random(M * N, 300 + k as u64).iter().map(|v| *v as f32).collect();
        let before = vector::dot(&delta, &b, Threading::Sequential);
        operator.accumulate_term(k, &delta, &mut b, &mut workspace).unwrap();
        objective += vector::dot(&delta, &b, Threading::Sequential) - before;
    }
    for kind in KINDS {
        for ridge in [1e-5, 1e-3, 1.0] {
            let shift = ridge * mean;
            let damped = Damped::new(&operator, shift);
            let preconditioner = Kronecker::new(kind, &operator, shift, Threading::Sequential).unwrap();
            let mut rule = MaxIterations(50);
            let found =
                solve(&damped, &preconditioner, &b, &vec![0.0f32; M * N], &mut rule, &mut Silent).unwrap();
            let norm = vector::dot(&found.x, &found.x, Threading::Sequential).sqrt();
            // μ‖d‖² is at most the objective at d = 0; half as much again for rounding.
            let bound = 1.5 * (objective / shift).sqrt();
            assert!(norm.is_finite() && norm <= bound, "{} {ridge}: {norm} > {bound}", kind.name());
            // Nothing weighs column 3 or the constant vector of a column; u·‖r‖/μ is what rounding may put there.
            let noise = 16.0 * 2f64.powi(-24) / ridge * norm.max(1.0);
            let dead = found.x.iter().skip(3).step_by(N).fold(0.0f64, |m, v| m.max(f64::from(v.abs())));
            assert!(dead <= noise, "{} {ridge}: {dead} in a dead column", kind.name());
        }
    }
}

/// Two models: the exact inverse and PCG meet in f64, and in f32 one refinement step is enough.
#[test]
fn two_models_directly_and_by_iteration() {
    let factors = factors(2, 1e3);
    let wide = operator::<f64>(&factors);
    let b = random(M * N, 11);
    let weighted = |k: usize| factors[k].2.iter().map(|v| v * factors[k].0).collect::<Vec<f64>>();
    let add = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(a, b)| a + b).collect::<Vec<f64>>();
    let threading = Threading::Sequential;
    let (mut a, mut sum) = (factors[0].1.clone(), add(&factors[0].1, &factors[1].1));
    let a = Pencil::of(&mut a, &mut sum, N, 0.0, threading).unwrap();
    let (mut g, mut sum) = (weighted(0), add(&weighted(0), &weighted(1)));
    let g = Pencil::of(&mut g, &mut sum, M, 0.0, threading).unwrap();
    let mut direct = b.clone();
    TwoTermInverse::new(a, g).apply(&mut direct, &mut vec![0.0; M * N], threading);
    let size = direct.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    for kind in KINDS {
        let preconditioner = Kronecker::new(kind, &wide, 0.0, threading).unwrap();
        let mut rule = Any(vec![Box::new(RelativeResidual(1e-13)), Box::new(MaxIterations(2000))]);
        let found = solve(&wide, &preconditioner, &b, &vec![0.0; M * N], &mut rule, &mut Silent).unwrap();
        for (got, want) in found.x.iter().zip(&direct) {
            assert!((got - want).abs() < 1e-6 * size, "{}: {got} {want}", kind.name());
        }
    }
    // In f32: once the (nearly) exact inverse, then its correction from an f64 residual.
    let narrow = operator::<f32>(&factors);
    let preconditioner = Kronecker::new(KroneckerKind::Generalized, &narrow, 0.0, threading).unwrap();
    let mut workspace = Workspace::new(preconditioner.scratch_elements(), threading);
    let mut wide_workspace = Workspace::new(wide.scratch_elements(), threading);
    let mut x = vec![0.0; M * N];
    let (mut r, norm) = (b.clone(), vector::dot(&b, &b, threading).sqrt());
    for _ in 0..2 {
        let r32: Vec<f32> = r.iter().map(|v| *v as f32).collect();
        let mut z = vec![0.0f32; M * N];
        preconditioner.apply_inverse(&r32, &mut z, &mut workspace).unwrap();
        x.iter_mut().zip(&z).for_each(|(x, z)| *x += f64::from(*z));
        wide.apply(&x, &mut r, &mut wide_workspace).unwrap();
        vector::xpby(&b, -1.0, &mut r, threading);
    }
    let left = vector::dot(&r, &r, threading).sqrt() / norm;
    assert!(left <= 1e-7, "{left}");
    let goal = RefineGoal { relative_residual: 1e-12, max_iterations: 200 };
    let refined = refine(&wide, &narrow, &preconditioner, &b, &vec![0.0; M * N], goal, &mut Silent).unwrap();
    assert_eq!(refined.outcome.stop, StopReason::RelativeResidual);
}

#[test]
fn a_side_that_does_not_fit_is_an_error() {
    let operator = operator::<f64>(&factors(1, 1e1));
    let (a, _) = operator.sides();
    let side = || Side::of(KroneckerKind::Eigen, &a, M, false, Threading::Sequential).unwrap();
    let made = Kronecker::of_sides(
        KroneckerKind::Eigen,
        operator.shape(),
        side(),
        side(),
        &[1.0],
        0.0,
        Threading::Sequential,
    );
    assert!(matches!(made, Err(crate::operator::OperatorError::ShapeMismatch { got: N, expected: M, .. })));
}
