//! Every operator against its dense matrix, written out from the definition; shapes with out ≠ in.

use std::sync::Arc;

use super::dense::materialise;
use super::*;
use crate::kernel::Threading;

fn random(len: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 33) as f64) / f64::from(1u32 << 31) - 0.5
        })
        .collect()
}

/// `FᵀF` of a row-major `[rank, side]` factor.
fn gram(f: &[f64], rank: usize, side: usize) -> Vec<f64> {
    let mut s = vec![0.0; side * side];
    for k in 0..rank {
        for i in 0..side {
            for j in 0..side {
                s[i * side + j] += f[k * side + i] * f[k * side + j];
            }
        }
    }
    s
}

fn scaled_off_diagonal(s: &[f64], side: usize, lambda: f64) -> Vec<f64> {
    s.iter().enumerate().map(|(k, v)| if k / side == k % side { *v } else { lambda * v }).collect()
}

fn symmetric<T: Real>(s: &[f64], side: usize, hold: bool) -> Factor<T> {
    let rows = Arc::new(MemoryRows::new(side, side, s.to_vec()).unwrap());
    let panels = if hold {
        Panels::held(rows.as_ref(), Threading::Sequential).unwrap()
    } else {
        Panels::streamed(rows)
    };
    Factor::Symmetric(Symmetric::new(panels).unwrap())
}

fn low_rank<T: Real>(f: &[f64], rank: usize, side: usize, scale: f64, lambda: f64) -> Factor<T> {
    let s = gram(f, rank, side);
    let diagonal: Vec<f64> = (0..side).map(|i| s[i * side + i]).collect();
    let rows = Arc::new(MemoryRows::new(rank, side, f.to_vec()).unwrap());
    Factor::LowRank(LowRank::new(Panels::streamed(rows), scale, lambda, diagonal.into()))
}

/// Column of `Σ w G ⊗ A` on row-major `vec(X)`: entry (i,j),(k,l) is `w·G[i,k]·A[j,l]`.
fn kronecker(terms: &[(f64, Vec<f64>, Vec<f64>)], m: usize, n: usize) -> Vec<f64> {
    let mut c = vec![0.0; m * n * m * n];
    for (w, g, a) in terms {
        for i in 0..m {
            for j in 0..n {
                for k in 0..m {
                    for l in 0..n {
                        c[(i * n + j) * m * n + k * n + l] += w * g[i * m + k] * a[j * n + l];
                    }
                }
            }
        }
    }
    c
}

fn assert_close(got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    let size = want.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    for (k, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= tolerance * size, "entry {k}: {got} {want}");
    }
}

#[test]
fn kronecker_sums_match_their_matrix_in_every_representation() {
    let (m, n, rank) = (5, 7, 3);
    let full: Vec<_> =
        (0..2).map(|k| (gram(&random(9 * m, 10 + k), 9, m), gram(&random(9 * n, 20 + k), 9, n))).collect();
    let (fg, fa) = (random(rank * m, 31), random(rank * n, 32));
    let lambda = 0.6;
    let dense = kronecker(
        &[
            (1.5, full[0].0.clone(), full[0].1.clone()),
            (0.5, full[1].0.clone(), full[1].1.clone()),
            (
                2.0,
                scaled_off_diagonal(&gram(&fg, rank, m), m, lambda),
                scaled_off_diagonal(&gram(&fa, rank, n), n, lambda),
            ),
        ],
        m,
        n,
    );
    for hold in [true, false] {
        let terms = vec![
            KroneckerTerm {
                weight: 1.5,
                a: symmetric(&full[0].1, n, hold),
                g: symmetric(&full[0].0, m, hold),
                diagonals: None,
            },
            KroneckerTerm {
                weight: 0.5,
                a: symmetric(&full[1].1, n, hold),
                g: symmetric(&full[1].0, m, hold),
                diagonals: None,
            },
            KroneckerTerm {
                weight: 2.0,
                a: low_rank(&fa, rank, n, 1.0, lambda),
                g: low_rank(&fg, rank, m, 1.0, lambda),
                diagonals: None,
            },
        ];
        let operator = KroneckerSum::<f64>::new(BlockShape::new(m, n), terms).unwrap();
        assert_close(&materialise(&operator).unwrap(), &dense, 1e-14);
    }
    // f32: two products of length below 10, each rounding at 6e-8.
    let terms = vec![KroneckerTerm {
        weight: 1.5,
        a: symmetric(&full[0].1, n, true),
        g: symmetric(&full[0].0, m, true),
        diagonals: Some((
            (0..n).map(|i| full[0].1[i * n + i]).collect(),
            (0..m).map(|i| full[0].0[i * m + i]).collect(),
        )),
    }];
    let operator = KroneckerSum::<f32>::new(BlockShape::new(m, n), terms).unwrap();
    let dense = kronecker(&[(1.5, full[0].0.clone(), full[0].1.clone())], m, n);
    assert_close(&materialise(&operator).unwrap(), &dense, 2e-6);
    let mut diagonal = vec![0.0f32; m * n];
    operator.diagonal(&mut diagonal).unwrap();
    for (k, d) in diagonal.iter().enumerate() {
        assert!((f64::from(*d) - dense[k * m * n + k]).abs() < 1e-6);
    }
}

#[test]
fn gram_sums_match_their_matrix_formed_and_by_terms() {
    let (m, n, rank) = (4, 6, 2);
    let s = gram(&random(8 * n, 1), 8, n);
    let f = random(rank * n, 2);
    let low = gram(&f, rank, n);
    let identity: Vec<f64> = (0..m * m).map(|k| if k / m == k % m { 1.0 } else { 0.0 }).collect();
    let dense = kronecker(
        &[
            (0.7, identity.clone(), s.clone()),
            (1.3, identity, scaled_off_diagonal(&low, n, 0.5).iter().map(|v| 3.0 * v).collect()),
        ],
        m,
        n,
    );
    let terms = || {
        vec![
            GramTerm { weight: 0.7, a: symmetric::<f64>(&s, n, false), diagonal: None },
            GramTerm { weight: 1.3, a: low_rank::<f64>(&f, rank, n, 3.0, 0.5), diagonal: None },
        ]
    };
    let mut operator = GramSum::new(BlockShape::new(m, n), terms()).unwrap();
    assert_close(&materialise(&operator).unwrap(), &dense, 1e-14);
    let mut workspace = Workspace::new(operator.scratch_elements(), Threading::Sequential);
    operator.form(&mut workspace).unwrap();
    assert_close(&materialise(&operator).unwrap(), &dense, 1e-14);
    assert_eq!(operator.flops(), 2.0 * (m * n * n) as f64);
}

#[test]
fn combinations_match_their_formulas() {
    let shape = BlockShape::new(2, 3);
    let one = Identity::new(shape, vec![1.0, 0.5]);
    let mut d = Buffer::<f64>::zeroed(6);
    d.copy_from_slice(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let diagonal = Diagonal::new(shape, vec![d]).unwrap();
    let sum = Sum::<f64>::new(vec![&one, &diagonal]).unwrap();
    let scaled = Scaled::new(&sum, 2.0);
    let damped = Damped::new(&scaled, 0.25);
    let matrix = materialise(&damped).unwrap();
    let mut of = vec![0.0; 6];
    damped.diagonal(&mut of).unwrap();
    for i in 0..6 {
        for j in 0..6 {
            let want = if i == j { 2.0 * (1.5 + (i + 1) as f64) + 0.25 } else { 0.0 };
            assert_eq!(matrix[i * 6 + j], want);
        }
        assert_eq!(of[i], matrix[i * 7]);
    }
}

/// `⟨x, A·y⟩ = ⟨A·x, y⟩` and `⟨x, A·x⟩ ≥ 0` wherever an operator says so.
#[test]
fn declared_properties_hold_on_samples() {
    let (m, n) = (9, 4);
    let shape = BlockShape::new(m, n);
    let kron = KroneckerSum::<f64>::new(
        shape,
        vec![KroneckerTerm {
            weight: 1.0,
            a: low_rank(&random(2 * n, 3), 2, n, 1.0, 0.3),
            g: symmetric(&gram(&random(12 * m, 4), 12, m), m, false),
            diagonals: None,
        }],
    )
    .unwrap();
    let grams = GramSum::new(
        shape,
        vec![GramTerm { weight: 2.0, a: low_rank::<f64>(&random(3 * n, 5), 3, n, 1.0, 1.0), diagonal: None }],
    )
    .unwrap();
    let identity = Identity::new(shape, vec![1.0]);
    let operators: [&dyn LinearOperator<f64>; 3] = [&kron, &grams, &identity];
    for operator in operators {
        assert_eq!(operator.properties(), Properties::SPSD);
        let mut workspace = Workspace::new(operator.scratch_elements(), Threading::Parallel);
        for seed in 0..5 {
            let (x, y) = (random(m * n, 100 + seed), random(m * n, 200 + seed));
            let (mut ax, mut ay) = (vec![0.0; m * n], vec![0.0; m * n]);
            operator.apply(&x, &mut ax, &mut workspace).unwrap();
            operator.apply(&y, &mut ay, &mut workspace).unwrap();
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            assert!((dot(&x, &ay) - dot(&ax, &y)).abs() < 1e-12);
            assert!(dot(&x, &ax) >= -1e-12);
        }
    }
}

/// Held, streamed, one thread, many: the same bits, across panel borders.
#[test]
fn representation_and_threads_do_not_change_a_bit() {
    let (m, n) = (700, 530);
    let (g, a) = (gram(&random(40 * m, 6), 40, m), gram(&random(40 * n, 7), 40, n));
    let x: Vec<f32> = random(m * n, 8).iter().map(|v| *v as f32).collect();
    let mut results = Vec::new();
    for (hold, threading) in [
        (true, Threading::Sequential),
        (false, Threading::Sequential),
        (true, Threading::Parallel),
        (false, Threading::Parallel),
    ] {
        let term = KroneckerTerm {
            weight: 1.0,
            a: symmetric::<f32>(&a, n, hold),
            g: symmetric(&g, m, hold),
            diagonals: None,
        };
        let operator = KroneckerSum::new(BlockShape::new(m, n), vec![term]).unwrap();
        let mut y = vec![0.0f32; m * n];
        let mut workspace = Workspace::new(operator.scratch_elements(), threading);
        operator.apply(&x, &mut y, &mut workspace).unwrap();
        results.push(y);
    }
    for other in &results[1..] {
        assert!(results[0] == *other);
    }
}

#[test]
fn wrong_lengths_are_errors() {
    let identity = Identity::new(BlockShape::new(2, 2), vec![1.0]);
    let mut workspace = Workspace::<f64>::new(0, Threading::Sequential);
    let error = identity.apply(&[1.0; 3], &mut [0.0; 4], &mut workspace).unwrap_err();
    assert_eq!(error.to_string(), "x: got 3 values, expected 4");
    assert!(
        KroneckerSum::<f64>::new(
            BlockShape::new(3, 2),
            vec![KroneckerTerm {
                weight: 1.0,
                a: symmetric(&[1.0; 9], 3, true),
                g: symmetric(&[1.0; 4], 2, true),
                diagonals: None
            }]
        )
        .is_err()
    );
}
