//! Blocked f64 Cholesky on a row-major buffer, the same bits for any number of threads.
//!
//! faer factors the diagonal blocks and solves the triangles sequentially; the products between them, where the flops
//! are, go through `kernel::gemm`.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{LltRegularization, cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
use faer::prelude::ReborrowMut;
use faer::{Mat, MatMut, Par};
use rayon::prelude::*;

use crate::kernel::{Threading, gemm_lower, mat, mat_mut};

/// Side of a diagonal block.
const BLOCK: usize = 256;
/// Rows of a right-hand side that one task solves.
const SOLVE_ROWS: usize = 128;
/// A pivot below this fraction of the largest diagonal entry counts as zero: what is left of a null direction after
/// n rounding errors of 1e-16 is noise, and dividing by it would send the solution anywhere.
const PIVOT_FLOOR: f64 = 1e-13;

/// The matrix is not numerically positive definite.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NotPositive {
    /// First row that failed.
    pub row: usize,
}

/// Overwrites the lower triangle of row-major `s` `[side, side]` with `L`, `S = L·Lᵀ`. The strict upper triangle is
/// neither read nor written. Cost: `side³/3` flops.
///
/// # Errors
/// [`NotPositive`] at a pivot that is zero, negative or lost in rounding; the lower triangle is then undefined.
pub fn factorise(s: &mut [f64], side: usize, threading: Threading) -> Result<(), NotPositive> {
    let largest = (0..side).map(|i| s[i * side + i]).fold(0.0f64, f64::max);
    if !(largest.is_finite() && largest > 0.0) {
        return Err(NotPositive { row: 0 });
    }
    let mut rest = mat_mut(s, side, side);
    let mut row = 0;
    while row < side {
        let width = BLOCK.min(side - row);
        let (mut diagonal, _, mut below, mut trailing) = rest.split_at_mut(width, width);
        factor_block(diagonal.rb_mut(), row, largest * PIVOT_FLOOR)?;
        let l11 = diagonal.as_ref();
        // A21 ← A21·L11⁻ᵀ, as L11·X = A21ᵀ.
        solve_rows(below.rb_mut(), threading, |chunk| {
            solve_lower_triangular_in_place(l11, chunk.transpose_mut(), Par::Seq);
        });
        let l21 = below.as_ref();
        gemm_lower(trailing.rb_mut(), true, l21, l21.transpose(), -1.0, threading);
        rest = trailing;
        row += width;
    }
    Ok(())
}

fn factor_block(mut block: MatMut<'_, f64>, first_row: usize, floor: f64) -> Result<(), NotPositive> {
    let n = block.nrows();
    let mut copy = Mat::<f64>::zeros(n, n);
    for j in 0..n {
        for i in j..n {
            copy[(i, j)] = block[(i, j)];
        }
    }
    let mut memory = MemBuffer::new(cholesky_in_place_scratch::<f64>(n, Par::Seq, Default::default()));
    cholesky_in_place(
        copy.as_mut(),
        LltRegularization::default(),
        Par::Seq,
        MemStack::new(&mut memory),
        Default::default(),
    )
    .map_err(|_| NotPositive { row: first_row })?;
    for i in 0..n {
        let pivot = copy[(i, i)] * copy[(i, i)];
        if !(pivot.is_finite() && pivot > floor) {
            return Err(NotPositive { row: first_row + i });
        }
        for j in 0..=i {
            block[(i, j)] = copy[(i, j)];
        }
    }
    Ok(())
}

/// Applies `solve` to chunks of whole rows, on a grid that depends on the number of rows alone.
fn solve_rows(rows: MatMut<'_, f64>, threading: Threading, solve: impl Fn(MatMut<'_, f64>) + Sync + Send) {
    let mut chunks = Vec::new();
    let mut rest = rows;
    while rest.nrows() > SOLVE_ROWS {
        let (chunk, tail) = rest.split_at_row_mut(SOLVE_ROWS);
        chunks.push(chunk);
        rest = tail;
    }
    if rest.nrows() > 0 {
        chunks.push(rest);
    }
    match threading {
        Threading::Sequential => chunks.into_iter().for_each(solve),
        Threading::Parallel => chunks.into_par_iter().for_each(solve),
    }
}

/// `R ← R·S⁻¹` for row-major `r` `[rows, side]`, with `l` from [`factorise`]. Cost: `2·rows·side²` flops.
pub fn solve_right(l: &[f64], side: usize, r: &mut [f64], threading: Threading) {
    if side == 0 {
        return;
    }
    let rows = r.len() / side;
    let l = mat(l, side, side);
    solve_rows(mat_mut(r, rows, side), threading, |chunk| {
        let mut x = chunk.transpose_mut();
        solve_lower_triangular_in_place(l, x.rb_mut(), Par::Seq);
        solve_upper_triangular_in_place(l.transpose(), x, Par::Seq);
    });
}

/// The smallest eigenvalue of `S = L·Lᵀ`, from above, by inverse iteration from a fixed vector: within a few per cent
/// where one direction stands out, and of the right size where several do. Cost: `12·side²` flops.
pub fn least_eigenvalue(l: &[f64], side: usize) -> f64 {
    const STEPS: usize = 6;
    let norm = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
    // Signs without a pattern that a structured matrix could be orthogonal to.
    let mut v: Vec<f64> = (0..side as u64)
        .map(|k| if k.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 63 == 0 { 1.0 } else { -1.0 })
        .collect();
    let mut least = f64::INFINITY;
    for _ in 0..STEPS {
        let size = norm(&v);
        v.iter_mut().for_each(|x| *x /= size);
        solve_right(l, side, &mut v, Threading::Sequential);
        least = norm(&v).recip();
    }
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spd(n: usize) -> Vec<f64> {
        let mut s = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..n {
                s[i * n + j] = 1.0 / (1.0 + (i as f64 - j as f64).abs()) + if i == j { 1.0 } else { 0.0 };
            }
        }
        s
    }

    #[test]
    fn two_by_two_by_hand() {
        // [4 2; 2 5] = [2 0; 1 2]·[2 1; 0 2]; [8 9]·S⁻¹ = [22, 20]/16.
        let mut s = vec![4.0, 2.0, 2.0, 5.0];
        factorise(&mut s, 2, Threading::Sequential).unwrap();
        assert_eq!(s, [2.0, 2.0, 1.0, 2.0]);
        let mut r = vec![8.0, 9.0];
        solve_right(&s, 2, &mut r, Threading::Sequential);
        assert!((r[0] - 1.375).abs() < 1e-15 && (r[1] - 1.25).abs() < 1e-15, "{r:?}");
    }

    #[test]
    fn solves_across_blocks_with_the_same_bits_on_many_threads() {
        let n = 700;
        let s = spd(n);
        let x: Vec<f64> = (0..300 * n).map(|i| ((i * 37 % 101) as f64) / 50.0 - 1.0).collect();
        let mut r = vec![0.0; 300 * n];
        crate::kernel::gemm(
            mat_mut(&mut r, 300, n),
            false,
            mat(&x, 300, n),
            mat(&s, n, n),
            1.0,
            Threading::Sequential,
        );
        let (mut l1, mut l2) = (s.clone(), s.clone());
        factorise(&mut l1, n, Threading::Sequential).unwrap();
        factorise(&mut l2, n, Threading::Parallel).unwrap();
        assert!(l1 == l2);
        let mut r2 = r.clone();
        solve_right(&l1, n, &mut r, Threading::Sequential);
        solve_right(&l2, n, &mut r2, Threading::Parallel);
        assert!(r == r2);
        // Condition below 20: a few hundred roundings of 1e-16.
        for (got, want) in r.iter().zip(&x) {
            assert!((got - want).abs() < 1e-12);
        }
    }

    #[test]
    fn the_upper_triangle_is_the_callers() {
        // Several blocks, and tiles of the trailing product that begin and end inside.
        for n in [257, 700, 1100] {
            let s = spd(n);
            let mut l = s.clone();
            factorise(&mut l, n, Threading::Parallel).unwrap();
            for i in 0..n {
                assert!(l[i * n + i + 1..(i + 1) * n] == s[i * n + i + 1..(i + 1) * n], "row {i} of {n}");
            }
        }
    }

    #[test]
    fn the_least_eigenvalue_is_found() {
        let n = 40;
        let mut s = vec![0.0; n * n];
        for i in 0..n {
            s[i * n + i] = 1.0 + i as f64;
        }
        s[17 * n + 17] = 1e-6;
        factorise(&mut s, n, Threading::Sequential).unwrap();
        assert!((least_eigenvalue(&s, n) - 1e-6).abs() < 1e-9);
    }

    #[test]
    fn a_singular_matrix_is_refused() {
        let n = 5;
        let v = [1.0, 2.0, 3.0, 4.0, 5.0];
        let mut s: Vec<f64> = (0..n * n).map(|k| v[k / n] * v[k % n]).collect();
        assert!(factorise(&mut s, n, Threading::Sequential).is_err());
        assert!(factorise(&mut [0.0; 4], 2, Threading::Sequential).is_err());
    }
}
